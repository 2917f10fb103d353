"""Values that are not finite, through the real command line: what is said, what is written, what stays."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import corefit
from safetensors.torch import load_file, save_file

from corefit.cli import main
from corefit.engine.checkpoint import steps_in, torn

BAD_LINE, TOKEN = 37, "~"
"""The one record that holds this character, which is one token of its own."""
SMALL = [
    *("pack.max_length=128", "train.packs_per_step=2", "adapter.r=4", "pack.held=16", "run.threads=1"),
    *("val.records=0", "sample.max_tokens=2", "run.device=cpu"),
]


def rows(folder: Path) -> list[object]:
    texts = [
        f"### Human: What is {i}?### Assistant: It is number {i}, {'really ' * (i % 7)}so{TOKEN * (i == BAD_LINE)}."
        for i in range(1, 61)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return ["train", "--plugin", "oasst1", "--template", "chatml", "--data", "rows.jsonl", "--out", "run", "--model"]


def changed(model: Path, folder: Path, name: str, change: Any) -> Path:
    """Copy a model folder; ``change`` gets the weight of this name to change in place."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def token_id(model: Path, text: str) -> int:
    vocabulary: dict[str, int] = json.loads((model / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return vocabulary[text]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_base_with_a_nan_is_refused_at_the_start_and_its_layer_named(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "model.layers.1.mlp.down_proj"
    bad = changed(tiny_model, tmp_path / "bad", f"{name}.weight", lambda weight: weight[3].fill_(float("nan")))
    assert main([*map(str, rows(tmp_path)), str(bad), "--set", *SMALL]) == 1
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert f"first in {name}, forward (itself not finite: {name}.weight)" in said
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_names_layer_and_record_and_leaves_the_last_good_weights(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil = token_id(tiny_model, TOKEN)
    name = "model.embed_tokens"
    bad = changed(tiny_model, tmp_path / "bad", f"{name}.weight", lambda weight: weight[spoil, 5].fill_(float("nan")))
    command = [*rows(tmp_path), bad, "--quantizer", "nf4", "--set", *SMALL, "checkpoint.every_steps=2"]
    command += ["data.shuffle=false", "train.gradient_checkpointing=true", "sample.prompts=['hi']"]
    done = corefit(*command, cwd=tmp_path)
    run = tmp_path / "run"
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stderr.strip().splitlines()[-1]
    report = json.loads((run / "nonfinite.json").read_text("utf-8"))
    step, record = report["step"], f"{tmp_path / 'rows.jsonl'}:{BAD_LINE}"
    assert step > 4
    assert f"step {step}: the loss is not finite (loss scale 1): first in {name}, forward" in said
    assert f", for {record}; " in said
    assert (report["records"], report["first"]["weights"]) == ([record], [f"{name}.weight"])
    assert [entry["step"] for entry in report["scales"]] == list(range(1, step + 1))
    assert json.loads((run / "run.json").read_text("utf-8"))["status"] == "failed"
    steps = [line for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, step)), "the step is not counted"
    assert all(line["loss"] is not None for line in steps)
    saved = steps_in(run / "checkpoints")
    assert [torn(path) for path in saved] == [None, None]
    assert saved[-1].name == f"step-{step - 1:08d}"
    for path in saved:
        assert all(torch.isfinite(t).all() for t in load_file(path / "trainable.safetensors").values())
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, command), "--resume"]) == 1
    again = capsys.readouterr()
    assert f"resume: from step {step - 1} " in again.out
    assert again.err.strip().splitlines()[-1] == said, "a resume meets the same step"


def test_gradients_that_overflow_float16_halve_the_scale_and_their_steps_are_counted(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Real fp16 on a CPU: the head is so large that gradients times 65536 are beyond 65504."""
    base = changed(tiny_model, tmp_path / "large", "lm_head.weight", lambda weight: weight.mul_(512))
    more = ["train.precision=fp16", "train.max_steps=8", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    done = corefit(*rows(tmp_path), base, "--set", *SMALL, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    steps = [line for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    skipped = [line for line in steps if line["skipped"]]
    n, scale = len(skipped), 65536.0
    assert 2 <= n <= 6, "some overflow, some don't"
    for line in steps:
        assert line["loss_scale"] == scale
        assert line["cause"] == ("non_finite_gradients" if line["skipped"] else None)
        assert (line["grad_norm"] is None) == line["skipped"]
        assert line["loss"] > 0
        scale = scale / 2 if line["skipped"] else scale
    assert all(a["progress"] < b["progress"] and a["epoch"] < b["epoch"] for a, b in pairwise(steps)), (
        "data is consumed"
    )
    said = done.stderr.splitlines()
    assert any(line.startswith("step 1: skipped (non_finite_gradients at loss scale 65536), ") for line in said)
    assert f"{n} steps skipped: {n} non_finite_gradients" in done.stdout
    assert json.loads((run / "ledger.json").read_text("utf-8"))["balanced"] is True
    saved = steps_in(run / "checkpoints")
    for line, (before, after) in zip(steps[1:], pairwise(saved), strict=True):
        for name in ("trainable.safetensors", "optimizer.safetensors"):
            assert ((before / name).read_bytes() == (after / name).read_bytes()) == line["skipped"], (line, name)
        state = json.loads((after / "state.json").read_text("utf-8"))
        assert state["scaler"]["scale"] == line["loss_scale"] / (2 if line["skipped"] else 1)
    assert state["loop"]["skipped"] == {"non_finite_gradients": n}
