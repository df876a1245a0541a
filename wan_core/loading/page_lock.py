"""Page-locked (pinned) host memory, which the device reads by itself at the bus's full speed.

Weights are locked in slabs, one per block, and stay locked for later renders. Other memory (the
feature cache of a decode) is locked only while it is used. One budget covers both, because locked
memory cannot be swapped out and is lost to the rest of the system.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .mapped import copy_read, is_mapped

_cuda: Any = torch.cuda  # parts of it carry no types
_log = logging.getLogger(__name__)


class Slab:
    """One piece of host memory that can be page-locked; unlocked when the slab is collected.

    torch's allocator of pinned memory rounds up to a power of two (1 GiB for a 14B block of
    703 MB). Registering ordinary memory with CUDA locks as much as is used and no more.
    ``users`` counts those who copy from the slab now; while there are any it is not unlocked.
    """

    def __init__(self, nbytes: int, device: torch.device | None = None) -> None:
        # Parameters become views of this memory, which outlives a caller's inference mode.
        with torch.inference_mode(False):
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.users = 0
        self.mapped_home: list[Tensor] | None = None
        self.block: Block | None = None
        self._release: Any = None

    @property
    def pinned(self) -> bool:
        """Whether the memory is page-locked."""
        return self._release is not None

    def lock(self) -> bool:
        """Page-lock the memory; False where the system refuses."""
        if not self.pinned and _register(self.memory):
            # CUDA must be told before the memory is freed. A finalizer runs before the slab lets go
            # of its tensor, also where nobody called ``unlock``.
            self._release = weakref.finalize(self, _unregister, self.memory.data_ptr())
            # At the interpreter's exit CUDA may be gone already; the process's end unlocks all.
            self._release.atexit = False
        return self.pinned

    def unlock(self) -> None:
        """Unlock the memory; its contents stay."""
        if self._release is not None:
            self._release()
            self._release = None


_refused = False
"""Whether the system refused a page lock in this process: it is then not asked again."""


def _register(memory: Tensor) -> bool:
    global _refused
    if _refused:
        return False
    status = int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if status != 0:
        _refused = True
        _discard_error()
        _log.warning(
            "Page-locking %.0f MB failed (CUDA error %d). Copies go through pageable memory, and "
            "nothing more is locked in this process.", memory.numel() / 1e6, status,
        )  # fmt: skip
    return status == 0


def _discard_error() -> None:
    """Take the error of a refused lock off CUDA's queue, where the next kernel would raise it."""
    try:
        torch.ones(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError as err:
        _log.debug("Discarded: %s", err)


def _unregister(address: int) -> None:
    _cuda.cudart().cudaHostUnregister(address)


_slabs: weakref.WeakKeyDictionary[nn.Module, Slab] = weakref.WeakKeyDictionary()
"""Slabs that live as long as the block whose parameters are views of them."""
_loose: weakref.WeakSet[Slab] = weakref.WeakSet()
"""Slabs that hold no weights, page-locked by :func:`lock_within`."""
_slabs_lock = threading.Lock()


class Block(Protocol):
    """The tensors of one block: ``home`` on the host, and as views of a slab of ``nbytes``."""

    nbytes: int
    home: list[Tensor]

    def views(self, slab: Tensor) -> list[Tensor]:
        """Return the block's tensors as they lie in a slab."""

    def use(self, tensors: list[Tensor]) -> None:
        """Let the block compute with these tensors."""


def pin_block(
    module: nn.Module, block: Block, check: Callable[[], object] = lambda: None
) -> Slab | None:
    """Move a block's host tensors into a page-locked slab of its own; None where that fails.

    The parameters stay the same objects with the same values, and the memory they were in before is
    freed. The slab lives as long as the module, so that the next render finds it; :func:`unpin`
    unlocks it. Weights that are in a mapped file are read from there; ``check`` and errors are
    those of ``copy_read``.
    """
    with _slabs_lock:
        slab = _slabs.get(module)
        # Usually the block is still in the slab of the render before. It is not where a LoRA or a
        # cast has given the parameters other tensors since.
        if slab is not None and _lies_in(block, slab):
            return slab if slab.lock() else None
    slab = Slab(block.nbytes)
    if any(is_mapped(tensor) for tensor in block.home):
        slab.mapped_home = list(block.home)
    # Lock before the copy: where the system refuses, nothing has been changed yet. Others may ask
    # what is page-locked while a disk is read.
    if not slab.lock():
        return None
    views = block.views(slab.memory)
    copy_read(block.home, views, check)
    with _slabs_lock:
        # The parameters become views of the slab, so that the weights are in RAM only once.
        block.home = views
        block.use(views)
        slab.block = block
        _slabs[module] = slab
    return slab


def _lies_in(block: Block, slab: Slab) -> bool:
    """Say whether every tensor of the block is where it belongs in the slab."""
    if slab.memory.numel() < block.nbytes:
        return False
    views = block.views(slab.memory)
    return all(a.data_ptr() == b.data_ptr() for a, b in zip(block.home, views, strict=True))


def room_to_pin(modules: Iterable[nn.Module], wanted: int, budget: int) -> int:
    """Return how many bytes ``modules`` may page-lock if the whole process may lock ``budget``.

    Where less than ``wanted`` is left, slabs of other modules that nobody streams from are
    given back until there is enough. What ``modules`` have locked already counts as theirs.
    """
    mine = set(modules)
    with _slabs_lock:
        others = [(o, slab) for o, slab in _slabs.items() if o not in mine and slab.pinned]
        held = sum(slab.memory.numel() for _, slab in others) + _loose_bytes()
        for owner, slab in others:
            if held + wanted <= budget:
                break
            if slab.users == 0:
                held -= slab.memory.numel()
                _give_back(owner)
    return max(0, budget - held)


def lock_within(slab: Slab, budget: int) -> bool:
    """Page-lock a slab that holds no weights; False where that would exceed ``budget`` in all."""
    nbytes = slab.memory.numel()
    if room_to_pin((), nbytes, budget) < nbytes or not slab.lock():
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
    """Return how many bytes the process has page-locked for weights and by ``lock_within``."""
    with _slabs_lock:
        held = sum(slab.memory.numel() for slab in _slabs.values() if slab.pinned)
        return held + _loose_bytes()


def _loose_bytes() -> int:
    return sum(slab.memory.numel() for slab in _loose if slab.pinned)


def unpin(module: nn.Module | None = None) -> None:
    """Give back the page-locked memory of blocks that nobody streams; of all where None.

    Weights that came from a mapped file are views of that file again, and their copy is freed;
    others stay where they are, unlocked.
    """
    with _slabs_lock:
        owners = list(_slabs) if module is None else [m for m in module.modules() if m in _slabs]
        for owner in owners:
            if not _slabs[owner].users:
                _give_back(owner)


def _give_back(owner: nn.Module) -> None:
    """Unlock a block's slab; free it where the weights have their file to go back to."""
    slab = _slabs[owner]
    slab.unlock()
    if slab.mapped_home is not None and slab.block is not None:
        if _lies_in(slab.block, slab):
            slab.block.home = slab.mapped_home
            slab.block.use(slab.mapped_home)
        del _slabs[owner]
