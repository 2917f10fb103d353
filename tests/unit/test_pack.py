"""Plans and the streaming packer against tables of other packers and values worked out by hand."""

import doctest
from itertools import pairwise

import numpy as np
import pytest

from corefit.data import pack
from corefit.data.pack import best_fit_decreasing, first_fit, stream


def oasst_lengths(n, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(np.log(285), 0.845, n), 1, 2048).astype(int)


def feed(algorithm, lengths, held, **more):
    """Give [(indices, number of samples taken in when the pack closed)]."""
    made = stream(algorithm, lengths, 2048, held=held, flush=True, **more)
    packs = [made.order[a:b].tolist() for a, b in pairwise(made.offsets.tolist())]
    return list(zip(packs, made.seen.tolist(), strict=True))


def test_docstrings():
    assert doctest.testmod(pack).failed == 0


# Source: TRL tests/test_data_utils.py; Megatron-Bridge tests/unit_tests/data/packing/test_algorithms.py;
# NeMo Automodel tests/unit_tests/datasets/llm/test_neat_packing.py (their lengths and results).
@pytest.mark.parametrize(
    ("plan", "lengths", "capacity", "expected"),
    [
        (best_fit_decreasing, [3, 4, 1], 4, [[1], [0, 2]]),
        (best_fit_decreasing, [4, 2, 4, 1], 4, [[0], [2], [1, 3]]),
        (best_fit_decreasing, [5, 1, 4, 3], 5, [[0], [2, 1], [3]]),
        (best_fit_decreasing, [5, 2, 3, 1], 5, [[0], [2, 1], [3]]),
        (first_fit, [500, 600, 500, 400, 700], 1200, [[0, 1], [2, 3], [4]]),
        (first_fit, [], 4, []),
        (best_fit_decreasing, [], 4, []),
    ],
)
def test_tables_of_other_packers(plan, lengths, capacity, expected):
    assert plan(lengths, capacity).packs() == expected


def test_a_plan_has_the_promised_types():
    plan = first_fit([3, 4, 1], 4)
    assert (plan.order.dtype, plan.offsets.dtype) == (np.int32, np.int64)
    assert plan.offsets.tolist() == [0, 2, 3]


@pytest.mark.parametrize("capacity", [8192, 8193])
def test_a_capacity_that_is_no_power_of_two_packs_as_well(capacity):  # Source: TRL issue 3887
    lengths = np.clip(np.random.default_rng(0).normal(4096, 512, 3000), 1, 8192).astype(int)
    assert 1500 < len(best_fit_decreasing(lengths, capacity)) < 1550


PLANS = [first_fit, best_fit_decreasing, lambda lengths, capacity: stream("first_fit", lengths, capacity)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("lengths", [[5], [0], [-1], [1, 2**40], np.array([2**63], np.uint64), np.array([5], np.int8)])
def test_a_length_out_of_range_is_refused(either, plan, lengths):
    with pytest.raises(ValueError, match=r"lengths must be in \[1, 4\], got"):
        plan(lengths, 4)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("lengths", [[1.0], ["a"], [[1], [2]], np.array(3), [True], np.array([1], "M8[s]"), [None]])
def test_lengths_that_are_no_row_of_integers_are_refused(either, plan, lengths):
    with pytest.raises(TypeError, match="lengths must be integers in one dimension"):
        plan(lengths, 4)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("capacity", [0, -1, 2**24 + 1, 2**70])
def test_a_capacity_out_of_range_is_refused(either, plan, capacity):
    with pytest.raises(ValueError, match=r"capacity must be in \[1, 16,777,216\]"):
        plan([1], capacity)


def test_any_integers_will_do_contiguous_or_not(either):
    wide = np.array([3, 9, 4, 9, 1, 9])
    for dtype in (np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64, ">i4"):
        assert first_fit(wide.astype(dtype)[::2], 4).packs() == [[0, 2], [1]]
    assert first_fit([2**24, 1], 2**24).packs() == [[0], [1]]
    assert best_fit_decreasing([1] * 5, 1).packs() == [[0], [1], [2], [3], [4]]


def test_open_packs_must_be_positive(either):
    with pytest.raises(ValueError, match="open_packs must be at least 1, got 0"):
        first_fit([1], 4, open_packs=0)


def test_bounded_first_fit_adds_only_to_the_youngest_packs():
    assert first_fit([3, 4, 4, 1], 4, open_packs=2).packs() == [[0], [1], [2], [3]]
    assert first_fit([3, 4, 4, 1], 4, open_packs=3).packs() == [[0, 3], [1], [2]]


LENGTHS = {
    "oasst": oasst_lengths(3000),
    "just over half": np.full(3000, 1025),
    "one long one": np.array([2040] + [1500] * 3000),
    "long and tiny": np.array([2047, 2, 2, 2] * 700),
    "tiny": np.ones(3000, dtype=int),
    "just not full enough": np.array([2000] * 3000),
}


def fill(algorithm, lengths, held):
    return lengths.sum() / (2048 * len(feed(algorithm, lengths, held)))


def test_fill_of_the_streaming_packers():
    lengths = oasst_lengths(20_000)
    assert 390 < lengths.mean() < 410
    assert fill("first_fit_decreasing", lengths, 256) >= 0.995
    assert fill("first_fit", lengths, 256) >= 0.99


@pytest.mark.parametrize("held", [1, 2, 32, 256])
@pytest.mark.parametrize("name", LENGTHS)
def test_no_sample_waits_for_more_packs_than_are_held(name, held):
    closed = feed("first_fit_decreasing", LENGTHS[name], held)
    seen = [n for _, n in closed]
    for number, (indices, _) in enumerate(closed):
        before = np.searchsorted(seen, min(indices), side="right")  # packs closed before its oldest came
        assert number - before < held
    assert all(min(later) > min(earlier) for (earlier, _), (later, _) in pairwise(closed))


@pytest.mark.parametrize("name", LENGTHS)
def test_first_fit_closes_packs_in_the_order_of_their_opening(name):
    packs = feed("first_fit", LENGTHS[name], 10_000, open_packs=8)
    firsts = [refs[0] for refs, _ in packs]
    assert firsts == sorted(firsts)
    opened = np.searchsorted(firsts, [closed - 1 for _, closed in packs], side="right")  # packs opened by then
    assert all(opened[k] - k <= 9 for k in range(len(packs)))


@pytest.mark.parametrize("algorithm", ["first_fit", "first_fit_decreasing"])
@pytest.mark.parametrize("name", LENGTHS)
def test_no_more_samples_are_held_than_asked_for(algorithm, name):
    closed = stream(algorithm, LENGTHS[name], 2048, held=50)
    gone = np.zeros(len(LENGTHS[name]) + 1, int)
    np.add.at(gone, closed.seen, np.diff(closed.offsets))
    assert (np.arange(len(gone)) - np.cumsum(gone)).max() <= 50


def test_best_fit_decreasing_holds_everything():
    waiting = stream("best_fit_decreasing", [5, 3, 2, 4], 8, held=1)
    assert len(waiting.order) == 0 and waiting.rest.tolist() == [0, 1, 2, 3]
    flushed = stream("best_fit_decreasing", [5, 3, 2, 4], 8, held=1, flush=True)
    assert (flushed.order.tolist(), flushed.offsets.tolist()) == ([0, 1, 2, 3], [0, 2, 4])
    assert len(stream("best_fit_decreasing", [], 8, flush=True).seen) == 0


def test_the_oldest_begins_and_the_longest_that_fits_follow():
    made = stream("first_fit_decreasing", [1, 9, 4, 6, 10, 5], 10, held=6)
    assert (made.order.tolist(), made.seen.tolist(), made.rest.tolist()) == ([0, 1], [6], [2, 3, 4, 5])
    made = stream("first_fit_decreasing", [4, 5, 5, 6, 3], 10, held=5, flush=True)
    assert made.order.tolist() == [0, 3, 1, 2, 4]
    assert stream("first_fit_decreasing", [2, 4, 4, 4], 10, held=4).order.tolist() == [0, 1, 2]  # the oldest of equals


def test_a_pack_closes_only_where_a_record_ends():
    made = stream("first_fit_decreasing", [8, 8, 8, 8], 8, held=1, ends=[0, 0, 1, 1])
    assert made.seen.tolist() == [3, 3, 3, 4]


def test_what_the_streaming_packer_refuses():
    with pytest.raises(ValueError, match="no packing algorithm 'next_fit'"):
        stream("next_fit", [1], 8)
    with pytest.raises(ValueError, match="at least 1"):
        stream("first_fit", [1], 8, held=0)
    with pytest.raises(ValueError, match="must not be negative"):
        stream("first_fit", [1], 8, n_held=-1)
    for length in (0, 9):
        with pytest.raises(ValueError, match=r"\[1, 8\]"):
            stream("first_fit", [length], 8)
