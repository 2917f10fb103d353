"""Several processes on this machine, started and watched by torchrun, which is part of torch."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence

from corefit.errors import RunError, UserError


def launch(processes: str, words: Sequence[str]) -> int:
    """Run ``corefit train WORDS`` in so many processes; give the exit code of the first that failed, 0 where none did.

    Raises:
        UserError: not a number of processes. RunError: a process was killed.
    """
    if not processes.isdecimal() or processes == "0":
        raise UserError(
            f"{processes!r} processes (launch -n, NPROC_PER_NODE): expected a number, best that of the GPUs"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(processes), 1)))
    logging.disable(logging.ERROR)  # each process says itself what it has to say
    try:
        main(["--standalone", f"--nproc-per-node={processes}", "-m", "corefit", "train", *words])
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise RunError(f"rank {rank} was ended by {name}; --resume goes on from what is saved") from None
        return failure.exitcode
    return 0
