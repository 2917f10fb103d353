"""The stations joined: sources -> records -> items -> samples -> packs -> batches, lazily, resumable at every batch.

Nothing is tokenised beyond the samples held: records are read, mapped and encoded at most 32 at a time, and one
record with samples is looked ahead to know where the data ends. Batches are a pure function of the sources and the
settings; the number of ranks changes who gets a pack, never what is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corefit.data.ledger import Ledger
from corefit.data.pack import Packer, assemble, best_fit_decreasing, first_fit_decreasing, padded
from corefit.data.source import (
    ESTIMATE_RECORDS,
    GROUP_RECORDS,
    At,
    Input,
    Outcome,
    Source,
    Split,
    encode_all,
    outcomes_of,
    split_validation,
)
from corefit.errors import CheckpointError, DataError, RecipeError
from corefit.types import BadRecord, Batch, Position, Record, Sample

if TYPE_CHECKING:
    from corefit.data.encode import Encoder

__all__ = ["Estimate", "Source", "Split", "Stream", "batches_of", "encode_all", "split_validation"]

GROUP_BYTES = 2**20
"""A group of records is encoded as soon as it has so many bytes, however few records these are."""


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


@dataclass(slots=True)
class _Read:
    source: int
    index: int
    record: Record | BadRecord | None
    """None: the epoch ends here."""
    weight: int
    after: _Cursor


@dataclass(slots=True)
class _Unit:
    """A record with samples, and the records without any that lie between it and the next one."""

    source: int
    index: int
    position: Position
    samples: list[Sample]
    gain: Ledger
    weight: int
    after: _Cursor
    first_ref: int = 0
    left: int = 0
    """Samples not packed yet."""
    ends_epoch: bool = False
    last: bool = False


class _Mark(NamedTuple):
    """Where the stream is after a pack."""

    cut: Mapping[str, Any]
    skip: int
    ledger: Ledger
    epoch: float


class Stream:
    """Batches for one rank.

    ``epochs``: 0 is no limit. ``held``: samples that the packer may hold. ``val_hashes``: content hashes of records
    that belong to the validation split. ``notices`` are lines for the user. ``ledger`` is ahead of the batches
    given; the one that fits a batch is in its state.
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
    ) -> None:
        """Index or hold the records of shuffled sources; read nothing else yet."""
        self.encoder, self.max_length, self.algorithm, self.held = encoder, max_length, algorithm, held
        self.overlong, self.epochs, self.val_hashes, self.pad_id = overlong, epochs, val_hashes, pad_id
        self.world, self.rank = world, rank
        self.notices: list[str] = []
        self._inputs = [Input(i, source, seed, self.notices) for i, source in enumerate(sources)]
        self._by_ratio = any(source.ratio is not None for source in sources)
        self._memo: dict[tuple[int, int], Outcome] | None = None
        self._reset()

    def _reset(self) -> None:
        self.ledger = Ledger()
        self._packer = Packer(self.algorithm, self.max_length, self.held)
        self._cursor = _Cursor(0, None, (At(),) * len(self._inputs))
        self._waiting: dict[int, tuple[_Unit, Sample]] = {}
        self._next_ref = self._skip = self._packed = 0
        self._epoch = 0.0

    @property
    def total_bytes(self) -> int | None:
        """About how many bytes one epoch reads; records where the reader doesn't say bytes; None: not known."""
        if not all(one.known for one in self._inputs):
            return None
        return sum(one.total * one.source.repeat for one in self._inputs)

    # -------------------------------------------------------------------------------------------- records -> packs

    def _records(self) -> Iterator[_Read]:
        epoch, epoch_weight, sources = self._cursor.epoch, self._cursor.epoch_weight, list(self._cursor.sources)
        open_passes: dict[int, Iterator[tuple[int, Record | BadRecord]]] = {}
        while not self.epochs or epoch < self.epochs:
            live = [one for one in self._inputs if sources[one.number].passes < one.source.repeat]
            if not live:
                epoch, epoch_weight = epoch + 1, sum(at.weight for at in sources)
                sources = [At()] * len(sources)
                yield _Read(0, 0, None, 0, _Cursor(epoch, epoch_weight, tuple(sources)))
                continue
            one = min(live, key=lambda one: one.share(sources[one.number], self._by_ratio))
            at = sources[one.number]
            if one.number not in open_passes:
                open_passes[one.number] = one.read(epoch * one.source.repeat + at.passes, at)
            found = next(open_passes[one.number], None)
            if found is None:
                del open_passes[one.number]
                sources[one.number] = At(at.passes + 1, 0, at.records, at.weight)
                continue
            index, record = found
            position = None if one.source.shuffle else Position(record.file, record.line, record.offset)
            weight = one.weight(record)
            sources[one.number] = At(at.passes, at.taken + 1, at.records + 1, at.weight + weight, position)
            yield _Read(one.number, index, record, weight, _Cursor(epoch, epoch_weight, tuple(sources)))

    def _outcomes(self, pairs: Iterable[tuple[Source, Record | BadRecord]]) -> list[Outcome]:
        return outcomes_of(pairs, self.encoder, self.max_length, self.overlong, self.val_hashes)

    def _encode(self, group: list[_Read]) -> Iterator[tuple[_Read, Outcome]]:
        memo = {} if self._memo is None else self._memo
        new = [read for read in group if read.record is not None and (read.source, read.index) not in memo]
        pairs = [(self._inputs[read.source].source, read.record) for read in new if read.record is not None]
        found = self._outcomes(pairs)
        memo.update(((read.source, read.index), out) for read, out in zip(new, found, strict=True))
        for read in group:
            yield read, Outcome() if read.record is None else memo[read.source, read.index]

    def _encoded(self) -> Iterator[tuple[_Read, Outcome]]:
        group: list[_Read] = []
        for read in self._records():
            group.append(read)
            if len(group) >= GROUP_RECORDS or sum(one.weight for one in group) >= GROUP_BYTES:
                yield from self._encode(group)
                group = []
        yield from self._encode(group)

    def _units(self) -> Iterator[_Unit]:
        unit: _Unit | None = None
        gain, weight = Ledger(), 0  # of records before the first unit
        for read, out in self._encoded():
            if out.error is not None:
                if unit is not None:
                    yield unit
                raise out.error
            if out.samples and read.record is not None:
                if unit is not None:
                    yield unit
                position = Position(read.record.file, read.record.line, read.record.offset)
                unit = _Unit(read.source, read.index, position, list(out.samples), gain, weight, read.after)
                gain, weight = Ledger(), 0
            elif unit is None and read.record is None and not self.ledger.records.used + self.ledger.records.pending:
                raise self._nothing(gain)
            target = gain if unit is None else unit.gain
            target.add(out.gain)
            if unit is None:
                weight += read.weight
            else:
                unit.weight += read.weight
                unit.after = read.after
                unit.ends_epoch |= read.record is None
        if unit is not None:
            unit.last = True
            yield unit

    def _nothing(self, gain: Ledger) -> DataError:
        paths = [str(path) for one in self._inputs for path in one.source.sources.paths]
        where = paths[0] if paths else f"reader {self._inputs[0].source.reader.name}"
        reasons = [f"{reason} {n:,}" for reason, n in gain.records.dropped.items()]
        reasons += [f"validation {gain.records.validation:,}"] if gain.records.validation else []
        return DataError(
            f"{where}: no sample in {gain.records.read:,} records ({', '.join(reasons) or 'none read'}); "
            f"corefit inspect shows what becomes of each"
        )

    def _packs(self) -> Iterator[tuple[list[Sample], _Mark]]:
        cut, skip = self._cut(), 0
        for unit in self._units():
            self.ledger.add(unit.gain)
            unit.first_ref, unit.left, self._cursor = self._next_ref, len(unit.samples), unit.after
            closed = []
            for sample in unit.samples:
                self._waiting[self._next_ref] = unit, sample
                closed += self._packer.add(self._next_ref, len(sample.input_ids))
                self._next_ref += 1
            unit.samples = []
            if unit.last or (unit.ends_epoch and self.algorithm == "best_fit_decreasing"):
                closed += self._packer.flush()
            for number, refs in enumerate(closed, 1):
                samples = [self._release(ref) for ref in refs]
                epoch = self._progress()
                cut, skip = (self._cut(), 0) if number == len(closed) else (cut, skip + 1)
                yield samples, _Mark(cut, skip, self.ledger.copy(), epoch)

    def _release(self, ref: int) -> Sample:
        unit, sample = self._waiting.pop(ref)
        unit.left -= 1
        self._packed += 0 if unit.left else unit.weight
        self.ledger.release(tokens=len(sample.input_ids), supervised=sample.n_supervised, last=not unit.left)
        return sample

    def _progress(self) -> float:
        whole = self._cursor.epoch_weight or self.total_bytes or sum(one.total for one in self._inputs)
        value = self._packed / max(1, whole)
        self._epoch = max(self._epoch, min(value, float(self.epochs)) if self.epochs else value)
        return self._epoch

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
        packs = islice(self._packs(), self._skip, None)
        while step := list(islice(packs, packs_per_step)):
            yield tuple(self._step([step[i : i + at_once] for i in range(0, len(step), at_once)]))

    def _step(self, rounds: list[list[tuple[list[Sample], _Mark]]]) -> Iterator[Batch]:
        """Give the batches of this rank; a round is one micro-batch on every rank."""
        mine = [[pack for pack, _ in round_[self.rank :: self.world]] for round_ in rounds]
        n_mine = sum(map(bool, mine))  # only the last round can lack a pack for this rank
        for number, packs in enumerate(mine[: max(1, n_mine)]):
            batch = assemble(packs, max_length=self.max_length, pad_id=self.pad_id) if packs else None
            last = number + 1 >= n_mine
            for covered in rounds[number:] if last else rounds[number : number + 1]:
                self._count_slots([pack for pack, _ in covered], batch if covered is rounds[number] else None)
            if batch is not None:
                mark = rounds[-1 if last else number][-1][1]
                mark.ledger.slots = copy.copy(self.ledger.slots)
                state = {"epoch": mark.epoch, "ledger": mark.ledger.as_dict(), "skip": mark.skip, "cut": mark.cut}
                yield replace(batch, state=state)

    def _count_slots(self, packs: list[list[Sample]], own: Batch | None) -> None:
        slots = self.ledger.slots
        for rank in range(min(self.world, len(packs))):
            used = [[len(sample.input_ids) for sample in pack] for pack in packs[rank :: self.world]]
            targets = sum(sample.n_supervised for pack in packs[rank :: self.world] for sample in pack)
            width = padded(max(map(sum, used)))
            slots.total += width * len(used)
            slots.supervised += own.n_supervised if own is not None and rank == self.rank else targets
            slots.masked += sum(map(sum, used)) - targets
            slots.padding += sum(width - sum(pack) for pack in used)

    # ---------------------------------------------------------------------------------------------------- the state

    def _cut(self) -> dict[str, Any]:
        """Give all that is needed to go on from here: positions of records, and what is in the packer, by refs."""
        packs, window = self._packer.state()
        refs = sorted([ref for _, pack in packs for ref in pack] + window)
        units = list({id(unit): unit for unit, _ in map(self._waiting.__getitem__, refs)}.values())
        # counted anew from what the packer really holds: a sample lost on the way makes the ledger unbalanced
        self.ledger.records.pending = len(units)
        self.ledger.tokens.pending = sum(len(self._waiting[ref][1].input_ids) for ref in refs)
        ledger = self.ledger.as_dict()
        return {
            "cursor": [self._cursor.epoch, self._cursor.epoch_weight, [list(at) for at in self._cursor.sources]],
            "held": [[one.source, one.index, list(one.position), one.weight, one.first_ref] for one in units],
            "packs": packs,
            "window": window,
            "next_ref": self._next_ref,
            "packed": self._packed,
            "epoch": self._epoch,
            "ledger": {name: ledger[name] for name in ("records", "tokens", "messages")},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where ``Batch.state`` was taken; ``steps`` then gives exactly the batches that came after it.

        Reads and encodes the records again whose samples were held.

        Raises:
            CheckpointError: the data isn't what it was.
        """
        self._reset()
        cut = state["cut"]
        epoch, epoch_weight, sources = cut["cursor"]
        if len(sources) != len(self._inputs):
            raise CheckpointError(f"the checkpoint has {len(sources)} data sources, the recipe {len(self._inputs)}")
        places = (At(*at)._replace(position=at[4] and Position(*at[4])) for at in sources)
        self._cursor = _Cursor(epoch, epoch_weight, tuple(places))
        self.ledger = Ledger.from_dict({**cut["ledger"], "slots": state["ledger"]["slots"]})
        self._skip, self._packed, self._epoch = state["skip"], cut["packed"], cut["epoch"]
        self._next_ref = cut["next_ref"]
        refs = {ref for _, pack in cut["packs"] for ref in pack} | set(cut["window"])
        for one in self._inputs:
            held = [row for row in cut["held"] if row[0] == one.number]
            records = one.fetch([(row[1], Position(*row[2])) for row in held])
            pairs = [(one.source, record) for record in records]
            for row, out in zip(held, self._outcomes(pairs), strict=False):
                unit = _Unit(one.number, row[1], Position(*row[2]), [], Ledger(), row[3], self._cursor, row[4])
                for ref, sample in enumerate(out.samples, unit.first_ref):
                    if ref in refs:
                        self._waiting[ref] = unit, sample
                        unit.left += 1
        lengths = {ref: len(sample.input_ids) for ref, (_, sample) in self._waiting.items()}
        if set(lengths) != refs or sum(lengths.values()) != self.ledger.tokens.pending:
            raise CheckpointError("the data, the template or the tokenizer changed since the checkpoint was written")
        self._packer.load(cut["packs"], cut["window"], lengths)

    # ---------------------------------------------------------------------------------------------------- estimate

    def estimate(self) -> Estimate:
        """Say how much there is to read, from at most about 200 records; the stream itself stays where it is."""
        quota = max(20, ESTIMATE_RECORDS // len(self._inputs))
        heads = [list(islice(one.source.read(), quota + 1)) for one in self._inputs]
        if all(len(head) <= quota for head in heads):
            twin = copy.copy(self)
            twin.epochs, twin._memo = min(self.epochs or 1, 50), {}
            twin._reset()
            n = sum(1 for _ in twin._packs())
            n_samples = sum(len(out.samples) * self._inputs[s].source.repeat for (s, _), out in twin._memo.items())
            n_records = sum(len(head) * one.source.repeat for head, one in zip(heads, self._inputs, strict=True))
            total = round(n * self.epochs / twin.epochs) if self.epochs else None
            return Estimate(n_records, n_samples, -(-n // twin.epochs), total, twin.epochs == (self.epochs or 1))
        sums = np.zeros(3)
        for one, head in zip(self._inputs, heads, strict=True):
            outcomes = self._outcomes([(one.source, record) for record in head])
            if error := next((out.error for out in outcomes if out.error), None):
                raise error
            lengths = [len(sample.input_ids) for out in outcomes for sample in out.samples]
            packs = max(len(first_fit_decreasing(lengths, self.max_length)) - 0.5, 0.0)  # the last is half full
            scale = one.total / max(1, sum(map(one.weight, head))) if one.n is None else one.n / max(1, len(head))
            sums += np.array([len(head), len(lengths), packs]) * max(1.0, scale) * one.source.repeat
        n_records, n_samples, n = (max(1, round(value)) for value in sums)
        return Estimate(n_records, n_samples, n, n * self.epochs or None, exact=False)


def batches_of(samples: Sequence[Sample], *, max_length: int, micro_batch: int, pad_id: int = 0) -> list[Batch]:
    """Pack all samples with as little padding as possible, and give the micro-batches, longest samples first."""
    plan = best_fit_decreasing([len(sample.input_ids) for sample in samples], max_length)
    packs = [[samples[i] for i in pack] for pack in plan.packs()]
    groups = (packs[i : i + micro_batch] for i in range(0, len(packs), micro_batch))
    return [assemble(group, max_length=max_length, pad_id=pad_id, state={}) for group in groups]
