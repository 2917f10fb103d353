"""Checkpoints damaged after they were written: flipped, cut, replaced. Never loaded, always named, the one before used.

What a hash beside the files can't see is somebody who edits a file and its line in ``manifest.json`` alike: whoever may
write the folder may write a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import Lab, find, outcome

from corefit.engine.checkpoint import load, newest_whole
from corefit.errors import CheckpointError

KEPT = ["checkpoint.keep=2"]
FILES = ["manifest.json", "optimizer.safetensors", "rng.safetensors", "state.json", "trainable.safetensors"]


@pytest.fixture(scope="module")
def unfinished(lab: Lab, straight: Any) -> Path:
    """A run with two checkpoints that was killed before its adapter was written."""
    run = lab.new()
    k = find(lab.trace(straight[0]), "mkdir", r"\.tmp-adapter").k
    lab.run(run, sets=KEPT, at=k - 6, do="kill")  # the straight run also deletes a checkpoint: five files and a folder
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000002", "step-00000003"]
    assert not (run / "adapter").exists()
    return run


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: (path.unlink(), make(path))


def damages(path: Path, flips: int, cuts: int, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield what is done to a file, and how."""
    data = path.read_bytes()
    ends = [0, 1, 7, 8, 9, len(data) // 2, len(data) - 1]
    for at in {*ends, *rng.sample(range(len(data)), min(flips, len(data)))}:
        for bits in (1 << rng.randrange(8), 0xFF):
            yield f"byte {at} ^ {bits}", content(data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :])
    for size in {*ends, *rng.sample(range(len(data)), min(cuts, len(data)))}:
        yield f"cut to {size}", content(data[:size])
    yield "zeros", content(bytes(len(data)))
    yield "a byte more", content(data + b"\0")
    yield "absent", Path.unlink
    yield "a folder", instead(Path.mkdir)
    yield "a link to nothing", instead(lambda p: p.symlink_to("nothing"))
    yield "a link to itself", instead(lambda p: p.symlink_to(p.name))
    yield "an endless device", instead(lambda p: p.symlink_to("/dev/zero"))
    yield "a pipe", instead(os.mkfifo)
    yield "of another checkpoint", content((path.parents[1] / "step-00000002" / path.name).read_bytes())


@pytest.fixture
def bounded() -> Iterator[None]:
    """a GiB more than now and five minutes: what reads without end fails here, not the machine."""

    def late(*_: object) -> None:
        raise TimeoutError("read for five minutes")

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("flips", "cuts"), [(30, 12), pytest.param(1000, 300, marks=pytest.mark.full)])
def test_no_damage_is_loaded_or_a_traceback(name: str, flips: int, cuts: int, unfinished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(unfinished / "checkpoints", folder)
    before, newest = folder / "step-00000002", folder / "step-00000003"
    assert newest_whole(folder) == (newest, ())
    data, count = (newest / name).read_bytes(), 0
    for what, damage in damages(newest / name, flips, cuts, random.Random(name)):
        damage(newest / name)
        found, torn = newest_whole(folder)
        assert found == before, what
        assert len(torn) == 1, what
        assert torn[0].startswith(f"{newest}: "), what
        assert "\n" not in torn[0], what
        with pytest.raises(CheckpointError, match="step-00000003: "):
            load(newest)
        shutil.rmtree(newest / name) if (newest / name).is_dir() else (newest / name).unlink(missing_ok=True)
        (newest / name).write_bytes(data)
        count += 1
    load(newest)
    print(f"{name}: {count} damages")
    assert count > 70


def test_a_consistent_edit_is_not_seen(unfinished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(unfinished / "checkpoints", folder)
    state, manifest = (folder / "step-00000003" / name for name in ("state.json", "manifest.json"))
    state.write_text(state.read_text("utf-8").replace('"step": 3', '"step": 4'), "utf-8")
    facts = json.loads(manifest.read_text("utf-8"))
    facts["files"]["state.json"]["sha256"] = hashlib.sha256(state.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(facts), "utf-8")
    assert newest_whole(folder) == (folder / "step-00000003", ())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damaged", "damage", "step"),
    [
        (["step-00000003/trainable.safetensors"], flip, 2),
        (["step-00000003/manifest.json"], instead(Path.mkdir), 2),
        (["step-00000003/optimizer.safetensors", "step-00000002/state.json"], lambda p: os.truncate(p, 100), 0),
        (["step-00000003/rng.safetensors", "latest"], Path.unlink, 2),
    ],
)
def test_a_resumed_run_names_the_torn_ones_and_goes_on_from_the_last_whole_one(
    damaged: list[str], damage: Callable[[Path], object], step: int, unfinished: Path, lab: Lab, straight: Any
) -> None:
    run = lab.new()
    shutil.copytree(unfinished, run)
    for name in damaged:
        damage(run / "checkpoints" / name)
    done = lab.run(run, sets=KEPT)
    assert done.code == 0, done.output
    for name in damaged:
        assert name == "latest" or f"/checkpoints/{name.split('/')[0]}: torn: " in done.output
    assert (f"resume: from step {step}" in done.output) == (step > 0)
    assert "Traceback" not in done.output
    assert outcome(run) == straight[1]
