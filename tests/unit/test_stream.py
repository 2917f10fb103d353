"""The stream: order, mixtures, errors, validation, estimate, ranks, and that it reads no further than it must."""

import gc
import gzip
import json
import re
import threading
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from fakes import FORWARD, JSONL, NO_INDEX, PARTS, FakeEncoder, source, write_records

from corefit.data.jsonl import content_hash, read_jsonl
from corefit.data.ledger import Ledger
from corefit.data.source import GROUP_RECORDS, Input, permutation
from corefit.data.stream import GROUPS_AHEAD, Stream, encode_validation, split_validation
from corefit.errors import CheckpointError, DataError, PluginError, RecipeError
from corefit.types import Conversation, DatasetReader, Document, Drop, MapFunction, Message, Record


def stream(*sources, **changes):
    settings = {"max_length": 32, "held": 16, "algorithm": "first_fit", "epochs": 1, **changes}
    encoder = settings.pop("encoder", None) or FakeEncoder()
    return Stream(sources, encoder, **settings)


def batches(made, packs_per_step=1, micro_batch=1):
    return [batch for step in made.steps(packs_per_step, micro_batch) for batch in step]


def lines(found):
    """Give the line numbers of all samples, in order."""
    return [int(origin.rsplit(":", 1)[1]) for batch in found for origin in batch.origins()]


def names(found):
    """Give the file names, in order."""
    return "".join(origin.rsplit("/", 1)[1][0] for batch in found for origin in batch.origins())


def place(state):
    """Give where the stream is, without what is counted per rank."""
    return {key: state[key] for key in ("cursor", "held", "read", "epoch")}


def last_ledger(found):
    return found[-1].state()["ledger"]


# ------------------------------------------------------------------------------------------------------------ order


def test_without_shuffle_full_packs_come_in_file_order(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32]] * 10)
    assert lines(batches(stream(source(path)))) == list(range(1, 11))


def splitmix64(state):
    """Source: the public-domain C of splitmix64 (Vigna 2015): one output, from the state before it."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def mixed(z):
    return splitmix64((z - 0x9E3779B97F4A7C15) % 2**64)


def test_the_shuffle_is_a_feistel_network_of_splitmix64_and_fixed_for_ever():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the generator's published first output for seed 0
    golden = 0x9E3779B97F4A7C15
    for n, keys in ((50, (7, 1, 2)), (1, (0,)), (2, (3, 3)), (17, ()), (300, (2**70, -1))):
        state = 0
        for key in keys:
            state = splitmix64((state ^ key % 2**64) % 2**64)
        rounds = [mixed((state + i * golden) % 2**64) for i in range(1, 5)]
        bits = 1
        while 4**bits < n:
            bits += 1

        def walk(x, bits=bits, rounds=rounds, n=n):
            left, right = x >> bits, x % 2**bits
            for key in rounds:
                left, right = right, left ^ mixed((right + golden) % 2**64 ^ key) % 2**bits
            x = left << bits | right
            return x if x < n else walk(x)

        assert permutation(n, *keys).tolist() == [walk(i) for i in range(n)]
        assert sorted(permutation(n, *keys).tolist()) == list(range(n))
    assert permutation(5, 2**70, -1).tolist() == permutation(5, 0, 2**64 - 1).tolist()
    assert permutation(1000, 4, start=600, stop=800).tolist() == permutation(1000, 4)[600:800].tolist()


def test_the_order_of_a_pass_is_computed_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("corefit.data.source.ORDERED", 8)
    path = write_records(tmp_path / "a.jsonl", [[32]] * 50)
    one = Input(3, source(path, shuffle=True), 7, [])
    whole = permutation(50, 7, 3, 2).tolist()
    for start, stop in ((0, 50), (3, 5), (7, 9), (8, 16), (5, 31), (48, 50), (0, 8), (20, 20)):
        assert one.order(2, start, stop).tolist() == whole[start:stop]
    assert one.order(4, 0, 50).tolist() == permutation(50, 7, 3, 4).tolist()


def test_a_shuffle_looks_random():
    n = 4096
    places = permutation(n, 1)
    assert abs(np.corrcoef(places, np.arange(n))[0, 1]) < 0.05
    assert 0.9 < np.mean(np.abs(np.diff(places))) / (n / 3) < 1.1
    starts = [permutation(64, seed)[0] for seed in range(6400)]
    counts = np.bincount(starts, minlength=64)
    assert ((counts - 100) ** 2 / 100).sum() < 110  # chi-squared, 63 degrees of freedom: 0.9999 lies at 110


@pytest.mark.parametrize("reader", [JSONL, NO_INDEX, FORWARD])
def test_a_shuffle_depends_on_seed_and_epoch_and_on_nothing_else(tmp_path, reader):
    path = write_records(tmp_path / "a.jsonl", [[32]] * 20)
    made = lambda seed: lines(batches(stream(source(path, reader=reader, shuffle=True), epochs=2, seed=seed)))  # noqa: E731
    one = made(0)
    assert one[:20] == [i + 1 for i in permutation(20, 0, 0, 0)] and one[20:] == [
        i + 1 for i in permutation(20, 0, 0, 1)
    ]
    assert one[:20] != one[20:] != sorted(one[20:]) and made(1) != one == made(0)


def test_what_a_shuffle_needs_is_said(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32]] * 20)
    assert stream(source(path, shuffle=True)).notices[0].startswith("shuffle: indexed 20 records in 0.")
    assert stream(source(path, shuffle=True, reader=FORWARD)).notices == [
        "reader forward can't seek: 20 records held in memory"
    ]
    assert stream(source(path), source(path, reader=FORWARD), epochs=3).notices == []


@pytest.mark.parametrize("reader", [JSONL, NO_INDEX, FORWARD])
@pytest.mark.parametrize("shuffle", [True, False])
def test_first_and_repeat(tmp_path, reader, shuffle):
    path = write_records(tmp_path / "a.jsonl", [[32]] * 10)
    found = batches(stream(source(path, reader=reader, shuffle=shuffle, first=3, repeat=2), epochs=2))
    assert sorted(lines(found)) == sorted([1, 2, 3] * 4)
    assert found[-1].epoch == 2.0
    assert all(sorted(lines(found[i : i + 3])) == [1, 2, 3] for i in range(0, 12, 3))


def test_no_limit_of_epochs(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32]] * 3)
    found = [step[0] for step in islice(stream(source(path), epochs=0).steps(1, 1), 100)]
    assert lines(found) == ([1, 2, 3] * 34)[:100]
    assert found[-1].epoch == pytest.approx(100 / 3)


def test_several_files_and_origins(tmp_path):
    a, b = (write_records(tmp_path / f"{name}.jsonl", [[32], [32]]) for name in "ab")
    found = batches(stream(source(a, b)))
    assert [origin for batch in found for origin in batch.origins()] == [f"{a}:1", f"{a}:2", f"{b}:1", f"{b}:2"]


# --------------------------------------------------------------------------------------------------------- mixtures


def test_without_a_ratio_sources_mix_evenly_and_end_together(tmp_path):
    a, b = (write_records(tmp_path / f"{name}.jsonl", [[32]] * n) for name, n in (("a", 60), ("b", 20)))
    order = names(batches(stream(source(a), source(b))))
    assert order.count("a") == 60 and order.count("b") == 20
    assert all(12 <= order[i : i + 20].count("a") <= 18 for i in range(0, 80, 20))


def test_repeat_counts_in_the_mix(tmp_path):
    a, b = (write_records(tmp_path / f"{name}.jsonl", [[32]] * 20) for name in "ab")
    order = names(batches(stream(source(a, repeat=3), source(b))))
    assert order.count("a") == 60 and all(order[i : i + 4].count("a") == 3 for i in range(4, 76, 4))


def test_a_ratio_counts_records_and_what_is_left_follows(tmp_path):
    a, b = (write_records(tmp_path / f"{name}.jsonl", [[32]] * n) for name, n in (("a", 10), ("b", 20)))
    order = names(batches(stream(source(a, ratio=1.0), source(b, ratio=3.0))))
    assert order[:24].count("b") == 18 and order[24:] == "abbaaa"


def test_a_source_in_memory_without_sizes_mixes_too(tmp_path):
    def read(sources, options):
        for i in range(30):
            yield Record({"id": i, "parts": [32]}, path="x", line=i + 1, offset=0)

    a = write_records(tmp_path / "a.jsonl", [[32]] * 30)
    made = DatasetReader(name="made", summary="", read=read, needs_path=False)
    order = "".join(
        o.rsplit("/", 1)[-1][0] for b in batches(stream(source(a), source(reader=made))) for o in b.origins()
    )
    assert all(order[i : i + 10].count("a") == 5 for i in range(0, 60, 10))


# ----------------------------------------------------------------------------------------------------- errors, drops


def test_a_bad_record_stops_the_run_at_its_turn(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32], [32], '{"id": 3, oops}', [32]])
    steps = stream(source(path), held=1).steps(1, 1)
    assert lines(next(steps)) == [1]
    with pytest.raises(DataError, match=rf'^{path}:3:11: broken JSON.*on_bad="skip"'):
        next(steps)


def test_bad_records_can_be_skipped_and_are_counted(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32], '{"id": 3, oops}', "[1]", [32]])
    records = last_ledger(batches(stream(source(path, on_bad="skip"))))["records"]
    assert (records["read"], records["used"], records["dropped"]) == (4, 2, {"bad_record": 2})


@pytest.mark.parametrize(
    ("kind", "message", "shown"),
    [(ValueError, "a\nb", "ValueError: a b"), (ValueError, "", "ValueError"), (SystemExit, "7", "SystemExit: 7")],
)
def test_a_map_function_that_fails_names_the_record_and_its_keys(tmp_path, kind, message, shown):
    def fail(record, options):
        raise kind(message)
        yield

    path = write_records(tmp_path / "a.jsonl", [[32]])
    broken = MapFunction(name="broken", summary="", map=fail)
    with pytest.raises(DataError) as caught:
        batches(stream(source(path, map_function=broken)))
    assert str(caught.value) == f"{path}:1: map function 'broken' failed: {shown}; keys of the record: id, parts"
    assert isinstance(caught.value.__cause__, kind)


def test_a_map_function_must_give_items(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32]])
    for wrong, shown in ((lambda record, options: ["text"], "gave a str"), (lambda record, options: None, "NoneType")):
        with pytest.raises(DataError, match=shown):
            batches(stream(source(path, map_function=MapFunction(name="w", summary="", map=wrong))))


def test_map_options_reach_the_map_function(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32]])
    echo = MapFunction(name="echo", summary="", map=lambda record, options: [Document(f"{options} 8")])
    assert batches(stream(source(path, map_function=echo, map_options=5)))[0].input_ids[0, 0] == 5


def test_data_without_a_single_sample_is_an_error_with_the_reasons(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [["why"], ["encoder: odd"], []])
    for epochs in (0, 1, 3):
        with pytest.raises(DataError, match=r"no sample in 3 records \(why 1, odd 1, no_items 1\)"):
            batches(stream(source(path), epochs=epochs))


def test_overlong_error_stops_at_its_turn(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32], [32], [33]])
    steps = stream(source(path), held=1, overlong="error").steps(1, 1)
    next(steps)
    with pytest.raises(DataError, match=rf"{path}:3: 33 tokens"):
        next(steps)


# ------------------------------------------------------------------------------------------------------- the ledger


def test_everything_is_counted(tmp_path):
    a = write_records(
        tmp_path / "a.jsonl", [[40], [10, "why", 3], ["why"], ["encoder: odd", 8], [[6, 4, 2, 8]], []], trailing=1
    )
    ledger = last_ledger(batches(stream(source(a), epochs=2)))
    assert ledger["records"] == {
        "read": 12, "used": 8, "dropped": {"why": 2, "no_items": 2}, "validation": 0, "pending": 0,
        "parts_dropped": {"why": 2, "odd": 2},
    }  # fmt: skip
    assert ledger["tokens"] == {
        "encoded": 162, "supervised": 2 * (31 + 7 + 9 + 2 + 7 + 12), "masked": 2 * (5 + 8), "truncated": 0,
        "dropped": 0, "validation": 0, "pending": 0,
    }  # fmt: skip
    assert ledger["messages"] == {
        "total": 10, "dropped": {"trailing_user": 2}, "notes": {"joined": 2, "look_alike": 2}
    }  # fmt: skip
    slots = ledger["slots"]
    assert (slots["supervised"], slots["masked"]) == (ledger["tokens"]["supervised"], ledger["tokens"]["masked"])
    assert ledger["balanced"]


@pytest.mark.parametrize(
    ("overlong", "expected"), [("drop", (30, 0, 70)), ("truncate", (62, 38, 0)), ("split", (99, 0, 1))]
)
def test_overlong_samples_are_counted_by_token(tmp_path, overlong, expected):
    path = write_records(tmp_path / "a.jsonl", [[70], [30]])
    if overlong == "truncate":
        path = write_records(tmp_path / "a.jsonl", [[[2, 68]], [[2, 28]]])
    if overlong == "split":
        path = write_records(tmp_path / "a.jsonl", [[65], [35]])  # pieces of 32, 32, 1 and 32, 3: one has no target
    tokens = last_ledger(batches(stream(source(path), overlong=overlong)))["tokens"]
    assert (tokens["supervised"] + tokens["masked"], tokens["truncated"], tokens["dropped"]) == expected
    assert tokens["encoded"] == 100


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_of_plain_text_nothing_is_cut_off(tmp_path, overlong):
    path = write_records(tmp_path / "a.jsonl", [[70], [30]])
    tokens = last_ledger(batches(stream(source(path), overlong=overlong)))["tokens"]
    assert (tokens["supervised"] + tokens["masked"], tokens["truncated"], tokens["dropped"]) == (100, 0, 0)


def test_what_is_held_is_pending(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[20]] * 6)
    first = next(stream(source(path), held=3).steps(1, 1))[0]
    records = first.state()["ledger"]["records"]
    assert (records["read"], records["used"], records["pending"]) == (4, 1, 3)
    assert first.state()["ledger"]["tokens"]["pending"] == 60


def test_a_record_is_used_when_its_last_sample_is_packed(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32, 32, 20], [32], [32]])
    used = [b.state()["ledger"]["records"]["used"] for b in batches(stream(source(path), held=1))]
    assert used == [0, 0, 1, 2, 3]


def test_a_sample_lost_by_the_packer_unbalances_the_ledger(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[10]] * 40)
    made = stream(source(path), held=4)
    steps = made.steps(1, 1)
    assert next(steps)[0].state()["ledger"]["balanced"]
    made._rows = made._rows[:-1]
    after = [step[0].state()["ledger"] for step in steps]
    assert not after[-1]["balanced"]
    records, tokens = after[-1]["records"], after[-1]["tokens"]
    assert (records["read"], records["used"], records["pending"], tokens["pending"]) == (40, 39, 0, 0)


def test_progress_rises_to_the_number_of_epochs(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [["why"], [32], ["why"], [32], [32], ["why"], ["why"]])
    found = [batch.epoch for batch in batches(stream(source(path), epochs=2))]
    assert found == sorted(found) and found[-1] == 2.0 and 0 < found[0] < found[1] < 1 < found[3]


def test_progress_of_a_set_that_is_held_whole_starts_low(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[20]] * 10)
    found = [batch.epoch for batch in batches(stream(source(path), held=256))]
    assert np.allclose(found, np.arange(1, 11) / 10, atol=0.02) and found[-1] == 1.0


def test_a_record_moves_progress_when_its_last_sample_is_packed(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32, 32, 32], [32, 32, 32]])
    assert [batch.epoch for batch in batches(stream(source(path), held=1))] == [0, 0, 0.5, 0.5, 0.5, 1]


def test_progress_never_falls_where_the_first_guess_was_too_small(tmp_path):
    def read(sources, options):
        for record in read_jsonl(sources, options):
            yield Record(dict(record), path=record.path, line=record.line, offset=record.offset, size=2 * record.size)

    path = write_records(tmp_path / "a.jsonl", [[32]] * 4)
    make = lambda: stream(source(path, reader=replace(FORWARD, read=read)), held=1, epochs=3)  # noqa: E731
    found = [batch.state() for batch in batches(make())]
    epochs = [state["epoch"] for state in found]
    assert epochs[:5] == [0.5, 1, 1, 1, 1.25] and epochs[-1] == 3.0
    resumed = make()
    resumed.load_state_dict(found[1])
    assert [batch.epoch for batch in batches(resumed)] == epochs[2:]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [0, 50])
def test_progress_where_there_are_no_files_or_no_sizes(shuffle, size):
    def read(sources, options):
        return (Record({"id": i, "parts": [32]}, path="x", line=i + 1, offset=0, size=size) for i in range(8))

    reader = DatasetReader(name="made", summary="", read=read, needs_path=False)
    made = stream(source(reader=reader, shuffle=shuffle), epochs=2)
    assert made.total_bytes == 8
    assert [batch.epoch for batch in batches(made)] == [i / 8 for i in range(1, 17)]


# ------------------------------------------------------------------------------------------------------ reading ahead


def test_nothing_is_encoded_beyond_the_samples_held(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[10]] * 2000)
    encoder = FakeEncoder()
    steps = stream(source(path, shuffle=True), encoder=encoder, held=64, algorithm="first_fit_decreasing").steps(2, 1)
    assert encoder.n_items == 0
    next(steps)
    assert encoder.n_items <= 64 + GROUP_RECORDS + 1
    assert encoder.largest_call <= GROUP_RECORDS


def test_large_records_are_encoded_in_small_groups(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[10]] * 40, filler="x" * 2**19)
    encoder = FakeEncoder()
    next(stream(source(path), encoder=encoder, held=1).steps(1, 1))
    assert encoder.largest_call == 2


# --------------------------------------------------------------------------------------------------- steps and ranks


def test_steps_and_micro_batches(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32]] * 11)
    shapes = [[b.input_ids.shape[0] for b in step] for step in stream(source(path)).steps(4, 2)]
    assert shapes == [[2, 2], [2, 2], [2, 1]]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 11, 12, 13, 14, 23])
def test_ranks_share_the_packs_of_one_rank(tmp_path, world, n):
    path = write_records(tmp_path / "a.jsonl", [[32 - i % 9] for i in range(n)])
    alone = list(stream(source(path)).steps(12, 12))
    ranks = [list(stream(source(path), world=world, rank=r).steps(12, 1)) for r in range(world)]
    assert {len(steps) for steps in ranks} == {len(alone)}
    for number, step in enumerate(alone):
        rows = [lines(steps[number]) for steps in ranks]
        assert [rows[k % world][k // world] for k in range(len(lines(step)))] == lines(step)
        ends = [steps[number][-1].state() for steps in ranks if steps[number]]
        assert all(place(state) == place(step[-1].state()) and state["ledger"] == ends[0]["ledger"] for state in ends)
        assert ends[0]["ledger"]["balanced"]
        for key in ("records", "tokens", "messages"):
            assert ends[0]["ledger"][key] == step[-1].state()["ledger"][key]
    slots = [step[-1].state()["ledger"]["slots"] for step in (ranks[0][-1],)][0]
    assert slots["total"] == sum(b.input_ids.size for steps in ranks for step in steps for b in step)


def test_packs_per_step_must_divide(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32]])
    for packs_per_step, micro_batch, world in ((4, 3, 1), (4, 2, 4), (0, 1, 1), (4, 0, 1)):
        with pytest.raises(RecipeError, match=r"train.packs_per_step: .* not a multiple"):
            next(stream(source(path), world=world).steps(packs_per_step, micro_batch))


# ------------------------------------------------------------------------------------------------------------ resume


def test_changed_data_is_noticed_on_resume(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[20]] * 20)
    state = json.loads(json.dumps(next(stream(source(path)).steps(1, 1))[0].state()))
    write_records(path, [[21]] * 20)
    with pytest.raises(CheckpointError, match="changed since the checkpoint"):
        stream(source(path)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="1 data sources, the recipe 2"):
        stream(source(path), source(path)).load_state_dict(state)


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_edit_of_a_held_record_is_noticed_on_resume_though_its_length_stays(tmp_path, shuffle):
    lines = [json.dumps({"id": 100 + i, "parts": [20]}) for i in range(20)]
    path = write_records(tmp_path / "a.jsonl", lines)
    state = json.loads(json.dumps(next(stream(source(path, shuffle=shuffle)).steps(1, 1))[0].state()))
    held = {index for _, index, *_ in state["held"]}
    assert len(held) > 3
    for i in range(20):
        write_records(path, [line.replace(str(100 + i), "200") for line in lines])
        if i in held:
            with pytest.raises(CheckpointError, match="changed since the checkpoint"):
                stream(source(path, shuffle=shuffle)).load_state_dict(state)
        else:  # what isn't held is the business of those who compare files
            stream(source(path, shuffle=shuffle)).load_state_dict(state)
    write_records(path, lines)
    one = Message("user", "7 10")  # as many tokens, half of them learnt
    half = replace(PARTS, map=lambda record, _: [Conversation((Message("user", f"{record['id']} 10"), one))])
    with pytest.raises(CheckpointError, match="changed since the checkpoint"):
        stream(source(path, shuffle=shuffle, map_function=half)).load_state_dict(state)


def test_resume_seeks_instead_of_reading_from_the_start(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[32]] * 400)
    starts = []

    def read(sources, options, start=None):
        starts.append(start)
        return read_jsonl(sources, options, start)

    made = source(path, reader=replace(NO_INDEX, read=read))
    state = list(islice(stream(made, held=1).steps(1, 1), 300))[-1][0].state()
    resumed = stream(made, held=1)
    resumed.load_state_dict(state)
    starts.clear()
    assert lines(next(resumed.steps(1, 1))) == [301]
    assert [start.line for start in starts] == [301]  # the record held comes from before


# -------------------------------------------------------------------------------------------------------- validation


def test_the_split_is_by_content(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[i % 50 + 2] for i in range(200)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    split = split_validation([source(path)], share=0.2, records=10)
    chosen = [row for row in rows if content_hash(row) + 2**63 < 0.2 * 2**64][:10]
    assert split.reason is None and [dict(record) for _, record in split.records] == chosen
    assert split.hashes == {content_hash(row) for row in chosen}
    assert len(split_validation([source(path)], share=0.9, records=3).records) == 3


def test_duplicates_fall_on_one_side(tmp_path):
    rows = [json.dumps({"id": i % 40, "parts": [32]}) for i in range(120)]
    path = write_records(tmp_path / "a.jsonl", rows)
    split = split_validation([source(path), source(path)], share=0.2, records=5)
    assert len(split.records) == len(split.hashes) == 5
    every = split_validation([source(path)], share=0.2, records=200).records
    assert every and all(record.line <= 40 for _, record in every)  # of equal ones the first
    found = batches(stream(source(path), val_hashes=split.hashes))
    ids = {record["id"] for _, record in split.records}
    assert not ids & {int(batch.input_ids[0, 0]) for batch in found}
    assert last_ledger(found)["records"]["validation"] == 15 and len(found) == 105


@pytest.mark.parametrize(
    ("n", "share", "why"), [(19, 0.5, "only 19 records"), (30, 1e-9, "chose none of 30"), (30, 1.0, "chose all of 30")]
)
def test_with_too_few_rows_the_split_is_off_and_says_why(tmp_path, n, share, why):
    path = write_records(tmp_path / "a.jsonl", [[2 + i] for i in range(n)])
    split = split_validation([source(path)], share=share, records=200)
    assert not split.hashes and not split.records and split.reason is not None and why in split.reason
    assert split_validation([source(path)], share=0.0, records=200) == (frozenset(), [], None)


def test_the_split_reads_no_further_than_it_must(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[2 + i % 30] for i in range(500)])
    n_read = 0

    def read(sources, options):
        nonlocal n_read
        for record in read_jsonl(sources, options):
            n_read += 1
            yield record

    made = source(path, reader=replace(FORWARD, read=read))
    assert len(split_validation([made], share=0.5, records=10).records) == 10
    assert 20 <= n_read < 60


def test_validation_tokens_balance(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[40 + i] for i in range(40)])
    split = split_validation([source(path)], share=0.3, records=5)
    made = stream(source(path), val_hashes=split.hashes)
    val_batches, val_ledger = encode_validation(split.records, FakeEncoder(), max_length=64, micro_batch=2)
    assert [b.n_samples for b in val_batches] == [2, 2, 1] and all(b.input_ids.shape[1] <= 64 for b in val_batches)
    assert sorted(origin for b in val_batches for origin in b.origins()) == sorted(r.origin for _, r in split.records)
    whole = Ledger.from_dict(last_ledger(batches(made)))
    whole.add(val_ledger)
    ledger = whole.as_dict()
    assert ledger["tokens"]["validation"] == sum(record["parts"][0] for _, record in split.records)
    assert ledger["records"]["validation"] == 5 and ledger["balanced"]
    assert encode_validation([], FakeEncoder(), max_length=64, micro_batch=2)[0] == []


def test_validation_stops_at_an_error(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[40]])
    made = source(path)
    pairs = [(made, record) for record in made.read()]
    with pytest.raises(DataError, match="40 tokens"):
        encode_validation(pairs, FakeEncoder(), max_length=32, micro_batch=1, overlong="error")
    found, ledger = encode_validation(pairs, FakeEncoder(), max_length=64, micro_batch=1)
    assert [batch.n_samples for batch in found] == [1]
    assert not ledger.differences()


def test_validation_takes_options_that_hold_a_table(tmp_path):
    made = source(write_records(tmp_path / "a.jsonl", [[5]] * 3), map_options={"roles": {"bot": "assistant"}})
    pairs = [(made, record) for record in made.read()]
    assert encode_validation(pairs, FakeEncoder(), max_length=32, micro_batch=1)[0][0].n_samples == 3


# ---------------------------------------------------------------------------------------------------------- estimate


@pytest.mark.parametrize("algorithm", ["first_fit", "first_fit_decreasing", "best_fit_decreasing"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_small_set_is_counted_exactly(tmp_path, algorithm, shuffle):
    rng = np.random.default_rng(0)
    a = write_records(tmp_path / "a.jsonl", [[int(n)] for n in rng.integers(2, 32, 60)] + [["why"]])
    b = write_records(tmp_path / "b.jsonl", [[int(n), 3] for n in rng.integers(2, 32, 20)])
    made = stream(source(a, shuffle=shuffle), source(b, repeat=2), epochs=3, algorithm=algorithm)
    estimate = made.estimate()
    assert (estimate.records, estimate.exact) == (101, True)
    steps = list(made.steps(4, 1))
    assert estimate.total_packs == sum(map(len, steps)) and estimate.steps(4) == len(steps)
    assert estimate.packs == -(-estimate.total_packs // 3)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_large_set_is_estimated_within_a_few_percent(tmp_path, shuffle):
    rng = np.random.default_rng(0)
    path = write_records(tmp_path / "a.jsonl", [[int(n)] for n in np.clip(rng.lognormal(2, 0.8, 2000), 2, 32)])
    encoder = FakeEncoder()
    made = stream(source(path, shuffle=shuffle), epochs=2, encoder=encoder, algorithm="first_fit_decreasing")
    estimate = made.estimate()
    assert encoder.n_items <= 201 and not estimate.exact
    found = batches(made)
    assert estimate.records == (2000 if shuffle else pytest.approx(2000, rel=0.06))
    assert estimate.total_packs == pytest.approx(len(found), rel=0.1)


def test_a_small_set_that_is_repeated_very_often_is_estimated_at_once(tmp_path):
    one = write_records(tmp_path / "one.jsonl", [[7]])
    more = write_records(tmp_path / "more.jsonl", [[int(n)] for n in range(5, 16)])
    made = stream(source(one, repeat=100_000), source(more), epochs=3)
    began = time.monotonic()
    estimate = made.estimate()
    assert time.monotonic() - began < 2
    assert (estimate.records, estimate.exact) == (100_011, False)
    assert estimate.total_packs == pytest.approx(3 * 100_000 * 7 / 32, rel=0.2)


def test_an_estimate_disturbs_nothing(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[10 + i % 20] for i in range(50)])
    make = lambda: stream(source(path, shuffle=True), epochs=2)  # noqa: E731
    made, other = make(), make()
    made.estimate()
    assert [b.state() for b in batches(made)] == [b.state() for b in batches(other)]
    assert stream(source(path), epochs=0).estimate().total_packs is None


def test_total_bytes(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[10]] * 50)
    size = path.stat().st_size
    assert stream(source(path)).total_bytes == stream(source(path, shuffle=True)).total_bytes == size
    assert stream(source(path, repeat=2)).total_bytes == 2 * size
    assert stream(source(path, first=10)).total_bytes == pytest.approx(size / 5, rel=0.05)
    assert stream(source(path, first=10, shuffle=True)).total_bytes == pytest.approx(size / 5, rel=0.05)


def test_a_pipe_that_was_compressed_has_no_known_size(tmp_path):
    plain = write_records(tmp_path / "a.jsonl", [[32]] * 5)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    made = stream(source(packed), epochs=2)
    assert made.total_bytes is None
    assert batches(made)[-1].epoch == 2.0


def test_progress_of_a_compressed_source_counts_its_passes(tmp_path):
    packed = tmp_path / "a.jsonl.gz"
    plain = write_records(tmp_path / "a.jsonl", [[32]] * 100)
    packed.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=0))
    found = batches(stream(source(packed, repeat=4), held=1))
    assert [batch.epoch for batch in found[99::100]] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.02)


def test_the_fake_map_function_drops():
    assert list(PARTS.map(Record({"id": 1, "parts": ["why"]}, path="a", line=1, offset=0), None)) == [Drop("why")]


# ----------------------------------------------------------------------------------------------------------- threads


def tokenising():
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokenise")]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_stay_so_far_ahead_and_no_farther(tmp_path, monkeypatch, threads):
    monkeypatch.setattr("corefit.data.stream.GROUP_RECORDS", 10)
    path = write_records(tmp_path / "a.jsonl", [[32]] * 3000)
    encoder = FakeEncoder()
    steps = stream(source(path), encoder=encoder, held=16, threads=threads).steps(4, 1)
    for _ in range(40):
        next(steps)
        packed = 4 * (_ + 1)
        # what is held, what the packer has ready, the groups ahead, and those that a step takes
        assert encoder.n_items <= packed + 16 + 10 * (2 + GROUPS_AHEAD * threads + 2)
    time.sleep(0.2)
    assert encoder.n_items >= packed + 10 * GROUPS_AHEAD * threads  # it works while nobody asks
    assert tokenising()
    steps.close()
    assert not tokenising()


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_what_a_reader_raises_comes_after_what_it_gave(tmp_path, monkeypatch, threads):
    monkeypatch.setattr("corefit.data.stream.GROUP_RECORDS", 10)
    path = write_records(tmp_path / "a.jsonl", [[32]] * 100)

    def read(sources, options):
        yield from islice(read_jsonl(sources, options), 75)
        raise DataError("the archive ends here")

    seen = []
    with pytest.raises(DataError, match="the archive ends here"):
        for step in stream(source(path, reader=replace(FORWARD, read=read)), held=4, threads=threads).steps(1, 1):
            seen += step
    assert lines(seen) == list(range(1, len(seen) + 1)) and 60 < len(seen) < 75


@pytest.mark.parametrize("bad", ["{broken", [40]])
def test_the_estimate_says_what_stops_the_run(tmp_path, bad):
    path = write_records(tmp_path / "a.jsonl", [[3]] * 10 + [bad] + [[3]] * 9)
    made = stream(source(path), overlong="error")
    with pytest.raises(DataError, match=r"a\.jsonl:11:"):
        made.estimate()


class Panic(BaseException):
    """Like what tokenizers raises where Rust panics."""


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("raised", [RuntimeError, Panic])
def test_what_a_worker_raises_names_the_records(tmp_path, monkeypatch, raised, threads):
    monkeypatch.setattr("corefit.data.stream.GROUP_RECORDS", 10)
    path = write_records(tmp_path / "a.jsonl", [[32]] * 100)

    class Failing(FakeEncoder):
        def encode(self, items):
            if any(item.text.startswith("57 ") for item, _ in items):
                raise raised("no memory")
            return super().encode(items)

    seen = []
    words = rf"{path}:51 to {path}:60: tokenising failed: {raised.__name__}: no memory"
    with pytest.raises(DataError, match=re.escape(words)):
        for step in stream(source(path), encoder=Failing(), held=4, threads=threads).steps(1, 1):
            seen += step
    assert lines(seen) == list(range(1, len(seen) + 1)) and len(seen) > 40
    assert not tokenising()


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_leaves_no_thread(tmp_path, threads):
    path = write_records(tmp_path / "a.jsonl", [[32]] * 2000)
    with pytest.raises(KeyboardInterrupt):
        for number, _ in enumerate(stream(source(path), threads=threads).steps(1, 1)):
            if number == 5:
                raise KeyboardInterrupt
    gc.collect()
    assert not tokenising()


def failing(what):
    """Two records, then something that no reader should do."""

    def read(sources, options, *, start=None):
        yield from JSONL.read(sources, options)
        if isinstance(what, BaseException):
            raise what
        yield what

    return replace(JSONL, name="mine", read=read, index=None, fetch=None, seekable=False)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (OSError("net gone"), "reader 'mine' failed: OSError: net gone"),
        (ValueError("bad page"), "reader 'mine' failed: ValueError: bad page"),
        (SystemExit(3), "reader 'mine' failed: SystemExit: 3"),
        ({"id": 1}, "reader 'mine' failed: TypeError: gave a dict, expected Record or BadRecord"),
        (None, "reader 'mine' failed: TypeError: gave a NoneType, expected Record or BadRecord"),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_reader_that_fails_is_named(what, words, shuffle, tmp_path):
    one = source(write_records(tmp_path / "f", [(1,), (2,)]), reader=failing(what), shuffle=shuffle)
    with pytest.raises(PluginError, match=f"^{re.escape(words)}$"):
        list(Stream([one], FakeEncoder(), max_length=32, held=1, algorithm="first_fit", epochs=1).steps(1, 1))


def always_from_the_start(sources, options, *, start=None):
    return JSONL.read(sources, options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"read": always_from_the_start}, "ValueError: gave line 1, offset 0 for line "),
        ({"read": always_from_the_start, "index": None}, "ValueError: gave line 1, offset 0 for line "),
        ({"fetch": lambda sources, options, positions: []}, "ValueError: gave 0 records for 4 positions"),
        ({"index": lambda sources, options: [(0, 1, 0)]}, "AttributeError: 'list' object has no attribute 'reshape'"),
    ],
)
def test_a_reader_that_gives_another_record_than_was_asked_for_is_named(changes, words, tmp_path):
    reader = replace(JSONL, name="mine", **changes)
    one = source(write_records(tmp_path / "f", [(1,), (2,), (3,), (4,)]), reader=reader, shuffle=True)
    with pytest.raises(PluginError, match=re.escape(f"reader 'mine' failed: {words}")):
        list(Stream([one], FakeEncoder(), max_length=32, held=1, algorithm="first_fit", epochs=1).steps(1, 1))


def test_a_reader_that_ignores_where_a_run_goes_on_is_named(tmp_path):
    path = write_records(tmp_path / "f", [(9,)] * 40)
    how = {"max_length": 32, "held": 1, "algorithm": "first_fit", "epochs": 1}
    reader = replace(JSONL, name="mine", read=always_from_the_start, index=None)
    at = next(Stream([source(path, reader=reader)], FakeEncoder(), **how).steps(4, 1))[-1].state()
    resumed = Stream([source(path, reader=reader)], FakeEncoder(), **how)
    with pytest.raises(PluginError, match="reader 'mine' failed: ValueError: gave line 1, offset 0 for line "):
        resumed.load_state_dict(at)
        list(resumed.steps(4, 1))


def test_a_file_that_a_disk_refuses_is_named_and_the_steps_before_can_be_saved(tmp_path):
    path = write_records(tmp_path / "f", [(1,), (2,)])
    one = source(path, reader=failing(OSError(5, "Input/output error", str(path))))
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: can't be read: input/output error$"):
        list(Stream([one], FakeEncoder(), max_length=32, held=1, algorithm="first_fit", epochs=1).steps(1, 1))
