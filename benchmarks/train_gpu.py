"""A 7B InternLM-shaped model with random weights on one GPU: corefit's step beside TRL's, and where its time goes.

Claim: NF4 QLoRA, packs of 2,048, 8 a step: at least 1.3x the supervised tokens/s of TRL's SFTTrainer (flash attention
where it is installed, else SDPA) at no more than 0.8x its memory. Also bf16 LoRA, 8,192, with and without gradient
checkpointing; the share of the measured bf16 matmul rate that a step reaches; the longest kernels.

    python benchmarks/train_gpu.py [--peer PYTHON] [--only nf4,2048,on] [--shape tiny --device cpu]

Unattended: runs that would begin after --seconds (480) are left out and said; nothing is asked, nothing downloaded.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SHAPES = {
    "7b": dict(zip(KEYS, (4096, 11008, 32, 32, 103_168), strict=True)),
    "tiny": dict(zip(KEYS, (64, 128, 2, 4, 512), strict=True)),
}
RUNS = [
    (quantizer, length, checkpointing)
    for quantizer in ("nf4", "none")
    for length in (2048, 8192)
    for checkpointing in ("on", "off")
]
TOKENS = 16_384
"""Slots of a step: 8 packs of 2,048, 2 of 8,192."""
WARM_UP = 2
"""Steps that are not counted."""
LONGEST = 200
"""Seconds that a run may take, loading included."""


def write_model(folder: Path, shape: str, device: str) -> None:
    """Write random bf16 weights, a file a layer, in the LLaMA layout with InternLM's attention biases."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        **SHAPES[shape], attention_bias=True, tie_word_embeddings=False, dtype="bfloat16", bos_token_id=1,
        eos_token_id=2, architectures=["LlamaForCausalLM"], max_position_embeddings=8192,
    )  # fmt: skip
    config.save_pretrained(folder)
    h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    attention = {f"self_attn.{n}_proj.{kind}": s for n in "qkvo" for kind, s in (("weight", (h, h)), ("bias", (h,)))}
    mlp = {"mlp.gate_proj.weight": (i, h), "mlp.up_proj.weight": (i, h), "mlp.down_proj.weight": (h, i)}
    norms = {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}
    files: list[dict[str, tuple[int, ...]]] = [
        {f"model.layers.{n}.{name}": s for name, s in {**attention, **mlp, **norms}.items()}
        for n in range(config.num_hidden_layers)
    ]
    files.append({"model.embed_tokens.weight": (v, h), "lm_head.weight": (v, h), "model.norm.weight": (h,)})
    index = {}
    for n, names in enumerate(files):
        tensors = {}
        for name, size in names.items():
            tensor = torch.ones(size, dtype=torch.bfloat16, device=device)
            tensors[name] = (tensor if "norm" in name else tensor.normal_(std=0.02)).cpu()
            index[name] = f"model-{n:05}.safetensors"
        save_file(tensors, folder / f"model-{n:05}.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def documents(length: int, slots: int, vocabulary: int) -> list[list[np.ndarray]]:
    """Give packs of random documents, oasst's lengths, all slots filled."""
    rng, packs = np.random.default_rng(0), list[list[np.ndarray]]()
    for _ in range(slots // length):
        left, pack = length, list[np.ndarray]()
        while left:
            size = min(left, int(np.clip(rng.lognormal(np.log(285), 0.85), 16, 2048)))
            size = left if left - size < 16 else size
            pack.append(rng.integers(3, vocabulary, size))
            left -= size
        packs.append(pack)
    return packs


def ours(model: Path, quantizer: str, length: int, checkpointing: str, device: str, steps: int, out: Path) -> None:
    """Train as ``corefit train`` does, on batches made beforehand; save what was measured."""
    import torch

    from corefit.engine import adapter, attention
    from corefit.engine import model as base
    from corefit.engine.loop import autocast, peak_memory, take_step
    from corefit.engine.loss import CausalLoss
    from corefit.engine.optimizer import make_optimizer, make_scaler
    from corefit.registry import Registry
    from corefit.types import Batch

    began = time.time()
    network: Any = base.load_base(
        str(model), quantizer=Registry.load().quantizer(quantizer), compute_dtype="bfloat16", device=device
    )
    vocabulary = network.config.vocab_size
    network = adapter.attach_adapter(network, adapter.AdapterSpec(r=16, alpha=32, dropout=0.0), seed=0)
    if checkpointing == "on":
        base.enable_gradient_checkpointing(network)
    how: dict[str, Any] = dict(vocab_size=vocabulary, device=device, autocast=lambda: autocast(device, torch.bfloat16))
    route = attention.choose_route(network, **how)
    attention.isolation_canary(network, **how)
    loss_fn = CausalLoss(network)
    with how["autocast"]():
        loss_fn.probe()
    parameters = adapter.check_trainable(network)
    optimizer, scaler = make_optimizer("adamw", parameters, lr=1e-4), make_scaler(device, enabled=False)
    slots = TOKENS if vocabulary > 1000 else 2 * length
    batches = []
    for pack in documents(length, slots, vocabulary):
        sizes = [len(one) for one in pack]
        ids, positions = np.concatenate(pack), np.concatenate([np.arange(n) for n in sizes])
        answered = np.concatenate([np.arange(n) >= int(0.4 * n) for n in sizes])
        labels = np.where(np.roll(positions, -1) == 0, -100, np.where(np.roll(answered, -1), np.roll(ids, -1), -100))
        batches.append(
            Batch(
                input_ids=ids[None], labels=labels[None], position_ids=positions[None],
                cu_seqlens=np.cumsum([0, *sizes], dtype=np.int32), n_supervised=int((labels != -100).sum()),
                n_tokens=length, n_samples=len(sizes),
            )
        )  # fmt: skip

    supervised = sum(batch.n_supervised for batch in batches)

    def step() -> float:
        start = time.perf_counter()
        take_step(loss_fn, batches, supervised, parameters, optimizer, scaler, device, torch.bfloat16, 1.0)
        return time.perf_counter() - start

    loss_fn.train()
    first = step()
    found: dict[str, Any] = {"route": route, "first step s": time.time() - began, "first alone s": first}
    found["seconds"] = [step() for _ in range(steps + WARM_UP - 1)][WARM_UP - 1 :]
    found["memory"] = peak_memory(device)
    found["supervised"] = supervised
    out.write_text(json.dumps(found))  # kept should the profile fail
    # of a GPU its kernels alone, and of one micro-batch: a step of 8 is half a million events
    activity = torch.profiler.ProfilerActivity.CPU if device == "cpu" else torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        part = batches[0].n_supervised
        take_step(loss_fn, batches[:1], part, parameters, optimizer, scaler, device, torch.bfloat16, 1.0)
    kind = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    events = sorted(profile.key_averages(), key=lambda e: -getattr(e, kind))
    total = sum(getattr(e, kind) for e in events)
    found["profile"] = {e.key[:70]: round(100 * getattr(e, kind) / max(total, 1), 1) for e in events[:15]}
    side = 8192 if device != "cpu" else 512
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    rates = []
    for _ in range(8):
        start = time.perf_counter()
        c = a @ a
        float(c[0, 0])
        rates.append(2 * side**3 / (time.perf_counter() - start))
    linear = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and "lora" not in n}
    inner = sum(m.in_features * m.out_features for n, m in linear.items() if "lm_head" not in n)
    hidden, layers = network.config.hidden_size, network.config.num_hidden_layers
    squares = sum(float((np.diff(b.cu_seqlens).astype(float) ** 2).sum()) for b in batches)
    # forward and the gradient of the input; frozen weights have none. Recomputation is not counted.
    flops = 4 * inner * slots + 4 * hidden * vocabulary * found["supervised"] + 6 * layers * hidden * squares
    found["flops"], found["matmul flops/s"] = flops, max(rates)
    out.write_text(json.dumps(found))


PEER = """
import json, sys, time
began = time.time()
model, quantizer, length, checkpointing, device, steps, out, rows = json.loads(sys.argv[1])
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer
try:
    import flash_attn
    attention = "flash_attention_2"
except ImportError:
    attention = "sdpa"
seconds, found, supervised = [], {}, []
class Steps(TrainerCallback):
    def on_step_begin(self, *a, **k): self.began = time.perf_counter()
    def on_step_end(self, *a, **k):
        if device != "cpu": torch.cuda.synchronize()
        seconds.append(time.perf_counter() - self.began)
        found.setdefault("first step s", time.time() - began)
class Trainer(SFTTrainer):
    def training_step(self, model, inputs, *rest):
        supervised.append((inputs["labels"][:, 1:] != -100).sum())  # read at the end: asking now would make it wait
        return super().training_step(model, inputs, *rest)
kwargs = {"dtype": "bfloat16", "attn_implementation": attention}
if quantizer == "nf4":
    kwargs["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16")
packs = max(16384 // length, 1) if device != "cpu" else 2
Trainer(
    model=model,
    args=SFTConfig(
        output_dir=out + ".d", max_steps=steps + 2, use_cpu=device == "cpu", bf16=True, packing=True,
        packing_strategy="bfd", max_length=length, per_device_train_batch_size=1, gradient_accumulation_steps=packs,
        report_to="none", gradient_checkpointing=checkpointing == "on", learning_rate=1e-4, warmup_steps=0,
        lr_scheduler_type="constant",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, completion_only_loss=True,
        model_init_kwargs=kwargs,
    ),
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    processing_class=AutoTokenizer.from_pretrained(sys.argv[2]),
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()),
    callbacks=[Steps()],
).train()
if device == "cpu":
    import resource
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
else:
    found["memory"] = torch.cuda.max_memory_allocated()
found |= {"seconds": seconds[2:], "supervised": sum(map(int, supervised)) / len(seconds), "route": attention}
open(out, "w").write(json.dumps(found))
"""


def main() -> None:
    """Run each configuration on both sides, each in a process of its own."""
    if len(sys.argv) > 1 and sys.argv[1] == "child":
        given = json.loads(sys.argv[2])
        return ours(Path(given[0]), *given[1:6], Path(given[6]))
    args = common.options(
        __doc__,
        peer={"metavar": "PYTHON", "default": sys.executable, "help": "the Python that has TRL; none: without TRL"},
        shape={"choices": list(SHAPES), "default": "7b"},
        device={"default": "cuda"},
        steps={"type": int, "default": 4},
        seconds={"type": float, "default": 480.0, "help": "no run begins later"},
        only={"default": "", "metavar": "QUANTIZER,LENGTH,on|off", "help": "one configuration"},
        place={"type": Path, "help": "a folder with 16 GB for the random model; kept, and used again"},
    )
    import torch

    if args.device != "cpu" and not torch.cuda.is_available():
        common.skip("no GPU that this torch can use")
    began, rows, left, details = time.monotonic(), list[dict[str, Any]](), list[str](), dict[str, Any]()
    with tempfile.TemporaryDirectory() as place:
        folder = args.place or Path(place)
        model = folder / args.shape
        if not (model / "model.safetensors.index.json").exists():
            model.mkdir(parents=True, exist_ok=True)
            write_model(model, args.shape, args.device)
        for run in RUNS:
            name = ",".join(map(str, run))
            if args.only and name != args.only:
                continue
            length = run[1] if args.shape == "7b" else run[1] // 16
            data = folder / f"{length}.jsonl"
            packs = documents(
                length, 4 * TOKENS if args.shape == "7b" else 8 * length, SHAPES[args.shape]["vocab_size"]
            )
            with open(data, "w", encoding="utf-8") as file:
                for one in (one for pack in packs for one in pack):
                    mask = (np.arange(len(one)) >= int(0.4 * len(one))).astype(int).tolist()
                    file.write(json.dumps({"input_ids": one.tolist(), "completion_mask": mask}) + "\n")
            out = folder / "found.json"
            given: list[Any] = [str(model), run[0], length, run[2], args.device, args.steps, str(out)]
            commands = {"corefit": [sys.executable, __file__, "child", json.dumps(given)]}
            if args.peer != "none":
                tokenizer = common.HERE.parent / "corefit" / "embedded" / "model"
                commands["trl"] = [args.peer, "-c", PEER, json.dumps([*given, str(data)]), str(tokenizer)]
            for side, command in commands.items():
                if time.monotonic() - began > args.seconds:
                    left.append(f"{name} {side}")
                    continue
                out.unlink(missing_ok=True)
                environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
                try:
                    done = subprocess.run(
                        command, capture_output=True, text=True, check=False, env=environment, timeout=LONGEST
                    )
                    said = (done.stderr or "killed") if done.returncode else ""
                except subprocess.TimeoutExpired:
                    said = f"not done after {LONGEST} s"
                if said:
                    print(said[-1500:], flush=True)
                row: dict[str, Any] = {
                    "run": name,
                    "side": side,
                    "failed": "".join(said.strip().splitlines()[-1:])[:90],
                }
                if not out.exists():
                    rows.append(row)
                    continue
                found = json.loads(out.read_text())
                seconds = statistics.median(found["seconds"])
                row["step s"] = seconds
                row |= {"supervised tokens/s": found["supervised"] / seconds, "peak GB": found["memory"] / 1e9}
                row |= {"first step s": found["first step s"], "attention": found["route"]}
                if "flops" in found:
                    row["% of matmul rate"] = 100 * found["flops"] / seconds / found["matmul flops/s"]
                    details[name] = {key: found[key] for key in ("flops", "matmul flops/s", "profile")}
                rows.append(row)
                print(json.dumps(row), flush=True)
    pair = {row["side"]: row for row in rows if row["run"] == "nf4,2048,on" and "step s" in row}
    both = len(pair) == 2
    speed, memory = (
        pair["corefit"][key] / pair["trl"][key] if both else None for key in ("supervised tokens/s", "peak GB")
    )
    common.finish(
        args,
        (__doc__ or "").split("Claim: ")[1].partition("\n\n")[0],
        rows,
        [
            common.goal("nf4, 2,048, checkpointing: supervised tokens/s, times TRL's", speed, least=1.3),
            common.goal("nf4, 2,048, checkpointing: peak memory, times TRL's", memory, most=0.8),
        ],
        peers=("torch", "transformers", "peft", "bitsandbytes", "trl", "flash-attn"),
        device=args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        shape=args.shape,
        left_out=left,
        profiles=details,
        does_not_show="real weights, several GPUs; corefit's batches are made beforehand, as TRL's packs are",
    )


if __name__ == "__main__":
    main()
