"""``corefit runs``: the run folders of a folder, one line each, whatever state they are in."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from corefit.durable import held, read_json
from corefit.errors import UserError, unknown
from corefit.report import columns, objects, shortened, to_json
from corefit.terminal import say, visible, write

WIDEST = 32
"""Cells that model and data may take in the table; ``--json`` has all of them."""


class RunLine(NamedTuple):
    """What one folder says of its run; what it does not say is None."""

    run: str
    """The folder."""
    state: str
    """``running``, ``killed`` (it never ended, and no process holds its lock), ``interrupted`` (by a signal, saved),
    ``finished``, ``failed``, ``damaged``; ``running?`` where the system has no locks to tell by."""
    started: str | None
    """ISO 8601, local time."""
    model: str | None
    data: tuple[str, ...]
    """Files, or the map functions of data that need none."""
    steps: int | None
    """Optimizer steps that ``metrics.jsonl`` holds."""
    best_loss: float | None
    """The lowest validation loss, nats a token; without validation the lowest loss of a step."""
    best_of: str | None
    """``validation`` or ``training``."""
    why: str | None
    """What ended it, or what is wrong with the folder."""


SORT: Mapping[str, Callable[[RunLine], Any]] = {
    "started": lambda r: r.started or "",
    "run": lambda r: r.run,
    "state": lambda r: r.state,
    "model": lambda r: r.model or "",
    "data": lambda r: r.data,
    "steps": lambda r: r.steps or 0,
    "loss": lambda r: (r.best_loss is None, r.best_loss or 0.0),
}
"""What ``--sort`` knows."""


def runs(folder: str = "runs", *, sort: str = "started", as_json: bool = False) -> None:
    """Print every run in a folder, or the one that the folder is.

    Raises:
        UserError: no such folder, or no such key to sort by.
    """
    if sort not in SORT:
        raise UserError(f"--sort {sort}: {unknown('key', sort, SORT)}")
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder}: no such folder; `corefit train` makes runs/, `corefit runs DIR` looks elsewhere")
    folders = [root] if os.path.isfile(root / "run.json") else sorted(path for path in root.iterdir() if path.is_dir())
    found = sorted(map(look, folders), key=SORT[sort])
    if as_json:
        for line in found:
            write(to_json(line._asdict()))
        return
    if not found:
        say(f"{folder}: no runs")
        return
    rows = [("run", "state", "started", "model", "data", "steps", "best loss")]
    for line in found:
        loss = "" if line.best_loss is None else f"{line.best_loss:.4f}{'' if line.best_of == 'validation' else ' *'}"
        model = shortened(visible(Path(line.model or "").name), WIDEST)
        data = shortened(visible(", ".join(Path(name).name for name in line.data)), WIDEST)
        started = visible(line.started or "")[:16].replace("T", " ")
        steps = "" if line.steps is None else f"{line.steps:,}"
        rows.append((visible(line.run).replace("\n", "\\n"), line.state, started, model, data, steps, loss))
    for text in columns(rows, right=(5, 6)):
        write(text)
    for line in found:
        if line.why:
            say(f"{line.run}: {line.state}: {line.why}")
    if any(line.best_of == "training" for line in found):
        say("* of a training step: the run has no validation")


def look(folder: Path) -> RunLine:
    """Give what a folder says of its run. Nothing in it, and nothing that is missing, raises."""
    facts = read_json(folder / "run.json")
    steps, losses, validation = _metrics(folder / "metrics.jsonl")
    best = min(validation or losses, default=None)
    status, why = facts.get("status"), facts.get("error") or None
    if status == "running":
        state = {True: "running", False: "killed", None: "running?"}[held(folder)]
    elif status in ("complete", "interrupted", "failed"):
        state = "finished" if status == "complete" else status
    else:
        state, there = "damaged", os.path.exists(folder / "run.json")  # False where the folder is shut
        why = "run.json is broken" if there else "no run.json: no run, or one that was killed before it began"
        if not os.access(folder, os.R_OK | os.X_OK):
            why = "no permission to look into it"
    if state == "interrupted":
        why = facts.get("ended_by")
    model = facts.get("model")
    return RunLine(
        run=str(folder),
        state=state,
        started=_text(facts.get("started")),
        model=_text(model.get("base")) if isinstance(model, dict) else None,
        data=_data(facts),
        steps=steps,
        best_loss=best,
        best_of=None if best is None else "validation" if validation else "training",
        why=_text(why),
    )


def _text(value: object) -> str | None:
    return None if value is None else " ".join(str(value).split())


def _data(facts: Mapping[str, Any]) -> tuple[str, ...]:
    files = facts.get("data")
    names = [str(f["path"]) for f in files if isinstance(f, dict) and "path" in f] if isinstance(files, list) else []
    with contextlib.suppress(AttributeError, KeyError, TypeError):  # a run.json that somebody edited
        names = names or [str(name) for name in facts["plugins"]["map function"]]
    return tuple(dict.fromkeys(names))


def _metrics(path: Path) -> tuple[int | None, list[float], list[float]]:
    """Give the last step, the losses of steps and the validation losses; lines that are torn are left out."""
    steps: int | None = None
    losses, validation = list[float](), list[float]()
    with contextlib.suppress(OSError):  # a folder that is shut
        for line in objects(path):
            if isinstance(loss := line.get("loss"), float) and math.isfinite(loss):
                losses.append(loss)
            if isinstance(loss := line.get("val_loss"), float) and math.isfinite(loss):
                validation.append(loss)
            if "loss" in line and isinstance(step := line.get("step"), int):
                steps = step
    return steps, losses, validation
