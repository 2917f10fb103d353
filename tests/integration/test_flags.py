"""Flags and keys that no other test types: each arrives where it has an effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corefit.cli import main


def called(function: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[Any, ...], Any]:
    """Run a verb with its function replaced; give what the function was called with."""
    seen: list[Any] = []

    def record(*args: object, **more: object) -> object:
        seen.append((args, more))
        return type("Done", (), {"exit_code": 0})

    monkeypatch.setattr(function, record)
    assert main(arguments) == 0
    assert len(seen) == 1
    return seen[0]


def test_chat_passes_on_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = ["--temperature", "0.5", "--top-k", "9", "--top-p", "0.25", "--repetition-penalty", "1.5", "--seed", "3"]
    where = ["--model", "base", "--quantizer", "int8", "--device", "cpu", "--trust-remote-code", "--max-tokens", "7"]
    asked = ["--prompt", "hi", "--system", "Be brief.", "--compare", "--template", "vicuna"]
    args, more = called("corefit.chat.chat_with", ["chat", "run@5", *decoding, *where, *asked], monkeypatch)
    assert args == ("run@5",)
    assert more == dict(
        prompt="hi",
        system="Be brief.",
        compare=True,
        template="vicuna",
        model="base",
        quantizer="int8",
        max_tokens=7,
        decoding=dict(temperature=0.5, top_k=9, top_p=0.25, repetition_penalty=1.5, seed=3),
        device="cpu",
        trust_remote_code=True,
    )
    _, more = called("corefit.chat.chat_with", ["chat", "run", "--top-k", "9"], monkeypatch)
    assert more["decoding"] == dict(top_k=9, temperature=1.0)  # who says so wants to sample
    _, more = called("corefit.chat.chat_with", ["chat", "run"], monkeypatch)
    assert (more["decoding"], more["trust_remote_code"], more["compare"]) == ({}, False, False)


def test_eval_passes_on_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    what = ["--data", "d", "--plugin", "p", "--template", "t", "--quantizer", "q", "--set", "pack.max_length=64"]
    how = ["--choices", "c", "--generate", "4", "--records", "5", "--max-tokens", "6", "--model", "m", "--out", "o"]
    args, more = called("corefit.score.evaluate", ["eval", "run", *what, *how], monkeypatch)
    assert args == ("run", dict(data="d", plugin="p", template="t", quantizer="q"), ["pack.max_length=64"])
    assert more == dict(choices="c", generate=4, records=5, max_tokens=6, model="m", out="o")


def test_train_and_pack_pass_on_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--on-bad-record", "skip", "--seed", "5", "--cfg-options", "max_length=64", "lr=1e-4"]
    known = {"on-bad-record": "skip", "seed": "5", "cfg-options": "max_length=64 lr=1e-4"}
    more = ["--allow-changes", "--dry-run", "--work-dir", "o", "--resume", "run@5", "--set", "train.lr=1"]
    args, given = called("corefit.run.train_from", ["train", "a.py", *flags, *more], monkeypatch)
    assert args == ("a.py", known | {"out": "o"}, ["train.lr=1"])
    assert given == dict(resume="run@5", allow_changes=True, dry_run=True, own_process=True)
    where = ["--model", "m", "--tokenizer", "t", "--out", "o", "--set", "train.lr=1"]
    args, given = called("corefit.samples.pack_from", ["pack", "a.py", *flags, *where], monkeypatch)
    assert args == ("a.py", known | {"model": "m"}, ["train.lr=1"])
    assert given == dict(out="o", tokenizer="t")
    args, given = called(
        "corefit.plan.plan_from", ["plan", "a.py", *flags, "--template", "t", "--gpu", "t4"], monkeypatch
    )
    assert args == ("a.py", known | {"template": "t"}, [])
    assert given == dict(gpu="t4")


def test_doctor_and_runs_are_verbs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = main(["doctor", "--json"])
    assert code == bool(json.loads(capsys.readouterr().out)["broken"])
    (tmp_path / "odd").mkdir()
    assert main(["runs", str(tmp_path), "--sort", "loss", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "damaged"
    assert main(["runs", str(tmp_path), "--sort", "size"]) == 2
    assert "--sort size: no key 'size'" in capsys.readouterr().err


def test_keys_of_mixtures_adapters_and_patience_have_their_effect(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, n in (("a", 6), ("b", 3)):
        rows = ({"text": f"### Human: {name} {i}?### Assistant: {i}"} for i in range(n))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    sources = '[[data]]\npath = "a.jsonl"\nratio = 1.0\n[[data]]\npath = "b.jsonl"\nratio = 2.0\nrepeat = 2\n'
    (tmp_path / "mine.toml").write_text(sources, "utf-8")
    sets = ["adapter.r=2", "adapter.dora=true", "adapter.rslora=true", 'train.lr_mult={"lora"=1e-12}', "train.lr=1e-2"]
    sets += ["val.data=a.jsonl", "val.patience=2", "val.every_steps=1", "train.packs_per_step=1", "train.max_steps=9"]
    sets += ["pack.max_length=64", "pack.algorithm=first_fit", "train.epochs=0", "sample.max_tokens=1"]
    flags = ["--model", str(tiny_model), "--template", "chatml", "--plugin", "oasst1", "--out", "run"]
    assert main(["train", "mine.toml", *flags, "--set", *sets]) == 0
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert (config["use_dora"], config["use_rslora"]) == (True, True)
    facts = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert facts["ended_by"] == "patience" and facts["steps"] < 9  # with such a factor nothing moves


def test_a_mixture_reads_each_source_as_often_as_its_key_says(
    tmp_path: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "### Human: a?### Assistant: b"}\n' * 3, "utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "### Human: c?### Assistant: d"}\n' * 5, "utf-8")
    (tmp_path / "r.toml").write_text('[[data]]\npath = "a.jsonl"\nrepeat = 4\n[[data]]\npath = "b.jsonl"\n', "utf-8")
    assert main(["inspect", str(tmp_path / "r.toml"), "--tokenizer", str(tiny_tokenizer), "--template", "chatml"]) == 0
    assert "17 read = 17 used" in capsys.readouterr().out


def test_processes_are_told_to_show_tracebacks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("corefit.launch.launch", lambda n, words: told.append((n, list(words))) or 0)
    assert main(["--debug", "launch", "-n", "2", "a.toml", "--set", "train.lr=1"]) == 0
    monkeypatch.setenv("NPROC_PER_NODE", "3")
    assert main(["train", "a.toml", "--debug"]) == 0
    assert told == [("2", ["a.toml", "--set", "train.lr=1", "--debug"]), ("3", ["a.toml", "--debug"])]
