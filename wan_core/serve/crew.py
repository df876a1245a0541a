"""Who carries jobs out, and the loop that hands them out: the same for a file, a server, a cluster.

A ``Crew`` has hands; each has one job at a time, so that nothing is sent before somebody is free. A
``Work`` knows which job comes next and what to do with one that failed or whose hand died.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from .carry import Carrier, Outcome
from .jobs import BatchJob

STOP_SECONDS = 30.0
"""A job that was told to stop and has not by then hangs; what carries it out is killed."""

IDLE_SECONDS = 60.0
"""So long a hand keeps its cards while no job waits; about what it takes to load a model again (see
docs/cluster.md). Assumed, not measured."""


class Hand:
    """One that carries out a job at a time; ``group`` is the model that it has open."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.group = ""
        self.job: BatchJob | None = None
        self.told_to_stop: float | None = None
        """When its job was told to stop, on the monotonic clock; None while the job is wanted."""

    def hangs(self) -> bool:
        """Return whether its job was told to stop so long ago that it never will."""
        told = self.told_to_stop
        return told is not None and time.monotonic() - told > STOP_SECONDS


class Work(Protocol):
    """Where jobs come from, and where their outcomes go. Called from one thread."""

    def waiting(self) -> int:
        """Return how many jobs could begin now."""

    def take(self, group: str) -> BatchJob | None:
        """Return the next job for a hand that has the model ``group`` open."""

    def settle(self, job: BatchJob, outcome: Outcome) -> None:
        """Note what became of a job; it may be waiting again after that."""

    def rest(self) -> bool:
        """With nothing in work: wait a moment for more, or return False where none will come."""


class Crew(Protocol):
    """Those that carry jobs out."""

    def free(self, waiting: int) -> Sequence[Hand]:
        """Return the hands without a job. So many jobs are waiting."""

    def begin(self, hand: Hand, job: BatchJob) -> None:
        """Give a job to a free hand; never waits for it."""

    def wait(self, seconds: float) -> list[tuple[BatchJob, Outcome]]:
        """Return the jobs that ended, after at most about so long where none does."""

    def close(self) -> None:
        """End what still runs; journals stay, so that jobs in work can be gone on with."""


Progress = Callable[[int, int], object]
"""Called with (a job's number, percent)."""


def carry_out(work: Work, crew: Crew, pause: float = 0.5) -> None:
    """Hand out jobs until none is left. The crew is closed in any case."""
    busy = 0
    try:
        while True:
            for hand in crew.free(work.waiting()):
                job = work.take(hand.group)
                if job is None:
                    break
                hand.group, hand.job = job.group, job
                crew.begin(hand, job)
                busy += 1
            if not busy:
                if not work.waiting() and not work.rest():
                    return
                if not crew.free(work.waiting()):  # a cluster whose machines are still to come
                    time.sleep(pause)
                continue
            for job, outcome in crew.wait(pause):
                busy -= 1
                work.settle(job, outcome)
    finally:
        crew.close()


class Here:
    """One hand, which is this process: a job is carried out where it is waited for."""

    def __init__(
        self,
        progress: Progress | None = None,
        stopped: Callable[[int], bool] | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        self._hand = Hand("here")
        self._progress, self._stopped = progress, stopped
        self._carrier = Carrier() if carrier is None else carrier

    def free(self, waiting: int) -> Sequence[Hand]:
        """Return the hand, unless it has a job."""
        return () if self._hand.job is not None else (self._hand,)

    def begin(self, hand: Hand, job: BatchJob) -> None:
        """Keep the job until it is waited for."""
        hand.job = job

    def wait(self, seconds: float) -> list[tuple[BatchJob, Outcome]]:
        """Carry the job out."""
        job, progress, stopped = self._hand.job, self._progress, self._stopped
        if job is None:
            return []
        number = job.number
        outcome = self._carrier.carry_out(
            job,
            None if progress is None else lambda percent: progress(number, percent),
            None if stopped is None else lambda: stopped(number),
        )
        self._hand.job = None
        return [(job, outcome)]

    def close(self) -> None:
        """Nothing runs beside this."""
