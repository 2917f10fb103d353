"""What only a GPU can show: run on the first one that comes along, skipped with a reason where there is none.

``run.sh`` runs them, and the benchmark.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import corefit
from tiny import write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings(
        "default"
    ),  # torch says once that its search for waits is a prototype, cuBLAS this and that
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that this torch can use"),
]
ROWS = "".join(
    json.dumps({"text": f"### Human: What is {i}?### Assistant: It is number {i}."}) + "\n" for i in range(60)
)
SMALL = ["pack.max_length=128", "train.packs_per_step=2", "train.max_steps=12", "sample.max_tokens=4", "train.lr=5e-3"]


several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")


def losses(tmp_path: Path, model: Path, name: str, *more: str, gpus: int = 1, resume: bool = False) -> list[float]:
    (tmp_path / "rows.jsonl").write_text(ROWS, "utf-8")
    flags = ["--plugin", "oasst1", "--template", "chatml", "--model", model, "--data", "rows.jsonl", "--out", name]
    verb = ["launch", "-n", gpus] if gpus > 1 else ["train"]
    done = corefit(*verb, *flags, *["--resume"] * resume, "--set", *SMALL, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses_of(tmp_path / name)


def losses_of(run: Path, key: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_the_loss_curve_is_that_of_fp32_on_a_cpu(
    precision: str, quantizer: str, tmp_path: Path, tiny_model: Path
) -> None:
    same = [f"model.quantizer={quantizer}", "adapter.dropout=0.0"]
    on_cpu = losses(tmp_path, tiny_model, "cpu", *same, "run.device=cpu", "train.precision=fp32")
    on_gpu = losses(tmp_path, tiny_model, "gpu", *same, "run.device=cuda", f"train.precision={precision}")
    assert on_gpu[-1] < on_gpu[0]
    assert on_gpu == pytest.approx(on_cpu, rel=0.03)


@pytest.mark.parametrize(
    "how",
    [
        ["adapter.kind=none", "model.quantizer=none", "train.lr=1e-3"],
        ["adapter.dora=true", "model.quantizer=nf4"],
        ["adapter.rslora=true", "model.quantizer=nf4", "train.micro_batch=2", "train.gradient_checkpointing=true"],
        ['model.add_tokens=["<a>","<b>"]', "model.quantizer=nf4", "train.weight_decay=0.1", "train.clip=0.1"],
        ["val.share=0.3", "val.every_steps=3", "sample.every_steps=3", "model.quantizer=nf4"],
        pytest.param(["model.quantizer=int8"], id="int8"),
        pytest.param(["train.optimizer=adamw_8bit", "model.quantizer=none"], id="adamw_8bit"),
    ],
    ids=lambda how: how[0].partition("=")[0],
)
def test_all_that_can_be_trained_follows_fp32_on_a_cpu(how: list[str], tmp_path: Path, tiny_model: Path) -> None:
    how = [*how, "adapter.dropout=0.0"] if "adapter.kind=none" not in how else how
    on_cpu = losses(tmp_path, tiny_model, "cpu", *how, "run.device=cpu", "train.precision=fp32")
    on_gpu = losses(tmp_path, tiny_model, "gpu", *how, "run.device=cuda", "train.precision=fp16")
    assert on_gpu[-1] < on_gpu[0]
    assert on_gpu == pytest.approx(on_cpu, rel=0.03)


def test_a_run_on_the_gpu_goes_on_there_and_its_adapter_on_the_cpu(tmp_path: Path, tiny_model: Path) -> None:
    how = [
        "model.quantizer=nf4",
        "run.device=cuda",
        "train.precision=fp16",
        "val.share=0.3",
        "train.scheduler=constant",
    ]
    straight = losses(tmp_path, tiny_model, "straight", *how)
    half = losses(tmp_path, tiny_model, "halves", *how, "train.max_steps=6")
    flags = ["--plugin", "oasst1", "--template", "chatml", "--model", tiny_model, "--data", "rows.jsonl"]
    done = corefit("train", *flags, "--out", "halves", "--resume", "--set", *SMALL, *how, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = losses_of(tmp_path / "halves")
    assert whole[:6] == half and whole == pytest.approx(straight, rel=1e-3)  # a GPU adds in any order
    said = [
        corefit("chat", "straight", "--prompt", "What is 3?", "--device", device, cwd=tmp_path)
        for device in ("cpu", "cuda")
    ]
    assert [answer.returncode for answer in said] == [0, 0], said
    for verb in (
        ["eval", "straight"],
        ["merge", "straight", "--out", "merged"],
        ["plan", tmp_path / "straight/recipe.toml"],
    ):
        done = corefit(*verb, cwd=tmp_path)
        assert done.returncode == 0, (verb, done.stdout + done.stderr)


SEVERAL = {
    "copies of nf4": ["model.quantizer=nf4", "train.precision=fp16"],
    "shares of nf4": ["model.quantizer=nf4", "train.precision=fp16", "run.sharding=full", "adapter.dora=true"],
    "shares of bf16, with trained rows": [
        *["model.quantizer=none", "train.precision=bf16", "run.sharding=full", "train.gradient_checkpointing=true"],
        *['model.add_tokens=["<a>"]', 'adapter.modules_to_save=["lm_head"]'],
    ],
    "full, shares of fp16": ["adapter.kind=none", "model.quantizer=none", "train.precision=fp16", "run.sharding=full"],
}


@several
@pytest.mark.parametrize("how", SEVERAL.values(), ids=SEVERAL)
def test_two_gpus_are_one_also_where_a_run_goes_on_with_another_number(
    how: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    lora = [] if "adapter.kind=none" in how else ["adapter.dropout=0.0"]
    same = [*how, *lora, "train.packs_per_step=4", "train.max_steps=6", "train.scheduler=constant", "train.lr=1e-3"]
    same += ["val.share=0.2", "val.every_steps=2", "sample.every_steps=3"]
    alone = [word for word in same if word != "run.sharding=full"]
    straight = losses(tmp_path, tiny_model, "one", *alone, "run.device=cuda:0")
    assert straight[-1] < straight[0]
    two = losses(tmp_path, tiny_model, "two", *same, gpus=2)
    assert two == pytest.approx(straight, rel=2e-3)
    norms = [losses_of(tmp_path / name, "grad_norm") for name in ("one", "two")]
    assert norms[1] == pytest.approx(norms[0], rel=2e-2)  # which Adam's steps don't show
    for gpus, n in ((2, 2), (1, 4), (2, 6)):
        words = [*(same if gpus > 1 else alone), f"train.max_steps={n}"]
        turns = losses(tmp_path, tiny_model, "turns", *words, gpus=gpus, resume=n > 2)
    assert turns == pytest.approx(straight, rel=2e-3)
    said = corefit("chat", "turns", "--prompt", "What is 3?", cwd=tmp_path)
    assert said.returncode == 0, said.stderr


def test_activations_in_the_computers_memory_change_no_loss(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", hidden_size=512)  # two packs of 128 x 512 are enough to be moved
    same = ["model.quantizer=nf4", "adapter.dropout=0.0", "run.device=cuda", "train.precision=bf16"]
    same += ["train.micro_batch=2", "train.lr=5e-4"]
    here = losses(tmp_path, base, "here", *same, "train.gradient_checkpointing=false")
    away = losses(tmp_path, base, "away", *same, "train.gradient_checkpointing=0.5", "train.offload_activations=true")
    assert away == pytest.approx(here, rel=1e-2)


def test_what_waits_in_the_computers_memory_is_not_on_the_gpu() -> None:
    from corefit.engine.loss import offloaded

    weight = torch.randn(2**22, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    with offloaded([weight]):
        loss = (weight * 2).exp().sum()
    assert torch.cuda.memory_allocated() - before < weight.nbytes / 8
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.allclose(weight.grad, 2 * (weight.detach() * 2).exp())


def test_a_run_that_pages_its_optimizer_goes_on_where_it_stopped(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", hidden_size=512)  # a matrix of the adapter is paged from 100,000 numbers on
    same = ["adapter.r=256", "train.optimizer=paged_adamw_8bit", "run.device=cuda", "train.precision=bf16"]
    same += ["adapter.dropout=0.0", "train.scheduler=constant", "train.lr=5e-4"]
    straight = losses(tmp_path, base, "straight", *same)
    losses(tmp_path, base, "run", *same, "train.max_steps=6")
    done = corefit("train", "--resume", "run", "--set", "train.max_steps=12", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    resumed = [row["loss"] for row in rows if "loss" in row]
    assert resumed == pytest.approx(straight, rel=0.01)


def test_what_corefit_rests_on_holds_on_the_gpu(tmp_path: Path) -> None:
    done = corefit("selftest", "--device", "cuda", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_planned_is_what_the_gpu_allocates(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    command = [sys.executable, Path(__file__).parents[2] / "benchmarks" / "plan.py", "--quick", "--device", "cuda"]
    done = subprocess.run([*map(str, command), "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in json.loads(out.read_text("utf-8"))["rows"]:
        assert row["planned MiB"] == pytest.approx(row["measured MiB"], rel=0.1), row


def test_isolation_holds_on_the_gpu(tmp_path: Path, tiny_model: Path) -> None:
    from corefit.engine.attention import isolation_canary
    from corefit.engine.model import load_base
    from corefit.registry import Registry

    quantizer = Registry.load().quantizer("none")
    model = load_base(str(tiny_model), quantizer=quantizer, compute_dtype="float16", device="cuda")
    assert isolation_canary(model, vocab_size=512, device="cuda") < 1e-2


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def on_gpu(folder: Path, precision: str, quantizer: str = "none") -> tuple[Any, Any]:
    """A model with an adapter that does something, and what autocast training runs in."""
    from corefit.engine.adapter import AdapterSpec, attach_adapter
    from corefit.engine.loop import autocast
    from corefit.engine.model import load_base
    from corefit.registry import Registry

    dtype = DTYPES.get(precision, torch.float32)
    how: dict[str, Any] = {"compute_dtype": str(dtype).removeprefix("torch."), "device": "cuda"}
    base = load_base(str(folder), quantizer=Registry.load().quantizer(quantizer), **how)
    model = attach_adapter(base, AdapterSpec(r=4, alpha=8, dropout=0.0), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model, lambda: autocast("cuda", dtype)


def two_packs() -> Any:
    """A micro-batch of documents of 5 to 60 tokens in two packs of 128; each but the padding is supervised."""
    from corefit.types import Batch

    sizes = (5, 60, 1, 40, 22, 33, 60, 28, 7)
    ids = np.random.default_rng(0).integers(3, 512, (2, 128))
    positions = np.concatenate([np.arange(n) for n in sizes]).reshape(2, 128)
    labels = np.where(np.roll(positions, -1) == 0, -100, np.roll(ids, -1))
    labels[1, -7:] = -100
    bounds = np.cumsum([0, *sizes], dtype=np.int32)
    return Batch(ids, labels, positions, bounds, n_supervised=int((labels != -100).sum()), n_tokens=249, n_samples=8)


def loss_and_gradients(model: Any, autocast: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from corefit.engine.loop import on_device
    from corefit.engine.loss import CausalLoss

    loss_fn = CausalLoss(model)
    with autocast():
        loss_fn.probe()
        loss = loss_fn(*on_device(two_packs(), "cuda"))
    (loss / 200).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_documents_in_one_kernel_give_what_a_mask_gives(precision: str, checkpointing: bool, tmp_path: Path) -> None:
    from corefit.engine.attention import choose_route, isolation_canary
    from corefit.engine.model import enable_gradient_checkpointing

    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs a GPU of capability 8.0")
    model, autocast = on_gpu(write_model(tmp_path), precision)
    if checkpointing:
        enable_gradient_checkpointing(model)
    model.train()
    masked = loss_and_gradients(model, autocast)
    said = choose_route(model, vocab_size=512, device="cuda", autocast=autocast)
    assert said.endswith("document by document") and "sdpa" not in said
    packed = loss_and_gradients(model, autocast)
    for ours, theirs in zip(packed, masked, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05  # roundings; a mistake gives a tenth and more
    isolation_canary(model, vocab_size=512, device="cuda", autocast=autocast)


def test_without_a_kernel_for_fp32_the_mask_stays(tmp_path: Path) -> None:
    from corefit.engine.attention import choose_route, isolation_canary

    model, autocast = on_gpu(write_model(tmp_path), "fp32")
    said = choose_route(model, vocab_size=512, device="cuda", autocast=autocast)
    assert said.startswith("attention: sdpa with a mask of each pack") and "(" in said
    isolation_canary(model, vocab_size=512, device="cuda")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_lora_in_one_piece_gives_what_pefts_own_gives(quantizer: str, precision: str, tmp_path: Path) -> None:
    model, autocast = on_gpu(write_model(tmp_path), precision, quantizer)
    ours = loss_and_gradients(model.train(), autocast)
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and "forward" in vars(module)]
    assert len(layers) == 14  # seven of two layers
    for layer in layers:
        del layer.forward
    for mine, theirs in zip(ours, loss_and_gradients(model, autocast), strict=True):
        assert 0 < float(theirs.norm()) and float((mine - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_a_micro_batch_runs_without_waiting_for_the_gpu(quantizer: str, checkpointing: bool, tmp_path: Path) -> None:
    from corefit.engine.attention import choose_route
    from corefit.engine.loop import nats
    from corefit.engine.loss import CausalLoss
    from corefit.engine.model import enable_gradient_checkpointing

    model, autocast = on_gpu(write_model(tmp_path), "bf16", quantizer)
    if checkpointing:
        enable_gradient_checkpointing(model)
    choose_route(model, vocab_size=512, device="cuda", autocast=autocast)
    loss_fn, batch = CausalLoss(model.train()), two_packs()
    for turn in range(2):  # the first makes what is kept from then on
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if turn else "default")
        try:
            nats(loss_fn, batch, "cuda", torch.bfloat16).backward()  # type: ignore[no-untyped-call]
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("quantizer", ["none", "nf4"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_step_waits_for_the_gpu_once(precision: str, quantizer: str, tmp_path: Path) -> None:
    from corefit.engine.adapter import check_trainable
    from corefit.engine.attention import choose_route
    from corefit.engine.loop import take_step
    from corefit.engine.loss import CausalLoss
    from corefit.engine.optimizer import make_optimizer, make_scaler

    model, autocast = on_gpu(write_model(tmp_path), precision, quantizer)
    choose_route(model, vocab_size=512, device="cuda", autocast=autocast)
    loss_fn, parameters = CausalLoss(model.train()), check_trainable(model)
    optimizer, scaler = make_optimizer("adamw", parameters, lr=1e-4), make_scaler("cuda", enabled=precision == "fp16")
    for _ in range(2):  # the first makes what is kept from then on
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                batches = [two_packs(), two_packs()]
                supervised = sum(batch.n_supervised for batch in batches)
                take_step(loss_fn, batches, supervised, parameters, optimizer, scaler, "cuda", DTYPES[precision], 1.0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in said if "called a synchronizing CUDA operation" in str(warning.message)]
    assert len(waits) == 1, [(warning.filename, warning.lineno) for warning in waits]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_a_nan_that_one_record_meets_is_named_on_the_gpu(
    precision: str, quantizer: str, tmp_path: Path, tiny_model: Path
) -> None:
    from safetensors.torch import load_file, save_file

    vocabulary = json.loads((tiny_model / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    bad = shutil.copytree(tiny_model, tmp_path / "bad")
    weights = load_file(bad / "model.safetensors")
    weights["model.embed_tokens.weight"][vocabulary["~"]] = float("nan")
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "rows.jsonl").write_text(ROWS.replace("What is 36?", "What is ~?"), "utf-8")
    flags = ["--plugin", "oasst1", "--template", "chatml", "--model", bad, "--data", "rows.jsonl", "--out", "run"]
    more = [f"model.quantizer={quantizer}", f"train.precision={precision}", "train.max_steps=60", "val.records=0"]
    done = corefit("train", *flags, "--set", *SMALL, *more, "run.device=cuda", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text("utf-8"))
    assert (report["first"]["module"], report["first"]["direction"]) == ("model.embed_tokens", "forward")
    assert report["records"] == [f"{tmp_path / 'rows.jsonl'}:37"]
