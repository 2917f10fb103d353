from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import write_model

from corefit.engine import attention
from corefit.engine.attention import decoder, isolation_canary
from corefit.engine.model import AdapterSpec, attach_adapter, load_base
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
            lambda part, ids, positions: part(**change(dict(input_ids=ids, position_ids=positions, use_cache=False))),
        )
    with pytest.raises(IsolationError, match="see each other") as caught:
        canary(model)
    assert ("use_cache=True" if wrong == "use_cache" else "attention_mask") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_positions_that_do_not_restart_stop_the_run(tmp_path, monkeypatch):
    model = loaded(write_model(tmp_path))
    run = attention.run_packed
    straight = torch.arange(48).expand(2, 48)
    monkeypatch.setattr(attention, "run_packed", lambda part, ids, positions: run(part, ids, straight))
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
