"""Reporters are told what happens, in order, and can't change a run: whatever they do is said, counted and survived."""

from __future__ import annotations

import json
import random
import sys
import time

import pytest
from fake_plugins import write_plugin

from corefit import reporters as module
from corefit.errors import PluginError, RecipeError
from corefit.registry import Registry
from corefit.reporters import Reporters
from corefit.types import EndReport, StartReport, StepReport

CODE = """
    import json, os, random, sys, time
    from dataclasses import asdict, dataclass
    from pathlib import Path
    from corefit import Reporter, StartReport, StepReport

    @dataclass(frozen=True)
    class Options:
        file: str = "told.jsonl"

    def writes(options):
        folder = Path()
        def tell(event):
            nonlocal folder
            folder = Path(event.folder) if isinstance(event, StartReport) else folder
            random.seed(0)
            print("a print of a plugin")
            with open(folder / options.file, "a") as file:
                file.write(json.dumps([type(event).__name__, asdict(event)]) + "\\n")
        return tell

    def at_step_3(do):
        return lambda options: lambda event: do() if isinstance(event, StepReport) and event.step == 3 else None

    def raises():
        raise ValueError("no\\nluck")

    def corefit_reporters():
        yield Reporter(name="writes", summary="x", open=writes, options=Options)
        yield Reporter(name="raises", summary="x", open=at_step_3(raises))
        yield Reporter(name="exits", summary="x", open=at_step_3(lambda: sys.exit("bye")))
        yield Reporter(name="crashes", summary="x", open=at_step_3(lambda: os._exit(7)))
        yield Reporter(name="hangs", summary="x", open=at_step_3(lambda: time.sleep(60)))
        yield Reporter(name="slow", summary="x", open=lambda options: lambda event: time.sleep(0.01))
        yield Reporter(name="closed", summary="x", open=lambda options: 1 / 0)
        yield Reporter(name="lacks", summary="x", open=writes, needs={"nothing_there": "corefit[nothing]"})
        yield Reporter(name="lacks_a_part", summary="x", open=writes, needs={"nothing_there.at_all": "nothing"})
"""


@pytest.fixture
def registry(tmp_path, monkeypatch):
    write_plugin(tmp_path, "corefit-told", CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Registry.load()
    sys.modules.pop("corefit_told", None)


def step(number: int) -> StepReport:
    counts = dict(tokens=9, supervised_tokens=4, samples=1, packs=1, fill=90.0, tokens_per_s=4.0, seconds=1.0)
    scale = dict(loss_scale=1.0, skipped=False, cause=None, memory_bytes=None, grad_norm=None)
    return StepReport(step=number, epoch=0.1, progress=0.5, loss=float("inf"), lr=1e-3, **counts, **scale)


def start(folder) -> StartReport:
    return StartReport(folder=str(folder), step=0, endless=False, recipe={"train.lr": "1e-3"}, facts={})


END = EndReport(step=5, status="complete", reason="max_steps", ledger={"balanced": True})


def play(registry, folder, *names, steps=5, options=None):
    """A run of ``steps`` steps as reporters see it."""
    folder.mkdir(exist_ok=True)
    told = Reporters(names, options or {}, registry)
    told.start(start(folder))
    for number in range(1, steps + 1):
        told.tell(step(number))
    told.tell(END)
    began = time.monotonic()
    told.close()
    return time.monotonic() - began


def test_every_event_comes_whole_and_in_order_in_another_process(registry, tmp_path, capfd):
    state = random.getstate()
    play(registry, tmp_path / "run", "writes", options={"file": "mine.jsonl"})
    events = [json.loads(line) for line in (tmp_path / "run" / "mine.jsonl").read_text().splitlines()]
    assert [name for name, _ in events] == ["StartReport", *["StepReport"] * 5, "EndReport"]
    assert events[0][1]["recipe"] == {"train.lr": "1e-3"} and [e["step"] for _, e in events] == [0, 1, 2, 3, 4, 5, 5]
    assert events[1][1]["loss"] is None, "JSON has no word for infinity"
    assert random.getstate() == state
    out, err = capfd.readouterr()
    assert out == "" and err.count("a print of a plugin") == 7, "standard output is the run's"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "tell(StepReport) raised ValueError: no luck; it is switched off, the run goes on"),
        ("exits", "tell(StepReport) raised SystemExit: bye; it is switched off, the run goes on"),
        ("closed", "open(options) raised ZeroDivisionError: division by zero; it is switched off, the run goes on"),
        ("crashes", "its process ended with 7"),
    ],
)
def test_what_goes_wrong_is_said_once_with_the_plugin(registry, tmp_path, capfd, name, words):
    play(registry, tmp_path / "run", name, "writes", steps=50)
    said = [line for line in capfd.readouterr().err.splitlines() if "a print" not in line]
    assert len(said) == 1 and said[0].startswith(f"reporter '{name}' (corefit-told 1.0): {words}"), said
    assert len((tmp_path / "run" / "told.jsonl").read_text().splitlines()) == 52, "the others go on"


def test_one_that_hangs_holds_nothing_up_and_is_ended(registry, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 1.5)
    began = time.process_time()
    assert 1 < play(registry, tmp_path / "run", "hangs", "writes", steps=30) < 5
    assert time.process_time() - began < 1
    said = [line for line in capfd.readouterr().err.splitlines() if "a print" not in line]
    assert said == ["reporter 'hangs' (corefit-told 1.0): still busy 1.5 s after the run, so it was ended"]
    assert len((tmp_path / "run" / "told.jsonl").read_text().splitlines()) == 32


def test_what_one_is_too_slow_for_is_left_out_counted_and_said(registry, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(module, "HELD", 10)
    play(registry, tmp_path / "run", "slow", steps=2_000)
    first, last = capfd.readouterr().err.splitlines()
    assert first == "reporter 'slow' (corefit-told 1.0): too slow; events are left out, the run goes on"
    assert last.startswith("reporter 'slow' (corefit-told 1.0): it was too slow for 1,")


def test_what_cannot_be_is_refused_before_anything_runs(registry):
    for names, options, words in (
        (["raisess"], {}, "no reporter 'raisess'; did you mean 'raises'? known: closed, "),
        (["progress"], {"file": "x"}, "run.options: no option 'file'; known: none"),
        (["writes"], {"flie": "x"}, "run.options: no option 'flie'; did you mean 'file'? known: file"),
        (["writes"], {"file": 3}, "run.options: file: found 3; expected text"),
        (["lacks_a_part"], {}, "run.reporters: 'lacks_a_part' needs nothing_there.at_all, which is not installed: pip"),
        (["lacks"], {}, "run.reporters: 'lacks' needs nothing_there, which is not installed: pip install 'corefit[not"),
    ):
        with pytest.raises((PluginError, RecipeError)) as caught:
            Reporters(names, options, registry)
        assert str(caught.value).startswith(words)


def test_no_secret_leaves_the_run(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", 'very "secret" indeed')
    told = Reporters(["writes"], {}, registry)
    told.start(start(tmp_path))
    told.tell(EndReport(step=0, status="failed", reason='it said very "secret" indeed', ledger={}))
    told.close()
    assert "it said $MY_API_KEY" in (tmp_path / "told.jsonl").read_text()
