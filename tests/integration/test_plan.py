"""``corefit plan``, ``train.micro_batch=auto``, and going on after memory ran out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli import corefit
from safetensors.torch import load_file
from test_resume import ROWS, Here

from corefit import plan
from corefit.engine import loop, memory
from corefit.errors import RunError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.chdir(tmp_path)
    return Here(tmp_path, tiny_model)


# ----------------------------------------------------------------------------------------------------------- the verb


def test_it_says_term_by_term_what_a_run_takes(tmp_path: Path, tiny_model: Path) -> None:
    flags = ["--model", tiny_model, "--quantizer", "none", "--set", "run.device=cpu", "train.precision=fp32"]
    done = corefit("plan", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    terms = {m[1]: float(m[2]) for line in lines if (m := re.match(r"  (\S.*?)  +([\d.,]+) MiB$", line))}
    assert list(terms) == [
        "process and libraries", "base weights", "adapter weights", "optimizer state", "activations", "loss",
        "gradients",
        "free in the heap", "the most, at the loss",
    ]  # fmt: skip
    assert sum(list(terms.values())[:-1]) == pytest.approx(terms["the most, at the loss"], abs=4)
    assert "fits up to train.micro_batch=16" in done.stdout
    assert re.search(r"time: at least [\d.]+ s a step of 16 packs", done.stdout)
    assert list(tmp_path.iterdir()) == [], "it wrote something"


def test_what_does_not_fit_says_what_to_change(tmp_path: Path) -> None:
    done = corefit("plan", "--model", "Qwen/Qwen2.5-7B-Instruct", "--gpu", "8GB", "--quantizer", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a GPU of 8 GB: 8.00 GiB, of which 10% stay free: does not fit as it is" in done.stdout
    assert "what needs less: --set model.quantizer=nf4 (" in done.stdout


def test_without_a_model_it_lists_what_of_the_zoo_fits(tmp_path: Path) -> None:
    small, large = (corefit("plan", "--gpu", gpu, cwd=tmp_path).stdout.splitlines() for gpu in ("24GB", "h100"))

    def lengths(lines: list[str]) -> dict[str, list[int]]:
        rows = [line.split() for line in lines if line.split()[0] in plan.SIZES]
        return {row[0]: [int(cell.replace(",", "")) if cell != "-" else 0 for cell in row[2:]] for row in rows}

    few, many = lengths(small), lengths(large)
    assert few.keys() == many.keys() == plan.SIZES.keys()
    assert all(a <= b for name in few for a, b in zip(few[name], many[name], strict=True))
    assert few["Qwen/Qwen2.5-72B"] == [0, 0, 0]
    assert few["mistralai/Mistral-7B"][0] >= few["mistralai/Mistral-7B"][1] >= few["mistralai/Mistral-7B"][2] == 0
    assert "SmolLM2-135M" in small[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "rtx409"], "--gpu: no card 'rtx409'; did you mean 'rtx4090'?"),
        (["--gpu", "24GB", "--probe"], "--probe runs on what is here"),
        (["--model", "nowhere/", "--gpu", "24GB"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    done = corefit("plan", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_probe_times_real_steps_and_leaves_nothing(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS, "utf-8")
    flags = ["--plugin", "oasst1", "--template", "chatml", "--model", tiny_model, "--data", "rows.jsonl"]
    sets = ["pack.max_length=128", "train.packs_per_step=2", "run.device=cpu", "train.max_steps=1000"]
    sets += ["train.micro_batch=auto", "train.epochs=0"]
    done = corefit("plan", *flags, "--probe", "--set", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"probe: 3 real steps took [\d., e-]+ s; the most memory was [\d.,]+ [GM]iB", done.stdout)
    assert re.search(r"time: .* for 1,000 steps; started now, it ends at 20\d\d-\d\d-\d\d \d\d:\d\d", done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# ---------------------------------------------------------------------------------------------- train.micro_batch=auto


def test_auto_takes_what_fits_and_a_resumed_run_keeps_it(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "room_on", lambda device: 10**13)
    tried = []
    real = loop.try_out

    def try_out(loss_fn, rows, *args, **more) -> bool:
        tried.append(rows)
        return rows <= 4 and real(loss_fn, rows, *args, **more)

    monkeypatch.setattr("corefit.session.try_out", try_out)
    auto, sets = "train.micro_batch=auto", ("train.packs_per_step=8", "train.scheduler=constant", "train.warmup=0.0")
    run = here.train(auto, *sets, "train.max_steps=1", out=here.folder / "run").path
    assert any("micro-batch: 8 packs (auto)" in line for line in here.said)
    assert any("micro-batch: no memory for 8 packs, tried" in line for line in here.said)
    assert tried == [8, 4]
    assert "micro_batch = 4" in (run / "recipe.toml").read_text("utf-8")
    here.train(auto, *sets, "train.max_steps=3", out=run, resume=True)
    assert tried == [8, 4], "it was tried again"
    assert "micro_batch = 4" in (run / "recipe.toml").read_text("utf-8")
    other = here.train("train.micro_batch=4", *sets, "train.max_steps=3", out=here.folder / "other").path
    assert_equal(run, other, 0.0)


def test_auto_trains_with_one_pack_where_nothing_fits_by_the_estimate(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "room_on", lambda device: 1)
    run = here.train("train.micro_batch=auto", "train.max_steps=1", out=here.folder / "run").path
    assert any("micro-batch: 1 packs (auto)" in line and "may not be enough" in line for line in here.said)
    assert "micro_batch = 1" in (run / "recipe.toml").read_text("utf-8")


# ------------------------------------------------------------------------------------------------------- out of memory


def assert_equal(one: Path, other: Path, most: float) -> None:
    a, b = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, other))
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= most
    assert any(float(a[name].abs().max()) > 1e-3 for name in a if "lora_B" in name), "nothing was trained"


@pytest.mark.parametrize("smaller", ["train.micro_batch=1", "train.gradient_checkpointing=true"])
def test_a_run_without_memory_goes_on_at_that_step_with_less(
    smaller: str, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("adapter.dropout=0.0", "train.micro_batch=2", "train.packs_per_step=4", "checkpoint.every_steps=0")
    sets += ("train.max_steps=6", "train.precision=fp32")
    straight = here.train(*sets, out=here.folder / "straight").path
    calls, real = [0], loop.nats

    def nats(*args):
        calls[0] += 1
        if calls[0] == 8:  # the second micro-batch of step 4
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*args)

    run = here.folder / "run"
    with monkeypatch.context() as full, pytest.raises(RunError) as failed:
        full.setattr(loop, "nats", nats)
        here.train(*sets, out=run)
    said = str(failed.value)
    assert re.match(
        r"step 4: out of memory with 2 packs of \d+ slots: what grew most is (loss|activations), to about \d+ MiB; ",
        said,
    )
    assert "--set train.micro_batch=1 (" in said
    assert "train.gradient_checkpointing=true (" in said
    assert said.endswith("--resume goes on at it")
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000003"]
    here.train(*[*sets, smaller], out=run, resume=True)
    assert any(line.startswith("resume: from step 3") for line in here.said)
    assert_equal(straight, run, 1e-6)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------------------------------------------ against reality


def measure(out: Path, *words: object) -> list[tuple[str, float, float]]:
    """What benchmarks/plan.py finds: setting, MiB by arithmetic, MiB by the run."""
    command = [sys.executable, ROOT / "benchmarks" / "plan.py", "--out", out, *words]
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [(row["setting"], row["planned MiB"], row["measured MiB"]) for row in json.loads(out.read_text())["rows"]]


@pytest.mark.full
@pytest.mark.measured
@pytest.mark.skipif(sys.platform != "linux", reason="measured where glibc gives memory back")
def test_what_is_planned_is_what_a_small_run_takes(tmp_path: Path, shared: Path) -> None:
    for setting, planned, measured in measure(tmp_path / "plan.json", "--quick"):
        assert planned == pytest.approx(measured, rel=0.2), setting


@pytest.mark.full
@pytest.mark.measured
def test_what_is_planned_is_what_the_real_model_takes(tmp_path: Path, shared: Path) -> None:
    pytest.importorskip("gguf")
    model = tmp_path / "smollm2"
    subprocess.run([sys.executable, str(shared / "real" / "make_smollm2.py"), str(model)], check=True)
    rows = measure(tmp_path / "plan.json", "--model", model)
    assert len(rows) == 6
    for setting, planned, measured in rows:
        assert planned == pytest.approx(measured, rel=0.1), setting
