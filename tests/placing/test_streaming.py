"""Streamed blocks: the resident run's bits for every plan, in the right order, and taken off."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import in_turn, pairs
from support.lean_models import inputs_of, model_of
from support.placed_models import Interrupted, run_text, text_encoder
from support.tiny_models import FAMILIES, make_folder
from torch import Tensor, nn

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.errors import InvalidRequest
from wan_core.forward.transformer import hints_in_turn, lean_forward, run_together
from wan_core.loading import page_lock
from wan_core.loading.page_lock import (
    all_pinned_bytes,
    pin_block,
    pinned_bytes,
    room_to_pin,
    unpin,
)
from wan_core.placing.buffers import BufferSchedule, spread
from wan_core.placing.offload import block_hooks, place
from wan_core.placing.streaming import _pin, blocks_of, pin_ahead, stream_blocks
from wan_core.placing.transport import Block, DirectTransport

LAYERS = 5


pytestmark = pytest.mark.usefixtures("without_gradients")


def small(layers: int = LAYERS) -> tuple[Any, list[dict[str, Any]], list[Tensor]]:
    """A text-to-video transformer, three calls of it, and their resident results."""
    model = model_of("wan2.1-t2v", torch.float32, num_layers=layers)
    calls = []
    for seed in range(3):
        call = inputs_of(model, torch.float32, seed=seed)
        call["hidden_states"] = call["hidden_states"][:, :, :2, :4, :4]
        call["encoder_hidden_states"] = call["encoder_hidden_states"][:, :8]
        calls.append(call)
    return model, calls, [model(**call)[0] for call in calls]


def facts_of(module: nn.Module) -> tuple[object, ...]:
    """What a stream may not change: objects, values and the place of parameters, hooks, dicts."""
    return (
        [(name, id(p), p.device) for name, p in module.named_parameters()],
        [(name, b.clone()) for name, b in module.state_dict().items()],
        [
            (sorted(m.__dict__), list(m._forward_hooks), list(m._forward_pre_hooks))
            for m in module.modules()
        ],
    )


def same(before: tuple[object, ...], after: tuple[object, ...]) -> bool:
    values: Any = zip(before[1], after[1], strict=True)  # type: ignore[call-overload]
    equal = all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in values)
    return equal and (before[0], before[2]) == (after[0], after[2])


# --- the schedule -----------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 60))
def test_resident_blocks_are_spread_evenly(blocks: int, resident: int) -> None:
    resident = min(resident, blocks)
    chosen = spread(blocks, resident)
    assert len(chosen) == resident == len(set(chosen))
    for width in range(1, blocks + 1):  # every window of blocks holds nearly the same number
        counts = [sum(a <= i < a + width for i in chosen) for a in range(blocks - width + 1)]
        assert max(counts) - min(counts) <= 1


class Watch:
    """Follows a schedule as a transport would, and says what it does wrong."""

    def __init__(self, schedule: BufferSchedule) -> None:
        self.schedule = schedule
        self.holds: dict[int, int] = {}
        self.in_use: set[int] = set()
        self.loads = 0
        self.late = 0
        self.load(schedule.start())

    def load(self, loads: Any) -> None:
        for load in loads:
            assert load.block not in self.holds.values(), "loaded twice"
            assert load.buffer not in self.in_use, "loaded over a block that is in use"
            self.holds[load.buffer] = load.block
            self.loads += 1

    def turn(self, block: int) -> None:
        here = block in self.holds.values()
        turn = self.schedule.turn(block)
        for buffer in turn.free:
            self.in_use.discard(buffer)
            self.holds.pop(buffer, None)
        self.load(turn.loads)
        if block in self.schedule.resident:
            assert turn.use is None
            return
        assert turn.use is not None
        assert self.holds[turn.use] == block, "another block is in the buffer"
        self.late += not here
        if len(self.schedule.streamed) > self.schedule.buffers:
            self.in_use = {turn.use}


@settings(max_examples=200)
@given(st.data())
def test_any_order_of_turns_finds_its_block(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 12))
    watch = Watch(
        BufferSchedule(blocks, data.draw(st.integers(0, blocks)), data.draw(st.integers(1, 4)))
    )
    for block in data.draw(st.lists(st.integers(0, blocks - 1), max_size=60)):
        watch.turn(block)
        assert len(watch.holds) <= watch.schedule.buffers


@given(st.integers(1, 12), st.integers(0, 12), st.integers(2, 4), st.integers(1, 3))
def test_in_order_every_block_is_there_before_its_turn(
    blocks: int, resident: int, buffers: int, calls: int
) -> None:
    schedule = BufferSchedule(blocks, min(resident, blocks), buffers)
    watch = Watch(schedule)
    steps = 4
    for _ in range(steps):  # around the end, too
        for block in range(blocks):
            for _ in range(calls):  # conditional and unconditional share a turn
                watch.turn(block)
    assert watch.late == 0
    streamed = len(schedule.streamed)
    if streamed <= buffers:
        assert watch.loads == streamed
    else:
        # One load for each turn of a streamed block, and as many ahead as there are buffers.
        ahead = schedule.buffers - (blocks - 1 in schedule.streamed)
        assert watch.loads == steps * streamed + ahead


def test_numbers_out_of_range_are_named() -> None:
    with pytest.raises(InvalidRequest, match="resident_blocks is 6.*0..5"):
        BufferSchedule(5, 6, 2)
    with pytest.raises(InvalidRequest, match="buffers is 0"):
        BufferSchedule(5, 0, 0)
    with pytest.raises(InvalidRequest, match="Linear has no list of blocks"):
        blocks_of(nn.Linear(1, 1))


# --- what is computed -------------------------------------------------------------------------


class Poisoning(DirectTransport):
    """Wipes a buffer when it is given up: a block still using it would compute NaN."""

    def free(self, buffer: int) -> None:
        self._buffers[buffer].fill_(255)


class AtTheLastMoment(Poisoning):
    """Copies only when a block is waited for, as a slow bus does."""

    def __init__(self, blocks: list[Block], buffers: list[Tensor]) -> None:
        super().__init__(blocks, buffers)
        self._under_way: dict[int, tuple[int, slice | None]] = {}

    def load(self, block: int, buffer: int, part: slice | None = None) -> None:
        self._buffers[buffer].fill_(255)
        self._under_way[buffer] = block, part

    def ready(self, block: int, buffer: int) -> None:
        if buffer in self._under_way:
            block, part = self._under_way.pop(buffer)
            super().load(block, buffer, part)


TRANSPORTS = (DirectTransport, Poisoning, AtTheLastMoment)


@pytest.fixture
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan_core.placing.streaming.DirectTransport", request.param)


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize(
    ("resident", "buffers", "transport"), pairs(range(LAYERS + 1), (1, 2, 3), TRANSPORTS),
    indirect=["transport"],
)  # fmt: skip
def test_equal_bits_for_every_plan(resident: int, buffers: int) -> None:
    model, calls, expected = small()
    before = facts_of(model)
    for _ in range(2):
        with stream_blocks(model, "cpu", resident_blocks=resident, buffers=buffers) as state:
            assert len(state.resident) == resident
            for call, right in zip(calls, expected, strict=True):
                assert torch.equal(model(**call)[0], right)
        assert same(before, facts_of(model))


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize(
    ("family", "transport"), in_turn((*FAMILIES, "wan2.1-vace"), TRANSPORTS),
    indirect=["transport"],
)  # fmt: skip
def test_equal_bits_with_the_lean_forward_and_shared_passes(family: str) -> None:
    model = model_of(family, torch.bfloat16, num_layers=LAYERS)
    calls = [inputs_of(model, torch.bfloat16, seed=seed) for seed in (0, 1)]
    expected = [model(**call)[0] for call in calls]
    before = facts_of(model)
    with stream_blocks(model, "cpu", resident_blocks=1) as state, lean_forward(model, rows=16):
        for _ in range(2):
            results = run_together(model, calls)
            assert all(torch.equal(a[0], b) for a, b in zip(results, expected, strict=True))
        assert state.loads == 2 * len(state.streamed) + 2  # once for both, two blocks ahead
        assert torch.equal(model(**calls[1])[0], expected[1])
    assert same(before, facts_of(model))


@pytest.mark.parametrize("resident", [0, 3, 5])
def test_vace_blocks_are_loaded_in_the_order_in_which_they_compute(resident: int) -> None:
    """With diffusers' own forward too, whose hints would come first but for ``hints_in_turn``."""
    model = model_of("wan2.1-vace", torch.bfloat16)
    call = inputs_of(model, torch.bfloat16)
    expected = model(**call)[0]
    before = facts_of(model)
    for context in (hints_in_turn, lean_forward):
        with stream_blocks(model, "cpu", resident_blocks=resident) as state, context(model):
            assert len(state.resident) + len(state.streamed) == 6
            for _ in range(2):
                assert torch.equal(model(**call)[0], expected)
            # Each streamed block once a forward, and those that were loaded ahead.
            assert state.loads <= 2 * len(state.streamed) + 2
    with stream_blocks(model, "cpu", resident_blocks=resident):  # out of order, and right
        assert torch.equal(model(**call)[0], expected)
    assert same(before, facts_of(model))


@pytest.mark.parametrize("transport", TRANSPORTS, indirect=True)
@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("resident", [0, 1, 2])
def test_text_encoder_streams_too(resident: int) -> None:
    encoder = text_encoder()
    expected = run_text(encoder)
    before = facts_of(encoder)
    with stream_blocks(encoder, "cpu", resident_blocks=resident):
        assert torch.equal(run_text(encoder), expected)
        assert encoder.shared._forward_pre_hooks  # looks up on the host
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert same(before, facts_of(encoder))


def test_event_order() -> None:
    model, (call, *_), _ = small(4)
    events: list[tuple[str, int, int]] = []
    with stream_blocks(
        model, "cpu", resident_blocks=1, events=lambda *event: events.append(event)
    ) as state:
        home = [p.data_ptr() for block in (0, 1) for p in model.blocks[block].parameters()]
        for _ in range(2):
            model(**call)
            # A block that has had its turn no longer points into a buffer.
            now = [p.data_ptr() for block in (0, 1) for p in model.blocks[block].parameters()]
            assert now == home
    assert (state.resident, state.streamed) == ((3,), (0, 1, 2))
    assert events == [
        ("load", 0, 0), ("load", 1, 1),
        ("use", 0, 0),
        ("free", 1, 0), ("load", 2, 0), ("use", 1, 1),
        ("free", 2, 1), ("load", 0, 1), ("use", 2, 0),  # around the end: the next step's first
        ("free", 3, 0), ("load", 1, 0),  # while the resident block computes
        ("use", 0, 1),
        ("free", 1, 1), ("load", 2, 1), ("use", 1, 0),
        ("free", 2, 0), ("load", 0, 0), ("use", 2, 1),
        ("free", 3, 1), ("load", 1, 1),
    ]  # fmt: skip


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize(
    ("error", "at", "transport"),
    pairs((RuntimeError, KeyboardInterrupt, Interrupted), (1, 2, LAYERS), TRANSPORTS),
    indirect=["transport"],
)
def test_an_interrupted_step_changes_nothing(error: type[BaseException], at: int) -> None:
    model, (call, *_), (expected, *_) = small()
    before = facts_of(model)
    seen: list[int] = []

    def stop() -> None:
        seen.append(1)
        if len(seen) == at:
            raise error("stop")

    with stream_blocks(model, "cpu", resident_blocks=1):
        with pytest.raises(error, match="stop"), block_hooks(model, stop):
            model(**call)
        assert torch.equal(model(**call)[0], expected)  # the same stream goes on
    assert same(before, facts_of(model))
    with pytest.raises(error, match="outside"), stream_blocks(model, "cpu"):
        raise error("outside")
    assert same(before, facts_of(model))
    assert torch.equal(model(**call)[0], expected)


@pytest.mark.parametrize("failing", ["load", "ready", "free", "close"])
def test_a_transport_that_fails_leaves_nothing(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (call, *_), _ = small()
    before = facts_of(model)

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken = type("Broken", (DirectTransport,), {failing: fail})
    monkeypatch.setattr("wan_core.placing.streaming.DirectTransport", broken)
    with pytest.raises(torch.OutOfMemoryError), stream_blocks(model, "cpu"):
        model(**call)
    assert same(before, facts_of(model))
    monkeypatch.undo()
    with stream_blocks(model, "cpu"):  # the module is free again
        pass


def test_one_thread_at_a_time() -> None:
    model, (call, *_), (expected, *_) = small(3)
    before = facts_of(model)
    results: list[bool] = []

    def work(streamed: bool) -> None:
        for _ in range(3):
            on: Any = stream_blocks(model, "cpu") if streamed else place(model, "model", "cpu")
            with torch.no_grad(), on:
                results.append(torch.equal(model(**call)[0], expected))

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 12
    assert same(before, facts_of(model))


# --- slabs ------------------------------------------------------------------------------------


def test_a_slab_holds_every_kind_of_tensor_exactly() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = nn.Parameter(torch.arange(6, dtype=torch.float32).view(2, 3))
            self.turned = nn.Parameter(torch.arange(6, dtype=torch.bfloat16).view(2, 3).t())
            self.gaps = nn.Parameter(torch.arange(20, dtype=torch.float16)[::2])
            self.bytes = nn.Parameter(torch.arange(5, dtype=torch.int8), requires_grad=False)
            self.empty = nn.Parameter(torch.empty(0, 3))
            self.number = nn.Parameter(torch.tensor(3.5))
            self.again = self.whole
            self.register_buffer("table", torch.arange(7), persistent=False)

    module = Mixed()
    before = {name: p.clone() for name, p in module.named_parameters()}
    block = Block(module)
    slab = torch.empty(block.nbytes, dtype=torch.uint8)
    block.gather(slab)
    for cuts in ([0], [7], [256, 300], [1, 600, 601, 1500]):  # the same bytes, part by part
        pieces = torch.zeros(block.nbytes, dtype=torch.uint8)
        for begin, stop in pairwise([0, *cuts, block.nbytes]):
            block.gather(pieces, slice(begin, stop))
        for laid, tensor in zip(block.places, block.home, strict=True):
            assert torch.equal(laid.view(pieces), tensor)
    views = block.views(slab)
    block.use(views)
    assert module.whole.data_ptr() == slab.data_ptr()
    assert module.turned.stride() == (1, 3)
    assert module.again is module.whole
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(module.table, torch.arange(7))
    assert all((v.data_ptr() - slab.data_ptr()) % 256 == 0 for v in views if v.numel())
    block.use(block.home)
    assert module.whole.data_ptr() != slab.data_ptr()


@pytest.fixture
def lockable(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Page-locking without a GPU: what is locked now."""
    locked: list[int] = []

    def register(memory: Tensor) -> bool:
        locked.append(memory.data_ptr())
        return True

    monkeypatch.setattr(page_lock, "_register", register)
    monkeypatch.setattr(page_lock, "_unregister", locked.remove)
    return locked


def test_pinned_slabs_stay_until_unpinned(lockable: list[int]) -> None:
    model, (call, *_), (expected, *_) = small(2)
    before = facts_of(model)
    first = [pin_block(block, Block(block)) for block in model.blocks]
    assert [slab is not None and slab.pinned for slab in first] == [True, True]
    assert same(before, facts_of(model))
    assert torch.equal(model(**call)[0], expected)
    assert pinned_bytes(model) == sum(Block(block).nbytes for block in model.blocks)
    home = [p.data_ptr() for p in model.parameters()]
    unpin(model)
    assert (lockable, pinned_bytes(model)) == ([], 0)
    again = [pin_block(block, Block(block)) for block in model.blocks]
    assert again == first  # locked again where they lie, nothing copied
    assert [p.data_ptr() for p in model.parameters()] == home
    weight = model.blocks[1].ffn.net[2].weight
    weight.data = weight.data.clone()
    assert pin_block(model.blocks[1], Block(model.blocks[1])) is not first[1]
    assert torch.equal(model(**call)[0], expected)


def test_a_slab_goes_with_its_module(lockable: list[int]) -> None:
    block = nn.Linear(4, 4)
    assert pin_block(block, Block(block)) is not None
    assert len(lockable) == 1
    del block
    assert lockable == []


def test_a_system_that_refuses_to_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_lock, "_register", lambda memory: False)
    block = nn.Linear(4, 4)
    home = block.weight.data_ptr()
    assert pin_block(block, Block(block)) is None
    assert block.weight.data_ptr() == home


def test_the_budget_is_the_whole_process_s(lockable: list[int]) -> None:
    high, low = (nn.ModuleList(nn.Linear(8, 8) for _ in range(4)) for _ in range(2))
    size = Block(high[0]).nbytes
    slabs = [pin_block(block, Block(block)) for block in high]
    assert None not in slabs
    slabs[0].users = 1  # type: ignore[union-attr]  # streamed from just now
    assert room_to_pin(low, 2 * size, 6 * size) == 2 * size
    assert pinned_bytes(high) == 4 * size
    assert room_to_pin(low, 4 * size, 6 * size) == 4 * size  # two of the idle ones made room
    assert pinned_bytes(high) == 2 * size
    assert room_to_pin(low, 99 * size, 6 * size) == 5 * size
    assert slabs[0] is not None and slabs[0].pinned
    assert room_to_pin(high, 4 * size, 6 * size) == 6 * size  # one's own do not count


@pytest.mark.parametrize("room", [0, 0.9, 1, 2.5, 4, 99])
def test_as_many_blocks_are_locked_as_the_budget_holds(lockable: list[int], room: float) -> None:
    model, _, _ = small(5)
    before = all_pinned_bytes()
    size = max(Block(block).nbytes for block in model.blocks)
    schedule = BufferSchedule(5, 1, 2)
    blocks = [Block(block) for block in model.blocks]
    slabs = _pin(list(model.blocks), blocks, schedule, before + int(room * size))
    assert len(slabs) == min(int(room), 4)
    # Evenly over those that are streamed, so that slow copies and fast ones take turns.
    chosen = [schedule.streamed.index(index) for index in slabs]
    assert chosen == list(spread(4, len(slabs)))
    assert all(slab.pinned and slab.users == 0 for slab in slabs.values())
    assert len(lockable) == len(slabs)


def test_pinning_stops_when_told_or_refused(
    lockable: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = small(5)
    numbers = list(model.blocks), [Block(b) for b in model.blocks], BufferSchedule(5, 1, 2), 1 << 40

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _pin(*numbers, stop)
    assert lockable == []
    register = page_lock._register
    monkeypatch.setattr(page_lock, "_register", lambda memory: not lockable and register(memory))
    assert len(_pin(*numbers)) == 1 == len(lockable)


def test_pinning_ahead_of_the_turn(lockable: list[int]) -> None:
    model, (call, *_), (expected, *_) = small(4)
    before = facts_of(model)
    with pin_ahead(model, resident_blocks=1, pin_bytes=1 << 40):
        for _ in range(2000):
            if len(lockable) == 3:
                break
            time.sleep(0.005)
    assert len(lockable) == 3  # the streamed ones
    assert pinned_bytes(model.blocks[3]) == 0  # the resident one
    assert same(before, facts_of(model))
    with stream_blocks(model, "cpu", resident_blocks=1):
        assert torch.equal(model(**call)[0], expected)


def test_pinning_ahead_stops_and_says_what_went_wrong(
    lockable: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = small(4)
    before = set(threading.enumerate())  # other tests' workers wait in threads
    with pytest.raises(KeyboardInterrupt), pin_ahead(model, pin_bytes=1 << 40):
        raise KeyboardInterrupt
    begun = set(threading.enumerate()) - before
    assert not [thread for thread in begun if "wanfit" in thread.name]
    with stream_blocks(model, "cpu"), pin_ahead(model, pin_bytes=1 << 40):
        pass  # in use already: neither an error nor a deadlock
    with (
        pytest.raises(InvalidRequest, match="resident_blocks is 9"),
        pin_ahead(model, resident_blocks=9),
    ):
        pass


def test_the_low_noise_expert_is_page_locked_while_the_other_works(
    lockable: list[int], tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", "wan2.2-t2v-a14b")
    wrapper = WanPipelineLoader(enable_caching=False).load_wan_pipeline(
        folder, optimization_config={"device": "cpu", "precision": "fp32"}
    )
    request, plan = wrapper.plan(GenerationConfig(prompt="a", width=32, height=32, num_frames=5))
    streamed = replace(plan, device="cuda:0").with_choices(stream=True, resident_blocks=0)
    for chosen, locked in ((streamed, True), (streamed.with_choices(stream=False), False)):
        render = wrapper._make_render(GenerationConfig(prompt="a"), request, chosen)
        stages = render.stages
        with stages.pin_next("transformer_2"):
            assert not lockable  # it is neither in RAM nor in a mapped file: left alone
        cpu = wrapper._make_render(GenerationConfig(prompt="a"), request, plan).stages
        cpu.keep_components = True
        with cpu.component("transformer_2") as module, stages.pin_next("transformer_2"):
            end = time.monotonic() + 60
            while locked and len(lockable) < len(module.blocks) and time.monotonic() < end:
                time.sleep(0.005)
            assert len(lockable) == (len(module.blocks) if locked else 0)
        unpin(module)


def test_what_an_embedding_in_ram_is_given_and_gives() -> None:
    """Tokens are looked up in RAM; the meta device stands for the card the rows go to."""
    from wan_core.placing.streaming import _to_device, _to_host

    table = nn.Embedding(4, 8)
    tokens = torch.tensor([[1, 3]])
    (there,) = _to_host(table, (tokens,))
    assert there.device.type == "cpu" and torch.equal(there, tokens)
    rows = _to_device(torch.device("meta"), table, (), table(there))
    assert (rows.device.type, tuple(rows.shape)) == ("meta", (1, 2, 8))
