"""Any sources, any settings: the ledger equals a recount after every batch, and resumed equals straight."""

import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from fakes import FORWARD, JSONL, NO_INDEX, FakeEncoder, source, write_records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corefit.data.arena import Arena, write_arena
from corefit.data.pack import ALGORITHMS
from corefit.data.source import permutation
from corefit.data.stream import Stream, split_validation
from corefit.errors import DataError

PART = st.one_of(
    st.integers(1, 40),
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.sampled_from(["why", "odd_one", "encoder: no_room"]),
)
ROW = st.one_of(st.lists(PART, max_size=4), st.just("{broken"))
FILES = st.lists(st.lists(ROW, min_size=1, max_size=25), min_size=1, max_size=3)


@st.composite
def cases(draw):
    files = draw(FILES)
    changes = [
        {
            "reader": draw(st.sampled_from([JSONL, NO_INDEX, FORWARD])),
            "shuffle": draw(st.booleans()),
            "repeat": draw(st.integers(1, 2)),
            "ratio": draw(st.sampled_from([None, 1.0, 2.5])),
            "first": draw(st.sampled_from([None, 7])),
        }
        for _ in files
    ]
    run = {
        "max_length": draw(st.sampled_from([8, 17, 32])),
        "algorithm": draw(st.sampled_from(ALGORITHMS)),
        "held": draw(st.sampled_from([1, 3, 10, 256])),
        "overlong": draw(st.sampled_from(["truncate", "split", "drop"])),
        "seed": draw(st.integers(0, 3)),
        "epochs": draw(st.integers(1, 3)),
    }
    micro_batch = draw(st.integers(1, 2))
    return files, changes, run, (micro_batch * draw(st.integers(1, 3)), micro_batch), draw(st.booleans())


def build(folder, case):
    files, changes, run, _, split = case
    sources = [
        source(write_records(Path(folder) / f"{i}.jsonl", rows), on_bad="skip", **change)
        for i, (rows, change) in enumerate(zip(files, changes, strict=True))
    ]
    hashes = split_validation(sources, share=0.3, records=4).hashes if split else frozenset()

    def make(*, forward=False, **more):
        used = [replace(one, shuffle=False) for one in sources] if forward else sources
        return Stream(used, FakeEncoder(), val_hashes=frozenset() if forward else hashes, **{**run, **more})

    return make


def run_through(stream, how):
    try:
        return [list(step) for step in stream.steps(*how)]
    except DataError as error:
        assert "no sample in" in str(error)
        return []


def assert_same(one, other):
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert one.origins() == other.origins()
    assert json.dumps(one.state(), sort_keys=True) == json.dumps(other.state(), sort_keys=True)


QUIET = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@QUIET
@given(cases(), st.data())
def test_resumed_equals_straight(case, data):
    with tempfile.TemporaryDirectory() as folder:
        make = build(folder, case)
        steps = run_through(make(), case[3])
        if not steps:
            return
        cut = data.draw(st.integers(0, len(steps) - 1), label="resume after step")
        resumed = make()
        resumed.load_state_dict(json.loads(json.dumps(steps[cut][-1].state())))
        rest = [list(step) for step in resumed.steps(*case[3])]
        assert [len(step) for step in rest] == [len(step) for step in steps[cut + 1 :]]
        for one, other in zip(sum(steps[cut + 1 :], []), sum(rest, []), strict=True):
            assert_same(one, other)


@QUIET
@given(cases(), st.data())
def test_resumed_inside_a_step_gives_the_same_batches(case, data):
    with tempfile.TemporaryDirectory() as folder:
        make = build(folder, case)
        found = sum(run_through(make(), case[3]), [])
        if not found:
            return
        cut = data.draw(st.integers(0, len(found) - 1), label="resume after batch")
        resumed = make()
        resumed.load_state_dict(json.loads(json.dumps(found[cut].state())))
        rest = sum((list(step) for step in resumed.steps(*case[3])), [])
        assert len(rest) == len(found) - cut - 1
        for one, other in zip(found[cut + 1 :], rest, strict=True):
            assert_same(one, other)


def whole_samples(row, run):
    """Give what a row must become: its tokens, and at most how many samples, by hand."""
    encoded, samples = 0, 0
    for part in row:
        if isinstance(part, str):
            continue
        sizes = part if isinstance(part, list) else [part]
        targets = sum(part[1::2]) if isinstance(part, list) else part - 1
        encoded += sum(sizes) if targets else 0
        samples += bool(targets) if isinstance(part, list) else -(-part // run["max_length"])
    return encoded, samples


@QUIET
@given(cases())
def test_the_ledger_equals_a_recount_after_every_batch(case):
    files, changes, run, how, _ = case
    with tempfile.TemporaryDirectory() as folder:
        stream = build(folder, case)()
        found = sum(run_through(stream, how), [])
        n_used = n_supervised = n_slots = 0
        epoch = 0.0
        for batch in found:
            ledger = batch.state()["ledger"]
            assert ledger["balanced"]
            n_used += int(batch.n_tokens)
            n_supervised += int((batch.labels != -100).sum())
            n_slots += batch.input_ids.size
            tokens, slots, records = ledger["tokens"], ledger["slots"], ledger["records"]
            assert tokens["supervised"] == slots["supervised"] == n_supervised
            assert tokens["masked"] == slots["masked"] == n_used - n_supervised
            assert slots["total"] == n_slots and slots["padding"] == n_slots - n_used
            assert records["pending"] <= records["read"] and tokens["pending"] <= tokens["encoded"]
            assert epoch <= batch.epoch <= run["epochs"]
            epoch = batch.epoch
        if not found:
            return
        assert epoch == run["epochs"]
        ledger = found[-1].state()["ledger"]
        assert ledger["records"]["pending"] == ledger["tokens"]["pending"] == 0
        times = [change["repeat"] * run["epochs"] for change in changes]
        kept = [rows[: change["first"]] for rows, change in zip(files, changes, strict=True)]
        assert ledger["records"]["read"] == sum(len(rows) * n for rows, n in zip(kept, times, strict=True))
        broken = sum(rows.count("{broken") * n for rows, n in zip(kept, times, strict=True))
        assert ledger["records"]["dropped"].get("bad_record", 0) == broken
        if not stream.val_hashes:
            encoded = sum(
                n * sum(whole_samples(row, run)[0] for row in rows if row != "{broken")
                for rows, n in zip(kept, times, strict=True)
            )
            assert ledger["tokens"]["encoded"] == encoded
        if run["overlong"] == "truncate" and not stream.val_hashes:
            seen = Counter(origin for batch in found for origin in batch.origins())
            for number, (rows, n) in enumerate(zip(kept, times, strict=True)):
                for line, row in enumerate(rows, 1):
                    most = n * whole_samples(row, run)[1] if row != "{broken" else 0
                    assert seen.get(f"{folder}/{number}.jsonl:{line}", 0) <= most


@QUIET
@given(cases(), st.integers(2, 3))
def test_the_order_of_data_does_not_depend_on_the_number_of_ranks(case, world):
    packs_per_step = 6
    with tempfile.TemporaryDirectory() as folder:
        make = build(folder, case)
        alone = run_through(make(), (packs_per_step, 1))
        ranks = [run_through(make(world=world, rank=r), (packs_per_step, 1)) for r in range(world)]
        assert {len(steps) for steps in ranks} == {len(alone)}
        for number, step in enumerate(alone):
            for k, batch in enumerate(step):
                other = ranks[k % world][number][k // world]
                assert np.array_equal(batch.input_ids, other.input_ids) and batch.origins() == other.origins()
            assert sum(len(steps[number]) for steps in ranks) == len(step)
            states = [steps[number][-1].state() for steps in ranks if steps[number]]
            assert all(json.dumps(state) == json.dumps(states[0]) for state in states)
            assert all(states[0][key] == step[-1].state()[key] for key in ("cursor", "held", "read", "epoch"))


@QUIET
@given(cases(), st.sampled_from([0, 1, 2, 4]), st.integers(1, 9))
def test_an_arena_and_any_number_of_threads_give_the_same_batches(case, threads, at_once):
    with tempfile.TemporaryDirectory() as folder, patch("corefit.data.stream.KNOWN_RECORDS", at_once):
        make = build(folder, case)
        wanted = sum(run_through(make(), case[3]), [])
        again = sum(run_through(make(threads=threads), case[3]), [])
        packing = make(threads=threads, forward=True)
        write_arena(Path(folder) / "arena", {}, lambda: packing.sizes, packing.encoded(), vocab_size=9**6)
        found = sum(run_through(make(arena=Arena(Path(folder) / "arena", {})), case[3]), [])
        assert len(again) == len(found) == len(wanted)
        for one, other, third in zip(wanted, again, found, strict=True):
            assert_same(one, other)
            for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
                assert np.array_equal(getattr(one, name), getattr(third, name)), name
            assert one.origins() == third.origins() and one.epoch == third.epoch
            assert one.state()["ledger"] == third.state()["ledger"] and one.state()["held"] == third.state()["held"]


@given(st.integers(0, 300), st.lists(st.integers(-(2**65), 2**65), max_size=3))
def test_a_shuffle_is_a_permutation(n, keys):
    assert sorted(permutation(n, *keys).tolist()) == list(range(n))
