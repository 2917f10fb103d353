"""Nothing that comes with data, models or plugins decides where corefit writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli import corefit
from fake_plugins import scheduler, write_plugin
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_model
from tiny_export import adapted, facts

from corefit.data.files import spool
from corefit.data.tokenizer import FILES, Tokenizer
from corefit.engine.export import INDEX, export_trained, written_aside
from corefit.errors import ModelError
from corefit.merge import merge
from corefit.recipe import Recipe
from corefit.run import _new_folder


def inside(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "a/b", "a\x00b"])
def test_a_plugin_name_is_never_a_path(name, tmp_path):
    write_plugin(tmp_path / "site", "corefit-bad", scheduler(name))
    env = {"PYTHONPATH": str(tmp_path / "site")}
    assert "BROKEN: corefit_schedulers() yields the name" in corefit("plugins", cwd=tmp_path, env=env).stdout
    if "\x00" not in name:
        done = corefit("train", "--plugin", name, cwd=tmp_path, env=env)
        assert done.returncode == 2 and "no map function" in done.stderr
    assert inside(tmp_path) == {path for path in inside(tmp_path) if path.startswith("site/")}


@given(st.text(st.characters(exclude_characters="/\x00"), min_size=1).filter(lambda name: name not in (".", "..")))
def test_a_run_lies_in_runs_whatever_its_recipe_is_called(name):
    assert _new_folder(Recipe(), Path(f"somewhere/{name}.toml").stem, fork=False).parent == Path("runs")


@pytest.mark.parametrize("name", ["...gz", "..gz", ".gz", "a.jsonl.gz", "stdin.jsonl", "..jsonl.gz"])
def test_a_spooled_file_lies_in_the_run(name, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text("{}\n")
    copy = spool(tmp_path / "data" / name, tmp_path / "run" / "data")
    assert copy.parent == tmp_path / "run" / "data" and copy.is_file()
    assert inside(tmp_path) == {f"data/{name}", f"run/data/{copy.name}"}


def test_an_index_that_names_other_folders_is_refused_by_everything_that_reads_weights(tmp_path):
    base = write_model(tmp_path / "base")
    adapter = export_trained(adapted(base), tmp_path / "adapter", facts(base))
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    before = inside(tmp_path)
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "evil.bin"):
        (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
        with pytest.raises(ModelError, match="expected .safetensors files of its own folder"):
            merge(adapter, tmp_path / "merged", model=str(base), say=lambda line: None)
    (base / INDEX).write_text("[]")
    with pytest.raises(ModelError, match="not the index of a model's files"):
        merge(adapter, tmp_path / "merged", model=str(base), say=lambda line: None)
    assert inside(tmp_path) == before | {f"base/{INDEX}"}


def test_the_files_of_a_tokenizer_are_those_it_may_have(tiny_tokenizer, tmp_path):
    folder = shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
    (folder / "..x").touch()
    assert set(Tokenizer.load(folder).files()) <= set(FILES)


def test_the_current_folder_can_be_written_to_as_any_other(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with written_aside(Path(".")) as aside:
        (aside / "file").touch()
    assert inside(tmp_path) == {"here/file"}
    with pytest.raises(ModelError, match="not empty"), written_aside(tmp_path / "here" / ".." / "here"):
        pass


def test_the_name_of_a_base_is_text_in_the_code_of_a_readme(tmp_path):
    base = write_model(tmp_path / 'x"); import os; os.system("touch ran'.replace("/", ""))
    adapter = export_trained(adapted(base), tmp_path / "adapter", facts(base))
    code = (adapter / "README.md").read_text("utf-8").partition("```python\n")[2].partition("```")[0]
    import ast

    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert "os.system" not in calls and "AutoModelForCausalLM.from_pretrained" in calls
