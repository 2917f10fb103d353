from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch
from tiny import write_model
from tiny_families import FAMILIES, write_family

from corefit.engine import attention
from corefit.engine.adapter import AdapterSpec, attach_adapter
from corefit.engine.attention import PACKED, Layout, choose_route, decoder, isolation_canary, run_packed
from corefit.engine.evaluate import Memory, generate, stream
from corefit.engine.model import causal_lm, enable_gradient_checkpointing, load_base
from corefit.errors import IsolationError, RunError
from corefit.types import Quantizer

torch.set_num_threads(1)
NONE = Quantizer(name="none", summary="as stored", config=lambda compute_dtype: None)


def int8(compute_dtype):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def loaded(folder, quantizer=NONE, compute_dtype="float32", adapter=True):
    model = load_base(str(folder), quantizer=quantizer, compute_dtype=compute_dtype, device="cpu")
    return attach_adapter(model, AdapterSpec(r=4, alpha=8, dropout=0.1) if adapter else None, seed=0)


canary = partial(isolation_canary, vocab_size=512, device="cpu")
route = partial(choose_route, vocab_size=512, device="cpu")
BY_DOCUMENT = "attention: document by document"
LENGTHS = (5, 21, 1, 5, 19, 13)
"""Of documents: two rows of 32, each with an end that is its last document."""


def family(folder, kind, **more):
    """A loaded model of a family with an adapter that does something."""
    found = next(f for f in FAMILIES if f.kind == kind)
    model = loaded(write_family(folder, found._replace(config={**found.config, **more})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def packed_and_alone(model, lengths=LENGTHS):
    """Logits and gradients of documents in two rows of 32, and of each document by the model's plain forward."""
    torch.manual_seed(0)
    documents = [torch.randint(512, (n,)) for n in lengths]
    ids = torch.cat(documents).view(2, 32)
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 32)
    weights = torch.randn(64, 512)
    layout = Layout.of(np.cumsum([0, *lengths], dtype=np.int32))
    logits = run_packed(causal_lm(model), ids, positions, layout).logits.flatten(0, 1)
    (logits * weights).sum().backward()
    packed = gradients(model)
    alone = torch.cat([model(input_ids=one[None], use_cache=False).logits[0] for one in documents])
    (alone * weights).sum().backward()
    return (logits.detach(), packed), (alone.detach(), gradients(model))


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def difference(one, other):
    """The largest difference of logits and of gradients, each relative to the largest value."""
    values = [(one[0], other[0]), *((one[1][name], other[1][name]) for name in other[1])]
    assert one[1].keys() == other[1].keys() and len(one[1]) > 10
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in values)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "internlm", "internlm2", "internlm3", "mistral", "gemma3_text"]
)
def test_documents_of_a_pack_get_what_each_gets_alone(tmp_path, kind, checkpointing):
    if kind == "internlm3":
        pytest.importorskip("transformers.models.internlm3")
    model = family(tmp_path, kind)
    if checkpointing:
        enable_gradient_checkpointing(model)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    assert difference(*packed_and_alone(model)) < 1e-5
    assert route(model) == BY_DOCUMENT
    packed, alone = packed_and_alone(model)
    assert difference(packed, alone) < 1e-5
    assert canary(model) == 0.0


def test_roundings_of_bf16_are_no_reason_to_fall_back(tmp_path):
    model = loaded(write_model(tmp_path), compute_dtype="bfloat16")
    bf16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    assert route(model, autocast=bf16) == BY_DOCUMENT
    assert canary(model, autocast=bf16) == 0.0


@pytest.mark.parametrize("wrong", ["joined", "shifted", "lost"])
def test_wrong_bounds_stop_the_run(tmp_path, monkeypatch, wrong):
    model = family(tmp_path, "llama")
    assert route(model) == BY_DOCUMENT
    run = attention.DocumentAttention.apply

    def change(q, k, v, bounds, *rest):
        changed = {"joined": [0, *bounds[2:]], "shifted": [0, *(n + 1 for n in bounds[1:-1]), bounds[-1]]}
        return run(q, k, v, changed.get(wrong, [0, bounds[-1]]), *rest)

    monkeypatch.setattr(attention.DocumentAttention, "apply", change)
    assert difference(*packed_and_alone(model)) > 1e-2
    with pytest.raises(IsolationError, match="cu_seq_lens_q doesn't tell attention where documents end"):
        canary(model)


@pytest.mark.parametrize(
    "kind, why",
    [
        ("gemma2", "the model was loaded with eager attention|its attention has softcap"),  # before transformers 5.2x
        ("stablelm", "doesn't hand cu_seq_lens_q on"),
    ],
)
def test_what_it_can_not_serve_keeps_its_own_attention_and_says_why(tmp_path, kind, why):
    model = family(tmp_path, kind)
    before = causal_lm(model).config._attn_implementation
    said = route(model)
    assert said.startswith(f"attention: {before} with a mask of each pack") and "\n" not in said
    assert re.search(why, said)
    assert causal_lm(model).config._attn_implementation == before != PACKED
    assert canary(model) == 0.0


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda args, more: (args, more | {"s_aux": torch.ones(4)}), "s_aux"),
        (lambda args, more: (args, more | {"softcap": 50.0}), "softcap"),
        (lambda args, more: (args, more | {"scaling": 0.1}), "doesn't give what"),
        (lambda args, more: (args, more | {"sliding_window": 8}), "doesn't give what"),
    ],
)
def test_attention_that_does_more_or_other_things_is_found_out(tmp_path, monkeypatch, change, why):
    model, ours = family(tmp_path, "llama"), attention.packed_attention

    def changed(*args, **more):
        args, more = change(args, more)
        return ours(*args, **more)

    monkeypatch.setattr(attention, "packed_attention", changed)
    assert why in route(model)
    assert causal_lm(model).config._attn_implementation == "sdpa"


def test_a_window_that_attention_is_not_told_of_is_found_out(tmp_path):
    model = family(tmp_path, "llama")
    causal_lm(model).config.sliding_window = 4096  # longer than any document of the check
    assert "doesn't tell its attention of sliding windows" in route(model)


def test_layers_of_another_kind_are_found_out(tmp_path):
    model = family(tmp_path, "llama")
    causal_lm(model).config.layer_types = ["chunked_attention", "full_attention"]
    assert "layers of chunked_attention" in route(model)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_scores_are_fp32_under_autocast(dtype, tolerance):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 50, 64) for heads in (4, 2, 2))
    q, k, v = ((x + shift).to(dtype).float() for x, shift in ((q * 6, 100), (k, 100), (v, 0)))  # of up to 80,000
    bounds = torch.tensor([0, 17, 50], dtype=torch.int32)
    given = (None, q, k, v, None, 0.0, 0.125, None, bounds, 33)
    exact, _ = attention.packed_attention(*given)
    with torch.autocast("cpu", dtype=dtype):
        ours, _ = attention.packed_attention(*given)
    assert ours.dtype == dtype
    assert float((ours.float() - exact).norm() / exact.norm()) < tolerance


def test_bounds_must_cover_the_slots():
    x = torch.randn(1, 2, 50, 8)
    for bounds in ([0, 20, 40], [10, 50], [0, 60]):
        with pytest.raises(ValueError, match="documents from"):
            attention.packed_attention(None, x, x, x, None, cu_seq_lens_q=torch.tensor(bounds), max_length_q=30)


def test_attention_with_dropout_stays_transformers(tmp_path):
    model = family(tmp_path, "llama", attention_dropout=0.5)
    assert "its attention has dropout" in route(model)
    ids, positions = torch.arange(32)[None], torch.arange(32)[None] % 16
    with torch.no_grad():
        calm = [run_packed(model, ids, positions).logits for _ in range(2)]
        for module in model.modules():
            module.training = hasattr(module, "attention_dropout")
        wild = [run_packed(model, ids, positions).logits for _ in range(2)]
    assert torch.equal(*calm) and not torch.equal(*wild) and not torch.equal(calm[0], wild[0])
    causal_lm(model).set_attn_implementation(PACKED)
    with pytest.raises(attention.LostBounds, match="dropout"):
        run_packed(model, ids, positions)
    for rate, why in ((0.0, ""), (0.1, "its attention has dropout")):  # as persimmon has it
        other = causal_lm(family(tmp_path / str(rate), "llama"))
        other.get_decoder().layers[0].self_attn.attention_dropout = torch.nn.Dropout(rate)
        assert attention._why_not(other, "sdpa") == why


def test_answers_are_those_of_sdpa(tmp_path):
    model = family(tmp_path, "mistral")  # a window of 16, which prompt and answer exceed

    def answers():
        memory, turns = Memory(), []
        for prompt in ([7] * 3 + list(range(20)), [7] * 3 + list(range(20)) + list(range(60, 80))):
            turns.append(list(stream(model, prompt, max_tokens=6, memory=memory)))
        return turns, generate(model, list(range(30)), stop_ids=[], max_tokens=20).ids

    before = answers()
    assert route(model) == BY_DOCUMENT
    assert answers() == before


def test_the_layout_is_found_from_positions_where_it_is_not_given(tmp_path):
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]])
    bounds, longest, _ = Layout.at(positions)
    assert bounds.tolist() == [0, 3, 5, 6, 10, 12] and bounds.dtype == torch.int32 and longest == 4
    assert Layout.at(positions[:, 1:]).cu_seqlens.tolist() == [0, 2, 4, 5, 8, 10]  # every row begins one


@pytest.mark.parametrize("kind", ["llama", "llama_bias", "qwen2", "qwen3"])
def test_isolated_models_pass_with_no_difference_at_all(tmp_path, kind):
    assert canary(loaded(write_model(tmp_path, kind=kind))) == 0.0


def test_isolated_under_autocast_and_with_eager_attention(tmp_path):
    model = loaded(write_model(tmp_path), compute_dtype="bfloat16")
    bf16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    assert canary(model, autocast=bf16) == 0.0
    model.get_base_model().set_attn_implementation("eager")
    assert canary(model, autocast=bf16) == 0.0


@pytest.mark.parametrize("where", ["decoder", "run_packed"])
@pytest.mark.parametrize("wrong", ["use_cache", "mask"])
def test_a_forced_cache_or_a_mask_of_ones_stops_the_run(tmp_path, monkeypatch, wrong, where):
    model = loaded(write_model(tmp_path))

    def change(kwargs):
        if wrong == "use_cache":
            return {**kwargs, "use_cache": True}
        return {**kwargs, "attention_mask": torch.ones_like(kwargs["position_ids"])}

    if where == "decoder":
        decoder(model).register_forward_pre_hook(lambda module, args, kwargs: (args, change(kwargs)), with_kwargs=True)
    else:
        monkeypatch.setattr(
            attention,
            "run_packed",
            lambda part, ids, positions, layout: part(
                **change(dict(input_ids=ids, position_ids=positions, use_cache=False))
            ),
        )
    with pytest.raises(IsolationError, match="see each other") as caught:
        canary(model)
    assert ("use_cache=True" if wrong == "use_cache" else "attention_mask") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_positions_that_do_not_restart_stop_the_run(tmp_path, monkeypatch):
    model = loaded(write_model(tmp_path))
    run = attention.run_packed
    straight = torch.arange(48).expand(2, 48)
    monkeypatch.setattr(attention, "run_packed", lambda part, ids, positions, layout: run(part, ids, straight, layout))
    with pytest.raises(IsolationError):
        canary(model)


def test_a_leak_between_the_rows_of_a_batch_stops_the_run(tmp_path):
    model = loaded(write_model(tmp_path))
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out + 1e-3 * out.mean(0, keepdim=True))
    with pytest.raises(IsolationError):
        canary(model)


def test_a_model_that_ignores_its_tokens_proves_nothing(tmp_path):
    model = loaded(write_model(tmp_path))
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: torch.ones_like(out))
    with pytest.raises(IsolationError, match="proves nothing"):
        canary(model)


def test_outputs_that_are_not_finite_are_named(tmp_path):
    model = loaded(write_model(tmp_path))
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(RunError, match="aren't finite"):
        canary(model)


def test_modes_random_state_and_gradients_are_left_alone(tmp_path):
    model = loaded(write_model(tmp_path))
    frozen = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    frozen.eval()  # a mode of its own, below modules in train mode
    modes = {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    random = torch.get_rng_state()
    canary(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_8_bit_model_with_outliers_passes_and_keeps_its_threshold(tmp_path):
    model = loaded(write_model(tmp_path), Quantizer(name="int8", summary="8 bits", config=int8))
    states = [module.state for module in model.modules() if hasattr(getattr(module, "state", None), "threshold")]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(3)  # activations beyond 6, where LLM.int8 treats columns apart
    assert canary(model) == 0.0
    assert {state.threshold for state in states} == {6.0}
    with pytest.raises(IsolationError):  # and a real leak is still seen
        decoder(model).register_forward_pre_hook(lambda m, a, k: (a, {**k, "use_cache": True}), with_kwargs=True)
        canary(model)


def test_full_fine_tuning_passes_too(tmp_path):
    assert canary(loaded(write_model(tmp_path), adapter=False)) == 0.0
