"""Documents in one pack never see each other: the one way a model is run on packs, and the proof before step 1.

transformers builds a mask per document from restarting ``position_ids`` only where there is neither an attention mask
nor a key/value cache. With ``use_cache=True``, the default of most models, or with a mask of ones, documents see each
other, gradients are off by more than 100 %, and the loss hardly moves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from corefit.engine.model import evaluating
from corefit.engine.nonfinite import Watch, culprit
from corefit.errors import IsolationError, RunError

ROWS = ((21, 1, 17, 9), (12, 19, 1, 16))
"""Lengths of the canary's documents, two packs of 48 slots; the last document of each is its padding."""
CHANGED = ((0, 0, 21), (1, 12, 31))
"""Row, begin and end of the documents that the canary changes: a first one and one between others."""


def causal_lm(model: nn.Module) -> nn.Module:
    """Give the language model itself, inside an adapter's wrapper or not."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def decoder(model: nn.Module) -> nn.Module:
    """Give the part of a language model that ends in hidden states."""
    found: nn.Module = causal_lm(model).get_decoder()  # type: ignore[operator]
    return found


def run_packed(part: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Any:  # noqa: ANN401, a ModelOutput
    """Run a decoder or a whole language model on packs [B, T']: the only place that does.

    ``position_ids`` begin at 0 in every document; that alone tells documents apart.
    """
    return part(input_ids=input_ids, position_ids=position_ids, use_cache=False)


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
    ids = torch.randint(vocab_size, (2, sum(ROWS[0])), generator=generator)
    ids[0, -ROWS[0][-1] :] = ids[1, -ROWS[1][-1] :] = 0
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ROWS])
    others, changed = torch.ones_like(ids, dtype=torch.bool), ids.clone()
    for row, begin, end in CHANGED:
        others[row, begin:end] = False
        shift = torch.randint(1, vocab_size, (end - begin,), generator=generator)
        changed[row, begin:end] = (ids[row, begin:end] + shift) % vocab_size
    ids, changed, positions, others = (t.to(device) for t in (ids, changed, positions, others))

    worst = 0.0
    with evaluating(model), _row_by_row(model), autocast():
        for part, name in ((decoder(model), "last_hidden_state"), (causal_lm(model), "logits")):
            output = run_packed(part, ids, positions)
            before = getattr(output, name).float()
            after = getattr(run_packed(part, changed, positions), name).float()
            if not (before.isfinite().all() and after.isfinite().all()):
                with Watch(model) as watch:
                    run_packed(part, ids, positions)
                    run_packed(part, changed, positions)
                where = culprit(watch.first["forward"]) if watch.first else "not so when run again"
                raise RunError(
                    f"the model's {name} aren't finite even before training ({where}); "
                    "another --set train.precision (bf16, fp32) may help, else another copy of the base model"
                )
            allowed = 0.0
            if ids.device.type != "cpu":
                again = getattr(run_packed(part, ids, positions), name).float()
                allowed = float((again - before).abs().max())
            delta = (after - before).abs().amax(-1)
            moved, own = float(delta[others].max()), float(delta[~others].max())
            if not moved <= allowed:
                raise IsolationError(
                    f"documents of one pack see each other: changing one moved another's {name} by {moved:.3g} "
                    f"(allowed {allowed:.3g}, its own moved by {own:.3g}); {_likely_cause(model, output)}"
                )
            if not own > 0:
                raise IsolationError(f"the isolation check proves nothing: {name} don't depend on the tokens")
            worst = max(worst, moved)
    return worst


@contextlib.contextmanager
def _row_by_row(model: nn.Module) -> Iterator[None]:
    """Keep 8-bit layers from rounding one document by another's tokens while isolation is checked.

    LLM.int8 multiplies a column in 16 bits for *all* rows of a call if one row has an outlier in it. That moves other
    rows by a rounding, which no attention mask can prevent and which is not what the canary looks for.
    """
    states: list[Any] = [
        module.state for module in model.modules() if hasattr(getattr(module, "state", None), "threshold")
    ]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold


def _likely_cause(model: nn.Module, output: Any) -> str:  # noqa: ANN401, a ModelOutput
    if getattr(output, "past_key_values", None) is not None:
        return "likely cause: the model made a key/value cache (use_cache=True is forced somewhere)"
    used = getattr(getattr(causal_lm(model), "config", None), "_attn_implementation", None)
    if used not in ("sdpa", "eager"):
        return f"likely cause: attention {used!r} takes no notice of position_ids"
    return (
        "likely cause: an attention_mask reaches the decoder, or this model class mixes tokens in a way that doesn't "
        "follow position_ids; such a model can't be trained on packs"
    )
