"""What a run and an arena were made with, so that neither goes on with something else unnoticed."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.own import imported_by, own_code, own_file
from corefit.recipe import Recipe, flat

if TYPE_CHECKING:
    from corefit.prepare import Prepared

CODE = ("types.py", "templates.py", "fields.py", "own.py", "defaults.py", "prepare.py", "recipe.py")
"""Files of corefit that samples depend on, beside those in ``data``."""
HASHED_WHOLE = 2**26
"""Bytes of a data file up to which all of it is hashed."""
LIMITS = re.compile(
    r"(train\.(epochs|max_steps|micro_batch|gradient_checkpointing)|val\.(every_steps|patience)|"
    r"checkpoint\..*|sample\..*|run\..*)$"
)
"""Recipe keys that may change where a run goes on: limits, and what changes memory but not what is computed."""
PLACES = re.compile(r"(model\.base|data\.\d+\.path|val\.data|pack\.arena)$")
"""Those that say where something lies; what lies there is compared by its fingerprint."""


def identity(plan: Prepared, base_fingerprint: str) -> dict[str, str]:
    """Give what must not change unnoticed while a run goes on: key -> value in words.

    All recipe keys, what is in the files that they name, and version and code of the plugins.
    """
    recipe = plan.recipe
    found = flat(without_out(recipe))
    for number, source in enumerate(plan.sources):
        if own_file(source.map_function.name):  # may lie elsewhere now; its code is compared
            found[f"data.{number}.map"] = own_code(source.map_function.name)[0]
    found |= {"base model": base_fingerprint[:16], "tokenizer": plan.tokenizer.fingerprint[:16]}
    for word, sources in (("data", plan.sources), ("val", plan.val_sources)):
        for number, source in enumerate(sources):
            for i, path in enumerate(source.sources.paths):
                facts = file_facts(path)
                found[f"file {i} of {word} {number}"] = f"{path.name}, {facts['bytes']:,} bytes, {facts['sha256'][:16]}"
    kinds = ("reader", "map function", "template", "quantizer", "scheduler")
    return found | {key: str(value) for key, value in _plugins(plan, kinds).items()}


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Give (key, old, new) for every key whose value changed."""
    keys = sorted({*old, *new})
    return [(k, old.get(k, "nothing"), new.get(k, "nothing")) for k in keys if old.get(k) != new.get(k)]


def words(changes: Iterable[tuple[str, str, str]]) -> str:
    """Give changes on one line."""
    return "; ".join(f"{key}: {old} -> {new}" for key, old, new in changes)


def strange_changes(changes: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Give those of (key, before, now) with which a run goes on only where that is asked for."""
    return [change for change in changes if not (LIMITS.match(change[0]) or PLACES.match(change[0]))]


def arena_key(plan: Prepared) -> dict[str, Any]:
    """Give everything that the samples of a plan depend on; JSON-able."""
    recipe = plan.recipe
    key: dict[str, Any] = {
        "tokenizer": plan.tokenizer.fingerprint,
        "template": plan.template.name,
        "template.options": dict(recipe.template.options),
        "template.supervise": recipe.template.supervise,
        "code of corefit": _code(Path(__file__).parent, ("data/*.py", *CODE)),
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "jinja2")},
    }
    if plan.template.chat_template is None and "strftime_now" in (plan.tokenizer.chat_template or ""):
        key["day"] = datetime.date.today().isoformat()  # the template writes it into every sample
    for number, (entry, source) in enumerate(zip(recipe.data, plan.sources, strict=True)):
        stats = [(str(path.resolve()), path.stat()) for path in source.sources.paths]
        key[f"data.{number}.path"] = [path for path, _ in stats]
        key |= {f"size and time of {path}": [stat.st_size, stat.st_mtime_ns] for path, stat in stats}
        for name in ("map", "reader", "fields", "first", "on_bad", "max_record_mb", "options"):
            key[f"data.{number}.{name}"] = getattr(entry, name)
    return key | _plugins(plan, ("reader", "map function", "template"))


def used_entries(plan: Prepared) -> dict[str, list[str]]:
    """Give the names of the entries that a run uses, by kind."""
    recipe = plan.recipe
    return {
        "reader": sorted({str(entry.reader) for entry in recipe.data}),
        "map function": sorted({entry.map for entry in recipe.data if entry.map}),
        "template": [plan.template.name],
        "quantizer": [recipe.model.quantizer],
        "scheduler": [recipe.train.scheduler],
        "reporter": list(recipe.run.reporters),
    }


def _plugins(plan: Prepared, kinds: Sequence[str]) -> dict[str, Any]:
    """Give version and code of the plugins that a run uses; corefit's own come with its version."""
    found, used = dict[str, Any](), used_entries(plan)
    for kind, name in [(word, name) for word in kinds for name in used[word]]:
        plugin = plan.registry.provider(kind, name)
        if ":" in name:  # the user's own, wherever it lies
            found[f"code of {kind} {plugin.name}"] = plugin.version
            continue
        found[f"version of {kind} {name}"] = plugin.source
        package = plugin.module.partition(":")[0].partition(".")[0]
        spec = importlib.util.find_spec(package)
        if package == "corefit" or spec is None:
            continue
        file = Path(spec.origin or "")
        places = [(Path(folder), "**/*") for folder in spec.submodule_search_locations or ()]
        places = places or [(file.parent, file.name)]
        files = [path for folder, pattern in places for path in folder.glob(pattern) if path.suffix == ".py"]
        more = imported_by(files, also=_names_of(plugin.distribution) - {"corefit"})
        places += [(path.parent, path.name) for path in more]
        found[f"code of {kind} {name}"] = [_code(folder, (pattern,)) for folder, pattern in places]
    return found


def _names_of(distribution: str) -> set[str]:
    """Give the top-level names of what a distribution installed; those of an editable one are seen elsewhere."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return set()
    return {file.parts[0].removesuffix(".py") for file in files if file.suffix == ".py"}


def file_facts(path: Path) -> dict[str, Any]:
    """Give path, size and SHA-256 of a data file; of a large one only the size and 64 blocks are hashed.

    So 100 GB take no time, and an edit within one that leaves its size as it was may go unseen.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= HASHED_WHOLE:
            return {"path": str(path), "bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        for block in range(64):
            file.seek((size - 2**16) * block // 63)
            digest.update(file.read(2**16))
    return {"path": str(path), "bytes": size, "sha256": digest.hexdigest(), "of": "64 blocks"}


def _code(folder: Path, patterns: Sequence[str]) -> str:
    """Give a hash of files, by name and content; compiled ones are left out."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        if path.is_file() and path.suffix != ".pyc":
            data = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]


def without_out(recipe: Recipe) -> Recipe:
    """Give the recipe without its run folder: what makes two runs the same."""
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, out=None))
