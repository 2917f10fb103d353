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
from corefit.data.source import Source, encode_items, items_of
from corefit.errors import CorefitError, DataError, MaskError
from corefit.types import IGNORE_INDEX, BadRecord, Conversation, Document, Item, Message, Record, Unrenderable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from corefit.data.encode import Encoder
    from corefit.data.tokenizer import Tokenizer
    from corefit.prepare import Prepared

LOOKED_AT, LOOKED_AT_BYTES = 64, 2**18
"""Records of each source that are looked at, and about how many bytes, so that proofs take no time on any data."""
NOT, EITHER, MUST = range(3)
"""Whether a character or a token is to be supervised."""
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


def data_proofs(plan: Prepared, records: Sequence[tuple[Source, Record | BadRecord]]) -> Iterator[Proof]:
    """Prove what must hold of the samples that these records become, one proof after the other.

    Raises:
        MaskError: a sample is not what its messages say. DataError: too little is supervised; a map function failed.
    """
    items = items_of(records)
    block, drops = encode_items(items, plan.encoder)
    fitted = fit(block, plan.recipe.pack.max_length, plan.recipe.pack.overlong)
    if fitted.error is not None:
        raise fitted.error
    wanted = {}
    for i, ((item, origin), drop) in enumerate(zip(items, drops, strict=True)):
        if drop in (None, "nothing_supervised"):
            with contextlib.suppress(Unrenderable):
                wanted[i] = want = _expected(item, origin, plan.encoder)
                if drop and (want.state[1:] == MUST).any():
                    raise MaskError(f"{origin}: mask: left out as {drop}, but it has an answer to learn")
    mask = _mask(items, wanted, block, fitted, plan)
    yield mask
    yield _supervised(plan, items, wanted, drops, fitted, mask.facts["supervised"])
    yield _chat_template(plan.encoder)


# ------------------------------------------------------------------------------------------------------------ the mask


class _Expected(NamedTuple):
    """What the sample of an item must be."""

    ids: NDArray[np.int32]
    state: NDArray[np.int8]
    """[L]: NOT, EITHER or MUST."""
    bos: int
    """BOS tokens at its start."""
    turns: bool
    """It may be split between turns; else, as a document, anywhere."""
    located: bool
    """The messages were found in the text, so that ``state`` says something."""
    rewritten: set[str]
    """Characters that the tokenizer itself doesn't write back."""


def _mask(
    items: Sequence[tuple[Item, str]], wanted: dict[int, _Expected], block: Block, fitted: Block, plan: Prepared
) -> Proof:
    """Compare every sample with what it must be, before and after it was made to fit."""
    encoder, split = plan.encoder, plan.recipe.pack.overlong == "split"
    whole: dict[int, tuple[NDArray[np.int64], NDArray[np.bool_], int]] = {}
    for row, (start, number) in enumerate(block.samples[:, [START, RECORD]].tolist()):
        origin, want = items[number][1], wanted[number]
        ids, target = _given(block, row, origin, encoder)
        _check_bos(ids, want.bos, origin, encoder)
        _compare(ids, target, want.ids, want.state, origin, encoder)
        whole[number] = ids, target, start
    rows, supervised = fitted.samples[:, [START, LENGTH, RECORD]].tolist(), 0
    for row, (start, length, number) in enumerate(rows):
        ids, target, first = whole[number]
        begin, end = start - first, start - first + length
        follows = rows[row + 1][0] - first if [r[2] for r in rows[row + 1 : row + 2]] == [number] else len(ids)
        part, state = ids[begin:end].copy(), np.where(target[begin:end], MUST, NOT)
        anywhere = split and not wanted[number].turns
        if end < follows and target[end - 1] and target[end] and not anywhere:  # an answer is cut here
            if target[end - 2]:  # it ends with its stop
                part[-1] = ids[end + int(np.argmin(np.append(target[end:], False))) - 1]
            else:  # nothing but the stop would be left
                state[-1] = NOT
        origin = f"{items[number][1]}: once made to fit"
        ids, target = _given(fitted, row, origin, encoder)
        _compare(ids, target, part, state, origin, encoder)
        supervised += int(target.sum())
    rewritten, unlocated = (
        [items[number][1] for number in whole if condition(wanted[number])]
        for condition in (lambda want: want.rewritten, lambda want: not want.located)
    )
    line = (
        f"mask: {len(rows):,} samples of the first records are what their messages say, token for token; "
        f"only answers and their {' '.join(encoder.stop)} are supervised; "
        f"{'one BOS' if encoder.template.bos else 'no BOS added'}"
    )
    if rewritten:
        found = sorted(set().union(*(wanted[number].rewritten for number in whole)))
        what = " ".join(map(repr, found[:8])) + (" ..." if len(found) > 8 else "")
        line += f"; the tokenizer itself rewrites {what} in {len(rewritten)} of them (first: {rewritten[0]})"
    if unlocated:
        line += f"; in {len(unlocated)} only the text could be checked, not the mask (first: {unlocated[0]})"
    facts = {"samples": len(rows), "supervised": supervised, "rewritten": len(rewritten), "unlocated": len(unlocated)}
    return Proof("mask", facts, line if rows else "mask: no sample among the first records")


def _given(block: Block, row: int, origin: str, encoder: Encoder) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Give the ids [L] of a sample as the model gets them, and which of them are targets, read from the labels."""
    n, one = int(block.samples[row, LENGTH]), np.ones(1, np.int64)
    samples, pad_id = block.samples[row : row + 1], encoder.tokenizer.pad_id
    made = gather(block.tokens, block.spans, samples, one, width=padded(n), pad_id=pad_id)
    ids, labels = made.input_ids[0, :n], made.labels[0]
    target = np.append(False, labels[: n - 1] != IGNORE_INDEX)
    if (labels[: n - 1] != ids[1:])[target[1:]].any() or (labels[n - 1 :] != IGNORE_INDEX).any():
        raise MaskError(f"{origin}: mask: a label is not the token that follows")
    return ids, target


def _check_bos(ids: NDArray[np.int64], wanted: int, origin: str, encoder: Encoder) -> None:
    found = next((i for i, id in enumerate(ids.tolist()) if id != encoder.tokenizer.bos_id), len(ids))
    if found != wanted:
        start = _shown(_tokens(ids, encoder), 0)
        raise MaskError(
            f"{origin}: mask: begins with {found} BOS tokens, template {encoder.template.name!r} says {wanted}: {start}"
        )


def _compare(
    ids: NDArray[np.int64],
    target: NDArray[np.bool_],
    want: NDArray[Any],
    state: NDArray[Any],
    origin: str,
    encoder: Encoder,
) -> None:
    """Raise MaskError with the first token that is not what it must be; nothing can predict the one at 0."""
    n = min(len(ids), len(want))
    if len(ids) != len(want) or (ids != want).any():
        at = next((i for i in range(n) if ids[i] != want[i]), n)
        expected, there = (_shown(_tokens(some, encoder), at) for some in (want, ids))
        raise MaskError(f"{origin}: mask: token {at} of {len(ids)}: expected {expected}, there is {there}")
    wrong = np.flatnonzero(((state == MUST) & ~target) | ((state == NOT) & target))
    if (wrong := wrong[wrong > 0]).size:
        at, tokens = int(wrong[0]), _tokens(ids, encoder)
        what = "is supervised and lies in no answer" if target[at] else "lies in an answer and is masked"
        raise MaskError(f"{origin}: mask: token {at}, {tokens[at]!r}, {what}: {_shown(tokens, at)}")


def _expected(item: Item, origin: str, encoder: Encoder) -> _Expected:
    """Work out what the sample of an item must be.

    Raises:
        MaskError: the template lost a message, or a stop; the tokenizer lost text.
    """
    segments, tokenizer = encoder.segments(item, origin), encoder.tokenizer
    text = "".join(segment.text for segment in segments)
    stops: dict[int, str] = {}  # where each ends
    places = _places(item, text, encoder) if isinstance(item, Conversation) else None
    if isinstance(item, Document):
        characters = _of_document(item, text, origin, encoder)
    elif places is not None:
        characters = _of_conversation(item, text, places, stops, origin, encoder)
    else:
        characters = np.full(len(text), EITHER, np.int8)
        _check_order(item, text, origin, encoder)
    ids, state, rewritten, at = list[int](), list[int](), set[str](), 0
    for segment in segments:
        end, plain = at + len(segment.text), segment.text
        token = plain.strip() if segment.control and plain.strip() else plain  # without white space that it swallows
        here = set(characters[at + plain.index(token) :][: len(token)].tolist())
        if {NOT, MUST} <= here:
            raise MaskError(f"{origin}: mask: an answer and what is around it are one segment: {_short(plain)}")
        if segment.control:
            part = [id for form in (plain, token) if (id := tokenizer.token_id(form)) is not None][:1]
        else:
            part = tokenizer.encode([plain])[0] if plain else []
            rewritten |= _rewritten(plain, tokenizer.decode(part) if part else "", origin, tokenizer)
        for stop in (stop for place, stop in stops.items() if at < place <= end):
            if part[-1:] != [tokenizer.token_id(stop)]:
                raise MaskError(f"{origin}: mask: an answer ends in {_short(plain)}, which is not the token {stop!r}")
        ids += part
        state += [MUST if MUST in here else NOT if NOT in here else EITHER] * len(part)
        at = end
    located = places is not None or isinstance(item, Document)
    bos = encoder.template.bos or (segments[0].control and segments[0].text.strip() == tokenizer.bos_token)
    turns = any(segment.turn for segment in segments)
    return _Expected(np.array(ids, np.int32), np.array(state, np.int8), int(bos), turns, located, rewritten)


def _of_document(item: Document, text: str, origin: str, encoder: Encoder) -> NDArray[np.int8]:
    """Give NOT for a document's BOS and MUST for its text and EOS, by character."""
    bos = (encoder.tokenizer.bos_token or "") if encoder.template.bos else ""
    if text != f"{bos}{item.text}{encoder.tokenizer.eos_token}":
        raise MaskError(f"{origin}: mask: a document is not its text between BOS and EOS: {_short(text)}")
    return np.repeat(np.array([NOT, MUST], np.int8), [len(bos), len(text) - len(bos)])


def _of_conversation(
    item: Conversation,
    text: str,
    places: Sequence[tuple[int, int, int]],
    stops: dict[int, str],
    origin: str,
    encoder: Encoder,
) -> NDArray[np.int8]:
    """Give what each character must be, from the messages alone; fill in where the stop of each answer ends."""
    state = np.full(len(text), NOT, np.int8)
    answers = [i for i, message in enumerate(item.messages) if message.role == "assistant"]
    ruled = set(answers if encoder.supervise == "all" else answers[-1:])
    before = 0
    for (i, begin, end), (_, after, _) in zip(places, [*places, (0, len(text), 0)][1:], strict=True):
        message = item.messages[i]
        if message.role == "assistant" and (i in ruled if message.supervised is None else message.supervised):
            if message.reasoning or message.tool_calls:  # the assistant's own too, wherever the format writes them
                state[before:begin] = EITHER
            stop, closing = _closing(text[end:after], encoder)
            if not stop:
                raise MaskError(f"{origin}: mask: no stop follows an answer: {_short(text[begin:after])}")
            state[begin:end] = MUST
            state[end : end + len(closing)] = EITHER
            state[end + closing.index(stop) :][: len(stop)] = MUST
            stops[end + closing.index(stop) + len(stop)] = stop
        before = end
    return state


def _closing(literal: str, encoder: Encoder) -> tuple[str, str]:
    """Give the first stop in what follows an answer, and the text up to it, with an EOS straight after it."""
    known = [(literal.index(stop), stop) for stop in encoder.stop if stop in literal]
    if not known and not encoder.template.stop:  # the tokenizer's own Jinja may end answers in several ways
        runs = [text.strip() for text, control in encoder.tokenizer.split_control(literal) if control]
        known = [(literal.index(run), run) for run in runs[:1]]
    at, stop = min(known, default=(0, ""))
    end, eos = at + len(stop), encoder.tokenizer.eos_token
    return stop, literal[: end + (len(eos) if eos and literal.startswith(eos, end) else 0)]


def _places(item: Conversation, text: str, encoder: Encoder) -> list[tuple[int, int, int]] | None:
    """Give where messages lie in the text, (number, begin, end); None: what is between them depends on them.

    What the template writes around messages is seen by rendering others in their place; an empty message that is no
    answer is left out, since templates may write nothing at all for it.
    """
    key = next(key for n in count() if (key := f"proof{n}x") not in text)
    chosen = {i: m for i, m in enumerate(item.messages) if m.content or m.role == "assistant"}
    marked = (m._replace(content=f"{key}{i}x") if i in chosen else m for i, m in enumerate(item.messages))
    try:
        segments = encoder.segments(item._replace(messages=tuple(marked)))
    except (CorefitError, Unrenderable):
        return None
    parts = re.split(rf"{key}(\d+)x", "".join(segment.text for segment in segments))
    if list(map(int, parts[1::2])) != list(chosen) or not text.startswith(parts[0]):
        return None
    places, at = [], len(parts[0])
    for (i, message), literal in zip(chosen.items(), parts[2::2], strict=True):
        content = message.content
        for form in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(form + literal, at):
                break
        else:
            return None
        places.append((i, at, at + len(form)))
        at += len(form) + len(literal)
    return places if at == len(text) else None


def _check_order(item: Conversation, text: str, origin: str, encoder: Encoder) -> None:
    at = 0
    for message in item.messages:
        found = text.find(message.content.strip(), at)
        if found < 0:
            name = encoder.template.name
            lost = f"{message.role}'s {_short(message.content)}"
            raise MaskError(f"{origin}: mask: template {name!r} lost or changed a message: {lost} is not in the sample")
        at = found + len(message.content.strip())


def _rewritten(text: str, back: str, origin: str, tokenizer: Tokenizer) -> set[str]:
    """Give the characters that the tokenizer itself doesn't write back; a space at the start may come or go.

    Raises:
        MaskError: words are lost that the tokenizer does write back where they stand alone.
    """
    if text.removeprefix(" ") == back.removeprefix(" "):
        return set()

    def words(some: str) -> str:
        return "".join(unicodedata.normalize("NFKC", some.replace(tokenizer.unk_token or "\0", "")).split())

    alone = "".join(map(tokenizer.decode, tokenizer.encode(re.findall(r"\s*\S{1,64}|\s+$", text))))
    if words(alone) != words(back):
        at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
        expected, there = (_short(some[max(at - 20, 0) :]) for some in (text, back))
        raise MaskError(f"{origin}: mask: text is lost in encoding: expected {expected}, there is {there}")
    back_of = {char: tokenizer.decode(tokenizer.encode([char])[0]) for char in set(text)}
    return {char for char, back in back_of.items() if back.removeprefix(" ") != char.removeprefix(" ")} or {" "}


# -------------------------------------------------------------------------------------------------- how much, and how


def _supervised(
    plan: Prepared,
    items: Sequence[tuple[Item, str]],
    wanted: dict[int, _Expected],
    drops: Sequence[str | None],
    fitted: Block,
    supervised: int,
) -> Proof:
    """Give the share of supervised tokens among the encoded, and how many samples have none."""
    pack, floor = plan.recipe.pack, plan.recipe.template.min_supervised
    left_out = pack.max_length if pack.overlong == "drop" else np.inf  # that is counted elsewhere
    sizes = {i: len(want.ids) for i, want in wanted.items() if len(want.ids) <= left_out}
    kept = set(fitted.samples[:, RECORD].tolist())
    without = [items[i][1] for i in sizes if i not in kept]
    total = sum(sizes.values())
    share = supervised / max(total, 1)
    none = f"{len(without):,} of {len(sizes):,} samples have no supervised token"
    if total and share < floor:
        raise DataError(
            f"{f'{without[0]}: ' if without else ''}supervised: {share:.3%} of the first {total:,} tokens are, "
            f"template.min_supervised is {floor:.3%}; {none}{', beginning with this one' if without else ''}; "
            "`corefit inspect` shows them; --set template.min_supervised=0 starts anyway"
        )
    facts = {"share": round(share, 6), "samples": len(sizes), "without": len(without)}
    line = f"{share:.1%} of the first {total:,} tokens; {none}"
    if not total:
        reasons = ", ".join(f"{n} {drop}" for drop, n in Counter(drops).items() if drop)
        line = f"no sample among the first records ({reasons or 'no items'})"
    return Proof("supervised", facts, f"supervised: {line}")


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
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        name, (here, there) = encoder.template.name, (_shown(some, at) for some in (ours, theirs))
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


def _tokens(ids: Iterable[int], encoder: Encoder) -> list[str]:
    return [encoder.tokenizer.token_bytes(int(id)).decode(errors="replace") for id in ids]


def _shown(tokens: Sequence[str], at: int) -> str:
    """Give the tokens around one of them, dots between them."""
    begin = max(at - 3, 0)
    dots = "·".join(islice(tokens, begin, at + 4))
    return repr(("…" if begin else "") + dots + ("…" if at + 4 < len(tokens) else ""))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]}…{text[-15:]}")
