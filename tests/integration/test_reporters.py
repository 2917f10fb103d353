"""Reporters that raise, hang for five seconds or write without end: the weights stay what they were."""

from __future__ import annotations

from pathlib import Path

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
