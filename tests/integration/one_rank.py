"""One process of several, in a module of its own: a fork server imports it by its name."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def one_rank(rank: int, world: int, port: int, words: list[str], where: str, full_disk: bool = False) -> None:
    """What torchrun does, from a process that has imported torch already.

    ``full_disk``: the first checkpoint can't be written.
    """
    from corefit import durable
    from corefit.cli import main

    refusals = [OSError(28, "No space left on device")] if full_disk else []
    really = durable.sync

    def sync(path: Path) -> None:
        if refusals and ".tmp-step" in str(path):
            raise refusals.pop()
        really(path)

    durable.sync = sync

    os.chdir(where)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    for fd in (1, 2):
        os.dup2(os.open(f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.exit(main(["train", *words]))
