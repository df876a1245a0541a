"""How many cards a plan takes, what it says of them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import pytest
from support.machines import architecture, cpu, gpu

from wan_core import OptimizationConfig
from wan_core.config import GIB
from wan_core.errors import InvalidRequest
from wan_core.memory import Card, SystemResources, Workload
from wan_core.plan import OptimizationPlan, Planner, for_all_cards

LONG = Workload(width=832, height=480, num_frames=401, window_frames=81, steps=40)
SHORT = Workload(width=832, height=480, num_frames=81, steps=40)
MODEL = architecture("wan2.1-t2v-14b")


def machine(*free: float, names: tuple[str, ...] = ()) -> SystemResources:
    """A machine with a card of 80 GiB for each number, which is what is free on it."""
    cards = tuple(
        Card(f"cuda:{i}", names[i] if names else "GPU 80", 80 * GIB, int(gib * GIB))
        for i, gib in enumerate(free)
    )
    return replace(gpu(80, ram=1024), device_free_bytes=int(free[0] * GIB), cards=cards)


def plan(job: Workload, system: SystemResources, devices: Any, **wishes: Any) -> OptimizationPlan:
    asked = OptimizationConfig(devices=devices, **wishes)
    return Planner().recommend_optimizations(MODEL, job, system, asked)


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_a_step_takes_as_many_turns_as_the_passes_need(count: int) -> None:
    """401 frames in windows of 81 that share 16 are 6 windows of 2 passes each."""
    alone = plan(LONG, machine(*[80] * 8), 1)
    shared = plan(LONG, machine(*[80] * 8), count)
    assert alone.workers == () and shared.workers == tuple(f"cuda:{i}" for i in range(count))
    assert shared.step_seconds == pytest.approx(alone.step_seconds * ceil(12 / count) / 12)
    assert replace(alone.choices, dtypes={}) == replace(shared.choices, dtypes={})
    assert f"{count} cards" in shared.reasons[-1] and "12 passes" in shared.reasons[-1]
    assert shared.estimate.reasons == shared.reasons
    assert f"on {count} cards" in shared.applied


def test_a_clip_in_one_window_has_two_passes_to_share() -> None:
    found = plan(SHORT, machine(80, 80, 80, 80), "all")
    assert found.workers == ("cuda:0", "cuda:1")
    assert "2 more would have nothing to do" in found.reasons[-1]
    alone = plan(replace(SHORT, guidance_high=False), machine(80, 80), 2)
    assert alone.workers == () and "one card is faster" in alone.reasons[-1]


def test_auto_takes_as_many_as_pay() -> None:
    assert len(plan(LONG, machine(*[80] * 8), "auto").workers) == 6  # 7 and 8 need as many turns
    tiny = replace(SHORT, width=64, height=64, num_frames=5, steps=2)
    found = plan(tiny, machine(80, 80), "auto")
    assert found.workers == () and "one card is faster" in found.reasons[-1]
    asked = plan(tiny, machine(80, 80), 2)
    assert len(asked.workers) == 2 and "One card is expected to be faster" in asked.reasons[-1]


def test_auto_leaves_out_cards_that_are_in_use_or_of_another_kind() -> None:
    names = ("GPU 80", "GPU 80", "GPU 80", "another")
    found = plan(LONG, machine(80, 20, 80, 80, names=names), "auto")
    assert found.workers == ("cuda:0", "cuda:2")


def test_different_cards_are_refused_where_bits_shall_be_equal() -> None:
    system = machine(80, 80, names=("GPU 80", "another"))
    with pytest.raises(InvalidRequest, match="their bits differ") as caught:
        plan(LONG, system, 2)
    assert caught.value.field == "devices" and "cuda:1 another" in str(caught.value)
    assert plan(LONG, system, 2, speed="fast").workers == ("cuda:0", "cuda:1")


def test_cards_by_their_numbers_and_cards_that_are_not_there() -> None:
    assert plan(LONG, machine(80, 80, 80), "0, 2").workers == ("cuda:0", "cuda:2")
    assert plan(LONG, machine(80, 80, 80), "cuda:2,cuda:1").workers == ("cuda:2", "cuda:1")
    for wanted in (3, "0,2"):
        with pytest.raises(InvalidRequest, match="this machine has cuda:0, cuda:1") as caught:
            plan(LONG, machine(80, 80), wanted)
        assert caught.value.field == "devices"


@pytest.mark.parametrize("value", [0, -1, "two", "0,", "", 1.5, True, "cuda", "0,cuda:", 100])
def test_what_devices_may_not_be(value: object) -> None:
    with pytest.raises(InvalidRequest, match="devices is") as caught:
        OptimizationConfig.from_mapping({"devices": value})
    assert caught.value.field == "devices"


@pytest.mark.parametrize(("value", "kept"), [(2, "2"), ("ALL", "all"), (" 0, 1", "0,1")])
def test_what_devices_may_be(value: object, kept: str) -> None:
    assert OptimizationConfig.from_mapping({"devices": value}).devices == kept


def test_the_plan_fits_the_card_with_the_least_room() -> None:
    wish = OptimizationConfig(devices="all")
    found = for_all_cards(machine(80, 30), wish)
    assert found.device_free_bytes == 30 * GIB and "cuda:1 has the least" in found.notes[-1]
    alike = for_all_cards(machine(80, 80), wish)
    assert alike.device_free_bytes == 79 * GIB and not alike.notes  # the driver's own context
    alone = machine(80, 30)
    assert for_all_cards(alone, OptimizationConfig()) is alone


def test_processes_on_a_cpu_are_for_who_asks() -> None:
    assert plan(SHORT, cpu(512), 2).workers == ("cpu", "cpu")
    for wanted in ("auto", "all", "1"):
        assert plan(SHORT, cpu(512), wanted).workers == ()


def test_a_smaller_plan_keeps_its_cards() -> None:
    system, asked = machine(80, 80), OptimizationConfig(devices=2)
    begun = Planner().recommend_optimizations(MODEL, LONG, system, asked)
    smaller = Planner().smaller_plan(MODEL, LONG, system, asked, begun, "denoise")
    assert smaller is not None and smaller.workers == begun.workers


def test_no_more_processes_than_ram_has_room_for() -> None:
    """Each has an interpreter of its own, and its own copy of what does not stay in its file."""
    found = plan(LONG, replace(machine(*[80] * 8), ram_available_bytes=100 * GIB), "all")
    each = max(stage.host_bytes for stage in found.estimate.stages)
    assert len(found.workers) == 99 * GIB // each > 1
    assert "RAM has room for" in found.reasons[-1]
    assert "nothing to do" not in found.reasons[-1]
    alone = plan(LONG, replace(machine(*[80] * 8), ram_available_bytes=int(1.5 * each)), "all")
    assert alone.workers == () and "one card computes: RAM has room for 1" in alone.reasons[-1]


def test_equal_bits_are_promised_with_speed_exact_only() -> None:
    assert "with the bits of one" in plan(LONG, machine(80, 80), 2).reasons[-1]
    fast = plan(LONG, machine(80, 80), 2, speed="fast").reasons[-1]
    assert "with the bits of one" not in fast and "may round differently" in fast
