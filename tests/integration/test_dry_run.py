"""``corefit train --dry-run`` as users meet it: what it says, its exit codes, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cli import corefit
from fake_plugins import write_plugin

DATA = "".join(
    json.dumps({"text": f"### Human: What is {i}?### Assistant: It is number {i}."}) + "\n" for i in range(40)
)


def test_a_dry_run_of_standard_input_says_what_holds_and_leaves_nothing(tmp_path: Path, tiny_model: Path) -> None:
    here, aside = tmp_path / "here", tmp_path / "aside"
    here.mkdir()
    aside.mkdir()
    command = ["train", "--dry-run", "--plugin", "oasst1", "--template", "chatml", "--model", tiny_model]
    done = corefit(*command, "--data", "-", cwd=here, env={"TMPDIR": str(aside)}, input=DATA)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    proofs = ("mask", "supervised", "chat template", "vocabulary", "adapter", "trainable", "isolation", "dry run")
    assert [line.split(":")[0] for line in said if line.split(":")[0] in proofs] == list(proofs)
    assert any("40 records -> " in line and " steps in 3 epochs" in line for line in said)
    assert said[-1] == "dry run: everything holds, nothing was trained"
    left = [path.name for folder in (here, aside) for path in folder.iterdir()]
    assert [name for name in left if name.startswith("corefit") or name == "runs"] == []
    assert list(here.iterdir()) == []


def test_a_plugin_that_supervises_the_question_is_refused_with_one_line(tmp_path: Path, tiny_model: Path) -> None:
    write_plugin(
        tmp_path,
        "corefit-wrong",
        """
        import dataclasses
        from corefit import PromptTemplate

        chat = dict(name="wrong", summary="", user="{content}<eoh>", suffix="<eoa>", control=("<eoh>", "<eoa>"))
        right = PromptTemplate.from_strings(**chat)

        def render(item, tokenizer, options=None):
            return iter([s._replace(supervised=True) for s in right.render(item, tokenizer, options)])

        def corefit_prompt_templates():
            yield dataclasses.replace(right, render=render)
        """,
    )
    (tmp_path / "rows.jsonl").write_text(DATA, "utf-8")
    command = ["train", "--template", "wrong", "--model", tiny_model, "--data", "rows.jsonl"]
    done = corefit(
        *command, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == (
        f"corefit: error: {tmp_path / 'rows.jsonl'}:1: mask: token 1, ' is', is supervised and lies in no answer: "
        "'What· is· ·0·?…'\n"
    )
    assert not (tmp_path / "runs").exists()
