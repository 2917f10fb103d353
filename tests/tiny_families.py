"""Tiny random models of every family that is tested, written as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import tiny
from tiny import write_tokenizer
from tiny_internlm import CONFIGS, write_internlm

SIZE = dict(tiny.SIZE, intermediate_size=96, pad_token_id=None)
DROPOUT = ("attn_pdrop", "resid_pdrop", "embd_pdrop")
EXPERTS: dict[str, object] = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)


class Family(NamedTuple):
    """One architecture."""

    models: str
    """What it is called, for the table in README.md."""
    kind: str
    """``model_type`` in config.json."""
    config: dict[str, object] = {}
    """What differs from ``SIZE``."""
    why: str = ""
    """Of a family that is refused."""


MLA: dict[str, object] = dict(
    kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, num_key_value_heads=4
)
DEEPSEEK = {**MLA, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
TURNS: dict[str, object] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES = [
    Family("LLaMA 1 to 3, Yi, Vicuna, DeepSeek LLM and Coder, SmolLM 1 and 2", "llama"),
    Family("InternLM 1", "internlm"),
    Family("InternLM 2, 2.5", "internlm2"),
    Family("InternLM 3", "internlm3"),
    Family("Qwen 1.5, 2, 2.5, DeepSeek-R1-Distill-Qwen", "qwen2"),
    Family("Qwen 3", "qwen3", {"head_dim": 16}),
    Family("Mistral, Zephyr", "mistral", {"sliding_window": 16}),
    Family("Ministral", "ministral", {"head_dim": 16, **TURNS}),
    Family("Gemma 1", "gemma", {"head_dim": 16}),
    Family("Gemma 2", "gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, **TURNS}),
    Family("Gemma 3 (text)", "gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, **TURNS}),
    Family("Phi 1.5, 2", "phi"),
    Family("Phi 3, 3.5, 4", "phi3", {"pad_token_id": 0}),
    Family("SmolLM 3", "smollm3", {"no_rope_layers": [1, 0]}),
    Family("GLM-4 9B", "glm", {"head_dim": 16, "pad_token_id": 0}),
    Family("GLM-4 0414", "glm4", {"head_dim": 16, "pad_token_id": 0}),
    Family("StarCoder", "gpt_bigcode", {"n_positions": 2048, "n_inner": 96, **dict.fromkeys(DROPOUT, 0.0)}),
    Family("StarCoder 2", "starcoder2", {"sliding_window": 16}),
    Family("Command R", "cohere", {"pad_token_id": 0, "logit_scale": 0.5}),
    Family("Command R7B, A", "cohere2", {"pad_token_id": 0, "logit_scale": 0.5, **TURNS}),
    Family("MiniCPM 3", "minicpm3", MLA),
    Family("OLMo 2", "olmo2"),
    Family("Granite 3", "granite", {"logits_scaling": 8.0}),
    Family("StableLM", "stablelm"),
    Family("ERNIE 4.5", "ernie4_5", {"head_dim": 16}),
    Family("Mixtral", "mixtral", EXPERTS),
    Family("Qwen 1.5 MoE", "qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    Family("Qwen 3 MoE", "qwen3_moe", {**EXPERTS, "head_dim": 16}),
    Family("OLMoE", "olmoe", EXPERTS),
    Family("DeepSeek V2", "deepseek_v2", DEEPSEEK),
    Family("DeepSeek V3, R1", "deepseek_v3", DEEPSEEK),
    Family("GLM-4.5", "glm4_moe", {**DEEPSEEK, "num_key_value_heads": 2, "head_dim": 16}),
]
REFUSED = [
    Family("Falcon", "falcon", why="documents would see each other"),
    Family("gpt-oss", "gpt_oss", {**EXPERTS, "head_dim": 16, "sliding_window": 16}, "documents would see each other"),
    Family("Falcon-H1", "falcon_h1", why="peft has no LoRA for Mamba"),
]
"""Families in which documents of a pack would see each other, or that peft can't adapt: a run stops before step 1."""


def write_family(folder: Path, family: Family, seed: int = 0) -> Path:
    """Write a tiny random model of a family, with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if family.kind in CONFIGS:
        return write_internlm(folder, family.kind)
    write_tokenizer(folder)
    config = AutoConfig.for_model(family.kind, **{**SIZE, **family.config})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # larger than the usual initialisation, so that a mistake shows in the logits
        for name, parameter in model.named_parameters():
            if "norm" not in name and "layernorm" not in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def table() -> str:
    """Give the table of README.md."""
    lines = ["| family | `model_type` | documents apart, mask, LoRA, merging |", "|---|---|---|"]
    for family in FAMILIES:
        partly = "tested; experts are not adapted" if set(EXPERTS) & set(family.config) else "tested"
        lines.append(f"| {family.models} | `{family.kind}` | {partly} |")
    lines += [f"| {family.models} | `{family.kind}` | refused before step 1: {family.why} |" for family in REFUSED]
    return "\n".join(lines)
