"""Plans, the streaming packer and assembled batches against tables of other packers and values worked out by hand."""

import doctest

import numpy as np
import pytest

from corefit.data import pack
from corefit.data.pack import Packer, assemble, best_fit_decreasing, first_fit, first_fit_decreasing
from corefit.types import Sample


def sample(ids, spans=None, origin="a:1"):
    ids = np.array(ids, dtype=np.int32)
    spans = [[0, len(ids)]] if spans is None else spans
    return Sample(ids, np.array(spans, dtype=np.int32).reshape(-1, 2), origin)


def oasst_lengths(n, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(np.log(285), 0.845, n), 1, 2048).astype(int)


def feed(packer, lengths):
    """Give [(refs, number of samples added when the pack closed)]."""
    out = [(refs, i) for i, n in enumerate(lengths) for refs in packer.add(i, int(n))]
    return out + [(refs, len(lengths) - 1) for refs in packer.flush()]


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
        (first_fit_decreasing, [1111, 8192, 4096, 1000], 8192, [[1], [2, 0, 3]]),
        (first_fit_decreasing, [3, 3, 2, 2, 1, 1, 1, 1], 5, [[0, 2], [1, 3], [4, 5, 6, 7]]),
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


@pytest.mark.parametrize("plan", [first_fit, first_fit_decreasing, best_fit_decreasing])
@pytest.mark.parametrize("lengths", [[5], [0], [-1]])
def test_a_length_out_of_range_is_refused(plan, lengths):
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        plan(lengths, 4)


def test_packs_open_from_before_come_first():
    assert first_fit_decreasing([2, 3, 4], 5, used=[3, 5, 1]).packs() == [[0], [], [2], [1]]
    assert first_fit([], 5, used=[3]).packs() == [[]]


def test_bounded_first_fit_adds_only_to_the_youngest_packs():
    assert first_fit([3, 4, 4, 1], 4, open_packs=2).packs() == [[0], [1], [2], [3]]
    assert first_fit([3, 4, 4, 1], 4, open_packs=3).packs() == [[0, 3], [1], [2]]


def test_fill_of_the_default_packer():
    lengths = oasst_lengths(20_000)
    assert 390 < lengths.mean() < 410
    packs = feed(Packer("first_fit_decreasing", 2048, 256), lengths)
    assert lengths.sum() / (2048 * len(packs)) >= 0.995


def test_fill_of_the_streaming_first_fit():
    lengths = oasst_lengths(20_000)
    assert lengths.sum() / (2048 * len(feed(Packer("first_fit", 2048, 256), lengths))) >= 0.99


LENGTHS = {
    "oasst": oasst_lengths(3000),
    "just over half": np.full(3000, 1025),
    "one long one": np.array([2040] + [1500] * 3000),
    "long and tiny": np.array([2047, 2, 2, 2] * 700),
    "tiny": np.ones(3000, dtype=int),
    "just not full enough": np.array([2000] * 3000),
}


@pytest.mark.parametrize("held", [1, 2, 32, 256])
@pytest.mark.parametrize("name", LENGTHS)
def test_no_sample_waits_longer_than_promised(name, held):
    packer = Packer("first_fit_decreasing", 2048, held)
    longest = max(closed - ref for refs, closed in feed(packer, LENGTHS[name]) for ref in refs)
    assert longest < 5 * held


@pytest.mark.parametrize("name", LENGTHS)
def test_first_fit_closes_packs_in_the_order_of_their_opening(name):
    packs = feed(Packer("first_fit", 2048, 10_000, open_packs=8), LENGTHS[name])
    firsts = [refs[0] for refs, _ in packs]
    assert firsts == sorted(firsts)
    opened = np.searchsorted(firsts, [closed for _, closed in packs], side="right")  # packs opened by then
    assert all(opened[k] - k <= 9 for k in range(len(packs)))


@pytest.mark.parametrize("algorithm", ["first_fit", "first_fit_decreasing"])
@pytest.mark.parametrize("name", LENGTHS)
def test_no_more_samples_are_held_than_asked_for(algorithm, name):
    packer, n_held = Packer(algorithm, 2048, 50), 0
    for i, n in enumerate(LENGTHS[name]):
        n_held += 1 - sum(map(len, packer.add(i, int(n))))
        assert n_held == packer.n_held <= 50


def test_best_fit_decreasing_holds_everything():
    packer = Packer("best_fit_decreasing", 8, held=1)
    assert [packer.add(i, n) for i, n in enumerate([5, 3, 2, 4])] == [[], [], [], []]
    assert packer.flush() == [[0, 1], [2, 3]]
    assert packer.flush() == []


def test_packs_keep_the_order_of_the_data():
    packer = Packer("first_fit_decreasing", 10, held=6)
    closed = [refs for i, n in enumerate([1, 9, 4, 6, 10, 5]) for refs in packer.add(i, n)]
    assert closed + packer.flush() == [[0, 1], [2, 3], [4], [5]]


def test_what_the_packer_refuses():
    with pytest.raises(ValueError, match="no packing algorithm 'next_fit'"):
        Packer("next_fit", 8)
    with pytest.raises(ValueError, match="at least 1"):
        Packer("first_fit", 8, held=0)
    for length in (0, 9):
        with pytest.raises(ValueError, match="1 to 8 tokens"):
            Packer("first_fit", 8).add(0, length)


# Source: TRL tests/test_sft_trainer.py, its collator's values; there labels are not shifted yet, here they are.
def test_assemble_against_trl():
    packs = [[sample([1, 2, 3]), sample([4, 5, 6])], [sample([7, 8, 9, 10]), sample([11])]]
    batch = assemble(packs, max_length=8, pad_id=0, state={"epoch": 0.5})
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 0, 0], [7, 8, 9, 10, 11, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 0, 1, 2]]
    assert batch.labels.tolist() == [
        [2, 3, -100, 5, 6, -100, -100, -100],
        [8, 9, 10, -100, -100, -100, -100, -100],
    ]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 8, 12, 13, 16]
    assert (batch.n_supervised, batch.n_tokens, batch.n_samples) == (7, 11, 4)
    assert batch.state == {"epoch": 0.5}
    assert [a.dtype for a in (batch.input_ids, batch.labels, batch.position_ids)] == [np.int64] * 3
    assert batch.cu_seqlens.dtype == np.int32


def test_only_targets_of_the_same_document_are_labels():
    ids = sample(
        [10, 11, 12, 13, 14], [[0, 1], [2, 3], [3, 4]]
    )  # touching spans; one at offset 0, which nothing predicts
    batch = assemble([[ids, sample([20, 21, 22], [[1, 2]])]], max_length=16, pad_id=9, state=None)
    assert batch.labels.tolist() == [[-100, 12, 13, -100, -100, 21, -100, -100]]
    assert batch.n_supervised == ids.n_supervised + 1 == 3


def test_a_full_row_has_no_padding_document_and_the_last_slot_no_label():
    batch = assemble([[sample(range(8))], [sample(range(8))]], max_length=8, pad_id=0, state=None)
    assert batch.cu_seqlens.tolist() == [0, 8, 16]
    assert batch.labels[:, -1].tolist() == [-100, -100]


@pytest.mark.parametrize(("longest", "width"), [(1, 8), (8, 8), (9, 16), (12, 16)])
def test_rows_are_cut_to_the_longest_pack(longest, width):
    batch = assemble([[sample([1])], [sample([2] * longest)]], max_length=12, pad_id=0, state=None)
    assert batch.input_ids.shape == (2, width)


def test_a_sample_without_targets_and_a_pad_id_that_occurs_in_it():
    batch = assemble([[sample([5, 5, 5], [])]], max_length=8, pad_id=5, state=None)
    assert batch.n_supervised == 0 and (batch.labels == -100).all() and batch.n_tokens == 3


@pytest.mark.parametrize("packs", [[], [[]], [[sample(range(9))]], [[sample([])]], [[sample([1])], []]])
def test_assemble_refuses_what_is_no_pack(packs):
    with pytest.raises(ValueError, match="at most 8 slots"):
        assemble(packs, max_length=8, pad_id=0, state=None)
