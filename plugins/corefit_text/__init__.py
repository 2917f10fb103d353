"""Plain text: a reader of text files, and a template without markers.

A file is a document, or what lies between two separator lines of it. The reader is chosen by the suffix, ``pretrain``
recognises its records, and the template is chosen where the data is plain text and the tokenizer has no chat template:
``corefit train --data 'books/*.txt' --model base`` is enough. A file is read as a stream; what is longer than
``data.max_record_mb``, or not UTF-8, is a bad record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from corefit import (
    BadRecord,
    DatasetReader,
    Position,
    PromptTemplate,
    Record,
    Sources,
    UserError,
    encoding_hint,
    open_file,
)


@dataclass(frozen=True)
class TextOptions:
    """Keys of ``data.options`` for ``text``."""

    separator: str = ""
    """A line that stands between two documents, without the white space around it; empty: a file is one document."""

    def __post_init__(self) -> None:
        if self.separator != self.separator.strip() or "\n" in self.separator:
            raise UserError(f"separator is {self.separator!r}, expected a line without spaces around it")


def read(
    sources: Sources, options: TextOptions | None = None, start: Position | None = None
) -> Iterator[Record | BadRecord]:
    """Give the documents of all files in order, or from ``start`` on; blank ones are left out.

    Raises:
        DataError: a file can't be opened or unpacked.
    """
    separator = (options or TextOptions()).separator.encode()
    for number in range(start.file if start else 0, len(sources.paths)):
        path = sources.paths[number]
        end = sources.states[number].size if sources.states else None
        begin, line = (start.offset, start.line) if start and number == start.file else (0, 1)
        with open_file(path, end=end) as (file, _):
            file.seek(begin)
            yield from _documents(file, path, number, begin, line, separator, sources.max_record_bytes)


def _documents(
    file: IO[bytes], path: Path, number: int, begin: int, line: int, separator: bytes, limit: int
) -> Iterator[Record | BadRecord]:
    at, raw = begin, b"more"
    while raw:
        parts, held, begun, first = list[bytes](), 0, at, line
        while raw := file.readline(limit + 1):
            at, line = at + len(raw), line + raw.endswith(b"\n")
            if separator and raw.strip() == separator:
                break
            held += len(raw)
            if held <= limit:
                parts.append(raw)
        place: dict[str, Any] = dict(path=str(path), line=first, offset=begun, size=at - begun, file=number)
        try:
            text = b"".join(parts).removeprefix(b"" if begun else b"\xef\xbb\xbf").decode()
        except UnicodeDecodeError as error:
            if held <= limit:
                yield BadRecord(reason=f"not UTF-8: {error.reason}{encoding_hint(b''.join(parts))}", **place)
                continue
        if held > limit:
            yield BadRecord(reason=f"a document of {held:,} bytes, data.max_record_mb allows {limit:,}", **place)
        elif text.strip():
            yield Record({"text": text}, **place)


def corefit_dataset_readers() -> Iterator[DatasetReader]:
    """Give ``text``."""
    yield DatasetReader(
        name="text",
        summary="plain text, a file a document; data.options: separator",
        read=read,
        seekable=True,
        bounded=True,
        suffixes=(".txt",),
        options=TextOptions,
        example=b"A text to learn.\n",
    )


def corefit_prompt_templates() -> Iterator[PromptTemplate]:
    """Give ``text``."""
    yield PromptTemplate.from_strings(
        name="text",
        summary="no markers: a question is a beginning, its answer goes on from there; BOS first, EOS at the end",
        user="{content}",
        separator="\n",
        bos="first",
        need_bos=False,
        eos=True,
    )
