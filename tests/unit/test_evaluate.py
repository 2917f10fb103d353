from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_training import make_batch, make_run, make_steps

from corefit.engine.evaluate import Decoding, Memory, generate, pick, stream, validation_loss
from corefit.engine.loop import Every
from corefit.engine.model import evaluating
from corefit.errors import RunError, UserError

PROMPT = [1, 9, 33, 70, 12]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request, tmp_path_factory):
    from tiny import write_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    folder: Path = write_model(tmp_path_factory.mktemp("model"), kind=request.param)
    made = AutoModelForCausalLM.from_pretrained(folder)
    made.config.use_cache = False  # as in training
    return made


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    made = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=64, lora_dropout=0.5, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return made


def test_validation_loss_weighs_tokens_not_batches():
    run = make_run(dropout=0.5)
    batches = [make_batch(i, rows=1 + i % 3) for i in range(5)] + [make_batch(9, supervised=False)]
    run.model.eval()
    with torch.no_grad():
        nats = [
            float(run.model(*(torch.from_numpy(a) for a in (b.input_ids, b.position_ids, b.labels)))) for b in batches
        ]
    run.model.train()
    loss, count = validation_loss(run.model, batches)
    assert count == sum(b.n_supervised for b in batches)
    assert loss == pytest.approx(sum(nats) / count, rel=1e-6)
    means = [n / b.n_supervised for n, b in zip(nats, batches, strict=True) if b.n_supervised]
    assert abs(loss - sum(means) / len(means)) > 1e-3, "a mean of means must differ for this test to mean anything"


def test_validation_loss_is_repeatable_and_leaves_no_trace():
    run = make_run(dropout=0.5)
    run.model.dropout.eval()  # a part that was in eval mode stays so
    state = torch.get_rng_state()
    a, b = (validation_loss(run.model, [make_batch(1)]) for _ in range(2))
    assert a == b
    assert torch.equal(torch.get_rng_state(), state)
    assert run.model.training
    assert not run.model.dropout.training
    assert torch.is_grad_enabled()
    assert run.model.lora_B.grad is None


def test_mode_and_random_state_come_back_after_an_error():
    run = make_run()
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), evaluating(run.model):
        torch.rand(1)
        _ = 1 / 0
    assert torch.equal(torch.get_rng_state(), state)
    assert run.model.training
    assert torch.is_grad_enabled()


def test_nothing_supervised_is_an_error_not_a_number():
    with pytest.raises(RunError, match="no record has a supervised token"):
        validation_loss(make_run().model, [make_batch(1, supervised=False)])


def test_validating_during_training_changes_nothing():
    ends = []
    for every in (0, 1):
        run, losses = make_run(dropout=0.5), []
        validate = Every(lambda step, m=run.model, to=losses: to.append(validation_loss(m, [make_batch(50)])), every)
        run.train(make_steps(4), epochs=1, validate=validate)
        assert len(losses) == 4 * every
        ends.append((run.weights(), torch.get_rng_state()))
    assert torch.equal(ends[0][1], ends[1][1])
    assert all(torch.equal(tensor, ends[1][0][name]) for name, tensor in ends[0][0].items())


def reference(model, prompt, count):
    """Greedy decoding without a cache: the whole text again for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_with_a_cache_equals_greedy_without_and_transformers(model):
    model.eval()
    expected = reference(model, PROMPT, 12)
    found = generate(model, PROMPT, stop_ids=[], max_tokens=12)
    assert (list(found.ids), found.stopped) == (expected, False)
    theirs = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    assert theirs[0, len(PROMPT) :].tolist() == expected


def test_settings_of_the_base_do_not_leak_in(model):
    model.eval()
    expected = generate(model, PROMPT, stop_ids=[], max_tokens=8)
    before = model.generation_config.to_dict()
    model.generation_config.update(do_sample=True, temperature=50.0, repetition_penalty=100.0, max_new_tokens=1)
    try:
        assert generate(model, PROMPT, stop_ids=[], max_tokens=8) == expected
    finally:
        model.generation_config.update(**before)


def test_an_answer_ends_before_the_stop_token(model):
    model.eval()
    ids = reference(model, PROMPT, 12)
    stop = ids[5]
    found = generate(model, PROMPT, stop_ids=[stop, 511], max_tokens=12)
    assert found.ids == tuple(ids[: ids.index(stop)])
    assert found.stopped


def test_generating_in_the_middle_of_training_leaves_no_trace(model):
    """With an adapter, dropout and gradient checkpointing on, as in a run."""
    tuned = lora(model)
    try:
        tuned.gradient_checkpointing_enable()
        tuned.train()
        modes = [part.training for part in tuned.modules()]
        state = torch.get_rng_state()
        first = generate(tuned, PROMPT, stop_ids=[], max_tokens=6)
        sampled = generate(tuned, PROMPT, stop_ids=[], max_tokens=6, decoding=Decoding(temperature=1.0))
        assert torch.equal(torch.get_rng_state(), state)
        assert [part.training for part in tuned.modules()] == modes
        assert tuned.config.use_cache is False
        assert tuned.get_base_model().is_gradient_checkpointing
        assert torch.is_grad_enabled()
        assert first == generate(tuned, PROMPT, stop_ids=[], max_tokens=6)
        assert sampled == generate(tuned, PROMPT, stop_ids=[], max_tokens=6, decoding=Decoding(temperature=1.0))
        tuned.eval()
        tuned.gradient_checkpointing_disable()
        assert list(first.ids) == reference(tuned, PROMPT, 6)
        with tuned.disable_adapter():
            assert reference(tuned, PROMPT, 6) != list(first.ids), (
                "the adapter must show for this test to mean anything"
            )
    finally:
        tuned.unload()


def test_seeds_and_temperature_decide_a_sample(model):
    model.eval()
    answers = {
        s: generate(model, PROMPT, stop_ids=[], max_tokens=8, decoding=Decoding(temperature=1.5, seed=s)).ids
        for s in range(3)
    }
    assert len(set(answers.values())) > 1
    assert (
        generate(model, PROMPT, stop_ids=[], max_tokens=8, decoding=Decoding(temperature=1.5, seed=2)).ids == answers[2]
    )


def test_a_stream_gives_tokens_as_they_come_and_grads_stay_on_between_them(model):
    model.eval()
    inside = []
    model.lm_head.register_forward_hook(lambda module, args, out: inside.append(out.requires_grad))
    try:
        tokens = stream(model, PROMPT, max_tokens=3)
        next(tokens)
        assert torch.is_grad_enabled()
        assert len(list(tokens)) == 2
    finally:
        model.lm_head._forward_hooks.clear()
    assert inside == [False] * 3


def test_only_the_last_row_of_logits_is_made(model, monkeypatch):
    model.eval()
    rows, strides = [], []
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    model.lm_head.register_forward_hook(lambda module, args, out: strides.append(args[0].stride()[:2]))
    try:
        generate(model, PROMPT, stop_ids=[], max_tokens=3)
    finally:
        model.lm_head._forward_hooks.clear()
    assert rows == [1, 1, 1]
    width = model.config.hidden_size
    assert strides == [(width, width)] * 3, "a view of the whole text, for which torch copies the head"


def test_where_layers_share_their_keys_the_last_row_is_asked_for_by_a_number(model, monkeypatch):
    model.eval()
    asked = []
    monkeypatch.setattr(model.config, "num_kv_shared_layers", 1, raising=False)
    hook = model.register_forward_pre_hook(lambda *given: asked.append(given[-1]["logits_to_keep"]), with_kwargs=True)
    try:
        generate(model, PROMPT, stop_ids=[], max_tokens=2)
    finally:
        hook.remove()
    assert asked == [1, 1], "Gemma 4 looks at numbers only, and then reads a prompt in a third of the time"


@pytest.mark.parametrize("names", [{"past_key_values": None}, {}])
def test_a_model_without_a_cache_reads_everything_again(names):
    class NoCache(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None, use_cache=None):
            logits = torch.nn.functional.one_hot((input_ids.sum() % 50).reshape(1, 1), 50).float()
            return type("Out", (), {"logits": logits, **names})

    assert list(stream(NoCache(), [1, 2], max_tokens=4)) == [3, 6, 12, 24]


def test_top_k_and_the_repetition_penalty():
    logits = torch.tensor([0.5, 0.2, 0.2999, 0.0001]).log()
    generator = torch.Generator().manual_seed(0)
    draws = {pick(logits, Decoding(temperature=1.0, top_k=2), generator) for _ in range(300)}
    assert draws == {0, 2}
    share = sum(pick(logits, Decoding(temperature=1.0, top_k=2, top_p=0.6), generator) == 0 for _ in range(300)) / 300
    assert share == 1, "top_p counts among the top_k: 0.5 of 0.8 reaches 0.6"
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5])
    assert pick(logits, Decoding(repetition_penalty=2.0), generator, [0, 0]) == 1
    assert pick(logits, Decoding(repetition_penalty=1.2), generator, [0]) == 0
    assert pick(torch.tensor([-1.0, -1.5]), Decoding(repetition_penalty=2.0), generator, [0]) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1), ("top_p", 1.5), ("top_k", -1), ("repetition_penalty", 0), ("seed", -1)]
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(UserError, match=name.replace("_", "-")):
        Decoding(**{name: value})


def test_a_cache_that_can_not_be_cut_is_not_cut():
    """Sliding windows and states forget the past, so a prompt that differs is read from its first id."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=50, num_key_value_heads=2, sliding_window=8, **sizes)).eval()
    memory, prompts = Memory(), ([*range(1, 21)], [*range(1, 12), 30, 31], [*range(1, 12), 30, 31, 32, 33])
    for prompt in prompts:
        fresh = list(stream(model, prompt, max_tokens=6))
        assert list(stream(model, prompt, max_tokens=6, memory=memory)) == fresh
    assert memory.ids[: len(prompts[-1])] == prompts[-1]
    kept = list(memory.ids)
    list(stream(model, [*kept, 5], max_tokens=1, memory=memory))
    assert memory.ids == [*kept, 5], "what only goes on is kept"


def test_a_temperature_of_almost_nothing_takes_the_most_likely_token():
    logits, generator = torch.tensor([20.0, 1.0, 19.0]), torch.Generator().manual_seed(0)
    for temperature in (1e-3, 1e-38, 1e-45):
        assert pick(logits, Decoding(temperature=temperature), generator) == 0


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.2, 0.2999, 0.0001]).log()
    generator = torch.Generator().manual_seed(0)
    draw = lambda p, t=1.0: {pick(logits, Decoding(temperature=t, top_p=p), generator) for _ in range(300)}  # noqa: E731
    assert draw(0.4) == draw(0.0) == {0}
    assert draw(0.6) == {0, 2}
    assert draw(0.9) == {0, 1, 2}
    assert draw(1.0, 0.01) == {0}
    share = sum(pick(logits, Decoding(temperature=1.0, top_p=0.7), generator) == 0 for _ in range(2000)) / 2000
    assert math.isclose(share, 0.5 / 0.7999, abs_tol=0.04)
    assert pick(logits, Decoding(top_p=0.01), generator) == 0
