"""``corefit selftest``: the equalities that corefit rests on, measured on this machine.

Each is measured on a small real model in fp32, where equal means equal but for the order of additions, by the very
functions that training uses. A figure is the largest difference of any tensor, relative to its largest value.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corefit import __version__, terminal
from corefit.chat import find
from corefit.data.block import LENGTH, SAMPLE_COLUMNS, SPAN, SPANS, START, STOP
from corefit.data.rows import gather, padded
from corefit.data.tokenizer import Tokenizer
from corefit.engine import adapter, attention, checkpoint, export, loop, model
from corefit.engine.loss import CausalLoss
from corefit.engine.optimizer import make_optimizer, make_scaler, optimizer_state
from corefit.errors import ModelError, RunError, in_words
from corefit.merge import divergence, load, logits, merge, sample_ids
from corefit.registry import Registry
from corefit.types import Batch, Quantizer

ROUNDING = 1e-4
"""Allowed where the same is summed in another order, and more where that is a sum over a large vocabulary."""
QUANTIZERS = ("none", "nf4")
RANK = 32
"""Of the adapters: even in this small model their 8-bit optimizer state is really 8 bits, from 4,096 elements on."""
PACKS, DOCUMENTS = 6, 4
"""Packs in a step, documents in a pack."""
CUTS = ((1, 2, 3, 4, 5), (2,), (5,))
"""Where a step is cut into micro-batches."""
STEPS, TUNING_STEPS = 6, 10
"""Of a run that is resumed in its middle; and before it is measured what merging changes."""


def selftest(base: str | None = None, *, device: str = "auto", say: Callable[[str], None] = terminal.say) -> int:
    """Measure every equality, print a line each, and give the exit code: 1 where one does not hold.

    Args:
        base: a model folder or hub name; None: the embedded model, widened to fp32.
        device: ``auto``, ``cpu`` or ``cuda``.
        say: takes the lines.

    Raises:
        UserError: no such model or device, or a model whose weights are stored quantised.
    """
    model.prepare_process(None if base else 1)  # so small a model gains nothing from more threads
    device, registry, results = model.choose_device(device), Registry.load(), dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="corefit-selftest-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a warning could be about is measured
        path = model.resolve_base(base or str(export.EMBEDDED_MODEL))
        if base is None:
            small = Lab(path, registry.quantizer("none"), "cpu", Path(name)).base()
            path = Path(name) / "base"
            small.save_pretrained(path)
            export.write_files(path, export.base_files(export.EMBEDDED_MODEL))
        about = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
        say(f"corefit {__version__} selftest: {base or 'the embedded model'} in fp32 on {device} ({about})")
        say(f"{'equality':<42} {'base':<6} {'measured':>9} {'allowed':>9} {'seconds':>8}")
        for quantizer in QUANTIZERS:
            lab = Lab(path, registry.quantizer(quantizer), device, Path(name) / quantizer)
            unusable = lab.unusable()
            for title, check in CHECKS.items():
                began = time.perf_counter()
                figures, result = ("", f"skipped: {unusable}") if unusable else _measured(check, lab)
                say(f"{title:<42} {quantizer:<6} {figures:>19} {time.perf_counter() - began:8.1f}  {result}")
                results[f"{title} ({quantizer})"] = result
            if quantizer != "none" and not unusable:
                for line in lab.merging():
                    say(line)
    failed = [title for title, result in results.items() if result.startswith("FAILED")]
    skipped = sum(result.startswith("skipped") for result in results.values())
    say(f"FAILED: {'; '.join(failed)}" if failed else f"all hold, {skipped} skipped")
    return 1 if failed else 0


def _measured(check: Callable[[Lab], tuple[float, float] | str], lab: Lab) -> tuple[str, str]:
    """Give the two figures and the word of a line of the table."""
    try:
        found = check(lab)
    except Exception as error:  # whatever it was, the equality was not seen to hold
        return "", f"FAILED: {in_words(error)}"
    if isinstance(found, str):
        return "", f"skipped: {found}"
    measured, allowed = found
    return f"{measured:9.1e} {allowed:9.1e}", "ok" if measured <= allowed else "FAILED"


def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Give the largest difference of two sets of tensors, relative to each tensor's largest value.

    Infinite where names or shapes differ, or where there is nothing but zeros, which proves nothing. NaN stays NaN.
    """
    largest = {name: float(tensor.abs().max()) for name, tensor in b.items()}
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (a, b)]
    if shapes[0] != shapes[1] or not any(largest.values()):
        return float("inf")
    found = [(a[name].double() - b[name].double()).abs().max().cpu() / (largest[name] or 1) for name in b]
    return float(torch.stack(found).max())


class PlainLoss(CausalLoss):
    """The loss from full logits, by torch's cross entropy."""

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, layout: attention.Layout | None = None
    ) -> Tensor:
        """Give the sum of nats, as ``CausalLoss`` does."""
        table = attention.run_packed(model.causal_lm(self.model), input_ids, position_ids, layout).logits
        return F.cross_entropy(table.flatten(0, 1), labels.flatten(), reduction="sum")


class Lab:
    """A base model, a quantizer and a device, on which equalities are measured."""

    def __init__(self, path: Path, quantizer: Quantizer, device: str, folder: Path) -> None:
        """``folder``: a place for files, which needn't be there yet."""
        self.path, self.quantizer, self.device, self.folder = path, quantizer, device, folder
        self.tokenizer = Tokenizer.load(path)
        self.texts = sample_ids(self.tokenizer)
        self.stored: torch.dtype = getattr(torch, model.base_dtype_of(str(path)))
        self.summed = max(ROUNDING, self.tokenizer.vocab_size * torch.finfo(torch.float32).eps / 2)
        """Allowed for loss and gradients: n terms summed one by one are off by up to n times half an epsilon, and
        matrix products of few rows are summed so (49,152 tokens: 6e-4 seen). Mistakes gave a tenth and more."""
        self.same = 0.0 if device == "cpu" else ROUNDING
        """Allowed where the same is computed twice."""

    def unusable(self) -> str:
        """Say why the quantizer can't be used here; empty: it can.

        Raises:
            ModelError: the model can't be used.
        """
        try:
            quantised = model.is_quantized(self.base())
        except ModelError as error:
            if self.quantizer.name == "none":
                raise
            return str(error)
        if quantised and self.quantizer.name == "none":
            raise ModelError(f"{self.path}: its weights are stored quantised; give the unquantised model")
        return ""

    # --------------------------------------------- the equalities: (measured, allowed), or why it could not be measured

    def packed(self) -> tuple[float, float]:
        """Compare loss and gradients of documents packed together and each by itself."""
        loss_fn, documents = CausalLoss(self.network()), range(PACKS * DOCUMENTS)
        together, single = self.batch(documents, DOCUMENTS), self.batch(documents)
        return apart(self.step(loss_fn, together), self.step(loss_fn, single)), self.summed

    def split(self) -> tuple[float, float]:
        """Compare loss and gradients of a step in several micro-batches, one without supervised tokens, and in one."""
        loss_fn = CausalLoss(self.network())
        whole = self.step(loss_fn, self.batch(range(PACKS)))
        bounds = [pairwise((0, *cuts, PACKS)) for cuts in CUTS]
        found = [apart(self.step(loss_fn, *(self.batch(range(*pair)) for pair in pairs)), whole) for pairs in bounds]
        return float(torch.tensor(found).max()), self.summed

    def checkpointed(self) -> tuple[float, float] | str:
        """Compare loss and gradients, with dropout, where layers are computed once and again in backward."""
        loss_fn, batch, calls = CausalLoss(self.network(dropout=0.1)), self.batch(range(PACKS)), list[int]()
        loss_fn.probe()
        first = next(module for module in loss_fn.modules() if hasattr(module, "lora_A"))
        first.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(0)
        off = self.step(loss_fn, batch)
        try:
            model.enable_gradient_checkpointing(loss_fn.model)
        except ModelError as error:
            return str(error)
        torch.manual_seed(0)
        on = self.step(loss_fn, batch)
        if len(calls) != 3:
            raise RunError("nothing was computed again: checkpointing is off")
        return apart(on, off), self.summed

    def chunked(self) -> tuple[float, float] | str:
        """Compare loss and gradients, also the head's, from 7 rows of logits at a time and from all at once."""
        network, batch = self.network(head=True), self.batch(range(PACKS))
        loss_fn = CausalLoss(network, chunk=7)
        if why := loss_fn.probe():
            return f"this model's loss is the plain one: {why}"
        return apart(self.step(loss_fn, batch), self.step(PlainLoss(network), batch)), self.summed

    def resumed(self) -> tuple[float, float]:
        """Compare weights and optimizer state after a run, and after one that was loaded anew in its middle."""
        straight = self.run("straight")
        noise = 0.0 if self.device == "cpu" else 10 * apart(self.run("again"), straight)
        return apart(self.run("straight", resume=True), straight), noise

    def merged(self) -> tuple[float, float]:
        """Compare logits of the merged model, and of base and adapter, the base stored as in training."""
        written = self.export(self.network(), "to merge")
        out = self.merge(written, "stored" if self.quantizer.name == "none" else "dequantised")
        allowed = max(ROUNDING, 4 * torch.finfo(self.stored).eps)
        return apart(self.logits(load(out)), self.logits(load(written))), allowed

    def saved(self) -> tuple[float, float]:
        """Compare logits with an adapter that was written and loaded by peft, and with the same one in memory."""
        network = self.network()
        loaded = load(self.export(network, "adapter"))
        attention.choose_route(loaded, vocab_size=self.tokenizer.vocab_size, device=self.device)
        return apart(self.logits(loaded), self.logits(network)), self.same

    def saved_whole(self) -> tuple[float, float] | str:
        """Compare logits of a model trained whole that was written and loaded, and of the same one in memory."""
        if self.quantizer.name != "none":
            return "quantised weights are never trained"
        network, random = adapter.attach_adapter(self.base(), None, seed=0).eval(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                trained = parameter.cpu() + 0.01 * torch.randn(parameter.shape, generator=random)
                parameter.copy_(trained.to(self.stored))
        return apart(self.logits(load(self.export(network, "model"))), self.logits(network)), self.same

    def merging(self) -> Iterator[str]:
        """Tune on the quantised base, and say what each way to merge does to that model."""
        network, name = adapter.attach_adapter(self.base(), self.spec(), seed=0), self.quantizer.name
        optimizer = make_optimizer("adamw", adapter.trainable_parameters(network), lr=0.0)
        self.train(CausalLoss(network), [(self.batch(range(PACKS)),)] * TUNING_STEPS, optimizer=optimizer)
        tuned = self.export(network, "tuned")
        yield f"merging a model that was tuned on {name} weights ({TUNING_STEPS} steps, {name} made on {self.device})"
        for into, hint in (("stored", ""), ("dequantised", " (corefit merge --base dequantised)")):
            said = divergence(load(tuned), load(self.merge(tuned, into)), self.texts)
            yield f"    into the {into} base{hint}: {said}"

    # ------------------------------------------------------------------------------------------------ what they share

    def base(self) -> Any:  # noqa: ANN401, a language model
        """Load the base."""
        how: dict[str, Any] = {"compute_dtype": "float32", "device": self.device, "say": model.unsaid}
        return model.load_base(str(self.path), quantizer=self.quantizer, **how)

    def spec(self, dropout: float = 0.0, save: Sequence[str] = ()) -> adapter.AdapterSpec:
        """Give an adapter whose scale is not 1."""
        return adapter.AdapterSpec(r=RANK, alpha=2 * RANK, dropout=dropout, modules_to_save=tuple(save))

    def network(self, *, dropout: float = 0.0, head: bool = False) -> Any:  # noqa: ANN401, a PeftModel
        """Load the base with an adapter that does something; ``head``: the head is trained too, where it isn't tied."""
        network = self.base()
        head = head and not network.config.tie_word_embeddings
        save = [n for n, module in network.named_modules() if head and module is network.get_output_embeddings()]
        network = adapter.attach_adapter(network, self.spec(dropout, save), seed=0)
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_B" in name:  # 0 until it is trained, which would hide half of the gradients
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=random))
        attention.choose_route(network, vocab_size=self.tokenizer.vocab_size, device=self.device)
        return network.eval()

    def batch(self, which: range, documents: int = 1, state: Mapping[str, Any] | None = None) -> Batch:
        """Pack texts, ``documents`` in a pack. The second half of each is supervised; of the fourth nothing is."""
        texts = [self.texts[n] for n in which]
        lengths = np.array([len(text) for text in texts])
        ends = lengths.cumsum()
        samples = np.zeros((len(texts), SAMPLE_COLUMNS), np.int64)
        samples[:, [START, LENGTH]] = np.stack([ends - lengths, lengths], 1)
        samples[:, [SPAN, SPANS]] = [(row, n != 3) for row, n in enumerate(which)]
        samples[:, STOP] = -1
        rows = gather(
            np.concatenate(texts).astype(np.int32),
            np.stack([ends - lengths // 2, ends], 1),
            samples,
            np.full(len(texts) // documents, documents, np.int64),
            width=padded(int(lengths.reshape(-1, documents).sum(1).max())),
            pad_id=self.tokenizer.pad_id,
        )
        return Batch(**rows._asdict(), n_tokens=int(ends[-1]), n_samples=len(texts), state=lambda: state or {})

    def train(self, loss_fn: CausalLoss, steps: Sequence[tuple[Batch, ...]], **changes: Any) -> None:  # noqa: ANN401
        """Run the training loop over these steps."""
        settings: dict[str, Any] = {
            "parameters": adapter.trainable_parameters(loss_fn.model),
            "scaler": make_scaler(self.device, enabled=False),
            "state": loop.LoopState(),
            "max_steps": len(steps),
            "lr_at": lambda progress: 1e-3 * (1 - progress),
        }
        loop.train(loss_fn=loss_fn, steps=steps, device=self.device, **settings | changes)

    def step(self, loss_fn: CausalLoss, *batches: Batch) -> dict[str, Tensor]:
        """Give loss and gradients of one step of the training loop that changes no weight."""
        parameters, reports = adapter.trainable_parameters(loss_fn.model), list[Any]()
        found: dict[str, Tensor] = {}
        still = torch.optim.SGD(parameters.values(), lr=0.0)
        still.register_step_pre_hook(
            lambda *_: found.update({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
        )
        self.train(loss_fn, [batches], optimizer=still, lr_at=lambda at: 0.0, clip=None, on_step=reports.append)
        return found | {"loss": torch.tensor(reports[0].loss or torch.nan)}

    def run(self, name: str, *, resume: bool = False) -> dict[str, Tensor]:
        """Train with dropout and accumulation, saving in the middle; give weights and optimizer state.

        ``resume``: go on from what an earlier run of this name saved.
        """
        torch.manual_seed(int(resume))
        loss_fn, state, folder = CausalLoss(self.network(dropout=0.1)), loop.LoopState(), self.folder / name
        parameters = adapter.trainable_parameters(loss_fn.model)
        kind = "adamw" if self.quantizer.name == "none" else "adamw_8bit"
        optimizer = make_optimizer(kind, parameters, lr=0.0, weight_decay=0.01)
        scaler = make_scaler(self.device, enabled=False)
        what: dict[str, Any] = {"parameters": parameters, "optimizer": optimizer, "scaler": scaler}
        batches = [self.batch(range(n, n + 1), state={"next": n + 1}) for n in range(2 * STEPS)]
        if resume:
            saved = checkpoint.load(folder / checkpoint.name_of(STEPS // 2))
            state = loop.LoopState.from_dict(saved.state["loop"])
            checkpoint.restore(saved, **what)
        done = state.stream()["next"] if state.stream else 0

        def save(step: int) -> None:
            if step == STEPS // 2:
                checkpoint.save(folder, step, **what, loop=state.as_dict(), lengths=dict)

        steps = list(zip(batches[done::2], batches[done + 1 :: 2], strict=True))
        self.train(loss_fn, steps, **what, state=state, max_steps=STEPS, checkpoint=loop.Every(save, steps=1))
        tensors, scalars = optimizer_state(optimizer, parameters)
        plain = {f"{n}/{key}": torch.tensor(v) for n, of in scalars["values"].items() for key, v in of.items()}
        return (
            {n: parameter.detach().cpu() for n, parameter in parameters.items()}
            | {n: t.cpu() for n, t in tensors.items()}
            | plain
        )

    def export(self, network: Any, name: str) -> Any:  # noqa: ANN401, a model; a Found
        """Write what was trained, as a run does, and find it again."""
        served: dict[str, Any] = {"template": "tokenizer", "chat_template": None, "stop": (), "stop_ids": ()}
        facts = export.Provenance(
            base=str(self.path),
            base_folder=self.path,
            fingerprint=model.model_fingerprint(str(self.path)),
            tokenizer_files=self.tokenizer.files(),
            quantizer=self.quantizer.name,
            compute_dtype="float32",
            device=self.device.partition(":")[0],
            **served,
        )
        return find(export.export_trained(network, self.folder / name, facts), model=str(self.path))

    def merge(self, adapter: Any, into: str) -> Any:  # noqa: ANN401, both Found
        """Merge an adapter into the base, and find it."""
        out, notes = self.folder / f"{adapter.folder.name}, {into}", list[str]()
        return find(merge(adapter.folder, out, model=str(self.path), into=into, measured=0, say=notes.append))

    def logits(self, network: Any) -> dict[str, Tensor]:  # noqa: ANN401, a model
        """Give the logits of some texts."""
        return {str(n): table for n, table in enumerate(logits(network, self.texts[:PACKS]))}


CHECKS: dict[str, Callable[[Lab], tuple[float, float] | str]] = {
    "packed = each document by itself": Lab.packed,
    "any split of a step = the whole step": Lab.split,
    "gradient checkpointing on = off": Lab.checkpointed,
    "loss in chunks = from all logits": Lab.chunked,
    "resumed = straight": Lab.resumed,
    "merged = base + adapter": Lab.merged,
    "adapter saved and loaded = in memory": Lab.saved,
    "model saved and loaded = in memory": Lab.saved_whole,
}
"""What ``corefit selftest`` measures, in this order."""
