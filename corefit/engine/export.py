"""What a run leaves behind: adapter and model folders that other programs, older ones too, open.

Config, tokenizer and generation files are the base's own bytes; only keys that corefit owns are changed: the chat
template and the stop ids. Weights are written under the base's names, order, dtypes and file layout.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from corefit import __version__
from corefit.durable import contents, whole_folder
from corefit.engine import internlm
from corefit.engine.model import INDEX, hub_name, read_header, stored_tensors, weight_files
from corefit.errors import ModelError, system_words

EMBEDDED = "corefit-embedded"
"""The name under which folders refer to the model that the package carries."""
EMBEDDED_MODEL = Path(__file__).parents[1] / "embedded" / "model"
SHARD_BYTES = 2 * 10**9
DTYPES = {  # by their names in safetensors files
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where an exported folder comes from, and how its model is to be asked."""

    base: str
    """Folder or hub name as the user gave it; of a folder only the name is written."""
    base_folder: Path
    """Where the base's files lie."""
    fingerprint: str
    """``model_fingerprint`` of the base."""
    tokenizer_files: Mapping[str, bytes]
    template: str
    chat_template: str | None
    """The Jinja of the template that training used; None: the tokenizer's own."""
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    add_tokens: tuple[str, ...] = ()
    """Tokens whose embeddings were trained; some of them the base's vocabulary lacks."""
    special: tuple[str, ...] = ()
    """Those of them that the template writes."""
    system: str = ""
    """The system message of all conversations; empty: there is none that all have."""
    supervise: str = "all"
    form: str = ""
    """``Encoder.form`` of the template."""
    quantizer: str = "none"
    """How training stored the base's weights; with the next two ``as_stored`` stores them so again."""
    compute_dtype: str = ""
    """As ``load_base`` takes it; empty: unknown."""
    device: str = ""
    """``"cpu"`` or ``"cuda"``; empty: unknown."""

    @property
    def name(self) -> str:
        """The base's name without any path of this machine."""
        return public_name(self.base)

    def as_dict(self) -> dict[str, Any]:
        """Give a JSON-able object without the folder and the files, which are the base's."""
        found = asdict(self) | {"base": self.name}
        del found["base_folder"], found["tokenizer_files"]
        return found

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, base_folder: Path, tokenizer_files: Mapping[str, bytes]
    ) -> Provenance:
        """Undo ``as_dict``; other keys, which ``corefit.json`` has too, are left out."""
        known: dict[str, Any] = {item.name: data[item.name] for item in fields(cls) if item.name in data}
        known |= {name: tuple(known[name]) for name in ("stop", "stop_ids", "add_tokens", "special") if name in known}
        return cls(**known, base_folder=base_folder, tokenizer_files=tokenizer_files)


def public_name(base: str) -> str:
    """Give a hub name as it is, and of a folder only its name.

    >>> public_name("owner/model-of-the-hub")
    'owner/model-of-the-hub'
    """
    path = Path(base).expanduser()
    if not path.exists() and not path.is_absolute() and base.count("/") < 2:
        return base
    path = path.resolve()
    if path == EMBEDDED_MODEL.resolve():
        return EMBEDDED
    return hub_name(path) or path.name


# -------------------------------------------------------------------------------------------------------- folders


@contextmanager
def written_aside(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a folder to fill; see ``whole_folder``.

    Raises:
        ModelError: ``out`` holds something and ``replace`` is False, or it can't be written.
    """
    try:
        if not replace and out.exists() and (not out.is_dir() or contents(out)):
            raise ModelError(f"{out}: is {'not empty' if out.is_dir() else 'no folder'}; name a new one")
        with whole_folder(out) as aside:
            yield aside
    except OSError as error:
        raise ModelError(f"{out}: can't be written: {system_words(error)}") from error


def with_keys(data: bytes, keys: Mapping[str, Any]) -> bytes:
    """Give a JSON object's bytes with ``keys`` set: the very same bytes where they are set already."""
    content = json.loads(data)
    if all(key in content and content[key] == value for key, value in keys.items()):
        return data
    return json_bytes(content | dict(keys))


def with_vocabulary(config: bytes, rows: int) -> bytes:
    """Give config.json's bytes with so many rows of embeddings and head."""
    inner = json.loads(config).get("text_config")
    return with_keys(config, {"text_config": inner | {"vocab_size": rows}} if inner else {"vocab_size": rows})


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Give JSON as folders of models have it."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def serving_files(facts: Provenance, kind: str) -> dict[str, bytes]:
    """Give tokenizer, chat template, generation config, ``corefit.json`` and README.md of an exported folder.

    ``kind`` is ``"adapter"`` or ``"model"``.
    """
    files = dict(facts.tokenizer_files)
    if facts.chat_template is not None:
        jinja = facts.chat_template.encode()
        if files.get("chat_template.jinja") != jinja:
            files["chat_template.jinja"] = jinja
            # programs older than the .jinja file read it here
            files["tokenizer_config.json"] = with_keys(
                files.get("tokenizer_config.json", b"{}"), {"chat_template": facts.chat_template}
            )
    path = facts.base_folder / "generation_config.json"
    generation = path.read_bytes() if path.is_file() else b"{}"
    own = json.loads(generation).get("eos_token_id")
    own = own if isinstance(own, list) else [] if own is None else [own]
    stops = list(dict.fromkeys([*facts.stop_ids, *own]))  # the base's own stops still end an answer
    files["generation_config.json"] = with_keys(generation, {"eos_token_id": stops}) if stops != own else generation
    known = {"corefit": __version__, "kind": kind, "base": facts.name, "base_fingerprint": facts.fingerprint}
    for key, value in facts.as_dict().items():
        if key not in ("base", "fingerprint", "chat_template") and (
            value or key not in ("add_tokens", "special", "system", "form")
        ):
            known[key] = value
    files["corefit.json"] = json_bytes(known)
    files["README.md"] = _readme(facts, kind, stops).encode()
    return files


def _readme(facts: Provenance, kind: str, stops: list[int]) -> str:
    code, fast = "", "AutoTokenizer"
    if "auto_map" in json.loads((facts.base_folder / "config.json").read_bytes()):
        # plain transformers needs the code that the base brings; its tokenizer it doesn't
        code, fast = ", trust_remote_code=True", "PreTrainedTokenizerFast"
    title, peft, load = (
        f"{facts.name}, fine-tuned",
        "",
        f'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"{code})',
    )
    lines = "corefit chat DIR                    # talk to it; DIR is this folder\n"
    if kind == "adapter":
        title, peft = f"LoRA adapter for {facts.name}", "from peft import PeftModel\n"
        rows = "base.resize_token_embeddings(len(tokenizer))  # it has new tokens\n" if facts.add_tokens else ""
        load = (
            f'base = AutoModelForCausalLM.from_pretrained({json.dumps(facts.name)}, dtype="auto"{code})'
            f"  # or its folder\n{rows}model = PeftModel.from_pretrained(base, folder)"
        )
        lines += "corefit chat DIR --model BASE       # where the base model lies elsewhere\n"
        lines += "corefit merge DIR --out MERGED      # one plain model folder for any server\n"
    ends = ", ".join(f"`{token}`" for token in facts.stop) or f"token {stops}"
    return f"""# {title}

- Base model: `{facts.name}`, fingerprint `{facts.fingerprint}`
- Prompt template: `{facts.template}` (as Jinja beside the tokenizer); an answer ends at {ends}
- Trained by corefit {__version__}; base weights stored as `{facts.quantizer}` while training

```
{lines}```

```python
{peft}from transformers import AutoModelForCausalLM, {fast}

folder = "."  # this folder
tokenizer = {fast}.from_pretrained(folder)
{load}
chat = [{{"role": "user", "content": "hi"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=256, eos_token_id={stops})
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


def base_files(base: Path) -> dict[str, bytes]:
    """Give the base's small files that belong into a model folder: config, tokenizer, own code, licence."""
    kept = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
    return {
        path.name: path.read_bytes()
        for path in sorted(base.iterdir())
        if path.is_file()
        and (path.suffix in kept or path.name.startswith(("LICENSE", "NOTICE")))
        and not path.name.endswith(".index.json")
    }


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder that is there."""
    for name, data in files.items():
        (folder / name).write_bytes(data)


# -------------------------------------------------------------------------------------------------------- weights


def write_tensors(
    path: Path,
    entries: Mapping[str, Mapping[str, Any]],
    tensor_of: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor; ``entries`` say dtype and shape, ``tensor_of`` gives the values."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + _size_of(entry)
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, entry in entries.items():
            tensor = tensor_of(name).detach().to("cpu", DTYPES[entry["dtype"]]).contiguous()
            assert list(tensor.shape) == list(entry["shape"]), f"{name}: {list(tensor.shape)} for {entry['shape']}"
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


def _size_of(entry: Mapping[str, Any]) -> int:
    """Give the bytes of a tensor."""
    return torch.Size(entry["shape"]).numel() * DTYPES[entry["dtype"]].itemsize


def entries_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Give dtype and shape of tensors, the widest numbers first, so that each lies at a multiple of its width."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    return {name: {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)} for name, tensor in ordered}


def rewrite_weights(
    base: Path,
    out: Path,
    change: Callable[[str, Callable[[], torch.Tensor]], torch.Tensor],
    added: Mapping[str, str] | None = None,
    rows: Mapping[str, int] | None = None,
) -> None:
    """Write the base's weight files anew into ``out``: same files, names, order and dtypes, values from ``change``.

    Args:
        base: a model folder.
        out: a folder.
        change: ``change(name, read)`` gives a tensor's values; ``read()`` gives those of the base.
        added: new name -> the base's name after which it is put, in whose file, dtype and shape; ``read`` gives
            that one's values.
        rows: name -> rows that the tensor has now, where these are more.

    One tensor is held at a time.
    """
    added = dict(added or {})
    for path in weight_files(base):
        entries, metadata = read_header(path)
        source = {name: name for name in entries}
        for new, old in added.items():
            if old in entries:
                entries[new], source[new] = entries[old], old
        for name, n in (rows or {}).items():
            if name in entries:
                entries[name] = {**entries[name], "shape": [n, *entries[name]["shape"][1:]]}
        with safe_open(path, framework="pt") as file:

            def tensor_of(name: str, file: Any = file, source: Any = source) -> torch.Tensor:  # noqa: ANN401
                return change(name, lambda: file.get_tensor(source[name]))

            write_tensors(out / path.name, entries, tensor_of, metadata)
    if (base / INDEX).is_file() and not (out / "model.safetensors").is_file():
        index = json.loads((base / INDEX).read_bytes())
        index["weight_map"] |= {new: index["weight_map"][old] for new, old in added.items()}
        if added or rows:
            index.get("metadata", {}).pop("total_size", None)
        (out / INDEX).write_bytes(json_bytes(index) if added or rows else (base / INDEX).read_bytes())


# -------------------------------------------------------------------------------------------------------- exports


def layout_of(model: Any, base: str) -> dict[str, Any]:  # noqa: ANN401, a PeftModel or a language model
    """Give what is needed to export a model from its trained tensors alone; JSON-able.

    ``adapter``: the content of ``adapter_config.json``; None for full fine-tuning. ``names``: name in the exported
    files -> name of the parameter, or of the buffer, which training leaves as it was.
    """
    if not hasattr(model, "peft_config"):
        config, exported = None, model.state_dict()
    else:
        from peft import get_peft_model_state_dict

        # no look at the hub for changed embeddings: what was trained whole is in modules_to_save
        config, exported = _adapter_config(model, base), get_peft_model_state_dict(model, save_embedding_layers=False)
    own = {tensor.data_ptr(): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}
    names = {name: own[tensor.data_ptr()] for name, tensor in sorted(exported.items()) if tensor.data_ptr() in own}
    return {"adapter": config, "names": names}


def export(out: Path, layout: Mapping[str, Any], tensor_of: Callable[[str], torch.Tensor], facts: Provenance) -> Path:
    """Write an adapter or a model folder from a ``layout_of``; ``tensor_of`` gives a parameter or buffer by its name.

    An older one at ``out`` is replaced once the new one is whole. An adapter is plain PEFT. A model has the base's
    stored dtypes, and is tied as the base is; one tensor is held at a time. Where its names are not those of the base's
    files, weights are written under its own, in files of at most ``SHARD_BYTES`` bytes (or one tensor).
    """
    names: dict[str, str] = layout["names"]
    if layout["adapter"] is None:
        return _write_model(out, facts, names, tensor_of)
    return _write_adapter(out, facts, layout["adapter"], {key: tensor_of(own) for key, own in names.items()})


def export_trained(model: Any, out: Path, facts: Provenance) -> Path:  # noqa: ANN401, a PeftModel or a language model
    """Write what was trained of a model in memory: see ``export``."""
    tensors = dict((*model.named_buffers(), *model.named_parameters()))
    return export(out, layout_of(model, facts.name), tensors.__getitem__, facts)


def _adapter_config(model: Any, base: str) -> dict[str, Any]:  # noqa: ANN401, a PeftModel
    from peft import LoraConfig

    config = model.peft_config["default"].to_dict()
    # Keys at their defaults are left out: an older peft refuses keys that it doesn't know.
    usual = LoraConfig().to_dict()
    named = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "target_modules", "modules_to_save")
    kept = {key: value for key, value in config.items() if key in named or value != usual.get(key)}
    kept |= {"base_model_name_or_path": base, "inference_mode": True, "fan_in_fan_out": False, "revision": None}
    ordered = {key: sorted(value) if isinstance(value, set | list | tuple) else value for key, value in kept.items()}
    return dict(sorted(ordered.items()))


def _write_adapter(
    out: Path, facts: Provenance, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Path:
    if layout := internlm.layout_of_folder(facts.base_folder):
        config, tensors = layout.adapter_to_published(config, tensors)
    with written_aside(out, replace=True) as folder:
        write_files(folder, serving_files(facts, "adapter") | {"adapter_config.json": json_bytes(config)})
        weights = folder / "adapter_model.safetensors"
        write_tensors(weights, entries_of(tensors), tensors.__getitem__, {"format": "pt"})
    return out


def _write_model(
    out: Path, facts: Provenance, names: Mapping[str, str], tensor_of: Callable[[str], torch.Tensor]
) -> Path:
    known = stored_tensors(facts.base_folder)
    if layout := internlm.layout_of_folder(facts.base_folder):
        names, tensor_of = layout.to_published(names, tensor_of)
    files = base_files(facts.base_folder) | serving_files(facts, "model")
    rows = {}
    if facts.add_tokens:  # embeddings and head may have more rows than the base's
        sizes = {name: tensor_of(names[name]).shape for name in known if name in names}
        rows = {name: size[0] for name, size in sizes.items() if list(size) != known[name]["shape"]}
    if rows:
        files["config.json"] = with_vocabulary(files["config.json"], max(rows.values()))
    with written_aside(out, replace=True) as folder:
        write_files(folder, files)
        if set(names.values()) <= set(known):
            change = lambda name, read: tensor_of(names[name]) if name in names else read()  # noqa: E731
            rewrite_weights(facts.base_folder, folder, change, rows=rows)
        else:
            [(usual, _)] = Counter(entry["dtype"] for entry in known.values()).most_common(1)
            entries = {}
            for name in dict.fromkeys(names.values()):  # the others are tied to one of these
                tensor = tensor_of(name)
                own = usual if tensor.is_floating_point() else _NAMES[tensor.dtype]
                entries[name] = {"dtype": known.get(name, {}).get("dtype", own), "shape": list(tensor.shape)}
            _write_shards(folder, entries, tensor_of)
    return out


def _write_shards(folder: Path, entries: dict[str, Any], tensor_of: Callable[[str], torch.Tensor]) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    files = "model{suffix}.safetensors"
    split = split_state_dict_into_shards_factory(
        entries, get_storage_size=_size_of, filename_pattern=files, max_shard_size=SHARD_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: entries[name] for name in names}, tensor_of, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_files(folder, {INDEX: json_bytes(index)})
