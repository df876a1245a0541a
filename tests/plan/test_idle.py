"""A wish that a plan cannot heed is said in its estimate; one that it heeds is not."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from support.machines import architecture, cpu, gpu

from wan_core import OptimizationConfig, OptimizationManager
from wan_core.errors import InvalidRequest
from wan_core.memory import Workload
from wan_core.models.stored import StoredSize, StoredSizes
from wan_core.plan.ladder import ABILITIES

JOB = Workload(width=832, height=480, num_frames=81, steps=40)
T2V = "wan2.1-t2v-14b"
WISHES: dict[str, tuple[Any, ...]] = {
    "precision": ("fp32",), "offload": ("sequential",), "resident_blocks": (3, 99),
    "forward": ("lean_rows",), "fp8_storage": ("always",), "device": ("cuda:1",),
    "vram_limit_gb": (20,), "ram_limit_gb": (100,), "chunk_size": (5,), "min_vram_mb": (100,),
    "speed": ("fast", "fastest"), "step_cache": ("never", "easycache"),
    "step_cache_threshold": (0.2,), "step_cache_factor": (2.0,), "guidance_gate": (1.0, 0.5),
    "devices": ("2", "auto"),
}  # fmt: skip
LIMITS = {"vram_limit_gb", "ram_limit_gb", "min_vram_mb", "chunk_size", "device"}
"""What only holds where it must: a limit that is kept anyway has done its work."""


def planned(machine: Any = None, model: Any = None, **wishes: Any) -> Any:
    return OptimizationManager(abilities=ABILITIES).recommend_optimizations(
        model or architecture(T2V), JOB, machine or gpu(80), OptimizationConfig(**wishes)
    )


def test_every_wish_is_walked() -> None:
    assert set(WISHES) == {field.name for field in fields(OptimizationConfig)}


@pytest.mark.parametrize("name", WISHES)
@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_wish_changes_the_plan_or_is_said_not_to(name: str, on_cpu: bool) -> None:
    machine = cpu(200) if on_cpu else gpu(80)
    plain = planned(machine)
    for value in WISHES[name]:
        try:
            found = planned(machine, **{name: value})
        except InvalidRequest:
            continue
        said = " ".join((*found.estimate.warnings, *found.reasons))
        same = found.choices == plain.choices and found.reasons == plain.reasons
        as_before = value in ("never", 1.0)  # what speed "exact" does anyway
        if same and not as_before and name not in LIMITS:
            assert name in said


IDLE = [
    ({"step_cache_threshold": 0.1}, "step_cache_threshold has no effect: no EasyCache"),
    ({"step_cache_threshold": 0.1, "step_cache": "magcache"}, "step_cache_threshold has no effect"),
    ({"step_cache_factor": 2}, "step_cache_factor has no effect: no MagCache"),
    ({"step_cache_factor": 2, "step_cache": "easycache"}, "step_cache_factor has no effect"),
    ({"resident_blocks": 41}, "resident_blocks is 41, and Wan 2.1 text to video 14B has 40 blocks"),
]
HEEDED: list[dict[str, Any]] = [
    {}, {"step_cache": "easycache", "step_cache_threshold": 0.0}, {"resident_blocks": 40},
    {"step_cache": "easycache", "step_cache_threshold": 0.1}, {"min_vram_mb": 100},
    {"step_cache": "magcache", "step_cache_factor": 2}, {"fp8_storage": "always"},
    {"speed": "fastest", "step_cache_threshold": 0.1},
]  # fmt: skip


@pytest.mark.parametrize(("wishes", "said"), IDLE)
def test_a_wish_without_effect_is_said(wishes: dict[str, Any], said: str) -> None:
    (text,) = planned(**wishes).estimate.warnings
    assert text.startswith(said)


@pytest.mark.parametrize("wishes", HEEDED)
def test_a_wish_that_is_heeded_is_not(wishes: dict[str, Any]) -> None:
    assert planned(**wishes).estimate.warnings == ()


def test_the_memory_of_a_gpu_is_no_wish_of_a_cpu() -> None:
    (text,) = planned(cpu(200), min_vram_mb=6144).estimate.warnings
    assert text.startswith("min_vram_mb has no effect: the job runs on the CPU")


Q4 = StoredSizes(
    blocks=(StoredSize(kept=200 << 20),) * 40, rest=StoredSize(wide=1 << 20),
    tables=StoredSize(), largest=5120 * 13824,
)  # fmt: skip


def test_a_quantised_file_is_not_stored_in_fp8_again() -> None:
    plain = architecture("wan2.2-t2v-a14b")

    def stored(*experts: str) -> Any:
        parts = dict(plain.components)
        for name in experts:
            parts[name] = replace(parts[name], stored=Q4, stored_as="GGUF Q4_K")
        return replace(plain, components=parts)

    both = planned(model=stored("transformer", "transformer_2"), fp8_storage="always")
    assert not both.choices.fp8_storage
    (text,) = both.estimate.warnings
    assert text == "fp8_storage has no effect: the weights stay as the file has them (GGUF Q4_K)."
    assert not any("fp8 storage" in reason for reason in both.reasons)
    one = planned(model=stored("transformer"), fp8_storage="always")
    assert one.choices.fp8_storage and one.estimate.warnings == ()
