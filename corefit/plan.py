"""``corefit plan``: the memory and the time of a run before anything is loaded, and the micro-batch that fits.

Only ``config.json`` and the headers of the weights are read. The arithmetic is in ``engine.memory``.
"""

from __future__ import annotations

import re
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from corefit import zoo
from corefit.engine import memory, model
from corefit.engine.fused import fast_dtype
from corefit.engine.memory import Setting, Shape
from corefit.errors import ModelError, UserError, unknown
from corefit.prepare import resolve
from corefit.recipe import Recipe
from corefit.registry import Registry
from corefit.report import columns
from corefit.terminal import say, write

GIB = 2**30
CARDS = {
    "a10": 24, "a100": 80, "a100-40gb": 40, "a6000": 48, "b200": 180, "h100": 80, "h200": 139, "l4": 24, "l40s": 48,
    "rtx3060": 12, "rtx3090": 24, "rtx4080": 16, "rtx4090": 24, "rtx5090": 32, "t4": 15, "v100": 32, "v100-16gb": 16,
}  # fmt: skip
"""GiB of a card, by the name that it is sold under."""
CHECKPOINTING = {0.0: "off", 1.0: "on"}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
METHODS = {"QLoRA": ("nf4", False), "LoRA": ("none", False), "full": ("none", True)}
SIZE = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*(?:g|gb|gib)?", re.IGNORECASE)
SIZES: Mapping[str, Sequence[int]] = tomllib.loads((Path(__file__).parent / "recipes/sizes.toml").read_text("utf-8"))
"""Sizes of bases, by the beginning of their names; the file says which."""


def known_shape(name: str) -> Shape:
    """Give the shape of a base of ``SIZES``."""
    hidden, middle, layers, heads, shared, width, vocabulary, tied = SIZES[name]
    of = {"q_proj": (heads * width, hidden), "k_proj": (shared * width, hidden), "v_proj": (shared * width, hidden)}
    of |= {"o_proj": (hidden, heads * width), "gate_proj": (middle, hidden), "up_proj": (middle, hidden)}
    of |= {"down_proj": (hidden, middle)}
    tensors: dict[str, Sequence[int]] = {"embed_tokens.weight": (vocabulary, hidden), "norm.weight": (hidden,)}
    if not tied:
        tensors["lm_head.weight"] = (vocabulary, hidden)
    for i in range(layers):
        tensors |= {f"layers.{i}.{part}.weight": size for part, size in of.items()}
        tensors |= {f"layers.{i}.{part}_norm.weight": (hidden,) for part in ("first", "second")}
    config = dict(num_attention_heads=heads, num_key_value_heads=shared, head_dim=width, intermediate_size=middle)
    return memory.shape_of(config, tensors)


def read_shape(base: str) -> Shape:
    """Give the shape of a base from its folder, of which no weight is read.

    Raises:
        ModelError: not a model folder, or one whose files don't tell.
    """
    folder = model.resolve_base(base, say=model.unsaid)
    config = model.config_of(folder, base)
    stored = model.stored_tensors(folder, base)
    tensors = {name: entry["shape"] for name, entry in stored.items()}
    width = 4 if {entry["dtype"] for entry in stored.values()} == {"F32"} else 2
    try:
        return memory.shape_of(config, tensors, width)
    except (KeyError, StopIteration, IndexError, TypeError) as error:
        raise ModelError(f"{base}: config.json and weights don't say what kind of decoder this is ({error})") from error


def setting_of(recipe: Recipe, *, cuda: bool, dtype: torch.dtype) -> Setting:
    """Give what of a recipe its memory depends on; ``dtype``: what products are asked for in."""
    wanted = recipe.train.gradient_checkpointing
    return Setting(
        slots=-(-recipe.pack.max_length // 8) * 8,
        micro_batch=recipe.train.micro_packs,
        packs=recipe.train.packs_per_step,
        quantizer=recipe.model.quantizer,
        full=recipe.adapter.kind == "none",
        r=recipe.adapter.r,
        dropout=recipe.adapter.dropout,
        targets=recipe.adapter.targets,
        saved=recipe.adapter.modules_to_save,
        optimizer=recipe.train.optimizer,
        width=dtype.itemsize,
        checkpointing=float(cuda if wanted == "auto" else wanted),
        cuda=cuda,
        wide=not cuda and fast_dtype("cpu", dtype) != dtype,
    )


def choose_micro_batch(recipe: Recipe, base: str, *, world: int = 1, local_world: int = 1) -> tuple[int, str]:
    """Give how many packs this machine has memory for at once, at least 1, and a line that says why.

    ``world``: processes of the run; ``local_world``: those that share this machine.
    """
    device = model.choose_device(recipe.run.device)
    precision = model.choose_precision(recipe.train.precision, device=device, base_dtype=model.base_dtype_of(base))
    cuda, packs = device != "cpu", max(recipe.train.packs_per_step // world, 1)
    room = memory.room_on(device) // (1 if cuda else local_world)
    shape, setting = read_shape(base), setting_of(recipe, cuda=cuda, dtype=precision.compute_dtype)
    found = memory.largest_micro_batch(shape, setting, room=room, packs=packs)
    setting = replace(setting, micro_batch=found or 1, packs=packs)
    words = f"about {gib(memory.needed(shape, setting))} of the {gib(room)} that are free"
    return found or 1, f"micro-batch: {found or 1} packs (auto), {words}{'' if found else ': may not be enough'}"


def plan_from(recipe_name: str | None, flags: Mapping[str, str], sets: Sequence[str], *, gpu: str | None) -> None:
    """Print what ``corefit plan`` shows.

    Raises:
        UserError: what the caller can mend, before anything is loaded.
    """
    registry = Registry.load()
    room, device, where = room_of(gpu)
    if recipe_name is None and "model" not in flags:
        for line in zoo_lines(room, cuda=device != "cpu", where=where):
            write(line)
        return
    recipe, _, _ = resolve(recipe_name, flags, sets, registry, need_data=False)
    registry.quantizer(recipe.model.quantizer)
    if gpu is None and recipe.run.device != "auto":
        device = model.choose_device(recipe.run.device)
        room, where = memory.room_on(device), device
    for line in plan_lines(recipe, room=room, device=device, where=where, here=gpu is None):
        say(line)


def plan_lines(recipe: Recipe, *, room: int, device: str, where: str, here: bool) -> Iterator[str]:
    """Yield the memory of a run term by term, what fits or what to change, and the time; ``here``: on this machine."""
    base, train, cuda = str(recipe.model.base), recipe.train, device != "cpu"
    known = not Path(base).is_dir() and _known(base)
    shape = known_shape(known) if known else read_shape(base)
    dtype = model.DTYPES.get(train.precision, torch.bfloat16)
    if here:
        stored = "float16" if known else model.base_dtype_of(base)
        dtype = model.choose_precision(train.precision, device=device, base_dtype=stored).compute_dtype
    packs, setting = train.packs_per_step, setting_of(recipe, cuda=cuda, dtype=dtype)
    found = memory.largest_micro_batch(shape, setting, room=room, packs=packs)
    if train.micro_batch == "auto":
        setting = replace(setting, micro_batch=found or 1)
    again = CHECKPOINTING.get(setting.checkpointing, setting.checkpointing)
    method = "all of it trains" if setting.full else f"LoRA r {setting.r} on weights stored as {setting.quantizer}"
    yield (
        f"{base}: {shape.parameters / 1e6:,.1f}M parameters, {shape.layers} layers; {method}; micro-batches of "
        f"{setting.micro_batch} x {setting.slots:,}, gradient checkpointing {again}"
    )
    when, terms = memory.peak(shape, setting)
    rows = [(f"  {name}", gib(size)) for name, size in terms.items()]
    yield from columns([*rows, (f"  the most, {when}", gib(sum(terms.values())))], right=[1])
    if train.offload_activations:
        yield "train.offload_activations is not counted: activations then take less of a GPU"
    if shape.rough:
        yield f"a rough estimate: {shape.rough}"
    full = f"{where}: {gib(room)}, of which {memory.KEPT_FREE:.0%} stay free"
    if found:
        yield f"{full}: fits up to train.micro_batch={found}"
    if not memory.fits(shape, setting, room):
        yield f"{full}: does not fit as it is"
        yield f"what needs less: {memory.advice(shape, setting)}"
    yield time_line(shape, setting, packs=packs, here=here and not cuda)


def time_line(shape: Shape, setting: Setting, *, packs: int, here: bool) -> str:
    """Give the least time of a step: of its matrix products alone, at the rate that a large one reaches on this CPU."""
    # of each weight: forward, gradient of the input, and of the weight if it trains
    passes = (6 if setting.full else 4) + 2 * setting.checkpointing
    head = shape.vocabulary * shape.hidden * 2 * (3 if setting.full else 2)
    work = packs * setting.slots * (sum(i * o for _, i, o in shape.linears) * passes + head)
    tflop = f"{work / 1e12:,.1f} Tflop of products"
    if not here:
        return f"time: a step of {packs} packs is {tflop}; --probe times three on the machine"
    n, dtype = 1024, torch.float32 if setting.wide or setting.width == 4 else torch.bfloat16
    a, took = torch.ones(n, n, dtype=dtype), list[float]()
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        took.append(time.perf_counter() - began)
    rate = 2 * n**3 / min(took)
    return (
        f"time: at least {work / rate:,.1f} s a step of {packs} packs, if every one of its {tflop} ran at the "
        f"{rate / 1e12:.2f} Tflop/s that {n} x {n} reaches here; --probe times three real steps"
    )


def zoo_lines(room: int, *, cuda: bool, where: str) -> Iterator[str]:
    """Yield for every base of known size the longest pack that fits, by method, one pack at a time."""
    yield f"{where}: {gib(room)}, of which {memory.KEPT_FREE:.0%} stay free; the longest pack.max_length that fits:"
    rows = [("base", "parameters", *METHODS)]
    for name in sorted(SIZES, key=lambda name: known_shape(name).parameters):
        shape, cells = known_shape(name), list[str]()
        for quantizer, full in METHODS.values():
            setting = Setting(slots=512, quantizer=quantizer, full=full, checkpointing=True, cuda=cuda)
            longest = max((n for n in LENGTHS if memory.fits(shape, replace(setting, slots=n), room)), default=None)
            cells.append(f"{longest:,}" if longest else "-")
        rows.append((name, f"{shape.parameters / 1e9:.2f}B", *cells))
    yield from columns(rows, right=[1, 2, 3, 4])
    yield "LoRA r 64 on all linear layers, AdamW, train.gradient_checkpointing=true; -: not even 512"
    bases = {zoo.named_recipe(name).model.base for name in zoo.names()}
    left = sorted({str(base) for base in bases if base and not _known(base)})
    yield f"not in the list, their sizes are not known here: {', '.join(left)}"


def room_of(gpu: str | None) -> tuple[int, str, str]:
    """Give bytes of memory, kind of device and its name: of a card by name or GB, else of the device that is here.

    Raises:
        UserError: no such card, or the GPU that is here can't be used.
    """
    if gpu is None:
        device = model.choose_device()
        return memory.room_on(device), device, "this GPU" if device != "cpu" else "this machine's CPU"
    if (size := SIZE.fullmatch(gpu.strip())) and float(size[1]) > 0:
        return round(float(size[1]) * GIB), "cuda", f"a GPU of {float(size[1]):g} GB"
    name = re.sub(r"nvidia|geforce|tesla|[\s_]", "", gpu.lower())
    name = f"rtx{name}" if f"rtx{name}" in CARDS else name
    if name not in CARDS:
        raise UserError(f"--gpu: {unknown('card', gpu, CARDS)}; or its memory, --gpu 24GB")
    return CARDS[name] * GIB, "cuda", name


def gib(size: float) -> str:
    """Give bytes in GiB, small ones in MiB."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"


def _known(base: str) -> str:
    """Give the longest name of ``SIZES`` with which this one begins; empty: none."""
    plain = base.replace("Llama-3.1-", "Meta-Llama-3-").replace("Llama-3.3-", "Meta-Llama-3-").replace("2_5", "2")
    plain = plain.replace("zephyr-7b", "Mistral-7B").replace("HuggingFaceH4", "mistralai").replace("-chat-", "-")
    return max((name for name in SIZES if plain.startswith(name)), key=len, default="")
