"""The real 135M chat model, trained, asked, compared and merged: the full tier, about ten minutes on two cores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli import corefit

pytestmark = pytest.mark.full
TOLERANCE = 1e-5
TEXT = "The capital of France is Paris, and the capital of Italy is Rome. Both are old cities."


@pytest.fixture(scope="module")
def smollm2(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "smollm2"
    subprocess.run([sys.executable, str(shared / "real" / "make_smollm2.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def run(smollm2: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    flags = ["--plugin", "oasst1", "--template", "chatml", "--model", smollm2, "--quantizer", "nf4", "--out", "run"]
    sets = ["pack.max_length=512", "train.packs_per_step=4", "train.epochs=0", "train.max_steps=20", "val.records=10"]
    data = shared / "data" / "oasst" / "guanaco_100.jsonl"
    threads = {"OMP_NUM_THREADS": "2"}
    done = corefit("train", *flags, "--data", data, "--set", *sets, cwd=folder, env=threads)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_validation_loss_falls(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[-1] < losses[0]


def test_it_answers_and_stops_by_itself(run: Path) -> None:
    from corefit.chat import Chatter

    chatter = Chatter(run, max_tokens=200)
    pieces = "".join(chatter.answer([{"role": "user", "content": "What is the capital of France?"}]))
    assert "Paris" in pieces
    assert len(chatter.tokenizer.encode([pieces])[0]) < 200, "it ran to the limit"


def test_plain_transformers_gives_the_same_logits_and_merge_equals_base_and_adapter(
    run: Path, smollm2: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from corefit.engine.attention import run_packed
    from corefit.engine.model import load_base
    from corefit.registry import Registry

    def logits(model: object) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits  # type: ignore[operator]

    ids = AutoTokenizer.from_pretrained(run / "adapter")(TEXT, return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(run / "adapter")).eval())
    assert (expected - plain).abs().max() > 0.1, "the adapter does something"
    none = Registry.load().quantizer("none")
    loaded = load_base(str(smollm2), quantizer=none, compute_dtype="float32", device="cpu")
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(loaded, str(run / "adapter")).eval()
        ours = run_packed(adapted, ids, torch.arange(ids.shape[1])[None]).logits
    print("corefit against transformers + peft:", float((ours - expected).abs().max()))
    assert (ours - expected).abs().max() <= TOLERANCE

    # the merged weights are stored as the base's are; kept in fp32 they equal base + adapter
    wide = tmp_path / "wide"
    AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).save_pretrained(wide)
    for path in smollm2.iterdir():
        if path.name.startswith(("tokenizer", "special", "chat_template", "vocab", "merges")):
            (wide / path.name).write_bytes(path.read_bytes())
    done = corefit("merge", run, "--model", wide, "--out", tmp_path / "merged", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    # (W + s B A) x and W x + s B (A x) round differently in each of 30 layers: relative to the largest logit
    error = float((logits(merged) - expected).abs().max() / expected.abs().max())
    again = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(again, str(run / "adapter")).merge_and_unload()
    off = max(
        float((a - b).detach().abs().max()) for a, b in zip(merged.parameters(), theirs.parameters(), strict=True)
    )
    print("merged against base + adapter, relative:", error, "weights against peft's merge:", off)
    assert error <= TOLERANCE
    assert off <= 1e-6
