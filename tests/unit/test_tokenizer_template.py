"""The tokenizer's own chat template: exact masks, whatever shape the Jinja has."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest
from chat_shapes import SHAPES, write_shape
from corefit_tokenizer import corefit_prompt_templates as own_template
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import encode_each

from corefit.data.encode import make_encoder, parts
from corefit.data.tokenizer import Tokenizer
from corefit.errors import DataError
from corefit.types import Conversation, Message, Unrenderable

OWN = next(own_template())
SYSTEM, USER, ANSWER = Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "yo")
TWO = (USER, ANSWER, Message("user", "and?"), Message("assistant", "more"))
TYPED = "<s></s><|im_end|>\n<|im_start|>assistant\n<|eot_id|><end_of_turn>[/INST] <|end|> <｜Assistant｜> x"
CONVERSATIONS = {
    "single turn": (USER, ANSWER),
    "multi turn": TWO,
    "with system": (SYSTEM, *TWO),
    "empty system": (Message("system", ""), *TWO),
    "unicode": (Message("user", " 你好 🦜\n"), Message("assistant", " é\n 再见 \n")),
    "imitating": (Message("user", TYPED), Message("assistant", TYPED), USER, ANSWER),
    "empty answer": (USER, Message("assistant", ""), USER, ANSWER),
}
DROPS = {
    ("gemma", "with system"): "refused_by_chat_template",
    ("gemma", "empty system"): "refused_by_chat_template",
    ("mistral", "with system"): "refused_by_chat_template",
    ("mistral", "empty system"): "refused_by_chat_template",
    ("nemo", "with system"): "message_not_located",  # it moves with every turn
    ("nemo", "empty system"): "message_not_located",
}


@functools.cache
def encoder(name: str, supervise: str = "all"):
    return make_encoder(OWN, Tokenizer.load(folder(name)), supervise=supervise)


@functools.cache
def folder(name: str) -> Path:
    return write_shape(Path(tempfile.mkdtemp()), name)


@functools.cache
def theirs(name: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder(name))


def fields(messages) -> list[dict[str, str]]:
    return [
        {"role": m.role, "content": m.content} | ({"reasoning_content": m.reasoning} if m.reasoning else {})
        for m in messages
    ]


def marked(name: str, messages, supervise: str = "all") -> str:
    """The rendering with what is supervised in brackets, checked against transformers'."""
    segments = list(encoder(name, supervise).segments(Conversation(messages), "d:1"))
    assert "".join(s.text for s in segments) == theirs(name).apply_chat_template(fields(messages), tokenize=False)
    return "".join(f"[{s.text}]" if s.supervised else s.text for s in segments).replace("][", "")


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_just_the_answers_and_their_stops_are_supervised(name, kind):
    messages, shape, made = CONVERSATIONS[kind], SHAPES[name], encoder(name)
    if reason := DROPS.get((name, kind)):
        with pytest.raises(Unrenderable, match=f"^{reason}$"):
            made.segments(Conversation(messages))
        return
    answers = [message.content for message in messages if message.role == "assistant"]
    if made.rewrites and len(answers) > 1:
        with pytest.raises(DataError, match=REWRITTEN):
            made.segments(Conversation(messages), "d:1")
        made, answers = encoder(name, "last"), answers[-1:]
    segments = list(made.segments(Conversation(messages)))
    text = theirs(name).apply_chat_template(fields(messages), tokenize=False)
    assert "".join(segment.text for segment in segments) == text
    wanted = [(answer.strip() if shape.trims else answer) + shape.after + shape.stop for answer in answers]
    [result] = encode_each(made, [(Conversation(messages), "d:1")])
    ids = result.sample.input_ids
    assert [made.tokenizer.decode(ids[a:b]) for a, b in result.sample.spans.tolist()] == wanted
    assert made.tokenizer.decode(ids) == text
    control = [made.tokenizer.token_id(segment.text) for segment in segments if segment.control]
    assert [id for id in ids.tolist() if made.forbidden[id]] == control  # nothing typed is among them


@pytest.mark.parametrize("name", SHAPES)
def test_the_prompt_is_what_training_saw_before_the_answer(name):
    made = encoder(name, "last")
    [result] = encode_each(made, [(Conversation(TWO), "d:1")])
    prompt = made.prompt(TWO[:-1])
    assert prompt.tolist() == result.sample.input_ids[: result.sample.spans[-1][0]].tolist()


REWRITTEN = "^d:1: turn 1: template 'tokenizer' writes it otherwise because turn 2 follows; .*unroll"

pieces = st.sampled_from(
    ["<|im_end|>", "</s>", "<think>", "</think>", "\n", " ", "a", "é", "[/INST]", "corefit0x", "x"]
)
contents = st.lists(pieces, max_size=5).map("".join)
turns = st.lists(st.tuples(contents, contents), min_size=1, max_size=3)


@pytest.mark.parametrize("name", SHAPES)
@given(system=st.none() | contents, turns=turns)
@settings(max_examples=40)
def test_pieces_add_up_or_the_conversation_is_a_counted_drop(name, system, turns):
    said = [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    messages = (*((Message("system", system),) if system is not None else ()), *said)
    made, shape = encoder(name, "last"), SHAPES[name]
    try:
        segments = list(made.segments(Conversation(messages)))
    except Unrenderable as refusal:
        assert refusal.reason in ("refused_by_chat_template", "message_not_located", "reasoning")
        return
    text = theirs(name).apply_chat_template(fields(messages), tokenize=False)
    assert "".join(segment.text for segment in segments) == text
    supervised = "".join(segment.text for segment in segments if segment.supervised)
    assert supervised.endswith(shape.after + shape.stop)
    answer = supervised.removesuffix(shape.stop).removesuffix(shape.after)
    opened = answer.count("<think>") + (name == "qwen3_5")  # its generation prompt has the tag
    assert answer.strip() in messages[-1].content or (opened == answer.count("</think>") == 1)


class TestThinking:
    THOUGHT = (USER, Message("assistant", "yo", reasoning="why\nnot"))
    TWICE = (*THOUGHT, Message("user", "and?"), Message("assistant", "more", reasoning="hm"))

    def test_reasoning_is_learnt_with_the_tag_that_the_model_writes(self):
        head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        rest = "why\nnot\n</think>\n\nyo<|im_end|>]\n"
        assert marked("qwen3", self.THOUGHT) == head + "[<think>\n" + rest
        assert marked("qwen3_5", self.THOUGHT) == head + "<think>\n[" + rest  # the generation prompt has the tag

    @pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "chatml", "phi3"])
    @pytest.mark.parametrize("block", ["<think>\nwhy\nnot\n</think>\n\n", "<think>why\nnot</think>"])
    def test_a_think_block_in_the_content_is_reasoning(self, name, block):
        inline = marked(name, (USER, Message("assistant", block + "yo")))
        if name.startswith("qwen3"):
            assert inline == marked(name, self.THOUGHT)
        else:
            assert f"[{block}yo{SHAPES[name].stop}]" in inline

    def test_the_header_of_an_answer_is_not_learnt_where_the_template_writes_no_generation_prompt(self, tmp_path):
        path = write_shape(tmp_path, "chatml") / "tokenizer_config.json"
        config = json.loads(path.read_text("utf-8"))
        config["chat_template"] = config["chat_template"].partition("{% if add_generation_prompt %}")[0]
        path.write_text(json.dumps(config), "utf-8")
        made = make_encoder(OWN, Tokenizer.load(tmp_path))
        content = "<think>\nwhy\n</think>\n\nyo"
        segments = made.segments(Conversation((USER, Message("assistant", content))))
        assert "".join(s.text for s in segments if s.supervised) == content + "<|im_end|>"

    def test_earlier_reasoning_that_is_left_out_stops_the_run_and_names_the_turn(self):
        with pytest.raises(
            DataError, match=r"^d:1: turn 1: .* leaves its reasoning out because turn 2 follows; .*unroll"
        ):
            encoder("qwen3").segments(Conversation(self.TWICE), "d:1")
        inline = (USER, Message("assistant", "<think>\nwhy\n</think>\n\nyo"), *TWO)
        with pytest.raises(DataError, match=r"^d:1: turn 1: "):
            encoder("qwen3").encode([(Conversation(inline), "d:1")])

    def test_last_learns_the_last_one(self):
        assert marked("qwen3", self.TWICE, "last") == (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
            "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n[<think>\nhm\n</think>\n\nmore<|im_end|>]\n"
        )

    def test_unroll_learns_every_one_as_the_model_is_asked(self):
        first, second = parts(Conversation(self.TWICE), "unroll")
        assert marked("qwen3", first.messages, "unroll") == marked("qwen3", self.THOUGHT)
        assert marked("qwen3", second.messages, "unroll") == marked("qwen3", self.TWICE, "last")

    def test_an_earlier_answer_that_is_masked_may_lose_its_reasoning(self):
        masked = self.TWICE[1]._replace(supervised=False)
        messages = (USER, masked, *self.TWICE[2:])
        assert marked("qwen3", messages) == marked("qwen3", self.TWICE, "last")

    @pytest.mark.parametrize("name", ["chatml", "llama3", "deepseek_v3", "deepseek_r1"])
    def test_a_format_that_writes_no_reasoning_is_a_counted_drop(self, name):
        items = [(Conversation(some), "d:1") for some in (self.THOUGHT, self.TWICE, TWO)]
        assert [result.drop for result in encode_each(encoder(name), items)] == ["reasoning", "reasoning", None]

    @pytest.mark.parametrize("name", SHAPES)
    @pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think></think>"])
    def test_an_empty_think_block_is_masked(self, name, block):
        supervised = f"[yo{SHAPES[name].after}{SHAPES[name].stop}]"
        assert supervised in marked(name, (USER, Message("assistant", block + "yo")))

    def test_line_breaks_that_the_template_strips_are_not_learnt(self):
        assert "\n\n[  code\n<|im_end|>]" in marked("qwen3", (USER, Message("assistant", "\n\n  code\n")))

    def test_without_reasoning_the_block_of_the_last_turn_is_masked(self):
        text = marked("qwen3", TWO, "last")
        assert "assistant\nyo<|im_end|>" in text and "assistant\n<think>\n\n</think>\n\n[more<|im_end|>]" in text

    def test_an_earlier_answer_that_would_be_asked_for_behind_another_text_is_refused_and_its_turn_named(self):
        """Not one that is masked anyway, nor a conversation of one turn; every turn for itself is as it is asked."""
        made = encoder("qwen3")
        with pytest.raises(DataError, match=REWRITTEN):
            made.segments(Conversation(TWO), "d:1")
        three = (*TWO[:1], TWO[1]._replace(supervised=False), *TWO[2:], *TWO[2:])
        with pytest.raises(DataError, match="^d:1: turn 2: template .* because turn 3 follows"):
            made.segments(Conversation(three), "d:1")
        masked = (USER, ANSWER._replace(supervised=False), *TWO[2:])
        assert marked("qwen3", masked) == marked("qwen3", TWO, "last")
        for part in parts(Conversation(TWO), "unroll"):
            assert "[" in marked("qwen3", part.messages, "unroll")
        assert "[yo" in marked("chatml", TWO) and "[more" in marked("chatml", TWO)

    def test_whether_a_template_rewrites_earlier_turns_is_known_at_the_start(self):
        assert {name for name in SHAPES if encoder(name).rewrites} == {"qwen3", "qwen3_5"}
