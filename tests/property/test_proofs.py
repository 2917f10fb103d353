"""The mask proof passes on every conversation that the encoder writes, and on none with one token or target changed."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from corefit_chatml import corefit_prompt_templates as chatml
from corefit_internlm_chat import corefit_prompt_templates as internlm_chat
from corefit_tokenizer import corefit_prompt_templates as own_template
from fakes import JSONL
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import proved
from tiny import CONTROL
from tokenizers_at_hand import TOKENIZERS

from corefit import proofs
from corefit.data.block import SPAN, SPANS
from corefit.data.encode import Encoder, make_encoder
from corefit.data.stream import Source
from corefit.data.tokenizer import Tokenizer
from corefit.errors import MaskError
from corefit.prepare import Prepared
from corefit.recipe import Recipe, apply_overrides
from corefit.templates import PromptTemplate
from corefit.types import Conversation, MapFunction, Message, Record, Sources

INTERNLM = Path(__file__).resolve().parents[3] / "shared/data/tokenizer_internlm/tokenizer.model"
REAL = {"internlm": INTERNLM} if INTERNLM.is_file() else {}
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
    [*CONTROL, "<s>", "</s>", "<|Bot|>:", "\n", " ", "proof0x1x", "é", "ﬁ", "你", "🦜", "a", "user", "assistant"]
)
contents = st.lists(st.one_of(pieces, st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), max_size=5).map(
    "".join
)
messages = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant", "assistant"]), contents, st.sampled_from([None, None, True, False])
    ),
    min_size=1,
    max_size=7,
)
conversations = st.lists(st.tuples(st.none() | contents, messages), min_size=1, max_size=3)


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer.load(REAL[kind] if kind in REAL else TOKENIZERS[kind](Path(tempfile.mkdtemp())))


@functools.cache
def encoder(kind: str, name: str, supervise: str = "all") -> Encoder:
    return make_encoder(TEMPLATES[name], tokenizer_of(kind), supervise=supervise)


def item(system, talk) -> Conversation:
    head = (Message("system", system),) if system is not None else ()
    said = (Message(role, text, supervised=s if role == "assistant" else None) for role, text, s in talk)
    return Conversation((*head, *said))


def mask_proof(made: Encoder, items, *sets) -> proofs.Proof:
    recipe = apply_overrides(Recipe(), {}, ["template.min_supervised=0", *sets])
    mapped = MapFunction(name="given", summary="", map=lambda record, options: [items[record["i"]]])
    source = Source(reader=JSONL, map_function=mapped, sources=Sources(()))
    plan = Prepared(recipe, None, made.tokenizer, made.template, made, (source,), (), ())
    records = [(source, Record({"i": i}, path="d", line=i + 1, offset=0)) for i in range(len(items))]
    return next(proved(plan, records))


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    kind=st.sampled_from([*TOKENIZERS, *REAL]),
    talks=conversations,
    supervise=st.sampled_from(["all", "last"]),
    max_length=st.integers(8, 90),
    overlong=st.sampled_from(["truncate", "split", "drop"]),
)
@settings(max_examples=80)
def test_no_false_alarm(name, kind, talks, supervise, max_length, overlong):
    if kind in REAL and name not in ("internlm_chat", "every_turn"):
        kind = "byte-level"  # InternLM's tokenizer lacks the tokens of this format
    made = encoder(kind, name, supervise)
    items = [item(*talk) for talk in talks]
    facts = mask_proof(made, items, f"pack.max_length={max_length}", f"pack.overlong={overlong}").facts
    assert facts["unlocated"] == 0


@pytest.mark.parametrize("name", TEMPLATES)
@given(talk=conversations, data=st.data())
@settings(max_examples=60)
def test_no_changed_target_and_no_changed_token_passes(name, talk, data):
    made = encoder("byte-level", name)
    items = [item(*talk[0])]
    encoded = made.encode([(items[0], "d:1")])
    if not len(encoded.samples):
        return
    n = len(encoded.tokens)
    at = data.draw(st.integers(1, n - 1))

    class Wrong(Encoder):
        """Whether one token is a target, or which one it is, is changed."""

        def encode(self, items):
            made = Encoder.encode(self, items)
            if another:
                tokens = made.tokens.copy()
                tokens[at] = (tokens[at] + 1) % self.tokenizer.vocab_size
                return made._replace(tokens=tokens)
            target = np.zeros(n + 2, np.int8)
            for begin, end in made.spans.tolist():
                target[begin + 1 : end + 1] = 1
            target[at + 1] ^= 1
            spans = np.flatnonzero(np.diff(target)).reshape(-1, 2).astype(np.int64)
            samples = made.samples.copy()
            samples[:, [SPAN, SPANS]] = 0, len(spans)
            return made._replace(spans=spans, samples=samples)

    wrong = Wrong(**{field: getattr(made, field) for field in Encoder.__dataclass_fields__})
    for another in (False, True):  # noqa: B007
        with pytest.raises(MaskError, match=rf"^d:1: mask: (token {at}\b|begins with)"):
            mask_proof(wrong, items)
