"""Frequencies that follow a length follow each document's own, and nothing that was read before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corefit.engine.attention import choose_route, run_packed
from corefit.engine.evaluate import Memory, stream
from corefit.engine.model import load_base
from corefit.registry import Registry

TRAINED = 16
COMMON = dict(
    **dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
    **dict(pad_token_id=0, initializer_range=0.3),
)


def write(folder: Path, kind: str) -> Path:
    """A random model of 16 dimensions a head, trained on up to ``TRAINED`` tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    theta, half = 10_000.0, COMMON["hidden_size"] // COMMON["num_attention_heads"] // 2
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": theta}
        config = AutoConfig.for_model("llama", max_position_embeddings=TRAINED, rope_parameters=rope, **COMMON)
    elif kind == "longrope":
        factors = {"short_factor": [1.0 + i / 8 for i in range(half)], "long_factor": [2.0 + i for i in range(half)]}
        rope = {"rope_type": "longrope", "rope_theta": theta, "original_max_position_embeddings": TRAINED, **factors}
        more = dict(max_position_embeddings=8 * TRAINED, original_max_position_embeddings=TRAINED)
        config = AutoConfig.for_model("phi3", rope_parameters=rope, **more, **COMMON)
    else:
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": theta}
        layers = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}
        kinds = ["sliding_attention", "full_attention"]
        more = dict(max_position_embeddings=TRAINED, layer_types=kinds, sliding_window=64, head_dim=2 * half)
        more |= dict(num_key_value_heads=2)
        config = AutoConfig.for_model("gemma3_text", rope_parameters=layers, **more, **COMMON)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load(folder: Path):
    quantizer = Registry.load().quantizer("none")
    return load_base(str(folder), quantizer=quantizer, compute_dtype="float32", device="cpu").eval()


def alone(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers gives for one text, by a model that has read nothing else."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids[None], use_cache=False).logits[0]


KINDS = ["dynamic", "longrope", "one type of layer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ["by document", "with a mask"])
def test_a_document_of_a_pack_is_turned_as_it_would_be_alone(kind: str, route: str, tmp_path: Path):
    folder = write(tmp_path / "m", kind)
    model, lengths = load(folder), (9, 40, 16, 17, 1)
    if route == "by document":
        assert "document by document" in choose_route(model, vocab_size=300, device="cpu")
    ids = torch.arange(3, 3 + sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    for _ in range(2):  # what was read before changes nothing
        with torch.no_grad():
            packed = run_packed(model, ids[None], positions[None]).logits[0].split(lengths)
        for document, got in zip(ids.split(lengths), packed, strict=True):
            wanted = alone(folder, document)
            assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max(), len(document)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_an_answer_is_that_of_transformers_also_where_it_passes_the_trained_length(kind: str, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    folder = write(tmp_path / "m", kind)
    model, memory = load(folder), Memory()
    for n, new in ((8, 4), (40, 5), (10, 20), (40, 5), (10, 20), (5, 4), (20, 4)):  # they begin as what was read before
        prompt = list(range(3, 3 + n))
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
        wanted = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new, eos_token_id=None)[0, n:]
        assert list(stream(model, prompt, max_tokens=new, memory=memory)) == wanted.tolist(), (n, new)
