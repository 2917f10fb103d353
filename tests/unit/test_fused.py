from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny import write_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from corefit.engine import fused as engine
from corefit.engine.adapter import AdapterSpec, attach_adapter
from corefit.engine.attention import choose_route
from corefit.engine.fused import BLOCK, SCORES, SIZES, DocumentAttention, LoraLinear, RMSNorm, SwiGLU, fuse_lora
from corefit.engine.loss import CausalLoss
from corefit.engine.model import load_base
from corefit.registry import Registry
from corefit.types import Quantizer

torch.set_num_threads(1)
NONE = Quantizer(name="none", summary="as stored", config=lambda compute_dtype: None)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BF16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def network(folder, *, dtype="float32", dropout=0.0, kind="llama_bias", quantizer="none", **more):
    found = Registry.load().quantizer(quantizer)
    base = load_base(str(write_model(folder, kind=kind)), quantizer=found, compute_dtype=dtype, device="cpu")
    model = attach_adapter(base, AdapterSpec(r=4, alpha=12, dropout=dropout, **more), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def unfused(model):
    """The same model with peft's own forward."""
    other = copy.deepcopy(model)
    for module in other.modules():
        module.__dict__.pop("forward", None)
    return other


def logits_and_gradients(model, autocast=torch.no_grad, seed=0):
    torch.manual_seed(seed)
    with autocast() if autocast is not torch.no_grad else torch.enable_grad():
        logits = model(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits
    logits.float().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"logits": logits.detach().float(), **found}


def difference(one, other):
    assert one.keys() == other.keys() and len(one) > 10
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


def fused(model):
    """How many modules have another forward, plain linear layers aside."""
    return sum("forward" in module.__dict__ and type(module) is not nn.Linear for module in model.modules())


@pytest.mark.parametrize("quantizer", ["none", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_operation_gives_what_peft_gives(tmp_path, dropout, quantizer):
    model = network(tmp_path, dropout=dropout, quantizer=quantizer)
    assert fused(model) == 21  # 14 layers, 5 norms, 2 MLPs
    assert difference(logits_and_gradients(model), logits_and_gradients(unfused(model))) < 1e-5
    model.eval()
    assert difference(logits_and_gradients(model), logits_and_gradients(unfused(model))) < 1e-5


def test_a_weight_of_4_bits_may_have_lost_its_state(tmp_path, monkeypatch):
    """A rank's share of one has none; its layer has."""
    import bitsandbytes

    model, calls = network(tmp_path, quantizer="nf4"), []
    before = logits_and_gradients(model)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight = torch.nn.Parameter(module.weight.data, requires_grad=False)
    apply = LoraLinear.apply
    monkeypatch.setattr(LoraLinear, "apply", lambda *given: calls.append(1) or apply(*given))
    after = logits_and_gradients(model)
    assert len(calls) == 14
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_in_bf16_it_is_within_a_rounding(tmp_path):
    model = network(tmp_path, dtype="bfloat16")
    exact = {name: value.float() for name, value in logits_and_gradients(unfused(model).float()).items()}
    ours, theirs = (logits_and_gradients(m, BF16) for m in (model, unfused(model)))
    assert all(value.dtype == torch.float32 for value in ours.values())
    assert difference(ours, exact) < 1.2 * difference(theirs, exact) < 0.1


class Products(TorchDispatchMode):
    """Notes in what many rows are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        if operation.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "linear", "matmul"):
            self.dtypes |= {x.dtype for x in given if isinstance(x, torch.Tensor)}
        return operation(*given, **named or {})


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize(
    "dtype, native, products",
    [("bfloat16", True, "bfloat16"), ("bfloat16", False, "float32"), ("float16", True, "float32")],
)
def test_numbers_that_a_cpu_cant_multiply_are_multiplied_in_fp32(tmp_path, monkeypatch, dtype, native, products, full):
    monkeypatch.setattr(engine, "cpu_has_bf16", lambda: native)
    base = load_base(str(write_model(tmp_path)), quantizer=NONE, compute_dtype=dtype, device="cpu")
    model = attach_adapter(base, None if full else AdapterSpec(r=4, alpha=12, dropout=0.3), seed=0)
    saying = choose_route(model, vocab_size=64, device="cpu", autocast=partial(torch.autocast, "cpu", DTYPES[dtype]))
    assert saying == "attention: document by document"
    loss_fn, ids, kept = CausalLoss(model), torch.arange(64).view(2, 32), []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights and x.numel() >= 64 * 16:
            kept.append(x.dtype)
        return x

    with torch.autocast("cpu", DTYPES[dtype]), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss_fn.probe()
        with Products() as forward:
            loss = loss_fn(ids, ids % 16, ids)
    with Products() as backward:
        loss.backward()
    for seen in (forward, backward):  # scores of attention are fp32 in any case
        assert seen.dtypes | {torch.float32} == {DTYPES[products], torch.float32}
    assert full or kept.count(torch.float32) <= 1  # what the loss keeps: the gradient of hidden states
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_few_rows_are_multiplied_as_they_are():
    """A copy of a weight costs more than the product with a token or two."""
    assert engine.fast_dtype("cpu", torch.float16, 1) == torch.float16
    assert engine.fast_dtype("cpu", torch.float16) == torch.float32
    assert engine.fast_dtype("cuda", torch.float16) == torch.float16
    assert engine.fast_dtype("cpu", torch.float64) == torch.float64


@pytest.mark.parametrize("bias", [True, False])
def test_a_wide_linear_layer_gives_what_a_linear_layer_gives(monkeypatch, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(3, 8, 24, requires_grad=True)
    half = x.detach().bfloat16().requires_grad_()
    monkeypatch.setattr(engine, "cpu_has_bf16", lambda: False)
    wide = nn.ModuleList([copy.deepcopy(layer)])
    engine.fuse_linears(wide)
    layer(x).square().sum().backward()
    with BF16():
        made = wide[0](half)
    assert made.dtype == torch.bfloat16
    made.float().square().sum().backward()
    wanted, found = ([a.grad, *(p.grad for p in b.parameters())] for a, b in ((x, layer), (half, wide[0])))
    for one, other in zip(wanted, found, strict=True):
        assert float((one - other.float()).norm() / one.norm()) < 0.01


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    shapes = [(2, 3, 5), (2, 3, 5), (7, 5), (7,), (2, 5), (7, 2)]
    x, dropped, weight, bias, a, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    for one in (x, dropped, a, b):
        one.requires_grad_()

    def run(*tensors):
        return LoraLinear.apply(*tensors, 1.5)

    # fp32 gradients of a and b, whatever they are: hence the tolerance
    assert torch.autograd.gradcheck(run, (x, dropped, weight, bias, a, b), atol=1e-5, rtol=1e-4)
    assert torch.autograd.gradcheck(run, (x, None, weight, None, a, b), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", [RMSNorm.apply, lambda x, weight, e: F.rms_norm(x, weight.shape, weight, e)])
def test_gradients_of_the_norm_are_those_of_finite_differences(norm):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    norm(x.float(), weight.float(), 1e-3).square().sum().backward()
    ours, x.grad = x.grad, None
    (weight * x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt()).square().sum().backward()
    assert float((ours - x.grad).abs().max()) < 1e-5


def test_on_a_gpu_the_norm_is_one_operation(tmp_path, monkeypatch):
    model, calls, rms_norm = network(tmp_path, dtype="bfloat16"), [], F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *given: calls.append(given[2].dtype) or rms_norm(*given))
    ours = logits_and_gradients(model, BF16)
    assert not calls
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    same = logits_and_gradients(model, BF16)
    assert calls == [torch.bfloat16] * 5 and difference(same, ours) < 0.02


def test_gradients_of_the_mlp_are_those_of_finite_differences():
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))


def attention(q, k, v, bounds, scale, window):
    """The definition, a document after the other."""
    outputs, shared = [], q.shape[1] // k.shape[1]
    for begin, end in itertools.pairwise(bounds):
        one, keys, values = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        keys, values = (x.repeat_interleave(shared, 0) for x in (keys, values))
        seen = torch.ones(end - begin, end - begin, dtype=torch.bool).tril().triu(1 - (window or end))
        scores = (one @ keys.mT * scale).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("window", [None, 1, 5, BLOCK, BLOCK + 3])
def test_attention_of_documents_is_attention(heads, groups, dtype, tolerance, window):
    torch.manual_seed(0)
    lengths = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7]
    bounds = [0, *itertools.accumulate(lengths)]
    sizes = ((heads, 8), (groups, 8), (groups, 5), (heads, 5))
    q, k, v, given = (torch.randn(bounds[-1], *size).to(dtype) for size in sizes)
    results = []
    for function, cast in ((attention, torch.float64), (DocumentAttention.apply, dtype)):
        tensors = [x.to(cast).requires_grad_() for x in (q, k, v)]
        out = function(*tensors, bounds, 0.7, window)
        results.append([out.detach(), *torch.autograd.grad(out, tensors, given.to(cast))])
    for exact, ours in zip(*results, strict=True):
        assert ours.dtype == dtype
        rounding = torch.finfo(torch.float32).eps * float(given.norm())  # where the gradient is 0: one slot is seen
        assert float((ours.double() - exact).norm()) <= tolerance * float(exact.norm()) + rounding


@pytest.mark.parametrize("window", [None, 40])
def test_few_sizes_reach_onednn(monkeypatch, window):
    """It keeps kernels for every size: 1.4 GiB after 100 packs of documents at their own lengths."""
    sizes, bmm = set(), torch.bmm

    def watched(one, other):
        sizes.update((*one.shape[1:], other.shape[2]))
        return bmm(one, other)

    monkeypatch.setattr(torch, "bmm", watched)
    for lengths in (range(1, 16), range(1, 24), range(1, 60), (1, 2_500), (77, 2_000)):
        bounds = [0, *itertools.accumulate(lengths)]
        q, k, v = (torch.randn(bounds[-1], heads, 8, requires_grad=True) for heads in (2, 1, 1))
        DocumentAttention.apply(q, k, v, bounds, 0.7, window).sum().backward()
    assert sizes <= {8, 2 * 64, 2 * BLOCK, *SIZES} and len(sizes) <= 24, sizes


@pytest.mark.parametrize("scores, most", [(1, 64), (2 * 64**2, 128), (11 * 64**2, 256), (SCORES, 768)])
def test_heads_are_worked_on_together_where_their_scores_are_few(monkeypatch, scores, most):
    monkeypatch.setattr(engine, "SCORES", scores)
    engine._kept_blocks.cache_clear()
    torch.manual_seed(0)
    seen, bounds, bmm = set(), [0, 20, 64], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda one, other: seen.add(len(one) * one.shape[1]) or bmm(one, other))
    tensors = [torch.randn(64, heads, 8, requires_grad=True) for heads in (12, 3, 3)]
    results = []
    for function in (DocumentAttention.apply, attention):
        out = function(*tensors, bounds, 0.7, None)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert max(seen) == most  # rows of scores: 64 a head
    assert max(float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(*results, strict=True)) < 2e-6


def test_attention_in_bf16_is_about_as_exact_as_torchs_own():
    torch.manual_seed(0)
    q, k, v, given = (torch.randn(480, heads, 64).bfloat16() for heads in (6, 2, 2, 6))

    def torchs(q, k, v, *_):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True)[0].transpose(0, 1)

    results = []
    for function, cast in ((attention, torch.float64), (DocumentAttention.apply, q.dtype), (torchs, q.dtype)):
        tensors = [x.to(cast).requires_grad_() for x in (q, k, v)]
        results.append(torch.autograd.grad(function(*tensors, [0, 480], 0.125, None), tensors, given.to(cast)))
    for exact, ours, theirs in zip(*results, strict=True):
        assert (ours.double() - exact).norm() < 1.2 * (theirs.double() - exact).norm()
        assert (ours.double() - exact).norm() < 0.004 * exact.norm()


@pytest.mark.parametrize("kind, mlps", [("llama", 2), ("gemma", 0), ("phi3", 0), ("internlm2", 2), ("granite", 2)])
def test_mlps_of_another_form_are_left_alone(tmp_path, kind, mlps):
    from tiny_families import FAMILIES, write_family

    found = next(family for family in FAMILIES if family.kind == kind)
    base = load_base(str(write_family(tmp_path, found)), quantizer=NONE, compute_dtype="float32", device="cpu")
    model = attach_adapter(base, AdapterSpec(r=4, alpha=4, dropout=0.0), seed=0)
    assert sum("forward" in m.__dict__ and "MLP" in type(m).__name__ for m in model.modules()) == mlps
    assert difference(logits_and_gradients(model), logits_and_gradients(unfused(model))) < 1e-5


def test_norms_of_another_form_are_left_alone(tmp_path):
    from tiny_families import FAMILIES, write_family

    kinds = {"gemma": 0, "mistral": 5, "qwen3": 9, "phi": 0}
    for kind, norms in kinds.items():
        found = next(family for family in FAMILIES if family.kind == kind)
        base = load_base(
            str(write_family(tmp_path / kind, found)), quantizer=NONE, compute_dtype="float32", device="cpu"
        )
        model = attach_adapter(base, AdapterSpec(r=4, alpha=4, dropout=0.0), seed=0)
        assert sum("forward" in m.__dict__ and "orm" in type(m).__name__ for m in model.modules()) == norms, kind
        assert difference(logits_and_gradients(model), logits_and_gradients(unfused(model))) < 1e-5


@pytest.mark.parametrize("more", [{"dora": True}, {"modules_to_save": ("lm_head",)}, {"rslora": True}])
def test_what_it_does_not_compute_stays_with_peft(tmp_path, more):
    model = network(tmp_path, **more)
    assert fused(model) == (7 if "dora" in more else 21)
    assert difference(logits_and_gradients(model), logits_and_gradients(unfused(model))) < 1e-5


def test_the_adapter_can_be_switched_off_and_merged(tmp_path):
    model, ids = network(tmp_path).eval(), torch.arange(12)[None]
    with torch.no_grad():
        on = model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        model.merge_adapter()
        merged = model(input_ids=ids).logits
        model.unmerge_adapter()
        again = model(input_ids=ids).logits
    assert float((off - on).abs().max()) > 1e-2 > 1e-4 > float((merged - on).abs().max())
    assert float((again - on).abs().max()) < 1e-4


def test_a_layer_of_another_class_is_left_alone(tmp_path):
    model = network(tmp_path)
    for module in model.modules():
        module.__dict__.pop("forward", None)

    class Other(nn.Linear):
        pass

    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.__class__ = Other
    fuse_lora(model)
    assert fused(model) == 0


def test_a_base_as_stored_needs_no_bitsandbytes(tmp_path):
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(write_model.__code__.co_filename.rpartition("/")[0])!r})
        import os
        from pathlib import Path
        sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
        from test_fused import network
        network(Path({str(tmp_path)!r}) / "plain")
        assert "bitsandbytes" not in sys.modules, "imported"
        from corefit.engine.adapter import AdapterSpec, attach_adapter
        from corefit.engine.model import load_base
        from corefit.registry import Registry
        how = dict(quantizer=Registry.load().quantizer("nf4"), compute_dtype="float32", device="cpu")
        base = load_base({str(tmp_path / "plain")!r}, **how)
        model = attach_adapter(base, AdapterSpec(r=4, alpha=4, dropout=0.0), seed=0)
        assert sum(type(module).__name__ == "Linear4bit" for module in model.modules()) == 28
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
