"""The ledger: where every record, token and slot went, as of the last batch consumed.

Three equations hold after every batch, to the unit::

    records.read   = used + dropped + validation + pending
    tokens.encoded = supervised + masked + truncated + dropped + validation + pending
    slots.total    = supervised + masked + padding

A record is *read* when it is handed to the packer, or is found to have nothing for it; what the encoder holds beyond
that is not in the ledger yet. A record is *used* when the last of its samples has gone out in a batch, *dropped* when
it gave no sample at all, *validation* when it belongs to the validation split, and *pending* in between. A record
counts once each time it is read, so three epochs over 10 records read 30. Every side of an equation is counted on its
own; nothing is found by subtraction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

_Counts = TypeVar("_Counts", "Records", "Tokens", "Slots", "Messages", "Ledger")


@dataclass(slots=True)
class Records:
    """Records as read; ``dropped`` by reason."""

    read: int = 0
    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    validation: int = 0
    pending: int = 0
    parts_dropped: dict[str, int] = field(default_factory=dict)
    """Items left out of records that are used otherwise, by reason; in no equation."""


@dataclass(slots=True)
class Tokens:
    """Tokens of samples that the encoder made (an item that it dropped has none)."""

    encoded: int = 0
    supervised: int = 0
    """Targets that some position predicts."""
    masked: int = 0
    """Seen by the model, but no target."""
    truncated: int = 0
    """Cut off to fit ``pack.max_length``."""
    dropped: int = 0
    """Of samples dropped because they don't fit."""
    validation: int = 0
    """Of the validation split, encoded once."""
    pending: int = 0


@dataclass(slots=True)
class Slots:
    """Slots of the batches, padding included; a slot is supervised when it has a label."""

    total: int = 0
    supervised: int = 0
    masked: int = 0
    padding: int = 0


@dataclass(slots=True)
class Messages:
    """Messages of all conversations that map functions gave; in no equation."""

    total: int = 0
    """Those left out by the map function included."""
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)


def count(counts: dict[str, int], word: str, n: int = 1) -> None:
    """Add ``n`` under ``word``."""
    counts[word] = counts.get(word, 0) + n


def _add(into: _Counts, other: _Counts) -> None:
    for name in into.__slots__:
        value = getattr(other, name)
        if isinstance(value, dict):
            for word, n in value.items():
                count(getattr(into, name), word, n)
        elif isinstance(value, int):
            setattr(into, name, getattr(into, name) + value)
        else:
            _add(getattr(into, name), value)


@dataclass(slots=True)
class Ledger:
    """The counts of a stream, or of a part of one; parts add up."""

    records: Records = field(default_factory=Records)
    tokens: Tokens = field(default_factory=Tokens)
    slots: Slots = field(default_factory=Slots)
    messages: Messages = field(default_factory=Messages)

    def add(self, other: Ledger) -> None:
        """Add the counts of ``other`` to these."""
        _add(self, other)

    def differences(self) -> list[str]:
        """Give a sentence for every equation that does not hold, with its numbers."""
        equations = {
            "records": ("read", ("used", "dropped", "validation", "pending")),
            "tokens": ("encoded", ("supervised", "masked", "truncated", "dropped", "validation", "pending")),
            "slots": ("total", ("supervised", "masked", "padding")),
        }
        found = []
        for name, (left, right) in equations.items():
            counts = getattr(self, name)
            values = {
                key: sum(v.values()) if isinstance(v := getattr(counts, key), dict) else v for key in (left, *right)
            }
            if values[left] != sum(values[key] for key in right) or min(values.values()) < 0:
                terms = " + ".join(f"{key} {values[key]:,}" for key in right)
                found.append(f"{name}: {left} {values[left]:,} = {terms} does not hold")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Give JSON-able objects ``records``, ``tokens``, ``slots``, ``messages``, and ``balanced``."""
        return {**asdict(self), "balanced": not self.differences()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ledger:
        """Undo ``as_dict``."""
        ledger = cls(
            Records(**data["records"]), Tokens(**data["tokens"]), Slots(**data["slots"]), Messages(**data["messages"])
        )
        return ledger.copy()  # shares no dict with ``data``

    def copy(self) -> Ledger:
        """Give an independent copy."""
        copy = Ledger()
        copy.add(self)
        return copy
