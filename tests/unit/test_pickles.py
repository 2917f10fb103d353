from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import pickle
import random
import shlex
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from cli import corefit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import write_model
from tiny_export import IDS, adapted, facts, load

from corefit.chat import find
from corefit.engine.export import INDEX, export_trained, weight_files
from corefit.errors import ModelError
from corefit.merge import merge
from corefit.pickles import Checkpoint, convert

for codec in ("ascii", "latin-1", "utf-8", "raw_unicode_escape", "unicode_escape"):
    codecs.lookup(codec)  # Python imports a codec at its first use, which is no import that a pickle asked for

torch.set_num_threads(1)
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
    *(torch.int8, torch.uint8, torch.bool),
)


def say(line: str) -> None:
    pass


def bits(tensor: torch.Tensor) -> tuple:
    plain = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), plain.view(torch.uint8).numpy().tobytes()


def state_dict() -> OrderedDict:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    state = OrderedDict((f"of.{str(d)[6:]}", (torch.randn(3, 5) * 9).to(d)) for d in DTYPES)
    state |= {"nan": torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32), "number": torch.tensor(2.5)}
    state |= {"empty": torch.empty(0, 4), "whole": base, "tied": base, "view": base[1:5:2, 2:5], "transposed": base.T}
    state |= {"wide": torch.randn(1, 4).expand(3, 4), "parameter": torch.nn.Parameter(torch.randn(3))}
    state._metadata = OrderedDict(version=1)
    return state


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
def test_tensors_are_bit_equal_to_those_of_torch_load(tmp_path, old):
    state = state_dict()
    if not old:  # torch itself can't read one of these from the old format
        state["of.float8"] = torch.randn(4).to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=not old)
    lines: list[str] = []
    assert convert(tmp_path / "x.bin", say=lines.append) == tmp_path
    got, want = load_file(tmp_path / "x.safetensors"), torch.load(tmp_path / "x.bin", weights_only=True)
    assert got.keys() == want.keys() and len(got) > 18
    assert {name: bits(tensor) for name, tensor in got.items()} == {n: bits(tensor) for n, tensor in want.items()}
    assert lines == [f"x.bin -> x.safetensors: {len(got)} tensors, 0.0 MB"], "nothing foreign, nothing left out"


class System:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.measured
def test_a_folder_with_a_planted_call_converts_runs_nothing_and_holds_no_whole_shard(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak is read from /proc")
    folder, marker = tmp_path / "model", tmp_path / "ran"
    (tmp_path / "mypkg.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Thing: pass\n")
    sys.path.insert(0, str(tmp_path))
    try:
        from mypkg import Thing  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    marker.unlink()
    folder.mkdir()
    thing = Thing()
    thing.hidden = torch.zeros(2)
    n, where = 6 * 2**20, {}  # four tensors of 24 MiB a shard
    for i in (1, 2):
        shard = {f"layers.{i}.{j}": torch.full((n,), float(10 * i + j)) for j in range(4)}
        torch.save({**shard, "planted": System(f"touch {marker}"), "thing": thing}, folder / f"pytorch_model-{i}.bin")
        where |= dict.fromkeys(shard, f"pytorch_model-{i}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text('{"kept": true}')
    code = (
        "import re, sys, corefit.cli, corefit.pickles\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "before = peak()\n"
        "code = corefit.cli.main(sys.argv[1:])\n"
        "print('grew', peak() - before, 'mypkg' in sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "safetensors", folder, "--out", tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "pytorch_model-1.bin: foreign names, not run: posix.system, mypkg.Thing\n" in done.stdout
    assert "1 tensors in foreign objects are left out" in done.stdout
    *_, grew, imported = done.stdout.split()
    print(f"grew by {int(grew) / 2**20:.0f} MiB for shards of {16 * n / 2**20:.0f}")
    assert not marker.exists() and imported == "False"
    assert int(grew) < 4 * 4 * n, "less than a shard"
    for name, file in json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].items():
        if name.endswith("3"):
            assert bits(load_file(tmp_path / "out" / file)[name]) == bits(torch.full((n,), float(name[7]) * 10 + 3))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"kept": True}
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_a_sharded_folder_becomes_a_model_beside_the_pickles(tmp_path):
    folder = write_model(tmp_path / "model")
    want = load(folder)(IDS).logits
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    (folder / "model.safetensors").unlink()
    where = {}
    for i, some in enumerate((names[::2], names[1::2]), 1):
        torch.save({name: state[name] for name in some}, folder / f"pytorch_model-0000{i}-of-00002.bin")
        where |= dict.fromkeys(some, f"pytorch_model-0000{i}-of-00002.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ModelError, match="pickle") as refusal:
        weight_files(folder)
    verb, *arguments = shlex.split(str(refusal.value).partition("anything: corefit ")[2])
    assert convert(arguments[0], arguments[2], say=say) == tmp_path / "model-safetensors" and verb == "safetensors"
    assert convert(folder, say=say) == folder
    assert {path.name for path in weight_files(folder)} == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    for made in (folder, tmp_path / "model-safetensors"):
        assert torch.equal(load(made)(IDS).logits, want)
    assert {name: (folder / name).read_bytes() for name in before} == before, "the originals stay"
    assert not list(folder.glob(".*"))
    with pytest.raises(ModelError, match="is there already"):
        convert(folder, say=say)
    (folder / INDEX).unlink()
    for path in folder.glob("model-*"):
        path.unlink()
    index.write_text(json.dumps({"weight_map": {**where, "gone": "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(ModelError, match="names gone, which no file holds"):
        convert(folder, say=say)
    assert not list(folder.glob("*.safetensors")), "whole or not at all"


def test_a_pickled_adapter_is_refused_with_the_line_that_makes_it_work(tmp_path):
    base = write_model(tmp_path / "base")
    adapter = export_trained(adapted(base), tmp_path / "adapter", facts(base))
    want = merge(adapter, tmp_path / "want", model=str(base))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    line = f"corefit safetensors {adapter} --out {adapter}-safetensors"
    for opened in (lambda: find(adapter, model=str(base)), lambda: merge(adapter, tmp_path / "x", model=str(base))):
        with pytest.raises(ModelError, match="no adapter_model.safetensors: its weights are a pickle") as refusal:
            opened()
        assert str(refusal.value).endswith(line)
    done = corefit(*shlex.split(line)[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    got = merge(f"{adapter}-safetensors", tmp_path / "got", model=str(base))
    assert (got / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match="fetch it again"):  # peft would look for it on the hub
        find(adapter, model=str(base))


@pytest.mark.parametrize("key", ["megatron_config", "peft_type"])
def test_an_adapter_that_makes_peft_import_what_it_names_is_refused(tmp_path, key):
    base = write_model(tmp_path / "base")
    adapter = export_trained(adapted(base), tmp_path / "adapter", facts(base))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: {"x": 1} if "meg" in key else "PROMPT_TUNING"}))
    with pytest.raises(ModelError, match=key):
        find(adapter, model=str(base))


def test_weights_inside_a_larger_checkpoint_are_taken_alone_and_said(tmp_path):
    weights = {"a": torch.ones(2), "layers": [{"b": torch.zeros(1)}, {"b": torch.ones(1)}]}
    torch.save({"model": {"x": 1}, "state_dict": weights, "optimizer": {"m": torch.ones(3)}}, tmp_path / "x.pth")
    lines: list[str] = []
    convert(tmp_path / "x.pth", tmp_path / "out", say=lines.append)
    assert sorted(load_file(tmp_path / "out" / "x.safetensors")) == ["a", "layers.0.b", "layers.1.b"]
    assert lines[:2] == [
        "x.pth: the weights are those under 'state_dict'",
        "x.pth: 1 tensors outside 'state_dict' are left out",
    ]
    torch.save({"a": {"x": torch.ones(1)}, "b": {"y": torch.ones(1)}}, tmp_path / "y.pt")
    convert(tmp_path / "y.pt", tmp_path / "out2", say=lines.append)
    assert sorted(load_file(tmp_path / "out2" / "y.safetensors")) == ["a.x", "b.y"]
    assert len(lines) == 4


def test_what_holds_no_weights_of_a_folder_is_passed_over_and_said(tmp_path):
    torch.save(System("touch ran"), tmp_path / "arguments.bin")
    with pytest.raises(ModelError, match="no tensors in arguments.bin"):
        convert(tmp_path, say=say)
    torch.save({"a": torch.ones(1)}, tmp_path / "model.pt")
    lines: list[str] = []
    convert(tmp_path, say=lines.append)
    assert lines[1] == "arguments.bin: no tensors in it" and "model.pt -> model.safetensors" in lines[2]
    assert not (tmp_path / "arguments.safetensors").exists()
    with pytest.raises(ModelError, match="no such file"):
        convert(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(ModelError, match=r"nothing to convert: no \*\.bin"):
        convert(tmp_path / "none")


# ------------------------------------------------------------------------------------------------------ hostile files


def saved(value: object, **more: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **more)
    return buffer.getvalue()


def archive(entries: dict[str, bytes], **more: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **more) as made, contextlib.suppress(UserWarning):
        for name, data in entries.items():
            made.writestr(name, data)
    return buffer.getvalue()


def tensor_of(numel: object, offset: object, size: tuple, stride: tuple, *, kind: str = "FloatStorage") -> bytes:
    """A pickle of one tensor, as torch writes it, with numbers of one's own."""

    class Storage:
        pass

    class Rebuilt:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return "storage", getattr(torch, kind), "0", "cpu", numel
            return None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Rebuilt()})
    return buffer.getvalue()


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"}X\x01\x00\x00\x00a" * depth + b"}" + b"s" * depth + b"."


def one(data: bytes) -> bytes:
    return archive({"x/data.pkl": data, "x/data/0": bytes(16)})


LAUGHS = b"\x80\x02}q\x00" + b"".join(b"}(X\x01\0\0\0ah%cX\x01\0\0\0bh%cuq%c" % (i, i, i + 1) for i in range(28)) + b"."
"""Dicts that hold each other twice, 2^28 of them to walk over."""
DEEP_KEY = b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"Ns."
"""A tuple of 300,000 levels as a key: hashing it would end the process."""

HOSTILE = {
    "nothing": (b"", "no such|not a whole"),
    "text": (b"hello\n" * 100, "not a whole torch checkpoint"),
    "an old-style planted call": (b"cos\nsystem\n(X\x09\0\0\0touch rantR.", "of no format"),
    "half of it": (saved({"a": torch.ones(100)})[:700], "not a whole"),
    "compressed": (
        archive({"x/data.pkl": b"N" * 999 + b".", "x/data/0": os.urandom(5000)}, compression=zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "no pickle": (archive({"x/data": b""}), "not a whole"),
    "two pickles": (archive({"x/data.pkl": b"N.", "y/data.pkl": b"N."}), "not a whole"),
    "no storage": (archive({"x/data.pkl": tensor_of(4, 0, (4,), (1,))}), "storage of a is not there"),
    "a storage that is too small": (one(tensor_of(5, 0, (4,), (1,))), "not as large as it says"),
    "beyond the storage": (one(tensor_of(4, 1, (4,), (1,))), "in a storage of 16 bytes"),
    "beyond the storage by a stride": (one(tensor_of(4, 0, (2, 2), (3, 1))), "in a storage of 16 bytes"),
    "a negative stride": (one(tensor_of(4, 3, (4,), (-1,))), "not plain"),
    "a negative size": (one(tensor_of(4, 0, (-1, -1), (1, 1))), "not plain"),
    "a shape of text": (one(tensor_of(4, 0, ("4",), (1,))), "not plain"),
    "a tensor that repeats itself": (one(tensor_of(4, 0, (2**40,), (0,))), "8 times the size"),
    "a dtype nobody has": (one(tensor_of(2, 0, (2,), (1,), kind="ComplexFloatStorage")), "no dtype for"),
    "big-endian": (archive({"x/data.pkl": b"N.", "x/byteorder": b"big"}), "big-endian"),
    "too long a pickle": (one(b"\x80\x02" + b"N0" * 2**24 + b"N."), "over the limit of 33,554,432"),
    "too many opcodes": (one(b"\x80\x02" + b"N0" * 2**21 + b"N."), "more than 4,194,304 opcodes"),
    "too deep": (one(nested(100)), "nested in more than 32 levels"),
    "a billion laughs": (one(LAUGHS), "without end"),
    "a deep key": (one(DEEP_KEY), "no tensors"),
    "a promise of bytes": (one(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."), "not a whole"),
    "a buffer": (one(b"\x80\x05\x97."), "opcode NEXT_BUFFER"),
    "an endless number": (one(b"L" + b"9" * 10**6 + b"L\n."), "not a whole"),
    "what pickles as text": (one(b"cos\nsystem\n(S'touch ran'\ntR."), "opcode STRING"),
    "an empty stack": (one(b"0000."), "not a whole"),
    "a long name": (
        one(b"\x80\x02" + (b"}X\x30\x75\0\0" + b"k" * 30_000) * 30 + b"}" + b"s" * 30 + b"."),
        "1,000 char",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, words = HOSTILE[name]
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ModelError, match=words) as refusal:
        convert("x.bin", say=say)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"], "nothing was written"


def test_an_entry_larger_than_the_file_is_refused(tmp_path):
    data = bytearray(saved({"a": torch.ones(4)}))
    at = data.rfind(b"PK\x01\x02", 0, data.rfind(b"x/data/0" if b"x/data/0" in data else b"archive/data/0"))
    data[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)  # the central directory's sizes
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ModelError, match="larger than the file"):
        Checkpoint(tmp_path / "x.bin")


def test_names_of_entries_are_looked_up_and_never_become_paths(tmp_path):
    data = tensor_of(4, 0, (4,), (1,))
    entries = {"../../x/data.pkl": data, "../../x/data/0": bytes(16), "/etc/planted": b"", "../planted": b""}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.bin").write_bytes(archive(entries))
    convert(tmp_path / "in" / "x.bin", say=say)
    assert bits(load_file(tmp_path / "in" / "x.safetensors")["a"]) == bits(torch.zeros(4))
    assert {path.name for path in tmp_path.rglob("*")} == {"in", "x.bin", "x.safetensors"}


@pytest.mark.parametrize("name", ["../x.bin", "/x.bin", "sub/x.bin", "x.safetensors", "..", "", 7])
def test_an_index_names_files_of_its_own_folder(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="expected .bin files of its own folder|not the index"):
        convert(folder, tmp_path / "out", say=say)
    assert not (tmp_path / "out").exists()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": str(name).replace(".bin", ".safetensors")[:-1]}}))
    with pytest.raises(ModelError, match="expected .safetensors files of its own folder"):
        weight_files(folder)


WATCHED: list[str] = []
WATCHING = False


def watch(event: str, arguments: tuple) -> None:
    if WATCHING and (event.startswith(("import", "pickle", "os.", "subprocess", "exec", "compile", "socket"))):
        WATCHED.append(f"{event} {arguments}")


sys.addaudithook(watch)
GOOD = [saved(state_dict()), saved(state_dict(), _use_new_zipfile_serialization=False)]
opcodes = st.sampled_from(
    [bytes([c]) for c in b"(.0122NKMJ]}l)atesdubh\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94QRoi\x81"]
    + [b"cos\nsystem\n", b"ios\nsystem\n", b"X\x02\0\0\0os", b"X\x06\0\0\0system", b"S'touch ran'\n", b"\x82\x01"]
    + [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"K\x01", b"q\x00", b"h\x00", b"I1\n"]
    + [b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_parameter\n", b"Pid\n"]
)


def opened(path: Path) -> Checkpoint | None:
    global WATCHING
    WATCHED.clear()
    WATCHING = True
    try:
        return Checkpoint(path)
    except ModelError as refusal:
        assert "\n" not in str(refusal)
        return None
    finally:
        WATCHING = False


@given(ops=st.lists(opcodes, max_size=40))
@settings(max_examples=400)
def test_no_pickle_imports_or_calls_anything(ops, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "some.bin"
    path.write_bytes(one(b"".join(ops) + b"."))
    opened(path)
    assert not WATCHED


@given(seed=st.integers(0, 2**32), good=st.sampled_from(GOOD))
@settings(max_examples=300)
def test_a_damaged_checkpoint_is_read_or_refused(seed, good, tmp_path_factory):
    rng, data = random.Random(seed), bytearray(good)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(data)
    checkpoint = opened(path)
    assert not WATCHED
    for name in checkpoint.tensors if checkpoint else ():
        checkpoint.read(name)
