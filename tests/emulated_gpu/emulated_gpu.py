"""The Python side of ``cuda.cpp``: what torch.cuda says of the device, and flash attention by plain arithmetic.

Whoever has this folder in PYTHONPATH, and the library that ``build`` makes in EMULATED_GPU, has a GPU (sitecustomize
imports this)::

    export PYTHONPATH=tests/emulated_gpu
    python -c "import pathlib, emulated_gpu; emulated_gpu.build(pathlib.Path('cuda.so'))"
    EMULATED_GPU=cuda.so corefit train --plugin oasst1 --template internlm_chat

EMULATED_GPUS says how many there are (1): each process of ``corefit launch`` has one of its own, and what NCCL would
carry from one to another goes by gloo.

It shows that everything is where it should be and waits for nothing that it need not wait for. It shows nothing of
speed, of CUDA's kernels and their rounding, of the order of streams (there is one), of random states (they are the
CPU's), or of bitsandbytes' own (nf4 is what its Python makes of it; its optimizers and int8 are missing).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
GIB = 2**30


def build(library: Path) -> None:
    """Compile ``cuda.cpp``; half a minute."""
    import torch

    home = Path(torch.__file__).parent
    includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{home / 'lib'}"]
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", HERE / "cuda.cpp", "-o", library]
    subprocess.run([*command, *includes, *libraries], check=True, capture_output=True, text=True)


class Stream:
    """The one stream: whatever is asked of it has been done."""

    cuda_stream = stream_id = device_index = 0
    synchronize = wait_stream = wait_event = lambda self, *others: None

    def __init__(self, *about: object, **more: object) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None: ...


class Event:
    """A moment."""

    synchronize = wait = lambda self, *others: None

    def __init__(self, *about: object, **more: object) -> None:
        self.record()

    def record(self, *about: object) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


def within(library: Any) -> Callable[..., Any]:  # noqa: ANN401
    """Give what ``torch.cuda.device`` is: another device within a block."""

    @contextlib.contextmanager
    def device(wanted: object) -> Iterator[None]:
        before = library.exchange_device(_index(wanted))
        try:
            yield
        finally:
            library.exchange_device(before)

    return device


def _index(device: object) -> int:
    """Give the number of a device; -1: the current one."""
    import torch

    if device is None or isinstance(device, int):
        return -1 if device is None else device
    return next((n for n in [torch.device(str(device)).index] if n is not None), -1)


def over_gloo() -> None:
    """Let ``nccl`` be gloo on the same memory; it means, as gloo doesn't, and waits until all is done."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import _create_work_from_future
    from torch.distributed.distributed_c10d import AllreduceOptions, ReduceScatterOptions

    def here(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cuda" or not tensor.numel():
            return tensor.cpu()
        assert tensor.is_contiguous()
        size = tensor.numel() * tensor.element_size()
        memory = (ctypes.c_byte * size).from_address(tensor.data_ptr())
        return torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)

    class OverGloo(dist.ProcessGroup):
        def __init__(self, store: dist.Store, rank: int, world: int, timeout: Any) -> None:  # noqa: ANN401
            super().__init__(rank, world)
            self.gloo = dist.ProcessGroupGloo(store, rank, world, timeout)
            for device in ("cpu", "cuda"):
                self._register_backend(torch.device(device), dist.ProcessGroup.BackendType.CUSTOM, self.gloo)

        def _done(self, work: Any, *mean: torch.Tensor) -> Any:  # noqa: ANN401
            work.wait()
            for tensor in mean:
                tensor.div_(self.size())
            over: torch.futures.Future[None] = torch.futures.Future()
            over.set_result(None)  # gloo's own work would write the sums again where it is waited for twice
            return _create_work_from_future(over)

        def broadcast(self, tensors: Any, options: Any) -> Any:  # noqa: ANN401
            return self._done(self.gloo.broadcast([*map(here, tensors)], options))

        def allreduce(self, tensors: Any, options: Any) -> Any:  # noqa: ANN401
            summed, mean = AllreduceOptions(), options.reduceOp == dist.ReduceOp.AVG
            summed.reduceOp = dist.ReduceOp.SUM if mean else options.reduceOp
            return self._done(self.gloo.allreduce([*map(here, tensors)], summed), *(tensors if mean else ()))

        def _allgather_base(self, out: Any, part: Any, options: Any) -> Any:  # noqa: ANN401
            return self._done(self.gloo._allgather_base(here(out), here(part), options))

        def allgather_into_tensor_coalesced(self, outs: Any, parts: Any, options: Any) -> Any:  # noqa: ANN401
            return [self._allgather_base(*pair, options) for pair in zip(outs, parts, strict=True)][-1]

        def _reduce_scatter_base(self, part: Any, whole: Any, options: Any) -> Any:  # noqa: ANN401
            summed, mean = ReduceScatterOptions(), options.reduceOp == dist.ReduceOp.AVG
            summed.reduceOp = dist.ReduceOp.SUM if mean else options.reduceOp
            work = self.gloo._reduce_scatter_base(here(part), here(whole), summed)
            return self._done(work, *((part,) if mean else ()))

        all_gather_single, reduce_scatter_single = _allgather_base, _reduce_scatter_base  # their names in torch 2.13

        def barrier(self, options: Any) -> Any:  # noqa: ANN401
            return self._done(self.gloo.barrier(options))

        def getBackendName(self) -> str:  # noqa: N802, torch asks for it
            return "nccl"

    begin = dist.init_process_group

    def begun(backend: str | None = None, *about: object, **more: Any) -> None:  # noqa: ANN401
        begin(backend and backend.replace("nccl", "emulated"), *about, **more)

    dist.Backend.register_backend("emulated", OverGloo, devices=["cpu", "cuda"])
    dist.init_process_group = begun


def install(path: str) -> None:
    """Load the library, before torch asks what devices there are, and let torch.cuda say so."""
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    library.bytes_held.restype = library.bytes_at_most.restype = ctypes.c_int64
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # which bitsandbytes compiles by; there is no device to compile for
    import bitsandbytes  # noqa: F401, before there is a GPU: its CUDA library is not here
    import torch

    count = int(os.environ.get("EMULATED_GPUS") or 1)
    card = SimpleNamespace(name="emulated GPU", total_memory=80 * GIB, major=9, minor=0, multi_processor_count=100)
    modes = {"default": 0, "warn": 1, "error": 2}

    def same(value: object) -> Callable[..., Any]:
        return lambda *about, **more: value

    said: dict[str, Any] = {
        **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported", "_is_compiled"), same(True)),
        **dict.fromkeys(("amp_definitely_not_available", "is_current_stream_capturing"), same(False)),
        **dict.fromkeys(
            ("_lazy_init", "init", "empty_cache", "synchronize", "manual_seed", "manual_seed_all"),
            same(None),
        ),
        "device_count": same(count),
        "current_device": library.current_device,
        "set_device": lambda device: library.exchange_device(_index(device)),
        "device": within(library),
        "get_device_properties": same(card),
        "get_device_name": same(card.name),
        "get_device_capability": same((card.major, card.minor)),
        "get_arch_list": same(["sm_80", "sm_90", "compute_90"]),
        "mem_get_info": same((70 * GIB, card.total_memory)),
        "memory_stats": same({}),
        **dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *about: library.bytes_held()),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda *about: library.bytes_at_most()),
        "reset_peak_memory_stats": lambda *about: library.forget_the_most(),
        "get_rng_state": lambda *about: torch.get_rng_state(),
        "set_rng_state": lambda state, *about: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()] * count,
        "default_generators": (torch.default_generator,) * count,
        "Stream": Stream,
        "Event": Event,
        **dict.fromkeys(("current_stream", "default_stream"), lambda *about: Stream()),
        "stream": lambda stream: stream or Stream(),
        "device_of": lambda tensor: within(library)(tensor.device),
        "set_sync_debug_mode": lambda mode: library.look_for_waits(modes.get(mode, mode)),
        "get_sync_debug_mode": library.looks_for_waits,
    }
    for name, value in said.items():
        setattr(torch.cuda, name, value)
    for name in ("exchangeDevice", "maybeExchangeDevice"):
        setattr(torch._C, f"_cuda_{name}", library.exchange_device)
    torch._C._cuda_getDevice = library.current_device  # type: ignore[attr-defined]
    torch._C._cuda_getDeviceCount = same(count)  # type: ignore[attr-defined]
    torch._C._cuda_isCurrentStreamCapturing = same(False)  # type: ignore[attr-defined]
    torch.version.cuda = "12.8"
    torch.Tensor.pin_memory = lambda tensor, *about: tensor  # type: ignore[assignment, method-assign]
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]
    clone, resize = torch.UntypedStorage.clone, torch.UntypedStorage.resize_

    def tensor_of(storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def cloned(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        return tensor_of(storage).clone().untyped_storage() if storage.device.type == "cuda" else clone(storage)

    def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return resize(storage, size)
        torch.ops.emulated.resize_storage(tensor_of(storage), size)
        return storage

    torch.UntypedStorage.clone = cloned  # type: ignore[method-assign]
    torch.UntypedStorage.resize_ = resized  # type: ignore[assignment, method-assign]

    def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
        """Whatever waits in it is the emulation's."""

        def run(*args: object, **more: object) -> Any:  # noqa: ANN401
            mode = library.looks_for_waits()
            library.look_for_waits(0)
            try:
                return function(*args, **more)
            finally:
                library.look_for_waits(mode)

        return run

    attention = torch.library.Library("aten", "IMPL")
    attention.impl("_flash_attention_forward", unseen(_forward), "CUDA")
    attention.impl("_flash_attention_backward", unseen(_backward), "CUDA")
    install.kept = library, attention  # type: ignore[attr-defined]
    over_gloo()


def _window(more: dict[str, Any]) -> tuple[Any, Any]:
    return more.get("window_size_left"), more.get("window_size_right")


def _documents(query: Any, key: Any, value: Any, ends: Any, scale: float, causal: bool, window: tuple[Any, Any]) -> Any:  # noqa: ANN401
    """Give of each document its slots, queries [H, L, D], keys and values with as many heads, and probabilities."""
    import torch

    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    for begin, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        q, k, v = (tensor[begin:end].transpose(0, 1).float() for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(len(q) // len(tensor), 0) for tensor in (k, v))
        at = torch.arange(end - begin, device=q.device)
        behind = at[:, None] - at
        seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
        left, right = window
        if left is not None and left >= 0:
            seen = seen & (behind <= left)
        if right is not None and right >= 0:
            seen = seen & (-behind <= right)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        yield slice(begin, end), q, k, v, scores


def _forward(query: Any, key: Any, value: Any, ends: Any, *rest: Any, scale: Any = None, **more: Any) -> Any:  # noqa: ANN401
    import torch

    how = query.shape[-1] ** -0.5 if scale is None else scale, rest[4], _window(more)
    out, log_sums = torch.zeros_like(query), query.new_zeros(query.shape[1], len(query), dtype=torch.float32)
    for here, *_, v, scores in _documents(query, key, value, ends, *how):
        out[here] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
        log_sums[:, here] = scores.logsumexp(-1)
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return out, log_sums, state, state[0], query.new_empty(0)


def _backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, scale: Any = None, **more: Any) -> Any:  # noqa: ANN401
    import torch

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    made = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for here, q, k, v, scores in _documents(query, key, value, rest[2], scale, rest[7], _window(more)):
        p, g = scores.softmax(-1), grad[here].transpose(0, 1).float()
        dp = g @ v.transpose(1, 2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        for whole, part in zip(made, (ds @ k, ds.transpose(1, 2) @ q, p.transpose(1, 2) @ g), strict=True):
            heads = part.unflatten(0, (whole.shape[1], -1)).sum(1)  # of queries that share one of keys
            whole[here] = heads.transpose(0, 1).to(whole.dtype)
    return tuple(made)


if os.environ.get("EMULATED_GPU"):
    install(os.environ["EMULATED_GPU"])
