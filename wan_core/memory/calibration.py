"""What finished runs measured on this machine, kept per device and model for the next estimate.

Arithmetic knows neither how much memory libraries allocate for themselves nor how fast a card is.
After each run on an accelerator, its peaks and step times are compared with the predicted ones, and
the result is kept in one small JSON file. If the file is missing, broken or cannot be written,
estimates lose this knowledge and nothing else happens.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from ..config import StageEstimate, StageReport
from ..errors import OutputError
from ..files import atomic_write, home_folder

T = TypeVar("T")

ATTENTION_8BIT = {
    "int8, values in fp8": "triton", "int8, values in fp16": "triton",
    "Sage": "sageattention", "Sage, values in fp16": "sageattention",
    "comfy-kitchen int8": "comfy_kitchen",
}  # fmt: skip
"""Kernels of attention in 8 bit, as their times are kept, and the module that each needs."""
_SHAPES = 32
"""How many shapes of attention, the latest ones, are kept per machine."""
KEPT = 10
"""How many runs, the latest ones, are kept per device and model."""
LARGE_BYTES = 2**30
"""A stage teaches ``extra`` only if its activations are at least this large. What libraries
allocate once would otherwise look like a share of small activations."""
_EXTRA = (-0.02, 0.25)
_PACE = (0.1, 10.0)
"""Bounds of what a run can teach, here and in ``_EXTRA``: a value beyond them has another cause,
such as a second program on the card."""


def forward_name(lean: bool, by_rows: bool) -> str:
    """Name the forward that a plan uses.

    Each forward is estimated by its own arithmetic, so each has its own error.
    """
    return ("lean_rows" if by_rows else "lean") if lean else "diffusers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was learnt about one model on one device. The default values change no estimate."""

    runs: int = 0
    extra: float = 0.0
    """By how many bytes measured peaks exceeded the arithmetic, as a share of the activations:
    the median of the last runs."""
    extra_by_forward: tuple[tuple[str, float], ...] = ()
    """The same for each forward alone, as (name, extra); only forwards that were measured."""
    pace: float = 1.0
    """Measured over computed seconds of a step, where compute was the bottleneck: the median."""
    paced: bool = False
    """Whether ``pace`` was measured."""

    def extra_of(self, lean: bool, by_rows: bool) -> float:
        """Return ``extra`` for a plan's forward, or that of all runs if it was never measured."""
        return dict(self.extra_by_forward).get(forward_name(lean, by_rows), self.extra)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What one run taught.

    ``extra`` is None if no stage was large enough, ``pace`` if transfers were the bottleneck.
    """

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
        """Compare a run with its estimate; None if it teaches nothing.

        ``learnt`` is the ``extra`` that the estimate already included. ``base_bytes`` is what else
        was on the device during the run. ``pace`` is the measured time of a step divided by the
        computed one, before any correction.
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
    """Return the path of the file, in the cache folder that is usual on this system."""
    home = home_folder()
    if platform.system() == "Windows":
        folder = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif platform.system() == "Darwin":
        folder = home / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return folder / "wanfit" / "measured.json"


class MeasuredFile:
    """A small JSON file of what was measured; one that is missing or broken counts as empty."""

    name = "measured.json"

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        """The file that is read and written."""
        return self._path or default_path().with_name(self.name)

    def forget(self) -> None:
        """Forget everything; raises OutputError where the file cannot be removed."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as err:
            raise OutputError(
                f"{str(self.path)!r} cannot be removed: {err.strerror}. Remove it by hand."
            ) from err

    def _loaded(self, understood: Callable[[Any], T]) -> T | None:
        """Return what ``understood`` makes of the file's content; None where it cannot."""
        try:
            return understood(json.loads(self.path.read_text("utf-8")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def _keep(self, plain: Mapping[str, Any]) -> None:
        """Write the file, whole; where it cannot be written, nothing happens."""
        with suppress(OutputError, OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, json.dumps(plain, indent=1).encode())


class Calibrations(MeasuredFile):
    """The file of records, which are stored under a key that names device, software and model."""

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

    def keys(self) -> list[str]:
        """Return under what something is known: device, software and model."""
        return sorted(self._read())

    def add(self, key: str, record: RunRecord) -> None:
        """Add what a run taught; of each key only the latest records are kept."""
        known = self._read()
        known[key] = [*known.get(key, []), record][-KEPT:]
        self._keep({name: [asdict(one) for one in records] for name, records in known.items()})

    def _read(self) -> dict[str, list[RunRecord]]:
        def understood(plain: Any) -> dict[str, list[RunRecord]]:
            return {str(key): [_record(one) for one in records] for key, records in plain.items()}

        return self._loaded(understood) or {}


class AttentionTimes(MeasuredFile):
    """Milliseconds of attention kernels, by device and software, then by shape, in one small file.

    What else they depend on (``where``: versions of libraries) is kept beside them; times that were
    taken with others do not count.
    """

    name = "attention.json"

    def of(self, machine: str, where: str | None = None) -> dict[str, dict[str, float]]:
        """Return shape -> kernel -> milliseconds of a machine; with ``where`` None, of any."""
        kept = self._read().get(machine)
        if kept is None or (where is not None and kept["where"] != where):
            return {}
        times: dict[str, dict[str, float]] = kept["times"]
        return times

    def where(self, machine: str) -> str:
        """Return what else a machine's times depend on; "" where none are kept."""
        return str(self._read().get(machine, {}).get("where", ""))

    def keep(self, machine: str, where: str, shape: str, times: Mapping[str, float]) -> None:
        """Keep the times of a shape; of each machine only the latest shapes are kept."""
        known, together = self._read(), self.of(machine, where)
        together.pop(shape, None)
        latest = [*together.items(), (shape, dict(times))][-_SHAPES:]
        known[machine] = {"where": where, "times": dict(latest)}
        self._keep(known)

    def _read(self) -> dict[str, dict[str, Any]]:
        def understood(plain: Any) -> dict[str, dict[str, Any]]:
            return {
                str(machine): {
                    "where": str(kept["where"]),
                    "times": {
                        str(shape): {str(name): float(ms) for name, ms in times.items()}
                        for shape, times in kept["times"].items()
                    },
                }
                for machine, kept in plain.items()
            }

        return self._loaded(understood) or {}


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
