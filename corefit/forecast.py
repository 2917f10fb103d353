"""How long a run will be, in words: before it, after a few real steps, and where its limits change on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from corefit.data.stream import Estimate
from corefit.engine.loop import LoopState, progress_at
from corefit.errors import DataError
from corefit.plan import gib
from corefit.recipe import Train
from corefit.report import duration
from corefit.types import StepReport

CURVE, BARS = 24, "▁▂▃▄▅▆▇█"
"""Points of a learning rate's curve, and how high they can be."""
PROBED = 3
"""Steps that ``corefit plan --probe`` makes; the first one, which is slower, counts once."""
FEW_STEPS = 50
"""A run with fewer steps is pointed to a smaller ``packs_per_step``."""


def forecast(estimate: Estimate, settings: Train) -> str:
    """Say how long the run will be, and what gives it more steps where they are few."""
    about = "" if estimate.exact else "about "
    line = f"{about}{estimate.records:,} records -> {estimate.packs:,} packs"
    steps = estimate.steps(settings.packs_per_step)
    if steps is None or estimate.total_packs is None or (settings.max_steps and settings.max_steps <= steps):
        return f"{line} an epoch -> {settings.max_steps:,} steps (train.max_steps)"
    line += f" -> {steps:,} steps in {settings.epochs} epochs"
    fewer = max(estimate.total_packs // (2 * FEW_STEPS), 1) * settings.micro_packs
    if steps < FEW_STEPS and fewer < settings.packs_per_step:
        line += f": few; --set train.packs_per_step={fewer} gives {estimate.steps(fewer):,}"
    return line + ("" if estimate.exact else " (estimated from the first records and the size of the files)")


def probed(reports: Sequence[StepReport], steps: int, *, now: float) -> list[str]:
    """Say how long a run of so many steps takes, and when one that starts now ends."""
    if not reports:
        raise DataError("no step was made: no record became a sample")
    first, rest = reports[0].seconds, [report.seconds for report in reports[1:]] or [reports[0].seconds]
    each, size = sum(rest) / len(rest), max(report.memory_bytes or 0 for report in reports)
    took = ", ".join(f"{report.seconds:.3g}" for report in reports)
    whole = first + each * max(steps - 1, 0)
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(now + whole))
    return [
        f"probe: {len(reports)} real steps took {took} s; the most memory was {gib(size)}; nothing is kept",
        f"time: {duration(whole)} for {steps:,} steps; started now, it ends at {end}, without validation",
    ]


def limits_before(changes: Sequence[tuple[str, str, str]], now: Train) -> Train:
    """Give the settings with the limits that the run had."""
    old = {key: int(value) if value.isdecimal() else None for key, value, _ in changes}
    epochs, steps = old.get("train.epochs", now.epochs), old.get("train.max_steps", now.max_steps)
    return replace(now, epochs=epochs or 0, max_steps=steps)


def new_curve(lr_at: Callable[[float], float], state: LoopState, old: Train, new: Train) -> list[str]:
    """Say how long the run was and is now to be, and how the learning rate goes on from here."""

    def progress(train: Train) -> float:
        return progress_at(state.step, state.epoch, max_steps=train.max_steps, epochs=train.epochs)

    if state.step >= (new.max_steps or math.inf) or state.epoch >= (new.epochs or math.inf):
        return [f"{length(new)}: the run is beyond that ({length(old)} before), so it ends where it is"]
    here, before = progress(new), progress(old)
    rest = [lr_at(here + (1 - here) * i / (CURVE - 1)) for i in range(CURVE)]
    top = max(rest) or 1.0
    curve = "".join(BARS[round((len(BARS) - 1) * rate / top)] for rate in rest)
    return [
        f"extended: at {100 * before:.0f} % of the run as it was ({length(old)}), {100 * here:.0f} % as it is now "
        f"({length(new)})",
        f"learning rate: was {lr_at(before):.3g} here, is {rest[0]:.3g}, and goes {curve} to {rest[-1]:.3g}",
    ]


def length(train: Train) -> str:
    """Give the limits of a run in words."""
    parts = [f"{train.epochs} epochs"] if train.epochs else []
    return ", ".join(parts + ([f"{train.max_steps:,} steps"] if train.max_steps else [])) or "no limit"
