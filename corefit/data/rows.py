"""Packs of samples -> the arrays of a micro-batch.

Two packs of 8 slots (``.`` is padding, which is a document too)::

    slot             0  1  2  3  4  5  6  7 | 8  9 10 11 12 13 14 15
    input_ids        a  a  a  b  b  c  c  c | d  d  d  d  d  e  .  .
    position_ids     0  1  2  0  1  0  1  2 | 0  1  2  3  4  0  0  1
    cu_seqlens       0        3     5         8              13 14   16
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corefit.data import kernel
from corefit.data.block import LENGTH, SPAN, SPANS, START, ranges
from corefit.types import IGNORE_INDEX

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from corefit.data.block import Block, Table


MIN_TOKENS = 2**18
"""Tokens that a window has room for, at least."""


class Rows(NamedTuple):
    """Arrays as in ``Batch``."""

    input_ids: NDArray[Any]
    labels: NDArray[Any]
    position_ids: NDArray[Any]
    cu_seqlens: NDArray[np.int32]
    n_supervised: int


def padded(slots: int) -> int:
    """Round up to a multiple of 8."""
    return -(-slots // 8) * 8


def gather(
    tokens: NDArray[Any],
    spans: Table,
    samples: Table,
    sizes: Table,
    *,
    width: int,
    pad_id: int,
    dtype: type[np.integer[Any]] = np.int64,
) -> Rows:
    """Write packs into rows of ``width`` slots.

    Args:
        tokens: int32 or uint16 [M].
        spans: int64 [S, 2], as in ``Block``.
        samples: int64 [N, 8], rows as in ``Block``, those of a pack side by side.
        sizes: int64 [P]: samples in each pack.
        width: slots of a row, at least the longest pack.
        pad_id: the id in slots that no sample takes.
        dtype: int64 or int32, of all arrays but ``cu_seqlens``.

    Raises:
        ValueError: a sample, its spans or a pack lies outside of what it points into.
    """
    packs = len(sizes)
    ids, labels, positions = np.empty((3, packs, width), dtype)  # one piece: it is given back to the next batch whole
    bounds = np.empty(len(samples) + packs + 1, np.int32)
    if kernel.compiled is not None:
        arrays = (tokens, spans, np.ascontiguousarray(samples), sizes, ids, labels, positions, bounds)
        documents, supervised = kernel.compiled.gather(*arrays, width, pad_id, IGNORE_INDEX)
    else:
        out = Rows(ids, labels, positions, bounds, 0)
        documents = _gather(tokens, spans, samples, sizes, width, pad_id, out)
        supervised = int((labels != IGNORE_INDEX).sum())
    return Rows(ids, labels, positions, bounds[: documents + 1], supervised)


def _gather(
    tokens: NDArray[Any], spans: Table, samples: Table, sizes: Table, width: int, pad_id: int, out: Rows
) -> int:
    if not len(sizes) or sizes.min() < 1 or sizes.sum() != len(samples):
        raise ValueError("sizes don't add up to the samples")
    used = np.add.reduceat(samples[:, LENGTH], np.cumsum(sizes) - sizes)
    starts, lengths = samples[:, START], samples[:, LENGTH]
    if (
        used.max() > width or lengths.min() < 1 or starts.min() < 0
        or (starts + lengths).max() > len(tokens) or (samples[:, SPAN] + samples[:, SPANS]).max() > len(spans)
    ):  # fmt: skip
        raise ValueError("samples, spans or packs lie outside of what they point into")
    out.labels.fill(IGNORE_INDEX)
    ids, labels, positions = (array.reshape(-1) for array in out[:3])
    bounds: list[int] = []
    row = 0
    for k, size in enumerate(sizes.tolist()):
        at, end = k * width, (k + 1) * width
        for start, length, span, n, stop, *_ in samples[row : row + size].tolist():
            ids[at : at + length] = tokens[start : start + length]
            if stop >= 0:
                ids[at + length - 1] = stop
            for first, last in spans[span : span + n].tolist():
                first, last = max(first, start + 1) - start, min(last, start + length) - start
                if first < last:
                    labels[at + first - 1 : at + last - 1] = ids[at + first : at + last]
            positions[at : at + length] = np.arange(length)
            bounds.append(at)
            at += length
        row += size
        if at < end:
            ids[at:end] = pad_id
            positions[at:end] = np.arange(end - at)
            bounds.append(at)
    out.cu_seqlens[: len(bounds) + 1] = [*bounds, len(sizes) * width]
    return len(bounds)


def stack(parts: Sequence[Rows]) -> Rows:
    """Join rows of one width."""
    ids, labels, positions = (np.concatenate([part[i] for part in parts]) for i in range(3))
    before = np.cumsum([0, *(part.input_ids.size for part in parts[:-1])]).astype(np.int32)
    bounds = [part.cu_seqlens[:-1] + slots for part, slots in zip(parts, before, strict=True)]
    cu_seqlens = np.concatenate([*bounds, np.array([ids.size], np.int32)])
    return Rows(ids, labels, positions, cu_seqlens, sum(part.n_supervised for part in parts))


class Window:
    """Tokens and spans of the samples that wait, in one buffer, so that a micro-batch is one gather.

    Buffers are only ever added to; where one is full, what still waits moves to a new one. So rows that were given out
    stay good together with the buffers of that moment. Samples of an arena are used where they lie.
    """

    def __init__(self, arena: Block | None = None) -> None:
        """``arena``: every block to come is a part of it."""
        self._in_place = arena is not None
        self.tokens: NDArray[Any] = np.empty(0, np.int32) if arena is None else arena.tokens
        self.spans: Table = np.empty((0, 2), np.int64) if arena is None else arena.spans
        self._n_tokens = self._n_spans = 0  # written

    def add(self, held: Table, block: Block) -> Table:
        """Take in a block's samples; give the rows of those held and of these, for the buffers of now."""
        if self._in_place:
            return np.concatenate([held, block.samples])
        n, m = len(block.tokens), len(block.spans)
        if self._n_tokens + n > len(self.tokens) or self._n_spans + m > len(self.spans):
            held = self._move(held, n, m)
        rows = block.samples.copy()
        rows[:, START] += self._n_tokens
        rows[:, SPAN] += self._n_spans
        self.tokens[self._n_tokens : self._n_tokens + n] = block.tokens
        self.spans[self._n_spans : self._n_spans + m] = block.spans + self._n_tokens
        self._n_tokens, self._n_spans = self._n_tokens + n, self._n_spans + m
        return np.concatenate([held, rows])

    def _move(self, held: Table, n: int, m: int) -> Table:
        """Begin new buffers with what is held and room for as much again, and for n tokens and m spans."""
        old_tokens, old_spans, held = self.tokens, self.spans, held.copy()
        start, length, span, count = held[:, [START, LENGTH, SPAN, SPANS]].T
        to, self._n_tokens, self._n_spans = np.cumsum(length) - length, int(length.sum()), int(count.sum())
        self.tokens = np.empty(max(2 * (self._n_tokens + n), MIN_TOKENS), np.int32)
        self.spans = np.empty((max(2 * (self._n_spans + m), MIN_TOKENS // 64), 2), np.int64)
        parts = [old_tokens[a : a + size] for a, size in zip(start.tolist(), length.tolist(), strict=True)]
        np.concatenate([old_tokens[:0], *parts], out=self.tokens[: self._n_tokens])
        # a piece of a long document shares its span with the others: only what lies in it moves along
        moved = old_spans[ranges(span, count)] - np.repeat(start, count)[:, None]
        self.spans[: self._n_spans] = (
            np.clip(moved, 0, np.repeat(length, count)[:, None]) + np.repeat(to, count)[:, None]
        )
        held[:, START], held[:, SPAN] = to, np.cumsum(count) - count
        return held
