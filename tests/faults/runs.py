"""Tiny runs, what they leave, and what the trace of their system calls says: for tests and campaigns of faults."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import write_model
from zygote import Done, Zygote

WORDS = "really quite almost never always nearly often sometimes hardly"
VARYING = {"seconds", "tokens_per_s", "memory_bytes"}
"""Keys of ``metrics.jsonl`` that say how long a step took and what it needed."""
SMALL = [
    *("pack.max_length=128", "pack.held=16", "adapter.r=4", "adapter.dropout=0.1", "train.lr=5e-3", "run.threads=1"),
    *("train.packs_per_step=2", "train.micro_batch=1", "train.max_steps=3", "sample.max_tokens=2"),
    *("checkpoint.every_steps=1", "checkpoint.keep=1", "run.reporters=progress"),
]
"""A run of three steps that saves after each and keeps one checkpoint."""
WIDE = [
    *("pack.max_length=128", "pack.held=16", "adapter.r=32", "adapter.dropout=0.1", "train.lr=5e-3", "run.threads=1"),
    *("train.packs_per_step=4", "train.epochs=2", "sample.max_tokens=2"),
    *("checkpoint.every_steps=2", "checkpoint.keep=2"),
]
"""Two shuffled epochs with accumulation and dropout; with ``wide_model`` all LoRA matrices have >= 4,096 elements."""


def write_rows(path: Path, rows: int = 60) -> Path:
    """Write chats of uneven length."""
    words = WORDS.split()
    texts = (f"What is {i}?### Assistant: It is {i}, {' '.join(words[: i % 8])} so." for i in range(rows))
    path.write_text("".join(json.dumps({"text": f"### Human: {text}"}) + "\n" for text in texts), "utf-8")
    return path


def small_model(folder: Path) -> Path:
    return write_model(folder, num_hidden_layers=1)


def wide_model(folder: Path) -> Path:
    return write_model(folder, hidden_size=128, intermediate_size=256, num_key_value_heads=4)


def command(model: Path, rows: Path, out: Path | str, *sets: str, quantizer: str = "none") -> list[object]:
    """Give the one command line that starts, continues, or says that a run is complete."""
    given = ["train", "--plugin", "oasst1", "--template", "chatml", "--model", model, "--data", rows]
    return [*given, "--quantizer", quantizer, "--out", out, "--resume", "--set", *sets]


def outcome(run: Path) -> dict[str, Any]:
    """Give what has to be equal between a straight run and one that was killed and resumed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "adapter": digest(run),
        "metrics": [
            {k: v for k, v in row.items() if k not in VARYING} for row in rows if "loss" in row or "val_loss" in row
        ],
        "samples": (run / "samples.jsonl").read_text("utf-8"),
        "ledger": json.loads((run / "ledger.json").read_text("utf-8")),
    }


def digest(run: Path) -> str:
    """Give the SHA-256 of the adapter's weights."""
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def complaint(done: Done) -> str | None:
    """Say what is wrong with the way a run ended; None: it was documented, or it went on to the end."""
    errors = [line for line in done.output.splitlines() if line.startswith("corefit: error: ")]
    if "Traceback" in done.output or "--debug shows the traceback" in done.output:
        return f"a bug, not a message: {done.said}"
    if done.code == 0:
        return f"exit code 0, but: {errors[0]}" if errors else None
    if done.code not in (1, 2):
        return f"exit code {done.code}: {done.said}"
    return None if len(errors) == 1 and done.said == errors[0] else f"{len(errors)} lines of error; last: {done.said}"


# ------------------------------------------------------------------------------------------------------------ the trace


@dataclass(frozen=True)
class Call:
    """A system call that changed a file below the watched folder, as the shim wrote it down."""

    k: int
    op: str
    inode: int
    result: int
    offset: int
    """Of a write; the new size for ``truncate``."""
    length: int
    flags: int
    """Of ``open``; O_CREAT only where the file is new."""
    path: str
    """Relative to the run folder, as is ``path2``: the new name for ``rename``."""
    path2: str
    data: bytes

    def __str__(self) -> str:
        return f"{self.k}: {self.op} {self.path}{' ' + self.path2 if self.path2 else ''}"


def read_trace(trace: Path, data: Path, run: Path) -> list[Call]:
    """Read the lines of a trace, with the bytes that were written."""
    calls, at, written = [], 0, data.read_bytes() if data.exists() else b""
    for line in trace.read_text("utf-8").splitlines() if trace.exists() else ():
        k, op, inode, result, offset, length, flags, *paths = line.split("\t")
        path, path2 = (os.path.relpath(p, run) if p else "" for p in paths)
        size = int(length)
        calls.append(
            Call(
                int(k), op, int(inode), int(result), int(offset), size, int(flags), path, path2, written[at : at + size]
            )
        )
        at += size
    return calls


def find(calls: Sequence[Call], op: str, path: str, nth: int = 0) -> Call:
    """Give the nth successful call to ``op`` whose path, or new path, matches all of the pattern; -1: the last."""
    found = [c for c in calls if c.op == op and c.result >= 0 and re.fullmatch(path, c.path2 or c.path)]
    assert found, f"no {op} of {path}: the save path has changed, see the trace"
    return found[nth]


STEP = r"checkpoints/(step-\d+)"


def newest_step(calls: Iterable[Call]) -> str | None:
    """Give the name of the last checkpoint folder that got its name; None: none did."""
    named = [re.fullmatch(STEP, c.path2) for c in calls if c.op == "rename" and c.result >= 0]
    return max((match[1] for match in named if match), default=None)


def phase(calls: Sequence[Call], *, at_call: bool) -> str:
    """Say where a run was killed: loading, step, save, or end; ``at_call``: by the shim, in the last of these calls."""
    if not any(c.path == "metrics.jsonl" for c in calls):
        return "loading"
    if any(c.path.split("/")[0] in ("adapter", ".tmp-adapter") for c in calls):
        return "end"
    if at_call:
        return "save" if calls[-1].path.startswith("checkpoints") or calls[-1].op == "fsync" else "step"
    begun = max((i for i, c in enumerate(calls) if c.op == "mkdir" and c.path.startswith("checkpoints/.")), default=-1)
    ended = max((i for i, c in enumerate(calls) if c.path2 == "checkpoints/latest"), default=-1)
    return "save" if begun > ended else "step"


@dataclass
class Lab:
    """A folder with a model and data, a zygote, and runs by number."""

    zygote: Zygote
    folder: Path
    model: Path
    rows: Path
    sets: Sequence[str]
    quantizer: str = "none"
    count: int = 0

    def new(self) -> Path:
        """Give a run folder that is not there yet, alone in a folder that is."""
        self.count += 1
        (folder := self.folder / str(self.count)).mkdir()
        return folder / "run"

    def run(
        self,
        run: Path,
        *,
        sets: Sequence[str] = (),
        watch: Path | None = None,
        kill_after: float | None = None,
        **faults: object,
    ) -> Done:
        """Start or continue a run, traced; ``faults`` as ``shim.c`` has them, below ``watch`` or the run's parent."""
        trace, data = self._files(run)
        trace.unlink(missing_ok=True), data.unlink(missing_ok=True)
        faults = {"root": watch or run.parent, "trace": trace, "data": data, **faults}
        arguments = command(self.model, self.rows, run, *self.sets, *sets, quantizer=self.quantizer)
        return self.zygote.run(arguments, self.folder, faults=faults, kill_after=kill_after)

    def trace(self, run: Path) -> list[Call]:
        """Give the trace of the last start of a run."""
        return read_trace(*self._files(run), run)

    def _files(self, run: Path) -> tuple[Path, Path]:
        return run.parent.with_suffix(".trace"), run.parent.with_suffix(".data")
