"""What a disk may hold after the power failed, from the trace of a run: a model of what fsync promises and no more.

Writes and truncations of a file are sure to be on the disk after an fsync of that file, new and changed names in a
folder after an fsync of that folder. Until then each of them may be there or not, whatever came later: an order that a
file system happens to keep is not relied on. Of a write that is not sure all may be there, nothing, a part, or its
length with zeros.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runs import Call

Folder = dict[str, int]
"""Name -> the number of a file or folder."""


@dataclass(slots=True)
class Event:
    """One change of one file or folder."""

    k: int
    what: str
    """write, truncate; add, remove, rename."""
    owner: int
    """The file, or the folder whose names change."""
    name: str = ""
    to: str | int = 0
    """A new name; the number of what has the name; a new size; an offset."""
    data: bytes = b""
    sure: float = float("inf")
    """The call after which it is on the disk."""


@dataclass
class Disk:
    """The events of a run and what was there before it, all of it on the disk."""

    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, Folder] = field(default_factory=dict)
    root: int = 0
    events: list[Event] = field(default_factory=list)

    @classmethod
    def of(cls, calls: Iterable[Call], before: Mapping[int, bytes | Folder], root: int) -> Disk:
        """Take a trace, and ``snapshot`` of the folder before; ``root``: the folder's inode."""
        disk = cls(root=root)
        number = {inode: inode for inode in before}  # inodes are used again; numbers are not
        names = {inode: dict(value) for inode, value in before.items() if isinstance(value, dict)}
        disk.files = {inode: value for inode, value in before.items() if isinstance(value, bytes)}
        disk.folders = {inode: dict(value) for inode, value in names.items()}

        def parent(path: str) -> tuple[int, str]:
            at = root
            *folders, name = path.split("/")
            for folder in folders:
                at = names[at][folder]
            return at, name

        def new(inode: int) -> int:
            number[inode] = -len(number) - len(disk.events) - 1
            return number[inode]

        for call in calls:
            path, path2 = (f"run/{p}".removesuffix("/.") for p in (call.path, call.path2))
            if call.result < 0 or call.op == "close" or call.op == "chmod":
                continue
            if call.op == "open":
                if call.flags & os.O_CREAT:
                    folder, name = parent(path)
                    disk.files[new(call.inode)] = b""
                    names[folder][name] = number[call.inode]
                    disk.events.append(Event(call.k, "add", folder, name, number[call.inode]))
                elif call.flags & os.O_TRUNC:
                    disk.events.append(Event(call.k, "truncate", number[call.inode]))
            elif call.op == "mkdir":
                folder, name = parent(path)
                disk.folders[new(call.inode)], names[number[call.inode]] = {}, {}
                names[folder][name] = number[call.inode]
                disk.events.append(Event(call.k, "add", folder, name, number[call.inode]))
            elif call.op == "rename":
                (folder, name), (other, new_name) = parent(path), parent(path2)
                assert folder == other, f"not modelled: {call}"
                names[folder][new_name] = names[folder].pop(name)
                disk.events.append(Event(call.k, "rename", folder, name, new_name))
            elif call.op in ("unlink", "rmdir"):
                folder, name = parent(path)
                del names[folder][name]
                disk.events.append(Event(call.k, "remove", folder, name))
            elif call.op in ("write", "writev"):
                disk.events.append(Event(call.k, "write", number[call.inode], to=call.offset, data=call.data))
            elif call.op == "truncate":
                disk.events.append(Event(call.k, "truncate", number[call.inode], to=call.offset))
            elif call.op == "fsync":
                owner = root if call.path == ".." else number[call.inode]
                for event in disk.events:
                    if event.owner == owner:
                        event.sure = min(event.sure, call.k)
            else:
                raise AssertionError(f"not modelled: {call}")
        return disk

    def at(self, k: int, fate: Callable[[Event], str]) -> dict[str, bytes | None]:
        """Give path -> bytes, None for a folder, after call k; ``fate`` of what isn't sure: all, none, half, zeros."""
        files = {n: bytearray(data) for n, data in self.files.items()}
        folders = {n: dict(names) for n, names in self.folders.items()}
        for event in self.events:
            if event.k > k:
                break
            happens = "all" if event.sure <= k else fate(event)
            if happens == "none":
                continue
            if event.what == "write":
                data = event.data[: len(event.data) // 2] if happens == "half" else event.data
                file, end = files[event.owner], event.to + len(data)
                file.extend(bytes(max(end - len(file), 0)))
                file[event.to : end] = bytes(len(data)) if happens == "zeros" else data
            elif event.what == "truncate":
                file = files[event.owner]
                file.extend(bytes(max(event.to - len(file), 0)))
                del file[event.to :]
            elif event.what == "add":
                folders[event.owner][event.name] = event.to
            elif event.what == "remove":
                folders[event.owner].pop(event.name, None)
            elif event.name in folders[event.owner]:
                folders[event.owner][event.to] = folders[event.owner].pop(event.name)
        found: dict[str, bytes | None] = {}

        def walk(folder: int, path: str) -> None:
            for name, number in sorted(folders[folder].items()):
                found[path + name] = None if number in folders else bytes(files[number])
                if number in folders:
                    walk(number, f"{path}{name}/")

        walk(self.root, "")
        return found


def snapshot(folder: Path) -> tuple[dict[int, bytes | Folder], int]:
    """Give what is in a folder by inode, and the inode of the folder itself."""
    found: dict[int, bytes | Folder] = {folder.stat().st_ino: {p.name: p.stat().st_ino for p in folder.iterdir()}}
    for path in folder.rglob("*"):
        inside = {p.name: p.stat().st_ino for p in path.iterdir()} if path.is_dir() else path.read_bytes()
        found[path.stat().st_ino] = inside
    return found, folder.stat().st_ino


def write(state: Mapping[str, bytes | None], folder: Path, *, only: str = "") -> None:
    """Make a state real; ``only`` what begins so."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, data in state.items():
        if path.startswith(only):
            if data is None:
                (folder / path).mkdir(parents=True)
            else:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(data)


def everything(event: Event) -> str:
    return "all"


def nothing(event: Event) -> str:
    return "none"


def names_only(event: Event) -> str:
    """Names are there, what was written is not: files of length 0."""
    return "none" if event.what in ("write", "truncate") else "all"


def zeros(event: Event) -> str:
    """Names and lengths are there, the bytes are not."""
    return "zeros" if event.what == "write" else "all"


def data_only(event: Event) -> str:
    """What was written is there, but no new name."""
    return "all" if event.what in ("write", "truncate") else "none"


def chance(rng: random.Random) -> Callable[[Event], str]:
    """Anything."""
    often = rng.random()

    def fate(event: Event) -> str:
        lost = ("none", "half", "zeros") if event.what == "write" else ("none",)
        return "all" if rng.random() < often else rng.choice(lost)

    return fate
