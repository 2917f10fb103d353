"""The jsonl reader against ``json`` itself, with blocks so small that every border falls everywhere."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corefit.data import jsonl
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
        with patch.object(jsonl, "_BLOCK", sizes[0]), patch.object(jsonl, "_HOLD", sizes[1]):
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
