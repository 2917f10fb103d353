"""Records and their samples as tables: what passes between encoding, packing and the arena on disk.

A ``Block`` holds some records in the order in which they are read. Its tables are int64 with one row a record and one
row a sample; the constants below are their columns. Tokens and spans of all samples lie side by side; a sample is a
range of them, so that cutting one moves no token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corefit.data.ledger import Ledger, count
from corefit.errors import CorefitError, DataError
from corefit.types import Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Table = NDArray[np.int64]

# of a record: which source, its index there in file order, file, line, byte offset, bytes; its first sample and how
# many; 1 where it belongs to the validation split; tokens; messages; which Words, which name; its content hash (or 0)
(SOURCE, INDEX, FILE, LINE, OFFSET, WEIGHT, FIRST, SAMPLES, VALIDATION, ENCODED, TRUNCATED, DROPPED, MESSAGES, WORDS,
 NAME, HASH, RECORD_COLUMNS) = range(17)  # fmt: skip
# of a sample: first token, tokens, first span, spans, the token that stands in for its last one (-1: none), supervised
# tokens, row of its record, its number within the record; rows.c knows them too
START, LENGTH, SPAN, SPANS, STOP, SUPERVISED, RECORD, ORDINAL, SAMPLE_COLUMNS = range(9)


class Words(NamedTuple):
    """What the ledger counts under a word."""

    drops: tuple[str, ...] = ()
    """Why items of the record are left out."""
    messages: tuple[str, ...] = ()
    """Why messages are left out."""
    notes: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Block:
    """Some records and their samples."""

    records: Table
    """int64 [R, RECORD_COLUMNS]"""
    samples: Table
    """int64 [N, SAMPLE_COLUMNS], those of a record side by side, records in order"""
    tokens: NDArray[np.int32] | NDArray[np.uint16]
    """[M]"""
    spans: Table
    """int64 [S, 2]: half-open ranges of ``tokens`` that are targets, those of a sample ascending and disjoint."""
    cuts: Table
    """int64 [C], ascending: offsets in ``tokens`` where a turn begins; a sample with none of them is a document."""
    words: Sequence[Words] = field(default_factory=lambda: [Words()])
    """What ``WORDS`` refers to."""
    names: Sequence[str] = ()
    """What ``NAME`` refers to: the first half of an origin."""
    error: CorefitError | None = None
    """What stops the run once the records of this block are packed."""

    def origin(self, record: int) -> str:
        """Give ``path:line`` of a record."""
        return f"{self.names[self.records[record, NAME]]}:{self.records[record, LINE]}"

    def sample(self, row: int, origin: str = "") -> Sample:
        """Give one sample as arrays of its own; spans and cuts count from its first token."""
        start, length, span, spans, stop = self.samples[row, :SUPERVISED].tolist()
        ids = self.tokens[start : start + length].astype(np.int32)
        if stop >= 0:
            ids[-1] = stop
        ranges = np.clip(self.spans[span : span + spans] - start, 0, length)
        cuts = self.cuts[slice(*np.searchsorted(self.cuts, (start, start + length)))] - start
        return Sample(
            input_ids=ids,
            spans=ranges[ranges[:, 0] < ranges[:, 1]].astype(np.int32),
            origin=origin,
            cuts=cuts.astype(np.int32) if len(cuts) else None,
        )


def link(records: Table, samples: Table) -> None:
    """Fill in which samples are whose and how many, in both tables, by the ``RECORD`` of each sample."""
    records[:, SAMPLES] = np.bincount(samples[:, RECORD], minlength=len(records))
    records[:, FIRST] = np.cumsum(records[:, SAMPLES]) - records[:, SAMPLES]
    samples[:, ORDINAL] = np.arange(len(samples)) - records[samples[:, RECORD], FIRST]


def gains(block: Block, end: int) -> Ledger:
    """Give what the ledger gains from the first ``end`` records of a block, but for what becomes of their samples."""
    ledger = Ledger()
    rows = block.records[:end]
    totals = rows.sum(axis=0).tolist()
    ledger.records.read, ledger.records.validation = len(rows), totals[VALIDATION]
    ledger.messages.total = totals[MESSAGES]
    tokens = ledger.tokens
    tokens.encoded, tokens.truncated, tokens.dropped = totals[ENCODED], totals[TRUNCATED], totals[DROPPED]
    for kept in (False, True):
        chosen = rows[((rows[:, SAMPLES] > 0) == kept) & (rows[:, VALIDATION] == 0), WORDS]
        for word, n in Counter(chosen.tolist()).items():
            words = block.words[word]
            drops = words.drops if kept else (words.drops or ("no_items",))[:1]
            for counts, said in (
                (ledger.records.parts_dropped if kept else ledger.records.dropped, drops),
                (ledger.messages.dropped, words.messages),
                (ledger.messages.notes, words.notes),
            ):
                for one in said:
                    count(counts, one, n)
    return ledger


def ranges(firsts: Table, counts: Table) -> Table:
    """Give the indices of so many rows from each first one on, one range after the other."""
    return np.repeat(firsts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def select(block: Block, rows: NDArray[np.int64]) -> Block:
    """Give the block of these records, in this order; no token moves."""
    records: Table = block.records[rows]
    counts = records[:, SAMPLES]
    samples = block.samples[ranges(records[:, FIRST], counts)]
    samples[:, RECORD] = np.repeat(np.arange(len(records)), counts)
    records[:, FIRST] = np.cumsum(counts) - counts
    return replace(block, records=records, samples=samples)


def moved(block: Block, before: Mapping[str, int], words: dict[Words, int]) -> tuple[Table, Table]:
    """Give records and samples with indices for where so many rows of each array precede the block.

    ``words``: those of what precedes it, to which its own are added.
    """
    records, samples = block.records.copy(), block.samples.copy()
    records[:, FIRST] += before["samples"]
    records[:, WORDS] = np.array([intern(words, one) for one in block.words], np.int64)[records[:, WORDS]]
    samples[:, START] += before["tokens"]
    samples[:, SPAN] += before["spans"]
    samples[:, RECORD] += before["records"]
    return records, samples


def join(blocks: Sequence[Block]) -> Block:
    """Give the blocks as one, in order; where they have their tokens in common, these stay in place."""
    together = all(block.tokens is blocks[0].tokens for block in blocks)
    arrays: dict[str, list[NDArray[Any]]] = {name: [] for name in ("records", "samples", "tokens", "spans", "cuts")}
    words: dict[Words, int] = {}
    before = dict.fromkeys(arrays, 0)
    for block in blocks:
        tables = moved(block, before, words)
        shifted = () if together else (block.tokens, block.spans + before["tokens"], block.cuts + before["tokens"])
        for name, array in zip(arrays, (*tables, *shifted), strict=False):
            arrays[name].append(array)
            before[name] += len(array)
    merged: dict[str, Any] = {name: np.concatenate(parts) for name, parts in arrays.items() if parts}
    return replace(blocks[0], words=list(words), names=blocks[-1].names, error=blocks[-1].error, **merged)


def hold_out(block: Block, hashes: Table) -> Block:
    """Take the samples away from records with these content hashes: they belong to the validation split."""
    chosen = np.isin(block.records[:, HASH], hashes)
    if not chosen.any():
        return block
    records, samples = block.records.copy(), block.samples[~chosen[block.samples[:, RECORD]]]
    records[chosen, ENCODED:NAME], records[chosen, VALIDATION] = 0, 1
    link(records, samples)
    return replace(block, records=records, samples=samples)


# -------------------------------------------------------------------------------------------------------- fitting


def fit(block: Block, max_length: int, overlong: str) -> Block:
    """Make every sample fit ``max_length`` tokens, by the policy ``error``, ``drop``, ``truncate`` or ``split``.

    ``truncate`` keeps the head of a conversation, and the stop of an answer that it cuts. ``split`` cuts conversations
    between turns, repeating nothing; a turn that is longer by itself is truncated. Both cut documents anywhere, and
    lose nothing of them. What is lost is counted in the records' TRUNCATED and DROPPED. With ``error`` the block ends
    before the first long one, with the DataError that stops the run.
    """
    samples = block.samples
    long = np.flatnonzero(samples[:, LENGTH] > max_length)
    if not len(long):
        return block
    records, error = block.records.copy(), block.error
    listed, words = list(block.words), {one: i for i, one in enumerate(block.words)}
    if overlong == "error":
        first, length = samples[long[0], RECORD], samples[long[0], LENGTH]
        error = DataError(
            f"{block.origin(first)}: {length} tokens, pack.max_length is {max_length}; raise it, or set pack.overlong "
            "to truncate, split or drop"
        )
        records, samples = records[:first], samples[samples[:, RECORD] < first]
    else:
        made: list[list[list[int]]] = []
        for row in samples[long].tolist():
            kept, truncated, dropped = _fitted(block, row, max_length, overlong)
            record = records[row[RECORD]]
            record[TRUNCATED] += truncated
            record[DROPPED] += dropped
            if not kept:
                before = listed[record[WORDS]]
                reason = "overlong" if overlong == "drop" else "nothing_supervised"
                now = before._replace(drops=(*before.drops, reason))
                record[WORDS] = intern(words, now)
                if len(words) > len(listed):
                    listed.append(now)
            made.append(kept)
        counts = np.ones(len(samples), np.int64)
        counts[long] = [len(kept) for kept in made]
        ends = np.cumsum(counts)
        samples = np.repeat(samples, counts, axis=0)
        for kept, end in zip(made, ends[long].tolist(), strict=True):
            samples[end - len(kept) : end] = np.array(kept, np.int64).reshape(-1, SAMPLE_COLUMNS)
    link(records, samples)
    return replace(block, records=records, samples=samples, words=listed, error=error)


def intern(words: dict[Words, int], wanted: Words) -> int:
    """Give the number of ``wanted``, which is added where it is new; in order the keys are a block's ``words``."""
    return words.setdefault(wanted, len(words))


def _fitted(block: Block, row: list[int], max_length: int, overlong: str) -> tuple[list[list[int]], int, int]:
    """Give the rows that a long sample becomes, and how many tokens are truncated and dropped."""
    start, length = row[START], row[LENGTH]
    if overlong == "drop":
        return [], 0, length
    spans = block.spans[row[SPAN] : row[SPAN] + row[SPANS]]
    bounds = [start, start + length]
    turns = block.cuts[slice(*np.searchsorted(block.cuts, (start, start + length)))].tolist()
    if overlong == "split" or not turns:
        bounds = [start]
        if not turns:
            bounds += range(start + max_length, start + length, max_length)
        turns = [*(turn for turn in turns if turn > start), start + length]
        for turn, following in zip(turns, turns[1:], strict=False):
            if following - bounds[-1] > max_length and turn > bounds[-1]:
                bounds.append(turn)
        bounds.append(start + length)
    kept, truncated, dropped = [], 0, 0
    for begin, end in zip(bounds, bounds[1:], strict=False):
        size = min(end - begin, max_length)
        inside = np.flatnonzero((spans[:, 0] < begin + size) & (spans[:, 1] > begin))
        stop = -1
        if size < end - begin and len(inside) and spans[inside[-1], 1] > begin + size:  # an answer is cut
            if spans[inside[-1], 0] < begin + size - 1:
                stop = int(block.tokens[spans[inside[-1], 1] - 1])
            else:  # nothing but the stop would be left of it
                inside = inside[:-1]
        targets = np.clip(spans[inside], begin + 1, begin + size)  # nothing precedes the first token
        supervised = int((targets[:, 1] - targets[:, 0]).sum())
        if supervised:
            first = row[SPAN] + int(inside[0])
            kept.append([begin, size, first, len(inside), stop, supervised, row[RECORD], 0])
            truncated += end - begin - size
        else:
            dropped += end - begin
    return kept, truncated, dropped
