"""JSON lines -> text: MB/s, peak memory, first record, bytes written.

Claim: taking the text out of JSON lines is at least 10 times as fast as json.loads per line and as the first build of
datasets, at least 4 times as fast as orjson per line, in under 32 MB + 4 times the longest record, and the first record
comes within 5 ms. Every route runs in a process of its own; a run of all routes is one round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

FIELD = "text"
WORDS = (
    "the of and to a in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so what up said its about "
    "than into them can only other time new some could these two may first then do any like my now over such our even"
).split()
HAN = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
)
ESCAPED = ('"quoted"', "tab\there", "new\nline", "back\\slash", "caf\u00e9", "\U0001f600", "</tag>", "\u2014")


def write_file(path: Path, megabytes: int) -> dict[str, Any]:
    """Write records of 100 to 20,000 characters: two thirds English, a quarter Chinese (half of it as escapes)."""
    rng = np.random.default_rng(0)
    size = longest = records = 0
    with open(path, "wb") as file:
        while size < megabytes * 10**6:
            length, kind = int(min(20_000, 100 + rng.lognormal(6.5, 1.0))), rng.random()
            if kind < 0.25:
                text = "".join(HAN[i] for i in rng.integers(0, len(HAN), length // 3))
            else:
                text = " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), length // 5))
            if kind > 0.5:
                marks = [ESCAPED[i] for i in rng.integers(0, len(ESCAPED), 1 + length // 200)]
                text = " ".join(part + mark for part, mark in zip(cut(text, len(marks)), marks, strict=True))
            record = {"id": records, "source": {"text": "not this one", "n": [1, 2.5, None]}, FIELD: text, "ok": True}
            line = json.dumps(record, ensure_ascii=kind < 0.125).encode() + b"\n"
            file.write(line)
            size, longest, records = size + len(line), max(longest, len(line)), records + 1
    return {"bytes": size, "records": records, "longest record (bytes)": longest}


def cut(text: str, n: int) -> list[str]:
    """Cut into n parts."""
    step = -(-len(text) // n)
    return [text[i * step : (i + 1) * step] for i in range(n)]


# ---------------------------------------------------------------- routes: each is imported and warmed up, then iterated


def raw(path: Path) -> Iterator[int]:
    buffer = bytearray(2**20)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            yield size


def lines(path: Path) -> Iterator[int]:
    with open(path, "rb") as file:
        for line in file:
            yield len(line)


def by_json(path: Path) -> Iterator[int]:
    with open(path, "rb") as file:
        for line in file:
            yield len(json.loads(line)[FIELD])


def by_orjson(path: Path) -> Iterator[int]:
    import orjson

    with open(path, "rb") as file:
        for line in file:
            yield len(orjson.loads(line)[FIELD])


def by_datasets(path: Path) -> Iterator[int]:
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        made = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        written = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
        print(json.dumps({"written": written}))
        yield len(made)


def extract(path: Path) -> Iterator[int]:
    from corefit.data.jsonl import extract
    from corefit.types import Sources

    for columns in extract(Sources((path,)), [FIELD]):
        yield len(columns.places)


def records(path: Path) -> Iterator[int]:
    from corefit.data.jsonl import read_jsonl
    from corefit.types import Sources

    for record in read_jsonl(Sources((path,))):
        yield len(record[FIELD])  # type: ignore[index]


def records_of_fields(path: Path) -> Iterator[int]:
    from corefit.data.jsonl import read_jsonl
    from corefit.types import Sources

    for record in read_jsonl(Sources((path,), fields=(FIELD,))):
        yield len(record[FIELD])  # type: ignore[index]


def index(path: Path) -> Iterator[int]:
    from corefit.data.jsonl import index_jsonl
    from corefit.types import Sources

    yield len(index_jsonl(Sources((path,))))


ROUTES: dict[str, Callable[[Path], Iterator[int]]] = {
    "limit: raw read, 1 MiB at a time": raw,
    "limit: lines of a file": lines,
    "corefit extract, one field": extract,
    "corefit read_jsonl, one field": records_of_fields,
    "corefit read_jsonl, all fields": records,
    "corefit index_jsonl": index,
    "json.loads per line": by_json,
    "orjson per line": by_orjson,
    "datasets load_dataset, first build": by_datasets,
}


def peak(field: str = "VmHWM") -> int:
    """Give bytes that were, or with ``VmRSS`` are, resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    return 0


def child(name: str, path: Path, small: Path) -> None:
    """Warm up on a small file, then read the large one; print seconds, bytes of memory, first record."""
    for _ in ROUTES[name](small):
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")  # begin VmHWM anew
    except OSError:
        pass
    before, cpu, began, first = peak("VmRSS"), time.process_time(), time.perf_counter(), 0.0
    for _ in ROUTES[name](path):
        first = first or time.perf_counter() - began
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu": cpu, "first": first, "memory": max(0, peak() - before)}))


def measure(name: str, path: Path, small: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, "--files", str(path), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, float] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


def main() -> None:
    import argparse

    args = common.options(
        __doc__,
        mb=dict(type=int, default=600, help="size of the file that is made (default 600)"),
        repeats=dict(type=int, default=5),
        child=dict(help=argparse.SUPPRESS),
        files=dict(type=Path, nargs=2, help=argparse.SUPPRESS),
    )
    if args.child:
        child(args.child, *args.files)
        return
    repeats = 1 if args.quick else args.repeats
    os.environ |= {"HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"}  # its idle threads spin beside what is measured
    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder, "large.jsonl"), Path(folder, "small.jsonl")
        write_file(small, 1)
        facts = write_file(path, 10 if args.quick else args.mb)
        for _ in raw(path):  # into the page cache
            pass
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ROUTES}
        for _ in range(repeats):
            for name in ROUTES:
                found[name].append(measure(name, path, small))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    speed = {name: facts["bytes"] / 1e6 / one["seconds"] for name, one in medians.items()}
    own = "corefit extract, one field"
    rows = [
        {
            "route": name,
            "MB/s": speed[name],
            "MB per CPU s": facts["bytes"] / 1e6 / one["cpu"],
            "extract is x": speed[own] / speed[name],
            "first ms": 1e3 * one["first"],
            "memory MB": one["memory"] / 1e6,
            "written MB": one.get("written", 0) / 1e6,
        }
        for name, one in medians.items()
    ]
    allowed = 32 + 4 * facts["longest record (bytes)"] / 1e6
    memory = max(row["memory MB"] for row in rows if row["route"].startswith("corefit"))
    reads = ("corefit extract", "corefit read")
    first = max(row["first ms"] for row in rows if row["route"].startswith(reads))
    goals = [
        common.goal(f"extract against {name}: >= {least}x", speed[own] / speed[name], least=least)
        for name, least in (
            ("json.loads per line", 10),
            ("datasets load_dataset, first build", 10),
            ("orjson per line", 4),
        )
    ]
    goals.append(common.goal(f"memory of any corefit route: <= {allowed:.1f} MB", memory, most=allowed))
    goals.append(common.goal("first record or block, any corefit route: <= 5 ms", first, most=5))
    common.finish(
        args,
        "Text comes out of JSON lines 10 times as fast as through json.loads, in memory that doesn't grow.",
        rows,
        goals,
        peers=("orjson", "datasets", "pyarrow"),
        n=facts,
        repeats=repeats,
        does_not_show="a cold disk, .gz, one JSON list, records of many fields; extract leaves text as UTF-8 bytes, "
        "the peers make a Python str of every value: read_jsonl with one field does the same as they. Memory is growth "
        "of the peak over a warmed-up process, without the page cache.",
    )


if __name__ == "__main__":
    main()
