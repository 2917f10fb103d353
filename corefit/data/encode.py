"""Items -> segments -> samples, and samples that fit a pack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from corefit.errors import DataError, ModelError, PluginError
from corefit.templates import markers
from corefit.types import Conversation, Document, Item, Message, PromptTemplate, Sample, Segment, Unrenderable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from corefit.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What became of one item: a sample, or the reason why there is none."""

    sample: Sample | None
    drop: str | None = None
    notes: tuple[str, ...] = ()
    """``look_alike`` once for every plain-text marker of the template that a message contains."""


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A sample cut to the pack: its tokens are those of ``samples``, plus truncated, plus dropped ones."""

    samples: tuple[Sample, ...]
    n_truncated_tokens: int = 0
    drop: str | None = None
    """Why nothing is left; None where ``samples`` holds something."""
    n_dropped_tokens: int = 0
    """The whole sample's where ``drop`` is set; else those of pieces without a supervised token."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """A template and a tokenizer that fit each other, ready to encode; made by ``make_encoder``."""

    template: PromptTemplate
    tokenizer: Tokenizer
    options: object
    supervise: str
    forbidden: NDArray[np.int64]
    """Ids that content must never yield."""
    forgeable: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    """Tokens that end an answer, as text."""
    _control_ids: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids of ``stop``."""
        return tuple(self._control_id(token) for token in self.stop)

    def encode(self, items: Sequence[tuple[Item, str]]) -> list[Encoded]:
        """Encode (item, origin) pairs, in order, with one call of the tokenizer; one result for each pair.

        Raises:
            PluginError: the template failed, or wrote a control text that isn't one token.
        """
        planned: list[tuple[str, tuple[Segment, ...], str | None, tuple[str, ...]]] = []
        for item, origin in items:
            segments: tuple[Segment, ...] = ()
            drop = None
            try:
                segments = self.segments(item, origin)
            except Unrenderable as refusal:
                drop = refusal.reason
            planned.append((origin, segments, drop, self._look_alikes(item)))
        texts = [s.text for _, segments, _, _ in planned for s in segments if not s.control and s.text]
        encoded = iter(self.tokenizer.encode(texts))
        results = []
        for origin, segments, drop, notes in planned:
            sample = None
            if drop is None:
                parts = self._parts(segments, encoded)
                sample = _sample(parts, segments, origin)
                content = [part for part, segment in zip(parts, segments, strict=True) if not segment.control]
                if np.isin(np.concatenate([_NOTHING, *content]), self.forbidden).any():
                    sample, drop = None, "control_in_content"
                elif not sample.n_supervised:
                    sample, drop = None, "nothing_supervised"
            results.append(Encoded(sample, drop, notes))
        return results

    def segments(self, item: Item, origin: str = "") -> tuple[Segment, ...]:
        """Render an item: what is encoded, piece by piece.

        Raises:
            Unrenderable: the item can't be written in this format.
            PluginError: the template failed.
        """
        if isinstance(item, Document):
            segments = self._document(item)
        else:
            messages = self._supervision(item.messages)
            try:
                rendered = self.template.render(replace(item, messages=messages), self.tokenizer, self.options)
                segments = tuple(rendered)
            except (Unrenderable, ModelError):
                raise
            except Exception as error:
                raise PluginError(
                    f"{origin}: template {self.template.name!r} failed with {type(error).__name__}: {error}"
                ) from error
        try:
            "".join(segment.text for segment in segments).encode()
        except UnicodeEncodeError:
            raise Unrenderable("lone_surrogate") from None
        return segments

    def prompt(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """Give the ids after which training taught the model to answer ``messages``: int32 [L].

        Raises:
            Unrenderable: the messages can't be written in this format.
        """
        asked = [replace(m, supervised=False if m.role == "assistant" else None) for m in messages]
        segments = self.segments(Conversation((*asked, Message("assistant", "x", supervised=True))))
        answer = next((i for i, segment in enumerate(segments) if segment.supervised), None)
        if answer is None:
            raise Unrenderable("nothing_supervised")
        asking = segments[:answer]
        encoded = iter(self.tokenizer.encode([s.text for s in asking if not s.control and s.text]))
        return np.concatenate([_NOTHING, *self._parts(asking, encoded)])

    def _parts(self, segments: Sequence[Segment], encoded: Iterator[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
        """Give the ids of every segment; those of text come from ``encoded``, in order."""
        return [
            np.array([self._control_id(s.text)], np.int32) if s.control else next(encoded) if s.text else _NOTHING
            for s in segments
        ]

    def _document(self, item: Document) -> tuple[Segment, ...]:
        if not item.text:
            raise Unrenderable("empty_document")
        if not self.tokenizer.eos_token:
            raise Unrenderable("no_eos_token")
        bos = (
            (Segment(self.tokenizer.bos_token, control=True),) if self.template.bos and self.tokenizer.bos_token else ()
        )
        return (*bos, Segment(item.text, True), Segment(self.tokenizer.eos_token, True, control=True))

    def _supervision(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Say of every answer whether it is supervised, so that a template need not know the rule."""
        if not messages:
            raise Unrenderable("empty_conversation")
        if any(message.supervised and message.role != "assistant" for message in messages):
            raise Unrenderable("supervised_not_assistant")
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        ruled = set(answers[-1:] if self.supervise == "last" else answers)
        return tuple(
            replace(m, supervised=i in ruled if m.supervised is None else m.supervised) if m.role == "assistant" else m
            for i, m in enumerate(messages)
        )

    def _look_alikes(self, item: Item) -> tuple[str, ...]:
        contents = [m.content for m in item.messages] if isinstance(item, Conversation) else []
        return tuple("look_alike" for marker in self.forgeable for content in contents if marker in content)

    def _control_id(self, text: str) -> int:
        id = self._control_ids.get(text)
        if id is None:
            id = self.tokenizer.token_id(text)
            id = self.tokenizer.token_id(text.strip()) if id is None else id  # with the whitespace that it swallows
            if id is None:
                raise PluginError(_not_one_token(text, self.template, self.tokenizer))
            self._control_ids[text] = id
        return id


_NOTHING: NDArray[np.int32] = np.zeros(0, np.int32)
_PROBE = Conversation(
    tuple(Message(("user", "assistant")[i % 2], content) for i, content in enumerate(("q 1", "a 1", "q 2", "a 2")))
)


def make_encoder(
    template: PromptTemplate, tokenizer: Tokenizer, *, template_options: object = None, supervise: str = "all"
) -> Encoder:
    """Make an encoder, after checking that template and tokenizer fit; protects the tokenizer's control tokens.

    Args:
        template: the format.
        tokenizer: the run's tokenizer.
        template_options: handed to the template's ``render``.
        supervise: ``"all"`` answers of a conversation or only the ``"last"``.

    Raises:
        ModelError: a control, stop or BOS token is not one token of the tokenizer, or its own Jinja can't be used.
        PluginError: the template fails on a simple conversation.
    """
    if template.bos and (tokenizer.bos_token is None or tokenizer.bos_id is None):
        raise ModelError(_not_one_token("BOS", template, tokenizer))
    for token in (*template.control, *template.stop):
        if tokenizer.token_id(token) is None:
            raise ModelError(_not_one_token(token, template, tokenizer))
    control = {*template.control, *template.stop, *(() if template.chat_template else tokenizer.control_tokens)}
    forbidden = tokenizer.protect(sorted(control))
    encoder = Encoder(template, tokenizer, template_options, supervise, np.array(sorted(forbidden), np.int64))
    system = Message("system", "s 1")
    reason = ""
    for probe in (_PROBE, Conversation((system, *_PROBE.messages))):
        try:
            segments = encoder.segments(probe, "start")
            break
        except Unrenderable as refusal:
            reason = reason or refusal.reason
    else:
        raise ModelError(
            f"template {template.name!r} can't write a question and an answer with the tokenizer {tokenizer.name} "
            f"({reason}); choose another with --template"
        )
    last = [segment.text.strip() for segment in segments if segment.supervised and segment.control]
    stop = template.stop or tuple(last[-1:] or [tokenizer.eos_token or ""])
    if tokenizer.token_id(stop[0]) is None:
        raise ModelError(_not_one_token("EOS", template, tokenizer))
    plain = "\n".join(segment.text for segment in segments if not segment.control)
    for message in (system, *_PROBE.messages):
        plain = plain.replace(message.content, "\n")
    return replace(encoder, stop=stop, forgeable=template.forgeable or markers([plain]))


def _not_one_token(token: str, template: PromptTemplate, tokenizer: Tokenizer) -> str:
    return (
        f"template {template.name!r} needs {token!r}, which is not one token of the tokenizer {tokenizer.name}; choose "
        "another with --template ('tokenizer' is the model's own), or a model made for this format"
    )


def _sample(parts: Sequence[NDArray[np.int32]], segments: Sequence[Segment], origin: str) -> Sample:
    """Join encoded segments; neighbours that are supervised become one span."""
    spans: list[list[int]] = []
    cuts = []
    at = 0
    for part, segment in zip(parts, segments, strict=True):
        if segment.turn:
            cuts.append(at)
        if segment.supervised and len(part):
            if spans and spans[-1][1] == at:
                spans[-1][1] += len(part)
            else:
                spans.append([at, at + len(part)])
        at += len(part)
    return Sample(
        input_ids=np.concatenate([_NOTHING, *parts]),
        spans=np.array(spans, np.int32).reshape(-1, 2),
        origin=origin,
        cuts=np.array(cuts, np.int32) if cuts else None,
    )


# ------------------------------------------------------------------------------------------------- fitting


def fit(sample: Sample, max_length: int, overlong: str) -> Fitted:
    """Make a sample fit ``max_length`` tokens, by the policy ``error``, ``drop``, ``truncate`` or ``split``.

    ``truncate`` keeps the head, and the stop of an answer that it cuts. ``split`` cuts documents anywhere and
    conversations between turns, repeating nothing; a turn that is longer by itself is truncated. Always
    ``len(sample) == sum of len(samples) + n_truncated_tokens + n_dropped_tokens``.

    Raises:
        DataError: the policy is ``error`` and the sample is too long.
    """
    length = len(sample.input_ids)
    if length <= max_length:
        return Fitted((sample,))
    if overlong == "error":
        raise DataError(
            f"{sample.origin}: {length} tokens, pack.max_length is {max_length}; raise it, or set pack.overlong to "
            "truncate, split or drop"
        )
    if overlong == "drop":
        return Fitted((), drop="overlong", n_dropped_tokens=length)
    pieces = [sample] if overlong == "truncate" else _pieces(sample, max_length)
    kept = []
    truncated = dropped = 0
    for piece in pieces:
        size = len(piece.input_ids)
        shorter = piece if size <= max_length else _truncate(piece, max_length)
        if shorter.n_supervised:
            kept.append(shorter)
            truncated += size - len(shorter.input_ids)
        else:
            dropped += size
    return Fitted(tuple(kept), truncated, None if kept else "nothing_supervised", dropped)


def _pieces(sample: Sample, max_length: int) -> list[Sample]:
    """Cut a document every ``max_length`` tokens, a conversation after the last turn that still fits."""
    length = len(sample.input_ids)
    if sample.cuts is None:
        bounds = [*range(0, length, max_length), length]
    else:
        bounds = [0]
        turns = [*(int(cut) for cut in sample.cuts if cut > 0), length]
        for turn, following in zip(turns, turns[1:], strict=False):
            if following - bounds[-1] > max_length and turn > bounds[-1]:
                bounds.append(turn)
        bounds.append(length)
    return [_cut(sample, start, end) for start, end in zip(bounds, bounds[1:], strict=False)]


def _cut(sample: Sample, start: int, end: int) -> Sample:
    spans = np.clip(sample.spans, start, end) - start
    cuts = sample.cuts
    return replace(
        sample,
        input_ids=sample.input_ids[start:end].copy(),
        spans=spans[spans[:, 0] < spans[:, 1]].astype(np.int32),
        cuts=None if cuts is None else (cuts[(cuts >= start) & (cuts < end)] - start).astype(np.int32),
    )


def _truncate(sample: Sample, max_length: int) -> Sample:
    """Keep the head; the answer that is cut ends with its stop, unless nothing but the stop would be left of it."""
    short = _cut(sample, 0, max_length)
    for start, end in sample.spans:
        if start < max_length < end:
            if start < max_length - 1:
                short.input_ids[-1] = sample.input_ids[end - 1]
            else:
                short = replace(short, spans=short.spans[:-1])
    return short
