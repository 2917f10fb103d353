"""Runs of the real command line that cost a fork each, killed or troubled on demand by ``faults/shim.c``.

A zygote is a process that has imported everything a run imports and computed nothing; importing takes several seconds.
It forks a child a run, before any thread exists; the child does what ``python -m corefit`` does. What Python needs to
import is therefore no part of a run here, nor are the variables that are read while it does.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import platform
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHIM = Path(__file__).resolve().parent / "faults" / "shim.c"
TIMEOUT = 120
"""Seconds after which a run counts as hung."""


@dataclass(frozen=True)
class Done:
    """How a run ended."""

    code: int
    """The exit code; -9: killed."""
    seconds: float
    output: str
    """Standard output and error, as they came; without the errors where they are kept apart."""
    errors: str = ""

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
    subprocess.run(["cc", *flags, str(SHIM), "-o", str(shim)], check=True)
    return shim


class Zygote:
    """The process that forks runs. Use as a context."""

    def __init__(self, shim: Path | None = None) -> None:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONIOENCODING": "utf-8"}
        env |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        env |= {"LD_PRELOAD": str(shim)} if shim else {}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(
        self,
        arguments: Sequence[object],
        cwd: Path,
        *,
        env: Mapping[str, str] | None = None,
        apart: bool = False,
        faults: Mapping[str, object] | None = None,
        kill_after: float | None = None,
    ) -> Done:
        """Run ``corefit ARGUMENTS`` in ``cwd``.

        ``env``: its environment, else the zygote's; ``apart``: keep standard error apart; ``faults``: of the shim;
        ``kill_after``: seconds until SIGKILL.
        """
        job = {
            "arguments": [str(a) for a in arguments],
            "cwd": str(cwd),
            "env": env and dict(env),
            "apart": apart,
            "faults": {f"FAULTS_{k.upper()}": str(v) for k, v in (faults or {}).items()},
            "kill_after": kill_after,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))


# ------------------------------------------------------------------------------------------------- in the zygote itself


def serve() -> None:
    """Fork a child a line of standard input; answer each with a line."""
    answers, jobs = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path.pop(0)  # the folder of this file
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import corefit.cli
    import corefit.session  # noqa: F401

    gc.freeze()  # a child that looked for garbage there would copy all of it
    known: set[str] = set()
    for line in jobs:
        assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
        job = json.loads(line)
        read, write = os.pipe()
        output, errors = os.memfd_create("output"), os.memfd_create("errors")
        began = time.monotonic()
        if not (child := os.fork()):
            os.close(read)
            os.dup2(output, 1), os.dup2(errors if job["apart"] else output, 2)
            live(job, write)
        os.close(write)
        code = wait(child, job["kill_after"])
        seconds = time.monotonic() - began
        with os.fdopen(read) as pipe:
            names = set(pipe.read().split()) - known
        said = {"output": text_of(output), "errors": text_of(errors)}
        answers.write(json.dumps({"code": code, "seconds": seconds, **said}) + "\n")
        answers.flush()
        known |= names
        for name in sorted(names):  # what runs import as they go: the next ones find it here
            try:
                __import__(name)
            except Exception:
                pass


def live(job: Mapping[str, object], names: int) -> None:
    """Be a run, to the end of the process."""
    before = set(sys.modules)
    os.chdir(job["cwd"])
    if job["env"] is not None:
        os.environ.clear()
        os.environ.update(job["env"])
        tempfile.tempdir = None  # TMPDIR was read
        sys.path[:0] = filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep))
    sys.path.insert(0, job["cwd"])
    sys.argv = ["corefit", *job["arguments"]]
    os.environ.update(job["faults"])
    if job["faults"] and (error := ctypes.CDLL(None).faults_begin()):
        raise OSError(error, f"seccomp: {os.strerror(error)}")
    np.random.seed()  # else the same in every child
    code: object = 99
    try:
        runpy.run_module("corefit", run_name="__main__")
    except SystemExit as done:
        code = done.code or 0
        if not code:
            os.write(names, "\n".join(set(sys.modules) - before).encode()[:60_000])
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 99)  # to take apart all that is imported takes seconds


def text_of(file: int) -> str:
    """Give what was written into it, and close it."""
    os.lseek(file, 0, os.SEEK_SET)
    with os.fdopen(file, encoding="utf-8", errors="replace") as written:
        return written.read()


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
