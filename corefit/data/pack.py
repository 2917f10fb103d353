"""Lengths -> plan: which samples share a pack.

Every plan depends on the lengths, their order and the capacity alone. The kernel and its twin here give the same bits.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from corefit.data import kernel

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

ALGORITHMS = ("first_fit", "first_fit_decreasing", "best_fit_decreasing")
CAPACITY = 2**24
"""The largest pack."""
OPEN_PACKS = 64
"""Packs that ``first_fit`` keeps open when it streams."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Which sample goes into which pack: pack k is ``order[offsets[k] : offsets[k + 1]]``, in order of placement."""

    order: NDArray[np.int32]
    """int32 [N]: indices of samples, each once."""
    offsets: NDArray[np.int64]
    """int64 [packs + 1]"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def packs(self) -> list[list[int]]:
        """Give the same as lists."""
        return [self.order[a:b].tolist() for a, b in pairwise(self.offsets.tolist())]


def _checked(lengths: ArrayLike, capacity: int) -> NDArray[np.int32]:
    if not 1 <= capacity <= CAPACITY:
        raise ValueError(f"capacity must be in [1, {CAPACITY:,}], got {capacity:,}")
    array = np.asarray(lengths)
    if not array.size:
        return np.empty(0, np.int32)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise TypeError(f"lengths must be integers in one dimension, got {array.dtype} in {array.ndim}")
    low, high = array.min(), array.max()
    if low < 1 or high > capacity:
        raise ValueError(f"lengths must be in [1, {capacity}], got {low} to {high}")
    return np.ascontiguousarray(array, np.int32)


def _plan(lengths: ArrayLike, capacity: int, *, best: bool, open_packs: int | None = None) -> Plan:
    array = _checked(lengths, capacity)
    most = array.size + 1 if open_packs is None else min(open_packs, array.size + 1)
    if most < 1:
        raise ValueError(f"open_packs must be at least 1, got {open_packs}")
    if kernel.compiled is not None:
        order, offsets = np.empty(array.size, np.int32), np.empty(array.size + 1, np.int64)
        n = kernel.compiled.plan(array, order, offsets, capacity, best, most)
        return Plan(order, offsets[: n + 1])
    placed = np.argsort(-array, kind="stable") if best else np.arange(array.size)
    sizes = array[placed].tolist()
    packs = np.array(_best_fit(sizes, capacity) if best else _first_fit(sizes, capacity, most), np.int64)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(packs))]).astype(np.int64)
    return Plan(placed[np.argsort(packs, kind="stable")].astype(np.int32), offsets)


def _first_fit(lengths: list[int], capacity: int, open_packs: int) -> list[int]:
    """Give the pack of each length; a tournament tree over free slots finds the first that fits."""
    # of two neighbouring packs at least one is half full, so this many leaves always do
    size = 1 << (2 * sum(lengths) // capacity + 2).bit_length()
    tree = [capacity] * (2 * size)
    packs: list[int] = []
    n_packs = 0

    def leave(node: int, room: int) -> None:
        tree[node] = room
        while node > 1:
            node //= 2
            largest = max(tree[2 * node], tree[2 * node + 1])
            if tree[node] == largest:
                break
            tree[node] = largest

    for length in lengths:
        node = 1
        while node < size:
            node *= 2
            if tree[node] < length:
                node += 1
        packs.append(node - size)
        leave(node, tree[node] - length)
        if packs[-1] == n_packs:
            n_packs += 1
            if n_packs > open_packs:
                leave(node - open_packs, 0)
    return packs


def _best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Give the pack of each length; a bit for every number of free slots that some pack has finds the fullest."""
    free: dict[int, list[int]] = {}  # heaps of packs by free slots
    some = 0  # bit r: a pack with r free slots exists
    packs: list[int] = []
    n_packs = 0
    for length in lengths:
        fits = some >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            pack = heapq.heappop(free[room])
            some ^= 0 if free[room] else 1 << room
        else:
            pack, room, n_packs = n_packs, capacity, n_packs + 1
        packs.append(pack)
        heapq.heappush(free.setdefault(room - length, []), pack)
        some |= 1 << (room - length)
    return packs


def first_fit(lengths: ArrayLike, capacity: int, *, open_packs: int | None = None) -> Plan:
    """Put each sample, in order, into the first pack that still has room for it.

    Args:
        lengths: tokens of each sample, in [1, capacity]; int32 is taken as it is, other integers are converted.
        capacity: slots of a pack, in [1, 2^24].
        open_packs: only so many packs, the youngest, may still be added to; None: all.

    Raises:
        TypeError: lengths are no integers. ValueError: one of them, or the capacity, is out of range.

    >>> first_fit([3, 4, 1], 4).packs()
    [[0, 2], [1]]
    """
    return _plan(lengths, capacity, best=False, open_packs=open_packs)


def best_fit_decreasing(lengths: ArrayLike, capacity: int) -> Plan:
    """From long to short, each sample goes into the fullest pack that has room, of equally full ones the first.

    Arguments and errors as for ``first_fit``.

    >>> best_fit_decreasing([5, 3, 2, 4], 8).packs()
    [[0, 1], [3, 2]]
    """
    return _plan(lengths, capacity, best=True)


class Streamed(NamedTuple):
    """What ``stream`` gives: the packs that closed, and what waits on."""

    order: NDArray[np.int32]
    """int32 [M]: indices of samples, pack by pack, ascending inside a pack."""
    offsets: NDArray[np.int64]
    """int64 [packs + 1]"""
    seen: NDArray[np.int64]
    """int64 [packs]: how many samples had been taken in when each pack closed."""
    rest: NDArray[np.int32]
    """int32 [N - M]: indices of the samples that are in no pack yet, ascending."""


def stream(
    algorithm: str,
    lengths: ArrayLike,
    capacity: int,
    *,
    held: int = 256,
    n_held: int = 0,
    ends: ArrayLike | None = None,
    flush: bool = False,
    open_packs: int = OPEN_PACKS,
) -> Streamed:
    """Pack samples as they arrive, with bounded memory and bounded waiting.

    Its only state is the samples that wait, in the order in which they came: handing those and new ones to the next
    call gives the packs of one call, wherever it is cut.

    ``first_fit_decreasing`` makes a pack whenever ``held`` samples wait: the one that has waited longest, then again
    and again the longest that still fits (of equal ones the oldest). So no pack closes without its oldest sample, and a
    sample is in one of the first ``held`` packs that close after it came (with records of several samples: as many
    packs as samples waited then).

    ``first_fit`` puts each sample into the first open pack that has room, and closes the oldest when more than
    ``open_packs`` are open or more than ``held`` samples wait.

    ``best_fit_decreasing`` holds everything until ``flush``.

    Args:
        algorithm: one of ``ALGORITHMS``.
        lengths: tokens of each sample, in [1, capacity].
        capacity: slots of a pack.
        held: most samples that wait; more where one record brings more.
        n_held: so many of them waited before: they are taken in first, and only then packs may close.
        ends: [N], true where a sample is the last of its record: packs close only there; None: everywhere.
        flush: close everything at the end.
        open_packs: most packs that ``first_fit`` keeps open.

    Raises:
        ValueError: a length is out of range, or there is no such algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"no packing algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
    if held < 1 or open_packs < 1 or n_held < 0:
        raise ValueError("held and open_packs must be at least 1, n_held must not be negative")
    array = _checked(lengths, capacity)
    last = np.ones(len(array), np.uint8) if ends is None else np.ascontiguousarray(ends, np.uint8)
    if len(last) != len(array):
        raise ValueError(f"ends has {len(last):,} values for {len(array):,} lengths")
    if algorithm == "best_fit_decreasing":
        order, offsets, seen = _in_order_of_arrival(best_fit_decreasing(array[: len(array) * flush], capacity))
    elif kernel.compiled is not None:
        order, offsets = np.empty(len(array), np.int32), np.empty(len(array) + 1, np.int64)
        seen = np.empty(len(array), np.int64)
        decreasing = algorithm == "first_fit_decreasing"
        n = kernel.compiled.stream(
            array, last, order, offsets, seen, capacity, decreasing, held, n_held, flush, open_packs
        )
        order, offsets, seen = order[: offsets[n]], offsets[: n + 1], seen[:n]
    else:
        function = _stream_first_fit if algorithm == "first_fit" else _stream_decreasing
        closed = function(array.tolist(), last.tolist(), capacity, held, n_held, flush, open_packs)
        order = np.array([i for pack, _ in closed for i in pack], np.int32)
        offsets = np.cumsum([0, *(len(pack) for pack, _ in closed)], dtype=np.int64)
        seen = np.array([seen for _, seen in closed], np.int64)
    waits = np.ones(len(array), np.bool_)
    waits[order] = False
    return Streamed(order, offsets, seen, np.flatnonzero(waits).astype(np.int32))


def _in_order_of_arrival(plan: Plan) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Sort packs by their first sample and the samples of each, all seen at the end."""
    if not len(plan):
        return plan.order, plan.offsets, np.empty(0, np.int64)
    sizes = np.diff(plan.offsets)
    firsts = np.minimum.reduceat(plan.order, plan.offsets[:-1])
    order = plan.order[np.lexsort((plan.order, np.repeat(firsts, sizes)))]
    offsets = np.concatenate([[0], np.cumsum(sizes[np.argsort(firsts)])])
    return order, offsets, np.full(len(sizes), len(order), np.int64)


_Closed = list[tuple[list[int], int]]


def _stream_first_fit(
    sizes: list[int], may_close: list[int], capacity: int, held: int, n_held: int, flush: bool, open_packs: int
) -> _Closed:
    closed: _Closed = []
    packs: list[list[int]] = []
    used: list[int] = []
    waiting = 0
    for i in range(len(sizes) + 1):
        if i == n_held or (i > n_held and may_close[i - 1]):
            while len(packs) > open_packs or waiting > held:
                waiting -= len(packs[0])
                closed.append((packs.pop(0), i))
                used.pop(0)
        if i == len(sizes):
            break
        k = next((k for k, slots in enumerate(used) if slots + sizes[i] <= capacity), len(packs))
        if k == len(packs):
            packs.append([])
            used.append(0)
        packs[k].append(i)
        used[k] += sizes[i]
        waiting += 1
    return closed + ([(pack, len(sizes)) for pack in packs] if flush else [])


def _stream_decreasing(
    sizes: list[int], may_close: list[int], capacity: int, held: int, n_held: int, flush: bool, _: int
) -> _Closed:
    closed: _Closed = []
    keys: list[tuple[int, int]] = []  # (length, -index) of what waits, ascending: the last one that fits is taken
    packed = [False] * len(sizes)
    oldest = 0
    for i in range(len(sizes) + 1):
        at_end = i == len(sizes)
        may = i == n_held or (i > n_held and may_close[i - 1])
        while keys and ((may and len(keys) >= held) or (at_end and flush)):
            while packed[oldest]:
                oldest += 1
            pack, room, key = [], capacity, bisect_left(keys, (sizes[oldest], -oldest))
            while key >= 0:
                length, negative = keys.pop(key)
                packed[-negative] = True
                pack.append(-negative)
                room -= length
                key = bisect_right(keys, (room, 0)) - 1
            closed.append((sorted(pack), i))
        if not at_end:
            insort(keys, (sizes[i], -i))
    return closed
