"""Documents in one pack never see each other: the one way a model is run on packs, and the proof before step 1.

Two ways. Attention by document (``packed_attention``) gets their bounds and computes nothing else. What it can't serve
runs on transformers' own: that builds a mask per document from restarting ``position_ids``, only where there is neither
an attention mask nor a key/value cache. With ``use_cache=True``, the default of most models, or with a mask of ones,
documents see each other, gradients are off by more than 100 %, and the loss hardly moves.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from corefit.engine.fused import DocumentAttention, product_dtype
from corefit.engine.model import causal_lm, evaluating, replaced
from corefit.engine.nonfinite import Watch, culprit
from corefit.errors import IsolationError, RunError
from corefit.types import IGNORE_INDEX

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACKED = "corefit_packed"
"""The name of attention by document among transformers' attention functions."""
ROWS = ((21, 1, 17, 9), (12, 19, 1, 16))
"""Lengths of the canary's documents, two packs of 48 slots; the last document of each is its padding."""
CHANGED = ((0, 0, 21), (1, 12, 31))
"""Row, begin and end of the documents that the canary changes: a first one and one between others."""


def decoder(model: nn.Module) -> nn.Module:
    """Give the part of a language model that ends in hidden states."""
    return cast("nn.Module", causal_lm(model).get_decoder())


class Layout(NamedTuple):
    """Where documents lie in the B x T' slots of a micro-batch, one row after the other, and what of them counts."""

    cu_seqlens: Tensor
    """int32 [D + 1]: where each document begins, and B x T'; on the model's device."""
    longest: int
    """Slots of the longest."""
    supervised: Tensor | None = None
    """int64 [S]: slots with a label; None: to be found."""

    @classmethod
    def of(cls, cu_seqlens: NDArray[np.int32], device: str = "cpu", labels: NDArray[np.int64] | None = None) -> Layout:
        """Take the bounds of a ``Batch``, and where it has labels, to the device; the host waits for nothing."""
        supervised = None if labels is None else to_device(np.flatnonzero(labels != IGNORE_INDEX), device)
        return cls(to_device(cu_seqlens, device), int(np.diff(cu_seqlens).max()), supervised)

    @classmethod
    def at(cls, position_ids: Tensor) -> Layout:
        """Find the documents: one begins in every row, and at every position 0. Waits for the device."""
        begins = (position_ids == 0).cpu().numpy()
        begins[:, 0] = True
        bounds = np.append(np.flatnonzero(begins), begins.size).astype(np.int32)
        return cls.of(bounds, str(position_ids.device))


def to_device(array: NDArray[Any], device: str) -> Tensor:
    """Give a tensor on the device; the host doesn't wait for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor


def run_packed(part: nn.Module, input_ids: Tensor, position_ids: Tensor, layout: Layout | None = None) -> Any:  # noqa: ANN401, a ModelOutput
    """Run a decoder or a whole language model on packs [B, T']: the only place that does.

    ``position_ids`` begin at 0 in every document. Where ``choose_route`` took attention by document, ``layout`` tells
    them apart (None: found from ``position_ids``), else ``position_ids`` alone do.
    """
    kwargs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    if _implementation(part) == PACKED:
        bounds, longest, _ = layout or Layout.at(position_ids)
        # A mask of four dimensions goes through transformers untouched, where none at all makes it look for documents,
        # and wait for the device. Attention that gets it without bounds has lost them.
        kwargs["attention_mask"] = input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
        kwargs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}  # the names that flash attention has there
        kwargs |= {"max_length_q": longest, "max_length_k": longest}
    return part(**kwargs)


def _implementation(part: nn.Module) -> str | None:
    return getattr(getattr(part, "config", None), "_attn_implementation", None)


# ------------------------------------------------------------------------------------------------ attention by document


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **more: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attend causally inside each document; as transformers calls it: query [B, H, T', D] gives [B, T', H, D].

    Without ``cu_seq_lens_q`` (generation) it is transformers' own sdpa attention.

    Raises:
        LostBounds: a pack came without its bounds, or with what this attention doesn't do.
    """
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.numel() == 1 < key.shape[2]:
            raise LostBounds("the model doesn't hand cu_seq_lens_q on to its attention")
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        more |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return cast("tuple[Tensor, None]", sdpa_attention_forward(module, query, key, value, attention_mask, **more))
    for name in ("softcap", "s_aux", "position_bias"):
        if more.get(name) is not None:
            raise LostBounds(f"its attention has {name}")
    if dropout:
        raise LostBounds("its attention has dropout")
    rows, heads, slots, width = query.shape
    kind, dtype = query.device.type, product_dtype(value)
    # whole tensors: a view would keep what it is a part of, such as one projection for all three
    q, k, v = (x.to(dtype).transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value))
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    if kind == "cuda":
        out = _varlen(q, k, v, cu_seq_lens_q, max_length_q, scaling, window)
    else:
        scale = width**-0.5 if scaling is None else scaling
        out = DocumentAttention.apply(q, k, v, cu_seq_lens_q.tolist(), scale, window)  # type: ignore[no-untyped-call]
    return out.view(rows, slots, heads, -1), None


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Attend in [slots, heads, D], all documents in one kernel."""
    how: dict[str, Any] = {"window_size": (window - 1 if window else -1, 0)}
    function, gqa = varlen_function()
    groups = q.shape[1] // k.shape[1]
    if function.__name__ == "flash_attn_varlen_func":
        how |= {"softmax_scale": scale, "causal": True}
    else:
        how |= {"scale": scale, "enable_gqa": True} if gqa and groups > 1 else {"scale": scale}
    if groups > 1 and not gqa:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return cast("Tensor", function(q, k, v, bounds, bounds, longest, longest, **how))


@functools.cache
def varlen_function() -> tuple[Callable[..., Any], bool]:
    """Give flash-attn's function where it is installed, else torch's, and whether it knows grouped queries.

    Raises:
        LostBounds: this torch has none that is good for training.
    """
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        pass
    else:
        return flash_attn_varlen_func, True
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise LostBounds(f"torch {torch.__version__} has no varlen_attn") from error
    known = inspect.signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= set(known):
        raise LostBounds(f"varlen_attn of torch {torch.__version__} has no window_size")
    return varlen_attn, "enable_gqa" in known


class LostBounds(Exception):
    """This attention can't serve the model; says why in a few words."""


def choose_route(
    model: nn.Module,
    *,
    vocab_size: int,
    device: str,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> str:
    """Give the model attention by document where that does what its own does, and say which and why in one line.

    The rest runs on transformers' sdpa (or eager) attention with a mask of T' x T' for every pack. Run as training
    runs. Leaves the model, but for its attention, and all random state as they were.
    """
    lm: Any = causal_lm(model)
    before = lm.config._attn_implementation
    why = _why_not(lm, before)
    if not why:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionMaskInterface.register(PACKED, sdpa_mask)  # for generation
        ids, positions, layout = _canary_packs(vocab_size, device, torch.Generator().manual_seed(0))
        windows: list[int | None] = []

        def watched(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # noqa: ANN401
            windows.append(kwargs.get("sliding_window"))
            return packed_attention(*args, **kwargs)

        AttentionInterface.register(PACKED, watched)
        with evaluating(model), _row_by_row(model), autocast():
            whole = lm.dtype == torch.float32 and not torch.is_autocast_enabled(ids.device.type)
            wanted = run_packed(lm, ids, positions, layout).logits
            try:
                lm.set_attn_implementation(PACKED)
                got = run_packed(lm, ids, positions, layout).logits
                if sum(map(bool, windows)) != _layers_with_window(lm.config):
                    why = "the model doesn't tell its attention of sliding windows"
                elif not _alike(got, wanted, 1e-3 if whole else 0.05):
                    why = "it doesn't give what the model's own attention does"
            except LostBounds as error:
                why = str(error)
            except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
                why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        AttentionInterface.register(PACKED, packed_attention)
    if why:
        lm.set_attn_implementation(before)
        return f"attention: {before} with a mask of each pack: slower, and more memory in long packs ({why})"
    name = "" if device == "cpu" else f"{varlen_function()[0].__name__}, "
    return f"attention: {name}document by document"


def _layers_with_window(config: Any) -> int:  # noqa: ANN401
    """Give how many layers a configuration says look back a limited way."""
    if kinds := getattr(config, "layer_types", None):
        return list(kinds).count("sliding_attention")
    on = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return config.num_hidden_layers if on else 0


def _why_not(lm: Any, before: str) -> str:  # noqa: ANN401
    """Give what is known beforehand to keep a model from attention by document."""
    kinds = set(getattr(lm.config, "layer_types", None) or ())
    if before != "sdpa":
        return f"the model was loaded with {before} attention"
    if not lm._can_set_attn_implementation():
        return "the model's attention can't be exchanged"
    if strange := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"the model has layers of {strange[0]}"
    names = ("attention_dropout", "attn_dropout")  # which the probe, in eval mode, doesn't see
    rates = [getattr(module, name, None) for module in (*lm.modules(), lm.config) for name in names]
    if any(getattr(rate, "p", rate) for rate in rates if isinstance(rate, float | nn.Dropout)):
        return "its attention has dropout"
    return ""


def _alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether nine of ten tokens have the same values; a router of experts may tip over by a rounding."""
    far = (a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1).clamp_min(1e-6)
    return bool(far.flatten().quantile(0.9) < tolerance)


# ---------------------------------------------------------------------------------------------------------- the canary


def isolation_canary(
    model: nn.Module,
    *,
    vocab_size: int,
    device: str,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> float:
    """Change documents in packs of random tokens; no other document's hidden states or logits may move.

    Run as training runs: same calls, same autocast. Leaves the model and all random state as they were.

    Args:
        model: the loaded model, with its adapter.
        vocab_size: tokens to draw from.
        device: where the model is.
        autocast: makes the context that training runs in.

    Returns:
        The largest absolute difference: 0.0 on a CPU, at most that of two equal calls on a GPU.

    Raises:
        IsolationError: something moved, or nothing did, not even the changed documents.
        RunError: the model's outputs aren't finite.
    """
    generator = torch.Generator().manual_seed(0)
    ids, positions, layout = _canary_packs(vocab_size, device, generator)
    others, changed = torch.ones_like(ids, dtype=torch.bool), ids.clone()
    for row, begin, end in CHANGED:
        others[row, begin:end] = False
        shift = torch.randint(1, vocab_size, (end - begin,), generator=generator).to(device)
        changed[row, begin:end] = (ids[row, begin:end] + shift) % vocab_size

    lm, seen, worst = causal_lm(model), list[Any](), 0.0

    def run(tokens: Tensor) -> dict[str, Tensor]:
        logits = run_packed(lm, tokens, positions, layout).logits.float()
        return {"last_hidden_state": seen[-1].last_hidden_state.float(), "logits": logits}

    hook = decoder(model).register_forward_hook(lambda *called: seen.append(called[-1]))
    try:
        with evaluating(model), _row_by_row(model), autocast():
            before, after = run(ids), run(changed)
            again = before if ids.device.type == "cpu" else run(ids)
            if strange := [name for name in before if not (before[name] + after[name]).isfinite().all()]:
                with Watch(model) as watch:
                    run(ids), run(changed)
                where = culprit(watch.first["forward"]) if watch.first else "not so when run again"
                raise RunError(
                    f"the model's {strange[0]} aren't finite even before training ({where}); "
                    "another --set train.precision (bf16, fp32) may help, else another copy of the base model"
                )
    finally:
        hook.remove()
    for name in before:
        allowed = float((again[name] - before[name]).abs().max())
        delta = (after[name] - before[name]).abs().amax(-1)
        moved, own = float(delta[others].max()), float(delta[~others].max())
        if not moved <= allowed:
            raise IsolationError(
                f"documents of one pack see each other: changing one moved another's {name} by {moved:.3g} "
                f"(allowed {allowed:.3g}, its own moved by {own:.3g}); {_likely_cause(model, seen[0])}"
            )
        if not own > 0:
            raise IsolationError(f"the isolation check proves nothing: {name} don't depend on the tokens")
        worst = max(worst, moved)
    return worst


def _canary_packs(vocab_size: int, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Layout]:
    """Give packs of random tokens, as training runs them."""
    ids = torch.randint(vocab_size, (2, sum(ROWS[0])), generator=generator)
    ids[0, -ROWS[0][-1] :] = ids[1, -ROWS[1][-1] :] = 0
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ROWS])
    bounds = np.cumsum([0, *ROWS[0], *ROWS[1]], dtype=np.int32)
    return ids.to(device), positions.to(device), Layout.of(bounds, device)


@contextlib.contextmanager
def _row_by_row(model: nn.Module) -> Iterator[None]:
    """Keep 8-bit layers from rounding one document by another's tokens while isolation is checked.

    LLM.int8 multiplies a column in 16 bits for *all* rows of a call if one row has an outlier in it. That moves other
    rows by a rounding, which no attention mask can prevent and which is not what the canary looks for.
    """
    states: list[Any] = [
        module.state for module in model.modules() if hasattr(getattr(module, "state", None), "threshold")
    ]
    with contextlib.ExitStack() as stack:
        for state in states:
            stack.enter_context(replaced(state, "threshold", 0.0))
        yield


def _likely_cause(model: nn.Module, output: Any) -> str:  # noqa: ANN401, a ModelOutput
    if getattr(output, "past_key_values", None) is not None:
        return "likely cause: the model made a key/value cache (use_cache=True is forced somewhere)"
    used = _implementation(causal_lm(model))
    if used == PACKED:
        return (
            "likely cause: cu_seq_lens_q doesn't tell attention where documents end, or this model class mixes tokens "
            "outside of it; such a model can't be trained on packs"
        )
    if used not in ("sdpa", "eager"):
        return f"likely cause: attention {used!r} takes no notice of position_ids"
    return (
        "likely cause: an attention_mask reaches the decoder, or this model class mixes tokens in a way that doesn't "
        "follow position_ids; such a model can't be trained on packs"
    )
