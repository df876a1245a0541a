"""Page-locked host memory: what the device can read by itself, at the bus's full speed.

Weights are locked in slabs, one per block; other memory (the decode's cache) is locked for a while.
One budget covers all of it, because locked memory cannot be swapped out.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_cuda: Any = torch.cuda  # parts of it carry no types
_log = logging.getLogger(__name__)


class Slab:
    """Host memory for one use, page-locked between ``lock`` and ``unlock`` or its end.

    torch's pinned allocator rounds up to a power of two (1 GiB for a 14B block of 703 MB);
    registering ordinary memory locks what is used and no more.
    """

    def __init__(self, nbytes: int, device: torch.device | None = None) -> None:
        with torch.inference_mode(False):
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.users = 0
        self._release: Any = None

    @property
    def pinned(self) -> bool:
        """Whether the memory is page-locked."""
        return self._release is not None

    def lock(self) -> bool:
        """Page-lock the memory; False where the system refuses."""
        if not self.pinned and _register(self.memory):
            self._release = weakref.finalize(self, _unregister, self.memory.data_ptr())
            self._release.atexit = False
        return self.pinned

    def unlock(self) -> None:
        """Give the page lock back; the contents stay."""
        if self._release is not None:
            self._release()
            self._release = None


def _register(memory: Tensor) -> bool:
    status = int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if status != 0:
        _log.warning(
            "Page-locking %.0f MB failed (CUDA error %d): copies go through pageable memory.",
            memory.numel() / 1e6, status,
        )  # fmt: skip
    return status == 0


def _unregister(address: int) -> None:
    _cuda.cudart().cudaHostUnregister(address)


_slabs: weakref.WeakKeyDictionary[nn.Module, Slab] = weakref.WeakKeyDictionary()
"""Slabs that live as long as the block whose parameters are views of them."""
_loose: weakref.WeakSet[Slab] = weakref.WeakSet()
"""Slabs of other use, page-locked by :func:`lock_within`."""
_slabs_lock = threading.Lock()


class Block(Protocol):
    """The tensors of one block, in the host's memory and as they lie in a slab."""

    nbytes: int
    home: list[Tensor]

    def views(self, slab: Tensor) -> list[Tensor]:
        """Return the block's tensors as they lie in a slab."""

    def gather(self, slab: Tensor) -> None:
        """Copy the host's tensors into a slab."""

    def use(self, tensors: list[Tensor]) -> None:
        """Let the block compute with these tensors."""


def pin_block(module: nn.Module, block: Block) -> Slab | None:
    """Move a block's host tensors into a page-locked slab of its own; None where that fails.

    The parameters stay the same objects with the same values; the memory they lay in is free.
    The slab is kept for the next time and goes with the module; :func:`unpin` unlocks it.
    """
    with _slabs_lock:
        slab = _slabs.get(module)
        if slab is not None and _lies_in(block, slab):
            return slab if slab.lock() else None
        slab = Slab(block.nbytes)
        if not slab.lock():
            return None
        block.gather(slab.memory)
        block.home = block.views(slab.memory)
        block.use(block.home)
        _slabs[module] = slab
        return slab


def _lies_in(block: Block, slab: Slab) -> bool:
    if slab.memory.numel() < block.nbytes:
        return False
    views = block.views(slab.memory)
    return all(a.data_ptr() == b.data_ptr() for a, b in zip(block.home, views, strict=True))


def room_to_pin(modules: nn.ModuleList, wanted: int, budget: int) -> int:
    """Return how much ``modules`` may page-lock when the whole process may ``budget`` bytes.

    Slabs of other modules that nobody streams from are unlocked while less than ``wanted`` is
    left.
    """
    mine = set(modules)
    with _slabs_lock:
        others = [slab for owner, slab in _slabs.items() if owner not in mine and slab.pinned]
        held = sum(slab.memory.numel() for slab in others) + _loose_bytes()
        for slab in others:
            if held + wanted <= budget:
                break
            if slab.users == 0:
                slab.unlock()
                held -= slab.memory.numel()
    return max(0, budget - held)


def lock_within(slab: Slab, budget: int) -> bool:
    """Page-lock a slab that holds no weights if all page-locked memory stays within ``budget``."""
    nbytes = slab.memory.numel()
    if room_to_pin(nn.ModuleList(), nbytes, budget) < nbytes or not slab.lock():
        return False
    with _slabs_lock:
        _loose.add(slab)
    return True


def pinned_bytes(module: nn.Module) -> int:
    """Return how many bytes of page-locked memory the blocks of ``module`` hold."""
    with _slabs_lock:
        slabs = [_slabs.get(owner) for owner in module.modules()]
    return sum(slab.memory.numel() for slab in slabs if slab is not None and slab.pinned)


def all_pinned_bytes() -> int:
    """Return how many bytes of page-locked memory there are."""
    with _slabs_lock:
        held = sum(slab.memory.numel() for slab in _slabs.values() if slab.pinned)
        return held + _loose_bytes()


def _loose_bytes() -> int:
    return sum(slab.memory.numel() for slab in _loose if slab.pinned)


def unpin(module: nn.Module) -> None:
    """Unlock the page-locked memory of blocks nobody streams; the weights stay where they are."""
    with _slabs_lock:
        for owner in module.modules():
            slab = _slabs.get(owner)
            if slab is not None and slab.users == 0:
                slab.unlock()
