"""XTuner's configurations (v0.1.9 to v0.2.0, as copied and edited) as recipes, and answers to its commands and flags.

A configuration is read by its syntax tree and never run. How each value is taken over, and what corefit does
differently, is a table in ``plugins/README.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from corefit import ImportedRecipe, RecipeReader
from corefit_xtuner_configs.habits import HABITS

EXAMPLE = """\
from datasets import load_dataset
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.map_fns import oasst1_map_fn, template_map_fn_factory
from xtuner.model import SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE

pretrained_model_name_or_path = 'internlm/internlm-7b'
data_path = 'timdettmers/openassistant-guanaco'
prompt_template = PROMPT_TEMPLATE.internlm_chat
max_length = 2048
batch_size = 1
accumulative_counts = 16
max_epochs = 3
lr = 2e-4
tokenizer = dict(
    type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=pretrained_model_name_or_path)
model = dict(
    type=SupervisedFinetune,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=pretrained_model_name_or_path),
    lora=dict(type=LoraConfig, r=64, lora_alpha=16, lora_dropout=0.1))
train_dataset = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path=data_path),
    tokenizer=tokenizer,
    max_length=max_length,
    dataset_map_fn=oasst1_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template))
train_dataloader = dict(batch_size=batch_size, dataset=train_dataset)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=lr), accumulative_counts=accumulative_counts)
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
"""


def _read(path: Path, overrides: Sequence[str]) -> ImportedRecipe:
    from corefit_xtuner_configs.convert import convert

    return convert(path, overrides)


def corefit_recipe_readers() -> Iterable[RecipeReader]:
    """XTuner's."""
    yield RecipeReader(
        name="xtuner",
        summary="XTuner's classic configurations, v0.1.9 to v0.2.0; never run",
        read=_read,
        suffixes=(".py",),
        habits=HABITS,
        example=EXAMPLE,
    )
