"""The decode's feature cache at rest in RAM, and the copies between there and the device.

Each convolution of the decoder looks back two frames: gigabytes that cross the bus twice for each
latent frame. They lie in page-locked memory that serves the whole decode, rows first, so that a
band of rows is one piece. Copies are queued on the stream that computes, in order; nothing waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .transport import Slab, room_to_pin

HISTORY = 2
"""Frames a causal convolution looks back."""

_HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class HostEntry:
    """The last two frames one convolution has seen, (H, B, C, 2, W)."""

    memory: Tensor

    def read(self, rows: slice, out: Tensor) -> None:
        """Bring some rows to ``out``, (B, C, 2, rows, W) on any device."""
        piece = self.memory[rows]
        there = torch.empty(piece.shape, dtype=piece.dtype, device=out.device)
        out.copy_(there.copy_(piece, non_blocking=True).permute(1, 2, 3, 0, 4))

    def write(self, rows: slice, frames: Tensor) -> None:
        """Take some rows of ``frames``, (B, C, 1 or 2, rows, W); before a single one lies zero."""
        piece = self.memory[rows]
        there = torch.empty(piece.shape, dtype=piece.dtype, device=frames.device)
        missing = HISTORY - frames.shape[2]
        there[:, :, :, :missing].zero_()
        there[:, :, :, missing:].copy_(frames.permute(3, 0, 1, 2, 4))
        piece.copy_(there, non_blocking=True)


class HostCache:
    """Memory for one decode's entries; a slot's is used again for each latent frame.

    Beside the page-locked memory of models it keeps within ``pin_bytes``; what is beyond is
    pageable, and slower.
    """

    def __init__(self, pin_bytes: int = 0) -> None:
        self._budget, self._pinned = pin_bytes, 0
        self._slabs: dict[int, Slab] = {}
        self._entries: dict[int, HostEntry] = {}
        self._device: torch.device | None = None

    def entry(self, slot: int, like: Tensor) -> HostEntry:
        """Return a slot's entry for frames like (B, C, T, H, W); the same one while they fit."""
        batch, channels, _, height, width = like.shape
        shape = (height, batch, channels, HISTORY, width)
        found = self._entries.get(slot)
        if found is None or found.memory.shape != shape or found.memory.dtype != like.dtype:
            slab = Slab(torch.Size(shape).numel() * like.element_size(), _HOST)
            found = HostEntry(slab.memory.view(like.dtype).view(shape))
            self._lock(slab, like.device)
            self._slabs[slot], self._entries[slot] = slab, found
        return found

    def _lock(self, slab: Slab, device: torch.device) -> None:
        if device.type != "cuda" or self._budget == 0:
            return
        self._device = device
        wanted = self._pinned + slab.memory.numel()
        if wanted <= room_to_pin(nn.ModuleList(), wanted, self._budget) and slab.lock():
            self._pinned = wanted

    def close(self) -> None:
        """Wait for the copies under way and give the page locks back."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        for slab in self._slabs.values():
            slab.unlock()


def frames_known(previous: Any) -> int:
    """Return how many frames a slot holds."""
    if isinstance(previous, HostEntry):
        return HISTORY
    return previous.shape[2] if isinstance(previous, Tensor) else 0
