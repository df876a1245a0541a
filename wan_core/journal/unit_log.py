"""The file of finished units beside a journal's states.

They are records, each appended whole. A record that was cut off, by a crash or a full disk, ends
the file; a damaged one is not used. Nobody waits until the disk has them: after a power cut some
are missing, and are computed again.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .disk import in_ram, ram_for_a_copy

if TYPE_CHECKING:
    from torch import Tensor

_HEAD = struct.Struct(">4s32sQI")
"""Of a record: a mark, the unit's name, the bytes that follow, and their checksum."""
_MARK = b"WFU1"


class UnitLog:
    """The file of finished units below a journal; opened with the first that is kept.

    Its methods raise OSError, and ``add`` OutputError where RAM is short. For one thread.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._places: dict[str, tuple[int, int, int]] = {}
        """Of each unit: where its bytes begin, how many they are, and their checksum."""
        self.nbytes = 0
        """Up to where the file is whole."""
        with contextlib.suppress(OSError), open(path, "rb") as file:
            self._scan(file)

    def _scan(self, file: IO[bytes]) -> None:
        size = file.seek(0, 2)
        while self.nbytes + _HEAD.size <= size:
            file.seek(self.nbytes)
            mark, name, length, checksum = _HEAD.unpack(file.read(_HEAD.size))
            begin = self.nbytes + _HEAD.size
            if mark != _MARK or begin + length > size:
                return
            self._places[name.decode("ascii", "replace")] = begin, length, checksum
            self.nbytes = begin + length

    def __len__(self) -> int:
        return len(self._places)

    def find(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors that were kept under a name, in RAM; None if there are none whole."""
        if name not in self._places:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load

        begin, length, checksum = self._places.pop(name)
        with open(self._path, "rb") as file:
            file.seek(begin)
            data = file.read(length)
        if len(data) == length and zlib.crc32(data) == checksum:
            with contextlib.suppress(SafetensorError, ValueError, KeyError):
                found: dict[str, Tensor] = load(data)
                self._places[name] = begin, length, checksum
                return found
        return None

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Append what a unit gave; what there is of it after an error is cut off again."""
        from safetensors.torch import save

        with ram_for_a_copy():
            data = save(in_ram(tensors))
        checksum = zlib.crc32(data)
        file = self._open()
        try:
            file.seek(self.nbytes)
            file.write(_HEAD.pack(_MARK, name.encode("ascii"), len(data), checksum))
            file.write(data)
            file.flush()
        except OSError:
            self.close()
            raise
        begin = self.nbytes + _HEAD.size
        self._places[name] = begin, len(data), checksum
        self.nbytes = begin + len(data)

    def _open(self) -> IO[bytes]:
        if self._file is None:
            mode = "r+b" if self.nbytes else "wb"
            self._file = open(self._path, mode)  # noqa: SIM115 - as long as the journal is
            self._file.truncate(self.nbytes)
        return self._file

    def clear(self) -> None:
        """Forget all: the state after their step is saved."""
        if self.nbytes or self._file is not None:
            self._places, self.nbytes = {}, 0
            self._open().truncate(0)

    def close(self) -> None:
        """Leave the file for a later run."""
        if self._file is not None:
            # A full disk refuses at closing what it refused before.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the file."""
        self.close()
        self._places, self.nbytes = {}, 0
        self._path.unlink(missing_ok=True)
