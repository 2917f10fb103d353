"""The names of fields -> a map function: for data in which every record is a question and its answer, or a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from corefit.errors import UserError
from corefit.types import Conversation, Document, Drop, Item, MapFunction, Message


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which field of a record says what; the keys of ``[data.fields]``.

    Texts stay as they are. A field that is missing, null or blank is left out, but the answer, the text and the first
    field of the question must be there, and neither question nor answer may be empty.
    """

    user: str | tuple[str, ...] = ()
    """The question; several fields are joined."""
    assistant: str = ""
    """The answer."""
    system: str = ""
    """The system text."""
    history: str = ""
    """Earlier turns: a list of [question, answer]."""
    text: str = ""
    """In place of all these: plain text to learn, without the white space around it."""
    join: str = "\n"
    """Stands between the fields of the question."""
    system_text: str = ""
    """The system text itself, where the record has none."""
    drop: tuple[str, ...] = ()
    """Answers that say there is none; their records are dropped."""

    def __post_init__(self) -> None:
        asked = self.question
        if bool(self.text) == bool(asked and self.assistant) or (self.text and (asked or self.assistant)):
            raise UserError("name user and assistant, or text alone")
        if self.history and self.names.count(self.history) > 1:
            raise UserError(f"history: {self.history!r} is named by another key too")

    @property
    def question(self) -> tuple[str, ...]:
        """The names of ``user``, one or several."""
        return tuple(filter(None, (self.user,) if isinstance(self.user, str) else self.user))

    @property
    def names(self) -> tuple[str, ...]:
        """All fields that are read."""
        return tuple(n for n in (*self.question, self.assistant, self.system, self.history, self.text) if n)

    def map_function(
        self, *, name: str, summary: str, sniff: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> MapFunction:
        """Give the map function that reads these fields."""
        return MapFunction(
            name=name,
            summary=summary,
            map=self._map,
            sniff=sniff,
            fields=self.names,
            system=self.system_text,
            example={field: f"some {field}" for field in self.names if field != self.history},
        )

    def _map(self, record: Mapping[str, Any], options: object = None) -> Iterator[Item | Drop]:
        values = {name: record.get(name) for name in self.names}
        required = (self.text,) if self.text else (self.question[0], self.assistant)
        texts = {n: "" if value is None else value for n, value in values.items() if n != self.history}
        if any(name not in record for name in required):
            yield Drop("missing_field")
        elif not all(isinstance(text, str) for text in texts.values()):
            yield Drop("not_text")
        elif self.text:
            text = texts[self.text].strip()
            yield Document(text) if text else Drop("empty_document")
        elif texts[self.assistant] in self.drop or not texts[self.assistant].strip():
            yield Drop("no_answer")
        elif not (question := self.join.join(texts[name] for name in self.question if texts[name].strip())):
            yield Drop("no_question")
        elif (turns := _turns(values.get(self.history) or [])) is None:
            yield Drop("malformed_history")
        else:
            system = texts.get(self.system) or self.system_text
            first = (Message("system", system),) if system else ()
            last = Message("user", question), Message("assistant", texts[self.assistant])
            yield Conversation((*first, *turns, *last))


def _turns(history: Any) -> list[Message] | None:  # noqa: ANN401, whatever the record holds
    """Give the messages of [[question, answer], ...], None where it is something else."""
    turns = []
    for turn in history if isinstance(history, list | tuple) else [None]:
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            return None
        turns += [Message("user", turn[0]), Message("assistant", turn[1])]
    return turns
