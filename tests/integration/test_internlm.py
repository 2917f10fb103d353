"""InternLM folders as published, through the real command line: trained in 4 bit, merged, talked to, written back."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli import corefit, environment
from safetensors.torch import load_file
from tiny_internlm import reference, write_internlm
from transformers import PreTrainedTokenizerFast

from corefit.chat import Chatter, find
from corefit.merge import merge
from corefit.run import train_from

ROWS = "".join(
    json.dumps({"text": f"### Human: What is {i}?### Assistant: It is number {i}."}) + "\n" for i in range(30)
)
SETS = [
    *("pack.max_length=128", "train.packs_per_step=1", "train.max_steps=1", "sample.max_tokens=2", "val.share=0"),
    *("adapter.r=4", "train.lr=1e-2", "run.threads=1", "run.device=cpu"),
]


def at_a_terminal(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line with a terminal as standard input, at which nobody answers."""
    main, side = pty.openpty()
    try:
        return subprocess.run(
            [sys.executable, "-m", "corefit", *map(str, arguments)],
            cwd=cwd,
            env=environment(),
            stdin=side,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
    finally:
        os.close(side)
        os.close(main)


def train(folder: Path, *more: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    (cwd / "rows.jsonl").write_text(ROWS, "utf-8")
    flags = ["--plugin", "oasst1", "--template", "internlm_chat", "--data", "rows.jsonl", "--out", "run"]
    done = at_a_terminal("train", *flags, "--model", folder, *more, cwd=cwd)
    assert "run the custom code" not in done.stdout + done.stderr
    return done


def wanted(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    tensors = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    return reference(json.loads((folder / "config.json").read_text("utf-8")), tensors, ids)


@pytest.mark.parametrize("kind", ["internlm", "internlm2"])
def test_a_step_in_4_bit_from_a_published_folder_and_back_into_its_layout(tmp_path: Path, kind: str) -> None:
    base = write_internlm(tmp_path / "base", kind, dtype="float16")
    done = train(base, "--quantizer", "nf4", "--set", *SETS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "base weights nf4" in done.stdout
    names = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert f"adapter: LoRA r 4 on 14 layers: {', '.join(f'2 {name}' for name in names)}\n" in done.stdout
    assert "isolation: documents of one pack don't see each other (max |delta| 0)" in done.stdout
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    known = {name.rpartition(".")[0] for name in load_file(base / "model.safetensors")}
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter}
    assert modules <= known and len(modules) == {"internlm": 14, "internlm2": 10}[kind]
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)

    merged = tmp_path / "merged"
    said: list[str] = []
    for into, out in (("stored", merged), ("dequantised", tmp_path / "exact")):
        merge(tmp_path / "run", out, into=into, say=said.append)
    cost = [float(re.search(r"against the trained model: KL (\S+) nats", line)[1]) for line in said]  # type: ignore[index]
    assert cost[1] * 100 < cost[0], "what is left is the rounding to the stored fp16"
    if kind == "internlm2":
        chat = corefit("chat", "run", "--prompt", "What is 3?", "--max-tokens", "4", cwd=tmp_path)
        assert chat.returncode == 0, chat.stderr
    for name in ("config.json", f"modeling_{kind}.py", "tokenizer.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"{module}.weight" for module in modules}


def test_full_fine_tuning_writes_the_published_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_internlm(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(ROWS, "utf-8")
    flags = {"plugin": "oasst1", "template": "internlm_chat", "data": "rows.jsonl", "model": str(base), "out": "run"}
    more = ["adapter.kind=none", "train.precision=fp32", "model.quantizer=none"]
    run = train_from(None, flags, [*SETS, *more], say=lambda line: None)
    out, ids = run.path / "model", torch.arange(10, 50)
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert (wanted(out, ids) - wanted(base, ids)).abs().max() > 1e-2
    # the checkpoint's own tensors, by LLaMA's names, come out the same
    again = find(f"{run.path}@latest", say=lambda line: None).folder
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_folder_with_nothing_but_a_tokenizer_model(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As InternLM 1 is published: its real tokenizer.model, and a config that names code for it."""
    monkeypatch.chdir(tmp_path)
    base = write_internlm(tmp_path / "base", "internlm", dtype="float16", vocab_size=103168)
    (base / "tokenizer.json").unlink()
    config = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    del config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    shutil.copy(shared / "data" / "tokenizer_internlm" / "tokenizer.model", base)
    (tmp_path / "rows.jsonl").write_text(ROWS, "utf-8")
    flags = {"plugin": "oasst1", "template": "internlm_chat", "data": "rows.jsonl", "model": str(base), "out": "run"}
    run = train_from(None, flags, [*SETS, "model.quantizer=nf4"], say=lambda line: None)
    assert json.loads((run.path / "adapter" / "corefit.json").read_text("utf-8"))["stop_ids"] == [103028]
    assert Chatter(run.path, max_tokens=4, say=lambda line: None).ask("What is 3?") is not None
    out = merge(run.path, tmp_path / "merged", say=lambda line: None)
    assert (out / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    theirs = PreTrainedTokenizerFast.from_pretrained(out)
    assert theirs("你好<eoa>")["input_ids"][-1] == 103028
    assert (out / "model.safetensors").stat().st_size == (base / "model.safetensors").stat().st_size


def test_code_that_is_not_asked_for_is_an_error_never_a_question(tmp_path: Path) -> None:
    base = write_internlm(tmp_path / "base")
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "model_type": "internlm9"}), "utf-8")
    done = train(base, "--quantizer", "none", "--set", *SETS, cwd=tmp_path)
    assert done.returncode == 2 and "comes with its own Python code" in done.stderr
    assert not (tmp_path / "run").exists()
