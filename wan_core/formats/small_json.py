"""Small JSON objects, bounded before they are parsed; names what a file that is no JSON is."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Final

from ..errors import CorruptFile
from ..files import decode_text, open_regular, quoted
from .table import AGAIN, MAX_HEADER_BYTES, MAX_TENSORS


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file of at most 16 MiB; raises CorruptFile if it is not one.

    Editors of Windows put a byte order mark before it, which is allowed.
    """
    source = Path(path)
    with open_regular(source) as (file, size):
        if size > MAX_HEADER_BYTES:
            raise CorruptFile(
                f"{quoted(source)} is {size:,} bytes; at most {MAX_HEADER_BYTES:,} are read. "
                f"{AGAIN}"
            )
        data = file.read(MAX_HEADER_BYTES)
    with contextlib.suppress(UnicodeDecodeError):  # load_json says what it is instead
        data = decode_text(data).encode("utf-8")
    return load_json(data, source, "content")


def load_json(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parse a JSON object; ``path`` and ``what`` ("header", "content") are for messages.

    Raises CorruptFile for anything else, for a key that occurs twice and for NaN or infinity.
    """
    # Parsed JSON takes up to 30 times the memory of its text, so count the values first.
    if data.count(b",") > 16 * MAX_TENSORS or data.count(b"[") + data.count(b"{") > 4 * MAX_TENSORS:
        raise CorruptFile(f"The {what} of {quoted(path)} lists far too many values. {AGAIN}")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as err:
        kind = kind_of(data[:512])
        seen = f"it is {kind}" if kind else f"not valid JSON ({str(err)[:100]})"
        raise CorruptFile(f"The {what} of {quoted(path)} cannot be read: {seen}. {AGAIN}") from err
    if not isinstance(value, dict):
        raise CorruptFile(
            f"The {what} of {quoted(path)} is a {type(value).__name__}, not an object. {AGAIN}"
        )
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


_KINDS: Final = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<!doctype", "a web page"), (b"<html", "a web page"), (b"<?xml", "an XML page"),
    (b"gguf", "a GGUF file"), (b"pk\x03\x04", "a zip archive"), (b"\x1f\x8b", "a gzip archive"),
    (b"\x80\x02", "a pickle"), (b"\x80\x03", "a pickle"), (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"), (b"\x89hdf", "an HDF5 file"),
)  # fmt: skip


def kind_of(start: bytes) -> str | None:
    """Say in words what a file with these first bytes is, or None if they are not known."""
    head = start.lstrip().lower()
    if start and not any(start):
        return "a file of zeros"
    return next((kind for magic, kind in _KINDS if head.startswith(magic)), None)
