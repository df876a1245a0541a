"""Finished units of work, kept until the state after their step is saved.

A state is a few times as large as the latents, and is not saved after every step. The velocity of
a unit is smaller than the latents, so it may be kept at once: a render that is killed then repeats
the units that were in work and no others. A unit is found again by all that it depends on, the bits
of its latents included, so one of another step is never taken for it.

They are records of one file (``unit_log``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import OutputError
from .disk import UNITS, tensor_bytes
from .journal import USUAL_BYTES_PER_SECOND, Journal
from .unit_log import UnitLog

if TYPE_CHECKING:
    from torch import Tensor

    from ..sampling import Made, Unit

_LIMIT = 8
"""Bytes of units at most, in those of a clip's latents: as two states of a UniPC run. Where saving
has its time, a state ends them long before."""
_SHARE = 0.5
"""Of the time that states may take, what units may take beside them."""


def unit_name(unit: Unit, about: str) -> str:
    """Return 32 hex digits that name a unit, the same for the same computation.

    ``about`` says what else its bits depend on: the part of the clip, the plan's choices, the
    device. The clip's conditions are the render's identity.
    """
    text = json.dumps([
        about, float(unit.timestep), list(unit.indices), unit.second, unit.keep,
        _summary(unit.latents), None if unit.residual is None else _summary(unit.residual),
    ])  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _summary(tensor: Tensor) -> list[object]:
    plain = tensor.detach().to("cpu").contiguous()
    return [str(plain.dtype), list(plain.shape), zlib.crc32(tensor_bytes(plain))]


class KeptUnits:
    """The finished units of one render, as ``sampling.Kept`` wants them.

    They are kept as long as that takes half the share of the time that states may take, beside
    those. What goes wrong becomes a warning, and no more are kept.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._log: UnitLog | None = None
        if journal.enabled or journal.resuming:
            self._log = UnitLog(journal.folder / UNITS)
        self._about: Callable[[], str] = str
        self._limit = 0
        self._seconds_per_byte = 1 / USUAL_BYTES_PER_SECOND
        self.seconds_spent = 0.0
        self.whole = True
        """Whether all that were finished since the last state of a whole step are kept."""
        self.kept, self.left_out, self.found = 0, 0, 0

    def of(self, latents: Tensor, about: Callable[[], str]) -> KeptUnits:
        """Return this, for a clip or segment of these latents; ``about`` is as in ``unit_name``."""
        self._limit, self._about = _LIMIT * latents.nbytes, about
        return self

    def name(self, unit: Unit) -> str:
        """Name a unit before it is computed; empty where none is kept."""
        if self._log is None or not (self._journal.enabled or self._log):
            return ""
        if not self._log and not self._affords(0):
            return ""
        began = time.monotonic()
        name = unit_name(unit, self._about())
        self.seconds_spent += time.monotonic() - began
        return name

    def _affords(self, nbytes: int) -> bool:
        """Say whether so many bytes may be kept now."""
        journal, seconds = self._journal, self.seconds_spent + nbytes * self._seconds_per_byte
        return journal.enabled and seconds <= _SHARE * journal.max_share * journal.elapsed

    def find(self, name: str) -> Made | None:
        """Return what a unit gave, if it was kept."""
        if not name or self._log is None:
            return None
        found = None
        with contextlib.suppress(OSError):
            found = self._log.find(name)
        if found is None or "velocity" not in found:
            return None
        self.found += 1
        return found["velocity"], found.get("residual")

    def keep(self, name: str, made: Made) -> None:
        """Keep what a unit gave, if there is time and room for it."""
        if self._log is None or not self._journal.enabled:
            self.whole = False
            return
        tensors = {"velocity": made[0]} | ({} if made[1] is None else {"residual": made[1]})
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        room = self._log.nbytes + nbytes <= self._limit
        if not name or not room or not self._affords(nbytes):
            self.whole, self.left_out = False, self.left_out + 1
            return
        began = time.monotonic()
        try:
            self._log.add(name, tensors)
        except (OSError, OutputError) as err:
            self._give_up(err)
            return
        seconds = time.monotonic() - began
        self.seconds_spent += seconds
        self._seconds_per_byte = seconds / max(nbytes, 1)
        self.kept += 1

    def step_saved(self) -> None:
        """Forget them: the state after their step is saved."""
        self.whole = True
        if self._log is not None:
            try:
                self._log.clear()
            except OSError as err:
                self._give_up(err)

    def remove(self) -> None:
        """Remove the file: no step will be made again."""
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.remove()
            self._log = None

    def close(self) -> None:
        """Leave the file for a later run."""
        if self._log is not None:
            self._log.close()

    def _give_up(self, err: Exception) -> None:
        self._journal.warnings.append(
            "The passes of a step are not kept any more; a crash would cost those of the step in "
            f"work: {err}"
        )
        self.whole = False
        self.remove()

    @property
    def there(self) -> bool:
        """Whether the file holds units that a later run can take over."""
        return self._log is not None and len(self._log) > 0

    def describe(self) -> str:
        """Return half a sentence for a report; empty where there is nothing to say."""
        said = f"; {self.kept} passes of steps kept in {self.seconds_spent:.2f} s"
        if self.left_out:
            said += f"; {self.left_out} passes not kept, as it would have taken too long"
        if not self.kept + self.left_out + self.found:
            return ""
        return said + (f"; {self.found} passes taken over" if self.found else "")
