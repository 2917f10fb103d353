from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import CONTROL, write_model
from tiny_export import IDS, JINJA, adapted, facts, load
from tiny_families import FAMILIES, write_family
from transformers import AutoTokenizer

from corefit.data.tokenizer import Tokenizer
from corefit.engine.adapter import attach_adapter
from corefit.engine.export import (
    export,
    export_trained,
    layout_of,
    public_name,
    read_header,
    weight_files,
    with_keys,
    written_aside,
)
from corefit.engine.model import stored_tensor
from corefit.errors import ModelError

torch.set_num_threads(1)


def test_an_adapter_is_plain_peft_and_gives_the_same_logits(tiny_model, tmp_path):
    from peft import PeftModel

    model = adapted(tiny_model, modules_to_save=("lm_head",))
    model.peft_config["default"].target_modules = set(model.peft_config["default"].target_modules)
    out = export_trained(model, tmp_path / "run" / "adapter", facts(tiny_model))
    again = PeftModel.from_pretrained(load(tiny_model), out).eval()
    with torch.no_grad():
        assert (again(IDS).logits - model(IDS).logits).abs().max() == 0
        assert (again(IDS).logits - load(tiny_model)(IDS).logits).abs().max() > 0.1
    text = (out / "adapter_config.json").read_text()
    config = json.loads(text)
    assert list(config) == sorted(config)
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) == 7
    assert config["base_model_name_or_path"] == tiny_model.name and config["r"] == 4 and config["lora_alpha"] == 8
    assert set(config) <= {
        *("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout"),
        *("modules_to_save", "peft_type", "r", "revision", "target_modules", "task_type"),
    }, "a key that an older peft may not know"
    assert all(tensor.dtype == torch.float32 for tensor in load_file(out / "adapter_model.safetensors").values())


def test_no_path_of_the_machine_is_inside(tiny_model, tmp_path):
    out = export_trained(adapted(tiny_model), tmp_path / "adapter", facts(tiny_model))
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "corefit.json", "README.md"),
        *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    for path in out.iterdir():
        assert str(tiny_model.parent).encode() not in path.read_bytes(), path.name
        assert path.stat().st_mode & 0o044 == 0o044, "others may read what was exported"


def test_base_files_are_copied_and_changed_only_in_owned_keys(tiny_model, tmp_path):
    out = export_trained(adapted(tiny_model), tmp_path / "adapter", facts(tiny_model))
    assert (out / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert (out / "chat_template.jinja").read_text() == JINJA
    for name, key, value in (
        ("tokenizer_config.json", "chat_template", JINJA),
        ("generation_config.json", "eos_token_id", [3 + CONTROL.index("<eoa>"), 2]),
    ):
        before, after = (json.loads((folder / name).read_text()) for folder in (tiny_model, out))
        assert after.pop(key) == value
        before.pop(key)
        assert list(before.items()) == list(after.items())
    own = json.loads((out / "corefit.json").read_text())
    assert own["stop"] == ["<eoa>"] and own["stop_ids"] == [6] and own["supervise"] == "last"
    assert own["template"] == "internlm_chat" and own["quantizer"] == "nf4" and own["base"] == tiny_model.name
    readme = (out / "README.md").read_text()
    assert own["base_fingerprint"] in readme and tiny_model.name in readme and "[6, 2]" in readme


def test_the_tokenizers_own_template_leaves_its_config_alone(tiny_model, tmp_path):
    own = Tokenizer.load(tiny_model).chat_template
    (tiny_model / "chat_template.jinja").write_text(own)
    try:
        out = export_trained(adapted(tiny_model), tmp_path / "adapter", facts(tiny_model, jinja=own))
    finally:
        (tiny_model / "chat_template.jinja").unlink()
    for name in ("tokenizer_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (tiny_model / name).read_bytes()


def test_the_readme_lines_run(tiny_model, tmp_path, capsys, monkeypatch):
    out = export_trained(adapted(tiny_model), tmp_path / "adapter", facts(tiny_model))
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(out)
    exec(code.replace(f'"{tiny_model.name}"', repr(str(tiny_model))).replace("=256", "=4"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_full_model_is_written_as_the_base_was(tmp_path, tied, sharded):
    base = write_model(tmp_path / "base", dtype="float16", tie_word_embeddings=tied)
    if sharded:
        load(base, torch.float16).save_pretrained(base, max_shard_size="60KB")
        (base / "model.safetensors").unlink()
        assert len(weight_files(base)) > 2
    (base / "LICENSE").write_text("ours")
    model = attach_adapter(load(base), None, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    out = export_trained(model, tmp_path / "model", facts(base))
    for path in weight_files(base):
        assert [*read_header(out / path.name)[0].items()] == [*read_header(path)[0].items()]
    for name in ("config.json", "tokenizer.json", "LICENSE", *(["model.safetensors.index.json"] if sharded else [])):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    again = load(out, torch.float16)
    want = model.half().eval()
    assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), again.state_dict().values(), strict=True))
    assert AutoTokenizer.from_pretrained(out)("hello")["input_ids"]


def test_a_model_whose_names_are_not_the_bases_is_still_saved_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("corefit.engine.export.SHARD_BYTES", 60_000)
    base = write_model(tmp_path / "base", dtype="bfloat16")
    model = attach_adapter(load(base), None, seed=0)
    renamed = {
        name.replace("model.", "old.", 1): value for name, value in load_file(base / "model.safetensors").items()
    }
    from safetensors.torch import save_file

    save_file(renamed, base / "model.safetensors")
    out = export_trained(model, tmp_path / "model", facts(base))
    files = weight_files(out)
    assert len(files) > 2 and all(path.stat().st_size < 80_000 for path in files)
    again = load(out)
    assert all(
        torch.equal(a.bfloat16(), b.bfloat16()) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_buffers_are_saved_with_a_model_whose_names_are_not_the_bases(tmp_path):
    base = write_family(tmp_path / "base", next(family for family in FAMILIES if family.kind == "deepseek_v3"))
    model, name = attach_adapter(load(base), None, seed=0), "model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).fill_(0.25)
    trained = dict(model.named_parameters())
    of_a_checkpoint = lambda key: trained[key] if key in trained else stored_tensor(base, key)  # noqa: E731
    export(tmp_path / "checkpoint", layout_of(model, "base"), of_a_checkpoint, facts(base))
    export_trained(model, tmp_path / "model", facts(base))
    for out, value in (("checkpoint", stored_tensor(base, name)[0]), ("model", 0.25)):
        assert (stored_tensor(tmp_path / out, name) == value).all()
        assert name in load(tmp_path / out).state_dict()


def test_keys_that_are_set_already_leave_the_bytes_alone():
    data = b'{"b":1,\n\n "a": [2]}'
    assert with_keys(data, {"a": [2]}) is data
    assert list(json.loads(with_keys(data, {"b": 2})).items()) == [("b", 2), ("a", [2])]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), written_aside(out) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with written_aside(out) as folder:
        (folder / "whole").write_text("1")
    with pytest.raises(ModelError, match="not empty"), written_aside(out):
        pytest.fail("a folder that holds something was opened")
    with written_aside(out, replace=True) as folder:
        assert (out / "whole").read_text() == "1", "the old one stays until the new one is whole"
        (folder / "new").write_text("2")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.parametrize("left", [(), ("lost+found",), (".tmp-out",)])
def test_an_empty_folder_is_filled_and_stays_what_it_is(tmp_path, monkeypatch, left):
    """It may be a mounted disk, which can't be renamed, or lie where nothing else may be made."""
    out, link = tmp_path / "out", tmp_path / "link"
    out.mkdir(mode=0o750)
    link.symlink_to(out)
    for name in left:
        (out / name).mkdir()
    before = out.stat()

    def refused(self, target):
        pytest.fail(f"{self} is renamed to {target}")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(RuntimeError), written_aside(link) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert {path.name for path in out.iterdir()} <= {"lost+found"}
    with written_aside(link) as folder:
        (folder / "whole").write_text("1")
        assert not (out / "whole").exists()
    assert {path.name for path in out.iterdir()} - {"lost+found"} == {"whole"}
    assert link.is_symlink() and (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_a_folder_that_a_link_names_is_made(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with written_aside(tmp_path / "link") as folder:
        (folder / "whole").write_text("1")
    assert (tmp_path / "there" / "whole").is_file() and (tmp_path / "link").is_symlink()
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="file: is no folder; name a new one"), written_aside(tmp_path / "file"):
        pytest.fail("a file was taken for a folder")


@pytest.mark.parametrize("at", [".tmp-out", "out"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_folder_that_cannot_get_its_name_leaves_the_old_one_in_place(tmp_path, monkeypatch, error, at):
    out, rename = tmp_path / "out", Path.rename
    with written_aside(out) as folder:
        (folder / "old").write_text("1")

    def refused(self, target):
        done = rename(self, target) if self.name == "out" else None  # ctrl-C is seen once the call is over
        if self.name == at:
            raise error
        return done or rename(self, target)

    with monkeypatch.context() as patch, pytest.raises((ModelError, KeyboardInterrupt)):
        patch.setattr(Path, "rename", refused)
        with written_aside(out, replace=True) as folder:
            (folder / "new").write_text("2")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_names_without_paths(tmp_path):
    cached = tmp_path / "models--owner--a-model" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    (tmp_path / "m").mkdir()
    assert public_name(str(cached)) == "owner/a-model"
    assert public_name(str(tmp_path / "m" / ".." / "m")) == "m"
    assert public_name(str(tmp_path / "gone" / "base")) == "base"
    assert public_name("owner/a-model") == "owner/a-model"


def test_safetensors_files_are_what_the_library_reads(tiny_model, tmp_path):
    out = export_trained(adapted(tiny_model), tmp_path / "adapter", facts(tiny_model))
    with safe_open(out / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(key.startswith("base_model.model.model.layers.") for key in file.keys())  # noqa: SIM118
