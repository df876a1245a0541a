"""A gang: the processes that compute one unit together, as the driver sees them. Mostly one.

Several cut the tokens of a unit among them (``group``). They start together, get every cut unit
together, and end together: where one dies, hangs or runs out of memory in the middle, all are
ended, because the others wait for it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..forward import torch_settings
from ..journal import FileLock, try_lock
from .messages import Message
from .process import WorkerProcess

START_SECONDS = 180.0
"""How long processes may take to import their packages and to meet. Assumed, not measured on a slow
disk."""
_FIRST_SECONDS = 180.0
"""How long one may say nothing in a unit that is new to it: kernels may be compiled. Assumed."""
_QUIET_SECONDS, _QUIET_FACTOR = 15.0, 8.0
"""After that: how long it may say nothing, and how many times the longest pause it has made. It
speaks at every block of the model. Assumed."""
_CAUSE_SECONDS = 2.0
"""How long a gang that is broken is given to say why. The first to speak is often not the cause."""

_FOLDER, _LOCK = "wanfit_gang_", "lock"
"""How the folders begin in which gangs meet, and the file in them that their driver has locked."""
_STRAY_SECONDS = 24 * 3600.0
"""A folder without a lock may be one that was made a moment ago; one as old as this is left over.
Assumed."""

Told = Callable[[WorkerProcess, Message | None], object]


@dataclass(slots=True)
class Rank:
    """One process of a gang."""

    process: WorkerProcess
    device_name: str = ""
    started: bool = False
    joined: bool = False
    weights: set[str] = field(default_factory=set)
    conditions: int = -1
    released: bool = True
    busy: bool = False
    """Whether it has the gang's unit in work."""
    peak_bytes: int = 0
    decode_peak_bytes: int = 0
    copied_bytes: int = 0
    """What it has copied of weights that the gang streams and shares."""


class Gang:
    """Processes on ``devices`` that compute units together; ``told`` hears what they say."""

    def __init__(self, devices: Sequence[str], name: str, told: Told) -> None:
        self.devices, self.name = tuple(devices), name
        self.heard = time.perf_counter()
        self.unit: int | None = None
        self.cuts = False
        """Whether its unit in work is cut over its processes."""
        self.kind: tuple[object, ...] = ()
        """Weights and shapes of the unit in work."""
        self.kinds: set[tuple[object, ...]] = set()
        """Those of the units that it has finished."""
        self.done, self.cut, self.seconds = 0, 0, 0.0
        self.pause = 0.0
        """The longest time between two messages within a unit of a kind that it knows."""
        self.broken: tuple[float, str] | None = None
        """Since when one process has missed another, and what it said."""
        self._place: Path | None = None
        self._lock: FileLock | None = None
        if self.size > 1:
            self._place, self._lock = _meeting_place()
        self.ranks: list[Rank] = []
        try:
            for device in self.devices:
                self.ranks.append(Rank(WorkerProcess(device, told)))
        except OSError:
            self.kill()  # one that waits for those that never come would hold its card
            raise
        self._send_settings()

    @property
    def size(self) -> int:
        """Return of how many processes it is."""
        return len(self.devices)

    @property
    def ready(self) -> bool:
        """Whether all its processes have started and met."""
        return all(rank.joined for rank in self.ranks)

    @property
    def idle(self) -> bool:
        """Whether it can be given a unit."""
        free = all(rank.released and not rank.busy for rank in self.ranks)
        return self.ready and self.unit is None and free

    def of(self, process: WorkerProcess) -> Rank | None:
        """Return the rank of a process, or None if it is another gang's."""
        return next((rank for rank in self.ranks if rank.process is process), None)

    def hears(self) -> None:
        """Note that one of them has said something."""
        now = time.perf_counter()
        if self.unit is not None and self.kind in self.kinds:
            self.pause = max(self.pause, now - self.heard)
        self.heard = now

    def started(self, rank: Rank) -> None:
        """Note that a process has started; when all have, they are told to meet."""
        rank.started = True
        if self.size == 1:
            rank.joined = True
        elif all(one.started for one in self.ranks):
            for number, one in enumerate(self.ranks):
                where = {"rank": number, "size": self.size, "place": str(self._met)}
                one.process.send({"type": "gang", **where})

    @property
    def _met(self) -> Path:
        assert self._place is not None
        return self._place / "meeting"

    def send(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Send a message to all its processes; never waits."""
        for rank in self.ranks:
            rank.process.send(header, tensors)

    def begins(
        self, number: int, kind: tuple[object, ...], ranks: Sequence[Rank], *, cut: bool = False
    ) -> None:
        """Note that some of its processes, or all, are given a unit."""
        self.cuts = cut
        self.unit, self.kind, self.heard = number, kind, time.perf_counter()
        for rank in ranks:
            rank.busy = True

    def answered(self, rank: Rank) -> bool:
        """Note that a process has done with its unit; return whether all have, and it is free."""
        rank.busy = False
        if any(one.busy for one in self.ranks):
            return False
        self.unit = None
        return True

    def trouble(self, quiet_seconds: float | None) -> str | None:
        """Return why the gang is to be ended, or None; ``quiet_seconds`` as for the pool."""
        now = time.perf_counter()
        if self.broken is not None:
            since, why = self.broken
            return f"has fallen apart ({why})" if now - since > _CAUSE_SECONDS else None
        quiet = now - self.heard
        if not self.ready:
            return f"did not start within {quiet:.0f} s" if quiet > START_SECONDS else None
        if self.unit is not None and quiet > self._patience(quiet_seconds):
            return f"said nothing for {quiet:.0f} s"
        return None

    def _patience(self, quiet_seconds: float | None) -> float:
        """Return how long it may say nothing in the middle of a unit."""
        if quiet_seconds is not None:
            return quiet_seconds
        if self.kind not in self.kinds:
            return _FIRST_SECONDS
        return max(_QUIET_SECONDS, _QUIET_FACTOR * self.pause)

    def _send_settings(self) -> None:
        """Have its processes compute as this one does, whatever others have set for torch."""
        self.send({"type": "settings", "settings": torch_settings()})

    def begins_render(self) -> None:
        """Forget what was counted, and see what is set for torch by now."""
        self._send_settings()
        self.done, self.cut, self.seconds = 0, 0, 0.0
        for rank in self.ranks:
            rank.peak_bytes = rank.decode_peak_bytes = rank.copied_bytes = 0

    def describe(self) -> list[dict[str, Any]]:
        """Return what each process has done: device, name, units, seconds and peak bytes."""
        more: dict[str, Any] = {"gang": self.name, "cut": self.cut} if self.size > 1 else {}
        return [
            {
                "device": rank.process.device, "name": rank.device_name, "units": self.done,
                "seconds": round(self.seconds, 3), "peak_bytes": rank.peak_bytes, **more,
                **{
                    name: value
                    for name in ("copied_bytes", "decode_peak_bytes")
                    if (value := getattr(rank, name))
                },
            }
            for rank in self.ranks
        ]  # fmt: skip

    def kill(self) -> None:
        """End all its processes at once."""
        for rank in self.ranks:
            rank.process.kill()
        self._leave()

    def stop(self) -> None:
        """Wait until all, which have been asked to, have ended; kill those that do not."""
        for rank in self.ranks:
            rank.process.stop()
        self._leave()

    def _leave(self) -> None:
        if self._lock is not None:
            self._lock.close()
        if self._place is not None:
            shutil.rmtree(self._place, ignore_errors=True)


def name_of(devices: Sequence[str], first: int) -> str:
    """Return what a gang on ``devices`` is called whose first worker has this number, from 1."""
    if len(devices) == 1:
        return f"{devices[0]} (worker {first})"
    return f"{', '.join(devices)} (workers {first} to {first + len(devices) - 1})"


def unheld(gangs: Sequence[Gang], devices: Sequence[str]) -> list[Gang]:
    """Return the gangs that may be given work: those on ``devices``, which are held, wait."""
    held, ours = Counter(devices), []
    for gang in gangs:
        waits = any(held[device] > 0 for device in gang.devices)
        held -= Counter(gang.devices)  # a device that is named twice has two workers
        ours += [] if waits else [gang]
    return ours


def _meeting_place() -> tuple[Path, FileLock]:
    """Make a folder that nobody else uses, and keep its lock; remove those of dead processes.

    Raises OSError where the temporary folder cannot be written.
    """
    _sweep(Path(tempfile.gettempdir()))
    while True:
        place = Path(tempfile.mkdtemp(prefix=_FOLDER))
        with contextlib.suppress(FileNotFoundError):  # another driver has swept it meanwhile
            lock = try_lock(place / _LOCK)
            if lock is not None:
                return place, lock


def _sweep(folder: Path) -> None:
    """Remove the meeting places below ``folder`` whose driver was killed; never raises OSError.

    A driver that lives has the lock. Places of another user, links, and what holds no lock and is
    not old are left alone; and all on systems without such locks, which have no gangs.
    """
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        for place in folder.glob(f"{_FOLDER}*"):
            with contextlib.suppress(OSError):
                _remove_left_over(place)


def _remove_left_over(place: Path) -> None:
    """Remove a meeting place that nobody uses; raises OSError where somebody does, or may."""
    if sys.platform == "win32":
        return
    import fcntl

    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return
    try:
        lock = os.open(place / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        if time.time() - found.st_mtime > _STRAY_SECONDS:
            shutil.rmtree(place, ignore_errors=True)
        return
    try:
        # Raises BlockingIOError for a living driver, and OSError where there are no locks.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(lock)
