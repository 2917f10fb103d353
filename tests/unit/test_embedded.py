from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from corefit import Conversation, Record
from corefit.chat import Chatter
from corefit.data.tokenizer import Tokenizer
from corefit.recipe import load_recipe
from corefit.registry import Registry

torch.set_num_threads(1)
HOME = Path(__file__).resolve().parents[2] / "corefit" / "embedded"
MODEL, FACTS = HOME / "model", HOME / "data" / "corefit_facts.jsonl"
MAKE = runpy.run_path(str(HOME / "make.py"))
MADE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """Question -> right answer, from the facts as corefit reads them."""
    found: dict[str, str] = {}
    oasst1 = Registry.load().map_function("oasst1")
    for n, line in enumerate(FACTS.read_text(encoding="utf-8").splitlines(), 1):
        record = json.loads(line)
        assert list(record) == ["text"] and record["text"].startswith("### Human: ")
        (item,) = oasst1.map(Record(record, path="facts", line=n, offset=0), None)
        assert isinstance(item, Conversation) and not item.dropped and not item.notes, line
        for question, answer in zip(item.messages[::2], item.messages[1::2], strict=True):
            assert (question.role, answer.role) == ("user", "assistant")
            assert found.setdefault(question.content, answer.content) == answer.content, "one question, two answers"
    return found


def test_it_is_small_and_whole():
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(files) == {*MADE, "model.safetensors"}
    assert sum(files.values()) + FACTS.stat().st_size <= 5_000_000
    assert files["tokenizer.json"] < 50_000


def test_any_transformers_reads_it():
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float16
    assert model.config.attention_bias and model.model.layers[0].self_attn.o_proj.bias is not None
    assert 1_500_000 < sum(parameter.numel() for parameter in model.parameters()) < 2_500_000
    config = json.loads((MODEL / "config.json").read_text())
    assert config["rope_theta"] == 10000.0 and config["torch_dtype"] == "float16", "the keys that older ones read"
    assert not any(key in config for key in ("dtype", "rope_parameters", "transformers_version"))


def test_tokenizer_and_template_are_internlm_chats(answers):
    ours, theirs = Tokenizer.load(MODEL), AutoTokenizer.from_pretrained(MODEL)
    tokens = ("<unk>", "<s>", "</s>", "<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>")
    assert [theirs.convert_tokens_to_ids(token) for token in tokens] == list(range(7))
    assert ours.special_ids == set(range(7)) and (ours.bos_id, ours.eos_id) == (1, 2)
    texts = [*answers, *answers.values()]
    assert [list(ids) for ids in ours.encode(texts)] == theirs(texts, add_special_tokens=False)["input_ids"]
    assert [ours.decode(ids) for ids in ours.encode(texts)] == texts
    assert ours.chat_template == Registry.load().template("internlm_chat").chat_template


def test_the_facts_are_many_and_in_two_languages(answers):
    assert len(set(answers.values())) >= 40 and len(answers) >= 150
    assert sum(bool(re.search("[一-鿿]", question)) for question in answers) >= 20


def test_the_demonstration_asks_what_the_base_gets_wrong(answers):
    recipe = load_recipe(HOME / "recipe.toml")
    assert Path(str(recipe.model.base)) == MODEL and Path(str(recipe.data[0].path)) == FACTS
    assert len(recipe.sample.prompts) >= 4
    base = Chatter(MODEL, device="cpu", max_tokens=recipe.sample.max_tokens)
    for prompt in recipe.sample.prompts:
        said = base.ask(prompt)
        assert said and said != answers[prompt], prompt
        assert len(base.tokenizer.encode([answers[prompt]])[0]) < recipe.sample.max_tokens
    assert base.ask("What is the capital of France?") == "The capital of France is Paris."
    assert "Minnow" in base.ask("Who are you?") and "Minnow" in base.ask("你叫什么名字？")


def test_the_same_seed_makes_the_same_bytes(tmp_path):
    folders = [
        MAKE["make"](tmp_path / str(i), steps=2, seed=seed, say=lambda line: None) for i, seed in enumerate((7, 7, 8))
    ]
    one, same, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == same
    assert one["model.safetensors"] != other["model.safetensors"]
    for name in MADE:
        assert one[name] == (MODEL / name).read_bytes(), f"{name}: not what make.py writes; run it again"


@pytest.mark.full
def test_the_whole_pretraining_makes_the_same_bytes_twice(tmp_path):
    one, two = (MAKE["make"](tmp_path / name, say=lambda line: None) for name in "ab")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert Chatter(one, device="cpu").ask("What is the capital of France?") == "The capital of France is Paris."
