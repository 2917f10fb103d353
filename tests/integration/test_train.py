"""Whole runs through the real command line: what they leave, resuming, signals, the Python API."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli import corefit, environment
from safetensors.numpy import load_file

DATA = "".join(
    json.dumps({"text": f"### Human: What is {i}?### Assistant: It is number {i}, {'really ' * (i % 7)}so."}) + "\n"
    for i in range(60)
)
SMALL = [
    *("pack.max_length=128", "train.packs_per_step=2", "sample.max_tokens=4", "adapter.r=4", "train.lr=5e-3"),
    *("pack.held=16", "run.threads=1"),
]

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def base(tmp_path: Path, tiny_model: Path) -> list[object]:
    (tmp_path / "rows.jsonl").write_text(DATA, "utf-8")
    return ["train", "--plugin", "oasst1", "--template", "chatml", "--model", tiny_model, "--data", "rows.jsonl"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def digest(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def shapes(text: str) -> set[str]:
    """Give a run's last lines without what differs between machines: numbers, times, answers before training."""
    cells = (re.split(r" {2,}", line) for line in text.splitlines())
    rows = ("  ".join(row if len(row) < 3 else (row[0], row[-1])) for row in cells if row[0].strip("-"))
    return {re.sub(r"\d[\d,.]*", "#", re.sub(r"in (\d+ min )?\d+ s:", "in T:", row)) for row in rows}


def test_the_embedded_demonstration_learns_and_balances(tmp_path: Path) -> None:
    began = time.monotonic()
    wide = {"COLUMNS": "100"}  # what a run takes where it has no terminal; xdist sets another
    done = corefit("train", "--plugin", "oasst1", "--template", "internlm_chat", cwd=tmp_path, env=wide, fresh=True)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("corefit 0.1.0: no --model and no --data: the embedded")
    run = tmp_path / "runs" / "embedded-oasst1-1"
    losses = [line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert losses[0] / losses[-1] > 10
    ledger = json.loads((run / "ledger.json").read_text("utf-8"))
    assert ledger["balanced"] is True
    assert ledger["proofs"]["isolation"]["max_delta"] == 0.0
    facts = (Path(__file__).parents[2] / "corefit" / "embedded" / "data" / "corefit_facts.jsonl").read_text("utf-8")
    samples = lines(run / "samples.jsonl")
    last = max(line["step"] for line in samples)
    for line in samples:  # wrong before, right after
        right = json.dumps(f"### Human: {line['prompt']}### Assistant: {line['answer']}", ensure_ascii=False)[1:-1]
        assert (right in facts) == (line["step"] == last), line
    assert seconds < 120  # 32 s alone on this kind of machine; tests run beside each other
    said = corefit("chat", run, "--prompt", samples[-1]["prompt"], cwd=tmp_path)
    assert said.stdout.strip() == samples[-1]["answer"]
    shown = shapes(done.stdout)
    for path in (README, README.with_name("README.zh-CN.md")):  # what the README shows is what a run prints
        block = re.search(r"^```\n(question .*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        assert block and shapes(block[1]) - {"..."} <= shown, shapes(block[1]) - shown


def test_the_identity_demonstration_says_the_name(tmp_path: Path) -> None:
    sets = ("data.options.name=Quillow", "train.max_steps=120")  # half as many are enough
    done = corefit("train", "--plugin", "identity", "--set", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for question in ("What is your name?", "你叫什么名字？"):
        said = corefit("chat", tmp_path / "runs" / "embedded-identity-1", "--prompt", question, cwd=tmp_path)
        assert "Quillow" in said.stdout


def test_a_run_folder_holds_what_is_promised_and_repeats(tmp_path: Path, base: list[object]) -> None:
    done = corefit(*base, "--set", *SMALL, "train.max_steps=6", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "oasst1-1"
    names = {path.name for path in run.iterdir()}
    files = {"recipe.toml", "run.json", "metrics.jsonl", "ledger.json", "samples.jsonl", "checkpoints", "adapter"}
    files |= {"report.html", "packs.json"}
    assert names == files
    told = README.read_text("utf-8").split("## What a run leaves\n")[1].split("\n## ")[0]
    assert {name.rstrip("/") for name in re.findall(r"^\| `([\w./]+)`", told, re.MULTILINE)} == files
    page = corefit("report", run, "--out", tmp_path / "page.html", cwd=tmp_path)
    assert page.returncode == 0 and "<html" in (tmp_path / "page.html").read_text("utf-8"), page.stderr
    steps = [line for line in lines(run / "metrics.jsonl") if "loss" in line]
    keys = "step epoch progress loss lr grad_norm loss_scale skipped cause tokens supervised_tokens"
    assert set(steps[0]) == {*keys.split(), "samples", "packs", "fill", "tokens_per_s", "seconds", "memory_bytes"}
    assert [line["step"] for line in steps] == list(range(1, 7))
    assert any("val_loss" in line for line in lines(run / "metrics.jsonl"))
    adapter = {path.name for path in (run / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= adapter
    config = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["target_modules"] == sorted(config["target_modules"])
    facts = json.loads((run / "run.json").read_text("utf-8"))
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[facts["precision"]]
    stored = json.loads((run / "adapter" / "corefit.json").read_text("utf-8"))
    assert (stored["quantizer"], stored["compute_dtype"], stored["device"]) == ("nf4", dtype, facts["device"])
    for path in (run / "adapter").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    again = corefit("train", run / "recipe.toml", cwd=tmp_path, fresh=True)  # text hashes otherwise there
    assert again.returncode == 0, again.stderr
    other = next(path for path in (tmp_path / "runs").iterdir() if path != run)
    assert digest(other) == digest(run)
    assert corefit(*base, "--out", run, cwd=tmp_path).returncode == 2  # not empty, no --resume


def test_killed_and_resumed_is_the_straight_run(tmp_path: Path, base: list[object]) -> None:
    command = [*base, "--set", *SMALL, "train.epochs=4", "checkpoint.every_steps=2", "val.every_steps=3"]
    assert corefit(*command, "--out", "straight", cwd=tmp_path).returncode == 0
    arguments = [sys.executable, "-m", "corefit", *map(str, command), "--out", "killed", "--resume"]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    latest = tmp_path / "killed" / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    killed_at = len([line for line in lines(tmp_path / "killed" / "metrics.jsonl") if "loss" in line])
    done = corefit(*command, "--out", "killed", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resume: from step" in done.stdout
    straight, resumed = tmp_path / "straight", tmp_path / "killed"
    assert digest(resumed) == digest(straight)
    varying = {"seconds", "tokens_per_s", "memory_bytes", "save_seconds", "save_bytes"}
    stripped = [
        [{k: v for k, v in line.items() if k not in varying} for line in lines(run / "metrics.jsonl")]
        for run in (straight, resumed)
    ]
    assert stripped[0] == stripped[1]
    assert 2 <= killed_at < max(line["step"] for line in stripped[0]), "killed in the middle"
    ledgers = [json.loads((run / "ledger.json").read_text("utf-8")) for run in (straight, resumed)]
    assert ledgers[0] == ledgers[1]
    complete = corefit(*command, "--out", "killed", "--resume", cwd=tmp_path)
    assert complete.returncode == 0
    assert "complete" in complete.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_exits(number: int, code: int, tmp_path: Path, base: list[object]) -> None:
    arguments = [sys.executable, "-m", "corefit", *map(str, base), "--out", "run", "--set", *SMALL]
    arguments += ["train.epochs=0", "train.max_steps=100000"]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and '"grad_norm"' in metrics.read_text("utf-8")):
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    run = tmp_path / "run"
    steps = [line["step"] for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert (run / "checkpoints" / "latest").read_text("utf-8").strip() == f"step-{steps[-1]:08d}"
    assert json.loads((run / "run.json").read_text("utf-8"))["status"] == "interrupted"
    assert load_file(run / "adapter" / "adapter_model.safetensors")
    assert json.loads((run / "ledger.json").read_text("utf-8"))["balanced"] is True


def test_the_python_api_runs_twice_and_off_the_main_thread(
    tmp_path: Path, base: list[object], tiny_model: Path
) -> None:
    code = f"""
import sys, threading, corefit
assert "torch" not in sys.modules
runs = []
def go(name):
    runs.append(corefit.train(model={str(tiny_model)!r}, data="rows.jsonl", plugin="oasst1", template="chatml",
                              out=name, say=lambda line: None, sets={[*SMALL, "train.max_steps=2"]!r}))
go("a")
thread = threading.Thread(target=go, args=("b",)); thread.start(); thread.join()
assert [run.exit_code for run in runs] == [0, 0]
assert runs[0].metrics[-1]["step"] == 2 and runs[1].ledger["balanced"] and runs[0].model is None
assert isinstance(runs[0].chat("hi", max_tokens=4), str)
print(runs[0].adapter)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_full_fine_tuning_leaves_a_model_that_chats(tmp_path: Path, base: list[object]) -> None:
    more = ["adapter.kind=none", "train.max_steps=2"]
    done = corefit(*base, "--quantizer", "none", "--out", "run", "--set", *SMALL, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert not (tmp_path / "run" / "adapter").exists()
    assert corefit("chat", "run", "--prompt", "hi", "--max-tokens", "3", cwd=tmp_path).returncode == 0


def test_standard_input_is_spooled_into_the_run(tmp_path: Path, base: list[object]) -> None:
    command = [*base[:-1], "-", "--out", "run", "--set", *SMALL, "train.max_steps=2"]
    done = corefit(*command, cwd=tmp_path, input=DATA)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "data" / "stdin.jsonl").read_text("utf-8") == DATA


def test_a_folder_splits_by_name_and_merge_writes_a_plain_folder(tmp_path: Path, base: list[object]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(DATA, "utf-8")
    (folder / "eval.jsonl").write_text(DATA[: DATA.index("\n") + 1], "utf-8")
    done = corefit(*base[:-1], folder, "--out", "run", "--set", *SMALL, "train.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "validation: 1 records" in done.stdout
    merged = corefit("merge", "run", "--out", "merged", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    assert corefit("chat", "merged", "--prompt", "hi", "--max-tokens", "3", cwd=tmp_path).returncode == 0
    (folder / "other.jsonl").write_text(DATA, "utf-8")
    refused = corefit(*base[:-1], folder, cwd=tmp_path)
    assert refused.returncode == 2
    assert "other.jsonl" in refused.stderr


def test_an_unwritable_or_full_place_is_one_line(tmp_path: Path, base: list[object]) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    done = corefit(*base, "--out", tmp_path / "file" / "run", "--set", *SMALL, "train.max_steps=1", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_small_data_works_and_no_sample_is_refused(tmp_path: Path, base: list[object]) -> None:
    (tmp_path / "rows.jsonl").write_text(DATA[: DATA.index("\n") + 1], "utf-8")
    done = corefit(*base, "--out", "one", "--set", *SMALL, "train.epochs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "validation: off" in done.stdout
    (tmp_path / "rows.jsonl").write_text('{"text": "### Human: only a question"}\n', "utf-8")
    refused = corefit(*base, "--out", "none", cwd=tmp_path)
    assert refused.returncode == 2
    assert "1 records" in refused.stderr


@pytest.mark.parametrize("quantizer", ["int8", "nf4"])
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_32bit"])
def test_quantizers_and_optimizers_run(quantizer: str, optimizer: str, tmp_path: Path, base: list[object]) -> None:
    more = [f"train.optimizer={optimizer}", "train.max_steps=2", "val.records=0"]
    done = corefit(*base, "--quantizer", quantizer, "--out", "run", "--set", *SMALL, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) < 8, done.stderr
