"""The base model, how it is stored, and the choice of device and precision."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import functools
import hashlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from corefit.engine import internlm, rope
from corefit.engine.fused import cpu_has_bf16, fast_dtype
from corefit.errors import CorefitError, ModelError, PluginError, UserError, in_words, system_words, unknown
from corefit.terminal import notice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from corefit.types import Quantizer

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # which huggingface_hub reads when it is imported

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
"""Of glibc's malloc.h."""
KEPT = 2**22
"""Bytes of the largest tensor that the heap keeps during steps: see ``reuse_memory``."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""What ``train.precision`` can be, beside ``auto``."""
BITS = {4: 4 + 8 / 64 + 32 / 64 / 256, 8: 8.0}
"""Of a weight that bitsandbytes stores: 64 of 4 bits have a scale of 8 bits, and 256 of those one of 32."""
SMALL = 16 * 2**20
"""Bytes of weights below which memory does not matter, and the time to give it back would."""
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float32"}


def unsaid(line: str) -> None:
    """Take a notice that nobody needs."""


# ------------------------------------------------------------------------------------------------------ the process


def quiet() -> None:
    """Keep transformers, peft and bitsandbytes from writing over the progress line; errors still come through.

    Called before any of them is imported. What corefit must know from their warnings (missing weights, a fallback) it
    asks for itself.
    """
    # int8 logs a line per layer per step, and the import a line about a kernel that isn't needed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def prepare_process(threads: int | None = None) -> None:
    """Call ``quiet`` and fix the number of CPU threads; None leaves torch's own choice.

    On a CPU equal bits in a resumed run need an equal number of threads.
    """
    quiet()
    if threads is not None:
        torch.set_num_threads(threads)


def is_small(folder: Path, base: str) -> bool:
    """Whether the weights of a base are so few that memory does not matter; ``base`` is its name in errors."""
    return sum(path.stat().st_size for path in weight_files(folder, base)) < SMALL


def give_memory_back() -> None:
    """Let tensors of 1 MiB and more go back to the system once they are freed, where the C library is glibc.

    For what is large and happens once, as loading: its heap would else keep blocks of up to 32 MiB, and fall to pieces.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**20)


def reuse_memory() -> None:
    """Let glibc keep tensors of up to 4 MiB that are freed for those that are made next.

    For steps: fresh pages are cleared by the system, one fault for 4 KiB. In a step of a model of 135M parameters, a
    pack of 1,024 at a time, that was a quarter of the time. With tensors of up to 32 MiB, four packs at a time took a
    third more memory.
    """
    _mallopt(M_MMAP_THRESHOLD, KEPT)
    _mallopt(M_TRIM_THRESHOLD, 2**30)


def _mallopt(what: int, value: int) -> None:
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library, or Windows
        ctypes.CDLL(None).mallopt(what, value)


def import_bitsandbytes() -> bool:
    """Import bitsandbytes without network; False where it isn't installed.

    With the package ``kernels`` at hand its import downloads and runs code from the hub: hidden from it here. It would
    also load torch's compiler, 0.9 s and 42 MB, for functions that CPUs and NVIDIA's GPUs have other code for.
    """
    uncompiled = replaced(torch, "compile", lambda function=None, **_: function or (lambda given: given))
    with hidden("kernels"), uncompiled, contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401

        return True
    return False


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:  # noqa: ANN401
    """Give an attribute of a module, a class or an object another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def hidden(package: str) -> Iterator[None]:
    """Make imports of a package fail, installed or not."""
    before = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules[package]
        else:
            sys.modules[package] = before


# --------------------------------------------------------------------------------------------- device and precision


def choose_device(wanted: str = "auto") -> str:
    """Give ``"cuda"``, ``"cuda:N"``, from now on this process's current GPU, or ``"cpu"``.

    Raises:
        UserError: a GPU was asked for, or is there and was not ruled out, and this torch can't use it.
    """
    if wanted == "cpu":
        return "cpu"
    if not re.fullmatch(r"auto|cuda(:\d+)?", wanted):
        raise UserError(f"run.device: {unknown('device', wanted, ['auto', 'cpu', 'cuda', 'cuda:0'])}")
    ways = "or choose the CPU: --set run.device=cpu, chat --device cpu"
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        if wanted == "auto" and not _gpu_is_there():
            return "cpu"
        if build is None:
            raise UserError(
                f"run.device: {'a GPU is here' if wanted == 'auto' else f'{wanted!r} was asked for'}, but this torch "
                f"({torch.__version__}) is a CPU build; install a CUDA build of torch, {ways}"
            )
        raise UserError(
            f"run.device: torch {torch.__version__} (CUDA {build}) finds no usable GPU; update the driver to one for "
            f"CUDA {build} (see nvidia-smi) or install a torch built for an older CUDA, {ways}"
        )
    device = "cuda" if wanted == "auto" else wanted
    index = torch.device(device).index
    if (index or 0) >= torch.cuda.device_count():
        raise UserError(f"run.device: no {wanted!r}: torch sees {torch.cuda.device_count()} GPU(s), {ways}")
    if index is not None:  # pinned memory, and what bitsandbytes launches and waits for, go by the current one
        torch.cuda.set_device(index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about what is found out here
        try:
            torch.ones(8, device=device).sum().item()
        except RuntimeError as error:
            major, minor = torch.cuda.get_device_capability(device)
            codes = " ".join(torch.cuda.get_arch_list()) or "no GPU"
            raise UserError(
                f"run.device: the GPU (capability {major}.{minor}) can't run torch {torch.__version__}, which has code "
                f"for {codes} ({first_line(error)}); install a torch built for it, {ways}"
            ) from error
    return device


def _gpu_is_there() -> bool:
    """Whether the machine has an NVIDIA GPU that the user did not hide."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return False
    if any(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*")):
        return True
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):  # there is no such program, or it hangs
        return False
    return found.returncode == 0 and b"GPU " in found.stdout


@dataclass(frozen=True, slots=True)
class Precision:
    """In which number format the run multiplies; trainable weights and optimizer state are fp32 in any case."""

    name: str
    """One of ``DTYPES``."""
    compute_dtype: torch.dtype
    use_scaler: bool
    """True: dynamic loss scaling, which fp16's narrow range needs."""
    reason: str
    """Why, in one line."""


def choose_precision(wanted: str = "auto", *, device: str, base_dtype: str) -> Precision:
    """Choose for ``wanted`` in auto, fp16, bf16, fp32; ``base_dtype`` is what ``base_dtype_of`` gives.

    ``auto``: fp16 where the base is stored in fp16 or the GPU has no bf16; else bf16 on a GPU. On a CPU bf16 where it
    multiplies bf16 natively, else fp32, in which ``fast_dtype`` makes the products of 16 bits too.
    """
    cpu = torch.device(device).type == "cpu"
    native = cpu_has_bf16() if cpu else torch.cuda.is_bf16_supported(including_emulation=False)
    name, reason = wanted, "asked for"
    if wanted == "auto" and cpu:
        name = "bf16" if native else "fp32"
        reason = "this CPU multiplies bf16 natively" if native else "this CPU has no native bf16"
    elif wanted == "auto" and not native:
        name, reason = "fp16", "this GPU has no bf16"
    elif wanted == "auto" and base_dtype == "float16":
        name, reason = "fp16", "the base is stored in fp16"
    elif wanted == "auto":
        name, reason = "bf16", "this GPU has bf16 and the base isn't fp16"
    elif cpu and fast_dtype("cpu", DTYPES[wanted]) != DTYPES[wanted]:
        reason = f"asked for; this CPU has no native {wanted}: linear layers multiply in fp32, int8 and DoRA are slow"
    elif wanted == "bf16" and not native:
        reason = "asked for; this GPU has no native bf16, so it will be slow"
    if name == "fp16":
        reason += "; dynamic loss scaling"
    return Precision(name, DTYPES[name], use_scaler=name == "fp16", reason=reason)


# --------------------------------------------------------------------------------------------------------- the base


def resolve_base(base: str, *, trust_remote_code: bool = False, say: Callable[[str], None] = notice) -> Path:
    """Give the folder of a base: itself, or the local copy of a hub name, downloaded where it isn't there yet.

    Only configuration, tokenizer and safetensors files are downloaded (with ``trust_remote_code`` Python files too).

    Raises:
        ModelError: no such folder, no such name, or no network for it.
    """
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        if any(path.match(pattern) for pattern in PICKLES):
            raise ModelError(f"{base}: a pickle, which corefit never opens; {to_convert(path)}")
        raise ModelError(f"{base}: a file, not a model folder; give the folder that holds config.json")
    near = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, near, n=1)
    hint = f"; did you mean {path.parent / close[0]}?" if close else ""
    if base.startswith((".", "/", "~")) or "\\" in base or base.count("/") > 1:
        raise ModelError(f"{base}: no such folder{hint or '; give a model folder or a hub name (owner/name)'}")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    ways = (
        "three ways out: give a local model folder; name a mirror of the hub, HF_ENDPOINT=https://MIRROR; or fetch it "
        f"by hand, run where there is a network: {to_fetch(base)}"
    )
    if not constants.HF_HUB_OFFLINE:
        say(f"{base}: no such folder here, so it is taken as a hub name")
    try:
        return Path(
            snapshot_download(
                base,
                allow_patterns=[*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES,
                ignore_patterns=["*/*", "consolidated*"],  # second copies of the weights, in other layouts
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )
    except HFValidationError as error:
        raise ModelError(f"{base}: neither a folder here nor a hub name (owner/name)") from error
    except GatedRepoError as error:
        raise ModelError(f"{base}: the hub asks for access rights to this model; log in there; {ways}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{base}: neither a folder here nor a model on the hub; check the spelling") from error
    except Exception as error:  # no network: every version of the client has its own names for it
        host = urlsplit(constants.ENDPOINT).hostname
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{host}: {type(error).__name__}"
        why = f"no such folder here, and not to be had from the hub ({reason}){hint}"
        raise ModelError(f"{base}: {why}; {ways}") from error


def config_of(folder: Path, base: str) -> dict[str, Any]:
    """Give ``config.json`` of a model folder; ``base`` is what the user calls it.

    Raises:
        ModelError: there is none, or it can't be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        adapter = (folder / "adapter_config.json").exists()
        why = "an adapter, not a base model" if adapter else "no config.json, so not a model folder"
        raise ModelError(f"{base}: {why}; give the folder of the base model") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{base}: config.json can't be read: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{base}: config.json is no JSON object")
    return config


def weight_files(folder: Path, base: str | None = None) -> list[Path]:
    """Give the safetensors files of a model folder, sorted: the one, those that its index names, else all.

    ``base`` is what the user calls the folder.

    Raises:
        ModelError: there are none; pickle files are never opened, because opening one can run any code.
    """
    one, index = folder / "model.safetensors", folder / INDEX
    base = base or str(folder)
    if one.is_file():
        return [one]
    if index.is_file():
        return [folder / name for name in sorted(set(read_index(index, ".safetensors").values()))]
    if found := sorted(folder.glob("*.safetensors")):
        return found
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{base}: weights only as pickle ({pickles[0]}), which corefit never opens; {to_convert(folder)}"
        )
    if name := hub_name(folder):  # no pickles were fetched for the hub's copy
        raise ModelError(f"{name}: no safetensors on the hub; run: {to_fetch(name)}; {to_convert(Path(name))}")
    raise ModelError(f"{base}: no *.safetensors weights in this folder")


def hub_name(folder: Path) -> str | None:
    """Give the name of a model in the hub's cache, ``models--owner--name/snapshots/<commit>``; None: it lies elsewhere.

    >>> hub_name(Path("models--owner--name/snapshots/0123"))
    'owner/name'
    """
    if folder.parent.name != "snapshots":
        return None
    return folder.parents[1].name.removeprefix("models--").replace("--", "/")


def to_fetch(name: str) -> str:
    """Give the command that puts a model of the hub where its name is found as a folder."""
    return f"hf download {shlex.quote(name)} --local-dir {shlex.quote(name)}"


def to_convert(path: Path) -> str:
    """Give the words for what makes safetensors of a folder's, or a file's, pickles."""
    path = path if path.name.strip(".") else path.resolve()
    given, out = (shlex.quote(str(p)) for p in (path, path.with_name(f"{path.name}-safetensors")))
    return f"this reads their tensors without running anything: corefit safetensors {given} --out {out}"


def read_index(path: Path, suffix: str) -> dict[str, str]:
    """Give the file of every tensor, as an index says.

    Raises:
        ModelError: not an index, or a file in it is no ``suffix`` file beside it.
    """
    try:
        where: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
        for name in sorted(set(where.values())):
            if Path(name).name != name or not name.endswith(suffix):
                raise ModelError(f"{path}: names the file {name!r}; expected {suffix} files of its own folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not the index of a model's files ({first_line(error)}); fetch it again") from error
    return where


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Give the tensors of a safetensors file (name -> dtype, shape, offsets), in the file's order, and its metadata.

    Raises:
        ModelError: it isn't one.

    Source: https://github.com/huggingface/safetensors#format
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size < min(100 * 2**20, path.stat().st_size):
                raise ValueError("no safetensors header")
            header = json.loads(file.read(size))
        metadata = header.pop("__metadata__", {})
        if path.stat().st_size != 8 + size + max((item["data_offsets"][1] for item in header.values()), default=0):
            raise ValueError("of another length than its header says")
        return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"])), metadata
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {system_words(error)}") from error
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path.name}: not a whole safetensors file ({first_line(error)}); fetch it again") from error


def stored_tensors(folder: Path, base: str | None = None) -> dict[str, dict[str, Any]]:
    """Give dtype, shape and offsets of all tensors of a model folder, by name; errors as of ``weight_files``."""
    return {name: entry for path in weight_files(folder, base) for name, entry in read_header(path)[0].items()}


def stored_tensor(folder: Path, name: str) -> torch.Tensor:
    """Give one tensor of a model folder.

    Raises:
        ModelError: it has none of that name.
    """
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118, not a mapping
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
    raise ModelError(f"{folder}: has no tensor {name}")


def base_dtype_of(base: str) -> str:
    """Give the dtype that most weights of a base are stored in: float16, bfloat16 or float32.

    Read from the weights themselves: ``config.json`` may say something else.
    """
    sizes = Counter[str]()
    for entry in stored_tensors(resolve_base(base, say=unsaid), base).values():
        if dtype := _FLOATS.get(entry["dtype"]):
            begin, end = entry["data_offsets"]
            sizes[dtype] += end - begin
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype)) if sizes else "float32"


def model_fingerprint(base: str) -> str:
    """Give 64 hex digits that change with the architecture, the tensors or their values.

    Of values, 64 blocks of 4 KiB per file are read, evenly spread, so that 15 GB take no time: any training changes
    them, a single edited number may not.
    """
    folder = resolve_base(base, say=unsaid)
    digest = hashlib.sha256(json.dumps(config_of(folder, base), sort_keys=True).encode())
    for path in weight_files(folder, base):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        digest.update(json.dumps(read_header(path)[0], sort_keys=True).encode())
        with path.open("rb") as file:
            for block in range(64):
                file.seek(max(size - 4096, 0) * block // 63)
                digest.update(file.read(4096))
    return digest.hexdigest()


def load_base(
    base: str,
    *,
    quantizer: Quantizer,
    compute_dtype: str,
    device: str,
    trust_remote_code: bool = False,
    weights_dtype: str | None = None,
    say: Callable[[str], None] = notice,
) -> PreTrainedModel:
    """Load a base model from a folder or by its hub name, frozen, in eval mode, on ``device``.

    Args:
        base: folder or hub name.
        quantizer: how the decoder's linear layers are stored.
        compute_dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        device: what ``choose_device`` gives.
        trust_remote_code: run the Python files in the folder. Never asked for on stdin.
        weights_dtype: how weights that the quantizer leaves alone are held. None: ``compute_dtype``, to which autocast
            would convert them at every use anyway; for full fine-tuning ``"float32"``.
        say: takes notices, one line each.

    Raises:
        ModelError: one line that says what is wrong with the folder or the name and what to do.
    """
    quiet()
    folder = resolve_base(base, trust_remote_code=trust_remote_code, say=say)
    config = config_of(folder, base)
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = config.get("model_type")
    trust_remote_code = trust_remote_code and kind not in internlm.KINDS  # nothing is there to be run
    if kind not in (*internlm.KINDS, *CONFIG_MAPPING) and not trust_remote_code:
        if "auto_map" in config:
            raise ModelError(
                f"{base}: model type {kind!r} comes with its own Python code, which corefit doesn't run unasked; if "
                "you trust its source: train --set model.trust_remote_code=true, chat --trust-remote-code"
            )
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=3, cutoff=0.4)  # of very many
        raise ModelError(f"{base}: config.json: {unknown('model type', str(kind), near)}")
    if device == "cpu" and not is_small(folder, base):
        give_memory_back()
    if (folder / "adapter_config.json").exists():  # transformers would load the base that it names, not this folder
        raise ModelError(
            f"{base}: holds an adapter beside the model; move adapter_config.json into a folder of its own"
        )
    if trust_remote_code:
        if away := [name for name in map(str, (config.get("auto_map") or {}).values()) if "--" in name]:
            raise ModelError(
                f"{base}: takes code from another place ({away[0]}); copy that code into the model's folder"
            )
        files = ", ".join(f"{name} (sha256 {digest[:16]})" for name, digest in remote_code(folder).items())
        say(f"model.trust_remote_code: runs Python code from {base}: {files or 'there is none'}")
    # some 20 MB that a base as it is stored does without
    has_bitsandbytes = (quantizer.name != "none" or "quantization_config" in config) and import_bitsandbytes()
    quantization = _asked(quantizer, quantizer.config, compute_dtype)
    if quantization is not None and "quantization_config" in config:
        raise ModelError(
            f"{base}: stored quantised already; --quantizer none uses it as it is, or give the unquantised base"
        )
    of_bitsandbytes = type(quantization).__name__ == "BitsAndBytesConfig"
    if of_bitsandbytes and not has_bitsandbytes:
        raise ModelError(f"quantizer {quantizer.name!r}: bitsandbytes is not installed; pip install bitsandbytes")
    dtype = getattr(torch, weights_dtype or compute_dtype)
    more: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if quantization is not None:
        more["quantization_config"] = quantization
    if of_bitsandbytes and not trust_remote_code and say is not unsaid:
        with contextlib.suppress(OSError, ValueError, KeyError):  # loading says it better
            skeleton, _, names = _skeleton(config, str(folder), quantization)
            bits = BITS[4 if quantization.load_in_4bit else 8]
            say(_said_storage(skeleton, names, by=f"{base}: {quantizer.name}", bits=bits, dtype=dtype, device=device))
    if device != "cpu" or quantization is not None:  # which a GPU that is there would get otherwise
        more["device_map"] = {"": device}

    def load(attention: str) -> tuple[Any, dict[str, Any]]:
        if kind in internlm.KINDS:
            return internlm.load(config, weight_files(folder, base), base, attn_implementation=attention, **more)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **more,
        )
        return model, info

    try:
        try:
            model, info = load("sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            say(f"{base}: this model class has no sdpa attention, so eager attention is used: slower, more memory")
            model, info = load("eager")
    except torch.cuda.OutOfMemoryError as error:
        ways = "--quantizer nf4 takes a quarter, several processes divide it with --set run.sharding=full"
        raise ModelError(f"{base}: doesn't fit into the memory of {device}; {ways}") from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(f"{base}: can't be loaded: {first_line(error)}") from error
    except SafetensorError as error:
        raise ModelError(f"{base}: broken weights file: {first_line(error)}; fetch it again") from error
    _check_loaded(base, info, say)
    _protect_4bit(model)
    _protect_8bit(model)
    rope.follow_documents(model)
    if quantizer.after_load is not None:
        _asked(quantizer, quantizer.after_load, model)
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # what they are for is made by code that knows no packs
        say(f"{base}: the loss that balances experts (output_router_logits) is left out")
    model.config.use_cache = False
    model.name_or_path = model.config._name_or_path = base  # what peft writes down; not where the hub's copy lies
    model.requires_grad_(False)
    return model.eval()


def _asked(quantizer: Quantizer, hook: Callable[[Any], Any], argument: object) -> Any:  # noqa: ANN401
    """Call a hook of a quantizer's.

    Raises:
        ModelError: it lacks a module. PluginError: it failed otherwise.
    """
    try:
        return hook(argument)
    except ImportError as error:
        raise ModelError(f"quantizer {quantizer.name!r}: {first_line(error)}") from error
    except (CorefitError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever it does, a plugin doesn't end the process
        raise PluginError(f"quantizer {quantizer.name!r} failed with {in_words(error)}") from error


def _skeleton(config: Mapping[str, Any], base: str, quantization: Any) -> tuple[Any, Any, list[str]]:  # noqa: ANN401
    """Give a model without weights, the method that would quantise it, and the names of weights that it would take."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    if config.get("model_type") in internlm.KINDS:
        own = internlm.llama_config(config, base)
    else:
        own = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(own, trust_remote_code=False)
    method = AutoHfQuantizer.from_config(quantization)
    method.preprocess_model(skeleton, device_map=None)
    names = [name for name, _ in skeleton.named_parameters() if method.param_needs_quantization(skeleton, name)]
    return skeleton, method, names


def _said_storage(
    skeleton: PreTrainedModel, names: list[str], *, by: str, bits: float, dtype: torch.dtype, device: str
) -> str:
    """Say how much of a base a quantizer will store, and the memory that all of it will take.

    ``by``: which base and quantizer. ``names``: the weights that it takes; ``bits``: to one of them, scales included;
    ``dtype``: of all others.

    Raises:
        ModelError: the GPU has less.
    """
    sizes = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}
    total, stored = sum(sizes.values()), sum(sizes[name] for name in names)
    fused = sum(n for name, n in sizes.items() if skeleton.get_parameter(name).dim() == 3 and name not in names)
    size = (stored * bits / 8 + (total - stored) * dtype.itemsize) / 2**30
    share, other = f"{stored / 1e6:,.1f}M of {total / 1e6:,.1f}M weights", str(dtype).removeprefix("torch.")
    line = f"{by} stores {share} ({stored / total:.0%}), the others are {other}: {size:,.2f} GiB"
    if fused > stored:
        line += f"; {fused / 1e6:,.1f}M are fused experts, which it can't store: have that memory, or take a dense base"
    if device != "cpu" and size > (memory := torch.cuda.get_device_properties(device).total_memory / 2**30):
        raise ModelError(f"{line}; {device} has {memory:,.1f} GiB: take a smaller base or a larger GPU")
    return line


def as_stored(
    base: str, *, quantizer: Quantizer, compute_dtype: str, device: str
) -> tuple[frozenset[str], Callable[[str, torch.Tensor], torch.Tensor]]:
    """Give the names of the weights that ``load_base`` would quantise, and a function that rounds one as it would.

    The function takes name and weight, and gives the values that the loaded model multiplies with, fp32 on the CPU;
    other weights as they are. It runs what transformers runs while it loads, for one tensor at a time. ``device``
    matters: kernels of CPU and GPU may settle ties otherwise. What a quantizer's ``after_load`` changes isn't seen.

    Raises:
        ModelError: bitsandbytes isn't there, or it isn't what stores these weights, or the model has its own code.
    """
    quiet()
    quantization = _asked(quantizer, quantizer.config, compute_dtype)
    if not import_bitsandbytes() or type(quantization).__name__ != "BitsAndBytesConfig":
        raise ModelError(f"quantizer {quantizer.name!r}: bitsandbytes dequantises what it stored itself, nothing else")
    from peft.utils.integrations import dequantize_bnb_weight

    own = config_of(resolve_base(base, say=unsaid), base)
    try:
        skeleton, method, names = _skeleton(own, base, quantization)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{base}: can't be dequantised: {first_line(error)}") from error

    def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return weight
        value = weight.to(device, getattr(torch, compute_dtype))
        made = method.get_quantize_ops().convert({name: value}, full_layer_name=name, model=skeleton)[name]
        values: torch.Tensor = dequantize_bnb_weight(made, made)  # of 8 bits, the scales are the weight's own too
        return values.float().cpu()

    if layout := internlm.layout_of(own):
        return frozenset(map(internlm.published_name, names)), functools.partial(layout.each, rounded)
    return frozenset(names), rounded


def remote_code(folder: Path) -> dict[str, str]:
    """Give the SHA-256 of every Python file of a model folder: what ``trust_remote_code`` lets run."""
    files = (path for path in sorted(folder.rglob("*.py")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _check_loaded(base: str, info: dict[str, Any], say: Callable[[str], None]) -> None:
    """Stop where weights are missing: transformers fills them with random numbers and only logs it."""
    missing, unexpected = sorted(info.get("missing_keys") or ()), sorted(info.get("unexpected_keys") or ())
    if missing:
        raise ModelError(
            f"{base}: {len(missing)} weights of the model aren't in its files (the first: {missing[0]}); "
            "fetch the model again, or check that config.json belongs to it"
        )
    if unexpected:
        say(f"{base}: {len(unexpected)} tensors in its files are not part of the model (the first: {unexpected[0]})")


def _protect_4bit(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place on a CPU.

    It does so at the first forward without gradients (validation, a sample) on CPUs with AVX512-BF16, and every later
    gradient is wrong. The flag is bitsandbytes' own; other versions may not have it.
    Linear4bit also casts its bias in place to the compute dtype: nothing here reads a bias back (exports copy the
    base's own files).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _protect_8bit(model: nn.Module) -> None:
    """Keep autocast out of int8 layers on a CPU: bitsandbytes' fp32 sums would overflow in the 16 bits it casts to."""
    for layer in int8_on_cpu(model):
        layer.forward = torch.autocast("cpu", enabled=False)(layer.forward)


def int8_on_cpu(model: nn.Module) -> list[nn.Module]:
    """Give bitsandbytes' layers of 8 bits that are on a CPU."""
    return [m for m in model.modules() if type(m).__name__ == "Linear8bitLt" and next(m.parameters()).is_cpu]


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights are stored in a quantizer's own form."""
    weights = [getattr(layer, "weight", None) for layer in linear_layers(model).values()]
    return any(weight is not None and not weight.is_floating_point() for weight in weights)


# ------------------------------------------------------------------------------------------------ parts of a model


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Give every linear layer of the model by its dotted name, quantised ones too."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def causal_lm(model: nn.Module) -> Any:  # noqa: ANN401, a PreTrainedModel, or what stands in for one
    """Give the language model itself, inside an adapter's wrapper or not."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def decoder_layers(model: Any) -> Sequence[nn.Module]:  # noqa: ANN401, PeftModel or PreTrainedModel
    """Give the layers of the decoder, which run one after another; empty: they are not in one list."""
    parts = causal_lm(model).get_decoder().modules()
    return next((list(part) for part in parts if isinstance(part, nn.ModuleList)), [])


def enable_gradient_checkpointing(model: Any, share: float = 1.0) -> None:  # noqa: ANN401, Peft- or PreTrainedModel
    """Keep only each layer's input and compute the rest again in backward: less memory, about a third more time.

    Non-reentrant, so frozen inputs need no hook. Works in train mode only.

    Args:
        model: with or without an adapter.
        share: of the layers, in (0, 1], spread evenly.

    Raises:
        ModelError: the model class doesn't support it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = causal_lm(model)
    # the first name is that since transformers 5.2x
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"{first_line(error)} --set train.gradient_checkpointing=false does without, at the price of memory"
        ) from error
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = int((i + 1) * share) > int(i * share)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's mode and torch's random state are as they were.

    No inference mode: quantised layers keep tensors that they make in a forward pass, and those could not train later.
    Also drops autocast's cached copies of trainable weights: where torch uses a copy made without gradients again later
    in the same autocast context, that weight would silently get no gradient (torch 2.13 makes a new one).
    """
    gpus = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(sorted(gpus)), torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()
        for module, mode in modes:
            module.training = mode


def first_line(error: BaseException) -> str:
    """Give the first line of what an error says, else its name."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
