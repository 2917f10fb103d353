"""Reporters that raise, hang for five seconds or write without end: the weights stay what they were."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cli import corefit
from fake_plugins import write_plugin

CODE = """
    import random, sys, time, torch
    from corefit import Reporter, StepReport

    def raises(event):
        torch.manual_seed(1)
        raise ValueError("no luck")

    def floods(event):
        print("x" * 100_000)

    def corefit_reporters():
        for name, do in {"raises": raises, "hangs": lambda event: time.sleep(5), "floods": floods}.items():
            tell = lambda event, do=do: do(event) if isinstance(event, StepReport) and event.step == 2 else None
            yield Reporter(name=name, summary="x", open=lambda options, tell=tell: tell)
"""


def test_no_reporter_changes_the_weights(tmp_path: Path) -> None:
    write_plugin(tmp_path / "site", "corefit-bad", CODE)
    few, weights = ["train.max_steps=4", "sample.max_tokens=4", "run.threads=1"], []
    for names in ("progress", "progress,raises,hangs,floods"):
        out = tmp_path / names[-6:]
        sets = [*few, f"run.reporters={names}"]
        done = corefit("train", "--out", out, "--set", *sets, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")})
        assert done.returncode == 0, done.stderr[-2000:]
        weights.append((out / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    said = [line for line in done.stderr.splitlines() if line.startswith("reporter ")]
    words = "tell(StepReport) raised ValueError: no luck; it is switched off, the run goes on"
    assert said == [f"reporter 'raises' (corefit-bad 1.0): {words}"]


@pytest.mark.full
def test_events_take_less_than_a_hundredth_of_the_processor_time_of_the_demonstration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import corefit
    from corefit.reporters import Reporters

    write_plugin(tmp_path / "site", "corefit-bad", CODE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    spent = []

    def timed(name: str) -> None:
        real = getattr(Reporters, name)

        def call(*arguments: object) -> None:
            began = time.thread_time()
            real(*arguments)
            spent.append(time.thread_time() - began)

        monkeypatch.setattr(Reporters, name, call)

    for name in ("start", "tell", "close"):
        timed(name)
    began = time.process_time()
    run = corefit.train(out=tmp_path / "run", plugin="oasst1", sets=["run.reporters=progress,floods"])
    total = time.process_time() - began
    assert len(run.metrics) >= 200 and len(spent) > 200
    print(f"{sum(spent):.2f} s of {total:.1f}, {100 * sum(spent) / total:.2f} %, in {len(spent)} calls")
    assert sum(spent) < 0.01 * total
