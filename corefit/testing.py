"""The contract kit: what a plugin must keep, as plain checks that its own tests run.

In a test module::

    import pytest
    from corefit.testing import plugin_checks

    @pytest.mark.parametrize("check", plugin_checks("my_plugin"), ids=str)
    def test_contract(check):
        check()

``corefit check my_plugin`` prints the same list. Readers, map functions and recipe readers bring an ``example``, which
is what they are tried on; templates get a tokenizer that has their control tokens, quantizers the embedded model.
"""

from __future__ import annotations

import copy
import difflib
import gc
import glob
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from corefit.errors import CorefitError, PluginError, in_words, unknown
from corefit.registry import PluginInfo, Registry
from corefit.templates import PromptTemplate
from corefit.types import (
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
    SampleReport,
    Scheduler,
    Segment,
    Sources,
    StartReport,
    StepReport,
    Unrenderable,
    ValidationReport,
)


@dataclass(frozen=True)
class Check:
    """One promise of one entry. Calling it raises ``AssertionError``, with one line of reason, where it is broken."""

    subject: str
    """Kind and name of the entry: ``scheduler triangle``."""
    title: str
    run: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.subject}: {self.title}"

    def __call__(self) -> None:
        """Try it."""
        try:
            self.run()
        except AssertionError:
            raise
        except (Exception, SystemExit) as error:  # whatever it was, the promise was not seen to hold
            raise AssertionError(f"raised {in_words(error)}") from error


def plugin_checks(name: str) -> list[Check]:
    """Give the checks of an installed plugin and of everything that it contributes; ``name`` is its entry point's.

    Raises:
        PluginError: no plugin has this name; the text has the nearest.
    """
    return [check for check, applies in _all_checks(name) if applies]


def _all_checks(name: str) -> list[tuple[Check, bool]]:
    """Give them with those that have nothing to try: what a False stands beside, the entry doesn't declare."""
    registry, checks = Registry.load(), list[tuple[Check, bool]]()
    plugins = [info for info in registry.plugins if info.name == name]
    if not plugins:
        words = unknown("plugin", name, {info.name for info in registry.plugins})
        raise PluginError(f"{words}; one of your own is found once it is installed: pip install -e ITS_FOLDER")
    for info in plugins:
        own: list[tuple[str, str, Any]] = [("plugin", name, info)]
        own += [
            (kind, each, registry.entries[kind].get(each)) for kind, names in info.entries.items() for each in names
        ]
        for kind, each, entry in own:
            for rule in RULES if entry is not None else ():
                if rule.kind == kind:
                    run = partial(rule.run, entry, registry)
                    checks.append((Check(f"{kind} {each}", rule.title, run), rule.applies(entry)))
    return checks


def check(name: str, say: Callable[[str], None]) -> int:
    """Run the checks of a plugin, say a line for each, and give the exit code: 1 where one fails.

    Raises:
        PluginError: no plugin has this name.
    """
    checks, failed = _all_checks(name), 0
    for each, applies in checks:
        if not applies:
            say(f"n/a     {each}")
            continue
        try:
            each()
        except AssertionError as error:
            failed += 1
            say(f"FAILED  {each}: {error}")
        else:
            say(f"ok      {each}")
    tried = sum(applies for _, applies in checks)
    say(f"{tried} checks, {failed or 'none'} failed" + "; n/a: what the plugin doesn't have" * (tried < len(checks)))
    return 1 if failed else 0


_Run = Callable[[Any, Registry], None]


class _Rule(NamedTuple):
    kind: str
    title: str
    run: _Run
    applies: Callable[[Any], bool]


RULES: list[_Rule] = []
"""All promises, in the order in which they are tried."""


def _rule(kind: str, title: str, applies: Callable[[Any], bool] = lambda entry: True) -> Callable[[_Run], _Run]:
    def add(run: _Run) -> _Run:
        RULES.append(_Rule(kind, title, run, applies))
        return run

    return add


def _hold(condition: object, words: str) -> None:
    if not condition:
        raise AssertionError(" ".join(words.split())[:400])


def _has_example(entry: Any) -> bool:  # noqa: ANN401, of any kind that brings one
    return entry.example is not None


def _options(entry: Any) -> Any:  # noqa: ANN401, whatever the plugin declares
    return entry.options() if entry.options else None


# ------------------------------------------------------------------------------------------------------------- plugins


@_rule("plugin", "loads, and nobody else claims its names")
def _loads(info: PluginInfo, registry: Registry) -> None:
    _hold(not info.error and not info.clashes, "; ".join(filter(None, [info.error, *info.clashes])))


@_rule("plugin", "is imported without torch, transformers and numpy", lambda info: not info.error)
def _light(info: PluginInfo, registry: Registry) -> None:
    code = (
        f"import sys, {info.module.partition(':')[0]}; print(*{{'torch', 'transformers', 'numpy'}} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    _hold(done.returncode == 0, f"importing it by itself: {done.stderr[-300:]}")
    _hold(not done.stdout.strip(), f"imports {done.stdout.strip()}: move that into the functions that need it")


# ------------------------------------------------------------------------------------------------------------- readers

SMALL, LARGE = 2**21, 2**22
"""Bytes of the files by which a reader's memory is measured."""


def _can_read(reader: DatasetReader) -> bool:
    return _has_example(reader) or not reader.needs_path


def _content(reader: DatasetReader) -> bytes:
    example = reader.example or b""
    return example.read_bytes() if isinstance(example, Path) else example


@contextmanager
def _files(reader: DatasetReader, *contents: bytes, limit: int = 2**26) -> Iterator[Sources]:
    """Give sources of files with these contents; of none where the reader brings no example."""
    with tempfile.TemporaryDirectory(prefix="corefit-check-") as folder:
        suffix = next(iter(reader.suffixes), ".data")
        paths = [Path(folder) / f"{number}{suffix}" for number in range(len(contents) if reader.example else 0)]
        for path, content in zip(paths, contents, strict=False):
            path.write_bytes(content)
        yield Sources(tuple(paths), limit)


def _read(reader: DatasetReader, sources: Sources, **begin: Position) -> list[Record | BadRecord]:
    return list(reader.read(sources, _options(reader), **begin))


def _records(reader: DatasetReader, content: bytes) -> list[Record | BadRecord]:
    with _files(reader, content) as sources:
        return _read(reader, sources)


def _place(record: Record | BadRecord) -> Position:
    return Position(record.file, record.line, record.offset)


def _facts(record: Record | BadRecord) -> tuple[Any, ...]:
    what = dict(record) if isinstance(record, Record) else record.reason
    return what, record.file, record.line, record.offset, record.size


def _joins(reader: DatasetReader, content: bytes) -> bool:
    """Whether two files of this format, one behind the other, are one, as with JSON lines."""
    once = sum(isinstance(record, Record) for record in _records(reader, content))
    twice = _records(reader, content * 2)
    return bool(reader.example) and len(twice) == 2 * once and all(isinstance(record, Record) for record in twice)


@_rule("reader", "brings an example that it reads")
def _reads(reader: DatasetReader, registry: Registry) -> None:
    _hold(_can_read(reader), "no example; DatasetReader(example=...) takes the bytes of a small file, or its Path")
    found = _records(reader, _content(reader))
    bad = next((record for record in found if not isinstance(record, Record)), None)
    _hold(found and bad is None, f"the example gives {bad or 'no record'}")


@_rule("reader", "gives the same records twice", _can_read)
def _repeats(reader: DatasetReader, registry: Registry) -> None:
    first, second = ([_facts(record) for record in _records(reader, _content(reader))] for _ in range(2))
    _hold(first == second, "two passes over one file differ; the order may depend on the arguments alone")


@_rule("reader", "says where each record begins", _can_read)
def _places(reader: DatasetReader, registry: Registry) -> None:
    with _files(reader, *[_content(reader)] * 2) as sources:
        found = _read(reader, sources)
        places = [_place(record) for record in found]
        _hold(places == sorted(set(places)), f"positions are not ascending, each its own: {places[:4]}")
        _hold(all(line > 0 <= offset for _, line, offset in places), f"lines begin at 1, offsets at 0: {places[0]}")
        for record in found if sources.paths else ():
            there = str(sources.paths[record.file]) if record.file < len(sources.paths) else None
            _hold(record.path == there, f"a record of {record.path} has file={record.file}")
        files = {place.file for place in places}
        _hold(files == set(range(max(len(sources.paths), 1))), f"of two files, records say file={sorted(files)}")


@_rule("reader", "streams: the first records don't cost the whole file", lambda r: _has_example(r) and r.streams)
def _streams(reader: DatasetReader, registry: Registry) -> None:
    content = _content(reader) or b"\n"
    joins, peaks = _joins(reader, content), []  # reads the example, so what is imported and kept for good is there
    for size in (SMALL, LARGE):
        with _files(reader, content * (size // len(content) if joins else 1)) as sources:
            many = sources if joins else replace(sources, paths=sources.paths * (size // 2**10))
            with _traced() as peak:
                reading = reader.read(many, _options(reader))
                next(itertools.islice(reading, 99, None), None)
                del reading
            peaks += peak
    extra = LARGE - SMALL if joins else (LARGE - SMALL) // 2**10 * len(content)
    _hold(peaks[1] - peaks[0] < extra / 2, f"{extra:,} more bytes of data took {peaks[1] - peaks[0]:,} more of memory")


@_rule("reader", "holds no record longer than the limit", _has_example)
def _limited(reader: DatasetReader, registry: Registry) -> None:
    with _files(reader, _content(reader) + b"x" * LARGE, limit=2**16) as sources, _traced() as peak:
        with suppress(CorefitError):
            for _ in reader.read(sources, _options(reader)):
                pass  # held, they would count
    _hold(peak[0] < LARGE / 2, f"a line of {LARGE:,} bytes took {peak[0]:,} of memory; max_record_bytes was {2**16:,}")


@contextmanager
def _traced() -> Iterator[list[int]]:
    """Give a list that will hold the peak of Python's memory, in bytes, above what was there."""
    peak, here = list[int](), tracemalloc.is_tracing()
    gc.collect()
    if not here:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield peak
    finally:
        peak.append(tracemalloc.get_traced_memory()[1] - before)
        if not here:
            tracemalloc.stop()


@_rule("reader", "yields what it can't read, and goes on", _has_example)
def _bad_records(reader: DatasetReader, registry: Registry) -> None:
    content = _content(reader)
    for damaged in _damaged(content):
        with suppress(CorefitError):  # of a file as a whole: not a table, say
            _records(reader, damaged)
    if _joins(reader, content):
        found = _records(reader, content + b"\xff\x00 \xfe\n" + content)
        good = sum(isinstance(record, Record) for record in found)
        _hold(good == len(_records(reader, content * 2)), "a broken line costs the records around it")
        _hold(len(found) > good, "a broken line is skipped without a BadRecord")


def _damaged(content: bytes) -> Iterator[bytes]:
    half = len(content) // 2
    yield from (b"", content[:half], content[: half // 2], content[half:], content[1:], content[::-1])
    yield from (content[:half] + odd + content[half:] for odd in (b"\xff\xfe", b"\0\0", b'"', b"\n", b"\r\n\t"))
    yield from (b"\xef\xbb\xbf" + content, b"\xff\xfe" + content, b"\x1f\x8b" + content, content + b"\xff")


@_rule("reader", "begins at any record it is asked for", lambda r: _can_read(r) and r.seekable)
def _seeks(reader: DatasetReader, registry: Registry) -> None:
    with _files(reader, *[_content(reader)] * 2) as sources:
        all_of_it = _read(reader, sources)
        for i in {0, 1, len(all_of_it) // 2, len(all_of_it) - 1} & set(range(len(all_of_it))):
            place = _place(all_of_it[i])
            same = [*map(_facts, _read(reader, sources, start=place))] == [*map(_facts, all_of_it[i:])]
            _hold(same, f"read(start={place}) gives other records than a pass from the start")


@_rule("reader", "fetches and indexes what it reads", lambda r: _can_read(r) and bool(r.fetch or r.index))
def _fetches(reader: DatasetReader, registry: Registry) -> None:
    with _files(reader, *[_content(reader)] * 2) as sources:
        found = _read(reader, sources)
        places = [_place(record) for record in found]
        if reader.index:
            rows = [tuple(map(int, row)) for row in reader.index(sources, _options(reader))]
            _hold(rows == [tuple(place) for place in places], f"index gives {rows[:3]}, read {places[:3]}")
        if reader.fetch:
            there = reader.fetch(sources, _options(reader), places[::-1])
            _hold([*map(_facts, there)] == [*map(_facts, found[::-1])], "fetch gives other records than read")


@_rule("reader", "reads no further than a file's size when the run began", lambda r: _can_read(r) and r.bounded)
def _bounded(reader: DatasetReader, registry: Registry) -> None:
    from corefit.data.files import file_state

    content = _content(reader)
    with _files(reader, content) as sources:
        known = replace(sources, states=tuple(map(file_state, sources.paths)))
        before = [_facts(record) for record in _read(reader, known)]
        for path in sources.paths:
            path.write_bytes(content + content)
        after = [_facts(record) for record in _read(reader, known)]
        words = f"{len(before)} records, and {len(after)} once the file grew"
        _hold(after == before, f"{words}; read Sources.states, or bounded=False")


@_rule("reader", "closes its files", _has_example)
def _closes(reader: DatasetReader, registry: Registry) -> None:
    with _files(reader, _content(reader)) as sources, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (1, None):
            reading = reader.read(sources, _options(reader))
            list(itertools.islice(reading, n))
            getattr(reading, "close", lambda: None)()
        del reading
        gc.collect()
        handles = [os.path.realpath(handle) for handle in glob.glob("/proc/self/fd/*")]  # none on other systems
        left = [text for each in caught if "corefit-check-" in (text := str(each.message))]
        left += [path for path in map(os.path.realpath, sources.paths) if path in handles]
        _hold(not left, f"a file stays open: {left[:1]}; open it in a with statement")


# ------------------------------------------------------------------------------------------------------- map functions

ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10**30, "", " ", "\n", "\ud800", "x" * 5000, "[", "{}", "null"),
    *([], {}, [None], [[]], [{}], [""], [1, "a"], {"a": {"b": None}}, [{"role": None, "content": 1}], [[["x"]]]),
)
"""Values that JSON may hold in any place."""


def _record(fields: Mapping[str, Any]) -> Record:
    """Give a record of these fields, as they are now."""
    return Record(copy.deepcopy(dict(fields)), path="example", line=1, offset=0)


def _mapped(function: MapFunction, fields: Mapping[str, Any]) -> list[Any]:
    return list(function.map(_record(fields), _options(function)))


def _odd_records(example: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give records in which something is not as in the example."""
    yield from ({}, {"": ""}, {"unknown": 1}, {**example, "unknown": [{}]})

    def changed(value: Any) -> Iterator[Any]:  # noqa: ANN401, any JSON value
        if isinstance(value, Mapping):
            for key in value:
                yield {k: v for k, v in value.items() if k != key}
                yield from ({**value, key: other} for other in changed(value[key]))
        elif isinstance(value, list | tuple):
            for i, each in enumerate(value[:2]):
                yield from ([*value[:i], other, *value[i + 1 :]] for other in changed(each))
            yield from (value[:1], value[1:], [*value, *value], list(reversed(value)))
        yield from ODD

    yield from (each for each in changed(dict(example)) if isinstance(each, dict))


def _first_wrong(items: Iterable[object]) -> str:
    """Say what is wrong with the first item that is not right; empty: nothing."""
    return next(filter(None, map(_wrong, items)), "")


def _wrong(item: object) -> str:
    """Say what is wrong with an item; empty: nothing."""
    if isinstance(item, Drop):
        return "" if isinstance(item.reason, str) else f"a Drop whose reason is {item.reason!r}"
    if isinstance(item, Document):
        return "" if isinstance(item.text, str) else f"a Document of a {type(item.text).__name__}"
    if not isinstance(item, Conversation):
        return f"a {type(item).__name__}; expected Conversation, Document or Drop"
    for number, message in enumerate(item.messages):
        if not isinstance(message, Message) or not isinstance(message.content, str):
            return f"a message that is no text: {message!r}"
        if message.role not in ("system", "user", "assistant", "tool"):
            return f"a message of role {message.role!r}; known: system, user, assistant, tool"
        if message.role == "system" and number:
            return "a system message that is not the first"
        if message.supervised and message.role != "assistant":
            return f"a supervised message of role {message.role!r}"
    return "" if any(message.role == "assistant" for message in item.messages) else "a Conversation without an answer"


@_rule("map function", "brings an example that it makes items of")
def _maps(function: MapFunction, registry: Registry) -> None:
    _hold(_has_example(function), "no example; MapFunction(example=...) takes a record of this format, a dict")
    items = _mapped(function, function.example or {})
    _hold(any(isinstance(item, Conversation | Document) for item in items), f"the example gives {items}")
    _hold(not (wrong := _first_wrong(items)), f"the example gives {wrong}")


@_rule("map function", "gives the same items twice", _has_example)
def _pure(function: MapFunction, registry: Registry) -> None:
    first, second = (_mapped(function, function.example or {}) for _ in range(2))
    _hold(first == second, f"two calls with one record give {first[:1]} and {second[:1]}")


@_rule("map function", "changes no record", _has_example)
def _leaves_alone(function: MapFunction, registry: Registry) -> None:
    example = function.example or {}
    for fields in (example, *_odd_records(example)):
        record = _record(fields)
        with suppress(Exception):  # another check's
            list(function.map(record, _options(function)))
        _hold(repr(dict(record)) == repr(dict(fields)), f"{_short(fields)} became {_short(dict(record))}")


@_rule("map function", "takes any record, and never raises", _has_example)
def _total(function: MapFunction, registry: Registry) -> None:
    others = [other.example for other in registry.map_functions.values() if other.example]
    for fields in (*_odd_records(function.example or {}), *others):
        try:
            items = _mapped(function, fields)
        except Exception as error:
            raise AssertionError(f"raised {in_words(error)} for {_short(fields)}; yield a Drop") from error
        _hold(not (wrong := _first_wrong(items)), f"{wrong} for {_short(fields)}")


@_rule("map function", "drops nothing without a reason", _has_example)
def _explicit(function: MapFunction, registry: Registry) -> None:
    for fields in _odd_records(function.example or {}):
        items: list[Any] = [Drop("failed")]
        with suppress(Exception):  # another check's
            items = _mapped(function, fields)
        _hold(items, f"nothing at all for {_short(fields)}; yield Drop(reason)")
        for item in items:
            if isinstance(item, Drop):
                plain = re.fullmatch(r"\w[\w-]{0,60}", str(item.reason))
                _hold(plain, f"Drop({item.reason!r}): expected a few words in snake_case, the same for each such drop")


@_rule("map function", "reads no field that it doesn't declare", lambda m: _has_example(m) and m.fields is not None)
def _declared(function: MapFunction, registry: Registry) -> None:
    example = function.example or {}
    kept = {key: value for key, value in example.items() if key in (function.fields or ())}
    _hold(_mapped(function, kept) == _mapped(function, example), f"other items without {sorted({*example} - {*kept})}")


def _sniffs(function: MapFunction) -> bool:
    return _has_example(function) and function.sniff is not None


def _sniffed(function: MapFunction, fields: Mapping[str, Any]) -> bool:
    return bool(function.sniff and function.sniff(_record(fields)))


@_rule("map function", "recognises its own records, and looks at any", _sniffs)
def _recognises(function: MapFunction, registry: Registry) -> None:
    example = function.example or {}
    _hold(_sniffed(function, example), "sniff is False for the example")
    for fields in _odd_records(example):
        try:
            _sniffed(function, fields)
        except Exception as error:
            raise AssertionError(f"sniff raised {in_words(error)} for {_short(fields)}") from error


@_rule("map function", "recognises nobody else's records", _sniffs)
def _modest(function: MapFunction, registry: Registry) -> None:
    others = {m.name: m.example for m in registry.map_functions.values() if _sniffs(m) and m.name != function.name}
    for name, fields in {"nobody": {"unknown": 1}, "none": {}, **others}.items():
        seen = False
        with suppress(Exception):  # another check's
            seen = _sniffed(function, fields or {})
        _hold(not seen, f"sniff is True for {name}'s {_short(fields)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 120 else f"{text[:80]}...{text[-30:]}"


# ----------------------------------------------------------------------------------------------------------- templates

SYSTEM, TOOL = Message("system", "system1 text"), Message("tool", "result1")
TURNS = (
    *(Message("user", "question1"), Message("assistant", "answer1", supervised=True)),
    *(Message("user", "question2"), Message("assistant", "answer2", supervised=False)),
    *(Message("user", "question3"), Message("assistant", "answer3", supervised=True)),
)
_CALL = {"type": "function", "function": {"name": "tool1", "arguments": "{}"}}
ODD_CHATS: dict[str, tuple[Conversation, tuple[str, ...]]] = {
    "a message of a tool": (Conversation((*TURNS, TOOL, TURNS[1])), ("result1",)),
    "a tool call": (Conversation((TURNS[0], Message("assistant", "answer1", tool_calls=(_CALL,)))), ("tool1",)),
    "tools": (Conversation(TURNS, tools=({"type": "function", "function": {"name": "tool1"}},)), ("tool1",)),
    "a thought": (Conversation((TURNS[0], Message("assistant", "answer1", reasoning="thought1"))), ("thought1",)),
    "an answer first": (Conversation((Message("assistant", "answer0", supervised=False), *TURNS)), ("answer0",)),
    "two questions": (Conversation((Message("user", "question0"), *TURNS)), ("question0", "question1")),
    "two answers": (Conversation((*TURNS, Message("assistant", "answer4", supervised=True))), ("answer3", "answer4")),
    "a late system message": (Conversation((*TURNS, Message("system", "system2"), *TURNS[:2])), ("system2",)),
    "an unknown role": (Conversation((*TURNS, Message("critic", "critic1"), *TURNS[:2])), ("critic1",)),
}
"""Conversations that a format may have no place for: the words that must be there, unless it says so."""


def _tokenizer(template: PromptTemplate) -> Any:  # noqa: ANN401, the real one, whose module needs numpy
    return _tokenizer_with(*template.control, *template.stop)


@cache
def _tokenizer_with(*tokens: str) -> Any:  # noqa: ANN401
    from corefit.data.tokenizer import Tokenizer
    from corefit.prepare import EMBEDDED

    return Tokenizer.load(EMBEDDED / "model", tokens)


def _stops(template: PromptTemplate) -> list[str]:
    """Give what may end an answer, the longest first; any control token where the format is the tokenizer's own."""
    tokenizer = _tokenizer(template)
    own = () if template.chat_template or template.stop else tokenizer.control_tokens
    return sorted({*template.stop, tokenizer.eos_token or "", *own} - {""}, key=len, reverse=True)


def _render(template: PromptTemplate, item: Conversation) -> list[Segment]:
    return list(template.render(item, _tokenizer(template), _options(template)))


def _rendered(template: PromptTemplate, messages: tuple[Message, ...]) -> list[Segment]:
    """Render messages for which every format has a place."""
    try:
        segments = _render(template, Conversation(messages))
    except Unrenderable as refusal:
        raise AssertionError(f"refuses a plain conversation: {refusal.reason}") from refusal
    for segment in segments:
        _hold(isinstance(segment, Segment), f"render yields {segment!r}; expected a Segment")
    return segments


def _joined(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def _spans(segments: Sequence[Segment], messages: Sequence[Message]) -> list[tuple[Message, int, int, int]]:
    """Give each message with where its content begins and ends, and where the next one's begins, in characters."""
    text, at, found = _joined(segments), 0, list[tuple[Message, int, int]]()
    for message in messages:
        begin = text.find(message.content, at)
        _hold(begin >= 0, f"{message.role}'s {message.content!r} is not in {text!r}")
        at = begin + len(message.content)
        found.append((message, begin, at))
    nexts = [begin for _, begin, _ in found[1:]] + [len(text)]
    return [(*each, following) for each, following in zip(found, nexts, strict=True)]


def _chats(template: PromptTemplate) -> list[tuple[Message, ...]]:
    """Give a conversation, and those with a system message and with a tool where the format has a place for them."""
    told, used = (SYSTEM, *TURNS), (*TURNS[:2], TOOL, *TURNS[3:])
    return [TURNS, *_written(template, told, SYSTEM.content), *_written(template, used, TOOL.content)]


def _thoughtful(template: PromptTemplate) -> list[tuple[Message, ...]]:
    """Give a conversation with a thought, where the format writes thoughts."""
    return _written(template, (TURNS[0], TURNS[1]._replace(reasoning="thought1"), *TURNS[2:]), "thought1")


def _written(template: PromptTemplate, messages: tuple[Message, ...], word: str) -> list[tuple[Message, ...]]:
    """Give a conversation, where the format writes this word of it; else none."""
    with suppress(Unrenderable, CorefitError):
        return [messages] if word in _joined(_render(template, Conversation(messages))) else []
    return []


@_rule("template", "writes content as it is, and in order")
def _verbatim(template: PromptTemplate, registry: Registry) -> None:
    for odd in ("a\n\n  b\tc", "{content} {{ x }} {% y %} {}", "é 你好 🦜", "\\n \"q\" 'q' </x>", "### A:\n- b"):
        messages = tuple(m._replace(content=f"\n {m.content} {odd} {m.content} \n") for m in TURNS)
        text = _joined(_rendered(template, messages))
        at = 0
        for message in messages:
            _hold(text.count(message.content) == 1, f"{message.content!r} is {text.count(message.content)} times in it")
            _hold(text.index(message.content) >= at, f"{message.content!r} is out of order")
            at = text.index(message.content)


@_rule("template", "supervises answers and their stops, nothing else")
def _masked(template: PromptTemplate, registry: Registry) -> None:
    stops = _stops(template)
    for messages in _chats(template):
        segments = _rendered(template, messages)
        learnt = [segment.supervised for segment in segments for _ in segment.text]  # for each character
        text, spans = _joined(segments), _spans(segments, messages)
        _hold(not any(learnt[: spans[0][1]]), f"what comes first is supervised: {text[: spans[0][1]]!r}")
        for message, begin, end, following in spans:
            what = f"{message.role}'s {message.content!r}"
            if message.supervised:
                _hold(all(learnt[begin:end]), f"{what} is not supervised")
                rest = learnt[end:following]
                _hold(rest == sorted(rest, reverse=True), f"supervised in part: {text[end:following]!r}, after {what}")
                _, *after = re.split("|".join(map(re.escape, stops)) or "(?!)", text[end : end + sum(rest)])
                _hold(not any(after), f"what follows the stop is supervised: {''.join(after)!r}, after {what}")
            else:
                wrong = "".join(c for c, yes in zip(text[begin:following], learnt[begin:following], strict=True) if yes)
                _hold(not wrong, f"{wrong!r} is supervised at {what}")


@_rule("template", "ends every answer with a supervised stop")
def _stopped(template: PromptTemplate, registry: Registry) -> None:
    stops = _stops(template)
    for messages in _chats(template):
        segments = _rendered(template, messages)
        ends = list(itertools.accumulate(len(segment.text) for segment in segments))
        for message, _, end, following in _spans(segments, messages):
            after = [s for s, at in zip(segments, ends, strict=True) if end < at <= following]
            there = [s for s in after if s.text.strip() in stops]
            if message.supervised and not any(s.supervised and s.control for s in there):
                what = f"what follows {message.content!r} is {_joined(after)!r}, in which {stops} ends no answer"
                if there:
                    wrong = "not supervised" if there[0].control else "text, not a segment with control=True"
                    what = f"{there[0].text!r} is {wrong}"
                raise AssertionError(
                    f"{what}; write Segment({(stops or ['</s>'])[0]!r}, learnt, control=True); in "
                    "from_strings it is the suffix that control names, or eos=True"
                )

    for messages in _thoughtful(template):
        segments = _rendered(template, messages)
        text = "".join(s.text if s.supervised and s.control else "." * len(s.text) for s in segments)
        (_, _, begin, _), (_, end, _, _) = _spans(segments, messages)[:2]
        inside = next((stop for stop in stops if stop in text[begin:end]), None)
        _hold(not inside, f"{inside!r} is learnt at the end of a thought and is a stop: the model would never answer")


@_rule("template", "stops at tokens that it declares")
def _stops_declared(template: PromptTemplate, registry: Registry) -> None:
    for stop in template.stop:
        _hold(
            stop in template.control,
            f"stop has {stop!r} (by default the suffix), and control has not: name a token of the model in both; text "
            "can't end an answer, so let the tokenizer's EOS follow it (eos=True)",
        )


@_rule("template", "may be split between turns only")
def _turns(template: PromptTemplate, registry: Registry) -> None:
    segments = _rendered(template, TURNS)
    spans, at = _spans(segments, TURNS), 0
    for segment in segments:
        inside = any(question[1] < at < answer[2] for question, answer in zip(spans[::2], spans[1::2], strict=True))
        _hold(not (segment.turn and inside), f"{segment.text!r} says turn=True behind a question that it answers")
        at += len(segment.text)


@_rule("template", "begins with the BOS that it declares", lambda template: template.bos)
def _bos(template: PromptTemplate, registry: Registry) -> None:
    bos = _tokenizer(template).bos_token
    for messages in _chats(template):
        text, *_ = first = _rendered(template, messages)[0]
        _hold(first.control and text == bos, f"begins with {text!r}; yield the tokenizer's bos_token")


@_rule("template", "writes a system message first and unsupervised, or refuses it")
def _system(template: PromptTemplate, registry: Registry) -> None:
    with suppress(Unrenderable):
        text = _joined(_render(template, Conversation((SYSTEM, *TURNS))))
        _hold(SYSTEM.content in text, f"it is lost in {text!r}; raise Unrenderable, which is a counted drop")
        _hold(text.index(SYSTEM.content) < text.index("answer1"), "it comes behind the first answer")


@_rule("template", "writes or refuses whatever else a conversation holds")
def _lossless(template: PromptTemplate, registry: Registry) -> None:
    for what, (item, words) in ODD_CHATS.items():
        try:
            text = _joined(_render(template, item))
        except (Unrenderable, CorefitError):
            continue
        except Exception as error:
            raise AssertionError(f"{what}: raised {in_words(error)}; raise Unrenderable(reason)") from error
        for word in words:
            _hold(word in text, f"{what} is lost: no {word!r} in {text!r}; raise Unrenderable(reason)")


@_rule("template", "is not fooled by text that looks like its markers")
def _unforgeable(template: PromptTemplate, registry: Registry) -> None:
    plain = _rendered(template, TURNS)
    around = re.split("|".join(m.content for m in TURNS), _joined(plain))
    typed = " ".join(("x", *around, *template.control, *template.stop, *template.forgeable, "</s>", "<s>", "x"))
    messages = tuple(m._replace(content=m.content + typed + m.content) for m in TURNS)
    forged = _rendered(template, messages)

    def shape(segments: Sequence[Segment]) -> list[tuple[str, bool, bool]]:
        return [(s.text if s.control else "", s.supervised, s.turn) for s in segments]

    _hold(shape(forged) == shape(plain), f"segments differ where content is {typed!r}")


@_rule("template", "writes control segments that are declared tokens")
def _control(template: PromptTemplate, registry: Registry) -> None:
    from corefit.data.encode import make_encoder

    tokenizer = _tokenizer(template)
    known = {*template.control, *template.stop, *tokenizer.control_tokens, tokenizer.bos_token, tokenizer.eos_token}
    for segment in _rendered(template, TURNS):
        if segment.control and segment.text.strip() not in known:
            near = difflib.get_close_matches(segment.text, template.control, n=1)
            hint = f"; is {near[0]!r} there a slip?" if near else ""
            raise AssertionError(f"render writes {segment.text!r} with control=True, which control doesn't name{hint}")
    encoder = make_encoder(template, tokenizer, template_options=_options(template))
    encoded = encoder.encode([(Conversation(TURNS), "example:1")])
    _hold(encoded.drops == [None], f"a plain conversation is dropped: {encoded.drops[0]}")


@_rule("template", "writes in Jinja what it renders", lambda template: template.chat_template is not None)
def _jinja(template: PromptTemplate, registry: Registry) -> None:
    render_chat = partial(_tokenizer(template).render_chat, chat_template=template.chat_template)
    for messages in (*_chats(template), *_thoughtful(template)):
        chat = [
            {"role": m.role, "content": m.content} | ({"reasoning_content": m.reasoning} if m.reasoning else {})
            for m in messages
        ]
        segments = _rendered(template, messages)
        ours, theirs = _joined(segments), render_chat(chat)
        _hold(ours == theirs, f"segments say {_apart(ours, theirs)}, chat_template {_apart(theirs, ours)}")
        trained = ours[: _spans(segments, messages)[-1][1]]
        asked = render_chat(chat[:-1], add_generation_prompt=True)
        words = f"to ask, chat_template says {_apart(asked, trained)}; training {_apart(trained, asked)}"
        _hold(asked == trained, words)


def _apart(one: str, other: str) -> str:
    """Give what is around the first difference."""
    at = len(os.path.commonprefix([one, other]))
    return ("..." if at > 20 else "") + repr(one[max(at - 20, 0) : at + 30]) + ("..." if at + 30 < len(one) else "")


# ---------------------------------------------------------------------------------------------------------- quantizers


@contextmanager
def _lab(quantizer: Quantizer) -> Iterator[Any]:
    from corefit.prepare import EMBEDDED
    from corefit.selftest import Lab

    with tempfile.TemporaryDirectory(prefix="corefit-check-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a warning could be about is measured
        yield Lab(EMBEDDED / "model", quantizer, "cpu", Path(folder))


@_rule("quantizer", "loads a model in every compute dtype")
def _quantises(quantizer: Quantizer, registry: Registry) -> None:
    for dtype in ("float16", "bfloat16"):
        quantizer.config(dtype)
    with _lab(quantizer) as lab:
        for table in lab.logits(lab.base()).values():
            _hold(table.isfinite().all(), "the model's logits are not finite")


@_rule("quantizer", "trains a step, and the same step after an evaluation")
def _trains(quantizer: Quantizer, registry: Registry) -> None:
    from corefit.engine.loss import CausalLoss
    from corefit.selftest import PACKS, ROUNDING, apart

    with _lab(quantizer) as lab:
        network = lab.network()
        loss_fn, batch = CausalLoss(network), lab.batch(range(PACKS))
        first = lab.step(loss_fn, batch)
        _hold(all(value.isfinite().all() for value in first.values()), "loss or gradients are not finite")
        _hold(any(value.any() for name, value in first.items() if name != "loss"), "all gradients are 0")
        lab.logits(network)
        change = apart(lab.step(loss_fn, batch), first)
        _hold(change <= ROUNDING, f"gradients change by {change:.1e} once the model was evaluated")


@_rule("quantizer", "saves an adapter that loads and answers alike")
def _saves(quantizer: Quantizer, registry: Registry) -> None:
    with _lab(quantizer) as lab:
        measured, allowed = lab.saved()
        _hold(measured <= allowed, f"logits differ by {measured:.1e} once saved and loaded")


# ---------------------------------------------------------------------------------------------------------- schedulers

PROGRESS = (*(2.0**-k for k in (1074, 53, 20, 8)), *(n / 64 for n in range(1, 64)), 1 - 2**-8, 1 - 2**-53, 1.0)
WARMUP = (0.0, 2.0**-20, 0.03, 0.5, 1.0)
"""Where a scheduler is asked."""


def _curve(scheduler: Scheduler) -> dict[tuple[float, float], float]:
    """Ask everywhere; where it gives no number, another check fails."""
    found: dict[tuple[float, float], float] = {}
    for at in itertools.product(PROGRESS, WARMUP):
        with suppress(Exception):
            value = scheduler.factor(*at)
            if _number(value):
                found[at] = value
    return found


def _number(value: object) -> bool:
    return isinstance(value, int | float) and value == value


@_rule("scheduler", "gives a number for every progress in (0, 1]")
def _defined(scheduler: Scheduler, registry: Registry) -> None:
    for progress, warmup in itertools.product(PROGRESS, WARMUP):
        try:
            value = scheduler.factor(progress, warmup)
        except Exception as error:
            raise AssertionError(f"factor({progress!r}, {warmup!r}) raised {in_words(error)}") from error
        _hold(_number(value), f"factor({progress!r}, {warmup!r}) is {value!r}")


@_rule("scheduler", "stays within 0 and 1")
def _ranged(scheduler: Scheduler, registry: Registry) -> None:
    for (progress, warmup), value in _curve(scheduler).items():
        _hold(0 <= value <= 1, f"factor({progress!r}, {warmup!r}) is {value!r}")


@_rule("scheduler", "is a pure function")
def _same_curve(scheduler: Scheduler, registry: Registry) -> None:
    for (progress, warmup), value in _curve(scheduler).items():
        again = scheduler.factor(progress, warmup)
        _hold(again == value, f"factor({progress!r}, {warmup!r}) is {value!r}, and then {again!r}")


@_rule("scheduler", "is not 0 where training goes on")
def _positive(scheduler: Scheduler, registry: Registry) -> None:
    for (progress, warmup), value in _curve(scheduler).items():
        _hold(value != 0 or not 2**-8 <= progress < 1, f"factor({progress!r}, {warmup!r}) is 0")


# ------------------------------------------------------------------------------------------------------ recipe readers

RUNS = frozenset({"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class"})
RUNS |= {"exec", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "code.__new__", "function.__new__"}
"""Events of ``sys.audit`` that reading a configuration has no need of."""
_watchers: list[list[str]] = []


@cache
def _watch() -> None:
    """Add an audit hook: it stays for good, so there is one, which mostly sleeps."""

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        for seen in _watchers if event in RUNS else ():
            seen.append(f"{event}{_short(arguments)}")

    sys.addaudithook(note)


@contextmanager
def _watched() -> Iterator[list[str]]:
    """Give a list of what runs meanwhile."""
    _watch()
    _watchers.append(seen := list[str]())
    try:
        yield seen
    finally:
        _watchers.pop()


@contextmanager
def _config(reader: RecipeReader, content: bytes | None = None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="corefit-check-") as folder:
        path = Path(folder) / f"example{next(iter(reader.suffixes), '')}"
        path.write_bytes((reader.example or "").encode() if content is None else content)
        yield path


@_rule("recipe reader", "brings an example that becomes a recipe")
def _imports(reader: RecipeReader, registry: Registry) -> None:
    from corefit.recipe import imported_recipe

    _hold(_has_example(reader), "no example; RecipeReader(example=...) takes the text of a small configuration")
    _hold(reader.suffixes, "no suffixes, so no file is ever given to it")
    with _config(reader) as path:
        found = reader.read(path, [])
        _hold(isinstance(found, ImportedRecipe), f"gives {_short(found)}; expected an ImportedRecipe")
        _hold(found.tables, "the example gives an empty recipe")
        imported_recipe(found, name=str(path), base=path.parent)


@_rule("recipe reader", "says for every key where it was read", _has_example)
def _traces(reader: RecipeReader, registry: Registry) -> None:
    def leaves(value: Any, key: str) -> Iterator[str]:  # noqa: ANN401, tables as TOML gives them
        tables = isinstance(value, list | tuple) and value and isinstance(value[0], dict)
        if isinstance(value, dict) or tables:
            for k, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from leaves(inner, f"{key}.{k}" if key else str(k))
        else:
            yield key

    with _config(reader) as path:
        found = reader.read(path, [])
        for key in leaves(dict(found.tables), ""):
            where = found.lines.get(key, "")
            _hold(re.fullmatch(r".+:\d+", where), f"lines[{key!r}] is {where!r}; expected path:line")


@_rule("recipe reader", "runs nothing that is in the file", _has_example)
def _inert(reader: RecipeReader, registry: Registry) -> None:
    with _config(reader) as path:
        reader.read(path, [])  # imports what it needs
        with _watched() as seen:
            reader.read(path, [])
        _hold(not seen, f"{len(seen)} things run, the first: {seen[:1]}")


@_rule("recipe reader", "answers any file with a recipe or an error in words", _has_example)
def _answers(reader: RecipeReader, registry: Registry) -> None:
    for damaged in _damaged((reader.example or "").encode()):
        with _config(reader, damaged) as path:
            try:
                reader.read(path, [])
            except CorefitError:
                continue
            except Exception as error:
                raise AssertionError(f"raised {in_words(error)} for {damaged[:80]!r}; raise RecipeError") from error


# ----------------------------------------------------------------------------------------------------------- reporters


def _events(folder: str, step: int = 0, *, failed: bool = False) -> list[Any]:
    """Give the events of two steps of a run; ``failed``: of one in which nothing works, and all that may be None is."""
    loss = None if failed else 1.5
    packs = [{"slots": 8, "used": 6, "documents": [{"origin": "a.jsonl:1", "tokens": 2, "pieces": [["a", True]]}]}]
    facts: dict[str, Any] = {"corefit": "0.1.0", "plugins": {}, "model": {}, "data": [], "device": "cpu"}
    step_report = StepReport(
        step=step + 1,
        epoch=0.5,
        progress=0.25,
        loss=loss,
        lr=1e-4,
        grad_norm=loss,
        loss_scale=1.0,
        skipped=failed,
        cause="non_finite_gradients" if failed else None,
        tokens=6,
        supervised_tokens=3,
        samples=1,
        packs=1,
        fill=75.0,
        tokens_per_s=3.0,
        seconds=1.0,
        memory_bytes=None if failed else 2**20,
    )
    sample = SampleReport(step=step + 2, prompt="<b>1 + 1?</b>", answer="2 \x1b[2J 你好", stopped=not failed)
    saved = CheckpointReport(step=step + 2, path=folder, seconds=0.1, size_bytes=8)
    if failed:
        saved = replace(saved, path=None, size_bytes=None, error="no space left on device")
    status, reason = ("failed", "RunError: no luck") if failed else ("complete", "max_steps")
    return [
        StartReport(folder=folder, step=step, endless=failed, recipe={"train.lr": "1e-4"}, facts=facts, lengths=[2, 4]),
        *([] if failed else [PacksReport(packs=packs)]),
        *(step_report, replace(step_report, step=step + 2)),
        ValidationReport(step=step + 2, loss=2.0, perplexity=None if failed else 7.4, tokens=3),
        *(sample, saved),
        EndReport(step=step + 2, status=status, reason=reason, ledger={}),
    ]


@contextmanager
def _told(reporter: Reporter) -> Iterator[tuple[str, Callable[[Any], object]]]:
    """Give a run folder, and what is to be called with its events; prints go nowhere."""
    with tempfile.TemporaryDirectory(prefix="corefit-check-") as folder, redirect_stdout(io.StringIO()):
        for name, text in {"run.json": '{"status": "running"}', "metrics.jsonl": ""}.items():  # as a run has by then
            (Path(folder) / name).write_text(text, "utf-8")
        with redirect_stderr(io.StringIO()):
            for module, what in reporter.needs.items():
                _hold(find_spec(module), f"needs {module}, which is not installed: pip install {what!r}")
            yield folder, reporter.open(_options(reporter))


@_rule("reporter", "takes every event of a run, and of one that goes on")
def _listens(reporter: Reporter, registry: Registry) -> None:
    with _told(reporter) as (folder, tell):
        for event in _events(folder):
            tell(event)
        again = reporter.open(_options(reporter))
        for event in _events(folder, step=2):
            again(event)


@_rule("reporter", "takes the events of a run that fails")
def _fails(reporter: Reporter, registry: Registry) -> None:
    with _told(reporter) as (folder, tell):
        for event in _events(folder, failed=True):
            tell(event)


@_rule("reporter", "lets events pass that it doesn't know")
def _future(reporter: Reporter, registry: Registry) -> None:
    with _told(reporter) as (folder, tell):
        for event in (_events(folder)[0], object()):  # of a later version
            tell(event)


@_rule("reporter", "keeps up with a run")
def _fast(reporter: Reporter, registry: Registry) -> None:
    with _told(reporter) as (folder, tell):
        start, _, step, *_ = _events(folder)
        tell(start)
        began = time.perf_counter()
        for n in range(20):
            tell(replace(step, step=n + 1))
        seconds = time.perf_counter() - began
        _hold(seconds < 2, f"20 steps took {seconds:.1f} s; what comes while it is busy is left out")


@_rule("reporter", "draws no random numbers")
def _still(reporter: Reporter, registry: Registry) -> None:
    generators = [(sys.modules[name], get) for name, get in GENERATORS.items() if name in sys.modules]
    for module, _ in generators:
        module.seed()  # not what an earlier event may have left

    def states() -> list[Any]:
        found = [getattr(module, get)() for module, get in generators]
        return [repr(state.tolist() if hasattr(state, "tolist") else state) for state in found]

    before = states()
    with _told(reporter) as (folder, tell):
        for event in _events(folder):
            tell(event)
    _hold(states() == before, "random numbers of Python, numpy or torch are drawn; make a generator of your own")


GENERATORS = {"random": "getstate", "numpy.random": "get_state", "torch": "get_rng_state"}
"""Modules whose random numbers a run draws -> what gives their state."""


__all__ = ["Check", "plugin_checks"]
