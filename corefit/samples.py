"""Samples without a run: ``corefit inspect`` shows them as the model will see them, ``corefit pack`` stores them."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from corefit import show, terminal
from corefit.data.arena import Arena, write_arena
from corefit.data.block import LENGTH, RECORD, Block, fit, gains
from corefit.data.files import is_packed
from corefit.data.ledger import Ledger
from corefit.data.source import At, Input, encode_items, encode_records, items_of, record_row, refused
from corefit.data.stream import Source, Stream
from corefit.errors import UserError
from corefit.identity import arena_key
from corefit.prepare import Prepared, encoding_threads, make_stream, prepare, resolve
from corefit.registry import Registry
from corefit.types import BadRecord, Record, Sample

INSPECTED = 10_000
"""Samples that ``corefit inspect`` looks at for its histogram."""


def inspect(
    recipe: str | os.PathLike[str] | None = None,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    model: str | None = None,
    data: str | None = None,
    plugin: str | None = None,
    template: str | None = None,
    seed: int | None = None,
    sets: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield every sample as the model will see it, in data order: origin, messages, input_ids, labels, text.

    Labels are next-token-aligned, -100 where the loss does not count. No model is loaded. Arguments as for ``train``.
    """
    given = dict(model=model, data=data, plugin=plugin, template=template, seed=seed)
    flags = {name: str(value) for name, value in given.items() if value is not None}
    plan = _plan(None if recipe is None else str(recipe), flags, sets, None if tokenizer is None else str(tokenizer))
    yield from walk(plan)


def inspect_from(
    recipe_name: str | None,
    flags: Mapping[str, str],
    sets: Sequence[str],
    *,
    tokenizer: str | None = None,
    samples: int = 3,
    as_json: bool = False,
) -> None:
    """Print what ``corefit inspect`` shows."""
    plan = _plan(recipe_name, flags, sets, tokenizer)
    if as_json:
        for found in walk(plan):
            terminal.write(json.dumps(found, ensure_ascii=sys.stdout.isatty()))
        return
    for line in plan.choices:
        terminal.say(line)
    chosen, lengths, generator = list[tuple[str, Sample]](), list[int](), random.Random(plan.recipe.train.seed)
    reasons, error, seen = show.Reasons(), None, 0
    for source, records, block in look(plan):
        reasons.add(records, block)
        bad = (r for r in records[: len(block.records)] if isinstance(r, BadRecord) and source.on_bad == "error")
        error = error or next(map(refused, bad), block.error)
        for row, number in enumerate(block.samples[:, RECORD].tolist()):
            record, slot = records[number], generator.randrange(len(lengths) + 1)
            lengths.append(int(block.samples[row, LENGTH]))
            slot = len(chosen) if len(chosen) < samples else slot  # a reservoir
            if slot < samples and isinstance(record, Record):
                chosen[slot : slot + 1] = [(record.origin, block.sample(row, record.origin))]
        seen += len(records)
        if len(lengths) >= INSPECTED:
            break
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for origin, sample in chosen:
        sizes = f"{len(sample.input_ids):,} tokens, {sample.n_supervised:,} supervised"
        terminal.say(f"\n--- {origin}, {sizes}")
        terminal.write(show.marked(sample, plan.tokenizer, colour=colour))
    terminal.say(f"\nlengths in tokens ({len(lengths):,} samples of {seen:,} records):")
    terminal.say("\n".join(show.histogram(lengths)))
    if lines := reasons.lines():
        terminal.say("\nleft out or noticed, and where first:")
        terminal.say("\n".join(lines))
    if error is not None:
        raise error
    fill, ledger = tally(plan, INSPECTED)
    terminal.say(f"\nfill: {fill:.1f} % of {plan.recipe.pack.max_length} slots a pack")
    terminal.say("ledger:")
    terminal.say("\n".join(show.ledger_lines(ledger)))


def pack_from(
    recipe_name: str | None,
    flags: Mapping[str, str],
    sets: Sequence[str],
    *,
    out: str,
    tokenizer: str | None = None,
) -> None:
    """Encode the data of a recipe into the arena ``out``, unless that is there and still good.

    Raises:
        DataError: a bad record, or a map function that failed. RunError: the disk refuses.
    """
    plan = _plan(recipe_name, flags, sets, tokenizer)
    folder, key = Path(out), arena_key(plan)
    for line in plan.choices:
        terminal.say(line)
    try:
        Arena(folder, key).verify()
    except UserError:
        pass
    else:
        terminal.say(f"{folder} is there and was made from just this: nothing to do")
        return
    began = time.monotonic()
    sources = tuple(dataclasses.replace(source, shuffle=False) for source in plan.sources)
    threads, length = encoding_threads(plan.recipe), plan.recipe.pack.max_length
    stream = Stream(sources, plan.encoder, max_length=length, threads=threads)
    encoded = _counted(stream.encoded())
    block = write_arena(folder, key, lambda: stream.sizes, encoded, vocab_size=plan.tokenizer.vocab_size)
    seconds = time.monotonic() - began
    dropped = gains(block, len(block.records)).records.dropped
    reasons = "".join(f", {n:,} dropped ({reason})" for reason, n in sorted(dropped.items()))
    size, n = sum(path.stat().st_size for path in folder.iterdir()), len(block.tokens)
    terminal.say(f"{len(block.records):,} records -> {len(block.samples):,} samples{reasons}")
    terminal.say(f"{n:,} tokens in {seconds:.1f} s ({n / max(seconds, 1e-9):,.0f} a second)")
    terminal.say(f"arena: {folder}, {size / 2**20:,.1f} MiB; train from it: --set pack.arena={folder}")


def _plan(recipe_name: str | None, flags: Mapping[str, str], sets: Sequence[str], tokenizer: str | None) -> Prepared:
    """Prepare without a model: a tokenizer is enough."""
    registry = Registry.load()
    recipe, _, lines = resolve(recipe_name, flags, sets, registry, need_model=tokenizer is None)
    for line in lines[1:]:
        terminal.notice(line)
    base = Path(tokenizer) if tokenizer else Path(str(recipe.model.base))
    if not base.exists():
        from corefit.engine.model import resolve_base

        base = resolve_base(str(base))
    return prepare(recipe, registry, tokenizer=base, spool_to=None)


def _counted(blocks: Iterator[Block]) -> Iterator[Block]:
    """Show on standard error how far the encoding is."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(unit=" records", disable=None, leave=False) as bar:
        for block in blocks:
            yield block
            bar.update(len(block.records))


def walk(plan: Prepared) -> Iterator[dict[str, Any]]:
    """Yield every training sample as ``inspect`` does; a split conversation yields each of its parts.

    Raises:
        DataError: a bad record where ``on_bad`` is ``"error"``; a map function that failed.
    """
    for source in plan.sources:
        records = source.read()
        while group := list(islice(records, 64)):
            for record in group:
                if isinstance(record, BadRecord) and source.on_bad == "error":
                    raise refused(record)
            items = items_of(((source, record) for record in group), plan.encoder.supervise)
            block, _ = encode_items(items, plan.encoder)
            block = fit(block, plan.recipe.pack.max_length, plan.recipe.pack.overlong)
            for i, number in enumerate(block.samples[:, RECORD].tolist()):
                item, origin = items[number]
                sample = block.sample(i, origin)
                yield show.as_json(item, sample, plan.tokenizer.decode(sample.input_ids))
            if block.error is not None:
                raise block.error


def look(plan: Prepared) -> Iterator[tuple[Source, list[Record | BadRecord], Block]]:
    """Yield records and what becomes of them, in the order of the first epoch; what is wrong with them ends nothing.

    A block with an error has fewer records than the list: those before the one that would end the run.
    """
    for number, source in enumerate(plan.sources):
        anyhow = dataclasses.replace(source, on_bad="skip")
        if any(is_packed(path) for path in source.sources.paths):
            anyhow = dataclasses.replace(anyhow, shuffle=False)  # a run unpacks such files first
        records = (record for _, record in Input(number, anyhow, plan.recipe.train.seed, []).read(0, At()))
        while group := list(islice(records, 64)):
            rows = [record_row(0, i, record, 0, i) for i, record in enumerate(group)]
            block = encode_records([anyhow], group, rows, plan.encoder, names=[record.path for record in group])
            yield source, group, fit(block, plan.recipe.pack.max_length, plan.recipe.pack.overlong)


def tally(plan: Prepared, samples: int) -> tuple[float, dict[str, Any]]:
    """Pack one epoch, or its first ``samples`` samples; give the fill in per cent and the ledger."""
    used = slots = seen = 0
    state: Callable[[], Mapping[str, Any]] | None = None
    for (batch,) in make_stream(plan, epochs=1, shuffle=False).steps(1, 1):
        used, slots, seen = used + batch.n_tokens, slots + plan.recipe.pack.max_length, seen + batch.n_samples
        state = batch.state
        if seen >= samples:
            break
    return 100 * used / max(slots, 1), dict(state()["ledger"]) if state else Ledger().as_dict()
