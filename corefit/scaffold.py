"""``corefit new-plugin``: a whole distribution to begin a plugin with; ``NEW`` is what its module says."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from corefit import __version__
from corefit.errors import UserError, system_words, unknown
from corefit.registry import Registry

NEW: dict[str, tuple[str, str, str]] = {
    "dataset": (
        "map function",
        "corefit train --model DIR --data rows.jsonl --plugin $name",
        '''\
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
        name="$name",
        summary="a question and its answer",
        map=to_items,
        sniff=lambda record: set(record) == {"question", "answer"},
        fields=("question", "answer"),
        options=Options,
        example={"question": "What is 1 + 1?", "answer": "2"},
    )
''',
    ),
    "template": (
        "template",
        "corefit train --model DIR --data rows.jsonl --template $name",
        '''\
from collections.abc import Iterable

from corefit import PromptTemplate


def corefit_prompt_templates() -> Iterable[PromptTemplate]:
    """Chat formats. What is not simple strings writes ``render`` itself: see ``corefit.hookspecs``."""
    yield PromptTemplate.from_strings(
        name="$name",
        summary="roles between two tokens",
        system="<|im_start|>system\\n{content}<|im_end|>\\n",
        user="<|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n",
        assistant="<|im_start|>assistant\\n",  # what begins an answer: the end of user
        suffix="<|im_end|>",  # what ends it, and is learnt with it
        separator="\\n",  # what follows, and is not
        stop=("<|im_end|>",),
        control=("<|im_start|>", "<|im_end|>"),  # each is one token of the model, which content can't forge
        source="where the format is described",
    )
''',
    ),
    "quantizer": (
        "quantizer",
        "corefit train --model DIR --data rows.jsonl --quantizer $name",
        '''\
from collections.abc import Iterable

from corefit import Quantizer


def config(compute_dtype: str) -> object:
    """Give a transformers quantization config, or None for weights as they are."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=compute_dtype)


def corefit_quantizers() -> Iterable[Quantizer]:
    """Ways to store the frozen base."""
    yield Quantizer(name="$name", summary="4-bit floats", config=config)
''',
    ),
    "scheduler": (
        "scheduler",
        "corefit train --model DIR --data rows.jsonl --scheduler $name",
        '''\
from collections.abc import Iterable

from corefit import Scheduler


def factor(progress: float, warmup: float) -> float:
    """Give the share of the peak learning rate, in [0, 1], at a share of the run in (0, 1]; warmup is a share too."""
    return progress / warmup if progress < warmup else (1 - progress * progress) * (1 - warmup / 2)


def corefit_schedulers() -> Iterable[Scheduler]:
    """Curves of the learning rate."""
    yield Scheduler(name="$name", summary="up in a straight line, then down a parabola", factor=factor)
''',
    ),
    "reader": (
        "reader",
        "corefit train --model DIR --data rows.$name --plugin FORMAT",
        '''\
from collections.abc import Iterable, Iterator
from typing import Any

from corefit import BadRecord, DatasetReader, Position, Record, Sources


def read(sources: Sources, options: object = None, start: Position | None = None) -> Iterator[Record | BadRecord]:
    """Give a record for every line of question, tab, answer, from ``start`` on; memory holds one line."""
    for file in range(start.file if start else 0, len(sources.paths)):
        path = sources.paths[file]
        with open(path, "rb") as lines:
            number = offset = 0
            if start and file == start.file:
                number, offset = start.line - 1, lines.seek(start.offset)
            while line := lines.readline(sources.max_record_bytes + 1):
                size, number = len(line), number + 1
                while not line.endswith(b"\\n") and (more := lines.readline(2**16)):  # too long: to its end, unheld
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
        question, tab, answer = line.decode("utf-8").rstrip("\\r\\n").partition("\\t")
    except UnicodeDecodeError as error:
        return BadRecord(reason=f"byte {error.start + 1} is not UTF-8", **here)
    if not tab:
        return BadRecord(reason="no tab; expected question, tab, answer", **here)
    return Record({"question": question, "answer": answer}, **here)


def corefit_dataset_readers() -> Iterable[DatasetReader]:
    """Kinds of files."""
    yield DatasetReader(
        name="$name",
        summary="lines of question, tab, answer",
        read=read,
        seekable=True,
        suffixes=(".$name",),
        example=b"What is 1 + 1?\\t2\\nAnd 2 + 2?\\t4\\n",
    )
''',
    ),
    "recipe-reader": (
        "recipe reader",
        "corefit train run.$name",
        '''\
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
    for where, (key, _, value) in [*said, *((f"--cfg-options {each}", each.partition("=")) for each in overrides)]:
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
        name="$name",
        summary="lines of key: value",
        read=read,
        suffixes=(".$name",),
        example="learning_rate: 2e-4\\nsteps: 10\\n",
    )
''',
    ),
    "reporter": (
        "reporter",
        "corefit train --model DIR --data rows.jsonl --set run.reporters=progress,report.html,$name",
        '''\
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from corefit import Reporter, StartReport, StepReport


@dataclass(frozen=True)
class Options:
    """Keys of ``run.options``: ``--set run.options.file=losses.txt``."""

    file: str = "$name.txt"
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
                file.write(f"{event.step} {event.loss}\\n")

    return tell


def corefit_reporters() -> Iterable[Reporter]:
    """Who is told what happens in a run."""
    yield Reporter(name="$name", summary="a line with the loss of each step", open=begin, options=Options)
''',
    ),
}
"""What ``--kind`` says -> the kind of entry, a command that uses it, the module behind its first lines."""
FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "A $kind for corefit: $name"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["corefit>=$version"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points.corefit]
$name = "$module"

[tool.setuptools]
py-modules = ["$module"]
""",
    "README.md": """\
# $distribution

A $kind for corefit, `$name`.

```
pip install $distribution
$command
```

What is in it is `$module.py`. After a change:

```
pip install -e '.[test]'
pytest                   # what every corefit plugin promises
corefit check $name      # the same list, with the reason of what fails
```
""",
    "tests/test_contract.py": '''\
"""What every corefit plugin promises, tried on this one."""

import pytest
from corefit.testing import Check, plugin_checks


@pytest.mark.parametrize("check", plugin_checks("$name"), ids=str)
def test_contract(check: Check) -> None:
    """Fails with one line of reason."""
    check()
''',
    ".github/workflows/test.yml": """\
name: test
on: [push, pull_request]
jobs:
  test:
    runs-on: ubuntu-latest
    strategy:
      matrix:
        python: ["3.11", "3.13"]
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: $${{ matrix.python }}
      - run: pip install '.[test]'
      - run: pytest
""",
}
"""Every other file of the distribution."""


def new_plugin(name: str, kind: str, folder: str | Path = ".") -> Path:
    """Write a distribution for a plugin into a new folder, and give that folder.

    Args:
        name: of the plugin and of its entry: a small letter, then small letters, digits and ``_``.
        kind: a key of ``NEW``.
        folder: where the new folder goes.

    Raises:
        UserError: a name that can't be used or is taken, no such kind, a folder that is there or can't be written.
    """
    if kind not in NEW:
        raise UserError(f"--kind: {unknown('kind of plugin', kind, NEW)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        near = "_".join(re.findall("[a-z0-9]+", name.lower())).lstrip("_0123456789")
        hint = f"; {near} would do" if near else ""
        raise UserError(f"{name!r} is no name for a plugin: small letters, digits and _, a letter first{hint}")
    entry, command, module = NEW[kind]
    registry = Registry.load()
    for info in registry.plugins:
        if name == info.name or name in info.entries.get(entry, ()):
            raise UserError(f"{name!r} is taken by plugin {info}; choose another name")
    distribution = f"corefit-{name.replace('_', '-')}"
    target = Path(folder) / distribution
    words = {"name": name, "kind": entry, "distribution": distribution, "module": f"corefit_{name}"}
    words |= {"version": ".".join(__version__.split(".")[:2]), "command": Template(command).substitute(words)}
    head = f'"""A {entry} for corefit: {name}."""\n\nfrom __future__ import annotations\n\n'
    files = FILES | {f"corefit_{name}.py": head + module}
    try:
        target.mkdir(parents=True)
        for path, text in files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_text(Template(text).substitute(words), "utf-8")
    except FileExistsError as error:
        raise UserError(f"{target}: is there already; choose another name, or move it away") from error
    except OSError as error:
        raise UserError(f"{target}: can't be written: {system_words(error)}") from error
    return target
