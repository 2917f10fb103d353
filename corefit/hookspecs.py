"""The seven hooks by which a plugin contributes. Start here to write one.

A plugin is a module (one is enough) that a distribution names in its ``pyproject.toml``::

    [project.entry-points.corefit]
    my_plugin = "corefit_my_plugin"

Every module-level callable named ``corefit_*`` implements the hook of that name; no decorator is needed. Hooks take no
arguments, are called once at start-up, one plugin after the other, and yield frozen entries. They never run in the
training loop. An entry's ``name`` is what the user types; two plugins that claim one name are both refused, by name.
Keep imports of torch and numpy inside the functions that need them: ``corefit plugins`` imports every plugin.
``corefit new-plugin NAME --kind template`` writes a whole distribution around the plugin that is shown with each hook;
``corefit check NAME`` tries what it promises.
"""

from __future__ import annotations

from collections.abc import Iterable

from pluggy import HookimplMarker, HookspecMarker

from corefit.templates import PromptTemplate
from corefit.types import DatasetReader, MapFunction, Quantizer, RecipeReader, Reporter, Scheduler

hookspec = HookspecMarker("corefit")
hookimpl = HookimplMarker("corefit")
"""Marks an implementation whose name is not the hook's: ``@hookimpl(specname="corefit_schedulers")``."""


@hookspec
def corefit_dataset_readers() -> Iterable[DatasetReader]:
    r'''Ways to get records out of files, or out of nothing: chosen by a suffix, ``data.reader``, or ``--plugin``.

    Called: once at start-up, before any file is opened.
    Yield: a ``DatasetReader`` for every format. Its ``read(sources, options)`` yields a ``Record`` with path, line
    (1-based), offset and size (bytes), or a ``BadRecord``, in an order that depends on its arguments alone. What can't
    be read is yielded, never raised. Memory stays bounded whatever the file's size, unless ``streams=False`` says that
    the whole file is looked at first. With ``seekable=True``, ``read`` also takes ``start: Position | None`` and begins
    with exactly that record; ``fetch(sources, options, positions)`` may give many such records faster. Where
    ``sources.fields`` isn't None, only these keys are needed.

    A whole plugin::

        from collections.abc import Iterable, Iterator
        from typing import Any

        from corefit import BadRecord, DatasetReader, Position, Record, Sources


        def read(
            sources: Sources,
            options: object = None,
            start: Position | None = None,
        ) -> Iterator[Record | BadRecord]:
            """Give a record for every line of question, tab, answer, from ``start`` on; memory holds one line."""
            for file in range(start.file if start else 0, len(sources.paths)):
                path = sources.paths[file]
                with open(path, "rb") as lines:
                    number = offset = 0
                    if start and file == start.file:
                        number, offset = start.line - 1, lines.seek(start.offset)
                    while line := lines.readline(sources.max_record_bytes + 1):
                        size, number = len(line), number + 1
                        while not line.endswith(b"\n") and (more := lines.readline(2**16)):  # too long: not held
                            line, size = more, size + len(more)
                        here: dict[str, Any] = dict(path=str(path), line=number, offset=offset, size=size, file=file)
                        offset += size
                        if size > sources.max_record_bytes:
                            yield BadRecord(reason=f"{size} bytes; at most {sources.max_record_bytes} are read", **here)
                        elif line.strip():
                            yield record(line, here)


        def record(line: bytes, here: dict[str, Any]) -> Record | BadRecord:
            """Give what a line says, or why it can't be read; raise nothing."""
            try:
                question, tab, answer = line.decode("utf-8").rstrip("\r\n").partition("\t")
            except UnicodeDecodeError as error:
                return BadRecord(reason=f"byte {error.start + 1} is not UTF-8", **here)
            if not tab:
                return BadRecord(reason="no tab; expected question, tab, answer", **here)
            return Record({"question": question, "answer": answer}, **here)


        def corefit_dataset_readers() -> Iterable[DatasetReader]:
            """Kinds of files."""
            yield DatasetReader(
                name="my_plugin",
                summary="lines of question, tab, answer",
                read=read,
                seekable=True,
                suffixes=(".my_plugin",),
                example=b"What is 1 + 1?\t2\nAnd 2 + 2?\t4\n",
            )
    '''
    return ()


@hookspec
def corefit_map_functions() -> Iterable[MapFunction]:
    '''Ways to make items out of a record: what ``--plugin NAME`` names.

    Called: once at start-up, before any record is read.
    Yield: a ``MapFunction`` for every data set format. Its ``map(record, options)`` yields one or more ``Conversation``
    or ``Document``, or a ``Drop`` with a reason of a few words in snake_case. It never raises for odd data and never
    changes the record. ``sniff(record)`` says whether a record looks like this format; it is asked of the first records
    when the user names no plugin, so it must be False for everybody else's. A reader of the same name is used
    with it; without one, ``jsonl``.

    A whole plugin::

        from collections.abc import Iterable
        from dataclasses import dataclass

        from corefit import Conversation, Drop, MapFunction, Message, Record


        @dataclass(frozen=True)
        class Options:
            """Keys of ``data.options``: ``--set data.options.system="Be brief."``."""

            system: str = ""
            """A system message that comes first; empty: none."""


        def to_items(record: Record, options: Options) -> Iterable[Conversation | Drop]:
            """Give the conversation of a record, or why there is none; raise nothing, and leave the record as it is."""
            question, answer = record.get("question"), record.get("answer")
            if not isinstance(question, str) or not isinstance(answer, str):
                yield Drop("no_question_or_answer")
            elif not answer.strip():
                yield Drop("empty_answer")
            else:
                first = (Message("system", options.system),) if options.system else ()
                yield Conversation((*first, Message("user", question), Message("assistant", answer)))


        def corefit_map_functions() -> Iterable[MapFunction]:
            """Data formats; ``sniff`` says whether a record is in this one, and must be False for anybody else's."""
            yield MapFunction(
                name="my_plugin",
                summary="a question and its answer",
                map=to_items,
                sniff=lambda record: set(record) == {"question", "answer"},
                fields=("question", "answer"),
                options=Options,
                example={"question": "What is 1 + 1?", "answer": "2"},
            )
    '''
    return ()


@hookspec
def corefit_prompt_templates() -> Iterable[PromptTemplate]:
    r'''Ways to write a conversation as text: what ``--template NAME`` names.

    Called: once at start-up, before the tokenizer is loaded.
    Yield: a ``PromptTemplate`` for every chat format. ``PromptTemplate.from_strings`` makes the renderer and the Jinja
    from the same strings. A template that needs logic writes ``render(item, tokenizer, options)`` itself: it yields
    ``Segment``s that hold the content verbatim and in order, and only the assistant's content, its thought where the
    format learns one, and its stop are supervised. A segment with ``control=True`` is exactly one token of the
    tokenizer. What can't be placed exactly raises ``Unrenderable(reason)``, a counted drop; a ``DataError`` stops the
    run instead.

    A whole plugin::

        from collections.abc import Iterable

        from corefit import PromptTemplate


        def corefit_prompt_templates() -> Iterable[PromptTemplate]:
            """Chat formats. What is not simple strings writes ``render`` itself: see ``corefit.hookspecs``."""
            yield PromptTemplate.from_strings(
                name="my_plugin",
                summary="roles between two tokens",
                system="<|im_start|>system\n{content}<|im_end|>\n",
                user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
                assistant="<|im_start|>assistant\n",  # what begins an answer: the end of user
                suffix="<|im_end|>",  # what ends it, and is learnt with it
                separator="\n",  # what follows, and is not
                stop=("<|im_end|>",),
                control=("<|im_start|>", "<|im_end|>"),  # each is one token of the model, which content can't forge
                source="where the format is described",
            )
    '''
    return ()


@hookspec
def corefit_quantizers() -> Iterable[Quantizer]:
    '''Ways to store the frozen base weights: what ``--quantizer NAME`` names.

    Called: once at start-up, before torch is imported.
    Yield: a ``Quantizer`` for every way. ``config(compute_dtype)`` is called once, with ``"float16"``, ``"bfloat16"``
    or ``"float32"``, and gives a transformers quantization config, or None for weights as they are.
    ``after_load(model)`` is called once with the loaded model, before adapters are attached.

    A whole plugin::

        from collections.abc import Iterable

        from corefit import Quantizer


        def config(compute_dtype: str) -> object:
            """Give a transformers quantization config, or None for weights as they are."""
            from transformers import BitsAndBytesConfig

            kind = dict(load_in_4bit=True, bnb_4bit_quant_type="fp4")
            return BitsAndBytesConfig(**kind, bnb_4bit_compute_dtype=compute_dtype)


        def corefit_quantizers() -> Iterable[Quantizer]:
            """Ways to store the frozen base."""
            yield Quantizer(name="my_plugin", summary="4-bit floats", config=config)
    '''
    return ()


@hookspec
def corefit_schedulers() -> Iterable[Scheduler]:
    '''Ways to move the learning rate: what ``--scheduler NAME`` names.

    Called: once at start-up.
    Yield: a ``Scheduler`` for every curve. ``factor(progress, warmup)`` gives the share of the peak learning rate, in
    [0, 1]. ``progress`` is the share of the run that is done, in (0, 1], at the midpoint of what a step covers;
    ``warmup`` is a share of the run too, in [0, 1]. It is a pure function, and never 0 where training should go on.

    A whole plugin::

        from collections.abc import Iterable

        from corefit import Scheduler


        def factor(progress: float, warmup: float) -> float:
            """Give the share of the peak rate, in [0, 1]; progress, in (0, 1], and warmup are shares of the run."""
            return progress / warmup if progress < warmup else (1 - progress * progress) * (1 - warmup / 2)


        def corefit_schedulers() -> Iterable[Scheduler]:
            """Curves of the learning rate."""
            yield Scheduler(name="my_plugin", summary="up in a straight line, then down a parabola", factor=factor)
    '''
    return ()


@hookspec
def corefit_recipe_readers() -> Iterable[RecipeReader]:
    r'''Ways to read another program's configuration as a recipe: ``corefit train their.yaml``.

    Called: once at start-up.
    Yield: a ``RecipeReader`` for every such format. ``read(path, overrides)`` gives an ``ImportedRecipe``: tables as
    TOML would give them, for each key the line that it comes from, and a note for everything that has no counterpart.
    It never runs code that is in the file, and opens no other file than those that this one builds on.

    A whole plugin::

        from collections.abc import Callable, Iterable, Sequence
        from pathlib import Path
        from typing import Any

        from corefit import ImportedRecipe, RecipeError, RecipeReader

        KEYS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
            "model": ("model", "base", str),
            "learning_rate": ("train", "lr", float),
            "steps": ("train", "max_steps", int),
        }
        """Their key -> section and key of the recipe, and how the value is read."""


        def read(path: Path, overrides: Sequence[str] = ()) -> ImportedRecipe:
            """Read lines of ``key: value``; ``overrides`` are ``key=value``. Nothing in the file is run."""
            try:
                text = path.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise RecipeError(f"{path}: not UTF-8: {error.reason}") from error
            tables: dict[str, Any] = {}
            lines: dict[str, str] = {}
            notes: list[str] = []
            said = [(f"{path}:{number}", line.partition(":")) for number, line in enumerate(text.splitlines(), 1)]
            said += [(f"--cfg-options {each}", each.partition("=")) for each in overrides]
            for where, (key, _, value) in said:
                if key.strip() not in KEYS:
                    notes += [f"{where}: {key.strip()}: left out: no counterpart"] if key.strip() else []
                    continue
                section, name, kind = KEYS[key.strip()]
                try:
                    tables.setdefault(section, {})[name] = kind(value.strip())
                except ValueError as error:
                    raise RecipeError(f"{where}: {key}: {error}") from error
                lines[f"{section}.{name}"] = where
            return ImportedRecipe(tables=tables, lines=lines, notes=tuple(notes))


        def corefit_recipe_readers() -> Iterable[RecipeReader]:
            """Configurations of other programs."""
            yield RecipeReader(
                name="my_plugin",
                summary="lines of key: value",
                read=read,
                suffixes=(".my_plugin",),
                example="learning_rate: 2e-4\nsteps: 10\n",
            )
    '''
    return ()


@hookspec
def corefit_reporters() -> Iterable[Reporter]:
    r'''Ways to tell the world what happens in a run: what ``run.reporters`` names.

    Called: once at start-up, before any file is opened.
    Yield: a ``Reporter`` for every way. Its ``open(options)`` is called once, in a process of its own, and gives a
    function that is called with every event, in order: a ``StartReport``, then ``PacksReport``, ``StepReport``,
    ``ValidationReport``, ``SampleReport`` and ``CheckpointReport`` as they happen, an ``EndReport``. Others may come
    with later versions: ignore what you don't know. What it raises is said once and ends this reporter, never the run;
    one that hangs is ended 30 seconds after the run.

    A whole plugin::

        from collections.abc import Callable, Iterable
        from dataclasses import dataclass
        from pathlib import Path

        from corefit import Reporter, StartReport, StepReport


        @dataclass(frozen=True)
        class Options:
            """Keys of ``run.options``: ``--set run.options.file=losses.txt``."""

            file: str = "my_plugin.txt"
            """What is written, in the run folder."""


        def begin(options: Options) -> Callable[[object], None]:
            """Give what is called with every event of a run; all of it is in a process of its own, beside the run."""
            folder = Path()

            def tell(event: object) -> None:
                nonlocal folder
                if isinstance(event, StartReport):
                    folder = Path(event.folder)
                elif isinstance(event, StepReport) and event.loss is not None:
                    with open(folder / options.file, "a", encoding="utf-8") as file:
                        file.write(f"{event.step} {event.loss}\n")

            return tell


        def corefit_reporters() -> Iterable[Reporter]:
            """Who is told what happens in a run."""
            yield Reporter(name="my_plugin", summary="a line with the loss of each step", open=begin, options=Options)
    '''
    return ()
