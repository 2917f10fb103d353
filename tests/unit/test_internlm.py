"""InternLM folders as published, against a forward pass of their description: loading, adapters, writing back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_export import facts
from tiny_internlm import CONFIGS, reference, write_internlm

from corefit.engine.adapter import AdapterSpec, attach_adapter, trainable_parameters, with_adapter
from corefit.engine.attention import isolation_canary, run_packed
from corefit.engine.export import export, export_trained, layout_of, weight_files
from corefit.engine.internlm import Layout, llama_names, published_name
from corefit.engine.model import as_stored, base_dtype_of, load_base
from corefit.errors import ModelError
from corefit.merge import merge
from corefit.types import Quantizer

torch.set_num_threads(1)
IDS = torch.randint(10, 500, (40,), generator=torch.Generator().manual_seed(3))
ROTARY = {"rotary": {"base": 10000, "type": "dynamic"}}
FOLDERS = {
    "1 7B": ("internlm", ROTARY),
    "1 20B": ("internlm", {**ROTARY, "bias": False, "num_key_value_heads": 8}),
    "1 as first published": ("internlm", {}),
    "2": ("internlm2", {"rope_scaling": None, "rope_theta": 10000}),
    "2.5": ("internlm2", {}),
    "2 with biases": ("internlm2", {"bias": True}),
    "2 without groups": ("internlm2", {"num_key_value_heads": 8}),
    "3": ("internlm3", {}),
    "3 with biases": ("internlm3", {"bias": True, "qkv_bias": True}),
}
each_folder = pytest.mark.parametrize(("kind", "changes"), FOLDERS.values(), ids=FOLDERS)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def bits(name: str) -> Quantizer:
    from transformers import BitsAndBytesConfig

    made = {"none": lambda dtype: None, "int8": lambda dtype: BitsAndBytesConfig(load_in_8bit=True)}
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    made["nf4"] = lambda dtype: BitsAndBytesConfig(**four, bnb_4bit_compute_dtype=getattr(torch, dtype))
    return Quantizer(name=name, summary="", config=made[name])


def load(folder, quantizer="none", **more):
    said: list[str] = []
    model = load_base(
        str(folder), quantizer=bits(quantizer), compute_dtype="float32", device="cpu", say=said.append, **more
    )
    about = [line for line in said if f": {quantizer} stores " not in line]  # how much of the base is quantised
    assert about == [], "nothing missing, nothing unexpected, no fallback"
    return model


def stored(folder):
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def wanted(folder, ids=IDS, lora=None):
    tensors = {name: tensor.float() for name, tensor in stored(folder).items()}
    return reference(json.loads((folder / "config.json").read_text()), tensors, ids, lora)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].float()


def adapted(model, **spec):
    model = attach_adapter(model, AdapterSpec(**{"r": 4, "alpha": 8, "dropout": 0.0, **spec}), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def lora_of(adapter):
    """Read an adapter on published names as its format says: module -> (A, B, scale)."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = {
        n.removeprefix("base_model.model."): t for n, t in load_file(adapter / "adapter_model.safetensors").items()
    }
    found = {}
    for name, a in tensors.items():
        module, _, rest = name.partition(".lora_A")
        if rest:

            def own(pattern, usual, module=module):
                return next((v for k, v in (pattern or {}).items() if f".{module}".endswith(f".{k}")), usual)

            rank = own(config.get("rank_pattern"), config["r"])
            alpha = own(config.get("alpha_pattern"), config["lora_alpha"])
            assert len(a) == rank and own(dict.fromkeys(config["target_modules"], True), False)
            found[module] = (a, tensors[f"{module}.lora_B.weight"], alpha / rank)
    return config, found


# ------------------------------------------------------------------------------------------------------------ loading


@each_folder
def test_logits_are_those_of_the_published_description(tmp_path, kind, changes):
    folder = write_internlm(tmp_path / "m", kind, **changes)
    want = wanted(folder)
    assert want.abs().max() > 1
    assert (logits(load(folder)) - want).abs().max() < 1e-5


@pytest.mark.parametrize("kind", CONFIGS)
def test_sharded_fp16_folders_load_the_same(tmp_path, kind):
    folder = write_internlm(tmp_path / "m", kind, dtype="float16", shards=3)
    assert len(weight_files(folder)) == 3 and base_dtype_of(str(folder)) == "float16"
    assert (logits(load(folder)) - wanted(folder)).abs().max() < 1e-5


@pytest.mark.parametrize(("kind", "changes"), [("internlm", ROTARY), ("internlm2", {}), ("internlm3", {})])
@pytest.mark.parametrize("length", [24, 25, 60])
def test_the_base_of_rope_grows_beyond_the_trained_length_as_published(tmp_path, kind, changes, length):
    folder = write_internlm(tmp_path / "m", kind, max_position_embeddings=24, **changes)
    model, ids = load(folder), torch.arange(10, 10 + length)
    assert (logits(model, ids) - wanted(folder, ids)).abs().max() < 1e-5
    logits(model, torch.arange(10, 200))  # a longer one in between changes nothing
    assert (logits(model, ids) - wanted(folder, ids)).abs().max() < 1e-5


def test_linear_scaling_is_transformers_own(tmp_path):
    folder = write_internlm(tmp_path / "m", rope_scaling={"type": "linear", "factor": 4.0})
    model = load(folder)
    assert "forward" not in vars(model.model.rotary_emb)
    assert model.config.rope_parameters["factor"] == 4.0 and model.config.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize("kind", ["internlm", "internlm2"])
def test_packed_equals_unpacked_also_where_documents_are_longer_than_trained(tmp_path, kind):
    folder = write_internlm(tmp_path / "m", kind, max_position_embeddings=16, **(ROTARY if kind == "internlm" else {}))
    model, lengths = load(folder), (9, 30, 21)
    assert isolation_canary(model, vocab_size=512, device="cpu") == 0.0
    ids = torch.arange(10, 10 + sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        packed = run_packed(model, ids[None], positions[None]).logits[0].split(lengths)
    for document, got in zip(ids.split(lengths), packed, strict=True):
        assert (got - wanted(folder, document)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("quantizer", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_it_loads_straight_into_few_bits(tmp_path, kind, quantizer, layer):
    folder = write_internlm(tmp_path / "m", kind, dtype="float16")
    model = load(folder, quantizer)
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
    assert kinds == {layer} and type(model.lm_head).__name__ == "Linear"
    want = wanted(folder)
    assert torch.nn.functional.cosine_similarity(logits(model, IDS), want).mean() > 0.9


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_the_quantizer_made_of_each_matrix_is_known_by_the_published_names(tmp_path, kind):
    folder = write_internlm(tmp_path / "m", kind)
    names, rounded = as_stored(str(folder), quantizer=bits("nf4"), compute_dtype="float32", device="cpu")
    tensors = stored(folder)
    linear = {name for name in tensors if name.endswith(("proj.weight", "w1.weight", "w2.weight", "w3.weight"))}
    assert names == linear | {name for name in tensors if name.endswith(("wqkv.weight", "wo.weight"))}
    want = logits(load(folder, "nf4"))
    again = {name: rounded(name, tensor) for name, tensor in tensors.items()}
    got = reference(json.loads((folder / "config.json").read_text()), again, IDS)
    assert (got - want).abs().max() < 1e-5 and (wanted(folder) - want).abs().max() > 0.1


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_code_of_the_folder_runs_even_with_trust(tmp_path, kind):
    folder = write_internlm(tmp_path / "m", kind)
    assert type(load(folder, trust_remote_code=True)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("internlm", {"rotary": {"type": "yarn"}}, "rotary type 'yarn'; known are origin and dynamic"),
        ("internlm3", {"bias": True}, "bias and qkv_bias differ"),
        ("internlm2", {"num_key_value_heads": 4}, "96 rows, but config.json speaks of 8 query and 4 key-value heads"),
        ("internlm", {"intermediate_size": 80}, "can't be loaded"),
    ],
)
def test_what_llama_cannot_be_is_refused_in_one_line(tmp_path, kind, changes, message):
    folder = write_internlm(tmp_path / "m", kind)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(folder))


def test_missing_biases_are_missing_weights(tmp_path):
    folder = write_internlm(tmp_path / "m", "internlm", bias=False)
    config = json.loads((folder / "config.json").read_text())
    del config["bias"]  # which then is true: the published default
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"8 weights of the model aren't in its files .*self_attn"):
        load(folder)


# ----------------------------------------------------------------------------------------------------------- adapters


def test_names_go_both_ways():
    for own, llama in (
        ("model.tok_embeddings.weight", "model.embed_tokens.weight"),
        ("model.layers.0.attention.wo.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("model.layers.0.attention_norm.weight", "model.layers.0.input_layernorm.weight"),
        (
            "base_model.model.model.layers.7.feed_forward.w2.lora_A.weight",
            "base_model.model.model.layers.7.mlp.down_proj.lora_A.weight",
        ),
        ("model.norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        assert llama_names(own) == [llama] and published_name(llama) == own
    three = llama_names("layers.0.attention.wqkv")
    assert three == [f"layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert {published_name(name) for name in three} == {"layers.0.attention.wqkv"}


@pytest.mark.parametrize("layout", [Layout(4, 2, 8), Layout(1, 8, 8), Layout(8, 1, 4)])
def test_splitting_and_fusing_are_inverse_bit_for_bit(layout):
    fused = torch.randn(layout.groups * (layout.queries + 2) * layout.head_dim, 5).half()
    parts = layout.split(fused, "w")
    assert [len(part) for part in parts] == [layout.groups * n * layout.head_dim for n in (layout.queries, 1, 1)]
    assert torch.equal(layout.fuse(*parts), fused)
    assert torch.equal(layout.fuse(*layout.split(fused[:, 0], "b")), fused[:, 0])


@pytest.mark.parametrize(
    "targets", [(), ("q_proj", "v_proj"), ("k_proj", "o_proj", "up_proj"), ("layers.1.self_attn.q_proj", "v_proj")]
)
@pytest.mark.parametrize("kind", ["internlm", "internlm2"])
def test_an_adapter_is_written_for_the_published_layout(tmp_path, kind, targets):
    """By the reference: base + the exported adapter = the model in memory, up to fp32 rounding."""
    base = write_internlm(tmp_path / "base", kind)
    model = adapted(load(base), targets=targets)
    adapter = export_trained(model, tmp_path / "adapter", facts(base))
    config, lora = lora_of(adapter)
    assert (wanted(base, lora=lora) - logits(model)).abs().max() < 1e-5
    assert (wanted(base) - logits(model)).abs().max() > 0.1
    names = {name.rpartition(".")[2] for name in lora}
    if kind == "internlm2":
        assert not names & {"q_proj", "k_proj", "v_proj", "o_proj"} and "wqkv" in names
        assert config["rank_pattern"] == {"wqkv": 12} and config["alpha_pattern"] == {"wqkv": 24}
    else:
        assert "wqkv" not in names and "rank_pattern" not in config
    if not targets and kind == "internlm2":
        assert config["target_modules"] == sorted(names) == ["w1", "w2", "w3", "wo", "wqkv"]


def test_the_fold_is_exact(tmp_path):
    base = write_internlm(tmp_path / "base")
    model = adapted(load(base))
    export_trained(model, tmp_path / "adapter", facts(base))
    _, lora = lora_of(tmp_path / "adapter")
    layer = model.get_base_model().model.layers[0].self_attn
    parts = [getattr(layer, f"{part}_proj").get_delta_weight("default") for part in "qkv"]
    a, b, scale = lora["model.layers.0.attention.wqkv"]
    difference = Layout(4, 2, 8).fuse(*parts) - scale * (b @ a)
    assert a.shape == (12, 64) and difference.abs().max() < 1e-7


WHOLE = ("lm_head", "embed_tokens", "q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"targets": ("v_proj",)},
        {"targets": ("q_proj", "k_proj", "down_proj"), "rslora": True},
        {"dora": True},
        {"targets": ("o_proj", "up_proj"), "dora": True},
        {"targets": ("o_proj",), "modules_to_save": WHOLE},
        {"targets": ("wo", "wqkv"), "modules_to_save": ("output",)},
    ],
    ids=str,
)
def test_an_exported_adapter_comes_back_as_what_it_was(tmp_path, spec):
    """Into a chat, into a merged model, into a new training."""
    base = write_internlm(tmp_path / "base")
    model = adapted(load(base), **spec)
    want = logits(model)
    assert (want - wanted(base)).abs().max() > 0.01
    adapter = export_trained(model, tmp_path / "adapter", facts(base))
    again = with_adapter(load(base), adapter).eval()
    assert again.peft_config["default"].rank_pattern == {}, "of rank r again"
    assert (logits(again) - want).abs().max() < 1e-5
    out = merge(adapter, tmp_path / "merged", model=str(base), say=lambda line: None)
    assert (wanted(out) - want).abs().max() < 1e-5
    for name in ("config.json", "modeling_internlm2.py"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert stored(out).keys() == stored(base).keys()

    config = json.loads((adapter / "adapter_config.json").read_text())
    published = {"targets": tuple(config["target_modules"]), "modules_to_save": tuple(config["modules_to_save"] or ())}
    going_on = AdapterSpec(**{"r": 4, "alpha": 8, "dropout": 0.0, **spec, **published, "start": str(adapter)})
    new = attach_adapter(load(base), going_on, seed=9)
    assert (logits(new.eval()) - want).abs().max() < 1e-5
    before, after = (dict(m.named_parameters()) for m in (model, new))
    for name, parameter in trainable_parameters(model).items():
        assert torch.equal(parameter, after[name]), name
    for name in trainable_parameters(new).keys() - trainable_parameters(model).keys():  # beside v_proj, say
        assert "_proj.lora_" in name and not after[name].any() and name not in before


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"r": 2, "rank_pattern": {"wqkv": 6}, "alpha_pattern": {"wqkv": 5}},
        {"r": 2, "rank_pattern": {"wqkv": 6}, "alpha_pattern": {"wqkv": 48}},  # the patterns of three in one
    ],
    ids=str,
)
def test_an_adapter_that_others_trained_on_wqkv_is_understood(tmp_path, more):
    """As peft writes it for the published code: one A for all of wqkv."""
    from safetensors.torch import save_file

    base, adapter = write_internlm(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 16, "target_modules": ["wqkv", "w2"], "task_type": "CAUSAL_LM"}
    config |= more
    tensors = {}
    for i in range(2):
        for name, outs, ins, rank in (("attention.wqkv", 96, 64, 6), ("feed_forward.w2", 64, 96, config["r"])):
            at = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(rank, ins) / 16
            tensors[f"{at}.lora_B.weight"] = torch.randn(outs, rank) / 16
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    want = wanted(base, lora=lora_of(adapter)[1])
    assert (logits(with_adapter(load(base), adapter).eval()) - want).abs().max() < 1e-5
    out = merge(adapter, tmp_path / "merged", model=str(base), say=lambda line: None)
    assert (wanted(out) - want).abs().max() < 1e-5
    spec = AdapterSpec(r=config["r"], alpha=16, dropout=0.0, targets=("wqkv", "w2"), start=str(adapter))
    if more:  # a shape that no recipe can say
        with pytest.raises(ModelError, match="adapter.start"):
            attach_adapter(load(base), spec, seed=0)
    else:
        assert (logits(attach_adapter(load(base), spec, seed=0).eval()) - want).abs().max() < 1e-5


def test_a_pattern_of_scales_that_is_no_name_is_not_merged(tmp_path):
    base = write_internlm(tmp_path / "base")
    adapter = export_trained(adapted(load(base)), tmp_path / "adapter", facts(base))
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"alpha_pattern": {"(w.*)+": 1}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="alpha_pattern is set"):
        merge(adapter, tmp_path / "merged", model=str(base), say=lambda line: None)


@pytest.mark.parametrize("spec", [{"modules_to_save": ("q_proj",)}, {"targets": ("q_proj", "v_proj"), "dora": True}])
def test_a_part_of_wqkv_cannot_be_written_whole(tmp_path, spec):
    spec = {"targets": ("o_proj",), **spec}
    with pytest.raises(ModelError, match="q_proj, k_proj and v_proj are one matrix, wqkv"):
        adapted(load(write_internlm(tmp_path / "m")), **spec)
    adapted(load(write_internlm(tmp_path / "first", "internlm")), **spec)


def test_the_readme_of_an_adapter_says_what_plain_programs_need(tmp_path, monkeypatch):
    base = write_internlm(tmp_path / "base")
    adapter = export_trained(adapted(load(base)), tmp_path / "adapter", facts(base))
    code = (adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert 'base = AutoModelForCausalLM.from_pretrained("base", dtype="auto", trust_remote_code=True)' in code
    model = ("base", "model", "answer", "print")  # the published code doesn't run here
    scope: dict = {}
    monkeypatch.chdir(adapter)
    exec("\n".join(line for line in code.splitlines() if not line.startswith(model)), scope)
    assert scope["tokenizer"].is_fast and scope["inputs"]["input_ids"].shape[1] > 2


# ------------------------------------------------------------------------------------------------------- writing back


@each_folder
@pytest.mark.parametrize("shards", [1, 3])
def test_an_untouched_model_is_written_back_bit_for_bit(tmp_path, kind, changes, shards):
    base = write_internlm(tmp_path / "base", kind, dtype="float16", shards=shards, **changes)
    model = attach_adapter(load(base), None, seed=0)
    if shards == 1:
        out = export_trained(model, tmp_path / "out", facts(base))
    else:  # as from a checkpoint
        out = export(
            tmp_path / "out", layout_of(model, "base"), dict(model.named_parameters()).__getitem__, facts(base)
        )
    for path in (*weight_files(base), base / "config.json", *base.glob("*.index.json"), *base.glob("*.py")):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_trained_model_is_written_in_its_own_layout(tmp_path, kind):
    base = write_internlm(tmp_path / "base", kind)
    model = attach_adapter(load(base), None, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    out = export_trained(model.eval(), tmp_path / "out", facts(base))
    assert stored(out).keys() == stored(base).keys()
    assert (wanted(out) - logits(model)).abs().max() < 1e-5 and (wanted(out) - wanted(base)).abs().max() > 0.1
    assert (logits(load(out)) - logits(model)).abs().max() < 1e-6


def test_every_parameter_of_a_full_fine_tuning_is_trained(tmp_path):
    """The published config's pad_token_id would keep that token's embedding, the end of an answer, from training."""
    model = attach_adapter(load(write_internlm(tmp_path / "m")), None, seed=0)
    model(input_ids=torch.tensor([[2, 5, 2]])).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad[2].abs().max() > 0
