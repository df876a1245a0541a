"""Tensor tables: names, dtypes, shapes and byte offsets of the tensors in a model file.

Every reader in this package makes one of these from a file's header, without reading weights and
with the standard library only. Every length that a file claims is checked against the limits below
before anything is allocated, so memory and time are bounded whatever the file says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

MAX_HEADER_BYTES: Final = 16 * 2**20
MAX_TENSORS: Final = 65_536
MAX_DIMS: Final = 8
MAX_NAME: Final = 512
PICKLE_SUFFIXES: Final = (".bin", ".pth", ".pt", ".ckpt", ".pkl")

AGAIN: Final = "Download it again."
QUANTISED: Final = "_quantization_metadata"
"""Where a safetensors header's metadata says, for each layer, how it is stored."""


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


def bytes_by_dtype(infos: Iterable[TensorInfo]) -> dict[str, int]:
    """Return the bytes stored per dtype, largest first."""
    total: dict[str, int] = {}
    for info in infos:
        total[info.dtype] = total.get(info.dtype, 0) + info.nbytes
    return dict(sorted(total.items(), key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array in a file's metadata: ``count`` elements in the bytes ``start`` to ``end``.

    ``kind`` is the name of the elements' type (``f32``, ``i32``, ``text``). Of each text eight
    bytes give the length.
    """

    kind: str
    count: int
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Return the bytes stored."""
        return self.end - self.start


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
    """Sentences about what is odd in the file but harmless."""
    arrays: Mapping[str, ArrayInfo] = field(default_factory=dict)
    """Where a GGUF file keeps the arrays of its tokenizer; they are not read with the table."""

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
        return bytes_by_dtype(self.tensors.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor; KeyError when there is none of that name."""
        return self.tensors[name].shape
