"""Plugins: find them, load them one by one, look their entries up. The only module that calls pluggy.

A plugin that fails harms nobody who does not ask for it: it is listed with its reason. Asked for, it is fatal. Nothing
depends on the order of installation: a name that two plugins claim belongs to neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import pluggy

from corefit import __version__, hookspecs
from corefit.deprecated import GOING, warn
from corefit.errors import PluginError, in_words, unknown
from corefit.own import own_code, own_map_function
from corefit.templates import PromptTemplate
from corefit.types import (
    DatasetReader,
    MapFunction,
    Quantizer,
    RecipeReader,
    Reporter,
    Scheduler,
)

Entry = DatasetReader | MapFunction | PromptTemplate | Quantizer | RecipeReader | Reporter | Scheduler
"""What plugins contribute."""
GROUP = "corefit"
DISABLE = "COREFIT_DISABLE_PLUGINS"
"""Environment variable: names of plugins to leave out, comma separated; ``*`` is all but corefit's own defaults."""


class _Kind(NamedTuple):
    hook: str
    type: type[Any]


KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "reader": _Kind("corefit_dataset_readers", DatasetReader),
        "map function": _Kind("corefit_map_functions", MapFunction),
        "template": _Kind("corefit_prompt_templates", PromptTemplate),
        "quantizer": _Kind("corefit_quantizers", Quantizer),
        "scheduler": _Kind("corefit_schedulers", Scheduler),
        "recipe reader": _Kind("corefit_recipe_readers", RecipeReader),
        "reporter": _Kind("corefit_reporters", Reporter),
    }
)
"""The words for the seven kinds of entry, as they stand in errors and in ``PluginInfo.entries``."""

_HOOKS = tuple(kind.hook for kind in KINDS.values())
_SIMPLE: Mapping[str, tuple[Any, str]] = {
    "str": (str, "text"),
    "bool": (bool, "True or False"),
    "bytes": (bytes, "bytes"),
    "Path": (Path, "a Path"),
    "tuple": ((tuple, list), "a tuple of text"),
    "Mapping": (Mapping, "a mapping from text"),
    "Callable": (Callable, "a function"),
    "type": (type, "a frozen dataclass"),
    "None": (type(None), "None"),
}
"""What fields of entries are annotated with -> the type, and how errors say it."""


@dataclass(frozen=True)
class PluginInfo:
    """One plugin as found: where it comes from, what it contributes, or why it contributes nothing."""

    name: str
    """The entry point's name."""
    distribution: str
    version: str
    module: str
    """What the entry point refers to: ``package.module``, or ``package.module:attribute``."""
    entries: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Kind (a key of ``KINDS``) -> sorted names; empty where the plugin is broken."""
    error: str | None = None
    """Why none of it can be used, in one line; None: it loaded."""
    clashes: tuple[str, ...] = ()
    """A line for every entry that another plugin claims too; those can't be used."""
    cause: BaseException | None = field(default=None, repr=False, compare=False)
    """What the plugin raised, for ``--debug``."""

    @property
    def source(self) -> str:
        """Distribution and version, as errors name them."""
        return f"{self.distribution} {self.version}"

    def __str__(self) -> str:
        return f"{self.name!r} ({self.source})"


@dataclass(frozen=True)
class Registry:
    """Every entry of every working plugin, by kind and name."""

    plugins: tuple[PluginInfo, ...]
    """Sorted by name, then distribution; without the disabled ones."""
    entries: Mapping[str, Mapping[str, Entry]]
    """Kind -> name -> entry, sorted by name; without names that are claimed twice."""
    disabled: tuple[str, ...] = ()
    """Names of the plugins that were left out on request."""

    @classmethod
    def load(cls, *, disabled: Iterable[str] | None = None) -> Registry:
        """Import every installed plugin that is not disabled and collect what it yields.

        Args:
            disabled: names of entry points to leave out, ``"*"`` for all but corefit's own defaults; None: as the
                environment variable ``COREFIT_DISABLE_PLUGINS`` says.

        Raises:
            PluginError: a disabled name that no plugin has, or that of corefit's own defaults.
        """
        found = _find()
        wanted = os.environ.get(DISABLE, "").split(",") if disabled is None else disabled
        off = {name.strip() for name in wanted} - {""}
        names = {info.name for info, _ in found}
        if GROUP in off:
            raise PluginError(f"{DISABLE}: plugin {GROUP!r} holds corefit's defaults and can't be disabled")
        for name in sorted(off - names - {"*"}):
            raise PluginError(f"{DISABLE}: {unknown('plugin', name, names)}")
        kept = [
            (info, point)
            for info, point in found
            if info.name not in off and ("*" not in off or (info.name, info.distribution) == (GROUP, GROUP))
        ]
        gone = {info.name for info, _ in found} - {info.name for info, _ in kept}

        claims: dict[tuple[str, str], list[tuple[PluginInfo, Entry]]] = {}
        plugins: list[PluginInfo] = []
        for info, point in kept:
            others = [other.source for other, _ in kept if other.name == info.name and other is not info]
            if others:  # not even imported: whichever came first could pose as the other
                error = f"{' and '.join(sorted(others))} has a plugin of this name too; uninstall one of them"
                plugins.append(dataclasses.replace(info, error=error))
                continue
            loaded, own = _load(info, point)
            plugins.append(loaded)
            for kind, entry in own:
                claims.setdefault((kind, entry.name), []).append((loaded, entry))

        entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
        for (kind, name), claimants in sorted(claims.items(), key=lambda claim: claim[0]):
            if len(claimants) == 1:
                entries[kind][name] = claimants[0][1]
                continue
            for i, info in enumerate(plugins):
                others = [str(other) for other, _ in claimants if other.name != info.name]
                if len(others) < len(claimants):
                    line = f"{kind} {name!r} is claimed by plugin {' and '.join(others)} too"
                    plugins[i] = dataclasses.replace(info, clashes=(*info.clashes, line))
        return cls(tuple(plugins), MappingProxyType(entries), tuple(sorted(gone)))

    @property
    def readers(self) -> Mapping[str, DatasetReader]:
        """Dataset readers by name."""
        return cast(Mapping[str, DatasetReader], self.entries["reader"])

    @property
    def map_functions(self) -> Mapping[str, MapFunction]:
        """Map functions by name."""
        return cast(Mapping[str, MapFunction], self.entries["map function"])

    @property
    def templates(self) -> Mapping[str, PromptTemplate]:
        """Prompt templates by name."""
        return cast(Mapping[str, PromptTemplate], self.entries["template"])

    @property
    def recipe_readers(self) -> Mapping[str, RecipeReader]:
        """Recipe readers by name."""
        return cast(Mapping[str, RecipeReader], self.entries["recipe reader"])

    def reader(self, name: str) -> DatasetReader:
        """Give the reader of this name; raises ``PluginError`` where there is none that can be used."""
        return cast(DatasetReader, self._get("reader", name))

    def map_function(self, name: str) -> MapFunction:
        """Give the map function of this name, or the user's own; ``PluginError`` where there is none to be used."""
        if ":" in name:
            return own_map_function(name, self.map_functions)
        return cast(MapFunction, self._get("map function", name))

    def template(self, name: str) -> PromptTemplate:
        """Give the template of this name; raises ``PluginError`` where there is none that can be used."""
        return cast(PromptTemplate, self._get("template", name))

    def quantizer(self, name: str) -> Quantizer:
        """Give the quantizer of this name; raises ``PluginError`` where there is none that can be used."""
        return cast(Quantizer, self._get("quantizer", name))

    def scheduler(self, name: str) -> Scheduler:
        """Give the scheduler of this name; raises ``PluginError`` where there is none that can be used."""
        return cast(Scheduler, self._get("scheduler", name))

    def reporter(self, name: str) -> Reporter:
        """Give the reporter of this name; raises ``PluginError`` where there is none that can be used."""
        return cast(Reporter, self._get("reporter", name))

    def recipe_reader(self, suffix: str) -> RecipeReader:
        """Give the recipe reader of files that end so; raises ``PluginError`` where there is none, or more than one."""
        found = [reader for reader in self.recipe_readers.values() if suffix in reader.suffixes]
        if len(found) == 1:
            return found[0]
        if found:
            raise PluginError(
                f"{suffix} is read by {' and '.join(r.name for r in found)}; leave one out with {DISABLE}"
            )
        known = sorted({suffix for reader in self.recipe_readers.values() for suffix in reader.suffixes})
        raise PluginError(f"{suffix or 'no suffix'}: no recipe; recipes are .toml, plugins read {', '.join(known)}")

    def provider(self, kind: str, name: str) -> PluginInfo:
        """Give the plugin that an entry comes from; ``kind`` is a key of ``KINDS``.

        Raises:
            PluginError: no plugin provides it, a broken one has its name, or two claim it.
        """
        if ":" in name:
            short, digest = own_code(name)
            return PluginInfo(short, "own code", digest, name)
        self._get(kind, name)
        return next(info for info in self.plugins if name in info.entries.get(kind, ()))

    def clashes(self, kind: str) -> str:
        """Give words about every name of this kind that belongs to nobody, because several plugins claim it."""
        names = {name for info in self.plugins for name in info.entries.get(kind, ())} - {*self.entries[kind]}
        return "".join(f"{self._clash(kind, name)}; " for name in sorted(names))

    def _clash(self, kind: str, name: str) -> str:
        claimants = [str(info) for info in self.plugins if name in info.entries.get(kind, ())]
        words = f"{kind} {name!r} is claimed by plugin {' and by plugin '.join(claimants)}; "
        return f"{words}uninstall one of them, or leave one out with {DISABLE}=NAME" if len(claimants) > 1 else ""

    def _get(self, kind: str, name: str) -> Entry:
        """Give the entry, or raise why it can't be used. A broken plugin of that name may have meant to claim it."""
        entries = self.entries[kind]
        if clash := self._clash(kind, name):
            raise PluginError(clash)
        broken = [info for info in self.plugins if info.error]
        for info in broken:
            if info.name == name:
                raise PluginError(f"plugin {info} can't be used: {info.error}; mend or uninstall it") from info.cause
        if name in entries:
            return entries[name]
        message = unknown(kind, name, entries)
        if name.endswith(".py"):
            message = f"{name}: a file of your own is named with its function, {name}:FUNCTION"
        if broken:
            reasons = "; ".join(f"{info}: {info.error}" for info in broken)
            raise PluginError(f"{message}; a broken plugin may have had it: {reasons}") from broken[0].cause
        if self.disabled:
            message += f"; left out by {DISABLE}: {', '.join(self.disabled)}"
        raise PluginError(f"{message}; is its plugin installed? 'corefit plugins' lists all that are")


def _find() -> list[tuple[PluginInfo, metadata.EntryPoint | None]]:
    """Give the entry points of the group, sorted, without importing them.

    ``metadata.entry_points`` parses every distribution's file in one go, so that a torn one, of anybody, would end
    every command. Here only those that name the group are parsed, each guarded. A distribution that is on the path
    twice counts once: the first, which is also the one that an import finds.
    """
    found: list[tuple[PluginInfo, metadata.EntryPoint | None]] = []
    names: set[str] = set()
    for distribution in metadata.distributions():
        try:
            text = distribution.read_text("entry_points.txt") or ""
        except Exception:  # unreadable, and nothing says that it is a plugin
            continue
        if f"[{GROUP}]" in text:
            try:
                names.add(re.sub(r"[-_.]+", "-", distribution.name).lower())
            except Exception as error:
                reason = "its metadata has no name"
                found.append((PluginInfo("?", "unknown distribution", "", "", error=reason, cause=error), None))
    for name in names:
        version = "unknown version"
        try:
            distribution = metadata.distribution(name)
            version = distribution.version or version
            for point in set(distribution.entry_points.select(group=GROUP)):
                found.append((PluginInfo(point.name, name, version, point.value), point))
        except Exception as error:
            reason = f"its entry_points.txt can't be read: {in_words(error)}"
            found.append((PluginInfo(name, name, version, "", error=reason, cause=error), None))
    return sorted(found, key=lambda pair: (pair[0].name, pair[0].distribution, pair[0].module))


class _Manager(pluggy.PluginManager):
    """Takes undecorated implementations, as pytest does, and lets none go by that no hook would ever call."""

    info: PluginInfo
    """Whose they are."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        opts = super().parse_hookimpl_opts(plugin, name)
        if opts is None:
            if not (name.startswith("corefit_") and callable(getattr(plugin, name, None))):
                return None
            opts = pluggy.HookimplOpts(
                wrapper=False, hookwrapper=False, optionalhook=False, tryfirst=False, trylast=False, specname=None
            )
        hook = opts["specname"] or name
        if hook in GOING:
            hook = opts["specname"] = warn(hook, who=str(self.info))
        if hook not in _HOOKS:
            raise PluginError(unknown("hook", hook, _HOOKS))
        if opts["wrapper"] or opts["hookwrapper"]:
            raise PluginError(f"{name}: a hook can't be wrapped, each plugin is called for itself")
        return opts


def _load(info: PluginInfo, point: metadata.EntryPoint | None) -> tuple[PluginInfo, list[tuple[str, Entry]]]:
    """Import one plugin and call its hooks; all of its entries, or the reason why there are none.

    Each plugin has a manager of its own, so that none can replace, wrap or block another.
    """
    if point is None:
        return info, []
    entries: list[tuple[str, Entry]] = []
    doing = f"importing {info.module!r}"
    try:
        plugin = point.load()
        doing = f"registering {info.module!r}"
        manager = _Manager(GROUP)
        manager.info = info
        manager.add_hookspecs(hookspecs)
        manager.register(plugin, info.name)
        for kind, (hook, type_) in KINDS.items():
            doing = f"{hook}()"
            for implementation in getattr(manager.hook, hook).get_hookimpls():
                result = implementation.function()
                if not isinstance(result, Iterable):  # None too: pluggy would skip it without a word
                    raise PluginError(f"{doing} gives {_short(result)}; expected to yield {type_.__name__}s")
                for entry in result:
                    _check(entry, hook, type_)
                    if any(kind == other and entry.name == before.name for other, before in entries):
                        raise PluginError(f"{doing} yields {kind} {entry.name!r} twice")
                    entries.append((kind, entry))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: nobody asked for this plugin yet
        reason = str(error) if isinstance(error, PluginError) else f"{doing} raised {in_words(error)}"
        if newer := _needs_newer(info.distribution):
            reason = f"it needs corefit {newer}, this is {__version__}: pip install -U corefit ({reason})"
        return dataclasses.replace(info, error=reason, cause=error), []
    names: dict[str, tuple[str, ...]] = {}
    for kind in KINDS:
        if own := sorted(entry.name for other, entry in entries if other == kind):
            names[kind] = tuple(own)
    return dataclasses.replace(info, entries=MappingProxyType(names)), entries


def _needs_newer(distribution: str) -> str:
    """Give the version of corefit that a distribution asks for, where it is newer than this one, else nothing.

    pip sees to that, unless it was told to leave dependencies alone.
    """
    with contextlib.suppress(Exception):  # metadata of anybody
        for requirement in metadata.distribution(distribution).requires or ():
            asked = re.match(r"corefit(?![\w.-])[^;]*?>=\s*([\d.]+)", requirement)
            if asked and _numbers(asked[1]) > _numbers(__version__):
                return asked[1]
    return ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _check(entry: object, hook: str, type_: type[Any]) -> None:
    if not isinstance(entry, type_):
        raise PluginError(f"{hook}() yields {_short(entry)}, a {type(entry).__name__}; expected {type_.__name__}")
    name: object = getattr(entry, "name", None)
    if not (isinstance(name, str) and re.fullmatch(r"\w[\w.+@-]*", name)):
        raise PluginError(f"{hook}() yields the name {_short(name)}; expected letters, digits or one of '_-.+@'")
    if not isinstance(entry.summary, str) or "\n" in entry.summary:
        raise PluginError(f"{hook}() yields {name!r} with summary {_short(entry.summary)}; expected one line of text")
    for item in dataclasses.fields(type_):
        value: object = getattr(entry, item.name)
        kinds = [_SIMPLE[word] for word in re.sub(r"\[.*]", "", str(item.type)).split(" | ")]
        texts = value if isinstance(value, (tuple, list, Mapping)) else ()
        if not any(isinstance(value, kind) for kind, _ in kinds) or not all(isinstance(text, str) for text in texts):
            expected = " or ".join(words for _, words in kinds)
            raise PluginError(f"{hook}() yields {name!r} with {item.name} {_short(value)}; expected {expected}")
    options: Any = getattr(entry, "options", None)
    if options is None:
        return
    parameters = getattr(options, "__dataclass_params__", None)
    if not (isinstance(options, type) and parameters is not None and parameters.frozen):
        raise PluginError(f"{hook}() yields {name!r} with options {_short(options)}; expected a frozen dataclass")


def _short(value: object) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a plugin's own ``__repr__`` may raise too
        text = "(no text)"
    return text if len(text) <= 80 else text[:77] + "..."
