"""A template of a plugin that no Jinja says: whoever talks to the run needs it, as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

from cli import corefit
from fake_plugins import write_plugin

CODE = """
    from corefit import PromptTemplate, Segment

    def corefit_prompt_templates():
        yield PromptTemplate(name="mine", summary="it says MARK", render=render, stop=("<eoa>",))

    def render(item, tokenizer, options=None):
        for message in item.messages:
            answer = message.role == "assistant"
            yield Segment("A: " if answer else "MARK ", turn=not answer)
            yield Segment(message.content, supervised=answer and message.supervised is not False)
            yield Segment("<eoa>", supervised=answer and message.supervised is not False, control=True)
"""


def test_a_template_that_is_gone_or_says_something_else_is_named(tmp_path: Path) -> None:
    site, env = tmp_path / "site", {"PYTHONPATH": str(tmp_path / "site")}
    write_plugin(site, "corefit-mine", CODE)
    sets = ["train.max_steps=2", "sample.max_tokens=1", "adapter.r=4"]
    done = corefit("train", "--template", "mine", "--out", "run", "--set", *sets, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    ask = ["--prompt", "hi", "--max-tokens", "2"]
    as_it_was = corefit("chat", "run", *ask, cwd=tmp_path, env=env)
    assert as_it_was.returncode == 0 and "writes something else" not in as_it_was.stderr
    assert corefit("merge", "run", "--out", "merged", cwd=tmp_path, env=env).returncode == 0

    (site / "corefit_mine.py").write_text((site / "corefit_mine.py").read_text("utf-8").replace("A: ", "B: "), "utf-8")
    shutil.rmtree(site / "__pycache__", ignore_errors=True)
    for target in ("run", "merged"):
        said = corefit("chat", target, *ask, cwd=tmp_path, env=env)
        assert said.returncode == 0 and "template 'mine' writes something else than in training" in said.stderr

    shutil.rmtree(site)
    for target in ("run", "merged", "run@latest"):
        refused = corefit("chat", target, *ask, cwd=tmp_path, env=env)
        assert (
            refused.returncode == 2 and "trained with template 'mine', which no installed plugin has" in refused.stderr
        )
    other = corefit("chat", "run", *ask, "--template", "internlm_chat", cwd=tmp_path, env=env)
    assert other.returncode == 0, other.stderr
