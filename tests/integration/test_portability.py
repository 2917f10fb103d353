"""Other systems, played on this one: no encoding of the locale, a console in GBK, what Windows lacks, old versions."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from cli import environment

ROOT = Path(__file__).resolve().parents[2]
ENCODINGS = """
import sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module="corefit")
assert sys.flags.warn_default_encoding
"""
"""Whatever of corefit opens text without naming its encoding ends the run."""
WINDOWS = """
import fcntl, os, resource, shutil, signal, sys
from corefit.engine.model import import_bitsandbytes, quiet

quiet()
import_bitsandbytes()
import peft
flags, real_open, real_fsync = (fcntl.fcntl, fcntl.F_GETFL), os.open, os.fsync
set_blocking, set_wakeup_fd = os.set_blocking, signal.set_wakeup_fd
for name in "pread", "set_blocking", "sched_getaffinity", "O_DIRECTORY":
    delattr(os, name)
del signal.SIGHUP, signal.SIGKILL
shutil._use_fd_functions = False
sys.modules["fcntl"] = sys.modules["resource"] = None

def open_(path, *args, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real_open(path, *args, **more)

def fsync(handle):
    if flags[0](handle, flags[1]) & 3 == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    real_fsync(handle)

def wakeup(handle, **more):  # Linux wants such a pipe, Windows has none
    if handle >= 0:
        set_blocking(handle, False)
    return set_wakeup_fd(handle, **more)

os.open, os.fsync, signal.set_wakeup_fd = open_, fsync, wakeup
"""
"""What Windows has not, taken away once other packages are imported (those have Windows code of their own)."""
RUN = """
from corefit.cli import main
sets = ["train.max_steps=2", "checkpoint.every_steps=1", "sample.max_tokens=8"]
sets += ["sample.prompts=['什么是包？ \\u20ac \\U0001f680']"]
for verb in (
    ["train", "--plugin", "oasst1", "--template", "internlm_chat", "--out", "run", "--set", *sets],
    ["train", "--resume", "run", "--set", "train.max_steps=3"],
    ["chat", "run", "--prompt", "什么是包？", "--max-tokens", "4"],
    ["inspect", "run/recipe.toml", "--samples", "2"],
    ["merge", "run", "--out", "merged"],
    ["templates", "internlm_chat"],
    ["copy", "internlm_chat_7b_qlora_oasst1_e3"],
    ["recipes", "internlm"],
    ["plugins"],
    ["runs", "."],
    ["doctor"],
):
    assert main(verb) == 0, verb
print("all of it")
"""


def play(prelude: str, *flags: str, cwd: Path, encoding: str = "utf-8", python: str = sys.executable) -> str:
    """Run the verbs in one process, which begins with ``prelude``; give what they print."""
    command = [python, *flags, "-c", prelude + RUN]
    env = environment({"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"})
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, check=False)
    said, wrong = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == 0, said[-1000:] + wrong[-3000:]
    assert said.rstrip().endswith("all of it")
    return said


def test_a_windows_in_china_with_every_encoding_named(tmp_path: Path) -> None:
    """One run for all lanes, because most of its time is imports: what fails says which by its last line."""
    said = play(WINDOWS + ENCODINGS, "-X", "warn_default_encoding", cwd=tmp_path, encoding="gbk")
    assert "什么是包" in said and "\\U0001f680" in said  # GBK has no rockets: an escape, not the end
    assert re.search(r"run +finished", said)


def test_the_floors_are_what_the_code_asks_for_and_the_tested_versions_lie_above_them() -> None:
    from packaging.requirements import Requirement
    from packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = dict(re.findall(r"^([\w-]+)==([\w.+]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    for text in project["dependencies"]:
        wanted = Requirement(text)
        floors = [s.version for s in wanted.specifier if s.operator == ">="]
        assert len(floors) == 1, text
        assert wanted.specifier.contains(pins[wanted.name]), (text, pins[wanted.name])
        assert Version(floors[0]) <= Version(pins[wanted.name])
    assert sys.version_info >= (3, 11) and project["requires-python"] == ">=3.11"


@pytest.mark.full
def test_the_oldest_versions_that_are_declared_run_all_of_it(tmp_path: Path) -> None:
    python = os.environ.get("COREFIT_FLOOR_PYTHON")  # one that is there already
    if python is None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        floors = [re.sub(r">=([\d.]+).*", r"==\1.0", text) for text in project["dependencies"]]
        subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "floor")], check=True)
        python = str(tmp_path / "floor" / "bin" / "python")
        for what in (floors, ["--no-deps", str(ROOT)]):
            command = [python, "-m", "pip", "install", "-q", *what]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
            if done.returncode:
                pytest.skip(f"the oldest versions can't be installed here: {done.stderr.splitlines()[-1:]}")
    said = play("", cwd=tmp_path, python=python)
    print(*re.findall(r"^  (?:torch|transformers|peft|bitsandbytes) .*", said, re.MULTILINE), sep="\n")


@pytest.mark.parametrize("gone", ["signal.SIGHUP", "os.O_DIRECTORY"])
def test_what_is_taken_away_is_here_in_the_first_place(gone: str) -> None:
    if sys.platform == "linux":
        module, _, name = gone.partition(".")
        assert hasattr({"os": os, "signal": signal}[module], name)
