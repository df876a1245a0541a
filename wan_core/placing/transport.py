"""Copies a block's weights to the device: host slabs, device buffers, and the copies between.

A block's tensors lie one behind the other in a *slab*, so that a single copy carries the whole
block. Within the budget for page-locked memory, a block has a page-locked slab of its own and the
module's parameters are views of it. Beyond that budget the parameters stay where they are
(pageable memory or a mapped file); a worker thread gathers them into one of two page-locked
*bounce* slabs just before they are sent. Which block is sent when is decided in ``buffers``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..loading import Slab

# Bytes. What cudaMalloc guarantees, so that a tensor in a slab is as good as any other for kernels
# that load whole vectors, and the same kernel is chosen for it.
_ALIGN = 256
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
        # ``view(dtype)`` wants a whole number of elements, which the slab's end may not leave.
        flat = flat[: flat.numel() // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())


class Block:
    """The parameters and buffers of one block: their host tensors and their layout in a slab.

    ``home`` are the host tensors, parameters first; ``places`` says where each lies in a slab of
    ``nbytes``.
    """

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
            # A dense tensor keeps its strides, a transposed one too, because the choice of kernel
            # depends on them. Only a tensor with gaps is stored as a contiguous one.
            if tensor.numel() == 0 or span != tensor.numel():
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
        """Have the block compute with ``tensors``; its parameters stay the same objects."""
        for parameter, tensor in zip(self.parameters, tensors, strict=False):
            parameter.data = tensor
        for (owner, name), tensor in zip(
            self._buffers, tensors[len(self.parameters) :], strict=True
        ):
            owner._buffers[name] = tensor

    def views(self, slab: Tensor) -> list[Tensor]:
        """Return this block's tensors as they lie in a slab."""
        return [place.view(slab) for place in self.places]

    def gather(self, slab: Tensor, part: slice | None = None) -> None:
        """Copy the host's tensors into a slab; of ``part`` only the bytes that lie in it."""
        for place, tensor in zip(self.places, self.home, strict=True):
            end = place.offset + _nbytes(tensor)
            if part is None or (part.start <= place.offset and end <= part.stop):
                place.view(slab).copy_(tensor)
            elif part.start < end and place.offset < part.stop:
                _copy_bytes(place, tensor, slab, part)

    def gather_part(self, part: slice, into: Tensor) -> None:
        """Copy those bytes of the host's tensors that lie in ``part`` of a slab, and no others."""
        for place, tensor in zip(self.places, self.home, strict=True):
            if place.offset < part.stop and place.offset + _nbytes(tensor) > part.start:
                _copy_bytes(place, tensor, into, part, part.start)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copy_bytes(place: Place, tensor: Tensor, slab: Tensor, part: slice, shift: int = 0) -> None:
    """Copy those bytes of a tensor that lie in ``part`` of its slab, ``shift`` bytes before."""
    # In a slab a tensor with gaps lies without them; any other in the order of its own memory.
    dense = tensor if tensor.stride() == place.stride else tensor.contiguous()
    flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    begin, stop = max(place.offset, part.start), min(place.offset + len(flat), part.stop)
    slab[begin - shift : stop - shift].copy_(flat[begin - place.offset : stop - place.offset])


class Pending(Protocol):
    """A gather under way among the processes of a gang."""

    def wait(self) -> object:
        """Have the work that this thread queues from now on come after the gather."""


class Transport(Protocol):
    """Copies blocks into device buffers.

    The order of calls for a buffer is load, (gather), ready, (forward), free, load … ``load`` and
    ``gather`` may return before the bytes have arrived.
    """

    def load(self, block: int, buffer: int, part: slice | None = None) -> None:
        """Begin to copy a block, or those bytes of it, to its place in a buffer.

        This waits until the buffer's last reader (see ``free``) is done.
        """

    def gather(self, buffer: int, begin: Callable[[], Pending]) -> None:
        """Begin to bring the parts that others have copied, behind the copy of this one's part."""

    def ready(self, block: int, buffer: int) -> None:
        """Make all work that is queued from now on wait until that has arrived in the buffer."""

    def free(self, buffer: int) -> None:
        """Mark the work queued so far as the last that reads the buffer's present contents."""

    def close(self) -> None:
        """Wait for copies under way; afterwards no buffer and no slab is read or written."""


class DirectTransport:
    """Copies each block at once, tensor by tensor: for the CPU and devices without streams."""

    def __init__(self, blocks: list[Block], buffers: list[Tensor]) -> None:
        self._blocks, self._buffers = blocks, buffers
        self._gathers: dict[int, Pending] = {}

    def load(self, block: int, buffer: int, part: slice | None = None) -> None:
        self._settle(buffer)  # given up after an interrupt, it would write over this block
        self._blocks[block].gather(self._buffers[buffer], part)

    def gather(self, buffer: int, begin: Callable[[], Pending]) -> None:
        self._gathers[buffer] = begin()

    def _settle(self, buffer: int) -> None:
        if (gather := self._gathers.pop(buffer, None)) is not None:
            gather.wait()

    def ready(self, block: int, buffer: int) -> None:
        self._settle(buffer)

    def free(self, buffer: int) -> None:
        """Nothing to remember."""

    def close(self) -> None:
        for buffer in tuple(self._gathers):
            with suppress(Exception):  # the others are gone: nothing is written any more
                self._settle(buffer)


class CudaTransport:
    """Copies on a CUDA stream of its own, beside the stream that computes.

    Events order the two streams, so that the host never waits for the whole device. ``slabs`` maps
    the index of each page-locked block to its slab, ``parts`` that of a block of which this process
    has page-locked its part of a gang's. All other bytes of ``streamed`` blocks are gathered by one
    worker thread, in order: page faults and the copy into page-locked memory must not hold
    up the thread that launches kernels.

    What a gang gathers goes over a third stream: the next part may be copied meanwhile. Gathers
    begin in the thread that computes, as all exchanges of a forward do, so that all processes begin
    everything in one order.
    """

    def __init__(
        self,
        blocks: list[Block],
        buffers: list[Tensor],
        slabs: dict[int, Slab],
        device: torch.device,
        streamed: tuple[int, ...],
        parts: Mapping[int, tuple[slice, Slab]] = MappingProxyType({}),
    ) -> None:
        self._blocks, self._buffers, self._slabs = blocks, buffers, slabs
        self._parts = parts
        self._device = device
        with torch.cuda.device(device):
            self._stream = _cuda.Stream()
        # The buffers' memory was allocated on the current stream, where kernels queued earlier may
        # still use it for something else. The first copy must not overtake them.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._arrived = [_cuda.Event() for _ in buffers]
        self._freed: list[torch.cuda.Event | None] = [None] * len(buffers)
        self._gathering: Any = None
        """The stream that gathers wait in, made for the first of them."""
        self._gathers: dict[int, Pending] = {}
        self._pending: dict[int, Future[None]] = {}
        self._worker: ThreadPoolExecutor | None = None
        self._bounce: list[tuple[Slab, torch.cuda.Event]] = []
        self._unpinned = max((blocks[i].nbytes for i in streamed if i not in slabs), default=0)
        if any(i not in slabs and i not in parts for i in streamed):
            self._through_bounces()

    def _through_bounces(self) -> ThreadPoolExecutor:
        """Return the thread that gathers what is not page-locked, with its two bounce slabs."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="wanfit-stream")
            self._bounce = [(Slab(self._unpinned), _cuda.Event()) for _ in range(2)]
            for slab, _ in self._bounce:
                slab.lock()
        return self._worker

    def load(self, block: int, buffer: int, part: slice | None = None) -> None:
        # A load abandoned after an interrupt may still wait in the worker. It must be queued before
        # this one, or it would overwrite what this one brings.
        self._settle(buffer)
        self._outwait(buffer)
        part = part or slice(0, self._blocks[block].nbytes)
        slab = self._slabs.get(block)
        own, piece = self._parts.get(block, (None, None))
        if slab is not None:
            self._send(slab.memory[part], part, buffer)
        elif piece is not None and own == part:
            self._send(piece.memory[: part.stop - part.start], part, buffer)
        else:
            worker = self._through_bounces()
            self._pending[buffer] = worker.submit(self._gather_and_send, block, buffer, part)

    def _settle(self, buffer: int) -> None:
        """Wait until the worker has queued the buffer's copy; raise what the worker raised."""
        pending = self._pending.pop(buffer, None)
        if pending is not None:
            pending.result()

    def _outwait(self, buffer: int) -> None:
        """Have copies come after a gather that was begun for the buffer and given up."""
        if (gather := self._gathers.pop(buffer, None)) is not None:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                gather.wait()

    def gather(self, buffer: int, begin: Callable[[], Pending]) -> None:
        self._settle(buffer)
        with torch.cuda.device(self._device):
            self._gathering = self._gathering or _cuda.Stream()
            with torch.cuda.stream(self._gathering):
                # Of this part alone: not of what the copying stream was given behind it.
                self._gathering.wait_event(self._arrived[buffer])
                self._gathers[buffer] = begin()

    def _send(self, source: Tensor, part: slice, buffer: int) -> None:
        freed = self._freed[buffer]
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if freed is not None:
                # The kernels that still read the block in this buffer come first.
                self._stream.wait_event(freed)
            self._buffers[buffer][part].copy_(source, non_blocking=True)
            self._arrived[buffer].record(self._stream)

    def _gather_and_send(self, block: int, buffer: int, part: slice) -> None:
        # Two bounce slabs in turn: one is filled while the device still copies from the other.
        slab, sent = self._bounce.pop(0)
        try:
            # The copy that read this slab last must have ended before it is overwritten. Only the
            # worker waits here.
            sent.synchronize()
            with torch.no_grad():
                self._blocks[block].gather(slab.memory, part)
                self._send(slab.memory[part], part, buffer)
            sent.record(self._stream)
        finally:
            self._bounce.append((slab, sent))

    def ready(self, block: int, buffer: int) -> None:
        # First the host: the event must have been recorded. Then the stream that computes, which
        # waits on the device while the host goes on to launch kernels.
        self._settle(buffer)
        torch.cuda.current_stream(self._device).wait_event(self._arrived[buffer])
        if (gather := self._gathers.pop(buffer, None)) is not None:
            gather.wait()

    def free(self, buffer: int) -> None:
        # A new event each time: the worker may not yet have waited for the last one.
        event = _cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._freed[buffer] = event

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        for buffer in tuple(self._gathers):
            with suppress(Exception):  # the others are gone: nothing is written any more
                self._outwait(buffer)
        self._stream.synchronize()
