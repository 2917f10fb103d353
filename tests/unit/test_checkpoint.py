from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import POISON_GRADIENT, POISON_LOSS, Run, make_batch, make_run, make_steps

from corefit.engine import checkpoint
from corefit.engine.checkpoint import check_fit, load, newest_whole, restore, save
from corefit.engine.loop import Every, LoopState
from corefit.engine.optimizer import make_optimizer, make_scaler
from corefit.errors import CheckpointError, NonFiniteError, RecipeError


def save_run(run, folder: Path, step: int, **more) -> Path:
    return save(
        folder,
        step,
        parameters=run.parameters,
        optimizer=run.optimizer,
        scaler=run.scaler,
        loop=run.state.as_dict(),
        lengths=lambda: {"metrics.jsonl": 100 * step},
        **more,
    )


def resume_run(folder: Path, **make):
    """A new process, as far as one process can be: other seeds, other weights, then what the checkpoint says."""
    path, _ = newest_whole(folder)
    found = load(path)
    run = make_run(seed=99, **make)
    with torch.no_grad():
        for parameter in run.parameters.values():
            parameter.fill_(7.0)
    run.state = LoopState.from_dict(found.state["loop"])
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    restore(found, parameters=run.parameters, optimizer=run.optimizer, scaler=run.scaler)
    return run, found


def everything(run) -> dict[str, object]:
    """All that a run ends with: weights, optimizer state, random states, scale."""
    found: dict[str, object] = dict(run.weights())
    for name, parameter in run.parameters.items():
        for key, value in run.optimizer.state[parameter].items():
            found[f"{name}/{key}"] = value
    groups = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    numpy_state = [str(part) for part in np.random.get_state()]
    return found | {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": numpy_state,
        "groups": groups,
        "scaler": run.scaler.state_dict(),
        "state": run.state.as_dict(),
    }


def assert_same(a: dict[str, object], b: dict[str, object]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[key].dtype, key
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


def stable(reports) -> list[dict[str, object]]:
    return [
        {k: v for k, v in asdict(r).items() if k not in ("seconds", "tokens_per_s", "memory_bytes")} for r in reports
    ]


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("scale", [False, True])
def test_a_killed_and_resumed_run_ends_as_a_straight_one_bit_for_bit(tmp_path, optimizer, scale):
    poison = {1: POISON_GRADIENT, 6: POISON_GRADIENT}  # before the checkpoint; and before the kill, so met twice
    straight = make_run(optimizer=optimizer, scale=scale)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    straight.train(make_steps(12, epochs=2, poison=poison), epochs=2)
    expected = everything(straight)

    killed = make_run(optimizer=optimizer, scale=scale)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)

    def kill(report):
        killed.reports.append(report)
        if report.step == 9:
            raise Killed

    with pytest.raises(Killed):
        killed.train(
            make_steps(12, epochs=2, poison=poison),
            epochs=2,
            on_step=kill,
            checkpoint=Every(lambda step: save_run(killed, tmp_path, step), 5),
        )
    resumed, found = resume_run(tmp_path, optimizer=optimizer, scale=scale)
    assert (found.step, resumed.state.step, resumed.state.stream()["next"]) == (5, 5, 10)
    if optimizer.endswith("8bit"):
        assert found.optimizer["lora_A/state1"].dtype == torch.uint8
    start = resumed.state.stream()["next"]
    resumed.train(make_steps(12, start=start, epochs=2, poison=poison), epochs=2)

    assert_same(expected, everything(resumed))
    assert stable(straight.reports) == stable(killed.reports[:5] + resumed.reports)
    assert straight.state.skipped == {"non_finite_gradients": 2}
    assert straight.scaler.get_scale() == (16384.0 if scale else 1.0)


@pytest.mark.parametrize("scale", [False, True])
def test_a_run_that_a_loss_stopped_resumes_as_one_that_never_met_it(tmp_path, scale):
    straight = make_run(scale=scale)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    straight.train(make_steps(9), epochs=1)
    expected = everything(straight)

    stopped = make_run(scale=scale)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with pytest.raises(NonFiniteError):
        stopped.train(
            make_steps(9, poison={6: POISON_LOSS}),
            epochs=1,
            checkpoint=Every(lambda step: save_run(stopped, tmp_path, step), 4),
        )
    resumed, found = resume_run(tmp_path, scale=scale)
    assert (found.step, resumed.state.stream()["next"]) == (6, 12)
    resumed.train(make_steps(9, start=12), epochs=1)  # the data was mended
    assert_same(expected, everything(resumed))
    assert stable(straight.reports) == stable(stopped.reports + resumed.reports)


@pytest.mark.parametrize("bad", ["lora_A", "lora_B"])
def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(tmp_path, bad):
    run = make_run()
    run.train(make_steps(4), epochs=1, checkpoint=Every(lambda step: save_run(run, tmp_path, step, keep=1), 2))
    good, _ = newest_whole(tmp_path)

    def burst(report):
        if report.step == 6:
            run.parameters[bad].data[3, 3] = float("nan")

    run.state.step = 4
    with pytest.raises(NonFiniteError, match=f"step 6: weights are not finite after its update: {bad};"):
        run.train(
            make_steps(4),
            max_steps=8,
            on_step=burst,
            checkpoint=Every(lambda step: save_run(run, tmp_path, step, keep=1), 6),
        )
    assert newest_whole(tmp_path) == (good, ())


CHILD = """
import sys
from pathlib import Path
from dataclasses import asdict
from corefit.engine.checkpoint import save
from tiny_training import make_run
run = make_run(optimizer="adamw_8bit")
from tiny_training import make_steps
run.train(make_steps(1), epochs=1)
for step in range(1, 10**6):
    save(Path(sys.argv[1]), step, parameters=run.parameters, optimizer=run.optimizer, scaler=run.scaler,
         loop=run.state.as_dict(), lengths=dict, keep=1)
    print(step, flush=True)
"""


def test_sigkill_in_the_middle_of_saving_leaves_a_whole_checkpoint(tmp_path):
    tests = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, env=env)
    assert child.stdout.readline() == b"1\n"
    for _ in range(3):
        time.sleep(random.random() * 0.05)
        child.send_signal(signal.SIGSTOP)  # a kill can come at any of these instants
        found, _ = newest_whole(tmp_path)
        assert load(found).step >= 1
        child.send_signal(signal.SIGCONT)
    child.kill()
    said = int((b"1\n" + child.communicate()[0]).split()[-1])
    assert load(newest_whole(tmp_path)[0]).step >= said


def test_a_kill_at_every_single_step_of_saving_leaves_the_old_or_the_new_one_whole(tmp_path, monkeypatch):
    run = make_run()
    run.train(make_steps(1), epochs=1)
    save_run(run, tmp_path / "first", 5, keep=1)
    calls, die_at, real = [0], [10**9], {}

    def counted(name):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == die_at[0]:
                raise Killed
            return real[name](*args, **kwargs)

        return call

    for module, name in (
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
        (shutil, "rmtree"),
        (checkpoint, "write_tensors"),
    ):
        real[name] = getattr(module, name)
        monkeypatch.setattr(module, name, counted(name))
    real["write_text"] = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: counted("write_text")(self, *a, **k))
    found = []
    for die_at[0] in range(1, 100):
        folder = tmp_path / f"run-{die_at[0]}"
        shutil.copytree(tmp_path / "first", folder)
        calls[0] = 0
        try:
            save_run(run, folder, 10, keep=1)
        except Killed:
            path, torn = newest_whole(folder)
            found.append(path.name)
            assert torn == ()
            pointed = (folder / "latest").read_text().strip()
            assert pointed in ("step-00000005", "step-00000010")
            at, die_at[0] = die_at[0], 10**9
            save_run(run, folder, 15, keep=1)  # and the next save clears up
            assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000015"]
            die_at[0] = at
        else:
            break
    assert set(found) == {"step-00000005", "step-00000010"}
    assert len(found) > 12


def test_the_folder_is_as_documented(tmp_path):
    run = make_run(scale=True)
    run.train(make_steps(2), epochs=1)
    path = save_run(run, tmp_path, 2, extra={"note": "hello"})
    assert path == tmp_path / "step-00000002"
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    names = ["manifest.json", "optimizer.safetensors", "rng.safetensors", "state.json", "trainable.safetensors"]
    assert sorted(p.name for p in path.iterdir()) == names
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["lengths"], state["extra"]) == (2, {"metrics.jsonl": 200}, {"note": "hello"})
    assert state["loop"]["stream"]["next"] == 4
    assert (
        state["versions"]["torch"] == torch.__version__.split("+")[0] or state["versions"]["torch"] == torch.__version__
    )
    weights = load_file(path / "trainable.safetensors")
    assert sorted(weights) == ["lora_A", "lora_B"]
    assert torch.equal(weights["lora_B"], run.weights()["lora_B"])


def test_only_the_newest_whole_ones_are_kept_and_a_torn_one_is_not_counted(tmp_path):
    run = make_run()
    run.train(make_steps(1), epochs=1)
    for step in (1, 2, 3):
        save_run(run, tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.steps_in(tmp_path)] == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "state.json").write_text("{}")
    save_run(run, tmp_path, 4, keep=2)
    assert [p.name for p in checkpoint.steps_in(tmp_path)] == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("keep", [0, 1])
def test_the_one_just_saved_is_always_kept(tmp_path, keep):
    run = make_run()
    for step in (1, 2):
        path = save_run(run, tmp_path, step, keep=keep)
    assert checkpoint.steps_in(tmp_path) == [path]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda p: flip(p / "trainable.safetensors"), "trainable.safetensors is not what was written"),
        (lambda p: (p / "optimizer.safetensors").write_bytes(b""), "optimizer.safetensors has 0 bytes of"),
        (lambda p: (p / "rng.safetensors").unlink(), "no rng.safetensors"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: (p / "manifest.json").write_text('{"format"'), "manifest.json: JSONDecodeError"),
        (lambda p: (p / "manifest.json").write_text('{"format": 1, "files": {}}'), "manifest.json: KeyError"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json: TypeError"),
        (lambda p: (p / "manifest.json").write_text('{"format": 2}'), "written in format 2, this corefit reads 1"),
    ],
)
def test_a_torn_checkpoint_is_named_passed_over_and_never_loaded(tmp_path, damage, why):
    run = make_run()
    run.train(make_steps(1), epochs=1)
    save_run(run, tmp_path, 1), save_run(run, tmp_path, 2)
    damage(tmp_path / "step-00000002")
    path, torn = newest_whole(tmp_path)
    assert path == tmp_path / "step-00000001"
    assert len(torn) == 1
    assert why in torn[0]
    assert "step-00000002" in torn[0]
    with pytest.raises(CheckpointError, match=why):
        load(tmp_path / "step-00000002")


def test_nothing_saved_is_nothing_found(tmp_path):
    assert newest_whole(tmp_path / "absent") == (None, ())
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-00000001").write_text("a file")
    assert newest_whole(tmp_path) == (None, ())


@pytest.mark.parametrize("limit", [100, 3_000, 20_000])
def test_a_full_disk_is_a_checkpoint_error_and_leaves_the_older_ones(tmp_path, limit):
    run = make_run()
    run.train(make_steps(1), epochs=1)
    save_run(run, tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"step-00000002: not saved: .*(too large|27)") as error:
            save_run(run, tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert newest_whole(tmp_path) == (tmp_path / "step-00000001", ())
    assert run.train(make_steps(2), epochs=1) == "epochs", "the run can go on"
    save_run(run, tmp_path, 3)


def test_a_folder_that_cannot_be_written_is_a_checkpoint_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="not saved"):
        save_run(make_run(), tmp_path / "checkpoints", 1)


def test_a_value_that_json_cannot_hold_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="not saved: Out of range float"):
        save_run(make_run(), tmp_path, 1, extra={"best": float("nan")})


def test_another_adapter_is_refused_by_name_and_shape(tmp_path):
    run = make_run()
    found = load(save_run(run, tmp_path, 1))
    other = dict(run.parameters)
    other["lora_A"] = torch.nn.Parameter(torch.zeros(8, 256))
    with pytest.raises(RecipeError, match=r"holds \(16, 256\) for lora_A, the model trains \(8, 256\) \(1 such"):
        check_fit(found, other)
    del other["lora_A"]
    with pytest.raises(RecipeError, match=r"holds \(16, 256\) for lora_A, the model trains nothing"):
        check_fit(found, other)


def test_nothing_is_pickled(tmp_path):
    run = make_run(optimizer="adamw_8bit")
    run.train(make_steps(1), epochs=1)
    for file in save_run(run, tmp_path, 1).iterdir():
        assert file.suffix in (".json", ".safetensors")
        assert b"\x80\x04" not in file.read_bytes()[:64]
        json.loads(file.read_text()) if file.suffix == ".json" else load_file(file)


@pytest.mark.parametrize("quantizer", ["nf4", pytest.param("int8", marks=pytest.mark.full)])
def test_the_real_stack_resumes_bit_for_bit_and_evaluating_on_the_way_changes_nothing(tmp_path, tiny_model, quantizer):
    """A quantised base, peft's dropout, the chunked loss; validation and answers between the steps of one run only."""
    from corefit.defaults import corefit_quantizers
    from corefit.engine.adapter import AdapterSpec, attach_adapter
    from corefit.engine.evaluate import Decoding, generate, validation_loss
    from corefit.engine.loss import CausalLoss
    from corefit.engine.model import load_base

    entry = next(entry for entry in corefit_quantizers() if entry.name == quantizer)

    def make(seed: int) -> Run:
        torch.set_num_threads(1)
        base = load_base(str(tiny_model), quantizer=entry, compute_dtype="float32", device="cpu")
        loss = CausalLoss(attach_adapter(base, AdapterSpec(r=32, alpha=64, dropout=0.2), seed=seed))
        parameters = {name: p for name, p in loss.named_parameters() if p.requires_grad}
        optimizer = make_optimizer("adamw_8bit", parameters, lr=1e-2)
        torch.manual_seed(seed)
        return Run(loss, optimizer, make_scaler("cpu", enabled=True), LoopState(), [])

    straight = make(0)
    straight.train(make_steps(6), epochs=1)
    expected = everything(straight)
    assert {v.dtype for s in straight.optimizer.state.values() for v in s.values() if hasattr(v, "dtype")} >= {
        torch.uint8
    }
    first, state, losses = make(0), LoopState(), []
    first.state = state

    def look(step):
        losses.append(validation_loss(first.model, [make_batch(77)])[0])
        generate(first.model.model, [1, 5, 9], stop_ids=[2], max_tokens=4, decoding=Decoding(temperature=1.0))

    why = first.train(
        make_steps(6),
        epochs=1,
        validate=Every(look, 1),
        checkpoint=Every(lambda step: save_run(first, tmp_path, step), minutes=60),
        should_stop=lambda: "SIGTERM" if state.step == 3 else "",
    )
    assert (why, len(set(losses))) == ("SIGTERM", 3)
    found = load(tmp_path / "step-00000003")
    second = make(5)
    second.state = LoopState.from_dict(found.state["loop"])
    restore(found, parameters=second.parameters, optimizer=second.optimizer, scaler=second.scaler)
    second.train(make_steps(6, start=second.state.stream()["next"]), epochs=1)
    assert stable(straight.reports) == stable(first.reports + second.reports)
    assert_same(expected, everything(second))
