"""What ``corefit doctor`` says, on a machine that is whole and on ones that are not."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch

from corefit import doctor as module
from corefit.data import kernel
from corefit.doctor import Report, doctor, examine, private
from corefit.engine import memory


@pytest.fixture(scope="module")
def whole() -> Report:
    return examine()


def test_it_names_what_an_issue_needs(whole: Report) -> None:
    assert not whole.broken
    assert list(whole.facts) == ["versions", "GPU", "kernels", "plugins", "machine", "hub", "environment"]
    version = torch.__version__ if torch.version.cuda is None else torch.__version__.partition("+")[0]
    assert whole.facts["versions"]["torch"] == version  # a wheel for CUDA has no local version
    needed = {"corefit", "python", "transformers", "peft", "bitsandbytes", "safetensors", "pluggy", "tokenizers"}
    assert needed <= set(whole.facts["versions"])
    assert whole.facts["kernels"]["corefit's own"].startswith(kernel.NAME)
    assert "works" in whole.facts["kernels"]["bitsandbytes NF4 on cpu"]
    assert whole.facts["plugins"]["oasst1"].endswith("2 entries")
    assert {"disk", "memory", "CPU"} <= set(whole.facts["machine"])
    assert any(line.startswith("no GPU") for line in whole.slow) == (not torch.cuda.is_available())


def test_text_and_json_say_the_same_and_exit_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == 0
    text = capsys.readouterr().out
    assert doctor(as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"facts", "slow", "broken"}
    for section, facts in found["facts"].items():
        assert f"{section}\n" in text
        for name, value in facts.items():
            if name not in ("disk", "memory"):  # these move
                assert name in text and value in text
    assert text.endswith("corefit can run here\n")


def test_no_secret_no_home_and_no_password_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", 'hf_very"secretvalue')
    monkeypatch.setenv("COREFIT_HERE", f'{tmp_path}/models:hf_very"secretvalue')
    monkeypatch.setenv("HF_ENDPOINT", "https://somebody:pw@mirror.example/")
    for as_json in (False, True):
        doctor(as_json=as_json)
        text = capsys.readouterr().out
        assert str(tmp_path) not in text and "secretvalue" not in text and "somebody" not in text
        assert "HF_TOKEN" in text and "set, not shown" in text
        assert "~/models:$HF_TOKEN" in text and "https://mirror.example/" in text


def test_a_home_folder_is_hidden_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert private("/home/ann/x /home/annette /home/ann") == "~/x /home/annette ~"


def test_a_version_that_is_too_old_and_a_package_that_is_missing_are_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.57.1" if name == "transformers" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor() == 1
    text = capsys.readouterr().out
    assert "BROKEN: transformers 4.57.1: corefit needs transformers<6,>=5" in text
    assert "BROKEN: peft: not installed; pip install 'peft>=" in text
    assert text.endswith("see BROKEN\n")


def test_a_package_that_does_not_import_is_broken_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert any(line.startswith("safetensors ") and "ModuleNotFoundError" in line for line in examine().broken)


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_nf4_that_does_not_work_is_broken(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional as functional

    def dequantize(packed: torch.Tensor, state: object) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("no kernel image")
        return torch.zeros(256, 256)

    monkeypatch.setattr(functional, "dequantize_4bit", dequantize)
    found = [line for line in examine().broken if line.startswith("bitsandbytes: NF4 on cpu")]
    assert len(found) == 1 and ("no kernel image" if fault == "raises" else "100.0 %") in found[0]


def test_a_broken_plugin_of_somebody_else_is_said_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n", "utf-8")
    (info / "entry_points.txt").write_text("[corefit]\ntheirs = no_such_module_of_theirs\n", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    report = Report()
    module._plugins(report)
    assert report.facts["plugins"]["theirs"].startswith("theirs 1: BROKEN: importing 'no_such_module_of_theirs'")
    assert not report.broken


def test_the_python_kernel_is_slow_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "compiled", None)
    monkeypatch.setenv("COREFIT_KERNEL", "python")
    report = Report()
    module._kernel(report)
    assert report.facts["kernels"]["corefit's own"] == "Python (COREFIT_KERNEL=python asks for it)"
    monkeypatch.delenv("COREFIT_KERNEL")
    monkeypatch.setitem(sys.modules, "corefit.data.kernel._kernel", None)
    module._kernel(report)
    assert "no C compiler" in report.slow[1]


def test_a_container_has_the_memory_and_the_cpus_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    stat = f"anon 5\ninactive_file {2**27}\nactive_file {2**27}\nfile_dirty 7\n"  # of files, which make room
    given = {"memory.max": str(2**30), "memory.current": str(3 * 2**28), "memory.stat": stat, "cpu.max": "50000 100000"}
    monkeypatch.setattr(memory, "cgroup", given.__getitem__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    total, available = memory.memory_of_machine()
    assert total == 2**30 and available <= 2**29
    report = Report()
    module._machine(report)
    assert any("torch takes 2 threads for 0.5 CPUs: --set run.threads=1" in line for line in report.slow)
    assert any(line.startswith("only 0.5 GiB of memory") for line in report.slow)
