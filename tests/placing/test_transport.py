"""Copies to a device in every order that CUDA allows: each block computes with its own bytes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from support.fake_cuda import DeviceMemory, FakeCuda, wiped
from torch import Tensor, nn

from wan_core.loading import Slab, moving, page_lock
from wan_core.loading.mapped import InFile
from wan_core.placing import Sharing, transport
from wan_core.placing.buffers import BufferSchedule
from wan_core.placing.streaming import _pin_parts, _unlock
from wan_core.placing.transport import Block, CudaTransport

DEVICE = torch.device("cuda:0")


@pytest.fixture(params=["compute", "copy", ""], ids=["compute late", "copy late", "at once"])
def cuda(request: Any, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda(request.param)
    monkeypatch.setattr(transport, "_cuda", fake)
    for name in ("Stream", "current_stream", "device", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now: list[int] = []
    monkeypatch.setattr(page_lock, "_register", lambda memory: now.append(memory.numel()) or True)
    monkeypatch.setattr(page_lock, "_unregister", lambda address: now.pop())
    return now


def model_of(count: int) -> list[nn.Module]:
    """Blocks of three sizes, each full of its own number."""
    made = [nn.Linear(4 + 60 * (i % 3), 8) for i in range(count)]
    for number, block in enumerate(made):
        for parameter in block.parameters():
            nn.init.constant_(parameter, number + 1)
    return list(made)


def slabs_of(blocks: list[Block], which: range) -> dict[int, Slab]:
    slabs = {}
    for index in which:
        slabs[index] = Slab(blocks[index].nbytes)
        blocks[index].gather(slabs[index].memory)
    return slabs


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize(
    "pinned", [range(0), range(0, 7, 2), range(7)], ids=["none", "half", "all"]
)
def test_each_block_computes_with_its_own_bytes(
    cuda: FakeCuda, locked: list[int], buffers: int, resident: int, pinned: range
) -> None:
    blocks = [Block(module) for module in model_of(7)]
    schedule = BufferSchedule(7, resident, buffers)
    size = max(block.nbytes for block in blocks)
    memory = [wiped(size) for _ in range(schedule.buffers)]
    device: Any = [DeviceMemory(cuda, one) for one in memory]
    slabs = {i: slab for i, slab in slabs_of(blocks, pinned).items() if i in schedule.streamed}
    sent = CudaTransport(blocks, device, slabs, DEVICE, schedule.streamed)
    unpinned = [blocks[i].nbytes for i in schedule.streamed if i not in slabs]
    assert locked == [max(unpinned)] * 2 if unpinned else not locked
    found: list[tuple[int, bool]] = []

    def compute(index: int, buffer: int) -> None:
        views = blocks[index].views(memory[buffer])
        right = zip(views, blocks[index].home, strict=True)
        found.append((index, all(torch.equal(a, b) for a, b in right)))

    for load in schedule.start():
        sent.load(load.block, load.buffer)
    for _ in range(2):
        for index in range(7):
            turn = schedule.turn(index)
            for buffer in turn.free:
                sent.free(buffer)
            for load in turn.loads:
                sent.load(load.block, load.buffer)
            if turn.use is not None:
                sent.ready(index, turn.use)
                cuda.compute.add(lambda index=index, use=turn.use: compute(index, use))  # type: ignore[misc]
    sent.close()
    assert not cuda.streams[-1].work, "copies go on after the end"
    cuda.compute.synchronize()
    assert found == [(index, True) for index in schedule.streamed] * 2
    if sent._worker is not None:
        assert sent._worker._shutdown


class Alone:
    """One rank of a gang that talks to nobody."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def begin_gather(self, whole: Tensor) -> Any:
        raise AssertionError

    def all_say(self, word: bool) -> bool:
        return word


class FakeGather:
    """What NCCL does: behind the stream it is begun in, on a stream of its own."""

    def __init__(self, cuda: FakeCuda, stream: Any, work: Any) -> None:
        self._cuda = cuda
        stream.wait_stream(cuda.current_stream())
        stream.add(work)
        self._done = cuda.Event()
        self._done.record(stream)

    def wait(self) -> None:
        self._cuda.current_stream().wait_event(self._done)


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("pinned", "halves"),
    [(range(0), 0), (range(0, 7, 2), 0), (range(7), 0), (range(0), 3), (range(0), 7)],
)
def test_each_block_computes_with_its_own_part_and_those_of_others(
    cuda: FakeCuda, locked: list[int], buffers: int, at_once: bool, pinned: range, halves: int
) -> None:
    """This process copies the second half of each block; what it gives must be there by then. Of
    some blocks it has page-locked no more than that half.

    After three blocks of the second forward everything is given up and begun anew.
    """
    blocks = [Block(module) for module in model_of(7)]
    schedule = BufferSchedule(7, 0, buffers)
    size = max(block.nbytes for block in blocks)
    memory = [wiped(size) for _ in range(schedule.buffers)]
    device: Any = [DeviceMemory(cuda, one) for one in memory]

    def half(index: int) -> slice:
        return slice(blocks[index].nbytes // 512 * 256, blocks[index].nbytes)

    parts = {index: (half(index), Slab(blocks[index].nbytes)) for index in range(halves)}
    for index, (part, slab) in parts.items():
        slab.memory.fill_(77)
        blocks[index].gather_part(part, slab.memory)
    slabs = slabs_of(blocks, pinned)
    sent = CudaTransport(blocks, device, slabs, DEVICE, schedule.streamed, parts)
    nccl = cuda.Stream()
    whole, gaps = [], []
    for block in blocks:
        whole.append(torch.zeros(block.nbytes, dtype=torch.uint8))
        gaps.append(wiped(block.nbytes))
        block.gather(whole[-1])
        block.gather(gaps[-1])
    found: list[tuple[int, bool]] = []
    given: list[bool] = []

    def gather(index: int, buffer: int) -> None:
        def exchange() -> None:
            own, end = half(index), half(index).start
            right = memory[buffer][own] == whole[index][own]
            given.append(bool((right | (whole[index] != gaps[index])[own]).all()))
            memory[buffer][:end].copy_(whole[index][:end])

        sent.gather(buffer, lambda: FakeGather(cuda, nccl, exchange))

    def load(loads: Any) -> None:
        for one in loads:
            sent.load(one.block, one.buffer, half(one.block))
            if at_once:
                gather(one.block, one.buffer)

    def compute(index: int, buffer: int) -> None:
        views = blocks[index].views(memory[buffer])
        right = zip(views, blocks[index].home, strict=True)
        found.append((index, all(torch.equal(a, b) for a, b in right)))

    load(schedule.start())
    for count in (7, 3, 7, 7):
        for index in range(count):
            turn = schedule.turn(index)
            for buffer in turn.free:
                sent.free(buffer)
            if not at_once and not turn.loads:
                gather(index, turn.use or 0)
            load(turn.loads)
            assert turn.use is not None
            if not at_once and turn.loads:
                gather(index, turn.use)
            sent.ready(index, turn.use)
            cuda.compute.add(lambda index=index, use=turn.use: compute(index, use))  # type: ignore[misc]
        if count == 3:
            for buffer in schedule.reset():
                sent.free(buffer)
            load(schedule.start())
    for buffer in schedule.reset():
        sent.free(buffer)
    assert (sent._worker is None) == (len(pinned) == 7 or halves == 7)
    sent.load(2, 0)  # as a whole: a unit that this process computes alone
    sent.ready(2, 0)
    cuda.compute.add(lambda: compute(2, 0))
    sent.close()
    assert not sent._stream.work, "copies go on after the end"
    assert not (nccl.work and sent._gathers), "a gather that nobody waits for goes on"
    cuda.compute.synchronize()
    order = [index for count in (7, 3, 7, 7) for index in range(count)]
    assert [index for index, _ in found] == [*order, 2]
    assert all(right for _, right in found) and given and all(given)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_parts_of_a_gang_are_the_whole_block(size: int) -> None:
    for block in map(Block, model_of(3)):
        whole, found = torch.zeros(block.nbytes, dtype=torch.uint8), []
        block.gather(whole)
        for rank in range(size):
            part = Sharing(Alone(rank, size)).own(block.nbytes)
            piece = torch.zeros(part.stop - part.start, dtype=torch.uint8)
            block.gather_part(part, piece)
            found.append(piece)
        assert torch.equal(torch.cat(found), whole)


def test_a_gang_page_locks_its_parts_of_what_stays_in_its_file(
    locked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte once in all processes, as far as the budget goes; unlocked at the end."""
    blocks, schedule = [Block(module) for module in model_of(5)], BufferSchedule(5, 1, 2)
    sharing = Sharing(Alone(1, 2))
    every = _pin_parts(blocks, schedule, sharing, 1 << 30)
    assert tuple(every) == schedule.streamed
    assert [part for part, _ in every.values()] == [sharing.own(blocks[i].nbytes) for i in every]
    nbytes = sum(part.stop - part.start for part, _ in every.values())
    assert sum(locked) == nbytes <= sum(blocks[i].nbytes for i in every) // 2
    _unlock(every)
    assert not locked
    some = _pin_parts(blocks, schedule, sharing, nbytes - 1)
    assert tuple(some) == schedule.streamed[:-1]
    _unlock(some)
    assert _pin_parts(blocks, schedule, sharing, 0) == {} and not locked


def test_a_load_that_was_given_up_does_not_overwrite_the_next(
    cuda: FakeCuda, locked: list[int]
) -> None:
    """After an interrupt, the copy of before may still wait in the worker."""
    blocks = [Block(module) for module in model_of(4)]
    memory = wiped(max(block.nbytes for block in blocks))
    device: Any = [DeviceMemory(cuda, memory)]
    sent = CudaTransport(blocks, device, {}, DEVICE, (0, 1, 2, 3))
    for block in (3, 2, 1):
        sent.load(block, 0)
    sent.ready(1, 0)
    right = zip(blocks[1].views(memory), blocks[1].home, strict=True)
    found: list[bool] = []
    cuda.compute.add(lambda: found.extend(torch.equal(a, b) for a, b in right))
    sent.close()
    cuda.compute.synchronize()
    assert found == [True, True]


def test_what_the_worker_raises_is_raised_where_the_block_is_waited_for(
    cuda: FakeCuda, locked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [Block(module) for module in model_of(2)]
    device: Any = [DeviceMemory(cuda, wiped(blocks[1].nbytes)) for _ in range(2)]
    sent = CudaTransport(blocks, device, {}, DEVICE, (0, 1))

    def fail(slab: Tensor, part: slice) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(blocks[0], "gather", fail)
    for _ in range(3):  # more often than there are bounce slabs: each is given back
        sent.load(0, 0)
        with pytest.raises(OSError, match="the disk is gone"):
            sent.ready(0, 0)
    sent.load(1, 1)
    sent.ready(1, 1)
    sent.close()


@pytest.mark.parametrize("sizes", [[40], [7, 64, 0, 129], [33] * 9])
def test_the_ring_carries_every_byte(
    cuda: FakeCuda, locked: list[int], monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(moving, "_PIECE", 32)
    sources = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in sizes]
    targets = [wiped(size) for size in sizes]
    pieces: Any = [
        moving._Piece(source[start : start + 32], DeviceMemory(cuda, target[start : start + 32]))
        for source, target in zip(sources, targets, strict=True)
        for start in range(0, len(source), 32)
    ]
    before: list[str] = []
    cuda.compute.add(lambda: before.append("computed"))
    ring = moving._Ring(DEVICE)
    assert locked == [32 * 16]
    ring.carry(pieces, lambda: None)
    assert locked == []
    cuda.compute.synchronize()
    assert before == ["computed"]
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source, target)


@pytest.mark.parametrize("wild", [False, True])
def test_a_tensor_is_looked_at_when_all_of_it_has_arrived(
    cuda: FakeCuda, locked: list[int], monkeypatch: pytest.MonkeyPatch, wild: bool
) -> None:
    """Bytes that are not there yet are NaN: as early as that it would be wild in any case."""
    monkeypatch.setattr(moving, "_PIECE", 32)

    def numbers(where: Any) -> list[Tensor]:
        cuda.compute.synchronize()  # what computes comes after what its stream waits for
        return [where.memory.view(torch.float8_e4m3fn)]

    tensors = []
    pieces: list[Any] = []
    for name, size in enumerate((100, 64, 7)):
        source, there = torch.zeros(size, dtype=torch.uint8), DeviceMemory(cuda, wiped(size))
        source[-1] = 0x7F if wild and size == 64 else 0
        stored = InFile(range(size), 1, numbers, lambda why, name=name: ValueError(f"{name} {why}"))
        whole: Any = moving._Whole(there, -(-size // 32), stored)  # type: ignore[arg-type]
        tensors.append((source, there))
        for begin in range(0, size, 32):
            part = slice(begin, begin + 32)
            pieces.append(moving._Piece(source[part], there[part], whole=whole))
    ring = moving._Ring(DEVICE)
    if wild:
        with pytest.raises(ValueError, match="1 wild"):
            ring.carry(pieces, lambda: None)
    else:
        ring.carry(pieces, lambda: None)
        assert all(torch.equal(there.memory, source) for source, there in tensors)
    assert locked == []


@pytest.mark.parametrize(("processors", "threads"), [(1, 4), (8, 4), (10, 5), (24, 12), (256, 12)])
def test_half_of_the_processors_fill_the_ring(
    monkeypatch: pytest.MonkeyPatch, processors: int, threads: int
) -> None:
    """Of those that the process may use, where the system says which."""
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert moving._threads() == threads
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    assert moving._threads() == threads


@pytest.mark.usefixtures("cuda", "locked")
def test_what_fails_in_a_thread_of_the_ring_is_raised() -> None:
    class Broken:
        def copy_(self, source: Tensor, non_blocking: bool = False) -> None:
            raise RuntimeError("CUDA error: unspecified launch failure")

    pieces = [moving._Piece(torch.zeros(8, dtype=torch.uint8), Broken()) for _ in range(40)]
    with pytest.raises(RuntimeError, match="launch failure"):
        moving._Ring(DEVICE).carry(pieces, lambda: None)


def test_a_ring_is_stopped_by_what_is_asked_meanwhile(
    cuda: FakeCuda, locked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "_PIECE", 8)
    entered: list[int] = []

    class Slow(DeviceMemory):
        def copy_(self, source: Tensor, non_blocking: bool = False) -> None:
            entered.append(1)
            torch.ones(1).sum()
            import time

            time.sleep(0.1)

    def stop() -> None:
        if entered:
            raise KeyboardInterrupt

    zeros = torch.zeros(8, dtype=torch.uint8)
    pieces = [moving._Piece(zeros, Slow(cuda, wiped(8))) for _ in range(60)]
    with pytest.raises(KeyboardInterrupt):
        moving._Ring(DEVICE).carry(pieces, stop)
    assert locked == [] and len(entered) < 60
