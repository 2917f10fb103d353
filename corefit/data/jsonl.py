"""Bytes -> records: JSON lines or one top-level JSON list, plain or gzip, in bounded memory, from any position.

Also the hash that splits off validation records.

What is a bad record here is a bad record in every reader of corefit: anything but one JSON object in UTF-8, NaN and
Infinity (the words; ``1e999`` is a number), lone surrogates, more than 500 levels, an integer of over 4,300 digits,
more bytes than ``max_record_bytes``. Of equal keys the last one wins.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import sys
import tempfile
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BufferedReader
from itertools import cycle, groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from corefit.data import kernel
from corefit.data.files import BLOCK, open_file, why
from corefit.errors import DataError, encoding_hint
from corefit.types import BadRecord, Position, Record, Sources

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = BufferedReader[Any]

MAX_DEPTH = 500
MAX_DIGITS = 4300

_CHUNK = 2**20  # bytes of whole lines that the kernel is given at once
_ROWS = 2**12  # records in one Columns, at most
_SMALL_BLOCK = 2**12  # where single records are read
_AHEAD = 2  # parts of a file that are read ahead: whole lines, and the line after them
_HOLD = 2**20  # what is held of a record before its end is known, where the file can be read again
# The second branch alone is right; the first, which ends at a quote that no backslash precedes, is five times as fast.
_STRING = r'"(?:[^"]*+(?<!\\)"|[^"\\]*+(?:\\.[^"\\]*+)*+")'

_T = TypeVar("_T")
# offset, line, size, bytes (None: too long to hold), what is wrong with the file here (nothing is read after that)
_Extent = tuple[int, int, int, bytes | None, str | None]


class _Refused(Exception):
    """Why one record can't be used; ``broken``: it isn't JSON, so nothing after it in a list can be trusted."""

    def __init__(self, reason: str, at: int | None = None, *, broken: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.at, self.broken = reason, at, broken


# ----------------------------------------------------------------------------------------------------------- one record


def _constant(word: str) -> NoReturn:
    raise _Refused(f"{word} is not a JSON value")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError
    return int(digits)


def _decoder() -> json.JSONDecoder:
    # A parse_int of our own costs 0.1 us an integer; the interpreter's limit is the same unless somebody moved it.
    parse_int = int if sys.get_int_max_str_digits() == MAX_DIGITS else _integer
    return json.JSONDecoder(parse_constant=_constant, parse_int=parse_int)


def _outside_strings(pattern: str, text: str) -> int | None:
    matches = re.finditer(f"{_STRING}|({pattern})", text, re.DOTALL)
    return next((match.start() for match in matches if match.group(1)), None)


_BRACKET = re.compile(rf"{_STRING}|([\[{{])|([\]}}])", re.DOTALL)


def _check_depth(text: str) -> None:
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += 1 if match.group(1) else -1 if match.group(2) else 0
        if depth > MAX_DEPTH:
            raise _Refused(f"more than {MAX_DEPTH} levels of brackets", match.start())


_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]|(u[dD][89a-fA-F])|.)", re.DOTALL)


def _check_surrogates(text: str) -> None:
    for match in _ESCAPE.finditer(text):
        if match.group(1):
            raise _Refused(f"a lone surrogate, \\{text[match.start(1) :][:5]}, is not a character", match.start())


_JSON_SAYS = {
    "Unterminated string": "a string that never ends",
    "Invalid control": "a raw control character in a string, expected an escape such as \\n",
    "Invalid \\": "an escape that JSON doesn't have, expected one of \\\" \\\\ \\/ \\b \\f \\n \\r \\t \\uXXXX",
}


def _syntax(error: json.JSONDecodeError) -> str:
    at_end = not error.doc[error.pos :].strip()
    says = "Unterminated string" if at_end and "control" in error.msg else error.msg
    for start, words in _JSON_SAYS.items():
        if says.startswith(start):
            return f"broken JSON: {words}"
    found = error.doc[error.pos : error.pos + 1].strip(" \t\r\n")
    hint = "; an object over several lines? expected one object a line, or one list" if error.doc.strip() == "{" else ""
    return f"broken JSON: {error.msg[:1].lower()}{error.msg[1:]}, found {repr(found) if found else 'the end'}{hint}"


_KINDS = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}


def _parse(raw: bytes, decode: Any) -> dict[str, Any]:  # noqa: ANN401, the bound raw_decode
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode())
        raise _Refused(f"byte 0x{raw[error.start]:02x} is not UTF-8{encoding_hint(raw)}", column) from None
    # split hops from bracket to bracket by memchr; count goes byte by byte and takes a third of the parsing time
    most = MAX_DEPTH + 1
    if len(raw) > 2 * MAX_DEPTH and len(raw.split(b"{", most)) + len(raw.split(b"[", most)) - 2 > MAX_DEPTH:
        _check_depth(text)
    begin = 0 if raw[0] == 123 else len(text) - len(text.lstrip(" \t\r\n"))
    try:
        value, end = decode(text, begin)
    except json.JSONDecodeError as error:
        raise _Refused(_syntax(error), error.pos, broken=True) from None
    except RecursionError:
        raise _Refused("more levels of brackets than Python's stack has room for") from None
    except ValueError:
        at = _outside_strings(rf"\d{{{MAX_DIGITS + 1}}}", text)
        raise _Refused(f"an integer of more than {MAX_DIGITS:,} digits", at) from None
    except _Refused as refused:
        raise _Refused(refused.reason, _outside_strings("NaN|-?Infinity", text)) from None
    if end != len(text) and (rest := text[end:].lstrip(" \t\r\n")):
        at = len(text) - len(rest)
        raise _Refused(f"broken JSON: {rest[:1]!r} after the end of the record", at, broken=True)
    if b"\\" in raw and _MAYBE_SURROGATE.search(raw):
        _check_surrogates(text)
    if type(value) is not dict:
        raise _Refused(f"expected a JSON object, found {_KINDS.get(type(value), 'a number')}", begin)
    return value


# ---------------------------------------------------------------------------------------------------- records in a file


def _begin(file: Bytes) -> tuple[bool, int, int]:
    """Go past the BOM and blank lines. Gives whether a list follows (then also past its bracket), offset and line."""
    begin = at = len(file.read(3)) if file.peek(3).startswith(b"\xef\xbb\xbf") else 0
    line = 1
    while head := file.peek(1):
        text = head.lstrip()
        blank = head[: len(head) - len(text)]
        if breaks := blank.count(b"\n"):
            begin, line = at + blank.rfind(b"\n") + 1, line + breaks
        is_list = text.startswith(b"[")
        at += len(file.read(len(blank) + is_list))
        if is_list:
            return True, at, line
        if text:
            break
    if not file.seekable():  # a pipe: the first line begins behind its blanks
        return False, at, line
    file.seek(begin)
    return False, begin, line


def _line(file: Bytes, begun: bytes, hold: int) -> tuple[int, bool, bytes | None]:
    """Read the rest of a line; give its size (0 at the end of the file), whether it is blank, itself if not too long.

    What isn't held is still read, so that the next line begins here.
    """
    raw = begun + file.readline(max(hold + 1 - len(begun), 0))
    size, blank = len(raw), raw.isspace()
    if size <= hold or raw[-1] == 10:
        return size, blank, raw
    while part := file.readline(BLOCK):
        size, blank = size + len(part), blank and part.isspace()
        if part[-1] == 10:
            break
    return size, blank, None


def _lines(file: Bytes, offset: int, line: int, hold: int) -> Iterator[_Extent]:
    while True:
        size, blank, raw = _line(file, b"", hold)
        if not size:
            return
        if not blank:
            yield offset, line, size, raw, None
        offset, line = offset + size, line + 1


_SPACE = re.compile(rb"[ \t\r\n]*+")
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_TOP, _NESTED = (
    re.compile(rf"{other}(?:{_STRING}{other})*+".encode(), re.DOTALL) for other in (r'[^"\[\]{},]*+', r'[^"\[\]{}]*+')
)


class _List:
    """The elements of a JSON list, cut at the commas between them; brackets are counted, nothing is parsed."""

    def __init__(self, file: Bytes, offset: int, line: int, hold: int) -> None:
        self.file, self.hold, self.line = file, hold, line
        self.base = offset  # of data[0]
        self.data = b""
        self.at = self.begin = self.counted = 0  # in data; begin is negative once an element is too long to hold

    def more(self) -> bool:
        keep = max(self.begin, 0) if self.at - self.begin <= self.hold else self.at
        block = self.file.read(max(BLOCK, (len(self.data) - keep) // 2))
        self.count(keep)
        self.data = self.data[keep:] + block
        self.base, self.at = self.base + keep, self.at - keep
        self.begin, self.counted = self.begin - keep, self.counted - keep
        return bool(block)

    def count(self, end: int) -> int:
        if end > self.counted:
            self.line += self.data.count(b"\n", self.counted, end)
            self.counted = end
        return self.line

    def skip_space(self) -> bool:
        """Go to the next byte that isn't blank; False at the end of the file."""
        while True:
            self.at = self.begin = _SPACE.match(self.data, self.at).end()  # type: ignore[union-attr]  # matches anything
            if self.at < len(self.data):
                return True
            if not self.more():
                return False

    def skip_element(self) -> int | None:
        """Go past the comma or bracket that ends the element and give it; None at the end of the file."""
        depth, in_string = 0, False
        while True:
            pattern = _IN_STRING if in_string else _NESTED if depth else _TOP
            self.at = pattern.match(self.data, self.at).end()  # type: ignore[union-attr]  # matches anything
            char = self.data[self.at] if self.at < len(self.data) else None
            if char is None or (in_string and char == 92):  # the block ends here, or just after a backslash
                if not self.more():
                    return None
                continue
            self.at += 1
            if char == 34:
                in_string = not in_string
            elif char in b"{[":
                depth += 1
            elif depth:
                depth -= 1
            elif char in b",]":
                return char

    def extents(self, first: bool) -> Iterator[_Extent]:
        """Give every element; ``first``: the list may end at once."""
        while True:
            self.skip_space()
            line = self.count(self.at)
            end = self.skip_element()
            offset, size = self.base + self.begin, self.at - self.begin
            raw = self.data[self.begin : self.at - 1] if self.begin >= 0 else None
            if end is None:
                yield offset, line, size, None, "the file ends inside the list, expected ',' or ']'"
                return
            if size > 1:
                yield offset, line, size, raw, None
            elif end == 44:
                yield offset, line, size, None, "broken JSON: expected an element of the list, found ','"
                return
            if end == 93:
                offset, line = self.base + self.at - 1, self.count(self.at)
                if self.skip_space():
                    yield offset, line, 1, None, "text after the end of the list"
                elif size == 1 and not first:
                    yield offset, line, 1, None, "broken JSON: expected an element of the list, found ']'"
                return
            first = False


# ----------------------------------------------------------------------------------------------------- reading in order


class _File(NamedTuple):
    """A file of the sources, open before its first record or before the one asked for."""

    number: int
    path: Path
    file: Bytes
    again: bool  # can be read again anywhere
    is_list: bool
    offset: int
    line: int
    first: bool  # before its first record
    limit: int
    end: int  # what lies beyond isn't read

    @property
    def hold(self) -> int:
        return min(_HOLD, self.limit) if self.again else self.limit

    def extents(self) -> Iterator[_Extent]:
        if self.is_list:
            return _List(self.file, self.offset, self.line, self.hold).extents(self.first)
        return _lines(self.file, self.offset, self.line, self.hold)

    def at(self, position: Position) -> _File:
        """Go from before the first record to the one at ``position``, if what is there still looks like one."""
        found = self._replace(offset=position.offset, line=position.line, first=False)
        if position.offset > self.offset:
            self.file.seek(position.offset - 1)
            before, here = self.file.read(1), self.file.peek(1)[:1]
            ends = b"\n" if not self.is_list else b"[, \t\r\n" if here != b"]" else before
            if not before or before not in ends:
                raise found.nothing()
        elif position.offset < self.offset:
            raise found.nothing()
        else:
            self.file.seek(position.offset)
        return found

    def nothing(self) -> DataError:
        if self.first:
            return DataError(f"{self.path}: no records in it, expected JSON lines or one JSON list")
        return DataError(f"{self.path}: another file, or changed: no record begins at byte {self.offset:,} any more")

    def use(self, extents: Iterable[_Extent], use: Callable[[bytes, int, int, int], _T]) -> Iterator[_T | BadRecord]:
        """Give ``use(raw, offset, line, size)`` for every extent, or why it can't be used."""
        for offset, line, size, raw, problem in extents:
            try:
                if problem is not None:
                    raise _Refused(problem)
                if size > self.limit:
                    words = f"a record of {size:,} bytes, over the limit of {self.limit:,} (data.max_record_mb)"
                    raise _Refused(words)
                if raw is None:
                    with open(self.path, "rb") as again:
                        again.seek(offset)
                        raw = again.read(size - self.is_list)
                    if len(raw) < size - self.is_list or raw.isspace():
                        raise self._replace(offset=offset, first=False).nothing()
                used = use(raw, offset, line, size)
            except _Refused as refused:
                reason, column = refused.reason, None if refused.at is None else refused.at + 1
                if self.is_list:
                    reason, column = _place_in_list(refused, raw, line), None
                yield BadRecord(str(self.path), line, offset, reason, column, size, self.number)
                if self.is_list and refused.broken:
                    return
            else:
                yield used


@contextmanager
def _file(sources: Sources, number: int, buffering: int = 0) -> Iterator[_File]:
    if number >= len(sources.paths):
        raise DataError(f"record of file {number + 1} is asked for, but the data is {len(sources.paths)} files now")
    path, end = sources.paths[number], sources.states[number].size if sources.states else None
    with open_file(path, buffering or BLOCK, end) as (file, again):
        limits = sources.max_record_bytes, sys.maxsize if end is None else end
        yield _File(number, path, file, again, *_begin(file), True, *limits)


def _each_file(sources: Sources, parts: Callable[[_File], Iterator[_T]], start: Position | None = None) -> Iterator[_T]:
    first = start.file if start else 0
    for number in range(first, max(len(sources.paths), first + bool(start))):
        with _file(sources, number) as f:
            if start and number == first:
                f = f.at(start)
            empty = True
            for part in parts(f):
                empty = False
                yield part
        if empty:
            raise f.nothing()


def _place_in_list(refused: _Refused, raw: bytes | None, line: int) -> str:
    """Add to the reason where in the element it is (which may go over several lines), and what follows from it."""
    place = ""
    if refused.at is not None and raw is not None:
        before = raw.decode(errors="replace")[: refused.at]
        column = refused.at - before.rfind("\n")
        breaks = before.count("\n")
        place = f" (line {line + breaks}, column {column})" if breaks else f" (character {column} of the element)"
    return f"{refused.reason}{place}{'; the rest of the list is not read' if refused.broken else ''}"


def _reading(f: _File, fields: tuple[str, ...] | None) -> Callable[[bytes, int, int, int], Record]:
    """Give what makes a record of its bytes."""
    decode, name, number = _decoder().raw_decode, str(f.path), f.number

    def record(raw: bytes, offset: int, line: int, size: int) -> Record:
        found = _parse(raw, decode)
        if fields is not None:
            found = {key: found[key] for key in fields if key in found}
        return Record(found, path=name, line=line, offset=offset, size=size, file=number)

    return record


def read_jsonl(sources: Sources, options: object = None, start: Position | None = None) -> Iterator[Record | BadRecord]:
    """Give the records of all files in order, or from ``start`` on, in memory that doesn't grow with the files.

    Whether a file holds lines or one list is decided by its first byte that isn't blank. After a bad record reading
    goes on, but broken JSON inside a list ends that file. ``size`` counts the line ending, or the comma after a list's
    element. A record over 1 MiB in a plain file is read only once its size is known to be allowed; in ``.gz`` up to
    ``max_record_bytes`` are held, and ``start`` unpacks everything before it. With ``sources.fields`` a record holds
    these keys alone, those that are there, in that order; whatever else is in it must be JSON all the same.

    Raises:
        DataError: a file that can't be opened or unpacked, or has no record at all, or none at ``start`` any more.
    """

    def records(f: _File) -> Iterator[Record | BadRecord]:
        if sources.fields is None or f.is_list or kernel.compiled is None:
            return f.use(f.extents(), _reading(f, sources.fields))
        table = _Table(f, sources.fields)
        return (record for _ in table.fill() for record in table.records())

    return _each_file(sources, records, start)


# ---------------------------------------------------------------------------------------------------- fields, by kernel

MISSING, STRING, OTHER = range(3)
"""Kinds of a value: none there, a string, any other JSON value."""

_PUNCTUATION = re.compile(r"[ \t\r\n:,]*+")


def _members(text: str, decode: Any) -> Iterator[tuple[str, int, str]]:  # noqa: ANN401
    """Give key, kind and value of all in an object that is known to be right: strings decoded, others as written."""
    at = text.index("{") + 1
    while text[at := _PUNCTUATION.match(text, at).end()] != "}":  # type: ignore[union-attr]  # matches anything
        key, at = decode(text, at)
        begin = _PUNCTUATION.match(text, at).end()  # type: ignore[union-attr]
        value, at = decode(text, begin)
        yield (key, STRING, value) if type(value) is str else (key, OTHER, text[begin:at])


class Columns(NamedTuple):
    """Fields of some records as bytes. The arrays are written over when the next ``Columns`` is asked for."""

    path: str
    file: int
    """Index into ``Sources.paths``."""
    places: NDArray[np.int64]
    """int64 [N, 3]: line (1-based), offset and size (bytes) of every record."""
    values: NDArray[np.int64]
    """int64 [N, F, 3]: kind (``MISSING``, ``STRING`` or ``OTHER``) of every field, and where it begins and ends in
    ``text`` (bytes)."""
    text: NDArray[np.uint8]
    """UTF-8: strings without quotes and escapes, other values as the file writes them."""
    bad: list[tuple[int, BadRecord]]
    """What can't be read, each with the number of records here that precede it."""


class _Chunk(NamedTuple):
    """Whole lines of a file."""

    buffer: bytearray
    """Used again as many chunks later as there are buffers."""
    end: int
    """Of the last line."""


def _chunks(f: _File, buffers: int) -> Iterator[_Chunk | tuple[int, bool, bytes | None]]:
    """Give chunks, and each line that is in none, as ``_line`` does."""
    for buffer in cycle(bytearray(_CHUNK) for _ in range(buffers)):
        view = memoryview(buffer)
        got = f.file.readinto(view if f.again else view[: len(f.file.peek(1))])  # from a pipe what there is
        if not got:
            return
        end = buffer.rfind(b"\n", 0, got) + 1
        yield _Chunk(buffer, end)
        if end < got:
            yield _line(f.file, bytes(buffer[end:got]), f.hold)


def _ahead(parts: Iterator[_T]) -> Iterator[_T]:
    """Have a thread make the next parts while one is used."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        made = deque(pool.submit(next, parts, None) for _ in range(1 + _AHEAD))
        while (part := made.popleft().result()) is not None:
            yield part
            made.append(pool.submit(next, parts, None))


class _Table:
    """What ``extract`` of the kernel and its twin (``add``) fill: a row of int64 a record, and the bytes of its values.

    A row: line, offset, size; then for each field its kind and where its bytes begin and end in the arena.
    """

    def __init__(self, f: _File, fields: Sequence[str], room: int = _ROWS) -> None:
        self.f, self.fields, self.room = f, tuple(dict.fromkeys(fields)), room
        self.names = tuple(field.encode("utf-8", "surrogatepass") for field in self.fields)
        self.width = 3 + 3 * len(self.fields)
        self.cells = memoryview(bytearray(8 * self.width * room)).cast("q")
        self.decode = _decoder().raw_decode
        self.arena = bytearray()
        self.clear()

    def clear(self) -> None:
        self.rows = self.used = 0
        self.bad: list[tuple[int, BadRecord]] = []
        if len(self.arena) > 2 * _CHUNK:  # a long record went through
            self.arena = bytearray()

    def full(self) -> bool:
        return self.rows + len(self.bad) >= self.room

    def make_room(self, size: int) -> None:
        if len(self.arena) < self.used + size:
            self.arena = self.arena[: self.used].ljust(self.used + max(size, len(self.arena)), b"\0")

    def add(self, raw: bytes, offset: int, line: int, size: int) -> None:
        _parse(raw, self.decode)
        row = [line, offset, size] + [MISSING, self.used, self.used] * len(self.fields)
        self.make_room(size)
        for key, kind, value in _members(raw.decode(), self.decode):
            if key in self.fields:
                begin, column = self.used, 3 + 3 * self.fields.index(key)
                for i in range(0, len(value), _CHUNK):  # a long one never lies here once more
                    part = value[i : i + _CHUNK].encode()
                    self.arena[self.used : self.used + len(part)] = part
                    self.used += len(part)
                row[column : column + 3] = kind, begin, self.used
        self.cells[self.rows * self.width : (self.rows + 1) * self.width] = memoryview(array("q", row))
        self.rows += 1

    def take(self, extents: Iterable[_Extent], use: Callable[..., object]) -> Iterator[None]:
        for bad in self.f.use(extents, use):
            if isinstance(bad, BadRecord):
                self.bad.append((self.rows, bad))
            yield

    def take_lines(self, buffer: bytes | bytearray, offset: int, line: int, end: int, at: int = 0) -> tuple[int, int]:
        """Take lines of a buffer that lies at ``offset``, from ``at`` until ``end`` or until the table is full.

        Gives how far it came, and the number of the next line.
        """
        self.make_room(end - at)
        while at < end and not self.full():
            if kernel.compiled is not None:
                cells = self.cells[: (self.room - len(self.bad)) * self.width]
                at, self.rows, self.used, line = kernel.compiled.extract(
                    buffer, at, end, self.names, self.f.limit, offset, line, cells, self.rows, self.arena, self.used
                )
                if at == end or self.full():
                    break
            stop = buffer.find(b"\n", at, end) + 1 or end
            raw = bytes(buffer[at:stop])
            if not raw.isspace():
                list(self.take([(offset + at, line, stop - at, raw, None)], self.add))
            at, line = stop, line + 1
        return at, line

    def fill(self, *, ahead: bool = False) -> Iterator[None]:
        """Fill the table with what the file holds, again and again; clears it when asked for more.

        ``ahead``: a thread reads lines while those before them are taken.
        """
        for _ in self.elements() if self.f.is_list else self.lines(ahead):
            if self.rows or self.bad:
                yield
            self.clear()

    def elements(self) -> Iterator[None]:
        for _ in self.take(self.f.extents(), self.add):
            if self.full() or self.used >= _CHUNK:
                yield
        yield

    def lines(self, ahead: bool) -> Iterator[None]:
        offset, line = self.f.offset, self.f.line
        for part in _ahead(_chunks(self.f, 1 + _AHEAD)) if ahead else _chunks(self.f, 1):
            if isinstance(part, _Chunk):
                at = 0
                while at < part.end:
                    at, line = self.take_lines(part.buffer, offset, line, part.end, at)
                    yield
                offset += part.end
                continue
            size, blank, raw = part
            if not blank:
                list(self.take([(offset, line, size, raw, None)], self.take_lines))
            offset, line = offset + size, line + 1
            yield

    def records(self) -> Iterator[Record | BadRecord]:
        cells, text = self.cells[: self.rows * self.width].tolist(), memoryview(self.arena)
        columns = [(name, 3 * i) for i, name in enumerate(self.fields, 1)]
        path, file, decode, done = str(self.f.path), self.f.number, self.decode, 0
        for rows, bad in [*self.bad, (self.rows, None)]:
            for row in range(done * self.width, rows * self.width, self.width):
                found = {}
                for name, column in columns:
                    kind, begin, end = cells[row + column : row + column + 3]
                    if kind:
                        value = str(text[begin:end], "utf-8")
                        found[name] = value if kind == STRING else decode(value)[0]
                line, offset, size = cells[row : row + 3]
                yield Record(found, path=path, line=line, offset=offset, size=size, file=file)
            done = rows
            if bad is not None:
                yield bad

    def columns(self) -> Columns:
        import numpy as np

        cells = np.frombuffer(self.cells, np.int64, self.rows * self.width).reshape(self.rows, self.width)
        values = cells[:, 3:].reshape(self.rows, len(self.fields), 3)
        text = np.frombuffer(self.arena, np.uint8, self.used)
        return Columns(str(self.f.path), self.f.number, cells[:, :3], values, text, self.bad)


def extract(sources: Sources, fields: Sequence[str]) -> Iterator[Columns]:
    """Give the values of some fields of all records, in order, without making Python strings of them.

    A thread reads ahead: what begins in one process can't go on in a fork of it.

    Args:
        sources: as for ``read_jsonl``, whose rules decide what is a bad record.
        fields: keys of a record, F of them once doubles are left out.

    Raises:
        DataError: as for ``read_jsonl``.
    """

    def columns(f: _File) -> Iterator[Columns]:
        table = _Table(f, fields)
        return (table.columns() for _ in table.fill(ahead=f.again))

    return _each_file(sources, columns)


def fetch_jsonl(sources: Sources, options: object, positions: Sequence[Position]) -> list[Record | BadRecord]:
    """Give the records at positions that ``read_jsonl`` or ``index_jsonl`` gave; a ``.gz`` is unpacked once.

    Raises:
        DataError: as for ``read_jsonl``; a file that changed, where that is seen: no record begins at a position.
    """
    found: dict[Position, Record | BadRecord] = {}
    for number, some in groupby(sorted(set(positions)), attrgetter("file")):
        with _file(sources, number, _SMALL_BLOCK) as f:
            wanted, make = list(some), _reading(f, sources.fields)
            if f.again and not f.is_list and hasattr(os, "pread"):
                found |= _fetch_lines(f, wanted, sources.fields, make)
            for position in wanted:
                if position not in found:
                    at = f.at(position)
                    record = next(at.use(at.extents(), make), None)
                    if record is None or record.offset != position.offset:
                        raise at.nothing()
                    found[position] = record
    return [found[position] for position in positions]


def _fetch_lines(
    f: _File, wanted: Sequence[Position], fields: tuple[str, ...] | None, make: Callable[..., Record]
) -> dict[Position, Record | BadRecord]:
    """Find the lines that are not long, each by a read of its own; the kernel takes them as one buffer."""
    file, lines = f.file.fileno(), dict[Position, bytes]()
    for position in wanted:
        before = int(position.offset > f.offset)
        raw, end = b"", 0
        for size in () if position.offset < f.offset else (_SMALL_BLOCK, BLOCK):
            at = position.offset - before
            raw = os.pread(file, max(min(size, f.end - at), 0), at)
            if end := raw.find(b"\n", before) + 1:
                break
        if end and (not before or raw[0] == 10) and not raw[before:end].isspace():
            lines[position] = raw[before:end]
    if fields is None or kernel.compiled is None:
        extents = ((at.offset, at.line, len(raw), raw, None) for at, raw in lines.items())
        return dict(zip(lines, f.use(extents, make), strict=True))
    table, data, places = _Table(f, fields, len(lines)), b"".join(lines.values()), list(lines)
    table.take_lines(data, 0, 0, len(data))
    for row in range(0, table.rows * table.width, table.width):  # so far they count from the start of data
        place = places[table.cells[row]]
        table.cells[row], table.cells[row + 1] = place.line, place.offset
    moved = (replace(bad, line=places[bad.line].line, offset=places[bad.line].offset) for _, bad in table.bad)
    table.bad = [(rows, bad) for (rows, _), bad in zip(table.bad, moved, strict=True)]
    return dict(zip(lines, table.records(), strict=True))


# ---------------------------------------------------------------------------------------------------------------- index


def index_jsonl(sources: Sources, options: object = None) -> NDArray[np.int64]:
    """Give the Position of every record that ``read_jsonl`` would give, int64 [N, 3], without parsing any.

    Elements of a list are found at about the speed of ``json.loads``. Bad records are included; in a list with broken
    JSON inside an element, so are the elements after it. The table is a mapped file in the temporary folder
    (``TMPDIR``), unlinked from the start and read-only: memory doesn't grow with it.

    Raises:
        DataError: as for ``read_jsonl``; no room for the table.
    """
    import numpy as np

    try:
        with tempfile.TemporaryFile() as table:
            for rows in _each_file(sources, _positions):
                table.write(rows)
            table.flush()
            if not table.tell():
                return np.empty((0, 3), np.int64)
            return np.frombuffer(mmap.mmap(table.fileno(), 0, access=mmap.ACCESS_READ), np.int64).reshape(-1, 3)
    except OSError as error:
        folder = tempfile.tempdir or "no temporary folder"
        raise DataError(
            f"{folder}: no index of the records there: {why(error)}; TMPDIR names another folder"
        ) from error


def _positions(f: _File) -> Iterator[memoryview]:
    """Give rows of int64: number of the file, line, offset."""
    if f.is_list or kernel.compiled is None:
        cells = (cell for offset, line, *_ in f.extents() for cell in (f.number, line, offset))
        while flat := array("q", islice(cells, 3 * _ROWS)):
            yield memoryview(flat)
        return
    table, buffer = memoryview(bytearray(24 * 4 * BLOCK)).cast("q"), bytearray(4 * BLOCK)
    offset = begin = f.offset
    line, blank = f.line, True  # the line that the last block ended in: its number, whether it is blank so far
    while size := f.file.readinto1(buffer):
        rows, line, begin, blank = kernel.compiled.index_lines(
            buffer, size, f.number, line, offset, begin, blank, table
        )
        offset += size
        if rows:
            yield table[: 3 * rows]
    if not blank:
        yield memoryview(array("q", (f.number, line, begin)))


def content_hash(record: Mapping[str, Any]) -> int:
    """Give a signed 64-bit hash of the record's content alone, not of the order of its keys or its place in a file."""
    text = json.dumps(dict(record), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
