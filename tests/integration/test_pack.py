"""`corefit pack` and training from what it wrote, through the real command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli import corefit, environment
from safetensors.numpy import load_file

SMALL = [
    *("pack.max_length=128", "train.packs_per_step=2", "sample.max_tokens=4", "adapter.r=4", "train.lr=5e-3"),
    *("pack.held=16", "train.epochs=2", "val.share=0.2"),
]


@pytest.fixture
def base(tmp_path: Path) -> list[object]:
    write(tmp_path / "rows.jsonl", 50)
    return ["--plugin", "oasst1", "--template", "chatml", "--data", "rows.jsonl"]


def write(path: Path, n: int) -> Path:
    rows = ({"text": f"### Human: What is {i}?### Assistant: It is {i}, {'really ' * (i % 9)}so."} for i in range(n))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_training_from_an_arena_is_training_from_the_data(
    tmp_path: Path, base: list[object], tiny_model: Path, tiny_tokenizer: Path
) -> None:
    packed = corefit("pack", *base, "--tokenizer", tiny_model, "--out", "arena", cwd=tmp_path)
    assert packed.returncode == 0, packed.stderr
    assert "50 records -> 50 samples" in packed.stdout
    assert "train from it: --set pack.arena=arena" in packed.stdout
    assert "nothing to do" in corefit("pack", *base, "--model", tiny_model, "--out", "arena", cwd=tmp_path).stdout
    digests, metrics = [], []
    for out, threads, more in (("a", 1, []), ("b", 1, ["pack.arena=arena"]), ("c", 4, []), ("d", 2, [])):
        sets = [*SMALL, *more, f"run.threads={threads}"]
        environment = {"OMP_NUM_THREADS": "1"}
        done = corefit(
            "train", *base, "--model", tiny_model, "--out", out, "--set", *sets, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert ("nothing is encoded anew" in done.stdout) == bool(more)
        run = tmp_path / out
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        metrics.append([(m.get("samples"), m.get("supervised_tokens"), m.get("fill"), m.get("epoch")) for m in lines])
        digests.append({k: v.tobytes() for k, v in load_file(run / "adapter" / "adapter_model.safetensors").items()})
        ledger = json.loads((run / "ledger.json").read_text("utf-8"))
        assert ledger["balanced"]
    assert digests[0] == digests[1]  # torch's own threads may change the others' last bits, but not their data
    assert metrics[0] == metrics[1] == metrics[2] == metrics[3] and len(metrics[0]) > 10


def test_a_stale_or_torn_arena_ends_the_run_before_the_model_is_loaded(
    tmp_path: Path, base: list[object], tiny_model: Path
) -> None:
    assert corefit("pack", *base, "--model", tiny_model, "--out", "arena", cwd=tmp_path).returncode == 0
    train = ["train", *base, "--model", tiny_model, "--set", *SMALL, "pack.arena=arena"]
    other = [word if word != "chatml" else "internlm_chat" for word in train]
    data = bytearray((tmp_path / "arena" / "tokens.bin").read_bytes())
    for arguments, words in (
        (other, ["arena was made from something else", 'template: "chatml", now "internlm_chat"']),
        ([*train, "--set", "pack.arena=gone"], ["gone: no arena there; `corefit pack --out"]),
        ([*train, "--set", "data.first=9"], ["data.0.first: null, now 9"]),
        (None, ["tokens.bin: torn: byte 0"]),
        (train, ["size and time of ", "rows.jsonl: [", "], now ["]),
    ):
        if arguments is None:
            arguments = train
            (tmp_path / "arena" / "tokens.bin").write_bytes(bytes([data[0] ^ 1]) + data[1:])
        elif arguments is train:
            with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
                file.write('{"text": "### Human: More?### Assistant: Yes."}\n')
        done = corefit(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 or arguments is train
        for word in words:
            assert word in done.stderr, done.stderr
    command = ["pack", *base, "--model", tiny_model, "--out", "arena"]
    again = corefit(*command, cwd=tmp_path)
    assert "51 records -> 51 samples" in again.stdout
    (tmp_path / "arena" / "tokens.bin").write_bytes(bytes((tmp_path / "arena" / "tokens.bin").stat().st_size))
    assert "51 records -> 51 samples" in corefit(*command, cwd=tmp_path).stdout  # a torn one is made anew
    assert "nothing to do" in corefit(*command, cwd=tmp_path).stdout


def test_bad_records_are_refused_or_counted(tmp_path: Path, base: list[object], tiny_tokenizer: Path) -> None:
    rows = (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()
    rows[2] = rows[2][:-3]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    command = ["pack", *base, "--tokenizer", tiny_tokenizer, "--out", "arena"]
    done = corefit(*command, cwd=tmp_path)
    assert done.returncode == 2 and "rows.jsonl:3:" in done.stderr and 'data.on_bad="skip"' in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    done = corefit(*command, "--on-bad-record", "skip", cwd=tmp_path)
    assert done.returncode == 0 and "50 records -> 49 samples, 1 dropped (bad_record)" in done.stdout
    done = corefit(*command, "--on-bad-record", "sikp", cwd=tmp_path)
    assert done.returncode == 2 and "--on-bad-record sikp" in done.stderr
    (tmp_path / "file").write_text("")
    done = corefit(*command[:-1], "file/arena", "--on-bad-record", "skip", cwd=tmp_path)
    assert done.returncode == 2 and "file/arena' can't be written: " in done.stderr


def test_ctrl_c_leaves_no_process_and_no_half_arena(tmp_path: Path, base: list[object], tiny_tokenizer: Path) -> None:
    write(tmp_path / "rows.jsonl", 200_000)
    command = [sys.executable, "-m", "corefit", "pack", *base, "--tokenizer", tiny_tokenizer, "--out", "arena"]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".tmp-arena-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors.strip().splitlines()[-1] == "corefit: interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
