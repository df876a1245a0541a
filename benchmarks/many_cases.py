"""What ``many.py`` measures: its cases, which of them a run makes, and what each is to take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any


@dataclass(frozen=True)
class Case:
    """A clip; ``units`` are the passes of a step that do not wait for each other."""

    name: str
    width: int
    height: int
    frames: int
    window: int | None
    units: int
    steps: int
    seconds: float
    """About what a step takes on one H100, to keep to the budget."""
    guidance: float | None = None
    """None: the model's own; 1 makes a step one pass, which only a cut can share out."""
    model: str = "wan2.2-t2v-a14b"
    wishes: Mapping[str, Any] = field(default_factory=dict)
    shares: bool | None = None
    """Whether the cards of a gang copy streamed weights by shares; None leaves it to the plan."""
    beside: str = ""
    """The case whose bits and seconds it is compared with, its own where empty. It is then not run
    on one card."""
    more: float = 0.0
    """Seconds until weights are in their place, beyond those of others: page-locking, a cast."""

    def cut(self, count: int) -> int:
        """Return how many of so many cards compute a pass together."""
        return count // min(count, self.units)


_SIZE, _BARE, _FP8_EACH = (832, 480, 81, None), "480p81 without guidance", "fp8 streamed by each"
_STREAM: dict[str, Any] = {"offload": "stream", "resident_blocks": 0}
_FP8: dict[str, Any] = {"fp8_storage": "always"}
CASES = (
    Case("480p81", *_SIZE, 2, 3, 6.6),
    Case("720p81", 1280, 720, 81, None, 2, 2, 26.0),
    Case("5B 704p121", 1280, 704, 121, None, 2, 3, 2.4, None, "wan2.2-ti2v-5b"),
    Case("480p321 in windows of 81", 832, 480, 321, 81, 10, 2, 33.0),
    Case(_BARE, *_SIZE, 1, 3, 3.3, 1.0),
    Case("720p81 without guidance", 1280, 720, 81, None, 1, 2, 13.0, 1.0),
    Case("5B 704p121 without guidance", 1280, 704, 121, None, 1, 3, 1.2, 1.0, "wan2.2-ti2v-5b"),
    Case("480p81 streamed, shared", *_SIZE, 1, 3, 3.3, 1.0, wishes=_STREAM, shares=True,
         beside=_BARE, more=20),
    Case("480p81 streamed by each", *_SIZE, 1, 3, 3.3, 1.0, wishes=_STREAM, shares=False,
         beside=_BARE, more=10),
    Case(_FP8_EACH, *_SIZE, 1, 2, 3.3, 1.0, wishes=_FP8 | _STREAM, shares=False,
         beside=_FP8_EACH, more=25),
    Case("fp8 streamed, shared", *_SIZE, 1, 2, 3.3, 1.0, wishes=_FP8 | _STREAM, shares=True,
         beside=_FP8_EACH, more=10),
    Case("fp8 without guidance", *_SIZE, 1, 2, 3.3, 1.0, wishes=_FP8, beside=_FP8_EACH),
)  # fmt: skip
"""By worth, but that those which divide the cards alike follow each other. fp8 is compared with
itself where each card copies all."""
_SMALL = (64, 64, 17, None)
TINY = (
    Case("whole", *_SMALL, 2, 3, 0.3),
    Case("windows", 64, 64, 33, 17, 6, 3, 0.5),
    Case("whole without guidance", *_SMALL, 1, 3, 0.2, 1.0),
    Case("streamed, shared", *_SMALL, 1, 3, 0.2, 1.0, wishes=_STREAM, shares=True,
         beside="whole without guidance"),
    Case("streamed by each", *_SMALL, 1, 3, 0.2, 1.0, wishes=_STREAM, shares=False,
         beside="whole without guidance"),
    Case(_FP8_EACH, *_SMALL, 1, 2, 0.2, 1.0, wishes=_FP8 | _STREAM, shares=False,
         beside=_FP8_EACH),
    Case("fp8 streamed, shared", *_SMALL, 1, 2, 0.2, 1.0, wishes=_FP8 | _STREAM, shares=True,
         beside=_FP8_EACH),
)  # fmt: skip
ALONE, TOGETHER, AGAIN = 8.0, 28.0, 10.0
"""Seconds until the weights are on one card; until processes have started and theirs are; and until
theirs are where they had started: on two H200s, to begin with, later what the run before took."""


def chosen(
    cases: Sequence[Case], words: Sequence[str], devices: Sequence[int], known: Collection[str]
) -> list[tuple[Case, list[int]]]:
    """Return the cases with one of ``words`` in their names, each with its numbers of cards.

    What one of them is compared with comes before it, on as few cards as it is made on, unless an
    earlier report has it (``known``). Raises ValueError where a word is in no name.
    """
    names = [case.name for case in cases]
    for word in words:
        if not any(word in name for name in names):
            raise ValueError(f"{word!r} is in no case's name; they are {', '.join(names)}")
    wanted = [case for case in cases if any(word in case.name for word in words)]
    more = {case.beside for case in wanted} - {case.name for case in wanted} - {*known, ""}
    found = []
    for case in cases:
        if case in wanted:
            found.append((case, [n for n in devices if n > 1 or not case.beside]))
        elif case.name in more:
            found.append(
                (case, [min((n for n in devices if n > 1), default=2)] if case.beside else [1])
            )
    return found


@dataclass
class Pace:
    """What a run is expected to take, after those before it."""

    alone: float = ALONE
    together: float = TOGETHER
    again: float = AGAIN
    steps: float = 1.0
    """How long steps take beside ``Case.seconds``."""
    there: tuple[int, int] = (0, 0)
    """How many processes there are, and how many of them a gang."""

    def needed(self, case: Case, count: int) -> float:
        """Return the seconds of a case on so many cards."""
        share = ceil(case.units * case.cut(count) / count) / case.units / case.cut(count)
        # A trial computes one pass alone.
        passes = case.steps * share + (case.cut(count) > 1) / case.units
        return case.seconds * self.steps * passes + self._start(case, count) + case.more

    def starts(self, case: Case, count: int) -> bool:
        """Say whether no processes are there for a case: they start, or this one computes."""
        return self.there != (count, case.cut(count))

    def _start(self, case: Case, count: int) -> float:
        if count == 1:
            return self.alone
        return self.together if self.starts(case, count) else self.again

    def learn(self, case: Case, count: int, took: float, step: float | None) -> None:
        """Note what a run took, and its step; nothing where it failed."""
        started = self.starts(case, count)
        if count > 1:
            self.there = (count, case.cut(count))
        if step is None or case.wishes:
            return
        rest = max(1.0, took - case.steps * step)
        if count == 1:
            self.alone, self.steps = rest, step / case.seconds
        elif started:
            self.together = rest
        else:
            self.again = rest
