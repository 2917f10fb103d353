from __future__ import annotations

import ast
import io
import sys
from pathlib import Path

import pytest
from hostile import HOSTILE, obeyed
from hypothesis import given
from hypothesis import strategies as st

from corefit import terminal
from corefit.chat import chat_loop
from corefit.report import answers_table
from corefit.show import marked
from corefit.terminal import notice, visible

ROOT = Path(__file__).resolve().parents[2]
texts = st.lists(st.one_of(st.sampled_from([*HOSTILE, "\n", "\t", "你", "👩\u200d🚀", "é", "a"]), st.text(max_size=3)))


@given(texts.map("".join))
def test_nothing_that_a_terminal_obeys_gets_through_and_the_rest_stays(text):
    shown = visible(text)
    assert not obeyed(shown) and visible(shown) == shown
    for char in text:
        escape = visible(char)
        assert escape == char or (escape.startswith("\\") and escape.encode("ascii").decode("unicode_escape") == char)
    assert shown == "".join(map(visible, text))


@pytest.mark.parametrize(
    "text", ["你好　世界", "👩‍🚀 🏳️‍🌈", "می‌خواهم", "שלום", "a\tb\nc", "e\u0301", "\ufffd", "C:\\x1b"]
)
def test_what_people_write_stays_as_it_is(text):
    assert visible(text) == text


@given(texts.map("".join))
def test_whatever_shows_content_shows_it_so(text):
    class Tokens:
        def token_bytes(self, token_id):
            return text.encode(errors="replace")

    class Sample:
        input_ids, spans = [1], []

    assert not obeyed(marked(Sample(), Tokens(), colour=False))
    assert not obeyed(answers_table([(text, text, text)], width=60))
    file = io.StringIO()
    notice(text, file)
    assert not obeyed(file.getvalue()) and file.getvalue() == visible(text) + "\n"


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("screen", [True, False])
def test_an_answer_is_made_visible_on_a_terminal_only(screen, monkeypatch):
    class Liar:
        def answer(self, messages, *, adapter):
            yield from ("ok\t\n", *HOSTILE)

    out = Screen() if screen else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    lines = iter(["hi", "/exit"])
    chat_loop(Liar(), read=lambda prompt: next(lines))
    assert out.getvalue() == "ok\t\n" + (visible(HOSTILE) if screen else HOSTILE) + "\n"


def test_all_of_corefit_prints_through_one_module():
    for path in (ROOT / "corefit").rglob("*.py"):
        if path.name not in ("terminal.py", "make.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                assert not (isinstance(node, ast.Name) and node.id == "print"), f"{path}:{node.lineno}"
                text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
                assert text not in ("sys.stdout.write", "sys.stderr.write"), f"{path}:{node.lineno}"
    assert "print(" in Path(terminal.__file__).read_text("utf-8")
