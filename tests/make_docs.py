"""The parts of the documentation that are made from the code: recipe keys, verbs and flags, hooks.

``python tests/make_docs.py`` writes them between their marks, ``--check`` says what is stale and exits 1. What has no
docstring, unit or help is an error: nothing is documented by its name alone.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from corefit import cli, hookspecs, recipe, templates, types
from corefit.registry import KINDS
from corefit.scaffold import NEW

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"(<!-- generated: (\w+)[^>]*-->\n).*?(<!-- /generated -->)", re.DOTALL)


class Undocumented(Exception):
    """Something has no words of its own."""


def cell(text: object) -> str:
    return " ".join(str(text).replace("``", "`").replace("|", "\\|").split())


def table(*rows: tuple[object, ...]) -> str:
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


# ----------------------------------------------------------------------------------------------------------- recipe


def field_docs(cls: type) -> dict[str, str]:
    """Give the docstring below every field of a class."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    found = {}
    for line, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign):
            words = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            found[line.target.id] = words
    return found


def units(hint: Any) -> Iterator[str | None]:
    """Give the unit of every number that a value may hold; None: it has none where it should say so."""
    if get_origin(hint) is Annotated:
        named = [m.name for m in hint.__metadata__ if isinstance(m, recipe.Unit)]
        yield from named or units(get_args(hint)[0])
    elif hint in (int, float):
        yield None
    else:
        for inner in get_args(hint):
            yield from units(inner)


@cache
def keys() -> tuple[tuple[str, str, str, str, str], ...]:
    """Give (``section.key``, what it may be, unit, default, meaning) for every key of the recipe."""
    rows = []
    for title, cls in recipe.SECTIONS.items():
        docs, plain = field_docs(cls), cls()
        for item in dataclasses.fields(cls):
            key, hint = f"{title}.{item.name}", recipe._hints(cls)[item.name]
            found, default = list(units(hint)), getattr(plain, item.name)
            if not docs.get(item.name):
                raise Undocumented(f"corefit/recipe.py: {key} has no docstring")
            if None in found:
                raise Undocumented(f"corefit/recipe.py: {key} is a number without a Unit")
            shown = {None: "not set", (): "empty"}.get(default if not isinstance(default, dict) else (), "")
            shown = shown or f"`{recipe._value(default)}`"
            expected = recipe._expected(hint).replace(" that is not empty", "").replace("(text)", "text")
            meaning = docs[item.name].replace("None: ", "not set: ")
            rows.append((key, expected, ", ".join(filter(None, dict.fromkeys(found))), shown, meaning))
    return tuple(rows)


def recipe_reference() -> str:
    parts = []
    for title, cls in recipe.SECTIONS.items():
        rows = [(f"`{key}`", *rest) for key, *rest in keys() if key.startswith(f"{title}.")]
        header = f"## `[[{title}]]`" if title == "data" else f"## `[{title}]`"
        parts.append(
            f"{header}\n\n{cell(cls.__doc__)}\n\n{table(('key', 'value', 'unit', 'default', 'meaning'), *rows)}"
        )
    return "\n" + "\n".join(parts)


# ----------------------------------------------------------------------------------------------------- command line


@dataclasses.dataclass
class Verb:
    name: str
    about: str
    aliases: list[str]
    arguments: list[argparse.Action]
    """Without ``--help`` and what only answers habits of other programs."""

    @property
    def flags(self) -> list[str]:
        return [spelt for action in self.arguments for spelt in action.option_strings]


def verbs() -> list[Verb]:
    """Give every verb in the order of the help, with its flags."""
    found: dict[int, Verb] = {}
    group = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in group.choices.items():
        if id(parser) in found:
            found[id(parser)].aliases.append(name)
            continue
        if not parser.description:
            raise Undocumented(f"corefit/cli.py: the verb {name} has no description")
        kept = [a for a in parser._actions if a.help != argparse.SUPPRESS and "--help" not in a.option_strings]
        for action in kept:
            if action.option_strings and not action.help:
                raise Undocumented(f"corefit/cli.py: corefit {name} {action.option_strings[0]} has no help")
        found[id(parser)] = Verb(name, parser.description, [], kept)
    order = {name: cli.USAGE.find(f"\n  {name} ") for name in group.choices}
    for verb in found.values():
        if order[verb.name] < 0:
            raise Undocumented(f"corefit/cli.py: the verb {verb.name} is not in the usage")
    return sorted(found.values(), key=lambda verb: order[verb.name])


def spelling(action: argparse.Action) -> str:
    names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
    value = " ".join(names) if names[0] else "|".join(map(str, action.choices or ()))
    if not action.option_strings:
        return f"[{value}]" if action.nargs == "?" else value
    more = " ..." if action.nargs == "+" else ""
    return ", ".join(f"{flag} {value}".strip() + more for flag in action.option_strings)


def command_reference() -> str:
    parts = []
    for verb in verbs():
        places = " ".join(spelling(a) for a in verb.arguments if not a.option_strings)
        about = cell(verb.about) + (f" Also: `{'`, `'.join(verb.aliases)}`." if verb.aliases else "")
        rows = [(f"`{spelling(a)}`", cell(a.help or "")) for a in verb.arguments if a.option_strings or a.help]
        body = f"\n\n{table(('argument', 'meaning'), *rows)}" if rows else "\n"
        parts.append(f"## `corefit {verb.name} {places}".rstrip() + f"`\n\n{about}{body}")
    return "\n" + "\n".join(parts)


# ------------------------------------------------------------------------------------------------------------ hooks


def hooks() -> dict[str, Callable[[], Any]]:
    return {name: hook for name, hook in vars(hookspecs).items() if hasattr(hook, "corefit_spec")}


def hook_table() -> str:
    kinds = {kind.hook: (word, kind.type.__name__) for word, kind in KINDS.items()}
    asked = {entry: f"`{kind}`" for kind, (entry, *_) in NEW.items()}
    rows = []
    for name, hook in hooks().items():
        text = inspect.cleandoc(hook.__doc__ or "")
        called = re.search(r"^Called: (.*?)(?=^Yield: )", text, re.DOTALL | re.MULTILINE)
        if called is None or "A whole plugin" not in text:
            raise Undocumented(f"corefit/hookspecs.py: {name}: expected a first line, Called:, Yield:, A whole plugin")
        if name not in kinds:
            raise Undocumented(f"corefit/registry.py: KINDS has no kind for the hook {name}")
        word, type_ = kinds[name]
        rows.append((asked.get(word, ""), f"`{name}`", f"`{type_}`", text.split("\n\n")[0], called[1].rstrip(".\n")))
    return table(("`--kind`", "hook", "yields", "what for", "called"), *rows)


def field_table() -> str:
    rows = []
    for cls in (types.Message, types.Conversation, types.Segment, templates.PromptTemplate):
        docs = field_docs(cls)
        for name in getattr(cls, "_fields", None) or [item.name for item in dataclasses.fields(cls)]:
            if not docs.get(name):
                raise Undocumented(f"{cls.__module__}: {cls.__name__}.{name} has no docstring")
            rows.append((f"`{cls.__name__}.{name}`", docs[name]))
    return table(("field", "meaning"), *rows)


# ---------------------------------------------------------------------------------------------------------- writing

PARTS = {
    "RECIPE.md": {"recipe": recipe_reference},
    "COMMANDS.md": {"commands": command_reference},
    "plugins/README.md": {"hooks": hook_table, "fields": field_table},
}


def made(path: str) -> str:
    """Give a file as it should be."""
    text = (ROOT / path).read_text("utf-8")
    missing = PARTS[path].keys() - {name for _, name, _ in MARK.findall(text)}
    if missing:
        raise Undocumented(f"{path}: no mark for {', '.join(missing)}")
    return MARK.sub(lambda m: m[1] + PARTS[path][m[2]]() + m[3], text)


def stale() -> list[str]:
    return [path for path in PARTS if made(path) != (ROOT / path).read_text("utf-8")]


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        for path in (found := stale()):
            print(f"{path} is stale: python tests/make_docs.py", file=sys.stderr)
        return bool(found)
    for path in PARTS:
        (ROOT / path).write_text(made(path), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
