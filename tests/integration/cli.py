"""Run the real command line in a process of its own, as a user does."""

from __future__ import annotations

import atexit
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from zygote import Zygote

READ_EARLY = re.compile(
    "OMP_|MKL_|HF_|HUGGINGFACE_|TRANSFORMERS_|BNB_|XDG_|HOME|TZ|LC_|LANG|LD_|CUDA|TORCH|PYTHON(?!PATH$)"
)
"""Variables that Python or a library reads as it starts: a process that is forked later would not heed them."""


def corefit(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None, fresh: bool = False, **more: object
) -> subprocess.CompletedProcess[str]:
    """Run ``corefit ARGUMENTS`` in ``cwd``, one thread, no hub; give exit code and what it printed.

    ``fresh``: a Python that starts anew, as it does where ``env`` or ``more`` (of ``subprocess.run``) ask for it; else
    a fork of one that has imported what a run needs, 7 s sooner.
    """
    words, variables = [*map(str, arguments)], environment(env)
    if not (fresh or more or sys.platform != "linux" or early(variables) != early(environment())):
        done = zygote().run(words, cwd, env=variables, apart=True)
        return subprocess.CompletedProcess(words, done.code, done.output, done.errors)
    return subprocess.run(
        [sys.executable, "-m", "corefit", *words],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        **more,  # type: ignore[call-overload]
    )


@cache
def zygote() -> Zygote:
    """Give this process's, started when it is first asked for."""
    made = Zygote()
    atexit.register(made.close)
    return made


def early(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if READ_EARLY.match(name)}


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", **(more or {})}
