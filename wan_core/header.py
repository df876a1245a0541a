"""Tensor tables: names, dtypes, shapes and places of the tensors in a model file.

Reads headers, never weights; standard library only. Every length in a file is checked against
our own limits before anything is allocated, so memory and time are bounded whatever the file
says. This module reads safetensors (format: github.com/huggingface/safetensors, README);
``shards`` reads indexes and folders, ``gguf_header`` reads GGUF.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeGuard

from .errors import CorruptFile, UnsafeFile
from .files import file_kind
from .files import open_regular as open_regular
from .files import quoted as quoted
from .files import some_of as some_of

MAX_HEADER_BYTES: Final = 16 * 2**20
MAX_TENSORS: Final = 65_536
MAX_DIMS: Final = 8
MAX_NAME: Final = 512
PICKLE_SUFFIXES: Final = (".bin", ".pth", ".pt", ".ckpt", ".pkl")

AGAIN: Final = "Download it again."

DTYPE_BITS: Final[Mapping[str, int]] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of each safetensors dtype."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: ``start`` and ``end`` are absolute byte offsets in ``file``.

    ``shape`` is in torch's order; ``dtype`` is the name the format uses (``BF16``, ``Q4_K``).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    file: Path

    @property
    def nbytes(self) -> int:
        """Return the bytes stored."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorTable:
    """All tensors of one file, or of all shards of one index, in file order."""

    path: Path
    """What was asked for: a file, an index or a folder."""
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str = "safetensors"
    """safetensors, gguf or pickle."""
    header_bytes: int = 0
    """Bytes of header read to make this table."""
    notes: tuple[str, ...] = ()
    """What is odd but harmless, in words."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes stored per dtype, largest first."""
        total: dict[str, int] = {}
        for info in self.tensors.values():
            total[info.dtype] = total.get(info.dtype, 0) + info.nbytes
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor; KeyError when there is none of that name."""
        return self.tensors[name].shape


def read_table(path: str | os.PathLike[str]) -> TensorTable:
    """Read the tensor table of a .safetensors, .gguf or .pth file, an index, or a folder.

    Raises MissingFile, CorruptFile (truncated, inconsistent, something else under this name) or
    UnsafeFile (a pickle that is more than a list of tensors or was not named itself, a shard name
    that leaves its folder). No weight is read and nothing in the file is run.
    """
    # shards builds on this module's types, so it is imported where it is needed.
    from .shards import find_weights, read_index

    source = Path(path)
    if file_kind(source) == "folder":
        return read_table(find_weights(source))
    if source.name.endswith(".json"):
        return read_index(source)
    with open_regular(source) as (file, size):
        return parse_table(file, source, size)


def parse_table(file: BinaryIO, path: Path, size: int) -> TensorTable:
    """Read the tensor table of one open file of ``size`` bytes; ``path`` is for messages.

    The suffix says which format is expected, the content whether it is that. Raises as
    ``read_table`` does.
    """
    from .gguf_header import parse_gguf
    from .pickle_header import parse_pickle

    start = file.read(512)
    suffix = path.suffix.lower()
    if suffix == ".gguf" and start[:4] == b"GGUF":
        file.seek(0)
        return parse_gguf(file, path, size)
    if suffix in PICKLE_SUFFIXES and start[:4] == b"PK\x03\x04":
        return parse_pickle(file, path, size)
    _refuse_foreign(start, path, size)
    if suffix == ".gguf":
        raise CorruptFile(
            f"{quoted(path)} is not a GGUF file ({size:,} bytes, it does not begin with 'GGUF'). "
            f"{AGAIN}"
        )
    return _parse_safetensors(start, file, path, size)


def _parse_safetensors(start: bytes, file: BinaryIO, path: Path, size: int) -> TensorTable:
    if size < 10:
        raise CorruptFile(
            f"{quoted(path)} is {size} bytes long; a safetensors file has at least 10. {AGAIN}"
        )
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER_BYTES or length < 2:
        raise CorruptFile(
            f"{quoted(path)} is not a safetensors file: its header would be {length:,} bytes long "
            f"(2 to {MAX_HEADER_BYTES:,} are allowed). {AGAIN}"
        )
    if 8 + length > size:
        raise CorruptFile(
            f"{quoted(path)} ends {8 + length - size:,} bytes early, inside its header (header "
            f"needs {8 + length:,}, file has {size:,}). {AGAIN}"
        )
    file.seek(8)
    header = _load_json(file.read(length), path, "header")
    metadata = _metadata(header.pop("__metadata__", None), path)
    if not 1 <= len(header) <= MAX_TENSORS:
        raise CorruptFile(
            f"The header of {quoted(path)} lists {len(header):,} tensors; 1 to {MAX_TENSORS:,} are "
            f"allowed. {AGAIN}"
        )
    base = 8 + length
    tensors = {name: _entry(name, entry, base, path) for name, entry in header.items()}
    _check_layout(tensors.values(), base, size, path)
    return TensorTable(path, (path,), tensors, metadata, "safetensors", base)


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CorruptFile(f"__metadata__ in the header of {quoted(path)} is not a table of texts.")
    return dict(value)


def _entry(name: str, entry: Any, base: int, path: Path) -> TensorInfo:
    """Check one header entry and turn it into a TensorInfo."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise CorruptFile(
            f"The header of {quoted(path)} has a tensor name that is empty, longer than {MAX_NAME} "
            f"or not printable: {name[:80]!r}. {AGAIN}"
        )
    problem = None
    if not isinstance(entry, dict):
        problem = f"its entry is a {type(entry).__name__}"
    else:
        dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            problem = f"its dtype {str(dtype)[:40]!r} is none that safetensors defines"
        elif not _naturals(shape):
            problem = f"its shape is not a list of at most {MAX_DIMS} sizes"
        elif not _naturals(span) or len(span) != 2 or span[0] > span[1]:
            problem = "its data_offsets are not two increasing positions"
        else:
            bits = math.prod(shape) * DTYPE_BITS[dtype]
            if bits == 8 * (span[1] - span[0]):
                return TensorInfo(name, dtype, tuple(shape), base + span[0], base + span[1], path)
            problem = (
                f"shape {shape} of {dtype} takes {bits / 8:,.0f} bytes, its data_offsets give "
                f"{span[1] - span[0]:,}"
            )
    raise CorruptFile(f"Tensor {name!r} of {quoted(path)} is damaged: {problem}. {AGAIN}")


def _naturals(value: Any) -> TypeGuard[list[int]]:
    # type() and not isinstance(): True is an int, and 1.0 no size.
    if type(value) is not list or len(value) > MAX_DIMS:
        return False
    return all(type(item) is int and 0 <= item < 2**48 for item in value)


def _check_layout(infos: Iterable[TensorInfo], base: int, size: int, path: Path) -> None:
    """Require that the tensors cover the rest of the file exactly, without holes or overlap."""
    position = base
    for info in sorted(infos, key=lambda i: (i.start, i.end)):
        if info.start != position:
            what = "overlaps the one before it" if info.start < position else "leaves a hole"
            raise CorruptFile(
                f"Tensor {info.name!r} of {quoted(path)} {what}: it starts at byte {info.start:,}, "
                f"{position:,} was expected. {AGAIN}"
            )
        position = info.end
    if position > size:
        raise CorruptFile(
            f"{quoted(path)} ends {position - size:,} bytes early (header needs {position:,}, file "
            f"has {size:,}). {AGAIN}"
        )
    if position < size:
        raise CorruptFile(
            f"{quoted(path)} has {size - position:,} bytes more than its header describes (header "
            f"needs {position:,}, file has {size:,}). {AGAIN}"
        )


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a small JSON object from a file of at most 16 MiB; CorruptFile when it is none."""
    source = Path(path)
    with open_regular(source) as (file, size):
        if size > MAX_HEADER_BYTES:
            raise CorruptFile(
                f"{quoted(source)} is {size:,} bytes; at most {MAX_HEADER_BYTES:,} are read."
            )
        return _load_json(file.read(MAX_HEADER_BYTES), source, "content")


def _load_json(data: bytes, path: Path, what: str) -> dict[str, Any]:
    # Parsed JSON takes up to 30 times its text: bound what it can hold before it is parsed.
    if data.count(b",") > 16 * MAX_TENSORS or data.count(b"[") + data.count(b"{") > 4 * MAX_TENSORS:
        raise CorruptFile(f"The {what} of {quoted(path)} lists far too many values. {AGAIN}")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as err:
        kind = _kind_of(data[:512])
        seen = f"it is {kind}" if kind else f"not valid JSON ({str(err)[:100]})"
        raise CorruptFile(f"The {what} of {quoted(path)} cannot be read: {seen}. {AGAIN}") from err
    if not isinstance(value, dict):
        raise CorruptFile(
            f"The {what} of {quoted(path)} is a {type(value).__name__}, not an object."
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


def _kind_of(start: bytes) -> str | None:
    head = start.lstrip().lower()
    if start and not any(start):
        return "a file of zeros"
    return next((kind for magic, kind in _KINDS if head.startswith(magic)), None)


def _refuse_foreign(start: bytes, path: Path, size: int) -> None:
    """Raise a named error when the first bytes, or the suffix, are not safetensors'."""
    # A header length can look like another format's magic: 640 is a pickle's 80 02.
    kind = None if start[3:9] == b"\0\0\0\0\0{" else _kind_of(start)
    named = path.suffix.lower() in PICKLE_SUFFIXES
    if kind == "a pickle" or (kind == "a zip archive" and b"data.pkl" in start):
        raise UnsafeFile(
            f"{quoted(path)} is a PyTorch pickle{'' if named else ' under another name'}, which "
            "can run code when it is opened. Use a .safetensors or .gguf version of this model."
        )
    if kind == "a Git LFS pointer, not the file itself":
        raise CorruptFile(
            f"{quoted(path)} is a Git LFS pointer ({size} bytes), not the file itself. Run "
            "'git lfs pull', or download the file."
        )
    if kind == "a GGUF file":
        raise CorruptFile(f"{quoted(path)} is a GGUF file under another name. Rename it to .gguf.")
    if (kind and size >= 8) or named:
        what = kind or "neither a PyTorch zip file nor a pickle"
        if start[3:9] == b"\0\0\0\0\0{":
            what = "a safetensors file under another name; rename it to .safetensors"
        raise CorruptFile(f"{quoted(path)} is {what} ({size:,} bytes). {AGAIN}")


def read_small(infos: Sequence[TensorInfo], limit: int = 128) -> list[bytes]:
    """Return the bytes of many small tensors, opening each file once.

    A tensor of more than ``limit`` bytes raises CorruptFile, naming it.
    """
    out: dict[str, bytes] = {}
    for path in dict.fromkeys(info.file for info in infos):
        with open_regular(path) as (file, _):
            for info in (i for i in infos if i.file == path):
                if info.nbytes > limit:
                    raise CorruptFile(
                        f"Tensor {info.name!r} of {quoted(path)} is {info.nbytes:,} bytes; at most "
                        f"{limit:,} were expected."
                    )
                file.seek(info.start)
                out[info.name] = file.read(info.nbytes)
    return [out[info.name] for info in infos]
