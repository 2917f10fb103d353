"""``corefit doctor``: what this machine has, what of it does not work, and what will be slow; to paste into an issue.

Everything is tried, not looked up: packages are imported, a matrix is quantised and back, a number is added on the GPU.
No value of a secret, no name of the home folder and no password of an address is in what it prints.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corefit import __version__
from corefit.data import kernel
from corefit.errors import CorefitError, in_words
from corefit.registry import GROUP, Registry
from corefit.report import columns, to_json
from corefit.terminal import say, secrets, visible, without_secrets, write

VARIABLES = re.compile(
    r"(COREFIT|HF|TRANSFORMERS|CUDA|NVIDIA|NCCL|PYTORCH|TORCH|OMP|MKL|BNB|BITSANDBYTES|TOKENIZERS|LC)_\w+|LANG|"
    r"LD_PRELOAD|PYTHON(IOENCODING|UTF8|PATH|WARNINGS|OPTIMIZE)|NPROC_PER_NODE|(LOCAL_)?(RANK|WORLD_SIZE)|NO_COLOR|"
    r"TMPDIR|(https?|all|no)_proxy",
    re.IGNORECASE,
)
"""Environment variables that change what a run does."""
LOW_DISK, LOW_MEMORY = 2 * 2**30, 4 * 2**30
"""Bytes below which the disk, or the memory, is said to be small."""
NF4_ERROR = 0.15
"""Most that NF4 may change normal numbers, as a share of their own size; it is 0.09 to 0.10 where it works."""


@dataclass
class Report:
    """What was found."""

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Section -> name -> value."""
    slow: list[str] = field(default_factory=list)
    """What works and will be slow, with why and what would help."""
    broken: list[str] = field(default_factory=list)
    """What corefit needs and doesn't work."""

    def add(self, section: str, name: str, value: object) -> None:
        """Add a fact."""
        self.facts.setdefault(section, {})[name] = " ".join(str(value).split())


def doctor(*, as_json: bool = False) -> int:
    """Look at the machine and print what was found; exit code 1 where something needed is broken."""
    report = examine()
    if as_json:
        write(private(without_secrets(to_json(report))))
        return 1 if report.broken else 0
    for section, facts in report.facts.items():
        say(section)
        for text in columns([("  " + visible(name), visible(private(value))) for name, value in facts.items()]):
            write(text)
    for title, lines in (("slow", report.slow), ("BROKEN", report.broken)):
        for text in lines:
            say(f"{title}: {private(text)}")
    say("corefit can run here" if not report.broken else "corefit can't run here as it is: see BROKEN")
    return 1 if report.broken else 0


def examine() -> Report:
    """Look at everything; what fails in an unforeseen way is a line of its own, never an exception."""
    report = Report()
    for section, look in _SECTIONS.items():
        try:
            look(report)
        except Exception as error:
            report.broken.append(f"{section}: {in_words(error)}")
    report.facts["environment"] = report.facts.pop("environment", {})  # looked at first, shown last
    return report


def private(text: str) -> str:
    """Give the text without values of secrets, the home folder and passwords in addresses."""
    for name, secret in secrets().items():
        text = text.replace(secret, f"${name}")
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    return re.sub(r"(?<=://)[^/\s@]+@", "", text)


def _size(n: float) -> str:
    return f"{n / 2**30:,.1f} GiB"


# --------------------------------------------------------------------------------------------------------- sections


def _packages(report: Report) -> None:
    # with the package kernels at hand the import of bitsandbytes downloads and runs code from the hub
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    report.add("versions", "corefit", __version__)
    report.add("versions", "python", f"{platform.python_version()} ({platform.python_implementation()})")
    report.add("versions", "system", platform.platform())
    for name, wanted, extra in _requirements():
        version = _version(name)
        missing = f"not installed; corefit[{extra}] brings it" if extra else "not installed"
        report.add("versions", name, version or missing)
        if version is None:
            if not extra:
                report.broken.append(f"{name}: {missing}; pip install '{name}{wanted}'")
        elif not wanted.contains(version, prereleases=True):
            report.broken.append(f"{name} {version}: corefit needs {name}{wanted}; pip install '{name}{wanted}'")
        elif not extra:
            try:
                importlib.import_module(name)
            except BaseException as error:  # a broken package may raise anything, SystemExit too
                report.broken.append(f"{name} {version}: importing it raised {in_words(error)}")
    for name in ("tokenizers", "numpy", "huggingface_hub"):
        if version := _version(name):
            report.add("versions", name, version)
        else:
            report.broken.append(f"{name}: not installed, though transformers needs it; pip install {name}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> Iterator[tuple[str, Any, str]]:
    """Yield (name, versions, extra) of what the distribution names; the extra of its tests is left out."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("corefit") or ():
        requirement = Requirement(line)
        extra = re.search(r"extra == ['\"](\w+)", line)
        if extra is None or extra[1] != "test":
            yield requirement.name, requirement.specifier, extra[1] if extra else ""


def _gpu(report: Report) -> None:
    import torch

    from corefit.engine.model import choose_device

    report.add("GPU", "torch is built for", torch.version.cuda or torch.version.hip or "the CPU alone")
    if program := shutil.which("nvidia-smi"):
        query = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=20, check=False)
            cards = "; ".join(done.stdout.split("\n")[:8]).strip("; ")
            report.add("GPU", "driver", cards or done.stderr or "no answer")
        except (OSError, subprocess.TimeoutExpired) as error:
            report.add("GPU", "driver", in_words(error))
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        bf16 = properties.major >= 8
        about = f"{properties.name}, {_size(properties.total_memory)}, capability {properties.major}.{properties.minor}"
        report.add("GPU", f"cuda:{i}", f"{about}, bf16 {'yes' if bf16 else 'no'}")
        if not bf16:
            report.slow.append(f"cuda:{i} has no bf16: runs take fp16 with dynamic loss scaling")
    try:
        device = choose_device()
    except CorefitError as error:
        report.broken.append(str(error))
        return
    report.add("GPU", "a run takes", device)
    if device == "cpu":
        report.slow.append("no GPU: training runs on the CPU, for models of some 100 million weights; 7B is for a GPU")


def _bitsandbytes(report: Report) -> None:
    """NF4, tried on what a run would take."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
            off = float((dequantize_4bit(packed, state) - weights).norm() / weights.norm())
        except Exception as error:
            report.broken.append(
                f"bitsandbytes: NF4 on {device} raised {in_words(error)}; --quantizer none does without"
            )
            continue
        if not 0 < off < NF4_ERROR:
            words = f"changes numbers by {100 * off:.1f} %; expected 9 to 10"
            report.broken.append(f"bitsandbytes: NF4 on {device} {words}")
        report.add("kernels", f"bitsandbytes NF4 on {device}", f"works: a matrix comes back within {100 * off:.1f} %")


def _kernel(report: Report) -> None:
    if kernel.compiled is not None:
        report.add("kernels", "corefit's own", "C")
        return
    if os.environ.get("COREFIT_KERNEL") == "python":
        why = "COREFIT_KERNEL=python asks for it"
    else:
        try:
            importlib.import_module("corefit.data.kernel._kernel")
            why = "unknown"
        except ImportError as error:
            why = f"{in_words(error)}; there was no C compiler when corefit was installed: get one, install again"
    report.add("kernels", "corefit's own", f"Python ({why})")
    report.slow.append(f"reading and packing are done by the Python twins of the C kernel: {why}")


def _plugins(report: Report) -> None:
    registry = Registry.load()
    for plugin in registry.plugins:
        troubles = [trouble for trouble in (plugin.error, *plugin.clashes) if trouble]
        count = sum(map(len, plugin.entries.values()))
        entries = f"{count} {'entry' if count == 1 else 'entries'}"
        said = "; ".join(f"BROKEN: {trouble}" for trouble in troubles) or entries
        report.add("plugins", plugin.name, f"{plugin.source}: {said}")
        if troubles and plugin.distribution == GROUP:
            report.broken += [f"plugin {plugin}: {trouble}" for trouble in troubles]
    for name in registry.disabled:
        report.add("plugins", name, "left out by COREFIT_DISABLE_PLUGINS")


def _machine(report: Report) -> None:
    import torch

    from corefit.engine.memory import cgroup, memory_of_machine

    here = Path("runs") if Path("runs").is_dir() else Path()
    free = shutil.disk_usage(here).free
    report.add("machine", "disk", f"{_size(free)} free where runs/ lies")
    if not os.access(here, os.W_OK):
        report.broken.append("the current folder can't be written, and runs go to runs/ in it; --out DIR names another")
    if free < LOW_DISK:
        report.slow.append(f"only {_size(free)} free where runs/ lies: a checkpoint may find no room")
    total, available = memory_of_machine()
    if total:
        report.add("machine", "memory", f"{_size(total)}, {_size(available)} available")
        if available < LOW_MEMORY:
            report.slow.append(f"only {_size(available)} of memory: models beyond a few 100 million weights won't load")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup("cpu.max").split()
    share = int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0].isdigit() else float(cpus)
    threads = torch.get_num_threads()
    code = torch.backends.cpu.get_cpu_capability()
    limit = f", of which this process may use {share:g}" if share < cpus else ""
    report.add("machine", "CPU", f"{platform.machine()} ({code}), {cpus} CPUs{limit}; torch takes {threads} threads")
    if threads > max(share, 1):
        report.slow.append(f"torch takes {threads} threads for {share:g} CPUs: --set run.threads={max(int(share), 1)}")
    elif threads < min(share, cpus) / 2:
        asked = os.environ.get("OMP_NUM_THREADS")
        why = "its own choice" if asked is None else f"OMP_NUM_THREADS={asked}"
        hint = f"--set run.threads={int(share)} takes them all"
        report.slow.append(f"torch takes {threads} of {cpus} CPUs ({why}); {hint}")


def _hub(report: Report) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    there = f"{models} models" if cache.is_dir() else "not there yet"
    report.add("hub", "cache", f"{cache}, {there}")
    report.add("hub", "address", constants.ENDPOINT)
    report.add("hub", "offline", "yes: only what is in the cache" if constants.HF_HUB_OFFLINE else "no")


def _environment(report: Report) -> None:
    hidden = secrets()
    report.add("environment", "encoding", f"{sys.stdout.encoding}, files {sys.getfilesystemencoding()}")
    for name in sorted(os.environ):
        if name in hidden:
            report.add("environment", name, "set, not shown")
        elif VARIABLES.fullmatch(name):
            report.add("environment", name, os.environ[name])


_SECTIONS: dict[str, Callable[[Report], None]] = {
    "environment": _environment,  # before the imports, some of which set variables
    "versions": _packages,
    "GPU": _gpu,
    "bitsandbytes": _bitsandbytes,
    "kernel": _kernel,
    "plugins": _plugins,
    "machine": _machine,
    "hub": _hub,
}
