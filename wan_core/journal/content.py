"""What a file and this package's code are, by their bytes: cheap digests for a render's identity.

Path, size and time of a file stay the same where a copy keeps times, and the version of this
package while it is worked on. A digest of some of a file's bytes, and of all sources, tells.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

from ..files import open_regular

_HEAD = 2**20
"""Bytes from the beginning that are read: the header of nearly every file, all of a small one."""
_PIECES, _PIECE = 32, 2**14
"""Pieces from the rest, and their bytes: a hard disk seeks them in a third of a second."""
_DIGITS = 32


def content_digest(path: Path) -> str:
    """Return a digest of a file's size, beginning, end and pieces between: 32 hex digits.

    Weights that were trained or converted anew differ everywhere; bytes changed by hand between the
    pieces are not seen. Raises MissingFile where the file cannot be read.
    """
    with open_regular(path) as (file, size):
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        rest = max(0, size - _HEAD - _PIECE)
        places = [(0, _HEAD)]
        places += [(_HEAD + rest * index // _PIECES, _PIECE) for index in range(_PIECES + 1)]
        for place, count in places:
            if place < size:
                file.seek(place)
                digest.update(_read(file, count))
    return digest.hexdigest()[:_DIGITS]


def _read(file: BinaryIO, count: int) -> bytes:
    """Return ``count`` bytes, fewer at the end; a read may give less than it is asked for."""
    found = bytearray()
    while len(found) < count and (piece := file.read(count - len(found))):
        found += piece
    return bytes(found)


@cache
def code_digest(root: str = str(Path(__file__).resolve().parent.parent)) -> str:
    """Return a digest of this package's sources, 32 hex digits; "" where there are none to read.

    Of this package read once in a process, when that begins to load it, in about 10 ms: what was
    loaded stays, whatever becomes of the files, and so does this.
    """
    digest = hashlib.sha256()
    try:
        found = sorted(_sources(root, ""))
        for name in found:
            with open(os.path.join(root, name), "rb", buffering=0) as file:
                source = file.read()
            digest.update(b"%s %d " % (os.fsencode(name), len(source)) + source)
    except OSError:  # imported from an archive, say
        return ""
    return digest.hexdigest()[:_DIGITS] if found else ""


def _sources(root: str, inside: str) -> Iterator[str]:
    """Yield the paths of all sources, with slashes, below ``root``."""
    with os.scandir(os.path.join(root, inside)) as entries:
        for entry in entries:
            if entry.is_dir() and entry.name != "__pycache__":
                yield from _sources(root, f"{inside}{entry.name}/")
            elif entry.name.endswith(".py"):
                yield inside + entry.name


code_digest()
