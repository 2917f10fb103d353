"""A stand-in for a model with LoRA, and a stream of steps, small enough to train in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from corefit.engine.loop import LoopState, train
from corefit.engine.optimizer import make_optimizer, make_scaler
from corefit.types import Batch, StepReport

POISON_GRADIENT, POISON_LOSS = 63, 62
"""As the first token of a batch: its gradients become infinite, or its loss alone."""


class TinyLoss(nn.Module):
    """Has CausalLoss's forward; the two LoRA matrices have 4096 elements, so that 8-bit state is really 8 bits."""

    def __init__(self, *, dropout: float = 0.1) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        for name, shape in (("embed", (64, 256)), ("place", (16, 256)), ("head", (64, 256))):
            self.register_buffer(name, torch.randn(shape, generator=make) * 0.3)
        self.lora_A = nn.Parameter(torch.randn(16, 256, generator=make) / 16)
        self.lora_B = nn.Parameter(torch.zeros(256, 16))
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids, position_ids, labels, layout=None):
        h = self.embed[input_ids] + self.place[position_ids]
        h = h + F.linear(F.linear(self.dropout(h), self.lora_A), self.lora_B)
        logits = F.linear(h, self.head).float()
        if input_ids[0, 0] == POISON_GRADIENT and logits.requires_grad:
            logits.register_hook(lambda grad: grad * float("inf"))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return loss + float("inf") if input_ids[0, 0] == POISON_LOSS else loss


def make_batch(index: int, *, epoch: float = 0.0, rows: int = 2, supervised: bool = True, first: int = 1) -> Batch:
    rng = np.random.default_rng(index)
    ids = rng.integers(2, 60, (rows, 16))
    ids[0, 0] = first
    labels = np.where(rng.random((rows, 16)) < 0.2 + 0.6 * rng.random(), (ids * 7 + 3) % 60, -100)
    labels[:, :1] = 5
    if not supervised:
        labels[:] = -100
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=np.tile(np.arange(16), (rows, 1)),
        cu_seqlens=np.arange(0, 16 * rows + 1, 16, dtype=np.int32),
        n_supervised=int((labels != -100).sum()),
        n_tokens=16 * rows - 3,
        n_samples=rows,
        epoch=epoch,
        origins=lambda: tuple(f"data.jsonl:{index * rows + i + 1}" for i in range(rows)),
        state=lambda: {"next": index + 1},
    )


def make_steps(
    count: int, *, start: int = 0, epochs: int = 1, poison: dict[int, int] | None = None
) -> Iterator[tuple[Batch, ...]]:
    """Yield ``count`` steps of two micro-batches, from batch ``start``; ``poison``: step (from 0) -> first token."""
    for step in range(start // 2, count):
        first = (poison or {}).get(step, 1)
        yield tuple(
            make_batch(i, epoch=epochs * (i + 1) / (2 * count), first=first if i % 2 else 1)
            for i in (2 * step, 2 * step + 1)
        )


@dataclass
class Run:
    """Everything a training run is made of, and its reports."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: object
    state: LoopState
    reports: list[StepReport]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def train(self, steps, **more) -> str:
        return train(
            loss_fn=self.model,
            steps=steps,
            parameters=self.parameters,
            optimizer=self.optimizer,
            scaler=self.scaler,
            state=self.state,
            **{"lr_at": lambda progress: 1e-2 * (1 - progress), "on_step": self.reports.append, **more},
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}


def make_run(*, optimizer: str = "adamw", scale: bool = False, dropout: float = 0.1, seed: int = 0) -> Run:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = TinyLoss(dropout=dropout)
    made = make_optimizer(optimizer, dict(model.named_parameters()), lr=1e-2, weight_decay=0.01)
    return Run(model, made, make_scaler("cpu", enabled=scale), LoopState(), [])
