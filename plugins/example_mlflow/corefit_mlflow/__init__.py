"""Runs of corefit in MLflow: losses, learning rate and speed of every step, the recipe as parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from corefit import EndReport, Reporter, StartReport, StepReport, ValidationReport

STEP = ("loss", "lr", "grad_norm", "fill", "tokens_per_s")
LONGEST = 500
"""Characters that MLflow takes for a parameter."""


@dataclass(frozen=True)
class Options:
    """Where the run goes."""

    experiment: str = "corefit"


def mlflow(options: Options) -> Callable[[object], None]:
    """Log to MLflow; a resumed run goes on in the same one."""
    import mlflow as client

    def tell(event: object) -> None:
        if isinstance(event, StartReport):
            client.set_experiment(options.experiment)
            known = Path(event.folder) / "mlflow-id.txt"
            if known.is_file():
                client.start_run(run_id=known.read_text("utf-8").strip())
                return
            run = client.start_run(run_name=Path(event.folder).name)
            known.write_text(run.info.run_id, "utf-8")
            client.log_params({key: value[:LONGEST] for key, value in event.recipe.items()})
        elif isinstance(event, StepReport):
            values = {f"train/{name}": getattr(event, name) for name in STEP}
            client.log_metrics({name: value for name, value in values.items() if value is not None}, step=event.step)
        elif isinstance(event, ValidationReport):
            client.log_metrics({"val/loss": event.loss}, step=event.step)
        elif isinstance(event, EndReport):
            client.end_run("FAILED" if event.status == "failed" else "FINISHED")

    return tell


def corefit_reporters() -> Iterable[Reporter]:  # noqa: D103
    yield Reporter(
        name="mlflow",
        summary="MLflow, where MLFLOW_TRACKING_URI says",
        open=mlflow,
        options=Options,
        needs={"mlflow": "mlflow-skinny"},
    )
