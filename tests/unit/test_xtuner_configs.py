"""XTuner's configurations: what becomes of each value, what is said of the rest, and that nothing of them ever runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corefit_xtuner_configs.habits import HABITS
from corefit_xtuner_configs.tree import Config
from xtuner_configs import V0_1_9, V0_1_23, edited

from corefit.cli import main
from corefit.errors import PluginError, RecipeError
from corefit.prepare import read_config, resolve
from corefit.recipe import Recipe, flat, load_recipe, parse_recipe, toml_dumps
from corefit.registry import Registry

NAME = "internlm_chat_7b_qlora_oasst1_e3"
RECIPE = dict[str, str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load()


@pytest.fixture
def read(registry):
    """Write a configuration to ``config.py`` and read it; ``said`` has its notes, ``missing`` what can't be known."""

    def read(text: str, *overrides: str, name: str = "config.py") -> Recipe:
        Path(name).write_text(text, "utf-8")
        read.said, read.missing = "", {}
        found, recipe = read_config(Path(name), overrides, registry)
        read.said, read.missing, read.found = "\n".join(found.notes), dict(found.missing), found
        return recipe

    return read


def line_of(text: str, piece: str) -> int:
    """Give the number of the only line that holds ``piece``."""
    (found,) = [n for n, line in enumerate(text.splitlines(), 1) if piece in line]
    return found


def changes(before: Recipe, after: Recipe) -> dict[str, tuple[str, str]]:
    old, new = flat(before), flat(after)
    return {k: (old.get(k, ""), new.get(k, "")) for k in sorted({*old, *new}) if old.get(k) != new.get(k)}


def refusal(ask, *args, **more) -> str:
    with pytest.raises(RecipeError) as caught:
        ask(*args, **more)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- the same recipe


def test_v0_1_23_is_the_recipe_that_copy_gives(read):
    assert main(["copy", NAME]) == 0
    copied = load_recipe(f"{NAME}.toml")
    data = f'"{Path.cwd() / "timdettmers/openassistant-guanaco"}"'
    assert changes(copied, read(V0_1_23)) == {}
    assert flat(copied)["data.0.path"] == data


def test_v0_1_9_differs_from_v0_1_23_as_documented(read):
    assert changes(read(V0_1_23), read(V0_1_9)) == {
        "checkpoint.every_steps": ("31", "500"),  # once an epoch
        "train.optimizer": ('"adamw"', '"paged_adamw_32bit"'),
        "train.warmup": ("0.03", "0.0"),
    }
    assert f"config.py:{line_of(V0_1_9, 'CheckpointHook, interval=1')}: checkpoint.interval: in epochs" in read.said
    assert f"config.py:{line_of(V0_1_9, 'PROMPT_TEMPLATE.internlm_chat')}: prompt_template: v0.1.9" in read.said
    assert "--template internlm_chat@0.1.9" in read.said


def test_black_formatting_changes_nothing(read):
    black = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "88", "-"],
        input=V0_1_23, capture_output=True, text=True, check=True, encoding="utf-8",
    ).stdout  # fmt: skip
    assert "'" not in black.replace("'s", "") and len(black.splitlines()) > len(V0_1_23.splitlines())
    assert read(black) == read(V0_1_23)


def test_what_import_prints_is_the_same_recipe(read):
    recipe = read(V0_1_23)
    assert parse_recipe(toml_dumps(read.found.tables), name="r.toml", base=Path.cwd()) == recipe


def test_every_value_says_where_it_was_written(read):
    recipe = read(V0_1_23)
    for key, piece in {
        "model.base": "pretrained_model_name_or_path = 'internlm",
        "model.quantizer": "load_in_4bit=True",
        "adapter.r": "r=64",
        "adapter.dropout": "lora_dropout=0.1",
        "data.0.path": "data_path = 'timdettmers",
        "template.name": "PROMPT_TEMPLATE.internlm_chat",
        "pack.max_length": "max_length = 2048",
        "train.micro_batch": "batch_size = 1",
        "train.epochs": "max_epochs = 3",
        "train.lr": "lr = 2e-4",
        "train.betas": "betas = (0.9",
        "train.clip": "max_norm = 1",
        "train.warmup": "        end=warmup_ratio * max_epochs",
        "checkpoint.keep": "save_total_limit = 2",
        "sample.every_steps": "evaluation_freq = 500",
        "sample.prompts": "evaluation_inputs = [",
        "train.precision": "dtype='float16'",
    }.items():
        assert recipe.where(key) == f"config.py:{line_of(V0_1_23, piece)}", key


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("max_length = 2048", "max_length = 'long'", 'pack.max_length: found "long"; expected a whole number >= 8'),
        ("lr = 2e-4", "lr = -1", "train.lr: found -1.0; expected a number > 0"),
        ("max_epochs = 3", "max_epochs = 2.5", "train.epochs: found 2.5; expected a whole number >= 0"),
        ("betas = (0.9, 0.999)", "betas = (0.9, 1)", "train.betas: found [0.9, 1]; expected a list of 2 of"),
    ],
)
def test_a_wrong_value_is_an_error_at_its_line(read, old, new, words):
    text = edited(V0_1_23, (old, new))
    error = refusal(read, text)
    assert f"config.py:{line_of(text, new)}: {words}" in error.splitlines()[0]


# ------------------------------------------------------------------------------------------------------- derived values


def test_an_edited_variable_reaches_everything_derived_from_it(read):
    text = edited(
        V0_1_23, ("max_length = 2048", "max_length = 512"), ("accumulative_counts = 16", "accumulative_counts = 4")
    )
    assert changes(read(V0_1_23), read(text)) == {
        "pack.max_length": ("2048", "512"),
        "train.packs_per_step": ("16", "4"),
        "sample.every_steps": ("31", "125"),
        "checkpoint.every_steps": ("31", "125"),
    }


def test_cfg_options_on_a_variable_do_the_same_as_the_edit(read):
    text = edited(
        V0_1_23, ("max_length = 2048", "max_length = 512"), ("accumulative_counts = 16", "accumulative_counts = 4")
    )
    assert read(V0_1_23, "max_length=512", "accumulative_counts=4") == read(text)
    assert read(V0_1_23, "max_length=512").where("pack.max_length") == "--cfg-options max_length=512"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train_dataloader.dataset.max_length=512", "pack.max_length", "512"),
        ("train_dataset.max_length=512", "pack.max_length", "512"),
        ("model.lora.r=8", "adapter.r", "8"),
        ("model.lora.target_modules=[q_proj,v_proj]", "adapter.targets", '["q_proj", "v_proj"]'),
        ("model.lora.target_modules=q_proj,v_proj", "adapter.targets", '["q_proj", "v_proj"]'),
        ("optim_wrapper.optimizer.betas=(0.8,0.9)", "train.betas", "[0.8, 0.9]"),
        ("optim_wrapper.optimizer.lr=1e-5", "train.lr", "1e-05"),
        ("custom_hooks.1.every_n_iters=160", "sample.every_steps", "10"),
        ("data_path='my rows'", "data.0.path", None),
        ("model.lora=None", "adapter.kind", '"none"'),
        ("randomness.seed=7", "train.seed", "7"),
        ("work_dir=w", "run.out", None),
        ("evaluation_inputs=[a b,'c, d']", "sample.prompts", '["a b", "c, d"]'),
    ],
)
def test_cfg_options_as_mmengine_reads_them(read, override, key, value):
    text = V0_1_23 if key != "adapter.kind" else edited(V0_1_23, ("load_in_4bit=True", "load_in_4bit=False"))
    expected = f'"{Path.cwd() / override.partition("=")[2].strip(chr(39))}"' if value is None else value
    assert flat(read(text, override))[key] == expected


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("max_lenght=512", "no key 'max_lenght' in config.py; did you mean 'max_length'?"),
        (
            "train_dataloader.datset.max_length=5",
            "no key 'train_dataloader.datset' in config.py; did you mean 'dataset'?",
        ),
        ("max_length", "expected key=value"),
    ],
)
def test_cfg_options_that_name_nothing_are_errors(read, override, words):
    assert refusal(read, V0_1_23, override) == f"--cfg-options {override}: {words}"


def test_cfg_options_need_a_configuration(registry):
    Path("r.toml").write_text("", "utf-8")
    error = refusal(resolve, "r.toml", {"cfg-options": "'max_length=5 6'"}, [], registry)
    assert error.startswith("--cfg-options max_length=5 6: only another program's configuration has keys of its own")


# ---------------------------------------------------------------------------------------------- values and their forms


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("load_in_4bit=True", "load_in_4bit=False", {"model.quantizer": ('"nf4"', '"none"')}),
        ("load_in_8bit=False", "load_in_8bit=True", {}),  # 4 bit first
        ("optim_type = AdamW", "optim_type = 'PagedAdamW8bit'", {"train.optimizer": ('"adamw"', '"paged_adamw_8bit"')}),
        ("max_norm = 1", "max_norm = None", {"train.clip": ("1.0", "0.0")}),
        ("clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False)", "clip_grad=None", {"train.clip": ("1.0", "0.0")}),  # noqa: E501
        ("weight_decay=weight_decay", "eps=1e-8", {"train.weight_decay": ("0.0", "0.01")}),  # torch's default
        ("r=64,", "", {"adapter.r": ("64", "8")}),  # peft's default
        ("lora_dropout=0.1,", "use_rslora=True,", {"adapter.dropout": ("0.1", "0.0"), "adapter.rslora": ("false", "true")}),  # noqa: E501
        ("bias='none'", "target_modules=['wqkv', 'wo']", {"adapter.targets": ("[]", '["wqkv", "wo"]')}),
        ("dtype='float16'", "dtype='bfloat16'", {"train.precision": ('"fp16"', '"bf16"')}),
        ("batch_size = 1", "batch_size = 2", {"train.micro_batch": ("1", "2"), "train.packs_per_step": ("16", "32")}),
        ("warmup_ratio = 0.03", "warmup_ratio = 0.1", {"train.warmup": ("0.03", "0.1")}),
        ("        end=max_epochs", "        end=max_epochs / 2", {}),  # the share is one of the run
        ("type=CosineAnnealingLR,\n        eta_min=0.0", "type=LinearLR,\n        start_factor=1.,\n        end_factor=0.",  # noqa: E501
         {"train.scheduler": ('"cosine"', '"linear"')}),
        ("save_steps = 500", "save_steps = -1", {"checkpoint.every_steps": ("31", "0")}),
        ("save_steps = 500", "save_steps = 3", {"checkpoint.every_steps": ("31", "1")}),
        ("seed=None", "seed=7", {"train.seed": ("42", "7")}),
        ("max_length = 2048", "max_length = int(2048 - (336 / 14)**2)", {"pack.max_length": ("2048", "1472")}),
        ("max_epochs = 3", "max_epochs = 1 if batch_size > 0 else 2", {"train.epochs": ("3", "1")}),
        ("PROMPT_TEMPLATE.internlm_chat", "PROMPT_TEMPLATE['qwen_chat']", {"template.name": ('"internlm_chat"', '"qwen_chat"')}),  # noqa: E501
        ("dataset_map_fn=oasst1_map_fn", "dataset_map_fn='alpaca'", {"data.0.map": ('"oasst1"', '"alpaca"')}),
        ("dataset_map_fn=oasst1_map_fn", "dataset_map_fn=None", {"data.0.map": ('"oasst1"', '"conversation"')}),
        ("dict(type=TrainLoop, max_epochs=max_epochs)", "dict(type=TrainLoop, max_iters=1600)",
         {"train.epochs": ("3", "0"), "train.max_steps": ("", "100")}),
    ],
)  # fmt: skip
def test_a_change_of_the_configuration_is_a_change_of_the_recipe(read, old, new, expected):
    assert changes(read(V0_1_23), read(edited(V0_1_23, (old, new)))) == expected
    assert not read.missing


def test_8_bit_and_full_fine_tuning(read):
    int8 = edited(V0_1_23, ("load_in_4bit=True", "load_in_4bit=False"), ("load_in_8bit=False", "load_in_8bit=True"))
    assert read(int8).model.quantizer == "int8"
    start, end = V0_1_23.index("        quantization_config="), V0_1_23.index("train_dataset =")
    full = V0_1_23[:start] + "))\n" + V0_1_23[end:]
    recipe = read(full)
    assert (recipe.model.quantizer, recipe.adapter.kind) == ("none", "none")


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        ("dict(type=load_dataset, path='json', data_files='a.jsonl')", ("a.jsonl",)),
        ("dict(type=load_dataset, path='json', data_files=['a.jsonl'])", ("a.jsonl",)),
        ("dict(type=load_dataset, path='json', data_files=['a.jsonl', 'b.jsonl'])", ("a.jsonl", "b.jsonl")),
        ("dict(type=load_dataset, path='json', data_files=dict(train=root + 'a.jsonl'))", ("rows/a.jsonl",)),
        (
            "dict(type=load_dataset, path='json', data_files=dict(train=os.path.join(root, 'a.jsonl')))",
            ("rows/a.jsonl",),
        ),
        ("dict(type=load_dataset, path='json', data_files=dict(train=osp.join('rows', 'a.jsonl')))", ("rows/a.jsonl",)),
        ("dict(type=load_dataset, path='json', data_files=f'{root}a.jsonl')", ("rows/a.jsonl",)),
        ("dict(type=load_dataset, path='json', data_files='{}a.{x}'.format(root, x='jsonl'))", ("rows/a.jsonl",)),
        ("dict(type=load_dataset, path='json', data_files='%sa.jsonl' % root)", ("rows/a.jsonl",)),
        ("dict(type=load_dataset, path='json', data_dir=root)", ("rows",)),
        ("dict(type=load_dataset, path='./rows', data_files=['a.jsonl'])", ("rows/a.jsonl",)),
        ("{'type': load_dataset, 'path': 'rows'}", ("rows",)),
        ("dict(type=MsDataset.load, dataset_name='owner/rows')", ("owner/rows",)),
    ],
)
def test_data_files_in_all_their_forms(read, value, paths):
    text = edited(V0_1_23, ("dict(type=load_dataset, path=data_path)", value))
    text = f"import os\nimport os.path as osp\nfrom modelscope.msgs import MsDataset\nroot = 'rows/'\n{text}"
    found = read(text).data[0].path
    assert ((found,) if isinstance(found, str) else found) == tuple(str(Path.cwd() / path) for path in paths)


def test_validation_files_validate(read):
    files = "dict(type=load_dataset, path='json', data_files=dict(train='a.jsonl', validation='b.jsonl'))"
    assert read(edited(V0_1_23, ("dict(type=load_dataset, path=data_path)", files))).val.data == str(
        Path.cwd() / "b.jsonl"
    )


@pytest.mark.parametrize("held", ["datasets=[one, two]", "datasets_cfg=dict(one=one, two=two)"])
def test_both_forms_of_concatdataset_are_several_sources(read, held):
    two = f"two = {{**one, 'dataset': dict(type=load_dataset, path='b')}}\nsampler =\ntrain_dataset = dict(type=ConcatDataset, {held})\n"  # noqa: E501
    head, rest = edited(V0_1_23, ("train_dataset = dict(", "one = dict(")).split("sampler = Seq")
    text = head + two.replace("sampler =\n", "") + "sampler = Seq" + rest
    recipe = read(edited(text, ("data_path = 'timdettmers/openassistant-guanaco'", "data_path = 'a'")))
    assert [(source.path, source.map) for source in recipe.data] == [
        (str(Path.cwd() / "a"), "oasst1"),
        (str(Path.cwd() / "b"), "oasst1"),
    ]
    assert not read.missing


def test_read_base_follows_relative_files_without_running_them(read):
    Path("base").mkdir()
    Path("base/whole.py").write_text(V0_1_23, "utf-8")
    text = """
        from mmengine.config import read_base
        with read_base():
            from .base.whole import *

        train_dataset.max_length = 1024
        model['lora']['r'] = 32
        model.lora.update(dict(lora_alpha=8), lora_dropout=0.2)
        default_hooks.checkpoint.pop('max_keep_ckpts')
        evaluation_inputs.append('one more')
        custom_hooks += [dict(type=EvaluateChatHook2)]
    """.replace("\n        ", "\n")
    recipe = read(text)
    assert changes(read(V0_1_23), recipe) == {
        "pack.max_length": ("2048", "1024"),
        "adapter.r": ("64", "32"),
        "adapter.alpha": ("16", "8"),
        "adapter.dropout": ("0.1", "0.2"),
        "sample.prompts": (flat(read(V0_1_23))["sample.prompts"], flat(recipe)["sample.prompts"]),
    }
    assert recipe.sample.prompts[-1] == "one more"
    assert recipe.where("train.lr").startswith("base/whole.py:") and recipe.where("adapter.r") == "config.py:7"
    assert read(text, "max_length=512").pack.max_length == 1024, "what is assigned later counts"
    assert read(text, "lr=1e-5").train.lr == 1e-5
    Path("base/whole.py").unlink()
    assert refusal(read, text) == "config.py:4: base/whole.py: no such file"
    Path("base/whole.py").write_text("from ..config import *\n", "utf-8")
    assert "builds on itself" in refusal(read, text)


def test_a_configuration_for_transformers_trainer(read):
    start, end = V0_1_9.index("train_dataloader ="), len(V0_1_9)
    text = (
        V0_1_9[:start]
        + """
from transformers import TrainingArguments, Trainer
framework = 'huggingface'
trainer = Trainer
training_args = dict(type=TrainingArguments, do_train=True, learning_rate=3e-4, weight_decay=0, lr_scheduler_type='cosine',
    warmup_steps=100, per_device_train_batch_size=1, gradient_accumulation_steps=8, num_train_epochs=2, fp16=True,
    optim='paged_adamw_32bit', save_steps=1000, save_total_limit=2)
"""  # noqa: E501
    )
    del end
    text = text.replace("    type=SupervisedFinetune,\n    llm=dict(\n        type=AutoModelForCausalLM.from_pretrained,",  # noqa: E501
                        "    type=AutoModelForCausalLM.from_pretrained,").replace("bnb_4bit_quant_type='nf4')),\n    lora=dict(", "bnb_4bit_quant_type='nf4'))\nlora = dict(").replace("task_type='CAUSAL_LM'))", "task_type='CAUSAL_LM')")  # fmt: skip  # noqa: E501
    recipe = read(text)
    train = recipe.train
    assert (train.lr, train.epochs, train.packs_per_step, train.micro_batch) == (3e-4, 2, 8, 1)
    assert (train.optimizer, train.precision, recipe.checkpoint.every_steps) == ("paged_adamw_32bit", "fp16", 1000)
    assert "warmup_steps: corefit's warm-up is a share of the run" in read.said and recipe.data[0].map == "oasst1"


@pytest.mark.parametrize(
    "code",
    [
        "del model['lora']['r']",
        "del model.lora.r",
        "rank = model['lora'].pop('r')",
        "model['lora'].pop('r')",
        "model['lora'].update(**dict(r=8))",
    ],
)
def test_what_the_file_takes_away_again_is_not_there(read, code):
    assert read(f"{V0_1_23}\n{code}\n").adapter.r == 8  # peft's default
    assert code not in read.said and not read.missing


def test_what_cant_be_taken_away_is_said(read):
    read(f"{V0_1_23}\ndel model['lorra']\n")
    assert f"config.py:{len(V0_1_23.splitlines()) + 2}: `del model['lorra']`: not followed" in read.said


def test_a_text_may_be_put_together_from_many(read):
    text = edited(V0_1_23, ("'timdettmers/openassistant-guanaco'", " + ".join(["'a'"] * 40)))
    assert read(text).data[0].path == str(Path.cwd() / ("a" * 40))


def test_a_number_without_end_is_an_error_at_its_line(read):
    text = edited(V0_1_23, ("save_steps = 500", "save_steps = 1e400"))
    assert refusal(read, text).startswith(f"config.py:{line_of(text, '1e400')}: checkpoint.every_steps: found inf; ")


def test_a_list_without_end_is_an_error_at_its_line(read):
    code = "x = [1] * 99999\nx += x\n"
    assert refusal(read, code + V0_1_23) == "config.py:2: a list of more than 100,000 values"
    assert refusal(read, V0_1_23 + code.replace("x += x", "x.extend(x)")).endswith("a list of more than 100,000 values")


@pytest.mark.parametrize("bot", ["", ", bot_name=None"])
def test_moss_without_a_name_is_moss(read, bot):
    start, end = V0_1_23.index("    type=process_hf_dataset"), V0_1_23.index("sampler = Seq")
    (source,) = read(f"{V0_1_23[:start]}    type='MOSSSFTDataset', data_file='a.jsonl'{bot})\n{V0_1_23[end:]}").data
    assert source.options == {}
    read(f"{V0_1_23[:start]}    type='MOSSSFTDataset', data_file='a.jsonl', bot_name=input())\n{V0_1_23[end:]}")
    assert "data.0.options is a function call, `input()`, which is never run" in read.missing["data.0.options"]


def test_moss_reads_maps_and_writes_by_itself(read):
    start, end = V0_1_23.index("    type=process_hf_dataset"), V0_1_23.index("sampler = Seq")
    moss = "    type='MOSSSFTDataset', data_file='moss.jsonl', bot_name='Me', max_length=max_length)\n"
    recipe = read(V0_1_23[:start] + moss + V0_1_23[end:])
    (source,) = recipe.data
    assert (source.path, source.map, source.options) == (str(Path.cwd() / "moss.jsonl"), "moss_sft", {"bot_name": "Me"})
    assert recipe.template.name == "moss_sft" and recipe.pack.max_length == 2048 and not read.missing


# ------------------------------------------------------------------------------------------------------- nothing runs

PLANTED = [
    "import os; os.system('touch ran')",
    "__import__('pathlib').Path('ran').touch()",
    "from planted import *",
    "import planted",
    "data_path = __import__('pathlib').Path('ran').touch() or 'x'",
    "data_path = [open('ran', 'w') for _ in (1,)][0]",
    'data_path = f\'{open("ran", "w")}\'',
    "data_path = (lambda: open('ran', 'w'))()",
    "class A:\n    open('ran', 'w')",
    "def f(x=open('ran', 'w')):\n    pass",
    "for _ in (1,):\n    open('ran', 'w')",
    "while open('ran', 'w'):\n    break",
    "with open('ran', 'w') as f:\n    pass",
    "try:\n    open('ran', 'w')\nexcept OSError:\n    pass",
    "if open('ran', 'w'):\n    pass",
    "assert open('ran', 'w')",
    "data_path = '{0.__class__}'.format('x')",
    "data_path = ''.join(map(open, ['ran'], ['w']))",
    "data_path = max(['ran'], key=lambda name: open(name, 'w'))",
    "dict = open; dict('ran', 'w')",
    "int = open\ndata_path = int('ran', 'w')",
    "@open('ran', 'w')\ndef f():\n    pass",
    "data_path: open('ran', 'w') = 'x'",
    "exec(\"open('ran', 'w')\")",
    "data_path = eval(\"open('ran', 'w')\")",
    "data_path = (y := open('ran', 'w'))",
    "model = type('M', (), {'__getattr__': lambda s, n: open('ran', 'w')})()",
]


@pytest.mark.parametrize("code", PLANTED)
def test_planted_code_never_runs_and_is_said(read, monkeypatch, code):
    Path("planted.py").write_text("open('ran', 'w')\n", "utf-8")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    text = edited(V0_1_23, ("prompt_template = PROMPT", f"{code}\nprompt_template = PROMPT"))
    try:
        read(text)
    except RecipeError as error:
        read.said = str(error)
    assert not Path("ran").exists() and "planted" not in sys.modules
    if "import" not in code.partition("(")[0] and "assert" not in code and ": open" not in code:
        assert re.search(r"config\.py:\d+: ", read.said + "".join(read.missing.values())), "said, with its line"


def test_no_import_of_the_configuration_is_made_in_a_fresh_process(tmp_path):
    """Even what is installed: reading a configuration imports none of what it names."""
    Path("config.py").write_text(V0_1_23, "utf-8")
    code = (
        "import sys; from pathlib import Path; from corefit_xtuner_configs.convert import convert\n"
        "convert(Path('config.py'), [])\n"
        "assert not {'torch', 'transformers', 'peft', 'bitsandbytes', 'mmengine', 'xtuner'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "code",
    [
        "x = 10 ** 10 ** 10",
        "x = 'a' * 10 ** 12",
        "x = [1] * 10 ** 12",
        "x = 'ab'\n" + "x = x + x\n" * 60,
        "x = [1]\n" + "x = [x, x]\n" * 60,
        "x = [1]\n" + "x += x\n" * 60,
        "x = 'a' * 99999\nx = '{0}{0}{0}{0}{0}{0}{0}{0}'.format(x) * 1\n" * 40,
        "x = []\nx.append(x)",
        "x = " + "(" * 400 + "1" + ")" * 400,
        "x = " + "-" * 20000 + "1",
        "x = f'{1:>999999999}'",
        "x = '%999999999d' % 1",
        "x = '\\ud800'",
        "x = 1" + "+1" * 5000,
    ],
)
def test_a_configuration_can_neither_hang_nor_exhaust(read, code):
    text = edited(V0_1_23, ("prompt_template = PROMPT", f"{code}\ndata_path = x\nprompt_template = PROMPT"))
    began = time.monotonic()
    try:
        read(text)
    except RecipeError as error:
        assert "config.py" in str(error) or "line" in str(error)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ("max_length = 2048", "max_length = compute()", "pack.max_length", "a function call, `compute()`, which is never run"),  # noqa: E501
        ("lr = 2e-4", "lr = [x for x in (1,)][0]", "train.lr", "a comprehension"),
        ("betas = (0.9, 0.999)", "betas = (0.9, b)", "train.betas", "'b', which is not defined here"),
        ("max_length=max_length,", "max_length=max_lenght,", "pack.max_length", "did you mean 'max_length'?"),
        ("batch_size = 1", "batch_size = int(os.environ['B'])", "train.packs_per_step", "'os', which is not defined here"),  # noqa: E501
        ("max_norm = 1\n", "max_norm = 1 / 0\n", "train.clip", "`1 / 0`: ZeroDivisionError"),
        ("dataset_map_fn=oasst1_map_fn", "dataset_map_fn=lambda row: row", "data.0.map", "a lambda"),
        ("dict(type=load_dataset, path=data_path)", "make()", "data.0.path", "a function call, `make()`"),
        ("load_in_4bit=True", "load_in_4bit=yes()", "model.quantizer", "a function call, `yes()`"),
        ("bnb_4bit_quant_type='nf4'", "bnb_4bit_quant_type='fp4'", "model.quantizer", "only nf4 is built in"),
        ("lr = 2e-4", "lr = torch.float16", "train.lr", "'torch.float16', which is never imported"),
        ("= 'timdettmers/openassistant-guanaco'", "= torch.x['DATA']", "data.0.path", "'torch.x.DATA', which is never imported"),  # noqa: E501
        ("optim_type = AdamW", "optim_type = SGD", "train.optimizer", "'SGD', which is not defined here"),
        ("= PROMPT_TEMPLATE.internlm_chat", "= dict(INSTRUCTION='{input}')", "template.name", "a template of its own"),
        ("bias='none'", "target_modules='.*proj'", "adapter.targets", "target_modules is a pattern"),
        ("load_from = None", "load_from = 'iter_500.pth'", "adapter.start", "`corefit safetensors iter_500.pth --config config.py --out DIR`"),  # noqa: E501
        ("        type=CosineAnnealingLR", "        type=PolyLR", "train.scheduler", "param_scheduler PolyLR"),
        ("= 'internlm/internlm-chat-7b'", "= None", "model.base", "model.base: found None; write the value, or --set model.base="),  # noqa: E501
        ("lr = 2e-4", "lr = None", "train.lr", "train.lr: found None; "),
        ("= 'timdettmers/openassistant-guanaco'", "= None", "data.0.path", "found None; write the value, or --set data.path="),  # noqa: E501
        ("type=process_hf_dataset", "type=made_up", "data.0.path", "the data set is 'made_up', which is not defined here"),  # noqa: E501
    ],
)  # fmt: skip
def test_a_value_that_is_needed_and_cant_be_known_is_an_error_that_a_flag_mends(read, registry, old, new, key, words):
    text = edited(V0_1_23, (old, new)).replace("type=PolyLR", "type='PolyLR'")
    read(text)
    assert list(read.missing) == [key]
    assert re.match(r"config\.py:\d+: ", read.missing[key]) and words in read.missing[key]
    assert refusal(resolve, "config.py", {}, [], registry) == read.missing[key]
    mended = {"pack.max_length": "64", "train.betas": "[0.9, 0.9]", "data.0.path": "x", "data.0.map": "oasst1"}
    section, _, name = key.replace("data.0", "data").partition(".")
    value = mended.get(
        key, {"quantizer": "nf4", "optimizer": "adamw", "scheduler": "wsd", "name": "chatml"}.get(name, "1")
    )
    value = {"targets": "['q_proj']", "start": "DIR", "kind": "lora", "base": "."}.get(name, value)
    recipe, _, _ = resolve("config.py", {"model": "."}, [f"{section}.{name}={value}"], registry)
    assert recipe.where(key).startswith("--set ")


def test_a_function_of_the_configuration_is_named_with_what_to_write_instead(read, registry):
    own = "def my_map_fn(example):\n    return {'conversation': []}\n\n"
    text = edited(V0_1_23, ("tokenizer = dict(", own + "tokenizer = dict("), ("=oasst1_map_fn", "=my_map_fn"))
    read(text)
    line = line_of(text, "def my_map_fn")
    assert f"config.py:{line}: def my_map_fn: not run" in read.said
    assert "--plugin my_format.py:my_map_fn" in read.missing["data.0.map"]
    recipe, _, _ = resolve("config.py", {"plugin": "oasst1", "model": "."}, [], registry)
    assert recipe.data[0].map == "oasst1"
    imported = edited(
        V0_1_23, ("import torch\n", "import torch\nfrom mine.maps import to_chat\n"), ("=oasst1_map_fn", "=to_chat")
    )
    read(imported)
    assert "--plugin mine.maps:to_chat" in read.missing["data.0.map"]


def test_tokens_that_the_tokenizer_is_given_are_added(read):
    given = ("padding_side='right'", "padding_side='right', additional_special_tokens=['<|plan|>', '<|act|>']")
    grows = ("type=SupervisedFinetune,", "type=SupervisedFinetune, tokenizer=dict(type=AutoTokenizer, path='own'),")
    for text in (edited(V0_1_23, given), edited(V0_1_23, given, grows)):
        assert read(text).model.add_tokens == ("<|plan|>", "<|act|>")
        assert "model.tokenizer" not in read.said and not read.missing
    assert read(edited(V0_1_23, grows)).model.add_tokens == ()
    assert "left out: tokens that the vocabulary lacks are named in model.add_tokens" in read.said


def test_a_warm_up_in_iterations_is_a_share_where_the_run_is_told_in_them(read):
    warm = ("by_epoch=True,\n        begin=0,\n        end=warmup_ratio * max_epochs,\n        convert_to_iter_based=True",  # noqa: E501
            "by_epoch=False,\n        begin=0,\n        end=100")  # fmt: skip
    assert read(edited(V0_1_23, warm)).train.warmup == 0.03  # the default, with a word
    assert "a warm-up of 100 iterations: corefit's is a share of the run; 0.03 unless --set train.warmup" in read.said
    iters = ("dict(type=TrainLoop, max_epochs=max_epochs)", "dict(type=TrainLoop, max_iters=1600)")
    assert read(edited(V0_1_23, warm, iters)).train.warmup == 0.0625
    assert "warm-up" not in read.said


def test_a_linear_schedule_that_rises_is_a_warm_up_and_one_that_does_not_go_to_zero_is_said(read):
    cosine = "type=CosineAnnealingLR,\n        eta_min=0.0"
    falls = read(edited(V0_1_23, (cosine, "type=LinearLR,\n        start_factor=1.0,\n        end_factor=0.3")))
    assert (falls.train.scheduler, falls.train.warmup) == ("linear", 0.03)
    assert "end_factor: 0.3: corefit's linear schedule goes from the rate to 0" in read.said
    rises = read(edited(V0_1_23, (cosine, "type=LinearLR")))
    assert (rises.train.scheduler, rises.train.warmup) == ("constant", 0.03)
    assert "a warm-up later than the beginning: left out" in read.said
    later = ("        begin=0,\n", "        begin=1,\n")
    read(edited(V0_1_23, later))
    assert "begin: 1: corefit's schedules begin with the run" in read.said
    read(edited(V0_1_23, (cosine, "type='ConstantLR'")))
    assert "factor: 0.333: corefit's constant schedule is train.lr" in read.said


# ------------------------------------------------------------------------------------------------------------- notes


@pytest.mark.parametrize(
    ("old", "new", "note"),
    [
        ("visualizer = None", "visualizer = dict(type='Visualizer')", "visualizer = Visualizer(...): left out: RUN/metrics.jsonl has"),  # noqa: E501
        ("resume = False", "resume = True", "resume = True: left out: --resume goes on"),
        ("SYSTEM = ''", "SYSTEM = 'Be brief.'", "custom_hooks.EvaluateChatHook.system = 'Be brief.': left out: sample.prompts are asked with training's"),  # noqa: E501
        ("bias='none'", "bias='all'", "model.lora.bias = 'all': left out: biases stay as they are"),
        ("padding_side='right'", "padding_side='right', eos_token='</s>'", None),
        ("num_workers=dataloader_num_workers", "num_workers=9", None),
        ("path=data_path", "path=data_path, name=None", None),
        ("path=data_path", "path=data_path, name='en'", "dataset name 'en': corefit reads files"),
        ("error_if_nonfinite=False", "type='value'", "optim_wrapper.clip_grad.type = 'value': left out: the norm is clipped"),  # noqa: E501
        ("loss_scale='dynamic'", "loss_scale=128.0", "optim_wrapper.loss_scale = 128.0: left out: the loss scale of fp16 is dynamic"),  # noqa: E501
        ("shuffle_before_pack=True", "strange_key=1", "train_dataset.strange_key = 1: left out: no counterpart in corefit"),  # noqa: E501
        ("dict(type=DatasetInfoHook, tokenizer=tokenizer)", "dict(type='EMAHook')", "custom_hooks: EMAHook: left out: nothing hooks into"),  # noqa: E501
        ("pack_to_max_length = True", "pack_to_max_length = False", "pack_to_max_length: corefit always packs"),
        ("save_total_limit = 2", "save_total_limit = -1", "max_keep_ckpts: -1 keeps all"),
        ("eta_min=0.0", "eta_min=lr * 0.1", "param_scheduler.CosineAnnealingLR.eta_min = 2e-05: left out: the rate goes down to 0"),  # noqa: E501
        ("eta_min=0.0", "eta_min_ratio=0.1", "param_scheduler.CosineAnnealingLR.eta_min_ratio = 0.1: left out: the rate goes"),  # noqa: E501
        ("        end=max_epochs", "        end=max_epochs / 2", "CosineAnnealingLR ends at 1.5 of 3 epochs"),
        ("        end=max_epochs", "        T_max=0.4", "CosineAnnealingLR ends at 0.4 of 3 epochs"),
        ("        end=max_epochs", "        T_max=max_epochs", None),
        ("        end=max_epochs", "        T_max=(1 - warmup_ratio) * max_epochs", None),
        ("start_factor=1e-5", "start_factor=0.5", "start_factor: 0.5: corefit's warm-up begins at 0"),
        ("end=max_epochs,", "end=max_epochs, strange=1,", "param_scheduler.CosineAnnealingLR.strange = 1: left out: no"),  # noqa: E501
        ("remove_unused_columns=True", "max_dataset_length=100", "max_dataset_length: the first so many records"),
        ("optim_wrapper = dict(", "print('hi')\noptim_wrapper = dict(", "`print('hi')`: not run"),
        ("optim_wrapper = dict(", "for i in (1,):\n    z = i\noptim_wrapper = dict(", "`for i in (1,):`: not run"),
        ("sequence_parallel_size = 1", "sequence_parallel_size = 4", "sequence_parallel_size = 4: left out"),
        ("use_varlen_attn = False", "use_varlen_attn = True", None),
        ("train_cfg = dict(", "param_scheduler = []\ntrain_cfg = dict(", None),
        ("train_cfg = dict(", "work_dir = None\ntrain_cfg = dict(", None),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_said_line_by_line_and_nothing_else_is(read, old, new, note):
    read(V0_1_23)
    before = {re.sub(r":\d+:", ":", line) for line in read.said.splitlines()}
    text = edited(V0_1_23, (old, new))
    read(text)
    after = {re.sub(r":\d+:", ":", line): line for line in read.said.splitlines()}
    more = [line for key, line in after.items() if key not in before]
    assert [bool(note)] * len(more) == [True] * bool(note)
    if note:
        assert re.sub(r":\d+:", ":", more[0]).startswith(f"config.py: {note}"), more
        assert text.splitlines()[int(more[0].split(":")[1]) - 1].strip()


def test_an_unedited_configuration_says_only_what_differs(read):
    read(V0_1_23)
    said = [re.sub(r"^config.py:\d+: ", "", line) for line in read.said.splitlines()]
    assert [line.split(" ")[0] for line in said] == ["model.use_varlen_attn", "data:", "model.llm.trust_remote_code"]
    assert "hf download --repo-type dataset timdettmers/openassistant-guanaco" in said[1]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("type=SupervisedFinetune", "type=DPO", "expected SupervisedFinetune"),
        ("from xtuner.model import SupervisedFinetune", "from xtuner.model import DPO as SupervisedFinetune", "DPO, which learns from preferences"),  # noqa: E501
        ("from xtuner.model import SupervisedFinetune", "from xtuner.model import LLaVAModel as SupervisedFinetune", "learns from images"),  # noqa: E501
        ("type=process_hf_dataset", "type='xtuner.dataset.LLaVADataset'", "LLaVADataset reads images"),
        ("=oasst1_map_fn", "='xtuner.dataset.map_fns.llava_map_fn'", "llava reads images"),
        ("type=process_hf_dataset", "type='build_packed_dataset'", "reads InternLM's tokenised files"),
        ("model = dict(", "modell = dict(", "no `model` in it"),
        ("model = dict(", "from xtuner.configs.a import *\nmodell = dict(", "and `from xtuner.configs.a import *` (line "),  # noqa: E501
        ("model = dict(", "_base_ = './base.py'\nmodel = dict(", "_base_: files that a configuration builds on are read"),  # noqa: E501
        ("max_length = 2048", "max_length = = 2048", "not Python"),
        ("max_length = 2048", "max_length = '\x00'", "not Python"),
    ],
)  # fmt: skip
def test_what_corefit_does_not_train_is_refused_in_one_line(read, old, new, words):
    error = refusal(read, edited(V0_1_23, (old, new)))
    assert words in error and "\n" not in error and error.startswith("config.py")


# -------------------------------------------------------------------------------------------------------- the reader


def test_python_and_the_tree_agree_on_a_whole_configuration():
    """Run our own text with stand-ins for what it imports: the same values come out."""

    class Anything:
        def __getattr__(self, name):
            return name

    names = {
        a.asname or a.name
        for n in ast.walk(ast.parse(V0_1_23))
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    lines = V0_1_23[V0_1_23.index("pretrained_model_name_or_path =") :]
    space: dict = {name: Anything() for name in names}
    exec(compile(lines, "config", "exec"), space)  # noqa: S102, the text is ours
    Path("config.py").write_text(V0_1_23, "utf-8")
    ours = Config(Path("config.py"), {}).names

    def same(value, theirs):
        if isinstance(theirs, dict):
            return value.keys() == theirs.keys() and all(same(value[k], theirs[k]) for k in theirs)
        if isinstance(theirs, (list, tuple)):
            return len(value) == len(theirs) and all(map(same, value, theirs))
        return isinstance(value, str) if isinstance(theirs, Anything) or isinstance(value, str) else value == theirs

    checked = [name for name in space if name in ours and name not in names and not name.startswith("__")]
    assert len(checked) > 35
    assert all(same(ours[name].plain(), space[name]) for name in checked)


def test_two_readers_of_one_suffix_are_told_apart_by_the_user(registry, monkeypatch):
    from corefit.types import RecipeReader

    twin = RecipeReader(name="twin", summary="", read=lambda path, overrides: None, suffixes=(".py",))
    entries = {**registry.entries, "recipe reader": {**registry.recipe_readers, "twin": twin}}
    both = Registry(registry.plugins, entries)
    with pytest.raises(
        PluginError, match=r"\.py is read by xtuner and twin; leave one out with COREFIT_DISABLE_PLUGINS"
    ):
        both.recipe_reader(".py")
    with pytest.raises(PluginError, match=r"\.yaml: no recipe; recipes are \.toml, plugins read \.py"):
        registry.recipe_reader(".yaml")


def fails(path, overrides):
    raise KeyError("oops")


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (fails, "KeyError"),
        (lambda *_: sys.exit("a\nb"), "SystemExit: a b"),
        (lambda path, overrides: None, "TypeError: gave a NoneType, expected an ImportedRecipe"),
    ],
)
def test_a_reader_that_fails_is_named_with_its_plugin(registry, tmp_path, monkeypatch, read, words):
    from corefit.types import RecipeReader

    broken = RecipeReader(name="xtuner", summary="", read=read, suffixes=(".py",))
    monkeypatch.chdir(tmp_path)
    Path("x.py").touch()
    with pytest.raises(PluginError) as caught:
        read_config(
            Path("x.py"), [], Registry(registry.plugins, {**registry.entries, "recipe reader": {"xtuner": broken}})
        )
    assert str(caught.value).startswith(
        f"x.py: recipe reader 'xtuner' of plugin 'xtuner_configs' (corefit 0.1.0) failed: {words}"
    )


def test_habits_are_one_line_each():
    assert len(HABITS) > 25
    for words, answer in HABITS.items():
        assert "\n" not in answer and len(answer) < 200 and answer[-1] != ".", words
