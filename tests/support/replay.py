"""A replay of ``memory`` beside a dry run: the bytes of each tensor, and what is alive with it.

The peak alone is decided by a few lines of a replay. Every other line shows in the order and the
sizes of what is made, and every variable and ``del`` in what is alive meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import pytest

from support.dry_run import LiveBytes
from wan_core.memory import forward, forward_lean, vae, vae_lean
from wan_core.memory.forward import Tape


class TracedTape(Tape):
    """A tape that writes down each birth as ``LiveBytes`` does."""

    def __init__(self, workspace: bool = False) -> None:
        self.births: list[tuple[int, int]] = []
        self._live = 0
        super().__init__(workspace)

    @property
    def live(self) -> int:  # type: ignore[override]
        return self._live

    @live.setter
    def live(self, value: int) -> None:
        if value > self._live:
            self.births.append((value - self._live, value))
        self._live = value


@contextmanager
def traced_tapes() -> Iterator[list[TracedTape]]:
    """Have the replays use tapes that write down births; yields the tapes that were made."""
    made: list[TracedTape] = []

    def make(workspace: bool = False) -> TracedTape:
        made.append(TracedTape(workspace))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        for module in (forward, forward_lean, vae, vae_lean):
            patch.setattr(module, "Tape", make)
        yield made


@dataclass
class Comparison:
    """Where a replay departs from a dry run.

    ``ours`` and ``theirs`` are the sizes that only one of them makes; ``most`` and ``least`` the
    bytes by which the replay has more and less alive where both make the same.
    """

    ours: list[int] = field(default_factory=list)
    theirs: list[int] = field(default_factory=list)
    most: int = 0
    least: int = 0
    matched: int = 0


def compare(replay: Any, real: LiveBytes, smallest: int = 0) -> Comparison:
    """Compare the births of a tape and of a dry run, leaving out those below ``smallest`` bytes."""
    ours = [birth for birth in replay.births if birth[0] >= smallest]
    theirs = [birth for birth in real.births if birth[0] >= smallest]
    matcher = SequenceMatcher(
        None, [size for size, _ in ours], [size for size, _ in theirs], autojunk=False
    )
    found = Comparison()
    for what, a, b, c, d in matcher.get_opcodes():
        if what != "equal":
            found.ours += [size for size, _ in ours[a:b]]
            found.theirs += [size for size, _ in theirs[c:d]]
            continue
        for (_, mine), (_, real_live) in zip(ours[a:b], theirs[c:d], strict=True):
            found.matched += 1
            found.most = max(found.most, mine - real_live)
            found.least = min(found.least, mine - real_live)
    return found
