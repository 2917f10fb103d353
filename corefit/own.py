"""A map function of the user's own: ``--plugin module:function``, ``--plugin file.py:function``."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from corefit.errors import PluginError, system_words, unknown
from corefit.types import Conversation, Document, Drop, Item, MapFunction, Record

INSTALLED = {"site-packages", "dist-packages"}
"""Folders whose contents have a version, by which they are known."""


def own_file(name: str) -> Path | None:
    """Give the file of a map function that is named ``file.py:function``, None for any other name."""
    place = name.rpartition(":")[0]
    return Path(place) if place.endswith(".py") else None


def own_code(name: str) -> tuple[str, str]:
    """Give what identifies a function of the user's own: its name without folders, and a hash of the file it is in."""
    file = own_file(name)
    short = name if file is None else f"{file.name}:{name.rpartition(':')[2]}"
    origin = file or Path(getattr(_module(name)[0], "__file__", None) or "")
    if not origin.is_file():
        return short, "no file"
    files = [origin, *imported_by([origin])]
    return short, hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def imported_by(files: Iterable[Path], also: Container[str] = ()) -> list[Path]:
    """Give the Python files that these import, one by way of another, and that nobody installed.

    ``also``: top-level names that count although they are installed.
    """
    found, left, seen = dict[Path, None](), list(files), {"corefit", *sys.stdlib_module_names}
    while left:
        for top in sorted(_imports(left.pop()) - seen):
            seen.add(top)
            spec = None
            with suppress(ImportError, ValueError):
                spec = importlib.util.find_spec(top)
            if spec is None or not (spec.origin or "").endswith(".py"):  # compiled, or any folder of that name
                continue
            folders = spec.submodule_search_locations
            files = [path for folder in folders or () for path in sorted(Path(folder).rglob("*.py"))]
            files = [path for path in files if path.is_file() and path.name[0] != "."] or [Path(str(spec.origin))]
            if top in also or not INSTALLED & {part for path in files for part in path.resolve().parts}:
                found |= dict.fromkeys(files)
                left += files
    return list(found)


def _imports(file: Path) -> set[str]:
    """Give the top-level names of what a file imports absolutely, wherever in it."""
    names, tree = set[str](), ast.Module([], [])
    with suppress(OSError, SyntaxError, ValueError, RecursionError):  # what can't be parsed can't be imported
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def own_map_function(name: str, others: Mapping[str, MapFunction]) -> MapFunction:
    """Load ``module:function`` or ``file.py:function``; it is called with a record, a dict of its own.

    Where it must have options too, as a plugin's, they are None. It gives a Conversation, a Document or a Drop, several
    of them, None to leave the record out, or another object in a format that one of ``others`` recognises:
    ``{"messages": [...]}``, say, or XTuner's ``{"conversation": [...]}``.

    Raises:
        PluginError: it can't be imported, or there is no such function.
    """
    module, place = _module(name)
    word = name.rpartition(":")[2]
    function = getattr(module, word, None)
    if not callable(function):
        there = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise PluginError(f"{place}: {unknown('function', word, there)}")

    if inspect.iscoroutinefunction(function):
        raise PluginError(f"{place}: {word} is async; expected a plain function that gives what it makes")
    more = (None,) * (_arguments(function) - 1)  # options, where it is written as a plugin's

    def to_items(record: Record, options: object = None) -> list[Item | Drop]:
        return list(_items(function(deepcopy(dict(record)), *more), others)) or [Drop("nothing_given")]

    return MapFunction(name=name, summary=f"{word} in {place}", map=to_items)


def _arguments(function: Callable[..., Any]) -> int:
    """Give how many arguments a function must have, 1 or 2."""
    with suppress(TypeError, ValueError):  # some that are compiled don't say
        asked = inspect.signature(function, follow_wrapped=False).parameters.values()
        if any(p.kind is p.VAR_POSITIONAL for p in asked):  # a decorator's, which hands on what it is given
            asked = inspect.signature(function).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return min(max(sum(p.kind in kinds and p.default is p.empty for p in asked), 1), 2)
    return 1


def _module(name: str) -> tuple[ModuleType, str]:
    """Import what comes before the colon; give it and its name in errors."""
    place, file = name.rpartition(":")[0], own_file(name)
    try:
        return (importlib.import_module(place) if file is None else _from_file(place, file.read_bytes())), place
    except OSError as error:
        raise PluginError(f"{place}: {system_words(error)}; --plugin FILE.py:FUNCTION names a file") from error
    except (Exception, SystemExit) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        line = error.lineno if isinstance(error, SyntaxError) else line_in(place, error)
        hint = "" if file else f"; a file of your own is {place}.py:{name.rpartition(':')[2]}"
        if file and isinstance(error, ModuleNotFoundError) and (file.parent / f"{error.name}.py").is_file():
            hint = f"; the file is run by itself, without its folder: PYTHONPATH={file.parent} finds what it imports"
        raise PluginError(f"{place}{f':{line}' if line else ''}: importing it raised {words}{hint}") from error


@lru_cache
def _from_file(place: str, code: bytes) -> ModuleType:
    """Run a file as a module of its own; once, however often it is asked for."""
    module = ModuleType(f"corefit_own_{Path(place).stem}")
    module.__file__ = place
    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(compile(code, place, "exec"), module.__dict__)
    return module


def line_in(file: str, error: BaseException) -> int | None:
    """Give the innermost line of a file that an exception passed through."""
    return next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == file), None)


def _items(given: Any, others: Mapping[str, MapFunction]) -> Iterator[Item | Drop]:  # noqa: ANN401, anybody's function
    if given is None:
        yield Drop("left_out")
    elif isinstance(given, Conversation | Document | Drop):
        yield given
    elif isinstance(given, Mapping):
        fits = [other for other in others.values() if _looks_like(other, given)]
        if len(fits) != 1:
            keys = ", ".join(map(str, given)) or "no keys"
            raise TypeError(f"gave an object with {keys}; expected messages (or XTuner's conversation)")
        yield from fits[0].map(given, fits[0].options and fits[0].options())
    elif isinstance(given, Iterable) and not isinstance(given, str):
        for each in given:
            yield from _items(each, others)
    else:
        raise TypeError(f"gave a {type(given).__name__}; expected Conversation, Document, Drop, None or an object")


def _looks_like(other: MapFunction, given: Mapping[str, Any]) -> bool:
    with suppress(Exception):  # of a plugin that nobody asked for
        return other.sniff is not None and bool(other.sniff(given))  # type: ignore[arg-type]
    return False
