"""The arena: the same batches as the data gives, and never a stale or a torn one."""

import json
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from fakes import FORWARD, FakeEncoder, source, write_records

from corefit.data import arena as module
from corefit.data.arena import HEADER, Arena, differences, write_arena
from corefit.data.block import Block, join
from corefit.data.jsonl import read_jsonl
from corefit.data.source import split_validation
from corefit.data.stream import Stream
from corefit.errors import CheckpointError, DataError, PluginError, RecipeError, RunError
from corefit.types import DatasetReader

ROWS = [[i % 50 + 2, [3, i % 9 + 1, 2, 4]][: 1 + i % 2] if i % 7 else ["no_answer"] for i in range(90)]
SETTINGS = {"max_length": 32, "held": 16, "epochs": 2, "seed": 3}


def write(folder, *sources, key=None, vocab_size=1000, threads=0):
    made = Stream(sources, FakeEncoder(), max_length=32, threads=threads)
    write_arena(folder, key or {}, lambda: made.sizes, made.encoded(), vocab_size=vocab_size)
    return Arena(folder, key or {})


def batches(sources, steps=(4, 2), state=None, **changes):
    made = Stream(sources, changes.pop("encoder", None) or FakeEncoder(), **{**SETTINGS, **changes})
    if state is not None:
        made.load_state_dict(json.loads(json.dumps(state)))
    return [batch for step in made.steps(*steps) for batch in step]


def plain(batch):
    arrays = (batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens)
    return [a.tolist() for a in arrays], batch.epoch, batch.n_tokens, batch.n_supervised, batch.origins()


def without_cursor(state):
    return {key: value for key, value in state.items() if key != "cursor"}


@pytest.fixture
def sources(tmp_path):
    a = write_records(tmp_path / "a.jsonl", ROWS)
    b = write_records(tmp_path / "b.jsonl", [[7], ["encoder: odd"], [5, 40]] * 5)
    return [source(a, shuffle=True, repeat=2), source(b)]


MIXES = [{}, {"ratio": 1.0}, {"first": 20}, {"shuffle": False}]


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
@pytest.mark.parametrize("algorithm", ["first_fit_decreasing", "first_fit", "best_fit_decreasing"])
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_an_arena_gives_the_batches_of_the_data(tmp_path, monkeypatch, sources, mix, algorithm, overlong, vocab_size):
    sources[0] = replace(sources[0], **mix)
    made = write(tmp_path / "arena", *sources, vocab_size=vocab_size)
    assert made.block.tokens.dtype.itemsize == (2 if vocab_size == 1000 else 4)
    monkeypatch.setattr("corefit.data.stream.KNOWN_RECORDS", 11)
    hashes = split_validation(sources, share=0.3, records=6).hashes
    settings = {"algorithm": algorithm, "overlong": overlong, "val_hashes": hashes}
    wanted = batches(sources, **settings)
    counting = FakeEncoder()
    found = batches(sources, arena=made, encoder=counting, **settings)
    assert len(wanted) > 8 and list(map(plain, found)) == list(map(plain, wanted))
    assert not counting.n_items
    assert [without_cursor(b.state()) for b in found] == [without_cursor(b.state()) for b in wanted]
    assert found[-1].state()["ledger"]["balanced"]


def test_a_run_goes_on_from_an_arena_where_it_read_the_data_and_the_reverse(tmp_path, monkeypatch, sources):
    made = write(tmp_path / "arena", *sources)
    monkeypatch.setattr("corefit.data.stream.KNOWN_RECORDS", 7)
    wanted = batches(sources, steps=(2, 2))
    found = batches(sources, steps=(2, 2), arena=made)
    for k in range(0, len(wanted) - 1, 3):
        rest = list(map(plain, wanted[k + 1 :]))
        assert list(map(plain, batches(sources, (2, 2), wanted[k].state(), arena=made))) == rest
        assert list(map(plain, batches(sources, (2, 2), found[k].state()))) == rest
        assert list(map(plain, batches(sources, (2, 2), found[k].state(), arena=made))) == rest


def test_ranks_take_strides_of_one_plan(tmp_path, sources):
    made = write(tmp_path / "arena", *sources)
    whole = batches(sources, steps=(4, 1), arena=made)
    parts = [batches(sources, steps=(4, 1), arena=made, world=2, rank=rank) for rank in (0, 1)]
    assert [b.origins() for b in whole[::2]] == [b.origins() for b in parts[0]]
    assert [b.origins() for b in whole[1::2]] == [b.origins() for b in parts[1]]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_write_the_same_bytes(tmp_path, sources, threads):
    write(tmp_path / "one", *sources)
    write(tmp_path / "other", *sources, threads=threads)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_a_reader_that_cannot_seek_is_shuffled_without_being_held(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [[5]] * 50)
    one = source(path, reader=FORWARD, shuffle=True)
    made = write(tmp_path / "arena", replace(one, shuffle=False))
    stream = Stream([one], FakeEncoder(), max_length=32, arena=made)
    assert stream.notices == [] and stream.total_bytes == path.stat().st_size
    found = [origin for step in stream.steps(1, 1) for batch in step for origin in batch.origins()]
    assert len(set(found)) == 50 and found != sorted(found)


# ------------------------------------------------------------------------------------------------- stale, torn, refused


def test_what_it_was_made_from_is_compared(tmp_path, sources):
    folder = tmp_path / "arena"
    write(folder, *sources, key={"template": "chatml", "data.0.path": [["a.jsonl", 10, 3]]})
    with pytest.raises(RecipeError) as refused:
        Arena(folder, {"template": "internlm_chat", "data.0.path": [["a.jsonl", 11, 3]], "code": "x"})
    assert str(refused.value) == (
        f"pack.arena: {folder} was made from something else "
        '(code: null, now "x"; data.0.path: [["a.jsonl", 10, 3]], now [["a.jsonl", 11, 3]]; '
        'template: "chatml", now "internlm_chat"); `corefit pack` with the same flags makes it anew'
    )
    assert differences({"a": 1}, {"a": 1}) == []
    assert len(differences({}, {"a": "x" * 500})[0]) < 100


@pytest.mark.parametrize("name", ["records", "samples", "tokens", "spans", "cuts"])
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "gone"])
def test_a_torn_arena_is_never_used(tmp_path, sources, name, damage):
    folder = tmp_path / "arena"
    write(folder, *sources)
    path = folder / f"{name}.bin"
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes({"flip": data, "cut": data[:-1], "grow": data + b"\0"}[damage])
    with pytest.raises(DataError, match=rf"{name}\.bin: .*`corefit pack` makes it anew"):
        batches(sources, arena=Arena(folder, {}))


def test_each_mib_is_checked_when_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECKED", 64)
    monkeypatch.setattr("corefit.data.stream.KNOWN_RECORDS", 4)
    one = source(write_records(tmp_path / "a.jsonl", [[32]] * 60))
    made = write(tmp_path / "arena", one)
    path = tmp_path / "arena" / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last record
    path.write_bytes(data)
    stream = Stream([one], FakeEncoder(), max_length=32, held=1, arena=Arena(tmp_path / "arena", {})).steps(1, 1)
    assert [len(next(stream)) for _ in range(50)] == [1] * 50
    with pytest.raises(DataError, match=r"tokens\.bin: torn: byte 3,776 and what follows"):
        list(stream)
    with pytest.raises(DataError, match="changed while the run was reading it"):  # mapped before the damage
        made.take(np.array([0, 59]))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "arena.header: torn: "),
        ("[]", "arena.header: torn: "),
        ('{"format": 1}', "arena.header: torn: 'crc32'"),
        ('{"format": 1, "crc32": 5}', "arena.header: torn: its checksum is wrong"),
    ],
)
def test_a_torn_header_is_refused(tmp_path, sources, text, error):
    write(tmp_path / "arena", *sources)
    (tmp_path / "arena" / HEADER).write_text(text)
    with pytest.raises(DataError, match=error):
        Arena(tmp_path / "arena", {})


def test_another_format_and_no_arena_at_all(tmp_path, sources):
    write(tmp_path / "arena", *sources)
    header = json.loads((tmp_path / "arena" / HEADER).read_text())
    (tmp_path / "arena" / HEADER).write_text(json.dumps({**header, "format": 99}))
    with pytest.raises(RecipeError, match="of format 99, this corefit reads 1"):
        Arena(tmp_path / "arena", {})
    with pytest.raises(RecipeError, match=r"gone: no arena there; `corefit pack --out .*gone` makes one"):
        Arena(tmp_path / "gone", {})


def test_it_is_written_whole_or_not_at_all(tmp_path, sources, monkeypatch):
    folder = tmp_path / "arena"
    write(folder, *sources)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def blocks():
        made = Stream(sources, FakeEncoder(), max_length=32)
        yield next(made.encoded())
        raise DataError("a.jsonl:3: broken")

    with pytest.raises(DataError, match="a.jsonl:3"):
        write_arena(folder, {}, list, blocks(), vocab_size=10)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="arena: the arena can't be written: no space left on device"):
        write(folder, *sources)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    whole = Path.rename

    def interrupt(path, target):
        if path.name.startswith(".tmp-arena-") and not path.name.endswith("-old"):
            raise KeyboardInterrupt
        return whole(path, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(folder, *sources)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "arena", "b.jsonl"]
    assert len(write(folder, *sources[:1]).sizes) == 1  # and an older one is replaced


def test_what_is_no_arena_is_not_replaced(tmp_path, sources):
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "both"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / "both" / HEADER).write_text("{}")
    for name in ("folder", "both"):
        with pytest.raises(RecipeError, match="is there and no arena; name a new folder"):
            write(tmp_path / name, *sources)
        assert (tmp_path / name / "mine").read_text() == "mine"
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RecipeError, match="can't be written: "):
            write(path, *sources)
    assert (tmp_path / "file").read_text() == "mine"


def test_only_the_arena_itself_is_replaced_also_through_a_link(tmp_path, sources):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("link.old", "real.old", "real.part"):
        (tmp_path / name).mkdir()
    for _ in range(2):
        assert write(tmp_path / "link", *sources).folder == tmp_path / "link"
    assert (tmp_path / "real" / HEADER).is_file() and (tmp_path / "link").is_symlink()
    names = ["a.jsonl", "b.jsonl", "link", "link.old", "real", "real.old", "real.part"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_mounted_disk_which_cannot_be_renamed_is_filled(tmp_path, sources, monkeypatch):
    (tmp_path / "arena" / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(Path, "rename", lambda self, target: pytest.fail(f"{self} is renamed to {target}"))
    write(tmp_path / "arena", *sources)
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "arena")
    assert len(write(tmp_path / "arena", *sources[:1]).sizes) == 1  # an older one is replaced
    Arena(tmp_path / "arena", {}).verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "arena", "b.jsonl"]
    assert not [path.name for path in (tmp_path / "arena").iterdir() if path.name.startswith(".tmp")]


def test_two_that_are_written_at_once_are_both_whole(tmp_path, sources):
    folder, made = tmp_path / "arena", Stream(sources, FakeEncoder(), max_length=32)

    def blocks():
        for number, block in enumerate(made.encoded()):
            if number == 0:
                write(folder, *sources)
            yield block

    write_arena(folder, {}, lambda: made.sizes, blocks(), vocab_size=1000)
    Arena(folder, {}).verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "arena", "b.jsonl"]


def test_a_readers_own_trouble_is_not_the_disks(tmp_path):
    def read(sources, options=None):
        yield from islice(read_jsonl(sources), 1)
        raise OSError(5, "Input/output error")

    path, odd = write_records(tmp_path / "a.jsonl", [[5]] * 5), DatasetReader(name="odd", summary="odd", read=read)
    with pytest.raises(PluginError, match=r"reader 'odd' failed: OSError: .*Input/output error"):
        write(tmp_path / "arena", source(path, reader=odd))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_state_from_other_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("corefit.data.stream.KNOWN_RECORDS", 8)
    rows = [[i % 9 + 2] for i in range(60)]
    one = source(write_records(tmp_path / "a.jsonl", rows))
    state = batches([one], (1, 1), arena=write(tmp_path / "arena", one))[4].state()
    write_records(tmp_path / "a.jsonl", [[3], *rows])
    with pytest.raises(CheckpointError, match="changed since the checkpoint was written"):
        batches([one], (1, 1), state, arena=write(tmp_path / "arena", one))
    write_records(tmp_path / "a.jsonl", rows[:3])
    with pytest.raises(CheckpointError, match="changed since the checkpoint was written"):
        batches([one], (1, 1), state, arena=write(tmp_path / "arena", one))


def test_groups_are_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("corefit.data.stream.GROUP_BYTES", 300)
    made = Stream([source(write_records(tmp_path / "a.jsonl", [[5]] * 100))], FakeEncoder(), max_length=32)
    blocks = list(made.encoded())
    assert sum(len(block.records) for block in blocks) == 100 and max(len(block.records) for block in blocks) < 15


def test_an_arena_without_samples(tmp_path):
    one = source(write_records(tmp_path / "a.jsonl", [["no_answer"]] * 3))
    made = write(tmp_path / "arena", one)
    with pytest.raises(DataError, match=r"no sample in 3 records \(no_answer 3\)"):
        batches([one], arena=made)


def test_blocks_are_joined_as_they_are_written(tmp_path, monkeypatch, sources):
    monkeypatch.setattr("corefit.data.stream.GROUP_RECORDS", 16)
    made = Stream(sources, FakeEncoder(), max_length=32)
    blocks = list(made.encoded())
    one, other = join(blocks), write(tmp_path / "arena", *sources).block
    for name in ("records", "samples", "tokens", "spans", "cuts"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
    assert list(one.words) == list(other.words) and isinstance(one, Block) and len(blocks) > 3
