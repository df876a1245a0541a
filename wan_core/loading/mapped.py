"""Files mapped into memory, the tensors that are views of them, and the first look at these.

Such memory is the file's own pages: the system reads them when they are touched and may drop them
again, so that weights larger than RAM can be used. They are read and never written.

Looking whether numbers are finite is what reads them. It is done piece by piece, by a few threads:
the disk is kept busy by several pieces at once, and whoever waits for them looks for an interrupt
meanwhile and says how far they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch

FP8: Final = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
AT_ONCE: Final = 4 * 2**20
"""Bytes read without looking up: 0.1 s of a slow disk."""
_AHEAD: Final = 64 * 2**20
"""Bytes asked for beyond those that are needed now: a few matrices of a 14B."""
_CHECKED: Final = 2**20
"""Bytes compared at a time: few enough to stay in the processor's cache meanwhile."""
_READERS: Final = min(4, os.cpu_count() or 1)
_WAIT_SECONDS: Final = 0.05

_addresses: weakref.WeakKeyDictionary[MappedFile, range] = weakref.WeakKeyDictionary()
"""Where every mapped file lies that a tensor still needs."""
# One thread may map a file while others ask. Re-entrant, as a finalizer may ask, too.
_addresses_lock = threading.RLock()
_COMMIT_EXHAUSTED = 1455  # Windows: "The paging file is too small for this operation to complete"


class MappedFile:
    """One mapped file; alive as long as a tensor that is a view of it."""

    def __init__(self, mapping: mmap.mmap, buffer: Any) -> None:
        self._mapping, self._buffer = mapping, buffer
        self._asked = range(0)
        # The buffer is what tensors hold on to: through it they keep the mapping.
        buffer.owner = self
        start = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
        with _addresses_lock:
            _addresses[self] = range(start, start + len(mapping))

    def __len__(self) -> int:
        return len(self._mapping)

    def read_ahead(self, start: int, nbytes: int) -> None:
        """Have the system begin to read these bytes, and some that follow, where it can be asked.

        Whoever then touches them one tensor after the other does not wait for the disk at each.
        """
        asked, size = self._asked, len(self._mapping)
        known = asked.start <= start < asked.stop
        if known and asked.stop >= min(size, start + nbytes + _AHEAD // 2):
            return
        begin = (asked.stop if known else start) // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(size, start + nbytes + _AHEAD)
        self._asked = range(asked.start if known else start, end)
        advise = getattr(self._mapping, "madvise", None)
        if advise is not None and hasattr(mmap, "MADV_WILLNEED"):
            # Advice is all it is: a system that refuses it reads the pages when they are touched.
            with contextlib.suppress(OSError, ValueError):
                advise(mmap.MADV_WILLNEED, begin, end - begin)

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


def _nothing(*_: object) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Watch:
    """Follows a reading: ``check`` may end it, ``read`` is told the bytes of each piece."""

    check: Callable[[], object] = _nothing
    read: Callable[[int], object] = _nothing

    def seen(self, nbytes: int) -> None:
        """Take note of bytes that have been read, and look for an interrupt."""
        self.read(nbytes)
        self.check()


def read_pages(tensors: Iterable[torch.Tensor], check: Callable[[], object]) -> None:
    """Have the system read the pages of those tensors that are mapped, and keep them for now.

    A byte of each page is looked at. ``check`` is called for every 4 MiB, and may raise.
    """
    for tensor in tensors:
        if not tensor.numel() or not is_mapped(tensor):
            continue
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        for begin in range(0, len(flat), AT_ONCE):
            check()
            # By torch, which lets go of the interpreter's lock: others compute meanwhile.
            flat[begin : begin + AT_ONCE : mmap.PAGESIZE].max()


Piece = tuple[int, Callable[[threading.Event], bool]]
"""Bytes, and a look at them that says whether they are finite; it may give up where told to."""


def all_finite(pieces: Sequence[Piece], watch: Watch) -> bool:
    """Say whether every piece is finite, looking at a few at a time, and at the first before all.

    What ``watch`` raises passes through, within a fraction of a second.
    """
    stop = threading.Event()
    # numpy lets go of the interpreter's lock while it compares.
    with ThreadPoolExecutor(_READERS, thread_name_prefix="wanfit-read") as pool:
        waiting = [(nbytes, pool.submit(look, stop)) for nbytes, look in pieces]
        try:
            for nbytes, one in waiting:
                while not one.done():
                    watch.seen(0)
                    wait([one], timeout=_WAIT_SECONDS)
                if not one.result():
                    return False
                watch.seen(nbytes)
        finally:
            stop.set()
            for _, one in waiting:
                one.cancel()
    return True


# For each dtype: the unsigned integer of its size, and a limit. Once the sign is shifted out, bits
# at or above the limit are NaN or infinity: the exponent is all ones. e4m3fn has no infinity; its
# only NaN has all bits set.
_LIMITS: Final[Mapping[torch.dtype, tuple[Any, int]]] = {
    torch.float64: (np.uint64, 0xFFE0_0000_0000_0000), torch.float32: (np.uint32, 0xFF00_0000),
    torch.float16: (np.uint16, 0xF800), torch.bfloat16: (np.uint16, 0xFF00),
    torch.float8_e4m3fn: (np.uint8, 0xFE), torch.float8_e5m2: (np.uint8, 0xF8),
}  # fmt: skip


def is_finite(values: torch.Tensor, watch: Watch | None = None) -> bool:
    """Say whether no value is NaN or infinite, for any floating-point dtype.

    On the CPU the bits are compared: ``torch.isfinite`` takes 30 times as long as reading the
    values. ``watch`` is given where looking at them is what reads them.
    """
    if values.device.type != "cpu":
        if values.dtype in FP8:
            values = values.to(torch.float16)
        # The sum is finite only if every term is, and needs no memory. A sum of finite terms may
        # overflow, so one that is not finite is looked at again.
        return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
    unsigned, limit = _LIMITS[values.dtype]
    bits = values.reshape(-1).view(torch.uint8).numpy().view(unsigned)
    step = AT_ONCE // bits.itemsize
    parts = [bits[begin : begin + step] for begin in range(0, bits.size, step)]
    watch = watch or Watch()
    if bits.nbytes > _CHECKED:
        return all_finite([(p.nbytes, partial(_none_beyond, p, limit)) for p in parts], watch)
    found = all(_none_beyond(part, limit) for part in parts)
    watch.seen(bits.nbytes)
    return found


def are_finite(many: Callable[[], Any], stop: threading.Event) -> bool:
    """Say whether all of ``many`` tensors on the CPU are finite; False where told to give up."""
    for values in many():
        unsigned, limit = _LIMITS[values.dtype]
        bits = values.reshape(-1).view(torch.uint8).numpy().view(unsigned)
        if not _none_beyond(bits, limit, stop):
            return False
    return True


def _none_beyond(bits: Any, limit: int, stop: threading.Event | None = None) -> bool:
    step = _CHECKED // bits.itemsize
    doubled = np.empty(min(step, bits.size), bits.dtype)
    for begin in range(0, bits.size, step):
        if stop is not None and stop.is_set():
            return False
        part = bits[begin : begin + step]
        # Adding a number to itself shifts its sign bit out.
        if np.add(part, part, out=doubled[: part.size]).max() >= limit:
            return False
    return True
