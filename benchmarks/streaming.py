"""The streaming packer: fill, nanoseconds a document, and the longest wait.

Claim: with at most 1,024 samples held, packs are filled to 99.7 % (98.0 % on uniform lengths) at 60 ns a document, and
no sample waits longer than as many packs as are held.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import common
import numpy as np

from corefit.data import pack

LEAST = {"oasst": 99.7, "alpaca": 99.7, "heavy": 99.7, "uniform": 98.0}
GROUP = 256


def longest_wait(made: pack.Streamed) -> int:
    """Packs that closed after a sample came, until its own did; the largest."""
    pack_of = np.empty(len(made.order), np.int64)
    pack_of[made.order] = np.repeat(np.arange(len(made.seen)), np.diff(made.offsets))
    first = np.searchsorted(made.seen, np.arange(len(pack_of)) + 1)  # the first pack that closes once it is there
    return int((pack_of - first).max()) + 1


def in_groups(lengths: np.ndarray, capacity: int, held: int, group: int) -> int:
    """Pack as training does: so many new samples a call, what waits is handed on. Gives the number of packs."""
    waits, packs = np.empty(0, np.int32), 0
    for at in range(0, len(lengths), group):
        new = np.concatenate([waits, lengths[at : at + group]])
        last = at + group >= len(lengths)
        made = pack.stream("first_fit_decreasing", new, capacity, held=held, n_held=len(waits), flush=last)
        waits, packs = new[made.rest], packs + len(made.seen)
    return packs


def main() -> None:
    args = common.options(
        __doc__,
        n=dict(type=int, default=1_000_000),
        held=dict(type=int, nargs="+", default=[256, 1024]),
        repeats=dict(type=int, default=7),
    )
    n, repeats = (20_000, 1) if args.quick else (args.n, args.repeats)
    rows: list[dict[str, Any]] = []
    goals = []
    for name, least in LEAST.items():
        lengths, capacity = common.lengths(name, n)
        best = 0.0
        for held in args.held:
            run = partial(pack.stream, "first_fit_decreasing", lengths, capacity, held=held, flush=True)
            made = run()
            fill = 100 * int(lengths.sum(dtype=np.int64)) / (len(made.seen) * capacity)
            runs = {
                "one": run,
                "groups": partial(in_groups, lengths[: n // 10], capacity, held, GROUP),
                "sum": partial(np.sum, lengths),
            }
            seconds = common.interleaved(runs, repeats)
            took = 1e9 * seconds["one"] / n
            rows.append(
                {
                    "set": f"{name}/{capacity}",
                    "held": held,
                    "fill %": fill,
                    "first pack after": int(made.seen[0]),
                    "longest wait (packs)": longest_wait(made),
                    "ns/document": took,
                    f"ns/document, {GROUP} a call": 1e9 * seconds["groups"] / (n // 10),
                    "limit: sum of lengths": 1e9 * seconds["sum"] / n,
                }
            )
            best = max(best, fill)
            goals.append(common.goal(f"{name}, {held} held: <= 60 ns a document", took, most=60))
            words = f"{name}, {held} held: no wait longer than {held} packs"
            goals.append(common.goal(words, rows[-1]["longest wait (packs)"], most=held))
        goals.append(common.goal(f"{name}: fill >= {least} % with at most {max(args.held):,} held", best, least=least))
    common.finish(
        args,
        "The streaming packer fills 99.7 % of the slots (uniform lengths: 98.0 %) holding at most 1,024 samples.",
        rows,
        goals,
        n=n,
        repeats=repeats,
        does_not_show="lengths that depend on their neighbours (sorted files, one source after another), records of "
        "several samples.",
    )


if __name__ == "__main__":
    main()
