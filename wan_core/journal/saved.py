"""The renders that can go on, from their journals below a folder: what they are, and away with one.

Only headers are read; no tensor is.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest, OutputError
from .disk import (
    DONE,
    IDENTITY,
    LOCK,
    SLOTS,
    STATES,
    UNITS,
    is_there,
    journals,
    read_record,
    remove_journal,
    state_head,
)
from .lock import try_lock

_JOB = ("width", "height", "wanted_frames", "num_frames", "num_inference_steps", "seed", "fps")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRender:
    """A render that was cut off, or is under way, as its journal tells it."""

    key: str
    """Name of its folder: 32 hex digits."""
    variant: str
    job: Mapping[str, Any]
    """Sizes, frames, steps and seed, as far as they are told."""
    prompt: str
    nbytes: int
    """Bytes of its files."""
    opened: int
    """Grows with every journal that is opened below one folder."""
    touched: float
    """When it was last written, in seconds of the clock of the disk."""
    next_step: int | None
    """Steps that are done; None where a state is there and cannot be read."""
    finished: bool
    """Whether only the decode is missing."""
    own: bool
    """Whether this process opened it last."""
    kept: Mapping[str, str]
    """Texts that were given to be kept with it: ComfyUI's workflow."""


def saved_renders(root: Path) -> list[SavedRender]:
    """Return what can go on below ``root``, the latest first; what cannot be read is left out."""
    found = [_saved(folder) for folder in journals(root)]
    whole = [one for one in found if one is not None]
    return sorted(whole, key=lambda one: (one.opened, one.touched), reverse=True)


def remove_saved(root: Path, key: str) -> int:
    """Remove the journal ``key`` below ``root`` and return its bytes; files not its own stay.

    Raises InvalidRequest where there is none, or where a render is at it, and OutputError where
    the system does not let it be removed.
    """
    folder = next((one for one in journals(root) if one.name == key), None)
    if folder is None:
        raise InvalidRequest("There is no such saved render; it may have gone on.", field="id")
    nbytes = _nbytes(folder)
    try:
        lock = try_lock(folder / LOCK)
        if lock is None:
            raise InvalidRequest(
                "A render is at it now. Interrupt that first, or wait for its end.", field="id"
            )
        remove_journal(folder, lock)
    except OSError as err:
        raise OutputError(
            f"The saved render cannot be removed: {err.strerror}. Remove {str(folder)!r} by hand."
        ) from err
    return nbytes


def _saved(folder: Path) -> SavedRender | None:
    record = read_record(folder)
    states = [name for name in STATES if is_there(folder / name)]
    # Without a state there may be finished passes of the first step.
    files = states or [UNITS] * bool(_status(folder / UNITS)[0])
    if record is None or not files:
        return None
    identity, owner, kept = record["identity"], record.get("owner"), record.get("kept")
    job = identity.get("job") if isinstance(identity.get("job"), dict) else {}
    heads = [head for name in SLOTS if (head := state_head(folder / name, folder.name))]
    latest = max(heads, key=lambda head: int(head["sequence"]), default=None)
    step = None if states else 0
    if latest is not None:
        step = latest["scalars"].get("next_step")
    here = (platform.node(), os.getpid())
    opened = record.get("opened")
    return SavedRender(
        key=folder.name,
        variant=str(identity.get("variant")),
        job={name: job[name] for name in _JOB if isinstance(job.get(name), int | float)},
        prompt=str(job.get("prompt") or ""),
        nbytes=_nbytes(folder),
        opened=opened if isinstance(opened, int) else 0,
        touched=max(_touched(folder / name) for name in files),
        next_step=step if isinstance(step, int) else None,
        finished=DONE in states,
        own=isinstance(owner, dict) and (owner.get("host"), owner.get("process")) == here,
        kept={str(k): v for k, v in kept.items() if isinstance(v, str)}
        if isinstance(kept, dict)
        else {},
    )


def _nbytes(folder: Path) -> int:
    return sum(_status(folder / name)[0] for name in (*STATES, UNITS, IDENTITY))


def _touched(path: Path) -> float:
    return _status(path)[1]


def _status(path: Path) -> tuple[int, float]:
    """Return size and time of a file; zeros for one that is gone."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0.0
    return found.st_size, found.st_mtime
