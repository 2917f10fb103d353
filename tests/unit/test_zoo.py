from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from corefit import zoo
from corefit.data.files import find_files
from corefit.engine.internlm import KINDS
from corefit.errors import DataError, RecipeError
from corefit.recipe import Recipe, load_recipe
from corefit.registry import Registry

NAME = "internlm_chat_7b_qlora_oasst1_e3"
CLASSIC = set((Path(__file__).parents[1] / "golden" / "xtuner_zoo.txt").read_text("utf-8").split())
MAPS = (
    *("alpaca", "alpaca_zh", "arxiv", "code_alpaca", "colors", "crime_kg_assitan", "default", "law_reference", "llava"),
    *("llava_image_only", "medical", "msagent_react", "oasst1", "openai", "openorca", "pretrain", "sql"),
    *("stack_exchange", "tiny_codes", "wizardlm", "conversation", "moss_sft"),
)
"""The names of XTuner's ``list-dataset-format``, its own format, and MOSS's."""


def refusal(ask, *arguments) -> str:
    with pytest.raises(RecipeError) as caught:
        ask(*arguments)
    return str(caught.value)


def test_every_classic_name_is_a_recipe_or_excluded_with_a_reason_and_nothing_else_is_excluded():
    assert len(CLASSIC) == 585
    recipes = {name for name, at in zoo.names().items() if at.zoo == "xtuner"}
    assert recipes | set(zoo.excluded()) == CLASSIC and not set(zoo.names()) & set(zoo.excluded())
    assert all(len(why) > 30 for why in zoo.excluded().values())


def test_names_are_excluded_for_an_architecture_only_where_transformers_has_none():
    for kind in ("baichuan", "chatglm", "qwen", "minicpm", "deepseek"):
        assert kind not in CONFIG_MAPPING
    for kind in ("llama", "qwen2", "qwen2_moe", "mistral", "mixtral", "gemma", "phi3", "gpt_bigcode", "deepseek_v2"):
        assert kind in CONFIG_MAPPING
    assert {"internlm", "internlm2"} <= set(KINDS)


def test_every_recipe_loads_has_a_short_summary_and_says_what_its_name_says():
    words = {
        "qlora": ("lora", "nf4"),
        "int8_lora": ("lora", "int8"),
        "lora": ("lora", "none"),
        "full": ("none", "none"),
    }
    templates = Registry.load().templates
    for name, at in zoo.names().items():
        recipe = zoo.named_recipe(name)
        assert (recipe.adapter.kind, recipe.model.quantizer) == words[at.method], name
        if epochs := re.search(r"_e(\d)(_|$)", name):
            assert recipe.train.epochs == int(epochs[1]), name
        if "_512_" in name:
            assert recipe.pack.max_length == 512
        assert recipe.template.name in (None, *templates) and all(source.map in MAPS for source in recipe.data), name
        assert all(isinstance(source.path, str) for source in recipe.data) and recipe.model.base.count("/") == 1
        assert len(zoo.summary(name)) <= 110, name


def test_internlm_chat_has_the_values_of_xtuner_0_1_23(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = zoo.named_recipe(NAME)
    assert recipe.model.base == "internlm/internlm-chat-7b" and recipe.model.quantizer == "nf4"
    assert (recipe.adapter.r, recipe.adapter.alpha, recipe.adapter.dropout, recipe.adapter.targets) == (64, 16, 0.1, ())
    assert recipe.data[0].map == "oasst1" and recipe.data[0].shuffle
    assert recipe.data[0].path == str(tmp_path / "timdettmers" / "openassistant-guanaco")
    assert recipe.template.name == "internlm_chat" and recipe.pack.max_length == 2048
    train = recipe.train
    assert (train.epochs, train.max_steps, train.micro_batch, train.packs_per_step) == (3, None, 1, 16)
    assert (train.optimizer, train.lr, train.betas, train.weight_decay) == ("adamw", 2e-4, (0.9, 0.999), 0.0)
    assert (train.scheduler, train.warmup, train.clip, train.precision) == ("cosine", 0.03, 1.0, "fp16")
    saved = recipe.checkpoint
    assert (saved.every_steps, saved.keep, recipe.sample.every_steps) == (500 // 16, 2, 500 // 16)
    assert recipe.sample.prompts == ("请给我介绍五个上海的景点", "Please tell me five scenic spots in Shanghai")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("internlm_7b_full_oasst1_e3", {"model.quantizer": "none", "train.lr": 2e-5, "template.name": "internlm_chat"}),
        ("llama2_7b_qlora_colorist_e5", {"train.epochs": 5, "sample.every_steps": 12}),
        ("starcoder_full_custom_pretrain_e1", {"train.epochs": 1, "sample.prompts": ()}),
        ("internlm_chat_7b_qlora_oasst1_512_e3", {"pack.max_length": 512}),
        ("llama2_7b_full_alpaca_enzh_32k_sp1", {"pack.max_length": 32768, "train.packs_per_step": 1}),
        ("llama2_70b_int8_lora_open_platypus_e1", {"model.quantizer": "int8", "adapter.r": 16, "train.lr": 3e-4}),
        ("mistral_7b_full_custom_pretrain_e1", {"template.name": None, "train.precision": "fp16"}),
        ("internlm_7b_qlora_oasst1_e3_hf", {"train.optimizer": "paged_adamw_32bit", "checkpoint.every_steps": 1000}),
        (
            "qwen3_8b_qlora_oasst1_e3",
            {"template.supervise": "unroll", "train.precision": "auto", "template.name": None},
        ),
        ("qwen2_5_7b_instruct_lora_custom_sft_e3", {"model.quantizer": "none", "pack.max_length": 4096}),
    ],
)
def test_values_that_differ_from_name_to_name(name, values):
    recipe: Recipe = zoo.named_recipe(name)
    for key, value in values.items():
        section, field = key.split(".")
        assert getattr(getattr(recipe, section), field) == value, key


def test_three_sources_in_the_order_of_the_name():
    sources = zoo.named_recipe("internlm_7b_qlora_alpaca_enzh_oasst1_e3").data
    assert [source.map for source in sources] == ["alpaca", "alpaca_zh", "oasst1"]


def test_listing_by_part_of_a_name_or_glob():
    assert zoo.matching("nothing_like_it", zoo.names()) == []
    assert zoo.matching("QLORA", zoo.names()) == zoo.matching("*qlora*", zoo.names()) != []
    assert zoo.matching("", zoo.names()) == list(zoo.names()) == sorted(zoo.names())
    assert zoo.matching("qwen3_8b_qlora_oasst1_e?", zoo.names()) == ["qwen3_8b_qlora_oasst1_e3"]


def test_a_recipe_by_name_or_path(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[pack]\nmax_length = 64\n", encoding="utf-8")
    assert zoo.named_recipe(str(file)).pack.max_length == 64
    assert f"did you mean {NAME!r}?" in refusal(zoo.named_recipe, "internlm_chat_7b_qlora_oast1_e3")
    assert "did you mean 'qwen1_5_7b_qlora_alpaca_e3'?" in refusal(zoo.named_recipe, "qwen1.5_7b_qlora_alpaca_e3")
    assert "`corefit recipes qwen3_8b_` lists" in refusal(zoo.named_recipe, "qwen3_8b_")
    assert "did you mean" not in refusal(zoo.named_recipe, "nowhere.toml")
    assert zoo.named_recipe(NAME).where("train.lr").startswith(f"{NAME}:")
    assert "glm4_9b_chat" in refusal(zoo.named_recipe, "chatglm3_6b_qlora_oasst1_e3")


def test_copying_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert zoo.copy_recipe(NAME) == Path(f"{NAME}.toml")
    assert zoo.copy_recipe(NAME, "new/") == Path("new") / f"{NAME}.toml"
    assert zoo.copy_recipe(NAME, ".", "_copy") == Path(f"{NAME}_copy.toml")
    assert zoo.copy_recipe(NAME, tmp_path / "x.toml").read_text("utf-8") == zoo.recipe_text(NAME)
    assert "is there already" in refusal(zoo.copy_recipe, NAME)
    assert load_recipe(tmp_path / "x.toml") == zoo.named_recipe(NAME)
    assert zoo.copy_recipe("x.toml", "y.toml").read_bytes() == (tmp_path / "x.toml").read_bytes()


def test_data_that_is_a_folder_of_a_hub_data_set_is_got_by_the_name_of_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [source] = zoo.named_recipe("starcoder_qlora_stack_exchange_example").data
    assert source.path == str(tmp_path / "ArmelR" / "stack-exchange-instruction" / "data" / "finetune")
    with pytest.raises(DataError) as caught:
        find_files([source.path], base=tmp_path)
    whole = tmp_path / "ArmelR" / "stack-exchange-instruction"
    got = f"hf download ArmelR/stack-exchange-instruction --repo-type dataset --local-dir {whole}"
    assert str(caught.value).endswith(got)
