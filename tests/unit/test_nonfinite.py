"""Values that are not finite are put into weights, losses and gradients; the report names the place and the record."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_model
from tiny_training import POISON_LOSS, make_run, make_steps
from torch import nn

from corefit.defaults import corefit_quantizers
from corefit.engine.adapter import AdapterSpec, attach_adapter, trainable_parameters
from corefit.engine.attention import isolation_canary
from corefit.engine.loop import LoopState, autocast, train
from corefit.engine.loss import CausalLoss
from corefit.engine.model import enable_gradient_checkpointing, load_base, prepare_process
from corefit.engine.nonfinite import PADDING, Watch, documents, not_finite, plain_names, require_finite
from corefit.engine.optimizer import make_optimizer, make_scaler
from corefit.errors import NonFiniteError, RunError
from corefit.types import Batch

QUANTIZERS = {quantizer.name: quantizer for quantizer in corefit_quantizers()}
PAD, RARE = 3, 505
"""Ids that no document holds unless a test puts them there."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Give the folder of a tiny model, with some of its weights changed: name -> index -> value."""

    @functools.cache
    def plain(kind):
        return write_model(tmp_path_factory.mktemp(kind), kind=kind)

    def make(kind="llama", changes=None):
        if not changes:
            return plain(kind)
        folder = shutil.copytree(plain(kind), tmp_path_factory.mktemp("changed") / kind)
        weights = load_file(folder / "model.safetensors")
        for name, (index, value) in changes.items():
            weights[name][index] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def load(folder, *, full=False, quantizer="none", dtype="float32", checkpointing=False):
    prepare_process(1)
    network = load_base(
        str(folder),
        quantizer=QUANTIZERS[quantizer],
        compute_dtype=dtype,
        device="cpu",
        weights_dtype="float32" if full else None,
    )
    network = attach_adapter(network, None if full else AdapterSpec(r=4, alpha=8, dropout=0.1), seed=0)
    if checkpointing:
        enable_gradient_checkpointing(network)
    loss_fn = CausalLoss(network)
    with autocast("cpu", getattr(torch, dtype)):
        loss_fn.probe()
    return loss_fn


def module(loss_fn, name):
    """The module that the base model calls so; where an adapter wraps it, the wrapper."""
    return next(found for found, plain in plain_names(loss_fn).items() if plain == name)


def make_batch(seed, *rows, width=32):
    """Packs of documents of these lengths, each supervised from its third token on, and padding behind them."""
    rng = np.random.default_rng(seed)
    ids, labels = np.full((len(rows), width), PAD), np.full((len(rows), width), -100)
    positions, bounds, origins = np.zeros_like(ids), [0], []
    for row, lengths in enumerate(rows):
        at = 0
        for length in lengths:
            ids[row, at : at + length] = rng.integers(10, 500, length)
            labels[row, at + 1 : at + length - 1] = ids[row, at + 2 : at + length]
            positions[row, at : at + length] = np.arange(length)
            at += length
            bounds.append(row * width + at)
            origins.append(f"rows.jsonl:{100 * seed + len(origins) + 1}")
        if at < width:
            positions[row, at:] = np.arange(width - at)
            bounds.append((row + 1) * width)
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        cu_seqlens=np.array(bounds, np.int32),
        n_supervised=int((labels != -100).sum()),
        n_tokens=sum(map(sum, rows)),
        n_samples=len(origins),
        epoch=0.1,
        origins=lambda: tuple(origins),
        state=dict,
    )


STEP = (make_batch(1, (9, 12, 5), (20, 6)), make_batch(2, (7, 25), (10, 11)))
ALL = [origin for batch in STEP for origin in batch.origins()]


def put(batch, origin, token):
    """The batch with a token in the middle of a document."""
    at = [found for _, found in documents(batch)].index(origin)
    ids = batch.input_ids.copy()
    ids.reshape(-1)[sum(batch.cu_seqlens[at : at + 2]) // 2] = token
    return replace(batch, input_ids=ids)


def run(loss_fn, *, step=STEP, dtype="float32", scale=False):
    """Train until the run stops; give what is written and what is said."""
    parameters = trainable_parameters(loss_fn)
    with pytest.raises(NonFiniteError) as error:
        train(
            loss_fn=loss_fn,
            steps=[step] * 60,
            parameters=parameters,
            optimizer=make_optimizer("adamw", parameters, lr=1e-4),
            scaler=make_scaler("cpu", enabled=scale),
            lr_at=lambda progress: 1e-4,
            state=LoopState(),
            compute_dtype=getattr(torch, dtype),
        )
    assert "\n" not in str(error.value)
    return json.loads(json.dumps(error.value.report, allow_nan=False)), str(error.value)


# ------------------------------------------------------------------------------------------------------- in weights

HOW = {
    "lora": {},
    "full": {"full": True},
    "full, checkpointing": {"full": True, "checkpointing": True},
    "nf4, checkpointing": {"quantizer": "nf4", "checkpointing": True},
    "int8": {"quantizer": "int8"},
}


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("kind", "how", "name", "value"),
    [
        ("llama", "lora", "model.layers.1.mlp.up_proj", INF),
        ("llama", "lora", "model.layers.0.mlp.down_proj", NAN),
        ("llama", "full", "model.layers.1.mlp.up_proj", NAN),
        ("llama", "nf4, checkpointing", "model.layers.1.self_attn.o_proj", INF),
        ("llama", "int8", "model.layers.1.mlp.up_proj", INF),
        ("llama_bias", "full, checkpointing", "model.layers.0.self_attn.q_proj", INF),
        ("qwen2", "lora", "model.layers.1.self_attn.v_proj", -INF),
        ("qwen3", "nf4, checkpointing", "model.layers.0.mlp.gate_proj", NAN),
    ],
)
def test_a_layer_with_such_a_weight_is_named(base, kind, how, name, value):
    folder = base(kind, {f"{name}.weight": ((3, 5), value)})
    report, line = run(load(folder, **HOW[how]))
    assert report["cause"] == "non_finite_loss"
    assert (report["first"]["module"], report["first"]["direction"]) == (name, "forward")
    assert report["first"]["weights"] == [f"{name}.weight"]
    assert report["records"] == ALL
    assert f"first in {name}, forward (itself not finite: {name}.weight), for rows.jsonl:101, rows.jsonl:102, " in line
    assert "what may help: another copy of the base model" in line


def test_a_norm_is_named_too(base):
    report, _ = run(load(base(changes={"model.norm.weight": (3, NAN)})))
    assert (report["first"]["module"], report["first"]["weights"]) == ("model.norm", ["model.norm.weight"])


@pytest.mark.parametrize("full", [False, True])
def test_a_head_is_named_though_only_its_weight_is_used(base, full):
    loss_fn = load(base(), full=full)
    assert loss_fn.plain is None, "the head is never called"
    with torch.no_grad():
        module(loss_fn, "lm_head").weight[200, 7] = NAN
    report, _ = run(loss_fn)
    assert (report["first"]["module"], report["first"]["weights"]) == ("lm_head", ["lm_head.weight"])


def test_a_matrix_of_the_adapter_is_named(base):
    loss_fn = load(base())
    with torch.no_grad():
        module(loss_fn, "model.layers.0.self_attn.o_proj.lora_B").default.weight[1, 1] = float("inf")
    report, line = run(loss_fn)
    name = "model.layers.0.self_attn.o_proj.lora_B"
    assert (report["first"]["module"], report["first"]["weights"]) == (name, [f"{name}.weight"])
    assert "a lower train.lr if training made them so" in line


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_embedding_that_one_record_uses_names_that_record_alone(base, checkpointing):
    folder = base(changes={"model.embed_tokens.weight": ((RARE, 0), NAN)})
    step = (STEP[0], put(STEP[1], "rows.jsonl:203", RARE))
    report, line = run(load(folder, checkpointing=checkpointing), step=step)
    assert report["first"]["module"] == "model.embed_tokens"
    assert report["records"] == ["rows.jsonl:203"]
    assert report["micro_batches"] == {"all": 2, "not_finite": [2]}
    assert "for rows.jsonl:203; " in line


def test_padding_is_no_record(base):
    report, _ = run(load(base(changes={"model.embed_tokens.weight": ((PAD, 0), NAN)})))
    assert (report["first"]["module"], report["records"]) == ("model.embed_tokens", [PADDING])


def test_before_training_the_canary_names_the_layer(base):
    name = "model.layers.1.self_attn.k_proj"
    loss_fn = load(base(changes={f"{name}.weight": ((0, 0), NAN)}))
    with pytest.raises(RunError, match=f"first in {name}, forward .itself not finite: {name}.weight"):
        isolation_canary(loss_fn.model, vocab_size=512, device="cpu")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loss_fn.modules())


# ----------------------------------------------------------------------------------------------------- in one loss


class BadLoss(nn.Module):
    """The loss of a micro-batch that holds a token is not finite, whatever else is in it."""

    def __init__(self, loss_fn, token, value):
        super().__init__()
        self.loss_fn, self.token, self.value = loss_fn, token, value

    def forward(self, input_ids, position_ids, labels, layout=None):
        loss = self.loss_fn(input_ids, position_ids, labels, layout)
        return loss * self.value if (input_ids == self.token).any() else loss


@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("origins", [["rows.jsonl:102"], ["rows.jsonl:105", "rows.jsonl:201"]])
def test_the_loss_of_one_record_names_that_record_alone(base, origins, value):
    first, second = STEP
    for origin in origins:
        first, second = (put(b, origin, RARE) if origin in b.origins() else b for b in (first, second))
    folder = base(changes={"model.embed_tokens.weight": ((RARE + 1, 0), NAN)})  # no document uses it
    report, line = run(BadLoss(load(folder), RARE, value), step=(first, second))
    assert (report["first"]["module"], report["first"]["direction"]) == ("loss", "forward")
    assert report["first"]["weights"] == []
    assert report["records"] == origins
    assert f"first in loss, forward (output of loss), for {', '.join(origins)}; " in line
    assert "a look at these records" in line


def test_records_that_are_bad_only_together_are_said_to_be(base):
    loss_fn = load(base())
    loss_fn.register_forward_hook(lambda m, args, loss: loss * (INF if args[0].numel() > 40 else 1.0))
    report, line = run(loss_fn)
    assert (report["records"], report["records_together"]) == ([], ALL)
    assert "for no record alone, but for rows.jsonl:101, rows.jsonl:102, rows.jsonl:103 and 6 more together" in line


# ------------------------------------------------------------------------------------------------- in gradients only


class Infinite(torch.autograd.Function):
    """The identity, with one infinite number in its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[-1] = INF
        return gradient


def spoil(part, when=lambda: True):
    """Make a module's gradient infinite while its output stays as it is."""

    def hook(module, args, output):
        if not when():
            return output
        return (Infinite.apply(output[0]), *output[1:]) if isinstance(output, tuple) else Infinite.apply(output)

    part.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("lora", "model.layers.1.mlp.down_proj"),
        ("lora", "model.layers.1.post_attention_layernorm"),
        ("lora", "model.layers.1"),
        ("full, checkpointing", "model.layers.0.self_attn"),
        ("full, checkpointing", "model.layers.1.mlp.down_proj"),
        ("nf4, checkpointing", "model.layers.0.self_attn.v_proj"),
        ("nf4, checkpointing", "model.layers.1.mlp"),
    ],
)
def test_the_layer_whose_gradient_is_not_finite_is_named(base, name, how, monkeypatch):
    monkeypatch.setattr("corefit.engine.loop.SKIP_LIMIT", 3)
    loss_fn = load(base(), **HOW[how])
    spoil(module(loss_fn, name))
    report, line = run(loss_fn)
    assert (report["cause"], report["in_a_row"], len(report["scales"])) == ("non_finite_gradients", 3, 3)
    assert (report["first"]["module"], report["first"]["direction"]) == (name, "backward")
    assert report["first"]["weights"] == []
    assert "step 3: the gradients of 3 steps in a row are not finite" in line
    assert f"first in {name}, backward (gradient of " in line


def test_a_layer_is_named_where_nothing_but_the_gradient_of_its_weight_is_not_finite(base, monkeypatch):
    monkeypatch.setattr("corefit.engine.loop.SKIP_LIMIT", 1)
    loss_fn, name = load(base(), full=True), "model.layers.0.mlp.gate_proj"
    module(loss_fn, name).weight.register_hook(lambda gradient: gradient * INF)
    first = run(loss_fn)[0]["first"]
    assert (first["module"], first["direction"], first["tensor"]) == (name, "backward", f"gradient of weight of {name}")


def test_a_gradient_that_one_record_spoils_names_that_record_alone(base):
    loss_fn, seen = load(base()), []
    loss_fn.register_forward_pre_hook(lambda m, args: seen.append(bool((args[0] == RARE).any())))
    spoil(module(loss_fn, "model.layers.0.mlp"), when=lambda: seen[-1])
    report, _ = run(loss_fn, step=(put(STEP[0], "rows.jsonl:104", RARE), STEP[1]))
    assert report["first"]["module"] == "model.layers.0.mlp"
    assert report["records"] == ["rows.jsonl:104"]
    assert report["micro_batches"] == {"all": 2, "not_finite": [1]}


def test_a_norm_that_overflows_while_each_gradient_is_finite_is_said_so(base):
    loss_fn = load(base())
    loss_fn.register_forward_hook(lambda m, args, loss: loss * 1e30 if loss.requires_grad else loss)
    report, line = run(loss_fn)
    assert report["first"] is None
    assert "every gradient of the replay is finite, only their norm is not; no weight was changed" in line


# --------------------------------------------------------------------------------------------------------- in fp16


def test_an_output_beyond_float16_is_named_and_a_wider_precision_proposed(base):
    name = "model.layers.1.mlp.down_proj"
    folder = base(changes={f"{name}.weight": (slice(None), 2e4)})
    report, line = run(load(folder, dtype="float16"), dtype="float16", scale=True)
    assert (report["first"]["module"], report["first"]["direction"]) == (name, "forward")
    assert (report["first"]["dtype"], report["first"]["weights"]) == ("float16", [])
    assert report["first"]["values"]["inf"] > 0
    assert "what may help: --set train.precision=bf16 or fp32" in line
    assert "(loss scale 65536)" in line
    with torch.no_grad():
        assert all(
            torch.isfinite(load(folder)(*map(torch.from_numpy, (b.input_ids, b.position_ids, b.labels)))) for b in STEP
        )


def test_gradients_that_only_the_loss_scale_makes_overflow_are_met_again_in_the_replay(base, monkeypatch):
    monkeypatch.setattr("corefit.engine.loop.SKIP_LIMIT", 2)
    loss_fn = load(base(), dtype="float16")
    with torch.no_grad():
        module(loss_fn, "lm_head").weight.mul_(64)
    report, line = run(loss_fn, dtype="float16", scale=True)
    assert (report["cause"], report["loss_scale"]) == ("non_finite_gradients", 32768.0)
    assert report["scales"] == [
        {"step": 1, "loss_scale": 65536.0, "cause": "non_finite_gradients"},
        {"step": 2, "loss_scale": 32768.0, "cause": "non_finite_gradients"},
    ]
    assert report["first"]["direction"] == "backward"
    assert report["first"]["module"].startswith("model.")
    assert "(loss scale 32768)" in line


def test_attention_that_is_not_finite_is_named_between_its_projections(base, monkeypatch):
    loss_fn = load(base(), full=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    calls = []

    def second_layer_fails(*args, **kwargs):
        calls.append(1)
        return attend(*args, **kwargs) * (float("nan") if len(calls) % 2 == 0 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", second_layer_fails)
    report, _ = run(loss_fn)
    assert (report["first"]["module"], report["first"]["direction"]) == ("model.layers.1.self_attn", "forward")


# --------------------------------------------------------------------------------------------------- the replay itself


@pytest.mark.parametrize("how", ["lora", "full", "nf4, checkpointing"])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_replay_leaves_everything_as_it_was_to_the_bit(base, how, poison, monkeypatch):
    monkeypatch.setattr("corefit.engine.loop.SKIP_LIMIT", 2)
    loss_fn = load(base(), **HOW[how])
    bad = BadLoss(loss_fn, RARE, NAN)
    if poison == "gradient":
        spoil(module(loss_fn, "model.layers.0.mlp"), when=lambda: armed)
    parameters = trainable_parameters(bad)
    optimizer, scaler = make_optimizer("adamw", parameters, lr=1e-3), make_scaler("cpu", enabled=True)
    armed = False

    def everything():
        tensors = {f"weight {name}": p for name, p in bad.named_parameters()}
        tensors |= {f"buffer {name}": b for name, b in bad.named_buffers()}
        for name, p in parameters.items():
            tensors |= {f"{name} {k}": torch.as_tensor(v) for k, v in optimizer.state[p].items()}
        tensors["random"] = torch.get_rng_state()
        plain = [
            scaler.state_dict(),
            [m.training for m in bad.modules()],
            [p.grad for p in bad.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bad.modules()],
            [len(p._backward_hooks or ()) for p in parameters.values()],
        ]
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}, plain

    seen = []

    def steps():
        nonlocal armed
        yield STEP
        yield STEP
        if poison == "gradient":
            armed = True
            yield from [STEP] * 2
        yield (STEP[0], put(STEP[1], "rows.jsonl:204", RARE))

    with pytest.raises(NonFiniteError) as error:
        train(
            loss_fn=bad,
            steps=steps(),
            parameters=parameters,
            optimizer=optimizer,
            scaler=scaler,
            lr_at=lambda progress: 1e-3,
            state=LoopState(),
            compute_dtype=torch.float16,
            on_step=lambda report: seen.append(everything()),
        )
    assert error.value.report["replay"] == "the replay found it"
    (tensors, plain), (after, plain_after) = seen[-1], everything()
    assert tensors.keys() == after.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, after[name])] == []
    assert plain == plain_after


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("of", ["loss", "gradients"])
def test_the_replay_draws_the_same_random_numbers(base, checkpointing, of, monkeypatch):
    """The second micro-batch, behind the dropout of the first, is not finite for one draw only."""
    monkeypatch.setattr("corefit.engine.loop.SKIP_LIMIT", 1)

    class Unlucky(BadLoss):
        draws = None

        def forward(self, input_ids, position_ids, labels, layout=None):
            loss = self.loss_fn(input_ids, position_ids, labels, layout)
            self.draws = [*(self.draws or ()), float(torch.rand(()))]
            bad = self.draws[-1] in self.draws[1:2]
            return (loss * self.value if of == "loss" else Infinite.apply(loss)) if bad else loss

    torch.manual_seed(5)
    report, _ = run(Unlucky(load(base(), checkpointing=checkpointing), RARE, NAN))
    assert report["first"]["module"] == "loss"
    assert report["micro_batches"]["not_finite"] == [2]


def test_a_replay_that_finds_nothing_says_so():
    run, once = make_run(), iter([float("nan")])
    run.model.register_forward_hook(lambda m, args, loss: loss * next(once, 1.0))
    with pytest.raises(
        NonFiniteError, match="step 1: the loss is not finite .*: the replay found nothing; no w"
    ) as error:
        run.train(make_steps(3), epochs=1)
    assert (error.value.report["first"], error.value.report["records"]) == (None, [])
    assert "points to the device" in str(error.value)


def test_a_replay_that_fails_does_not_hide_why_the_run_stopped():
    run = make_run()

    def fail(module, args, output):
        if module._forward_pre_hooks:  # only a replay has any
            raise RuntimeError("no memory left\nfor this")

    run.model.register_forward_hook(fail)
    with pytest.raises(NonFiniteError, match="the replay failed: RuntimeError: no memory left; no weight was") as error:
        run.train(make_steps(3, poison={1: POISON_LOSS}), epochs=1)
    assert error.value.report["first"] is None
    assert [p.grad for p in run.parameters.values()] == [None, None]


def test_a_score_of_minus_infinity_on_the_way_makes_no_micro_batch_bad(base):
    class Masked(BadLoss):
        def forward(self, input_ids, position_ids, labels, layout=None):
            return super().forward(input_ids, position_ids, labels, layout) + self.scores(torch.zeros(3)).exp().sum()

    loss_fn = Masked(load(base()), RARE, NAN)
    loss_fn.scores = nn.Threshold(1.0, -float("inf"))
    report, _ = run(loss_fn, step=(STEP[0], put(STEP[1], "rows.jsonl:203", RARE)))
    assert report["micro_batches"]["not_finite"] == [2]
    assert report["records"] == ["rows.jsonl:203"]


def test_a_mask_of_minus_infinity_is_an_input_like_any_other():
    class Attention(nn.Module):
        def forward(self, x, attention_mask):
            return (x + attention_mask).softmax(-1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.after = Attention(), nn.Identity()

        def forward(self, x):
            return self.after(self.attention(x, attention_mask=torch.full((4,), -INF)))

    with Watch(Block()) as watch:
        watch.root(torch.zeros(4))
    assert watch.first["forward"]["module"] == "attention", "a row without any key"


def test_documents_are_cut_at_their_bounds_and_named():
    found = [(list(d.input_ids[0]), list(d.labels[0]), list(d.position_ids[0]), o) for d, o in documents(STEP[0])]
    assert [o for *_, o in found] == [
        *("rows.jsonl:101", "rows.jsonl:102", "rows.jsonl:103", PADDING),
        *("rows.jsonl:104", "rows.jsonl:105", PADDING),
    ]
    assert sum([ids for ids, *_ in found], []) == STEP[0].input_ids.reshape(-1).tolist()
    assert sum([labels for _, labels, *_ in found], []) == STEP[0].labels.reshape(-1).tolist()
    assert all(positions == list(range(len(positions))) for *_, positions, _ in found)
    full = make_batch(4, (16, 16), (32,))
    assert [o for _, o in documents(full)] == list(full.origins()), "no padding at all"


def test_a_scale_that_is_not_finite_is_seen_where_each_rank_has_a_share_of_the_weight(base):
    model = load(base(), quantizer="nf4")
    layer = next(module for module in model.modules() if type(module).__module__ == "bitsandbytes.nn.modules")
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)  # which knows no scales
    assert not_finite(layer) == []
    layer.quant_state.offset.fill_(NAN)
    assert not_finite(layer) == ["weight"]


def test_weights_that_are_not_finite_are_not_saved():
    parameters = {"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.tensor([1.0, float("nan")]))}
    with pytest.raises(NonFiniteError, match="step 7: weights are not finite after its update: b; ") as error:
        require_finite(7, parameters)
    assert error.value.report["weights"] == ["b"]
    require_finite(7, {"a": parameters["a"]})
