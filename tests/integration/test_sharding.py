"""A model whose weights are divided among processes (FSDP2, over gloo): equal to one process, in all that a run does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from test_ranks import flags, records, said, same, steps, together  # noqa: F401, a fixture

FULL = ["--quantizer", "none", "adapter.kind=none"]


def weights(run: Path) -> dict[str, object]:
    return load_file(next(run.glob("*/*model.safetensors")))


@pytest.mark.parametrize("kind", ["none", "nf4", "full"])
def test_shares_of_a_model_are_the_model(kind: str, flags: list[str], tmp_path: Path) -> None:  # noqa: F811
    how = [*flags, "sample.every_steps=5", "sample.max_tokens=5", "checkpoint.every_steps=6"]
    how = ["--quantizer", "none", *how, "adapter.kind=none"] if kind == "full" else ["--quantizer", kind, *how]
    assert together(1, ["--out", "one", *how], tmp_path) == [0], said(tmp_path)
    how += ["run.sharding=full", "train.gradient_checkpointing=true"]
    assert together(2, ["--out", "two", *how], tmp_path) == [0, 0], said(tmp_path) + said(tmp_path, 1)
    same(tmp_path / "one", tmp_path / "two")
