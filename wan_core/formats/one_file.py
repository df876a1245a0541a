"""Which format one open file has: by its first bytes, which must agree with its suffix."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from ..errors import CorruptFile, UnsafeFile
from ..files import open_regular, quoted
from .gguf import parse_gguf
from .safetensors import parse_safetensors
from .small_json import kind_of
from .table import AGAIN, PICKLE_SUFFIXES, TensorTable
from .torch_zip import parse_pickle


def read_file(path: Path) -> TensorTable:
    """Read the tensor table of one file; raises as ``read_table`` does."""
    with open_regular(path) as (file, size):
        return parse_table(file, path, size)


def parse_table(file: BinaryIO, path: Path, size: int) -> TensorTable:
    """Read the tensor table of one open file of ``size`` bytes; ``path`` is for messages.

    The suffix says which format is expected; the first bytes say whether the file has it. Raises
    as ``read_table`` does.
    """
    start = file.read(512)
    suffix = path.suffix.lower()
    if suffix == ".gguf" and start[:4] == b"GGUF":
        file.seek(0)
        return parse_gguf(file, path, size)
    if suffix in PICKLE_SUFFIXES and start[:4] == b"PK\x03\x04":
        return parse_pickle(file, path, size)
    _refuse_other_formats(start, path, size)
    if suffix == ".gguf":
        raise CorruptFile(
            f"{quoted(path)} is not a GGUF file ({size:,} bytes, it does not begin with 'GGUF'). "
            f"{AGAIN}"
        )
    return parse_safetensors(start, file, path, size)


def _refuse_other_formats(start: bytes, path: Path, size: int) -> None:
    """Raise an error that names the format when the first bytes, or the suffix, show another."""
    # A safetensors file begins with its header's length, which can look like the magic number of
    # another format: 640 is 80 02, the start of a pickle. The zeros and brace after it decide.
    safe = start[3:9] == b"\0\0\0\0\0{"
    kind = None if safe else kind_of(start)
    named = path.suffix.lower() in PICKLE_SUFFIXES
    if safe and (named or path.suffix.lower() == ".gguf"):
        raise CorruptFile(
            f"{quoted(path)} is a safetensors file under another name. Rename it to .safetensors."
        )
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
        raise CorruptFile(f"{quoted(path)} is {what} ({size:,} bytes). {AGAIN}")
