"""Samples as the model will see them: supervised tokens marked, labels, a histogram of lengths; templates compared."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from corefit.data.block import DROPPED, SAMPLES, TRUNCATED, WORDS
from corefit.errors import CorefitError, ModelError
from corefit.templates import PromptTemplate
from corefit.terminal import visible
from corefit.types import IGNORE_INDEX, BadRecord, Conversation, Item, Message, Sample, Unrenderable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from corefit.data.block import Block
    from corefit.types import Batch, Record

PLACES = 3
"""Records that are named for each reason why something is left out."""
SHOWN = 1_500
"""Tokens whose text ``first_packs`` gives."""
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
    return aligned.tolist()


class Piece(NamedTuple):
    """A token, a few that share the bytes of a character, or a segment."""

    text: str
    supervised: bool
    control: bool = False
    n: int = 1
    """Tokens, or one segment."""


def pieces(sample: Sample, tokenizer: _Bytes) -> Iterator[Piece]:
    """Yield the tokens; those that share the bytes of one character come together."""
    decoder = getincrementaldecoder("utf-8")("replace")
    text, count, supervised = "", 0, False
    for token, target in zip(sample.input_ids, target_mask(sample), strict=True):
        if count and bool(target) != supervised:
            yield Piece(text + decoder.decode(b"", final=True), supervised, n=count)
            text, count = "", 0
        supervised = bool(target)
        text += decoder.decode(tokenizer.token_bytes(int(token)))
        count += 1
        if not decoder.getstate()[0]:  # no character is begun
            yield Piece(text, supervised, n=count)
            text, count = "", 0
    if count:
        yield Piece(text + decoder.decode(b"", final=True), supervised, n=count)


def first_packs(batches: Iterable[Batch], tokenizer: _Bytes, pad_id: int) -> list[dict[str, Any]]:
    """Give the first packs of a step as ``PacksReport`` has them, as far as the text of ``SHOWN`` tokens goes."""
    import numpy as np

    packs: list[dict[str, Any]] = []
    left = SHOWN
    for batch in batches:
        width, origins = batch.input_ids.shape[1], iter(batch.origins())
        ids, labels = batch.input_ids.ravel(), batch.labels.ravel()
        bounds = batch.cu_seqlens.tolist()
        rows: dict[int, list[dict[str, Any]]] = {}
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            if begin == end or (ids[begin:end] == pad_id).all():  # the padding of a pack is its last document
                continue
            target = np.concatenate([[False], labels[begin : end - 1] != IGNORE_INDEX, [False]])
            edges = np.flatnonzero(np.diff(target.astype(np.int8))) + 1  # every run of targets begins and ends at one
            sample = Sample(ids[begin:end].astype(np.int32), edges.reshape(-1, 2).astype(np.int32), next(origins, ""))
            shown = list(islice(pieces(sample, tokenizer), left))
            left -= len(shown)
            document: dict[str, Any] = {"origin": sample.origin, "tokens": end - begin}
            document["pieces"] = [[piece.text, piece.supervised] for piece in shown]
            document["cut"] = sum(piece.n for piece in shown) < end - begin
            rows.setdefault(begin // width, []).append(document)
        for documents in rows.values():
            used = sum(document["tokens"] for document in documents)
            packs.append({"slots": width, "used": used, "documents": [d for d in documents if d["pieces"]]})
        if left <= 0:
            break
    return [pack for pack in packs if pack["documents"]]


def marked(sample: Sample, tokenizer: _Bytes, *, colour: bool) -> str:
    """Give the sample's text: a dot between tokens, ``[+`` and ``+]`` around supervised runs."""
    return _marked(pieces(sample, tokenizer), colour=colour)


def _marked(pieces: Iterable[Piece], *, colour: bool) -> str:
    out: list[str] = []
    inside = False
    for text, supervised, control, _ in pieces:
        if supervised != inside:
            out.append((GREEN if colour else "") + "[+" if supervised else "+]" + (RESET if colour else ""))
            inside = supervised
        elif out:
            out.append("\u00b7")
        out.append("{" + _visible(text) + "}" if control else _visible(text))
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
        messages = [{k: v for k, v in m._asdict().items() if v is not None and v != ()} for m in item.messages]
    else:
        messages = [{"role": "document", "content": item.text}]
    return {
        "origin": sample.origin,
        "messages": messages,
        "input_ids": sample.input_ids.tolist(),
        "labels": labels(sample),
        "text": text,
    }


class Reasons:
    """What is left out of records, or noticed in them: how often, and where first."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._places: dict[tuple[str, str], set[tuple[int, int, str]]] = {}

    def add(self, records: Sequence[Record | BadRecord], block: Block) -> None:
        """Take in the records of a block."""
        for record, row in zip(records, block.records.tolist(), strict=False):
            words, place = block.words[row[WORDS]], str(record) if isinstance(record, BadRecord) else record.origin
            for what, reasons in (
                ("parts of records" if row[SAMPLES] else "records", Counter(words.drops)),
                ("messages", Counter(words.messages)),
                ("noticed", Counter(words.notes)),
                ("tokens", Counter({"beyond pack.max_length": row[TRUNCATED] + row[DROPPED]})),
            ):
                for key, n in (((what, reason), n) for reason, n in reasons.items() if n):
                    self._counts[key] += n
                    places = self._places.setdefault(key, set()) | {(record.file, record.line, place)}
                    self._places[key] = set(sorted(places)[:PLACES])

    def lines(self) -> list[str]:
        """Give a line for each reason."""
        return [
            f"  {what}: {n:,} {reason}: {', '.join(place for *_, place in sorted(self._places[what, reason]))}"
            for (what, reason), n in sorted(self._counts.items())
        ]


def histogram(lengths: Sequence[int]) -> list[str]:
    """Give lines: bins of doubling width in tokens, a bar and a count each."""
    if not lengths:
        return ["no samples"]
    bins = Counter(max(length, 1).bit_length() for length in lengths)
    top = max(bins.values())
    lines = []
    for power in range(min(bins), max(bins) + 1):
        bar = "#" * max(round(40 * bins[power] / top), 1 if bins[power] else 0)
        lines.append(f"{1 << (power - 1):>7,}-{(1 << power) - 1:<7,} {bar} {bins[power]:,}")
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


# ------------------------------------------------------------------------------------------------------- templates


_TURN = (Message("user", "Hi! 你好"), Message("assistant", "Hello 🙂"))
_TURNS = (*_TURN, Message("user", "2 + 2?"), Message("assistant", "4."))
CONVERSATIONS = {
    "one turn": Conversation(_TURN),
    "two turns": Conversation(_TURNS),
    "a system message": Conversation((Message("system", "Be brief."), *_TURNS)),
    "an empty system message": Conversation((Message("system", ""), *_TURN)),
    "an answer first": Conversation((_TURN[1], *_TURN)),
    "two questions in a row": Conversation((_TURN[0], *_TURN)),
}
"""On which templates are compared."""
MORE = {
    "a tool's message": Conversation((_TURN[0], Message("assistant", "Let me see."), Message("tool", "4"), _TURNS[3])),
    "a thought": Conversation((_TURNS[2], Message("assistant", "4.", reasoning="Two and two."))),
}
"""What not every format has a place for."""


class _NoTokenizer:
    """Stands in where none is named, as far as that goes."""

    bos_token, eos_token, chat_template = "<bos>", "<eos>", None

    def token_id(self, token: str) -> None:
        return None

    def split_control(self, text: str) -> list[tuple[str, bool]]:
        return [(text, False)]

    def render_chat(self, *messages: object, **options: object) -> str:
        raise ModelError("this template is the tokenizer's own: name one with --tokenizer PATH")


TemplateReader = Callable[[Conversation], list[Piece]]
"""Gives what a template makes of a conversation, piece by piece; raises ``Unrenderable`` as the template does."""


def template_reader(template: PromptTemplate, tokenizer: str | None) -> tuple[TemplateReader, Sequence[str]]:
    """Give what gives tokens, or segments where no tokenizer is named, and the control tokens that the tokenizer lacks.

    Raises:
        ModelError: template and tokenizer don't fit, or the template needs a tokenizer.
    """
    options = template.options() if template.options else None
    if tokenizer is None:
        named = _NoTokenizer()
        return lambda item: [Piece(s.text, s.supervised, s.control) for s in template.render(item, named, options)], ()
    from corefit.data.encode import make_encoder
    from corefit.data.tokenizer import Tokenizer

    # each template its own: it protects what another writes as text
    loaded = Tokenizer.load(tokenizer, template.control)
    encoder = make_encoder(template, loaded, template_options=options)

    def read(item: Conversation) -> list[Piece]:
        encoded = encoder.encode([(item, "sample")])
        if encoded.drops[0]:
            raise Unrenderable(encoded.drops[0])
        found, at = [], 0
        for piece in pieces(Sample(encoded.tokens, encoded.spans.astype("int32"), "sample"), loaded):
            found.append(piece._replace(control=bool(encoder.forbidden[encoded.tokens[at]])))
            at += piece.n
        return found

    return read, [token for token in template.control if loaded.token_id(token) in loaded.new_ids]


def _added(missing: Sequence[str], tokenizer: str | None) -> list[str]:
    """Say which control tokens the tokenizer lacks: they are shown as if it had them."""
    words = "no tokens of {}, shown as if model.add_tokens had them: {}"
    return [visible(words.format(tokenizer, "  ".join(dict.fromkeys(missing))))] if missing else []


def template_summary(template: PromptTemplate) -> str:
    """Give one line: what it is, how an answer ends, where it comes from."""
    ends = ", ".join(template.stop) or ("EOS" if template.chat_template else "the tokenizer's")
    return visible(f"{template.name}  {template.summary} (stop: {ends}; {template.source or 'no source given'})")


def template_sample(template: PromptTemplate, tokenizer: str | None, *, colour: bool) -> list[str]:
    """Give lines that show a template on a sample conversation; ``tokenizer`` is a path."""
    read, missing = template_reader(template, tokenizer)
    unit = "segments" if tokenizer is None else "tokens"
    lines = [template_summary(template), *_added(missing, tokenizer)]
    for what, words in (
        ("control tokens, which content can't forge", template.control),
        ("markers in plain text, counted where content has them", template.forgeable),
    ):
        lines += [visible(f"{what}: {'  '.join(words)}")] if words else []
    lines += [f"[+supervised+]  {{control token}}  \u00b7 between {unit}"]
    if tokenizer is None:
        lines += ["<bos> and <eos> stand for the tokenizer's own; --tokenizer PATH shows them, and tokens"]
    for name in ("a system message", "two turns"):
        try:
            lines += ["", _marked(read(CONVERSATIONS[name]), colour=colour)]
            break
        except Unrenderable as refusal:
            lines.append(f"it can't write {name} ({refusal.reason})")
    for name, item in MORE.items():
        with suppress(Unrenderable, CorefitError):
            found = read(item)
            text = "".join(piece.text for piece in found)
            if all(word in text for message in item.messages for word in (message.content, message.reasoning or "")):
                lines += ["", f"with {name}:", _marked(found, colour=colour)]
    return lines


def template_difference(
    first: PromptTemplate, second: PromptTemplate, tokenizer: str | None, *, colour: bool
) -> list[str]:
    """Give lines that show where two templates differ first, on ``CONVERSATIONS``; ``tokenizer`` is a path."""
    both, width = (first, second), max(len(first.name), len(second.name))
    readers, missing = zip(*(template_reader(template, tokenizer) for template in both), strict=True)
    lines = _added([*missing[0], *missing[1]], tokenizer)
    unit = "segment" if tokenizer is None else "token"
    for name, item in CONVERSATIONS.items():
        found, refused = list[list[Piece]](), list[str]()
        for template, read in zip(both, readers, strict=True):
            try:
                found.append(read(item))
            except Unrenderable as refusal:
                refused.append(f"only {template.name} can't write {name} ({refusal.reason})")
        if len(refused) == 1:
            return lines + refused
        if refused or found[0] == found[1]:
            continue
        k = next(i for i, pair in enumerate(zip_longest(*found)) if pair[0] != pair[1])
        shown = [_marked(some[max(k - 3, 0) : k + 5], colour=colour).replace("\n", "") for some in found]
        return [
            *lines,
            f"first difference: {unit} {1 + sum(piece.n for piece in found[0][:k])} of {name}",
            *(f"  {t.name:<{width}}  {'... ' if k > 3 else ''}{text}" for t, text in zip(both, shown, strict=True)),
        ]
    lines += [f"{first.name} and {second.name} write the same {unit}s, and supervise the same"]
    if set(first.stop) != set(second.stop):
        lines += [f"  {t.name:<{width}}  ends an answer at {', '.join(t.stop) or 'EOS'}" for t in both]
    return lines
