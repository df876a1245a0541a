"""Page-locked memory: its budget, what is asked of CUDA, and what a refusal leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from wan_core.loading import page_lock
from wan_core.loading.page_lock import (
    Slab,
    all_pinned_bytes,
    lock_within,
    pin_block,
    pinned_bytes,
    room_to_pin,
    unpin,
)
from wan_core.placing.transport import Block


class Runtime:
    """CUDA's runtime, as far as it locks pages: what is locked, and a refusal after a number."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.allowed, self.asked = 1 << 40, 0
        self.discarded = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.asked += 1
        assert flags == 0 and address not in self.locked
        if sum(self.locked.values()) + nbytes > self.allowed:
            return 2
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    made = Runtime()
    monkeypatch.setattr(page_lock, "_cuda", SimpleNamespace(cudart=lambda: made))
    monkeypatch.setattr(page_lock, "_refused", False)

    def discard() -> None:
        made.discarded += 1

    monkeypatch.setattr(page_lock, "_discard_error", discard)
    yield made
    gc.collect()
    assert not made.locked, "memory was freed while it was locked"


def test_a_slab_is_locked_once_and_unlocked_before_it_is_freed(runtime: Runtime) -> None:
    slab = Slab(300)
    assert not slab.pinned and slab.memory.numel() == 300 and slab.users == 0
    assert slab.lock() and slab.lock() and slab.pinned
    assert (runtime.locked, runtime.asked) == ({slab.memory.data_ptr(): 300}, 1)
    slab.unlock()
    slab.unlock()
    assert runtime.locked == {} and not slab.pinned
    assert slab.lock()
    del slab
    gc.collect()
    assert runtime.locked == {}


def test_after_a_refusal_cuda_is_not_asked_again(runtime: Runtime) -> None:
    runtime.allowed = 100
    first, second, small = Slab(80), Slab(80), Slab(8)
    assert first.lock() and runtime.discarded == 0
    assert not second.lock() and not second.pinned
    assert (runtime.asked, runtime.discarded) == (2, 1)
    assert not small.lock() and runtime.asked == 2
    block = nn.Linear(4, 4)
    home = block.weight.data_ptr()
    assert pin_block(block, Block(block)) is None
    assert block.weight.data_ptr() == home and pinned_bytes(block) == 0


def test_memory_without_weights_shares_the_budget(runtime: Runtime) -> None:
    base = all_pinned_bytes()
    weights = nn.Linear(8, 8)
    held = pin_block(weights, Block(weights))
    assert held is not None
    size = held.memory.numel()
    held.users = 1
    small, large = Slab(100), Slab(101)
    assert not lock_within(large, base + size + 100) and not large.pinned
    assert lock_within(small, base + size + 100) and small.pinned
    assert all_pinned_bytes() == base + size + 100
    assert not lock_within(large, base + size + 200)  # the small one counts
    held.users = 0
    assert lock_within(large, base + 201)  # weights that nobody streams make room
    assert not held.pinned and all_pinned_bytes() == base + 201
    assert room_to_pin((), 0, base + 301) == 100
    assert room_to_pin((), 0, base) == 0, "never less than nothing"
    large.unlock()
    assert all_pinned_bytes() == base + 100
    runtime.allowed = 0
    assert not lock_within(large, 1 << 40)  # the budget has room, the system has none
    assert all_pinned_bytes() == base + 100


def test_weights_of_a_mapped_file_go_back_to_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped, plain = nn.Linear(4, 4), nn.Linear(4, 4)
    homes = {m: [p.data_ptr() for p in m.parameters()] for m in (mapped, plain)}
    in_files = homes[mapped]
    monkeypatch.setattr(page_lock, "is_mapped", lambda tensor: tensor.data_ptr() in in_files)
    both = nn.ModuleList([mapped, plain])
    values = [p.clone() for p in both.parameters()]
    slabs = {block: pin_block(block, Block(block)) for block in (mapped, plain)}
    assert [p.data_ptr() for p in mapped.parameters()] != homes[mapped]
    assert pinned_bytes(both) == sum(slab.memory.numel() for slab in slabs.values() if slab)
    slabs[plain].users = 1  # type: ignore[union-attr]
    unpin(both)
    assert [p.data_ptr() for p in mapped.parameters()] == homes[mapped], "a copy is kept"
    assert pinned_bytes(both) == pinned_bytes(plain) > 0, "what is streamed stays locked"
    slabs[plain].users = 0  # type: ignore[union-attr]
    unpin()
    assert pinned_bytes(both) == 0
    assert [p.data_ptr() for p in plain.parameters()] != homes[plain], "it has no other home"
    assert all(torch.equal(a, b) for a, b in zip(values, both.parameters(), strict=True))


def test_weights_that_were_replaced_meanwhile_are_not_put_back(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA or a cast has given the block other tensors: those are its weights now."""
    block = nn.Linear(4, 4)
    monkeypatch.setattr(page_lock, "is_mapped", lambda tensor: True)
    assert pin_block(block, Block(block)) is not None
    inner: Any = page_lock._slabs[block].block
    changed = torch.full((4, 4), 7.0)
    block.weight.data = changed
    inner.home = [changed, inner.home[1]]
    unpin(block)
    assert block.weight.data_ptr() == changed.data_ptr()
    assert pinned_bytes(block) == 0


def test_a_slab_that_is_too_small_holds_no_block(runtime: Runtime) -> None:
    block = nn.Linear(4, 4)
    slab = pin_block(block, Block(block))
    assert slab is not None and pin_block(block, Block(block)) is slab
    larger = nn.Linear(64, 64)
    page_lock._slabs[larger] = slab
    other = pin_block(larger, Block(larger))
    assert other is not None and other is not slab
