"""Validation loss and sample generations, neither of which leaves a trace in the training that goes on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from corefit.engine.loop import autocast, nats
from corefit.engine.model import causal_lm, evaluating
from corefit.engine.ranks import ALONE, Ranks
from corefit.engine.rope import trained_length
from corefit.errors import RunError, UserError
from corefit.types import Batch


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer."""

    ids: tuple[int, ...]
    """Without the stop token."""
    stopped: bool
    """True: a stop token came. False: ``max_tokens`` were reached."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the next token is chosen from the logits."""

    temperature: float = 0.0
    """0: greedy, the most likely token."""
    top_k: int = 0
    """Only the so many most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the smallest set of them whose probabilities reach it."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that are there already, and multiplies negative ones; 1: neither."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UserError where a value is out of range."""
        for name, low, high in (
            ("temperature", 0, 100),
            ("top_k", 0, 2**31),
            ("top_p", 0, 1),
            ("repetition_penalty", 0.01, 100),
            ("seed", 0, 2**63 - 1),
        ):
            if not low <= (value := getattr(self, name)) <= high:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")


GREEDY = Decoding()


@dataclass(slots=True)
class Memory:
    """What a model has read: of a prompt that begins alike, only what follows is read anew."""

    ids: list[int] = field(default_factory=list)
    cache: Any = None
    """Keys and values of ``ids``, as transformers keeps them; None: none."""

    def forget(self, prompt_ids: Sequence[int]) -> None:
        """Keep what the prompt begins with, all of it but its last id at most; nothing where a cache can't be cut."""
        n = 0
        while n < min(len(self.ids), len(prompt_ids) - 1) and self.ids[n] == prompt_ids[n]:
            n += 1
        if n < len(self.ids) and self.cache is not None:
            if all(type(layer).__name__ == "DynamicLayer" for layer in getattr(self.cache, "layers", [None])):
                self.cache.crop(n - len(self.ids))
            else:  # a sliding window, a state
                self.cache = None
        self.ids = [] if self.cache is None else self.ids[:n]


def validation_loss(
    loss_fn: nn.Module,
    batches: Sequence[Batch],
    *,
    device: str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
) -> tuple[float, int]:
    """Give the mean loss in nats per supervised token over all batches of all ranks, and how many tokens that are.

    Raises:
        RunError: no batch has a supervised token.
    """
    total, supervised = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(loss_fn):
        for batch in ranks.in_step(batches):
            total += nats(loss_fn, batch, device, compute_dtype).double()
            supervised += batch.n_supervised
    loss, tokens = ranks.sum(total.item(), supervised)
    if not tokens:
        raise RunError("validation: no record has a supervised token; other val.data, or --set val.records=0, goes on")
    return loss / tokens, int(tokens)


def generate(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    stop_ids: Iterable[int],
    **how: Any,  # noqa: ANN401, as for ``stream``
) -> Generated:
    """Answer a prompt as ``stream`` does. Fit to be called in the middle of a training run."""
    ids: list[int] = []
    stops = frozenset(stop_ids)
    with evaluating(model):
        for token in stream(model, prompt_ids, **how):
            if token in stops:
                return Generated(tuple(ids), stopped=True)
            ids.append(token)
    return Generated(tuple(ids), stopped=False)


@torch.no_grad()
def stream(
    model: Any,  # noqa: ANN401, a causal language model of transformers, or peft's wrapper around one
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    device: str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    decoding: Decoding = GREEDY,
    memory: Memory | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` ids as they are made, stop tokens and all: the caller decides what ends an answer.

    Samples with a generator of its own. The model must be in eval mode. Its generation settings are not looked at: a
    sampling default of the base would make samples incomparable. ``memory`` is what the model has read before, and has
    read afterwards. ``ranks`` that run it together all go on with the token of the first.
    """
    generator, memory = torch.Generator().manual_seed(decoding.seed), memory or Memory()
    base = causal_lm(model)
    # The logits of a whole prompt would take prompt x vocabulary x 4 bytes, for one row that is used. For a row that is
    # a view, which a number instead of an index makes, torch copies the whole head on a CPU: 1.5 s for 100,000 x 2,048.
    # Only with a number do layers that share their keys (Gemma 4) leave the rows out that nobody asks for.
    last_only: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        by_number = device != "cpu" or hasattr(base.config.get_text_config(), "num_kv_shared_layers")
        last_only["logits_to_keep"] = 1 if by_number else torch.tensor([-1])
    ids, read = list(prompt_ids), len(memory.ids)
    turns, grows = trained_length(base, "longrope"), trained_length(base, "dynamic")
    memory.forget(ids)
    if max(read, len(ids)) > grows or (read > turns) != (len(ids) > turns):
        memory.forget(())  # keys that were turned as in a text of another length
    for _ in range(max_tokens):
        if len(memory.ids) <= turns < len(ids):
            memory.forget(())
        new, cache = torch.tensor([ids[len(memory.ids) :]], dtype=torch.int64, device=device), memory.cache
        memory.ids, memory.cache = [], None  # should this be interrupted, some layers have read more than others
        with autocast(device, compute_dtype):
            out = model(input_ids=new, past_key_values=cache, use_cache=True, **last_only)
        if (kept := getattr(out, "past_key_values", None)) is not None:  # else a model without a cache reads all again
            memory.ids, memory.cache = list(ids), kept
        ids.append(int(ranks.first(pick(out.logits[0, -1].float(), decoding, generator, ids))))
        yield ids[-1]


def pick(logits: torch.Tensor, decoding: Decoding, generator: torch.Generator, seen: Sequence[int] = ()) -> int:
    """Choose a token from fp32 logits [V]; ``seen``: what is there already.

    Source: repetition penalty, Keskar et al. 2019, arXiv:1909.05858; nucleus sampling, Holtzman et al. 2019,
    arXiv:1904.09751.
    """
    if decoding.repetition_penalty != 1:
        there = torch.tensor(sorted(set(seen)), device=logits.device)
        was, by = logits[there], decoding.repetition_penalty
        logits = logits.index_copy(0, there, torch.where(was > 0, was / by, was * by))
    if decoding.temperature <= 0:
        return int(logits.argmax())
    scaled = logits.cpu() / max(decoding.temperature, 1e-9)  # which can't make an infinite one
    probabilities, order = scaled.softmax(-1).sort(descending=True, stable=True)
    if decoding.top_k:
        probabilities[decoding.top_k :] = 0
        probabilities /= probabilities.sum()
    # The first token is always in; a later one while those before it do not reach top_p.
    keep = probabilities.cumsum(-1) - probabilities < max(decoding.top_p, 1e-9)
    return int(order[torch.multinomial(probabilities * keep, 1, generator=generator)])
