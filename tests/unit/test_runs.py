"""``corefit runs``: every folder is a line, whatever lies in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corefit.durable import claim
from corefit.errors import UserError
from corefit.report import cell_width
from corefit.runs import SORT, look, runs


def write_run(folder: Path, *, metrics: str | None = None, **facts: object) -> Path:
    folder.mkdir(parents=True)
    model = {"base": "owner/a-model", "fingerprint": "x"}
    known = {"status": "complete", "started": "2026-01-02T03:04:05+0000", "model": model, "ended_by": "epochs"}
    known["data"] = [{"path": "/somewhere/rows.jsonl", "bytes": 1}]
    (folder / "run.json").write_text(json.dumps({**known, **facts}), "utf-8")
    lines = metrics if metrics is not None else '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'
    (folder / "metrics.jsonl").write_text(lines, "utf-8")
    return folder


@pytest.mark.parametrize(
    ("status", "state"),
    [("complete", "finished"), ("interrupted", "interrupted"), ("failed", "failed"), ("running", "killed")],
)
def test_the_state_is_what_run_json_and_the_lock_say(status: str, state: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", status=status)
    assert look(folder).state == state
    lock = claim(folder)
    assert lock is not None
    assert look(folder).state == ("running" if status == "running" else state)


def test_where_there_are_no_locks_it_says_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corefit.durable.claim", lambda folder: None)
    assert look(write_run(tmp_path / "run", status="running")).state == "running?"


def test_the_best_loss_is_the_validations_where_there_is_one(tmp_path: Path) -> None:
    line = look(write_run(tmp_path / "a"))
    assert (line.steps, line.best_loss, line.best_of) == (2, 2.0, "training")
    more = '{"step": 1, "loss": 0.5}\n{"step": 1, "val_loss": 1.5}\n{"step": 2, "loss": null}\n{"step": 2, "val_loss"'
    nan = look(write_run(tmp_path / "c", metrics='{"step": 1, "loss": NaN}\n{"step": 1, "loss": 2.5}\n'))
    assert nan.best_loss == 2.5
    line = look(write_run(tmp_path / "b", metrics=more))
    assert (line.steps, line.best_loss, line.best_of) == (2, 1.5, "validation")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\x00\xff", '{"status": "running", "model": [], "data": 3}', "null", "[" * 100_000]
)
def test_damaged_and_half_written_folders_are_lines(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_run(tmp_path / "good")
    bad = write_run(tmp_path / "bad", metrics="\x00{[\n[]\n" + "[" * 100_000 + "\n")
    (bad / "run.json").write_text(text, "latin-1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").mkdir()
    runs(str(tmp_path))
    out = capsys.readouterr().out
    for folder, state in ((good, "finished"), (tmp_path / "empty", "damaged"), (tmp_path / "odd", "damaged")):
        assert any(line.split()[:2] == [str(folder), state] for line in out.splitlines()), out
    assert any(line.split()[:1] == [str(bad)] for line in out.splitlines())
    runs(str(tmp_path), as_json=True)
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 4


def test_wide_characters_align_and_a_terminal_obeys_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "运行一", model={"base": "上海/书生浦语"})
    write_run(tmp_path / "b\x1b[2J", data=[{"path": "数据" * 40 + ".jsonl"}], started="\x1b[31m2026-01-02T03:04")
    runs(str(tmp_path))
    out = capsys.readouterr().out
    lines = out.splitlines()[:3]
    assert "\x1b" not in out and "b\\x1b[2J" in out
    second = zip(lines, ("state", "finished", "finished"), strict=True)
    assert len({cell_width(line[: line.index(word)]) for line, word in second}) == 1
    assert len({cell_width(line) for line in lines[1:]}) == 1  # the last column ends together


@pytest.mark.parametrize("key", SORT)
def test_it_sorts_by_every_column(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate("cab"):
        metrics = f'{{"step": {9 - i}, "loss": {1.5 + i}}}\n'
        data, model = [{"path": f"{name}.jsonl"}], {"base": name}
        started, status = f"2026-01-0{i + 1}", {"c": "complete", "a": "failed", "b": "interrupted"}[name]
        write_run(tmp_path / name, metrics=metrics, data=data, model=model, started=started, status=status)
    runs(str(tmp_path), sort=key, as_json=True)
    order = "".join(Path(json.loads(line)["run"]).name for line in capsys.readouterr().out.splitlines())
    assert order == {"started": "cab", "steps": "bac", "loss": "cab", "state": "acb"}.get(key, "abc")


def test_a_folder_or_a_key_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        runs(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="did you mean 'steps'"):
        runs(str(tmp_path), sort="step")
    runs(str(tmp_path))
    assert "no runs" in capsys.readouterr().out
    runs(str(write_run(tmp_path / "one")), as_json=True)  # a run folder is one run
    assert json.loads(capsys.readouterr().out)["state"] == "finished"
