"""This process's workers as a render sees them: kept to the next one, ended with the process."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..memory import Card
from ..sampling import Conditions, Kept, Made, Unit
from .pool import WorkerPool
from .weights import Weights


@dataclass(frozen=True, slots=True)
class Experts:
    """Computes units with one expert's weights (``sampling.Elsewhere``)."""

    pool: WorkerPool
    weights: Weights
    begun: Callable[[], object] = lambda: None
    """Called when a unit is done, as its weights are in their place then."""

    def send(self, unit: Unit, conditions: Conditions, kept: Kept | None = None) -> int:
        """Ask for a unit; return its number."""
        return self.pool.send(unit, self.weights, conditions, kept)

    def result(self, number: int, check: Callable[[], object]) -> Made:
        """Wait for a unit's velocity, and for what its blocks added where that was asked for."""
        made = self.pool.result(number, check)
        self.begun()
        return made

    def forget(self) -> None:
        """Give up what has not been taken."""
        self.pool.forget()


_pools: list[WorkerPool] = []
_lock = threading.RLock()
"""For ``_pools``, and whose they are."""
_held: list[str] = []
"""One list for this process and its pools: what is taken out counts at once."""


def hold_cards(devices: Sequence[str]) -> None:
    """Have the workers on these cards wait, until ``join_card``: another program uses them still.

    A unit waits with them where no other worker can compute it. May be called from any thread.
    """
    _held[:] = devices


def join_card(device: str) -> None:
    """Have a card's workers compute from now on. May be called from any thread."""
    if device in _held:
        _held.remove(device)


def when_joined(cards: tuple[Card, ...]) -> tuple[Card, ...]:
    """Return the cards as they will be: one that is held with as much free memory as another."""
    others = [card.free_bytes for card in cards if card.device not in _held]
    most = max(others, default=0)
    return tuple(
        replace(card, free_bytes=max(card.free_bytes, min(most, card.total_bytes)))
        if card.device in _held
        else card
        for card in cards
    )


def worker_pool(devices: Sequence[str], gang: int = 1, user: object | None = None) -> WorkerPool:
    """Return this process's workers on ``devices``, started if they are not there.

    They are ``user``'s until it gives them back: a render beside it, in another thread or in one of
    its callbacks, gets others. They stay for the next one until other devices are asked for.
    """
    wanted = tuple(devices), gang
    with _lock:
        idle = [p for p in _pools if p.user is None]
        found = next((p for p in idle if (p.devices, p.gang) == wanted and p.usable), None)
        if found is None:
            _close(idle)
            found = WorkerPool(devices, gang)
            _pools.append(found)
        found.user = user
        found.held = _held
        return found


def give_back_workers(user: object, *, keep: bool = True) -> None:
    """Let the next render have the workers of ``user``; those that were kept before are ended.

    So are its own without ``keep``.
    """
    with _lock:
        given = [pool for pool in _pools if pool.user is user]
        others = [pool for pool in _pools if pool.user is None]
        for pool in given:
            pool.user = None
        unwanted = [pool for pool in given if not (keep and pool.wanted)]
        _close([*unwanted, *(others if len(given) > len(unwanted) else ())])


def close_workers() -> None:
    """End all workers of this process; those that a render has, when it gives them back."""
    with _lock:
        for pool in _pools:
            pool.wanted = False
        _close([pool for pool in _pools if pool.user is None])


def _close(pools: Sequence[WorkerPool]) -> None:
    for pool in pools:
        _pools.remove(pool)
        pool.close()


def _close_all() -> None:
    while _pools:
        _pools.pop().close()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    # A process that is forked off would end those of its parent when it ends.
    os.register_at_fork(after_in_child=_pools.clear)
