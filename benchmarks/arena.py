"""From the arena on disk to training tensors.

Claim: at least 200 million tokens a second on one core, shuffled or in file order, each MiB checked once.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from corefit.data.arena import Arena, write_arena
from corefit.data.block import (
    ENCODED,
    FIRST,
    INDEX,
    LENGTH,
    LINE,
    RECORD,
    RECORD_COLUMNS,
    SAMPLE_COLUMNS,
    SAMPLES,
    SPAN,
    SPANS,
    START,
    STOP,
    SUPERVISED,
    WEIGHT,
    Block,
    Words,
)
from corefit.data.source import Size, Source
from corefit.data.stream import Stream
from corefit.types import DatasetReader, MapFunction, Sources

NOTHING = Source(
    reader=DatasetReader(name="none", summary="", read=lambda sources, options: iter(())),
    map_function=MapFunction(name="none", summary="", map=lambda record, options: ()),
    sources=Sources(()),
)


def blocks(lengths: np.ndarray, at_once: int = 1000) -> Iterator[Block]:
    """Give records of one sample each, of random tokens, the second half of each a target."""
    rng = np.random.default_rng(1)
    for at in range(0, len(lengths), at_once):
        some = lengths[at : at + at_once].astype(np.int64)
        n, ends = len(some), np.cumsum(some)
        starts, number = ends - some, np.arange(len(some))
        samples, records = np.zeros((n, SAMPLE_COLUMNS), np.int64), np.zeros((n, RECORD_COLUMNS), np.int64)
        for column, values in (
            *((START, starts), (LENGTH, some), (SPAN, number), (SPANS, 1), (STOP, -1)),
            *((SUPERVISED, some - some // 2), (RECORD, number)),
        ):
            samples[:, column] = values
        for column, values in (
            *((INDEX, at + number), (LINE, at + number + 1), (WEIGHT, 4 * some)),
            *((FIRST, number), (SAMPLES, 1), (ENCODED, some)),
        ):
            records[:, column] = values
        tokens = rng.integers(0, 60_000, ends[-1], dtype=np.int32)
        spans = np.stack([starts + some // 2, ends], axis=1)
        yield Block(records, samples, tokens, spans, np.empty(0, np.int64), [Words()], ["made"])


def one_run(folder: Path, shuffle: bool, micro_batch: int) -> tuple[float, float, int]:
    """Give CPU seconds, seconds to the first batch, and tokens of one epoch."""
    began, cpu, first, tokens = time.perf_counter(), time.process_time(), 0.0, 0
    source = dataclasses.replace(NOTHING, shuffle=shuffle)
    stream = Stream([source], None, max_length=2048, arena=Arena(folder, {}))  # type: ignore[arg-type]
    for step in stream.steps(16, micro_batch):
        for batch in step:
            tensors = [torch.from_numpy(array) for array in (batch.input_ids, batch.position_ids, batch.labels)]
            first = first or time.perf_counter() - began
            tokens += batch.n_tokens
            del tensors
    return time.process_time() - cpu, first, tokens


def main() -> None:
    args = common.options(
        __doc__,
        n=dict(type=int, default=500_000, help="documents of the oasst lengths"),
        repeats=dict(type=int, default=5),
    )
    n, repeats = (5_000, 1) if args.quick else (args.n, args.repeats)
    torch.set_num_threads(1)
    lengths, _ = common.lengths("oasst", n)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "arena"
        size = Size(4 * int(lengths.sum(dtype=np.int64)), True, True, n)
        began = time.perf_counter()
        write_arena(folder, {}, lambda: [size], blocks(lengths), vocab_size=60_000)
        wrote = time.perf_counter() - began
        stored = sum(path.stat().st_size for path in folder.iterdir())
        data = (folder / "tokens.bin").read_bytes()
        copies = common.interleaved({"copy": lambda: bytearray(data)}, 5)
        limit = 2 * copies["copy"] / len(data)
        for shuffle in (True, False):
            for micro_batch in (1, 4, 16):
                runs = [one_run(folder, shuffle, micro_batch) for _ in range(repeats)]
                cpu, tokens = statistics.median(run[0] for run in runs), runs[0][2]
                rows.append(
                    {
                        "order": "shuffled" if shuffle else "file",
                        "micro-batch": micro_batch,
                        "tokens": tokens,
                        "M tokens/s (CPU time)": tokens / cpu / 1e6,
                        "ns/token": 1e9 * cpu / tokens,
                        "first batch ms": 1e3 * statistics.median(run[1] for run in runs),
                        "limit: memcpy of the tokens ns/token": 1e9 * limit,
                    }
                )
    goals = [
        common.goal(
            f"{row['order']} order, micro-batch {row['micro-batch']}: >= 200M tokens/s",
            row["M tokens/s (CPU time)"],
            least=200,
        )
        for row in rows
    ]
    common.finish(
        args,
        "From an arena a core makes at least 200 million tokens a second into training tensors.",
        rows,
        goals,
        peers=("torch",),
        n=n,
        repeats=repeats,
        does_not_show="an arena that is not in the page cache, tokens of four bytes (a vocabulary over 65,536), "
        "records of several samples, several sources.",
        arena={"bytes": stored, "bytes/token": stored / int(lengths.sum(dtype=np.int64)), "seconds to write": wrote},
    )


if __name__ == "__main__":
    main()
