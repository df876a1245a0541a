"""What a pool has in work: units, which of them are cut, and a decode that its workers share.

And what its workers choose alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..memory import CardRecords, Link, Trial, cut_kind
from ..sampling import Conditions, Kept, Made, Unit
from .gang import Rank
from .messages import Message
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

    def message(self) -> Message:
        """Return the message that asks for the unit, but for its number and how it is cut."""
        unit = self.unit
        header = {
            "type": "unit", "weights": self.weights.key, "conditions": self.conditions,
            "indices": unit.indices, "middle": unit.middle, "second": unit.second,
            "keep": unit.keep,
        }  # fmt: skip
        tensors = {"latents": unit.latents, "timestep": unit.timestep}
        if unit.residual is not None:
            tensors["residual"] = unit.residual
        # To the CPU now, in the driver's thread and stream: the latents are written over later.
        return header, {name: tensor.to("cpu") for name, tensor in tensors.items()}

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


class Chosen:
    """What workers choose alike: the first that asks chooses, and others wait until it has."""

    def __init__(self) -> None:
        self._made: dict[str, str] = {}
        self._plain: set[str] = set()
        """Those that took the plain way, which a worker without memory for a trial takes too."""
        self._asked: dict[str, list[tuple[Rank, int]]] = {}
        """By what is chosen just now: who chooses it, then who waits, and the number of each."""

    def begin(self) -> None:
        """Begin a render: what was not to be had in the last one may be now."""
        for what in self._plain:
            self._made.pop(what, None)
        self._plain.clear()

    def hears(self, rank: Rank, header: dict[str, Any]) -> None:
        """Hear a worker ask what is chosen, or say what it has chosen; None: nothing."""
        what, name = header["what"], header.get("name")
        if header["type"] == "choose":
            asker = rank, header["ask"]
            if what in self._made:
                self._tell(what, [asker])
                return
            asked = self._asked.setdefault(what, [])
            asked.append(asker)
            if len(asked) == 1:
                self._tell(what, asked)
        elif name is None:
            self._leave(what, [rank])
        else:
            self._made[what] = name
            self._plain.update(() if header["kept"] else {what})
            waiting = self._asked.pop(what, [])
            self._tell(what, [one for one in waiting if one[0] is not rank])

    def lose(self, ranks: Sequence[Rank]) -> None:
        """Hear that workers have ended."""
        for what in list(self._asked):
            self._leave(what, ranks)

    def _leave(self, what: str, ranks: Sequence[Rank]) -> None:
        """Have the next of those that wait choose in place of one that does not any more."""
        asked = self._asked.pop(what, [])
        left = [one for one in asked if one[0] not in ranks]
        if left:
            self._asked[what] = left
            self._tell(what, left[:1] if left[0] != asked[0] else [])

    def _tell(self, what: str, asked: Sequence[tuple[Rank, int]]) -> None:
        """Answer those who asked; None: choose yourself."""
        for rank, number in asked:
            rank.process.send({"type": "chosen", "ask": number, "name": self._made.get(what)})


class Cuts:
    """What is known of passes that a gang computes together: whether they may be, and how fast."""

    def __init__(self, records: CardRecords) -> None:
        self._records = records
        self._trials: dict[str, Trial | None] = {}
        self.uncut: set[str] = set()
        """Keys of weights whose passes are computed whole: the model cannot be cut, or the cut
        ended gangs."""
        self._link: Link | None = None
        """What a gang has measured between its cards, until it is kept."""

    def begin(self) -> None:
        """Begin a render: trials are looked up again."""
        self._trials.clear()

    def hears_link(self, told: Sequence[float] | None) -> bool:
        """Note how fast a gang exchanges: what the slowest of its processes has seen.

        Returns False where it could not be measured.
        """
        if told is None:
            return False
        link = Link(*told)
        if self._link is None or link.rate < self._link.rate:
            self._link = link
        return True

    def keep_link(self, job: Job, size: int) -> None:
        """Keep what was measured by a gang of ``size`` for later plans."""
        if self._link is None:
            return
        machine = job.weights.tried_as.partition("; ")[0]
        known = self._records.link(machine, size)
        # One of an earlier release does not say how fast all copy from RAM.
        if known is None or (self._link.host and not known.host):
            self._records.keep_link(machine, size, self._link)
        self._link = None

    def ways(
        self, job: Job, size: int, given: Conditions | None, say: Callable[[str], object]
    ) -> tuple[bool, bool]:
        """Return whether a gang of ``size`` computes a unit cut, and whether it does so both ways.

        ``say`` hears what the user should know of it.
        """
        if size == 1 or given is None or not job.weights.choices.lean:
            return False, False
        if job.weights.key in self.uncut or job.weights.heads % size:
            return False, False
        if job.tokens(given) % size:
            return False, False
        kind = _trial_of(job, size, given)
        if kind not in self._trials:
            self._trials[kind] = self._records.trial(kind)
        trial = self._trials[kind]
        if trial is None or trial.equal:
            return True, trial is None
        each = f"Cut over {size} cards a pass has other bits than on one (relative error "
        each += f"{trial.error:.1e})"
        if job.weights.must_equal:
            say(f"{each}: every pass was computed on one card.")
            return False, False
        say(f"{each}: rounding, as speed 'fast' allows.")
        return True, False

    def keep_trial(self, job: Job, size: int, given: Conditions | None, trial: Trial) -> None:
        """Keep what a unit that was computed both ways has shown."""
        assert given is not None
        kind = _trial_of(job, size, given)
        self._records.keep_trial(kind, trial)
        self._trials[kind] = trial


def _trial_of(job: Job, size: int, given: Conditions) -> str:
    batch = job.unit.latents.shape[0]
    return cut_kind(job.weights.tried_as, batch, job.tokens(given), size)
