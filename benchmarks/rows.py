"""Plan and tokens -> padded rows: nanoseconds a token.

Claim: writing input_ids takes at most 2.5 times a memcpy of the same bytes; from lengths to padded rows corefit is at
least 30 times as fast as TRL's pack_dataset, which doesn't even pad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import common
import numpy as np
import peers
import torch

from corefit.data import kernel
from corefit.data.block import LENGTH, SPAN, SPANS, START, STOP
from corefit.data.pack import Plan, best_fit_decreasing, stream
from corefit.data.rows import gather
from corefit.types import IGNORE_INDEX

PAD = 0
AT_ONCE = 16
"""Rows of a micro-batch."""


class Data:
    """Samples one after another in a buffer, the second half of each a target."""

    def __init__(self, n: int) -> None:
        self.lengths, self.capacity = common.lengths("oasst", n)
        ends = np.cumsum(self.lengths, dtype=np.int64)
        self.tokens = np.random.default_rng(1).integers(1, 100_000, ends[-1], dtype=np.int32)
        self.starts = ends - self.lengths
        self.spans = np.stack([self.starts + self.lengths // 2, ends], axis=1)
        self.samples = np.zeros((n, 8), np.int64)
        self.samples[:, START], self.samples[:, LENGTH], self.samples[:, STOP] = self.starts, self.lengths, -1
        self.samples[:, SPAN], self.samples[:, SPANS] = np.arange(n), 1
        self.plan = best_fit_decreasing(self.lengths, self.capacity)
        streamed = stream("first_fit_decreasing", self.lengths, self.capacity, flush=True)
        self.arrival = Plan(streamed.order, streamed.offsets)
        self.out = np.zeros((max(len(self.plan), len(self.arrival)), self.capacity), np.int32)

    def ids(self, plan: Plan) -> None:
        """Write input_ids alone, all rows by one call."""
        samples, sizes = self.samples[plan.order], np.diff(plan.offsets)
        arrays = (self.tokens, self.spans, samples, sizes, self.out[: len(plan)], None, None, None)
        kernel.compiled.gather(*arrays, self.capacity, PAD, IGNORE_INDEX)  # type: ignore[union-attr]

    def batches(self, dtype: Any) -> None:  # noqa: ANN401
        """Write everything that a training step takes, a micro-batch at a time."""
        plan = self.plan
        for k in range(0, len(plan), AT_ONCE):
            bounds = plan.offsets[k : k + AT_ONCE + 1]
            samples, sizes = self.samples[plan.order[bounds[0] : bounds[-1]]], np.diff(bounds)
            gather(self.tokens, self.spans, samples, sizes, width=self.capacity, pad_id=PAD, dtype=dtype)

    def slices(self, tokens: Any) -> Iterator[list[Any]]:  # noqa: ANN401
        """Give the samples of every row, as slices of the buffer."""
        starts, ends = self.starts.tolist(), (self.starts + self.lengths).tolist()
        order = self.plan.order.tolist()
        for a, b in pairwise(self.plan.offsets.tolist()):
            yield [tokens[starts[i] : ends[i]] for i in order[a:b]]

    def by_numpy(self) -> None:
        """Join slices with numpy."""
        for k, parts in enumerate(self.slices(self.tokens)):
            row = np.concatenate(parts)
            self.out[k, : len(row)], self.out[k, len(row) :] = row, PAD

    def by_torch(self) -> None:
        """Join slices with torch."""
        out = torch.from_numpy(self.out)
        for k, parts in enumerate(self.slices(torch.from_numpy(self.tokens))):
            row = torch.cat(parts)
            out[k, : len(row)], out[k, len(row) :] = row, PAD


def main() -> None:
    args = common.options(
        __doc__, n=dict(type=int, default=200_000, help="documents"), repeats=dict(type=int, default=7)
    )
    n, repeats = (5_000, 1) if args.quick else (args.n, args.repeats)
    torch.set_num_threads(1)
    data = Data(n)
    copy = np.empty_like(data.tokens)
    table, trl = peers.table_of(data.lengths, data.tokens), peers.trl_pack_dataset()

    def own() -> None:
        data.ids(best_fit_decreasing(data.lengths, data.capacity))

    def trl_read() -> None:
        for row in trl(table, data.capacity).with_format("numpy"):
            row["input_ids"]

    runs: dict[str, Callable[[], Any]] = {
        "limit: memcpy of the tokens": lambda: np.copyto(copy, data.tokens),
        "corefit: everything, int64": lambda: data.batches(np.int64),
        "corefit: everything, int32": lambda: data.batches(np.int32),
        "numpy.concatenate, a row at a time": data.by_numpy,
        "torch.cat, a row at a time": data.by_torch,
        "TRL pack_dataset (no padding)": lambda: trl(table, data.capacity),
        "TRL pack_dataset, then each row as numpy": trl_read,
    }
    if kernel.compiled is not None:
        runs |= {
            "corefit: input_ids alone, as samples come": lambda: data.ids(data.arrival),
            "corefit: input_ids alone, any order": lambda: data.ids(data.plan),
            "corefit: lengths -> input_ids": own,
        }
    for run in runs.values():
        run()
    seconds = common.interleaved(runs, repeats)
    n_tokens = len(data.tokens)
    ns = {name: 1e9 * took / n_tokens for name, took in seconds.items()}
    limit = ns["limit: memcpy of the tokens"]
    rows = [{"route": name, "ns/token": took, "x memcpy": took / limit} for name, took in ns.items()]
    whole = ns.get("corefit: lengths -> input_ids")
    ratio = whole and ns["TRL pack_dataset (no padding)"] / whole
    goals = [
        *(
            common.goal(f"input_ids alone, {order}: <= 2.5x memcpy", took and took / limit, most=2.5)
            for order in ("as samples come", "any order")
            for took in [ns.get(f"corefit: input_ids alone, {order}")]
        ),
        common.goal("lengths -> padded rows: >= 30x TRL's pack_dataset", ratio, least=30),
    ]
    common.finish(
        args,
        "Rows are written at the speed of memory: input_ids within 2.5x of memcpy.",
        rows,
        goals,
        peers=("torch", *peers.NAMES[1:4]),
        n={"documents": n, "tokens": n_tokens, "rows": len(data.plan)},
        repeats=repeats,
        does_not_show="tokens that lie on disk, rows that go to a GPU; the buffer is larger than the caches here, in "
        "training it often isn't.",
    )


if __name__ == "__main__":
    main()
