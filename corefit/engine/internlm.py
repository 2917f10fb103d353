"""InternLM 1, 2 and 3 as what they are, the LLaMA architecture: none of the code beside their weights is run.

InternLM 1 and 3 have LLaMA's tensors under LLaMA's names. InternLM 2 and 2.5 have names of their own, and q, k and v in
one matrix, ``wqkv``: for each key-value head the rows of its query heads, then its key's, then its value's. ``Layout``
translates tensors and LoRA adapters into LLaMA's names and back, bit for bit.

Source: modeling_internlm.py and configuration_internlm.py of InternLM/InternLM, modeling_internlm2.py and
modeling_internlm3.py of InternLM/xtuner; the published folders carry copies of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from corefit.errors import ModelError

KINDS = ("internlm", "internlm2", "internlm3")
"""What ``model_type`` in config.json says."""
QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA = {
    "tok_embeddings": "embed_tokens",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "wo": "o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
    "output": "lm_head",
}
"""InternLM 2's word for a part of a name -> LLaMA's."""
_PUBLISHED = {llama: own for own, llama in _LLAMA.items()} | dict.fromkeys(QKV, "wqkv")
_KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)
"""Keys that mean the same in LLaMA's config. Not ``pad_token_id``: torch never trains that token's embedding, and here
it is the token that ends an answer."""


# --------------------------------------------------------------------------------------------------------- loading


def load(config: Mapping[str, Any], files: Iterable[Path], base: str, **arguments: Any) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
    """Load a published folder as ``LlamaForCausalLM``.

    Args:
        config: the content of its config.json, ``model_type`` one of ``KINDS``.
        files: its safetensors files.
        base: what messages call it.
        arguments: for ``from_pretrained``: dtype, quantization_config, output_loading_info=True and others.

    Returns:
        The model and transformers' loading info. Files are mapped, not read; only ``wqkv`` is copied, a tenth of all.

    Raises:
        ModelError: a setting that LLaMA's architecture doesn't have.
    """
    from transformers import LlamaForCausalLM

    llama, layout = llama_config(config, base), layout_of(config)
    state: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state |= tensors if layout is None else layout.to_llama(tensors, base)
    model, info = LlamaForCausalLM.from_pretrained(None, config=llama, state_dict=state, **arguments)
    model.config.wqkv = layout and [layout.queries, layout.groups, layout.head_dim]
    return model, info


def _rope(config: Mapping[str, Any], base: str) -> tuple[float, dict[str, Any]]:
    """Give RoPE's base and its scaling. InternLM 1 has words of its own for them, transformers 5 has others."""
    settings = config.get("rope_parameters") or {}
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10_000)
    scaling = config.get("rope_scaling") or settings
    if "rotary" in config:
        rotary = config["rotary"]
        if rotary.get("type") not in ("origin", "dynamic"):
            raise ModelError(f"{base}: config.json: rotary type {rotary.get('type')!r}; known are origin and dynamic")
        theta = float(rotary.get("base", theta))
        if rotary["type"] == "dynamic":
            scaling = {"type": "dynamic", "factor": float(rotary.get("scaling_factor", 1.0))}
    return theta, scaling


def llama_config(config: Mapping[str, Any], base: str) -> Any:  # noqa: ANN401, a LlamaConfig
    """Give LLaMA's config for a published one."""
    from transformers import LlamaConfig

    theta, scaling = _rope(config, base)
    rope = {"rope_theta": theta, "rope_scaling": scaling or None}
    third = config["model_type"] == "internlm3"
    bias = bool(config.get("bias", config.get("mlp_bias", not third)))
    if third and bool(config.get("qkv_bias", config.get("attention_bias", False))) != bias:
        raise ModelError(f"{base}: config.json: bias and qkv_bias differ, which LLaMA's architecture doesn't have")
    kept = {key: config[key] for key in _KEPT if config.get(key) is not None}
    return LlamaConfig(**kept, attention_bias=bias, mlp_bias=third and bias, **rope)


# ----------------------------------------------------------------------------------------------- InternLM 2's layout


def published_name(name: str) -> str:
    """Give InternLM 2's name of LLaMA's tensor or module; of q, k and v it is the same.

    >>> published_name("model.layers.3.self_attn.q_proj.weight")
    'model.layers.3.attention.wqkv.weight'
    """
    return ".".join(_PUBLISHED.get(part, part) for part in name.split("."))


def llama_names(name: str) -> list[str]:
    """Give LLaMA's names, three for ``wqkv``, of InternLM 2's tensor or module.

    >>> llama_names("feed_forward.w3")
    ['mlp.up_proj']
    """
    parts = [_LLAMA.get(part, part) for part in name.split(".")]
    if "wqkv" not in parts:
        return [".".join(parts)]
    at = parts.index("wqkv")
    return [".".join([*parts[:at], one, *parts[at + 1 :]]) for one in QKV]


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """Give the layout of a base's tensors by its config.json; None where it has no other names than its model."""
    if config.get("model_type") != "internlm2":
        return None
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    return Layout(heads // groups, groups, config["hidden_size"] // heads)


def layout_of_folder(base: Path) -> Layout | None:
    """Give the same of a model folder."""
    return layout_of(json.loads((base / "config.json").read_bytes()))


def layout_in(model: Any) -> Layout | None:  # noqa: ANN401, a model or a PeftModel
    """Give the same of a loaded model."""
    sizes = getattr(model.config, "wqkv", None)
    return Layout(*sizes) if sizes else None


def llama_modules(model: Any, names: Iterable[str]) -> list[str]:  # noqa: ANN401
    """Give, sorted, the model's names of modules that somebody may call by InternLM 2's."""
    return sorted({new for name in names for new in (llama_names(name) if layout_in(model) else [name])})


def check_adapter(adapted: Any) -> None:  # noqa: ANN401, a PeftModel
    """Look whether ``adapter_to_published`` will be able to write an adapter.

    Raises:
        ModelError: rows of ``wqkv`` would have to be written whole, and not all of them are trained.
    """
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    whole = [published_name(name) for name in names if ".lora_A." not in name and ".lora_B." not in name]
    if layout_in(adapted) and any(whole.count(name) != 3 for name in whole if ".wqkv." in name):
        raise ModelError(
            "adapter: q_proj, k_proj and v_proj are one matrix, wqkv, in this base's files; modules_to_save, and "
            "targets with dora, can name all three or none"
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """How InternLM 2 puts q, k and v together."""

    queries: int
    """Query heads to a key-value head."""
    groups: int
    """Key-value heads."""
    head_dim: int

    def split(self, fused: Tensor, where: str) -> tuple[Tensor, Tensor, Tensor]:
        """Give the rows of q, k and v in ``wqkv``'s rows [groups * (queries + 2) * head_dim, ...]."""
        shape = (self.groups, self.queries + 2, self.head_dim)
        if len(fused) != math.prod(shape):
            raise ModelError(
                f"{where}: {len(fused)} rows, but config.json speaks of {self.queries * self.groups} query and "
                f"{self.groups} key-value heads of {self.head_dim}: they don't belong together"
            )
        by_group = fused.reshape(*shape, *fused.shape[1:])
        return by_group[:, :-2].flatten(0, 2), by_group[:, -2].flatten(0, 1), by_group[:, -1].flatten(0, 1)

    def fuse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Undo ``split``."""
        by_group = [rows.reshape(self.groups, -1, self.head_dim, *rows.shape[1:]) for rows in (q, k, v)]
        return torch.cat(by_group, dim=1).flatten(0, 2)

    def to_llama(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """Give tensors, those of an adapter too, by LLaMA's names."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            names = llama_names(name)
            if len(names) == 1 or ".lora_A." in name:  # A doesn't know the rows: q, k and v share it
                found |= dict.fromkeys(names, tensor)
            else:
                found |= zip(names, self.split(tensor, f"{where}: {name}"), strict=True)
        return found

    def each(self, change: Callable[[str, Tensor], Tensor], name: str, tensor: Tensor) -> Tensor:
        """Give a tensor after ``change(name, tensor)`` of what it is by LLaMA's names."""
        names = llama_names(name)
        parts = [tensor] if len(names) == 1 else self.split(tensor, name)
        changed = [change(*pair) for pair in zip(names, parts, strict=True)]
        return changed[0] if len(names) == 1 else self.fuse(*changed)

    def to_published(
        self, names: Mapping[str, str], tensor_of: Callable[[str], Tensor]
    ) -> tuple[dict[str, str], Callable[[str], Tensor]]:
        """Give, of a whole model, names and what gives a tensor by them, for the published names.

        ``names``: LLaMA's name -> what ``tensor_of`` is asked for. Each ``wqkv`` is made when it is asked for.
        """

        def published(name: str) -> Tensor:
            parts = [tensor_of(names[own]) for own in llama_names(name)]
            return parts[0] if len(parts) == 1 else self.fuse(*parts)

        return {name: name for name in map(published_name, names)}, published

    def adapter_to_llama(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Give adapter_config.json and tensors of an adapter on the published names, for LLaMA's; it acts the same.

        What ``adapter_to_published`` made comes back as it was; of a ``wqkv`` that was trained as one, q, k and v share
        A.
        """
        config, found, r = dict(config), self.to_llama(tensors, where), config["r"]
        for key in ("target_modules", "modules_to_save"):
            if isinstance(config.get(key), list):
                config[key] = [new for name in config[key] for new in llama_names(name)]
        if isinstance(tokens := config.get("trainable_token_indices"), dict):  # else a list: of the embeddings
            config["trainable_token_indices"] = {llama_names(name)[0]: ids for name, ids in tokens.items()} or None
        folded = [b for name, b in tensors.items() if ".wqkv.lora_B." in name]
        if _patterns(config).items() <= config.items() and all(self._is_folded(b, r) for b in folded):
            config |= {"rank_pattern": {}, "alpha_pattern": {}}
            for i, part in enumerate(QKV):
                for name, tensor in found.items():
                    if f".{part}.lora_A." in name:
                        found[name] = tensor[i * r : (i + 1) * r]
                    elif f".{part}.lora_B." in name:
                        found[name] = tensor[:, i * r : (i + 1) * r]
        for key in ("rank_pattern", "alpha_pattern"):
            config[key] = {new: value for name, value in (config.get(key) or {}).items() for new in llama_names(name)}
        return config, found

    def adapter_to_published(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Give adapter_config.json and tensors of a LoRA adapter, for the published names; it acts the same.

        q, k and v of rank r become ``wqkv`` of rank 3r: their A's are stacked, each B has its own rows and columns.
        What of the three is not adapted is zero.
        """
        config = dict(config)
        for key in ("target_modules", "modules_to_save"):
            if config.get(key):
                config[key] = sorted({published_name(name) for name in config[key]})
        if tokens := config.get("trainable_token_indices"):
            config["trainable_token_indices"] = {published_name(name): ids for name, ids in tokens.items()}
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part = next((part for part in name.split(".") if part in QKV), "")
            parts.setdefault(published_name(name), {})[part] = tensor
        found = {name: of[""] if "" in of else self._fold(name, of) for name, of in parts.items()}
        return config | (_patterns(config) if any(".wqkv.lora_A." in name for name in found) else {}), found

    def _fold(self, name: str, of: Mapping[str, Tensor]) -> Tensor:
        if ".lora_A." in name:
            none = torch.zeros_like(next(iter(of.values())))
            return torch.cat([of.get(part, none) for part in QKV])
        if ".lora_B." in name:
            rows = (self.groups * self.queries * self.head_dim, *[self.groups * self.head_dim] * 2)
            any_b = next(iter(of.values()))
            blocks = [of.get(part, any_b.new_zeros(n, any_b.shape[1])) for part, n in zip(QKV, rows, strict=True)]
            return self.fuse(*torch.block_diag(*blocks).split(rows))  # type: ignore[no-untyped-call]
        return self.fuse(*(of[part] for part in QKV))

    def _is_folded(self, b: Tensor, r: int) -> bool:
        if b.shape[1] != 3 * r:
            return False
        parts = self.split(b, "lora_B")
        blocks = {part: rows[:, i * r : (i + 1) * r] for i, (part, rows) in enumerate(zip(QKV, parts, strict=True))}
        return torch.equal(self._fold(".lora_B.", blocks), b)


def _patterns(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give what adapter_config.json says of three adapters in one: the scale, alpha / r or alpha / sqrt(r), stays."""
    times = math.sqrt(3) if config.get("use_rslora") else 3
    return {"rank_pattern": {"wqkv": 3 * config["r"]}, "alpha_pattern": {"wqkv": times * config["lora_alpha"]}}


@contextmanager
def llama_adapter(model: Any, adapter: Path) -> Iterator[Path]:  # noqa: ANN401, a loaded base
    """Give a folder with an adapter for the model's names: ``adapter`` itself, or one that goes with the block."""
    layout = layout_in(model)
    if layout is None:
        yield adapter
        return
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    config, tensors = layout.adapter_to_llama(config, load_file(adapter / "adapter_model.safetensors"), str(adapter))
    with TemporaryDirectory(prefix="corefit-") as folder:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        save_file({name: t.clone() for name, t in tensors.items()}, Path(folder) / "adapter_model.safetensors")
        yield Path(folder)
