"""What a signal does to a run: its step is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from corefit.terminal import Say

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP end the run after its step; ctrl-C after that ends it at once.

    Nothing off the main thread, and for a signal that the process was started to ignore (nohup) or that C code handles.
    """

    def __init__(self, say: Say, *, own_process: bool = False) -> None:
        """``say`` is told that the step is being finished. ``own_process``: "at once" may end the whole process."""
        self._say, self._own_process = say, own_process
        self._received = 0
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: C code's, which can't be given back
                self._before[number] = signal.signal(number, self._handle)
        if self._own_process:
            # A handler in Python has to wait for the end of a backward pass; this thread doesn't.
            self._pipe = os.pipe()
            if hasattr(os, "set_blocking"):  # Windows has it from Python 3.12 on
                os.set_blocking(self._pipe[1], False)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])  # the thread sees the end
        failed_rank = self._own_process and error is not None and "TORCHELASTIC_RUN_ID" in os.environ
        for number, handler in self._before.items():
            # torchrun ends all when it sees that one is gone: the others have yet to say what that did to them
            signal.signal(number, signal.SIG_IGN if failed_rank and number == signal.SIGTERM else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._received = number
        if number != signal.SIGINT:
            for fd in self._terminals:  # a terminal that hung up refuses every line from now on
                if not os.isatty(fd):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        self._say(f"{self.reason}: finishing the step that runs, if one does, then saving; ctrl-C ends at once")

    def _watch(self, pipe: int) -> None:
        seen = 0
        while received := os.read(pipe, 64):
            for number in received:
                if number == signal.SIGINT and seen:
                    os._exit(128 + number)
                seen += number in self._before
        os.close(pipe)

    @property
    def reason(self) -> str:
        """The signal's name; empty where none came."""
        return signal.Signals(self._received).name if self._received else ""

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, 0 where none came."""
        return 128 + self._received if self._received else 0
