"""Open Assistant conversations: guanaco text, message trees and flat messages, told apart by what a record holds.

Guanaco text, ``{"text": "### Human: ...### Assistant: ..."}``, doesn't say who typed a marker, so the rules are strict,
and what could be a human's words is never supervised:

- ``### Human:``, or ``### Assistant:`` with white space or the end of the text after it, is a marker where the role
  changes, outside a ````` ``` ````` fence. Any other is text and noted as ``marker_in_text``; so is ``#### Human:``
  after white space, a heading.
- The format writes a marker straight after the text before it. There, and at the start of a line, a marker of the role
  that is speaking opens another message (the two are joined by a blank line: ``joined``); within a line it is text.
- An ``### Assistant:`` after white space that another follows, straight after text and with no human between, is the
  human's text.
- A fence counts only if it is closed and can't be two fences that were both left open.
- An answer is kept, masked and noted as ``doubtful_answer`` where the text can't show whose words it holds: two
  assistant markers for one answer; a marker after white space in a row that elsewhere writes them without; a marker
  inside a human's fence that can't be trusted; a ``### Human:`` in a fence, written as a real one would be; a heading
  that may be ``#`` and a marker.

All three forms: texts lose the white space around them; an empty one is left out (``empty_message``), as is what
stands before the first marker (``leading_text``); equal neighbours are joined by a blank line (``joined``); user
messages at the end are left out (``trailing_user``); an assistant message at the beginning is kept, masked
(``leading_assistant``). Deleted and review-failed messages never appear, nor does anything below them (all counted
under that reason); synthetic ones are kept. Branches that ``threads = "best"`` doesn't choose are not counted.

Source: the guanaco rows of timdettmers/openassistant-guanaco; the message export of LAION-AI/Open-Assistant. XTuner
v0.1.23 (``oasst1_map_fn``) splits at every ``###``, so it loses headings and all that follows them, pairs messages by
position, so two human messages in a row make the second one the answer, and reads neither trees nor flat messages.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from corefit import (
    BadRecord,
    Conversation,
    DataError,
    DatasetReader,
    Drop,
    MapFunction,
    Message,
    Position,
    Record,
    Sources,
    UserError,
    fetch_jsonl,
    index_jsonl,
    read_jsonl,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_THREAD = 200
"""Messages in a thread of flat messages, at most (a record has at most 500 levels, two a message)."""
PEEKED = 20
"""Records at the start of each file that decide whether it holds flat messages."""

_ROLES = {"prompter": "user", "assistant": "assistant", "Human": "user", "Assistant": "assistant"}
_Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Oasst1Options:
    """Keys of ``data.options``."""

    threads: str = "best"
    """``best``: the best-ranked reply at every level (lowest ``rank``, none last, ties by order), one conversation a
    tree. ``all``: every path from the root to a leaf, once user messages that nobody answered are cut off; paths share
    their beginnings, so an answer with two answers below it is learnt twice."""

    def __post_init__(self) -> None:
        if self.threads not in ("best", "all"):
            raise UserError(f"threads is {self.threads!r}, expected 'best' or 'all'")


# ------------------------------------------------------------------------------------------------------- conversations


def _conversation(
    messages: Sequence[Message], dropped: Sequence[str] = (), notes: Sequence[str] = ()
) -> Conversation | Drop:
    kept = [message for message in messages if message.content]
    dropped, notes = [*dropped, *["empty_message"] * (len(messages) - len(kept))], list(notes)
    if not kept:
        return Drop("empty")
    while kept and kept[-1].role == "user":
        kept.pop()
        dropped.append("trailing_user")
    if not kept:
        return Drop("no_answer")
    joined = kept[:1]
    for message in kept[1:]:
        last = joined[-1]
        if message.role != last.role:
            joined.append(message)
        else:
            supervised = False if False in (last.supervised, message.supervised) else None
            joined[-1] = last._replace(content=f"{last.content}\n\n{message.content}", supervised=supervised)
            notes.append("joined")
    if joined[0].role == "assistant":
        joined[0] = joined[0]._replace(supervised=False)
        notes.append("leading_assistant")
    return Conversation(tuple(joined), (), tuple(dropped), tuple(notes))


# ------------------------------------------------------------------------------------------------------- guanaco text

_MARKER = re.compile(r"### (?P<role>Human|Assistant):")
_EVENT = re.compile(r"```+|### (?P<role>Human|Assistant):")  # a fence or a marker; both begin with one known letter
_STARTS = re.compile(r"\s*### (?:Human|Assistant):")


class _Marker(NamedTuple):
    role: str
    start: int
    end: int
    glued: bool  # straight after text, or first of all
    line: bool  # first on its line
    doubt: bool = False  # a heading, or between fences of a human's that may or may not be a pair


def _marker(text: str, event: re.Match[str]) -> _Marker | None:
    """Give the marker, or None where it only looks like one."""
    start, end = event.span()
    role = event["role"]
    if role == "Assistant" and not (end == len(text) or text[end].isspace()):
        return None
    before = start - 1
    while before >= 0 and text[before] == "#":
        before -= 1
    first = before < 0 or text[before].isspace()
    heading = first and before < start - 1
    begins_line = first and not text[text.rfind("\n", 0, start) + 1 : start].strip(" \t")
    return _Marker(_ROLES[role], start, end, not first or start == 0, begins_line, heading)


def _closing(text: str, events: Sequence[re.Match[str]], opening: int, n_fences: int) -> tuple[int | None, bool]:
    """Give the event that closes a fence, and whether to trust it; ``n_fences``: from the opening to the text's end.

    A fence that was never closed pairs with the opening of the next one, and what a human typed lies between them.
    """
    fence, later = events[opening].group(), range(opening + 1, len(events))
    close = next((k for k in later if not events[k]["role"] and events[k].group().startswith(fence)), None)
    if close is None or not any(event["role"] for event in events[opening + 1 : close]):
        return close, True
    here, previous = events[close], events[close - 1]
    begins_message = previous["role"] and not text[previous.end() : here.start()].strip(" \t")
    has_language = text[here.end() : here.end() + 1].isalnum()
    return close, not (begins_message or has_language or n_fences % 2)


def _markers(text: str) -> tuple[list[_Marker], list[_Marker], int]:
    """Give the markers outside fences; those inside and headings; how many look-alikes there are beside them."""
    events = list((_EVENT if "```" in text else _MARKER).finditer(text))
    outside: list[_Marker] = []
    inside: list[_Marker] = []
    fences_left = sum(1 for event in events if not event["role"])
    lookalikes, at, distrust_until = 0, 0, 0
    while at < len(events):
        if not events[at]["role"]:
            close, trusted = _closing(text, events, at, fences_left)
            fences_left -= 1
            if close is not None and trusted:
                found = [_marker(text, event) for event in events[at + 1 : close] if event["role"]]
                inside += [marker for marker in found if marker]
                lookalikes += found.count(None)
                fences_left -= sum(1 for event in events[at + 1 : close + 1] if not event["role"])
                at = close
            elif close is not None and not (outside and outside[-1].role == "assistant" and outside[-1].glued):
                distrust_until = close
        elif marker := _marker(text, events[at]):
            if marker.doubt:
                inside.append(marker)
            else:
                outside.append(marker._replace(doubt=True) if at < distrust_until else marker)
        else:
            lookalikes += 1
        at += 1
    return outside, inside, lookalikes


def _from_text(text: str) -> Conversation | Drop:
    markers, quoted, n_text = _markers(text)
    n_text += len(quoted)
    glued_row = any(marker.glued and marker.role == "assistant" for marker in markers)
    outdone = [False] * (len(markers) + 1)  # an assistant's follows, straight after text and with no human between
    for k in range(len(markers) - 2, -1, -1):
        after = markers[k + 1]
        outdone[k] = after.role == "assistant" and (after.glued or outdone[k + 1])
    opened: list[_Marker] = []
    doubtful: set[int] = set()  # indexes into opened
    for k, marker in enumerate(markers):
        assistant = marker.role == "assistant"
        if opened and opened[-1].role == marker.role:
            boundary = marker.glued or marker.line
            if assistant and (boundary or not opened[-1].glued):
                doubtful.add(len(opened) - 1)
        else:
            boundary = not assistant or marker.glued or not outdone[k]
        if not boundary:
            n_text += 1
            continue
        if assistant and (
            marker.doubt or (glued_row and not marker.glued) or (opened and opened[-1].role == "assistant")
        ):
            doubtful.add(len(opened))
        opened.append(marker)
    if not opened:
        return Drop("no_marker")
    starts = [marker.start for marker in opened]
    for marker in quoted:
        message = bisect_left(starts, marker.start) - 1
        if message >= 0 and opened[message].role == "assistant":
            real = marker.role == "user" and (marker.glued or not opened[message].glued)
            if marker.doubt or real:
                doubtful.add(message)
    dropped = ["leading_text"] if text[: starts[0]].strip() else []
    notes = ["marker_in_text"] * n_text + ["doubtful_answer"] * len(doubtful)
    messages = [
        Message(marker.role, text[marker.end : end].strip(), supervised=False if k in doubtful else None)
        for k, (marker, end) in enumerate(zip(opened, [*starts[1:], len(text)], strict=True))
    ]
    return _conversation(messages, dropped, notes)


# ------------------------------------------------------------------------------------------------------ message trees


def _unusable(node: object) -> str | None:
    """Why a message never appears; None: it may."""
    if not isinstance(node, Mapping) or not isinstance(node.get("text"), str):
        return "malformed_message"
    if node.get("deleted"):
        return "deleted"
    if node.get("review_result") is False:
        return "review_failed"
    role = node.get("role")
    return None if role in ("prompter", "assistant") else "unknown_role"


def _replies(node: object) -> Sequence[Any]:
    replies = node.get("replies") if isinstance(node, Mapping) else None
    return replies if isinstance(replies, list | tuple) else ()


def _rank(node: _Fields) -> float:
    rank = node.get("rank")
    return rank if isinstance(rank, int | float) else float("inf")


def _from_tree(root: _Fields, options: Oasst1Options) -> Iterator[Conversation | Drop]:
    if reason := _unusable(root):
        yield Drop(reason)
        return
    nodes, above = [root], [-1]  # a message comes after its parent
    dropped: list[str] = []
    stack: list[tuple[Any, int, str | None]] = [(reply, 0, None) for reply in reversed(_replies(root))]
    while stack:
        node, parent, reason = stack.pop()
        reason = reason or _unusable(node)
        if reason:
            dropped.append(reason)
        else:
            nodes.append(node)
            above.append(parent)
        stack += [(reply, len(nodes) - 1, reason) for reply in reversed(_replies(node))]
    ends = _best_end(nodes, above) if options.threads == "best" else _answered_ends(nodes, above, dropped)
    if not ends:
        yield Drop("no_answer")
    for end in ends:
        path = []
        while end >= 0:
            path.append(nodes[end])
            end = above[end]
        yield _conversation([Message(_ROLES[node["role"]], node["text"].strip()) for node in reversed(path)], dropped)
        dropped = []  # counted once a tree


def _best_end(nodes: Sequence[_Fields], above: Sequence[int]) -> list[int]:
    best: dict[int, int] = {}
    for k, parent in enumerate(above):
        if parent >= 0 and (parent not in best or _rank(nodes[k]) < _rank(nodes[best[parent]])):
            best[parent] = k
    end = 0
    while end in best:
        end = best[end]
    return [end]


def _answered_ends(nodes: Sequence[_Fields], above: Sequence[int], dropped: list[str]) -> list[int]:
    """Give the leaves that are left once messages that lead to no answer are cut off; these are counted in dropped."""
    leads = [node["role"] == "assistant" and bool(node["text"].strip()) for node in nodes]
    inner = [False] * len(nodes)
    for k in range(len(nodes) - 1, 0, -1):
        if leads[k]:
            leads[above[k]] = inner[above[k]] = True
    cut = (node for node, kept in zip(nodes, leads, strict=True) if not kept)
    dropped += ["trailing_user" if node["role"] == "prompter" else "empty_message" for node in cut]
    return [k for k in range(len(nodes)) if leads[k] and not inner[k]]


# --------------------------------------------------------------------------------------------------- the map function


def _is_flat(record: _Fields) -> bool:
    parent = record.get("parent_id")
    return (
        isinstance(record.get("message_id"), str)
        and isinstance(record.get("role"), str)
        and (parent is None or isinstance(parent, str))
        and "text" in record
        and "prompt" not in record
    )


def _is_tree(record: _Fields) -> bool:
    root = record.get("prompt")
    return "message_tree_id" in record and isinstance(root, Mapping) and "text" in root and "role" in root


def oasst1(record: _Fields, options: Oasst1Options | None = None) -> Iterator[Conversation | Drop]:
    """Give the conversation of a guanaco row, or the threads of a message tree.

    What it can't use is a ``Drop``: ``not_oasst1``, ``no_marker``, ``empty``, ``no_answer``; for the root of a tree
    ``deleted``, ``review_failed``, ``unknown_role`` or ``malformed_message``; ``flat_message`` for a message that was
    read by another reader than ``oasst1``, so that no tree was made of it.
    """
    if _is_flat(record):
        yield Drop("flat_message")
    elif isinstance(record.get("prompt"), Mapping):
        yield from _from_tree(record["prompt"], options or Oasst1Options())
    elif isinstance(record.get("text"), str):
        text = record["text"].strip()
        yield _from_text(text) if text else Drop("empty")
    else:
        yield Drop("not_oasst1")


def sniff(record: _Fields) -> bool:
    """Whether a record is a guanaco row that begins with a marker, a message tree, or a flat message."""
    if _is_flat(record):
        return record["role"] in ("prompter", "assistant")
    text = record.get("text")
    return _is_tree(record) or ("prompt" not in record and isinstance(text, str) and bool(_STARTS.match(text)))


# -------------------------------------------------------------------------------------------------------- flat messages


class _Entry(NamedTuple):
    """What is read at one place: a tree, a record that is no flat message (root -1), or what is wrong there."""

    position: Position
    size: int
    root: int = -1
    bad: BadRecord | None = None


class _Forest:
    """Where every message of flat files lies, and which trees they make; no text is held, some 300 bytes a message."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.numbers: dict[str, int] = {}  # by id; given when an id is first seen, be it as a parent
        # by number; a line of 0 stands for a message not seen yet, a parent of -1 for none
        self.file, self.line, self.offset, self.size, self.parent = (array("q") for _ in range(5))
        self.children: dict[int, list[int]] = {}
        self.entries: list[_Entry] = []
        for record in read_jsonl(sources):
            at = Position(record.file, record.line, record.offset)
            if isinstance(record, BadRecord):
                self.entries.append(_Entry(at, record.size, bad=record))
            elif not _is_flat(record):
                self.entries.append(_Entry(at, record.size))
            elif self.line[number := self._number(record["message_id"])]:
                first = f"{sources.paths[self.file[number]]}:{self.line[number]}"
                self._refuse(at, record.size, f"message {record['message_id']} is already there, at {first}")
            else:
                self.file[number], self.line[number], self.offset[number] = at
                self.size[number] = record.size
                self.parent[number] = self._number(record["parent_id"]) if record.get("parent_id") else -1
        self._plant()
        self.entries.sort(key=itemgetter(0))

    def _number(self, message_id: str) -> int:
        number = self.numbers.setdefault(message_id, len(self.numbers))
        if number == len(self.line):
            for column in (self.file, self.line, self.offset, self.size, self.parent):
                column.append(0)
        return number

    def _at(self, number: int) -> Position:
        return Position(self.file[number], self.line[number], self.offset[number])

    def _refuse(self, at: Position, size: int, reason: str) -> None:
        path = str(self.sources.paths[at.file])
        self.entries.append(_Entry(at, size, bad=BadRecord(path, at.line, at.offset, reason, size=size, file=at.file)))

    def _plant(self) -> None:
        names = list(self.numbers)
        here = sorted((number for number in range(len(names)) if self.line[number]), key=self._at)
        for number in here:
            self.children.setdefault(self.parent[number], []).append(number)
        seen: set[int] = set()
        for top in here:
            if self.parent[top] < 0 or not self.line[self.parent[top]]:
                self._add_tree(top, self._below(top, seen), names)
        for number in here:  # no root leads to it
            if number not in seen:
                walked, start = set(), number
                while start not in walked:
                    walked.add(start)
                    start = self.parent[start]
                below = self._below(start, seen)
                reason = f"message {names[number]} is its own ancestor, or below one that is; {_left_out(below)}"
                self._refuse(self._at(number), sum(self.size[n] for n in below), reason)

    def _below(self, top: int, seen: set[int]) -> dict[int, int]:
        """Give the depth of every message of a tree, the top's 1, and add them to ``seen``."""
        depths, stack = {top: 1}, [top]
        while stack:
            number = stack.pop()
            fresh = [child for child in self.children.get(number, ()) if child not in depths]
            depths.update(dict.fromkeys(fresh, depths[number] + 1))
            stack += fresh
        seen.update(depths)
        return depths

    def _add_tree(self, top: int, depths: Mapping[int, int], names: Sequence[str]) -> None:
        size, limit, deepest = sum(self.size[n] for n in depths), self.sources.max_record_bytes, max(depths.values())
        if self.parent[top] >= 0:
            missing = f"parent {names[self.parent[top]]} of message {names[top]} is not in the data"
            self._refuse(self._at(top), size, f"{missing}; {_left_out(depths)}")
        elif deepest > MAX_THREAD:
            self._refuse(self._at(top), size, f"a thread of {deepest:,} messages, over the limit of {MAX_THREAD}")
        elif size > limit:
            self._refuse(self._at(top), size, f"a tree of {size:,} bytes, over the limit of {limit:,} for a record")
        else:
            self.entries.append(_Entry(self._at(top), size, top))

    def read(self, start: Position | None) -> Iterator[Record | BadRecord]:
        begin = 0 if start is None else bisect_left(self.entries, start, key=itemgetter(0))
        return self._records(islice(self.entries, begin, None))

    def fetch(self, positions: Sequence[Position]) -> list[Record | BadRecord]:
        entries = [(at, bisect_left(self.entries, at, key=itemgetter(0))) for at in positions]
        for at, i in entries:
            if i == len(self.entries) or self.entries[i].position != at:
                raise self._changed(at)
        return list(self._records(self.entries[i] for _, i in entries))

    def _records(self, entries: Iterable[_Entry]) -> Iterator[Record | BadRecord]:
        with ExitStack() as stack:
            files: dict[int, IO[bytes]] = {}
            for at, size, root, bad in entries:
                if bad is not None:
                    yield bad
                    continue
                fields = self._load(at, size, files, stack) if root < 0 else self._tree(root, files, stack)
                path = str(self.sources.paths[at.file])
                yield Record(fields, path=path, line=at.line, offset=at.offset, size=size, file=at.file)

    def _tree(self, root: int, files: dict[int, IO[bytes]], stack: ExitStack) -> dict[str, Any]:
        def message(number: int) -> dict[str, Any]:
            fields = self._load(self._at(number), self.size[number], files, stack)
            if self.numbers.get(fields.get("message_id", "")) != number:
                raise self._changed(self._at(number))
            fields["replies"] = [message(child) for child in self.children.get(number, ())]
            return fields

        prompt = message(root)
        return {"message_tree_id": prompt["message_id"], "prompt": prompt}

    def _load(self, at: Position, size: int, files: dict[int, IO[bytes]], stack: ExitStack) -> dict[str, Any]:
        try:
            if at.file not in files:
                file: IO[bytes] = stack.enter_context(open(self.sources.paths[at.file], "rb"))
                if file.read(2) == b"\x1f\x8b":  # gzip can't be read out of order
                    file.seek(0)
                    packed, file = file, stack.enter_context(tempfile.TemporaryFile())
                    shutil.copyfileobj(gzip.GzipFile(fileobj=packed), file)
                files[at.file] = file
            files[at.file].seek(at.offset)
            text = files[at.file].read(size).decode()
            fields = json.JSONDecoder().raw_decode(text.lstrip(" \t\r\n"))[0]
        except (OSError, ValueError) as error:
            raise self._changed(at) from error
        if not isinstance(fields, dict):
            raise self._changed(at)
        return fields

    def _changed(self, at: Position) -> DataError:
        return DataError(f"{self.sources.paths[at.file]}:{at.line}: the file changed while it was read; start again")


def _left_out(depths: Mapping[int, int]) -> str:
    return f"{len(depths) - 1:,} below it left out"


@lru_cache(maxsize=2)
def _planted(sources: Sources, state: tuple[tuple[int, int], ...]) -> _Forest | None:
    """Give the forest of flat files, None for the other forms; ``state`` is there to notice a file that changed."""
    for i, path in enumerate(sources.paths):
        one = replace(sources, paths=(path,), fields=None, states=sources.states[i : i + 1])
        for record in islice(read_jsonl(one), PEEKED):
            if isinstance(record, Record):
                if _is_flat(record):
                    return _Forest(sources)
                break
    return None


def _forest(sources: Sources) -> _Forest | None:
    try:
        # a run knows the states of its files, and looks for itself whether they are still true
        stats = () if sources.states else map(Path.stat, sources.paths)
        state = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    except OSError:
        return None  # read_jsonl says what is wrong with it
    return _planted(sources, state)


def read(
    sources: Sources, options: Oasst1Options | None = None, start: Position | None = None
) -> Iterator[Record | BadRecord]:
    """Give guanaco rows and message trees as ``read_jsonl`` does, and flat messages as whole trees.

    A file holds flat messages if its first good record is one; then one pass over all files notes ids and places, and a
    record is a tree in the shape of the other export, its origin the root's line, its size that of all its messages. A
    message may come before its parent, in another file of the same source, and among those of other trees. Bad records:
    a message whose parent is missing (with all below it), a cycle, an id that was seen before, a thread of over
    ``MAX_THREAD`` messages, a tree over the size of a record. The pass is made once for all reads of the same files.
    """
    forest = _forest(sources)
    return read_jsonl(sources, None, start) if forest is None else forest.read(start)


def index(sources: Sources, options: Oasst1Options | None = None) -> NDArray[np.int64]:
    """Give the Position of everything that ``read`` gives, int64 [N, 3]: file, line (1-based), offset (bytes)."""
    forest = _forest(sources)
    if forest is None:
        return index_jsonl(sources)
    import numpy as np

    return np.array([entry.position for entry in forest.entries], dtype=np.int64).reshape(-1, 3)


def fetch(sources: Sources, options: Oasst1Options | None, positions: Sequence[Position]) -> list[Record | BadRecord]:
    """Give the records at these positions, as ``read`` gives them."""
    forest = _forest(sources)
    return fetch_jsonl(sources, None, positions) if forest is None else forest.fetch(positions)


# ---------------------------------------------------------------------------------------------------------------- hooks

EXAMPLE = {"text": "### Human: What is 1 + 1?### Assistant: 2"}
"""A record, in the first of the three forms."""


def corefit_dataset_readers() -> Iterator[DatasetReader]:
    """Give the reader; it declares that it streams, as two of its three forms do.

    Flat messages need one pass first: with a shuffle it is the index pass that the run times and prints anyway.
    """
    yield DatasetReader(
        name="oasst1",
        summary="Open Assistant files; flat messages are assembled into trees",
        read=read,
        index=index,
        fetch=fetch,
        seekable=True,
        bounded=True,
        example=json.dumps(EXAMPLE).encode() + b"\n",
    )


def corefit_map_functions() -> Iterator[MapFunction]:
    """Give the map function."""
    yield MapFunction(
        name="oasst1",
        summary="Open Assistant: guanaco text, message trees, flat messages",
        map=oasst1,
        sniff=sniff,
        fields=("text", "prompt", "message_tree_id", "message_id", "parent_id", "role"),
        options=Oasst1Options,
        example=EXAMPLE,
    )
