"""Where corefit prints: a terminal shows what data, models and plugins hold, and obeys nothing of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from typing import TextIO

_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but newline and tab
    "\u2028-\u202e\u2066-\u2069"  # line breaks of their own, and what turns the order of others
    "\ud800-\udfff\U000e0000-\U000e007f]"  # halves of characters; ASCII that nobody sees
)

Say = Callable[[str], None]
"""Takes lines, one at a time."""
_SECRET = re.compile("(?i)token(?!iz)|secret|passw|credential|api_?key|access_?key|private_?key")
_PLACE = re.compile("(?i)_(path|file|dir|home)$")


def secrets() -> dict[str, str]:
    """Give the environment variables whose names look like those of secrets: nothing that is written holds a value.

    Some only say where a secret lies, as HF_TOKEN_PATH does.
    """
    named = ((name, value) for name, value in os.environ.items() if _SECRET.search(name) and not _PLACE.search(name))
    return {n: v for n, v in named if len(v) >= 8 and not (os.path.isabs(v) and os.path.exists(v))}


def without_secrets(text: str) -> str:
    """Give JSON with the names of these variables in place of their values."""
    for name, secret in secrets().items():  # a command line and an error may hold one
        for escaped in {json.dumps(secret, ensure_ascii=ascii)[1:-1] for ascii in (True, False)}:
            text = text.replace(escaped, f"${name}")
    return text


def visible(text: str) -> str:
    r"""Give the text with an escape for every character that a terminal obeys or can't show; newlines and tabs stay.

    >>> visible("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def write(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print text as it is: for programs, or where the caller made it visible."""
    print(text, end=end, file=file, flush=True)


def say(text: object = "", *, file: TextIO | None = None) -> None:
    """Print a line for people."""
    write(visible(str(text)), file=file)


def notice(text: object, file: TextIO | None = None) -> None:
    """Print a line for people on standard error, above the bar where there is one; one that is gone ends no run."""
    if (file := file or sys.stderr) is None:  # a program without a terminal
        return
    with contextlib.suppress(OSError):
        if "tqdm" in sys.modules and file.isatty():
            sys.modules["tqdm"].tqdm.write(visible(str(text)), file=file)
        else:
            say(text, file=file)


def answer(text: str) -> None:
    """Print a part of a model's answer: visible on a terminal, as it is where a program reads it."""
    write(visible(text) if sys.stdout.isatty() else text, end="")
