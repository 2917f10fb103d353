"""The seven hooks by which a plugin contributes. Start here to write one.

A plugin is a module (one is enough) that a distribution names in its ``pyproject.toml``::

    [project.entry-points.corefit]
    example = "corefit_example"

Every module-level callable named ``corefit_*`` implements the hook of that name; no decorator is needed. Hooks take no
arguments, are called once at start-up, one plugin after the other, and yield frozen entries. They never run in the
training loop. An entry's ``name`` is what the user types; two plugins that claim one name are both refused, by name.
Keep imports of torch and numpy inside the functions that need them: ``corefit plugins`` imports every plugin.
``corefit new-plugin NAME --kind template`` writes a whole distribution, ``corefit check NAME`` tries what it promises.
"""

from __future__ import annotations

from collections.abc import Iterable

from pluggy import HookimplMarker, HookspecMarker

from corefit.types import DatasetReader, MapFunction, PromptTemplate, Quantizer, RecipeReader, Reporter, Scheduler

hookspec = HookspecMarker("corefit")
hookimpl = HookimplMarker("corefit")
"""Marks an implementation whose name is not the hook's: ``@hookimpl(specname="corefit_schedulers")``."""


@hookspec
def corefit_dataset_readers() -> Iterable[DatasetReader]:
    r"""Ways to get records out of files, or out of nothing: chosen by a suffix, ``data.reader``, or ``--plugin``.

    Called: once at start-up, before any file is opened.
    Yield: a ``DatasetReader`` for every format. Its ``read(sources, options)`` yields a ``Record`` with path, line
    (1-based), offset and size (bytes), or a ``BadRecord``, in an order that depends on its arguments alone. What can't
    be read is yielded, never raised. Memory stays bounded whatever the file's size, unless ``streams=False`` says that
    the whole file is looked at first. With ``seekable=True``, ``read`` also takes ``start: Position | None`` and begins
    with exactly that record; ``fetch(sources, options, positions)`` may give many such records faster. Where
    ``sources.fields`` isn't None, only these keys are needed.

    A whole plugin, one question and answer a line::

        from corefit import BadRecord, DatasetReader, Record


        def read(sources, options=None):
            for file, path in enumerate(sources.paths):
                offset = 0
                with open(path, "rb") as lines:
                    for number, line in enumerate(lines, 1):
                        at = dict(path=str(path), line=number, offset=offset, size=len(line), file=file)
                        question, tab, answer = line.decode("utf-8", "replace").rstrip("\n").partition("\t")
                        if tab:
                            yield Record({"question": question, "answer": answer}, **at)
                        else:
                            yield BadRecord(reason="no tab between question and answer", **at)
                        offset += len(line)


        def corefit_dataset_readers():
            yield DatasetReader(
                name="tabbed", summary="lines of question, tab, answer", read=read, example=b"1 + 1?\t2\n"
            )
    """
    return ()


@hookspec
def corefit_map_functions() -> Iterable[MapFunction]:
    """Ways to make items out of a record: what ``--plugin NAME`` names.

    Called: once at start-up, before any record is read.
    Yield: a ``MapFunction`` for every data set format. Its ``map(record, options)`` yields one or more ``Conversation``
    or ``Document``, or a ``Drop`` with a reason of a few words in snake_case. It never raises for odd data and never
    changes the record. ``sniff(record)`` says whether a record looks like this format; it is asked of the first records
    when the user names no plugin, so it must be False for everybody else's. A reader of the same name is used
    with it; without one, ``jsonl``.

    A whole plugin, with an option (``--set data.options.language=de``)::

        from dataclasses import dataclass

        from corefit import Conversation, Drop, MapFunction, Message


        @dataclass(frozen=True)
        class Options:
            language: str = "en"


        def to_items(record, options):
            if record.get("lang") != options.language:
                yield Drop("other_language")
            elif isinstance(record.get("q"), str) and isinstance(record.get("a"), str):
                yield Conversation((Message("user", record["q"]), Message("assistant", record["a"])))
            else:
                yield Drop("no_question_or_answer")


        def corefit_map_functions():
            yield MapFunction(
                name="qa",
                summary="objects with lang, q and a",
                map=to_items,
                sniff=lambda record: {"lang", "q", "a"} <= set(record),
                fields=("lang", "q", "a"),
                options=Options,
                example={"lang": "en", "q": "1 + 1?", "a": "2"},
            )
    """
    return ()


@hookspec
def corefit_prompt_templates() -> Iterable[PromptTemplate]:
    r"""Ways to write a conversation as text: what ``--template NAME`` names.

    Called: once at start-up, before the tokenizer is loaded.
    Yield: a ``PromptTemplate`` for every chat format. ``PromptTemplate.from_strings`` makes the renderer and the Jinja
    from the same strings. A template that needs logic writes ``render(item, tokenizer, options)`` itself: it yields
    ``Segment``s that hold the content verbatim and in order, and only the assistant's content, its thought where the
    format learns one, and its stop are supervised. A segment with ``control=True`` is exactly one token of the
    tokenizer. What can't be placed exactly raises ``Unrenderable(reason)``, a counted drop; a ``DataError`` stops the
    run instead.

    A whole plugin::

        from corefit import PromptTemplate


        def corefit_prompt_templates():
            yield PromptTemplate.from_strings(
                name="plain",
                summary="Question and Answer in plain text",
                user="Question: {content}\nAnswer: ",
                separator="\n\n",
                eos=True,
            )
    """
    return ()


@hookspec
def corefit_quantizers() -> Iterable[Quantizer]:
    """Ways to store the frozen base weights: what ``--quantizer NAME`` names.

    Called: once at start-up, before torch is imported.
    Yield: a ``Quantizer`` for every way. ``config(compute_dtype)`` is called once, with ``"float16"``, ``"bfloat16"``
    or ``"float32"``, and gives a transformers quantization config, or None for weights as they are.
    ``after_load(model)`` is called once with the loaded model, before adapters are attached.

    A whole plugin::

        from corefit import Quantizer


        def fp4(compute_dtype):
            from transformers import BitsAndBytesConfig

            kind = dict(load_in_4bit=True, bnb_4bit_quant_type="fp4")
            return BitsAndBytesConfig(**kind, bnb_4bit_compute_dtype=compute_dtype)


        def corefit_quantizers():
            yield Quantizer(name="fp4", summary="4-bit floats", config=fp4)
    """
    return ()


@hookspec
def corefit_schedulers() -> Iterable[Scheduler]:
    """Ways to move the learning rate: what ``--scheduler NAME`` names.

    Called: once at start-up.
    Yield: a ``Scheduler`` for every curve. ``factor(progress, warmup)`` gives the share of the peak learning rate, in
    [0, 1]. ``progress`` is the share of the run that is done, in (0, 1], at the midpoint of what a step covers;
    ``warmup`` is a share of the run too, in [0, 1]. It is a pure function, and never 0 where training should go on.

    A whole plugin::

        from corefit import Scheduler


        def triangle(progress, warmup):
            peak = warmup or 0.5
            return progress / peak if progress <= peak else (1 - progress) / (1 - peak)


        def corefit_schedulers():
            yield Scheduler(name="triangle", summary="up, then down", factor=triangle)
    """
    return ()


@hookspec
def corefit_recipe_readers() -> Iterable[RecipeReader]:
    r"""Ways to read another program's configuration as a recipe: ``corefit train their.yaml``.

    Called: once at start-up.
    Yield: a ``RecipeReader`` for every such format. ``read(path, overrides)`` gives an ``ImportedRecipe``: tables as
    TOML would give them, for each key the line that it comes from, and a note for everything that has no counterpart.
    It never runs code that is in the file, and opens no other file than those that this one builds on.

    A whole plugin, for lines such as ``learning_rate: 2e-4`` (overrides are left out here)::

        from corefit import ImportedRecipe, RecipeReader

        KEYS = {"learning_rate": "lr", "epochs": "epochs"}


        def read(path, overrides):
            train, lines, notes = {}, {}, []
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                key, _, value = line.partition(":")
                if key in KEYS:
                    train[KEYS[key]] = float(value) if "." in value or "e" in value else int(value)
                    lines[f"train.{KEYS[key]}"] = f"{path}:{number}"
                else:
                    notes.append(f"{path}:{number}: {key}: no counterpart")
            return ImportedRecipe(tables={"train": train}, lines=lines, notes=tuple(notes))


        def corefit_recipe_readers():
            yield RecipeReader(
                name="flat", summary="key: value lines", read=read, suffixes=(".yaml",), example="epochs: 3\n"
            )
    """
    return ()


@hookspec
def corefit_reporters() -> Iterable[Reporter]:
    r"""Ways to tell the world what happens in a run: what ``run.reporters`` names.

    Called: once at start-up, before any file is opened.
    Yield: a ``Reporter`` for every way. Its ``open(options)`` is called once, in a process of its own, and gives a
    function that is called with every event, in order: a ``StartReport``, then ``PacksReport``, ``StepReport``,
    ``ValidationReport``, ``SampleReport`` and ``CheckpointReport`` as they happen, an ``EndReport``. Others may come
    with later versions: ignore what you don't know. What it raises is said once and ends this reporter, never the run;
    one that hangs is ended 30 seconds after the run.

    A whole plugin, used with ``--set run.reporters=progress,losses run.options.file=losses.txt``::

        from dataclasses import dataclass
        from pathlib import Path

        from corefit import Reporter, StartReport, StepReport


        @dataclass(frozen=True)
        class Options:
            file: str = "losses.txt"


        def losses(options):
            folder = Path()

            def tell(event):
                nonlocal folder
                if isinstance(event, StartReport):
                    folder = Path(event.folder)
                elif isinstance(event, StepReport) and event.loss is not None:
                    with open(folder / options.file, "a", encoding="utf-8") as file:
                        file.write(f"{event.step} {event.loss}\n")

            return tell


        def corefit_reporters():
            yield Reporter(name="losses", summary="a line with the loss of each step", open=losses, options=Options)
    """
    return ()


__all__ = [
    "corefit_dataset_readers",
    "corefit_map_functions",
    "corefit_prompt_templates",
    "corefit_quantizers",
    "corefit_recipe_readers",
    "corefit_reporters",
    "corefit_schedulers",
    "hookimpl",
    "hookspec",
]
