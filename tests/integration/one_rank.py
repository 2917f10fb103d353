"""One process of several, in a module of its own: a fork server imports it by its name."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def one_rank(rank: int, world: int, port: int, words: list[str], where: str, at_checkpoint: str = "") -> None:
    """What torchrun does, from a process that has imported torch already.

    ``at_checkpoint``: what happens to rank 0 at its first: ``"full disk"``, or a signal.
    """
    from corefit import durable
    from corefit.cli import main

    troubles = [at_checkpoint] if at_checkpoint else []
    really = durable.sync

    def sync(path: Path) -> None:
        if troubles and ".tmp-step" in str(path):
            if (trouble := troubles.pop()) == "full disk":
                raise OSError(28, "No space left on device")
            signal.raise_signal(getattr(signal, trouble))
        really(path)

    durable.sync = sync

    os.chdir(where)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    for fd in (1, 2):
        os.dup2(os.open(f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.exit(main(["train", *words]))
