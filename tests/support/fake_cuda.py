"""A CUDA of streams and events on the CPU, in which every order that is allowed can happen.

Work on a stream is kept until something waits for it. ``late`` streams run only then; the others
run at once, as far as the events they wait for let them. An order that the code forgot to demand is
so seen as wrong bytes, whichever of the two streams is the slow one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class FakeCuda:
    """Stands for ``torch.cuda``: two streams, one that computes and one made by ``Stream()``."""

    def __init__(self, late: str) -> None:
        self.late = late
        self.compute = Stream(self, "compute")
        self.streams = [self.compute]
        self._current = threading.local()
        self.lock = threading.RLock()

    def Stream(self, device: Any = None) -> Stream:
        self.streams.append(Stream(self, "copy"))
        return self.streams[-1]

    def Event(self) -> Event:
        return Event(self)

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self._current, "stream", self.compute)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = self.compute

    def run(self) -> None:
        """Run what may run without anybody waiting for it."""
        with self.lock:
            while any(stream.step() for stream in self.streams if stream.name != self.late):
                pass

    def run_until(self, done: Callable[[], bool]) -> None:
        """Run what must run, the late stream last, until something is done."""
        with self.lock:
            order = sorted(self.streams, key=lambda stream: stream.name == self.late)
            while not done():
                assert any(stream.step() for stream in order), "a wait that never ends"


class Stream:
    """Work in order; each is a function, or an event's mark that must be set first."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name
        self.work: deque[Callable[[], bool]] = deque()

    def add(self, work: Callable[[], object]) -> None:
        def always() -> bool:
            work()
            return True

        with self.cuda.lock:
            self.work.append(always)
        self.cuda.run()

    def step(self) -> bool:
        if not self.work or not self.work[0]():
            return False
        self.work.popleft()
        return True

    def wait_event(self, event: Event) -> None:
        mark = event.mark  # the last record before this call; none: nothing to wait for
        with self.cuda.lock:
            self.work.append(lambda: mark is None or mark.is_set())
        self.cuda.run()

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.cuda)
        event.record(other)
        self.wait_event(event)

    def record_event(self) -> Event:
        event = Event(self.cuda)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.cuda.run_until(lambda: not self.work)


class Event:
    """A place in a stream's work."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.mark: threading.Event | None = None

    def record(self, stream: Stream | None = None) -> None:
        mark = self.mark = threading.Event()
        (stream or self.cuda.current_stream()).add(mark.set)

    def synchronize(self) -> None:
        mark = self.mark
        if mark is not None:
            self.cuda.run_until(mark.is_set)


class DeviceMemory:
    """A buffer on the device: copies into it are work of the current stream."""

    def __init__(self, cuda: FakeCuda, memory: Tensor) -> None:
        self.cuda, self.memory = cuda, memory

    def __getitem__(self, part: slice) -> DeviceMemory:
        return DeviceMemory(self.cuda, self.memory[part])

    def copy_(self, source: Tensor, non_blocking: bool = False) -> None:
        assert non_blocking and len(source) == len(self.memory)
        self.cuda.current_stream().add(lambda: self.memory.copy_(source))


def wiped(nbytes: int) -> Tensor:
    """Bytes that belong to no block."""
    return torch.full((nbytes,), 255, dtype=torch.uint8)
