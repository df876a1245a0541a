"""Locks on files: one that keeps a folder for one process, and one that keeps an output.

Both end with their process, so a crash leaves none behind.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import OutputError
from ..files import lock_beside, quoted

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_LOOKS, _LOOK_SECONDS = 20, 0.05
"""How often a lock that is held is looked at again, until somebody says to hold it, and after what
time."""


class FileLock:
    """A lock on an open file, until ``close`` or the end of the process."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def close(self) -> None:
        """Unlock and close the file; a process that was forked meanwhile keeps nothing of it."""
        with contextlib.suppress(OSError):
            if sys.platform != "win32" and not self.file.closed:
                fcntl.flock(self.file, fcntl.LOCK_UN)
        self.file.close()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def try_lock(path: Path) -> FileLock | None:
    """Open a file and lock it; return None if another process holds the lock.

    It ends with the process, so a crash leaves none behind.
    """
    while True:
        file = open(path, "ab", opener=_no_link)  # noqa: SIM115  (it stays open as long as the lock is held)
        try:
            if sys.platform == "win32":
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except OSError:
            return FileLock(file)  # the file system has no locks: go on without
        # Between opening and locking, a run that ended may have removed the file: a lock on that
        # would keep nobody out.
        with contextlib.suppress(OSError):
            if sys.platform == "win32" or os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return FileLock(file)
        file.close()


def _no_link(path: str, flags: int) -> int:
    """Open a file, but not through a link: another user's would have us write elsewhere."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


@contextlib.contextmanager
def claim(output: Path, what: str) -> Iterator[None]:
    """Keep an output for one render during the block, so that no other one writes over it.

    ``what`` names what is made. Of two renders that make the same, each may write it: what comes
    out is equal, and the later one may have taken the place of one that hangs. An empty name is
    equal to none. Raises OutputError where something else is being made.
    """
    place = lock_beside(output)
    try:
        lock, process, made = _lock_or_owner(place)
    except OSError:  # of a folder that cannot be written ``check_target`` tells more
        yield
        return
    if lock is None:
        if not made or made != what:
            raise OutputError(
                f"Another run{process and f' (process {process})'} is making another video as "
                f"{quoted(output)}. Wait for its end, or name another output."
            )
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a full disk: who comes next is told less
            lock.file.truncate(0)
            lock.file.write(f"\n{os.getpid()} {what}".encode())
            lock.file.flush()
        yield
    finally:
        # While it is locked, or it might be another run's by then; Windows removes no open file.
        if sys.platform == "win32":
            lock.close()
        with contextlib.suppress(OSError):
            place.unlink()
        lock.close()


def _lock_or_owner(place: Path) -> tuple[FileLock | None, str, str]:
    """Lock a file; where it is held, return None, the process that holds it and what that makes.

    For a moment it is also held by ``files.sweep``, and by one that has not said yet what it makes:
    what is told is what a second look finds, or a later one.
    """
    lock, process, made = try_lock(place), "", ""
    for _ in range(_LOOKS):
        if lock is not None or process:
            break
        time.sleep(_LOOK_SECONDS)
        lock = try_lock(place)
        if lock is None:
            process, _, made = _owner(place)
    return lock, process, made


def _owner(place: Path) -> tuple[str, str, str]:
    """Return the process and what it makes, as text, with a blank between."""
    try:
        with open(place, "rb", buffering=0) as file:
            file.seek(1)  # Windows lets nobody read the byte that is locked
            return file.read(4096).decode().partition(" ")
    except (OSError, UnicodeDecodeError):
        return "", "", ""
