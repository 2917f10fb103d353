"""Small and odd data through the command line, run in this process: what is right trains, what isn't is one line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import source
from tiny import CONTROL

from corefit.cli import main
from corefit.data.encode import make_encoder
from corefit.data.files import open_file
from corefit.data.stream import Stream
from corefit.data.tokenizer import Tokenizer
from corefit.errors import DataError
from corefit.registry import Registry

SMALL = [
    *("pack.max_length=128", "train.packs_per_step=2", "sample.max_tokens=2", "adapter.r=4", "pack.held=16"),
    *("run.threads=1", "run.device=cpu"),
]


def row(asked: object, answer: str = "It is so.") -> str:
    return json.dumps({"text": f"### Human: What is {asked}?### Assistant: {answer}"}, ensure_ascii=False)


def rows(n: int) -> str:
    return "".join(row(i) + "\n" for i in range(n))


class Done:
    """What a command did."""

    def __init__(self, code: int, out: str, err: str, folder: Path) -> None:
        self.code, self.out, self.err, self.folder = code, out, err, folder

    @property
    def ledger(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        ledger: dict[str, Any] = json.loads((self.folder / "ledger.json").read_text("utf-8"))
        assert ledger["balanced"] is True
        return ledger

    @property
    def steps(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        return [line for line in lines if "loss" in line]

    @property
    def error(self) -> str:
        """Give the one line of an error that is the user's to mend."""
        assert self.code == 2, (self.out, self.err)
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("corefit: error: "), self.err
        return lines[0].removeprefix("corefit: error: ")


@pytest.fixture
def train(tmp_path, tiny_model, monkeypatch, capsys):
    """Give what trains on rows.jsonl, or on what is named, in a new run folder each time."""
    monkeypatch.chdir(tmp_path)
    n = 0

    def run(*sets: str, data: str = "rows.jsonl", flags: tuple[str, ...] = ("--plugin", "oasst1")) -> Done:
        nonlocal n
        n += 1
        base = ["train", *flags, "--template", "chatml", "--model", str(tiny_model)]
        base += [] if "--quantizer" in flags else ["--quantizer", "none"]
        capsys.readouterr()
        code = main([*base, "--data", data, "--out", f"run-{n}", "--set", *SMALL, *sets])
        said = capsys.readouterr()
        return Done(code, said.out, said.err, tmp_path / f"run-{n}")

    return run


def write(text: str | bytes, name: str = "rows.jsonl") -> Path:
    data = text if isinstance(text, bytes) else text.encode()
    Path(name).write_bytes(data)
    return Path(name)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_rows_train_whatever_the_micro_batch(train, n):
    write(rows(n))
    done = train("train.epochs=2", "train.packs_per_step=4", "train.micro_batch=4")
    assert done.ledger["records"]["read"] == done.ledger["records"]["used"] == 2 * n
    assert "validation: off" in done.out and len(done.steps) >= 1 and done.steps[-1]["epoch"] == 2
    assert all(math.isfinite(step["loss"]) and step["lr"] > 0 for step in done.steps)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("warmup", ["0", "one step", "1"])
def test_a_warm_up_of_no_step_of_one_step_and_of_all_steps(train, warmup, steps):
    write(rows(3))
    share = 1 / steps if warmup == "one step" else float(warmup)
    done = train(f"train.warmup={share}", f"train.max_steps={steps}", "train.epochs=0", "train.lr=1e-3")
    rates = [step["lr"] for step in done.steps]
    assert len(rates) == steps and all(0 < rate <= 1e-3 for rate in rates)
    if warmup == "1":
        assert rates == pytest.approx([1e-3 * (k + 0.5) / steps for k in range(steps)])
    elif warmup == "one step":  # its middle is half way up
        assert rates[0] == pytest.approx(5e-4)


LONG = row("long", "so " * 400)


@pytest.mark.parametrize("policy", ["truncate", "split", "drop", "error"])
def test_one_row_longer_than_everything(train, policy):
    write(row(0) + "\n" + LONG + "\n" + row(1) + "\n")
    done = train(f"pack.overlong={policy}", "train.epochs=1")
    if policy == "error":
        assert done.error.startswith(f"{Path.cwd() / 'rows.jsonl'}:2: ") and "pack.max_length is 128" in done.error
    elif policy == "drop":
        assert done.ledger["records"]["dropped"] == {"overlong": 1} and done.ledger["tokens"]["dropped"] > 400
    else:
        assert done.ledger["records"]["used"] == 3 and done.ledger["tokens"]["truncated"] > 400


@pytest.mark.parametrize("n", [1, 40, 400])
def test_where_no_row_is_left_the_refusal_counts_them(train, n):
    nothing = [LONG, row("x", ""), '{"text": "### Human: only a question"}', '{"odd": 1}', "{broken"]
    write("\n".join(nothing[i % 5] for i in range(n)))
    done = train("pack.overlong=drop", flags=("--plugin", "oasst1", "--on-bad-record", "skip"))
    assert f"no sample in {n:,} records (" in done.error
    if n == 40:
        counts = ("overlong 8", "no_answer 16", "not_oasst1 8", "bad_record 8")
        assert all(count in done.error for count in counts), done.error
    write(LONG)
    assert "no sample in 1 records (overlong 1)" in train("pack.overlong=drop").error


def messages(*said: str) -> str:
    pairs = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return json.dumps({"messages": pairs}, ensure_ascii=False) + "\n"


MESSAGES = ("--plugin", "identity")


def test_an_empty_answer_teaches_its_stop_alone(train):
    write(messages("q", "") + messages("q", "a"))
    ledger = train("data.reader=jsonl", "train.epochs=1", flags=MESSAGES).ledger
    assert ledger["records"]["used"] == 2 and ledger["tokens"]["supervised"] == 1 + 2
    write(messages("q", ""))
    assert train("data.reader=jsonl", "train.epochs=1", flags=MESSAGES).ledger["tokens"]["supervised"] == 1


ODD = [
    "🦜 emoji 👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪",
    "עברית ثم العربية \u202e reversed \u202c",
    "a NUL \0 and \x01\x1b[31m controls \x7f\x85",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠜎𠜱 \U0010ffff \ufffe\uffff",
    "e\u0301\u0301\u0301 zalgo Z̸̡̧", "\ufeff BOM \u2028\u2029 lines",
    "  spaces \t\r\n ", "i", ":i", "<|im_end|>", "<eoa>",
]  # fmt: skip


CHATML = "<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n{0}<|im_end|>\n", "<|im_end|>"
WRITTEN = {
    "chatml": CHATML,
    "tokenizer": CHATML,
    "internlm_chat": ("<s><|User|>:{0}<eoh>\n<|Bot|>:{0}<eoa>\n", "<eoa>"),
}


@pytest.mark.parametrize("template", WRITTEN)
def test_every_character_comes_through_as_it_is(tmp_path, tiny_tokenizer, monkeypatch, capsys, template):
    monkeypatch.chdir(tmp_path)
    write("".join(messages(text, text) for text in ODD))
    command = ["inspect", "--data", "rows.jsonl", "--plugin", "identity", "--set", "data.reader=jsonl"]
    assert main([*command, "--template", template, "--tokenizer", str(tiny_tokenizer), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    tokenizer = Tokenizer.load(tiny_tokenizer)
    tokenizer.protect(CONTROL)
    assert len(found) == len(ODD)
    for text, sample in zip(ODD, found, strict=True):
        form, stop = WRITTEN[template]
        assert sample["text"] == form.format(text) and [m["content"] for m in sample["messages"]] == [text, text]
        learnt = [label for label in sample["labels"] if label != -100]
        # an answer is encoded by itself, whatever stands before it, and nothing typed is a control token
        assert learnt == [*tokenizer.encode([text])[0], tokenizer.token_id(stop)]
    assert main([*command, "--template", template, "--tokenizer", str(tiny_tokenizer)]) == 0
    shown = capsys.readouterr().out
    assert "\0" not in shown and "\x1b" not in shown and "\u202e" not in shown


def test_odd_characters_train(train):
    write("".join(messages(text, text) for text in ODD))
    assert train("data.reader=jsonl", "train.epochs=1", flags=MESSAGES).ledger["records"]["used"] == len(ODD)


@pytest.mark.measured
@pytest.mark.parametrize("template", ["chatml", "tokenizer"])
def test_ten_thousand_turns_take_time_in_proportion_and_are_split_without_a_loss(tmp_path, tiny_tokenizer, template):
    registry = Registry.load()
    encoder = make_encoder(registry.template(template), Tokenizer.load(tiny_tokenizer))
    seconds = []
    for turns in (1000, 10_000):
        path = tmp_path / f"{turns}.jsonl"
        path.write_text(messages(*(f"this is message {k} of them" for k in range(2 * turns))), "utf-8")
        one = source(path, reader=registry.reader("jsonl"), map_function=registry.map_function("identity"))
        began = time.process_time()
        batches = [b for (b,) in Stream([one], encoder, max_length=512, overlong="split").steps(1, 1)]
        seconds.append(time.process_time() - began)
    tokens = batches[-1].state()["ledger"]["tokens"]
    assert tokens["encoded"] == tokens["supervised"] + tokens["masked"] > 10**5
    whole = np.concatenate([ids[ids != encoder.tokenizer.pad_id] for b in batches for ids in b.input_ids])
    said = encoder.tokenizer.decode(whole)
    assert [int(n) for n in re.findall(r"message (\d+) of", said)] == list(range(20_000))
    assert seconds[1] < 25 * seconds[0]  # measured 12; 45 where each message was looked for in all of the text


# ---------------------------------------------------------------------------------------------------------------- files


NO_RECORDS = "no records in it, expected JSON lines or one JSON list"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\n \n\t\r\n", NO_RECORDS),
        (b"\xef\xbb\xbf", NO_RECORDS),
        (b"\xef\xbb\xbf\n\n", NO_RECORDS),
        (b"[]", NO_RECORDS),
        (b"[\n]\n", NO_RECORDS),
        (gzip.compress(b""), "nothing came in"),
        (gzip.compress(b"\n\n"), NO_RECORDS),
        (b"\x1f\x8b\x08", "damaged gzip data"),
        (rows(2).encode("utf-16"), "byte 0xff is not UTF-8; it begins as UTF-16 does: iconv -f UTF-16 -t UTF-8"),
        (bz2.compress(rows(2).encode()), "not text but bzip2; bunzip2 unpacks it"),
        (lzma.compress(rows(2).encode()), "not text but xz; unxz unpacks it"),
        (b"PAR1\x15\x04", "not text but Parquet; give it a name that ends in .parquet"),
    ],
    ids="empty,blank,BOM,BOM and blank,list,list of lines,gzip,gzip blank,gzip cut,UTF-16,bzip2,xz,Parquet".split(","),
)
def test_a_file_without_a_record_is_refused_by_name(train, content, words):
    path = write(content, "rows.jsonl.gz" if content[:1] == b"\x1f" else "rows.jsonl")
    assert words in (error := train(data=str(path)).error) and "rows" in error


@pytest.mark.parametrize("text", ["BZhang is a name, ", "PAR1, PAR2, "])
def test_text_that_begins_as_something_else_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text * 9, "utf-8")
    with open_file(tmp_path / "a.txt") as (file, _):
        assert file.read() == text.encode() * 9
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pytest.importorskip("pyarrow").table({"a": [1, 2]}), tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="not text but Parquet"), open_file(tmp_path / "a.jsonl"):
        pass


def test_a_folder_without_files_a_broken_link_a_loop_and_a_pipe(train):
    os.mkdir("empty")
    os.symlink("gone.jsonl", "link.jsonl")
    os.symlink("loop.jsonl", "loop.jsonl")
    os.mkfifo("pipe.jsonl")
    for name, words in (
        ("empty", "no data file"),
        ("link.jsonl", "a link to gone.jsonl, which is not there"),
        ("loop.jsonl", "too many levels of symbolic links"),
        ("pipe.jsonl", "a pipe or a device, which can be read only once; send it to --data -"),
        ("/dev/null", "a pipe or a device"),
        ("https://a.com/x.jsonl?a=b", "https://a.com/x.jsonl?a=b: an address; corefit downloads no data"),
        ("c:/x.jsonl", "no such folder"),
        ("x" * 300, "file name too long"),
        ("*.jsonl.gz", "no file matches"),
    ):
        error = train(data=name).error
        assert words in error and name in error
    folder = os.symlink("empty", "rows.jsonl") or train(data="rows.jsonl").error
    assert "no data file" in folder


def test_a_file_that_may_not_be_read(train, monkeypatch):
    write(rows(3))
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions don't bind root
    assert "rows.jsonl: no permission to read it" in train().error


@pytest.mark.parametrize(
    "name", ["odd [1] *?.jsonl", "line\nbreak.jsonl", "ünï 🦜 'quoted' \"twice\".jsonl", "-x.jsonl"]
)
def test_names_of_any_kind_are_read_and_one_line_names_them(train, name):
    write(rows(3), name)
    done = train(f"data.path={json.dumps('./' + name, ensure_ascii=False)}", "train.epochs=1", data=f"./{name}")
    assert done.ledger["records"]["used"] == 3
    if "\n" in name:  # a recipe holds it
        assert main(["train", str(done.folder / "recipe.toml"), "--out", "again"]) == 0
    write("{broken", name)
    shown = name.replace("\n", "\\n")
    assert f"{shown}:1:2: broken JSON" in train(data=f"./{name}").error


def test_a_name_that_is_not_utf_8_is_refused(train):
    write(rows(3), os.fsdecode(b"caf\xe9.jsonl"))
    assert "'caf\\udce9.jsonl'; expected text" in train(data=os.fsdecode(b"caf\xe9.jsonl")).error
    os.mkdir("folder")
    write(rows(3), os.fsdecode(b"folder/train-\xff.jsonl"))
    for data in ("folder", "folder/*"):
        error = train(data=data).error
        assert "train-\\udcff.jsonl: its name is not UTF-8, so that no recipe can hold it; rename it" in error


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.GZ", ".jsonl"])
def test_shuffled_gzip_files_may_be_named_by_a_glob_or_a_folder(train, ending):
    os.mkdir("parts")
    for k in range(2):
        write(gzip.compress(rows(3).encode()), f"parts/train-{k}{ending}")
    for data in (f"parts/*{ending}", "parts"):
        done = train("train.epochs=2", data=data)
        assert done.ledger["records"]["used"] == 12
        names = [re.sub(r"-\w+", "", path.name) for path in (done.folder / "data").iterdir()]
        assert names == ["train.jsonl"] * 2


def test_the_format_is_recognised_behind_bad_records_where_these_are_skipped(train):
    write("{broken\n" + rows(3))
    assert "rows.jsonl:1:2: broken JSON" in train(flags=()).error
    done = train("train.epochs=1", flags=("--on-bad-record", "skip"))
    assert done.ledger["records"]["dropped"] == {"bad_record": 1} and "format: oasst1" in done.out
    write("{broken\n" * 50)
    assert "none of the first 32 records can be read" in train(flags=("--on-bad-record", "skip")).error


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_int8_in_16_bits_on_a_cpu_is_int8_in_32(train, precision):
    write(rows(8))
    sets = ("train.max_steps=3", "train.lr=1e-3", "adapter.dropout=0.0", "val.records=0")
    flags = ("--plugin", "oasst1", "--quantizer", "int8")
    wide, done = (train(f"train.precision={p}", *sets, flags=flags) for p in ("fp32", precision))
    for step, other in zip(wide.steps, done.steps, strict=True):
        assert other["loss"] == pytest.approx(step["loss"], rel=2e-3) and not other["skipped"]
    assert "adapter.dora: int8 layers lose their scales" in train("adapter.dora=true", flags=flags).error
