"""Brings a block's weights to the device: host slabs, device buffers, and the copies between.

A block's tensors lie one behind the other in a *slab*, so that one copy carries the block. Within
the pinning budget a slab lies in page-locked host memory and the module's parameters are views of
it; beyond it the parameters stay where they are (pageable memory or a mapped file), and a worker
thread gathers them in one of two page-locked slabs just before they are sent. When a block is sent
is not decided here but in ``streaming.py``.
"""

from __future__ import annotations

import logging
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_ALIGN = 256  # bytes; what the CUDA allocator gives and vector loads of every kernel accept
_cuda: Any = torch.cuda  # parts of it carry no types
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor of a block lies in its slab."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, slab: Tensor) -> Tensor:
        """Return the tensor in ``slab`` (uint8), with its own shape, strides and dtype."""
        flat = slab[self.offset :]
        flat = flat[: flat.numel() // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())


class Block:
    """The parameters and buffers of one block, where they live on the host, and their layout."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = list(dict.fromkeys(module.parameters()))
        self._buffers = [
            (owner, name)
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self.home = self.tensors()
        self.places: list[Place] = []
        offset = 0
        for tensor in self.home:
            span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            stride, nbytes = tensor.stride(), span * tensor.element_size()
            if tensor.numel() == 0 or span != tensor.numel():  # with gaps: stored without
                stride = torch.empty(tensor.shape, device="meta").stride()
                nbytes = tensor.numel() * tensor.element_size()
            self.places.append(Place(offset, tensor.shape, stride, tensor.dtype))
            offset += -(-nbytes // _ALIGN) * _ALIGN
        self.nbytes = offset

    def tensors(self) -> list[Tensor]:
        """Return the tensors the block computes with now."""
        buffers = [owner._buffers[name] for owner, name in self._buffers]
        return [p.data for p in self.parameters] + [b for b in buffers if b is not None]

    def use(self, tensors: list[Tensor]) -> None:
        """Let the block compute with these tensors; parameters stay the same objects."""
        for parameter, tensor in zip(self.parameters, tensors, strict=False):
            parameter.data = tensor
        for (owner, name), tensor in zip(
            self._buffers, tensors[len(self.parameters) :], strict=True
        ):
            owner._buffers[name] = tensor

    def views(self, slab: Tensor) -> list[Tensor]:
        """Return this block's tensors as they lie in a slab."""
        return [place.view(slab) for place in self.places]

    def gather(self, slab: Tensor) -> None:
        """Copy the host's tensors into a slab."""
        for place, tensor in zip(self.places, self.home, strict=True):
            place.view(slab).copy_(tensor)


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
    return all(
        tensor.data_ptr() == slab.memory.data_ptr() + place.offset
        for tensor, place in zip(block.home, block.places, strict=True)
    )


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


class Transport(Protocol):
    """Carries blocks into buffers. ``load`` may return before the block has arrived."""

    def load(self, block: int, buffer: int) -> None:
        """Start to bring a block into a buffer, after its last user as told by ``free``."""

    def ready(self, block: int, buffer: int) -> None:
        """Let what is computed from now on see the block in the buffer."""

    def free(self, buffer: int) -> None:
        """Say that what was queued so far is the last that reads the buffer."""

    def close(self) -> None:
        """Wait for copies under way; afterwards no buffer and no slab is in use."""


class DirectTransport:
    """Copies at once, tensor by tensor: for the CPU and devices without streams."""

    def __init__(self, blocks: list[Block], buffers: list[Tensor]) -> None:
        self._blocks, self._buffers = blocks, buffers

    def load(self, block: int, buffer: int) -> None:
        self._blocks[block].gather(self._buffers[buffer])

    def ready(self, block: int, buffer: int) -> None:
        """Nothing to wait for."""

    def free(self, buffer: int) -> None:
        """Nothing to remember."""

    def close(self) -> None:
        """Nothing is under way."""


class CudaTransport:
    """Copies on a stream of its own, ordered by events: the device is never waited for as a whole.

    ``slabs`` holds the page-locked slab of each block that has one. Blocks without are gathered
    by a worker thread, in order, so that page faults and the copy into page-locked memory do not
    keep the thread that launches kernels.
    """

    def __init__(
        self,
        blocks: list[Block],
        buffers: list[Tensor],
        slabs: dict[int, Slab],
        device: torch.device,
        streamed: tuple[int, ...],
    ) -> None:
        self._blocks, self._buffers, self._slabs = blocks, buffers, slabs
        self._device = device
        with torch.cuda.device(device):
            self._stream = _cuda.Stream()
        # Buffers come from the allocator of the present stream: its pending work on the memory
        # must end before the first copy writes into it.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._arrived = [_cuda.Event() for _ in buffers]
        self._freed: list[torch.cuda.Event | None] = [None] * len(buffers)
        self._pending: dict[int, Future[None]] = {}
        self._worker: ThreadPoolExecutor | None = None
        self._bounce: list[tuple[Slab, torch.cuda.Event]] = []
        unpinned = [blocks[i].nbytes for i in streamed if i not in slabs]
        if unpinned:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="wanfit-stream")
            self._bounce = [(Slab(max(unpinned)), _cuda.Event()) for _ in range(2)]
            for slab, _ in self._bounce:
                slab.lock()

    def load(self, block: int, buffer: int) -> None:
        self._settle(buffer)
        slab = self._slabs.get(block)
        if slab is not None:
            self._send(slab.memory, self._blocks[block].nbytes, buffer)
        else:
            assert self._worker is not None
            self._pending[buffer] = self._worker.submit(self._gather_and_send, block, buffer)

    def _settle(self, buffer: int) -> None:
        pending = self._pending.pop(buffer, None)
        if pending is not None:
            pending.result()

    def _send(self, source: Tensor, nbytes: int, buffer: int) -> None:
        freed = self._freed[buffer]
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if freed is not None:
                self._stream.wait_event(freed)
            self._buffers[buffer][:nbytes].copy_(source[:nbytes], non_blocking=True)
            self._arrived[buffer].record(self._stream)

    def _gather_and_send(self, block: int, buffer: int) -> None:
        slab, sent = self._bounce.pop(0)
        try:
            sent.synchronize()  # the copy that read this slab last
            with torch.no_grad():
                self._blocks[block].gather(slab.memory)
                self._send(slab.memory, self._blocks[block].nbytes, buffer)
            sent.record(self._stream)
        finally:
            self._bounce.append((slab, sent))

    def ready(self, block: int, buffer: int) -> None:
        self._settle(buffer)
        torch.cuda.current_stream(self._device).wait_event(self._arrived[buffer])

    def free(self, buffer: int) -> None:
        event = _cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._freed[buffer] = event

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        self._stream.synchronize()
