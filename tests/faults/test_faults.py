"""Every system call of the save path fails in turn: the run ends in one line or goes on, and nothing saved is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from runs import Lab, complaint, digest, find, newest_step

from corefit.engine.checkpoint import load, newest_whole

NAMES = {"open", "mkdir", "rename", "link", "symlink"}
BYTES = {"write", "writev", "truncate", "fallocate"}
AWAY = {"unlink", "rmdir"}
ERRNOS = {
    # what the system may answer to which calls
    errno.ENOSPC: {*NAMES, *BYTES, "fsync", "close"},
    errno.EIO: {*NAMES, *BYTES, *AWAY, "fsync", "close", "chmod"},
    errno.EROFS: {*NAMES, *BYTES, *AWAY, "chmod"},
    errno.EACCES: {*NAMES, *AWAY, "chmod"},
}
ONWARDS = (errno.ENOSPC, errno.EIO, errno.EROFS)
"""What stays so once it has happened: a full disk, a broken one, one that the system has made read-only."""


def trouble(
    lab: Lab, straight: tuple[Path, dict[str, Any]], k: int, fault: int | str, *, onwards: bool = False
) -> tuple[list[str], int, str]:
    """Run with a fault at the k-th call, then to the end; give what was wrong, exit code and output of the first."""
    run, ops = lab.new(), ",".join(["", *sorted(ERRNOS.get(fault, ())), ""]) if onwards else ""
    done = lab.run(run, at=k, do=fault, ops=ops)
    calls = lab.trace(run)
    assert fault == "short" or calls[k - 1].result == -fault, "the fault did not happen"
    wrong = [complaint(done)]
    found, torn = newest_whole(run / "checkpoints")
    wrong.append(torn and f"torn: {torn}")
    if (last := newest_step(calls)) != (found and found.name):
        wrong.append(f"{last} was saved, the newest whole one is {found}")
    if found:
        load(found)
    again = lab.run(run)
    wrong.append(again.code and f"--resume: {again.said}")
    wrong.append(not again.code and digest(run) != straight[1]["adapter"] and "another adapter")
    return [line for line in wrong if line], done.code, done.output


ASIDE = r"checkpoints/\.tmp-step-\d+"


def case(
    name: str, op: str, path: str, nth: int, fault: int | str, *codes: int, onwards: bool = False, **more: Any
) -> Any:
    return pytest.param(op, path, nth, fault, onwards, codes, id=name, **more)


@pytest.mark.parametrize(
    ("op", "path", "nth", "fault", "onwards", "codes"),
    [
        case("no permission for the folder", "mkdir", r"\.", 0, errno.EACCES, 2),
        case("a full disk at the start", "write", r"\.tmp-recipe\.toml", 0, errno.ENOSPC, 2, onwards=True),
        case("read-only from run.json on", "rename", r"run\.json", 0, errno.EROFS, 1, 2, onwards=True),
        case("no permission for metrics", "open", r"metrics\.jsonl", 0, errno.EACCES, 1, 2),
        case("a row that can't be written", "write", r"metrics\.jsonl", 2, errno.ENOSPC, 0),
        case("metrics that can't be synced", "fsync", r"metrics\.jsonl", 1, errno.EIO, 0),
        case("full from a save on", "write", rf"{ASIDE}/.*", 5, errno.ENOSPC, 1, onwards=True),
        case("half a write", "write", rf"{ASIDE}/.*", 5, "short", 0),
        case("no permission in a save", "open", rf"{ASIDE}/.*", 6, errno.EACCES, 0),
        case("read-only from a save on", "rename", r"checkpoints/step-\d+", 1, errno.EROFS, 1, onwards=True),
        case("latest can't follow", "rename", r"checkpoints/latest", 1, errno.EIO, 0),
        case("an old one can't be deleted", "unlink", r"checkpoints/step-\d+/.*", 1, errno.EIO, 0),
        case("full while exporting", "write", r"\.tmp-adapter/.*", -1, errno.ENOSPC, 1),
        case("full for the ledger", "rename", r"ledger\.json", 0, errno.ENOSPC, 1, onwards=True),
    ],
)
def test_a_fault_is_one_line_or_none_and_the_run_can_be_finished(
    op: str, path: str, nth: int, fault: int | str, onwards: bool, codes: tuple[int], lab: Lab, straight: Any
) -> None:
    k = find(lab.trace(straight[0]), op, path, nth).k
    wrong, code, output = trouble(lab, straight, k, fault, onwards=onwards)
    assert not wrong, output
    assert code in codes, output
    assert fault == "short" or op == "unlink" or os.strerror(fault).lower() in output.lower()
    if code == 1 and "adapter" in path:
        assert "--resume" in output


@pytest.mark.full
@pytest.mark.parametrize("onwards", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("fault", [*(pytest.param(number, id=errno.errorcode[number]) for number in ERRNOS), "short"])
def test_every_call_of_the_save_path_fails_in_turn(fault: int | str, onwards: bool, lab: Lab, straight: Any) -> None:
    if onwards and fault not in ONWARDS:
        pytest.skip("passes by itself")
    failed, count = [], 0
    for call in lab.trace(straight[0]):
        if call.op in ERRNOS.get(fault, {"write"}) and call.result >= 0:
            wrong, code, _ = trouble(lab, straight, call.k, fault, onwards=onwards)
            failed += [f"{call} (exit code {code}): {line}" for line in wrong]
            count += 1
    print(f"{count} calls, {len(failed)} failures")
    assert count > 20
    assert not failed, "\n".join(failed)
