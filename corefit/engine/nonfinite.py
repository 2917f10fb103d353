"""Where values that are not finite come from: the step is run again, and every module of the model is watched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corefit.engine.model import first_line
from corefit.engine.ranks import ALONE, Ranks, is_sharded, own, whole
from corefit.errors import NonFiniteError
from corefit.types import IGNORE_INDEX, Batch, StepReport

WRAPPERS = re.compile(r"\.(base_layer|default|original_module|modules_to_save)(?=\.|$)")
"""What peft puts into the names of the modules that it wraps."""
NOTHING = "the replay found nothing"
PADDING = "padding"
"""Stands where other documents have their ``path:line``."""
SHOWN = 3
"""Records or weights that the error's one line names."""


class Watch:
    """Watches all modules of ``root`` in the passes that run inside a ``with``.

    Forwards, the first output that is not finite is put down to the innermost module around it, itself included, whose
    inputs were finite. Backwards, the first such gradient (of an input, an output or a weight) is put down to the
    innermost one whose output's gradient was finite; the loss where there is none.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.first: dict[str, dict[str, Any]] = {}
        """Direction -> the first tensor that was not finite, the module that made it, and those of the module's weights
        that are not finite themselves."""
        self._names = plain_names(root)
        self._open: list[tuple[nn.Module, bool]] = []  # modules that run, and whether their inputs were finite
        self._paths: dict[nn.Module, list[nn.Module]] = {}  # of every module that ran, from the root
        self._fine: set[nn.Module] = set()  # with a finite gradient: the first is that of the output
        self._hooks: list[Any] = []

    def __enter__(self) -> Watch:
        for module in self._names:
            self._hooks += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave),
            ]
            for name, weight in module.named_parameters(recurse=False):
                if weight.requires_grad:
                    self._hooks.append(on_gradient(weight, partial(self._weight_gradient, module, name)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        inputs = [args, {key: value for key, value in kwargs.items() if "mask" not in key}]  # masks may be -inf
        self._open.append((module, all(map(finite, tensors(inputs)))))
        path = self._paths[module] = [open_ for open_, _ in self._open]

        def own(value: Any) -> Any:  # noqa: ANN401, an alias, whose gradient is what flows through this module alone
            if isinstance(value, Tensor) and (alias := value.view_as(value)).requires_grad:
                on_gradient(alias, partial(self._gradient, path, "input of"))
                return alias
            return value

        return tuple(map(own, args)), {key: own(value) for key, value in kwargs.items()}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        for tensor in tensors(output):
            if "forward" not in self.first and not finite(tensor):
                clean = (around for around, clean in reversed(self._open) if clean)
                self._found("forward", next(clean, self.root), f"output of {self._names[module]}", tensor)
            if tensor.requires_grad:
                on_gradient(tensor, partial(self._gradient, self._paths[module], "output of"))
        self._open.pop()

    def _gradient(self, path: list[nn.Module], of: str, gradient: Tensor) -> None:
        if "backward" not in self.first and not finite(gradient):
            fine = (around for around in reversed(path) if around in self._fine)
            self._found("backward", next(fine, self.root), f"gradient of {of} {self._names[path[-1]]}", gradient)
        else:
            self._fine.add(path[-1])

    def _weight_gradient(self, module: nn.Module, name: str, gradient: Tensor) -> None:
        around = [path for ran, path in self._paths.items() if module in ran.modules()]  # it needn't run by itself
        innermost = min(around, key=lambda path: len(list(path[-1].modules())), default=[module])
        self._gradient(innermost, f"{name} of", gradient)

    def _found(self, direction: str, module: nn.Module, what: str, tensor: Tensor) -> None:
        parts = [part for part in module.modules() if part is module or part not in self._paths]  # a head isn't called
        weights = [f"{self._names[part]}.{name}" for part in parts for name in not_finite(part)]
        self.first[direction] = {
            "module": weights[0].rpartition(".")[0] if weights else self._names[module],
            "direction": direction,
            "tensor": what,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "values": {"all": tensor.numel(), "nan": int(tensor.isnan().sum()), "inf": int(tensor.isinf().sum())},
            "weights": weights,
        }


def explain(
    loss_fn: nn.Module,
    nats: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    report: StepReport,
    *,
    parameters: Mapping[str, nn.Parameter],
    device: str,
    compute_dtype: torch.dtype,
    random: Sequence[Tensor],
    scales: Iterable[tuple[int, float, str | None]],
    in_a_row: int,
    ranks: Ranks = ALONE,
) -> NonFiniteError:
    """Run a step's micro-batches again, then each document of those that aren't finite alone; say what was found.

    With sharded weights documents are not run alone: the ranks would not run equally many.
    Weights, gradients, optimizer, loss scaler and random state are afterwards as they were.

    Args:
        loss_fn: the root of what is watched.
        nats: runs it on a micro-batch as training does.
        batches: of the step.
        report: of the step; its loss scale is used again.
        parameters: those that are trained.
        device: where they are.
        compute_dtype: in which training multiplies.
        random: ``random_state`` before the step.
        scales: (step, loss scale, cause of a skip) of the last steps.
        in_a_row: steps skipped one after another, this one included.
        ranks: that run the step together; each looks at its own micro-batches.
    """
    now = random_state(device)
    bad: dict[int, dict[str, Any]] = {}
    records: list[str] = []
    together: list[str] = []
    outcome = NOTHING

    def replay(batch: Batch) -> dict[str, Any] | None:
        with Watch(loss_fn) as watch:
            loss = nats(batch)
            if (is_finite := finite(loss)) or ranks.sharded:
                (loss / report.supervised_tokens * report.loss_scale).backward()  # type: ignore[no-untyped-call]
        # what isn't finite on the way and leaves no trace in loss or gradients is meant so (a mask)
        return next(iter(watch.first.values())) if "backward" in watch.first or not is_finite else None

    try:
        set_random_state(random, device)
        for i, batch in enumerate(ranks.in_step(batches)):
            if (first := replay(batch)) and i < len(batches):  # beyond them is what a rank only takes part in
                bad[i] = first
        if any(ranks.sum(len(bad))):
            outcome = "the replay found it" if bad else "another rank's replay found it"
        elif not finite(whole(nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None]))):
            outcome = "every gradient of the replay is finite, only their norm is not"
        for i in bad:
            parts = () if ranks.sharded else documents(batches[i])
            alone = [origin for document, origin in parts if replay(document)]
            records += [origin for origin in alone if origin != PADDING] or alone
            together += () if alone else batches[i].origins()
    except Exception as error:  # whatever it is, the step failed for a reason of its own, which must come through
        outcome = f"the replay failed: {type(error).__name__}: {first_line(error)}"
    finally:
        set_random_state(now, device)
        for parameter in parameters.values():
            parameter.grad = None
    facts = {
        "step": report.step,
        "cause": report.cause,
        "in_a_row": in_a_row,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "loss_scale": report.loss_scale,
        "replay": outcome,
        "first": next(iter(bad.values()), None),
        "micro_batches": {"all": len(batches), "not_finite": [i + 1 for i in bad]},
        "records": list(dict.fromkeys(records)),
        "records_together": list(dict.fromkeys(together)),
        "scales": [dict(zip(("step", "loss_scale", "cause"), scale, strict=True)) for scale in scales],
    }
    facts["try"] = ways(facts, every=len(records) >= sum(batches[i].n_samples for i in bad))
    return NonFiniteError(in_one_line(facts), facts)


# ----------------------------------------------------------------------------------------------------------- words


def in_one_line(facts: Mapping[str, Any]) -> str:
    """Give the error's line."""
    what = "loss is" if facts["cause"] == "non_finite_loss" else f"gradients of {facts['in_a_row']} steps in a row are"
    where = culprit(facts["first"]) if facts["first"] else facts["replay"]
    if facts["records"]:
        where += f", for {some(facts['records'])}"
    elif facts["records_together"]:
        where += f", for no record alone, but for {some(facts['records_together'])} together"
    return (
        f"step {facts['step']}: the {what} not finite (loss scale {facts['loss_scale']:g}): {where}; no weight was "
        f"changed; what may help: {', or '.join(facts['try'])}; more is in nonfinite.json"
    )


def culprit(first: Mapping[str, Any]) -> str:
    """Give module, direction, and what is not finite there, in words."""
    what = f"itself not finite: {some(first['weights'])}" if first["weights"] else first["tensor"]
    return f"first in {first['module']}, {first['direction']} ({what})"


def ways(facts: Mapping[str, Any], *, every: bool) -> list[str]:
    """Give what may help; ``every``: all records of the step are concerned."""
    if facts["replay"] == NOTHING:
        return ["running again: what doesn't repeat points to the device, its memory or its drivers"]
    if facts["first"] and facts["first"]["weights"]:
        return ["another copy of the base model", "an earlier checkpoint and a lower train.lr if training made them so"]
    wider = ["--set train.precision=bf16 or fp32 (float16 ends at 65504)"] * (facts["compute_dtype"] == "float16")
    return [*wider, *["a look at these records"] * (not every), "a lower train.lr"]


def some(names: Sequence[str]) -> str:
    """Give the first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# ----------------------------------------------------------------------------------------------------------- parts


def plain_names(root: nn.Module) -> dict[nn.Module, str]:
    """Give all modules with their names in the base model: without what loss and adapter wrap around them."""
    from transformers import PreTrainedModel

    named = list(root.named_modules())
    base = next((name for name, module in named if isinstance(module, PreTrainedModel)), "")
    unnamed = {module: type(module).__name__ if isinstance(module, PreTrainedModel) else "loss" for _, module in named}
    return {m: WRAPPERS.sub("", name.removeprefix(base).removeprefix(".")) or unnamed[m] for name, m in named}


def documents(batch: Batch) -> Iterator[tuple[Batch, str]]:
    """Give every document as a micro-batch of its own, with its ``path:line``; padding last in its pack."""
    width, origins = batch.input_ids.shape[1], iter(batch.origins())
    flat = {name: getattr(batch, name).reshape(-1) for name in ("input_ids", "labels", "position_ids")}
    for begin, end in pairwise(batch.cu_seqlens.tolist()):
        part = {name: array[None, begin:end] for name, array in flat.items()}
        ids, labels = part["input_ids"], part["labels"]
        # a sample has a supervised token or, cut from a longer one, at least two different ones
        padding = end % width == 0 and (labels == IGNORE_INDEX).all() and (ids == ids[0, 0]).all()
        part["cu_seqlens"] = np.array([0, end - begin], np.int32)
        yield replace(batch, **part), PADDING if padding else next(origins)


def on_gradient(tensor: Tensor, call: Callable[[Tensor], None]) -> Any:  # noqa: ANN401, a handle with remove()
    """Have ``call`` see the gradient of a tensor."""
    return tensor.register_hook(call)  # type: ignore[no-untyped-call]


def tensors(value: Any) -> Iterator[Tensor]:  # noqa: ANN401, what modules take and give
    """Give the tensors of numbers with a point in a tensor, list, tuple or mapping, however nested."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(part)


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite."""
    return bool(tensor.detach().isfinite().all())


def not_finite(module: nn.Module) -> list[str]:
    """Give the names of a module's own weights that are not finite; quantised ones go by their scales."""
    found = []
    for name, weight in module.named_parameters(recurse=False):
        kept = getattr(module, "state" if weight.dtype == torch.int8 else "quant_state", None)
        scales = [getattr(kept, key, None) for key in ("absmax", "offset", "SCB")]  # as bitsandbytes calls them
        if not all(finite(own(values)) for values in (weight, *scales) if values is not None):
            found.append(name)
    return found


def require_finite(step: int, parameters: Mapping[str, nn.Parameter], ranks: Ranks = ALONE) -> None:
    """See that weights are fit to be saved; where they are sharded, all ranks look at their shares together.

    Raises:
        NonFiniteError: some are not finite.
    """
    wrong = torch.stack([~own(p.detach()).isfinite().all() for p in parameters.values()]).tolist()
    wrong = ranks.sum(*wrong) if is_sharded(parameters.values()) else wrong
    if bad := [name for name, is_wrong in zip(parameters, wrong, strict=True) if is_wrong]:
        facts = {"step": step, "cause": "non_finite_weights", "weights": bad}
        raise NonFiniteError(
            f"step {step}: weights are not finite after its update: {some(bad)}; nothing is saved over earlier "
            "checkpoints, which are whole; what may help: a lower train.lr, or another base if it came with them",
            facts,
        )


def random_state(device: str) -> tuple[Tensor, ...]:
    """Give torch's random state, of the CPU and of the device; takes microseconds."""
    state = (torch.get_rng_state(),)
    return (*state, torch.cuda.get_rng_state(device)) if device.startswith("cuda") else state


def set_random_state(state: Sequence[Tensor], device: str) -> None:
    """Put back what ``random_state`` gave."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)
