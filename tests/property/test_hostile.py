"""Hostile records through the whole data path: no crash, no hang, each is counted once, and the ledger balances."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import source
from hostile_records import LIMIT, flat, hostile
from samples import encode_each, fit_one

from corefit.data.encode import make_encoder
from corefit.data.jsonl import content_hash
from corefit.data.ledger import Ledger
from corefit.data.source import map_record
from corefit.data.stream import Stream, encode_validation, split_validation
from corefit.data.tokenizer import Tokenizer
from corefit.errors import DataError
from corefit.prepare import _sniff
from corefit.recipe import Data, Recipe
from corefit.registry import Registry
from corefit.samples import walk
from corefit.session import questions
from corefit.types import Conversation, Document, Drop, MapFunction, Message, Record, Sources

ANY = MapFunction(
    name="any",
    summary="reads whole records",
    map=lambda record, _: [Document(text) if isinstance(text := record.get("text"), str) else Drop("no_text")],
)
FORMATS = ["oasst1", "oasst1 threads", "identity", "any", "flat"]
TEMPLATES = ["internlm_chat", "chatml", "tokenizer"]


@contextmanager
def no_hang(seconds: int):
    """End what takes longer: a hang is a failure."""

    def late(*_):
        raise TimeoutError(f"took over {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_good(line: bytes) -> bool:
    """Say by the rules in ``jsonl`` and the standard library whether a line is a record."""

    def constant(word):
        raise ValueError(word)

    def walk(value, depth=1):
        if isinstance(value, str):
            value.encode()
        elif isinstance(value, dict | list):
            if depth > 500:
                raise ValueError("too deep")
            for inner in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
                walk(inner, depth + 1)

    if len(line) + 1 > LIMIT:
        return False
    try:
        value = json.loads(line.decode(), parse_constant=constant)
        walk(value)
    except (ValueError, RecursionError):  # of UTF-8, of JSON, of integers; lone surrogates can't be encoded
        return False
    return isinstance(value, dict)


def prepared(folder: Path, tokenizer: Path, format: str, template: str, lines: list[bytes]):
    """Give the source of a format with these lines, and an encoder."""
    registry = Registry.load()
    path = folder / "hostile.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    function = ANY if format == "any" else registry.map_function("identity" if format == "identity" else "oasst1")
    options = function.options(threads="all") if format == "oasst1 threads" else function.options and function.options()
    one = source(
        path,
        reader=registry.reader("oasst1" if format == "flat" else "jsonl"),
        map_function=function,
        map_options=options,
        shuffle=format != "oasst1 threads",
        on_bad="skip",
    )
    one = replace(one, sources=Sources((path,), LIMIT, function.fields))
    return one, make_encoder(registry.template(template), Tokenizer.load(tokenizer))


def lines_of(format: str, seed: int, n: int) -> list[bytes]:
    good = b'{"message_id": "first", "parent_id": null, "text": "q", "role": "prompter"}'
    first = good if format == "flat" else b'{"text": "### Human: q### Assistant: a"}'  # not a list, not gzip
    return [first, *hostile(seed, n, flat() if format == "flat" else None)]


def run(one, encoder, *, threads=0):
    """Give the ledger of a whole run with validation, and the hashes that were held out."""
    split = split_validation([one], share=0.2, records=50)
    stream = Stream([one], encoder, max_length=256, overlong="split", val_hashes=split.hashes, threads=threads)
    stream.estimate()
    last = None
    for step in stream.steps(8, 4):
        for batch in step:
            assert batch.n_supervised > 0
            last = batch.state
    ledger = Ledger.from_dict(last()["ledger"])
    assert not ledger.differences() and not ledger.records.pending
    validation = encode_validation(split.records, encoder, max_length=256, micro_batch=4, overlong="split")[1]
    whole = Ledger.from_dict(last()["ledger"])
    whole.add(validation)
    assert not whole.differences()
    return ledger, split.hashes


def one_by_one(one, encoder, hashes):
    """Count what becomes of every record, each mapped and encoded by itself."""
    counts = Counter()
    for record in one.read():
        if not isinstance(record, Record):
            counts["bad_record"] += 1
        elif content_hash(record) in hashes:
            counts["validation"] += 1
        else:
            items = map_record(one, record)
            reasons, used = [item.reason for item in items if isinstance(item, Drop)], False
            made = encode_each(encoder, [(item, record.origin) for item in items if not isinstance(item, Drop)])
            reasons += [result.drop for result in made if result.drop]
            for result in made:
                used |= bool(result.sample and fit_one(result.sample, 256, "split").samples)
            counts["used" if used else [*reasons, "nothing_supervised" if items else "no_items"][0]] += 1
    return counts


def counted(ledger) -> Counter:
    records = ledger.records
    return Counter({**records.dropped, "used": records.used, "validation": records.validation}) + Counter()


def check(folder: Path, tokenizer: Path, format: str, template: str, seed: int, n: int) -> Counter:
    """Send lines through everything; give how many records ended where."""
    lines = lines_of(format, seed, n)
    filled = [line for line in lines if line and not line.isspace()]
    one, encoder = prepared(folder, tokenizer, format, template, lines)
    ledger, hashes = run(one, encoder, threads=1)
    records = list(one.read())
    assert ledger.records.read == len(records) == sum(counted(ledger).values())
    assert sum(record.size for record in records) == sum(len(line) + 1 for line in filled)
    if format != "flat":  # there a record is a tree of messages
        assert len(records) == len(filled)
        bad = [line for line in filled if not is_good(line)]
        assert ledger.records.dropped["bad_record"] == len(bad) > n // 6
    assert counted(ledger) == one_by_one(one, encoder, hashes)
    assert ledger.records.used > n // 500 and ledger.records.validation
    return counted(ledger)


@pytest.mark.parametrize("format", FORMATS)
def test_every_hostile_record_is_counted_once(tmp_path, tiny_tokenizer, either, format):
    with no_hang(120):
        for k, template in enumerate(TEMPLATES):
            check(tmp_path, tiny_tokenizer, format, template, seed=k, n=200)


WHOLE = [(format, template) for format in ("oasst1", "identity") for template in TEMPLATES]
WHOLE += [("oasst1 threads", "chatml"), ("any", "internlm_chat"), ("flat", "internlm_chat")]


@pytest.mark.full
@pytest.mark.parametrize(("format", "template"), WHOLE)
def test_a_hundred_thousand_hostile_records_are_counted_once(tmp_path, tiny_tokenizer, either, format, template):
    """Each of the nine combinations takes its share of them."""
    began, seed = time.monotonic(), 100 + WHOLE.index((format, template))
    with no_hang(1800):
        counts = check(tmp_path, tiny_tokenizer, format, template, seed=seed, n=11_600)
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in counts.most_common())
    print(f"{format}, {template}: {counts.total():,} records in {time.monotonic() - began:.0f} s: {reasons}")


# ------------------------------------------------------------------------------------------------------------- one line


def check_line(error: Exception, begins: str, *parts: str) -> None:
    assert str(error).startswith(begins) and "\n" not in str(error) and len(str(error)) < 2000, str(error)
    assert all(part in str(error) for part in parts), str(error)


def test_the_first_bad_record_is_one_line_that_names_it(tmp_path, tiny_tokenizer, either):
    lines = [line for line in hostile(7, 600) if line and not line.isspace() and not is_good(line)]
    good = b'{"text": "### Human: q### Assistant: a"}'
    assert len(set(lines)) > 150
    one, encoder = prepared(tmp_path, tiny_tokenizer, "oasst1", "chatml", lines)
    (path,) = one.sources.paths
    for line in sorted(set(lines)):
        path.write_bytes(good + b"\n" + line + b"\n" + good)
        with pytest.raises(DataError) as caught:
            list(Stream([replace(one, on_bad="error", shuffle=False)], encoder, max_length=64).steps(1, 1))
        check_line(caught.value, f"{path}:2:", 'data.on_bad="skip" counts such records and goes on')


def test_the_first_bad_record_of_a_flat_file_is_one_line_that_names_it(tmp_path, tiny_tokenizer):
    said = {"message_id": "m\n\x1b[2J", "parent_id": None, "text": "q", "role": "prompter"}
    for bad in (said, {**said, "message_id": "other\n", "parent_id": "gone\x85"}, {**said, "parent_id": "m\n\x1b[2J"}):
        lines = [json.dumps(record).encode() for record in ({**said, "parent_id": bad["parent_id"]}, bad)]
        one, encoder = prepared(tmp_path, tiny_tokenizer, "flat", "chatml", lines)
        with pytest.raises(DataError) as caught:
            list(Stream([replace(one, on_bad="error")], encoder, max_length=64).steps(1, 1))
        check_line(caught.value, f"{one.sources.paths[0]}:")


def careless(record, _):
    said = [Message(message["role"], message["content"]) for message in record["messages"]]
    return [Conversation(tuple(said)), Drop(record["language"])]


CARELESS = MapFunction(name="careless", summary="", map=careless, sniff=lambda record: len(record["messages"][0]) > 1)


def test_what_a_map_function_of_others_makes_of_them_is_items_or_one_line_that_names_it(tmp_path, tiny_tokenizer):
    lines = lines_of("identity", 11, 1500)
    one, encoder = prepared(tmp_path, tiny_tokenizer, "any", "chatml", lines)
    one = replace(one, map_function=CARELESS)
    records = [record for record in one.read() if isinstance(record, Record)]
    failed = Counter()
    for record in records:
        try:
            items = map_record(one, record)
        except DataError as error:
            check_line(error, f"{record.origin}: map function 'careless' failed: ", "; keys of the record: ")
            failed[str(error).split("failed: ")[1].split(":")[0]] += 1
        else:
            encoder.encode([(item, record.origin) for item in items if not isinstance(item, Drop)])
    assert failed.keys() >= {"KeyError", "TypeError"} and len(records) - failed.total() > 40
    begins = f"{records[0].origin}: map function 'careless' failed: KeyError: 'messages'; keys of the record: text"
    plan = SimpleNamespace(sources=[one], encoder=encoder, recipe=Recipe())
    for use in (
        lambda: list(Stream([replace(one, shuffle=False)], encoder, max_length=64).steps(1, 1)),
        lambda: list(walk(plan)),
        lambda: questions([(one, record) for record in one.read()]),
    ):
        with pytest.raises(DataError) as caught:
            use()
        check_line(caught.value, begins)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (Conversation((Message("user", None),)), "gave a Conversation with a NoneType where text is expected"),
        (Conversation((Message(5, "x"),)), "gave a Conversation with a int where text is expected"),
        (Conversation(({"role": "user"},)), "AttributeError"),
        (Document(b"x"), "gave a Document with a bytes where text is expected"),
        (Drop(["x"]), "gave a Drop with a list where text is expected"),
        (("x", "y"), "gave a tuple, expected Conversation, Document or Drop"),
    ],
)
def test_items_that_hold_no_text_are_the_map_functions_mistake(tmp_path, tiny_tokenizer, item, words):
    one, _ = prepared(tmp_path, tiny_tokenizer, "any", "chatml", [b'{"text": "x"}'])
    one = replace(one, map_function=MapFunction(name="odd", summary="", map=lambda *_: [item]))
    with pytest.raises(DataError, match=f"hostile.jsonl:1: map function 'odd' failed: .*{words}"):
        map_record(one, next(one.read()))


def test_a_sniff_that_fails_harms_nobody_who_does_not_ask_for_it(tmp_path, tiny_tokenizer):
    one, _ = prepared(tmp_path, tiny_tokenizer, "any", "chatml", [b'{"text": "x"}', b"{broken"])
    registry = Registry.load()
    told = replace(ANY, sniff=lambda record: "text" in record)
    known = SimpleNamespace(reader=registry.reader, map_functions={"careless": CARELESS, "any": told})
    name, lines = _sniff(one.sources, one.reader, known, Data(on_bad="skip"))
    where = one.sources.paths[0]
    assert name == "any" and lines == [f"map function 'careless' failed at {where}:1: KeyError: 'messages'"]
    with pytest.raises(DataError, match="hostile.jsonl:2:2: broken JSON"):
        _sniff(one.sources, one.reader, known, Data())
