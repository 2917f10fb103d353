"""``report.html``: made of a run folder's files, of bounded size, written as the run goes; drawn by a real browser."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from corefit import page
from corefit.errors import RecipeError
from corefit.types import EndReport, PacksReport, StartReport, StepReport

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=http://127.0.0.1/x onerror=\"document.title='owned'\">"
)
RECIPE = '[model]\nbase = "some/model"\n[[data]]\npath = "/rows.jsonl"\n[train]\nlr = {}\n'


def row(step: int, **more) -> dict:
    counts = dict(tokens=90, supervised_tokens=45, samples=3, packs=1, fill=90.0, tokens_per_s=22.5, seconds=2.0)
    scale = dict(loss_scale=1.0, skipped=False, cause=None, memory_bytes=step * 2**20)
    return {"step": step, "epoch": step / 10, "progress": 0.5, "loss": 8 / step, "lr": 1e-3, "grad_norm": 1.0} | {
        **counts,
        **scale,
        **more,
    }


def write_run(folder: Path, steps: int = 20, *, text: str = "What is it?", lr: str = "1e-3", status="complete") -> Path:
    folder.mkdir()
    facts = {"status": status, "steps": steps, "versions": {"torch": "2"}, "plugins": {}, "model": {"base": "m"}}
    (folder / "run.json").write_text(json.dumps({**facts, "proofs": {"mask": text}, "data": []}), "utf-8")
    (folder / "recipe.toml").write_text(RECIPE.format(lr), "utf-8")
    lines = [row(n) for n in range(1, steps + 1)]
    lines += [{"step": n, "val_loss": 1 / (n + 1), "val_perplexity": 2.0, "val_tokens": 9} for n in range(0, steps, 5)]
    lines += [{"step": steps, "save_seconds": 1.0, "save_bytes": 10}, {"step": steps, "save_error": "full"}]
    torn = '{"step": 99, "lo'
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn, "utf-8")
    asked = [{"step": n, "prompt": text, "answer": f"{text} {n}", "stopped": False} for n in range(0, steps + 1, 5)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked), "utf-8")
    ledger = {
        "records": {
            "read": 10,
            "used": 6,
            "dropped": {text[:40]: 1},
            "validation": 1,
            "pending": 2,
            "parts_dropped": {},
        },
        "tokens": {"encoded": 100, "supervised": 50, "masked": 40, "truncated": 1, "dropped": 2, "pending": 7},
        "slots": {"total": 100, "supervised": 50, "masked": 40, "padding": 10},
        "messages": {"total": 9, "dropped": {}, "notes": {}},
    }
    (folder / "ledger.json").write_text(json.dumps({**ledger, "balanced": True}), "utf-8")
    document = {"origin": f"{text}:1", "tokens": 5, "pieces": [[text, False], ["yes", True]], "cut": True}
    packs = {"lengths": [3, 5, 9], "packs": [{"slots": 8, "used": 5, "documents": [document]}]}
    (folder / "packs.json").write_text(json.dumps(packs), "utf-8")
    return folder


def data_of(path: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*)</script>', path.read_text("utf-8"))[1])


def test_a_page_holds_what_the_run_left(tmp_path):
    run = write_run(tmp_path / "run")
    assert page.report(str(run)) == run / "report.html"
    (shown,) = data_of(run / "report.html")["runs"]
    curves = shown["curves"]
    assert curves["each"] == 1 and curves["points"]["step"] == list(range(1, 21)), "without the torn line"
    assert curves["points"]["loss"][:2] == [8, 4] and curves["validation"][0] == [0, 1.0]
    assert (curves["saves"], curves["save_errors"]) == (1, 1)
    total = curves["total"]
    assert (total["first"], total["last"], total["supervised"], total["fill"]) == (8, 0.4, 900, 90)
    assert [a["step"] for a in shown["samples"][0]["answers"]] == [0, 10, 20]
    assert shown["ledger"]["tokens"]["encoded"] == 100 and shown["ledger_step"] == 20
    assert shown["keys"]["train.lr"] == "0.001" and shown["packs"]["lengths"] == [3, 5, 9]


@pytest.mark.parametrize("edit", [{"lr": "high"}, {"loss": "low"}, {"skipped": []}, None, {"val_loss": 1.0}])
def test_a_line_that_somebody_edited_is_left_out(tmp_path, edit):
    run = write_run(tmp_path / "run")
    before, metrics = page.curves(run / "metrics.jsonl"), run / "metrics.jsonl"
    edited = {"loss": 2.0} if edit is None else edit if "val_loss" in edit else row(21, **edit)
    metrics.write_text(json.dumps(edited) + "\n" + metrics.read_text("utf-8"), "utf-8")
    assert page.curves(metrics) == before


@pytest.mark.parametrize("steps", [799, 800, 801, 5_000])
def test_many_steps_become_means_and_nothing_is_lost(tmp_path, steps):
    lines = [
        row(n, loss=None if n == 7 else float(n), loss_scale=1.0 if n == 9 else 2.0, skipped=n == 7)
        for n in range(1, steps + 1)
    ]
    (tmp_path / "m").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    curves = page.curves(tmp_path / "m")
    points, each = curves["points"], curves["each"]
    assert (
        page.POINTS <= len(points["step"]) < 2 * page.POINTS + 1 and each == {799: 1, 800: 2, 801: 2, 5_000: 8}[steps]
    )
    assert points["step"] == [*range(each, steps + 1, each), *([steps] if steps % each else [])]
    assert sum(points["skipped"]) == 1 and sum(points["seconds"]) == pytest.approx(2 * steps)
    assert points["memory"][-1] == steps * 2**20 and min(points["loss_scale"]) == 1
    last = [n for n in range(1, steps + 1) if n > (len(points["step"]) - 1) * each]
    assert points["loss"][-1] == pytest.approx(sum(last) / len(last), rel=1e-5)


def test_a_page_stays_small_and_says_what_it_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=3_000, text="x" * 5_000)
    assert page.report(str(run)).stat().st_size < 150_000
    document = {"origin": "f:1", "tokens": 5, "pieces": [["<" * 1_000_000, False]], "cut": False}
    (run / "packs.json").write_text(json.dumps({"lengths": [], "packs": [{"documents": [document]}]}), "utf-8")
    assert page.report(str(run)).stat().st_size < 1_000_000
    assert data_of(run / "report.html")["left_out"] == ["packs"]


def test_a_page_that_can_t_be_written_is_named_as_it_was_typed(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for folder in (".", "run", ""):
        with pytest.raises(RecipeError, match=f"^--out {re.escape(folder)}: a folder; expected the name of a file$"):
            page.report(str(run), out=folder)
    with pytest.raises(RecipeError, match="^--out no/page.html: can't be written: no such file or directory$"):
        page.report(str(run), out="no/page.html")


def test_two_runs_on_one_page(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", lr="2e-3")
    assert page.report(str(one), str(two)) == one / "compare.html"
    assert page.report(str(one), str(two), str(tmp_path / "x.html")) == tmp_path / "x.html"
    a, b = data_of(tmp_path / "x.html")["runs"]
    assert {k for k in a["keys"] if a["keys"][k] != b["keys"][k]} == {"train.lr"}


def test_what_is_no_run_and_what_is_broken(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing: no run there \(no run.json\)"):
        page.report(str(tmp_path / "nothing"))
    run = write_run(tmp_path / "run")
    for name in ("recipe.toml", "ledger.json", "packs.json", "samples.jsonl"):
        (run / name).write_text('{"broken', "utf-8")
    (run / "metrics.jsonl").unlink()
    (run / "run.json").write_text('{"data": 3', "utf-8")
    with pytest.raises(RecipeError, match=r"run.json: broken"):
        page.report(str(run))
    (run / "run.json").write_text('{"data": 3}', "utf-8")
    assert data_of(page.report(str(run)))["runs"][0]["curves"]["points"] == {}
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    with pytest.raises(RecipeError, match="the page can.t be written: is a directory; --out FILE"):
        page.report(str(run))


def test_written_at_the_start_now_and_then_and_at_the_end(tmp_path, monkeypatch, capsys):
    now, written, full = [0.0], [], [False]

    def write(folder):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(now[0])
        now[0] += 0.5

    monkeypatch.setattr(page.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(page, "write", write)
    tell = page.reporter()
    tell(StartReport(folder=str(tmp_path), step=0, endless=False, recipe={}, facts={}, lengths=[5]))
    tell(PacksReport(packs=[{"documents": []}]))
    assert json.loads((tmp_path / "packs.json").read_text("utf-8")) == {"lengths": [5], "packs": [{"documents": []}]}
    for number in range(1, 100):
        now[0] += 2
        tell(StepReport(**row(number)))
    assert written == [0, 50.5, 101.0, 151.5], "half a second is a hundredth of 50"
    full[0] = True
    for number in range(100, 200):
        now[0] += 2
        tell(StepReport(**row(number)))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"{tmp_path}/report.html: can't be written: no space left on device; it is tried again, the run goes on"
    ]
    full[0] = False
    tell(EndReport(step=199, status="complete", reason="epochs", ledger={}))
    assert len(written) == 5


# -------------------------------------------------------------------------------------------------- in a real browser


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
MEASURE = """<script>document.title = [
  document.body.scrollWidth, document.querySelectorAll("svg").length, document.querySelectorAll(".chart").length,
  [...document.querySelectorAll(".chart text")].filter(t => { const a = t.getBoundingClientRect(),
    b = t.ownerSVGElement.getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1 }).length,
  [...document.querySelectorAll(".chart svg")].reduce((n, s) => { const boxes = [...s.querySelectorAll("text")].map(t =>
    t.getBoundingClientRect()); return n + boxes.filter((a, i) => boxes.some((b, k) => k > i && a.left < b.right &&
    b.left < a.right && a.top < b.bottom && b.top < a.bottom)).length }, 0)].join(" ")</script>"""


def browse(path: Path, folder: Path) -> tuple[str, list[str], list[str]]:
    """Open a page from the disk; give its document once the script ran, what the console said, addresses asked for."""
    net = folder / "net.json"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", *QUIET, f"--user-data-dir={folder / 'profile'}"]
    flags += ["--enable-logging=stderr", f"--log-net-log={net}", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([str(BROWSER), *flags, path.as_uri()], capture_output=True, timeout=120, check=False)
    console = [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]
    events = [event.get("params", {}) for event in json.loads(net.read_text("utf-8"))["events"]]
    # What the browser asks for by itself (the time, say) has no initiator.
    asked = {
        event["url"]
        for event in events
        if "url" in event and event.get("initiator", "not an origin") != "not an origin"
    }
    return done.stdout.decode(), console, sorted(asked)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("kind", ["hostile", "long", "two", "young"])
def test_in_a_browser_it_draws_says_nothing_and_asks_nobody(tmp_path, kind):
    run = write_run(tmp_path / "run", steps=5_000 if kind == "long" else 20, text=HOSTILE)
    other = write_run(tmp_path / "other", text=HOSTILE, lr="2e-3") if kind == "two" else None
    if kind == "young":  # as it is before step 1
        for name in ("metrics.jsonl", "samples.jsonl", "ledger.json", "packs.json"):
            (run / name).unlink()
    path = page.write(run, other)
    shown, console, asked = browse(path, tmp_path)
    assert console == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert "<title>owned" not in shown and "<img" not in shown.partition('<script type="application/json"')[0]
    body = shown.partition("<main")[2].partition("</main>")[0]
    assert "&lt;/script&gt;&lt;script&gt;document.title" in body, "shown, not run"
    assert "undefined" not in body and "NaN" not in body and "[object" not in body
    charts = 0 if kind == "young" else 6
    assert body.count('class="chart"') == charts == body.count("as a table</summary>")
    for width in (375, 1280):
        copy = tmp_path / f"{width}.html"
        narrow = f"<style>body {{ width: {width}px }}</style></head>"
        copy.write_text(
            path.read_text("utf-8").replace("</head>", narrow).replace("</body>", MEASURE + "</body>"), "utf-8"
        )
        title = re.search(r"<title>([^<]*)", browse(copy, tmp_path)[0])[1]
        wide, _, drawn, outside, overlapping = map(int, title.split())
        assert wide <= width and (drawn, outside, overlapping) == (charts, 0, 0), title
