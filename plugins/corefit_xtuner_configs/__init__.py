"""XTuner's configurations (v0.1.9 to v0.2.0, as copied and edited) as recipes, and answers to its commands and flags.

A configuration is read by its syntax tree and never run. How each value is taken over, and what corefit does
differently, is a table in ``plugins/README.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from corefit import ImportedRecipe, RecipeReader
from corefit_xtuner_configs.habits import HABITS


def _read(path: Path, overrides: Sequence[str]) -> ImportedRecipe:
    from corefit_xtuner_configs.convert import convert

    return convert(path, overrides)


def corefit_recipe_readers() -> Iterable[RecipeReader]:
    """XTuner's."""
    yield RecipeReader(
        name="xtuner",
        summary="XTuner's classic configurations, v0.1.9 to v0.2.0; never run",
        read=_read,
        suffixes=(".py",),
        habits=HABITS,
    )
