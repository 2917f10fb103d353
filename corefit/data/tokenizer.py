"""Tokenizer folders and bare sentencepiece models -> one Tokenizer; what users type never becomes a control token."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.errors import ModelError, in_words
from corefit.types import Unrenderable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
"""The files of a tokenizer folder that are copied beside an adapter."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer as the stations use it: text in, int32 ids out, nothing added.

    After ``protect`` content can't forge control: a ``</s>`` that a user types is encoded as the characters it is.
    """

    def __init__(self, backend: Any, config: Mapping[str, Any], files: Mapping[str, bytes], *, name: str) -> None:  # noqa: ANN401
        """Wrap a ``tokenizers.Tokenizer``; ``config`` is tokenizer_config.json; use ``load``."""
        self._backend, self._files, self.name = backend, dict(files), name
        backend.no_truncation()  # a saved limit would cut answers without a word
        backend.no_padding()
        backend.encode_special_tokens = False
        self._prefix = ""
        self.new_ids: tuple[int, ...] = ()
        """Of tokens that the base's vocabulary lacked."""
        self._named = {key: _text(config.get(key)) for key in NAMED if config.get(key)}
        templates = config.get("chat_template") or {}
        if isinstance(templates, list):
            templates = {entry["name"]: entry["template"] for entry in templates}
        self._templates: dict[str, str] = {"default": templates} if isinstance(templates, str) else dict(templates)
        added = backend.get_added_tokens_decoder()
        own = (id for token in self._named.values() if (id := backend.token_to_id(token)) is not None)
        self.special_ids = frozenset(own) | {id for id, token in added.items() if token.special}
        jinja = "\n".join(self._templates.values())
        self.control_tokens: tuple[str, ...] = tuple(
            token.content for id, token in sorted(added.items()) if id in self.special_ids or token.content in jinja
        )
        """Added tokens that are special, or that the tokenizer's own Jinja writes."""
        space = {False: "", True: r"\s*"}
        parts = {t.content: space[t.lstrip] + re.escape(t.content) + space[t.rstrip] for t in added.values()}
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(parts[token] for token in longest_first) or "(?!)")
        model = backend.model
        self._natural_unk = backend.token_to_id(getattr(model, "unk_token", None) or "")
        if self._natural_unk is None and type(model).__name__ == "Unigram":  # its object doesn't give it
            self._natural_unk = json.loads(backend.to_str())["model"]["unk_id"]
        self.unk_token: str | None = None if self._natural_unk is None else backend.id_to_token(self._natural_unk)
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """One more than the largest id; a vocabulary may have gaps."""
        self.bos_token, self.eos_token, self.pad_token = map(self._named.get, ("bos_token", "eos_token", "pad_token"))
        self.bos_id, self.eos_id, pad = (
            self.token_id(token) if token else None for token in (self.bos_token, self.eos_token, self.pad_token)
        )
        self.pad_id: int = next((id for id in (pad, self.eos_id) if id is not None), 0)
        digest = hashlib.sha256()
        for file, data in sorted(self._files.items()):
            digest.update(f"{file}\0{len(data)}\0".encode() + data)
        self.fingerprint = digest.hexdigest()
        """sha256 (hex) of the files that decide ids and chat text."""
        self._byte_level = b"ByteLevel" in (backend.decoder.__getstate__() if backend.decoder else b"")

    # ------------------------------------------------------------------------------------------------- loading

    @classmethod
    def load(cls, path: str | Path, add: Sequence[str] = (), special: Sequence[str] = ()) -> Tokenizer:
        """Load a folder with ``tokenizer.json`` or ``tokenizer.model``, or a bare sentencepiece ``.model`` file.

        ``add``: tokens that it is to have; those that are new come after all others, in this order. Those that are not
        ``special`` are words of content.

        Raises:
            ModelError: nothing there, a broken file, or a kind of sentencepiece model that is not supported.
        """
        path = Path(path)
        if path.is_file() and path.name == "tokenizer.json":
            path = path.parent
        try:
            if path.is_dir():
                files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
            else:
                files = {"tokenizer.model": path.read_bytes()}
        except OSError as error:
            raise ModelError(
                f"{path}: can't read a tokenizer there: {error.strerror}; name a folder or a file"
            ) from None
        if not {"tokenizer.json", "tokenizer.model"} & set(files):
            raise ModelError(
                f"{path}: no tokenizer here; needs tokenizer.json or tokenizer.model (transformers' "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes the first from older files)"
            )
        try:
            found = cls._of(path, files)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: the tokenizer's files are broken: {in_words(error)}") from error
        new = [token for token in dict.fromkeys(add) if found.token_id(token) is None]
        if new:
            found = cls._of(path, found._files_with(new, special))
            found.new_ids = tuple(id for token in new if (id := found.token_id(token)) is not None)
        return found

    @classmethod
    def _of(cls, path: Path, files: Mapping[str, bytes]) -> Tokenizer:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            config |= {key: value for key, value in _json(path, files, name).items() if value is not None}
        if "chat_template.jinja" in files:
            config["chat_template"] = files["chat_template.jinja"].decode()
        prefix = ""
        extra = {int(id): token for id, token in (config.get("added_tokens_decoder") or {}).items()}
        if "tokenizer.json" in files:
            try:
                backend = Backend.from_buffer(files["tokenizer.json"])
            except Exception as error:
                raise ModelError(f"{path / 'tokenizer.json'}: not a tokenizer: {error}") from None
        else:
            backend, named, prefix = read_sentencepiece(files["tokenizer.model"], where=str(path), added=extra)
            config = named | config
        extra |= {
            id: {"content": token} for token, id in _json(path, files, "added_tokens.json").items() if id not in extra
        }
        for id, token in sorted(extra.items()):
            if backend.token_to_id(token["content"]) is None:
                kind = {
                    key: bool(token[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in token
                }
                backend.add_tokens([AddedToken(token["content"], special=bool(token.get("special")), **kind)])
            if backend.token_to_id(token["content"]) != id:
                raise ModelError(
                    f"{path}: added token {token['content']!r} should be {id}, the vocabulary gives "
                    f"{backend.token_to_id(token['content'])}; the tokenizer's files do not belong together"
                )
        tokenizer = cls(backend, config, files, name=str(path))
        tokenizer._prefix = prefix
        return tokenizer

    def files(self) -> dict[str, bytes]:
        """Give the tokenizer's files: those that were there byte for byte; what a bare ``.model`` lacks is made."""
        made: dict[str, bytes] = {}
        if "tokenizer.json" not in self._files:
            config = _json(Path(self.name), self._files, "tokenizer_config.json")
            added = {int(id): token for id, token in (config.get("added_tokens_decoder") or {}).items()}
            backend, *_ = read_sentencepiece(self._files["tokenizer.model"], added=added, export=True)
            made["tokenizer.json"] = backend.to_str().encode()
        if "tokenizer_config.json" not in self._files:
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                **self._named,
            }
            made["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
        return made | self._files

    def _files_with(self, tokens: Sequence[str], special: Sequence[str]) -> dict[str, bytes]:
        """Give the files of a tokenizer that has these tokens too, last."""
        files = self.files()
        content, config = (_json(Path(self.name), files, name) for name in ("tokenizer.json", "tokenizer_config.json"))
        no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        new = enumerate(tokens, self.vocab_size)
        added = {id: {"content": token, **no, "special": token in special} for id, token in new}
        content["added_tokens"] = [*(content.get("added_tokens") or ()), *({"id": id, **t} for id, t in added.items())]
        if config.get("added_tokens_decoder"):
            config["added_tokens_decoder"] |= {str(id): token for id, token in added.items()}
            files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
        return files | {"tokenizer.json": json.dumps(content, ensure_ascii=False).encode()}

    # ------------------------------------------------------------------------------------------------- encoding

    def token_id(self, token: str) -> int | None:
        """Give the id of exactly this token, None where the vocabulary lacks it."""
        id: int | None = self._backend.token_to_id(token)
        return id

    def protect(self, control: Sequence[str] = ()) -> frozenset[int]:
        """From now on ``encode`` reads special tokens and ``control`` as text; give the ids it must never yield."""
        from tokenizers import AddedToken

        named = [token for token in (*self._named.values(), *control) if self.token_id(token) is not None]
        self._backend.add_special_tokens([AddedToken(token, normalized=False) for token in named])
        self._backend.encode_special_tokens = True
        named = [*control, *(token for role, token in self._named.items() if role != "unk_token")]
        roles = {id for token in named if (id := self.token_id(token)) is not None}
        return (self.special_ids - {self._natural_unk}) | roles  # unknown characters honestly yield what is only that

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text by itself, no BOS or EOS."""
        return [encoding.ids for encoding in self.encodings(texts)]

    def encodings(self, texts: Sequence[str]) -> Sequence[Any]:
        """Do the same, and give what the backend gives: ``len`` is the number of tokens, ``ids`` makes a list."""
        if self._prefix:
            texts = [self._prefix + text if text else text for text in texts]
        encodings: Sequence[Any] = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return encodings

    def decode(self, ids: Sequence[int] | NDArray[np.int32], *, skip_special: bool = False) -> str:
        """Give the text of ids; ``skip_special`` leaves out special and protected tokens."""
        text: str = self._backend.decode([int(id) for id in ids], skip_special_tokens=skip_special)
        return text

    def token_bytes(self, id: int) -> bytes:
        """Give the bytes that one token stands for: a part of a UTF-8 character where the tokenizer cuts it."""
        token = self._backend.id_to_token(id)
        if token is None or id in self._backend.get_added_tokens_decoder():
            return (token or f"<{id}>").encode()
        if self._byte_level:
            table = _byte_level_table()
            return bytes(table[char] for char in token) if all(char in table for char in token) else token.encode()
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("▁", " ").encode()

    def split_control(self, text: str) -> list[tuple[str, bool]]:
        """Cut a template's own text at the tokenizer's control tokens: (run, is it one control token), none empty.

        Whitespace that a token swallows (``lstrip``, ``rstrip``) stays with it, as it would when encoded in one go.
        """
        runs: list[tuple[str, bool]] = []
        end = 0
        for match in self._control_pattern.finditer(text):
            runs += [(text[end : match.start()], False), (match.group(), True)]
            end = match.end()
        return [run for run in (*runs, (text[end:], False)) if run[0]]

    # ------------------------------------------------------------------------------------------------- chat text

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template that came with the tokenizer."""
        return self._templates.get("default")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
    ) -> str:
        """Render messages with the tokenizer's own Jinja, or with ``chat_template``, as transformers does.

        Raises:
            ModelError: there is no Jinja, or it has a syntax error.
            Unrenderable: the Jinja refuses these messages.
        """
        jinja = chat_template or (tools and self._templates.get("tool_use")) or self.chat_template
        if not jinja:
            raise ModelError(
                f"{self.name}: the tokenizer has no chat template; choose one with --template, e.g. chatml"
            )
        template = _compile(jinja)
        chat = []
        for message in messages:
            thought = next(
                (message[key] for key in ("reasoning_content", "thinking", "reasoning") if message.get(key)), None
            )
            chat.append(
                dict(message) if thought is None else {"thinking": thought, **message, "reasoning_content": thought}
            )
        try:
            text: str = template.render(
                **self._named,
                messages=chat,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program of its own: whatever it raises is its refusal
            raise Unrenderable("refused_by_chat_template") from error
        return text


def _text(token: Any) -> str:  # noqa: ANN401, a string or {"content": string}
    return str(token["content"] if isinstance(token, dict) else token)


def _json(path: Path, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ModelError(f"{path / name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path / name}: holds a {type(value).__name__}, expected an object")
    return value


@functools.cache
def _byte_level_table() -> dict[str, int]:
    """Map the printable stand-ins of byte-level BPE to bytes. Source: GPT-2's encoder.py, ``bytes_to_unicode``."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


@functools.lru_cache(maxsize=16)
def _compile(chat_template: str) -> Any:  # noqa: ANN401, a jinja2.Template
    """Compile chat Jinja. Source: transformers 5.23, ``utils/chat_template_utils.py`` (settings, filters, globals)."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> str:  # noqa: ANN401
            return str(caller())

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # noqa: ANN401
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(chat_template)
    except jinja2.TemplateError as error:
        raise ModelError(f"this chat template is not Jinja that can be compiled: {error}") from None


# ------------------------------------------------------------------------------------------------- sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Read one protobuf message: (field number, int | float | bytes). Source: protobuf's encoding specification."""
    at, size = 0, len(data)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < size:
        key = varint()
        wire = key & 7
        if wire == 0:
            value: Any = varint()
            value = value - (1 << 64) if value >> 63 else value
        else:
            length = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else size)
            if at + length > size:
                raise ValueError("cut short")
            value = data[at : at + length]
            value = struct.unpack("<f", value)[0] if wire == 5 else value
            at += length
        yield key >> 3, value


def read_sentencepiece(
    data: bytes,
    *,
    where: str = "tokenizer.model",
    added: Mapping[int, Mapping[str, Any]] | None = None,
    export: bool = False,
) -> tuple[Any, dict[str, str], str]:
    """Turn a sentencepiece BPE model into a fast tokenizer, needing neither sentencepiece nor protobuf.

    Args:
        data: the bytes of the ``.model`` file.
        where: named in errors.
        added: ``added_tokens_decoder`` of ``tokenizer_config.json``. What it calls by another name than the model does
            is another token: InternLM 2's ``<|im_start|>`` is the piece ``[UNUSED_TOKEN_146]``.
        export: put the dummy prefix into the tokenizer itself, for others; else the caller prepends what is returned.

    Returns:
        The ``tokenizers.Tokenizer``, its named tokens, and the prefix of every text (``" "`` or ``""``).

    Raises:
        ModelError: not a sentencepiece file, or one whose encoding would not be reproduced exactly.

    Source: sentencepiece's ``sentencepiece_model.proto`` and ``bpe_model.cc``.
    """
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {3: 1, 35: 0, 40: 0, 41: 1, 42: 2, 43: -1}  # proto defaults
    normalizer: dict[int, Any] = {2: b"", 3: 1, 4: 1, 5: 1}
    try:
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), piece.get(2, 0.0), piece.get(3, NORMAL)))
            elif field == 2:
                trainer.update(_fields(value))
            elif field == 3:
                normalizer.update(_fields(value))
        if not pieces:
            raise ValueError("no pieces")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{where}: not a sentencepiece model ({error})") from None
    for id, token in (added or {}).items():
        if id < len(pieces) and pieces[id][0] != token["content"]:
            pieces[id] = (token["content"], 0.0, CONTROL if token.get("special") else USER_DEFINED)
    byte_fallback = bool(trainer[35])
    if byte_fallback:  # sentencepiece itself falls back to the byte here
        pieces = [(text, score, UNUSED if text == "\0" else kind) for text, score, kind in pieces]
    reason = None
    if trainer[3] != 2:
        reason = "its algorithm is not BPE"
    elif normalizer[2] or normalizer[4] or not normalizer[5]:
        reason = "it rewrites text before it encodes"
    elif any(kind == UNUSED and len(text) > 1 for text, _, kind in pieces):
        reason = "it has unused pieces"
    elif any(kind == USER_DEFINED and re.search("[ ▁]", text) for text, _, kind in pieces):
        reason = "it has user-defined pieces with spaces"
    if reason:
        raise ModelError(
            f"{where}: this sentencepiece model is not supported ({reason}); make a tokenizer.json from it"
        )

    def shown(id: int, text: str, kind: int) -> str:
        return f"<unused_{id}>" if kind == UNUSED else text

    vocab = {shown(id, text, kind): id for id, (text, _, kind) in enumerate(pieces)}
    scores = {text: (-score, id) for id, (text, score, kind) in enumerate(pieces) if kind == NORMAL}
    merges = [
        (*rank, text[:cut], text[cut:])
        for text, rank in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    merges.sort(key=lambda merge: merge[:2])
    unk = pieces[trainer[40]][0] if trainer[40] >= 0 else None
    pairs = [(left, right) for *_, left, right in merges]
    backend = Backend(models.BPE(vocab, pairs, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback))
    backend.normalizer = normalizers.Replace(" ", "▁")
    if export and normalizer[3]:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if not any(re.search("[^▁]▁", text) for text in scores):  # no merge crosses into a space: words can be cached
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]+|▁+"), "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if normalizer[3] else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_tokens(
        [
            AddedToken(shown(id, text, kind), special=kind != USER_DEFINED, normalized=False)
            for id, (text, _, kind) in enumerate(pieces)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    ids = {"unk_token": 40, "bos_token": 41, "eos_token": 42, "pad_token": 43}
    named = {name: pieces[trainer[key]][0] for name, key in ids.items() if 0 <= trainer[key] < len(pieces)}
    return backend, named, " " if normalizer[3] else ""
