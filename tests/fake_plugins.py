"""Distributions written as files: a ``.dist-info`` folder and modules, without pip."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path


def write_plugin(
    folder: Path,
    distribution: str,
    code: str | None = None,
    *,
    version: str = "1.0",
    name: str | None = None,
    module: str | None = None,
    points: Mapping[str, str] | None = None,
    entry_points_txt: str | None = None,
) -> Path:
    """Write a plugin into ``folder``, which is to be on ``sys.path``; gives its ``.dist-info`` folder.

    Args:
        folder: where.
        distribution: its name (``corefit-x``).
        code: source of the module; None: no module.
        version: its version.
        name: of the entry point; default: the distribution's without ``corefit-``.
        module: default: the distribution's name with underscores.
        points: several entry points at once, name -> value, in place of ``name`` and ``module``.
        entry_points_txt: the file as it is, in place of all of these.
    """
    module = module or distribution.replace("-", "_")
    if points is None:
        points = {name or distribution.removeprefix("corefit-"): module}
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
    )
    lines = "".join(f"{key} = {value}\n" for key, value in points.items())
    text = f"[corefit]\n{lines}" if entry_points_txt is None else entry_points_txt
    (info / "entry_points.txt").write_text(text, encoding="utf-8")
    if code is not None:
        (folder / f"{module}.py").write_text(textwrap.dedent(code), encoding="utf-8")
    return info


def scheduler(name: str) -> str:
    """Give the source of a plugin with one scheduler."""
    return f"""
        from corefit import Scheduler

        def corefit_schedulers():
            yield Scheduler(name={name!r}, summary="half the rate", factor=lambda progress, warmup: 0.5)
    """


BROKEN = "import nothing_that_is_installed\n"
RAISES_IN_HOOK = "def corefit_schedulers():\n    raise ValueError('no\\nluck')\n    yield\n"
EXITS = "import sys\nsys.exit('bye')\n"
WRONG_TYPE = "def corefit_schedulers():\n    yield {'name': 'dict'}\n"
FORGOT_YIELD = "def corefit_schedulers():\n    pass\n"
MISSPELT = "def corefit_sheduler():\n    return ()\n"
TAKES_ARGUMENTS = "def corefit_schedulers(registry):\n    return ()\n"
