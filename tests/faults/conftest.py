"""One zygote for all tests here, and the straight runs that they compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import SMALL, Lab, outcome, small_model, write_rows
from zygote import Zygote, build, unable


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    if why := unable():
        pytest.skip(why)
    with Zygote(build(tmp_path_factory.mktemp("shim"))) as zygote:
        yield zygote


@pytest.fixture(scope="session")
def lab(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("faults").resolve()
    return Lab(zygote, folder, small_model(folder / "model"), write_rows(folder / "rows.jsonl"), SMALL)


@pytest.fixture(scope="session")
def straight(lab: Lab) -> tuple[Path, dict[str, Any]]:
    """A run that nothing disturbed, traced, and its outcome."""
    run = lab.new()
    done = lab.run(run)
    assert done.code == 0, done.output
    return run, outcome(run)
