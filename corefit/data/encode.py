"""Items -> segments -> samples."""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from corefit.data import kernel
from corefit.data.block import LENGTH, RECORD, SAMPLE_COLUMNS, SPAN, SPANS, START, STOP, SUPERVISED
from corefit.errors import CorefitError, DataError, ModelError, PluginError, in_words
from corefit.templates import PromptTemplate, markers
from corefit.types import Conversation, Document, Item, Message, Segment, Unrenderable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from corefit.data.block import Table
    from corefit.data.tokenizer import Tokenizer


AT_ONCE = 64
"""Segments whose ids are Python lists at the same time."""
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")


class Encoded(NamedTuple):
    """What became of some items: samples as in ``Block``, and for each item why it has none, and what was noticed."""

    tokens: NDArray[np.int32]
    spans: Table
    cuts: Table
    samples: Table
    """``RECORD`` is the number of the item."""
    drops: list[str | None]
    notes: list[tuple[str, ...]]
    """``look_alike`` once for every plain-text marker of the template that a message contains."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """A template and a tokenizer that fit each other, ready to encode ``parts``; made by ``make_encoder``."""

    template: PromptTemplate
    tokenizer: Tokenizer
    options: object
    supervise: str
    forbidden: NDArray[np.bool_]
    """bool [V]: ids that content must never yield."""
    forgeable: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    """Tokens that end an answer, as text."""
    rewrites: bool = False
    """The template writes an answer, or what comes before it, otherwise once another turn follows."""
    _control_ids: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids of ``stop``."""
        return tuple(self._control_id(token) for token in self.stop)

    def encode(self, items: Sequence[tuple[Item, str]]) -> Encoded:
        """Encode (item, origin) pairs, in order, with one call of the tokenizer.

        Raises:
            PluginError: the template failed, or wrote a control text that isn't one token.
        """
        segments: list[Segment] = []
        ends: list[int] = []  # of each item, in segments
        drops: list[str | None] = []
        for item, origin in items:
            drops.append(None)
            try:
                segments += self.segments(item, origin)
            except Unrenderable as refusal:
                drops[-1] = refusal.reason
            ends.append(len(segments))
        notes = [self._look_alikes(item) if self.forgeable else () for item, _ in items]
        texts, supervised, control, turn = zip(*segments, strict=True) if segments else ((), (), (), ())
        flags = [np.array(values, np.bool_) for values in (supervised, control, turn)]
        tokens, sizes = self._ids(texts, control)
        return _samples(tokens, sizes, flags, np.array(ends, np.int64), drops, notes, self.forbidden)

    def _ids(self, texts: Sequence[str], control: Sequence[bool]) -> tuple[NDArray[np.int32], Table]:
        """Give the ids of all segments one after another, and how many each has.

        Some segments at a time: so few lists of ids at once stay in the processor's cache until they are freed.
        """
        encodings = self.tokenizer.encodings([t for t, c in zip(texts, control, strict=True) if t and not c])
        ids = np.empty(sum(map(len, encodings)) + sum(control), np.int32)
        sizes, encoded, at = np.empty(len(texts), np.int64), iter(encodings), 0
        for k in range(0, len(texts), AT_ONCE):
            some = zip(texts[k : k + AT_ONCE], control[k : k + AT_ONCE], strict=True)
            parts = [self._control_id(t) if c else next(encoded).ids if t else [] for t, c in some]
            at += join_ids(parts, ids[at:], sizes[k:])
        return ids, sizes

    def segments(self, item: Item, origin: str = "") -> Sequence[Segment]:
        """Render an item: what is encoded, piece by piece.

        Raises:
            Unrenderable: the item can't be written in this format.
            PluginError: the template failed.
        """
        if isinstance(item, Document):
            segments: Sequence[Segment] = self._document(item)
            text = item.text
        else:
            conversation = Conversation(self._supervision(item.messages), *item[1:])
            try:
                rendered = self.template.render(conversation, self.tokenizer, self.options)
                segments = list(_without_empty_thoughts(rendered))
                text = _text(segments)
                if self.rewrites:
                    self._check_turns(conversation.messages, text)
            except (Unrenderable, ModelError, KeyboardInterrupt):
                raise
            except DataError as error:
                raise DataError(f"{origin}: {error}") from error
            except BaseException as error:  # whatever it does, a plugin doesn't end the process
                what = f"template {self.template.name!r} failed with {in_words(error)}"
                raise PluginError(f"{origin}: {what}") from error
            if segments and not any(segment.turn for segment in segments):
                segments[0] = segments[0]._replace(turn=True)  # without a turn it would be a document
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unrenderable("lone_surrogate") from None
        return segments

    def prompt(
        self, messages: Sequence[Message], known: Mapping[str, Sequence[int]] | None = None
    ) -> NDArray[np.int32]:
        """Give the ids after which training taught the model to answer ``messages``: int32 [L].

        ``known``: text -> ids of answers that the model gave; they stay what they are, however the text would be
        encoded.

        Raises:
            Unrenderable: the messages can't be written in this format, or as nothing, or one would yield a control
                token.
        """
        asked = [m._replace(supervised=False if m.role == "assistant" else None) for m in messages]
        segments = self.segments(Conversation((*asked, Message("assistant", "x", supervised=True))), "prompt")
        answer = next((i for i, segment in enumerate(segments) if segment.supervised), None)
        if answer is None:
            raise Unrenderable("nothing_supervised")
        control = [segment.control for segment in segments[:answer]]
        ids, sizes = self._ids([segment.text for segment in segments[:answer]], control)
        if not len(ids):
            raise Unrenderable("empty_prompt")
        if (self.forbidden[ids] & ~np.repeat(control, sizes)).any():
            raise Unrenderable("control_in_content")
        parts = np.split(ids, np.cumsum(sizes)[:-1])
        said = [None if c or not known else known.get(s.text) for s, c in zip(segments, control, strict=False)]
        return np.concatenate([p if s is None else np.array(s, np.int32) for p, s in zip(parts, said, strict=True)])

    def form(self) -> str:
        """Give what tells whether a template that no Jinja says still writes the same; empty: a Jinja says it."""
        if self.template.chat_template is not None or self.template.name == "tokenizer":
            return ""
        try:
            written = [(segment.text, segment.control) for segment in self.segments(_PROBE)]
        except (Unrenderable, CorefitError):  # two turns may be too many for it, and the data have one
            return ""
        return f"{zlib.crc32(repr(written).encode()):08x}"

    def _document(self, item: Document) -> list[Segment]:
        if not item.text:
            raise Unrenderable("empty_document")
        if not self.tokenizer.eos_token:
            raise Unrenderable("no_eos_token")
        segments = [Segment(item.text, True), Segment(self.tokenizer.eos_token, True, True)]
        if self.template.bos and self.tokenizer.bos_token:
            segments.insert(0, Segment(self.tokenizer.bos_token, False, True))
        return segments

    def _supervision(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Say of every answer whether it is supervised, so that a template need not know the rule."""
        if not messages:
            raise Unrenderable("empty_conversation")
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if [1 for message in messages if message.supervised and message.role != "assistant"]:
            raise Unrenderable("supervised_not_assistant")
        ruled, made = set(answers if self.supervise == "all" else answers[-1:]), list(messages)
        for i in answers:
            if messages[i].supervised is None:
                made[i] = Message(*messages[i][:-1], i in ruled)  # its last field
        return tuple(made)

    def _check_turns(self, messages: Sequence[Message], whole: str) -> None:
        """Refuse an answer to learn that stands behind another text than the one in which it will be asked for."""
        asked = [i for i, message in enumerate(messages) if message.role == "user"]
        for i, message in enumerate(messages):
            if not message.supervised or not asked or i > asked[-1]:
                continue
            alone = list(self.template.render(Conversation(tuple(messages[: i + 1])), self.tokenizer, self.options))
            if not whole.startswith(_until_answered(alone)):
                turn = sum(j < i for j in asked)
                raise DataError(
                    f"turn {turn}: template {self.template.name!r} writes it otherwise because turn "
                    f'{turn + 1} follows; set template.supervise to "unroll" (a sample of every turn) or "last"'
                )

    def _look_alikes(self, item: Item) -> tuple[str, ...]:
        if not isinstance(item, Conversation):
            return ()
        contents = [message.content for message in item.messages]
        return ("look_alike",) * sum(marker in content for marker in self.forgeable for content in contents)

    def _control_id(self, text: str) -> int:
        id = self._control_ids.get(text)
        if id is None:
            id = self.tokenizer.token_id(text)
            id = self.tokenizer.token_id(text.strip()) if id is None else id  # with the whitespace that it swallows
            if id is None:
                raise PluginError(_not_one_token([text], self.template, self.tokenizer))
            self._control_ids[text] = id
        return id


def parts(item: Item, supervise: str) -> Sequence[Item]:
    """Give what is encoded of an item: itself; of a conversation with ``"unroll"`` a part for each answer, up to it."""
    if supervise != "unroll" or not isinstance(item, Conversation):
        return (item,)
    made, masked = [], tuple(m._replace(supervised=False) if m.role == "assistant" else m for m in item.messages)
    for i, message in enumerate(item.messages):
        if message.role == "assistant" and message.supervised is not False:
            made.append(item._replace(messages=(*masked[:i], message._replace(supervised=True))))
    return made or (item,)


def _without_empty_thoughts(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Mask a think block that holds nothing: it is an answer's beginning that says not to think, not an answer."""
    for segment in segments:
        if segment.supervised and not segment.control and (thought := _EMPTY_THOUGHT.match(segment.text)):
            yield segment._replace(text=thought[0], supervised=False)
            segment = segment._replace(text=segment.text[thought.end() :], turn=False)
            if not segment.text:
                continue
        yield segment


def _text(segments: Iterable[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def _until_answered(segments: Sequence[Segment]) -> str:
    """Give the text up to the end of the last answer."""
    answered = max((i + 1 for i, segment in enumerate(segments) if segment.supervised), default=0)
    return _text(segments[:answered])


_PROBE = Conversation(
    tuple(Message(("user", "assistant")[i % 2], content) for i, content in enumerate(("q 1", "a 1", "q 2", "a 2")))
)
_PROBES = (_PROBE, Conversation((Message("system", "s 1"), *_PROBE.messages)))
"""Without a system message, and with one, which not every format has."""


def written(tokens: Sequence[str], template: PromptTemplate, tokenizer: Tokenizer, options: object) -> tuple[str, ...]:
    """Give those of some tokens that the template writes itself; the others are words of content.

    They are in what it makes of simple conversations, or, as marks of tools may, in its Jinja alone (``role`` is none).
    """
    encoder = Encoder(template, tokenizer, options, "all", np.zeros(0, np.bool_))
    made = [*template.control, *template.stop]
    for probe in _PROBES:
        with contextlib.suppress(Unrenderable, CorefitError):  # what is wrong with it, make_encoder says
            made.append(_text(encoder.segments(probe, "start")))
    text, jinja = "\n".join(made), template.chat_template or tokenizer.chat_template or ""
    return tuple(token for token in tokens if token in text or (token in jinja and not token.isidentifier()))


def make_encoder(
    template: PromptTemplate, tokenizer: Tokenizer, *, template_options: object = None, supervise: str = "all"
) -> Encoder:
    """Make an encoder, after checking that template and tokenizer fit; protects the tokenizer's control tokens.

    Args:
        template: the format.
        tokenizer: the run's tokenizer.
        template_options: handed to the template's ``render``.
        supervise: ``"all"`` answers of a conversation or only the ``"last"``, which each of its ``parts`` has with
            ``"unroll"``.

    Raises:
        ModelError: a control, stop or BOS token is not one token of the tokenizer, or its own Jinja can't be used.
        PluginError: the template fails on a simple conversation.
    """
    named = (tokenizer.bos_token,) if template.bos and tokenizer.bos_token else ()
    if missing := [t for t in (*named, *template.control, *template.stop) if tokenizer.token_id(t) is None]:
        raise ModelError(_not_one_token(missing, template, tokenizer))
    control = {*template.control, *template.stop, *(() if template.chat_template else tokenizer.control_tokens)}
    forbidden = tokenizer.protect(sorted(control))
    mask = np.zeros(tokenizer.vocab_size, np.bool_)
    mask[sorted(forbidden)] = True
    encoder = Encoder(template, tokenizer, template_options, supervise, mask)
    reason = ""
    for probe in _PROBES:
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
    first = [segment.text.strip() for segment in segments if segment.text][:2]
    if tokenizer.bos_token and first == [tokenizer.bos_token] * 2:
        raise ModelError(
            f"template {template.name!r} begins with BOS and {first[1]!r}, which is the BOS of the tokenizer "
            f"{tokenizer.name} already; choose another with --template ('tokenizer' is the model's own)"
        )
    last = [segment.text.strip() for segment in segments if segment.supervised and segment.control]
    trained = last[-1:] or ([] if template.stop else [tokenizer.eos_token or ""])
    stop = tuple(dict.fromkeys([*template.stop, *trained]))
    if tokenizer.token_id(stop[0]) is None:
        raise ModelError(_not_one_token(["EOS"], template, tokenizer))
    try:
        alone = encoder.segments(Conversation(probe.messages[:-2]), "start")
    except Unrenderable:
        alone = []
    rewrites = not _text(segments).startswith(_until_answered(alone))
    plain = "\n".join(segment.text for segment in segments if not segment.control)
    for message in _PROBES[-1].messages:
        plain = plain.replace(message.content, "\n")
    forgeable = [m for m in template.forgeable or markers([plain]) if tokenizer.token_id(m) not in forbidden]
    return replace(encoder, stop=stop, forgeable=tuple(forgeable), rewrites=rewrites)


def _not_one_token(tokens: Sequence[str], template: PromptTemplate, tokenizer: Tokenizer) -> str:
    names = list(dict.fromkeys(tokens))
    if text := [token for token in names if token in template.stop and token not in template.control]:
        return (
            f"template {template.name!r} has the stop {text[0]!r}, which is not one token of the tokenizer "
            f"{tokenizer.name}; where it is plain text, take it out of the template's stop and let EOS end an answer "
            "(eos=True), else choose a model made for this format, or add it with model.add_tokens"
        )
    where = tokenizer.name + f" (and {len(names) - 1} more)" * (len(names) > 1)
    add = json.dumps(names, ensure_ascii=False)
    return (
        f"template {template.name!r} needs {names[0]!r}, which is not one token of the tokenizer {where}; "
        "choose another with --template ('tokenizer' is the model's own), a model made for this format, or add to it: "
        f"--set 'model.add_tokens={add}'; what is plain text in the format can't be in the template's control"
    )


def join_ids(parts: list[list[int] | int], ids: NDArray[np.int32], sizes: Table) -> int:
    """Write lists of ids, and single ids, one after another, and the size of each part; give how many ids they are."""
    if kernel.compiled is not None:
        n: int = kernel.compiled.join_ids(parts, ids, sizes)
        return n
    sizes[: len(parts)] = [len(part) if isinstance(part, list) else 1 for part in parts]
    flat = [id for part in parts for id in (part if isinstance(part, list) else (part,))]
    ids[: len(flat)] = flat
    return len(flat)


def _samples(
    tokens: NDArray[np.int32],
    sizes: Table,
    flags: Sequence[NDArray[np.bool_]],
    item_ends: Table,
    drops: list[str | None],
    notes: list[tuple[str, ...]],
    forbidden: NDArray[np.bool_],
) -> Encoded:
    """Cut the tokens of all segments into samples, one an item; drop what holds a forbidden id, or nothing to learn.

    ``flags``: which of the segments are supervised, control text and the first of a turn, bool [S] each.
    """
    n_items = len(item_ends)
    supervised, control, turn = flags
    segment_ends = np.cumsum(sizes)
    segment_starts = segment_ends - sizes
    bounds = np.concatenate([[0], segment_ends])[np.concatenate([[0], item_ends])]  # of items, in tokens
    owner = np.repeat(np.arange(n_items), np.diff(item_ends, prepend=0))
    target = np.flatnonzero(supervised & (sizes > 0))
    starts, ends, owners = segment_starts[target], segment_ends[target], owner[target]
    # neighbours that are supervised become one span
    joined = np.zeros(len(target) + 1, np.bool_)
    joined[1:-1] = (starts[1:] == ends[:-1]) & (owners[1:] == owners[:-1])
    spans = np.stack([starts[~joined[:-1]], ends[~joined[1:]]], axis=1)
    span_owners = owners[~joined[:-1]]
    learnt = ends - np.maximum(starts, bounds[owners] + 1)
    samples = np.zeros((n_items, SAMPLE_COLUMNS), np.int64)
    samples[:, START], samples[:, LENGTH], samples[:, STOP] = bounds[:-1], np.diff(bounds), -1
    samples[:, SPAN] = np.searchsorted(span_owners, np.arange(n_items))
    samples[:, SPANS] = np.bincount(span_owners, minlength=n_items)
    np.add.at(samples[:, SUPERVISED], owners, learnt)
    samples[:, RECORD] = np.arange(n_items)
    found = forbidden[tokens]
    found[segment_starts[control]] = False
    forged = np.zeros(n_items, np.bool_)
    forged[np.searchsorted(bounds[1:], np.flatnonzero(found), side="right")] = True
    for i in np.flatnonzero(forged | (samples[:, SUPERVISED] == 0)).tolist():
        drops[i] = drops[i] or ("control_in_content" if forged[i] else "nothing_supervised")
    kept = np.array([drop is None for drop in drops], np.bool_)
    turn = turn & (segment_starts < bounds[1:][owner])  # not an empty one at the end
    return Encoded(tokens, spans, segment_starts[turn], samples[kept], drops, notes)
