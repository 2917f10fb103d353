"""Each mutant of a plugin fails the one check that is about its mistake; every built-in plugin passes all of them."""

from __future__ import annotations

import itertools
import re
import sys
import textwrap
from pathlib import Path

import pytest
from fake_plugins import write_plugin

from corefit import PromptTemplate
from corefit.cli import main
from corefit.data.encode import make_encoder
from corefit.data.tokenizer import Tokenizer
from corefit.errors import ModelError, PluginError
from corefit.prepare import EMBEDDED
from corefit.registry import Registry
from corefit.scaffold import example
from corefit.testing import RULES, plugin_checks

EXAMPLE = Path(__file__).resolve().parents[1] / "plugin_example" / "corefit_example"
GOOD = (EXAMPLE / "__init__.py").read_text("utf-8")
TEMPLATE = r"""
import re
from corefit import PromptTemplate, Segment, Unrenderable

def render(item, tokenizer, options=None):
    if item.tools:
        raise Unrenderable("tools")
    for i, message in enumerate(item.messages):
        if message.tool_calls or message.reasoning:
            raise Unrenderable("no_place")
        if message.role not in ("system", "user", "assistant") or (message.role == "system" and i):
            raise Unrenderable("role")
        learnt = message.role == "assistant" and message.supervised is not False
        yield Segment("<|begin|>", control=True, turn=message.role == "user")
        yield Segment(message.role + "\n")
        yield Segment(message.content, learnt)
        yield Segment("<|end|>", learnt, control=True)
        yield Segment("\n")

JINJA = (
    "{% for m in messages %}{{ '<|begin|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}"
)

def corefit_prompt_templates():
    yield PromptTemplate(
        name="mutant", summary="", render=render, stop=("<|end|>",), control=("<|begin|>", "<|end|>"),
        chat_template=JINJA
    )
"""
QUANTIZER = """
import itertools
from corefit import Quantizer

COUNT = itertools.count(1)

def config(compute_dtype):
    return None

def after_load(model):
    pass

def corefit_quantizers():
    yield Quantizer(name="mutant", summary="", config=config, after_load=after_load)
"""
REPORTER = example("reporter", "mutant")
SPOILS = """
    import torch
    trained = []
    def spoil(head, *_):
        if trained and not torch.is_grad_enabled():
            head.weight.data.mul_(1.5)
    model.get_decoder().register_forward_hook(lambda *_: trained.append(1) if torch.is_grad_enabled() else None)
    model.get_output_embeddings().register_forward_hook(spoil)
"""
COUNT = ("from __future__ import annotations\n", "from __future__ import annotations\nimport itertools\n")
COUNT_TO = ("QUESTIONS =", "COUNT = itertools.count()\nQUESTIONS =")
NO_SEEK = ("seekable=True", "seekable=False")
Edits = tuple[tuple[str, str], ...]
MUTANTS: dict[str, dict[str, list[Edits]]] = {
    "plugin": {
        "loads, and nobody else claims its names": [
            (("KEYS: dict", "1 / 0\nKEYS: dict"),),
            (('Quantizer(name="example"', 'Quantizer(name="nf4"'),),
        ],
        "is imported without torch, transformers and numpy": [
            (("QUESTIONS =", "import numpy\nQUESTIONS ="),),
        ],
    },
    "reader": {
        "brings an example that it reads": [
            (("needs_path=False,\n        example=QUESTIONS,", ""),),
            (("example=QUESTIONS", 'example=b"no tab\\n"'),),
        ],
        "gives the same records twice": [
            (
                COUNT,
                COUNT_TO,
                NO_SEEK,
                ('"answer": answer}', '"answer": f"{answer}{next(COUNT)}"}'),
            ),
        ],
        "says where each record begins": [
            (
                NO_SEEK,
                ("file=file)", "file=0)"),
            ),
            (
                NO_SEEK,
                ("line=number,", "line=number - 1,"),
            ),
            (
                NO_SEEK,
                ("offset=offset,", "offset=0,"),
                ("line=number,", "line=1,"),
            ),
        ],
        "streams: the first records don't cost the whole file": [
            (("read=read,", "read=lambda *args, **more: iter(list(read(*args, **more))),"),),
        ],
        "holds no record longer than the limit": [
            (("lines.readline(sources.max_record_bytes + 1)", "lines.readline()"),),
        ],
        "yields what it can't read, and goes on": [
            (('return BadRecord(reason=f"byte {error.start + 1} is not UTF-8", **here)', "raise"),),
            (
                ('return BadRecord(reason=f"byte {error.start + 1} is not UTF-8", **here)', "return None"),
                ("elif line.strip():", "elif line.strip() and _record(line, here):"),
            ),
            (
                (
                    'yield _record(line.rstrip(b"\\r\\n"), here)',
                    'yield (found := _record(line.rstrip(b"\\r\\n"), here))\n'
                    "                    if isinstance(found, BadRecord):\n                        return",
                ),
            ),
        ],
        "begins at any record it is asked for": [
            (("lines.seek(start.offset)", "lines.seek(0)"),),
            (("number, offset = start.line - 1,", "number, offset = 0,"),),
        ],
        "fetches and indexes what it reads": [
            (("seekable=True,", "seekable=True, fetch=lambda sources, options, at: list(read(sources))[: len(at)],"),),
            (
                (
                    "seekable=True,",
                    "seekable=True, index=lambda sources, options: [r.position for r in read(sources)][1:],",
                ),
            ),
        ],
        "reads no further than a file's size when the run began": [
            (("seekable=True,", "seekable=True, bounded=True,"),),
        ],
        "closes its files": [
            (('with open(path, "rb") as lines:', 'for lines in [open(path, "rb")]:'),),
        ],
    },
    "map function": {
        "brings an example that it makes items of": [
            (('example={"question": "What is 1 + 1?", "answer": "2"},', ""),),
            (('"What is 1 + 1?", "answer": "2"', '"What is 1 + 1?", "answer": ""'),),
        ],
        "gives the same items twice": [
            (
                COUNT,
                COUNT_TO,
                ('Message("user", question)', 'Message("user", f"{question}{next(COUNT)}")'),
                ('fields=("question", "answer"),', ""),
            ),
        ],
        "changes no record": [
            (
                (
                    'question, answer = record.get("question")',
                    'record._fields["seen"] = True\n    question, answer = record.get("question")',
                ),
            ),
        ],
        "takes any record, and never raises": [
            (
                (
                    "if not isinstance(question, str) or not isinstance(answer, str):",
                    "if question is None or answer is None:",
                ),
            ),
            (('yield Drop("empty_answer")', 'yield Conversation((Message("critic", question),))'),),
        ],
        "drops nothing without a reason": [
            (('yield Drop("no_question_or_answer")', "return"),),
            (('yield Drop("empty_answer")', 'yield Drop(f"the answer is {answer!r}!")'),),
        ],
        "reads no field that it doesn't declare": [
            (('fields=("question", "answer"),', 'fields=("question",),'),),
        ],
        "recognises its own records, and looks at any": [
            (('set(record) == {"question", "answer"}', "False"),),
            (
                (
                    'set(record) == {"question", "answer"}',
                    'set(record) == {"question", "answer"} and record["question"] > ""',
                ),
            ),
        ],
        "recognises nobody else's records": [
            (('set(record) == {"question", "answer"}', "True"),),
        ],
    },
    "template": {
        "writes content as it is, and in order": [
            (("Segment(message.content,", 'Segment(message.content.replace("\\n\\n", "\\n"),'),),
            (
                ("Segment(message.content,", "Segment(message.content.strip(),"),
                ("m.content + '<|end|>", "(m.content | trim) + '<|end|>"),
            ),
        ],
        "supervises answers and their stops, nothing else": [
            (('message.role == "assistant" and message.supervised is not False', 'message.role != "system"'),),
            (('Segment(message.role + "\\n")', 'Segment(message.role + "\\n", learnt)'),),
            (('yield Segment("\\n")', 'yield Segment("\\n", learnt)'),),
            ((" and message.supervised is not False", ""),),
        ],
        "ends every answer with a supervised stop": [
            (('Segment("<|end|>", learnt, control=True)', 'Segment("<|end|>", control=True)'),),
            (('Segment("<|end|>", learnt, control=True)', 'Segment("<|end|>", learnt)'),),
        ],
        "stops at tokens that it declares": [
            (('stop=("<|end|>",)', 'stop=("<|end|>", "END")'),),
        ],
        "may be split between turns only": [
            (('turn=message.role == "user"', "turn=True"),),
        ],
        "begins with the BOS that it declares": [
            (("chat_template=JINJA", "chat_template=JINJA, bos=True"),),
        ],
        "writes a system message first and unsupervised, or refuses it": [
            (("        learnt =", '        if message.role == "system":\n            continue\n        learnt ='),),
        ],
        "writes or refuses whatever else a conversation holds": [
            (
                ('            raise Unrenderable("role")', "            continue"),
                ('("system", "user", "assistant") or', '("system", "user", "assistant") or i and'),
            ),
            (("message.tool_calls or message.reasoning", "message.tool_calls"),),
        ],
        "is not fooled by text that looks like its markers": [
            (
                (
                    "        yield Segment(message.content, learnt)\n",
                    '        for part in re.split(r"(<\\|end\\|>)", message.content):\n'
                    '            yield Segment(part, learnt, part == "<|end|>")\n',
                ),
            ),
        ],
        "writes control segments that are declared tokens": [
            (('control=("<|begin|>", "<|end|>")', 'control=("<|end|>",)'),),
        ],
        "writes in Jinja what it renders": [
            (("'<|end|>\\n' }}{% endfor %}", "'<|end|>' }}{% endfor %}"),),
            (("'<|begin|>assistant\\n'", "'<|begin|>'"),),
            (("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),),
        ],
    },
    "quantizer": {
        "loads a model in every compute dtype": [
            (("return None", 'return {"float16": None, "float32": None}[compute_dtype]'),),
        ],
        "trains a step, and the same step after an evaluation": [
            (("    pass\n", SPOILS),),
        ],
        "saves an adapter that loads and answers alike": [
            (("    pass\n", "    model.get_output_embeddings().weight.data.mul_(next(COUNT))\n"),),
        ],
    },
    "scheduler": {
        "gives a number for every progress in (0, 1]": [
            (("factor = (1 - progress) * (1 + progress)", "factor = 0 * (1 / (1 - progress)) + 0.5"),),
            (("factor = (1 - progress) * (1 + progress)", 'factor = (1 - progress) * (1 + progress) or float("nan")'),),
        ],
        "stays within 0 and 1": [
            (("(1 - progress) * (1 + progress)", "1.01 * (1 - progress) * (1 + progress)"),),
        ],
        "is a pure function": [
            (
                COUNT,
                COUNT_TO,
                ("(1 - progress) * (1 + progress)", "(1 - progress) / (1 + next(COUNT))"),
            ),
        ],
        "is not 0 where training goes on": [
            (("(1 - progress) * (1 + progress)", "(1 - progress) * (1 + progress) * (progress != 0.5)"),),
        ],
    },
    "recipe reader": {
        "brings an example that becomes a recipe": [
            (('example="rate = 1e-4\\nsteps = 10\\n",', ""),),
            (('example="rate = 1e-4', 'example="rate = -1'),),
        ],
        "says for every key where it was read": [
            (('        lines[f"{section}.{name}"] = where\n', ""),),
        ],
        "runs nothing that is in the file": [
            (("    notes: list[str] = []\n", '    notes: list[str] = []\n    exec("1")\n'),),
        ],
        "answers any file with a recipe or an error in words": [
            (("except ValueError as error:", "except ZeroDivisionError as error:"),),
        ],
    },
    "reporter": {
        "takes every event of a run, and of one that goes on": [
            (("folder = Path(event.folder)", "(folder := Path(event.folder)).joinpath('new').touch(exist_ok=False)"),),
        ],
        "takes the events of a run that fails": [
            ((" and event.loss is not None", ""), ("{event.loss}", "{event.loss:.3f}")),
        ],
        "lets events pass that it doesn't know": [
            (
                (
                    "    def tell(event: object) -> None:\n",
                    "    def tell(event: object) -> None:\n        event.__dataclass_fields__\n",
                ),
            ),
        ],
        "keeps up with a run": [
            ((" and event.loss is not None:", " and not __import__('time').sleep(0.11):"),),
        ],
        "draws no random numbers": [
            (("    folder = Path()", "    folder = Path(str(__import__('random').random()))"),),
            (
                (
                    "            folder = Path(event.folder)",
                    "            folder = Path(event.folder)\n            __import__('random').seed(0)",
                ),
            ),
        ],
    },
}
"""Kind -> what is promised -> edits of the code, each of which breaks this and nothing else."""
_numbers = itertools.count()


def edited(code: str, edits: Edits) -> str:
    for old, new in edits:
        assert code.count(old) == 1, (code.count(old), old)
        code = code.replace(old, new)
    return code


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Give a function that installs a module of this code as the plugin ``mutant``."""
    modules = []

    def write(code: str) -> None:
        modules.append(f"mutant_{next(_numbers)}")
        write_plugin(tmp_path, "corefit-mutant", code, module=modules[-1])
        (tmp_path / "questions.tsv").write_bytes((EXAMPLE / "questions.tsv").read_bytes())
        monkeypatch.syspath_prepend(str(tmp_path))

    yield write
    for module in modules:
        sys.modules.pop(module, None)


def failures(*kinds: str) -> dict[str, str]:
    """Run the mutant's checks that are about these kinds; give title -> reason."""
    found = {}
    for check in plugin_checks("mutant"):
        if check.subject.startswith(kinds):
            try:
                check()
            except AssertionError as error:
                found[check.title] = str(error)
    return found


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("kind", "title", "edits"),
    [
        pytest.param(kind, title, edits, id=f"{kind} {title} {n}")
        for kind, titles in MUTANTS.items()
        for title, all_edits in titles.items()
        for n, edits in enumerate(all_edits)
    ],
)
def test_a_mutant_fails_its_check_and_nothing_else(kind, title, edits, install):
    install(edited({"template": TEMPLATE, "quantizer": QUANTIZER, "reporter": REPORTER}.get(kind, GOOD), edits))
    found = failures("plugin", kind)
    assert list(found) == [title], found
    assert found[title] and "\n" not in found[title]


@pytest.mark.parametrize(
    "code", [GOOD, TEMPLATE, QUANTIZER, REPORTER], ids=["example", "template", "quantizer", "reporter"]
)
def test_what_mutants_are_made_of_fails_nothing(code, install):
    install(code)
    assert failures("") == {}


README = (Path(__file__).resolve().parents[2] / "plugins" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("number", [0, 1])
def test_the_template_that_plugins_readme_shows_in_strings_keeps_every_promise(number, install):
    call = re.findall(r"```python\n(yield PromptTemplate.+?)```", README, re.DOTALL)[number]
    install("from corefit import PromptTemplate\n\ndef corefit_prompt_templates():\n" + textwrap.indent(call, "    "))
    assert failures("") == {} and len(plugin_checks("mutant")) == 13 - number


@pytest.mark.parametrize(
    ("edits", "title"),
    [
        ((), None),
        # tools are looked at too, where a format has a place for them
        ((("+ m.content }}", "+ (m.content if m.role != 'tool' else '') }}"),), "writes in Jinja what it renders"),
        ((('stop=("<|end|>", "<|call|>")', 'stop=("<|end|>",)'),), "ends every answer with a supervised stop"),
    ],
)
def test_the_template_that_plugins_readme_shows_in_python_keeps_every_promise(edits, title, install):
    (module,) = re.findall(r"```python\n(from __future__.+?)```", README, re.DOTALL)
    install(edited(module, edits))
    assert title in failures("") if title else failures("") == {}


def test_plugins_readme_lists_the_checks():
    for kind in dict.fromkeys(rule.kind for rule in RULES):
        assert f"| {kind} | {'; '.join(rule.title for rule in RULES if rule.kind == kind)} |\n" in README


def test_every_check_has_a_mutant():
    titles = [(kind, title) for kind, titles in MUTANTS.items() for title in titles]
    assert titles == [(rule.kind, rule.title) for rule in RULES]


@pytest.mark.parametrize("name", [info.name for info in Registry.load().plugins if info.distribution == "corefit"])
def test_a_built_in_plugin_keeps_what_every_plugin_promises(name):
    missing = []
    for check in plugin_checks(name):
        try:
            check()
        except AssertionError as error:
            if not str(error).endswith("]'") or "which is not installed: pip install 'corefit[" not in str(error):
                raise AssertionError(f"{check}: {error}") from error
            missing.append(str(error))  # an extra
    if missing:
        pytest.skip(missing[0])


def test_the_command_prints_a_line_for_each_check(install, capsys):
    install(edited(TEMPLATE, (("'<|begin|>assistant\\n'", "'<|begin|>'"),)))
    assert main(["check", "mutant"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (failed,) = [line for line in lines if line.startswith("FAILED")]
    assert failed.startswith("FAILED  template mutant: writes in Jinja what it renders: to ask, chat_template says ")
    assert lines.count("ok      template mutant: ends every answer with a supervised stop") == 1
    assert lines.count("n/a     template mutant: begins with the BOS that it declares") == 1
    assert len(lines) == 2 + len(plugin_checks("mutant"))
    assert lines[-1] == f"{len(plugin_checks('mutant'))} checks, 1 failed; n/a: what the plugin doesn't have"
    assert main(["check", "chatml"]) == 0
    assert "checks, none failed" in capsys.readouterr().out.splitlines()[-1]


KESTREL = """
from corefit import PromptTemplate

def corefit_prompt_templates():
    yield PromptTemplate.from_strings(
        name="mutant", summary="answers between brackets", system="[SYS]{content}[/SYS]\\n",
        user="[U]{content}[/U]\\n[A]", assistant="[A]", suffix="[/A]", eos=True,
    )
"""


@pytest.mark.parametrize(
    ("edits", "title"),
    [
        ((), None),
        ((("eos=True", 'eos=True, stop=("[/A]",)'),), "stops at tokens that it declares"),
    ],
)
def test_an_answer_may_end_with_text_and_the_eos_behind_it(edits, title, install):
    install(edited(KESTREL, edits))
    assert list(failures("")) == ([title] if title else [])
    template = Registry.load().template("mutant")
    assert template.stop == (("[/A]",) if edits else ())
    if not edits:
        stop = make_encoder(template, Tokenizer.load(EMBEDDED / "model")).stop
        assert stop == ("</s>",)
        return
    with pytest.raises(ModelError, match=r"has the stop '\[/A\]', which is not one token of .*take it out of .*stop"):
        make_encoder(template, Tokenizer.load(EMBEDDED / "model"))


@pytest.mark.parametrize(
    ("edits", "title", "words"),
    [
        (
            (('Segment("<|end|>", learnt, control=True)', 'Segment("<|end|>", control=True)'),),
            "ends every answer with a supervised stop",
            "'<|end|>' is not supervised; write Segment('<|end|>', learnt, control=True)",
        ),
        (
            (('Segment("<|end|>", learnt, control=True)', 'Segment("<|end|>", learnt)'),),
            "ends every answer with a supervised stop",
            "'<|end|>' is text, not a segment with control=True",
        ),
        (
            (('Segment("<|begin|>", control', 'Segment("<|begln|>", control'), ("{{ '<|begin|>'", "{{ '<|begln|>'")),
            "writes control segments that are declared tokens",
            "render writes '<|begln|>' with control=True, which control doesn't name; is '<|begin|>' there a slip?",
        ),
        (
            (('Segment(message.role + "\\n")', 'message.role + "\\n"'),),
            "writes content as it is, and in order",
            "render yields 'user\\n'; expected a Segment",
        ),
        (
            (('stop=("<|end|>",)', 'stop="<|end|>"'),),
            "loads, and nobody else claims its names",
            "stop is text, and its",
        ),
    ],
)
def test_a_failed_check_says_what_to_change(edits, title, words, install):
    install(edited(TEMPLATE, edits))
    assert words in failures("")[title]


THINKING = (
    (
        "        if message.tool_calls or message.reasoning:",
        "        if message.tool_calls or (message.reasoning and message.role != 'assistant'):",
    ),
    (
        "        yield Segment(message.content, learnt)\n",
        "        if message.reasoning:\n"
        "            yield Segment(message.reasoning, learnt)\n"
        '            yield Segment("<|think|>", learnt, control=True)\n'
        "        yield Segment(message.content, learnt)\n",
    ),
    ('control=("<|begin|>", "<|end|>")', 'control=("<|begin|>", "<|end|>", "<|think|>")'),
    ("+ m.content +", "+ (m.reasoning_content + '<|think|>' if m.reasoning_content else '') + m.content +"),
)


@pytest.mark.parametrize(
    ("edits", "title", "words"),
    [
        ((), None, ""),
        (
            (("if m.reasoning_content else", "if m.bogus else"),),
            "writes in Jinja what it renders",
            "segments say ...",
        ),
        (
            (('stop=("<|end|>",)', 'stop=("<|end|>", "<|think|>")'),),
            "ends every answer with a supervised stop",
            "'<|think|>' is learnt at the end of a thought and is a stop: the model would never answer",
        ),
    ],
)
def test_a_format_of_thoughts(edits, title, words, install):
    install(edited(edited(TEMPLATE, THINKING), edits))
    found = failures("")
    assert list(found) == ([title] if title else []) and words in "".join(found.values())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(control=("<|imstart|>",)), "control has '<|imstart|>', which is in none of its strings"),
        (dict(control="[U]"), "template t: control is text, and its letters would be tokens: ('[U]',)"),
        (dict(start="<s>"), "start is text"),
    ],
)
def test_strings_that_cannot_be_meant_are_refused_at_once(how, words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        PromptTemplate.from_strings(name="t", summary="", user="[U]{content}[/U]", eos=True, **how)


def test_an_unknown_plugin_names_the_nearest(capsys):
    with pytest.raises(PluginError, match="no plugin 'chatlm'; did you mean 'chatml'"):
        plugin_checks("chatlm")
    assert main(["check", "chatlm"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_check_reads_as_what_it_is_about():
    assert "scheduler cosine: stays within 0 and 1" in map(str, plugin_checks("corefit"))
