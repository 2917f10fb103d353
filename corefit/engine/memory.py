"""How much memory a run takes, by arithmetic: from the tensors of a base and the settings, before anything is loaded.

What the autograd graph keeps was read off real runs with ``saved_tensors_hooks``, tensor by tensor, and is written
down here as bytes a token; a test compares the whole with what real models keep. It holds for
decoders of attention and a gated feed-forward part; of experts and other kinds of layers it is a rough estimate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from corefit.engine.loss import CACHED, CHUNK
from corefit.engine.model import BITS, KEPT

MIB = 2**20
PROCESS, LOADING = 550 * MIB, 365 * MIB
"""Resident in a process on a CPU that trains, or loads its base, without tensors: Python, torch, transformers, peft,
their workspaces, small blocks. Fitted to runs of a model of 135M parameters (benchmarks/plan.py; torch 2.13, x86)."""
CUDA_BUILD = 318 * MIB
"""What torch adds to that on a CPU where it is built for CUDA (2.11.0+cu130)."""
WORKSPACES = 64 * MIB
"""What torch allocates for cuBLAS on Hopper and later: 32 MiB for each thread, one of forward and one of backward."""
BITSANDBYTES = 24 * MIB
"""What of that it adds once it is imported: 56 to 66 MiB when it still loaded torch's compiler, 41 MiB."""
HEAP = 0.3
"""What the C library's heap keeps free between tensors of up to 4 MiB (``model.reuse_memory``), as a share of them.
Of a model of 135M parameters it is 0.2 after two steps and 0.4 after twenty."""
COPIES = 0.2
"""What fp32 copies of up to 4 MiB of weights in fewer bits leave there, as a share of all; fitted as above, on AVX2."""
KEPT_FREE = 0.1
"""Share of a device's memory that a plan leaves: for the CUDA context, fragments, and what it does not know."""
MOMENTS, MOMENTS_8BIT = 8, 2 + 8 / 256
"""Bytes of an optimizer's state for a number that trains; of 8 bits, 256 numbers share two fp32 scales."""
SHARING = re.compile(r"(k_proj|v_proj|up_proj|w3)$")
"""Linear layers that read what another one reads too."""
STORED_BITS = {"nf4": BITS[4], "int8": BITS[8]}
"""Bits of a quantised weight, scales included."""


class Shape(NamedTuple):
    """What the memory of a decoder depends on."""

    layers: int
    hidden: int
    heads: int
    queries: int
    """Numbers of all queries of a token in a layer."""
    keys: int
    """The same of its keys, and of its values."""
    middle: int
    """Inner width of the feed-forward part, times the experts that a token sees."""
    vocabulary: int
    linears: tuple[tuple[str, int, int], ...]
    """Name, inputs and outputs of every linear layer of the decoder."""
    norms: int
    """Numbers a token that all normalisations of the decoder take in."""
    norm_weights: int
    other: int
    """Weights that are in no linear layer and no norm: embeddings, head, experts that are one tensor."""
    plain_logits: bool
    """The logits of all tokens are made at once, because the head is more than a matrix."""
    file_width: int = 2
    """Bytes of a number in the base's files."""
    gate: int = 3
    """Tensors as wide as ``middle`` that a gated part keeps beside its last layer's input."""
    rough: str = ""
    """Why the estimate is a rough one; empty: it isn't."""

    @property
    def parameters(self) -> int:
        """All weights, tied ones once."""
        return sum(i * o for _, i, o in self.linears) + self.norm_weights + self.other


def shape_of(config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], file_width: int = 2) -> Shape:
    """Give the shape of a base from its ``config.json``, the sizes of its tensors and the bytes of a number in them.

    Raises:
        KeyError: they are not those of a decoder.
    """
    config = {**config, **(config.get("text_config") or {})}
    tensors = {name: size for name, size in tensors.items() if not re.search(r"vision|visual|multi_modal", name)}
    heads = config.get("num_attention_heads") or config["n_head"]
    embeddings = next(size for name, size in tensors.items() if re.search(r"embed|wte|word_embed", name))
    hidden = int(embeddings[1])
    width = config.get("head_dim") or hidden // heads
    queries, keys = heads * width, (config.get("num_key_value_heads") or heads) * width
    experts = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts")
    linears: list[tuple[str, int, int]] = []
    layers, norms, norm_weights, other = set[int](), 0, 0, 0
    for name, size in tensors.items():
        at, n = re.search(r"\.(\d+)\.", name), torch.Size(size).numel()
        inside = at is not None and "expert" not in name
        if at:
            layers.add(int(at[1]))
        if inside and len(size) == 2 and "wqkv" in name:  # InternLM2's, which is loaded as three
            linears += [(name, size[1], part) for part in (queries, keys, keys)]
        elif inside and len(size) == 2 and "embed" not in name:
            linears.append((name.removesuffix(".weight"), size[1], size[0]))
        elif len(size) == 1 and name.endswith("norm.weight"):
            per_head = queries if "q_norm" in name else keys if "k_norm" in name else n
            norms += per_head if size[0] == width and width != hidden else n
            norm_weights += n
        elif not (config.get("tie_word_embeddings") and "lm_head" in name):
            other += n
    middle = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    if experts:
        middle = config.get("moe_intermediate_size", middle) * config.get("num_experts_per_tok", 1)
    fused = config.get("hidden_act", "silu") in ("silu", "swish") and not any("gate_up" in name for name, *_ in linears)
    gated = any(re.search(r"gate|w3|w1\b", name) for name, *_ in linears) or bool(experts)
    plain = any(config.get(key) for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    rough = "" if gated and linears else "not a gated decoder of linear layers"
    rough = "a mixture of experts" if experts else "latent attention" if config.get("kv_lora_rank") else rough
    return Shape(
        layers=max(len(layers), 1), hidden=hidden, heads=heads, queries=queries, keys=keys, middle=middle,
        vocabulary=int(embeddings[0]), linears=tuple(linears), norms=norms, norm_weights=norm_weights, other=other,
        plain_logits=plain or "lm_head.bias" in tensors, file_width=file_width, gate=2 if fused else 3,
        rough=rough,
    )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What else it depends on."""

    slots: int
    """Of a pack."""
    micro_batch: int = 1
    packs: int = 1
    """Of a step, on a rank."""
    quantizer: str = "nf4"
    full: bool = False
    r: int = 64
    dropout: float = 0.1
    targets: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    """Ends of names of modules that train whole."""
    optimizer: str = "adamw"
    width: int = 2
    """Bytes of a number in matrix products."""
    checkpointing: float = 0.0
    """The share of the layers that keep their input alone."""
    cuda: bool = False
    wide: bool = False
    """Products of 16 bits are made in fp32 (``fused.fast_dtype``)."""

    @property
    def tokens(self) -> int:
        """In a micro-batch."""
        return self.slots * self.micro_batch


def attention_kept(shape: Shape, setting: Setting) -> int:
    """Give the bytes that attention by document keeps in one layer.

    Queries, keys and values. On a GPU these last are repeated for each group of queries, and its result and sums of
    scores are kept too.
    """
    if setting.cuda:
        return setting.tokens * (4 * shape.queries * setting.width + 4 * shape.heads)
    return setting.tokens * (shape.queries + 2 * shape.keys) * setting.width


def layer_kept(shape: Shape, setting: Setting) -> float:
    """Give the bytes of activations that one decoder layer keeps for its backward, on average over the layers.

    A linear layer that trains keeps its input in the format of products. With LoRA it is what dropout left of it, a
    copy for each layer, and what dropout multiplied with: a byte on a GPU; on a CPU fp32 before a layer of 8 bits, else
    the format of products. Without dropout, layers that read the same keep it once, but for those of 8 bits. Norms keep
    their input, those of a model that trains whole in fp32, and their result too. Gated parts keep gate, its activation
    and what it multiplies, but for what can be made again.
    """
    c = setting.width
    adapted, plain = _adapted(shape, setting), setting.quantizer != "int8"
    shares = not setting.full and not setting.dropout and plain
    linear: float = sum(i for name, i, _ in adapted if not (shares and SHARING.search(name))) * c
    if not setting.full:
        noise = 0 if not setting.dropout else 1 if setting.cuda else c if plain else 4
        linear += sum(i for _, i, _ in adapted) * noise + len(adapted) * setting.r * c
    norms = shape.norms * (8 if setting.full else c)
    gate = (3 if setting.full else shape.gate) * shape.middle * c
    return setting.tokens * ((linear + norms) / shape.layers + gate) + attention_kept(shape, setting)


def moments(shape: Shape, setting: Setting) -> dict[str, dict[str, int]]:
    """Give the terms of a run's memory in bytes, at each moment at which they can be the most.

    On a CPU what the process has resident; on a GPU what torch has allocated there.
    """
    s, c, product = setting, setting.width, 4 if setting.wide else setting.width
    quantised = not s.full and s.quantizer in STORED_BITS
    linear = sum(i * o for _, i, o in shape.linears)
    bits = STORED_BITS[s.quantizer] if quantised else 32 if s.full else 8 * c
    other = shape.other * (4 if s.full else c)
    base = linear * bits / 8 + other + 4 * shape.norm_weights
    trained = shape.parameters if s.full else sum(s.r * (i + o) for _, i, o in _adapted(shape, s))
    trained += sum(i * o for n, i, o in shape.linears if not s.full and n.endswith(s.saved))
    if not s.full and any(name in ("lm_head", "embed_tokens", "output", "tok_embeddings") for name in s.saved):
        trained += len(s.saved) * shape.vocabulary * shape.hidden
    imported = BITSANDBYTES * (quantised or s.optimizer != "adamw") + CUDA_BUILD * (torch.version.cuda is not None)
    fp32 = s.wide or (quantised and c == 4)
    copied = fp32 * sum(4 * i * o for _, i, o in shape.linears if 4 * i * o <= KEPT)
    casts = 0 if c == 4 or (s.wide and s.full) else (linear if s.full else trained) * c
    residual = 4 if s.full else c
    always = {
        "process and libraries": WORKSPACES if s.cuda else PROCESS + imported,
        "base weights": base,
        "adapter weights": 0 if s.full else 4 * trained,
        "optimizer state": trained * (MOMENTS_8BIT if "8bit" in s.optimizer else MOMENTS),
    }
    layer = layer_kept(shape, s)
    inputs = s.tokens * shape.hidden * (shape.layers * residual + (8 if s.full else c))  # and those of the last norm
    kept = inputs * s.checkpointing + shape.layers * layer * (1 - s.checkpointing)
    head = shape.vocabulary * shape.hidden
    if shape.plain_logits:
        logits = s.tokens * shape.vocabulary * (c + 12)
    else:  # a chunk's logits in the products' format, and in fp32 those that are worked on at once
        wide = 0 if product == 4 else CHUNK if s.cuda else CACHED
        logits = shape.vocabulary * (min(CHUNK, s.tokens) * product + min(wide, s.tokens) * 4)
        logits += 4 * s.tokens * shape.hidden
        logits += head * (4 + 2 * c) if s.full else 0
    logits += head * 4 * (s.wide and not s.full)
    biggest = max((i * o for _, i, o in shape.linears), default=0)
    biggest *= c * (2 if quantised or s.full else 0) + 4 * (s.wide and not s.full)
    passing = s.tokens * (c if s.cuda else 4) * max(shape.middle, shape.hidden) * 2
    begin = {**always, "weights in the products' format": casts, "activations": kept, "loss": logits}
    if s.packs > s.micro_batch:  # those of the micro-batches before
        begin["gradients"] = 4 * trained
    end = {
        **always,
        "weights in the products' format": casts / shape.layers + biggest,
        "activations": layer + passing + inputs * s.checkpointing,
        "gradients": 4 * trained,
    }
    update = {**always, "gradients": 4 * trained}
    found = {"at the loss": begin, "in the backward": end, "in the optimizer": update}
    if not s.cuda:
        found["while loading"] = {
            "process and libraries": LOADING + imported,
            "base weights": base,
            "files": shape.parameters * shape.file_width,
        }
        within = [s.tokens * width * c <= KEPT for width in (shape.hidden, shape.middle)]
        for terms in (begin, end):
            small = terms["activations"] * sum(within) / 2 + terms["weights in the products' format"]
            terms["free in the heap"] = HEAP * small + COPIES * copied
    return {when: {name: round(size) for name, size in terms.items() if size} for when, terms in found.items()}


def peak(shape: Shape, setting: Setting) -> tuple[str, dict[str, int]]:
    """Give when a run takes the most memory, and its terms then, in bytes."""
    return max(moments(shape, setting).items(), key=lambda moment: sum(moment[1].values()))


def growing(shape: Shape, setting: Setting) -> dict[str, int]:
    """Give the terms of ``peak`` that are there only within a step."""
    lasting = ("process and libraries", "base weights", "adapter weights", "optimizer state")
    return {name: size for name, size in peak(shape, setting)[1].items() if name not in lasting}


def needed(shape: Shape, setting: Setting) -> int:
    """Give the most bytes that a run takes."""
    return sum(peak(shape, setting)[1].values())


def fits(shape: Shape, setting: Setting, room: int) -> bool:
    """Whether so many bytes are enough, some of them left free."""
    return needed(shape, setting) <= room * (1 - KEPT_FREE)


def largest_micro_batch(shape: Shape, setting: Setting, *, room: int, packs: int) -> int:
    """Give the largest divisor of ``packs``, those of a step on a rank, with which ``room`` bytes are enough; or 0."""
    sizes = [n for n in range(1, packs + 1) if packs % n == 0]
    setting = replace(setting, packs=packs)
    return max((n for n in sizes if fits(shape, replace(setting, micro_batch=n), room)), default=0)


def advice(shape: Shape, setting: Setting, *, going_on: bool = False) -> str:
    """Give the settings that each take less memory, the least first, and how much.

    ``going_on``: those alone with which a run that has begun can go on, where one of them helps.
    """
    s, ways = setting, dict[str, Setting]()
    if s.micro_batch > 1:
        fewer = max(n for n in range(1, s.micro_batch) if s.micro_batch % n == 0)
        ways[f"train.micro_batch={fewer}"] = replace(s, micro_batch=fewer)
    if s.checkpointing < 1:
        ways["train.gradient_checkpointing=true"] = replace(s, checkpointing=1.0)
    if going_on and ways:
        return _less(shape, s, ways)
    if s.slots >= 256:
        ways[f"pack.max_length={s.slots // 2}"] = replace(s, slots=s.slots // 2)
    if s.full:
        ways["adapter.kind=lora model.quantizer=nf4"] = replace(s, full=False, quantizer="nf4")
    elif s.quantizer not in STORED_BITS:
        ways["model.quantizer=nf4"] = replace(s, quantizer="nf4")
    if "8bit" not in s.optimizer:
        ways["train.optimizer=paged_adamw_8bit"] = replace(s, optimizer="paged_adamw_8bit")
    return f"{_less(shape, s, ways)}{', in a new run' if going_on else ''}"


def _less(shape: Shape, setting: Setting, ways: Mapping[str, Setting]) -> str:
    sizes = sorted((needed(shape, other), way) for way, other in ways.items())
    words = [f"--set {way} ({size / 2**30:,.2f} GiB)" for size, way in sizes if size < needed(shape, setting)]
    return ", ".join(words) or "a smaller base"


def room_on(device: str) -> int:
    """Give the bytes that a run can have: of a GPU all that is free, of the machine what is available to this process.

    0: unknown.
    """
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return memory_of_machine()[1]


def memory_of_machine() -> tuple[int, int]:
    """Give the bytes of memory that this process may use, and those available; (0, 0): the system won't say."""
    try:
        lines = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text("ascii")))
        total, available = (1024 * int(lines[name]) for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return 0, 0
    limit, used = cgroup("memory.max"), cgroup("memory.current")
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        # what was read of files counts as used until somebody else needs the room
        cached = sum(map(int, re.findall(r"(?m)^(?:in)?active_file (\d+)$", cgroup("memory.stat"))))
        total, available = int(limit), min(available, int(limit) - int(used) + cached)
    return total, available


def cgroup(name: str) -> str:
    """Give what the container that this process runs in is allowed; empty where it is in none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text("ascii").strip()
    except OSError:
        return ""


def _adapted(shape: Shape, setting: Setting) -> list[tuple[str, int, int]]:
    ends = tuple(f".{end}" for end in setting.targets)
    if setting.full or not ends:
        return list(shape.linears)
    return [linear for linear in shape.linears if f".{linear[0]}".endswith(ends)]
