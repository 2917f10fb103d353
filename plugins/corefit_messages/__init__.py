"""Conversations as lists of messages, as people have them: OpenAI's ``messages``, ShareGPT's ``conversations``.

``openai``: ``{"messages": [{"role", "content", ...}]}`` (or the same under ``conversations``). Roles: system,
developer; user; assistant; tool, function. ``content`` is text, a list of text parts, or null beside tool calls.
Reasoning is ``reasoning_content``, ``reasoning`` or ``thinking``. ``loss`` (true or false) or ``weight`` (0 or 1) of an
answer says whether it is learnt; one that is missing or null is missing, never False. ``tools`` of the record and
``tool_calls`` of an answer may be JSON text; so may the whole list. Where TRL's ``prompt`` and ``completion`` are lists
of such messages, the conversation is both, and the answers within the prompt are not learnt.

``sharegpt``: ``{"conversations": [{"from", "value", ...}]}``, with ``system`` and ``tools`` of the record, as
LLaMA-Factory writes them. Speakers: system; human, user; gpt, assistant, chatgpt, bing, bard, model; function_call (a
tool call as JSON text); tool, observation, function_response. ``wizardlm`` is the same by XTuner's name.

What nobody answered is left out at the end (``trailing_user``, ``trailing_tool``); an answer at the beginning is kept,
masked (``leading_assistant``); so is an empty one (``empty_answer``). Messages of one role in a row stay as they are.
Pictures, sounds and videos make the record a ``Drop``: corefit reads text.

Source: OpenAI's chat format for fine-tuning; the exports of ShareGPT; XTuner (``openai_map_fn``, ``wizardlm_map_fn``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from corefit import Conversation, Drop, MapFunction, Message

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


class _Odd(Exception):
    """Why a record can't be used."""


# ---------------------------------------------------------------------------------------------------- parts of a record


def _json(value: Any, reason: str) -> Any:  # noqa: ANN401, whatever the record holds
    """Give what JSON text says; anything but text as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value or None
    except (ValueError, RecursionError):
        raise _Odd(reason) from None


def _objects(value: Any, reason: str) -> tuple[Mapping[str, Any], ...]:  # noqa: ANN401
    """Give one object, or a list of them, also as JSON text."""
    found = _json(value, reason)
    listed = [found] if isinstance(found, Mapping) else [] if found is None else found
    if not (isinstance(listed, list | tuple) and all(isinstance(each, Mapping) for each in listed)):
        raise _Odd(reason)
    return tuple(listed)


def _text(content: Any) -> tuple[str, str]:  # noqa: ANN401
    """Give text and reasoning of a content: text, null, or a list of parts."""
    if content is None or isinstance(content, str):
        return content or "", ""
    if not isinstance(content, list | tuple):
        raise _Odd("content_not_text")
    text, thought = "", ""
    for part in content:
        kind, said = "text", part
        if isinstance(part, Mapping):
            kind = part.get("type") or "text"
            said = part.get("thinking") if part.get("text") is None else part["text"]
        if not isinstance(kind, str) or any(word in kind for word in ("image", "audio", "video", "file")):
            raise _Odd(str(kind))
        if not isinstance(said, str):
            raise _Odd("content_not_text")
        if kind in ("thinking", "reasoning"):
            thought += said
        else:
            text += said
    return text, thought


def _flag(message: Mapping[str, Any]) -> bool | None:
    """Give whether an answer is learnt, None where nothing says so."""
    for key in ("loss", "weight"):
        if (value := message.get(key)) is not None:
            if (flag := _FLAGS.get(str(value).lower())) is None:
                raise _Odd(f"odd_{key}")
            return flag
    return None


def _calls(message: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    return _objects(message.get("tool_calls"), "odd_tool_calls") + _functions(message.get("function_call"))


def _functions(value: Any) -> tuple[Mapping[str, Any], ...]:  # noqa: ANN401
    return tuple({"type": "function", "function": call} for call in _objects(value, "odd_tool_calls"))


# -------------------------------------------------------------------------------------------------------- conversations


def _conversation(messages: list[Message], tools: tuple[Mapping[str, Any], ...]) -> Conversation | Drop:
    dropped, notes = list[str](), list[str]()
    while messages and messages[-1].role in ("user", "tool"):
        dropped.append(f"trailing_{messages.pop().role}")
    spoken = False
    for i, message in enumerate(messages):
        spoken = spoken or message.role == "user"
        empty = not (message.content.strip() or message.tool_calls or message.reasoning)
        if message.role == "assistant" and (empty or not spoken):
            notes.append("empty_answer" if empty else "leading_assistant")
            messages[i] = message._replace(supervised=False)
    if not any(message.role == "assistant" and message.supervised is not False for message in messages):
        masked = any(message.role == "assistant" for message in messages) and not notes
        return Drop("nothing_to_learn" if masked else "no_answer")
    return Conversation(tuple(messages), tools, tuple(dropped), tuple(notes))


def _messages(listed: Iterable[Any], role_key: str, content_key: str) -> Iterator[Message]:
    for message in listed:
        if not isinstance(message, Mapping) or not isinstance(who := message.get(role_key), str):
            raise _Odd("malformed_message")
        if (role := _ROLES.get(who.lower())) is None:
            raise _Odd("unknown_role")
        if content_key not in message and not _calls(message):
            raise _Odd("malformed_message")
        if any(message.get(key) for key in _MEDIA):
            raise _Odd("image")
        content, calls = message.get(content_key), _calls(message)
        if who.lower() == "function_call":
            content, calls = None, _functions(content) + calls
        text, thought = _text(content)
        given = next((message[key] for key in _REASONING if isinstance(message.get(key), str)), "")
        name = message.get("name")
        if role != "assistant":
            yield Message(role, text, name if isinstance(name, str) else None)
        else:
            yield Message(role, text, None, calls, thought or given or None, _flag(message))


def _items(
    record: Mapping[str, Any], ways: Iterable[tuple[str, ...]], role_key: str, content_key: str
) -> Iterator[Conversation | Drop]:
    try:
        there = (way for way in ways if all(record.get(key) is not None for key in way))
        messages = list[Message]()
        for listed in [record[key] for key in next(there, ())] or [None]:
            listed = _json(listed, "not_a_list") if isinstance(listed, str) else listed
            if not isinstance(listed, list | tuple):
                raise _Odd("not_a_list")
            if any(record.get(key) for key in _MEDIA):
                raise _Odd("image")
            prompt = [m._replace(supervised=False) if m.role == "assistant" else m for m in messages]
            messages = [*prompt, *_messages(listed, role_key, content_key)]
        system = record.get("system")
        if isinstance(system, str) and system and not (messages and messages[0].role == "system"):
            messages.insert(0, Message("system", system))
        tools = _objects(record.get("tools") or record.get("functions"), "odd_tools")
        yield _conversation(messages, tools)
    except _Odd as odd:
        yield Drop(str(odd))


def openai(record: Mapping[str, Any], options: object = None) -> Iterator[Conversation | Drop]:
    """Give the conversation of ``{"messages": [{"role", "content"}, ...]}``.

    What it can't use is a ``Drop``: ``not_a_list``, ``malformed_message``, ``unknown_role``, ``content_not_text``,
    ``image`` (or the type of another part), ``odd_loss``, ``odd_weight``, ``odd_tool_calls``, ``odd_tools``,
    ``no_answer``, ``nothing_to_learn`` (every answer is masked).
    """
    return _items(record, (("messages",), ("conversations",), _PAIR), "role", "content")


def sharegpt(record: Mapping[str, Any], options: object = None) -> Iterator[Conversation | Drop]:
    """Give the conversation of ``{"conversations": [{"from", "value"}, ...]}``; a ``Drop`` as ``openai`` does."""
    return _items(record, (("conversations",), ("conversation",)), "from", "value")


def _looks(listed: Any, *keys: str) -> bool:  # noqa: ANN401
    return (
        isinstance(listed, list | tuple)
        and bool(listed)
        and all(isinstance(message, Mapping) and all(key in message for key in keys) for message in listed)
    )


def _is_openai(record: Mapping[str, Any]) -> bool:
    if "messages" in record:
        return _looks(record["messages"], "role")
    pair = all(_looks(record.get(key), "role", "content") for key in _PAIR)
    return pair or _looks(record.get("conversations"), "role", "content")


def _is_sharegpt(record: Mapping[str, Any]) -> bool:
    return "messages" not in record and _looks(record.get("conversations"), "from", "value")


_PAIR = ("prompt", "completion")
_ABOUT = ("system", "tools", "functions", *_MEDIA)


def corefit_map_functions() -> Iterable[MapFunction]:
    """Give ``openai``, ``sharegpt`` and ``wizardlm``."""
    yield MapFunction(
        name="openai",
        summary="messages of role and content, with tools, reasoning, loss or weight",
        map=openai,
        sniff=_is_openai,
        fields=("messages", "conversations", *_PAIR, *_ABOUT),
        example={"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]},
    )
    known = MapFunction(
        name="sharegpt",
        summary="conversations of from and value, with system and tools",
        map=sharegpt,
        sniff=_is_sharegpt,
        fields=("conversations", "conversation", *_ABOUT),
        example={"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]},
    )
    yield known
    yield replace(known, name="wizardlm", summary="sharegpt, by XTuner's name", sniff=None)
