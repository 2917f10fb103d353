"""Runs in TensorBoard and Weights & Biases: ``run.reporters = ["progress", "report.html", "tensorboard"]``.

Neither is required: ``pip install 'corefit[tensorboard]'`` or ``'corefit[wandb]'`` brings it. What is drawn is what
``metrics.jsonl`` has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corefit import EndReport, Reporter, SampleReport, StartReport, StepReport, ValidationReport

STEP = ("loss", "lr", "grad_norm", "loss_scale", "fill", "tokens_per_s", "memory_bytes", "epoch")
"""Numbers of a step that are drawn."""


def numbers(event: object) -> tuple[int, dict[str, float]]:
    """Give the step of an event and what it adds to the curves; (0, {}): nothing."""
    if isinstance(event, StepReport):
        found = {f"train/{name}": getattr(event, name) for name in STEP}
        return event.step, {name: float(value) for name, value in found.items() if value is not None}
    if isinstance(event, ValidationReport):
        return event.step, {"val/loss": event.loss}
    return 0, {}


def tensorboard(options: object) -> Callable[[object], None]:
    """Write ``RUN/tensorboard``; a resumed run takes the steps away that it makes again."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = None

    def tell(event: object) -> None:
        nonlocal writer
        if isinstance(event, StartReport):
            folder = str(Path(event.folder) / "tensorboard")
            writer = SummaryWriter(folder, purge_step=event.step + 1 if event.step else None)
            writer.add_text("recipe", _table(event.recipe), event.step)
        step, found = numbers(event)
        for name, value in found.items():
            writer.add_scalar(name, value, step)
        if isinstance(event, SampleReport):
            writer.add_text(f"samples/{event.prompt[:40]}", event.answer, event.step)
        if isinstance(event, EndReport):
            writer.close()

    return tell


def _table(recipe: Mapping[str, str]) -> str:
    rows = "\n".join(f"| {key} | `{value}` |" for key, value in recipe.items())
    return f"| key | value |\n|---|---|\n{rows}"


@dataclass(frozen=True)
class WandbOptions:
    """Where the run goes."""

    project: str = "corefit"


def wandb(options: WandbOptions) -> Callable[[object], None]:
    """Log to Weights & Biases, or offline where ``WANDB_MODE=offline`` says so; a resumed run keeps its id."""
    import wandb as client

    run: Any = None

    def tell(event: object) -> None:
        nonlocal run
        if isinstance(event, StartReport):
            folder = Path(event.folder)
            known = folder / "wandb-id.txt"
            own = known.read_text("utf-8").strip() if known.is_file() else None
            about = dict(project=options.project, name=folder.name, config=dict(event.recipe), dir=str(folder))
            run = client.init(id=own, resume="allow" if own else None, **about)
            known.write_text(run.id, "utf-8")
        step, found = numbers(event)
        if found:
            run.log({**found, "step": step})
        if isinstance(event, EndReport):
            run.finish(exit_code=int(event.status == "failed"))

    return tell


def corefit_reporters() -> Iterable[Reporter]:  # noqa: D103
    yield Reporter(
        name="tensorboard",
        summary="RUN/tensorboard, for `tensorboard --logdir`",
        open=tensorboard,
        needs={"tensorboard": "corefit[tensorboard]"},
    )
    yield Reporter(
        name="wandb",
        summary="Weights & Biases; WANDB_MODE=offline keeps it here",
        open=wandb,
        options=WandbOptions,
        needs={"wandb": "corefit[wandb]"},
    )
