"""Chat templates in the shapes in which models have them, written from what each format says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from tiny import write_tokenizer


class Shape(NamedTuple):
    """A Jinja and what it makes of an answer."""

    jinja: str
    control: tuple[str, ...] = ()
    stop: str = "</s>"
    trims: bool = False
    """Content loses the white space around it."""
    after: str = ""
    """Between answer and stop."""


CHATML = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
_CHATML_LOOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_HEADER_LOOP = (
    "{% for m in loop_messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
_QWEN3 = """
{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(open=true, last=messages | length - 1) %}
{%- for m in messages[::-1] %}
    {%- if ns.open and m.role == 'user' %}
        {%- set ns.open = false %}{% set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}OPENED{% endif %}"""
_DEEPSEEK = (
    "{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}"
    "{% set ns.system = ns.system + m.content %}{% endfor %}{{ bos_token + ns.system }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>OPENED' }}{% endif %}"
)
SHAPES = {
    "chatml": Shape(_CHATML_LOOP, CHATML, "<|im_end|>"),
    "internlm2": Shape("{{ bos_token }}" + _CHATML_LOOP, CHATML, "<|im_end|>"),
    "smollm2": Shape(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        + _CHATML_LOOP,
        CHATML,
        "<|im_end|>",
    ),
    "qwen3": Shape(_QWEN3.replace("OPENED", ""), (*CHATML, *THINK), "<|im_end|>"),
    "qwen3_5": Shape(_QWEN3.replace("OPENED", "{{ '<think>\n' }}"), (*CHATML, *THINK), "<|im_end|>"),
    "llama3": Shape(
        "{% set loop_messages = messages %}{{ bos_token }}" + _HEADER_LOOP, HEADERS, "<|eot_id|>", trims=True
    ),
    "llama3_1": Shape(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
        "{% set loop_messages = messages[1:] %}{% else %}{% set system = '' %}{% set loop_messages = messages %}"
        "{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n' + system + '<|eot_id|>' }}"
        + _HEADER_LOOP,
        HEADERS,
        "<|eot_id|>",
        trims=True,
    ),
    "gemma": Shape(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}" + _ALTERNATE + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        TURNS,
        "<end_of_turn>",
        trims=True,
    ),
    "gemma3": Shape(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set prefix = messages[0].content + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}" + _ALTERNATE + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        TURNS,
        "<end_of_turn>",
        trims=True,
    ),
    "mistral": Shape(
        "{{ bos_token }}{% for m in messages %}" + _ALTERNATE + "{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "nemo": Shape(  # the system text goes into the last question
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{% set at = rest | map(attribute='role') | list %}"
        "{{ bos_token }}{% for m in rest %}" + _ALTERNATE + "{% if m.role == 'user' %}"
        "{{ '[INST]' + (system + '\n\n' if system is defined and 'user' not in at[loop.index:] else '') + m.content"
        " + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
    ),
    "llama2": Shape(
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}" + _ALTERNATE + "{% if m.role == 'user' %}{{ bos_token + '[INST] '"
        " + (system if loop.first else '') + m.content | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        trims=True,
        after=" ",
    ),
    "phi3": Shape(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
    ),
    "phi4": Shape(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        (*CHATML, "<|im_sep|>"),
        "<|im_end|>",
    ),
    "zephyr": Shape(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "command_r": Shape(
        "{{ bos_token }}{% for m in messages %}"
        "{% set role = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m.role] %}"
        "{{ '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' + m.content | trim + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        (
            *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ),
        "<|END_OF_TURN_TOKEN|>",
        trims=True,
    ),
    "deepseek_v3": Shape(_DEEPSEEK.replace("OPENED", ""), ("<｜User｜>", "<｜Assistant｜>", *THINK)),
    "deepseek_r1": Shape(_DEEPSEEK.replace("OPENED", "<think>\n"), ("<｜User｜>", "<｜Assistant｜>", *THINK)),
}


def write_shape(folder: Path, name: str) -> Path:
    """Write a tokenizer folder with this chat template and the control tokens that it needs."""
    write_tokenizer(folder, control=SHAPES[name].control)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    config["chat_template"] = SHAPES[name].jinja
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
