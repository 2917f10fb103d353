"""Base model + LoRA adapter -> one plain Hugging Face folder, file by file, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from corefit import terminal
from corefit.chat import Found, find
from corefit.data.encode import make_encoder
from corefit.data.tokenizer import Tokenizer
from corefit.engine import export
from corefit.engine.adapter import with_adapter
from corefit.engine.attention import run_packed
from corefit.engine.model import (
    as_stored,
    causal_lm,
    load_base,
    model_fingerprint,
    stored_tensor,
    stored_tensors,
    unsaid,
    weight_files,
)
from corefit.errors import ModelError, UserError, unknown
from corefit.recipe import run_and_step
from corefit.registry import Registry

BASES = ("stored", "dequantised")
TEXTS = 24
"""Records of the embedded data on which ``merge`` measures what merging changed."""


def merge(
    target: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    into: str = "stored",
    template: str | None = None,
    measured: int = 2**29,
    say: Callable[[str], None] = terminal.say,
) -> Path:
    """Write base + adapter into the new folder ``out``: the base's files with W + scale * B A, computed in fp32.

    Args:
        target: a run folder, ``RUN@STEP`` or an adapter folder; a checkpoint of full fine-tuning is written as it is.
        out: a folder that is empty or not there.
        model: the base model, where it isn't where training found it.
        into: what W is: ``"stored"``, the base's weights; ``"dequantised"``, these weights as training's quantizer
            rounded them, which is what the adapter was trained on.
        template: name of the prompt template that training used, where the adapter doesn't say.
        measured: bytes of base weights up to which it is measured and said how far the answers are from those of the
            model that was trained, where its base was quantised: that loads the model twice.
        say: takes notices, one line each.

    Raises:
        ModelError: no adapter or base there, a 4-bit base, an adapter that is not plain LoRA, or one of another base;
            nothing to dequantise.
    """
    if into not in BASES:
        raise ModelError(f"--base: {unknown('base', into, BASES)}")
    found = find(target, model=model, say=say)
    if found.adapter is None:
        if run_and_step(str(target))[1] is None:
            raise ModelError(f"{target}: a model, not an adapter: there is nothing to merge")
        if template or into != "stored":
            raise ModelError(f"{target}: full fine-tuning, written as it is: without --template and --base")
        with export.written_aside(Path(out)) as folder:  # a checkpoint of full fine-tuning: ``find`` made its folder
            for path in found.folder.iterdir():
                shutil.move(path, folder)
        return Path(out)
    base, config = found.base, _adapter_config(found.adapter)
    base_config = json.loads((base / "config.json").read_bytes())
    if "quantization_config" in base_config:
        raise ModelError(f"{base}: its weights are stored quantised; merging needs the unquantised base, --model PATH")
    if base_config.get("model_type") in ("gpt2", "openai-gpt"):
        raise ModelError(f"{base}: its weights lie the other way round (Conv1D); peft's merge_and_unload merges them")
    factors: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    tokens: dict[str, torch.Tensor] = {}
    with safe_open(found.adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118, not a mapping
            # peft writes whole modules three times where embeddings were resized, and the base's where they have LoRA
            if ".original_module." in key or key.endswith(".base_layer.weight"):
                continue
            name = key.removeprefix("base_model.model.").replace(".modules_to_save.", ".").replace(".base_layer.", ".")
            module, _, factor = name.partition(".lora_")
            if ".token_adapter." in name:
                tokens[f"{name.partition('.token_adapter.')[0]}.weight"] = file.get_tensor(key)
            elif factor:
                factors.setdefault(f"{module}.weight", {})[factor.removesuffix(".weight")] = file.get_tensor(key)
            else:
                whole[name] = file.get_tensor(key)

    shapes = {name: entry["shape"] for name, entry in stored_tensors(base).items()}
    of: Any = config.get("trainable_token_indices")  # a list is of the embeddings
    names, ids = set(shapes), {name: of if isinstance(of, list) else of[name.split(".")[-2]] for name in tokens}
    table = next((name for name in shapes if name.endswith(("embed_tokens.weight", "wte.weight"))), "")
    head = "lm_head.weight"
    if table in tokens and head not in tokens:
        one = head in factors  # LoRA on a head that is not stored, but is the table, with the rows that train in it
        if head in names and (one := base_config.get("tie_word_embeddings")) is None:
            one = torch.equal(stored_tensor(base, table), stored_tensor(base, head))
        if one:
            tokens[head], ids[head] = tokens[table], ids[table]
    added, changes = {}, {}
    if table and {table, head} & {*factors, *whole}:
        # An adapter acts on the embedding or on the head, not on both, so a tied pair becomes two.
        added, changes = {} if head in names else {head: table}, {"tie_word_embeddings": False}
    strange = sorted({*factors, *whole, *tokens} - names - set(added))
    if strange:
        raise ModelError(
            f"{found.adapter}: changes {strange[0]}, which {base} doesn't have: it belongs to another base"
        )

    trained = {name: max(ids[name]) + 1 for name in tokens} | {name: len(tensor) for name, tensor in whole.items()}
    tables = {name for name in trained if len(shapes[added.get(name, name)]) == 2}
    grown = {name for name in tables if trained[name] > shapes[added.get(name, name)][0]}
    most = max((trained[name] for name in grown), default=0)
    rows = {name: most for name in {*grown, table, head} & {*names, *added} if grown}

    for name, tensor in whole.items():
        first, *width = shapes[added.get(name, name)]
        if (len(tensor) != first and name not in grown) or list(tensor.shape[1:]) != width:
            raise ModelError(f"{found.adapter}: {name} has another shape in {base}: it belongs to another base")

    quantizer = found.facts.get("quantizer", "none")
    rounded: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, weight: weight  # noqa: E731
    if into == "dequantised":
        if quantizer == "none" or not found.facts.get("compute_dtype"):
            why = "training used the stored weights" if quantizer == "none" else "no compute_dtype"
            raise ModelError(f"{found.folder / 'corefit.json'}: {why}: merge without --base dequantised")
        quantised, rounded = as_stored(**_storage(found))
        if quantised - names:
            raise ModelError(f"{base}: has no {min(quantised - names)}: merge without --base dequantised")

    def change(name: str, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name in whole:
            return whole[name]
        weight = rounded(name, read())
        if name in rows:
            mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
            weight = torch.cat([weight, mean.expand(rows[name] - len(weight), -1)])
        if name in tokens:
            weight = weight.clone()  # it may be the file's pages, which the next reading would give again
            weight[ids[name]] = tokens[name].to(weight.dtype)
        if name not in factors:
            return weight
        pair = factors[name]
        embedding = "embedding_A" in pair
        down, up = (pair[f"embedding_{m}" if embedding else m].float() for m in "AB")
        delta = (up @ down).T if embedding else up @ down
        weight = weight.to(torch.float32, copy=True)
        if delta.shape != weight.shape:
            raise ModelError(f"{found.adapter}: {name} has another shape in {base}: it belongs to another base")
        rank = down.shape[0]
        alpha = _alpha(config, name.removesuffix(".weight"))
        weight.add_(delta, alpha=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
        if "magnitude_vector" in pair:  # DoRA: every row, of embeddings every column, has a length of its own
            length = weight.norm(dim=0 if embedding else 1, keepdim=True)
            weight *= pair["magnitude_vector"].float().view_as(length) / length
        return weight

    tokenizer = found.tokenizer()
    here: dict[str, Any] = {"base": found.name, "fingerprint": model_fingerprint(str(base))}
    here |= {"chat_template": tokenizer.chat_template, "stop_ids": found.stop_ids(tokenizer)}
    if template or (found.facts.get("template") and not found.carries_tokenizer):
        encoder = make_encoder(found.template(tokenizer, Registry.load(), template), tokenizer)
        here |= {"chat_template": encoder.template.chat_template or tokenizer.chat_template}
        here |= {"template": encoder.template.name, "stop": encoder.stop, "form": encoder.form()}
        here |= {"stop_ids": found.stop_ids(tokenizer, encoder)}
    facts = export.Provenance.from_dict(
        {"template": "tokenizer", "stop": (), **found.facts, **here},
        base_folder=base,
        tokenizer_files=tokenizer.files(),
    )
    with export.written_aside(Path(out)) as folder:
        files = export.base_files(base) | export.serving_files(facts, "model")
        files["config.json"] = export.with_keys(files["config.json"], changes)
        if rows:
            files["config.json"] = export.with_vocabulary(files["config.json"], most)
        files["corefit.json"] = export.with_keys(files["corefit.json"], {"merged_into": into})
        export.write_files(folder, files)
        export.rewrite_weights(base, folder, change, added, rows)
    if quantizer != "none":
        device, trained_on = _device(found), facts.device
        other = "" if trained_on in ("", device) else f", in training on {trained_on}: a few may be rounded otherwise"
        kept = "and merged into these, dequantised"
        lost = "merged into the stored ones (--base dequantised merges into what training saw)"
        how = kept if into == "dequantised" else lost
        say(f"trained on {quantizer} weights (made on {device}{other}), {how}; {_cost(found, Path(out), measured)}")
    return Path(out)


# ------------------------------------------------------------------------------------------- what merging changes


def _device(found: Found) -> str:
    """Give the kind of device that training used, where it is here: another one's kernels may round otherwise."""
    return "cuda" if found.facts.get("device") == "cuda" and torch.cuda.is_available() else "cpu"


def _storage(found: Found) -> dict[str, Any]:
    """Give how training stored the base, or a model its weights, as ``load_base`` and ``as_stored`` take it."""
    facts = found.facts if found.adapter else {}
    return {
        "base": str(found.base),
        "quantizer": Registry.load().quantizer(facts.get("quantizer", "none")),
        "compute_dtype": facts.get("compute_dtype") or "float32",
        "device": _device(found),
    }


def load(found: Found) -> Any:  # noqa: ANN401, a PeftModel or a language model
    """Load an adapter on its base, stored as in training, or a model; it multiplies in fp32, whatever training did."""
    network: Any = load_base(**_storage(found), say=unsaid)
    if found.adapter:
        network = with_adapter(network, found.adapter)
    for module in network.modules():
        if hasattr(module, "compute_dtype"):  # of a 4-bit layer: what it multiplies in; what it stores stays
            module.compute_dtype = torch.float32
    return network.float().eval()


def sample_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Give a few real texts, English and Chinese, as ids: those of the embedded demonstration."""
    lines = (export.EMBEDDED_MODEL.parent / "data" / "corefit_facts.jsonl").read_text("utf-8").splitlines()
    return tokenizer.encode([json.loads(line)["text"] for line in lines[:TEXTS]])


def logits(network: Any, texts: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:  # noqa: ANN401, as ``load`` gives
    """Yield a model's logits of each text: [L, V]."""
    for text in texts:
        ids = torch.tensor([text], device=next(network.parameters()).device)
        with torch.no_grad():  # not around the yield, where it would hold for whoever takes the logits
            output = run_packed(causal_lm(network), ids, torch.arange(len(text), device=ids.device)[None])
        yield output.logits[0]


def divergence(trained: Any, merged: Any, texts: Sequence[Sequence[int]]) -> str:  # noqa: ANN401, as ``load`` gives
    """Say KL(trained || merged), the mean over all tokens, and the largest difference of a logit."""
    kl, delta = 0.0, 0.0
    for a, b in zip(logits(trained, texts), logits(merged, texts), strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        kl, delta = kl + float((p.exp() * (p - q)).sum()), max(delta, float((a - b).abs().max()))
    return f"KL {kl / sum(map(len, texts)):.2g} nats a token, max |delta logit| {delta:.2g}"


def _cost(found: Found, merged: Path, limit: int) -> str:
    """Say how far the merged model's answers are from those of the model that was trained, where that costs little."""
    if sum(path.stat().st_size for path in weight_files(found.base)) > limit or not found.facts.get("compute_dtype"):
        return "corefit selftest measures the difference on a small model"
    try:
        said = divergence(load(found), load(find(merged)), sample_ids(found.tokenizer()))
    except UserError as error:  # of quantizer and memory; the merge is there
        return f"the difference was not measured: {error}"
    return f"against the trained model: {said}"


def _alpha(config: dict[str, Any], module: str) -> float:
    """Give a module's alpha. Source: peft 0.21, ``get_pattern_key``, for keys that are names."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    own = (alpha for key, alpha in patterns.items() if f".{module}".endswith(f".{key}"))
    return float(next(own, config["lora_alpha"]))


def _adapter_config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_bytes())
    # with these peft computes something else than W + scale * B @ A with one scale
    others = (
        *("lora_bias", "layer_replication", "target_parameters", "fan_in_fan_out", "alora_invocation_tokens"),
        *("arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora"),
    )
    odd = [key for key in others if config.get(key)]
    if not all(key.replace(".", "").isidentifier() for key in config.get("alpha_pattern") or {}):
        odd.append("alpha_pattern")  # peft takes its keys for regular expressions
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        odd.append("init_lora_weights")  # the others move a part of the base's weights into the adapter
    if odd:
        raise ModelError(f"{path}: {odd[0]} is set; only plain LoRA can be merged, peft's merge_and_unload may do it")
    return config
