"""The READMEs' commands: each is run in the order in which they stand, or is named here with the reason why not."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from tiny import write_model
from tiny_internlm import write_internlm

from corefit.cli import main

ROOT = Path(__file__).resolve().parents[2]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
RUN = "runs/internlm_chat_7b_qlora_oasst1_e3_copy-1"
SMALL = "train.max_steps=2 train.packs_per_step=1 pack.max_length=128 adapter.r=4 sample.max_tokens=2 val.records=4"

RUNS = {
    "corefit inspect --data my.jsonl --model path/to/model": "",
    "corefit plan --data my.jsonl --model path/to/model": "",
    "corefit train --data my.jsonl --model path/to/model": f"--set {SMALL}",
    "corefit chat runs/run-1": "--prompt hi --max-tokens 2",
    "corefit eval runs/run-1": "--records 4",
    "corefit merge runs/run-1 --out merged": "",
    "corefit safetensors pickled-model --out model": "",
    "corefit runs": "",
    "corefit doctor": "",
    "corefit pack --data my.jsonl --model path/to/model --out my.arena": "--set pack.max_length=128",
    "corefit train --data my.jsonl --model path/to/model --set pack.arena=my.arena": SMALL,
    "corefit list-cfg -p internlm_chat_7b_qlora_oasst1": "",
    "corefit copy-cfg internlm_chat_7b_qlora_oasst1_e3 .": "",
    "corefit inspect internlm_chat_7b_qlora_oasst1_e3_copy.toml": "",
    "corefit train internlm_chat_7b_qlora_oasst1_e3_copy.toml": f"--set {SMALL} sample.every_steps=9",
    f"corefit chat {RUN}": "--prompt hi --max-tokens 2",
    f"corefit merge {RUN} --out merged-7b": "",
}
"""Command -> what is added to it, so that it is small; models and data of these names are tiny ones."""
NOT_RUN = {
    "python3 -m venv .venv": "installs; its training is what test_train.py runs, and what it prints is looked at there",
    "corefit selftest": "half a minute; tests/unit/test_selftest.py runs it",
    "corefit launch -n 8 RECIPE": "eight processes; tests/integration/test_ranks.py runs it with two and four",
    "torchrun --nnodes 2": "two machines; tests/full/test_two_hosts.py makes them",
    "srun --nodes 2": "SLURM; tests/full/test_two_hosts.py runs it without, with the variables of srun",
    "hf download": "needs a network",
}
"""How a line begins -> why no test runs it from here."""


def blocks(path: Path) -> list[tuple[str, str]]:
    """Give (language, text) of every code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def lines(text: str) -> list[str]:
    """Give the lines of a shell block, one space between words, without comments."""
    return [shlex.join(shlex.split(line, comments=True)) for line in text.splitlines()]


def is_output(text: str) -> bool:
    return text.startswith("question ")


def test_the_chinese_readme_has_the_same_code_blocks() -> None:
    assert blocks(CHINESE) == blocks(README)


def test_every_command_of_the_readme_is_run_or_has_a_reason() -> None:
    found = [line for language, text in blocks(README) if not language and not is_output(text) for line in lines(text)]
    spelt = {shlex.join(shlex.split(command)) for command in RUNS}
    kept = [line for line in found if not line.startswith(tuple(NOT_RUN))]
    assert [line for line in kept if line not in spelt] == []
    assert [line for line in spelt if line not in kept] == [], "named here, and no longer in the README"
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in found)] == []
    assert {language for language, _ in blocks(README)} == {"", "python", "toml"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the README's commands name."""
    monkeypatch.chdir(tmp_path)
    talk = [{"text": f"### Human: What is {i}?### Assistant: It is {i}."} for i in range(40)]
    rows = "".join(json.dumps(row) + "\n" for row in talk)
    (tmp_path / "my.jsonl").write_text(rows, "utf-8")
    write_model(tmp_path / "path/to/model")
    write_internlm(tmp_path / "path/to/internlm-chat-7b", "internlm", dtype="float16")
    data = tmp_path / "path/to/openassistant-guanaco"
    data.mkdir()
    (data / "openassistant_best_replies_train.jsonl").write_text(rows, "utf-8")
    (data / "openassistant_best_replies_eval.jsonl").write_text(rows[: rows.index("\n") + 1] * 4, "utf-8")
    (tmp_path / "pickled-model").mkdir()
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "pickled-model" / "pytorch_model.bin")
    small = "".join(f"{key.partition('.')[2]} = {value}\n" for key, value in settings("train"))
    (tmp_path / "recipe.toml").write_text(f"[train]\n{small}[sample]\nmax_tokens = 2\n[adapter]\nr = 4\n", "utf-8")
    return tmp_path


def settings(section: str) -> list[tuple[str, str]]:
    pairs = (word.partition("=")[::2] for word in SMALL.split())
    return [(key, value) for key, value in pairs if key.startswith(f"{section}.")]


def test_the_readme_works_from_top_to_bottom(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spelt = {shlex.join(shlex.split(command)): more for command, more in RUNS.items()}
    scope: dict[str, object] = {}
    for language, text in blocks(README):
        if language == "python":
            exec(compile(text, "README.md", "exec"), scope)
        elif language == "toml":
            take(tomllib.loads(text), home)
        elif not is_output(text):
            for line in lines(text):
                if line in spelt:
                    code = main([*shlex.split(line)[1:], *shlex.split(spelt[line])])
                    assert code == 0, f"{line}\n{capsys.readouterr().err[-2000:]}"
    from corefit import Conversation, Drop, MapFunction

    function = next(iter(scope["corefit_map_functions"]()))  # type: ignore[operator]
    assert isinstance(function, MapFunction)
    assert [type(i) for row in ({"q": "a", "a": "b"}, {}) for i in function.map(row, None)] == [Conversation, Drop]
    assert [function.sniff(row) for row in ({"q": 1, "a": 1}, {"q": 1})] == [True, False]
    assert (home / "merged" / "config.json").is_file() and (home / "merged-7b" / "config.json").is_file()


def take(table: dict[str, object], home: Path) -> None:
    """Use a block of TOML: an edit of the copied recipe, or a plugin's entry points."""
    copy = home / "internlm_chat_7b_qlora_oasst1_e3_copy.toml"
    if "project" in table:
        assert table == {"project": {"entry-points": {"corefit": {"my_format": "corefit_my_format"}}}}
        return
    edited = copy.read_text("utf-8")
    for key, value in (("base", table["model"]["base"]), ("path", table["data"][0]["path"])):  # type: ignore[index]
        edited, n = re.subn(rf'^{key} = ".*"$', f'{key} = "{value}"', edited, flags=re.MULTILINE)
        assert n == 1, key
    copy.write_text(edited, "utf-8")
