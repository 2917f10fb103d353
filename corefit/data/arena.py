"""The samples of a data set on disk, encoded once: what ``corefit pack`` writes and a stream reads instead of the data.

A folder: raw little-endian arrays, one a file, as ``Block`` describes them (tokens in uint16 where the vocabulary
allows it), and ``arena.header``, JSON written last: what they were made from (the key), their shapes, and a CRC-32 of
every MiB. The arrays are mapped, and each MiB is checked when something in it is first used. Samples are kept whole, in
file order: packs, their size, the order of records and the validation split are a run's own.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from corefit.data.block import (
    FIRST,
    LENGTH,
    RECORD_COLUMNS,
    SAMPLE_COLUMNS,
    SAMPLES,
    SPAN,
    SPANS,
    START,
    Block,
    Words,
    moved,
    select,
)
from corefit.data.files import changed
from corefit.data.source import Size
from corefit.durable import contents, place_beside, take_place
from corefit.errors import DataError, RecipeError, RunError, system_words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from corefit.data.block import Table

FORMAT = 1
HEADER = "arena.header"
CHECKED = 2**20
"""Bytes that have one checksum."""

_SHAPES = {"records": (RECORD_COLUMNS,), "samples": (SAMPLE_COLUMNS,), "tokens": (), "spans": (2,), "cuts": ()}


def _facts(file: IO[bytes], dtype: str, rows: int) -> dict[str, Any]:
    """Wait until an array is on the disk, and give what the header says of it."""
    file.flush()
    os.fsync(file.fileno())
    file.seek(0)
    crcs = [zlib.crc32(part) for part in iter(lambda: file.read(CHECKED), b"")]
    return {"dtype": dtype, "rows": rows, "crc32": crcs}


def write_arena(
    folder: Path,
    key: Mapping[str, Any],
    sizes: Callable[[], Sequence[Size]],
    blocks: Iterable[Block],
    *,
    vocab_size: int,
) -> Block:
    """Write an arena aside and move it to ``folder``, whole or not at all; an older arena there is replaced.

    Args:
        folder: new, empty, or an arena.
        key: what the samples depend on; JSON-able.
        sizes: gives that of each source, once all blocks are there.
        blocks: all records, source by source in file order, hashed and not fitted.
        vocab_size: of the tokenizer.

    Raises:
        RecipeError: something else lies at ``folder``, or nothing can be made there. RunError: the disk refuses.
    """
    folder = folder.resolve()
    try:
        there = contents(folder) if folder.exists() else set()
        if there and not (HEADER in there and there <= {HEADER, *(f"{name}.bin" for name in _SHAPES)}):
            raise RecipeError(f"--out {str(folder)!r} is there and no arena; name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=place_beside(folder)))
    except OSError as error:
        raise RecipeError(f"--out {str(folder)!r} can't be written: {system_words(error)}") from error
    old, names = aside.with_name(aside.name + "-old"), list[str]()
    words: dict[Words, int] = {}
    try:
        with _disk(folder), ExitStack() as stack:
            aside.chmod(0o755)
            files = {name: stack.enter_context((aside / f"{name}.bin").open("w+b")) for name in _SHAPES}
            dtypes = dict.fromkeys(_SHAPES, "<i8") | {"tokens": "<u2" if vocab_size <= 2**16 else "<i4"}
            rows = dict.fromkeys(_SHAPES, 0)
            for block in blocks:
                at, names = rows["tokens"], list(block.names)
                arrays = (*moved(block, rows, words), block.tokens, block.spans + at, block.cuts + at)
                for name, array in zip(_SHAPES, arrays, strict=True):
                    files[name].write(np.ascontiguousarray(array, dtypes[name]).data)
                    rows[name] += len(array)
            header = {
                "format": FORMAT,
                "key": key,
                "sizes": [list(size) for size in sizes()],
                "words": list(words),
                "names": names,
                "arrays": {name: _facts(files[name], dtypes[name], rows[name]) for name in _SHAPES},
            }
            file = stack.enter_context((aside / HEADER).open("w", encoding="utf-8"))
            json.dump({**header, "crc32": _crc(header)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        with _disk(folder):
            take_place(aside, folder, old)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return Arena(folder, key).block


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder}: the arena can't be written: {system_words(error)}") from error


def _crc(header: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())


class Arena:
    """An arena, open: ``block`` holds all records of all sources, mapped; ``take`` gives some, checked."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Open an arena and check that it is whole and was made from what ``key`` says.

        Raises:
            RecipeError: there is none, or it was made from something else: says what differs.
            DataError: it is torn.
        """
        self.folder = folder
        header = _header(folder)
        if changed := differences(header["key"], json.loads(json.dumps(key))):
            raise RecipeError(
                f"pack.arena: {folder} was made from something else ({'; '.join(changed)}); `corefit pack` with the "
                "same flags makes it anew"
            )
        self.sizes = [Size(*size) for size in header["sizes"]]
        self._bytes: dict[str, memoryview] = {}
        self._stats: dict[Path, os.stat_result] = {}
        self._crcs = {name: np.array(header["arrays"][name]["crc32"], np.int64) for name in _SHAPES}
        self._checked = {name: np.zeros(len(crcs), np.bool_) for name, crcs in self._crcs.items()}
        arrays: dict[str, Any] = {name: self._open(name, header["arrays"][name]) for name in _SHAPES}
        self.verify("cuts")
        words = [Words(*map(tuple, one)) for one in header["words"]] or [Words()]
        self.block = Block(**arrays, words=words, names=header["names"])

    def _open(self, name: str, facts: Mapping[str, Any]) -> NDArray[Any]:
        path, dtype = self.folder / f"{name}.bin", np.dtype(facts["dtype"])
        size = dtype.itemsize * facts["rows"] * int(np.prod(_SHAPES[name], dtype=np.int64))
        try:
            with path.open("rb") as file:
                self._stats[path] = found = os.fstat(file.fileno())
                if found.st_size != size:
                    words = f"{found.st_size:,} bytes, expected {size:,}"
                    raise DataError(f"{path}: torn: {words}; `corefit pack` makes it anew")
                self._bytes[name] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
        except OSError as error:
            raise DataError(f"{path}: {system_words(error)}; `corefit pack` makes it anew") from error
        return np.frombuffer(self._bytes[name], dtype).reshape(-1, *_SHAPES[name])

    def check(self) -> None:
        """Look whether anybody cut off or edited what is mapped, before it is used: what is cut off kills the process.

        A file that was removed or replaced by another stays mapped as it was.

        Raises:
            DataError: somebody did.
        """
        for path, was in self._stats.items():
            try:
                now = path.stat()
            except OSError:
                continue
            same_file = (now.st_dev, now.st_ino) == (was.st_dev, was.st_ino)
            if same_file and (now.st_size, now.st_mtime_ns) != (was.st_size, was.st_mtime_ns):
                raise changed(path, was.st_size, now.st_size)

    def _check(self, name: str, starts: Table, ends: Table) -> None:
        """Check every MiB that a range of bytes touches, once."""
        checked = self._checked[name]
        some = ends > starts
        if checked.all() or not some.any():
            return
        touched = np.zeros(len(checked) + 1, np.int64)
        np.add.at(touched, starts[some] // CHECKED, 1)
        np.add.at(touched, (ends[some] - 1) // CHECKED + 1, -1)
        for i in np.flatnonzero((np.cumsum(touched[:-1]) > 0) & ~checked).tolist():
            if zlib.crc32(self._bytes[name][i * CHECKED : (i + 1) * CHECKED]) != self._crcs[name][i]:
                path = self.folder / f"{name}.bin"
                raise DataError(f"{path}: torn: byte {i * CHECKED:,} and what follows; `corefit pack` makes it anew")
            checked[i] = True

    def verify(self, *names: str) -> None:
        """Check what isn't checked yet of these arrays; of all, where none is named.

        Raises:
            DataError: what is on disk isn't what was written.
        """
        for name in names or self._bytes:
            self._check(name, np.zeros(1, np.int64), np.array([len(self._bytes[name])]))

    def take(self, rows: Table) -> Block:
        """Give the block of these records, in this order.

        Raises:
            DataError: what is on disk isn't what was written.
        """
        self.check()
        self._check("records", rows * (8 * RECORD_COLUMNS), (rows + 1) * (8 * RECORD_COLUMNS))
        first, n = self.block.records[rows][:, [FIRST, SAMPLES]].T
        self._check("samples", first * (8 * SAMPLE_COLUMNS), (first + n) * (8 * SAMPLE_COLUMNS))
        block = select(self.block, rows)
        start, length, span, spans = block.samples[:, [START, LENGTH, SPAN, SPANS]].T
        width = block.tokens.itemsize
        self._check("tokens", start * width, (start + length) * width)
        self._check("spans", span * 16, (span + spans) * 16)
        return block


def _header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if header["format"] != FORMAT:
            raise RecipeError(f"pack.arena: {folder}: of format {header['format']}, this corefit reads {FORMAT}")
        if header.pop("crc32") != _crc(header):
            raise ValueError("its checksum is wrong")
    except OSError as error:
        why = "no arena there" if isinstance(error, FileNotFoundError | NotADirectoryError) else system_words(error)
        raise RecipeError(f"pack.arena: {folder}: {why}; `corefit pack --out {folder}` makes one") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: torn: {error}; `corefit pack` makes it anew") from error
    return header


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say what differs between two keys, as far as a line has room."""

    def short(value: Any) -> str:  # noqa: ANN401
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else f"{text[:57]}..."

    found = []
    for name in sorted({*made, *wanted}):
        if made.get(name) != wanted.get(name):
            found.append(f"{name}: {short(made.get(name))}, now {short(wanted.get(name))}")
    return found
