"""``corefit new-plugin``: a whole distribution around the plugin that its hook's docstring shows."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from string import Template

from corefit import __version__, hookspecs
from corefit.errors import UserError, system_words, unknown
from corefit.registry import KINDS, Registry

NEW = {
    "dataset": ("map function", "corefit train --model DIR --data rows.jsonl --plugin $name"),
    "template": ("template", "corefit train --model DIR --data rows.jsonl --template $name"),
    "quantizer": ("quantizer", "corefit train --model DIR --data rows.jsonl --quantizer $name"),
    "scheduler": ("scheduler", "corefit train --model DIR --data rows.jsonl --scheduler $name"),
    "reader": ("reader", "corefit train --model DIR --data rows.$name --plugin FORMAT"),
    "recipe-reader": ("recipe reader", "corefit train run.$name"),
    "reporter": (
        "reporter",
        "corefit train --model DIR --data rows.jsonl --set run.reporters=progress,report.html,$name",
    ),
}
"""What ``--kind`` says -> the kind of entry, a command that uses it."""
FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "A $kind for corefit: $name"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["corefit>=$version"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points.corefit]
$name = "$module"

[tool.setuptools]
py-modules = ["$module"]
""",
    "README.md": """\
# $distribution

A $kind for corefit, `$name`.

```
pip install $distribution
$command
```

What is in it is `$module.py`. After a change:

```
pip install -e '.[test]'
pytest                   # what every corefit plugin promises
corefit check $name      # the same list, with the reason of what fails
```
""",
    "tests/test_contract.py": '''\
"""What every corefit plugin promises, tried on this one."""

import pytest
from corefit.testing import Check, plugin_checks


@pytest.mark.parametrize("check", plugin_checks("$name"), ids=str)
def test_contract(check: Check) -> None:
    """Fails with one line of reason."""
    check()
''',
    ".github/workflows/test.yml": """\
name: test
on: [push, pull_request]
jobs:
  test:
    runs-on: ubuntu-latest
    strategy:
      matrix:
        python: ["3.11", "3.13"]
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: $${{ matrix.python }}
      - run: pip install '.[test]'
      - run: pytest
""",
}
"""Every other file of the distribution."""


def new_plugin(name: str, kind: str, folder: str | Path = ".") -> Path:
    """Write a distribution for a plugin into a new folder, and give that folder.

    Args:
        name: of the plugin and of its entry: a small letter, then small letters, digits and ``_``.
        kind: a key of ``NEW``.
        folder: where the new folder goes.

    Raises:
        UserError: a name that can't be used or is taken, no such kind, a folder that is there or can't be written.
    """
    if kind not in NEW:
        raise UserError(f"--kind: {unknown('kind of plugin', kind, NEW)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        near = "_".join(re.findall("[a-z0-9]+", name.lower())).lstrip("_0123456789")
        hint = f"; {near} would do" if near else ""
        raise UserError(f"{name!r} is no name for a plugin: small letters, digits and _, a letter first{hint}")
    entry, command = NEW[kind]
    registry = Registry.load()
    for info in registry.plugins:
        if name == info.name or name in info.entries.get(entry, ()):
            raise UserError(f"{name!r} is taken by plugin {info}; choose another name")
    distribution = f"corefit-{name.replace('_', '-')}"
    target = Path(folder) / distribution
    words = {"name": name, "kind": entry, "distribution": distribution, "module": f"corefit_{name}"}
    words |= {"version": ".".join(__version__.split(".")[:2]), "command": Template(command).substitute(words)}
    head = f'"""A {entry} for corefit: {name}."""\n\nfrom __future__ import annotations\n\n'
    files = FILES | {f"corefit_{name}.py": head + example(entry, name)}
    try:
        target.mkdir(parents=True)
        for path, text in files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_text(Template(text).substitute(words), "utf-8")
    except FileExistsError as error:
        raise UserError(f"{target}: is there already; choose another name, or move it away") from error
    except OSError as error:
        raise UserError(f"{target}: can't be written: {system_words(error)}") from error
    return target


def example(entry: str, name: str) -> str:
    """Give the module in the docstring of the hook for a kind of entry, a key of ``KINDS``, under another name.

    Raises:
        UserError: Python was told to leave docstrings out.
    """
    text = inspect.getdoc(getattr(hookspecs, KINDS[entry].hook)) or ""
    module = text.partition("A whole plugin::\n\n")[2]
    if not module:
        raise UserError(
            "the example is in a docstring, and Python leaves them out: run it without -OO, PYTHONOPTIMIZE=2"
        )
    return textwrap.dedent(module).replace("my_plugin", name) + "\n"
