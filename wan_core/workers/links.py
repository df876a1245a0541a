"""How fast the cards of a gang exchange tensors, and copy from RAM while all of them do.

A rate is the slope between two sizes of message: what an exchange costs anyway drops out. A slope
divides by a difference of times, and where that is one of chance the quotient may be anything; such
a rate is not kept, and the plan goes on with the assumed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import is_oom
from ..memory import Link
from ..placing import Pending

_SAMPLES, _IN_A_ROW = 5, 4
_LONG = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}
"""Bytes of the largest message, all parts together; the next one is a quarter."""
_SHORT = 16
_HOST_BYTES = 64 * 2**20
_NOISE = 2.0
"""So many times the spread of the times has to lie between two sizes."""
_UNEXPLAINED = 3.0
"""A slope of more than this times the bytes a second that were seen would leave most of the time
of a large message to something else than its bytes. Chosen, not measured."""

Timed = Callable[[Callable[[], object]], float]
"""Does a piece of work several times in a row; returns the seconds of one, on the device."""


class Exchanging(Protocol):
    """What is timed: processes that agree on a moment, and exchange parts."""

    @property
    def size(self) -> int:
        """How many they are."""

    def begin_exchange(self, given: Tensor, parts: Tensor) -> Pending:
        """Begin to give away the rows of ``parts``, and to fill those of ``given``."""

    def agreed(self, word: bool) -> bool:
        """Return the word of rank 0."""

    def all_say(self, word: bool) -> bool:
        """Return whether all say yes."""


def measured_link(
    group: Exchanging, device: torch.device, timed: Timed | None = None
) -> tuple[Link | None, str]:
    """Return how fast the processes of a gang exchange; to be called by all of them.

    Measured as the exchanges of a forward are, in three sizes. None where the times say nothing,
    with the reason in words.
    """
    timed = timed or (_timed_on_card(device) if device.type == "cuda" else _timed_here)
    long = _LONG.get(device.type, _LONG["cpu"]) // group.size
    if not _has_room(group, device, 2 * group.size * long):
        return None, "a card has too little free memory for it"
    times = []
    for each in (_SHORT, long // 4, long):
        rows = 1 if group.size == 2 else group.size
        parts = torch.zeros(rows, each, dtype=torch.uint8, device=device)
        given = torch.empty_like(parts)

        def exchange(given: Tensor = given, parts: Tensor = parts) -> object:
            return group.begin_exchange(given, parts).wait()

        seconds = _sampled(group, timed, exchange)
        times.append(((group.size - 1) * each, seconds))
        del parts, given
    link, why = link_of(times)
    host = _host_rate(group, device, timed) if device.type == "cuda" else 0.0
    return (None if link is None else Link(link.rate, link.seconds, host)), why


def _has_room(group: Exchanging, device: torch.device, nbytes: int) -> bool:
    """Say whether all have memory for their messages: who failed alone would be waited for.

    A gang may start while another stage, or another program, has a card.
    """
    has = True
    try:
        torch.empty(nbytes, dtype=torch.uint8, device=device)
    except (MemoryError, RuntimeError) as err:
        if not is_oom(err):
            raise
        has = False
    return group.all_say(has)


def link_of(times: Sequence[tuple[int, Sequence[float]]]) -> tuple[Link | None, str]:
    """Return the link by which messages of three sizes, (bytes sent, seconds of each sample), took
    so long; None, and why, where they do not tell.

    The medians count: on a machine with other work some samples are late, none is early.
    """
    (_, starts), (fewer, quarter), (sent, whole) = times
    short, middle, long = median(starts), median(quarter), median(whole)
    gained = long - middle
    if long <= 0 or gained <= _NOISE * max(_spread(quarter), _spread(whole)):
        return None, (
            f"{sent / 2**20:.4g} MiB took {1e6 * long:.0f} us and {fewer / 2**20:.4g} MiB "
            f"{1e6 * middle:.0f} us: the difference is one of chance"
        )
    seen = sent / long  # the link is at least as fast as this
    rate = max((sent - fewer) / gained, seen)
    link = Link(rate, max(short, 0.0))
    if not link.plausible or rate > _UNEXPLAINED * seen:
        return None, f"{rate / 1e9:.4g} GB/s, where {seen / 1e9:.4g} were seen, is not believed"
    return link, ""


def _spread(samples: Sequence[float]) -> float:
    """Return the median distance of samples from their median."""
    centre = median(samples)
    return median(abs(sample - centre) for sample in samples)


def _sampled(group: Exchanging, timed: Timed, work: Callable[[], object]) -> list[float]:
    """Return the times of a piece of work that all do at the same time, without the first."""
    samples = []
    for _ in range(_SAMPLES + 1):  # the first time connections are made
        group.agreed(True)
        samples.append(timed(work))
    return samples[1:]


def _timed_here(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    for _ in range(_IN_A_ROW):
        work()
    return (time.perf_counter() - begun) / _IN_A_ROW


def _timed_on_card(device: torch.device) -> Timed:
    """Time by events on the stream that computes, which waits for each exchange."""
    event: Any = torch.cuda.Event

    def timed(work: Callable[[], object]) -> float:
        begun, ended = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize(device)
        stream = torch.cuda.current_stream(device)
        begun.record(stream)
        for _ in range(_IN_A_ROW):
            work()
        ended.record(stream)
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1e3 / _IN_A_ROW

    return timed


def _host_rate(group: Exchanging, device: torch.device, timed: Timed) -> float:
    """Return the bytes a second that this card gets from page-locked RAM while all copy.

    0 where memory could not be page-locked here; the others measure anyway.
    """
    there = torch.empty(_HOST_BYTES, dtype=torch.uint8, device=device)
    here: Tensor | None = None
    with suppress(RuntimeError):  # the system allows no more of it
        here = torch.empty(_HOST_BYTES, dtype=torch.uint8, pin_memory=True)

    def copy() -> object:
        return None if here is None else there.copy_(here, non_blocking=True)

    seconds = median(_sampled(group, timed, copy))
    return 0.0 if here is None or seconds <= 0 else _HOST_BYTES / seconds
