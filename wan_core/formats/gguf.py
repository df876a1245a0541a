"""Tensor tables of GGUF files, read with bounds. Standard library only.

The reader of the ``gguf`` package trusts the counts and lengths in a file: 49 crafted bytes can
make it hang. This one first checks each of them against the file's size, and skips long arrays (the
vocabulary of a text encoder) instead of keeping them: of a tokenizer's, it notes the places, from
which ``gguf_tokenizer`` reads them when they are wanted.
Format: github.com/ggml-org/ggml, docs/gguf.md. Block sizes: ggml-common.h.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from ..errors import CorruptFile
from ..files import quoted
from .table import AGAIN, MAX_NAME, MAX_TENSORS, ArrayInfo, TensorInfo, TensorTable

MAX_KEYS: Final = 4096
MAX_ARRAY: Final = 4_000_000
"""Elements of one metadata array; umT5's vocabulary has 256,384."""
MAX_TEXT: Final = 2**20
MAX_HEADER_BYTES: Final = 64 * 2**20
KEEP_ARRAY: Final = 16
"""Arrays with more elements are skipped: of arrays, only tensor shapes are needed here."""
MAX_DIMS: Final = 8

_VERSIONS: Final = (2, 3)
# number: (name, elements per block, bytes per block)
GGML_TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
# metadata value type: (name, struct code); 8 is text, 9 an array
_SCALARS: Final[Mapping[int, tuple[str, str]]] = {
    0: ("u8", "<B"), 1: ("i8", "<b"), 2: ("u16", "<H"), 3: ("i16", "<h"), 4: ("u32", "<I"),
    5: ("i32", "<i"), 6: ("f32", "<f"), 7: ("bool", "<?"), 10: ("u64", "<Q"), 11: ("i64", "<q"),
    12: ("f64", "<d"),
}  # fmt: skip
_TEXT: Final = 8
_ARRAY: Final = 9
_LENGTH: Final = struct.Struct("<Q")
_SHAPE_KEY: Final = "comfy.gguf.orig_shape."
_TOKENIZER_KEY: Final = "tokenizer."


class _Reader:
    """Reads the header forward in chunks; checks each read against the bytes that are left."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self._path = file, path
        self._end = min(size, MAX_HEADER_BYTES)
        self._buffer, self._at, self._start = b"", 0, 0
        self.size = size

    @property
    def position(self) -> int:
        return self._start + self._at

    def fail(self, problem: str) -> CorruptFile:
        return CorruptFile(
            f"The GGUF header of {quoted(self._path)} is damaged: {problem}. {AGAIN}"
        )

    def require(self, count: int) -> None:
        left = self._end - self.position
        if count > left:
            raise self.fail(
                f"it needs {count:,} bytes at position {self.position:,} and {left:,} are left"
            )

    def take(self, count: int) -> bytes:
        self.require(count)
        if self._at + count > len(self._buffer):
            self._start, self._at = self.position, 0
            self._file.seek(self._start)
            self._buffer = self._file.read(max(count, 65_536))
        data = self._buffer[self._at : self._at + count]
        if len(data) < count:
            raise self.fail("the file became shorter while it was read")
        self._at += count
        return data

    def skip(self, count: int) -> None:
        self.require(count)
        if self._at + count <= len(self._buffer):
            self._at += count
        else:
            self._buffer, self._start, self._at = b"", self.position + count, 0

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self, limit: int = MAX_TEXT) -> str:
        length = self.number("<Q")
        if length > limit:
            raise self.fail(f"a text would be {length:,} bytes long ({limit:,} are allowed)")
        return self.take(length).decode("utf-8", "replace")

    def skip_texts(self, count: int) -> None:
        """Skip an array of texts; works on the buffer directly to be fast (umT5 has 256,384)."""
        for _ in range(count):
            # The length may straddle the end of the buffer: refill, then step back to it.
            if self._at + 8 > len(self._buffer):
                self.take(8)
                self._at -= 8
            (length,) = _LENGTH.unpack_from(self._buffer, self._at)
            if length > MAX_TEXT:
                raise self.fail(f"a text would be {length:,} bytes long ({MAX_TEXT:,} are allowed)")
            end = self._at + 8 + length
            if end <= len(self._buffer):
                self._at = end
            else:
                self.skip(8 + length)


def parse_gguf(file: BinaryIO, path: Path, size: int) -> TensorTable:
    """Read the header of an open GGUF file of ``size`` bytes; raises CorruptFile.

    Shapes are in torch's order. GGUF holds at most four dimensions, so the 5-D shape of a
    convolution is restored from the metadata ``comfy.gguf.orig_shape.*``.
    """
    reader = _Reader(file, path, size)
    reader.skip(4)
    version = reader.number("<I")
    if version not in _VERSIONS:
        raise CorruptFile(f"{quoted(path)} {_odd_version(version)}")
    tensor_count, key_count = reader.number("<Q"), reader.number("<Q")
    if not 1 <= tensor_count <= MAX_TENSORS or key_count > MAX_KEYS:
        raise reader.fail(
            f"it announces {tensor_count:,} tensors and {key_count:,} keys (1 to {MAX_TENSORS:,} "
            f"and {MAX_KEYS:,} are allowed)"
        )
    metadata, shapes, arrays, alignment = _read_metadata(reader, key_count)
    raw = [_read_info(reader) for _ in range(tensor_count)]
    header_bytes = reader.position
    # Offsets of tensors count from the end of the header, rounded up to the alignment.
    base = -(-header_bytes // alignment) * alignment
    tensors = _place(reader, raw, shapes, base, alignment, path)
    return TensorTable(
        path, (path,), tensors, metadata, "gguf", header_bytes, arrays=arrays
    )  # fmt: skip


def _odd_version(version: int) -> str:
    if struct.unpack(">I", struct.pack("<I", version))[0] in _VERSIONS:
        return (
            "is a GGUF file in big-endian byte order, which is not read. Get the usual, "
            "little-endian one."
        )
    if version == 1:
        return "is a GGUF file of version 1; 2 and 3 are read. Get a newer version of the file."
    return (
        f"says that it is a GGUF file of version {version}; 2 and 3 are read. {AGAIN} If that is "
        "its version, get one that is made for version 3, or update WanFit."
    )


def _read_metadata(
    reader: _Reader, count: int
) -> tuple[dict[str, str], dict[str, tuple[int, ...]], dict[str, ArrayInfo], int]:
    """Return the texts and numbers, the tensors' original shapes, the arrays, the alignment."""
    metadata: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    arrays: dict[str, ArrayInfo] = {}
    alignment = 32
    for _ in range(count):
        key = reader.text(65_535)
        value, array = _read_value(reader)
        if array is not None and key.startswith(_TOKENIZER_KEY):
            arrays[key] = array
        if key.startswith(_SHAPE_KEY) and isinstance(value, list):
            shapes[key.removeprefix(_SHAPE_KEY)] = _checked_shape(reader, key, value)
        elif key == "general.alignment":
            alignment = value if type(value) is int else 0
        elif isinstance(value, str | int | float):
            metadata[key] = str(value)
    if not 1 <= alignment <= 65_536 or alignment & (alignment - 1):
        raise reader.fail(f"alignment {alignment}, a power of two up to 65,536 was expected")
    return metadata, shapes, arrays, alignment


def _checked_shape(reader: _Reader, key: str, value: list[Any]) -> tuple[int, ...]:
    if not 1 <= len(value) <= MAX_DIMS or any(
        type(v) is not int or not 0 <= v < 2**48 for v in value
    ):
        raise reader.fail(f"{key[:80]!r} is not a shape")
    return tuple(value)


def _read_value(reader: _Reader) -> tuple[Any, ArrayInfo | None]:
    """Return a value, None for a long array or one of texts, and the place if it is an array."""
    kind = reader.number("<I")
    if kind in _SCALARS:
        return reader.number(_SCALARS[kind][1]), None
    if kind == _TEXT:
        return reader.text(), None
    if kind != _ARRAY:
        raise reader.fail(f"value type {kind} is unknown")
    item, count = reader.number("<I"), reader.number("<Q")
    if count > MAX_ARRAY:
        raise reader.fail(f"an array would have {count:,} elements ({MAX_ARRAY:,} are allowed)")
    start, values = reader.position, None
    if item in _SCALARS:
        name, code = _SCALARS[item]
        if count > KEEP_ARRAY:
            reader.skip(count * struct.calcsize(code))
        else:
            values = [reader.number(code) for _ in range(count)]
    elif item == _TEXT:
        name = "text"
        reader.skip_texts(count)
    else:
        raise reader.fail(f"an array of value type {item} is not known")
    return values, ArrayInfo(name, count, start, reader.position)


def _read_info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name = reader.text(MAX_NAME)
    if not name or not name.isprintable():
        raise reader.fail(f"a tensor name is empty or not printable: {name[:80]!r}")
    dims = reader.number("<I")
    if dims > MAX_DIMS:
        raise reader.fail(f"tensor {name!r} has {dims:,} dimensions ({MAX_DIMS} are allowed)")
    sizes = [reader.number("<Q") for _ in range(dims)]
    kind, offset = reader.number("<I"), reader.number("<Q")
    # GGUF lists the fastest-changing dimension first, torch lists it last.
    return name, tuple(reversed(sizes)), kind, offset


def _place(
    reader: _Reader,
    raw: list[tuple[str, tuple[int, ...], int, int]],
    shapes: Mapping[str, tuple[int, ...]],
    base: int,
    alignment: int,
    path: Path,
) -> dict[str, TensorInfo]:
    """Turn the entries into TensorInfos; requires that each lies in the file and none overlap."""
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in raw:
        if name in tensors:
            raise reader.fail(f"tensor {name!r} stands twice")
        if kind not in GGML_TYPES:
            raise CorruptFile(
                f"Tensor {name!r} of {quoted(path)} has the type {kind}, which is not known here. "
                f"{AGAIN} If the file is whole, its kind of quantisation is newer than WanFit, or "
                "older than what is used: get one in Q8_0, Q6_K, Q5_K or Q4_K."
            )
        dtype, block, width = GGML_TYPES[kind]
        numel = math.prod(shape)
        if numel % block or (shape and shape[-1] % block) or any(size >= 2**48 for size in shape):
            raise reader.fail(f"tensor {name!r} of {dtype} has the impossible shape {list(shape)}")
        if offset % alignment:
            raise reader.fail(
                f"tensor {name!r} starts at {offset:,}, not a multiple of {alignment}"
            )
        start, nbytes = base + offset, numel // block * width
        if start + nbytes > reader.size:
            missing = start + nbytes - reader.size
            raise CorruptFile(
                f"{quoted(path)} ends {missing:,} bytes early (tensor {name!r} needs "
                f"{start + nbytes:,}, file has {reader.size:,}). {AGAIN}"
            )
        whole = shapes.get(name, shape)
        if math.prod(whole) != numel:
            raise reader.fail(f"tensor {name!r} is {list(shape)}, its original {list(whole)}")
        tensors[name] = TensorInfo(name, dtype, whole, start, start + nbytes, path)
    position, last = 0, ""
    for info in sorted(tensors.values(), key=lambda i: (i.start, i.end)):
        if info.start < position:
            raise reader.fail(f"tensors {last!r} and {info.name!r} overlap")
        position, last = info.end, info.name
    return tensors
