"""Optimizers and the loss scaler: made by name, their state taken apart into named tensors and plain numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from corefit.engine.model import import_bitsandbytes
from corefit.engine.ranks import shared_as
from corefit.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

OPTIMIZERS = {
    "adamw": "",
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
"""``train.optimizer`` -> the class of bitsandbytes; empty: torch's own."""
CONSTANT = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""Tables that bitsandbytes shares between all parameters and makes anew: never saved."""


def make_scaler(device: str, *, enabled: bool) -> GradScaler:
    """Give the dynamic loss scaler, from 65536; not enabled (bf16, fp32) it passes everything through."""
    return torch.amp.GradScaler(device.partition(":")[0], init_scale=2.0**16, enabled=enabled)


def make_optimizer(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    lr_mult: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Give the optimizer called ``name`` over the parameters sorted by name; bitsandbytes is imported only if needed.

    ``lr_mult``: a regular expression -> by how much the learning rate of the parameters is multiplied in whose name it
    is found; the first one counts. A group's ``lr_mult`` holds it for whoever sets the rate.

    Raises:
        RecipeError: an expression of ``lr_mult`` that finds nothing.
    """
    by_mult: dict[float, list[nn.Parameter]] = {}
    for key, mult in sorted(_multiples(parameters, lr_mult or {}).items()):
        by_mult.setdefault(mult, []).append(parameters[key])
    ordered: list[Any] = [{"params": group, "lr_mult": mult} for mult, group in sorted(by_mult.items())]
    if not OPTIMIZERS[name]:
        # None: several operations on many tensors at once, which hold a copy of all that trains
        fused = all(parameter.is_cuda for parameter in parameters.values()) or None
        return torch.optim.AdamW(ordered, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
    import_bitsandbytes()  # with precautions
    import bitsandbytes

    make = getattr(bitsandbytes.optim, OPTIMIZERS[name])
    optimizer: torch.optim.Optimizer = make(ordered, lr=lr, betas=betas, weight_decay=weight_decay)
    # bitsandbytes warns at the first step of a paged optimizer on a CPU; optimizer_notice says it at the start.
    optimizer._cpu_paged_warned = True  # type: ignore[attr-defined]
    return optimizer


def _multiples(parameters: Mapping[str, nn.Parameter], lr_mult: Mapping[str, float]) -> dict[str, float]:
    """Give the multiple of the learning rate of every parameter."""
    found = dict.fromkeys(parameters, 1.0)
    for pattern, mult in reversed(list(lr_mult.items())):
        names = [name for name in parameters if re.search(pattern, name)]
        if not names:
            raise RecipeError(
                f"train.lr_mult: {pattern!r} is in no name of a trained weight, such as {min(parameters)}"
            )
        found |= dict.fromkeys(names, float(mult))
    return found


def optimizer_notice(name: str, device: str) -> str | None:
    """Give the line to print where this optimizer works otherwise than its name says; None: it does not."""
    if name.startswith("paged_") and not device.startswith("cuda"):
        return f"optimizer {name}: paging needs CUDA, so its state stays in ordinary memory"
    return None


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Give the state as tensors ``parameter/key``, not copied, and as JSON-able ``{"values": ..., "kind": ...}``.

    What the recipe says, rates and decay, is no state.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and key not in CONSTANT:
                tensors[f"{name}/{key}"] = value.detach()
            elif key not in CONSTANT:
                values.setdefault(name, {})[key] = value
    return tensors, {"values": values, "kind": _kind(optimizer)}


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """Give the name of what state it has: paged or not, it is the same."""
    return type(optimizer).__name__.removeprefix("Paged")


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    scalars: Mapping[str, Any],
) -> str:
    """Put back what ``optimizer_state`` gave, on each parameter's device, paged where the optimizer pages.

    State of another kind of optimizer is left out: give a line that says so, else nothing.

    Raises:
        CheckpointError: the state is of a parameter that is not trained now.
    """
    kind, mine = scalars.get("kind"), _kind(optimizer)
    if kind not in (None, mine):
        return f"optimizer: {mine} has other state than {kind} left, so its averages begin anew"
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in scalars["values"].items()}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        state.setdefault(name, {})[key] = tensor
    if strange := sorted(state.keys() - parameters.keys()):
        raise CheckpointError(
            f"optimizer state of a weight that is not trained now: {strange[0]} ({len(strange)} in all)"
        )
    optimizer.state.clear()
    for name, values in state.items():
        parameter = parameters[name]
        for key, value in values.items():
            if not isinstance(value, torch.Tensor):
                continue
            if key == "step":  # torch keeps its count on the CPU, but for its one kernel
                values[key] = value.to(parameter.device if optimizer.defaults.get("fused") else "cpu")
            elif key in ("state1", "state2"):  # bitsandbytes: only its own buffers are paged
                values[key] = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)  # type: ignore[attr-defined]
            else:
                values[key] = shared_as(parameter, value)
        if "absmax1" in values:  # 8-bit
            for key, table in CONSTANT.items():
                tables = optimizer.name2qmap  # type: ignore[attr-defined]
                values[key] = tables[table] = tables[table].to(parameter.device)
        optimizer.state[parameter] = values
    return ""
