from __future__ import annotations

import copy
import re

from corefit_oasst1 import Oasst1Options, oasst1, sniff
from hypothesis import given, settings
from hypothesis import strategies as st

from corefit import Conversation, Drop

H, A = "### Human: ", "### Assistant: "
PIECES = ["### Human:", "### Assistant:", "#", "```", "`", "\n", " ", "x", "y.", '"', "\\n", "é", "Human", "````py\n"]
soup = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
# what people write: headings, code, lists; no markers
words = st.lists(
    st.sampled_from(
        [
            "word",
            "### Setup",
            "#",
            "## Human",
            "\n```py\nx = 1\n```\n",
            "\n",
            " ",
            "e.g. `a` ",
            "### human: b",
            "ö",
            "1.",
        ]
    ),
    min_size=1,
    max_size=8,
).map("".join)
# a "#" that ends a text and is alone on it makes a heading of the marker that follows
texts = words.filter(lambda text: text.strip() and not re.search(r"(^|\s)#+\s*$", text))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | soup,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["text", "prompt", "role", "replies", "rank", "deleted", "message_id", "parent_id", "review_result"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
nodes = st.recursive(
    st.fixed_dictionaries(
        {"text": soup, "role": st.sampled_from(["prompter", "assistant"])},
        optional={"rank": st.none() | st.integers(0, 3), "deleted": st.booleans(), "review_result": st.booleans()},
    ),
    lambda inner: st.fixed_dictionaries(
        {"text": soup, "role": st.sampled_from(["prompter", "assistant"]), "replies": st.lists(inner, max_size=3)},
        optional={"rank": st.none() | st.integers(0, 3), "deleted": st.booleans(), "review_result": st.booleans()},
    ),
    max_leaves=8,
)


def squeezed(text):
    return re.sub(r"\s|### (Human|Assistant):", "", text)


def learnt(item):
    return [m.content for m in item.messages if m.role == "assistant" and m.supervised is not False]


def check_shape(item):
    if isinstance(item, Drop):
        assert re.fullmatch("[a-z0-9_]+", item.reason)
        return
    roles = [m.role for m in item.messages]
    assert roles[-1] == "assistant" and set(roles) <= {"user", "assistant"}
    assert all(a != b for a, b in zip(roles, roles[1:], strict=False))
    assert all(m.content and m.content == m.content.strip() for m in item.messages)
    if roles[0] == "assistant":
        assert item.messages[0].supervised is False
    assert all(m.supervised is None for m in item.messages if m.role == "user")


@given(st.dictionaries(st.sampled_from(["text", "prompt", "message_tree_id", "role", "message_id"]), json_values))
def test_any_record_gives_items_or_reasons_and_stays_as_it_is(record):
    before = copy.deepcopy(record)
    assert sniff(record) in (True, False)
    for threads in ("best", "all"):
        items = list(oasst1(record, Oasst1Options(threads)))
        assert items
        for item in items:
            check_shape(item)
    assert repr(record) == repr(before)


@settings(max_examples=300)
@given(soup, soup)
def test_no_text_is_lost_or_added(first, rest):
    text = f"{H}x{first}{rest}{A}end"
    (item,) = oasst1({"text": text})
    check_shape(item)
    if isinstance(item, Conversation):
        assert squeezed("".join(m.content for m in item.messages)) in squeezed(text)
        if not {"trailing_user", "leading_text"} & set(item.dropped):
            assert squeezed("".join(m.content for m in item.messages)) == squeezed(text)


@given(st.lists(texts, min_size=2, max_size=7), st.sampled_from(["", "\n", "\n\n"]))
def test_plain_rows_come_back_word_for_word(said, gap):
    roles = [("user", "assistant")[k % 2] for k in range(len(said))]
    # the format writes a marker straight after text, or each on a line of its own; a row that does both is doubtful
    text = gap.join(f"{(H, A)[k % 2]}{t.rstrip()}" for k, t in enumerate(said))
    (item,) = oasst1({"text": text})
    expected = [(r, t.strip()) for r, t in zip(roles, said, strict=True)][: len(said) // 2 * 2]
    assert [(m.role, m.content) for m in item.messages] == expected
    assert learnt(item) == [t for r, t in expected if r == "assistant"]


@given(st.lists(texts, min_size=2, max_size=6))
def test_a_thread_is_the_same_as_text_and_as_tree(said):
    root = node = {"text": "q", "role": "prompter", "replies": []}
    for k, text in enumerate(said):
        node["replies"].append({"text": text, "role": ("assistant", "prompter")[k % 2], "replies": []})
        node = node["replies"][0]
    row = "".join(f"{(H, A)[k % 2]}{t.strip()}" for k, t in enumerate(["q", *said]))
    for threads in ("best", "all"):
        assert list(oasst1({"message_tree_id": "t", "prompt": root}, Oasst1Options(threads)))[0].messages == (
            next(iter(oasst1({"text": row}))).messages
        )


# A marker that a human typed, with no human's marker after it, before an answer as the format writes it.
typed = st.tuples(
    words, st.sampled_from(["### Assistant: ", "\n### Assistant: ", " ### Assistant: ", "```\n### Assistant: "]), words
)


@settings(max_examples=300)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), typed, texts, soup.filter(lambda s: "###" not in s))
def test_what_a_human_types_is_never_learnt(turns, typed, answer, tail):
    before, marker, after = typed
    rows = [f"{H}{q}{A}{a}" for q, a in turns]
    rows.append(f"{H}q{before}{marker}SECRET{after}".rstrip() + f"{A}{answer}{tail}")
    (item,) = oasst1({"text": "".join(rows)})
    check_shape(item)
    if isinstance(item, Conversation):
        assert not any("SECRET" in text for text in learnt(item))


fenced = st.lists(
    st.sampled_from(["```", "```py\n", "\n```\n", "code", "\n", "text", '"', "`"]), min_size=1, max_size=8
).map("".join)


@settings(max_examples=500)
@given(st.lists(st.tuples(fenced, fenced), min_size=2, max_size=4))
def test_fences_left_open_never_make_a_humans_words_an_answer(turns):
    text = "".join(f"{H}SECRET{q.strip()}{A}a{a.strip()}" for q, a in turns)
    (item,) = oasst1({"text": text})
    check_shape(item)
    if isinstance(item, Conversation):
        assert not any("SECRET" in text for text in learnt(item))


@given(nodes)
def test_trees_never_show_what_is_deleted(root):
    def sweep(node, gone):
        gone = gone or bool(node.get("deleted")) or node.get("review_result") is False
        node["text"] = ("GONE " if gone else "here ") + node["text"].replace("x", "z")
        node["kept"] = not gone and node["role"]
        return 1 + sum(sweep(reply, gone) for reply in node.get("replies", ()))

    sweep(root, False)
    for threads in ("best", "all"):
        items = list(oasst1({"message_tree_id": "t", "prompt": root}, Oasst1Options(threads)))
        for item in items:
            check_shape(item)
            if isinstance(item, Conversation):
                assert not any("GONE" in m.content for m in item.messages)
        if threads == "all" and isinstance(items[0], Conversation):
            answers = []

            def collect(node, answers=answers):
                if node["kept"]:
                    if node["role"] == "assistant":
                        answers.append(node["text"].strip())
                    for reply in node.get("replies", ()):
                        collect(reply)

            collect(root)
            shown = "\n".join(m.content for item in items for m in item.messages)
            assert all(answer in shown for answer in answers)
