"""Sources -> records, in any order, and records -> items -> samples, with what the ledger gains from each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corefit.data.block import (
    ENCODED,
    HASH,
    LENGTH,
    LINE,
    MESSAGES,
    NAME,
    RECORD,
    RECORD_COLUMNS,
    SOURCE,
    VALIDATION,
    WORDS,
    Block,
    Words,
    intern,
    link,
)
from corefit.data.encode import parts
from corefit.data.files import changed, file_state, is_packed
from corefit.data.jsonl import content_hash
from corefit.errors import CorefitError, DataError, PluginError, in_words, system_words
from corefit.own import line_in, own_file
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

    from corefit.data.encode import Encoded, Encoder

GROUP_RECORDS = 256
"""Records that are encoded by one call, at most."""
FETCHED, FETCHED_BYTES = 128, 2**21
"""Records of a shuffled source that are read at a time, at most, and about how many bytes."""
MIN_RECORDS_TO_SPLIT = 20
"""With fewer records nothing is set aside for validation."""
MOST = 500
"""Characters of a record, or of somebody else's exception, that an error shows."""
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
        found = read_by(self.reader, self.sources, self.reader_options, start)
        return found if start is not None else islice(found, self.first)


def read_by(
    reader: DatasetReader, sources: Sources, options: object, start: Position | None = None
) -> Iterator[Record | BadRecord]:
    """Give the records of a reader; whatever it does wrong is its mistake, by name.

    Raises:
        DataError: a file can't be read. PluginError: the reader failed, or gave what is no record.
    """
    with _at_work(reader, sources):
        for record in reader.read(sources, options) if start is None else reader.read(sources, options, start=start):
            if not isinstance(record, Record | BadRecord):
                raise TypeError(f"gave a {type(record).__name__}, expected Record or BadRecord")
            if start is not None:
                _check_place([record], [start])
                start = None
            yield record


@contextmanager
def _at_work(reader: DatasetReader, sources: Sources) -> Iterator[None]:
    try:
        yield
    except (CorefitError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a plugin doesn't end the process
        if isinstance(error, OSError) and error.filename in map(str, sources.paths):
            raise DataError(f"{error.filename}: can't be read: {system_words(error)}") from error
        raise PluginError(f"reader {reader.name!r} failed: {in_words(error)}") from error


def _check_place(found: Sequence[Record | BadRecord], positions: Sequence[Position]) -> None:
    """Refuse what a reader gives for positions where it isn't what lies there: the run would train on it for ever."""
    if len(found) != len(positions):
        raise ValueError(f"gave {len(found):,} records for {len(positions):,} positions")
    for record, (_, *place) in zip(found[:1], positions, strict=False):
        if [record.line, record.offset] != place:
            raise ValueError(f"gave line {record.line}, offset {record.offset} for line {place[0]}, offset {place[1]}")


def as_found(files: Sources) -> Sources:
    """Give the same with the states of the files, which from then on may grow and no more.

    Raises:
        DataError: a file can't be read.
    """
    if files.states or not all(path.is_file() for path in files.paths):  # a pipe has no state
        return files
    return replace(files, states=tuple(map(file_state, files.paths)))


def record_row(source: int, index: int, record: Record | BadRecord, weight: int, name: int) -> list[int]:
    """Give the columns of a record, those that are known when it is read."""
    return [source, index, record.file, record.line, record.offset, weight, 0, 0, 0, 0, 0, 0, 0, 0, name, 0]


def encode_records(
    sources: Sequence[Source],
    found: Sequence[Record | BadRecord],
    rows: list[list[int]],
    encoder: Encoder,
    *,
    names: Sequence[str],
    hashed: bool = False,
    val_hashes: frozenset[int] = frozenset(),
) -> Block:
    """Map and encode records, with one call of the encoder.

    Args:
        sources: what ``SOURCE`` in ``rows`` refers to.
        found: the records.
        rows: ``record_row`` of each; filled in here.
        encoder: the run's.
        names: what ``NAME`` refers to.
        hashed: fill ``HASH`` in, without ``val_hashes`` too.
        val_hashes: content hashes of records that belong to the validation split, which aren't mapped.

    The block ends before a record that stops the run, with the error.
    """
    words = {Words(): 0}
    items: list[tuple[Item, str]] = []
    owners: list[int] = []
    whole: list[bool] = []  # of each item: it is not one of several parts, or the last of them, which holds the others
    said: list[tuple[list[str], list[str], list[str]]] = []  # of each record: drops, messages, notes
    error: CorefitError | None = None
    for i, (row, record) in enumerate(zip(rows, found, strict=True)):
        source = sources[row[SOURCE]]
        drops: list[str] = []
        messages: list[str] = []
        notes: list[str] = []
        if isinstance(record, BadRecord):
            drops.append("bad_record")
            if source.on_bad == "error":
                error = refused(record)
                break
        elif hashed or val_hashes:
            row[HASH] = content_hash(record)
            row[VALIDATION] = row[HASH] in val_hashes
        if isinstance(record, Record) and not row[VALIDATION]:
            try:
                mapped = map_record(source, record)
            except DataError as failed:
                error = failed
                break
            for item in mapped:
                if isinstance(item, Drop):
                    drops.append(item.reason)
                    continue
                made = parts(item, encoder.supervise)
                items += [(part, record.origin) for part in made]
                owners += [i] * len(made)
                whole += [*[False] * (len(made) - 1), True]
                if isinstance(item, Conversation):
                    row[MESSAGES] += len(item.messages) + len(item.dropped)
                    messages += item.dropped
                    notes += item.notes
        said.append((drops, messages, notes))
    encoded = _encoded(items, encoder)
    for i, last, drop, noticed in zip(owners, whole, encoded.drops, encoded.notes, strict=True):
        said[i][0].extend([drop] if drop else [])
        said[i][2].extend(noticed if last else ())
    for row, about in zip(rows, said, strict=False):
        if any(about):
            row[WORDS] = intern(words, Words(*map(tuple, about)))
    table = np.array(rows[: len(said)], np.int64).reshape(-1, RECORD_COLUMNS)
    samples = encoded.samples
    samples[:, RECORD] = np.array(owners, np.int64)[samples[:, RECORD]]
    table[:, ENCODED] = np.bincount(samples[:, RECORD], samples[:, LENGTH], minlength=len(said))
    link(table, samples)
    return Block(table, samples, encoded.tokens, encoded.spans, encoded.cuts, list(words), names, error)


def _encoded(items: Sequence[tuple[Item, str]], encoder: Encoder) -> Encoded:
    try:
        return encoder.encode(items)
    except (CorefitError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the tokenizer's panics are no Exceptions
        where = f"{items[0][1]} to {items[-1][1]}"
        raise DataError(f"{where}: tokenising failed: {in_words(error)}") from error


def refused(record: BadRecord) -> DataError:
    """Give the error for a bad record where such a record ends the run."""
    return DataError(f'{record}; data.on_bad="skip" counts such records and goes on')


def map_record(source: Source, record: Record) -> list[Item | Drop]:
    """Give what the map function makes of a record.

    Raises:
        DataError: it failed, or gave something that is no item.
    """
    function = source.map_function
    try:
        items = list(function.map(record, source.map_options))
        for item in items:
            if not isinstance(item, Conversation | Document | Drop):
                raise TypeError(f"gave a {type(item).__name__}, expected Conversation, Document or Drop")
            if isinstance(item, Conversation):
                for message in item.messages:
                    if message.supervised is not None and not isinstance(message.supervised, bool):
                        raise TypeError(f"gave supervised={message.supervised!r}, expected True, False or None")
            for text in _texts(item):
                if not isinstance(text, str):
                    raise TypeError(f"gave a {type(item).__name__} with a {type(text).__name__} where text is expected")
        return items
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever it does, a plugin doesn't end the process
        keys, where = (", ".join(map(str, record)) or "none"), f"{record.origin}: map function {function.name!r}"
        what = "keys of the record" if source.sources.fields is None else "of the fields it declares the record has"
        place = line_in(str(own_file(function.name)), error)
        at = f" (line {place})" if place else ""
        raise DataError(f"{where} failed: {in_words(error)}{at}; {what}: {keys[:MOST]}") from error


def _texts(item: Item | Drop) -> list[str]:
    if isinstance(item, Conversation):
        texts = [text for message in item.messages for text in (message.role, message.content)]
        return [*texts, *item.dropped, *item.notes]
    return [item.reason if isinstance(item, Drop) else item.text]


def items_of(records: Iterable[tuple[Source, Record | BadRecord]], supervise: str) -> list[tuple[Item, str]]:
    """Give what is encoded of records, each item with its origin; bad records and drops give none.

    Raises:
        DataError: a map function failed.
    """
    pairs = [(source, record) for source, record in records if isinstance(record, Record)]
    return [
        (part, record.origin)
        for source, record in pairs
        for item in map_record(source, record)
        if not isinstance(item, Drop)
        for part in parts(item, supervise)
    ]


def encode_items(items: Sequence[tuple[Item, str]], encoder: Encoder) -> tuple[Block, list[str | None]]:
    """Give the samples of items, each a record of its own, and for each item why it has none."""
    made = _encoded(items, encoder)
    rows = np.zeros((len(items), RECORD_COLUMNS), np.int64)
    rows[:, NAME] = np.arange(len(items))
    rows[:, LINE] = [int(origin.rpartition(":")[2]) for _, origin in items]
    names = [origin.rpartition(":")[0] for _, origin in items]
    return Block(rows, made.samples, made.tokens, made.spans, made.cuts, names=names), made.drops


ROUNDS = 4
"""Of the permutation. Source: Luby and Rackoff 1988, "How to construct pseudorandom permutations"."""
ORDERED = 2**14
"""Places of a shuffle that are computed at a time: few at a time cost far more each."""


def permutation(n: int, *keys: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
    """Give places ``start`` to ``stop`` (None: n) of 0 .. n-1 in an order that depends on n and the keys alone.

    Needs no memory for the rest: a Feistel network permutes the numbers of an even number of bits, and is walked on
    from those that are not below n. Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains"; the round
    function is splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
    """

    def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = mix((state ^ np.uint64(key % 2**64)) + golden)
    rounds = mix(state + np.arange(1, ROUNDS + 1, dtype=np.uint64) * golden)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)

    def walk(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> shift, x & mask
        for key in rounds:
            left, right = right, left ^ (mix((right + golden) ^ key) & mask)
        return (left << shift) | right

    places = walk(np.arange(start, n if stop is None else stop, dtype=np.uint64))
    while (outside := np.flatnonzero(places >= np.uint64(n))).size:
        places[outside] = walk(places[outside])
    return places.astype(np.int64)


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

    def plus(self, records: int, weight: int, position: Position | None = None) -> At:
        """Give where it is after so many more records of this pass."""
        return At(self.passes, self.taken + records, self.records + records, self.weight + weight, position)


class Size(NamedTuple):
    """What is known of a source before it is read."""

    total: int
    """About how many bytes one pass reads; records where the reader says no sizes."""
    weighed: bool
    """The reader says sizes, of records that are in files."""
    known: bool
    """``total`` is good enough to say how long a run will be."""
    records: int | None
    """How many there are; None: not counted yet."""


class Input:
    """A source with what the run needs to know to read it in any order and to say how far it is."""

    def __init__(self, number: int, source: Source, seed: int, notices: list[str], size: Size | None = None) -> None:
        """``size``: of a source whose records are encoded already; None: look at the files."""
        self.number, self.seed, self.notices = number, seed, notices
        self.source = replace(source, sources=as_found(source.sources))
        self._seen = [(state.size, state.mtime_ns) for state in self.source.sources.states]
        self.table: NDArray[np.int64] | None = None  # [N, 3 or 4]: positions, for a shuffle
        self.kept: list[Record | BadRecord] | None = None
        self._ordered: tuple[int, int, NDArray[np.int64]] | None = None  # pass, first place, what comes there
        with self.reading():
            self.size = size or self._measure()

    def check(self) -> None:
        """Look at the files: rows may have been added, which this run doesn't read.

        Raises:
            DataError: a file was edited, cut off, replaced or removed. Not noticed: an edit in the middle that leaves
                size and time of change as they were, or that comes together with added rows.
        """
        files = self.source.sources
        states = files.states if self.kept is None else ()  # what is in memory may change on disk
        for i, (path, was) in enumerate(zip(files.paths, states, strict=False)):
            try:
                found = path.stat()
            except OSError:
                raise changed(path, was.size, None) from None
            now = found.st_size, found.st_mtime_ns
            if now == self._seen[i]:
                continue
            grown = self.source.reader.bounded and found.st_size > was.size
            if not grown or file_state(path, was.size).ends != was.ends:
                raise changed(path, was.size, found.st_size)
            if self._seen[i][0] == was.size:
                more = f"{was.size:,} -> {found.st_size:,} bytes"
                self.notices.append(f"{path}: grew while the run was reading it ({more}); what was added is not read")
            self._seen[i] = now

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Where reading fails because a file isn't as it was, say that."""
        try:
            yield
        except Exception:
            self.check()
            raise

    def _measure(self) -> Size:
        source, reader, files = self.source, self.source.reader, self.source.sources
        began = time.monotonic()
        head = list(islice(source.read(), ESTIMATE_RECORDS if source.first else 1))
        weighed = bool(files.states and head) and all(record.size for record in head)
        total = sum(state.size for state in files.states)
        if source.first and head:
            total = min(total, source.first * sum(record.size for record in head) // len(head))
        kept: list[Record | BadRecord] | None = None
        known = not any(is_packed(path) for path in files.paths)
        if source.shuffle and reader.seekable and reader.index is not None:
            with _at_work(reader, source.sources):
                self.table = reader.index(source.sources, source.reader_options)[: source.first].reshape(-1, 3)
        elif source.shuffle or not weighed:
            if source.shuffle and not reader.seekable:
                kept = list(source.read())
            rows = [(r.file, r.line, r.offset, r.size) for r in kept or source.read()]
            self.table = np.array(rows, dtype=np.int64).reshape(-1, 4)
            total, known = total if known and weighed else int(self.table[:, 3].sum()), True
        n = None if self.table is None else len(self.table)
        self.check()
        self.kept = kept
        if kept is not None:
            self.notices.append(f"reader {reader.name} can't seek: {n:,} records held in memory")
        elif source.shuffle:
            self.notices.append(f"shuffle: indexed {n:,} records in {time.monotonic() - began:.2f} s")
        return Size(total if weighed else n or 0, weighed, known, n)

    def weight(self, record: Record | BadRecord) -> int:
        """Bytes of the record; 1 where the reader says no sizes."""
        return max(1, record.size) if self.size.weighed else 1

    def share(self, records: Any, weight: Any, by_ratio: bool) -> Any:  # noqa: ANN401, numbers or arrays of them
        """How far it is after so many records and bytes, relative to how far the others should be."""
        if by_ratio:
            return records / (self.source.ratio or 1.0)
        return weight / max(1, self.size.total * self.source.repeat)

    @property
    def ordered_by(self) -> list[int] | None:
        """What ``order`` depends on: seed, passes an epoch, number of records; None: it is that of the files."""
        return [self.seed, self.source.repeat, self.size.records or 0] if self.source.shuffle else None

    def order(self, number: int, start: int, stop: int) -> NDArray[np.int64]:
        """Give which records, by index in file order, come at places ``start`` to ``stop`` of a pass."""
        if not self.source.shuffle or self.size.records is None:
            return np.arange(start, stop)
        base, n = start - start % ORDERED, self.size.records
        if self._ordered is None or self._ordered[:2] != (number, base):
            keys = (self.seed, self.number, number)
            self._ordered = number, base, permutation(n, *keys, start=base, stop=min(base + ORDERED, n))
        here = self._ordered[2][start - base : stop - base]
        return here if stop <= base + ORDERED else np.concatenate([here, self.order(number, base + ORDERED, stop)])

    def read(self, number: int, at: At) -> Iterator[tuple[int, Record | BadRecord]]:
        """Give what is left of a pass: records with their index in file order."""
        if self.source.shuffle and self.table is not None:
            mean = self.size.total // max(1, len(self.table)) if self.size.weighed else 1
            at_once = max(1, min(FETCHED, FETCHED_BYTES // max(1, mean)))
            for start in range(at.taken, len(self.table), at_once):
                indices = self.order(number, start, min(start + at_once, len(self.table)))
                positions = [Position(*row) for row in self.table[indices, :3].tolist()]
                yield from zip(indices.tolist(), self.fetch(indices.tolist(), positions), strict=True)
        elif at.position is not None and self.source.reader.seekable:
            left = None if self.source.first is None else self.source.first - at.taken + 1
            yield from enumerate(islice(self.source.read(at.position), 1, left), at.taken)
        else:
            yield from enumerate(islice(self.source.read(), at.taken, None), at.taken)

    def fetch(self, indices: Sequence[int], positions: Sequence[Position]) -> list[Record | BadRecord]:
        """Give records by index in file order and position."""
        source, reader = self.source, self.source.reader
        if self.kept is not None:
            return [self.kept[index] for index in indices]
        if reader.fetch is not None:
            with _at_work(reader, source.sources):
                fetched = reader.fetch(source.sources, source.reader_options, positions)
                _check_place(fetched, positions)
                return fetched
        if reader.seekable:
            return [self._one(position) for position in positions]
        wanted = set(indices)
        found = {i: r for i, r in enumerate(islice(source.read(), max(indices, default=-1) + 1)) if i in wanted}
        return [found[index] for index in indices if index in found]

    def _one(self, position: Position) -> Record | BadRecord:
        for record in self.source.read(position):
            return record
        raise DataError(f"{self.source.sources.paths[position.file]}: became shorter while it was read")


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
        if hashed + 2**63 < share * 2**64 and len(chosen) < records:
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
