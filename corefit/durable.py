"""Files that outlive a crash: whole or as they were, and on the disk when the call returns."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corefit.errors import RecipeError, system_words


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    windows = not hasattr(os, "O_DIRECTORY")
    if windows and path.is_dir():  # it opens no folders
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)  # and writes out only what may be written to
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each with its name on the disk: what is saved in it outlives a power failure."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside ``path`` and rename it: at any instant there is the new content or the old one.

    Raises:
        OSError: the disk refuses; ``path`` is as it was.
    """
    aside = path.with_name(f".tmp-{path.name}")
    try:
        aside.write_bytes(data)
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def contents(folder: Path) -> set[str]:
    """Give the names in a folder, but for what a new file system, or a killed process that filled it, left there."""
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if name != "lost+found" and not name.startswith(".tmp-")}


def place_beside(out: Path) -> Path:
    """Give where the folder is to be filled that becomes ``out``, for ``take_place``.

    Beside it, or in it where it is there and empty: it may be a mounted disk, which can't be renamed, or lie where
    nothing else may be made, and it keeps its owner.
    """
    return out if out.is_dir() and (not contents(out) or out.is_mount()) else out.parent


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a folder to fill; it becomes ``out`` when the block ends, and goes if the block raises.

    What was ``out`` stays until then; a link stays one. A killed process leaves ``.tmp-*`` behind.

    Raises:
        OSError: the disk refuses.
    """
    out = Path(os.path.realpath(out))
    aside, old = place_beside(out) / f".tmp-{out.name}", out.with_name(f".tmp-old-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in sorted(aside.rglob("*")):
            sync(path)
        sync(aside)
        take_place(aside, out, old)
        sync(aside.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def take_place(new: Path, out: Path, old: Path) -> None:
    """Rename a folder to ``out``; what was ``out`` becomes ``old``, or stays where that fails or is interrupted.

    What was filled in ``out`` itself goes there file by file.
    """
    if new.parent == out:
        for path in sorted(new.iterdir()):
            path.replace(out / path.name)
        return
    try:
        if out.exists():
            out.rename(old)
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read an object; an empty one where there is no such file, or a broken one."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def claim(folder: Path) -> int | None:
    """Lock a folder against a second process; give a handle to close. None: this system or disk has no locks.

    The lock ends with the process, whatever ends that.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a network disk without locks
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a run folder, and hold its lock.

    Raises:
        RecipeError: another process trains in it, or it can't be written.
    """
    try:
        make_folder(folder)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        lock = claim(folder)
    except BlockingIOError:
        raise RecipeError(f"run.out: {folder}: another process is training in it") from None
    except OSError as error:
        raise RecipeError(f"run.out: {folder}: can't be written: {system_words(error)}") from error
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def check_place(folder: Path) -> None:
    """Find out, before what takes time, whether a run can be written there; leave everything as it was.

    Raises:
        RecipeError: as ``claimed``.
    """
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        with claimed(folder):
            pass
    finally:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()


def held(folder: Path) -> bool | None:
    """Whether a process holds the lock of a folder; None: this system or disk has no locks, or the folder is shut.

    To look is to hold it for an instant: a run that begins in that very instant would be told that another trains.
    """
    try:
        handle = claim(folder)
    except BlockingIOError:
        return True
    except OSError:
        return None
    if handle is None:
        return None
    os.close(handle)
    return False
