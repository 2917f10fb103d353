"""Lengths -> plan, samples -> packs, packs -> a batch.

A pack holds whole samples, side by side; each is a document of its own for the model. Two packs of 8 slots
(``.`` is padding, which is a document too)::

    slot             0  1  2  3  4  5  6  7 | 8  9 10 11 12 13 14 15
    input_ids        a  a  a  b  b  c  c  c | d  d  d  d  d  e  .  .
    position_ids     0  1  2  0  1  0  1  2 | 0  1  2  3  4  0  0  1
    cu_seqlens       0        3     5         8              13 14   16

Every plan depends on the lengths, their order and the capacity alone. This is the pure-Python twin of the kernel
that takes over ``first_fit``, ``first_fit_decreasing`` and ``best_fit_decreasing`` behind the same interface.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from corefit.types import IGNORE_INDEX, Batch, Sample

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

ALGORITHMS = ("first_fit", "first_fit_decreasing", "best_fit_decreasing")
OPEN_PACKS = 64
"""Packs that ``first_fit`` keeps open when it streams."""
CARRIED_WINDOWS = 4
"""Windows for which ``first_fit_decreasing`` carries a pack that isn't full enough."""


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


def _checked(lengths: ArrayLike, capacity: int) -> NDArray[np.int64]:
    array = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if array.size and not (0 < array.min() and array.max() <= capacity):
        raise ValueError(f"lengths must be in [1, {capacity}], got {array.min()} to {array.max()}")
    return array


def _plan(placed: NDArray[np.int64], pack_of: list[int], n_packs: int) -> Plan:
    packs = np.asarray(pack_of, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(packs, minlength=n_packs))])
    return Plan(placed[np.argsort(packs, kind="stable")].astype(np.int32), offsets.astype(np.int64))


def _first_fit(lengths: list[int], capacity: int, used: Sequence[int]) -> list[int]:
    """Give the pack of each length; a tournament tree over free slots finds the first that fits."""
    # at most one of the packs opened here ends half empty, so this many leaves always do
    size = 1 << (len(used) + 2 * sum(lengths) // capacity + 2).bit_length()
    tree = [capacity] * (2 * size)
    tree[size : size + len(used)] = [capacity - slots for slots in used]
    for node in range(size - 1, 0, -1):
        tree[node] = max(tree[2 * node], tree[2 * node + 1])
    packs = []
    for length in lengths:
        node = 1
        while node < size:
            node *= 2
            if tree[node] < length:
                node += 1
        packs.append(node - size)
        tree[node] -= length
        while node > 1:
            node //= 2
            largest = max(tree[2 * node], tree[2 * node + 1])
            if tree[node] == largest:
                break
            tree[node] = largest
    return packs


def first_fit(lengths: ArrayLike, capacity: int, *, open_packs: int | None = None, used: Sequence[int] = ()) -> Plan:
    """Put each sample, in order, into the first pack that still has room for it.

    Args:
        lengths: tokens of each sample, in [1, capacity].
        capacity: slots of a pack.
        open_packs: only so many packs, the youngest, may still be added to; None: all.
        used: slots already taken in packs that are open from before; these are the plan's first packs.

    Raises:
        ValueError: a length is out of range.

    >>> first_fit([3, 4, 1], 4).packs()
    [[0, 2], [1]]
    """
    array = _checked(lengths, capacity)
    if open_packs is not None:
        packer = Packer("first_fit", capacity, held=array.size + 1, open_packs=open_packs)
        packs = [pack for i, n in enumerate(array.tolist()) for pack in packer.add(i, n)] + packer.flush()
        pack_of = [k for k, pack in enumerate(packs) for _ in pack]
        return _plan(np.array([i for pack in packs for i in pack], dtype=np.int64), pack_of, len(packs))
    pack_of = _first_fit(array.tolist(), capacity, used)
    return _plan(np.arange(array.size), pack_of, max(len(used), max(pack_of, default=-1) + 1))


def first_fit_decreasing(lengths: ArrayLike, capacity: int, *, used: Sequence[int] = ()) -> Plan:
    """First-fit of the samples from long to short, equal ones in order. Arguments and errors as for ``first_fit``.

    >>> first_fit_decreasing([1, 3, 4], 4).packs()
    [[2], [1, 0]]
    """
    array = _checked(lengths, capacity)
    order = np.argsort(-array, kind="stable")
    pack_of = _first_fit(array[order].tolist(), capacity, used)
    return _plan(order, pack_of, max(len(used), max(pack_of, default=-1) + 1))


def best_fit_decreasing(lengths: ArrayLike, capacity: int) -> Plan:
    """From long to short, each sample goes into the fullest pack that has room, of equally full ones the first.

    Arguments and errors as for ``first_fit``.

    >>> best_fit_decreasing([5, 3, 2, 4], 8).packs()
    [[0, 1], [3, 2]]
    """
    array = _checked(lengths, capacity)
    order = np.argsort(-array, kind="stable")
    free: list[list[int]] = [[] for _ in range(capacity + 1)]  # heaps of packs by free slots
    some = 0  # bit r: a pack with r free slots exists
    pack_of, n_packs = [], 0
    for length in array[order].tolist():
        fits = some >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            pack = heapq.heappop(free[room])
            some ^= 0 if free[room] else 1 << room
        else:
            pack, room, n_packs = n_packs, capacity, n_packs + 1
        pack_of.append(pack)
        heapq.heappush(free[room - length], pack)
        some |= 1 << (room - length)
    return _plan(order, pack_of, n_packs)


@dataclass(slots=True)
class OpenPack:
    """A pack that may still take samples."""

    refs: list[int] = field(default_factory=list)
    used: int = 0
    """Slots taken."""
    windows: int = 0
    """How often it was carried to the next window."""


class Packer:
    """Packs a stream of samples with bounded memory and bounded waiting.

    ``first_fit`` opens packs in order and closes them in that order: the oldest goes when more than ``open_packs``
    are open or more than ``held`` samples wait. A sample is out at the latest when ``open_packs`` further packs
    have been opened after its own.

    ``first_fit_decreasing`` waits until ``held`` samples are there (those in carried packs included), sorts the new
    ones, first-fits them into the carried packs and new ones, and closes what is at least 99 % full, what was
    carried 4 times, and then the fullest until at most half of ``held`` is carried. A sample is out before
    ``5 * held`` further ones have been added.

    ``best_fit_decreasing`` holds everything until ``flush``.

    Refs are integers that ascend with every ``add``. Inside a pack they ascend too, and packs that close together
    come in the order of their first ref, so the order of the data is disturbed as little as packing allows.
    """

    def __init__(self, algorithm: str, capacity: int, held: int = 256, *, open_packs: int = OPEN_PACKS) -> None:
        """``capacity``: slots of a pack; ``held``: most samples that wait (more where one record brings more)."""
        if algorithm not in ALGORITHMS:
            raise ValueError(f"no packing algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
        if capacity < 1 or held < 1 or open_packs < 1:
            raise ValueError("capacity, held and open_packs must be at least 1")
        self.algorithm, self.capacity, self.held, self.open_packs = algorithm, capacity, held, open_packs
        self.packs: list[OpenPack] = []
        self.window: list[tuple[int, int]] = []  # refs and lengths that are in no pack yet
        self.n_held = 0

    def add(self, ref: int, length: int) -> list[list[int]]:
        """Take a sample; give the packs that it closes, as lists of refs (mostly none)."""
        if not 0 < length <= self.capacity:
            raise ValueError(f"a sample must have 1 to {self.capacity} tokens, got {length}")
        self.n_held += 1
        if self.algorithm != "first_fit":
            self.window.append((ref, length))
            return self._fit_window() if self.algorithm.startswith("first") and self.n_held >= self.held else []
        pack = next((p for p in self.packs if p.used + length <= self.capacity), None)
        if pack is None:
            self.packs.append(pack := OpenPack())
        pack.refs.append(ref)
        pack.used += length
        closed = []
        while len(self.packs) > self.open_packs or self.n_held > self.held:
            closed += self._close(self.packs[:1])
        return closed

    def flush(self) -> list[list[int]]:
        """Close everything."""
        if self.algorithm == "best_fit_decreasing":
            plan = best_fit_decreasing([length for _, length in self.window], self.capacity)
            packs = [sorted(self.window[i][0] for i in pack) for pack in plan.packs()]
            self.window, self.n_held = [], 0
            return sorted(packs)
        self._place_window()
        return self._close(list(self.packs))

    def state(self) -> tuple[list[list[Any]], list[int]]:
        """Give the open packs, each as [windows it was carried for, refs], and the refs that are in no pack yet."""
        return [[pack.windows, list(pack.refs)] for pack in self.packs], [ref for ref, _ in self.window]

    def load(self, packs: list[list[Any]], window: list[int], lengths: Mapping[int, int]) -> None:
        """Undo ``state``; ``lengths``: tokens of the sample behind each ref."""
        self.packs = [OpenPack(list(refs), sum(lengths[ref] for ref in refs), windows) for windows, refs in packs]
        self.window = [(ref, lengths[ref]) for ref in window]
        self.n_held = len(lengths)

    def _place_window(self) -> None:
        lengths = [length for _, length in self.window]
        plan = first_fit_decreasing(lengths, self.capacity, used=[pack.used for pack in self.packs])
        self.packs += [OpenPack() for _ in range(len(plan) - len(self.packs))]
        for pack, members in zip(self.packs, plan.packs(), strict=True):
            pack.refs += [self.window[i][0] for i in members]
            pack.used += sum(lengths[i] for i in members)
        self.window = []

    def _fit_window(self) -> list[list[int]]:
        self._place_window()
        enough = self.capacity - self.capacity // 100
        done = [pack.used >= enough or pack.windows >= CARRIED_WINDOWS for pack in self.packs]
        closing = [pack for pack, full in zip(self.packs, done, strict=True) if full]
        excess = self.n_held - sum(len(pack.refs) for pack in closing) - self.held // 2
        for pack in sorted((p for p, full in zip(self.packs, done, strict=True) if not full), key=lambda p: -p.used):
            if excess > 0:
                closing.append(pack)
                excess -= len(pack.refs)
            pack.windows += 1
        return self._close(closing)

    def _close(self, packs: list[OpenPack]) -> list[list[int]]:
        gone = set(map(id, packs))
        self.packs = [pack for pack in self.packs if id(pack) not in gone]
        self.n_held -= sum(len(pack.refs) for pack in packs)
        return sorted(sorted(pack.refs) for pack in packs)


def padded(slots: int) -> int:
    """Round up to a multiple of 8."""
    return -(-slots // 8) * 8


def assemble(
    packs: Sequence[Sequence[Sample]], *, max_length: int, pad_id: int, state: Mapping[str, Any] | None = None
) -> Batch:
    """Write packs into the arrays of one micro-batch, exactly as ``Batch`` says.

    T' is the longest pack rounded up to 8. ``max_length`` is T, which no pack may exceed.

    Raises:
        ValueError: no pack, an empty pack, an empty sample, or a pack that is longer than ``max_length``.
    """
    samples = [sample for pack in packs for sample in pack]
    sizes = [[len(sample.input_ids) for sample in pack] for pack in packs]
    used = [sum(pack) for pack in sizes]
    if not packs or max(used) > max_length or not all(pack and min(pack) > 0 for pack in sizes):
        raise ValueError(f"packs must hold samples and at most {max_length} slots, got {used}")
    width = padded(max(used))
    total = width * len(packs)
    lengths = np.array([n for pack, slots in zip(sizes, used, strict=True) for n in (*pack, width - slots) if n])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.full(total, pad_id, dtype=np.int64)
    begins = np.concatenate([row * width + np.cumsum([0, *pack[:-1]]) for row, pack in enumerate(sizes)])
    edges = np.zeros(total + 1, dtype=np.int32)
    for sample, begin in zip(samples, begins.tolist(), strict=True):
        ids[begin : begin + len(sample.input_ids)] = sample.input_ids
        np.add.at(edges, sample.spans[:, 0] + begin, 1)
        np.add.at(edges, sample.spans[:, 1] + begin, -1)
    target = np.cumsum(edges[:-1]) > 0
    target[bounds[:-1]] = False  # nothing inside the document precedes its first token
    labels = np.full(total, IGNORE_INDEX, dtype=np.int64)
    labels[:-1] = np.where(target[1:], ids[1:], IGNORE_INDEX)
    return Batch(
        input_ids=ids.reshape(len(packs), width),
        labels=labels.reshape(len(packs), width),
        position_ids=(np.arange(total) - np.repeat(bounds[:-1], lengths)).reshape(len(packs), width),
        cu_seqlens=bounds.astype(np.int32),
        n_supervised=int((labels != IGNORE_INDEX).sum()),
        n_tokens=sum(used),
        n_samples=len(samples),
        origins=tuple(sample.origin for sample in samples),
        state={} if state is None else state,
    )
