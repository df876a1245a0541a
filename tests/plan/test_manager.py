"""The plan: known cases, the rules it keeps on any machine, and what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import in_turn
from support.machines import architecture, cpu, gpu, stored_pair

from wan_core import OptimizationConfig, OptimizationManager
from wan_core.config import GIB, MIB
from wan_core.errors import DoesNotFit, InvalidRequest
from wan_core.memory.choices import Choices
from wan_core.memory.machine import SystemResources
from wan_core.memory.stages import Workload, estimate
from wan_core.models import PARTS
from wan_core.models.architecture import ModelArchitecture
from wan_core.models.sizes import all_blocks, block_bytes
from wan_core.placing import manager as placing_manager
from wan_core.plan import manager as plan_module
from wan_core.plan import stage_seconds
from wan_core.plan.ladder import Limits
from wan_core.plan.plan import OptimizationPlan
from wan_core.plan.timing import stream_seconds, timing

ALL = ("lean", "rows", "stream", "fp8")
P480 = Workload(width=832, height=480, num_frames=81)
P720 = Workload(width=1280, height=720, num_frames=81)
FIVE = Workload(width=1280, height=704, num_frames=121)
T2V, I2V, TI2V, SMALL = "wan2.2-t2v-a14b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b", "wan2.1-t2v-1.3b"


def recommend(
    name: str,
    job: Workload,
    system: SystemResources,
    abilities: tuple[str, ...] = (),
    **wishes: object,
) -> OptimizationPlan:
    requested = OptimizationConfig.from_mapping(wishes)
    manager = OptimizationManager(abilities)
    return manager.recommend_optimizations(architecture(name), job, system, requested)


def placement(plan: OptimizationPlan) -> str:
    """Say in a word or two how a plan places the weights."""
    words = [f"{plan.resident_blocks} + stream" if plan.stream else plan.offload]
    words += ["one at a time"] * (plan.stream_buffers == 1)
    pieces = {"sequential": "by layer", "stream": "by block", "group": "in groups"}
    words += [f"{part} {pieces[how]}" for part, how in plan.part_offload.items() if how in pieces]
    words += ["cache in RAM"] * plan.cache_in_ram
    words += ["lean"] * plan.lean + ["rows"] * plan.by_rows + ["fp8"] * plan.fp8_storage
    return ", ".join(words)


TEXT, VAE = "text_encoder by layer", "vae by layer"
BLOCKS, CACHE = "text_encoder by block", "cache in RAM"

STILL = replace(P480, num_frames=1)

# model, job, GiB of GPU -> placement and the VAE's dtype; with placements alone
PLACED = [
    (T2V, P480, 141, "none", "fp32"),  # both experts, text encoder, VAE and decode: 73 GiB
    (T2V, P480, 80, "none", "fp32"),
    (T2V, P480, 48, "model", "fp32"),  # one expert and its activations: 30.3 GiB
    (T2V, P480, 24, "sequential", "fp32"),
    (T2V, P480, 12, "sequential", "fp32"),  # now the text encoder's 10.8 GiB are the peak
    (T2V, P480, 8, f"sequential, {TEXT}", "bf16"),  # an fp32 decode allocates 8.9 GiB
    (I2V, P720, 80, "model", "fp32"),  # activations at 720p are 8 GiB
    (I2V, P720, 32, "sequential", "fp32"),
    (I2V, P720, 24, "sequential", "bf16"),  # a 720p decode takes 19.9 GiB in fp32, and gaps
    (I2V, P720, 16, "sequential", "bf16"),
    (TI2V, FIVE, 80, "none", "fp32"),
    (TI2V, FIVE, 48, "model", "fp32"),
    (TI2V, FIVE, 24, "model", "bf16"),
    (TI2V, FIVE, 16, "model", "bf16"),
    (TI2V, FIVE, 13.5, f"model, {VAE}", "bf16"),  # a decode takes 9.9 GiB, its gaps 3
    (SMALL, P480, 32, "none", "fp32"),
    (SMALL, P480, 24, "model", "fp32"),
    (SMALL, P480, 16, "model", "fp32"),  # the text encoder, 10.8 GiB, is the largest part
    (SMALL, P480, 11.4, f"model, {VAE}", "fp32"),  # fp32 decode: 8.9 GiB and 2.5 of gaps
    (SMALL, P480, 8, f"model, {TEXT}", "bf16"),
    (SMALL, P480, 6, f"model, {TEXT}", "bf16"),
]

SMALLEST = [
    (P480, 4, f"0 + stream, {BLOCKS}, lean, rows"),
    (P480, 3, f"sequential, {BLOCKS}, lean, rows"),
    (P720, 8.6, f"0 + stream, {BLOCKS}, {CACHE}, lean"),
    (P720, 7.5, f"2 + stream, {BLOCKS}, lean, rows"),
    (P720, 6, f"0 + stream, {BLOCKS}, lean, rows"),
]

# the same where the allocator leaves hardly any gaps
TIGHT = [
    (P480, 4.3, f"0 + stream, {BLOCKS}, {CACHE}, lean"),
    (P480, 3.5, f"0 + stream, one at a time, {BLOCKS}, {CACHE}, lean"),
    (P480, 3.0, f"0 + stream, one at a time, {BLOCKS}, lean, rows"),
    (P720, 7.0, f"0 + stream, {BLOCKS}, {CACHE}, lean"),
    (P720, 6.5, f"0 + stream, one at a time, {BLOCKS}, {CACHE}, lean"),
    (P720, 5.0, f"0 + stream, one at a time, {BLOCKS}, lean, rows"),
]

# the same with the lean forward and streaming
STREAMED = [
    (T2V, P480, 141, "none, lean", "fp32"),
    (T2V, P480, 80, "none, lean", "fp32"),
    (T2V, P480, 48, "model, lean", "fp32"),
    (T2V, P480, 32, "model, lean", "fp32"),  # 1.9 GiB less activations: fits where it did not
    (T2V, P480, 24, "28 + stream, lean", "fp32"),  # rates are assumed: as many as fit
    (T2V, P480, 12, "10 + stream, lean", "fp32"),
    (T2V, P480, 8, f"4 + stream, {BLOCKS}, {CACHE}, lean", "fp32"),
    (T2V, P480, 6, f"1 + stream, {BLOCKS}, {CACHE}, lean", "fp32"),
    (T2V, STILL, 24, "32 + stream, lean", "fp32"),
    (T2V, STILL, 16, "20 + stream, lean", "fp32"),
    (T2V, STILL, 8, f"8 + stream, {BLOCKS}, lean", "fp32"),
    (I2V, P720, 36, "model, lean", "fp32"),
    (I2V, P720, 32, "35 + stream, lean", "fp32"),
    (I2V, P720, 28, "29 + stream, lean", "fp32"),
    (I2V, P720, 16, f"11 + stream, {CACHE}, lean", "fp32"),
    (TI2V, FIVE, 13.5, f"model, {CACHE}, lean", "fp32"),
    (SMALL, P480, 8, f"model, {BLOCKS}, {CACHE}, lean", "fp32"),
    (T2V, P480, 5, f"0 + stream, {BLOCKS}, lean", "bf16"),
    (T2V, P480, 4.7, f"0 + stream, {BLOCKS}, {CACHE}, lean", "bf16"),
]


@pytest.mark.parametrize(("name", "job", "gib", "placed", "vae"), PLACED)
def test_known_cases_with_placements_alone(
    name: str, job: Workload, gib: float, placed: str, vae: str
) -> None:
    plan = recommend(name, replace(job, image=name == I2V), gpu(gib))
    assert (placement(plan), plan.dtypes["vae"]) == (placed, vae)
    assert plan.precision == "bf16"
    assert plan.estimate.fits


@pytest.mark.parametrize(("name", "job", "gib", "placed", "vae"), STREAMED)
def test_known_cases_with_streaming(
    name: str, job: Workload, gib: float, placed: str, vae: str
) -> None:
    plan = recommend(name, replace(job, image=name == I2V), gpu(gib), ("lean", "stream"))
    assert (placement(plan), plan.dtypes["vae"]) == (placed, vae)
    assert plan.estimate.fits


@pytest.mark.parametrize(
    ("allocator", "job", "gib", "placed"),
    [("default", *case) for case in SMALLEST] + [("expandable", *case) for case in TIGHT],
)
def test_known_cases_on_the_smallest_cards(
    allocator: str, job: Workload, gib: float, placed: str
) -> None:
    plan = recommend(T2V, job, gpu(gib, allocator=allocator), ALL)
    assert placement(plan) == placed
    assert plan.estimate.fits and not plan.fp8_storage


@pytest.mark.parametrize(
    ("os", "allocator", "version", "told"),
    [
        ("Linux", "default", "2.9.1+cu130", " PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"),
        ("Linux", "default", "2.10.0", " PYTORCH_ALLOC_CONF=expandable_segments:True"),
        ("Linux", "async", "2.9.1", "without CUDA's own pool (ComfyUI: --disable-cuda-malloc)"),
        ("Linux", "expandable", "2.9.1", ""),
        ("Windows", "default", "2.9.1", ""),
        ("ROCm", "default", "2.13.0", ""),
    ],
)
def test_a_way_to_fewer_gaps_is_named_where_there_is_one(
    os: str, allocator: str, version: str, told: str
) -> None:
    system = gpu(24, os=os, allocator=allocator, torch_version=version)
    if os == "ROCm":
        system = replace(system, os="Linux", backend="rocm", compute_capability=None)
    choices = Choices(dtypes=dict.fromkeys(PARTS, "bf16"), offload="model", stream=True, lean=True)
    found = estimate(architecture(T2V), P720, choices, system)
    there = int(found.peak_usage_mb * MIB)  # enough for what is alive, and no room for gaps
    found = estimate(architecture(T2V), P720, choices, system, available=there)
    assert found.fits is False
    assert "gaps between freed blocks" in found.warnings[-1]
    assert ("expandable_segments" in found.warnings[-1]) == bool(told)
    assert told in found.warnings[-1]


def test_one_block_at_a_time_saves_a_block_and_costs_its_arrival() -> None:
    found, system = architecture(T2V), gpu(24)
    two = Choices(dtypes=dict.fromkeys(PARTS, "bf16"), offload="model", stream=True, lean=True)
    one = replace(two, stream_buffers=1)
    stages = [estimate(found, P480, way, system).stages for way in (two, one)]
    needs = [{stage.name: stage.device_bytes for stage in of_way} for of_way in stages]
    for name in ("denoise_high", "denoise_low"):
        assert needs[0][name] - needs[1][name] == block_bytes(found, "transformer", "bf16")
    assert needs[0]["text_encode"] == needs[1]["text_encode"]
    steps = [timing(found, P480, way, system).step for way in (two, one)]
    assert steps[1] - steps[0] == pytest.approx(stream_seconds(found, P480, one, system, 2))


# ---------------------------------------------------------------------------- precision


def test_precision_follows_the_device() -> None:
    assert recommend(SMALL, P480, gpu(24)).precision == "bf16"
    old = gpu(24, supports_bf16=False)
    plan = recommend(SMALL, P480, old)
    assert (plan.precision, plan.dtypes["text_encoder"]) == ("fp16", "bf16")
    assert recommend(SMALL, P480, cpu(64)).precision == "fp32"


def test_the_vae_stays_in_fp32_where_half_precision_is_wasteful() -> None:
    card = gpu(5)
    assert recommend(T2V, P480, card, ALL).dtypes["vae"] == "bf16"
    bad = recommend(T2V, P480, replace(card, wasteful_half_conv3d=True), ALL)
    assert bad.dtypes["vae"] == "fp32"
    assert "pytorch issue 166643" in " ".join(bad.reasons)


def test_a_cpu_takes_the_files_precision_where_fp32_does_not_fit() -> None:
    plan = recommend("wan2.1-t2v-14b", P480, cpu(48))
    assert plan.precision == "bf16"
    assert "fp32 would need" in plan.reasons[0]
    assert recommend("wan2.1-t2v-14b", P480, cpu(96)).precision == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_what_was_asked_for_is_kept(precision: str) -> None:
    plan = recommend(SMALL, P480, cpu(64), precision=precision, offload="model")
    assert (plan.precision, plan.offload) == (precision, "model")
    assert plan.reasons[0].endswith("asked for")


def test_stored_precision_is_the_files() -> None:
    found = architecture(SMALL, weight_kind="fp16")
    wishes = OptimizationConfig(precision="stored", offload="none")
    plan = OptimizationManager().recommend_optimizations(found, P480, cpu(64), wishes)
    assert plan.precision == "fp16"
    assert all(plan.dtypes[part] for part in ("transformer", "text_encoder", "vae"))


# ---------------------------------------------------------------------------- wishes


def test_a_forced_offload_that_seems_not_to_fit_is_tried_with_a_warning() -> None:
    busy = gpu(24, device_free_bytes=12 * GIB)
    plan = recommend(SMALL, P480, busy, offload="none")
    assert plan.offload == "none"
    assert plan.estimate.fits is False
    assert "asked for" in plan.estimate.warnings[-1]
    with pytest.raises(DoesNotFit):
        recommend(SMALL, P480, gpu(12), offload="none")


def test_a_forced_offload_is_tried_too_where_a_render_goes_on_without_its_workers() -> None:
    """What is smaller still, but would change the clip that was begun, does not count."""
    wishes, manager = OptimizationConfig(offload="none"), OptimizationManager(ALL)
    small, busy = architecture(SMALL), gpu(24, device_free_bytes=10 * GIB)
    begun = manager.recommend_optimizations(small, P480, gpu(80), wishes)
    assert recommend(SMALL, P480, busy, ALL, offload="none").fp8_storage
    plan = manager.plan_alone(small, P480, busy, wishes, begun)
    assert not begun.fp8_storage and not plan.fp8_storage
    assert "asked for" in plan.estimate.warnings[-1]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_vae_whose_range_did_not_hold_stays_in_bf16(precision: str) -> None:
    """Also where nothing else would be in bf16, so that no tier of plans has it."""
    manager, found, card = OptimizationManager((*ALL, "wide norms")), architecture(SMALL), gpu(48)
    wishes = OptimizationConfig(speed="fast", precision=precision)
    begun = manager.recommend_optimizations(found, P480, card, wishes)
    assert begun.dtypes["vae"] == "fp16"
    wide = begun.with_choices(dtypes={**begun.dtypes, "vae": "bf16"})
    smaller = manager.smaller_plan(found, P480, card, wishes, wide, "denoise")
    alone = manager.plan_alone(found, P480, card, wishes, wide)
    for plan in (smaller, alone):
        assert plan is not None and plan.precision == precision and plan.dtypes["vae"] == "bf16"
    same = manager.plan_alone(found, P480, card, wishes, begun)
    assert same.dtypes == begun.dtypes


def test_caps_are_obeyed_and_named() -> None:
    plan = recommend(SMALL, P480, gpu(80), vram_limit_gb=12)
    assert plan.estimate.peak_usage_mb / 1024 <= 12
    with pytest.raises(DoesNotFit, match="vram_limit_gb is 2"):
        recommend(SMALL, P480, gpu(80), vram_limit_gb=2)
    with pytest.raises(DoesNotFit, match="ram_limit_gb is 4"):
        recommend(T2V, P480, gpu(48), ram_limit_gb=4)


def test_what_others_can_give_back_counts() -> None:
    busy = gpu(24, device_free_bytes=4 * GIB)
    with pytest.raises(DoesNotFit):
        recommend(SMALL, P720, busy)
    assert recommend(SMALL, P720, replace(busy, evictable_bytes=20 * GIB)).offload == "model"


def test_windows_only_where_allowed_and_needed() -> None:
    long = replace(P480, num_frames=801)
    card, able = gpu(12), ("lean", "stream")
    with pytest.raises(DoesNotFit, match=r"In windows of 81 frames all 801 would fit: max_chunk_s"):
        recommend(T2V, long, card, able, chunk_size=0)
    plan = recommend(T2V, long, card, able, chunk_size=13)
    assert plan.window_frames == 49
    assert any("allowed" in reason and "change the result" in reason for reason in plan.reasons)
    assert recommend(T2V, P480, card, able, chunk_size=4).window_frames is None


def test_a_clip_longer_than_the_models_own_is_made_in_windows_by_itself() -> None:
    """The longest that fit; a clip of the model's own length never is."""
    long, able = replace(P720, num_frames=801), ("lean", "stream")
    windows = {gib: recommend(T2V, long, gpu(gib), able).window_frames for gib in (80, 12, 6.5)}
    assert windows == {80: None, 12: 81, 6.5: 33}
    told = " | ".join(recommend(T2V, long, gpu(12), able).reasons)
    assert "windows of 81 frames, longer than the model's own length" in told
    told = " | ".join(recommend(T2V, long, gpu(80), able).reasons)
    assert "no windows: all 801 frames fit at once. The model was trained on 81" in told
    with pytest.raises(DoesNotFit, match="In windows of"):
        recommend(T2V, P720, gpu(6.5), able)
    # Nothing else is given up with it.
    plan = recommend(T2V, long, gpu(24), ALL)
    assert (plan.window_frames, plan.by_rows, plan.fp8_storage) == (81, False, False)
    assert plan.dtypes["vae"] == "fp32"


def test_a_ram_that_is_short_costs_fp8_and_nothing_else() -> None:
    plan = recommend(T2V, P480, gpu(24, ram=24), ALL)
    assert (plan.fp8_storage, plan.by_rows, plan.dtypes["vae"]) == (True, False, "fp32")
    assert "GiB of RAM" in " ".join(plan.reasons)


def test_a_ram_limit_bounds_what_is_page_locked() -> None:
    free = recommend(T2V, P480, gpu(24), ALL)
    capped = recommend(T2V, P480, gpu(24), ALL, ram_limit_gb=40)
    assert (free.pin_bytes(64 * GIB), capped.pin_bytes(64 * GIB)) == (64 * GIB, 40 * GIB)
    assert capped.pin_bytes(8 * GIB) == 8 * GIB


def test_group_offload_counts_its_page_locked_copy() -> None:
    found = architecture(T2V)
    parts = {
        name: replace(part, nbytes=28 * GIB, weight_kind="bf16", format="safetensors")
        for name, part in found.components.items()
    }
    mapped, wishes = replace(found, components=parts), OptimizationConfig(offload="group")
    plan = OptimizationManager().recommend_optimizations(mapped, P480, gpu(24, ram=64), wishes)
    assert plan.estimate.host_ram_mb > 26 * 1024


def test_a_smaller_plan_on_a_cpu_is_compared_with_what_is_held_by_now() -> None:
    """What failed may have left the process with more than it held when the plan was made."""
    manager, found, wishes = OptimizationManager(ALL), architecture(SMALL), OptimizationConfig()
    job, machine = replace(P480, num_frames=17), replace(cpu(64), process_bytes=GIB)
    plan = manager.recommend_optimizations(found, job, machine, wishes)
    rungs = 0
    while True:
        smaller, later = (
            manager.smaller_plan(
                found, job, replace(machine, process_bytes=held), wishes, plan, "denoise"
            )
            for held in (GIB, 3 * GIB)
        )
        assert (smaller is None) == (later is None)
        if smaller is None or later is None:
            break
        assert smaller.applied == later.applied
        plan, rungs = smaller, rungs + 1
    assert rungs > 2


@pytest.mark.parametrize(
    ("job", "stage"),
    [(replace(P480, num_frames=1), "text_encode"), (P480, "denoise_high"), (P480, "decode")],
)
def test_the_next_smaller_plan_shrinks_what_failed_and_not_the_rest(
    job: Workload, stage: str
) -> None:
    manager, card = OptimizationManager(ALL), gpu(24, ram=64)
    found, wishes = architecture(T2V), OptimizationConfig()
    plan: OptimizationPlan | None
    plan = manager.recommend_optimizations(found, job, card, wishes)
    first = {s.name: s.device_bytes for s in plan.estimate.stages}
    seen = 0
    while plan is not None:
        needs = {s.name: s.device_bytes for s in plan.estimate.stages}
        smaller = manager.smaller_plan(found, job, card, wishes, plan, stage)
        if smaller is not None:
            seen += 1
            less = {s.name: s.device_bytes for s in smaller.estimate.stages}
            assert less[stage] < needs[stage]
            assert smaller.estimate.host_ram_mb * MIB <= 63 * GIB
            assert smaller.by_rows >= plan.by_rows, "rounding goes one way"
            assert (smaller.dtypes["vae"], plan.dtypes["vae"]) != ("fp32", "bf16")
            if stage == "text_encode" and seen == 1:
                assert less["denoise_high"] == first["denoise_high"], "it did not fail"
        plan = smaller
        assert seen < 64
    assert seen


@pytest.mark.parametrize("forward", ["auto", "lean", "lean_rows", "diffusers"])
def test_a_smaller_plan_may_cut_products_unless_that_was_asked_for_already(forward: str) -> None:
    """A forward of more memory is given up; products by rows stay by rows, on every rung."""
    manager, card = OptimizationManager(ALL), gpu(24, ram=64)
    found, wishes = architecture(T2V), OptimizationConfig(forward=forward)
    plan: OptimizationPlan | None
    plan = manager.recommend_optimizations(found, P480, card, wishes)
    seen = []
    while plan is not None and len(seen) < 32:
        seen.append(plan)
        plan = manager.smaller_plan(found, P480, card, wishes, plan, "denoise_high")
    assert seen[-1].lean and seen[-1].by_rows
    if forward == "lean_rows":
        assert all(one.lean and one.by_rows for one in seen)


def test_a_jobs_own_window_is_kept() -> None:
    job = replace(P480, num_frames=401, window_frames=81, window_overlap=20)
    plan = recommend(SMALL, job, gpu(24))
    assert (plan.window_frames, plan.window_overlap) == (81, 20)


def test_too_small_a_gpu_is_refused_where_the_user_says_so() -> None:
    with pytest.raises(InvalidRequest, match="min_vram_mb") as caught:
        recommend(SMALL, P480, gpu(4), min_vram_mb=6144)
    assert caught.value.field == "min_vram_mb"
    assert recommend(SMALL, P480, cpu(64), min_vram_mb=6144).device == "cpu"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("precision", "int8"), ("precision", 16), ("offload", "gpu"), ("device", 0),
        ("device", ""),
        ("vram_limit_gb", 0), ("vram_limit_gb", "8"), ("vram_limit_gb", float("nan")),
        ("ram_limit_gb", -1), ("chunk_size", 1), ("chunk_size", 4.5), ("chunk_size", True),
        ("min_vram_mb", -5),
    ],
)  # fmt: skip
def test_a_bad_wish_names_field_and_value(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        OptimizationConfig.from_mapping({field: value})
    assert caught.value.field == field
    assert repr(value) in str(caught.value)


def test_an_unknown_wish_is_named_beside_the_known() -> None:
    with pytest.raises(InvalidRequest, match="'vram_limit'.*vram_limit_gb"):
        OptimizationConfig.from_mapping({"vram_limit": 8})
    with pytest.raises(InvalidRequest):
        OptimizationConfig.from_mapping(["precision"])  # type: ignore[arg-type]


def test_wishes_survive_json() -> None:
    wishes = OptimizationConfig(precision="fp16", chunk_size=4, min_vram_mb=6144)
    assert OptimizationConfig.from_mapping(json.loads(json.dumps(wishes.to_dict()))) == wishes


# ---------------------------------------------------------------------------- refusals


def test_does_not_fit_says_how_much_and_what_would() -> None:
    with pytest.raises(DoesNotFit) as caught:
        recommend(I2V, replace(P720, image=True), gpu(8))
    error = caught.value
    assert error.needed_bytes is not None
    assert error.available_bytes == int(8 * GIB * 0.97)
    assert error.needed_bytes > error.available_bytes
    assert "1280x720" in str(error)
    width, height = (
        int(side) for side in str(error).rsplit("81 frames at ", 1)[1].rstrip(".").split("x")
    )
    smaller = replace(P720, image=True, width=width, height=height)
    assert recommend(I2V, smaller, gpu(8)).estimate.fits
    with pytest.raises(DoesNotFit):
        recommend(I2V, replace(smaller, width=width + 16, height=height + 16), gpu(8))


def test_does_not_fit_names_the_longest_clip() -> None:
    with pytest.raises(DoesNotFit) as caught:
        recommend(T2V, replace(P480, num_frames=801), gpu(12), ("lean", "stream"), chunk_size=0)
    frames = int(str(caught.value).split("What would fit: ")[1].split(" frames")[0])
    fits = replace(P480, num_frames=frames)
    assert recommend(T2V, fits, gpu(12), ("lean", "stream"), chunk_size=0).estimate.fits
    longer = replace(fits, num_frames=frames + 4)
    with pytest.raises(DoesNotFit):
        recommend(T2V, longer, gpu(12), ("lean", "stream"), chunk_size=0)


def test_nothing_at_all_fits() -> None:
    with pytest.raises(DoesNotFit, match="No length or size"):
        recommend(T2V, P480, gpu(1))


def test_an_estimate_of_what_does_not_fit_is_no_error() -> None:
    manager = OptimizationManager()
    found = manager.estimate(architecture(T2V), P720, gpu(3))
    assert found.fits is False
    assert "What would fit" in found.warnings[-1]
    assert manager.estimate(architecture(T2V), P480, gpu(80)).fits is True


def test_a_short_ram_is_named() -> None:
    with pytest.raises(DoesNotFit, match="GiB of RAM"):
        recommend(T2V, P480, gpu(48, ram=16))


def test_frames_that_fill_the_ram_are_named_and_not_the_weights() -> None:
    long, system = replace(P480, num_frames=8001), gpu(24, ram=30)
    with pytest.raises(DoesNotFit, match=r"stage decode.*finished frames are 35\.7 GiB") as caught:
        recommend(SMALL, long, system)
    assert "return_frames False" in str(caught.value)
    assert "transformer in" not in str(caught.value)
    assert recommend(SMALL, replace(long, return_frames=False), system).estimate.fits


def one_memory(gib: float) -> SystemResources:
    """A machine whose GPU uses the RAM, such as a Jetson or a GB10."""
    return gpu(gib, ram=gib, shares_ram=True)


@pytest.mark.parametrize("gib", [16, 20, 24, 32, 48, 64, 96])
@pytest.mark.parametrize("name", [SMALL, T2V])
def test_device_and_ram_are_counted_together_where_they_are_one(name: str, gib: float) -> None:
    requested = OptimizationConfig()
    limits = Limits.of(one_memory(gib), requested)
    try:
        plan = recommend(name, P480, one_memory(gib), ALL)
    except DoesNotFit as error:
        assert name == T2V and gib == 16
        assert error.needed_bytes is not None and error.available_bytes == 15 * GIB
        assert error.needed_bytes > 15 * GIB
        assert "What would fit" in str(error) or "No length or size" in str(error)
        return
    needs = [stage.device_bytes + stage.host_bytes for stage in plan.estimate.stages]
    assert max(needs) == limits.most_ram_of(plan.estimate) <= limits.ram == (gib - 1) * GIB
    apart = recommend(name, P480, gpu(gib, ram=gib), ALL)
    assert apart.tier <= plan.tier
    # The next block would not go in: what is left over is less than one, if blocks stay at all.
    if plan.stream and 0 < (plan.resident_blocks or 0) < architecture(name).transformer.layers - 2:
        block = block_bytes(architecture(name), "transformer", "bf16", fp8=plan.fp8_storage)
        denoise = [s for s in plan.estimate.stages if s.name.startswith("denoise")]
        assert limits.ram - max(map(limits.ram_of, denoise)) < block


def test_a_smaller_plan_keeps_to_the_one_memory() -> None:
    system, requested = one_memory(48), OptimizationConfig()
    manager, found = OptimizationManager(ALL), architecture(T2V)
    plan = manager.recommend_optimizations(found, P480, system, requested)
    for stage in ("text_encode", "denoise_high", "decode"):
        smaller = manager.smaller_plan(found, P480, system, requested, plan, stage)
        assert smaller is not None
        limits = Limits.of(system, requested)
        assert limits.most_ram_of(smaller.estimate) <= limits.ram


# ---------------------------------------------------------------------------- what is asked for


def test_a_placement_that_is_asked_for_is_kept() -> None:
    for offload, placed in (
        ("none", "none, lean"), ("model", "model, lean"), ("sequential", "sequential, lean"),
        ("stream", "0 + stream, lean"),
        ("group", "model, transformer in groups, transformer_2 in groups"),
    ):  # fmt: skip
        plan = recommend(T2V, P480, gpu(76), ("lean", "stream"), offload=offload)
        assert placement(plan) == placed
        assert "asked for" in " ".join(plan.reasons)
    assert plan.offload_of("transformer_2") == "group"
    assert not plan.lean, "diffusers' group hooks leave no place for the lean forward"


def test_a_number_of_resident_blocks_asks_for_streaming() -> None:
    plan = recommend(T2V, P480, gpu(48), ALL, resident_blocks=7)
    assert placement(plan) == "7 + stream, lean"
    assert plan.blocks_and_buffers("transformer_2") == (7, 2)
    assert recommend(T2V, P480, gpu(80), ALL, resident_blocks=999).resident_blocks == 40
    with pytest.raises(InvalidRequest, match="resident_blocks is 3 and offload 'model'"):
        OptimizationConfig(offload="model", resident_blocks=3)
    with pytest.raises(InvalidRequest, match="resident_blocks is -1"):
        OptimizationConfig(resident_blocks=-1)


def test_blocks_are_streamed_on_a_cpu_where_that_is_asked_for() -> None:
    plan = recommend(SMALL, P480, cpu(64), (), offload="stream")
    assert placement(plan) == "0 + stream"


@pytest.mark.parametrize(
    ("forward", "words"),
    [("diffusers", "model"), ("lean", "model, lean"), ("lean_rows", "model, lean, rows")],
)
def test_the_forward_that_is_asked_for_is_taken(forward: str, words: str) -> None:
    plan = recommend(T2V, P480, gpu(48), ALL, forward=forward)
    assert placement(plan) == words
    with pytest.raises(InvalidRequest, match="forward is 'fast'"):
        OptimizationConfig(forward="fast")


def test_fp8_storage_always_or_never() -> None:
    always = recommend(T2V, P480, gpu(48), ALL, fp8_storage="always")
    assert (always.fp8_storage, always.dtypes["vae"]) == (True, "fp32")
    assert "fp8 storage" in always.applied and "asked for" in " ".join(always.reasons)
    short = gpu(24, ram=24)  # an expert takes 26.6 GiB of RAM in bf16, 13.5 in fp8
    assert recommend(T2V, P480, short, ALL).fp8_storage
    with pytest.raises(DoesNotFit, match="RAM"):
        recommend(T2V, P480, short, ALL, fp8_storage="never")


def test_ram_may_be_smaller_than_a_model_that_is_used_as_it_lies_in_its_file() -> None:
    small, ample = gpu(12, ram=16), gpu(12, ram=64)
    with pytest.raises(DoesNotFit, match="RAM"):
        recommend(T2V, P480, small, ("lean", "stream"))
    found = architecture(T2V)
    parts = {
        name: replace(part, nbytes=28 * GIB, weight_kind="bf16", format="safetensors")
        for name, part in found.components.items()
    }
    mapped = replace(found, components=parts)
    manager = OptimizationManager(("lean", "stream"))
    tight = manager.recommend_optimizations(mapped, P480, small)
    assert placement(tight) == "10 + stream, lean"  # as many as there is room for: disks are slow
    assert tight.estimate.host_ram_mb < 4 * 1024
    assert "every step reads them from the file" in " ".join(tight.reasons)
    roomy = manager.recommend_optimizations(mapped, P480, ample)
    assert "from the file" not in " ".join(roomy.reasons)
    assert roomy.step_seconds <= tight.step_seconds
    converted = replace(
        mapped, components={name: replace(p, weight_kind="fp32") for name, p in parts.items()}
    )
    with pytest.raises(DoesNotFit, match="RAM"):  # a cast weight is in RAM, not in the file
        manager.recommend_optimizations(converted, P480, small)


# ---------------------------------------------------------------------------- what it says


def test_every_decision_has_a_reason() -> None:
    plan = recommend(T2V, P480, gpu(8), ALL)
    told = " | ".join(plan.reasons)
    for word in ("precision bf16", "vae fp32", "streamed", "text encoder", "lean", "a step"):
        assert word in told
    assert "model would need" in told
    assert plan.estimate.reasons == plan.reasons


def test_a_plan_is_plain_data() -> None:
    plan = recommend(T2V, P480, gpu(8), ALL)
    plain = json.loads(json.dumps(plan.to_dict()))
    assert plain["dtypes"]["transformer"] == "bf16"
    assert plain["stream"] is True
    assert plain["estimate"]["stages"]
    assert plan.offload_of("text_encoder") == "stream"
    assert plan.offload_of("transformer") == "stream"
    assert plan.blocks_and_buffers("text_encoder") == (0, 2)
    assert "lean forward" in plan.applied


def test_by_default_only_what_can_be_carried_out_is_planned() -> None:
    manager = OptimizationManager()
    assert manager.abilities == plan_module.ABILITIES


@pytest.mark.parametrize("reason", [None, "diffusers 0.99 computes X in a way not known here"])
def test_what_the_installed_diffusers_cannot_do_is_not_planned(
    reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing_manager, "why_no_lean", lambda: reason)
    manager = OptimizationManager()
    assert manager.abilities == frozenset(ALL if reason is None else ("stream", "fp8"))
    assert OptimizationManager(()).abilities == frozenset()
    plan = manager.recommend_optimizations(architecture(T2V), P720, gpu(24))
    assert plan.lean == (reason is None)


# ---------------------------------------------------------------------------- any machine

MACHINES = st.builds(
    lambda gib, ram, generation: gpu(gib, ram=ram, pcie_generation=generation),
    st.floats(2, 96),
    st.floats(8, 256),
    st.sampled_from([3, 4, 5]),
)
JOBS = st.builds(
    lambda w, h, t, batch, image, guided: Workload(
        width=32 * w, height=32 * h, num_frames=4 * t + 1, batch_size=batch, image=image,
        guidance_high=guided, guidance_low=guided,
    ),
    st.integers(4, 40), st.integers(4, 24), st.integers(0, 40), st.integers(1, 2), st.booleans(),
    st.booleans(),
)  # fmt: skip
MODELS = {name: architecture(name) for name in (T2V, I2V, TI2V, SMALL, "wan2.1-i2v-14b")}
MODELS |= {f"{T2V} in {kind}": stored_pair(kind) for kind in ("fp8", "bf16")}  # mapped files
NAMES = st.sampled_from([*MODELS])
ABILITIES = st.sampled_from([(), ("lean",), ("lean", "stream"), ALL])
WISHES = st.builds(
    OptimizationConfig,
    vram_limit_gb=st.none() | st.floats(2, 96),
    chunk_size=st.none() | st.just(0) | st.integers(2, 30),
    precision=st.sampled_from(["auto", "fp16"]),
    forward=st.sampled_from(["auto", "auto", "diffusers", "lean", "lean_rows"]),
    fp8_storage=st.sampled_from(["auto", "never", "always"]),
)


@pytest.fixture
def quick_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for what would fit takes a hundred estimates; it has its own tests."""
    monkeypatch.setattr(plan_module, "smaller_that_fits", lambda *_: [])


def attempt(
    found: ModelArchitecture, job: Workload, system: SystemResources, wishes: OptimizationConfig,
    abilities: tuple[str, ...],
) -> OptimizationPlan | None:  # fmt: skip
    try:
        return OptimizationManager(abilities).recommend_optimizations(found, job, system, wishes)
    except DoesNotFit:
        return None


ANYTHING = given(
    name=NAMES, job=JOBS, system=MACHINES, wishes=WISHES, abilities=ABILITIES,
    more=st.floats(0, 64), more_ram=st.floats(0, 64),
)  # fmt: skip
AS_LONG_AS_IT_TAKES = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@settings(AS_LONG_AS_IT_TAKES, max_examples=50)
@ANYTHING
def test_on_any_machine(quick_refusals: None, **drawn: Any) -> None:
    a_plan_fits_and_more_memory_makes_no_worse_one(**drawn)


@pytest.mark.slow
@settings(AS_LONG_AS_IT_TAKES, max_examples=300)
@ANYTHING
def test_on_many_machines(quick_refusals: None, **drawn: Any) -> None:
    a_plan_fits_and_more_memory_makes_no_worse_one(**drawn)


def a_plan_fits_and_more_memory_makes_no_worse_one(
    name: str, job: Workload, system: SystemResources, wishes: OptimizationConfig,
    abilities: tuple[str, ...], more: float, more_ram: float,
) -> None:  # fmt: skip
    found = MODELS[name]
    plan = attempt(found, job, system, wishes, abilities)
    assert plan == attempt(found, job, system, wishes, abilities), "not deterministic"
    if plan is not None:
        limits = Limits.of(system, wishes)
        assert plan.estimate.fits
        assert plan.estimate.peak_usage_mb * MIB <= limits.device <= system.device_free_bytes
        assert plan.estimate.host_ram_mb * MIB <= limits.ram <= system.ram_available_bytes
        if wishes.vram_limit_gb is not None:
            assert plan.estimate.peak_usage_mb / 1024 <= wishes.vram_limit_gb
        own = found.variant.defaults.num_frames
        allowed = wishes.chunk_size or (wishes.chunk_size is None and job.num_frames > own)
        assert plan.window_frames is None or (plan.tier > 0 and allowed)
        assert not (plan.stream and "stream" not in abilities)
        assert not (plan.lean and wishes.forward == "auto" and "lean" not in abilities)
    larger = replace(
        system,
        device_free_bytes=system.device_free_bytes + int(more * GIB),
        device_total_bytes=system.device_total_bytes + int(more * GIB),
        ram_available_bytes=system.ram_available_bytes + int(more_ram * GIB),
        ram_total_bytes=system.ram_total_bytes + int(more_ram * GIB),
    )
    better = attempt(found, job, larger, wishes, abilities)
    if plan is not None:
        assert better is not None, "more memory, and it no longer fits"
        assert better.tier <= plan.tier
        # Within a tier more memory is never slower; a lower tier keeps more of the result.
        assert better.tier < plan.tier or better.step_seconds <= plan.step_seconds
        # Nor is the job, but for the time that page locks take, and that of a last block or two
        # which are sent as a whole where they streamed.
        locks = max(0.0, locking(better) - locking(plan))
        assert better.tier < plan.tier or better.seconds <= 1.01 * plan.seconds + locks


def locking(plan: OptimizationPlan) -> float:
    """The seconds that a job's page locks take at most."""
    locked = [stage.locked_bytes for stage in plan.estimate.stages]
    return sum(locked) / stage_seconds._LOCKED + max(locked) / stage_seconds._UNLOCKED


# ------------------------------------------------------------------- what cannot be carried out


@pytest.mark.parametrize(
    ("name", "offload", "forward"),
    in_turn((T2V, TI2V), ("auto", "model", "stream"), ("auto", "diffusers", "lean", "lean_rows")),
)
def test_no_lean_forward_is_promised_where_there_is_none(
    name: str, offload: str, forward: str
) -> None:
    """Not asked for, not as the last resort, not after memory ran out, not in an estimate."""
    manager, job = OptimizationManager(("stream", "fp8")), replace(P720, num_frames=49)
    requested = OptimizationConfig(forward=forward, offload=offload)
    found, plans = architecture(name), []
    for gib in (6, 12, 24, 80):
        system = replace(gpu(gib), notes=("no lean forward: a reason",))
        asked = (found, job, system, requested)
        plain = replace(requested, forward="diffusers")
        estimate = manager.estimate(*asked)
        assert estimate == manager.estimate(found, job, system, plain)
        if gib in (6, 24):  # a hundred estimates each
            assert manager.what_fits(*asked) == manager.what_fits(found, job, system, plain)
        if not estimate.fits:
            try:
                plans.append(manager.recommend_optimizations(*asked))
            except DoesNotFit as error:
                assert "No lean forward: a reason." in str(error)
            continue
        plans.append(manager.recommend_optimizations(*asked))
        assert "no lean forward: a reason" in plans[-1].reasons
        smaller = manager.smaller_plan(*asked, plans[-1], "denoise")
        plans += [] if smaller is None else [smaller]
    assert len(plans) > 2
    assert not any(plan.lean or plan.by_rows or plan.cache_in_ram for plan in plans)


def test_blocks_that_are_not_locked_travel_through_two_slabs() -> None:
    """What streams is counted in whole blocks, and the slabs of those that find no room with it."""
    found = architecture(T2V)
    largest = max(all_blocks(found, "transformer", "bf16"))
    wishes = OptimizationConfig(offload="stream", resident_blocks=0)
    for budget, locked in ((100 * GIB, 80), (10.5 * largest, 10 + 2), (0, 2)):
        system = gpu(24, ram=128, pinned_budget_bytes=int(budget))
        plan = OptimizationManager().recommend_optimizations(found, P480, system, wishes)
        stage = next(s for s in plan.estimate.stages if s.name == "denoise_high")
        assert stage.locked_bytes == pytest.approx(locked * largest, rel=1e-3)
        decode = next(s for s in plan.estimate.stages if s.name == "decode")
        assert decode.locked_bytes == 0
