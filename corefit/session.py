"""One training run: the model joins the stations, proves what must hold, trains, and leaves a run folder."""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import random
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corefit import __version__, show
from corefit.data.block import LENGTH, fit
from corefit.data.ledger import Ledger
from corefit.data.source import encode_items, items_of, map_record
from corefit.data.stream import Source, Stream, packs_at_once, split_validation
from corefit.durable import claimed, read_json, sync, write_whole
from corefit.engine import adapter, attention, checkpoint, evaluate, export, memory, model
from corefit.engine.loop import Every, LoopState, autocast, train, try_out
from corefit.engine.loss import CausalLoss, offloaded
from corefit.engine.optimizer import make_optimizer, make_scaler, optimizer_notice
from corefit.engine.ranks import ALONE, Ranks, is_sharded, own, shard, together
from corefit.errors import (
    CheckpointError,
    CorefitError,
    DataError,
    LedgerError,
    ModelError,
    PluginError,
    RecipeError,
    RunError,
    UserError,
    in_words,
    system_words,
)
from corefit.forecast import PROBED, forecast, limits_before, new_curve, probed
from corefit.identity import file_facts, strange_changes, used_entries, without_out
from corefit.interrupts import Interrupts
from corefit.own import own_file
from corefit.plan import gib, read_shape, setting_of
from corefit.prepare import Prepared, encoding_threads, make_stream, make_validation
from corefit.proofs import Proof, data_proofs, first_records
from corefit.recipe import flat, to_toml
from corefit.report import JsonLines, answers_table, finite, objects, perplexity, summary
from corefit.reporters import Reporters
from corefit.terminal import Say, notice, without_secrets
from corefit.types import (
    BadRecord,
    Batch,
    CheckpointReport,
    Conversation,
    EndReport,
    Item,
    Message,
    PacksReport,
    Record,
    SampleReport,
    StartReport,
    StepReport,
    Unrenderable,
    ValidationReport,
)

SAMPLED_PROMPTS = 2
"""Questions taken from the validation records, else the first ones, where the recipe has no prompts of its own."""
ENDS = ("epochs", "max_steps", "patience")
"""Reasons with which a run is over; with any other one it was stopped."""


@dataclass
class Patience:
    """Ends a run after ``limit`` validations in a row without a new best loss."""

    limit: int | None
    best: float | None = None
    bad: int = 0

    def see(self, loss: float) -> bool:
        """Take note of a validation loss, in nats; say whether it is the lowest so far."""
        better = self.best is None or loss < self.best
        self.best, self.bad = (loss, 0) if better else (self.best, self.bad + 1)
        return better

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
        reporters: Reporters,
        interrupts: Interrupts,
        say: Say,
        ranks: Ranks | None = None,
        *,
        try_micro_batch: bool = False,
        allow_changes: bool = False,
    ) -> None:
        """Load data and model; nothing is written yet, so that a refusal leaves no folder behind.

        ``allow_changes``: go on from a checkpoint although what samples are made of is not what it was.
        ``try_micro_batch``: the recipe's was planned; find out whether there is memory for it, else take the next
        smaller divisor.
        """
        self.reporters, self.allow_changes = reporters, allow_changes
        self.plan, self.folder, self.base, self.say, self.interrupts = plan, folder, base, say, interrupts
        self.ranks = ranks or ALONE
        self.recipe, self.scheduler = plan.recipe, plan.registry.scheduler(plan.recipe.train.scheduler)
        for percent in range(1, 100):  # a curve that isn't one is refused before anything is trained
            self._lr_at(percent / 100)
        self.proofs: list[Proof] = []
        self.device = model.choose_device(self.ranks.device(self.recipe.run.device))  # before the data, which take time
        self.stream, self.val_batches, self.prompts = self._data()
        self.patience = Patience(self.recipe.val.patience)
        self.state, self.lengths = LoopState(), {"metrics.jsonl": 0, "samples.jsonl": 0}
        self.scored: float | None = None  # the newest validation loss, in nats
        self.best = 0  # the step after which the validation loss was lowest
        self.validated: set[int] = set()
        self.sampled: set[int] = set()
        self.first_packs: list[dict[str, Any]] = []
        self.ended = False
        self._model()
        if self.device == "cpu" and not model.is_small(self.base, str(self.base)):
            model.reuse_memory()
        if try_micro_batch and not self.ranks.sharded:  # one rank can't try alone what all run together
            packs = int(self.ranks.tell(str(self._tried() if not self.ranks.rank else "")))
            self.recipe = replace(self.recipe, train=replace(self.recipe.train, micro_batch=packs))
            self.plan = replace(plan, recipe=self.recipe)

    # ------------------------------------------------------------------------------------------------------ the start

    def _proved(self, proof: Proof) -> None:
        self.proofs.append(proof)
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
        stream = self._stream(hashes)
        if recipe.pack.arena:
            self.say(f"arena: samples come from {recipe.pack.arena}, nothing is encoded anew")
        while stream.notices:
            self.say(stream.notices.pop(0))
        batches, self.val_ledger = make_validation(plan, held_out, micro_batch=recipe.train.micro_packs)
        asked = {"checkpoint.keep_best": recipe.checkpoint.keep_best, "val.patience": recipe.val.patience}
        unused = [key for key, on in asked.items() if on]
        if plan.val_sources and recipe.val.records and not any(batch.n_supervised for batch in batches):
            raise DataError(
                f"val.data: no sample with a supervised token in {len(held_out):,} records; "
                "corefit inspect --data FILE says why, --set val.records=0 trains without"
            )
        if (off or not batches) and unused:
            self.say(f"{' and '.join(unused)}: nothing to go by, since there is no validation")
        elif recipe.val.patience and not recipe.val.every_steps:
            self.say("val.patience: nothing to go by but the end: val.every_steps says how often to validate")
        if off:
            self.say(f"validation: off ({off})")
        else:
            self.say(f"validation: {len(held_out):,} records, {sum(batch.n_samples for batch in batches):,} samples")
        first = first_records(plan.sources)
        items = items_of(first, plan.encoder.supervise)
        block, drops = encode_items(items, plan.encoder)
        for proof in data_proofs(plan, items, block, drops):
            self._proved(proof)
        self.say(forecast(stream.estimate(), recipe.train))
        if self.scheduler.decays and not recipe.train.max_steps and not (recipe.train.epochs and stream.total_bytes):
            raise RecipeError(
                f"scheduler {self.scheduler.name!r} must know how long the run is, the size of the data isn't known: "
                "--set train.max_steps=N, or --scheduler constant"
            )
        self.system = common_system([item for item, _ in items])
        block = fit(block, recipe.pack.max_length, recipe.pack.overlong)
        self.sample_lengths: list[int] = block.samples[:, LENGTH].tolist()
        return stream, batches, recipe.sample.prompts or questions(held_out or first)

    def _stream(self, val_hashes: frozenset[int]) -> Stream:
        train, ranks = self.recipe.train, self.ranks
        packs_at_once(train.packs_per_step, train.micro_packs, ranks.world)
        return make_stream(
            self.plan,
            epochs=train.epochs,
            val_hashes=val_hashes,
            threads=encoding_threads(self.recipe),
            world=ranks.world,
            rank=ranks.rank,
        )

    def _model(self) -> None:
        """Load the model and its adapter, and prove that packed documents don't see each other."""
        recipe, settings = self.recipe, self.recipe.train
        quantizer = self.plan.registry.quantizer(recipe.model.quantizer)
        model.prepare_process(recipe.run.threads)
        full = recipe.adapter.kind == "none"
        if self.ranks.world > 1:
            self.say(f"ranks: {self.ranks.world}, each with its share of the packs of every step")
            on_gpus = full and self.device != "cpu" and settings.optimizer == "adamw"
            sharding = recipe.run.sharding
            self.ranks = replace(self.ranks, sharded=sharding == "full" or (sharding == "auto" and on_gpus))
        stored = model.base_dtype_of(str(self.base))
        self.precision = model.choose_precision(settings.precision, device=self.device, base_dtype=stored)
        self.say(f"device: {self.device}; precision: {self.precision.name} ({self.precision.reason})")
        if recipe.run.sharding == "full" and self.ranks.world == 1:
            self.say("sharding: off, one process holds the whole model")
        # what a quantizer stores is made on the device, which must hold it once; the rest waits for it in memory
        unsharded = "cpu" if self.ranks.sharded and quantizer.name == "none" else self.device
        network: Any = model.load_base(
            str(self.base),
            quantizer=quantizer,
            compute_dtype=str(self.precision.compute_dtype).removeprefix("torch."),
            device=unsharded,
            trust_remote_code=recipe.model.trust_remote_code,
            weights_dtype="float32" if full else None,
            say=self.say,
        )
        tokenizer, encoder = self.plan.tokenizer, self.plan.encoder
        if tokenizer.new_ids:
            adapter.add_rows(network, tokenizer.vocab_size, tokenizer.new_ids)
        special = (*recipe.model.add_tokens, *tokenizer.control_tokens, *self.plan.template.control, *encoder.stop)
        ids = {token: id for token in special if (id := tokenizer.token_id(token)) is not None}
        sizes = adapter.check_vocabulary(network, tokenizer.vocab_size, ids)
        line = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        named = "control and added tokens" if recipe.model.add_tokens else "control tokens"
        self._proved(Proof("vocabulary", sizes, f"vocabulary: {line}; all {len(ids)} {named} are among them"))
        lora = {key: value for key, value in vars(recipe.adapter).items() if key != "kind"}
        spec = adapter.AdapterSpec(**lora, tokens=tuple(dict.fromkeys(ids[token] for token in recipe.model.add_tokens)))
        self.network = network = adapter.attach_adapter(network, None if full else spec, seed=settings.seed)
        wanted = settings.gradient_checkpointing
        if wanted == "auto":
            wanted = self.device != "cpu"
        if wanted:
            model.enable_gradient_checkpointing(network, float(wanted))
        self.fingerprint = model.model_fingerprint(str(self.base))
        self.counts = counts = adapter.count_parameters(network)
        self.say(f"model: {counts.total / 1e6:,.1f}M parameters, base weights {quantizer.name}")
        layers = {} if full else adapter.adapted_layers(network)
        line = f"LoRA r {spec.r} on {sum(layers.values())} layers: {', '.join(f'{n} {t}' for t, n in layers.items())}"
        self._proved(Proof("adapter", {"layers": layers}, f"adapter: {'none, all of it trains' if full else line}"))
        self.parameters = adapter.check_trainable(network)
        self.loss_fn = CausalLoss(network)
        self.layout = export.layout_of(network, export.public_name(str(recipe.model.base)))
        if self.ranks.sharded and settings.offload_activations:
            raise RecipeError("train.offload_activations: not with run.sharding=full, whose layers it would move too")
        if self.ranks.sharded:
            keep = () if full else self.parameters.values()
            dtype = self.precision.compute_dtype if full else None
            shard(self.loss_fn, model.decoder_layers(network), device=self.device, keep=keep, dtype=dtype)
            self.parameters = adapter.check_trainable(network)
            shared = [p for p in network.parameters() if full or not p.requires_grad]
            mine, all_ = (sum(t.nbytes for t in tensors) / 2**20 for tensors in (map(own, shared), shared))
            also = ", and that share of gradients and optimizer state" if full else "; the adapter is whole on each"
            self.say(f"sharding: full: a rank holds {mine:,.2f} of the base's {all_:,.2f} MiB{also}")
        self.ranks.copy(list(self.parameters.values()))
        facts = {"tensors": len(self.parameters), "parameters": counts.trainable, "dtype": "float32"}
        line = f"trainable: {counts.trainable / 1e6:,.2f}M numbers in {len(self.parameters):,} tensors, all fp32"
        self._proved(Proof("trainable", facts, line))
        self.provenance = export.Provenance(
            base=str(recipe.model.base),
            base_folder=self.base,
            fingerprint=self.fingerprint,
            tokenizer_files=tokenizer.files(),
            template=self.plan.template.name,
            chat_template=self.plan.template.chat_template,
            stop=encoder.stop,
            stop_ids=encoder.stop_ids,
            add_tokens=recipe.model.add_tokens,
            special=tuple(t for t in recipe.model.add_tokens if tokenizer.token_id(t) in tokenizer.special_ids),
            system=self.system,
            supervise=recipe.template.supervise,
            form=encoder.form(),
            quantizer=recipe.model.quantizer,
            compute_dtype=str(self.precision.compute_dtype).removeprefix("torch."),
            device=self.device.partition(":")[0],
        )
        self.context: dict[str, Any] = {"device": self.device, "compute_dtype": self.precision.compute_dtype}
        self.setting = setting_of(recipe, cuda=self.device != "cpu", dtype=self.precision.compute_dtype)
        cast = partial(autocast, self.device, self.precision.compute_dtype)
        how: dict[str, Any] = dict(vocab_size=sizes["embeddings"], device=self.device, autocast=cast)
        self.say(self.loss_fn.within(partial(attention.choose_route, network, **how)))
        delta = self.loss_fn.within(partial(attention.isolation_canary, network, **how))
        line = f"isolation: documents of one pack don't see each other (max |delta| {delta:g})"
        self._proved(Proof("isolation", {"max_delta": delta}, line))
        if settings.offload_activations and self.device == "cpu":
            self.say("train.offload_activations: nothing to do on a CPU")
        elif settings.offload_activations:
            self.loss_fn.kept = partial(offloaded, list(network.parameters()))
        with cast():
            why = self.loss_fn.within(self.loss_fn.probe)
        if why:
            self.say(f"loss: from full logits ({why})")
        self.optimizer = make_optimizer(
            settings.optimizer,
            self.parameters,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            lr_mult=settings.lr_mult,
        )
        if slower := optimizer_notice(settings.optimizer, self.device):
            self.say(slower)
        scaler = make_scaler(self.device, enabled=self.precision.use_scaler)
        self.trained: dict[str, Any] = dict(parameters=self.parameters, optimizer=self.optimizer, scaler=scaler)
        torch.manual_seed(settings.seed + self.ranks.rank)
        random.seed(settings.seed)
        np.random.seed(settings.seed % 2**32)

    def _tried(self) -> int:
        """Give the largest micro-batch, from the planned one down, that goes forward and backward here."""
        trained = sum(parameter.numel() for parameter in self.parameters.values())
        packs, share = self.recipe.train.micro_packs, self.recipe.train.packs_per_step // self.ranks.world
        for n in [n for n in range(packs, 0, -1) if share % n == 0]:
            held = trained * (8 if n == share else 12)  # moments; gradients of the micro-batches before
            if try_out(self.loss_fn, n, self.setting.slots, self.parameters, **self.context, state_bytes=held):
                return n
            self.say(f"micro-batch: no memory for {n} packs, tried")
        raise RunError(f"out of memory with a single pack: {self._memory(1, self.setting.slots)}")

    def _memory(self, rows: int, slots: int) -> str:
        """Say what of a step grows most with a micro-batch of this size, and what would help."""
        try:
            shape = read_shape(str(self.base))
        except UserError:
            return ""
        setting = replace(self.setting, micro_batch=rows, slots=slots)
        name, size = max(memory.growing(shape, setting).items(), key=lambda term: term[1])
        ways = memory.advice(shape, setting, going_on=True)
        return f"what grew most is {name}, to about {gib(size)}; what needs less: {ways}"

    # -------------------------------------------------------------------------------------------------------- the run

    def check(self, changes: Sequence[tuple[str, str, str]] | None, *, probe: bool = False) -> None:
        """Stop before step 1; ``changes``: as for ``play``, of the run whose checkpoint is read first; None: no run.

        ``probe``: make three steps, in memory only, and say how long the run would take.
        """
        if changes is not None:
            self._saved(changes)
        if not probe:
            self.say("dry run: everything holds, nothing was trained")
            return
        estimate, settings = self.stream.estimate(), self.recipe.train
        steps = estimate.steps(settings.packs_per_step)
        steps = min(filter(None, (steps, settings.max_steps)), default=0)
        self.recipe = replace(self.recipe, train=replace(settings, max_steps=self.state.step + PROBED))
        reports: list[StepReport] = []
        self._train(on_step=reports.append)
        left = max(steps - (self.state.step - len(reports)), 0)
        for line in probed(reports, left, now=time.time()):
            self.say(line)

    def play(
        self, *, identity: Mapping[str, str], resuming: bool = False, changes: Sequence[tuple[str, str, str]] = ()
    ) -> int:
        """Train to the end, write what the run leaves, and give the exit code.

        ``identity``: what must not change unnoticed until the run ends; ``changes``: (key, before, now) of it, allowed.
        """
        with contextlib.ExitStack() as self.claims:
            self.claims.enter_context(claimed(self.folder))
            if not resuming and (self.folder / "run.json").exists():
                raise RecipeError(f"run.out: {self.folder}: another process began a run in it meanwhile")
            saved = self._saved(changes) if resuming else None
            self._same_step()
            self._open(identity, saved, changes)
            return self._play(saved)

    def _play(self, saved: checkpoint.Checkpoint | None) -> int:
        every = self.recipe.checkpoint
        self.checkpoint = Every(self._save, steps=every.every_steps, minutes=every.every_minutes or 0.0)
        try:
            if saved is not None:
                self._restore(saved)
            elif not self.ranks.agree(self.interrupts.reason):
                self._validate(0)
                self._sample(0)
            reason = self._train(
                on_step=self._report,
                validate=Every(self._validate, steps=self.recipe.val.every_steps or 0),
                sample=Every(self._sample, steps=self.recipe.sample.every_steps or 0),
                checkpoint=self.checkpoint,
            )
            if not self.state.step:
                if reason not in ENDS:
                    self.say(f"{reason}: stopped before step 1, nothing was trained")
                    self._write_run("interrupted", ended_by=reason, steps=0)
                    self._end("interrupted", reason)
                    return self._code(reason)
                raise DataError(f"no step was made ({reason}): no record became a sample")
            self._export()
            if reason in ENDS:
                self._validate(self.state.step)
                self._sample(self.state.step)
                self._as_stored()
            return self._finish(reason)
        except BaseException as error:
            with contextlib.suppress(OSError):
                if report := getattr(error, "report", None):  # a NonFiniteError's
                    write_json(self.folder / "nonfinite.json", report)
                self._write_run("failed", error=f"{type(error).__name__}: {error}")
            self._end("failed", in_words(error))
            if isinstance(error, OSError):
                where = error.filename or self.folder
                raise RunError(f"{where}: {system_words(error)}; what is saved is whole, --resume goes on") from error
            raise
        finally:
            self.metrics.close()
            self.samples.close()
            self.reporters.close()

    def _steps(self) -> Iterator[tuple[Batch, ...]]:
        """Yield the batches of each step; rank 0 keeps what the first packs of a new run look like.

        Raises:
            RunError: another rank has other samples, from which each would take its stride.
        """
        steps = self.stream.steps(self.recipe.train.packs_per_step, self.recipe.train.micro_packs)
        while True:
            try:
                batches = next(steps, None)
            except CorefitError:
                self.ranks.sum(0.0, 1.0)
                raise
            digests, broken = self.ranks.sum(self.stream.digest, 0.0)
            if not broken and digests != self.ranks.world * self.stream.digest:
                raise RunError(
                    f"step {self.state.step + 1}: not the samples that another rank has: what reads, maps or encodes a "
                    "record must give the same in every process (no clock, no unseeded random numbers, no rank)"
                )
            if batches is None:
                return
            if not self.state.step and not self.ranks.rank:
                self.first_packs = show.first_packs(batches, self.plan.tokenizer, self.plan.tokenizer.pad_id)
            yield batches

    def follow(self, *, resuming: bool, changes: Sequence[tuple[str, str, str]]) -> int:
        """Compute this rank's share of a run that rank 0 plays; write nothing, and give the exit code."""
        saved = self._saved(changes) if resuming else None
        self._same_step()

        def answer(step: int) -> None:
            for _ in self._answers(step) if self.ranks.sharded else ():
                pass

        if saved is None:
            if not self.ranks.agree(self.interrupts.reason):
                self._score(0)
                answer(0)
        else:
            self._restore(saved)
            torch.manual_seed(self.recipe.train.seed + self.ranks.rank + self.state.step * self.ranks.world)
        reason = self._train(
            on_step=lambda _: self.stream.notices.clear(),
            validate=Every(self._score),
            sample=Every(answer),
            checkpoint=Every(self._lend),
        )
        if self.state.step:
            self.ranks.lend(self.parameters)
            if reason in ENDS:
                self._score(self.state.step)
                answer(self.state.step)
                self._as_stored()
        return self._code(reason)

    def _train(self, **hooks: Any) -> str:  # noqa: ANN401, those of train
        settings = self.recipe.train
        with together(), often_collected():
            return train(
                loss_fn=self.loss_fn,
                steps=self._steps(),
                lr_at=self._lr_at,
                state=self.state,
                clip=settings.clip,
                epochs=settings.epochs,
                max_steps=settings.max_steps,
                should_stop=lambda: self.interrupts.reason or self.patience.reason,
                memory=self._memory,
                ranks=self.ranks,
                **hooks,
                **self.context,
                **self.trained,
            )

    def _lr_at(self, progress: float) -> float:
        warmup = self.recipe.train.warmup
        try:
            factor = float(self.scheduler.factor(progress, warmup))
            if not -1e-9 <= factor <= 1 + 1e-9:  # but for rounding; NaN too
                raise ValueError(f"{factor!r}, expected a share of the peak rate, in [0, 1]")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever it does, a plugin doesn't end the process
            source = self.plan.registry.provider("scheduler", self.scheduler.name).source
            asked = f"scheduler {self.scheduler.name!r} ({source}): factor({progress:g}, {warmup:g})"
            raise PluginError(f"{asked}: {in_words(error)}") from error
        return self.recipe.train.lr * factor

    def _saved(self, changes: Sequence[tuple[str, str, str]]) -> checkpoint.Checkpoint | None:
        """Give the newest whole checkpoint and put stream and loop where it left them; None: there is none."""
        newest, torn = checkpoint.newest_whole(self.folder / "checkpoints")
        for line in torn:
            self.say(line)
        if newest is None:
            self.say(f"resume: {self.folder} has no whole checkpoint, so the run starts again")
            return None
        saved = checkpoint.load(newest, whole=True)
        checkpoint.check_fit(saved, self.parameters)
        self.state = LoopState.from_dict(saved.state["loop"])
        self.lengths = saved.state["lengths"]
        extra = saved.state["extra"]
        self.patience.best, self.patience.bad = extra["patience"]
        looked = extra.get("looked", (False, False))
        self.validated, self.sampled = ({self.state.step} if done else set() for done in looked)
        self.say(f"resume: from step {self.state.step} ({newest})")
        old, new = saved.state["versions"], checkpoint.versions()
        if changed := [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]:
            self.say(f"resume: other versions: {', '.join(changed)}; bits may differ from a straight run's")
        try:
            self.stream.load_state_dict(saved.state["loop"]["stream"])
        except (CheckpointError, DataError) as error:
            if not (strange_changes(changes) or self.allow_changes):
                ways = "--allow-changes goes on, with the records from the first on"
                raise type(error)(f"{error}; {ways}") from error
            self.say(f"resume: {error}: so the records are read from the first on, and the ledger begins anew")
            self.stream = self._stream(self.stream.val_hashes)
            self.state.epoch = 0.0
        if (limits := limits_before(changes, self.recipe.train)) != self.recipe.train:
            for line in new_curve(self._lr_at, self.state, limits, self.recipe.train):
                self.say(line)
        return saved

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        if said := checkpoint.restore(saved, **self.trained):
            self.say(said)

    def _same_step(self) -> None:
        """See that all ranks begin where rank 0 does.

        Raises:
            RunError: this one has read another checkpoint, or none.
        """
        if (step := int(self.ranks.first(self.state.step))) != self.state.step:
            raise RunError(
                f"rank 0 goes on from step {step}, here it is {self.state.step}: {self.folder / 'checkpoints'} must "
                "be the same folder, or a copy of it, on every machine"
            )

    def _open(
        self,
        identity: Mapping[str, str],
        saved: checkpoint.Checkpoint | None,
        changes: Sequence[tuple[str, str, str]],
    ) -> None:
        """Write what the run is and open the files that grow."""
        self.facts = self._facts()
        was = read_json(self.folder / "run.json")
        if saved is not None:
            self.facts["resumed"] = [*was.get("resumed", []), {"step": saved.step, "changed": [*map(list, changes)]}]
        self.identity = identity
        # that of the checkpoints there are: were this run killed before its first, they would seem to be of another one
        self.facts["identity"] = identity if saved is None else was.get("identity", identity)
        try:
            self._write_files()
        except OSError as error:
            raise RecipeError(f"run.out: {self.folder}: can't be written: {system_words(error)}") from error
        for file in (self.metrics, self.samples):
            if file.missing:
                self.say(f"{file.path}: {file.missing:,} bytes that the checkpoint counts on are gone")
        if saved is not None:  # the line about this save came after it, so it was cut
            size = checkpoint.size_of(saved.path)
            self.metrics.write({"step": saved.step, "save_seconds": None, "save_bytes": size})
        self.reporters.start(
            StartReport(
                folder=str(self.folder.resolve()),
                step=self.state.step,
                endless=not self.recipe.train.epochs and not self.recipe.train.max_steps,
                recipe=flat(self.recipe),
                facts={key: value for key, value in self.facts.items() if key != "command"},
                lengths=self.sample_lengths,
            )
        )

    def _write_files(self) -> None:
        """Write what says what the run is, and open the files that grow."""
        write_whole(self.folder / "recipe.toml", to_toml(without_out(self.recipe)).encode())
        for source in self.plan.sources:
            if (code := own_file(source.map_function.name)) and code.is_file():
                write_whole(self.folder / code.name, code.read_bytes())
        self._write_run("running")
        self.metrics = JsonLines(self.folder / "metrics.jsonl", keep=self.lengths["metrics.jsonl"])
        self.samples = JsonLines(self.folder / "samples.jsonl", keep=self.lengths["samples.jsonl"])
        sync(self.folder)

    def _keep_folder(self) -> None:
        """Where somebody removed or renamed the run folder meanwhile, begin its files anew, with a word."""
        if self.metrics.there:
            return
        notice(f"{self.folder}: removed while the run wrote to it; what was in it is gone, the run goes on")
        before, lengths = (self.metrics, self.samples), self.lengths
        self.lengths = dict.fromkeys(lengths, 0)
        try:
            self.claims.enter_context(claimed(self.folder))
            self._write_files()
        except (OSError, CorefitError) as error:
            self.lengths = lengths
            notice(f"{self.folder}: can't be begun anew: {error}")
            return
        for file in before:
            file.close()

    def _report(self, report: StepReport) -> None:
        self.metrics.write(report)
        if self.first_packs:
            self.reporters.tell(PacksReport(packs=self.first_packs))
            self.first_packs = []
        self.reporters.tell(report)
        while self.stream.notices:
            notice(self.stream.notices.pop(0))

    def _validate(self, step: int) -> None:
        """Write and show the validation loss, once a step; nothing where validation is off."""
        if (scored := self._score(step)) is None:
            return
        nats, tokens, better = scored
        ratio = perplexity(nats)
        self.metrics.write({"step": step, "val_loss": nats, "val_perplexity": ratio, "val_tokens": tokens})
        self.reporters.tell(ValidationReport(step=step, loss=nats, perplexity=finite(ratio), tokens=tokens))
        if better and step and self.recipe.checkpoint.keep_best:
            self.best, self.checkpoint.asked = step, True

    def _score(self, step: int) -> tuple[float, int, bool] | None:
        """Give validation loss in nats, its tokens and whether it is the best; None: validation is off, or was done."""
        if not self.val_batches or step in self.validated:
            return None
        self.validated.add(step)
        nats, tokens = self._validation_loss()
        self.scored = nats
        return nats, tokens, self.patience.see(nats)

    def _validation_loss(self) -> tuple[float, int]:
        mine = self.val_batches[self.ranks.rank :: self.ranks.world]
        return evaluate.validation_loss(self.loss_fn, mine, ranks=self.ranks, **self.context)

    def _as_stored(self) -> None:
        """Say what full fine-tuning lost where ``model/`` is stored in 16 bits, as its base; rounds the weights.

        A step of the 135M model at a rate of 1e-5 changes most weights by less than half of what 16 bits tell apart.
        """
        if self.recipe.adapter.kind != "none":
            return
        dtype = getattr(torch, stored := model.base_dtype_of(str(self.base)))
        if dtype == torch.float32:
            return
        line = f"model/: written in {stored}, as the base is stored; checkpoints have what training has, in fp32"
        if self.val_batches:
            trained = self._validation_loss()[0] if self.scored is None else self.scored
            with torch.no_grad():
                for tensor in map(own, self.parameters.values()):
                    tensor.copy_(tensor.to(dtype))
            nats, _ = self._validation_loss()
            if not self.ranks.rank:
                self.facts["model"] |= {"stored": stored, "val_loss": nats}
            line = f"{line}: validation loss {nats:.4f} as written, {trained:.4f} in training"
        self.say(line)

    def _sample(self, step: int) -> None:
        """Write and show the answers to the questions of the recipe."""
        for sample in self._answers(step):
            self.samples.write(sample)
            self.reporters.tell(sample)

    def _answers(self, step: int) -> Iterator[SampleReport]:
        """Answer the questions of the recipe, greedily, once a step."""
        if step in self.sampled:
            return
        self.sampled.add(step)
        for prompt in self.prompts:
            try:
                asked = (Message("system", self.system), Message("user", prompt))[not self.system :]
                ids = self.plan.encoder.prompt(asked).tolist()
            except Unrenderable as refusal:
                if not self.ranks.rank:
                    notice(f"sample: the template can't write this question ({refusal.reason}): {prompt[:80]!r}")
                continue
            how = dict(stop_ids=self.plan.encoder.stop_ids, max_tokens=self.recipe.sample.max_tokens, **self.context)
            ranks = self.ranks if self.ranks.sharded else ALONE  # else rank 0 runs it alone
            answer = self.loss_fn.within(partial(evaluate.generate, self.network, ids, ranks=ranks, **how))
            text = self.plan.tokenizer.decode(answer.ids)
            yield SampleReport(step=step, prompt=prompt, answer=text, stopped=answer.stopped)

    def _lend(self, step: int) -> None:
        """Give rank 0, which saves, this rank's share of what is sharded."""
        if is_sharded(self.parameters.values()):
            checkpoint.lend(step, parameters=self.parameters, optimizer=self.optimizer, ranks=self.ranks)

    def _save(self, step: int) -> None:
        """Write a checkpoint; where the disk refuses, say so and go on."""
        began, report = time.perf_counter(), partial(CheckpointReport, step=step)
        self._keep_folder()
        try:
            path = checkpoint.save(
                self.folder / "checkpoints",
                step,
                loop=self.state.as_dict(),
                lengths=lambda: {"metrics.jsonl": self.metrics.sync(), "samples.jsonl": self.samples.sync()},
                extra={
                    "patience": [self.patience.best, self.patience.bad],
                    "looked": [step in self.validated, step in self.sampled],
                    "layout": self.layout,
                    "provenance": self.provenance.as_dict(),
                },
                keep=self.recipe.checkpoint.keep,
                best=step == self.best,
                ranks=self.ranks,
                **self.trained,
            )
            if self.facts["identity"] != self.identity:
                self.facts["identity"] = self.identity
                self._write_run("running")
            seconds, size = time.perf_counter() - began, checkpoint.size_of(path)
            self.metrics.write({"step": step, "save_seconds": seconds, "save_bytes": size})
            self.reporters.tell(report(path=str(path), seconds=seconds, size_bytes=size))
        except (CheckpointError, OSError) as error:
            self.metrics.write({"step": step, "save_error": str(error)})
            notice(f"{error}; earlier checkpoints are whole, the run goes on")
            seconds = time.perf_counter() - began
            self.reporters.tell(report(path=None, seconds=seconds, size_bytes=None, error=str(error)))

    # -------------------------------------------------------------------------------------------------------- the end

    def _finish(self, reason: str) -> int:
        """Write ledger and status, print answers and summary, and give the exit code."""
        self.metrics.sync()
        self.samples.sync()
        ledger = Ledger.from_dict(self.state.as_dict()["stream"]["ledger"])
        ledger.add(self.val_ledger)
        differences = ledger.differences()
        facts = {**ledger.as_dict(), "proofs": {proof.name: proof.facts for proof in self.proofs}}
        write_json(self.folder / "ledger.json", facts)
        code = self._code(reason)
        status = "interrupted" if code else "complete"
        self._write_run(status, ended_by=reason, steps=self.state.step)
        self._end(status, reason, facts)
        rows = before_after(list(objects(self.folder / "samples.jsonl")), self.state.step)
        if rows:
            self.say(answers_table(rows))
        lines = list(objects(self.folder / "metrics.jsonl"))
        said = summary(lines, reason=reason, skipped=self.state.skipped, balanced=not differences)
        for line in (*said, *show.ledger_lines(facts)):
            self.say(line)
        self.say(f"run: {self.folder}   talk to it: corefit chat {shlex.quote(str(self.folder))}")
        if differences:
            raise LedgerError(f"{self.folder / 'ledger.json'}: {'; '.join(differences)}; the weights are saved")
        return code

    def _code(self, reason: str) -> int:
        """Give the exit code of a rank; 1 where another one was told to stop."""
        return self.interrupts.exit_code or int(reason not in ENDS)

    def _end(self, status: str, reason: str, ledger: Mapping[str, Any] | None = None) -> None:
        """Tell the reporters that the run is over, once."""
        if not self.ended:
            self.ended = True
            self.reporters.tell(EndReport(step=self.state.step, status=status, reason=reason, ledger=ledger or {}))

    def _export(self) -> None:
        """Write ``adapter/``, or ``model/`` after full fine-tuning."""
        self._keep_folder()
        name = "model" if self.recipe.adapter.kind == "none" else "adapter"
        try:
            with self.ranks.gathering(self.parameters) as trained:
                buffers = dict(self.network.named_buffers())  # which every rank has
                tensor_of = lambda name: buffers[name] if name in buffers else trained(name)  # noqa: E731
                export.export(self.folder / name, self.layout, tensor_of, self.provenance)
        except ModelError as error:
            raise RunError(f"{error}; --resume goes on from the newest checkpoint and writes it again") from error

    def _facts(self) -> dict[str, Any]:
        """Give what ``run.json`` holds for the whole run: command line, versions, plugins, fingerprints."""
        plan = self.plan

        def provider(kind: str, name: str) -> dict[str, str]:
            plugin = plan.registry.provider(kind, name)
            return {"plugin": plugin.name, "distribution": plugin.distribution, "version": plugin.version}

        return {
            "corefit": __version__,
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "platform": platform.platform(),
            "versions": checkpoint.versions(),
            "plugins": {
                kind: {name: provider(kind, name) for name in names} for kind, names in used_entries(plan).items()
            },
            "model": {
                "base": self.recipe.model.base,
                "fingerprint": self.fingerprint,
                "tokenizer": plan.tokenizer.fingerprint,
                "remote_code": model.remote_code(self.base) if self.recipe.model.trust_remote_code else {},
                "parameters": self.counts.total,
                "trainable": self.counts.trainable,
            },
            "data": [file_facts(path) for s in (*plan.sources, *plan.val_sources) for path in s.sources.paths],
            "device": self.device,
            "precision": self.precision.name,
            "proofs": {proof.name: proof.line for proof in self.proofs},
        }

    def _write_run(self, status: str, **more: object) -> None:
        write_json(self.folder / "run.json", {**self.facts, "status": status, **more})


@contextlib.contextmanager
def often_collected() -> Iterator[None]:
    """Look for garbage as often as Python does by itself, since a cycle may hold a tensor; then as before."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)


# ------------------------------------------------------------------------------------------------------------- words


def questions(records: Sequence[tuple[Source, Record | BadRecord]]) -> tuple[str, ...]:
    """Give the first user messages of the first of these records, for sample generations."""
    found: list[str] = []
    for source, record in records:
        if len(found) < SAMPLED_PROMPTS and isinstance(record, Record):
            for item in map_record(source, record)[:1]:
                messages = item.messages if isinstance(item, Conversation) else ()
                asked = [message for message in messages if message.role != "system"][:1]
                found += [message.content for message in asked if message.role == "user"]
    return tuple(found)


def common_system(items: Sequence[Item]) -> str:
    """Give the system message with which all conversations among these items begin; empty: not all do."""
    first = [item.messages[0] for item in items if isinstance(item, Conversation) and item.messages]
    found = {message.content if message.role == "system" else "" for message in first}
    return found.pop() if len(found) == 1 else ""


def before_after(lines: Sequence[Mapping[str, Any]], last: int) -> list[tuple[str, str, str]]:
    """Give (question, answer at step 0, answer at the last step) for every question that has both."""
    before = {line["prompt"]: line["answer"] for line in lines if line["step"] == 0}
    after = {line["prompt"]: line["answer"] for line in lines if line["step"] == last and last}
    return [(prompt, before[prompt], after[prompt]) for prompt in before if prompt in after]


# ------------------------------------------------------------------------------------------------------------- files


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: whole, or as it was."""
    text = without_secrets(json.dumps(finite(value), indent=2, ensure_ascii=False))
    write_whole(path, (text + "\n").encode())
