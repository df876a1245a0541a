"""Moves a module's tensors between devices, and restores exactly the tensors it had before.

Each change to a module is recorded as a step that undoes it. The steps run in reverse order, all of
them, also when one fails.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import processors
from ..memory import RING
from .dtypes import any_wild
from .mapped import InFile, Looker, MappedFile, Reason, Watch, is_mapped, stored_at
from .page_lock import Slab

_RING_FROM = 256 * 2**20  # bytes; below, setting the ring up takes longer than it saves
_SLOTS = 16
"""Pieces of the ring: as many as its threads fill, and more that are on their way."""
_PIECE = RING // _SLOTS
_FEWEST_THREADS, _MOST_THREADS = 4, 12
"""Threads that fill the ring, half as many as there are processors. Fewer than four leave a disk
idle; on two processors two to eight read a cached file at the same pace. More would leave no piece
of the ring on its way. The most is not measured."""
_AHEAD = 2 * _SLOTS
"""Pieces that are asked for and have not been sent: no more memory of the device is taken ahead."""
_CHECK_SECONDS = 0.05
_homes: Any = WeakTensorKeyDictionary()
"""For parameters on a device: their tensor in the mapped file they came from."""


class Undo:
    """A stack of steps that undo changes; all of them run, in reverse order, whatever happens.

    Used as a context manager. An error of the body is raised as it is, and errors of the steps are
    added to it as notes. If only steps failed, the first error is raised with the others as notes.
    An interrupt (an exception that is no ``Exception``) goes before all errors, and is raised after
    the last step.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def push(self, step: Callable[[], object]) -> None:
        """Add a step. It runs before all steps that were added earlier."""
        self._steps.append(step)

    def run(self) -> list[BaseException]:
        """Run and forget every step; return what they raised, in order."""
        raised: list[BaseException] = []
        while self._steps:
            try:
                self._steps.pop()()
            except BaseException as error:  # noqa: BLE001 - the remaining steps must still run
                raised.append(error)
        return raised

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        raised = self.run()
        interrupts = [one for one in raised if not isinstance(one, Exception)]
        main = error if error is not None and not isinstance(error, Exception) else None
        main = main or (interrupts[0] if interrupts else None) or error
        main = main or (raised[0] if raised else None)
        if main is None:
            return
        for one in raised:
            if one is not main:
                main.add_note(f"While detaching: {type(one).__name__}: {one}")
        if main is not error:
            raise main


def move(
    module: nn.Module, device: torch.device | str, check: Callable[[], object] = lambda: None
) -> None:
    """Move all parameters and buffers to ``device``; on an error all stay where they were.

    Parameters stay the same objects. Non-persistent buffers are moved too. ``check`` is called
    several times a second on the way to a CUDA device; what it raises stops the move. Weights that
    are in a mapped file are read from there, and looked at where nobody has: CorruptFile is raised.
    """
    undo = Undo()
    remember(undo, module)
    target = torch.device(device)
    try:
        parameters = list(module.parameters())
        # Weights are only read: those that came from a mapped file need no copy to come home.
        present = [_home_of(p) if target.type == "cpu" else p.data for p in parameters]
        moved = _sent_all(present, device, check)
        for parameter, before, data in zip(parameters, present, moved, strict=True):
            if target.type != "cpu" and is_mapped(before):
                _homes[parameter] = before
            parameter.data = data
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = _sent(buffer, device)
    except BaseException as error:
        undo.__exit__(type(error), error, None)
        raise


def lies_in_files(module: nn.Module) -> bool:
    """Say whether nearly all of a module is in mapped files, or came from there to its device."""
    inside = whole = 0
    for parameter in module.parameters():
        whole += parameter.nbytes
        if is_mapped(_home_of(parameter)):
            inside += parameter.nbytes
    return inside > 0.9 * whole


def _home_of(parameter: nn.Parameter) -> Tensor:
    """Return the mapped tensor that a parameter on a device came from, or its present one."""
    home: Tensor | None = _homes.get(parameter)
    data = parameter.data
    same = home is not None and (home.dtype, home.shape) == (data.dtype, data.shape)
    return home if home is not None and same else data


def _sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    return tensor.to(device)


def _sent_all(
    tensors: list[Tensor], device: torch.device | str, check: Callable[[], object]
) -> list[Tensor]:
    """Return the tensors on ``device``; many bytes go to CUDA through page-locked pieces."""
    target = torch.device(device)
    on_host = [t for t in tensors if t.device.type == "cpu" and t.is_contiguous()]
    if target.type != "cuda" or sum(t.nbytes for t in on_host) < _RING_FROM:
        return [_sent(tensor, device) for tensor in tensors]
    through = {id(tensor) for tensor in on_host}
    mine = [index for index, tensor in enumerate(tensors) if id(tensor) in through]
    homes = {index: stored_at(tensors[index]) for index in mine}
    out = [
        torch.empty_like(t, device=target) if id(t) in through else _sent(t, device)
        for t in tensors
    ]
    # In the order of the file, so that a disk reads forward.
    mine.sort(key=lambda index: _place(homes[index]))
    _Ring(target).carry(
        (piece for i in mine for piece in _cut(tensors[i], out[i], homes[i])), check
    )
    for there in filter(None, homes.values()):
        there[0].unseen.discard(there[1].span.start)
    return out


def each_sent(
    tensors: Iterable[Tensor], device: torch.device, use: Callable[[int, Tensor], object],
    watch: Watch,
) -> None:  # fmt: skip
    """Send tensors of mapped files to a CUDA device; ``use`` gets the number of each, and it there.

    A few are there at a time. What nobody has looked at is left for ``use`` to look at. Raises what
    is wrong with a file as ``InFile.wrong`` has it.
    """
    ring = _Ring(device)
    homes = [(tensor, stored_at(tensor)) for tensor in tensors]

    def pieces() -> Iterator[_Piece]:
        for index, (tensor, home) in enumerate(homes):
            there = torch.empty_like(tensor, device=device)
            ring.begin_to_write()
            yield from _cut(tensor, there, home, partial(use, index, there))

    files = {home[0] for _, home in homes if home}
    try:
        for file in files:
            file.watch = watch
        ring.carry(pieces(), watch.check)
    finally:
        for file in files:
            file.watch = Watch()


def _place(home: tuple[MappedFile, InFile] | None) -> tuple[str, int]:
    return ("", 0) if home is None else (str(id(home[0])), home[1].span.start)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)


@dataclass(slots=True)
class _Whole:
    """A tensor on its way in pieces, and what is done where it goes once all have been sent."""

    where: Tensor
    pieces: int
    looks: InFile | None = None
    """Says how it is looked at, where nobody has."""
    use: Callable[[], object] | None = None

    def has_all(self) -> bool:
        """Count a piece that has been sent; say whether it was the last one."""
        self.pieces -= 1
        return not self.pieces


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Some bytes of a tensor on the host, and where they go; in a mapped file, what it is there."""

    source: Tensor
    target: Any
    file: MappedFile | None = None
    tensor: InFile | None = None
    begin: int = 0
    whole: _Whole | None = None

    def fetch(self, looker: Looker, into: Tensor) -> Reason:
        """Bring it to page-locked memory; a mapped file is read, not touched."""
        if self.file is None or self.tensor is None:
            into.copy_(self.source)
            return ""
        span = range(self.begin, self.begin + len(into))
        return looker.fetch(self.file.file, span, self.tensor.unit, None, into)

    def arrived(self, reason: Reason) -> None:
        """Raise what is wrong with it; else tell who follows the first look."""
        if self.file is None or self.tensor is None:
            return
        if reason:
            raise self.tensor.wrong(reason)
        if self.tensor.span.start in self.file.unseen:
            self.file.watch.read(len(self.source))


def _cut(
    source: Tensor, target: Tensor, home: tuple[MappedFile, InFile] | None,
    use: Callable[[], object] | None = None,
) -> Iterator[_Piece]:  # fmt: skip
    """Cut a tensor into pieces that fit into the ring."""
    file, tensor = home or (None, None)
    start = 0 if tensor is None else tensor.span.start
    here, there = _bytes_of(source), _bytes_of(target)
    whole = _Whole(there, -(-len(here) // _PIECE), use=use)
    if use is None and file is not None and tensor is not None and file.to_look_at(tensor):
        whole.looks = tensor
    for begin in range(0, len(here), _PIECE):
        part = slice(begin, begin + _PIECE)
        yield _Piece(here[part], there[part], file, tensor, start + begin, whole)


def _threads() -> int:
    return min(max(processors() // 2, _FEWEST_THREADS), _MOST_THREADS)


class _Ring:
    """Page-locked memory in a few pieces, filled by threads and emptied by the device.

    Pageable memory crosses the bus at a fraction of its speed: while some pieces are on their way,
    the next ones are read from the file or copied. What nobody has looked at is looked at by the
    device, where it has arrived: threads that only read hardly ever wait for each other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.begin_to_write()  # what is sent was allocated by the present stream
        self._slab = Slab(_PIECE * _SLOTS, torch.device("cpu"))
        self._slab.lock()
        self._free: queue.SimpleQueue[tuple[Tensor, Any]] = queue.SimpleQueue()
        for begin in range(0, _PIECE * _SLOTS, _PIECE):
            self._free.put((self._slab.memory[begin : begin + _PIECE], None))
        self._asked: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._sent: queue.SimpleQueue[tuple[_Piece, Reason, BaseException | None]]
        self._sent = queue.SimpleQueue()
        self._over = threading.Event()
        self._looked: list[tuple[InFile, Tensor]] = []
        """Tensors, and whether one of their numbers is wild: a bool on the device."""

    def carry(self, pieces: Iterable[_Piece], check: Callable[[], object]) -> None:
        """Copy each piece to its target; returns when all are there and have been looked at.

        Raises what ``InFile.wrong`` makes of a tensor that cannot be read, or is wild.
        """
        looker, count = Looker(Watch()), _threads()
        try:
            with ThreadPoolExecutor(count, thread_name_prefix="wanfit-send") as pool:
                try:
                    for _ in range(count):
                        pool.submit(self._send_what_is_asked, looker)
                    self._follow(pieces, check)
                finally:
                    self._over.set()
                    looker.close()  # those that still read stop
                    for _ in range(count):
                        self._asked.put(None)
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._judge()
        finally:
            self._stream.synchronize()
            self._slab.unlock()

    def begin_to_write(self) -> None:
        """Wait with what is asked for next until the present stream's work has ended."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def _follow(self, pieces: Iterable[_Piece], check: Callable[[], object]) -> None:
        """Ask for the pieces, and take note of those that have been sent."""
        waiting = 0
        for piece in pieces:
            self._asked.put(piece)
            waiting += 1
            check()
            while waiting >= _AHEAD:
                waiting -= self._take(check)
        while waiting:
            waiting -= self._take(check)

    def _take(self, check: Callable[[], object]) -> int:
        """Take note of a piece that has been sent; return how many that were, after a while 0."""
        check()
        try:
            piece, reason, failed = self._sent.get(timeout=_CHECK_SECONDS)
        except queue.Empty:
            return 0
        if failed is not None:
            raise failed
        piece.arrived(reason)
        if piece.whole is not None and piece.whole.has_all():
            self._use(piece.whole)
        return 1

    def _use(self, whole: _Whole) -> None:
        """Have the device look at a tensor; nobody waits for what it finds before all are sent."""
        if whole.looks is None and whole.use is None:
            return
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        with torch.no_grad():
            if whole.looks is not None and whole.looks.numbers is not None:
                found = [any_wild(numbers) for numbers in whole.looks.numbers(whole.where)]
                self._looked += [(whole.looks, wild) for wild in found]
            if whole.use is not None:
                whole.use()

    def _judge(self) -> None:
        if not self._looked:
            return
        found = torch.stack([wild for _, wild in self._looked]).tolist()
        for (tensor, _), wild in zip(self._looked, found, strict=True):
            if wild:
                raise tensor.wrong("wild")

    def _send_what_is_asked(self, looker: Looker) -> None:
        while (piece := self._asked.get()) is not None and not self._over.is_set():
            reason: Reason = ""
            failed: BaseException | None = None
            try:
                reason = self._send(piece, looker)
            except BaseException as error:  # noqa: BLE001 - raised by who asked for the piece
                failed = error
            self._sent.put((piece, reason, failed))

    def _send(self, piece: _Piece, looker: Looker) -> Reason:
        memory, sent = self._free.get()
        try:
            if sent is not None:
                sent.synchronize()  # the copy that read this piece last
            with torch.no_grad():
                here = memory[: len(piece.source)]
                if reason := piece.fetch(looker, here):
                    return reason
                with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                    piece.target.copy_(here, non_blocking=True)
                    sent = self._stream.record_event()
            return ""
        finally:
            self._free.put((memory, sent))


def give_back_freed() -> None:
    """Return memory that was freed to the system, where the C library keeps it (glibc).

    A VAE that is dropped otherwise leaves 0.4 GiB to the process: its tensors are too small for
    mappings of their own. Takes milliseconds.
    """
    with suppress(OSError, AttributeError, TypeError):  # no such library, or not in this one
        ctypes.CDLL(None).malloc_trim(0)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the module's first tensor, or the CPU if it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def remember(undo: Undo, module: nn.Module) -> None:
    """Push a step that restores the module's present parameters, their tensors, and its buffers."""
    slots = [(owner, dict(owner._parameters), dict(owner._buffers)) for owner in module.modules()]
    tensors = [(parameter, parameter.data) for parameter in module.parameters()]

    def restore() -> None:
        for parameter, data in tensors:
            parameter.data = data
        for owner, parameters, buffers in slots:
            owner._parameters.update(parameters)
            owner._buffers.update(buffers)

    undo.push(restore)
