"""The prompt templates of XTuner, by its names: what v0.1.23 means by them, and v0.1.9 as ``NAME@0.1.9``.

The text of each, and which of it is supervised, is XTuner's to the byte, so that an adapter that was trained there can
be talked to, and trained on, here. (``internlm_chat`` is a package of its own; ``minicpm3`` came with v0.2.0.) Where a
name says the same in both versions (``code_llama_chat``) there is no ``@0.1.9``.

What corefit does differently, and why:

==========================================  ============================================================================
XTuner                                      corefit
==========================================  ============================================================================
A ``<|im_end|>`` that a user typed is       It is encoded as the characters it is: nobody can end a turn from within.
encoded as the control token.               Markers that are plain text (``[INST]``) are counted where typed.
A tokenizer without the format's control    Refused before training, naming the token. Control tokens are one id each;
tokens gets them as text, silently.         ``[INST]`` too where the tokenizer has it as a token (Mistral v0.3).
Control tokens and the text between them    Each run of text is encoded for itself. The same ids, but for tokenizers
are encoded in one go.                      that put a space before every text (Llama 2's kind).
A system text may stand in any turn.        First, or the conversation is a counted drop (``system_not_first``).
A system text for ``minicpm``, which has    A counted drop (``system_message``).
no place for one: AttributeError.
A tokenizer without BOS: a TypeError, but   Plain-text formats write none then (``default`` on Qwen); a family's formats
Qwen's by the name of their class.          refuse a tokenizer without it. ``qwen_chat`` never writes one.
v0.1.9: an empty question leaves its        The turn is written whole. Plain text is a ``Document``, not an empty turn.
opening out (this is how it pre-trains).
ChatGLM's start tokens by their ids, if     ``[gMASK]`` and ``sop`` by name, in ``chatglm2`` and ``chatglm3``; so are
the class is called ChatGLMTokenizer.       ``<|user|>`` and its like in ``chatglm3``, which were encoded as text.
``moss_sft`` stops at ``<eoc>``, ``<eom>``  At EOS, which is what training puts there; few tokenizers have the others.
in the text.
``gemma`` stops at ``<end_of_turn>``.       At the EOS too: both are learnt. (So in all formats: what training puts at
                                            an answer's end always ends one.)
``minicpm3`` also stops at                  Not here: its tokenizer has no such token.
``<|endoftext|>``.
``deepseekcoder``, deprecated.              Kept: the same as ``deepseek_coder``.
One ``output_with_loss`` in a file masks    A missing flag is missing, never False.
all turns without it.
The template is known to the config only.   Its Jinja and its stops are written beside the adapter.
==========================================  ============================================================================

Kept although it is odd, because the name promises it: Llama 2's system text in an ``[INST]`` block of its own, behind
Meta's; a system block for Mistral, DeepSeek-MoE and Gemma, which know none; Vicuna's, WizardLM's and DeepSeek-Coder's
preambles only where there is a system text; no end token after Zephyr's questions; a BOS before every turn; no default
system text for Qwen. What the model's makers wrote is ``--template tokenizer``; ``corefit templates --diff`` compares.
(v0.1.12, and it alone, wrote ``[UNUSED_TOKEN_146]`` and ``[UNUSED_TOKEN_145]`` in ``internlm2_chat``.)

Source: InternLM/xtuner, ``xtuner/utils/templates.py`` (strings), ``xtuner/dataset/map_fns/template_map_fn.py`` and
``xtuner/dataset/utils.py`` (what is written around and between turns), tags v0.1.9, v0.1.23 and v0.2.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corefit import PromptTemplate

_CHATML: dict[str, Any] = dict(
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    assistant="<|im_start|>assistant\n",
    suffix="<|im_end|>",
    separator="\n",
    control=("<|im_start|>", "<|im_end|>"),
)
_INST: dict[str, Any] = dict(system="[INST] {content} [/INST]\n", user="[INST] {content} [/INST]", separator="\n")
_BAICHUAN: dict[str, Any] = dict(system="{content}\n", separator="\n")
_CHATGLM: dict[str, Any] = dict(start=("[gMASK]", "sop"))
_VICUNA: dict[str, Any] = dict(
    system=(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. {content}\n "
    ),
    user="USER: {content} ASSISTANT:",
    assistant="ASSISTANT:",
    separator="\n",
)
_DEEPSEEK_CODER: dict[str, Any] = dict(
    system=(
        "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeekCompany, and "
        "you only answer questions related to computer science. For politically sensitive questions, security and "
        "privacy issues, and other non-computer science questions, you will refuse to answer. {content}\n"
    ),
    user="### Instruction:\n{content}\n### Response:\n",
    assistant="### Response:\n",
    separator="\n",
)
_LLAMA2_SYSTEM = (
    "[INST] <<SYS>>\n You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n{content}\n"
    "<</SYS>>\n [/INST]"
)

_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": (
        "<|User|>:...<|Bot|>:... in plain text",
        dict(
            system="<|System|>:{content}\n",
            user="<|User|>:{content}\n<|Bot|>:",
            assistant="<|Bot|>:",
            separator="\n",
        ),
    ),
    "zephyr": (
        "Zephyr: <|user|>, <|assistant|> in plain text",
        dict(
            system="<|system|>\n{content}\n",
            user="<|user|>\n{content}\n<|assistant|>\n",
            assistant="<|assistant|>\n",
            separator="\n",
        ),
    ),
    "internlm2_chat": ("InternLM 2 and 2.5: ChatML after one BOS", _CHATML),
    "moss_sft": (
        "MOSS data on any base: <|Human|>: ...<eoh> in plain text",
        dict(system="{content}\n", user="<|Human|>: {content}<eoh>\n", separator="\n"),
    ),
    "llama2_chat": (
        "Llama 2 as XTuner had it: the system text in an [INST] block of its own",
        dict(system=_LLAMA2_SYSTEM + " ", user="[INST] {content} [/INST]", separator="\n"),
    ),
    "code_llama_chat": (
        "Code Llama: the system text, then [INST] ... [/INST]",
        dict(system="{content}\n", user="[INST] {content} [/INST]"),
    ),
    "chatglm2": (
        "ChatGLM2: [Round 1], 问：..., 答：...",
        dict(
            **_CHATGLM,
            system="{content}\n",
            user="[Round {round}]\n\n问：{content}\n\n答：",
            assistant="答：",
            separator="\n\n",
            control=("[gMASK]", "sop"),
        ),
    ),
    "chatglm3": (
        "ChatGLM3: <|user|>, <|assistant|>",
        dict(
            **_CHATGLM,
            system="<|system|>\n{content}",
            user="<|user|>\n{content}<|assistant|>\n",
            assistant="<|assistant|>\n",
            separator="\n",
            control=("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>"),
        ),
    ),
    "qwen_chat": (
        "Qwen, Qwen1.5, Qwen2: ChatML, no BOS, no default system text",
        {
            **_CHATML,
            "bos": "none",
            "stop": ("<|im_end|>", "<|endoftext|>"),
            "control": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        },
    ),
    "baichuan_chat": (
        "Baichuan 13B Chat: <reserved_102>, <reserved_103>",
        dict(
            **_BAICHUAN,
            user="<reserved_102>{content}<reserved_103>",
            assistant="<reserved_103>",
            control=("<reserved_102>", "<reserved_103>"),
        ),
    ),
    "baichuan2_chat": (
        "Baichuan 2 Chat: <reserved_106>, <reserved_107>",
        dict(
            **_BAICHUAN,
            user="<reserved_106>{content}<reserved_107>",
            assistant="<reserved_107>",
            control=("<reserved_106>", "<reserved_107>"),
        ),
    ),
    "wizardlm": ("WizardLM: USER: ... ASSISTANT: in plain text", _VICUNA),
    "wizardcoder": (
        "WizardCoder: ### Instruction:, ### Response: in plain text",
        dict(
            system=(
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n{content}\n "
            ),
            user="### Instruction:\n{content}\n\n### Response:",
            assistant="### Response:",
            separator="\n\n",
        ),
    ),
    "vicuna": ("Vicuna: USER: ... ASSISTANT: in plain text", _VICUNA),
    "deepseek_coder": ("DeepSeek Coder: ### Instruction:, ### Response: in plain text", _DEEPSEEK_CODER),
    "deepseekcoder": ("deepseek_coder, by its older name", _DEEPSEEK_CODER),
    "deepseek_moe": ("DeepSeek MoE: [INST] ... [/INST]", _INST),
    "deepseek_v2": (
        "DeepSeek V2: User: ..., Assistant: ...",
        dict(
            system="{content}\n\n",
            user="User: {content}\n\nAssistant: ",
            assistant="Assistant: ",
            suffix="<｜end▁of▁sentence｜>",
            control=("<｜end▁of▁sentence｜>",),
        ),
    ),
    "mistral": ("Mistral 7B Instruct: [INST] ... [/INST]", _INST),
    "mixtral": ("Mixtral 8x7B Instruct: [INST] ... [/INST]", _INST),
    "minicpm": (
        "MiniCPM: <用户> ... <AI> in plain text; no system message",
        dict(user="<用户> {content} <AI>", assistant="<AI>", separator="\n"),
    ),
    "minicpm3": ("MiniCPM3: ChatML after one BOS", _CHATML),
    "gemma": (
        "Gemma, with a system turn that XTuner added; <end_of_turn> and EOS",
        dict(
            system="<start_of_turn>system\n{content}<end_of_turn>\n",
            user="<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
            assistant="<start_of_turn>model\n",
            suffix="<end_of_turn>",
            separator="\n",
            control=("<start_of_turn>", "<end_of_turn>"),
            bos="turn",
            eos=True,
        ),
    ),
    "cohere_chat": (
        "Command R: turn and role tokens",
        dict(
            system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
            user=(
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>"
                "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
            ),
            assistant="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            suffix="<|END_OF_TURN_TOKEN|>",
            control=(
                "<|START_OF_TURN_TOKEN|>",
                "<|END_OF_TURN_TOKEN|>",
                "<|SYSTEM_TOKEN|>",
                "<|USER_TOKEN|>",
                "<|CHATBOT_TOKEN|>",
            ),
        ),
    ),
    "llama3_chat": (
        "Llama 3 Instruct: header tokens, <|eot_id|>",
        dict(
            system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
            user=(
                "<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"
            ),
            assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
            suffix="<|eot_id|>",
            control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ),
    ),
    "phi3_chat": (
        "Phi-3: <|user|>, <|assistant|>, <|end|> after one BOS",
        dict(
            system="<|system|>\n{content}<|end|>\n",
            user="<|user|>\n{content}<|end|>\n<|assistant|>\n",
            assistant="<|assistant|>\n",
            suffix="<|end|>",
            separator="\n",
            control=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        ),
    ),
}
"""Name -> summary, strings. Without ``bos``: one BOS where there is a suffix, else BOS and EOS around every turn."""

_OLDER: dict[str, dict[str, Any]] = {
    "default": {},
    "zephyr": {},
    "moss_sft": dict(user="<|Human|>: {content}<eoh>"),
    "llama2_chat": dict(system=_LLAMA2_SYSTEM),
    "chatglm2": dict(user="\n\n[Round {round}]\n\n问：{content}\n\n答："),
    "chatglm3": {},
    "qwen_chat": dict(
        system="\n<|im_start|>system\n{content}<|im_end|>",
        user="\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
        eos=True,
        stop=(),
        control=("<|im_start|>", "<|im_end|>"),
    ),
    "baichuan_chat": {},
    "baichuan2_chat": {},
    "wizardlm": dict(system=_VICUNA["system"][:-1], user="USER: {content} ASSISTANT: ", assistant="ASSISTANT: "),
}
"""What v0.1.9 wrote otherwise, beside having neither suffix nor separator: EOS ended every answer."""


def corefit_prompt_templates() -> Iterator[PromptTemplate]:
    """Yield them all."""
    for name, (summary, strings) in _FORMATS.items():
        tag = "v0.2.0" if name == "minicpm3" else "v0.1.23"
        yield _template(name, summary, strings, f"XTuner {tag}, PROMPT_TEMPLATE.{name}")
    internlm = dict(
        system="<|System|>:{content}\n",
        user="<|User|>:{content}<eoh>\n<|Bot|>:",
        assistant="<|Bot|>:",
        control=("<eoh>",),
    )
    older = {name: _FORMATS[name][1] | dict(suffix="", separator="") | changes for name, changes in _OLDER.items()}
    for name, strings in {"internlm_chat": internlm, **older}.items():
        summary = f"{name} as XTuner v0.1.9 had it: EOS after every answer"
        yield _template(f"{name}@0.1.9", summary, strings, f"XTuner v0.1.9, PROMPT_TEMPLATE.{name}")


def _template(name: str, summary: str, strings: dict[str, Any], source: str) -> PromptTemplate:
    around = dict(bos="first") if strings.get("suffix") else dict(bos="turn", eos=True)
    need_bos = bool(strings.get("control"))  # a format of plain text goes with any tokenizer
    return PromptTemplate.from_strings(
        name=name, summary=summary, source=source, **{**around, "need_bos": need_bos, **strings}
    )
