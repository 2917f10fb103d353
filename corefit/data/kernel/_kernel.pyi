"""What the extension offers; the twins in Python say what each function does."""

from typing import Any

from typing_extensions import Buffer

def plan(lengths: Buffer, order: Buffer, offsets: Buffer, capacity: int, best: bool, open_packs: int, /) -> int: ...
def stream(
    lengths: Buffer,
    ends: Buffer,
    order: Buffer,
    offsets: Buffer,
    seen: Buffer,
    capacity: int,
    decreasing: bool,
    held: int,
    n_held: int,
    flush: bool,
    open_packs: int,
    /,
) -> int: ...
def gather(
    tokens: Buffer,
    spans: Buffer,
    samples: Buffer,
    sizes: Buffer,
    input_ids: Buffer,
    labels: Buffer | None,
    position_ids: Buffer | None,
    cu_seqlens: Buffer | None,
    width: int,
    pad_id: int,
    ignore_index: int,
    /,
) -> tuple[int, int]: ...
def join_ids(parts: list[Any], ids: Buffer, sizes: Buffer, /) -> int: ...
def extract(
    buffer: Buffer,
    at: int,
    end: int,
    names: tuple[bytes, ...],
    limit: int,
    offset: int,
    line: int,
    table: Buffer,
    rows: int,
    arena: Buffer,
    used: int,
    /,
) -> tuple[int, int, int, int]: ...
def index_lines(
    buffer: Buffer, size: int, number: int, line: int, offset: int, begin: int, blank: bool, table: Buffer, /
) -> tuple[int, int, int, bool]: ...
