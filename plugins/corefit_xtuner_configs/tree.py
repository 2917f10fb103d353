"""A configuration in Python -> its values, by its syntax tree. Nothing of the file is run or imported.

What the tree says plainly is followed: assignments, ``dict(...)``, lists, arithmetic, strings, ``if`` over what is
known, ``with read_base():``. All else (a call, a loop, a comprehension) becomes an ``Unknown`` with its line.
Each value remembers where it was written, so that ``max_length`` in a dataset points at ``max_length = 2048``.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import operator
import posixpath
import re
import string
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corefit import RecipeError

BYTES, STEPS = 2**20, 10**6
"""What a file may have, and how many values may be worked out."""
WIDE = 10**5
"""Largest length of a text or a list, and most bits of a number, that is worked out."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """Something that was imported: its name, never the thing."""

    path: str
    """``xtuner.utils.PROMPT_TEMPLATE.internlm_chat``."""


@dataclass(frozen=True, slots=True)
class Own:
    """A function or a class that the file itself defines."""

    name: str
    where: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """A value that only running code would give; ``why`` says what stands there."""

    why: str


@dataclass(slots=True)
class Value:
    """A value and where it was written."""

    data: Any
    """None, bool, int, float, str, Symbol, Own, Unknown; a dict of str -> Value; a list or tuple of Values."""
    where: str
    """``path:line``, or the override as typed."""

    def get(self, key: str) -> Value | None:
        """Give the value under a key of a dict; None: it is no dict, or has none."""
        found = self.data.get(key) if isinstance(self.data, dict) else None
        return found if isinstance(found, Value) else None

    def plain(self, left: list[int] | None = None, *, exact: bool = False) -> Any:  # noqa: ANN401, whatever is there
        """Give it without places, symbols as their paths; ``left`` counts down how much that may be.

        ``exact``: tuples stay tuples, where they are lists otherwise.
        """
        left = left or [WIDE]
        left[0] -= 1
        if left[0] < 0:
            raise RecipeError(f"{self.where}: more than {WIDE:,} values in one")
        if isinstance(self.data, dict):
            return {key: value.plain(left, exact=exact) for key, value in self.data.items()}
        if isinstance(self.data, (list, tuple)):
            items = [value.plain(left, exact=exact) for value in self.data]
            return tuple(items) if exact and isinstance(self.data, tuple) else items
        return self.data.path if isinstance(self.data, Symbol) else self.data

    def inside(self) -> list[Value]:
        """Give the values of a dict, a list or a tuple; of anything else none."""
        data = self.data.values() if isinstance(self.data, dict) else self.data
        return list(data) if isinstance(self.data, (dict, list, tuple)) else []

    def unknown(self, seen: set[int] | None = None) -> Value | None:
        """Give the first thing in it that can't be known; ``seen``: what has been looked at."""
        seen = set() if seen is None else seen
        if isinstance(self.data, (Unknown, Own)):
            return self
        if id(self.data) not in seen:
            seen.add(id(self.data))
            for value in self.inside():
                if (found := value.unknown(seen)) is not None:
                    return found
        return None


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_PURE = ("int", "float", "str", "bool", "round", "min", "max", "abs", "len", "sum")
_JOINS = ("os.path.join", "posixpath.join")
_WORDS: dict[type[ast.expr], str] = {
    ast.Lambda: "a lambda",
    **dict.fromkeys((ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp), "a comprehension"),
    ast.NamedExpr: "an assignment inside an expression",
}


class _Cant(Exception):
    """What an expression has that can't be followed, in words."""


class Config:
    """A configuration file, read: ``names`` are its variables, ``notes`` what in it was passed over."""

    def __init__(self, path: Path, overrides: dict[str, Value], *, of: Config | None = None) -> None:
        """Read the file; ``overrides`` replace what is assigned to these names, here and in files that it builds on.

        Raises:
            RecipeError: it can't be read, is no Python, or is not what a configuration can be.
        """
        self.path, self.overrides = path, overrides
        self.names: dict[str, Value] = {}
        self.notes: list[tuple[str, str]] = []
        """(``path:line``, words)"""
        self.open: tuple[Path, ...] = (*(of.open if of else ()), path.resolve())
        self.left: list[int] = of.left if of else [STEPS]
        self.seen: set[str] = of.seen if of else set()
        self.stars: list[str] = []
        try:
            data = path.read_bytes()
            if len(data) > BYTES:
                raise RecipeError(f"{path}: {len(data):,} bytes; a configuration has at most {BYTES:,}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "\\d" in a text, which is no business of ours
                tree = ast.parse(data, str(path))
        except OSError as error:
            raise RecipeError(f"{path}: can't be read: {(error.strerror or str(error)).lower()}") from error
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None) or 1
            raise RecipeError(f"{path}:{line}: not Python: {getattr(error, 'msg', None) or error}") from error
        try:
            self._block(tree.body)
        except RecursionError as error:
            raise RecipeError(f"{path}: nested too deeply for a configuration") from error

    def at(self, node: ast.AST) -> str:
        """Give ``path:line`` of a piece of the tree."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}"

    # -------------------------------------------------------------------------------------------------- statements

    def _block(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                path = alias.name if alias.asname else alias.name.partition(".")[0]
                self.names[alias.asname or path] = Value(Symbol(path), self.at(node))
        elif isinstance(node, ast.ImportFrom):
            self._import(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            if node.value is not None:
                value = self.value(node.value)
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self._assign(target, value)
        elif isinstance(node, ast.AugAssign):
            old = self.value(node.target).data
            more = self.value(node.value).data if isinstance(old, list) and isinstance(node.op, ast.Add) else None
            if isinstance(old, list) and isinstance(more, (list, tuple)):
                self._grow(node, old, more)  # in place, as Python does
            else:
                both = ast.copy_location(ast.BinOp(node.target, node.op, node.value), node)
                self._assign(node.target, self.value(both), override=False)
        elif isinstance(node, ast.If):
            test = self.value(node.test)
            if isinstance(test.data, (Unknown, Own, Symbol)):
                self._lost(node, "behind an `if` that can't be decided")
            else:
                self._block(node.body if test.data else node.orelse)
        elif isinstance(node, ast.With) and all(ast.unparse(i.context_expr) == "read_base()" for i in node.items):
            self._block(node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            kind = "class" if isinstance(node, ast.ClassDef) else "def"
            self.names[node.name] = Value(Own(node.name, self.at(node)), self.at(node))
            self._note(node, f"{kind} {node.name}: not run; corefit runs no code of a configuration")
        elif isinstance(node, ast.Delete):
            for target in node.targets:
                self._delete(target)
        elif isinstance(node, ast.Expr):
            if isinstance(self.value(node.value).data, Unknown):
                self._note(node, f"`{_short(ast.unparse(node))}`: not run")
        elif not isinstance(node, (ast.Pass, ast.Assert)):
            self._lost(node, "made by code that is not run")

    def _note(self, node: ast.AST, words: str) -> None:
        self.notes.append((self.at(node), words))

    def _lost(self, node: ast.stmt, why: str) -> None:
        """Forget every name that a statement may change, and say so."""
        first = ast.unparse(node).partition("\n")[0]
        self._note(node, f"`{_short(first)}`: not run")
        for inner in ast.walk(node):
            name = inner.id if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store) else None
            if isinstance(inner, (ast.Attribute, ast.Subscript)) and isinstance(inner.ctx, ast.Store):
                name = next((n.id for n in ast.walk(inner) if isinstance(n, ast.Name)), None)
            if name:
                self.names[name] = Value(Unknown(f"{why}, `{_short(first)}`"), self.at(node))

    def _import(self, node: ast.ImportFrom) -> None:
        if node.level == 0:
            for alias in node.names:
                if alias.name == "*":
                    self.stars.append(f"`from {node.module} import *` (line {node.lineno})")
                self.names[alias.asname or alias.name] = Value(Symbol(f"{node.module}.{alias.name}"), self.at(node))
            return
        folder = self.path.parent.joinpath(*[".."] * (node.level - 1))
        modules = [node.module] if node.module else [alias.name for alias in node.names]
        for module in modules:
            file = folder.joinpath(*module.split(".")).with_suffix(".py")
            if file.resolve() in self.open:
                raise RecipeError(f"{self.at(node)}: {file}: builds on itself")
            if not file.is_file():
                near = difflib.get_close_matches(file.name, [p.name for p in folder.glob("*.py")], n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise RecipeError(f"{self.at(node)}: {file}: no such file{hint}")
            base = Config(file, self.overrides, of=self)
            self.notes += base.notes
            if not node.module:
                alias = next(alias for alias in node.names if alias.name == module)
                self.names[alias.asname or module] = Value(base.names, self.at(node))
            for alias in node.names if node.module else ():
                if alias.name == "*":
                    self.names |= {name: value for name, value in base.names.items() if not name.startswith("_")}
                else:
                    missing = Value(Unknown(f"{alias.name!r}, which {file} doesn't define"), self.at(node))
                    self.names[alias.asname or alias.name] = base.names.get(alias.name, missing)

    def _assign(self, target: ast.expr, value: Value, *, override: bool = True) -> None:
        if isinstance(target, ast.Name):
            if override and target.id in self.overrides:
                self.seen.add(target.id)
                value = self.overrides[target.id]
            self.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            inside = value.data if isinstance(value.data, (list, tuple)) else ()
            for i, each in enumerate(target.elts):
                fits = len(inside) == len(target.elts) and not isinstance(each, ast.Starred)
                self._assign(each, inside[i] if fits else Value(Unknown("unpacked from something else"), value.where))
        elif isinstance(target, (ast.Attribute, ast.Subscript)):
            holder, key = self._spot(target)
            if holder is None:
                self._note(target, f"`{_short(ast.unparse(target))} = ...`: not followed")
            else:
                holder[key] = value

    def _delete(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.names.pop(target.id, None)
            return
        holder, key = self._spot(target)
        if holder is None or (isinstance(holder, dict) and key not in holder):
            self._note(target, f"`del {_short(ast.unparse(target))}`: not followed")
        else:
            del holder[key]

    def _spot(self, target: ast.expr) -> tuple[Any, Any]:
        """Give the dict or list that a thing is in, and its key or place there; (None, None): it can't be followed."""
        if isinstance(target, (ast.Attribute, ast.Subscript)):
            holder, key = self.value(target.value).data, self._key(target)
            if isinstance(holder, list) and isinstance(key, int) and -len(holder) <= key < len(holder):
                return holder, key
            if isinstance(holder, dict) and isinstance(key, str):
                return holder, key
        return None, None

    def _key(self, node: ast.Attribute | ast.Subscript) -> Any:  # noqa: ANN401
        return node.attr if isinstance(node, ast.Attribute) else self.value(node.slice).data

    def _grow(self, node: ast.AST, items: list[Value], more: Sequence[Value]) -> None:
        if len(items) + len(more) > WIDE:
            raise RecipeError(f"{self.at(node)}: a list of more than {WIDE:,} values")
        items.extend(more)

    # ------------------------------------------------------------------------------------------------- expressions

    def value(self, node: ast.expr) -> Value:
        """Give what an expression is; what can't be followed is an ``Unknown``."""
        self.left[0] -= 1
        if self.left[0] < 0:
            raise RecipeError(f"{self.at(node)}: more than {STEPS:,} values, which no configuration has")
        if isinstance(node, ast.Name):  # first of all: the value with the place where it was written
            if node.id in self.names:
                return self.names[node.id]
            stars = f"; it may come from {', '.join(self.stars)}, which is not run" if self.stars else ""
            words = f"{node.id!r}, which is not defined here{near(node.id, self.names)}{stars}"
            return Value(Unknown(words), self.at(node))
        try:
            data = self._data(node)
        except _Cant as cant:
            data = Unknown(str(cant))
        except (RecursionError, RecipeError):
            raise
        except Exception as error:  # arithmetic on what doesn't fit: 1 / 0, 'a' + 1, [][0]
            data = Unknown(f"`{_short(ast.unparse(node))}`: {type(error).__name__}: {error}")
        if isinstance(data, (str, list, tuple)) and len(data) > WIDE:
            data = Unknown(f"`{_short(ast.unparse(node))}`, which is too large")
        return data if isinstance(data, Value) else _placed(data, self.at(node))

    def _known(self, node: ast.expr, *, symbols: bool = False) -> Any:  # noqa: ANN401
        return _known(self.value(node), symbols=symbols)

    def _data(self, node: ast.expr) -> Any:  # noqa: ANN401, C901
        if isinstance(node, ast.Constant):
            if node.value is ... or isinstance(node.value, (bytes, complex)):
                raise _Cant(f"`{_short(ast.unparse(node))}`, which no configuration needs")
            return node.value
        if isinstance(node, (ast.List, ast.Tuple)):
            items = list(self._items(node.elts))
            return tuple(items) if isinstance(node, ast.Tuple) else items
        if isinstance(node, ast.Dict):
            return self._table(
                [(None if k is None else self._known(k), v) for k, v in zip(node.keys, node.values, strict=True)]
            )
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Subscript):
            holder, key = self.value(node.value), self._key(node)
            if isinstance(holder.data, (dict, list, tuple)) and not isinstance(key, (Unknown, Own)):
                return holder.data[key]
            if isinstance(holder.data, (Unknown, Own)):
                raise _Cant(in_words(holder))
            if isinstance(holder.data, Symbol) and isinstance(key, str):
                return Symbol(f"{holder.data.path}.{key}")
        if isinstance(node, ast.IfExp):
            return self.value(node.body if self._known(node.test, symbols=True) else node.orelse)
        if isinstance(node, ast.BoolOp):
            last: Value | None = None
            for each in node.values:
                last = self.value(each)
                if bool(_known(last, symbols=True)) != isinstance(node.op, ast.And):
                    break
            return last
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](self._known(node.operand))
        if isinstance(node, ast.Compare):
            values = [self._known(each, symbols=True) for each in (node.left, *node.comparators)]
            ops = [_OPERATORS[type(op)] for op in node.ops]
            return all(op(a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return self._binary(node)
        if isinstance(node, ast.JoinedStr):
            return "".join(self._piece(piece) for piece in node.values)
        if isinstance(node, ast.Call):
            return self._called(node)
        raise _Cant(f"{_WORDS.get(type(node), 'code')}, `{_short(ast.unparse(node))}`, which is never run")

    def _items(self, nodes: Sequence[ast.expr]) -> Iterator[Value]:
        for node in nodes:
            if isinstance(node, ast.Starred):
                inside = self.value(node.value).data
                if not isinstance(inside, (list, tuple)):
                    raise _Cant(f"`{_short(ast.unparse(node))}`, which is never run")
                yield from inside
            else:
                yield self.value(node)

    def _table(self, pairs: Sequence[tuple[Any, ast.expr]]) -> dict[str, Value]:
        table: dict[str, Value] = {}
        for key, node in pairs:
            value = self.value(node)
            if key is not None:
                table[str(key)] = value
            elif isinstance(value.data, dict):  # **other
                table |= value.data
            else:
                raise _Cant(f"`**{_short(ast.unparse(node))}`, which is never run")
        return table

    def _attribute(self, node: ast.Attribute) -> Any:  # noqa: ANN401
        holder = self.value(node.value)
        if isinstance(holder.data, Symbol):
            return Value(Symbol(f"{holder.data.path}.{node.attr}"), self.at(node))
        if isinstance(holder.data, dict) and node.attr in holder.data:
            return holder.data[node.attr]
        if isinstance(holder.data, (Unknown, Own)):
            raise _Cant(in_words(holder))
        raise _Cant(f"`{_short(ast.unparse(node))}`, which is not defined here")

    def _binary(self, node: ast.BinOp) -> Any:  # noqa: ANN401
        op = type(node.op)
        left, right = self.value(node.left), self.value(node.right)
        for kind in (list, tuple):
            if op is ast.Add and isinstance(left.data, kind) and isinstance(right.data, kind):
                return kind([*left.data, *right.data])
        if op is ast.Mult and isinstance(left.data, (list, tuple)) and isinstance(right.data, int):
            if len(left.data) * right.data > WIDE:
                raise _Cant(f"`{_short(ast.unparse(node))}`, which is too large")
            return left.data * right.data
        a, b = _known(left), _known(right)
        if isinstance(a, str) and op is ast.Mod:
            if re.sub("%[sd%]", "", a).count("%") or a.count("%") * len(str(b)) > WIDE:
                raise _Cant(f"`{_short(ast.unparse(node))}`, with a format that is not followed")
            return a % b
        if not isinstance(b, (int, float)) and not (op is ast.Add and isinstance(a, str) and isinstance(b, str)):
            raise _Cant(f"`{_short(ast.unparse(node))}`, which is never run")
        size = len(a) * b if isinstance(a, str) and isinstance(b, int) else 0
        if isinstance(a, int) and isinstance(b, int):
            size = max(a.bit_length(), 1) * abs(b) if op is ast.Pow else a.bit_length() + b.bit_length()
        if size > WIDE:
            raise _Cant(f"`{_short(ast.unparse(node))}`, which is too large")
        return _OPERATORS[op](a, b)

    def _piece(self, node: ast.expr) -> str:
        """Give a piece of an f-string."""
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.FormattedValue) and node.conversion == -1:
            value, spec = self._known(node.value), "".join(map(self._piece, getattr(node.format_spec, "values", ())))
            if re.fullmatch(r"[-+,0]?\d?(\.\d)?[defgs]?", spec):
                return format(value, spec)
        raise _Cant(f"an f-string, `{_short(ast.unparse(node))}`, with a format that is not followed")

    def _called(self, node: ast.Call) -> Any:  # noqa: ANN401
        function = node.func
        if isinstance(function, ast.Name) and function.id not in self.names:
            if function.id == "dict":
                return self._given(node)
            if function.id in ("list", "tuple") and len(node.args) == 1 and not node.keywords:
                inside = self.value(node.args[0]).data
                if isinstance(inside, (list, tuple)):
                    return list(inside) if function.id == "list" else tuple(inside)
            if function.id in _PURE and not node.keywords:
                return getattr(builtins, function.id)(*map(self._known, node.args))
        if isinstance(function, ast.Attribute):
            holder = self.value(function.value)
            if isinstance(holder.data, Symbol) and f"{holder.data.path}.{function.attr}" in _JOINS:
                return posixpath.join(*map(self._known, node.args))
            if isinstance(holder.data, str) and function.attr == "join" and len(node.args) == 1:
                pieces = self._known(node.args[0])
                if len(holder.data) * len(pieces) <= WIDE:
                    return holder.data.join(pieces)
            if isinstance(holder.data, str) and function.attr == "format":
                return self._format(holder.data, node)
            if isinstance(holder.data, dict) and function.attr == "copy" and not node.args:
                return dict(holder.data)
            if isinstance(holder.data, dict) and function.attr == "update":
                holder.data.update(self._given(node))
                return None
            if isinstance(holder.data, dict) and function.attr == "pop" and node.args:
                return holder.data.pop(self._known(node.args[0]), *map(self.value, node.args[1:]))
            if isinstance(holder.data, list) and function.attr == "pop":
                return holder.data.pop(*map(self._known, node.args))
            if isinstance(holder.data, list) and function.attr in ("append", "extend") and len(node.args) == 1:
                more = [self.value(node.args[0])] if function.attr == "append" else self.value(node.args[0]).data
                if isinstance(more, (list, tuple)):
                    self._grow(node, holder.data, more)
                    return None
        elif (called := self.value(function)) and isinstance(called.data, Symbol) and called.data.path in _JOINS:
            return posixpath.join(*map(self._known, node.args))
        raise _Cant(f"a function call, `{_short(ast.unparse(node))}`, which is never run")

    def _given(self, node: ast.Call) -> dict[str, Value]:
        """Give what ``dict(...)`` or ``x.update(...)`` is called with: tables, then names."""
        table: dict[str, Value] = {}
        for arg in node.args:
            given = self.value(arg).data
            if not isinstance(given, dict):
                raise _Cant(f"`{_short(ast.unparse(node))}`, which is never run")
            table |= given
        return table | self._table([(k.arg, k.value) for k in node.keywords])

    def _format(self, text: str, node: ast.Call) -> str:
        """Give ``text.format(...)`` for plain fields: ``{}``, ``{0}``, ``{name}``."""
        args = [self._known(arg) for arg in node.args]
        given = {str(k.arg): self._known(k.value) for k in node.keywords}
        if text.count("{") * max(map(len, map(str, [*args, *given.values(), ""]))) > WIDE:
            raise _Cant(f"`{_short(ast.unparse(node))}`, which is too large")
        for _, name, spec, conversion in string.Formatter().parse(text):
            if spec or conversion or not re.fullmatch(r"\w*", name or ""):
                raise _Cant(f"`{_short(ast.unparse(node))}`, with a format that is not followed")
        return text.format(*args, **given)


def _placed(data: Any, where: str) -> Value:  # noqa: ANN401
    """Give a value its place; what arithmetic made of plain lists gets one for each item."""
    if isinstance(data, (list, tuple)):
        return Value(type(data)(d if isinstance(d, Value) else _placed(d, where) for d in data), where)
    if isinstance(data, dict):
        return Value({key: d if isinstance(d, Value) else _placed(d, where) for key, d in data.items()}, where)
    return Value(data, where)


def in_words(value: Value) -> str:
    """Say what stands in the place of a value that can't be known."""
    if isinstance(value.data, Own):
        return f"{value.data.name!r}, which is defined here ({value.data.where}) and never run"
    return value.data.why if isinstance(value.data, Unknown) else _short(repr(value.plain()))


def _known(value: Value, *, symbols: bool = False) -> Any:  # noqa: ANN401
    """Give a value in Python's own terms, or raise what in it can't be known."""
    if (lost := value.unknown()) is not None:
        raise _Cant(in_words(lost))
    if isinstance(value.data, Symbol) and not symbols:
        raise _Cant(f"{value.data.path!r}, which is never imported")
    return value.plain(exact=True)


def near(name: str, known: Iterable[str]) -> str:
    """Give the end of an error about an unknown name: the nearest one, if there is one."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
