"""The ledger's three equations, and that it survives JSON and copying."""

import json
import re

import pytest

from corefit.data.ledger import Ledger, Messages, Records, Slots, Tokens, count


def balanced():
    return Ledger(
        Records(read=10, used=4, dropped={"bad_record": 2, "overlong": 1}, validation=1, pending=2),
        Tokens(encoded=100, supervised=40, masked=20, truncated=5, dropped=15, validation=8, pending=12),
        Slots(total=80, supervised=40, masked=20, padding=20),
        Messages(total=9, dropped={"trailing_user": 1}, notes={"joined": 3}),
    )


def test_what_balances_passes():
    assert not balanced().differences()
    assert not Ledger().differences()


SIDES = [
    ("records", ["read", "used", "validation", "pending"]),
    ("tokens", ["encoded", "supervised", "masked", "truncated", "dropped", "validation", "pending"]),
    ("slots", ["total", "supervised", "masked", "padding"]),
]


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in SIDES for key in keys])
@pytest.mark.parametrize("by", [1, -1])
def test_one_unit_too_many_or_too_few_is_found(name, key, by):
    ledger = balanced()
    part = getattr(ledger, name)
    setattr(part, key, getattr(part, key) + by)
    (line,) = ledger.differences()
    assert re.fullmatch(rf"{name}: .*{key} {getattr(part, key)}\b.* does not hold", line)
    assert ledger.as_dict()["balanced"] is False


def test_a_dropped_record_counts_whatever_its_reason():
    ledger = balanced()
    count(ledger.records.dropped, "new_reason")
    (line,) = ledger.differences()
    assert line == "records: read 10 = used 4 + dropped 4 + validation 1 + pending 2 does not hold"


def test_a_negative_count_never_balances():
    ledger = Ledger(Records(used=1, pending=-1))
    assert "pending -1" in ledger.differences()[0]


def test_all_equations_that_fail_are_named():
    ledger = Ledger(Records(read=1), Tokens(encoded=2), Slots(total=3))
    assert [line.partition(":")[0] for line in ledger.differences()] == ["records", "tokens", "slots"]


def test_json_and_back():
    ledger = balanced()
    data = json.loads(json.dumps(ledger.as_dict()))
    assert list(data) == ["records", "tokens", "slots", "messages", "balanced"] and data["balanced"] is True
    assert data["records"]["dropped"] == {"bad_record": 2, "overlong": 1}
    back = Ledger.from_dict(data)
    assert back == ledger
    count(back.records.dropped, "overlong")
    assert data["records"]["dropped"]["overlong"] == 1


def test_a_copy_is_independent():
    ledger = balanced()
    copy = ledger.copy()
    assert copy == ledger
    count(copy.messages.notes, "joined")
    copy.slots.total += 1
    assert ledger == balanced()


def test_parts_add_up():
    ledger = balanced()
    ledger.add(balanced())
    assert ledger.records.dropped == {"bad_record": 4, "overlong": 2} and ledger.tokens.encoded == 200
    assert not ledger.differences()
