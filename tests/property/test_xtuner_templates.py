from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from corefit_xtuner_templates import corefit_prompt_templates as xtuner_templates
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import encode_each
from tiny import write_tokenizer

from corefit.data.encode import make_encoder
from corefit.data.tokenizer import Tokenizer
from corefit.types import Conversation, Message, Unrenderable

TEMPLATES = {template.name: template for template in xtuner_templates()}
CONTROL = sorted({token for template in TEMPLATES.values() for token in (*template.control, *template.stop)})
MARKERS = sorted({marker for template in TEMPLATES.values() for marker in template.forgeable})


@functools.cache
def encoder(name: str):
    folder = write_tokenizer(Path(tempfile.mkdtemp()), control=CONTROL, vocab_size=600)
    return make_encoder(TEMPLATES[name], Tokenizer.load(folder))


pieces = st.sampled_from(
    [*CONTROL, *MARKERS, "<s>", "</s>", "\n", " ", "{content}", "{round}", "{{", "'", "\\", "你", "a"]
)
contents = st.lists(st.one_of(pieces, st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), max_size=5)
roles = st.sampled_from(["system", "user", "user", "assistant", "assistant", "tool"])
conversations = st.lists(st.tuples(roles, contents.map("".join)), min_size=1, max_size=7)


@given(name=st.sampled_from(sorted(TEMPLATES)), conversation=conversations)
@settings(max_examples=600)
def test_segments_are_the_jinjas_text_and_nothing_typed_is_control(name, conversation):
    made = encoder(name)
    jinja = TEMPLATES[name].chat_template
    chat = [{"role": role, "content": content} for role, content in conversation]
    item = Conversation(tuple(Message(role, content) for role, content in conversation))
    [result] = encode_each(made, [(item, "d:1")])
    try:
        segments = made.segments(item)
        text = "".join(segment.text for segment in segments)
    except Unrenderable as refusal:
        assert result.drop == refusal.reason
        return
    assert text == made.tokenizer.render_chat(chat, chat_template=jinja)
    if result.sample is None:
        assert result.drop == "nothing_supervised" and "assistant" not in [role for role, _ in conversation]
        return
    ids = result.sample.input_ids.tolist()
    assert made.tokenizer.decode(ids) == text
    control = [made.tokenizer.token_id(segment.text.strip()) for segment in segments if segment.control]
    assert [id for id in ids if made.forbidden[id]] == control
    answers = [content for role, content in conversation if role == "assistant"]
    supervised = "".join(made.tokenizer.decode(ids[start:end]) for start, end in result.sample.spans.tolist())
    ends = "".join(stop for stop in made.stop if stop != "<|endoftext|>")
    assert supervised == "".join(answer + ends for answer in answers)
