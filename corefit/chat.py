"""Talk to a run, an adapter or a model, with the template and the stop tokens that training used."""

from __future__ import annotations

import atexit
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.errors import ModelError, UserError, system_words
from corefit.interrupts import SIGNALS
from corefit.recipe import run_and_step
from corefit.terminal import Say, answer, notice, say
from corefit.types import Message, Unrenderable

if TYPE_CHECKING:
    from corefit.data.encode import Encoder
    from corefit.data.tokenizer import Tokenizer
    from corefit.engine.checkpoint import Checkpoint
    from corefit.engine.evaluate import Decoding
    from corefit.registry import Registry
    from corefit.templates import PromptTemplate


@dataclass(frozen=True, slots=True)
class Found:
    """What a run, adapter or model folder holds, and the base that belongs to it."""

    folder: Path
    """The adapter or model folder: tokenizer files, chat template and ``corefit.json`` lie here."""
    base: Path
    """The folder with the weights; ``folder`` itself where that is a whole model."""
    name: str
    """The base's name, as other people know it."""
    adapter: Path | None
    facts: Mapping[str, Any]
    """``corefit.json``; empty where other software wrote the folder."""

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies that training used: the base's where an adapter comes without one."""
        return self.folder if self.carries_tokenizer else self.base

    @property
    def carries_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the weights, with the Jinja of training's template."""
        return any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that training used."""
        from corefit.data.tokenizer import Tokenizer

        return Tokenizer.load(self.tokenizer_folder)

    def template(self, tokenizer: Tokenizer, registry: Registry, name: str | None = None) -> PromptTemplate:
        """Give the template that is named, else that of training: by its name, or the Jinja beside the tokenizer.

        Raises:
            ModelError: nothing says how to write a conversation. PluginError: no such template.
        """
        if name:
            return registry.template(name)
        known, jinja = registry.templates.get(str(self.facts.get("template"))), tokenizer.chat_template
        if known and (not self.carries_tokenizer or known.chat_template in (None, jinja)):
            return known
        if self.facts.get("form"):
            raise ModelError(
                f"{self.folder}: trained with template {self.facts['template']!r}, which no installed plugin has "
                "and no Jinja says: install its plugin; --template NAME takes another"
            )
        if not tokenizer.chat_template:
            raise ModelError(
                f"{self.folder}: no chat template: nothing says how to write a conversation; --template NAME does"
            )
        return registry.template("tokenizer")

    def stop_ids(self, tokenizer: Tokenizer, encoder: Encoder | None = None) -> list[int]:
        """Give the ids that end an answer: training's, else those of generation config and tokenizer.

        ``encoder``: of a template that they don't know.
        """
        if self.facts.get("stop_ids") and encoder is None:
            return list(self.facts["stop_ids"])
        path = self.base / "generation_config.json"
        stops = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
        ids = stops if isinstance(stops, list) else [stops, tokenizer.eos_id]
        return sorted({id for id in (*ids, *(encoder.stop_ids if encoder else ())) if id is not None})


def find(target: str | Path, *, model: str | None = None, trust_remote_code: bool = False, say: Say = notice) -> Found:
    """Find adapter and base of a run folder, ``RUN@STEP``, an adapter folder, a model folder or a hub name.

    The base is ``model``, else the one in the run's ``recipe.toml``, else the name that the adapter carries. Where
    ``trust_remote_code`` or the run's recipe says so, a download brings Python files along; nothing here runs them.

    Raises:
        ModelError: nothing there to talk to, or the base isn't found.
    """
    from safetensors import SafetensorError, safe_open

    from corefit.engine import checkpoint
    from corefit.engine.export import EMBEDDED, EMBEDDED_MODEL, public_name
    from corefit.engine.model import model_fingerprint, resolve_base, to_convert

    at, which = run_and_step(str(target))
    path = Path(at).expanduser()
    run = next((folder for folder in (path, path.parent) if (folder / "recipe.toml").is_file()), None)
    recipe: dict[str, Any] = {}
    if run:
        try:
            recipe = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8")).get("model", {})
        except ValueError as error:
            raise ModelError(f"{run / 'recipe.toml'}: broken: {error}") from error
    trust = trust_remote_code or bool(recipe.get("trust_remote_code", False))
    resolve = partial(resolve_base, trust_remote_code=trust, say=say)

    def base_named(name: str) -> Path:
        trained = recipe.get("base")
        if model is not None:
            return resolve(model)
        if trained and run is not None and (run / Path(trained).expanduser()).is_dir():
            return run / Path(trained).expanduser()
        if name == EMBEDDED:
            return EMBEDDED_MODEL
        if name.count("/") == 1 and not name.startswith("."):
            return resolve(name)
        where = f"at {trained} any more" if trained else "here"
        raise ModelError(f"{target}: its base model {name!r} is not {where}; --model PATH says where it is")

    if run == path and which is not None:
        saved = checkpoint.load(checkpoint.find(run / "checkpoints", which))
        base = base_named(saved.state["extra"]["provenance"]["base"])
        return find(_exported(saved, base), model=str(base), trust_remote_code=trust, say=say)
    if run == path:
        path = next((folder for folder in (run / "adapter", run / "model") if folder.is_dir()), path)
        if path == run:
            raise ModelError(
                f"{run}: this run has no adapter/ or model/ yet; corefit train --resume {run} finishes it, "
                f"{run}@latest is its newest checkpoint"
            )
    facts = _read(path / "corefit.json")
    if not (path / "adapter_config.json").is_file():
        folder = resolve(str(path if path.is_dir() else target))
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{target}: neither a run (recipe.toml) nor an adapter (adapter_config.json) nor a model (config.json)"
            )
        return Found(folder, folder, facts.get("base") or public_name(str(folder)), None, facts)

    config = _read(path / "adapter_config.json")
    if not (path / "adapter_model.safetensors").is_file():
        why = "fetch it again"
        if (path / "adapter_model.bin").is_file():
            why = f"its weights are a pickle, which corefit never opens; {to_convert(path)}"
        raise ModelError(f"{target}: no adapter_model.safetensors: {why}")
    if config.get("peft_type") != "LORA" or config.get("megatron_config"):  # peft imports the module that it names
        odd = "megatron_config is set" if config.get("megatron_config") else f"peft_type is {config.get('peft_type')!r}"
        raise ModelError(f"{path / 'adapter_config.json'}: {odd}; corefit opens plain LoRA adapters only")
    try:
        with safe_open(path / "adapter_model.safetensors", framework="pt"):
            pass  # it has seen the header, and the length of the file
    except OSError as error:
        raise ModelError(f"{path / 'adapter_model.safetensors'}: can't be read: {system_words(error)}") from error
    except SafetensorError as error:
        raise ModelError(f"{target}: adapter_model.safetensors isn't whole ({error}); fetch it again") from error
    name = facts.get("base") or config.get("base_model_name_or_path") or ""
    here = model is None and not facts.get("base") and bool(name) and Path(name).expanduser().is_dir()
    base = resolve(name) if here else base_named(name)  # another program's adapter may name a folder
    known = facts.get("base_fingerprint")
    if known and known != model_fingerprint(str(base)):
        say(f"{base}: not the files that this adapter was trained on (another fingerprint): answers may differ")
    return Found(path, base, name or public_name(str(base)), path, facts)


def _exported(saved: Checkpoint, base: Path) -> Path:
    """Make an adapter or model folder of a checkpoint, which goes when the process ends."""
    from corefit.data.tokenizer import Tokenizer
    from corefit.engine.export import Provenance, export
    from corefit.engine.model import stored_tensor

    made, facts = _passing_folder(), saved.state["extra"]["provenance"]
    added = facts.get("add_tokens", ())
    files = Tokenizer.load(base, added, facts.get("special", added)).files()
    provenance = Provenance.from_dict(facts, base_folder=base, tokenizer_files=files)
    tensor_of = lambda name: saved.trainable[name] if name in saved.trainable else stored_tensor(base, name)  # noqa: E731
    return export(made / "at", saved.state["extra"]["layout"], tensor_of, provenance)


def _passing_folder() -> Path:
    """Make a folder that goes when the process ends, by a signal too."""
    made = Path(tempfile.mkdtemp(prefix="corefit-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)

    def end(number: int, _frame: object) -> None:
        shutil.rmtree(made, ignore_errors=True)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    for number in SIGNALS:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)
    return made


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object")
    return content


class Chatter:
    """A loaded model that answers; one conversation at a time."""

    def __init__(
        self,
        target: str | Path,
        *,
        model: str | None = None,
        quantizer: str | None = None,
        device: str = "auto",
        max_tokens: int = 512,
        decoding: Decoding | None = None,
        trust_remote_code: bool = False,
        template: str | None = None,
        say: Say = notice,
    ) -> None:
        """Load ``target``: a run, adapter or model folder, or a hub name.

        Args:
            target: see above.
            model: folder or hub name of the base, where it isn't where training found it.
            quantizer: how to store the base; None: as training stored it, a whole model as it is.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            max_tokens: the longest answer.
            decoding: how tokens are chosen; None: greedily.
            trust_remote_code: run the Python files of the base. The recipe of a run folder, which may be anybody's,
                doesn't decide it.
            template: name of the prompt template; None: training's.
            say: takes notices, one line each.

        Raises:
            ModelError: nothing to talk to, no base, no chat template.
        """
        from corefit.data.encode import make_encoder
        from corefit.engine.adapter import with_adapter
        from corefit.engine.evaluate import GREEDY, Memory
        from corefit.engine.model import base_dtype_of, choose_device, choose_precision, load_base
        from corefit.registry import Registry

        self.found = find(target, model=model, trust_remote_code=trust_remote_code, say=say)
        self.tokenizer = self.found.tokenizer()
        registry = Registry.load()
        self.encoder = make_encoder(self.found.template(self.tokenizer, registry, template), self.tokenizer)
        if template is None and self.found.facts.get("form", "") not in ("", self.encoder.form()):
            say(f"template {self.encoder.template.name!r} writes something else than in training: answers may differ")
        unknown = template or not self.found.carries_tokenizer
        self.stop_ids = frozenset(self.found.stop_ids(self.tokenizer, self.encoder if unknown else None))
        self.max_tokens, self.decoding = max_tokens, decoding or GREEDY
        self._read = {True: Memory(), False: Memory()}  # with the adapter on, and off
        self._said: dict[str, tuple[int, ...]] = {}  # the ids of answers: their text may be encoded otherwise
        self.device = choose_device(device)
        base = str(self.found.base)
        self.precision = choose_precision("auto", device=self.device, base_dtype=base_dtype_of(base))
        self.quantizer = quantizer or (self.found.facts.get("quantizer", "none") if self.found.adapter else "none")
        self.model: Any = load_base(
            base,
            quantizer=registry.quantizer(self.quantizer),
            compute_dtype=str(self.precision.compute_dtype).removeprefix("torch."),
            device=self.device,
            trust_remote_code=trust_remote_code,
            say=say,
        )
        if self.found.adapter is not None:
            self.model = with_adapter(self.model, self.found.adapter).eval()

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Give the ids after which training taught the model to answer; nothing typed becomes a control token.

        Raises:
            UserError: the template can't write these messages.
        """
        try:
            ids = self.encoder.prompt([Message(str(m["role"]), str(m["content"])) for m in messages], self._said)
        except Unrenderable as refusal:
            name = self.encoder.template.name
            if refusal.reason == "lone_surrogate":
                raise UserError("the message is not UTF-8 text") from None
            raise UserError(f"template {name!r} can't write this conversation ({refusal.reason})") from None
        return [int(id) for id in ids]

    def answer(self, messages: Sequence[Mapping[str, Any]], *, adapter: bool = True) -> Iterator[str]:
        """Yield the next answer piece by piece, whole characters only, without the stop token.

        Args:
            messages: ``{"role": ..., "content": ...}``, the last one the user's.
            adapter: False: as the base would answer.

        Raises:
            UserError: the conversation is longer than the model's context.
        """
        from corefit.engine.evaluate import stream

        prompt = self.prompt_ids(messages)
        room = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        if len(prompt) >= room:
            raise UserError(f"the conversation has {len(prompt)} tokens, the model's context {room}")
        off = not adapter and self.found.adapter is not None
        ids: list[int] = []
        shown, at = "", 0
        tokens = stream(
            self.model,
            prompt,
            max_tokens=min(self.max_tokens, room - len(prompt)),
            device=self.device,
            compute_dtype=self.precision.compute_dtype,
            decoding=self.decoding,
            memory=self._read[not off],
        )
        try:
            with self.model.disable_adapter() if off else contextlib.nullcontext():
                for id in tokens:
                    if id in self.stop_ids:
                        break
                    ids.append(id)
                    text = self.tokenizer.decode(ids, skip_special=True)
                    if not text.endswith("\ufffd"):  # else the bytes of a character are not all there yet
                        piece, shown, at = text[len(shown) :], text, len(ids)
                        yield piece
            piece = self.tokenizer.decode(ids, skip_special=True)[len(shown) :]
            shown, at = shown + piece, len(ids)
            yield piece
        finally:  # also where the answer is broken off
            forbidden = self.encoder.forbidden
            if all(id < len(forbidden) and not forbidden[id] for id in ids[:at]):
                self._said[shown] = tuple(ids[:at])

    def ask(self, prompt: str, *, system: str | None = None, adapter: bool = True) -> str:
        """Give the answer to one question; ``system`` None: the system message of training, where it had one."""
        system = self.found.facts.get("system") if system is None else system
        return "".join(self.answer([*_system(system), {"role": "user", "content": prompt}], adapter=adapter)).strip()


def _system(text: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


SIDES = [(False, "adapter off: "), (True, "adapter on:  ")]
"""What is compared: with the adapter or not, and what the answer begins with."""
HELP = """/new, /reset     start afresh
/system          show the system message, and those that have a name
/system WHAT     start afresh with a system message: its name, or its text; - is none
\"\"\"              begins and ends a message of several lines
/exit            end; ctrl-C ends an answer, then the chat
"""


def chat_loop(
    chatter: Chatter,
    *,
    system: str | None = None,
    systems: Mapping[str, str] | None = None,
    compare: bool = False,
    read: Callable[[str], str] = input,
    write: Callable[[str], object] = answer,
) -> None:
    """Talk until ``/exit`` or the end of input; ``HELP`` says what else there is. ``systems``: name -> system message.

    With ``compare`` every question is answered twice, first with the adapter off; the conversation goes on with the
    answer of the adapter.
    """
    history, systems = _system(system), systems or {}
    sides = SIDES if compare else [(True, "")]
    while True:
        line = ""
        try:
            line = read("> ").strip()
            if line.startswith('"""'):
                while len(line) < 6 or not line.endswith('"""'):
                    line += "\n" + read(". ").rstrip()
                line = line[3:-3].strip("\n")
        except (EOFError, KeyboardInterrupt):
            write('\na message that no """ ended is left out\n' if line else "\n")
            return
        word, _, rest = line.partition(" ")
        if line in ("/exit", "/quit"):
            return
        if line in ("/new", "/reset"):
            history = _system(system)
        elif line == "/help":
            write(HELP)
        elif line == "/system":
            named = (f"{name}: {text}" for name, text in sorted(systems.items()))
            write("\n".join([f"system: {system or 'none'}", *named]) + "\n")
        elif word == "/system":
            system = None if (rest := rest.strip()) == "-" else systems.get(rest, rest)
            history = _system(system)
        elif word.startswith("/") and word[1:].isalpha() and not rest:
            write(f"no command {word}\n{HELP}")
        elif line:
            question = {"role": "user", "content": line}
            said = ""
            try:
                for adapter, title in sides:
                    write(title)
                    said = ""
                    for piece in chatter.answer([*history, question], adapter=adapter):
                        write(piece)
                        said += piece
                    write("\n")
            except KeyboardInterrupt:
                write("\n")
                if not adapter:
                    continue
            except UserError as error:
                write(f"{error} (/new starts afresh)\n")
                continue
            history += [question, {"role": "assistant", "content": said}]


def chat_with(
    target: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    compare: bool = False,
    decoding: Mapping[str, Any] | None = None,
    **how: Any,  # noqa: ANN401, those of Chatter
) -> None:
    """Talk to a run, an adapter or a model on the terminal; ``how``: as for ``Chatter``.

    ``system``: a message, or the name of one that a map function puts into its data. ``decoding``: as ``Decoding``.
    """
    from corefit.engine.evaluate import Decoding
    from corefit.registry import Registry

    systems = {name: function.system for name, function in Registry.load().map_functions.items() if function.system}
    chatter = Chatter(target, decoding=Decoding(**decoding or {}), **how)
    system = systems.get(system, system) if system is not None else chatter.found.facts.get("system")
    if prompt is None:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that isn't UTF-8 doesn't take others along
        chat_loop(chatter, system=system, systems=systems, compare=compare)
        return
    messages = [*_system(system), {"role": "user", "content": prompt}]
    for on, title in SIDES if compare else [(True, "")]:
        answer(title)
        for piece in chatter.answer(messages, adapter=on):
            answer(piece)
        say()
