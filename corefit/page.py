"""``report.html``: a run folder as one page that opens from the disk and asks the net for nothing.

The page is ``page.html`` with one JSON object in it; its script draws from that, and what data and models wrote goes
in as text, never as markup. Everything comes from the files of the run folder, so that any run can be shown again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from corefit.durable import read_json, write_whole
from corefit.errors import CorefitError, RecipeError, system_words
from corefit.recipe import flat, load_recipe
from corefit.report import objects, to_json
from corefit.terminal import notice
from corefit.types import EndReport, Event, PacksReport, StartReport

NAME = "report.html"
POINTS = 400
"""A curve has fewer than twice as many. Where there are more steps, each point is the mean of 2, 4, 8 ... of them (loss
scale: the lowest, memory: the most), and the page says of how many."""
EVERY, SHARE = 10.0, 0.01
"""Seconds between two writings of a page, and the share of a run's time that they may take."""
LONGEST, PROMPTS, FILES = 2_000, 20, 50
"""Characters of a text, questions, and data files that are shown."""
LARGEST = 900_000
"""Bytes of a page; what a larger one would say least about is left out, and the page says so."""


def reporter(options: object = None) -> Callable[[Event], None]:
    """Give the reporter ``report.html``: the page, written while the run goes on; a disk that refuses ends nothing."""
    folder, due, lengths, trouble = Path(), 0.0, list[int](), ""

    def tell(event: Event) -> None:
        nonlocal folder, due, lengths, trouble
        if isinstance(event, StartReport):
            folder, lengths = Path(event.folder), list(event.lengths)
        began = time.monotonic()
        try:
            if isinstance(event, PacksReport):
                start = {"lengths": lengths, "packs": event.packs}
                write_whole(folder / "packs.json", to_json(start).encode())
            if began >= due or isinstance(event, EndReport):
                write(folder)
                due = time.monotonic() + max(EVERY, (time.monotonic() - began) / SHARE)
        except OSError as error:
            due = began + EVERY
            if not trouble:
                trouble = f"{folder / NAME}: can't be written: {system_words(error)}"
                notice(f"{trouble}; it is tried again, the run goes on")

    return tell


def write(run: Path, other: Path | None = None, out: Path | None = None) -> Path:
    """Write the page of a run, or one that compares two; give its path (default: in the run folder).

    Raises:
        RecipeError: there is no run. OSError: the disk refuses; an older page is as it was.
    """
    runs = [collect(folder) for folder in (run, other) if folder is not None]
    page = Path(__file__).with_suffix(".html").read_text("utf-8")
    left_out: list[str] = []
    for part in ("", "packs", "samples", "recipe", "curves"):
        if part:
            left_out.append(part)
            runs = [{key: value for key, value in each.items() if key != part} for each in runs]
        data = to_json({"runs": runs, "left_out": left_out})
        # Within a script element only "<" can end it or open another.
        made = page.replace("{}", data.replace("<", "\\u003c"), 1).encode(errors="replace")
        if len(made) <= LARGEST:
            break
    path = out or run / (NAME if other is None else "compare.html")
    write_whole(path, made)
    return path


def report(run: str, other: str | None = None, out: str | None = None) -> Path:
    """Do what ``corefit report`` does; see ``write``.

    Raises:
        RecipeError: there is no run, or the page can't be written.
    """
    if out is not None and Path(out).is_dir():
        raise RecipeError(f"--out {out}: a folder; expected the name of a file")
    try:
        return write(Path(run), None if other is None else Path(other), None if out is None else Path(out))
    except OSError as error:
        place = f"{run}: the page" if out is None else f"--out {out}:"
        more = "; --out FILE puts it elsewhere" if out is None else ""
        raise RecipeError(f"{place} can't be written: {system_words(error)}{more}") from error


def collect(folder: Path) -> dict[str, Any]:
    """Give all that a page shows of a run, of bounded size however long the run was."""
    facts = read_json(folder / "run.json")
    if not facts:
        broken = (folder / "run.json").is_file()
        raise RecipeError(f"{folder / 'run.json'}: broken" if broken else f"{folder}: no run there (no run.json)")
    text = (folder / "recipe.toml").read_text("utf-8", errors="replace") if (folder / "recipe.toml").exists() else ""
    try:
        keys = flat(load_recipe(folder / "recipe.toml"))
    except CorefitError:  # of another version
        keys = {}
    ledger, step = read_json(folder / "ledger.json"), facts.get("steps")
    if not ledger or facts.get("status") == "running":
        states = sorted((folder / "checkpoints").glob("step-*/state.json"))
        loop = read_json(states[-1]).get("loop", {}) if states else {}
        ledger, step = (loop.get("stream") or {}).get("ledger", {}), loop.get("step")
    data = files if isinstance(files := facts.get("data"), list) else []  # else somebody edited it
    known = ("corefit", "started", "platform", "versions", "plugins", "model", "device", "precision", "proofs")
    said = ("status", "ended_by", "steps", "error", "resumed", "command")
    return {
        "name": folder.resolve().name,
        "facts": {key: facts[key] for key in (*known, *said) if key in facts},
        "data": [data[:FILES], max(len(data) - FILES, 0)],
        "keys": {key: _short(value) for key, value in keys.items()},
        "recipe": text if len(text) <= 50 * LONGEST else _short(text, 50 * LONGEST),
        "curves": curves(folder / "metrics.jsonl"),
        "ledger": {key: ledger[key] for key in ("records", "tokens", "slots", "messages", "balanced") if key in ledger},
        "ledger_step": step,
        "samples": samples(folder / "samples.jsonl"),
        "packs": read_json(folder / "packs.json"),
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def curves(path: Path) -> dict[str, Any]:
    """Give the curves of ``metrics.jsonl``, read once, line by line, with at most ``POINTS`` points each."""
    points: list[_Point] = []
    each, open_, validations, saves, errors = 1, _Point(), list[list[float]](), 0, 0
    first = last = None
    total = _Point()
    for row in objects(path):
        if "loss" in row:
            if not _is_step(row):
                continue
            first, last = (row["loss"] if first is None else first), (row["loss"] if row["loss"] is not None else last)
            open_.add(row)
            total.add(row)
            if open_.steps == each:
                points.append(open_)
                open_ = _Point()
                if len(points) == 2 * POINTS:
                    each, points = 2 * each, [a.join(b) for a, b in zip(points[::2], points[1::2], strict=True)]
        elif all(isinstance(row.get(key), (int, float)) for key in ("step", "val_loss")):
            validations.append([row["step"], row["val_loss"]])
            if len(validations) > POINTS:
                validations = validations[::2]
        saves += "save_bytes" in row
        errors += "save_error" in row
    points += [open_] if open_.steps else []
    rows = [point.row() for point in points]
    return {
        "each": each,
        "points": {key: [row[key] for row in rows] for key in (rows[0] if rows else ())},
        "validation": [[step, _digits(loss)] for step, loss in validations],
        "total": {**total.row(), "first": first, "last": last, "supervised": total.supervised, "tokens": total.tokens},
        "saves": saves,
        "save_errors": errors,
    }


_NUMBERS = frozenset(("step", "epoch", "lr", "seconds", "tokens", "supervised_tokens", "fill", "loss_scale"))
_KEYS = _NUMBERS | {"loss", "grad_norm", "memory_bytes", "skipped"}


def _is_step(row: Mapping[str, Any]) -> bool:
    """Whether a line has what a run writes of a step; one that somebody edited is left out, as a torn one is."""
    return all(isinstance(row.get(key), (int, float, *(() if key in _NUMBERS else (type(None),)))) for key in _KEYS)


class _Point:
    """Some consecutive steps."""

    def __init__(self) -> None:
        self.steps = self.skipped = self.losses = self.norms = 0
        self.loss = self.lr = self.norm = self.seconds = self.slots = 0.0
        self.supervised = self.tokens = self.step = self.memory = 0
        self.epoch, self.scale = 0.0, math.inf

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a line in."""
        self.steps, self.skipped = self.steps + 1, self.skipped + bool(row["skipped"])
        if row["loss"] is not None:
            self.losses, self.loss = self.losses + 1, self.loss + row["loss"]
        if row["grad_norm"] is not None:
            self.norms, self.norm = self.norms + 1, self.norm + row["grad_norm"]
        self.lr, self.seconds = self.lr + row["lr"], self.seconds + row["seconds"]
        self.tokens, self.supervised = self.tokens + row["tokens"], self.supervised + row["supervised_tokens"]
        self.slots += 100 * row["tokens"] / row["fill"] if row["fill"] else 0
        self.memory = max(self.memory, row["memory_bytes"] or 0)
        self.step, self.epoch, self.scale = row["step"], row["epoch"], min(self.scale, row["loss_scale"])

    def join(self, later: _Point) -> _Point:
        """Give both as one."""
        joined = _Point()
        for name, value in vars(self).items():
            joined.__dict__[name] = value + getattr(later, name)
        joined.memory, joined.scale = max(self.memory, later.memory), min(self.scale, later.scale)
        joined.step, joined.epoch = later.step, later.epoch
        return joined

    def row(self) -> dict[str, float | None]:
        """Give what is drawn."""
        return {
            "step": self.step,
            "epoch": _digits(self.epoch),
            "loss": _digits(self.loss / self.losses) if self.losses else None,
            "lr": _digits(self.lr / self.steps) if self.steps else None,
            "grad_norm": _digits(self.norm / self.norms) if self.norms else None,
            "loss_scale": self.scale,
            "skipped": self.skipped,
            "tokens_per_s": _digits(self.supervised / max(self.seconds, 1e-9)),
            "fill": _digits(100 * self.tokens / self.slots) if self.slots else None,
            "memory": self.memory or None,
            "seconds": _digits(self.seconds),
        }


def samples(path: Path) -> list[dict[str, Any]]:
    """Give for each question its answers at the first, the middle and the last step that it was asked at."""
    steps: dict[str, list[int]] = {}
    for row in objects(path):
        if row.get("prompt") in steps or len(steps) < PROMPTS:
            steps.setdefault(row.get("prompt", ""), []).append(row.get("step", 0))
    wanted = {prompt: sorted({at[0], at[len(at) // 2], at[-1]}) for prompt, at in steps.items()}
    answers: dict[str, dict[int, dict[str, Any]]] = {prompt: {} for prompt in wanted}
    for row in objects(path):
        prompt, step = row.get("prompt", ""), row.get("step", 0)
        if step in wanted.get(prompt, ()):
            stopped = row.get("stopped", True)
            answers[prompt][step] = {"step": step, "answer": _short(row.get("answer", "")), "stopped": stopped}
    return [{"prompt": _short(prompt), "answers": list(of.values())} for prompt, of in answers.items()]


def _digits(value: float) -> float:
    """Give a number with six significant digits."""
    return float(f"{value:.6g}")


def _short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest]} … and {len(text) - longest:,} more characters"
