"""``corefit new-plugin``: what it writes installs beside the built wheel, keeps its promises, and is of use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cli import environment

from corefit.cli import main
from corefit.prepare import EMBEDDED
from corefit.registry import Registry
from corefit.scaffold import FILES, NEW

ROOT = Path(__file__).resolve().parents[2]
NAMES = {kind: f"new_{kind.replace('-', '_')}" for kind in NEW}


def run(*command: object, cwd: Path, code: int = 0, **env: str) -> str:
    """Run a command that is to end with this exit code; give what it printed."""
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment(env), capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one new plugin of each kind."""
    folder = tmp_path_factory.mktemp("plugins")
    for kind, name in NAMES.items():
        assert main(["new-plugin", name, "--kind", kind, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def venv(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the built wheel and the new plugins; what they need is borrowed from here."""
    folder = tmp_path_factory.mktemp("venv")
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    site = run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # a plain line: the editable install of corefit that is there too stays asleep
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    install = [*pip, "--python", scripts / "python", "install", "-q", "--no-deps", "--no-build-isolation"]
    run(*install, "--ignore-installed", *folder.glob("*.whl"), *written.glob("corefit-*"), cwd=folder)
    where = run(scripts / "python", "-c", "import corefit; print(corefit.__file__)", cwd=folder)
    assert where.startswith(site)
    return scripts


def test_every_kind_of_entry_can_be_begun() -> None:
    assert {entry for entry, _ in NEW.values()} == {*Registry.load().entries}


def test_the_new_plugins_are_listed(venv: Path, tmp_path: Path) -> None:
    listed = run(venv / "corefit", "plugins", cwd=tmp_path)
    for kind, name in NAMES.items():
        distribution = f"corefit-{name.replace('_', '-')} 0.1.0"
        assert f"{name}  ({distribution}; corefit_{name})\n    {NEW[kind][0]}: {name}\n" in listed
    assert "BROKEN" not in listed


def test_their_own_tests_pass(venv: Path, written: Path) -> None:
    tests = sorted(written.glob("corefit-*/tests"))
    assert len(tests) == len(NEW)
    said = run(venv / "python", "-m", "pytest", "-q", "--import-mode=importlib", *tests, cwd=written)
    assert " passed" in said and "failed" not in said and "skipped" not in said


@pytest.mark.parametrize("kind", NEW)
def test_they_keep_what_every_plugin_promises(kind: str, venv: Path, tmp_path: Path) -> None:
    lines = run(venv / "corefit", "check", NAMES[kind], cwd=tmp_path).splitlines()
    tried = sum(not line.startswith("n/a") for line in lines) - 1
    assert lines[-1].partition(";")[0] == f"{tried} checks, none failed"
    assert any(line.startswith(f"ok      {NEW[kind][0]} {NAMES[kind]}: ") for line in lines)


def test_a_run_uses_all_of_them(venv: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.new_reader").write_text("".join(f"What is {n} + 1?\t{n + 1}\n" for n in range(30)), "utf-8")
    (tmp_path / "run.new_recipe_reader").write_text(f"model: {EMBEDDED / 'model'}\nsteps: 2\ncolour: red\n", "utf-8")
    flags = [f"--{flag}={NAMES[flag]}" for flag in ("template", "quantizer", "scheduler")]
    flags += [f"--plugin={NAMES['dataset']}", "--data=rows.new_reader", "--out=run"]
    few = [
        "run.reporters=progress,new_reporter",
        "sample.max_tokens=2",
        "train.packs_per_step=1",
        "train.micro_batch=1",
        "pack.max_length=64",
    ]
    said = run(venv / "corefit", "train", "run.new_recipe_reader", *flags, "--set", *few, cwd=tmp_path)
    assert "run.new_recipe_reader:3: colour: left out: no counterpart" in said
    used = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["plugins"]
    for kind in ("reader", "dataset", "template", "quantizer", "scheduler"):
        assert used[NEW[kind][0]][NAMES[kind]]["distribution"] == f"corefit-{NAMES[kind].replace('_', '-')}"
    told = (tmp_path / "run" / "new_reporter.txt").read_text("utf-8").splitlines()
    assert [line.split()[0] for line in told] == ["1", "2"]
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text("utf-8"))
    assert ledger["balanced"] is True


def test_what_is_written_is_tidy(written: Path) -> None:
    config = ROOT / "pyproject.toml"
    for command in (["check"], ["format", "--check"]):
        run(sys.executable, "-m", "ruff", *command, "--no-cache", "--config", config, ".", cwd=written)
    modules = sorted(written.glob("corefit-*/corefit_*.py"))  # with what is known of corefit from its own check
    run(sys.executable, "-m", "mypy", *modules, next(written.glob("*/tests/*.py")), cwd=ROOT)
    for folder in written.glob("corefit-*"):
        assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} >= {*FILES}
        texts = [path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()]
        assert not [text for text in texts if "$name" in text or "my_plugin" in text]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        (
            "my-Chat",
            "template",
            "'my-Chat' is no name for a plugin: small letters, digits and _, a letter first; my_chat",
        ),
        ("2nd", "template", "a letter first; nd would do"),
        ("../up", "template", "'../up' is no name for a plugin"),
        ("mine", "temlpate", "--kind: no kind of plugin 'temlpate'; did you mean 'template'?"),
        ("cosine", "scheduler", "'cosine' is taken by plugin 'corefit' (corefit "),
        ("oasst1", "template", "'oasst1' is taken by plugin 'oasst1' (corefit "),
        ("there", "reader", "corefit-there: is there already; choose another name, or move it away"),
    ],
)
def test_what_can_not_be_written_is_one_line(name, kind, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corefit-there").mkdir()
    assert main(["new-plugin", name, "--kind", kind]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["corefit-there"]


def test_a_folder_that_can_not_be_written_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["new-plugin", "mine", "--kind", "reader", "--out", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == f"corefit: error: {tmp_path / 'corefit-mine'}: can't be written: permission denied\n"
    )


def test_without_docstrings_nothing_is_written(tmp_path) -> None:
    said = run(sys.executable, "-OO", "-m", "corefit", "new-plugin", "mine", "--kind", "reader", cwd=tmp_path, code=2)
    assert said.endswith(
        "the example is in a docstring, and Python leaves them out: run it without -OO, PYTHONOPTIMIZE=2\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_help_names_every_kind(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["new-plugin", "--help"])
    kinds = f"{','.join([*NEW][:-1])}or{[*NEW][-1]}"
    assert kinds in "".join(capsys.readouterr().out.split())
