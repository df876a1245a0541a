"""When a plan has its clip decoded in strips, and what it says of that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.machines import architecture, gpu

from wan_core import OptimizationConfig
from wan_core.config import GIB, MIB, StageEstimate
from wan_core.memory import (
    Card,
    SystemResources,
    Trial,
    Workload,
    format_estimate,
    lean_decode_bytes,
    strips_cost,
    strips_of,
)
from wan_core.models import VAE_21
from wan_core.plan import OptimizationPlan, Planner, strips, strips_forecast

SMALL = "wan2.1-t2v-1.3b"
CLIP = Workload(width=832, height=480, num_frames=81, steps=40, return_frames=False)


def machine(count: int) -> SystemResources:
    cards = tuple(Card(f"cuda:{i}", "GPU 80", 80 * GIB, 80 * GIB) for i in range(count))
    return replace(gpu(80, ram=1024), cards=cards)


def plan(
    job: Workload, system: SystemResources, devices: Any, model: str = "wan2.1-t2v-14b",
    **wishes: Any,
) -> OptimizationPlan:  # fmt: skip
    asked = OptimizationConfig(devices=devices, **wishes)
    return Planner().recommend_optimizations(architecture(model), job, system, asked)


def test_a_long_decode_is_shared_out_and_counted() -> None:
    system = machine(2)
    found = plan(CLIP, system, 2, speed="fast")
    assert found.decode_strips == 2 and len(found.workers) == 2
    told = strips_forecast(
        architecture("wan2.1-t2v-14b"), CLIP, found.choices, system, found.decode_strips
    )
    pictures = 832 * 480 * 81 * 3 / 1e9
    computed = told.whole_seconds * strips_cost(VAE_21, 60, 104, 2)
    expected = max(computed, pictures) + strips._STRIPS_SECONDS
    assert told.seconds == pytest.approx(expected) and told.trial is None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(strips, "_GAIN", 0.0)
        whole = plan(CLIP, system, 2, speed="fast")
    assert whole.decode_strips == 1 and whole.decode_peak_bytes == 0
    saved = told.whole_seconds - told.seconds
    assert whole.seconds - found.seconds == pytest.approx(saved) and saved > 0
    assert whole.cold_seconds - found.cold_seconds == pytest.approx(saved)
    for of in (whole, found):
        assert sum(s.warm for s in of.stage_seconds) == pytest.approx(of.seconds)
        assert sum(s.cold for s in of.stage_seconds) == pytest.approx(of.cold_seconds)
    # Beside the VAE, whatever else stays on the driver's card: a worker has nothing there.
    alone = plan(CLIP, system, 2, speed="fast", offload="model")
    one = alone.decode_whole_bytes
    assert 0.4 * one < found.decode_peak_bytes < 0.7 * one
    assert alone.decode_peak_bytes == found.decode_peak_bytes
    (said,) = [text for text in found.reasons if "strips" in text]
    assert "changes rounding only" in said and said in found.estimate.reasons
    assert "decoded in 2 strips" in found.applied
    assert found.to_dict()["decode_strips"] == 2


def test_the_stage_shows_what_a_card_with_a_strip_holds() -> None:
    """And the render's peak is that of its largest stage then; one card's figure is kept."""
    job = replace(CLIP, width=1920, height=1088, num_frames=17)
    found = plan(job, machine(2), 2, SMALL, speed="fast", offload="model")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(strips, "_GAIN", 0.0)
        whole = plan(job, machine(2), 2, SMALL, speed="fast", offload="model")

    def stage(of: OptimizationPlan, name: str = "decode") -> StageEstimate:
        return next(stage for stage in of.estimate.stages if stage.name == name)

    assert found.decode_strips == 2 and "2 strips" in stage(found).note
    assert "2 strips" in format_estimate(found.estimate)
    assert stage(found).device_bytes == found.decode_peak_bytes < stage(whole).device_bytes
    assert found.decode_whole_bytes == stage(whole).device_bytes
    assert stage(found).weights_bytes + stage(found).activation_bytes == found.decode_peak_bytes
    assert stage(found, "denoise") == stage(whole, "denoise")
    for of in (found, whole):
        peak = max(of.estimate.stages, key=lambda one: one.device_bytes)
        told = of.estimate
        assert told.peak_usage_mb == pytest.approx(peak.device_bytes / MIB)
        assert told.base_model_mb == pytest.approx(peak.weights_bytes / MIB)
        both = told.base_model_mb + told.generation_overhead_mb
        assert both == pytest.approx(told.peak_usage_mb)
        assert told.total_estimated_mb == pytest.approx(both + told.output_tensors_mb)
    assert found.estimate.peak_usage_mb < whole.estimate.peak_usage_mb


@pytest.mark.parametrize("count", [2, 4])
def test_what_a_strip_holds_is_counted_as_the_whole_decode_is(count: int) -> None:
    """The quick decode's maps in half precision have no copies, neither of the whole nor of it."""
    job = replace(CLIP, width=1280, height=720, num_frames=401, window_frames=81)
    found = plan(job, machine(count), count, speed="fast", offload="model")
    assert found.decode_strips == count and found.choices.quick
    assert found.choices.dtypes["vae"] == "bf16"
    numbers: dict[str, Any] = {
        "batch": 1, "latent_frames": 101, "latent_height": 90, "latent_width": 160, "size": 2,
        "quick": True,
    }  # fmt: skip
    whole, *parts = (
        lean_decode_bytes(VAE_21, strip=strip, **numbers)[0]
        for strip in (None, *strips_of(VAE_21, 90, 160, count))
    )
    assert found.decode_peak_bytes == found.decode_whole_bytes - whole + max(parts)


def test_more_cards_make_more_strips_until_margins_outweigh_them() -> None:
    long = replace(CLIP, num_frames=401, window_frames=81)
    counts = [plan(long, machine(n), n, speed="fast").decode_strips for n in (2, 4, 8)]
    assert counts == [2, 4, 8]
    assert [strips_cost(VAE_21, 60, 104, n) for n in (2, 4, 8)] == pytest.approx(
        [0.54, 0.32, 0.20], abs=0.01
    )
    # Each card sees the whole picture where it is as wide as the margins are.
    assert strips_cost(VAE_21, 12, 12, 8) > 0.6


def test_what_a_short_decode_saves_is_not_worth_it() -> None:
    found = plan(replace(CLIP, num_frames=5), machine(2), 2, speed="fast")
    assert len(found.workers) == 2 and found.decode_strips == 1
    assert not any("strips" in text for text in found.reasons)


def test_exact_takes_strips_that_a_trial_has_shown_to_keep_the_bits() -> None:
    model, system = architecture("wan2.1-t2v-14b"), machine(2)
    plain = plan(CLIP, system, 2)
    assert plain.decode_strips == 1
    choices = replace(plain.choices, lean=True)
    kind = strips_forecast(model, CLIP, choices, system, 2).kind
    for equal, count in ((True, 2), (False, 1)):
        between = replace(system.between, trials={kind: Trial(equal, 0.0 if equal else 1e-6)})
        found = plan(CLIP, replace(system, between=between), 2)
        assert found.decode_strips == count
        told = [text for text in found.reasons if "strips" in text]
        assert [("exact: tried here" in text) for text in told] == [True] * equal
    # Another size, and another dtype of the VAE, are other trials.
    for job, other in ((replace(CLIP, width=848), choices), (CLIP, replace(choices, quick=True))):
        assert strips_forecast(model, job, other, system, 2).kind != kind
    # So is a VAE of other widths: its convolutions are others, for the same latents.
    pruned = replace(model, vae=replace(model.vae or VAE_21, decoder_base_dim=24))
    assert strips_forecast(pruned, CLIP, choices, system, 2).kind != kind


def test_diffusers_own_decoder_makes_no_strips() -> None:
    found = plan(CLIP, machine(2), 2, speed="fast", forward="diffusers")
    assert len(found.workers) == 2 and found.decode_strips == 1
