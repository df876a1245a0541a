"""The passes of a step, and the turns that they take on several cards.

Windows times guidance: these do not wait for each other. Where they leave cards without work in the
last turn, more windows cost no time, and share more frames: an overlap that nobody asked for is
chosen so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from ..job import FRAMES_PER_LATENT, filling_overlap, latent_frames
from ..memory import Choices, estimate
from ..models import ModelArchitecture
from .plan import OptimizationPlan
from .timing import windows_per_step

if TYPE_CHECKING:
    from ..config import MemoryEstimate
    from ..memory import SystemResources, Workload


@dataclass(frozen=True, slots=True)
class Turns:
    """The passes of one step of each expert, and how many turns they take on some cards."""

    units: tuple[int, ...]
    """Those that do not wait for each other."""
    segments: int = 1
    """How many times a step has them: windows that are made one after the other."""

    def turns(self, gangs: int) -> float:
        """Return how many turns a step takes with so many at work, the experts' mean."""
        turns = sum(ceil(units / gangs) for units in self.units)
        return self.segments * turns / len(self.units)

    @property
    def passes(self) -> float:
        """Return the passes of a step, the experts' mean."""
        return self.segments * sum(self.units) / len(self.units)

    @property
    def most(self) -> int:
        return max(self.units)


def turns_of(architecture: ModelArchitecture, workload: Workload, plan: OptimizationPlan) -> Turns:
    """Return the passes of a job's steps."""
    windows = windows_per_step(architecture, workload, plan.choices)
    segments, windows = (windows, 1) if workload.in_turn else (1, windows)
    return Turns(tuple(windows * each for each in passes_of(architecture, workload)), segments)


def passes_of(architecture: ModelArchitecture, workload: Workload) -> list[int]:
    """Return how many passes each expert makes of a window."""
    guided = [workload.guidance_high]
    if architecture.two_experts:
        guided.append(workload.guidance_low)
        names = ("transformer", "transformer_2")
        guided = [g for g, name in zip(guided, names, strict=True) if name not in workload.idle]
    return [2 if one else 1 for one in guided or [True]]


def with_filling_overlap(
    plan: OptimizationPlan, architecture: ModelArchitecture, workload: Workload,
    system: SystemResources, gangs: int, cut: int, available: int | None,
) -> tuple[Choices, MemoryEstimate, str]:  # fmt: skip
    """Return choices, estimate and reason with the longest overlap that costs no turn more.

    There are cards for so many ``gangs`` of ``cut`` cards. The reason is empty where the overlap
    stays as it is: where it was asked for, and where no more windows, or none that memory has room
    for, would fill the cards.
    """
    choices = plan.choices
    unchanged = choices, plan.estimate, ""
    fixed = not workload.overlap_free or workload.moving_windows or workload.in_turn
    if fixed or choices.window_frames is None:
        return unchanged
    total, window = workload.latent_frames, latent_frames(choices.window_frames)
    before = -(-choices.window_overlap // FRAMES_PER_LATENT)
    passes = passes_of(architecture, workload)
    shared = filling_overlap(total, window, before, passes, gangs)
    longer = replace(choices, window_overlap=shared * FRAMES_PER_LATENT)
    found = estimate(architecture, workload, longer, system, available=available)
    if shared == before or (plan.estimate.fits and not found.fits):
        return unchanged
    windows = [1 + -(-(total - window) // (window - each)) for each in (before, shared)]
    who = f"{gangs} cards" if cut == 1 else f"{gangs} gangs of {cut} cards"
    said = (
        f"overlap {before * FRAMES_PER_LATENT} -> {longer.window_overlap} frames: {windows[1]} "
        f"windows instead of {windows[0]} fill {who} in as many turns. Give "
        f"window_overlap {before * FRAMES_PER_LATENT} for the bits of one card"
    )
    return longer, replace(found, warnings=plan.estimate.warnings), said
