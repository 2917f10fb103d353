"""Several processes as one run, as torchrun starts them: each holds the model and takes its stride of every step.

A step's loss is one sum over all its supervised tokens, so its gradient is the sum of what the ranks have: they are
added up once a step, after the last micro-batch. A rank without a pack in a short last step adds nothing, and still
takes part. Rank 0 alone writes and speaks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from corefit.errors import RunError

BUCKET = 2**25
"""Numbers that are added up at a time."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which process of how many this is."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Among the processes of this machine: the number of its GPU."""

    def sum(self, *values: float) -> list[float]:
        """Give the sum over ranks of each number. It never waits for a GPU."""
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        with _together():
            dist.all_reduce(numbers)
        return numbers.tolist()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over ranks into each of these tensors, which have one dtype and one device."""
        self._in_place(tensors, dist.all_reduce)

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Put rank 0's values into each of these tensors, which have one dtype and one device."""
        self._in_place(tensors, partial(dist.broadcast, src=0))

    @torch.no_grad()
    def _in_place(self, tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
        if self.world == 1:
            return
        for part in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in part])
            with _together():
                collective(flat)
            first = 0
            for tensor in part:
                tensor.copy_(flat[first : first + tensor.numel()].view_as(tensor))
                first += tensor.numel()

    def tell(self, text: str = "") -> str:
        """Give rank 0's text; what the others pass is not looked at."""
        if self.world == 1:
            return text
        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        with _together():
            dist.broadcast(size, 0)
            data = data if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, 0)
        return data.numpy().tobytes().decode().strip()

    def agree(self, reason: str) -> str:
        """Give this rank's reason to stop, or that another one has one; empty: none has."""
        stopped = any(self.sum(bool(reason)))
        return reason or ("another rank stopped" if stopped else "")


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes that torchrun started for this run, until the end of the block."""
    with _together():
        store, rank, world = next(rendezvous("env://"))
        # torchrun keeps the store when it starts the processes again, and with it the addresses of those that are gone
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    dist.destroy_process_group()  # not after a failure: the others may be waiting, and torchrun ends them


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Let a rank that is gone be one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        words = str(error).partition(". ")[0].rpartition("] ")[2]  # gloo begins with a path and ends with advice
        raise RunError(f"another rank ended or can't be reached ({words})") from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    for tensor in tensors:
        if part and sum(t.numel() for t in part) + tensor.numel() > BUCKET:
            yield part
            part = []
        part.append(tensor)
    if part:
        yield part
