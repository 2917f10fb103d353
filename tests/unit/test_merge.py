from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import write_model, write_tokenizer
from tiny_export import IDS, adapted, facts, load
from tiny_families import FAMILIES, Family, write_family

from corefit import merge as merging
from corefit.chat import find
from corefit.engine.adapter import AdapterSpec, add_rows, attach_adapter, with_adapter
from corefit.engine.export import export_trained, read_header, weight_files
from corefit.engine.model import as_stored, causal_lm, load_base
from corefit.errors import ModelError, PluginError
from corefit.merge import merge
from corefit.registry import Registry

torch.set_num_threads(1)
NF4 = {"quantizer": "nf4", "compute_dtype": "float32", "device": "cpu"}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def pair(tmp_path: Path, kind: str = "llama", *, spec: dict | None = None, stored: dict | None = None, **changes):
    """A base, an adapter of it in memory, and the same adapter as a run folder; ``stored``: how training did it."""
    base = write_model(tmp_path / "base", kind=kind, **changes)
    model = adapted(base, **(spec or {}))
    export_trained(model, tmp_path / "run" / "adapter", facts(base, **(stored or {})))
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


@pytest.mark.parametrize("into", ["stored", "dequantised"])
def test_shard_by_shard_with_one_tensor_in_memory(tmp_path, monkeypatch, into):
    base, model, run = pair(tmp_path, stored=NF4)
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
    out = merge(run, tmp_path / "merged", into=into, measured=0, say=lambda line: None)
    assert {p.name for p in weight_files(out)} == {p.name for p in weight_files(base)} and len(weight_files(out)) > 2
    assert most <= 2, "the tensor at hand and the one before it"
    trained = model if into == "stored" else merging.load(find(run))
    assert (logits(load(out)) - logits(trained)).abs().max() < 1e-5


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
        export_trained(model, run / "adapter", facts(base))
    from peft import PeftModel

    want = logits(PeftModel.from_pretrained(load(base), run / "adapter").eval())
    assert (want - logits(model)).abs().max() < 1e-5, "the exported adapter says what it is"
    plain = logits(adapted(base))
    assert (want - plain).abs().max() > 0.01
    assert (logits(load(merge(run, tmp_path / "merged"))) - want).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("where", ["embed_tokens", "lm_head", "q_proj"])
def test_what_pefts_own_saving_adds_to_an_adapter_merges(tmp_path, where, dora):
    """It writes the base's matrix where embeddings or head have LoRA, and with ``bias`` the base's biases."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = write_family(tmp_path / "base", next(family for family in FAMILIES if family.kind == "qwen2"))
    how = {"target_modules": [where], "use_dora": dora, "bias": "none" if where == "embed_tokens" else "all"}
    model = get_peft_model(load(base), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **how))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or (name.endswith(".bias") and "none" not in how["bias"]):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    want = logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval())
    assert (want - logits(load(base))).abs().max() > 0.01
    merged = merge(tmp_path / "adapter", tmp_path / "merged", model=str(base), template="chatml", say=lambda line: None)
    assert (logits(load(merged)) - want).abs().max() < 1e-4


def test_a_base_whose_weights_lie_the_other_way_round_is_neither_adapted_nor_merged(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config

    write_tokenizer(tmp_path / "base")
    config = GPT2Config(vocab_size=600, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    for quantizer in ("none", "nf4"):
        how = {"quantizer": Registry.load().quantizer(quantizer), "compute_dtype": "float32", "device": "cpu"}
        model = load_base(str(tmp_path / "base"), **how)
        for targets in ((), ("c_proj",)):
            with pytest.raises(ModelError, match="no linear layers|no layer 'c_proj'"):
                attach_adapter(model, AdapterSpec(r=4, alpha=8, dropout=0.0, targets=targets), seed=0)
    base = write_model(tmp_path / "other")
    out = export_trained(adapted(base), tmp_path / "adapter", facts(base))
    with pytest.raises(ModelError, match="lie the other way round"):
        merge(out, tmp_path / "merged", model=str(tmp_path / "base"), say=lambda line: None)


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


@pytest.mark.parametrize("end", ["one key less", "the head stored too"])
@pytest.mark.parametrize("spec", [{"modules_to_save": ("lm_head",)}, {"modules_to_save": ("embed_tokens",)}])
def test_a_tied_pair_becomes_two_however_the_base_says_so(tmp_path, spec, end):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # peft warns of tied layers
        base = tied_base(tmp_path / "base", stored_twice=end != "one key less")
        model = adapted(base, **spec)
        export_trained(model, tmp_path / "adapter", facts(base))
        want = logits(model)
    out = merge(tmp_path / "adapter", tmp_path / "merged", model=str(base))
    assert (logits(load(out)) - want).abs().max() < 1e-4
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_pair_becomes_two_under_starcoders_names(tmp_path):
    [family] = [family for family in FAMILIES if family.kind == "gpt_bigcode"]
    base = write_family(tmp_path / "base", family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # peft warns of tied layers
        model = adapted(base, modules_to_save=("wte",))
        export_trained(model, tmp_path / "adapter", facts(base))
        want = logits(model)
    out = merge(tmp_path / "adapter", tmp_path / "merged", model=str(base))
    assert (logits(load(out)) - want).abs().max() < 1e-5


@pytest.mark.parametrize("said", [True, False])
def test_rows_of_a_tied_pair_that_is_stored_twice_are_changed_in_both(tmp_path, said):
    base = tied_base(tmp_path / "base", stored_twice=said)
    if not said:
        store_the_head_too(base)
    model = adapted(base, tokens=tuple(IDS[0, :3].tolist()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_(0, 0.5)
    export_trained(model, tmp_path / "adapter", facts(base))
    out = merge(tmp_path / "adapter", tmp_path / "merged", model=str(base))
    assert (logits(load(out)) - logits(model)).abs().max() < 1e-4


def merged_is_trained(tmp_path: Path, *, tied: bool, more: int, old: tuple[int, ...] = (), **spec):
    """Train on a vocabulary that grew by ``more`` tokens, which train, as the ``old`` do; merge; compare the logits."""
    base = write_model(tmp_path / "base", tie_word_embeddings=tied)
    network, vocabulary = load(base), json.loads((base / "config.json").read_text())["vocab_size"]
    new = tuple(range(vocabulary, vocabulary + more))
    add_rows(network, vocabulary + more, new)
    spec = AdapterSpec(r=4, alpha=8, dropout=0.0, tokens=(*old, *new), **spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # peft warns of tied layers
        model = attach_adapter(network, spec, seed=1).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        export_trained(model, tmp_path / "adapter", facts(base))
        want = logits(model)
    out = merge(tmp_path / "adapter", tmp_path / "merged", model=str(base))
    assert (logits(load(out)) - want).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole", [(), ("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")])
def test_a_vocabulary_that_grew_grows_in_embeddings_and_head(tmp_path, whole, tied):
    if tied and whole == ("lm_head",):
        with pytest.raises(ModelError, match=r'lm_head is embed_.*: \["embed_tokens", "lm_head"\] or neither'):
            merged_is_trained(tmp_path, tied=tied, more=2, modules_to_save=whole)
    else:
        merged_is_trained(tmp_path, tied=tied, more=2, modules_to_save=whole)


def test_lora_on_a_head_that_is_the_embeddings_merges_with_the_rows_that_train_in_them(tmp_path):
    merged_is_trained(tmp_path, tied=True, more=1, old=(5,), targets=("lm_head", "q_proj"))


def test_a_norm_of_a_wider_base_belongs_to_another_base(tmp_path):
    _, _, run = pair(tmp_path, spec={"modules_to_save": ("model.norm",), "targets": ("q_proj",)}, hidden_size=128)
    other = write_model(tmp_path / "other")
    with pytest.raises(ModelError, match="belongs to another base"):
        merge(run, tmp_path / "merged", model=str(other))


def test_lora_on_tied_embeddings_is_not_in_the_head_that_becomes_its_own(tmp_path):
    """What safetensors reads are pages of the file: changed in place, the next reading gives the change."""
    from peft import LoraConfig, get_peft_model

    base = write_model(tmp_path / "base", tie_word_embeddings=True)
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"].clone()
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # peft warns of tied layers
        get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    out = merge(tmp_path / "adapter", tmp_path / "merged", model=str(base))
    tensors = load_file(out / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], before)
    assert not torch.equal(tensors["model.embed_tokens.weight"], before)


def store_the_head_too(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def tied_base(folder: Path, *, stored_twice: bool) -> Path:
    """Either with the head beside the embeddings (Qwen 3 0.6B), or tied by what its class does unsaid (Gemma)."""
    if stored_twice:
        return store_the_head_too(write_model(folder, tie_word_embeddings=True))
    write_family(folder, Family("Gemma 1", "gemma", {"head_dim": 16}))
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_module_of_another_size_belongs_to_another_base(tmp_path):
    _, _, run = pair(tmp_path, spec={"modules_to_save": ("lm_head",)})
    other = write_model(tmp_path / "other", vocab_size=640)
    with pytest.raises(ModelError, match=r"lm_head.weight has another shape in .*other: it belongs to another base"):
        merge(run, tmp_path / "merged", model=str(other))
    assert not (tmp_path / "merged").exists()


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
        (run / "adapter" / "adapter_config.json", {"fan_in_fan_out": True}, "fan_in_fan_out"),
        (run / "adapter" / "adapter_config.json", {"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        (run / "adapter" / "adapter_config.json", {"kasa_config": {"beta": 1e-4}}, "kasa_config"),
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


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantizer", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_weight_is_rounded_to_the_bit_as_loading_it_for_training_rounds_it(tmp_path, quantizer, compute_dtype, kind):
    from peft.utils.integrations import dequantize_module_weight

    base = write_model(tmp_path, kind=kind, dtype="float16")
    how = dict(quantizer=Registry.load().quantizer(quantizer), compute_dtype=compute_dtype, device="cpu")
    stored = load_file(base / "model.safetensors")
    names, rounded = as_stored(str(base), **how)
    layers = {
        f"{n}.weight": m for n, m in load_base(str(base), **how).named_modules() if "bitsandbytes" in f"{type(m)}"
    }
    assert names == set(layers) and len(names) == 14
    for name, layer in layers.items():
        mine = rounded(name, stored[name])
        assert torch.equal(mine, dequantize_module_weight(layer).float()), name
        assert 0.001 < (mine - stored[name].float()).abs().max() < 0.1, "rounded, and not to anything else"
    for name in set(stored) - names:
        assert rounded(name, stored[name]) is stored[name]


@pytest.mark.parametrize(
    ("kind", "spec", "changes"),
    [
        ("llama", {}, {}),
        ("llama_bias", {"targets": ("q_proj", "down_proj")}, {}),
        ("qwen3", {"dora": True}, {"tie_word_embeddings": True}),
    ],
)
def test_merged_into_the_dequantised_base_is_the_model_that_was_trained(tmp_path, kind, spec, changes):
    base, _, run = pair(tmp_path, kind, spec=spec, stored=NF4, **changes)
    trained, said = logits(merging.load(find(run))), []
    assert {type(m).__name__ for m in causal_lm(merging.load(find(run))).modules()} >= {"Linear4bit"}
    error = {}
    for into in ("stored", "dequantised"):
        out = merge(run, tmp_path / into, into=into, say=said.append)
        error[into] = float((logits(load(out)) - trained).abs().max())
        assert read_header(out / "model.safetensors") == read_header(base / "model.safetensors")
        assert json.loads((out / "corefit.json").read_text())["merged_into"] == into
    assert error["dequantised"] < 1e-5 and error["stored"] > 0.1, error
    figures = [(float(line.split("KL ")[1].split()[0]), float(line.split("logit| ")[1].split()[0])) for line in said]
    assert figures[1][0] < 1e-9 < 1e-3 < figures[0][0]
    assert figures[1][1] < 1e-4 < 0.1 < figures[0][1]
    assert said[0].startswith("trained on nf4 weights (made on cpu), merged into the stored ones (--base dequantised ")
    assert said[1].startswith("trained on nf4 weights (made on cpu), and merged into these, dequantised; against ")


def test_in_half_precision_only_the_stored_dtype_is_rounded_to(tmp_path):
    base, _, run = pair(tmp_path, stored={**NF4, "compute_dtype": "float16"}, dtype="float16")
    network = merging.load(find(run))
    layers = [layer for layer in network.modules() if type(layer).__name__ == "Linear4bit" and hasattr(layer, "weight")]
    kept = {(layer.weight.quant_state.dtype, layer.compute_dtype) for layer in layers if not hasattr(layer, "lora_A")}
    assert kept == {(torch.float16, torch.float32)}, "weights as in training, products in fp32"
    trained = logits(network)
    off = {}
    for into in ("stored", "dequantised"):
        merged = merge(run, tmp_path / into, into=into, measured=0, say=lambda line: None)
        off[into] = float((logits(load(merged)) - trained).abs().max() / trained.abs().max())
    assert off["dequantised"] < 4 * torch.finfo(torch.float16).eps < 0.05 < off["stored"], off


def test_int8_is_dequantised_too(tmp_path):
    base, _, run = pair(tmp_path, stored={**NF4, "quantizer": "int8"})
    _, rounded = as_stored(
        str(base), quantizer=Registry.load().quantizer("int8"), compute_dtype="float32", device="cpu"
    )
    plain, merged = (
        load_file(merge(run, tmp_path / into, into=into, say=lambda line: None) / "model.safetensors")
        for into in ("stored", "dequantised")
    )
    wanted = {name: tensor for name, tensor in load_file(base / "model.safetensors").items()}
    for name, tensor in wanted.items():
        assert torch.allclose(merged[name] - plain[name], rounded(name, tensor) - tensor, atol=1e-6), name


def test_kl_and_the_largest_difference_are_those_of_a_sum_by_hand(tmp_path):
    base = write_model(tmp_path / "one")
    other = write_model(tmp_path / "two", seed=5)
    texts = [IDS[0, :7].tolist(), IDS[0, 7:20].tolist()]
    kl, most, tokens = 0.0, 0.0, 0
    for text in texts:
        with torch.no_grad():
            a, b = (load(folder)(torch.tensor([text])).logits[0] for folder in (base, other))
        kl += float(torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"))
        most, tokens = max(most, float((a - b).abs().max())), tokens + len(text)
    said = merging.divergence(load(base), load(other), texts)
    assert said == f"KL {kl / tokens:.2g} nats a token, max |delta logit| {most:.2g}"


def test_what_was_not_measured_is_not_claimed(tmp_path, monkeypatch):
    said = []
    _, _, run = pair(tmp_path, stored={**NF4, "device": "cuda"})
    merge(run, tmp_path / "big", measured=0, say=said.append)
    assert said[0].endswith("; corefit selftest measures the difference on a small model")
    assert "(made on cpu, in training on cuda: a few may be rounded otherwise)" in said[0]
    monkeypatch.setattr("corefit.engine.model.import_bitsandbytes", lambda: False)
    merge(run, tmp_path / "without", say=said.append)
    assert "the difference was not measured: quantizer 'nf4': bitsandbytes is not installed" in said[1]


def test_a_base_that_was_never_quantised_or_nobody_knows_how_is_not_dequantised(tmp_path):
    for number, (stored, words) in enumerate(
        [({"quantizer": "none"}, "training used the stored weights"), ({}, "corefit.json: no compute_dtype")]
    ):
        said = []
        _, _, run = pair(tmp_path / str(number), stored=stored)
        with pytest.raises(ModelError, match=f"{words}: merge without --base dequantised"):
            merge(run, tmp_path / "merged", into="dequantised", say=said.append)
        assert not (tmp_path / "merged").exists() and not said
    with pytest.raises(ModelError, match="no base 'dequantized'; did you mean 'dequantised'?"):
        merge(run, tmp_path / "merged", into="dequantized")


def test_without_the_plugin_of_its_quantizer_an_adapter_is_merged_into_the_stored_base_only(tmp_path):
    said = []
    _, model, run = pair(tmp_path, stored={**NF4, "quantizer": "own"})
    with pytest.raises(PluginError, match="no quantizer 'own'"):
        merge(run, tmp_path / "merged", into="dequantised", say=said.append)
    out = merge(run, tmp_path / "merged", say=said.append)
    assert (logits(load(out)) - logits(model)).abs().max() < 1e-5
    assert "; the difference was not measured: no quantizer 'own'" in said[0]


def test_only_what_bitsandbytes_stored_is_dequantised(tmp_path):
    from corefit.types import Quantizer

    own = Quantizer(name="own", summary="", config=lambda dtype: object())
    with pytest.raises(ModelError, match="quantizer 'own': bitsandbytes dequantises what it stored itself"):
        as_stored(str(write_model(tmp_path)), quantizer=own, compute_dtype="float32", device="cpu")


def test_an_adapter_of_peft_that_names_its_tokens_in_a_list_opens_and_merges(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = write_model(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[12, 40], task_type="CAUSAL_LM")
    model = get_peft_model(load(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["trainable_token_indices"] == [12, 40]
    assert torch.equal(logits(with_adapter(load(base), tmp_path / "adapter").eval()), logits(model))
    out = merge(tmp_path / "adapter", tmp_path / "merged", model=str(base))
    assert (logits(load(out)) - logits(model)).abs().max() < 1e-5


def test_a_base_that_is_not_whole_is_named_before_anything_is_written(tmp_path):
    base = write_model(tmp_path / "base")
    out = export_trained(adapted(base), tmp_path / "adapter", facts(base))
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"model.safetensors: not a whole safetensors file .*; fetch it again"):
        merge(out, tmp_path / "merged", model=str(base))
    assert not (tmp_path / "merged").exists()
