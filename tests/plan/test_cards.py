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
from wan_core.memory import (
    SENDING,
    Card,
    Link,
    SystemResources,
    Trial,
    Workload,
    cut_kind,
    link_name,
)
from wan_core.plan import OptimizationPlan, Planner, for_all_cards, gangs
from wan_core.plan.cards import _ram_for_workers
from wan_core.plan.timing import stream_seconds, streamed_bytes

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


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("references", [0, 3])
def test_seconds_on_several_cards_count_the_pipe_and_the_start(
    guided: bool, references: int
) -> None:
    """Six windows of 21 latent frames and the references, their 16 + 16 channels in fp32 through a
    pipe of 0.5 GB/s for each pass, and 14.5 seconds for processes to start, of which those do not
    count that texts take. The stages' seconds are changed as the whole is."""
    job = replace(LONG, guidance_high=guided, references=references, batch_size=2)
    alone, shared = (plan(job, machine(80, 80, 80), count) for count in (1, 3))
    passes = 12 if guided else 6
    moved = 2 * 32 * (21 + references) * 60 * 104 * 4 / 5e8
    step = (alone.step_seconds + passes * moved) / 3
    texts = sum(s.warm for s in alone.stage_seconds[:3])
    assert [s.name for s in alone.stage_seconds[2:4]] == ["text_encode", "load transformer"]
    expected = alone.seconds + 40 * (step - alone.step_seconds) + 14.5 - texts
    assert shared.seconds == pytest.approx(expected, rel=1e-9) and 1 < texts < 6
    assert shared.cold_seconds - alone.cold_seconds == pytest.approx(expected - alone.seconds)
    assert sum(s.warm for s in shared.stage_seconds) == pytest.approx(shared.seconds)
    assert sum(s.cold for s in shared.stage_seconds) == pytest.approx(shared.cold_seconds)
    assert shared.stage_seconds[0].name == "start workers"


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


def known(system: SystemResources, cards: int, **facts: Any) -> SystemResources:
    """The machine after links or a trial between so many cards were measured."""
    between = system.between
    if "link" in facts:
        name = link_name(gangs.machine(system), cards)
        between = replace(between, links={**between.links, name: Link(*facts["link"])})
    if "equal" in facts:
        kind = cut_kind(facts["what"], 1, facts["tokens"], cards)
        trial = Trial(facts["equal"], 0.0 if facts["equal"] else 3e-3)
        between = replace(between, trials={**between.trials, kind: trial})
    return replace(system, between=between)


NVLINK = (3.5e11, 5e-5)
TOKENS = 21 * 30 * 52
FOUR = known(known(machine(80, 80, 80, 80), 2, link=NVLINK), 4, link=NVLINK)


def test_cards_that_windows_and_guidance_leave_over_cut_passes() -> None:
    """81 frames are one window: two passes, and four cards."""
    found = plan(SHORT, FOUR, "all")
    assert found.workers == tuple(f"cuda:{i}" for i in range(4)) and found.gang == 2
    assert "each pass cut over 2" in found.applied and found.must_equal
    # Nothing is promised of a cut that was not tried: until then two cards compute, as now.
    two = plan(SHORT, FOUR, 2)
    assert two.gang == 1 and found.step_seconds == two.step_seconds
    assert "was not tried here" in found.reasons[-1] and "350 GB/s measured" in found.reasons[-1]

    tried = known(FOUR, 2, equal=True, what=found.tried_as, tokens=TOKENS)
    sure = plan(SHORT, tried, "all")
    assert sure.gang == 2 and "exact: tried here, every bit was equal" in sure.reasons[-1]
    assert sure.step_seconds == pytest.approx(two.step_seconds / 2, rel=0.1)
    assert sure.step_seconds > two.step_seconds / 2  # the exchanges
    assert sure.card_peak_bytes < two.card_peak_bytes < found.card_peak_bytes + GIB

    alone = plan(replace(SHORT, guidance_high=False), FOUR, "all", speed="fast")
    assert alone.gang == 4 and len(alone.workers) == 4 and not alone.must_equal


def test_what_has_other_bits_is_for_fast_only() -> None:
    what = plan(SHORT, FOUR, "all").tried_as
    other = known(FOUR, 2, equal=False, what=what, tokens=TOKENS)
    exact = plan(SHORT, other, "all")
    assert exact.gang == 1 and exact.workers == ("cuda:0", "cuda:1")
    assert "2 more would have nothing to do (cut over 2 a pass has other bits" in exact.reasons[-1]
    quick = plan(SHORT, FOUR, "all", speed="fast")
    assert quick.tried_as != what  # other kernels: a trial of their own
    other = known(FOUR, 2, equal=False, what=quick.tried_as, tokens=TOKENS)
    fast = plan(SHORT, other, "all", speed="fast")
    assert fast.gang == 2 and "rounding: tried here, relative error 3.0e-03" in fast.reasons[-1]


def test_windows_and_guidance_come_before_a_cut() -> None:
    """Twelve passes fill four cards; ten do not, and a trial may not cost turns."""
    assert plan(LONG, FOUR, "all").gang == 1
    ten = replace(LONG, num_frames=321)
    untried = plan(ten, FOUR, "all")
    assert untried.gang == 1 and len(untried.workers) == 4
    tried = known(FOUR, 2, equal=True, what=untried.tried_as, tokens=TOKENS)
    found = plan(ten, tried, "all")  # five turns of half a pass rather than three of a whole one
    assert found.gang == 2 and found.step_seconds < 0.95 * untried.step_seconds


def test_slow_links_and_odd_numbers_cut_nothing() -> None:
    slow = known(machine(80, 80, 80, 80), 2, link=(1e8, 1e-3))
    found = plan(SHORT, slow, "all", speed="fast")
    assert found.gang == 1 and "would not pay" in found.reasons[-1]
    three = plan(replace(SHORT, guidance_high=False), machine(80, 80, 80), 3, speed="fast")
    assert three.gang == 2 and len(three.workers) == 2  # 40 heads
    assert "1 more would have nothing to do" in three.reasons[-1]
    windows = plan(SHORT, replace(FOUR, os="Windows"), "all")
    assert windows.gang == 1 and "Windows does not have" in windows.reasons[-1]
    own = plan(SHORT, FOUR, "all", forward="diffusers")
    assert own.gang == 1 and "only the lean forward" in own.reasons[-1]


def test_eight_cards_share_guidance_and_cut_over_four() -> None:
    eight = machine(*[80] * 8)
    for cards in (2, 4, 8):
        eight = known(eight, cards, link=NVLINK)
    found = plan(SHORT, eight, "all", speed="fast")
    assert found.gang == 4 and len(found.workers) == 8


def test_auto_cuts_where_that_pays() -> None:
    found = plan(SHORT, FOUR, "auto")
    assert found.gang == 2 and len(found.workers) == 4
    brief = plan(replace(SHORT, width=256, height=256, num_frames=17, steps=1), FOUR, "auto")
    assert brief.workers == ()  # processes take longer to start than they would save


def test_a_smaller_plan_keeps_the_gangs() -> None:
    asked = OptimizationConfig(devices="all")
    begun = Planner().recommend_optimizations(MODEL, SHORT, FOUR, asked)
    smaller = Planner().smaller_plan(MODEL, SHORT, FOUR, asked, begun, "denoise")
    assert smaller is not None and (smaller.gang, smaller.workers) == (2, begun.workers)
    assert smaller.tried_as == gangs.tried_as(
        gangs.wishes(MODEL, SHORT, smaller.choices, FOUR, asked, lean=True)
    )


@pytest.mark.parametrize(
    ("name", "devices", "workers", "said"),
    [
        ("wan-animate-2-14b", 2, 0, "one card computes Animate 2: its driving stream"),
        ("wan-animate-2-14b", "auto", 0, "one card computes Animate 2: its driving stream"),
        ("wan2.2-animate-14b", 2, 2, "2 cards (cuda:0, cuda:1): a step has 2 passes"),
        ("wan2.2-animate-14b", "all", 2, "Animate's forward cannot be cut over cards"),
    ],
)
def test_what_several_cards_do_for_animate_is_said(
    name: str, devices: Any, workers: int, said: str
) -> None:
    """Both passes of guidance on two cards for Animate 1; nothing for Animate 2."""
    job = replace(SHORT, references=1, reference_picture=True, start_video=True)
    system = machine(80, 80, 80, 80)
    asked = OptimizationConfig(devices=devices)
    found = Planner().recommend_optimizations(architecture(name), job, system, asked)
    assert (len(found.workers), found.gang) == (workers, 1)
    assert any(said in reason for reason in found.reasons), found.reasons
    alone = Planner().recommend_optimizations(
        architecture(name), job, machine(80), OptimizationConfig(devices="auto")
    )
    assert not any("one card computes Animate" in reason for reason in alone.reasons)


def test_one_pass_for_one_card() -> None:
    alone = plan(replace(SHORT, guidance_high=False), machine(80, 80), 2, forward="diffusers")
    assert alone.workers == () and "one card is faster: a step is one pass" in alone.reasons[-1]


def test_segments_wait_for_each_other() -> None:
    """401 frames in segments of 81 are six times two passes: more than two cards cannot share."""
    segments = replace(LONG, in_turn=True)
    found, alone = plan(segments, machine(*[80] * 8), 2), plan(LONG, machine(80), 1)
    assert "a step has 2 passes" in found.reasons[-1]
    assert found.step_seconds == pytest.approx(alone.step_seconds / 2)
    more = plan(segments, machine(*[80] * 8), 8, forward="diffusers")
    assert more.workers == found.workers and more.gang == 1


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
    found = plan(LONG, system, 2, speed="fast")
    assert found.workers == ("cuda:0", "cuda:1") and "of different kinds" in found.reasons[-1]
    alone = plan(replace(SHORT, guidance_high=False), system, 2, speed="fast")
    assert alone.workers == () and "do not compute a pass together" in alone.reasons[-1]


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
    assert found.device_free_bytes == 29 * GIB and "cuda:1 has the least" in found.notes[-1]
    alike = for_all_cards(machine(80, 80), wish)
    assert alike.device_free_bytes == 79 * GIB and not alike.notes  # a worker's context
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
    each = next(s.host_bytes for s in found.estimate.stages if s.name == "denoise")
    process = machine(80).process_ram(("encode", "denoise"))
    assert len(found.workers) == (99 * GIB - process) // each > 1
    assert "RAM has room for" in found.reasons[-1]
    assert "nothing to do" not in found.reasons[-1]
    alone = plan(LONG, replace(machine(*[80] * 8), ram_available_bytes=int(1.5 * each)), "all")
    assert alone.workers == () and "one card computes: RAM has room for 1" in alone.reasons[-1]


@pytest.mark.parametrize("ram", [16, 18, 24, 32, 64])
def test_workers_hold_no_text_encoder(ram: int) -> None:
    """It is the driver's, and needs more than a worker here; workers wait meanwhile."""
    small, system = architecture("wan2.1-t2v-1.3b"), machine(*[80] * 8)
    system = replace(system, ram_available_bytes=ram * GIB)
    asked = OptimizationConfig(devices="all")
    found = Planner().recommend_optimizations(small, LONG, system, asked)
    need = {stage.name: stage.host_bytes for stage in found.estimate.stages}
    process = system.process_ram(("encode", "denoise"))
    each, usable = need["denoise"], (ram - 1) * GIB
    assert need["text_encode"] == max(need.values()) > each > process
    room = min((usable - process) // each, (usable - need["text_encode"]) // process, 8)
    assert max(1, len(found.workers)) == max(1, room)
    assert room > usable // need["text_encode"] or room in (0, 8)


def test_a_worker_is_a_fresh_process_whatever_the_driver_holds() -> None:
    fresh = machine(*[80] * 8)
    full = replace(fresh, process_bytes=2 * GIB, done_here=("card", "denoise", "encode", "imports"))
    told = [_ram_for_workers(plan(LONG, one, "all"), one, 8)[0] for one in (fresh, full)]
    # The one that has denoised has room for what is sent only after its weights.
    assert GIB < told[0] <= told[1] <= told[0] + SENDING


def test_equal_bits_are_promised_with_speed_exact_only() -> None:
    assert "with the bits of one" in plan(LONG, machine(80, 80), 2).reasons[-1]
    fast = plan(LONG, machine(80, 80), 2, speed="fast").reasons[-1]
    assert "with the bits of one" not in fast and "may round differently" in fast


def test_an_overlap_that_nobody_asked_for_fills_the_cards() -> None:
    """321 frames are 5 windows, 10 passes: on four cards three turns, in which 6 windows fit."""
    job = replace(LONG, num_frames=321, overlap_free=True)
    filled, asked = (
        plan(one, machine(*[80] * 4), 4) for one in (job, replace(job, overlap_free=False))
    )
    assert filled.window_overlap == 36 and asked.window_overlap == 16
    assert filled.step_seconds == asked.step_seconds and filled.workers == asked.workers
    said = next(reason for reason in filled.reasons if reason.startswith("overlap 16 -> 36"))
    assert "6 windows instead of 5 fill 4 cards" in said and "at that overlap" in filled.reasons[-1]
    assert "windows of 81 frames, 36 shared" in filled.applied
    assert filled.estimate.reasons == filled.reasons
    # Windows that move or wait for each other, one card, and cards that are full: as it was.
    for change in ({"moving_windows": True}, {"in_turn": True}, {"num_frames": 401}):
        assert plan(replace(job, **change), machine(*[80] * 4), 4).window_overlap == 16
    alone = plan(job, machine(80), 1)
    assert alone == plan(replace(job, overlap_free=False), machine(80), 1)
    # A render that runs out of memory goes on with the windows it began with.
    smaller = Planner().smaller_plan(
        MODEL, job, machine(80, 80), OptimizationConfig(devices=2), filled, "denoise"
    )
    assert smaller is not None and smaller.window_overlap == 36


def streaming(
    link: tuple[float, ...], width: int = 4, cards: int = 2, **wishes: Any
) -> tuple[OptimizationPlan, gangs.Cutting]:
    """A pass cut over cards that hold 8 blocks, behind a slow bus; and what the plan weighed."""
    job = replace(SHORT, guidance_high=False)
    system = known(machine(*[80] * cards), cards, link=link)
    system = replace(system, pcie_generation=3, pcie_width=width)
    wishes = {"speed": "fast", "offload": "stream", "resident_blocks": 8} | wishes
    found = plan(job, system, cards, **wishes)
    return found, gangs.wishes(MODEL, job, found.choices, system, OptimizationConfig(), True)


def test_streamed_weights_are_shared_where_the_link_beats_the_bus() -> None:
    """A gang of two, in whose cards not all blocks fit. Each of two copies half the streamed bytes
    and gathers the other half, while what came before computes."""
    (quick, cutting), (wide, _) = streaming((3.5e11, 5e-5)), streaming((3.5e11, 5e-5), 16)
    assert quick.gang == 2 and quick.shared_weights and "shared out" in quick.applied[-1]
    assert "copies 1/2 of a streamed block and gathers the rest" in quick.reasons[-1]
    assert "GB/s from RAM to each assumed" in quick.reasons[-1]
    assert not wide.shared_weights and "shared out" not in " ".join(wide.applied)
    assert "itself" in wide.reasons[-1] and "if they shared them out" in wide.reasons[-1]
    assert not streaming((2e9, 5e-5))[1].shares_weights(3.0, 2)
    arrives = stream_seconds(MODEL, cutting.workload, quick.choices, cutting.system, 1)
    others = streamed_bytes(MODEL, quick.choices) / 2 / 3.5e11 + 40 * 5e-5
    for alone in (1.0, 3.0, 30.0):
        whole, shared = cutting.streamed_seconds(alone, 2)
        copied = min(alone, arrives)
        assert whole == max(alone / 2, copied)
        assert shared == pytest.approx(max(alone / 2, copied / 2 + others))
        assert cutting.shares_weights(alone, 2) == (shared < whole)
    assert cutting.shares_weights(3.0, 2)
    # Compute hides all that each copies: there is nothing to gain, and no gather to wait for.
    assert whole == shared == 15.0 and not cutting.shares_weights(30.0, 2)
    assert not cutting.shares_weights(3.0, 1)
    resident = plan(cutting.workload, machine(80), 1).choices
    assert not replace(cutting, choices=resident).shares_weights(3.0, 2)


def test_one_buffer_hides_nothing() -> None:
    _, cutting = streaming((3.5e11, 5e-5))
    cutting = replace(cutting, choices=replace(cutting.choices, stream_buffers=1))
    arrives = stream_seconds(MODEL, cutting.workload, cutting.choices, cutting.system, 1)
    others = streamed_bytes(MODEL, cutting.choices) / 2 / 3.5e11 + 40 * 5e-5
    alone = arrives + 4.0
    whole, shared = cutting.streamed_seconds(alone, 2)
    assert whole == pytest.approx(2.0 + arrives)
    assert shared == pytest.approx(2.0 + arrives / 2 + others)


def test_cards_behind_one_switch_share_what_each_alone_would_copy_quickly() -> None:
    """PCIe 4 x16 hides the copies of four cards, unless all of them copy from the same RAM."""
    wide = {"width": 32, "cards": 4, "resident_blocks": 0}
    one, _ = streaming((3.5e11, 5e-5), **wide)
    crowd, cutting = streaming((3.5e11, 5e-5, 6e9), **wide)
    assert not one.shared_weights and one.gang == 4 and "itself" in one.reasons[-1]
    assert crowd.shared_weights and crowd.gang == one.gang == 4
    assert "6 GB/s from RAM to each measured while all copy" in crowd.reasons[-1]
    nbytes = streamed_bytes(MODEL, crowd.choices)
    alone = 1e3 * nbytes / 6e9
    assert cutting.streamed_seconds(alone, 4)[0] == alone / 4
    whole, shared = cutting.streamed_seconds(3.0, 4)
    assert whole == pytest.approx(nbytes / 6e9)
    assert shared == pytest.approx(nbytes / 4 / 6e9 + nbytes * 0.75 / 3.5e11 + 40 * 5e-5)


def test_only_cards_that_compute_a_pass_together_share_weights() -> None:
    """Windows and halves of guidance do not keep step: whoever computes them copies all."""
    wishes = {"speed": "fast", "offload": "stream", "resident_blocks": 0}
    system = known(machine(80, 80), 2, link=(3.5e11, 5e-5, 6e9))
    for job in (SHORT, LONG):
        found = plan(job, replace(system, pcie_generation=3, pcie_width=4), 2, **wishes)
        assert found.gang == 1 and len(found.workers) == 2 and not found.shared_weights
        assert "streamed block" not in found.reasons[-1]


def test_a_communicator_for_gathers_counts() -> None:
    _, cutting = streaming((3.5e11, 5e-5))
    alone, shared = cutting.card_peak(2), cutting.card_peak(2, shared=True)
    assert shared - alone == int(gangs._BUFFERS) > 0
    assert streaming((3.5e11, 5e-5))[0].card_peak_bytes == shared
    wide, cutting = streaming((3.5e11, 5e-5), 16)
    # Not tried yet: rank 0 computes the first pass alone as well.
    assert wide.card_peak_bytes == max(cutting.card_peak(1), cutting.card_peak(2))


def test_nvlinks_make_a_cut_worth_its_trial() -> None:
    """Nothing was measured yet: only who tries a cut learns how fast the cards talk."""
    alone = replace(SHORT, guidance_high=False)
    cards = machine(80, 80)
    linked = replace(cards, cards=tuple(replace(card, nvlinks=18) for card in cards.cards))
    one = replace(linked, cards=(linked.cards[0], cards.cards[1]))
    slow, quick, half = (plan(alone, there, 2, speed="fast") for there in (cards, linked, one))
    assert quick.step_seconds < slow.step_seconds == half.step_seconds
    assert "216 GB/s assumed" in quick.reasons[-1]
