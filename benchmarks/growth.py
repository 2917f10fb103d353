"""Nanoseconds a document from 10,000 to 10,000,000 documents.

Claim: over three decades first-fit and best-fit decreasing grow at most 2.5 times. Every size packs the same lengths,
cut into pieces: a small piece packed again and again is learnt by the branch predictor, and looks twice as fast.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import common
import numpy as np

from corefit.data import pack

ALGORITHMS = {"first_fit": pack.first_fit, "best_fit_decreasing": pack.best_fit_decreasing}


def main() -> None:
    args = common.options(
        __doc__,
        n=dict(type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000]),
        repeats=dict(type=int, default=5, help="of all sizes together; at most 100 pieces of each"),
    )
    sizes, repeats = ([1_000, 10_000], 1) if args.quick else (args.n, args.repeats)
    rows: list[dict[str, Any]] = []
    goals = []
    for name in ("oasst", "alpaca", "heavy"):
        lengths, capacity = common.lengths(name, sizes[-1])
        for algorithm, function in ALGORITHMS.items():
            inner = {n: max(1, min(100, sizes[-1] // n)) for n in sizes}
            runs = {str(n): partial(pieces, function, lengths, capacity, n, inner[n]) for n in sizes}
            runs |= {f"sum {n}": partial(pieces, np.sum, lengths, None, n, inner[n]) for n in sizes}
            for n in sizes:
                function(lengths[:n], capacity)
            seconds = common.interleaved(runs, repeats)
            took = {n: 1e9 * seconds[str(n)] / inner[n] / n for n in sizes}
            limit = {n: 1e9 * seconds[f"sum {n}"] / inner[n] / n for n in sizes}
            rows += [
                {"set": name, "algorithm": algorithm, "n": n, "ns/document": took[n], "sum of lengths": limit[n]}
                for n in sizes
            ]
            growth = max(took.values()) / took[sizes[0]]
            words = f"{algorithm}, {name}: most of any n over n = {sizes[0]:,}, <= 2.5x"
            goals.append(common.goal(words, growth, most=2.5))
    common.finish(
        args,
        "Packing stays linear: from 1e4 to 1e7 documents a document costs at most 2.5 times as much.",
        rows,
        goals,
        n=sizes,
        repeats=repeats,
        does_not_show="uniform lengths (see placement.py), other capacities; part of the growth is memory: at 1e7 "
        "lengths and plan are 120 MB.",
    )


def pieces(function: Any, lengths: np.ndarray, capacity: int | None, n: int, times: int) -> None:  # noqa: ANN401
    for k in range(times):
        function(lengths[k * n : (k + 1) * n], capacity)


if __name__ == "__main__":
    main()
