from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefit.errors import RunError
from corefit.report import (
    JsonLines,
    Progress,
    answers_table,
    cell_width,
    duration,
    finite,
    objects,
    perplexity,
    step_line,
    summary,
    to_json,
    wrap,
)
from corefit.terminal import notice
from corefit.types import StepReport


def report(step: int = 1, **changes) -> StepReport:
    fields = {
        **dict(step=step, epoch=step / 10, progress=(step - 0.5) / 10, loss=4.0 / step, lr=1e-4, grad_norm=1.0),
        **dict(
            loss_scale=1.0,
            skipped=False,
            cause=None,
            tokens=900,
            supervised_tokens=300,
            samples=7,
            packs=2,
            fill=90.0,
        ),
        **dict(tokens_per_s=150.0, seconds=2.0, memory_bytes=3 * 2**20),
    }
    return StepReport(**{**fields, **changes})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(json_values)
def test_a_line_is_always_strict_json_and_one_line(value):
    line = to_json(value)
    assert "\n" not in line

    def strange(word):
        raise AssertionError(word)

    assert json.loads(line, parse_constant=strange) == finite(value)


def test_numbers_json_lacks_become_null_and_the_others_stay():
    assert to_json({"a": [math.nan, -math.inf, 0.1], "b": (1, True)}) == '{"a": [null, null, 0.1], "b": [1, true]}'
    assert json.loads(to_json(report(loss=None)))["loss"] is None
    assert to_json({"say": "你好"}) == '{"say": "你好"}'


def test_lines_are_readable_at_once(tmp_path):
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl")
    lines.write(report(1))
    lines.write({"val_loss": math.inf})
    found = list(objects(tmp_path / "run" / "metrics.jsonl"))
    assert (found[0]["step"], found[0]["loss"], found[1]) == (1, 4.0, {"val_loss": None})
    assert lines.sync() == (tmp_path / "run" / "metrics.jsonl").stat().st_size
    lines.close()


def test_a_resume_cuts_what_the_checkpoint_had_not_seen(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1, "说": "好"})
    keep = lines.sync()
    lines.write({"step": 2})
    lines.close()
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    assert [line["step"] for line in objects(path)] == [1, 2]
    again = JsonLines(path, keep=keep)
    assert again.missing == 0
    again.write({"step": 2, "again": True})
    again.close()
    assert list(objects(path)) == [{"step": 1, "说": "好"}, {"step": 2, "again": True}]


def test_a_new_run_starts_an_empty_file_and_a_shortened_one_is_noticed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"old": 1}\n')
    JsonLines(path).close()
    assert path.read_text() == ""
    path.write_text('{"old": 1}\n')
    lines = JsonLines(path, keep=20)
    lines.close()
    assert lines.missing == 9
    assert path.read_text() == '{"old": 1}\n', "not filled up with zero bytes"
    assert list(objects(tmp_path / "absent")) == []


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"metrics.jsonl: can't be written: "):
        JsonLines(tmp_path / "file" / "metrics.jsonl")


def test_lines_that_the_disk_refuses_are_kept_and_written_later(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"a": 1})
    real = lines._file

    class Full:
        """Takes a part of a line, then nothing."""

        def write(self, data: bytes) -> int:
            if data.startswith(b'{"a"'):
                return real.write(data[:4])
            raise OSError(errno.ENOSPC, "No space left on device")

        truncate = real.truncate

    lines._file = Full()  # type: ignore[assignment]
    lines.write({"a": 2})
    assert lines.trouble == f"{tmp_path / 'metrics.jsonl'}: can't be written: no space left on device"
    with pytest.raises(OSError, match="No space left"):
        lines.sync()
    lines.write({"a": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"a": 1}\n', "no half line for readers"
    lines._file = real
    lines.write({"a": 4})
    assert not lines.trouble
    assert [line["a"] for line in objects(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert lines.sync() == (tmp_path / "metrics.jsonl").stat().st_size
    lines.close()


def test_a_step_in_one_line():
    assert step_line(report(), 200.0) == "step 1: loss 4.0000, 150 supervised tok/s, fill 90 %, 3 min 20 s left"
    skipped = report(skipped=True, cause="non_finite_gradients", grad_norm=None)
    assert step_line(skipped, None).startswith("step 1: skipped (non_finite_gradients), ")
    halved = dataclasses.replace(skipped, loss_scale=65536.0)
    assert step_line(halved, None).startswith("step 1: skipped (non_finite_gradients at loss scale 65536), ")
    nothing = report(skipped=True, cause="nothing_supervised", loss=None, loss_scale=65536.0)
    assert step_line(nothing, None).startswith("step 1: skipped (nothing_supervised), ")
    assert "left" not in step_line(report(), None)


def test_times_as_people_say_them():
    assert [duration(s) for s in (0.4, 59.4, 59.6, 200, 3599.7, 7500)] == [
        *("0 s", "59 s", "1 min 00 s", "3 min 20 s", "1 h 00 min", "2 h 05 min")
    ]


def test_without_a_terminal_a_plain_line_every_few_steps(capsys):
    progress = Progress(every=5)
    for step in range(1, 12):
        progress.update(report(step, skipped=step == 7, cause="nothing_supervised" if step == 7 else None))
    notice("validation loss 1.5")
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    said = err.splitlines()
    assert [line.split(":")[0] for line in said[:-1]] == ["step 1", "step 5", "step 7", "step 10"]
    assert said[-1] == "validation loss 1.5"
    assert "\r" not in err


def test_time_left_is_measured_from_the_first_step_seen(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("corefit.report.time.monotonic", lambda: now[0])
    file = io.StringIO()
    progress = Progress(every=1, file=file)
    for step in (6, 7, 8):  # resumed at step 5 of 10, 20 s a step
        now[0] += 20
        progress.update(report(step))
    said = file.getvalue().splitlines()
    assert "left" not in said[0]
    assert said[1].endswith("1 min 10 s left")  # 3.5 steps behind the middle of step 7
    assert said[2].endswith("50 s left")
    endless = Progress(every=1, file=io.StringIO(), endless=True)
    for step in (1, 2):
        now[0] += 20
        endless.update(report(step))
    assert "left" not in endless._file.getvalue()


def test_on_a_terminal_one_bar_and_notes_above_it():
    file = Terminal()
    progress = Progress(file=file)
    progress.update(report(5))
    notice("validation loss 1.5", file)
    progress.update(report(6))
    progress.close()
    text = file.getvalue()
    assert " 45%|" in text
    assert " 55%|" in text
    assert "step 6: loss" in text
    assert "validation loss 1.5\n" in text


def test_answers_side_by_side_within_the_width():
    table = answers_table(
        [("What is your name?", "asdf " * 20, "I am Corefit."), ("你叫什么名字？", "。", "我是小助手" * 8)], width=60
    )
    lines = table.splitlines()
    assert lines[1].split() == ["question", "before", "after"]
    assert all(cell_width(line) <= 60 for line in lines)
    columns = [line.index("before") for line in lines if "before" in line] + [
        line.index("I am") for line in lines if "I am" in line
    ]
    assert columns == [20, 40]
    assert "".join(lines).count("我是小助手"[0]) == 8, "nothing of an answer is cut"


def test_a_chinese_character_takes_two_cells_and_a_combining_mark_none():
    assert [cell_width(text) for text in ("你好a", "e\u0301", "（")] == [5, 1, 2]


@given(st.text(), st.integers(2, 40))
def test_wrapping_keeps_every_character_and_the_width(text, width):
    lines = wrap(text, width)
    assert lines
    assert all(cell_width(line) <= width for line in lines)
    printable = "".join(c if c.isprintable() else " " for c in text)
    assert "".join("".join(lines).split()) == "".join(printable.split())


def test_the_end_of_a_run_in_a_few_lines():
    lines = [{**json.loads(to_json(report(step))), "memory_bytes": step * 2**20} for step in range(1, 11)]
    lines[3] |= {"loss": None, "skipped": True}
    lines.insert(5, {"step": 5, "val_loss": 2.0})
    lines.append({"step": 10, "val_loss": 1.0})
    assert summary(lines, reason="max_steps", skipped={"non_finite_loss": 1}, balanced=True) == [
        "10 steps, 1 epochs in 20 s: ended by max_steps",
        "loss 4.0000 -> 0.4000 nats a token, 10.0 times lower (perplexity 54.6 -> 1.5)",
        "validation loss 2.0000 -> 1.0000 nats a token, 2.0 times lower (perplexity 7.4 -> 2.7)",
        "3,000 supervised tokens at 150 a second, fill 90.0 %, peak memory 10 MiB",
        "1 steps skipped: 1 non_finite_loss",
        "ledger balanced: every record, token and slot is accounted for",
    ]
    assert summary([], reason="SIGINT", skipped={}) == ["no step was made (SIGINT)"]
    assert "NOT BALANCED" in summary(lines, reason="epochs", skipped={}, balanced=False)[-1]
    rising = [{**line, "loss": i + 1.0} for i, line in enumerate(lines) if "loss" in line]
    assert "lower" not in summary(rising, reason="epochs", skipped={})[1]


def test_perplexity_is_never_an_exception():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf
    assert finite(perplexity(math.nan)) is None


def test_no_torch_here():
    code = "import sys, corefit.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
