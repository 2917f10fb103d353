"""CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import random
from dataclasses import replace
from pathlib import Path

import pytest

from corefit.data import files
from corefit.data.source import At, Input, Source, as_found
from corefit.errors import DataError, RecipeError, UserError
from corefit.prepare import _reader, prepare, resolve
from corefit.recipe import options_from
from corefit.registry import Registry
from corefit.types import BadRecord, Drop, MapFunction, Record, Sources

READERS = Registry.load().readers
HEADER = "instruction,input,output\n"


def read(path: Path, reader: str = "csv", options: dict | None = None, start=None, **more) -> list:
    made = options_from(READERS[reader].options, options or {}, where="data.options")
    sources = Sources((path,), **more)
    given = READERS[reader].read(sources, made) if start is None else READERS[reader].read(sources, made, start=start)
    return list(given)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def rows(records) -> list[dict]:
    return [dict(record) for record in records]


TEN = [
    ("a,b,c\n", ["a", "b", "c"]),
    ("a,,c\n", ["a", "", "c"]),
    ('"a","b","c"\n', ["a", "b", "c"]),
    ('"a, with comma",b,c\n', ["a, with comma", "b", "c"]),
    ('"say ""hi""",b,c\n', ['say "hi"', "b", "c"]),
    ('"two\nlines","\r\n",c\n', ["two\nlines", "\r\n", "c"]),
    ("你好,🦜,é\n", ["你好", "🦜", "é"]),
    (" a , b , c \n", [" a ", " b ", " c "]),
    ("a,b,c\r\n", ["a", "b", "c"]),
    ("\n\na,b,last without a line break", ["a", "b", "last without a line break"]),
]
BAD = [
    ("a,b\n", "2 columns, the header has 3: instruction, input, output"),
    ("a\n", "1 columns, the header has 3: instruction, input, output"),
    ("a,b,c,d\n", "4 columns, the header has 3: instruction, input, output"),
    (",,,\n", "4 columns, the header has 3: instruction, input, output"),
    ('"a"x,b,c\n', "',' expected after '\"'"),
    ('a,"b" ,c\n', "',' expected after '\"'"),
    (b"\xff,b,c\n", "not UTF-8"),
    (b'"two\n\xe4\xbd lines",b,c\n', "not UTF-8"),
    ("a\tb\tc\n", "1 columns, the header has 3: instruction, input, output"),
    ("a,b,c,\n", "4 columns, the header has 3: instruction, input, output"),
]


class TestCsv:
    @pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
    def test_ten_well_formed_rows_with_their_place(self, tmp_path, bom):
        data = bom + HEADER.encode()
        places = []
        for text, _ in TEN:
            blank = len(text) - len(text.lstrip("\n"))
            places.append((data.count(b"\n") + 1 + blank, len(data) + blank))
            data += text.encode()
        found = read(write(tmp_path / "a.csv", data))
        assert [list(record.values()) for record in found] == [wanted for _, wanted in TEN]
        assert {tuple(record) for record in found} == {("instruction", "input", "output")}
        assert [(record.line, record.offset) for record in found] == places
        assert [record.size for record in found] == [len(text.lstrip("\n").encode()) for text, _ in TEN]

    def test_ten_malformed_rows_are_bad_records_and_the_rest_is_read(self, tmp_path):
        for text, reason in BAD:
            raw = text.encode() if isinstance(text, str) else text
            path = write(tmp_path / "a.csv", HEADER.encode() + b"x,y,z\n" + raw + b"p,q,r\n")
            first, bad, last = read(path)
            assert isinstance(bad, BadRecord) and bad.reason == reason and str(bad).startswith(f"{path}:3: ")
            assert list(first.values()) == ["x", "y", "z"] and list(last.values()) == ["p", "q", "r"]

    def test_a_quote_that_is_never_closed_is_a_bad_record_of_bounded_size(self, tmp_path):
        path = write(tmp_path / "a.csv", HEADER + 'a,b,c\nx,"never closed,z\n' + "more,and,more\n" * 1000)
        good, bad = read(path, max_record_bytes=2000)
        assert list(good) and bad.line == 3 and bad.reason.startswith("a row of over 2,000 bytes")
        assert bad.reason.endswith("; nothing of this file is read from here on")
        good, bad = read(path)
        assert bad.line == 3 and bad.reason == "unexpected end of data"

    def test_the_name_of_a_column_ends_no_file(self, tmp_path):
        path = write(tmp_path / "a.csv", "question,never closed\na\nb,c\n")
        bad, good = read(path)
        assert bad.reason == "1 columns, the header has 2: question, never closed" and list(good.values()) == ["b", "c"]

    def test_large_values_are_read(self, tmp_path):
        assert read(write(tmp_path / "a.csv", HEADER + "x" * 300_000 + ",b,c\n"))[0]["instruction"] == "x" * 300_000

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("\n\n", "no rows in it"),
            ("a,a\n1,2\n", ":1: the header has two columns called 'a'; data.options.columns names"),
            ("a,,b\n1,2,3\n", ":1: the header has a column without a name"),
            ("a;b\n1;2\n", ":1: one column, 'a;b'; is ';' between them? data.options.delimiter"),
            ('"a\n', ":1: the header: unexpected end of data"),
            (b"\xff\xfea\0,\0b\0\n\0", ":1: not a table in UTF-8"),
        ],
    )
    def test_a_header_that_names_no_columns_is_said(self, tmp_path, text, words):
        with pytest.raises(DataError) as caught:
            read(write(tmp_path / "a.csv", text))
        assert words in str(caught.value)

    def test_columns_name_those_of_a_file_without_a_header(self, tmp_path):
        path = write(tmp_path / "a.csv", "1,2\n3,4\n")
        assert rows(read(path, options={"columns": ["a", "b"]})) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]

    def test_columns_of_one_name_are_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"data\.options: columns has 'a' twice"):
            read(write(tmp_path / "a.csv", "1,2\n"), options={"columns": ["a", "a"]})

    def test_delimiters(self, tmp_path):
        assert rows(read(write(tmp_path / "a.csv", "a;b\n1,5;2\n"), options={"delimiter": ";"})) == [
            {"a": "1,5", "b": "2"}
        ]
        assert rows(read(write(tmp_path / "a.tsv", 'a\tb\n1,5\t"2\t3"\n'), "tsv")) == [{"a": "1,5", "b": "2\t3"}]
        with pytest.raises(UserError, match="delimiter is ';;', expected one character"):
            read(tmp_path / "a.csv", options={"delimiter": ";;"})

    def test_reading_goes_on_at_any_row(self, tmp_path):
        path = write(tmp_path / "a.csv", b"\xef\xbb\xbf" + (HEADER + "".join(text for text, _ in TEN)).encode())
        found = read(path)
        for i, record in enumerate(found):
            again = read(path, start=record.position)
            assert rows(again) == rows(found[i:])
            assert [r.position for r in again] == [r.position for r in found[i:]]

    def test_only_the_fields_that_are_asked_for(self, tmp_path):
        path = write(tmp_path / "a.csv", HEADER + "a,b,c\n")
        assert rows(read(path, fields=("output", "other"))) == [{"output": "c"}]

    def test_nothing_is_read_that_was_added_since_the_run_began(self, tmp_path):
        path = write(tmp_path / "a.csv", HEADER + "a,b,c\n")
        sources = as_found(Sources((path,)))
        with path.open("a") as file:
            file.write("p,q,r\n")
        assert len(list(READERS["csv"].read(sources, None))) == 1
        assert len(read(path)) == 2

    def test_gzip(self, tmp_path):
        assert rows(read(write(tmp_path / "a.csv.gz", gzip.compress(b"a,b\n1,2\n")))) == [{"a": "1", "b": "2"}]
        with pytest.raises(DataError, match=r"a\.csv\.gz: "):
            read(write(tmp_path / "a.csv.gz", gzip.compress(b"a,b\n1,2\n")[:-9]))
        torn = bytearray(gzip.compress(b"a,b\n1,2\n"))
        torn[10] = 255  # the first byte behind the header
        with pytest.raises(DataError, match=r"a\.csv\.gz: damaged gzip data \(Error -3 while decompressing data"):
            read(write(tmp_path / "a.csv.gz", bytes(torn)))

    def test_gzip_is_told_by_content_not_by_name(self, tmp_path):
        for name in ("a.csv", "a.csv.GZ"):
            assert rows(read(write(tmp_path / name, gzip.compress(b"a,b\n1,2\n")))) == [{"a": "1", "b": "2"}]

    def test_what_a_gzip_file_unpacks_to_has_a_limit(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "MAX_UNPACKED", 2**16)
        path = write(tmp_path / "a.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 2**18))
        with pytest.raises(DataError, match=r"a\.csv\.gz: unpacks to more than 200 times its size"):
            read(path)

    def test_random_tables_are_what_the_csv_module_wrote(self, tmp_path):
        generator = random.Random(0)
        for _ in range(300):
            wanted = [
                ["".join(generator.choice('ab",\n\r é') for _ in range(generator.randrange(6))) for _ in "ab"]
                for _ in range(generator.randrange(1, 6))
            ]
            out = io.StringIO(newline="")
            csv.writer(out, quoting=csv.QUOTE_ALL).writerows([["x", "y"], *wanted])
            found = read(write(tmp_path / "a.csv", out.getvalue()))
            assert [list(record.values()) for record in found] == wanted
            for record in found:
                assert dict(read(tmp_path / "a.csv", start=record.position)[0]) == dict(record)

    def test_a_shuffled_epoch_has_every_row_once(self, tmp_path):
        path = write(tmp_path / "a.csv", HEADER + "".join(f'"{i}\n",,a\n' for i in range(500)))
        nothing = MapFunction(name="nothing", summary="", map=lambda record, options: [Drop("x")])
        source = Source(reader=READERS["csv"], map_function=nothing, sources=Sources((path,)))
        given = Input(0, source, 42, [])
        order = [int(record["instruction"]) for _, record in given.read(0, At())]
        assert sorted(order) == list(range(500)) != order


class TestChoice:
    @pytest.mark.parametrize(
        ("names", "wanted"),
        [
            (["a.csv"], "csv"),
            (["a.CSV", "b.csv.gz"], "csv"),
            (["a.tsv"], "tsv"),
            (["a.parquet"], "parquet"),
            (["a.txt", "b.txt.gz"], "text"),
            (["a.jsonl", "b.json", "c.data"], "jsonl"),
        ],
    )
    def test_the_suffix_chooses_the_reader(self, names, wanted):
        assert _reader(None, None, Registry.load(), [Path(name) for name in names]).name == wanted

    def test_a_named_reader_wins_and_a_suffix_wins_over_the_map_function_s_own(self):
        registry = Registry.load()
        assert _reader("jsonl", None, registry, [Path("a.csv")]).name == "jsonl"
        assert _reader(None, "oasst1", registry, [Path("a.csv")]).name == "csv"
        assert _reader(None, "oasst1", registry, [Path("a.jsonl")]).name == "oasst1"

    def test_files_for_several_readers_are_refused(self):
        words = r"^a\.csv and b\.jsonl need several readers; write a \[\[data\]\] for each"
        with pytest.raises(RecipeError, match=words):
            _reader(None, None, Registry.load(), [Path("a.csv"), Path("b.jsonl")])

    def test_a_suffix_that_two_readers_claim_is_neither_s(self):
        registry = Registry.load()
        readers = {**registry.readers, "a": replace(READERS["csv"], name="a")}
        registry = replace(registry, entries={**registry.entries, "reader": readers})
        words = r"^x\.csv: several readers read such files \(csv, a\); data\.reader names one$"
        with pytest.raises(RecipeError, match=words):
            _reader(None, None, registry, [Path("x.csv")])
        assert _reader("a", None, registry, [Path("x.csv")]).name == "a"

    def test_a_format_is_recognised_in_what_the_options_make_of_a_file(self, tmp_path, tiny_tokenizer):
        path = write(tmp_path / "x.csv", "instruction;output\nq 1;a 1\nq, 2;a 2\n")
        flags = {"data": str(path), "template": "chatml"}
        recipe, _, _ = resolve(None, flags, ["data.options.delimiter=;"], Registry.load(), need_model=False)
        plan = prepare(recipe, Registry.load(), tokenizer=tiny_tokenizer, spool_to=None)
        assert plan.sources[0].map_function.name == "alpaca"


class TestParquet:
    def test_rows_of_every_kind_of_value(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        from datetime import datetime

        from pyarrow import parquet

        table = [
            {"text": "你好", "n": 1, "messages": [{"role": "user", "content": "q", "loss": None}]},
            {"text": None, "n": 2, "messages": []},
        ]
        table[0] |= {"image": b"abc", "when": datetime(2024, 1, 2)}
        table[1] |= {"image": None, "when": None}
        parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
        first, second = read(tmp_path / "a.parquet", "parquet")
        assert isinstance(first, Record) and (first.line, first.offset, second.line) == (1, 0, 2)
        assert dict(first) == table[0] | {"image": "(3 bytes)", "when": "2024-01-02 00:00:00"}
        assert dict(second) == table[1]
        assert rows(read(tmp_path / "a.parquet", "parquet", fields=("n", "other"))) == [{"n": 1}, {"n": 2}]
        assert rows(read(tmp_path / "a.parquet", "parquet", fields=("other",))) == [{}, {}]

    def test_more_rows_than_a_batch_and_several_files(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        from pyarrow import parquet

        for name, start in (("a", 0), ("b", 3000)):
            table = pyarrow.table({"n": list(range(start, start + 3000))})
            parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=700)
        paths = (tmp_path / "a.parquet", tmp_path / "b.parquet")
        found = list(READERS["parquet"].read(Sources(paths), None))
        assert [record["n"] for record in found] == list(range(6000))
        assert (found[3000].file, found[3000].line) == (1, 1)

    def test_a_file_that_is_no_parquet(self, tmp_path):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        with pytest.raises(DataError, match=r"a\.parquet: can't be read as Parquet: "):
            read(write(tmp_path / "a.parquet", "text"), "parquet")

    def test_without_pyarrow_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
        with pytest.raises(UserError, match=r"^Parquet files need pyarrow: pip install 'corefit\[parquet\]'$"):
            read(write(tmp_path / "a.parquet", "text"), "parquet")
