"""Prompt templates, and the strings of a chat format as one: its renderer, and Jinja that writes the same text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from corefit.types import Conversation, Segment, Tokenizer, Unrenderable

Run = tuple[str, bool]
"""A piece of text, and whether it is a control token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """Item -> segments, and the same thing as Jinja for those who serve the model.

    ``from_strings`` makes both from one set of strings; only a template that needs logic writes ``render`` itself.
    """

    name: str
    """What ``--template`` says."""
    summary: str
    """One line for ``corefit plugins``."""
    render: Callable[..., Iterator[Segment]]
    """``render(item, tokenizer, options)``: content verbatim and in order; only answers, with their thoughts, and
    their stops supervised.
    An item it can't place exactly raises ``Unrenderable(reason)``, a counted drop."""
    stop: tuple[str, ...] = ()
    """Tokens that end an answer, beside the one that training puts there; empty: that one. Each is in ``control``."""
    control: tuple[str, ...] = ()
    """Tokens that only the template may write: content never yields their ids."""
    bos: bool = False
    """True: ``render`` begins every conversation with the tokenizer's BOS, where it has one or must have one."""
    chat_template: str | None = None
    """Jinja, equal to the joined segments when rendered by transformers; None: the tokenizer's own is used."""
    forgeable: tuple[str, ...] = ()
    """Markers that are plain text in this format: they can't be protected, so look-alikes in content are counted."""
    source: str = ""
    """Where the format comes from."""
    options: type | None = None
    """A frozen dataclass of what users may set as ``template.options``; ``render`` gets one."""

    def __post_init__(self) -> None:
        _check_tuples(self.name, stop=self.stop, control=self.control, forgeable=self.forgeable)

    @classmethod
    def from_strings(
        cls,
        *,
        name: str,
        summary: str,
        user: str,
        assistant: str | None = None,
        suffix: str = "",
        system: str = "",
        separator: str = "",
        stop: Sequence[str] = (),
        control: Sequence[str] = (),
        bos: str = "none",
        start: Sequence[str] = (),
        need_bos: bool = True,
        eos: bool = False,
        source: str = "",
        default_system: str | None = None,
    ) -> PromptTemplate:
        r"""Make a template, its renderer and its Jinja from the strings of a chat format.

        Args:
            name: what ``--template`` says.
            summary: one line for ``corefit plugins``.
            user: a user message and the opening of the answer, with ``{content}`` where the message goes
                (and ``{round}`` where the format counts rounds from 1).
            assistant: the opening of the answer, with which ``user`` ends: what begins an answer that no user message
                precedes; None: a conversation with such an answer is a counted drop.
            suffix: what follows the answer and is supervised with it.
            system: a system message, with ``{content}``; empty: the format has none, and a system message is a
                counted drop of the item.
            separator: follows every answer, also the last, not supervised, a segment of its own.
            stop: tokens that end an answer when the model is served, beside what training puts at its end; default:
                ``suffix``, unless it is plain text that EOS follows. Text that is no token can't stop a model.
            control: the substrings of the above that are single tokens.
            bos: ``"none"``, ``"first"`` (before the conversation) or ``"turn"`` (before every turn).
            start: the control tokens that are written there; default: the tokenizer's BOS.
            need_bos: False: with a tokenizer that has no BOS nothing is written there; True: it is refused.
            eos: append the tokenizer's EOS to every answer, supervised.
            source: where the format comes from.
            default_system: the system text where a conversation has none.

        Within a turn, system text, user text and opening are one run of text, cut only at control tokens: those named,
        and whatever else in these strings is a control token of the tokenizer in use, with the white space it swallows.
        Source: the token layout of XTuner v0.1.23 (``encode_fn``, ``template_map_fn``).

        Raises:
            ValueError: strings that do not fit together. TypeError: text, where several are expected.
        """
        _check_tuples(name, stop=stop, control=control, start=start)
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
        fixed = map(re.escape, ["{content}", "{round}", *sorted(control, key=len)[::-1]])
        holes = re.compile(f"({'|'.join(fixed)})")
        strings = (user.removesuffix(opening), system, opening, suffix, separator)
        user_parts, system_parts, opening_parts, suffix_parts, separator_parts = (
            [part for part in holes.split(text) if part] for text in strings
        )

        @lru_cache(maxsize=1)
        def cut(tokenizer: Tokenizer) -> list[list[Run]]:
            """Cut the strings at control tokens: the format's, and those that the tokenizer makes of its text."""
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
                    segments += (asked := join_runs(runs + opening_runs, turn=new_turn))
                    answer = [(content, False), *suffix_runs]
                    if eos and not tokenizer.eos_token:
                        raise Unrenderable("no_eos_token")
                    answer += [(tokenizer.eos_token or "", True)] if eos else []
                    segments += join_runs(answer, supervised=supervised is not False, turn=new_turn and not asked)
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
        told = default_system or ""
        first_system = [told if part == "{content}" else part for part in system_parts] if told else []
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
        return cls(
            name=name,
            summary=summary,
            render=render,
            stop=tuple(stop) or ((suffix,) if suffix and (suffix in control or not eos) else ()),
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


def _check_tuples(template: str, **given: Sequence[str]) -> None:
    for name, value in given.items():
        if isinstance(value, str):
            raise TypeError(f"template {template}: {name} is text, and its letters would be tokens: ({value!r},)")
