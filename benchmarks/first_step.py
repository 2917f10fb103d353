"""Process start -> end of the first optimizer step of ``corefit train``, with 100 rows and with some gigabytes.

Claim: a large file costs at most 3 s more than 100 rows: shuffled with a warm page cache, and in file order with a cold
one.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np

MODEL = common.HERE.parent / "corefit" / "embedded" / "model"
SETTINGS = (
    *("train.max_steps=1", "train.packs_per_step=4", "train.micro_batch=4", "pack.max_length=256"),
    *("sample.max_tokens=4", "run.threads=1", "val.share=0.0"),
)
WORDS = (
    "a pack holds whole samples and the rest is padding how many hooks does the plugin have where is it kept".split()
)


def write_rows(path: Path, *, rows: int = 0, size: int = 0) -> int:
    """Write so many rows, or about so many bytes; every row is another."""
    rng = np.random.default_rng(0)
    block = []
    for i in range(rows or 10_000):
        asked, said = (" ".join(WORDS[j] for j in rng.integers(0, len(WORDS), n)) for n in rng.integers(5, 400, 2))
        block.append(json.dumps({"text": f"### Human: @@@@@@ {i} {asked}?### Assistant: {said}."}) + "\n")
    data = "".join(block).encode()
    written = number = 0
    with open(path, "wb") as file:
        while not number or written < size:
            written += file.write(data.replace(b"@@@@@@", b"%06d" % number))
            number += 1
        file.flush()
        os.fsync(file.fileno())
    return number * len(block)


def warm(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(2**24):
            pass


def cold(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_step(data: Path, folder: Path, *, shuffle: bool) -> dict[str, float]:
    """Start a run and give the seconds until the first step stands in metrics.jsonl, and what it says of an index."""
    out = folder / "run"
    command = [sys.executable, "-m", "corefit", "train", "--plugin", "oasst1", "--template", "internlm_chat"]
    command += ["--model", str(MODEL), "--data", str(data), "--out", str(out)]
    command += ["--set", *SETTINGS, f"data.shuffle={str(shuffle).lower()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began, seconds = time.perf_counter(), None
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while seconds is None and process.poll() is None:
        metrics = out / "metrics.jsonl"
        if metrics.exists() and b'"grad_norm"' in metrics.read_bytes():
            seconds = time.perf_counter() - began
        time.sleep(0.005)
    said = process.communicate()[0].decode()
    if process.returncode or seconds is None:
        raise RuntimeError(said)
    shutil.rmtree(out)
    indexed = [line.split(" in ")[1].split(" s")[0] for line in said.splitlines() if "shuffle: indexed" in line]
    return {"seconds": seconds, "of it the index": float(indexed[0]) if indexed else 0.0}


def main() -> None:
    args = common.options(
        __doc__,
        gb=dict(type=float, default=5.0, help="size of the large file (default 5)"),
        folder=dict(type=Path, help="where the files go (default: the temporary folder)"),
        repeats=dict(type=int, default=3),
    )
    gb, repeats = (0.05, 1) if args.quick else (args.gb, args.repeats)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        small, large = folder / "small.jsonl", folder / "large.jsonl"
        write_rows(small, rows=100)
        n = write_rows(large, size=int(gb * 1e9))
        cases = {
            ("shuffled, warm cache", "100 rows"): (small, True, warm),
            ("shuffled, warm cache", "large"): (large, True, warm),
            ("file order, cold cache", "100 rows"): (small, False, cold),
            ("file order, cold cache", "large"): (large, False, cold),
        }
        first_step(small, folder, shuffle=True)  # the libraries into the page cache
        runs: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
        for _ in range(repeats):
            for case, (path, shuffle, prepare) in cases.items():
                prepare(path)
                runs[case].append(first_step(path, folder, shuffle=shuffle))
        size = large.stat().st_size
    medians = {
        case: {key: statistics.median(run[key] for run in found) for key in found[0]} for case, found in runs.items()
    }
    rows = [{"how": how, "data": data, **one} for (how, data), one in medians.items()]
    goals = [
        common.goal(
            f"{how}: {size / 1e9:.3g} GB within 3 s of 100 rows",
            medians[how, "large"]["seconds"] - medians[how, "100 rows"]["seconds"],
            most=3.0,
        )
        for how in dict.fromkeys(how for how, _ in cases)
    ]
    common.finish(
        args,
        "The first optimizer step comes as soon with gigabytes of data as with 100 rows, give or take 3 s.",
        rows,
        goals,
        peers=("torch", "transformers", "peft"),
        n={"bytes": size, "rows": n},
        repeats=repeats,
        does_not_show="a real model (loading it takes longer, the difference stays), a shuffle with a cold cache (the "
        "index reads the whole file, so the disk decides), several files, a validation loss before "
        "the first step (off here, as in the embedded recipe; it takes the same time for any file of 4,000 rows on).",
    )


if __name__ == "__main__":
    main()
