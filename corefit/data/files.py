"""Files -> bytes: which files a ``data.path`` means, what they hold unpacked, what can't be read twice, what changed.

A file is read as far as it went when the run began, where the sources say how far that was (``Sources.states``): rows
may be added to it meanwhile. Whether it changed otherwise the stream sees (``Input.check``).
"""

from __future__ import annotations

import difflib
import glob
import gzip
import hashlib
import os
import re
import shlex
import shutil
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader, FileIO
from pathlib import Path
from typing import Any

from corefit.errors import DataError, system_words, unknown
from corefit.types import FileState

MAX_RATIO, MAX_UNPACKED = 200, 256 * 2**20
"""A .gz may unpack to this many times its size, and to this many bytes in any case."""
STDIN_NAME = "stdin.jsonl"
"""The name under which ``spool`` keeps standard input."""
BLOCK = 2**16
"""Bytes that are read at a time."""

_GZIP = b"\x1f\x8b"
_NO_TEXT = {
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bzip2; bunzip2 unpacks it",
    rb"\x28\xb5\x2f\xfd": "zstd; unzstd unpacks it",
    rb"\xfd7zXZ\x00": "xz; unxz unpacks it",
    rb"PK\x03\x04": "zip; unzip unpacks it",
    rb"PAR1\x15": "Parquet; give it a name that ends in .parquet",
}
"""How a file begins that holds something else -> what, and what to do."""
_ENDS = 2**12  # bytes at either end of a file that its state remembers


# ------------------------------------------------------------------------------------------------------------- opening


class _Raw(FileIO):
    """A file that ends where it did when the run began, whatever has been added since, and counts what is read."""

    end: int | None = None
    """Bytes; None: as far as it goes."""
    taken = 0
    """Bytes."""

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401, anything writable
        if self.end is not None:
            buffer = memoryview(buffer)[: max(self.end - self.tell(), 0)]
        got = super().readinto(buffer)
        self.taken += got or 0
        return got


class _Unpacked(gzip.GzipFile):
    """What a .gz holds; ends with an error where that is much more than it could honestly be."""

    def __init__(self, file: BufferedReader[_Raw], path: Path) -> None:
        self.path, self.packed = path, file.raw
        super().__init__(fileobj=file)

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if self.tell() > MAX_UNPACKED + MAX_RATIO * self.packed.taken:
            raise DataError(
                f"{self.path}: unpacks to more than {MAX_RATIO} times its size, perhaps to fill memory or disk; if "
                "that is right, unpack it by hand"
            )
        return data

    readinto = BufferedIOBase.readinto  # by read, which some Pythons don't do


@contextmanager
def open_file(path: Path, buffering: int = BLOCK, end: int | None = None) -> Iterator[tuple[BufferedReader[Any], bool]]:
    """Open for reading, unpacked, ``-`` too; also give whether the file can be read again anywhere.

    Args:
        path: of a file; ``-`` is standard input.
        buffering: bytes that are read ahead.
        end: what lies beyond so many bytes isn't there; None: all is.

    Raises:
        DataError: it can't be opened, read or unpacked, by what is done with it too.
    """
    stdin = str(path) == "-"
    try:
        raw = _Raw(sys.stdin.fileno() if stdin else path, closefd=not stdin)
        raw.end = end
        with BufferedReader(raw, buffering) as file:
            head = file.peek(10)
            for other, words in _NO_TEXT.items():
                if re.match(other, head):
                    raise DataError(f"{path}: not text but {words}")
            if not head.startswith(_GZIP):
                yield file, file.seekable() and not stdin
            else:
                with _Unpacked(file, path) as unpacked, BufferedReader(unpacked, BLOCK) as buffered:
                    yield buffered, False
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {why(error)}") from error


def is_packed(path: Path) -> bool:
    """Whether a file is gzip, by its first bytes and whatever its name; a pipe, or what can't be read, is not."""
    if path.is_file():
        with suppress(DataError), open_file(path) as (_, again):
            return not again
    return False


def why(error: Exception) -> str:
    """Give the reason for which a file can't be read, in words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return f"damaged gzip data ({error}); unpack it by hand or fetch it again"
    return system_words(error)


# ---------------------------------------------------------------------------------------------------------- which files


@dataclass(frozen=True, slots=True)
class Found:
    """The files of one ``data.path``. ``-`` stays ``Path("-")``: spool it."""

    train: tuple[Path, ...]
    val: tuple[Path, ...] = ()
    """What a folder says is for validation; empty where files were named."""


_TRAIN = re.compile(r"train\w*")
_VAL = re.compile(r"(eval(uation)?|val(id(ation)?)?|dev(elopment)?|test(ing)?)(set)?\d*")
_SUFFIX = re.compile(r"\.(jsonl|json|ndjson|csv|tsv|parquet)(\.gz)?$")


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
        if address := re.search(r"(^|/)((https?|s3|gs|hf|ftp):/.*)", one):
            where = re.sub(r":/+([^/@]*@)?", "://", address[2], count=1)  # of two slashes a path keeps one
            raise DataError(f"{where}: an address; corefit downloads no data, fetch it and name the file")
        path = base / os.path.expanduser(one)
        try:
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
        except OSError as error:
            raise DataError(f"{path}: {why(error)}") from error
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
        what = "which files train is unclear" if unclear else "no file to train on" if files else "no data file"
        raise DataError(
            f"{folder}: {what}, expected train* (and val* or test*) or one data file; "
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
        str(path).encode()
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(f"{path}: a link to {os.readlink(path)}, which is not there") from None
        if not path.parent.is_dir():
            inside = path.is_relative_to(Path.cwd())  # ORGANISATION/NAME, and a folder of that
            whole = Path(*path.parts[: len(Path.cwd().parts) + 2]) if inside else path
            name, here = shlex.quote("/".join(whole.parts[-2:])), shlex.quote(str(whole))
            get = (
                f"; corefit downloads no data; from the hub: hf download {name} --repo-type dataset --local-dir {here}"
            )
            raise DataError(f"{path}: no such folder: {path.parent}{'' if path.suffix else get}") from None
        names = [other.name for other in path.parent.iterdir() if other.is_dir() or _is_data(other)]
        near = difflib.get_close_matches(path.name, names, n=20, cutoff=0)
        raise DataError(f"{path}: {unknown('file', path.name, near)}") from None
    except UnicodeEncodeError:
        raise DataError(f"{path}: its name is not UTF-8, so that no recipe can hold it; rename it") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {why(error)}") from error
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: no permission to read it")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: a pipe or a device, which can be read only once; send it to --data -")
    if status.st_size == 0:
        raise DataError(f"{path}: the file is empty")


# --------------------------------------------------------------------------------------- files that change during a run


def file_state(path: Path, size: int | None = None) -> FileState:
    """Give what a file is now, or its first ``size`` bytes.

    Raises:
        DataError: it can't be read.
    """
    try:
        with open(path, "rb", 0) as file:
            found = os.fstat(file.fileno())
            size = found.st_size if size is None else size
            some = min(size, _ENDS)
            ends = hashlib.blake2b(file.read(some), digest_size=16)
            file.seek(size - some)
            ends.update(file.read(some))
    except OSError as error:
        raise DataError(f"{path}: {why(error)}") from error
    return FileState(size, found.st_mtime_ns, ends.digest())


def changed(path: Path, before: int, now: int | None) -> DataError:
    """Give the error for a file whose size in bytes was ``before``, and is ``now`` (None: it is gone)."""
    what = "it is gone" if now is None else f"{before:,} -> {now:,} bytes"
    what = f"edited, {now:,} bytes as before" if now == before else what
    return DataError(f"{path}: changed while the run was reading it: {what}; put it back and --resume, or start anew")


def spool(spec: str | Path, folder: Path) -> Path:
    """Copy ``-`` (standard input) or a gzip file unpacked into ``folder``; give the plain file, whole or not there.

    The same file is unpacked once: its copy's name holds a hash of where it lies, its size and its time of change.
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
        raise DataError(f"{path}: {why(error)}") from error
    key = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    mark = hashlib.blake2b(os.fsencode(key), digest_size=4).hexdigest()
    stem, dot, suffix = re.sub(r"\.gz$", "", path.name, flags=re.I).partition(".")
    target = folder / f"{stem}-{mark}{dot}{suffix}"
    return target if target.exists() else _copy(str(path), target)


def _copy(source: str, target: Path) -> Path:
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as out, open_file(Path(source)) as (file, _):
            shutil.copyfileobj(file, out, BLOCK)
            if not out.tell():
                raise DataError(f"{source}: nothing came in")
            out.flush()
            os.fsync(out.fileno())
        part.replace(target)
    except OSError as error:
        raise DataError(f"{target}: can't be written: {why(error)}") from error
    finally:
        with suppress(OSError):  # its folder may be none
            part.unlink()
    return target
