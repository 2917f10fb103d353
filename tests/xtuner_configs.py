"""Configurations as XTuner's users have them: the same keys and constructs as its zoo, in words of our own."""

from __future__ import annotations

HEAD_0_1_9 = """\
import torch
from bitsandbytes.optim import PagedAdamW32bit
from datasets import load_dataset
from mmengine.dataset import DefaultSampler
from mmengine.hooks import (CheckpointHook, DistSamplerSeedHook, IterTimerHook,
                            LoggerHook, ParamSchedulerHook)
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from xtuner.dataset import ConcatDataset, process_hf_dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.map_fns import (alpaca_map_fn, alpaca_zh_map_fn,
                                    oasst1_map_fn, template_map_fn_factory)
from xtuner.engine import DatasetInfoHook, EvaluateChatHook
from xtuner.model import SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE

"""

MODEL = """\
tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    trust_remote_code=True,
    padding_side='right')
model = dict(
    type=SupervisedFinetune,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=pretrained_model_name_or_path,
        trust_remote_code=True,
        torch_dtype=torch.float16,
        quantization_config=dict(
            type=BitsAndBytesConfig,
            load_in_4bit=True,
            load_in_8bit=False,
            llm_int8_threshold=6.0,
            llm_int8_has_fp16_weight=False,
            bnb_4bit_compute_dtype=torch.float16,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type='nf4')),
    lora=dict(
        type=LoraConfig,
        r=64,
        lora_alpha=16,
        lora_dropout=0.1,
        bias='none',
        task_type='CAUSAL_LM'))
"""

V0_1_9 = (
    HEAD_0_1_9
    + """\
pretrained_model_name_or_path = 'internlm/internlm-chat-7b'
data_path = 'timdettmers/openassistant-guanaco'
prompt_template = PROMPT_TEMPLATE.internlm_chat
max_length = 2048
pack_to_max_length = True
batch_size = 1  # on each device
accumulative_counts = 16
dataloader_num_workers = 0
max_epochs = 3
optim_type = PagedAdamW32bit
lr = 2e-4
betas = (0.9, 0.999)
weight_decay = 0
max_norm = 1
evaluation_freq = 500
SYSTEM = ''
evaluation_inputs = [
    '请给我介绍五个上海的景点', 'Please tell me five scenic spots in Shanghai'
]
"""
    + MODEL
    + """\
train_dataset = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path=data_path),
    tokenizer=tokenizer,
    max_length=max_length,
    dataset_map_fn=oasst1_map_fn,
    template_map_fn=dict(
        type=template_map_fn_factory, template=prompt_template),
    remove_unused_columns=True,
    shuffle_before_pack=True,
    pack_to_max_length=pack_to_max_length)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    dataset=train_dataset,
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate_fn))
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(
        type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False),
    accumulative_counts=accumulative_counts,
    loss_scale='dynamic',
    dtype='float16')
param_scheduler = dict(
    type=CosineAnnealingLR,
    eta_min=0.0,
    by_epoch=True,
    T_max=max_epochs,
    convert_to_iter_based=True)
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(
        type=EvaluateChatHook,
        tokenizer=tokenizer,
        every_n_iters=evaluation_freq,
        evaluation_inputs=evaluation_inputs,
        system=SYSTEM,
        prompt_template=prompt_template)
]
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=10),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, interval=1),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = None
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
"""
)

_NEWER = [
    ("from bitsandbytes.optim import PagedAdamW32bit\n", "from torch.optim import AdamW\n"),
    ("import AmpOptimWrapper, CosineAnnealingLR", "import AmpOptimWrapper, CosineAnnealingLR, LinearLR"),
    (
        "from xtuner.engine import DatasetInfoHook, EvaluateChatHook\n",
        "from xtuner.engine.hooks import (DatasetInfoHook, EvaluateChatHook,\n"
        "                                 VarlenAttnArgsToMessageHubHook)\n"
        "from xtuner.engine.runner import TrainLoop\n"
        "from xtuner.parallel.sequence import SequenceParallelSampler\n",
    ),
    ("data_path =", "use_varlen_attn = False\ndata_path ="),
    (
        "accumulative_counts = 16\n",
        "sequence_parallel_size = 1\naccumulative_counts = 16\naccumulative_counts *= sequence_parallel_size\n",
    ),
    ("optim_type = PagedAdamW32bit", "optim_type = AdamW"),
    ("max_norm = 1\n", "max_norm = 1\nwarmup_ratio = 0.03\nsave_steps = 500\nsave_total_limit = 2\n"),
    ("    type=SupervisedFinetune,\n", "    type=SupervisedFinetune,\n    use_varlen_attn=use_varlen_attn,\n"),
    (
        "pack_to_max_length=pack_to_max_length)\n",
        "pack_to_max_length=pack_to_max_length,\n    use_varlen_attn=use_varlen_attn)\n",
    ),
    (
        "train_dataloader =",
        "sampler = SequenceParallelSampler \\\n    if sequence_parallel_size > 1 else DefaultSampler\ntrain_dataloader =",  # noqa: E501
    ),
    ("sampler=dict(type=DefaultSampler, shuffle=True)", "sampler=dict(type=sampler, shuffle=True)"),
    (
        "collate_fn=dict(type=default_collate_fn)",
        "collate_fn=dict(type=default_collate_fn, use_varlen_attn=use_varlen_attn)",
    ),
    (
        "param_scheduler = dict(\n    type=CosineAnnealingLR,\n    eta_min=0.0,\n    by_epoch=True,\n    T_max=max_epochs,\n"  # noqa: E501
        "    convert_to_iter_based=True)\n",
        "param_scheduler = [\n"
        "    dict(\n        type=LinearLR,\n        start_factor=1e-5,\n        by_epoch=True,\n        begin=0,\n"
        "        end=warmup_ratio * max_epochs,\n        convert_to_iter_based=True),\n"
        "    dict(\n        type=CosineAnnealingLR,\n        eta_min=0.0,\n        by_epoch=True,\n"
        "        begin=warmup_ratio * max_epochs,\n        end=max_epochs,\n        convert_to_iter_based=True)\n]\n",
    ),
    ("dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)", "dict(type=TrainLoop, max_epochs=max_epochs)"),
    (
        "default_hooks =",
        "if use_varlen_attn:\n    custom_hooks += [dict(type=VarlenAttnArgsToMessageHubHook)]\ndefault_hooks =",
    ),
    (
        "checkpoint=dict(type=CheckpointHook, interval=1)",
        "checkpoint=dict(\n        type=CheckpointHook,\n        by_epoch=False,\n        interval=save_steps,\n"
        "        max_keep_ckpts=save_total_limit)",
    ),
    ("deterministic=False)\n", "deterministic=False)\nlog_processor = dict(by_epoch=False)\n"),
]


def edited(text: str, *changes: tuple[str, str]) -> str:
    """Give the text with each change made; each must be possible exactly once."""
    for old, new in changes:
        assert text.count(old) == 1, (text.count(old), old)
        text = text.replace(old, new)
    return text


V0_1_23 = edited(V0_1_9, *_NEWER)
