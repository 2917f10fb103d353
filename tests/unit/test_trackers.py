"""Reporters for TensorBoard and Weights & Biases, told what a run tells; the programs themselves are stand-ins."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from corefit_trackers import WandbOptions, tensorboard, wandb

from corefit import EndReport, PacksReport, SampleReport, StartReport, StepReport, ValidationReport


def events(folder: Path, *, step: int = 0):
    numbers = dict(epoch=0.5, progress=0.5, lr=1e-4, grad_norm=None, loss_scale=1.0, tokens=20)
    more = dict(supervised_tokens=10, samples=2, packs=1, fill=99.0, tokens_per_s=5.0, seconds=2.0, memory_bytes=None)
    yield StartReport(folder=str(folder), step=step, endless=False, recipe={"train.lr": "0.0001"}, facts={})
    yield PacksReport(packs=[])
    yield ValidationReport(step=step, loss=2.0, perplexity=7.4, tokens=10)
    yield StepReport(step=step + 1, loss=1.5, skipped=False, cause=None, **numbers, **more)
    yield StepReport(step=step + 2, loss=None, skipped=True, cause="nothing_supervised", **numbers, **more)
    yield SampleReport(step=step + 2, prompt="hi", answer="there", stopped=True)
    yield EndReport(step=step + 2, status="failed", reason="broken", ledger={})


class Writer:
    def __init__(self, folder, purge_step=None):
        self.calls = [("open", folder, purge_step)]
        made.append(self)

    def __getattr__(self, name):
        return lambda *values: self.calls.append((name, *values))


made: list[Writer] = []


def test_tensorboard_has_the_curves_and_a_resumed_run_takes_away_what_it_makes_again(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    for step, purge in ((0, None), (7, 8)):
        tell = tensorboard(None)
        for event in events(tmp_path, step=step):
            tell(event)
        calls = made[-1].calls
        assert calls[0] == ("open", str(tmp_path / "tensorboard"), purge)
        assert ("add_scalar", "val/loss", 2.0, step) in calls
        assert ("add_scalar", "train/loss", 1.5, step + 1) in calls and calls[-1] == ("close",)
        losses = [call for call in calls if call[:2] == ("add_scalar", "train/loss")]
        assert len(losses) == 1  # a skipped step has none
        assert ("add_text", "samples/hi", "there", step + 2) in calls


def test_wandb_keeps_its_id_over_a_resume(tmp_path, monkeypatch):
    seen: list[tuple[str, object]] = []
    run = types.SimpleNamespace(
        id="abc123",
        log=lambda values: seen.append(("log", values)),
        finish=lambda exit_code: seen.append(("finish", exit_code)),
    )

    def init(**how):
        seen.append(("init", how))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (0, 7):
        tell = wandb(WandbOptions(project="mine"))
        for event in events(tmp_path, step=step):
            tell(event)
    begun = [how for what, how in seen if what == "init"]
    assert [how["id"] for how in begun] == [None, "abc123"] and [how["resume"] for how in begun] == [None, "allow"]
    assert begun[0]["project"] == "mine" and begun[0]["config"] == {"train.lr": "0.0001"}
    logged = [values for what, values in seen if what == "log"]
    assert {"val/loss": 2.0, "step": 7} in logged and logged[1]["train/loss"] == 1.5
    assert seen[-1] == ("finish", 1)
    json.dumps(logged)


def test_the_example_distribution_logs_to_mlflow_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    seen: list[tuple[str, object]] = []

    class Client(types.ModuleType):
        def start_run(self, **how):
            seen.append(("start", how))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="id1"))

        def __getattr__(self, name):
            return lambda *values, **more: seen.append((name, values, more))

    monkeypatch.setitem(sys.modules, "mlflow", Client("mlflow"))
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "plugins" / "example_mlflow")
    from corefit_mlflow import Options, mlflow

    for step in (0, 7):
        tell = mlflow(Options(experiment="mine"))
        for event in events(tmp_path, step=step):
            tell(event)
    assert [call for call in seen if call[0] == "start"] == [
        ("start", {"run_name": tmp_path.name}),
        ("start", {"run_id": "id1"}),
    ]
    assert ("log_params", ({"train.lr": "0.0001"},), {}) in seen
    assert ("log_metrics", ({"val/loss": 2.0},), {"step": 7}) in seen
    logged = [call for call in seen if call[0] == "log_metrics" and "train/loss" in call[1][0]]
    assert [call[2]["step"] for call in logged] == [1, 8]  # a skipped step has no loss
    assert seen[0] == ("set_experiment", ("mine",), {}) and seen[-1] == ("end_run", ("FAILED",), {})


def test_one_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    import importlib.util

    from corefit.errors import PluginError
    from corefit.registry import Registry
    from corefit.reporters import Reporters

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("tensorboard", "wandb") else real(name)
    )
    for name in ("tensorboard", "wandb"):
        with pytest.raises(PluginError, match=rf"{name!r} needs {name}, .*: pip install 'corefit\[{name}\]'"):
            Reporters([name], {}, Registry.load())
