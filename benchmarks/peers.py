"""Packers of other projects, called as those call them; each gives its packs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

NAMES = ("axolotl", "trl", "datasets", "pyarrow", "binpacking", "llamafactory", "numba")


def module(name: str) -> Any:  # noqa: ANN401
    """Load one module by the place of its file, without the package around it."""
    package, _, inner = name.partition(".")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    path = f"{found.submodule_search_locations[0]}/{inner.replace('.', '/')}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    made = sys.modules[name] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(made)  # type: ignore[union-attr]
    return made


def axolotl() -> Callable[[np.ndarray, int], Sequence[Any]]:
    """pack_parallel with its defaults (groups of 100,000, 200 sequences a bin), in this process."""
    from axolotl.utils.samplers.multipack import pack_parallel

    def pack(lengths: np.ndarray, capacity: int) -> Sequence[Any]:
        return pack_parallel(lengths, capacity, group_size=100_000, bin_size=200, num_processes=1)

    pack(np.array([1, 2, 3], np.int32), 4)  # compiles
    return pack


def table_of(lengths: np.ndarray, values: np.ndarray | None = None) -> Any:  # noqa: ANN401, a pyarrow.Table
    """One column of token lists, as TRL has them; without values the tokens are bytes, so that they cost little."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    values = np.zeros(offsets[-1], np.int8) if values is None else values
    small = offsets[-1] < 2**31
    lists = pa.ListArray if small else pa.LargeListArray  # the first is what datasets makes
    return pa.table({"input_ids": lists.from_arrays(offsets.astype(np.int32 if small else np.int64), pa.array(values))})


class _Placed(Exception):
    pass


def trl_placement() -> Callable[[Any, int], Sequence[Any]]:
    """_pack_bfd's sort and the loop that places, no more.

    pc.filter and pc.list_slice, which take out empty samples and cut long ones (there are none), do nothing here, and
    it ends before pc.take moves tokens.
    """
    from trl import data_utils

    class Stopping:
        def __getattr__(self, name: str) -> Any:  # noqa: ANN401
            if name == "take":
                raise _Placed
            return (lambda column, *_: column) if name in ("filter", "list_slice") else getattr(real, name)

    real = data_utils.pc

    def pack(table: Any, capacity: int) -> Sequence[Any]:  # noqa: ANN401
        data_utils.pc = Stopping()  # type: ignore[assignment]
        try:
            data_utils._pack_bfd(table, capacity)
        except _Placed as stopped:
            trace = stopped.__traceback__
            while "bins" not in trace.tb_frame.f_locals:  # type: ignore[union-attr]
                trace = trace.tb_next  # type: ignore[union-attr]
            return trace.tb_frame.f_locals["bins"]  # type: ignore[union-attr]
        finally:
            data_utils.pc = real
        raise RuntimeError("this version of TRL has no pc.take in _pack_bfd")

    return pack


def trl_pack_dataset() -> Callable[[Any, int], Any]:
    """pack_dataset with its defaults (bfd, 1,000 rows at a time), nothing cached from an earlier run."""
    import datasets
    from trl import pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()

    def pack(table: Any, capacity: int) -> Any:  # noqa: ANN401
        return pack_dataset(datasets.Dataset(table), seq_length=capacity)

    return pack


def ms_swift() -> Callable[[np.ndarray, int], Sequence[Any]]:
    """to_constant_volume on 1,000 (index, length) pairs at a time, the last pack carried, as ms-swift calls it."""
    import binpacking

    def pack(lengths: np.ndarray, capacity: int) -> Sequence[Any]:
        data = list(enumerate(lengths.tolist()))
        packs: list[Any] = []
        carried: list[Any] = []
        for at in range(0, len(data), 1000):
            made = binpacking.to_constant_volume(carried + data[at : at + 1000], capacity, weight_pos=1)
            carried = []
            if at + 1000 < len(data):
                made, carried = made[:-1], made[-1]
            packs += [[index for index, _ in one] for one in made]
        return packs

    return pack


def llama_factory() -> Callable[[np.ndarray, int], Sequence[Any]]:
    """greedy_knapsack on 1,000 lengths at a time, as LLaMA-Factory's map does; gives lengths, not indices."""
    knapsack = module("llamafactory.data.processor.processor_utils").greedy_knapsack

    def pack(lengths: np.ndarray, capacity: int) -> Sequence[Any]:
        packs: list[Any] = []
        for at in range(0, len(lengths), 1000):
            packs += knapsack(lengths[at : at + 1000].tolist(), capacity)
        return packs

    return pack


def numba_tree() -> Callable[[np.ndarray, int], np.ndarray]:
    """A plain first-fit over a binary tree of free slots, compiled by numba; gives the pack of each sample."""
    import numba

    @numba.njit
    def first_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
        size = 1
        while size < 2 * lengths.sum() // capacity + 2:
            size *= 2
        tree = np.full(2 * size, capacity, np.int32)
        packs = np.empty(len(lengths), np.int32)
        for i in range(len(lengths)):
            node = 1
            while node < size:
                node *= 2
                if tree[node] < lengths[i]:
                    node += 1
            packs[i] = node - size
            tree[node] -= lengths[i]
            node //= 2
            while node >= 1:
                tree[node] = max(tree[2 * node], tree[2 * node + 1])
                node //= 2
        return packs

    first_fit(np.array([1, 2, 3], np.int32), 4)  # compiles
    return first_fit
