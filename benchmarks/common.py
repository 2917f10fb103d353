"""What every benchmark shares: options, length sets, interleaved timing, facts about the machine, results."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
SETS = {
    # name: capacity, median, sigma (log-normal; sigma gives the mean once clipped), clipped at
    "oasst": (2048, 285, 0.8505, 2048),  # mean 401
    "alpaca": (2048, 60, 0.7584, 2048),  # mean 80
    "heavy": (8192, 800, 1.252, 8192),  # mean 1533
    "uniform": (2048, None, None, 2048),  # 1 .. capacity
}


def lengths(name: str, n: int) -> tuple[np.ndarray, int]:
    """Give n sample lengths (int32, seeded) and the capacity that the set is packed into."""
    capacity, median, sigma, clip = SETS[name]
    rng = np.random.default_rng(0)
    if median is None:
        return rng.integers(1, clip + 1, n, dtype=np.int32), capacity
    return np.clip(np.rint(rng.lognormal(np.log(median), sigma, n)), 1, clip).astype(np.int32), capacity


def options(about: str | None, **more: dict[str, Any]) -> argparse.Namespace:
    """Read the command line: ``--quick`` and ``--out``, and what a script adds as ``name=dict(default=...)``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the result (default: results/NAME.json)")
    for name, settings in more.items():
        parser.add_argument("--" + name.replace("_", "-"), **settings)
    return parser.parse_args()


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Give the median seconds of each; every round runs them all, so that a busy neighbour slows them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            gc.collect()
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def machine() -> dict[str, Any]:
    """Give the processor, which of the instructions that matter here it has, the cores for this process, the system."""
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:
        said = ""
    found = dict(re.findall(r"(?m)^(model name|flags)\s*:\s*(.*)$", said))
    cpu, flags = found.get("model name") or platform.processor(), found.get("flags", "").split()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return {"cpu": cpu, "instructions": " ".join(known), "cores": cores, "os": system}


def versions(*peers: str) -> dict[str, str]:
    """Give the versions of Python, numpy, corefit with its kernel, and the peers."""
    from corefit.data import kernel

    found = {"python": platform.python_version()}
    for name in ("numpy", "corefit", *peers):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    functions = sorted(name for name in dir(kernel.compiled) if not name.startswith("_")) if kernel.compiled else []
    return found | {"kernel": f"{kernel.NAME} ({', '.join(functions) or 'nothing compiled'})"}


def goal(words: str, value: float | None, *, most: float | None = None, least: float | None = None) -> dict[str, Any]:
    """Give a goal, what was measured, and whether it is met; None where it could not be measured."""
    met = None if value is None else value <= most if most is not None else value >= (least or 0)
    return {"goal": words, "measured": None if value is None else float(f"{value:.4g}"), "met": met}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table; the first row's keys are the columns."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys] + [["" if row.get(key) is None else _text(row[key]) for key in keys] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(keys))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _text(value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def finish(
    args: argparse.Namespace,
    claim: str,
    rows: Sequence[Mapping[str, Any]],
    goals: Sequence[Mapping[str, Any]],
    *,
    peers: Sequence[str] = (),
    n: object = None,
    repeats: int = 1,
    does_not_show: str = "",
    **more: object,
) -> None:
    """Print the table and the goals, and write the result file. Figures are medians of ``repeats`` runs."""
    script = Path(sys.argv[0]).stem
    result = {
        "claim": claim,
        "command": shlex.join(["python", f"benchmarks/{script}.py", *_public(sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": args.quick,
        "machine": machine(),
        "versions": versions(*peers),
        "n": n,
        "repeats": repeats,
        "rows": [{key: _rounded(value) for key, value in row.items()} for row in rows],
        "goals": list(goals),
        "does not show": does_not_show,
        **more,
    }
    show(rows)
    for one in goals:
        word = {True: "met", False: "NOT MET", None: "not measured"}[one["met"]]
        print(f"goal: {one['goal']}: {one['measured']} ({word})")
    print(f"does not show: {does_not_show}")
    out = args.out or HERE / "results" / f"{script}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _public(arguments: Sequence[str]) -> list[str]:
    return [Path(word).name if word.startswith("/") else word for word in arguments]


def _rounded(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def skip(reason: str) -> None:
    """End a benchmark that can't be made here."""
    print(f"skipped: {reason}")
    sys.exit(0)
