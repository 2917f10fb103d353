"""The arithmetic of memory against what autograd keeps in real forward passes, tensor by tensor."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, write_family

from corefit import plan
from corefit.engine import adapter, attention, loop, memory, model
from corefit.engine.loss import CausalLoss
from corefit.engine.memory import Setting
from corefit.plan import read_shape
from corefit.prepare import resolve
from corefit.registry import Registry

SLOTS, R = 104, 10
LAYERS = {"num_hidden_layers": 12}  # the first layer keeps less: nothing before it trains
FAMILY = {family.kind: family._replace(config={**family.config, **LAYERS}) for family in FAMILIES}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    model.prepare_process(1)


def kept(folder: Path, setting: Setting) -> int:
    """Bytes of everything that a forward keeps for its backward, but for the weights themselves."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[setting.width]
    network = model.load_base(
        str(folder),
        quantizer=Registry.load().quantizer(setting.quantizer),
        compute_dtype=str(dtype)[6:],
        weights_dtype="float32" if setting.full else None,
        device="cpu",
        say=model.unsaid,
    )
    spec = None if setting.full else adapter.AdapterSpec(r=setting.r, alpha=16, dropout=setting.dropout)
    network = adapter.attach_adapter(network, spec, seed=0)
    if setting.checkpointing:
        model.enable_gradient_checkpointing(network)
    own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    own |= {p.quant_state.absmax.untyped_storage()._cdata for p in network.parameters() if hasattr(p, "quant_state")}
    attention.choose_route(network, vocab_size=256, device="cpu", autocast=lambda: loop.autocast("cpu", dtype))
    loss_fn, storages = CausalLoss(network), {}
    with loop.autocast("cpu", dtype):
        loss_fn.probe()
    loss_fn.train()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    ids = torch.arange(SLOTS).repeat(setting.micro_batch, 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), loop.autocast("cpu", dtype):
        loss_fn(ids, ids % 52, ids, attention.Layout.at(ids % 52))  # two documents
    return sum(storage.nbytes() for storage in storages.values())


def said(folder: Path, setting: Setting) -> int:
    """The same by arithmetic; of the loss only what lasts: the gradients of hidden states and, fully trained, head."""
    shape = read_shape(str(folder))
    terms = memory.moments(shape, setting)["at the loss"]
    casts = 0 if setting.checkpointing else terms.get("weights in the products' format", 0)
    lasting = 4 * setting.tokens * shape.hidden + 4 * shape.vocabulary * shape.hidden * setting.full
    return casts + terms["activations"] + lasting


@pytest.mark.parametrize(
    "setting",
    [
        Setting(SLOTS, quantizer="none", r=R),
        Setting(SLOTS, quantizer="none", r=R, dropout=0.0),
        Setting(SLOTS, quantizer="none", r=R, width=4),
        Setting(SLOTS, quantizer="none", r=R, micro_batch=3, checkpointing=True),
        Setting(SLOTS, quantizer="nf4", r=R, micro_batch=2),
        Setting(SLOTS, quantizer="nf4", r=R, checkpointing=True),
        Setting(SLOTS, quantizer="none", full=True),
        Setting(SLOTS, quantizer="none", full=True, micro_batch=2, checkpointing=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("wide", [False, True], ids=["native", "wide"])
def test_activations_are_what_autograd_keeps(monkeypatch, tmp_path: Path, setting: Setting, wide: bool) -> None:
    monkeypatch.setattr("corefit.engine.fused.cpu_has_bf16", lambda: not wide)
    setting = replace(setting, wide=wide and setting.width == 2)
    folder = write_family(tmp_path / "base", FAMILY["llama"])
    assert said(folder, setting) == pytest.approx(kept(folder, setting), rel=0.05)


@pytest.mark.parametrize("quantizer", ["none", "nf4"])
@pytest.mark.parametrize(
    "kind", ["internlm", "internlm2", "qwen2", "qwen3", "mistral", "gemma", "phi3", "glm4", "olmo2"]
)
def test_of_other_families_too(kind: str, quantizer: str, tmp_path: Path) -> None:
    folder, setting = write_family(tmp_path / "base", FAMILY[kind]), Setting(SLOTS, quantizer=quantizer, r=R)
    assert said(folder, setting) == pytest.approx(kept(folder, setting), rel=0.15)
    assert not read_shape(str(folder)).rough


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "phi", "minicpm3"])
def test_what_is_not_a_dense_decoder_is_called_rough(kind: str, tmp_path: Path) -> None:
    assert read_shape(str(write_family(tmp_path / "base", FAMILY[kind]))).rough


def test_parameters_are_counted_as_the_model_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for kind in ("llama", "qwen3", "gemma"):  # heads of their own, and one table for both ends
        folder = write_family(tmp_path / kind, FAMILY[kind])
        real = AutoModelForCausalLM.from_pretrained(folder)
        assert read_shape(str(folder)).parameters == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("name", plan.SIZES)
def test_the_sizes_of_the_zoo_are_what_its_names_say(name: str) -> None:
    said = float(
        re.findall(
            r"(\d+(?:[._]\d+)?)-?b",
            name.lower().replace("phi-3-mini", "3.8b").replace("gemma-2b", "2.5b").replace("gemma-7b", "8.5b"),
        )[-1].replace("_", ".")
    )
    assert plan.known_shape(name).parameters / 1e9 == pytest.approx(said, rel=0.25)


def test_the_largest_micro_batch_is_a_divisor_that_leaves_room() -> None:
    shape, setting = plan.known_shape("Qwen/Qwen3-0.6B"), Setting(1024, cuda=True, checkpointing=True)
    sizes = {n: memory.needed(shape, replace(setting, micro_batch=n)) for n in range(1, 13)}
    assert sorted(sizes.values()) == list(sizes.values())
    room = round(sizes[5] / (1 - memory.KEPT_FREE)) + 1
    assert memory.largest_micro_batch(shape, setting, room=room, packs=12) == 4
    assert memory.largest_micro_batch(shape, setting, room=sizes[1], packs=12) == 0


def test_gradients_of_the_micro_batches_before_are_there_at_the_loss() -> None:
    shape, setting = plan.known_shape("Qwen/Qwen3-0.6B"), Setting(512, quantizer="none", full=True, packs=4)
    first, later = (memory.moments(shape, replace(setting, micro_batch=n))["at the loss"] for n in (4, 2))
    assert "gradients" not in first and later["gradients"] == 4 * shape.parameters


def test_a_cpu_that_multiplies_in_fp32_has_a_copy_of_the_head_and_of_a_weight() -> None:
    shape, setting = plan.known_shape("Qwen/Qwen3-0.6B"), Setting(512, quantizer="none")
    plain, wide = (memory.moments(shape, replace(setting, wide=on)) for on in (False, True))
    copy, chunk = 4 * shape.vocabulary * shape.hidden, shape.vocabulary * (memory.CHUNK * 2 - memory.CACHED * 4)
    assert wide["at the loss"]["loss"] - plain["at the loss"]["loss"] == copy + chunk
    name = "weights in the products' format"
    biggest = max(i * o for _, i, o in shape.linears)
    assert wide["in the backward"][name] - plain["in the backward"][name] == 4 * biggest
    assert wide["at the loss"]["activations"] == plain["at the loss"]["activations"]
    full = memory.moments(shape, replace(setting, full=True, wide=True))
    assert name not in full["at the loss"]  # they are fp32 already


@pytest.mark.parametrize("quantizer, width, wide", [("none", 2, True), ("nf4", 2, True), ("nf4", 4, False)])
def test_fp32_copies_of_weights_in_fewer_bits_leave_their_blocks_in_the_heap(quantizer, width, wide, tmp_path) -> None:
    shape = read_shape(str(write_family(tmp_path / "base", FAMILY["llama"])))

    def free(**setting: Any) -> int:
        slots = 2**20  # so many that activations leave none
        return memory.moments(shape, Setting(slots, **setting))["at the loss"].get("free in the heap", 0)

    copies = sum(4 * i * o for _, i, o in shape.linears)
    left = free(quantizer=quantizer, width=width, wide=wide) - free(quantizer="none", width=width)
    assert left == pytest.approx(memory.COPIES * copies, rel=0.01)


@pytest.mark.parametrize(
    "precision, cuda, wide", [("bf16", False, True), ("fp32", False, False), ("bf16", True, False)]
)
def test_a_plan_knows_in_what_this_cpu_multiplies(monkeypatch, precision, cuda, wide) -> None:
    monkeypatch.setattr("corefit.engine.fused.cpu_has_bf16", lambda: False)
    dtype = model.DTYPES[precision]
    recipe, *_ = resolve(None, {}, [f"train.precision={precision}"], Registry.load())
    assert plan.setting_of(recipe, cuda=cuda, dtype=dtype).wide == wide
    monkeypatch.setattr("corefit.engine.fused.cpu_has_bf16", lambda: True)
    assert not plan.setting_of(recipe, cuda=cuda, dtype=dtype).wide


def test_advice_names_what_needs_less_and_how_much() -> None:
    shape, setting = plan.known_shape("Qwen/Qwen3-0.6B"), Setting(1024, quantizer="none", micro_batch=4)
    words = memory.advice(shape, setting)
    for way in ("train.micro_batch=2", "train.gradient_checkpointing=true", "pack.max_length=512"):
        other = {"micro": {"micro_batch": 2}, "gradi": {"checkpointing": True}, "max_l": {"slots": 512}}
        size = memory.needed(shape, replace(setting, **other[way.partition(".")[2][:5]]))
        assert f"--set {way} ({size / 2**30:,.2f} GiB)" in words


def test_advice_for_a_run_that_goes_on_changes_only_what_may_change() -> None:
    shape, setting = plan.known_shape("Qwen/Qwen3-0.6B"), Setting(1024, quantizer="none", micro_batch=9)
    words = memory.advice(shape, setting, going_on=True)
    assert re.findall(r"--set (\S+)", words) == ["train.gradient_checkpointing=true", "train.micro_batch=3"]
    words = memory.advice(shape, replace(setting, micro_batch=1, checkpointing=True), going_on=True)
    assert "--set model.quantizer=nf4 (" in words and words.endswith(", in a new run")


@pytest.mark.parametrize("size", [0, 2**40])
def test_memory_is_given_back_by_bases_that_are_not_small(
    size: int, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(model, "SMALL", size)
    monkeypatch.setattr(model, "give_memory_back", lambda: calls.append(1))
    quantizer = Registry.load().quantizer("none")
    model.load_base(str(tiny_model), quantizer=quantizer, compute_dtype="float32", device="cpu")
    assert len(calls) == (not size)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_freed_tensor_goes_back_to_the_system() -> None:
    code = (
        "import sys, torch; from corefit.engine import model\n"
        "def rss(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20\n"
        "if sys.argv[1] == 'yes': model.give_memory_back()\n"
        "kept, gone = [], []\n"
        "for i in range(60): gone.append(torch.ones(2**20)); kept.append(torch.ones(2**13)); gone[0:-8] = []\n"
        "before = rss(); gone.clear(); print(before - rss())"
    )
    keeping = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    freed = [
        float(subprocess.run([sys.executable, "-c", code, word], capture_output=True, env=keeping, check=True).stdout)
        for word in ("yes", "no")
    ]
    assert freed[0] > 25 > 1 > freed[1], freed  # eight tensors of 4 MiB


def test_a_micro_batch_is_tried_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "base", FAMILIES[0])
    quantizer = Registry.load().quantizer("none")
    network = model.load_base(str(folder), quantizer=quantizer, compute_dtype="float32", device="cpu")
    network = adapter.attach_adapter(network, adapter.AdapterSpec(r=4, alpha=4, dropout=0.5), seed=0)
    parameters = adapter.check_trainable(network)
    before, random = {k: p.clone() for k, p in parameters.items()}, torch.get_rng_state()
    loss_fn, seen = CausalLoss(network), []
    real = loss_fn.forward

    def watched(*batch):
        seen.append(batch[0].shape)
        if len(seen) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(*batch)

    loss_fn.forward = watched
    how = dict(parameters=parameters, device="cpu", compute_dtype=torch.float32)
    assert loop.try_out(loss_fn, 3, 40, **how)
    assert seen == [(3, 40)]
    assert not loop.try_out(loss_fn, 3, 40, **how)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and torch.equal(p, before[k]) for k, p in parameters.items())
