"""Single samples in and out of the tables that the stations work on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from corefit.data.block import DROPPED, LENGTH, RECORD_COLUMNS, TRUNCATED, WORDS, Block, fit
from corefit.data.rows import Rows, gather, padded
from corefit.data.source import encode_items, items_of
from corefit.proofs import Proof, data_proofs
from corefit.types import Sample


class Result(NamedTuple):
    """What became of one item."""

    sample: Sample | None
    drop: str | None
    notes: tuple[str, ...]


class Fitted(NamedTuple):
    """What became of one sample."""

    samples: tuple[Sample, ...]
    n_truncated_tokens: int
    n_dropped_tokens: int
    drop: str | None


def encode_each(encoder, items) -> list[Result]:
    made = encoder.encode(items)
    block = Block(np.zeros((len(items), RECORD_COLUMNS), np.int64), made.samples, made.tokens, made.spans, made.cuts)
    found = {row[6]: block.sample(i, items[row[6]][1]) for i, row in enumerate(made.samples.tolist())}
    return [Result(found.get(i), made.drops[i], tuple(made.notes[i])) for i in range(len(items))]


def proved(plan, records) -> Iterator[Proof]:
    """Give the proofs of what records become, as a run starts with."""
    items = items_of(records, plan.encoder.supervise)
    return data_proofs(plan, items, *encode_items(items, plan.encoder))


def labels_in_place(sample: Sample) -> list[int]:
    """Give the labels as XTuner writes them: each target at its own token, not at the one before it."""
    ids = sample.input_ids.tolist()
    labels = [-100] * len(ids)
    for start, end in sample.spans.tolist():
        labels[start:end] = ids[start:end]
    return labels


def block_of(*samples: Sample) -> Block:
    """Give a block in which every sample is a record."""
    lengths = [len(sample.input_ids) for sample in samples]
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    spans = [sample.spans.astype(np.int64) + start for sample, start in zip(samples, starts, strict=True)]
    cuts = [[] if s.cuts is None else s.cuts.astype(np.int64) + at for s, at in zip(samples, starts, strict=True)]
    firsts = np.cumsum([0, *map(len, spans)])[:-1].tolist()
    table = [
        [starts[i], lengths[i], firsts[i], len(spans[i]), -1, sample.n_supervised, i, 0]
        for i, sample in enumerate(samples)
    ]
    records = np.zeros((len(samples), RECORD_COLUMNS), np.int64)
    return Block(
        records=records,
        samples=np.array(table, np.int64).reshape(-1, 8),
        tokens=np.concatenate([np.empty(0, np.int32), *(sample.input_ids for sample in samples)]),
        spans=np.concatenate([np.empty((0, 2), np.int64), *spans]),
        cuts=np.concatenate([np.empty(0, np.int64), *cuts]).astype(np.int64),
        names=[sample.origin.rpartition(":")[0] for sample in samples],
    )


def fit_one(sample: Sample, max_length: int, overlong: str) -> Fitted:
    block = block_of(sample)
    block.records[0, 2:4] = 0, int(sample.origin.rpartition(":")[2] or 0)
    made = fit(block, max_length, overlong)
    if made.error is not None:
        raise made.error
    samples = tuple(made.sample(i, sample.origin) for i in range(len(made.samples)))
    record = made.records[0]
    drops = made.words[record[WORDS]].drops
    return Fitted(samples, int(record[TRUNCATED]), int(record[DROPPED]), drops[0] if drops else None)


def rows_of(packs, *, max_length: int, pad_id: int) -> Rows:
    block = block_of(*(sample for pack in packs for sample in pack))
    longest = max((sum(len(sample.input_ids) for sample in pack) for pack in packs), default=0)
    width = padded(longest)
    assert longest <= max_length or longest == 0
    sizes = np.array([len(pack) for pack in packs], np.int64)
    return gather(block.tokens, block.spans, block.samples, sizes, width=width, pad_id=pad_id)


def n_tokens(block: Block) -> int:
    return int(block.samples[:, LENGTH].sum())
