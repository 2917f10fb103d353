"""Torch checkpoints (``.bin``, ``.pt``, ``.pth``) -> safetensors, without running what is in them.

A pickle is a program. The machine here builds lists, dicts and descriptions of tensors; every global stays a name, so
nothing is imported and nothing called. What the names of torch mean it knows itself. Bytes are read where torch's
format says they lie, one tensor at a time; nothing of an archive is unpacked.
"""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import IO, Any

import torch

from corefit import terminal
from corefit.engine.export import DTYPES, base_files, json_bytes, write_files, write_tensors, written_aside
from corefit.engine.model import INDEX, PICKLES, read_index
from corefit.errors import ModelError

PICKLE_BYTES, OPCODES, DEPTH = 2**25, 2**22, 32
"""What a pickle may have: one of 50,000 tensors takes about 7 MB, 1,500,000 opcodes and 3 levels of dicts."""
TIMES = 8
"""Bytes that the tensors of a file may have together, for one of the file: some names share their values."""
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which checkpoints keep the weights, beside the state of the training."""

_WEIGHTS = ("pytorch_model.bin", "adapter_model.bin")
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    **dict(Double="F64", Float="F32", Half="F16", BFloat16="BF16", Long="I64", Int="I32", Short="I16"),
    **dict(Char="I8", Byte="U8", Bool="BOOL", Untyped="U8"),
}
_STORAGE = re.compile(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage")
_CODES = {str(dtype): code for code, dtype in DTYPES.items()}
_DICT, _TENSOR = "collections.OrderedDict", "torch._utils._rebuild_tensor"
_PARAMETER = "torch._utils._rebuild_parameter"
_KNOWN = {_DICT, _TENSOR, f"{_TENSOR}_v2", f"{_TENSOR}_v3", _PARAMETER, f"{_PARAMETER}_with_state", *_CODES}
_LORA = re.compile(r"(?:.+\.)?(base_model\.model\..+)\.(?:(lora_[AB])|modules_to_save)\.default\.(weight|bias)")
_VALUE = re.compile("(SHORT_)?BIN(INT[12]?|STRING|UNICODE8?|BYTES8?|FLOAT)|BYTEARRAY8|LONG[14]")
_FRESH: dict[str, Callable[[], Any]] = {
    **dict(EMPTY_TUPLE=tuple, EMPTY_LIST=list, EMPTY_SET=list, EMPTY_DICT=dict),
    **dict(NONE=lambda: None, NEWTRUE=lambda: True, NEWFALSE=lambda: False),
}
_TAKES = {
    **dict(POP=1, BUILD=1, STOP=1, BINPERSID=1, APPEND=1, SETITEM=2, TUPLE1=1, TUPLE2=2, TUPLE3=3, STACK_GLOBAL=2),
    **dict(REDUCE=2, NEWOBJ=2, NEWOBJ_EX=3, APPENDS=0, SETITEMS=0, ADDITEMS=0, TUPLE=0, FROZENSET=0, POP_MARK=0),
}
"""Opcodes -> how many values of the stack they take; 0: all since the last mark."""


# ------------------------------------------------------------------------------------------------------- the pickle


@dataclass(frozen=True, slots=True)
class Name:
    """A global as a pickle names it, and whatever would have been made by it."""

    path: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of numbers in the file."""

    key: str
    dtype: str
    """As safetensors names it."""
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """How a tensor looks at its storage; offset and stride in elements."""

    storage: Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from its first to its last; 0: it has none."""
        return prod(map(bool, self.size)) * (1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True)))

    @property
    def nbytes(self) -> int:
        """Bytes of its values, written out."""
        return prod(self.size) * DTYPES[self.dtype].itemsize


class Machine:
    """Reads pickles that follow each other in ``data``."""

    def __init__(self, data: bytes) -> None:
        self.file, self.opcodes = BytesIO(data), 0
        self.foreign: dict[str, None] = {}
        self.storages: dict[str, Storage] = {}
        self.tensors: list[Tensor] = []

    def load(self) -> Any:  # noqa: ANN401, whatever the pickle holds
        """Give what the next pickle builds.

        Raises:
            ValueError: it is broken, too long, or describes a tensor that can't be.
        """
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(self.file)
        for opcode, arg, _ in operations:
            self.opcodes += 1
            if self.opcodes > OPCODES:
                raise ValueError(f"more than {OPCODES:,} opcodes")
            name, items = opcode.name, []
            if name in _TAKES:
                at = len(stack) - _TAKES[name] if _TAKES[name] else marks.pop()
                items = stack[at:]
                del stack[at:]
            if _VALUE.fullmatch(name):
                stack.append(arg)
            elif name in _FRESH:
                stack.append(_FRESH[name]())
            elif name == "MARK":
                marks.append(len(stack))
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if arg is None else arg] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name in ("APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS"):
                _fill(stack[-1], items)
            elif name.startswith("TUPLE"):
                stack.append(tuple(items))
            elif name == "FROZENSET":
                stack.append(items)
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                stack.append(self._name(arg.split(" ", 1) if arg else items))
            elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
                stack.append(self._made(*items[:2]))
            elif name == "BINPERSID":
                stack.append(self._storage(*items[0]))
            elif name == "STOP":
                return items[0]
            elif name not in ("PROTO", "FRAME", "POP", "POP_MARK", "BUILD"):  # the state of a dict is torch's metadata
                raise ValueError(f"opcode {name}, which torch doesn't write")
        raise ValueError("no end")

    def _name(self, parts: list[Any]) -> Name:
        path = ".".join(part if isinstance(part, str) else "?" for part in parts)
        if path not in _KNOWN and not ((found := _STORAGE.fullmatch(path)) and found[1] in _STORAGES):
            self.foreign[path] = None
        return Name(path)

    def _made(self, function: object, args: Any) -> Any:  # noqa: ANN401
        """Give what torch would make of it; what is foreign stays the name of what would have made it."""
        path = function.path if isinstance(function, Name) else "?"
        if path not in _KNOWN:
            return Name(path)
        if path == _DICT:
            made: dict[str, Any] = {}
            _fill(made, [part for pair in (args[0] if args else ()) for part in pair])
            return made
        return args[0] if path.startswith(_PARAMETER) else self._tensor(path, *args)

    def _tensor(self, path: str, storage: Storage, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:  # noqa: ANN401
        code = storage.dtype
        if path.endswith("_v3"):  # requires_grad, backward_hooks, dtype, metadata
            code, rest = _CODES[rest[2].path], rest[1:]
        numbers = (offset, *size, *stride)
        if any(rest[2:]) or len(size) != len(stride) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError("a tensor that is not plain")
        made = Tensor(storage, code, offset, tuple(size), tuple(stride))
        ends = (offset + made.span) * DTYPES[code].itemsize
        if len(size) > 64 or (made.span and ends > storage.nbytes):
            raise ValueError(f"a tensor of shape {list(size)[:64]} in a storage of {storage.nbytes:,} bytes")
        self.tensors.append(made)
        return made

    def _storage(self, _: Any, kind: Name, key: str, device: Any, numel: int, *view: Any) -> Storage:  # noqa: ANN401
        found = _STORAGE.fullmatch(kind.path)
        if found is None or found[1] not in _STORAGES:
            raise ValueError(f"{kind.path}, which safetensors has no dtype for")
        if type(key) is not str or type(numel) is not int or numel < 0 or any(view):
            raise ValueError("a storage that is not plain")
        made = self.storages.setdefault(key, Storage(key, _STORAGES[found[1]], numel))
        if (made.dtype, made.numel) != (_STORAGES[found[1]], numel):
            raise ValueError(f"storage {key!r} in two forms")
        return made


def _fill(target: Any, items: list[Any]) -> None:  # noqa: ANN401
    """Put items into a list, or keys and values in turn into a dict; into something foreign nothing."""
    if isinstance(target, list):
        target += items
    elif isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if isinstance(key, str) else str(key) if isinstance(key, int | float) else "?"] = value
    elif not isinstance(target, Name):
        raise ValueError("items for what holds none")


def flatten(value: object, limit: list[int], name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dicts and lists under dotted names; ``limit`` holds how many values are looked at.

    Raises:
        ValueError: nested deeper than ``DEPTH``, or so that there is no end to it.
    """
    limit[0] -= 1
    if depth > DEPTH or limit[0] < 0 or len(name) > 1000:
        raise ValueError(f"nested in more than {DEPTH} levels, without end, or a name of more than 1,000 characters")
    if isinstance(value, Tensor):
        yield name or "tensor", value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(item, limit, f"{name}.{key}" if depth else str(key), depth + 1)


# ---------------------------------------------------------------------------------------------------- the checkpoint


class Checkpoint:
    """A torch checkpoint, open: what tensors it holds, and the values of each."""

    def __init__(self, path: Path) -> None:
        """Read the pickle and find the storages; no numbers are read yet.

        Raises:
            ModelError: not a torch checkpoint, or one that can't be right.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self.size, self.inside, limit = path.stat().st_size, "", [OPCODES]
                data = self._zip(file) if file.read(4) == b"PK\x03\x04" else self._old(file)
            while isinstance(data, dict) and not any(isinstance(value, Tensor) for value in data.values()):
                keys = (key for key in WRAPPERS if isinstance(data.get(key), dict))
                key = next((key for key in keys if any(flatten(data[key], limit))), None)
                if key is None:
                    break
                self.inside, data = f"{self.inside}.{key}".strip("."), data[key]
            found = list(flatten(data, limit))
            self.tensors = dict(found)
            self._check(found)
        except ModelError:
            raise
        except OSError as error:
            raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
        except Exception as error:  # whatever a broken file does to zipfile, pickletools and the machine
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise ModelError(f"{path}: not a whole torch checkpoint: {why}") from error
        self.foreign = tuple(self.machine.foreign)
        self.left_out = len({id(tensor) for tensor in self.machine.tensors} - {id(tensor) for _, tensor in found})
        """Tensors that stay behind: outside ``inside``, or in something foreign."""

    def _check(self, found: list[tuple[str, Tensor]]) -> None:
        if len(self.tensors) < len(found):
            raise ValueError("two tensors of one name")
        for name, tensor in found:
            name.encode()  # a lone surrogate: no reader of safetensors takes it
            start, size = self.places.get(tensor.storage.key, (0, -1))
            if size != tensor.storage.nbytes or start + size > self.size:
                raise ValueError(f"the storage of {name} is not there, or not as large as it says")
        if "__metadata__" in self.tensors:
            raise ValueError("a tensor named __metadata__")
        if sum(tensor.nbytes for _, tensor in found) > TIMES * self.size + 2**20:
            raise ValueError(f"tensors of more than {TIMES} times the size of the file")

    def _zip(self, file: IO[bytes]) -> object:
        """Find the entries, none compressed, and read ``NAME/data.pkl``."""
        entries: dict[str, tuple[int, int]] = {}
        for info in zipfile.ZipFile(file).infolist():
            file.seek(info.header_offset)
            head = file.read(30)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))  # lengths of name and extra field
            stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
            if not stored or info.flag_bits & 1 or start + info.file_size > self.size or info.filename in entries:
                raise ValueError(f"entry {info.filename!r} is compressed, larger than the file or there twice")
            entries[info.filename] = start, info.file_size
        [name] = [name for name in entries if name.endswith("/data.pkl")]
        root = name.removesuffix("data.pkl")
        if _bytes(file, *entries.get(f"{root}byteorder", (0, 0))) not in (b"", b"little"):
            raise ValueError("written on a big-endian machine")
        self.machine = Machine(_bytes(file, *entries[name]))
        data = self.machine.load()
        names = ((key, f"{root}data/{key}") for key in self.machine.storages)
        self.places = {key: entries[name] for key, name in names if name in entries}
        return data

    def _old(self, file: IO[bytes]) -> object:
        """Read the format of before torch 1.6: five pickles, then each storage behind its number of elements."""
        self.machine = machine = Machine(_bytes(file, 0, min(self.size, PICKLE_BYTES)))
        if machine.load() != _MAGIC or machine.load() != _PROTOCOL:
            raise ValueError("of no format that torch.save writes")
        if not machine.load().get("little_endian"):
            raise ValueError("written on a big-endian machine")
        data, keys = machine.load(), machine.load()
        self.places, at = {}, machine.file.tell()
        for key in keys:
            numel, storage = int.from_bytes(_bytes(file, at, 8), "little"), machine.storages[key]
            self.places[key] = (at + 8, storage.nbytes if numel == storage.numel else -1)
            at += 8 + storage.nbytes
        return data

    def read(self, name: str) -> torch.Tensor:
        """Give the values of a tensor, as it lies in its storage."""
        tensor = self.tensors[name]
        dtype = DTYPES[tensor.dtype]
        if not tensor.span:
            return torch.empty(tensor.size, dtype=dtype)
        data = bytearray(tensor.span * dtype.itemsize)
        with self.path.open("rb") as file:
            file.seek(self.places[tensor.storage.key][0] + tensor.offset * dtype.itemsize)
            if file.readinto(data) != len(data):
                raise ModelError(f"{self.path}: became shorter while it was read")
        return torch.frombuffer(data, dtype=dtype).as_strided(tensor.size, tensor.stride)


def _bytes(file: IO[bytes], start: int, size: int) -> bytes:
    if size > PICKLE_BYTES:
        raise ValueError(f"a pickle of {size:,} bytes, over the limit of {PICKLE_BYTES:,}")
    file.seek(start)
    return file.read(size)


# ------------------------------------------------------------------------------------------------------ the command


def convert(target: str | Path, out: str | Path | None = None, *, say: Callable[[str], None] = terminal.say) -> Path:
    """Write the tensors of torch checkpoints as safetensors, and give the folder; the checkpoints stay as they are.

    Every name gets values of its own, also where two shared them. A state dict inside of a larger checkpoint is taken
    alone. Nothing in the files runs; names that would have been imported are said.

    Args:
        target: a model or adapter folder, or one file.
        out: a folder that is empty or not there; config, tokenizer, licence and code of a ``target`` folder are copied
            into it. None: beside the checkpoints.
        say: takes notices, one line each.

    Raises:
        ModelError: nothing to convert, a checkpoint that can't be right, something in the way.
    """
    target = Path(target)
    folder = target if target.is_dir() else target.parent
    index = target / f"{_WEIGHTS[0]}.index.json"
    wanted = read_index(index, ".bin") if index.is_file() else {}
    files = sorted({folder / name for name in wanted.values()}) or _files(target)
    names = {path: re.sub(r"^pytorch_model(?=[-.])", "model", path.stem + ".safetensors") for path in files}
    if len(set(names.values())) < len(files):
        raise ModelError(f"{target}: {', '.join(path.name for path in files)}: two of them would get one name")
    for name in [] if out else [*names.values(), *([INDEX] if wanted else [])]:
        if (folder / name).exists():
            raise ModelError(f"{folder / name}: is there already; --out DIR names another folder")
    place = Path(out) if out else folder / ".safetensors"
    where: dict[str, str] = {}
    total = 0
    with written_aside(place, replace=not out) as aside:
        if out and target.is_dir():
            write_files(aside, base_files(target))
        for path in files:
            checkpoint = _opened(path, say)
            if not checkpoint.tensors:
                continue
            entries = {name: {"dtype": t.dtype, "shape": list(t.size)} for name, t in checkpoint.tensors.items()}
            write_tensors(aside / names[path], entries, checkpoint.read, {"format": "pt"})
            size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
            say(f"{path.name} -> {names[path]}: {len(entries):,} tensors, {size / 1e6:,.1f} MB")
            if wanted and (twice := where.keys() & entries.keys()):
                raise ModelError(f"{path}: {min(twice)} is in {where[min(twice)]} too")
            if any(map(_LORA.fullmatch, entries)):
                say(f"{path.name}: LoRA weights; with --config CONFIG, of their training, --out is an adapter folder")
            where |= dict.fromkeys(entries, names[path])
            total += size
        if not where:
            raise ModelError(f"{target}: no tensors in {', '.join(path.name for path in files)}")
        if wanted:
            if missing := wanted.keys() - where.keys():
                raise ModelError(f"{index}: names {min(missing)}, which no file holds")
            write_files(aside, {INDEX: json_bytes({"metadata": {"total_size": total}, "weight_map": where})})
        for path in [] if out else sorted(aside.iterdir()):
            path.rename(folder / path.name)
    if not out:
        place.rmdir()
    return Path(out) if out else folder


def to_adapter(
    target: str | Path,
    out: str | Path,
    *,
    r: int,
    alpha: int,
    dropout: float,
    base: str | None,
    template: str | None = None,
    say: Callable[[str], None] = terminal.say,
) -> Path:
    """Write an adapter folder from a checkpoint of a training that saved LoRA weights under names of its own.

    Args:
        target: one file whose names are PEFT's behind a prefix: ``llm.base_model.model...lora_A.default.weight``.
        out: a folder that is empty or not there.
        r: its rank, as the configuration of the training has it; alpha, dropout and base likewise.
        alpha: the update is scaled by alpha / r.
        dropout: share of the inputs that was zeroed in training.
        base: name or folder of the base.
        template: name of the prompt template of the training; ``chat`` and ``merge`` take it from there.
        say: takes notices, one line each.

    Raises:
        ModelError: other weights than LoRA's in it, another rank, or a checkpoint that can't be right.
    """
    checkpoint = _opened(Path(target), say)
    names = {}
    for name in checkpoint.tensors:
        if (found := _LORA.fullmatch(name)) is None:
            raise ModelError(
                f"{target}: {name}: not of a LoRA adapter; without --config the tensors come out as they are"
            )
        names[".".join(part for part in found.groups() if part)] = name
    entries = {new: checkpoint.tensors[old] for new, old in names.items()}
    if ranks := {t.size[0] for name, t in entries.items() if name.endswith("lora_A.weight")} - {r}:
        raise ModelError(
            f"{target}: its rank is {min(ranks)}, the configuration says {r}; give the one it was trained with"
        )
    lora = {name.rpartition(".lora_")[0] for name in entries if ".lora_" in name}
    saved = {name.rpartition(".")[0] for name in entries if ".lora_" not in name}
    config = {
        **dict(peft_type="LORA", task_type="CAUSAL_LM", r=r, lora_alpha=alpha, lora_dropout=dropout, bias="none"),
        **dict(inference_mode=True, base_model_name_or_path=base),
        "target_modules": sorted({module.rpartition(".")[2] for module in lora}),
        "modules_to_save": sorted({module.rpartition(".")[2] for module in saved}) or None,
    }
    with written_aside(Path(out)) as aside:
        header = {name: {"dtype": t.dtype, "shape": list(t.size)} for name, t in sorted(entries.items())}
        read = lambda name: checkpoint.read(names[name])  # noqa: E731
        write_tensors(aside / "adapter_model.safetensors", header, read, {"format": "pt"})
        known = {"corefit.json": json_bytes({"kind": "adapter", "template": template})} if template else {}
        write_files(aside, {"adapter_config.json": json_bytes(config), **known})
    say(f"{checkpoint.path.name} -> adapter_model.safetensors: LoRA r {r} on {len(lora):,} layers")
    return Path(out)


def _files(target: Path) -> list[Path]:
    """Give the checkpoints of a folder that hold its weights, or the file itself."""
    if target.is_file():
        return [target]
    if not target.is_dir():
        raise ModelError(f"{target}: no such file or folder")
    found = sorted({path for pattern in PICKLES for path in target.glob(pattern) if path.is_file()})
    if not found:
        raise ModelError(f"{target}: nothing to convert: no {', '.join(PICKLES)} in it")
    return [path for path in found if path.name in _WEIGHTS] or found


def _opened(path: Path, say: Callable[[str], None]) -> Checkpoint:
    """Open a checkpoint, and say what of it is odd or stays behind."""
    checkpoint = Checkpoint(path)
    name, inside = path.name, checkpoint.inside
    if checkpoint.foreign:
        more = f" and {len(checkpoint.foreign) - 20:,} more" if len(checkpoint.foreign) > 20 else ""
        say(f"{name}: foreign names, not run: {', '.join(path[:100] for path in checkpoint.foreign[:20])}{more}")
    if inside:
        say(f"{name}: the weights are those under {inside!r}")
    if checkpoint.left_out:
        place = f"outside {inside!r}" if inside else "in foreign objects"
        say(f"{name}: {checkpoint.left_out:,} tensors {place} are left out")
    if not checkpoint.tensors:
        say(f"{name}: no tensors in it")
    return checkpoint
