"""Files mapped into memory, the tensors that are views of them, and the first look at these.

Such memory is the file's own pages: the system reads them when they are touched and may drop them
again, so that weights larger than RAM can be used. They are read and never written.

Looking whether numbers are finite is done piece by piece, by a few threads, in what they have just
read: at the pace of plain reads. What is sent to a device is looked at there. Touching the pages of
a mapping leaves it to the system how much is read at once, which is 128 KiB where nobody has set
more. What is read goes nowhere where weights stay in their file (its pages are in the system's
cache then, where the mapping finds them), else straight to the memory that weights are copied to:
the file is then read once, for both.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from ..formats import TensorTable
from ..models import Source
from .dtypes import LOOKED_AT, is_finite

AT_ONCE: Final = 4 * 2**20
"""Bytes read without looking up: 0.1 s of a slow disk."""
_LEAD: Final = 256 * 2**20
"""Bytes that threads may still have to read before more is asked of them: whoever reads small
tensors between the large ones stays near them, on a disk that seeks."""
_READERS: Final = 4
"""Threads that read: more than one, so that a disk has work while numbers are looked at."""
_READ_FIRST: Final = 2**19
"""Bytes of the first read: 0.1 s of a network drive of 5 MB/s. A read cannot be taken back."""
_READ_LEAST, _READ_MOST = 2**16, 8 * 2**20
_QUICK_SECONDS, _SLOW_SECONDS = 0.01, 0.05
"""A read that took less is followed by one of twice the bytes; one that took more, of half."""
_WAIT_SECONDS: Final = 0.05
_TOLD_SECONDS: Final = 0.1

_addresses: weakref.WeakKeyDictionary[MappedFile, range] = weakref.WeakKeyDictionary()
"""Where every mapped file lies that a tensor still needs."""
# One thread may map a file while others ask. Re-entrant, as a finalizer may ask, too.
_addresses_lock = threading.RLock()
_COMMIT_EXHAUSTED = 1455  # Windows: "The paging file is too small for this operation to complete"


Reason = OSError | str
"""Why a piece cannot be used: the system's error, "short" or "wild"; "" where it can."""
Wrong = Callable[[Reason], Exception]
"""Makes the error to raise from a reason."""
Finite = Callable[[torch.Tensor], bool]
"""Says of bytes, uint8 and whole numbers of them, whether all that they stand for is finite."""
Numbers = Callable[[torch.Tensor], Iterable[torch.Tensor]]
"""Yields of such bytes, on any device, the numbers in them that may be NaN or infinite."""


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


@dataclass(frozen=True, slots=True)
class InFile:
    """The bytes of one tensor in a file, and how they are looked at when they are read.

    ``unit`` bytes are one number; ``numbers`` is None where no number can be wild.
    """

    span: range
    unit: int
    numbers: Numbers | None
    wrong: Wrong

    @property
    def finite(self) -> Finite | None:
        """How its bytes are looked at on the host."""
        return None if self.numbers is None else partial(_all_finite, self.numbers)


def _all_finite(numbers: Numbers, raw: torch.Tensor) -> bool:
    return all(map(is_finite, numbers(raw)))


class MappedFile:
    """One mapped file; alive as long as a tensor that is a view of it."""

    def __init__(self, mapping: mmap.mmap, buffer: Any, file: io.FileIO) -> None:
        self._mapping, self._buffer = mapping, buffer
        # The buffer is what tensors hold on to: through it they keep the mapping.
        buffer.owner = self
        # The same file as is mapped, also where another one has taken its name since. Windows
        # cannot read at a place: whoever reads there opens a file of that name.
        same = io.FileIO(os.dup(file.fileno())) if hasattr(os, "preadv") else None
        self.file = same or io.FileIO(file.name, "rb")
        weakref.finalize(self, self.file.close).atexit = False
        self.tensors: dict[int, InFile] = {}
        """The tensors that are views of it, by where they begin."""
        self.unseen: set[int] = set()
        """Those that nobody has looked at yet."""
        self.watch = Watch()
        """Follows the first look at them."""
        start = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
        with _addresses_lock:
            _addresses[self] = range(start, start + len(mapping))

    def __len__(self) -> int:
        return len(self._mapping)

    def view(self, start: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return ``numel`` numbers from byte ``start`` on, without reading them."""
        return torch.frombuffer(self._buffer, dtype=dtype, count=numel, offset=start)

    def to_look_at(self, stored: InFile) -> bool:
        """Say whether nobody has looked at a tensor's bytes and somebody must."""
        return stored.numbers is not None and stored.span.start in self.unseen


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
            return MappedFile(mapping, (ctypes.c_uint8 * len(mapping)).from_buffer(mapping), file)
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as err:
        if err.errno == errno.ENOMEM or getattr(err, "winerror", None) == _COMMIT_EXHAUSTED:
            raise MemoryError(f"there is no room to map {file.name!r}: {err}") from err
        raise
    # torch and ctypes take only writable buffers by themselves, and a warning would be wrong: the
    # address is all that is needed, and nobody writes there.
    address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    return MappedFile(mapping, (ctypes.c_uint8 * len(mapping)).from_address(address), file)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is a view of a mapped file: its pages count as available RAM."""
    return _owner(tensor) is not None


def _owner(tensor: torch.Tensor) -> tuple[MappedFile, int] | None:
    """Return the mapped file that a tensor is a view of, and at which byte it begins there."""
    if tensor.device.type != "cpu":
        return None
    with _addresses_lock:
        mapped = list(_addresses.items())
    place = tensor.data_ptr()
    return next(((file, place - a.start) for file, a in mapped if place in a), None)


def stored_at(tensor: torch.Tensor) -> tuple[MappedFile, InFile] | None:
    """Return where the bytes of a whole tensor lie in a file that is mapped; None elsewhere."""
    owner = _owner(tensor)
    stored = None if owner is None else owner[0].tensors.get(owner[1])
    if owner is None or stored is None or len(stored.span) != tensor.nbytes:
        return None
    return (owner[0], stored) if tensor.is_contiguous() else None


class Looker:
    """A few threads that read pieces of files in the order in which they are asked to.

    Whoever asks goes on meanwhile. What is wrong with a piece is raised by a later call, by
    ``finish`` at the latest. All methods but ``fetch`` belong to one thread.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._stop = threading.Event()
        self._waiting: deque[tuple[int, Future[Reason], Wrong]] = deque()
        self._pending = 0
        self._pool: ThreadPoolExecutor | None = None
        self._own: dict[str, io.FileIO] = {}
        self._seeking = threading.Lock()
        self._at_once = _READ_FIRST
        self._scratch = threading.local()

    def begin(
        self, file: io.FileIO, span: range, unit: int, finite: Finite | None, wrong: Wrong,
        into: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Have bytes of a file read, and looked at by ``finite``, whole ``unit``s at a time.

        They are kept ``into`` (uint8, as many). What ``watch`` raises passes through, within a
        fraction of a second.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="wanfit-read")
        step = max(unit, AT_ONCE // unit * unit)
        for begin in range(span.start, span.stop, step):
            piece = range(begin, min(begin + step, span.stop))
            first = begin - span.start
            memory = None if into is None else into[first : first + len(piece)]
            found = self._pool.submit(self.fetch, file, piece, unit, finite, memory)
            self._waiting.append((len(piece), found, wrong))
            self._pending += len(piece)
        self._watch.seen(0)
        while self._pending > _LEAD or (self._waiting and self._waiting[0][1].done()):
            self._await_first()

    def finish(self) -> None:
        """Wait until all has been read."""
        while self._waiting:
            self._await_first()

    def close(self) -> None:
        """Stop reading; what was begun and is not finished has not been looked at."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._waiting.clear()
        with self._seeking:  # whose thread reads still has its file
            for file in self._own.values():
                file.close()

    def _await_first(self) -> None:
        nbytes, found, wrong = self._waiting[0]
        while not found.done():
            self._watch.seen(0)
            wait([found], timeout=_WAIT_SECONDS)
        if reason := found.result():
            raise wrong(reason)
        self._waiting.popleft()
        self._pending -= nbytes
        self._watch.seen(nbytes)

    def fetch(
        self, file: io.FileIO, piece: range, unit: int, finite: Finite | None,
        into: torch.Tensor | None,
    ) -> Reason:  # fmt: skip
        """Read a piece ``into`` memory, or only to look at it; any thread may.

        It is looked at while it is in the processor's cache.
        """
        most = len(piece) if finite is None and into is not None else LOOKED_AT
        step = min(max(unit, most // unit * unit), len(piece))
        memory = self._own_memory(step) if into is None else into
        view = memoryview(memory.numpy())  # type: ignore[arg-type]
        try:
            for begin in range(0, len(piece), step):
                size, first = min(step, len(piece) - begin), 0 if into is None else begin
                reason = self._fill(file, view[first : first + size], piece.start + begin)
                if reason:
                    return reason
                if finite is not None and not finite(memory[first : first + size]):
                    return "wild"
        except OSError as error:
            return error
        return ""

    def _own_memory(self, nbytes: int) -> torch.Tensor:
        """Return memory of the present thread; new memory for each piece has to be mapped first."""
        memory: torch.Tensor | None = getattr(self._scratch, "memory", None)
        if memory is None or len(memory) < nbytes:
            memory = self._scratch.memory = torch.empty(nbytes, dtype=torch.uint8)
        return memory

    def _fill(self, file: io.FileIO, view: memoryview, offset: int) -> Reason:
        """Read bytes from a place, as many at once as the disk gives in a fraction of a second."""
        done = 0
        while done < len(view):  # the system may return less than it was asked for
            if self._stop.is_set():
                return "stopped"
            asked, began = self._at_once, time.perf_counter()
            count = self._read_at(file, view[done : done + asked], offset + done)
            if not count:
                return "short"
            done += count
            took = time.perf_counter() - began
            if took > _SLOW_SECONDS:
                self._at_once = max(_READ_LEAST, asked // 2)
            elif took < _QUICK_SECONDS and count == asked:
                self._at_once = min(_READ_MOST, asked * 2)
        return ""

    def _read_at(self, file: io.FileIO, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [buffer], offset)
        # Windows reads where a file stands: one of its own, as others move ``file``.
        with self._seeking:
            if self._stop.is_set():
                return 0
            own = self._own.get(str(file.name))
            if own is None:
                own = self._own[str(file.name)] = io.FileIO(file.name, "rb")
            own.seek(offset)
            return own.readinto(buffer) or 0


def copy_read(
    tensors: Iterable[torch.Tensor], targets: Iterable[torch.Tensor], check: Callable[[], object]
) -> None:
    """Copy tensors of the host to others, those of mapped files by reading the files.

    What nobody has looked at is looked at on the way. ``check`` is called several times a second
    and may raise. Raises what the tensors' ``InFile.wrong`` makes of what is wrong with a file.
    """
    pairs = zip(tensors, targets, strict=True)
    found = [(a, b, stored_at(a) if b.is_contiguous() else None) for a, b in pairs]
    new = [there for *_, there in found if there and there[1].span.start in there[0].unseen]
    looker = Looker(Watch(check, new[0][0].watch.read if new else _nothing))
    try:
        for tensor, target, there in found:
            if there is None:
                target.copy_(tensor)
                continue
            file, stored = there
            memory = target.view(-1).view(torch.uint8)
            finite = stored.finite if file.to_look_at(stored) else None
            looker.begin(file.file, stored.span, stored.unit, finite, stored.wrong, memory)
        looker.finish()
    finally:
        looker.close()
    for file, stored in new:
        file.unseen.discard(stored.span.start)


def read_again(tensors: Iterable[torch.Tensor], check: Callable[[], object]) -> None:
    """Have the system read the files of those tensors that are mapped, and keep them for now.

    Raises as ``copy_read`` does.
    """
    looker = Looker(Watch(check))
    try:
        for there in filter(None, map(stored_at, tensors)):
            looker.begin(there[0].file, there[1].span, 1, None, there[1].wrong)
        looker.finish()
    finally:
        looker.close()


class Amount:
    """How many of the bytes that will be read have been, told a few times a second."""

    def __init__(self, table: TensorTable, tell: Callable[[int, int], object]) -> None:
        self._table, self._tell = table, tell
        self._done = self._total = 0
        self._next = 0.0

    def begin(self, sources: Iterable[Source]) -> None:
        """Say what will be read."""
        self._total = sum(self._nbytes(source) for source in sources)
        self.more(0)

    def more(self, nbytes: int) -> None:
        """Add bytes that were read, or need not be."""
        # Scales are read beside their weight.
        self._done = min(self._done + nbytes, self._total)
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _TOLD_SECONDS
            self._tell(self._done, self._total)

    def end(self) -> None:
        """Say that all has been read."""
        self._tell(self._total, self._total)

    def go_on(self, left: int, tell: Callable[[int, int], object]) -> None:
        """Go on with ``left`` bytes to read, and tell somebody else."""
        self._done, self._tell = self._total - left, tell

    def _nbytes(self, source: Source) -> int:
        return self._table.tensors[source.name].nbytes // source.parts


_to_look_at: weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple[MappedFile, ...], Amount]]
_to_look_at = weakref.WeakKeyDictionary()
"""Modules some of whose weights nobody has looked at: in which files, and how much that is."""


def look_later(module: torch.nn.Module, files: tuple[MappedFile, ...], amount: Amount) -> None:
    """Leave the first look at a module's weights in these files to :func:`first_look`."""
    _to_look_at[module] = files, amount


def to_look_at(module: torch.nn.Module) -> bool:
    """Say whether there are weights of a module that nobody has looked at."""
    return module in _to_look_at


@contextmanager
def first_look(
    module: torch.nn.Module, check: Callable[[], object], progress: Callable[[int, int], object]
) -> Iterator[None]:
    """Have all weights of a module looked at by the end of the ``with`` block.

    For modules loaded with ``look_later``; of others nothing is done. What the block copies from
    the file, to a device or to page-locked memory, is looked at on its way, the rest at the end:
    the file is read once. ``check`` and ``progress`` are as for ``load_component``. Raises
    CorruptFile, also in the block, as often as it is tried: what is wrong stays to be looked at.
    """
    files, amount = _to_look_at.get(module, ((), None))
    if amount is None:
        yield
        return
    left = sum(len(file.tensors[start].span) for file in files for start in file.unseen)
    amount.go_on(left, progress)
    for file in files:
        file.watch = Watch(check, amount.more)
    try:
        yield
        _look_at_rest(files, Watch(check, amount.more))
        amount.end()
        del _to_look_at[module]
    finally:
        amount.go_on(left, _nothing)  # who was told of it is to be forgotten
        for file in files:
            file.watch = Watch()


def _look_at_rest(files: Iterable[MappedFile], watch: Watch) -> None:
    looker = Looker(watch)
    try:
        for file in files:
            for start in sorted(file.unseen):
                stored = file.tensors[start]
                # What cannot be wild is read when it is used.
                if stored.numbers is not None:
                    looker.begin(file.file, stored.span, stored.unit, stored.finite, stored.wrong)
        looker.finish()
    finally:
        looker.close()
    for file in files:
        file.unseen.clear()
