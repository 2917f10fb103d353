"""The project's own rules, run as tests: style, types, import direction, size, public names, no machine paths."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON_LINES, C_LINES = 6_000, 900
"""The budget of the engine: a core small enough to read in an afternoon. A change that needs more says so here."""


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [("check", "."), ("format", "--check", ".")], ids=["lint", "format"])
def test_ruff(arguments: tuple[str, ...]) -> None:
    run(sys.executable, "-m", "ruff", *arguments)


def test_mypy_strict() -> None:
    run(sys.executable, "-m", "mypy")


def test_import_linter() -> None:
    run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")


def lines(pattern: str) -> int:
    files = [path for path in (ROOT / "corefit").rglob(pattern) if path.name != "make.py"]
    assert files or pattern != "*.py"
    return sum(len(path.read_text("utf-8").splitlines()) for path in files)


def test_the_engine_stays_within_its_budget() -> None:
    assert lines("*.py") <= PYTHON_LINES
    assert lines("*.c") <= C_LINES


def test_public_names_are_sorted_complete_and_importable() -> None:
    import corefit

    assert corefit.__all__ == sorted(corefit._HOME)
    for name in corefit.__all__:
        assert getattr(corefit, name) is not None


@pytest.mark.parametrize("statement", ["import corefit", "import corefit.cli", "import corefit.registry"])
def test_importing_leaves_torch_and_numpy_unimported(statement: str) -> None:
    code = f"{statement}; import sys; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_required_packages_are_exactly_six() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = sorted(re.match(r"[a-z]+", requirement)[0] for requirement in project["dependencies"])  # type: ignore[index]
    assert names == ["bitsandbytes", "peft", "pluggy", "safetensors", "torch", "transformers"]
    assert project["entry-points"].keys() == {"corefit"}


def test_every_plugin_package_is_in_the_wheel_and_has_an_entry_point() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    folders = sorted(path.name for path in (ROOT / "plugins").iterdir() if (path / "__init__.py").is_file())
    assert sorted(p.removeprefix("plugins/") for p in settings["tool"]["scikit-build"]["wheel"]["packages"]) == [
        "corefit",
        *folders,
    ]
    points = settings["project"]["entry-points"]["corefit"].values()
    assert sorted(points) == sorted(["corefit.defaults", *folders])


def test_no_machine_paths_in_the_project() -> None:
    machine = re.compile(r"(?<![\w.])/(work|root|home/\w+|tmp/\w+)/")
    suffixes = {".py", ".toml", ".md", ".txt", ".json", ".jinja"}
    for folder in ("corefit", "plugins", "benchmarks", "."):
        paths = (ROOT / folder).glob("*") if folder == "." else (ROOT / folder).rglob("*")
        for path in paths:
            if path.is_file() and path.suffix in suffixes:
                assert not machine.search(path.read_text("utf-8")), path
