"""The strings of a chat format -> a prompt template: its renderer, and Jinja that writes the same text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from corefit.types import Conversation, PromptTemplate, Segment, Tokenizer, Unrenderable

Run = tuple[str, bool]
"""A piece of text, and whether it is a control token."""


def template_from_strings(
    *,
    name: str,
    summary: str,
    user: str,
    assistant: str | None,
    suffix: str,
    system: str,
    separator: str,
    stop: tuple[str, ...],
    control: tuple[str, ...],
    bos: str,
    start: tuple[str, ...],
    need_bos: bool,
    eos: bool,
    source: str,
    default_system: str | None,
) -> PromptTemplate:
    """Make a template from strings; arguments as in ``PromptTemplate.from_strings``.

    Raises:
        ValueError: strings that do not fit together.
    """
    opening, control = assistant or "", tuple(dict.fromkeys((*start, *control)))
    if "{content}" not in user or (system and "{content}" not in system):
        raise ValueError(f"template {name}: user and system must say where the message goes with {{content}}")
    if not user.endswith(opening):
        raise ValueError(f"template {name}: user must end with assistant, the opening of the answer ({opening!r})")
    for token in control:
        if not any(token in text for text in (user, system, opening, suffix, separator, *start, *stop)):
            raise ValueError(f"template {name}: control has {token!r}, which is in none of its strings, nor a stop")
    if bos not in ("none", "first", "turn"):
        raise ValueError(f"template {name}: bos is {bos!r}; known: first, none, turn")
    holes = re.compile("(" + "|".join(map(re.escape, ["{content}", "{round}", *sorted(control, key=len)[::-1]])) + ")")
    strings = (user.removesuffix(opening), system, opening, suffix, separator)
    user_parts, system_parts, opening_parts, suffix_parts, separator_parts = (
        [part for part in holes.split(text) if part] for text in strings
    )

    @lru_cache(maxsize=1)
    def cut(tokenizer: Tokenizer) -> list[list[Run]]:
        """Cut the strings at control tokens: those of the format, and those that the tokenizer makes of its text."""
        return [
            [(part, own or part in control) for run, own in tokenizer.split_control(text)
             for part in ([run] if own else holes.split(run)) if part]
            for text in strings
        ]  # fmt: skip

    def fill(runs: list[Run], content: str, round: int = 0) -> list[Run]:
        values = {"{content}": content, "{round}": str(round)}
        return [(values[run[0]], False) if run[0] in values else run for run in runs]

    def render(item: Conversation, tokenizer: Tokenizer, options: object = None) -> Iterator[Segment]:
        if item.tools:
            raise Unrenderable("tools")
        user_runs, system_runs, opening_runs, suffix_runs, separator_runs = cut(tokenizer)  # type: ignore[arg-type]
        begin = [(token, True) for token in start or (tokenizer.bos_token,) if token]
        segments: list[Segment] = []
        runs: list[Run] = []
        before, new_turn, round = "", True, 0
        for i, (role, content, _, tool_calls, reasoning, supervised) in enumerate(item.messages):
            if reason := _refusal(role, before, bool(opening), bool(system) or not content):
                raise Unrenderable(reason)
            if tool_calls or reasoning:
                raise Unrenderable("tool_call" if tool_calls else "reasoning")
            if i == 0 or (before == "assistant" and role != "assistant"):
                new_turn = True
                if bos == "turn" or (bos == "first" and i == 0):
                    if not begin and need_bos:
                        raise Unrenderable("no_bos_token")
                    runs += begin
            if i == 0 and role != "system" and default_system:
                runs += fill(system_runs, default_system)
            if role == "system":
                runs += fill(system_runs, content) if content else []
            elif role == "user":
                round += 1
                runs += fill(user_runs, content, round)
            else:
                segments += join_runs(runs + opening_runs, turn=new_turn)
                answer = [(content, False), *suffix_runs]
                if eos and not tokenizer.eos_token:
                    raise Unrenderable("no_eos_token")
                answer += [(tokenizer.eos_token or "", True)] if eos else []
                segments += join_runs(answer, supervised=supervised is not False)
                segments += join_runs(separator_runs)
                runs, new_turn = [], False
            before = role
        return iter(segments + join_runs(runs, turn=new_turn))

    def write(parts: list[str]) -> str:
        values = {"{content}": "message['content']", "{round}": "count.round"}
        expressions = [values.get(part) or json.dumps(part, ensure_ascii=False) for part in parts]
        return "{{ " + " ~ ".join(expressions) + " }}" if parts else ""

    def say(reason: str) -> str:
        return "{{ raise_exception('" + f"template {name}: {reason}" + "') }}"

    def when(condition: str, text: str) -> str:
        return "{% if " + condition + " %}" + text + "{% endif %}" if text else ""

    starts = "loop.first"
    if bos == "turn":
        starts += " or (loop.previtem['role'] == 'assistant' and message['role'] != 'assistant')"
    first_system = [default_system if part == "{content}" else part for part in system_parts] if default_system else []
    wrong_order = "" if opening else say("role_order")
    chat_template = "".join(
        [
            "{% set count = namespace(round=0) %}{% for message in messages %}",
            when(starts, write([*start]) or "{{ bos_token }}") if bos != "none" else "",
            when("loop.first and message['role'] != 'system'", write(first_system)),
            "{% if message['role'] == 'system' and loop.first %}",
            when("message['content']", write(system_parts) or say("system_message")),
            "{% elif message['role'] == 'user' %}",
            when("not loop.first and loop.previtem['role'] == 'user'", wrong_order),
            "{% set count.round = count.round + 1 %}",
            write(user_parts),
            "{% elif message['role'] == 'assistant' %}",
            when("loop.first or loop.previtem['role'] != 'user'", wrong_order),
            write([*opening_parts, "{content}", *suffix_parts]),
            "{{ eos_token }}" if eos else "",
            write(separator_parts),
            "{% else %}" + say("unknown_role") + "{% endif %}{% endfor %}",
            when("add_generation_prompt", write(opening_parts)),
        ]
    )
    texts = [*system_parts, *user_parts, *opening_parts, *suffix_parts, *separator_parts]
    return PromptTemplate(
        name=name,
        summary=summary,
        render=render,
        stop=stop or ((suffix,) if suffix and (suffix in control or not eos) else ()),
        control=control,
        bos=bos != "none" and not start,
        chat_template=chat_template,
        forgeable=markers(text for text in texts if text not in (*control, "{content}", "{round}")),
        source=source,
    )


def join_runs(runs: Iterable[Run], *, supervised: bool = False, turn: bool = False) -> list[Segment]:
    """Join neighbouring text into one segment each, control tokens apart; ``turn`` marks the first."""
    segments: list[Segment] = []
    text = ""
    for run, control in runs:
        if not control:
            text += run
            continue
        if text:
            segments.append(Segment(text, supervised, False, turn))
            text, turn = "", False
        if run:
            segments.append(Segment(run, supervised, True, turn))
            turn = False
    if text:
        segments.append(Segment(text, supervised, False, turn))
    return segments


def markers(texts: Iterable[str]) -> tuple[str, ...]:
    """Give what is a marker in a format's text: short lines of words and signs (``### Response:``, not ``user``)."""
    lines = (line.strip() for text in texts for line in text.splitlines())
    mixed = (line for line in lines if re.search(r"\w", line) and re.search(r"[^\w\s]", line))
    return tuple(dict.fromkeys(line for line in mixed if len(line.split()) <= 3))


def _refusal(role: str, before: str, has_opening: bool, has_system: bool) -> str | None:
    """Say why a message can't follow one of role ``before`` (empty: it is the first), None where it can.

    ``has_system``: there is a place for a system message, or it needs none.
    """
    if role == "system":
        return "system_not_first" if before else None if has_system else "system_message"
    if role not in ("user", "assistant"):
        return "tool_message" if role == "tool" else "unknown_role"
    wrong_order = before == "user" if role == "user" else before != "user"
    return "role_order" if wrong_order and not has_opening else None
