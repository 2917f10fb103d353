"""Data in GB18030 is named as such, with the command that converts it; torn UTF-8 and Latin-1 are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corefit.cli import main
from corefit.errors import encoding_hint

TEXT = "法国的首都是哪里？巴黎。"
WAY = "iconv -f GB18030 -t UTF-8 FILE > NEW"


@pytest.mark.parametrize("text", [TEXT, "a" + TEXT, "“你好”", "联通", '{"a": "你好"}', TEXT + "𠮷"])
def test_gb18030_is_named_and_shown(text: str) -> None:
    hint = encoding_hint(text.encode("gb18030"))
    assert hint.endswith(WAY) and hint.startswith("; as GB18030 it reads '")
    assert hint.split("'")[1] and hint.split("'")[1] in text


@pytest.mark.parametrize("cut", range(1, 3 * len(TEXT)))
def test_torn_utf8_is_no_gb18030(cut: int) -> None:
    assert encoding_hint(TEXT.encode()[:cut]) == ""
    assert encoding_hint(TEXT.encode()[:cut] + b'"}\n') == "" or cut < 3  # one broken character may be anything


@pytest.mark.parametrize("text", ["déjà vu, café", "Größe und Maß", "señor, mañana", "smörgås"])
def test_latin_1_is_no_gb18030(text: str) -> None:
    assert encoding_hint(text.encode("latin-1")) == ""


def test_every_reader_and_the_recipe_say_so(
    tmp_path: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.dumps({"text": f"### Human: {TEXT}### Assistant: 巴黎"}, ensure_ascii=False)
    files = {"a.jsonl": row, "a.csv": f"text,n\n{TEXT},1\n", "a.txt": TEXT, "a.toml": f'[model]\nbase = "{TEXT}"\n'}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("gb18030"))
        what = [str(tmp_path / name)] if name == "a.toml" else ["--data", str(tmp_path / name)]
        assert main(["inspect", *what, "--tokenizer", str(tiny_tokenizer), "--template", "chatml"]) == 2
        said = capsys.readouterr().err
        assert "法国的首都" in said and WAY in said and str(tmp_path / name) in said
        assert len(said.splitlines()) == 1
