"""The ledger against a naive recount, to the token: any policy, any mixture, stopped anywhere, resumed at will.

What is read follows from the cursor of a batch's state, what has gone out from the batches; everything else is counted
anew here, record by record, without numpy and without the code under test.
"""

import json
import tempfile
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

from fakes import FORWARD, JSONL, NO_INDEX, FakeEncoder, source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corefit.data import kernel
from corefit.data.arena import Arena, write_arena
from corefit.data.jsonl import content_hash
from corefit.data.pack import ALGORITHMS
from corefit.data.source import permutation
from corefit.data.stream import Stream, encode_validation, split_validation
from corefit.errors import DataError

BROKEN = ("{broken", "12", '{"id": NaN}', "\udcff")
PART = st.one_of(
    st.integers(1, 40),
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.sampled_from(["why", "odd_one", "encoder: no_room"]),
)
ROW = st.one_of(st.lists(PART, max_size=4), st.lists(PART, max_size=4), st.sampled_from(BROKEN))
FILES = st.lists(st.lists(ROW, min_size=1, max_size=20), min_size=1, max_size=2)


class Case(NamedTuple):
    """A drawn run."""

    files: list  # of each source, of each of its files: rows
    changes: list  # of each source
    run: dict
    world: int
    packs_per_step: int
    micro_batch: int
    share: float
    arena: bool
    stops: list  # the run ends after so many batches (of several ranks: after the step), and is resumed
    at_once: int  # records that are taken at a time
    twin: bool  # the kernel's


@st.composite
def cases(draw):
    files = draw(st.lists(FILES, min_size=1, max_size=3))
    changes = [
        {
            "reader": draw(st.sampled_from([JSONL, JSONL, NO_INDEX, FORWARD])),
            "shuffle": draw(st.booleans()),
            "repeat": draw(st.integers(1, 2)),
            "ratio": draw(st.sampled_from([None, None, 1.0, 2.5])),
            "first": draw(st.sampled_from([None, None, 7])),
            "on_bad": draw(st.sampled_from(["skip"] * 9 + ["error"])),
        }
        for _ in files
    ]
    run = {
        "max_length": draw(st.sampled_from([8, 17, 32])),
        "algorithm": draw(st.sampled_from(ALGORITHMS)),
        "held": draw(st.sampled_from([1, 3, 10, 256])),
        "overlong": draw(st.sampled_from(["truncate", "truncate", "split", "split", "drop", "error"])),
        "seed": draw(st.integers(0, 3)),
        "epochs": draw(st.integers(0, 3)),
        "threads": draw(st.integers(0, 1)),
    }
    world, micro_batch = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    packs_per_step = micro_batch * world * draw(st.integers(1, 3))
    return Case(
        files, changes, run, world, packs_per_step, micro_batch,
        share=draw(st.sampled_from([0.0, 0.3])),
        arena=draw(st.sampled_from([False, False, True])),
        stops=draw(st.lists(st.integers(1, 9), max_size=3)),
        at_once=draw(st.integers(1, 9)),
        twin=draw(st.sampled_from([False, False, True])),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the recount


class Recount(NamedTuple):
    """What one record must become."""

    samples: list  # of (ids, labels), as tuples
    encoded: int
    truncated: int
    dropped: int
    drops: list
    messages: int
    trailing: int
    notes: list
    overlong: bool


def tokens_of(number, part):
    """Give ids, of each the number of the answer it belongs to (None: of none), and the starts of turns (or None)."""
    if isinstance(part, int):
        return [number, *range(2, part + 1)], [0] * part, None
    ids, owners, turns = [], [], []
    for i, size in enumerate(part):
        if i % 2 == 0:
            turns.append(len(ids))
        ids += range(len(ids) + 1, len(ids) + size + 1)
        owners += [i if i % 2 else None] * size
    return [number, *ids[1:]], owners, turns


def pieces_of(ids, owners, turns, most, policy):
    """Give (ids, owners, lost) of what a sample is cut into."""
    if len(ids) <= most:
        return [(ids, owners, 0)]
    if policy == "drop":
        return [([], [], len(ids))]
    bounds = [0]
    if turns is None:  # plain text
        bounds += range(most, len(ids), most)
    elif policy == "split":
        for start, end in zip(turns, [*turns[1:], len(ids)], strict=True):
            if end - bounds[-1] > most and start > bounds[-1]:
                bounds.append(start)
    made = []
    for start, end in zip(bounds, [*bounds[1:], len(ids)], strict=True):
        piece, of, lost = ids[start : min(end, start + most)], owners[start : min(end, start + most)], 0
        if end - start > most:
            lost, last = end - start - most, of[-1]
            if last is not None and owners[start + most] == last:  # an answer is cut: its stop stands in
                if of[-2:-1] == [last]:
                    piece = [*piece[:-1], ids[max(i for i, owner in enumerate(owners) if owner == last)]]
                else:
                    of = [*of[:-1], None]
        made.append((piece, of, lost))
    return made


def recount(row, run):
    """Do with one row what reading, mapping, encoding and fitting do."""
    if isinstance(row, str):
        return Recount([], 0, 0, 0, ["bad_record"], 0, 0, [], False)
    samples, encoded, truncated, dropped = [], 0, 0, 0
    drops, late, later, messages, trailing, notes, long = [], [], [], 0, 0, [], False
    for part in row["parts"]:
        if isinstance(part, str):
            if part.startswith("encoder: "):
                late.append(part.removeprefix("encoder: "))
                notes.append("look_alike")
            else:
                drops.append(part)
            continue
        if isinstance(part, list):
            messages += len(part) + row["trailing"]
            trailing += row["trailing"]
            notes.append("joined")
        ids, owners, turns = tokens_of(row["id"], part)
        if not any(owner is not None for owner in owners[1:]):
            late.append("nothing_supervised")
            continue
        encoded += len(ids)
        long = long or len(ids) > run["max_length"]
        kept = 0
        for piece, of, lost in pieces_of(ids, owners, turns, run["max_length"], run["overlong"]):
            if any(owner is not None for owner in of[1:]):
                labels = [-100 if owner is None else id for id, owner in zip(piece[1:], of[1:], strict=True)]
                samples.append((tuple(piece), (*labels, -100)))
                truncated, kept = truncated + lost, kept + 1
            else:
                dropped += len(piece) + lost
        if not kept:
            later.append("overlong" if run["overlong"] == "drop" else "nothing_supervised")
    return Recount(samples, encoded, truncated, dropped, drops + late + later, messages, trailing, notes, long)


def documents(batch):
    """Give (ids, labels) of every sample in a batch; padding is a document of zeros."""
    ids, labels = batch.input_ids.ravel().tolist(), batch.labels.ravel().tolist()
    bounds = batch.cu_seqlens.tolist()
    found = [(tuple(ids[a:b]), tuple(labels[a:b])) for a, b in zip(bounds, bounds[1:], strict=False)]
    return [one for one in found if any(one[0])]


def readings(case, counts, cursor):
    """Give how often each record (source, index) has been read where the stream is at ``cursor``."""
    epoch, _, places = cursor
    read = Counter()
    for number, (n, (passes, taken, *_)) in enumerate(zip(counts, places, strict=True)):
        change = case.changes[number]
        for i in range(n):
            read[number, i] += epoch * change["repeat"] + passes
        keys = case.run["seed"], number, epoch * change["repeat"] + passes
        order = permutation(n, *keys).tolist() if change["shuffle"] else range(n)
        read.update((number, i) for i in order[:taken])
    return +read


def check(case, known, hashes, state, gone, sizes):
    """Hold a state's ledger against the batches before it: ``gone`` samples, ``sizes`` of their batches."""
    ledger = json.loads(json.dumps(state["ledger"]))
    read = readings(case, [len(of) for of in known], state["cursor"])
    expected, total = Counter(), Counter()
    dropped, parts_dropped, notes = Counter(), Counter(), Counter()
    samples, fitting = Counter(), Counter()
    for (number, i), n in read.items():
        row, one = known[number][i]
        total["read"] += n
        if not isinstance(row, str) and content_hash(row) in hashes:
            total["validation"] += n
            continue
        for key, value in one._asdict().items():
            if isinstance(value, int):
                total[key] += n * value
        notes.update({word: n * count for word, count in Counter(one.notes).items()})
        if one.samples:
            total["with samples"] += n
            parts_dropped.update({word: n * count for word, count in Counter(one.drops).items()})
        else:
            dropped[(one.drops or ["no_items"])[0]] += n
        for ordinal, sample in enumerate(one.samples):
            expected[sample] += n
            fitting[number, i, ordinal] = sample
    waiting = Counter(fitting[s, i, k] for s, i, *_, ordinals in state["held"] for k in ordinals)
    assert gone + waiting == expected, "each sample is in a batch or waits, once for each time it was read"
    samples = sum(len(ids) * n for (ids, _), n in gone.items())
    targets = sum(sum(label != -100 for label in labels) * n for (_, labels), n in gone.items())
    held = len(state["held"])
    assert ledger["records"] == {
        "read": total["read"], "used": total["with samples"] - held, "dropped": dropped,
        "validation": total["validation"], "pending": held, "parts_dropped": parts_dropped,
    }  # fmt: skip
    assert ledger["tokens"] == {
        "encoded": total["encoded"], "supervised": targets, "masked": samples - targets,
        "truncated": total["truncated"], "dropped": total["dropped"], "validation": 0,
        "pending": sum(len(ids) * n for (ids, _), n in waiting.items()),
    }  # fmt: skip
    assert ledger["slots"] == {
        "total": sizes, "supervised": targets, "masked": samples - targets, "padding": sizes - samples
    }  # fmt: skip
    left_out = {"trailing_user": total["trailing"]} if total["trailing"] else {}
    assert ledger["messages"] == {"total": total["messages"], "dropped": left_out, "notes": notes}
    assert ledger["balanced"] is True


# ------------------------------------------------------------------------------------------------------------- the run


@contextmanager
def built(case):
    """Give what makes a stream of the case, what its records must become, and the hashes of the validation split."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("KNOWN_RECORDS", "GROUP_RECORDS"):
            stack.enter_context(patch(f"corefit.data.stream.{name}", case.at_once))
        stack.enter_context(patch("corefit.data.source.MIN_RECORDS_TO_SPLIT", 3))
        stack.enter_context(patch("corefit.data.rows.MIN_TOKENS", 64))  # what waits often moves to a new buffer
        if case.twin:
            stack.enter_context(patch.object(kernel, "compiled", None))
        sources, known = [], []
        for number, (files, change) in enumerate(zip(case.files, case.changes, strict=True)):
            paths, rows = [], []
            for k, file in enumerate(files):
                path = folder / f"{number}-{k}.jsonl"
                here = [
                    row if isinstance(row, str) else {"id": 1000 * number + i, "parts": row, "trailing": i % 2}
                    for i, row in enumerate(file, len(rows) + 1)
                ]
                text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in here)
                path.write_text(text, encoding="utf-8", errors="surrogateescape")
                paths.append(path)
                rows += here
            known.append([(row, recount(row, case.run)) for row in rows[: change["first"]]])
            sources.append(source(*paths, **change))
        split = split_validation(sources, share=case.share, records=4)
        arena, fatal = None, stops(case, known, split.hashes)
        if case.arena and not any(isinstance(known[number][i][0], str) for number, i in fatal):
            forward = Stream([replace(s, shuffle=False) for s in sources], FakeEncoder(), max_length=8)
            write_arena(folder / "arena", {}, lambda: forward.sizes, forward.encoded(), vocab_size=9**6)
            arena = Arena(folder / "arena", {})

        def make(rank):
            more = {**case.run, "val_hashes": split.hashes, "arena": arena, "world": case.world, "rank": rank}
            return Stream(sources, FakeEncoder(), **more)

        yield SimpleNamespace(make=make, known=known, split=split, fatal=fatal)


def stops(case, known, hashes):
    """Give the records that stop a run: source and index."""
    found = []
    for number, (rows, change) in enumerate(zip(known, case.changes, strict=True)):
        for i, (row, one) in enumerate(rows):
            if isinstance(row, str):
                found += [(number, i)] if change["on_bad"] == "error" else []
            elif one.overlong and case.run["overlong"] == "error" and content_hash(row) not in hashes:
                found.append((number, i))
    return found


def consumed(case, made, state):
    """Run from a state on; give batches and the state after them: one by one, or of several ranks those of a step.

    At the end gives what stopped the run: an error, or None.
    """
    streams = [made.make(rank) for rank in range(case.world)]
    for stream in streams if state is not None else ():
        stream.load_state_dict(json.loads(json.dumps(state)))
    runs = [stream.steps(case.packs_per_step, case.micro_batch) for stream in streams]
    while True:
        ranks, errors = [], []
        for run in runs:
            try:
                ranks.append(next(run, None))
            except DataError as error:
                errors.append(str(error))
        if None in ranks or errors:
            ends = errors or ranks
            assert ends == ends[:1] * case.world, "all ranks end together"
            yield errors[0] if errors else None
            return
        if case.world == 1:
            yield from (([batch], batch.state()) for batch in ranks[0])
        else:
            states = [json.dumps(batches[-1].state()) for batches in ranks if batches]
            assert len(set(states)) == 1
            yield [batch for batches in ranks for batch in batches], json.loads(states[0])


def origin(case, number, i):
    """Give the end of a record's path, and its line."""
    places = [(k, line) for k, file in enumerate(case.files[number]) for line in range(1, len(file) + 1)]
    return f"{number}-{places[i][0]}.jsonl:{places[i][1]}:"


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_the_ledger_is_a_naive_recount_to_the_token_wherever_a_run_stops_and_goes_on(case):
    with built(case) as made:
        hashes, stops_left = made.split.hashes, list(case.stops)
        gone, slots, since, state = Counter(), 0, 0, None
        run = consumed(case, made, None)
        for _ in range(80):
            part = next(run)
            if part is None or isinstance(part, str):
                break
            batches, state = part
            gone.update(sample for batch in batches for sample in documents(batch))
            slots += sum(batch.input_ids.size for batch in batches)
            check(case, made.known, hashes, state, gone, slots)
            since += 1
            if stops_left and since == stops_left[0]:
                run.close()
                run, since = consumed(case, made, state), 0
                stops_left.pop(0)
        else:
            return  # as a run with train.max_steps
        if part is None:
            assert case.run["epochs"] and state["cursor"][0] == case.run["epochs"] and not state["held"]
        elif "no sample in" in part:
            rows = [(row, one) for of in made.known for row, one in of]
            assert not gone and not [one for row, one in rows if one.samples and content_hash(row) not in hashes]
        else:
            assert any(origin(case, *place) in part for place in made.fatal)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_validation_holds_each_of_its_records_once_and_balances(case):
    with built(case) as made:
        fit = {"max_length": 32, "overlong": "truncate"}
        batches, ledger = encode_validation(made.split.records, FakeEncoder(), micro_batch=2, **fit)
        assert not ledger.differences()
        held_out = {content_hash(record): record for _, record in made.split.records}
        once = [recount(record, fit) for record in held_out.values()]
        assert len(held_out) == len(made.split.records) and held_out.keys() == made.split.hashes
        assert ledger.tokens.encoded == ledger.tokens.validation == sum(one.encoded for one in once)
        assert Counter(s for b in batches for s in documents(b)) == Counter(s for one in once for s in one.samples)
