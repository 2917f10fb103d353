"""The command line: one thin verb per function. Only verbs that need torch import it, and only when they run."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from corefit import __version__
from corefit.errors import CorefitError, UserError, system_words, unknown
from corefit.terminal import notice, say, visible, write

USAGE = """corefit <verb> [options]

fine-tune a chat model:
  train [RECIPE]       train; without a recipe, --model and --data it runs the embedded demonstration
  launch -n N ...      train with N processes of this machine, one a GPU; torchrun does the same on several machines
  inspect [RECIPE]     show samples as the model will see them, supervised tokens marked; needs only a tokenizer
  plan [RECIPE]        say what memory and time a run takes, before anything is loaded; alone: what fits this machine
  pack [RECIPE]        encode the data once, ahead of time, into --out DIR; train --set pack.arena=DIR reads it
  chat RUN             talk to a run, an adapter or a model
  eval RUN             loss of base and tuned model on held-out records, multiple choice, exact answers
  merge RUN --out DIR  write base model and adapter as one plain Hugging Face folder
  runs [DIR]           list the runs of a folder: model, data, steps, best loss, state
  report RUN [OTHER]   write report.html of a run again, or a page that compares two runs
  safetensors PATH     read the tensors of pickled weights (.bin, .pt, .pth) without running what is in them

look around:
  recipes [PATTERN]    list the recipes; --all: also names of XTuner that are none, with why (also: list-cfg -p PATTERN)
  copy NAME [DEST]     copy a recipe to edit it (also: copy-cfg)
  templates [NAME]     list the prompt templates, show one on a sample conversation, or --diff A B
  import CONFIG        print an XTuner config (.py) as a recipe; train and inspect also take it as it is
  formats [PATTERN]    list the data formats that --plugin names (also: list-dataset-format)
  plugins              list every plugin: where it comes from, what it contributes, why it is broken
  new-plugin NAME      begin a plugin: a distribution that installs and passes its tests (--kind dataset, template, ...)
  check PLUGIN         try whether a plugin keeps what every plugin promises
  doctor               say what this machine has, what is broken and what will be slow; to paste into an issue
  selftest [MODEL]     measure on this machine that packed = unpacked, resumed = straight, merged = adapter and more

corefit <verb> --help shows the options of a verb; corefit --version the version."""


SETS = "any recipe key; SECTION.KEY= is its default"
CFG_OPTIONS = "keys of another program's configuration, dotted; values derived from them follow"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code: 0; 2 for the user's mistakes; 1 for a failed run; 130 for ctrl-C."""
    for name in ("stdin", "stdout", "stderr"):  # closed: a file opened later would take its number, and hold the words
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(USAGE)
        return 0
    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # C code that crashes, a plugin's or torch's, ends everything without a word
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 20)  # imports leave no garbage: looking for it was 0.9 of 4.2 s
    debug = "--debug" in arguments
    alone = os.environ.get("WORLD_SIZE", "1") in ("", "1") or not os.environ.get("RANK")
    code, rank = 0, "" if alone else f" rank {os.environ['RANK']}:"
    for stream in (sys.stdout, sys.stderr):  # a terminal that can't show a character must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if arguments[0] in ("--version", "-V"):
            from corefit.data import kernel

            say(f"corefit {__version__} ({kernel.NAME} kernel)")
            return 0
        args = _parsed([a for a in arguments if a != "--debug"])
        args.more = ["--debug"] * debug  # for the processes that are started
        code = args.run(args) or 0
        sys.stdout.flush()  # a broken pipe must show here, not at interpreter exit
        return code
    except CorefitError as error:
        if debug:
            notice(traceback.format_exc())
        notice(f"corefit:{rank} error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        notice("corefit: interrupted")
        return 130
    except BrokenPipeError:  # `corefit recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    except (Exception, SystemExit) as error:  # a bug of corefit or of a plugin: one line unless asked for more
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == "argparse":  # --help
            raise
        if debug:
            notice(traceback.format_exc())
        if isinstance(error, PermissionError) and error.filename:
            notice(f"corefit:{rank} error: {error.filename}: {system_words(error)}")
            return 2
        where = f"{frame.f_globals.get('__name__', '?')}:{line}"
        notice(f"corefit:{rank} error: {type(error).__name__}: {error} ({where}); --debug shows the traceback")
        return 1
    finally:
        gc.set_threshold(*before)  # the caller may be a program


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; a verb or flag of a program whose configurations a plugin reads is answered with what to type instead."""
    try:
        return cast(argparse.Namespace, _parser().parse_args(arguments))
    except UserError:
        from corefit.registry import Registry

        verb, flags = arguments[0], [word.partition("=")[0] for word in arguments[1:] if word.startswith("-")]
        typed = [" ".join(arguments[:2]), *(f"{verb} {flag}" for flag in flags), verb]
        habits = {old: new for reader in Registry.load().recipe_readers.values() for old, new in reader.habits.items()}
        for words in typed:
            if words in habits:
                raise UserError(f"corefit {words}: {habits[words]}") from None
        raise


class _Parser(argparse.ArgumentParser):
    """argparse, but an unknown verb or flag is answered with the nearest one, in one line."""

    def error(self, message: str) -> Any:  # noqa: ANN401, never returns
        raise UserError(f"{self.prog}: {message}; {self.prog} --help lists what there is")

    def _check_value(self, action: argparse.Action, value: Any) -> None:  # noqa: ANN401
        if action.choices is not None and value not in action.choices:
            verbs = [c for c in action.choices if c not in _ALIASES]
            raise UserError(unknown("verb" if action.dest == "verb" else str(action.dest), str(value), verbs))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: ANN401
        parsed, rest = self.parse_known_args(args, namespace)
        parsed.words = args[1:]
        if hasattr(parsed, "rest"):
            parsed.rest = rest
        elif rest:
            flag = rest[0].split("=")[0]
            known = [s for s in getattr(parsed, "flags", ()) if s.startswith("--")]
            if key := _recipe_key(flag) if "--set" in known else "":
                raise UserError(
                    f"corefit {parsed.verb}: no flag {flag!r}; it is a key of the recipe: --set {key}=VALUE"
                )
            if flag.startswith("-"):
                raise UserError(f"corefit {parsed.verb}: {unknown('flag', flag, known)}")
            raise UserError(
                f"corefit {parsed.verb}: nothing expects {flag!r}; corefit {parsed.verb} --help lists what there is"
            )
        return parsed


def _recipe_key(flag: str) -> str:
    """Give the recipe's key for a flag of its name, or of another program's; empty: there is none."""
    from corefit.recipe import Recipe, flat

    word = flag.lstrip("-").replace("-", "_") if flag.startswith("--") else ""
    word = {"learning_rate": "lr", "num_train_epochs": "epochs", "max_seq_length": "max_length"}.get(word, word)
    return next((key for key in flat(Recipe()) if key.count(".") == 1 and key.rpartition(".")[2] == word), "")


_ALIASES = ("list-cfg", "copy-cfg", "log-dataset", "check-custom-dataset", "list-dataset-format")


def _parser() -> _Parser:
    parser = _Parser(prog="corefit", usage=USAGE, add_help=False, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", prog="corefit", parser_class=_Parser, required=True)

    def verb(name: str, run: Any, about: str, aliases: Sequence[str] = (), **defaults: Any) -> Any:  # noqa: ANN401
        sub = verbs.add_parser(name, description=about, allow_abbrev=False, aliases=aliases)
        sub.set_defaults(run=run, **defaults)
        return partial(_add, sub)

    train = verb("train", _train, "Train as the recipe and the flags say; flags win over the recipe.")
    _recipe_and_flags(train)
    train("--quantizer NAME", "how base weights are stored: none, nf4, int8 or a plugin's")
    train("--scheduler NAME", "constant, linear, cosine, wsd or a plugin's")
    train("--out,--work-dir DIR", "the run folder (default: runs/<recipe>-<n>)")
    train(
        "--resume RUN[@STEP]",
        "continue the newest run of this recipe, or start it; RUN: that one; with --out in a new folder",
        nargs="?",
        const=True,
        default=False,
    )
    train("--allow-changes", "resume although data, recipe, model or a plugin changed")
    train(
        "--dry-run",
        "load data and model, prove what must hold, say how long the run would be, and stop: nothing is written",
    )

    about = "Train with several processes of this machine, one a GPU: torchrun's short form."
    launch = verb("launch", _launch, about, rest=[])  # all that launch doesn't take, corefit train does
    launch("-n N", "processes; torchrun starts and watches them", required=True)

    about = (
        "Say what memory and time a run takes, term by term, before anything is loaded, and which micro-batch fits. "
        "Without a recipe and a model: what of the zoo fits."
    )
    plan = verb("plan", _plan, about)
    _recipe_and_flags(plan)
    plan("--quantizer NAME", "how base weights are stored: none, nf4, int8 or a plugin's")
    plan("--gpu 24GB|NAME", "a GPU that isn't here: its memory, or a name such as rtx4090")
    plan("--probe", "load all of it here and time three real steps; needs data")

    pack = verb("pack", _pack, "Encode the data once, ahead of time, for runs with pack.arena. No model is loaded.")
    _recipe_and_flags(pack)
    pack("--tokenizer PATH", "a tokenizer folder or a bare tokenizer.model")
    pack("--out DIR", "the folder to write; an older arena is replaced", required=True)

    about = "Show samples as the model will see them. No model is loaded."
    inspect = verb("inspect", _inspect, about, aliases=["log-dataset", "check-custom-dataset"])
    _recipe_and_flags(inspect)
    inspect("--tokenizer PATH", "a tokenizer folder or a bare tokenizer.model")
    inspect("--samples N", "random samples (default 3)", type=_whole(0), default=3)
    inspect("--json", "one JSON object a sample, all of them, in data order")

    chat = verb("chat", _chat, "Talk to a run, an adapter or a model, with the template that training used.")
    chat("target RUN[@STEP]|ADAPTER|MODEL")
    chat("--prompt TEXT", "one answer instead of a conversation")
    chat("--system TEXT|NAME", "a system message, or the map function whose own it is")
    chat("--compare", "answers with the adapter off and on")
    chat("--model PATH", "the base model, where it moved")
    chat("--template NAME", "the prompt template, where an adapter doesn't say (XTuner's)")
    chat("--quantizer NAME", "how to store the base weights (default: as in training)")
    chat("--max-tokens N", "the longest answer (default 512)", type=_whole(1), default=512)
    chat("--device NAME", "auto (default), cpu, cuda, cuda:1", default="auto")
    chat("--temperature X", "0: the most likely token, always (default; 1 with --top-k, --top-p, --seed)", type=float)
    chat("--top-k N", "sample from the N most likely tokens", type=int)
    chat("--top-p P", "sample from the most likely tokens that reach P", type=float)
    chat("--repetition-penalty X", "make what is there already less likely", type=float)
    chat("--seed N", "of the sampling", type=int)
    chat("--trust-remote-code", "run the Python code in the model's folder")

    score = verb("eval", _eval, "Score a run, an adapter or a model on held-out records, with the adapter off and on.")
    score("target RUN[@STEP]|ADAPTER|MODEL")
    score("--data PATH", "records to score on (default: what the run validated on)")
    score("--plugin NAME", "the map function of --data")
    score("--template NAME", "the prompt template (default: as in training)")
    score("--choices FILE", "multiple-choice rows: question, A to D, answer, subject")
    score("--generate N", "answer N records and compare with their own answers", type=_whole(0), default=0)
    score("--records N", "most records of a source (default 1000)", type=_whole(1), default=1000)
    score("--max-tokens N", "the longest answer of --generate (default 256)", type=_whole(1), default=256)
    score("--model PATH", "the base model, where it moved")
    score("--quantizer NAME", "how to store the base weights (default: as in training)")
    score("--out FILE", "write scores and answers, one JSON object a line")
    score("--set SECTION.KEY=VALUE", SETS, dest="sets", action="extend", nargs="+", default=[])

    merge = verb("merge", _merge, "Write base model and adapter as one plain Hugging Face folder.")
    merge("target RUN[@STEP]|ADAPTER")
    merge("--out DIR", "the folder to write; must be new or empty", required=True)
    merge("--model PATH", "the base model, where it moved")
    merge("--template NAME", "the prompt template, where an adapter doesn't say (XTuner's)")
    merge(
        "--base",
        "merge into the base as it is stored (default), or as training's quantizer rounded it",
        choices=["stored", "dequantised"],
        default="stored",
    )

    listed = verb("runs", _runs, "List the runs of a folder, whatever state they are in.")
    listed("folder DIR", "default: runs", nargs="?", default="runs")
    keys = "started (default), run, state, model, data, steps or loss"
    listed("--sort KEY", keys, default="started")
    listed("--json", "one JSON object a run")

    report = verb("report", _report, "Write the page of a run, or one that compares two; it opens without a network.")
    report("target RUN")
    report("other RUN", "the run to compare it with", nargs="?")
    report("--out FILE", "the page (default: report.html, or compare.html, in the first RUN)")

    tensors = verb(
        "safetensors",
        _safetensors,
        "Write pickled weights as safetensors. Nothing in them runs; they stay as they are.",
    )
    tensors("target DIR|FILE", "a model or adapter folder, or a .bin, .pt, .pth or .ckpt")
    tensors("--out DIR", "a new or empty folder (default: beside the pickles)")
    tensors("--config CONFIG", "what an XTuner .pth was trained with: --out is an adapter")

    recipes = verb("recipes", _recipes, "List the recipes.", aliases=["list-cfg"])
    recipes("pattern PATTERN", "part of a name, or a glob", nargs="?")
    recipes("--all", "also XTuner's names that are no recipe here, with why")
    recipes("-p,--pattern PATTERN", argparse.SUPPRESS, dest="p")

    copy = verb("copy", _copy, "Copy a recipe, to edit it.", aliases=["copy-cfg"])
    copy("name NAME")
    copy("dest DEST", "a folder or a file name (default: here)", nargs="?", default=".")

    about = "List the prompt templates; show one on a sample conversation; show where two of them differ first."
    templates = verb("templates", _templates, about)
    templates("pattern NAME|PATTERN", "a template to show, or part of a name", nargs="?")
    templates("--diff A B", "two templates to compare", nargs=2)
    templates("--tokenizer PATH", "show tokens: a tokenizer folder or a tokenizer.model")

    about = "Print another program's configuration as a recipe, and on standard error what was not taken over, and why."
    config = verb("import", _import, about)
    config("config CONFIG", "a file that a plugin reads: XTuner's .py; none of it is run")
    config("--cfg-options KEY=VALUE", CFG_OPTIONS, action="extend", nargs="+", default=[])

    formats = verb("formats", _formats, "List the data formats that --plugin names.", aliases=["list-dataset-format"])
    formats("pattern PATTERN", "part of a name", nargs="?")

    verb("plugins", _plugins, "List every plugin: distribution, version, what it contributes, why it is broken.")

    about = (
        "Say what this machine has, what is broken and what will be slow; exit code 1 if something needed is broken."
    )
    verb("doctor", _doctor, about)("--json", "one JSON object")

    new = verb("new-plugin", _new_plugin, "Write a whole distribution to begin a plugin with: corefit-NAME, here.")
    new("name NAME", "of the plugin: small letters, digits and _")
    kinds = "dataset, template, quantizer, scheduler, reader, recipe-reader or reporter"
    new("--kind KIND", kinds, required=True)
    new("--out DIR", "where the new folder goes (default: here)", default=".")

    about = (
        "Try an installed plugin: ok or failed, with the reason, for everything it promises; exit code 1 if one fails."
    )
    check = verb("check", _check, about)
    check("name PLUGIN", "the name of its entry point, as `corefit plugins` lists it")

    selftest = verb(
        "selftest",
        _selftest,
        "Measure on this machine the equalities that training rests on; exit code 1 if one fails.",
    )
    selftest("model MODEL", "a folder or hub name (default: a tiny model)", nargs="?")
    selftest("--device", "where (default: auto)", choices=["auto", "cpu", "cuda"], default="auto")
    for sub in {id(p): p for p in verbs.choices.values()}.values():
        sub.set_defaults(flags=tuple(s for a in sub._actions for s in a.option_strings))
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number >= {least}")
        return int(text)

    return read


def _add(parser: argparse.ArgumentParser, spec: str, about: str | None = None, **more: Any) -> None:  # noqa: ANN401
    """Add an argument as ``COMMANDS.md`` shows it: ``--name,--alias WHAT``, ``--switch`` or ``position WHAT``."""
    names, *what = spec.split()
    if what:
        more["metavar"] = what[0] if len(what) == 1 else tuple(what)
    elif names.startswith("-") and not more:
        more["action"] = "store_true"
    parser.add_argument(*names.split(","), help=about, **more)


def _recipe_and_flags(add: Callable[..., None]) -> None:
    words = "a .toml file, a name of `corefit recipes`, an XTuner config, a run folder"
    add("recipe RECIPE", words, nargs="?")
    add("--plugin NAME", "the map function, with the reader of the same name if there is one")
    add("--template NAME", "the prompt template (default: the tokenizer's own)")
    add("--model PATH", "the base model: a local folder or a hub name")
    add("--data PATH", "a file, a folder, a glob, or - for standard input")
    add("--on-bad-record WHAT", "error (default): it ends the run; skip: it is counted and left out")
    add("--seed N", "of the order of records, the adapter's first weights and dropout")
    add("--set SECTION.KEY=VALUE", SETS, dest="sets", action="extend", nargs="+", default=[])
    add("--cfg-options KEY=VALUE", CFG_OPTIONS, action="extend", nargs="+", default=[])


def _flags(args: argparse.Namespace, *names: str) -> dict[str, str]:
    names = ("plugin", "template", "model", "data", "on-bad-record", "seed", *names)
    flags = {name: value for name in names if (value := getattr(args, name.replace("-", "_"))) is not None}
    return flags | ({"cfg-options": shlex.join(args.cfg_options)} if args.cfg_options else {})


def _train(args: argparse.Namespace) -> int:
    from corefit.run import train_from

    n = os.environ.get("NPROC_PER_NODE") or "1"  # what XTuner's users set
    if n != "1" and not os.environ.get("WORLD_SIZE"):
        from corefit.launch import launch

        return launch(n, args.words + args.more)
    flags = _flags(args, "quantizer", "scheduler", "out")
    how = dict(resume=args.resume, allow_changes=args.allow_changes, dry_run=args.dry_run, own_process=True)
    return train_from(args.recipe, flags, args.sets, **how).exit_code


def _launch(args: argparse.Namespace) -> int:
    from corefit.launch import launch

    return launch(args.n, args.rest + args.more)


def _inspect(args: argparse.Namespace) -> None:
    from corefit.samples import inspect_from

    how = dict(tokenizer=args.tokenizer, samples=args.samples, as_json=args.json)
    inspect_from(args.recipe, _flags(args), args.sets, **how)


def _plan(args: argparse.Namespace) -> None:
    from corefit.plan import plan_from

    flags = _flags(args, "quantizer")
    if args.probe and args.gpu:
        raise UserError("--probe runs on what is here, and --gpu names a GPU that isn't: leave one of them out")
    plan_from(args.recipe, flags, args.sets, gpu=args.gpu)
    if args.probe:
        from corefit.run import train_from

        train_from(args.recipe, flags, args.sets, dry_run=True, probe=True)


def _pack(args: argparse.Namespace) -> None:
    from corefit.samples import pack_from

    pack_from(args.recipe, _flags(args), args.sets, out=args.out, tokenizer=args.tokenizer)


def _chat(args: argparse.Namespace) -> None:
    from corefit.chat import chat_with

    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    decoding = {name: value for name in names if (value := getattr(args, name)) is not None}
    if {"top_k", "top_p", "seed"} & set(decoding):
        decoding.setdefault("temperature", 1.0)  # who sets these wants to sample
    more = "prompt system compare model template quantizer max_tokens device trust_remote_code".split()
    chat_with(args.target, decoding=decoding, **{name: getattr(args, name) for name in more})


def _eval(args: argparse.Namespace) -> None:
    from corefit.score import evaluate

    flags = {n: v for n in ("data", "plugin", "template", "quantizer") if (v := getattr(args, n)) is not None}
    how = {n: getattr(args, n) for n in ("choices", "generate", "records", "max_tokens", "model", "out")}
    evaluate(args.target, flags, args.sets, **how)


def _merge(args: argparse.Namespace) -> None:
    from corefit.merge import merge

    merged = merge(args.target, args.out, model=args.model, into=args.base, template=args.template)
    say(f"merged model: {merged}")


def _report(args: argparse.Namespace) -> None:
    from corefit.page import report

    say(f"page: {report(args.target, args.other, args.out)}")


def _safetensors(args: argparse.Namespace) -> None:
    from corefit.pickles import convert, to_adapter
    from corefit.prepare import read_config
    from corefit.registry import Registry

    if args.config:
        if not args.out:
            raise UserError("--config makes an adapter folder: --out DIR names it")
        _, recipe = read_config(Path(args.config), [], Registry.load())
        sizes = {key: getattr(recipe.adapter, key) for key in ("r", "alpha", "dropout")}
        folder = to_adapter(args.target, args.out, **sizes, base=recipe.model.base, template=recipe.template.name)
        say(f"adapter: {folder}   train on: --set adapter.start={folder}   talk to it: corefit chat {folder}")
        return
    say(f"safetensors: {convert(args.target, args.out)}")


def _recipes(args: argparse.Namespace) -> None:
    from corefit import zoo

    pattern = args.pattern or args.p or ""
    found = zoo.matching(pattern, zoo.names())
    for name in found:
        say(f"{name}  {zoo.summary(name)}")
    rest = zoo.matching(pattern, zoo.excluded())
    if not found and not rest:
        notice(f"no recipe matches {pattern!r}")
    for name in rest if args.all else ():
        say(f"{name}  can't run: {zoo.excluded()[name]}")
    if rest and not args.all:
        notice(f"{len(rest)} more names of XTuner's zoo are no recipes here; --all lists them, each with why")


def _copy(args: argparse.Namespace) -> None:
    from corefit.zoo import copy_recipe

    say(copy_recipe(args.name, args.dest, "_copy" if args.verb == "copy-cfg" else ""))


def _templates(args: argparse.Namespace) -> None:
    from corefit import show
    from corefit.registry import Registry

    registry = Registry.load()
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    names = [name for name in registry.templates if (args.pattern or "") in name]
    if args.diff:
        first, second = map(registry.template, args.diff)
        lines = show.template_difference(first, second, args.tokenizer, colour=colour)
    elif args.pattern in names or not names:
        lines = show.template_sample(registry.template(args.pattern), args.tokenizer, colour=colour)
    else:
        lines = [show.template_summary(registry.template(name)) for name in names]
    write("\n".join(lines))


def _import(args: argparse.Namespace) -> None:
    from corefit.prepare import read_config
    from corefit.recipe import toml_dumps
    from corefit.registry import Registry

    found, _ = read_config(Path(args.config), args.cfg_options, Registry.load())
    write(f"# From {visible(args.config)}; paths are relative to this file\n\n{toml_dumps(found.tables)}", end="")
    for note in found.notes:
        notice(note)
    if found.missing:
        raise UserError("\n".join(found.missing.values()))


def _formats(args: argparse.Namespace) -> None:
    from corefit.registry import Registry

    for name, function in Registry.load().map_functions.items():
        if (args.pattern or "") in name:
            say(f"{name}  {function.summary}")


def _plugins(args: argparse.Namespace) -> None:
    from corefit.data import kernel
    from corefit.registry import Registry

    say(f"kernel: {kernel.NAME}")
    registry = Registry.load()
    for plugin in registry.plugins:
        say(f"{plugin.name}  ({plugin.source}; {plugin.module})")
        for kind, names in plugin.entries.items():
            if names:
                say(f"    {kind}: {', '.join(names)}")
        for trouble in (plugin.error, *plugin.clashes):
            if trouble:
                say(f"    BROKEN: {trouble}")
    for name in registry.disabled:
        say(f"{name}  (disabled by COREFIT_DISABLE_PLUGINS)")


def _new_plugin(args: argparse.Namespace) -> None:
    from corefit.scaffold import new_plugin

    folder = new_plugin(args.name, args.kind, args.out)
    say(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    say(
        f"next: pip install -e '{folder}[test]'   corefit check {args.name}   "
        f"then edit {folder / f'corefit_{args.name}.py'}"
    )


def _check(args: argparse.Namespace) -> int:
    from corefit.testing import check

    return check(args.name, say)


def _doctor(args: argparse.Namespace) -> int:
    from corefit.doctor import doctor

    return doctor(as_json=args.json)


def _runs(args: argparse.Namespace) -> None:
    from corefit.runs import runs

    runs(args.folder, sort=args.sort, as_json=args.json)


def _selftest(args: argparse.Namespace) -> int:
    from corefit.selftest import selftest

    return selftest(args.model, device=args.device)
