"""Fine-tune chat language models from a core small enough to read in an afternoon.

Public names are imported on first use, so that ``import corefit`` costs milliseconds and leaves torch unimported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from corefit.data.files import open_file as open_file
    from corefit.data.jsonl import fetch_jsonl as fetch_jsonl, index_jsonl as index_jsonl, read_jsonl as read_jsonl
    from corefit.errors import (
        CorefitError as CorefitError,
        DataError as DataError,
        RecipeError as RecipeError,
        UserError as UserError,
        encoding_hint as encoding_hint,
    )
    from corefit.fields import Fields as Fields
    from corefit.hookspecs import hookimpl as hookimpl
    from corefit.run import Run as Run, train as train
    from corefit.samples import inspect as inspect
    from corefit.templates import PromptTemplate as PromptTemplate
    from corefit.types import (
        IGNORE_INDEX as IGNORE_INDEX,
        BadRecord as BadRecord,
        CheckpointReport as CheckpointReport,
        Conversation as Conversation,
        DatasetReader as DatasetReader,
        Document as Document,
        Drop as Drop,
        EndReport as EndReport,
        ImportedRecipe as ImportedRecipe,
        MapFunction as MapFunction,
        Message as Message,
        PacksReport as PacksReport,
        Position as Position,
        Quantizer as Quantizer,
        RecipeReader as RecipeReader,
        Record as Record,
        Reporter as Reporter,
        Sample as Sample,
        SampleReport as SampleReport,
        Scheduler as Scheduler,
        Segment as Segment,
        Sources as Sources,
        StartReport as StartReport,
        StepReport as StepReport,
        Tokenizer as Tokenizer,
        Unrenderable as Unrenderable,
        ValidationReport as ValidationReport,
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
    "corefit.types": """
        BadRecord CheckpointReport Conversation DatasetReader Document Drop EndReport IGNORE_INDEX ImportedRecipe
        MapFunction Message PacksReport Position Quantizer RecipeReader Record Reporter Sample SampleReport Scheduler
        Segment Sources StartReport StepReport Tokenizer Unrenderable ValidationReport
    """,
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:  # noqa: ANN401, a module attribute has any type
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    from corefit.deprecated import GOING, warn

    if name in GOING:
        return getattr(importlib.import_module("corefit"), warn(name))
    raise AttributeError(f"module 'corefit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
