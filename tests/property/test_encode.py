from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from corefit_chatml import corefit_prompt_templates as chatml
from corefit_internlm_chat import corefit_prompt_templates as internlm_chat
from corefit_tokenizer import corefit_prompt_templates as own_template
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import encode_each
from samples import fit_one as fit
from tiny import CONTROL, write_tokenizer

from corefit.data.encode import make_encoder
from corefit.data.tokenizer import Tokenizer
from corefit.types import Conversation, Message, PromptTemplate, Sample, Unrenderable

SHARED = Path(__file__).resolve().parents[3] / "shared"
EVERY_TURN = PromptTemplate.from_strings(
    name="every_turn",
    summary="BOS and EOS in every turn",
    system="<{content}>\n",
    user="[{round}] {content} ",
    separator="\n",
    bos="turn",
    eos=True,
)
TEMPLATES = {t.name: t for t in (next(internlm_chat()), next(chatml()), next(own_template()), EVERY_TURN)}
pieces = st.sampled_from(
    [*CONTROL, "<s>", "</s>", "<|Bot|>:", "\n", " ", "{", "'", '"', "\\", "é", "你", "🦜", "a", "system"]
)
contents = st.lists(st.one_of(pieces, st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), max_size=5).map(
    "".join
)
messages = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "assistant", "tool"]), contents), max_size=7
)
odd_texts = st.lists(
    st.one_of(
        st.sampled_from([" ", "  ", "▁", "\n", "\t", "-", "--", "=", "a", "0", "<eoa>", "de", "的"]),
        st.text(max_size=3),
    )
)


@functools.cache
def encoder(name: str, supervise: str = "all"):
    folder = Path(tempfile.mkdtemp())
    return make_encoder(TEMPLATES[name], Tokenizer.load(write_tokenizer(folder)), supervise=supervise)


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=messages)
@settings(deadline=None, max_examples=150)
def test_segments_join_to_what_the_jinja_writes(name, messages):
    made = encoder(name)
    jinja = TEMPLATES[name].chat_template
    chat = [{"role": role, "content": content} for role, content in messages]
    item = Conversation(tuple(Message(role, content) for role, content in messages))
    try:
        segments = made.segments(item)
    except Unrenderable as refusal:
        if jinja and chat and refusal.reason != "tool_message":
            with pytest.raises(Unrenderable):
                made.tokenizer.render_chat(chat, chat_template=jinja)
        return
    assert "".join(s.text for s in segments) == made.tokenizer.render_chat(chat, chat_template=jinja)
    answers = [content for role, content in messages if role == "assistant"]
    assert "".join(s.text for s in segments if s.supervised) == "".join(a + made.stop[0] for a in answers)
    assert all(made.tokenizer.token_id(s.text) is not None for s in segments if s.control)
    assert all(s.text for s in segments)


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=messages)
@settings(deadline=None, max_examples=100)
def test_samples_are_the_segments_and_content_forges_nothing(name, messages):
    made = encoder(name, "last")
    item = Conversation(tuple(Message(role, content) for role, content in messages))
    [result] = encode_each(made, [(item, "d:1")])
    if result.sample is None:
        assert result.drop
        return
    segments = made.segments(item)
    ids = result.sample.input_ids
    control = [made.tokenizer.token_id(s.text) for s in segments if s.control]
    assert [id for id in ids.tolist() if id in set(np.flatnonzero(made.forbidden).tolist())] == control
    assert made.tokenizer.decode(ids) == "".join(s.text for s in segments)
    [[start, end]] = result.sample.spans.tolist()  # the last answer only
    assert ids[end - 1] == made.stop_ids[0]
    assert made.tokenizer.decode(ids[start : end - 1]) == [c for role, c in messages if role == "assistant"][-1]


@st.composite
def samples(draw):
    """Any sample whose bounds lie where encoding puts them: turns, each with unsupervised and supervised runs."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    bounds = [0, *itertools.accumulate(lengths)]
    spans = [[a, b] for a, b in itertools.pairwise(bounds) if draw(st.booleans())]
    spans = [span for i, span in enumerate(spans) if not i or spans[i - 1][1] < span[0]]
    inside = {i for a, b in spans for i in range(a + 1, b)}
    cuts = draw(st.one_of(st.none(), st.lists(st.sampled_from(bounds[:-1]), unique=True).map(sorted)))
    return Sample(
        input_ids=np.arange(100, 100 + bounds[-1], dtype=np.int32),
        spans=np.array(spans, np.int32).reshape(-1, 2),
        origin="d:1",
        cuts=None if cuts is None else np.array([0, *(c for c in cuts if c and c not in inside)], np.int32),
    )


@given(sample=samples(), max_length=st.integers(1, 20), policy=st.sampled_from(["drop", "truncate", "split"]))
@settings(max_examples=500)
def test_fit_accounts_for_every_token(sample, max_length, policy):
    fitted = fit(sample, max_length, policy)
    kept = sum(len(s.input_ids) for s in fitted.samples)
    assert len(sample.input_ids) == kept + fitted.n_truncated_tokens + fitted.n_dropped_tokens
    assert (fitted.drop is None) == bool(fitted.samples)
    stops = {int(sample.input_ids[end - 1]) for _, end in sample.spans}
    targets = {int(sample.input_ids[i]) for start, end in sample.spans for i in range(start, end)}
    whole = len(sample.input_ids) <= max_length  # goes through as it is
    seen: list[int] = []
    for piece in fitted.samples:
        ids = piece.input_ids.tolist()
        assert len(ids) <= max_length
        assert whole or piece.n_supervised > 0
        assert piece.input_ids.dtype == piece.spans.dtype == np.int32
        last = 0
        for start, end in piece.spans.tolist():
            assert last <= start < end <= len(ids)
            assert set(ids[start:end]) <= targets
            assert ids[end - 1] in stops or (policy == "split" and sample.cuts is None)
            assert set(ids[last:start]).isdisjoint(targets) or len(ids) == max_length
            last = end
        assert piece.cuts is None or set(piece.cuts.tolist()) <= set(range(len(ids)))
        seen += ids
    assert seen == sorted(set(seen))  # in order, nothing repeated


@functools.cache
def internlm():
    sentencepiece = pytest.importorskip("sentencepiece")
    path = SHARED / "data/tokenizer_internlm/tokenizer.model"
    if not path.is_file():
        pytest.skip("the shared data folder is not here")
    ours = Tokenizer.load(path)
    ours.protect([])
    return ours, sentencepiece.SentencePieceProcessor(model_file=str(path))


@given(texts=st.lists(odd_texts.map("".join), min_size=1, max_size=20))
@settings(deadline=None, max_examples=150)
def test_bare_sentencepiece_model_equals_sentencepiece(texts):
    ours, theirs = internlm()
    texts = [text for text in texts if not any("\ud800" <= char <= "\udfff" for char in text)]
    assert ours.encode(texts) == theirs.encode(texts)
