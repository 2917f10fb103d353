"""Every classic recipe has the values that XTuner v0.1.23's configuration of its name has, but for named differences.

``golden/xtuner_values.json`` holds what was read there, in the recipe's keys: ``every`` is what most have, ``recipes``
what one has besides, ``prompts`` the questions by name; null ones are texts of others, which are not kept.
"""

from __future__ import annotations

import json
import os
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from corefit import zoo
from corefit.recipe import Data, Recipe, flat, parse_recipe

READ = json.loads((Path(__file__).parents[1] / "golden" / "xtuner_values.json").read_text("utf-8"))
OURS = (
    ("llama2_70b_full_wizardlm_e1", "train.epochs", 1, "its name says one epoch, XTuner's has 3"),
    ("mistral_7b_full_finetune_custom_sft_e1", "adapter.kind", "none", "its name says full, XTuner's is QLoRA"),
    ("mistral_7b_full_finetune_custom_sft_e1", "model.quantizer", "none", "its name says full, XTuner's is QLoRA"),
    ("mistral_7b_full_finetune_custom_sft_e1", "train.lr", 2e-5, "the rate of all full fine-tuning, 2e-4 is LoRA's"),
    ("mixtral_8x7b_*qlora_*", "adapter.targets", [], "w1, w2, w3 are experts in one parameter: all linear layers"),
    ("starcoder_qlora_*", "adapter.targets", ["c_proj", "c_attn"], "no layer is named q_attn without cross-attention"),
    ("*_qlora_arxiv_gentitle_e3", "sample.prompts", [], "abstracts of others: records of the validation set are asked"),
    ("starcoder_*", "sample.prompts", [], "a benchmark's function: records of the validation set are asked"),
)
"""Name or glob, key, corefit's value, and why it is not XTuner's."""
CLASSIC = [name for name, at in zoo.names().items() if at.zoo == "xtuner"]


def values(recipe: Recipe) -> dict[str, object]:
    return {key: tomllib.loads(f"v = {text}")["v"] for key, text in flat(recipe).items()}


def read(name: str) -> dict[str, object]:
    """What v0.1.23's configuration says; corefit's default where it says nothing."""
    said = {key: value for key, value in {**READ["every"], **READ["recipes"][name]}.items() if value is not None}
    for key, value in said.items():
        if key.endswith(".path"):
            said[key] = os.path.abspath(value)
    if "sample.prompts" in said:
        said["sample.prompts"] = READ["prompts"][said["sample.prompts"]]
    sources = sum(key.startswith("data.") and key.endswith(".path") for key in said)
    return {**values(Recipe(data=(Data(),) * sources)), **said}


def differences(name: str) -> dict[str, object]:
    ours, theirs = values(parse_recipe(zoo.recipe_text(name), name=name, base=Path.cwd())), read(name)
    return {key: ours.get(key) for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)}


def test_there_is_a_row_for_every_classic_recipe():
    assert sorted(READ["recipes"]) == CLASSIC and len(CLASSIC) == 267


@pytest.mark.parametrize("name", CLASSIC)
def test_a_recipe_has_the_values_that_were_read_but_for_named_differences(name):
    named = {key: value for pattern, key, value, _ in OURS if fnmatchcase(name, pattern)}
    assert differences(name) == named


def test_every_named_difference_is_one_and_has_a_reason():
    for pattern, key, _, why in OURS:
        assert any(key in differences(name) for name in CLASSIC if fnmatchcase(name, pattern)) and len(why) > 20, key
