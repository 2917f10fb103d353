"""Any JSON object through every map function: no exception, no change of the record, text where text is due."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corefit.data.source import Source, map_record
from corefit.fields import Fields
from corefit.registry import Registry
from corefit.types import Conversation, DatasetReader, Document, Drop, Record, Sources

FUNCTIONS = dict(Registry.load().map_functions)
FUNCTIONS["fields"] = Fields(user=("text", "input"), assistant="output", system="system", history="chat").map_function(
    name="fields", summary=""
)
KEYS = (
    *("role", "content", "from", "value", "input", "output", "system", "text", "type", "weight", "loss", "tool_calls"),
    *("messages", "conversations", "conversation", "chat", "turn_1", "Human", "MOSS", "output_with_loss", "tools"),
    *("instruction", "prompt", "reasoning", "function_call", "meta_instruction", "replies", "message_id"),
)
WORDS = (
    "user",
    "assistant",
    "human",
    "gpt",
    "function_call",
    "tool",
    "system",
    "a",
    "",
    " ",
    "[",
    '[{"from": "user"}]',
)
LEAVES = st.none() | st.booleans() | st.integers(-2, 2) | st.floats(0, 1) | st.sampled_from(WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
MESSAGE = st.dictionaries(st.sampled_from(KEYS[:12]), LEAVES | VALUES, max_size=4)
RECORDS = st.dictionaries(st.sampled_from(KEYS), VALUES | st.lists(MESSAGE, max_size=4), max_size=5)
READER = DatasetReader(name="r", summary="", read=lambda *_: iter(()))


@pytest.mark.parametrize("name", FUNCTIONS)
@given(row=RECORDS)
@settings(max_examples=60)
def test_whatever_a_record_holds_it_becomes_items_or_counted_drops(name, row):
    function, before = FUNCTIONS[name], json.dumps(row)
    record = Record(row, path="d", line=1, offset=0)
    source = Source(reader=READER, map_function=function, sources=Sources(()))
    items = map_record(source, record)  # a map function that raises is a DataError here
    assert items and json.dumps(row) == before
    for item in items:
        assert isinstance(item, Conversation | Document | Drop)
        if isinstance(item, Conversation):
            assert any(m.role == "assistant" and m.supervised is not False for m in item.messages)
            assert {m.role for m in item.messages} <= {"system", "user", "assistant", "tool"}
    if function.sniff is not None:
        assert function.sniff(record) in (True, False)
    if function.fields is not None:
        kept = Record({k: v for k, v in row.items() if k in function.fields}, path="d", line=1, offset=0)
        assert map_record(source, kept) == items
