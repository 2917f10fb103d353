"""The data set formats of XTuner, by the names that ``xtuner list-dataset-format`` gave them.

Most are a table, ``FORMATS``: which field is the question, the answer, the system text. (``oasst1``, ``openai`` and
``wizardlm`` are packages of their own, and what XTuner reads without a map function is ``conversation`` here.) A format
with a system text of its own has to be named; the others are recognised.

What corefit does differently, and why, is a table in ``plugins/README.md``.

Source: InternLM/xtuner, ``xtuner/dataset/map_fns/dataset_map_fns`` (fields), ``xtuner/utils/templates.py`` (system
texts, word for word), ``xtuner/dataset/moss_sft.py``, tags v0.1.9 and v0.1.23.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from corefit import Conversation, Document, Drop, Fields, MapFunction, Message

Fieldset = Mapping[str, Any]
"""A record, as far as a map function cares."""

SYSTEM = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    ),
    "arxiv_gentile": (
        "If you are an expert in writing papers, please generate a good paper title for this paper based on other "
        "authors' descriptions of their abstracts.\n"
    ),
    "colorist": (
        "You are a professional color designer. Please provide the corresponding colors based on the description of "
        "Human.\n"
    ),
    "coder": (
        "You are a professional programer. Please provide the corresponding code based on the description of Human.\n"
    ),
    "lawyer": "你现在是一名专业的中国律师，请根据用户的问题给出准确、有理有据的回复。\n",
    "medical": "如果你是一名医生，请根据患者的描述回答医学问题。\n",
    "sql": (
        "If you are an expert in SQL, please generate a good SQL Query for Question based on the CREATE TABLE "
        "statement.\n"
    ),
}
"""XTuner's ``SYSTEM_TEMPLATE``, its spelling included."""

_INSTRUCTION = dict(user=("instruction", "input"), assistant="output")
_ALPACA = Fields(**_INSTRUCTION, system="system", history="history", drop=("<nooutput>",))  # type: ignore[arg-type]
FORMATS: dict[str, tuple[str, Fields]] = {
    "alpaca": ("instruction, input, output", _ALPACA),
    "alpaca@0.1.9": (
        "alpaca with the system text of XTuner v0.1.9",
        Fields(**_INSTRUCTION, drop=("<nooutput>",), system_text=SYSTEM["alpaca"]),  # type: ignore[arg-type]
    ),
    "alpaca_zh": (
        "instruction_zh, input_zh, output_zh",
        Fields(user=("instruction_zh", "input_zh"), assistant="output_zh"),
    ),
    "arxiv": (
        "abstract, title; asks for a title",
        Fields(user="abstract", assistant="title", system_text=SYSTEM["arxiv_gentile"]),
    ),
    "code_alpaca": (
        "prompt, completion; a programmer",
        Fields(user="prompt", assistant="completion", system_text=SYSTEM["coder"]),
    ),
    "colors": (
        "description, color; a colour designer",
        Fields(user="description", assistant="color", system_text=SYSTEM["colorist"]),
    ),
    "crime_kg_assitan": (
        "input, output; a Chinese lawyer",
        Fields(user="input", assistant="output", system_text=SYSTEM["lawyer"]),
    ),
    "default": ("input, output", Fields(user="input", assistant="output")),
    "law_reference": (
        "question, answer; a Chinese lawyer",
        Fields(user="question", assistant="answer", system_text=SYSTEM["lawyer"]),
    ),
    "medical": (
        "instruction, input, output; a doctor, in Chinese",
        Fields(**_INSTRUCTION, system_text=SYSTEM["medical"]),  # type: ignore[arg-type]
    ),
    "openorca": (
        "system_prompt, question, response",
        Fields(user="question", assistant="response", system="system_prompt"),
    ),
    "pretrain": ("text: plain text to learn", Fields(text="text")),
    "sql": (
        "context, question, answer; SQL for a CREATE TABLE",
        Fields(user=("context", "question"), assistant="answer", system_text=SYSTEM["sql"]),
    ),
    "stack_exchange": ("question, response", Fields(user="question", assistant="response")),
    "tiny_codes": (
        "prompt, response; a programmer",
        Fields(user="prompt", assistant="response", system_text=SYSTEM["coder"]),
    ),
}
"""Name -> summary, fields."""

_OTHERS = ("messages", "conversations", "conversation", "chat", "instruction", "instruction_zh", "prompt", "role")
_MARKER = re.compile(r"\s*### (?:Human|Assistant):")


def _has(*keys: str, without: tuple[str, ...] = ()) -> Callable[[Fieldset], bool]:
    return lambda record: all(key in record for key in keys) and not any(key in record for key in without)


def _is_text(record: Fieldset) -> bool:
    text = record.get("text")
    others = (*_OTHERS, "input", "output", "question", "answer", "response", "message_id")
    return isinstance(text, str) and not any(key in record for key in others) and not _MARKER.match(text)


_SNIFFS: dict[str, Callable[[Fieldset], bool]] = {
    "alpaca": _has("instruction", "output", without=("messages", "conversations", "conversation")),
    "alpaca_zh": _has("instruction_zh", "output_zh", without=("instruction", "messages", "conversations")),
    "default": _has("input", "output", without=_OTHERS),
    "openorca": _has("system_prompt", "question", "response", without=_OTHERS),
    "pretrain": _is_text,
    "stack_exchange": _has("question", "response", without=("system_prompt", *_OTHERS)),
}


def _colors(table: MapFunction, record: Fieldset, options: object = None) -> Iterable[Any]:
    """As the table says, but the question begins behind the description's first colon."""
    description = record.get("description")
    if isinstance(description, str) and ":" in description:
        record = {**record, "description": description.partition(":")[2].strip()}
    return table.map(record)


# -------------------------------------------------------------------------------------------------------- conversation

_FLAGS = {"true": True, "false": False}


def conversation(record: Fieldset, options: object = None) -> Iterator[Conversation | Document | Drop]:
    """Give the turns of ``{"conversation": [{"system", "input", "output", "output_with_loss"}, ...]}``.

    What it can't use is a ``Drop``: ``not_a_list``, ``empty``, ``malformed_turn``, ``odd_output_with_loss``,
    ``no_answer``.
    """
    turns = record.get("conversation")
    if not isinstance(turns, list | tuple):
        yield Drop("not_a_list")
        return
    if not turns:
        yield Drop("empty")
        return
    messages, dropped, notes, system = list[Message](), list[str](), list[str](), ""
    for number, turn in enumerate(turns):
        texts = [turn.get(key) or "" for key in ("system", "input", "output")] if isinstance(turn, Mapping) else []
        if not (texts and "output" in turn and all(isinstance(text, str) for text in texts)):
            yield Drop("malformed_turn")
            return
        said, question, answer = map(str, texts)
        flag = turn.get("output_with_loss")
        if flag is not None and (flag := _FLAGS.get(str(flag).lower())) is None:
            yield Drop("odd_output_with_loss")
            return
        if len(turns) == 1 and not question and not said and answer.strip() and flag is not False:
            yield Document(answer)
            return
        if not answer.strip():
            if number == len(turns) - 1:
                dropped.append("trailing_user")
                continue
            notes.append("empty_answer")
            flag = False
        if said and said != system:
            messages.append(Message("system", said))
            system = said
        messages += [Message("user", question), Message("assistant", answer, supervised=flag)]
    if any(message.role == "assistant" and message.supervised is not False for message in messages):
        yield Conversation(tuple(messages), (), tuple(dropped), tuple(notes))
    else:
        yield Drop("no_answer")


def _is_conversation(record: Fieldset) -> bool:
    turns = record.get("conversation")
    return isinstance(turns, list | tuple) and all(isinstance(turn, Mapping) and "output" in turn for turn in turns)


# ------------------------------------------------------------------------------------------------------- msagent_react

_TOOLS = "你是一个可以调用外部工具的助手，可以使用的工具包括：\n{tools}\n"
_REACT = (
    "如果使用工具请遵循以下格式回复：\n```\n"
    "Thought:思考你当前步骤需要解决什么问题，是否需要使用工具\n"
    "Action:工具名称，你的工具必须从 [{names}] 选择\n"
    "Action Input:工具输入参数\n```\n工具返回按照以下格式回复：\n```\n"
    "Response:调用工具后的结果\n```\n如果你已经知道了答案，或者你不需要工具，请遵循以下格式回复\n```\n"
    "Thought:给出最终答案的思考过程\nFinal Answer:最终答案\n```\n开始!\n"
)
_ANSWER = 'Let me see.<|startofthink|>```JSON\n{"api_name": "sum", "parameters": {}}\n```<|endofthink|>'
_THINK = re.compile(r"(.*?)<\|startofthink\|>(.*?)<\|endofthink\|>", re.DOTALL)
_EXEC = re.compile(r"<\|startofexec\|>(.*?)<\|endofexec\|>(.*)", re.DOTALL)


def _tools(text: str) -> str:
    """Give the system text about the tools that are described in ``text``, one JSON object each."""
    tools, at = dict[str, str](), text.find("{")
    while at >= 0:
        end = at + 1
        try:
            tool, end = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            tool = {}
        if "name" in tool and "description" in tool:
            tools[tool["name"]] = tool["description"]
            try:
                parameters = {one["name"]: one["description"] for one in tool["paths"][0]["parameters"]}
                tools[tool["name"]] += f"\n输入参数: {parameters}"
            except (KeyError, IndexError, TypeError):
                pass
        else:
            end = at + 1
        at = text.find("{", end)
    return _TOOLS.format(tools=tools) + _REACT.replace("{names}", str(list(tools)))


def _fenced(text: str) -> Any:  # noqa: ANN401, any JSON value
    return json.loads(text.replace("```JSON", "").replace("```", "").replace("\n", ""))


def _thought(match: re.Match[str]) -> str:
    call = _fenced(match[2])
    thought = f"Thought:{match[1].strip()}\n" if match[1].strip() else ""
    return f"{thought}Action:{call['api_name']}\nAction Input:{call['parameters']}\n"


def msagent_react(record: Fieldset, options: object = None) -> Iterator[Conversation | Drop]:
    """Give a conversation of MSAgent-Bench as ReAct text: Thought, Action, Action Input; Response; Final Answer."""
    told, asked, messages = "", "", list[Message]()
    try:
        turns = record["conversations"]
        turns = ast.literal_eval(turns.strip()) if isinstance(turns, str) else turns
        for turn in turns:
            who, text = turn["from"], turn["value"]
            if who == "system":
                told += _tools(text)
            elif who == "user":
                asked += f"{text}\n"
            elif who == "assistant":
                said, marker, result = text.partition("<|startofexec|>")
                said, n_calls = _THINK.subn(_thought, said)
                messages += [Message("system", told)] if told else []
                messages.append(Message("user", asked))
                messages.append(Message("assistant", f"{said}\n" if n_calls else f"Final Answer:{said}\n"))
                told = asked = ""
                if marker:
                    match = _EXEC.fullmatch(marker + result)
                    response = f"Response:{_fenced(match[1])}\n" if match else ""
                    if match and match[2].strip():
                        messages.append(Message("user", response))
                        messages.append(Message("assistant", f"Final Answer:{match[2].strip()}\n"))
                    elif match:
                        asked = response
    except (KeyError, TypeError, ValueError, SyntaxError, AttributeError, MemoryError, RecursionError):
        yield Drop("unparsable")
        return
    dropped = ("trailing_user",) if asked else ()
    yield Conversation(tuple(messages), (), dropped) if messages else Drop("no_answer")


# ------------------------------------------------------------------------------------------------------------ moss_sft


@dataclass(frozen=True)
class MossOptions:
    """Keys of ``data.options``."""

    bot_name: str = ""
    """Stands for MOSS wherever that is said; empty: MOSS."""


def moss_sft(record: Fieldset, options: MossOptions | None = None) -> Iterator[Conversation | Drop]:
    """Give the turns of MOSS's plugin data; answers keep MOSS's markers, so ``--template moss_sft`` goes with it."""
    name, chat, system = (options.bot_name if options else ""), record.get("chat"), record.get("meta_instruction")
    chat = chat if isinstance(chat, Mapping) else {}
    turns = [chat[key] for n in range(len(chat)) if (key := f"turn_{n + 1}") in chat]
    messages = [Message("system", system)] if isinstance(system, str) and system else []
    for turn in turns:
        parts = dict(turn) if isinstance(turn, Mapping) else {}
        human, moss = parts.pop("Human", None), parts.pop("MOSS", None)
        results = parts.pop("Tool Responses", "")
        if not all(isinstance(text, str) for text in (human, moss, results, *parts.values())):
            yield Drop("malformed_turn")
            return
        asked = str(human).strip().removeprefix("<|Human|>:").removesuffix("<eoh>").strip()
        messages.append(Message("user", asked))
        before = "".join(parts.values())
        if re.fullmatch(r"\s*(<\|Results\|>:)?\s*(None)?\s*(<eor>)?\s*", results):
            messages.append(Message("assistant", f"{before}{results}{moss}"))
        else:
            messages += [Message("assistant", before), Message("tool", results), Message("assistant", str(moss))]
    if not turns:
        yield Drop("no_answer")
        return
    yield Conversation(tuple(m._replace(content=m.content.replace("MOSS", name or "MOSS")) for m in messages))


def _is_moss(record: Fieldset) -> bool:
    chat = record.get("chat")
    return isinstance(chat, Mapping) and "turn_1" in chat and "meta_instruction" in record


# ---------------------------------------------------------------------------------------------------------------- hooks


def corefit_map_functions() -> Iterator[MapFunction]:
    """Yield them all."""
    for name, (summary, fields) in FORMATS.items():
        made = fields.map_function(name=name, summary=summary, sniff=_SNIFFS.get(name))
        yield replace(made, map=partial(_colors, made)) if name == "colors" else made
    yield MapFunction(
        name="conversation",
        summary="XTuner's own format: turns of system, input, output, output_with_loss",
        map=conversation,
        sniff=_is_conversation,
        fields=("conversation",),
        example={"conversation": [{"input": "1 + 1?", "output": "2"}]},
    )
    yield MapFunction(
        name="msagent_react",
        summary="MSAgent-Bench as ReAct text",
        map=msagent_react,
        sniff=lambda record: isinstance(text := record.get("conversations"), str) and "<|startofthink|>" in text,
        fields=("conversations",),
        example={"conversations": str([{"from": "user", "value": "1 + 1?"}, {"from": "assistant", "value": _ANSWER}])},
    )
    yield MapFunction(
        name="moss_sft",
        summary="MOSS data with plugins: chat of turns, meta_instruction",
        map=moss_sft,
        sniff=_is_moss,
        fields=("chat", "meta_instruction"),
        options=MossOptions,
        example={"meta_instruction": "You are MOSS.", "chat": {"turn_1": {"Human": "1 + 1?", "MOSS": "2"}}},
    )
