"""The stations joined: sources -> records -> blocks of samples -> packs -> batches, lazily, resumable at every batch.

Nothing is tokenised beyond the samples held and the few groups that the tokenising threads work on: records are read,
mapped and encoded at most 32 at a time. Batches are a pure function of the sources and the settings: neither the
number of threads nor that of ranks changes what is in a pack.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
    SUPERVISED,
    WEIGHT,
    Block,
    gains,
    select,
)
from corefit.data.ledger import Ledger
from corefit.data.pack import best_fit_decreasing, stream
from corefit.data.rows import Rows, Window, gather, padded, stack
from corefit.data.source import (
    ESTIMATE_RECORDS,
    GROUP_RECORDS,
    At,
    Input,
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

    from corefit.data.block import Table
    from corefit.data.encode import Encoder

__all__ = ["Estimate", "Source", "Split", "Stream", "encode_validation", "split_validation"]

GROUP_BYTES = 2**20
"""A group of records is encoded as soon as it has so many bytes, however few records these are."""
GROUPS_AHEAD = 4
"""Groups that each tokenising thread may be ahead of the training step."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the run will read: of one epoch, but for ``total_packs`` (all epochs; None without a limit)."""

    records: int
    samples: int
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
    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    seen: NDArray[np.int64]
    sums: NDArray[np.int64]
    """int64 [packs, 3]: tokens, supervised tokens, records used up; of this pack and those before it."""
    n_read: NDArray[np.int64]
    """Records of the block read when each pack closed."""
    read: NDArray[np.int64]
    """Bytes of the whole run read before each record of the block, and after the last."""
    epochs: NDArray[np.float64]
    end: tuple[Ledger, _Cursor, int] | None = None
    """What holds after the last pack where no record after it has a sample: ledger, cursor, bytes read."""

    def pack(self, k: int) -> Table:
        """Give the rows of the samples of one pack."""
        rows: Table = self.rows[self.order[self.offsets[k] : self.offsets[k + 1]]]
        return rows

    def origins(self, k: int) -> list[str]:
        """Give ``path:line`` of its samples."""
        found = self.records[self.pack(k)[:, RECORD]]
        return [f"{self.block.names[name]}:{line}" for name, line in found[:, [NAME, LINE]].tolist()]

    def state(self, k: int, slots: Sequence[int], shuffled: Sequence[bool]) -> dict[str, Any]:
        """Give all that is needed to go on after a pack: positions of records, never tokens."""
        waits = np.arange(len(self.rows)) < self.seen[k]
        waits[self.order[: self.offsets[k + 1]]] = False
        held = self.rows[waits]
        tokens, supervised, used = self.sums[k].tolist()
        ledger = self.base.copy()
        ledger.add(gains(self.block, int(self.n_read[k])))
        ledger.tokens.supervised += supervised
        ledger.tokens.masked += tokens - supervised
        ledger.records.used += used
        # counted anew from what really waits: a sample lost on the way makes the ledger unbalanced
        ledger.records.pending, ledger.tokens.pending = len(np.unique(held[:, RECORD])), int(held[:, LENGTH].sum())
        ledger.slots.total, ledger.slots.supervised, ledger.slots.masked, ledger.slots.padding = slots
        cursor = _advance(self.begin, self.block.records[: self.n_read[k]], shuffled)
        read = int(self.read[self.n_read[k]])
        if self.end is not None and k == len(self.seen) - 1:
            at_end, cursor, read = self.end
            ledger.records, ledger.tokens, ledger.messages = at_end.records, at_end.tokens, at_end.messages
        records = self.records[:, [SOURCE, INDEX, FILE, LINE, OFFSET, WEIGHT]].tolist()
        by_record = groupby(held[:, [RECORD, ORDINAL]].tolist(), key=lambda pair: pair[0])
        return {
            "cursor": [cursor.epoch, cursor.epoch_weight, [list(at) for at in cursor.sources]],
            "held": [[*records[record], [ordinal for _, ordinal in pairs]] for record, pairs in by_record],
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
        places[number] = At(at.passes, at.taken + n, at.records + n, at.weight + weight, position)
    return cursor._replace(sources=tuple(places))


class Stream:
    """Batches for one rank.

    ``epochs``: 0 is no limit. ``held``: samples that the packer may hold. ``val_hashes``: content hashes of records
    that belong to the validation split. ``threads``: of tokenising; 0: in the caller's. ``notices`` are lines for the
    user.
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
    ) -> None:
        """Index or hold the records of shuffled sources; read nothing else yet."""
        self.max_length, self.algorithm, self.held, self.epochs = max_length, algorithm, held, epochs
        self.val_hashes, self.pad_id = val_hashes, pad_id
        self.world, self.rank, self.threads = world, rank, threads
        self.notices: list[str] = []
        self._inputs = [Input(i, source, seed, self.notices) for i, source in enumerate(sources)]
        self._shuffled = [source.shuffle for source in sources]
        self._by_ratio = any(source.ratio is not None for source in sources)
        self._names: dict[str, int] = {}
        self._listed: list[str] = []
        self._settings: dict[str, Any] = dict(
            encoder=encoder, max_length=max_length, overlong=overlong, names=self._listed, val_hashes=val_hashes
        )
        self._known: Block | None = None  # all records of all sources, where they are encoded already
        self._firsts: list[int] = []  # the row of each source's first record in it
        self._reset()

    def _reset(self) -> None:
        self.ledger = Ledger()  # of the blocks taken in
        self._window = Window(self._known)
        self._rows = np.empty((0, SAMPLE_COLUMNS), np.int64)  # the samples held
        self._records = np.empty((0, RECORD_COLUMNS), np.int64)  # theirs
        self._cursor = _Cursor(0, None, (At(),) * len(self._inputs))
        self._read = 0  # bytes
        self._epoch = 0.0

    @property
    def total_bytes(self) -> int | None:
        """About how many bytes one epoch reads; records where the reader doesn't say bytes; None: not known."""
        if not all(one.known for one in self._inputs):
            return None
        return sum(one.total * one.source.repeat for one in self._inputs)

    # -------------------------------------------------------------------------------------------- records -> blocks

    def _groups(self) -> Iterator[_Group]:
        """Read on from the cursor; groups end where a pass over a source does."""
        epoch, epoch_weight, sources = self._cursor.epoch, self._cursor.epoch_weight, list(self._cursor.sources)
        open_passes: dict[int, Iterator[tuple[int, Record | BadRecord]]] = {}
        if len(self._rows):  # resumed: packs that were about to close, or all of an epoch's
            closing = self.algorithm == "best_fit_decreasing" and not any(at.records for at in sources)
            yield _Group(self._cursor, [], [], flush=closing)
        begin, rows, records, size = self._cursor, list[list[int]](), list[Record | BadRecord](), 0
        while True:
            live = [one for one in self._inputs if sources[one.number].passes < one.source.repeat]
            found = None
            if live and (not self.epochs or epoch < self.epochs):
                one = min(live, key=lambda one: one.share(sources[one.number], self._by_ratio))
                at = sources[one.number]
                if one.number not in open_passes:
                    open_passes[one.number] = one.read(epoch * one.source.repeat + at.passes, at)
                found = next(open_passes[one.number], None)
            if rows and (found is None or len(rows) >= GROUP_RECORDS or size >= GROUP_BYTES):
                yield _Group(begin, rows, records)
                rows, records, size = [], [], 0
            if not rows:
                begin = _Cursor(epoch, epoch_weight, tuple(sources))
            if found is not None:
                index, record = found
                weight = one.weight(record)
                position = None if one.source.shuffle else Position(record.file, record.line, record.offset)
                sources[one.number] = At(at.passes, at.taken + 1, at.records + 1, at.weight + weight, position)
                rows.append(record_row(one.number, index, record, weight, self._name(record.path)))
                records.append(record)
                size += weight
            elif self.epochs and epoch >= self.epochs:
                yield _Group(begin, [], [], flush=True)
                return
            elif live:
                del open_passes[one.number]
                sources[one.number] = At(at.passes + 1, 0, at.records, at.weight)
            else:
                epoch, epoch_weight = epoch + 1, sum(at.weight for at in sources)
                sources = [At()] * len(sources)
                ended = _Cursor(epoch, epoch_weight, tuple(sources))
                yield _Group(ended, [], [], flush=self.algorithm == "best_fit_decreasing")

    def _name(self, path: str) -> int:
        if path not in self._names:
            self._names[path] = len(self._listed)
            self._listed.append(path)
        return self._names[path]

    def _encode(self, group: _Group) -> Block:
        if self._known is not None:
            rows = [self._firsts[row[SOURCE]] + row[INDEX] for row in group.rows]
            return select(self._known, np.array(rows, np.int64))
        sources = [one.source for one in self._inputs]
        return encode_records(sources, group.records, group.rows, **self._settings)

    def _blocks(self) -> Iterator[tuple[_Group, Block]]:
        """Encode groups in order; with threads, some groups ahead of what is asked for."""
        if not self.threads:
            for group in self._groups():
                yield group, self._encode(group)
            return
        with ThreadPoolExecutor(self.threads, thread_name_prefix="tokenise") as pool:
            ahead: deque[tuple[_Group, Future[Block]]] = deque()
            try:
                for group in self._groups():
                    ahead.append((group, pool.submit(self._encode, group)))
                    while ahead and (ahead[0][1].done() or len(ahead) > GROUPS_AHEAD * self.threads):
                        group, future = ahead.popleft()
                        yield group, future.result()
                for group, future in ahead:
                    yield group, future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    # ---------------------------------------------------------------------------------------------- blocks -> packs

    def _packs(self) -> Iterator[tuple[_Taken, int]]:
        """Give packs, each when the next one is known: the last one's state covers all records after it."""
        ready: tuple[_Taken, int] | None = None
        for group, block in self._blocks():
            taken = self._take(group, block)
            for k in range(len(taken.seen)):
                if ready is not None:
                    yield ready
                ready = taken, k
            if block.error is not None:
                if ready is not None:
                    yield ready
                raise block.error
            if not group.rows and not self.ledger.records.used and not len(self._rows):
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
            rows[:, LENGTH].astype(np.int32),
            self.max_length,
            held=self.held,
            n_held=before,
            ends=ends.astype(np.uint8),
            flush=group.flush,
        )
        order, offsets = packed.order.astype(np.int64), packed.offsets
        out = rows[order]
        of = out[:, RECORD]
        last = np.zeros(len(records), np.int64)
        last[of] = np.arange(len(of))
        n_out, n_all = (np.bincount(table[:, RECORD], minlength=len(records)) for table in (out, rows))
        parts = np.zeros((len(out), 3), np.int64)
        parts[:, 0], parts[:, 1] = out[:, LENGTH], out[:, SUPERVISED]
        parts[last[(n_out > 0) & (n_out == n_all)], 2] = 1
        sums = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(parts, axis=0)])[offsets[1:]]
        n_read = np.where(packed.seen > before, rows[packed.seen - 1, RECORD] + 1 - n_held, 0)
        if group.flush:
            n_read[:] = len(block.records)
        read = self._read + np.concatenate([[0], np.cumsum(block.records[:, WEIGHT])])
        known = self.ledger.records.used + n_held + np.concatenate([[0], np.cumsum(block.records[:, SAMPLES] > 0)])
        # what is read counts as done by the share of its records that are used up
        done = read[n_read] * ((self.ledger.records.used + sums[:, 2]) / np.maximum(known[n_read], 1))
        taken = _Taken(
            begin=group.begin, base=self.ledger, block=block, records=records, rows=rows,
            window=(self._window.tokens, self._window.spans), order=order, offsets=offsets, seen=packed.seen,
            sums=sums, n_read=n_read, read=read, epochs=self._progress(group.begin, done),
        )  # fmt: skip
        self._keep(taken, packed.rest)
        return taken

    def _progress(self, cursor: _Cursor, done: NDArray[np.float64]) -> NDArray[np.float64]:
        """Turn bytes into epochs: never falling, and never past the end of the epoch that is being read."""
        whole = cursor.epoch_weight or self.total_bytes or sum(one.total for one in self._inputs)
        most = min(cursor.epoch + 1, self.epochs or cursor.epoch + 1)
        values = np.maximum.accumulate(np.append(self._epoch, np.minimum(done / max(1, whole), most)))
        self._epoch = float(values[-1])
        return values[1:]

    def _keep(self, taken: _Taken, rest: NDArray[np.int32]) -> None:
        """Go on with the samples that are in no pack, their records, and the sums over everything before."""
        held = taken.rows[rest]
        kept, number = np.unique(held[:, RECORD], return_inverse=True)
        held[:, RECORD] = number
        self._rows, self._records = held, taken.records[kept]
        self.ledger = taken.base.copy()
        self.ledger.add(gains(taken.block, len(taken.block.records)))
        self._read = int(taken.read[-1])
        if len(taken.seen):
            tokens, supervised, used = taken.sums[-1].tolist()
            self.ledger.tokens.supervised += supervised
            self.ledger.tokens.masked += tokens - supervised
            self.ledger.records.used += used

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
        at_once = micro_batch * self.world
        if at_once < 1 or packs_per_step < 1 or packs_per_step % at_once:
            raise RecipeError(
                f"train.packs_per_step: {packs_per_step} is not a multiple of "
                f"train.micro_batch {micro_batch} x {self.world} ranks"
            )
        packs = self._packs()
        slots = self.ledger.slots
        self._slots = [slots.total, slots.supervised, slots.masked, slots.padding]
        while step := list(islice(packs, packs_per_step)):
            yield tuple(self._step([step[i : i + at_once] for i in range(0, len(step), at_once)]))

    def _step(self, rounds: list[list[tuple[_Taken, int]]]) -> Iterator[Batch]:
        """Give the batches of this rank; a round is one micro-batch on every rank."""
        mine = [round_[self.rank :: self.world] for round_ in rounds]
        n_mine = sum(map(bool, mine))  # only the last round can lack a pack for this rank
        for number, packs in enumerate(mine[: max(1, n_mine)]):
            made = _gathered(packs, self.pad_id) if packs else None
            last = number + 1 >= n_mine
            for covered in rounds[number:] if last else rounds[number : number + 1]:
                self._count_slots(covered, made.n_supervised if made and covered is rounds[number] else None)
            if made is not None:
                taken, k = rounds[-1 if last else number][-1]
                lengths = [taken.pack(k)[:, LENGTH] for taken, k in packs]
                yield Batch(
                    **made._asdict(),
                    n_tokens=int(sum(map(np.sum, lengths))),
                    n_samples=sum(map(len, lengths)),
                    epoch=float(taken.epochs[k]),
                    origins=partial(_origins, packs),
                    state=partial(taken.state, k, tuple(self._slots), self._shuffled),
                )

    def _count_slots(self, packs: list[tuple[_Taken, int]], own: int | None) -> None:
        sizes = np.array([[*taken.pack(k)[:, [LENGTH, SUPERVISED]].sum(axis=0)] for taken, k in packs])
        for rank in range(min(self.world, len(packs))):
            used, targets = sizes[rank :: self.world, 0], int(sizes[rank :: self.world, 1].sum())
            total = padded(int(used.max())) * len(used)
            supervised = own if own is not None and rank == self.rank else targets
            gained = (total, supervised, int(used.sum()) - targets, total - int(used.sum()))
            self._slots = [a + b for a, b in zip(self._slots, gained, strict=True)]

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
        places = (At(*at)._replace(position=at[4] and Position(*at[4])) for at in sources)
        self._cursor = _Cursor(epoch, epoch_weight, tuple(places))
        self.ledger, self._read, self._epoch = Ledger.from_dict(state["ledger"]), state["read"], state["epoch"]
        pending = self.ledger.tokens.pending
        self.ledger.records.pending = self.ledger.tokens.pending = 0
        found: list[Record | BadRecord | None] = [None] * len(state["held"])
        for one in self._inputs:
            mine = [i for i, row in enumerate(state["held"]) if row[0] == one.number]
            wanted = [(state["held"][i][1], Position(*state["held"][i][2:5])) for i in mine]
            for i, record in zip(mine, one.fetch(wanted), strict=False):
                found[i] = record
        records = [record for record in found if record is not None]
        rows = [
            record_row(row[0], row[1], record, row[5], self._name(record.path))
            for row, record in zip(state["held"], records, strict=False)
        ]
        block = self._encode(_Group(self._cursor, rows, records))
        held = {(i, ordinal) for i, row in enumerate(state["held"]) for ordinal in row[6]}
        waits = [tuple(pair) in held for pair in block.samples[:, [RECORD, ORDINAL]].tolist()]
        block.samples = block.samples[waits]
        if len(block.samples) != len(held) or block.samples[:, LENGTH].sum() != pending:
            raise CheckpointError("the data, the template or the tokenizer changed since the checkpoint was written")
        self._rows, self._records = self._window.add(self._rows, block), block.records

    # ---------------------------------------------------------------------------------------------------- estimate

    def estimate(self) -> Estimate:
        """Say how much there is to read, from at most about 200 records; the stream itself stays where it is."""
        quota = max(20, ESTIMATE_RECORDS // len(self._inputs))
        heads = [list(islice(one.source.read(), quota + 1)) for one in self._inputs]
        small = all(len(head) <= quota for head in heads)
        rows = [
            record_row(one.number, i, record, one.weight(record), self._name(record.path))
            for one, head in zip(self._inputs, heads, strict=True)
            for i, record in enumerate(head)
        ]
        block = self._encode(_Group(self._cursor, rows, [record for head in heads for record in head]))
        repeats = np.array([one.source.repeat for one in self._inputs])
        if small:
            twin = copy.copy(self)
            twin.epochs, twin.threads, twin._known = min(self.epochs or 1, 50), 0, block
            twin._firsts = [0, *np.cumsum(list(map(len, heads))).tolist()]
            twin._reset()
            n = sum(1 for _ in twin._packs())
            if block.error is not None:
                raise block.error
            counts = block.records[:, SAMPLES] * repeats[block.records[:, SOURCE]]
            n_records = sum(len(head) * one.source.repeat for head, one in zip(heads, self._inputs, strict=True))
            total = round(n * self.epochs / twin.epochs) if self.epochs else None
            exact = twin.epochs == (self.epochs or 1)
            return Estimate(n_records, int(counts.sum()), -(-n // twin.epochs), total, exact)
        if block.error is not None:
            raise block.error
        sums = np.zeros(3)
        for one, head in zip(self._inputs, heads, strict=True):
            mine = block.records[block.samples[:, RECORD], SOURCE] == one.number
            lengths = block.samples[mine, LENGTH].astype(np.int32)
            packs = max(len(best_fit_decreasing(lengths, self.max_length)) - 0.5, 0.0)  # the last is half full
            scale = one.total / max(1, sum(map(one.weight, head))) if one.n is None else one.n / max(1, len(head))
            sums += np.array([len(head), len(lengths), packs]) * max(1.0, scale) * one.source.repeat
        n_records, n_samples, n = (max(1, round(value)) for value in sums)
        return Estimate(n_records, n_samples, n, n * self.epochs or None, exact=False)


def _gathered(packs: Sequence[tuple[_Taken, int]], pad_id: int) -> Rows:
    """Write packs as rows; those that lie in one window by one call."""
    width = padded(max(int(taken.pack(k)[:, LENGTH].sum()) for taken, k in packs))
    parts = []
    for _, run in groupby(packs, key=lambda pack: id(pack[0].window[0])):
        some = list(run)
        samples = [taken.pack(k) for taken, k in some]
        sizes = np.array([len(rows) for rows in samples], np.int64)
        parts.append(gather(*some[0][0].window, np.concatenate(samples), sizes, width=width, pad_id=pad_id))
    return parts[0] if len(parts) == 1 else stack(parts)


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
) -> tuple[list[Batch], Ledger]:
    """Encode all records and pack them with as little padding as possible; give the micro-batches and the tokens.

    Raises:
        DataError: as ``Stream.steps``.
    """
    ledger, batches = Ledger(), list[Batch]()
    sources = list(dict.fromkeys(source for source, _ in records))
    rows = [record_row(sources.index(source), i, record, 1, i) for i, (source, record) in enumerate(records)]
    names = [record.path for _, record in records]
    block = encode_records(
        sources, [record for _, record in records], rows, encoder, max_length=max_length, overlong=overlong, names=names
    )
    if block.error is not None:
        raise block.error
    ledger.tokens.encoded = ledger.tokens.validation = int(block.records[:, ENCODED].sum())
    plan = best_fit_decreasing(block.samples[:, LENGTH].astype(np.int32), max_length)
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
                epoch=0.0,
                origins=lambda rows=samples: tuple(block.origin(record) for record in rows[:, RECORD]),  # type: ignore[misc]
                state=dict,
            )
        )
    return batches, ledger
