"""A disk on which one call of the operating system fails, or every call from one on."""

from __future__ import annotations

import builtins
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

WRITES = {"mkdir", "open for writing", "write", "fsync", "replace"}
"""What a full disk refuses."""
CHANGES = WRITES | {"unlink", "rmdir"}
"""What a disk that was mounted read-only refuses."""
ALL = CHANGES | {"open", "stat", "scandir", "listdir", "flock"}

FAULTS = {
    "full": (errno.ENOSPC, WRITES),
    "over quota": (errno.EDQUOT, WRITES),
    "read-only": (errno.EROFS, CHANGES),
    "no permission": (errno.EACCES, ALL - {"write", "fsync", "flock"}),
    "broken": (errno.EIO, ALL),
    "gone": (errno.ESTALE, ALL),
}


class Disk:
    """Counts the calls that a fault concerns, and fails the one with number ``at`` (from 0)."""

    def __init__(self, root: str, fault: str, at: int, *, lasting: bool) -> None:
        self.root, self.at, self.lasting = root, at, lasting
        self.number, self.kinds = FAULTS[fault]
        self.calls = 0

    @property
    def failed(self) -> bool:
        """Whether there were enough calls for one to fail."""
        return self.calls > self.at

    def call(self, kind: str, path: Any) -> None:
        """Raise OSError if this call is the one, or comes after it on a lasting fault."""
        path = path.name if isinstance(path, _File) else path
        inside = isinstance(path, int) or os.fspath(path).startswith(self.root)
        if kind not in self.kinds or not inside:
            return
        self.calls += 1
        if self.calls - 1 == self.at or (self.lasting and self.failed):
            raise OSError(self.number, os.strerror(self.number), str(path))


class _File:
    """A file whose writes are calls of the disk."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> Any:
        self._disk.call("write", self._file.name)
        return self._file.write(data)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def failing_disk(disk: Disk) -> Iterator[Disk]:
    """Let calls below ``disk.root`` fail inside the ``with`` block."""
    real_open, real_os_open = builtins.open, os.open

    def opened(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        writing = set(mode) & set("wa+x")
        disk.call("open for writing" if writing else "open", path)
        file = real_open(path, mode, *more, **named)
        return _File(file, disk) if writing and not isinstance(path, int) else file

    def os_opened(path: Any, flags: int, *more: Any, **named: Any) -> Any:
        disk.call("open for writing" if flags & (os.O_WRONLY | os.O_RDWR) else "open", path)
        return real_os_open(path, flags, *more, **named)

    def wrapped(kind: str, real: Any) -> Any:
        def call(path: Any, *more: Any, **named: Any) -> Any:
            disk.call(kind, path)
            return real(path, *more, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(os, "open", os_opened)
        for kind in ("mkdir", "fsync", "replace", "unlink", "rmdir", "stat", "scandir", "listdir"):
            patch.setattr(os, kind, wrapped(kind, getattr(os, kind)))
        patch.setattr(fcntl, "flock", wrapped("flock", fcntl.flock))
        yield disk
