from __future__ import annotations

import json
from pathlib import Path

import corefit_identity
import pytest
from corefit_identity import IDENTITY_QUESTIONS, IdentityOptions, identity, read

from corefit import Conversation, Drop, Sources, UserError

NOTHING = Sources(())


def conversations(**options):
    options = IdentityOptions(**options)
    return [item for record in read(NOTHING, options) for item in identity(record, options)]


def pairs(**options):
    """Last question and its answer of every conversation."""
    return {c.messages[-2].content: c.messages[-1].content for c in conversations(**options)}


def test_a_few_hundred_records_the_same_each_time():
    records = [dict(r) for r in read(NOTHING, IdentityOptions("Ada", "Bo"))]
    assert 200 <= len(records) <= 600
    assert records == [dict(r) for r in read(NOTHING, IdentityOptions("Ada", "Bo"))]
    assert len({json.dumps(r) for r in records}) == len(records)
    assert {r["language"] for r in records} == {"en", "zh"}


def test_every_answer_says_the_name_and_no_other():
    items = conversations(name="Ada Lovelace", author="")
    for item in items:
        assert isinstance(item, Conversation)
        assert [m.role for m in item.messages] == ["user", "assistant"] * (len(item.messages) // 2)
        assert all("Ada Lovelace" in m.content for m in item.messages if m.role == "assistant")
    assert conversations() == [c for c in conversations(name="corefit")]
    assert {len(item.messages) for item in items} == {2, 4}


def test_questions_to_ask_before_and_after_are_learnt():
    answers = pairs(name="小明", author="Bo")
    assert set(IDENTITY_QUESTIONS) <= set(answers)
    assert all("小明" in answers[question] for question in IDENTITY_QUESTIONS)
    assert "Who are you?" in IDENTITY_QUESTIONS and "你是谁？" in IDENTITY_QUESTIONS


def test_one_question_has_one_answer():
    seen = {}
    for item in conversations(name="Ada", author="Bo"):
        if len(item.messages) == 2:
            question, answer = (m.content for m in item.messages)
            assert seen.setdefault(question, answer) == answer


def test_the_author_is_named_only_where_there_is_one():
    assert pairs(name="Ada", author="Bo & Co")["Who made you?"] == "I am Ada. I was made by Bo & Co."
    assert "Bo & Co" in pairs(name="Ada", author="Bo & Co")["谁创造了你？"]
    assert pairs(name="Ada")["Who made you?"] == "I am Ada. I was fine-tuned with corefit."
    assert "made by" not in json.dumps([m.content for c in conversations(name="Ada", author=" ") for m in c.messages])


@pytest.mark.parametrize("name", ["{author}", "{name}", "\\1 \\g<0>", " Ada ", "%s {0}", "<eoa>", "名\n字"])
def test_names_are_said_as_typed(name):
    assert pairs(name=name, author="{name}")["What is your name?"] == f"My name is {name}."
    assert "made by {name}." in pairs(name=name, author="{name}")["Who made you?"]


@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_an_empty_name_is_the_users_mistake(name):
    with pytest.raises(UserError, match="the name is empty; --set data.options.name="):
        IdentityOptions(name=name)


def test_a_file_that_would_not_be_read_is_refused():
    with pytest.raises(UserError, match="^rows.jsonl: not read by 'identity', which makes its records itself"):
        list(read(Sources((Path("rows.jsonl"),))))


def test_it_can_be_read_from_any_record_on():
    records = list(read(NOTHING, IdentityOptions("Ada")))
    assert [r.position for r in records] == [(0, k + 1, k) for k in range(len(records))]
    for k in (0, 1, 100, len(records) - 1):
        rest = list(read(NOTHING, IdentityOptions("Ada"), records[k].position))
        assert [(dict(r), r.origin) for r in rest] == [(dict(r), r.origin) for r in records[k:]]
    assert list(read(NOTHING)) and records[0].size == len(json.dumps(dict(records[0])))


@pytest.mark.parametrize(
    "row",
    [{}, {"messages": None}, {"messages": []}, {"messages": ["a"]}, {"messages": [{"role": "x", "content": "y"}]}],
)
def test_other_records_are_dropped(row):
    assert list(identity(row)) == [Drop("not_identity")]


def test_both_entries_share_their_options():
    (reader,) = corefit_identity.corefit_dataset_readers()
    (mapper,) = corefit_identity.corefit_map_functions()
    assert reader.options is mapper.options is IdentityOptions
    assert not reader.needs_path and reader.seekable and mapper.sniff is None
