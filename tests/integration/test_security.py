"""One tour through all verbs, with hostile data, secrets in the environment and no sockets; what it said and left."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cli import corefit
from fake_plugins import write_plugin
from hostile import HOSTILE, obeyed
from safetensors.torch import load_file
from tiny import write_model

from corefit import terminal
from corefit.errors import RecipeError
from corefit.prepare import resolve
from corefit.registry import Registry

BLOCK = """
import os, socket
def blocked(*arguments, **more):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(repr(arguments) + "\\n")
    raise OSError("no network here")
for name in ("connect", "connect_ex", "sendto", "sendmsg", "bind"):
    setattr(socket.socket, name, blocked)
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, blocked)
"""
TOUR = """
import contextlib, io, json, os, sys
from corefit.cli import main
for arguments in json.loads(sys.argv[1]):
    answers = contextlib.redirect_stdout(io.StringIO()) if arguments[0] == "chat" else contextlib.nullcontext()
    sys.argv = ["corefit", *arguments, "--api-key", os.environ["MY_API_KEY"]]  # as a program of one's own may have it
    with answers:
        code = main(arguments)
    print("EXIT", arguments[0], code, os.path.exists(os.environ["ATTEMPTS"]), flush=True)
"""
FEW = [
    "train.max_steps=2",
    "train.packs_per_step=1",
    "train.micro_batch=1",
    "sample.max_tokens=4",
    "pack.max_length=128",
    "val.share=0",
]


@dataclass
class Toured:
    folder: Path
    text: str
    """What all verbs but chat printed."""
    codes: list[list[str]]
    """Verb, exit code, whether the network had been asked for by then."""
    secrets: dict[str, str]


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Toured:
    folder = tmp_path_factory.mktemp("tour")
    base = write_model(folder / "mo\x1b[2Jdel\u202e")
    (base / "planted.py").write_text("raise SystemExit\n")
    torch.save(load_file(base / "model.safetensors"), folder / "weights.bin")
    data = folder / "ro\x1b]0;title\x07ws.jsonl"
    row = {"messages": [{"role": "user", "content": f"Hi {HOSTILE}"}, {"role": "assistant", "content": HOSTILE}]}
    oasst = {"text": f"### Human: hi {HOSTILE}### Assistant: {HOSTILE}"}
    data.write_text("".join(json.dumps(oasst) + "\n" for _ in range(12)), "utf-8")
    (folder / "unknown.jsonl").write_text(json.dumps({HOSTILE: row}) + "\n", "utf-8")
    (folder / "broken.jsonl").write_text('{"text": "' + HOSTILE.replace("\r", "") + '"\n', "utf-8", "replace")
    write_plugin(folder / "site", "corefit-bad", f"raise ValueError({HOSTILE!r})\n")
    (folder / "site" / "sitecustomize.py").write_text(BLOCK)
    hidden = {name: secrets.token_hex(20) for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_API_KEY", "db_passwd")}
    source = ["--data", data.name, "--plugin", "oasst1", "--template", "chatml", "--model", base.name]
    verbs = [
        ["plugins"],
        ["train", *source, "--out", "run", "--set", *FEW, "model.trust_remote_code=true"],
        ["train", "--out", "demo", "--set", *FEW],
        ["inspect", *source],
        ["inspect", "--data", "unknown.jsonl", "--tokenizer", base.name, "--debug"],
        ["inspect", "--data", "broken.jsonl", "--tokenizer", base.name, "--plugin", "oasst1"],
        ["pack", *source, "--out", "arena"],
        ["chat", "run", "--prompt", "hi", "--max-tokens", "4"],
        ["merge", "run", "--out", "merged"],
        ["safetensors", "weights.bin"],
        ["train", *source[:-1], "owner/some-model", "--out", "hub"],
    ]
    env = {**os.environ, **hidden, "ATTEMPTS": str(folder / "attempts"), "PYTHONPATH": str(folder / "site")}
    env = {name: value for name, value in env.items() if name not in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")}
    done = subprocess.run(
        [sys.executable, "-c", TOUR, json.dumps(verbs)],
        cwd=folder,
        env={**env, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    text = done.stdout.decode()
    codes = [line.split()[1:] for line in text.splitlines() if line.startswith("EXIT ")]
    assert len(codes) == len(verbs), text
    return Toured(folder, text, codes, hidden)


def test_every_verb_did_what_it_does(tour: Toured) -> None:
    assert [code for _, code, _ in tour.codes] == list("00002200002"[: len(tour.codes)]), tour.text


def test_no_verb_asks_for_a_network_but_for_the_model_that_is_named(tour: Toured) -> None:
    assert [asked for _, _, asked in tour.codes] == ["False"] * 10 + ["True"], (tour.folder / "attempts").read_text()
    assert "no such folder here, and not to be had from the hub" in tour.text


def test_nothing_from_data_models_or_plugins_reaches_the_terminal_as_more_than_text(tour: Toured) -> None:
    assert not obeyed(tour.text), [line for line in tour.text.splitlines() if obeyed(line)][:3]
    for where in ("ValueError: \\x1b[2J", "ro\\x1b]0;title\\x07ws.jsonl", "mo\\x1b[2Jdel\\u202e", "keys: \\x1b[2J"):
        assert where in tour.text, where
    assert "Traceback" in tour.text


def test_no_secret_of_the_environment_is_in_anything_that_was_written(tour: Toured) -> None:
    files = [path for path in tour.folder.rglob("*") if path.is_file()]
    assert {"run.json", "recipe.toml", "arena.header", "state.json"} <= {path.name for path in files}
    for name, secret in tour.secrets.items():
        assert not [path for path in files if secret.encode() in path.read_bytes()], name
        assert secret not in tour.text
    facts = json.loads((tour.folder / "run" / "run.json").read_text("utf-8"))
    assert facts["command"][-2:] == ["--api-key", "$MY_API_KEY"]


def test_a_secret_in_a_flag_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    flag = "data.options.name=hf_0123456789"
    with pytest.raises(RecipeError, match=r"the value of \$HF_TOKEN") as refusal:
        resolve(None, {"plugin": "identity"}, [flag], Registry.load())
    assert "hf_0123" not in str(refusal.value)
    done = corefit("train", "--plugin", "identity", "--set", flag, cwd=tmp_path)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    monkeypatch.setenv("HF_TOKEN_PATH", flag)  # where a secret lies is none
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN")
    assert not terminal.secrets().keys() & {"HF_TOKEN_PATH", "GOOGLE_APPLICATION_CREDENTIALS"}
    resolve(None, {"plugin": "identity"}, [flag], Registry.load())


def test_a_secret_that_toml_escapes_is_refused_too(monkeypatch) -> None:
    secret = 'a "quoted" \\ key'
    monkeypatch.setenv("MY_API_KEY", secret)
    with pytest.raises(RecipeError, match=r"the value of \$MY_API_KEY"):
        resolve(None, {"plugin": "identity"}, [f"data.options.name='{secret}'"], Registry.load())


def test_the_run_says_and_records_that_remote_code_may_run(tour: Toured) -> None:
    lines = [line for line in tour.text.splitlines() if "runs Python code from" in line]
    recorded = json.loads((tour.folder / "run" / "run.json").read_text("utf-8"))["model"]["remote_code"]
    assert len(lines) == 1 and f"planted.py (sha256 {recorded['planted.py'][:16]})" in lines[0]
    assert json.loads((tour.folder / "demo" / "run.json").read_text("utf-8"))["model"]["remote_code"] == {}
