"""Checkpoints: written aside, hashed, renamed; safetensors and JSON only, nothing that a program could hide in.

A folder ``step-NNNNNNNN`` appears whole or not at all. Its ``manifest.json`` is written last, with the size and SHA-256
of every other file; ``latest`` and ``best``, beside the folders, name the newest and the one with the lowest validation
loss. What a killed save leaves behind is called ``.tmp-*`` and goes with the next save.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from corefit.durable import make_folder, whole_folder, write_whole
from corefit.engine.adapter import misfit
from corefit.engine.export import entries_of, write_tensors
from corefit.engine.nonfinite import require_finite
from corefit.engine.optimizer import load_optimizer_state, optimizer_state
from corefit.engine.ranks import ALONE, Ranks, shared_as
from corefit.errors import CheckpointError, ModelError, RecipeError

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

FORMAT = 1
FILES = ("optimizer.safetensors", "rng.safetensors", "state.json", "trainable.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and whose hashes agree; tensors are on the CPU."""

    path: Path
    step: int
    state: Mapping[str, Any]
    """``state.json``: ``loop`` (the fields of ``LoopState``, so also the stream's state), ``lengths`` (bytes of
    ``metrics.jsonl`` and ``samples.jsonl``), ``versions``, ``extra`` (the caller's), and what ``restore`` puts back."""
    trainable: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    rng: Mapping[str, torch.Tensor]


def save(
    folder: Path,
    step: int,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    loop: Mapping[str, Any],
    lengths: Callable[[], Mapping[str, int]],
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
    best: bool = False,
    ranks: Ranks = ALONE,
) -> Path:
    """Write ``folder/step-NNNNNNNN`` and delete all but the newest ``keep`` (at least 1) whole ones and the best.

    ``best``: it is the best so far. ``loop`` is ``asdict(LoopState)``, ``lengths()`` makes the files that a resume cuts
    durable, and gives their lengths in bytes. One tensor is held at a time; where weights are sharded, the other
    ``ranks`` ``lend``.

    Raises:
        CheckpointError: it can't be written (disk full, no permission); older ones are as they were, the run can go on.
        NonFiniteError: weights are not finite, so the older ones are the last good ones; the run can't go on.
    """
    require_finite(step, parameters, ranks)
    target = folder / name_of(step)
    moments, scalars = optimizer_state(optimizer, parameters)
    bits, plain_rng = rng_state()
    state: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "loop": loop,
        "scaler": scaler.state_dict(),
        "optimizer": scalars,
        "rng": plain_rng,
        "versions": versions(),
        "extra": extra or {},
    }
    try:
        with ranks.gathering({**parameters, **moments}) as tensor_of:
            for litter in folder.glob(".tmp-*"):
                shutil.rmtree(litter) if litter.is_dir() else litter.unlink()
            make_folder(folder)
            # one may be there: left torn, or saved before by a run that came here again
            with whole_folder(target) as aside:
                state["lengths"] = lengths()
                write_tensors(aside / "trainable.safetensors", entries_of(parameters), tensor_of)
                write_tensors(aside / "optimizer.safetensors", entries_of(moments), tensor_of)
                write_tensors(aside / "rng.safetensors", entries_of(bits), bits.__getitem__)
                (aside / "state.json").write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
                files = {n: {"size": (aside / n).stat().st_size, "sha256": sha256(aside / n)} for n in FILES}
                manifest = json.dumps({"format": FORMAT, "files": files}, indent=1)
                (aside / "manifest.json").write_text(manifest, encoding="utf-8")
        mark(folder, "latest", step)
        if best:
            mark(folder, "best", step)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f"{target}: not saved: {error}") from error
    whole = [path for path in steps_in(folder) if step_of(path) <= step and not torn(path, hashes=False)]
    kept = {*whole[-max(keep, 1) :], marked(folder, "best")}
    for path in steps_in(folder):
        if step_of(path) <= step and path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return target


def lend(step: int, *, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Take part in the ``save`` of another rank.

    Raises:
        NonFiniteError: as there.
    """
    require_finite(step, parameters, ranks)
    ranks.lend({**parameters, **optimizer_state(optimizer, parameters)[0]})


def mark(folder: Path, word: str, step: int) -> None:
    """Let ``latest`` or ``best`` name a step.

    Raises:
        OSError: the disk refuses.
    """
    write_whole(folder / word, f"{name_of(step)}\n".encode())


def marked(folder: Path, word: str) -> Path | None:
    """Give the checkpoint that ``latest`` or ``best`` names; None: there is no such file."""
    path = folder / word
    return folder / path.read_text("utf-8", "replace").strip() if path.is_file() else None


def find(folder: Path, which: str) -> Path:
    """Give the checkpoint of a step, ``latest`` or ``best``; it may still be torn.

    Raises:
        ModelError: there is none; names those that are there.
    """
    path = folder / name_of(int(which)) if which.isdecimal() else marked(folder, which)
    if path is None or not path.is_dir():
        there = ", ".join(str(step_of(found)) for found in steps_in(folder))
        raise ModelError(f"{folder}: no checkpoint {which}; steps that are there: {there or 'none'}")
    return path


def size_of(path: Path) -> int:
    """Give the bytes of all files of a checkpoint."""
    return sum(file.stat().st_size for file in path.iterdir())


def newest_whole(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """Give the newest whole checkpoint, None where there is none, and a line for every torn one passed over."""
    passed: list[str] = []
    for path in reversed(steps_in(folder)):
        if not (why := torn(path)):
            return path, tuple(passed)
        passed.append(why)
    return None, tuple(passed)


def load(path: Path, *, whole: bool = False) -> Checkpoint:
    """Read a checkpoint; ``whole``: it is known to be, as what ``newest_whole`` has just given.

    Raises:
        CheckpointError: it is torn, tampered with, or written by a later corefit.
    """
    if not whole and (why := torn(path)):
        raise CheckpointError(why)
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        optimizer, rng, trainable = (load_file(path / f"{n}.safetensors") for n in ("optimizer", "rng", "trainable"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    return Checkpoint(path, state["step"], state, trainable, optimizer, rng)


def check_fit(checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> None:
    """See that a checkpoint's weights are the model's by name and shape.

    Raises:
        RecipeError: the adapter or the model is another one.
    """
    if found := misfit(checkpoint.trainable, parameters):
        raise RecipeError(f"{checkpoint.path}: holds {found}: made with another [adapter] or model.base?")


def restore(
    checkpoint: Checkpoint,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
) -> str:
    """Put back weights, optimizer, loss scale and random states: the last thing to do before training goes on.

    The stream's state and the loop's are the caller's to put back, from ``checkpoint.state["loop"]``. Give a line about
    what could not be put back; empty: all was.

    ``check_fit`` has seen that it is of this model.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shared_as(parameter, checkpoint.trainable[name]))
    said = load_optimizer_state(optimizer, parameters, checkpoint.optimizer, checkpoint.state["optimizer"])
    if checkpoint.state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(checkpoint.state["scaler"])
    set_rng_state(checkpoint.rng, checkpoint.state["rng"])
    return said


# -------------------------------------------------------------------------------------------------------- below these


def torn(path: Path, *, hashes: bool = True) -> str | None:
    """Say what is wrong with a checkpoint folder, in one line; None: it is whole."""
    for name in ("manifest.json", *FILES):
        if not (path / name).is_file():  # a pipe or a device would be read without end
            return f"{path}: torn: no {name}"
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"{path}: written in format {manifest['format']}, this corefit reads {FORMAT}"
        for name in FILES:
            size, expected = (path / name).stat().st_size, manifest["files"][name]
            if size != expected["size"]:
                return f"{path}: torn: {name} has {size} bytes of {expected['size']}"
            if hashes and sha256(path / name) != expected["sha256"]:
                return f"{path}: torn: {name} is not what was written (SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path}: torn: manifest.json: {error!r}"
    return None


def name_of(step: int) -> str:
    """Give the name of a step's folder; it sorts as the steps do."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Give the step in the name of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def steps_in(folder: Path) -> list[Path]:
    """Give all checkpoint folders, whole or torn, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal() and path.is_dir()]
    return sorted(found, key=step_of)


def sha256(path: Path) -> str:
    """Give the hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, Any]:
    """Give what the bits of a run depend on."""
    found: dict[str, Any] = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    for name in ("corefit", "torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Give the random states: torch's (CPU, every CUDA device) as tensors, Python's and numpy's as JSON-able values."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, *rest = np.random.get_state(legacy=True)
    return tensors, {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}


def set_rng_state(tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
    """Put back what ``rng_state`` gave; states of CUDA devices that are not here are left out."""
    torch.set_rng_state(tensors["cpu"])
    for name, state in tensors.items():
        if name != "cpu" and torch.cuda.is_available() and int(name.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
