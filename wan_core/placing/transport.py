"""Brings a block's weights to the device: host slabs, device buffers, and the copies between.

A block's tensors lie one behind the other in a *slab*, so that one copy carries the block. Within
the pinning budget a slab lies in page-locked host memory and the module's parameters are views of
it; beyond it the parameters stay where they are (pageable memory or a mapped file), and a worker
thread gathers them in one of two page-locked slabs just before they are sent. When a block is sent
is not decided here but in ``streaming.py``.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..loading import Slab

_ALIGN = 256  # bytes; what the CUDA allocator gives and vector loads of every kernel accept
_cuda: Any = torch.cuda  # parts of it carry no types


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
