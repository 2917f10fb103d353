from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import write_model

from corefit.engine.adapter import AdapterSpec, attach_adapter, trainable_parameters
from corefit.engine.loss import CausalLoss, Head, LinearCrossEntropy, offloaded
from corefit.engine.model import causal_lm, enable_gradient_checkpointing, evaluating, load_base
from corefit.types import Quantizer

torch.set_num_threads(1)
KINDS = ["llama", "llama_bias", "qwen2", "qwen3"]


def bits(kind):
    def config(compute_dtype):
        from transformers import BitsAndBytesConfig

        if kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
        )

    return Quantizer(name=kind, summary="", config=(lambda compute_dtype: None) if kind == "none" else config)


def loaded(folder, quantizer="none", compute_dtype="float32", adapter=True, dropout=0.0, **spec):
    model = load_base(str(folder), quantizer=bits(quantizer), compute_dtype=compute_dtype, device="cpu")
    model = attach_adapter(model, AdapterSpec(r=4, alpha=8, dropout=dropout, **spec) if adapter else None, seed=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # LoRA begins with B = 0, which would hide half of its gradients
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def documents(lengths, seed=0, vocab=512):
    """Token ids and which of them are targets, about half; the first never."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        target = torch.rand(length, generator=generator) < 0.5
        target[0] = False
        made.append((torch.randint(3, vocab, (length,), generator=generator), target))
    return made


def pack(rows, slots):
    """input_ids, position_ids, labels [B, slots] of rows of documents, padded as one more document."""
    ids, positions = torch.zeros(len(rows), slots, dtype=torch.long), torch.zeros(len(rows), slots, dtype=torch.long)
    labels = torch.full((len(rows), slots), -100)
    for r, row in enumerate(rows):
        at = 0
        for tokens, target in row:
            n = len(tokens)
            ids[r, at : at + n], positions[r, at : at + n] = tokens, torch.arange(n)
            labels[r, at : at + n - 1] = torch.where(target[1:], tokens[1:], -100)
            at += n
        positions[r, at:] = torch.arange(slots - at)
    return ids, positions, labels


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in trainable_parameters(model).items()}
    model.zero_grad()
    return found


def assert_close(ours, theirs, relative):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.abs().max() > 0, f"{name}: no gradient to compare"
        error = (ours[name] - expected).abs().max() / expected.abs().max()
        assert error <= relative, f"{name}: {error:.2e}"


def one_by_one(model, docs):
    """The oracle: every document alone, the model's own logits, torch's cross entropy; no code of corefit."""
    total = 0.0
    for tokens, target in docs:
        logits = causal_lm(model)(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits[target[1:]], tokens[1:][target[1:]], reduction="sum")
    return total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_one_by_one(tmp_path, kind, adapter, batch, checkpointing):
    model = loaded(write_model(tmp_path, kind=kind), adapter=adapter)
    docs = documents([9, 2, 17, 1, 30, 12])
    rows = [docs] if batch == 1 else [docs[:4], docs[4:]]
    expected = one_by_one(model, docs)
    (expected / 50).backward()
    reference = gradients(model)
    if checkpointing:
        enable_gradient_checkpointing(model)
    loss_fn = CausalLoss(model)
    loss = loss_fn(*pack(rows, 80 if batch == 1 else 48))
    (loss / 50).backward()
    assert loss_fn.plain is None and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients(model), reference, 1e-5)


@pytest.mark.parametrize("split", [[6], [1, 5], [2, 2, 2], [3, 1, 2], [1, 1, 1, 1, 1, 1]])
def test_any_split_of_a_step_gives_the_same_gradient(tmp_path, split):
    model = loaded(write_model(tmp_path))
    rows = [documents([7, 3 + n, 11], seed=n) for n in range(6)]
    rows[4] = [(tokens, torch.zeros_like(target)) for tokens, target in rows[4]]  # a micro-batch may have no target
    loss_fn = CausalLoss(model)
    n_supervised = sum(int(target[1:].sum()) for row in rows for _, target in row)

    def step(sizes):
        at, total = 0, 0.0
        for size in sizes:
            loss = loss_fn(*pack(rows[at : at + size], 32)) / n_supervised
            loss.backward()
            at, total = at + size, total + loss.item()
        return total, gradients(model)

    whole, expected = step([6])
    loss, found = step(split)
    assert loss == pytest.approx(whole, rel=1e-6)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 16, 256])
def test_chunks_equal_plain_cross_entropy(chunk, replaced):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(33, 24, generator=generator, requires_grad=True)
    weight = torch.randn(101, 24, generator=generator, requires_grad=True)
    rows = torch.randn(3, 24, generator=generator, requires_grad=True)
    targets, at = torch.randint(101, (33,), generator=generator), torch.tensor([100, 2, 57])
    targets[:3] = at
    head = Head(weight, rows, at) if replaced else Head(weight)
    inputs = (hidden, weight, rows) if replaced else (hidden, weight)
    plain = F.cross_entropy(
        hidden @ (weight.index_copy(0, at, rows) if replaced else weight).T, targets, reduction="sum"
    )
    expected = torch.autograd.grad(plain * 0.3, inputs)
    loss = LinearCrossEntropy.apply(hidden, targets, *head, torch.float32, chunk, True)
    found = torch.autograd.grad(loss * 0.3, inputs)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_chunks_of_extreme_logits_stay_finite():
    hidden = torch.tensor([[3e4], [-3e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    targets = torch.tensor([1, 1])
    loss = LinearCrossEntropy.apply(hidden, targets, *Head(weight), torch.float32, 256, True)
    loss.backward()
    assert loss.item() == pytest.approx(6e4)
    assert hidden.grad.flatten().tolist() == [2.0, 0.0]


def test_a_frozen_head_gets_no_gradient_and_no_logits_are_made(tmp_path):
    model = loaded(write_model(tmp_path))
    loss_fn = CausalLoss(model)
    batch = pack([documents([20, 9])], 32)
    loss_fn.probe()
    head = causal_lm(model).get_output_embeddings()
    head.register_forward_hook(lambda *_: pytest.fail("the full logits were made"))
    loss_fn(*batch).backward()
    assert head.weight.grad is None


def test_nothing_supervised_is_zero_with_a_graph(tmp_path):
    for adapter in (True, False):
        model = loaded(write_model(tmp_path), adapter=adapter)
        ids, positions, labels = pack([documents([9, 5])], 16)
        loss = CausalLoss(model)(ids, positions, torch.full_like(labels, -100))
        assert loss.item() == 0.0 and loss.requires_grad
        loss.backward()
        assert all(not parameter.grad.any() for parameter in trainable_parameters(model).values())


def test_validation_needs_no_graph(tmp_path):
    loss_fn = CausalLoss(loaded(write_model(tmp_path)))
    batch = pack([documents([9, 5])], 16)
    with torch.no_grad():
        without = loss_fn(*batch)
    assert not without.requires_grad
    assert without.item() == loss_fn(*batch).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [True, False])
def test_autocast_with_a_loss_scale_of_65536(tmp_path, dtype, adapter):
    model = loaded(write_model(tmp_path, num_hidden_layers=1), adapter=adapter)
    docs = documents([9, 5, 11])
    n = sum(int(target.sum()) for _, target in docs)
    (one_by_one(model, docs) / n).backward()
    reference = gradients(model)
    loss_fn = CausalLoss(model)
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_fn(*pack([docs], 32))
    assert loss.dtype == torch.float32
    (loss / n * 65536).backward()
    found = {name: gradient / 65536 for name, gradient in gradients(model).items()}
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert_close(found, reference, 0.15 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("adapter", [True, False])
def test_products_are_in_the_dtype_that_autocast_would_choose(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr("corefit.engine.fused.cpu_has_bf16", lambda: True)  # without it they would be fp32
    model = loaded(write_model(tmp_path), adapter=adapter)
    ids, positions, labels = pack([documents([30])], 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = causal_lm(model)(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = CausalLoss(model)(ids, positions, labels)
    assert logits.dtype == torch.bfloat16
    plain = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_the_probe_leaves_no_gradientless_copies_in_the_autocast_cache(tmp_path):
    model = loaded(write_model(tmp_path))
    loss_fn = CausalLoss(model)
    batch = pack([documents([9, 5])], 16)
    found = []
    for _ in range(2):  # the first call probes, the second doesn't
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_fn(*batch).backward()
        found.append(gradients(model))
    assert_close(found[0], found[1], 0.0)


def odd_model(kind, folder):
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    size = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    if kind == "cap":
        model = Gemma2ForCausalLM(Gemma2Config(**size, final_logit_softcapping=30.0, attn_logit_softcapping=None))
    else:
        size.pop("head_dim")
        model = CohereForCausalLM(CohereConfig(**size, logit_scale=0.5))
    model.save_pretrained(folder)
    return loaded(folder)


def biased(folder):
    model = loaded(write_model(folder))
    head = causal_lm(model).get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 512), requires_grad=False)
    return model


@pytest.mark.parametrize("kind", ["cap", "scale", "bias", "adapter"])
def test_odd_heads_get_plain_logits(tmp_path, kind):
    if kind == "bias":
        model = biased(tmp_path)
    elif kind == "adapter":
        model = loaded(write_model(tmp_path), targets=("q_proj", "lm_head"))
    else:
        model = odd_model(kind, tmp_path)
    docs = documents([9, 5, 1, 12], vocab=64)
    one_by_one(model, docs).backward()
    reference = gradients(model)
    loss_fn = CausalLoss(model)
    loss_fn(*pack([docs], 32)).backward()
    assert loss_fn.plain
    assert_close(gradients(model), reference, 1e-5)


def test_an_adapter_on_the_head_is_seen_while_it_still_adds_nothing(tmp_path):
    model = load_base(str(write_model(tmp_path)), quantizer=bits("none"), compute_dtype="float32", device="cpu")
    model = attach_adapter(model, AdapterSpec(r=4, alpha=8, dropout=0.0, targets=("lm_head",)), seed=0)
    assert CausalLoss(model).probe()


def test_a_head_that_is_trained_beside_the_adapter_gets_its_gradient(tmp_path):
    model = loaded(write_model(tmp_path), modules_to_save=("lm_head",))
    docs = documents([9, 5, 12])
    one_by_one(model, docs).backward()
    reference = gradients(model)
    assert any("lm_head" in name for name in reference)
    loss_fn = CausalLoss(model, chunk=4)
    loss_fn(*pack([docs], 32)).backward()
    assert loss_fn.plain is None
    assert_close(gradients(model), reference, 1e-5)


def test_tied_embeddings_add_both_gradients(tmp_path):
    model = loaded(write_model(tmp_path, tie_word_embeddings=True), adapter=False)
    docs = documents([9, 5, 12])
    one_by_one(model, docs).backward()
    reference = gradients(model)
    CausalLoss(model)(*pack([docs], 32)).backward()
    assert_close(gradients(model), reference, 1e-5)


def test_nf4_gradients_survive_an_evaluation(tmp_path):  # on CPUs with AVX512-BF16 bitsandbytes would repack
    batch = pack([documents([20, 9])], 32)

    def gradient(evaluate):
        model = loaded(write_model(tmp_path), quantizer="nf4", compute_dtype="bfloat16")
        loss_fn = CausalLoss(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_fn.plain, loss_fn.probed = None, True  # the probe is an evaluation too
            if evaluate:
                with evaluating(model):
                    loss_fn(*batch)
            loss_fn(*batch).backward()
        return gradients(model)

    expected = gradient(evaluate=False)
    assert_close(gradient(evaluate=True), expected, 0.0)


@pytest.mark.parametrize("quantizer", ["nf4", "int8"])
def test_quantised_bases_learn(tmp_path, quantizer):
    model = loaded(write_model(tmp_path), quantizer=quantizer, compute_dtype="bfloat16", dropout=0.1)
    loss_fn, batch = CausalLoss(model), pack([documents([20, 9])], 32)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_fn(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert loss_fn.plain is None
    assert losses[1] < losses[0]


def test_offloaded_activations_are_copies_and_weights_stay_in_place():
    weight, small = torch.nn.Parameter(torch.ones(300, 300)), torch.nn.Parameter(torch.ones(1))
    given = torch.ones(300, 300, requires_grad=True)
    with offloaded([weight, small]):
        result = (F.linear(given, weight) * small).sum()
    with torch.no_grad():
        given.data.fill_(7.0)
        weight.data.fill_(7.0)
    result.backward()
    assert (weight.grad == 300).all(), "what came in was not kept aside"
    assert (given.grad == 7 * 300).all(), "a weight was copied"


@pytest.mark.parametrize("share", [None, 1.0, 0.5])
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_offloading_changes_no_gradient(tmp_path, monkeypatch, quantizer, share):
    monkeypatch.setattr("corefit.engine.loss.SMALL", 0)
    model = loaded(write_model(tmp_path), quantizer=quantizer)
    batch = pack([documents([9, 2, 17]), documents([5, 20])], 48)
    loss_fn = CausalLoss(model)
    loss_fn(*batch).backward()
    expected = gradients(model)
    if share:
        enable_gradient_checkpointing(model, share)
    made = []
    loss_fn.kept = lambda: made.append(1) or offloaded(model.parameters())
    loss_fn(*batch).backward()
    assert made
    assert_close(gradients(model), expected, 0)
