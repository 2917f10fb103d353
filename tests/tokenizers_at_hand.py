"""Small tokenizers of every kind that changes text on its way, each written as a folder by ``TOKENIZERS[kind]``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tiny import CONTROL, write_tokenizer


def _edited(folder: Path, **changes: object) -> Path:
    """The byte-level tokenizer with other parts."""
    path = write_tokenizer(folder) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    return folder


def _made(folder: Path, model: object, **parts: object) -> Path:
    from tokenizers import AddedToken, Tokenizer

    folder = write_tokenizer(folder)
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>", *CONTROL)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _words(folder: Path) -> Path:
    """Whole words, most of them unknown; white space is lost."""
    from tokenizers import models, pre_tokenizers

    known = ["<unk>", "user", "assistant", "hi", "yo", "you", "and", "a", "q", "1", "2", "s", "that", "is", "all"]
    model = models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
    return _made(folder, model, pre_tokenizer=pre_tokenizers.Whitespace())


def _pieces(folder: Path, *, byte_fallback: bool) -> Path:
    """As LLaMA's: a space before every text; what is unknown is a run of bytes, or one unknown token."""
    from tokenizers import decoders, models, normalizers

    letters = "▁abcdefghijklmnopqrstuvwxyzASU0123456789.,:;?!|<>=[]\n"
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    model = models.BPE(
        {piece: i for i, piece in enumerate(vocabulary)},
        [],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )
    return _made(
        folder,
        model,
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )


def _unigram(folder: Path) -> Path:
    """As T5's: NFKC, runs of spaces are one, spaces at the ends are none."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    letters = "▁abcdefghijklmnopqrstuvwxyzASU0123456789.,:;?!|<>=[]"
    model = models.Unigram([("<unk>", -9.0), *((letter, -2.0) for letter in letters)], 0, False)
    return _made(
        folder,
        model,
        normalizer=normalizers.Sequence(
            [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
        ),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def _normalised(*kinds: dict[str, object]) -> Callable[[Path], Path]:
    return lambda folder: _edited(folder, normalizer={"type": "Sequence", "normalizers": list(kinds)})


def _prefix_space(folder: Path) -> Path:
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return _edited(folder, pre_tokenizer=level)


TOKENIZERS: dict[str, Callable[[Path], Path]] = {
    "byte-level": write_tokenizer,
    "prefix space": _prefix_space,
    "nfkc": _normalised({"type": "NFKC"}),
    "lower case": _normalised({"type": "Lowercase"}),
    "no accents": _normalised({"type": "NFD"}, {"type": "StripAccents"}),
    "stripped": _normalised({"type": "Strip", "strip_left": True, "strip_right": True}),
    "words": _words,
    "metaspace": lambda folder: _pieces(folder, byte_fallback=True),
    "unknown": lambda folder: _pieces(folder, byte_fallback=False),
    "unigram": _unigram,
}
