"""A newcomer's path on the real 135M model, timed: only what the commands themselves say is used. The full tier."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli import corefit

pytestmark = pytest.mark.full
NAME = "internlm_chat_7b_qlora_oasst1_e3"


def test_from_the_list_of_recipes_to_a_merged_model(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    smollm2, seconds = tmp_path / "smollm2", dict[str, float]()
    subprocess.run([sys.executable, str(shared / "real" / "make_smollm2.py"), str(smollm2)], check=True)

    def step(*words: object, code: int = 0) -> str:
        began = time.monotonic()
        done = corefit(*words, cwd=tmp_path, env={"OMP_NUM_THREADS": "2"})
        seconds[" ".join(map(str, words[:2]))] = time.monotonic() - began
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def edit(key: str, value: object) -> None:
        recipe = tmp_path / f"{NAME}.toml"
        text, n = re.subn(rf"(?m)^{key} = .*$", f'{key} = "{value}"', recipe.read_text("utf-8"), count=1)
        assert n == 1
        recipe.write_text(text, "utf-8")

    assert NAME in step("recipes", "oasst1")
    step("copy", NAME, ".")
    assert "hf download timdettmers/openassistant-guanaco" in step("inspect", f"{NAME}.toml", code=2)
    edit("path", shared / "data" / "oasst" / "guanaco_100.jsonl")
    edit("base", smollm2)
    asked = step("inspect", f"{NAME}.toml", code=2)
    assert "template 'internlm_chat' needs '<eoh>'" in asked and "('tokenizer' is the model's own)" in asked
    edit("name", "tokenizer")
    shown = step("inspect", f"{NAME}.toml")
    assert "supervised" in shown and "ledger:" in shown
    sets = ["train.max_steps=3", "pack.max_length=256", "train.packs_per_step=2", "train.precision=bf16"]
    sets += ["sample.max_tokens=16", "val.records=5"]
    trained = step("train", f"{NAME}.toml", "--out", "run", "--set", *sets)
    assert "ledger balanced" in trained and "talk to it: corefit chat " in trained
    assert step("chat", "run", "--prompt", "What is the capital of France?", "--max-tokens", 24).strip()
    assert "base loss" in step("eval", "run", "--records", 3)
    step("merge", "run", "--out", "merged")
    assert step("chat", "merged", "--prompt", "Hello", "--max-tokens", 8).strip()
    for words, took in seconds.items():
        print(f"{took:6.1f} s  corefit {words}")
