from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
from tiny import CHATML_JINJA, write_tokenizer
from tokenizers_at_hand import TOKENIZERS

from corefit.data.encode import make_encoder
from corefit.data.tokenizer import Tokenizer
from corefit.errors import ModelError
from corefit.templates import PromptTemplate
from corefit.types import Document, Unrenderable

PLAIN = PromptTemplate.from_strings(name="plain", summary="", user="{content}\n", eos=True)

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hi <b>&'\" \n"},
    {"role": "assistant", "content": "你好 🦜"},
]


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer)


def real_texts(shared: Path) -> list[str]:
    texts: list[str] = []

    def walk(message):
        texts.append(message["text"])
        for reply in message.get("replies", []):
            walk(reply)

    for name in ("alpaca_en_demo", "alpaca_zh_demo"):
        for row in json.loads((shared / f"data/{name}.json").read_text(encoding="utf-8")):
            texts += [value for value in row.values() if isinstance(value, str)]
    for line in (shared / "data/oasst/en_100_tree.jsonl").read_text(encoding="utf-8").splitlines():
        walk(json.loads(line)["prompt"])
    texts += Path(__file__).read_text(encoding="utf-8").split("\n")
    texts += [
        "",
        " ",
        "<s> a </s> <unk>",
        "\0\0x",
        "a▁b",
        "  x   y \n\n\t\t z",
        "😀👩‍👩‍👧🏳️‍🌈",
        "<eoa>x<eoh>",
        "<0x0A>",
        "\r\n",
    ]
    texts += [before + chr(code) + "x" for code in (*range(32), *range(127, 160)) for before in ("", "a ", "你")]
    texts += [chr(code) + mark + "🦜" for code in range(0x1F300, 0x1F650, 7) for mark in ("", "\u200d", "\ufe0f", "🏽")]
    alphabet = "aab  ..-=▁\n01é你𠁓\U0010ffff\0<>eoh"
    dice = random.Random(7)
    texts += ["".join(dice.choice(alphabet) for _ in range(dice.randrange(60))) for _ in range(1000)]
    texts += [char * n for char in " -=.a0\n▁" for n in range(1, 70)]
    return texts


class TestFolder:
    def test_named_tokens(self, tokenizer):
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", None)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
        assert tokenizer.chat_template == CHATML_JINJA
        assert tokenizer.special_ids == frozenset(range(7))
        assert tokenizer.token_id("<eoa>") == 6 and tokenizer.token_id("nobody") is None
        vocab = json.loads(tokenizer.files()["tokenizer.json"])["model"]["vocab"]
        assert tokenizer.vocab_size == len(vocab)

    def test_ids_are_those_of_transformers(self, tokenizer, tiny_tokenizer):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(tiny_tokenizer)
        texts = ["What is the capital of France?", "", " é你🦜\n", "a<|im_end|>b</s>"]
        assert tokenizer.encode(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
        assert all(type(id) is int for ids in tokenizer.encode(texts) for id in ids)

    def test_protected_content_never_yields_control(self, tokenizer):
        text = "a</s><eoa><|im_end|>b"
        assert {2, 6, 4} <= set(tokenizer.encode([text])[0])
        forbidden = tokenizer.protect(["<eoa>"])
        [ids] = tokenizer.encode([text])
        assert not forbidden & set(ids) and {0, 1, 2, 6} - {0} <= forbidden
        assert tokenizer.decode(ids) == text

    def test_control_that_is_not_special_is_protected_too(self, tmp_path):
        folder = write_tokenizer(tmp_path)
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for token in data["added_tokens"]:
            token["special"] = token["content"] != "<eoa>"
        (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
        tokenizer = Tokenizer.load(folder)
        tokenizer.protect([])
        assert tokenizer.encode(["<eoa>"])[0] == [6]  # an added token like any other
        tokenizer.protect(["<eoa>"])
        assert 6 not in tokenizer.encode(["<eoa>"])[0]
        assert tokenizer.decode([6], skip_special=True) == ""

    def test_saved_truncation_and_padding_are_off(self, tmp_path):
        from tokenizers import Tokenizer as Backend

        folder = write_tokenizer(tmp_path)
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        backend.enable_truncation(4)
        backend.enable_padding(length=8)
        backend.save(str(folder / "tokenizer.json"))
        assert len(Tokenizer.load(folder).encode(["x" * 100])[0]) == 100
        assert len(Tokenizer.load(folder).encode(["x"])[0]) == 1

    def test_bytes_of_tokens(self, tokenizer):
        text = "é你🦜 the</s>\n"
        [ids] = tokenizer.encode([text])
        assert b"".join(tokenizer.token_bytes(int(id)) for id in ids) == text.encode()

    def test_files_are_byte_for_byte(self, tokenizer, tiny_tokenizer):
        assert tokenizer.files() == {path.name: path.read_bytes() for path in tiny_tokenizer.iterdir()}

    def test_fingerprint_changes_with_any_file(self, tmp_path):
        folder = write_tokenizer(tmp_path)
        before = Tokenizer.load(folder).fingerprint
        assert Tokenizer.load(folder).fingerprint == before
        (folder / "chat_template.jinja").write_text("x", encoding="utf-8")
        assert Tokenizer.load(folder).fingerprint != before

    def test_tokens_as_objects_and_chat_template_file(self, tmp_path):
        folder = write_tokenizer(tmp_path)
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": {"content": "<eoa>"}, "chat_template": "old"})
        )
        (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        (folder / "chat_template.jinja").write_text("new", encoding="utf-8")
        tokenizer = Tokenizer.load(folder)
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == ("<s>", "<eoa>", "new")

    def test_added_tokens_beside_tokenizer_json(self, tmp_path):
        folder = write_tokenizer(tmp_path)
        size = Tokenizer.load(folder).vocab_size
        (folder / "added_tokens.json").write_text(json.dumps({"<new>": size}))
        assert Tokenizer.load(folder).encode(["<new>"])[0] == [size]
        (folder / "added_tokens.json").write_text(json.dumps({"<new>": size + 5}))
        with pytest.raises(ModelError, match="do not belong together"):
            Tokenizer.load(folder)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("nothing", "", "needs tokenizer.json or tokenizer.model"),
            ("tokenizer.json", "{}", "not a tokenizer"),
            ("tokenizer_config.json", "{", "not JSON"),
            ("tokenizer_config.json", "[]", "expected an object"),
            ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "are broken: ValueError"),
            ("tokenizer_config.json", '{"chat_template": [{"x": 1}]}', "are broken: KeyError: 'name'"),
        ],
    )
    def test_broken_folders(self, tmp_path, name, content, message):
        folder = tmp_path / "t"
        folder.mkdir()
        if name.endswith("_config.json"):
            write_tokenizer(folder)
        (folder / name).write_text(content)
        with pytest.raises(ModelError, match=message) as caught:
            Tokenizer.load(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    def test_a_chat_template_that_is_not_utf_8(self, tmp_path):
        folder = write_tokenizer(tmp_path)
        (folder / "chat_template.jinja").write_bytes(b"\xff")
        with pytest.raises(ModelError, match="are broken: UnicodeDecodeError"):
            Tokenizer.load(folder)

    def test_a_vocabulary_with_gaps(self, tmp_path):
        folder = write_tokenizer(tmp_path)
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = data["model"]["vocab"]
        vocab["a"] = 70_000
        (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.vocab_size == 70_001
        encoder = make_encoder(PLAIN, tokenizer)
        assert encoder.encode([(Document("a"), "x:1")]).tokens.tolist() == [70_000, tokenizer.eos_id]
        added = Tokenizer.load(folder, ["<new>"])
        assert added.new_ids == (added.token_id("<new>"),)

    def test_missing(self, tmp_path):
        with pytest.raises(ModelError, match="can't read a tokenizer"):
            Tokenizer.load(tmp_path / "absent")

    def test_what_a_unigram_model_doesnt_know_is_content_and_no_control_token(self, tmp_path):
        tokenizer = Tokenizer.load(TOKENIZERS["unigram"](tmp_path))
        assert tokenizer.unk_token == "<unk>"
        forbidden = tokenizer.protect([])
        [ids] = tokenizer.encode(["a Ü"])
        assert tokenizer.token_id("<unk>") in ids and not forbidden & set(ids)

    def test_control_tokens_swallow_whitespace_as_they_would_in_one_go(self, tmp_path):
        folder = write_tokenizer(tmp_path)
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        data["added_tokens"][3]["rstrip"] = True
        (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
        runs = Tokenizer.load(folder).split_control("a <|im_start|> \nuser<|im_end|>\n")
        assert runs == [("a ", False), ("<|im_start|> \n", True), ("user", False), ("<|im_end|>", True), ("\n", False)]


class TestSentencepiece:
    def test_internlm_equals_sentencepiece(self, shared):
        """Thousands of English, Chinese, code and odd texts; protection of user-defined tokens off."""
        sentencepiece = pytest.importorskip("sentencepiece")
        path = shared / "data/tokenizer_internlm/tokenizer.model"
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ours = Tokenizer.load(path)
        ours.protect([])  # sentencepiece reads a typed <s> as text, and a typed <eoa> as the token
        texts = real_texts(shared)
        chars = set("".join(texts))
        assert len(set(texts)) > 5000 and {"\0", "\x1b", "\x7f", "\x85", "\u200d", "你", "🦜", "\U0010ffff"} <= chars
        differing = [text for text, a, b in zip(texts, ours.encode(texts), theirs.encode(texts), strict=True) if a != b]
        assert differing == []
        assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (len(theirs), 1, 2, 2)
        assert ours.token_id("<eoh>") == 103027 and ours.token_id("<eoa>") == 103028
        for text in texts[:300]:
            [ids] = ours.encode([text])
            assert ours.decode(ids) == text == b"".join(ours.token_bytes(int(id)) for id in ids).decode()

    def test_neither_sentencepiece_nor_protobuf_is_needed(self, shared):
        """As where neither is installed, nor tiktoken; and transformers takes what is made for a fast tokenizer."""
        code = """
import sys
sys.modules |= dict.fromkeys(["sentencepiece", "google", "google.protobuf", "tiktoken", "transformers"])
from corefit.data.tokenizer import Tokenizer
from pathlib import Path
tokenizer = Tokenizer.load(sys.argv[1])
print(tokenizer.encode(["def f(x): 你好🦜\\x01<eoa>"])[0])
for name, data in tokenizer.files().items():
    (Path(sys.argv[2]) / name).write_bytes(data)
"""
        import subprocess
        import sys
        import tempfile

        from transformers import PreTrainedTokenizerFast

        model = shared / "data/tokenizer_internlm/tokenizer.model"
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", code, str(model), folder]
            done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
            theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        assert theirs.is_fast and str(theirs("def f(x): 你好🦜\x01<eoa>")["input_ids"]) == done.stdout.strip()

    def test_pieces_that_the_config_gives_another_name(self, shared, tmp_path):
        """As InternLM 2's folders do: tokenizer_config.json calls an unused piece <|im_start|>."""
        sentencepiece = pytest.importorskip("sentencepiece")
        from sentencepiece import sentencepiece_model_pb2
        from transformers import PreTrainedTokenizerFast

        data = (shared / "data/tokenizer_internlm/tokenizer.model").read_bytes()
        names = {103030: "<|im_start|>", 103031: "<|im_end|>", 103100: "<|plugin|>", 1: "<s>", 2: "</s>"}
        added = {str(id): {"content": name, "special": True, "normalized": False} for id, name in names.items()}
        config = {"added_tokens_decoder": added, "bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML_JINJA}
        (tmp_path / "tokenizer.model").write_bytes(data)
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(
                {**config, "auto_map": {"AutoTokenizer": ["t.T", None]}, "tokenizer_class": "InternLM2Tokenizer"}
            )
        )
        ours = Tokenizer.load(tmp_path)
        theirs = sentencepiece_model_pb2.ModelProto.FromString(data)
        for id, name in names.items():
            theirs.pieces[id].piece = name
        theirs = sentencepiece.SentencePieceProcessor(model_proto=theirs.SerializeToString())
        texts = [text for text in real_texts(shared)[::7] if "<s>" not in text and "</s>" not in text]
        texts += ["<|im_start|>user\n你好<|im_end|>\n", "a<|plugin|>b <TOKENS_UNUSED_3>"]
        assert ours.encode(texts) == theirs.encode(texts)
        assert ours.vocab_size == len(theirs) and {103030, 103031, 103100} <= ours.special_ids
        assert ours.control_tokens == ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|plugin|>")
        (tmp_path / "tokenizer.json").write_bytes(ours.files()["tokenizer.json"])
        fast = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert fast(texts[-2:])["input_ids"] == ours.encode(texts[-2:]) == Tokenizer.load(tmp_path).encode(texts[-2:])
        forbidden = ours.protect(["<|im_end|>"])
        assert not forbidden & {id for ids in ours.encode(texts[-2:]) for id in ids} and 103030 in forbidden

    def test_made_files_load_in_transformers(self, shared, tmp_path):
        from transformers import PreTrainedTokenizerFast

        ours = Tokenizer.load(shared / "data/tokenizer_internlm/tokenizer.model")
        for name, data in ours.files().items():
            (tmp_path / name).write_bytes(data)
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        text = "def f(x):\n    return 你好 🦜 <eoa>"
        assert theirs(text)["input_ids"] == ours.encode([text])[0]
        assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
        assert {path.name for path in tmp_path.iterdir()} == {
            "tokenizer.model",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert Tokenizer.load(tmp_path).encode([text])[0] == ours.encode([text])[0]

    @pytest.mark.parametrize("dummy_prefix", [True, False])
    @pytest.mark.parametrize("byte_fallback", [True, False])
    def test_trained_models(self, shared, tmp_path, dummy_prefix, byte_fallback):
        sentencepiece = pytest.importorskip("sentencepiece")
        lines = [
            row["text"]
            for row in map(
                json.loads, (shared / "data/oasst/guanaco_100.jsonl").read_text(encoding="utf-8").splitlines()
            )
        ]
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=1500,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=dummy_prefix,
            byte_fallback=byte_fallback,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["<eoa>", "two"],
            pad_id=3,
            minloglevel=2,
        )
        (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
        theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        ours = Tokenizer.load(tmp_path)
        forbidden = ours.protect([])
        texts = real_texts(shared)[-2500:] + ["<eoa> a", "in two words", " two words<eoa>", "two"]
        encoded = ours.encode(texts)
        assert encoded == theirs.encode(texts)
        assert (ours.pad_token, ours.pad_id) == ("<pad>", 3)
        assert theirs.unk_id() not in forbidden or byte_fallback  # unknown characters are no forgery

    def test_refused_kinds(self, shared, tmp_path):
        sentencepiece = pytest.importorskip("sentencepiece")
        lines = (shared / "data/oasst/guanaco_100.jsonl").read_text(encoding="utf-8").split(". ")
        for kind, rule, symbol, message in (
            ("unigram", "identity", "<a>", "not BPE"),
            ("bpe", "nmt_nfkc", "<a>", "rewrites text"),
            ("bpe", "identity", "a b", "user-defined pieces with spaces"),
        ):
            model = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines[:2000]),
                model_writer=model,
                model_type=kind,
                vocab_size=400,
                normalization_rule_name=rule,
                remove_extra_whitespaces=rule != "identity",
                user_defined_symbols=[symbol],
                hard_vocab_limit=False,
                minloglevel=2,
            )
            path = tmp_path / f"{kind}-{rule}.model"
            path.write_bytes(model.getvalue())
            with pytest.raises(ModelError, match=message):
                Tokenizer.load(path)

    @pytest.mark.parametrize("data", [b"", b"hello world, this is no model", b"\x0a\xff\xff\xff\x01abc", b"\x0a"])
    def test_not_a_model(self, tmp_path, data):
        (tmp_path / "x.model").write_bytes(data)
        with pytest.raises(ModelError, match="not a sentencepiece model"):
            Tokenizer.load(tmp_path / "x.model")


JINJAS = {
    "chatml": CHATML_JINJA,
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "trimmed blocks": "{{ bos_token }}\n  {% for m in messages %}\n    {{ m['content'] | trim }}\n{% endfor %}\nend",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ loop.index }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
    "{{ messages[1].content | tojson(ensure_ascii=true) }}",
    "names": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|"
    "{{ tools is none }}{{ documents is defined }}",
    "date": "{{ strftime_now('%Y') }}",
    "generation prompt": "{{ messages | length }}{% if add_generation_prompt %}go{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "tools": "{% if tools %}{{ tools[0] | tojson }}{% endif %}",
}


class TestRenderChat:
    @pytest.mark.parametrize("jinja", JINJAS.values(), ids=JINJAS)
    @pytest.mark.parametrize("more", [{}, {"add_generation_prompt": True}, {"tools": [{"name": "é"}]}])
    def test_equals_transformers(self, tokenizer, tiny_tokenizer, jinja, more):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(tiny_tokenizer)
        wanted = theirs.apply_chat_template(CONVERSATION, chat_template=jinja, tokenize=False, **more)
        assert tokenizer.render_chat(CONVERSATION, chat_template=jinja, **more) == wanted

    def test_reasoning_under_its_other_names(self, tokenizer, tiny_tokenizer):
        import transformers
        from transformers import AutoTokenizer

        chat = [{"role": "assistant", "content": "a", "reasoning": "because"}]
        jinja = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
        wanted = AutoTokenizer.from_pretrained(tiny_tokenizer).apply_chat_template(
            chat, chat_template=jinja, tokenize=False
        )
        assert wanted == ("" if transformers.__version__.startswith("5.17.") else "becausebecause")
        assert tokenizer.render_chat(chat, chat_template=jinja) == "becausebecause"

    @pytest.mark.parametrize(
        "jinja", ["{{ raise_exception('no') }}", "{{ messages[9].content + 'x' }}", "{{ 1 + 'x' }}"]
    )
    def test_refusals(self, tokenizer, jinja):
        with pytest.raises(Unrenderable, match="refused_by_chat_template"):
            tokenizer.render_chat(CONVERSATION, chat_template=jinja)

    def test_the_sandbox_holds(self, tokenizer):
        for jinja in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
            try:
                text = tokenizer.render_chat(CONVERSATION, chat_template=jinja)
            except Unrenderable:
                continue
            assert "class" not in text

    def test_syntax_error_and_absence(self, tmp_path, tokenizer):
        with pytest.raises(ModelError, match="not Jinja that can be compiled"):
            tokenizer.render_chat(CONVERSATION, chat_template="{% for %}")
        folder = write_tokenizer(tmp_path)
        (folder / "tokenizer_config.json").write_text("{}")
        with pytest.raises(ModelError, match="has no chat template; choose one with --template"):
            Tokenizer.load(folder).render_chat(CONVERSATION)

    def test_named_templates(self, tmp_path):
        folder = write_tokenizer(tmp_path)
        named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.render_chat(CONVERSATION) == "plain" == tokenizer.chat_template
        assert tokenizer.render_chat(CONVERSATION, tools=[{"name": "f"}]) == "with tools"
