"""The power fails after any call: whatever the disk then holds, what was said to be saved is there and whole."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import disk
import pytest
from runs import STEP, Call, Lab, find, outcome

from corefit.engine.checkpoint import load, newest_whole


def reported(calls: list[Call], k: int) -> str:
    """Give the newest checkpoint that the run counted on by call k: it wrote elsewhere, or deleted an older one."""
    found = named = ""
    for call in calls[:k]:
        if call.op == "rename" and (match := re.fullmatch(STEP, call.path2)):
            named = match[1]
        elif not call.path.startswith("checkpoints") or call.op in ("unlink", "rmdir"):
            found = named
    return found


@pytest.fixture(scope="module")
def continued(lab: Lab, straight: Any) -> tuple[Path, disk.Disk, list[Call]]:
    """A run that was killed after its second save and continued: the disk's events while it was continued."""
    run = lab.new()
    calls = lab.trace(straight[0])
    lab.run(run, at=find(calls, "mkdir", r"checkpoints/\.tmp-step-00000003").k + 1, do="kill")
    before, root = disk.snapshot(run.parent)
    done = lab.run(run)
    assert (done.code, "resume: from step 2" in done.output) == (0, True), done.output
    calls = lab.trace(run)
    return run, disk.Disk.of(calls, before, root), calls


@pytest.fixture(scope="module")
def begun(lab: Lab, straight: Any) -> tuple[Path, disk.Disk, list[Call]]:
    """The straight run."""
    run, calls = straight[0], lab.trace(straight[0])
    root = run.parent.stat().st_ino
    return run, disk.Disk.of(calls, {root: {}}, root), calls


def test_the_trace_is_the_run_folder_to_the_byte(begun: Any, continued: Any) -> None:
    """No write passes the shim by, whether Python, Rust or C++ makes it."""
    for run, events, calls in (begun, continued):
        real = {str(p.relative_to(run.parent)): None if p.is_dir() else p.read_bytes() for p in run.parent.rglob("*")}
        assert events.at(calls[-1].k, disk.everything) == real
        assert not [c for c in calls if c.op in ("mmap", "sendfile", "link", "fallocate")]
        assert {"open", "write", "truncate", "fsync", "rename", "mkdir", "unlink", "rmdir"} <= {c.op for c in calls}


def true_files(events: disk.Disk, calls: list[Call]) -> dict[str, dict[str, bytes]]:
    """Give checkpoint -> file -> bytes, as they were when they got their names."""
    found = {}
    for call in calls:
        if call.op == "rename" and (match := re.fullmatch(STEP, call.path2)):
            prefix, state = f"run/checkpoints/{match[1]}/", events.at(call.k, disk.everything)
            found[match[1]] = {p.removeprefix(prefix): data for p, data in state.items() if p.startswith(prefix)}
    return found


def crashes(calls: list[Call], every: int, samples: int, seed: int) -> Any:
    """Yield (k, what happens to what isn't sure)."""
    rng = random.Random(seed)
    fixed = (disk.nothing, disk.names_only, disk.zeros, disk.data_only, disk.everything)
    for call in calls[rng.randrange(every) :: every]:
        for fate in (*fixed, *(disk.chance(rng) for _ in range(samples))):
            yield call.k, fate


@pytest.mark.parametrize("which", ["begun", "continued"])
@pytest.mark.parametrize(("every", "samples"), [(12, 3), pytest.param(1, 20, marks=pytest.mark.full)])
def test_what_was_saved_is_there_and_whole(
    which: str, every: int, samples: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run, events, calls = request.getfixturevalue(which)
    truth = true_files(events, calls)
    states = loaded = 0
    for k, fate in crashes(calls, every, samples, seed=every):
        disk.write(events.at(k, fate), tmp_path / "disk", only="run/checkpoints")
        found, _ = newest_whole(tmp_path / "disk" / "run" / "checkpoints")
        name = found.name if found else ""
        assert name >= reported(calls, k), f"power lost after {calls[k - 1]}"
        if found and name in truth:
            load(found)
            assert {p.name: p.read_bytes() for p in found.iterdir()} == truth[name], "another checkpoint than was saved"
            loaded += 1
        states += 1
        shutil.rmtree(tmp_path / "disk", ignore_errors=True)
    print(f"{states} states, {loaded} with a checkpoint")
    assert loaded > states / 3


@pytest.mark.parametrize("which", ["begun", "continued"])
@pytest.mark.parametrize("count", [0, pytest.param(100, marks=pytest.mark.full)])
def test_a_run_goes_on_from_what_was_saved(
    which: str, count: int, lab: Lab, straight: Any, request: pytest.FixtureRequest
) -> None:
    run, events, calls = request.getfixturevalue(which)
    states = [(find(calls, "rename", r"run\.json", nth).k, disk.zeros) for nth in (0, -1)]  # when it says what it is
    states += random.Random(count).sample(list(crashes(calls, 1, 2, seed=0)), count)
    failed = []
    for k, fate in states:
        new = lab.new()
        disk.write(events.at(k, fate), new.parent)
        done = lab.run(new)
        least = int((reported(calls, k) or "step-0").removeprefix("step-"))
        went_on = re.search(r"resume: from step (\d+)", done.output)
        lost = "is complete" not in done.output and int(went_on[1] if went_on else 0) < least
        if done.code or lost or outcome(new) != straight[1]:
            failed.append(f"{calls[k - 1]}, {fate.__name__}: {done.code}, {done.said}")
    assert not failed, "\n".join(failed)
