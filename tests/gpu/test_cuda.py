"""What only a GPU can show: run on the first one that comes along, skipped with a reason where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli import corefit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that this torch can use"),
]
ROWS = "".join(
    json.dumps({"text": f"### Human: What is {i}?### Assistant: It is number {i}."}) + "\n" for i in range(60)
)
SMALL = ["pack.max_length=128", "train.packs_per_step=2", "train.max_steps=12", "sample.max_tokens=4", "train.lr=5e-3"]


def losses(tmp_path: Path, model: Path, name: str, *more: str) -> list[float]:
    (tmp_path / "rows.jsonl").write_text(ROWS, "utf-8")
    flags = ["--plugin", "oasst1", "--template", "chatml", "--model", model, "--data", "rows.jsonl", "--out", name]
    done = corefit("train", *flags, "--set", *SMALL, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_the_loss_curve_is_that_of_fp32_on_a_cpu(
    precision: str, quantizer: str, tmp_path: Path, tiny_model: Path
) -> None:
    same = [f"model.quantizer={quantizer}", "adapter.dropout=0.0"]
    on_cpu = losses(tmp_path, tiny_model, "cpu", *same, "run.device=cpu", "train.precision=fp32")
    on_gpu = losses(tmp_path, tiny_model, "gpu", *same, "run.device=cuda", f"train.precision={precision}")
    assert on_gpu[-1] < on_gpu[0]
    assert on_gpu == pytest.approx(on_cpu, rel=0.03)


def test_what_is_planned_is_what_the_gpu_allocates(tmp_path: Path, shared: Path) -> None:
    out = tmp_path / "plan.json"
    command = [sys.executable, Path(__file__).parents[2] / "benchmarks" / "plan.py", "--quick", "--device", "cuda"]
    done = subprocess.run([*map(str, command), "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in json.loads(out.read_text("utf-8"))["rows"]:
        assert row["planned MiB"] == pytest.approx(row["measured MiB"], rel=0.1), row


def test_isolation_holds_on_the_gpu(tmp_path: Path, tiny_model: Path) -> None:
    from corefit.engine.attention import isolation_canary
    from corefit.engine.model import load_base
    from corefit.registry import Registry

    quantizer = Registry.load().quantizer("none")
    model = load_base(str(tiny_model), quantizer=quantizer, compute_dtype="float16", device="cuda")
    assert isolation_canary(model, vocab_size=512, device="cuda") < 1e-2


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_a_nan_that_one_record_meets_is_named_on_the_gpu(
    precision: str, quantizer: str, tmp_path: Path, tiny_model: Path
) -> None:
    from safetensors.torch import load_file, save_file

    vocabulary = json.loads((tiny_model / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    bad = shutil.copytree(tiny_model, tmp_path / "bad")
    weights = load_file(bad / "model.safetensors")
    weights["model.embed_tokens.weight"][vocabulary["~"]] = float("nan")
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "rows.jsonl").write_text(ROWS.replace("What is 36?", "What is ~?"), "utf-8")
    flags = ["--plugin", "oasst1", "--template", "chatml", "--model", bad, "--data", "rows.jsonl", "--out", "run"]
    more = [f"model.quantizer={quantizer}", f"train.precision={precision}", "train.max_steps=60", "val.records=0"]
    done = corefit("train", *flags, "--set", *SMALL, *more, "run.device=cuda", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text("utf-8"))
    assert (report["first"]["module"], report["first"]["direction"]) == ("model.embed_tokens", "forward")
    assert report["records"] == [f"{tmp_path / 'rows.jsonl'}:37"]
