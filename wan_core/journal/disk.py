"""The files of a journal: states that are complete or absent, its lock, and its folder.

A state is a safetensors file. Its metadata holds everything that is not a tensor as a JSON text,
and a checksum of text and tensors. A journal's folder holds up to three states, ``units`` (see that
module), ``identity.json`` and a lock; no other file is ever removed from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..config import GIB
from ..errors import (
    BrokenState,
    InvalidRequest,
    JournalMismatch,
    OutputError,
    first_line,
    is_host_oom,
)
from ..files import atomic_write
from .lock import FileLock, try_lock

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT = 1
_SCHEDULER = "scheduler."
_IN_TENSORS = {"tensor": True}
_NO_STATE = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)
"""What reading a file that is no state raises, besides safetensors' own error."""
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True, slots=True)
class JournalState:
    """A saved state: ``unit`` units are finished.

    ``tensors`` (on the CPU) and ``scalars`` are as they were saved. ``latents`` is set once
    denoising is over.
    """

    unit: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    latents: Tensor | None = None


def write_state(path: Path, key: str, sequence: int, state: JournalState) -> int:
    """Write ``state`` so that ``path`` is complete or unchanged; return the bytes of its tensors.

    Tensors on the CPU are written without a copy. The disk stores one tensor while the checksum of
    it is computed, so the header, which holds the checksum, is written last. Raises OutputError
    where the disk is full or not writable or RAM is short, InvalidRequest for a dtype that
    safetensors does not have.
    """
    head = {"format": FORMAT, "key": key, "sequence": sequence}
    values = {"unit": state.unit, "scalars": state.scalars}
    text = json.dumps({**head, **values})
    # safetensors files have no gaps between tensors. With the widest dtypes first, each tensor
    # still begins at a multiple of its element size.
    with ram_for_a_copy():
        ready = in_ram(state.tensors)
    names = sorted(ready, key=lambda name: (-ready[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        start, end = end, end + ready[name].numel() * ready[name].element_size()
        header[name] = {
            "dtype": _dtype_name(name, ready[name]),
            "shape": list(ready[name].shape),
            "data_offsets": [start, end],
        }

    def opening(checksum: int) -> bytes:
        # Ten digits always, so that the header's length is known before the checksum is.
        metadata = {"journal": text, "checksum": f"{checksum:010d}"}
        found = json.dumps({"__metadata__": metadata, **header}).encode()
        found += b" " * (-len(found) % 8)
        return len(found).to_bytes(8, "little") + found

    first = len(opening(0))

    def write(file: BinaryIO) -> None:
        checksum = zlib.crc32(text.encode())
        for name in sorted(names):
            file.seek(first + header[name]["data_offsets"][0])
            file.write(tensor_bytes(ready[name]))
            _begin_to_store(file)
            checksum = _add_to_checksum(checksum, name, ready[name])
        file.seek(0)
        file.write(opening(checksum))

    # Not safetensors' save_file. It writes to a temporary file of its own, readable by the user
    # alone, which stays behind when the process is killed, under a name that nobody would look for.
    atomic_write(path, write, expected_bytes=first + end)
    return end


@contextlib.contextmanager
def ram_for_a_copy() -> Iterator[None]:
    """Raise OutputError where RAM runs out inside the ``with`` block.

    As it is, that would be taken for the render's, which would go on with a smaller plan.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as err:
        if not is_host_oom(err):
            raise
        raise OutputError(f"There is no RAM for a copy of it ({first_line(err)}).") from err


def in_ram(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in RAM, each whole."""
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def read_state(path: Path, key: str) -> JournalState:
    """Read a state of the render with this ``key``.

    Its tensors are copies, so that the file can be replaced while they are in use. Raises
    FileNotFoundError if there is no file, BrokenState if it cannot be used.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with _named_in_utf8(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            head = json.loads(metadata["journal"])
            if head["format"] != FORMAT:
                raise BrokenState(f"it has format {head['format']}, this version reads {FORMAT}")
            if head["key"] != key:
                raise BrokenState("it belongs to another render")
            names = list(file.keys())
            tensors = {name: file.get_tensor(name).clone() for name in names}
        checksum = zlib.crc32(metadata["journal"].encode())
        for name in sorted(tensors):
            checksum = _add_to_checksum(checksum, name, tensors[name])
        if int(metadata["checksum"]) != checksum:
            raise BrokenState("its checksum is wrong")
        return JournalState(head["unit"], tensors, head["scalars"])
    except FileNotFoundError:
        raise
    except (SafetensorError, *_NO_STATE) as err:
        raise BrokenState(f"it is damaged or not a saved state ({err})") from err


@contextlib.contextmanager
def _named_in_utf8(path: Path) -> Iterator[str]:
    """Yield a name of the file that safetensors can open: on Linux one of a folder may be no text.

    Raises OSError where the file cannot be opened.
    """
    if str(path) == os.fsencode(path).decode("utf-8", "replace"):
        yield str(path)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def state_sequence(path: Path, key: str) -> int | None:
    """Return a state's running number from its header; None if it is not one of this ``key``."""
    head = state_head(path, key)
    return None if head is None else int(head["sequence"])


def state_head(path: Path, key: str) -> dict[str, Any] | None:
    """Return what a state's header says besides tensors; None if it is not one of this ``key``.

    It has "sequence", a number, and "scalars", a dictionary.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with _named_in_utf8(path) as name, safe_open(name, framework="pt") as file:
            head = json.loads((file.metadata() or {})["journal"])
            ours = head["format"] == FORMAT and head["key"] == key
            whole = ours and isinstance(head["scalars"], dict)
            return {**head, "sequence": int(head["sequence"])} if whole else None
    except (SafetensorError, *_NO_STATE):
        return None


def scheduler_state(scheduler: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return everything a diffusers scheduler remembers between steps, as (tensors, plain values).

    All attributes but the configuration are taken, so that nothing a solver keeps (model outputs,
    last sample, order, step index) can be missed. The tensors' names begin with "scheduler.", so
    that they can be saved together with the latents. Raises InvalidRequest for a scheduler that
    keeps other objects.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if name == "_internal_dict":
            continue
        if isinstance(value, list):
            values[name] = [
                _put(f"{name}.{i}", item, tensors, scheduler) for i, item in enumerate(value)
            ]
        else:
            values[name] = _put(name, value, tensors, scheduler)
    return tensors, {"scheduler": {"class": type(scheduler).__name__, "values": values}}


def restore_scheduler(
    scheduler: Any, state: JournalState, device: torch.device | str = "cpu"
) -> None:
    """Put a saved state into a new scheduler whose timesteps have been set.

    Tensors that the scheduler does not have yet go to ``device``. Raises JournalMismatch if class,
    sigmas or timesteps are not those of the saved run.
    """
    saved = state.scalars.get("scheduler", {})
    if saved.get("class") != type(scheduler).__name__:
        raise JournalMismatch(
            f"The saved run used the scheduler {saved.get('class')}, this one uses "
            f"{type(scheduler).__name__}. Choose the same one, or start anew (resume='never')."
        )
    for name in ("sigmas", "timesteps"):
        ours, theirs = getattr(scheduler, name).cpu(), state.tensors.get(_SCHEDULER + name)
        if theirs is None or not (ours.shape == theirs.shape and bool((ours == theirs).all())):
            raise JournalMismatch(
                f"The scheduler's {name} are not those of the saved run: the number of steps or "
                "the flow shift differs. Set them as before, or start anew (resume='never')."
            )
    for name, value in saved["values"].items():
        # Only attributes that the scheduler has: a name from the file must not replace a method.
        # "this_order" is the exception, as it is set at the first step.
        if name not in vars(scheduler) and name != "this_order":
            continue
        if isinstance(value, list):
            items = enumerate(value)
            restored: Any = [_take(f"{name}.{i}", v, state.tensors, device) for i, v in items]
        else:
            present = getattr(scheduler, name, None)
            place = getattr(present, "device", device)
            restored = _take(name, value, state.tensors, place)
        setattr(scheduler, name, restored)


def _put(name: str, value: Any, tensors: dict[str, Tensor], scheduler: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        tensors[_SCHEDULER + name] = value
        return _IN_TENSORS
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InvalidRequest(
        f"The {type(scheduler).__name__} keeps a {type(value).__name__} in {name}, which cannot be "
        "saved. Use one of unipc, euler, dpm++2m, or turn the journal off.",
        field="scheduler",
    )


def _take(name: str, value: Any, tensors: Mapping[str, Tensor], place: Any) -> Any:
    if value == _IN_TENSORS:
        return tensors[_SCHEDULER + name].to(place)
    return value


def _dtype_name(name: str, tensor: Tensor) -> str:
    plain = str(tensor.dtype).removeprefix("torch.")
    if plain not in _DTYPES:
        raise InvalidRequest(
            f"The tensor {name!r} has dtype {plain}, which cannot be saved; convert it to one of "
            f"{', '.join(_DTYPES)}.",
            field=name,
        )
    return _DTYPES[plain]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without copying them."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _add_to_checksum(total: int, name: str, tensor: Tensor) -> int:
    total = zlib.crc32(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode(), total)
    return zlib.crc32(tensor_bytes(tensor), total)


def _begin_to_store(file: BinaryIO) -> None:
    """Ask the system to begin writing to the disk, without waiting for it."""
    file.flush()
    if hasattr(os, "posix_fadvise"):
        # Linux then begins to write the dirty pages; other systems do nothing. The final fsync has
        # less to wait for.
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


SLOTS = ("a.safetensors", "b.safetensors")
DONE = "latents.safetensors"
STATES = (*SLOTS, DONE)
IDENTITY, LOCK, UNITS = "identity.json", "lock", "units"

KEEP, KEEP_BYTES, KEEP_SECONDS = 16, 20 << 30, 30 * 24 * 3600
"""Journals of other renders that are kept: so many, so many bytes of them, and so long after they
were written last. Others are removed when a journal is opened."""

_MAX_IDENTITY = 16 << 20


def is_there(path: Path) -> bool:
    """Say whether a file can be seen: one that the system refuses to look at counts as absent."""
    try:
        return path.is_file()
    except OSError:
        return False


def journals(root: Path) -> Iterator[Path]:
    """Yield the folders below ``root`` that are journals."""
    try:
        folders = sorted(root.iterdir())
    except OSError:
        return
    for folder in folders:
        # Named by a key and with an identity. Anything else is not ours, and is never removed.
        named = len(folder.name) == 32 and not set(folder.name) - set("0123456789abcdef")
        if named and not folder.is_symlink() and is_there(folder / IDENTITY):
            yield folder


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return what ``identity.json`` holds; None if it is absent, damaged or of another format.

    "identity" is what the journal was made for, "owner" the run that opened it last, and "opened"
    a number that grows with every journal that is opened below the same root.
    """
    try:
        path = folder / IDENTITY
        if path.stat().st_size > _MAX_IDENTITY:
            return None
        record = json.loads(path.read_bytes())
        whole = record["format"] == FORMAT and isinstance(record["identity"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(record) if whole else None


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Return the identity a journal was made for; None if it is damaged or of another format."""
    record = read_record(folder)
    return None if record is None else record["identity"]


def opened_number(folder: Path) -> int:
    """Return the running number under which a journal was opened last, 0 if it is not known."""
    number = (read_record(folder) or {}).get("opened")
    return number if isinstance(number, int) else 0


def remove_own_files(folder: Path) -> None:
    """Remove what a journal wrote into its folder, except the lock; raises OSError."""
    for name in (*STATES, UNITS, IDENTITY):
        (folder / name).unlink(missing_ok=True)
    for left_over in folder.glob(".wanfit-*"):
        left_over.unlink(missing_ok=True)


def prune(root: Path, own: Path) -> str | None:
    """Remove the journals of other renders that are too many, and say so; those in use stay.

    ``KEEP``, ``KEEP_BYTES`` and ``KEEP_SECONDS`` say which. The newest are those that were opened
    last, by their running number: times of files are those of clocks, which are set back, and
    differ between the hosts that share a folder. Their age is told by the clock of the disk, which
    has just written the ``own`` journal; what it gives a later time stays. The newest is never too
    large.
    """
    others = [
        (opened_number(folder), _touched(folder), folder)
        for folder in journals(root)
        if folder != own
    ]
    now, kept, removed, freed = _touched(own), 0, 0, 0
    for place, (_, touched, folder) in enumerate(sorted(others, reverse=True)):
        size = journal_bytes(folder)
        too_old = touched and now - touched > KEEP_SECONDS
        if place < KEEP and not too_old and (not kept or kept + size <= KEEP_BYTES):
            kept += size
        elif _remove(folder):
            removed, freed = removed + bool(size), freed + size
    if not removed:
        return None
    return (
        f"Saved renders that were not gone on with were removed from {str(root)!r}, the oldest: "
        f"{removed} of {freed / GIB:.2f} GiB. Kept are the {KEEP} latest of at most "
        f"{KEEP_SECONDS // 86400} days and {KEEP_BYTES / GIB:.0f} GiB."
    )


def _remove(folder: Path) -> bool:
    """Remove a journal and say whether it is gone; one that a run has stays.

    So does one of another user, which the system does not let us remove: that must not keep the
    others from being removed.
    """
    try:
        lock = try_lock(folder / LOCK)
        if lock is None:
            return False
        remove_journal(folder, lock)
    except OSError:  # also where another run is removing it
        return False
    return True


def journal_bytes(folder: Path) -> int:
    """Return the bytes of a journal's states and units; 0 where there is none."""
    total = 0
    for name in (*STATES, UNITS):
        with contextlib.suppress(OSError):
            total += (folder / name).stat().st_size
    return total


def remove_journal(folder: Path, lock: FileLock) -> None:
    """Remove what a journal wrote, its ``lock``, which is freed, and the folder if nothing is left.

    The lock goes last, so that no other run takes the folder up half removed; where open files can
    be removed, while it is held: once it is free, another run may hold it. Raises OSError where
    something cannot be removed but the lock and the folder.
    """
    with lock:
        remove_own_files(folder)
        if sys.platform != "win32":
            (folder / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _touched(folder: Path) -> float:
    paths = (folder / name for name in (*STATES, UNITS, IDENTITY))
    return max((path.stat().st_mtime for path in paths if is_there(path)), default=0.0)
