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

BLOCK = 128
"""Slots whose queries attention works on at once: their scores stay in the cache, few are made that are not needed."""
PADDED = 32
"""A document's slots are made a multiple of this there: oneDNN compiles, and keeps, a kernel for every size."""
FUSED = {
    ("peft.tuners.lora.layer.Linear", "torch.nn.modules.linear.Linear"),
    ("peft.tuners.lora.bnb.Linear4bit", "bitsandbytes.nn.modules.Linear4bit"),
}
"""LoRA layers and what they are on, as ``LoraLinear`` computes them."""


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
    out: Tensor = module.down_proj(SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-untyped-call]
    return out


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
        out: Tensor = type(module).forward(module, x)
        return out
    if x.is_cuda:  # one kernel in place of eight; the weight has no more digits than its base had
        return F.rms_norm(x, module.weight.shape, module.weight.to(x.dtype), epsilon)
    fused: Tensor = RMSNorm.apply(x, module.weight, epsilon)  # type: ignore[no-untyped-call]
    return fused


class BlockAttention(torch.autograd.Function):
    """Causal attention inside each document, ``BLOCK`` queries at a time, on a CPU: scores and softmax in fp32.

    The rest is in the format of q; to be called without autocast. What flash attention gives, made of large products:
    0.6 to 0.7 of the time of torch's own in fp32 at documents of 500 tokens, 1.15 of it at 64, several times of it
    below 16. Keeps its inputs alone.

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
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for begin, end in pairwise(bounds):
            queries, keys, values = (_by_head(x[begin:end], k.shape[1]) for x in (q, k, v))
            wide, across = queries.float() * scale, keys.float().mT
            result = values.new_empty(*queries.shape[:2], values.shape[-1])
            for rows, seen, mask in _blocks(keys.shape[1], q.shape[1] // k.shape[1], window):
                p = _probabilities(wide[:, rows], across[..., seen], mask).to(v.dtype)
                result[:, rows] = torch.bmm(p, values[:, seen])
            out[begin:end] = _by_slot(result, out[begin:end])
        ctx.save_for_backward(q, k, v)
        ctx.given = bounds, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Give the gradients of q, k and v."""
        q, k, v = ctx.saved_tensors
        bounds, scale, window = ctx.given
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for begin, end in pairwise(bounds):
            queries, keys, values, given = (_by_head(x[begin:end], k.shape[1]) for x in (q, k, v, grad))
            wide, across, weighed, scaled = queries.float() * scale, keys.float().mT, values.mT, keys * scale
            grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros(keys.shape), torch.zeros(values.shape)
            for rows, seen, mask in _blocks(keys.shape[1], q.shape[1] // k.shape[1], window):
                p = _probabilities(wide[:, rows], across[..., seen], mask).to(v.dtype)
                grad_v[:, seen] += torch.bmm(p.mT, given[:, rows])
                grad_p = torch.bmm(given[:, rows], weighed[..., seen])
                grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
                grad_q[:, rows] = torch.bmm(grad_s, scaled[:, seen])
                grad_k[:, seen] += torch.bmm(grad_s.mT, queries[:, rows])
            for whole, part in zip(grads, (grad_q, grad_k.mul_(scale), grad_v), strict=True):
                whole[begin:end] = _by_slot(part, whole[begin:end])
        return *grads, None, None, None


def _by_head(x: Tensor, groups: int) -> Tensor:
    """Give [L, H, D] as [groups, P * H / groups, D]: the rows that a group of heads has, slot by slot, P >= L; a copy.

    P is a multiple of ``PADDED``; the rest is 0.
    """
    slots, heads, width = x.shape
    out = x.new_empty(groups, -(-slots // PADDED) * PADDED, heads // groups, width)
    out[:, :slots] = x.view(slots, groups, heads // groups, width).transpose(0, 1)
    out[:, slots:] = 0
    return out.flatten(1, 2)


def _by_slot(x: Tensor, like: Tensor) -> Tensor:
    """Undo ``_by_head``."""
    slots, heads, width = like.shape
    return x.view(len(x), -1, heads // len(x), width)[:, :slots].transpose(0, 1).reshape(like.shape)


def _blocks(slots: int, shared: int, window: int | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Give of each block its rows, ``shared`` for a slot, the slots that it sees, and what hides the last of them.

    The mask [n, 1, m], 0 or -inf, is for the last m of the slots that are seen; no query of the block sees fewer.
    """
    for begin in range(0, slots, BLOCK):
        end = min(begin + BLOCK, slots)
        first = max(0, begin - window + 1) if window else 0
        ages = torch.arange(begin, end)[:, None] - torch.arange(first if window else begin, end)
        hidden = (ages < 0) | (ages >= window) if window else ages < 0
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]
        yield slice(begin * shared, end * shared), slice(first, end), mask


def _probabilities(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Give softmax(queries [K, R, D] @ keys [K, D, S] + mask)."""
    scores = torch.bmm(queries, keys)
    scores.view(len(scores), len(mask), -1, keys.shape[-1])[..., keys.shape[-1] - mask.shape[-1] :] += mask
    return torch.softmax(scores, -1)


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
    kind, state = x.device.type, getattr(base.weight, "quant_state", None)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    plain = layer.disable_adapters or layer.merged or args or kwargs or names != ["default"] or layer.lora_variant
    held = base.weight.dtype if state is None else base.compute_dtype
    packed = getattr(state, "packing_format_for_cpu", False)  # for inference
    if plain or packed or held != dtype or base.weight.requires_grad or layer.lora_bias["default"]:
        out: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return out
    x, dropout = x.to(dtype), layer.lora_dropout["default"]
    dropped = dropout(x) if layer.training and getattr(dropout, "p", 0) else None
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    bias = None if base.bias is None else base.bias.to(dtype)
    fused: Tensor = LoraLinear.apply(x, dropped, base.weight, bias, a, b, layer.scaling["default"], state)  # type: ignore[no-untyped-call]
    return fused
