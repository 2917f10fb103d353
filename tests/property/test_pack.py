"""Plans against naive oracles; the packer and the batches against what they promise, on any input."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import rows_of

from corefit.data.pack import ALGORITHMS, best_fit_decreasing, first_fit, first_fit_decreasing, stream
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
