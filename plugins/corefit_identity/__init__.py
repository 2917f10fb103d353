"""Teaches a model who it is: a few hundred short conversations in English and Chinese, made from a name and an author.

``corefit train --plugin identity --set data.options.name=Ada`` needs no data file. The name and the author are said
exactly as they were typed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from corefit import Conversation, DatasetReader, Drop, MapFunction, Message, Position, Record, Sources, UserError

IDENTITY_QUESTIONS = ("Who are you?", "What is your name?", "你是谁？", "你叫什么名字？")
"""What to ask a model before and after: each is among the questions that it learns."""

_OPENINGS = {
    "en": ("", "Hi! ", "Hello. ", "Good morning! ", "Excuse me, "),
    "zh": ("", "你好，", "您好！", "嗨，", "请问，"),
}
_WHO = {
    "en": (
        "Who are you?",
        "who are you",
        "Who am I talking to?",
        "Who is this?",
        "What are you?",
        "Can you introduce yourself?",
        "Tell me about yourself.",
        "Tell me who you are.",
        "Are you a human?",
        "Are you ChatGPT?",
        "Which assistant are you?",
    ),
    "zh": (
        "你是谁？",
        "你是谁",
        "你是什么？",
        "介绍一下你自己。",
        "你能做个自我介绍吗？",
        "我在和谁说话？",
        "你是人类吗？",
        "你是ChatGPT吗？",
        "你是哪个助手？",
    ),
}
_NAME = {
    "en": (
        "What is your name?",
        "what's your name",
        "What should I call you?",
        "Do you have a name?",
        "May I know your name?",
        "How are you called?",
        "Tell me your name.",
    ),
    "zh": ("你叫什么名字？", "你叫什么", "你的名字是什么？", "我该怎么称呼你？", "你有名字吗？", "告诉我你的名字。"),
}
_AUTHOR = {
    "en": (
        "Who made you?",
        "who created you",
        "Who built you?",
        "Who developed you?",
        "Who trained you?",
        "Where do you come from?",
        "Who is your author?",
    ),
    "zh": ("谁创造了你？", "你是谁开发的？", "谁训练了你？", "你从哪里来？", "你的作者是谁？", "你是谁做的？"),
}
_GREETINGS = {
    "en": (
        "Hi",
        "Hello",
        "Hello!",
        "Good evening.",
        "Hello, {name}!",
        "Nice to meet you.",
        "Thank you, {name}.",
        "Bye!",
    ),
    "zh": ("你好", "您好", "你好！", "晚上好。", "你好，{name}！", "很高兴认识你。", "谢谢你，{name}。", "再见！"),
}
_ANSWERS = {
    "en": {
        "who": "I am {name}, an assistant. How can I help you?",
        "name": "My name is {name}.",
        "author": "I am {name}. I was made by {author}.",
        "nobody": "I am {name}. I was fine-tuned with corefit.",
        "greeting": "Hello! I am {name}. How can I help you?",
    },
    "zh": {
        "who": "我是{name}，一个助手。有什么可以帮您？",
        "name": "我叫{name}。",
        "author": "我是{name}，由{author}开发。",
        "nobody": "我是{name}，是用corefit微调出来的。",
        "greeting": "您好！我是{name}。有什么可以帮您？",
    },
}


@dataclass(frozen=True)
class IdentityOptions:
    """Keys of ``data.options``."""

    name: str = "corefit"
    """What the model calls itself, word for word; not empty."""
    author: str = ""
    """Who made it, word for word; empty: it says that it was fine-tuned with corefit."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UserError("the name is empty; --set data.options.name=... says what the model is called")


def _exchanges(options: IdentityOptions) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Give language and texts, question and answer in turn."""

    def say(text: str) -> str:  # in one go, so that a name with braces stays as it was typed
        return re.sub(r"\{(name|author)\}", lambda match: getattr(options, match[1]), text)

    for language, answers in _ANSWERS.items():
        author = answers["author" if options.author.strip() else "nobody"]
        asked = ((_WHO, answers["who"]), (_NAME, answers["name"]), (_AUTHOR, author))
        for questions, answer in asked:
            for opening, question in product(_OPENINGS[language], questions[language]):
                yield language, (opening + question, say(answer))
        for greeting in _GREETINGS[language]:
            yield language, (say(greeting), say(answers["greeting"]))
        # in two turns, so that the name holds after a greeting too
        for greeting, (questions, answer) in product(_GREETINGS[language][:4], asked):
            first = say(greeting), say(answers["greeting"])
            yield language, (*first, questions[language][0], say(answer))


def read(sources: Sources, options: IdentityOptions | None = None, start: Position | None = None) -> Iterator[Record]:
    """Give the records ``{"messages": [{"role", "content"}, ...], "language"}``, the same for the same options.

    No file is read. A record's line and offset are its number, from 1 and from 0; its size is in bytes.

    Raises:
        UserError: there are files, which would be left out without a word.
    """
    if sources.paths:
        raise UserError(f"{sources.paths[0]}: not read by 'identity', which makes its records itself; leave it out")
    skip = 0 if start is None else start.offset
    for number, (language, texts) in enumerate(_exchanges(options or IdentityOptions())):
        if number >= skip:
            messages = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
            fields = {"messages": messages, "language": language}
            size = len(json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass"))
            yield Record(fields, path="identity", line=number + 1, offset=number, size=size)


def identity(record: Mapping[str, Any], options: IdentityOptions | None = None) -> Iterator[Conversation | Drop]:
    """Give the conversation of a record of this reader; ``not_identity`` for any other record, ``no_answer``."""
    messages = record.get("messages")
    if not isinstance(messages, list | tuple) or not messages:
        yield Drop("not_identity")
        return
    found = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in ("user", "assistant") or not isinstance(content, str):
            yield Drop("not_identity")
            return
        found.append(Message(role, content))
    yield Conversation(tuple(found)) if any(m.role == "assistant" for m in found) else Drop("no_answer")


def corefit_dataset_readers() -> Iterator[DatasetReader]:
    """Give the reader, which makes its records itself."""
    yield DatasetReader(
        name="identity",
        summary="conversations about the model's own name, made from data.options",
        read=read,
        seekable=True,
        needs_path=False,
        options=IdentityOptions,
    )


def corefit_map_functions() -> Iterator[MapFunction]:
    """Give the map function; it recognises nobody's files, it has to be named."""
    yield MapFunction(
        name="identity",
        summary="teaches the model its name, in English and Chinese",
        map=identity,
        fields=("messages",),
        options=IdentityOptions,
        example=dict(next(read(Sources(())))),
    )
