"""Workers that are threads of the test: the real worker and messages, without its process."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from support.thread_gang import ThreadGroup
from wan_core.workers import WorkerPool
from wan_core.workers.child import Cancelled, Worker
from wan_core.workers.messages import Message, read_message, write_message
from wan_core.workers.process import End


class Killed(BaseException):
    """Ends the thread of a worker, as SIGKILL ends a process."""


def _through_bytes(header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> Message:
    stream = io.BytesIO()
    write_message(stream, header, tensors)
    stream.seek(0)
    message = read_message(stream)
    assert message is not None
    return message


class ThreadWorker:
    """Stands for ``WorkerProcess``. ``trouble``, if set on the class, is called with the number of
    each unit before it is computed, and may raise; so may ``looked``, called at every block."""

    trouble: Callable[[ThreadWorker, int], object] | None = None
    looked: Callable[[ThreadWorker], object] | None = None
    made: list[ThreadWorker] = []
    last = End()
    """How those that die have ended."""

    def __init__(self, device: str, told: Callable[[Any, Message | None], object]) -> None:
        self.device, self.pid, self._told = device, 0, told
        self.dead = threading.Event()
        self.units: list[dict[str, Any]] = []
        self.group: ThreadGroup | None = None
        self._worker = Worker(device, self._answer, self._join)
        self._worker.check = self._check  # type: ignore[method-assign]
        self._real_check = Worker.check
        threads = torch.get_num_threads()
        self.thread = threading.Thread(target=self._run, args=(threads,), daemon=True)
        type(self).made.append(self)
        self.thread.start()

    def _join(self, *where: Any) -> ThreadGroup:
        self.group = ThreadGroup(*where)
        if self.dead.is_set():
            self.group.meeting.break_off()
        return self.group

    def _check(self) -> None:
        if self.dead.is_set():
            raise Killed
        if type(self).looked is not None:
            type(self).looked(self)
        self._real_check(self._worker)

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        given = self._worker._given

        def watched(header: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
            self.units.append(header)
            if type(self).trouble is not None:
                type(self).trouble(self, header["number"])
            return given(header, tensors)

        self._worker._given = watched  # type: ignore[method-assign]
        with contextlib.suppress(Killed):
            self._worker.serve()
        if self.group is not None:
            self.group.meeting.break_off()
        if not self.dead.is_set():
            self.dead.set()
            self._told(self, None)

    def _answer(self, header: Mapping[str, Any], tensors: Any = None) -> None:
        if self.dead.is_set():
            raise Killed
        self._told(self, _through_bytes(header, tensors))

    def send(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        message = _through_bytes(header, tensors)
        if not self._worker.hears_now(message[0]):
            self._worker.inbox.put(message)

    def die(self) -> None:
        """End as a process does that the system kills: the driver learns of it by itself."""
        raise Killed

    def end(self) -> End:
        return type(self).last

    def kill(self) -> None:
        self.dead.set()
        if self.group is not None:
            self.group.meeting.break_off()
        self._worker.inbox.put(({"type": "stop"}, {}))

    def stop(self) -> None:
        self._worker.inbox.put(({"type": "stop"}, {}))


__all__ = ["Cancelled", "Killed", "ThreadWorker"]


def dies(worker: ThreadWorker) -> None:
    """End a worker as a process that is killed ends."""
    worker.die()


def hangs(worker: ThreadWorker) -> None:
    """Have a worker say nothing any more, until it is ended."""
    while not worker.dead.wait(0.05):
        pass
    worker.die()


def meets_at_its_fourth_look(
    threads: type[ThreadWorker], fate: Callable[[ThreadWorker], None], pool: WorkerPool
) -> list[float]:
    """Have the second worker meet its fate at its fourth look for an interrupt in a gang's pass.

    Only then is it short how long a gang may say nothing: at other times a busy machine may make
    one pause. Returns the times of its looks, which fill as they come.
    """
    looks: list[float] = []

    def look(worker: ThreadWorker) -> None:
        if worker is threads.made[1] and worker._worker._together is not None:
            looks.append(time.perf_counter())
            if len(looks) == 4:
                pool.quiet_seconds = 1.0
                try:
                    fate(worker)
                finally:
                    pool.quiet_seconds = None

    threads.looked = look
    return looks
