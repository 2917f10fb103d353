from __future__ import annotations

import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from tiny_training import make_run, make_steps
from torch import nn

from corefit.engine.optimizer import (
    OPTIMIZERS,
    load_optimizer_state,
    make_optimizer,
    make_scaler,
    optimizer_notice,
    optimizer_state,
)
from corefit.errors import CheckpointError, RecipeError


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_without_a_warning(name):
    run = make_run(optimizer=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(make_steps(20), epochs=1, lr_at=lambda progress: 1e-2)
    assert run.reports[-1].loss < 0.8 * run.reports[0].loss


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_reach_the_optimizer_and_parameters_are_in_the_order_of_their_names(name):
    parameters = {key: nn.Parameter(torch.zeros(2)) for key in ("b", "a", "c")}
    group = make_optimizer(name, parameters, lr=0.5, betas=(0.8, 0.9), weight_decay=0.25).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.9), 0.25)
    assert [id(p) for p in group["params"]] == [id(parameters[key]) for key in "abc"]


def test_8_bit_state_really_is_8_bits_and_its_tables_are_not_saved():
    run = make_run(optimizer="adamw_8bit")
    run.train(make_steps(1), epochs=1)
    tensors, scalars = optimizer_state(run.optimizer, run.parameters)
    assert sorted(tensors) == [f"lora_{m}/{k}" for m in "AB" for k in ("absmax1", "absmax2", "state1", "state2")]
    assert tensors["lora_A/state1"].dtype == torch.uint8
    assert scalars["values"] == {"lora_A": {"step": 1}, "lora_B": {"step": 1}}
    assert scalars["kind"] == "AdamW8bit"


def test_state_goes_to_the_parameter_of_its_name_whatever_the_order():
    run = make_run()
    run.train(make_steps(2), epochs=1)
    tensors, scalars = optimizer_state(run.optimizer, run.parameters)
    other = {name: nn.Parameter(p.detach().clone()) for name, p in reversed(run.parameters.items())}
    fresh = torch.optim.AdamW(other.values(), weight_decay=0.5)
    assert load_optimizer_state(fresh, other, tensors, scalars) == ""
    for name, parameter in other.items():
        assert torch.equal(fresh.state[parameter]["exp_avg"], run.optimizer.state[run.parameters[name]]["exp_avg"])
    assert fresh.param_groups[0]["weight_decay"] == 0.5  # the recipe's, which may have changed


@pytest.mark.parametrize("before, now", itertools.permutations(OPTIMIZERS, 2))
def test_state_of_another_kind_of_optimizer_is_left_out_with_a_word(before, now):
    parameters = {"a": nn.Parameter(torch.ones(8192))}  # so large that bitsandbytes keeps 8 bits
    old, new = (make_optimizer(name, parameters, lr=0.1) for name in (before, now))

    def step(optimizer):
        parameters["a"].grad = torch.ones(8192)
        optimizer.step()

    step(old)
    said = load_optimizer_state(new, parameters, *optimizer_state(old, parameters))
    assert bool(said) == (before.removeprefix("paged_") != now.removeprefix("paged_"))
    assert not said or ("begin anew" in said and not new.state)
    step(new)
    assert optimizer_state(new, parameters)[1]["kind"] == type(new).__name__.removeprefix("Paged")


@pytest.mark.parametrize("here", ["a GPU", "a CPU"])
def test_on_a_gpu_adamw_is_one_kernel_and_a_resumed_run_goes_by_its_own_device(monkeypatch, here):
    parameters = {"a": nn.Parameter(torch.ones(3))}
    monkeypatch.setattr(nn.Parameter, "is_cuda", here == "a GPU")
    optimizer = make_optimizer("adamw", parameters, lr=0.1)
    assert optimizer.param_groups[0]["fused"] == (True if here == "a GPU" else None)
    parameters["a"].grad = torch.ones(3)
    optimizer.step()
    tensors, scalars = optimizer_state(optimizer, parameters)
    monkeypatch.setattr(nn.Parameter, "device", torch.device("meta"))  # stands for the GPU's memory
    load_optimizer_state(optimizer, parameters, tensors, scalars)
    assert optimizer.param_groups[0]["fused"] == (True if here == "a GPU" else None)
    state = optimizer.state[parameters["a"]]
    moved = {key: value.device.type == "meta" for key, value in state.items()}
    assert moved == {"step": here == "a GPU", "exp_avg": True, "exp_avg_sq": True}


def test_names_with_slashes_and_dots_survive():
    parameters = {"model.layers.0/odd.lora_A": nn.Parameter(torch.ones(3))}
    optimizer = make_optimizer("adamw", parameters, lr=0.1)
    parameters["model.layers.0/odd.lora_A"].grad = torch.ones(3)
    optimizer.step()
    state = optimizer_state(optimizer, parameters)
    load_optimizer_state(optimizer, parameters, *state)
    assert set(optimizer.state[parameters["model.layers.0/odd.lora_A"]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_state_of_a_weight_that_is_not_trained_is_refused():
    parameters = {"a": nn.Parameter(torch.zeros(2))}
    optimizer = make_optimizer("adamw", parameters, lr=0.1)
    with pytest.raises(CheckpointError, match=r"not trained now: b \(1 in all\)"):
        load_optimizer_state(optimizer, parameters, {"b/exp_avg": torch.zeros(2)}, {"values": {}, "groups": [{}]})


def test_paging_that_does_not_happen_is_said():
    assert optimizer_notice("paged_adamw_8bit", "cpu") is not None
    assert optimizer_notice("paged_adamw_8bit", "cuda:0") is None
    assert optimizer_notice("adamw_8bit", "cpu") is None


def test_the_scaler_starts_at_65536_or_does_nothing():
    assert make_scaler("cpu", enabled=True).get_scale() == 65536.0
    off = make_scaler("cpu", enabled=False)
    assert (off.get_scale(), off.state_dict()) == (1.0, {})


def test_bitsandbytes_is_imported_only_where_it_is_used():
    code = (
        "import sys, torch; from corefit.engine.optimizer import make_optimizer as m;"
        "import corefit.engine.loop, corefit.engine.checkpoint;"
        "m('adamw', {'a': torch.nn.Parameter(torch.zeros(2))}, lr=0.1); sys.exit('bitsandbytes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_learning_rates_are_multiplied_by_pattern_and_the_first_one_counts(name):
    parameters = {key: nn.Parameter(torch.ones(4)) for key in ("a.lora_A", "a.lora_B", "b.lora_B", "head")}
    optimizer = make_optimizer(name, parameters, lr=1.0, lr_mult={r"^b\.": 0.5, "lora_B": 16.0})
    of = {id(p): group["lr_mult"] for group in optimizer.param_groups for p in group["params"]}
    assert {key: of[id(p)] for key, p in parameters.items()} == {
        "a.lora_A": 1.0,
        "a.lora_B": 16.0,
        "b.lora_B": 0.5,
        "head": 1.0,
    }
    _, scalars = optimizer_state(optimizer, parameters)
    fresh = make_optimizer(name, parameters, lr=7.0, lr_mult={"lora_B": 4.0})
    load_optimizer_state(fresh, parameters, {}, scalars)
    assert [(g["lr"], g["lr_mult"]) for g in fresh.param_groups] == [
        (7.0, 1.0),
        (7.0, 4.0),
    ]  # the recipe's as it is now
    with pytest.raises(RecipeError, match="'lora_C' is in no name of a trained weight, such as a.lora_A"):
        make_optimizer(name, parameters, lr=1.0, lr_mult={"lora_C": 2.0})
