"""Who is told what happens in a run, and why none of them can change it.

corefit's own reporters are called where the run is. Every other one lives in a process of its own (``serve``), which
gets each event as a line of JSON from a queue that never waits: it can raise, hang, crash, draw random numbers or
replace functions of torch, and the run stays what it would have been.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, get_args

from corefit import types
from corefit.errors import PluginError, in_words, system_words
from corefit.recipe import options_from, shares
from corefit.registry import GROUP, Registry
from corefit.report import to_json
from corefit.terminal import notice, without_secrets
from corefit.types import Event

HELD = 1_000
"""Events that wait for a reporter; what comes while it has so many is left out, counted and said."""
PATIENCE = 30.0
"""Seconds after a run that its reporters have to finish, all of them together."""
CHILD = "import sys; sys.path[:] = sys.argv[1:]; from corefit.reporters import serve; serve()"
EVENTS: Mapping[str, type[Any]] = {event.__name__: event for event in get_args(Event)}


class Reporters:
    """Those of one run: ``start`` them, ``tell`` them every event, ``close`` them."""

    def __init__(self, names: Sequence[str], options: Mapping[str, Any], registry: Registry) -> None:
        """Look them up; nothing of theirs is imported or called yet.

        Raises:
            PluginError: a name that no plugin has, or a module that isn't installed. RecipeError: an option is wrong.
        """
        entries = [registry.reporter(name) for name in dict.fromkeys(names)]
        own_options = shares(options, [entry.options for entry in entries], where="run.options")
        self._each: list[_Here | _Apart] = []
        for entry, own in zip(entries, own_options, strict=True):
            for module, what in entry.needs.items():
                with contextlib.suppress(ModuleNotFoundError):  # the package that it is a part of
                    if importlib.util.find_spec(module):
                        continue
                raise PluginError(
                    f"run.reporters: {entry.name!r} needs {module}, which is not installed: pip install '{what}'"
                )
            made = options_from(entry.options, own, where="run.options")
            plugin = registry.provider("reporter", entry.name)
            called = f"reporter {entry.name!r} ({plugin.source})"
            here = plugin.name == GROUP
            self._each.append(_Here(called, entry.open, made) if here else _Apart(called, entry.name, own))

    def start(self, event: types.StartReport) -> None:
        """Open all of them, and tell them the first event."""
        for each in self._each:
            each.start()
        self.tell(event)

    def tell(self, event: Event) -> None:
        """Tell all of them; takes no longer than corefit's own do."""
        for each in self._each:
            each.tell(event)

    def close(self) -> None:
        """Wait for them, for ``PATIENCE`` seconds, and say what went wrong."""
        until = time.monotonic() + PATIENCE
        apart = [each for each in self._each if isinstance(each, _Apart)]
        for each in apart:
            each.finish()
        for each in apart:
            each.close(until)


class _Here:
    """One of corefit's own."""

    def __init__(self, called: str, open: Callable[..., Callable[[Event], object]], options: object) -> None:
        self._name, self._open, self._options = called, open, options
        self._tell: Callable[[Event], object] | None = None

    def start(self) -> None:
        self._tell = self._open(self._options)

    def tell(self, event: Event) -> None:
        if self._tell is not None:
            try:
                self._tell(event)
            except Exception as error:
                self._tell = None
                notice(f"{self._name}: {type(event).__name__}: {in_words(error)}; it is switched off, the run goes on")


class _Apart:
    """One in a process of its own, with a thread that waits for it, so that the run doesn't."""

    def __init__(self, called: str, name: str, options: Mapping[str, Any]) -> None:
        self._name = called
        self._head = to_json({"name": name, "options": options, "called": called})
        self._queue = queue.Queue[bytes | None](HELD)
        self._left_out = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        try:
            # Of its own session: ctrl-C and a terminal that hangs up are for the run, which ends it.
            self._process = subprocess.Popen(
                [sys.executable, "-c", CHILD, *sys.path], stdin=subprocess.PIPE, stdout=2, start_new_session=True
            )
        except OSError as error:
            notice(f"{self._name}: can't be started: {system_words(error)}; the run goes on without it")
            return
        self._put(self._head)
        self._thread = threading.Thread(target=self._write, args=(self._process.stdin,), daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        if self._process is None:
            return
        if (code := self._process.poll()) is None:
            self._put(without_secrets(to_json([type(event).__name__, event])))
        else:
            self._process = None
            notice(f"{self._name}: its process ended with {code}; the run goes on without it")

    def _put(self, line: str) -> None:
        try:
            self._queue.put_nowait(line.encode() + b"\n")
        except queue.Full:
            if not self._left_out:
                notice(f"{self._name}: too slow; events are left out, the run goes on")
            self._left_out += 1

    def _write(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError), pipe:  # an OSError: its process is gone
            while (line := self._queue.get()) is not None:
                pipe.write(line)
                pipe.flush()

    def finish(self) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def close(self, until: float) -> None:
        if (process := self._process) is None:
            return
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=max(until - time.monotonic(), 0))  # where there was no room for it before
        try:
            code = process.wait(max(until - time.monotonic(), 0))
            if code:
                notice(f"{self._name}: its process ended with {code}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            notice(f"{self._name}: still busy {PATIENCE:g} s after the run, so it was ended")
        self._thread.join(1)
        if self._left_out:
            notice(f"{self._name}: it was too slow for {self._left_out:,} events, which it was not told")


def serve() -> None:
    """Be the process of one reporter, called with the ``sys.path`` of the run; what to do comes from standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what a reporter starts must not read its events
    head = json.loads(lines.readline())
    doing = "loading it"
    try:
        entry = Registry.load().reporter(head["name"])
        options = options_from(entry.options, head["options"], where="run.options")
        doing = "open(options)"
        tell = entry.open(options)
        for line in lines:
            name, values = json.loads(line)
            doing = f"tell({name})"
            tell(EVENTS[name](**values))
    except BaseException as error:  # also SystemExit
        notice(f"{head['called']}: {doing} raised {in_words(error)}; it is switched off, the run goes on")
        for _ in lines:  # whoever writes must not wait
            pass
