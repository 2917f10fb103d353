"""The chat template that the model's own tokenizer carries.

Nothing is searched for. The Jinja is rendered twice: with the messages, and with a sentinel in place of each. The
second rendering says what the Jinja writes around the messages; the pieces must then add up to the first, character by
character. So an answer is known by construction: from the end of what precedes it to the first control token after it.

Thinking: where a message has ``reasoning``, or its content begins with ``<think>...</think>``, the answer begins where
the Jinja's generation prompt ends, so that an opening tag is learnt just where the model has to write it; where there
is no such prompt, where an answer without a thought begins. Many
templates (Qwen3's, say) leave the reasoning of earlier turns out. Where that would lose a supervised one, the run stops
and names the turn: ``template.supervise = "unroll"`` makes a sample of every turn, as it is when the model answers. A
think block that is empty is the template's, not the answer's, and never supervised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from corefit import Conversation, DataError, Message, PromptTemplate, Segment, Tokenizer, Unrenderable

ROLES = ("system", "user", "assistant", "tool")
_INLINE = re.compile(r"(?P<open>\s*<think>\s*)(?P<thought>.*?)(?P<close>\s*</think>\s*)(?P<content>.*)", re.DOTALL)


class _Piece(NamedTuple):
    """What the data says, where the rendering has it."""

    message: int
    thought: bool
    """True: the message's reasoning. False: its content."""
    text: str


def corefit_prompt_templates() -> Iterator[PromptTemplate]:
    """Yield ``tokenizer``."""
    yield PromptTemplate(
        name="tokenizer",
        summary="the Jinja chat template in the model's tokenizer; answers are found by rendering twice",
        render=render,
        source="transformers, apply_chat_template",
    )


def render(item: Conversation, tokenizer: Tokenizer, options: object = None) -> Iterator[Segment]:
    """Render the whole conversation, and supervise its answers with the stop that follows.

    Text that the Jinja trims is located as trimmed. Message names are not passed on.

    Raises:
        Unrenderable: what can't be located exactly, or what the Jinja refuses.
        DataError: the reasoning of a supervised answer is left out because another turn follows.
    """
    messages = item.messages
    if item.tools or any(message.tool_calls for message in messages):
        raise Unrenderable("tools" if item.tools else "tool_call")
    if any(message.role not in ROLES for message in messages):
        raise Unrenderable("unknown_role")
    literals, pieces, tails = _locate(messages, tokenizer)
    at, runs = 0, list[tuple[int, str, bool]]()  # offset, text, is it one control token
    starts, ends, turns = dict[int, bool](), set[int](), {0}  # offsets of answers and turns; of a start: is it a target
    answer: Message | None = None  # whose content precedes this literal
    for k, literal in enumerate(literals):
        tail = tails.get(k, "")
        parts = tokenizer.split_control(literal.removesuffix(tail) if tail else literal)
        parts += tokenizer.split_control(tail) if tail else []
        if answer:
            stop = next((i for i, (_, control) in enumerate(parts) if control), None)
            if stop is None or any(part.strip() for part, _ in parts[:stop]):
                raise Unrenderable("no_stop_after_answer")
            end = at + sum(len(part) for part, _ in parts[: stop + 1])
            ends.add(end)
            if k < len(pieces) and messages[pieces[k].message].role == "user":  # a turn begins at a control token
                opening = next((i for i, (_, control) in enumerate(parts[stop + 1 :]) if control), 0)
                turns.add(end + sum(len(part) for part, _ in parts[stop + 1 : stop + 1 + opening]))
        for part, control in parts:
            runs.append((at, part, control))
            at += len(part)
        if k == len(pieces):
            break
        message = messages[pieces[k].message]
        asked = message.role == "assistant"
        if asked and (pieces[k].thought or not (k and pieces[k - 1].message == pieces[k].message)):
            starts[at - len(tail)] = message.supervised is not False
        answer = message if asked and not pieces[k].thought else None
        runs.append((at, pieces[k].text, False))
        at += len(pieces[k].text)

    supervised, joined, turn = False, "", False
    bounds = {*starts, *ends, *turns}
    for offset, part, control in runs:
        if joined and (control or offset in bounds):
            yield Segment(joined, supervised, turn=turn)
            joined, turn = "", False
        if offset in bounds:
            supervised = starts.get(offset, supervised and offset not in ends)
            turn = turn or offset in turns
        if control:
            yield Segment(part, supervised, control=True, turn=turn)
            turn = False
        joined += "" if control else part
    if joined:
        yield Segment(joined, supervised, turn=turn)


def _fields(role: str, content: str, reasoning: str | None) -> dict[str, Any]:
    return {"role": role, "content": content} | ({"reasoning_content": reasoning} if reasoning else {})


def _locate(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[str], list[_Piece], dict[int, str]]:
    """Render the messages, and find them in it.

    Returns:
        What the Jinja writes around the pieces, one more than there are pieces; the pieces, trimmed as the rendering
        has them; for a thought's number, how much of what precedes it the model has to write.
    """
    everything = "".join(m.content + (m.reasoning or "") for m in messages)
    key = next(key for n in range(len(everything) + 1) if (key := f"corefit{n}x") not in everything)
    wanted = list[tuple[str, _Piece]]()  # in order, each with its sentinel
    chat = []
    for i, message in enumerate(messages):
        thought, content = message.reasoning or "", message.content
        answer = message.role == "assistant"
        inline = _INLINE.fullmatch(content) if answer and not thought else None
        if inline:  # the Jinja is shown a block like it
            thought, content = inline["thought"], inline["content"]
        if thought and answer:
            wanted.append((f"{key}{i}y", _Piece(i, True, thought)))
        wanted.append((f"{key}{i}x", _Piece(i, False, content)))
        block = inline["open"] + (thought and f"{key}{i}y") + inline["close"] if inline else ""
        reasoning = None if inline else message.reasoning and f"{key}{i}y"
        chat.append(_fields(message.role, f"{block}{key}{i}x", reasoning))
    split = re.split(f"({key}[0-9]+[xy])", tokenizer.render_chat(chat))  # literals and sentinels, in turn
    there, k = set(split[1::2]), 1
    literals, pieces, tails = list[str](), list[_Piece](), dict[int, str]()
    for sentinel, piece in wanted:
        supervised = messages[piece.message].supervised is not False
        if piece.thought and sentinel not in there:
            if supervised:
                raise _left_out(piece.message, messages, sentinel in tokenizer.render_chat(chat[: piece.message + 1]))
            continue
        if k >= len(split) or split[k] != sentinel:
            raise Unrenderable("message_not_located")
        literal = split[k - 1]
        if piece.thought:
            before = "".join(split[:k])
            asked = chat[: piece.message]
            prompt = tokenizer.render_chat(asked, add_generation_prompt=True)
            if prompt == tokenizer.render_chat(asked):  # none: as an answer without a thought
                plain = f"{key}{piece.message}x"
                prompt = tokenizer.render_chat([*asked, _fields("assistant", plain, None)]).partition(plain)[0]
            if before.startswith(prompt) and len(before) - len(prompt) <= len(literal):
                tails[len(literals)] = before[len(prompt) :]
            elif supervised:
                raise Unrenderable("no_generation_prompt")
        literals.append(literal)
        pieces.append(piece)
        k += 2
    if k != len(split):
        raise Unrenderable("message_not_located")
    literals.append(split[-1])
    text = tokenizer.render_chat([_fields(m.role, m.content, m.reasoning) for m in messages])
    at = len(literals[0])
    for k, (piece, literal) in enumerate(zip(pieces, literals[1:], strict=True)):
        if not text.startswith(piece.text + literal, at):
            forms = (form(piece.text) for form in _TRIMMED)
            found = next((form for form in forms if text.startswith(form + literal, at)), None)
            if found is None:
                raise Unrenderable("message_not_located")
            pieces[k] = piece = piece._replace(text=found)
        at += len(piece.text) + len(literal)
    if at != len(text) or not text.startswith(literals[0]):
        raise Unrenderable("message_not_located")
    return literals, pieces, tails


_TRIMMED = (
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)


def _left_out(message: int, messages: Sequence[Message], alone: bool) -> Exception:
    if not alone:  # nor would it be written if it came last
        return Unrenderable("reasoning")
    turn = sum(m.role == "user" for m in messages[:message])
    return DataError(
        f"turn {turn}: the tokenizer's chat template leaves its reasoning out because turn {turn + 1} follows; set "
        'template.supervise to "unroll" (a sample of every turn) or "last"'
    )
