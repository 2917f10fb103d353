"""A reader, a map function and an encoder whose token counts are known by construction, for tests of the stream.

A record is ``{"id": n, "parts": [part, ...]}``; a part is the number of tokens of a document, a list of such numbers
(the messages of a conversation, every second one supervised), or the reason of a drop (``"encoder: ..."``: by the
encoder). The first token of every item is the record's id; the others count up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from corefit.data.encode import Encoded
from corefit.data.jsonl import index_jsonl, read_jsonl
from corefit.data.stream import Source
from corefit.types import (
    BadRecord,
    Conversation,
    DatasetReader,
    Document,
    Drop,
    MapFunction,
    Message,
    Record,
    Sources,
)

JSONL = DatasetReader(name="jsonl", summary="", read=read_jsonl, index=index_jsonl, seekable=True)
NO_INDEX = DatasetReader(name="no_index", summary="", read=read_jsonl, seekable=True)


def read_forward(sources: Sources, options: object) -> Iterator[Record | BadRecord]:
    return read_jsonl(sources, options)


FORWARD = DatasetReader(name="forward", summary="", read=read_forward)


def map_parts(record: Record, options: object) -> Iterator[Document | Conversation | Drop]:
    for part in record["parts"]:
        if isinstance(part, str) and not part.startswith("encoder: "):
            yield Drop(part)
        elif isinstance(part, list):
            messages = tuple(Message("user", f"{record['id']} {n}") for n in part)
            yield Conversation(messages, dropped=("trailing_user",) * record.get("trailing", 0), notes=("joined",))
        else:
            yield Document(f"{record['id']} {part}")


PARTS = MapFunction(name="parts", summary="", map=map_parts)


class FakeEncoder:
    """Counts what it is asked to encode."""

    supervise = "all"

    def __init__(self):
        self.n_items = 0
        self.largest_call = 0

    def encode(self, items: Sequence[tuple[Document | Conversation, str]]) -> Encoded:
        self.n_items += len(items)
        self.largest_call = max(self.largest_call, len(items))
        tokens, spans, cuts, samples, drops, notes, at = [np.empty(0, np.int32)], [], [], [], [], [], 0
        for number, (item, _) in enumerate(items):
            ids, targets, turns, drop, noticed = self.one(item)
            supervised = sum(end - max(begin, 1) for begin, end in targets)
            drops.append(drop or (None if supervised else "nothing_supervised"))
            notes.append(noticed)
            if drops[-1] is None:
                samples.append([at, len(ids), len(spans), len(targets), -1, supervised, number, 0])
            tokens.append(ids)
            spans += [[at + begin, at + end] for begin, end in targets]
            cuts += [at + turn for turn in turns]
            at += len(ids)
        spans, cuts, samples = (np.array(rows, np.int64) for rows in (spans, cuts, samples))
        return Encoded(np.concatenate(tokens), spans.reshape(-1, 2), cuts, samples.reshape(-1, 8), drops, notes)

    def one(self, item):
        """Give ids, ranges of targets, offsets of turns, why there is no sample, what was noticed."""
        if isinstance(item, Conversation):
            lengths = [int(message.content.split()[1]) for message in item.messages]
            number = int(item.messages[0].content.split()[0])
            bounds = np.cumsum([0, *lengths]).tolist()
            spans = [(begin, end) for begin, end in zip(bounds[1::2], bounds[2::2], strict=False)]
            cuts = bounds[:-1:2]
        else:
            number, word = item.text.split(" ", 1)
            if word.startswith("encoder: "):
                return np.empty(0, np.int32), [], [], word.removeprefix("encoder: "), ("look_alike",)
            bounds, spans, cuts = [0, int(word)], [(0, int(word))], []
        ids = np.arange(bounds[-1], dtype=np.int32) + 1
        ids[0] = int(number)
        return ids, spans, cuts, None, ()


def write_records(path: Path, records: Sequence[Sequence[object] | str], **more: object) -> Path:
    """Write one line a record; a string is written as it is."""
    lines = [
        r if isinstance(r, str) else json.dumps({"id": i, "parts": list(r), **more}) for i, r in enumerate(records)
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def source(*paths: Path, reader: DatasetReader = JSONL, **changes: object) -> Source:
    settings = {"map_function": PARTS, "shuffle": False, **changes}
    return Source(reader=reader, sources=Sources(tuple(paths)), **settings)
