"""A system message that all of the training data has: samples and chat begin with it, by themselves or by its name."""

from __future__ import annotations

import json
from pathlib import Path

import corefit
from corefit.chat import Chatter, chat_loop, chat_with
from corefit.registry import Registry
from corefit.session import common_system

SETS = [
    *("pack.max_length=512", "train.packs_per_step=2", "train.max_steps=2", "sample.max_tokens=2", "adapter.r=4"),
    *("pack.held=16", "run.threads=1", "val.records=0"),
]


def trained(folder: Path, base: Path, plugin: str, rows: list[dict[str, str]]) -> corefit.Run:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    data = dict(data=str(folder / "rows.jsonl"), plugin=plugin, template="chatml", quantizer="none")
    return corefit.train(model=str(base), out=folder / "run", sets=SETS, **data)


def asked(chatter: Chatter, monkeypatch) -> list[list[str]]:
    seen: list[list[str]] = []
    own = Chatter.prompt_ids

    def prompt_ids(self, messages):
        seen.append([m["content"] for m in messages])
        return own(self, messages)

    monkeypatch.setattr(Chatter, "prompt_ids", prompt_ids)
    return seen


def test_samples_and_chat_begin_as_training_did(tmp_path, tiny_model, monkeypatch, capsys):
    coder, sql = (Registry.load().map_function(name).system for name in ("code_alpaca", "sql"))
    assert coder and sql and coder != sql
    rows = [{"prompt": f"Write {i}.", "completion": f"{i}"} for i in range(40)]
    seen = asked(Chatter, monkeypatch)
    run = trained(tmp_path, tiny_model, "code_alpaca", rows)
    assert json.loads((run.path / "adapter" / "corefit.json").read_bytes())["system"] == coder
    how = dict(quantizer="none", max_tokens=2, device="cpu")
    chat_with(str(run.path), prompt="hi", **how)
    chat_with(str(run.path), prompt="hi", system="sql", **how)
    chat_with(str(run.path), prompt="hi", system="", **how)
    chat_with(str(run.path), prompt="hi", system="Be brief.", **how)
    run.chat("hi", max_tokens=2)
    assert seen == [[coder, "hi"], [sql, "hi"], ["hi"], ["Be brief.", "hi"], [coder, "hi"]]


def test_the_questions_of_a_run_are_asked_with_it(tmp_path, tiny_model, monkeypatch):
    from corefit.data.encode import Encoder

    coder, own, seen = Registry.load().map_function("code_alpaca").system, Encoder.prompt, []
    monkeypatch.setattr(Encoder, "prompt", lambda self, messages, *more: seen.append(messages) or own(self, messages))
    trained(tmp_path, tiny_model, "code_alpaca", [{"prompt": f"Write {i}.", "completion": f"{i}"} for i in range(40)])
    assert {messages[0].content for messages in seen} == {coder}
    assert {messages[1].role for messages in seen} == {"user"}


def test_where_not_all_have_the_same_there_is_none(tmp_path, tiny_model):
    rows = [{"system_prompt": "a" if i % 2 else "b", "question": f"{i}?", "response": f"{i}"} for i in range(40)]
    run = trained(tmp_path, tiny_model, "openorca", rows)
    assert "system" not in json.loads((run.path / "adapter" / "corefit.json").read_bytes())
    assert common_system([]) == ""


def test_the_loop_knows_the_names(tmp_path, tiny_model, monkeypatch):
    chatter = Chatter(tiny_model, device="cpu", max_tokens=1)
    seen = asked(chatter, monkeypatch)
    lines = iter(["one", "/system pirate", "two", "/exit"])
    chat_loop(
        chatter, system="sys", systems={"pirate": "Arr."}, read=lambda prompt: next(lines), write=lambda text: None
    )
    assert seen == [["sys", "one"], ["Arr.", "two"]]
