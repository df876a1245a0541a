"""What finished runs measured on this machine, kept per device and model for the next estimate.

Arithmetic cannot see what libraries take for themselves, nor how fast a card is. After each run on
an accelerator its peaks and step times are set beside the predicted ones and kept in one small JSON
file. A file that is missing, broken or cannot be written costs the knowledge and nothing else.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .config import StageEstimate, StageReport
from .errors import OutputError
from .files import atomic_write

KEPT = 10
"""Latest runs kept per device and model."""
_EXTRA = (-0.02, 0.5)
_PACE = (0.1, 10.0)
"""What a run can teach at most: beyond, something else was going on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was learnt of one model on one device; as made, it changes no estimate."""

    runs: int = 0
    extra: float = 0.0
    """Bytes that measured peaks were above the arithmetic, as a share of the activations: the
    largest of the last runs."""
    pace: float = 1.0
    """Seconds that steps took over the computed ones, where compute was the bound: the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What one run taught; ``pace`` is None where transfers were the bound."""

    extra: float
    pace: float | None

    @staticmethod
    def of(
        expected: Iterable[StageEstimate],
        measured: Iterable[StageReport],
        known: Calibration,
        pace: float | None,
    ) -> RunRecord | None:
        """Compare a run with its estimate, which ``known`` had corrected; None: no common stage.

        ``pace`` is the measured over the predicted time of a step.
        """
        stages = {stage.name: stage for stage in expected if stage.activation_bytes}
        shares = [
            (found.measured_peak_bytes - stages[found.name].device_bytes)
            / stages[found.name].activation_bytes
            for found in measured
            if found.name in stages and found.measured_peak_bytes
        ]
        if not shares:
            return None
        return RunRecord(
            extra=_within(known.extra + max(shares), _EXTRA),
            pace=None if pace is None else _within(known.pace * pace, _PACE),
        )


def default_path() -> Path:
    """Return the file in the user's cache folder, by the system's custom."""
    home = Path.home()
    if platform.system() == "Windows":
        folder = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif platform.system() == "Darwin":
        folder = home / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return folder / "wanfit" / "measured.json"


class Calibrations:
    """The file of records. ``key`` names device, software and model."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        """The file that is read and written."""
        return self._path or default_path()

    def of(self, key: str) -> Calibration:
        """Return what is known under ``key``."""
        records = self._read().get(key, [])
        paces = [record.pace for record in records if record.pace is not None]
        return Calibration(
            runs=len(records),
            extra=max((record.extra for record in records), default=0.0),
            pace=median(paces) if paces else 1.0,
        )

    def add(self, key: str, record: RunRecord) -> None:
        """Keep what a run taught, and of each key the latest ones."""
        known = self._read()
        known[key] = [*known.get(key, []), record][-KEPT:]
        plain = {
            name: [{"extra": round(r.extra, 4), "pace": r.pace} for r in records]
            for name, records in known.items()
        }
        with suppress(OutputError, OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, json.dumps(plain, indent=1).encode())

    def _read(self) -> dict[str, list[RunRecord]]:
        try:
            plain = json.loads(self.path.read_text("utf-8"))
            return {str(key): [_record(one) for one in records] for key, records in plain.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}


def _record(plain: Any) -> RunRecord:
    pace = plain["pace"]
    return RunRecord(
        extra=_within(float(plain["extra"]), _EXTRA),
        pace=None if pace is None else _within(float(pace), _PACE),
    )


def _within(value: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    if not value == value:  # NaN, which json reads
        raise ValueError("not a number")
    return min(max(value, low), high)
