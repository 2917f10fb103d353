"""The exceptions that corefit raises, and the wording that they share.

::

    CorefitError                 anything corefit says on purpose; one line, no traceback
    ├── UserError                exit code 2: the user can mend it
    │   ├── RecipeError          a key, a value, a flag
    │   ├── DataError            a record or a file; begins with path:line
    │   ├── PluginError          a plugin; names distribution and version
    │   └── ModelError           a model, tokenizer or adapter folder
    └── RunError                 exit code 1: the run failed
        ├── IsolationError       documents of one pack see each other
        ├── MaskError            a sample is not what its messages say
        ├── LedgerError          the ledger does not balance
        ├── NonFiniteError       loss or gradients are not finite; holds what a replay found
        └── CheckpointError      a checkpoint that can't be written or read
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class CorefitError(Exception):
    """Anything that corefit says on purpose: its text is one line, ready to print."""

    exit_code = 1


class UserError(CorefitError):
    """What the user can mend: a typo, a missing file, a wrong value."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe key, a value or a flag; begins with ``file:line:`` or the flag as typed."""


class DataError(UserError):
    """A record or a data file; begins with ``path:line:`` where a line is known."""

    def __str__(self) -> str:
        return super().__str__().replace("\n", "\\n")  # of data and of file names


class PluginError(UserError):
    """A plugin that is missing, broken, misspelt or claimed twice; names distribution and version."""


class ModelError(UserError):
    """A model, tokenizer or adapter folder that can't be used as asked."""


class RunError(CorefitError):
    """A run that failed for a reason that no setting explains."""


class IsolationError(RunError):
    """Documents of one pack see each other: training would learn from the wrong context."""


class MaskError(RunError):
    """A sample is not what its messages say: text lost, a wrong token supervised or masked, a stop or BOS missing."""


class LedgerError(RunError):
    """The ledger does not balance: a record, token or slot is unaccounted for."""


class NonFiniteError(RunError):
    """Loss or gradients that are not finite; ``report``, a JSON-able object, is all that is known of their origin."""

    def __init__(self, line: str, report: Mapping[str, Any]) -> None:
        super().__init__(line)
        self.report = report


class CheckpointError(RunError):
    """A checkpoint that can't be written, or one that is torn or tampered with."""


def system_words(error: Exception) -> str:
    """Give what the system says of an ``OSError``, in lower case; of any other exception its own text."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def encoding_hint(raw: bytes) -> str:
    """Give what ends an error about bytes that are not UTF-8: how they read as GB18030, or that they begin as UTF-16.

    It is empty where they are neither. GB18030 gives most bytes some meaning, so they must read as two characters or
    more, half of them everyday Chinese, and must not be text in UTF-8 that was torn.

    >>> encoding_hint("法国的首都".encode("gb18030"))
    "; as GB18030 it reads '法国的首都': iconv -f GB18030 -t UTF-8 FILE > NEW"
    >>> encoding_hint("法国".encode()[:-1]) + encoding_hint("déjà vu".encode("latin-1"))
    ''
    """
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") and b"\0" in raw:
        return "; it begins as UTF-16 does: iconv -f UTF-16 -t UTF-8 FILE > NEW"
    try:
        raw.decode()
        return ""
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" or max(raw[: error.start].decode(), default="") >= "\u0800":
            return ""
        start = error.start
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    wide = [letter for letter in text if letter > "\x7f"]
    if len(wide) < 2 or 2 * len("".join(wide).encode("gb2312", "ignore").decode("gb2312")) < len(wide):
        return ""
    shown = raw[start:].decode("gb18030", "replace").split("\n")[0][:12].strip('"}] ')
    return f"; as GB18030 it reads {shown!r}: iconv -f GB18030 -t UTF-8 FILE > NEW"


def in_words(error: BaseException) -> str:
    """Give kind and text of somebody else's exception, on one line, as far as a line has room."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # a plugin's own ``__str__`` may raise too
        text = "(no text)"
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Give the words for a name nobody knows: the nearest known one, then all of them, sorted.

    >>> unknown("key", "lerning_rate", ["learning_rate", "seed"])
    "no key 'lerning_rate'; did you mean 'learning_rate'? known: learning_rate, seed"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no {what} {name!r}; {hint}known: {', '.join(names) or 'none'}"
