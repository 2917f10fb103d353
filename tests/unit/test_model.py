from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny import write_model, write_tokenizer
from tiny_families import FAMILIES, write_family

from corefit.engine import fused
from corefit.engine import model as model_module
from corefit.engine.adapter import (
    AdapterSpec,
    attach_adapter,
    check_trainable,
    count_parameters,
    decoder_targets,
    trainable_parameters,
)
from corefit.engine.model import (
    base_dtype_of,
    causal_lm,
    choose_device,
    choose_precision,
    enable_gradient_checkpointing,
    load_base,
    model_fingerprint,
    prepare_process,
    quiet,
    resolve_base,
)
from corefit.errors import ModelError, PluginError, UserError
from corefit.registry import Registry
from corefit.types import Quantizer

torch.set_num_threads(1)
ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
SPEC = AdapterSpec(r=4, alpha=8, dropout=0.0)


def nf4(compute_dtype):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, compute_dtype))


NONE = Quantizer(name="none", summary="", config=lambda compute_dtype: None)
NF4 = Quantizer(name="nf4", summary="", config=nf4)


def load(folder, quantizer=NONE, compute_dtype="float32", **more):
    return load_base(str(folder), quantizer=quantizer, compute_dtype=compute_dtype, device="cpu", **more)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def refused(folder, match, **more):
    with pytest.raises(ModelError, match=match) as caught:
        load(folder, **more)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(folder)), text
    return text


# ------------------------------------------------------------------------------------------------------------ loading


def test_a_loaded_base_is_frozen_with_sdpa_and_without_a_cache(tiny_model):
    model = load(tiny_model)
    assert model.config._attn_implementation == "sdpa" and model.config.use_cache is False
    assert not model.training and not trainable_parameters(model)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("compute", ["float32", "float16", "bfloat16"])
def test_frozen_weights_are_held_in_the_compute_dtype_and_norms_in_fp32(tmp_path, stored, compute):
    folder = write_model(tmp_path, dtype=stored)
    assert base_dtype_of(str(folder)) == stored
    model = attach_adapter(load(folder, compute_dtype=compute), SPEC, seed=0)
    for name, parameter in model.named_parameters():
        fp32 = "norm" in name or "lora" in name
        assert parameter.dtype == (torch.float32 if fp32 else getattr(torch, compute)), name


def test_the_stored_dtype_is_read_from_the_weights_not_from_the_config(tmp_path):
    folder = edit_config(write_model(tmp_path, dtype="float16"), dtype="bfloat16", torch_dtype="bfloat16")
    assert base_dtype_of(str(folder)) == "float16"


def test_full_fine_tuning_trains_everything_in_fp32_as_stored(tmp_path):
    folder = write_model(tmp_path)
    model = attach_adapter(load(folder, compute_dtype="bfloat16", weights_dtype="float32"), None, seed=0)
    assert len(trainable_parameters(model)) == len(list(model.parameters()))
    stored = load(folder).state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    counted = count_parameters(model)
    assert counted.trainable == counted.total
    assert check_trainable(attach_adapter(load(folder, compute_dtype="bfloat16"), None, seed=0))


@pytest.mark.parametrize("tokens", [None, (2, 5)])
def test_the_padding_token_trains_as_every_other(tokens, tmp_path):
    folder = write_model(tmp_path, pad_token_id=2)  # </s>, as LLaMA's folders often say
    model = load(folder, weights_dtype="float32")
    assert model.get_input_embeddings().padding_idx == 2
    spec = AdapterSpec(r=2, alpha=4, dropout=0.0, tokens=tokens) if tokens else None
    model = attach_adapter(model, spec, seed=0)
    model(input_ids=torch.tensor([[1, 2, 5]])).logits.sum().backward()
    name = "embed_tokens.token_adapter.trainable_tokens_delta" if tokens else "embed_tokens.weight"
    (grad,) = [p.grad for n, p in model.named_parameters() if name in n]
    assert (grad[0 if tokens else 2] != 0).any()


@pytest.mark.parametrize("own", [True, False])
def test_4_bit_layers_are_protected_from_repacking_and_counted_whole(own, tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # as on a CPU where they would be
    folder = write_model(tmp_path)
    seen = []
    quantizer = Quantizer(name="nf4", summary="", config=nf4, after_load=seen.append)
    model = load(folder, Registry.load().quantizer("nf4") if own else quantizer, "bfloat16")
    assert seen == ([] if own else [model])
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == 14 and not any(m.support_avx512bf16_for_cpu for m in layers)
    assert count_parameters(model).total == count_parameters(load(folder)).total
    with pytest.raises(ModelError, match="full fine-tuning"):
        attach_adapter(model, None, seed=0)
    for whole, name in (("q_proj", "self_attn.q_proj"), ("mlp", "mlp")):
        words = (
            f"adapter.modules_to_save: model.layers.0.{name} is stored quantised, and such weights can't train; --qu"
        )
        with pytest.raises(ModelError, match=re.escape(words)):
            attach_adapter(model, AdapterSpec(r=2, alpha=4, dropout=0.0, modules_to_save=(whole,)), seed=0)


@pytest.mark.parametrize("hook", ["config", "after_load"])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (SystemExit("a\nb"), PluginError, "quantizer 'sad' failed with SystemExit: a b"),
        (KeyError("x"), PluginError, "quantizer 'sad' failed with KeyError: 'x'"),
        (ImportError("no hqq"), ModelError, "quantizer 'sad': no hqq"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_a_quantizer_that_fails_is_named(hook, error, kind, words, tmp_path):
    def sad(_):
        raise error

    hooks = {"config": lambda dtype: None, hook: sad}
    with pytest.raises(kind) as raised:
        load(write_model(tmp_path), Quantizer(name="sad", summary="", **hooks), "float32")
    assert str(raised.value) == words


def test_a_class_without_sdpa_gets_eager_attention_and_says_so(tiny_model, monkeypatch):
    from transformers import LlamaForCausalLM

    for owner in LlamaForCausalLM.__mro__:
        if "_supports_sdpa" in vars(owner):
            monkeypatch.setattr(owner, "_supports_sdpa", False)
    lines = []
    assert load(tiny_model, say=lines.append).config._attn_implementation == "eager"
    assert len(lines) == 1 and "eager" in lines[0]


def test_nothing_is_printed_by_others_while_loading_and_training(tiny_model):
    code = f"""
import torch
torch.set_num_threads(1)
from corefit.engine.model import *
from corefit.engine.adapter import *
from corefit.engine.loss import CausalLoss
from corefit.types import Quantizer
def config(compute_dtype):
    from transformers import BitsAndBytesConfig
    return BitsAndBytesConfig(load_in_8bit=True)
model = load_base({str(tiny_model)!r}, quantizer=Quantizer(name="int8", summary="", config=config),
                  compute_dtype="bfloat16", device="cpu", say=str)
model = attach_adapter(model, AdapterSpec(4, 8, 0.1), seed=0)
enable_gradient_checkpointing(model)
ids = torch.arange(16)[None]
with torch.autocast("cpu", dtype=torch.bfloat16):
    CausalLoss(model)(ids, ids, ids).backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bitsandbytes_is_imported_without_the_hub(tmp_path):
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')\n")
    code = (
        "import sys; from corefit.engine import model\n"
        "import torch; compiler = torch.compile\n"
        "assert model.import_bitsandbytes() and 'kernels' not in sys.modules\n"
        "assert torch.compile is compiler and 'torch._inductor.compile_fx' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr


def test_quiet_and_threads():
    quiet()
    assert logging.getLogger("bitsandbytes").level == logging.ERROR
    prepare_process(1)
    assert torch.get_num_threads() == 1


# ------------------------------------------------------------------------------------------------ what can't be loaded


def test_a_missing_folder_names_the_nearest_one(tmp_path):
    write_model(tmp_path / "internlm-tiny")
    assert "internlm-tiny?" in refused(tmp_path / "internlm-tniy", "no such folder")


THREE_WAYS = ("local model folder", "HF_ENDPOINT=https://MIRROR", "hf download some-owner/some-model --local-dir ")


def test_a_hub_name_without_network_says_the_ways_out():
    with pytest.raises(ModelError, match="no such folder here.*local model folder") as caught:
        load("some-owner/some-model")
    assert "\n" not in str(caught.value)
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
    for way in THREE_WAYS:
        assert way in str(caught.value)
    with pytest.raises(ModelError, match="neither a folder"):
        resolve_base("not a name!")


def test_a_hub_that_does_not_answer_is_one_line(tmp_path):
    code = "from corefit.engine.model import base_dtype_of\nbase_dtype_of('some-owner/some-model')"
    env = {**os.environ, "HF_ENDPOINT": "http://me:pw@127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "corefit.errors.ModelError: some-owner/some-model: no such folder here, and not to be had"
    ), last
    assert "(127.0.0.1: " in last and "pw" not in last
    for way in THREE_WAYS:
        assert way in last


def test_files_that_are_not_a_model(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    refused(file, "a file, not a model folder")
    refused(tmp_path, "no config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "an adapter, not a base model")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json can't be read")


def test_pickled_weights_are_refused_unopened(tmp_path):
    folder = write_model(tmp_path)
    (folder / "model.safetensors").unlink()
    refused(folder, r"no \*.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    line = f"corefit safetensors {folder} --out {folder}-safetensors"
    assert refused(folder, "pickle").endswith(line), "the exact line that converts it"
    assert refused(folder / "pytorch_model.bin", "pickle").endswith(f"{folder}/pytorch_model.bin-safetensors")
    with pytest.raises(ModelError, match="pickle"):
        base_dtype_of(str(folder))


def test_a_copy_of_the_hub_without_safetensors_says_what_to_run(tmp_path):
    folder = write_model(tmp_path / "models--internlm--internlm-chat-7b" / "snapshots" / "0123")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        load(folder)
    name = "internlm/internlm-chat-7b"
    for command in (f"hf download {name} --local-dir {name}; ", f"corefit safetensors {name} --out {name}-safetensors"):
        assert command in str(caught.value)


def test_an_adapter_beside_the_model_is_refused_for_transformers_would_load_the_base_it_names(tmp_path):
    folder, other = write_model(tmp_path / "model"), write_model(tmp_path / "other", seed=1)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(other)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(folder, "holds an adapter beside the model")


PROMPTS = """
import json, sys
from pathlib import Path
from corefit.engine.model import load_base
from corefit.errors import ModelError, PluginError
from corefit.registry import Registry
from huggingface_hub import constants
assert constants.HF_HUB_DISABLE_TELEMETRY
folder, quantizer = Path(sys.argv[1]), Registry.load().quantizer("none")
config = json.loads((folder / "config.json").read_text())
for kind in ("llama", "llama_with_code", "other_repository"):
    where = "owner/other--mine" if kind == "other_repository" else "mine"
    code = {"AutoConfig": f"{where}.MineConfig", "AutoModelForCausalLM": f"{where}.Mine"}
    changed = config | {"model_type": "llama" if kind == "llama" else "mine", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(changed))
    for trust in (False, True):
        lines = []
        try:
            model = load_base(str(folder), quantizer=quantizer, compute_dtype="float32", device="cpu",
                              trust_remote_code=trust, say=lines.append)
            print(kind, trust, type(model).__name__, *lines, sep="|", flush=True)
        except ModelError as error:
            print(kind, trust, "refused", error, sep="|", flush=True)
"""


def test_code_that_a_config_names_never_makes_a_prompt_and_runs_only_where_it_is_trusted(tmp_path):
    pty = pytest.importorskip("pty")
    folder = write_model(tmp_path / "model")
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    (folder / "mine.py").write_text(code)
    environ = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    ours, theirs = pty.openpty()  # somebody sits there and says nothing: a prompt would wait for ever
    done = subprocess.run(
        [sys.executable, "-c", PROMPTS, folder],
        env={**environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=120,
    )
    os.close(ours), os.close(theirs)
    assert done.returncode == 0, done.stderr
    sha256 = hashlib.sha256(code.encode()).hexdigest()
    said = f"model.trust_remote_code: runs Python code from {folder}: mine.py (sha256 {sha256[:16]})"
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert [row[:3] for row in rows] == [
        ["llama", "False", "LlamaForCausalLM"],
        ["llama", "True", "Mine"],
        ["llama_with_code", "False", "refused"],
        ["llama_with_code", "True", "Mine"],
        ["other_repository", "False", "refused"],
        ["other_repository", "True", "refused"],
    ]
    assert rows[0][3:] == [] and rows[1][3:] == [said] and rows[3][3:] == [said]
    assert "own Python code" in rows[2][3] and "owner/other--mine" in rows[5][3]
    assert model_module.remote_code(folder) == {"mine.py": sha256}
    assert "trust" not in done.stderr, done.stderr


def test_remote_code_is_refused_without_a_prompt(tmp_path, monkeypatch):
    folder = edit_config(
        write_model(tmp_path), model_type="internlm9", auto_map={"AutoModelForCausalLM": "modeling.InternLM"}
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    assert "model.trust_remote_code=true" in refused(folder, "own Python code")
    edit_config(folder, auto_map=None, model_type="lama")
    folder_config = json.loads((folder / "config.json").read_text())
    del folder_config["auto_map"]
    (folder / "config.json").write_text(json.dumps(folder_config))
    assert "'llama'" in refused(folder, "no model type 'lama'")


def test_remote_code_runs_where_it_is_trusted_and_only_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = edit_config(
        write_model(tmp_path / "remote"),
        model_type="mine",
        architectures=["Mine"],
        auto_map={"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"},
    )
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    refused(folder, "own Python code")
    assert type(load(folder, trust_remote_code=True)).__name__ == "Mine"


def test_missing_and_broken_weights_are_errors_not_random_numbers(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    lines = []
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.extra": torch.zeros(1)}, path, {"format": "pt"})
    load(folder, say=lines.append)
    assert len(lines) == 1 and "rotary_emb.extra" in lines[0]
    gone = tensors.pop("model.norm.weight")
    save_file(tensors, path, {"format": "pt"})
    refused(folder, "1 weights .*model.norm.weight")
    save_file({**tensors, "model.norm.weight": gone[:5].clone()}, path, {"format": "pt"})
    refused(folder, "can't be loaded")
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "broken weights|can't be loaded")
    path.write_bytes(b"version https://git-lfs")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        base_dtype_of(str(folder))


@pytest.mark.parametrize("quantizer", [NONE, NF4], ids=["none", "nf4"])
def test_on_the_cpu_is_on_the_cpu_though_there_is_a_gpu(tiny_model, quantizer, monkeypatch):
    import bitsandbytes  # noqa: F401, which would look for its CUDA library

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    model = load_base(tiny_model, quantizer=quantizer, compute_dtype="float32", device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_base_that_is_quantised_already_is_not_quantised_again(tmp_path):
    folder = edit_config(write_model(tmp_path), quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, "quantised already", quantizer=NF4)


@pytest.mark.parametrize(("kind", "name"), [("llama", "nf4"), ("qwen3_moe", "nf4"), ("internlm2", "int8")])
def test_what_a_quantizer_will_store_is_said_before_loading_and_is_so(tmp_path, monkeypatch, kind, name):
    family = next(family for family in FAMILIES if family.kind == kind)
    folder, said = write_family(tmp_path / "base", family), []
    how = dict(quantizer=Registry.load().quantizer(name), compute_dtype="bfloat16", device="cpu", say=said.append)
    loaded = load_base(str(folder), **how)
    stored = sum(
        math.prod(getattr(parameter, "quant_state", parameter).shape)
        for parameter in loaded.parameters()
        if not parameter.is_floating_point()
    )
    total = count_parameters(loaded).total
    (line,) = said
    words = (
        f"{name} stores {stored / 1e6:,.1f}M of {total / 1e6:,.1f}M weights ({stored / total:.0%}), the others are bf"
    )
    assert words in line and ("fused experts" in line) == (kind == "qwen3_moe") and 0 < stored < total

    said.clear()
    monkeypatch.setattr("transformers.PreTrainedModel._load_pretrained_model", None)
    with pytest.raises(ModelError, match="can't be loaded"):
        load_base(str(folder), **how)
    assert said == [line]


def test_a_mixture_of_experts_that_a_gpu_cannot_hold_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    sizes = dict(num_hidden_layers=48, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128)
    experts = dict(num_experts=128, moe_intermediate_size=768, tie_word_embeddings=False, vocab_size=151936)
    write_tokenizer(tmp_path)
    config = {"model_type": "qwen3_moe", **sizes, **experts}  # of Qwen3-30B-A3B
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=24 * 2**30))
    nf4 = Registry.load().quantizer("nf4")
    with pytest.raises(ModelError) as caught:
        load_base(str(tmp_path), quantizer=nf4, compute_dtype="bfloat16", device="cuda")
    attention, inside = 48 * 2048 * 128 * 2 * (32 + 4), 48 * 128 * 3 * 2048 * 768
    assert f"nf4 stores {attention / 1e6:,.1f}M of " in str(caught.value)
    assert f"{inside / 1e6:,.1f}M are fused experts" in str(caught.value)
    gigabytes = float(re.search(r"bfloat16: ([\d.]+) GiB", str(caught.value))[1])
    rest = inside + 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048 + 2 * 151936 * 2048
    assert gigabytes == pytest.approx((rest * 2 + attention * 4.127 / 8) / 2**30, rel=1e-4)
    assert "cuda has 24.0 GiB" in str(caught.value)


def test_fingerprints_follow_values_and_architecture_not_the_place(tmp_path):
    folder = write_model(tmp_path / "a")
    first = model_fingerprint(str(folder))
    shutil.copytree(folder, tmp_path / "b")
    assert len(first) == 64 and model_fingerprint(str(tmp_path / "b")) == first
    assert model_fingerprint(str(write_model(tmp_path / "c", seed=1))) != first
    assert model_fingerprint(str(edit_config(tmp_path / "b", rope_theta=5e5))) != first


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("quantizer", [NONE, NF4], ids=["none", "nf4"])
def test_lora_goes_on_all_linear_layers_of_the_decoder(tiny_model, quantizer):
    model = load(tiny_model, quantizer)
    assert decoder_targets(model) == ALL
    model = attach_adapter(model, SPEC, seed=0)
    config = model.peft_config["default"]
    assert config.target_modules == ALL and config.bias == "none" and config.task_type == "CAUSAL_LM"
    trainable = trainable_parameters(model)
    assert len(trainable) == 2 * 7 * 2 and all("lora_" in name for name in trainable)
    assert all(parameter.dtype == torch.float32 for parameter in trainable.values())
    assert model.training


def test_the_head_is_no_target_where_the_decoder_is_the_whole_model(tiny_model, monkeypatch):
    model = load(tiny_model)
    monkeypatch.setattr(model, "get_decoder", lambda: model)
    assert decoder_targets(model) == ALL


def test_targets_stand_for_the_decoder_alone_also_where_names_repeat(tiny_model):
    model = load(tiny_model)
    model.model.layers[0].extra = torch.nn.Sequential(torch.nn.Linear(4, 4))  # named by an index
    model.projector = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(4, 4)})  # a twin outside the decoder
    targets = decoder_targets(model)
    assert "extra.0" in targets and "mlp.up_proj" in targets and "up_proj" not in targets and "lm_head" not in targets


def test_the_seed_alone_decides_the_initial_adapter(tiny_model):
    def made(seed, noise):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        tensors = trainable_parameters(attach_adapter(load(tiny_model), SPEC, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    first, same, other = made(3, 0), made(3, 1), made(4, 0)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_named_targets_and_modules_to_save(tiny_model):
    spec = AdapterSpec(r=2, alpha=4, dropout=0.0, targets=("v_proj", "self_attn.q_proj"), modules_to_save=("lm_head",))
    model = attach_adapter(load(tiny_model, compute_dtype="bfloat16"), spec, seed=0)
    assert model.peft_config["default"].target_modules == ["self_attn.q_proj", "v_proj"]
    trainable = trainable_parameters(model)
    assert len(trainable) == 2 * 2 * 2 + 1 and any("lm_head" in name for name in trainable)
    assert all(parameter.dtype == torch.float32 for parameter in trainable.values())


def test_unknown_targets_name_the_nearest(tiny_model):
    with pytest.raises(ModelError, match=r"adapter.targets: no layer 'q_porj'; did you mean 'q_proj'\?"):
        attach_adapter(load(tiny_model), AdapterSpec(4, 8, 0.0, targets=("q_porj",)), seed=0)
    with pytest.raises(ModelError, match=r"adapter.modules_to_save: no layer 'lm_haed'; did you mean 'lm_head'\?"):
        attach_adapter(load(tiny_model), AdapterSpec(4, 8, 0.0, modules_to_save=("lm_haed",)), seed=0)


@pytest.mark.parametrize("spec", [{}, {"rslora": True}, {"dora": True}, {"modules_to_save": ("lm_head",)}])
def test_training_goes_on_from_an_adapter_with_its_shape_and_the_new_dropout(tiny_model, tmp_path, spec):
    from tiny_export import adapted, facts

    from corefit.engine.export import export_trained

    first = adapted(tiny_model, r=3, alpha=12, **spec)
    folder = export_trained(first, tmp_path / "adapter", facts(tiny_model))
    model = load(tiny_model)
    going_on = attach_adapter(model, AdapterSpec(r=3, alpha=12, dropout=0.25, start=str(folder), **spec), seed=5)
    old, new = (dict(m.named_parameters()) for m in (first, going_on))
    assert old.keys() == new.keys()
    trained = [name for name, parameter in new.items() if parameter.requires_grad]
    assert any("lora_B" in name for name in trained)
    for name in trained:
        assert torch.equal(old[name], new[name]), name
    config = going_on.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.inference_mode) == (3, 12, 0.25, False)
    assert (config.use_dora, config.use_rslora) == ("dora" in spec, "rslora" in spec)


def test_an_adapter_of_another_base_or_pickled_is_no_start(tiny_model, tmp_path):
    from tiny_export import adapted, facts

    from corefit.engine.export import export_trained

    folder = export_trained(adapted(tiny_model), tmp_path / "adapter", facts(tiny_model))
    start = AdapterSpec(r=4, alpha=8, dropout=0.0, start=str(folder))
    other = write_model(tmp_path / "other", hidden_size=96)
    with pytest.raises(
        ModelError, match=r"adapter.start: .* has \(64, 4\) for .*lora_B.weight, the model trains \(96, 4\)"
    ):
        attach_adapter(load(other), start, seed=1)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        attach_adapter(load(tiny_model), start, seed=1)


def test_the_adapter_needs_no_network(tiny_model, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    attach_adapter(load(tiny_model), SPEC, seed=0)


@pytest.mark.parametrize("old_names", [False, True])
def test_gradient_checkpointing_recomputes_and_changes_nothing(tiny_model, monkeypatch, old_names):
    def gradients(checkpointing):
        model = attach_adapter(load(tiny_model), SPEC, seed=0)
        calls = []
        causal_lm(model).model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        if checkpointing:
            enable_gradient_checkpointing(model)
            assert causal_lm(model).model.layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": False}
        ids = torch.arange(12)[None]
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        return len(calls), {name: p.grad for name, p in trainable_parameters(model).items()}

    calls, expected = gradients(checkpointing=False)
    if old_names:
        from transformers import PreTrainedModel

        if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):
            pytest.skip("this transformers has the old names anyway")
        enable = PreTrainedModel._activation_checkpointing_enable
        monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable")
        monkeypatch.setattr(
            PreTrainedModel,
            "gradient_checkpointing_enable",
            lambda self, gradient_checkpointing_kwargs=None: enable(self, gradient_checkpointing_kwargs),
        )
    again, found = gradients(checkpointing=True)
    assert (calls, again) == (1, 2)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize(
    ("share", "recomputed"), [(1.0, "1111111"), (0.5, "0101010"), (0.3, "0001001"), (0.9, "0111111")]
)
def test_a_share_of_the_layers_is_checkpointed(tmp_path, share, recomputed):
    model = load(write_model(tmp_path, num_hidden_layers=7))
    enable_gradient_checkpointing(model, share)
    model.train()
    calls = [0] * 7
    for i, layer in enumerate(causal_lm(model).model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    model(input_ids=torch.arange(12)[None], use_cache=False).logits.logsumexp(-1).sum().backward()
    assert "".join(str(n - 1) for n in calls) == recomputed


def test_a_class_without_gradient_checkpointing_says_what_to_set(tiny_model, monkeypatch):
    model = load(tiny_model)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match="train.gradient_checkpointing=false"):
        enable_gradient_checkpointing(model)


# ------------------------------------------------------------------------------------------------- device and precision


@pytest.mark.parametrize(
    ("wanted", "device", "base", "native", "name"),
    [
        ("auto", "cuda", "float16", True, "fp16"),
        ("auto", "cuda", "bfloat16", True, "bf16"),
        ("auto", "cuda", "float32", True, "bf16"),
        ("auto", "cuda:1", "bfloat16", False, "fp16"),
        ("auto", "cpu", "float16", True, "bf16"),
        ("auto", "cpu", "float16", False, "fp32"),
        ("fp16", "cpu", "float32", True, "fp16"),
        ("bf16", "cpu", "float32", False, "bf16"),
        ("bf16", "cuda", "float32", False, "bf16"),
        ("fp32", "cuda", "float16", True, "fp32"),
    ],
)
def test_precision(monkeypatch, wanted, device, base, native, name):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    for module in (model_module, fused):
        monkeypatch.setattr(module, "cpu_has_bf16", lambda: native)
    chosen = choose_precision(wanted, device=device, base_dtype=base)
    assert chosen.name == name and chosen.use_scaler == (name == "fp16")
    assert chosen.compute_dtype == {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
    assert chosen.reason and "\n" not in chosen.reason
    assert ("multiply in fp32" in chosen.reason) == (device == "cpu" and wanted in ("fp16", "bf16"))
    assert ("will be slow" in chosen.reason) == ((wanted, device) == ("bf16", "cuda"))


def test_unknown_devices_name_the_nearest():
    for wanted in ("cudo", "cuda:x", "mps"):
        with pytest.raises(UserError, match=f"no device '{wanted}'.*known: auto"):
            choose_device(wanted)


def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(model_module, "_gpu_is_there", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choose_device("auto") == "cpu"
    with pytest.raises(UserError, match="'cuda' was asked for"):
        choose_device("cuda")


@pytest.mark.parametrize(("build", "words"), [(None, "CPU build"), ("13.0", "update the driver")])
def test_a_gpu_that_torch_can_not_use_is_never_a_silent_cpu_run(monkeypatch, build, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(model_module, "_gpu_is_there", lambda: True)
    with pytest.raises(UserError, match=f"{words}.*run.device=cpu") as caught:
        choose_device("auto")
    assert "\n" not in str(caught.value)
    assert choose_device("cpu") == "cpu"


def test_a_build_without_code_for_the_gpu_names_its_capability(monkeypatch):
    def no_kernel(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (3, 7))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(UserError, match=r"capability 3\.7.*sm_80 sm_90.*no kernel image.*run.device=cpu") as caught:
        choose_device("auto")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="torch sees 1 GPU"):
        choose_device("cuda:1")
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "ones", lambda n, device: torch.full((n,), 1.0))
    assert choose_device("auto") == "cuda" and not current
    assert choose_device("cuda:0") == "cuda:0" and current == [0]


def test_a_gpu_is_seen_by_its_device_file_or_by_nvidia_smi_unless_hidden(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path("/dev/nvidiactl"), Path("/dev/nvidia0")]))
    assert model_module._gpu_is_there()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not model_module._gpu_is_there()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path("/dev/nvidiactl")]))
    for output, code, there in ((b"GPU 0: Tesla K80", 0, True), (b"No devices were found", 6, False)):
        done = subprocess.CompletedProcess([], code, stdout=output)
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        assert model_module._gpu_is_there() is there

    def no_program(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", no_program)
    assert not model_module._gpu_is_there()


def test_the_cpu_is_asked_by_names_that_may_be_missing(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert fused.cpu_has_bf16()
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not fused.cpu_has_bf16()


@pytest.mark.parametrize("dora", [None, False, True])
def test_a_norm_without_weights_is_no_layer_that_dora_takes_apart(dora):
    from corefit.engine import adapter

    layers = torch.nn.RMSNorm(4, elementwise_affine=False), torch.nn.Linear(4, 4)
    adapter._check_dora(torch.nn.Sequential(*layers), dora)
