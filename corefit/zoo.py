"""The zoo: recipes by name, made from the table ``recipes/zoo.toml``, and names of XTuner's that are none, with why."""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from corefit.errors import RecipeError
from corefit.recipe import SECTIONS, Recipe, load_recipe, parse_recipe, toml_dumps


class Name(NamedTuple):
    """A name taken apart."""

    zoo: str
    """Whose settings it has: ``xtuner`` or ``today``."""
    model: str
    method: str
    dataset: str
    rest: str
    """``e3``, ``512_e3``, ``8k_sp1``."""


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "recipes" / "zoo.toml").read_text("utf-8"))


@cache
def names() -> dict[str, Name]:
    """Give the names of all recipes, sorted."""
    found = {}
    for grid in _table()["grid"]:
        for model, tail in product(grid["models"].split(), grid["tails"].split()):
            method = next(m for m in _table()["zoo"][grid["zoo"]]["method"] if tail.startswith(f"{m}_"))
            rest = tail.removeprefix(f"{method}_")
            dataset = max((d for d in _table()["dataset"] if f"{rest}_".startswith(f"{d}_")), key=len)
            name = Name(grid["zoo"], model, method, dataset, rest.removeprefix(dataset).lstrip("_"))
            found[f"{model}_{tail}"] = name
    return dict(sorted(found.items()))


@cache
def excluded() -> dict[str, str]:
    """Give the names of XTuner's zoo that are no recipe here, sorted, each with why."""
    return dict(sorted((name, each["why"]) for each in _table()["cannot"] for name in each["names"].split()))


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Give the names that have the pattern in them, or are what the glob means; case does not matter."""
    glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    return fnmatch.filter(names, glob.lower())


def summary(name: str) -> str:
    """Give a recipe's first line: base, method and data."""
    at, words = names()[name], _table()["words"]
    return f"{_table()['model'][at.model]['model']['base']}, {words[at.method]} on {words[at.dataset]}"


def recipe_text(name: str) -> str:
    """Give a recipe of the zoo as TOML.

    Raises:
        RecipeError: there is none; says why, or gives the nearest name.
    """
    if name in excluded():
        raise RecipeError(f"{name}: in XTuner's zoo, but no recipe here: {excluded()[name]}")
    if name not in names():
        stem = re.sub(r"\.(toml|py)$", "", Path(name).name)
        near = difflib.get_close_matches(stem, names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near and not matching(stem, names()) else ""
        listed = f"`corefit recipes{'' if hint or not near else ' ' + stem}` lists those that ship"
        raise RecipeError(f"{name}: no such file or recipe; {hint}{listed}")
    table, at = _table(), names()[name]
    zoo, length = table["zoo"][at.zoo], dict[str, dict[str, int]]()
    if epochs := re.search(r"(?<![^_])e(\d+)(?![^_])", at.rest):
        length["train"] = {"epochs": int(epochs[1])}
    if slots := re.search(r"(?<![^_])(\d+)(k?)(?![^_])", at.rest):
        length["pack"] = {"max_length": int(slots[1]) * (1024 if slots[2] else 1)}
    merged: dict[str, Any] = {title: {} for title in SECTIONS}
    parts = (zoo["every"], table["model"][at.model], zoo["method"][at.method], table["dataset"][at.dataset], length)
    for part in (*parts, table["name"].get(name, {})):
        for title, keys in part.items():
            merged[title] = keys if title == "data" else {**merged[title], **keys}
            if title != "data":
                merged[title] = {key: value for key, value in merged[title].items() if value != ""}
    if at.dataset.startswith("moss_"):
        options = {"bot_name": table["bot"][at.model]}
        merged["data"] = [{**source, "options": options} for source in merged["data"]]
    toml = toml_dumps({title: keys for title, keys in merged.items() if keys})
    return f"# {summary(name)}\n# {zoo['note']}\n\n{toml}"


def named_recipe(name: str) -> Recipe:
    """Give a recipe by the path of its file, or by its name in the zoo; paths in that are relative to where we are.

    Raises:
        RecipeError: neither is there, or something in it is wrong.
    """
    return load_recipe(name) if Path(name).is_file() else parse_recipe(recipe_text(name), name=name, base=Path.cwd())


def copy_recipe(name: str, dest: str | Path | None = None, suffix: str = "") -> Path:
    """Copy a recipe to a file, or into a folder, by default the current one, as NAME and suffix; gives the new file.

    Raises:
        RecipeError: there is no such recipe, or the file is there already.
    """
    source, target = Path(name), Path("." if dest is None else dest)
    text = source.read_text(encoding="utf-8") if source.is_file() else recipe_text(name)
    if target.is_dir() or str(dest).endswith(("/", os.sep)):
        target = target / f"{source.stem if source.is_file() else name}{suffix}.toml"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{target}: is there already; name another file") from None
    except OSError as error:
        raise RecipeError(f"{target}: can't be written: {error.strerror}") from error
    return target
