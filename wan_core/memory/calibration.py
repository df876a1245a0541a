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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..config import StageEstimate, StageReport
from ..errors import OutputError
from ..files import atomic_write

KEPT = 10
"""Latest runs kept per device and model."""
LARGE_BYTES = 2**30
"""Activations from which a stage teaches ``extra``: beside smaller ones, what libraries take once
and for all would look like a share of them."""
_EXTRA = (-0.02, 0.25)
_PACE = (0.1, 10.0)
"""What a run can teach at most: beyond, something else was going on."""


def forward_name(lean: bool, by_rows: bool) -> str:
    """Name the forward of a plan: each has an arithmetic of its own, and errors of its own."""
    return ("lean_rows" if by_rows else "lean") if lean else "diffusers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was learnt of one model on one device; as made, it changes no estimate."""

    runs: int = 0
    extra: float = 0.0
    """Bytes that measured peaks were above the arithmetic, as a share of the activations: the
    median of the last runs."""
    extra_by_forward: tuple[tuple[str, float], ...] = ()
    """The same of the runs with one forward, by its name; only those that were measured."""
    pace: float = 1.0
    """Seconds that steps took over the computed ones, where compute was the bound: the median."""
    paced: bool = False
    """Whether a run taught the pace."""

    def extra_of(self, lean: bool, by_rows: bool) -> float:
        """Return ``extra`` of a plan's forward; that of all runs where it was never measured."""
        return dict(self.extra_by_forward).get(forward_name(lean, by_rows), self.extra)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What one run taught; ``extra`` is None where every stage was small, ``pace`` where transfers
    were the bound."""

    extra: float | None
    pace: float | None
    forward: str

    @staticmethod
    def of(
        expected: Iterable[StageEstimate],
        measured: Iterable[StageReport],
        *,
        forward: str,
        learnt: float,
        base_bytes: int = 0,
        pace: float | None,
    ) -> RunRecord | None:
        """Compare a run with its estimate; None where it teaches nothing.

        ``learnt`` is the share that the estimate had added, ``base_bytes`` what others had on the
        device meanwhile; ``pace`` is the measured time of a step over the bare arithmetic's.
        """
        stages = {s.name: s for s in expected if s.activation_bytes >= LARGE_BYTES}
        shares = [
            (found.measured_peak_bytes - base_bytes - stages[found.name].device_bytes)
            / stages[found.name].activation_bytes
            for found in measured
            if found.name in stages and found.measured_peak_bytes
        ]
        if not shares and pace is None:
            return None
        return RunRecord(
            extra=_within(learnt + max(shares), _EXTRA) if shares else None,
            pace=_within(pace, _PACE),
            forward=forward,
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
        extras: dict[str, list[float]] = {}
        for record in records:
            if record.extra is not None:
                extras.setdefault(record.forward, []).append(record.extra)
        together = [extra for some in extras.values() for extra in some]
        return Calibration(
            runs=len(records),
            extra=median(together) if together else 0.0,
            extra_by_forward=tuple((name, median(extras[name])) for name in sorted(extras)),
            pace=median(paces) if paces else 1.0,
            paced=bool(paces),
        )

    def add(self, key: str, record: RunRecord) -> None:
        """Keep what a run taught, and of each key the latest ones."""
        known = self._read()
        known[key] = [*known.get(key, []), record][-KEPT:]
        plain = {name: [asdict(record) for record in records] for name, records in known.items()}
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
    return RunRecord(
        extra=_within(plain["extra"], _EXTRA),
        pace=_within(plain["pace"], _PACE),
        forward=str(plain["forward"]),
    )


def _within(value: Any, bounds: tuple[float, float]) -> float | None:
    if value is None:
        return None
    number, (low, high) = float(value), bounds
    if not number == number:  # NaN, which json reads
        raise ValueError("not a number")
    return min(max(number, low), high)
