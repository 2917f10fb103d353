"""Several processes as one run, as torchrun starts them: each takes its stride of every step.

A step's loss is one sum over all its supervised tokens, so its gradient is the sum of what the ranks have: they are
added up once a step, after the last micro-batch. A rank without a pack in a short last step adds nothing, and still
takes part. Rank 0 alone writes and speaks.

Each holds the whole model, or, sharded, an equal share of its weights (FSDP2): a layer is whole only while it computes,
so all ranks run the model at the same time and equally often, and who has nothing to run runs an idle micro-batch. An
adapter is whole on every rank; in full fine-tuning gradients and optimizer state are sharded as the weights are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from corefit.engine.model import replaced
from corefit.errors import RecipeError, RunError, UserError
from corefit.types import IGNORE_INDEX, Batch

_PR_SET_PDEATHSIG = 1
"""Source: linux/prctl.h."""
BUCKET = 2**25
"""Numbers that are added up at a time."""
IDLE = (1, 8)
"""Rows and slots of a micro-batch of no data that a rank runs because others have one."""


def stand_in(rows: int, slots: int, *, supervised: bool) -> Batch:
    """Give a micro-batch [rows, slots] of no data, a document a row, all of it supervised or nothing."""
    ids = np.tile(np.arange(slots) % 8, (rows, 1))
    return Batch(
        input_ids=ids,
        labels=ids if supervised else np.full_like(ids, IGNORE_INDEX),
        position_ids=np.tile(np.arange(slots), (rows, 1)),
        cu_seqlens=np.arange(0, rows * slots + 1, slots, dtype=np.int32),
        n_supervised=rows * slots * supervised,
    )


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which process of how many this is."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Among the processes of this machine: the number of its GPU."""
    sharded: bool = False
    """True: each holds a share of the weights."""
    again: bool = False
    """True: torchrun has started this run before. Rank 0 knows it."""

    def device(self, wanted: str) -> str:
        """Give this rank's own device for ``run.device``.

        Raises:
            RecipeError: it is one GPU, of several processes.
        """
        if self.world == 1:
            return wanted
        if wanted.startswith("cuda:"):
            raise RecipeError(f"run.device: {wanted!r} is one GPU for {self.world} processes; 'cuda' is one for each")
        gpus = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
        return f"cuda:{self.local}" if gpus else wanted

    def sum(self, *values: float) -> list[float]:
        """Give the sum over ranks of each number. It never waits for a GPU."""
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        with together():
            dist.all_reduce(numbers)
        return numbers.tolist()

    def first(self, value: float) -> float:
        """Give rank 0's number."""
        return self.sum(0.0 if self.rank else value)[0]

    def in_step(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Give the micro-batches of this rank that are to be run; rank 0 never has fewer than another."""
        if not self.sharded:
            return [batch for batch in batches if batch.n_supervised]
        idle = stand_in(*IDLE, supervised=False)  # loss and gradient are 0
        return [*batches, *[idle] * (int(self.first(len(batches))) - len(batches))]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over ranks into each of these gradients, which have one dtype and one device."""
        for tensor in tensors:
            if isinstance(tensor, DTensor):  # FSDP has averaged it; only the mean works with gloo and NCCL alike
                tensor.to_local().mul_(self.world)
        self._in_place(tensors, dist.all_reduce)

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Put rank 0's values into each of these tensors, which have one dtype and one device, unless it is sharded."""
        self._in_place(tensors, partial(dist.broadcast, src=0))

    @torch.no_grad()
    def _in_place(self, tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
        if self.world == 1:
            return
        for part in _buckets([tensor for tensor in tensors if not isinstance(tensor, DTensor)]):
            flat = torch.cat([tensor.flatten() for tensor in part])
            with together():
                collective(flat)
            for tensor, values in zip(part, torch.split(flat, [t.numel() for t in part]), strict=True):
                tensor.copy_(values.view_as(tensor))

    def tell(self, text: str = "") -> str:
        """Give rank 0's text; what the others pass is not looked at."""
        if self.world == 1:
            return text
        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        with together():
            dist.broadcast(size, 0)
            data = data if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, 0)
        return data.numpy().tobytes().decode().strip()

    @contextlib.contextmanager
    def gathering(self, tensors: Mapping[str, Tensor]) -> Iterator[Callable[[str], Tensor]]:
        """Give rank 0 a function that gives one of these by its name, whole; meanwhile the others must ``lend``."""
        ask = self.tell if is_sharded(tensors.values()) else str
        try:
            yield lambda name: whole(tensors[ask(name)])
        finally:
            ask("")

    def lend(self, tensors: Mapping[str, Tensor]) -> None:
        """Give rank 0 of these what it asks for, until its ``gathering`` ends; at once if all are whole."""
        while is_sharded(tensors.values()) and (name := self.tell()):
            whole(tensors[name])

    def agree(self, reason: str) -> str:
        """Give this rank's reason to stop, or that another one has one; empty: none has."""
        stopped = any(self.sum(bool(reason)))
        return reason or ("another rank stopped" if stopped else "")


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes that torchrun started for this run, until the end of the block.

    Raises:
        UserError: the variables by which torchrun says so are incomplete. RunError: another process is gone.
    """
    said = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    counts = [int(said[name]) if said[name].isdecimal() else -1 for name in ("RANK", "WORLD_SIZE")]
    if not all(said.values()) or not 0 <= counts[0] < counts[1]:
        words = ", ".join(f"{name}={value}" if value else f"no {name}" for name, value in said.items())
        raise UserError(f"{words}: nobody sets these so; start with corefit launch or torchrun, or unset WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(AttributeError, OSError, TypeError):  # Linux alone has it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # where torchrun is killed, nobody else ends it
    with together():
        store, rank, world = next(rendezvous("env://"))
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        store = PrefixStore("corefit", store)
        again = rank == 0 and store.add("starts", 1) > 1
        store = _of_this_start(store, rank, world)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    with together():
        yield Ranks(rank, world, int(os.environ.get("LOCAL_RANK", "0")), again=again)
    dist.destroy_process_group()  # not after a failure: the others may be waiting, and torchrun ends them


def _of_this_start(store: Store, rank: int, world: int) -> Store:
    """Give a part of a store that all ranks know, and no earlier start.

    torchrun keeps its store when it starts the processes again, and with it the addresses of those that are gone. Its
    count of restarts is no help: a host whose processes were well has another one.
    """
    me = uuid4().hex
    if rank == 0:
        store.set("start", me)
        for other in range(1, world):
            store.set(f"{me}/{other}/{store.get(f'{me}/{other}').decode()}", "")
        return PrefixStore(me, store)
    start = ""
    while not start or not store.check([f"{start}/{rank}/{me}"]):  # rank 0 has seen this very process
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", me)
        time.sleep(0.02)
    return PrefixStore(start, store)


# ------------------------------------------------------------------------------------------------- shares of weights


def shard(
    root: nn.Module,
    layers: Iterable[nn.Module],
    *,
    device: str,
    keep: Collection[nn.Parameter] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Divide the weights of ``root`` among the ranks, on ``device``, but for those to ``keep``, which only move there.

    A layer is gathered while it runs, what is outside of ``layers`` while ``root`` runs: its forward, or ``within``.
    ``dtype``: in which layers are gathered; their shares and the sums of gradients stay fp32. None: as they are stored.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    kind = torch.device(device).type
    for parameter in keep:
        parameter.data = parameter.data.to(device)
    divide = partial(fully_shard, mesh=init_device_mesh(kind, (dist.get_world_size(),)), ignored_params={*keep})
    narrow = MixedPrecisionPolicy(dtype, dtype and torch.float32, cast_forward_inputs=False)
    make = nn.Parameter.__new__

    def made(of: type[nn.Parameter], data: Tensor, requires_grad: bool = True) -> nn.Parameter:
        return make(of, data, requires_grad and data.is_floating_point())

    # torch 2.11 makes of each share one that trains, for a moment, which the integers of 4-bit weights can't
    with replaced(nn.Parameter, "__new__", made):
        for layer in layers:
            divide(layer, mp_policy=narrow)
        # True: else what validation has gathered would still be there, and stale, after a checkpoint is read
        divide(root, reshard_after_forward=True)
    register_fsdp_forward_method(root, "within")


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether this rank has only a share of some of these."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """Give all of a tensor of which each rank has a share, once all of them ask for it; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """Give this rank's share of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Give of a whole tensor what this rank has of ``like``, on its device."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let a rank that is gone be one line, whatever was waiting for it."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error) or "rendezvous" in str(error)):
            raise
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
