"""The training loop, read top to bottom on one screen; one step of it below."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from corefit.engine.attention import Layout, to_device
from corefit.engine.model import first_line
from corefit.engine.nonfinite import explain, random_state, set_random_state
from corefit.engine.ranks import ALONE, IDLE, Ranks, stand_in, whole
from corefit.errors import CorefitError, RunError
from corefit.types import Batch, StepReport

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

SKIP_LIMIT = 20
"""Steps in a row with non-finite gradients after which a run stops; 20 halvings take 65536 below 0.1."""
SCALES = 50
"""Steps whose loss scale and cause of a skip a report of non-finite values shows."""
ENDLESS_STEPS = 1_000
"""A run without an end counts as this many steps, so that warm-up, a share of the run, means something."""


@dataclass(slots=True)
class LoopState:
    """What the loop carries from step to step; ``as_dict`` of it is part of every checkpoint."""

    step: int = 0
    """Steps attempted."""
    epoch: float = 0.0
    stream: Callable[[], Mapping[str, Any]] | None = None
    """Gives the stream's state as of the last batch consumed; None before the first."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Skipped steps by cause."""
    skipped_in_a_row: int = 0
    """Of non-finite steps; one without supervised tokens leaves it as it is."""

    def as_dict(self) -> dict[str, Any]:
        """Give a JSON-able object; ``stream`` becomes the state itself."""
        return {**asdict(replace(self, stream=None)), "stream": self.stream and dict(self.stream())}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoopState:
        """Undo ``as_dict``."""
        return cls(**{**data, "stream": data["stream"] and (lambda: data["stream"])})


@dataclass(slots=True)
class Every:
    """A hook and when it is due: after ``steps`` steps, or ``minutes`` after it last ran; 0: never for that reason."""

    call: Callable[[int], object]
    """Called with the step, after it."""
    steps: int = 0
    minutes: float = 0.0
    asked: bool = False
    """True: due after this step, whatever the numbers say."""
    last_step: int = 0
    last_time: float = field(default_factory=time.monotonic)

    def due(self, step: int) -> bool:
        """Whether to run after ``step``."""
        late = self.minutes > 0 and time.monotonic() - self.last_time >= 60 * self.minutes
        return self.asked or late or (self.steps > 0 and step % self.steps == 0)

    def run(self, step: int) -> None:
        """Call it, and count the minutes from its end."""
        self.call(step)
        self.last_step, self.last_time, self.asked = step, time.monotonic(), False


def train(
    *,
    loss_fn: nn.Module,
    steps: Iterable[tuple[Batch, ...]],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    lr_at: Callable[[float], float],
    state: LoopState,
    device: str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    clip: float | None = 1.0,
    epochs: int = 0,
    max_steps: int | None = None,
    on_step: Callable[[StepReport], object] = lambda report: None,
    validate: Every | None = None,
    sample: Every | None = None,
    checkpoint: Every | None = None,
    should_stop: Callable[[], str] = lambda: "",
    memory: Callable[[int, int], str] = lambda rows, slots: "",
    ranks: Ranks = ALONE,
) -> str:
    """Train until the data or the steps end, or ``should_stop()`` gives a reason; say which.

    ``loss_fn(input_ids, position_ids, labels, layout)`` gives the sum of nats over supervised tokens, fp32.
    ``lr_at(progress)`` gives the rate. ``clip``: the largest gradient norm; 0, None: off. ``state`` is changed in place
    before the hooks. The end is saved by ``checkpoint`` whatever the reason: ``"epochs"``, ``"max_steps"``, or what
    ``should_stop`` said. ``memory(rows, slots)`` says what takes the most of it in a micro-batch of this size, and what
    would help.

    Raises:
        NonFiniteError: the loss of a step was not finite, and what is saved is as if that step had not begun; or the
            gradients of 20 steps in a row were not. The weights are those before these steps.
        RunError: memory ran out, or another rank is gone; what is saved is as if that step had not begun.
        CorefitError: what ``steps`` or ``lr_at`` raised; the steps before it are saved.
    """
    loss_fn.train()
    supply = iter(steps)
    first, failed = state.step, False
    broken: CorefitError | None = None
    scales: deque[tuple[int, float, str | None]] = deque(maxlen=SCALES)
    while not (reason := ranks.agree(should_stop())):
        if max_steps and state.step >= max_steps:
            reason = "max_steps"
            break
        begun = time.perf_counter()
        try:
            batches = next(supply, None)
        except CorefitError as error:  # what was trained so far is good
            broken = error
        if reason := ranks.agree("data" if broken else ""):
            break
        if batches is None:
            reason = "epochs"
            break
        totals = Totals(*ranks.sum(*Totals.of(batches, ranks.rank)))
        progress = progress_at(state.step + 0.5, (state.epoch + totals.epoch) / 2, max_steps=max_steps, epochs=epochs)
        try:
            lr, random = lr_at(progress), random_state(device)
        except CorefitError as error:  # a scheduler's, which is the same on every rank
            broken, reason = error, "schedule"
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
        try:
            loss, norm, scale = take_step(
                loss_fn, batches, totals.supervised, parameters, optimizer, scaler, device, compute_dtype, clip, ranks
            )
        except (RuntimeError, RunError) as error:
            if not isinstance(error, RunError) and not ran_out(error):
                raise
            broken = error if isinstance(error, RunError) else out_of_memory(state.step + 1, batches, error, memory)
            optimizer.zero_grad(set_to_none=True)
            set_random_state(random, device)
            break
        seconds = time.perf_counter() - begun
        report = report_of(state.step + 1, totals, progress, loss, norm, lr, scale, seconds, device)
        scales.append((report.step, scale, report.cause))
        if failed := report.cause == "non_finite_loss":  # no scale mends it: as if the step had not begun
            set_random_state(random, device)
            break
        state.step, state.epoch = report.step, totals.epoch
        state.stream = batches[-1].state if batches else state.stream  # rank 0, which saves it, always has one
        count_skip(state, report)
        on_step(report)
        if failed := state.skipped_in_a_row >= SKIP_LIMIT:
            break
        for hook in (validate, sample, checkpoint):  # the checkpoint last: it records what the others wrote
            if hook is not None and ranks.first(hook.due(state.step)):  # a clock is not the same everywhere
                hook.run(state.step)
    # what is sharded is saved by all ranks together, and the others of a step that broke off may not be there
    halfway = isinstance(broken, HalfwayError) or (broken is not None and not reason and ranks.sharded)
    if checkpoint is not None and state.step not in (first, checkpoint.last_step) and not halfway:
        checkpoint.run(state.step)
    if broken is not None:
        raise broken
    if failed:
        run = partial(nats, loss_fn, device=device, compute_dtype=compute_dtype)
        raise explain(
            loss_fn, run, batches or (), report, compute_dtype=compute_dtype, parameters=parameters, device=device,
            random=random, scales=scales, in_a_row=state.skipped_in_a_row, ranks=ranks,
        )  # fmt: skip
    return reason


# ------------------------------------------------------------------------------------------------------------ one step


class Totals(NamedTuple):
    """What a step holds, on all ranks."""

    epoch: float
    supervised: float
    tokens: float
    samples: float
    packs: float
    slots: float

    @classmethod
    def of(cls, batches: Sequence[Batch], rank: int = 0) -> Totals:
        """Count micro-batches; the epoch after the step is rank 0's to say."""
        return cls(
            epoch=batches[-1].epoch if rank == 0 else 0.0,
            supervised=sum(batch.n_supervised for batch in batches),
            tokens=sum(batch.n_tokens for batch in batches),
            samples=sum(batch.n_samples for batch in batches),
            packs=sum(batch.input_ids.shape[0] for batch in batches),
            slots=sum(batch.input_ids.size for batch in batches),
        )


def take_step(
    loss_fn: nn.Module,
    batches: Sequence[Batch],
    supervised: float,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    device: str,
    compute_dtype: torch.dtype,
    clip: float | None,
    ranks: Ranks = ALONE,
) -> tuple[float, float, float]:
    """Give loss (nats per supervised token), gradient norm and loss scale; update the weights where both are finite.

    Loss and norm are NaN, and nothing is computed, where none of the step's tokens, on any rank, is ``supervised``.
    Gradients that aren't finite halve the loss scale; a loss that isn't leaves it as it is.
    """
    if not supervised:
        return math.nan, math.nan, scaler.get_scale()
    loss = scaler.scale(torch.zeros((), device=device))  # a rank may have nothing else to scale
    for batch in ranks.in_step(batches):
        part = nats(loss_fn, batch, device, compute_dtype) / supervised
        # Divided here, not after backward: a sum over thousands of tokens would overflow fp16 gradients.
        scaler.scale(part).backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    if ranks.world > 1:
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        ranks.add_up([loss, *(parameter.grad for parameter in parameters.values() if parameter.grad is not None)])
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
    if clip:
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), clip, norm)
    norm = whole(norm)
    scale = scaler.scale(torch.ones((), device=device))
    values: list[float] = torch.stack([loss, norm.to(loss), scale]).tolist()  # the step's one wait for the device
    if all(map(math.isfinite, values)):
        try:
            optimizer.step()  # what is finite is known: scaler.step would wait to hear it again
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise HalfwayError(
                f"out of memory in the optimizer's own step ({first_line(error)}): a smaller adapter.r or --set "
                "train.optimizer=paged_adamw_8bit needs less; --resume goes on from the newest checkpoint"
            ) from error
    scaler.update(None if math.isfinite(values[0]) else values[2])
    optimizer.zero_grad(set_to_none=True)
    return values[0], values[1], values[2]


def nats(loss_fn: nn.Module, batch: Batch, device: str, compute_dtype: torch.dtype) -> torch.Tensor:
    """Give the loss of a micro-batch, summed over its supervised tokens."""
    with autocast(device, compute_dtype):
        loss: torch.Tensor = loss_fn(*on_device(batch, device))
        return loss


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Give the context in which forward passes run; fp32 runs without."""
    return torch.autocast(device.partition(":")[0], dtype=dtype, enabled=dtype != torch.float32)


def on_device(batch: Batch, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Layout]:
    """Give input ids, position ids and labels as int64 [B, T'] on the device, and their layout."""
    ids, positions, labels = (to_device(a, device) for a in (batch.input_ids, batch.position_ids, batch.labels))
    return ids, positions, labels, Layout.of(batch.cu_seqlens, device, batch.labels)


def progress_at(step: float, epoch: float, *, max_steps: int | None, epochs: int) -> float:
    """Give the share of the run that lies before this point, in (0, 1); it ends at the first of its limits."""
    by_epochs = epoch / epochs if epochs else 0.0
    by_steps = step / (max_steps or (math.inf if epochs else ENDLESS_STEPS))
    return min(max(by_steps, by_epochs, 1e-6), 1 - 1e-6)


def report_of(
    step: int,
    totals: Totals,
    progress: float,
    loss: float,
    norm: float,
    lr: float,
    scale: float,
    seconds: float,
    device: str,
) -> StepReport:
    """Put a step's numbers together."""
    cause = None
    if not (math.isfinite(loss) and math.isfinite(norm)):
        cause = "non_finite_gradients" if math.isfinite(loss) else "non_finite_loss"
    cause = cause if totals.supervised else "nothing_supervised"
    return StepReport(
        step=step,
        epoch=totals.epoch,
        progress=progress,
        loss=loss if math.isfinite(loss) else None,
        lr=lr,
        grad_norm=norm if math.isfinite(norm) else None,
        loss_scale=scale,
        skipped=cause is not None,
        cause=cause,
        tokens=int(totals.tokens),
        supervised_tokens=int(totals.supervised),
        samples=int(totals.samples),
        packs=int(totals.packs),
        fill=100 * totals.tokens / totals.slots,
        tokens_per_s=totals.supervised / max(seconds, 1e-9),
        seconds=seconds,
        memory_bytes=peak_memory(device),
    )


def count_skip(state: LoopState, report: StepReport) -> None:
    """Count a skipped step under its cause."""
    if report.cause is not None:
        state.skipped[report.cause] = state.skipped.get(report.cause, 0) + 1
    if report.cause != "nothing_supervised":
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if report.skipped else 0


class HalfwayError(RunError):
    """Memory ran out while the optimizer was changing weights and its state: neither is as before or after the step."""


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out: torch's own on a GPU, its libraries' there or pinned memory, or the CPU's."""
    words = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def out_of_memory(
    step: int, batches: Sequence[Batch], error: BaseException, memory: Callable[[int, int], str]
) -> RunError:
    """Say how large the step was, what takes the most and what makes it smaller; let go of what the step made."""
    traceback.clear_frames(error.__traceback__)
    shapes = (batch.input_ids.shape for batch in batches)
    rows, slots = max(shapes, key=math.prod, default=IDLE)
    said = RunError(
        f"step {step}: out of memory with {rows} packs of {slots:,} slots: {memory(rows, slots) or 'make them fewer'} "
        f"({first_line(error)}); all before this step is saved, --resume goes on at it"
    )
    said.__cause__ = error
    return said


def try_out(
    loss_fn: nn.Module,
    rows: int,
    slots: int,
    parameters: Mapping[str, nn.Parameter],
    device: str,
    compute_dtype: torch.dtype,
    state_bytes: int = 0,
) -> bool:
    """Whether there is memory for a micro-batch [rows, slots], all of it supervised, beside the optimizer's state.

    A forward and a backward; weights, gradients (none) and random state are as before.
    """
    random = random_state(device)
    batch = stand_in(rows, slots, supervised=True)
    try:
        held = torch.empty(state_bytes, dtype=torch.uint8, device=device)
        loss_fn.train()
        nats(loss_fn, batch, device, compute_dtype).backward()  # type: ignore[no-untyped-call]
        del held
        return True
    except RuntimeError as error:
        if not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    finally:
        for parameter in parameters.values():
            parameter.grad = None
        set_random_state(random, device)
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def peak_memory(device: str) -> int | None:
    """Give the most bytes so far: allocated by torch on CUDA, else resident in this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
