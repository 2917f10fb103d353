"""A model whose weights are divided among processes (FSDP2, over gloo): equal to one process, in all that a run does."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli import environment
from safetensors.numpy import load_file
from test_ranks import flags, killed, said, same, steps, together  # noqa: F401, a fixture among them


def of(kind: str, flags: list[str]) -> list[str]:  # noqa: F811
    """Flags for an adapter on a base stored as ``kind``, or for full fine-tuning."""
    more = ["sample.every_steps=5", "sample.max_tokens=5", "checkpoint.every_steps=6", "run.sharding=full"]
    quantizer = "none" if kind == "full" else kind
    return ["--quantizer", quantizer, *flags, *more, *["adapter.kind=none"] * (kind == "full")]


def answers(run: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in (run / "samples.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["none", "nf4", "full"])
def test_shares_of_a_model_are_the_model(kind: str, flags: list[str], tmp_path: Path) -> None:  # noqa: F811
    how = of(kind, flags)
    assert together(1, ["--out", "one", *how], tmp_path) == [0], said(tmp_path)
    assert "sharding: off, one process holds the whole model" in said(tmp_path)
    how += ["train.gradient_checkpointing=true"]
    assert together(2, ["--out", "two", *how], tmp_path) == [0, 0], said(tmp_path) + said(tmp_path, 1)
    one, two = tmp_path / "one", tmp_path / "two"
    mine, all_ = map(float, re.findall(r"sharding: full: a rank holds (\S+) of the base's (\S+) MiB", said(tmp_path))[0])
    assert mine / all_ == pytest.approx(0.5, abs=0.03)
    same(one, two)
    assert answers(one) == answers(two)
    kept = [sorted((run / "checkpoints").glob("*/*r*.safetensors")) for run in (one, two)]
    assert [path.relative_to(one) for path in kept[0]] == [path.relative_to(two) for path in kept[1]]
    for a, b in zip(*kept, strict=True):
        if a.name != "rng.safetensors":
            before, after = load_file(a), load_file(b)
            assert before.keys() == after.keys()
            assert max(abs(before[name] - after[name]).max() for name in before) <= 1e-6, a


def test_two_then_one_then_two_shares_are_the_straight_run(flags: list[str], tmp_path: Path) -> None:  # noqa: F811
    how = of("full", flags)
    assert together(1, ["--out", "straight", *how], tmp_path) == [0]
    stop = ["--out", "run", *how, "checkpoint.every_steps=3"]
    assert together(2, [*stop, "train.max_steps=3"], tmp_path) == [0, 0], said(tmp_path)
    assert together(1, ["--resume", *stop, "train.max_steps=5"], tmp_path) == [0], said(tmp_path)
    assert together(2, ["--resume", *stop], tmp_path) == [0, 0], said(tmp_path) + said(tmp_path, 1)
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("straight", "run"))
    assert max(abs(a[name] - b[name]).max() for name in a) <= 1e-6


def test_a_refused_save_and_a_loss_that_is_not_finite_hang_nobody(flags: list[str], tmp_path: Path) -> None:  # noqa: F811
    how = [*of("full", flags), "checkpoint.every_steps=2", "train.max_steps=6"]
    assert together(2, ["--out", "run", *how], tmp_path, full_disk=True) == [0, 0], said(tmp_path)
    assert "step-00000002: not saved: [Errno 28] No space left on device" in said(tmp_path)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000006"]
    assert together(2, ["--out", "bad", *how, "train.lr=1e30"], tmp_path) == [1, 1], said(tmp_path)
    for rank in (0, 1):
        assert f"rank {rank}: error: step 2: the loss is not finite (loss scale 1): first in" in said(tmp_path, rank)
    assert json.loads((tmp_path / "bad" / "nonfinite.json").read_text("utf-8"))["records_together"]


def test_what_can_not_be_divided_is_refused(flags: list[str], tmp_path: Path) -> None:  # noqa: F811
    words = ["--out", "run", *flags, "run.sharding=full"]
    assert together(2, ["--quantizer", "int8", *words], tmp_path)[0] == 2
    assert "run.sharding='full' can't divide int8 weights; set model.quantizer='nf4' or 'none'" in said(tmp_path)
    words = ["--quantizer", "none", *words, "adapter.kind=none", "train.optimizer=adamw_8bit"]
    assert together(2, words, tmp_path)[0] == 2
    assert "run.sharding='full' with adapter.kind='none' needs train.optimizer='adamw'" in said(tmp_path)
