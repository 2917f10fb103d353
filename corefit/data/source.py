"""Sources -> records, in any order, and records -> items -> samples, with what the ledger gains from each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from corefit.data.block import (
    ENCODED,
    LENGTH,
    MESSAGES,
    NAME,
    RECORD,
    RECORD_COLUMNS,
    SOURCE,
    VALIDATION,
    WEIGHT,
    WORDS,
    Block,
    Words,
    fit,
    intern,
)
from corefit.data.jsonl import content_hash
from corefit.errors import CorefitError, DataError
from corefit.types import (
    BadRecord,
    Conversation,
    DatasetReader,
    Document,
    Drop,
    Item,
    MapFunction,
    Position,
    Record,
    Sources,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from corefit.data.encode import Encoder

GROUP_RECORDS = 32
"""Records that are encoded by one call, at most."""
MIN_RECORDS_TO_SPLIT = 20
"""With fewer records nothing is set aside for validation."""
ESTIMATE_RECORDS = 200
"""Records from which sizes are estimated."""


@dataclass(frozen=True, slots=True)
class Source:
    """One ``[[data]]`` entry, resolved. An epoch reads it ``repeat`` times; ``first``: only so many of its records."""

    reader: DatasetReader
    map_function: MapFunction
    sources: Sources
    reader_options: object = None
    map_options: object = None
    shuffle: bool = True
    ratio: float | None = None
    repeat: int = 1
    first: int | None = None
    on_bad: str = "error"

    def read(self, start: Position | None = None) -> Iterator[Record | BadRecord]:
        """Give all records in file order; from ``start`` on where the reader can seek."""
        if start is not None:
            return self.reader.read(self.sources, self.reader_options, start=start)
        return islice(self.reader.read(self.sources, self.reader_options), self.first)


def record_row(source: int, index: int, record: Record | BadRecord, weight: int, name: int) -> list[int]:
    """Give the columns of a record that are known when it is read."""
    row = [0] * RECORD_COLUMNS
    row[: WEIGHT + 1] = source, index, record.file, record.line, record.offset, weight
    row[NAME] = name
    return row


def encode_records(
    sources: Sequence[Source],
    found: Sequence[Record | BadRecord],
    rows: Sequence[Sequence[int]],
    encoder: Encoder,
    *,
    max_length: int,
    overlong: str,
    names: Sequence[str],
    val_hashes: frozenset[int] = frozenset(),
) -> Block:
    """Map, encode and fit records, with one call of the encoder.

    Args:
        sources: what ``SOURCE`` in ``rows`` refers to.
        found: the records.
        rows: ``record_row`` of each.
        encoder: the run's.
        max_length: tokens of a sample, at most.
        overlong: policy for longer ones.
        names: what ``NAME`` refers to.
        val_hashes: content hashes of records that belong to the validation split.

    The block ends before a record that stops the run, with the error.
    """
    table = np.array(rows, np.int64).reshape(-1, RECORD_COLUMNS)
    words = [Words()]
    drops, messages, notes = ([list[str]() for _ in found] for _ in range(3))
    items: list[tuple[Item, str]] = []
    owners: list[int] = []
    error: CorefitError | None = None
    for i, record in enumerate(found):
        source = sources[rows[i][SOURCE]]
        if isinstance(record, BadRecord):
            drops[i].append("bad_record")
            if source.on_bad == "error":
                error = DataError(f'{record}; data.on_bad="skip" counts such records and goes on')
        elif val_hashes and content_hash(record) in val_hashes:
            table[i, VALIDATION] = 1
        else:
            mapped: list[Item | Drop] = []
            error = _map(source, record, mapped)
            for item in mapped:
                if isinstance(item, Drop):
                    drops[i].append(item.reason)
                    continue
                items.append((item, record.origin))
                owners.append(i)
                if isinstance(item, Conversation):
                    table[i, MESSAGES] += len(item.messages) + len(item.dropped)
                    messages[i] += item.dropped
                    notes[i] += item.notes
        if error is not None:
            table = table[:i]
            break
    encoded = encoder.encode(items)
    owner = np.array(owners, np.int64)
    for i, drop, noticed in zip(owners, encoded.drops, encoded.notes, strict=True):
        drops[i] += [drop] if drop else []
        notes[i] += noticed
    for i in range(len(table)):
        if drops[i] or messages[i] or notes[i]:
            table[i, WORDS] = intern(words, Words(tuple(drops[i]), tuple(messages[i]), tuple(notes[i])))
    samples = encoded.samples
    samples[:, RECORD] = owner[samples[:, RECORD]]
    samples = samples[samples[:, RECORD] < len(table)]
    np.add.at(table[:, ENCODED], samples[:, RECORD], samples[:, LENGTH])
    block = Block(table, samples, encoded.tokens, encoded.spans, encoded.cuts, words, names, error)
    return fit(block, max_length, overlong)


def _map(source: Source, record: Record, items: list[Item | Drop]) -> DataError | None:
    """Add what the map function makes of a record; give the error that stops the run where it fails."""
    function = source.map_function
    try:
        for item in function.map(record, source.map_options):
            if not isinstance(item, Conversation | Document | Drop):
                raise TypeError(f"gave a {type(item).__name__}, expected Conversation, Document or Drop")
            items.append(item)
    except Exception as error:
        keys = ", ".join(map(str, record)) or "none"
        why = " ".join(f"{type(error).__name__}: {error}".split())
        where = f"{record.origin}: map function {function.name!r}"
        failure = DataError(f"{where} failed: {why}; keys of the record: {keys}")
        failure.__cause__ = error
        return failure
    return None


def permutation(n: int, *keys: int) -> NDArray[np.int64]:
    """Give 0 .. n-1 in an order that depends on the keys alone.

    Source: splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), counter-based.
    """

    def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = mix((state ^ np.uint64(key % 2**64)) + golden)
    return np.argsort(mix(state + np.arange(1, n + 1, dtype=np.uint64) * golden), kind="stable")


class At(NamedTuple):
    """How far one source is in the running epoch."""

    passes: int = 0
    """Passes done."""
    taken: int = 0
    """Records taken in this pass."""
    records: int = 0
    """Records taken in this epoch."""
    weight: int = 0
    """Their bytes."""
    position: Position | None = None
    """Of the last record taken, where the source is read in file order."""


class Input:
    """A source with what the run needs to know to read it in any order and to say how far it is."""

    def __init__(self, number: int, source: Source, seed: int, notices: list[str]) -> None:
        self.number, self.source, self.seed = number, source, seed
        self.table: NDArray[np.int64] | None = None  # [N, 3]: positions, for a shuffle
        self.kept: list[Record | BadRecord] | None = None
        began, reader, paths = time.monotonic(), source.reader, source.sources.paths
        head = list(islice(source.read(), ESTIMATE_RECORDS if source.first else 1))
        self.weighed = bool(head) and all(record.size for record in head)
        size = sum(path.stat().st_size for path in paths)
        self.known = not any(path.suffix == ".gz" for path in paths)
        if source.shuffle and reader.seekable and reader.index is not None:
            whole = reader.index(source.sources, source.reader_options)
            self.table = whole[: source.first]
            size = size * len(self.table) // max(1, len(whole))
        elif source.shuffle or not self.weighed:
            if source.shuffle and not reader.seekable:
                self.kept = list(source.read())
            rows = [(r.file, r.line, r.offset, r.size) for r in self.kept or source.read()]
            self.table = np.array(rows, dtype=np.int64).reshape(-1, 4)
            size, self.known = int(self.table[:, 3].sum()), True
        elif source.first and head:
            size = min(size, source.first * sum(record.size for record in head) // len(head))
        self.n = None if self.table is None else len(self.table)
        self.total = size if self.weighed else self.n or 0
        if self.kept is not None:
            notices.append(f"reader {reader.name} can't seek: {self.n:,} records held in memory")
        elif source.shuffle:
            notices.append(f"shuffle: indexed {self.n:,} records in {time.monotonic() - began:.2f} s")

    def weight(self, record: Record | BadRecord) -> int:
        """Bytes of the record; 1 where the reader says no sizes."""
        return max(1, record.size) if self.weighed else 1

    def share(self, at: At, by_ratio: bool) -> float:
        """How far it is, relative to how far the others should be."""
        if by_ratio:
            return at.records / (self.source.ratio or 1.0)
        return at.weight / max(1, self.total * self.source.repeat)

    def read(self, number: int, at: At) -> Iterator[tuple[int, Record | BadRecord]]:
        """Give what is left of a pass: records with their index in file order."""
        if self.source.shuffle and self.table is not None:
            for index in permutation(len(self.table), self.seed, self.number, number)[at.taken :].tolist():
                yield index, self.one(index, Position(*self.table[index, :3].tolist()))
        elif at.position is not None and self.source.reader.seekable:
            left = None if self.source.first is None else self.source.first - at.taken + 1
            yield from enumerate(islice(self.source.read(at.position), 1, left), at.taken)
        else:
            yield from enumerate(islice(self.source.read(), at.taken, None), at.taken)

    def one(self, index: int, position: Position) -> Record | BadRecord:
        """Give one record of a source that is held or can seek."""
        if self.kept is not None:
            return self.kept[index]
        for record in self.source.read(position):
            return record
        raise DataError(f"{self.source.sources.paths[position.file]}: became shorter while it was read")

    def fetch(self, wanted: list[tuple[int, Position]]) -> list[Record | BadRecord]:
        """Give records again, by index in file order and position."""
        if self.source.reader.seekable:
            return [self.one(index, position) for index, position in wanted]
        indices = {index for index, _ in wanted}
        records = self.source.read() if self.kept is None else self.kept
        found = {i: r for i, r in enumerate(islice(records, max(indices, default=-1) + 1)) if i in indices}
        return [found[index] for index, _ in wanted if index in found]


class Split(NamedTuple):
    """Records set aside for validation."""

    hashes: frozenset[int]
    records: list[tuple[Source, Record]]
    """In file order, each content once."""
    reason: str | None
    """Why validation is off though it was asked for."""


def split_validation(sources: Sequence[Source], *, share: float, records: int) -> Split:
    """Choose the records to validate on: those whose content hash is among the lowest ``share``, at most ``records``.

    They are the first such records in file order. Every record with the same content as one of them belongs to the
    validation split too, so nothing is on both sides. Reads no further than it must.
    """
    if not share or not records:
        return Split(frozenset(), [], None)
    chosen: dict[int, tuple[Source, Record]] = {}
    n_read = n_train = 0
    for source, record in ((one, record) for one in sources for record in one.read()):
        if isinstance(record, BadRecord):
            continue
        hashed = content_hash(record)
        n_read += 1
        if hashed < share * 2**64 and len(chosen) < records:
            chosen.setdefault(hashed, (source, record))
        n_train += hashed not in chosen
        if len(chosen) >= records and n_train and n_read >= MIN_RECORDS_TO_SPLIT:
            break
    reason = None
    if n_read < MIN_RECORDS_TO_SPLIT:
        reason = f"only {n_read} records, {MIN_RECORDS_TO_SPLIT} are needed to set some aside"
    elif not chosen:
        reason = f"val.share = {share:g} chose none of {n_read:,} records"
    elif not n_train:
        reason = f"val.share = {share:g} chose all of {n_read:,} records"
    return Split(frozenset(), [], reason) if reason else Split(frozenset(chosen), list(chosen.values()), None)
