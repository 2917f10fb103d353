"""The stations joined: sources -> records -> blocks of samples -> packs -> batches, lazily, resumable at every batch.

Nothing is tokenised beyond the samples held and the few groups that the tokenising threads work on: records are read,
mapped and encoded at most 256 at a time. Batches are a pure function of the sources and the settings: neither the
number of threads nor that of ranks changes what is in a pack.
"""

from __future__ import annotations

import copy
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corefit.data.block import (
    ENCODED,
    FILE,
    INDEX,
    LENGTH,
    LINE,
    NAME,
    OFFSET,
    ORDINAL,
    RECORD,
    RECORD_COLUMNS,
    SAMPLE_COLUMNS,
    SAMPLES,
    SOURCE,
    START,
    STOP,
    SUPERVISED,
    WEIGHT,
    Block,
    fit,
    gains,
    hold_out,
    join,
    select,
)
from corefit.data.ledger import Ledger, Slots
from corefit.data.pack import Plan, Streamed, best_fit_decreasing, stream
from corefit.data.rows import Rows, Window, gather, padded, stack
from corefit.data.source import (
    ESTIMATE_RECORDS,
    GROUP_RECORDS,
    At,
    Input,
    Size,
    Source,
    Split,
    encode_records,
    record_row,
    split_validation,
)
from corefit.errors import CheckpointError, DataError, RecipeError
from corefit.types import BadRecord, Batch, Position, Record

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from corefit.data.arena import Arena
    from corefit.data.block import Table
    from corefit.data.encode import Encoder

__all__ = ["Estimate", "Source", "Split", "Stream", "encode_validation", "packs_at_once", "split_validation"]

GROUP_BYTES = 2**20
"""A group of records is encoded as soon as it has so many bytes, however few records these are."""
PLAYED, PLAYED_PASSES = 50_000, 1_000
"""Records, and passes over sources, that are played through to count the packs of a small set; 3 s at most."""
GROUPS_AHEAD = 2
"""Groups that each tokenising thread may be ahead of the training step, beside those that a step takes."""
CHANGED = (
    "the data, their order or what makes samples of them changed since the checkpoint was written, or a map function "
    "doesn't give the same twice"
)
KNOWN_RECORDS = 8192
"""Records of each source that are taken at a time where they are encoded already; fewer at the start."""


def packs_at_once(packs_per_step: int, micro_batch: int, world: int) -> int:
    """Give how many packs all ranks take in at the same time.

    Raises:
        RecipeError: packs_per_step is no multiple of it.
    """
    at_once = micro_batch * world
    if at_once < 1 or packs_per_step < 1 or packs_per_step % at_once:
        more = max(-(-packs_per_step // max(at_once, 1)), 1) * at_once
        raise RecipeError(
            f"train.packs_per_step: {packs_per_step} is not a multiple of "
            f"train.micro_batch {micro_batch} x {world} ranks; --set train.packs_per_step={more} is"
        )
    return at_once


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the run will read: of one epoch, but for ``total_packs`` (all epochs; None without a limit)."""

    records: int
    packs: int
    total_packs: int | None
    exact: bool
    """True: everything was counted. False: extrapolated from the first records and the sizes of the files."""

    def steps(self, packs_per_step: int) -> int | None:
        """Optimizer steps of the whole run."""
        return None if self.total_packs is None else -(-self.total_packs // packs_per_step)


class _Cursor(NamedTuple):
    """Between two records."""

    epoch: int
    epoch_weight: int | None
    """Bytes of the records of one epoch, once one has been read to its end."""
    sources: tuple[At, ...]


class _Group(NamedTuple):
    """Records that are encoded together; none at the end of an epoch and of the data."""

    begin: _Cursor
    rows: list[list[int]]
    records: list[Record | BadRecord]
    flush: bool = False


class _Known(NamedTuple):
    """All records of all sources, encoded already, as an ``Arena`` holds them."""

    block: Block

    def take(self, rows: Table) -> Block:
        return select(self.block, rows)

    def check(self) -> None:
        """Nothing changes it."""


@dataclass(slots=True, eq=False)
class _Taken:
    """A block and the packs that closed while its samples were taken in; everything that a state is made from."""

    begin: _Cursor
    base: Ledger
    """Before the block."""
    block: Block
    records: Table
    """Those held from before, then the block's."""
    rows: Table
    """Samples held from before, then the block's; ``RECORD`` refers to ``records``."""
    window: tuple[NDArray[Any], Table]
    """Tokens and spans that ``rows`` refer to."""
    closed: Streamed
    """Packs of ``rows``."""
    packed: Table
    """``rows`` in the order of the packs."""
    sums: NDArray[np.int64]
    """int64 [packs + 1, 3]: tokens, supervised tokens and records used up in the packs before each, and in all."""
    counts: NDArray[np.int64]
    """Samples of each pack."""
    tokens: list[int]
    """Of each pack."""
    supervised: list[int]
    """Of each pack."""
    n_read: NDArray[np.int64]
    """Records of the block read when each pack closed."""
    read: NDArray[np.int64]
    """Bytes of the whole run read before each record of the block, and after the last."""
    epochs: NDArray[np.float64]
    end: tuple[Ledger, _Cursor, int] | None = None
    """What holds after the last pack where no record after it has a sample: ledger, cursor, bytes read."""

    def pack(self, k: int) -> Table:
        """Give the rows of the samples of one pack."""
        return self.packed[self.closed.offsets[k] : self.closed.offsets[k + 1]]

    def origins(self, k: int) -> list[str]:
        """Give ``path:line`` of its samples."""
        found = self.records[self.pack(k)[:, RECORD]]
        return [f"{self.block.names[name]}:{line}" for name, line in found[:, [NAME, LINE]].tolist()]

    def ledger(self, packs: int, n_read: int) -> Ledger:
        """Give the counts once so many packs are out and so many records of the block read; waits and slots aside."""
        tokens, supervised, used = self.sums[packs].tolist()
        ledger = self.base.copy()
        ledger.add(gains(self.block, n_read))
        ledger.tokens.supervised += supervised
        ledger.tokens.masked += tokens - supervised
        ledger.records.used += used
        return ledger

    def state(self, k: int, slots: Sequence[int], shuffled: Sequence[bool]) -> dict[str, Any]:
        """Give all that is needed to go on after a pack: positions of records, never tokens."""
        waits = np.arange(len(self.rows)) < self.closed.seen[k]
        waits[self.closed.order[: self.closed.offsets[k + 1]]] = False
        held = self.rows[waits]
        ledger = self.ledger(k + 1, int(self.n_read[k]))
        # counted anew from what really waits: a sample lost on the way makes the ledger unbalanced
        ledger.records.pending, ledger.tokens.pending = len(np.unique(held[:, RECORD])), int(held[:, LENGTH].sum())
        ledger.slots = Slots(*slots)
        cursor = _advance(self.begin, self.block.records[: self.n_read[k]], shuffled)
        read = int(self.read[self.n_read[k]])
        if self.end is not None and k == len(self.tokens) - 1:
            at_end, cursor, read = self.end
            ledger.records, ledger.tokens, ledger.messages = at_end.records, at_end.tokens, at_end.messages
        records = self.records[:, [SOURCE, INDEX, FILE, LINE, OFFSET, WEIGHT]].tolist()
        by_record = groupby(held[:, [RECORD, ORDINAL]].tolist(), key=lambda pair: pair[0])
        return {
            "cursor": [cursor.epoch, cursor.epoch_weight, [list(at) for at in cursor.sources]],
            "held": [[*records[record], [ordinal for _, ordinal in pairs]] for record, pairs in by_record],
            "samples": _checksum(held, self.window[0]),
            "read": read,
            "epoch": float(self.epochs[k]),
            "ledger": ledger.as_dict(),
        }


def _advance(cursor: _Cursor, rows: Table, shuffled: Sequence[bool]) -> _Cursor:
    """Give where the sources are after these records."""
    places = list(cursor.sources)
    for number in set(rows[:, SOURCE].tolist()):
        mine, at = rows[rows[:, SOURCE] == number], places[number]
        position = None if shuffled[number] else Position(*mine[-1, [FILE, LINE, OFFSET]].tolist())
        n, weight = len(mine), int(mine[:, WEIGHT].sum())
        places[number] = at.plus(n, weight, position)
    return cursor._replace(sources=tuple(places))


def _checksum(samples: Table, tokens: NDArray[Any]) -> int:
    """Give a checksum of samples: their tokens, and how many of them are learnt."""
    checksum = zlib.crc32(samples[:, [LENGTH, STOP, SUPERVISED]].tobytes())
    for start, length in samples[:, [START, LENGTH]].tolist():  # an arena's tokens may have 16 bits
        checksum = zlib.crc32(tokens[start : start + length].astype(np.int32).tobytes(), checksum)
    return checksum


class Stream:
    """Batches for one rank.

    ``epochs``: 0 is no limit. ``held``: samples that the packer may hold. ``val_hashes``: content hashes of records
    that belong to the validation split. ``threads``: of tokenising; 0: in the caller's. ``arena``: the samples of
    these sources, encoded ahead of time: nothing is read, and the batches are the same (only of ``.gz`` files the
    arena knows the unpacked size, by which sources mix and epochs are counted). ``notices`` are lines for the user.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        *,
        max_length: int,
        algorithm: str = "first_fit_decreasing",
        held: int = 256,
        overlong: str = "truncate",
        seed: int = 0,
        epochs: int = 1,
        val_hashes: frozenset[int] = frozenset(),
        pad_id: int = 0,
        world: int = 1,
        rank: int = 0,
        threads: int = 0,
        arena: Arena | None = None,
    ) -> None:
        """Index or hold the records of shuffled sources; read nothing else yet."""
        self.encoder, self.max_length, self.overlong = encoder, max_length, overlong
        self.algorithm, self.held, self.epochs = algorithm, held, epochs
        self.val_hashes, self.pad_id = val_hashes, pad_id
        self.world, self.rank, self.threads = world, rank, threads
        self.notices: list[str] = []
        sizes = [None] * len(sources) if arena is None else arena.sizes
        pairs = enumerate(zip(sources, sizes, strict=True))
        self._inputs = [Input(i, source, seed, self.notices, size) for i, (source, size) in pairs]
        self._shuffled = [source.shuffle for source in sources]
        self._by_ratio = any(source.ratio is not None for source in sources)
        self._names: dict[str, int] = {}
        self._known: Arena | _Known | None = arena
        self._groups_a_step = 0
        self.digest = 0
        """Of all that the step given last holds on all ranks, where there are several; 0 after the last step."""
        self._reset()

    def _reset(self) -> None:
        self.ledger = Ledger()  # of the blocks taken in
        self._window = Window(None if self._known is None else self._known.block)
        self._rows = np.empty((0, SAMPLE_COLUMNS), np.int64)  # the samples held
        self._records = np.empty((0, RECORD_COLUMNS), np.int64)  # theirs
        self._cursor = _Cursor(0, None, (At(),) * len(self._inputs))
        self._read = 0  # bytes
        self._epoch = 0.0

    @property
    def sizes(self) -> list[Size]:
        """What is known of each source."""
        return [one.size for one in self._inputs]

    @property
    def total_bytes(self) -> int | None:
        """About how many bytes one epoch reads; records where the reader doesn't say bytes; None: not known."""
        return self._guessed_bytes() if all(one.size.known for one in self._inputs) else None

    def _guessed_bytes(self) -> int:
        return sum(one.size.total * one.source.repeat for one in self._inputs)

    def _firsts(self) -> NDArray[np.int64]:
        """Give the first row of each source in what is known."""
        return np.cumsum([0, *(one.size.records or 0 for one in self._inputs)])

    # -------------------------------------------------------------------------------------------- records -> blocks

    def _groups(self) -> Iterator[_Group]:
        """Read on from the cursor; groups end where a pass over a source does."""
        epoch, epoch_weight, sources = self._cursor.epoch, self._cursor.epoch_weight, list(self._cursor.sources)
        open_passes: dict[int, Iterator[tuple[int, Record | BadRecord]]] = {}
        begin, rows, records, size = self._cursor, list[list[int]](), list[Record | BadRecord](), 0
        while not self.epochs or epoch < self.epochs:
            live = [one for one in self._inputs if sources[one.number].passes < one.source.repeat]
            if not live:
                epoch, epoch_weight = epoch + 1, sum(at.weight for at in sources)
                sources = [At()] * len(sources)
                begin = _Cursor(epoch, epoch_weight, tuple(sources))
                yield self._epoch_end(begin)
                continue
            places = sorted((self._share(one, sources[one.number]), one.number) for one in live)
            one, others = self._inputs[places[0][1]], places[1] if len(places) > 1 else None
            at = sources[one.number]
            if one.number not in open_passes:
                open_passes[one.number] = one.read(epoch * one.source.repeat + at.passes, at)
            ended, full, n, taken = True, False, 0, 0
            for index, record in open_passes[one.number]:
                rows.append(self._row(one, index, record))
                records.append(record)
                weight = rows[-1][WEIGHT]
                n, taken, size = n + 1, taken + weight, size + weight
                full = len(rows) >= GROUP_RECORDS or size >= GROUP_BYTES
                if full or (others is not None and (self._share(one, at.plus(n, taken)), one.number) > others):
                    ended = False
                    break
            position = None if one.source.shuffle else Position(*rows[-1][FILE : OFFSET + 1]) if n else at.position
            at = sources[one.number] = at.plus(n, taken, position)
            if rows and (ended or full):
                yield _Group(begin, rows, records)
                rows, records, size = [], [], 0
            if ended:
                del open_passes[one.number]
                sources[one.number] = At(at.passes + 1, 0, at.records, at.weight)
            if not rows:
                begin = _Cursor(epoch, epoch_weight, tuple(sources))
        yield _Group(begin, [], [], flush=True)

    def _watched(self, groups: Iterator[_Group]) -> Iterator[_Group]:
        """Give the groups, once the files are seen to be as they were; say so where reading fails because one isn't."""
        with ExitStack() as stack:
            for one in self._inputs:
                stack.enter_context(one.reading())
            for group in groups:
                for one in self._inputs if group.records else ():
                    one.check()
                yield group

    def _share(self, one: Input, at: At) -> float:
        return float(one.share(at.records, at.weight, self._by_ratio))

    def _epoch_end(self, cursor: _Cursor) -> _Group:
        return _Group(cursor, [], [], flush=self.algorithm == "best_fit_decreasing")

    def _row(self, one: Input, index: int, record: Record | BadRecord) -> list[int]:
        name = self._names.setdefault(record.path, len(self._names))
        return record_row(one.number, index, record, one.weight(record), name)

    def _encode(self, group: _Group, *, hashed: bool = False) -> Block:
        sources = [one.source for one in self._inputs]
        more: dict[str, Any] = dict(names=list(self._names), hashed=hashed, val_hashes=self.val_hashes)
        return encode_records(sources, group.records, group.rows, self.encoder, **more)

    def _ahead(self, groups: Iterator[_Group], encode: Callable[[_Group], Block]) -> Iterator[tuple[_Group, Block]]:
        """Encode groups in order; with threads, so many of them ahead that a step need not wait."""
        if not self.threads:
            for group in groups:
                yield group, encode(group)
            return
        with ThreadPoolExecutor(self.threads, thread_name_prefix="tokenise") as pool:
            ahead: deque[tuple[_Group, Future[Block]]] = deque()
            failure: Exception | None = None
            try:
                while True:
                    missing = GROUPS_AHEAD * self.threads + self._groups_a_step - len(ahead)
                    try:
                        for group in islice(groups, max(missing, 0)):
                            ahead.append((group, pool.submit(encode, group)))
                    except Exception as error:  # of the reader: after what it has given, as without threads
                        failure, groups = error, iter(())
                    if not ahead:
                        break
                    group, future = ahead.popleft()
                    yield group, future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
            if failure is not None:
                raise failure

    def encoded(self) -> Iterator[Block]:
        """Encode all records of all sources once, source by source in file order, for an arena: hashed, not fitted.

        Raises:
            DataError: as ``steps``.
        """

        def groups() -> Iterator[_Group]:
            for one in self._inputs:
                rows, records, size = list[list[int]](), list[Record | BadRecord](), 0
                for i, record in enumerate(one.source.read()):
                    rows.append(self._row(one, i, record))
                    records.append(record)
                    size += rows[-1][WEIGHT]
                    if len(rows) >= GROUP_RECORDS or size >= GROUP_BYTES:
                        yield _Group(self._cursor, rows, records)
                        rows, records, size = [], [], 0
                if rows:
                    yield _Group(self._cursor, rows, records)

        sums = np.zeros((len(self._inputs), 2), np.int64)
        for _, block in self._ahead(self._watched(groups()), partial(self._encode, hashed=True)):
            if block.error is not None:
                raise block.error
            sums[block.records[0, SOURCE]] += len(block.records), block.records[:, WEIGHT].sum()
            yield block
        for one, (n, weight) in zip(self._inputs, sums.tolist(), strict=True):
            one.size = one.size._replace(records=n)
            if not one.size.known:
                one.size = one.size._replace(total=weight, known=True)

    def _known_blocks(self, known: Arena | _Known) -> Iterator[tuple[_Group, Block]]:
        """Give what ``_groups`` would read and ``_encode`` make of it, from what is encoded already, many at a time."""
        cursor, at_once, firsts = self._cursor, 128, self._firsts().tolist()
        while not self.epochs or cursor.epoch < self.epochs:
            at_once = min(2 * at_once, KNOWN_RECORDS)
            found: list[Table] = []
            sources = list(cursor.sources)
            for one in self._inputs:
                at, n = sources[one.number], one.size.records or 0
                if at.taken >= n:
                    at = sources[one.number] = At(min(at.passes + 1, one.source.repeat), 0, at.records, at.weight)
                if at.passes < one.source.repeat and n:
                    number, stop = cursor.epoch * one.source.repeat + at.passes, min(at.taken + at_once, n)
                    found.append(firsts[one.number] + one.order(number, at.taken, stop))
            cursor = cursor._replace(sources=tuple(sources))
            if found:
                block = known.take(found[0] if len(found) == 1 else self._mixed(cursor, found, known.take))
                yield _Group(cursor, [], []), block
                cursor = _advance(cursor, block.records, self._shuffled)
            elif all(at.passes >= one.source.repeat for one, at in zip(self._inputs, sources, strict=True)):
                weight = sum(at.weight for at in sources)
                cursor = _Cursor(cursor.epoch + 1, weight, (At(),) * len(sources))
                yield self._epoch_end(cursor), known.take(np.empty(0, np.int64))
        yield _Group(cursor, [], [], flush=True), known.take(np.empty(0, np.int64))

    def _mixed(self, cursor: _Cursor, found: list[Table], take: Callable[[Table], Block]) -> Table:
        """Merge the next records of several sources by their shares, as far as all of them are known."""
        shares, numbers = [], []
        for rows in found:
            records = take(rows).records
            number = int(records[0, SOURCE])
            at = cursor.sources[number]
            weights = at.weight + np.cumsum(records[:, WEIGHT]) - records[:, WEIGHT]
            shares.append(self._inputs[number].share(at.records + np.arange(len(rows)), weights, self._by_ratio))
            numbers.append(np.full(len(rows), number))
        order = np.lexsort((np.concatenate(numbers), np.concatenate(shares)))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        known = int(place[np.cumsum(list(map(len, found))) - 1].min()) + 1
        return np.concatenate(found)[order[:known]]

    def _blocks(self) -> Iterator[tuple[_Group, Block]]:
        """Give all blocks from the cursor on, their samples fitted to the packs."""
        hashes, known = np.array(sorted(self.val_hashes), np.int64), self._known
        if known is None:
            blocks = self._ahead(self._watched(self._groups()), self._encode)
        else:
            blocks = self._known_blocks(known)
        if len(self._rows):  # resumed: packs that were about to close, or all of an epoch's
            closing = self.algorithm == "best_fit_decreasing" and not any(at.records for at in self._cursor.sources)
            group = _Group(self._cursor, [], [], flush=closing)
            yield group, self._encode(group) if known is None else known.take(np.empty(0, np.int64))
        waiting: list[tuple[_Group, Block]] = []  # where no pack closes before the end of the epoch
        for group, block in blocks:
            block = fit(block if known is None else hold_out(block, hashes), self.max_length, self.overlong)
            if self.algorithm == "best_fit_decreasing" and not group.flush:
                waiting.append((group, block))
            if waiting and (group.flush or block.error is not None):
                yield waiting[0][0], join([block for _, block in waiting])
                waiting = []
            if self.algorithm != "best_fit_decreasing" or group.flush:
                yield group, block

    # ---------------------------------------------------------------------------------------------- blocks -> packs

    def _packs(self) -> Iterator[tuple[_Taken, int]]:
        """Give packs, each when the next one is known: the last one's state covers all records after it."""
        ready: tuple[_Taken, int] | None = None
        for group, block in self._blocks():
            taken = self._take(group, block)
            for k in range(len(taken.tokens)):
                if ready is not None:
                    yield ready
                ready = taken, k
            if block.error is not None:
                if ready is not None:
                    yield ready
                raise block.error
            if not len(block.records) and not self.ledger.records.used and not len(self._rows):
                raise self._nothing()
            if ready is not None and group.flush and not len(self._rows):
                ready[0].end = self.ledger, group.begin, self._read
                ready[0].epochs[-1] = self._progress(group.begin, np.array([self._read], np.float64))[0]
        if ready is not None:
            yield ready

    def _take(self, group: _Group, block: Block) -> _Taken:
        """Hand a block's samples to the packer, and account for them."""
        n_held, before = len(self._records), len(self._rows)
        rows = self._window.add(self._rows, block)
        rows[before:, RECORD] += n_held
        records = np.concatenate([self._records, block.records])
        ends = np.append(rows[1:, RECORD] != rows[:-1, RECORD], True)[: len(rows)]
        packed = stream(
            self.algorithm,
            rows[:, LENGTH],
            self.max_length,
            held=self.held,
            n_held=before,
            ends=ends,
            flush=group.flush,
        )
        out = rows[packed.order]
        of = out[:, RECORD]
        last = np.zeros(len(records), np.int64)
        last[of] = np.arange(len(of))
        n_out, n_all = (np.bincount(table[:, RECORD], minlength=len(records)) for table in (out, rows))
        parts = np.zeros((len(out), 3), np.int64)
        parts[:, 0], parts[:, 1] = out[:, LENGTH], out[:, SUPERVISED]
        parts[last[(n_out > 0) & (n_out == n_all)], 2] = 1
        sums = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(parts, axis=0)])[packed.offsets]
        n_read = np.where(packed.seen > before, rows[packed.seen - 1, RECORD] + 1 - n_held, 0)
        if group.flush:
            n_read[:] = len(block.records)
        read = self._read + np.concatenate([[0], np.cumsum(block.records[:, WEIGHT])])
        known = self.ledger.records.used + n_held + np.concatenate([[0], np.cumsum(block.records[:, SAMPLES] > 0)])
        # what is read counts as done by the share of its records that are used up
        done = read[n_read] * ((self.ledger.records.used + sums[1:, 2]) / np.maximum(known[n_read], 1))
        taken = _Taken(
            begin=group.begin, base=self.ledger, block=block, records=records, rows=rows,
            window=(self._window.tokens, self._window.spans), closed=packed, packed=out,
            sums=sums, counts=np.diff(packed.offsets),
            tokens=np.diff(sums[:, 0]).tolist(), supervised=np.diff(sums[:, 1]).tolist(),
            n_read=n_read, read=read, epochs=self._progress(group.begin, done),
        )  # fmt: skip
        self._keep(taken)
        return taken

    def _progress(self, cursor: _Cursor, done: NDArray[np.float64]) -> NDArray[np.float64]:
        """Turn bytes into epochs: never falling, and never past the end of the epoch that is being read."""
        whole = cursor.epoch_weight or self._guessed_bytes()
        most = min(cursor.epoch + 1, self.epochs or cursor.epoch + 1)
        values = np.maximum.accumulate(np.append(self._epoch, np.minimum(done / max(1, whole), most)))
        self._epoch = float(values[-1])
        return values[1:]

    def _keep(self, taken: _Taken) -> None:
        """Go on with the samples that are in no pack, their records, and the sums over everything before."""
        held = taken.rows[taken.closed.rest]
        kept, number = np.unique(held[:, RECORD], return_inverse=True)
        held[:, RECORD] = number
        self._rows, self._records = held, taken.records[kept]
        self.ledger = taken.ledger(len(taken.tokens), len(taken.block.records))
        self._read = int(taken.read[-1])

    def _nothing(self) -> DataError:
        paths = [str(path) for one in self._inputs for path in one.source.sources.paths]
        where = paths[0] if paths else f"reader {self._inputs[0].source.reader.name}"
        records = self.ledger.records
        reasons = [f"{reason} {n:,}" for reason, n in records.dropped.items()]
        reasons += [f"validation {records.validation:,}"] if records.validation else []
        return DataError(
            f"{where}: no sample in {records.read:,} records ({', '.join(reasons) or 'none read'}); "
            f"corefit inspect shows what becomes of each"
        )

    # ------------------------------------------------------------------------------------------------ packs -> steps

    def steps(self, packs_per_step: int, micro_batch: int) -> Iterator[tuple[Batch, ...]]:
        """Give the micro-batches of this rank, one tuple an optimizer step; to be called once.

        ``packs_per_step`` counts the packs of all ranks. The last step may be smaller; a rank that has no pack in it
        gets an empty tuple, so all ranks give equally many tuples.

        Raises:
            RecipeError: packs_per_step is not a multiple of micro_batch x world.
            DataError: a bad record, a map function that failed, or no sample at all.
        """
        at_once = packs_at_once(packs_per_step, micro_batch, self.world)
        packs = self._packs()
        self._slots = astuple(self.ledger.slots)
        while step := list(islice(packs, packs_per_step)):
            self._groups_a_step = len(_by_block(step))
            self._check_known()
            if self.world > 1:
                sums = [_checksum(taken.pack(k), taken.window[0]) for taken, k in step]
                self.digest = zlib.crc32(repr(sums).encode()) + 1
            yield tuple(self._step([step[i : i + at_once] for i in range(0, len(step), at_once)]))
        self.digest = 0

    def _step(self, rounds: list[list[tuple[_Taken, int]]]) -> Iterator[Batch]:
        """Give the batches of this rank; a round is one micro-batch on every rank."""
        mine = [round_[self.rank :: self.world] for round_ in rounds]
        n_mine = sum(map(bool, mine))  # only the last round can lack a pack for this rank
        for number, packs in enumerate(mine[: max(1, n_mine)]):
            made = self._gathered(packs) if packs else None
            last = number + 1 >= n_mine
            for covered in rounds[number:] if last else rounds[number : number + 1]:
                self._count_slots(covered, made[0].n_supervised if made and covered is rounds[number] else None)
            if made is not None:
                rows, n_tokens, n_samples = made
                taken, k = rounds[-1 if last else number][-1]
                yield Batch(
                    **rows._asdict(),
                    n_tokens=n_tokens,
                    n_samples=n_samples,
                    epoch=float(taken.epochs[k]),
                    origins=partial(_origins, packs),
                    state=partial(self._state, taken, k, self._slots),
                )

    def _state(self, taken: _Taken, k: int, slots: Sequence[int]) -> dict[str, Any]:
        self._check_known()
        return {**taken.state(k, slots, self._shuffled), "orders": [one.ordered_by for one in self._inputs]}

    def _check_known(self) -> None:
        """To be called before what is mapped is used."""
        if self._known is not None:
            self._known.check()

    def _gathered(self, packs: Sequence[tuple[_Taken, int]]) -> tuple[Rows, int, int]:
        """Write packs as rows, those of one block by one call; also give how many tokens and samples they are."""
        tokens = [taken.tokens[k] for taken, k in packs]
        width, parts, n = padded(max(tokens)), [], 0
        for taken, numbers in _by_block(packs):
            first, last = numbers[0], numbers[-1] + 1
            if len(numbers) == last - first:  # of all packs in between
                samples = taken.packed[taken.closed.offsets[first] : taken.closed.offsets[last]]
            else:
                samples = np.concatenate([taken.pack(k) for k in numbers])
            parts.append(gather(*taken.window, samples, taken.counts[numbers], width=width, pad_id=self.pad_id))
            n += len(samples)
        return parts[0] if len(parts) == 1 else stack(parts), sum(tokens), n

    def _count_slots(self, packs: list[tuple[_Taken, int]], own: int | None) -> None:
        for rank in range(min(self.world, len(packs))):
            tokens = [taken.tokens[k] for taken, k in packs[rank :: self.world]]
            targets = sum(taken.supervised[k] for taken, k in packs[rank :: self.world])
            used, total = sum(tokens), padded(max(tokens)) * len(tokens)
            counted = own if own is not None and rank == self.rank else targets
            gained = (total, counted, used - targets, total - used)
            self._slots = tuple(a + b for a, b in zip(self._slots, gained, strict=True))

    # ---------------------------------------------------------------------------------------------------- the state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where ``Batch.state`` was taken; ``steps`` then gives exactly the batches that came after it.

        Reads and encodes the records again whose samples were held.

        Raises:
            CheckpointError: the data isn't what it was.
        """
        self._reset()
        epoch, epoch_weight, sources = state["cursor"]
        if len(sources) != len(self._inputs):
            raise CheckpointError(f"the checkpoint has {len(sources)} data sources, the recipe {len(self._inputs)}")
        places = tuple(At(*at)._replace(position=at[4] and Position(*at[4])) for at in sources)
        if state.get("orders") not in (None, [one.ordered_by for one in self._inputs]) or any(
            most is not None and most < at.taken
            for one, at in zip(self._inputs, places, strict=True)
            for most in (one.size.records, one.source.first)
        ):
            raise CheckpointError(CHANGED)
        self._cursor = _Cursor(epoch, epoch_weight, places)
        self.ledger, self._read, self._epoch = Ledger.from_dict(state["ledger"]), state["read"], state["epoch"]
        self.ledger.records.pending = self.ledger.tokens.pending = 0
        block = fit(self._again(state["held"]), self.max_length, self.overlong)
        held = {(i, ordinal) for i, row in enumerate(state["held"]) for ordinal in row[6]}
        waits = [tuple(pair) in held for pair in block.samples[:, [RECORD, ORDINAL]].tolist()]
        block.samples = block.samples[waits]
        self._rows, self._records = self._window.add(self._rows, block), block.records
        if _checksum(self._rows, self._window.tokens) != state["samples"]:
            raise CheckpointError(CHANGED)

    def _again(self, held: Sequence[Sequence[Any]]) -> Block:
        """Read and encode again the records of a state, or pick them."""
        if self._known is not None:
            table = np.array([row[:6] for row in held], np.int64).reshape(-1, 6)
            sizes = np.array([one.size.records or 0 for one in self._inputs])
            if (table[:, INDEX] >= sizes[table[:, SOURCE]]).any():
                raise CheckpointError(CHANGED)
            block = self._known.take(self._firsts()[table[:, SOURCE]] + table[:, INDEX])
            if not np.array_equal(block.records[:, : WEIGHT + 1], table):
                raise CheckpointError(CHANGED)
            return block
        found: dict[int, Record | BadRecord] = {}
        for one in self._inputs:
            mine = [i for i, row in enumerate(held) if row[0] == one.number]
            with one.reading():
                records = one.fetch([held[i][1] for i in mine], [Position(*held[i][2:5]) for i in mine])
                one.check()
            found |= zip(mine, records, strict=False)
        rows = [self._row(self._inputs[held[i][0]], held[i][1], found[i]) for i in sorted(found)]
        return self._encode(_Group(self._cursor, rows, [found[i] for i in sorted(found)]))

    # ---------------------------------------------------------------------------------------------------- estimate

    def estimate(self) -> Estimate:
        """Say how much there is to read, from at most about 200 records; the stream itself stays where it is."""
        quota = max(20, ESTIMATE_RECORDS // len(self._inputs))
        heads = [list(islice(one.source.read(), quota + 1)) for one in self._inputs]
        small = all(len(head) <= quota for head in heads)
        rows = [
            self._row(one, i, record)
            for one, head in zip(self._inputs, heads, strict=True)
            for i, record in enumerate(head)
        ]
        block = self._encode(_Group(self._cursor, rows, [record for head in heads for record in head]))
        block = fit(block, self.max_length, self.overlong)
        if block.error is not None:
            raise block.error
        repeats = [one.source.repeat for one in self._inputs]
        n_records = sum(len(head) * repeat for head, repeat in zip(heads, repeats, strict=True))
        epochs = min(self.epochs or 1, PLAYED // max(1, n_records), PLAYED_PASSES // sum(repeats))
        if small and epochs:
            twin = copy.copy(self)
            twin.epochs, twin._known = epochs, _Known(block)
            twin._inputs = [copy.copy(one) for one in self._inputs]
            for one, head in zip(twin._inputs, heads, strict=True):
                one.size = one.size._replace(records=len(head))
            twin._reset()
            n = sum(1 for _ in twin._packs())
            total = round(n * self.epochs / twin.epochs) if self.epochs else None
            exact = twin.epochs == (self.epochs or 1)
            return Estimate(n_records, -(-n // twin.epochs), total, exact)
        sums = np.zeros(2)
        for one, head in zip(self._inputs, heads, strict=True):
            mine = block.records[block.samples[:, RECORD], SOURCE] == one.number
            times = min(one.source.repeat, 50)
            plan = best_fit_decreasing(np.tile(block.samples[mine, LENGTH], times), self.max_length)
            packs = max(len(plan) - 0.5, 0.0) / times  # the last is half full
            size = one.size
            scale = size.total / max(1, sum(map(one.weight, head)))
            scale = scale if size.records is None else size.records / max(1, len(head))
            sums += np.array([len(head), packs]) * max(1.0, scale) * one.source.repeat
        n_records, n = (max(1, round(value)) for value in sums)
        return Estimate(n_records, n, n * self.epochs or None, exact=False)


def _by_block(packs: Sequence[tuple[_Taken, int]]) -> list[tuple[_Taken, list[int]]]:
    """Give which packs of which block follow each other."""
    return [(taken, [k for _, k in some]) for taken, some in groupby(packs, key=lambda pack: pack[0])]


def _origins(packs: Sequence[tuple[_Taken, int]]) -> tuple[str, ...]:
    return tuple(origin for taken, k in packs for origin in taken.origins(k))


def encode_validation(
    records: Sequence[tuple[Source, Record | BadRecord]],
    encoder: Encoder,
    *,
    max_length: int,
    micro_batch: int,
    overlong: str = "truncate",
    pad_id: int = 0,
    packed: bool = True,
) -> tuple[list[Batch], Ledger]:
    """Encode all records and pack them with as little padding as possible; give the micro-batches and the tokens.

    ``packed`` False: each sample is a pack of its own.

    Raises:
        DataError: as ``Stream.steps``.
    """
    ledger, batches = Ledger(), list[Batch]()
    sources, found = zip(*records, strict=True) if records else ((), ())
    rows = [record_row(i, i, record, 1, i) for i, record in enumerate(found)]
    block = encode_records(sources, found, rows, encoder, names=[record.path for record in found])
    block = fit(block, max_length, overlong)
    if block.error is not None:
        raise block.error
    ledger.tokens.encoded = ledger.tokens.validation = int(block.records[:, ENCODED].sum())
    plan = best_fit_decreasing(block.samples[:, LENGTH], max_length)
    if not packed:
        plan = Plan(plan.order, np.arange(len(plan.order) + 1))
    for k in range(0, len(plan), micro_batch):
        bounds = plan.offsets[k : k + micro_batch + 1]
        samples = block.samples[plan.order[bounds[0] : bounds[-1]]]
        sizes = np.diff(bounds)
        width = padded(int(np.add.reduceat(samples[:, LENGTH], bounds[:-1] - bounds[0]).max()))
        made = gather(block.tokens, block.spans, samples, sizes, width=width, pad_id=pad_id)
        batches.append(
            Batch(
                **made._asdict(),
                n_tokens=int(samples[:, LENGTH].sum()),
                n_samples=len(samples),
                origins=lambda rows=samples: tuple(block.origin(record) for record in rows[:, RECORD]),  # type: ignore[misc]
            )
        )
    return batches, ledger
