from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import POISON_GRADIENT, POISON_LOSS, make_batch, make_run, make_steps

from corefit.engine.loop import Every, LoopState, out_of_memory, progress_at, ran_out, take_step
from corefit.errors import DataError, NonFiniteError, PluginError, RunError


def split(batch, sizes):
    """The same rows in micro-batches of these sizes."""
    parts, row = [], 0
    for size in sizes:
        rows = slice(row, row + size)
        labels = batch.labels[rows]
        fields = {k: getattr(batch, k)[rows] for k in ("input_ids", "position_ids")}
        parts.append(replace(batch, labels=labels, n_supervised=int((labels != -100).sum()), **fields))
        row += size
    return parts


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (3, 1), (1, 3)])
@pytest.mark.parametrize("scale", [False, True])
def test_any_split_of_a_step_gives_the_same_update(sizes, scale):
    weights, losses = [], []
    batch = make_batch(1, rows=4)
    assert len({part.n_supervised for part in split(batch, (1, 1, 1, 1))}) > 1, (
        "equal counts would hide a mean of means"
    )
    for parts in ([batch], split(batch, sizes)):
        run = make_run(scale=scale, dropout=0.0)
        run.optimizer = torch.optim.SGD(run.parameters.values(), lr=1.0)
        what = run.parameters, run.optimizer, run.scaler
        loss, norm, _ = take_step(run.model, parts, batch.n_supervised, *what, "cpu", torch.float32, None)
        weights.append(run.weights())
        losses.append((loss, norm))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-7), name
    assert not torch.equal(weights[0]["lora_B"], make_run().weights()["lora_B"])


def test_loss_is_nats_per_supervised_token_of_the_whole_step():
    run = make_run(dropout=0.0)
    batches = (make_batch(1), make_batch(2))
    with torch.no_grad():
        nats = sum(
            float(run.model(*(torch.from_numpy(a) for a in (b.input_ids, b.position_ids, b.labels)))) for b in batches
        )
    run.train([batches], max_steps=1)
    report = run.reports[0]
    assert report.loss == pytest.approx(nats / sum(b.n_supervised for b in batches), rel=1e-5)
    assert report.supervised_tokens == sum(b.n_supervised for b in batches)
    assert (report.tokens, report.samples, report.packs, report.step) == (58, 4, 4, 1)
    assert report.fill == pytest.approx(100 * 58 / 64)
    assert report.tokens_per_s == pytest.approx(report.supervised_tokens / report.seconds)
    assert report.memory_bytes > 50e6
    assert (
        list(asdict(report))
        == (
            "step epoch progress loss lr grad_norm loss_scale skipped cause tokens supervised_tokens "
            "samples packs fill tokens_per_s seconds memory_bytes"
        ).split()
    )


def test_the_loss_falls():
    run = make_run()
    assert run.train(make_steps(30), epochs=1, lr_at=lambda progress: 1e-2) == "epochs"
    assert run.reports[-1].loss < 0.7 * run.reports[0].loss


def test_gradients_are_unscaled_before_they_are_clipped_and_reported():
    plain, scaled = make_run(dropout=0.0), make_run(dropout=0.0, scale=True)
    for run in (plain, scaled):
        run.train(make_steps(3), epochs=1, clip=0.01)
    for a, b in zip(plain.reports, scaled.reports, strict=True):
        assert a.grad_norm > 0.01, "clipping must bite for this test to mean anything"
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
        assert (a.loss_scale, b.loss_scale) == (1.0, 65536.0)


@pytest.mark.parametrize("clip", [0.05, 0, None])
def test_clipping_bounds_the_norm_and_zero_turns_it_off(clip):
    run = make_run(dropout=0.0)
    run.optimizer = torch.optim.SGD(run.parameters.values(), lr=1.0)
    before = run.weights()
    run.train(make_steps(1), epochs=1, clip=clip, lr_at=lambda progress: 1.0)
    moved = math.sqrt(sum(float((tensor - before[name]).square().sum()) for name, tensor in run.weights().items()))
    assert moved == pytest.approx(clip or run.reports[0].grad_norm, rel=1e-3)
    assert run.reports[0].grad_norm > 0.05


def moments(run):
    """The optimizer's state, all of it, copied."""
    found = {}
    for name, p in run.parameters.items():
        for key, value in run.optimizer.state[p].items():
            found[name, key] = value.clone() if hasattr(value, "clone") else value
    return found


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_step_with_gradients_that_are_not_finite_changes_nothing_but_is_counted(scale, optimizer):
    run = make_run(scale=scale, optimizer=optimizer)
    seen = []
    run.train(
        make_steps(5, poison={2: POISON_GRADIENT}),
        epochs=1,
        on_step=lambda report: seen.append((report, run.weights(), moments(run))),
    )
    report, weights, state = seen[2]
    assert (report.step, report.skipped, report.epoch) == (3, True, pytest.approx(0.6))
    assert [r.cause for r, *_ in seen] == [None, None, "non_finite_gradients", None, None]
    assert (report.loss is None, report.grad_norm) == (False, None)
    json.dumps(asdict(report), allow_nan=False)
    assert same(weights, seen[1][1])
    assert same(state, seen[1][2])
    assert not torch.equal(seen[3][1]["lora_B"], weights["lora_B"]), "the next step goes on"
    assert all(torch.isfinite(tensor).all() for tensor in seen[4][1].values())
    assert run.state.skipped == {"non_finite_gradients": 1}
    assert (run.state.step, run.state.skipped_in_a_row, run.state.stream()["next"]) == (5, 0, 10)
    assert [r.loss_scale for r, *_ in seen] == ([65536.0] * 3 + [32768.0] * 2 if scale else [1.0] * 5)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_loss_that_is_not_finite_stops_the_run_as_if_its_step_had_not_begun(scale, optimizer):
    run, saved, seen = make_run(scale=scale, optimizer=optimizer), [], []

    def everything():
        return run.weights(), moments(run), {"random": torch.get_rng_state()}, run.scaler.state_dict()

    with pytest.raises(NonFiniteError, match="step 4: the loss is not finite") as error:
        run.train(
            make_steps(6, poison={3: POISON_LOSS}),
            epochs=1,
            on_step=lambda report: seen.append((report.step, *everything())),
            checkpoint=Every(lambda step: saved.append((step, json.dumps(run.state.as_dict()), *everything())), 2),
        )
    assert [step for step, *_ in seen] == [1, 2, 3]
    assert [step for step, *_ in saved] == [2, 3], "what was before the step is saved"
    last = json.loads(saved[-1][1])
    assert (last["step"], last["stream"], last["epoch"]) == (3, {"next": 6}, pytest.approx(0.5)), "its data waits"
    assert (last["skipped"], last["skipped_in_a_row"]) == ({}, 0)
    for before, at_save, at_end in zip(seen[-1][1:], saved[-1][2:], everything(), strict=True):
        assert same(before, at_save)
        assert same(before, at_end)
    assert [p.grad for p in run.parameters.values()] == [None, None]
    assert error.value.report["scales"][-1] == {
        "step": 4,
        "loss_scale": 65536.0 if scale else 1.0,
        "cause": "non_finite_loss",
    }
    assert error.value.exit_code == 1


def test_a_first_loss_that_is_not_finite_saves_nothing():
    run, saved = make_run(), []
    with pytest.raises(NonFiniteError, match="step 1: the loss is not finite"):
        run.train(make_steps(2, poison={0: POISON_LOSS}), epochs=1, checkpoint=Every(saved.append, 1))
    assert saved == []
    assert run.state == LoopState()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_fp16_that_overflows_is_scaled_and_skipped_as_torch_does_it(optimizer):
    """Real fp16, from a scale at which gradients overflow; the reference is the loop of torch's own documentation."""
    run, reference = (make_run(scale=True, optimizer=optimizer, dropout=0.0) for _ in range(2))
    for made in (run, reference):
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
    expected = []
    for batches in make_steps(16):
        scale, total = reference.scaler.get_scale(), sum(batch.n_supervised for batch in batches)
        for batch in batches:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = reference.model(
                    *(torch.from_numpy(a) for a in (batch.input_ids, batch.position_ids, batch.labels))
                )
            reference.scaler.scale(loss / total).backward()
        reference.scaler.unscale_(reference.optimizer)
        torch.nn.utils.clip_grad_norm_(reference.parameters.values(), 1.0)
        reference.scaler.step(reference.optimizer)
        reference.scaler.update()
        reference.optimizer.zero_grad()
        expected.append((scale, reference.weights(), moments(reference)))
    seen = []
    run.train(
        make_steps(16),
        epochs=1,
        compute_dtype=torch.float16,
        lr_at=lambda progress: 1e-2,
        on_step=lambda report: seen.append((report, run.weights(), moments(run))),
    )
    scales = [report.loss_scale for report, *_ in seen]
    assert scales == [scale for scale, *_ in expected]
    assert run.scaler.get_scale() == reference.scaler.get_scale()
    for (_, weights, state), (_, expected_weights, expected_state) in zip(seen, expected, strict=True):
        assert same(weights, expected_weights)
        assert same(state, expected_state)
    skipped = [r for r, *_ in seen if r.skipped]
    assert 0 < len(skipped) < 16, "some overflow, some don't"
    assert {r.cause for r in skipped} == {"non_finite_gradients"}
    assert all(
        after == before / 2 for (r, *_), (before, after) in zip(seen, pairwise(scales), strict=False) if r.skipped
    )
    assert any(after == 2 * before for before, after in pairwise(scales)), "and it grows again"
    assert run.state.skipped == {"non_finite_gradients": len(skipped)}
    assert [r.step for r, *_ in seen] == list(range(1, 17))
    assert [r.progress for r, *_ in seen] == pytest.approx([(i + 0.5) / 16 for i in range(16)])
    assert run.state.stream()["next"] == 32


def test_twenty_skipped_steps_in_a_row_stop_the_run_with_the_weights_as_they_were():
    run = make_run(scale=True)
    saved = []
    poison = dict.fromkeys(range(5, 40), POISON_GRADIENT)
    with pytest.raises(
        NonFiniteError, match=r"step 25: the gradients of 20 steps in a row are not finite \(loss scale 0\.125\)"
    ) as error:
        run.train(
            make_steps(40, poison=poison), epochs=1, checkpoint=Every(lambda step: saved.append(run.weights()), 5)
        )
    assert all(torch.equal(tensor, saved[0][name]) for name, tensor in run.weights().items())
    assert run.state.skipped == {"non_finite_gradients": 20}
    assert run.state.step == 25, "the steps were made, and are saved"
    assert [round(1 / line["loss_scale"], 3) for line in error.value.report["scales"][-2:]] == [4, 8]
    assert error.value.report["in_a_row"] == 20


def test_nineteen_skipped_steps_and_a_good_one_go_on():
    run = make_run()
    poison = dict.fromkeys([*range(0, 19), *range(20, 39)], POISON_GRADIENT)
    assert run.train(make_steps(40, poison=poison), epochs=1) == "epochs"
    assert run.state.skipped == {"non_finite_gradients": 38}


def test_a_step_without_supervised_tokens_neither_adds_to_a_row_of_skipped_ones_nor_ends_it():
    run = make_run()
    bad, nothing = make_batch(1, first=POISON_GRADIENT), make_batch(2, supervised=False)
    with pytest.raises(RunError, match="step 25: the gradients of 20 steps"):
        run.train([(bad,)] * 19 + [(nothing,)] * 5 + [(bad,)] * 9, max_steps=100)


def test_a_step_without_supervised_tokens_updates_nothing_and_is_counted():
    run = make_run(scale=True)
    before = run.weights()
    run.train([(make_batch(0, epoch=0.5, supervised=False),), (make_batch(1, epoch=1.0),)], epochs=1)
    first, second = run.reports
    assert (first.cause, first.loss, first.grad_norm, first.supervised_tokens) == ("nothing_supervised", None, None, 0)
    assert not second.skipped
    assert run.state.skipped == {"nothing_supervised": 1}
    alone = make_run(scale=True)
    alone.train([(make_batch(1, epoch=1.0),)], epochs=1, lr_at=lambda progress: second.lr)
    assert all(torch.equal(tensor, alone.weights()[name]) for name, tensor in run.weights().items())
    assert not torch.equal(before["lora_B"], run.weights()["lora_B"])


def test_a_micro_batch_without_supervised_tokens_leaves_the_step_as_it_is():
    weights = []
    for batches in ((make_batch(1),), (make_batch(0, supervised=False), make_batch(1))):
        run = make_run()
        run.train([batches], max_steps=1)
        weights.append(run.weights())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("limit", [{"epochs": 1}, {"max_steps": 4}])
def test_progress_is_taken_in_the_middle_of_a_step_and_sets_the_rate(limit):
    run = make_run()
    asked = []
    run.train(make_steps(4), **limit, lr_at=lambda progress: asked.append(progress) or 0.5 * progress)
    assert [r.progress for r in run.reports] == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8])
    assert [r.lr for r in run.reports] == pytest.approx([0.5 * r.progress for r in run.reports])
    assert run.optimizer.param_groups[0]["lr"] == run.reports[-1].lr
    assert [r.epoch for r in run.reports] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_the_nearer_end_decides_progress():
    assert progress_at(5, 0.1, max_steps=10, epochs=3) == 0.5
    assert progress_at(5, 2.7, max_steps=10, epochs=3) == pytest.approx(0.9)
    assert progress_at(5, 2.7, max_steps=10, epochs=0) == 0.5
    assert progress_at(500, 7.0, max_steps=None, epochs=0) == 0.5


@given(st.floats(0, 1e7), st.floats(0, 1e4), st.none() | st.integers(1, 10**6), st.integers(0, 100))
def test_progress_is_strictly_inside_and_never_falls(step, epoch, max_steps, epochs):
    here = progress_at(step, epoch, max_steps=max_steps, epochs=epochs)
    assert 0 < here < 1
    assert here <= progress_at(step + 1, epoch + 0.1, max_steps=max_steps, epochs=epochs)


def test_the_run_ends_at_max_steps_without_taking_more_data():
    run = make_run()
    steps = make_steps(10)
    assert run.train(steps, epochs=1, max_steps=3) == "max_steps"
    assert run.state.step == 3
    assert next(steps)[0].state()["next"] == 7


def test_no_data_is_no_step():
    run = make_run()
    saved = []
    assert run.train([], epochs=1, checkpoint=Every(saved.append, 1)) == "epochs"
    assert run.state == LoopState()
    assert saved == []


def test_a_signal_finishes_the_step_saves_and_says_why():
    run = make_run()
    saved = []
    why = run.train(
        make_steps(10),
        epochs=1,
        should_stop=lambda: "SIGINT" if run.state.step == 4 else "",
        checkpoint=Every(saved.append, 3),
    )
    assert (why, saved, len(run.reports)) == ("SIGINT", [3, 4], 4)


def test_a_schedule_that_fails_midway_saves_what_was_trained_so_far():
    def rate(progress):
        if progress > 0.5:
            raise PluginError("scheduler 'sad': no")
        return 1e-2

    run, saved = make_run(), list[int]()
    with pytest.raises(PluginError, match="sad"):
        run.train(make_steps(8), max_steps=8, lr_at=rate, checkpoint=Every(saved.append))
    assert saved == [run.state.step] == [4]


def test_data_that_can_not_be_read_on_saves_what_was_trained_so_far():
    def steps(good):
        yield from make_steps(good)
        raise DataError("rows.jsonl:9: broken")

    for good, expected in ((3, [2, 3]), (2, [2]), (0, [])):
        saved: list[int] = []
        run = make_run()
        with pytest.raises(DataError, match="rows.jsonl:9"):
            run.train(steps(good), checkpoint=Every(saved.append, steps=2))
        assert saved == expected
        assert run.state.step == good


def test_hooks_run_when_due_the_checkpoint_last_and_the_end_is_saved_once():
    run = make_run()
    calls = []
    run.train(
        make_steps(6),
        epochs=1,
        checkpoint=Every(lambda step: calls.append(("checkpoint", step)), 2),
        validate=Every(lambda step: calls.append(("validate", step)), 2),
        sample=Every(lambda step: calls.append(("sample", step)), 3),
    )
    assert calls == [
        *(("validate", 2), ("checkpoint", 2), ("sample", 3), ("validate", 4), ("checkpoint", 4)),
        *(("validate", 6), ("sample", 6), ("checkpoint", 6)),
    ]


def test_a_hook_by_minutes_counts_from_the_end_of_its_last_run(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("corefit.engine.loop.time.monotonic", lambda: now[0])
    hook = Every(lambda step: now.__setitem__(0, now[0] + 50), minutes=1, last_time=now[0])
    now[0] += 59
    assert not hook.due(1)
    now[0] += 1
    assert hook.due(2)
    hook.run(2)
    now[0] += 59
    assert not hook.due(3)
    now[0] += 1
    assert hook.due(4)
    assert not Every(print).due(1)


def test_a_full_memory_says_what_makes_the_step_smaller():
    run = make_run()

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    run.model.forward = full
    said = r"^step 1: out of memory with 2 packs of 16 slots: 2 x 16 is too much \(CUDA.*2.00 GiB.\); .*--resume"
    with pytest.raises(RunError, match=said) as failed:
        run.train(make_steps(1), epochs=1, memory=lambda rows, slots: f"{rows} x {slots} is too much")
    assert "\n" not in str(failed.value)


def test_a_rank_that_has_no_pack_of_a_step_can_say_that_memory_ran_out():
    said = out_of_memory(3, (), torch.OutOfMemoryError("no room"), lambda rows, slots: "smaller shares")
    assert str(said).startswith("step 3: out of memory with 1 packs of 8 slots: smaller shares (no room)")


@pytest.mark.parametrize(
    "words, memory",
    [
        ("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'", True),  # of pinned memory too
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_memory_runs_out_in_libraries_too(words, memory):
    assert ran_out(RuntimeError(words)) == memory


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_a_step_without_memory_is_as_if_it_had_not_begun_and_what_was_before_it_is_saved(where):
    straight, run, saved = make_run(), make_run(), []
    straight.train(make_steps(4), epochs=1, should_stop=lambda: "here" if straight.state.step == 2 else "")
    after = torch.get_rng_state()
    calls = [0]

    def full(*args, real=None, limit, **more):
        calls[0] += 1
        if calls[0] > limit:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return real(*args, **more)

    if where == "forward":  # of the second micro-batch of step 3
        run.model.forward = partial(full, real=run.model.forward, limit=5)
    elif where == "backward":
        run.model.lora_A.register_hook(partial(full, real=lambda grad: grad, limit=5))
    else:
        run.optimizer.step = partial(full, real=run.optimizer.step, limit=2)
    hook = Every(lambda step: saved.append((step, run.weights(), torch.get_rng_state(), run.state.as_dict())))
    torch.manual_seed(0)
    with pytest.raises(RunError, match="out of memory") as failed:
        run.train(make_steps(4), epochs=1, checkpoint=hook)
    assert all(p.grad is None for p in run.parameters.values())
    if where == "optimizer":  # weights and moments may be half-way
        assert saved == []
        assert "newest checkpoint" in str(failed.value)
        return
    ((step, weights, random, state),) = saved
    assert step == 2
    assert state["stream"] == straight.state.as_dict()["stream"]
    assert torch.equal(random, after)
    assert all(torch.equal(weights[name], w) for name, w in straight.weights().items())


def test_fp16_autocast_with_scaling_learns_as_fp32_does():
    losses = []
    for dtype, scale in ((torch.float32, False), (torch.float16, True)):
        run = make_run(dropout=0.0, scale=scale)
        run.train(make_steps(8), epochs=1, compute_dtype=dtype)
        losses.append([r.loss for r in run.reports])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[0] != losses[1], "nothing was computed in fp16"


def test_waits_for_the_device_once_a_step(monkeypatch):
    waits = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a second wait"))
    run = make_run()
    run.optimizer = torch.optim.SGD(run.parameters.values(), lr=0.1)
    run.train([(make_batch(1), make_batch(2)), (make_batch(3),)], max_steps=2)
    assert len(waits) == 2


def test_a_batch_reaches_the_loss_as_it_is():
    run = make_run()
    seen = []
    forward = run.model.forward
    run.model.forward = lambda *args: seen.append(args) or forward(*args)
    batch = make_batch(3)
    run.train([(batch,)], max_steps=1)
    *tensors, (cu_seqlens, longest, supervised) = seen[0]
    for tensor, array in zip(tensors, (batch.input_ids, batch.position_ids, batch.labels), strict=True):
        assert tensor.dtype == torch.int64
        assert np.array_equal(tensor.numpy(), array)
    assert np.array_equal(cu_seqlens.numpy(), batch.cu_seqlens) and longest == 16
    assert supervised.tolist() == (tensors[2].flatten() != -100).nonzero()[:, 0].tolist() != []


def test_dropout_is_on_in_training_whatever_mode_the_model_came_in():
    run = make_run()
    run.model.eval()
    modes = []
    run.train(make_steps(1), epochs=1, on_step=lambda report: modes.append(run.model.dropout.training))
    assert modes == [True]
