"""A lock on a file that keeps a folder for one process."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


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
        file = open(path, "ab")  # noqa: SIM115  (it stays open as long as the lock is held)
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
