"""A whole corefit plugin: a reader for lines of question, tab, answer, and one of everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corefit import (
    BadRecord,
    Conversation,
    DatasetReader,
    Drop,
    ImportedRecipe,
    MapFunction,
    Message,
    Position,
    PromptTemplate,
    Quantizer,
    RecipeError,
    RecipeReader,
    Record,
    Reporter,
    Scheduler,
    Sources,
    StartReport,
    StepReport,
)

QUESTIONS = Path(__file__).with_name("questions.tsv")


def read(sources: Sources, options: object = None, start: Position | None = None) -> Iterator[Record | BadRecord]:
    """Yield a record for every line that is not empty, from ``start`` on; memory holds one line.

    Without a path the few questions that the package carries are read.
    """
    paths = sources.paths or (QUESTIONS,)
    for file in range(start.file if start else 0, len(paths)):
        path = paths[file]
        with open(path, "rb") as lines:
            number = offset = 0
            if start and file == start.file:
                number, offset = start.line - 1, lines.seek(start.offset)
            while line := lines.readline(sources.max_record_bytes + 1):
                size, number = len(line), number + 1
                too_long = size > sources.max_record_bytes
                while too_long and not line.endswith(b"\n") and (line := lines.readline(2**16)):
                    size += len(line)
                here: dict[str, Any] = dict(path=str(path), line=number, offset=offset, size=size, file=file)
                offset += size
                if too_long:
                    yield BadRecord(reason=f"{size} bytes; at most {sources.max_record_bytes} are read", **here)
                elif line.strip():
                    yield _record(line.rstrip(b"\r\n"), here)


def _record(line: bytes, here: dict[str, Any]) -> Record | BadRecord:
    try:
        question, tab, answer = line.decode("utf-8").partition("\t")
    except UnicodeDecodeError as error:
        return BadRecord(reason=f"byte {error.start + 1} is not UTF-8", **here)
    if not tab:
        return BadRecord(reason="no tab; expected question, tab, answer", **here)
    return Record({"question": question, "answer": answer}, **here)


@dataclass(frozen=True)
class Options:
    """Keys of ``data.options``: ``--set data.options.shout=true``."""

    shout: bool = False
    """Write answers in capital letters."""


def to_conversation(record: Record, options: Options) -> Iterable[Conversation | Drop]:
    """Yield one turn, or why there is none."""
    question, answer = record.get("question"), record.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        yield Drop("no_question_or_answer")
    elif not answer.strip():
        yield Drop("empty_answer")
    else:
        yield Conversation(
            (Message("user", question), Message("assistant", answer.upper() if options.shout else answer))
        )


def fp4(compute_dtype: str) -> Any:  # noqa: ANN401, torch and transformers are imported only when a model is loaded
    """Give the configuration of 4-bit floats."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=compute_dtype)


def parabola(progress: float, warmup: float) -> float:
    """Give 1 - progress^2, and no more than the warm-up allows."""
    factor = (1 - progress) * (1 + progress)
    return min(factor, progress / warmup) if progress < warmup else factor


KEYS: dict[str, tuple[str, str, Callable[[str], object]]] = {
    "model": ("model", "base", str),
    "rate": ("train", "lr", float),
    "steps": ("train", "max_steps", int),
}


def recipe(path: Path, overrides: Sequence[str] = ()) -> ImportedRecipe:
    """Read lines of ``key = value``; ``overrides`` are such lines too, without spaces."""
    tables: dict[str, Any] = {}
    lines: dict[str, str] = {}
    notes: list[str] = []
    try:
        written = [(f"{path}:{number}", line) for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)]
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: {error.reason}") from error
    for where, line in [*written, *((f"--cfg-options {override}", override) for override in overrides)]:
        key, equals, text = (part.strip() for part in line.partition("="))
        if not equals:
            raise RecipeError(f"{where}: expected key = value")
        if key not in KEYS:
            notes.append(f"{where}: {key}: left out: no counterpart in corefit")
            continue
        section, name, kind = KEYS[key]
        try:
            tables.setdefault(section, {})[name] = kind(text)
        except ValueError as error:
            raise RecipeError(f"{where}: {key}: {error}") from error
        lines[f"{section}.{name}"] = where
    return ImportedRecipe(tables=tables, lines=lines, notes=tuple(notes))


@dataclass(frozen=True)
class ReporterOptions:
    """Keys of ``run.options``: ``--set run.options.every=10``."""

    every: int = 1
    """Steps between two lines."""


def losses(options: ReporterOptions) -> Callable[[object], None]:
    """Give what writes ``losses.txt`` into the run folder: step and loss, a line each."""
    file = Path()

    def tell(event: object) -> None:
        nonlocal file
        if isinstance(event, StartReport):
            file = Path(event.folder, "losses.txt")
        elif isinstance(event, StepReport) and event.loss is not None and event.step % options.every == 0:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(f"{event.step} {event.loss:.4f}\n")

    return tell


def corefit_dataset_readers() -> Iterable[DatasetReader]:  # noqa: D103, the hook says what it is
    yield DatasetReader(
        name="example",
        summary="lines of question, tab, answer",
        read=read,
        seekable=True,
        needs_path=False,
        example=QUESTIONS,
    )


def corefit_map_functions() -> Iterable[MapFunction]:  # noqa: D103
    yield MapFunction(
        name="example",
        summary="a question and its answer",
        map=to_conversation,
        sniff=lambda record: set(record) == {"question", "answer"},
        fields=("question", "answer"),
        options=Options,
        example={"question": "What is 1 + 1?", "answer": "2"},
    )


def corefit_prompt_templates() -> Iterable[PromptTemplate]:  # noqa: D103
    yield PromptTemplate.from_strings(
        name="example",
        summary="Question: ... Answer: ... in plain text",
        user="Question: {content}\nAnswer: ",
        separator="\n\n",
        eos=True,
    )


def corefit_quantizers() -> Iterable[Quantizer]:  # noqa: D103
    yield Quantizer(name="example", summary="4-bit floats", config=fp4)


def corefit_schedulers() -> Iterable[Scheduler]:  # noqa: D103
    yield Scheduler(name="example", summary="a parabola: falls slowly, then faster", factor=parabola)


def corefit_recipe_readers() -> Iterable[RecipeReader]:  # noqa: D103
    yield RecipeReader(
        name="example",
        summary="lines of key = value",
        read=recipe,
        suffixes=(".example",),
        habits={"learn": "`corefit train FILE.example`"},
        example="rate = 1e-4\nsteps = 10\n",
    )


def corefit_reporters() -> Iterable[Reporter]:  # noqa: D103
    yield Reporter(
        name="example", summary="losses.txt: a line with step and loss", open=losses, options=ReporterOptions
    )
