"""The jsonl reader against ``json`` itself, with blocks so small that every border falls everywhere."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corefit.data import files, jsonl, kernel
from corefit.errors import DataError
from corefit.types import BadRecord, Position, Record, Sources

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ['"', "\\", "[{,]}", '\\"', "\n"]
)
number = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
value = st.recursive(
    st.none() | st.booleans() | number | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
rows = st.lists(st.dictionaries(text, value, max_size=4), min_size=1, max_size=6)
style = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "separators": st.sampled_from([(", ", ": "), (",", ":"), (" ,\t", " : ")]),
    }
)
small = st.tuples(st.integers(3, 40), st.integers(0, 60))


@contextmanager
def stored(data: bytes, sizes: tuple[int, int], limit: int = 2**20, *, packed: bool = False) -> Iterator[Sources]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        path.write_bytes(gzip.compress(data, 0) if packed else data)
        with (
            patch.object(jsonl, "BLOCK", sizes[0]),
            patch.object(files, "BLOCK", sizes[0]),
            patch.object(jsonl, "_HOLD", sizes[1]),
            patch.object(jsonl, "_CHUNK", 1 + sizes[1]),
            patch.object(jsonl, "_ROWS", 1 + sizes[0] // 10),
            patch.object(jsonl, "_SMALL_BLOCK", 3 + sizes[0] // 4),
        ):
            yield Sources((path,), limit)


def check_positions(where: Sources, records: list[Record | BadRecord], data: bytes) -> None:
    """Lines are counted right; the index is the same positions; from each of them the same records follow."""
    positions = [Position(r.file, r.line, r.offset) for r in records]
    assert all(p.line == data.count(b"\n", 0, p.offset) + 1 for p in positions)
    assert [Position(*row) for row in jsonl.index_jsonl(where).tolist()][: len(positions)] == positions
    for i, position in enumerate(positions):
        again = list(jsonl.read_jsonl(where, None, position))
        assert [(repr(r), r.size) for r in again] == [(repr(r), r.size) for r in records[i:]]


@given(rows, style, small, st.booleans(), st.data())
def test_lines_equal_json(items, style, sizes, packed, data):
    blank = st.sampled_from(["", "", " ", "\t", "\r"])
    ending = data.draw(st.sampled_from(["\n", "\r\n"]))
    lines = []
    for item in items:
        if data.draw(st.booleans()):
            lines.append(data.draw(blank))
        lines.append(data.draw(st.sampled_from(["", " "])) + json.dumps(item, **style))
    content = data.draw(st.sampled_from(["", "\ufeff"])) + ending.join(lines) + data.draw(st.sampled_from(["", ending]))
    raw = content.encode()
    with stored(raw, sizes, packed=packed) as where:
        records = list(jsonl.read_jsonl(where))
        assert [dict(r) for r in records] == items
        assert all(json.loads(raw[r.offset : r.offset + r.size]) == dict(r) for r in records)
        assert sum(r.size for r in records) <= len(raw)
        check_positions(where, records, raw)
        assert len(jsonl.index_jsonl(where)) == len(records)


@given(rows, style, small, st.booleans(), st.sampled_from([None, 1, "\t"]), st.sampled_from(["", "\ufeff", " \n "]))
def test_a_list_equals_json(items, style, sizes, packed, indent, before):
    raw = (before + json.dumps(items, indent=indent, **style) + "\n").encode()
    with stored(raw, sizes, packed=packed) as where:
        records = list(jsonl.read_jsonl(where))
        assert [dict(r) for r in records] == items
        assert all(json.loads(raw[r.offset : r.offset + r.size - 1]) == dict(r) for r in records)
        check_positions(where, records, raw)
        assert len(jsonl.index_jsonl(where)) == len(records)


@given(st.lists(value, min_size=1, max_size=5), small)
def test_elements_that_are_no_objects_are_bad_and_do_not_stop_the_list(items, sizes):
    with stored(json.dumps(items).encode(), sizes) as where:
        records = list(jsonl.read_jsonl(where))
    assert [dict(r) if isinstance(r, Record) else None for r in records] == [
        item if isinstance(item, dict) else None for item in items
    ]


@given(rows, small, st.integers(1, 80))
def test_the_limit_alone_decides_which_records_are_too_long(items, sizes, limit):
    lines = [json.dumps(item).encode() + b"\n" for item in items]
    with stored(b"".join(lines), sizes, limit) as where:
        assert [isinstance(r, Record) for r in jsonl.read_jsonl(where)] == [len(line) <= limit for line in lines]
    elements = [line[:-1] + b"," for line in lines]
    with stored(b"[" + b"".join(elements)[:-1] + b"]", sizes, limit) as where:
        assert [isinstance(r, Record) for r in jsonl.read_jsonl(where)] == [len(line) <= limit for line in lines]


pieces = st.sampled_from(
    [
        b'{"a": 1}',
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b'"',
        b"\\",
        b"\n",
        b" ",
        b"\xff",
        b"\xc3\xa9",
        b"NaN",
        b"1",
        b":",
        b"\r",
        b"\0",
    ]
    + [rb'"\ud83d"', rb'{"a": "\ud83d\ude00"}', b"\xef\xbb\xbf"]
)


@given(st.lists(pieces, max_size=30), small)
@example([b"[", b'{"a": 1}', b",", b"]"], (2, 0))
def test_any_bytes_give_records_bad_records_or_one_data_error(parts, sizes):
    raw = b"".join(parts)
    with stored(raw, sizes) as where:
        try:
            records = list(jsonl.read_jsonl(where))
        except DataError:
            with pytest.raises(DataError):
                jsonl.index_jsonl(where)
            return
        check_positions(where, records, raw)
        for r in records:
            if isinstance(r, Record):  # whatever passes is strict JSON that can be written again
                json.dumps(dict(r), ensure_ascii=False, allow_nan=False).encode()
            else:
                assert "\n" not in str(r)


# ---------------------------------------------------------------------------------------------- the kernel and its twin

FIELDS = ("text", "é", "n", 'q"\n\\', "", "text", "gone", "\ud800")
key = st.sampled_from(['"text"', '"\\u0074ext"', '"é"', r'"\u00E9"', '"n"', r'"q\"\n\\"', '""', '"other"', '"texts"'])
scalar = st.sampled_from(
    ["0", "-0", "01", "1.", "1.5e-3", "1E+400", "-", "12e", "7" * 640, "7" * 641, "7" * 4301, "3." + "1" * 700]
    + ["true", "fals", "null", "NaN", "-Infinity", '""', '"plain text of more than eight bytes"', '"\tab"', '"\x7f"']
    + [
        r'"\ud83d\ude00\u00e9\b\f\n\r\t\/\\"',
        r'"\ud83d"',
        r'"\ude00"',
        r'"\uD83D\u0041"',
        r'"\u12g4"',
        r'"\x"',
        '"é€😀\u2028"',
    ]
    + ["[" * 62 + "]" * 62, "[" * 63 + "]" * 63, "[" * 70 + "]" * 70, "[" * 501 + "]" * 501]
)
space = st.sampled_from(["", "", "", " ", "\t", "\r", "\v"])
found = st.recursive(
    scalar | value.map(json.dumps) | text.map(lambda words: json.dumps(words, ensure_ascii=False)),
    lambda inner: (
        st.builds(lambda a, b: f"[{a}, {b}]", inner, inner) | st.builds(lambda k, a: f"{{{k} : {a}}}", key, inner)
    ),
    max_leaves=4,
)
member = st.builds("{}{}{}:{}{}{}".format, space, key, space, space, found, space)
line = st.builds(
    lambda members, a, b: f"{a}{{{','.join(members)}}}{b}".encode(), st.lists(member, max_size=4), space, space
)


@st.composite
def damaged(draw: Any) -> bytes:
    raw = bytearray(draw(line))
    at = draw(st.integers(0, len(raw) - 1))
    match draw(st.integers(0, 3)):
        case 0:
            raw[at] = draw(st.integers(0, 255))
        case 1:
            del raw[at:]
        case 2:
            del raw[at]
        case 3:
            raw[at:at] = draw(st.binary(min_size=1, max_size=3))
    return bytes(raw)


lines = st.lists(line | line | damaged() | st.sampled_from([b"", b" \t\v", b"{}", b"[{}, 1"]), min_size=1, max_size=6)


def whole(record: Record | BadRecord) -> Any:
    place = record.path, record.line, record.offset, record.size, record.file
    return (*place, list(record.items())) if isinstance(record, Record) else (*place, record.reason, record.column)


def all_of(where: Sources) -> Any:
    """Everything that the kernel has a part in, as plain values."""
    blocks = [
        (c.path, c.file, c.places.tolist(), c.values.tolist(), c.text.tobytes(), list(c.bad))
        for c in jsonl.extract(where, FIELDS)
    ]
    records = list(jsonl.read_jsonl(where))
    index = [Position(*row) for row in jsonl.index_jsonl(where).tolist()]
    fetched = jsonl.fetch_jsonl(where, None, index[::-1])[::-1]
    assert list(map(whole, fetched[: len(records)])) == list(map(whole, records))
    return blocks, list(map(whole, records)), index


@pytest.mark.skipif(kernel.compiled is None, reason="no kernel was built")
@given(lines, small, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.integers(20, 400), st.booleans())
@example([b'{"text": 1, "text": "\\u00e9", "n": {"text": 2}}'], (40, 60), b"\n", True, 400, False)
def test_the_kernel_and_its_twin_give_the_same_bits(parts, sizes, ending, last, limit, packed):
    raw = ending.join(parts) + ending * last
    with stored(raw, sizes, limit, packed=packed) as plain:
        where = Sources(plain.paths, limit, FIELDS)
        try:
            ours = all_of(where)
        except DataError as error:
            with patch.object(kernel, "compiled", None), pytest.raises(DataError, match="no records in it"):
                all_of(where)
            assert "no records in it" in str(error)
            return
        with patch.object(kernel, "compiled", None):
            assert all_of(where) == ours
        restricted = [
            (*whole(r)[:5], [(k, r[k]) for k in dict.fromkeys(FIELDS) if k in r]) if isinstance(r, Record) else whole(r)
            for r in jsonl.read_jsonl(plain)
        ]
        assert ours[1] == restricted
        for _, _, places, values, text_of, bad in ours[0]:
            assert all(0 <= before <= len(places) for before, _ in bad)
            for (_, offset, size), row in zip(places, values, strict=True):
                record = json.loads(raw[offset : offset + size].rstrip(b",]"))  # of a list: not what follows
                for name, (kind, begin, end) in zip(dict.fromkeys(FIELDS), row, strict=True):
                    if kind == jsonl.STRING:
                        assert record[name] == text_of[begin:end].decode()
                    else:
                        assert (name in record) == (kind == jsonl.OTHER)
                        assert kind == jsonl.MISSING or record[name] == json.loads(text_of[begin:end])


@pytest.mark.skipif(kernel.compiled is None, reason="no kernel was built")
@given(
    st.binary(max_size=200) | st.lists(line | damaged(), max_size=3).map(b"\n".join),
    st.integers(-2, 40),
    st.integers(-60, 2),
    st.integers(-2, 40),
    st.integers(0, 4),
)
@example(b'{"a": "\\', 0, 0, 0, 1)
@example(b'{"a": "\xf0\x9f', 0, 0, 0, 1)
def test_the_kernel_survives_any_bytes_and_numbers(raw, at, cut, more, rows):
    # arrays of numpy have no byte behind them that stops a loop by chance: a sanitizer sees the first too many
    buffer = np.frombuffer(raw, np.uint8).copy()
    table, end = np.zeros(rows * 6, np.int64), len(raw) + cut
    arena = np.zeros(max(0, end - at + more), np.uint8)
    try:
        at_now, n, used, _ = kernel.compiled.extract(buffer, at, end, (b"a",), 99, 0, 1, table, 0, arena, 0)
    except ValueError:
        assert at < 0 or end < at or end > len(raw) or len(arena) < end - at
    else:
        assert at <= at_now <= end and 0 <= n <= rows and 0 <= used <= len(arena)


@pytest.mark.skipif(kernel.compiled is None, reason="no kernel was built")
@given(st.text("\n \tx", max_size=60), st.integers(0, 3))
def test_the_kernel_counts_lines_within_its_buffers(words, spare):
    buffer = np.frombuffer(words.encode(), np.uint8).copy()
    table = np.zeros(3 * (len(words) + spare), np.int64)
    rows, line, begin, blank = kernel.compiled.index_lines(buffer, len(words), 7, 1, 0, 0, True, table)
    *ended, last = words.split("\n")
    starts = [(7, i + 1, sum(len(one) + 1 for one in ended[:i])) for i, one in enumerate(ended) if one.strip()]
    assert [tuple(row) for row in table[: 3 * rows].reshape(-1, 3).tolist()] == starts
    assert (line, begin, blank) == (len(ended) + 1, len(words) - len(last), not last.strip())
