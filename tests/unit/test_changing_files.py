"""Data files that change under a running stream: rows that are added are left alone, anything else ends the run."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import corefit_oasst1
import pytest
from fakes import FORWARD, JSONL, FakeEncoder, source, write_records

from corefit.data.arena import Arena, write_arena
from corefit.data.files import file_state
from corefit.data.jsonl import fetch_jsonl, index_jsonl, read_jsonl
from corefit.data.source import as_found
from corefit.data.stream import Stream
from corefit.errors import DataError
from corefit.types import Document, MapFunction, Position, Sources

N = 400
"""Records, of over 1 KB: an epoch is two groups, and more than a reader has in its buffers."""
BOUNDED = replace(JSONL, fetch=fetch_jsonl, bounded=True)
FLAT = next(corefit_oasst1.corefit_dataset_readers())
TEXTS = MapFunction(name="texts", summary="", map=lambda record, _: [Document(f"{record['prompt']['n']} 32")])


def rows(first: int = 1, n: int = N) -> list[str]:
    return [json.dumps({"id": i, "parts": [32], "filler": "x" * 1000}) for i in range(first, first + n)]


def messages(first: int = 1) -> list[str]:
    """Give as many trees of one message each."""
    said = [{"message_id": f"m{i}", "role": "prompter", "text": "x" * 1000, "n": i} for i in range(first, first + N)]
    return [json.dumps(one) for one in said]


def write(path: Path, lines: list[str]) -> None:
    text = "[" + ",\n".join(lines) + "]\n" if path.suffix == ".json" else "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode(), 1) if path.suffix == ".gz" else text.encode())


FORMS = {
    "lines": ("a.jsonl", {"reader": BOUNDED}),
    "shuffled lines": ("a.jsonl", {"reader": BOUNDED, "shuffle": True}),
    "shuffled lines without fetch": ("a.jsonl", {"reader": JSONL, "shuffle": True}),
    "list": ("a.json", {"reader": BOUNDED}),
    "shuffled list": ("a.json", {"reader": BOUNDED, "shuffle": True}),
    "gzip": ("a.jsonl.gz", {"reader": BOUNDED}),
    "a reader that can't seek": ("a.jsonl", {"reader": FORWARD}),
    "trees": ("a.jsonl", {"reader": FLAT, "map_function": TEXTS}),
    "shuffled trees": ("a.jsonl", {"reader": FLAT, "map_function": TEXTS, "shuffle": True}),
}


def make(folder: Path, form: str, **more):
    """Give a source of this form, its file written."""
    name, changes = FORMS[form]
    write(folder / name, messages() if "trees" in form else rows())
    return source(folder / name, **changes, **more)


def known(one):
    """Give the source as ``prepare`` makes it."""
    return replace(one, sources=as_found(one.sources))


def begin(one, *, epochs=2, steps=3, **more):
    """Give the steps of a stream, and what the first of them held."""
    stream = Stream([one], FakeEncoder(), max_length=32, held=1, algorithm="first_fit", epochs=epochs, **more)
    made = stream.steps(1, 1)
    return made, [next(made)[0] for _ in range(steps)]


def later(path: Path) -> None:
    """Move the time of change on: two changes within one tick of the file system's clock can't be told apart."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def edit(path: Path) -> None:
    """Change a record in the middle, the file's size stays."""
    data = path.read_bytes()
    at = max(data.rfind(b"xx", 0, 3 * len(data) // 4), len(data) // 2)
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    later(path)


def replaced(path: Path) -> None:
    """Put another file in its place."""
    other = path.with_name("new" + "".join(path.suffixes))
    write(other, messages(5000) if b"message_id" in path.read_bytes()[:100] else rows(5000))
    other.replace(path)


def remove(path: Path) -> None:
    path.unlink()


def garble(path: Path) -> None:
    """Write zeros over the second half."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\0" * (size - size // 2))
    later(path)


DAMAGE = {
    "cut": (cut, r"[\d,]+ -> [\d,]+ bytes"),
    "empty": (empty, r"[\d,]+ -> 0 bytes"),
    "edit": (edit, r"edited, [\d,]+ bytes as before"),
    "replaced": (replaced, r"[\d,]+ -> [\d,]+ bytes"),
    "remove": (remove, "it is gone"),
    "garble": (garble, r"edited, [\d,]+ bytes as before"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_changes_ends_the_run_with_its_name_and_trains_on_nothing_of_it(tmp_path, form, damage):
    harm, words = DAMAGE[damage]
    for on_bad in ("skip", "error")[: 1 + form.endswith(("lines", "list"))]:
        one = make(tmp_path, form, on_bad=on_bad)
        path = one.sources.paths[0]
        steps, found = begin(one)
        harm(path)
        with pytest.raises(DataError) as caught:
            for (batch,) in steps:
                found.append(batch)
        what = rf"{path}: changed while the run was reading it: {words}; put it back and --resume, or start anew"
        assert re.fullmatch(what, str(caught.value)), str(caught.value)
        ids = [int(batch.input_ids[0, 0]) for batch in found]
        assert len(set(ids)) == len(ids) >= 3 and set(ids) <= set(range(1, N + 1))
        assert all(batch.n_tokens == 32 for batch in found)
        assert found[-1].state()["ledger"]["balanced"]


def ids(batches) -> list[int]:
    return [int(batch.input_ids[0, 0]) for batch in batches]


GROWING = [(form, "whole") for form in FORMS if FORMS[form][1]["reader"].bounded]
GROWING += [("lines", "torn"), ("shuffled lines", "torn"), ("trees", "torn"), ("lines", "without its line end")]


@pytest.mark.parametrize(("form", "last"), GROWING)
def test_rows_added_during_a_run_are_left_alone_and_said_once(tmp_path, form, last):
    one = make(tmp_path, form, on_bad="skip")
    path = one.sources.paths[0]
    if last != "whole":  # somebody was writing when the run began
        os.truncate(path, path.stat().st_size - (1 if last == "without its line end" else 500))
    steps, wanted = begin(one)
    wanted += [batch for (batch,) in steps]
    assert len(wanted) == 2 * (N - (last == "torn"))
    stream = Stream([one], FakeEncoder(), max_length=32, held=1, algorithm="first_fit", epochs=2, threads=2)
    made = stream.steps(1, 1)
    found, said = [next(made)[0] for _ in range(3)], list(stream.notices)
    more = messages(5000) if "trees" in form else rows(5000)
    text = ("x" * 500 + "\n" + "\n".join(more)).encode()
    for part in (text[:70_000], text[70_000:]):
        with path.open("ab") as file:
            file.write(gzip.compress(part) if path.suffix == ".gz" else part)
        found += [next(made)[0] for _ in range(N // 2)]
    found += [batch for (batch,) in made]
    assert ids(found) == ids(wanted)
    assert found[-1].state() == wanted[-1].state()
    told = [line for line in stream.notices if line not in said]
    assert len(told) == 1 and told[0].startswith(f"{path}: grew while the run was reading it (")


def test_rows_added_to_a_file_that_was_edited_too_or_that_its_reader_does_not_bound_end_the_run(tmp_path):
    for form, head in (("lines", True), ("lines", False), ("a reader that can't seek", None)):
        one = make(tmp_path, form)
        path = one.sources.paths[0]
        steps, _ = begin(one)
        data = bytearray(path.read_bytes())
        if head is not None:
            data[5000 if head else -1000] ^= 1
            data[100 if head else -100] ^= 1
        path.write_bytes(data + b'{"id": 9, "parts": [32]}\n')
        with pytest.raises(DataError, match=r"a.jsonl: changed while the run was reading it: [\d,]+ -> [\d,]+ bytes"):
            list(steps)


@pytest.mark.parametrize("harm", [cut, remove])
def test_what_is_held_in_memory_may_change_on_disk(tmp_path, harm):
    one = make(tmp_path, "a reader that can't seek", shuffle=True)
    steps, found = begin(one)
    harm(one.sources.paths[0])
    found += [batch for (batch,) in steps]
    assert sorted(ids(found)) == sorted([*range(1, N + 1)] * 2)


def test_a_file_that_changes_before_the_first_step_or_while_it_is_indexed_is_named(tmp_path):
    for form in ("lines", "shuffled lines", "shuffled list", "a reader that can't seek"):
        one = known(make(tmp_path, form))
        path = one.sources.paths[0]
        cut(path)
        with pytest.raises(DataError, match=rf"{path}: changed while the run was reading it: [\d,]+ -> [\d,]+ bytes"):
            begin(one)
        empty(path)
        with pytest.raises(DataError, match=rf"{path}: changed while the run was reading it: [\d,]+ -> 0 bytes"):
            begin(one)
    one = known(make(tmp_path, "a reader that can't seek", shuffle=True))
    with pytest.raises(DataError, match="changed while"):
        begin(replace(one, reader=replace(FORWARD, read=lambda *given: edit(path) or read_jsonl(*given))))


def test_of_several_files_the_one_that_changed_is_named(tmp_path):
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for k, path in enumerate(paths):
        write(path, rows(1 + k * N))
    for shuffle in (False, True):
        steps, _ = begin(source(*paths, shuffle=shuffle, reader=BOUNDED))
        edit(paths[2])
        with pytest.raises(DataError, match=r"c\.jsonl: changed while the run was reading it: edited"):
            list(steps)


def test_a_data_file_that_changes_while_it_is_packed_makes_no_arena(tmp_path):
    one = make(tmp_path, "lines")
    stream = Stream([one], FakeEncoder(), max_length=32)

    def blocks():
        for block in stream.encoded():
            yield block
            edit(one.sources.paths[0])

    with pytest.raises(DataError, match="changed while the run was reading it: edited"):
        write_arena(tmp_path / "arena", {}, lambda: stream.sizes, blocks(), vocab_size=100)
    assert not (tmp_path / "arena").exists()


def test_a_state_that_a_run_goes_on_from_is_not_taken_from_a_file_that_changes_meanwhile(tmp_path):
    one = known(make(tmp_path, "lines"))
    _, found = begin(one)
    stream = Stream([one], FakeEncoder(), max_length=32, held=1, algorithm="first_fit")
    edit(one.sources.paths[0])
    with pytest.raises(DataError, match="changed while the run was reading it: edited"):
        stream.load_state_dict(found[-1].state())


# ------------------------------------------------------------------------------------------------------------ the arena


def arena(tmp_path: Path):
    one = source(write_records(tmp_path / "a.jsonl", [[32]] * 3000))
    stream = Stream([one], FakeEncoder(), max_length=32)
    write_arena(tmp_path / "arena", {}, lambda: stream.sizes, stream.encoded(), vocab_size=10**6)
    return replace(one, shuffle=True), Arena(tmp_path / "arena", {})


@pytest.mark.parametrize("damage", ["cut", "empty", "edit", "grow"])
def test_an_arena_that_changes_under_a_run_ends_it_before_it_is_touched(tmp_path, damage):
    """In a process of its own: what is mapped and cut off kills the process that touches it."""
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
from test_changing_files import FakeEncoder, Stream, arena, cut, edit, empty, later
from corefit.errors import DataError
def grow(path):
    path.open("ab").write(bytes(8))
for name in ("records", "samples", "tokens", "spans"):
    one, made = arena(Path(sys.argv[1]))
    steps = Stream([one], FakeEncoder(), max_length=32, held=1, algorithm="first_fit", arena=made).steps(4, 2)
    for _ in range(3):
        next(steps)
    {damage}(made.folder / (name + ".bin"))
    try:
        print(sum(1 for _ in steps))
    except DataError as error:
        print(error, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    words = r"edited, [\d,]+ bytes as before" if damage == "edit" else r"[\d,]+ -> [\d,]+ bytes"
    what = "".join(
        rf"{tmp_path / 'arena' / name}.bin: changed while the run was reading it: {words}; put it back and .*\n"
        for name in ("records", "samples", "tokens", "spans")
    )
    assert done.returncode == 0 and re.fullmatch(what, done.stdout), (done.returncode, done.stdout, done.stderr)


def test_an_arena_that_is_replaced_or_removed_under_a_run_stays_mapped_as_it_was(tmp_path):
    one, made = arena(tmp_path)
    wanted = [origin for (batch,) in Stream([one], FakeEncoder(), max_length=32, arena=made).steps(99, 99)
              for origin in batch.origins()]  # fmt: skip
    steps = Stream([one], FakeEncoder(), max_length=32, arena=made).steps(99, 99)
    found = [*next(steps)]
    other = source(write_records(tmp_path / "b.jsonl", [[30]] * 50))
    stream = Stream([other], FakeEncoder(), max_length=32)
    write_arena(tmp_path / "arena", {}, lambda: stream.sizes, stream.encoded(), vocab_size=10**6)
    found += next(steps)
    for path in (tmp_path / "arena").iterdir():
        path.unlink()
    found += [batch for (batch,) in steps]
    assert [origin for batch in found for origin in batch.origins()] == wanted


# ---------------------------------------------------------------------------------------------------------- file states


def test_a_state_is_of_a_file_and_of_its_first_bytes(tmp_path):
    path = tmp_path / "a"
    for size in (0, 1, 4095, 4096, 4097, 8192, 20_000):
        path.write_bytes(bytes(i % 251 for i in range(size)))
        state = file_state(path)
        assert (state.size, state.mtime_ns) == (size, path.stat().st_mtime_ns)
        with path.open("ab") as file:
            file.write(b"more")
        assert file_state(path, size).ends == state.ends
        for at in {0, size // 2, size - 1} & set(range(size)):
            data = bytearray(path.read_bytes())
            data[at] ^= 1
            path.write_bytes(data)
            assert (file_state(path, size).ends == state.ends) == (4096 <= at < size - 4096)
            data[at] ^= 1
            path.write_bytes(data)
    with pytest.raises(DataError, match="gone: no such file"):
        file_state(tmp_path / "gone")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz"])
def test_no_reader_goes_beyond_the_size_that_it_is_given(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write(path, rows(1, 50))
    states = (file_state(path),)
    bounded = Sources((path,), states=states)
    wanted = list(map(repr, read_jsonl(bounded)))
    index = index_jsonl(bounded).tolist()
    with path.open("ab") as file:
        file.write(gzip.compress(b"x\n") if suffix == "jsonl.gz" else b"x\n")
    assert list(map(repr, read_jsonl(bounded))) == wanted and index_jsonl(bounded).tolist() == index
    assert list(map(repr, fetch_jsonl(bounded, None, [Position(*row) for row in index]))) == wanted
    assert list(map(repr, read_jsonl(Sources((path,))))) != wanted
    names = replace(bounded, fields=("id",))
    assert [dict(record) for record in read_jsonl(names)] == [{"id": i} for i in range(1, 51)]
    last = list(read_jsonl(bounded, None, Position(*index[-1])))
    assert list(map(repr, last)) == wanted[-1:]


def test_a_pipe_has_no_state(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    files = Sources((tmp_path / "pipe",))
    assert as_found(files) is files
