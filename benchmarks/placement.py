"""Lengths -> plan: nanoseconds a document and fill, corefit's packers beside others'.

Claim: first-fit takes at most 30 ns a document and at most a hundredth of axolotl's packer; best-fit decreasing takes
at most 1/300 of TRL's placement and 1/500 of binpacking per 1,000, and makes no more packs than TRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import common
import numpy as np
import peers

from corefit.data import pack


def tables(name: str, n: int, *, slow: bool, repeats: int) -> list[dict[str, Any]]:
    lengths, capacity = common.lengths(name, n)
    table = peers.table_of(lengths)
    runs: dict[str, Callable[[], Any]] = {
        "limit: sum of the lengths": lambda: lengths.sum(dtype=np.int64),
        "limit: histogram": lambda: np.bincount(lengths),
        "corefit first_fit": lambda: pack.first_fit(lengths, capacity),
        "corefit first_fit, 64 open": lambda: pack.first_fit(lengths, capacity, open_packs=64),
        "corefit best_fit_decreasing": lambda: pack.best_fit_decreasing(lengths, capacity),
        "corefit stream, 256 held": lambda: pack.stream(
            "first_fit_decreasing", lengths, capacity, held=256, flush=True
        ),
    }
    others: dict[str, tuple[Callable[[], Any], Any]] = {
        "numba first-fit, tree": (peers.numba_tree, lengths),
        "axolotl pack_parallel": (peers.axolotl, lengths),
        "TRL placement": (peers.trl_placement, table),
    }
    if slow:
        others |= {
            "TRL pack_dataset": (peers.trl_pack_dataset, table),
            "binpacking per 1,000": (peers.ms_swift, lengths),
            "LLaMA-Factory per 1,000": (peers.llama_factory, lengths),
        }
    for other, (make, given) in others.items():
        try:
            runs[other] = partial(make(), given, capacity)
        except ImportError as error:
            print(f"{other} is not measured: {error}")
    made = {name: run() for name, run in runs.items()}  # warms up, too
    packs = {name: n_packs(result) for name, result in made.items() if not name.startswith("limit")}
    del made
    seconds = common.interleaved(runs, repeats)
    total = int(lengths.sum(dtype=np.int64))
    return [
        {
            "set": f"{name}/{capacity}",
            "n": n,
            "packer": packer,
            "ns/document": 1e9 * took / n,
            "packs": packs.get(packer),
            "fill %": 100 * total / (packs[packer] * capacity) if packer in packs else None,
        }
        for packer, took in seconds.items()
    ]


def n_packs(result: Any) -> int:  # noqa: ANN401
    if isinstance(result, pack.Streamed):
        return len(result.seen)
    return int(result.max()) + 1 if isinstance(result, np.ndarray) else len(result)


def main() -> None:
    args = common.options(
        __doc__,
        n=dict(type=int, nargs="+", default=[100_000, 1_000_000], help="documents; the slowest peers run the first"),
        sets=dict(nargs="+", choices=common.SETS, default=list(common.SETS)),
        repeats=dict(type=int, default=5),
    )
    sizes, repeats = ([2_000], 1) if args.quick else (args.n, args.repeats)
    rows = [
        row
        for n in sizes
        for name in args.sets
        for row in tables(name, n, slow=n == sizes[0], repeats=repeats if n == sizes[0] else min(repeats, 3))
    ]
    found = {(row["set"].split("/")[0], row["n"], row["packer"]): row for row in rows}

    def ratio(name: str, n: int, peer: str, own: str) -> float | None:
        here, there = found.get((name, n, own)), found.get((name, n, peer))
        return there["ns/document"] / here["ns/document"] if here and there else None

    first, most = sizes[0], sizes[-1]
    own = found.get(("oasst", most, "corefit first_fit"))
    goals = [common.goal(f"first_fit, oasst, n = {most:,}: <= 30 ns a document", own and own["ns/document"], most=30)]
    for n in sizes:
        value = ratio("oasst", n, "axolotl pack_parallel", "corefit first_fit")
        goals.append(common.goal(f"first_fit against axolotl, oasst, n = {n:,}: >= 100x", value, least=100))
    for name in (one for one in ("oasst", "alpaca", "heavy") if one in args.sets):
        for n in sizes:
            words = f"{name}, n = {n:,}"
            value = ratio(name, n, "TRL placement", "corefit best_fit_decreasing")
            goals.append(
                common.goal(f"best_fit_decreasing against TRL's placement, {words}: >= 300x", value, least=300)
            )
            here, there = (found.get((name, n, one)) for one in ("corefit best_fit_decreasing", "TRL placement"))
            more = here["packs"] - there["packs"] if here and there else None
            goals.append(common.goal(f"packs more than TRL's, {words}: <= 0", more, most=0))
        value = ratio(name, first, "binpacking per 1,000", "corefit best_fit_decreasing")
        words = f"best_fit_decreasing against binpacking per 1,000, {name}, n = {first:,}: >= 500x"
        goals.append(common.goal(words, value, least=500))
    common.finish(
        args,
        "Placing a document takes nanoseconds: first-fit at most 30, and a hundredth of axolotl's.",
        rows,
        goals,
        peers=peers.NAMES,
        n=sizes,
        repeats=repeats,
        does_not_show="packers that couldn't be installed (NeMo, Megatron-Bridge, torchtune; see README), several "
        "processes (axolotl's starts some from 200,000 documents on; here it runs in one), the time to make rows.",
    )


if __name__ == "__main__":
    main()
