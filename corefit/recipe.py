"""The recipe: everything a run is told, as one tree of frozen dataclasses, in TOML and from flags.

Strict: a key nobody knows, a value of the wrong type or out of range is a ``RecipeError`` with file and line (or the
flag as typed), and all of them are reported together. A key that is None was not set, and something is chosen for it.
TOML is read by ``tomllib``, which gives no lines, so a key's line is found by scanning; it is written here.
"""

from __future__ import annotations

import dataclasses
import datetime
import glob
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

from corefit.errors import PluginError, RecipeError, encoding_hint, unknown
from corefit.own import own_file
from corefit.types import ImportedRecipe


class Is(NamedTuple):
    """A condition on a value, beside its type: ``Annotated[int, Is(">= 1", lambda n: n >= 1)]``."""

    words: str
    """How errors say it, after the type's name."""
    holds: Callable[[Any], bool]


class Unit(NamedTuple):
    """What a number counts or measures, for the reference; empty: it has no unit."""

    name: str


Text = Annotated[str, Is("that is not empty", bool)]
Count = Annotated[int, Is(">= 1", lambda n: 1 <= n < 2**63)]
CountOrOff = Annotated[int, Is(">= 0", lambda n: n >= 0)]
Positive = Annotated[float, Is("> 0", lambda x: x > 0)]
PositiveOrOff = Annotated[float, Is(">= 0", lambda x: x >= 0)]
Share = Annotated[float, Is(">= 0 and < 1", lambda x: 0 <= x < 1), Unit("share")]
LayerShare = Annotated[float, Is("> 0 and < 1", lambda x: 0 < x < 1), Unit("share of the layers")]
Steps = Annotated[Count, Unit("steps")]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model."""

    base: Text | None = None
    """Folder, or hub name where no such folder is there; None: the embedded model, where no data is named either."""
    quantizer: Text = "nf4"
    """Name of a quantizer: how the frozen base weights are stored."""
    add_tokens: tuple[Text, ...] = ()
    """Tokens that the vocabulary is to have and whose embeddings train; new ones begin as the mean of all. What the
    template doesn't write is a word of content: where the data has it, it is that token."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings along."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What trains: LoRA matrices, or every weight."""

    kind: Literal["lora", "none"] = "lora"
    """``none``: full fine-tuning."""
    r: Annotated[int, Is(">= 1 and <= 2^16", lambda n: 1 <= n <= 2**16), Unit("dimensions")] = 64
    """Rank."""
    alpha: Annotated[Count, Unit("")] = 16
    """The update is scaled by alpha / r."""
    dropout: Share = 0.1
    """Share of the adapter's inputs that is zeroed while training."""
    targets: tuple[Text, ...] = ()
    """Ends of module names; empty: every linear layer of the decoder."""
    modules_to_save: tuple[Text, ...] = ()
    """Ends of names of modules that train whole, beside the adapter."""
    dora: bool = False
    """Weight-decomposed: the length of every row of a weight trains too (arXiv:2402.09353)."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732)."""
    start: Text | None = None
    """Adapter folder whose weights are the first ones; r, alpha, targets and the like are then its own."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """One source of records."""

    path: Text | tuple[Text, ...] | None = None
    """Files, folders or globs; ``-`` is standard input; None: for a reader that needs none."""
    map: Text | None = None
    """Name of a map function, or one of your own, ``module:function`` or ``file.py:function``; None: recognised from
    the first records."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """In place of ``map``: which field of a record is the question, the answer and so on (``corefit.Fields``)."""
    reader: Text | None = None
    """Name of a reader; None: by the suffix of the files, else the one of the map function's name, else ``jsonl``."""
    shuffle: bool = True
    """In a new order every epoch."""
    ratio: Annotated[Positive, Unit("weight")] | None = None
    """Records of it that come for those of other sources, as long as all last; None: so many that all last equally
    long. How much is read says ``repeat``, or ``first``."""
    repeat: Annotated[Count, Unit("times")] = 1
    """Times that an epoch reads it."""
    first: Annotated[Count, Unit("records")] | None = None
    """Records to use, from the start; None: all."""
    on_bad: Literal["error", "skip"] = "error"
    """A record that can't be read ends the run, or is counted and skipped."""
    max_record_mb: Annotated[int, Is(">= 1 and <= 2**20", lambda n: 1 <= n <= 2**20), Unit("MiB")] = 64
    """MiB a record may have."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the reader and of the map function."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a conversation is written."""

    name: Text | None = None
    """Name of a prompt template; None: the chat template that the tokenizer carries."""
    supervise: Literal["all", "last", "unroll"] = "all"
    """Which answers of a conversation are targets; ``unroll``: each is the last one of a sample of its own."""
    min_supervised: Share = 0.001
    """Share of the first records' tokens that must be supervised for a run to start, 2 in a pack of 2,048; 0: any."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the template."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """How samples fill packs."""

    max_length: Annotated[int, Is(">= 8 and <= 2**24", lambda n: 8 <= n <= 2**24), Unit("tokens")] = 2048
    """Tokens (slots) in a pack."""
    algorithm: Literal["first_fit", "first_fit_decreasing", "best_fit_decreasing"] = "first_fit_decreasing"
    """How samples are placed."""
    held: Annotated[Count, Unit("samples")] = 256
    """Samples held at a time to choose from."""
    overlong: Literal["error", "drop", "truncate", "split"] = "truncate"
    """What happens to a sample of more than max_length tokens; with ``truncate`` plain text is split all the same."""
    arena: Text | None = None
    """Folder that ``corefit pack`` wrote for this data, template and tokenizer; None: records are encoded as they are
    read."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """The optimizer and the length of the run."""

    epochs: Annotated[CountOrOff, Unit("epochs")] = 3
    """Passes over the records; 0: no limit."""
    max_steps: Steps | None = None
    """Optimizer steps; None: no limit."""
    packs_per_step: Annotated[Count, Unit("packs")] = 16
    """Packs in an optimizer step, over all micro-batches and ranks."""
    micro_batch: Annotated[Count, Unit("packs")] | Literal["auto"] = 1
    """Packs in one forward and backward; ``auto``: the most that there is memory for, planned and then tried."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Of matrix products; trainable weights and optimizer state are fp32."""
    lr: Annotated[Positive, Unit("")] = 2e-4
    """Peak learning rate."""
    lr_mult: Mapping[str, Any] = field(default_factory=dict)
    """Regular expression -> factor of the learning rate for weights in whose name it is found; the first one counts."""
    scheduler: Text = "cosine"
    """Name of a scheduler."""
    warmup: Annotated[float, Is(">= 0 and <= 1", lambda x: 0 <= x <= 1), Unit("share")] = 0.03
    """Share of the run in which the learning rate rises."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw"
    """torch's AdamW, or one of bitsandbytes'."""
    weight_decay: Annotated[PositiveOrOff, Unit("")] = 0.0
    """Share of a weight, times the learning rate, taken off in a step."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay rates of AdamW's two running means."""
    clip: Annotated[PositiveOrOff, Unit("norm")] = 1.0
    """Largest norm of the gradient; 0: not clipped."""
    gradient_checkpointing: bool | Literal["auto"] | LayerShare = "auto"
    """Compute activations anew in the backward; a number: in that share of the layers; ``auto``: on a GPU, not on a
    CPU."""
    offload_activations: bool = False
    """Keep what the backward needs in the computer's memory instead of the GPU's: slow, and the last resort."""
    seed: Annotated[int, Is(">= 0 and < 2^63", lambda n: 0 <= n < 2**63), Unit("")] = 42
    """Of the order of records, the adapter's first weights and dropout."""

    @property
    def micro_packs(self) -> int:
        """``micro_batch``; 1 as long as ``auto`` is not decided."""
        return 1 if self.micro_batch == "auto" else self.micro_batch


@dataclass(frozen=True, kw_only=True)
class Val:
    """Validation."""

    data: Text | tuple[Text, ...] | None = None
    """Files, folders or globs; None: a share of the training records."""
    share: Share = 0.05
    """Share of the records that is set aside; 0: none."""
    records: Annotated[CountOrOff, Unit("records")] = 200
    """Most records set aside or read; 0: no validation."""
    every_steps: Steps | None = None
    """Steps between validations; None: before and after the run only."""
    patience: Annotated[Count, Unit("validations")] | None = None
    """Validations without a better loss that end the run; None: it goes on."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Answers generated on the way, to look at."""

    prompts: tuple[Text, ...] = ()
    """Questions; empty: a few of the validation records'."""
    every_steps: Steps | None = None
    """Steps between generations; None: before and after the run only."""
    max_tokens: Annotated[Count, Unit("tokens")] = 64
    """Most tokens of an answer."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoints to resume from."""

    every_steps: Annotated[CountOrOff, Unit("steps")] = 500
    """Steps between checkpoints; 0: only when the run ends or is stopped."""
    every_minutes: Annotated[Positive, Unit("minutes")] | None = None
    """Minutes between checkpoints; None: by steps only."""
    keep: Annotated[Count, Unit("checkpoints")] = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = False
    """Save after a validation with a new lowest loss, and keep the newest such checkpoint beside the others."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The machine and the folder."""

    out: Text | None = None
    """Run folder; None: the next free runs/NAME-N."""
    threads: Annotated[int, Is(">= 1 and <= 1024", lambda n: 1 <= n <= 1024), Unit("threads")] | None = None
    """CPU threads of torch, and threads that encode records; None: torch's choice, and one for each CPU up to 8."""
    device: Text = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """With several processes, ``none``: each holds the whole model; ``full``: an equal share of the base, and in full
    fine-tuning of gradients and optimizer too (FSDP2); ``auto``: full fine-tuning on GPUs is sharded."""
    reporters: tuple[Text, ...] = ("progress", "report.html")
    """Who is told what happens; ``metrics.jsonl``, ``samples.jsonl`` and the ledger are written whoever is."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Their options: each key goes to every reporter here that has it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run is told. Paths are absolute once a recipe is loaded or a flag applied."""

    model: Model = field(default_factory=Model)
    adapter: Adapter = field(default_factory=Adapter)
    data: tuple[Data, ...] = (Data(),)
    template: Template = field(default_factory=Template)
    pack: Pack = field(default_factory=Pack)
    train: Train = field(default_factory=Train)
    val: Val = field(default_factory=Val)
    sample: Sampling = field(default_factory=Sampling)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    run: RunSettings = field(default_factory=RunSettings)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Dotted key (``data.0.map``) -> ``file:line``, or the flag as typed; keys left at their default are not in it."""

    def where(self, key: str) -> str:
        """Give where a value comes from: ``file:line``, the flag as typed, or ``default``."""
        return _place(self.origins, key) or "default"


def _place(places: Mapping[str, str], key: str) -> str:
    """Give the place of a dotted key, else that of the table it is in; empty: neither is known."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key, "")


SECTIONS: Mapping[str, Any] = {
    title: Data if title == "data" else type(section) for title, section in vars(Recipe()).items() if title != "origins"
}
"""Title -> class, in the order of the recipe's fields."""
_FLAGS = {
    "plugin": "data.map",
    "template": "template.name",
    "model": "model.base",
    "data": "data.path",
    "on-bad-record": "data.on_bad",
    "quantizer": "model.quantizer",
    "scheduler": "train.scheduler",
    "out": "run.out",
    "seed": "train.seed",
}
_PATHS = ("model.base", "adapter.start", "data.path", "pack.arena", "val.data", "run.out")


# ---------------------------------------------------------------------------------------------- values and their types


class _Mismatch(Exception):
    """A value that its annotation does not allow."""


@cache
def _hints(cls: Any) -> dict[str, Any]:  # noqa: ANN401, mypy takes a type for unhashable
    """Field name -> annotation, with conditions; PluginError for a plugin's class that has none."""
    try:
        hints = get_type_hints(cls, include_extras=True)
        return {item.name: hints[item.name] for item in dataclasses.fields(cls) if item.init}
    except Exception as error:
        raise PluginError(f"options class {cls!r}: {error}") from error


def _convert(hint: Any, value: object) -> Any:  # noqa: ANN401, annotations and values have any type
    """Give the value as the annotation wants it (a list becomes a tuple, 1 becomes 1.0), or raise ``_Mismatch``."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin is Annotated:
        value = _convert(args[0], value)
        if all(condition.holds(value) for condition in args[1:] if isinstance(condition, Is)):
            return value
    elif origin in (Union, UnionType):
        for option in args:
            try:
                return _convert(option, value)
            except _Mismatch:
                continue
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif origin in (tuple, list) and isinstance(value, (list, tuple)):
        if origin is list or (len(args) == 2 and args[1] is ...):
            args = (args[0],) * len(value)
        if len(args) == len(value):
            return origin(_convert(each, item) for each, item in zip(args, value, strict=True))
    elif hint in (dict, Mapping) or origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float and type(value) in (int, float):
        try:
            if math.isfinite(number := float(cast(float, value))):
                return number
        except OverflowError:
            pass
    elif hint is str and isinstance(value, str):
        if not any("\ud800" <= letter <= "\udfff" for letter in value):  # bytes of a flag that are not UTF-8
            return value
    elif (hint in (bool, int) and type(value) is hint) or (hint in (None, NoneType) and value is None):
        return value
    elif hint not in (bool, int, float, str, None, NoneType) and origin not in (tuple, list):
        raise TypeError(f"a recipe can't hold {hint}")
    raise _Mismatch


def _expected(hint: Any) -> str:  # noqa: ANN401
    """Give an annotation in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([_expected(args[0]), *(c.words for c in args[1:] if isinstance(c, Is))])
    if origin in (Union, UnionType):
        return " or ".join(_expected(option) for option in args if option not in (None, NoneType))
    if origin is Literal:
        return " or ".join(_value(choice) for choice in args)
    if origin in (tuple, list):
        size = "" if origin is list or args[-1] is ... else f"{len(args)} of "
        return f"a list of {size}({_expected(args[0])})"
    if hint is Mapping or origin in (dict, Mapping):
        return "a table"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(hint, str(hint))


def _mismatch(key: str, hint: Any, value: object) -> str:  # noqa: ANN401
    """Give the words for a value that its annotation does not allow."""
    choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
    if get_origin(hint) is Literal and isinstance(value, str):
        return f"{key}: {unknown('choice', value, choices)}"
    try:
        found = _value(value)
    except RecipeError:
        found = ascii(value)
    more = " (and < 2^63)" if type(value) is int and value >= 2**63 else ""
    return f"{key}: found {found if len(found) <= 80 else found[:77] + '...'}; expected {_expected(hint)}{more}"


def option_keys(cls: type | None) -> list[str]:
    """Give the keys of a plugin's options; none where it has no options."""
    return [] if cls is None else list(_hints(cls))


def shares(table: Mapping[str, Any], classes: Sequence[type | None], *, where: str) -> list[dict[str, Any]]:
    """Divide a table of options: each key goes to every class that has it.

    Raises:
        RecipeError: a key that none has.
    """
    keys = [option_keys(cls) for cls in classes]
    known = {key for each in keys for key in each}
    _raise(f"{where}: {unknown('option', key, known)}" for key in table if key not in known)
    return [{key: value for key, value in table.items() if key in each} for each in keys]


def options_from(cls: type | None, table: Mapping[str, Any], *, where: str | Callable[[str], str]) -> object | None:
    """Make a plugin's options from a table, as strictly as the recipe's own keys.

    Args:
        cls: the frozen dataclass that the entry names; None: it takes no options.
        table: key -> value as TOML gives it.
        where: what errors begin with, or a function that gives it for a key.

    Raises:
        RecipeError: unknown keys, wrong types, a missing key without a default, or what the class itself refuses.
        PluginError: the class has a field that a recipe can't hold.
    """
    at = where if callable(where) else lambda key: where
    hints = {} if cls is None else _hints(cls)
    problems = []
    values = {}
    for key, value in table.items():
        if key not in hints:
            problems.append(f"{at(key)}: {unknown('option', key, hints)}")
            continue
        try:
            values[key] = _convert(hints[key], value)
        except _Mismatch:
            problems.append(f"{at(key)}: {_mismatch(key, hints[key], value)}")
        except TypeError as error:
            raise PluginError(f"options class {cls!r}: {key}: {error}") from error
    if cls is None:
        _raise(problems)
        return None
    for item in dataclasses.fields(cls):
        if item.init and item.name not in table and item.default is item.default_factory is dataclasses.MISSING:
            problems.append(f"{at(item.name)}: option {item.name!r} is not set; expected {_expected(hints[item.name])}")
    _raise(problems)
    try:
        return cast(object, cls(**values))
    except Exception as error:
        at_first = at(next(iter(values), ""))
        raise RecipeError(f"{at_first}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _raise(problems: Iterable[str]) -> None:
    if lines := list(dict.fromkeys(problems)):
        raise RecipeError("\n".join(lines))


# ------------------------------------------------------------------------------------------------------ reading


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file; relative paths in it are relative to it.

    Raises:
        RecipeError: one line for everything that is wrong, each with file and line.
    """
    raw = b""
    try:
        raw = Path(path).read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: can't be read as UTF-8 text: {error}{encoding_hint(raw)}") from error
    return parse_recipe(text, name=str(path), base=Path(path).parent)


def parse_recipe(text: str, *, name: str, base: Path) -> Recipe:
    """Read a recipe from TOML text; ``name`` is the file in errors, ``base`` the folder of relative paths.

    Raises:
        RecipeError: one line for everything that is wrong, each with file and line.
    """
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        words, _, at = str(error).removesuffix(")").partition(" (at ")
        place = ":".join(re.findall(r"\d+", at)) or str(len(text.splitlines()))  # "end of document"
        raise RecipeError(f"{name}:{place}: not TOML: {words}") from error
    places = {key: f"{name}:{line}" for key, line in _key_lines(text).items()}
    return _recipe(raw, places, name=name, base=base)


def imported_recipe(found: ImportedRecipe, *, name: str, base: Path) -> Recipe:
    """Give the recipe that a ``RecipeReader`` found; ``name`` is its file, ``base`` the folder of relative paths.

    Raises:
        RecipeError: one line for everything that is wrong, each with file and line.
    """
    return _recipe(found.tables, found.lines, name=name, base=base)


def _recipe(raw: Mapping[str, Any], places: Mapping[str, str], *, name: str, base: Path) -> Recipe:
    """Check tables as ``tomllib`` gives them; ``places``: dotted key (``data.0.map``) -> ``path:line``.

    Raises:
        RecipeError: one line for everything that is wrong, each with file and line.
    """
    problems: list[tuple[str, str]] = []
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def at(key: str) -> str:
        return _place(places, key) or f"{name}:1"

    def problem(key: str, words: str) -> None:
        problems.append((at(key), words))

    def section(title: str, table: object, path: str) -> Any:  # noqa: ANN401
        if not isinstance(table, dict):
            what = "a list" if isinstance(table, list) else "a value"
            problem(f"{path}.0", f"{title} is {what}; write a table, [{title}]")
            return SECTIONS[title]()
        taken = {}
        for key, value in table.items():
            try:
                if value is None:  # which TOML has not, but a reader of other files may give
                    raise RecipeError(_mismatch(f"{title}.{key}", _hint(title, key), value))
                taken[key] = _setting(f"{title}.{key}", value, base)
                for inner in [key, *(f"{key}.{option}" for option in (value if isinstance(value, dict) else ()))]:
                    origins[f"{path}.{inner}"] = at(f"{path}.{inner}")
            except RecipeError as error:
                problem(f"{path}.{key}", str(error))
        return SECTIONS[title](**taken)

    for title, table in raw.items():
        if title not in SECTIONS:
            problem(title, f"{unknown('section', title, SECTIONS)}{_elsewhere(title, '')}")
        elif title != "data":
            values[title] = section(title, table, title)
        elif isinstance(table, (list, tuple)) and _all_tables(table):
            values[title] = tuple(section(title, source, f"{title}.{i}") for i, source in enumerate(table))
        else:
            problem(title, "data is a list of tables; write [[data]]")
    problems.sort(key=lambda problem: [int(n) if n.isdecimal() else 0 for n in problem[0].split(":")[-1:]])
    _raise(f"{where}: {words}" for where, words in problems)
    recipe = Recipe(**values, origins=origins)
    _raise(_conflicts(recipe))
    return recipe


def _hint(title: str, name: str) -> Any:  # noqa: ANN401
    """Give the annotation of a key, or raise ``RecipeError`` with the nearest one."""
    hints = _hints(SECTIONS[title])
    if name not in hints:
        raise RecipeError(f"{unknown(f'[{title}] key', name, hints)}{_elsewhere(name, title)}")
    return hints[name]


def _setting(key: str, value: object, base: Path) -> Any:  # noqa: ANN401
    """Convert the value of ``section.key``, paths relative to ``base``, or raise ``RecipeError`` without a place."""
    hint = _hint(*key.split(".", 1))
    try:
        value = _convert(hint, value)
    except _Mismatch:
        raise RecipeError(_mismatch(key, hint, value)) from None
    if key == "data.map" and isinstance(value, str) and (file := own_file(value)):
        return f"{_absolute(str(file), base)}:{value.rpartition(':')[2]}"
    if key not in _PATHS or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(_absolute(item, base) for item in value)
    return _absolute(cast(str, value), base, hub=key == "model.base")


def _absolute(path: str, base: Path, *, hub: bool = False) -> str:
    """Resolve against ``base``; standard input stays, and what may be a hub name unless such a folder is there."""
    if path == "-":
        return path
    home = os.path.expanduser(path)
    folder = os.path.abspath(base)
    if hub and not path.startswith(("~", ".")) and not os.path.isdir(os.path.join(folder, home)):
        return path
    pattern = glob.has_magic(home) and not os.path.exists(os.path.join(folder, home))
    return os.path.normpath(os.path.join(glob.escape(folder) if pattern else folder, home))


def _elsewhere(key: str, title: str) -> str:
    homes = [other for other, cls in SECTIONS.items() if other != title and key in _hints(cls)]
    return f"; {key!r} is a key of {' and '.join(f'[{home}]' for home in homes)}" if homes else ""


def _conflicts(recipe: Recipe) -> list[str]:
    """Give a line for every pair of settings that contradict each other."""
    train, lines = recipe.train, []

    def conflict(key: str, words: str) -> None:
        where = recipe.where(key)
        lines.append(words if where == "default" else f"{where}: {words}")

    if train.packs_per_step % train.micro_packs:
        conflict(
            "train.micro_batch" if "train.micro_batch" in recipe.origins else "train.packs_per_step",
            f"train.packs_per_step={train.packs_per_step} is no multiple of train.micro_batch={train.micro_batch}",
        )
    for pattern, mult in train.lr_mult.items():
        if isinstance(mult, bool) or not isinstance(mult, (int, float)) or not 0 < mult < math.inf:
            conflict("train.lr_mult", f"train.lr_mult: {pattern!r} is {mult!r}, expected a number > 0")
        try:
            re.compile(pattern)
        except re.error as error:
            conflict("train.lr_mult", f"train.lr_mult: {pattern!r} is no regular expression: {error}")
    for number, data in enumerate(recipe.data):
        if data.map and data.fields:
            conflict(f"data.{number}.fields", "data.fields says what data.map would say; set one of them")
    if train.epochs == 0 and train.max_steps is None:
        conflict("train.epochs", "train.epochs=0 has no end; set train.max_steps")
    if recipe.adapter.kind == "none" and recipe.model.quantizer in ("nf4", "int8"):
        conflict(
            "adapter.kind",
            f"adapter.kind='none' trains the base weights, but quantizer {recipe.model.quantizer!r} freezes them; "
            "set model.quantizer='none'",
        )
    if recipe.run.sharding == "full":
        if recipe.model.quantizer == "int8" and recipe.adapter.kind != "none":
            conflict(
                "run.sharding", "run.sharding='full' can't divide int8 weights; set model.quantizer='nf4' or 'none'"
            )
        if recipe.adapter.kind == "none" and recipe.train.optimizer != "adamw":
            conflict("run.sharding", "run.sharding='full' with adapter.kind='none' needs train.optimizer='adamw'")
    return lines


_TOKEN = re.compile(
    r'''"""(?:\\.|[^\\])*?""""{0,2}|"(?:\\.|[^"\\\n])*"|'''
    r"""'''.*?''''{0,2}|'[^'\n]*'|#[^\n]*|(?P<open>[\[{])|(?P<close>[\]}])|(?P<end>\n)|[^"'#\[\]{}\n]+""",
    re.DOTALL,
)


def _key_lines(text: str) -> dict[str, int]:
    r"""Give the line of every key and table, dotted, in text that ``tomllib`` accepts; lists of tables add an index.

    >>> _key_lines("[[data]]\nmap = 'a'\n[data.options]\nx = 1")
    {'data.0': 1, 'data.0.map': 2, 'data.0.options': 3, 'data.0.options.x': 4}
    """
    lines: dict[str, int] = {}
    newest: dict[str, int] = {}  # of a list of tables
    table, at, line = "", 0, 1
    while at < len(text):
        start, depth = at, 0
        while token := _TOKEN.match(text, at):
            at = token.end()
            if token["end"] and not depth:
                break
            depth += bool(token["open"]) - bool(token["close"])
        statement = text[start:at].strip()
        header, node = statement.startswith("["), tomllib.loads(statement)
        path = "" if header else table
        while isinstance(node, dict) and len(node) == 1:
            ((part, node),) = node.items()
            path = f"{path}.{part}" if path else part
            if isinstance(node, list) and header:
                newest[path] = newest.get(path, -1) + 1
            if path in newest:
                path = f"{path}.{newest[path]}"
            if not header:
                lines.setdefault(path, line)
        if header:
            table = path
            lines.setdefault(path, line)
        line += text.count("\n", start, at)
    return lines


# ------------------------------------------------------------------------------------------------------ flags


def apply_overrides(recipe: Recipe, flags: Mapping[str, str], sets: Sequence[str] = ()) -> Recipe:
    """Give the recipe with flags applied, then the ``--set`` arguments in order; both win over the recipe.

    Args:
        recipe: what to start from.
        flags: ``plugin``, ``template``, ``model``, ``data``, ``quantizer``, ``scheduler``, ``out`` or ``seed`` -> the
            text given. Paths are relative to the current folder. ``plugin`` also unsets the reader.
        sets: ``section.key=value``, the value in TOML; a bare word is text, ``a,b`` a list of words where the key wants
            one, nothing at all is the default.
            ``data.KEY`` means every source, ``section.options.NAME`` one option, ``data.fields.NAME`` one field.

    Raises:
        RecipeError: one line for every argument that is wrong, beginning with the argument as typed.
    """
    problems = []
    for flag, given in flags.items():
        try:
            if flag == "data" and len(recipe.data) > 1:
                raise RecipeError(f"the recipe has {len(recipe.data)} [[data]] sources; edit it, or leave --data out")
            recipe = _assign(recipe, _FLAGS[flag], [given, _toml(given)], f"--{flag} {given}")
            if flag == "plugin":
                sources = (dataclasses.replace(source, reader=None, fields={}) for source in recipe.data)
                recipe = dataclasses.replace(recipe, data=tuple(sources))
        except RecipeError as error:
            problems.append(f"--{flag} {given}: {error}")
    for argument in sets:
        key, equals, given = argument.partition("=")
        key = key.strip()
        title, _, name = key.partition(".")
        try:
            if not equals or not name:
                raise RecipeError("expected section.key=value")
            if title not in SECTIONS:
                raise RecipeError(f"{unknown('section', title, SECTIONS)}{_elsewhere(title, '')}")
            tries = [_toml(given), given] if given.strip() else []
            if re.fullmatch(r"[\w.@+-]+(,[\w.@+-]+)*", given):  # names: a list of them needs no brackets
                tries.append(given.split(","))
            recipe = _assign(recipe, key, tries, f"--set {argument}")
        except RecipeError as error:
            problems.append(f"--set {argument}: {error}")
    _raise(problems or _conflicts(recipe))
    return recipe


def _toml(text: str) -> object:
    """Give the value that the text is in TOML, else the text."""
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return read["value"] if len(read) == 1 else text


def _assign(recipe: Recipe, key: str, tries: Sequence[object], origin: str) -> Recipe:
    """Set ``section.key`` or ``section.options.name`` to the first of ``tries`` that fits; none: to the default."""
    title, name, *inner = key.split(".", 2)
    _hint(title, name)
    if inner and name not in ("options", "fields"):
        raise RecipeError(f"{title}.{name} has no keys of its own")

    def changed(section: Any) -> Any:  # noqa: ANN401, one of the section classes
        if inner:
            kept = {k: v for k, v in getattr(section, name).items() if k != inner[0]}
            return dataclasses.replace(section, **{name: {**kept, inner[0]: tries[0]} if tries else kept})
        first: RecipeError | None = None
        for value in tries or [getattr(type(section)(), name)]:
            try:
                return dataclasses.replace(section, **{name: _setting(f"{title}.{name}", value, Path.cwd())})
            except RecipeError as error:
                first = first or error
        raise first or RecipeError(key)

    origins = dict(recipe.origins)
    if title != "data":
        origins[key] = origin
        section = changed(getattr(recipe, title))
        return dataclasses.replace(recipe, **{title: section}, origins=origins)
    origins |= {f"data.{i}.{key.partition('.')[2]}": origin for i in range(len(recipe.data))}
    return dataclasses.replace(recipe, data=tuple(map(changed, recipe.data)), origins=origins)


# ------------------------------------------------------------------------------------------------------ writing


def to_toml(recipe: Recipe) -> str:
    """Write the whole recipe, defaults too, without keys that are None; ``parse_recipe`` gives an equal one back."""
    return toml_dumps(_tables(recipe))


def flat(recipe: Recipe) -> dict[str, str]:
    """Give every key that is set, ``data.0.map`` and the like, with its value as TOML."""
    found: dict[str, str] = {}

    def add(key: str, value: object) -> None:
        if isinstance(value, Mapping):
            for name, item in value.items():
                add(f"{key}.{name}", item)
        else:
            found[key] = _value(value)

    for title, table in _tables(recipe).items():
        add(title, dict(enumerate(table)) if isinstance(table, list) else table)
    return found


def _tables(recipe: Recipe) -> dict[str, Any]:
    """Give all keys that are set, as TOML has them."""

    def keys(section: Any) -> dict[str, Any]:  # noqa: ANN401, one of the section classes
        return {name: value for name, value in vars(section).items() if value is not None and value != {}}

    sections = {title: getattr(recipe, title) for title in SECTIONS}
    return {title: list(map(keys, s)) if isinstance(s, tuple) else keys(s) for title, s in sections.items()}


def toml_dumps(table: Mapping[str, Any]) -> str:
    """Write TOML: values first, then tables and lists of tables under their headers.

    Raises:
        RecipeError: a value that TOML can't hold.
    """
    lines: list[str] = []

    def write(table: Mapping[str, Any], path: tuple[str, ...]) -> None:
        below = {}
        for key, value in table.items():
            if isinstance(value, Mapping) or (isinstance(value, (list, tuple)) and _all_tables(value)):
                below[key] = value
            else:
                lines.append(f"{_bare(key)} = {_value(value)}")
        for key, value in below.items():
            inner = (*path, key)
            header = ".".join(map(_bare, inner))
            for each in [value] if isinstance(value, Mapping) else value:
                lines.extend(["", f"[{header}]" if isinstance(value, Mapping) else f"[[{header}]]"])
                write(each, inner)

    write(table, ())
    return "\n".join(lines).lstrip("\n") + "\n"


def _all_tables(items: Sequence[object]) -> bool:
    return bool(items) and all(isinstance(item, Mapping) for item in items)


def _bare(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: object) -> str:
    """Write one value on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise RecipeError(f"{value!a} is no UTF-8 text")
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML escapes as JSON does, and that
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_bare(key)} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    raise RecipeError(f"{value!r}: TOML can't hold a {type(value).__name__}")


def run_and_step(target: str) -> tuple[str, str | None]:
    """Take ``RUN@500``, ``RUN@best`` or ``RUN/checkpoints/step-00000500`` apart; anything else comes back with None.

    Raises:
        RecipeError: something else than a step behind the ``@`` of a run.

    >>> run_and_step("runs/mine-1@500"), run_and_step("runs/mine-1")
    (('runs/mine-1', '500'), ('runs/mine-1', None))
    """
    run, at, step = target.rpartition("@")
    if at and not Path(target).exists():
        if step.isdecimal() or step in ("best", "latest"):
            return run, step
        if (Path(run).expanduser() / "run.json").is_file():
            raise RecipeError(f"{target}: {step!r} is no step of {run}; expected its number, best or latest")
    path = Path(target)
    if path.parent.name == "checkpoints" and path.name.removeprefix("step-").isdecimal():
        return str(path.parent.parent), path.name.removeprefix("step-")
    return target, None
