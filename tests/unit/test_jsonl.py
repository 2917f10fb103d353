"""The jsonl reader: every form of file, every kind of bad record, seeking, memory; which files are meant."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from corefit.data import jsonl, kernel
from corefit.data.files import find_files, spool
from corefit.data.jsonl import content_hash, extract, fetch_jsonl, index_jsonl, read_jsonl
from corefit.errors import DataError
from corefit.types import BadRecord, Position, Record, Sources

ROWS = [{"text": f"row {i} é\n", "n": i, "deep": {"a": [1, {"b": "[{,"}]}} for i in range(5)]


def sources(*paths: Path, limit: int = 64 * 2**20) -> Sources:
    return Sources(paths, limit)


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path, limit: int = 64 * 2**20) -> list[Record | BadRecord]:
    return list(read_jsonl(sources(path, limit=limit)))


def place(record: Record | BadRecord) -> Position:
    return Position(record.file, record.line, record.offset)


def only_bad(path: Path, limit: int = 64 * 2**20) -> BadRecord:
    (bad,) = [r for r in read(path, limit) if isinstance(r, BadRecord)]
    return bad


# ------------------------------------------------------------------------------------------------------------ forms


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_lines(tmp_path, suffix, bom, ending, last):
    raw = [json.dumps(row, ensure_ascii=False).encode() + ending for row in ROWS]
    raw.insert(2, b" \t" + ending)  # blank lines count as lines and are no records
    raw.insert(0, ending)
    data = bom + b"".join(raw)
    data = data if last else data.removesuffix(ending)
    path = write(tmp_path / f"a.{suffix}", data)
    records = read(path)
    assert [dict(r) for r in records] == ROWS
    assert [r.line for r in records] == [2, 3, 5, 6, 7]
    assert [r.origin for r in records][0] == f"{path}:2"
    for r in records:
        assert json.loads(data[r.offset : r.offset + r.size]) == dict(r)
    assert len(data) - sum(r.size for r in records) == len(bom) + 2 + 2 * len(ending)


@pytest.mark.parametrize("suffix", ["json", "json.gz"])
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"separators": (",", ":")}])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf \n"])
def test_list(tmp_path, suffix, style, bom):
    data = bom + json.dumps(ROWS, ensure_ascii=False, **style).encode() + b"\n"
    records = read(write(tmp_path / f"a.{suffix}", data))
    assert [dict(r) for r in records] == ROWS
    for r in records:
        element = data[r.offset : r.offset + r.size]
        assert element[-1:] in b",]" and json.loads(element[:-1]) == dict(r)
        assert r.line == data.count(b"\n", 0, r.offset) + 1


def test_several_files_in_order_and_a_list_among_them(tmp_path):
    a = write(tmp_path / "a.jsonl", '{"n": 0}\n{"n": 1}')
    b = write(tmp_path / "b.json", '[{"n": 2}, {"n": 3}]')
    c = write(tmp_path / "c.jsonl.gz", '{"n": 4}\n')
    records = list(read_jsonl(sources(a, b, c)))
    assert [(r["n"], r.file, r.path) for r in records] == [
        (0, 0, str(a)),
        (1, 0, str(a)),
        (2, 1, str(b)),
        (3, 1, str(b)),
        (4, 2, str(c)),
    ]


def test_gzip_is_told_by_content_not_by_name(tmp_path):
    path = tmp_path / "packed.jsonl"
    path.write_bytes(gzip.compress(b'{"n": 1}\n'))
    assert read(path)[0]["n"] == 1
    path = tmp_path / "plain.jsonl.gz"
    path.write_bytes(b'{"n": 1}\n')
    assert read(path)[0]["n"] == 1


def test_duplicate_keys_the_last_wins(tmp_path):
    assert read(write(tmp_path / "a.jsonl", '{"a": 1, "a": 2}'))[0]["a"] == 2


def test_the_real_lists_and_lines(shared):
    for name, count in {"alpaca_en_demo.json": 1000, "alpaca_zh_demo.json": 1000}.items():
        path = shared / "data" / name
        assert [dict(r) for r in read(path)] == json.loads(path.read_bytes())[:count]
    for name in ("guanaco_100.jsonl", "en_100_tree.jsonl"):
        path = shared / "data" / "oasst" / name
        records = read(path)
        assert [dict(r) for r in records] == [json.loads(line) for line in path.read_bytes().splitlines()]
        assert sum(r.size for r in records) == path.stat().st_size


# ------------------------------------------------------------------------------------------------------- bad records

NEST = '{"a":' * 500 + "1" + "}" * 500
BAD = {
    "comma": ('{"a": 1 "b": 2}', "expecting ',' delimiter, found '\"'", 9),
    "value": ('{"a": }', "expecting value, found '}'", 7),
    "form feed": ('{"a": \x0c1}', r"expecting value, found '\x0c'", 7),
    "nan": ('{"a NaN": [NaN]}', "NaN is not a JSON value", 12),
    "infinity": ('{"a": Infinity}', "Infinity is not a JSON value", 7),
    "minus infinity": ('{"a": -Infinity}', "-Infinity is not a JSON value", 7),
    "list": ("[1, 2]", "expected a JSON object, found a list", 1),
    "number": ("12", "expected a JSON object, found a number", 1),
    "string": ('"text"', "expected a JSON object, found a string", 1),
    "null": ("null", "expected a JSON object, found null", 1),
    "true": ("true", "expected a JSON object, found true or false", 1),
    "lone high": (r'{"a": "\\ud83d \ud83d"}', r"a lone surrogate, \ud83d, is not a character", 16),
    "lone low": (r'{"\uDE00": 1}', r"a lone surrogate, \uDE00, is not a character", 3),
    "high twice": (r'{"a": "\ud83d\ud83d\ude00"}', r"a lone surrogate, \ud83d, is not a character", 8),
    "utf-8": (b'{"a": "\xc3\xa9\xff"}', "byte 0xff is not UTF-8", 9),
    "raw surrogate": (b'{"a": "\xed\xa0\xbd"}', "byte 0xed is not UTF-8", 8),
    "control": ('{"a": "\x01"}', "a raw control character", 8),
    "nul": (b'{"a": 1}\0', r"broken JSON: '\x00' after the end of the record", 9),
    "escape": (r'{"a": "\x"}', "an escape that JSON doesn't have", 8),
    "depth": ('{"a":' + NEST + "}", "more than 500 levels of brackets", 2501),
    "mixed depth": ('{"a": ' + "[" * 500 + "]" * 500 + "}", "more than 500 levels of brackets", 506),
    "digits": ('{"s": "' + "1" * 5000 + '", "a": ' + "7" * 4301 + "}", "an integer of more than 4,300 digits", 5016),
    "negative digits": ('{"a": -' + "7" * 4301 + "}", "an integer of more than 4,300 digits", 8),
    "two objects": ('{"a": 1} {"b": 2}', "broken JSON: '{' after the end of the record", 10),
}
BROKEN = {"comma", "value", "form feed", "control", "nul", "escape", "two objects"}


def as_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_and_reading_goes_on(tmp_path, kind):
    text, reason, column = BAD[kind]
    path = write(tmp_path / "a.jsonl", b'{"n": 0}\n' + as_bytes(text) + b'\n{"n": 2}\n')
    first, bad, last = read(path)
    assert (first["n"], last["n"]) == (0, 2)
    assert reason in bad.reason
    assert (bad.line, bad.offset, bad.column, bad.size) == (2, 9, column, len(as_bytes(text)) + 1)
    assert str(bad).startswith(f"{path}:2:{column}: ") and "\n" not in str(bad)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_element_is_named_and_only_broken_json_ends_the_list(tmp_path, kind):
    text, reason, column = BAD[kind]
    data = b'[{"n": 0},\n ' + as_bytes(text) + b',\n {"n": 2}]'
    first, bad, *rest = read(write(tmp_path / "a.json", data))
    assert first["n"] == 0 and reason in bad.reason and f"(character {column} of the element)" in bad.reason
    assert (bad.line, bad.offset, bad.column) == (2, 12, None)
    assert len(rest) == (kind not in BROKEN)
    assert bad.reason.endswith("; the rest of the list is not read") == (kind in BROKEN)


def test_an_unfinished_string_and_a_pretty_printed_object(tmp_path):
    bad = only_bad(write(tmp_path / "a.jsonl", '{"a": "never ends\n{"b": 1}'))
    assert "a string that never ends" in bad.reason and bad.column == 18
    bad = read(write(tmp_path / "b.jsonl", '{\n "a": 1\n}\n'))[0]
    assert "over several lines? expected one object a line" in bad.reason


@pytest.mark.parametrize(
    "text",
    [
        NEST,
        '{"a": "' + "[{" * 600 + '"}',
        '{"a": [' + "[], {}, " * 400 + "1]}",
        '{"a": ' + "7" * 4300 + "}",
        '{"a": -' + "7" * 4300 + "}",
        '{"a": 1' + "0" * 4301 + ".5}",
        r'{"a": "\ud83d\ude00 \\ud83d \uD83D\uDE00 \u00e9\ud7ff\u0000"}',
        '{"a": "NaN Infinity"}',
        '  {"a": "\u2028\x7f"} \t',
        '{"a": 1e999}',
    ],
)
def test_what_is_just_allowed(tmp_path, text):
    (line,) = read(write(tmp_path / "a.jsonl", text))
    (element,) = read(write(tmp_path / "b.json", f"[{text}]"))
    assert dict(line) == dict(element) == json.loads(text)


@pytest.mark.parametrize("kind", ["digits", "negative digits"])
def test_the_digit_limit_does_not_move_with_the_interpreters(tmp_path, kind):
    old = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        path = write(tmp_path / "a.jsonl", BAD[kind][0] + '\n{"a": -' + "7" * 4300 + "}")
        bad, good = read(path)
    finally:
        sys.set_int_max_str_digits(old)
    assert "4,300 digits" in bad.reason and isinstance(good, Record)


@pytest.mark.parametrize("hold", [10, 2**20])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "b.json", "b.json.gz"])
def test_the_limit_on_a_record(tmp_path, monkeypatch, name, hold):
    monkeypatch.setattr(jsonl, "_HOLD", hold)
    rows = ["x" * 200, "y" * 70, "z" * 71, "w" * 300_000, "é"]
    texts = [json.dumps({"t": row}, ensure_ascii=False) for row in rows]
    data = "[" + ",".join(texts) + "]" if name.startswith("b") else "\n".join(texts) + "\n"
    records = read(write(tmp_path / name, data), limit=len(texts[1]) + 1)
    assert [isinstance(r, Record) for r in records] == [False, True, False, False, True]
    assert records[3].reason == "a record of 300,010 bytes, over the limit of 80 (data.max_record_mb)"
    assert records[4]["t"] == "é" and records[1].size == 80


@pytest.mark.parametrize("name", ["a.jsonl", "b.json"])
def test_a_record_longer_than_what_is_held_is_read_whole(tmp_path, name):
    row = {"t": 'é\\"[{' * 400_000}
    texts = [json.dumps(row), '{"n": 1}']
    data = "[" + ",\n".join(texts) + "]" if name == "b.json" else "\n".join(texts)
    big, small = read(write(tmp_path / name, data))
    assert dict(big) == row and small["n"] == 1 and small.line == 2


# --------------------------------------------------------------------------------------------------------- broken lists


@pytest.mark.parametrize(
    ("text", "good", "reason"),
    [
        ('[{"n": 0}, {"n": 1}', 1, "the file ends inside the list"),
        ('[{"n": 0}, {"n": "', 1, "the file ends inside the list"),
        ('[{"n": 0}, {"n": "\\', 1, "the file ends inside the list"),
        ('[{"n": 0},', 1, "the file ends inside the list"),
        ("[", 0, "the file ends inside the list"),
        ('[{"n": 0},\n]', 1, "expected an element of the list, found ']'"),
        ('[{"n": 0},,{"n": 1}]', 1, "expected an element of the list, found ','"),
        ('[,{"n": 0}]', 0, "expected an element of the list, found ','"),
        ('[{"n": 0} {"n": 1}, {"n": 2}]', 0, "broken JSON: '{' after the end"),
        ('[{"n": 0}}, {"n": 1}]', 0, "broken JSON: '}' after the end"),
        ('[{"n": 0}]\n{"n": 1}', 1, "text after the end of the list"),
        ('[{"n": 0}]]', 1, "text after the end of the list"),
        ('[{"n": 0},\n{"n": 1,\n "m": }, {"n": 2}]', 1, "expecting value, found '}' (line 3, column 7)"),
    ],
)
def test_a_broken_list_gives_one_bad_record_and_ends(tmp_path, text, good, reason):
    path = write(tmp_path / "a.json", text)
    *records, bad = read(path)
    assert [r["n"] for r in records] == list(range(good))
    assert isinstance(bad, BadRecord) and reason in bad.reason
    index = [tuple(row) for row in index_jsonl(sources(path)).tolist()]
    assert index[: good + 1] == [(r.file, r.line, r.offset) for r in [*records, bad]]


# ------------------------------------------------------------------------------------------------------ index and seek


@pytest.mark.parametrize("names", [["a.jsonl", "b.json", "c.jsonl"], ["b.json.gz", "a.jsonl.gz"]])
def test_reading_from_any_indexed_position_gives_the_same_records(tmp_path, names):
    lines = "\n".join(["\ufeff", *map(json.dumps, ROWS), "broken", " ", json.dumps({"last": "é"})])
    listed = "\n[\n" + ",\n".join(json.dumps(row, indent=1) for row in [*ROWS, 3]) + "\n]"
    where = sources(*(write(tmp_path / name, listed if "json" in name.split(".")[1:2] else lines) for name in names))
    straight = list(read_jsonl(where))
    index = [Position(*row) for row in index_jsonl(where).tolist()]
    assert index == [Position(r.file, r.line, r.offset) for r in straight]
    for i, position in enumerate(index):
        again = list(read_jsonl(where, None, position))
        assert [repr(r) for r in again] == [repr(r) for r in straight[i:]]
        assert [r.size for r in again] == [r.size for r in straight[i:]]


def test_the_index_counts_lines_across_its_blocks(tmp_path):
    rows = []
    for i in range(3000):
        rows += [json.dumps({"n": i, "t": "x" * (i % 1500)})] + [" " * (i % 5)] * (i % 3 == 0)
    rows[1500:1500] = ["{" + " " * 2_500_000 + "}", " " * 2_500_000]  # lines longer than two blocks, one of them blank
    path = write(tmp_path / "a.jsonl", "\n".join(rows) + "\n   ")
    where = sources(path)
    assert index_jsonl(where).tolist() == [[r.file, r.line, r.offset] for r in read_jsonl(where)]
    assert len(index_jsonl(where)) == 3001


def test_the_index_is_a_mapped_file_that_nobody_can_write(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", "{}\n" * 5)
    table = index_jsonl(sources(path))
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 0
    assert table.tolist() == [[0, i + 1, 3 * i] for i in range(5)] and not table.flags.owndata
    assert index_jsonl(sources()).shape == (0, 3)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"gone: no index of the records there: no such file; TMPDIR names another"):
        index_jsonl(sources(path))
    full = Path("/dev/full")
    if full.exists():
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open(full, "wb"))
        with pytest.raises(DataError, match="no space left on device; TMPDIR names another folder"):
            index_jsonl(sources(path))


# ------------------------------------------------------------------------------------------------------- fields, fetch


@pytest.fixture
def either(either, monkeypatch):
    """Lines go over the ends of chunks, too."""
    monkeypatch.setattr(jsonl, "_CHUNK", 64)
    monkeypatch.setattr(jsonl, "_ROWS", 3)


JUST_ALLOWED = [
    r'{"\u0061": "\ud83d\ude00 \\ud83d \uD83D\uDE00 \u00e9\ud7ff\u0000\"\\\/\b\f\n\r\t"}',
    '{"b": 1, "a": 1, "c": {"a": 2}, "a": [3, {"a": 4}], "b" :\t1e999 , "é": "\u2028\x7f😀"}',
    '  {"a": "NaN", "a b": -0.5E-7, "": null} \t',
    "{}",
    '{"a": -' + "7" * 4300 + "}",
    '{"a": ' * 500 + "1" + "}" * 500,
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "b.json"])
def test_fields_alone_are_read_in_their_order(tmp_path, either, name):
    texts = [as_bytes(text) for text, _, _ in BAD.values()]
    if name == "b.json":
        texts = [as_bytes(text) for kind, (text, _, _) in BAD.items() if kind not in BROKEN]
    texts += [text.encode() for text in JUST_ALLOWED] + [b'{"a": "cut']
    data = b"[" + b",\n".join(texts) + b"]" if name == "b.json" else b"\r\n \n".join(texts)
    path = write(tmp_path / name, data)
    names = ("é", "gone", "a", "", "a", "\ud800")
    whole = read(path, limit=5500)
    parts = list(read_jsonl(Sources((path,), 5500, names)))
    assert len(whole) > 20 and sum(isinstance(r, Record) for r in whole) >= len(JUST_ALLOWED)
    for all_keys, some in zip(whole, parts, strict=True):
        if isinstance(all_keys, BadRecord):
            assert some == all_keys
            continue
        assert list(some.items()) == [(key, all_keys[key]) for key in ("é", "a", "") if key in all_keys]
        assert (some.path, place(some), some.size) == (all_keys.path, place(all_keys), all_keys.size)
    for start in (place(whole[3]), place(whole[-2])):
        again = list(read_jsonl(Sources((path,), 5500, names), None, start))
        assert list(map(repr, again)) == list(map(repr, parts))[len(parts) - len(again) :]


def test_extract_gives_bytes_of_fields(tmp_path, either):
    rows = ['{"t": "é\\n", "n": [1, "x"], "t": "\\u00e9"}', '{"n": "1"}', "broken", '{"u": "" , "t": ""}']
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\n".join(rows) + "\n")
    found = []
    for block in extract(sources(path), ("t", "n", "t")):
        assert block.path == str(path) and block.file == 0 and block.values.shape[1:] == (2, 3)
        for place, values in zip(block.places.tolist(), block.values.tolist(), strict=True):
            found.append((place, [(kind, block.text[a:b].tobytes().decode()) for kind, a, b in values]))
        found += [bad.line for _, bad in block.bad]
    assert found == [
        ([1, 3, 44], [(jsonl.STRING, "é"), (jsonl.OTHER, '[1, "x"]')]),
        ([2, 47, 11], [(jsonl.MISSING, ""), (jsonl.STRING, "1")]),
        3,
        ([4, 65, 20], [(jsonl.STRING, ""), (jsonl.MISSING, "")]),
    ]


@pytest.mark.parametrize("system", ["posix", "windows"])
@pytest.mark.parametrize("fields", [None, ("n", "text")])
def test_records_are_fetched_from_anywhere(tmp_path, either, monkeypatch, fields, system):
    monkeypatch.setattr(jsonl, "_HOLD", 3000)
    if system == "windows":
        monkeypatch.delattr(os, "pread")
    lines = [json.dumps({**ROWS[i % 5], "n": i, "long": "x" * (i * 37 % 5000)}) for i in range(300)] + ["broken", ""]
    a = write(tmp_path / "a.jsonl", "\n".join(lines) + '\n{"n": 1}')
    b = write(tmp_path / "b.json", json.dumps(ROWS, indent=1))
    c = write(tmp_path / "c.jsonl.gz", "\n".join(lines[:20]))
    where = Sources((a, b, c), 4900, fields)
    records = list(read_jsonl(where))
    places = [place(r) for r in records]
    order = [(i * 101) % len(records) for i in range(len(records))]
    for size in (1, 40, len(order)):
        for chosen in (order[i : i + size] for i in range(0, len(order), size)):
            got = fetch_jsonl(where, None, [places[i] for i in chosen])
            assert [(repr(r), r.size) for r in got] == [(repr(records[i]), records[i].size) for i in chosen]
    assert fetch_jsonl(where, None, []) == []


@pytest.mark.parametrize("fields", [None, ("n",)])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "b.json", "b.json.gz"])
def test_a_position_where_no_record_begins_any_more_is_an_error(tmp_path, either, name, fields):
    listed = "b.json" in name
    data = b'[{"n": 0},\n{"n": 1}, {"n": 2}]' if listed else b'\xef\xbb\xbf\n{"n": 0}\n{"n": 1}\n  \n{"n": 2}\n  \n'
    path = write(tmp_path / name, data)
    # no record of the next file may take the place of one that is gone
    where = Sources((path, write(tmp_path / "next.jsonl", '{"n": 3}\n')), 999, fields)
    begins = [r.offset for r in read_jsonl(where) if r.file == 0]
    assert len(begins) == 3
    for offset in range(len(data) + 20):
        if offset in begins:
            assert fetch_jsonl(where, None, [Position(0, 1, offset)])[0]["n"] == begins.index(offset)
            continue
        if listed and data[offset - 1 : offset + 1].strip() in (b"0", b"1", b"2", b"}]"):
            (bad,) = fetch_jsonl(where, None, [Position(0, 1, offset)])  # an element might begin here
            assert "broken JSON" in bad.reason
            continue
        with pytest.raises(DataError, match=rf"{name}: another file, .* no record begins at byte {offset} any more"):
            fetch_jsonl(where, None, [Position(0, 1, begins[0]), Position(0, 1, offset)])
    for offset in (0, begins[1] + 1, len(data), len(data) + 9):
        with pytest.raises(DataError, match="another file, or changed"):
            list(read_jsonl(where, None, Position(0, 1, offset)))
    for read_there in (lambda at: fetch_jsonl(where, None, [at]), lambda at: list(read_jsonl(where, None, at))):
        with pytest.raises(DataError, match="record of file 3 is asked for, but the data is 2 files now"):
            read_there(Position(2, 1, 0))


@pytest.mark.parametrize("left", ["", '{"n": 1', " " * 2000])
@pytest.mark.parametrize("fields", [None, ("n",)])
def test_a_long_record_that_is_gone_when_it_is_read_again_is_an_error(tmp_path, either, monkeypatch, fields, left):
    monkeypatch.setattr(jsonl, "_HOLD", 100)
    path = write(tmp_path / "a.jsonl", json.dumps({"n": 0, "t": "x" * 1000}))
    plain = jsonl._line
    monkeypatch.setattr(jsonl, "_line", lambda *given: (plain(*given), path.write_text(left, encoding="utf-8"))[0])
    with pytest.raises(DataError, match=r"a\.jsonl: another file, or changed: no record begins at byte 0 any more"):
        list(read_jsonl(Sources((path,), fields=fields)))


def test_lines_longer_than_a_chunk_may_follow_each_other(tmp_path):
    rows = [{"n": i, "t": str(i) * size} for i, size in enumerate((1, 1_500_000, 1_100_000, 5, 1_050_000, 2_000_000))]
    where = Sources((write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))),), fields=("n", "t"))
    assert [dict(r) for r in read_jsonl(where)] == rows
    assert sum(len(block.places) for block in extract(where, ("t",))) == len(rows)


def test_lines_are_read_ahead_by_a_thread_that_ends_with_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "_CHUNK", 2**10)
    path = write(tmp_path / "a.jsonl", "\n".join(f'{{"n": {i}}}' for i in range(5000)))
    where, before, found = sources(path), set(threading.enumerate()), []
    for block in extract(where, ("n",)):
        found += [int(block.text[a:b].tobytes()) for _, a, b in block.values[:, 0].tolist()]
    assert found == list(range(5000)) and set(threading.enumerate()) == before
    blocks = extract(where, ("n",))
    next(blocks)
    assert set(threading.enumerate()) > before
    blocks.close()
    assert set(threading.enumerate()) == before


def test_what_fails_while_lines_are_read_ahead_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "_CHUNK", 2**10)
    where = sources(write(tmp_path / "a.jsonl", '{"n": 1}\n' * 5000))
    plain, calls = jsonl._line, iter(range(9))

    def fails(*given):
        if next(calls) == 3:
            raise OSError("the disk is gone")
        return plain(*given)

    monkeypatch.setattr(jsonl, "_line", fails)
    with pytest.raises(DataError, match="the disk is gone"):
        list(extract(where, ("n",)))


def test_bad_lines_fill_a_table_too(tmp_path):
    where = sources(write(tmp_path / "a.jsonl", '"\n' * 20_000 + '{"n": 1}\n'))
    blocks = [(len(block.bad), len(block.places)) for block in extract(where, ("n",))]
    assert max(n for n, _ in blocks) <= 4096 and sum(n for n, _ in blocks) == 20_000 and blocks[-1][1] == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("before", [" " * 5000, "\n" * 4095 + " ", " " * 70_000, " \n" * 35_000 + "\t"])
def test_the_first_record_lies_where_its_line_begins_however_much_is_blank(tmp_path, name, before):
    where = sources(write(tmp_path / name, before + '{"n": 0}\n{"n": }'))
    good, bad = read_jsonl(where)
    assert place(good) == (0, before.count("\n") + 1, before.rfind("\n") + 1) and bad.column == 7
    assert index_jsonl(where).tolist() == [[*place(good)], [*place(bad)]]
    assert list(map(repr, fetch_jsonl(where, None, [place(bad), place(good)]))) == [repr(bad), repr(good)]


@pytest.mark.parametrize("chunk", [64, 2**20])
def test_a_record_comes_before_the_rest_is_written(either, monkeypatch, chunk):
    monkeypatch.setattr(jsonl, "_CHUNK", chunk)
    if not Path("/dev/fd").exists():
        pytest.skip("a pipe is opened by name")
    out, into = os.pipe()
    try:
        os.write(into, b'{"n": 0}\n{"n": 1}\n{"n":')
        records = read_jsonl(Sources((Path(f"/dev/fd/{out}"),), fields=("n",)))
        assert next(records)["n"] == 0
    finally:
        os.close(into)
        os.close(out)


def kernel_or_skip():
    if kernel.compiled is None:
        pytest.skip("no kernel was built")
    return kernel.compiled


def cells(n: int) -> memoryview:
    return memoryview(bytearray(8 * n)).cast("q")


def test_the_kernel_leaves_only_odd_lines_to_python():
    lines = [json.dumps(row, ensure_ascii=ascii).encode() + b"\n" for row in ROWS for ascii in (True, False)]
    lines += [
        b'{"a": "\\ud83d\\ude00", "\\u0061": [{}, [], 1e5, -0.1, true, false, null]}\r\n',
        b" \t{ } \n",
        b"\v\f\n",
    ]
    data = b"".join(lines)
    got = kernel_or_skip().extract(data, 0, len(data), (b"a",), 999, 0, 1, cells(6 * 20), 0, bytearray(len(data)), 0)
    assert got[:2] == (len(data), 12) and got[3] == 14


@pytest.mark.parametrize("before", [0, 5, 15, 16, 33])
def test_the_kernel_takes_exactly_the_utf_8_that_python_takes(before):
    heads = [bytes([a, b]) for a in range(128, 256) for b in (*range(0x7F, 0xC1), 0xFF)]
    tails = (b"", b"\x80", b"\xbf", b"\x80\x80", b"\xbf\xbf", b"\x80A", b"\xc0\x80", b"\x80\x80\x80")
    for part in (head + tail for head in heads for tail in tails):
        try:
            part.decode()
            good = True
        except UnicodeDecodeError:
            good = False
        data = b'{"a":"' + b"x" * before + part + b'"}\n' + b" " * 16 + b"\n"
        at, rows, *_ = kernel_or_skip().extract(data, 0, len(data), (b"a",), 99, 0, 1, cells(6), 0, bytearray(99), 0)
        assert (rows, at) == ((1, len(data) - 17) if good else (0, 0)), part


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({0: "text"}, TypeError),
        ({1: -1}, ValueError),
        ({1: 4}, ValueError),
        ({2: 4}, ValueError),
        ({3: ["a"]}, TypeError),
        ({3: ("a",)}, TypeError),
        ({5: -1}, ValueError),
        ({5: 2**63 - 1}, ValueError),
        ({6: -1}, ValueError),
        ({7: bytearray(48)}, TypeError),
        ({7: bytes(48)}, (TypeError, BufferError)),
        ({8: -1}, ValueError),
        ({8: 2}, ValueError),
        ({9: bytearray(2)}, ValueError),
        ({9: bytes(9)}, (TypeError, BufferError)),
        ({10: 1}, ValueError),
        ({10: -1}, ValueError),
    ],
)
def test_the_kernel_checks_what_it_is_given(change, error):
    names = [b"{}\n", 0, 3, (b"a",), 9, 0, 1, cells(6), 0, bytearray(3), 0]
    assert kernel_or_skip().extract(*names) == (3, 1, 0, 2)
    with pytest.raises(error):
        kernel.compiled.extract(*(change.get(i, value) for i, value in enumerate(names)))


def test_the_kernel_refuses_buffers_that_overlap():
    shared = bytearray(b"{}\n" + bytes(93))
    with pytest.raises(ValueError, match="overlap"):
        kernel_or_skip().extract(shared, 0, 3, (b"a",), 9, 0, 1, cells(6), 0, shared, 0)
    with pytest.raises(ValueError, match="overlap"):
        kernel.compiled.extract(shared, 0, 3, (b"a",), 9, 0, 1, memoryview(shared).cast("q"), 0, bytearray(3), 0)
    for size, table in ((5, cells(99)), (-1, cells(99)), (4, cells(9)), (4, memoryview(shared).cast("q"))):
        with pytest.raises(ValueError, match="out of range"):
            kernel.compiled.index_lines(shared if size == 4 else b"{}\n1", size, 0, 1, 0, 0, True, table)


# -------------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys, time
from pathlib import Path
from corefit.data.jsonl import read_jsonl
from corefit.types import Record, Sources
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before, began = peak(), time.perf_counter()
records = read_jsonl(Sources((Path(sys.argv[1]),), fields=tuple(sys.argv[2:]) or None))
assert type(next(records)) is Record
first = time.perf_counter() - began
n = size = 0
for record in records:
    if type(record) is not Record:
        print(record, file=sys.stderr)
    n, size = n + 1, size + record.size
print(first, (peak() - before) / 1024, n, size, time.perf_counter() - began)
"""


def measure(path: Path, *fields: str, stdin: Path | None = None) -> tuple[float, float, int, int, float, str]:
    """Seconds to the first record, MiB of growth, records after the first, their bytes, seconds, what was bad."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak is read from /proc")
    with open(stdin or os.devnull, "rb") as file:
        command = [sys.executable, "-c", MEASURE, str(path), *fields]
        done = subprocess.run(command, stdin=file, capture_output=True, text=True, check=True)
    first, grown, n, size, seconds = map(float, done.stdout.split())
    print(f"{path.name}: first {first * 1e3:.1f} ms, +{grown:.1f} MiB, {size / seconds / 1e6:.0f} MB/s")
    return first, grown, int(n), int(size), seconds, done.stderr


def write_big(path: Path, size: int, *, listed: bool) -> int:
    """Write about ``size`` bytes of records of 2 kB; give their number."""
    end = ",\n" if listed else "\n"
    block = "".join(json.dumps({"text": f"{i} " * 200 + "x" * 1200, "n": i}) + end for i in range(1000)).encode()
    times = size // len(block)
    with open(path, "wb") as file:
        file.write(b"[" if listed else b"")
        for _ in range(times):
            file.write(block)
        file.write(b'{"n": 0}' + (b"]" if listed else b"\n"))
    return times * 1000 + 1


@pytest.mark.measured
@pytest.mark.parametrize("listed", [False, True])
def test_memory_and_first_record_of_a_large_file(tmp_path, listed):
    count = write_big(tmp_path / "big.json", 300 * 10**6 if not listed else 150 * 10**6, listed=listed)
    first, grown, n, _, _, bad = measure(tmp_path / "big.json")
    assert n == count - 1 and not bad
    assert first < 0.05 and grown < 16


@pytest.mark.measured
def test_memory_and_first_record_where_fields_are_given(tmp_path):
    count = write_big(tmp_path / "big.json", 300 * 10**6, listed=False)
    first, grown, n, _, _, bad = measure(tmp_path / "big.json", "text")
    assert n == count - 1 and not bad
    assert first < 0.05 and grown < 16


@pytest.mark.measured
@pytest.mark.parametrize("kind", ["line", "element", "string"])
def test_memory_of_one_record_larger_than_any_limit(tmp_path, kind):
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.write({"line": b'{"n": 0}\n', "element": b'[{"n": 0}, ', "string": b'[{"n": 0}, "'}[kind])
        for _ in range(200):
            file.write(b"y" * 10**6 if kind == "string" else (b'{"a": ["' + b"x" * 490 + b'",') * 2000)
        if kind == "line":
            file.write(b'\n{"n": 2}\n')
    _, grown, n, _, _, bad = measure(path)
    assert grown < 16
    assert n == (2 if kind == "line" else 1)
    assert ("over the limit of 67,108,864" if kind == "line" else "the file ends inside the list") in bad


@pytest.mark.measured
def test_standard_input_is_read_as_it_comes(tmp_path):
    count = write_big(tmp_path / "big.jsonl", 20 * 10**6, listed=False)
    _, grown, n, _, _, _ = measure(Path("-"), stdin=tmp_path / "big.jsonl")
    assert n == count - 1 and grown < 16


@pytest.mark.measured
@pytest.mark.full
@pytest.mark.parametrize("listed", [False, True])
def test_five_gigabytes(tmp_path, listed):
    path = tmp_path / "big.json"
    count = write_big(path, 5 * 10**9, listed=listed)
    try:
        first, grown, n, size, _, bad = measure(path)
        assert n == count - 1 and not bad and abs(size / path.stat().st_size - 1) < 0.01
    finally:
        path.unlink()
    assert first < 0.05 and grown < 64


@pytest.mark.measured
def test_reading_keeps_up_with_json(tmp_path):
    write_big(tmp_path / "a.jsonl", 20 * 10**6, listed=False)
    ours, plain = 9.0, 9.0
    for _ in range(3):
        began = time.perf_counter()
        for record in read_jsonl(sources(tmp_path / "a.jsonl")):
            assert record
        ours = min(ours, time.perf_counter() - began)
        began = time.perf_counter()
        with open(tmp_path / "a.jsonl", "rb") as file:
            for line in file:
                assert json.loads(line)
        plain = min(plain, time.perf_counter() - began)
    assert ours < 2 * plain  # measured 1.2 to 1.4; a byte-by-byte check would be over 2


def test_reading_imports_neither_numpy_nor_torch(tmp_path):
    path = write(tmp_path / "a.jsonl", "{}")
    code = (
        "import sys; from pathlib import Path; from corefit.data.jsonl import read_jsonl; "
        "from corefit.types import Sources; list(read_jsonl(Sources((Path(sys.argv[1]),), fields=('a',)))); "
        "assert not {'numpy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


@pytest.mark.measured
def test_fields_are_found_faster_than_json_is_parsed(tmp_path):
    kernel_or_skip()
    write_big(tmp_path / "a.jsonl", 20 * 10**6, listed=False)
    ours, plain = 9.0, 9.0
    for _ in range(3):
        began = time.perf_counter()
        assert sum(len(block.places) for block in extract(sources(tmp_path / "a.jsonl"), ("text",))) > 9000
        ours = min(ours, time.perf_counter() - began)
        began = time.perf_counter()
        with open(tmp_path / "a.jsonl", "rb") as file:
            assert all(json.loads(line) for line in file)
        plain = min(plain, time.perf_counter() - began)
    assert ours < plain / 3  # a built kernel measures 9 to 13 times


# ------------------------------------------------------------------------------------------------------- files refused


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", "[]", " [ \n ] "])
def test_a_file_without_records(tmp_path, content):
    path = write(tmp_path / "a.json", content)
    for use in (read_jsonl, index_jsonl):
        with pytest.raises(DataError, match=r"a\.json: no records in it, expected JSON lines or one JSON list"):
            list(use(sources(path)))


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="gone.jsonl: no such file"):
        read(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="is a directory"):
        read(tmp_path)


@pytest.mark.parametrize("cut", ["short", "flipped"])
def test_damaged_gzip(tmp_path, cut):
    packed = bytearray(gzip.compress(b"".join(b'{"n": %d}\n' % (i * i) for i in range(20_000))))
    packed = packed[: len(packed) // 2] if cut == "short" else packed[:-8] + bytes([packed[-8] ^ 255]) + packed[-7:]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed)
    with pytest.raises(DataError, match="a.jsonl.gz: damaged gzip data"):
        read(path)
    with pytest.raises(DataError, match="damaged gzip data"):
        spool(path, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


# --------------------------------------------------------------------------------------------------------- which files


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, '{"n": 0}\n')


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        ("train.jsonl", "train.jsonl", ""),
        ("data.json README.md", "data.json", ""),
        ("train.jsonl test.jsonl", "train.jsonl", "test.jsonl"),
        ("x_train.jsonl x_eval.jsonl", "x_train.jsonl", "x_eval.jsonl"),
        ("data.train.jsonl.gz data.dev.jsonl.gz", "data.train.jsonl.gz", "data.dev.jsonl.gz"),
        ("train-00.json train-01.json validation-00.json", "train-00.json train-01.json", "validation-00.json"),
        ("Training.ndjson Val2.ndjson", "Training.ndjson", "Val2.ndjson"),
        ("rows.jsonl valid.jsonl testset.jsonl", "rows.jsonl", "testset.jsonl valid.jsonl"),
        ("testimonials.jsonl", "testimonials.jsonl", ""),
        ("train.jsonl .hidden.jsonl sub/more.jsonl", "train.jsonl", ""),
    ],
)
def test_folders_are_told_by_their_names(tmp_path, names, train, val):
    make(tmp_path / "d", *names.split())
    found = find_files("d", base=tmp_path)
    assert found.train == tuple(tmp_path / "d" / name for name in train.split())
    assert found.val == tuple(tmp_path / "d" / name for name in val.split())


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ("a.jsonl b.jsonl", "which files train is unclear"),
        ("train.jsonl extra.jsonl", "which files train is unclear"),
        ("train_test.jsonl", "which files train is unclear"),
        ("train.jsonl test_train.jsonl", "which files train is unclear"),
        ("test.jsonl README.md", "no file to train on"),
        ("README.md", "no data file"),
        ("", "no data file"),
    ],
)
def test_an_unclear_folder_is_refused_with_what_is_there(tmp_path, names, why):
    (tmp_path / "d").mkdir()
    make(tmp_path / "d", *names.split())
    with pytest.raises(DataError) as caught:
        find_files("d", base=tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'd'}: {why}, expected") and "\n" not in text
    assert text.endswith(f"there: {', '.join(sorted(names.split())) or 'nothing'}")


def test_files_and_globs(tmp_path):
    make(tmp_path, "b.jsonl", "a.jsonl", "test.jsonl", "deep/er/c.jsonl")
    here = {name: tmp_path / name for name in ("a.jsonl", "b.jsonl", "test.jsonl", "deep/er/c.jsonl")}
    assert find_files("test.jsonl", base=tmp_path).train == (here["test.jsonl"],)
    assert find_files(["b.jsonl", "a.jsonl"], base=tmp_path).train == (here["b.jsonl"], here["a.jsonl"])
    assert find_files("[ab].jsonl", base=tmp_path).train == (here["a.jsonl"], here["b.jsonl"])
    assert find_files("t*.jsonl", base=tmp_path).train == (here["test.jsonl"],)
    assert find_files("**/c.jsonl", base=tmp_path).train == (here["deep/er/c.jsonl"],)
    assert find_files(str(tmp_path / "a.jsonl"), base=Path("/nowhere")).train == (here["a.jsonl"],)
    assert find_files("-", base=tmp_path).train == (Path("-"),)
    with pytest.raises(DataError, match=r"test.jsonl looks like validation data among .* a.jsonl, b.jsonl, test.jsonl"):
        find_files("*.jsonl", base=tmp_path)
    with pytest.raises(DataError, match="no file matches"):
        find_files("*.txt", base=tmp_path)
    with pytest.raises(DataError, match="a.jsonl: given twice"):
        find_files(["a.jsonl", "[a].jsonl"], base=tmp_path)
    make(tmp_path, "odd[1].jsonl")  # a name, not a pattern
    assert find_files("odd[1].jsonl", base=tmp_path).train == (tmp_path / "odd[1].jsonl",)


def test_missing_empty_and_locked_files(tmp_path, monkeypatch):
    make(tmp_path, "guanaco.jsonl", "other.jsonl")
    with pytest.raises(DataError, match=r"guanco.jsonl: no file 'guanco.jsonl'; did you mean 'guanaco.jsonl'\?"):
        find_files("guanco.jsonl", base=tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        find_files("gone/a.jsonl", base=tmp_path)
    write(tmp_path / "empty.jsonl", "")
    with pytest.raises(DataError, match="empty.jsonl: the file is empty"):
        find_files("empty.jsonl", base=tmp_path)
    with pytest.raises(DataError, match="no data is named"):
        find_files([], base=tmp_path)
    with pytest.raises(DataError, match="x.jsonl: no such folder: .*~nobody-here"):
        find_files("~nobody-here/x.jsonl", base=tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions don't bind root
    with pytest.raises(DataError, match="other.jsonl: no permission to read it"):
        find_files("other.jsonl", base=tmp_path)


# ------------------------------------------------------------------------------------------------------- spool and hash


def test_spool_unpacks_once(tmp_path):
    path = write(tmp_path / "train.jsonl.gz", "".join(json.dumps(row) + "\n" for row in ROWS))
    plain = spool(path, tmp_path / "run" / "data")
    assert plain.name.startswith("train-") and plain.name.endswith(".jsonl")
    assert [dict(r) for r in read(plain)] == ROWS
    plain.write_text("kept")
    assert spool(path, tmp_path / "run" / "data") == plain and plain.read_text() == "kept"
    (tmp_path / "other").mkdir()
    assert spool(write(tmp_path / "other" / "train.jsonl.gz", "{}"), tmp_path / "run" / "data") != plain
    assert len(list(plain.parent.iterdir())) == 2
    with pytest.raises(DataError, match=r"train-\w+.jsonl: can't be written: (file exists|not a directory)"):
        spool(path, write(tmp_path / "file", "no folder"))


@pytest.mark.parametrize("packed", [False, True])
def test_spool_standard_input(tmp_path, packed):
    code = "import pathlib, sys; from corefit.data.files import spool; print(spool('-', pathlib.Path(sys.argv[1])))"
    data = b'{"n": 1}\n' * 100_000
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    done = subprocess.run(command, input=gzip.compress(data) if packed else data, capture_output=True, check=True)
    assert done.stdout.decode().strip() == str(tmp_path / "data" / "stdin.jsonl")
    assert (tmp_path / "data" / "stdin.jsonl").read_bytes() == data
    done = subprocess.run(command, input=b"", capture_output=True)
    assert b"DataError: -: nothing came in" in done.stderr
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["stdin.jsonl"]


def test_content_hash():
    a = Record({"x": 1, "y": {"p": "é", "q": [1, 2]}}, path="a", line=1, offset=0)
    b = Record({"y": {"q": [1, 2], "p": "é"}, "x": 1}, path="b", line=9, offset=99)
    assert content_hash(a) == content_hash(b) == content_hash(dict(a))
    assert content_hash(a) == 0x424B6D2AAFFF6DD5  # it decides which records validate, in every version
    assert 0 <= content_hash(a) < 2**64
    assert content_hash({"x": 1}) != content_hash({"x": 2}) != content_hash({"x": "2"})


BOMB = """
import sys
from pathlib import Path
from corefit.data.files import spool
from corefit.data.jsonl import read_jsonl
from corefit.errors import DataError
from corefit.types import Sources
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before, found = peak(), "ended"
try:
    if sys.argv[1] == "read":
        found = "; ".join(map(str, read_jsonl(Sources((Path(sys.argv[2]),), int(sys.argv[3])))))
    else:
        spool(sys.argv[2], Path(sys.argv[3]))
except DataError as error:
    found = str(error)
print((peak() - before) / 1024, found)
"""


def bomb(path: Path, head: bytes, mebibytes: int) -> Path:
    """Write a .gz, a thousandth of the size of what it holds: ``head`` and zeros; members follow each other in it."""
    with open(path, "wb") as file:
        file.write(gzip.compress(head))
        member = gzip.compress(bytes(2**24))
        for _ in range(mebibytes // 16):
            file.write(member)
    return path


def defuse(*arguments: object, stdin: Path | None = None) -> tuple[float, str]:
    """MiB that the process grew by, and what it said."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak is read from /proc")
    with open(stdin or os.devnull, "rb") as file:
        command = [sys.executable, "-c", BOMB, *map(str, arguments)]
        done = subprocess.run(command, stdin=file, capture_output=True, text=True, check=True)
    grown, _, said = done.stdout.strip().partition(" ")
    return float(grown), said


@pytest.mark.measured
@pytest.mark.parametrize("head", [b'{"a": "', b'[{"a": "'], ids=["a line", "a list"])
def test_a_gzip_bomb_ends_reading_in_bounded_memory(tmp_path, head):
    limit = 8 * 2**20
    path = bomb(tmp_path / "bomb.jsonl.gz", head, 1024)
    assert path.stat().st_size < 1.1 * 2**20
    grown, said = defuse("read", path, limit)
    assert f"{path}: unpacks to more than 200 times its size" in said
    assert grown < 4 * limit / 2**20, said


@pytest.mark.measured
def test_a_line_without_end_in_a_small_gzip_is_a_record_over_the_limit(tmp_path):
    grown, said = defuse("read", bomb(tmp_path / "a.jsonl.gz", b'{"a": "', 192), 8 * 2**20)
    assert "over the limit of 8,388,608 (data.max_record_mb)" in said and grown < 32, said


@pytest.mark.measured
@pytest.mark.parametrize("piped", [False, True])
def test_a_gzip_bomb_is_not_spooled(tmp_path, piped):
    path = bomb(tmp_path / "bomb.jsonl.gz", b"", 1024)
    grown, said = defuse("spool", "-" if piped else path, tmp_path / "run", stdin=path if piped else None)
    assert "unpacks to more than 200 times its size" in said and grown < 16, said
    assert not list((tmp_path / "run").iterdir())


def test_text_that_repeats_itself_is_no_bomb(tmp_path):
    rows = b'{"n": 1}\n' * 2_000_000
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(rows))
    assert len(rows) > 200 * path.stat().st_size
    assert spool(path, tmp_path / "run").read_bytes() == rows
