"""A stranger's distribution, built and installed, through the real command line; and broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fake_plugins
import pytest
from cli import corefit
from fake_plugins import scheduler, write_plugin

EMBEDDED = Path(__file__).resolve().parents[2] / "corefit" / "embedded"
EXAMPLE = Path(__file__).resolve().parents[1] / "plugin_example"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built by its own backend from a copy and installed into a folder of its own."""
    import shutil

    source = tmp_path_factory.mktemp("source") / "plugin_example"
    shutil.copytree(EXAMPLE, source)
    target = tmp_path_factory.mktemp("site")
    command = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_the_example_distribution_contributes_one_of_everything_to_a_run(installed: Path, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(installed)}
    listed = corefit("plugins", cwd=tmp_path, env=env).stdout
    assert "example  (corefit-example 0.1.0; corefit_example)" in listed
    flags = [word for flag in ("plugin", "template", "quantizer", "scheduler") for word in (f"--{flag}", "example")]
    few = ["train.max_steps=3", "sample.max_tokens=4", "train.packs_per_step=1", "train.micro_batch=1"]
    few += ["run.reporters=progress,example", "run.options.every=2"]
    done = corefit("train", *flags, "--out", "run", "--set", *few, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    for kind in ("reader", "map function", "template", "quantizer", "scheduler", "reporter"):
        assert facts["plugins"][kind]["example"]["distribution"] == "corefit-example"
    assert json.loads((tmp_path / "run" / "ledger.json").read_text("utf-8"))["balanced"] is True
    rates = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    lr = {row["progress"]: row["lr"] for row in rates if "lr" in row}
    base = max(lr.values()) / max(1 - p * p for p in lr)
    for progress, rate in lr.items():
        assert rate == pytest.approx(base * min(1 - progress * progress, progress / 0.05), rel=1e-6)
    assert [line.split()[0] for line in (tmp_path / "run" / "losses.txt").read_text("utf-8").splitlines()] == ["2"]
    asked = corefit("train", "--plugin", "example", "--set", "data.options.shuot=true", cwd=tmp_path, env=env)
    assert asked.returncode == 2
    assert "did you mean 'shout'?" in asked.stderr


def test_two_distributions_that_claim_one_name(tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_plugin(site, "corefit-one", scheduler("bumpy"))
    write_plugin(site, "corefit-two", scheduler("bumpy"), version="2.0")
    env = {"PYTHONPATH": str(site)}
    assert "claimed by" in corefit("plugins", cwd=tmp_path, env=env).stdout
    done = corefit("train", "--plugin", "oasst1", "--scheduler", "bumpy", cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert "corefit-one 1.0" in done.stderr
    assert "corefit-two 2.0" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_plugin_that_replaces_a_built_in_takes_neither(tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_plugin(site, "aaa-evil", scheduler("cosine"), module="aaa_evil")
    done = corefit("train", "--plugin", "oasst1", "--scheduler", "cosine", cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert done.returncode == 2
    assert "aaa-evil 1.0" in done.stderr
    assert "corefit 0.1.0" in done.stderr


@pytest.mark.parametrize("how", ["BROKEN", "RAISES_IN_HOOK", "EXITS"])
def test_a_broken_plugin_harms_nobody_who_does_not_ask_for_it(how: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_plugin(site, "corefit-sad", getattr(fake_plugins, how), version="0.3")
    env = {"PYTHONPATH": str(site)}
    listed = corefit("plugins", cwd=tmp_path, env=env)
    assert listed.returncode == 0
    assert "BROKEN" in listed.stdout
    assert corefit("recipes", cwd=tmp_path, env=env).returncode == 0
    done = corefit("train", "--plugin", "sad", cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert "corefit-sad 0.3" in done.stderr
    assert "Traceback" not in done.stderr
    fine = corefit("plugins", cwd=tmp_path, env={**env, "COREFIT_DISABLE_PLUGINS": "sad"})
    assert "BROKEN" not in fine.stdout


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        ("float('nan')", "factor(0.01, 0.05): ValueError: nan, expected"),
        ("0.5 if progress < 0.9 else 7", "factor(0.9, 0.05): ValueError: 7.0, expected"),
        ("exit(0)", "factor(0.01, 0.05): SystemExit: 0"),
    ],
)
def test_a_scheduler_that_breaks_its_promise_is_refused_before_anything_is_trained(factor, words, tmp_path) -> None:
    site = tmp_path / "site"
    text = scheduler("sad").replace("warmup: 0.5", f"warmup: {factor}")
    write_plugin(site, "corefit-sad", text)
    sets = ["train.max_steps=2", "sample.max_tokens=1", "train.packs_per_step=1", "train.micro_batch=1"]
    asked = ["train", "--scheduler", "sad", "--out", "run", "--set", *sets]
    done = corefit(*asked, cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"corefit: error: scheduler 'sad' (corefit-sad 1.0): {words}")
    assert not (tmp_path / "run").exists()


def test_a_misspelt_hook_names_the_nearest(tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_plugin(site, "corefit-typo", fake_plugins.MISSPELT)
    done = corefit("plugins", cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert done.returncode == 0
    assert "did you mean 'corefit_" in done.stdout


UNASKED = """
    from itertools import repeat
    from corefit import Document, MapFunction

    def sniff(record):
        raise {error}

    def corefit_map_functions():
        yield MapFunction(name="rude", summary="", map=lambda record, options: sniff(record), sniff=sniff)
        yield MapFunction(name="endless", summary="", map=lambda record, options: repeat(Document("x")))
"""


@pytest.mark.parametrize("error", ["SystemExit(0)", "GeneratorExit", "BaseException('a\\nb')"])
def test_a_map_function_that_nobody_asked_for_ends_nothing(error: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_plugin(site, "corefit-rude", UNASKED.format(error=error))
    env, model = {"PYTHONPATH": str(site)}, ("--model", EMBEDDED / "model", "--template", "chatml")
    (tmp_path / "known.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n', encoding="utf-8")
    done = corefit("inspect", "--data", "known.jsonl", *model, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "map function 'rude' failed at " in done.stdout + done.stderr
    (tmp_path / "odd.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    done = corefit("inspect", "--data", "odd.jsonl", *model, cwd=tmp_path, env=env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no installed plugin knows this format (keys: a)" in line
    assert "--plugin endless fits" in line


def test_a_format_that_two_plugins_claim_is_named_where_nobody_recognises_the_data(tmp_path: Path) -> None:
    site = tmp_path / "site"
    code = """
        from corefit import MapFunction

        def corefit_map_functions():
            yield MapFunction(name="alpaca", summary="", map=lambda record, options: [])
    """
    write_plugin(site, "corefit-other", code)
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n', encoding="utf-8")
    asked = ["inspect", "--data", "a.jsonl", "--model", EMBEDDED / "model"]
    done = corefit(*asked, cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no installed plugin knows this format" in line
    assert "map function 'alpaca' is claimed by plugin 'other' (corefit-other 1.0) and by plugin 'xtuner" in line


def test_a_reader_that_needs_no_path_takes_fields_for_a_map_function(installed: Path, tmp_path: Path) -> None:
    recipe = '[[data]]\nreader = "example"\nfields = {user = "question", assistant = "answer"}\n'
    (tmp_path / "r.toml").write_text(recipe, encoding="utf-8")
    env, base = {"PYTHONPATH": str(installed)}, EMBEDDED / "model"
    done = corefit("inspect", "r.toml", "--model", base, "--template", "chatml", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    sets = ("data.reader=example", "data.fields.user=question", "data.fields.assistant=answer")
    done = corefit("inspect", "--set", *sets, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "map function fields, reader example" in done.stdout + done.stderr
