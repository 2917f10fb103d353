"""The composition root for programs: a recipe in, a run folder out.

The command line and the Python API are thin layers over this module. Names become stations in ``prepare``; the
model joins them in ``session``, which is imported, and torch with it, only when something trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit import __version__, terminal
from corefit.durable import check_place, make_folder, read_json, write_whole
from corefit.errors import RecipeError, RunError, system_words
from corefit.identity import LIMITS, differences, identity, strange_changes, without_out, words
from corefit.interrupts import Interrupts
from corefit.prepare import Prepared, prepare, resolve
from corefit.recipe import Recipe, flat, load_recipe, parse_recipe, run_and_step, to_toml
from corefit.registry import Registry
from corefit.report import objects
from corefit.reporters import Reporters
from corefit.terminal import Say

if TYPE_CHECKING:
    from corefit.engine.ranks import Ranks

ENDS = ("train.epochs", "train.max_steps", "val.patience")
"""Those with which a finished run goes on."""
FORKING = ".tmp-fork.json"
"""The ``run.json`` of a folder into which a run is being copied."""


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
        return list(objects(self.path / "metrics.jsonl"))

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


def _new_folder(recipe: Recipe, name: str, *, fork: bool) -> Path:
    """Give the folder of a new run, which does not exist or is empty yet; ``fork``: or a fork was killed in it."""
    if recipe.run.out:
        out = Path(recipe.run.out)
        try:
            full = out.is_file() or (out.is_dir() and any(out.iterdir()))
        except OSError as error:  # a name that is too long, a folder that is shut
            raise RecipeError(f"run.out: {out}: can't be written: {system_words(error)}") from error
        if full and not (fork and (out / FORKING).is_file()):
            raise RecipeError(
                f"--out {str(out)!r} is there and not empty; --resume continues it, another name starts anew"
            )
        return out
    n = 1
    while (folder := Path("runs") / f"{name}-{n}").exists():
        n += 1
    return folder


def _earlier(recipe: Recipe, name: str, say: Say) -> Path | None:
    """Give the newest run of this recipe, finished or not, where only its limits may differ; None: there is none."""
    numbered = [p for p in Path("runs").glob(f"{glob.escape(name)}-*") if p.name.removeprefix(f"{name}-").isdecimal()]
    wanted, nearest = flat(without_out(recipe)), ""
    for folder in sorted(numbered, key=lambda p: int(p.name.removeprefix(f"{name}-")), reverse=True):
        if (folder / "run.json").is_file() and (folder / "recipe.toml").is_file():
            old = flat(load_recipe(folder / "recipe.toml"))
            if all(LIMITS.match(key) for key, *_ in differences(old, wanted)):
                return folder
            nearest = nearest or f"; {folder} is another: {words(differences(old, wanted))}"
    say(f"resume: no earlier run of this recipe, so a new one starts{nearest}")
    return None


def _fork(source: Path, which: str | None, folder: Path) -> None:
    """Begin a run folder with one checkpoint of another run, and the metrics and samples up to it.

    Raises:
        ModelError: there is no such checkpoint. CheckpointError: it is torn. RecipeError: the folder can't be written.
    """
    from corefit.engine import checkpoint

    path = (
        checkpoint.find(source / "checkpoints", which) if which else checkpoint.newest_whole(source / "checkpoints")[0]
    )
    if path is None:
        raise RecipeError(f"--resume {source}: it has no whole checkpoint to go on from")
    lengths = checkpoint.load(path).state["lengths"]
    facts = {**read_json(source / "run.json"), "status": "interrupted"}  # whatever that run has come to since
    try:
        make_folder(folder)
        write_whole(folder / FORKING, json.dumps(facts, indent=2, ensure_ascii=False).encode())
        for name in ("checkpoints", "data"):  # of an earlier try, which may have been of another step
            shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(path, folder / "checkpoints" / path.name)
        if (source / "data").is_dir():
            shutil.copytree(source / "data", folder / "data")
        for name, length in lengths.items():
            write_whole(folder / name, (source / name).read_bytes()[:length])
        write_whole(folder / "recipe.toml", (source / "recipe.toml").read_bytes())
        os.replace(folder / FORKING, folder / "run.json")  # last: with it the folder is a run
    except OSError as error:
        raise RecipeError(f"--out {folder}: can't be written: {system_words(error)}") from error


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
    resume: bool | str | os.PathLike[str] = False,
    allow_changes: bool = False,
    sets: Sequence[str] = (),
    say: Say = terminal.say,
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
        resume: continue the newest run of this recipe, or start it; or the run to go on from: a path, ``"RUN@500"``.
        allow_changes: go on although recipe, data, template, tokenizer, base or a plugin is not what it was.
        sets: ``"section.key=value"``, as for ``--set``.
        say: where lines about the run go.

    Raises:
        UserError: what the caller can mend. RunError: a failed run.
    """
    given = dict(model=model, data=data, plugin=plugin, template=template, quantizer=quantizer, scheduler=scheduler)
    flags = {name: str(value) for name, value in {**given, "out": out, "seed": seed}.items() if value is not None}
    resume = resume if isinstance(resume, bool) else os.fspath(resume)  # `Run.path`, too
    name = None if recipe is None else str(recipe)
    gc.collect()  # a model lies in cycles, and the next one needs its memory: that of a run that failed
    try:
        return train_from(name, flags, sets, resume=resume, allow_changes=allow_changes, say=say)
    finally:
        gc.collect()


def train_from(
    recipe_name: str | None,
    flags: Mapping[str, str],
    sets: Sequence[str],
    *,
    resume: bool | str = False,
    allow_changes: bool = False,
    dry_run: bool = False,
    probe: bool = False,
    own_process: bool = False,
    say: Say = terminal.say,
) -> Run:
    """Train as recipe and flags say; see ``train``.

    ``dry_run``: do all that comes before step 1, and leave nothing; with ``probe``, three steps more, to time them.
    ``own_process``: a second ctrl-C may end the process at once.
    """
    run = partial(
        _train, recipe_name, flags, sets, allow_changes=allow_changes, own_process=own_process, say=_unfailing(say)
    )
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="corefit-") as aside:
            return run(resume, aside=Path(aside), probe=probe)
    resume = resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return run(resume)
    from corefit.engine.ranks import joined

    with joined() as ranks:
        return _follow(ranks, own_process) if ranks.rank else run(resume or ranks.again, ranks=ranks)


def _train(
    recipe_name: str | None,
    flags: Mapping[str, str],
    sets: Sequence[str],
    resume: bool | str,
    *,
    allow_changes: bool,
    own_process: bool,
    say: Say,
    aside: Path | None = None,
    probe: bool = False,
    ranks: Ranks | None = None,
) -> Run:
    """Train; with ``aside``, where standard input may be spooled to, stop before step 1."""
    registry = Registry.load()
    source, which = _named(resume)  # the run that is to go on, where one is named
    if isinstance(resume, str) and source is None:
        if recipe_name is not None or not Path(resume).is_file():
            raise RecipeError(f"--resume {resume}: no run there (no run.json)")
        recipe_name = resume  # `train --resume my.toml`
    if source is None and resume and recipe_name is not None:
        source, which = _named(recipe_name)
    recipe, name, lines = resolve(str(source) if recipe_name is None and source else recipe_name, flags, sets, registry)
    if source is None and resume and recipe.run.out and (Path(recipe.run.out) / "run.json").is_file():
        source = Path(recipe.run.out)
    registry.quantizer(recipe.model.quantizer)  # a typo or a broken plugin first, whatever else is missing
    registry.scheduler(recipe.train.scheduler)
    reporters = Reporters(recipe.run.reporters, recipe.run.options, registry)
    say(f"corefit {__version__}: {lines[0]}")
    for line in lines[1:]:
        say(line)
    from corefit.engine.model import model_fingerprint, resolve_base

    base = resolve_base(str(recipe.model.base), trust_remote_code=recipe.model.trust_remote_code, say=say)
    out = Path(recipe.run.out) if recipe.run.out else None
    fork = source is not None and out is not None and out.resolve() != source.resolve()
    if fork and out is not None and (out / "run.json").is_file():
        source, which, fork = out, None, False  # this command line was here before
    if source is not None and not fork:
        folder = source
        _only_newest(source, which)
    else:
        folder = out if resume and out and not fork else _new_folder(recipe, name, fork=fork)
    spool_to = aside if aside and source is None else (source or folder) / "data"
    plan = prepare(recipe, registry, tokenizer=base, spool_to=spool_to, again=source is not None)
    if resume and source is None and not recipe.run.out and (source := _earlier(plan.recipe, name, say)):
        if not aside:
            shutil.rmtree(folder, ignore_errors=True)  # what was unpacked for a new run
        folder = source
    plan, tries = _decided(plan, base, source, say)
    facts = identity(plan, model_fingerprint(str(base)))
    changes: list[tuple[str, str, str]] = []
    if source is not None:
        before = read_json(source / "run.json")
        if "identity" not in before and not allow_changes:
            raise RecipeError(
                f"{source / 'run.json'}: broken, so nobody knows what the run was made with; --allow-changes goes on "
                "all the same"
            )
        changes = differences(before.get("identity", facts), facts)
        strange = strange_changes(changes)
        if strange and not allow_changes:
            raise RecipeError(
                f"--resume: {source} was made with something else: {words(strange)}; --allow-changes goes on all the "
                "same, a new --out without --resume starts anew"
            )
        if before.get("status") == "complete" and not fork and not any(key in ENDS for key, *_ in changes):
            say(f"{source} is complete: nothing to do")
            if ranks:
                ranks.tell()
            return Run(source)
        if fork and not aside:
            _fork(source, which, folder)
    for line in plan.choices:
        say(line)
    if changes:
        say(f"resume: changed since: {words(changes)}")
    if not aside:
        check_place(folder)
    from corefit.session import Session

    how: dict[str, Any] = dict(try_micro_batch=tries, allow_changes=allow_changes)
    if aside:
        dry = Session(plan, folder, base, reporters, Interrupts(say), say, **how)
        dry.check(None if source is None or fork else changes, probe=probe)
        return Run(folder)
    if ranks:
        told = dict(recipe=to_toml(plan.recipe), folder=str(folder.absolute()), resuming=source is not None, how=how)
        ranks.tell(json.dumps({**told, "facts": facts, "changes": changes}))
    with Interrupts(say, own_process=own_process) as interrupts:
        session = Session(plan, folder, base, reporters, interrupts, say, ranks, **how)
        facts["train.micro_batch"] = str(session.recipe.train.micro_batch)
        return Run(folder, session.play(identity=facts, resuming=source is not None, changes=changes))


def _decided(plan: Prepared, base: Path, source: Path | None, say: Say) -> tuple[Prepared, bool]:
    """Give the plan with a number where ``train.micro_batch`` is ``auto``, and whether it has yet to be tried.

    A run that goes on keeps its own. Any number gives the same sums; only dropout draws other numbers for it.
    """
    train = plan.recipe.train
    if train.micro_batch != "auto":
        return plan, False
    kept = load_recipe(source / "recipe.toml").train.micro_batch if source else "auto"
    world, local = (int(os.environ.get(name) or "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if tries := kept == "auto" or bool(train.packs_per_step % (kept * world)):
        from corefit.plan import choose_micro_batch

        kept, line = choose_micro_batch(plan.recipe, str(base), world=world, local_world=local)
        say(line)
    recipe = dataclasses.replace(plan.recipe, train=dataclasses.replace(train, micro_batch=kept))
    return dataclasses.replace(plan, recipe=recipe), tries


def _follow(ranks: Ranks, own_process: bool) -> Run:
    """Take part in the run that rank 0 plays; it has read the command line, and says what is to be done.

    Raises:
        RunError: this machine has other data, another model or other plugins under the same names.
    """
    if not (text := ranks.tell()):
        return Run(Path())
    told, registry = json.loads(text), Registry.load()
    recipe, folder = parse_recipe(told["recipe"], name="rank 0's recipe", base=Path()), Path(told["folder"])
    from corefit.engine.model import model_fingerprint, resolve_base
    from corefit.session import Session

    base = resolve_base(str(recipe.model.base), trust_remote_code=recipe.model.trust_remote_code)
    plan = prepare(recipe, registry, tokenizer=base, spool_to=folder / "data", again=True)
    if other := differences(told["facts"], identity(plan, model_fingerprint(str(base)))):
        raise RunError(f"not what rank 0 has: {words(other)}")

    def say(line: str) -> None:
        """Rank 0 tells the world."""

    with Interrupts(say, own_process=own_process) as interrupts:
        nobody = Reporters((), {}, registry)
        session = Session(plan, folder, base, nobody, interrupts, say, ranks, **told["how"])
        return Run(folder, session.follow(resuming=told["resuming"], changes=told["changes"]))


def _named(target: object) -> tuple[Path | None, str | None]:
    """Give run folder and step of ``RUN``, ``RUN@500`` or a path inside; (None, None): no run."""
    if not isinstance(target, str):
        return None, None
    run, which = run_and_step(target)
    folder = Path(run).parent if Path(run).name == "recipe.toml" else Path(run)
    return (folder, which) if (folder / "run.json").is_file() else (None, None)


def _only_newest(run: Path, which: str | None) -> None:
    """Refuse to go on in a run's own folder from anything but its newest whole checkpoint."""
    if which is None:
        return
    from corefit.engine import checkpoint

    wanted, newest = checkpoint.find(run / "checkpoints", which), checkpoint.newest_whole(run / "checkpoints")[0]
    if wanted != newest:
        raise RecipeError(
            f"--resume {run}@{which}: this run has gone on to {newest and newest.name}; --out NEW goes on from there "
            "in a new folder and leaves this one as it is"
        )


def _unfailing(say: Say) -> Say:
    """Let no closed pipe or terminal end a run."""

    def quietly(line: str) -> None:
        with contextlib.suppress(OSError):
            say(line)

    return quietly
