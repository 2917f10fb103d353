"""Plans and the streaming packer against naive definitions, by the kernel and by its twin; batches against what they
promise."""

import hashlib
import os
import random
import subprocess
import sys
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import rows_of

from corefit.data import kernel
from corefit.data.pack import ALGORITHMS, best_fit_decreasing, first_fit, stream
from corefit.types import Sample

CASES = 10_000
KERNELS = [None] if kernel.compiled is None else [kernel.compiled, None]


def made(seed):
    """Give (lengths, capacity) of every shape that packers are known to fail on."""
    rng = random.Random(seed)
    capacity = rng.choice([1, 2, 3, 8, rng.randint(4, 70), 64, 2048, rng.randint(71, 5000), 2**24 - 1, 2**24])
    n = rng.choice([0, 1, 2, rng.randint(3, 12), rng.randint(3, 40)])
    half, tenth = capacity // 2, max(1, capacity // 10)
    draw = rng.choice(
        [
            lambda: rng.randint(1, capacity),
            lambda: rng.randint(1, max(1, half)),
            lambda: rng.randint(min(capacity, half + 1), capacity),
            lambda: rng.choice([tenth, capacity - tenth or 1]),
            lambda: rng.randint(1, tenth),
            lambda: rng.choice([1, half or 1, capacity]),
            lambda: max(1, min(capacity, int(rng.lognormvariate(0, 1) * capacity / 7))),
        ]
    )
    equal = rng.randint(1, capacity)
    return [equal] * n if rng.random() < 0.1 else [draw() for _ in range(n)], capacity, rng


def naive(lengths, order, capacity, choose, open_packs=10**9):
    packs, room = [], []
    for i in order:
        fitting = [p for p, left in enumerate(room) if left >= lengths[i] and p >= len(packs) - open_packs]
        if not fitting:
            packs.append([])
            room.append(capacity)
            fitting = [len(packs) - 1]
        p = choose(fitting, room)
        packs[p].append(i)
        room[p] -= lengths[i]
    return packs


def lowest(fitting, room):
    return fitting[0]


def fullest(fitting, room):
    return min(fitting, key=lambda p: (room[p], p))


@pytest.mark.parametrize("which", KERNELS, ids=lambda k: "C" if k else "Python")
def test_first_fit_is_the_naive_one(which):
    with patch.object(kernel, "compiled", which):
        for seed in range(CASES):
            lengths, capacity, rng = made(seed)
            order = range(len(lengths))
            assert first_fit(lengths, capacity).packs() == naive(lengths, order, capacity, lowest), seed
            k = rng.choice([1, 2, 3, 64])
            bounded = first_fit(lengths, capacity, open_packs=k).packs()
            assert bounded == naive(lengths, order, capacity, lowest, k), seed


@pytest.mark.parametrize("which", KERNELS, ids=lambda k: "C" if k else "Python")
def test_best_fit_decreasing_is_the_naive_one(which):
    with patch.object(kernel, "compiled", which):
        for seed in range(CASES):
            lengths, capacity, _ = made(seed)
            order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
            assert best_fit_decreasing(lengths, capacity).packs() == naive(lengths, order, capacity, fullest), seed


@pytest.mark.parametrize("shape", ["any", "equal", "two", "steps"])
@pytest.mark.parametrize("n", [300, 3000])
def test_many_samples_in_few_lengths_are_packed_as_naively(n, shape):
    for seed in range(6):
        rng = random.Random(seed)
        capacity = rng.choice([7, 100, 1000])
        few = {"any": capacity, "equal": 1, "two": 2, "steps": 9}[shape]
        some = [rng.randint(1, capacity) for _ in range(few)]
        lengths = [rng.choice(some) for _ in range(n)]
        order = sorted(range(n), key=lambda i: (-lengths[i], i))
        plans = first_fit(lengths, capacity), best_fit_decreasing(lengths, capacity)
        with patch.object(kernel, "compiled", None):
            twins = first_fit(lengths, capacity), best_fit_decreasing(lengths, capacity)
        for plan, twin in zip(plans, twins, strict=True):
            assert plan.order.tobytes() == twin.order.tobytes() and plan.offsets.tobytes() == twin.offsets.tobytes()
        if n == 300:
            assert plans[0].packs() == naive(lengths, range(n), capacity, lowest)
            assert plans[1].packs() == naive(lengths, order, capacity, fullest)


def naive_stream(algorithm, lengths, capacity, held, n_held, ends, flush, open_packs):
    """Give [(pack, seen)], by the words of ``stream``."""
    closed, waiting, opened = [], [], []
    for i in range(len(lengths) + 1):
        may = i == n_held or (i > n_held and ends[i - 1])
        at_end = flush and i == len(lengths)
        if algorithm == "first_fit":
            while opened and (at_end or (may and (len(opened) > open_packs or sum(map(len, opened)) > held))):
                closed.append((opened.pop(0), i))
        while algorithm == "first_fit_decreasing" and waiting and (at_end or (may and len(waiting) >= held)):
            pack = [waiting.pop(0)]
            while fitting := [j for j in waiting if lengths[j] <= capacity - sum(lengths[k] for k in pack)]:
                pack.append(max(fitting, key=lambda j: (lengths[j], -j)))
                waiting.remove(pack[-1])
            closed.append((sorted(pack), i))
        if i < len(lengths) and algorithm == "first_fit":
            room = (pack for pack in opened if sum(lengths[j] for j in pack) + lengths[i] <= capacity)
            pack = next(room, None)
            if pack is None:
                opened.append(pack := [])
            pack.append(i)
        elif i < len(lengths):
            waiting.append(i)
    return closed


@pytest.mark.parametrize("which", KERNELS, ids=lambda k: "C" if k else "Python")
@pytest.mark.parametrize("algorithm", ["first_fit", "first_fit_decreasing"])
def test_the_streaming_packer_is_the_naive_one(algorithm, which):
    with patch.object(kernel, "compiled", which):
        for seed in range(CASES):
            lengths, capacity, rng = made(seed)
            n = len(lengths)
            ends = [int(rng.random() < 0.7) for _ in range(n)]
            more = {"held": rng.choice([1, 2, 5, 12, 99]), "n_held": rng.choice([0, 0, rng.randint(0, n)])}
            more |= {"flush": rng.random() < 0.5, "open_packs": rng.choice([1, 2, 4, 64])}
            got = stream(algorithm, lengths, capacity, ends=ends, **more)
            wanted = naive_stream(algorithm, lengths, capacity, ends=ends, **more)
            assert list(zip(packs_of(got), got.seen.tolist(), strict=True)) == wanted, seed
            assert sorted([*got.order.tolist(), *got.rest.tolist()]) == list(range(n))
            assert got.rest.tolist() == sorted(got.rest.tolist())


DIGEST = """
import hashlib, numpy as np
from corefit.data.pack import ALGORITHMS, best_fit_decreasing, first_fit, stream
lengths = np.clip(np.random.default_rng(0).lognormal(5.65, 0.845, 20000), 1, 2048).astype(np.int32)
digest = hashlib.sha256()
for made in (first_fit(lengths, 2048), best_fit_decreasing(lengths, 2048), first_fit(lengths, 2048, open_packs=9),
             *(stream(algorithm, lengths, 2048, flush=True) for algorithm in ALGORITHMS)):
    digest.update(made.order.tobytes() + made.offsets.tobytes())
print(digest.hexdigest())
"""


def test_the_digest_of_all_plans_is_the_same_in_every_process():
    runs = [("0", "c"), ("1", "c"), ("12345", "python")]
    found = set()
    for seed, which in runs:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "COREFIT_KERNEL": which}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1 and len(found.pop().strip()) == hashlib.sha256().digest_size * 2


@pytest.mark.skipif(kernel.compiled is None, reason="no kernel was built")
@given(
    st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 9), max_size=12),
    *(st.integers(-2, 14) for _ in range(5)),
    st.sampled_from([-1, 0, 1, 9, 2048, 2**24, 2**24 + 1]),
    st.sampled_from([-(2**63), -1, 0, 1, 3, 2**63 - 1]),
    st.booleans(),
)
@example([], -1, 1, 0, 0, 0, 1, 1, False)  # no room is room for nothing
def test_the_kernel_refuses_what_it_cannot_do_and_never_crashes(lengths, a, b, c, d, n_held, capacity, bound, flag):
    array = np.array(lengths, np.int32)
    order, offsets = np.empty(max(a, 0), np.int32), np.empty(max(b, 0), np.int64)
    ends, seen = np.ones(max(c, 0), np.uint8), np.empty(max(d, 0), np.int64)
    n, room = len(lengths), len(order) >= len(lengths) and len(offsets) > len(lengths)
    right = all(1 <= w <= capacity for w in lengths) and 1 <= capacity <= 2**24 and bound >= 1 and room
    for call in (
        lambda: kernel.compiled.plan(array, order, offsets, capacity, flag, bound),
        lambda: kernel.compiled.stream(
            array, ends, order, offsets, seen, capacity, flag, bound, n_held, not flag, bound
        ),
    ):
        try:
            packs = call()
        except ValueError:
            assert not right or len(ends) < n or len(seen) < n
        else:
            assert right and 0 <= packs <= n


@st.composite
def problems(draw):
    capacity = draw(st.integers(1, 70))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


def packs_of(streamed):
    return [streamed.order[a:b].tolist() for a, b in pairwise(streamed.offsets.tolist())]


@given(problems(), st.sampled_from(ALGORITHMS), st.integers(1, 20), st.integers(1, 5), st.data())
def test_the_stream_places_each_sample_once_and_whole_and_can_be_cut_anywhere(
    problem, algorithm, held, open_packs, data
):
    lengths, capacity = problem
    more = {"held": held, "open_packs": open_packs}
    ends = [*data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))[1:], True][: len(lengths)]
    straight = packs_of(stream(algorithm, lengths, capacity, ends=ends, flush=True, **more))
    assert sorted(i for pack in straight for i in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= capacity and pack == sorted(pack) for pack in straight)
    # cut at ends of records, and after any pack: what waits is the whole state
    packs, waiting, at = [], [], 0
    while at < len(lengths) or waiting:
        stops = [i + 1 for i in range(at, len(lengths)) if ends[i]]
        until = data.draw(st.sampled_from(stops)) if stops else len(lengths)
        refs = [*waiting, *range(at, until)]
        flush = until == len(lengths)
        part = stream(
            algorithm,
            [lengths[i] for i in refs],
            capacity,
            n_held=len(waiting),
            ends=[ends[i] for i in refs],
            flush=flush,
            **more,
        )
        found = packs_of(part)
        keep = data.draw(st.integers(0, len(found))) if found and not flush else len(found)
        packs += [[refs[i] for i in pack] for pack in found[:keep]]
        gone = {refs[i] for pack in found[:keep] for i in pack}
        at = refs[part.seen[keep - 1] - 1] + 1 if 0 < keep < len(found) and part.seen[keep - 1] > len(waiting) else at
        at = until if keep == len(found) else at
        waiting = [i for i in [*waiting, *range(len(lengths))] if i < at and i not in gone and i in refs]
        waiting = sorted(set(waiting))
    assert packs == straight


@st.composite
def samples(draw):
    n = draw(st.integers(1, 12))
    marks = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    split = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    spans = []
    for i, mark in enumerate(marks):
        if mark and i and marks[i - 1] and not split[i]:
            spans[-1][1] = i + 1
        elif mark:
            spans.append([i, i + 1])
    ids = draw(st.lists(st.integers(0, 50), min_size=n, max_size=n))
    return Sample(np.array(ids, dtype=np.int32), np.array(spans, dtype=np.int32).reshape(-1, 2), f"f:{n}"), marks


@settings(max_examples=150)
@given(st.lists(st.lists(samples(), min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_batch_equals_one_written_token_by_token(packs):
    longest = max(sum(len(s.input_ids) for s, _ in pack) for pack in packs)
    batch = rows_of([[s for s, _ in pack] for pack in packs], max_length=longest, pad_id=7)
    width = -(-longest // 8) * 8
    bounds, n_supervised = [0], 0
    for row, pack in enumerate(packs):
        ids, labels, positions = [], [], []
        for s, marks in pack:
            tokens = s.input_ids.tolist()
            ids += tokens
            labels += [t if mark else -100 for t, mark in zip(tokens[1:], marks[1:], strict=True)] + [-100]
            positions += range(len(tokens))
            bounds.append(row * width + len(ids))
            n_supervised += s.n_supervised
        left = width - len(ids)
        bounds += [(row + 1) * width] if left else []
        assert batch.input_ids[row].tolist() == ids + [7] * left
        assert batch.labels[row].tolist() == labels + [-100] * left
        assert batch.position_ids[row].tolist() == [*positions, *range(left)]
    assert batch.cu_seqlens.tolist() == bounds
    assert batch.n_supervised == n_supervised == (batch.labels != -100).sum()
