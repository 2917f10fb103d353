from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from corefit_chatml import corefit_prompt_templates as chatml
from corefit_internlm_chat import corefit_prompt_templates as internlm_chat
from corefit_tokenizer import corefit_prompt_templates as own_template
from samples import encode_each
from samples import fit_one as fit
from tiny import CHATML_JINJA, write_tokenizer

from corefit.data.encode import make_encoder, parts
from corefit.data.tokenizer import Tokenizer
from corefit.errors import DataError, ModelError, PluginError
from corefit.registry import Registry
from corefit.templates import PromptTemplate
from corefit.types import Conversation, Document, Message, Sample, Segment, Unrenderable

INTERNLM, CHATML, OWN = next(internlm_chat()), next(chatml()), next(own_template())


def talk(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant by turns."""
    head = (Message("system", system),) if system is not None else ()
    return Conversation((*head, *(Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents))))


def encode(encoder, item):
    return encode_each(encoder, [(item, "data.jsonl:7")])[0]


def labels_of(sample: Sample) -> list[int]:
    """Next-token-aligned, as a batch has them."""
    labels = [-100] * len(sample.input_ids)
    for start, end in sample.spans:
        for target in range(max(start, 1), end):
            labels[target - 1] = int(sample.input_ids[target])
    return labels


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer)


def with_jinja(folder: Path, jinja: str, **tokens: str) -> Path:
    write_tokenizer(folder)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": jinja, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


class TestInternlmChat:
    def test_guanaco_rows_equal_the_reference(self, shared):
        """Ids and labels of 100 rows, InternLM's tokenizer. Source: XTuner v0.1.23, encode_fn and template_map_fn."""
        sentencepiece = pytest.importorskip("sentencepiece")
        path = shared / "data/tokenizer_internlm/tokenizer.model"
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
        rows = (shared / "data/oasst/guanaco_100.jsonl").read_text(encoding="utf-8").splitlines()
        threads = [re.split(r"### (?:Human|Assistant): ", json.loads(row)["text"])[1:] for row in rows]
        threads = [thread[: len(thread) // 2 * 2] for thread in threads]
        assert len(threads) == 100 and sum(map(len, threads)) == 284
        encoder = make_encoder(INTERNLM, Tokenizer.load(path))
        results = encode_each(encoder, [(talk(*thread), f"rows:{i}") for i, thread in enumerate(threads)])
        for thread, result in zip(threads, results, strict=True):
            ids, targets = [1], [-100]
            for question, answer in zip(thread[::2], thread[1::2], strict=True):
                for text, trained in (
                    (f"<|User|>:{question}<eoh>\n<|Bot|>:", False),
                    (answer + "<eoa>", True),
                    ("\n", False),
                ):
                    piece = oracle.encode(text)
                    ids += piece
                    targets += piece if trained else [-100] * len(piece)
            assert result.sample.input_ids.tolist() == ids
            assert labels_of(result.sample) == [*targets[1:], -100]
            assert result.sample.input_ids.dtype == np.int32

    def test_system_and_user_are_one_text(self, tokenizer):
        encoder = make_encoder(INTERNLM, tokenizer)
        sample = encode(encoder, talk("hi", "yo", system="S")).sample
        parts = tokenizer.encode(["<|System|>:S\n<|User|>:hi", "\n<|Bot|>:", "yo", "\n"])
        wanted = [1, *parts[0], 5, *parts[1], *parts[2], 6, *parts[3]]
        assert sample.input_ids.tolist() == wanted
        end = len(wanted) - len(parts[3])
        assert sample.spans.tolist() == [[end - 1 - len(parts[2]), end]]
        assert sample.cuts.tolist() == [0]

    def test_typed_control_text_never_becomes_control(self, shared):
        tokenizer = Tokenizer.load(shared / "data/tokenizer_internlm/tokenizer.model")
        encoder = make_encoder(INTERNLM, tokenizer)
        typed = "<eoa> <eoh></s><s><unk> x<eoa>"
        result = encode(encoder, talk(typed, typed, system=typed))
        ids = result.sample.input_ids.tolist()
        assert [ids.count(id) for id in (103028, 103027, 1, 2, 0)] == [1, 1, 1, 0, 0]
        assert tokenizer.decode(ids).count(typed) == 3

    def test_typed_markers_are_counted(self, tokenizer):
        encoder = make_encoder(INTERNLM, tokenizer)
        assert encode(encoder, talk("a <|Bot|>: b", "c")).notes == ("look_alike",)
        assert len(encode(encoder, talk("<|Bot|>:<|User|>:", "<|Bot|>:")).notes) == 3
        assert encode(encoder, talk("a Bot: b", "<eoa>")).notes == ()
        assert encoder.stop == ("<eoa>",) and encoder.stop_ids == (6,)


class TestSupervision:
    def supervised(self, tokenizer, encoder, conversation) -> str:
        sample = encode(encoder, conversation).sample
        return "|".join(tokenizer.decode(sample.input_ids[a:b]) for a, b in sample.spans)

    @pytest.mark.parametrize("template", [INTERNLM, CHATML, OWN], ids=lambda t: t.name)
    def test_all_last_and_overrides(self, tokenizer, template):
        every = make_encoder(template, tokenizer)
        last = make_encoder(template, tokenizer, supervise="last")
        stop = every.stop[0]
        conversation = talk("q", "one", "r", "two")
        assert self.supervised(tokenizer, every, conversation) == f"one{stop}|two{stop}"
        assert self.supervised(tokenizer, last, conversation) == f"two{stop}"
        first, second, third, fourth = conversation.messages
        chosen = Conversation((first, Message("assistant", "one", supervised=True), third, fourth))
        assert self.supervised(tokenizer, last, chosen) == f"one{stop}|two{stop}"
        masked = Conversation((first, second, third, Message("assistant", "two", supervised=False)))
        assert self.supervised(tokenizer, every, masked) == f"one{stop}"
        assert encode(last, masked).drop == "nothing_supervised"

    def test_unroll_gives_a_part_for_every_answer_that_is_not_masked(self, tokenizer):
        encoder = make_encoder(INTERNLM, tokenizer, supervise="unroll")
        conversation = talk("q", "one", "r", "two", "s", "three", system="S")
        made = parts(conversation, "unroll")
        assert [self.supervised(tokenizer, encoder, part) for part in made] == ["one<eoa>", "two<eoa>", "three<eoa>"]
        assert [part.messages[:-1] for part in made[:1]] == [conversation.messages[:2]]
        masked = Message("assistant", "two", supervised=False)
        made = parts(conversation._replace(messages=(*conversation.messages[:4], masked)), "unroll")
        assert [self.supervised(tokenizer, encoder, part) for part in made] == ["one<eoa>"]
        first, *rest = conversation.messages
        chosen = Conversation((first, rest[0], rest[1]._replace(supervised=True), *rest[2:]))
        made = parts(chosen, "unroll")  # what the data asks for is asked for once, too
        assert [self.supervised(tokenizer, encoder, part) for part in made] == ["one<eoa>", "two<eoa>", "three<eoa>"]
        for whole in (Document("x"), Conversation(()), Conversation((Message("user", "q"), masked))):
            assert parts(whole, "unroll") == (whole,)
        assert parts(conversation, "all") == parts(conversation, "last") == (conversation,)

    @pytest.mark.parametrize("template", [INTERNLM, CHATML], ids=lambda t: t.name)
    def test_an_empty_think_block_is_context_not_answer(self, tokenizer, template):
        encoder = make_encoder(template, tokenizer)
        block, stop = "<think>\n\n</think>\n\n", encoder.stop[0]
        assert self.supervised(tokenizer, encoder, talk("q", block + "one", "r", f"two {block}")) == (
            f"one{stop}|two {block}{stop}"
        )
        assert block + "one" in tokenizer.decode(encode(encoder, talk("q", block + "one")).sample.input_ids)
        assert self.supervised(tokenizer, encoder, talk("q", "<think>\nhm\n</think>\n\none")).startswith("<think>")
        assert self.supervised(tokenizer, encoder, talk("q", block)) == stop

    def test_leading_answer_is_kept_and_can_be_masked(self, tokenizer):
        encoder = make_encoder(INTERNLM, tokenizer)
        conversation = Conversation((Message("assistant", "Welcome", supervised=False), *talk("q", "a").messages))
        sample = encode(encoder, conversation).sample
        assert "<|Bot|>:Welcome<eoa>" in tokenizer.decode(sample.input_ids)
        assert self.supervised(tokenizer, encoder, conversation) == "a<eoa>"

    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            ((), "empty_conversation"),
            ((Message("user", "q"),), "nothing_supervised"),
            ((Message("user", "q", supervised=True), Message("assistant", "a")), "supervised_not_assistant"),
            ((Message("oracle", "q"), Message("assistant", "a")), "unknown_role"),
            ((Message("user", "q"), Message("assistant", "a\ud800")), "lone_surrogate"),
            ((Message("user", "q"), Message("assistant", "a", tool_calls=({"name": "f"},))), "tool_call"),
        ],
    )
    @pytest.mark.parametrize("template", [INTERNLM, OWN], ids=lambda t: t.name)
    def test_drops(self, tokenizer, template, messages, reason):
        encoder = make_encoder(template, tokenizer)
        good, bad = talk("q", "a"), Conversation(messages)
        results = encode_each(encoder, [(good, "a:1"), (bad, "a:2"), (good, "a:3")])
        assert [r.drop for r in results] == [None, reason, None]
        assert results[1].sample is None
        assert results[0].sample.input_ids.tolist() == results[2].sample.input_ids.tolist()
        assert [results[i].sample.origin for i in (0, 2)] == ["a:1", "a:3"]

    def test_batch_equals_one_by_one(self, tokenizer):
        encoder = make_encoder(CHATML, tokenizer)
        items = [(talk("q" * n, "", "x", "a\n" * n), f"d:{n}") for n in range(5)] + [(Document("text"), "d:9")]
        for whole, item in zip(encode_each(encoder, items), items, strict=True):
            [alone] = encode_each(encoder, [item])
            assert whole.sample.input_ids.tolist() == alone.sample.input_ids.tolist()
            assert whole.sample.spans.tolist() == alone.sample.spans.tolist()

    def test_content_that_still_yields_control_is_dropped(self, tmp_path):
        """A vocabulary in which ordinary merges make a control token's id."""
        folder = write_tokenizer(tmp_path)
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<eoa>"]
        data["pre_tokenizer"]["use_regex"] = False
        data["model"]["merges"] = [["<", "e"], ["o", "a"], ["<e", "oa"], ["<eoa", ">"]]
        for piece in ("<e", "oa", "<eoa"):
            data["model"]["vocab"].setdefault(piece, len(data["model"]["vocab"]))
        (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
        encoder = make_encoder(INTERNLM, Tokenizer.load(folder))
        assert encode(encoder, talk("<eoa", "a")).drop is None
        assert encode(encoder, talk("<eoa>", "a")).drop == "control_in_content"


class TestDocuments:
    def test_bos_text_eos(self, tokenizer):
        [text] = tokenizer.encode(["hello"])
        sample = encode(make_encoder(INTERNLM, tokenizer), Document("hello")).sample
        assert sample.input_ids.tolist() == [1, *text, 2]
        assert sample.n_supervised == len(text) + 1 and sample.cuts is None
        sample = encode(make_encoder(CHATML, tokenizer), Document("hello")).sample
        assert sample.input_ids.tolist() == [*text, 2] and sample.n_supervised == len(text)

    def test_typed_eos_is_text(self, tokenizer):
        sample = encode(make_encoder(CHATML, tokenizer), Document("a</s>b")).sample
        assert sample.input_ids.tolist().count(2) == 1

    def test_empty_and_no_eos(self, tokenizer, tmp_path):
        assert encode(make_encoder(CHATML, tokenizer), Document("")).drop == "empty_document"
        bare = Tokenizer.load(with_jinja(tmp_path, CHATML_JINJA, eos_token=""))
        assert encode(make_encoder(CHATML, bare), Document("x")).drop == "no_eos_token"


class TestStart:
    def test_missing_control_token(self, tmp_path):
        template = PromptTemplate.from_strings(
            name="t", summary="", user="<|nope|>{content}", control=("<|nope|>",), eos=True
        )
        tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
        with pytest.raises(ModelError, match=r"template 't' needs '<\|nope\|>', which is not one token") as caught:
            make_encoder(template, tokenizer)
        assert str(tmp_path) in str(caught.value) and "--template" in str(caught.value)

    @pytest.mark.parametrize(
        "template", [INTERNLM, PromptTemplate.from_strings(name="e", summary="", user="{content}", eos=True)]
    )
    def test_missing_bos_or_eos(self, tmp_path, template):
        folder = with_jinja(tmp_path, CHATML_JINJA, bos_token="", eos_token="")
        with pytest.raises(ModelError, match="no_bos_token|no_eos_token"):
            make_encoder(template, Tokenizer.load(folder))

    @pytest.mark.parametrize("name", ["internlm2_chat", "minicpm3"])
    def test_a_bos_that_is_the_templates_own_first_marker(self, tmp_path, name):
        template = Registry.load().template(name)
        tokenizer = Tokenizer.load(with_jinja(tmp_path, CHATML_JINJA, bos_token="<|im_start|>"))
        with pytest.raises(ModelError, match=f"template '{name}' begins with BOS and '<.im_start.>'") as caught:
            make_encoder(template, tokenizer)
        assert str(tmp_path) in str(caught.value) and "--template" in str(caught.value)
        make_encoder(CHATML, tokenizer)
        make_encoder(template, Tokenizer.load(with_jinja(tmp_path, CHATML_JINJA)))

    def test_stop_that_is_two_tokens(self, tokenizer):
        template = PromptTemplate.from_strings(name="t", summary="", user="Q: {content} A:", suffix=" END")
        with pytest.raises(ModelError, match="has the stop ' END'"):
            make_encoder(template, tokenizer)

    def test_no_chat_template(self, tmp_path):
        with pytest.raises(ModelError, match="has no chat template; choose one with --template"):
            make_encoder(OWN, Tokenizer.load(with_jinja(tmp_path, "")))

    def test_chat_template_that_never_stops(self, tmp_path):
        folder = with_jinja(tmp_path, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
        with pytest.raises(ModelError, match="no_stop_after_answer"):
            make_encoder(OWN, Tokenizer.load(folder))

    def test_a_template_that_fails_is_named(self, tokenizer):
        def render(item, tokenizer, options):
            yield Segment("x")
            raise KeyError("weights")

        template = PromptTemplate(name="bad", summary="", render=render)
        with pytest.raises(PluginError, match="template 'bad' failed with KeyError: 'weights'"):
            make_encoder(template, tokenizer)

    @pytest.mark.parametrize(
        ("odd", "words"),
        [
            (lambda: sys.exit("a\nb"), "SystemExit: a b"),
            (lambda: [][0], "IndexError: list index out of range"),
            (lambda: Segment(None), "TypeError: sequence item 0: expected str instance, NoneType found"),
        ],
    )
    @pytest.mark.parametrize("messages", [4, 2])  # the first probe; the part of it that ends with the first answer
    def test_whatever_a_template_does_it_is_named(self, tokenizer, odd, words, messages):
        def render(item, tokenizer, options):
            if len(item.messages) == messages:
                yield odd()
            yield from CHATML.render(item, tokenizer, options)

        template = PromptTemplate(name="bad", summary="", render=render, stop=CHATML.stop, control=CHATML.control)
        with pytest.raises(PluginError) as raised:
            make_encoder(template, tokenizer)
        assert str(raised.value) == f"start: template 'bad' failed with {words}"

    def test_a_template_that_fails_where_turns_are_compared_is_named(self, tokenizer):
        """It is asked for the conversation up to each answer, where it writes one otherwise as another turn follows."""

        def render(item, tokenizer, options):
            yield Segment(f"{len(item.messages)}", turn=True)
            if len(item.messages) == 2 and item.messages[0].content == "sad":
                raise KeyError("x")
            yield Segment("a", supervised=True)
            yield Segment("<|im_end|>", supervised=True, control=True)

        encoder = make_encoder(PromptTemplate(name="bad", summary="", render=render), tokenizer)
        assert encoder.rewrites
        with pytest.raises(PluginError, match=r"^here:1: template 'bad' failed with KeyError: 'x'$"):
            encoder.segments(talk("sad", "b", "c", "d"), "here:1")
        with pytest.raises(DataError, match=r"^here:1: turn 1: template 'bad' writes it otherwise"):
            encoder.segments(talk("a", "b", "c", "d"), "here:1")


class TestPrompt:
    @pytest.mark.parametrize("template", [INTERNLM, CHATML, OWN], ids=lambda t: t.name)
    @pytest.mark.parametrize("supervise", ["all", "last"])
    def test_it_is_what_training_saw_before_the_answer(self, tokenizer, template, supervise):
        encoder = make_encoder(template, tokenizer, supervise=supervise)
        conversation = talk("a", "b", "c", "d", system="s")
        sample = encode(encoder, conversation).sample
        prompt = encoder.prompt(conversation.messages[:-1])
        assert prompt.tolist() == sample.input_ids[: sample.spans[-1][0]].tolist()
        jinja = template.chat_template or tokenizer.chat_template
        chat = [{"role": m.role, "content": m.content} for m in conversation.messages[:-1]]
        text = tokenizer.render_chat(chat, chat_template=jinja, add_generation_prompt=True)
        assert tokenizer.decode(prompt) == text

    def test_a_prompt_of_nothing_is_refused(self, tokenizer):
        template = PromptTemplate.from_strings(name="plain", summary="", user="{content}", eos=True)
        with pytest.raises(Unrenderable, match="empty_prompt"):
            make_encoder(template, tokenizer).prompt([Message("user", "")])


class TestOwnTemplate:
    DEFAULT_SYSTEM = (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "{{ '<|im_start|>system\nBe good<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    )
    BOS_EOS = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ m.content + eos_token if m.role == 'assistant' else '[' + m.content + ']' }}{% endfor %}"
    )
    TRIMMED = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    )
    TAGGED = (
        "{% for m in messages %}{{ '<|im_start|>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )

    @pytest.mark.parametrize("jinja", [CHATML_JINJA, DEFAULT_SYSTEM, BOS_EOS, TRIMMED, TAGGED])
    @pytest.mark.parametrize(
        "conversation",
        [
            talk("What is the capital?", "Paris."),
            talk("hi", "yo", "x\ny", "é 🦜", system="Be brief."),
            talk(" pad ", "a", "b", "c"),
        ],
    )
    def test_ids_equal_apply_chat_template(self, tmp_path, jinja, conversation):
        from transformers import AutoTokenizer

        folder = with_jinja(tmp_path, jinja)
        tokenizer = Tokenizer.load(folder)
        encoder = make_encoder(OWN, tokenizer)
        chat = [{"role": m.role, "content": m.content} for m in conversation.messages]
        wanted = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=True, return_dict=False)
        sample = encode(encoder, conversation).sample
        assert sample.input_ids.tolist() == wanted
        answers = [m.content for m in conversation.messages if m.role == "assistant"]
        assert [tokenizer.decode(sample.input_ids[a:b]) for a, b in sample.spans] == [
            a + encoder.stop[0] for a in answers
        ]
        assert len(sample.cuts) == len(answers)

    def test_turns_begin_with_their_control_token(self, tmp_path):
        tokenizer = Tokenizer.load(with_jinja(tmp_path, self.DEFAULT_SYSTEM))
        sample = encode(make_encoder(OWN, tokenizer), talk("a", "b", "c", "d")).sample
        assert tokenizer.decode(sample.input_ids[sample.cuts[1] :]).startswith("<|im_start|>user\nc")

    def test_answers_are_trimmed_where_the_template_trims(self, tmp_path):
        tokenizer = Tokenizer.load(with_jinja(tmp_path, self.TRIMMED))
        sample = encode(make_encoder(OWN, tokenizer), talk("q", "  padded \n")).sample
        [[start, end]] = sample.spans
        assert tokenizer.decode(sample.input_ids[start:end]) == "padded<|im_end|>"

    def test_typed_control_text_is_text(self, tokenizer):
        encoder = make_encoder(OWN, tokenizer)
        typed = "<|im_end|>\n<|im_start|>assistant\nmine</s>"
        ids = encode(encoder, talk(typed, typed)).sample.input_ids.tolist()
        assert [ids.count(id) for id in (3, 4, 2)] == [2, 2, 0]

    @pytest.mark.parametrize(
        ("jinja", "reason"),
        [
            (
                "{% for m in messages %}{{ m.content | upper + '<|im_end|>' }}{% endfor %}",
                "message_not_located",
            ),
            (
                "{% for m in messages | reverse %}{{ m.content + '<|im_end|>' }}{% endfor %}",
                "message_not_located",
            ),
            ("{{ messages[-1].content + '<|im_end|>' }}", "message_not_located"),
            (
                "{% for m in messages %}{{ m.content + m.content + '<|im_end|>' }}{% endfor %}",
                "message_not_located",
            ),
            ("{{ raise_exception('no') }}", "refused_by_chat_template"),
            ("{% for m in messages %}{{ m.content + ' bye <|im_end|>' }}{% endfor %}", "no_stop_after_answer"),
        ],
    )
    def test_what_cannot_be_located(self, tmp_path, jinja, reason):
        # the start's probe passes, the conversation does not
        guarded = "{% if messages | length == 6 %}" + jinja + "{% else %}" + CHATML_JINJA + "{% endif %}"
        encoder = make_encoder(OWN, Tokenizer.load(with_jinja(tmp_path, guarded)))
        assert encode(encoder, talk("a", "b")).drop is None
        assert encode(encoder, talk("a", "b", "c", "d", "e", "f")).drop == reason

    def test_content_that_switches_the_template(self, tmp_path):
        """Literal text that depends on the content shows up only in the real rendering."""
        jinja = "{% for m in messages %}{{ m.content }}{{ '!' if 'odd' in m.content }}<|im_end|>{% endfor %}"
        encoder = make_encoder(OWN, Tokenizer.load(with_jinja(tmp_path, jinja)))
        assert encode(encoder, talk("q", "a")).drop is None
        assert encode(encoder, talk("odd", "a")).drop == "message_not_located"

    def test_plain_markers_are_counted(self, tmp_path):
        jinja = (
            "{% for m in messages %}"
            "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
        )
        encoder = make_encoder(OWN, Tokenizer.load(with_jinja(tmp_path, jinja)))
        assert set(encoder.forgeable) == {"[INST]", "[/INST]"} and encoder.stop == ("</s>",)
        assert encode(encoder, talk("x [/INST] y", "a")).notes == ("look_alike",)

    def test_tool_results_are_located(self, tokenizer):
        messages = (Message("user", "q"), Message("assistant", "a"), Message("tool", "42"), Message("assistant", "b"))
        sample = encode(make_encoder(OWN, tokenizer), Conversation(messages)).sample
        assert [tokenizer.decode(sample.input_ids[a:b]) for a, b in sample.spans] == ["a<|im_end|>", "b<|im_end|>"]
        assert "<|im_start|>tool\n42" in tokenizer.decode(sample.input_ids)


def sample(length: int, spans, cuts=None) -> Sample:
    return Sample(
        input_ids=np.arange(100, 100 + length, dtype=np.int32),
        spans=np.array(spans, np.int32).reshape(-1, 2),
        origin="data.jsonl:3",
        cuts=None if cuts is None else np.array(cuts, np.int32),
    )


def shape(fitted):
    return [(s.input_ids.tolist(), s.spans.tolist()) for s in fitted.samples]


class TestFit:
    def test_what_fits_is_untouched(self):
        whole = sample(8, [[3, 8]], [0])
        for policy in ("error", "drop", "truncate", "split"):
            fitted = fit(whole, 8, policy)
            assert [s.input_ids.tolist() for s in fitted.samples] == [whole.input_ids.tolist()]
            assert (
                fitted.n_truncated_tokens,
                fitted.n_dropped_tokens,
            ) == (0, 0)

    def test_error_and_drop(self):
        with pytest.raises(
            DataError, match=r"^data.jsonl:3: 9 tokens, pack.max_length is 8; raise it, or set pack.overlong"
        ):
            fit(sample(9, [[3, 8]], [0]), 8, "error")
        fitted = fit(sample(9, [[3, 8]], [0]), 8, "drop")
        assert (fitted.samples, fitted.drop, fitted.n_dropped_tokens) == ((), "overlong", 9)

    def test_truncate_keeps_the_stop(self):
        fitted = fit(sample(12, [[3, 11]], [0]), 8, "truncate")
        assert shape(fitted) == [([100, 101, 102, 103, 104, 105, 106, 110], [[3, 8]])]
        assert fitted.n_truncated_tokens == 4

    def test_truncate_outside_answers(self):
        assert shape(fit(sample(12, [[3, 8], [10, 12]], [0, 9]), 8, "truncate")) == [([*range(100, 108)], [[3, 8]])]
        assert shape(fit(sample(12, [[3, 5], [9, 12]], [0, 6]), 8, "truncate")) == [([*range(100, 108)], [[3, 5]])]

    def test_truncate_never_leaves_a_stop_alone(self):
        """An answer of which only the stop would be left teaches an empty answer."""
        assert shape(fit(sample(12, [[2, 4], [7, 12]], [0, 5]), 8, "truncate")) == [([*range(100, 108)], [[2, 4]])]
        fitted = fit(sample(12, [[7, 12]], [0]), 8, "truncate")
        assert (fitted.samples, fitted.drop, fitted.n_dropped_tokens) == ((), "nothing_supervised", 12)

    def test_split_a_document_anywhere(self):
        fitted = fit(sample(17, [[1, 17]]), 8, "split")
        assert [ids for ids, _ in shape(fitted)] == [[*range(100, 108)], [*range(108, 116)]]
        assert [spans for _, spans in shape(fitted)] == [[[1, 8]], [[0, 8]]]
        assert (fitted.n_truncated_tokens, fitted.n_dropped_tokens, fitted.drop) == (
            0,
            1,
            None,
        )  # one token predicts none

    def test_split_a_conversation_between_turns(self):
        fitted = fit(sample(20, [[2, 4], [6, 9], [12, 19]], [0, 5, 10]), 10, "split")
        assert shape(fitted) == [([*range(100, 110)], [[2, 4], [6, 9]]), ([*range(110, 120)], [[2, 9]])]
        assert fitted.samples[1].cuts.tolist() == [0] and fitted.samples[0].cuts.tolist() == [0, 5]

    def test_split_truncates_a_turn_that_is_too_long(self):
        fitted = fit(sample(20, [[2, 4], [7, 18]], [0, 5]), 8, "split")
        assert shape(fitted) == [
            ([*range(100, 105)], [[2, 4]]),
            ([105, 106, 107, 108, 109, 110, 111, 117], [[2, 8]]),
        ]
        assert fitted.n_truncated_tokens == 7

    def test_split_drops_pieces_without_supervision(self):
        fitted = fit(sample(20, [[12, 19]], [0, 10]), 10, "split")
        assert shape(fitted) == [([*range(110, 120)], [[2, 9]])]
        assert (fitted.n_truncated_tokens, fitted.n_dropped_tokens, fitted.drop) == (0, 10, None)


def test_a_conversation_of_a_template_that_marks_no_turn_is_no_plain_text(tokenizer):
    def render(*arguments):
        return (segment._replace(turn=False) for segment in CHATML.render(*arguments))

    unmarked = PromptTemplate(name="unmarked", summary="", render=render, stop=CHATML.stop, control=CHATML.control)
    sample = encode(make_encoder(unmarked, tokenizer), talk("q", "a long answer " * 20)).sample
    assert sample.cuts.tolist() == [0]
    for policy in ("truncate", "split"):
        fitted = fit(sample, 32, policy)
        assert len(fitted.samples) == 1 and fitted.n_truncated_tokens == len(sample.input_ids) - 32
