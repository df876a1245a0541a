"""Files mapped into memory, and the tensors that are views of them.

Such memory is the file's own pages: the system reads them when they are touched and may drop them
again, so that weights larger than RAM can be used. They are read and never written.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import threading
import weakref
from typing import Any

import numpy as np
import torch

_addresses: weakref.WeakKeyDictionary[MappedFile, range] = weakref.WeakKeyDictionary()
"""Where every mapped file lies that a tensor still needs."""
# One thread may map a file while others ask. Re-entrant, as a finalizer may ask, too.
_addresses_lock = threading.RLock()
_COMMIT_EXHAUSTED = 1455  # Windows: "The paging file is too small for this operation to complete"


class MappedFile:
    """One mapped file; alive as long as a tensor that is a view of it."""

    def __init__(self, mapping: mmap.mmap, buffer: Any) -> None:
        self._mapping, self._buffer = mapping, buffer
        # The buffer is what tensors hold on to: through it they keep the mapping.
        buffer.owner = self
        start = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
        with _addresses_lock:
            _addresses[self] = range(start, start + len(mapping))

    def __len__(self) -> int:
        return len(self._mapping)

    def view(self, start: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return ``numel`` numbers from byte ``start`` on, without reading them."""
        return torch.frombuffer(self._buffer, dtype=dtype, count=numel, offset=start)


def map_file(file: io.FileIO, *, private: bool = hasattr(mmap, "MAP_PRIVATE")) -> MappedFile:
    """Map a file for reading.

    Where the system has private mappings (``private``), one without reserved memory is made: files
    larger than RAM can be mapped. Elsewhere (Windows) the mapping is read-only, because a
    copy-on-write one would count against the commit limit as a whole. Raises MemoryError where
    the system has no room for the mapping, and OSError for everything else.
    """
    try:
        if private:
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            prot = mmap.PROT_READ | mmap.PROT_WRITE
            mapping = mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
            return MappedFile(mapping, (ctypes.c_uint8 * len(mapping)).from_buffer(mapping))
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as err:
        if err.errno == errno.ENOMEM or getattr(err, "winerror", None) == _COMMIT_EXHAUSTED:
            raise MemoryError(f"there is no room to map {file.name!r}: {err}") from err
        raise
    # torch and ctypes take only writable buffers by themselves, and a warning would be wrong: the
    # address is all that is needed, and nobody writes there.
    address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    return MappedFile(mapping, (ctypes.c_uint8 * len(mapping)).from_address(address))


def is_mapped(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is a view of a mapped file: its pages count as available RAM."""
    if tensor.device.type != "cpu":
        return False
    with _addresses_lock:
        mapped = list(_addresses.values())
    return any(tensor.data_ptr() in addresses for addresses in mapped)
