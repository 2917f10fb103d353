"""For each proof a planted bug that makes exactly it fail, with its line; and no false alarm on odd tokenizers."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_shapes import write_shape
from corefit_chatml import corefit_prompt_templates as chatml
from corefit_internlm_chat import corefit_prompt_templates as internlm_chat
from corefit_tokenizer import corefit_prompt_templates as own_template
from fakes import JSONL
from samples import proved
from tiny import CHATML_JINJA, write_model, write_tokenizer
from tokenizers_at_hand import TOKENIZERS

from corefit import proofs
from corefit.data import encode
from corefit.data.block import SPANS, STOP
from corefit.data.encode import Encoder, make_encoder
from corefit.data.stream import Source
from corefit.data.tokenizer import Tokenizer
from corefit.engine import adapter
from corefit.engine.attention import decoder
from corefit.errors import CorefitError, DataError, IsolationError, MaskError, ModelError, RunError
from corefit.prepare import Prepared
from corefit.recipe import Recipe, apply_overrides
from corefit.run import train_from
from corefit.templates import PromptTemplate
from corefit.types import (
    Conversation,
    DatasetReader,
    Document,
    Drop,
    MapFunction,
    Message,
    Record,
    Segment,
    Sources,
    Unrenderable,
)

INTERNLM, CHATML, OWN = next(internlm_chat()), next(chatml()), next(own_template())
TURNS = [["user", "hi there"], ["assistant", "yo, you"], ["user", "and?"], ["assistant", "that is all"]]
ORIGIN = "rows.jsonl:1"


def map_messages(record, options):
    """A text is a document, ``null`` a drop; a third field of a message says whether it is supervised."""
    if record["m"] is None:
        yield Drop("nothing")
    elif isinstance(record["m"], str):
        yield Document(record["m"])
    else:
        yield Conversation(tuple(Message(role, text, supervised=s[0] if s else None) for role, text, *s in record["m"]))


TALK = MapFunction(name="talk", summary="", map=map_messages)


def plan_of(tokenizer, template=CHATML, *sets, items=(TURNS,), reader=JSONL):
    """A plan, and its first records."""
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    recipe = apply_overrides(Recipe(), {}, list(sets))
    encoder = make_encoder(template, tokenizer, supervise=recipe.template.supervise)
    source = Source(reader=reader, map_function=TALK, sources=Sources((Path("rows.jsonl"),)))
    plan = Prepared(recipe, None, tokenizer, template, encoder, (source,), (), ())
    return plan, [(source, Record({"m": m}, path="rows.jsonl", line=i + 1, offset=0)) for i, m in enumerate(items)]


def lines(tokenizer, template=CHATML, *sets, items=(TURNS,)) -> dict[str, str]:
    return {p.name: p.line for p in proved(*plan_of(tokenizer, template, *sets, items=items))}


def fails_first(tokenizer, template, error, *sets, items=(TURNS,)) -> str:
    """Give the one line of a failure of the first proof."""
    with pytest.raises(error) as caught:
        next(proved(*plan_of(tokenizer, template, *sets, items=items)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewritten(template: PromptTemplate, change) -> PromptTemplate:
    """A template whose segments ``change`` rewrites, but not those of the start's own check."""

    def render(item, tokenizer, options=None):
        segments = list(template.render(item, tokenizer, options))
        probing = item.messages[-1].content == "a 2"
        return iter(segments if probing else change(segments))

    return dataclasses.replace(template, render=render)


# --------------------------------------------------------------------------------------------------- what holds, said


@pytest.mark.parametrize("template", [INTERNLM, CHATML, OWN], ids=lambda t: t.name)
def test_each_proof_is_one_line_and_facts(tiny_tokenizer, template):
    items = [TURNS, [["system", "S"], *TURNS], "a document", [["user", "x"], ["assistant", ""]], None]
    plan, records = plan_of(tiny_tokenizer, template, items=items)
    found = {proof.name: proof for proof in proved(plan, records)}
    assert list(found) == ["mask", "supervised", "chat_template"]
    assert all("\n" not in proof.line for proof in found.values())
    assert json.loads(json.dumps({name: proof.facts for name, proof in found.items()}))
    samples = plan.encoder.encode([(map_messages({"m": m}, None).__next__(), ORIGIN) for m in items[:4]]).samples
    n_supervised, n_tokens = int(samples[:, 5].sum()), int(samples[:, 1].sum())
    assert found["mask"].facts == {"samples": 4, "supervised": n_supervised, "rewritten": 0, "unlocated": 0}
    assert found["mask"].line == (
        "mask: 4 samples of the first records are what their messages say, token for token; only answers and their "
        f"{plan.encoder.stop[0]} are supervised; {'one BOS' if template is INTERNLM else 'no BOS added'}"
    )
    assert found["supervised"].facts == {"share": n_supervised / n_tokens, "samples": 4, "without": 0}


def test_white_space_that_a_template_leaves_out_is_said(tiny_tokenizer):
    def stripped(item, tokenizer, options=None):
        return CHATML.render(
            item._replace(messages=tuple(m._replace(content=m.content.strip()) for m in item.messages)), tokenizer
        )

    template = dataclasses.replace(CHATML, render=stripped, chat_template=None)
    items = [TURNS, [["user", "x\n"], ["assistant", " y"]]]
    said = "but template 'chatml' leaves out white space around messages in 1 of them (first: rows.jsonl:2)"
    assert lines(tiny_tokenizer, CHATML, items=items)["mask"].find("white space") < 0
    found = lines(tiny_tokenizer, template, items=items)["mask"]
    assert said in found


EMPTY = "<think>\n\n</think>\n\nyo"
THOUGHTS = ["<think>\nwhy\n</think>\n\nno", "<think>why</think>no", "  <think>\nwhy</think>\n no ", EMPTY]


@pytest.mark.parametrize(
    ("shape", "thought"),  # DeepSeek's leaves every thought out: an answer that has one is a counted drop
    [*((shape, thought) for shape in ("", "qwen3", "qwen3_5") for thought in THOUGHTS), ("deepseek_r1", EMPTY)],
)
def test_answers_that_begin_with_a_thought_are_proved_however_it_is_written(tiny_tokenizer, tmp_path, shape, thought):
    folder = write_shape(tmp_path / shape, shape) if shape else tiny_tokenizer
    two = [["user", "hi"], ["assistant", thought], ["user", "and"], ["assistant", "no, it isn't"]]
    for template in (OWN,) if shape == "deepseek_r1" else (CHATML, OWN):
        for supervise, items in (("all", [two[:2]]), ("last", [two]), ("unroll", [two])):
            plan, records = plan_of(folder, template, f"template.supervise={supervise}", items=items)
            mask = next(proved(plan, records))
            assert mask.facts["samples"] == (2 if supervise == "unroll" else 1), (template.name, supervise)
            assert not mask.facts["unlocated"]


def test_a_thought_that_is_masked_and_an_empty_one_that_is_not_are_found(tiny_tokenizer):
    def masked(item, tokenizer, options=None):
        for segment in CHATML.render(item, tokenizer):
            head, tag, rest = segment.text.partition("</think>")
            if tag:
                yield segment._replace(text=head + tag, supervised=False)
            yield segment._replace(text=rest) if tag else segment

    def learnt(item, tokenizer, options=None):  # in two parts, of which neither is a block that holds nothing
        for segment in CHATML.render(item, tokenizer):
            head, tag, rest = segment.text.partition("<think>")
            if tag:
                yield segment._replace(text=head + tag)
            yield segment._replace(text=rest) if tag else segment

    for render, thought, words in (
        (masked, THOUGHTS[0], "lies in an answer and is masked"),
        (learnt, EMPTY, "an answer and what is around it are one segment"),
    ):
        template = dataclasses.replace(CHATML, render=render)
        items = [[["user", "hi"], ["assistant", thought]]]
        assert words in fails_first(tiny_tokenizer, template, MaskError, items=items)


def test_records_without_samples_prove_nothing_and_say_so(tiny_tokenizer):
    assert lines(tiny_tokenizer, items=[None])["mask"] == "mask: no sample among the first records"
    assert lines(tiny_tokenizer, items=[None])["supervised"] == (
        "supervised: no sample among the first records (no items)"
    )
    assert lines(tiny_tokenizer, items=["", "", [["tool", "x"], *TURNS]])["supervised"] == (
        "supervised: no sample among the first records (2 empty_document, 1 tool_message)"
    )


@pytest.mark.parametrize("supervise", ["all", "last"])
@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
@pytest.mark.parametrize("max_length", [8, 9, 17, 30, 45, 60])
def test_samples_that_were_made_to_fit_pass(tiny_tokenizer, max_length, overlong, supervise):
    sets = [f"pack.max_length={max_length}", f"pack.overlong={overlong}", f"template.supervise={supervise}"]
    items = [TURNS, "a document of several words, and then some more of them " * 2, TURNS[:2], [*TURNS, *TURNS, *TURNS]]
    for template in (CHATML, INTERNLM, OWN):
        assert lines(tiny_tokenizer, template, *sets, "template.min_supervised=0", items=items)["mask"]


def test_masked_answers_and_the_last_alone_are_asked_of_the_messages(tiny_tokenizer):
    masked = [["user", "x"], ["assistant", "no", False], *TURNS]
    wanted = {"all": 2, "last": 1}
    for supervise, n in wanted.items():
        plan, records = plan_of(tiny_tokenizer, CHATML, f"template.supervise={supervise}", items=[masked])
        assert next(proved(plan, records)).facts["supervised"] == sum(
            len(plan.tokenizer.encode([text])[0]) + 1 for text in ("yo, you", "that is all")[-n:]
        )


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_odd_tokenizers_raise_no_alarm(tmp_path, kind):
    folder = TOKENIZERS[kind](tmp_path)
    odd = "  Ünï ﬁ ①\n\n\tcafe\u0301 漢字 🦜 x=1;  'q' "
    items = [TURNS, [["user", odd], ["assistant", odd], ["user", "\u0f40" * 100], ["assistant", "\0 \u200b" + odd]]]
    for template in (INTERNLM, CHATML, OWN):
        plan, records = plan_of(folder, template, "template.min_supervised=0", items=[*items, odd])
        facts = next(proved(plan, records)).facts
        assert facts["samples"] == 3 and facts["unlocated"] == 0
        assert (facts["rewritten"] > 0) == (kind not in ("byte-level", "prefix space", "metaspace")), kind


def test_what_a_tokenizer_rewrites_is_said_with_record_and_characters(tmp_path):
    folder = TOKENIZERS["nfkc"](tmp_path)
    items = [TURNS, [["user", "what is ﬁne and ①?"], ["assistant", "ﬁne"]]]
    assert lines(folder, items=items)["mask"].endswith(
        "no BOS added; the tokenizer itself rewrites '①' 'ﬁ' in 1 of them (first: rows.jsonl:2)"
    )


def test_a_bos_that_the_format_writes_itself_is_no_second_one(tmp_path):
    """As SmolLM2, whose BOS is ChatML's first token."""
    folder = write_tokenizer(tmp_path)
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHATML_JINJA}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    for template in (CHATML, OWN):
        assert "no BOS added" in lines(folder, template)["mask"]
    doubled = rewritten(CHATML, lambda segments: [segments[0], *segments])
    assert "begins with 2 BOS tokens, template 'chatml' says 1" in fails_first(folder, doubled, MaskError)


def test_white_space_that_a_stop_swallows_is_no_part_of_the_answer(tmp_path):
    """As Phi-3, whose ``<|end|>`` swallows what follows it."""
    folder = write_tokenizer(tmp_path)
    data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    for token in data["added_tokens"]:
        token["rstrip"] = token["content"] in ("<|im_end|>", "<|im_start|>")
    (folder / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    plan, records = plan_of(folder, OWN)
    assert Segment("<|im_end|>\n", True, True) in plan.encoder.segments(map_messages({"m": TURNS}, None).__next__())
    assert next(proved(plan, records)).facts["samples"] == 1


def test_only_the_first_records_are_read(tiny_tokenizer):
    taken = []

    def read(sources, options):
        for i in range(10**9):
            taken.append(i)
            yield Record({"m": TURNS}, path="rows.jsonl", line=i + 1, offset=0, size=int(sources.paths[0].name))

    endless = DatasetReader(name="endless", summary="", read=read)
    sources = [
        Source(reader=endless, map_function=TALK, sources=Sources((Path(size),))) for size in ("100", "0", "100000")
    ]
    assert len(proofs.first_records(sources)) == len(taken) == 2 * proofs.LOOKED_AT + 3  # 256 KiB are enough


@pytest.mark.measured
def test_proofs_take_no_time(tiny_tokenizer):
    long = [["user", "what is it? " * 40], ["assistant", "it is that, and so on. " * 60]] * 2
    plan, records = plan_of(tiny_tokenizer, items=[long] * proofs.LOOKED_AT)
    began = time.process_time()
    list(proved(plan, records))
    assert time.process_time() - began < 1  # 0.2 s alone


# ------------------------------------------------------------------------------------------------ bugs of a template


def split_user(segments):
    """Supervise the last byte of the user's text."""
    for segment in segments:
        if "hi there" in segment.text:
            at = segment.text.index("hi there") + 7
            yield Segment(segment.text[:at])
            yield Segment(segment.text[at : at + 1], supervised=True)
            yield Segment(segment.text[at + 1 :]) if segment.text[at + 1 :] else Segment("")
        else:
            yield segment


def with_opening(segments):
    """Put the opening of an answer into its segment."""
    out = []
    for segment in segments:
        if segment.supervised and not segment.control:
            segment = Segment(out.pop().text + segment.text, supervised=True)
        out.append(segment)
    return out


def lost_text(segments):
    return [s._replace(text=s.text.replace("hi there", "hi")) for s in segments]


BUGS = {
    "one user byte is supervised": (
        split_user,
        "token 9, 'e', is supervised and lies in no answer: '…i· the·r·e·<|im_end|>·",
    ),
    "an answer begins in its opening": (with_opening, "an answer and what is around it are one segment: '"),
    "an answer is masked": (
        lambda s: [x._replace(supervised=False) for x in s[:8]] + s[8:],
        "'y', lies in an answer and is masked",
    ),
    "its stop is masked": (
        lambda s: [x._replace(supervised=x.supervised and not x.control) for x in s],
        "'<|im_end|>', lies in an answer and is masked",
    ),
    "the stop is not written": (
        lambda s: [x for x in s if not (x.control and x.supervised)],
        "no stop follows an answer: 'yo, you\\n",
    ),
    "the stop is written as text": (
        lambda s: [x._replace(control=x.control and not x.supervised) for x in s],
        "an answer ends in '<|im_end|>', which is not the token '<|im_end|>'",
    ),
    "the separator is supervised": (
        lambda s: [x._replace(supervised=True) if x.text == "\n" else x for x in s],
        "'\\n', is supervised and lies in no answer",
    ),
    "a message is lost": (lost_text, "template 'chatml' lost or changed a message: user's 'hi there' is not there"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_of_a_template_fails_the_mask_proof(tiny_tokenizer, bug):
    change, words = BUGS[bug]
    said = fails_first(tiny_tokenizer, rewritten(CHATML, lambda s: list(change(s))), MaskError)
    assert said.startswith(f"{ORIGIN}: mask: ")
    assert words in said, said


@pytest.mark.parametrize(("times", "there"), [(0, 0), (2, 2)])
def test_a_missing_or_second_bos_fails_the_mask_proof(tiny_tokenizer, times, there):
    template = rewritten(INTERNLM, lambda segments: [segments[0]] * times + segments[1:])
    said = fails_first(tiny_tokenizer, template, MaskError)
    assert said.startswith(f"{ORIGIN}: mask: begins with {there} BOS tokens, template 'internlm_chat' says 1: '")


def test_a_document_is_its_text_between_bos_and_eos(tiny_tokenizer, monkeypatch):
    whole = Encoder._document
    monkeypatch.setattr(Encoder, "_document", lambda self, item: whole(self, Document(item.text[:-1])))
    assert "a document is not its text between BOS and EOS: 'a lis" in fails_first(
        tiny_tokenizer, CHATML, MaskError, items=["a list"]
    )


def test_a_template_whose_frame_depends_on_content_is_said_to_be_unproved(tiny_tokenizer):
    def render(item, tokenizer, options=None):
        longest = max(len(message.content) for message in item.messages)
        return iter([Segment(f"[{longest}]"), *CHATML.render(item, tokenizer, options)])

    template = dataclasses.replace(CHATML, render=render)
    said = lines(tiny_tokenizer, template)["mask"]
    assert said.endswith("; in 1 only the text could be checked, not the mask (first: rows.jsonl:1)")
    lost = rewritten(template, lost_text)
    assert "lost or changed a message: user's 'hi there'" in fails_first(tiny_tokenizer, lost, MaskError)


def test_reasoning_before_an_answer_may_be_supervised(tiny_tokenizer):
    def render(item, tokenizer, options=None):
        for segment in CHATML.render(
            item._replace(messages=tuple(m._replace(reasoning=None) for m in item.messages)), tokenizer
        ):
            if segment.supervised and not segment.control:
                yield Segment("<think>why</think>", supervised=True)
            yield segment

    def mapped(record, options):
        yield Conversation((Message("user", "x"), Message("assistant", "y", reasoning="why")))

    template = dataclasses.replace(CHATML, render=render)
    plan, [(source, record)] = plan_of(tiny_tokenizer, CHATML)
    plan = dataclasses.replace(plan, encoder=dataclasses.replace(plan.encoder, template=template))
    source = dataclasses.replace(source, map_function=dataclasses.replace(TALK, map=mapped))
    assert next(proved(plan, [(source, record)])).facts["unlocated"] == 0


# --------------------------------------------------------------------------------------------- bugs of what encodes it


def shifted(by):
    whole = Encoder.encode

    def changed(self, items):
        made = whole(self, items)
        made.spans[:] += by
        return made

    return changed


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ([1, 1], "lies in an answer and is masked"),
        ([-1, -1], "is supervised and lies in no answer"),
        ([-1, 0], "is supervised and lies in no answer"),
        ([0, 1], "'\\n', is supervised and lies in no answer"),
        ([0, -1], "'<|im_end|>', lies in an answer and is masked"),
    ],
    ids=str,
)
def test_a_mask_off_by_one_fails_the_mask_proof(tiny_tokenizer, monkeypatch, by, words):
    monkeypatch.setattr(Encoder, "encode", shifted(by))
    said = fails_first(tiny_tokenizer, CHATML, MaskError)
    assert said.startswith(f"{ORIGIN}: mask: token ")
    assert words in said


def test_labels_off_by_one_fail_the_mask_proof(tiny_tokenizer, monkeypatch):
    whole = proofs.gather

    def unshifted(*arguments, **more):
        made = whole(*arguments, **more)
        made.labels[:, 1:] = made.labels[:, :-1].copy()
        return made

    monkeypatch.setattr(proofs, "gather", unshifted)
    assert fails_first(tiny_tokenizer, CHATML, MaskError) == f"{ORIGIN}: mask: a label is not the token that follows"


def test_a_token_lost_in_encode_fails_the_mask_proof(tiny_tokenizer, monkeypatch):
    whole = Encoder._ids

    def lossy(self, texts, control):
        ids, sizes = whole(self, texts, control)
        at = next(i for i, text in enumerate(texts) if text == "that is all") if "that is all" in texts else None
        if at is None:
            return ids, sizes
        sizes[at] -= 1
        return np.delete(ids, int(sizes[:at].sum())), sizes

    monkeypatch.setattr(Encoder, "_ids", lossy)
    said = fails_first(tiny_tokenizer, CHATML, MaskError)
    assert re.fullmatch(r"rows.jsonl:1: mask: token \d+ of \d+: expected '….*·t·.*', there is '….*'", said), said


def test_a_tokenizer_that_cuts_text_off_fails_the_mask_proof(tiny_tokenizer):
    plan, records = plan_of(tiny_tokenizer)
    plan.tokenizer._backend.enable_truncation(6)
    with pytest.raises(MaskError) as caught:
        next(proved(plan, records))
    assert str(caught.value).startswith(
        f"{ORIGIN}: mask: text is lost in encoding: expected 'user\\nhi there', there is 'us"
    )


@pytest.mark.parametrize("column", [STOP, SPANS], ids=["the stop", "the spans"])
def test_a_cut_that_loses_the_mask_or_the_stop_fails_the_mask_proof(tiny_tokenizer, monkeypatch, column):
    whole = proofs.fit

    def lossy(block, max_length, overlong):
        made = whole(block, max_length, overlong)
        if made is not block:
            made.samples[:, column] = {STOP: -1, SPANS: 1}[column]
        return made

    monkeypatch.setattr(proofs, "fit", lossy)
    n = len(plan_of(tiny_tokenizer)[0].encoder.encode([(Conversation(tuple(Message(*m) for m in TURNS)), "")]).tokens)
    said = fails_first(tiny_tokenizer, CHATML, MaskError, f"pack.max_length={n - 3}")
    assert said.startswith(f"{ORIGIN}: mask: once made to fit, token ")


def test_an_answer_left_out_as_nothing_to_learn_fails_the_mask_proof(tiny_tokenizer, monkeypatch):
    whole = encode._samples

    def nothing(tokens, sizes, flags, *rest):
        return whole(tokens, sizes, [np.zeros_like(flags[0]), *flags[1:]], *rest)

    monkeypatch.setattr(encode, "_samples", nothing)
    said = fails_first(tiny_tokenizer, CHATML, MaskError)
    assert said == f"{ORIGIN}: mask: left out as nothing_supervised, but it has an answer to learn"


# ------------------------------------------------------------------------------------------------- what is supervised


def second(tokenizer, *sets, items) -> str:
    found = proved(*plan_of(tokenizer, CHATML, *sets, items=items))
    next(found)
    with pytest.raises(DataError) as caught:
        next(found)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_share_below_the_floor_is_refused_with_share_floor_count_and_what_to_do(tiny_tokenizer):
    masked = [["user", "x"], ["assistant", "y", False]]
    items = [TURNS, *[masked] * 9]
    said = second(tiny_tokenizer, "template.min_supervised=0.5", items=items)
    assert re.fullmatch(
        r"rows.jsonl:2: supervised: \d+\.\d{3}% of the first [\d,]+ tokens are, template.min_supervised is 50.000%; "
        r"9 of 10 samples have no supervised token, beginning with this one; `corefit inspect` shows them; "
        r"--set template.min_supervised=0 starts anyway",
        said,
    ), said
    assert second(tiny_tokenizer, items=[masked]).startswith("rows.jsonl:1: supervised: 0.000% of the first ")
    line = lines(tiny_tokenizer, CHATML, "template.min_supervised=0", items=[masked, TURNS])["supervised"]
    assert line.endswith("1 of 2 samples have no supervised token")


def test_what_is_cut_off_does_not_count(tiny_tokenizer):
    long = [["user", "hi"], ["assistant", "word " * 40_000]]
    how = ["pack.max_length=64", "pack.overlong=truncate", "template.min_supervised=0.3"]
    line = lines(tiny_tokenizer, CHATML, *how, items=[long, *[TURNS] * 3])["supervised"]
    assert float(line.split()[1].rstrip("%")) > 30, line  # 0.2 % of all that is there


def test_answers_cut_off_by_long_questions_are_refused(tiny_tokenizer):
    long = [["user", "word " * 100], ["assistant", "y"]]
    said = second(tiny_tokenizer, "pack.max_length=64", items=[long] * 3)
    assert "3 of 3 samples have no supervised token" in said


def test_samples_dropped_for_their_length_are_not_in_the_share(tiny_tokenizer):
    long = [["user", "word " * 100], ["assistant", "y"]]
    sets = ["pack.max_length=100", "pack.overlong=drop"]
    assert lines(tiny_tokenizer, CHATML, *sets, items=[long, TURNS])["supervised"].endswith(
        "0 of 1 samples have no supervised token"
    )


# --------------------------------------------------------------------------------------------------- the chat template


def with_jinja(folder, jinja):
    write_tokenizer(folder)
    config = {"bos_token": "<s>", "eos_token": "</s>"} | ({"chat_template": jinja} if jinja is not None else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


NO_NEWLINE = CHATML_JINJA.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good<|im_end|>\n{% endif %}" + CHATML_JINJA
)


@pytest.mark.parametrize(
    ("jinja", "template", "verdict", "words"),
    [
        (CHATML_JINJA, CHATML, "equal", "equal to the tokenizer's own"),
        (None, CHATML, "none", "the tokenizer carries none"),
        (CHATML_JINJA, OWN, "own", "the tokenizer's own"),
        ("{% for %}", CHATML, "failed", "not compared, the tokenizer's own can't be rendered: "),
        ("{{ raise_exception('no, thanks') }}", CHATML, "failed", "can't be rendered: 'no, thanks'"),
        (
            NO_NEWLINE,
            CHATML,
            "differs",
            "with a system message, at token 12, chatml writes '… ·1·<|im_end|>·\\n·<|im_start|>·",
        ),
        (DEFAULT_SYSTEM, CHATML, "differs", "without a system message, at token 1, chatml writes '<|im_start|>·u·"),
        ("<|im_start|>", CHATML, "differs", "the tokenizer's own '<|im_start|>'"),
    ],
    ids=["equal", "none", "own", "broken", "refuses", "one newline", "default system", "shorter"],
)  # fmt: skip
def test_the_tokenizers_chat_template_is_compared_and_a_difference_shown(tmp_path, jinja, template, verdict, words):
    folder = with_jinja(tmp_path, jinja)
    proof = list(proved(*plan_of(folder, template)))[-1]
    assert proof.facts["verdict"] == verdict
    assert bool(proof.facts["difference"]) == (verdict == "differs")
    assert words in proof.line, proof.line


def test_a_marker_that_is_a_token_there_and_text_here_is_a_difference(tmp_path):
    folder = with_jinja(tmp_path, INTERNLM.chat_template.replace("<eoh>", "<|im_end|>"))
    template = dataclasses.replace(INTERNLM, chat_template="other")
    assert "internlm_chat writes" in lines(folder, template)["chat_template"]


def test_a_template_that_cant_write_a_system_message_is_compared_without(tmp_path):
    def render(item, tokenizer, options=None):
        if item.messages[0].role == "system":
            raise Unrenderable("system_message")
        return CHATML.render(item, tokenizer, options)

    folder = with_jinja(tmp_path, CHATML_JINJA)
    proof = list(proved(*plan_of(folder, dataclasses.replace(CHATML, render=render))))[-1]
    assert proof.facts == {"verdict": "equal", "difference": ""}


# ------------------------------------------------------------------------------------------------------ with the model

ORDER = ["mask", "supervised", "chat template", "vocabulary", "adapter", "trainable", "isolation", "dry run"]


@pytest.fixture
def dry(tmp_path, tiny_model, monkeypatch):
    """Start ``corefit train --dry-run`` in this process; give the lines of the proofs and what stopped it."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"### Human: What is {i}?### Assistant: It is number {i}."} for i in range(30)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def run(*sets, model=tiny_model):
        said, error = [], None
        flags = {"model": str(model), "data": "rows.jsonl", "plugin": "oasst1", "template": "chatml"}
        try:
            train_from(
                None,
                {**flags, "quantizer": "none"},
                ["run.threads=1", "adapter.r=4", *sets],
                dry_run=True,
                say=said.append,
            )
        except CorefitError as caught:
            error = caught
        assert {path.name for path in tmp_path.iterdir()} <= {"rows.jsonl", "model"}
        by_word = {line.split(":")[0]: line for line in said}
        return {word: by_word[word] for word in by_word if word in ORDER}, error

    return run


def test_everything_holds_and_is_said_in_order(dry, tiny_model):
    said, error = dry()
    assert error is None
    assert list(said) == ORDER
    size = Tokenizer.load(tiny_model).vocab_size
    assert said["vocabulary"] == (
        f"vocabulary: tokenizer {size}, embeddings 512, head 512; all 7 control tokens are among them"
    )
    assert said["adapter"] == (
        "adapter: LoRA r 4 on 14 layers: 2 down_proj, 2 gate_proj, 2 k_proj, 2 o_proj, 2 q_proj, 2 up_proj, 2 v_proj"
    )
    assert said["trainable"] == "trainable: 0.01M numbers in 28 tensors, all fp32"
    assert said["isolation"].endswith("(max |delta| 0)")
    assert said["dry run"] == "dry run: everything holds, nothing was trained"


def test_full_fine_tuning_has_no_adapter_to_prove(dry):
    said, error = dry("adapter.kind=none")
    assert error is None
    assert said["adapter"] == "adapter: none, all of it trains"


def not_adapted(network):
    layer = network.get_base_model().model.layers[1].self_attn
    layer.q_proj = layer.q_proj.base_layer


def adapted_nowhere(network):
    for layer in network.get_base_model().model.layers:
        del layer.self_attn.q_proj


def half(network):
    weight = next(weight for name, weight in network.named_parameters() if "lora_B" in name)
    weight.data = weight.data.half()


def cached(network):
    decoder(network).register_forward_pre_hook(
        lambda module, arguments, more: (arguments, {**more, "use_cache": True}), with_kwargs=True
    )


BUGS_OF_THE_MODEL = {
    "a layer is left out": ("adapter", not_adapted, ModelError, "'q_proj' adapts 1 layers, 1 of that name are left"),
    "a target adapts nothing": ("adapter", adapted_nowhere, ModelError, "'q_proj' adapts 0 layers, 0 of that name"),
    "a trainable weight is fp16": (
        "trainable",
        half,
        RunError,
        "trainable: 1 of 28 weights aren't fp32, base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
        " is float16",
    ),
    "nothing trains": (
        "trainable",
        lambda network: network.requires_grad_(False),
        RunError,
        "trainable: no weight of the model would be trained",
    ),
    "a cache is forced": ("isolation", cached, IsolationError, "documents of one pack see each other"),
}


@pytest.mark.parametrize("bug", BUGS_OF_THE_MODEL)
def test_a_bug_of_the_model_fails_exactly_its_proof(dry, monkeypatch, bug):
    proof, change, kind, words = BUGS_OF_THE_MODEL[bug]
    whole = adapter.attach_adapter

    def changed(*arguments, **more):
        network = whole(*arguments, **more)
        change(network)
        return network

    monkeypatch.setattr(adapter, "attach_adapter", changed)
    said, error = dry()
    assert list(said) == ORDER[: ORDER.index(proof)]
    assert type(error) is kind and words in str(error), error
    assert "\n" not in str(error)


def test_a_target_that_matches_nothing_is_named(dry):
    said, error = dry('adapter.targets=["q_porj"]')
    assert list(said) == ORDER[:4]
    assert type(error) is ModelError and "no layer 'q_porj'; did you mean 'q_proj'?" in str(error)


def test_a_tokenizer_larger_than_the_embeddings_fails_the_vocabulary(dry, tmp_path):
    said, error = dry(model=write_model(tmp_path / "model", vocab_size=256))
    assert list(said) == ORDER[:3]
    assert type(error) is ModelError
    assert re.fullmatch(r"vocabulary: the tokenizer has \d+ tokens, embeddings has only 256", str(error)), error


@pytest.mark.parametrize(
    ("embeddings", "head", "size", "words"),
    [
        (8, 16, 10, r"tokenizer has 10 tokens \('<\|late\|>' is 9\), embeddings has only 8"),
        (16, 8, 10, r"tokenizer has 10 tokens \('<\|late\|>' is 9\), head has only 8"),
        (16, 16, 9, r"tokenizer has 9 tokens \('<\|late\|>' is 9\), tokenizer has only 9"),
    ],
)
def test_a_control_token_beyond_the_vocabulary_is_named(embeddings, head, size, words):
    class Network:
        def get_input_embeddings(self):
            return torch.nn.Embedding(embeddings, 2)

        def get_output_embeddings(self):
            return torch.nn.Linear(2, head)

    with pytest.raises(ModelError, match=words):
        adapter.check_vocabulary(Network(), size, {"<s>": 1, "<|late|>": 9})
    sizes = {"tokenizer": 8, "embeddings": embeddings, "head": head}
    assert adapter.check_vocabulary(Network(), 8, {"<s>": 1, "</s>": 7}) == sizes


def test_a_bug_of_the_encoder_stops_before_the_model_is_loaded(dry, monkeypatch):
    monkeypatch.setattr(Encoder, "encode", shifted([1, 1]))
    said, error = dry()
    assert said == {} and type(error) is MaskError and error.exit_code == 1


def test_too_little_to_learn_is_the_users_to_mend(dry):
    said, error = dry("template.min_supervised=0.9")
    assert list(said) == ORDER[:1]
    assert type(error) is DataError and error.exit_code == 2 and "template.min_supervised is 90.000%" in str(error)


def test_the_ledger_keeps_the_proofs_and_a_dry_resume_reads_the_checkpoint_and_writes_nothing(
    dry, tmp_path, tiny_model
):
    dry()  # writes the data
    flags = dict(
        data="rows.jsonl", plugin="oasst1", template="chatml", quantizer="none", out="run", scheduler="constant"
    )
    sets = ["run.threads=1", "adapter.r=4", "train.packs_per_step=1", "pack.max_length=64", "sample.max_tokens=1"]

    def start(**more):
        said = []
        run = train_from(None, {"model": str(tiny_model), **flags}, [*sets, "train.epochs=1"], say=said.append, **more)
        return run, said

    run, _ = start()
    found = run.ledger["proofs"]
    assert list(found) == ["mask", "supervised", "chat_template", "vocabulary", "adapter", "trainable", "isolation"]
    assert found["isolation"] == {"max_delta": 0.0}
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert found["adapter"] == {"layers": dict.fromkeys(names, 2)}
    assert found["trainable"]["dtype"] == "float32" and found["vocabulary"]["embeddings"] == 512
    facts = json.loads((run.path / "run.json").read_text("utf-8"))
    (run.path / "run.json").write_text(json.dumps({**facts, "status": "interrupted"}), "utf-8")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    again, said = start(resume=True, dry_run=True)
    assert again.exit_code == 0
    assert any(line.startswith(f"resume: from step {run.metrics[-1]['step']} (") for line in said)
    assert said[-1] == "dry run: everything holds, nothing was trained"
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("error", [Unrenderable("two_turns"), DataError("turn 1: set template.supervise"), ValueError])
def test_a_template_that_writes_no_second_turn_has_no_form_and_is_no_mistake(tiny_tokenizer, error):
    def one_turn(item, tokenizer, options=None):
        if len(item.messages) > 2:
            raise error
        return CHATML.render(item, tokenizer)

    template = dataclasses.replace(CHATML, render=one_turn, chat_template=None)
    encoder = plan_of(tiny_tokenizer, CHATML)[0].encoder
    assert dataclasses.replace(encoder, template=template).form() == ""
    assert dataclasses.replace(encoder, template=dataclasses.replace(CHATML, chat_template=None)).form()
    assert dataclasses.replace(encoder, template=OWN).form() == ""
