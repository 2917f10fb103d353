from __future__ import annotations

import doctest
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefit import defaults
from corefit.types import Record, Sources

SCHEDULERS = {scheduler.name: scheduler for scheduler in defaults.corefit_schedulers()}
QUANTIZERS = {quantizer.name: quantizer for quantizer in defaults.corefit_quantizers()}
inside = st.floats(0, 1, exclude_min=True, exclude_max=True)
share = st.floats(0, 1)


@pytest.mark.parametrize("name", SCHEDULERS)
@given(progress=inside, warmup=share)
def test_a_factor_is_in_0_1_and_never_0(name, progress, warmup):
    assert 0 < SCHEDULERS[name].factor(progress, warmup) <= 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_very_last_step_still_moves(name):
    assert SCHEDULERS[name].factor(math.nextafter(1, 0), 0.0) > 0 < SCHEDULERS[name].factor(math.nextafter(0, 1), 1.0)


@pytest.mark.parametrize("name", SCHEDULERS)
@given(one=inside, two=inside, warmup=share)
def test_up_in_the_warmup_then_never_up(name, one, two, warmup):
    factor, (first, second) = SCHEDULERS[name].factor, sorted((one, two))
    if second < min(warmup, 1 - defaults.WSD_DECAY):
        assert factor(first, warmup) <= factor(second, warmup)
    elif first >= warmup:
        assert factor(first, warmup) >= factor(second, warmup) * (1 - 1e-15)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_warmup_of_nothing_and_of_everything(name):
    factor = SCHEDULERS[name].factor
    assert factor(1e-9, 0.0) == pytest.approx(1)
    assert factor(0.5, 1.0) == 0.5
    assert factor(0.015, 0.03) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [0.75, 0.5, 0.25, 0.1]),
        ("cosine", [0.8535533906, 0.5, 0.1464466094, 0.0244717419]),  # (1 + cos(pi x)) / 2
        ("wsd", [1, 1, 1, 0.5]),
    ],
)
def test_known_values(name, values):
    factor = SCHEDULERS[name].factor
    assert [factor(progress, 0.0) for progress in (0.25, 0.5, 0.75, 0.9)] == pytest.approx(values)


def test_wsd_decays_in_its_last_fifth():
    assert defaults.wsd(0.8, 0.1) == pytest.approx(1.0)
    assert defaults.wsd(0.81, 0.1) < 1 and defaults.wsd(0.79, 0.1) == 1
    assert defaults.wsd(0.9, 1.0) == pytest.approx(0.5)


def test_only_constant_does_not_decay():
    assert [scheduler.name for scheduler in SCHEDULERS.values() if not scheduler.decays] == ["constant"]


def test_the_examples_in_docstrings():
    result = doctest.testmod(defaults)
    assert result.attempted >= 4 and result.failed == 0


def test_jsonl_reads_seeks_and_indexes(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(4)), encoding="utf-8")
    (reader,) = defaults.corefit_dataset_readers()
    sources = Sources((file,))
    records = [record for record in reader.read(sources, None) if isinstance(record, Record)]
    assert [record["n"] for record in records] == [0, 1, 2, 3]
    assert reader.seekable and reader.index is not None and reader.fetch is not None
    fetched = reader.fetch(sources, None, [records[2].position, records[0].position])
    assert [record["n"] for record in fetched] == [2, 0]
    again = next(reader.read(sources, None, start=records[2].position))
    assert again["n"] == 2 and again.line == 3
    assert [tuple(row) for row in reader.index(sources, None).tolist()] == [record.position for record in records]


def test_none_stores_weights_as_they_are():
    assert QUANTIZERS["none"].config("float16") is None and QUANTIZERS["none"].after_load is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_nf4_is_qlora_s(dtype):
    import torch

    config = QUANTIZERS["nf4"].config(dtype)
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype is getattr(torch, dtype)


def test_int8():
    config = QUANTIZERS["int8"].config("float16")
    assert config.load_in_8bit and not config.load_in_4bit
