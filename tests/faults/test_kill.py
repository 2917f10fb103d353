"""The quick part of ``kill.py``: eight of its two hundred instants."""

from __future__ import annotations

from pathlib import Path

import pytest
from kill import MATRIX, campaign, lab_of
from zygote import Zygote


@pytest.mark.parametrize(("quantizer", "optimizer"), MATRIX)
def test_killed_at_any_instant_and_resumed_is_the_straight_run(
    quantizer: str, optimizer: str, zygote: Zygote, tmp_path: Path
) -> None:
    lab = lab_of(zygote, tmp_path.resolve() / "lab", quantizer, optimizer, rows=30)
    found = list(campaign(lab, 2, seed=MATRIX.index((quantizer, optimizer))))
    assert [one.differs for one in found] == [[], []], [one.phases for one in found]
    assert all(one.phases for one in found), "killed before the end"
