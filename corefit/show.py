"""Samples as the model will see them: text with its supervised tokens marked, labels, a histogram of lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from corefit.types import IGNORE_INDEX, Conversation, Item, Sample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GREEN, RESET = "\x1b[32m", "\x1b[0m"


class _Bytes(Protocol):
    def token_bytes(self, token_id: int) -> bytes: ...


def target_mask(sample: Sample) -> NDArray[np.bool_]:
    """Give bool [L]: whether each token is a target of the loss."""
    import numpy as np

    mask = np.zeros(len(sample.input_ids), dtype=np.bool_)
    for start, end in sample.spans:
        mask[start:end] = True
    mask[:1] = False  # nothing precedes the first token, so nothing predicts it
    return mask


def labels(sample: Sample) -> list[int]:
    """Give the next-token-aligned labels [L], IGNORE_INDEX where the loss does not count."""
    import numpy as np

    aligned = np.full(len(sample.input_ids), IGNORE_INDEX, dtype=np.int64)
    mask = target_mask(sample)
    aligned[:-1][mask[1:]] = sample.input_ids[1:][mask[1:]]
    return [int(label) for label in aligned]


def pieces(sample: Sample, tokenizer: _Bytes) -> Iterator[tuple[str, bool, int]]:
    """Yield (text, supervised, number of tokens); tokens that share the bytes of one character come together."""
    pending, count, supervised = b"", 0, False
    for token, target in zip(sample.input_ids, target_mask(sample), strict=True):
        if count and bool(target) != supervised:
            yield pending.decode("utf-8", errors="replace"), supervised, count
            pending, count = b"", 0
        supervised = bool(target)
        pending += tokenizer.token_bytes(int(token))
        count += 1
        try:
            text = pending.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                continue
            text = pending.decode("utf-8", errors="replace")
        yield text, supervised, count
        pending, count = b"", 0
    if count:
        yield pending.decode("utf-8", errors="replace"), supervised, count


def marked(sample: Sample, tokenizer: _Bytes, *, colour: bool) -> str:
    """Give the sample's text: a dot between tokens, ``[+`` and ``+]`` around supervised runs."""
    out: list[str] = []
    inside = False
    for text, supervised, _ in pieces(sample, tokenizer):
        if supervised != inside:
            out.append((GREEN if colour else "") + "[+" if supervised else "+]" + (RESET if colour else ""))
            inside = supervised
        elif out:
            out.append("\u00b7")
        out.append(_visible(text))
    if inside:
        out.append("+]" + (RESET if colour else ""))
    return "".join(out)


def _visible(text: str) -> str:
    """Make control characters visible: a terminal must show what is there, and obey nothing in it."""
    text = text.replace("\\", "\\\\") if "\\n" in text else text
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown.replace("\n", "\\n\n")


def as_json(item: Item, sample: Sample, text: str) -> dict[str, Any]:
    """Give one object for programs: origin, messages, input_ids, labels, text."""
    if isinstance(item, Conversation):
        messages = [{"role": m.role, "content": m.content} for m in item.messages]
    else:
        messages = [{"role": "document", "content": item.text}]
    return {
        "origin": sample.origin,
        "messages": messages,
        "input_ids": sample.input_ids.tolist(),
        "labels": labels(sample),
        "text": text,
    }


def histogram(lengths: Sequence[int], *, width: int = 40) -> list[str]:
    """Give lines: bins of doubling width in tokens, a bar and a count each."""
    if not lengths:
        return ["no samples"]
    bins: dict[int, int] = {}
    for length in lengths:
        bins[max(length, 1).bit_length()] = bins.get(max(length, 1).bit_length(), 0) + 1
    top = max(bins.values())
    lines = []
    for power in range(min(bins), max(bins) + 1):
        count = bins.get(power, 0)
        bar = "#" * max(round(width * count / top), 1 if count else 0)
        lines.append(f"{1 << (power - 1):>7,}-{(1 << power) - 1:<7,} {bar} {count:,}".rstrip())
    return lines


def ledger_lines(ledger: Mapping[str, Any]) -> list[str]:
    """Give the ledger's equations in words; what was dropped or noticed by reason."""

    def total(value: int | Mapping[str, int]) -> int:
        return value if isinstance(value, int) else sum(value.values())

    lines = []
    for name, left in (("records", "read"), ("tokens", "encoded"), ("slots", "total")):
        parts = {k: total(v) for k, v in ledger[name].items() if k not in (left, "parts_dropped")}
        terms = " + ".join(f"{count:,} {word}" for word, count in parts.items() if count)
        lines.append(f"  {name}: {ledger[name][left]:,} {left} = {terms or 0}")
    for name, reasons in (
        ("records dropped", ledger["records"]["dropped"]),
        ("parts of records dropped", ledger["records"]["parts_dropped"]),
        ("messages dropped", ledger["messages"]["dropped"]),
        ("noticed in messages", ledger["messages"]["notes"]),
    ):
        if reasons:
            lines.append(f"  {name}: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items())))
    return lines
