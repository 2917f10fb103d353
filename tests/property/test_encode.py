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
from corefit.templates import PromptTemplate
from corefit.types import Conversation, Document, Message, Sample, Unrenderable

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
@settings(max_examples=150)
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
@settings(max_examples=100)
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


SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@functools.cache
def odd_encoder(kind: str):
    """Tokenizers that have control text in their own vocabulary, rewrite text into it, or have one token for it and
    for what they don't know; and InternLM's own."""
    import json

    from tokenizers import AddedToken, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    path = SHARED / "data/tokenizer_internlm/tokenizer.model"
    if kind == "internlm":
        if not path.is_file():
            pytest.skip("the shared data folder is not here")
        return make_encoder(TEMPLATES["internlm_chat"], Tokenizer.load(path))
    chars = [*map(chr, range(32, 127)), "\n"]
    vocab = {text: i for i, text in enumerate([*SPECIAL, *chars, "a b"])}
    unk = "</s>" if kind == "unknown is the end" else "<unk>"
    if kind == "unigram":
        backend = Backend(models.Unigram([(t, -1.0) for t in SPECIAL] + [(c, -3.0) for c in chars], unk_id=0))
    elif kind == "words":
        backend = Backend(models.WordLevel(vocab, unk_token=unk))
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    else:
        backend = Backend(models.BPE(vocab, [], unk_token=unk))
        backend.normalizer = normalizers.NFKC()  # ＜/s＞ becomes </s>
    backend.add_special_tokens([AddedToken(text, normalized=kind == "nfkc") for text in SPECIAL])
    folder = Path(tempfile.mkdtemp())
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": unk}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return make_encoder(TEMPLATES["chatml"], Tokenizer.load(folder))


forged = st.lists(
    st.one_of(
        st.sampled_from(
            [*SPECIAL, *CONTROL, "＜/s＞", "＜|im_end|＞", "<", "/s>", " ", "▁", "é", "你", "\n", "<0x0A>"]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=2),
    ),
    max_size=5,
).map("".join)


@pytest.mark.parametrize("kind", ["nfkc", "unigram", "words", "unknown is the end", "internlm"])
@given(messages=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), forged), max_size=5), text=forged)
@settings(max_examples=80)
def test_no_tokenizer_gives_content_a_control_token_in_training_or_in_chat(kind, messages, text):
    made = odd_encoder(kind)
    tokenizer = made.tokenizer
    special = {
        tokenizer.token_id(t) for t in (*made.stop, *made.template.control, tokenizer.bos_token, tokenizer.eos_token)
    }
    assert special <= set(np.flatnonzero(made.forbidden).tolist())
    asked = [Message(role, content) for role, content in messages]
    before = (message._replace(supervised=False) if message.role == "assistant" else message for message in asked)
    answered = Conversation((*before, Message("assistant", "x", supervised=True)))
    for item in (Conversation(tuple(asked)), Document(text)):
        [result] = encode_each(made, [(item, "d:1")])
        if result.sample is not None:
            control = [tokenizer.token_id(s.text) for s in made.segments(item) if s.control]
            assert [id for id in result.sample.input_ids.tolist() if made.forbidden[id]] == control
    try:
        ids = made.prompt(asked)
    except Unrenderable:
        return
    segments = list(made.segments(answered))
    answer = next(i for i, segment in enumerate(segments) if segment.supervised)
    control = [tokenizer.token_id(s.text) for s in segments[:answer] if s.control]
    assert [id for id in ids.tolist() if made.forbidden[id]] == control


def test_a_character_that_a_unigram_tokenizer_does_not_know_is_no_forgery():
    made = odd_encoder("unigram")
    item = Conversation((Message("user", "é"), Message("assistant", "a")))
    assert encode_each(made, [(item, "d:1")])[0].sample is not None
    assert made.tokenizer.token_id("<unk>") in made.prompt(item.messages[:1]).tolist()
    with pytest.raises(Unrenderable, match="control_in_content"):
        made.prompt([Message("user", "a<|im_end|>")])


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
            assert ids[end - 1] in stops or sample.cuts is None
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
@settings(max_examples=150)
def test_bare_sentencepiece_model_equals_sentencepiece(texts):
    ours, theirs = internlm()
    texts = [text for text in texts if not any("\ud800" <= char <= "\udfff" for char in text)]
    assert ours.encode(texts) == theirs.encode(texts)
