"""How much of Animate 2's driving stream is kept: the plan's choice, by what fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.machines import architecture, cpu, gpu

from wan_core.errors import InvalidRequest
from wan_core.memory import SENDING, Choices, Workload, driven_peak, estimate, kept_bytes
from wan_core.memory.process import FIRST
from wan_core.models import VARIANTS
from wan_core.plan import OptimizationConfig, Planner, timing

MODEL = architecture("wan-animate-2-14b")
SHAPE = VARIANTS["wan-animate-2-14b"].transformer
JOB = Workload(
    width=832, height=480, num_frames=81, references=1, reference_picture=True, start_video=True,
    steps=40,
)  # fmt: skip
SIZE = {"latent_height": 60, "latent_width": 104, "size": 2}
DTYPES = dict.fromkeys(("transformer", "vae", "text_encoder", "image_encoder"), "bf16")


def plan(machine: object, **asked: object) -> object:
    wishes = OptimizationConfig(**asked)  # type: ignore[arg-type]
    return Planner().recommend_optimizations(MODEL, JOB, machine, wishes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("vram", "ram", "way"),
    [(12, 64, "inputs"), (24, 64, "inputs"), (24, 40, "again"), (80, 128, "kv"), (48, 40, "kv")],
)
def test_the_fastest_way_that_fits(vram: int, ram: int, way: str) -> None:
    found = plan(gpu(vram, ram=ram))
    assert found.choices.driving == way and found.choices.lean and found.tier == 0  # type: ignore[attr-defined]
    assert any(reason.startswith("driving stream: ") for reason in found.reasons)  # type: ignore[attr-defined]
    assert f"driving stream {way}" in found.applied  # type: ignore[attr-defined]


def test_what_is_kept_is_40_blocks_of_hidden_states() -> None:
    one = 40 * 21 * 30 * 52 * 5120 * 2
    assert kept_bytes(SHAPE, "kv", latent_frames=21, **SIZE) == (2 * one, 0)
    assert kept_bytes(SHAPE, "inputs", latent_frames=21, **SIZE) == (0, one)
    assert kept_bytes(SHAPE, "again", latent_frames=21, **SIZE) == (0, 0)
    peaks = [driven_peak(SHAPE, way=w, batch=1, latent_frames=22, **SIZE) for w in ("kv", "again")]
    assert 2 * one < peaks[0] and peaks[0] - 2 * one < peaks[1] < 9 * one / 40


def test_estimate_and_clock_know_all_three() -> None:
    machine, stages, seconds, clocks = gpu(80), {}, {}, {}
    for way in ("kv", "inputs", "again"):
        choices = Choices(dtypes=DTYPES, offload="model", lean=True, driving=way)
        found = estimate(MODEL, JOB, choices, machine).stages
        stages[way] = next(stage for stage in found if stage.name == "denoise")
        clocks[way] = timing.timing(MODEL, JOB, choices, machine)
        seconds[way] = clocks[way].step
    one = kept_bytes(SHAPE, "inputs", latent_frames=21, **SIZE)[1]
    assert stages["kv"].device_bytes - stages["again"].device_bytes > 1.8 * one
    # What is kept comes where weights were sent through before.
    assert stages["inputs"].host_bytes - stages["again"].host_bytes == (
        one - (SENDING - FIRST["denoise"])
    )
    assert seconds["kv"] < seconds["inputs"] < 1.1 * seconds["kv"] < 1.5 * seconds["kv"]
    assert 1.8 < seconds["again"] / seconds["kv"] < 2.1
    # What is kept is computed once; the other way it is computed in each pass.
    saved = seconds["again"] - seconds["kv"]
    passes = timing.passes_of(MODEL, JOB)["transformer"]
    assert clocks["again"].total - clocks["kv"].total == pytest.approx(
        saved * JOB.steps - saved / passes
    )


@pytest.mark.parametrize("name", ["wan-animate-2-14b", "wan2.2-animate-14b"])
def test_of_the_step_caches_one_is_known_and_the_other_refused(name: str) -> None:
    model = architecture(name)
    asked = OptimizationConfig(step_cache="easycache")
    found = Planner().recommend_optimizations(model, JOB, gpu(80), asked)
    assert found.choices.easycache == 0.05 and "EasyCache 0.05" in found.applied
    with pytest.raises(InvalidRequest, match=f"no curve of MagCache is published for {name}"):
        Planner().recommend_optimizations(
            model, JOB, gpu(80), OptimizationConfig(step_cache="magcache")
        )
    fastest = OptimizationConfig(speed="fastest")
    found = Planner().recommend_optimizations(model, JOB, gpu(80), fastest)
    assert {"fastest kernels", "EasyCache 0.05", "guidance gate 0.5"} <= set(found.applied)
    few = replace(JOB, steps=6, guidance_high=False)
    found = Planner().recommend_optimizations(model, few, gpu(80), fastest)
    assert not {"EasyCache 0.05", "guidance gate 0.5"} & set(found.applied)


def test_another_forward_is_refused_and_a_cpu_is_planned() -> None:
    for asked in ({"forward": "diffusers"}, {"offload": "group"}):
        with pytest.raises(InvalidRequest, match="two streams of Wan Animate 2"):
            plan(gpu(80), **asked)
    with pytest.raises(InvalidRequest, match="WanFit's own forward"):
        Planner(frozenset()).recommend_optimizations(MODEL, JOB, gpu(80))
    assert plan(cpu(256)).choices.driving == "kv"  # type: ignore[attr-defined]
    assert plan(cpu(96)).choices.driving in ("inputs", "again")  # type: ignore[attr-defined]
