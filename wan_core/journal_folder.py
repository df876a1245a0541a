"""The folders journals live in: which are journals, whose lock is free, which are old.

A journal's folder holds three states, ``identity.json`` and a lock; only these are ever removed.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .saved_state import FORMAT

SLOTS = ("a.safetensors", "b.safetensors")
DONE = "latents.safetensors"
STATES = (*SLOTS, DONE)
IDENTITY, LOCK = "identity.json", "lock"

KEEP = 8
"""Journals of other renders left in a folder; older ones are removed when one is opened."""

_MAX_IDENTITY = 16 << 20


def journals(root: Path) -> Iterator[Path]:
    """The folders below ``root`` that are journals with something in them."""
    try:
        folders = sorted(root.iterdir())
    except OSError:
        return
    for folder in folders:
        named = len(folder.name) == 32 and not set(folder.name) - set("0123456789abcdef")
        if named and not folder.is_symlink() and (folder / IDENTITY).is_file():
            yield folder


def read_identity(folder: Path) -> dict[str, Any] | None:
    """The identity a journal was made for, None where it is damaged or of another format."""
    try:
        path = folder / IDENTITY
        if path.stat().st_size > _MAX_IDENTITY:
            return None
        record = json.loads(path.read_bytes())
        identity = record["identity"] if record["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return identity if isinstance(identity, dict) else None


def remove_own_files(folder: Path) -> None:
    """Remove what a journal wrote into its folder, all but the lock; raises OSError."""
    for name in (*STATES, IDENTITY):
        (folder / name).unlink(missing_ok=True)
    for left_over in folder.glob(".wanfit-*"):
        left_over.unlink(missing_ok=True)


def prune(root: Path, own: Path) -> None:
    """Remove all but the ``KEEP`` newest journals of other renders, none that a run holds open."""
    others = [(_touched(folder), folder) for folder in journals(root) if folder != own]
    for _, folder in sorted(others, reverse=True)[KEEP:]:
        lock = try_lock(folder / LOCK)
        if lock is None:
            continue
        with lock:
            remove_own_files(folder)
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
            folder.rmdir()


def _touched(folder: Path) -> float:
    paths = (folder / name for name in (*STATES, IDENTITY))
    return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)


def try_lock(path: Path) -> IO[bytes] | None:
    """Open and lock a file until it is closed or the process dies; None if another holds it."""
    file = open(path, "ab")  # noqa: SIM115  (it stays open as long as the lock is held)
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:
        return file  # a file system without locks: go on, as before there were any
    return file
