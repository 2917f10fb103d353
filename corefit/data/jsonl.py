"""Bytes -> records: JSON lines or one top-level JSON list, plain or gzip, in bounded memory, from any position.

Also which files a ``data.path`` means, the spooling of what can't be read twice, and the hash that splits off
validation records.

What is a bad record here is a bad record in every reader of corefit: anything but one JSON object in UTF-8, NaN and
Infinity (the words; ``1e999`` is a number), lone surrogates, more than 500 levels, an integer of over 4,300 digits,
more bytes than ``max_record_bytes``. Of equal keys the last one wins.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from corefit.errors import DataError, unknown
from corefit.types import BadRecord, Position, Record, Sources

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = BufferedReader[Any]

MAX_DEPTH = 500
MAX_DIGITS = 4300
STDIN_NAME = "stdin.jsonl"
"""The name under which ``spool`` keeps standard input."""

_BLOCK = 2**16
_HOLD = 2**20  # what is held of a record before its end is known, where the file can be read again
# The second branch alone is right; the first, which ends at a quote that no backslash precedes, is five times as fast.
_STRING = r'"(?:[^"]*+(?<!\\)"|[^"\\]*+(?:\\.[^"\\]*+)*+")'
_GZIP = b"\x1f\x8b"

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


@lru_cache
def _decoder(interpreter_limit: int) -> json.JSONDecoder:
    # A parse_int of our own costs 0.1 us an integer; the interpreter's limit is the same unless somebody moved it.
    return json.JSONDecoder(parse_constant=_constant, parse_int=int if interpreter_limit == MAX_DIGITS else _integer)


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
    says = (
        error.msg if error.doc[error.pos :].strip() else "Unterminated string" if "control" in error.msg else error.msg
    )
    for start, words in _JSON_SAYS.items():
        if says.startswith(start):
            return f"broken JSON: {words}"
    found = error.doc[error.pos : error.pos + 1].strip()
    hint = "; an object over several lines? expected one object a line, or one list" if error.doc.strip() == "{" else ""
    return f"broken JSON: {error.msg[:1].lower()}{error.msg[1:]}, found {repr(found) if found else 'the end'}{hint}"


_KINDS = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}


def _parse(raw: bytes, decode: Any) -> dict[str, Any]:  # noqa: ANN401, the bound raw_decode
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode())
        raise _Refused(f"byte 0x{raw[error.start]:02x} is not UTF-8", column) from None
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


@contextmanager
def _open(path: Path) -> Iterator[tuple[Bytes, bool]]:
    """Open for reading, unpacked, ``-`` too; whether the file can be read again anywhere; errors become DataError."""
    stdin = str(path) == "-"
    try:
        opened = open(sys.stdin.fileno() if stdin else path, "rb", buffering=_BLOCK, closefd=not stdin)
        with cast("Bytes", opened) as file:
            if file.peek(2)[:2] != _GZIP:
                yield file, file.seekable() and not stdin
            else:
                with gzip.GzipFile(fileobj=file) as unpacked, BufferedReader(unpacked, _BLOCK) as buffered:
                    yield buffered, False
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {_why(error)}") from error


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return f"damaged gzip data ({error}); unpack it by hand or fetch it again"
    return (getattr(error, "strerror", None) or str(error)).lower()


def _begin(file: Bytes) -> tuple[bool, int, int]:
    """Go past the BOM and blank lines. Gives whether a list follows (then also past its bracket), offset and line."""
    offset, line = 0, 1
    if file.peek(3).startswith(b"\xef\xbb\xbf"):
        offset = len(file.read(3))
    while head := file.peek(1):
        text = head.lstrip()
        blank = head[: len(head) - len(text)]
        is_list = text.startswith(b"[")
        skip = len(blank) + 1 if is_list else blank.rfind(b"\n") + 1 if text else len(blank)
        file.read(skip)
        offset, line = offset + skip, line + blank.count(b"\n")
        if text:
            return is_list, offset, line
    return False, offset, line


def _lines(file: Bytes, offset: int, line: int, hold: int) -> Iterator[_Extent]:
    while raw := file.readline(hold + 1):
        size, held, blank = len(raw), True, raw.isspace()
        if size > hold and raw[-1] != 10:
            held = False
            while part := file.readline(_BLOCK):
                size, blank = size + len(part), blank and part.isspace()
                if part[-1] == 10:
                    break
        if not blank:
            yield offset, line, size, raw if held else None, None
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
        self.at = self.begin = self.counted = (
            0  # indexes into data; begin is negative once an element is too long to hold
        )

    def more(self) -> bool:
        keep = max(self.begin, 0) if self.at - self.begin <= self.hold else self.at
        block = self.file.read(max(_BLOCK, (len(self.data) - keep) // 2))
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


def _nothing(path: Path) -> DataError:
    return DataError(f"{path}: no records in it, expected JSON lines or one JSON list")


def read_jsonl(sources: Sources, options: object = None, start: Position | None = None) -> Iterator[Record | BadRecord]:
    """Give the records of all files in order, or from ``start`` on, in memory that doesn't grow with the files.

    Whether a file holds lines or one list is decided by its first byte that isn't blank. After a bad record reading
    goes on, but broken JSON inside a list ends that file. ``size`` counts the line ending, or the comma after a list's
    element. A record over 1 MiB in a plain file is read only once its size is known to be allowed; in ``.gz`` up to
    ``max_record_bytes`` are held, and ``start`` unpacks everything before it.

    Raises:
        DataError: a file that can't be opened or unpacked, or has no record at all.
    """
    decode = _decoder(sys.get_int_max_str_digits()).raw_decode
    limit = sources.max_record_bytes
    for number, path in enumerate(sources.paths):
        if start is not None and number < start.file:
            continue
        name, empty = str(path), True
        with _open(path) as (file, again):
            is_list, offset, line = _begin(file)
            first = start is None or number > start.file
            if start is not None and not first:
                file.seek(start.offset)
                offset, line = start.offset, start.line
            hold = min(_HOLD, limit) if again else limit
            if is_list:
                extents = _List(file, offset, line, hold).extents(first)
            else:
                extents = _lines(file, offset, line, hold)
            for offset, line, size, raw, problem in extents:
                empty = False
                try:
                    if problem is not None:
                        raise _Refused(problem)
                    if size > limit:
                        raise _Refused(f"a record of {size:,} bytes, over the limit of {limit:,} (data.max_record_mb)")
                    if raw is None:
                        raw = _read_again(path, offset, size - is_list)
                    fields = _parse(raw, decode)
                except _Refused as refused:
                    reason, column = refused.reason, None if refused.at is None else refused.at + 1
                    if is_list:
                        reason, column = _place_in_list(refused, raw, line), None
                    yield BadRecord(name, line, offset, reason, column, size, number)
                    if is_list and refused.broken:
                        break
                else:
                    yield Record(fields, path=name, line=line, offset=offset, size=size, file=number)
        if empty and first:
            raise _nothing(path)


def _read_again(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _place_in_list(refused: _Refused, raw: bytes | None, line: int) -> str:
    """Add to the reason where in the element it is (which may go over several lines), and what follows from it."""
    place = ""
    if refused.at is not None and raw is not None:
        before = raw.decode(errors="replace")[: refused.at]
        column = refused.at - before.rfind("\n")
        breaks = before.count("\n")
        place = f" (line {line + breaks}, column {column})" if breaks else f" (character {column} of the element)"
    return f"{refused.reason}{place}{'; the rest of the list is not read' if refused.broken else ''}"


def index_jsonl(sources: Sources, options: object = None) -> NDArray[np.int64]:
    """Give the Position of every record that ``read_jsonl`` would give, int64 [N, 3], without parsing any.

    Lines are found at the speed of numpy, elements of a list at about that of ``json.loads``. Bad records are included;
    in a list with broken JSON inside an element, so are the elements after it.

    Raises:
        DataError: as for ``read_jsonl``.
    """
    import numpy as np

    parts: list[NDArray[np.int64]] = []
    for number, path in enumerate(sources.paths):
        before = len(parts)
        with _open(path) as (file, _):
            is_list, offset, line = _begin(file)
            if is_list:
                flat = array("q")
                for begin, at_line, *_rest in _List(file, offset, line, 0).extents(True):
                    flat.extend((number, at_line, begin))
                parts.append(np.frombuffer(flat, np.int64).reshape(-1, 3) if flat else np.empty((0, 3), np.int64))
            else:
                parts.extend(_index_lines(file, offset, line, number))
        if not sum(map(len, parts[before:])):
            raise _nothing(path)
    return np.concatenate(parts) if parts else np.empty((0, 3), np.int64)


def _index_lines(file: Bytes, offset: int, line: int, number: int) -> Iterator[NDArray[np.int64]]:
    import numpy as np

    begin, blank = offset, True  # of the line that the last block ended in
    while block := file.read(2**20):
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
        cut = int(ends[0]) if len(ends) else len(block)
        blank = blank and not block[:cut].strip()
        if len(ends):
            begins = np.concatenate([[begin - offset], ends[:-1] + 1])
            keep = np.ones(len(ends), np.bool_)
            keep[0] = not blank
            # only a line that begins with a blank byte can be blank
            for i in np.flatnonzero(np.frombuffer(block, np.uint8)[begins[1:]] <= 32) + 1:
                keep[i] = bool(block[begins[i] : ends[i]].strip())
            lines = np.flatnonzero(keep)
            yield np.stack([np.full(len(lines), number), line + lines, offset + begins[lines]], axis=1)
            begin, line = offset + int(ends[-1]) + 1, line + len(ends)
            blank = not block[ends[-1] + 1 :].strip()
        offset += len(block)
    if not blank:
        yield np.array([[number, line, begin]])


# ---------------------------------------------------------------------------------------------------------- which files


@dataclass(frozen=True, slots=True)
class Found:
    """The files of one ``data.path``. ``-`` stays ``Path("-")``: spool it."""

    train: tuple[Path, ...]
    val: tuple[Path, ...] = ()
    """What a folder says is for validation; empty where files were named."""


_TRAIN = re.compile(r"train\w*")
_VAL = re.compile(r"(eval(uation)?|val(id(ation)?)?|dev(elopment)?|test(ing)?)(set)?\d*")
_SUFFIX = re.compile(r"\.(jsonl|json|ndjson)(\.gz)?$")


def _role(path: Path) -> str:
    """``train``, ``val``, ``both`` or ``""``, by the words of the name: ``X_train.jsonl``, ``test-00000.json.gz``."""
    words = re.split(r"[^a-z0-9]+", _SUFFIX.sub("", path.name.lower()))
    train, val = any(map(_TRAIN.fullmatch, words)), any(map(_VAL.fullmatch, words))
    return "both" if train and val else "train" if train else "val" if val else ""


def _is_data(path: Path) -> bool:
    return bool(_SUFFIX.search(path.name.lower())) and not path.name.startswith(".")


def find_files(spec: str | Sequence[str], *, base: Path) -> Found:
    """Give the files that ``spec`` means: files, folders, globs or ``-``, relative to ``base``, in a fixed order.

    In a folder ``train*`` trains and ``eval|val|valid|dev|test*`` validates, as any word of the name; without a
    ``train*`` a single unmarked file trains. Named files train whatever their name; so does what a glob matches, unless
    some of it is marked for validation and some isn't.

    Raises:
        DataError: nothing there, not readable, empty, given twice, or unclear; lists what is there.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    train: list[Path] = []
    val: list[Path] = []
    for one in specs:
        path = base / Path(one).expanduser()
        if one == "-":
            train.append(Path("-"))
        elif path.is_dir():
            found = _in_folder(path)
            train += found.train
            val += found.val
        elif glob.has_magic(one) and not path.exists():
            train += _in_glob(path)
        else:
            train.append(path)
    if not train:
        raise DataError("no data is named, expected a file, a folder, a glob or -")
    seen: set[Path] = set()
    for path in [*train, *val]:
        _check(path)
        if path.resolve() in seen:
            raise DataError(f"{path}: given twice; data.repeat says how often a source is read")
        seen.add(path.resolve())
    return Found(tuple(train), tuple(val))


def _in_folder(folder: Path) -> Found:
    files = sorted(path for path in folder.iterdir() if path.is_file() and _is_data(path))
    by_role = {role: [path for path in files if _role(path) == role] for role in ("train", "val", "both", "")}
    train = by_role["train"] or by_role[""]
    unclear = by_role["both"] or (by_role["train"] and by_role[""]) or len(by_role[""]) > 1
    if unclear or not train:
        why = "which files train is unclear" if unclear else "no file to train on" if files else "no data file"
        raise DataError(
            f"{folder}: {why}, expected train* (and val* or test*) or one data file; "
            f"name the files or use a glob; there: {_listing(path.name for path in folder.iterdir())}"
        )
    return Found(tuple(train), tuple(by_role["val"]))


def _in_glob(pattern: Path) -> list[Path]:
    files = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True)) if Path(name).is_file()]
    if not files:
        raise DataError(f"{pattern}: no file matches")
    marked = [path for path in files if _role(path) in ("val", "both")]
    if marked and len(marked) < len(files):
        raise DataError(
            f"{pattern}: {marked[0].name} looks like validation data among training data; "
            f"name the files or narrow the glob; it matches: {_listing(path.name for path in files)}"
        )
    return files


def _listing(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return (", ".join(listed[:20]) or "nothing") + more


def _check(path: Path) -> None:
    """Refuse, before anything is loaded, a file that can't be read or has nothing in it."""
    if path == Path("-"):
        return
    try:
        status = path.stat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise DataError(f"{path}: no such folder: {path.parent}") from None
        names = [other.name for other in path.parent.iterdir() if other.is_dir() or _is_data(other)]
        near = difflib.get_close_matches(path.name, names, n=20, cutoff=0)
        raise DataError(f"{path}: {unknown('file', path.name, near)}") from None
    except OSError as error:
        raise DataError(f"{path}: {_why(error)}") from error
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: no permission to read it")
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise DataError(f"{path}: the file is empty")


def spool(spec: str | Path, folder: Path) -> Path:
    """Copy ``-`` (standard input) or a ``.gz`` file unpacked into ``folder``; give the plain file, whole or not there.

    The same ``.gz`` is unpacked once: its copy's name holds a hash of where it lies, its size and its time of change.
    Standard input becomes ``STDIN_NAME``, replacing what was there.

    Raises:
        DataError: nothing comes in, the archive is damaged, or the copy can't be written.
    """
    if str(spec) == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise DataError("-: standard input is a terminal; pipe the data in or name a file")
        return _copy("-", folder / STDIN_NAME)
    path = Path(spec)
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {_why(error)}") from error
    key = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    mark = hashlib.blake2b(os.fsencode(key), digest_size=4).hexdigest()
    stem, dot, suffix = path.name.removesuffix(".gz").partition(".")
    target = folder / f"{stem}-{mark}{dot}{suffix}"
    return target if target.exists() else _copy(str(path), target)


def _copy(source: str, target: Path) -> Path:
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as out, _open(Path(source)) as (file, _):
            shutil.copyfileobj(file, out, _BLOCK)
            if not out.tell():
                raise DataError(f"{source}: nothing came in")
            out.flush()
            os.fsync(out.fileno())
        part.replace(target)
    except OSError as error:
        raise DataError(f"{target}: can't be written: {_why(error)}") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def content_hash(record: Mapping[str, Any]) -> int:
    """Give 64 bits that depend on the record's content alone, not on the order of its keys or its place in a file."""
    text = json.dumps(dict(record), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
