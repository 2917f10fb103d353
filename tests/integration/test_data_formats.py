"""Other people's files through whole runs: a function of one's own, fields in the recipe, tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from cli import corefit

from corefit.errors import DataError, RecipeError
from corefit.prepare import prepare, resolve
from corefit.recipe import load_recipe
from corefit.registry import Registry
from corefit.run import train_from
from corefit.samples import inspect

ROWS = [{"question": f"What is {i}?", "answer": f"It is number {i}, " + "really " * (i % 5) + "so."} for i in range(30)]
SETS = [
    *("pack.max_length=64", "train.packs_per_step=2", "sample.max_tokens=4", "adapter.r=4", "train.max_steps=2"),
    *("run.threads=1", "run.device=cpu", "checkpoint.every_steps=1", "val.records=0"),
]
OWN = """
def to_chat(row):
    return {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
"""


def write_csv(path: Path) -> Path:
    path.write_text("question,answer\n" + "".join(f'"{row["question"]}","{row["answer"]}"\n' for row in ROWS), "utf-8")
    return path


def train(tmp_path: Path, model: Path, *sets: str, **more):
    flags = {
        "template": "chatml",
        "model": str(model),
        "data": str(tmp_path / "rows.csv"),
        "out": str(tmp_path / "run"),
    }
    resume = more.pop("resume", False)
    flags = {} if resume else flags | more
    return train_from(None, flags, [] if resume else [*SETS, *sets], resume=resume, say=lambda line: None)


def test_a_run_keeps_a_copy_of_the_function_and_goes_on_only_with_the_same(tmp_path, tiny_model):
    write_csv(tmp_path / "rows.csv")
    own = tmp_path / "my_format.py"
    own.write_text(OWN, "utf-8")
    run = train(tmp_path, tiny_model, plugin=f"{own}:to_chat")
    assert (run.path / "my_format.py").read_text("utf-8") == OWN
    facts = json.loads((run.path / "run.json").read_text("utf-8"))
    assert facts["plugins"]["map function"][f"{own}:to_chat"]["distribution"] == "own code"
    assert run.ledger["balanced"] and run.ledger["records"]["read"] >= 30
    (tmp_path / "more.toml").write_text((run.path / "recipe.toml").read_text("utf-8"), "utf-8")
    own.write_text(OWN + "# changed\n", "utf-8")
    with pytest.raises(RecipeError, match=r"made with something else: code of map function my_format.py:to_chat: "):
        train(tmp_path, tiny_model, resume=str(run.path))
    own.write_text(OWN, "utf-8")
    assert train(tmp_path, tiny_model, resume=str(run.path)).path == run.path


def test_a_run_from_fields_says_them_in_its_recipe(tmp_path, tiny_model):
    write_csv(tmp_path / "rows.csv")
    run = train(tmp_path, tiny_model, "data.fields.user=question", "data.fields.assistant=answer")
    [data] = load_recipe(run.path / "recipe.toml").data
    assert (dict(data.fields), data.map, data.reader) == ({"user": "question", "assistant": "answer"}, None, "csv")
    assert train(tmp_path, tiny_model, resume=str(run.path)).path == run.path


def test_the_same_rows_from_every_kind_of_file_are_the_same_samples(tmp_path, tiny_tokenizer):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    write_csv(tmp_path / "rows.csv")
    (tmp_path / "rows.tsv").write_text(
        (tmp_path / "rows.csv")
        .read_text("utf-8")
        .replace('","', '"\t"')
        .replace("question,answer", "question\tanswer"),
        "utf-8",
    )
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), "utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    fields = ("data.fields.user=question", "data.fields.assistant=answer")
    found = {}
    for suffix in ("json", "csv", "tsv", "parquet"):
        given = inspect(tokenizer=tiny_tokenizer, data=str(tmp_path / f"rows.{suffix}"), template="chatml", sets=fields)
        found[suffix] = [(sample["input_ids"], sample["labels"]) for sample in given]
    assert len(found["json"]) == 30
    assert found["csv"] == found["tsv"] == found["parquet"] == found["json"]


def test_a_folder_of_tables_trains_and_validates_by_the_names_of_its_files(tmp_path, tiny_tokenizer):
    write_csv(tmp_path / "my_train.csv")
    write_csv(tmp_path / "my_eval.csv")
    sets = ("data.fields.user=question", "data.fields.assistant=answer")
    assert len(list(inspect(tokenizer=tiny_tokenizer, data=str(tmp_path), template="chatml", sets=sets))) == 30


def test_the_command_line_says_what_fits_in_one_line_and_exits_2(tmp_path, tiny_tokenizer):
    rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    flags = ("--data", "rows.jsonl", "--tokenizer", tiny_tokenizer, "--template", "chatml")
    done = corefit("inspect", "--plugin", "alpaca", *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "rows.jsonl:1: map function 'alpaca' makes nothing of the first 3 records" in done.stderr
    assert "keys there: conversations; --plugin sharegpt fits" in done.stderr
    assert corefit("inspect", "--plugin", "sharegpt", *flags, cwd=tmp_path).returncode == 0


def test_a_format_is_recognised_with_the_options_of_the_reader(tmp_path, tiny_tokenizer):
    (tmp_path / "rows.csv").write_text("instruction;input;output\nAdd.;1, 1;2\nAdd.;2, 2;4\n", "utf-8")
    given = inspect(
        tokenizer=tiny_tokenizer,
        data=str(tmp_path / "rows.csv"),
        template="chatml",
        sets=("data.options.delimiter=;",),
    )
    assert len(list(given)) == 2


def test_a_table_without_rows_is_said_to_have_none(tmp_path, tiny_tokenizer):
    (tmp_path / "rows.csv").write_text("question,answer\n", "utf-8")
    with pytest.raises(DataError, match=r"rows\.csv: no records in it$"):
        list(inspect(tokenizer=tiny_tokenizer, data=str(tmp_path / "rows.csv"), template="chatml"))


def test_validation_data_is_read_once_and_whole_whatever_else_is_said_of_the_training_data(tmp_path, tiny_tokenizer):
    for name in ("a/train.jsonl", "a/val.jsonl", "b.jsonl", "mine.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"instruction": "q", "input": "", "output": "a"}\n' * 3, "utf-8")
    recipe = '[[data]]\npath = "a"\nfirst = 2\n[[data]]\npath = "b.jsonl"\nrepeat = 2\n[val]\ndata = "mine.jsonl"\n'
    (tmp_path / "recipe.toml").write_text(recipe, "utf-8")
    registry = Registry.load()
    resolved, *_ = resolve(str(tmp_path / "recipe.toml"), {"template": "chatml"}, [], registry, need_model=False)
    plan = prepare(resolved, registry, tokenizer=tiny_tokenizer, spool_to=None)
    places = [record.origin for one in plan.val_sources for record in one.read()]
    assert places == [f"{tmp_path / 'mine.jsonl'}:{line}" for line in (1, 2, 3)]
    with pytest.raises(RecipeError, match=r"^val\.data: standard input is no file"):
        prepare(
            dataclasses.replace(resolved, val=dataclasses.replace(resolved.val, data="-")),
            registry,
            tokenizer=tiny_tokenizer,
            spool_to=tmp_path / "spooled",
        )
