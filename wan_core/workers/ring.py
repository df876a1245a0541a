"""Pictures on their way from several workers to the driver: a file in memory that all of them map.

Each worker writes its part of a picture where it belongs, so that nobody puts pictures together and
none goes through a pipe. The file is in /dev/shm where that has room, else in the temporary folder.
On Linux it has no name from the first moment on: the others open it through the driver's entry in
/proc, and nothing is left over, however they end. Elsewhere its name goes when all have mapped it,
and stays where the driver is killed before.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..memory import COLUMNS, Strip
from ..sampling import Leaving, StreamingDecoder

_SHARED = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Ring:
    """``slots`` chunks of pictures (B, f, H, W, 3); chunk k of a clip is in slot k % slots."""

    path: str
    slots: int
    shape: tuple[int, int, int, int, int]
    whole_bytes: bool
    """Whether pictures are uint8; else they are float32, 0..1."""
    file: tuple[int, int] = (0, 0)
    """Device and number of the file: what is at ``path`` later may be another."""
    _open: list[int] = field(default_factory=list, compare=False, repr=False)
    """The driver's descriptor, where that is all that keeps the file."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the pictures."""
        return torch.uint8 if self.whole_bytes else torch.float32

    @property
    def nbytes(self) -> int:
        """Return how many bytes the file has."""
        return self.slots * torch.Size(self.shape).numel() * self.dtype.itemsize

    @staticmethod
    def make(slots: int, shape: tuple[int, int, int, int, int], *, whole_bytes: bool) -> Ring:
        """Make the file. Raises OSError where there is no room for it anywhere."""
        nbytes = Ring("", slots, shape, whole_bytes).nbytes
        folders = [str(_SHARED)] if os.access(_SHARED, os.W_OK) else []
        for folder in (*folders, None):
            handle, path = tempfile.mkstemp(prefix="wanfit_ring_", dir=folder)
            try:
                # All of it now: a page that cannot be had later would end the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, nbytes)
                else:
                    os.truncate(handle, nbytes)
            except OSError:
                os.close(handle)
                os.unlink(path)
                if folder is None:
                    raise
                continue
            break
        found = os.fstat(handle)
        ring = Ring(path, slots, shape, whole_bytes, (found.st_dev, found.st_ino), [handle])
        nameless = f"/proc/{os.getpid()}/fd/{handle}"
        if os.path.exists(nameless):
            os.unlink(path)
            return replace(ring, path=nameless)
        os.close(ring._open.pop())
        return ring

    @property
    def stays(self) -> bool:
        """Whether nothing is left of it however its driver ends: it may be mapped until removed."""
        return bool(self._open)

    def map(self) -> Tensor:
        """Return the slots, (slots, B, f, H, W, 3). Raises OSError where the file is gone."""
        handle = os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            found = os.fstat(handle)
            if (found.st_dev, found.st_ino) != self.file:
                raise FileNotFoundError(f"{self.path} is another file by now")
            memory = mmap.mmap(handle, self.nbytes)
        finally:
            os.close(handle)
        return torch.frombuffer(memory, dtype=self.dtype).view(self.slots, *self.shape)

    def remove(self) -> None:
        """Let go of the file; who has mapped it keeps it. May be called again."""
        if self._open:
            os.close(self._open.pop())
        elif not self.path.startswith("/proc/"):
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "path": self.path, "slots": self.slots, "shape": list(self.shape),
            "whole_bytes": self.whole_bytes, "file": list(self.file),
        }  # fmt: skip

    @staticmethod
    def from_plain(values: dict[str, Any]) -> Ring:
        """Return what ``plain`` was made of."""
        pairs = {name: tuple(values[name]) for name in ("shape", "file")}
        return Ring(**(values | pairs))


def strip_from(values: dict[str, Any]) -> Strip:
    """Return the strip that ``asdict`` and JSON have made plain."""
    pairs = {name: tuple(values[name]) for name in ("pixels", "begins")}
    keeps = tuple((low, high) for low, high in values["keeps"])
    return Strip(values["axis"], values["length"], keeps=keeps, **pairs)


def decode_strip(
    vae: Any, latents: Tensor, header: dict[str, Any], may_write: Callable[[int], object],
    check: Callable[[], object],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Decode the strip for which ``vae`` is placed; yield what the driver is told of each chunk.

    ``header`` is the driver's; the chunks before its "position" are decoded for the cache alone.
    ``may_write`` waits until a chunk may be written.
    """
    ring = Ring.from_plain(header["ring"])
    slots, strip = ring.map(), strip_from(header["strip"])
    yield {"type": "mapped"}
    decoder = StreamingDecoder(vae, latents)
    decoder.position = header["position"]
    leaving: tuple[int, Leaving] | None = None
    try:
        while not decoder.done or leaving is not None:
            before, leaving = leaving, None
            if not decoder.done:
                position = decoder.position
                chunk = Leaving(decoder.decode_next(check=check), whole_bytes=ring.whole_bytes)
                leaving = position, chunk
            if before is None:
                continue
            # The card computes the next chunk meanwhile.
            position, pictures, well = before[0], *before[1].arrived()
            may_write(position)
            frames = pictures.shape[1]
            if well:
                into = slots[position % ring.slots, :, :frames]
                first, last = strip.pixels
                into.narrow(3 if strip.axis == COLUMNS else 2, first, last - first).copy_(pictures)
            yield {"type": "strip", "position": position, "frames": frames, "well": well}
    finally:
        decoder.close()
