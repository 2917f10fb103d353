"""What must hold of the data before step 1, shown on its first records: each proof is a line and facts. No torch here.

A proof takes nobody's word. Which tokens a sample must have, and which of them are targets, is worked out from the
item's messages and the tokenizer, one segment at a time, and compared with the labels that the model would be given:
neither ``Segment.supervised`` nor a span is asked.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corefit.data.block import LENGTH, RECORD, START, Block, fit
from corefit.data.rows import gather, padded
from corefit.data.source import Source
from corefit.errors import CorefitError, DataError, MaskError
from corefit.types import IGNORE_INDEX, BadRecord, Conversation, Document, Item, Message, Record, Unrenderable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from corefit.data.encode import Encoder
    from corefit.prepare import Prepared

LOOKED_AT, LOOKED_AT_BYTES = 64, 2**18
"""Records of each source that are looked at, and about how many bytes, so that proofs take no time on any data."""
NOT, EITHER, MUST = range(3)
"""Whether a character or a token is to be supervised."""
_THOUGHT = re.compile(r"(\s*<think>\s*+)(?:(</think>\s*)|(.*?</think>\s*))", re.DOTALL)
TURN = (Message("user", "q 1"), Message("assistant", "a 1"), Message("user", "q 2"), Message("assistant", "a 2"))
CHATS = {"with a system message": (Message("system", "s 1"), *TURN), "without a system message": TURN}


class Proof(NamedTuple):
    """One thing that holds."""

    name: str
    """Its key under ``proofs`` in ``ledger.json``."""
    facts: dict[str, Any]
    line: str
    """What the start of a run says."""


def first_records(sources: Iterable[Source]) -> list[tuple[Source, Record | BadRecord]]:
    """Give the first records of each source."""
    found = []
    for source in sources:
        size = 0
        for record in islice(source.read(), LOOKED_AT):
            found.append((source, record))
            size += record.size
            if size > LOOKED_AT_BYTES:
                break
    return found


def data_proofs(
    plan: Prepared, items: Sequence[tuple[Item, str]], block: Block, drops: Sequence[str | None]
) -> Iterator[Proof]:
    """Prove what must hold of the samples that items became (see ``encode_items``), one proof after the other.

    Raises:
        MaskError: a sample is not what its messages say. DataError: too little is supervised.
    """
    pack = plan.recipe.pack
    fitted = fit(block, pack.max_length, pack.overlong)
    if fitted.error is not None:
        raise fitted.error
    wanted: dict[int, _Wanted] = {}
    for i, ((item, origin), drop) in enumerate(zip(items, drops, strict=True)):
        if drop in (None, "nothing_supervised"):
            with contextlib.suppress(Unrenderable):
                wanted[i] = want = _Wanted(item, origin, plan.encoder)
                if drop and (want.state[1:] == MUST).any():
                    raise want.error(f"left out as {drop}, but it has an answer to learn")
    mask = _mask(wanted, block, fitted)
    yield mask
    long = pack.max_length if pack.overlong == "drop" else np.inf  # left out, and counted, for its length
    looked_at = [(i, want) for i, want in wanted.items() if len(want.ids) <= long]
    kept = set(fitted.samples[:, RECORD].tolist())
    without = [want.origin for i, want in looked_at if i not in kept]
    most = pack.max_length if pack.overlong == "truncate" else np.inf  # what is cut off trains nothing
    total = sum(min(len(want.ids), most) for _, want in looked_at)
    share = mask.facts["supervised"] / max(total, 1)
    none = f"{len(without):,} of {len(looked_at):,} samples have no supervised token"
    floor = plan.recipe.template.min_supervised
    if total and share < floor:
        raise DataError(
            f"{f'{without[0]}: ' if without else ''}supervised: {share:.3%} of the first {total:,} tokens are, "
            f"template.min_supervised is {floor:.3%}; {none}{', beginning with this one' if without else ''}; "
            "`corefit inspect` shows them; --set template.min_supervised=0 starts anyway"
        )
    line = f"supervised: {share:.1%} of the first {total:,} tokens; {none}"
    if not total:
        reasons = ", ".join(f"{n} {drop}" for drop, n in Counter(drops).items() if drop)
        line = f"supervised: no sample among the first records ({reasons or 'no items'})"
    yield Proof("supervised", {"share": share, "samples": len(looked_at), "without": len(without)}, line)
    yield _chat_template(plan.encoder)


# ------------------------------------------------------------------------------------------------------------ the mask


class _Wanted:
    """What the sample of an item must be: ``ids`` int32 [L] and ``state`` [L], NOT, EITHER or MUST."""

    def __init__(self, item: Item, origin: str, encoder: Encoder) -> None:
        """Work it out; MaskError where the template lost a message or a stop, or the tokenizer text."""
        self.origin, self.encoder = origin, encoder
        self.segments = encoder.segments(item, origin)
        self.text = "".join(segment.text for segment in self.segments)
        self.located = True  # the messages were found in the text, so that ``state`` says something
        self.stripped = False  # the template leaves out white space around a message
        self.rewritten: set[str] = set()  # characters that the tokenizer itself doesn't write back
        self.stops: dict[int, str] = {}  # where each ends in the text
        if isinstance(item, Document):
            characters = self._of_document(item)
        else:
            characters = self._of_conversation(item)
        ids, state, at = list[int](), list[int](), 0
        for text, _, control, _ in self.segments:
            token = text.strip() if control and text.strip() else text  # without white space that it swallows
            here = set(characters[at + text.index(token) :][: len(token)].tolist())
            if {NOT, MUST} <= here:
                raise self.error(f"an answer and what is around it are one segment: {_short(text)}")
            part = self._control(text, token) if control else self._plain(text)
            for stop in (stop for place, stop in self.stops.items() if at < place <= at + len(text)):
                if part[-1:] != self._control(stop, stop):
                    raise self.error(f"an answer ends in {_short(text)}, which is not the token {stop!r}")
            ids += part
            state += [MUST if MUST in here else NOT if NOT in here else EITHER] * len(part)
            at += len(text)
        self.ids, self.state = np.array(ids, np.int32), np.array(state, np.int8)

    def error(self, words: str) -> MaskError:
        """Give the exception to raise."""
        return MaskError(f"{self.origin}: mask: {words}")

    def _of_document(self, item: Document) -> NDArray[np.int8]:
        """Give NOT for a document's BOS and MUST for its text and EOS, by character."""
        bos = (self.encoder.tokenizer.bos_token or "") if self.encoder.template.bos else ""
        if self.text != f"{bos}{item.text}{self.encoder.tokenizer.eos_token}":
            raise self.error(f"a document is not its text between BOS and EOS: {_short(self.text)}")
        return np.repeat(np.array([NOT, MUST], np.int8), [len(bos), len(self.text) - len(bos)])

    def _of_conversation(self, item: Conversation) -> NDArray[np.int8]:
        """Give what each character must be, from the messages alone, and note where the stop of each answer ends."""
        state = np.full(len(self.text), NOT, np.int8)
        answers = [i for i, message in enumerate(item.messages) if message.role == "assistant"]
        ruled = set(answers if self.encoder.supervise == "all" else answers[-1:])
        apart = [_apart(message) for message in item.messages]
        before, places = 0, self._places(item, apart)
        if places is None:
            self.located = False
            return state + EITHER
        for (i, begin, end), (_, after, _) in zip(places, [*places, (0, len(self.text), 0)][1:], strict=True):
            message, (opening, thought, _) = item.messages[i], apart[i]
            if message.role == "assistant" and (i in ruled if message.supervised is None else message.supervised):
                if message.reasoning or message.tool_calls or thought:  # the assistant's own, wherever it stands
                    state[before:begin] = EITHER
                if thought and self.text.endswith(opening + thought, before, begin):  # as the data has it
                    state[begin - len(thought) : begin] = MUST
                stop, closing = self._closing(self.text[end:after])
                if not stop:
                    raise self.error(f"no stop follows an answer: {_short(self.text[begin:after])}")
                stop_end = end + closing.index(stop) + len(stop)
                state[begin:end] = MUST
                state[end : end + len(closing)] = EITHER
                state[stop_end - len(stop) : stop_end] = MUST
                self.stops[stop_end] = stop
            before = end
        return state

    def _closing(self, literal: str) -> tuple[str, str]:
        """Give the first stop in what follows an answer, and the text up to it, with an EOS straight after it."""
        known = [(literal.index(stop), stop) for stop in self.encoder.stop if stop in literal]
        if not known and not self.encoder.template.stop:  # the tokenizer's own Jinja may end answers in several ways
            runs = [text.strip() for text, control in self.encoder.tokenizer.split_control(literal) if control]
            known = [(literal.index(run), run) for run in runs[:1]]
        at, stop = min(known, default=(0, ""))
        end, eos = at + len(stop), self.encoder.tokenizer.eos_token
        return stop, literal[: end + (len(eos) if eos and literal.startswith(eos, end) else 0)]

    def _places(self, item: Conversation, apart: Sequence[tuple[str, str, str]]) -> list[tuple[int, int, int]] | None:
        """Give where messages lie in the text, (number, begin, end); None: what is between them depends on them.

        What the template writes around messages is seen by rendering others in their place; an empty message that is
        no answer is left out, since templates may write nothing at all for it. ``apart``: ``_apart`` of each message.
        """
        text, at = self.text, 0
        for (role, *_), (_, _, content) in zip(item.messages, apart, strict=True):
            found = text.find(content.strip(), at)
            if found < 0:
                name = self.encoder.template.name
                raise self.error(
                    f"template {name!r} lost or changed a message: {role}'s {_short(content)} is not there"
                )
            at = found + len(content.strip())
        key = next(key for n in count() if (key := f"proof{n}x") not in text)
        chosen = [i for i, m in enumerate(item.messages) if m.content or m.role == "assistant"]
        marked = (
            m._replace(content=f"{opening}{thought}{key}{i}x") if i in chosen else m
            for i, (m, (opening, thought, _)) in enumerate(zip(item.messages, apart, strict=True))
        )
        try:
            segments = self.encoder.segments(item._replace(messages=tuple(marked)))
        except (CorefitError, Unrenderable):
            return None
        parts = re.split(rf"{key}(\d+)x", "".join(segment.text for segment in segments))
        if list(map(int, parts[1::2])) != chosen or not text.startswith(parts[0]):
            return None
        places, at = [], len(parts[0])
        for i, literal in zip(chosen, parts[2::2], strict=True):
            content = apart[i][2]
            forms = (content, content.strip(), content.lstrip(), content.rstrip())
            form = next((form for form in forms if text.startswith(form + literal, at)), None)
            if form is None:
                return None
            self.stripped = self.stripped or form != content
            places.append((i, at, at + len(form)))
            at += len(form) + len(literal)
        return places if at == len(text) else None

    def _control(self, *forms: str) -> list[int]:
        return [id for form in forms if (id := self.encoder.tokenizer.token_id(form)) is not None][:1]

    def _plain(self, text: str) -> list[int]:
        """Give the ids of text; note what the tokenizer itself doesn't write back, but a space at the start.

        Raises:
            MaskError: words are lost that the tokenizer does write back where they stand alone.
        """
        tokenizer = self.encoder.tokenizer
        ids = tokenizer.encode([text])[0] if text else []
        back = tokenizer.decode(ids)
        if text.removeprefix(" ") == back.removeprefix(" "):
            return ids

        def words(some: str) -> str:
            return "".join(unicodedata.normalize("NFKC", some.replace(tokenizer.unk_token or "\0", "")).split())

        alone = "".join(map(tokenizer.decode, tokenizer.encode(re.findall(r"\s*\S{1,64}|\s+$", text))))
        if words(alone) != words(back):
            expected, there = (_short(some[max(_first(text, back) - 20, 0) :]) for some in (text, back))
            raise self.error(f"text is lost in encoding: expected {expected}, there is {there}")
        written = {char: tokenizer.decode(tokenizer.encode([char])[0]).removeprefix(" ") for char in set(text)}
        self.rewritten |= {char for char, same in written.items() if same != char.removeprefix(" ")} or {" "}
        return ids

    def check_bos(self, ids: NDArray[np.int64]) -> None:
        """One BOS where the template says so, or writes it itself as a control token, else none."""
        tokenizer, (first, _, control, _) = self.encoder.tokenizer, self.segments[0]
        wanted = int(self.encoder.template.bos or (control and first.strip() == tokenizer.bos_token))
        found = next((i for i, id in enumerate(ids.tolist()) if id != tokenizer.bos_id), len(ids))
        if found != wanted:
            says = f"template {self.encoder.template.name!r} says {wanted}: {_shown(_tokens(ids, self.encoder), 0)}"
            raise self.error(f"begins with {found} BOS tokens, {says}")

    def given(self, block: Block, row: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Give the ids [L] of a sample as the model gets them, and which of them are targets, read from the labels."""
        n, one = int(block.samples[row, LENGTH]), np.ones(1, np.int64)
        samples, pad_id = block.samples[row : row + 1], self.encoder.tokenizer.pad_id
        made = gather(block.tokens, block.spans, samples, one, width=padded(n), pad_id=pad_id)
        ids, labels = made.input_ids[0, :n], made.labels[0]
        target = np.append(False, labels[: n - 1] != IGNORE_INDEX)
        if (labels[: n - 1] != ids[1:])[target[1:]].any() or (labels[n - 1 :] != IGNORE_INDEX).any():
            raise self.error("a label is not the token that follows")
        return ids, target

    def compare(
        self, sample: tuple[NDArray[Any], NDArray[np.bool_]], want: NDArray[Any], state: NDArray[Any], when: str = ""
    ) -> None:
        """Raise MaskError with the first token that is not what it must be; nothing can predict the one at 0."""
        ids, target = sample
        if not np.array_equal(ids, want):
            at = _first(ids.tolist(), want.tolist())
            expected, there = (_shown(_tokens(some, self.encoder), at) for some in (want, ids))
            raise self.error(f"{when}token {at} of {len(ids)}: expected {expected}, there is {there}")
        wrong = np.flatnonzero(((state == MUST) & ~target) | ((state == NOT) & target))
        if (wrong := wrong[wrong > 0]).size:
            at, tokens = int(wrong[0]), _tokens(ids, self.encoder)
            what = "is supervised and lies in no answer" if target[at] else "lies in an answer and is masked"
            raise self.error(f"{when}token {at}, {tokens[at]!r}, {what}: {_shown(tokens, at)}")


def _apart(message: Message) -> tuple[str, str, str]:
    """Give the tag that opens the thought with which an answer begins, the rest of that block, and what follows it.

    Templates may write the block otherwise, or leave it out of earlier turns. One that holds nothing is no part of an
    answer: all of it is in the first text.
    """
    found = _THOUGHT.match(message.content) if message.role == "assistant" and not message.reasoning else None
    if found is None:
        return "", "", message.content
    opening, empty, thought = found.groups(default="")
    return opening + empty, thought, message.content[found.end() :]


def _mask(wanted: dict[int, _Wanted], block: Block, fitted: Block) -> Proof:
    """Compare every sample with what it must be, before and after it was made to fit."""
    whole: dict[int, tuple[NDArray[np.int64], NDArray[np.bool_], int]] = {}
    for row, (start, number) in enumerate(block.samples[:, [START, RECORD]].tolist()):
        want = wanted[number]
        ids, target = want.given(block, row)
        want.check_bos(ids)
        want.compare((ids, target), want.ids, want.state)
        whole[number] = ids, target, start
    rows, supervised = fitted.samples[:, [START, LENGTH, RECORD]].tolist(), 0
    for row, (start, length, number) in enumerate(rows):
        want, (ids, target, first) = wanted[number], whole[number]
        begin, end = start - first, start - first + length
        follows = rows[row + 1][0] - first if [r[2] for r in rows[row + 1 : row + 2]] == [number] else len(ids)
        part, state = ids[begin:end].copy(), np.where(target[begin:end], MUST, NOT)
        anywhere = not any(segment.turn for segment in want.segments)  # as documents are split
        if end < follows and target[end - 1] and target[end] and not anywhere:  # an answer is cut here
            if target[end - 2]:  # it ends with its stop
                part[-1] = ids[end + int(np.argmin(np.append(target[end:], False))) - 1]
            else:  # nothing but the stop would be left
                state[-1] = NOT
        sample = want.given(fitted, row)
        want.compare(sample, part, state, "once made to fit, ")
        supervised += int(sample[1].sum())
    seen = [wanted[number] for number in whole]
    rewritten, unlocated = [want for want in seen if want.rewritten], [want for want in seen if not want.located]
    facts = {"samples": len(rows), "supervised": supervised, "rewritten": len(rewritten), "unlocated": len(unlocated)}
    if not seen:
        return Proof("mask", facts, "mask: no sample among the first records")
    encoder = seen[0].encoder
    line = (
        f"mask: {len(rows):,} samples of the first records are what their messages say, token for token; "
        f"only answers and their {' '.join(encoder.stop)} are supervised; "
        f"{'one BOS' if encoder.template.bos else 'no BOS added'}"
    )
    if stripped := [want for want in seen if want.stripped]:
        name = encoder.template.name
        line += f"; but template {name!r} leaves out white space around messages in {len(stripped)} of them"
        line += f" (first: {stripped[0].origin})"
    if rewritten:
        found = sorted(set[str]().union(*(want.rewritten for want in rewritten)))
        what = " ".join(map(repr, found[:8])) + (" ..." if len(found) > 8 else "")
        line += f"; the tokenizer itself rewrites {what} in {len(rewritten)} of them (first: {rewritten[0].origin})"
    if unlocated:
        line += f"; in {len(unlocated)} only the text could be checked, not the mask (first: {unlocated[0].origin})"
    return Proof("mask", facts, line)


# --------------------------------------------------------------------------------------------------- the chat template


def _chat_template(encoder: Encoder) -> Proof:
    """Compare the template with the Jinja that the tokenizer carries; a difference is shown, and the run goes on."""
    tokenizer, verdict, difference, why = encoder.tokenizer, "", "", ""
    if not tokenizer.chat_template:
        verdict, line = "none", "the tokenizer carries none"
    elif encoder.template.chat_template is None:
        verdict, line = "own", "the tokenizer's own"
    for words, messages in CHATS.items() if not verdict else ():
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            runs = [(segment.text, segment.control) for segment in encoder.segments(Conversation(messages))]
            theirs = _units(tokenizer.split_control(tokenizer.render_chat(chat)), encoder)
        except (CorefitError, Unrenderable) as error:
            why = why or " ".join(str(error.__cause__ or error).split())
            continue
        ours = _units(runs, encoder)
        if ours == theirs:
            verdict, line = "equal", "equal to the tokenizer's own"
            continue
        at, name = _first(ours, theirs), encoder.template.name
        here, there = (_shown(some, at) for some in (ours, theirs))
        difference = f"{words}, at token {at}, {name} writes {here}, the tokenizer's own {there}"
        verdict, line = "differs", f"{difference}; --template tokenizer trains in the tokenizer's own"
        break
    if not verdict:
        verdict, line = "failed", f"not compared, the tokenizer's own can't be rendered: {_short(why)}"
    return Proof("chat_template", {"verdict": verdict, "difference": difference}, f"chat template: {line}")


def _units(runs: Iterable[tuple[str, bool]], encoder: Encoder) -> list[str]:
    """Give tokens as text, what is between two control tokens encoded at once."""
    units: list[str] = []
    for control, group in groupby(runs, key=lambda run: run[1]):
        texts = [text for text, _ in group]
        plain = [] if control else encoder.tokenizer.encode(["".join(texts)])[0]
        units += [text.strip() for text in texts] if control else _tokens(plain, encoder)
    return units


# --------------------------------------------------------------------------------------------------------------- words


def _first(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Give the first index at which two sequences differ."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _tokens(ids: Iterable[int], encoder: Encoder) -> list[str]:
    return [encoder.tokenizer.token_bytes(int(id)).decode(errors="replace") for id in ids]


def _shown(tokens: Sequence[str], at: int) -> str:
    """Give the tokens around one of them, dots between them."""
    begin = max(at - 3, 0)
    dots = "·".join(islice(tokens, begin, at + 4))
    return repr(("…" if begin else "") + dots + ("…" if at + 4 < len(tokens) else ""))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]}…{text[-15:]}")
