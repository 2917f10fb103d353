"""The memory that `corefit plan` predicts against what the run's metrics.jsonl says, each run in a process of its own.

Claim: within 10 % over six settings of a real model of 135M parameters on a CPU: LoRA on bf16 and on NF4 weights and
full fine-tuning, one and four packs of 512 and 1,024 tokens at a time, with and without gradient checkpointing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

from corefit.engine.memory import MIB, needed, peak
from corefit.engine.model import DTYPES
from corefit.plan import read_shape, setting_of
from corefit.prepare import resolve
from corefit.registry import Registry

SETTINGS = {
    "LoRA on bf16, 1 x 1,024": "model.quantizer=none train.micro_batch=1 pack.max_length=1024",
    "LoRA on bf16, 4 x 512, checkpointing": "model.quantizer=none train.micro_batch=4 pack.max_length=512 "
    "train.gradient_checkpointing=true",
    "LoRA on NF4, 1 x 512, checkpointing": "train.micro_batch=1 pack.max_length=512 adapter.r=16 adapter.dropout=0.0 "
    "train.gradient_checkpointing=true",
    "LoRA on NF4, 4 x 1,024": "train.micro_batch=4 pack.max_length=1024",
    "full, 1 x 512": "model.quantizer=none adapter.kind=none train.micro_batch=1 pack.max_length=512",
    "full, 4 x 512, checkpointing": "model.quantizer=none adapter.kind=none train.micro_batch=4 pack.max_length=512 "
    "train.gradient_checkpointing=true",
}
QUICK = {
    "LoRA on bf16, 8 x 512": "model.quantizer=none train.micro_batch=8 pack.max_length=512",
    "full, 1 x 512": "model.quantizer=none adapter.kind=none train.micro_batch=1 pack.max_length=512",
}


def main() -> None:
    model = dict(default=str(common.SHARED / "smollm2"), metavar="DIR", help="what shared/real/make_smollm2.py made")
    precision = dict(choices=("bf16", "fp32"), default="bf16", help="what products are asked for in")
    args = common.options(__doc__, model=model, device=dict(default="cpu"), precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        base = larger(Path(folder) / "base", args.device) if args.quick else Path(args.model)
        there = common.SHARED / "data" / "alpaca_en_demo.json"
        data = there if there.is_file() else rows_in(Path(folder))
        if not (base / "config.json").is_file():
            common.skip(f"no model in {base}")
        rows = []
        for name, words in (QUICK if args.quick else SETTINGS).items():
            rows.append({"setting": name, **one(base, data, words.split(), Path(folder) / "run", args)})
            common.show(rows[-1:])
            subprocess.run(["rm", "-rf", str(Path(folder) / "run")], check=True)
    worst = max(abs(row["planned / measured"] - 1) for row in rows)
    common.finish(
        args,
        "corefit plan predicts the peak memory of a run within 10 %",
        rows,
        [common.goal("largest difference of any setting, <= 10 %", worst, most=0.1)],
        peers=("torch", "transformers", "peft", "bitsandbytes"),
        n=len(rows),
        does_not_show="other models than this one, whose sizes are small beside its vocabulary; GPUs; runs of more "
        "than 2 steps, and data whose records take memory of their own; C libraries other than glibc",
    )


def one(base: Path, data: Path, sets: list[str], out: Path, args: Any) -> dict[str, float | str]:
    """Plan and train one setting, two steps, so that the optimizer's state is there in the second."""
    at_once = next(word.partition("=")[2] for word in sets if word.startswith("train.micro_batch="))
    sets = [*sets, f"train.packs_per_step={at_once}", "train.max_steps=2", "val.records=0", "sample.max_tokens=4"]
    sets += [f"run.device={args.device}", f"train.precision={args.precision}"]
    flags = {"model": str(base), "data": str(data), "plugin": "alpaca", "template": "chatml", "out": str(out)}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "corefit", "train", *words, "--set", *sets]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    measured = max(line["memory_bytes"] for line in lines if "loss" in line)
    recipe, *_ = resolve(None, flags, sets, Registry.load())
    dtype = DTYPES[args.precision]
    shape, setting = read_shape(str(base)), setting_of(recipe, cuda=args.device != "cpu", dtype=dtype)
    planned, when = needed(shape, setting), peak(shape, setting)[0]
    found: dict[str, float | str] = {"planned MiB": planned / MIB, "measured MiB": measured / MIB}
    return found | {"planned / measured": planned / measured, "the most": when}


def rows_in(folder: Path) -> Path:
    """Write rows enough for two steps of any setting, short ones that fill a pack."""
    rows = ({"instruction": f"Count on from {i}.", "output": " ".join(map(str, range(i, i + 9)))} for i in range(900))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder / "rows.jsonl"


def larger(folder: Path, device: str) -> Path:
    """Write a random model that takes more memory than what is around it, with the embedded model's tokenizer."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    embedded = next(path.parent for path in (Path(common.__file__).parent.parent / "corefit").rglob("tokenizer.json"))
    shutil.copytree(embedded, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6)
    if device != "cpu":
        sizes = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16)
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=4096, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
