"""Run the real command line in a subprocess, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def corefit(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None, **more: object
) -> subprocess.CompletedProcess[str]:
    """Run ``corefit ARGUMENTS`` in ``cwd``, one thread, no hub; give exit code and what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "corefit", *map(str, arguments)],
        cwd=cwd,
        env=environment(env),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        **more,  # type: ignore[call-overload]
    )


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", **(more or {})}
