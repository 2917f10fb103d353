"""What a run says while it goes and when it ends: progress, ``metrics.jsonl``, ``samples.jsonl``, tables. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from corefit import terminal
from corefit.errors import RunError, system_words
from corefit.types import EndReport, Event, StartReport, StepReport, ValidationReport


def to_json(value: object) -> str:
    """Give one line of JSON; a number that JSON has no word for (NaN, infinity) becomes null."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:  # noqa: ANN401, JSON values have any type
    """Give the value with None for every number that is not finite; dataclasses become objects."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return finite(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def perplexity(nats: float) -> float:
    """Give exp(loss); infinity where that is larger than a float."""
    return math.exp(nats) if nats < 709 else math.inf


class JsonLines:
    """A file that grows by one JSON object a line, readable by others after every line.

    ``keep`` is how many bytes of an earlier run stay (a checkpoint says so); what lies behind them, also a torn line,
    is cut off. ``missing`` says how many of them are gone, should someone have shortened the file. What the disk
    refuses is said once, kept and written with a later line; ``trouble`` then says why, in words.
    """

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        self.path = path
        self.trouble = ""
        self._unwritten = b""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            self.missing = max(keep - self._file.tell(), 0)
            self._length = keep - self.missing
            self._file.truncate(self._length)
        except OSError as error:
            raise RunError(f"{path}: can't be written: {error.strerror}") from error

    def write(self, value: object) -> None:
        """Append one object, or keep it until the disk takes it."""
        self._unwritten += to_json(value).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            before, self.trouble = self.trouble, f"{self.path}: can't be written: {system_words(error)}"
            if not before:
                terminal.notice(f"{self.trouble}; its lines are kept until they can be, the run goes on")

    def sync(self) -> int:
        """Wait until all lines are on the disk; give their length in bytes.

        Raises:
            OSError: some can't be written.
        """
        self._flush()
        os.fsync(self._file.fileno())
        return self._length

    @property
    def there(self) -> bool:
        """Whether what is written goes to the file at its path; False: that was removed, renamed or replaced."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a disk that doesn't answer now
            return True

    def close(self) -> None:
        """Close the file; lines that could not be written are lost."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _flush(self) -> None:
        done = 0
        try:
            if self.trouble:  # what was written of a line before it was refused
                self._file.truncate(self._length)
            while done < len(self._unwritten):
                done += self._file.write(self._unwritten[done:])
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._length)  # no half line for readers
            raise
        self._length, self._unwritten, self.trouble = self._length + done, b"", ""


def objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file, if it is there; what is no object, a torn line too, is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(value := json.loads(line), dict):
                    yield value


class Progress:
    """The progress line on standard error: a bar on a terminal, else a plain line every ``every`` steps.

    ``endless``: the run has no last step, so no bar and no time left.
    """

    def __init__(self, *, endless: bool = False, every: int = 10, file: TextIO | None = None) -> None:
        self._file: TextIO | None = file or sys.stderr  # None: a program without a terminal
        self._every, self._endless = every, endless
        self._first: tuple[float, float] | None = None  # when the first step seen was over, and its progress
        self._bar: Any = None
        if self._file is not None and self._file.isatty():
            from tqdm import tqdm  # type: ignore[import-untyped]

            shape = "{desc}" if endless else "{percentage:3.0f}%|{bar:24}| {desc}"
            self._bar = tqdm(total=1.0, file=self._file, bar_format=shape, dynamic_ncols=True)

    def update(self, report: StepReport) -> None:
        """Show a step."""
        now, left = time.monotonic(), None
        if self._first and not self._endless and report.progress > self._first[1]:
            left = (now - self._first[0]) * (1 - report.progress) / (report.progress - self._first[1])
        text = step_line(report, left)
        if self._bar is not None:
            self._bar.n = report.progress
            self._bar.set_description_str(terminal.visible(text), refresh=False)
            with contextlib.suppress(OSError):
                self._bar.refresh()
        elif self._first is None or report.skipped or report.step % self._every == 0:
            terminal.notice(text, self._file)
        self._first = self._first or (now, report.progress)

    def close(self) -> None:
        """End the line; a bar that is not full stays as it is."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.close()


def progress(options: object = None) -> Callable[[Event], None]:
    """Give the reporter ``progress``."""
    shown: Progress | None = None

    def tell(event: Event) -> None:
        nonlocal shown
        if isinstance(event, StartReport):
            shown = Progress(endless=event.endless)
        elif shown is None:
            return
        elif isinstance(event, StepReport):
            shown.update(event)
        elif isinstance(event, ValidationReport):
            terminal.notice(
                f"step {event.step}: validation loss {event.loss:.4f} (perplexity {perplexity(event.loss):,.2f})"
            )
        elif isinstance(event, EndReport):
            shown.close()

    return tell


def step_line(report: StepReport, left: float | None) -> str:
    """Give a step in one line; ``left`` in seconds."""
    scaled = report.cause == "non_finite_gradients" and report.loss_scale != 1
    scale = f" at loss scale {report.loss_scale:g}" if scaled else ""
    what = f"skipped ({report.cause}{scale})" if report.cause else f"loss {report.loss:.4f}"
    rest = f", {duration(left)} left" if left is not None else ""
    return f"step {report.step}: {what}, {report.tokens_per_s:,.0f} supervised tok/s, fill {report.fill:.0f} %{rest}"


def duration(seconds: float) -> str:
    """Give a time as people say it: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def answers_table(rows: Sequence[tuple[str, str, str]], *, width: int | None = None) -> str:
    """Give questions with the answers before and after, in three columns; ``width`` in character cells."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 140)
    column = max((width - 4) // 3, 8)
    rule = "-" * (3 * column + 4)
    lines = [rule]
    for row in [("question", "before", "after"), *rows]:
        cells = [wrap(text, column) for text in row]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            lines.append("  ".join(part + " " * (column - cell_width(part)) for part in parts).rstrip())
        lines.append(rule)
    return "\n".join(lines)


def cell_width(text: str) -> int:
    """Give how many character cells a terminal uses: two for Chinese, none for combining marks."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Give rows as lines whose columns are under each other; ``right``: numbers of columns that end together.

    >>> columns([("模型", "n"), ("ab", "12")], right=[1])
    ['模型   n', 'ab    12']
    """
    widths = [max(map(cell_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - cell_width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [gap + cell if i in right else cell + gap for i, (cell, gap) in enumerate(zip(row, gaps, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def shortened(text: str, width: int) -> str:
    """Give the text, cut to ``width`` cells and ended by dots where it has more."""
    if cell_width(text) <= width:
        return text
    while cell_width(text) > width - 3:
        text = text[:-1]
    return text + "..."


def wrap(text: str, width: int) -> list[str]:
    """Break text into lines of at most ``width`` cells (at least 2), at spaces where there are any."""
    lines = [""]
    for word in "".join(c if c.isprintable() else " " for c in text).split():
        if lines[-1] and cell_width(lines[-1]) + 1 + cell_width(word) <= width:
            lines[-1] += " " + word
            continue
        lines.append("")
        for c in word:
            if cell_width(lines[-1] + c) > width:
                lines.append("")
            lines[-1] += c
    return lines[1:] or lines


def summary(
    lines: Sequence[Mapping[str, Any]], *, reason: str, skipped: Mapping[str, int], balanced: bool | None = None
) -> list[str]:
    """Give the lines that end a run, from those of ``metrics.jsonl`` (all of them, also from before a resume)."""
    steps = [line for line in lines if "loss" in line]
    if not steps:
        return [f"no step was made ({reason})"]
    seconds, tokens = sum(line["seconds"] for line in steps), sum(line["supervised_tokens"] for line in steps)
    said = [f"{steps[-1]['step']:,} steps, {steps[-1]['epoch']:.4g} epochs in {duration(seconds)}: ended by {reason}"]
    said += fallen("loss", [line["loss"] for line in steps if line["loss"] is not None])
    said += fallen("validation loss", [line["val_loss"] for line in lines if line.get("val_loss") is not None])
    # A step's slots follow from its tokens and fill, so that the mean is weighted by them.
    slots = sum(100 * line["tokens"] / line["fill"] for line in steps if line["fill"])
    fill = 100 * sum(line["tokens"] for line in steps) / max(slots, 1)
    memory = max((line["memory_bytes"] or 0 for line in steps), default=0)
    peak = f", peak memory {memory / 2**20:,.0f} MiB" if memory else ""
    said.append(f"{tokens:,} supervised tokens at {tokens / max(seconds, 1e-9):,.0f} a second, fill {fill:.1f} %{peak}")
    if skipped:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(skipped.items()))
        said.append(f"{sum(skipped.values())} steps skipped: {causes}")
    if balanced is not None:
        verdict = "balanced: every record, token and slot is accounted for" if balanced else "NOT BALANCED"
        said.append(f"ledger {verdict}")
    return said


def fallen(what: str, values: Sequence[float]) -> list[str]:
    """Give one line on how a loss moved, none where there is nothing to compare."""
    if len(values) < 2:
        return []
    first, last = values[0], values[-1]
    lower = f", {first / last:,.1f} times lower" if 0 < last < first else ""
    ratio = f"perplexity {perplexity(first):,.1f} -> {perplexity(last):,.1f}"
    return [f"{what} {first:.4f} -> {last:.4f} nats a token{lower} ({ratio})"]
