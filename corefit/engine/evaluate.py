"""Validation loss and sample generations, neither of which leaves a trace in the training that goes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from corefit.engine.loop import autocast, to_device
from corefit.engine.model import evaluating
from corefit.errors import RunError
from corefit.types import Batch


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer."""

    ids: tuple[int, ...]
    """Without the stop token."""
    stopped: bool
    """True: a stop token came. False: ``max_tokens`` were reached."""


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluate inside: dropout off, no gradients; afterwards the modules' modes and torch's random state are as before.

    No inference mode: quantised layers keep tensors that they make in a forward pass, and those could not train later.
    """
    devices = {p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)), evaluating(module):
        yield


def validation_loss(
    loss_fn: nn.Module,
    batches: Iterable[Batch],
    *,
    device: str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[float, int]:
    """Give the mean loss in nats per supervised token over all batches, and how many tokens that are.

    Raises:
        RunError: no batch has a supervised token.
    """
    total, supervised = torch.zeros((), dtype=torch.float64, device=device), 0
    with undisturbed(loss_fn):
        for batch in batches:
            if batch.n_supervised:
                with autocast(device, compute_dtype):
                    total += loss_fn(*to_device(batch, device)).double()
                supervised += batch.n_supervised
    if not supervised:
        raise RunError("validation: no record has a supervised token; other val.data, or --set val.records=0, goes on")
    return total.item() / supervised, supervised


def generate(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    stop_ids: Iterable[int],
    max_tokens: int,
    device: str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int], object] | None = None,
) -> Generated:
    """Answer a prompt; see ``stream``. Fit to be called in the middle of a training run. ``on_token`` sees each id."""
    ids: list[int] = []
    stops = frozenset(stop_ids)
    with undisturbed(model):
        tokens = stream(
            model,
            prompt_ids,
            device=device,
            compute_dtype=compute_dtype,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        for token in tokens:
            if token in stops:
                return Generated(tuple(ids), stopped=True)
            ids.append(token)
            if on_token is not None:
                on_token(token)
    return Generated(tuple(ids), stopped=False)


@torch.no_grad()
def stream(
    model: Any,  # noqa: ANN401, a causal language model of transformers, or peft's wrapper around one
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    device: str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` ids as they are made, stop tokens and all: the caller decides what ends an answer.

    Greedy at temperature 0; else sampled from the smallest set of tokens whose probabilities reach ``top_p``, with a
    generator of its own from ``seed``. The model must be in eval mode. Its generation settings are not looked at: a
    sampling default of the base would make samples incomparable.

    Source: nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751.
    """
    generator = torch.Generator().manual_seed(seed)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # The logits of a whole prompt would take prompt x vocabulary x 4 bytes, for one row that is used.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    ids, cache = torch.tensor([list(prompt_ids)], dtype=torch.int64, device=device), None
    for _ in range(max_tokens):
        with autocast(device, compute_dtype):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, **last_only)
        token = pick(out.logits[0, -1].float(), temperature, top_p, generator)
        yield token
        cache, new = out.past_key_values, ids.new_tensor([[token]])
        ids = new if cache is not None else torch.cat([ids, new], dim=1)  # a model without a cache reads all again


def pick(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Choose a token from fp32 logits [V]."""
    if temperature <= 0:
        return int(logits.argmax())
    probabilities, order = (logits.cpu() / temperature).softmax(-1).sort(descending=True, stable=True)
    # The first token is always in; a later one while those before it do not reach top_p.
    keep = probabilities.cumsum(-1) - probabilities < max(top_p, 1e-9)
    return int(order[torch.multinomial(probabilities * keep, 1, generator=generator)])
