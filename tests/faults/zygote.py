"""Runs of the real command line that cost a fork each, killed or troubled on demand by ``shim.c``.

A zygote is a process with the shim preloaded that has imported everything a run imports and computed nothing. It forks
a child a run, before any thread exists; the child calls ``corefit.cli.main`` and ends. What Python needs to import is
therefore no part of a run here: nothing is written in that time.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
TIMEOUT = 120
"""Seconds after which a run counts as hung."""


@dataclass(frozen=True)
class Done:
    """How a run ended."""

    code: int
    """The exit code; -9: killed."""
    seconds: float
    output: str
    """Standard output and error, as they came."""

    @property
    def said(self) -> str:
        """The last line that is not empty."""
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")


def unable() -> str | None:
    """Say why faults can't be injected here; None: they can."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "system calls are caught on Linux on x86-64 only"
    return None if shutil.which("cc") else "there is no C compiler"


def build(folder: Path) -> Path:
    """Compile the shim into ``folder``."""
    shim = folder / "shim.so"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, str(HERE / "shim.c"), "-o", str(shim)], check=True)
    return shim


class Zygote:
    """The process that forks runs. Use as a context."""

    def __init__(self, shim: Path) -> None:
        env = {**os.environ, "LD_PRELOAD": str(shim), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(
        self,
        arguments: Sequence[object],
        cwd: Path,
        *,
        faults: Mapping[str, object] | None = None,
        kill_after: float | None = None,
    ) -> Done:
        """Run ``corefit ARGUMENTS`` in ``cwd``; ``faults``: of the shim, ``kill_after``: seconds until SIGKILL."""
        job = {
            "arguments": [str(a) for a in arguments],
            "cwd": str(cwd),
            "faults": {f"FAULTS_{k.upper()}": str(v) for k, v in (faults or {}).items()},
            "kill_after": kill_after,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))


# ------------------------------------------------------------------------------------------------- in the zygote itself


def serve() -> None:
    """Fork a child a line of standard input; answer each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import corefit.cli
    import corefit.session  # noqa: F401

    known: set[str] = set()
    for line in sys.stdin:
        assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
        job = json.loads(line)
        read, write = os.pipe()
        output = os.memfd_create("output")
        began = time.monotonic()
        if not (child := os.fork()):
            os.close(read)
            os.dup2(output, 1), os.dup2(output, 2)
            os._exit(live(job, write))
        os.close(write)
        code = wait(child, job["kill_after"])
        seconds = time.monotonic() - began
        with os.fdopen(read) as pipe:
            names = set(pipe.read().split()) - known
        os.lseek(output, 0, os.SEEK_SET)
        with os.fdopen(output, errors="replace") as file:
            said = file.read()
        answers.write(json.dumps({"code": code, "seconds": seconds, "output": said}) + "\n")
        answers.flush()
        known |= names
        for name in sorted(names):  # what runs import as they go: the next ones find it here
            try:
                __import__(name)
            except Exception:
                pass


def live(job: Mapping[str, object], names: int) -> int:
    """Be a run; give its exit code."""
    before = set(sys.modules)
    try:
        os.chdir(job["cwd"])
        sys.argv = ["corefit", *job["arguments"]]
        os.environ.update(job["faults"])
        if job["faults"] and (error := ctypes.CDLL(None).faults_begin()):
            raise OSError(error, f"seccomp: {os.strerror(error)}")
        from corefit.cli import main

        code = main(job["arguments"])
        sys.stdout.flush(), sys.stderr.flush()
        if code == 0:
            os.write(names, "\n".join(set(sys.modules) - before).encode()[:60_000])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 99
    return code


def wait(child: int, kill_after: float | None) -> int:
    """Give the exit code of a child, or minus the signal that ended it."""
    handle = os.pidfd_open(child)
    try:
        for seconds in (kill_after, TIMEOUT):
            if seconds is not None and not select.select([handle], [], [], seconds)[0]:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                if seconds == TIMEOUT:
                    raise RuntimeError(f"a run did not end in {TIMEOUT} s")
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(handle)


if __name__ == "__main__":
    serve()
