"""The documentation is what the code says, and every hook, verb, flag and recipe key is named by a test.

A test names

- a recipe key by ``section.key`` in a string (``--set train.lr=1``), by ``key = `` below ``[section]`` in a string of
  TOML, or by a keyword of the section's class (``Adapter(dora=True)``);
- a verb by a string that is the verb, or by a command line, ``corefit VERB ...``, in a string;
- a flag by a string that is the flag, or ``--flag=...``, in the same function, fixture or constant as its verb, or by
  such a command line;
- a hook by its name, as a function or in a string.

That it is named doesn't say that it is tested well; that it isn't says that nobody has tried it from outside.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import make_docs
import pytest

from corefit import recipe

ROOT = Path(__file__).resolve().parents[2]
OURS = {"make_docs.py", "test_docs.py", "test_readme.py"}


def test_what_is_made_from_the_code_is_up_to_date() -> None:
    assert make_docs.stale() == [], "run: python tests/make_docs.py"


def strings(node: ast.AST) -> Iterator[str]:
    """Every string in a piece of code, but docstrings."""
    docs = {
        id(inner.body[0].value)
        for inner in ast.walk(node)
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef, ast.Module)) and isinstance(inner.body[0], ast.Expr)
    }
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and id(inner) not in docs:
            yield inner.value


@cache
def scopes() -> tuple[ast.stmt, ...]:
    """Every function, class and constant of the tests."""
    files = [path for path in (ROOT / "tests").rglob("*.py") if path.name not in OURS]
    return tuple(node for path in files for node in ast.parse(path.read_text("utf-8")).body)


@cache
def named_keys() -> set[str]:
    found = set()
    owners = {cls.__name__: title for title, cls in recipe.SECTIONS.items()}
    for node in scopes():
        for text in strings(node):
            found.update(re.findall(r"[a-z]+\.[a-z_]+", text))
            section = ""
            for line in text.splitlines():
                if header := re.match(r"\s*\[+(\w+)[\].]", line):
                    section = header[1]
                elif key := re.match(r"\s*(\w+)\s*=", line):
                    found.add(f"{section}.{key[1]}")
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and (title := owners.get(ast.unparse(call.func).rpartition(".")[2])):
                found.update(f"{title}.{word.arg}" for word in call.keywords)
    return found


@cache
def named_flags() -> set[tuple[str, str]]:
    """(verb, flag), and (verb, "") for the verb itself."""
    spelt = {alias: verb.name for verb in make_docs.verbs() for alias in (verb.name, *verb.aliases)}
    found = set()
    for node in scopes():
        texts = set(strings(node))
        flags = {text.partition("=")[0] for text in texts if text.startswith("--")}
        for verb in texts & spelt.keys():
            found.update({(spelt[verb], flag) for flag in flags} | {(verb, "")})
        for verb, rest in (m for text in texts for m in re.findall(r"\bcorefit ([\w-]+)(.*)", text)):
            if verb in spelt:
                found.update({(spelt[verb], flag) for flag in re.findall(r"--[\w-]+", rest)} | {(verb, "")})
    return found


@pytest.mark.parametrize("key", [key for key, *_ in make_docs.keys()])
def test_every_recipe_key_is_named_by_a_test(key: str) -> None:
    assert key in named_keys()


@pytest.mark.parametrize("verb", make_docs.verbs(), ids=lambda verb: verb.name)
def test_every_verb_and_flag_is_named_by_a_test(verb: make_docs.Verb) -> None:
    wanted = [(verb.name, flag) for flag in verb.flags if flag.startswith("--")]
    wanted += [(name, "") for name in (verb.name, *verb.aliases)]
    assert [pair for pair in wanted if pair not in named_flags()] == []


@pytest.mark.parametrize("hook", make_docs.hooks())
def test_every_hook_is_named_by_a_test(hook: str) -> None:
    named = {node.name for node in scopes() if isinstance(node, ast.FunctionDef)}
    assert hook in named or any(hook in text for node in scopes() for text in strings(node))
