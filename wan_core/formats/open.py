"""From a path to its tensor table: a file, a sharded index, or a folder of either."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

from ..errors import CorruptFile
from ..files import file_kind, open_regular, quoted
from .index import find_weights, read_index
from .one_file import read_file
from .table import TensorInfo, TensorTable

_PROBES: Final = 32
_PROBE: Final = 512
"""Bytes that are looked at in a place."""
ALLOW_ZEROS: Final = "WANFIT_ALLOW_ZEROS"
"""Variable that has files used whose zeros are meant, such as layers that were cut out."""


def read_table(path: str | os.PathLike[str]) -> TensorTable:
    """Read the tensor table of a .safetensors, .gguf or .pth file, an index, or a folder.

    Raises MissingFile, CorruptFile (truncated, inconsistent, or another format under this suffix)
    or UnsafeFile. UnsafeFile means a pickle that holds more than a list of tensors, a pickle that
    was found in a folder instead of being named by the caller, or a shard name that leads out of
    its folder. No weight is read and nothing in the file is executed.
    """
    source = Path(path)
    if file_kind(source) == "folder":
        return read_table(find_weights(source))
    if source.name.endswith(".json"):
        return read_index(source)
    return read_file(source)


def refuse_holes(table: TensorTable) -> None:
    """Raise CorruptFile where weights of a file are a hole: zeros that a download has not filled.

    Programs that download a file in parts, or claim its place on the disk first, give it its whole
    size from the beginning. Looked at is the middle of some matrices, evenly from the first to the
    last, and the last one near its end; trained ones have no run of zeros as long there. A single
    one may have in the middle: a layer that was switched off. With the variable ``ALLOW_ZEROS`` set
    no file is looked at.
    """
    if os.environ.get(ALLOW_ZEROS):
        return
    matrices = sorted(
        (i for i in table.tensors.values() if len(i.shape) > 1 and i.nbytes >= 2 * _PROBE),
        key=lambda info: (str(info.file), info.start),
    )
    some = matrices[:: max(1, len(matrices) // _PROBES)]
    places = [(info, (info.start + info.end - _PROBE) // 2) for info in some]
    # Not its very end: tables of tokens may have rows there that no token has.
    places += [(info, info.end - _PROBE - info.nbytes // 16) for info in matrices[-1:]]
    empty = [not any(data) for data in _read_at(places)]
    if (sum(empty) > 1 or any(empty[-1:])) and not all(empty):
        first = places[empty.index(True)][0].name
        raise CorruptFile(
            f"{quoted(table.path)} holds nothing but zeros in {sum(empty)} of {len(empty)} places "
            f"that were looked at (the first in {first}): its download was not finished, though it "
            f"has its whole size. Download it again. If it is to have them, set {ALLOW_ZEROS}=1."
        )


def _read_at(places: Iterable[tuple[TensorInfo, int]]) -> Iterator[bytes]:
    """Yield some bytes from each place in a tensor's file; those of a file come together."""
    for path, group in groupby(places, key=lambda place: place[0].file):
        with open_regular(path) as (file, _):
            for _, start in group:
                file.seek(start)
                yield file.read(_PROBE)


def read_small(infos: Sequence[TensorInfo], limit: int = 128) -> list[bytes]:
    """Return the bytes of many small tensors, opening each file once.

    Raises CorruptFile, naming the tensor, if one has more than ``limit`` bytes.
    """
    out: dict[str, bytes] = {}
    for path in dict.fromkeys(info.file for info in infos):
        with open_regular(path) as (file, _):
            for info in (i for i in infos if i.file == path):
                if info.nbytes > limit:
                    raise CorruptFile(
                        f"Tensor {info.name!r} of {quoted(path)} is {info.nbytes:,} bytes; at most "
                        f"{limit:,} were expected. The file is damaged; download it again."
                    )
                file.seek(info.start)
                out[info.name] = file.read(info.nbytes)
    return [out[info.name] for info in infos]
