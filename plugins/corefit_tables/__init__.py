"""Readers of tables: CSV and TSV by the standard library, Parquet by pyarrow (``pip install 'corefit[parquet]'``).

A record is a row, its keys the names in the header. They are chosen by the files' suffix, so ``--data rows.csv`` is
enough. CSV and TSV are read as a stream from any row on; a value may go over several lines where it is quoted. A row
with too few or too many columns, broken quotes or bytes that are not UTF-8 is a bad record, with its line. Parquet is
read batch by batch; a shuffle of it holds all rows in memory.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from corefit import BadRecord, DataError, DatasetReader, Position, Record, Sources, UserError, encoding_hint, open_file

BATCH = 1024
"""Rows of a Parquet file that are held at a time."""


@dataclass(frozen=True)
class CsvOptions:
    """Keys of ``data.options`` for ``csv`` and ``tsv``."""

    delimiter: str = ""
    """Between two values: one character; empty: a comma, in ``tsv`` a tab."""
    columns: tuple[str, ...] = ()
    """Names of the columns, where the file has no header."""

    def __post_init__(self) -> None:
        if len(self.delimiter) > 1 or self.delimiter in ('"', "\n", "\r"):
            raise UserError(f"delimiter is {self.delimiter!r}, expected one character")
        if twice := [name for name in self.columns if self.columns.count(name) > 1]:
            raise UserError(f"columns has {twice[0]!r} twice")


class _TooLong(csv.Error):
    """Where the row after this one begins can't be known."""


class _Lines:
    """The lines of a file as text, counted; bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self.file, self.limit = file, limit
        self.offset, self.line = 0, 0  # bytes and lines that were taken
        self.begun = 0  # offset of the row that is being read

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self.file.readline(self.limit - (self.offset - self.begun) + 1)
        if self.offset + len(raw) - self.begun > self.limit:
            words = f"a row of over {self.limit:,} bytes (data.max_record_mb), or a quote that is never closed"
            raise _TooLong(f"{words}; nothing of this file is read from here on")
        if not raw:
            raise StopIteration
        text = (raw if self.offset else raw.removeprefix(b"\xef\xbb\xbf")).decode("utf-8", "surrogateescape")
        self.offset, self.line = self.offset + len(raw), self.line + 1
        return text


def _is_utf8(row: list[str]) -> bool:
    return not any("\udc80" <= letter <= "\udcff" for value in row if not value.isascii() for letter in value)


def _hint(row: list[str]) -> str:
    return encoding_hint(",".join(row).encode("utf-8", "surrogateescape"))


def _header(path: Path, rows: Iterator[list[str]], lines: _Lines, delimiter: str) -> list[str]:
    """Read the first row that isn't blank: the names of the columns."""
    try:
        names = next((row for row in rows if row), None)
    except csv.Error as error:
        raise DataError(f"{path}:{max(lines.line, 1)}: the header: {error}") from error
    if names is None:
        raise DataError(f"{path}: no rows in it")
    names = [name.strip() for name in names]
    if "\0" in "".join(names) or not _is_utf8(names):
        raise DataError(f"{path}:{lines.line}: not a table in UTF-8{_hint(names)}")
    twice = next((name for name in names if names.count(name) > 1 or not name), None)
    if twice is not None:
        what = f"two columns called {twice!r}" if twice else "a column without a name"
        raise DataError(
            f"{path}:{lines.line}: the header has {what}; data.options.columns names the columns of a file without one"
        )
    if len(names) == 1 and (other := next((c for c in ",;\t|" if c != delimiter and c in names[0]), None)):
        raise DataError(
            f"{path}:{lines.line}: one column, {names[0][:60]!r}; is {other!r} between them? data.options.delimiter"
        )
    return names


def _read_csv(
    sources: Sources, options: CsvOptions | None = None, start: Position | None = None, *, delimiter: str
) -> Iterator[Record | BadRecord]:
    """Give the rows of all files in order, or from ``start`` on.

    Raises:
        DataError: a file can't be opened or unpacked, has no rows, or a header that names no columns.
    """
    options = options or CsvOptions()
    delimiter = options.delimiter or delimiter
    csv.field_size_limit(min(max(sources.max_record_bytes, csv.field_size_limit()), sys.maxsize // 2**32))
    for number in range(start.file if start else 0, len(sources.paths)):
        path = sources.paths[number]
        end = sources.states[number].size if sources.states else None
        with open_file(path, end=end) as (file, _):
            lines = _Lines(file, sources.max_record_bytes)
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            names = list(options.columns) or _header(path, rows, lines, delimiter)
            if start and number == start.file:
                file.seek(start.offset)
                lines.offset, lines.line = start.offset, start.line - 1
            yield from _rows(rows, names, lines, sources, number)


def _rows(
    rows: Iterator[list[str]], names: list[str], lines: _Lines, sources: Sources, number: int
) -> Iterator[Record | BadRecord]:
    wanted = None if sources.fields is None else set(sources.fields)
    while True:
        lines.begun, line = lines.offset, lines.line + 1
        reason, ends = "", False
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            row, reason, ends = [], str(error), isinstance(error, _TooLong)
        if not row and not reason:
            continue  # a blank line
        at: dict[str, Any] = dict(
            path=str(sources.paths[number]),
            line=line,
            offset=lines.begun,
            size=lines.offset - lines.begun,
            file=number,
        )
        if not reason and len(row) != len(names):
            reason = f"{len(row)} columns, the header has {len(names)}: {', '.join(names)}"
        if not reason and not _is_utf8(row):
            reason = f"not UTF-8{_hint(row)}"
        if reason:
            yield BadRecord(reason=reason, **at)
            if ends:
                return
        else:
            fields = dict(zip(names, row, strict=True))
            yield Record({k: v for k, v in fields.items() if wanted is None or k in wanted}, **at)


def _read_parquet(sources: Sources, options: object = None) -> Iterator[Record]:
    """Give the rows of all files in order; a record's line and offset are the row's number, from 1 and from 0.

    Raises:
        UserError: pyarrow is not installed. DataError: a file is no Parquet.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install 'corefit[parquet]'") from error
    for number, path in enumerate(sources.paths):
        try:
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                columns = [name for name in names if sources.fields is None or name in sources.fields]
                size = max(path.stat().st_size // max(file.metadata.num_rows, 1), 1)
                at = 0
                for batch in file.iter_batches(batch_size=BATCH, columns=columns):
                    rows = batch.to_pylist() if columns else [{}] * batch.num_rows
                    for row in rows:
                        fields = json.loads(json.dumps(row, default=_plain))
                        yield Record(fields, path=str(path), line=at + 1, offset=at, size=size, file=number)
                        at += 1
        except (OSError, pyarrow.ArrowException) as error:
            words = " ".join(str(error).split())[:200]
            raise DataError(f"{path}: can't be read as Parquet: {words}") from error


def _plain(value: object) -> str:
    """Stand for a value that JSON doesn't have."""
    return f"({len(value):,} bytes)" if isinstance(value, bytes) else str(value)


def corefit_dataset_readers() -> Iterator[DatasetReader]:
    """Give ``csv``, ``tsv`` and ``parquet``."""
    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        yield DatasetReader(
            name=name,
            summary=f"{name.upper()} with a header; data.options: delimiter, columns",
            read=partial(_read_csv, delimiter=delimiter),
            seekable=True,
            bounded=True,
            suffixes=(f".{name}",),
            options=CsvOptions,
            example=f"question{delimiter}answer\n1 + 1?{delimiter}2\n".encode(),
        )
    yield DatasetReader(
        name="parquet",
        summary="Parquet files, with pyarrow installed",
        read=_read_parquet,
        suffixes=(".parquet",),
        example=Path(__file__).with_name("example.parquet"),
    )
