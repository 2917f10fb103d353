from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fake_plugins import write_plugin

from corefit import BadRecord, Conversation, Drop, Record, Sources
from corefit.errors import RecipeError
from corefit.prepare import resolve
from corefit.registry import KINDS, Registry

HERE = Path(__file__).resolve().parents[1] / "plugin_example"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """The registry as it is once the example is installed (its module straight from the source folder)."""
    write_plugin(tmp_path, "corefit-example", version="0.1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(HERE))
    yield Registry.load()
    sys.modules.pop("corefit_example", None)


def test_it_contributes_one_of_each_kind(registry):
    (plugin,) = [plugin for plugin in registry.plugins if plugin.name == "example"]
    assert plugin.error is None
    assert plugin.entries == {kind: ("example",) for kind in KINDS}


def test_its_reader_reads_and_seeks(registry, tmp_path):
    one, two = tmp_path / "1.tsv", tmp_path / "2.tsv"
    one.write_bytes("été?\tja\r\n\nno tab\n\xff".encode("latin-1").replace(b"\xe9", "é".encode()) + b"\tx\n")
    two.write_bytes(b"a" * 50 + b"\tlong\nq\ta")
    sources = Sources((one, two), max_record_bytes=40)
    reader = registry.reader("example")
    found = list(reader.read(sources, None))
    assert [type(record) for record in found] == [Record, BadRecord, BadRecord, BadRecord, Record]
    assert dict(found[0]) == {"question": "été?", "answer": "ja"} and dict(found[-1]) == {
        "question": "q",
        "answer": "a",
    }
    assert [(record.file, record.line) for record in found] == [(0, 1), (0, 3), (0, 4), (1, 1), (1, 2)]
    assert [str(record).split(": ", 1)[1] for record in found[1:4]] == [
        "no tab; expected question, tab, answer",
        "byte 1 is not UTF-8",
        "56 bytes; at most 40 are read",
    ]
    assert sum(record.size for record in found) == one.stat().st_size + two.stat().st_size - 1  # the empty line
    again = next(reader.read(sources, None, start=found[-1].position))
    assert (again.line, again.offset, dict(again)) == (2, 56, dict(found[-1]))
    again = list(reader.read(sources, None, start=found[0].position))
    assert [str(record) for record in again] == [str(record) for record in found]


def test_its_map_function(registry):
    example = registry.map_function("example")

    def items(fields, **options):
        return list(example.map(Record(fields, path="f", line=1, offset=0), example.options(**options)))

    (item,) = items({"question": "q", "answer": "a"}, shout=True)
    assert isinstance(item, Conversation) and [message.content for message in item.messages] == ["q", "A"]
    assert items({"question": "q", "answer": " "}) == [Drop("empty_answer")]
    assert items({"question": 3}) == [Drop("no_question_or_answer")]


def test_its_quantizer_and_scheduler(registry):
    assert registry.quantizer("example").config("float32").bnb_4bit_quant_type == "fp4"
    factor = registry.scheduler("example").factor
    assert factor(0.5, 0.0) == 0.75 and factor(0.05, 0.1) == 0.5 and 0 < factor(1 - 2**-53, 1.0) < 1e-10


def test_its_recipe_reader(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.example").write_text("model = .\nrate = 1e-4\ncolour = red\n", "utf-8")
    flags = {"data": "rows.tsv", "plugin": "example"}
    recipe, name, lines = resolve("run.example", {**flags, "cfg-options": "steps=7"}, [], registry)
    assert (recipe.model.base, recipe.train.lr, recipe.train.max_steps, name) == (str(tmp_path), 1e-4, 7, "run")
    assert recipe.where("train.lr") == "run.example:2" and recipe.where("train.max_steps") == "--cfg-options steps=7"
    assert lines == [
        f"{tmp_path} on {tmp_path / 'rows.tsv'}",
        "run.example:3: colour: left out: no counterpart in corefit",
    ]  # noqa: E501
    with pytest.raises(RecipeError, match="^run.example:2: train.lr: found -1.0; expected a number > 0$"):
        (tmp_path / "run.example").write_text("model = .\nrate = -1\n", "utf-8")
        resolve("run.example", flags, [], registry)
