"""The chat template that the model's own tokenizer carries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from corefit import Conversation, PromptTemplate, Segment, Tokenizer, Unrenderable

ROLES = ("system", "user", "assistant", "tool")


def corefit_prompt_templates() -> Iterator[PromptTemplate]:
    """Yield ``tokenizer``."""
    yield PromptTemplate(
        name="tokenizer",
        summary="the Jinja chat template in the model's tokenizer; answers are found by rendering twice",
        render=render,
        source="transformers, apply_chat_template",
    )


def render(item: Conversation, tokenizer: Tokenizer, options: object = None) -> Iterator[Segment]:
    """Render the whole conversation once, find each message in it, and supervise answers with the stop that follows.

    Messages are found by rendering again with a sentinel for each; the pieces must then add up to the first rendering,
    character by character. Text that the Jinja trims is located as trimmed. Message names are not passed on.

    Raises:
        Unrenderable: what can't be located exactly, or what the Jinja refuses.
    """
    messages = item.messages
    if item.tools or any(message.tool_calls for message in messages):
        raise Unrenderable("tools" if item.tools else "tool_call")
    if any(message.reasoning for message in messages):
        raise Unrenderable("reasoning")
    if any(message.role not in ROLES for message in messages):
        raise Unrenderable("unknown_role")
    chat = [{"role": message.role, "content": message.content} for message in messages]
    literals = _literals(chat, tokenizer)
    contents = _locate(tokenizer.render_chat(chat), literals, [message.content for message in messages])

    turn, text = True, ""  # text: an unsupervised run that has not been yielded yet
    for i, literal in enumerate(literals):
        answer = messages[i - 1] if i else None
        runs = tokenizer.split_control(literal)
        if answer and answer.role == "assistant":
            stop = next((k for k, (_, control) in enumerate(runs) if control), None)
            if stop is None or any(run.strip() for run, _ in runs[:stop]):
                raise Unrenderable("no_stop_after_answer")
            supervised = answer.supervised is not False
            if body := contents[i - 1] + "".join(run for run, _ in runs[:stop]):
                yield Segment(body, supervised)
            yield Segment(runs[stop][0], supervised, control=True)
            runs = runs[stop + 1 :]
            if i < len(messages) and messages[i].role == "user":  # a turn begins at its first control token
                start = next((k for k, (_, control) in enumerate(runs) if control), 0)
                if before := "".join(run for run, _ in runs[:start]):
                    yield Segment(before)
                runs, turn = runs[start:], True
        elif i:
            text += contents[i - 1]
        for run, control in runs:
            if not control:
                text += run
                continue
            if text:
                yield Segment(text, turn=turn)
                turn, text = False, ""
            yield Segment(run, control=True, turn=turn)
            turn = False
        if text and (i == len(messages) or messages[i].role == "assistant"):
            yield Segment(text, turn=turn)
            turn, text = False, ""


def _literals(chat: Sequence[dict[str, str]], tokenizer: Tokenizer) -> list[str]:
    """Give what the Jinja writes before, between and after the messages: one more than there are messages."""
    everything = "".join(message["content"] for message in chat)
    key = next(key for n in range(len(everything) + 1) if (key := f"corefit{n}x") not in everything)
    text = tokenizer.render_chat([{**message, "content": f"{key}{i}x"} for i, message in enumerate(chat)])
    parts = re.split(f"{key}([0-9]+)x", text)  # literals and numbers, in turn
    if parts[1::2] != [str(i) for i in range(len(chat))]:
        raise Unrenderable("message_not_located")
    return parts[::2]


def _locate(text: str, literals: Sequence[str], contents: Sequence[str]) -> list[str]:
    """Give the contents, trimmed as the rendering has them, that add up to ``text`` exactly with the literals."""
    found, at = [], len(literals[0])
    for content, literal in zip(contents, literals[1:], strict=True):
        for form in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(form + literal, at):
                break
        else:
            raise Unrenderable("message_not_located")
        found.append(form)
        at += len(form) + len(literal)
    if at != len(text) or not text.startswith(literals[0]):
        raise Unrenderable("message_not_located")
    return found
