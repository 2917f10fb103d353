"""Fine-tune chat language models from a core small enough to read in an afternoon.

Public names are imported on first use, so that ``import corefit`` costs milliseconds and leaves torch unimported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from corefit.data.files import open_file
    from corefit.data.jsonl import fetch_jsonl, index_jsonl, read_jsonl
    from corefit.errors import CorefitError, DataError, RecipeError, UserError, encoding_hint
    from corefit.fields import Fields
    from corefit.hookspecs import hookimpl
    from corefit.run import Run, train
    from corefit.samples import inspect
    from corefit.templates import PromptTemplate
    from corefit.types import (
        IGNORE_INDEX,
        BadRecord,
        CheckpointReport,
        Conversation,
        DatasetReader,
        Document,
        Drop,
        EndReport,
        ImportedRecipe,
        MapFunction,
        Message,
        PacksReport,
        Position,
        Quantizer,
        RecipeReader,
        Record,
        Reporter,
        Sample,
        SampleReport,
        Scheduler,
        Segment,
        Sources,
        StartReport,
        StepReport,
        Tokenizer,
        Unrenderable,
        ValidationReport,
    )

_HOMES = {
    "corefit.data.files": "open_file",
    "corefit.data.jsonl": "fetch_jsonl index_jsonl read_jsonl",
    "corefit.errors": "CorefitError DataError RecipeError UserError encoding_hint",
    "corefit.fields": "Fields",
    "corefit.hookspecs": "hookimpl",
    "corefit.run": "Run train",
    "corefit.samples": "inspect",
    "corefit.templates": "PromptTemplate",
}
"""Where public names live that are not in ``corefit.types``."""
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "BadRecord", "CheckpointReport", "Conversation", "CorefitError", "DataError", "DatasetReader", "Document", "Drop",
    "EndReport", "Fields", "IGNORE_INDEX", "ImportedRecipe", "MapFunction", "Message", "PacksReport", "Position",
    "PromptTemplate", "Quantizer", "RecipeError", "RecipeReader", "Record", "Reporter", "Run", "Sample",
    "SampleReport", "Scheduler", "Segment", "Sources", "StartReport", "StepReport", "Tokenizer", "Unrenderable",
    "UserError", "ValidationReport", "encoding_hint", "fetch_jsonl", "hookimpl", "index_jsonl", "inspect", "open_file",
    "read_jsonl", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:  # noqa: ANN401, a module attribute has any type
    if name in __all__:
        value = getattr(importlib.import_module(_HOME.get(name, "corefit.types")), name)
        globals()[name] = value
        return value
    from corefit.deprecated import GOING, warn

    if name in GOING:
        return getattr(importlib.import_module("corefit"), warn(name))
    raise AttributeError(f"module 'corefit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
