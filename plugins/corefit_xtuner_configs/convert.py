"""The values of an XTuner configuration -> recipe, notes, and what a flag must give.

It reads what XTuner would build (``model``, ``train_dataloader``, ``optim_wrapper``, ...); the variables at the top are
followed. Whatever is read is taken off a list; what stays on it is a note, unless it asks for nothing.

Source: InternLM/xtuner, ``xtuner/configs`` and ``xtuner/tools/train.py``, tags v0.1.9 to v0.2.0; defaults of what a
configuration leaves out are those of ``peft.LoraConfig``, ``torch.optim.AdamW`` and mmengine's schedulers.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from corefit import ImportedRecipe, RecipeError
from corefit_xtuner_configs.tree import Config, Own, Symbol, Unknown, Value, in_words, near

FORMATS = (
    *("alpaca", "alpaca_zh", "arxiv", "code_alpaca", "colors", "crime_kg_assitan", "default", "law_reference"),
    *("medical", "msagent_react", "oasst1", "openai", "openorca", "pretrain", "sql", "stack_exchange", "tiny_codes"),
    "wizardlm",
)
"""What ``list-dataset-format`` listed, but LLaVA's."""
OWN_FORMAT = "conversation"
"""Records in XTuner's own format, where a configuration names no map function."""
ROOTS = (
    *("tokenizer", "model", "lora", "training_args", "train_dataset", "train_dataloader", "val_dataloader"),
    *("test_dataloader", "val_evaluator", "test_evaluator", "optim_wrapper", "param_scheduler", "train_cfg", "val_cfg"),
    *("test_cfg", "custom_hooks", "default_hooks", "env_cfg", "visualizer", "log_processor", "load_from", "resume"),
    *("randomness", "work_dir", "strategy", "auto_scale_lr", "sequence_parallel_size"),
)
"""Names that XTuner looks at; the others are variables."""
NEW = ("work_dir", "load_from", "resume", "randomness")
"""Of these, what ``--cfg-options`` may set although the file doesn't."""
MODELS = {
    **dict.fromkeys(("DPO", "ORPO", "RewardModel"), "learns from preferences; corefit learns from answers and texts"),
    **dict.fromkeys(("LLaVAModel", "InternVL_V1_5"), "learns from images; corefit trains text models"),
}
_IMAGES, _PAIRS = "reads images; corefit trains text models", "reads preferences; corefit learns from answers and texts"
DATASETS = {
    **dict.fromkeys(("LLaVADataset", "InternVL_V1_5_Dataset", "RefCOCOJsonDataset", "InvRefCOCOJsonDataset"), _IMAGES),
    "build_preference_dataset": _PAIRS,
    "build_packed_dataset": "reads InternLM's tokenised files, which hold no text; corefit takes the texts",
}
"""Kinds of data that corefit does not train on, with the reason."""
OPTIMIZERS = {
    **dict.fromkeys(("AdamW", "FusedAdam", "DeepSpeedCPUAdam", "adamw_torch", "adamw_torch_fused"), "adamw"),
    **dict.fromkeys(("PagedAdamW32bit", "PagedAdamW", "paged_adamw_32bit"), "paged_adamw_32bit"),
    **dict.fromkeys(("PagedAdamW8bit", "paged_adamw_8bit"), "paged_adamw_8bit"),
    **dict.fromkeys(("AdamW8bit", "adamw_8bit"), "adamw_8bit"),
}
PRECISIONS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
SCHEDULERS = {"CosineAnnealingLR": "cosine", "LinearLR": "linear", "ConstantLR": "constant"}
BEFORE = (
    *("default", "zephyr", "internlm_chat", "moss_sft", "llama2_chat", "chatglm2", "chatglm3", "qwen_chat"),
    *("baichuan_chat", "baichuan2_chat", "wizardlm"),
)
"""Templates that v0.1.9 had and wrote differently: an end token and a beginning in every turn, no separator."""
ALL: Any = object()

_MMLU = "`corefit eval RUN --choices FILE` is MMLU's accuracy; val.data has the loss"

LEFT: Sequence[tuple[str, tuple[Any, ...], str]] = (
    ("optim_wrapper.clip_grad.type", ("norm",), "the norm is clipped, not the values"),
    ("*.type", (ALL,), ""),
    ("tokenizer.trust_remote_code", (ALL,), ""),
    ("*.trust_remote_code", (False,), "no remote code runs, unless --set model.trust_remote_code=true"),
    ("tokenizer.eos_token", (ALL,), ""),  # the template says what ends an answer
    ("tokenizer.*", (ALL,), ""),  # nothing is padded on a side; what a user types is never a control token
    ("model.use_varlen_attn", (True,), "documents of a pack never see each other, as if it were True"),
    ("*.use_varlen_attn", (ALL,), ""),
    ("model.use_activation_checkpointing", (True,), "train.gradient_checkpointing says it"),
    ("*.quantization_config.llm_int8_threshold", (6.0,), "6.0 is int8's"),
    ("*.quantization_config.llm_int8_has_fp16_weight", (False,), "int8 keeps no 16-bit weights"),
    ("*.quantization_config.bnb_4bit_use_double_quant", (True,), "nf4 quantises its scales too"),
    ("*.quantization_config.bnb_4bit_*", (ALL,), ""),  # the compute type follows train.precision
    ("*.quantization_config.load_in_?bit", (ALL,), ""),
    ("model*.torch_dtype", (ALL,), ""),  # frozen weights are as they are stored
    ("model*.attn_implementation", (ALL,), ""),
    ("model*.device_map", (ALL,), ""),
    ("model.max_position_embeddings", (None,), "corefit changes no RoPE; rope_scaling in the base's config.json does"),
    ("model.tokenizer**", (None,), "tokens that the vocabulary lacks are named in model.add_tokens"),
    ("*lora.bias", ("none",), "biases stay as they are"),
    ("*lora.task_type", (ALL,), ""),
    ("*lora.inference_mode", (False,), ""),
    ("*dataloader.num_workers", (ALL,), ""),  # run.threads
    ("*dataloader.pin_memory", (ALL,), ""),
    ("*dataloader.persistent_workers", (ALL,), ""),
    ("*dataloader.collate_fn**", (ALL,), ""),
    ("*dataloader.sampler**", (ALL,), ""),  # the order is a function of the seed
    ("*dataloader.batch_sampler**", (ALL,), ""),
    ("*.remove_unused_columns", (ALL,), ""),
    ("*.map_num_proc", (ALL,), ""),
    ("*.ignore_verifications", (ALL,), ""),
    ("*.shuffle_before_pack", (ALL,), ""),
    ("*.input_ids_with_output", (True,), "answers are always part of a sample"),
    ("*.do_dataset_tokenization", (True,), "records are always encoded here"),
    ("*.with_image_token", (False,), "corefit trains text models"),
    ("*.rename_maps", ([], None), "[data.fields] names the fields of a format"),
    ("*.split", ("train",), "corefit reads files; --data names those of this split"),
    ("optim_wrapper.loss_scale", ("dynamic",), "the loss scale of fp16 is dynamic"),
    ("optim_wrapper.clip_grad.error_if_nonfinite", (ALL,), ""),  # such a step is skipped, counted and named
    ("optim_wrapper.clip_grad.norm_type", (2, 2.0), "the 2-norm is clipped"),
    ("optim_wrapper.paramwise_cfg**", (), "train.lr_mult multiplies the rate of weights by name"),
    ("param_scheduler*.eta_min*", (0, 0.0, None), "the rate goes down to 0"),
    ("param_scheduler*.factor", (1, 1.0), "train.lr is the whole rate"),
    ("param_scheduler*.end_factor", (1, 1.0), "a warm-up ends at the rate"),
    *((f"param_scheduler*.{key}", (ALL,), "") for key in ("begin", "end", "T_max", "by_epoch", "verbose")),
    *((f"param_scheduler*.{key}", (ALL,), "") for key in ("start_factor", "convert_to_iter_based", "last_step")),
    ("param_scheduler", (None, []), ""),
    ("train_cfg.by_epoch", (ALL,), ""),
    ("train_cfg.val_interval", (ALL,), ""),
    ("*EvaluateChatHook.tokenizer**", (ALL,), ""),
    ("*EvaluateChatHook.system", ("", None), "sample.prompts are asked with training's, where all records have one"),
    ("*EvaluateChatHook.prompt_template**", (ALL,), ""),
    ("*EvaluateChatHook.stop_word*", (ALL,), ""),  # the template says where an answer ends
    ("*EvaluateChatHook.generation_kwargs**", ({}, None), "samples are generated greedily"),
    ("default_hooks.checkpoint.by_epoch", (ALL,), ""),
    ("default_hooks.checkpoint.save_last", (ALL,), ""),
    ("default_hooks.checkpoint.save_optimizer", (True,), "a checkpoint always holds what resuming needs"),
    ("default_hooks.checkpoint.save_best", (None,), "checkpoint.keep_best keeps the best"),
    ("default_hooks.timer**", (ALL,), ""),
    ("default_hooks.logger**", (ALL,), ""),
    ("default_hooks.param_scheduler**", (ALL,), ""),
    ("default_hooks.sampler_seed**", (ALL,), ""),
    ("default_hooks.runtime_info**", (ALL,), ""),
    ("env_cfg**", (ALL,), ""),
    ("log_processor**", (ALL,), ""),
    ("randomness.deterministic", (False,), "a run on a CPU with one count of threads is deterministic anyway"),
    ("randomness.*", (ALL,), ""),
    ("load_from", (None,), ""),
    ("resume", (False, None), "--resume goes on with a run of corefit's"),
    ("visualizer**", (None,), "RUN/metrics.jsonl has a line a step; nothing is sent anywhere"),
    ("val_**", (None,), _MMLU),
    ("test_**", (None,), _MMLU),
    ("strategy**", (None,), "run.sharding says whether the base is divided among GPUs"),
    ("sequence_parallel_size", (1,), "a pack must fit on one GPU; a smaller pack.max_length does"),
)
"""Dotted path, values that ask for nothing that corefit lacks (``ALL``: any), and the reason for a note otherwise. The
first pattern that fits counts; ``**`` is for all below, in one."""
SILENT_HOOKS = ("DatasetInfoHook", "VarlenAttnArgsToMessageHubHook", "ThroughputHook", "HFCheckpointHook")
"""What they did, a run does anyway."""


def convert(path: Path, overrides: Sequence[str]) -> ImportedRecipe:
    """Read an XTuner configuration without running it; ``overrides`` are ``key=value`` as for its ``--cfg-options``.

    Raises:
        RecipeError: no XTuner configuration, or one for what corefit doesn't train; one line for each reason.
    """
    given = [_override(argument) for argument in overrides]
    top = {keys[0]: value for keys, value in given if len(keys) == 1}
    config = Config(path, top)
    try:
        _apply(config, given)
        if base := config.names.get("_base_"):
            words = "_base_: files that a configuration builds on are read as `with read_base(): from .NAME import *`"
            raise RecipeError(f"{base.where}: {words}, where its values are changed by name")
        if "model" not in config.names and config.stars:
            words = "is never imported; `corefit copy NAME` has XTuner's own as recipes, a file beside this one is read"
            raise RecipeError(f"{path}: no `model` in it, and {', '.join(config.stars)} {words}")
        if "model" not in config.names:
            raise RecipeError(f"{path}: no `model` in it: a name that ends in .py, but no XTuner configuration")
        return _Reading(config).recipe()
    except RecursionError as error:
        raise RecipeError(f"{path}: a value that holds itself, or is nested too deeply") from error


def _override(argument: str) -> tuple[list[str], Value]:
    where = f"--cfg-options {argument}"
    key, equals, text = argument.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{where}: expected key=value")
    return key.split("."), _literal(text, where)


def _literal(text: str, where: str) -> Value:
    """Give a value as mmengine's command line reads it: numbers, true, None, ``[a,b]`` and ``a,b`` lists, else text."""
    words = text.strip()
    if words.lower() in ("true", "false", "none"):
        return Value({"true": True, "false": False, "none": None}[words.lower()], where)
    for kind in (int, float):
        try:
            return Value(kind(words), where)
        except ValueError:
            continue
    if len(words) > 1 and words[0] in "'\"" and words[0] == words[-1]:
        return Value(words[1:-1], where)
    bracketed = words[:1] + words[-1:] in ("[]", "()")
    inner = words[1:-1] if bracketed else words
    if bracketed or re.search(r",(?![^\[(]*[\])])", inner):
        parts = re.findall(r"\s*((?:\[[^\]]*\]|\([^)]*\)|'[^']*'|\"[^\"]*\"|[^,])+)", inner)
        return Value([_literal(part, where) for part in parts], where)
    return Value(words, where)


def _apply(config: Config, given: Sequence[tuple[list[str], Value]]) -> None:
    """Put overrides where they belong; those of one name that is assigned have been, as it was."""
    for keys, value in given:
        *way, last = keys
        if not way and last in config.seen:
            continue
        if not way and last in NEW:
            config.names[last] = value
            continue
        holder: Any = {name: v for name, v in config.names.items() if not isinstance(v.data, (Symbol, Own))}
        for i, key in enumerate(way):
            found = holder.get(key) if isinstance(holder, dict) else _nth(holder, key)
            if found is None:
                raise _no_key(value, way[: i + 1], config, holder)
            holder = found.data
        if isinstance(holder, dict) and (way or last in holder):
            holder[last] = value
            if not way:
                config.names[last] = value
        elif isinstance(holder, list) and _nth(holder, last) is not None:
            holder[int(last)] = value
        else:
            raise _no_key(value, keys, config, holder)


def _nth(holder: object, key: str) -> Value | None:
    if isinstance(holder, list) and key.isdecimal() and int(key) < len(holder):
        return holder[int(key)]  # type: ignore[no-any-return]
    return None


def _no_key(value: Value, keys: Sequence[str], config: Config, holder: object) -> RecipeError:
    hint = near(keys[-1], holder if isinstance(holder, dict) else ())
    return RecipeError(f"{value.where}: no key {'.'.join(keys)!r} in {config.path.name}{hint}")


def _name(value: Value | None) -> str:
    """Give the last part of a symbol's or a text's dotted path; of a ``from_pretrained`` the class; else nothing."""
    path = value.data.path if value and isinstance(value.data, Symbol) else value.data if value else ""
    parts = path.split(".") if isinstance(path, str) else [""]
    return parts[-2] if parts[-1] in ("from_pretrained", "load") and len(parts) > 1 else parts[-1]


def _whole(number: Any) -> Any:  # noqa: ANN401
    """Give 3.0 as 3, all else as it is."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


class _Reading:
    """One configuration on its way to a recipe."""

    def __init__(self, config: Config) -> None:
        self.config, self.names = config, config.names
        self.tables: dict[str, Any] = {"model": {}, "adapter": {}, "data": [], "template": {}, "pack": {}, "train": {}}
        self.lines: dict[str, str] = {}
        self.notes: list[tuple[str, str]] = list(config.notes)
        self.missing: dict[str, str] = {}
        self.used: set[int] = set()
        self.accumulated: float = 1

    # ------------------------------------------------------------------------------------------------------- tools

    def note(self, where: str, words: str) -> None:
        """Add a note."""
        self.notes.append((where, words))

    def lack(self, key: str, where: str, words: str) -> None:
        """Say that the value of a recipe key can't be known."""
        section, _, name = key.partition(".")
        if section != "data":
            self.tables.get(section, {}).pop(name, None)
        self.missing.setdefault(key, f"{where}: {words}")

    def use(self, value: Value | None) -> Value | None:
        """Take a value off the list of what is left; of a dict each key is taken for itself."""
        if value is not None and not isinstance(value.data, dict):
            self.used.add(id(value))
        return value

    def given(self, holder: Value | None, key: str) -> Value | None:
        """Take the value under a key off the list; None: it is not there, or None."""
        value = self.use(holder.get(key)) if holder else None
        return value if value and value.data is not None else None

    def put(
        self, key: str, value: Value | None, into: Callable[[Any], Any] = lambda data: data, *, named: bool = False
    ) -> None:
        """Set a recipe key; ``into`` makes the recipe's value of XTuner's, ``named``: of something imported."""
        if value is None:
            return
        self.use(value)
        for inside in value.inside():
            self.use(inside)
        how = f"write the value, or --set {re.sub('^data[.][0-9]+', 'data', key)}=VALUE"
        if (lost := value.unknown()) is not None:
            self.lack(key, lost.where, f"{key} is {in_words(lost)}; {how}")
            return
        if not named and (symbol := next((v for v in (value, *value.inside()) if isinstance(v.data, Symbol)), None)):
            words = f"{key} is {symbol.data.path!r}, which is never imported; {how}"
            self.lack(key, symbol.where, words)
            return
        data = value.plain()
        try:
            data = into(data)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            pass  # the recipe says what it expected
        if data is None:
            self.lack(key, value.where, f"{key}: found None; {how}")
        else:
            self.set(key, data, value.where)

    def set(self, key: str, data: Any, where: str) -> None:  # noqa: ANN401
        """Set a recipe key to a value that is worked out."""
        section, _, name = key.partition(".")
        table = self.tables.setdefault(section, {})
        if section == "data":
            index, _, name = name.partition(".")
            table = table[int(index)]
        table[name] = list(data) if isinstance(data, tuple) else data
        self.lines[key] = where

    def number(self, value: Value | None, default: float) -> float | None:
        """Give a number, the default where there is none; None: it can't be known, or is no number."""
        self.use(value)
        if value is None or value.data is None:
            return default
        return value.data if type(value.data) in (int, float) else None

    def steps(self, key: str, value: Value | None) -> None:
        """Set a key to micro-batches in steps."""
        self.put(key, value, lambda n: max(1, round(n / self.accumulated)) if n > 0 else 0)

    # ------------------------------------------------------------------------------------------------------ stations

    def recipe(self) -> ImportedRecipe:
        """Give the whole."""
        model = self.names["model"]
        kind = _name(model.get("type"))
        hf = _name(self.names.get("framework")) == "huggingface"
        if kind in MODELS:
            raise RecipeError(f"{model.where}: model.type is {kind}, which {MODELS[kind]}")
        if kind != "SupervisedFinetune" and not hf:
            what = kind or in_words(model.get("type") or Value(Unknown("not there"), model.where))
            raise RecipeError(f"{model.where}: model.type is {what}, expected SupervisedFinetune")
        llm, lora = (model, self.names.get("lora")) if hf else (model.get("llm"), model.get("lora"))
        if llm is None:
            raise RecipeError(f"{model.where}: model has no llm")
        self.base(llm)
        self.adapter(lora, llm)
        self.start("load_from", Value(self.names, str(self.config.path)), lora)
        self.start("peft_model", model, lora)
        self.start("pretrained_pth", model, lora)
        self.used.add(id(self.names.get("framework")))
        if hf:
            self.arguments(self.names.get("training_args") or Value({}, model.where))
            datasets, loader = self.names.get("train_dataset"), Value({}, model.where)
        else:
            loader = self.names.get("train_dataloader") or Value({}, model.where)
            self.optimizer(loader)
            datasets = loader.get("dataset")
        self.data(datasets, loader)
        self.hooks()
        self.put("run.out", self.given(Value(self.names, str(self.config.path)), "work_dir"))
        self.put("train.seed", self.given(self.names.get("randomness"), "seed"))
        self.rest()
        tables = {title: table for title, table in self.tables.items() if table}
        notes = sorted(dict.fromkeys(self.notes), key=lambda note: _place(note[0]))
        return ImportedRecipe(
            tables=tables,
            lines=self.lines,
            notes=tuple(f"{where}: {words}" for where, words in notes),
            missing=self.missing,
        )

    def base(self, llm: Value) -> None:
        """Read the base and how it is stored."""
        name = llm.get("pretrained_model_name_or_path")
        if name is None:
            self.lack("model.base", llm.where, "the base has no pretrained_model_name_or_path; --model names it")
        self.put("model.base", name)
        tokenizer = self.names.get("tokenizer")
        other = tokenizer and tokenizer.get("pretrained_model_name_or_path")
        if name and other and other.data != name.data:
            self.note(
                other.where, "tokenizer: corefit takes the tokenizer from the model's folder; put its files there"
            )
        if (added := self.given(tokenizer, "additional_special_tokens")) and added.data:
            self.put("model.add_tokens", added)
            self.used.add(id(self.names["model"].get("tokenizer")))  # by which the embeddings grew
        quantization = self.use(llm.get("quantization_config"))
        asked = quantization if quantization and isinstance(quantization.data, dict) else llm
        for bits, quantizer in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
            flag = self.use(asked.get(bits))
            if flag is not None and flag.data is not False:
                self.put("model.quantizer", flag, {True: quantizer}.__getitem__)
                kind = self.use(asked.get("bnb_4bit_quant_type"))
                if quantizer == "nf4" and (kind is None or kind.data != "nf4"):
                    self.lack(
                        "model.quantizer", (kind or flag).where, "only nf4 is built in; --quantizer nf4, or a plugin's"
                    )
                return
        what = _name(quantization.get("type")) if quantization else ""
        if quantization is not None and quantization.data is not None and what != "BitsAndBytesConfig":
            what = what or in_words(quantization.unknown() or quantization)
            self.lack(
                "model.quantizer", quantization.where, f"quantization_config: {what}; --quantizer nf4, int8 or none"
            )
            return
        self.set("model.quantizer", "none", llm.where)

    def adapter(self, lora: Value | None, llm: Value) -> None:
        """Read the adapter; what ``LoraConfig`` is not told is as peft has it."""
        self.use(lora)
        if lora is None or lora.data is None:
            self.set("adapter.kind", "none", llm.where)
            return
        if not isinstance(lora.data, dict):
            self.lack("adapter.kind", lora.where, f"lora is {in_words(lora)}; --set adapter.kind=lora, or none")
            return
        if (kind := _name(lora.get("type"))) not in ("LoraConfig", ""):
            raise RecipeError(f"{lora.where}: lora.type is {kind}; corefit trains LoRA adapters, or every weight")
        for key, theirs, default in (("r", "r", 8), ("alpha", "lora_alpha", 8), ("dropout", "lora_dropout", 0.0)):
            self.put(
                f"adapter.{key}", lora.get(theirs) or Value(default, lora.where), _whole if key != "dropout" else float
            )
        targets = self.given(lora, "target_modules")
        if targets and isinstance(targets.data, str) and targets.data != "all-linear":
            self.lack(
                "adapter.targets", targets.where, "target_modules is a pattern; --set adapter.targets=['q_proj', ...]"
            )
        elif targets and targets.data != "all-linear":
            self.put("adapter.targets", targets)
        for key, theirs in (("modules_to_save", "modules_to_save"), ("dora", "use_dora"), ("rslora", "use_rslora")):
            self.put(f"adapter.{key}", self.given(lora, theirs))

    def start(self, key: str, holder: Value, lora: Value | None) -> None:
        """Say how to begin with the weights of a checkpoint."""
        if (value := self.given(holder, key)) is None:
            return
        if lora is None or lora.data is None:
            self.note(value.where, f"{key}: not loaded; --model names the folder with the weights to begin with")
            return
        file = value.data if isinstance(value.data, str) else "FILE.pth"
        line = f"corefit safetensors {file} --config {self.config.path} --out DIR"
        self.lack("adapter.start", value.where, f"{key}: `{line}` makes an adapter of it; then --set adapter.start=DIR")

    def optimizer(self, loader: Value) -> None:
        """Read the optimizer, the schedule and the length of the run."""
        wrapper = self.names.get("optim_wrapper") or Value({}, loader.where)
        batch, counts = loader.get("batch_size"), wrapper.get("accumulative_counts")
        self.accumulated = self.number(counts, 1) or 1
        self.length(self.names.get("train_cfg") or Value({}, loader.where))
        self.batches(batch, counts, loader.where)
        dtype = self.given(wrapper, "dtype")
        name = _name(dtype)
        self.put("train.precision", dtype, lambda _: PRECISIONS.get(name, name), named=True)
        optimizer = wrapper.get("optimizer") or Value({}, wrapper.where)
        self.put("train.lr", optimizer.get("lr") or Value(1e-3, optimizer.where), float)
        self.schedule(self.names.get("param_scheduler"), loader.where)
        self.kind(optimizer.get("type"), optimizer.where)
        self.put("train.weight_decay", optimizer.get("weight_decay") or Value(0.01, optimizer.where), float)
        self.put("train.betas", optimizer.get("betas"))
        clip = wrapper.get("clip_grad") or Value({}, wrapper.where)
        norm = clip.get("max_norm") or (clip if clip.unknown() else Value(0.0, clip.where))
        self.put("train.clip", norm, lambda n: 0.0 if n is None else float(n))

    def length(self, cfg: Value) -> None:
        """Read how long the run is."""
        if epochs := self.given(cfg, "max_epochs"):
            self.put("train.epochs", epochs, _whole)
        elif iters := self.given(cfg, "max_iters"):
            self.set("train.epochs", 0, iters.where)
            self.steps("train.max_steps", iters)

    def batches(self, batch: Value | None, counts: Value | None, where: str) -> None:
        """Read how many packs make a step; from here on micro-batches can be told in steps."""
        size, each = self.number(batch, 1), self.number(counts, 1)
        for value, found in ((batch, size), (counts, each)):
            if value is not None and found is None:
                words = f"{in_words(value)}; write the value, or --set train.packs_per_step=N"
                self.lack("train.packs_per_step", value.where, words)
        if size is not None and each is not None:
            self.set("train.packs_per_step", _whole(size * each), (counts or batch or Value(0, where)).where)
        if size is not None:
            self.set("train.micro_batch", _whole(size), batch.where if batch else where)

    def kind(self, kind: Value | None, where: str) -> None:
        """Read which optimizer it is."""
        if kind is None or (name := _name(kind)) in OPTIMIZERS:
            self.put("train.optimizer", kind, lambda _: OPTIMIZERS[name], named=True)
            return
        what = in_words(kind) if kind.unknown() else name
        choices = " or ".join(sorted(set(OPTIMIZERS.values())))
        self.lack("train.optimizer", kind.where, f"optimizer {what}: --set train.optimizer={choices}")

    def schedule(self, value: Value | None, where: str) -> None:
        """Read the schedule: one curve over the run, and a straight warm-up before it."""
        items = (
            [] if value is None or value.data is None else value.inside() if isinstance(value.data, list) else [value]
        )
        rising = [item for item in items if self.rises(item)]
        warm = [item for item in items[:1] if item in rising]
        curves = [item for item in items if item not in rising]
        kinds = [_name(item.get("type")) for item in curves]
        if not curves:
            self.set("train.scheduler", "constant", (value or Value(0, where)).where)
        elif len(curves) > 1 or kinds[0] not in SCHEDULERS:
            what = ", ".join(kind or in_words(item.unknown() or item) for kind, item in zip(kinds, curves, strict=True))
            words = f"param_scheduler {what}: --scheduler cosine, linear, constant or wsd, each after a warm-up"
            self.lack("train.scheduler", curves[0].where, words)
        else:
            self.set("train.scheduler", SCHEDULERS[kinds[0]], curves[0].where)
            self.ends(curves[0], kinds[0])
        for item in rising[len(warm) :]:
            self.note(item.where, "param_scheduler: a warm-up later than the beginning: left out")
        for item in [*warm, *([] if warm else curves)]:
            if begin := self.number(item.get("begin"), 0):
                self.note(item.where, f"begin: {begin:g}: corefit's schedules begin with the run")
        self.warmup(warm[0] if warm else None, curves, where)

    def rises(self, item: Value) -> bool:
        """Whether a schedule is a warm-up: it rises to the rate, and leaves it there."""
        if _name(item.get("type")) != "LinearLR" or self.number(item.get("end_factor"), 1.0) != 1.0:
            return False
        first = self.number(item.get("start_factor"), 1 / 3)
        return first is None or first < 1

    def total(self, item: Value) -> tuple[float | None, str]:
        """Give the length of the run in the unit of a schedule, where it is known, and the unit."""
        by_epoch = item.get("by_epoch")
        epochs = by_epoch is None or by_epoch.data is True
        cfg = self.names.get("train_cfg")
        length = cfg.get("max_epochs" if epochs else "max_iters") if cfg else None
        return self.number(length, 0) or None, "epochs" if epochs else "iterations"

    def ends(self, curve: Value, kind: str) -> None:
        """Say where a curve ends elsewhere than the run, or somewhere else than at 0."""
        last = self.use(curve.get("end_factor"))
        if kind == "LinearLR" and (last is None or last.data != 0):
            words = "1" if last is None else in_words(last) if last.unknown() else f"{last.data:.3g}"
            self.note((last or curve).where, f"end_factor: {words}: corefit's linear schedule goes from the rate to 0")
            self.use(curve.get("start_factor"))
        if kind == "ConstantLR" and curve.get("factor") is None:
            self.note(curve.where, "factor: 0.333: corefit's constant schedule is train.lr")
        end, (whole, unit) = curve.get("T_max") or curve.get("end"), self.total(curve)
        found, began = self.number(end, 0), self.number(curve.get("begin"), 0) or 0
        # a cosine that begins after the warm-up and takes as long as the run is what XTuner once meant by its end
        near = found and whole and min(abs(found - whole), abs(began + found - whole)) <= 1e-3 * whole
        if end and found and whole and not near and kind != "ConstantLR":
            words = f"{kind} ends at {found:g} of {whole:g} {unit}: corefit's schedules end with the run"
            self.note(end.where, words)

    def warmup(self, item: Value | None, curves: Sequence[Value], where: str) -> None:
        """Read the warm-up as a share of the run."""
        start = item and item.get("start_factor")
        if item and (first := self.number(start, 1 / 3)) is not None and first > 0.05:
            self.note((start or item).where, f"start_factor: {first:.3g}: corefit's warm-up begins at 0")
        end = item and item.get("end")
        if item is None or end is None:
            self.set("train.warmup", 0.0, item.where if item else where)
            return
        steps, (whole, unit) = self.number(end, 0), self.total(item)
        alike = [curve for curve in curves if self.total(curve)[1] == unit]
        for curve in [] if whole else alike:
            whole = self.number(curve.get("end") or curve.get("T_max"), 0)
        if steps is None or (whole is None and alike):
            self.lack("train.warmup", end.where, "the end of the warm-up can't be known; --set train.warmup=SHARE")
        elif steps and not whole:
            words = (
                f"a warm-up of {steps:g} {unit}: corefit's is a share of the run; 0.03 unless --set train.warmup=..."
            )
            self.note(end.where, words)
        else:
            self.set("train.warmup", round(min(steps / (whole or 1), 1.0), 6), end.where)

    def arguments(self, args: Value) -> None:
        """Read what a configuration with ``framework = 'huggingface'`` gives transformers' Trainer."""
        self.accumulated = 1  # the Trainer counts steps
        self.batches(args.get("per_device_train_batch_size"), args.get("gradient_accumulation_steps"), args.where)
        self.kind(args.get("optim"), args.where)
        self.put("train.lr", args.get("learning_rate") or Value(5e-5, args.where), float)
        self.put("train.weight_decay", args.get("weight_decay"), float)
        self.put("train.clip", args.get("max_grad_norm"), float)
        self.put("train.epochs", args.get("num_train_epochs"), _whole)
        self.put("train.scheduler", args.get("lr_scheduler_type"))
        self.put("train.warmup", args.get("warmup_ratio"), float)
        if steps := self.use(args.get("warmup_steps")):
            self.note(
                steps.where, "warmup_steps: corefit's warm-up is a share of the run; 0.03 unless --set train.warmup=..."
            )
        for flag, precision in (("fp16", "fp16"), ("bf16", "bf16")):
            value = self.use(args.get(flag))
            if value and value.data is True:
                self.set("train.precision", precision, value.where)
        self.put("checkpoint.every_steps", args.get("save_steps"))
        self.put("checkpoint.keep", args.get("save_total_limit"))
        for key in ("do_train", "logging_steps", "save_strategy", "ddp_find_unused_parameters"):
            self.use(args.get(key))

    # ---------------------------------------------------------------------------------------------------------- data

    def data(self, datasets: Value | None, loader: Value) -> None:
        """Read the sources, and what all of them share: template and length."""
        if datasets is None or not isinstance(datasets.data, dict):
            what = f"the data set is {in_words(datasets.unknown() or datasets)}" if datasets else "no data set"
            self.tables["data"].append({})
            self.lack("data.0.path", (datasets or loader).where, f"{what}; --data and --plugin name it")
            return
        sources = [datasets]
        if _name(datasets.get("type")) == "ConcatDataset":
            held = datasets.get("datasets") or datasets.get("datasets_cfg")
            sources = held.inside() if held else []
        sampler = loader.get("sampler")
        shuffle = sampler and sampler.get("shuffle")
        lengths: list[Value] = []
        for number, source in enumerate(sources):
            self.tables["data"].append({})
            self.source(number, source)
            before = source.get("shuffle_before_pack")
            if shuffle and shuffle.data is False and (before is None or before.data is False):
                self.set(f"data.{number}.shuffle", False, shuffle.where)
            if (length := self.use(source.get("max_length"))) is not None:
                lengths.append(length)
            self.use(packed := source.get("pack_to_max_length"))
            if packed and packed.data is not True:
                words = "pack_to_max_length: corefit always packs, so a step holds more samples; a smaller "
                self.note(packed.where, f"{words}train.packs_per_step gives the number of steps back")
        known = sorted({v.data for v in lengths if type(v.data) in (int, float)})
        if lengths:
            longest = next((v for v in lengths if v.unknown() or v.data == (known or [0])[-1]), lengths[0])
            self.put("pack.max_length", longest, _whole)
        if len(known) > 1:
            self.note(
                lengths[0].where, f"max_length: {' and '.join(map(str, known))}; packs have {known[-1]} for all sources"
            )
        name = self.tables["template"].get("name")
        length = self.names.get("train_cfg")
        if name in BEFORE and length and length.get("by_epoch") and not length.get("type"):  # no TrainLoop yet
            words = f"prompt_template: v0.1.9, which this looks like, meant another text by it: --template {name}@0.1.9"
            self.note(self.lines["template.name"], words)
            for number, source in enumerate(self.tables["data"]):
                if source.get("map") == "alpaca":
                    words = "v0.1.9, which this looks like, wrote a system text too: data.map = alpaca@0.1.9"
                    self.note(self.lines[f"data.{number}.map"], f"dataset_map_fn: {words}")

    def source(self, number: int, source: Value) -> None:
        """Read one source: where it lies, its format and its template."""
        key = f"data.{number}"
        kind = _name(source.get("type"))
        if kind in DATASETS:
            raise RecipeError(f"{source.where}: {kind} {DATASETS[kind]}")
        if kind == "MOSSSFTDataset":  # reads, maps and renders by itself
            self.put(f"{key}.path", source.get("data_file"))
            self.set(f"{key}.map", "moss_sft", source.where)
            self.put(f"{key}.options", self.given(source, "bot_name"), lambda name: {"bot_name": name})
            self.set("template.name", "moss_sft", source.where)
            return
        if kind not in ("process_hf_dataset", "process_ms_dataset"):
            what = kind or in_words(source.unknown() or source)
            self.lack(f"{key}.path", source.where, f"the data set is {what}; --data and --plugin name it")
            return
        if (encode := source.get("do_dataset_tokenization")) and encode.data is not True:
            self.lack(
                f"{key}.map", encode.where, "records that are token ids; corefit takes texts: --data and --plugin"
            )
        self.files(number, source.get("dataset"), source.where)
        if limit := self.given(source, "max_dataset_length"):
            self.put(f"{key}.first", limit)
            self.note(limit.where, "max_dataset_length: the first so many records, not a random choice")
        self.format(f"{key}.map", self.use(source.get("dataset_map_fn")), source)
        self.template(self.use(source.get("template_map_fn")))

    def files(self, number: int, dataset: Value | None, where: str) -> None:
        """Read what ``load_dataset`` is given."""
        key = f"data.{number}.path"
        path = dataset and (dataset.get("path") or dataset.get("dataset_name"))
        if dataset is None or path is None:
            what = in_words(dataset) if dataset and dataset.unknown() else "no path in it"
            self.lack(
                key, (dataset or Value(0, where)).where, f"dataset: {what}; --data names files, a folder or a glob"
            )
            return
        self.use(path)
        files, folder = self.given(dataset, "data_files"), self.given(dataset, "data_dir")
        builder = path.data if path.data in ("json", "csv", "text", "parquet", "arrow", "pandas") else None
        folder_of = path.data if isinstance(path.data, str) and not builder else ""

        def inside(names: Any) -> Any:  # noqa: ANN401
            many = [names] if isinstance(names, str) else names
            joined = [posixpath.join(folder_of, name) for name in many]
            return joined[0] if len(joined) == 1 else joined

        if files and isinstance(files.data, dict):
            for split, value in files.data.items():
                if split == "train":
                    self.put(key, value, inside)
                elif split in ("validation", "val", "eval", "dev"):
                    self.put("val.data", value, inside)
                else:
                    self.note(value.where, f"data_files: {split}: not read")
            if "train" not in files.data:
                self.lack(key, files.where, "data_files has no 'train'; --data names the file to train on")
        elif files or folder:
            self.put(key, files or folder, inside)
        elif builder:
            self.lack(key, path.where, f"load_dataset({builder!r}) without data_files; --data names the file")
        else:
            self.put(key, path)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", folder_of) and not Path(folder_of).exists():
            how = "--data names files"
            if _name(dataset.get("type")) == "load_dataset":
                how = f"`hf download --repo-type dataset {folder_of} --local-dir {folder_of}`, or --data"
            self.note(path.where, f"data: {folder_of} is a data set on a hub; corefit downloads no data: {how}")
        if name := self.given(dataset, "name") or self.given(dataset, "subset_name"):
            self.note(
                name.where, f"dataset name {name.plain()!r}: corefit reads files; --data names those of this subset"
            )

    def format(self, key: str, function: Value | None, source: Value) -> None:
        """Read which format the records have."""
        if function is None or function.data is None:
            if (split := source.get("template_map_fn")) and split.data is not None:
                self.set(key, OWN_FORMAT, (function or source).where)
            return
        name = _name(function).removesuffix("_map_fn").replace("crime_kg_assitant", "crime_kg_assitan")
        path = function.data.path if isinstance(function.data, Symbol) else function.data
        theirs = isinstance(path, str) and (path.startswith("xtuner.") or "." not in path)
        if theirs and name in FORMATS:
            self.put(key, function, lambda _: name, named=True)
        elif theirs and name.startswith("llava"):
            raise RecipeError(f"{function.where}: {name} {_IMAGES}")
        else:
            what, how = in_words(function), "--plugin names the format"
            if isinstance(function.data, Own):
                how = f"copy it, as it is, into my_format.py, and add --plugin my_format.py:{function.data.name}"
            elif isinstance(function.data, Symbol):
                module, _, called = function.data.path.rpartition(".")
                file = self.config.path.parent.joinpath(*module.split(".")).with_suffix(".py")
                place = str(file) if file.is_file() else module
                what, how = f"{path}, which is never imported", f"--plugin {place}:{called} takes it as it is"
            self.lack(key, function.where, f"dataset_map_fn is {what}; {how}")

    def template(self, function: Value | None) -> None:
        """Read which prompt template it is."""
        if function is None or function.data is None:
            return
        template = self.use(function.get("template")) or function
        path = template.data.path if isinstance(template.data, Symbol) else template.data
        if isinstance(template.data, dict):
            words = "a template of its own: write a plugin (PromptTemplate.from_strings), and --template NAME"
            self.lack("template.name", template.where, f"prompt_template: {words}")
        elif not isinstance(path, str) or ("." in path and "PROMPT_TEMPLATE" not in path):
            what = in_words(template) if template.unknown() else str(path)
            self.lack("template.name", template.where, f"prompt_template is {what}; --template names it")
        elif (before := self.tables["template"].get("name")) not in (None, _name(template)):
            words = f"the sources have templates {before} and {_name(template)}; a run has one: --template names it"
            self.lack("template.name", template.where, words)
        else:
            self.put("template.name", template, lambda _: _name(template), named=True)

    # --------------------------------------------------------------------------------------------------------- hooks

    def hooks(self) -> None:
        """Read what is generated and saved on the way."""
        hooks = self.names.get("custom_hooks")
        for hook in hooks.inside() if hooks and isinstance(hooks.data, list) else ():
            if (kind := _name(hook.get("type"))) != "EvaluateChatHook":
                self.used.add(id(hook))
                if kind not in SILENT_HOOKS:
                    what = kind or in_words(hook.unknown() or hook)
                    self.note(hook.where, f"custom_hooks: {what}: left out: nothing hooks into corefit's loop")
                continue
            questions = hook.get("evaluation_inputs")
            self.put("sample.prompts", questions, lambda asked: [asked] if isinstance(asked, str) else asked)
            self.steps("sample.every_steps", self.given(hook, "every_n_iters"))
            self.put("sample.max_tokens", hook.get("max_new_tokens"))
        default = self.names.get("default_hooks")
        checkpoint = (default and default.get("checkpoint")) or Value({}, "")
        interval, by_epoch = self.use(checkpoint.get("interval")), checkpoint.get("by_epoch")
        if interval and (by_epoch is None or by_epoch.data is True):
            words = "checkpoint.interval: in epochs; corefit saves by steps (checkpoint.every_steps) and at the end"
            self.note(interval.where, words)
        else:
            self.steps("checkpoint.every_steps", interval)
        keep = self.use(checkpoint.get("max_keep_ckpts"))
        if keep and keep.data == -1:
            self.note(keep.where, "max_keep_ckpts: -1 keeps all; corefit the newest checkpoint.keep (2)")
        elif keep:
            self.put("checkpoint.keep", keep)

    # ---------------------------------------------------------------------------------------------------- what is left

    def rest(self) -> None:
        """Note what nobody read and that asks for something."""
        seen: set[int] = set()

        def walk(path: str, value: Value) -> None:
            nested = isinstance(value.data, dict) or any(isinstance(each.data, dict) for each in value.inside())
            if id(value) in self.used or (nested and id(value.data) in seen):
                return
            seen.add(id(value.data))
            rules = ((p.replace("**", "*"), silent, why) for p, silent, why in LEFT if not nested or p.endswith("**"))
            rule = next((rule for rule in rules if fnmatch.fnmatchcase(path, rule[0])), None)
            if rule and any(s is ALL or (not value.unknown() and s == value.plain()) for s in rule[1]):
                return
            if nested and not rule:
                for key, inside in value.data.items() if isinstance(value.data, dict) else enumerate(value.inside()):
                    walk(f"{path}.{key if isinstance(key, str) else _name(inside.get('type')) or key}", inside)
                return
            lost = value.unknown()
            what = in_words(lost) if lost else _brief(value)
            self.note(value.where, f"{path} = {what}: left out: {rule[2] if rule else 'no counterpart in corefit'}")

        for root in ROOTS:
            if root in self.names:
                walk(root, self.names[root])


def _brief(value: Value) -> str:
    kind = _name(value.get("type"))
    text = f"{kind}(...)" if kind else repr(value.data.path if isinstance(value.data, Symbol) else value.plain())
    return text if len(text) <= 60 else text[:57] + "..."


def _place(where: str) -> tuple[str, int]:
    file, _, line = where.rpartition(":")
    return (file, int(line)) if line.isdecimal() else (where, 0)
