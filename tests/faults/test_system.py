"""A clock that jumps, a /dev/shm that is full, and disks that really are full or read-only."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli import environment
from runs import Lab, command, digest, find, outcome

YEARS = 10 * 365 * 86_400


@pytest.mark.parametrize("jump", [YEARS, -YEARS])
def test_a_clock_that_jumps_changes_nothing(jump: int, lab: Lab, straight: Any) -> None:
    run, calls = lab.new(), lab.trace(straight[0])
    by_time = ["checkpoint.every_steps=0", "checkpoint.every_minutes=60"]
    done = lab.run(run, sets=by_time, at=find(calls, "write", r"metrics\.jsonl", 1).k, do="jump", jump=jump)
    assert done.code == 0, done.output
    assert outcome(run) == straight[1]
    saves = [c.path2 for c in lab.trace(run) if c.op == "rename" and c.path2.startswith("checkpoints/step-")]
    assert saves == ["checkpoints/step-00000003"], "an hour did not pass"
    seconds = [json.loads(line).get("seconds", 0) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert all(0 <= s < 60 for s in seconds)


def test_the_jump_reaches_the_run_and_it_resumes_across_it(lab: Lab, straight: Any) -> None:
    run, calls = lab.new(), lab.trace(straight[0])
    started = json.loads((straight[0] / "run.json").read_text("utf-8"))["started"]
    lab.run(run, at=1, do="jump", jump=YEARS)
    assert int(json.loads((run / "run.json").read_text("utf-8"))["started"][:4]) >= int(started[:4]) + 9
    run = lab.new()
    lab.run(run, at=find(calls, "rename", r"checkpoints/step-\d+", 1).k, do="torn")
    done = lab.run(run, at=1, do="jump", jump=-YEARS)
    assert "resume: from step 2" in done.output
    assert outcome(run) == straight[1]


def test_a_run_makes_nothing_in_dev_shm(lab: Lab, straight: Any) -> None:
    run, everything = lab.new(), ",open,mkdir,write,truncate,rename,link,symlink,mmap,"
    done = lab.run(run, watch=Path("/dev/shm"), at=1, do=28, ops=everything)
    assert done.code == 0, done.output
    assert lab.trace(run) == []
    assert outcome(run) == straight[1]


# ------------------------------------------------------------------------------------------------------ the real thing


def alone(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script where what it mounts is seen by nobody else."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    return subprocess.run(
        ["unshare", "-m", "bash", "-c", script], cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )


def line(lab: Lab, run: Path) -> str:
    arguments = [sys.executable, "-m", "corefit", *command(lab.model, lab.rows, run, *lab.sets)]
    return shlex.join(map(str, arguments))


@pytest.mark.full
def test_a_dev_shm_that_is_full_changes_nothing(lab: Lab, straight: Any) -> None:
    run = lab.new()
    done = alone(
        "mount -t tmpfs -o size=4k tmpfs /dev/shm && ! head -c 8192 /dev/zero >/dev/shm/full && exec " + line(lab, run),
        lab.folder,
    )
    assert done.returncode == 0, done.stderr
    assert digest(run) == straight[1]["adapter"]


@pytest.mark.full
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_disk_that_is_full_can_be_made_larger_and_the_run_goes_on(share: float, lab: Lab, straight: Any) -> None:
    run = lab.new()
    start, folder = line(lab, run), shlex.quote(str(run.parent))
    pages = sum(-(-path.stat().st_size // 4096) for path in straight[0].rglob("*") if path.is_file())
    done = alone(
        f"mount -t tmpfs -o size={int(share * pages) * 4}k tmpfs {folder} "
        f"&& {start} >first 2>&1; echo $? && ls {folder}/run/checkpoints; "
        f"mount -o remount,size=10m {folder}; {start} >second 2>&1 && sha256sum {folder}/run/adapter/*.safetensors",
        lab.folder,
    )
    first = (lab.folder / "first").read_text("utf-8")
    assert done.returncode == 0, (first, (lab.folder / "second").read_text("utf-8"))
    assert "no space left" in first.lower()
    assert done.stdout[0] in "012", first  # 0: a save was refused, what the run leaves was not
    assert "Traceback" not in first
    assert "--debug shows" not in first
    assert straight[1]["adapter"] in done.stdout


@pytest.mark.full
def test_a_read_only_disk_is_one_line(lab: Lab, straight: Any) -> None:
    run = lab.new()
    start, folder = line(lab, run), shlex.quote(str(run.parent))
    script = f"mount -t tmpfs tmpfs {folder} && mount -o remount,ro {folder} && exec {start}"
    done = alone(script, lab.folder)
    assert done.returncode == 2
    assert "read-only file system" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
