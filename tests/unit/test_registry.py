from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import fake_plugins
import pytest
from fake_plugins import scheduler, write_plugin

from corefit import hookspecs
from corefit.errors import PluginError
from corefit.registry import DISABLE, KINDS, PluginInfo, Registry
from corefit.scaffold import example
from corefit.types import Record, Sources


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder on ``sys.path``; modules imported from it are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.delenv(DISABLE, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def info(registry: Registry, name: str) -> PluginInfo:
    (found,) = [plugin for plugin in registry.plugins if plugin.name == name]
    return found


def refusal(ask, *args) -> str:
    with pytest.raises(PluginError) as caught:
        ask(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_come_in_as_a_plugin():
    registry = Registry.load()
    plugin = info(registry, "corefit")
    assert plugin.error is None
    assert (plugin.distribution, plugin.module) == ("corefit", "corefit.defaults")
    assert plugin.entries == {
        "reader": ("jsonl",),
        "quantizer": ("int8", "nf4", "none"),
        "scheduler": ("constant", "cosine", "linear", "wsd"),
        "reporter": ("progress", "report.html"),
    }
    assert registry.reader("jsonl").name == "jsonl"
    assert registry.provider("quantizer", "nf4") is plugin


def test_a_stranger_contributes_without_a_decorator(site):
    write_plugin(site, "corefit-x", scheduler("half"), version="2.5")
    registry = Registry.load()
    assert registry.scheduler("half").factor(0.1, 0.0) == 0.5
    assert registry.provider("scheduler", "half").source == "corefit-x 2.5"
    assert info(registry, "x").entries == {"scheduler": ("half",)}


def test_nothing_depends_on_the_order_of_installation(site):
    for name in "qzbya":
        write_plugin(site, f"corefit-{name}", scheduler(name * 2))
    registry = Registry.load()
    names = [plugin.name for plugin in registry.plugins]
    assert names == sorted(names) and set("qzbya") < set(names)
    assert list(registry.entries["scheduler"]) == sorted(registry.entries["scheduler"])


def test_a_marked_implementation_may_have_another_name(site):
    code = scheduler("half").replace("def corefit_schedulers", "def mine") + (
        "\n        from corefit import hookimpl\n        mine = hookimpl(specname='corefit_schedulers')(mine)\n"
    )
    write_plugin(site, "corefit-x", code)
    assert "half" in Registry.load().entries["scheduler"]


def test_an_entry_point_may_name_an_object(site):
    code = """
        from corefit import Scheduler

        class Plugin:
            def corefit_schedulers(self):
                return [Scheduler(name="half", summary="", factor=lambda progress, warmup: 0.5)]

        plugin = Plugin()
    """
    write_plugin(site, "corefit-x", code, points={"x": "corefit_x:plugin"})
    assert "half" in Registry.load().entries["scheduler"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (fake_plugins.BROKEN, "importing 'corefit_bad' raised ModuleNotFoundError: No module named"),
        (fake_plugins.EXITS, "importing 'corefit_bad' raised SystemExit: bye"),
        ("def (", "importing 'corefit_bad' raised SyntaxError"),
        (fake_plugins.RAISES_IN_HOOK, "corefit_schedulers() raised ValueError: no luck"),
        (fake_plugins.WRONG_TYPE, "corefit_schedulers() yields {'name': 'dict'}, a dict; expected Scheduler"),
        (fake_plugins.FORGOT_YIELD, "corefit_schedulers() gives None; expected to yield Schedulers"),
        (fake_plugins.MISSPELT, "no hook 'corefit_sheduler'; did you mean 'corefit_schedulers'? known: "),
        (fake_plugins.TAKES_ARGUMENTS, "registering 'corefit_bad' raised PluginValidationError: "),
        (
            "from corefit import hookimpl\n@hookimpl(wrapper=True)\ndef corefit_schedulers():\n    return (yield)\n",
            "corefit_schedulers: a hook can't be wrapped",
        ),
        (
            "class E(Exception):\n    def __str__(self):\n        raise SystemError\nraise E\n",
            "importing 'corefit_bad' raised E: (no text)",
        ),
        (scheduler("a b"), "corefit_schedulers() yields the name 'a b'; expected letters"),
        (scheduler("half").replace("'half'", "7"), "corefit_schedulers() yields the name 7; expected letters"),
        (scheduler("half").replace('"half the rate"', "None"), "with summary None; expected one line of text"),
        (
            scheduler("half").replace("factor=lambda progress, warmup: 0.5", "factor=0.5"),
            "with factor 0.5; expected a function",
        ),
        (scheduler("half").replace('"half the rate"', '"two\\nlines"'), "expected one line of text"),
        ("def corefit_schedulers():\n    return corefit_schedulers()\n", "corefit_schedulers() raised RecursionError"),
        (
            textwrap.dedent(scheduler("half")) + "    yield from corefit_schedulers()\n",
            "corefit_schedulers() yields scheduler 'half' twice",
        ),
        (
            "from corefit import MapFunction\n"
            "class Options: pass\n"
            "def corefit_map_functions():\n"
            "    yield MapFunction(name='m', summary='', map=print, options=Options)\n",
            "yields 'm' with options <class 'corefit_bad.Options'>; expected a frozen dataclass",
        ),
        (
            "from corefit import MapFunction\n"
            "def corefit_map_functions():\n"
            "    yield MapFunction(name='m', summary='', map=print, fields='question')\n",
            "corefit_map_functions() yields 'm' with fields 'question'; expected a tuple of text",
        ),
        (
            "from corefit import MapFunction\n"
            "def corefit_map_functions():\n"
            "    yield MapFunction(name='m', summary='', map=print, sniff=True)\n",
            "corefit_map_functions() yields 'm' with sniff True; expected a function or None",
        ),
        (
            "from corefit import DatasetReader\n"
            "def corefit_dataset_readers():\n"
            "    yield DatasetReader(name='r', summary='', read=print, suffixes='.jsonl')\n",
            "corefit_dataset_readers() yields 'r' with suffixes '.jsonl'; expected a tuple of text",
        ),
        (
            "from corefit import DatasetReader\n"
            "def corefit_dataset_readers():\n"
            "    yield DatasetReader(name='r', summary='', read=print, suffixes=None)\n",
            "corefit_dataset_readers() yields 'r' with suffixes None; expected a tuple of text",
        ),
        (
            "from corefit import PromptTemplate\n"
            "def corefit_prompt_templates():\n"
            "    yield PromptTemplate(name='t', summary='', render=print, chat_template=5)\n",
            "corefit_prompt_templates() yields 't' with chat_template 5; expected text or None",
        ),
        (
            "from corefit import PromptTemplate\n"
            "def corefit_prompt_templates():\n"
            "    yield PromptTemplate(name='t', summary='', render=print, bos='first')\n",
            "corefit_prompt_templates() yields 't' with bos 'first'; expected True or False",
        ),
        (
            "from corefit import DatasetReader\n"
            "def corefit_dataset_readers():\n"
            "    yield DatasetReader(name='r', summary='', read=print, example='a b')\n",
            "corefit_dataset_readers() yields 'r' with example 'a b'; expected bytes or a Path or None",
        ),
        (
            "from corefit import Reporter\n"
            "def corefit_reporters():\n"
            "    yield Reporter(name='r', summary='', open=print, needs={1: 'x'})\n",
            "corefit_reporters() yields 'r' with needs {1: 'x'}; expected a mapping from text",
        ),
        (
            "from corefit import PromptTemplate\n"
            "def corefit_prompt_templates():\n"
            "    yield PromptTemplate(name='t', summary='', render=print, control=(1, 2))\n",
            "corefit_prompt_templates() yields 't' with control (1, 2); expected a tuple of text",
        ),
        (
            "from corefit import MapFunction\nfrom dataclasses import dataclass\n"
            "@dataclass\nclass Options: pass\n"
            "def corefit_map_functions():\n"
            "    yield MapFunction(name='m', summary='', map=print, options=Options)\n",
            "expected a frozen dataclass",
        ),
    ],
)
def test_a_broken_plugin_is_listed_and_fatal_only_when_asked_for(site, code, reason):
    write_plugin(site, "corefit-bad", code, version="0.3")
    registry = Registry.load()
    plugin = info(registry, "bad")
    assert plugin.error is not None and reason in plugin.error and "\n" not in plugin.error
    assert not plugin.entries
    assert registry.scheduler("cosine").name == "cosine"
    asked = refusal(registry.scheduler, "bad")
    assert asked.startswith("plugin 'bad' (corefit-bad 0.3) can't be used: ") and reason in asked
    other = refusal(registry.scheduler, "quite_another")
    assert "no scheduler 'quite_another'" in other and "'bad' (corefit-bad 0.3)" in other and reason in other


def test_a_plugin_that_yields_a_good_entry_and_then_a_bad_one_contributes_nothing(site):
    write_plugin(site, "corefit-bad", textwrap.dedent(scheduler("half")) + "    yield None\n")
    registry = Registry.load()
    assert "half" not in registry.entries["scheduler"]
    assert "corefit-bad 1.0" in refusal(registry.scheduler, "half")


def test_a_keyboard_interrupt_is_the_users(site):
    write_plugin(site, "corefit-bad", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        Registry.load()


def test_what_the_plugin_raised_is_the_cause(site):
    write_plugin(site, "corefit-bad", fake_plugins.BROKEN)
    with pytest.raises(PluginError) as caught:
        Registry.load().map_function("bad")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_name_claimed_twice_is_refused_whatever_the_order(site):
    write_plugin(site, "corefit-a", scheduler("half"), version="1.1")
    write_plugin(site, "zzz-other", scheduler("half"), version="2.2", name="z")
    registry = Registry.load()
    for ask in (registry.scheduler, lambda name: registry.provider("scheduler", name)):
        words = refusal(ask, "half")
        assert "'a' (corefit-a 1.1)" in words and "'z' (zzz-other 2.2)" in words
    assert "half" not in registry.entries["scheduler"]
    assert info(registry, "a").clashes == ("scheduler 'half' is claimed by plugin 'z' (zzz-other 2.2) too",)
    assert info(registry, "z").clashes == ("scheduler 'half' is claimed by plugin 'a' (corefit-a 1.1) too",)


def test_a_stranger_cannot_replace_a_default(site):
    write_plugin(site, "aaa-evil", scheduler("cosine"), name="evil")
    registry = Registry.load()
    assert "aaa-evil 1.0" in refusal(registry.scheduler, "cosine")
    assert registry.scheduler("linear").name == "linear"
    assert Registry.load(disabled=["evil"]).scheduler("cosine").factor(0.5, 0.0) == pytest.approx(0.5)


def test_one_name_in_two_kinds_is_no_clash(site):
    code = textwrap.dedent(scheduler("x")) + (
        "def corefit_quantizers():\n"
        "    from corefit import Quantizer\n"
        "    yield Quantizer(name='x', summary='', config=lambda compute_dtype: None)\n"
    )
    write_plugin(site, "corefit-x", code)
    registry = Registry.load()
    assert registry.provider("quantizer", "x") is registry.provider("scheduler", "x")


def test_two_plugins_of_one_name_are_both_refused_and_not_imported(site):
    code = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n"
    write_plugin(site, "aaa-evil", code, name="chatml")
    registry = Registry.load()
    evil, mine = (plugin for plugin in registry.plugins if plugin.name == "chatml")
    assert (evil.distribution, mine.distribution) == ("aaa-evil", "corefit")
    assert "aaa-evil 1.0 has a plugin of this name too" in str(mine.error)
    assert "corefit 0.1.0 has a plugin of this name too" in str(evil.error)
    assert "has a plugin of this name too" in refusal(registry.template, "chatml")
    assert not (site / "aaa_evil.ran").exists()


def test_a_distribution_twice_on_the_path_counts_once(site, tmp_path, monkeypatch):
    write_plugin(tmp_path / "old", "corefit-x", scheduler("old"), version="0.9")
    monkeypatch.syspath_prepend(str(site))
    sys.path.append(str(tmp_path / "old"))
    write_plugin(site, "Corefit_X", scheduler("new"), name="x", module="corefit_x", version="1.1")
    try:
        registry = Registry.load()
    finally:
        sys.path.remove(str(tmp_path / "old"))
    assert info(registry, "x").source == "corefit-x 1.1"
    assert "new" in registry.entries["scheduler"] and "old" not in registry.entries["scheduler"]


def test_a_torn_entry_points_file_hurts_its_owner_alone(site):
    write_plugin(site, "someone-else", entry_points_txt="[console_scripts]\nno equals sign\n")
    write_plugin(site, "corefit-torn", entry_points_txt="[corefit]\nno equals sign\n")
    write_plugin(site, "corefit-x", scheduler("half"))
    registry = Registry.load()
    assert "half" in registry.entries["scheduler"]
    assert "entry_points.txt can't be read" in str(info(registry, "corefit-torn").error)
    assert not [plugin for plugin in registry.plugins if plugin.distribution == "someone-else"]


def test_disabling_by_variable(site, monkeypatch):
    write_plugin(site, "corefit-x", scheduler("half"))
    monkeypatch.setenv(DISABLE, " x , chatml")
    registry = Registry.load()
    assert registry.disabled == ("chatml", "x")
    assert "left out by COREFIT_DISABLE_PLUGINS: chatml, x" in refusal(registry.scheduler, "half")
    monkeypatch.setenv(DISABLE, "*")
    assert [plugin.name for plugin in Registry.load().plugins] == ["corefit"]
    monkeypatch.setenv(DISABLE, "chatm")
    assert refusal(Registry.load).startswith(f"{DISABLE}: no plugin 'chatm'; did you mean 'chatml'? known: ")
    monkeypatch.setenv(DISABLE, "corefit")
    assert "can't be disabled" in refusal(Registry.load)


def test_an_unknown_name_gives_the_nearest_and_all():
    words = refusal(Registry.load().quantizer, "nf5")
    assert words.startswith("no quantizer 'nf5'; did you mean 'nf4'? known: int8, nf4, none")


def test_the_kinds_are_the_hooks():
    hooks = {name for name in vars(hookspecs) if name.startswith("corefit_")}
    assert {kind.hook for kind in KINDS.values()} == hooks


@pytest.mark.parametrize("kind", KINDS)
def test_the_plugin_in_every_docstring_works(site, kind):
    write_plugin(site, "corefit-doc", "from __future__ import annotations\n" + example(kind, "mine"))
    registry = Registry.load()
    plugin = info(registry, "doc")
    assert plugin.error is None and plugin.entries == {kind: ("mine",)}


def test_the_docstring_reader_and_map_function_read_and_map(site, tmp_path):
    future = "from __future__ import annotations\n"
    write_plugin(site, "corefit-tabs", future + example("reader", "tabs"))
    write_plugin(site, "corefit-qa", future + example("map function", "qa"))
    registry = Registry.load()
    file = tmp_path / "a.tsv"
    file.write_bytes(b"q\ta\nbad\n")
    good, bad = registry.reader("tabs").read(Sources((file,)), None)
    assert dict(good) == {"question": "q", "answer": "a"} and good.size == 4
    assert str(bad) == f"{file}:2: no tab; expected question, tab, answer" and bad.offset == 4
    qa = registry.map_function("qa")
    assert qa.options is not None
    record = Record({"question": "1", "answer": "2"}, path="f", line=1, offset=0)
    assert qa.sniff is not None and qa.sniff(record)
    (item,) = qa.map(record, qa.options(system="Be brief."))
    assert [message.content for message in item.messages] == ["Be brief.", "1", "2"]


def test_loading_imports_no_heavy_package():
    code = (
        "import sys\nfrom corefit.registry import Registry\nRegistry.load()\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'peft', 'jinja2', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.strip() == "[]", done.stderr
