"""What corefit writes opens in transformers 4.57 with equal ids and logits: the full tier."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import corefit
from tiny import write_model

pytestmark = pytest.mark.full
ROPE_THETA = 50_000.0
TEXT = "What is the capital of France? Paris."
OLD = ["torch==2.13.0", "transformers==4.57.*", "peft<0.19", "safetensors"]
ASK = """
import json, sys, torch, transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, merged, text, out = sys.argv[1:]
found = {"transformers": transformers.__version__}
for name, folder in (("adapter", adapter), ("merged", merged)):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    question = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    model = AutoModelForCausalLM.from_pretrained(base if name == "adapter" else merged).float()
    if name == "adapter":
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    found[name] = {"ids": ids, "chat": chat, "logits": logits.tolist()}
json.dump(found, open(out, "w"))
"""


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the older stack; COREFIT_OLD_PYTHON names one that is there already."""
    if ready := os.environ.get("COREFIT_OLD_PYTHON"):
        return ready
    folder = tmp_path_factory.mktemp("old")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    done = subprocess.run([python, "-m", "pip", "install", "-q", *OLD], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the older stack can't be installed here: {done.stderr.splitlines()[-1:]}")
    return python


def older_config(folder: Path, theta: float) -> None:
    """Write config.json as transformers 4 did: that is how published folders lie on people's disks."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    for key in ("rope_parameters", "dtype", "transformers_version"):
        config.pop(key, None)
    path.write_text(json.dumps({**config, "rope_theta": theta, "torch_dtype": "float32"}), "utf-8")


def test_adapter_and_merged_folder_give_the_same_in_the_older_stack(old_python: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA})
    older_config(base, ROPE_THETA)
    rows = [{"text": f"### Human: What is {i}?### Assistant: It is number {i}."} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    flags = [
        "--plugin",
        "oasst1",
        "--template",
        "chatml",
        "--quantizer",
        "none",
        "--out",
        "run",
        "--data",
        "rows.jsonl",
    ]
    sets = ["pack.max_length=128", "train.max_steps=3", "train.packs_per_step=1", "train.lr=1e-2", "adapter.r=4"]
    done = corefit("train", *flags, "--model", base, "--set", *sets, "sample.max_tokens=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert corefit("merge", "run", "--out", "merged", cwd=tmp_path).returncode == 0
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    answers = []
    for python in (old_python, sys.executable):
        out = tmp_path / f"{len(answers)}.json"
        folders = [base, tmp_path / "run" / "adapter", tmp_path / "merged"]
        command = [python, "-c", ASK, *map(str, folders), TEXT, str(out)]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        asked = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
        assert asked.returncode == 0, asked.stderr
        answers.append(json.loads(out.read_text("utf-8")))
    old, new = answers
    assert old["transformers"].startswith("4.57")
    for name in ("adapter", "merged"):
        assert old[name]["ids"] == new[name]["ids"]
        assert old[name]["chat"] == new[name]["chat"]
        pairs = zip(old[name]["logits"], new[name]["logits"], strict=True)
        worst = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
        print(name, "largest difference of logits:", worst)
        assert worst <= 1e-5
