"""Operations that keep less for backward, and make fewer copies, than what they stand for: norms, MLPs, LoRA."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
    fused: Tensor = RMSNorm.apply(x, module.weight, epsilon)  # type: ignore[no-untyped-call]
    return fused


class LoraLinear(torch.autograd.Function):
    """``x @ weight.T + bias + scale * dropped @ a.T @ b.T``, all of it in the weight's dtype.

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
    ) -> Tensor:
        """Take x [..., I], after dropout too (None: there is none), weight [O, I], a [r, I], b [O, r]."""
        flat = x.reshape(-1, x.shape[-1])
        inner = flat if dropped is None else dropped.reshape(flat.shape)
        a, b = a.to(weight.dtype), b.to(weight.dtype) * scale
        low = inner @ a.T
        out = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        out.addmm_(low, b.T)
        ctx.save_for_backward(inner, low, weight, a, b)
        ctx.scale, ctx.apart, ctx.shape = scale, dropped is not None, x.shape
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Give the gradients of x, dropped, a and b; the weight is frozen."""
        inner, low, weight, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = grad @ b
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if not ctx.apart:
                grad_x.addmm_(grad_low, a)
            grad_x = grad_x.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_dropped = (grad_low @ a).view(ctx.shape)
        grad_a, grad_b = (grad_low.T @ inner).float(), (grad.T @ low).float().mul_(ctx.scale)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None


def fuse_lora(model: nn.Module) -> None:
    """Give every LoRA layer on a plain linear one ``LoraLinear`` for its forward, where that computes the same."""
    from peft.tuners.lora import Linear

    layers: list[Any] = [module for module in model.modules() if type(module) is Linear]
    for layer in layers:
        if type(layer.get_base_layer()) is nn.Linear and not layer.lora_variant:
            layer.forward = functools.partial(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    base, names = layer.base_layer, layer.active_adapters
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    plain = layer.disable_adapters or layer.merged or args or kwargs or names != ["default"] or layer.lora_variant
    if plain or base.weight.dtype != dtype or base.weight.requires_grad or layer.lora_bias["default"]:
        out: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return out
    x, dropout = x.to(dtype), layer.lora_dropout["default"]
    dropped = dropout(x) if layer.training and getattr(dropout, "p", 0) else None
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    fused: Tensor = LoraLinear.apply(x, dropped, base.weight, base.bias, a, b, layer.scaling["default"])  # type: ignore[no-untyped-call]
    return fused
