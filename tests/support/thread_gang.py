"""Gangs whose processes are threads of the test: the exchanges of Ulysses, and its agreements."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wan_core.workers.group import GangBroken

PATIENCE = 30.0


class Meeting:
    """Where the threads of one gang meet. One that breaks it off ends it for all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._given: list[Any] = [None] * size
        self.gathers, self.exchanges = Posts(size), Posts(size)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Return what all have given."""
        self._given[rank] = value
        self._barrier.wait(PATIENCE)
        given = list(self._given)
        self._barrier.wait(PATIENCE)
        return given

    def break_off(self) -> None:
        self._barrier.abort()
        self.gathers.break_off()
        self.exchanges.break_off()


class Posts:
    """What threads give each other: to begin waits for nobody, the end for all who have to begin.

    Each exchange is known by its number, so that two who exchange different things in different
    orders give each other wrong bytes, as they would on cards.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._given: dict[tuple[int, int], Tensor] = {}
        self._begun = [0] * size
        self._ended: Counter[int] = Counter()
        self._changed = threading.Condition()
        self._broken = False

    def begin(self, rank: int, parts: Tensor) -> int:
        """Give something, as it is now; return the number of the exchange."""
        with self._changed:
            number = self._begun[rank]
            self._begun[rank] += 1
            self._given[number, rank] = parts.clone()
            self._changed.notify_all()
        return number

    def parts(self, number: int) -> list[Tensor]:
        """Wait until all have begun an exchange; return what they gave."""
        try:
            with self._changed:
                until = time.monotonic() + PATIENCE
                while not all(begun > number for begun in self._begun):
                    if self._broken or not self._changed.wait(until - time.monotonic()):
                        raise threading.BrokenBarrierError
                given = [self._given[number, one] for one in range(self.size)]
                self._ended[number] += 1
                if self._ended[number] == self.size:  # nobody asks again
                    for one in range(self.size):
                        del self._given[number, one]
                return given
        except threading.BrokenBarrierError as err:
            raise GangBroken("Connection closed by peer") from err

    def break_off(self) -> None:
        with self._changed:
            self._broken = True
            self._changed.notify_all()


class Late:
    """An exchange under way; what was given arrives when it is waited for, as late as can be."""

    def __init__(self, arrive: Callable[[], object]) -> None:
        self.wait = arrive


class ThreadExchange:
    """``forward.Exchange`` among threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size
        self.moved = 0

    def begin_exchange(self, given: Tensor, parts: Tensor) -> Late:
        assert parts.is_contiguous() and given.is_contiguous() and parts.shape == given.shape
        own = len(parts) == self.size
        assert own or len(parts) == self.size - 1
        self.moved += 1
        # What is read too early is noticed.
        given.fill_(float("nan") if given.is_floating_point() else 99)
        number = self.meeting.exchanges.begin(self.rank, parts)

        def arrive() -> None:
            others = [rank for rank in range(self.size) if own or rank != self.rank]
            all_parts = self.meeting.exchanges.parts(number)
            for row, rank in zip(given, others, strict=True):
                row.copy_(all_parts[rank][self.rank - (not own and rank < self.rank)])

        return Late(arrive)

    def all_gather(self, part: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, part))

    def begin_gather(self, whole: Tensor) -> Late:
        number = self.meeting.gathers.begin(self.rank, whole.view(self.size, -1)[self.rank])

        def arrive() -> None:
            parts = self.meeting.gathers.parts(number)
            for row, part in zip(whole.view(len(parts), -1), parts, strict=True):
                assert len(row) == len(part), "two gather different blocks at the same time"
                row.copy_(part)

        return Late(arrive)

    def agreed(self, word: bool) -> bool:
        return bool(self.meeting.exchange(self.rank, word)[0])

    def all_say(self, word: bool) -> bool:
        return all(self.meeting.exchange(self.rank, word))

    def first_says(self, name: str) -> str:
        return str(self.meeting.exchange(self.rank, name)[0])


class ThreadGroup(ThreadExchange):
    """``workers.group.Group`` among threads; those that name the same place meet."""

    meetings: dict[str, Meeting] = {}
    _lock = threading.Lock()

    def __init__(self, rank: int, size: int, place: str, device: Any) -> None:
        with self._lock:
            meeting = self.meetings.setdefault(place, Meeting(size))
        super().__init__(meeting, rank)

    def _exchanged(self, value: Any) -> list[Any]:
        try:
            return self.meeting.exchange(self.rank, value)
        except threading.BrokenBarrierError as err:
            raise GangBroken("Connection closed by peer") from err

    def all_gather(self, part: Tensor) -> Tensor:
        return torch.stack(self._exchanged(part))

    def agreed(self, word: bool) -> bool:
        return bool(self._exchanged(word)[0])

    def all_say(self, word: bool) -> bool:
        return all(self._exchanged(word))

    def first_says(self, name: str) -> str:
        return str(self._exchanged(name)[0])


def together(size: int, work: Callable[[ThreadExchange], Any]) -> list[Any]:
    """Return what ``work`` returns in each of ``size`` threads; its error if one fails."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []
    threads_before = torch.get_num_threads()

    def run(rank: int) -> None:
        torch.set_num_threads(threads_before)
        try:
            with torch.no_grad():
                results[rank] = work(ThreadExchange(meeting, rank))
        except BaseException as err:  # noqa: BLE001 - raised below
            errors.append(err)
            meeting.break_off()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        broken = (threading.BrokenBarrierError, GangBroken)
        first = [err for err in errors if not isinstance(err, broken)]
        raise (first or errors)[0]
    return results
