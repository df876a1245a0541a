"""Reads the header of a safetensors file (format: github.com/huggingface/safetensors, README)."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeGuard

from ..errors import CorruptFile
from ..files import quoted
from .small_json import load_json
from .table import AGAIN, MAX_DIMS, MAX_HEADER_BYTES, MAX_NAME, MAX_TENSORS, TensorInfo, TensorTable

DTYPE_BITS: Final[Mapping[str, int]] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of each safetensors dtype."""


def parse_safetensors(start: bytes, file: BinaryIO, path: Path, size: int) -> TensorTable:
    """Read the header of an open file of ``size`` bytes that begins with ``start``.

    Raises CorruptFile unless the header is valid and its tensors fill the file exactly.
    """
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
    header = load_json(file.read(length), path, "header")
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
        raise CorruptFile(
            f"__metadata__ in the header of {quoted(path)} is not a table of texts, as the format "
            f"wants it. {AGAIN} If you made the file, save it with metadata of texts alone."
        )
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
    # type() and not isinstance(): True is an instance of int but not a size.
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
