"""What plugins may rely on: the public API is frozen in a file, and a plugin of the first release goes on working."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Protocol

import fake_plugins
import pytest
from fake_plugins import scheduler, write_plugin

import corefit
from corefit import deprecated, hookspecs, testing
from corefit.cli import main
from corefit.deprecated import GOING, CorefitDeprecation, Going
from corefit.prepare import EMBEDDED
from corefit.registry import KINDS, Registry

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "golden" / "api.txt"
FIRST = TESTS / "first_release"
HASHES = {
    "corefit_first.py": "2bc88c461c68d31df5fc5e591b95340d6d60ad49e78549a96e88571296518f24",
    "first.tsv": "ef171b7233e38b14b2fa9c3af120479d63a850ad46f69cff88e7674b8e4c147e",
}
CHANGING = """the public API is not what tests/golden/api.txt says.
An addition (a new name, a new field with a default, keyword-only) is fine: write the file again with
    PYTHONPATH=tests python tests/unit/test_api.py
and give it a line in CHANGELOG.md. What goes or changes its meaning breaks plugins: keep it, with a row in
corefit/deprecated.py, for one more minor release.
"""


def described(name: str, thing: Any) -> list[str]:
    """Give lines: a public name, its parameters, its public methods and properties with theirs."""
    if not callable(thing):
        return [f"{name} = {thing!r}"]
    bases = ", ".join(base.__name__ for base in getattr(thing, "__bases__", ()) if base is not object)
    lines = [f"{name}({bases})" if bases else name]
    if not isinstance(thing, type) or not issubclass(thing, Exception | Protocol):  # the caller's to make
        lines += parameters(thing)
    for key, value in sorted(vars(thing).items()) if isinstance(thing, type) else ():
        value = getattr(value, "__func__", value)
        if isinstance(value, property) and not key.startswith("_"):
            lines.append(f"  .{key} -> {plain(inspect.signature(value.fget).return_annotation)}")
        elif inspect.isfunction(value) and not key.startswith("_"):
            lines += [f"  .{key}", *(f"  {line}" for line in parameters(value))]
    return lines


def parameters(thing: Any) -> list[str]:
    signature, lines = inspect.signature(thing), []
    for parameter in signature.parameters.values():
        default = "" if parameter.default is parameter.empty else f" = {shown(parameter.default)}"
        keyword = "keyword " if parameter.kind is parameter.KEYWORD_ONLY else ""
        annotation = "" if parameter.annotation is parameter.empty else f": {plain(parameter.annotation)}"
        lines.append(f"    {keyword}{parameter.name}{annotation}{default}")
    result = signature.return_annotation
    return lines if isinstance(thing, type) else [*lines, f"    -> {plain(result)}"]


def plain(value: Any) -> str:
    """Give an annotation as it is written."""
    return value if isinstance(value, str) else getattr(value, "__forward_arg__", shown(value))


def shown(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def api() -> str:
    lines = []
    for name in corefit.__all__:
        lines += described(f"corefit.{name}", getattr(corefit, name))
    for name in sorted(kind.hook for kind in KINDS.values()):
        lines += described(f"hook {name}", getattr(hookspecs, name))
    for name in testing.__all__:
        lines += described(f"corefit.testing.{name}", getattr(testing, name))
    return "\n".join(lines) + "\n"


def test_the_public_api_is_what_was_frozen():
    before, now = GOLDEN.read_text("utf-8"), api()
    changes = "\n".join(difflib.unified_diff(before.splitlines(), now.splitlines(), "frozen", "now", n=0, lineterm=""))
    assert now == before, CHANGING + changes


def test_every_hook_and_entry_is_in_it():
    frozen = GOLDEN.read_text("utf-8")
    for kind in KINDS.values():
        assert f"hook {kind.hook}\n    -> Iterable[{kind.type.__name__}]\n" in frozen
        assert f"corefit.{kind.type.__name__}\n    keyword name: str\n    keyword summary: str\n" in frozen


# ---------------------------------------------------------------------------------------------------------- deprecation


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def version(text: str) -> list[int]:
    return [int(number) for number in text.split(".")]


def test_nothing_that_goes_is_still_here_once_its_version_has_come():
    for name, row in GOING.items():
        assert version(row.gone_in) > version(corefit.__version__), f"{name} was to go in {row.gone_in}: remove it"
        assert row.use and re.fullmatch(r"\d+\.\d+", row.gone_in), f"{name}: a minor release, not a patch"


def test_an_old_name_gives_the_new_one_and_says_until_when(monkeypatch):
    monkeypatch.setitem(GOING, "Mapper", Going(use="MapFunction", gone_in="0.3"))
    with pytest.warns(CorefitDeprecation, match=r"^Mapper goes in corefit 0\.3; use MapFunction$") as caught:
        assert corefit.Mapper is corefit.MapFunction
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError):
        corefit.Maper  # noqa: B018


def test_an_old_hook_works_and_its_plugin_is_named(site, monkeypatch):
    monkeypatch.setitem(GOING, "corefit_curves", Going(use="corefit_schedulers", gone_in="0.3"))
    write_plugin(site, "corefit-old", scheduler("half").replace("def corefit_schedulers", "def corefit_curves"))
    with pytest.warns(
        CorefitDeprecation, match=r"plugin 'old' \(corefit-old 1\.0\): corefit_curves goes in corefit 0\.3"
    ):
        registry = Registry.load()
    assert registry.scheduler("half").factor(0.1, 0.0) == 0.5


def test_a_deprecation_is_shown_to_users_once_and_an_error_here(monkeypatch):
    monkeypatch.setitem(GOING, "old", Going(use="new", gone_in="0.3"))
    with pytest.raises(CorefitDeprecation):
        deprecated.warn("old")
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()  # as Python starts
        for _ in range(3):
            deprecated.warn("old", stacklevel=2)
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("from corefit import Telepathy\n", "cannot import name 'Telepathy'"),
        (scheduler("half").replace("factor=", "colour='red', factor="), "unexpected keyword argument 'colour'"),
        ("def corefit_mind_readers():\n    return ()\n", "no hook 'corefit_mind_readers'"),
    ],
    ids=["name", "field", "hook"],
)
def test_a_plugin_for_a_newer_corefit_says_so_in_one_line(code, why, site, capsys):
    info = write_plugin(site, "corefit-soon", code)
    with (info / "METADATA").open("a", encoding="utf-8") as metadata:
        metadata.write("Requires-Dist: numpy>=1\nRequires-Dist: corefit<10,>=9.1\n")
    assert main(["train", "--plugin", "soon"]) == 2
    error = capsys.readouterr().err
    assert f"it needs corefit 9.1, this is {corefit.__version__}: pip install -U corefit (" in error
    assert why in error and len(error.splitlines()) == 1


def test_a_plugin_that_is_simply_broken_is_not_told_to_wait_for_a_newer_corefit(site):
    info = write_plugin(site, "corefit-sad", fake_plugins.BROKEN)
    with (info / "METADATA").open("a", encoding="utf-8") as metadata:
        metadata.write("Requires-Dist: corefit>=0.1\nRequires-Dist: corefit-extras>=9\n")
    (plugin,) = [plugin for plugin in Registry.load().plugins if plugin.name == "sad"]
    assert "needs corefit" not in plugin.error


# ---------------------------------------------------------------------------------------- a plugin of the first release


@pytest.fixture
def first(site, monkeypatch):
    write_plugin(site, "corefit-first", version="0.1.0")
    monkeypatch.syspath_prepend(str(FIRST))
    yield Registry.load()
    sys.modules.pop("corefit_first", None)


def test_it_is_as_it_was_written():
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FIRST.iterdir() if path.is_file()}
    assert found == HASHES, "this plugin stands for those that are published: leave it as it is"


def test_all_that_it_contributes_is_taken(first):
    (plugin,) = [plugin for plugin in first.plugins if plugin.name == "first"]
    assert plugin.error is None and plugin.clashes == ()
    assert plugin.entries == {
        "reader": ("first", "first_json"),
        "map function": ("first",),
        "template": ("first", "first_render"),
        "quantizer": ("first",),
        "scheduler": ("first",),
        "recipe reader": ("first",),
    }


@pytest.mark.parametrize("template", ["first", "first_render"])
def test_its_records_become_samples(template, first, tmp_path, capsys):
    (tmp_path / "rows.firstj").write_text('{"question": "q", "answer": "seven"}\n', "utf-8")
    model = ["--json", "--tokenizer", str(EMBEDDED / "model"), "--plugin", "first", "--template", template]
    assert main(["inspect", *model]) == 0
    assert "A tab parts two columns." in capsys.readouterr().out
    assert main(["inspect", *model, "--data", str(tmp_path / "rows.firstj"), "--set", "data.options.shout=true"]) == 0
    assert "SEVEN" in capsys.readouterr().out


def test_the_rest_of_it_works(first, tmp_path, capsys):
    assert first.quantizer("first").config("float32").bnb_4bit_quant_type == "fp4"
    assert first.scheduler("first").factor(0.5, 0.0) == 0.75
    (tmp_path / "run.first").write_text("rate = 1e-4\nsteps = 7\ncolour = red\n", "utf-8")
    assert main(["import", str(tmp_path / "run.first")]) == 0
    printed = capsys.readouterr()
    assert "lr = 0.0001\nmax_steps = 7\n" in printed.out and "colour: left out" in printed.err


if __name__ == "__main__":
    GOLDEN.write_text(api(), "utf-8")
