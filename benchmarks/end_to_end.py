"""JSONL file -> batches, with the reference tokenizer: what corefit adds to the bare tokenizer.

Claim: everything that corefit adds costs at most 5 % of the run's CPU time. The time inside the tokenizer's own
encode_batch_fast is measured by a wrapper around it, all else is corefit's, in the same run. The only way to the ids is
the list that ``.ids`` makes, so beside each call the same texts are encoded once more, lists and all (that time belongs
to no one): what corefit adds to that is the second figure.
"""

from __future__ import annotations

import os

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

import cProfile
import json
import pstats
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

from corefit import Conversation, Document, Drop, MapFunction, Message
from corefit.data.encode import Encoder, make_encoder
from corefit.data.stream import Source, Stream
from corefit.data.tokenizer import Tokenizer
from corefit.registry import Registry
from corefit.types import Sources


def alpaca(record: Any, options: object) -> Iterator[Conversation | Drop]:  # noqa: ANN401
    question = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
    yield Conversation((Message("user", question), Message("assistant", record["output"])))


def document(record: Any, options: object) -> Iterator[Document]:  # noqa: ANN401
    yield Document(record["text"])


FUNCTIONS = {
    "documents": MapFunction(name="document", summary="", map=document, fields=("text",)),
    "alpaca": MapFunction(name="alpaca", summary="", map=alpaca, fields=("instruction", "input", "output")),
}


class Timed:
    """The tokenizers backend, with the CPU time inside its encode_batch_fast; ``lists``: of doing it all once more."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend = tokenizer._backend
        self.seconds = self.lists = 0.0
        tokenizer._backend = self

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts: Any, **more: Any) -> Any:  # noqa: ANN401, D102
        began = time.thread_time()
        for encoding in self.backend.encode_batch_fast(texts, **more):
            encoding.ids  # noqa: B018
        between = time.thread_time()
        encodings = self.backend.encode_batch_fast(texts, **more)
        self.lists += between - began
        self.seconds += time.thread_time() - between
        return encodings


def write_data(folder: Path, shared: Path, records: int) -> dict[str, Path]:
    """Repeat the real rows, each time in another order, to so many records a file."""
    rows = {
        "alpaca": [
            json.dumps(row, ensure_ascii=False)
            for name in ("alpaca_en_demo.json", "alpaca_zh_demo.json")
            for row in json.loads((shared / "data" / name).read_text("utf-8"))
        ],
        "documents": (shared / "data" / "oasst" / "guanaco_100.jsonl").read_text("utf-8").splitlines(),
        "guanaco": (shared / "data" / "oasst" / "guanaco_100.jsonl").read_text("utf-8").splitlines(),
        "trees": (shared / "data" / "oasst" / "en_100_tree.jsonl").read_text("utf-8").splitlines(),
    }
    paths = {}
    for name, lines in rows.items():
        wanted = max(records // 10, 100) if name == "trees" else records
        order = common.np.random.default_rng(0).permutation(-(-wanted // len(lines)) * len(lines))[:wanted]
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(lines[i % len(lines)] + "\n" for i in order), encoding="utf-8")
    return paths


def one_run(
    source: Source, encoder: Encoder, timed: Timed, threads: int, profiler: cProfile.Profile | None = None
) -> dict[str, float]:
    timed.seconds = timed.lists = 0.0
    if profiler is not None:
        profiler.enable()
    began = time.process_time()
    stream = Stream([source], encoder, max_length=2048, pad_id=encoder.tokenizer.pad_id, threads=threads)
    tokens = samples = 0
    for step in stream.steps(16, 1):
        for batch in step:
            tokens, samples = tokens + batch.n_tokens, samples + batch.n_samples
    total = time.process_time() - began - timed.lists
    if profiler is not None:
        profiler.disable()
    inside, lists = timed.seconds, timed.lists
    return {
        "records": samples,
        "tokens": tokens,
        "tokenizer ns/token": 1e9 * inside / tokens,
        "corefit ns/token": 1e9 * (total - inside) / tokens,
        "corefit us/record": 1e6 * (total - inside) / samples,
        "corefit %": 100 * (total - inside) / total,
        "beyond lists of ids %": 100 * (total - lists) / total,
    }


def main() -> None:
    args = common.options(
        __doc__,
        shared=dict(type=Path, default=common.SHARED, help="folder with data/ (default: ../shared)"),
        records=dict(type=int, default=20_000),
        threads=dict(type=int, default=1, help="tokenising threads; 0: in the main thread"),
        repeats=dict(type=int, default=3),
        only=dict(choices=("documents", "alpaca", "guanaco", "trees"), help="one data set"),
        profile=dict(action="store_true", help="print where the time goes, main thread only, instead of timing"),
    )
    tokenizer = args.shared / "data" / "tokenizer_internlm" / "tokenizer.model"
    if not tokenizer.is_file():
        common.skip(f"{tokenizer} is not there; --shared names the folder")
    registry = Registry.load()
    loaded = Tokenizer.load(tokenizer)
    encoder = make_encoder(registry.template("internlm_chat"), loaded)
    timed = Timed(loaded)
    rows: list[dict[str, Any]] = []
    repeats = 1 if args.quick else args.repeats
    with tempfile.TemporaryDirectory() as folder:
        paths = write_data(Path(folder), args.shared, 2_000 if args.quick else args.records)
        for name, path in paths.items():
            if args.only not in (None, name):
                continue
            for shuffle in (True, False):
                function, order = (
                    FUNCTIONS.get(name) or registry.map_function("oasst1"),
                    "shuffled" if shuffle else "file",
                )
                reader = registry.reader("jsonl" if name in FUNCTIONS else "oasst1")
                sources = Sources((path,), fields=function.fields)
                source = Source(reader=reader, map_function=function, sources=sources, shuffle=shuffle)
                if args.profile:
                    profiler = cProfile.Profile()
                    one_run(source, encoder, timed, 0, profiler)
                    print(f"{name}, {order} order", flush=True)
                    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
                    continue
                runs = [one_run(source, encoder, timed, args.threads) for _ in range(repeats)]
                medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                rows.append({"data": name, "order": order, **medians})
    if args.profile:
        return
    goals = [
        common.goal(f"at most 5 % of CPU time, {row['data']}, {row['order']} order: {column}", row[column], most=5.0)
        for column in ("corefit %", "beyond lists of ids %")
        for row in rows
    ]
    common.finish(
        args,
        "Everything that corefit adds to the bare tokenizer, from JSONL to batches, costs at most 5 % of CPU time.",
        rows,
        goals,
        peers=("tokenizers",),
        n={row["data"]: row["records"] for row in rows},
        repeats=repeats,
        does_not_show="other tokenizers (a faster one makes corefit's share larger), text that isn't repeated (the "
        "rows are real but few, so the tokenizer's word cache hits more often than on real data), several threads, "
        "the training step.",
    )


if __name__ == "__main__":
    main()
