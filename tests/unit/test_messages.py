"""OpenAI's messages and ShareGPT's conversations: ten well-formed and ten malformed rows each, and how they differ."""

from __future__ import annotations

import json

import pytest
from corefit_messages import corefit_map_functions

from corefit.registry import Registry
from corefit.types import Conversation, Drop, Message, Record

MAPS = {function.name: function for function in corefit_map_functions()}


def only(name: str, row: dict):
    function = MAPS[name]
    kept = {key: value for key, value in row.items() if key in function.fields}
    found = [list(function.map(Record(some, path="d", line=1, offset=0), None)) for some in (row, kept)]
    assert found[0] == found[1]
    [item] = found[0]
    return item


def said(*pairs: tuple[str, str], **changes: object) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in pairs), **changes)


U, A = ("user", "q"), ("assistant", "a")
USER, ANSWER = Message(*U), Message(*A)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
FUNCTION = {"name": "f", "arguments": {"x": 1}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def messages(*rows: object, key: str = "messages", **more: object) -> dict:
    listed = [{"role": r[0], "content": r[1]} if isinstance(r, tuple) else r for r in rows]
    return {key: listed, **more}


OPENAI = [
    (messages(U, A), said(U, A)),
    (messages(("developer", "s"), U, A, U, A, id=3), said(("system", "s"), U, A, U, A)),
    (
        messages({"role": "user", "content": "q", "name": "Eva", "loss": None}, {**ANSWER._asdict(), "weight": None}),
        Conversation((USER._replace(name="Eva"), ANSWER)),
    ),
    (
        messages(U, {"role": "assistant", "content": "a", "loss": False}, U, {"role": "assistant", "content": "a"}),
        Conversation((USER, ANSWER._replace(supervised=False), USER, ANSWER)),
    ),
    (
        messages(
            U, {"role": "assistant", "content": "a", "weight": 0}, U, {"role": "assistant", "content": "a", "weight": 1}
        ),
        Conversation((USER, ANSWER._replace(supervised=False), USER, ANSWER._replace(supervised=True))),
    ),
    (
        messages(
            U,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "2", "tool_call_id": "1", "name": "f"},
            A,
            tools=TOOLS,
        ),
        Conversation(
            (USER, Message("assistant", "", tool_calls=(CALL,)), Message("tool", "2", name="f"), ANSWER), tuple(TOOLS)
        ),
    ),
    (
        messages(
            U,
            {"role": "assistant", "content": "", "function_call": FUNCTION},
            ("function", "2"),
            A,
            functions=json.dumps([FUNCTION]),
        ),
        Conversation(
            (
                USER,
                Message("assistant", "", tool_calls=({"type": "function", "function": FUNCTION},)),
                Message("tool", "2"),
                ANSWER,
            ),
            (FUNCTION,),
        ),
    ),
    (
        messages(U, {"role": "assistant", "content": "a", "reasoning_content": "hm"}),
        Conversation((USER, ANSWER._replace(reasoning="hm"))),
    ),
    (
        messages(
            {"role": "user", "content": [{"type": "text", "text": "q", "image_url": None}, {"text": "r"}, "s"]}, A
        ),
        said(("user", "qrs"), A),
    ),
    (
        messages(
            ("user", " q\n"), {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"text": "a"}]}
        ),
        Conversation((Message("user", " q\n"), ANSWER._replace(reasoning="hm"))),
    ),
    ({}, Drop("not_a_list")),
    ({"messages": None}, Drop("not_a_list")),
    ({"messages": "hello"}, Drop("not_a_list")),
    (messages(), Drop("no_answer")),
    (messages(U), Drop("no_answer")),
    (messages("hi", "there"), Drop("malformed_message")),
    (messages(("owner", "x"), A), Drop("unknown_role")),
    (messages({"role": "user", "content": 3}, A), Drop("content_not_text")),
    (messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}, A), Drop("image_url")),
    (messages(U, {"role": "assistant", "content": "a", "weight": 0.5}), Drop("odd_weight")),
]


def talk(*rows: object, key: str = "conversations", **more: object) -> dict:
    listed = [{"from": r[0], "value": r[1]} if isinstance(r, tuple) else r for r in rows]
    return {key: listed, **more}


H, G = ("human", "q"), ("gpt", "a")
SHAREGPT = [
    (talk(H, G), said(U, A)),
    (talk(("system", "s"), H, G, H, G, id="x"), said(("system", "s"), U, A, U, A)),
    (talk(H, G, system="s"), said(("system", "s"), U, A)),
    (talk(("system", "own"), H, G, system="s"), said(("system", "own"), U, A)),
    (talk(("user", "q"), ("chatgpt", "a"), ("human", "q"), ("bing", "a"), key="conversation"), said(U, A, U, A)),
    (
        talk(H, ("function_call", json.dumps(FUNCTION)), ("observation", "2"), G, tools=json.dumps(TOOLS)),
        Conversation(
            (
                USER,
                Message("assistant", "", tool_calls=({"type": "function", "function": FUNCTION},)),
                Message("tool", "2"),
                ANSWER,
            ),
            tuple(TOOLS),
        ),
    ),
    (
        talk(H, {"from": "gpt", "value": "a", "weight": 0}, H, {"from": "gpt", "value": "a", "loss": None}),
        Conversation((USER, ANSWER._replace(supervised=False), USER, ANSWER)),
    ),
    ({"conversations": json.dumps(talk(H, G)["conversations"]), "tools": ""}, said(U, A)),
    (
        talk(G, H, G),
        Conversation((ANSWER._replace(supervised=False), USER, ANSWER), notes=("leading_assistant",)),
    ),
    (talk(H, G, H, dropped=1), said(U, A, dropped=("trailing_user",))),
    ({}, Drop("not_a_list")),
    ({"conversations": {"from": "human", "value": "q"}}, Drop("not_a_list")),
    ({"conversations": "[{"}, Drop("not_a_list")),
    (talk(), Drop("no_answer")),
    (talk(H, H), Drop("no_answer")),
    (talk(H, {"from": "gpt"}), Drop("malformed_message")),
    (talk(H, {"from": None, "value": "a"}), Drop("malformed_message")),
    (talk(H, ("gtp", "a")), Drop("unknown_role")),
    (talk(H, ("function_call", "no JSON"), G), Drop("odd_tool_calls")),
    (talk(("human", "<image>\nq"), G, image="a.jpg"), Drop("image")),
]
TABLES = {"openai": OPENAI, "sharegpt": SHAREGPT, "wizardlm": SHAREGPT}


@pytest.mark.parametrize("name", TABLES)
def test_ten_well_formed_and_ten_malformed_rows(name):
    assert len(TABLES[name]) == 20 and sum(isinstance(item, Drop) for _, item in TABLES[name]) == 10
    for row, wanted in TABLES[name]:
        before = json.dumps(row)
        assert only(name, row) == wanted, row
        assert json.dumps(row) == before


def test_each_is_recognised_and_by_nobody_else():
    functions = Registry.load().map_functions.values()
    for name, table in (("openai", OPENAI), ("sharegpt", SHAREGPT)):
        for row, item in table:
            record = Record(row, path="d", line=1, offset=0)
            found = [f.name for f in functions if f.sniff is not None and f.sniff(record)]
            assert found in ([], [name]), (row, found)
            as_usual = isinstance(row.get("messages", row.get("conversations")), list)
            assert found or isinstance(item, Drop) or not as_usual, row


class TestMessages:
    def test_a_missing_flag_is_missing_and_masks_no_other_answer(self):
        """Files that went through Arrow hold every key in every message, null where it was not."""
        rows = [
            {"role": "assistant", "content": "a", "loss": loss} for loss in (None, False, True, "False", "true", 0, 1)
        ]
        item = only("openai", messages(*[row for answer in rows for row in (U, answer)]))
        flags = [message.supervised for message in item.messages if message.role == "assistant"]
        assert flags == [None, False, True, False, True, False, True]

    def test_a_flag_of_a_question_means_nothing(self):
        rows = [{"role": "user", "content": "q", "weight": 0}, {"role": "assistant", "content": "a"}]
        assert only("openai", messages(*rows)) == said(U, A)

    def test_messages_of_one_role_in_a_row_stay_as_they_are(self):
        assert only("openai", messages(U, U, A)) == said(U, U, A)
        assert only("wizardlm", talk(H, H, G)) == said(U, U, A)

    def test_an_answer_before_the_first_question_stays_masked(self):
        item = only("openai", messages(("system", "s"), A, U, A))
        assert [m.supervised for m in item.messages] == [None, False, None, None] and item.notes == (
            "leading_assistant",
        )

    def test_an_empty_answer_is_masked(self):
        item = only("openai", messages(U, ("assistant", " "), U, A))
        assert item.messages[1].supervised is False and item.notes == ("empty_answer",)
        assert only("openai", messages(U, ("assistant", ""))) == Drop("no_answer")
        calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        assert only("openai", messages(U, calls)).messages[-1].supervised is None

    def test_what_nobody_answered_is_left_out_and_counted(self):
        calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        item = only("openai", messages(U, calls, ("tool", "2"), U))
        assert item.dropped == ("trailing_user", "trailing_tool") and len(item.messages) == 2

    def test_where_every_answer_is_masked_there_is_nothing_to_learn(self):
        assert only("openai", messages(U, {"role": "assistant", "content": "a", "loss": False})) == Drop(
            "nothing_to_learn"
        )

    def test_an_empty_part_of_text_is_text(self):
        parts = [{"type": "text", "text": ""}, {"type": "thinking", "text": None, "thinking": "t"}, {"text": "a"}]
        item = only("openai", messages(U, {"role": "assistant", "content": parts}))
        assert item == Conversation((USER, ANSWER._replace(reasoning="t")))

    def test_a_function_call_needs_no_value_beside_tool_calls(self):
        row = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "tool_calls": [CALL]}]}
        assert only("sharegpt", row) == Conversation((USER, Message("assistant", "", tool_calls=(CALL,))))
        row["conversations"][1] = {"from": "Function_Call", "value": json.dumps(FUNCTION)}
        assert only("sharegpt", row).messages[1].tool_calls == ({"type": "function", "function": FUNCTION},)

    @pytest.mark.parametrize("part", ["image_url", "input_image", "input_audio", "video", "file"])
    def test_other_parts_than_text_are_a_drop_of_their_kind(self, part):
        row = messages({"role": "user", "content": [{"type": "text", "text": "q"}, {"type": part}]}, A)
        assert only("openai", row) == Drop(part)

    def test_role_and_content_under_conversations_is_openais(self):
        assert only("openai", messages(U, A, key="conversations")) == said(U, A)
        record = Record(messages(U, A, key="conversations"), path="d", line=1, offset=0)
        assert MAPS["openai"].sniff(record) and not MAPS["sharegpt"].sniff(record)

    def test_prompt_and_completion_of_messages_are_trls(self):
        row = messages(U, A, U, key="prompt") | messages(A, key="completion", tools=TOOLS)
        assert [name for name, function in MAPS.items() if function.sniff and function.sniff(row)] == ["openai"]
        assert only("openai", row) == Conversation((USER, ANSWER._replace(supervised=False), USER, ANSWER), (*TOOLS,))
        assert only("openai", {key: json.dumps(row[key]) for key in row}) == only("openai", row)
        texts = {"prompt": "q", "completion": "a"}  # text to go on with, no chat
        assert not MAPS["openai"].sniff(texts)
        assert only("openai", texts) == only("openai", row | {"completion": None}) == Drop("not_a_list")

    @pytest.mark.parametrize("odd", ["[", "3", [3], "[3]"])
    def test_odd_tools_are_a_drop(self, odd):
        assert only("openai", messages(U, A, tools=odd)) == Drop("odd_tools")
        assert only("openai", messages(U, {"role": "assistant", "content": "", "tool_calls": odd})) == Drop(
            "odd_tool_calls"
        )
