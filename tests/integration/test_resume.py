"""Going on with a run: from which checkpoint, under what changes, into which folder; a disk that refuses; signals."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import corefit, environment
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from corefit import durable
from corefit.cli import main
from corefit.engine import checkpoint, evaluate
from corefit.errors import CheckpointError, CorefitError, DataError, ModelError, RecipeError, RunError
from corefit.merge import merge
from corefit.run import Run, train, train_from
from corefit.session import Session

ROWS = "".join(
    json.dumps({"text": f"### Human: What is {i}?### Assistant: It is number {i}, {'really ' * (i % 7)}so."}) + "\n"
    for i in range(40)
)
SETS = [
    *("pack.max_length=128", "train.packs_per_step=2", "sample.max_tokens=4", "adapter.r=4", "train.lr=5e-3"),
    *("pack.held=16", "run.threads=1", "run.device=cpu", "train.epochs=2", "checkpoint.every_steps=3"),
    *("checkpoint.keep=100", "val.every_steps=4"),
]


class Here:
    """A folder with data, and training in it, in this process."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.said = folder, list[str]()
        (folder / "rows.jsonl").write_text(ROWS, "utf-8")
        self.flags = {"plugin": "oasst1", "template": "chatml", "model": str(model), "data": str(folder / "rows.jsonl")}

    def train(self, *sets: str, recipe: str | None = None, resume: bool | str = False, **more: Any) -> Run:
        flags = {**self.flags, **{k: str(v) for k, v in more.items() if k != "allow_changes" and v is not None}}
        self.said.clear()
        return train_from(
            recipe,
            {k: v for k, v in flags.items() if v},
            [*SETS, *sets] if recipe is None and not isinstance(resume, str) else list(sets),
            resume=resume,
            allow_changes=bool(more.get("allow_changes")),
            say=self.said.append,
        )

    def goes_on(self, run: Path | str, *sets: str, **more: Any) -> Run:
        self.flags = {}
        return self.train(*sets, resume=str(run), **more)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished run with all its checkpoints; copied before anything is done to it."""
    folder = tmp_path_factory.mktemp("straight")
    return Here(folder, tiny_model).train("checkpoint.keep_best=true", out=folder / "run").path


@pytest.fixture
def here(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.chdir(tmp_path)
    return Here(tmp_path, tiny_model)


@pytest.fixture
def run(here: Here, straight: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(straight, here.folder / "run")
    return here.folder / "run"


def cut(run: Path, step: int) -> None:
    """Let a run look as if it was killed after a checkpoint."""
    for path in checkpoint.steps_in(run / "checkpoints"):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    shutil.rmtree(run / "adapter", ignore_errors=True)
    facts = json.loads((run / "run.json").read_text("utf-8"))
    (run / "run.json").write_text(json.dumps({**facts, "status": "running"}), "utf-8")


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.steps_in(run / "checkpoints")]


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(run) if "loss" in line]


# ------------------------------------------------------------------------------------------------ which run, which step


def test_a_named_run_goes_on_from_its_newest_checkpoint_to_the_straight_end(here: Here, run: Path, straight: Path):
    cut(run, 3)
    here.goes_on(run)
    assert any(f"from step 3 ({run / 'checkpoints' / 'step-00000003'})" in line for line in here.said), here.said
    assert weights(run) == weights(straight)
    assert losses(run) == losses(straight)
    here.goes_on(run)
    assert here.said[-1] == f"{run} is complete: nothing to do"


def test_the_same_command_line_starts_goes_on_and_says_complete(here: Here):
    sets = ["train.max_steps=4"]
    assert here.train(*sets, resume=True).path == Path("runs/oasst1-1")
    assert any("no earlier run" in line for line in here.said)
    assert here.train(*sets, resume=True).path == Path("runs/oasst1-1")
    assert here.said[-1] == "runs/oasst1-1 is complete: nothing to do"
    cut(Path("runs/oasst1-1"), 3)
    assert here.train(*sets, resume=True).path == Path("runs/oasst1-1")
    assert steps(Path("runs/oasst1-1")) == [3, 4]
    other = here.train(*sets, "train.lr=1e-3", resume=True)
    assert other.path == Path("runs/oasst1-2")
    assert any("runs/oasst1-1 is another: train.lr: 0.005 -> 0.001" in line for line in here.said), here.said


def test_an_older_step_goes_on_in_a_new_folder_only_and_ends_the_same(here: Here, run: Path, straight: Path):
    with pytest.raises(RecipeError, match=r"run@3: this run has gone on to step-\d+; --out NEW"):
        here.goes_on(f"{run}@3")
    before = sorted(p.name for p in run.rglob("*"))
    new = here.goes_on(f"{run}@3", out=here.folder / "new").path
    assert sorted(p.name for p in run.rglob("*")) == before, "the old run is left as it is"
    assert weights(new) == weights(straight)
    assert losses(new) == losses(straight)
    here.goes_on(f"{run}@3", out=here.folder / "new")
    assert "complete" in here.said[-1], "the same command line again finds the folder that it began"
    with pytest.raises(CorefitError, match="no checkpoint 7; steps that are there: 3, 4, 6, "):
        here.goes_on(f"{run}@7", out=here.folder / "other")
    with pytest.raises(RecipeError, match="no run there"):
        here.goes_on(here.folder / "nowhere")


def test_a_fork_that_was_killed_midway_is_begun_anew_by_the_same_line(
    here: Here, run: Path, monkeypatch: pytest.MonkeyPatch
):
    write = durable.write_whole

    def killed(path: Path, data: bytes) -> None:
        if path.name == "samples.jsonl":
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("corefit.run.write_whole", killed)
        here.goes_on(f"{run}@6", out=here.folder / "new")
    assert steps(here.folder / "new") == [6]
    with pytest.raises(RecipeError, match="is there and not empty"):
        train_from(str(run), {"out": "new"}, (), say=here.said.append)
    new = here.goes_on(f"{run}@3", "train.max_steps=4", out=here.folder / "new").path
    assert steps(new) == [3, 4]
    assert losses(new) == losses(run)[:4]


def test_a_new_folder_whose_first_process_died_is_not_complete(here: Here, run: Path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("corefit.session.Session._model", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            here.goes_on(f"{run}@3", out=here.folder / "new")
    new = here.goes_on(f"{run}@3", out=here.folder / "new")
    assert not any("complete" in line for line in here.said)
    assert (new.path / "adapter").is_dir()


def test_a_step_of_a_run_can_be_talked_to_and_merged(run: Path, tmp_path: Path):
    best = (run / "checkpoints" / "best").read_text("utf-8").strip()
    texts = {}
    for which in ("3", "latest", "best"):
        done = corefit("chat", f"{run}@{which}", "--prompt", "What is 3?", "--max-tokens", "8", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        texts[which] = done.stdout
    assert texts["latest"] == corefit("chat", run, "--prompt", "What is 3?", "--max-tokens", "8", cwd=tmp_path).stdout
    assert texts["3"] != texts["latest"]
    assert int(best.removeprefix("step-")) in steps(run)
    for target, out in ((run, "a"), (f"{run}@latest", "b"), (f"{run}@3", "c")):
        assert corefit("merge", target, "--out", out, cwd=tmp_path).returncode == 0
    merged = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert merged["a"] == merged["b"] != merged["c"]
    refused = corefit("chat", f"{run}@99", "--prompt", "hi", cwd=tmp_path)
    assert refused.returncode == 2
    assert "no checkpoint 99; steps that are there: 3, 4, 6, " in refused.stderr


def test_a_step_of_full_fine_tuning_can_be_talked_to(here: Here):
    run = here.train("adapter.kind=none", "train.max_steps=2", quantizer="none", out="full").path
    from corefit.chat import find

    found = find("full@latest")
    assert found.adapter is None
    at_step, at_end = load_file(found.folder / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert at_step.keys() == at_end.keys()
    assert all((at_step[name] == at_end[name]).all() for name in at_end)
    merge("full@latest", here.folder / "written")
    with pytest.raises(ModelError, match="full: a model, not an adapter: there is nothing to merge"):
        merge("full", here.folder / "other")
    for asked in ({"template": "chatml"}, {"into": "dequantised"}):
        with pytest.raises(ModelError, match="written as it is: without --template and --base"):
            merge("full@latest", here.folder / "other", **asked)
    names = [path.name for path in sorted((run / "model").iterdir())]
    assert [path.name for path in sorted((here.folder / "written").iterdir())] == names
    for name in names:
        assert (here.folder / "written" / name).read_bytes() == (run / "model" / name).read_bytes(), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_copy_of_a_checkpoint_goes_with_the_chat(run: Path, number: int, tmp_path: Path):
    env = environment({"TMPDIR": str(tmp_path)})
    with subprocess.Popen(
        [sys.executable, "-m", "corefit", "chat", f"{run}@latest"],
        cwd=run.parent, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        while process.stdout.read(1) != ">":
            assert process.poll() is None
        assert list(tmp_path.glob("corefit-*/at"))
        until = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < until:
            process.send_signal(number)  # one that comes just before it waits for a line is seen with the next
            time.sleep(0.2)
        assert process.poll() == -number
    assert not list(tmp_path.glob("corefit-*"))


def test_what_is_no_step_of_a_run_is_not_taken_for_a_name_of_the_hub(run: Path, tmp_path: Path):
    for verb in (["chat", f"{run}@x", "--prompt", "hi"], ["train", "--resume", f"{run}@x"]):
        done = corefit(*verb, cwd=tmp_path)
        assert done.returncode == 2 and f"@x: 'x' is no step of {run}; expected its number" in done.stderr


# ------------------------------------------------------------------------------------------------------- what changed


def test_longer_limits_extend_a_finished_run_and_the_new_curve_is_shown(here: Here, run: Path, straight: Path):
    last = losses(straight)[-1][0]
    here.goes_on(run, "train.epochs=3")
    assert losses(run)[: len(losses(straight))] == losses(straight)
    assert losses(run)[-1][0] > last
    assert here.said[-1].startswith("run: ")
    curve = [line for line in here.said if line.startswith(("extended", "learning rate"))]
    assert "100 % of the run as it was (2 epochs), 67 % as it is now (3 epochs)" in curve[0]
    rate = next(line["lr"] for line in lines(run) if line["step"] == last + 1)
    assert float(curve[1].split(" here, is ")[1].split(",")[0]) == pytest.approx(rate, rel=0.5)
    assert json.loads((run / "ledger.json").read_text("utf-8"))["balanced"] is True
    assert json.loads((run / "run.json").read_text("utf-8"))["resumed"] == [
        {"step": last, "changed": [["train.epochs", "2", "3"]]}
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.lr=1e-4", "train.lr: 0.005 -> 0.0001"),
        ("template.supervise=last", 'template.supervise: "all" -> "last"'),
        ("data.on_bad=skip", 'data.0.on_bad: "error" -> "skip"'),
    ],
)
def test_a_changed_recipe_is_named_and_stops_unless_allowed(here: Here, run: Path, change: str, words: str):
    cut(run, 3)
    with pytest.raises(RecipeError, match="made with something else") as refusal:
        here.goes_on(run, change)
    assert words in str(refusal.value)
    assert str(refusal.value).count("->") == 1, "nothing else differs"
    assert refusal.value.exit_code == 2
    here.goes_on(run, change, allow_changes=True)
    assert any(words in line for line in here.said)


def test_changed_data_is_named_and_stops_and_allowed_begins_at_the_first_record(here: Here, run: Path):
    cut(run, 3)
    recipe = (run / "recipe.toml").read_text("utf-8")
    (run / "recipe.toml").write_text(
        recipe.replace(str(Path(recipe.split('path = "')[1].split('"')[0])), str(here.folder / "rows.jsonl"))
    )
    here.goes_on(run, "train.max_steps=4")  # moved, not changed
    cut(run, 3)
    (here.folder / "rows.jsonl").write_text(ROWS.replace("number", "digits"), "utf-8")  # same size
    with pytest.raises(RecipeError, match="file 0 of data 0: rows.jsonl, .* -> rows.jsonl, "):
        here.goes_on(run)
    (here.folder / "rows.jsonl").write_text(ROWS.replace("number", "numeral"), "utf-8")
    here.goes_on(run, allow_changes=True)
    assert any("the records are read from the first on" in line for line in here.said), here.said
    assert json.loads((run / "ledger.json").read_text("utf-8"))["balanced"] is True


def test_another_base_tokenizer_template_or_plugin_is_named(here: Here, run: Path, tiny_model: Path, monkeypatch):
    cut(run, 3)
    other = here.folder / "other"
    shutil.copytree(tiny_model, other)
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file

    tensors = load(other / "model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="base model: [0-9a-f]{16} -> [0-9a-f]{16}"):
        here.goes_on(run, model=other)
    with pytest.raises(RecipeError, match='template.name: "chatml" -> "internlm_chat"'):
        here.goes_on(run, template="internlm_chat")
    config = json.loads((tiny_model / "tokenizer_config.json").read_text("utf-8"))
    changed = here.folder / "changed"
    shutil.copytree(tiny_model, changed)
    (changed / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ 1 }}"}), "utf-8")
    with pytest.raises(RecipeError, match="tokenizer: [0-9a-f]{16} -> [0-9a-f]{16}"):
        here.goes_on(run, model=changed)
    from corefit import identity

    monkeypatch.setattr(identity, "_code", lambda folder, patterns: "0123456789abcdef")
    with pytest.raises(RecipeError, match=r"code of map function oasst1: \['[0-9a-f]{16}'\] -> \['0123456789abcdef'\]"):
        here.goes_on(run)


@pytest.mark.parametrize(
    "change",
    [
        "pack.max_length=64",
        "pack.overlong=drop",
        "val.share=0.5",
        "train.seed=7",
        "data.shuffle=false",
        "data.first=30",
    ],
)
def test_another_order_or_other_samples_begin_at_the_first_record_where_that_is_allowed(here: Here, run: Path, change):
    cut(run, 3)
    (here.folder / "rows.jsonl").write_text(ROWS, "utf-8")
    here.goes_on(run, change, "train.epochs=1", allow_changes=True)
    ledger = json.loads((run / "ledger.json").read_text("utf-8"))
    assert ledger["balanced"] is True
    if change != "pack.overlong=drop":  # which changes nothing of these rows
        assert any("the records are read from the first on" in line for line in here.said), here.said
        times = {"data.first=30": 30, "data.repeat=2": 80}
        assert ledger["records"]["read"] == times.get(change, 40)  # each as often as it should


def test_killed_before_it_saved_it_goes_on_where_that_is_allowed_again(here: Here, run: Path, monkeypatch):
    cut(run, 3)
    with monkeypatch.context() as patch:
        patch.setattr("corefit.session.train", lambda **_: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            here.goes_on(run, "train.seed=7", "train.epochs=1", allow_changes=True)
    with pytest.raises(RecipeError, match="made with something else: train.seed: 42 -> 7"):
        here.goes_on(run)
    here.goes_on(run, allow_changes=True)
    assert any("the records are read from the first on" in line for line in here.said), here.said
    cut(run, steps(run)[-2])
    here.goes_on(run)
    assert json.loads((run / "ledger.json").read_text("utf-8"))["records"]["read"] == 40


def test_fewer_records_than_were_read_begin_at_the_first(here: Here):
    run = here.train("data.shuffle=false", out=here.folder / "first").path
    cut(run, 3)
    here.goes_on(run, "data.first=3", "train.epochs=1", allow_changes=True)
    assert any("the records are read from the first on" in line for line in here.said), here.said


def test_what_no_hash_sees_is_said_and_allowed_begins_at_the_first_record(here: Here):
    (here.folder / "word.txt").write_text("one", "utf-8")
    code = """
import pathlib

def f(row):
    question, answer = row["text"].split("### Assistant: ")
    answer += pathlib.Path("word.txt").read_text()
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
"""
    (here.folder / "own.py").write_text(code, "utf-8")
    run = here.train("train.max_steps=4", plugin="own.py:f", out=here.folder / "run").path
    (here.folder / "word.txt").write_text("two and more", "utf-8")
    words = "a map function doesn't give the same twice; --allow-changes goes on, with the records from the first on"
    with pytest.raises(CorefitError, match=words):
        here.goes_on(run, "train.max_steps=6")
    here.goes_on(run, "train.max_steps=6", allow_changes=True)
    assert [line for line in here.said if "so the records are read from the first on" in line]


def test_rows_that_were_added_are_not_mixed_into_the_old_order(here: Here, run: Path, straight: Path):
    cut(run, 3)
    data = next(straight.parent.glob("rows.jsonl"))
    before = data.read_bytes()
    try:
        with data.open("a", encoding="utf-8") as file:
            file.write(ROWS.replace("What", "Which"))
        here.goes_on(run, "train.epochs=1", allow_changes=True)
    finally:
        data.write_bytes(before)
    assert any("the records are read from the first on" in line for line in here.said), here.said
    assert json.loads((run / "ledger.json").read_text("utf-8"))["records"]["read"] == 80


@pytest.mark.parametrize("change", ["train.weight_decay=50.0", "train.betas=[0.1, 0.2]", "train.lr_mult={lora_B=4.0}"])
def test_what_may_change_of_the_optimizer_counts_from_then_on(here: Here, run: Path, straight: Path, change: str):
    cut(run, 3)
    here.goes_on(run, change, allow_changes=True)
    assert weights(run) != weights(straight)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_32bit"])
def test_another_optimizer_begins_its_averages_anew_and_says_so(here: Here, run: Path, optimizer: str):
    cut(run, 3)
    here.goes_on(run, f"train.optimizer={optimizer}", allow_changes=True)
    assert any("has other state than AdamW left, so its averages begin anew" in line for line in here.said)
    cut(run, 6)
    here.goes_on(run, "train.optimizer=adamw", allow_changes=True)
    assert any(line.startswith("optimizer: AdamW has other state than ") for line in here.said)


def test_a_signal_before_step_1_ends_the_run_without_validation(here: Here, monkeypatch: pytest.MonkeyPatch):
    from corefit.interrupts import Interrupts

    monkeypatch.setattr(Interrupts, "__init__", lambda self, say, own_process=False: setattr(self, "_received", 2))
    monkeypatch.setattr(Interrupts, "__enter__", lambda self: self)
    monkeypatch.setattr(Interrupts, "__exit__", lambda *_: None)
    done = here.train(out=here.folder / "stopped")
    assert done.exit_code == 130 and not lines(done.path) and here.said[-1].startswith("SIGINT: stopped before step 1")
    assert json.loads((done.path / "run.json").read_text("utf-8"))["status"] == "interrupted"


def test_another_adapter_is_refused_even_if_changes_are_allowed(here: Here, run: Path):
    cut(run, 3)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(RecipeError, match=r"holds \(4, .*made with another \[adapter\]"):
        here.goes_on(run, "adapter.r=8", allow_changes=True)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_run_that_is_beyond_its_new_end_ends_where_it_is(here: Here, run: Path):
    here.goes_on(run, "train.max_steps=3")
    assert any("the run is beyond that" in line for line in here.said)
    assert not any(line.startswith(("extended", "learning rate")) for line in here.said)
    assert json.loads((run / "run.json").read_text("utf-8"))["status"] == "complete"


def test_standard_input_is_read_once_and_resumed_from_its_copy(tmp_path: Path, tiny_model: Path):
    command = ["train", "--plugin", "oasst1", "--template", "chatml", "--model", tiny_model, "--data", "-"]
    command += ["--out", "run", "--resume", "--set", *SETS]
    assert corefit(*command, "train.max_steps=4", cwd=tmp_path, input=ROWS).returncode == 0
    cut(tmp_path / "run", 3)
    again = corefit(*command, "train.max_steps=4", cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert again.returncode == 0, again.stderr
    assert "from step 3" in again.stdout


# ------------------------------------------------------------------------------------------------ checkpoints, the disk


def test_newest_and_best_checkpoints_are_kept_and_their_cost_is_in_the_metrics(here: Here, monkeypatch):
    real, validations = evaluate.validation_loss, itertools.count()

    def worse_in_the_end(*given: Any, **named: Any) -> tuple[float, int]:
        nats, tokens = real(*given, **named)
        return nats * (1 if next(validations) < 12 else 2), tokens

    monkeypatch.setattr(evaluate, "validation_loss", worse_in_the_end)
    run = here.train("checkpoint.keep=1", "checkpoint.keep_best=true", "val.every_steps=1", out="run").path
    validated = [line for line in lines(run) if "val_loss" in line and line["step"]]
    lowest = min(validated, key=lambda line: line["val_loss"])["step"]
    assert (run / "checkpoints" / "best").read_text("utf-8") == f"{checkpoint.name_of(lowest)}\n"
    last = losses(run)[-1][0]
    assert lowest < 12 < last
    assert steps(run) == sorted({lowest, last})
    saves = [line for line in lines(run) if "save_bytes" in line]
    size = sum(p.stat().st_size for p in (run / "checkpoints" / checkpoint.name_of(last)).iterdir())
    assert saves[-1]["step"] == last
    assert saves[-1]["save_bytes"] == size
    assert all(0 < line["save_seconds"] < 60 for line in saves)


def test_a_checkpoint_that_cant_be_written_is_said_and_the_run_goes_on(here: Here, monkeypatch, capsys):
    real = checkpoint.write_tensors

    def full(path: Path, *more: Any) -> None:
        if "step-00000006" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *more)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    run = here.train("checkpoint.every_steps=3", out="run").path
    assert run.joinpath("run.json").read_text("utf-8").count('"complete"') == 1
    assert 6 not in steps(run)
    assert 3 in steps(run)
    assert (
        "step-00000006: not saved: [Errno 28] No space left on device; earlier checkpoints are whole"
        in capsys.readouterr().err
    )
    assert [line["step"] for line in lines(run) if "save_error" in line] == [6]


def test_metrics_that_the_disk_refuses_are_written_later(here: Here, monkeypatch, capsys):
    from corefit.report import JsonLines

    real, refused = JsonLines._flush, []

    def flush(self: JsonLines) -> None:
        if self.path.name == "metrics.jsonl" and b'"step": 5' in self._unwritten and len(refused) < 4:
            refused.append(1)
            self._file.write(self._unwritten[:7])  # a part of it, then the disk is full
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self)

    monkeypatch.setattr(JsonLines, "_flush", flush)
    run = here.train("checkpoint.every_steps=100", out="run").path
    numbers = [step for step, _ in losses(run)]
    assert numbers == list(range(1, len(numbers) + 1)), "no line is lost, none is torn"
    assert len(refused) == 4
    assert capsys.readouterr().err.count("metrics.jsonl: can't be written: no space left on device") == 1


def test_weights_that_cant_be_exported_fail_the_run_and_resume_writes_them(here: Here, straight: Path, monkeypatch):
    from corefit.engine import export

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_tensors", full)
        with pytest.raises(RunError, match="adapter: can't be written: .*--resume goes on") as failure:
            here.train("checkpoint.keep_best=true", out="run")
    assert failure.value.exit_code == 1
    assert json.loads(Path("run/run.json").read_text("utf-8"))["status"] == "failed"
    here.goes_on("run")
    assert weights(Path("run")) == weights(straight)


def test_what_was_looked_at_before_the_last_save_is_not_looked_at_again(here: Here, monkeypatch):
    from corefit.engine import export

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RunError):
        patch.setattr(export, "write_tensors", full)
        here.train("train.max_steps=4", "sample.every_steps=4", out="run")  # validated, sampled and saved at step 4
    here.goes_on("run")
    assert [line["step"] for line in lines(Path("run")) if "val_loss" in line] == [0, 4]
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text("utf-8").splitlines()]
    assert len({(line["step"], line["prompt"]) for line in samples}) == len(samples) > 0


def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(here: Here, run: Path, straight: Path):
    cut(run, 6)
    path = run / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    here.goes_on(run)
    assert any("step-00000006: torn: optimizer.safetensors is not what was written" in line for line in here.said)
    assert any("from step 4 " in line for line in here.said)
    assert weights(run) == weights(straight)


def test_a_broken_run_json_is_no_traceback_and_can_be_gone_past(here: Here, run: Path, straight: Path):
    cut(run, 3)
    (run / "run.json").write_text('{"identity": {', "utf-8")
    with pytest.raises(RecipeError, match="run.json: broken, .*--allow-changes goes on"):
        here.goes_on(run)
    here.goes_on(run, allow_changes=True)
    assert weights(run) == weights(straight)


def test_a_refused_run_gives_its_folder_back(here: Here, run: Path, straight: Path, monkeypatch):
    cut(run, 3)

    def torn(path: Path, **more: bool) -> None:
        raise CheckpointError("torn")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="torn"):
        patch.setattr(checkpoint, "load", torn)
        here.goes_on(run)
    here.goes_on(run)
    assert weights(run) == weights(straight)


def test_a_recipe_with_brackets_in_its_name_finds_its_run(here: Here):
    Path("my[1].toml").write_text("[train]\nmax_steps = 2\n", "utf-8")
    sets = ("pack.max_length=128", "run.threads=1", "run.device=cpu", "val.records=0", "sample.max_tokens=4")
    first = here.train(*sets, recipe="my[1].toml", resume=True)
    assert here.train(*sets, recipe="my[1].toml", resume=True).path == first.path
    assert any("is complete: nothing to do" in line for line in here.said)


def test_validation_records_without_a_sample_are_refused(here: Here):
    Path("val.jsonl").write_text('{"text": "### Human: only a question"}\n', "utf-8")
    with pytest.raises(DataError, match="val.data: no sample with a supervised token in 1 records"):
        here.train("val.data=val.jsonl", "train.max_steps=1", out="run")
    here.train("val.data=val.jsonl", "val.records=0", "train.max_steps=1", out="run")


def test_what_goes_by_the_validation_says_where_there_is_none(here: Here):
    here.train("val.records=0", "val.patience=2", "checkpoint.keep_best=true", "train.max_steps=1", out="a")
    line = "checkpoint.keep_best and val.patience: nothing to go by, since there is no validation"
    assert line in here.said
    sets = [*(key for key in SETS if "val." not in key), "val.patience=2", "train.max_steps=1"]
    train_from(None, {**here.flags, "out": "b"}, sets, say=here.said.append)
    assert [said for said in here.said if said.startswith("val.patience: nothing to go by but the end")]
    here.train("val.patience=2", "train.max_steps=1", out="c")
    assert not [said for said in here.said if "nothing to go by" in said]


def test_validation_files_of_another_kind_are_read_by_their_suffix(here: Here):
    Path("val.csv").write_text("text\n### Human: hi### Assistant: yo\n", "utf-8")
    run = here.train("val.data=val.csv", "train.max_steps=1", out="run")
    assert any("val_loss" in row for row in run.metrics) and "validation: 1 records, 1 samples" in here.said


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_run_folder_that_goes_meanwhile_is_begun_anew_with_a_word(here: Here, monkeypatch, capsys, how: str):
    validate = Session._validate

    def vanishing(self: Session, step: int) -> None:
        validate(self, step)
        if step == 4:
            shutil.rmtree(self.folder) if how == "removed" else self.folder.rename("elsewhere")

    monkeypatch.setattr(Session, "_validate", vanishing)
    run = here.train(out="run").path
    assert "run: removed while the run wrote to it; what was in it is gone, the run goes on" in capsys.readouterr().err
    assert [row["step"] for row in Run(run).metrics if "loss" in row][0] > 4 and Run(run).ledger["balanced"]
    assert (run / "recipe.toml").is_file() and Run(run).chat("hi", max_tokens=2) is not None
    assert json.loads((run / "run.json").read_text("utf-8"))["status"] == "complete"
    monkeypatch.undo()
    monkeypatch.chdir(here.folder)
    here.goes_on(run, "train.epochs=3")


def test_a_recipe_that_goes_meanwhile_costs_nothing_and_a_disk_that_refuses_ends_nothing(
    here: Here, monkeypatch, capsys
):
    validate, write = Session._validate, Session._write_files

    def vanishing(self: Session, step: int) -> None:
        validate(self, step)
        if step == 4:
            (self.folder / "recipe.toml").unlink() if self.folder.name == "a" else shutil.rmtree(self.folder)

    def refused(self: Session) -> None:
        if self.state.step:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self)

    monkeypatch.setattr(Session, "_validate", vanishing)
    run = here.train(out="a")
    assert [row["step"] for row in run.metrics if "loss" in row][0] == 1
    monkeypatch.setattr(Session, "_write_files", refused)
    done = here.train(out="b")
    assert "b: can't be begun anew: [Errno 28]" in capsys.readouterr().err
    assert done.exit_code == 0 and (done.path / "adapter").is_dir() and (done.path / "checkpoints").is_dir()


def test_a_folder_that_was_begun_anew_is_locked(here: Here, monkeypatch):
    validate, seen = Session._validate, list[bool | None]()

    def vanishing(self: Session, step: int) -> None:
        validate(self, step)
        if step == 4:
            self.folder.rename("elsewhere")
        elif step == 8:
            seen.append(durable.held(self.folder))

    monkeypatch.setattr(Session, "_validate", vanishing)
    here.train(out="run")
    assert seen == [True] and not durable.held(Path("run"))


def test_full_fine_tuning_that_stopped_at_its_end_is_exported_again(here: Here, tiny_model: Path, monkeypatch):
    base = here.folder / "base"
    shutil.copytree(tiny_model, base)
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    here.flags["model"] = str(base)
    export, sets = Session._export, ("adapter.kind=none", "model.quantizer=none", "train.max_steps=4")

    def once(self: Session) -> None:
        monkeypatch.setattr(Session, "_export", export)
        raise RunError("no")

    monkeypatch.setattr(Session, "_export", once)
    with pytest.raises(RunError, match="^no$"):
        here.train(*sets, out="run")
    here.goes_on("run")
    assert [line for line in here.said if line.startswith("model/: written in bfloat16") and " in training" in line]


def test_a_place_that_cant_be_written_or_is_in_use_is_known_before_a_model_is_loaded(
    here: Here, run: Path, monkeypatch
):
    monkeypatch.setattr("corefit.session.Session.__init__", lambda *_, **more: pytest.fail("began to load"))
    handle = durable.claim(run)
    try:
        with pytest.raises(RecipeError, match="another process is training in it"):
            here.goes_on(run, "train.epochs=3")
    finally:
        os.close(handle)
    Path("file").write_text("", "utf-8")
    for place in ("file/run", "/proc/run", "a" * 300):
        with pytest.raises(RecipeError, match="run.out: .*: can't be written: "):
            here.train(out=place)
    with pytest.raises(BaseException, match="began to load"):
        here.train(out="new/run")
    assert not Path("new").exists()


def test_two_processes_never_train_in_one_folder(here: Here, run: Path):
    cut(run, 3)
    code = f"""
import pathlib, time
from corefit.durable import claim
print(claim(pathlib.Path({str(run)!r})), flush=True)
time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment())
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RecipeError, match="another process is training in it"):
            here.goes_on(run)
    finally:
        other.kill()
        other.communicate()
    here.goes_on(run)


# ------------------------------------------------------------------------------------------------------------- signals


def begun(folder: Path, tiny_model: Path, **how: Any) -> subprocess.Popen[bytes]:
    """Start a long run as a process and wait for its first step."""
    (folder / "rows.jsonl").write_text(ROWS, "utf-8")
    command = ["train", "--plugin", "oasst1", "--template", "chatml", "--model", tiny_model, "--data", "rows.jsonl"]
    command += ["--out", "run", "--set", *SETS, "train.epochs=0", "train.max_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "corefit", *map(str, command)], cwd=folder, env=environment(), **how
    )
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and '"grad_norm"' in metrics.read_text("utf-8")):
        assert process.poll() is None
        time.sleep(0.05)
    return process


def test_a_terminal_that_goes_away_ends_the_run_saved(tmp_path: Path, tiny_model: Path):
    main, side = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        import fcntl
        import termios

        fcntl.ioctl(side, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

    process = begun(tmp_path, tiny_model, stdin=side, stdout=side, stderr=side, preexec_fn=own_terminal)
    os.close(side)
    os.close(main)  # the window is closed
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    last = losses(tmp_path / "run")[-1][0]
    assert steps(tmp_path / "run")[-1] == last
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["status"] == "interrupted"
    assert weights(tmp_path / "run")


def test_a_hang_up_that_the_user_ignores_ends_nothing(tmp_path: Path, tiny_model: Path):
    ignoring = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731, as nohup does
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=ignoring)
    process = begun(tmp_path, tiny_model, **quiet)
    os.kill(process.pid, signal.SIGHUP)
    before = len(losses(tmp_path / "run"))
    while len(losses(tmp_path / "run")) < before + 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()


@pytest.mark.parametrize("own_process", [True, False])
def test_a_second_ctrl_c_ends_at_once_even_inside_a_long_call_but_never_somebody_elses_program(own_process: bool):
    code = f"""
import hashlib, sys, time
from corefit.interrupts import Interrupts
with Interrupts(print, own_process={own_process}) as interrupts:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 5_000_000)  # one call into C, as a backward pass is
    print("done", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
    out, _ = process.communicate(timeout=60)
    assert ("done" in out) == (not own_process)
    assert process.returncode == (130 if own_process else 0), "two signals in one call are one to Python"


@pytest.mark.parametrize(("of_torchrun", "own_process", "code"), [(1, 1, 0), (1, 0, -15), (0, 1, -15)])
def test_a_rank_that_failed_says_so_also_where_torchrun_ends_it_meanwhile(
    of_torchrun: int, own_process: int, code: int
):
    script = f"""
import os, signal
from corefit.interrupts import Interrupts
try:
    with Interrupts(print, own_process=bool({own_process})):
        raise OSError("another rank is gone")
except OSError as error:
    os.kill(os.getpid(), signal.SIGTERM)
    print(error)
"""
    env = environment({"TORCHELASTIC_RUN_ID": "none"} if of_torchrun else {})
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("" if code else "another rank is gone\n", code), done.stderr


@pytest.mark.skipif(not (sys.platform == "linux" and shutil.which("cc")), reason="a library is compiled and preloaded")
def test_a_signal_that_c_code_handles_is_left_to_it(tmp_path: Path):
    handler = "static void handler(int number) { (void)number; }"
    begin = "__attribute__((constructor)) static void begin(void) { signal(SIGTERM, handler); }"
    (tmp_path / "host.c").write_text(f"#include <signal.h>\n{handler}\n{begin}\n", "utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "host.so", "host.c"], cwd=tmp_path, check=True)
    code = "from corefit.interrupts import Interrupts\nwith Interrupts(print): pass\nprint('done')"
    env = environment({"LD_PRELOAD": str(tmp_path / "host.so")})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


# ----------------------------------------------------------------------------------------------- within a program


def test_the_collector_of_garbage_is_afterwards_what_the_program_set(here: Here):
    before = gc.get_threshold()
    gc.set_threshold(12_345, 6, 7)
    try:
        here.train("train.max_steps=1", out="one")
        assert gc.get_threshold() == (12_345, 6, 7)
        assert main(["runs", "nowhere"]) == 2
        assert gc.get_threshold() == (12_345, 6, 7)
    finally:
        gc.set_threshold(*before)


def test_runs_of_one_program_leave_no_model_in_memory(here: Here):
    def models() -> int:
        return sum(type(thing).__name__ == "LlamaForCausalLM" for thing in gc.get_objects())

    gc.collect()
    before = models()
    gc.disable()  # as in a program that is large: a whole collection is rare
    try:
        train(
            model=here.flags["model"], data=here.flags["data"], sets=[*SETS, "train.max_steps=1"], say=here.said.append
        )
        assert models() == before
    finally:
        gc.enable()


def test_a_run_goes_on_by_its_path(run: Path):
    with pytest.raises(RecipeError, match="no run there"):
        train(resume=run / "nowhere")
    said: list[str] = []
    assert train(resume=run, say=said.append).path == run
    assert said[-1] == f"{run} is complete: nothing to do"


def test_a_program_without_a_terminal_trains(here: Here, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert train_from(None, {**here.flags, "out": "run"}, [*SETS, "train.max_steps=1"]).exit_code == 0


def test_a_folder_in_which_another_process_began_meanwhile_is_left_alone(here: Here, run: Path):
    shutil.move(run, "other")
    metrics = Path("other/metrics.jsonl").read_bytes()

    def say(line: str) -> None:  # the other process begins, and ends, while this one loads its model
        if line.startswith("isolation"):
            shutil.move("other", run)

    with pytest.raises(RecipeError, match="another process began a run in it meanwhile"):
        train_from(None, {**here.flags, "out": str(run)}, SETS, say=say)
    assert (run / "metrics.jsonl").read_bytes() == metrics


# -------------------------------------------------------------------------------------------- from another's adapter


def test_a_new_run_starts_from_an_adapter_and_takes_its_settings(here: Here, run: Path):
    sets = [s for s in SETS if not s.startswith("adapter")]
    flags = dict(here.flags)
    start = f"adapter.start={run / 'adapter'}"
    new = train_from(None, {**flags, "out": "new"}, [*sets, start, "train.max_steps=1"], say=here.said.append).path
    first = next(line["val_loss"] for line in lines(new) if "val_loss" in line)
    assert first == [line["val_loss"] for line in lines(run) if "val_loss" in line][-1]
    assert "r = 4" in (new / "recipe.toml").read_text("utf-8")
    assert train_from("new", {"out": "again"}, (), say=here.said.append).path.is_dir(), "the written recipe runs again"
    with pytest.raises(RecipeError, match=r"--set adapter.r=8: adapter.r is 8, the adapter in adapter.start has 4"):
        train_from(None, flags, [*sets, start, "adapter.r=8"], say=here.said.append)
    config = run / "adapter" / "adapter_config.json"
    for change, words in (
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ):
        before = config.read_text("utf-8")
        config.write_text(json.dumps({**json.loads(before), **change}), "utf-8")
        with pytest.raises(CorefitError, match=f"adapter.start: .*{words}: not a LoRA adapter"):
            train_from(None, flags, [*sets, start], say=here.said.append)
        config.write_text(before, "utf-8")
    with pytest.raises(CorefitError, match="adapter.start: .*adapter_config.json: not there, or broken"):
        train_from(None, flags, [*sets, "adapter.start=nowhere"], say=here.said.append)
