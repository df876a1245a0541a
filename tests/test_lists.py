"""Lists that must know of the same things: where one names and another reads, both are walked."""

from __future__ import annotations

import argparse
import ast
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
from support.as_pack import ROOT
from support.comfy_schemas import help_names, schemas

from wan_core import __main__ as command
from wan_core import arguments, config, job, plan, preferences
from wan_core.config import GenerationConfig, WanControl
from wan_core.formats.gguf import GGML_TYPES
from wan_core.formats.kinds import GGUF_TYPES, KINDS
from wan_core.job import Request
from wan_core.journal import identity
from wan_core.loading import dequantize
from wan_core.models import VARIANTS, magcache
from wan_core.plan import OptimizationConfig
from wan_core.serve import jobs

FLOATS = {"F32", "BF16", "F16"}
CALLBACKS = {name for name in (f.name for f in fields(GenerationConfig)) if "_callback" in name}
CALLBACKS |= {"interrupt_check"}


# -- kinds of storage --------------------------------------------------------------------------


def test_gguf_types_are_read_taken_apart_checked_and_ranked() -> None:
    packed = GGUF_TYPES - FLOATS
    assert {name for name, *_ in GGML_TYPES.values()} >= GGUF_TYPES
    assert set(dequantize._HALVES) == packed
    functions, sizes = dequantize._gguf_functions()
    assert packed <= set(functions) <= GGUF_TYPES, "diffusers takes others apart"
    for name, numbers, nbytes in GGML_TYPES.values():
        assert name not in packed or sizes[name] == (numbers, nbytes)
        assert all(0 <= at <= nbytes - 2 for at in dequantize._HALVES.get(name, ()))
    assert packed == {kind for kind in KINDS if kind[0] in "QI"}


# -- the library, the command line, files of jobs ------------------------------------------------

OTHERWISE = {
    "num_frames": "frames", "num_inference_steps": "steps", "max_chunk_size": "window",
    "window_overlap": "overlap", "window_schedule": "schedule", "window_fusion": "fusion",
    "window_mode": "mode", "window_anchor": "anchor", "output_path": "output",
}  # fmt: skip
"""Options that are named otherwise than their field."""
NO_OPTION = {
    "control", "batch_size", "latents", "prompt_embeds", "negative_prompt_embeds", "start_step",
    "end_step", "continue_from", "force_chunked_processing", "journal_folder",
    "precision_override", "enable_optimizations", "output_metadata", "return_frames",
} | CALLBACKS  # fmt: skip
"""Tensors, parts of a run that give latents on, and what the command decides itself; ``control``
has options of its own, ``force_chunked_processing`` and ``precision_override`` another spelling."""
NO_WISH = {"chunk_size", "min_vram_mb"}
"""Wishes that the command line does not have: windows are asked for by ``--window``."""


def options(*groups: Any) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    for group in groups:
        group(parser)
    return {action.dest for action in parser._actions}


def test_the_command_line_asks_for_every_field() -> None:
    asked = options(arguments.add_size, arguments.add_job)
    named = {OTHERWISE.get(f.name, f.name) for f in fields(GenerationConfig)} - NO_OPTION
    assert asked == named
    wishes = options(arguments.add_plan) - {"lora", "use_recipe"}
    assert wishes == {f.name for f in fields(OptimizationConfig)} - NO_WISH
    control = {name.removeprefix("control_") for name in options(arguments.add_control)}
    assert control == {f.name for f in fields(WanControl)}
    preferred = options(arguments.add_preferences) - {"json"}
    assert preferred == set(preferences.FIELDS) == set(arguments._PREFERRED)


def test_what_the_command_line_is_given_reaches_the_job() -> None:
    """Each option is read where its job is made: in ``__main__``, by its name."""
    tree = ast.parse((ROOT / "wan_core" / "__main__.py").read_text("utf-8"))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "arguments"
    }
    read |= {*command._JOB, *command._PLAN}  # handed on by these names
    groups = (arguments.add_size, arguments.add_job, arguments.add_plan)
    assert options(*groups) <= read
    loose = {f"control_{f.name}" for f in fields(WanControl)} - read
    assert loose == {  # by a loop over their names
        f"control_{name}" for name in (*jobs._CONTROL_VIDEOS, "reference", "keyframes")
    }


def test_a_line_of_a_file_of_jobs_states_whatever_text_can() -> None:
    assert {f.name for f in fields(GenerationConfig)} >= jobs._NOT_IN_A_LINE >= CALLBACKS
    assert {*jobs._CONTROL_FILES, *jobs._CONTROL_VALUES} == {f.name for f in fields(WanControl)}
    assert not set(jobs._OWN) & set(jobs.CONFIG_FIELDS)


def test_whatever_decides_the_latents_is_in_a_saved_render() -> None:
    """A field that is added is part of the identity, or is said not to change a latent."""
    request = set(Request.__slots__)
    assert set(identity._NOT_IN_LATENTS) | set(identity._UNSAID) <= request
    tensors = {
        "image", "last_image", "latents", "continue_from", "prompt_embeds",
        "negative_prompt_embeds", "control",
    }  # fmt: skip
    otherwise = {"max_chunk_size": "window_frames",
                 "force_chunked_processing": "window_frames", "return_frames": None, "audio": None,
                 "output_metadata": None, "enable_optimizations": None,
                 "precision_override": None}  # fmt: skip
    for name in (f.name for f in fields(GenerationConfig)):
        if name not in CALLBACKS | tensors:
            assert otherwise.get(name, name) in request | {None}, name


# -- models ----------------------------------------------------------------------------------------


def test_curves_are_those_of_variants() -> None:
    assert set(magcache._CURVES) <= set(VARIANTS)
    for name in VARIANTS:
        for image in (False, True):
            curve = magcache.magcache_curve(name, 832, 480, image)
            assert (curve is None) == (name not in magcache._CURVES)


# -- nodes and their pages -------------------------------------------------------------------------


@cache
def declared() -> dict[str, Any]:
    return schemas()


PAGES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))


@pytest.mark.parametrize("node", PAGES)
def test_a_node_and_its_page_name_the_same_inputs_and_outputs(node: str) -> None:
    assert sorted(declared()) == PAGES
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text("utf-8")
    named = set(help_names(page))
    schema = declared()[node]
    known = [one.id for one in schema.inputs]
    assert len(set(known)) == len(known)
    made = [getattr(one, "display_name", None) or one.id for one in schema.outputs]
    assert named | set(made) == {*known, *made}
    assert {one.id for one in schema.inputs if not getattr(one, "tooltip", "")} == set()


@pytest.mark.parametrize("node", PAGES)
def test_a_page_has_no_table(node: str) -> None:
    """A table is cut at the width of ComfyUI's panel; a list goes on in the next line."""
    lines = (ROOT / "web" / "docs" / f"{node}.md").read_text("utf-8").splitlines()
    assert [line for line in lines if line.startswith("|")] == []


CHOICES = {
    "precision": config.PRECISIONS, "speed": config.SPEEDS, "expert": config.EXPERTS,
    "codec": config.CODECS, "resume": config.RESUME, "offload": plan.OFFLOADS,
    "forward": plan.FORWARDS, "fp8_storage": plan.FP8, "step_cache": plan.STEP_CACHES,
    "scheduler": job.SCHEDULERS, "fusion": job.FUSIONS, "noise": job.NOISES,
}  # fmt: skip


def test_what_a_node_lets_choose_is_what_the_library_takes() -> None:
    seen = set()
    for schema in declared().values():
        for one in schema.inputs:
            if one.id in CHOICES:
                assert set(one.options) == set(CHOICES[one.id]), one.id
                seen.add(one.id)
    assert seen == set(CHOICES)
