"""The values handed between stations, and the entries that plugins contribute.

Letters used for shapes: L tokens in a sample; T slots in a pack; B packs in a micro-batch; D documents.
Importing this module imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IGNORE_INDEX = -100
"""The label of a position that the loss does not count."""


# ---------------------------------------------------------------------------------------------- records and items


class Position(NamedTuple):
    """Where a record begins, so that a reader can go back to it."""

    file: int
    """Index into ``Sources.paths``."""
    line: int
    """1-based."""
    offset: int
    """Bytes from the start of the file."""


class FileState(NamedTuple):
    """What a file was when a run began."""

    size: int
    """Bytes; of a file that grows since then no more are read."""
    mtime_ns: int
    ends: bytes
    """A digest of its first and its last 4 KiB, which tells whether a file that is longer now only grew."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What a reader is asked to read: files, in order, the limit on one record, and what is wanted of it."""

    paths: tuple[Path, ...]
    max_record_bytes: int = 64 * 2**20
    fields: tuple[str, ...] | None = None
    """The only keys the records need; a reader may leave out all others. None: all."""
    states: tuple[FileState, ...] = ()
    """Of the files, when the run began; (): not known, all that is there is read."""


class Record(Mapping[str, Any]):
    """One JSON object as read, with its origin. Map functions read it and never change it."""

    __slots__ = ("_fields", "file", "line", "offset", "path", "size")

    def __init__(
        self, fields: Mapping[str, Any], *, path: str, line: int, offset: int, size: int = 0, file: int = 0
    ) -> None:
        """Wrap ``fields``; ``line`` is 1-based, ``offset`` and ``size`` are bytes, ``file`` indexes the sources."""
        self._fields = fields
        self.path, self.line, self.offset, self.size, self.file = path, line, offset, size, file

    @property
    def origin(self) -> str:
        """``path:line``, as editors jump to it."""
        return f"{self.path}:{self.line}"

    @property
    def position(self) -> Position:
        """Where to seek to read this record again."""
        return Position(self.file, self.line, self.offset)

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401, JSON values have any type
        return self._fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Record({self.origin}, {dict(self._fields)!r})"


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that can't be read: the reader yields it, the run decides whether to stop or to count and skip."""

    path: str
    line: int
    offset: int
    reason: str
    """What was found and what was expected, without the origin."""
    column: int | None = None
    """1-based, in characters; None where it isn't known."""
    size: int = 0
    file: int = 0

    def __str__(self) -> str:
        column = "" if self.column is None else f"{self.column}:"
        return f"{self.path}:{self.line}:{column} {self.reason}"


class Message(NamedTuple):
    """One utterance."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    content: str
    """Its text, written as it is."""
    name: str | None = None
    """Who speaks, or of which tool this is the result, where the data says so."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """What the assistant calls, as OpenAI's format has it: ``{"function": {"name": ..., "arguments": ...}}``."""
    reasoning: str | None = None
    """What the assistant thought before it answered, where the data has it."""
    supervised: bool | None = None
    """None: the template's rule. True or False: this message, whatever the rule says."""


class Conversation(NamedTuple):
    """Messages in order, at most one system message, first."""

    messages: tuple[Message, ...]
    """At least one."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The tools that the assistant may call, as OpenAI's format has them."""
    dropped: tuple[str, ...] = ()
    """A reason for every message that the map function left out (``trailing_user``); counted in the ledger."""
    notes: tuple[str, ...] = ()
    """A word for everything else it changed or noticed (``joined``, ``marker_in_text``); counted in the ledger."""


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text to learn as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class Drop:
    """A record, or a part of one, that is not used; counted under ``reason``."""

    reason: str
    """A few words in snake_case, the same for all drops of one kind."""


Item = Conversation | Document


# ------------------------------------------------------------------------------------------- segments, samples, batches


class Segment(NamedTuple):
    """A run of text that is encoded by one call, never merged with a neighbour or split."""

    text: str
    """Joined, the segments are the text that the model sees."""
    supervised: bool = False
    """True: every token of this segment is a target."""
    control: bool = False
    """True: the text is exactly one token of the tokenizer. False: the text never yields a control token."""
    turn: bool = False
    """True on the first segment of a turn: a conversation may be split before it."""


class Tokenizer(Protocol):
    """What a template may ask of the run's tokenizer."""

    @property
    def bos_token(self) -> str | None: ...  # noqa: D102
    @property
    def eos_token(self) -> str | None: ...  # noqa: D102
    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template that came with the tokenizer."""

    def token_id(self, token: str) -> int | None:
        """Give the id of exactly this token, None where the vocabulary lacks it."""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
    ) -> str:
        """Render messages with the tokenizer's own Jinja, or with ``chat_template``, as transformers does."""

    def split_control(self, text: str) -> list[tuple[str, bool]]:
        """Cut a template's own text at the tokenizer's control tokens: (run, is it one control token), none empty."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One encoded item."""

    input_ids: NDArray[np.int32]
    """int32 [L]"""
    spans: NDArray[np.int32]
    """int32 [n, 2]: half-open ranges of *target* tokens, ascending, disjoint; the last token of each is its stop."""
    origin: str
    """``path:line`` of the record."""
    cuts: NDArray[np.int32] | None = None
    """int32 [k]: offsets at which a conversation may be split (starts of turns); None: a document, anywhere."""

    @property
    def n_supervised(self) -> int:
        """Targets that some position predicts: all tokens in spans but one at offset 0, which nothing precedes."""
        return int(sum(int(end) - max(int(start), 1) for start, end in self.spans))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One micro-batch: B packs, cut to the longest of them, rounded up to 8 slots."""

    input_ids: NDArray[np.int64]
    """int64 [B, T']"""
    labels: NDArray[np.int64]
    """int64 [B, T'], next-token-aligned: ``labels[i] = input_ids[i+1]`` where i+1 is a target of the same document."""
    position_ids: NDArray[np.int64]
    """int64 [B, T'], from 0 in every document; the padding at the end of a pack is its last document."""
    cu_seqlens: NDArray[np.int32]
    """int32 [D+1]: bounds of the documents over the flattened B*T' slots."""
    n_supervised: int
    n_tokens: int = 0
    """Slots that are not padding."""
    n_samples: int = 0
    epoch: float = 0.0
    """Epochs done once this batch is consumed."""
    origins: Callable[[], tuple[str, ...]] = field(default=tuple, repr=False)
    """Gives ``path:line`` of every sample, in order."""
    state: Callable[[], Mapping[str, Any]] = field(default=dict, repr=False)
    """Gives the stream's state once this batch is consumed; JSON-able; holds ``ledger``."""


# ---------------------------------------------------------------------------------------------------- what a step says


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step, attempted: one line of ``metrics.jsonl``. Counts are of this step alone."""

    step: int
    """1-based; skipped steps count."""
    epoch: float
    """Epochs done once this step's data is consumed."""
    progress: float
    """Share of the run at the middle of this step, in (0, 1): where the scheduler was asked."""
    loss: float | None
    """Nats per supervised token; None where it is not finite, or nothing was supervised."""
    lr: float
    grad_norm: float | None
    """Before clipping, without the loss scale; None where it is not finite."""
    loss_scale: float
    """The scale that this step used; 1 without scaling."""
    skipped: bool
    """True: no weight and no optimizer state changed."""
    cause: str | None
    """Why it was skipped: ``nothing_supervised``, ``non_finite_gradients``; None: it was not. ``non_finite_loss`` ends
    the run: the step isn't counted, so it is in no line."""
    tokens: int
    """Slots that are not padding."""
    supervised_tokens: int
    samples: int
    packs: int
    fill: float
    """Used slots of all slots, in per cent."""
    tokens_per_s: float
    """Supervised tokens per second."""
    seconds: float
    """From asking for the step's data to the end of its update; hooks not included."""
    memory_bytes: int | None
    """Peak so far: allocated by torch on CUDA, else resident in the process; None where the system does not say."""


# ------------------------------------------------------------------------- what a run tells its reporters
# Fields hold what JSON can hold: a reporter lives in a process of its own.


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReport:
    """A run begins, or goes on from a checkpoint: the first event."""

    folder: str
    """Absolute path of the run folder; a reporter may keep files of its own there."""
    step: int
    """The step that a resumed run goes on from; 0: from the start."""
    endless: bool
    """True: no number of steps or epochs ends it."""
    recipe: Mapping[str, str]
    """Dotted key (``data.0.map``) -> value as TOML, for every key that is set."""
    facts: Mapping[str, Any]
    """What ``run.json`` holds but the command line: versions, plugins, model, data, device, proofs."""
    lengths: Sequence[int] = ()
    """Tokens of the samples that the first records become: at most 64 records of each source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PacksReport:
    """The first packs of a run, as the model saw them in step 1; before that step's report."""

    packs: Sequence[Mapping[str, Any]]
    """Each with ``slots``, ``used`` and ``documents``, at most a few: each with ``origin`` (``path:line``), ``tokens``
    (how many), ``pieces``, the text of its first tokens, [text, whether it is supervised], and ``cut``, whether there
    are more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """A validation: after ``step``, before step 1 where it is 0."""

    step: int
    loss: float
    """Nats per supervised token."""
    perplexity: float | None
    """None where it is larger than a float."""
    tokens: int
    """Supervised tokens it was taken over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReport:
    """An answer of the model as it is after ``step``, greedily decoded."""

    step: int
    prompt: str
    answer: str
    stopped: bool
    """True: it ended by itself; False: cut at ``sample.max_tokens``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReport:
    """A checkpoint was written, or could not be."""

    step: int
    path: str | None
    """Its folder; None where the disk refused, and the run goes on."""
    seconds: float
    size_bytes: int | None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndReport:
    """A run ends: the last event. A process that is killed sends none."""

    step: int
    """Steps made."""
    status: str
    """``complete``, ``interrupted`` (a signal; saved) or ``failed``."""
    reason: str
    """What ended it (``epochs``, ``max_steps``, ``patience``, a signal's name), or the error in one line."""
    ledger: Mapping[str, Any]
    """As ``ledger.json`` has it; empty where the run failed."""


Event = StartReport | PacksReport | StepReport | ValidationReport | SampleReport | CheckpointReport | EndReport
"""What a reporter is called with: a ``StartReport``, the others as they happen, an ``EndReport``."""


# ------------------------------------------------------------------------------------------------------ entries


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReader:
    """A way to get records out of files (or out of nothing)."""

    name: str
    summary: str
    read: Callable[..., Iterator[Record | BadRecord]]
    """``read(sources: Sources, options)``; a seekable reader also takes ``start: Position | None = None`` and then
    begins with exactly that record. Order depends on sources and options alone. Must not read ahead without bound."""
    streams: bool = True
    """False: one pass over the whole file comes first (the start of a run says so)."""
    seekable: bool = False
    """True: ``read`` takes ``start``. False: a shuffle holds all records in memory (the start of a run says so)."""
    index: Callable[..., NDArray[np.int64]] | None = None
    """``index(sources, options) -> int64 [N, 3]``: the Position of every record, in order, without parsing more than it
    must. None: made by one pass of ``read``."""
    fetch: Callable[..., list[Record | BadRecord]] | None = None
    """``fetch(sources, options, positions: Sequence[Position])``: the records at these positions, in this order, each
    as ``read`` from there would give it first. None: one ``read(start=...)`` each."""
    needs_path: bool = True
    """False: the reader makes its records itself, and ``data.path`` is not asked for."""
    suffixes: tuple[str, ...] = ()
    """Endings of file names (``.csv``) that are read with this reader where none is named."""
    bounded: bool = False
    """True: no file is read beyond its size in ``Sources.states`` (``read_jsonl`` and its siblings see to that), so
    rows may be added to it during a run. False: they end the run, as any other change does."""
    options: type | None = None
    """A frozen dataclass; its fields are the keys of ``data.options``."""
    example: bytes | Path | None = None
    """A small file in this format, its bytes or where it lies: what ``corefit check`` reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapFunction:
    """Record -> items."""

    name: str
    summary: str
    map: Callable[..., Iterable[Item | Drop]]
    """``map(record: Record, options)``: pure, total, never mutates; a record it can't use yields a ``Drop``."""
    sniff: Callable[[Record], bool] | None = None
    """Whether a record looks like this format; asked of the first records when no ``--plugin`` is given."""
    fields: tuple[str, ...] | None = None
    """The only keys of a record that ``map`` reads; None: any."""
    options: type | None = None
    system: str = ""
    """The system message that it puts before every conversation, where it puts one: ``corefit chat`` has it by name."""
    example: Mapping[str, Any] | None = field(default=None, hash=False)
    """A record of this format, which ``corefit check`` maps; nobody else's ``sniff`` may be True for it."""


class Unrenderable(Exception):
    """Raised by a template's ``render`` for an item that it can't place exactly; becomes a counted drop."""

    def __init__(self, reason: str) -> None:
        """``reason``: a few words in snake_case."""
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """How the frozen base weights are stored."""

    name: str
    summary: str
    config: Callable[[str], Any]
    """``config(compute_dtype)``: a transformers quantization config, or None; the argument is ``"float16"``,
    ``"bfloat16"`` or ``"float32"``."""
    after_load: Callable[[Any], None] | None = None
    """Called once with the loaded model, before adapters are attached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """How the learning rate moves."""

    name: str
    summary: str
    factor: Callable[[float, float], float]
    """``factor(progress, warmup)``: the share of the peak rate, in [0, 1]; progress in (0, 1), warm-up as a share of
    the run."""
    decays: bool = True
    """True: needs to know how long the run is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedRecipe:
    """What a configuration of another program says, in the recipe's words."""

    tables: Mapping[str, Any]
    """The recipe as ``tomllib`` would give it: ``{"train": {"lr": 2e-4}, "data": [{"map": "oasst1"}]}``. Keys that the
    configuration says nothing about are not in it. Relative paths are relative to the current folder."""
    lines: Mapping[str, str] = field(default_factory=dict)
    """Dotted key (``data.0.map``) -> ``path:line`` of what it was read from; errors about the value begin with it."""
    notes: tuple[str, ...] = ()
    """A line, ``path:line: words``, for everything that was not taken over as it is, with the reason."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Dotted key -> ``path:line: words`` for a value that is there and can't be known: an error, unless a flag or
    ``--set`` gives the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeReader:
    """Another program's configuration -> recipe, wherever a command takes a recipe."""

    name: str
    summary: str
    read: Callable[..., ImportedRecipe]
    """``read(path: Path, overrides: Sequence[str])``: ``overrides`` are ``key=value`` on the file's own keys, as
    ``--cfg-options`` gives them. Runs nothing that is in the file. Raises ``RecipeError`` for a file that asks for what
    corefit doesn't do."""
    suffixes: tuple[str, ...]
    """Of the files that it reads: ``(".py",)``."""
    habits: Mapping[str, str] = field(default_factory=dict)
    """Commands (``convert merge``) and flags (``train --deepspeed``) of the other program that corefit has not -> what
    to type instead, or why there is nothing, in one line."""
    options: type | None = None
    example: str | None = None
    """The text of a small configuration, which ``corefit check`` reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reporter:
    """Who is told what happens in a run."""

    name: str
    summary: str
    open: Callable[..., Callable[[Event], object]]
    """``open(options) -> tell``: called once a run; ``tell(event)`` then once an event, in order. Both run in a process
    of their own, in which nothing can disturb the run: an exception is said once and ends this reporter; events that it
    is too slow for are left out, counted and said. Its prints go to standard error."""
    options: type | None = None
    """A frozen dataclass; its fields are keys of ``run.options``."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Modules that ``open`` imports -> what ``pip install`` takes for it: a run that lacks one is refused at once."""
