"""The names the README promises exist, are documented, and cost nothing to import."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys

import pytest

import wan_core
from wan_core.memory import Choices

NUMBERS = (
    "base_model_mb", "generation_overhead_mb", "output_tensors_mb", "total_estimated_mb",
    "peak_usage_mb", "confidence",
)  # fmt: skip


def test_all_is_sorted_and_complete() -> None:
    assert sorted(wan_core.__all__) == wan_core.__all__
    for name in wan_core.__all__:
        assert getattr(wan_core, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Pipelin"):
        _ = wan_core.Pipelin  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [n for n in wan_core.__all__ if n != "__version__"])
def test_public_names_say_what_they_are(name: str) -> None:
    thing = getattr(wan_core, name)
    assert inspect.getdoc(thing), name
    for attribute, member in vars(thing).items():
        if inspect.isfunction(member) and not attribute.startswith("_"):
            assert inspect.getdoc(member), f"{name}.{attribute}"


def test_the_fields_of_the_contract() -> None:
    fields = {f.name for f in dataclasses.fields(wan_core.GenerationConfig)}
    assert fields >= {
        "prompt", "negative_prompt", "num_frames", "width", "height", "num_inference_steps",
        "guidance_scale", "guidance_scale_2", "flow_shift", "boundary", "scheduler", "fps", "seed",
        "batch_size", "image", "last_image", "latents", "prompt_embeds", "negative_prompt_embeds",
        "force_chunked_processing", "max_chunk_size", "precision_override", "enable_optimizations",
        "progress_callback", "chunk_callback", "output_path",
    }  # fmt: skip
    results = {f.name for f in dataclasses.fields(wan_core.VideoGenerationResult)}
    assert results >= {
        "success", "frames", "latents", "output_path", "generation_time", "memory_used_mb",
        "peak_memory_mb", "metadata", "errors", "warnings", "applied_optimizations", "stages",
    }  # fmt: skip
    estimates = {f.name for f in dataclasses.fields(wan_core.MemoryEstimate)}
    assert estimates >= {
        "base_model_mb", "generation_overhead_mb", "output_tensors_mb", "total_estimated_mb",
        "peak_usage_mb", "confidence", "warnings", "stages", "host_ram_mb",
    }  # fmt: skip


def test_importing_the_package_imports_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys, wan_core, wan_core.detect, wan_core.plan, wan_core.job, wan_core.load\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "load": ["PipelineManager", "WanPipelineLoader"],
        "generate": ["WanPipelineWrapper"],
        "detect": ["ArchitectureDetector", "inspect_file"],
        "plan": ["OptimizationConfig", "OptimizationManager", "OptimizationPlan"],
        "memory": ["Choices", "Job", "estimate", "format_estimate"],
        "config": [
            "GenerationConfig",
            "MemoryEstimate",
            "VideoGenerationResult",
            "WanControl",
            "WanLoRA",
        ],
        "errors": ["DoesNotFit", "WanError", "is_oom"],
    }.items(),
)
def test_old_import_places_still_give_the_same_things(module: str, names: list[str]) -> None:
    place = importlib.import_module(f"wan_core.{module}")
    for name in names:
        found = getattr(place, name)
        assert getattr(wan_core, name, found) is found


def test_a_plan_s_choices_can_be_read_and_saved_as_before() -> None:
    choices = Choices(dtypes={"transformer": "bf16", "vae": "fp32"}, offload="model", lean=True)
    plan = wan_core.OptimizationPlan(
        device="cpu",
        choices=choices,
        estimate=wan_core.MemoryEstimate(**dict.fromkeys(NUMBERS, 0.0)),
    )
    assert plan.lean is plan.choices.lean is True
    assert plan.offload_of("transformer") == "model"
    assert {f.name for f in dataclasses.fields(choices)} <= set(
        json.loads(json.dumps(plan.to_dict()))
    )
    assert copy.deepcopy(plan) == copy.copy(plan) == plan
    assert plan.with_choices(lean=False).lean is False
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = plan.nothing_like_it
