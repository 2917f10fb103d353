from __future__ import annotations

import math
import os
import resource
import socket
import tempfile
from types import SimpleNamespace

import pytest
import torch
from cli import corefit as run_corefit
from tiny import write_model

from corefit import merge as merging
from corefit import selftest as tested
from corefit.engine import attention, checkpoint, export, loop, loss, model
from corefit.errors import ModelError

torch.set_num_threads(1)
PACKED, SPLIT, CHECKPOINTED, CHUNKED, RESUMED, MERGED, SAVED, SAVED_WHOLE = tested.CHECKS
TITLES = set(tested.CHECKS)


def run(base):
    """Exit code, the result of every line of the table by its title, all lines."""
    lines = []
    code = tested.selftest(str(base), device="cpu", say=lines.append)
    words = {f"{line[:42].strip()} ({line[43:50].strip()})": line[80:] for line in lines if line[:42].strip() in TITLES}
    return code, words, lines


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("small"), num_hidden_layers=1)


@pytest.fixture
def unquantised(monkeypatch):
    monkeypatch.setattr(tested, "QUANTIZERS", ("none",))


def test_everything_holds_without_network_and_nothing_stays_behind(small, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.chdir(tmp_path)
    code, words, lines = run(small)
    assert code == 0, lines
    nothing = "skipped: quantised weights are never trained"
    assert words == {f"{title} ({q})": "ok" for q in ("none", "nf4") for title in TITLES} | {
        f"{SAVED_WHOLE} (nf4)": nothing
    }
    assert lines[-1] == "all hold, 1 skipped"
    stored, dequantised = (float(line.split("KL ")[1].split()[0]) for line in lines if "KL" in line)
    assert dequantised < 1e-9 < 1e-3 < stored
    assert os.listdir(tmp_path) == ["temporary"] and not os.listdir(tmp_path / "temporary")


def packs_with_a_cache(patch):
    def cached(part, input_ids, position_ids, layout=None):
        return part(input_ids=input_ids, position_ids=position_ids, use_cache=True)

    patch.setattr(attention, "run_packed", cached)
    patch.setattr(loss, "run_packed", cached)


def mean_of_means(patch):
    take_step = loop.take_step

    def wrong(loss_fn, batches, *rest):
        total = sum(batch.n_supervised for batch in batches)
        part = total / sum(batch.n_supervised > 0 for batch in batches)
        return take_step(lambda *four: loss_fn(*four) * part / (four[2] != -100).sum(), batches, *rest)

    patch.setattr(loop, "take_step", wrong)


def other_dropout_in_backward(patch):
    wrong = {"use_reentrant": False, "preserve_rng_state": False}
    patch.setattr(
        model,
        "enable_gradient_checkpointing",
        lambda network: network.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=wrong),
    )


def no_checkpointing(patch):
    patch.setattr(model, "enable_gradient_checkpointing", lambda network: None)


def chunks_without_their_last_row(patch):
    apply = loss.LinearCrossEntropy.apply

    def wrong(hidden, targets, *rest):
        *_, chunk, _ = rest
        kept = torch.arange(len(hidden)) % chunk != chunk - 1
        return apply(hidden[kept], targets[kept], *rest)

    patch.setattr(loss, "LinearCrossEntropy", SimpleNamespace(apply=wrong))


def head_without_gradient(patch):
    apply = loss.LinearCrossEntropy.apply
    wrong = SimpleNamespace(apply=lambda hidden, targets, weight, *rest: apply(hidden, targets, weight.detach(), *rest))
    patch.setattr(loss, "LinearCrossEntropy", wrong)


def no_optimizer_state(patch):
    patch.setattr(checkpoint, "load_optimizer_state", lambda *_: None)


def no_random_state(patch):
    patch.setattr(checkpoint, "set_rng_state", lambda *_: None)


def no_loop_state(patch):
    from_dict = loop.LoopState.from_dict
    patch.setattr(loop.LoopState, "from_dict", lambda data: from_dict({**data, "step": 0}))


def twice_the_scale(patch):
    read = merging._adapter_config
    patch.setattr(merging, "_adapter_config", lambda path: (c := read(path)) | {"lora_alpha": 2 * c["lora_alpha"]})


def adapter_without_a_layer(patch):
    layout_of = export.layout_of

    def wrong(network, base):
        found = layout_of(network, base)
        if found["adapter"] is None:
            return found
        names = {key: own for key, own in found["names"].items() if "layers.0.mlp.up_proj" not in key}
        assert len(names) == len(found["names"]) - 2
        return found | {"names": names}

    patch.setattr(export, "layout_of", wrong)


def model_without_its_last_norm(patch):
    rewrite = export.rewrite_weights

    def wrong(base, out, change, added=None, rows=None):
        kept = lambda name, read: read() if name == "model.norm.weight" else change(name, read)  # noqa: E731
        rewrite(base, out, kept, added, rows)

    patch.setattr(export, "rewrite_weights", wrong)


@pytest.mark.parametrize(
    ("bug", "title", "word"),
    [
        (packs_with_a_cache, PACKED, "FAILED"),
        (mean_of_means, SPLIT, "FAILED"),
        (other_dropout_in_backward, CHECKPOINTED, "FAILED"),
        (no_checkpointing, CHECKPOINTED, "FAILED: RunError: nothing was computed again: checkpointing is off"),
        (chunks_without_their_last_row, CHUNKED, "FAILED"),
        (head_without_gradient, CHUNKED, "FAILED"),
        (no_optimizer_state, RESUMED, "FAILED"),
        (no_random_state, RESUMED, "FAILED"),
        (no_loop_state, RESUMED, "FAILED"),
        (twice_the_scale, MERGED, "FAILED"),
        (adapter_without_a_layer, SAVED, "FAILED"),
        (model_without_its_last_norm, SAVED_WHOLE, "FAILED"),
    ],
)
def test_a_bug_fails_its_own_line_and_no_other(bug, title, word, small, monkeypatch, unquantised):
    bug(monkeypatch)
    code, words, lines = run(small)
    assert words == {f"{t} (none)": word if t == title else "ok" for t in TITLES}
    assert (code, lines[-1]) == (1, f"FAILED: {title} (none)")


def test_a_dequantised_base_that_is_the_stored_one_fails_the_merged_line_of_nf4(small, monkeypatch):
    monkeypatch.setattr(merging, "as_stored", lambda **_: (frozenset(), lambda name, weight: weight))
    monkeypatch.setattr(tested, "CHECKS", {MERGED: tested.CHECKS[MERGED]})
    code, words, lines = run(small)
    assert words == {f"{MERGED} (none)": "ok", f"{MERGED} (nf4)": "FAILED"}
    assert (code, lines[-1]) == (1, f"FAILED: {MERGED} (nf4)")


def test_lines_of_nf4_are_skipped_with_the_reason_where_bitsandbytes_is_not_usable(small, monkeypatch):
    monkeypatch.setattr(model, "import_bitsandbytes", lambda: False)
    monkeypatch.setattr(tested, "CHECKS", {SAVED: tested.CHECKS[SAVED], CHUNKED: tested.CHECKS[CHUNKED]})
    code, words, lines = run(small)
    why = "skipped: quantizer 'nf4': bitsandbytes is not installed; pip install bitsandbytes"
    assert words == {f"{SAVED} (none)": "ok", f"{CHUNKED} (none)": "ok", f"{SAVED} (nf4)": why, f"{CHUNKED} (nf4)": why}
    assert (code, lines[-1]) == (0, "all hold, 2 skipped")


def test_what_stops_a_measurement_is_said_in_its_line(small, monkeypatch, unquantised):
    def broken(*_, **__):
        raise OSError("no space\nleft")

    monkeypatch.setattr(checkpoint, "save", broken)
    code, words, lines = run(small)
    assert words.pop(f"{RESUMED} (none)") == "FAILED: OSError: no space left"
    assert set(words.values()) == {"ok"}
    assert (code, lines[-1]) == (1, f"FAILED: {RESUMED} (none)")


def test_a_model_that_is_not_there_is_the_users_mistake(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        tested.selftest(str(tmp_path / "nowhere"), device="cpu", say=lambda line: None)


def test_apart_is_relative_and_never_takes_nothing_for_equal():
    one = {"a": torch.tensor([1.0, -2.0]), "b": torch.zeros(2)}
    assert tested.apart(one, one) == 0.0
    assert tested.apart({**one, "a": torch.tensor([1.0, -2.1])}, one) == pytest.approx(0.05)
    assert tested.apart({**one, "b": torch.tensor([0.0, 0.5])}, one) == pytest.approx(0.5)
    assert tested.apart({"b": one["b"]}, {"b": one["b"]}) == math.inf
    assert tested.apart({"a": one["a"]}, one) == tested.apart(one, {"a": one["a"]}) == math.inf
    assert tested.apart({**one, "a": torch.zeros(1)}, one) == math.inf
    assert math.isnan(tested.apart({**one, "a": torch.tensor([1.0, math.nan])}, one))
    assert math.isnan(tested.apart(one, {**one, "a": torch.tensor([1.0, math.nan])}))


@pytest.mark.measured
def test_the_command_takes_less_than_a_minute_in_a_folder_where_it_may_not_write(tmp_path):
    (tmp_path / "folder").mkdir(mode=0o555)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_corefit("selftest", "--device", "cpu", cwd=tmp_path / "folder", fresh=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all hold, 1 skipped"
    assert done.stderr == ""
    # of the processor, by one thread: what it takes on an idle machine, however busy this one is
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    assert not os.listdir(tmp_path / "folder")
