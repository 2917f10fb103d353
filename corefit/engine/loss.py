"""Next-token loss on supervised rows only; the full table of logits is never made, nor kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corefit.engine.attention import Layout, decoder, run_packed
from corefit.engine.fused import fast_dtype, product_dtype, without_autocast
from corefit.engine.model import causal_lm, evaluating
from corefit.types import IGNORE_INDEX

T = TypeVar("T")
CHUNK = 256
"""Rows whose logits exist at the same time."""
CACHED = 32
"""Of those, rows that are worked on at once on a CPU, so that they stay in its cache."""
SMALL = 2**16
"""Numbers of a tensor below which it is not moved for the sake of memory."""


class Head(NamedTuple):
    """The matrix that makes logits."""

    weight: Tensor
    """[V, H]"""
    rows: Tensor | None = None
    """[R, H]: what stands in for the rows ``at`` of it; None: nothing does."""
    at: Tensor | None = None
    """int64 [R]; None: as ``rows``."""

    def to(self, dtype: torch.dtype) -> Head:
        """Give the same in this dtype."""
        return Head(self.weight.to(dtype), None if self.rows is None else self.rows.to(dtype), self.at)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Give logits [..., V] of hidden states [..., H] of the same dtype."""
        made = torch.matmul(hidden, self.weight.T, out=out)
        if self.rows is not None and self.at is not None:
            made.index_copy_(-1, self.at, hidden @ self.rows.T)
        return made


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of ``-log softmax(hidden @ weight.T)[target]`` over rows, in chunks; some rows of the weight may be others.

    The gradient is made in the forward, chunk by chunk, while the chunk's logits are there; backward only scales it.
    Products are in ``dtype``, everything else is fp32. Rounding the unscaled softmax to fp16 loses less than rounding a
    gradient that the loss scale has already multiplied.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        at: Tensor | None,
        dtype: torch.dtype,
        chunk: int,
        with_grad: bool,
    ) -> Tensor:
        """Take hidden [N, H], targets int64 [N] and the parts of a ``Head``; give an fp32 scalar, in nats."""
        for_hidden, _, for_weight, for_rows = (with_grad and need for need in ctx.needs_input_grad[:4])
        for_any = for_hidden or for_weight or for_rows
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.zeros(hidden.shape, device=hidden.device) if for_hidden else None
        grad_weight = torch.zeros(weight.shape, device=weight.device) if for_weight else None
        grad_rows = torch.zeros(rows.shape, device=weight.device) if rows is not None and for_rows else None
        head = Head(weight, rows, at).to(dtype)
        few = CACHED if hidden.device.type == "cpu" else chunk
        products = torch.empty(min(chunk, len(hidden)), len(weight), dtype=dtype, device=hidden.device)
        wide = None if dtype == torch.float32 else torch.empty_like(products[:few], dtype=torch.float32)
        numbers = torch.arange(few, device=hidden.device)
        for i in range(0, len(hidden), chunk):
            h = hidden[i : i + chunk].to(dtype)
            p = head.logits(h, out=products[: len(h)])
            for part, y in zip(torch.split(p, few), torch.split(targets[i : i + chunk], few), strict=True):
                z, at_target = part if wide is None else wide[: len(part)].copy_(part), (numbers[: len(part)], y)
                z -= z.amax(-1, keepdim=True)
                right = z[at_target]
                total = z.exp_().sum(-1)
                loss += (total.log() - right).sum()
                if for_any:
                    part.copy_(z.div_(total[:, None]))
                    part[at_target] = right.exp_().div_(total).sub_(1).to(dtype)  # scatter_ copies all of it twice
            if for_any and head.rows is not None and at is not None:
                of_rows = p.index_select(1, at)
                p.index_fill_(1, at, 0)  # from here on p is of the other rows alone
                if grad_hidden is not None:
                    grad_hidden[i : i + chunk] = of_rows @ head.rows
                if grad_rows is not None:
                    grad_rows += of_rows.T @ h
            if grad_hidden is not None:
                grad_hidden[i : i + chunk] += p @ head.weight
            if grad_weight is not None:
                grad_weight += p.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight, grad_rows)
        ctx.dtypes = hidden.dtype, weight.dtype, torch.float32
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Scale what the forward made."""
        made = ctx.saved_tensors
        grads = [None if g is None else (g * grad).to(d) for g, d in zip(made, ctx.dtypes, strict=True)]
        return grads[0], None, *grads[1:], None, None, None, None


class CausalLoss(nn.Module):
    """The training loss of a language model on packs, and the only thing that the loop calls.

    Chunked where the model's logits are exactly ``hidden @ weight.T``; a probe at the first call finds out. Models that
    do more (soft caps, logit scales, a head with bias or adapter) get their own logits and torch's cross entropy.
    """

    def __init__(self, model: nn.Module, *, chunk: int = CHUNK) -> None:
        """``model`` with or without an adapter; ``chunk``: rows of logits at a time."""
        super().__init__()
        self.model = model
        self.chunk = chunk
        self.probed = False
        self.plain: str | None = None
        """Why plain logits are used, in a few words; None: they aren't (or the probe has not run)."""
        self.kept: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        """Makes the context in which the decoder runs and that says where what the backward needs is kept."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, layout: Layout | None = None) -> Tensor:
        """Give the sum of nats over labels other than -100, an fp32 scalar; 0.0 where there are none.

        All [B, T'] int64; labels are next-token-aligned, nothing is shifted here. ``layout`` as for ``run_packed``.
        """
        if not self.probed:
            self.probe()
        rows = layout and layout.supervised
        if rows is None:
            rows = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(-1)
        targets = labels.flatten().index_select(0, rows)
        if self.plain is not None:
            with self.kept():
                logits = run_packed(causal_lm(self.model), input_ids, position_ids, layout).logits
            return F.cross_entropy(logits.flatten(0, 1).index_select(0, rows).float(), targets, reduction="sum")
        with self.kept():
            states = run_packed(decoder(self.model), input_ids, position_ids, layout).last_hidden_state
        hidden = states.flatten(0, 1).index_select(0, rows)
        head = _linear_head(self.model)
        assert head is not None
        dtype = fast_dtype(hidden.device.type, product_dtype(hidden))
        how = dtype, self.chunk, torch.is_grad_enabled()
        loss: Tensor = LinearCrossEntropy.apply(hidden, targets, *head, *how)  # type: ignore[no-untyped-call]
        return loss

    def within(self, call: Callable[[], T]) -> T:
        """Call what runs the model in another way than ``forward``: sharded weights are whole meanwhile."""
        return call()

    def probe(self) -> str | None:
        """Find out, once, whether chunks give this model's logits; run in the autocast that training uses."""
        with evaluating(self.model):
            self.plain = self._why_plain()
        self.probed = True
        return self.plain

    def _why_plain(self) -> str | None:
        lm: Any = causal_lm(self.model)
        head = _linear_head(self.model)
        if head is None:
            return "the head is not a plain linear layer (a bias, an adapter or a quantizer is on it)"
        positions = torch.arange(8, device=head.weight.device)[None]  # so few that fast_dtype changes nothing
        ids = positions * 7 % len(head.weight)
        try:
            hidden = run_packed(decoder(self.model), ids, positions).last_hidden_state
        except AttributeError:
            return "the model has no decoder of its own"
        # large logits, on which a soft cap shows; the head's real input is also compared with the decoder's output
        dtype = product_dtype(hidden)
        ours = head.to(dtype)
        factor = 100 / float(ours.logits(hidden.to(dtype)).abs().max().clamp_min(1e-6))
        seen: list[Tensor] = []

        def enlarge(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(args[0])
            return (args[0] * factor, *args[1:])

        hook = lm.get_output_embeddings().register_forward_pre_hook(enlarge)
        try:
            logits = run_packed(lm, ids, positions).logits
        finally:
            hook.remove()
        if not seen or not _close(seen[0], hidden):
            return "the head's input is not the decoder's output"
        if not _close(logits, ours.logits((seen[0] * factor).to(dtype))):
            return "the logits are not the head's output (a soft cap or a scale)"
        return None


def offloaded(weights: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Give a context in which tensors that the backward needs wait in the computer's memory; weights stay in place.

    Small ones stay too: a copy costs more than it saves.
    """
    own = {weight.untyped_storage().data_ptr() for weight in weights}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.numel() < SMALL or tensor.untyped_storage().data_ptr() in own:
            return tensor.device, tensor
        away = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, away.copy_(tensor, non_blocking=tensor.is_cuda)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        return packed[1].to(packed[0], non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _linear_head(model: nn.Module) -> Head | None:
    """The head where it is a bare matrix, also inside peft's wrappers for what trains whole or row by row."""
    head: Any = causal_lm(model).get_output_embeddings()
    rows = at = None
    if hasattr(head, "token_adapter"):
        tokens = head.token_adapter
        head = tokens.base_layer
        if not tokens.disable_adapters and tokens.active_adapters:
            rows, at = tokens.trainable_tokens_delta[tokens.active_adapters[0]], tokens.rows_at
    if hasattr(head, "modules_to_save"):
        off = head.disable_adapters or not head.active_adapters
        head = head.original_module if off else head.modules_to_save[head.active_adapters[0]]
    return Head(head.weight, rows, at) if type(head) is nn.Linear and head.bias is None else None


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= 1e-3 * b.abs().max())
