from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from samples import encode_each
from tiny import write_model
from tiny_export import adapted, facts

from corefit.chat import Chatter, chat_loop, find
from corefit.data.encode import make_encoder
from corefit.data.tokenizer import Tokenizer
from corefit.engine.export import EMBEDDED_MODEL, export_trained
from corefit.errors import ModelError, UserError
from corefit.registry import Registry
from corefit.types import Conversation, Message

torch.set_num_threads(1)
USER = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder on a base in another folder."""
    folder = tmp_path_factory.mktemp("chat")
    base = write_model(folder / "base")
    export_trained(adapted(base), folder / "run" / "adapter", facts(base))
    (folder / "run" / "recipe.toml").write_text(f"[model]\nbase = {json.dumps(str(base))}\n")
    return folder / "run"


@pytest.fixture(scope="module")
def embedded() -> Chatter:
    return Chatter(EMBEDDED_MODEL, device="cpu", max_tokens=40)


@pytest.fixture(scope="module")
def adapter(run) -> Chatter:
    return Chatter(run, device="cpu", max_tokens=12, quantizer="none")


def test_run_adapter_and_model_are_found(run, tmp_path):
    base = run.parent / "base"
    for target in (run, run / "adapter"):
        found = find(target)
        assert (found.adapter, found.base, found.name) == (run / "adapter", base, "base")
    assert find(base).adapter is None and find(base).base == base
    alone = shutil.copytree(run / "adapter", tmp_path / "adapter")
    with pytest.raises(ModelError, match="--model PATH"):
        find(alone)
    assert find(alone, model=str(base)).base == base
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("")
    with pytest.raises(ModelError, match="--resume"):
        find(tmp_path / "run")
    with pytest.raises(ModelError, match="no such folder"):
        find(tmp_path / "nowhere")


def test_the_recipe_of_a_run_does_not_decide_whether_code_runs(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    copy = shutil.copytree(run, tmp_path / "run")
    base = shutil.copytree(run.parent / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    code = {"AutoConfig": "planted.MineConfig", "AutoModelForCausalLM": "planted.Mine"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": code}))
    (base / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    (copy / "recipe.toml").write_text(f"[model]\nbase = {json.dumps(str(base))}\ntrust_remote_code = true\n")
    with pytest.raises(ModelError, match="chat --trust-remote-code"):
        Chatter(copy, device="cpu", quantizer="none", say=lambda line: None)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ModelError, match="can't be loaded"):
        Chatter(copy, device="cpu", quantizer="none", trust_remote_code=True, say=lambda line: None)
    assert (tmp_path / "ran").exists()


def test_a_base_that_changed_is_told(run, tmp_path):
    other = write_model(tmp_path / "base", seed=5)
    lines: list[str] = []
    find(run, model=str(other), say=lines.append)
    assert len(lines) == 1 and "fingerprint" in lines[0]
    lines.clear()
    find(run, say=lines.append)
    assert lines == []


@pytest.mark.parametrize("cut", [5, 3000, -1])
def test_an_adapter_that_was_cut_off_is_told(run, tmp_path, cut):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(ModelError, match="adapter_model.safetensors isn't whole .*; fetch it again"):
        find(tmp_path / "adapter", model=str(EMBEDDED_MODEL))


@pytest.mark.parametrize("name", ["corefit.json", "adapter_config.json"])
@pytest.mark.parametrize("content", ["[1]", "null"])
def test_json_that_is_no_object_is_told(run, tmp_path, name, content):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / name).write_text(content)
    with pytest.raises(ModelError, match=f"{name}: not a JSON object"):
        find(tmp_path / "adapter", model=str(EMBEDDED_MODEL))


def test_an_adapter_of_another_base_and_a_broken_recipe_are_told(run, tmp_path):
    with pytest.raises(ModelError, match=r"adapter: made for another base than .*model \(size mismatch for "):
        Chatter(run, device="cpu", quantizer="none", model=str(EMBEDDED_MODEL), say=lambda line: None)
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "recipe.toml").write_text("[model\n")
    with pytest.raises(ModelError, match=r"recipe.toml: broken: "):
        find(copy)


def test_the_embedded_base_is_found_by_name(tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "corefit-embedded"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({}, tmp_path / "adapter_model.safetensors")
    assert find(tmp_path).base == EMBEDDED_MODEL


def test_a_whole_answer_stops_by_itself(embedded):
    pieces = list(embedded.answer([USER]))
    assert "".join(pieces) == "The capital of France is Paris."
    assert len(pieces) > 5, "it streams"
    assert embedded.ask("法国的首都是哪里？") == "法国的首都是巴黎。"


def test_chinese_comes_in_whole_characters(embedded):
    pieces = list(embedded.answer([{"role": "user", "content": "天空为什么是蓝色的？"}]))
    assert "".join(pieces) == "因为空气散射蓝光。"
    assert all("\ufffd" not in piece for piece in pieces)


def test_multi_turn_ids_are_those_of_training(embedded):
    said = ["one <eoa> <s>", ":i Paris.", "and\n", "Rome"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    encoder = make_encoder(Registry.load().template("internlm_chat"), Tokenizer.load(EMBEDDED_MODEL))
    conversation = Conversation(tuple(Message(m["role"], m["content"]) for m in messages))
    sample = encode_each(encoder, [(conversation, "a:1")])[0].sample
    assert sample is not None
    ids = embedded.prompt_ids(messages[:3])
    assert ids == sample.input_ids[: sample.spans[-1][0]].tolist()
    assert ids.count(encoder.stop_ids[0]) == 1, "what a user types is never a control token"
    with pytest.raises(UserError, match="unknown_role"):
        embedded.prompt_ids([{"role": "narrator", "content": "hi"}])


def test_adapter_on_and_off(adapter, run):
    base = Chatter(run.parent / "base", device="cpu", max_tokens=12)
    base.encoder, base.stop_ids = adapter.encoder, adapter.stop_ids  # asked in the same words
    on, off = adapter.ask("hi"), adapter.ask("hi", adapter=False)
    assert off == base.ask("hi") != on
    assert adapter.ask("hi") == on, "off is over when the answer is"


def test_the_quantizer_of_training_is_the_default(run):
    assert Chatter(run, device="cpu").quantizer == "nf4"
    assert Chatter(run.parent / "base", device="cpu").quantizer == "none"


def fed(chatter: Chatter, messages: list[dict[str, str]], **options) -> tuple[str, list[int]]:
    """Give an answer, and how many ids each forward pass was given."""
    sizes: list[int] = []
    hook = chatter.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        return "".join(chatter.answer(messages, **options)), sizes
    finally:
        hook.remove()


def test_a_conversation_is_read_once_and_answered_as_if_read_anew():
    kept = Chatter(EMBEDDED_MODEL, device="cpu", max_tokens=40)
    history, read = [USER], 0
    for question in ("天空为什么是蓝色的？", "What is your name?", ""):
        said, sizes = fed(kept, history)
        assert sizes == [len(kept.prompt_ids(history)) - read, *[1] * (len(sizes) - 1)]
        read = len(kept.prompt_ids(history)) + len(sizes) - 1  # the last id was said, and not read
        assert kept.tokenizer.decode(kept._said[said]) == said
        assert said == fed(Chatter(EMBEDDED_MODEL, device="cpu", max_tokens=40), history)[0]
        history += [{"role": "assistant", "content": said}, {"role": "user", "content": question}]
    again, sizes = fed(kept, [USER])
    assert again == "The capital of France is Paris." and sizes[0] == 1, "the cache is cut back to a shorter prompt"


def test_adapter_on_and_off_remember_each_for_itself(adapter):
    on, off = fed(adapter, [USER])[0], fed(adapter, [USER], adapter=False)[0]
    for expected, side in ((on, True), (off, False)):
        answer, sizes = fed(adapter, [USER], adapter=side)
        assert (answer, sizes[0]) == (expected, 1)


def test_an_interrupted_forward_pass_is_forgotten(embedded):
    whole, _ = fed(embedded, [USER])
    layer = embedded.model.model.layers[-1]

    def interrupt(*_):
        raise KeyboardInterrupt

    other = [{"role": "user", "content": "What is the capital of Italy?"}]
    hook = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        fed(embedded, other)
    hook.remove()
    answer, sizes = fed(embedded, [USER])
    assert answer == whole and sizes[0] == len(embedded.prompt_ids([USER]))


def test_what_was_answered_stays_the_ids_that_it_was(adapter):
    ids = [adapter.tokenizer.encode([c])[0][0] for c in "quick"]  # one token of the vocabulary, said letter by letter
    assert adapter.tokenizer.encode(["quick"])[0] != ids and adapter.tokenizer.decode(ids) == "quick"
    history = [USER, {"role": "assistant", "content": "quick"}, USER]
    before = adapter.prompt_ids(history)
    adapter._said["quick"] = tuple(ids)
    after = adapter.prompt_ids(history)
    del adapter._said["quick"]
    assert ids == [id for i, id in enumerate(after) if after[i : i + 5] == ids][:1] + ids[1:]
    assert len(after) > len(before)


def test_max_tokens_and_context(adapter, embedded):
    assert len(adapter.tokenizer.encode([adapter.ask("hi")])[0]) <= 14
    with pytest.raises(UserError, match="context 2048"):
        embedded.ask("a b " * 2000)


def test_a_folder_without_a_chat_template(tmp_path):
    base = write_model(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no chat template"):
        Chatter(base, device="cpu")


class Fake:
    def __init__(self):
        self.asked: list[tuple[list[str], bool]] = []

    def answer(self, messages, *, adapter=True):
        self.asked.append(([m["content"] for m in messages], adapter))
        if messages[-1]["content"] == "wait":
            yield "partly"
            raise KeyboardInterrupt
        yield from ("an", "swer")


def talk(lines, **options):
    fake, written, lines = Fake(), [], iter(lines)

    def read(prompt):
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    chat_loop(fake, read=read, write=written.append, **options)
    return fake.asked, "".join(written)


def test_the_loop_keeps_the_conversation():
    asked, written = talk(["one", "  ", "two", "/new", "three", EOFError()], system="sys")
    assert asked == [
        (["sys", "one"], True),
        (["sys", "one", "answer", "two"], True),
        (["sys", "three"], True),
    ]
    assert written == "answer\n" * 3 + "\n"


def test_a_system_message_may_begin_with_a_dash():
    asked, _ = talk(["/system - Be brief.", "one", "/system -", "two", "/exit"])
    assert [messages for messages, _ in asked] == [["- Be brief.", "one"], ["two"]]


def test_commands_of_the_loop():
    asked, written = talk(
        ["/system pirate", "one", "/reset", "two", "/system Be brief.", "three", "/system -", "four", "/system", "/nwe"]
        + ['"""first', "  second", 'third"""', '"""one line"""', "/exit"],
        system="sys",
        systems={"pirate": "Talk like a pirate.", "poet": "Rhyme."},
    )
    assert [messages for messages, _ in asked] == [
        ["Talk like a pirate.", "one"],
        ["Talk like a pirate.", "two"],
        ["Be brief.", "three"],
        ["four"],
        ["four", "answer", "first\n  second\nthird"],
        ["four", "answer", "first\n  second\nthird", "answer", "one line"],
    ]
    assert "system: none\npirate: Talk like a pirate.\npoet: Rhyme.\n" in written
    assert "no command /nwe" in written
    asked, written = talk(['"""never ended', EOFError()])
    assert not asked and 'a message that no """ ended is left out' in written


def test_what_the_model_cannot_be_asked_is_said_and_the_chat_goes_on(adapter):
    written, said = [], iter(["caf\udce9", "hi", "/exit"])
    chat_loop(adapter, read=lambda prompt: next(said), write=written.append)
    first, *more = "".join(written).splitlines()
    assert first == "the message is not UTF-8 text (/new starts afresh)" and more


def test_ctrl_c_ends_the_answer_then_the_chat():
    asked, _ = talk(["wait", "on", KeyboardInterrupt()])
    assert asked[1] == (["wait", "partly", "on"], True)
    assert talk(["/exit", "never"])[0] == []


def test_compare_shows_both_and_goes_on_with_the_adapters():
    asked, written = talk(["one", "two", "/exit"], compare=True)
    assert [adapter for _, adapter in asked] == [False, True, False, True]
    assert asked[2][0] == ["one", "answer", "two"]
    assert written.startswith("adapter off: answer\nadapter on:  answer\n")


def test_ctrl_c_at_the_bases_answer_leaves_the_question_out():
    asked, _ = talk(["wait", "on", "/exit"], compare=True)
    assert asked[1] == (["on"], False)
