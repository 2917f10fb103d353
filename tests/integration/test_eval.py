"""corefit eval: what training changed, in numbers."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_families import REFUSED, write_family
from transformers import AutoModelForCausalLM

from corefit.chat import Chatter
from corefit.data.encode import make_encoder
from corefit.data.tokenizer import Tokenizer
from corefit.errors import DataError, UserError
from corefit.registry import Registry
from corefit.run import train_from
from corefit.score import evaluate
from corefit.types import Conversation, Message

ROWS = "".join(
    json.dumps({"text": f"### Human: What is {i}?### Assistant: It is number {i}, {'really ' * (i % 7)}so."}) + "\n"
    for i in range(40)
)
SETS = [
    *("pack.max_length=128", "train.packs_per_step=2", "sample.max_tokens=4", "adapter.r=4", "train.lr=5e-3"),
    *("run.threads=1", "run.device=cpu", "train.epochs=2"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "rows.jsonl").write_text(ROWS, "utf-8")
    flags = {"plugin": "oasst1", "template": "chatml", "model": str(tiny_model), "data": str(folder / "rows.jsonl")}
    return train_from(None, {**flags, "out": str(folder / "run")}, SETS, say=lambda line: None).path


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model would take its time: it is an error to load one."""

    def load(*_: object, **more: object) -> None:
        raise LookupError("loaded")

    monkeypatch.setattr("corefit.score.Chatter", load)


def said(*arguments, **more):
    lines: list[str] = []
    return evaluate(*arguments, say=lines.append, **more), "\n".join(lines)


def test_a_run_is_scored_on_what_it_validated_on_with_the_adapter_off_and_on(run: Path):
    (score,), table = said(str(run), {})
    validated = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["val_loss"] for line in validated if "val_loss" in line]
    assert score.base == pytest.approx(
        losses[0], rel=2e-3
    )  # served in the precision that auto chooses, trained in fp32
    assert score.tuned == pytest.approx(losses[-1], rel=2e-3)
    assert score.tokens == next(line["val_tokens"] for line in validated if "val_tokens" in line)
    assert f"{score.tuned - score.base:+.4f}" in table
    (at_step,), _ = said(f"{run}@latest", {})
    assert at_step.tuned == pytest.approx(score.tuned, rel=1e-6)


def test_data_that_changed_since_training_is_named(run: Path):
    _, table = said(str(run), {})
    assert "changed since training" not in table
    rows = run.parent / "rows.jsonl"
    try:
        rows.write_text(ROWS.replace("really", "truly"), "utf-8")
        _, table = said(str(run), {})
    finally:
        rows.write_text(ROWS, "utf-8")
    assert "changed since training: file 0 of data 0: rows.jsonl, " in table
    assert "some of these records may have been trained on" in table


def test_a_run_without_validation_and_a_source_without_any_are_said(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"the run had no validation \(val.share = 0.05, val.records = 0\)"):
        said(str(run), {}, ["val.records=0"])
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "more.jsonl").write_text(ROWS.replace("really", "truly"), "utf-8")
    more = f'\n[[data]]\npath = "{tmp_path / "more.jsonl"}"\nmap = "oasst1"\n'
    text = (run / "recipe.toml").read_text("utf-8")
    (tmp_path / "run" / "recipe.toml").write_text(text.replace("\n[template]", f"{more}\n[template]", 1), "utf-8")
    (score,), table = said(str(tmp_path / "run"), {}, ["val.records=1"])
    assert (score.what, score.records) == ("rows.jsonl", 1)
    assert "more.jsonl: none of its records are among those that the run validated on" in table


def test_data_of_ones_own_and_answers_word_for_word(run: Path, tmp_path: Path):
    prompt = [{"role": "user", "content": "What is 3?"}]
    answer = "".join(Chatter(str(run), max_tokens=4, say=lambda line: None).answer(prompt)).strip()
    rows = [f"### Human: What is 3?### Assistant: {answer}", "### Human: What is 3?### Assistant: no"]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")
    data = {"data": str(tmp_path / "own.jsonl"), "plugin": "oasst1"}
    scores, text = said(str(run), data, generate=5, max_tokens=4, out=str(tmp_path / "out.jsonl"))
    assert [(score.what, score.records) for score in scores] == [("own.jsonl", 2)]
    assert "answers: 1 of 2 are the record's own, word for word" in text
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert written[0]["tuned"] == scores[0].tuned
    assert [line["exact"] for line in written[1:]] == [True, False]
    adapter, _ = said(str(run / "adapter"), data)
    assert adapter[0].tuned == pytest.approx(scores[0].tuned, rel=1e-6), "an adapter knows its template"
    with pytest.raises(UserError, match="no run, so --data"):
        said(str(run / "adapter"), {})
    with pytest.raises(DataError, match="no sample with a supervised token in 1 records"):
        (tmp_path / "own.jsonl").write_text('{"text": "### Human: only a question"}\n', "utf-8")
        said(str(run), data)


def test_multiple_choice_takes_the_letter_that_the_model_thinks_likeliest(run: Path, tmp_path: Path, tiny_model: Path):
    chatter = Chatter(str(tiny_model), say=lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=chatter.precision.compute_dtype).eval()
    questions = [f"What is {i}?" for i in range(8)]
    rows = []
    for question in questions:
        text = f"{question}\nA. one\nB. two\nC. three\nAnswer with the letter of the right choice."
        prompt = chatter.encoder.prompt((Message("user", text),)).tolist()
        ends = chatter.tokenizer.encode(list("ABC"))
        stop = list(chatter.encoder.stop_ids)[:1]
        losses = []
        for end in ends:
            ids = torch.tensor([[*prompt, *end, *stop]])
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
            at = range(len(prompt), ids.shape[1])
            losses.append(-sum(float(logits[i - 1, ids[0, i]]) for i in at))
        rows.append(
            {
                "question": question,
                "A": "one",
                "B": "two",
                "C": "three",
                "subject": "counting",
                "answer": "ABC"[losses.index(min(losses))],
            }
        )
    rows[0]["answer"] = "ABC"[("ABC".index(rows[0]["answer"]) + 1) % 3]
    path = tmp_path / "mc.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (score,), _ = said(str(tiny_model), {}, choices=str(path))
    assert (score.what, score.records, score.tuned, score.base) == ("counting", 8, 7 / 8, None)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q", "A": "a", "answer": "A"}, "expected question, A, B"),
        ({"question": 1, "A": "a", "B": "b", "answer": "A"}, "expected question, A, B"),
        ({"question": "q", "A": "a", "B": "b"}, "answer is None, expected a letter or a number below 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer is 2, expected a letter or a number below 2"),
    ],
)
def test_a_row_that_is_no_question_is_named_by_its_line(row: dict, words: str, tmp_path: Path, unloaded: None):
    path = tmp_path / "mc.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    with pytest.raises(DataError, match=f"mc.jsonl:1: .*{words}"):
        evaluate("model", {}, choices=str(path), say=lambda line: None)


def test_new_data_is_unpacked_aside_and_piped_in_is_never_what_the_run_read(run: Path, tmp_path: Path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "data").mkdir()
    (copy / "data" / "stdin.jsonl").write_text(ROWS, "utf-8")  # as of a run whose data were piped in
    row = '{"text": "### Human: What is 3?### Assistant: It is three."}\n'
    with monkeypatch.context() as patch, open(tmp_path / "new.jsonl", "w+b") as file:
        file.write(row.encode())
        file.seek(0)
        stdin = os.dup(0)
        os.dup2(file.fileno(), 0)
        patch.setattr("sys.stdin", file)
        try:
            scores, _ = said(str(copy), {"data": "-", "plugin": "oasst1"})
        finally:
            os.dup2(stdin, 0)
            os.close(stdin)
    assert [score.records for score in scores] == [1]
    assert (copy / "data" / "stdin.jsonl").read_text("utf-8") == ROWS
    (tmp_path / "new.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    said(str(run / "adapter"), {"data": str(tmp_path / "new.jsonl.gz"), "plugin": "oasst1"})
    assert not (run / "adapter" / "data").exists(), "a folder that is only read"


def test_choices_and_out_are_opened_before_the_model_is_loaded(tmp_path: Path, unloaded: None):
    with pytest.raises(UserError, match="--out .*: can't be written: no such file or directory"):
        evaluate("model", {}, out=str(tmp_path / "none" / "scores.jsonl"))
    with pytest.raises(UserError, match="none.jsonl"):
        evaluate("model", {}, choices=str(tmp_path / "none.jsonl"))
    (tmp_path / "old.jsonl").write_text("old", "utf-8")
    for name in ("old", "new"):
        with pytest.raises(LookupError, match="loaded"):
            evaluate("model", {}, out=str(tmp_path / f"{name}.jsonl"))
    assert [path.read_text("utf-8") for path in tmp_path.iterdir()] == ["old"], "nothing was scored yet"


def test_full_fine_tuning_of_a_base_in_16_bits_says_what_its_model_is_as_written(tmp_path: Path, tiny_model: Path):
    base, lines = tmp_path / "base", list[str]()
    shutil.copytree(tiny_model, base)
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    (tmp_path / "rows.jsonl").write_text(ROWS, "utf-8")
    flags = {"plugin": "oasst1", "template": "chatml", "model": str(base), "data": str(tmp_path / "rows.jsonl")}
    sets = [*SETS, "adapter.kind=none", "train.lr=1e-5", "train.precision=fp32", "val.share=0.5"]
    run = train_from(None, {**flags, "quantizer": "none", "out": str(tmp_path / "run")}, sets, say=lines.append)
    (line,) = [line for line in lines if line.startswith("model/: written in bfloat16")]
    written, trained = map(float, re.findall(r"[\d.]+(?= as written| in training)", line))
    before, *_, after = [row["val_loss"] for row in run.metrics if "val_loss" in row]
    (score,), _ = said(str(run.path), {})
    facts = json.loads((run.path / "run.json").read_text("utf-8"))["model"]
    assert facts["stored"] == "bfloat16" and facts["val_loss"] == pytest.approx(score.tuned, rel=1e-4)
    assert (written, trained) == (pytest.approx(facts["val_loss"], abs=1e-4), pytest.approx(after, abs=1e-4))
    assert abs(before - written) < 0.7 * abs(before - trained), "so small a rate is mostly rounded away"


def test_a_model_that_mixes_documents_is_scored_sample_by_sample(tmp_path: Path):
    folder = write_family(tmp_path / "m", next(family for family in REFUSED if family.kind == "falcon"))
    (tmp_path / "rows.jsonl").write_text(ROWS, "utf-8")
    data = {"data": str(tmp_path / "rows.jsonl"), "plugin": "oasst1", "template": "chatml"}
    (score,), text = said(str(folder), data, ["pack.max_length=128"])
    assert "loss: sample by sample" in text
    encoder = make_encoder(Registry.load().template("chatml"), Tokenizer.load(folder))
    model, nats = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    for line in ROWS.splitlines():
        question, answer = re.findall(r": (.*?)(?:###|$)", json.loads(line)["text"])
        made = encoder.encode([(Conversation((Message("user", question), Message("assistant", answer))), "")])
        ids = torch.from_numpy(made.tokens).long()
        with torch.no_grad():
            each = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        nats += [float(each[i - 1]) for begin, end in made.spans for i in range(begin, end)]
    assert score.tuned == pytest.approx(sum(nats) / len(nats), rel=1e-4)
