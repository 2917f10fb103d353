"""Plain text files: documents, where they lie, what is no text; the template without markers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from corefit_text import TextOptions, read
from tiny import write_model

import corefit
from corefit.data import files
from corefit.data.source import as_found
from corefit.errors import DataError, UserError
from corefit.types import BadRecord, Record, Sources


def texts(*paths: Path, separator: str = "", limit: int = 1000, start=None) -> list[object]:
    found = read(Sources(paths, limit), TextOptions(separator=separator), start)
    return [r["text"] if isinstance(r, Record) else r.reason for r in found]


@pytest.mark.parametrize(
    ("raw", "separator", "expected"),
    [
        (b"one", "", ["one"]),
        (b"one\n\ntwo\n", "", ["one\n\ntwo\n"]),
        (b"", "", []),
        (b" \n\t\n", "", []),
        (b"\xef\xbb\xbfone\n", "", ["one\n"]),
        ("\u4f60\u597d \U0001f642\n".encode(), "", ["\u4f60\u597d \U0001f642\n"]),
        (b"one\r\n\r\n", "", ["one\r\n\r\n"]),
        (b"one\n===\ntwo\n", "===", ["one\n", "two\n"]),
        (b"===\n===\none\n  === \r\n\n===\ntwo", "===", ["one\n", "two"]),
        (b"one ===\n=== two\n", "===", ["one ===\n=== two\n"]),
        (b"one\0two", "", ["one\0two"]),
        (b"caf\xe9\n", "", ["not UTF-8: invalid continuation byte"]),
        (b"ok\n===\n\xff\xfe\n===\nfine\n", "===", ["ok\n", "not UTF-8: invalid start byte", "fine\n"]),
        (b"\xe4\xbd", "", ["not UTF-8: unexpected end of data"]),
        (b"x" * 1001, "", ["a document of 1,001 bytes, data.max_record_mb allows 1,000"]),
        (b"x" * 999 + b"\n", "", ["x" * 999 + "\n"]),
        (b"a\n===\n" + b"yz\n" * 900 + b"===\nb\n", "===",
         ["a\n", "a document of 2,700 bytes, data.max_record_mb allows 1,000", "b\n"]),
        (b"z" * 5000 + b"\n===\nb\n", "===", ["a document of 5,001 bytes, data.max_record_mb allows 1,000", "b\n"]),
    ],
)  # fmt: skip
def test_documents_of_a_file(raw, separator, expected, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    assert texts(path, separator=separator) == expected


def test_lines_are_counted_beyond_a_line_that_is_too_long(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"z" * 5000 + b"\n--\ntwo\n")
    found = list(read(Sources((tmp_path / "a.txt",), 1000), TextOptions(separator="--")))
    assert [r.line for r in found] == [1, 3]


def test_a_document_is_found_again_where_it_was(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n--\n\n--\ntwo\nlines\n--\n\xff\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three\n--\nfour"))
    sources = Sources((tmp_path / "a.txt", tmp_path / "b.txt.gz"))
    options = TextOptions(separator="--")
    whole = list(read(sources, options))
    assert [(r.line, r.file) for r in whole] == [(1, 0), (5, 0), (8, 0), (1, 1), (3, 1)]
    assert isinstance(whole[2], BadRecord) and str(whole[2]).startswith(f"{tmp_path}/a.txt:8: not UTF-8")
    for i, record in enumerate(whole):
        at = corefit.Position(record.file, record.line, record.offset)
        assert [repr(r) for r in read(sources, options, start=at)] == [repr(r) for r in whole[i:]]


def test_what_is_added_while_a_run_goes_on_is_not_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n--\ntwo\n")
    sources = as_found(Sources((path,)))
    path.write_bytes(b"one\n--\ntwo\nmore\n--\nthree\n")
    assert [r["text"] for r in read(sources, TextOptions(separator="--"))] == ["one\n", "two\n"]


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt: no such file"):
        texts(tmp_path / "gone.txt")
    with pytest.raises(UserError, match="separator"):
        TextOptions(separator=" -")


def test_plain_text_trains_a_base_without_a_chat_template(tmp_path):
    base = write_model(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    del config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Text {i}. " + "the quick brown fox jumps. " * 30, "utf-8")
    said: list[str] = []
    sets = ["pack.max_length=64", "train.packs_per_step=2", "train.max_steps=3", "sample.max_tokens=3", "adapter.r=4"]
    run = corefit.train(
        model=str(base),
        data=str(tmp_path / "texts" / "*.txt"),
        quantizer="none",
        out=tmp_path / "run",
        sets=[*sets, "run.threads=1", 'sample.prompts=["the quick"]'],
        say=said.append,
    )
    assert said[1] == "template: text (none was named, and the data is plain text)"
    tokens = run.ledger["tokens"]
    assert run.ledger["balanced"] and tokens["truncated"] == 0
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text("utf-8").splitlines()]
    assert {sample["prompt"] for sample in samples} == {"the quick"}
    assert isinstance(run.chat("the quick", max_tokens=3), str)
    (tmp_path / "chats.jsonl").write_text('{"text": "### Human: a### Assistant: b"}\n' * 20, "utf-8")
    with pytest.raises(UserError, match="no chat template"):
        corefit.train(model=str(base), data=str(tmp_path / "chats.jsonl"), out=tmp_path / "other", sets=sets)


def test_a_damaged_gzip_file_is_an_error_that_names_it(tmp_path):
    torn = bytearray(gzip.compress(b"one"))
    torn[10] = 255  # the first byte behind the header
    (tmp_path / "a.txt.gz").write_bytes(torn)
    with pytest.raises(DataError, match=r"a\.txt\.gz: damaged gzip data \(Error -3 while decompressing data"):
        list(read(Sources((tmp_path / "a.txt.gz",))))


def test_what_a_gzip_file_unpacks_to_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_UNPACKED", 2**16)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some words\n" * 2**17))
    with pytest.raises(DataError, match=r"a\.txt\.gz: unpacks to more than 200 times its size"):
        list(read(Sources((tmp_path / "a.txt.gz",))))
