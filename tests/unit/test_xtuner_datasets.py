"""XTuner's data set formats: ten well-formed and ten malformed rows each, parity on real rows, the differences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xtuner_reference as xtuner
from corefit_xtuner_datasets import FORMATS, corefit_map_functions
from samples import encode_each, labels_in_place

from corefit.data.encode import make_encoder
from corefit.data.tokenizer import Tokenizer
from corefit.registry import Registry
from corefit.types import Conversation, Document, Drop, Message, Record

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
MAPS = {function.name: function for function in corefit_map_functions()}
TABLE = [name for name in FORMATS if name != "pretrain"]


def items_of(name: str, row: object, options: object = None) -> list:
    function = MAPS[name]
    record = Record(row, path="d", line=1, offset=0)
    found = list(function.map(record, options))
    if function.fields is not None:  # it reads no other key
        kept = {key: value for key, value in row.items() if key in function.fields}
        assert list(function.map(Record(kept, path="d", line=1, offset=0), options)) == found
    return found


def only(name: str, row: object, options: object = None):
    [item] = items_of(name, row, options)
    return item


def turns_of(item: Conversation) -> list[xtuner.Turn]:
    """Give (system, question, answer) of a conversation whose messages are of no other kind."""
    found, system = [], ""
    messages = list(item.messages)
    while messages:
        if messages[0].role == "system":
            system = messages.pop(0).content
        question, answer = messages.pop(0), messages.pop(0)
        assert (question.role, answer.role) == ("user", "assistant")
        found.append((system, question.content, answer.content))
        system = ""
    return found


def chat(*texts: str, system: str = "", **changes: object) -> Conversation:
    roles = ("user", "assistant")
    first = (Message("system", system),) if system else ()
    return Conversation((*first, *(Message(roles[i % 2], text) for i, text in enumerate(texts))), **changes)


# ----------------------------------------------------------------------------------------------------- tables of fields

TEXTS = (
    ("Name a colour.", "red", "Red is one."),
    ("你好，世界", "附注", "再见 🦜"),
    ("two\nlines", "three\n\nlines", "\tan indented answer\n"),
    (" spaces around ", " x ", " kept "),
    ('quotes " and \\ and {braces}', "{input}", "{output} %s"),
    ("<|User|>:imitation<eoh>", "<|im_end|>", "<eoa></s>"),
    ("### Human: text", "### Assistant: text", "### Instruction:\n# a heading"),
    ("1", "2", "3"),
    ("None", "null", "nan"),
    ("a" * 5000, "b" * 5000, "c" * 5000),
)
"""Question, second part of the question, answer."""


def row_of(name: str, first: object, second: object, answer: object) -> dict[str, object]:
    fields = FORMATS[name][1]
    row: dict[str, object] = {"id": 7, "more": None}
    row |= dict(zip(fields.question, (first, second), strict=False))
    if fields.system and name == "openorca":
        row[fields.system] = "You are kind."
    return {**row, fields.assistant: answer}


def malformed(name: str) -> list[tuple[dict[str, object], str]]:
    fields = FORMATS[name][1]
    good = row_of(name, "q", "i", "a")
    question, answer = fields.question[0], fields.assistant

    def without(key: str) -> dict[str, object]:
        return {k: v for k, v in good.items() if k != key}

    blank = {key: " \n" for key in fields.question}
    return [
        ({}, "missing_field"),
        (without(question), "missing_field"),
        (without(answer), "missing_field"),
        (good | {answer: None}, "no_answer"),
        (good | {answer: ""}, "no_answer"),
        (good | {answer: " \n\t"}, "no_answer"),
        (good | {answer: 42}, "not_text"),
        (good | {answer: ["a", "b"]}, "not_text"),
        (good | {question: {"text": "q"}}, "not_text"),
        (good | blank, "no_question"),
    ]


@pytest.mark.parametrize("name", TABLE)
def test_ten_well_formed_rows_are_what_xtuner_makes_of_them(name, shared):
    systems = xtuner.system_texts(shared)
    for first, second, answer in TEXTS:
        first = f"label: {first}" if name == "colors" else first
        row = row_of(name, first, second, answer)
        item = only(name, row)
        if name == "colors" and first.endswith(" "):
            assert item.messages[1].content == "spaces around"
        assert turns_of(item) == xtuner.mapped(name, row, systems)
        assert item.dropped == item.notes == () and item.tools == ()


@pytest.mark.parametrize("name", TABLE)
def test_ten_malformed_rows_are_counted_drops(name):
    rows = malformed(name)
    assert len(rows) == 10
    for row, reason in rows:
        assert only(name, row) == Drop(reason), row


def test_the_system_texts_are_xtuners_to_the_letter(shared):
    systems = xtuner.system_texts(shared)
    said = {name: fields.system_text for name, (_, fields) in FORMATS.items() if fields.system_text}
    assert said == {name: systems[word] for name, word in xtuner.SYSTEM_OF.items()}


# ------------------------------------------------------------------------------------------------------------- pretrain


PRETRAIN = [
    ({"text": "plain text"}, Document("plain text")),
    ({"text": " white space \n around\n"}, Document("white space \n around")),
    ({"text": "你好 🦜"}, Document("你好 🦜")),
    ({"text": "a\n\nb"}, Document("a\n\nb")),
    ({"text": "### Human: x### Assistant: y"}, Document("### Human: x### Assistant: y")),
    ({"text": "<s></s>"}, Document("<s></s>")),
    ({"text": "x" * 10_000}, Document("x" * 10_000)),
    ({"text": "with a title", "title": "t"}, Document("with a title")),
    ({"text": "with meta", "meta": {"url": "u"}}, Document("with meta")),
    ({"text": "0"}, Document("0")),
    ({}, Drop("missing_field")),
    ({"content": "x"}, Drop("missing_field")),
    ({"Text": "x"}, Drop("missing_field")),
    ({"text": None}, Drop("empty_document")),
    ({"text": ""}, Drop("empty_document")),
    ({"text": " \n"}, Drop("empty_document")),
    ({"text": 1}, Drop("not_text")),
    ({"text": ["a"]}, Drop("not_text")),
    ({"text": {"a": "b"}}, Drop("not_text")),
    ({"text": False}, Drop("not_text")),
]

# --------------------------------------------------------------------------------------------------------- conversation


def turns(*rows: dict[str, object]) -> dict[str, object]:
    return {"conversation": list(rows)}


QA = {"input": "q", "output": "a"}
CONVERSATION = [
    (turns(QA), chat("q", "a")),
    (turns({"system": "s", **QA}), chat("q", "a", system="s")),
    (turns({"system": "", **QA}), chat("q", "a")),
    (turns({"system": None, "input": "q", "output": "a", "output_with_loss": None}), chat("q", "a")),
    (turns(QA, {"input": "q2", "output": "a2"}), chat("q", "a", "q2", "a2")),
    (turns({"system": "s", **QA}, {"system": "s", **QA}), chat("q", "a", "q", "a", system="s")),
    (turns({"input": "", "output": "a document"}), Document("a document")),
    (turns({"output": "a document"}), Document("a document")),
    (
        turns({**QA, "output_with_loss": False}, {**QA, "output_with_loss": True}),
        Conversation(
            (
                *(Message("user", "q"), Message("assistant", "a", supervised=False)),
                *(Message("user", "q"), Message("assistant", "a", supervised=True)),
            )
        ),
    ),
    (turns({"input": " 你\n", "output": " 好 "}), chat(" 你\n", " 好 ")),
    ({}, Drop("not_a_list")),
    ({"conversation": None}, Drop("not_a_list")),
    ({"conversation": "q a"}, Drop("not_a_list")),
    (turns(), Drop("empty")),
    ({"conversation": ["q", "a"]}, Drop("malformed_turn")),
    (turns({"input": "q"}), Drop("malformed_turn")),
    (turns({"input": ["q"], "output": "a"}), Drop("malformed_turn")),
    (turns({"input": "q", "output": 3}), Drop("malformed_turn")),
    (turns({"input": "q", "output": ""}), Drop("no_answer")),
    (turns({**QA, "output_with_loss": "maybe"}), Drop("odd_output_with_loss")),
]

# ------------------------------------------------------------------------------------------- msagent_react, moss_sft

TOOL = (
    '{"name": "weather", "description": "tells it", "paths": [{"parameters": [{"name": "city", "description": "c"}]}]}'
)
THINK = '<|startofthink|>```JSON\n{"api_name": "weather", "parameters": {"city": "Bonn"}}```<|endofthink|>'
EXEC = '<|startofexec|>```JSON\n{"t": 20}\n```<|endofexec|>'
CALL = "Action:weather\nAction Input:{'city': 'Bonn'}\n"
REACT = (
    "如果使用工具请遵循以下格式回复：\n```\nThought:思考你当前步骤需要解决什么问题，是否需要使用工具\n"
    "Action:工具名称，你的工具必须从 [NAMES] 选择\nAction Input:工具输入参数\n```\n工具返回按照以下格式回复：\n```\n"
    "Response:调用工具后的结果\n```\n如果你已经知道了答案，或者你不需要工具，请遵循以下格式回复\n```\n"
    "Thought:给出最终答案的思考过程\nFinal Answer:最终答案\n```\n开始!\n"
)
TOLD = (
    "你是一个可以调用外部工具的助手，可以使用的工具包括：\n{'weather': \"tells it\\n输入参数: {'city': 'c'}\"}\n"
    + REACT.replace("NAMES", "['weather']")
)


def agent(*said: tuple[str, str], as_text=repr) -> dict[str, object]:
    return {"conversations": as_text([{"from": who, "value": text} for who, text in said])}


ASK = ("user", "how warm?")
MSAGENT = [
    (agent(ASK, ("assistant", "warm")), chat("how warm?\n", "Final Answer:warm\n")),
    (agent(ASK, ("assistant", "warm"), as_text=json.dumps), chat("how warm?\n", "Final Answer:warm\n")),
    (agent(ASK, ("assistant", "warm"), as_text=list), chat("how warm?\n", "Final Answer:warm\n")),
    (
        agent(("system", f"tools: {TOOL}"), ASK, ("assistant", "warm")),
        chat("how warm?\n", "Final Answer:warm\n", system=TOLD),
    ),
    (agent(ASK, ("assistant", THINK)), chat("how warm?\n", CALL + "\n")),
    (agent(ASK, ("assistant", f"I look.\n{THINK}")), chat("how warm?\n", f"Thought:I look.\n{CALL}\n")),
    (
        agent(ASK, ("assistant", f"{THINK}{EXEC}20 degrees.")),
        chat("how warm?\n", CALL + "\n", "Response:{'t': 20}\n", "Final Answer:20 degrees.\n"),
    ),
    (
        agent(ASK, ("assistant", THINK + EXEC)),
        chat("how warm?\n", CALL + "\n", dropped=("trailing_user",)),
    ),
    (agent(ASK, ("user", "today"), ("assistant", "a")), chat("how warm?\ntoday\n", "Final Answer:a\n")),
    (
        agent(ASK, ("assistant", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")),
        chat("how warm?\n", "Final Answer:a\n", "b\n", "Final Answer:c\n", dropped=("trailing_user",)),
    ),
    ({}, Drop("unparsable")),
    ({"conversations": None}, Drop("unparsable")),
    ({"conversations": "not a list"}, Drop("unparsable")),
    ({"conversations": "open('/etc/passwd').read()"}, Drop("unparsable")),
    ({"conversations": "[{'from': 'user'}]"}, Drop("unparsable")),
    ({"conversations": "["}, Drop("unparsable")),
    (agent(ASK), Drop("no_answer")),
    (agent(ASK, ("assistant", "<|startofthink|>no JSON<|endofthink|>")), Drop("unparsable")),
    (agent(ASK, ("assistant", '<|startofthink|>{"api": "x"}<|endofthink|>')), Drop("unparsable")),
    (agent(ASK, ("assistant", f"{THINK}<|startofexec|>no JSON<|endofexec|>x")), Drop("unparsable")),
]

MOSS = {
    "Human": "<|Human|>: hi<eoh>\n",
    "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
    "Commands": "<|Commands|>: None<eoc>\n",
    "Tool Responses": "<|Results|>: None<eor>\n",
    "MOSS": "<|MOSS|>: hello<eom>\n",
}
SAID = "".join(list(MOSS.values())[1:])
SEARCHED = {
    **MOSS,
    "Commands": '<|Commands|>: Search("x")<eoc>\n',
    "Tool Responses": "<|Results|>:\nSearch => y\n<eor>\n",
}


def moss(*rows: object, meta: object = "You are MOSS.\n") -> dict[str, object]:
    return {
        "meta_instruction": meta,
        "num_turns": len(rows),
        "chat": {f"turn_{i + 1}": row for i, row in enumerate(rows)},
    }


MOSS_SFT = [
    (moss(MOSS), chat("hi", SAID, system="You are MOSS.\n")),
    (moss(MOSS, meta=None), chat("hi", SAID)),
    (moss(MOSS, meta=""), chat("hi", SAID)),
    (moss(MOSS, MOSS), chat("hi", SAID, "hi", SAID, system="You are MOSS.\n")),
    (moss({"Human": "hi", "MOSS": "hello"}, meta=""), chat("hi", "hello")),
    (moss({"Human": "<|Human|>: 你好<eoh>", "MOSS": "好"}, meta=""), chat("你好", "好")),
    (moss({**MOSS, "Tool Responses": ""}, meta=""), chat("hi", SAID.replace("<|Results|>: None<eor>\n", ""))),
    ({**moss(MOSS, meta=""), "plain_text": "x"}, chat("hi", SAID)),
    (moss({**MOSS, "Human": "<|Human|>: a\nb <eoh>\n"}, meta=""), chat("a\nb", SAID)),
    (
        moss(SEARCHED, meta=""),
        Conversation(
            (
                Message("user", "hi"),
                Message("assistant", MOSS["Inner Thoughts"] + SEARCHED["Commands"]),
                Message("tool", SEARCHED["Tool Responses"]),
                Message("assistant", MOSS["MOSS"]),
            )
        ),
    ),
    ({}, Drop("no_answer")),
    ({"chat": None, "meta_instruction": "x"}, Drop("no_answer")),
    ({"chat": [MOSS], "meta_instruction": "x"}, Drop("no_answer")),
    (moss(), Drop("no_answer")),
    ({"chat": {"first": MOSS}, "meta_instruction": "x"}, Drop("no_answer")),
    (moss("hi"), Drop("malformed_turn")),
    (moss({"Human": "hi"}), Drop("malformed_turn")),
    (moss({"MOSS": "hi"}), Drop("malformed_turn")),
    (moss({**MOSS, "Commands": None}), Drop("malformed_turn")),
    (moss({**MOSS, "Human": 3}), Drop("malformed_turn")),
]

OTHERS = {"pretrain": PRETRAIN, "conversation": CONVERSATION, "msagent_react": MSAGENT, "moss_sft": MOSS_SFT}


@pytest.mark.parametrize("name", OTHERS)
def test_ten_well_formed_and_ten_malformed_rows(name):
    assert len(OTHERS[name]) == 20 and sum(isinstance(item, Drop) for _, item in OTHERS[name]) == 10
    for row, wanted in OTHERS[name]:
        before = json.dumps(row)
        assert only(name, row) == wanted, row
        assert json.dumps(row) == before


def test_every_name_that_xtuner_listed_is_there(shared):
    text = (shared / "reference/xtuner.md").read_text(encoding="utf-8")
    table = text.partition("### 2.1 Dataset map functions")[2].partition("Preference maps")[0]
    listed = {line.split("|")[1].strip().partition(" ")[0] for line in table.splitlines() if line.startswith("| ")}
    named = set(Registry.load().map_functions)
    assert len(listed) == 21  # with the table's head
    assert listed - named == {"name", "llava", "llava_image_only"}  # pictures


# --------------------------------------------------------------------------------------------------------------- sniffs


def test_no_record_is_recognised_by_two_formats_and_those_that_add_a_system_text_have_to_be_named():
    functions = Registry.load().map_functions.values()
    rows = [(name, row_of(name, "q", "i", "a")) for name in TABLE]
    rows += [(name, row) for name, table in OTHERS.items() for row, item in table if not isinstance(item, Drop)]
    for name, row in rows:
        found = [f.name for f in functions if f.sniff is not None and f.sniff(Record(row, path="d", line=1, offset=0))]
        assert len(found) <= 1, (name, row, found)
        if name in FORMATS and FORMATS[name][1].system_text:
            assert name not in found
        elif name in TABLE:
            assert found == [name]


# ------------------------------------------------------------------------------------------------- parity on real rows


@pytest.mark.parametrize("language", ["en", "zh"])
def test_real_alpaca_rows_are_what_xtuner_makes_of_them_but_for_the_line_break(language, shared):
    """Where the input is empty XTuner leaves a line break behind the instruction."""
    rows = json.loads((shared / f"data/alpaca_{language}_demo.json").read_text(encoding="utf-8"))
    assert len(rows) == {"en": 999, "zh": 1000}[language]
    n_without_input = 0
    for name in ("alpaca", "alpaca@0.1.9", "medical"):
        for row in rows:
            wanted = xtuner.mapped(name, row, xtuner.system_texts(shared))
            if not row["output"]:  # XTuner trains on the end token alone
                assert only(name, row) == Drop("no_answer")
                continue
            if not row["input"]:
                n_without_input += 1
                [(system, question, answer)] = wanted
                assert question.endswith("\n")
                wanted = [(system, question.removesuffix("\n"), answer)]
            assert turns_of(only(name, row)) == wanted
    assert n_without_input > 1000


@pytest.mark.parametrize("template", ["internlm_chat", "default"])
@pytest.mark.parametrize(
    ("n_alpaca", "n_oasst"), [(30, 10), pytest.param(500, 100, marks=pytest.mark.full)], ids=["some", "all"]
)
def test_ids_and_labels_of_real_rows_equal_xtuners_through_map_function_and_template(
    template, n_alpaca, n_oasst, shared
):
    """By an independent reference, with InternLM's tokenizer, but for the line break behind a lone instruction."""
    pytest.importorskip("sentencepiece")
    model = shared / "data/tokenizer_internlm/tokenizer.model"
    tokenizer, systems = Tokenizer.load(model), xtuner.system_texts(shared)
    added = {token: tokenizer.token_id(token) for token in ("<s>", "</s>", "<eoh>", "<eoa>")}
    oracle, strings = xtuner.Encoder(model, added), xtuner.strings_of(shared)[template]
    encoder = make_encoder(Registry.load().template(template), tokenizer)
    oasst1, pairs = Registry.load().map_function("oasst1"), []
    for name, language in (("alpaca", "en"), ("alpaca", "zh"), ("medical", "zh")):
        rows = json.loads((shared / f"data/alpaca_{language}_demo.json").read_text(encoding="utf-8"))
        for row in [row for row in rows if row["output"]][:n_alpaca]:
            [(system, question, answer)] = xtuner.mapped(name, row, systems)
            question = question if row["input"] else question.removesuffix("\n")
            pairs.append(([(system, question, answer)], only(name, row)))
    for line in (shared / "data/oasst/guanaco_100.jsonl").read_text(encoding="utf-8").splitlines()[:n_oasst]:
        row = json.loads(line)
        [item] = oasst1.map(row)
        pairs.append((xtuner.oasst1_turns(row["text"]), item))
    assert len(pairs) == 3 * n_alpaca + n_oasst
    results = encode_each(encoder, [(item, "d:1") for _, item in pairs])
    for (turns, _), result in zip(pairs, results, strict=True):
        ids, wanted = oracle.encode(xtuner.written(template, strings, turns, bos="<s>", eos="</s>"))
        assert result.sample.input_ids.tolist() == ids
        assert labels_in_place(result.sample) == wanted


# --------------------------------------------------------------------- what corefit does differently; rows of the table


class TestDifferences:
    def test_every_row_of_the_table_is_of_a_format_that_is_there_and_says_all_three(self):
        page = (PLUGINS / "README.md").read_text("utf-8").partition("## What corefit does differently, and why\n")[2]
        rows = [line[2:-2].split(" | ") for line in page.partition("\n## ")[0].splitlines() if line.startswith("| ")]
        known = {*Registry.load().map_functions, "every format", "llava", "llava_image_only"}
        assert rows[0] == ["format", "XTuner", "corefit"] and len(rows) > 15
        for names, theirs, ours in rows[1:]:
            assert theirs.strip() and ours.strip() and {*names.split(", ")} <= known

    @pytest.mark.parametrize("nothing", ["", None, " \n"])
    def test_an_empty_part_of_the_question_is_left_out(self, nothing):
        for name in ("alpaca", "alpaca@0.1.9", "alpaca_zh", "medical"):
            assert only(name, row_of(name, "q", nothing, "a")).messages[-2].content == "q"
        assert only("sql", row_of("sql", nothing, "q", "a")).messages[-2].content == "q"
        row = row_of("alpaca", "q", "i", "a")
        del row["input"]
        assert only("alpaca", row) == chat("q", "a")

    def test_system_and_history_of_an_alpaca_row_are_read(self):
        row = {**row_of("alpaca", "q", "", "a"), "system": "s", "history": [["q0", "a0"], ("q1", "a1")]}
        assert only("alpaca", row) == chat("q0", "a0", "q1", "a1", "q", "a", system="s")
        assert only("alpaca", {**row, "system": None, "history": None}) == chat("q", "a")
        for odd in ("q0", [["q0"]], [["q0", None]], ["qa"], {"q0": "a0"}):
            assert only("alpaca", {**row, "history": odd}) == Drop("malformed_history")

    def test_nooutput_is_a_counted_drop_in_alpaca_alone(self):
        for name in ("alpaca", "alpaca@0.1.9"):
            assert only(name, row_of(name, "q", "i", "<nooutput>")) == Drop("no_answer")
        assert isinstance(only("medical", row_of("medical", "q", "i", "<nooutput>")), Conversation)

    def test_a_colour_without_a_colon_keeps_its_description(self, shared):
        row = {"description": "deep blue", "color": "#00f"}
        assert only("colors", row).messages[1].content == "deep blue"
        assert xtuner.mapped("colors", row, xtuner.system_texts(shared))[0][1] == ""
        assert only("colors", {**row, "description": "Deep blue: like: night "}).messages[1].content == "like: night"

    def test_one_loss_flag_masks_no_other_turn(self):
        item = only("conversation", turns(QA, {**QA, "output_with_loss": False}, {**QA, "output_with_loss": None}))
        assert [m.supervised for m in item.messages if m.role == "assistant"] == [None, False, None]
        for value, wanted in ((True, True), (False, False), ("False", False), ("true", True), (None, None)):
            item = only("conversation", turns(QA, {**QA, "output_with_loss": value}))
            assert item.messages[-1].supervised is wanted

    def test_an_empty_turn_in_the_middle_is_masked_and_one_at_the_end_left_out(self):
        item = only("conversation", turns(QA, {"input": "x", "output": ""}, QA, {"input": "y", "output": None}))
        assert item == Conversation(
            (
                *(Message("user", "q"), Message("assistant", "a")),
                *(Message("user", "x"), Message("assistant", "", supervised=False)),
                *(Message("user", "q"), Message("assistant", "a")),
            ),
            (),
            ("trailing_user",),
            ("empty_answer",),
        )

    def test_the_system_text_of_a_turn_that_is_left_out_is_left_out_too(self):
        item = only("conversation", turns(QA, {"system": "s", "input": "x", "output": ""}))
        assert item == Conversation((Message("user", "q"), Message("assistant", "a")), (), ("trailing_user",))

    def test_a_system_text_in_a_later_turn_stays_where_it_is(self):
        """What a template does with it is the template's; XTuner's are refused there, counted."""
        item = only("conversation", turns(QA, {"system": "s", **QA}))
        assert [message.role for message in item.messages] == ["user", "assistant", "system", "user", "assistant"]

    def test_text_of_a_file_is_never_evaluated(self, tmp_path):
        planted = tmp_path / "planted"
        row = {"conversations": f"[__import__('pathlib').Path({str(planted)!r}).write_text('x')]"}
        assert only("msagent_react", row) == Drop("unparsable")
        assert not planted.exists()

    def test_moss_can_be_called_otherwise(self):
        options = MAPS["moss_sft"].options(bot_name="Ada")
        item = only("moss_sft", moss(MOSS), options)
        assert item.messages[0].content == "You are Ada.\n" and "<|Ada|>: hello" in item.messages[-1].content
