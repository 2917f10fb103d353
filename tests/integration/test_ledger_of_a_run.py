"""One run through the real command line, interrupted and resumed over bad records and validation: nothing is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
from fakes import source
from samples import encode_each

from corefit.cli import main
from corefit.data.encode import make_encoder
from corefit.data.source import map_record
from corefit.data.stream import split_validation
from corefit.data.tokenizer import Tokenizer
from corefit.registry import Registry
from corefit.types import Drop, Record

EPOCHS = 3


def rows() -> list[str]:
    made = []
    for i in range(80):
        text = f"### Human: What is {i}?### Assistant: It is number {i}, {'really ' * (i % 7)}so."
        text = "### Human: only a question" if i % 11 == 3 else text
        made.append("{broken" if i % 9 == 4 else json.dumps({"text": text}))
    return made


def interrupt_after(step: int, metrics: Path, gone: threading.Event) -> None:
    """Send this process SIGINT once the line of a step is written."""
    while not gone.wait(0.001):
        if metrics.exists() and re.search(rf'"step": ?{step},', metrics.read_text("utf-8")):
            os.kill(os.getpid(), signal.SIGINT)
            return


def test_interrupted_and_resumed_over_bad_records_and_validation_the_ledger_is_a_recount(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows()) + "\n", "utf-8")
    command = ["train", "--plugin", "oasst1", "--template", "chatml", "--model", str(tiny_model), "--data", str(path)]
    command += ["--on-bad-record", "skip", "--quantizer", "none", "--out", "run", "--resume", "--set"]
    command += ["pack.max_length=64", "train.packs_per_step=2", f"train.epochs={EPOCHS}", "val.share=0.2"]
    command += ["pack.held=16", "run.threads=1", "sample.max_tokens=1", "adapter.r=4", "pack.overlong=drop"]
    ledgers, codes = [], []
    for step in (3, 9, None):
        gone = threading.Event()
        thread = threading.Thread(target=interrupt_after, args=(step, tmp_path / "run" / "metrics.jsonl", gone))
        if step:
            thread.start()
        try:
            codes.append(main(command))
        finally:
            gone.set()
            if step:
                thread.join()
        ledgers.append(json.loads((tmp_path / "run" / "ledger.json").read_text("utf-8")))
    assert codes == [130, 130, 0] and capsys.readouterr().out.count("resume: from step") == 2
    assert all(ledger["balanced"] is True for ledger in ledgers)
    assert all(ledger["records"]["pending"] for ledger in ledgers[:2])
    reads = [ledger["records"]["read"] for ledger in ledgers]
    assert reads == sorted(set(reads))
    ledger = ledgers[-1]

    registry = Registry.load()
    one = source(path, reader=registry.reader("jsonl"), map_function=registry.map_function("oasst1"))
    encoder = make_encoder(registry.template("chatml"), Tokenizer.load(tiny_model))
    records, tokens = Counter(), Counter()
    held_out = {record.line for _, record in split_validation([one], share=0.2, records=200).records}
    for record in one.read():
        if not isinstance(record, Record):
            records["bad_record"] += EPOCHS
            continue
        items = map_record(one, record)
        if isinstance(items[0], Drop):
            records["validation" if record.line in held_out else items[0].reason] += EPOCHS
            continue
        (made,) = encode_each(encoder, [(items[0], record.origin)])
        if record.line in held_out:
            records["validation"] += EPOCHS
            tokens["encoded"] += len(made.sample.input_ids)
            tokens["validation"] += len(made.sample.input_ids)
        elif len(made.sample.input_ids) > 64:
            records["overlong"] += EPOCHS
            tokens["encoded"] += EPOCHS * len(made.sample.input_ids)
            tokens["dropped"] += EPOCHS * len(made.sample.input_ids)
        else:
            records["used"] += EPOCHS
            tokens["encoded"] += EPOCHS * len(made.sample.input_ids)
            tokens["supervised"] += EPOCHS * made.sample.n_supervised
            tokens["masked"] += EPOCHS * (len(made.sample.input_ids) - made.sample.n_supervised)
    assert len(held_out) > 3
    of = ledger["records"]
    assert of["read"] == EPOCHS * 80 == records.total() and of["pending"] == ledger["tokens"]["pending"] == 0
    assert {**of["dropped"], "used": of["used"], "validation": of["validation"]} == records
    assert records.keys() == {"used", "validation", "bad_record", "no_answer", "overlong"}
    assert {key: n for key, n in ledger["tokens"].items() if n} == tokens
