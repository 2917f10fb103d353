"""Operations that keep less for backward, and make fewer copies, than what they stand for.

Attention on a CPU, norms, MLPs, LoRA.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 256
"""Queries that attention with a window works on at once."""
PADDED = 32
"""A document's slots are made a multiple of this there: oneDNN compiles, and keeps, kernels for every size."""
SHORT = 384
"""Slots of a document up to which its attention is worked out in fp32: in 16 bits its many small products, each a call
of oneDNN, take longer (backward 3.0 ms against 1.3 for 128 slots, 9 heads of 64, one core of an AMD EPYC)."""
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""What torch's own attention runs on a CPU where it can; they know grouped queries."""
FUSED = {
    ("peft.tuners.lora.layer.Linear", "torch.nn.modules.linear.Linear"),
    ("peft.tuners.lora.bnb.Linear4bit", "bitsandbytes.nn.modules.Linear4bit"),
}
"""LoRA layers and what they are on, as ``LoraLinear`` computes them."""


def product_dtype(x: Tensor) -> torch.dtype:
    """Give what x is multiplied in: autocast's format; without autocast its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class RMSNorm(torch.autograd.Function):
    """``weight * x / sqrt(mean(x^2) + epsilon)`` along the last dimension, in fp32, given in the format of x.

    Where the weight is fp32 transformers gives fp32, which every layer that reads it would convert, and keep, anew.
    Only x is kept for backward.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # noqa: ANN401
        """Take x [..., H], weight fp32 [H]."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Give the gradient of x; the weight is frozen."""
        x, weight, scale = ctx.saved_tensors
        normed, grad = x * scale, grad * weight
        grad.sub_(normed.mul_((grad * normed).mean(-1, keepdim=True))).mul_(scale)
        return grad.to(x.dtype), None, None


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up``; what the silu gives is made again in backward.

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # noqa: ANN401
        """Take two tensors of one shape."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Give the gradients of both."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def fuse_mlp(module: Any) -> None:  # noqa: ANN401, a module
    """Give an MLP with a gate ``SwiGLU`` in its forward, where that computes the same."""
    x, parts = torch.linspace(-3, 3, 16), dict(module.named_children())
    if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return
    stand_in = SimpleNamespace(gate_proj=x.mul, up_proj=x.add, down_proj=x.sub, act_fn=module.act_fn)
    try:
        same = torch.allclose(type(module).forward(stand_in, x), x - F.silu(x * x) * (x + x))
    except (AttributeError, TypeError):
        return  # it does more
    if same:
        module.forward = functools.partial(_mlp, module)


def _mlp(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    inner = SwiGLU.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
    return cast("Tensor", module.down_proj(inner))


def fuse_norm(module: Any) -> None:  # noqa: ANN401, a module
    """Give a norm with a frozen fp32 weight ``RMSNorm`` for its forward, where that computes the same."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return
    with torch.no_grad():
        x = torch.linspace(-1, 2, 2 * len(weight), device=weight.device).view(2, -1)
        try:
            same = torch.allclose(module(x), RMSNorm.apply(x, weight, epsilon), rtol=1e-5, atol=1e-6)  # type: ignore[no-untyped-call]
        except (TypeError, RuntimeError):
            return  # it takes more than one tensor
    if same:
        module.forward = functools.partial(_norm, module, epsilon)


def _norm(module: Any, epsilon: float, x: Tensor) -> Tensor:  # noqa: ANN401
    if module.weight.requires_grad:
        return cast("Tensor", type(module).forward(module, x))
    if x.is_cuda:  # one kernel in place of eight; the weight has no more digits than its base had
        return F.rms_norm(x, module.weight.shape, module.weight.to(x.dtype), epsilon)
    fused: Tensor = RMSNorm.apply(x, module.weight, epsilon)  # type: ignore[no-untyped-call]
    return fused


class DocumentAttention(torch.autograd.Function):
    """Causal attention inside each document, on a CPU: scores and softmax in fp32, the rest in the format of q.

    All of a short one (``SHORT``) in fp32, at least.

    To be called without autocast. Keeps its inputs, its output, and a number for each query and head. Torch's own
    function would keep each document's output once more, and for a head whose values have another width than its keys
    it makes scores in 16 bits.

    Source: Dao et al. 2022, arXiv:2205.14135.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: list[int],
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Take q [S, H, D], k [S, K, D], v [S, K, E], where documents begin and end, and how many slots one sees."""
        if bounds[0] or bounds[-1] != len(q):
            raise ValueError(f"documents from {bounds[0]} to {bounds[-1]} in {len(q)} slots")
        width, sums = max(q.shape[-1], v.shape[-1]), list[Tensor]()
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for rows, seen, mask, inner in _pieces(bounds, window, q.dtype):
            given = [_by_head(x[at], width, inner) for x, at in ((q, rows), (k, seen), (v, seen))]
            result, total = FLASH(*given, 0.0, mask is None, attn_mask=mask, scale=scale)
            out[rows] = _by_slot(result, out[rows])
            sums.append(total)
        ctx.save_for_backward(q, k, v, out)
        ctx.given = bounds, scale, window, sums
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Give the gradients of q, k and v."""
        bounds, scale, window, sums = ctx.given
        q, k, v, out = ctx.saved_tensors
        width, grads = max(q.shape[-1], v.shape[-1]), [torch.zeros_like(x) for x in (q, k, v)]
        for (rows, seen, mask, inner), total in zip(_pieces(bounds, window, q.dtype), sums, strict=True):
            tensors = ((grad, rows), (q, rows), (k, seen), (v, seen), (out, rows))
            given = [_by_head(x[at], width, inner) for x, at in tensors]
            parts = FLASH_BACKWARD(*given, total, 0.0, mask is None, attn_mask=mask, scale=scale)
            for whole, part, at in zip(grads, parts, (rows, seen, seen), strict=True):
                whole[at] += _by_slot(part, whole[at])
        return *grads, None, None, None


def _by_head(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Give [L, H, D] as [1, H, P, width], with zeros where there was nothing: they change no score and no value.

    P is a multiple of ``PADDED``. No slot of a document sees the padding behind it.
    """
    return F.pad(x.to(dtype), (0, width - x.shape[-1], 0, 0, 0, -len(x) % PADDED))[None].transpose(1, 2)


def _by_slot(x: Tensor, like: Tensor) -> Tensor:
    """Undo ``_by_head``."""
    return x[0].transpose(0, 1)[: len(like), :, : like.shape[-1]]


def _pieces(
    bounds: list[int], window: int | None, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor | None, torch.dtype]]:
    """Give the queries of each call, the slots that they see, what hides some of them, 0 or -inf, padded, and a format.

    Without a window a call takes a document, with one ``BLOCK`` queries of it. No mask: each query sees those before.
    """
    for begin, end in pairwise(bounds):
        if not window:
            yield slice(begin, end), slice(begin, end), None, _format(end - begin, dtype)
            continue
        for first in range(begin, end, BLOCK):
            last, oldest = min(first + BLOCK, end), max(begin, first - window + 1)
            inner = _format(last - oldest, dtype)
            queries, keys = (torch.arange(n, last + (n - last) % PADDED) for n in (first, oldest))
            ages = queries[:, None] - keys
            mask = torch.zeros(ages.shape, dtype=inner).masked_fill_((ages < 0) | (ages >= window), -torch.inf)
            yield slice(first, last), slice(oldest, last), mask, inner


def _format(slots: int, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if slots <= SHORT else dtype


class LoraLinear(torch.autograd.Function):
    """``x @ weight.T + bias + scale * dropped @ a.T @ b.T``, all of it in the dtype of x; the weight may be of 4 bits.

    peft makes an fp32 copy of x, and two tensors as large as the output, for every layer; this makes none of them, and
    keeps for backward what it can't do without.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        state: Any = None,  # noqa: ANN401
    ) -> Tensor:
        """Take x [..., I], after dropout too (None: there is none), weight [O, I], a [r, I], b [O, r].

        ``state``: what bitsandbytes packed the weight with; None: it did not.
        """
        flat = x.reshape(-1, x.shape[-1])
        inner = flat if dropped is None else dropped.reshape(flat.shape)
        a, b = a.to(x.dtype), b.to(x.dtype) * scale
        low = inner @ a.T
        if state is not None:
            out = import_module("bitsandbytes").matmul_4bit(flat, weight, quant_state=state, bias=bias)
        else:
            out = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        out.addmm_(low, b.T)
        ctx.save_for_backward(inner, low, weight, a, b)
        ctx.scale, ctx.apart, ctx.shape, ctx.state = scale, dropped is not None, x.shape, state
        return cast("Tensor", out.view(*x.shape[:-1], len(b)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Give the gradients of x, dropped, a and b; the weight is frozen."""
        inner, low, weight, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = grad @ b
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            if ctx.state is not None:
                weight = import_module("bitsandbytes.functional").dequantize_4bit(weight, ctx.state).to(grad.dtype)
            grad_x = grad @ weight
            if not ctx.apart:
                grad_x.addmm_(grad_low, a)
            grad_x = grad_x.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_dropped = (grad_low @ a).view(ctx.shape)
        grad_a, grad_b = (grad_low.T @ inner).float(), (grad.T @ low).float().mul_(ctx.scale)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None, None


def fuse_lora(model: nn.Module) -> None:
    """Give LoRA layers on linears, plain or of 4 bits, ``LoraLinear`` for their forward, where that does the same."""
    for layer in model.modules():
        kind, base = type(layer), getattr(layer, "base_layer", None)
        pair = (f"{kind.__module__}.{kind.__name__}", f"{type(base).__module__}.{type(base).__name__}")
        if pair in FUSED and not layer.lora_variant:
            layer.forward = functools.partial(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    base, names = layer.base_layer, layer.active_adapters
    dtype = product_dtype(x)  # a weight of which each rank has a share doesn't know its state, its layer does
    state = getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)
    plain = layer.disable_adapters or layer.merged or args or kwargs or names != ["default"] or layer.lora_variant
    held = base.weight.dtype if state is None else base.compute_dtype
    packed = getattr(state, "packing_format_for_cpu", False)  # for inference
    if plain or packed or held != dtype or base.weight.requires_grad or layer.lora_bias["default"]:
        return cast("Tensor", type(layer).forward(layer, x, *args, **kwargs))
    x, dropout = x.to(dtype), layer.lora_dropout["default"]
    dropped = dropout(x) if layer.training and getattr(dropout, "p", 0) else None
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    bias = None if base.bias is None else base.bias.to(dtype)
    fused: Tensor = LoraLinear.apply(x, dropped, base.weight, bias, a, b, layer.scaling["default"], state)  # type: ignore[no-untyped-call]
    return fused
