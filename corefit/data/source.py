"""Sources -> records, in any order, and records -> items -> samples, with what the ledger gains from each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from corefit.data.encode import fit
from corefit.data.jsonl import content_hash
from corefit.data.ledger import Ledger, count
from corefit.errors import CorefitError, DataError, UserError
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
    Sample,
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


@dataclass(slots=True)
class Outcome:
    """What became of a record: samples, what the ledger gains, or the error that stops the run when its turn comes."""

    samples: list[Sample] = field(default_factory=list)
    gain: Ledger = field(default_factory=Ledger)
    drops: list[str] = field(default_factory=list)
    error: CorefitError | None = None


def _map(source: Source, record: Record, out: Outcome) -> list[Item]:
    function, items = source.map_function, []
    try:
        for item in function.map(record, source.map_options):
            if isinstance(item, Drop):
                out.drops.append(item.reason)
                continue
            if not isinstance(item, Conversation | Document):
                raise TypeError(f"gave a {type(item).__name__}, expected Conversation, Document or Drop")
            items.append(item)
            if isinstance(item, Conversation):
                out.gain.messages.total += len(item.messages) + len(item.dropped)
                for reason in item.dropped:
                    count(out.gain.messages.dropped, reason)
                for word in item.notes:
                    count(out.gain.messages.notes, word)
    except Exception as error:
        keys = ", ".join(map(str, record)) or "none"
        why = " ".join(f"{type(error).__name__}: {error}".split())
        where = f"{record.origin}: map function {function.name!r}"
        out.error = DataError(f"{where} failed: {why}; keys of the record: {keys}")
        out.error.__cause__ = error
        return []
    return items


def outcomes_of(
    pairs: Iterable[tuple[Source, Record | BadRecord]],
    encoder: Encoder,
    max_length: int,
    overlong: str,
    val_hashes: frozenset[int] = frozenset(),
) -> list[Outcome]:
    """Map, encode and fit records, with one call of the encoder; one outcome for each."""
    outcomes: list[Outcome] = []
    items: list[tuple[Item, str]] = []
    owners: list[Outcome] = []
    for source, record in pairs:
        outcomes.append(out := Outcome())
        out.gain.records.read = 1
        if isinstance(record, BadRecord):
            out.drops.append("bad_record")
            if source.on_bad == "error":
                out.error = DataError(f'{record}; data.on_bad="skip" counts such records and goes on')
        elif val_hashes and content_hash(record) in val_hashes:
            out.gain.records.validation = 1
        else:
            mapped = _map(source, record, out)
            items += [(item, record.origin) for item in mapped]
            owners += [out] * len(mapped)
    for out, encoded in zip(owners, encoder.encode(items) if items else [], strict=True):
        tokens = out.gain.tokens
        for word in encoded.notes:
            count(out.gain.messages.notes, word)
        if encoded.sample is None:
            out.drops.append(encoded.drop or "not_encoded")
            continue
        try:
            fitted = fit(encoded.sample, max_length, overlong)
        except UserError as error:
            out.error = out.error or error
            continue
        tokens.encoded += len(encoded.sample.input_ids)
        tokens.truncated += fitted.n_truncated_tokens
        tokens.dropped += fitted.n_dropped_tokens
        out.drops += [fitted.drop] if fitted.drop else []
        tokens.pending += sum(len(sample.input_ids) for sample in fitted.samples)
        out.samples += fitted.samples
    for out in outcomes:
        records = out.gain.records
        records.pending = int(bool(out.samples))
        if out.samples:
            for reason in out.drops:
                count(records.parts_dropped, reason)
        elif not records.validation:
            count(records.dropped, out.drops[0] if out.drops else "no_items")
    return outcomes


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


def encode_all(
    records: Iterable[tuple[Source, Record | BadRecord]],
    encoder: Encoder,
    *,
    max_length: int,
    overlong: str = "truncate",
    ledger: Ledger | None = None,
) -> list[Sample]:
    """Give the samples of all records, in order; ``ledger`` gains their tokens as validation tokens.

    Raises:
        DataError: as ``Stream.steps``.
    """
    samples: list[Sample] = []
    rest = iter(records)
    while group := list(islice(rest, GROUP_RECORDS)):
        for out in outcomes_of(group, encoder, max_length, overlong):
            if out.error is not None:
                raise out.error
            samples += out.samples
            if ledger is not None:
                ledger.tokens.encoded += out.gain.tokens.encoded
                ledger.tokens.validation += out.gain.tokens.encoded
    return samples
