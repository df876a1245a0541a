"""The time model: against reported runs within its stated factor, and in what it compares."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.machines import architecture, cpu, gpu

from wan_core.memory.choices import Choices, Workload
from wan_core.models.sizes import PARTS
from wan_core.plan.timing import (
    blocks_that_hide_the_bus,
    forward_operations,
    stream_seconds,
    timing,
    windows_per_step,
)

JOB = Workload(width=832, height=480, num_frames=81)
BF16 = Choices(dtypes=dict.fromkeys(PARTS, "bf16"))
T2V = architecture("wan2.1-t2v-14b")
H100 = gpu(80, compute_capability=(9, 0), multiprocessors=132, pcie_generation=5)


@pytest.mark.parametrize(
    ("name", "width", "height", "frames", "tera"),
    [
        ("wan2.1-t2v-14b", 832, 480, 81, 1678),
        ("wan2.1-t2v-14b", 1280, 720, 81, 6523),
        ("wan2.2-ti2v-5b", 1280, 704, 121, 517),
        ("wan2.1-t2v-1.3b", 832, 480, 81, 283),
    ],
)
def test_operations_of_one_forward(
    name: str, width: int, height: int, frames: int, tera: float
) -> None:
    job = Workload(width=width, height=height, num_frames=frames)
    counted = forward_operations(architecture(name), job, BF16)
    assert counted == pytest.approx(tera * 1e12, rel=0.02)


def test_reported_runs_within_a_third() -> None:
    unguided = replace(JOB, guidance_high=False, guidance_low=False)
    # One forward on an H100, eager: 4.60 s; two on a 4090D (114 multiprocessors): 30.5 s.
    assert timing(T2V, unguided, BF16, H100).step == pytest.approx(4.6, rel=0.33)
    ada = gpu(24, multiprocessors=114)
    assert timing(T2V, JOB, BF16, ada).step == pytest.approx(30.5, rel=0.33)


def test_guidance_doubles_a_step_of_the_expert_that_has_it() -> None:
    experts = architecture("wan2.2-t2v-a14b")
    steps = [
        timing(experts, replace(JOB, guidance_high=a, guidance_low=b), BF16, H100).step
        for a, b in [(False, False), (True, False), (True, True)]
    ]
    assert steps[1] == pytest.approx(1.5 * steps[0])
    assert steps[2] == pytest.approx(2 * steps[0])


def test_streaming_is_free_where_a_block_computes_longer_than_it_travels() -> None:
    streamed = replace(BF16, offload="model", stream=True, lean=True, resident_blocks=0)
    still = replace(JOB, num_frames=1)
    resident = replace(BF16, offload="model")
    assert timing(T2V, JOB, streamed, H100).step == timing(T2V, JOB, resident, H100).step
    slow = timing(T2V, still, streamed, H100).step
    assert slow > 2 * timing(T2V, still, resident, H100).step
    half = replace(streamed, resident_blocks=20)
    assert timing(T2V, still, half, H100).step == pytest.approx(slow / 2)
    alone = replace(streamed, lean=False)  # conditional and unconditional pass fetch apart
    assert timing(T2V, still, alone, H100).step == pytest.approx(2 * slow)
    fp8 = replace(streamed, fp8_storage=True)
    assert timing(T2V, still, fp8, H100).step == pytest.approx(slow / 2, rel=0.02)


def test_resident_blocks_that_hide_the_bus() -> None:
    streamed = replace(BF16, offload="model", stream=True, lean=True)
    assert blocks_that_hide_the_bus(T2V, JOB, streamed, H100) == 0
    still = replace(JOB, num_frames=1)
    count = blocks_that_hide_the_bus(T2V, still, streamed, H100)
    assert 20 < count < 40
    enough = timing(T2V, still, replace(streamed, resident_blocks=count), H100).step
    assert enough == timing(T2V, still, replace(BF16, offload="model"), H100).step


def test_every_window_fetches_the_streamed_blocks_again() -> None:
    streamed = replace(BF16, offload="model", stream=True, lean=True, window_frames=17)
    long = replace(JOB, num_frames=401)
    slow_bus = replace(H100, pcie_generation=3, pcie_width=8)
    one = stream_seconds(T2V, JOB, replace(streamed, window_frames=None), slow_bus, 2)
    assert windows_per_step(T2V, long, streamed) == 97
    assert stream_seconds(T2V, long, streamed, slow_bus, 2) == pytest.approx(97 * one)
    assert blocks_that_hide_the_bus(T2V, long, streamed, slow_bus) > 20
    by_layer = replace(BF16, offload="sequential", window_frames=17)
    assert timing(T2V, long, by_layer, H100).step > 97 * 40 * 14 * 1e-3


def test_layer_by_layer_is_the_slowest() -> None:
    steps = [timing(T2V, JOB, replace(BF16, offload=o), H100).step for o in ("none", "sequential")]
    assert steps[1] > 1.3 * steps[0]


def test_windows_cost_their_overlap() -> None:
    long = replace(JOB, num_frames=241)
    whole = forward_operations(T2V, long, BF16)
    windowed = forward_operations(T2V, replace(long, window_frames=81), BF16)
    one = forward_operations(T2V, JOB, BF16)
    assert windowed == pytest.approx(4 * one)  # 61 latent frames, 21 at a time, 17 further each
    assert windowed < whole


def test_on_a_cpu_nothing_travels() -> None:
    job = replace(JOB, num_frames=5)
    found = timing(T2V, job, replace(BF16, offload="model"), cpu(64))
    still = timing(T2V, replace(job, steps=0), replace(BF16, offload="model"), cpu(64))
    assert found.total == pytest.approx(found.step * job.steps + still.total)
    longer = replace(job, num_frames=9, steps=0)
    assert timing(T2V, longer, replace(BF16, offload="model"), cpu(64)).total > still.total
