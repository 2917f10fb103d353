from __future__ import annotations

import copy
import gzip
import json
import random
import subprocess
import sys
from collections import Counter

import corefit_oasst1
import pytest
from corefit_oasst1 import Oasst1Options, oasst1, sniff

from corefit import BadRecord, Conversation, DataError, Drop, Message, Position, Record, Sources, UserError

H, A = "### Human: ", "### Assistant: "


def one(text):
    (item,) = oasst1({"text": text})
    return item


def turns(item):
    return [(m.role, m.content) for m in item.messages]


def masked(item):
    return [m.content for m in item.messages if m.role == "assistant" and m.supervised is False]


def message(text, role="prompter", replies=(), **more):
    return {"text": text, "role": role, "replies": list(replies), **more}


def tree(prompt):
    return {"message_tree_id": "t", "prompt": prompt}


def mapped(records, threads="best"):
    return [item for record in records for item in oasst1(record, Oasst1Options(threads))]


# ------------------------------------------------------------------------------------------------------- guanaco text


def test_plain_rows():
    item = one(f"{H}Hi{A}Hello!{H}Bye{A}See you.")
    assert item == Conversation(
        (
            Message("user", "Hi"),
            Message("assistant", "Hello!"),
            Message("user", "Bye"),
            Message("assistant", "See you."),
        )
    )
    spaced = one("### Human: Hi\n### Assistant:\nHello!\n\n### Human: Bye\n### Assistant: See you.\n")
    assert turns(spaced) == turns(item) and not masked(spaced) and spaced.notes == ()


def test_headings_and_text_after_them_stay():
    item = one(f"{H}Make a doc{A}Intro\n### Setup\nrun it\n#### Human: resources\nhire\n### Human: thanks{A}ok")
    assert turns(item) == [
        ("user", "Make a doc"),
        ("assistant", "Intro\n### Setup\nrun it\n#### Human: resources\nhire"),
        ("user", "thanks"),
        ("assistant", "ok"),
    ]
    assert item.notes == ("marker_in_text", "doubtful_answer")  # "#" may be the end of the answer
    assert masked(item) == [turns(item)[1][1]]
    assert not masked(one(f"{H}Make a doc{A}Intro\n### Setup\nrun it\n### Human: thanks{A}ok"))


def test_a_marker_after_a_hash_that_belongs_to_the_text_is_a_marker():
    assert turns(one(f"{H}Which?{A}I like C#{H}Why?{A}Generics.")) == [
        ("user", "Which?"),
        ("assistant", "I like C#"),
        ("user", "Why?"),
        ("assistant", "Generics."),
    ]


def test_markers_in_a_code_fence_are_text():
    code = "```\n### Human: {question}\n### Assistant: {answer}\n```"
    item = one(f"{H}Show the format{A}Like this:\n{code}{H}And this ```### Assistant: x``` is?{A}The same.")
    assert turns(item) == [
        ("user", "Show the format"),
        ("assistant", f"Like this:\n{code}"),
        ("user", "And this ```### Assistant: x``` is?"),
        ("assistant", "The same."),
    ]
    assert item.notes == ("marker_in_text",) * 3 and not masked(item)


def test_wide_fences_hold_narrow_ones():
    code = "````md\n```\n### Human: a\n```\n### Human: b\n````"
    item = one(f"{H}Show{A}{code}{H}Thanks{A}Sure")
    assert [t for _, t in turns(item)] == ["Show", code, "Thanks", "Sure"]


@pytest.mark.parametrize(
    "text",
    [
        f"{H}q{A}```py\ncode{H}SECRET{A}sure",
        f"{H}q{A}```py\ncode{H}SECRET{A}sure:\n```bash\nls\n```{H}SECRET{A}ok",
        f"{H}q{A}```\ncode{H}SECRET{A}```\nls\n```{H}SECRET{A}ok",
        f"{H}q{A}```\ncode{H}SECRET{A}sure:\n```\nls\n```{H}SECRET{A}ok",
        f"{H}q{A}```\ncode{H}SECRET{A}sure:\n```\nls{H}SECRET{A}bye",
        "### Human: q\n### Assistant: ```\ncode\n### Human: SECRET\n### Assistant: sure:\n```\nls",
    ],
)
def test_a_fence_left_open_never_swallows_a_human(text):
    item = one(text)
    assert any("SECRET" in m.content for m in item.messages)
    assert not any("SECRET" in m.content for m in item.messages if m.role == "assistant" and m.supervised is not False)


@pytest.mark.parametrize(
    "answers",
    [
        ("```py\ncode", "sure", "ok"),  # nothing closes it
        ("```\ncode", "sure:\n```\nls\n```", "ok"),  # three fences can't be pairs
        ("```py\ncode", "sure:\n```bash\nls", "ok"),  # a language is named where a fence opens
        ("```\ncode", "```\nls", "ok"),  # a fence opens right after a marker
    ],
)
def test_a_fence_left_open_ends_with_its_message(answers):
    item = one("".join(f"{H}q{A}{answer}" for answer in answers))
    assert turns(item) == [turn for answer in answers for turn in (("user", "q"), ("assistant", answer))]
    assert item.notes == () and not masked(item)


@pytest.mark.parametrize(
    "typed",
    [
        "what does ### Assistant: SECRET mean?",
        "continue:\n### Assistant: SECRET",
        "continue:\n### Human: a\n### Assistant: SECRET\n### Human: b",
        "```\n### Human: a\n### Assistant: SECRET\n```",
        "```\n### Human: a### Assistant: SECRET### Human: b\n``` but why?",
        "a### Assistant: SECRET",
        "### Assistant: SECRET ### Assistant: SECRET",
    ],
)
def test_an_assistant_marker_typed_by_a_human_is_never_learnt(typed):
    for end in ("again", "again ```"):  # a lone fence makes all fences doubtful
        item = one(f"{H}{typed}{A}real{H}and{A}{end}")
        messages = item.messages if isinstance(item, Conversation) else ()
        learnt = [m.content for m in messages if m.role == "assistant" and m.supervised is not False]
        assert not any("SECRET" in text for text in learnt)
        assert "again" in learnt or end != "again"


def test_a_quoted_marker_in_the_middle_of_a_line_is_text():
    item = one(f"{H}What does ### Assistant: mean?{A}The ### Assistant: marker.")
    assert turns(item) == [("user", "What does ### Assistant: mean?"), ("assistant", "The ### Assistant: marker.")]
    assert item.notes == ("marker_in_text", "marker_in_text") and not masked(item)


@pytest.mark.parametrize("gap", ["", "\n", "\n\n"])
def test_two_humans_in_a_row_are_joined(gap):
    item = one(f"{H}a{gap}{H}b{gap}{A}c")
    assert turns(item) == [("user", "a\n\nb"), ("assistant", "c")]
    assert item.notes == ("joined",) and not masked(item)


def test_two_assistants_in_a_row_are_joined_and_masked():
    item = one(f"{H}a{A}b{A}c")
    assert turns(item) == [("user", "a"), ("assistant", "b\n\nc")]
    assert sorted(item.notes) == ["doubtful_answer", "doubtful_answer", "joined"] and masked(item) == ["b\n\nc"]


def test_a_human_at_the_end_is_left_out_and_an_assistant_at_the_beginning_is_masked():
    item = one(f"{A}Welcome{H}q{A}a{H}b{H}c")
    assert turns(item) == [("assistant", "Welcome"), ("user", "q"), ("assistant", "a")]
    assert item.dropped == ("trailing_user", "trailing_user")
    assert item.notes == ("leading_assistant",) and masked(item) == ["Welcome"]


def test_what_stands_before_the_first_marker_is_left_out():
    item = one(f"You are kind.\n{H}q{A}a")
    assert turns(item) == [("user", "q"), ("assistant", "a")] and item.dropped == ("leading_text",)


def test_a_human_marker_without_a_space_is_one_an_assistant_marker_is_not():
    item = one(f"{H}write:### Assistant:x{A}a### Human:b{A}c### Human:\nd{A}e")
    assert [t for _, t in turns(item)] == ["write:### Assistant:x", "a", "b", "c", "d", "e"]
    assert item.notes == ("marker_in_text",)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": ""}, "empty"),
        ({"text": " \n"}, "empty"),
        ({"text": "no marker at all"}, "no_marker"),
        ({"text": "### human: lower"}, "no_marker"),
        ({"text": H}, "empty"),
        ({"text": f"{H}{A}"}, "empty"),
        ({"text": f"{H}only{H}humans"}, "no_answer"),
        ({"text": f"{H}q### Assistant:"}, "no_answer"),
        ({"text": 3}, "not_oasst1"),
        ({}, "not_oasst1"),
        ({"messages": []}, "not_oasst1"),
        ({"message_id": "a", "parent_id": None, "text": "x", "role": "prompter"}, "flat_message"),
        (tree(message("x", deleted=True, replies=[message("y", "assistant")])), "deleted"),
        (tree(message("x", review_result=False)), "review_failed"),
        (tree(message("x", role="system")), "unknown_role"),
        (tree(message(None)), "malformed_message"),
        (tree(message("x")), "no_answer"),
    ],
)
def test_what_cannot_be_used_is_dropped_with_a_reason(row, reason):
    assert list(oasst1(row)) == [Drop(reason)]
    assert list(oasst1(row, Oasst1Options("all"))) == [Drop(reason)]


def test_an_empty_answer_is_left_out():
    item = one(f"{H}a{A}{H}b{A}c")
    assert turns(item) == [("user", "a\n\nb"), ("assistant", "c")] and item.dropped == ("empty_message",)


# ------------------------------------------------------------------------------------------------------ message trees


def test_the_best_thread():
    replies = [
        message("none", "assistant"),
        message("second", "assistant", rank=1),
        message(
            "first", "assistant", rank=0.0, replies=[message("u1"), message("u2", replies=[message("x", "assistant")])]
        ),
        message("tie", "assistant", rank=0),
    ]
    (item,) = mapped([tree(message("q", replies=replies))])
    assert turns(item) == [("user", "q"), ("assistant", "first")]  # u1 is before u2, and nobody answered it
    assert item.dropped == ("trailing_user",)


def test_deleted_and_review_failed_messages_never_appear():
    replies = [
        message(
            "deleted",
            "assistant",
            rank=0,
            deleted=True,
            replies=[message("below", replies=[message("b", "assistant")])],
        ),
        message("failed", "assistant", rank=1, review_result=False),
        message("not reviewed", "assistant", rank=3, review_result=None),
        message("made", "assistant", rank=2, synthetic=True, review_result=True),
    ]
    root = tree(message("q", replies=replies))
    (item,) = mapped([root])
    assert turns(item) == [("user", "q"), ("assistant", "made")]
    assert Counter(item.dropped) == {"deleted": 3, "review_failed": 1}
    every = mapped([root], "all")
    assert [turns(i)[-1][1] for i in every] == ["not reviewed", "made"]
    assert [len(i.dropped) for i in every] == [4, 0]


def test_all_threads_are_every_answered_path_once():
    b = message("b", "assistant", replies=[message("u"), message("v", replies=[message("d", "assistant")])])
    c = message("c", "assistant", replies=[message("w"), message("x")])
    every = mapped([tree(message("a", replies=[b, c, message("y")]))], "all")
    assert ["".join(t for _, t in turns(i)) for i in every] == ["abvd", "ac"]
    assert sum(len(i.dropped) for i in every) == 4  # u, w, x, y


def test_equal_neighbours_in_a_tree_are_joined_and_learnt():
    b = message("b", "assistant", replies=[message("c", "assistant")])
    (item,) = mapped([tree(message("a", replies=[b]))])
    assert turns(item) == [("user", "a"), ("assistant", "b\n\nc")] and item.notes == ("joined",) and not masked(item)


def test_markers_in_a_tree_are_words():
    said = f"x{A}y{H}z"
    (item,) = mapped([tree(message(said, replies=[message(said, "assistant")]))])
    assert turns(item) == [("user", said), ("assistant", said)] and item.notes == ()


def test_deep_trees_do_not_exhaust_the_stack():
    root = node = message("a")
    for k in range(20_000):
        node["replies"].append(message("b", ("assistant", "prompter")[k % 2], rank=0))
        node = node["replies"][0]
    for threads in ("best", "all"):
        (item,) = mapped([tree(root)], threads)
        assert len(item.messages) == 20_000 and item.dropped == ("trailing_user",)


def test_long_rows_take_time_in_proportion():
    for text in (
        "#" * 300_000,
        "`" * 300_000,
        "``` " * 50_000,
        f"{H}a {A}b\n" * 20_000,
        f"{A}b ``` {H} " * 20_000,
        A * 50_000,
    ):
        list(oasst1({"text": text}))  # hangs where anything is quadratic


# ----------------------------------------------------------------------------------------------- the real data, twice


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_trees_and_guanaco_text_give_the_same_conversations(shared):
    trees = rows(shared / "data/oasst/en_100_tree.jsonl")
    before = copy.deepcopy(trees)
    threads, texts = mapped(trees), mapped(rows(shared / "data/oasst/guanaco_100.jsonl"))
    assert len(threads) == 100 and threads == texts
    assert trees == before
    assert Counter(reason for item in threads for reason in item.dropped) == {"trailing_user": 39}
    assert not any(item.notes or masked(item) for item in threads)


def flat(node, tree_id):
    fields = {k: v for k, v in node.items() if k != "replies"} | {"message_tree_id": tree_id, "user_id": "u"}
    return [fields, *(m for reply in node["replies"] for m in flat(reply, tree_id))]


def write(path, messages):
    path.write_text("".join(json.dumps(m) + "\n" for m in messages), encoding="utf-8")
    return path


def test_flat_messages_give_the_same_trees(shared, tmp_path):
    trees = rows(shared / "data/oasst/en_100_tree.jsonl")
    messages = [m for t in trees for m in flat(t["prompt"], t["message_tree_id"])]
    # answers first, so that a child comes before its parent; trees interleaved; siblings keep their order
    random.Random(0).shuffle(trees)
    queues = {t["message_tree_id"]: flat(t["prompt"], t["message_tree_id"]) for t in trees}
    mixed = [q[k] for k in range(max(map(len, queues.values()))) for q in queues.values() if k < len(q)]
    mixed.sort(key=lambda m: m["role"])
    assert [m["message_id"] for m in mixed] != [m["message_id"] for m in messages]
    paths = (write(tmp_path / "a.jsonl", mixed[::3]), write(tmp_path / "b.jsonl", mixed[1::3] + mixed[2::3]))
    mixed = [m for path in paths for m in rows(path)]
    order = {m["message_id"]: k for k, m in enumerate(mixed)}

    def sort(node):
        node["replies"].sort(key=lambda m: order[m["message_id"]])
        for reply in node["replies"]:
            sort(reply)

    expected = {}
    for t in trees:
        sort(t["prompt"])
        for threads in ("best", "all"):
            expected[t["message_tree_id"], threads] = list(oasst1(t, Oasst1Options(threads)))
    texts = {str(path): rows(path) for path in paths}
    records = list(corefit_oasst1.read(Sources(paths)))
    assert len(records) == 100 and len(mixed) == 1167
    for record in records:
        for threads in ("best", "all"):
            assert list(oasst1(record, Oasst1Options(threads))) == expected[record["message_tree_id"], threads]
        path, line = record.origin.rsplit(":", 1)
        assert texts[path][int(line) - 1]["message_id"] == record["message_tree_id"]
    assert sum(record.size for record in records) == sum(path.stat().st_size for path in paths)


def test_trees_and_text_are_passed_through(shared, tmp_path):
    for name in ("en_100_tree", "guanaco_100"):
        path = shared / f"data/oasst/{name}.jsonl"
        records = list(corefit_oasst1.read(Sources((path,))))
        assert [dict(r) for r in records] == rows(path) and all(map(sniff, records))
        (again, *_) = corefit_oasst1.read(Sources((path,)), None, records[40].position)
        assert dict(again) == dict(records[40]) and again.origin == records[40].origin
        assert corefit_oasst1.index(Sources((path,))).tolist() == [list(r.position) for r in records]


# ------------------------------------------------------------------------------------------------------ flat messages


def said(message_id, parent=None, text="x", role=None, **more):
    role = role or ("assistant" if parent else "prompter")
    return {"message_id": message_id, "parent_id": parent, "text": text, "role": role, **more}


def test_what_makes_no_tree_is_a_bad_record_in_its_place(tmp_path):
    path = write(
        tmp_path / "flat.jsonl",
        [
            said("child", "root", "answer"),  # 1
            said("orphan", "nowhere"),  # 2
            said("below", "orphan"),  # 3
            said("root", None, "question"),  # 4
            said("c1", "c2"),  # 5
            said("hung", "c1"),  # 6
            said("root", None, "again"),  # 7
            said("c2", "c1"),  # 8
            said("self", "self"),  # 9
        ],
    )
    with path.open("a", encoding="utf-8") as file:
        file.write('{"broken": \n{"text": "### Human: a### Assistant: b"}\n')  # 10, 11
    sources = Sources((path,))
    found = list(corefit_oasst1.read(sources))
    assert [(r.line, type(r).__name__) for r in found] == [
        (2, "BadRecord"),
        (4, "Record"),
        (5, "BadRecord"),
        (7, "BadRecord"),
        (9, "BadRecord"),
        (10, "BadRecord"),
        (11, "Record"),
    ]
    reasons = {r.line: str(r) for r in found if isinstance(r, BadRecord)}
    assert "parent nowhere of message orphan is not in the data; 1 below it left out" in reasons[2]
    assert "message c1 is its own ancestor, or below one that is; 2 below it left out" in reasons[5]
    assert f"message root is already there, at {path}:4" in reasons[7]
    assert "message self is its own ancestor" in reasons[9]
    assert sum(r.size for r in found) == path.stat().st_size
    assert [turns(i) for i in mapped([found[1], found[-1]])] == [
        [("user", "question"), ("assistant", "answer")],
        [("user", "a"), ("assistant", "b")],
    ]
    assert corefit_oasst1.index(sources).tolist() == [[0, r.line, r.offset] for r in found]
    for k, record in enumerate(found):
        (first, *rest) = corefit_oasst1.read(sources, None, Position(record.file, record.line, record.offset))
        assert (first.line, len(rest)) == (record.line, len(found) - k - 1)


def test_a_list_and_gzip_hold_flat_messages_too(tmp_path):
    messages = [said("b", "a", "hé"), said("a", None, "q"), said("c", "b", "u", "prompter")]
    files = [tmp_path / "list.json", tmp_path / "lines.jsonl.gz"]
    files[0].write_text("\ufeff" + json.dumps(messages, indent=1, ensure_ascii=False), encoding="utf-8")
    files[1].write_bytes(gzip.compress("".join(json.dumps(m) + "\r\n" for m in messages).encode()))
    for path in files:
        (record,) = corefit_oasst1.read(Sources((path,)))
        (item,) = oasst1(record)
        assert turns(item) == [("user", "q"), ("assistant", "hé")] and item.dropped == ("trailing_user",)


def test_threads_and_trees_over_the_limits_are_bad_records(tmp_path):
    chain = [said("0")] + [said(str(k), str(k - 1)) for k in range(1, corefit_oasst1.MAX_THREAD + 1)]
    path = write(tmp_path / "a.jsonl", chain)
    (bad,) = corefit_oasst1.read(Sources((path,)))
    assert isinstance(bad, BadRecord) and "201 messages, over the limit of 200" in bad.reason
    (good,) = corefit_oasst1.read(Sources((write(tmp_path / "b.jsonl", chain[:-1]),)))
    assert json.loads(json.dumps(dict(good))) == dict(good)
    (large,) = corefit_oasst1.read(Sources((write(tmp_path / "c.jsonl", chain[:9]),), 400))
    assert isinstance(large, BadRecord) and "over the limit of 400" in large.reason


def test_a_file_that_changes_is_noticed(tmp_path):
    long = "x" * 2**20  # the file is still the old one where it was read ahead
    path = write(tmp_path / "a.jsonl", [said("a"), said("b", "a"), said("p", None, long), said("c"), said("d", "c")])
    records = corefit_oasst1.read(Sources((path,)))
    next(records)
    write(path, [said("a"), said("b", "a"), said("p", None, long), said("e"), said("d", "c")])
    with pytest.raises(DataError, match=r"a.jsonl:4: the file changed"):
        list(records)
    assert [r["message_tree_id"] for r in corefit_oasst1.read(Sources((path,))) if isinstance(r, Record)] == [
        "a",
        "p",
        "e",
    ]


def test_one_pass_serves_all_reads(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [m for k in range(50) for m in (said(f"q{k}"), said(f"a{k}", f"q{k}"))])
    passes = []
    plant = corefit_oasst1._Forest._plant
    monkeypatch.setattr(corefit_oasst1._Forest, "_plant", lambda self: passes.append(1) or plant(self))
    sources = Sources((path,))
    for file, line, offset in corefit_oasst1.index(sources).tolist():
        next(corefit_oasst1.read(sources, None, Position(file, line, offset)))
    assert passes == [1]


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl"):
        list(corefit_oasst1.read(Sources((tmp_path / "nowhere.jsonl",))))


# ------------------------------------------------------------------------------------------------------- the entries


@pytest.mark.parametrize(
    ("row", "ours"),
    [
        ({"text": "### Human: a### Assistant: b"}, True),
        ({"text": "\n### Assistant: b"}, True),
        (tree(message("a")), True),
        (said("a"), True),
        ({"message_id": "a", "text": "x", "role": "prompter"}, True),
        ({"text": "about ### Human: markers"}, False),
        ({"text": "plain"}, False),
        ({"text": 5}, False),
        ({"prompt": "a", "completion": "b"}, False),
        ({"prompt": {"text": "a", "role": "prompter"}}, False),
        ({"message_id": "a", "text": "x", "role": "user"}, False),
        ({"messages": [{"role": "user", "content": "### Human: "}]}, False),
        ({}, False),
    ],
)
def test_sniff_knows_the_three_forms_and_no_other(row, ours):
    assert sniff(row) is ours


def test_options_are_checked():
    with pytest.raises(UserError, match="threads is 'bets', expected 'best' or 'all'"):
        Oasst1Options("bets")


def test_hooks_and_quick_import():
    (reader,) = corefit_oasst1.corefit_dataset_readers()
    (mapper,) = corefit_oasst1.corefit_map_functions()
    assert reader.name == mapper.name == "oasst1" and reader.seekable and mapper.options is Oasst1Options
    code = "import sys, corefit_oasst1, corefit_identity; print({'torch', 'numpy', 'pluggy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
