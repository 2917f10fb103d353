"""Whole training processes on a CPU, side by side: ``corefit train`` and TRL's SFTTrainer, LoRA r16 on a 135M model.

Claim: 1,000 Alpaca rows (answers supervised), length 1,024, 4 packs a step, bf16, 2 threads: at least 1.5x supervised
tokens/s of TRL's fastest own setting, at most 0.6x its peak memory, the first step within half its time.

    python benchmarks/train_cpu.py --model FOLDER [--peer PYTHON] [--quantizer nf4]

``--peer``: the Python that has TRL, where that lives in an environment of its own. With ``nf4`` both sides hold the
base in 4 bits (double quantisation, products in bf16), and the result is train_cpu_nf4.json. Data:
shared/data/alpaca_en_demo.json.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

DATA = common.SHARED / "data" / "alpaca_en_demo.json"
LENGTH, PACKS = 1024, 4
PEER_SETTINGS = {
    f"trl {'bf16' if bf16 else 'fp32'}, {dtype} weights, {rows} a micro-batch": {
        "bf16": bf16,
        "dtype": dtype,
        "rows": rows,
    }
    for bf16, dtype, rows in (
        (False, "float32", 1),
        (True, "bfloat16", 1),
        (True, "float32", 1),
        (True, "bfloat16", 4),
        (True, "float32", 4),
    )
}
"""Without bf16 first: on a CPU that has no instructions for it one step of TRL in bf16 takes minutes."""
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
PEER = """
import json, sys, time
settings, rows_file, out, steps, model, targets = json.loads(sys.argv[1])
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

torch.set_num_threads(int(settings["threads"]))
file = open(out, "w")

def say(**what):
    print(json.dumps(what), file=file, flush=True)

class Steps(TrainerCallback):
    def on_step_begin(self, *a, **k): self.began = time.time()
    def on_step_end(self, args, state, control, **k): say(step=state.global_step, began=self.began, ended=time.time())

class Trainer(SFTTrainer):
    def training_step(self, model, inputs, *rest):
        say(supervised=int((inputs["labels"][:, 1:] != -100).sum()), slots=inputs["labels"].numel())
        return super().training_step(model, inputs, *rest)

nf4 = {}
if settings["quantizer"] == "nf4":
    nf4["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if settings["bf16"] else torch.float32,
    )
Trainer(
    model=model,
    args=SFTConfig(
        output_dir=out + ".d", max_steps=steps, use_cpu=True, bf16=settings["bf16"],
        packing=True, packing_strategy="bfd",
        max_length=settings["length"], per_device_train_batch_size=settings["rows"],
        gradient_accumulation_steps=settings["packs"] // settings["rows"], gradient_checkpointing=False,
        learning_rate=1e-4, warmup_steps=0, lr_scheduler_type="constant", report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, completion_only_loss=True, eos_token="<|im_end|>",
        model_init_kwargs={"dtype": settings["dtype"], "attn_implementation": "sdpa", **nf4},
    ),
    train_dataset=load_dataset("json", data_files=rows_file, split="train"),
    processing_class=AutoTokenizer.from_pretrained(model),
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"),
    callbacks=[Steps()],
).train()
"""


def write_rows(folder: Path, n: int) -> dict[str, Path]:
    """Write the rows as each side reads them: the same text, the same answers supervised."""
    rows = json.loads(DATA.read_text("utf-8"))[:n]
    files = {"corefit": folder / "messages.jsonl", "trl": folder / "prompts.jsonl"}
    with open(files["corefit"], "w", encoding="utf-8") as ours, open(files["trl"], "w", encoding="utf-8") as theirs:
        for row in rows:
            asked = "\n".join(part for part in (row["instruction"], row["input"]) if part)
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
            ours.write(json.dumps({"messages": messages}) + "\n")
            prompt = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
            theirs.write(json.dumps({"prompt": prompt, "completion": row["output"] + "<|im_end|>"}) + "\n")
    return files


def run(command: list[str], folder: Path, threads: int, watch: Path | None = None) -> dict[str, float]:
    """Run a process to its end; give when it began, its peak resident memory in MB, and when ``watch`` had a step."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment["HF_HOME"] = environment["HF_DATASETS_CACHE"] = str(folder / "cache")
    found: dict[str, float] = {}
    with open(folder / "said", "w+", encoding="utf-8") as said:
        began = found["began"] = time.time()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            if watch and "first" not in found and watch.exists() and b'"grad_norm"' in watch.read_bytes():
                found["first"] = time.time() - began
            time.sleep(0.02)
        said.seek(0)
        if ended[1]:
            raise RuntimeError(said.read()[-4000:])
    return found | {"peak": ended[2].ru_maxrss * 1024 / 1e6}


def figures(
    seconds: list[float], supervised: list[int], slots: list[int], peak: float, first: float
) -> dict[str, float]:
    """Give what is compared; the first step, which warms up, counts for its own figure alone."""
    step = statistics.median(seconds[1:])
    return {
        "supervised tokens/s": sum(supervised[1:]) / sum(seconds[1:]),
        "slots/s": sum(slots[1:]) / sum(seconds[1:]),
        "step s": step,
        "peak MB": peak,
        "first step s": first,
    }


def settings(steps: int, threads: int) -> list[str]:
    """Give what both sides are told, as ``--set`` takes it."""
    return [
        f"train.max_steps={steps}", f"train.packs_per_step={PACKS}", f"pack.max_length={LENGTH}", "train.lr=1e-4",
        "train.precision=bf16", "train.scheduler=constant", "train.warmup=0", "adapter.r=16", "adapter.alpha=32",
        "adapter.dropout=0.0", "val.share=0.0", "sample.max_tokens=1", f"run.threads={threads}",
    ]  # fmt: skip


def ours(rows: Path, folder: Path, args: Any) -> dict[str, float]:
    """Run ``corefit train``."""
    out = folder / "run"
    words = ["train", "--plugin", "openai", "--template", "chatml", "--model", str(args.model), "--data", str(rows)]
    words += ["--quantizer", args.quantizer, "--out", str(out), "--set", *settings(args.steps, args.threads)]
    found = run([sys.executable, "-m", "corefit", *words], folder, args.threads, out / "metrics.jsonl")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in lines if line.get("supervised_tokens")]
    columns = [[step[key] for step in steps] for key in ("seconds", "supervised_tokens", "packs")]
    columns[2] = [LENGTH * packs for packs in columns[2]]
    shutil.rmtree(out)
    return figures(*columns, found["peak"], found["first"])


def theirs(rows: Path, folder: Path, args: Any, own: dict[str, Any]) -> dict[str, float]:
    """Run SFTTrainer."""
    out = folder / "trl.jsonl"
    own = {**own, "threads": args.threads, "length": LENGTH, "packs": PACKS, "quantizer": args.quantizer}
    given = json.dumps([own, str(rows), str(out), args.steps, str(args.model), TARGETS])
    found = run([str(args.peer), "-c", PEER, given], folder, args.threads)
    steps, supervised, slots = list[dict[str, float]](), [0], [0]
    for line in map(json.loads, out.read_text("utf-8").splitlines()):
        if "step" in line:
            steps.append(line)
            supervised.append(0)
            slots.append(0)
        else:
            supervised[-1] += line["supervised"]
            slots[-1] += line["slots"]
    seconds = [step["ended"] - step["began"] for step in steps]
    return figures(seconds, supervised[:-1], slots[:-1], found["peak"], steps[0]["ended"] - found["began"])


def main() -> None:
    """Measure pairwise: every round runs corefit and each setting of TRL that is still in the race."""
    args = common.options(
        __doc__,
        model={"type": Path, "required": True, "metavar": "FOLDER", "help": "SmolLM2-135M or its like"},
        peer={"type": Path, "default": Path(sys.executable), "metavar": "PYTHON", "help": "the Python that has TRL"},
        threads={"type": int, "default": 2},
        rounds={"type": int, "default": 3},
        steps={"type": int, "default": 5},
        quantizer={"choices": ("none", "nf4"), "default": "none", "help": "how both sides hold the base"},
        settings={"type": int, "default": len(PEER_SETTINGS), "metavar": "N", "help": "of TRL, that round 1 tries"},
    )
    rounds, args.steps = (1, 2) if args.quick else (args.rounds, args.steps)
    if args.quantizer != "none":
        args.out = args.out or common.HERE / "results" / f"train_cpu_{args.quantizer}.json"
    args.model, seen = args.model.resolve(), dict[str, list[dict[str, float]]]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = write_rows(folder, 40 if args.quick else 1000)
        racing = dict(list(PEER_SETTINGS.items())[: args.settings])
        for _ in range(rounds):
            seen.setdefault("corefit", []).append(ours(files["corefit"], folder, args))
            print(json.dumps(seen["corefit"][-1]), flush=True)
            for name, own in racing.items():
                seen.setdefault(name, []).append(theirs(files["trl"], folder, args, own))
                print(name, json.dumps(seen[name][-1]), flush=True)
            best = max(racing, key=lambda name: seen[name][0]["supervised tokens/s"])
            racing = {best: racing[best]}
    rows = [
        {"run": name, "rounds": len(all_), **{key: statistics.median(one[key] for one in all_) for key in all_[0]}}
        for name, all_ in seen.items()
    ]

    def ratio(key: str) -> float:
        return statistics.median(a[key] / b[key] for a, b in zip(seen["corefit"], seen[best], strict=True))

    common.finish(
        args,
        (__doc__ or "").split("\n\n")[1],
        rows,
        [
            common.goal("supervised tokens/s, times TRL's fastest setting", ratio("supervised tokens/s"), least=1.5),
            common.goal("peak memory, times TRL's", ratio("peak MB"), most=0.6),
            common.goal("process start to the end of step 1, times TRL's", ratio("first step s"), most=0.5),
        ],
        peers=("torch", "transformers", "peft", "bitsandbytes"),
        peer=subprocess.run(
            [str(args.peer), "-c", "import importlib.metadata as m; print(m.version('trl'), m.version('torch'))"],
            capture_output=True, text=True, check=True,
        ).stdout.split(),
        n=1000,
        repeats=rounds,
        does_not_show="other machines, a GPU, longer texts; the first step of each run is left out of its rates",
    )  # fmt: skip


if __name__ == "__main__":
    main()
