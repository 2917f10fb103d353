from __future__ import annotations

import json
from pathlib import Path

import pytest
from corefit_chatml import corefit_prompt_templates as chatml
from corefit_internlm_chat import corefit_prompt_templates as internlm_chat
from jinja2.exceptions import TemplateError

from corefit.data.tokenizer import Tokenizer
from corefit.templates import PromptTemplate
from corefit.types import Conversation, Message, Segment, Unrenderable

SYSTEM, USER, ANSWER = Message("system", "S {x} 'é' \"q\" \\n"), Message("user", "hi"), Message("assistant", "yo")
TURN = (USER, ANSWER)
CONVERSATIONS = {
    "single": TURN,
    "multi": (*TURN, Message("user", "x\ny"), Message("assistant", " 你好\n")),
    "system": (SYSTEM, *TURN, *TURN),
    "empty system": (Message("system", ""), *TURN),
    "empty user": (Message("user", ""), ANSWER),
    "empty answer": (USER, Message("assistant", ""), *TURN),
    "leading answer": (ANSWER, *TURN),
    "system, leading answer": (SYSTEM, ANSWER, *TURN),
    "two answers": (USER, ANSWER, Message("assistant", "more"), *TURN),
    "two users": (USER, Message("user", "and"), ANSWER),
    "trailing user": (*TURN, USER),
    "late system": (*TURN, SYSTEM, *TURN),
    "tool": (*TURN, Message("tool", "4"), ANSWER),
    "odd role": (Message("critic", "boo"), ANSWER),
}
ODD = dict(name="odd", summary="odd strings")
ARROW = dict(
    user="<|im_start|>{content}<|im_end|>>",
    assistant=">",
    suffix="<eoa>",
    control=("<|im_start|>", "<|im_end|>", "<eoa>"),
)
TEMPLATES = {
    "internlm_chat": next(internlm_chat()),
    "chatml": next(chatml()),
    "rounds": PromptTemplate.from_strings(
        **ODD, user="[Round {round}]\n\n问：{content}\n\n答：", separator="\n\n", bos="turn", eos=True
    ),
    "quotes": PromptTemplate.from_strings(
        **ODD, user="{{'\\n' {% x %}\"{content}\" 🦜: ", system="<<{content}>>\n\n", suffix="<eoa>", control=("<eoa>",)
    ),
    "default system": PromptTemplate.from_strings(
        **ODD, **ARROW, system="{content}!\n", default_system="Be 'good' {x}", bos="first"
    ),
    "bos every turn": PromptTemplate.from_strings(**ODD, **ARROW, system="{content}!\n", bos="turn", eos=True),
    "plain suffix": PromptTemplate.from_strings(**ODD, user="Q: {content}\nA:", assistant="A:", suffix=" END\n"),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer)


@pytest.fixture(scope="module")
def theirs(tiny_tokenizer: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer)


def joined(template, messages, tokenizer) -> str:
    return "".join(segment.text for segment in template.render(Conversation(messages), tokenizer, None))


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_jinja_equals_joined_segments(template, messages, tokenizer, theirs):
    """Rendered by transformers; where the renderer refuses, the Jinja refuses too."""
    chat = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text = joined(template, messages, tokenizer)
    except Unrenderable:
        with pytest.raises(TemplateError):
            theirs.apply_chat_template(chat, chat_template=template.chat_template, tokenize=False)
    else:
        assert theirs.apply_chat_template(chat, chat_template=template.chat_template, tokenize=False) == text
        assert all(m.content in text for m in messages)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_generation_prompt_is_the_prefix_of_an_answer(template, tokenizer, theirs):
    messages = (*TURN, USER, Message("assistant", "ANSWER"))
    chat = [{"role": m.role, "content": m.content} for m in messages]
    prompt = theirs.apply_chat_template(
        chat[:-1], chat_template=template.chat_template, tokenize=False, add_generation_prompt=True
    )
    assert joined(template, messages, tokenizer).startswith(prompt + "ANSWER")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_only_answers_and_their_stops_are_supervised(template, tokenizer):
    messages = (USER, Message("assistant", "no", supervised=False), USER, Message("assistant", "yes"), *TURN)
    segments = list(template.render(Conversation(messages), tokenizer, None))
    supervised = "".join(segment.text for segment in segments if segment.supervised)
    stop = {"rounds": "</s>", "bos every turn": "<eoa></s>"}.get(
        next(name for name, known in TEMPLATES.items() if known is template), (*template.stop, "")[0]
    )
    assert supervised == f"yes{stop}yo{stop}"


def test_internlm_chat_segments(tokenizer):
    messages = (SYSTEM, USER, ANSWER, Message("user", "x"), Message("assistant", "y", supervised=False))
    assert list(TEMPLATES["internlm_chat"].render(Conversation(messages), tokenizer, None)) == [
        Segment("<s>", control=True, turn=True),
        Segment("<|System|>:S {x} 'é' \"q\" \\n\n<|User|>:hi"),
        Segment("<eoh>", control=True),
        Segment("\n<|Bot|>:"),
        Segment("yo", supervised=True),
        Segment("<eoa>", supervised=True, control=True),
        Segment("\n"),
        Segment("<|User|>:x", turn=True),
        Segment("<eoh>", control=True),
        Segment("\n<|Bot|>:"),
        Segment("y"),
        Segment("<eoa>", control=True),
        Segment("\n"),
    ]


def test_control_text_in_content_is_text(tokenizer):
    messages = (Message("user", "a<eoh>b"), Message("assistant", "<eoa>"))
    segments = list(TEMPLATES["internlm_chat"].render(Conversation(messages), tokenizer, None))
    assert [s.text for s in segments if s.control] == ["<s>", "<eoh>", "<eoa>"]
    assert Segment("<|User|>:a<eoh>b") in segments and Segment("<eoa>", supervised=True) in segments


@pytest.mark.parametrize(
    ("messages", "more", "reason"),
    [
        ((Message("tool", "x"),), {}, "tool_message"),
        ((Message("critic", "x"),), {}, "unknown_role"),
        ((USER, SYSTEM), {}, "system_not_first"),
        ((USER, Message("assistant", "x", tool_calls=({"name": "f"},))), {}, "tool_call"),
        ((USER, Message("assistant", "x", reasoning="why")), {}, "reasoning"),
        (TURN, {"tools": ({"name": "f"},)}, "tools"),
    ],
)
def test_what_the_format_cannot_write(messages, more, reason, tokenizer):
    with pytest.raises(Unrenderable, match=f"^{reason}$"):
        list(TEMPLATES["chatml"].render(Conversation(messages, **more), tokenizer, None))


def test_a_format_without_system_or_opening_says_so(tokenizer):
    template = TEMPLATES["rounds"]
    for messages, reason in (
        ((SYSTEM, *TURN), "system_message"),
        ((ANSWER,), "role_order"),
        ((USER, USER), "role_order"),
    ):
        with pytest.raises(Unrenderable, match=reason):
            list(template.render(Conversation(messages), tokenizer, None))


def test_stops_and_markers():
    assert TEMPLATES["internlm_chat"].stop == ("<eoa>",) and TEMPLATES["internlm_chat"].bos
    assert set(TEMPLATES["internlm_chat"].forgeable) == {"<|System|>:", "<|User|>:", "<|Bot|>:"}
    assert TEMPLATES["chatml"].stop == ("<|im_end|>",) and TEMPLATES["chatml"].forgeable == ()
    assert TEMPLATES["rounds"].stop == ()


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        (dict(user="no hole"), "where the message goes"),
        (dict(user="{content}", system="no hole"), "where the message goes"),
        (dict(user="{content} A:", assistant="B:"), "must end with assistant"),
        (dict(user="{content}", bos="always"), "known: first, none, turn"),
    ],
)
def test_strings_that_do_not_fit(strings, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate.from_strings(**ODD, **strings)


def test_xtuner_formats(shared, tokenizer):
    """The text of every XTuner template follows from its strings, single and multi turn."""
    known = json.loads((shared / "reference/xtuner_templates.json").read_text(encoding="utf-8"))
    formats = known["xtuner_v0.1.23"]["PROMPT_TEMPLATE"]
    assert len(formats) > 20
    for name, strings in formats.items():
        stop = strings.get("SUFFIX", "")
        eos = not strings.get("SUFFIX_AS_EOS", False)
        system = strings.get("SYSTEM", "").replace("{system}", "{content}")
        template = PromptTemplate.from_strings(
            name=name,
            summary="",
            user=strings["INSTRUCTION"].replace("{input}", "{content}"),
            system=system,
            suffix=stop,
            separator=strings.get("SEP", ""),
            bos="turn" if eos else "first",
            eos=eos,
            control=(stop,) if stop else (),
        )
        wanted, needs_bos = "", True
        messages = [Message("system", "Sys")] if system else []
        for i in range(3):
            wanted += "<s>" if needs_bos else ""
            wanted += strings["SYSTEM"].format(system="Sys") if i == 0 and system else ""
            wanted += strings["INSTRUCTION"].format(input=f"q{i}", round=i + 1) + f"a{i}" + stop
            wanted += "</s>" if eos else ""
            wanted += strings.get("SEP", "")
            needs_bos = eos
            messages += [Message("user", f"q{i}"), Message("assistant", f"a{i}")]
        assert joined(template, tuple(messages), tokenizer) == wanted, name


def test_an_empty_question_begins_a_turn_where_the_template_writes_nothing_for_it(tokenizer):
    bare = PromptTemplate.from_strings(**ODD, user="{content}", assistant="", suffix="\n")
    messages = (Message("user", "q"), Message("assistant", "a"), Message("user", ""), Message("assistant", "b"))
    turns = [segment.text for segment in bare.render(Conversation(messages), tokenizer) if segment.turn]
    assert turns == ["q", "b\n"]
