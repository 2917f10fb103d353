"""The command line as users meet it: help, errors, recipes, inspect."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli import corefit

from corefit.prepare import resolve
from corefit.registry import Registry

ROWS = [
    {"text": "### Human: What is the capital of France?### Assistant: Paris."},
    {"text": "### Human: Say hi.### Assistant: hi### Human: Again.### Assistant: hi hi"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["recipes"], ["--version"]])
def test_light_verbs_leave_torch_unimported(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from corefit.cli import main; code = main(sys.argv[1:]);"
        "bad = [m for m in ('torch', 'transformers', 'numpy', 'peft') if m in sys.modules]; sys.exit(code or len(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_shows_the_verbs_in_the_order_of_their_use(tmp_path: Path) -> None:
    text = corefit("--help", cwd=tmp_path).stdout
    places = [
        text.index(f"  {verb}")
        for verb in (
            "train",
            "inspect",
            "plan",
            "pack",
            "chat",
            "merge",
            "safetensors",
            "recipes",
            "copy",
            "plugins",
            "selftest",
        )
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["'trian'", "did you mean 'train'?"]),
        (["train", "--modle", "x"], ["'--modle'", "did you mean '--model'?"]),
        (["train", "--set", "train.epoch=1"], ["train.epoch=1", "did you mean 'epochs'?"]),
        (["train", "--learning-rate", "1e-4"], ["'--learning-rate'", "a key of the recipe: --set train.lr=VALUE"]),
        (["inspect", "--max-length=9"], ["no flag '--max-length'", "--set pack.max_length=VALUE"]),
        (["train", "--set", "pack.max_length=20000000"], ["pack.max_length: found 20000000; expected"]),
        (["train", "--set", "train.epochs=many"], ["train.epochs=many"]),
        (["train", "--set", "train.lr=-1"], ["train.lr=-1"]),
        (["train", "--template", "internlm_chta", "--plugin", "oasst1"], ["'internlm_chta'", "'internlm_chat'"]),
        (["train", "--plugin", "oasst2"], ["'oasst2'", "'oasst1'"]),
        (["train", "--quantizer", "nf5"], ["'nf5'", "'nf4'"]),
        (["train", "--scheduler", "cosin"], ["'cosin'", "'cosine'"]),
        (["train", "--model", "somewhere"], ["--model without --data"]),
        (["train", "--data", "rows.jsonl"], ["--data without --model"]),
        (["train", "nowhere.toml"], ["nowhere.toml"]),
        (["train", "--plugin", "identity", "--set", "data.options.nmae=x"], ["'nmae'", "'name'"]),
        (["copy", "internlm_chat_7b"], ["`corefit recipes internlm_chat_7b` lists"]),
        (["chat", "nowhere"], ["nowhere"]),
        (["merge", "nowhere", "--out", "x"], ["nowhere"]),
        (["merge", "nowhere", "--out", "x", "--base", "dequantized"], ["'dequantized'", "did you mean 'dequantised'?"]),
        (["selftest", "nowhere/"], ["nowhere"]),
        (["selftest", "--device", "gpu"], ["no device 'gpu'", "'cpu'"]),
        (["pack", "--data", "rows.jsonl"], ["corefit pack: the following arguments", "required: --out"]),
        (["chat"], ["corefit chat: the following arguments are required"]),
        (["train", "--on-bad-record", "ignore"], ["--on-bad-record ignore", "known: error, skip"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and value[0] in ("train", "copy") else None,
)
def test_mistakes_are_one_line_and_exit_2(arguments: list[str], words: list[str], tmp_path: Path, data: Path) -> None:
    done = corefit(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("corefit: error: ")
    for word in words:
        assert word in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_typo_in_a_recipe_names_file_and_line_quickly(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[model]\nbase = "x"\n\n[train]\nepochs = 3\nlerning_rate = 1e-4\n', "utf-8")
    began = time.monotonic()
    done = corefit("train", recipe, cwd=tmp_path)
    seconds = time.monotonic() - began
    assert done.returncode == 2
    assert f"{recipe}:6" in done.stderr
    assert "lerning_rate" in done.stderr
    assert seconds < 5  # a second on an idle machine; torch alone would take longer than the rest


def test_recipes_copy_and_their_old_names(tmp_path: Path) -> None:
    name = "internlm_chat_7b_qlora_oasst1_e3"
    assert name in corefit("recipes", cwd=tmp_path).stdout
    assert name in corefit("list-cfg", "-p", "OASST1", cwd=tmp_path).stdout
    assert name not in corefit("recipes", "no_such_thing", cwd=tmp_path).stdout
    assert corefit("copy", name, cwd=tmp_path).returncode == 0
    copied = tmp_path / f"{name}.toml"
    assert len(copied.read_text("utf-8").splitlines()) < 45
    assert (corefit("copy-cfg", name, ".", cwd=tmp_path).returncode, (tmp_path / f"{name}_copy.toml").exists()) == (
        0,
        True,
    )
    for verb in ("copy", "copy-cfg"):
        again = corefit(verb, name, cwd=tmp_path)
        assert again.returncode == 2  # a copy that was edited is never overwritten
        assert "internlm_chat_7b" in again.stderr


def test_every_name_of_xtuner_is_a_recipe_or_has_a_reason(tmp_path: Path) -> None:
    classic = (Path(__file__).parents[1] / "golden" / "xtuner_zoo.txt").read_text("utf-8").split()
    recipes = corefit("recipes", cwd=tmp_path)
    lines = corefit("recipes", "--all", cwd=tmp_path).stdout.splitlines()
    assert lines[: len(recipes.stdout.splitlines())] == recipes.stdout.splitlines()
    reasons = [line.split()[0] for line in lines if "  can't run: " in line]
    assert recipes.stderr.startswith(f"{len(reasons)} more names")
    assert len(classic) == 585 and set(classic) <= {line.split()[0] for line in lines} and set(reasons) < set(classic)
    chosen = corefit("recipes", "llava", cwd=tmp_path)
    assert (chosen.stdout, chosen.stderr.split()[0]) == ("", str(sum("llava" in name for name in classic)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["internlm_chat_7b_qlora_oast1_e3"], "did you mean 'internlm_chat_7b_qlora_oasst1_e3'?"),
        (["chatglm3_6b_qlora_oasst1_e3"], "no architecture in transformers"),
        (
            ["internlm_chat_7b_qlora_oasst1_e3"],
            "downloads no data; from the hub: hf download timdettmers/openassistant-guanaco --repo-type dataset",
        ),
        (
            ["internlm_chat_7b_qlora_oasst1_e3", "--data", "rows.jsonl"],
            "run where there is a network: hf download internlm/internlm-chat-7b --local-dir internlm/internlm-chat-7b",
        ),
    ],
)
def test_a_name_of_the_zoo_says_what_to_do_first(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "### Human: hi### Assistant: yo"}\n', "utf-8")
    done = corefit("train", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "runs").exists()


def test_a_name_of_the_zoo_trains_with_the_users_model_and_data(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "### Human: hi### Assistant: yo"}\n' * 8, "utf-8")
    name = "internlm_chat_7b_qlora_oasst1_e3"
    sets = ("train.max_steps=1", "train.packs_per_step=1", "sample.max_tokens=2", "pack.max_length=64", "adapter.r=4")
    done = corefit("train", name, "--model", tiny_model, "--data", "rows.jsonl", "--set", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'name = "internlm_chat"' in (tmp_path / "runs" / f"{name}-1" / "recipe.toml").read_text("utf-8")


def test_inspect_needs_a_tokenizer_only(tmp_path: Path, data: Path, tiny_tokenizer: Path) -> None:
    base = ["inspect", "--data", data, "--tokenizer", tiny_tokenizer, "--template", "internlm_chat"]
    done = corefit(*base, "--samples", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "oasst1 (none was named: recognised" in done.stdout
    assert "<eoa>+]" in done.stdout
    assert "[+" in done.stdout.split("<eoh>")[1]
    assert "2 read = 2 used" in done.stdout
    for seed in "0123":  # two ways to draw one of two
        assert corefit(*base, "--samples", "9", "--seed", seed, cwd=tmp_path).stdout.count("\n--- ") == 2
    rows = [json.loads(line) for line in corefit(*base, "--json", cwd=tmp_path).stdout.splitlines()]
    assert [row["origin"] for row in rows] == [f"{data}:1", f"{data}:2"]
    assert rows[0]["messages"] == [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
    ]
    for row in rows:
        assert len(row["labels"]) == len(row["input_ids"])
        for i, label in enumerate(row["labels"]):
            assert label == -100 or label == row["input_ids"][i + 1]
    from corefit import inspect

    api = list(inspect(data=str(data), tokenizer=tiny_tokenizer, template="internlm_chat"))
    assert api == rows


def test_a_format_nobody_knows_lists_the_candidates(tmp_path: Path, tiny_tokenizer: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"foo": 1, "bar": 2}\n', "utf-8")
    done = corefit("inspect", "--data", path, "--tokenizer", tiny_tokenizer, cwd=tmp_path)
    assert done.returncode == 2
    assert f"{path}:1" in done.stderr
    assert "bar, foo" in done.stderr
    assert "oasst1" in done.stderr


def test_inspect_says_what_is_left_out_and_where(tmp_path: Path, tiny_tokenizer: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good, ends = json.dumps(ROWS[0]), json.dumps({"text": ROWS[0]["text"] + "### Human: And then?"})
    long = json.dumps({"text": f"### Human: Say it.### Assistant: {'really ' * 60}so."})
    lines = [good, ends, good[:-3], json.dumps({"text": "### Human: Nobody answers."}), good, "[]", long, *[good] * 5]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    base = ["inspect", "--plugin", "oasst1", "--template", "chatml", "--data", path, "--tokenizer", tiny_tokenizer]
    base += ["--set", "pack.max_length=64"]
    done = corefit(*base, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"corefit: error: {path}:3:72: broken JSON: a string that never ends; ")
    left_out = [
        f"  messages: 1 trailing_user: {path}:2",
        f"  records: 2 bad_record: {path}:3:72: broken JSON: a string that never ends, "
        f"{path}:6:1: expected a JSON object, found a list",
        f"  records: 1 no_answer: {path}:4",
    ]
    assert done.stdout.split("where first:\n")[1].splitlines()[:3] == left_out
    done = corefit(*base, "--on-bad-record", "skip", "--seed", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said, ledger = done.stdout.split("where first:\n")[1].split("\n\n")
    assert said.splitlines()[:3] == left_out
    beyond = re.fullmatch(
        rf"  tokens: ([\d,]+) beyond pack\.max_length: {re.escape(str(path))}:7", said.splitlines()[3]
    )
    assert beyond and f" + {beyond[1]} truncated" in ledger
    assert "9 used + 3 dropped" in done.stdout
    shown = [line for line in done.stdout.splitlines() if line.startswith("--- ")]
    assert len(shown) == 3
    assert shown != [
        line for line in corefit(*base, "--seed", "4", cwd=tmp_path).stdout.splitlines() if line[:4] == "--- "
    ]


def test_standard_input_can_be_closed_early(tmp_path: Path) -> None:
    command = f'"{sys.executable}" -m corefit plugins | head -n 1'
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""


def test_inspect_names_a_record_that_is_too_long_where_that_is_an_error(
    tmp_path: Path, data: Path, tiny_tokenizer: Path
) -> None:
    more = ["--template", "internlm_chat", "--set", "pack.overlong=error", "pack.max_length=30"]
    for how in (["--json"], []):
        done = corefit("inspect", *how, "--data", data, "--tokenizer", tiny_tokenizer, *more, cwd=tmp_path)
        assert done.returncode == 2
        assert re.match(f"corefit: error: {data}:[12]: ", done.stderr)  # without --json in any order
        assert "pack.max_length is 30" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "--samples", "-1"], "argument --samples: found '-1'; expected a whole number >= 0"),
        (["chat", "run", "--max-tokens", "0"], "argument --max-tokens: found '0'; expected a whole number >= 1"),
        (["eval", "run", "--records", "-1"], "argument --records: found '-1'; expected a whole number >= 1"),
        (["eval", "run", "--generate", "-1"], "argument --generate: found '-1'; expected a whole number >= 0"),
        (["eval", "run", "--max-tokens", "x"], "argument --max-tokens: found 'x'; expected a whole number >= 1"),
    ],
)
def test_a_number_that_none_can_be_is_refused(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = corefit(*arguments, cwd=tmp_path)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="exit codes are those of POSIX")
def test_a_crash_in_c_code_says_who_called_it(tmp_path: Path, data: Path, tiny_tokenizer: Path) -> None:
    (tmp_path / "crashes.py").write_text("import os\n\ndef to_chat(record):\n    os.abort()\n", "utf-8")
    words = ["--data", data, "--plugin", "crashes.py:to_chat", "--tokenizer", tiny_tokenizer]
    done = corefit("inspect", *words, "--template", "chatml", cwd=tmp_path)
    assert done.returncode == -6
    assert "Fatal Python error: Aborted" in done.stderr and "in to_chat" in done.stderr, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_closed_standard_streams_end_no_command(tmp_path: Path) -> None:
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        words = f"'{sys.executable}' -m corefit runs . {closed}"
        assert subprocess.run(["sh", "-c", words], cwd=tmp_path, check=False).returncode == 0, closed


@pytest.mark.parametrize("arguments", [["--version"], ["plugins"], ["inspect"]])
def test_a_kernel_that_there_is_not_is_refused(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "corefit", *arguments]
    env = {**os.environ, "COREFIT_KERNEL": "rust"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    said = "corefit: error: COREFIT_KERNEL: no kernel 'rust'; known: c, python\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("recipe.toml", "recipe"),
        ("my-run/recipe.toml", "my-run"),
        ("my-run-12/recipe.toml", "my-run"),
        ("my-run-12", "my-run"),
        ("my-run-12@latest", "my-run"),
        ("my-project/recipe.toml", "recipe"),
        ("my-project/other.toml", "other"),
        ("my-project/UP.TOML", "UP"),
    ],
)
def test_a_new_run_is_named_after_its_recipe(
    typed: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("", "my-run", "my-run-12", "my-project"):
        Path(folder).mkdir(exist_ok=True)
        if "run" in folder:
            Path(folder, "run.json").write_text("{}", "utf-8")
        for file in ("recipe.toml", "other.toml", "UP.TOML"):
            Path(folder, file).write_text("[model]\nbase = 'm'\n[[data]]\nmap = 'identity'\n", "utf-8")
    assert resolve(typed, {}, (), Registry.load())[1] == name
    monkeypatch.chdir("my-run-12")
    assert resolve("recipe.toml", {}, (), Registry.load())[1] == "my-run"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux permissions")
def test_a_folder_that_is_shut_is_named_and_hides_no_other(tmp_path: Path) -> None:
    humble = []
    if os.geteuid() == 0:  # to whom nothing is shut
        if not shutil.which("setpriv"):
            pytest.skip("root without setpriv")
        humble = ["setpriv", *(f"--{set}=-dac_override,-dac_read_search" for set in ("bounding-set", "inh-caps"))]
    (tmp_path / "shut").mkdir(mode=0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "complete"}', "utf-8")

    def said(*arguments: str) -> tuple[int, str]:
        words = [*humble, sys.executable, "-m", "corefit", *arguments]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, text = said("runs", ".")
    assert code == 0
    assert "finished" in text
    assert "shut: damaged: no permission to look into it" in text
    assert said("runs", "shut") == (2, "corefit: error: shut: permission denied\n")
    assert said("chat", "shut") == (2, "corefit: error: shut/recipe.toml: permission denied\n")
