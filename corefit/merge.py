"""Base model + LoRA adapter -> one plain Hugging Face folder, file by file, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corefit import terminal
from corefit.errors import ModelError

_OTHER_LORA = (
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)
"""Settings under which peft computes something else than W + scale * B @ A with one scale."""


def merge(
    target: str | Path, out: str | Path, *, model: str | None = None, say: Callable[[str], None] = terminal.say
) -> Path:
    """Write base + adapter into the new folder ``out``: the base's files with W + scale * B A, computed in fp32.

    Args:
        target: a run folder or an adapter folder.
        out: a folder that is empty or not there.
        model: the base model, where it isn't where training found it.
        say: takes notices, one line each.

    Raises:
        ModelError: no adapter or base there, a 4-bit base, an adapter that is not plain LoRA, or one of another base.
    """
    import torch
    from safetensors import safe_open

    from corefit.chat import find
    from corefit.engine.export import (
        Provenance,
        base_files,
        read_header,
        rewrite_weights,
        serving_files,
        weight_files,
        with_keys,
        write_files,
        written_aside,
    )
    from corefit.engine.model import model_fingerprint

    found = find(target, model=model, say=say)
    if found.adapter is None:
        raise ModelError(f"{target}: a model, not an adapter: there is nothing to merge")
    base, config = found.base, _adapter_config(found.adapter)
    base_config = json.loads((base / "config.json").read_bytes())
    if "quantization_config" in base_config:
        raise ModelError(f"{base}: its weights are stored quantised; merging needs the unquantised base, --model PATH")
    factors: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    with safe_open(found.adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118, not a mapping
            name = key.removeprefix("base_model.model.")
            module, _, factor = name.partition(".lora_")
            if factor:
                factors.setdefault(f"{module}.weight", {})[factor.removesuffix(".weight")] = file.get_tensor(key)
            else:
                whole[name] = file.get_tensor(key)

    names = {name for path in weight_files(base) for name in read_header(path)[0]}
    added, changes = {}, {}
    if base_config.get("tie_word_embeddings") and "lm_head.weight" not in names:
        # An adapter acts on the embedding or on the head, not on both, so a tied pair becomes two.
        tied = [name for name in names if name.endswith("embed_tokens.weight")]
        if tied and {tied[0], "lm_head.weight"} & {*factors, *whole}:
            added, changes = {"lm_head.weight": tied[0]}, {"tie_word_embeddings": False}
    unknown = sorted({*factors, *whole} - names - set(added))
    if unknown:
        raise ModelError(
            f"{found.adapter}: changes {unknown[0]}, which {base} doesn't have: it belongs to another base"
        )

    def change(name: str, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name in whole:
            return whole[name]
        if name not in factors:
            return read()
        pair = factors[name]
        embedding = "embedding_A" in pair
        down, up = (pair[f"embedding_{m}" if embedding else m].float() for m in "AB")
        delta = (up @ down).T if embedding else up @ down
        weight = read().float()
        if delta.shape != weight.shape:
            raise ModelError(f"{found.adapter}: {name} has another shape in {base}: it belongs to another base")
        rank = down.shape[0]
        alpha = _alpha(config, name.removesuffix(".weight"))
        weight.add_(delta, alpha=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
        if "magnitude_vector" in pair:  # DoRA: every row has a length of its own
            weight *= (pair["magnitude_vector"].float() / weight.norm(dim=1))[:, None]
        return weight

    tokenizer = found.tokenizer()
    facts = Provenance(
        base=found.name,
        base_folder=base,
        fingerprint=model_fingerprint(str(base)),
        tokenizer_files=tokenizer.files(),
        template=found.facts.get("template", "tokenizer"),
        chat_template=tokenizer.chat_template,
        stop=tuple(found.facts.get("stop", ())),
        stop_ids=tuple(found.stop_ids(tokenizer)),
        supervise=found.facts.get("supervise", "all"),
        quantizer=found.facts.get("quantizer", "none"),
    )
    with written_aside(Path(out)) as folder:
        files = base_files(base) | serving_files(facts, "model")
        write_files(folder, files | {"config.json": with_keys(files["config.json"], changes)})
        rewrite_weights(base, folder, change, added)
    return Path(out)


def _alpha(config: dict[str, Any], module: str) -> float:
    """Give a module's alpha. Source: peft 0.21, ``get_pattern_key``, for keys that are names."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    own = (alpha for key, alpha in patterns.items() if f".{module}".endswith(f".{key}"))
    return float(next(own, config["lora_alpha"]))


def _adapter_config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_bytes())
    odd = [key for key in _OTHER_LORA if config.get(key)]
    if not all(key.replace(".", "").isidentifier() for key in config.get("alpha_pattern") or {}):
        odd.append("alpha_pattern")  # peft takes its keys for regular expressions
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        odd.append("init_lora_weights")  # the others move a part of the base's weights into the adapter
    if odd:
        raise ModelError(f"{path}: {odd[0]} is set; only plain LoRA can be merged, peft's merge_and_unload may do it")
    return config
