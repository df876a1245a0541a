"""The workers of one host: who computes which unit, and what happens when one dies or hangs.

All decisions are made in the thread that asks for a result. A unit whose worker dies goes to
another; one that ended three workers is given up. Running out of memory is the driver's matter: all
workers give back what they hold, and the error goes to the caller, which makes a smaller plan.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import WorkerFailed
from ..journal import versions
from ..sampling import Conditions, Unit
from .child import conditions_message
from .messages import Message
from .process import WorkerProcess
from .weights import Weights

_TICK = 0.05
_START_SECONDS = 180.0
"""How long a worker may take to import its packages. Assumed, not measured on a slow disk."""
_FIRST_SECONDS = 180.0
"""How long it may say nothing in a unit that is new to it: kernels may be compiled. Assumed."""
_QUIET_SECONDS, _QUIET_FACTOR = 15.0, 8.0
"""After that: how long it may say nothing, and how many times the longest pause it has made. It
speaks at every block of the model. Assumed."""
_RELEASE_SECONDS = 30.0
_TRIES = 3

Loaded = Callable[[str, int, int], object]


@dataclass(slots=True)
class _Worker:
    process: WorkerProcess
    name: str
    began: float
    heard: float
    ready: bool = False
    device_name: str = ""
    unit: int | None = None
    kind: tuple[object, ...] = ()
    """Weights and shapes of the unit in work."""
    kinds: set[tuple[object, ...]] = field(default_factory=set)
    """Those of the units that it has finished."""
    weights: set[str] = field(default_factory=set)
    conditions: int = -1
    released: bool = True
    done: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    pause: float = 0.0
    """The longest time between two of its messages within a unit of a kind that it knows."""


@dataclass(slots=True)
class _Job:
    unit: Unit
    weights: Weights
    conditions: int
    lost: int = 0
    """How many workers have ended while they computed it."""
    result: tuple[Tensor, Tensor | None] | None = None


@dataclass(frozen=True, slots=True)
class Experts:
    """Computes units with one expert's weights (``sampling.Elsewhere``)."""

    pool: WorkerPool
    weights: Weights

    def send(self, unit: Unit, conditions: Conditions) -> int:
        """Ask for a unit; return its number."""
        return self.pool.send(unit, self.weights, conditions)

    def result(self, number: int, check: Callable[[], object]) -> tuple[Tensor, Tensor | None]:
        """Wait for a unit's velocity, and for what its blocks added where that was asked for."""
        return self.pool.result(number, check)

    def forget(self) -> None:
        """Give up what has not been taken."""
        self.pool.forget()


class WorkerPool:
    """Workers on ``devices``; a device that is named twice gets two. They start with the pool.

    To be used by one thread at a time. ``quiet_seconds`` says how long a worker may say nothing in
    the middle of a unit; None takes what its own pace suggests.
    """

    def __init__(self, devices: Sequence[str], *, quiet_seconds: float | None = None) -> None:
        self.devices = tuple(devices)
        self.notes: list[str] = []
        """What happened to workers, in words, for the result's warnings."""
        self.loaded: Loaded = lambda *_: None
        self.quiet_seconds = quiet_seconds
        self._events: queue.Queue[tuple[WorkerProcess, Message | None]] = queue.Queue()
        self._workers: list[_Worker] = []
        self._jobs: dict[int, _Job] = {}
        self._waiting: deque[int] = deque()
        self._next = 0
        self._conditions: tuple[int, Conditions | None] = (0, None)
        self._restarts = 2 * len(self.devices)
        self._closed = False
        for number, device in enumerate(self.devices):
            self._start(device, f"{device} (worker {number + 1})")

    # -- what a render asks -------------------------------------------------------------------

    def expert(self, weights: Weights) -> Experts:
        """Return what computes units with these weights."""
        return Experts(self, weights)

    def send(self, unit: Unit, weights: Weights, conditions: Conditions) -> int:
        """Ask for a unit without waiting for it; return its number."""
        if self._conditions[1] is not conditions:
            self._conditions = (self._conditions[0] + 1, conditions)
        self._next += 1
        self._jobs[self._next] = _Job(unit, weights, self._conditions[0])
        self._waiting.append(self._next)
        self._dispatch()
        return self._next

    def result(self, number: int, check: Callable[[], object]) -> tuple[Tensor, Tensor | None]:
        """Wait for a unit. ``check`` is called meanwhile, several times a second.

        Raises torch.OutOfMemoryError or MemoryError where a worker ran out of memory, and
        WorkerFailed where a unit cannot be computed; all workers are then free of their weights.
        """
        while (job := self._jobs[number]).result is None:
            if not self._workers:
                raise WorkerFailed(f"No worker is left: {'; '.join(self.notes)}")
            self._pump(_TICK)
            check()
        del self._jobs[number]
        return job.result

    def forget(self) -> None:
        """Give up every unit whose result has not been taken; workers stop at the next block."""
        self._waiting.clear()
        for worker in self._workers:
            if worker.unit is not None:
                worker.process.send({"type": "cancel", "numbers": [worker.unit]})
        self._jobs.clear()

    def release(self, *, everything: bool = False) -> None:
        """Have all workers take their weights off their devices, and wait until they have.

        With ``everything`` they also forget the modules and conditions they hold. A worker that
        does not answer is ended.
        """
        self.forget()
        waited = [worker for worker in self._workers if worker.ready]
        for worker in waited:
            worker.released = False
            worker.process.send({"type": "release", "everything": everything})
            if everything:
                worker.conditions = -1
        if everything:
            self._conditions = (self._conditions[0] + 1, None)
        end = time.perf_counter() + _RELEASE_SECONDS
        while any(not worker.released for worker in waited if worker in self._workers):
            self._pump(_TICK)
            if time.perf_counter() > end:
                for worker in [w for w in self._workers if not w.released]:
                    self._lose(worker, "did not give back its memory")

    def describe(self) -> list[dict[str, Any]]:
        """Return what each worker has done: device, name, units, seconds and peak bytes."""
        return [
            {
                "device": worker.process.device, "name": worker.device_name, "units": worker.done,
                "seconds": round(worker.seconds, 3), "peak_bytes": worker.peak_bytes,
            }
            for worker in self._workers
        ]  # fmt: skip

    @property
    def pids(self) -> list[int]:
        """Return the numbers of the workers' processes."""
        return [worker.process.pid for worker in self._workers]

    @property
    def usable(self) -> bool:
        """Whether all its workers are there."""
        return not self._closed and len(self._workers) == len(self.devices)

    def begin(self, loaded: Loaded) -> None:
        """Begin a render: what is counted and said is its own, and so are the new starts.

        ``loaded`` is called with what the first worker reads (component, bytes done, bytes in all).
        """
        self.notes, self.loaded = [], loaded
        self._restarts = 2 * len(self.devices)
        for worker in self._workers:
            worker.done, worker.seconds, worker.peak_bytes = 0, 0.0, 0

    def close(self) -> None:
        """End all workers."""
        self._closed = True
        self.forget()
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.process.send({"type": "stop"})
        for worker in workers:
            worker.process.stop()

    # -- how the work goes on -----------------------------------------------------------------

    def _start(self, device: str, name: str) -> None:
        now = time.perf_counter()
        process = WorkerProcess(device, lambda which, message: self._events.put((which, message)))
        self._workers.append(_Worker(process, name, now, now))

    def _pump(self, seconds: float) -> None:
        """Wait so long for something to happen; look after the workers and hand out units."""
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            pass
        else:
            self._hear(*event)
            while not self._events.empty():
                self._hear(*self._events.get())
        self._look_after()
        self._dispatch()

    def _hear(self, process: WorkerProcess, message: Message | None) -> None:
        worker = next((one for one in self._workers if one.process is process), None)
        if worker is None:
            return  # one that was ended
        if message is None:
            self._lose(worker, "has ended")
            return
        now = time.perf_counter()
        if worker.unit is not None and worker.kind in worker.kinds:
            worker.pause = max(worker.pause, now - worker.heard)
        worker.heard = now
        header, tensors = message
        kind = header["type"]
        if kind == "hello":
            self._greet(worker, header)
        elif kind == "loaded":
            if worker is self._workers[0]:
                self.loaded(header["component"], header["done"], header["total"])
        elif kind == "note":
            self._say(header["text"])
        elif kind == "released":
            worker.released = True
        elif kind in ("done", "cancelled", "failed") and worker.unit == header["number"]:
            worker.unit = None
            if kind == "done":
                self._take(worker, header, tensors)
            elif kind == "failed" and header["number"] in self._jobs:
                self._fail(worker, header)

    def _greet(self, worker: _Worker, header: dict[str, Any]) -> None:
        """Compare versions and devices before the first unit: other ones give other bits."""
        own = versions()
        others = [
            f"{k} {v} (here {own.get(k)})" for k, v in header["versions"].items() if own.get(k) != v
        ]
        worker.device_name = header["device_name"]
        first = self._workers[0].device_name or worker.device_name
        if others:
            self.close()
            raise WorkerFailed(
                f"The worker on {worker.name} has other versions: {', '.join(others)}. Start it "
                "from the same environment."
            )
        if worker.device_name != first:
            self._say(
                f"{worker.name} is a {worker.device_name}, the first worker's a {first}: their "
                "bits may differ."
            )
        worker.ready = True

    def _take(self, worker: _Worker, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        worker.done += 1
        worker.kinds.add(worker.kind)
        worker.seconds += header["seconds"]
        worker.peak_bytes = max(worker.peak_bytes, header["peak_bytes"])
        job = self._jobs.get(header["number"])
        if job is not None:
            job.result = tensors["velocity"], tensors.get("residual")

    def _fail(self, worker: _Worker, header: dict[str, Any]) -> None:
        """Raise what went wrong in a worker: it would go wrong on the others too."""
        why, text = header["why"], f"{header['text']} (on {worker.name})"
        with contextlib.suppress(WorkerFailed):  # the first failure is the one to tell
            self.release()
        if why == "oom":
            raise torch.OutOfMemoryError(text)
        if why == "host_oom":
            raise MemoryError(text)
        raise WorkerFailed(f"{header['error']}: {text}")

    def _look_after(self) -> None:
        now = time.perf_counter()
        for worker in list(self._workers):
            quiet = now - worker.heard
            if not worker.ready and quiet > _START_SECONDS:
                self._lose(worker, f"did not start within {quiet:.0f} s")
            elif worker.unit is not None and quiet > self._patience(worker):
                self._lose(worker, f"said nothing for {quiet:.0f} s")

    def _patience(self, worker: _Worker) -> float:
        """Return how long a worker may say nothing in the middle of a unit."""
        if self.quiet_seconds is not None:
            return self.quiet_seconds
        if worker.kind not in worker.kinds:
            return _FIRST_SECONDS
        return max(_QUIET_SECONDS, _QUIET_FACTOR * worker.pause)

    def _lose(self, worker: _Worker, why: str) -> None:
        """End a worker; its unit goes to another, and a new one is started in its place."""
        self._workers.remove(worker)
        worker.process.kill()
        job = None if worker.unit is None else self._jobs.get(worker.unit)
        went = ""
        if worker.unit is not None and job is not None:
            job.lost += 1
            went = "; its unit was given to another"
            self._waiting.appendleft(worker.unit)
        self._say(f"{worker.name} {why}{went}.")
        again = self._restarts > 0 and not self._closed
        if again:
            self._restarts -= 1
            self._start(worker.process.device, worker.name)
        if job is not None and job.lost >= _TRIES:
            self.forget()
            raise WorkerFailed(f"A unit of work ended {job.lost} workers; the last one {why}.")
        if not self._workers:
            self.forget()
            raise WorkerFailed(f"No worker is left: {'; '.join(self.notes)}")

    def _say(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _dispatch(self) -> None:
        """Give waiting units, in their order, to workers that have none."""
        for worker in self._workers:
            if not self._waiting:
                return
            if worker.ready and worker.unit is None and worker.released:
                self._give(worker, self._waiting.popleft())

    def _give(self, worker: _Worker, number: int) -> None:
        job = self._jobs[number]
        key, conditions = self._conditions
        if job.weights.key not in worker.weights:
            worker.weights.add(job.weights.key)
            plain = {"type": "weights", "key": job.weights.key, "weights": job.weights.plain()}
            worker.process.send(plain)
        if worker.conditions != job.conditions:
            assert conditions is not None and job.conditions == key
            worker.conditions = key
            worker.process.send(*conditions_message(conditions, key))
        unit = job.unit
        header = {
            "type": "unit", "number": number, "weights": job.weights.key, "conditions": key,
            "indices": unit.indices, "middle": unit.middle, "second": unit.second,
            "keep": unit.keep,
        }  # fmt: skip
        tensors = {"latents": unit.latents, "timestep": unit.timestep}
        if unit.residual is not None:
            tensors["residual"] = unit.residual
        # To the CPU now, in the driver's thread and stream: the latents are written over later.
        worker.unit, worker.heard = number, time.perf_counter()
        worker.kind = (job.weights.key, *unit.latents.shape, unit.residual is None)
        worker.process.send(header, {name: tensor.to("cpu") for name, tensor in tensors.items()})


_pools: list[WorkerPool] = []


def worker_pool(devices: Sequence[str]) -> WorkerPool:
    """Return this process's workers on ``devices``, started if they are not there.

    They stay for the next render until ``close_workers`` or other devices are asked for.
    """
    found = next((pool for pool in _pools if pool.devices == tuple(devices) and pool.usable), None)
    if found is None:
        close_workers()
        found = WorkerPool(devices)
        _pools.append(found)
    return found


def close_workers() -> None:
    """End all workers of this process."""
    while _pools:
        _pools.pop().close()


atexit.register(close_workers)
