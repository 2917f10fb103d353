"""The composition root for programs: a recipe in, a run folder out.

The command line and the Python API are thin layers over this module. Names become stations in ``prepare``; the
model joins them in ``session``, which is imported, and torch with it, only when something trains.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from corefit import __version__, show
from corefit.data.arena import Arena
from corefit.data.block import Block, gains
from corefit.errors import RecipeError, UserError
from corefit.prepare import Prepared, arena_key, make_arena, prepare, resolve, tally, walk, without_out
from corefit.recipe import Recipe, load_recipe, to_toml
from corefit.registry import Registry
from corefit.report import read_lines

INSPECTED = 10_000
"""Samples that ``corefit inspect`` looks at for its histogram."""

Say = Callable[[str], None]


# ----------------------------------------------------------------------------------------------------- the run folder


@dataclass(frozen=True)
class Run:
    """A run folder: what ``corefit.train`` gives, and what any program can open again by its path."""

    path: Path
    exit_code: int = 0
    """0 finished; 1 the ledger does not balance; 130 and 143 stopped by a signal, saved."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``: one object a step; validation lines carry ``val_loss``."""
        return read_lines(self.path / "metrics.jsonl")

    @property
    def ledger(self) -> dict[str, Any]:
        """``ledger.json``: records, tokens, slots, messages, and whether they balance."""
        ledger: dict[str, Any] = json.loads((self.path / "ledger.json").read_text("utf-8"))
        return ledger

    @property
    def adapter(self) -> Path | None:
        """The adapter folder; None for full fine-tuning."""
        return folder if (folder := self.path / "adapter").is_dir() else None

    @property
    def model(self) -> Path | None:
        """The model folder of full fine-tuning; None where an adapter was trained."""
        return folder if (folder := self.path / "model").is_dir() else None

    def chat(self, prompt: str, *, max_tokens: int = 512) -> str:
        """Answer one question with the trained model. Loads it on every call; ``corefit.chat.Chatter`` keeps it."""
        from corefit.chat import Chatter

        return Chatter(self.path, max_tokens=max_tokens).ask(prompt)


def _new_folder(recipe: Recipe, name: str, *, resume: bool) -> Path:
    """Give the folder of a new run, which does not exist or is empty yet."""
    if recipe.run.out:
        out = Path(recipe.run.out)
        if not resume and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
            raise RecipeError(
                f"--out {str(out)!r} is there and not empty; --resume continues it, another name starts anew"
            )
        return out
    n = 1
    while (folder := Path("runs") / f"{name}-{n}").exists():
        n += 1
    return folder


def _earlier(recipe: Recipe, name: str, given: str | None) -> Path | None:
    """Give the newest run of exactly this recipe, finished or not; None where there is none.

    Raises:
        RecipeError: the folder that was named holds a run of another recipe.
    """
    if named := recipe.run.out or (given if given and (Path(given).parent / "run.json").is_file() else None):
        folders = [Path(named).parent if Path(named).is_file() else Path(named)]
    else:
        numbered = [p for p in Path("runs").glob(f"{name}-*") if p.name.removeprefix(f"{name}-").isdecimal()]
        folders = sorted(numbered, key=lambda p: int(p.name.removeprefix(f"{name}-")), reverse=True)
    wanted = to_toml(without_out(recipe))
    for folder in folders:
        if (folder / "run.json").is_file():
            if to_toml(without_out(load_recipe(folder / "recipe.toml"))) == wanted:
                return folder
            if named:
                raise RecipeError(f"--resume: {folder / 'recipe.toml'} differs from what this command asks for")
    return None


# --------------------------------------------------------------------------------------------------------- training


def train(
    recipe: str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    data: str | None = None,
    plugin: str | None = None,
    template: str | None = None,
    quantizer: str | None = None,
    scheduler: str | None = None,
    out: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    resume: bool = False,
    sets: Sequence[str] = (),
    say: Say = print,
) -> Run:
    """Train, as ``corefit train`` does, and give the run folder. Never exits the interpreter.

    Args:
        recipe: a .toml file or the name of a recipe that ships; None: defaults, or the embedded demonstration.
        model: folder or hub name; wins over the recipe, as all that follow do.
        data: file, folder or glob.
        plugin: name of a map function.
        template: name of a prompt template.
        quantizer: name of a quantizer.
        scheduler: name of a scheduler.
        out: the run folder.
        seed: of everything that is random.
        resume: continue the newest unfinished run of this recipe, or start it.
        sets: ``"section.key=value"``, as for ``--set``.
        say: where lines about the run go.

    Raises:
        UserError: what the caller can mend. RunError: a failed run.
    """
    given = dict(model=model, data=data, plugin=plugin, template=template, quantizer=quantizer, scheduler=scheduler)
    flags = {name: str(value) for name, value in {**given, "out": out, "seed": seed}.items() if value is not None}
    return train_from(None if recipe is None else str(recipe), flags, sets, resume=resume, say=say)


def train_from(
    recipe_name: str | None,
    flags: Mapping[str, str],
    sets: Sequence[str],
    *,
    resume: bool = False,
    dry_run: bool = False,
    say: Say = print,
) -> Run:
    """Train as recipe and flags say; see ``train``. ``dry_run``: do all that comes before step 1, and leave nothing."""
    if not dry_run:
        return _train(recipe_name, flags, sets, resume, None, say)
    with tempfile.TemporaryDirectory(prefix="corefit-") as aside:
        return _train(recipe_name, flags, sets, resume, Path(aside), say)


def _train(
    recipe_name: str | None, flags: Mapping[str, str], sets: Sequence[str], resume: bool, aside: Path | None, say: Say
) -> Run:
    """Train; with ``aside``, where standard input may be spooled to, stop before step 1."""
    registry = Registry.load()
    recipe, name, lines = resolve(recipe_name, flags, sets, registry)
    quantizer, scheduler = registry.quantizer(recipe.model.quantizer), registry.scheduler(recipe.train.scheduler)
    say(f"corefit {__version__}: {lines[0] if lines else f'{recipe.model.base} on {_data_words(recipe)}'}")
    from corefit.engine.model import resolve_base

    base = resolve_base(str(recipe.model.base), trust_remote_code=recipe.model.trust_remote_code, say=say)
    folder = _new_folder(recipe, name, resume=resume)
    plan = prepare(recipe, registry, tokenizer=base, spool_to=aside or folder / "data")
    found = _earlier(plan.recipe, name, recipe_name) if resume else None
    if found and _status(found) == "complete":
        say(f"{found} is complete: nothing to do")
        return Run(found)
    for line in plan.choices:
        say(line)
    from corefit.session import Interrupts, Session

    if aside:
        dry = Session(plan, found or folder, base, quantizer, scheduler, Interrupts(say), say)
        dry.check(resuming=found is not None)
        return Run(found or folder)
    with Interrupts(say) as interrupts:
        session = Session(plan, found or folder, base, quantizer, scheduler, interrupts, say)
        return Run(found or folder, session.play(resuming=found is not None))


def _data_words(recipe: Recipe) -> str:
    paths = [
        str(d.path if isinstance(d.path, str) else ", ".join(d.path or ["records of the reader"])) for d in recipe.data
    ]
    return ", ".join(paths)


def _status(folder: Path) -> str:
    status: str = json.loads((folder / "run.json").read_text("utf-8")).get("status", "running")
    return status


# -------------------------------------------------------------------------------------------------- inspect and chat


def inspect(
    recipe: str | os.PathLike[str] | None = None,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    model: str | None = None,
    data: str | None = None,
    plugin: str | None = None,
    template: str | None = None,
    seed: int | None = None,
    sets: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield every sample as the model will see it, in data order: origin, messages, input_ids, labels, text.

    Labels are next-token-aligned, -100 where the loss does not count. No model is loaded. Arguments as for ``train``.
    """
    given = dict(model=model, data=data, plugin=plugin, template=template)
    flags = {name: str(value) for name, value in {**given, "seed": seed}.items() if value is not None}
    plan = _plan(None if recipe is None else str(recipe), flags, sets, None if tokenizer is None else str(tokenizer))
    for item, sample in walk(plan):
        yield show.as_json(item, sample, plan.tokenizer.decode(sample.input_ids))


def _plan(recipe_name: str | None, flags: Mapping[str, str], sets: Sequence[str], tokenizer: str | None) -> Prepared:
    """Prepare without a model: a tokenizer is enough."""
    registry = Registry.load()
    recipe, _, _ = resolve(recipe_name, flags, sets, registry, need_model=tokenizer is None)
    base = Path(tokenizer) if tokenizer else Path(str(recipe.model.base))
    if not base.exists():
        from corefit.engine.model import resolve_base

        base = resolve_base(str(base))
    return prepare(recipe, registry, tokenizer=base, spool_to=None)


def inspect_from(
    recipe_name: str | None,
    flags: Mapping[str, str],
    sets: Sequence[str],
    *,
    tokenizer: str | None = None,
    samples: int = 3,
    as_json: bool = False,
) -> None:
    """Print what ``corefit inspect`` shows."""
    plan = _plan(recipe_name, flags, sets, tokenizer)
    if as_json:
        for item, sample in walk(plan):
            print(json.dumps(show.as_json(item, sample, plan.tokenizer.decode(sample.input_ids)), ensure_ascii=False))
        return
    for line in plan.choices:
        print(line)
    chosen, lengths, generator = [], [], random.Random(plan.recipe.train.seed)
    for number, (_, sample) in enumerate(islice(walk(plan), INSPECTED)):
        lengths.append(len(sample.input_ids))
        if number <= samples:  # the first, and then a reservoir of the rest
            chosen.append((number, sample))
        elif samples and (slot := generator.randrange(number)) < samples:
            chosen[slot + 1] = (number, sample)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for number, sample in sorted(chosen, key=lambda pair: pair[0]):
        sizes = f"{len(sample.input_ids):,} tokens, {sample.n_supervised:,} supervised"
        print(f"\n--- sample {number + 1}: {sample.origin}, {sizes}")
        print(show.marked(sample, plan.tokenizer, colour=colour))
    if lengths:
        print(f"\nlengths in tokens ({len(lengths):,} samples{' looked at' if len(lengths) == INSPECTED else ''}):")
        print("\n".join(show.histogram(lengths)))
    fill, ledger = tally(plan, INSPECTED)
    print(f"\nfill: {fill:.1f} % of {plan.recipe.pack.max_length} slots a pack")
    print("ledger:")
    print("\n".join(show.ledger_lines(ledger)))


def pack_from(
    recipe_name: str | None,
    flags: Mapping[str, str],
    sets: Sequence[str],
    *,
    out: str,
    tokenizer: str | None = None,
    say: Say = print,
) -> None:
    """Encode the data of a recipe into the arena ``out``, unless that is there and still good."""
    plan = _plan(recipe_name, flags, sets, tokenizer)
    folder, key = Path(out), arena_key(plan)
    for line in plan.choices:
        say(line)
    try:
        Arena(folder, key).verify()
    except UserError:
        pass
    else:
        say(f"{folder} is there and was made from just this: nothing to do")
        return
    began = time.monotonic()
    block = make_arena(plan, folder, key, watch=_counted)
    seconds = time.monotonic() - began
    dropped = gains(block, len(block.records)).records.dropped
    reasons = "".join(f", {n:,} dropped ({reason})" for reason, n in sorted(dropped.items()))
    size, n = sum(path.stat().st_size for path in folder.iterdir()), len(block.tokens)
    say(f"{len(block.records):,} records -> {len(block.samples):,} samples{reasons}")
    say(f"{n:,} tokens in {seconds:.1f} s ({n / max(seconds, 1e-9):,.0f} a second)")
    say(f"arena: {folder}, {size / 2**20:,.1f} MiB; train from it: --set pack.arena={folder}")


def _counted(blocks: Iterator[Block]) -> Iterator[Block]:
    """Show on standard error how far the encoding is."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(unit=" records", disable=None, leave=False) as bar:
        for block in blocks:
            yield block
            bar.update(len(block.records))


def chat_with(
    target: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    compare: bool = False,
    model: str | None = None,
    quantizer: str | None = None,
    max_tokens: int = 512,
) -> None:
    """Talk to a run, an adapter or a model on the terminal."""
    from corefit.chat import Chatter, chat_loop

    chatter = Chatter(target, model=model, quantizer=quantizer, max_tokens=max_tokens)
    if prompt is None:
        chat_loop(chatter, system=system, compare=compare)
        return
    messages = [{"role": role, "content": text} for role, text in (("system", system), ("user", prompt)) if text]
    for on in (False, True) if compare else (True,):
        if compare:
            print(f"adapter {'on:  ' if on else 'off: '}", end="")
        for piece in chatter.answer(messages, adapter=on):
            print(piece, end="", flush=True)
        print()
