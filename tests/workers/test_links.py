"""How fast the cards of a gang are said to exchange: by clocks that a test makes up."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cut_clips import CLIP, cut_units, four_heads, made, make_links_free
from support.thread_gang import Late, ThreadExchange, ThreadGroup, together
from support.thread_workers import ThreadWorker
from support.tiny_models import open_wan
from torch import Tensor

from wan_core.memory import FASTEST, CardRecords, Link
from wan_core.plan.gangs import Cutting
from wan_core.workers import child
from wan_core.workers.links import link_of, measured_link
from wan_core.workers.pool import WorkerPool

MIB = 2**20
Clock = Callable[[int], float]
"""Seconds of a message by the bytes that are sent."""


class Timetable:
    """Exchanges that take as long as a clock says: nothing is moved."""

    size, rank = 2, 0

    def __init__(self, clock: Clock) -> None:
        self._clock, self.sent, self.moments = clock, 0, 0

    def begin_exchange(self, given: Tensor, parts: Tensor) -> Late:
        self.sent = (self.size - 1) * parts[0].numel()
        return Late(lambda: None)

    def agreed(self, word: bool) -> bool:
        self.moments += 1
        return word

    def all_say(self, word: bool) -> bool:
        return word

    def timed(self, work: Callable[[], object]) -> float:
        work()
        return self._clock(self.sent)


def seen(clock: Clock) -> tuple[Link | None, str]:
    table = Timetable(clock)
    link, why = measured_link(table, torch.device("cpu"), table.timed)
    assert table.moments == 18  # the same on every rank, whatever the clock says
    return link, why


def straight(rate: float, start: float) -> Clock:
    return lambda sent: start + sent / rate


@pytest.mark.parametrize("rate", [1e8, 1e10, 3.5e11, 9e11])
@pytest.mark.parametrize("start", [0.0, 2e-6])
def test_a_straight_line_is_found(rate: float, start: float) -> None:
    link, why = seen(straight(rate, start))
    assert link is not None and not why
    assert link.rate == pytest.approx(rate, rel=1e-3) and link.seconds == pytest.approx(
        start, abs=16 / rate * 1.001
    )


@pytest.mark.parametrize("seed", range(20))
def test_noise_gives_a_rate_nearby_or_none(seed: int) -> None:
    """Samples that are late, some by far: never a rate that the bytes contradict."""
    dice = random.Random(seed)
    rate, start, noise = 10 ** dice.uniform(8, 11.7), 2e-5, 10 ** dice.uniform(-7, -3)

    def clock(sent: int) -> float:
        late = dice.expovariate(1 / noise) + (0.05 if dice.random() < 0.1 else 0)
        return start + sent / rate + late

    for _ in range(20):
        link, why = seen(clock)
        if link is None:
            assert why
        else:
            # The sizes lie a factor of four apart: a late quarter makes the slope steeper, by no
            # more than what is believed.
            assert link.rate <= 3 * rate, (link, rate, noise)
            assert link.plausible


def test_noise_that_is_small_beside_the_bytes_is_measured_through() -> None:
    dice = random.Random(3)
    link, _ = seen(lambda sent: 3e-5 + sent / 1e9 + dice.uniform(0, 3e-5))
    assert link is not None and link.rate == pytest.approx(1e9, rel=0.05)


EQUAL, BACKWARDS = [2e-4] * 5, [1e-4] * 5


@pytest.mark.parametrize(
    ("quarter", "whole"),
    [
        (EQUAL, EQUAL),  # once a difference of nothing was a nanosecond: 3.36e7 GB/s
        (EQUAL, BACKWARDS),  # more bytes in less time
        ([2.0e-4, 2.2e-4, 1.9e-4, 2.1e-4, 2e-4], [2.1e-4, 2.0e-4, 2.3e-4, 1.9e-4, 2.1e-4]),
        (EQUAL, [2.001e-4] * 5),  # a slope of 1e6 GB/s
        (EQUAL, [2.5e-4] * 5),  # a fifth of the time for three quarters of the bytes
        ([0.0] * 5, [0.0] * 5),  # a clock that stands
        ([-1e-4] * 5, [-1e-4] * 5),
        ([float("nan")] * 5, [float("nan")] * 5),
    ],
)
def test_times_that_say_nothing_give_no_rate(
    quarter: Sequence[float], whole: Sequence[float]
) -> None:
    link, why = link_of([(16, EQUAL), (32 * MIB, quarter), (128 * MIB, whole)])
    assert link is None and ("chance" in why or "not believed" in why), why


def test_a_rate_is_at_least_what_was_seen() -> None:
    """A first size that was late by chance would make the slope too flat: never under the mean."""
    link, _ = link_of([(16, [0.0] * 5), (32 * MIB, [1e-6] * 5), (128 * MIB, [1e-3] * 5)])
    assert link is not None and link.rate == 128 * MIB / 1e-3


def test_late_samples_do_not_count() -> None:
    late: Iterator[float] = cycle([0.0, 0.0, 0.3, 0.0, 0.2])
    link, _ = seen(lambda sent: 1e-5 + sent / 2e9 + next(late))
    assert link is not None and link.rate == pytest.approx(2e9, rel=1e-3)


def test_what_no_link_can_be_like_is_not_kept_nor_read(tmp_path: Path) -> None:
    records = CardRecords(tmp_path / "cards.json")
    records.keep_link("m", 2, Link(3.5e11, 2e-5, 5e10))
    for link in (Link(3.36e16, 2.1e-4), Link(-1e9, 0), Link(1e9, -1.0), Link(float("nan"), 0.0)):
        records.keep_link("m", 2, link)
        assert records.link("m", 2) == Link(3.5e11, 2e-5, 5e10)
    # A file of before: two numbers for a link, and one of them absurd.
    records.path.write_text('{"links": {"m, 2 cards": [3.36e16, 2e-4], "m, 4 cards": [1e9, 0]}, '
                            '"trials": {}}')  # fmt: skip
    assert records.link("m", 2) is None
    assert records.between().links == {"m, 4 cards": Link(1e9, 0.0)}
    assert not Link(2 * FASTEST, 0.0).plausible


def test_a_card_without_room_ends_the_measurement_for_all_and_no_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gang may start beside another stage, or another program's decode."""
    empty, lock, asked = torch.empty, threading.Lock(), list[int]()

    def full(*shape: Any, **more: Any) -> Tensor:
        with lock:
            asked.append(1)
            first = len(asked) == 1
        if first:  # one of the two
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*shape, **more)

    def work(among: ThreadExchange) -> tuple[Link | None, str]:
        return measured_link(among, torch.device("cpu"))

    monkeypatch.setattr("wan_core.workers.links.torch.empty", full)
    found = together(2, work)
    assert [link for link, _ in found] == [None, None]
    assert all("too little free memory" in why for _, why in found)


def test_threads_that_exchange_agree_on_how_often() -> None:
    def work(among: ThreadExchange) -> bool:
        link, why = measured_link(among, torch.device("cpu"))
        return (link is None) == bool(why)

    assert together(2, work) == [True, True]


@pytest.mark.parametrize("told", [None, Link(1e9, 1e-4, 5e9)])
def test_a_pool_keeps_what_the_slowest_rank_has_seen_or_says_that_none_has(
    threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch, told: Link | None
) -> None:
    quick = Link(3e9, 1e-4, 6e9)

    def measured(group: ThreadGroup, device: torch.device) -> tuple[Link | None, str]:
        return (told if group.rank == 0 else quick if told else None), "a matter of chance"

    monkeypatch.setattr(child, "measured_link", measured)
    pool = WorkerPool(("cpu", "cpu"), 2)
    pool.begin(lambda *_: None)
    until = time.perf_counter() + 60
    while not all(gang.ready for gang in pool._gangs) and time.perf_counter() < until:
        pool._pump(0.05)
    assert pool._cuts._link == told
    said = [note for note in pool.notes if "assumed rate" in note and "matter of chance" in note]
    assert len(said) == (told is None)
    pool.close()


@pytest.mark.parametrize(
    ("known", "kept"),
    [
        pytest.param(None, True, marks=pytest.mark.slow),
        (Link(2e9, 1e-4), True),
        (Link(2e9, 1e-4, 4e9), False),
    ],
)
def test_what_is_known_stays_unless_it_lacks_the_copies_from_ram(
    threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    known: Link | None, kept: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = four_heads(tmp_path, "wan2.1-t2v")
    machine, seen_now = make_links_free(path), Link(3e9, 1e-4, 6e9)
    records = CardRecords()
    if known is None:
        records.path.unlink()
    else:
        records.keep_link(machine, 2, known)
    monkeypatch.setattr(child, "measured_link", lambda *_: (seen_now, ""))
    monkeypatch.setattr(Cutting, "pass_seconds", lambda self, alone, cards: alone / cards)
    found = made(open_wan(path, devices=2), CLIP | {"guidance_scale": 1.0})
    assert cut_units(found) > 0
    assert records.link(machine, 2) == (seen_now if kept else known)
