"""Text that a terminal would obey, and what finds it."""

from __future__ import annotations

import unicodedata

TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
HOSTILE = "\x1b[2J\x1b]52;c;eA==\x07\x9b31m\r\x00\x08\x7f\u2028" + TURNS
"""Clears the screen, writes the clipboard, returns the carriage, turns what follows."""


def obeyed(text: str) -> list[str]:
    return [c for c in text if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in TURNS]
