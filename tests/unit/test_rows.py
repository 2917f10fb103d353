"""Packs written as rows, against another trainer's and values worked out by hand; by the kernel and by its twin."""

import numpy as np
import pytest
from samples import block_of, rows_of

from corefit.data.block import fit
from corefit.data.rows import Window, gather
from corefit.types import Sample

pytestmark = pytest.mark.usefixtures("either")


def sample(ids, spans=None, origin="a:1"):
    ids = np.array(ids, dtype=np.int32)
    spans = [[0, len(ids)]] if spans is None else spans
    return Sample(ids, np.array(spans, dtype=np.int32).reshape(-1, 2), origin)


# Source: TRL tests/test_sft_trainer.py, its collator's values; there labels are not shifted yet, here they are.
def test_rows_against_trl():
    packs = [[sample([1, 2, 3]), sample([4, 5, 6])], [sample([7, 8, 9, 10]), sample([11])]]
    batch = rows_of(packs, max_length=8, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 0, 0], [7, 8, 9, 10, 11, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 0, 1, 2]]
    assert batch.labels.tolist() == [
        [2, 3, -100, 5, 6, -100, -100, -100],
        [8, 9, 10, -100, -100, -100, -100, -100],
    ]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 8, 12, 13, 16]
    assert batch.n_supervised == 7
    assert [a.dtype for a in (batch.input_ids, batch.labels, batch.position_ids)] == [np.int64] * 3
    assert batch.cu_seqlens.dtype == np.int32


def test_only_targets_of_the_same_document_are_labels():
    ids = sample(
        [10, 11, 12, 13, 14], [[0, 1], [2, 3], [3, 4]]
    )  # touching spans; one at offset 0, which nothing predicts
    batch = rows_of([[ids, sample([20, 21, 22], [[1, 2]])]], max_length=16, pad_id=9)
    assert batch.labels.tolist() == [[-100, 12, 13, -100, -100, 21, -100, -100]]
    assert batch.n_supervised == ids.n_supervised + 1 == 3


def test_a_full_row_has_no_padding_document_and_the_last_slot_no_label():
    batch = rows_of([[sample(range(8))], [sample(range(8))]], max_length=8, pad_id=0)
    assert batch.cu_seqlens.tolist() == [0, 8, 16]
    assert batch.labels[:, -1].tolist() == [-100, -100]


@pytest.mark.parametrize(("longest", "width"), [(1, 8), (8, 8), (9, 16), (12, 16)])
def test_rows_are_cut_to_the_longest_pack(longest, width):
    batch = rows_of([[sample([1])], [sample([2] * longest)]], max_length=12, pad_id=0)
    assert batch.input_ids.shape == (2, width)


def test_a_sample_without_targets_and_a_pad_id_that_occurs_in_it():
    batch = rows_of([[sample([5, 5, 5], [])]], max_length=8, pad_id=5)
    assert batch.n_supervised == 0 and (batch.labels == -100).all()


@pytest.mark.parametrize("packs", [[[]], [[sample([])]], [[sample([1])], []]])
def test_gather_refuses_what_is_no_pack(packs):
    with pytest.raises(ValueError, match=r"."):
        rows_of(packs, max_length=8, pad_id=0)


def test_a_piece_of_a_document_whose_beginning_is_gone_moves_to_a_new_buffer(monkeypatch):
    monkeypatch.setattr("corefit.data.rows.MIN_TOKENS", 64)
    window = Window()
    whole = fit(block_of(sample(range(100, 140))), 8, "split")
    held = window.add(np.empty((0, 8), np.int64), whole)[3:]  # the first three pieces have been packed
    for number in range(3):
        held = window.add(held, block_of(sample(range(200, 290))))[: len(held)]
        packed = gather(window.tokens, window.spans, held, np.array([2]), width=16, pad_id=0)
        assert packed.input_ids.tolist() == [[*range(124, 140)]], number
        assert packed.labels.tolist() == [[*range(125, 132), -100, *range(133, 140), -100]]
