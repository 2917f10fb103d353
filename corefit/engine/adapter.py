"""What of a model trains: the adapter on it, rows of its vocabulary, or all of it."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from corefit.engine import internlm
from corefit.engine.fused import fuse_linears, fuse_lora, fuse_mlp, fuse_norm, fuse_tokens
from corefit.engine.model import (
    first_line,
    hidden,
    import_bitsandbytes,
    int8_on_cpu,
    is_quantized,
    linear_layers,
    read_header,
    weight_files,
)
from corefit.errors import ModelError, RunError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A LoRA adapter."""

    r: int
    """Rank."""
    alpha: int
    """The adapter's output is scaled by alpha / r."""
    dropout: float
    """In [0, 1)."""
    targets: tuple[str, ...] = ()
    """Names, or ends of dotted names, of linear layers; empty: all linear layers of the decoder."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole and stored with the adapter."""
    dora: bool = False
    rslora: bool = False
    """True: the scale is alpha / sqrt(r)."""
    start: str | None = None
    """A folder with an adapter of just these settings, whose weights are the first ones."""
    tokens: tuple[int, ...] = ()
    """Ids whose rows of the embeddings, and of the head, train too."""


def decoder_targets(model: PreTrainedModel) -> list[str]:
    """Give the names, sorted, that stand for all linear layers of the decoder and for nothing else."""
    layers = linear_layers(model)
    inside = {id(module) for module in model.get_decoder().modules()} - {id(model.get_output_embeddings())}
    wanted = [name for name, module in layers.items() if id(module) in inside]
    if not wanted:
        raise ModelError("adapter.targets: this decoder has no linear layers (nn.Linear) to adapt")
    # the last part of a name, or more of it where that is only an index or stands for a layer outside the decoder too
    others = [name for name in layers if name not in set(wanted)]
    targets = set()
    for name in wanted:
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            end = ".".join(parts[-n:])
            if not parts[-n].isdigit() and not any(other == end or other.endswith(f".{end}") for other in others):
                break
        targets.add(end)
    return sorted(targets)


def _taken_for_experts(model: PreTrainedModel, targets: list[str]) -> set[str]:
    """Give the targets that peft takes for matrices of experts, which transformers 5 has in one parameter.

    It would adapt those in the place of layers, or beside them, and so would whoever loads the adapter with it.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert

    trial = LoraConfig(target_modules=targets)
    with contextlib.suppress(ValueError):  # some of them without others, with which they are one
        convert(trial, model, None)
        return set(targets) - set(trial.target_modules or ())
    return set(targets)


def attach_adapter(model: PreTrainedModel, spec: AdapterSpec | None, *, seed: int) -> Any:  # noqa: ANN401, PeftModel or the model
    """Make a loaded base trainable: with a LoRA adapter, or, where ``spec`` is None, all of it.

    Trainable weights are fp32 (``check_trainable`` proves it). Norms become fp32 too; embeddings and head stay as they
    are, unless they are trained.
    The initial weights depend on ``seed`` alone; torch's own random state is as before.

    Raises:
        ModelError: a target that the model lacks; full fine-tuning of quantised weights.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # that row would never train, and it may be the stop's
    if spec is None:
        if is_quantized(model):
            raise ModelError(
                "adapter.kind: full fine-tuning can't train quantised weights; --quantizer none, or kind=lora"
            )
        trained: Any = model.float().requires_grad_(True).train()
    else:
        with without_bitsandbytes(model):
            trained = _attach_lora(model, spec, seed=seed)
    fuse_linears(trained)
    return trained


def _attach_lora(model: PreTrainedModel, spec: AdapterSpec, *, seed: int) -> Any:  # noqa: ANN401, a PeftModel
    from peft import LoraConfig, TaskType, get_peft_model

    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            fuse_norm(module.float())
        elif hasattr(module, "act_fn"):
            fuse_mlp(module)
        elif getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D":  # quantised it looks like one
            raise ModelError("adapter: this decoder has no linear layers (nn.Linear) but Conv1D, as GPT-2 has")
    _check_dora(model, spec.dora)
    targets, saved = internlm.llama_modules(model, spec.targets), internlm.llama_modules(model, spec.modules_to_save)
    targets = targets or sorted({*(everything := decoder_targets(model))} - _taken_for_experts(model, everything))
    if experts := _taken_for_experts(model, targets):
        raise ModelError(f"adapter.targets: of this model peft takes {min(experts)!r} for its experts; leave it out")
    layers, modules = linear_layers(model), [name for name, _ in model.named_modules() if name]
    for where, names, known in (("targets", targets, list(layers)), ("modules_to_save", saved, modules)):
        for wanted in names:
            if not any(_is_named(name, [wanted]) for name in known):
                ends = {name.rpartition(".")[2] for name in known}
                raise ModelError(
                    f"adapter.{where}: {unknown('layer', wanted, {end for end in ends if not end.isdigit()})}"
                )
    for name, module in model.named_modules():
        if _is_named(name, saved) and is_quantized(module):
            raise ModelError(
                f"adapter.modules_to_save: {name} is stored quantised, and such weights can't train; "
                "--quantizer none, or LoRA on it (adapter.targets)"
            )
    tables = vocabulary(model) if spec.tokens else {}
    for name in tables:
        if _is_named(name, targets):
            raise ModelError(f"adapter.targets: {name} can't have LoRA beside model.add_tokens")
        if getattr(model.get_submodule(name), "bias", None) is not None:
            raise ModelError(f"model.add_tokens: {name} has a bias, with which peft can't train single rows")
    rows = [name.rpartition(".")[2] for name in tables if not _is_named(name, saved)]
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
    if rows and head not in tables and _is_named(head, saved):
        both = f'["{rows[0]}", "{head}"]'
        raise ModelError(
            f"adapter.modules_to_save: {head} is {rows[0]}, where model.add_tokens trains: {both} or neither"
        )
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        modules_to_save=saved or None,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        use_dora=spec.dora,
        use_rslora=spec.rslora,
        trainable_token_indices={end: list(spec.tokens) for end in rows} or None,
    )
    device = next(model.parameters()).device
    with warnings.catch_warnings(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"adapter.targets: {first_line(error)}") from error
    # peft keeps a set, whose order changes from process to process, and would write it so
    adapted.peft_config["default"].target_modules = targets
    internlm.check_adapter(adapted)
    if spec.start is not None:
        _load_adapter(adapted, Path(spec.start))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fuse_lora(adapted)
    fuse_tokens(adapted)
    return adapted.train()


def _is_named(module: str, ends: Iterable[str]) -> bool:
    """Whether one of ``ends`` is a module's dotted name, or the last parts of it, as peft takes names."""
    return any(f".{module}".endswith(f".{end}") for end in ends)


@contextlib.contextmanager
def without_bitsandbytes(model: PreTrainedModel) -> Iterator[None]:
    """Keep peft from importing bitsandbytes for a model that has none of it; for one that has, import it first.

    peft's own import of it lacks the precautions. What is imported already stays.
    """
    if is_quantized(model) or "bitsandbytes" in sys.modules:
        import_bitsandbytes()
        yield
        return
    try:
        with hidden("bitsandbytes"):
            yield
    finally:
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available

        for answer in (is_bnb_available, is_bnb_4bit_available):  # what it found out now isn't so
            answer.cache_clear()


def _load_adapter(adapted: Any, folder: Path) -> None:  # noqa: ANN401, a PeftModel
    """Put an adapter's weights into a new one of the same shape."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weight_files(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    if layout := internlm.layout_in(adapted):
        config = json.loads((folder / "adapter_config.json").read_bytes())
        _, tensors = layout.adapter_to_llama(config, tensors, str(folder))
    if found := misfit(tensors, get_peft_model_state_dict(adapted, save_embedding_layers=False)):
        raise ModelError(f"adapter.start: {folder} has {found}: an adapter of another base?")
    set_peft_model_state_dict(adapted, tensors)


def _check_dora(model: nn.Module, dora: object) -> None:
    """See that what peft does to a layer whose weights it takes apart leaves the layer whole."""
    if dora and int8_on_cpu(model):
        raise ModelError("adapter.dora: int8 layers lose their scales to it on a CPU; --quantizer nf4, or none")


def misfit(have: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> str:
    """Say which tensor, the first by name, has another shape than the model's or is on one side only; empty: none."""
    shapes, wanted = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (have, want))
    differ = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
    if not differ:
        return ""
    of, to = (side.get(differ[0], "nothing") for side in (shapes, wanted))
    return f"{of} for {differ[0]}, the model trains {to} ({len(differ)} such weights)"


def with_adapter(model: PreTrainedModel, folder: Path) -> Any:  # noqa: ANN401, a PeftModel
    """Give a loaded base with the adapter in ``folder`` on it."""
    with without_bitsandbytes(model), warnings.catch_warnings(), internlm.llama_adapter(model, folder) as adapter:
        from peft import PeftModel

        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        config = json.loads((adapter / "adapter_config.json").read_bytes())
        tokens = config.get("trainable_token_indices") or ()
        ids = chain.from_iterable(tokens.values()) if isinstance(tokens, dict) else tokens
        _check_dora(model, config.get("use_dora"))
        whole = {
            name: entry["shape"][0] for name, entry in read_header(adapter / "adapter_model.safetensors")[0].items()
        }
        rows = [whole.get(f"base_model.model.{name}.weight", 0) for name in vocabulary(model)]
        add_rows(model, max([*rows, *(id + 1 for id in ids)]))
        try:
            adapted = PeftModel.from_pretrained(model, str(adapter))
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            line = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
            raise ModelError(f"{folder}: made for another base than {model.name_or_path} ({line})") from error
    fuse_tokens(adapted)
    return adapted


def vocabulary(model: Any) -> dict[str, nn.Module]:  # noqa: ANN401
    """Give what has a row for every token, by name: embeddings and head, or the embeddings where both are one."""
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [inner] if outer is None or outer.weight is inner.weight else [inner, outer]
    return {name: module for name, module in model.named_modules() if any(module is table for table in tables)}


@torch.no_grad()
def add_rows(model: PreTrainedModel, rows: int, new: Sequence[int] = ()) -> None:
    """Give embeddings and head at least so many rows; those beyond the old ones, and ``new``, are the mean of the rest.

    Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
    """
    before = len(model.get_input_embeddings().weight)
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    for table in vocabulary(model).values():
        weight: torch.Tensor = table.requires_grad_(False).get_parameter("weight")
        mean = weight[: min([before, *new])].mean(0, dtype=torch.float32)
        weight[[*new, *range(before, rows)]] = mean.to(weight.dtype)


def adapted_layers(model: Any) -> dict[str, int]:  # noqa: ANN401, PeftModel
    """Give how many layers each target of the adapter adapts: all that have its name.

    Raises:
        ModelError: a target adapts nothing, or not all of them.
    """
    adapted = {name for name, module in model.named_modules() if "default" in getattr(module, "lora_A", ())}
    plain = set(linear_layers(model)) - adapted
    counts = {}
    for target in model.peft_config["default"].target_modules:
        left, counts[target] = (sum(f".{name}".endswith(f".{target}") for name in names) for names in (plain, adapted))
        if left or not counts[target]:
            raise ModelError(
                f"adapter.targets: {target!r} adapts {counts[target]} layers, {left} of that name are left"
            )
    return counts


def check_vocabulary(model: Any, size: int, ids: Mapping[str, int]) -> dict[str, int]:  # noqa: ANN401
    """Give the sizes of tokenizer, embeddings and head, once every token of the first has a row in both others.

    Raises:
        ModelError: it has not; ``ids`` names tokens that matter most.
    """
    sizes = {"tokenizer": size, "embeddings": len(model.get_input_embeddings().weight)}
    if rows := getattr(model.get_output_embeddings(), "out_features", 0):
        sizes["head"] = rows
    for what, rows in sizes.items():
        beyond = [f"{token!r} is {id}" for token, id in ids.items() if id >= rows]
        if size > rows or beyond:
            example = f" ({beyond[0]})" if beyond else ""
            raise ModelError(f"vocabulary: the tokenizer has {size:,} tokens{example}, {what} has only {rows:,}")
    return sizes


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Give the parameters that the optimizer changes, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Give ``trainable_parameters``: at least one, all fp32.

    Raises:
        RunError: nothing trains, or not in fp32.
    """
    trainable = trainable_parameters(model)
    if not trainable:
        raise RunError("trainable: no weight of the model would be trained")
    wrong = [name for name, parameter in trainable.items() if parameter.dtype != torch.float32]
    if wrong:
        dtype = str(trainable[wrong[0]].dtype).removeprefix("torch.")
        raise RunError(f"trainable: {len(wrong)} of {len(trainable)} weights aren't fp32, {wrong[0]} is {dtype}")
    return trainable


class ParameterCount(NamedTuple):
    """How many numbers a model has; of 4-bit weights the numbers, not the bytes."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count each parameter once, tied ones too."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        n = parameter.numel() if state is None else int(torch.Size(state.shape).numel())
        total += n
        trainable += n if parameter.requires_grad else 0
    return ParameterCount(trainable, total)
