"""What training changed, in numbers: loss and perplexity of held-out records, multiple choice, and exact answers."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from corefit import terminal
from corefit.chat import Chatter
from corefit.data.jsonl import read_jsonl
from corefit.data.source import map_record
from corefit.data.stream import Source, split_validation
from corefit.durable import read_json
from corefit.errors import DataError, IsolationError, UserError, system_words
from corefit.identity import differences, identity, words
from corefit.prepare import Prepared, make_validation, prepare, resolve
from corefit.recipe import run_and_step
from corefit.registry import Registry
from corefit.report import columns, perplexity, to_json
from corefit.show import labels
from corefit.terminal import Say
from corefit.types import BadRecord, Conversation, Message, Record, Sample, Sources

if TYPE_CHECKING:
    from corefit.engine.loss import CausalLoss

T = TypeVar("T")
LETTERS = "ABCDEFGHIJ"


class Choice(NamedTuple):
    """A row of multiple choice."""

    question: str
    options: Sequence[str]
    answer: int
    """The number of the right one."""
    subject: str


@dataclass(frozen=True, slots=True)
class Score:
    """Of one source, or of all multiple-choice rows of one subject."""

    what: str
    records: int
    tokens: int
    """Supervised tokens; for multiple choice 0."""
    tuned: float
    """Nats per supervised token; for multiple choice the share of right answers."""
    base: float | None = None
    """The same with the adapter off; None where there is no adapter."""


def evaluate(
    target: str,
    flags: Mapping[str, str],
    sets: Sequence[str] = (),
    *,
    choices: str | None = None,
    generate: int = 0,
    records: int = 1000,
    max_tokens: int = 256,
    model: str | None = None,
    out: str | None = None,
    say: Say = terminal.say,
) -> list[Score]:
    """Score a run, an adapter or a model, and print a table.

    Without ``data`` in ``flags`` a run is scored on what it validated on.

    Args:
        target: as for ``chat``: RUN, RUN@STEP, an adapter or a model.
        flags: ``data``, ``plugin`` and ``template``, as for ``train``.
        sets: ``"section.key=value"``.
        choices: a file of multiple-choice rows: ``question``, ``A`` to ``D`` or ``choices``, ``answer``, ``subject``.
        generate: answer the last question of so many records and compare with the record's own answer.
        records: most records of a source.
        max_tokens: the longest answer.
        model: the base, where it isn't where training found it.
        out: a file for scores and answers, one JSON object a line.
        say: takes lines.

    Raises:
        UserError: nothing to score on, a row that is not what it should be.
    """
    rows = [] if choices is None else _rows(Path(choices), records)
    if out is not None:
        new = not Path(out).exists()
        _write(out, "", "a")  # what the disk refuses it refuses before a model is loaded
        if new:
            Path(out).unlink()
    quantizer, template = flags.get("quantizer"), flags.get("template")
    chatter = Chatter(target, model=model, quantizer=quantizer, template=template, max_tokens=max_tokens, say=say)
    written: list[Mapping[str, Any]] = []
    scores: list[Score] = []
    if rows:
        scores += _multiple_choice(chatter, rows)
        say(_table("subject", "right", scores, "{:.1%}".format))
    if choices is None or "data" in flags or generate:
        with tempfile.TemporaryDirectory(prefix="corefit-") as aside:
            plan = _plan(chatter, target, flags, sets, Path(aside))
            if "data" not in flags and (changes := _changed(target, plan)):
                say(f"changed since training: {words(changes)}; some of these records may have been trained on")
            held_out = _held_out(plan, use_all="data" in flags, records=records, say=say)
        packed = _isolated(chatter, say)
        losses = [_loss(chatter, plan, source, rows, packed=packed) for source, rows in held_out]
        say(_table("source", "loss", losses, lambda nats: f"{nats:.4f} ({perplexity(nats):,.2f})"))
        scores += losses
        if generate:
            answers = list(_answers(chatter, islice((pair for _, rows in held_out for pair in rows), generate)))
            right = sum(answer["exact"] for answer in answers)
            say(f"answers: {right:,} of {len(answers):,} are the record's own, word for word")
            written += answers
    if out is not None:
        _write(out, "".join(f"{to_json(line)}\n" for line in (*scores, *written)))
    return scores


def _write(out: str, text: str, mode: str = "w") -> None:
    try:
        with open(out, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"--out {out}: can't be written: {system_words(error)}") from error


def _plan(chatter: Chatter, target: str, flags: Mapping[str, str], sets: Sequence[str], aside: Path) -> Prepared:
    """Prepare the run's recipe, or a new one, with the template that training used; ``aside``: to unpack new data."""
    run, _ = run_and_step(target)
    known = (Path(run) / "recipe.toml").is_file()
    if not known and "data" not in flags:
        raise UserError(f"{target}: no run, so --data must say what to score it on")
    given = {key: value for key, value in flags.items() if key in ("data", "plugin", "template")}
    if not known and "template" not in given:
        given["template"] = chatter.encoder.template.name
    registry = Registry.load()
    recipe, _, _ = resolve(run if known else None, given, sets, registry, need_model=False)
    spool_to, again = (aside, False) if "data" in flags else (Path(run) / "data", True)
    return prepare(recipe, registry, tokenizer=chatter.found.tokenizer_folder, spool_to=spool_to, again=again)


def _changed(target: str, plan: Prepared) -> list[tuple[str, str, str]]:
    """Give what the records to score on depend on and is not as training had it."""
    before = read_json(Path(run_and_step(target)[0]) / "run.json").get("identity", {})
    looked_at = ("file ", "map function ", "reader ", "template ")
    return [change for change in differences(before, identity(plan, "")) if before and change[0].startswith(looked_at)]


def _held_out(
    plan: Prepared, *, use_all: bool, records: int, say: Say
) -> list[tuple[Source, list[tuple[Source, Record | BadRecord]]]]:
    """Give the records to score on, by source."""
    val = plan.recipe.val
    if use_all or plan.val_sources:
        sources = plan.sources if use_all else plan.val_sources
        return [(one, [(one, record) for record in islice(one.read(), records)]) for one in sources]
    split = split_validation(plan.sources, share=val.share, records=min(val.records, records))
    if not split.records:
        reason = split.reason or f"val.share = {val.share:g}, val.records = {val.records}"
        raise UserError(f"the run had no validation ({reason}); --data says what to score it on")
    for one in plan.sources:
        if all(pair[0] is not one for pair in split.records):
            say(f"{_name(one)}: none of its records are among those that the run validated on")
    chosen = [one for one in plan.sources if any(pair[0] is one for pair in split.records)]
    return [(one, [pair for pair in split.records if pair[0] is one]) for one in chosen]


def _name(source: Source) -> str:
    return ", ".join(path.name for path in source.sources.paths) or source.reader.name


def _isolated(chatter: Chatter, say: Say) -> bool:
    """Whether documents of one pack don't see each other, as training demands; a line where they do."""
    from corefit.engine.attention import isolation_canary
    from corefit.engine.loop import autocast

    how = partial(autocast, chatter.device, chatter.precision.compute_dtype)
    size = chatter.model.get_input_embeddings().weight.shape[0]
    try:
        isolation_canary(chatter.model, vocab_size=size, device=chatter.device, autocast=how)
    except IsolationError:
        say("loss: sample by sample, since this model mixes documents of one pack; it can't be trained on packs")
        return False
    return True


def _loss(
    chatter: Chatter, plan: Prepared, source: Source, rows: list[tuple[Source, Record | BadRecord]], *, packed: bool
) -> Score:
    from corefit.engine.evaluate import validation_loss

    batches, _ = make_validation(plan, rows, micro_batch=1, packed=packed)
    what = _name(source)
    if not any(batch.n_supervised for batch in batches):
        raise DataError(f"{what}: no sample with a supervised token in {len(rows):,} records; corefit inspect says why")
    context: dict[str, Any] = dict(device=chatter.device, compute_dtype=chatter.precision.compute_dtype)
    sides = _on_and_off(chatter, lambda loss_fn: validation_loss(loss_fn, batches, **context))
    return Score(what, len(rows), sides[0][1], *(nats for nats, _ in sides))


def _multiple_choice(chatter: Chatter, rows: Sequence[Choice]) -> list[Score]:
    """Choose, for every row, the letter that the model thinks likeliest; count by subject."""
    sides = _on_and_off(chatter, lambda loss_fn: [_likeliest(chatter, loss_fn, row) == row.answer for row in rows])
    scores = []
    for what in sorted({row.subject for row in rows}):
        at = [i for i, row in enumerate(rows) if row.subject == what]
        scores.append(Score(what, len(at), 0, *(sum(side[i] for i in at) / len(at) for side in sides)))
    return scores


def _on_and_off(chatter: Chatter, measure: Callable[[CausalLoss], T]) -> list[T]:
    """Give what is measured with the adapter on, and with it off where there is one."""
    from corefit.engine.loss import CausalLoss

    found = [measure(CausalLoss(chatter.model))]
    if chatter.found.adapter is not None:
        with chatter.model.disable_adapter():
            found.append(measure(CausalLoss(chatter.model)))  # one of its own: a head may have an adapter
    return found


def _rows(path: Path, most: int) -> list[Choice]:
    """Read the first multiple-choice rows of a file."""
    rows = []
    for record in islice(read_jsonl(Sources((path,), 2**26)), most):
        if isinstance(record, BadRecord):
            raise DataError(str(record))
        rows.append(_row(record, path.name))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _row(record: Record, name: str) -> Choice:
    options = record.get("choices") or [record[letter] for letter in LETTERS if letter in record]
    answer = record.get("answer")
    if isinstance(answer, str) and len(answer.strip()) == 1:
        answer = LETTERS.find(answer.strip().upper())
    good = isinstance(options, list) and all(isinstance(option, str) for option in options) and len(options) > 1
    if not good or len(options) > len(LETTERS) or not isinstance(record.get("question"), str):
        keys = ", ".join(sorted(record))
        raise DataError(
            f"{record.origin}: expected question, A, B, ... (or choices, a list) and answer; there are {keys}"
        )
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
        raise DataError(
            f"{record.origin}: answer is {record.get('answer')!r}, expected a letter or a number below {len(options)}"
        )
    return Choice(str(record["question"]), options, answer, str(record.get("subject", name)))


def _likeliest(chatter: Chatter, loss_fn: CausalLoss, row: Choice) -> int:
    """Give the number of the answer, one letter and its stop, whose tokens have the least loss."""
    import torch

    from corefit.engine.loop import autocast
    from corefit.engine.model import evaluating

    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, row.options, strict=False))
    asked = Message("user", f"{row.question}\n{lines}\nAnswer with the letter of the right choice.")
    losses = []
    for letter in LETTERS[: len(row.options)]:
        encoded = chatter.encoder.encode([(Conversation((asked, Message("assistant", letter))), "")])
        ids = torch.from_numpy(encoded.tokens).long()[None].to(chatter.device)
        answer = labels(Sample(encoded.tokens, encoded.spans.astype("int32"), ""))
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        with evaluating(loss_fn), autocast(chatter.device, chatter.precision.compute_dtype):
            losses.append(float(loss_fn(ids, positions, torch.tensor([answer], device=ids.device))))
    return losses.index(min(losses))


def _answers(chatter: Chatter, rows: Iterator[tuple[Source, Record | BadRecord]]) -> Iterator[dict[str, Any]]:
    """Answer the last question of every record."""
    for source, record in rows:
        if not isinstance(record, Record):
            continue
        items = [item for item in map_record(source, record) if isinstance(item, Conversation) and item.messages]
        for item in items[:1]:
            *asked, last = item.messages
            if last.role != "assistant" or not asked:
                continue
            with contextlib.suppress(UserError):
                prompt = [{"role": message.role, "content": message.content} for message in asked]
                answer = "".join(chatter.answer(prompt)).strip()
                exact = answer == last.content.strip()
                yield {"origin": record.origin, "answer": answer, "expected": last.content, "exact": exact}


def _table(first: str, what: str, scores: Sequence[Score], words: Callable[[float], str]) -> str:
    """Give a table: a line a score, base and tuned beside each other where there is a base."""
    tuned = f"tuned {what}" if any(score.base is not None for score in scores) else what
    rows = [(first, "records", f"base {what}", tuned, "difference")]
    for score in scores:
        pair = ("", "") if score.base is None else (words(score.base), f"{score.tuned - score.base:+.4f}")
        rows.append((score.what, f"{score.records:,}", pair[0], words(score.tuned), pair[1]))
    keep = [k for k in range(5) if any(row[k] for row in rows[1:])]
    return "\n".join(columns([[row[k] for k in keep] for row in rows]))
