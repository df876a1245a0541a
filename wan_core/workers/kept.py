"""This process's workers as a render sees them: kept to the next one, ended with the process."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..sampling import Conditions, Kept, Made, Unit
from .pool import WorkerPool
from .weights import Weights


@dataclass(frozen=True, slots=True)
class Experts:
    """Computes units with one expert's weights (``sampling.Elsewhere``)."""

    pool: WorkerPool
    weights: Weights

    def send(self, unit: Unit, conditions: Conditions, kept: Kept | None = None) -> int:
        """Ask for a unit; return its number."""
        return self.pool.send(unit, self.weights, conditions, kept)

    def result(self, number: int, check: Callable[[], object]) -> Made:
        """Wait for a unit's velocity, and for what its blocks added where that was asked for."""
        return self.pool.result(number, check)

    def forget(self) -> None:
        """Give up what has not been taken."""
        self.pool.forget()


_pools: list[WorkerPool] = []


def worker_pool(devices: Sequence[str], gang: int = 1) -> WorkerPool:
    """Return this process's workers on ``devices``, started if they are not there.

    They stay for the next render until ``close_workers`` or other devices are asked for.
    """
    wanted = tuple(devices), gang
    found = next((p for p in _pools if (p.devices, p.gang) == wanted and p.usable), None)
    if found is None:
        close_workers()
        found = WorkerPool(devices, gang)
        _pools.append(found)
    return found


def close_workers() -> None:
    """End all workers of this process."""
    while _pools:
        _pools.pop().close()


atexit.register(close_workers)
