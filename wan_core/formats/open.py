"""From a path to its tensor table: a file, a sharded index, or a folder of either."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import CorruptFile
from ..files import file_kind, open_regular, quoted
from .index import find_weights, read_index
from .one_file import read_file
from .table import TensorInfo, TensorTable


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
