"""Operations that keep less for backward, and make fewer copies, than what they stand for.

Attention on a CPU, norms, MLPs, LoRA.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Method = TypeVar("Method", bound=Callable[..., Any])
BLOCK = 128
"""Queries that attention works on at once."""
SIZES = (*range(64, 1025, 64), *(2**n // 8 * eighths for n in range(11, 40) for eighths in range(5, 9)))
"""What there are padded to, a quarter apart at most: oneDNN compiles, and keeps, kernels for every size, a MiB each."""
SCORES = 2**21
"""Scores that exist at the same time, but for those of one head."""
KEPT = 4096
"""Slots of a micro-batch up to which its masks are kept, and those of the one before: 37 MB each at most, in fp32."""
MANY = 16
"""Rows from which on a weight is worth a copy in another format."""
FUSED = {
    ("peft.tuners.lora.layer.Linear", "torch.nn.modules.linear.Linear"),
    ("peft.tuners.lora.bnb.Linear4bit", "bitsandbytes.nn.modules.Linear4bit"),
}
"""LoRA layers and what they are on, as ``LoraLinear`` computes them."""


def product_dtype(x: Tensor) -> torch.dtype:
    """Give what x is multiplied in: autocast's format; without autocast its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def fast_dtype(kind: str, dtype: torch.dtype, rows: int = MANY) -> torch.dtype:
    """Give what ``rows`` of ``dtype`` are multiplied in: fp32 on a CPU that has no instructions for them.

    Torch's own products take 7 to 20 times as long there, but for the few rows of an answer.
    """
    if kind != "cpu" or dtype not in (torch.float16, torch.bfloat16) or rows < MANY:
        return dtype
    return dtype if dtype == torch.bfloat16 and cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX instructions."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # which torch may rename
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def without_autocast(method: Method) -> Method:
    """Make a method of a function of autograd's run without autocast, which would multiply in 16 bits what is fp32."""

    @functools.wraps(method)
    def run(ctx: Any, x: Tensor, *more: Any) -> Any:  # noqa: ANN401
        if not torch.is_autocast_enabled(x.device.type):
            return method(ctx, x, *more)
        with torch.autocast(x.device.type, enabled=False):
            return method(ctx, x, *more)

    return cast("Method", run)


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
    """Causal attention inside each document, on a CPU: scores and softmax in fp32, what follows in ``fast_dtype``.

    Keeps its inputs alone. Torch's own function goes forward, a document at a time. Backward, and with a window, this
    works on ``BLOCK`` queries at a time, whatever documents they are of, and on the slots from where the first of these
    begins; what a query doesn't see has a share of 0.0 in what it gets. Torch's own takes longer for most lengths (see
    ``benchmarks/LOG.md``), and in 16 bits its gradients are less exact.
    """

    @staticmethod
    @without_autocast
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
        ctx.save_for_backward(q, k, v)
        ctx.given = bounds, scale, window
        dtype, (q, k, v) = q.dtype, _fast(q, k, v)
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        if window is None and v.shape[-1] == q.shape[-1]:  # else torch's would keep all scores
            for document in map(slice, bounds, bounds[1:]):
                q_, k_, v_ = (x[document].transpose(0, 1)[None] for x in (q, k, v))
                got = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, scale=scale, enable_gqa=True)
                out[document] = got[0].transpose(0, 1)
            return out.to(dtype)
        for at, seen, mask in _blocks(bounds, window, q, k):
            keys, values = (_by_head(x[seen], mask.shape[1]) for x in (k, v))
            shares = _shares(_by_head(q[at], mask.shape[0], len(keys)), keys, mask, scale)
            out[at] = _by_slot(torch.bmm(shares.to(q.dtype), values), out[at])
        return out.to(dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Give the gradients of q, k and v."""
        bounds, scale, window = ctx.given
        dtype, (q, k, v, grad) = grad.dtype, _fast(*ctx.saved_tensors, grad)
        grad_q, wide = torch.empty_like(q), _wide(q)
        grad_k, grad_v = (torch.zeros(x.shape, dtype=wide).transpose(0, 1) for x in (k, v))
        for at, (slots, heads), mask in _blocks(bounds, window, q, k):
            seen, n = (slots, heads), slots.stop - slots.start
            keys, values = (_by_head(x[seen], mask.shape[1]) for x in (k, v))
            queries, given = (_by_head(x[at], mask.shape[0], len(keys)) for x in (q, grad))
            shares = _shares(queries, keys, mask, scale)
            grad_v[heads, slots] += torch.bmm(shares.to(q.dtype).mT, given)[:, :n]
            scores = torch.bmm(given, values.mT).to(wide)
            scores = torch._softmax_backward_data(scores, shares, -1, wide, grad_input=scores).to(q.dtype)
            grad_q[at] = _by_slot(torch.bmm(scores, keys), grad_q[at]).mul_(scale)
            grad_k[heads, slots] += torch.bmm(scores.mT, queries)[:, :n]
        grads = grad_q, *(x.transpose(0, 1) for x in (grad_k.mul_(scale), grad_v))
        return *(x.to(dtype) for x in grads), None, None, None


def _fast(*tensors: Tensor) -> list[Tensor]:
    return [x.to(fast_dtype(x.device.type, x.dtype)) for x in tensors]


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _by_head(x: Tensor, size: int, shared: int | None = None) -> Tensor:
    """Give [L, H, D] as [K, H / K * size, D], K ``shared`` or H; behind L are rows of zeros."""
    x = F.pad(x, (0, 0, 0, 0, 0, size - len(x))) if size > len(x) else x
    return x.view(size, shared or x.shape[1], -1, x.shape[-1]).permute(1, 2, 0, 3).flatten(1, 2)


def _by_slot(x: Tensor, like: Tensor) -> Tensor:
    """Undo ``_by_head``."""
    return x.reshape(like.shape[1], -1, like.shape[2]).transpose(0, 1)[: len(like)]


def _shares(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Give how much [K, H / K * P, P'] of what a query [K, H / K * P, D] gets is of each key [K, P', D]; 1 in all."""
    scores = torch.bmm(q.to(mask.dtype).mul(scale), k.to(mask.dtype).mT)
    scores.view(-1, *mask.shape).add_(mask)
    return torch.softmax(scores, -1, out=scores)


Block = tuple[tuple[slice, slice], tuple[slice, slice], Tensor]
"""Slots and heads of queries, slots and heads of keys that they see, and what hides some [P, P']: 0 or -inf."""


def _blocks(bounds: list[int], window: int | None, q: Tensor, k: Tensor) -> Iterable[Block]:
    """Give what attention works on at once."""
    given = tuple(bounds), window, q.shape[1], k.shape[1], _wide(q)
    return _kept_blocks(*given) if len(q) <= KEPT else _made_blocks(*given)


def _made_blocks(
    bounds: tuple[int, ...], window: int | None, heads: int, shared: int, dtype: torch.dtype
) -> Iterator[Block]:
    """P and P' are among ``SIZES``. Rows of padding see keys, so that they have no NaN to hand on."""
    ends, group, end = torch.tensor(bounds), heads // shared, bounds[-1]
    slots = torch.arange(2 * end + SIZES[0])
    together = [n for n in range(1, heads + 1) if heads % n == 0 and (group % n == 0 or n % group == 0)]
    lowest = torch.repeat_interleave(ends[:-1], ends.diff())
    if window:
        lowest = torch.maximum(lowest, slots[:end] - window + 1)
    for first, begin in zip(range(0, end, BLOCK), lowest[::BLOCK].tolist(), strict=True):
        last = min(first + BLOCK, end)
        rows, size = (SIZES[bisect_left(SIZES, n)] for n in (last - first, last - begin))
        oldest = max(0, last - size)
        queries, keys = slots[first : first + rows, None], slots[oldest : oldest + size]
        hidden = (keys > queries) | (keys < F.pad(lowest[first:last], (0, rows - last + first))[:, None])
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        some = max(n for n in together if n == 1 or n * mask.numel() <= SCORES)
        for head in range(0, heads, some):
            keys_of = slice(head // group, -(-(head + some) // group))
            yield (slice(first, last), slice(head, head + some)), (slice(oldest, last), keys_of), mask


_kept_blocks = functools.lru_cache(maxsize=2)(lambda *given: tuple(_made_blocks(*given)))  # with a window, and without


class LoraLinear(torch.autograd.Function):
    """``x @ weight.T + bias + scale * dropped @ a.T @ b.T``, all of it in the dtype of x; the weight may be of 4 bits.

    peft makes an fp32 copy of x, and two tensors as large as the output, for every layer; this makes none of them, and
    keeps for backward what it can't do without.
    """

    @staticmethod
    @without_autocast
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
        fast = fast_dtype(x.device.type, x.dtype, len(flat))
        inner = flat if dropped is None else dropped.reshape(flat.shape)
        a, b = a.to(fast), b.to(fast) * scale
        low = inner.to(fast) @ a.T
        if state is not None and fast == x.dtype:
            out = import_module("bitsandbytes").matmul_4bit(flat, weight, quant_state=state, bias=bias)
        else:
            whole = _whole(weight, state, fast)
            out = flat.to(fast) @ whole.T if bias is None else torch.addmm(bias.to(fast), flat.to(fast), whole.T)
        out = out.addmm_(low, b.T).to(x.dtype)
        ctx.save_for_backward(inner, low.to(x.dtype), weight, a, b)
        ctx.scale, ctx.apart, ctx.shape, ctx.state = scale, dropped is not None, x.shape, state
        return cast("Tensor", out.view(*x.shape[:-1], len(b)))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Give the gradients of x, dropped, a and b; the weight is frozen."""
        inner, low, weight, a, b = ctx.saved_tensors
        given, grad = grad.dtype, grad.reshape(-1, grad.shape[-1]).to(a.dtype)
        grad_low = grad @ b
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _whole(weight, ctx.state, a.dtype)
            if not ctx.apart:
                grad_x.addmm_(grad_low, a)
            grad_x = grad_x.view(ctx.shape).to(given)
        if ctx.needs_input_grad[1]:
            grad_dropped = (grad_low @ a).view(ctx.shape).to(given)
        grad_a, grad_b = (grad_low.T @ inner.to(a.dtype)).float(), (grad.T @ low.to(a.dtype)).float().mul_(ctx.scale)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None, None


def _whole(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
    if state is not None:
        weight = import_module("bitsandbytes.functional").dequantize_4bit(weight, state)
    return weight.to(dtype)


class WideLinear(torch.autograd.Function):
    """``x @ weight.T + bias`` in fp32, with what is kept and given in the format of x."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        """Take x [..., I], weight [O, I], bias [O]."""
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Give the gradients of all that need one."""
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        wide = grad.float()
        rows = wide.flatten(0, -2)
        return (
            (wide @ weight.float()).to(x.dtype) if for_x else None,
            (rows.T @ x.flatten(0, -2).float()).to(weight.dtype) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def fuse_linears(model: nn.Module) -> None:
    """Give linear layers on a CPU ``WideLinear`` for their forward, where that is the faster."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    dtype = product_dtype(x)
    if fast_dtype(x.device.type, dtype, x.numel() // module.in_features) == dtype:
        return nn.Linear.forward(module, x)
    made: Tensor = WideLinear.apply(x.to(dtype), module.weight, module.bias)  # type: ignore[no-untyped-call]
    return made


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


def fuse_tokens(model: nn.Module) -> None:
    """Look rows that train up beside an embedding, where peft makes a copy of it, and of its gradient.

    ``rows_at`` of peft's layers, int64 [R], says from now on which rows they stand in for.
    """
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        if type(layer).__name__ == "TrainableTokensLayer":
            rows, table = layer.trainable_tokens_delta["default"], layer.base_layer
            at = torch.tensor(layer.token_indices["default"], device=rows.device)
            layer.register_buffer("rows_at", at, persistent=False)
            if type(table) is nn.Embedding:  # others do more
                row_of = torch.full([table.num_embeddings], -1, device=at.device)
                row_of[at] = torch.arange(len(at), device=at.device)
                layer.register_buffer("row_of", row_of, persistent=False)
                layer.forward = functools.partial(_embed, layer)


def _embed(layer: Any, ids: Tensor) -> Tensor:  # noqa: ANN401
    if layer.disable_adapters or layer.merged or layer.active_adapters != ["default"]:
        return cast("Tensor", type(layer).forward(layer, ids))
    known, row = layer.base_layer(ids), layer.row_of[ids]
    rows = F.embedding(row.clamp_min(0), layer.trainable_tokens_delta["default"])
    return torch.where((row >= 0)[..., None], rows.to(known.dtype), known)
