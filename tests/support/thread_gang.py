"""Gangs whose processes are threads of the test: the exchanges of Ulysses, and its agreements."""

from __future__ import annotations

import threading
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

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Return what all have given."""
        self._given[rank] = value
        self._barrier.wait(PATIENCE)
        given = list(self._given)
        self._barrier.wait(PATIENCE)
        return given

    def break_off(self) -> None:
        self._barrier.abort()


class ThreadExchange:
    """``forward.Exchange`` among threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size
        self.moved = 0

    def all_to_all(self, parts: Tensor) -> Tensor:
        assert parts.is_contiguous() and len(parts) == self.size
        self.moved += 1
        given = self.meeting.exchange(self.rank, parts)
        return torch.stack([part[self.rank] for part in given])

    def all_gather(self, part: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, part))

    def gather_into(self, whole: Tensor) -> None:
        own = whole.view(self.size, -1)[self.rank].clone()
        whole.copy_(torch.cat(self.meeting.exchange(self.rank, own)))

    def agreed(self, word: bool) -> bool:
        return bool(self.meeting.exchange(self.rank, word)[0])

    def all_say(self, word: bool) -> bool:
        return all(self.meeting.exchange(self.rank, word))


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

    def all_to_all(self, parts: Tensor) -> Tensor:
        return torch.stack([part[self.rank] for part in self._exchanged(parts)])

    def all_gather(self, part: Tensor) -> Tensor:
        return torch.stack(self._exchanged(part))

    def gather_into(self, whole: Tensor) -> None:
        own = whole.view(self.size, -1)[self.rank].clone()
        whole.copy_(torch.cat(self._exchanged(own)))

    def agreed(self, word: bool) -> bool:
        return bool(self._exchanged(word)[0])

    def all_say(self, word: bool) -> bool:
        return all(self._exchanged(word))


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
        first = [err for err in errors if not isinstance(err, threading.BrokenBarrierError)]
        raise (first or errors)[0]
    return results
