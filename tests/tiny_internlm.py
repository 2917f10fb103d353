"""Tiny InternLM folders as they are published, and a forward pass written from the published description alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import write_tokenizer
from torch import Tensor
from torch.nn.functional import silu

VOCAB, HIDDEN, INNER, LAYERS, HEADS = 512, 64, 96, 2, 8
SPY = "raise SystemExit('code of the model folder was run')\n"
CONFIGS: dict[str, dict] = {
    "internlm": {"model_type": "internlm", "bias": True, "rms_norm_eps": 1e-6},
    "internlm2": {
        "model_type": "internlm2",
        "attn_implementation": "eager",
        "bias": False,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "internlm3": {
        "model_type": "internlm3",
        "bias": False,
        "qkv_bias": False,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000000,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
    },
}
"""What differs between the published configs; every other key they have in common."""


def write_internlm(
    folder: Path, kind: str = "internlm2", *, dtype: str = "float32", shards: int = 1, seed: int = 0, **changes: object
) -> Path:
    """Write a folder with random weights: config.json with auto_map and the files that it names, which must not run."""
    write_tokenizer(folder)
    name = kind.replace("intern", "Intern").replace("lm", "LM")
    config = {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{kind}.{name}Config",
            "AutoModel": f"modeling_{kind}.{name}ForCausalLM",
            "AutoModelForCausalLM": f"modeling_{kind}.{name}ForCausalLM",
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": 2048,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.41.0",
        "use_cache": True,
        "vocab_size": VOCAB,
        **CONFIGS[kind],
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    tokenizer["auto_map"] = {"AutoTokenizer": [f"tokenization_{kind}.{name}Tokenizer", None]}
    tokenizer["tokenizer_class"] = f"{name}Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2), "utf-8")
    for file in ("configuration", "modeling", "tokenization"):
        (folder / f"{file}_{kind}.py").write_text(SPY, "utf-8")

    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, around: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.1 + around).to(getattr(torch, dtype))

    kv = config.get("num_key_value_heads") or HEADS
    head_dim = config.get("head_dim") or HIDDEN // HEADS
    rows, kv_rows = HEADS * head_dim, kv * head_dim  # type: ignore[operator]
    tensors: dict[str, Tensor] = {}

    def linear(name: str, outs: int, ins: int, bias: object = False) -> None:
        tensors[f"{name}.weight"] = draw(outs, ins)
        if bias:
            tensors[f"{name}.bias"] = draw(outs)

    second = kind == "internlm2"
    linear("model.tok_embeddings" if second else "model.embed_tokens", config["vocab_size"], HIDDEN)
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        if second:
            linear(f"{at}.attention.wqkv", rows + 2 * kv_rows, HIDDEN, config["bias"])
            linear(f"{at}.attention.wo", HIDDEN, rows, config["bias"])
            for w, outs, ins in (("w1", INNER, HIDDEN), ("w2", HIDDEN, INNER), ("w3", INNER, HIDDEN)):
                linear(f"{at}.feed_forward.{w}", outs, ins)
            tensors[f"{at}.attention_norm.weight"] = draw(HIDDEN, around=1.0)
            tensors[f"{at}.ffn_norm.weight"] = draw(HIDDEN, around=1.0)
            continue
        for w, outs in (("q", rows), ("k", kv_rows), ("v", kv_rows)):
            linear(f"{at}.self_attn.{w}_proj", outs, HIDDEN, config.get("qkv_bias", config["bias"]))
        linear(f"{at}.self_attn.o_proj", HIDDEN, rows, config["bias"])
        mlp_bias = kind == "internlm3" and config["bias"]
        for w, outs, ins in (("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)):
            linear(f"{at}.mlp.{w}_proj", outs, ins, mlp_bias)
        tensors[f"{at}.input_layernorm.weight"] = draw(HIDDEN, around=1.0)
        tensors[f"{at}.post_attention_layernorm.weight"] = draw(HIDDEN, around=1.0)
        if kind == "internlm":
            tensors[f"{at}.self_attn.rotary_emb.inv_freq"] = 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim)  # type: ignore[operator, assignment]
    tensors["model.norm.weight"] = draw(HIDDEN, around=1.0)
    linear("output" if second else "lm_head", config["vocab_size"], HIDDEN)

    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    where = {tensor: names[i * shards // len(tensors)] for i, tensor in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
    return folder


# ------------------------------------------------------------------------------------------- the independent reference


def reference(config: dict, tensors: dict[str, Tensor], ids: Tensor, lora: dict | None = None) -> Tensor:
    """Give InternLM's logits [T, V] for one document ids [T]; every layer written out, loops over heads.

    ``lora``: module name -> (A, B, scale) on the published names.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", torch.zeros(()))
        if lora and name in lora:
            a, b, scale = lora[name]
            y = y + scale * (x @ a.T @ b.T)
        return y

    def norm(name: str, x: Tensor) -> Tensor:
        return tensors[f"{name}.weight"] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]))

    kind, heads = config["model_type"], config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or config["hidden_size"] // heads
    length, trained = len(ids), config["max_position_embeddings"]
    rotary = config.get("rotary", {})
    base = float(rotary.get("base", config.get("rope_theta", 10000)))
    scaling = config.get("rope_scaling") or {}
    factor = scaling.get("factor") if scaling else rotary.get("scaling_factor", 1.0)
    if length > trained and "dynamic" in (rotary.get("type"), scaling.get("type"), scaling.get("rope_type")):
        base *= (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))
    frequency = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    cos, sin = angle.cos().float(), angle.sin().float()

    def rotate(x: Tensor) -> Tensor:  # [T, dim]: the first half of the numbers with the second
        left, right = x[:, : dim // 2], x[:, dim // 2 :]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    second = kind == "internlm2"
    x = tensors["model.tok_embeddings.weight" if second else "model.embed_tokens.weight"][ids]
    future = torch.full((length, length), -math.inf).triu(1)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = norm(f"{at}.{'attention_norm' if second else 'input_layernorm'}", x)
        queries, keys, values = [], [], []
        if second:  # heads in wqkv: the queries of a group, its key, its value; then the next group
            each = linear(f"{at}.attention.wqkv", h).view(length, -1, dim).unbind(1)
            step = heads // kv + 2
            for group in range(kv):
                mine = each[group * step : (group + 1) * step]
                queries += mine[:-2]
                keys.append(mine[-2])
                values.append(mine[-1])
        else:
            for proj, into in (("q", queries), ("k", keys), ("v", values)):
                into += linear(f"{at}.self_attn.{proj}_proj", h).view(length, -1, dim).unbind(1)
        out = []
        for head, query in enumerate(queries):
            group = head // (heads // kv)
            scores = rotate(query) @ rotate(keys[group]).T / math.sqrt(dim) + future
            out.append(scores.softmax(-1) @ values[group])
        x = x + linear(f"{at}.attention.wo" if second else f"{at}.self_attn.o_proj", torch.cat(out, -1))
        h = norm(f"{at}.{'ffn_norm' if second else 'post_attention_layernorm'}", x)
        mlp = f"{at}.feed_forward" if second else f"{at}.mlp"
        gate, up, down = ("w1", "w3", "w2") if second else ("gate_proj", "up_proj", "down_proj")
        x = x + linear(f"{mlp}.{down}", silu(linear(f"{mlp}.{gate}", h)) * linear(f"{mlp}.{up}", h))
    return linear("output" if second else "lm_head", norm("model.norm", x))
