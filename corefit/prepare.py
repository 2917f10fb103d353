"""From names to stations: a recipe and the installed plugins become sources, an encoder and a stream. No torch here."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from corefit.data.arena import Arena
from corefit.data.encode import Encoder, make_encoder, written
from corefit.data.files import STDIN_NAME, find_files, is_packed, spool
from corefit.data.ledger import Ledger
from corefit.data.source import (
    as_found,
    items_of,
    map_record,
    read_by,
    refused,
)
from corefit.data.stream import Source, Stream, encode_validation
from corefit.data.tokenizer import Tokenizer
from corefit.durable import read_json
from corefit.errors import CorefitError, DataError, ModelError, PluginError, RecipeError, in_words, unknown
from corefit.fields import Fields
from corefit.identity import arena_key
from corefit.recipe import (
    Data,
    Recipe,
    apply_overrides,
    imported_recipe,
    load_recipe,
    option_keys,
    options_from,
    run_and_step,
    shares,
    to_toml,
)
from corefit.registry import Registry
from corefit.templates import PromptTemplate
from corefit.terminal import secrets
from corefit.types import (
    BadRecord,
    Batch,
    DatasetReader,
    Document,
    Drop,
    ImportedRecipe,
    Record,
    Sources,
)
from corefit.zoo import named_recipe

EMBEDDED = Path(__file__).parent / "embedded"
SNIFFED = 32
"""Records looked at when no map function is named."""
ASKED, ANSWERED = ("prompt", "question", "instruction", "query"), ("completion", "answer", "output", "response")
"""Names of fields that most likely hold a question, and an answer."""
FIELDS = "fields"
"""Name of the map function that ``[data.fields]`` describes."""
OTHER_LORA = (
    *("alpha_pattern", "rank_pattern", "lora_bias", "layer_replication"),
    *("trainable_token_indices", "target_parameters"),
)
"""Settings of peft under which an adapter is more than a pair of matrices of one shape and scale for every layer."""
MAX_THREADS = 8
"""That encode records, where the recipe doesn't say how many."""


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs before a model is loaded."""

    recipe: Recipe
    registry: Registry
    tokenizer: Tokenizer
    template: PromptTemplate
    encoder: Encoder
    sources: tuple[Source, ...]
    val_sources: tuple[Source, ...]
    choices: tuple[str, ...]
    """Lines that say what was chosen, and why."""


def resolve(
    recipe: str | None,
    flags: Mapping[str, str],
    sets: Sequence[str],
    registry: Registry,
    *,
    need_model: bool = True,
    need_data: bool = True,
) -> tuple[Recipe, str, list[str]]:
    """Give the recipe with flags applied, the name of its runs, and lines: what trains on what, then notes.

    The flag ``cfg-options`` holds overrides for another program's configuration, quoted as for a shell.

    Raises:
        RecipeError: for a key, a value or a flag; for a model without data, or the reverse.
    """
    found = ImportedRecipe(tables={})
    overrides = shlex.split(flags.get("cfg-options", ""))
    flags = {flag: value for flag, value in flags.items() if flag != "cfg-options"}
    if recipe is None:
        resolved = apply_overrides(Recipe(), flags, sets)
        name = (flags.get("plugin") or "run").rpartition(":")[2]
    else:
        folder, _ = run_and_step(recipe)
        file = Path(folder) / "recipe.toml" if Path(folder).is_dir() else Path(recipe)
        if file.suffix.lower() in (".toml", "") or not file.is_file():
            read = named_recipe(str(file))
        else:
            found, read = read_config(file, overrides, registry)
            overrides = []
        resolved = apply_overrides(read, flags, sets)
        if lost := [words for key, words in found.missing.items() if resolved.where(key) == "default"]:
            raise RecipeError("\n".join(lost))
        named = file.name == "recipe.toml" and (Path(folder).is_dir() or (file.parent / "run.json").is_file())
        name = re.sub(r"-\d+$", "", file.absolute().parent.name) if named else file.stem
    if overrides:
        raise RecipeError(
            f"--cfg-options {overrides[0]}: only another program's configuration has keys of its own; "
            "--set SECTION.KEY=VALUE sets a recipe's"
        )
    text = to_toml(resolved)
    if leaked := [name for name, value in secrets().items() if json.dumps(value, ensure_ascii=False)[1:-1] in text]:
        raise RecipeError(
            f"the value of ${leaked[0]} is part of a flag or of the recipe, which run folders and arenas keep; leave "
            "it in the environment, where a plugin can read it"
        )
    for entry in resolved.data:
        if entry.map is not None:
            registry.map_function(entry.map)  # a typo or a broken plugin first, whatever else is missing
    has_path = any(d.path for d in resolved.data)
    pathless = all(not _reader(d.reader, d.map, registry).needs_path for d in resolved.data)
    if resolved.model.base is None and not has_path and recipe is None and need_model:
        embedded = load_recipe(EMBEDDED / "recipe.toml")
        if pathless:  # its data and questions belong to another format
            data = tuple(dataclasses.replace(d, path=None, map=None) for d in embedded.data)
            sample = dataclasses.replace(embedded.sample, prompts=())
            embedded = dataclasses.replace(embedded, data=data, sample=sample)
        elif flags.get("plugin") not in (None, embedded.data[0].map):
            raise RecipeError(f"--plugin {flags['plugin']} without --data: the embedded data is in the oasst1 format")
        resolved = apply_overrides(embedded, flags, sets)
        what = "its own records" if pathless else Path(str(resolved.data[0].path)).name
        line = f"no --model and no --data: the embedded demonstration, a tiny InternLM-like model on {what}"
        return resolved, f"embedded-{name}" if flags.get("plugin") else "embedded", [line]
    if not has_path and not pathless and need_data:
        raise RecipeError("--model without --data: name a file, a folder or a glob, or - for standard input")
    if resolved.model.base is None and need_model:
        raise RecipeError("--data without --model: name a local model folder or a hub name")
    if resolved.model.base is not None and not Path(resolved.model.base).is_dir() and need_data:
        _check_paths(resolved)
    paths = [
        d.path if isinstance(d.path, str) else ", ".join(d.path or ["records of the reader"]) for d in resolved.data
    ]
    return resolved, name, [f"{resolved.model.base} on {', '.join(paths)}", *found.notes]


def read_config(file: Path, overrides: Sequence[str], registry: Registry) -> tuple[ImportedRecipe, Recipe]:
    """Give what a configuration of another program says, as the plugin for its suffix read it and as a recipe.

    Raises:
        PluginError: no plugin reads it, or the one that should fails at it.
        RecipeError: no such file; it describes what corefit doesn't do, or nothing that can be known.
    """
    if not file.is_file():
        raise RecipeError(f"{file}: no such file")
    reader = registry.recipe_reader(file.suffix)
    try:
        found = reader.read(file, overrides)
        if not isinstance(found, ImportedRecipe):
            raise TypeError(f"gave a {type(found).__name__}, expected an ImportedRecipe")
    except (CorefitError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever it does, a plugin doesn't end the process
        source = registry.provider("recipe reader", reader.name)
        raise PluginError(
            f"{file}: recipe reader {reader.name!r} of plugin {source} failed: {in_words(error)}"
        ) from error
    return found, imported_recipe(found, name=str(file), base=Path.cwd())


def _check_paths(recipe: Recipe) -> None:
    """Refuse data that isn't there, all of it together, before a model is fetched for it."""
    missing = []
    for entry in recipe.data:
        try:
            find_files(entry.path or "-", base=Path.cwd())
        except DataError as error:
            missing.append(str(error))
    if missing:
        raise DataError("\n".join(missing))


def _reader(name: str | None, map_name: str | None, registry: Registry, paths: Sequence[Path] = ()) -> DatasetReader:
    """Give the named reader, else that for the files' suffix, else that of the map function's name, else ``jsonl``.

    Raises:
        RecipeError: files for several readers, or one that several read.
    """
    by_suffix = dict[Path, str]()
    for path in [] if name else paths:
        fits = [reader.name for reader in registry.readers.values() if path.name.lower().endswith(_endings(reader))]
        if len(fits) > 1:
            raise RecipeError(f"{path}: several readers read such files ({', '.join(fits)}); data.reader names one")
        by_suffix[path] = "".join(fits)
    if len(set(by_suffix.values())) > 1:
        first = {reader: path for path, reader in reversed(by_suffix.items())}
        words = " and ".join(sorted(map(str, first.values())))
        raise RecipeError(f"{words} need several readers; write a [[data]] for each, or name files of one kind")
    name = name or next(iter(by_suffix.values()), "")
    return registry.reader(name or (map_name if map_name and map_name in registry.readers else "jsonl"))


def _endings(reader: DatasetReader) -> tuple[str, ...]:
    return tuple(suffix + packed for suffix in reader.suffixes for packed in ("", ".gz"))


def prepare(
    recipe: Recipe, registry: Registry, *, tokenizer: Path, spool_to: Path | None, again: bool = False
) -> Prepared:
    """Resolve names into stations.

    Args:
        recipe: resolved, see ``resolve``.
        registry: the loaded plugins.
        tokenizer: a folder or a ``tokenizer.model`` file.
        spool_to: where standard input and compressed files are unpacked; None: they are refused.
        again: a run goes on: what it unpacked from standard input is read, not standard input.
    """
    recipe = _with_start(recipe)
    tok = Tokenizer.load(tokenizer)
    choices: list[str] = []
    sources: list[Source] = []
    val_sources: list[Source] = []
    val_read: list[object] = []
    head: list[tuple[Source, Record | BadRecord]] = []
    for number in range(len(recipe.data)):
        train, val, lines, first = _sources(number, recipe, registry, spool_to, again)
        sources.append(train)
        head += [(train, record) for record in first]
        entry = recipe.data[number]
        how = [one.sources.paths for one in val], train.reader, train.map_function.name, entry.fields, entry.options
        val_sources += val if how not in val_read else ()  # val.data is every [[data]]'s
        val_read.append(how)
        choices += lines
    name, why = recipe.template.name or "tokenizer", ""
    if recipe.template.name is None:
        why = " (none was named: the chat template that the tokenizer carries)"
        items = [] if tok.chat_template else items_of(head, "all")
        if items and all(isinstance(item, Document) for item, _ in items):
            name, why = "text", " (none was named, and the data is plain text)"
    template = registry.template(name)
    choices.insert(0, f"template: {name}{why}")
    template_options = options_from(template.options, recipe.template.options, where="template.options")
    if recipe.model.add_tokens:
        special = written(recipe.model.add_tokens, template, tok, template_options)
        tok = Tokenizer.load(tokenizer, recipe.model.add_tokens, special)
    encoder = make_encoder(template, tok, template_options=template_options, supervise=recipe.template.supervise)
    return Prepared(
        recipe=dataclasses.replace(
            recipe,
            data=tuple(
                dataclasses.replace(d, map=None if d.fields else s.map_function.name, reader=s.reader.name)
                for d, s in zip(recipe.data, sources, strict=True)
            ),
            template=dataclasses.replace(recipe.template, name=template.name),
        ),
        registry=registry,
        tokenizer=tok,
        template=template,
        encoder=encoder,
        sources=tuple(sources),
        val_sources=tuple(val_sources),
        choices=tuple(choices),
    )


def _with_start(recipe: Recipe) -> Recipe:
    """Give the recipe with the settings of the adapter that training starts from, where there is one.

    Raises:
        RecipeError: one that was set is another. ModelError: no adapter there.
    """
    if recipe.adapter.start is None:
        return recipe
    path = Path(recipe.adapter.start) / "adapter_config.json"
    if not (config := read_json(path)):
        raise ModelError(f"adapter.start: {path}: not there, or broken; a run's adapter lies in RUN/adapter")
    plain = config.get("init_lora_weights", True) in (True, False, "gaussian", "orthogonal")
    r = config.get("r")
    fused = isinstance(r, int) and config.get("rank_pattern") == {"wqkv": 3 * r}  # InternLM 2's q, k and v, of rank r
    odd = [key for key in OTHER_LORA if config.get(key) and not (fused and key in ("rank_pattern", "alpha_pattern"))]
    odd += [] if plain else ["init_lora_weights"]
    added = tuple(read_json(path.with_name("corefit.json")).get("add_tokens") or ())
    odd = [key for key in odd if not (added and key == "trainable_token_indices")]
    if new := [token for token in recipe.model.add_tokens if token not in added]:
        where = recipe.where("model.add_tokens")
        raise RecipeError(f"{where}: model.add_tokens: {new[0]!r} is none of those that {path.parent} has rows for")
    if config.get("peft_type") != "LORA" or not isinstance(config.get("target_modules"), list) or odd:
        what = odd[0] if odd else f"peft_type {config.get('peft_type')!r}"
        raise ModelError(f"adapter.start: {path}: {what}: not a LoRA adapter that corefit can train on")
    own: dict[str, Any] = {
        "kind": "lora",
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dora": config.get("use_dora", False),
        "rslora": config.get("use_rslora", False),
        "targets": tuple(sorted(config.get("target_modules") or ())),
        "modules_to_save": tuple(sorted(config.get("modules_to_save") or ())),
    }
    for key, value in own.items():
        if f"adapter.{key}" in recipe.origins and (asked := getattr(recipe.adapter, key)) != value:
            where = recipe.where(f"adapter.{key}")
            raise RecipeError(f"{where}: adapter.{key} is {asked!r}, the adapter in adapter.start has {value!r}")
    model = dataclasses.replace(recipe.model, add_tokens=tuple(dict.fromkeys((*added, *recipe.model.add_tokens))))
    return dataclasses.replace(recipe, model=model, adapter=dataclasses.replace(recipe.adapter, **own))


def _sources(
    number: int,
    recipe: Recipe,
    registry: Registry,
    spool_to: Path | None,
    again: bool,
) -> tuple[Source, tuple[Source, ...], list[str], list[Record | BadRecord]]:
    """Resolve one ``[[data]]`` table: training and validation sources, lines about what was chosen, first records."""
    entry = recipe.data[number]
    train: tuple[Path, ...] = ()
    val: tuple[Path, ...] = ()
    if entry.path:
        found = find_files(entry.path, base=Path.cwd())
        train, val = tuple(_plain(path, recipe, entry, spool_to, again) for path in found.train), found.val
    limit = entry.max_record_mb * 2**20
    lines: list[str] = []
    reader = _reader(entry.reader, entry.map, registry, train)
    if entry.fields:
        origin = f"data.{number}.fields"
        fields = options_from(Fields, entry.fields, where=lambda key: f"{recipe.where(f'{origin}.{key}')}: data.fields")
        mapper = cast(Fields, fields).map_function(name=FIELDS, summary="data.fields")
    else:
        name = entry.map
        if name is None:
            name, lines = _sniff(Sources(train, limit), reader, registry, entry)
            lines.append(f"format: {name} (none was named: recognised from the first records)")
            reader = _reader(entry.reader, name, registry, train)
        mapper = registry.map_function(name)
    if reader.needs_path and not train:
        raise RecipeError(f"reader {reader.name!r} needs data.path; --data names it")
    classes, named = (reader.options, mapper.options), "data.options"
    reader_options, map_options = (
        options_from(cls, share, where=named)
        for cls, share in zip(classes, shares(entry.options, classes, where=named), strict=True)
    )
    declared = None if mapper.fields is None else tuple(mapper.fields)
    ordered = Source(
        reader=reader,
        reader_options=reader_options,
        map_function=mapper,
        map_options=map_options,
        sources=as_found(Sources(train, limit, declared)),
        shuffle=False,
        ratio=entry.ratio,
        repeat=entry.repeat,
        first=entry.first,
        on_bad=entry.on_bad,
    )
    where = ", ".join(map(str, train)) if len(train) <= 3 else f"{len(train)} files"
    lines.append(f"data: {where or 'made by the reader'}; map function {mapper.name}, reader {reader.name}")
    whole = dataclasses.replace(ordered, sources=dataclasses.replace(ordered.sources, fields=None))
    first = list(islice(whole.read(), SNIFFED))
    lines += _check_format(whole, first, registry)
    if recipe.val.data is not None:
        found = find_files(recipe.val.data, base=Path.cwd())
        val = (*found.train, *found.val)
        if Path("-") in val:
            raise RecipeError("val.data: standard input is no file, and can be read once only; give a file")
    held_out = dataclasses.replace(ordered, first=None, sources=as_found(Sources(val, limit, declared)))
    if val and (other := _reader(entry.reader, mapper.name, registry, val)) is not reader:
        held_out = dataclasses.replace(
            held_out, reader=other, reader_options=options_from(other.options, {}, where=named)
        )
    return dataclasses.replace(ordered, shuffle=entry.shuffle), (held_out,) if val else (), lines, first


def _plain(path: Path, recipe: Recipe, entry: Data, spool_to: Path | None, again: bool) -> Path:
    """Give a path that can be read twice: standard input, and gzip where it is shuffled, are unpacked first."""
    stdin = path == Path("-")
    often = (entry.shuffle or recipe.train.epochs != 1) and not recipe.pack.arena
    if spool_to is None:
        if stdin:
            raise RecipeError("--data -: standard input can be read once only; give a file")
        return path
    if stdin and again and (spool_to / STDIN_NAME).is_file():
        return spool_to / STDIN_NAME
    return spool(path, spool_to) if stdin or (often and is_packed(path)) else path


def _sniff(sources: Sources, reader: DatasetReader, registry: Registry, entry: Data) -> tuple[str, list[str]]:
    """Give the one map function that recognises the first records, and lines about those that failed at them.

    Raises:
        DataError: none does, or several do; names the keys that are there and the candidates.
    """
    own = {key: value for key, value in entry.options.items() if key in option_keys(reader.options)}
    options = options_from(reader.options, own, where="data.options")
    first = list(islice(read_by(reader, sources, options), SNIFFED))
    for record in first:
        if isinstance(record, BadRecord) and entry.on_bad == "error":
            raise refused(record)
    records = [record for record in first if isinstance(record, Record)]
    if not records:
        where, n = ", ".join(map(str, sources.paths)), len(first)
        none = f"none of the first {n} records can be read; --plugin names their format" if n else "no records in it"
        raise DataError(f"{where}: {none}")
    fits, lines = _recognised(records, registry)
    if len(fits) == 1:
        return fits[0], lines
    if fits:
        raise DataError(f"{records[0].origin}: several formats fit ({', '.join(fits)}); choose one with --plugin")
    known = ", ".join(name for name, m in registry.map_functions.items() if m.sniff is not None)
    raise DataError(
        f"{records[0].origin}: no installed plugin knows this format (keys: {_keys(records)}); they "
        f"recognise: {known}; {_fitting(records, registry)}`corefit plugins` lists all"
    )


def _recognised(records: Sequence[Record], registry: Registry) -> tuple[list[str], list[str]]:
    """Give the map functions that recognise all records, and lines about those that failed at them."""
    fits, lines = list[str](), list[str]()
    for name, function in registry.map_functions.items():
        try:
            fits += [name] if function.sniff is not None and all(map(function.sniff, records)) else []
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also SystemExit: harms nobody who doesn't ask for it
            lines.append(f"map function {name!r} failed at {records[0].origin}: {in_words(error)}")
    return fits, lines


def _fitting(records: Sequence[Record], registry: Registry) -> str:
    """Give words about what could read the first record: what recognises it, else what makes something of it."""
    fits = _recognised(records[:1], registry)[0]
    words = "" if fits else registry.clashes("map function")
    for name, function in () if fits else registry.map_functions.items():
        try:  # one that says what somebody's assistant is fits nobody else; another may never come to an end
            items = () if function.system else islice(function.map(records[0], None), SNIFFED)
            fits += [name] if any(not isinstance(item, Drop) for item in items) else []
        except KeyboardInterrupt:
            raise
        except BaseException:
            continue
    words += f"--plugin {' or '.join(fits)} fits; " if fits else ""
    user, assistant = (next((key for key in keys if key in records[0]), "KEY") for keys in (ASKED, ANSWERED))
    how = f"--set data.fields.user={user} data.fields.assistant={assistant}"
    return f"{words}[data.fields] says which field is what ({how}); "


def _keys(records: Sequence[Record]) -> str:
    return ", ".join(sorted(map(str, records[0]))) or "none"


def _check_format(source: Source, first: Sequence[Record | BadRecord], registry: Registry) -> list[str]:
    """Refuse a map function that makes nothing of the first records, and fields that none of them has.

    Gives a line where the records look like another format than the one that was named.
    """
    mapper, wanted = source.map_function, source.map_function.fields
    records = [record for record in first if isinstance(record, Record)]
    if not records:
        return []
    origin, there = records[0].origin, sorted({key for record in records for key in record})
    for key in (wanted or ()) if mapper.name == FIELDS else ():
        if key not in there:
            raise DataError(f"{origin}: data.fields: {unknown('field', key, there)}")
    fits = _recognised(records, registry)[0]
    if mapper.name in fits:
        return []
    items = [item for record in records for item in map_record(source, record)]
    reasons = [item.reason for item in items if isinstance(item, Drop)]
    if reasons and len(reasons) == len(items):
        reads = f"it reads {', '.join(wanted[:5])}; " if wanted else ""
        raise DataError(
            f"{origin}: map function {mapper.name!r} makes nothing of the first {len(records)} records "
            f"({', '.join(dict.fromkeys(reasons))}); {reads}keys there: {_keys(records)}; "
            f"{_fitting(records, registry)}`corefit plugins` lists all"
        )
    if fits and mapper.sniff is not None:
        return [f"data: the records look like {' or '.join(fits)}, but {mapper.name} was named"]
    return []


def encoding_threads(recipe: Recipe) -> int:
    """Give how many threads encode records; the tokenizer's own threads, which would compete with them, are off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return recipe.run.threads or min(os.cpu_count() or 1, MAX_THREADS)


def make_stream(
    plan: Prepared,
    *,
    epochs: int,
    val_hashes: frozenset[int] = frozenset(),
    shuffle: bool = True,
    threads: int = 0,
    world: int = 1,
    rank: int = 0,
) -> Stream:
    """Join the stations of a plan; with ``pack.arena`` the samples come from there.

    Raises:
        RecipeError: the arena was made from something else, or isn't there. DataError: it is torn.
    """
    pack = plan.recipe.pack
    sources = plan.sources if shuffle else tuple(dataclasses.replace(s, shuffle=False) for s in plan.sources)
    return Stream(
        sources,
        plan.encoder,
        max_length=pack.max_length,
        algorithm=pack.algorithm,
        held=pack.held,
        overlong=pack.overlong,
        seed=plan.recipe.train.seed,
        epochs=epochs,
        val_hashes=val_hashes,
        pad_id=plan.tokenizer.pad_id,
        threads=threads,
        world=world,
        rank=rank,
        arena=Arena(Path(pack.arena), arena_key(plan)) if pack.arena else None,
    )


def make_validation(
    plan: Prepared, records: Sequence[tuple[Source, Record | BadRecord]], *, micro_batch: int, packed: bool = True
) -> tuple[list[Batch], Ledger]:
    """Give the micro-batches of records to validate on, and their ledger; see ``encode_validation``."""
    pack, pad_id = plan.recipe.pack, plan.tokenizer.pad_id
    how: dict[str, Any] = dict(max_length=pack.max_length, overlong=pack.overlong, pad_id=pad_id, packed=packed)
    return encode_validation(records, plan.encoder, micro_batch=micro_batch, **how)
