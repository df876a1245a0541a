"""The ingredients of speed that leave forwards out: step caches and the guidance gate.

What they do is in ``sampling.shortcuts``; here is when they make sense, and what to expect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..memory import Choices, Workload
from ..models import (
    MagCurve,
    ModelArchitecture,
    computed,
    easycache_warm,
    magcache_curve,
    magcache_plan,
)
from .config import OptimizationConfig
from .timing import passes_of

if TYPE_CHECKING:
    from ..memory import SystemResources

FEWEST_STEPS = 9
"""With fewer steps each differs too much from the one before: distilled models break."""
DEFAULT_THRESHOLD = 0.05
"""EasyCache's own, with which its authors measured half the steps and a PSNR of 25 dB on Wan 2.1
1.3B at 50 steps."""
DEFAULT_GATE = 0.5
"""With which FastVideo measured 24 % less time and VBench scores within their noise on 4 of 5
dimensions (Wan 2.1 1.3B, FastVideo pull request 1372)."""
DEFAULT_FACTOR = 1.5
"""MagCache's authors measured 1.5 to 2 on Wan 2.2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What an ingredient may look at."""

    architecture: ModelArchitecture
    workload: Workload
    system: SystemResources
    requested: OptimizationConfig
    abilities: frozenset[str]
    attention_times: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Milliseconds of attention that this machine has kept: by shape, then by kernel."""
    timed_beside: str = ""
    """What else was there when they were taken: versions and packages."""


def cache_asked(requested: OptimizationConfig) -> bool:
    """Whether a step cache is asked for by name."""
    return requested.step_cache in ("easycache", "magcache")


def step_cache(situation: Situation, choices: Choices) -> Choices | str:
    """Add EasyCache or MagCache, or say why not."""
    requested = situation.requested
    if requested.step_cache == "never":
        return "step_cache is never"
    reason = _too_few(situation.workload)
    if reason is None and situation.workload.moving_windows:
        reason = "the windows move from step to step, so none has a step before it"
    if reason is not None:
        return reason
    if requested.step_cache == "magcache":
        if situation.architecture.transformer.vace_layers:
            return "MagCache leaves blocks out, and VACE's hints are added between them"
        if _curve(situation) is None:
            return f"no curve of MagCache is published for {situation.architecture.name}"
        if situation.workload.partial_steps:
            return "the curve of MagCache is for all steps of a schedule, and this job makes a part"
        factor = requested.step_cache_factor
        return replace(choices, magcache=DEFAULT_FACTOR if factor is None else factor)
    threshold = requested.step_cache_threshold
    return replace(choices, easycache=DEFAULT_THRESHOLD if threshold is None else threshold)


def _curve(situation: Situation) -> MagCurve | None:
    job = situation.workload
    return magcache_curve(situation.architecture.name, job.width, job.height, job.image)


def _magcache_says(situation: Situation, factor: float) -> str:
    workload, curve = situation.workload, _curve(situation)
    assert curve is not None
    switch = workload.steps if workload.high_steps is None else workload.high_steps
    threshold, skips = magcache_plan(curve, workload.steps, switch, factor)
    return (
        f"MagCache, factor {factor:g}: by its published curve the blocks are computed in "
        f"{computed(skips)} of {2 * workload.steps} passes (threshold {threshold:g}); changes the "
        "video"
    )


def step_cache_says(situation: Situation, before: Choices, after: Choices) -> str:
    """Say what a step cache is expected to save."""
    if after.magcache:
        return _magcache_says(situation, after.magcache)
    workload = situation.workload
    steps, switch = workload.steps, workload.high_steps or 0
    # Of each expert the first ones and the last.
    phases = [count for count in (switch, steps - switch) if count]
    least = sum(min(count, easycache_warm(count) + 1) for count in phases)
    return (
        f"EasyCache, threshold {after.easycache:g}: of {steps} steps {least} or more "
        "are computed; how many depends on the clip, so the seconds do not count on it (its "
        "authors: half at 0.05, of 50); changes the video"
    )


def gate_asked(requested: OptimizationConfig) -> bool:
    """Whether a guidance gate is asked for by its number."""
    return requested.guidance_gate is not None and requested.guidance_gate < 1


def gate(situation: Situation, choices: Choices) -> Choices | str:
    """Add the guidance gate, or say why not."""
    requested, workload = situation.requested, situation.workload
    if requested.guidance_gate == 1:
        return "guidance_gate is 1"
    if 2 not in passes_of(situation.architecture, workload).values():
        return "there is no guidance"
    reason = _too_few(workload)
    if reason is None and workload.moving_windows:
        reason = "the windows move from step to step, so none has a difference of its own"
    if reason is not None:
        return reason
    share = requested.guidance_gate
    return replace(choices, guidance_gate=DEFAULT_GATE if share is None else share)


def gate_says(situation: Situation, before: Choices, after: Choices) -> str:
    """Say how many forwards the gate leaves."""
    workload = situation.workload
    passes = passes_of(situation.architecture, workload).values()
    share = workload.steps / len(passes)
    plain = share * sum(passes)
    fewer = share * sum(1 + after.guidance_gate if each == 2 else each for each in passes)
    return (
        f"guidance gate {after.guidance_gate:g}: about {fewer:.0f} of {plain:.0f} forwards; "
        "changes the video"
    )


def _too_few(workload: Workload) -> str | None:
    if workload.steps >= FEWEST_STEPS:
        return None
    return (
        f"the job has {workload.steps} steps, and with fewer than {FEWEST_STEPS} each differs too "
        "much from the one before"
    )
