"""The decoder's feature cache kept in RAM, and the copies between RAM and the device.

Each convolution of the decoder looks back two frames. Together these are gigabytes, which cross
the bus twice for each latent frame. They are kept in page-locked memory that is reused for the
whole decode, with rows as the first dimension, so that a band of rows is contiguous. Copies are
queued on the stream that computes and run in order, so the host does not wait for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..loading import Slab, lock_within

HISTORY = 2
"""Frames a causal convolution looks back."""

_HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class HostEntry:
    """The last two frames that one convolution has seen, (H, B, C, 2, W)."""

    memory: Tensor

    def read(self, rows: slice, out: Tensor) -> None:
        """Copy some rows to ``out``, (B, C, 2, rows, W) on any device."""
        piece = self.memory[rows]
        # Across the bus contiguous and in one piece; the dimensions are reordered on the device.
        there = torch.empty(piece.shape, dtype=piece.dtype, device=out.device)
        there.copy_(piece, non_blocking=out.is_cuda)
        out.copy_(there.permute(1, 2, 3, 0, 4))

    def write(self, rows: slice, frames: Tensor) -> None:
        """Store some rows of ``frames``, (B, C, 1 or 2, rows, W).

        A single frame is stored with a frame of zeros before it.
        """
        piece = self.memory[rows]
        there = torch.empty(piece.shape, dtype=piece.dtype, device=frames.device)
        missing = HISTORY - frames.shape[2]
        there[:, :, :, :missing].zero_()
        there[:, :, :, missing:].copy_(frames.permute(3, 0, 1, 2, 4))
        piece.copy_(there, non_blocking=frames.is_cuda)


@dataclass(eq=False)
class _Decode:
    """The entries of one decode, by slot number, and the decoder's list of slots."""

    slots: list[Any]
    entries: dict[int, HostEntry] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return not any(isinstance(value, HostEntry) for value in self.slots)


class HostCache:
    """Memory for cache entries; that of a slot is used again for every latent frame.

    Entries are page-locked as long as all page-locked memory of this process stays within
    ``pin_bytes``. Entries beyond that are pageable, which makes copies slower.
    """

    def __init__(self, pin_bytes: int = 0) -> None:
        self._budget = pin_bytes
        self._slabs: list[Slab] = []
        self._decodes: list[_Decode] = []
        self._device: torch.device | None = None

    def entry(self, slots: list[Any], slot: int, like: Tensor) -> HostEntry:
        """Return the entry of ``slots[slot]``, sized for frames like ``like`` (B, C, T, H, W).

        It is the same entry each time, as long as shape and dtype stay the same. A new decode
        takes over the memory of a finished one; decodes that run at the same time have their own.
        """
        batch, channels, _, height, width = like.shape
        shape = (height, batch, channels, HISTORY, width)
        entries = self._decode_of(slots).entries
        found = entries.get(slot)
        if found is None or found.memory.shape != shape or found.memory.dtype != like.dtype:
            slab = Slab(torch.Size(shape).numel() * like.element_size(), _HOST)
            self._lock(slab, like.device)
            self._slabs.append(slab)  # never freed before ``close``: copies may still be running
            found = entries[slot] = HostEntry(slab.memory.view(like.dtype).view(shape))
        return found

    def _decode_of(self, slots: list[Any]) -> _Decode:
        found = next((decode for decode in self._decodes if decode.slots is slots), None)
        if found is None:
            found = next((decode for decode in self._decodes if decode.over), None)
            if found is None:
                found = _Decode(slots)
                self._decodes.append(found)
            found.slots = slots
        return found

    def _lock(self, slab: Slab, device: torch.device) -> None:
        if device.type == "cuda" and self._budget:
            self._device = device
            lock_within(slab, self._budget)

    def close(self) -> None:
        """Wait for copies that are still running, and release the page locks."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        for slab in self._slabs:
            slab.unlock()


def frames_known(previous: Any) -> int:
    """Return how many frames a slot of the feature cache holds."""
    if isinstance(previous, HostEntry):
        return HISTORY
    return previous.shape[2] if isinstance(previous, Tensor) else 0
