"""Plans against naive oracles; the packer and the batches against what they promise, on any input."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from corefit.data.pack import ALGORITHMS, Packer, assemble, best_fit_decreasing, first_fit, first_fit_decreasing
from corefit.types import Sample


@st.composite
def problems(draw):
    capacity = draw(st.integers(1, 70))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


def naive(lengths, order, capacity, choose):
    packs, room = [], []
    for i in order:
        fitting = [p for p, left in enumerate(room) if left >= lengths[i]]
        if not fitting:
            packs.append([])
            room.append(capacity)
            fitting = [len(packs) - 1]
        p = choose(fitting, room)
        packs[p].append(i)
        room[p] -= lengths[i]
    return packs


def decreasing(lengths):
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


@given(problems())
def test_plans_equal_the_naive_ones(problem):
    lengths, capacity = problem
    first = lambda fitting, room: fitting[0]  # noqa: E731
    best = lambda fitting, room: min(fitting, key=lambda p: (room[p], p))  # noqa: E731
    assert first_fit(lengths, capacity).packs() == naive(lengths, range(len(lengths)), capacity, first)
    assert first_fit_decreasing(lengths, capacity).packs() == naive(lengths, decreasing(lengths), capacity, first)
    assert best_fit_decreasing(lengths, capacity).packs() == naive(lengths, decreasing(lengths), capacity, best)


@given(problems(), st.integers(1, 70))
def test_with_all_packs_open_bounded_first_fit_is_first_fit(problem, open_packs):
    lengths, capacity = problem
    bounded = first_fit(lengths, capacity, open_packs=open_packs).packs()
    if open_packs >= len(lengths):
        assert bounded == first_fit(lengths, capacity).packs()
    assert sorted(i for pack in bounded for i in pack) == list(range(len(lengths)))
    if open_packs == 1:  # next-fit: order is kept exactly
        assert [i for pack in bounded for i in pack] == list(range(len(lengths)))


@given(problems(), st.sampled_from(ALGORITHMS), st.integers(1, 20), st.integers(1, 5), st.data())
def test_the_packer_places_each_sample_once_and_whole_and_can_be_stopped_anywhere(
    problem, algorithm, held, open_packs, data
):
    lengths, capacity = problem
    stop = data.draw(st.integers(0, len(lengths)))
    packer, straight, resumed = Packer(algorithm, capacity, held, open_packs=open_packs), [], []
    for i, n in enumerate(lengths):
        if i == stop:
            other = Packer(algorithm, capacity, held, open_packs=open_packs)
            packs, window = packer.state()
            refs = [ref for _, pack in packs for ref in pack] + window
            other.load(packs, window, {ref: lengths[ref] for ref in refs})
            resumed = list(straight)
        straight.append(packer.add(i, n))
        if i >= stop:
            resumed.append(other.add(i, n))
        assert algorithm.startswith("best") or packer.n_held <= held
    straight.append(packer.flush())
    if stop < len(lengths):
        assert [*resumed, other.flush()] == straight
    packs = [pack for closed in straight for pack in closed]
    assert sorted(ref for pack in packs for ref in pack) == list(range(len(lengths)))
    assert all(sum(lengths[ref] for ref in pack) <= capacity and pack == sorted(pack) for pack in packs)
    assert all(closed == sorted(closed) for closed in straight)
    assert packer.n_held == 0 and packer.state() == ([], [])


@given(problems(), st.integers(1, 20))
def test_no_sample_waits_longer_than_promised(problem, held):
    lengths, capacity = problem
    packer, waits = Packer("first_fit_decreasing", capacity, held), []
    for i, n in enumerate(lengths * 5):
        waits += [i - ref for pack in packer.add(i, n) for ref in pack]
    assert max(waits, default=0) < 5 * held


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
    batch = assemble([[s for s, _ in pack] for pack in packs], max_length=longest, pad_id=7, state=None)
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
    assert batch.n_tokens == sum(len(s.input_ids) for pack in packs for s, _ in pack)
    assert batch.origins == tuple(s.origin for pack in packs for s, _ in pack)
