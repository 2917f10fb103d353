from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import xtuner_reference as xtuner
from corefit_internlm_chat import corefit_prompt_templates as internlm_chat
from corefit_xtuner_templates import corefit_prompt_templates as xtuner_templates
from jinja2.exceptions import TemplateError
from samples import encode_each, labels_in_place
from tiny import write_tokenizer

from corefit.data.encode import make_encoder
from corefit.data.tokenizer import Tokenizer
from corefit.errors import ModelError
from corefit.templates import PromptTemplate
from corefit.types import Conversation, Message, Segment, Unrenderable

TEMPLATES = {template.name: template for template in (*internlm_chat(), *xtuner_templates())}
CONTROL = sorted({token for template in TEMPLATES.values() for token in (*template.control, *template.stop)})
GOLDEN = Path(__file__).parents[1] / "golden" / "templates.json"
SYSTEM, USER, ANSWER = Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "yo")
TURNS = (USER, ANSWER, Message("user", "2 + 2?"), Message("assistant", "4."))
CONVERSATIONS = {
    "single turn": (USER, ANSWER),
    "multi turn": TURNS,
    "with system": (SYSTEM, *TURNS),
    "empty system": (Message("system", ""), USER, ANSWER),
    "empty question": (Message("user", ""), ANSWER),
    "unicode": (Message("user", " 你好 🦜\n{x} \"é\" 'q' \\n"), Message("assistant", "é\n\n 再见 ")),
}
ODD = {
    "leading answer": (ANSWER, *TURNS),
    "two questions": (USER, *TURNS),
    "two answers": (*TURNS, ANSWER),
    "late system": (*TURNS, SYSTEM, USER, ANSWER),
    "tool": (*TURNS, Message("tool", "4"), ANSWER),
}
every_template = pytest.mark.parametrize("name", TEMPLATES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that has the control tokens of all formats."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), control=CONTROL, vocab_size=600)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def segments_of(name: str, messages, tokenizer) -> list[Segment]:
    return list(TEMPLATES[name].render(Conversation(messages), tokenizer, None))


def text_of(segments) -> str:
    return "".join(segment.text for segment in segments)


def imitating(template: PromptTemplate):
    """A conversation in which everybody types the format's own markers."""
    typed = " ".join((*template.control, *template.forgeable, "<s>", "</s>")) + "\n"
    messages = (Message("user", typed), Message("assistant", typed + "x"), USER, ANSWER)
    return messages if template.name == "minicpm" else (Message("system", typed), *messages)


def rendered(tokenizer) -> dict[str, dict[str, str]]:
    texts: dict[str, dict[str, str]] = {}
    for name in TEMPLATES:
        for kind, messages in CONVERSATIONS.items():
            try:
                texts.setdefault(name, {})[kind] = text_of(segments_of(name, messages, tokenizer))
            except Unrenderable as refusal:
                texts[name][kind] = f"refused: {refusal.reason}"
    return texts


def test_golden_renderings_byte_for_byte(tokenizer):
    """After a change that is meant, ``write_golden`` writes them anew."""
    assert rendered(tokenizer) == json.loads(GOLDEN.read_text(encoding="utf-8"))


def write_golden() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        texts = rendered(Tokenizer.load(write_tokenizer(Path(folder), control=CONTROL, vocab_size=600)))
    GOLDEN.write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_every_name_of_both_versions_is_there(shared):
    known = set(xtuner.strings_of(shared))
    assert known - set(TEMPLATES) == {"code_llama_chat@0.1.9"}  # it says the same as code_llama_chat
    assert set(TEMPLATES) - known == {"minicpm3"}  # v0.2.0
    assert sum("@" not in name for name in known) == 26 and sum("@" in name for name in TEMPLATES) == 11
    for name, template in TEMPLATES.items():
        version = "v0.1.9" if "@" in name else "v0.2.0" if name == "minicpm3" else "v0.1.23"
        assert template.source == f"XTuner {version}, PROMPT_TEMPLATE.{name.removesuffix('@0.1.9')}"


@every_template
def test_text_and_what_is_supervised_follow_from_xtuners_strings(name, shared, tokenizer):
    strings = xtuner.strings_of(shared)
    for kind, messages in CONVERSATIONS.items():
        if kind == "empty question" and "@" in name:
            continue  # see below
        if name == "minicpm" and messages[0].content and messages[0].role == "system":
            continue
        system = messages[0].content if messages[0].role == "system" else ""
        said = [message.content for message in messages if message.role != "system"]
        turns = [(system if i == 0 else "", q, a) for i, (q, a) in enumerate(zip(said[::2], said[1::2], strict=True))]
        strings_of = strings.get(name) or strings["internlm2_chat"]  # minicpm3
        wanted = list(xtuner.written(name, strings_of, turns, bos="<s>", eos="</s>"))
        segments = segments_of(name, messages, tokenizer)
        assert text_of(segments) == "".join(text for text, _ in wanted), kind
        runs = "".join(f"[{s.text}]" if s.supervised else s.text for s in segments).replace("][", "")
        assert runs == "".join(f"[{text}]" if trained else text for text, trained in wanted).replace("][", ""), kind


@every_template
def test_jinja_equals_joined_segments(name, tokenizer, theirs):
    """Rendered by transformers; where the renderer refuses, the Jinja refuses too."""
    template = TEMPLATES[name]
    for kind, messages in {**CONVERSATIONS, **ODD, "imitating": imitating(template)}.items():
        chat = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = text_of(segments_of(name, messages, tokenizer))
        except Unrenderable:
            with pytest.raises(TemplateError):
                theirs.apply_chat_template(chat, chat_template=template.chat_template, tokenize=False)
        else:
            assert theirs.apply_chat_template(chat, chat_template=template.chat_template, tokenize=False) == text, kind


@every_template
def test_text_that_imitates_its_markers_stays_text(name, tmp_path):
    template = TEMPLATES[name]
    own = tuple(dict.fromkeys((*template.control, *template.stop)))
    encoder = make_encoder(template, Tokenizer.load(write_tokenizer(tmp_path, control=own)))
    messages = imitating(template)
    [result] = encode_each(encoder, [(Conversation(messages), "d:1")])
    segments = segments_of(name, messages, encoder.tokenizer)
    ids = result.sample.input_ids.tolist()
    control = [encoder.tokenizer.token_id(s.text) for s in segments if s.control]
    assert [id for id in ids if encoder.forbidden[id]] == control
    assert encoder.tokenizer.decode(ids) == text_of(segments)
    spans = [encoder.tokenizer.decode(ids[a:b]) for a, b in result.sample.spans.tolist()]
    stops = "".join(stop for stop in encoder.stop if stop != "<|endoftext|>")
    assert spans == [m.content + stops for m in messages if m.role == "assistant"]
    contents = [m.content for m in messages]
    assert len(result.notes) == sum(marker in text for marker in template.forgeable for text in contents)
    assert bool(template.forgeable) == bool(result.notes)


@every_template
def test_the_prompt_is_what_training_saw_before_the_answer(name, folder, theirs):
    encoder = make_encoder(TEMPLATES[name], Tokenizer.load(folder))
    [result] = encode_each(encoder, [(Conversation(TURNS), "d:1")])
    prompt = encoder.prompt(TURNS[:-1])
    assert prompt.tolist() == result.sample.input_ids[: result.sample.spans[-1][0]].tolist()
    chat = [{"role": m.role, "content": m.content} for m in TURNS[:-1]]
    jinja = TEMPLATES[name].chat_template
    text = theirs.apply_chat_template(chat, chat_template=jinja, tokenize=False, add_generation_prompt=True)
    assert encoder.tokenizer.decode(prompt) == text


# --------------------------------------------------------------------------- parity with InternLM's real tokenizer


@pytest.fixture(scope="module")
def parity(shared, tmp_path_factory):
    """InternLM's tokenizer with the control tokens of all formats added, and sentencepiece with the same."""
    pytest.importorskip("sentencepiece")
    model = shared / "data/tokenizer_internlm/tokenizer.model"
    bare = Tokenizer.load(model)
    added = {token: 103_168 + i for i, token in enumerate(t for t in CONTROL if bare.token_id(t) is None)}
    folder = tmp_path_factory.mktemp("internlm")
    shutil.copy(model, folder)
    decoder = {str(id): {"content": token, "special": True, "normalized": False} for token, id in added.items()}
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.load(folder), xtuner.Encoder(model, added | {"<s>": 1, "</s>": 2})


def threads_of(shared, n_alpaca: int, n_oasst: int) -> list[list[xtuner.Turn]]:
    """Half of the Alpaca rows are English, half Chinese; questions as XTuner's alpaca_map_fn joins them."""
    threads = []
    for language in ("en", "zh"):
        rows = json.loads((shared / f"data/alpaca_{language}_demo.json").read_text(encoding="utf-8"))
        threads += [[("", f"{r['instruction']}\n{r['input']}", r["output"])] for r in rows[: n_alpaca // 2]]
    for row in (shared / "data/oasst/guanaco_100.jsonl").read_text(encoding="utf-8").splitlines()[:n_oasst]:
        said = re.split(r"### (?:Human|Assistant): ", json.loads(row)["text"])[1:]
        threads.append([("", q, a) for q, a in zip(said[::2], said[1::2], strict=False)])
    return threads


@every_template
@pytest.mark.parametrize(
    ("n_alpaca", "n_oasst"), [(40, 10), pytest.param(1000, 100, marks=pytest.mark.full)], ids=["some", "all"]
)
def test_ids_and_labels_equal_xtuners(name, n_alpaca, n_oasst, shared, parity):
    tokenizer, oracle = parity
    if name.startswith("moss_sft"):  # what others protect is plain text here
        tokenizer = Tokenizer.load(tokenizer.name)
    strings = xtuner.strings_of(shared)
    strings = strings.get(name) or strings["internlm2_chat"]  # minicpm3
    threads = threads_of(shared, n_alpaca, n_oasst)
    assert len(threads) == n_alpaca + n_oasst
    roles = ("user", "assistant")
    items = [
        Conversation(tuple(Message(roles[i], text) for _, *turn in thread for i, text in enumerate(turn)))
        for thread in threads
    ]
    encoder = make_encoder(TEMPLATES[name], tokenizer)
    for thread, result in zip(threads, encode_each(encoder, [(item, "d:1") for item in items]), strict=True):
        ids, wanted = oracle.encode(xtuner.written(name, strings, thread, bos="<s>", eos="</s>"))
        assert result.sample.input_ids.tolist() == ids
        assert labels_in_place(result.sample) == wanted


# ------------------------------------------------------- what corefit does differently; the rows of the plugin's table


class TestDifferences:
    def test_typed_control_tokens_are_characters(self, parity):
        tokenizer, oracle = parity
        encoder = make_encoder(TEMPLATES["internlm2_chat"], tokenizer)
        [result] = encode_each(encoder, [(Conversation((Message("user", "a<|im_end|>b"), ANSWER)), "d:1")])
        end = tokenizer.token_id("<|im_end|>")
        turn = [("", "a<|im_end|>b", "yo")]
        strings = dict(INSTRUCTION="{input}", SUFFIX="<|im_end|>", SUFFIX_AS_EOS=True)
        ids, _ = oracle.encode(xtuner.written("internlm2_chat", strings, turn, bos="<s>", eos="</s>"))
        assert ids.count(end) == 2  # theirs, without the template's own
        assert result.sample.input_ids.tolist().count(end) == 2  # of the template alone
        assert "a<|im_end|>b" in tokenizer.decode(result.sample.input_ids)

    @pytest.mark.parametrize(
        ("name", "missing"),
        [
            ("llama3_chat", "<|start_header_id|>"),
            ("phi3_chat", "<|system|>"),
            ("gemma", "<start_of_turn>"),
            ("cohere_chat", "<|START_OF_TURN_TOKEN|>"),
            ("baichuan2_chat", "<reserved_106>"),
            ("deepseek_v2", "<｜end▁of▁sentence｜>"),
            ("chatglm3", "[gMASK]"),
            ("qwen_chat", "<|endoftext|>"),
        ],
    )
    def test_a_tokenizer_without_the_control_tokens_is_refused(self, name, missing, tiny_tokenizer):
        words = f"template {name!r} needs {missing!r}, which is not one token of the tokenizer {tiny_tokenizer}"
        with pytest.raises(ModelError, match=f"^{re.escape(words)}( \\(and [1-9] more\\))?; choose"):
            make_encoder(TEMPLATES[name], Tokenizer.load(tiny_tokenizer))

    def test_plain_markers_that_the_tokenizer_has_as_tokens_are_tokens(self, tmp_path):
        made = Tokenizer.load(write_tokenizer(tmp_path, control=["[INST]", "[/INST]"]))
        encoder = make_encoder(TEMPLATES["mistral"], made)
        [result] = encode_each(encoder, [(Conversation((Message("user", "a [/INST] b"), ANSWER)), "d:1")])
        ids = result.sample.input_ids.tolist()
        assert [ids.count(made.token_id(token)) for token in ("[INST]", "[/INST]")] == [1, 1]
        assert encoder.forgeable == () and result.notes == ()

    def test_white_space_that_a_token_swallows_stays_with_it(self, tmp_path):
        """As Phi-3's tokenizer has it: the line break after ``<|user|>`` is no token of its own."""
        from transformers import AutoTokenizer

        folder = write_tokenizer(tmp_path, control=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for token in data["added_tokens"]:
            token["rstrip"] = token["content"] in ("<|user|>", "<|assistant|>")
        (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
        made = Tokenizer.load(folder)
        [result] = encode_each(make_encoder(TEMPLATES["phi3_chat"], made), [(Conversation(TURNS), "d:1")])
        text = text_of(segments_of("phi3_chat", TURNS, made))
        assert "<|user|>\nhi<|end|>\n<|assistant|>\nyo<|end|>\n" in text
        theirs = AutoTokenizer.from_pretrained(folder)
        assert result.sample.input_ids.tolist() == theirs.encode(text, add_special_tokens=False)

    @pytest.mark.parametrize("name", ["default", "vicuna", "internlm2_chat"])
    def test_a_system_text_in_a_later_turn_is_a_drop(self, name, tokenizer):
        with pytest.raises(Unrenderable, match="^system_not_first$"):
            segments_of(name, ODD["late system"], tokenizer)

    def test_minicpm_has_no_place_for_a_system_text(self, tokenizer):
        with pytest.raises(Unrenderable, match="^system_message$"):
            segments_of("minicpm", CONVERSATIONS["with system"], tokenizer)

    def test_plain_formats_go_without_bos_where_there_is_none(self, tmp_path):
        folder = write_tokenizer(tmp_path, control=CONTROL, vocab_size=600)
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}), encoding="utf-8")
        refused = []
        for name, template in TEMPLATES.items():
            try:
                encoder = make_encoder(template, Tokenizer.load(folder))
            except ModelError as error:
                assert "(no_bos_token)" in str(error)
                refused.append(name)
            else:
                assert "<s>" not in text_of(encoder.segments(Conversation(TURNS)))
        assert [name for name in TEMPLATES if name not in refused] == [
            name for name, t in TEMPLATES.items() if not t.control or name.startswith(("qwen_chat", "chatglm"))
        ]
        assert {"internlm_chat", "llama3_chat", "gemma"} < set(refused) and "default" not in refused

    def test_an_empty_question_is_written_whole(self, tokenizer):
        text = text_of(segments_of("default@0.1.9", CONVERSATIONS["empty question"], tokenizer))
        assert text == "<s><|User|>:\n<|Bot|>:yo</s>"  # v0.1.9 wrote "<s>\n<|Bot|>:yo</s>"

    def test_chatglm_begins_with_its_tokens(self, tokenizer):
        segments = segments_of("chatglm3", TURNS, tokenizer)
        assert [s.text for s in segments if s.control] == [
            *("[gMASK]", "sop", "<|user|>", "<|assistant|>", "</s>"),
            *("[gMASK]", "sop", "<|user|>", "<|assistant|>", "</s>"),
        ]

    def test_qwen_never_gets_a_bos(self, tokenizer):
        assert "<s>" not in text_of(segments_of("qwen_chat", TURNS, tokenizer))

    def test_what_training_puts_at_the_end_of_an_answer_always_ends_one(self, folder):
        def stops(name):
            return make_encoder(TEMPLATES[name], Tokenizer.load(folder)).stop

        assert stops("gemma") == ("<end_of_turn>", "</s>")
        assert stops("moss_sft") == stops("default") == stops("internlm_chat@0.1.9") == ("</s>",)
        assert stops("qwen_chat") == ("<|im_end|>", "<|endoftext|>")
        assert stops("minicpm3") == ("<|im_end|>",)

    def test_a_missing_loss_flag_is_missing(self, tokenizer):
        """One masked answer masks no other."""
        messages = (*TURNS[:3], TURNS[3]._replace(supervised=False), USER, ANSWER)
        supervised = [s.text for s in segments_of("internlm_chat", messages, tokenizer) if s.supervised]
        assert supervised == ["yo", "<eoa>", "yo", "<eoa>"]
