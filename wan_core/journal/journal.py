"""The journal: what is needed to continue a render in another process after a crash.

A journal is a folder ``root/<key>``. The key is the hash of the render's identity, that is of
everything that decides its result. The folder holds

- ``identity.json``, to name the differences from other renders;
- two states ``a`` and ``b``, written alternately. A state is the latents and the scheduler's memory
  after some finished steps. A crash can damage only the one being written; the other is complete.
- ``latents``, once denoising is over;
- ``units``, the passes that are finished of steps whose state is not saved (``units``).

So it takes the space of at most three states (one of them being written), the latents, and units of
eight times the latents. A state of a UniPC run is four times as large as the latents.

A journal never stops a render. States that cannot be read are ignored with a warning, and the
render starts anew. If one cannot be written, the journal is turned off with a warning. Only
``resume="must"`` raises.

One run at a time has a journal. A lock sees to that, and where the locks of another host are not
seen, ``identity.json`` does: it names the run that opened the journal last, and the one before
leaves it alone from then on. No time of a file decides anything, because clocks are set back.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RESUME
from ..errors import BrokenState, InvalidRequest, JournalMismatch, OutputError
from ..files import atomic_write, sweep
from .disk import (
    DONE,
    FORMAT,
    IDENTITY,
    LOCK,
    SLOTS,
    STATES,
    UNITS,
    JournalState,
    is_there,
    journals,
    opened_number,
    prune,
    read_identity,
    read_record,
    read_state,
    remove_journal,
    remove_own_files,
    restore_scheduler,
    scheduler_state,
    state_sequence,
    write_state,
)
from .identity import (
    canonical_json,
    field_count,
    identity_differences,
    identity_key,
    listed,
    plain_identity,
)
from .lock import FileLock, try_lock
from .unit_log import UnitLog

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Journal", "JournalState", "restore_scheduler", "scheduler_state"]


USUAL_BYTES_PER_SECOND = 400e6
"""For the first save alone. Measured with fsync on a virtual disk: 0.08 s for the 34 MB of a UniPC
state at 480p, 0.14 s for the 77 MB of one at 720p, 81 frames."""
_ANOTHER_VIDEO = ("job.seed", "job.prompt", "given.")
"""Fields of a render's identity that are changed to see another video. One that is cut off for
that is not missed."""
_MOST_KEPT = 4 << 20
"""Characters that are kept beside the identity at most."""


class Journal:
    """The journal of one render; made by ``Journal.open``, ended by ``finish`` or ``close``.

    ``warnings`` holds a sentence for everything that went wrong or was not used. ``enabled`` is
    False once the journal has been turned off. For use from one thread.
    """

    def __init__(
        self, root: str | os.PathLike[str], identity: Mapping[str, object], max_share: float,
        keep: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.identity = plain_identity(identity)
        self.key = identity_key(self.identity)
        self.root = Path(root)
        self.folder = self.root / self.key
        self.max_share = max_share
        kept = dict(keep or {})
        self._kept = kept if sum(map(len, kept.values())) <= _MOST_KEPT else {}
        self.enabled = True
        self.resuming = False
        self.units_alone = False
        """Whether it must go on, from finished passes: of no whole step is there a state."""
        self.warnings: list[str] = []
        self.saves = 0
        self.state_bytes = 0
        self.seconds_spent = 0.0
        self._seconds_last: float | None = None
        self._opened = time.monotonic()
        self._opened_as = 0
        self._slot = 0
        self._sequence = 0
        self._must = self._left = False
        self._lock: FileLock | None = None
        self._owner_before: object = None
        self._owner = {
            "host": platform.node(), "process": os.getpid(), "run": secrets.token_hex(8)
        }  # fmt: skip

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str],
        identity: Mapping[str, object],
        resume: str = "auto",
        *,
        max_share: float = 0.01,
        keep: Mapping[str, str] | None = None,
    ) -> Journal:
        """Open the journal of the render that ``identity`` describes, below ``root``.

        ``root`` is a folder that holds nothing but journals. ``identity`` may hold whatever
        ``plain_identity`` accepts. ``max_share`` is the share of the time that ``due`` allows for
        saving; with infinity it is always due. ``keep`` are texts for whoever looks at the saved
        render, such as a workflow; very long ones are left out. ``resume`` is one of

        - "auto": continue if there is a saved state, else start anew;
        - "never": start anew;
        - "must": continue, from finished passes too where no state is saved, or raise
          JournalMismatch, which names what differs from the most similar saved render.

        Raises InvalidRequest for any other ``resume``.
        """
        if resume not in RESUME:
            raise InvalidRequest(
                f"resume is {resume!r}; allowed: {', '.join(RESUME)}.", field="resume"
            )
        # Looked for before the folder is prepared: "must" without a state leaves nothing behind.
        journal = cls(root, identity, max_share, keep)
        journal._must = resume == "must"
        journal.resuming = resume != "never" and journal._has_state()
        journal.units_alone = journal._must and not journal.resuming and journal._has_units()
        if journal._must and not (journal.resuming or journal.units_alone):
            raise JournalMismatch(journal._nothing_to_resume())
        try:
            journal._prepare(resume)
        except (OSError, OutputError) as err:
            journal._give_up(err)
        return journal

    # --- states ------------------------------------------------------------------------------

    def load(self) -> JournalState | None:
        """Return the newest complete state, or None to start anew; warn of every damaged file.

        Raises JournalMismatch if ``resume="must"`` and no state is complete.
        """
        if not self.resuming:
            return None
        done = self._read_whole([self.folder / DONE])
        if done is not None:
            return JournalState(0, {}, done[0].scalars, done[0].tensors["latents"])
        found = self._read_whole(self._slots_newest_first())
        if found is not None:
            # Overwrite the other one first: the state that is continued must stay until the next
            # is complete.
            self._slot = 1 - SLOTS.index(found[1].name)
            return found[0]
        if self._must:
            raise JournalMismatch(
                f"No saved state in {str(self.folder)!r} can be used. {' '.join(self.warnings)} "
                "Use resume='auto' to start anew."
            )
        self.warnings.append("No saved state can be used; the render starts anew.")
        return None

    def discard(self, why: JournalMismatch) -> None:
        """Go on without the state that ``load`` gave: with "must" raise ``why``, else warn of it.

        It stays on the disk until newer ones are complete.
        """
        if self._must:
            raise why
        self.warnings.append(f"The saved render is not gone on with, this one starts anew: {why}")

    def due(self, nbytes: int = 0) -> bool:
        """Say whether saving now would stay within ``max_share`` of the time since opening.

        The allowance grows with time: where saving after every unit takes too long, it happens
        after every few. A save is taken to last as long as the one before; the first one, of
        ``nbytes``, as a usual disk takes for it.
        """
        last = self._seconds_last
        expected = nbytes / USUAL_BYTES_PER_SECOND if last is None else last
        return self.enabled and self.seconds_spent + expected <= self.max_share * self.elapsed

    @property
    def elapsed(self) -> float:
        """Seconds since the journal was opened."""
        return time.monotonic() - self._opened

    def save(
        self,
        unit: int,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any] | None = None,
    ) -> bool:
        """Save a state after ``unit`` finished units; return True if it was written.

        ``scalars`` may hold anything that JSON can. A disk that is full or read-only turns the
        journal off with a warning, and leaves the earlier states as they are.
        """
        state = JournalState(unit, dict(tensors), dict(scalars or {}))
        written = self._write(SLOTS[self._slot], state)
        if written:  # only now may the state before be overwritten
            self._slot = 1 - self._slot
        return written

    def latents_done(self, latents: Tensor, scalars: Mapping[str, Any] | None = None) -> bool:
        """Save the finished latents. From now on only the decode would have to be repeated.

        They are tried also after a state could not be written, as they are smaller than one. Where
        room is short, the states of the loop are removed for them, and then for the video.
        """
        state = JournalState(0, {"latents": latents}, dict(scalars or {}))
        written = self._write(DONE, state)
        if written or self._lock is None or self._left:
            if written:
                self._make_room()
            return written
        older = self._slots_newest_first()[1:]
        for path in (None, *older):
            with contextlib.suppress(OSError, OutputError):
                if path is not None:
                    path.unlink()
                write_state(self.folder / DONE, self.key, self._sequence + 1, state)
                self.saves += 1
                self._make_room()
                self.warnings.append(
                    "The finished latents are saved all the same: from here on, a crash would lose "
                    "the decode only."
                )
                return True
        return False

    def _make_room(self) -> None:
        """Remove the states of the loop, once the latents are saved, where the disk is nearly full.

        Elsewhere they stay, for the case that the latents are damaged.
        """
        slots = [path for name in SLOTS if is_there(path := self.folder / name)]
        with contextlib.suppress(OSError):
            if shutil.disk_usage(self.folder).free < sum(path.stat().st_size for path in slots):
                for path in slots:
                    path.unlink()

    def _write(self, name: str, state: JournalState) -> bool:
        if not self.enabled:
            return False
        began = time.monotonic()
        try:
            if not self._still_owner():
                return False
            size = write_state(self.folder / name, self.key, self._sequence + 1, state)
        except (OSError, OutputError) as err:
            self._give_up(err)
            return False
        self._sequence += 1
        self.saves += 1
        self.state_bytes = size
        self._seconds_last = time.monotonic() - began
        self.seconds_spent += self._seconds_last
        return True

    def _read_whole(self, paths: list[Path]) -> tuple[JournalState, Path] | None:
        for path in paths:
            try:
                return read_state(path, self.key), path
            except FileNotFoundError:
                continue
            except BrokenState as err:
                self.warnings.append(f"The saved state {path.name!r} is not used: {err}.")
        return None

    def _slots_newest_first(self) -> list[Path]:
        """Return the states on the disk, the newest first.

        Unreadable ones come before all others: whoever reads them in this order meets each of them
        and can warn of it before a complete state ends the search.
        """
        found = []
        for name in SLOTS:
            path = self.folder / name
            if is_there(path):
                sequence = state_sequence(path, self.key)
                self._sequence = max(self._sequence, sequence or 0)
                found.append((math.inf if sequence is None else sequence, path))
        return [path for _, path in sorted(found, reverse=True)]

    # --- end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """Remove the journal of a finished render, but no file that is not its own."""
        self.enabled = self.resuming = False
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            record = read_record(self.folder)
            owner = None if record is None else record.get("owner")
            if owner not in (None, self._owner, self._owner_before):
                self.close()  # another run goes on with it
                return
            lock, self._lock = self._lock, None
            remove_journal(self.folder, lock)
            self.root.rmdir()

    def close(self) -> None:
        """Unlock the folder and leave its states for a later run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> str:
        """Return a line for a report: states, size, seconds, share of the time, folder."""
        elapsed = max(time.monotonic() - self._opened, 1e-9)
        return (
            f"{self.saves} states of {self.state_bytes / 1e6:.1f} MB saved in "
            f"{self.seconds_spent:.2f} s ({self.seconds_spent / elapsed:.1%} of the time) "
            f"in {str(self.folder)!r}"
        )

    def _give_up(self, err: BaseException) -> None:
        self.enabled = False
        self.warnings.append(
            f"The render goes on but is not saved any more, a crash would lose it: {err}"
        )

    # --- folder ------------------------------------------------------------------------------

    def _has_state(self) -> bool:
        return any(is_there(self.folder / name) for name in STATES)

    def _has_units(self) -> bool:
        return len(UnitLog(self.folder / UNITS)) > 0

    def _still_owner(self) -> bool:
        """Say whether this run still has the journal; if not, turn it off with a warning.

        On disks whose locks other hosts do not see, two runs of one video may have opened it. The
        later has it: it may have gone on from the states of the other.
        """
        record = read_record(self.folder)
        if record is None:  # a run that ended has removed it, or the disk has damaged it
            self._write_identity()
            return True
        if record.get("owner") == self._owner:
            return True
        self.enabled, self._left = False, True
        self.warnings.append(
            f"Another run{_named(record)} has gone on with the journal {str(self.folder)!r}; this "
            "run goes on without one."
        )
        return False

    def _write_identity(self) -> None:
        record = {
            "format": FORMAT, "identity": self.identity, "owner": self._owner,
            "opened": self._opened_as, "kept": self._kept,
        }  # fmt: skip
        atomic_write(self.folder / IDENTITY, canonical_json(record))

    def _prepare(self, resume: str) -> None:
        """Create and lock the folder, tidy it, and write the identity; raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Before anything is removed or written: another process may be at the same render.
        self._lock = try_lock(self.folder / LOCK)
        if self._lock is None:
            reason = (
                f"Another run{_named(read_record(self.folder))} is making this video with the "
                f"journal {str(self.folder)!r}"
            )
            if self._must:
                raise JournalMismatch(f"{reason}. Wait for it or stop it.")
            self.enabled = self.resuming = False
            self.warnings.append(f"{reason}; this run starts anew and keeps none.")
            return
        if resume == "never":
            remove_own_files(self.folder)
        elif self.resuming:
            newest = self._slots_newest_first()
            self._slot = 1 - SLOTS.index(newest[0].name) if newest else 0
        elif related := self._related():
            self.warnings.append(related)
        self._owner_before = (read_record(self.folder) or {}).get("owner")
        sweep(self.folder)  # not what another host may be writing, or has left
        others = (opened_number(folder) for folder in journals(self.root))
        self._opened_as = 1 + max(others, default=0)
        self._write_identity()
        with contextlib.suppress(OSError):
            if removed := prune(self.root, self.folder):
                self.warnings.append(removed)

    def _nearest(self) -> tuple[str, list[str]] | None:
        """Return the key of the most similar other saved render, and the differences from it."""
        others = [
            (folder.name, identity_differences(identity, self.identity))
            for folder in journals(self.root)
            if folder != self.folder
            and any(is_there(folder / name) for name in STATES)
            and (identity := read_identity(folder)) is not None
        ]
        return min(others, key=lambda other: len(other[1]), default=None)

    def _nothing_to_resume(self) -> str:
        text = f"There is no saved state of this render below {str(self.root)!r}."
        if nearest := self._nearest():
            text += f" The nearest, {nearest[0]}, differs in {listed(nearest[1])}."
        return text + " Give the same inputs as before, or use resume='auto' to start anew."

    def _related(self) -> str | None:
        """Return a warning if another saved render has at least half of the fields in common.

        The user has probably changed a setting and expects the render to continue, but for those
        that make another video.
        """
        nearest = self._nearest()
        if nearest is None or 2 * len(nearest[1]) > field_count(self.identity):
            return None
        if any(difference.startswith(_ANOTHER_VIDEO) for difference in nearest[1]):
            return None
        return (
            f"The saved render {nearest[0]} is not continued, this one starts anew: it differs in "
            f"{listed(nearest[1])}."
        )


def _named(record: Mapping[str, Any] | None) -> str:
    """Return the process and host of the run that a journal's record names, for a message."""
    owner = None if record is None else record.get("owner")
    if not isinstance(owner, dict):
        return ""
    return f" (process {owner.get('process')} on {owner.get('host')!r})"
