"""What was measured between the cards of this machine: how fast they talk, and what stays equal.

One small JSON file. A forward that is cut over several cards (Ulysses) gives other shapes to the
kernels; whether they keep the bits is tried once for each kind of card, shape and number of cards.
If the file is missing, broken or cannot be written, it is tried again, and nothing else happens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .calibration import default_path, keep_json

_KEPT = 200
"""How many trials, the latest ones, are kept."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One forward computed twice, on one card and cut over several."""

    equal: bool
    """Whether every bit was equal."""
    error: float
    """The relative error of the cut one, 0 where it was equal."""


FASTEST = 2e12
"""Bytes a second that no link between cards reaches: NVLink 5 has 0.9e12 in a direction, and NVIDIA
announced twice that for the next one. What is beyond was measured wrongly."""


@dataclass(frozen=True, slots=True)
class Link:
    """How fast the cards of a gang exchange what they have computed."""

    rate: float
    """Bytes a second that each sends while all send."""
    seconds: float
    """What an exchange takes beside its bytes."""
    host: float = 0.0
    """Bytes a second that each copies from page-locked RAM while all copy; 0 if not measured."""

    @property
    def plausible(self) -> bool:
        """Whether a link can be like that; no other is kept, and none that is read counts."""
        times = 0 <= self.seconds < 1 and 0 <= self.host <= FASTEST
        return times and 0 < self.rate <= FASTEST


@dataclass(frozen=True, slots=True)
class Between:
    """What is known of the cards of this machine together, as a plan sees it."""

    links: Mapping[str, Link] = field(default_factory=dict)
    """By ``link_name``."""
    trials: Mapping[str, Trial] = field(default_factory=dict)
    """Trials by ``cut_kind``."""
    threads: int = 0
    """Threads that a product on the CPU is computed by: its rounding depends on them."""


class CardRecords:
    """The file of link rates and trials."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        """The file that is read and written."""
        return self._path or default_path().with_name("cards.json")

    def link(self, machine: str, cards: int) -> Link | None:
        """Return what was measured between so many cards, or None."""
        return self._links().get(link_name(machine, cards))

    def between(self, threads: int = 0) -> Between:
        """Return all that is known."""
        known = self._read()
        trials = {kind: Trial(*found) for kind, found in known["trials"].items()}
        return Between(self._links(), trials, threads)

    def keep_link(self, machine: str, cards: int, link: Link) -> None:
        """Keep what was measured between so many cards; not what no link can be like."""
        if not link.plausible:
            return
        known = self._read()
        known["links"][link_name(machine, cards)] = [link.rate, link.seconds, link.host]
        keep_json(self.path, known)

    def _links(self) -> dict[str, Link]:
        links = {name: Link(*found) for name, found in self._read()["links"].items()}
        return {name: link for name, link in links.items() if link.plausible}

    def trial(self, kind: str) -> Trial | None:
        """Return what a trial of this kind (``cut_kind``) has shown, or None."""
        found = self._read()["trials"].get(kind)
        return None if found is None else Trial(*found)

    def keep_trial(self, kind: str, trial: Trial) -> None:
        """Keep a trial. One that was not equal stays so: bits that may differ are not promised."""
        known = self._read()
        before = known["trials"].pop(kind, None)
        if before is not None and not before[0]:
            trial = Trial(False, max(before[1], trial.error))
        known["trials"][kind] = [trial.equal, trial.error]
        known["trials"] = dict([*known["trials"].items()][-_KEPT:])
        keep_json(self.path, known)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            plain = json.loads(self.path.read_text("utf-8"))
            return {
                "links": {
                    str(k): [float(rate), float(seconds), *map(float, host[:1])]
                    for k, (rate, seconds, *host) in plain["links"].items()
                },
                "trials": {
                    str(k): [bool(equal), float(error)]
                    for k, (equal, error) in plain["trials"].items()
                },
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {"links": {}, "trials": {}}


def link_name(machine: str, cards: int) -> str:
    """Name what the rate of a link is kept under."""
    return f"{machine}, {cards} cards"


def cut_kind(what: str, batch: int, tokens: int, cards: int) -> str:
    """Name what a trial is made for: ``what`` says card, software, model, dtype and forward."""
    return f"{what}, {batch} x {tokens} tokens over {cards} cards"
