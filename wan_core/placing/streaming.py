"""Blocks that are not on the device arrive one ahead of their turn, with the resident run's bits.

K blocks stay on the device, spread evenly, so that their compute hides the others' transfers; the
others take turns in two (or more) fixed device buffers. While one block computes, the next copy
runs; after the last block the first one of the next step is already on its way. Weights are only
read, so nothing is copied back. ``turns`` decides which block goes where and knows neither tensors
nor devices; a ``Transport`` carries it out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidRequest, ModuleInUse
from ..loading import Slab, Undo, move, pin_block, remember, room_to_pin
from .buffers import BufferSchedule, Load, spread
from .offload import occupy
from .transport import Block, CudaTransport, DirectTransport, Transport


@dataclass
class Streaming:
    """What a streamed module does, for reports: its blocks, and how often one was loaded."""

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    pinned: tuple[int, ...]
    buffer_bytes: int
    loads: int = 0
    loaded_bytes: int = 0
    events: Callable[[str, int, int], object] | None = field(default=None, repr=False)

    def tell(self, what: str, block: int, buffer: int) -> None:
        """Pass an event ("load", "use", "free") on to whoever watches."""
        if self.events is not None:
            self.events(what, block, buffer)


@contextmanager
def stream_blocks(
    module: nn.Module,
    device: torch.device | str,
    *,
    resident_blocks: int = 0,
    buffers: int = 2,
    pin_bytes: int = 0,
    events: Callable[[str, int, int], object] | None = None,
) -> Iterator[Streaming]:
    """Have ``module`` compute on ``device`` with ``resident_blocks`` of its blocks there.

    ``module`` is a Wan transformer (``blocks``) or a T5 encoder (``encoder.block``), on the host;
    what is not in a block moves to the device, token embeddings stay on the host and look up
    there. Streamed blocks move into page-locked memory and stay there for the next time, as far
    as ``pin_bytes``, what the whole process may lock, allows (``transport.unpin`` unlocks them).
    Afterwards every parameter is the object it was, with its values, on the host; nothing stays
    attached, after errors and interrupts too. The module serves one thread at a time.
    ``events(what, block, buffer)`` is told loads, uses and frees.
    Raises InvalidRequest for numbers out of range.
    """
    made: list[Streaming] = []
    numbers = (resident_blocks, buffers, pin_bytes)
    attach = partial(_attach, made, module, torch.device(device), numbers, events)
    with occupy(module, f"streamed on {device}", attach, shared=False):
        yield made[0]


@contextmanager
def pin_ahead(
    module: nn.Module, *, resident_blocks: int = 0, buffers: int = 2, pin_bytes: int = 0
) -> Iterator[None]:
    """Page-lock the blocks that ``module`` will stream, in a thread, while the block runs.

    For the low-noise expert while the high-noise one computes: packing and locking 28 GB takes
    ten seconds, which :func:`stream_blocks` with the same numbers then finds done. What is not
    done at the end is left; nobody else may use the module meanwhile, and who asks waits.
    """
    stop = threading.Event()

    def work() -> None:
        # Where somebody uses the module already, there is nothing to do ahead of it.
        with (
            suppress(ModuleInUse),
            torch.no_grad(),
            occupy(module, "page-locking", lambda undo: None, shared=False, wait=False),
        ):
            modules = blocks_of(module)
            schedule = BufferSchedule(len(modules), resident_blocks, buffers)
            _pin(modules, [Block(block) for block in modules], schedule, pin_bytes, stop)

    pool = ThreadPoolExecutor(1, thread_name_prefix="wanfit-pin")
    done = pool.submit(work)
    try:
        yield
    finally:
        stop.set()
        pool.shutdown(wait=True)
    done.result()


def blocks_of(module: Any) -> nn.ModuleList:
    """Return the module list that is streamed: ``blocks``, or ``encoder.block`` of a T5."""
    blocks = getattr(module, "blocks", None)
    if blocks is None:
        blocks = getattr(getattr(module, "encoder", None), "block", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise InvalidRequest(
            f"{type(module).__name__} has no list of blocks to stream; use offload 'model'.",
            field="offload",
        )
    return blocks


def _attach(
    made: list[Streaming],
    module: nn.Module,
    device: torch.device,
    numbers: tuple[int, int, int],
    events: Callable[[str, int, int], object] | None,
    undo: Undo,
) -> None:
    modules = blocks_of(module)
    resident, buffers, pin_bytes = numbers
    schedule = BufferSchedule(len(modules), resident, buffers)
    move(module, "cpu")
    blocks = [Block(block) for block in modules]
    slabs = _pin(modules, blocks, schedule, pin_bytes if device.type == "cuda" else 0)
    _in_use(slabs.values(), 1)
    undo.push(partial(_in_use, slabs.values(), -1))
    remember(undo, module)
    _place_rest(undo, module, set(modules), device)
    for index in schedule.resident:
        move(modules[index], device)
    nbytes = max((blocks[i].nbytes for i in schedule.streamed), default=0)
    with torch.inference_mode(False):
        memory = [
            torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(schedule.buffers)
        ]
    transport: Transport = DirectTransport(blocks, memory)
    if device.type == "cuda":
        transport = CudaTransport(blocks, memory, slabs, device, schedule.streamed)
    undo.push(transport.close)
    state = Streaming(
        schedule.resident, schedule.streamed, tuple(slabs), nbytes * len(memory), events=events
    )
    runner = _Runner(schedule, transport, blocks, memory, state)
    for index, block in enumerate(modules):
        undo.push(block.register_forward_pre_hook(partial(runner.before, index)).remove)
    runner.load(schedule.start())
    made.append(state)


class _Runner:
    """Carries out a schedule as the blocks' forwards are called."""

    def __init__(
        self,
        schedule: BufferSchedule,
        transport: Transport,
        blocks: list[Block],
        memory: list[Tensor],
        state: Streaming,
    ) -> None:
        self._schedule, self._transport, self._state = schedule, transport, state
        self._blocks = blocks
        # Views are made once: a turn only sets them.
        self._views = {
            (block, buffer): blocks[block].views(slab)
            for block in schedule.streamed
            for buffer, slab in enumerate(memory)
        }
        self._using: int | None = None

    def load(self, loads: tuple[Load, ...]) -> None:
        """Begin loads."""
        for load in loads:
            self._state.tell("load", load.block, load.buffer)
            self._transport.load(load.block, load.buffer)
            self._state.loads += 1
            self._state.loaded_bytes += self._blocks[load.block].nbytes

    def before(self, index: int, block: nn.Module, args: object) -> None:
        """Have block ``index`` in place; called before its forward."""
        if index == self._using:
            return
        if self._using is not None:
            # Off the buffer, whose contents are about to change.
            self._blocks[self._using].use(self._blocks[self._using].home)
            self._using = None
        turn = self._schedule.turn(index)
        for buffer in turn.free:
            self._state.tell("free", index, buffer)
            self._transport.free(buffer)
        self.load(turn.loads)
        if turn.use is not None:
            self._transport.ready(index, turn.use)
            self._state.tell("use", index, turn.use)
            self._blocks[index].use(self._views[index, turn.use])
            self._using = index


def _pin(
    modules: nn.ModuleList,
    blocks: list[Block],
    schedule: BufferSchedule,
    budget: int,
    stop: threading.Event | None = None,
) -> dict[int, Slab]:
    """Page-lock as many streamed blocks as the budget holds, spread evenly."""
    slabs: dict[int, Slab] = {}
    largest = max((blocks[i].nbytes for i in schedule.streamed), default=1)
    if budget >= largest:
        budget = room_to_pin(modules, largest * len(schedule.streamed), budget)
    count = min(len(schedule.streamed), budget // largest)
    for rank in spread(len(schedule.streamed), count):
        if stop is not None and stop.is_set():
            break
        index = schedule.streamed[rank]
        slab = pin_block(modules[index], blocks[index])
        if slab is None:
            break
        slabs[index] = slab
    return slabs


def _in_use(slabs: Iterable[Slab], change: int) -> None:
    for slab in slabs:
        slab.users += change


def _place_rest(
    undo: Undo, module: nn.Module, blocks: set[nn.Module], device: torch.device
) -> None:
    """Move what is outside the blocks to the device, except token embeddings.

    Those look up on the host and send what they found: umT5's is 2 GB, of which a prompt needs
    half a thousand rows.
    """
    if isinstance(module, nn.Embedding):
        undo.push(module.register_forward_pre_hook(_to_host).remove)
        undo.push(module.register_forward_hook(partial(_to_device, device)).remove)
        return
    for child in module.children():
        if child not in blocks:
            _place_rest(undo, child, blocks, device)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = parameter.data.to(device)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)


def _to_host(embedding: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(arg.cpu() for arg in args)


def _to_device(device: torch.device, embedding: nn.Module, args: object, found: Tensor) -> Tensor:
    return found.to(device)
