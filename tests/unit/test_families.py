"""Every family of models that is said to work does: on tiny random models, by the functions that training uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_families import EXPERTS, FAMILIES, REFUSED, SIZE, Family, table, write_family
from transformers import CONFIG_MAPPING

from corefit.engine.adapter import AdapterSpec, adapted_layers, attach_adapter, trainable_parameters
from corefit.engine.attention import choose_route, isolation_canary
from corefit.engine.internlm import KINDS
from corefit.engine.loss import CausalLoss
from corefit.engine.model import linear_layers, load_base
from corefit.engine.optimizer import make_optimizer
from corefit.errors import IsolationError, ModelError
from corefit.registry import Registry
from corefit.selftest import DOCUMENTS, Lab

torch.set_num_threads(1)
EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj", "shared_expert_gate"}


@pytest.fixture
def lab(request, tmp_path):
    family = request.param
    if family.kind not in (*KINDS, *CONFIG_MAPPING):
        pytest.skip("this transformers doesn't know it")
    return Lab(write_family(tmp_path / "base", family), Registry.load().quantizer("nf4"), "cpu", tmp_path / "lab")


def by_hand(lab: Lab) -> float:
    """The loss of the first four texts, each by itself: the second half of each is supervised, of the fourth nothing.

    Its own labels, the model's plain forward, all logits, torch's softmax: nothing of how packs are trained.
    """
    network, total = lab.network(), 0.0
    for text in lab.texts[:3]:
        with torch.no_grad():
            log_p = network(torch.tensor([text])).logits[0].log_softmax(-1)
        total -= sum(float(log_p[at - 1, text[at]]) for at in range(len(text) - len(text) // 2, len(text)))
    return total


@pytest.mark.parametrize("lab", FAMILIES, ids=lambda family: family.kind, indirect=True)
def test_a_family_isolates_masks_adapts_trains_and_merges(lab):
    network = lab.network()
    assert isolation_canary(network, vocab_size=int(str(SIZE["vocab_size"])), device="cpu") == 0.0

    batch = lab.batch(range(DOCUMENTS), DOCUMENTS)
    ids, positions, labels = (torch.from_numpy(x).long() for x in (batch.input_ids, batch.position_ids, batch.labels))
    assert len(ids) == 1 and int((positions == 0).sum()) > DOCUMENTS - 1
    loss_fn = CausalLoss(network)
    with torch.no_grad():
        assert float(loss_fn(ids, positions, labels)) == pytest.approx(by_hand(lab), rel=1e-5)

    whole = {name for name in linear_layers(network.get_base_model().get_decoder()) if "lora_" not in name}
    adapted = adapted_layers(network)
    assert {"o_proj", "dense", "c_proj"} & set(adapted)
    left = {name.removesuffix(".base_layer").rpartition(".")[2] for name in whole} - set(adapted)
    assert left <= (EXPERT_NAMES if any(p.dim() == 3 for p in network.parameters()) else set())

    parameters = trainable_parameters(network)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    lab.train(loss_fn, [(batch,)], optimizer=make_optimizer("adamw", parameters, lr=0.0))
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(parameters) == {name for name in before if ".lora_" in name}

    measured, allowed = lab.merged()
    assert measured <= allowed


@pytest.mark.parametrize("lab", REFUSED, ids=lambda family: family.kind, indirect=True)
def test_what_would_train_wrongly_is_refused_by_name(lab):
    with pytest.raises((IsolationError, ModelError)) as caught:
        isolation_canary(lab.network(), vocab_size=512, device="cpu")
    words = "Mamba" if lab.path.joinpath("config.json").read_text().count("mamba") else "see each other"
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("lab", [f for f in FAMILIES if f.kind == "qwen3_moe"], ids=["qwen3_moe"], indirect=True)
def test_a_target_that_peft_takes_for_experts_is_refused(lab):
    with pytest.raises(ModelError, match=r"peft takes 'down_proj' for its experts; leave it out"):
        attach_adapter(lab.base(), AdapterSpec(r=4, alpha=4, dropout=0.0, targets=("q_proj", "down_proj")), seed=0)


def test_the_loss_that_balances_experts_is_left_out_with_a_word(tmp_path):
    routed = Family("Mixtral", "mixtral", {**EXPERTS, "output_router_logits": True})
    said: list[str] = []
    how = dict(quantizer=Registry.load().quantizer("none"), compute_dtype="float32", device="cpu", say=said.append)
    model = load_base(str(write_family(tmp_path / "m", routed)), **how)
    assert not model.config.output_router_logits and "output_router_logits" in said[-1]
    assert "document by document" in choose_route(model, vocab_size=300, device="cpu")


def test_the_table_in_the_readme_is_this_list():
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    assert table() in readme, f"README.md, Families:\n{table()}"
    assert len({family.kind for family in [*FAMILIES, *REFUSED]}) == len(FAMILIES) + len(REFUSED)
    assert EXPERTS
