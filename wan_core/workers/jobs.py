"""What a pool has in work: units, and a decode that its workers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ..sampling import Conditions, Kept, Made, Unit
from .gang import Rank
from .weights import Weights


@dataclass(slots=True)
class Job:
    """A unit that was asked for, and what became of it."""

    unit: Unit
    weights: Weights
    conditions: int
    kept: Kept | None = None
    name: str = ""
    """What ``kept`` knows the unit by."""
    lost: int = 0
    """How many gangs have ended while they computed it."""
    result: Made | None = None

    def tokens(self, given: Conditions) -> int:
        """Return how many tokens the model sees of each sample."""
        frames, height, width = self.unit.latents.shape[2:]
        frames += given.reference is not None  # Fun Control's stands in front
        deep, high, wide = self.weights.patch
        return int((frames // deep) * (height // high) * (width // wide))

    def finish(self, made: Made) -> None:
        """Take what the unit gave; it is kept at once, as it may wait long for its turn."""
        self.result = made
        if self.kept is not None:
            self.kept.keep(self.name, made)


class Strips(Protocol):
    """A decode that is shared out; see ``strips.StripsDecoder``."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Return what decides how long a worker may say nothing."""

    def hears(self, rank: Rank, header: dict[str, Any]) -> None:
        """Hear from a worker that makes a strip."""

    def lost(self, rank: Rank, why: str) -> None:
        """Hear that a worker has ended."""
