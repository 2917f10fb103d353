"""Where corefit prints: a terminal shows what data, models and plugins hold, and obeys nothing of it."""

from __future__ import annotations

import re
import sys
from typing import TextIO

_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but newline and tab
    "\u2028-\u202e\u2066-\u2069"  # line breaks of their own, and what turns the order of others
    "\ud800-\udfff\U000e0000-\U000e007f]"  # halves of characters; ASCII that nobody sees
)


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


def notice(text: object) -> None:
    """Print a line for people on standard error."""
    say(text, file=sys.stderr)


def answer(text: str) -> None:
    """Print a part of a model's answer: visible on a terminal, as it is where a program reads it."""
    write(visible(text) if sys.stdout.isatty() else text, end="")
