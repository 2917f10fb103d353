"""What plugins should stop using, all of it in one table, and the one message that says so.

What leaves the public API works for one more minor release. A name or a hook needs a row in ``GOING`` and nothing
else; a field stays in its entry, and its ``__post_init__`` calls ``warn``. A test fails once a row's version has come.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple


class Going(NamedTuple):
    """What takes something's place, and until when both work."""

    use: str
    """The name of the new one; for a name of ``corefit`` or a hook, one of the same kind."""
    gone_in: str
    """The first version without the old one: ``"0.3"``."""


GOING: dict[str, Going] = {}
"""A name of ``corefit``, a hook, or ``Entry.field`` -> what takes its place."""


class CorefitDeprecation(FutureWarning):
    """Something goes; Python shows it once for each place that uses it. An error in corefit's own tests."""


def warn(name: str, *, who: str = "", stacklevel: int = 3) -> str:
    """Say that ``name``, a key of ``GOING``, goes, and give the name of what takes its place.

    ``who``: the plugin that uses it, where it is known; ``stacklevel``: of the line to blame, as ``warnings`` counts.
    """
    use, gone_in = GOING[name]
    words = f"{f'plugin {who}: ' if who else ''}{name} goes in corefit {gone_in}; use {use}"
    warnings.warn(words, CorefitDeprecation, stacklevel=stacklevel)
    return use


__all__ = ["CorefitDeprecation", "GOING", "Going", "warn"]
