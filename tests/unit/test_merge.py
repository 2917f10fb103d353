from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import write_model
from tiny_export import IDS, adapted, facts, load

from corefit.engine.export import export_adapter, read_header, weight_files
from corefit.errors import ModelError
from corefit.merge import merge

torch.set_num_threads(1)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def pair(tmp_path: Path, kind: str = "llama", *, spec: dict | None = None, **changes):
    """A base, an adapter of it in memory, and the same adapter as a run folder."""
    base = write_model(tmp_path / "base", kind=kind, **changes)
    model = adapted(base, **(spec or {}))
    export_adapter(model, tmp_path / "run" / "adapter", facts(base))
    (tmp_path / "run" / "recipe.toml").write_text(f"[model]\nbase = {json.dumps(str(base))}\n")
    assert tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    return base, model, tmp_path / "run"


@pytest.mark.parametrize("kind", ["llama", "llama_bias", "qwen3"])
def test_merged_equals_base_and_adapter(tmp_path, kind):
    base, model, run = pair(tmp_path, kind, rope_theta=50000.0)
    out = merge(run, tmp_path / "merged")
    assert (logits(load(out)) - logits(model)).abs().max() < 1e-5
    assert (logits(load(out)) - logits(load(base))).abs().max() > 0.1
    for name in ("config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert read_header(out / "model.safetensors") == read_header(base / "model.safetensors")
    assert json.loads((out / "corefit.json").read_text())["kind"] == "model"
    assert not list(out.glob("adapter*")) and "PeftModel" not in (out / "README.md").read_text()


def test_shard_by_shard_with_one_tensor_in_memory(tmp_path, monkeypatch):
    base, model, run = pair(tmp_path)
    load(base).save_pretrained(base, max_shard_size="60KB")
    (base / "model.safetensors").unlink()
    alive, most = 0, 0

    class Counted(torch.Tensor):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def counting(*args, **kwargs):
        file = safe_open(*args, **kwargs)

        class File:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

            def get_tensor(self, name):
                nonlocal alive, most
                alive += 1
                most = max(most, alive)
                return file.get_tensor(name).as_subclass(Counted)

        return File()

    monkeypatch.setattr("corefit.engine.export.safe_open", counting)
    out = merge(run, tmp_path / "merged", say=lambda line: None)
    assert {p.name for p in weight_files(out)} == {p.name for p in weight_files(base)} and len(weight_files(out)) > 2
    assert most <= 2, "the tensor at hand and the one before it"
    assert (logits(load(out)) - logits(model)).abs().max() < 1e-5


def test_rank_stabilised_scale(tmp_path):
    base, model, run = pair(tmp_path)
    path = run / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"use_rslora": True}
    path.write_text(json.dumps(config))
    from peft import PeftModel

    want = logits(PeftModel.from_pretrained(load(base), run / "adapter").eval())
    assert (want - logits(model)).abs().max() > 0.01
    assert (logits(load(merge(run, tmp_path / "merged"))) - want).abs().max() < 1e-5


@pytest.mark.parametrize("spec", [{"dora": True}, {"rslora": True}, {"dora": True, "rslora": True}])
def test_dora_and_rslora_merge_as_peft_computes_them(tmp_path, spec):
    base, model, run = pair(tmp_path, spec=spec)
    if "dora" in spec:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter *= 1.3
        export_adapter(model, run / "adapter", facts(base))
    from peft import PeftModel

    want = logits(PeftModel.from_pretrained(load(base), run / "adapter").eval())
    assert (want - logits(model)).abs().max() < 1e-5, "the exported adapter says what it is"
    plain = logits(adapted(base))
    assert (want - plain).abs().max() > 0.01
    assert (logits(load(merge(run, tmp_path / "merged"))) - want).abs().max() < 1e-5


def test_modules_trained_whole_replace_the_bases(tmp_path):
    base, model, run = pair(tmp_path, spec={"modules_to_save": ("lm_head", "model.norm")})
    assert (logits(load(merge(run, tmp_path / "merged"))) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "spec",
    [{}, {"targets": ("lm_head", "q_proj")}, {"modules_to_save": ("lm_head",)}, {"modules_to_save": ("embed_tokens",)}],
)
def test_tied_embeddings(tmp_path, spec):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # peft warns of tied layers
        base, model, run = pair(tmp_path, spec=spec, tie_word_embeddings=True)
        want = logits(model)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    out = merge(run, tmp_path / "merged")
    again = load(out)
    assert (logits(again) - want).abs().max() < 1e-5
    tied = not spec
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    assert (again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()) is tied


def test_stored_dtype_stays(tmp_path):
    base, model, run = pair(tmp_path, dtype="float16")
    out = merge(run, tmp_path / "merged")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float16}
    assert (logits(load(out)) - logits(model)).abs().max() < 0.05


def test_what_cant_be_merged_is_refused_in_one_line(tmp_path):
    base, _, run = pair(tmp_path)
    for folder, changes, word in (
        (base / "config.json", {"quantization_config": {"load_in_4bit": True}}, "unquantised"),
        (run / "adapter" / "adapter_config.json", {"lora_bias": True}, "lora_bias"),
        (run / "adapter" / "adapter_config.json", {"init_lora_weights": "pissa"}, "init_lora_weights"),
        (run / "adapter" / "adapter_config.json", {"peft_type": "IA3"}, "IA3"),
    ):
        before = folder.read_text()
        folder.write_text(json.dumps(json.loads(before) | changes))
        with pytest.raises(ModelError, match=word) as error:
            merge(run, tmp_path / "merged", say=lambda line: None)
        assert "\n" not in str(error.value)
        folder.write_text(before)
    other = write_model(tmp_path / "other", kind="qwen2", num_hidden_layers=1)
    with pytest.raises(ModelError, match="another base"):
        merge(run, tmp_path / "merged", model=str(other), say=lambda line: None)
    with pytest.raises(ModelError, match="nothing to merge"):
        merge(base, tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ModelError, match="not empty"):
        merge(run, tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "mine"
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))
