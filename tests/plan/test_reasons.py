"""The sentences of a plan: each is there where its decision was made, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.machines import architecture, cpu, gpu

from wan_core import OptimizationConfig, OptimizationManager
from wan_core.config import GIB
from wan_core.memory import Workload
from wan_core.memory.calibration import Calibration
from wan_core.memory.machine import SystemResources
from wan_core.models.sizes import block_bytes
from wan_core.plan import reasons
from wan_core.plan.timing import stream_seconds

JOB = Workload(width=832, height=480, num_frames=81)
T2V, SMALL = "wan2.2-t2v-a14b", "wan2.1-t2v-1.3b"
ALL = ("lean", "rows", "stream", "fp8")


def told(name: str, job: Workload, system: SystemResources, **wishes: object) -> str:
    requested = OptimizationConfig.from_mapping(wishes)
    manager = OptimizationManager(ALL)
    plan = manager.recommend_optimizations(architecture(name), job, system, requested)
    return "\n".join(plan.reasons)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (10.0, "10 s"), (119.4, "119 s"), (120.0, "2 min"),
     (3599.0, "60 min")],
)  # fmt: skip
def test_seconds_are_as_exact_as_they_are_known(seconds: float, text: str) -> None:
    assert reasons._seconds(seconds) == text


@pytest.mark.parametrize(
    ("wish", "value", "words"),
    [
        ("forward", "lean", "equal bits; asked for"),
        ("forward", "lean_rows", "changes rounding only; asked for"),
        ("fp8_storage", "always", "changes the result slightly; asked for"),
        ("offload", "sequential", "at a time (slow); asked for"),
    ],
)
def test_what_was_asked_for_is_said_to_be(wish: str, value: str, words: str) -> None:
    asked = told(SMALL, JOB, gpu(24), **{wish: value})
    assert words in asked and asked.count("asked for") == 1
    assert "asked for" not in told(SMALL, JOB, gpu(24))


def test_what_the_plan_chose_itself_is_not_said_to_be_asked_for() -> None:
    by_rows = told(T2V, JOB, gpu(3))
    assert "products cut by rows" in by_rows and "lean forward" in by_rows
    in_fp8 = told(T2V, JOB, gpu(24, ram=24))
    assert "nothing larger fits the card and 23.0 GiB of RAM" in in_fp8
    assert "asked for" not in by_rows + in_fp8


def test_where_the_seconds_come_from() -> None:
    assert "(computed from operations and bus, not measured)" in told(SMALL, JOB, gpu(24))
    known = replace(gpu(24), calibration=Calibration(pace=1.0, runs=2))
    assert "(by the pace of earlier runs on this machine)" in told(SMALL, JOB, known)
    assert " a step" not in told(SMALL, JOB, cpu(64))


def test_the_vae_s_dtype() -> None:
    assert "vae fp32: as published" in told(SMALL, JOB, gpu(24))
    assert "vae bf16: no plan with fp32 fits" in told(SMALL, JOB, gpu(6), forward="diffusers")
    assert "vae bf16: for speed, as asked for" in told(SMALL, JOB, gpu(24), speed="fast")
    wasteful = told(SMALL, JOB, gpu(24, wasteful_half_conv3d=True))
    assert "vae fp32: this torch and cuDNN" in wasteful


def test_what_is_streamed_is_counted() -> None:
    found, system = architecture(T2V), gpu(12)
    plan = OptimizationManager(ALL).recommend_optimizations(found, JOB, system)
    text = next(reason for reason in plan.reasons if "come over the bus" in reason)
    assert f"{plan.resident_blocks} of 40 blocks stay, {40 - plan.resident_blocks} of" in text
    block = block_bytes(found, "transformer", "bf16")
    assert f"{block / GIB:.2f} GiB" in text
    assert f"({stream_seconds(found, JOB, plan.choices, system, 1):.1f} s)" in text
    assert "while others compute" in text and "one at a time" not in text
    single = told(T2V, JOB, gpu(3.0, allocator="expandable"))
    assert "one at a time: the next has no room" in single
    assert "while others compute" not in single


def test_parts_in_pieces_are_named() -> None:
    assert "text encoder block by block: it does not fit as a whole" in told(T2V, JOB, gpu(8))
    assert "feature cache in RAM" in told(T2V, JOB, gpu(8))
    assert "block by block" not in told(T2V, JOB, gpu(80))


def test_windows_and_why() -> None:
    long = replace(JOB, num_frames=1601)
    assert "windows of 81 frames, longer than the model's own length" in told(SMALL, long, gpu(8))
    assert "windows of 33 frames, allowed" in told(SMALL, long, gpu(8), chunk_size=9)
    asked = told(SMALL, replace(long, window_frames=81), gpu(24))
    assert "windows of 81 frames: asked for" in asked
    whole = told(SMALL, replace(JOB, num_frames=161), gpu(80))
    assert "no windows: all 161 frames fit at once. The model was trained on 81" in whole
    assert "windows" not in told(SMALL, JOB, gpu(80))


def test_what_the_faster_placements_would_need() -> None:
    roomy, tight = told(SMALL, JOB, gpu(80)), told(T2V, JOB, gpu(24))
    assert "offload none: every part stays on the device; it fits into 77.6 GiB of GPU 80" in roomy
    assert "23.3 GiB of GPU 24 can be used and none would need" in tight
    assert "model would need" in tight
