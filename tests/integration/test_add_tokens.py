"""Tokens that a base's vocabulary lacks: added, trained, saved, merged, gone on with; other rows stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_model
from tiny_internlm import write_internlm
from torch.utils._python_dispatch import TorchDispatchMode

import corefit
from corefit.chat import find
from corefit.data.encode import make_encoder, written
from corefit.data.tokenizer import Tokenizer
from corefit.engine.adapter import AdapterSpec, add_rows, attach_adapter, with_adapter
from corefit.engine.loss import CausalLoss
from corefit.engine.model import load_base
from corefit.errors import ModelError, RecipeError
from corefit.merge import load, logits, merge
from corefit.prepare import EMBEDDED
from corefit.registry import Registry
from corefit.score import evaluate
from corefit.types import Conversation, Message

TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SETS = [
    *("pack.max_length=128", "train.packs_per_step=2", "train.max_steps=4", "sample.max_tokens=2", "adapter.r=4"),
    *(
        "pack.held=16",
        "train.lr=5e-3",
        "run.threads=1",
        "val.records=0",
        "train.precision=fp32",
        f"model.add_tokens={json.dumps(TOKENS)}",
    ),
]
ROWS = "".join(json.dumps({"text": f"### Human: What is {i}?### Assistant: It is {i}."}) + "\n" for i in range(60))


def make(folder: Path, kind: str) -> Path:
    """Write a model with as many rows as its tokenizer has tokens, or more."""
    if kind == "internlm2":
        return write_internlm(folder, "internlm2")
    size = Tokenizer.load(write_model(folder / "sized")).vocab_size
    rows = size + 20 if kind == "spare" else size
    return write_model(folder, vocab_size=rows, tie_word_embeddings=kind == "tied")


def trained(folder: Path, base: Path, *sets: str, quantizer: str = "none", rows: str = ROWS, **more: Any) -> Path:
    (folder / "rows.jsonl").write_text(rows, "utf-8")
    data = dict(data=str(folder / "rows.jsonl"), plugin="oasst1", template="llama3_chat")
    more = {"out": folder / "run", **more}
    return corefit.train(model=str(base), **data, quantizer=quantizer, sets=[*SETS, *sets], **more).path


def tables(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    names = ("embed_tokens.weight", "lm_head.weight", "tok_embeddings.weight", "output.weight")
    return [tensor for name, tensor in weights.items() if name.endswith(names)]


@pytest.mark.parametrize("kind", ["untied", "tied", "spare", "internlm2"])
def test_new_tokens_train_and_are_in_what_is_merged(kind: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base", kind)
    run = trained(tmp_path, base, quantizer="nf4" if kind == "untied" else "none")
    before, after = Tokenizer.load(base), Tokenizer.load(run / "adapter")
    ids = [after.token_id(token) for token in TOKENS]
    assert ids == list(range(before.vocab_size, before.vocab_size + 3))
    assert json.loads((run / "adapter" / "corefit.json").read_bytes())["add_tokens"] == TOKENS
    out = merge(run, tmp_path / "merged", measured=0)
    old, new = (tables(load_file(folder / "model.safetensors")) for folder in (base, out))
    assert len(old) == len(new) == (1 if kind == "tied" else 2)
    for was, now in zip(old, new, strict=True):
        assert len(now) == max(len(was), before.vocab_size + 3)
        mean = was[: before.vocab_size].mean(0)
        assert all((now[id] - mean).abs().max() > 1e-4 for id in ids), "a new row did not train"
        kept = [row for row in range(len(was)) if row not in ids]
        assert torch.equal(now[kept], was[kept])
    assert json.loads((out / "config.json").read_bytes())["vocab_size"] == len(new[0])
    if kind != "untied":  # merged into the stored weights, not those of nf4
        texts = [[*ids, 40, 50, 60, *ids]]
        for a, b in zip(logits(load(find(run)), texts), logits(load(find(out)), texts), strict=True):
            assert a.shape[-1] == b.shape[-1] == len(new[0])
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert isinstance(corefit.Run(run).chat("What is 5?", max_tokens=4), str)


def test_full_fine_tuning_writes_the_larger_vocabulary(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "tied")
    run = trained(tmp_path, base, "adapter.kind=none", "train.lr=1e-3")
    rows = Tokenizer.load(run / "model").vocab_size
    (table,) = tables(load_file(run / "model" / "model.safetensors"))
    assert len(table) == rows == json.loads((run / "model" / "config.json").read_bytes())["vocab_size"]
    assert isinstance(corefit.Run(run).chat("What is 5?", max_tokens=4), str)


def test_it_resumes_to_the_same_bits_and_another_run_goes_on_from_its_adapter(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "untied")
    straight = trained(tmp_path, base)
    half = trained(tmp_path, base, "train.max_steps=2", "train.scheduler=constant", out=tmp_path / "half")
    whole = trained(tmp_path, base, "train.scheduler=constant", out=tmp_path / "whole")
    again = trained(tmp_path, base, "train.scheduler=constant", out=half, resume=True)
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, again)]
    assert weights[0] == weights[1]
    sets = [s for s in SETS if not s.startswith("model.add_tokens")]
    more = corefit.train(
        model=str(base),
        data=str(tmp_path / "rows.jsonl"),
        plugin="oasst1",
        template="llama3_chat",
        quantizer="none",
        sets=[*sets, f"adapter.start={straight / 'adapter'}"],
        out=tmp_path / "more",
    )
    assert json.loads((more.path / "adapter" / "corefit.json").read_bytes())["add_tokens"] == TOKENS
    first, last = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (straight, more.path))
    assert first.keys() == last.keys()
    with pytest.raises(RecipeError, match="<new>' is none of those that .* has rows"):
        corefit.train(
            model=str(base),
            data=str(tmp_path / "rows.jsonl"),
            sets=[f"adapter.start={straight / 'adapter'}", "model.add_tokens=['<new>']"],
        )
    assert find(f"{half}@2", model=str(base)).tokenizer().token_id(TOKENS[0]) is not None


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_run_with_tokens_of_its_own_is_scored_as_what_it_merges_to(kind: str, tmp_path: Path) -> None:
    run = trained(tmp_path, make(tmp_path / "base", kind))
    merge(str(run), tmp_path / "whole")
    data = {"data": str(tmp_path / "rows.jsonl"), "plugin": "oasst1"}
    scores = []
    for target, template in ((run, {}), (tmp_path / "whole", {"template": "llama3_chat"})):
        scores += evaluate(str(target), {**data, **template}, ["run.device=cpu"], say=lambda line: None)
    assert scores[0].tuned != scores[0].base
    assert scores[0].tuned == pytest.approx(scores[1].tuned, rel=1e-3)


def test_a_token_that_is_added_twice_is_one_row(tmp_path: Path) -> None:
    run = trained(tmp_path, make(tmp_path / "base", "tied"), f"model.add_tokens={json.dumps([*TOKENS, TOKENS[2]])}")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
    (ids,) = config["trainable_token_indices"].values()
    assert len(ids) == len(set(ids)) == len(TOKENS)


@pytest.mark.parametrize("kind", ["untied", "internlm2"])
def test_what_the_template_does_not_write_is_a_word_of_content_to_all_who_read_it(kind: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    base, words = make(tmp_path / "base", kind), [*TOKENS, "<|thing|>", "newword"]
    answer = "It is <|thing|> and newword, <|eot_id|> typed."
    text = json.dumps({"text": f"### Human: What is <|thing|>?### Assistant: {answer}"}) + "\n"
    sets = [f"model.add_tokens={json.dumps(words)}", "checkpoint.every_steps=4"]
    run = trained(tmp_path, base, *sets, rows=text * 40)
    ours = Tokenizer.load(run / "adapter")
    theirs = PreTrainedTokenizerFast.from_pretrained(run / "adapter")
    encoder = make_encoder(Registry.load().template("llama3_chat"), ours)
    item = Conversation((Message("user", "What is <|thing|>?"), Message("assistant", answer)))
    ids = encoder.encode([(item, "here")]).tokens.tolist()
    thing, word, stop = (ours.token_id(token) for token in ("<|thing|>", "newword", "<|eot_id|>"))
    assert (ids.count(thing), ids.count(word), ids.count(stop)) == (2, 1, 2)  # what is typed of a control token is text
    content = "It is <|thing|> and newword."
    assert ours.encode([content]) == [theirs(content, add_special_tokens=False)["input_ids"]]
    assert {token for token in words if ours.token_id(token) in ours.special_ids} == {*TOKENS}
    checkpoint = find(f"{run}@4").tokenizer_folder
    assert Tokenizer.load(checkpoint).files() == ours.files()
    rows = next(
        t for n, t in load_file(run / "adapter" / "adapter_model.safetensors").items() if "embed" in n or "tok_" in n
    )
    assert not torch.equal(rows[3], rows[1])  # it has learnt: new rows begin alike


@pytest.mark.parametrize("name", ["tokenizer", "chatml", "internlm_chat"])
def test_what_the_template_writes_is_control_however_it_is_put_together(name: str) -> None:
    found = Tokenizer.load(EMBEDDED / "model")
    jinja = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% if m.tools %}<tool>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    template = Registry.load().template(name)
    if name == "tokenizer":
        found._templates = {"default": jinja}
    marks = {"tokenizer": ["<|user|>", "<tool>"], "chatml": ["<|im_end|>"], "internlm_chat": ["<eoh>"]}[name]
    assert written([*marks, "role", "<|other|>", "messages"], template, found, None) == (*marks,)


def test_plain_peft_opens_it_as_its_readme_says(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = make(tmp_path / "base", "untied")
    run = trained(tmp_path, base)
    readme = (run / "adapter" / "README.md").read_text("utf-8")
    assert "base.resize_token_embeddings(len(tokenizer))" in readme
    tokenizer, model = AutoTokenizer.from_pretrained(run / "adapter"), AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model = PeftModel.from_pretrained(model, run / "adapter").eval()
    ids = torch.tensor([tokenizer(f"{TOKENS[0]}What{TOKENS[2]}", add_special_tokens=False)["input_ids"]])
    (ours,) = logits(load(find(run)), ids.tolist())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[0], ours, atol=1e-5, rtol=1e-4)


def test_loss_and_gradients_of_trained_rows_are_those_of_full_logits(tiny_model: Path) -> None:
    network = load_base(
        str(tiny_model), quantizer=Registry.load().quantizer("none"), compute_dtype="float32", device="cpu"
    )
    add_rows(network, 514, [512, 513])
    for table in (network.get_input_embeddings(), network.get_output_embeddings()):
        assert len(table.weight) == 514
        torch.testing.assert_close(table.weight[512:], table.weight[:512].mean(0).expand(2, -1))
    network = attach_adapter(network, AdapterSpec(r=4, alpha=8, dropout=0.0, tokens=(7, 512, 513)), seed=0)
    ids = torch.tensor([[1, 7, 512, 30, 513, 7, 40, 512]])
    labels = torch.tensor([[7, 512, 30, 513, 7, 40, 512, -100]])
    found = []
    for chunked in (True, False):
        loss_fn = CausalLoss(network, chunk=3)
        assert loss_fn.probe() is None
        loss_fn.plain = None if chunked else "asked for"
        network.zero_grad()
        loss = loss_fn(ids, torch.arange(8)[None], labels)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in network.named_parameters() if "trainable_tokens_delta" in n}
        found.append((loss.detach(), grads))
    assert len(found[0][1]) == 2
    assert all(grad.abs().sum() > 0 for grad in found[0][1].values())
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.numel = max(self.numel, tensor.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_rows_that_train_are_looked_up_as_peft_does_without_its_copy_of_all_rows(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corefit.engine.fused.cpu_has_bf16", lambda: True)  # else the loss copies the head
    base, name = make(tmp_path / "base", kind), str(dtype).removeprefix("torch.")
    network = load_base(str(base), quantizer=Registry.load().quantizer("none"), compute_dtype=name, device="cpu")
    tokens = (7, 9, 30)
    network = attach_adapter(network, AdapterSpec(r=4, alpha=8, dropout=0.0, tokens=tokens), seed=0)
    (layer,) = [module for module in network.modules() if "forward" in vars(module) and hasattr(module, "rows_at")]
    with torch.no_grad():
        layer.trainable_tokens_delta["default"].normal_()
    ids = torch.tensor([[1, 7, 30, 5], [2, 7, 40, 9]])
    positions, labels = torch.arange(4).expand(2, -1), torch.tensor([[7, 30, 5, -100], [-100, 40, 9, 3]])
    loss_fn, found = CausalLoss(network), list[tuple[torch.Tensor, torch.Tensor]]()
    for ours in (True, False):
        if not ours:
            del layer.forward
        network.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            assert loss_fn.probe() is None
            with Largest() as largest:
                loss = loss_fn(ids, positions, labels)
                (loss / 5).backward()
        assert (largest.numel < layer.base_layer.weight.numel()) == ours
        found.append((loss.detach(), layer.trainable_tokens_delta["default"].grad.clone()))
        with torch.no_grad(), network.disable_adapter():
            torch.testing.assert_close(layer(ids), layer.base_layer(ids), atol=0, rtol=0)
    assert found[0][1].abs().sum() > 0
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0], found[1], atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapter_of_others_with_whole_embeddings_of_a_larger_vocabulary_opens_and_merges(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make(tmp_path / "base", "untied")
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = model.config.vocab_size + 5
    model.resize_token_embeddings(rows)
    spec = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, spec)
    adapted.save_pretrained(tmp_path / "theirs")
    network = with_adapter(
        load_base(str(base), quantizer=Registry.load().quantizer("none"), compute_dtype="float32", device="cpu"),
        tmp_path / "theirs",
    ).eval()
    ids = torch.tensor([[1, 5, rows - 1, 9]])
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
        torch.testing.assert_close(network(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    out = merge(tmp_path / "theirs", tmp_path / "merged", model=str(base), measured=0)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-3)


def test_what_can_not_be_together_is_refused_by_name(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "untied")
    with pytest.raises(ModelError, match=r"adapter\.targets: lm_head can't have LoRA beside model\.add_tokens"):
        trained(tmp_path, base, 'adapter.targets=["lm_head", "q_proj"]')
    sets = [s for s in SETS if not s.startswith("model.add_tokens")]
    with pytest.raises(ModelError, match=r"model\.add_tokens"):  # what to do where a template's token is missing
        corefit.train(
            model=str(base), data=str(tmp_path / "rows.jsonl"), plugin="oasst1", template="llama3_chat", sets=sets
        )
