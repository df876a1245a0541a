"""Streaming: blocks that do not fit on the device are copied there just before they compute.

Some blocks stay on the device (resident), spread evenly over the model, so that their compute hides
the transfers of the others. The others (streamed) share two or more fixed device buffers: while one
block computes, the next is copied into another buffer. After the last block the first one of the
next forward is already on its way. The result is bit for bit that of a module which is on the
device as a whole. Weights are only read, so nothing is copied back.

``buffers`` decides which block goes into which buffer; a ``Transport`` does the copying; the hooks
here connect both to the blocks' forwards.
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

from ..errors import InvalidRequest, ModelFileError, ModuleInUse
from ..forward import blocks_in_order
from ..loading import (
    Slab,
    Undo,
    is_mapped,
    lock_within,
    move,
    pin_block,
    remember,
    room_to_pin,
)
from ..memory import spread
from .buffers import BufferSchedule, Load
from .offload import occupy
from .sharing import Sharing
from .transport import Block, CudaTransport, DirectTransport, Transport


@dataclass
class Streaming:
    """What a streamed module does, for reports: which blocks are where, and what was loaded."""

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    pinned: tuple[int, ...]
    buffer_bytes: int
    loads: int = 0
    loaded_bytes: int = 0
    events: Callable[[str, int, int], object] | None = field(default=None, repr=False)

    def tell(self, what: str, block: int, buffer: int) -> None:
        """Pass an event ("load", "gather", "use" or "free") on to ``events``."""
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
    sharing: Sharing | None = None,
    check: Callable[[], object] = lambda: None,
) -> Iterator[Streaming]:
    """Have ``module`` compute on ``device`` while only some of its blocks are there.

    ``module`` is a Wan transformer (``blocks``, and ``vace_blocks`` where it has them) or a T5
    encoder (``encoder.block``).
    ``resident_blocks`` of its blocks are kept on the device; the others pass through ``buffers``
    device buffers, each as large as the largest of them. What is in no block moves to the device,
    except token embeddings, which stay on the host and are looked up there.

    Streamed blocks are moved into page-locked host memory as far as ``pin_bytes`` allows, which is
    the limit for the whole process. They stay there for the next time; ``loading.page_lock.unpin``
    unlocks them. Afterwards every parameter is the same object with the same values, on the host,
    and nothing stays attached, also after errors and interrupts. Only one thread can use the module
    meanwhile. With ``sharing`` the processes of a gang copy a part of each block while they compute
    together. ``events(what, block, buffer)`` is called for each load, gather, use and free,
    ``check`` several times a second while weights are sent or page-locked. Raises InvalidRequest
    for numbers out of range.
    """
    made: list[Streaming] = []
    numbers = (resident_blocks, buffers, pin_bytes)
    attach = partial(_attach, made, module, torch.device(device), numbers, events, sharing, check)
    with occupy(module, f"streamed on {device}", attach, shared=False):
        yield made[0]


@contextmanager
def pin_ahead(
    module: nn.Module, *, resident_blocks: int = 0, buffers: int = 2, pin_bytes: int = 0
) -> Iterator[None]:
    """Page-lock the blocks that ``module`` will stream, in a thread, during the ``with`` block.

    Meant for the low-noise expert while the high-noise one computes: gathering and locking 28 GB
    takes ten seconds, and :func:`stream_blocks` with the same numbers then finds it done. The
    thread stops at the end of the ``with`` block, however far it is. Meanwhile nobody else can use
    the module; whoever asks for it waits. A file that cannot be read is told by whoever reads it
    next.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    def work() -> None:
        # Never wait for the module: whoever uses it now has placed it already, and locking ahead of
        # them would come too late.
        with (
            suppress(ModuleInUse, ModelFileError, _Stopped),
            torch.no_grad(),
            occupy(module, "page-locking", lambda undo: None, shared=False, wait=False),
        ):
            modules = blocks_of(module)
            schedule = BufferSchedule(len(modules), resident_blocks, buffers)
            _pin(modules, [Block(block) for block in modules], schedule, pin_bytes, check)

    pool = ThreadPoolExecutor(1, thread_name_prefix="wanfit-pin")
    done = pool.submit(work)
    try:
        yield
    finally:
        stop.set()
        pool.shutdown(wait=True)
    done.result()


class _Stopped(BaseException):
    """Ends what is page-locked ahead."""


def blocks_of(module: Any) -> list[nn.Module]:
    """Return the blocks that are streamed, in the order in which they compute.

    They are a Wan transformer's ``blocks``, with its VACE blocks among them, or ``encoder.block``
    of a T5.
    """
    blocks = getattr(module, "blocks", None)
    if isinstance(blocks, nn.ModuleList) and len(blocks):
        return blocks_in_order(module)
    blocks = getattr(getattr(module, "encoder", None), "block", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise InvalidRequest(
            f"{type(module).__name__} has no list of blocks to stream; use offload 'model'.",
            field="offload",
        )
    return list(blocks)


def _attach(
    made: list[Streaming],
    module: nn.Module,
    device: torch.device,
    numbers: tuple[int, int, int],
    events: Callable[[str, int, int], object] | None,
    sharing: Sharing | None,
    check: Callable[[], object],
    undo: Undo,
) -> None:
    modules = blocks_of(module)
    resident, buffers, pin_bytes = numbers
    schedule = BufferSchedule(len(modules), resident, buffers)
    # Everything to the host first, so that each block's home, to which its parameters return, is
    # host memory.
    move(module, "cpu")
    blocks = [Block(block) for block in modules]
    pin_bytes = pin_bytes if device.type == "cuda" else 0
    # Of weights that stay in their file a gang page-locks each byte once, in one process.
    parts: dict[int, tuple[slice, Slab]] = {}
    if sharing is not None and pin_bytes and any(is_mapped(t) for b in blocks for t in b.home):
        parts = _pin_parts(blocks, schedule, sharing, pin_bytes)
    slabs = {} if parts else _pin(modules, blocks, schedule, pin_bytes, check)
    # Counted as in use before anything else can ask for page-locked memory: a slab that is read
    # from must not be unlocked for another module.
    _in_use(slabs.values(), 1)
    undo.push(partial(_in_use, slabs.values(), -1))
    undo.push(partial(_unlock, parts))
    # Only after pinning, which gives the parameters new host memory: it is this memory, not the
    # old one, that they get back in the end.
    remember(undo, module)
    _place_rest(undo, module, set(modules), device)
    # All at once: together they are read in the order of their file, and through one ring.
    move(nn.ModuleList([modules[index] for index in schedule.resident]), device, check)
    nbytes = max((blocks[i].nbytes for i in schedule.streamed), default=0)
    nbytes = nbytes if sharing is None else sharing.room(nbytes)
    # The caller may be in inference mode. Tensors made there cannot be written to outside it, and
    # these buffers are written to from other threads and in later forwards.
    with torch.inference_mode(False):
        memory = [
            torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(schedule.buffers)
        ]
    transport: Transport = DirectTransport(blocks, memory)
    if device.type == "cuda":
        transport = CudaTransport(blocks, memory, slabs, device, schedule.streamed, parts)
    # Undone before the tensors are put back: copies under way still read the host's slabs.
    undo.push(transport.close)
    state = Streaming(
        schedule.resident, schedule.streamed, (*slabs, *parts), nbytes * len(memory), events=events
    )
    runner = _Runner(schedule, transport, blocks, memory, state, sharing)
    if sharing is not None:
        pinned = max(len(slabs), len(parts)) == len(schedule.streamed)
        sharing.attach(runner.anew, at_once=device.type != "cuda" or pinned)
    for index, block in enumerate(modules):
        undo.push(block.register_forward_pre_hook(partial(runner.before, index)).remove)
    if sharing is None:
        # Begin now: the first blocks arrive while the caller prepares its inputs. A gang begins
        # when it is known what it computes together.
        runner.load(schedule.start())
    made.append(state)


class _Runner:
    """Carries out a schedule: the hook before each block's forward ends up here."""

    def __init__(
        self,
        schedule: BufferSchedule,
        transport: Transport,
        blocks: list[Block],
        memory: list[Tensor],
        state: Streaming,
        sharing: Sharing | None,
    ) -> None:
        self._memory, self._sharing = memory, sharing
        self._parts: list[Load] = []
        """Blocks of which no more than this process's part is loaded, in their order."""
        self._schedule, self._transport, self._state = schedule, transport, state
        self._blocks = blocks
        # Views are made once, for every block in every buffer: making them at each forward would
        # keep the thread that launches kernels busy.
        self._views = {
            (block, buffer): blocks[block].views(slab)
            for block in schedule.streamed
            for buffer, slab in enumerate(memory)
        }
        self._using: int | None = None

    def load(self, loads: tuple[Load, ...]) -> None:
        """Begin these loads; the copies may still be under way on return."""
        for load in loads:
            self._state.tell("load", load.block, load.buffer)
            nbytes = self._blocks[load.block].nbytes
            part = slice(0, nbytes) if self._sharing is None else self._sharing.part(nbytes)
            self._transport.load(load.block, load.buffer, part)
            self._state.loads += 1
            self._state.loaded_bytes += part.stop - part.start
            if self._sharing is not None:
                self._sharing.copied_bytes += part.stop - part.start
                if self._sharing.on:
                    self._parts.append(load)
                    if self._sharing.at_once:
                        self._gather(load.buffer)

    def _gather(self, buffer: int) -> None:
        """Begin to gather what a buffer is to hold, if only a part is loaded, in order of loads."""
        while any(load.buffer == buffer for load in self._parts):
            assert self._sharing is not None
            load = self._parts.pop(0)
            self._state.tell("gather", load.block, load.buffer)
            memory, nbytes = self._memory[load.buffer], self._blocks[load.block].nbytes
            self._transport.gather(load.buffer, partial(self._sharing.gather, memory, nbytes))

    def anew(self) -> None:
        """Begin with the first blocks again, whatever the buffers hold."""
        self._back_home()
        for buffer in self._schedule.reset():
            self._transport.free(buffer)
        self._parts.clear()
        self.load(self._schedule.start())

    def _back_home(self) -> None:
        """Give the block that computed last its host tensors back."""
        if self._using is not None:
            self._blocks[self._using].use(self._blocks[self._using].home)
            self._using = None

    def before(self, index: int, block: nn.Module, args: object) -> None:
        """Point block ``index`` at its weights on the device; called before its forward."""
        if index == self._using:  # the same block again, for another guidance pass
            return
        # The block before goes back to its host tensors: its buffer is about to be overwritten,
        # and a parameter must never show another block's values.
        self._back_home()
        turn = self._schedule.turn(index)
        # Free before load: the copy must wait for the kernels that read the buffer, and ``free``
        # marks the end of what has been queued so far.
        for buffer in turn.free:
            self._state.tell("free", index, buffer)
            self._transport.free(buffer)
            self._parts = [load for load in self._parts if load.buffer != buffer]
        # What was loaded first is gathered first, where that did not begin with its copy.
        if turn.use is not None and all(load.buffer != turn.use for load in turn.loads):
            self._gather(turn.use)
        # Load before ready: the next block's copy is on its way before this block's kernels are
        # launched, so that the two overlap.
        self.load(turn.loads)
        if turn.use is not None:
            self._gather(turn.use)
            self._transport.ready(index, turn.use)
            self._state.tell("use", index, turn.use)
            self._blocks[index].use(self._views[index, turn.use])
            self._using = index


def _pin(
    modules: list[nn.Module],
    blocks: list[Block],
    schedule: BufferSchedule,
    budget: int,
    check: Callable[[], object] = lambda: None,
) -> dict[int, Slab]:
    """Page-lock as many streamed blocks as the budget allows, and return their slabs by index.

    They are spread evenly: slower copies from pageable memory then alternate with fast ones, and
    the compute in between hides more of them.
    """
    slabs: dict[int, Slab] = {}
    # Counted as if every block were as large as the largest; they hardly differ.
    largest = max((blocks[i].nbytes for i in schedule.streamed), default=1)
    if budget >= largest:
        budget = room_to_pin(modules, largest * len(schedule.streamed), budget)
    count = min(len(schedule.streamed), budget // largest)
    for rank in spread(len(schedule.streamed), count):
        check()
        index = schedule.streamed[rank]
        slab = pin_block(modules[index], blocks[index], check)
        if slab is None:
            break
        slabs[index] = slab
    return slabs


def _pin_parts(
    blocks: list[Block], schedule: BufferSchedule, sharing: Sharing, budget: int
) -> dict[int, tuple[slice, Slab]]:
    """Page-lock this process's part of the streamed blocks, as many as the budget allows."""
    parts: dict[int, tuple[slice, Slab]] = {}
    for index in schedule.streamed:
        part = sharing.own(blocks[index].nbytes)
        slab = Slab(max(1, part.stop - part.start))
        if not lock_within(slab, budget):
            break
        blocks[index].gather_part(part, slab.memory)
        parts[index] = part, slab
    return parts


def _unlock(parts: dict[int, tuple[slice, Slab]]) -> None:
    for _, slab in parts.values():
        slab.unlock()


def _in_use(slabs: Iterable[Slab], change: int) -> None:
    for slab in slabs:
        slab.users += change


def _place_rest(
    undo: Undo, module: nn.Module, blocks: set[nn.Module], device: torch.device
) -> None:
    """Move what is outside the blocks to the device, except token embeddings.

    An embedding is looked up on the host, and only the rows found are sent: umT5's table is 2 GB,
    of which a prompt needs 512 rows.
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
