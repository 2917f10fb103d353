"""Several processes as one run, over gloo: equal to one process, whoever dies, however many go on."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cli import corefit, environment
from one_rank import one_rank
from safetensors.numpy import load_file, save_file

from corefit.engine.ranks import ALONE, _buckets, _of_this_start

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["corefit.session", "corefit.run", "corefit.cli", "peft"])
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()


def records(n: int, seed: int = 0) -> str:
    chance = random.Random(seed)
    texts = [(chance.choices(WORDS, k=chance.randint(3, 12)), chance.choices(WORDS, k=chance.randint(2, 30)))
             for _ in range(n)]  # fmt: skip
    return "".join(
        json.dumps({"instruction": " ".join(q), "input": "", "output": " ".join(a)}) + "\n" for q, a in texts
    )


@pytest.fixture(scope="module", name="flags")
def small_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    data.write_text(records(66), "utf-8")
    sets = "adapter.dropout=0 pack.max_length=128 train.packs_per_step=4 train.epochs=1 train.precision=fp32"
    more = "run.threads=1 val.every_steps=4 val.records=7 train.lr=2e-4 train.warmup=0 sample.max_tokens=8"
    names = ["--plugin", "alpaca", "--template", "internlm_chat", "--scheduler", "constant"]
    return ["--model", str(tiny_model), "--data", str(data), *names, "--set", *sets.split(), *more.split()]


def together(
    world: int, words: list[str], where: Path, *, full_disk: bool = False, stop: Path | None = None
) -> list[int | None]:
    """Train with so many ranks; give their exit codes. ``stop``: a run; at its step 8 rank 1 gets SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ways = [(rank, world, port, words, str(where), full_disk) for rank in range(world)]
    started = [FORKS.Process(target=one_rank, args=way) for way in ways]
    for process in started:
        process.start()
    if stop:
        at_step_8(stop, lambda: started[0].is_alive())
        os.kill(int(started[1].pid or 0), signal.SIGTERM)
    for process in started:
        process.join(100)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()  # what hangs
    return codes


def said(where: Path, rank: int = 0) -> str:
    return (where / f"rank{rank}.txt").read_text("utf-8")


def steps(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if "loss" in line or "val_loss" in line]


def same(a: Path, b: Path, *, within: float = 1e-6, metrics: bool = True) -> None:
    """Two runs gave the same weights, and metrics but for the time they took."""
    first, second = (load_file(next(run.glob("*/*model.safetensors"))) for run in (a, b))
    assert first.keys() == second.keys()
    for name in first:
        assert abs(first[name].astype("f8") - second[name]).max() <= within, name
    if not metrics:
        return
    timed = {"seconds", "tokens_per_s", "memory_bytes"}
    for x, y in zip(steps(a), steps(b), strict=True):
        assert x.keys() == y.keys()
        for key in x.keys() - timed:
            near = pytest.approx(y[key], rel=max(within, 2e-6), abs=within) if isinstance(y[key], float) else y[key]
            assert x[key] == near, (x["step"], key)
    ledgers = [json.loads((run / "ledger.json").read_text("utf-8")) for run in (a, b)]
    assert ledgers[0] == ledgers[1] and ledgers[0]["balanced"]


def half_of_the_base(text: str) -> bool:
    mine, all_ = map(float, re.findall(r"sharding: full: a rank holds (\S+) of the base's (\S+) MiB", text)[-1])
    return abs(mine / all_ - 0.5) < 0.03


@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_ranks_are_one_process_also_where_the_last_step_has_no_pack_for_one(
    quantizer: str, flags: list[str], tmp_path: Path
) -> None:
    how = ["--quantizer", quantizer, *flags]
    assert together(1, ["--out", "one", *how], tmp_path) == [0]
    assert together(2, ["--out", "two", *how], tmp_path) == [0, 0], said(tmp_path) + said(tmp_path, 1)
    assert together(4, ["--out", "four", *how], tmp_path) == [0] * 4, said(tmp_path)
    assert steps(tmp_path / "one")[-2]["packs"] == 1  # of 4: the others' share of the last step is nothing
    same(tmp_path / "one", tmp_path / "two")
    same(tmp_path / "one", tmp_path / "four")
    shares = ["run.sharding=full", "train.gradient_checkpointing=true", "sample.every_steps=5"]
    assert together(2, ["--out", "shares", *how, *shares], tmp_path) == [0, 0], said(tmp_path) + said(tmp_path, 1)
    same(tmp_path / "one", tmp_path / "shares")
    assert half_of_the_base(said(tmp_path))
    assert said(tmp_path, 1) == said(tmp_path, 3) == ""
    assert "ranks: 2, each with its share" in said(tmp_path)


def test_two_then_one_then_two_ranks_are_the_straight_run(flags: list[str], tmp_path: Path) -> None:
    assert together(1, ["--out", "straight", *flags], tmp_path) == [0]
    stop = ["--out", "run", *flags, "checkpoint.every_steps=3"]
    assert together(2, [*stop, "train.max_steps=3"], tmp_path) == [0, 0], said(tmp_path)
    assert together(1, ["--resume", *stop, "train.max_steps=5"], tmp_path) == [0], said(tmp_path)
    assert together(2, ["--resume", *stop], tmp_path) == [0, 0], said(tmp_path) + said(tmp_path, 1)
    run, straight = tmp_path / "run", tmp_path / "straight"
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, straight)]
    assert max(abs(weights[0][name] - weights[1][name]).max() for name in weights[0]) <= 1e-6
    assert together(2, ["--resume", *stop], tmp_path) == [0, 0]
    assert "is complete: nothing to do" in said(tmp_path)


def test_ranks_take_the_micro_batch_that_rank_0_chose(flags: list[str], tmp_path: Path) -> None:
    assert together(1, ["--out", "one", *flags, "train.max_steps=3"], tmp_path) == [0]
    auto = ["--out", "two", *flags, "train.max_steps=3", "train.micro_batch=auto"]
    assert together(2, auto, tmp_path) == [0, 0], said(tmp_path) + said(tmp_path, 1)
    assert "micro-batch: 2 packs (auto)" in said(tmp_path)  # of 4 a step
    assert "micro_batch = 2" in (tmp_path / "two" / "recipe.toml").read_text("utf-8")
    weights = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two")]
    assert max(abs(weights[0][name] - weights[1][name]).max() for name in weights[0]) <= 1e-6


def test_full_fine_tuning_in_shares_is_the_straight_run_also_resumed(flags: list[str], tmp_path: Path) -> None:
    how = ["--quantizer", "none", *flags, "adapter.kind=none", "run.sharding=full", "sample.every_steps=5"]
    how += ["checkpoint.every_steps=3"]
    assert together(1, ["--out", "one", *how], tmp_path) == [0]
    assert "sharding: off, one process holds the whole model" in said(tmp_path)
    more = [*how, "train.gradient_checkpointing=true"]
    assert together(2, ["--out", "two", *more], tmp_path) == [0, 0], said(tmp_path) + said(tmp_path, 1)
    assert half_of_the_base(said(tmp_path))
    one, two = tmp_path / "one", tmp_path / "two"
    same(one, two)
    answers = [(run / "samples.jsonl").read_text("utf-8") for run in (one, two)]
    assert answers[0] == answers[1]
    for path in sorted((one / "checkpoints").glob("*/*[er].safetensors")):  # weights and optimizer
        before, after = load_file(path), load_file(two / path.relative_to(one))
        assert before.keys() == after.keys()
        assert max(abs(before[name] - after[name]).max() for name in before) <= 1e-6, path
    run = ["--out", "run", *how]
    assert together(2, [*run, "train.max_steps=3"], tmp_path) == [0, 0], said(tmp_path)
    assert together(1, ["--resume", *run, "train.max_steps=5"], tmp_path) == [0], said(tmp_path)
    assert together(2, ["--resume", *run], tmp_path) == [0, 0], said(tmp_path) + said(tmp_path, 1)
    same(one, tmp_path / "run", metrics=False)


def test_full_fine_tuning_of_a_base_in_16_bits_ends_well_on_every_rank(flags: list[str], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(flags[1], tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(flags[1], dtype=torch.bfloat16).save_pretrained(base)
    how = ["--model", str(base), *flags[2:], "adapter.kind=none", "model.quantizer=none", "train.max_steps=2"]
    how += ["val.share=0.3", "val.records=8"]
    assert together(2, ["--out", "run", *how], tmp_path) == [0, 0], said(tmp_path) + said(tmp_path, 1)
    assert "model/: written in bfloat16" in said(tmp_path) and "as written" in said(tmp_path)
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["model"]["stored"] == "bfloat16"


def test_a_refused_save_and_a_loss_that_is_not_finite_hang_nobody(flags: list[str], tmp_path: Path) -> None:
    how = ["--quantizer", "none", *flags, "adapter.kind=none", "run.sharding=full", "checkpoint.every_steps=2"]
    assert together(2, ["--out", "run", *how, "train.max_steps=4"], tmp_path, full_disk=True) == [0, 0], said(tmp_path)
    assert "step-00000002: not saved: [Errno 28] No space left on device" in said(tmp_path)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000004"]
    assert together(2, ["--out", "bad", *how, "train.lr=1e30"], tmp_path) == [1, 1], said(tmp_path)
    for rank in (0, 1):
        assert f"rank {rank}: error: step 2: the loss is not finite (loss scale 1): first in" in said(tmp_path, rank)
    assert json.loads((tmp_path / "bad" / "nonfinite.json").read_text("utf-8"))["records_together"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("more", "within"),
    [
        (["train.precision=bf16"], 1e-6),
        (["train.precision=fp16", "train.max_steps=3"], 1e-6),
        (["model.add_tokens=['<new>']", "adapter.modules_to_save=['lm_head']"], 1e-6),
        (["adapter.dora=true"], 1e-5),
        (["adapter.kind=none", "model.quantizer=none", "model.tied=true"], 1e-6),
        # layers are gathered in 16 bits: a norm's weights are rounded, which in one process they are not
        (["adapter.kind=none", "model.quantizer=none", "train.precision=bf16"], 1e-2),
        (["adapter.kind=none", "model.quantizer=none", "train.precision=fp16", "train.max_steps=3"], 1e-3),
    ],
)
def test_shares_of_everything_that_trains(more: list[str], within: float, flags: list[str], tmp_path: Path) -> None:
    if "model.tied=true" in more:
        flags = ["--model", str(tied(Path(flags[1]), tmp_path / "tied")), *flags[2:]]
    how = [*flags, *(word for word in more if word != "model.tied=true")]
    assert together(1, ["--out", "one", *how], tmp_path) == [0], said(tmp_path)
    assert together(2, ["--out", "two", *how, "run.sharding=full"], tmp_path) == [0, 0], said(tmp_path)
    same(tmp_path / "one", tmp_path / "two", within=within)


def tied(model: Path, folder: Path) -> Path:
    """Copy a model folder with the embeddings as its head."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}), "utf-8")
    weights = load_file(folder / "model.safetensors")
    save_file({name: weights[name] for name in weights if name != "lm_head.weight"}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return folder


def test_other_data_on_another_machine_is_refused(flags: list[str], tmp_path: Path) -> None:
    import corefit.run
    from corefit.engine.ranks import Ranks
    from corefit.errors import RunError

    assert together(1, ["--out", "run", *flags, "train.max_steps=1"], tmp_path) == [0]
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    facts = {**run["identity"], "file 0 of data 0": "data.jsonl, 3 bytes, 0123456789abcdef"}
    text = json.dumps(dict(recipe=(tmp_path / "run" / "recipe.toml").read_text("utf-8"), folder=str(tmp_path / "run"),
                           resuming=False, facts=facts, changes=[]))  # fmt: skip

    class Second(Ranks):
        def tell(self, _: str = "") -> str:
            return text

    with pytest.raises(RunError, match="not what rank 0 has: file 0 of data 0: data.jsonl, 3 bytes"):
        corefit.run._follow(Second(rank=1, world=2), False)


def test_a_mistake_is_said_by_rank_0_and_ends_all_with_code_2(flags: list[str], tmp_path: Path) -> None:
    done = corefit("launch", "-n", 2, "--out", "run", *flags, "train.packs_per_step=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "rank 0: error: train.packs_per_step: 3 is not a multiple of train.micro_batch 1 x 2 ranks" in done.stderr
    assert "Traceback" not in done.stderr
    done = corefit("launch", "-n", "two", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "corefit: error: 'two' processes (launch -n, NPROC_PER_NODE): expected a number, best that of the GPUs\n",
    )


def at_step_8(run: Path, alive: Callable[[], bool]) -> None:
    until = time.monotonic() + 90
    while not (run / "metrics.jsonl").is_file() or len(steps(run)) < 9:
        assert time.monotonic() < until and alive()
        time.sleep(0.05)


def killed(process: subprocess.Popen[Any], run: Path, number: int) -> list[int]:
    """Wait for step 8, then send the signal to rank 1; give the ids of all ranks."""
    at_step_8(run, lambda: process.poll() is None)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()  # fmt: skip
    os.kill(max(map(int, children)), number)
    return [*map(int, children)]


@pytest.mark.parametrize("sharding", ["none", pytest.param("full", marks=pytest.mark.full)])
def test_a_killed_rank_ends_all_within_30_seconds_and_the_run_goes_on(
    sharding: str, flags: list[str], tmp_path: Path
) -> None:
    words = ["launch", "-n", "2", "--out", "run", *flags, "train.epochs=60", "checkpoint.every_steps=4"]
    words += [f"run.sharding={sharding}"]
    begin = [sys.executable, "-m", "corefit"]
    process = subprocess.Popen(
        [*begin, *words], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    killed(process, tmp_path / "run", signal.SIGKILL)
    began = time.monotonic()
    assert process.wait(30) == 1
    assert time.monotonic() - began < 30
    errors = process.communicate()[1]
    assert "was ended by SIGKILL; --resume goes on from what is saved" in errors
    assert re.search(r"rank 0: error: another rank ended or can't be reached \(.*Connection", errors), errors
    done = len([line for line in steps(tmp_path / "run") if "loss" in line])
    more = ["--resume", *words[3:], f"train.max_steps={done + 3}"]
    assert together(2, more, tmp_path) == [0, 0], said(tmp_path) + said(tmp_path, 1)
    assert "resume: from step" in said(tmp_path)


@pytest.mark.full
def test_torchrun_starts_a_run_again_and_it_goes_on(flags: list[str], tmp_path: Path) -> None:
    words = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "corefit", "train", "--out", "run", *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words, "train.epochs=4", "checkpoint.every_steps=2"],
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    killed(process, tmp_path / "run", signal.SIGKILL)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, out + errors
    assert "resume: from step" in out and "ended by epochs" in out


def test_a_signal_to_one_rank_saves_and_stops_all(flags: list[str], tmp_path: Path) -> None:
    codes = together(2, ["--out", "run", *flags, "train.epochs=60"], tmp_path, stop=tmp_path / "run")
    assert codes == [1, 143], said(tmp_path) + said(tmp_path, 1)
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert (run["status"], run["ended_by"]) == ("interrupted", "another rank stopped")
    newest = (tmp_path / "run" / "checkpoints" / "latest").read_text("utf-8").strip()
    assert newest == f"step-{run['steps']:08}"


def test_ranks_save_and_end_where_torchrun_is_killed(flags: list[str], tmp_path: Path) -> None:
    words = ["launch", "-n", "2", "--out", "run", *flags, "train.epochs=200"]
    process = subprocess.Popen(
        [sys.executable, "-m", "corefit", *words],
        cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    ranks = killed(process, tmp_path / "run", signal.SIGCONT)
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < until, "ranks that nobody watches train on"
        time.sleep(0.05)
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert (run["status"], run["ended_by"]) == ("interrupted", "SIGTERM")
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file()


@pytest.mark.parametrize("what", ["other", "fewer"])
def test_ranks_that_make_other_samples_of_the_data_stop_before_they_train_on_them(
    what: str, flags: list[str], tmp_path: Path
) -> None:
    last = "'?' * int(os.environ['RANK'])" if what == "other" else "''"
    rule = "not int(os.environ['RANK']) or len(record['output']) % 3" if what == "fewer" else "True"
    (tmp_path / "impure.py").write_text(
        "import os\n\ndef chat(record):\n"
        f"    if {rule}:\n"
        "        return {'messages': [{'role': 'user', 'content': record['instruction'] + " + last + "},\n"
        "                             {'role': 'assistant', 'content': record['output']}]}\n"
        "    return None\n",
        "utf-8",
    )
    words = ["impure.py:chat" if word == "alpaca" else word for word in flags]
    assert together(2, ["--out", "run", *words, "val.records=0"], tmp_path) == [1, 1], said(tmp_path)
    for rank in (0, 1):
        error = f"rank {rank}: error: step [1-4]: not the samples that another rank has"
        assert re.search(error, said(tmp_path, rank)), said(tmp_path, rank)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_start_again_shares_nothing_with_the_one_before() -> None:
    import torch.distributed as dist

    store, n = dist.HashStore(), 0

    def start(rank: int, after: float) -> str:
        time.sleep(after)
        mine = _of_this_start(store, rank, 2)
        if rank == 0:
            assert not mine.check(["address"]), "left by the start before"
            mine.set("address", f"of start {n}")
        return mine.get("address").decode()

    for n in range(3):
        with ThreadPoolExecutor() as pool:  # rank 1 comes first and finds what the last start left
            both = [pool.submit(start, rank, after) for rank, after in ((0, 0.1), (1, 0.0))]
            assert [each.result(20) for each in both] == [f"of start {n}"] * 2


def test_a_rank_that_would_begin_elsewhere_refuses(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from corefit.engine.loop import LoopState
    from corefit.engine.ranks import Ranks
    from corefit.errors import RunError
    from corefit.session import Session

    class Second(Ranks):
        def first(self, value: float) -> float:
            return 4.0

    session = SimpleNamespace(ranks=Second(rank=1, world=2), folder=tmp_path, state=LoopState(step=4))
    Session._same_step(session)
    session.state = LoopState()
    with pytest.raises(RunError, match="rank 0 goes on from step 4, here it is 0: .*checkpoints must be the same"):
        Session._same_step(session)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, no RANK, no MASTER_ADDR, no MASTER_PORT: nobody sets these so"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two, RANK=0, no MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "WORLD_SIZE=2, RANK=2, MASTER_ADDR"),
        ({"NPROC_PER_NODE": "gpu"}, "'gpu' processes (launch -n, NPROC_PER_NODE): expected a number"),
    ],
)
def test_variables_that_torchrun_would_not_set_are_refused(
    variables: dict[str, str], said: str, flags: list[str], tmp_path: Path
) -> None:
    done = corefit("train", *flags, cwd=tmp_path, env=variables)
    assert (done.returncode, said in done.stderr, done.stderr.count("\n")) == (2, True, 1), done.stderr


def test_empty_variables_mean_nothing(flags: list[str], tmp_path: Path) -> None:
    nothing = dict.fromkeys(("WORLD_SIZE", "RANK", "NPROC_PER_NODE", "TORCHELASTIC_RESTART_COUNT"), "")
    done = corefit("train", *flags, "train.max_steps=1", cwd=tmp_path, env=nothing)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("there", [False, True])
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from corefit.engine.ranks import Ranks
    from corefit.errors import RecipeError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    second = Ranks(rank=9, world=16, local=1)
    own = "cuda:1" if there else "auto"
    assert [second.device(wanted) for wanted in ("auto", "cuda", "cpu")] == [own, "cuda:1", "cpu"]
    assert [ALONE.device(wanted) for wanted in ("auto", "cuda:3")] == ["auto", "cuda:3"]
    with pytest.raises(RecipeError, match="'cuda:0' is one GPU for 16 processes; 'cuda' is one for each"):
        second.device("cuda:0")


def test_tensors_are_summed_in_parts() -> None:
    import torch

    sizes = [[t.numel() for t in part] for part in _buckets([torch.zeros(n) for n in (2**24, 2**24, 1, 2**26, 3)])]
    assert sizes == [[2**24, 2**24], [1], [2**26], [3]]
    assert list(_buckets([])) == []
    assert ALONE.sum(1, 2.5) == [1, 2.5]
    assert (ALONE.tell("x"), ALONE.agree(""), ALONE.agree("a")) == ("x", "", "a")
