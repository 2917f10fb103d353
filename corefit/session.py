"""One training run: the model joins the stations, proves what must hold, trains, and leaves a run folder."""

from __future__ import annotations

import hashlib
import json
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from corefit import __version__, show
from corefit.data.ledger import Ledger
from corefit.data.stream import Estimate, Source, Stream, encode_validation, split_validation
from corefit.engine import attention, checkpoint, evaluate, export, model
from corefit.engine.loop import Every, LoopState, autocast, train
from corefit.engine.loss import CausalLoss
from corefit.engine.optimizer import make_optimizer, make_scaler, optimizer_notice
from corefit.errors import CheckpointError, DataError, LedgerError, RecipeError
from corefit.prepare import Prepared, encoding_threads, make_stream, without_out
from corefit.proofs import Proof, data_proofs, first_records
from corefit.recipe import Train, to_toml
from corefit.report import JsonLines, Progress, answers_table, finite, perplexity, read_lines, summary
from corefit.types import BadRecord, Batch, Conversation, Message, Quantizer, Record, Scheduler, StepReport

Say = Callable[[str], None]
SAMPLED_PROMPTS = 2
"""Questions taken from the validation records, else the first ones, where the recipe has no prompts of its own."""
FEW_STEPS = 50
"""A run with fewer steps is pointed to a smaller ``packs_per_step``."""


class Interrupts:
    """SIGINT and SIGTERM end the run after its step; a second one ends it at once. Off the main thread: nothing."""

    def __init__(self, say: Say) -> None:
        """``say`` is told that the step is being finished."""
        self._say, self._received, self._before = say, 0, {}  # type: ignore[var-annotated]

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = number
        self._say(f"{signal.Signals(number).name}: finishing the step, then saving; once more ends at once")

    @property
    def reason(self) -> str:
        """The signal's name; empty where none came."""
        return signal.Signals(self._received).name if self._received else ""

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, 0 where none came."""
        return 128 + self._received if self._received else 0


@dataclass
class Patience:
    """Ends a run after ``limit`` validations in a row without a new best loss."""

    limit: int | None
    best: float | None = None
    bad: int = 0

    def see(self, loss: float) -> None:
        """Take note of a validation loss, in nats."""
        better = self.best is None or loss < self.best
        self.best, self.bad = (loss, 0) if better else (self.best, self.bad + 1)

    @property
    def reason(self) -> str:
        """``"patience"`` once it is spent."""
        return "patience" if self.limit and self.bad >= self.limit else ""


class Session:
    """What one run holds while it goes."""

    def __init__(
        self,
        plan: Prepared,
        folder: Path,
        base: Path,
        quantizer: Quantizer,
        scheduler: Scheduler,
        interrupts: Interrupts,
        say: Say,
    ) -> None:
        """Load data and model; nothing is written yet, so that a refusal leaves no folder behind."""
        self.plan, self.folder, self.base, self.say, self.interrupts = plan, folder, base, say, interrupts
        self.recipe, self.scheduler = plan.recipe, scheduler
        self.proofs: dict[str, Any] = {}
        self.stream, self.val_batches, self.prompts = self._data()
        self.patience = Patience(self.recipe.val.patience)
        self.state, self.lengths = LoopState(), {"metrics.jsonl": 0, "samples.jsonl": 0}
        self.validated: set[int] = set()
        self.sampled: set[int] = set()
        self._model(quantizer)

    # ------------------------------------------------------------------------------------------------------ the start

    def _proved(self, *proofs: Proof) -> None:
        for proof in proofs:
            self.proofs[proof.name] = proof.facts
            self.say(proof.line)

    def _data(self) -> tuple[Stream, list[Batch], tuple[str, ...]]:
        """Give the stream, the validation batches and the questions for samples; prove and say what the run will be."""
        recipe, plan = self.recipe, self.plan
        held_out: list[tuple[Source, Record | BadRecord]] = []
        hashes, off = frozenset[int](), None
        if plan.val_sources:
            pairs = ((source, record) for source in plan.val_sources for record in source.read())
            held_out += islice(pairs, recipe.val.records)
        else:
            hashes, chosen, off = split_validation(plan.sources, share=recipe.val.share, records=recipe.val.records)
            held_out += chosen
        threads = encoding_threads(recipe)
        stream = make_stream(plan, epochs=recipe.train.epochs, val_hashes=hashes, threads=threads)
        if recipe.pack.arena:
            self.say(f"arena: samples come from {recipe.pack.arena}, nothing is encoded anew")
        for line in stream.notices:
            self.say(line)
        batches, self.val_ledger = encode_validation(
            held_out,
            plan.encoder,
            max_length=recipe.pack.max_length,
            micro_batch=recipe.train.micro_batch,
            overlong=recipe.pack.overlong,
            pad_id=plan.tokenizer.pad_id,
        )
        if off:
            self.say(f"validation: off ({off})")
        elif batches:
            self.say(f"validation: {len(held_out):,} records, {sum(batch.n_samples for batch in batches):,} samples")
        first = first_records(plan.sources)
        for proof in data_proofs(plan, first):
            self._proved(proof)
        for line in forecast(stream.estimate(), recipe.train):
            self.say(line)
        if self.scheduler.decays and not recipe.train.max_steps and not (recipe.train.epochs and stream.total_bytes):
            raise RecipeError(
                f"scheduler {self.scheduler.name!r} must know how long the run is, the size of the data isn't known: "
                "--set train.max_steps=N, or --scheduler constant"
            )
        return stream, batches, recipe.sample.prompts or questions(held_out or first)

    def _model(self, quantizer: Quantizer) -> None:
        """Load the model and its adapter, and prove that packed documents don't see each other."""
        recipe, settings = self.recipe, self.recipe.train
        model.prepare_process(recipe.run.threads)
        self.device = model.choose_device(recipe.run.device)
        stored = model.base_dtype_of(str(self.base))
        self.precision = model.choose_precision(settings.precision, device=self.device, base_dtype=stored)
        self.say(f"device: {self.device}; precision: {self.precision.name} ({self.precision.reason})")
        full = recipe.adapter.kind == "none"
        network: Any = model.load_base(
            str(self.base),
            quantizer=quantizer,
            compute_dtype=str(self.precision.compute_dtype).removeprefix("torch."),
            device=self.device,
            trust_remote_code=recipe.model.trust_remote_code,
            weights_dtype="float32" if full else None,
            say=self.say,
        )
        tokenizer, encoder = self.plan.tokenizer, self.plan.encoder
        special = (*tokenizer.control_tokens, *self.plan.template.control, *encoder.stop)
        ids = {token: id for token in special if (id := tokenizer.token_id(token)) is not None}
        sizes = model.check_vocabulary(network, tokenizer.vocab_size, ids)
        line = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        self._proved(Proof("vocabulary", sizes, f"vocabulary: {line}; all {len(ids)} control tokens are among them"))
        spec = model.AdapterSpec(
            r=recipe.adapter.r,
            alpha=recipe.adapter.alpha,
            dropout=recipe.adapter.dropout,
            targets=tuple(recipe.adapter.targets or ()),
            modules_to_save=tuple(recipe.adapter.modules_to_save or ()),
        )
        self.network = network = model.attach_adapter(network, None if full else spec, seed=settings.seed)
        wanted = settings.gradient_checkpointing
        if wanted is True or (wanted == "auto" and self.device != "cpu"):
            model.enable_gradient_checkpointing(network)
        self.fingerprint = model.model_fingerprint(str(self.base))
        self.counts = counts = model.count_parameters(network)
        self.say(f"model: {counts.total / 1e6:,.1f}M parameters, base weights {quantizer.name}")
        layers = {} if full else model.adapted_layers(network)
        line = f"LoRA r {spec.r} on {sum(layers.values())} layers: {', '.join(f'{n} {t}' for t, n in layers.items())}"
        self._proved(Proof("adapter", {"layers": layers}, f"adapter: {'none, all of it trains' if full else line}"))
        self.parameters = model.check_trainable(network)
        facts = {"tensors": len(self.parameters), "parameters": counts.trainable, "dtype": "float32"}
        line = f"trainable: {counts.trainable / 1e6:,.2f}M numbers in {len(self.parameters):,} tensors, all fp32"
        self._proved(Proof("trainable", facts, line))
        self.context: dict[str, Any] = {"device": self.device, "compute_dtype": self.precision.compute_dtype}
        delta = attention.isolation_canary(
            network,
            vocab_size=sizes["embeddings"],
            device=self.device,
            autocast=lambda: autocast(self.device, self.precision.compute_dtype),
        )
        line = f"isolation: documents of one pack don't see each other (max |delta| {delta:g})"
        self._proved(Proof("isolation", {"max_delta": delta}, line))
        self.loss_fn = CausalLoss(network)
        with autocast(self.device, self.precision.compute_dtype):
            why = self.loss_fn.probe()
        if why:
            self.say(f"loss: from full logits ({why})")
        self.optimizer = make_optimizer(
            settings.optimizer,
            self.parameters,
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
        )
        if notice := optimizer_notice(settings.optimizer, self.device):
            self.say(notice)
        self.scaler = make_scaler(self.device, enabled=self.precision.use_scaler)
        torch.manual_seed(settings.seed)

    # -------------------------------------------------------------------------------------------------------- the run

    def check(self, *, resuming: bool) -> None:
        """Stop before step 1, once the checkpoint to continue from was read: nothing is written."""
        if resuming:
            self._saved()
        self.say("dry run: everything holds, nothing was trained")

    def play(self, *, resuming: bool) -> int:
        """Train to the end, write what the run leaves, and give the exit code."""
        settings, every = self.recipe.train, self.recipe.checkpoint
        saved = self._saved() if resuming else None
        self._open(resuming)
        if saved is None:
            self._validate(0)
            self._sample(0)
        else:
            checkpoint.restore(saved, parameters=self.parameters, optimizer=self.optimizer, scaler=self.scaler)
        try:
            reason = train(
                loss_fn=self.loss_fn,
                steps=self.stream.steps(settings.packs_per_step, settings.micro_batch),
                parameters=self.parameters,
                optimizer=self.optimizer,
                scaler=self.scaler,
                lr_at=lambda progress: settings.lr * self.scheduler.factor(progress, settings.warmup),
                state=self.state,
                clip=settings.clip,
                epochs=settings.epochs,
                max_steps=settings.max_steps,
                on_step=self._report,
                validate=Every(self._validate, steps=self.recipe.val.every_steps or 0),
                sample=Every(self._sample, steps=self.recipe.sample.every_steps or 0),
                checkpoint=Every(self._save, steps=every.every_steps or 0, minutes=every.every_minutes or 0.0),
                should_stop=lambda: self.interrupts.reason or self.patience.reason,
                **self.context,
            )
            if not self.state.step:
                if self.interrupts.reason:
                    self._write_run("interrupted", ended_by=reason, steps=0)
                    return self.interrupts.exit_code
                raise DataError(f"no step was made ({reason}): no record became a sample")
            self._export()
            if not self.interrupts.reason:
                self._validate(self.state.step)
                self._sample(self.state.step)
            return self._finish(reason)
        except BaseException as error:
            self._write_run("failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.progress.close()
            self.metrics.close()
            self.samples.close()

    def _saved(self) -> checkpoint.Checkpoint | None:
        """Give the newest whole checkpoint and put stream and loop where it left them; None: there is none."""
        newest, torn = checkpoint.newest_whole(self.folder / "checkpoints")
        for line in torn:
            self.say(line)
        if newest is None:
            self.say(f"resume: {self.folder} has no whole checkpoint, so the run starts again")
            return None
        saved = checkpoint.load(newest)
        self.state = LoopState.from_dict(saved.state["loop"])
        self.lengths = saved.state["lengths"]
        self.patience.best, self.patience.bad = saved.state["extra"]["patience"]
        self.stream.load_state_dict(saved.state["loop"]["stream"])
        self.say(f"resume: from step {self.state.step} ({newest})")
        return saved

    def _open(self, resuming: bool) -> None:
        """Make the run folder and open the files that grow."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "recipe.toml").write_text(to_toml(without_out(self.recipe)), "utf-8")
        except OSError as error:
            raise RecipeError(f"run.out: {self.folder}: can't be written: {error.strerror}") from error
        self.facts = self._facts()
        self._write_run("running")
        self.metrics = JsonLines(self.folder / "metrics.jsonl", keep=self.lengths["metrics.jsonl"])
        self.samples = JsonLines(self.folder / "samples.jsonl", keep=self.lengths["samples.jsonl"])
        for file in (self.metrics, self.samples):
            if file.missing:
                self.say(f"{file.path}: {file.missing:,} bytes that the checkpoint counts on are gone")
        self.progress = Progress(endless=not self.recipe.train.epochs and not self.recipe.train.max_steps)

    def _report(self, report: StepReport) -> None:
        self.metrics.write(report)
        self.progress.update(report)

    def _validate(self, step: int) -> None:
        """Write and show the validation loss, once a step; nothing where validation is off."""
        if not self.val_batches or step in self.validated:
            return
        self.validated.add(step)
        nats, tokens = evaluate.validation_loss(self.loss_fn, self.val_batches, **self.context)
        self.metrics.write({"step": step, "val_loss": nats, "val_perplexity": perplexity(nats), "val_tokens": tokens})
        self.patience.see(nats)
        self.progress.note(f"step {step}: validation loss {nats:.4f} (perplexity {perplexity(nats):,.2f})")

    def _sample(self, step: int) -> None:
        """Answer the questions of the recipe, greedily, once a step, into ``samples.jsonl``."""
        if step in self.sampled:
            return
        self.sampled.add(step)
        for prompt in self.prompts:
            answer = evaluate.generate(
                self.network,
                self.plan.encoder.prompt((Message("user", prompt),)).tolist(),
                stop_ids=self.plan.encoder.stop_ids,
                max_tokens=self.recipe.sample.max_tokens,
                **self.context,
            )
            text = self.plan.tokenizer.decode(answer.ids)
            self.samples.write({"step": step, "prompt": prompt, "answer": text, "stopped": answer.stopped})

    def _save(self, step: int) -> None:
        """Write a checkpoint; where the disk refuses, say so and go on."""
        try:
            checkpoint.save(
                self.folder / "checkpoints",
                step,
                parameters=self.parameters,
                optimizer=self.optimizer,
                scaler=self.scaler,
                loop=self.state.as_dict(),
                lengths={"metrics.jsonl": self.metrics.sync(), "samples.jsonl": self.samples.sync()},
                extra={"patience": [self.patience.best, self.patience.bad]},
                keep=self.recipe.checkpoint.keep,
            )
        except CheckpointError as error:
            self.progress.note(f"{error}; earlier checkpoints are whole, the run goes on")

    # -------------------------------------------------------------------------------------------------------- the end

    def _finish(self, reason: str) -> int:
        """Write ledger and status, print answers and summary, and give the exit code."""
        self.progress.close()
        ledger = Ledger.from_dict(self.state.as_dict()["stream"]["ledger"])
        ledger.add(self.val_ledger)
        differences = ledger.differences()
        facts = {**ledger.as_dict(), "balanced": not differences, "proofs": self.proofs}
        write_json(self.folder / "ledger.json", facts)
        interrupted = self.interrupts.exit_code
        self._write_run("interrupted" if interrupted else "complete", ended_by=reason, steps=self.state.step)
        rows = before_after(read_lines(self.folder / "samples.jsonl"), self.state.step)
        if rows:
            self.say(answers_table(rows))
        lines = read_lines(self.folder / "metrics.jsonl")
        for line in summary(lines, reason=reason, skipped=self.state.skipped, balanced=not differences):
            self.say(line)
        for line in show.ledger_lines(facts):
            self.say(line)
        self.say(f"run: {self.folder}   talk to it: corefit chat {self.folder}")
        if differences:
            raise LedgerError(f"{self.folder / 'ledger.json'}: {'; '.join(differences)}; the weights are saved")
        return interrupted

    def _export(self) -> None:
        """Write ``adapter/``, or ``model/`` after full fine-tuning."""
        plan = self.plan
        facts = export.Provenance(
            base=str(self.recipe.model.base),
            base_folder=self.base,
            fingerprint=self.fingerprint,
            tokenizer_files=plan.tokenizer.files(),
            template=plan.template.name,
            chat_template=plan.template.chat_template,
            stop=plan.encoder.stop,
            stop_ids=plan.encoder.stop_ids,
            supervise=self.recipe.template.supervise,
            quantizer=self.recipe.model.quantizer,
        )
        if self.recipe.adapter.kind == "none":
            export.export_model(self.network, self.folder / "model", facts)
        else:
            export.export_adapter(self.network, self.folder / "adapter", facts)

    def _facts(self) -> dict[str, Any]:
        """Give what ``run.json`` holds for the whole run: command line, versions, plugins, fingerprints."""
        plan = self.plan
        used = {
            "reader": [s.reader.name for s in plan.sources],
            "map function": [s.map_function.name for s in plan.sources],
            "template": [plan.template.name],
            "quantizer": [self.recipe.model.quantizer],
            "scheduler": [self.scheduler.name],
        }
        providers = {kind: {name: plan.registry.provider(kind, name) for name in names} for kind, names in used.items()}
        return {
            "corefit": __version__,
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "platform": platform.platform(),
            "versions": checkpoint.versions(),
            "plugins": {
                kind: {
                    name: {"plugin": p.name, "distribution": p.distribution, "version": p.version}
                    for name, p in of.items()
                }
                for kind, of in providers.items()
            },
            "model": {
                "base": self.recipe.model.base,
                "fingerprint": self.fingerprint,
                "tokenizer": plan.tokenizer.fingerprint,
                "parameters": self.counts.total,
                "trainable": self.counts.trainable,
            },
            "data": [file_facts(path) for s in (*plan.sources, *plan.val_sources) for path in s.sources.paths],
            "device": self.device,
            "precision": self.precision.name,
        }

    def _write_run(self, status: str, **more: object) -> None:
        write_json(self.folder / "run.json", {**self.facts, "status": status, **more})


# ------------------------------------------------------------------------------------------------------------- words


def forecast(estimate: Estimate, settings: Train) -> list[str]:
    """Say how long the run will be, and what gives it more steps where they are few."""
    about = "" if estimate.exact else "about "
    line = f"{about}{estimate.records:,} records -> {estimate.packs:,} packs"
    steps = estimate.steps(settings.packs_per_step)
    if steps is None and not settings.max_steps:
        return [f"{line} an epoch; no limit"]
    if steps is None or estimate.total_packs is None or (settings.max_steps and settings.max_steps <= steps):
        return [f"{line} an epoch -> {settings.max_steps:,} steps (train.max_steps)"]
    line += f" -> {steps:,} steps in {settings.epochs} epochs"
    fewer = max(estimate.total_packs // (2 * FEW_STEPS), 1) * settings.micro_batch
    if steps < FEW_STEPS and fewer < settings.packs_per_step:
        line += f": few; --set train.packs_per_step={fewer} gives {estimate.steps(fewer):,}"
    return [line + ("" if estimate.exact else " (estimated from the first records and the size of the files)")]


def questions(records: Sequence[tuple[Source, Record | BadRecord]]) -> tuple[str, ...]:
    """Give the first user messages of the first of these records, for sample generations."""
    found: list[str] = []
    for source, record in records:
        if len(found) < SAMPLED_PROMPTS and isinstance(record, Record):
            for item in islice(source.map_function.map(record, source.map_options), 1):
                if isinstance(item, Conversation) and item.messages[0].role == "user":
                    found.append(item.messages[0].content)
    return tuple(found)


def before_after(lines: Sequence[Mapping[str, Any]], last: int) -> list[tuple[str, str, str]]:
    """Give (question, answer at step 0, answer at the last step) for every question that has both."""
    before = {line["prompt"]: line["answer"] for line in lines if line["step"] == 0}
    after = {line["prompt"]: line["answer"] for line in lines if line["step"] == last and last}
    return [(prompt, before[prompt], after[prompt]) for prompt in before if prompt in after]


# ------------------------------------------------------------------------------------------------------------- files


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: whole, or as it was."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n", "utf-8")
    aside.replace(path)


def file_facts(path: Path) -> dict[str, Any]:
    """Give path, size and a digest of a data file: of its size and its first and last MiB, so 100 GB take no time."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(2**20))
        file.seek(max(size - 2**20, 0))
        digest.update(file.read(2**20))
    return {"path": str(path), "bytes": size, "sha256_of_ends": digest.hexdigest()}
