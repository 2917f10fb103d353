from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from corefit import recipe as module
from corefit.errors import PluginError, RecipeError
from corefit.recipe import (
    SECTIONS,
    Data,
    Recipe,
    apply_overrides,
    imported_recipe,
    load_recipe,
    option_keys,
    options_from,
    parse_recipe,
    to_toml,
)
from corefit.types import ImportedRecipe


def parse(text: str, base: Path = Path("/base")) -> Recipe:
    return parse_recipe(text, name="my.toml", base=base)


def refusals(ask, *args, **kwargs) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        ask(*args, **kwargs)
    return str(caught.value).split("\n")


def test_nothing_gives_the_defaults_of_the_recipe_page():
    recipe = parse("")
    assert recipe == Recipe()
    assert (recipe.model.base, recipe.model.quantizer) == (None, "nf4")
    assert (recipe.adapter.kind, recipe.adapter.r, recipe.adapter.alpha, recipe.adapter.dropout) == (
        "lora",
        64,
        16,
        0.1,
    )
    assert recipe.data == (Data(),) and recipe.data[0].map is None and recipe.data[0].max_record_mb == 64
    assert (recipe.pack.max_length, recipe.pack.algorithm, recipe.pack.overlong) == (
        2048,
        "first_fit_decreasing",
        "truncate",
    )
    assert (recipe.train.epochs, recipe.train.packs_per_step, recipe.train.micro_batch) == (3, 16, 1)
    assert (recipe.train.lr, recipe.train.warmup, recipe.train.clip) == (2e-4, 0.03, 1.0)
    assert recipe.train.betas == (0.9, 0.999)
    assert (recipe.val.share, recipe.val.records, recipe.sample.max_tokens, recipe.checkpoint.keep) == (
        0.05,
        200,
        64,
        2,
    )
    assert recipe.where("train.lr") == "default"


def test_sections_and_keys_are_those_of_the_recipe_page():
    keys = {title: " ".join(item.name for item in dataclasses.fields(cls)) for title, cls in SECTIONS.items()}
    assert keys == {
        "model": "base quantizer add_tokens trust_remote_code",
        "adapter": "kind r alpha dropout targets modules_to_save dora rslora start",
        "data": "path map fields reader shuffle ratio repeat first on_bad max_record_mb options",
        "template": "name supervise min_supervised options",
        "pack": "max_length algorithm held overlong arena",
        "train": "epochs max_steps packs_per_step micro_batch precision lr lr_mult scheduler warmup optimizer "
        "weight_decay betas clip gradient_checkpointing offload_activations seed",
        "val": "data share records every_steps patience",
        "sample": "prompts every_steps max_tokens",
        "checkpoint": "every_steps every_minutes keep keep_best",
        "run": "out threads device sharding reporters options",
    }
    assert [item.name for item in dataclasses.fields(Recipe)] == [*SECTIONS, "origins"]


def test_every_field_has_a_docstring():
    tree = ast.parse(inspect.getsource(module))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in {
        cls.__name__ for cls in SECTIONS.values()
    }]  # fmt: skip
    assert len(classes) == len(SECTIONS)
    for cls in classes:
        for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), ast.unparse(node)


def test_values_are_converted():
    recipe = parse(
        """
        [train]
        lr = 1
        betas = [0, 0.5]
        gradient_checkpointing = true
        [[data]]
        path = ["a", "b/*.jsonl", "-", "/c"]
        options = { nested = { x = [1] } }
        [[data]]
        map = "oasst1"
        [adapter]
        targets = ["q_proj"]
        """
    )
    assert type(recipe.train.lr) is float and recipe.train.betas == (0.0, 0.5)
    assert recipe.train.gradient_checkpointing is True
    assert recipe.data[0].path == ("/base/a", "/base/b/*.jsonl", "-", "/c")
    assert recipe.data[0].options == {"nested": {"x": [1]}}
    assert recipe.data[1].map == "oasst1" and recipe.adapter.targets == ("q_proj",)


def test_origins_name_file_and_line():
    recipe = parse("[train]\n\nlr = 1\n[[data]]\nmap = 'a'\n[[data]]\n\nmap = 'b'\n[data.options]\nx = 1\n")
    assert recipe.where("train.lr") == "my.toml:3"
    assert recipe.where("data.0.map") == "my.toml:5" and recipe.where("data.1.map") == "my.toml:8"
    assert recipe.where("data.1.options.x") == "my.toml:10"
    assert recipe.where("train.seed") == recipe.where("data.0.options.x") == "default"


def test_all_problems_are_reported_together_with_their_lines():
    text = '''# a comment
seed = 3
[train]
lrr = 1
lr = """
[not.a.table]
"""
betas = [
  1, # ]
  2]
epochs = true
[[data]]
pth = 'x'
[[data]]
'shuffle' = "yes"
[data.options]
[modle]
[pack]
overlong = "trunkate"
max_length = 4
'''
    lines = refusals(parse, text)
    assert [line.split(" ", 1)[0] for line in lines] == [
        f"my.toml:{n}:" for n in (2, 4, 5, 8, 11, 13, 15, 17, 19, 20)
    ], lines
    assert "no section 'seed'" in lines[0] and "'seed' is a key of [train]" in lines[0]
    assert "no [train] key 'lrr'; did you mean 'lr'? known: betas, clip," in lines[1]
    assert lines[2].endswith('train.lr: found "[not.a.table]\\n"; expected a number > 0')
    assert lines[3].endswith("train.betas: found [1, 2]; expected a list of 2 of (a number >= 0 and < 1)")
    assert lines[4].endswith("train.epochs: found true; expected a whole number >= 0")
    assert "no [data] key 'pth'; did you mean 'path'?" in lines[5]
    assert lines[6].endswith('data.shuffle: found "yes"; expected true or false')
    assert "no section 'modle'; did you mean 'model'?" in lines[7]
    assert "pack.overlong: no choice 'trunkate'; did you mean 'truncate'?" in lines[8]
    assert lines[9].endswith("pack.max_length: found 4; expected a whole number >= 8 and <= 2**24")


def test_a_key_of_another_section_is_pointed_out():
    (line,) = refusals(parse, "[model]\nlr = 1\n")
    assert line.startswith("my.toml:2: no [model] key 'lr';") and line.endswith("; 'lr' is a key of [train]")


@pytest.mark.parametrize(
    "text",
    [
        "train.lr = 0",
        "train.lr = nan",
        "train.lr = inf",
        "train.lr = true",
        'train.lr = "1"',
        f"train.lr = 1{'0' * 400}",
        "train.seed = -1",
        "train.seed = 1.0",
        "train.warmup = 1.1",
        "train.betas = [0.9]",
        "train.gradient_checkpointing = 'yes'",
        "train.gradient_checkpointing = 1",
        "train.gradient_checkpointing = 0.0",
        "val.share = 1",
        "val.every_steps = 0",
        "adapter.dropout = 1.0",
        "adapter.targets = 'q_proj'",
        "adapter.targets = ['']",
        "model.base = ''",
        "model.base = ['a']",
        "run.threads = 0",
        "run.threads = 1025",
        "adapter.r = 65537",
        "run.device = 2020-01-01",
        "template.options = 3",
    ],
)
def test_out_of_range_or_of_another_type(text):
    (line,) = refusals(parse, text)
    key = text.split(" ", 1)[0]
    assert line.startswith(f"my.toml:1: {key}: found ") and "; expected " in line and len(line) < 250


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data = 3", "my.toml:1: data is a list of tables; write [[data]]"),
        ("data = []", "my.toml:1: data is a list of tables; write [[data]]"),
        ("\n[data]\nmap = 'x'", "my.toml:2: data is a list of tables; write [[data]]"),
        ("data = [3]", "my.toml:1: data is a list of tables; write [[data]]"),
        ("train = 3", "my.toml:1: train is a value; write a table, [train]"),
        ("\n\n[[train]]\nlr = 1", "my.toml:3: train is a list; write a table, [train]"),
        (f"[pack]\nheld = {2**63}", "expected a whole number >= 1 (and < 2^63)"),
        ("[train]\nlr 1", "my.toml:2:4: not TOML: Expected '=' after a key in a key/value pair"),
        ("[train]\nlr = 1\nlr = 2", "my.toml:3: not TOML: Cannot overwrite a value"),
        ("[train]\nlr = 'a", "not TOML: "),
        ("a = " + "[" * 5000, "my.toml:1: not TOML: "),
        ("a = 1" + "0" * 5000, "my.toml:1: not TOML: "),
    ],
)
def test_what_is_no_recipe(text, words):
    (line,) = refusals(parse, text)
    assert words in line and line.startswith("my.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[train]\nmicro_batch = 3",
            "my.toml:2: train.packs_per_step=16 is no multiple of train.micro_batch=3",
        ),
        ("[train]\nlr_mult = {'(' = 2.0}", "my.toml:2: train.lr_mult: '(' is no regular expression: missing ), "),
        ("[train]\nlr_mult = {b = -1}", "my.toml:2: train.lr_mult: 'b' is -1, expected a number > 0"),
        ("[train]\nepochs = 0", "my.toml:2: train.epochs=0 has no end; set train.max_steps"),
        ("[adapter]\nkind = 'none'", "my.toml:2: adapter.kind='none' trains the base weights, but quantizer 'nf4'"),
        (
            "[model]\nquantizer = 'int8'\n[run]\nsharding = 'full'",
            "my.toml:4: run.sharding='full' can't divide int8 weights; set model.quantizer='nf4' or 'none'",
        ),
        (
            "[model]\nquantizer = 'none'\n[adapter]\nkind = 'none'\n[train]\noptimizer = 'adamw_8bit'\n"
            "[run]\nsharding = 'full'",
            "my.toml:8: run.sharding='full' with adapter.kind='none' needs train.optimizer='adamw'",
        ),
    ],
)
def test_contradictions(text, words):
    (line,) = refusals(parse, text)
    assert line.startswith(words)


def test_a_reader_of_other_files_that_gives_none_is_told_so_at_the_line():
    tables = {"model": {"base": None}, "data": [{"map": None}], "train": {"lr": 1e-4}}
    found = ImportedRecipe(tables=tables, lines={"model.base": "x.cfg:7"})
    assert refusals(imported_recipe, found, name="x.cfg", base=Path()) == [
        "x.cfg:1: data.map: found None; expected text that is not empty",
        "x.cfg:7: model.base: found None; expected text that is not empty",
    ]


def test_contradictions_are_looked_for_after_all_flags():
    recipe = apply_overrides(Recipe(), {}, ["train.micro_batch=5", "train.packs_per_step=10"])
    assert (recipe.train.micro_batch, recipe.train.packs_per_step) == (5, 10)
    recipe = apply_overrides(recipe, {"quantizer": "none"}, ["adapter.kind=none"])
    assert recipe.adapter.kind == "none"
    assert refusals(apply_overrides, recipe, {}, ["train.epochs=0"]) == [
        "--set train.epochs=0: train.epochs=0 has no end; set train.max_steps"
    ]


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "model").mkdir()
    file = tmp_path / "r.toml"
    file.write_text(
        "[model]\nbase = 'model'\n[[data]]\npath = '../a.jsonl'\n[val]\ndata = ['v']\n[run]\nout = 'o'\n",
        encoding="utf-8",
    )
    recipe = load_recipe(file)
    assert recipe.model.base == str(tmp_path / "model")
    assert recipe.data[0].path == str(tmp_path.parent / "a.jsonl")
    assert recipe.val.data == (str(tmp_path / "v"),) and recipe.run.out == str(tmp_path / "o")


def test_a_base_that_is_no_folder_is_a_hub_name(tmp_path):
    assert parse("model.base = 'org/name'", tmp_path).model.base == "org/name"
    assert parse("model.base = './org'", tmp_path).model.base == str(tmp_path / "org")
    assert parse("model.base = '/org/name'", tmp_path).model.base == "/org/name"
    assert parse("model.base = '~/m'", tmp_path).model.base == os.path.expanduser("~/m")


def test_a_folder_with_brackets_is_not_a_pattern(tmp_path):
    recipe = parse("[[data]]\npath = ['a.jsonl', '*.jsonl']", tmp_path / "[x]")
    assert recipe.data[0].path == (str(tmp_path / "[x]/a.jsonl"), str(tmp_path / "[[]x]/*.jsonl"))
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]" / "d[2].jsonl").touch()  # nor is a file
    assert parse("[[data]]\npath = 'd[2].jsonl'", tmp_path / "[x]").data[0].path == str(tmp_path / "[x]/d[2].jsonl")


def test_a_byte_order_mark_and_windows_lines(tmp_path):
    file = tmp_path / "r.toml"
    file.write_bytes(b"\xef\xbb\xbf[train]\r\nseed = 7\r\nlrr = 1\r\n")
    (line,) = refusals(load_recipe, file)
    assert line.startswith(f"{file}:3: no [train] key 'lrr'")


def test_a_file_that_cannot_be_read(tmp_path):
    assert "can't be read" in refusals(load_recipe, tmp_path / "none.toml")[0]
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    assert "can't be read as UTF-8" in refusals(load_recipe, tmp_path / "latin.toml")[0]


# ------------------------------------------------------------------------------------------------------ flags


def test_flags_win_over_the_recipe_and_sets_over_flags(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = parse("[train]\nseed = 1\nlr = 0.1\n[[data]]\nmap = 'a'\nreader = 'b'\n")
    flags = {"plugin": "oasst1", "template": "chatml", "model": "org/m", "data": "x.jsonl", "quantizer": "int8"}
    flags |= {"scheduler": "wsd", "out": "o", "seed": "2"}
    new = apply_overrides(recipe, flags, ["train.seed=3", "pack.max_length = 512", "train.lr=1e-3", "train.lr=1e-4"])
    assert (new.data[0].map, new.data[0].reader, new.data[0].path) == ("oasst1", None, str(tmp_path / "x.jsonl"))
    assert (new.template.name, new.model.base, new.model.quantizer) == ("chatml", "org/m", "int8")
    assert (new.train.scheduler, new.train.seed, new.train.lr) == ("wsd", 3, 1e-4)
    assert (new.run.out, new.pack.max_length) == (str(tmp_path / "o"), 512)
    assert (new.where("data.0.map"), new.where("train.seed")) == ("--plugin oasst1", "--set train.seed=3")
    assert recipe.train.seed == 1 and recipe.where("train.seed") == "my.toml:2"


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("train.precision=bf16", "train.precision", "bf16"),
        ('train.precision="bf16"', "train.precision", "bf16"),
        ("train.betas=[0.5, 0.6]", "train.betas", (0.5, 0.6)),
        ("train.max_steps=20", "train.max_steps", 20),
        ("train.gradient_checkpointing=false", "train.gradient_checkpointing", False),
        ("train.gradient_checkpointing=auto", "train.gradient_checkpointing", "auto"),
        ("train.gradient_checkpointing=0.5", "train.gradient_checkpointing", 0.5),
        ("train.offload_activations=true", "train.offload_activations", True),
        ("model.quantizer=none", "model.quantizer", "none"),
        ("template.name=123", "template.name", "123"),
        ("template.name=2024-01-01", "template.name", "2024-01-01"),
        ("template.name=a=b", "template.name", "a=b"),
        ('sample.prompts=["Hi \\"you\\"", "你好"]', "sample.prompts", ('Hi "you"', "你好")),
    ],
)
def test_set_takes_toml_and_bare_words(argument, key, value):
    recipe = apply_overrides(Recipe(), {}, [argument])
    title, name = key.split(".")
    found = getattr(getattr(recipe, title), name)
    assert found == value and type(found) is type(value)


def test_set_of_nothing_is_the_default():
    recipe = parse("[train]\nmax_steps = 3\nlr = 1\n[template.options]\na = 1\nb = 2\n")
    new = apply_overrides(recipe, {}, ["train.max_steps=", "train.lr=", "template.options.a="])
    assert new.train.max_steps is None and new.train.lr == 2e-4 and new.template.options == {"b": 2}
    assert apply_overrides(recipe, {}, ["template.options="]).template.options == {}


def test_set_data_means_every_source():
    recipe = parse("[[data]]\nfirst = 1\n[[data]]\nmap = 'a'\n[data.options]\nx = 1\n")
    new = apply_overrides(recipe, {}, ["data.shuffle=false", "data.options.name=Zoë", "data.options.n=4"])
    assert [source.shuffle for source in new.data] == [False, False]
    assert [source.options for source in new.data] == [{"name": "Zoë", "n": 4}, {"x": 1, "name": "Zoë", "n": 4}]
    assert new.data[0].first == 1 and new.where("data.1.options.name") == "--set data.options.name=Zoë"
    assert recipe.data[0].options == {}


def test_data_with_several_sources_is_refused():
    recipe = parse("[[data]]\n[[data]]\n")
    (line,) = refusals(apply_overrides, recipe, {"data": "x"})
    assert line == "--data x: the recipe has 2 [[data]] sources; edit it, or leave --data out"


def test_wrong_arguments_are_reported_together_as_typed():
    arguments = ["train.lrr=1", "train.lr=abc", "trian.lr=1", "lr=1", "train.lr", "train.lr.x=1", "pack.held=0", "=1"]
    lines = refusals(apply_overrides, Recipe(), {"seed": "x", "template": ""}, arguments)
    assert lines[0] == '--seed x: train.seed: found "x"; expected a whole number >= 0 and < 2^63'
    assert lines[1] == '--template : template.name: found ""; expected text that is not empty'
    assert [line.split(":")[0] for line in lines[2:]] == [f"--set {argument}" for argument in arguments]
    assert "did you mean 'lr'?" in lines[2] and lines[3].endswith('found "abc"; expected a number > 0')
    assert "did you mean 'train'?" in lines[4] and lines[5].endswith("expected section.key=value")
    assert lines[7].endswith("train.lr has no keys of its own")
    assert refusals(apply_overrides, Recipe(), {}, ["data.field.user=q"]) == [
        "--set data.field.user=q: no [data] key 'field'; did you mean 'fields'? known: fields, first, map, "
        "max_record_mb, on_bad, options, path, ratio, reader, repeat, shuffle"
    ]


def test_an_argument_with_a_new_line_adds_no_key():
    recipe = apply_overrides(Recipe(), {}, ["template.name=1\nx = 2"])
    assert recipe.template.name == "1\nx = 2"
    with pytest.raises(RecipeError, match="expected a whole number"):
        apply_overrides(Recipe(), {}, ["train.seed=1\nx = 2"])


def test_bytes_that_are_not_utf8_are_refused():
    (line,) = refusals(apply_overrides, Recipe(), {"out": "a\udcff"})
    assert "expected text" in line


# ------------------------------------------------------------------------------------------------------ options


@dataclass(frozen=True)
class Options:
    name: str
    threads: Literal["best", "all"] = "best"
    n: int | None = None
    share: float = 0.5
    words: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.share > 1:
            raise ValueError("share is above 1")


@dataclass(frozen=True)
class Odd:
    path: Path = Path()


def test_options_are_made_and_converted():
    made = options_from(Options, {"name": "x", "share": 1, "words": ["a"], "more": {"k": 1}}, where="w")
    assert made == Options("x", share=1.0, words=("a",), more={"k": 1})
    assert options_from(None, {}, where="w") is None


def test_options_are_as_strict_as_the_recipe():
    table = {"nmae": "x", "threads": "bset", "n": "3", "words": "a"}
    lines = refusals(options_from, Options, table, where=lambda key: f"my.toml:{key}")
    assert lines == [
        "my.toml:nmae: no option 'nmae'; did you mean 'name'? known: more, n, name, share, threads, words",
        "my.toml:threads: threads: no choice 'bset'; did you mean 'best'? known: all, best",
        'my.toml:n: n: found "3"; expected a whole number',
        'my.toml:words: words: found "a"; expected a list of (text)',
        "my.toml:name: option 'name' is not set; expected text",
    ]
    assert refusals(options_from, Options, {"name": "x", "share": 2}, where="w") == ["w: share is above 1"]
    assert refusals(options_from, None, {"a": 1}, where="w") == ["w: no option 'a'; known: none"]


def test_an_options_class_that_no_recipe_can_fill_is_the_plugins_mistake():
    with pytest.raises(PluginError, match="can't hold <class 'pathlib.Path'>"):
        options_from(Odd, {"path": "x"}, where="w")


def test_option_keys():
    assert option_keys(None) == []
    assert option_keys(Options) == ["name", "threads", "n", "share", "words", "more"]


# ------------------------------------------------------------------------------------------------------ writing


def test_writing_gives_every_set_key():
    text = to_toml(Recipe())
    assert "max_steps" not in text and 'quantizer = "nf4"' in text and "betas = [0.9, 0.999]" in text
    assert "[[data]]\nshuffle = true" in text
    assert parse(text) == Recipe()


def test_what_toml_cannot_hold():
    assert "TOML can't hold a object" in refusals(module.toml_dumps, {"a": object()})[0]
    assert "no UTF-8" in refusals(module.toml_dumps, {"a": "\ud800"})[0]


def test_the_examples_in_docstrings():
    result = doctest.testmod(module)
    assert result.attempted >= 1 and result.failed == 0


def test_loading_imports_no_heavy_package():
    code = (
        "import sys\nfrom corefit.recipe import to_toml\nfrom corefit.zoo import named_recipe\n"
        "to_toml(named_recipe('internlm_chat_7b_qlora_oasst1_e3'))\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'pluggy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
