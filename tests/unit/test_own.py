"""Fields by name, functions of one's own, and a format that doesn't fit: what the start of a run says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from corefit.data.source import items_of
from corefit.errors import DataError, PluginError, RecipeError, UserError
from corefit.fields import Fields
from corefit.identity import identity
from corefit.own import imported_by, own_code, own_map_function
from corefit.prepare import Prepared, prepare, resolve
from corefit.recipe import load_recipe, parse_recipe, to_toml
from corefit.registry import Registry
from corefit.types import Conversation, Document, Drop, MapFunction, Message

REGISTRY = Registry.load()
ROWS = [{"q": f"question {i}", "ctx": "" if i % 2 else f"context {i}", "a": f"answer {i}"} for i in range(40)]
QA = (Message("user", "q"), Message("assistant", "a"))


def data(folder: Path, rows=ROWS, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def plan_of(tokenizer, path: Path | str, *sets: str, recipe: str | None = None, **flags: str) -> Prepared:
    flags = {"template": "chatml", "data": str(path), **flags} if path else {"template": "chatml", **flags}
    resolved, _, _ = resolve(recipe, flags, sets, REGISTRY, need_model=False)
    return prepare(resolved, REGISTRY, tokenizer=tokenizer, spool_to=None)


def items(plan: Prepared) -> list:
    return [item for item, _ in items_of(((s, r) for s in plan.sources for r in s.read()), "all")]


def refused(error, tokenizer, path, *sets: str, **more) -> str:
    with pytest.raises(error) as caught:
        plan_of(tokenizer, path, *sets, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------- [data.fields]

FIELDS = ("data.fields.user=['ctx', 'q']", "data.fields.assistant=a")
RECIPE = """
[[data]]
path = "rows.jsonl"

[data.fields]
user = ["ctx", "q"]
assistant = "a"
system_text = "Be brief."
join = " | "
"""


def test_a_function_of_a_module_without_a_file_is_one_too():
    assert own_code("builtins:dict") == ("builtins:dict", "no file")
    assert REGISTRY.provider("map function", "builtins:dict").version == "no file"


@pytest.mark.parametrize("changed", ["helper_a.py", "helper_b.py", "helper_c/deep.py"])
def test_what_the_code_of_a_map_function_imports_is_part_of_it(changed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helped.py").write_text(
        "from helper_a import words\n\ndef f(row):\n    import helper_c.deep\n", "utf-8"
    )
    (tmp_path / "helper_a.py").write_text(
        "import __main__, helper_b, json, numpy, nowhere_at_all\nwords = 1\n", "utf-8"
    )
    (tmp_path / "helper_b.py").write_text("import helper_a\n", "utf-8")
    (tmp_path / "helper_c").mkdir()
    (tmp_path / "helper_c" / "__init__.py").write_text("", "utf-8")
    (tmp_path / "helper_c" / "deep.py").write_text("", "utf-8")
    (tmp_path / "helper_c" / ".#deep.py").symlink_to("somebody@edits.it")
    names = {path.name for path in imported_by([tmp_path / "helped.py"])}
    assert names == {"helper_a.py", "helper_b.py", "__init__.py", "deep.py"}
    file = tmp_path / "helped.py"
    before = own_code(f"{file}:f")
    assert own_code(f"{file}:f") == before
    (tmp_path / changed).write_text((tmp_path / changed).read_text("utf-8") + "# more\n", "utf-8")
    assert own_code(f"{file}:f")[1] != before[1]


def test_what_another_distribution_installed_is_its_own_version_s_business(tmp_path, monkeypatch):
    elsewhere = tmp_path / "lib" / "site-packages"
    elsewhere.mkdir(parents=True)
    (elsewhere / "installed_there.py").write_text("", "utf-8")
    monkeypatch.syspath_prepend(elsewhere)
    (tmp_path / "m.py").write_text("import numpy, pytest, corefit, installed_there\n", "utf-8")
    assert imported_by([tmp_path / "m.py"]) == []
    assert any(path.name == "__init__.py" for path in imported_by([tmp_path / "m.py"], also={"pluggy", "pytest"}))


class TestFields:
    def test_a_field_without_a_name_is_no_field(self):
        function = Fields(user=("q", ""), assistant="a").map_function(name="x", summary="")
        (item,) = function.map({"q": "1 + 1?", "a": "2"})
        assert [message.content for message in item.messages] == ["1 + 1?", "2"]
        with pytest.raises(UserError, match="name user and assistant, or text alone"):
            Fields(user=("",), assistant="a")

    def test_a_text_is_no_history(self):
        with pytest.raises(UserError, match="^history: 'q' is named by another key too$"):
            Fields(user="q", assistant="a", history="q")

    def test_a_recipe_reads_its_own_format_without_python(self, tmp_path, tiny_tokenizer):
        data(tmp_path)
        (tmp_path / "mine.toml").write_text(RECIPE, "utf-8")
        plan = plan_of(tiny_tokenizer, "", recipe=str(tmp_path / "mine.toml"))
        first, second, *_ = items(plan)
        system = Message("system", "Be brief.")
        wanted = (system, Message("user", "context 0 | question 0"), Message("assistant", "answer 0"))
        assert first == Conversation(wanted)
        assert second.messages[1].content == "question 1"
        assert plan.sources[0].sources.fields == ("ctx", "q", "a")
        assert any("map function fields, reader jsonl" in line for line in plan.choices)

    def test_the_recipe_of_the_run_says_the_same_again(self, tmp_path, tiny_tokenizer):
        plan = plan_of(tiny_tokenizer, data(tmp_path), *FIELDS)
        again = parse_recipe(to_toml(plan.recipe), name="r", base=tmp_path)
        assert again == plan.recipe and again.data[0].map is None
        facts = identity(plan, "0" * 16)
        assert facts["data.0.fields.assistant"] == '"a"'
        assert identity(prepare(again, REGISTRY, tokenizer=tiny_tokenizer, spool_to=None), "0" * 16) == facts

    def test_a_field_that_no_record_has_is_refused_with_the_nearest(self, tmp_path, tiny_tokenizer):
        path = data(tmp_path)
        said = refused(DataError, tiny_tokenizer, path, "data.fields.user=['ctxt', 'q']", "data.fields.assistant=a")
        assert said == f"{path}:1: data.fields: no field 'ctxt'; did you mean 'ctx'? known: a, ctx, q"

    @pytest.mark.parametrize(
        ("lines", "words"),
        [
            ('uesr = "q"\nassistant = "a"', ":6: data.fields: no option 'uesr'; did you mean 'user'?"),
            ('user = "q"', ":6: data.fields: name user and assistant, or text alone"),
            ('user = "q"\nassistant = "a"\ntext = "q"', ":6: data.fields: name user and assistant, or text alone"),
            ('user = 3\nassistant = "a"', ":6: data.fields: user: found 3; expected text or a list of (text)"),
        ],
    )
    def test_what_a_table_may_say_is_strict_and_errors_name_the_line(self, tmp_path, tiny_tokenizer, lines, words):
        data(tmp_path)
        recipe = tmp_path / "r.toml"
        recipe.write_text(f'\n[[data]]\npath = "rows.jsonl"\n\n[data.fields]\n{lines}\n', "utf-8")
        assert f"{recipe}{words}" in refused(RecipeError, tiny_tokenizer, "", recipe=str(recipe))

    def test_map_and_fields_contradict_each_other_and_a_flag_wins_over_both(self, tmp_path, tiny_tokenizer):
        data(tmp_path)
        (tmp_path / "r.toml").write_text(RECIPE.replace("[data.fields]", 'map = "alpaca"\n[data.fields]'), "utf-8")
        with pytest.raises(RecipeError, match=r"r\.toml:\d+: data.fields says what data.map would say"):
            load_recipe(tmp_path / "r.toml")
        (tmp_path / "r.toml").write_text(RECIPE, "utf-8")
        recipe, _, _ = resolve(str(tmp_path / "r.toml"), {"plugin": "alpaca"}, (), REGISTRY, need_model=False)
        assert recipe.data[0].map == "alpaca" and recipe.data[0].fields == {}

    def test_text_alone_makes_documents(self, tmp_path, tiny_tokenizer):
        plan = plan_of(tiny_tokenizer, data(tmp_path, [{"body": " x "}, {"body": "y"}]), "data.fields.text=body")
        assert items(plan) == [Document("x"), Document("y")]


# ---------------------------------------------------------------------------------------------- a function of one's own

OWN = """
import functools; from corefit import Conversation, Document, Drop, Message

def to_chat(record):
    return Conversation((Message("user", record["q"]), Message("assistant", record["a"])))

def openai_style(record):
    record["q"] = record["q"].upper()  # its own copy
    return {"messages": [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record["a"]}]}

def xtuner_style(example):
    return {"conversation": [{"input": example["q"], "output": example["a"]}]}

def two(record):
    yield Document(record["q"])
    yield Document(record["a"])

def nothing(record):
    if record["q"] != "question 3":
        return Document(record["q"])

def never(record):
    return []

def fails(record):
    rows = [
        record["answer"],
    ]
    return rows

def odd(record):
    return {"question": 1}

def number(record):
    return 3

def weighed(record):
    return Conversation((Message("user", record["q"]), Message("assistant", record["a"], supervised=0)))

def noted(record):
    return Conversation((Message("user", record["q"]), Message("assistant", record["a"])), notes=(None,))

def with_options(record, options, more=1):  # as a plugin's
    assert options is None
    return to_chat(record)

def handed_on(function):
    @functools.wraps(function)
    def hand(*given):
        return function(*given)
    return hand

def added(function):
    @functools.wraps(function)
    def add(record):
        return function(record, None)
    return add

decorated, decorated_by_what_adds = handed_on(with_options), added(with_options)
"""


def test_a_plugin_s_fields_may_be_a_list(tmp_path, tiny_tokenizer):
    listed = replace(REGISTRY.map_functions["oasst1"], fields=["text"])
    entries = {**REGISTRY.entries, "map function": {**REGISTRY.map_functions, "oasst1": listed}}
    flags = {"template": "chatml", "data": str(data(tmp_path, [{"text": "### Human: a### Assistant: b"}]))}
    registry = replace(REGISTRY, entries=entries)
    recipe, _, _ = resolve(None, {**flags, "plugin": "oasst1"}, (), registry, need_model=False)
    plan = prepare(recipe, registry, tokenizer=tiny_tokenizer, spool_to=None)
    assert [item.messages for item in items(plan)] == [(Message("user", "a"), Message("assistant", "b"))]


WORDS = "to_chat with_options decorated decorated_by_what_adds openai_style xtuner_style".split()


class TestOwn:
    @pytest.fixture
    def own(self, tmp_path):
        (tmp_path / "my_format.py").write_text(OWN, "utf-8")
        return tmp_path / "my_format.py"

    @pytest.mark.parametrize(
        "word", [*"to_chat with_options decorated decorated_by_what_adds openai_style xtuner_style".split()]
    )
    def test_it_may_give_an_item_or_what_another_format_reads(self, tmp_path, tiny_tokenizer, own, word):
        path = data(tmp_path)
        found = items(plan_of(tiny_tokenizer, path, plugin=f"{own}:{word}"))
        question = "QUESTION 0" if word == "openai_style" else "question 0"
        assert found[0].messages == (Message("user", question), Message("assistant", "answer 0"))
        assert len(found) == 40

    def test_it_may_give_several_items_or_none(self, own):
        def given(word):
            function = own_map_function(f"{own}:{word}", REGISTRY.map_functions)
            return [function.map(row, None) for row in ROWS[2:4]]

        assert given("two")[0] == [Document("question 2"), Document("answer 2")]
        assert given("nothing") == [[Document("question 2")], [Drop("left_out")]]
        assert given("never") == [[Drop("nothing_given")]] * 2

    def test_what_it_does_to_a_record_it_does_to_a_copy(self, own):
        own.write_text("def f(record):\n    record['a'].pop()\n    return record.pop('item')\n", "utf-8")
        row = {"a": ["x"], "item": Document("d")}
        assert own_map_function(f"{own}:f", {}).map(row, None) == [Document("d")]
        assert row == {"a": ["x"], "item": Document("d")}

    def test_another_format_gets_its_options_and_one_that_fails_at_looking_is_none(self, own):
        def to_items(record, options):
            yield Document(options.threads + record["zq"])

        own.write_text("def f(record):\n    return {'zq': record['q']}\n", "utf-8")
        options = REGISTRY.map_functions["oasst1"].options
        fits = MapFunction(name="fits", summary="", map=to_items, sniff=lambda r: "zq" in r, options=options)
        fails = MapFunction(name="fails", summary="", map=to_items, sniff=lambda r: r["other"])
        function = own_map_function(f"{own}:f", {"fails": fails, "fits": fits})
        assert function.map({"q": " x"}, None) == [Document("best x")]

    def test_a_relative_name_is_found_from_where_it_is_written(self, tmp_path, tiny_tokenizer, own, monkeypatch):
        data(tmp_path)
        (tmp_path / "r.toml").write_text('[[data]]\npath = "rows.jsonl"\nmap = "my_format.py:to_chat"\n', "utf-8")
        assert load_recipe(tmp_path / "r.toml").data[0].map == f"{own}:to_chat"
        assert len(items(plan_of(tiny_tokenizer, "", recipe=str(tmp_path / "r.toml")))) == 40
        monkeypatch.chdir(tmp_path)
        recipe, name, _ = resolve(
            None, {"plugin": "my_format.py:to_chat", "data": "rows.jsonl"}, (), REGISTRY, need_model=False
        )
        assert recipe.data[0].map == f"{own}:to_chat" and name == "to_chat"

    def test_a_module_that_can_be_imported(self, tmp_path, tiny_tokenizer, own, monkeypatch):
        monkeypatch.syspath_prepend(str(tmp_path))
        plan = plan_of(tiny_tokenizer, data(tmp_path), plugin="my_format:to_chat")
        assert len(items(plan)) == 40
        assert identity(plan, "0" * 16)["code of map function my_format:to_chat"] == own_code(f"{own}:to_chat")[1]

    @pytest.mark.parametrize(
        ("word", "words"),
        [
            ("fails", "failed: KeyError: 'answer' (line 27); keys of the record: q, ctx, a"),
            ("odd", "failed: TypeError: gave an object with question; expected messages (or XTuner's conversation)"),
            ("number", "failed: TypeError: gave a int; expected Conversation, Document, Drop, None or an object"),
            ("weighed", "failed: TypeError: gave supervised=0, expected True, False or None; keys of the record: q"),
            ("noted", "failed: TypeError: gave a Conversation with a NoneType where text is expected"),
        ],
    )
    def test_what_goes_wrong_in_it_names_record_file_and_line(self, tmp_path, tiny_tokenizer, own, word, words):
        path = data(tmp_path)
        said = refused(DataError, tiny_tokenizer, path, plugin=f"{own}:{word}")
        assert said.startswith(f"{path}:1: map function '{own}:{word}' {words}")

    @pytest.mark.parametrize(
        ("code", "name", "words"),
        [
            (OWN, "my_format.py:to_caht", "my_format.py: no function 'to_caht'; did you mean 'to_chat'?"),
            ("x = 1\ny = = 2\n", "my_format.py:f", "my_format.py:2: importing it raised SyntaxError: invalid syntax"),
            ("\nimport nowhere_to_be\n", "my_format.py:f", "my_format.py:2: importing it raised ModuleNotFoundError"),
            ("raise SystemExit(3)\n", "my_format.py:f", "my_format.py:1: importing it raised SystemExit: 3"),
            ("import beside\n", "my_format.py:f", "the file is run by itself, without its folder: PYTHONPATH=/"),
            ("async def f(row): ...\n", "my_format.py:f", "my_format.py: f is async; expected a plain function"),
            (OWN, "my_format.py", "my_format.py: a file of your own is named with its function, my_format.py:FUNCTION"),
            (OWN, "other.py:f", "other.py: no such file or directory; --plugin FILE.py:FUNCTION names a file"),
            (OWN, "nowhere_to_be:f", "nowhere_to_be: importing it raised ModuleNotFoundError"),
            (OWN, "nowhere_to_be:f", "; a file of your own is nowhere_to_be.py:f"),
        ],
    )
    def test_what_can_t_be_loaded_is_one_line_that_names_the_file(
        self, tmp_path, tiny_tokenizer, monkeypatch, code, name, words
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "my_format.py").write_text(code, "utf-8")
        (tmp_path / "beside.py").write_text("", "utf-8")
        monkeypatch.setattr("sys.path", [path for path in sys.path if path])  # as that of the installed command is
        assert words in refused(PluginError, tiny_tokenizer, data(tmp_path), plugin=name)

    def test_its_code_is_part_of_what_a_run_is_and_its_folder_is_not(self, tmp_path, tiny_tokenizer, own):
        path = data(tmp_path)
        facts = identity(plan_of(tiny_tokenizer, path, plugin=f"{own}:to_chat"), "0" * 16)
        assert facts["data.0.map"] == "my_format.py:to_chat"
        (tmp_path / "moved").mkdir()
        moved = tmp_path / "moved" / "my_format.py"
        moved.write_text(OWN, "utf-8")
        assert identity(plan_of(tiny_tokenizer, path, plugin=f"{moved}:to_chat"), "0" * 16) == facts
        moved.write_text(OWN + "\n", "utf-8")
        changed = identity(plan_of(tiny_tokenizer, path, plugin=f"{moved}:to_chat"), "0" * 16)
        assert {key for key in facts if facts[key] != changed[key]} == {"code of map function my_format.py:to_chat"}


# ----------------------------------------------------------------------------------------------- the format doesn't fit

ALPACA = [{"instruction": f"do {i}", "input": "", "output": "done"} for i in range(3)]
SHAREGPT = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}] * 3
LAWYER = [{"question": "q", "answer": "a"}] * 3


class TestWrongFormat:
    @pytest.mark.parametrize(
        ("plugin", "rows", "reason", "keys", "fits"),
        [
            ("alpaca", SHAREGPT, "missing_field", "conversations", "sharegpt fits"),
            ("openai", ALPACA, "not_a_list", "input, instruction, output", "alpaca fits"),
            ("oasst1", ALPACA, "not_oasst1", "input, instruction, output", "alpaca fits"),
            ("conversation", SHAREGPT, "not_a_list", "conversations", "sharegpt fits"),
            (
                "alpaca",
                LAWYER,
                "missing_field",
                "answer, question",
                "data.fields.user=question data.fields.assistant=answer",
            ),
            (
                "alpaca",
                [{"x": 1}],
                "missing_field",
                "x",
                "[data.fields] says which field is what (--set data.fields.user=KEY",
            ),
        ],
    )
    def test_it_fails_on_the_first_record_with_its_keys_and_what_fits(
        self, tmp_path, tiny_tokenizer, plugin, rows, reason, keys, fits
    ):
        path = data(tmp_path, rows)
        said = refused(DataError, tiny_tokenizer, path, plugin=plugin)
        start = f"{path}:1: map function {plugin!r} makes nothing of the first {len(rows)} records ({reason}); "
        assert said.startswith(start) and f"keys there: {keys}; " in said and fits in said

    def test_an_unnamed_format_that_nobody_recognises_says_what_could_read_it(self, tmp_path, tiny_tokenizer):
        said = refused(DataError, tiny_tokenizer, data(tmp_path, LAWYER))
        assert "no installed plugin knows this format (keys: answer, question)" in said
        # not law_reference, which would put its lawyer's system message before every question
        assert "known" not in said.partition("recognise: ")[2] and "law_reference" not in said
        assert (
            "[data.fields] says which field is what (--set data.fields.user=question data.fields.assistant=ans" in said
        )

    def test_a_format_that_fits_with_rows_that_are_no_use_is_not_the_wrong_one(self, tmp_path, tiny_tokenizer):
        path = data(tmp_path, [{**ALPACA[0], "output": ""}] * 3 + ALPACA)
        assert len(items(plan_of(tiny_tokenizer, path, plugin="alpaca"))) == 3
        plan_of(tiny_tokenizer, data(tmp_path, [{**ALPACA[0], "output": ""}] * 40), plugin="alpaca")

    def test_one_good_row_among_the_first_is_enough(self, tmp_path, tiny_tokenizer):
        assert len(items(plan_of(tiny_tokenizer, data(tmp_path, [{"x": 1}, *ALPACA]), plugin="alpaca"))) == 3

    def test_records_that_look_like_another_format_are_said_to(self, tmp_path, tiny_tokenizer):
        """``default`` reads input and output, and would lose the instruction."""

        def noticed(plugin):
            plan = plan_of(tiny_tokenizer, data(tmp_path, [{**row, "input": "x"} for row in ALPACA]), plugin=plugin)
            return [line for line in plan.choices if "look like" in line]

        assert noticed("default") == ["data: the records look like alpaca, but default was named"]
        assert noticed("alpaca") == noticed("medical") == []
