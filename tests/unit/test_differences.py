"""The table "what corefit does differently, and why" says what the plugins' rows say."""

from __future__ import annotations

import importlib
from pathlib import Path

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"


def test_every_row_of_every_plugin_stands_in_the_table():
    page = (PLUGINS / "README.md").read_text("utf-8").partition("## What corefit does differently, and why")[2]
    written = [line for line in page.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    modules = [importlib.import_module(path.parent.name) for path in sorted(PLUGINS.glob("*/__init__.py"))]
    rows = [row for module in modules for row in getattr(module, "DIFFERENCES", ())]
    assert len(rows) > 15
    assert sorted(written[1:]) == sorted(f"| {' | '.join(row)} |" for row in rows)
