"""The estimate: stages, what they add up to, and what changes them."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.machines import architecture, cpu, gpu
from support.pace import pace

from wan_core import OptimizationConfig
from wan_core.config import GIB, MIB, StageEstimate
from wan_core.memory.forward import transformer_peak
from wan_core.memory.machine import SystemResources
from wan_core.memory.stages import (
    Choices,
    Workload,
    estimate,
    reserved_bytes,
)
from wan_core.memory.text import format_estimate
from wan_core.memory.vae import decode_peak, encode_peak, leaving_bytes
from wan_core.models import PARTS, sizes
from wan_core.models.variants import VAE_21, VAE_22, VARIANTS
from wan_core.plan import Planner

GPU, CPU = gpu(80), cpu(120)


def stage(stages: tuple[StageEstimate, ...], start: str) -> StageEstimate:
    return next(found for found in stages if found.name.startswith(start))


def figures(name: str, job: Workload, **choices: object) -> dict[str, float]:
    """Device GiB per stage."""
    dtypes = {"transformer": "bf16", "transformer_2": "bf16", "text_encoder": "bf16"}
    dtypes |= {"vae": "fp32", "image_encoder": "fp32"}
    made = Choices(**{"dtypes": dtypes, "offload": "model", **choices})  # type: ignore[arg-type]
    found = estimate(architecture(name), job, made, GPU)
    return {entry.name: round(entry.device_bytes / GIB, 2) for entry in found.stages}


def test_a_streamed_text_encoder_holds_two_blocks() -> None:
    """One computes while the next arrives; the embedding table stays in RAM."""
    dtypes = dict.fromkeys(PARTS, "bf16")
    made = Choices(dtypes=dtypes, offload="model", part_offload={"text_encoder": "stream"})
    found = architecture("wan2.2-t2v-a14b")
    job = Workload(width=832, height=480, num_frames=81)
    encoding = stage(estimate(found, job, made, GPU).stages, "text_encode")
    assert encoding.weights_bytes == 2 * sizes.text_block_bytes(found, "bf16") > 0.5 * GIB


@pytest.mark.parametrize(
    ("allocator", "name", "choices", "share"),
    [
        ("default", "denoise", {}, 0.4),
        ("default", "denoise_low", {"lean": True}, 0.35),
        ("default", "denoise", {"lean": True, "by_rows": True}, 0.1),
        ("default", "decode", {}, 0.3),
        ("async", "condition_encode", {}, 0.3),
        ("default", "text_encode", {}, 0.2),
        ("expandable", "denoise", {}, 0.025),
        ("expandable", "denoise_high", {"lean": True}, 0.025),
        ("expandable", "denoise", {"lean": True, "by_rows": True}, 0.025),
        ("expandable", "decode", {}, 0.05),
        ("expandable", "image_encode", {}, 0.05),
    ],
)
def test_gaps_of_each_allocator(
    allocator: str, name: str, choices: dict[str, Any], share: float
) -> None:
    """What benchmarks/results/allocator_room.md measured, and somewhat more."""
    found = StageEstimate(
        name=name, device_bytes=10 * GIB, weights_bytes=9 * GIB, activation_bytes=GIB,
        host_bytes=0, note="",
    )  # fmt: skip
    made = Choices(dtypes={}, **choices)
    assert reserved_bytes(found, made, gpu(24, allocator=allocator)) == 10 * GIB + int(share * GIB)
    assert reserved_bytes(found, made, CPU) == 10 * GIB


def test_known_figures() -> None:
    """Weights 26.7 GiB (14B, bf16) plus 11.1 hidden states; the VAE without the whole video."""
    small = Workload(width=832, height=480, num_frames=81)
    large = Workload(width=1280, height=720, num_frames=81)
    assert figures("wan2.2-t2v-a14b", small) == {
        "text_encode": 10.89, "denoise_high": 30.24, "denoise_low": 30.24, "decode": 8.93,
        "output": 0.0,
    }  # fmt: skip
    assert figures("wan2.1-i2v-14b", replace(large, image=True)) == {
        "text_encode": 10.89, "image_encode": 2.45, "condition_encode": 15.28, "denoise": 38.8,
        "decode": 19.93, "output": 0.0,
    }  # fmt: skip


def test_stages_are_those_the_job_has() -> None:
    job = Workload(width=832, height=480, num_frames=81, encode_text=False)
    assert list(figures("wan2.1-t2v-1.3b", job)) == ["denoise", "decode", "output"]
    assert "image_encode" not in figures("wan2.2-i2v-a14b", replace(job, image=True))
    assert "condition_encode" in figures("wan2.2-i2v-a14b", replace(job, image=True))


def test_a_text_encoder_that_is_not_needed_takes_no_room() -> None:
    """Beside what stays on the device, on the disk, and in what a plan says of weights."""
    model = architecture("wan2.1-t2v-14b")
    given = Workload(width=832, height=480, num_frames=81, encode_text=False)
    needed = replace(given, encode_text=True)
    dtypes = {"transformer": "bf16", "text_encoder": "bf16", "vae": "fp32"}
    everything = Choices(dtypes=dtypes, offload="none")
    with_text, without = (
        stage(estimate(model, job, everything, gpu(80)).stages, "denoise")
        for job in (needed, given)
    )
    text = sizes.part_bytes(model, "text_encoder", "bf16")
    assert with_text.weights_bytes - without.weights_bytes == text > 10 << 30
    # There is a card on which all stays without it, and not with it.
    plans = []
    for job in (needed, given):
        machine = replace(gpu(48, ram=64), device_free_bytes=40 << 30)
        plans.append(Planner().recommend_optimizations(model, job, machine, OptimizationConfig()))
    assert [plan.choices.offload for plan in plans] == ["model", "none"]
    assert plans[0].cold_seconds > plans[1].cold_seconds + 1


def test_a_window_bounds_the_denoiser_but_not_the_frames() -> None:
    whole = Workload(width=832, height=480, num_frames=401)
    windowed = replace(whole, window_frames=81)
    short = Workload(width=832, height=480, num_frames=81)
    peak = figures("wan2.1-t2v-14b", windowed)["denoise"]
    assert peak == pytest.approx(figures("wan2.1-t2v-14b", short)["denoise"], abs=0.2)
    assert figures("wan2.1-t2v-14b", whole)["denoise"] > peak + 10


def test_decode_is_flat_in_frames() -> None:
    peaks = [
        decode_peak(VAE_21, batch=1, latent_frames=t, latent_height=60, latent_width=104, size=4)
        for t in (5, 41, 401)
    ]
    latents = 16 * 60 * 104 * 4 * 2
    assert peaks[1] - peaks[0] == 36 * latents
    assert peaks[2] - peaks[1] == 360 * latents


def test_where_a_quick_vae_was_not_measured_its_maps_have_copies() -> None:
    """MIOpen takes maps with channels last only as copies."""
    job = Workload(width=832, height=480, num_frames=81)
    dtypes, found = dict.fromkeys(PARTS, "bf16"), architecture("wan2.1-t2v-14b")
    made = Choices(dtypes=dtypes, offload="model", lean=True)
    peaks = [
        stage(estimate(found, job, replace(made, quick=quick), system).stages, "decode")
        for system in (GPU, replace(GPU, backend="rocm"))
        for quick in (False, True)
    ]
    assert peaks[1].device_bytes < peaks[0].device_bytes
    assert peaks[3].device_bytes == peaks[2].device_bytes == peaks[0].device_bytes


def test_scalar_timesteps_halve_the_5b() -> None:
    job = Workload(width=1280, height=704, num_frames=121)
    arguments = {"batch": 1, "latent_frames": 31, "latent_height": 44, "latent_width": 80}
    shape = VARIANTS["wan2.2-ti2v-5b"].transformer
    scalar = transformer_peak(shape, size=2, **arguments)
    per_token = transformer_peak(shape, size=2, per_token=True, **arguments)
    assert per_token > 2 * scalar
    text, image = (
        figures("wan2.2-ti2v-5b", replace(job, image=image))["denoise"] for image in (False, True)
    )
    assert image - text == pytest.approx((per_token - scalar) / GIB, abs=0.02)


def test_a_bare_transformer_file_gets_the_usual_parts_and_says_so() -> None:
    dtypes = dict.fromkeys(PARTS, "bf16")
    job = Workload(width=832, height=480, num_frames=81)
    bare = estimate(architecture("wan2.1-t2v-14b", bare=True), job, Choices(dtypes=dtypes), GPU)
    full = estimate(architecture("wan2.1-t2v-14b"), job, Choices(dtypes=dtypes), GPU)
    assert bare.peak_usage_mb == full.peak_usage_mb
    assert "text encoder, vae" in bare.warnings[0]
    assert not full.warnings
    assert bare.confidence < full.confidence


@pytest.mark.parametrize("frames", [5, 81, 801])
def test_on_a_cpu_frames_are_no_weights_and_count_once(frames: int) -> None:
    found = architecture("wan2.1-t2v-1.3b")
    choices = Choices(dtypes=dict.fromkeys(PARTS, "fp32"), offload="model")
    job = Workload(width=832, height=480, num_frames=frames)
    to_file = replace(job, return_frames=False)
    kept, written = (estimate(found, one, choices, CPU) for one in (job, to_file))
    for stages in (kept.stages, written.stages):
        for one in stages:
            part = {"text_encode": "text_encoder", "denoise": "transformer"}.get(one.name, "vae")
            assert one.weights_bytes == sizes.part_bytes(found, part, "fp32"), one.name
            # All of it is RAM, and in the numbers of the device.
            assert one.device_bytes == one.host_bytes
    nbytes = frames * 832 * 480 * 3 * 4
    decode, without = (next(s for s in e.stages if s.name == "decode") for e in (kept, written))
    assert decode.device_bytes - without.device_bytes == nbytes
    assert decode.weights_bytes == without.weights_bytes
    parts = kept.base_model_mb + kept.generation_overhead_mb + kept.output_tensors_mb
    assert kept.total_estimated_mb == pytest.approx(parts)
    long = replace(job, num_frames=2001, window_frames=81, encode_text=False)
    most = estimate(found, long, choices, CPU)
    # Where the decode needs most, the frames are in the peak, and nothing comes on top of it.
    assert max(most.stages, key=lambda one: one.device_bytes).name == "decode"
    assert most.total_estimated_mb == pytest.approx(most.peak_usage_mb)
    assert most.output_tensors_mb * MIB == pytest.approx(2001 * 832 * 480 * 3 * 4)


@pytest.mark.parametrize(("size", "mib"), [((1280, 720), 16 + 64), ((832, 480), 8 + 32)])
def test_pictures_leave_a_card_through_page_locked_ram(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], mib: int
) -> None:
    """One frame and then four at a time, each in a power of two; a byte a number for a file."""
    assert leaving_bytes(1, size[1], size[0], 4) == mib * MIB
    assert leaving_bytes(1, size[1], size[0], 1) == mib * MIB // 4
    found, dtypes = architecture("wan2.1-t2v-1.3b"), dict.fromkeys(PARTS, "bf16")
    job = Workload(width=size[0], height=size[1], num_frames=81)

    def host(system: SystemResources) -> int:
        made = estimate(found, job, Choices(dtypes=dtypes, offload="model"), system)
        return stage(made.stages, "decode").host_bytes

    counted = {system.device: host(system) for system in (gpu(24), CPU)}
    monkeypatch.setattr("wan_core.memory.stages.leaving_bytes", lambda *_: 0)
    assert counted["cuda:0"] - host(gpu(24)) == mib * MIB
    assert counted["cpu"] == host(CPU)


def test_on_a_cpu_weights_and_frames_share_the_ram() -> None:
    dtypes = dict.fromkeys(PARTS, "fp32")
    job = Workload(width=832, height=480, num_frames=81)
    found = estimate(architecture("wan2.1-t2v-1.3b"), job, Choices(dtypes=dtypes), CPU)
    decode = stage(found.stages, "decode")
    weights = sum(
        sizes.part_bytes(architecture("wan2.1-t2v-1.3b"), part, "fp32")
        for part in ("transformer", "vae", "text_encoder")
    )
    frames = 81 * 480 * 832 * 3 * 4
    assert decode.device_bytes >= weights + frames + decode.activation_bytes
    assert found.host_ram_mb * MIB == pytest.approx(max(s.host_bytes for s in found.stages))


@pytest.mark.parametrize(("side", "most"), [(64, 178), (128, 606), (256, 1564)])
def test_a_decode_on_a_cpu_counts_the_gaps_of_the_heap(side: int, most: int) -> None:
    """Beside MiB of anonymous memory that decodes of five frames took in processes of their own."""
    job = Workload(width=side, height=side, num_frames=5, return_frames=False)
    choices = Choices(dtypes=dict.fromkeys(PARTS, "fp32"))
    for machine, least in ((CPU, 0.87), (gpu(24), 0.4)):
        found = estimate(architecture("wan2.1-t2v-1.3b"), job, choices, machine)
        foreseen = stage(found.stages, "decode").activation_bytes / MIB
        assert least * most < foreseen < (1.1 if machine is CPU else 0.9) * most


RUNS = json.loads(
    (Path(__file__).parents[2] / "benchmarks/results/gpu_estimate_h100.json").read_text()
)["cases"]


@pytest.mark.parametrize("run", [run for run in RUNS if run["case"].startswith("vae")])
def test_vae_agrees_with_what_an_h100_allocated(run: dict[str, Any]) -> None:
    _, channels, size, dtype, what = run["case"].split()
    shape = VAE_22 if channels == "48" else VAE_21
    width, height = (int(side) for side in size.split("x"))
    nbytes, scale = sizes.BYTES[dtype], shape.scale_factor_spatial
    if what == "decode":
        ours = decode_peak(
            shape, batch=1, latent_frames=4, latent_height=height // scale,
            latent_width=width // scale, size=nbytes,
        )  # fmt: skip
    else:
        ours = encode_peak(shape, batch=1, num_frames=9, height=height, width=width, size=nbytes)
    assert ours / MIB == pytest.approx(run["allocated"], rel=0.003)


@pytest.mark.parametrize("run", [run for run in RUNS if "diffusers" in run["case"]])
def test_transformer_agrees_with_what_an_h100_allocated(run: dict[str, Any]) -> None:
    name, size, dtype, *more = run["case"].split()
    shape, scale = VARIANTS[name].transformer, VARIANTS[name].vae.scale_factor_spatial
    width, height, frames = (int(number) for number in size.split("x"))
    ours = transformer_peak(
        shape, batch=1, latent_frames=(frames - 1) // 4 + 1, latent_height=height // scale,
        latent_width=width // scale, size=sizes.BYTES[dtype], per_token="token" in more,
    )  # fmt: skip
    assert ours / MIB == pytest.approx(run["allocated"], rel=0.003)


def test_fits_is_about_what_is_available() -> None:
    job, dtypes = Workload(width=832, height=480, num_frames=81), dict.fromkeys(PARTS, "bf16")
    found = architecture("wan2.1-t2v-1.3b")
    choices = Choices(dtypes=dtypes)
    alone = estimate(found, job, choices, GPU)
    room = max(reserved_bytes(entry, choices, GPU) for entry in alone.stages)
    peak = int(alone.peak_usage_mb * MIB)
    assert room > peak, "the allocator leaves gaps"
    for there, fits in [(peak - 1, False), (peak, False), (room - 1, False), (room, True)]:
        told = estimate(found, job, Choices(dtypes=dtypes), GPU, available=there)
        assert told.fits is fits
        assert told.available_mb is not None
        assert (told.peak_usage_mb <= told.available_mb) is fits
        assert ("DOES NOT FIT" in format_estimate(told)) is not fits
        assert ("gaps" in format_estimate(told)) is (peak <= there < room)
    assert "decode" in format_estimate(told)
    # What was measured on one card only is said to be, wherever a card computes.
    assert "known from an H200 with torch 2.11 alone" in format_estimate(told)
    on_cpu = estimate(found, job, Choices(dtypes=dtypes), cpu(64))
    assert "H200" not in format_estimate(on_cpu)


def test_an_estimate_takes_less_than_5_ms() -> None:
    job, dtypes = (
        Workload(width=832, height=480, num_frames=81, image=True),
        {"transformer": "bf16"},
    )
    found = architecture("wan2.1-i2v-14b")
    took = []
    for frames in range(5, 85, 4):
        for cached in (transformer_peak, decode_peak, encode_peak):
            cached.cache_clear()
        started = time.process_time()  # other work on the machine does not count
        estimate(found, replace(job, num_frames=frames), Choices(dtypes=dtypes), GPU)
        took.append(time.process_time() - started)
    assert sorted(took)[len(took) // 2] < 0.005 * pace()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["wan2.1-t2v-1.3b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b"]),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    frames=st.integers(0, 40),
    batch=st.integers(1, 3),
    offload=st.sampled_from(["none", "model", "sequential"]),
    grow=st.sampled_from(["width", "height", "num_frames", "batch_size"]),
)
def test_more_work_never_needs_less(
    name: str, width: int, height: int, frames: int, batch: int, offload: str, grow: str
) -> None:
    sides = {"width": 32 * width, "height": 32 * height}
    job = Workload(**sides, num_frames=4 * frames + 1, batch_size=batch, image=True)
    step = {"width": 32, "height": 32, "num_frames": 4, "batch_size": 1}[grow]
    larger = replace(job, **{grow: getattr(job, grow) + step})
    choices = Choices(dtypes=dict.fromkeys(PARTS, "bf16"), offload=offload)
    found = architecture(name)
    small, large = estimate(found, job, choices, GPU), estimate(found, larger, choices, GPU)
    assert large.peak_usage_mb >= small.peak_usage_mb
    assert large.host_ram_mb >= small.host_ram_mb
    for before, after in zip(small.stages, large.stages, strict=True):
        assert after.device_bytes >= before.device_bytes, before.name
