"""Rotary positions that follow a length (``dynamic``, ``longrope``): that of each document, not of all that is read.

transformers takes the longest position of a call, so a long document of a pack would turn the frequencies of its
neighbours; and a ``dynamic`` one keeps the longest it has seen, which a resumed run wouldn't know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("dynamic", "longrope")


def follow_documents(model: nn.Module) -> None:
    """Let every such rotary embedding of a model give each document what it would get alone."""
    for module in model.modules():
        if any(kind in KINDS for kind in _kinds(module).values()):
            module.forward = partial(_by_document, module, module.forward)


def trained_length(model: nn.Module, kind: str) -> float:
    """Give the length in tokens beyond which frequencies of this kind turn; infinite: the model has none."""
    found = [_trained(m, layer) for m in model.modules() for layer, k in _kinds(m).items() if k == kind]
    return min(found, default=math.inf)


def _kinds(module: nn.Module) -> Mapping[str | None, str]:
    """Give the kinds of a rotary embedding by the type of layer; None: of all layers."""
    kinds: Any = getattr(module, "rope_type", None)
    return kinds if isinstance(kinds, dict) else {None: kinds} if isinstance(kinds, str) else {}


def _trained(rotary: Any, layer_type: str | None) -> int:  # noqa: ANN401
    """Give the length in tokens up to which frequencies are those of training."""
    if _kinds(rotary)[layer_type] == "dynamic":
        return int(rotary.original_max_seq_len)
    settings = rotary.config.rope_parameters
    return int((settings if layer_type is None else settings[layer_type])["original_max_position_embeddings"])


def _by_document(
    rotary: Any,  # noqa: ANN401
    plain: Callable[..., Any],
    x: Tensor,
    position_ids: Tensor,
    layer_type: str | None = None,
) -> Any:  # noqa: ANN401
    """Give cosines and sines, or what the model has for them, [B, T, ...]; a document begins at each position 0."""
    kind, more = _kinds(rotary)[layer_type], {} if layer_type is None else {"layer_type": layer_type}
    if kind not in KINDS:
        return plain(x, position_ids, **more)
    trained, prefix = _trained(rotary, layer_type), f"{layer_type}_" if layer_type else ""

    def turned(positions: Tensor) -> Any:  # noqa: ANN401
        if kind == "dynamic":  # as if nothing had been read before
            setattr(rotary, f"{prefix}max_seq_len_cached", trained)
            setattr(rotary, f"{prefix}inv_freq", getattr(rotary, f"{prefix}original_inv_freq").to(x.device, copy=True))
        return plain(x, positions, **more)

    if position_ids.shape[-1] <= trained:  # a single document, or none that is longer
        return turned(position_ids)
    lengths = document_lengths(position_ids)
    turns = lengths.clamp(min=trained) if kind == "dynamic" else lengths.gt(trained).long()
    found: Any = None
    for turn in torch.unique(turns).tolist():
        here = turns == turn
        new = turned(position_ids.where(here, 0))
        found = new if found is None else _where(here[..., None], new, found)
    return found


def document_lengths(position_ids: Tensor) -> Tensor:
    """Give of every slot, int64 [B, T], how many positions its document has."""
    document = (position_ids == 0).cumsum(-1)
    longest = position_ids.new_zeros(len(position_ids), position_ids.shape[-1] + 1)
    return longest.scatter_reduce(1, document, position_ids + 1, "amax").gather(1, document)


def _where(here: Tensor, new: Any, old: Any) -> Any:  # noqa: ANN401, a tensor or a tuple of them
    if isinstance(new, tuple):
        return tuple(_where(here, a, b) for a, b in zip(new, old, strict=True))
    return torch.where(here, new, old)
