"""`corefit templates`, and templates and `unroll` through the whole of `corefit inspect`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from chat_shapes import write_shape
from cli import corefit
from tiny import write_tokenizer

import corefit as package
from corefit.data.tokenizer import Tokenizer
from corefit.errors import DataError
from corefit.prepare import prepare, resolve
from corefit.registry import Registry
from corefit.samples import tally
from corefit.show import CONVERSATIONS, template_reader


def lines_of(done) -> list[str]:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_list_names_summary_stops_and_source(tmp_path):
    lines = lines_of(corefit("templates", cwd=tmp_path))
    assert [line.split("  ")[0] for line in lines] == list(Registry.load().templates)
    assert (
        "llama3_chat  Llama 3 Instruct: header tokens, <|eot_id|> (stop: <|eot_id|>; "
        "XTuner v0.1.23, PROMPT_TEMPLATE.llama3_chat)"
    ) in lines
    assert [line.split("  ")[0] for line in lines_of(corefit("templates", "wizard", cwd=tmp_path))] == [
        "wizardcoder",
        "wizardlm",
        "wizardlm@0.1.9",
    ]


def test_a_template_is_shown_on_a_sample_conversation(tmp_path, tiny_tokenizer):
    lines = lines_of(corefit("templates", "internlm_chat", cwd=tmp_path))
    assert lines[1:4] == [
        "control tokens, which content can't forge: <eoh>  <eoa>",
        "markers in plain text, counted where content has them: <|System|>:  <|User|>:  <|Bot|>:",
        "[+supervised+]  {control token}  · between segments",
    ]
    assert lines[4].startswith("<bos> and <eos> stand for the tokenizer's own; --tokenizer PATH")
    assert "\n".join(lines[5:]) == (
        "\n{<bos>}·<|System|>:Be brief.\\n\n<|User|>:Hi! 你好·{<eoh>}·\\n\n<|Bot|>:[+Hello 🙂·{<eoa>}+]\\n\n"
        "·<|User|>:2 + 2?·{<eoh>}·\\n\n<|Bot|>:[+4.·{<eoa>}+]\\n\n"
    )
    lines = lines_of(corefit("templates", "internlm_chat", "--tokenizer", tiny_tokenizer, cwd=tmp_path))
    assert lines[3] == "[+supervised+]  {control token}  · between tokens"
    assert lines[5].startswith("{<s>}·<·|·S·") and "·{<eoa>}+]" in lines[-2]
    lines = lines_of(corefit("templates", "llama3_chat", "--tokenizer", tiny_tokenizer, cwd=tmp_path))
    assert lines[1] == (
        f"no tokens of {tiny_tokenizer}, shown as if model.add_tokens had them: "
        "<|start_header_id|>  <|end_header_id|>  <|eot_id|>"
    )
    assert lines[-1].endswith("·{<|eot_id|>}+]")
    lines = lines_of(corefit("templates", "minicpm", cwd=tmp_path))
    assert (
        "it can't write a system message (system_message)" in lines and "<用户> 2 + 2? <AI>[+4.·{<eos>}+]" in lines[-2]
    )
    lines = lines_of(corefit("templates", "tokenizer", "--tokenizer", tiny_tokenizer, cwd=tmp_path))
    assert lines[-2] == "[+4·.·{<|im_end|>}+]\\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lama3_chats"], "no template 'lama3_chats'; did you mean 'llama3_chat'?"),
        (["--diff", "chatml", "qwen_cat"], "no template 'qwen_cat'; did you mean 'qwen_chat'?"),
        (["tokenizer"], "this template is the tokenizer's own: name one with --tokenizer PATH"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, tiny_tokenizer, arguments, message):
    arguments = [*arguments, *([tiny_tokenizer] if arguments[-1] == "--tokenizer" else [])]
    done = corefit("templates", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"corefit: error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_diff_shows_the_first_difference(tmp_path, tiny_tokenizer):
    def diff(*arguments):
        return lines_of(corefit("templates", "--diff", *arguments, cwd=tmp_path))

    assert diff("internlm_chat", "internlm_chat@0.1.9") == [
        "first difference: segment 6 of one turn",
        "  internlm_chat        ... {<eoh>}·\\n<|Bot|>:[+Hello 🙂·{<eoa>}+]\\n",
        "  internlm_chat@0.1.9  ... {<eoh>}·\\n<|Bot|>:[+Hello 🙂·{<eos>}+]",
    ]
    lines = diff("internlm_chat", "internlm_chat@0.1.9", "--tokenizer", tiny_tokenizer)
    before = Tokenizer.load(tiny_tokenizer).encode(["<|User|>:Hi! 你好", "\n<|Bot|>:", "Hello 🙂"])
    assert lines[0] == f"first difference: token {1 + sum(map(len, before)) + 1 + 1} of one turn"  # <s>, <eoh>
    assert lines[1].endswith("·🙂·{<eoa>}+]\\n") and lines[2].endswith("·🙂·{</s>}+]")
    assert diff("vicuna", "wizardlm") == ["vicuna and wizardlm write the same segments, and supervise the same"]
    assert diff("qwen_chat", "chatml")[1:] == [
        "  qwen_chat  ends an answer at <|im_end|>, <|endoftext|>",
        "  chatml     ends an answer at <|im_end|>",
    ]
    lines = diff("chatml", "tokenizer", "--tokenizer", tiny_tokenizer)  # whose Jinja writes an empty one
    assert lines[0] == "first difference: token 2 of an empty system message"
    assert diff("chatml", "minicpm")[0] == "first difference: segment 1 of one turn"


def test_what_one_template_protects_another_may_write_as_text(shared):
    templates, path = Registry.load().templates, str(shared / "data/tokenizer_internlm/tokenizer.model")
    readers = [template_reader(templates[name], path)[0] for name in ("internlm_chat", "moss_sft")]
    pieces = [[piece for piece in read(CONVERSATIONS["one turn"]) if "<eoh>" in piece.text] for read in readers]
    assert [[(piece.text, piece.control) for piece in some] for some in pieces] == [
        [("<eoh>", True)],
        [("<eoh>", False)],
    ]


# ------------------------------------------------------------------------------------------- thinking data, unrolled


GUANACO = [
    "### Human: q1### Assistant: <think>\nr1\n</think>\n\na1### Human: q2### Assistant: <think>\nr2\n</think>\n\na2",
    "### Human: q3### Assistant: a3 <|im_end|>### Human: q4 </think>### Assistant: a4### Human: q5### Assistant: a5",
]


@pytest.fixture
def thinking(tmp_path: Path) -> dict[str, str]:
    import json

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in GUANACO), encoding="utf-8")
    return {"tokenizer": str(write_shape(tmp_path / "qwen3", "qwen3")), "data": str(data), "plugin": "oasst1"}


def supervised(sample) -> list[str]:
    """The text of every run of targets."""
    runs: list[list[int]] = [[]]
    for label in sample["labels"]:
        if label >= 0:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [Tokenizer.load(sample["tokenizer"]).decode(run) for run in runs if run]


def inspected(thinking, **more) -> list[list[str]]:
    return [supervised({**sample, **thinking}) for sample in package.inspect(**thinking, **more)]


def test_thinking_data_is_refused_under_all_with_line_and_turn(thinking, tmp_path):
    with pytest.raises(DataError) as caught:
        inspected(thinking)
    line, turn = f"{thinking['data']}:1: turn 1: ", "because turn 2 follows; set template.supervise to"
    assert str(caught.value).startswith(line) and turn in str(caught.value)
    flags = [word for name, value in thinking.items() for word in (f"--{name}", value)]
    done = corefit("inspect", *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1  # in the order of the first epoch
    assert re.match(rf"corefit: error: {thinking['data']}:[12]: turn 1: .*because turn 2 follows", done.stderr)


def test_unroll_gives_one_sample_a_turn(thinking):
    assert inspected(thinking, sets=["template.supervise=unroll"]) == [
        ["<think>\nr1\n</think>\n\na1<|im_end|>"],
        ["<think>\nr2\n</think>\n\na2<|im_end|>"],
        ["a3 <|im_end|><|im_end|>"],
        ["a4<|im_end|>"],
        ["a5<|im_end|>"],
    ]
    assert inspected(thinking, sets=["template.supervise=last"]) == [
        ["<think>\nr2\n</think>\n\na2<|im_end|>"],
        ["a5<|im_end|>"],
    ]


def test_unroll_balances_and_counts_each_message_once(thinking):
    registry, data = Registry.load(), Path(thinking["data"])
    data.write_text(data.read_text("utf-8").replace("q1", "q1 <|Bot|>:"), encoding="utf-8")
    flags = {"data": str(data), "plugin": "oasst1", "template": "internlm_chat"}
    tokenizer = write_tokenizer(data.parent / "tokenizer")
    found = {}
    for rule in ("all", "unroll"):
        recipe, _, _ = resolve(None, flags, [f"template.supervise={rule}"], registry, need_model=False)
        _, found[rule] = tally(prepare(recipe, registry, tokenizer=tokenizer, spool_to=None), 100)
    whole, unrolled = found["all"], found["unroll"]
    assert whole["records"] == unrolled["records"] and whole["records"]["used"] == 2
    assert whole["messages"] == unrolled["messages"]
    assert whole["messages"]["total"] == 10 and whole["messages"]["notes"] == {"look_alike": 1}
    tokens = unrolled["tokens"]
    assert tokens["encoded"] == tokens["supervised"] + tokens["masked"] > whole["tokens"]["encoded"]
    assert tokens["supervised"] == whole["tokens"]["supervised"]  # every answer is learnt once either way
