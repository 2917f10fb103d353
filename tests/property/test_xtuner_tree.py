"""A configuration read by its tree has the values that Python would give it."""

from __future__ import annotations

from pathlib import Path

import pytest
from corefit_xtuner_configs.tree import Config, Unknown
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from corefit import RecipeError

NAMES = ("a", "b", "c")
numbers = st.sampled_from(["0", "1", "2", "3", "0.5", "1e-5", "-1", "True", "None", "2048"])
texts = st.sampled_from(["'x'", '"y z"', "''", "'a{}b'", "'%s'", "'上海'"])
atoms = numbers | texts | st.sampled_from(NAMES)


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(inner, inner)
    operators = st.sampled_from(
        ["+", "-", "*", "/", "//", "%", "**", "<", "<=", "==", "!=", "in", "not in", "and", "or", "is"]
    )  # noqa: E501
    calls = st.sampled_from(
        ["int", "float", "str", "bool", "len", "abs", "round", "list", "tuple", "sum", "max", "min"]
    )  # noqa: E501
    return st.one_of(
        st.tuples(inner, operators, inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        pair.map(lambda p: f"[{p[0]}, {p[1]}]"),
        pair.map(lambda p: f"({p[0]}, {p[1]})"),
        pair.map(lambda p: f"dict(k={p[0]}, m={p[1]})"),
        pair.map(lambda p: f"{{'k': {p[0]}, **dict(m={p[1]})}}"),
        pair.map(lambda p: f"[*[{p[0]}], {p[1]}]"),
        pair.map(lambda p: f"({p[0]})[{p[1]}]"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})"),
        st.tuples(calls, inner).map(lambda t: f"{t[0]}({t[1]})"),
        inner.map(lambda x: f"(not {x})"),
        inner.map(lambda x: f"(-{x})"),
        inner.map(lambda x: f"f'{{{x}}}!'" if "'" not in x else x),
        pair.map(lambda p: f"'{{}}-{{0}}'.format({p[0]})" if "'" in p[1] else f"'{{}}-{{}}'.format({p[0]}, {p[1]})"),
        inner.map(lambda x: f"'-'.join([{x}, 'z'])"),
        inner.map(lambda x: f"({x})['k']"),
    )


expressions = st.recursive(atoms, larger, max_leaves=6)
statements = st.one_of(
    st.tuples(st.sampled_from(NAMES), expressions).map(lambda t: f"{t[0]} = {t[1]}"),
    st.tuples(st.sampled_from(NAMES), st.sampled_from(["+=", "*=", "-="]), expressions).map(" ".join),
    st.tuples(expressions, st.sampled_from(NAMES), expressions, expressions).map(
        lambda t: f"if {t[0]}:\n    {t[1]} = {t[2]}\nelse:\n    {t[1]} = {t[3]}"
    ),
    st.tuples(expressions, expressions).map(lambda t: f"a, b = {t[0]}, {t[1]}"),
    st.tuples(st.sampled_from(NAMES), expressions).map(lambda t: f"{t[0]}.update(dict(k={t[1]}))"),
    st.tuples(st.sampled_from(NAMES), expressions).map(lambda t: f"{t[0]}['k'] = {t[1]}"),
    st.tuples(st.sampled_from(NAMES), expressions).map(lambda t: f"{t[0]}.append({t[1]})"),
)


@given(st.lists(statements, min_size=1, max_size=5))
@example(["a = f'{[0, (0, 0)]}!'"])
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
def test_what_is_known_is_what_python_says(tmp_path_factory, lines: list[str]) -> None:
    start = "a = 3\nb = dict(k=1, m=[2])\nc = [1, 'x']\n"
    path = tmp_path_factory.getbasetemp() / "config.py"
    known: dict[str, object] = {}
    done = []
    for line in lines:  # up to where Python stops
        space: dict[str, object] = {}
        try:
            exec(start + "\n".join([*done, line]), {}, space)
        except Exception:
            break
        done.append(line)
        known = space
    path.write_text(start + "\n".join(done), "utf-8")
    try:
        names = Config(Path(path), {}).names
    except RecipeError as error:
        assert "nested too deeply" in str(error)  # a list that holds itself
        return
    for name, value in names.items():
        lost = value.unknown()
        assert lost is None or isinstance(lost.data, Unknown)
        if lost is None and name in known and "..." not in repr(known[name]):  # nothing that holds itself
            assert repr(value.plain()) == repr(as_lists(known[name])), (name, done)


def as_lists(value: object) -> object:
    if isinstance(value, dict):
        return {str(k): as_lists(v) for k, v in value.items()}
    return [as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x = 1\nfor i in (1, 2):\n    x = i\n", None),
        ("x = 1\nif f():\n    x = 2\n", None),
        ("x = 1\ntry:\n    x = 2\nexcept OSError:\n    pass\n", None),
        ("x = [1]\nfor i in (1, 2):\n    x[0] = i\n", None),
        ("x = 1\nif 1 > 2:\n    x = f()\n", 1),
        ("x = 1\nx: int = 2\n", 2),
        ("x = y = 2\n", 2),
        ("x = dict(k=1).get('k')\n", None),
        ("x = [1, 2]\ny = x.pop(0)\n", [2]),
        ("y = [1, [2, 3]]\nx = y.pop()\n", [2, 3]),
        ("x = [1]\nx.pop(1)\n", [1]),
    ],
)
def test_what_code_may_have_changed_is_not_known(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "c.py").write_text(text, "utf-8")
    found = Config(tmp_path / "c.py", {}).names["x"]
    assert (found.unknown() is not None) if value is None else found.plain() == value
