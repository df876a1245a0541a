"""The planner: chooses a candidate from the ladder and says why.

A plan is a pure function of the model, the workload, the machine and what the user asked for. The
ladder is gone down tier by tier; the fastest candidate of the first tier in which any fits is
taken. Every decision comes with its reason in words. Nothing is allocated and no weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..config import GIB, MIB, MemoryEstimate
from ..errors import DoesNotFit
from ..memory import Choices, Workload
from ..memory import estimate as estimate_of
from ..models import ModelArchitecture
from .cards import spread_over
from .config import OptimizationConfig
from .fits import (
    NOTHING,
    Remedies,
    file_cure,
    fp8_cure,
    frames_text,
    more_ram,
    most_that_fits,
    remedies,
    smaller_that_fits,
    windows_that_fit,
)
from .ladder import ABILITIES, Candidate, Limits, best, ladder, main_dtype
from .plan import OptimizationPlan
from .reasons import reasons_for, wishes_without_effect
from .strips import with_strips

if TYPE_CHECKING:
    from ..memory import SystemResources


class Planner:
    """Looks at the machine and recommends a plan.

    ``abilities`` names what plans may use besides placements: "lean" (the lean forward), "rows"
    (products cut by rows in it), "stream" (blocks) and "fp8" (storage). It is all of them unless
    whoever carries out the plan cannot do some. "wide norms", which is not among them, says that
    the norms of a VAE in half precision compute in float32.
    """

    def __init__(self, abilities: Collection[str] = ABILITIES) -> None:
        self.abilities = frozenset(abilities)

    def _possible(self, requested: OptimizationConfig | None) -> OptimizationConfig:
        """Return what is asked for, without a forward that cannot be carried out."""
        requested = requested or OptimizationConfig()
        if "lean" not in self.abilities and requested.forward in ("lean", "lean_rows"):
            return replace(requested, forward="diffusers")
        return requested

    def analyze_system_resources(
        self, device: str | None = None, *, evictable_bytes: int = 0, ram_evictable_bytes: int = 0
    ) -> SystemResources:
        """Return what this machine has; see ``memory.system_resources``."""
        from ..memory import system_resources

        return system_resources(
            device, evictable_bytes=evictable_bytes, ram_evictable_bytes=ram_evictable_bytes
        )

    def recommend_optimizations(
        self,
        architecture: ModelArchitecture,
        workload: Workload,
        system: SystemResources,
        requested: OptimizationConfig | None = None,
    ) -> OptimizationPlan:
        """Return the fastest plan that fits and that ``requested`` allows.

        What the user asked for is kept. A placement that was asked for is even tried where the
        estimate says that it does not quite fit; the plan's estimate then carries a warning. Raises
        DoesNotFit with the bytes needed and available and the largest clip that would fit, and
        InvalidRequest if the device has less memory than ``min_vram_mb``.
        """
        plan, smallest = self._planned(architecture, workload, system, requested)
        if plan is not None:
            return plan
        requested = self._possible(requested)
        limits = Limits.of(system, requested)
        raise self._does_not_fit(architecture, workload, system, requested, smallest, limits)

    def foresee(
        self,
        architecture: ModelArchitecture,
        workload: Workload,
        system: SystemResources,
        requested: OptimizationConfig | None = None,
    ) -> tuple[OptimizationPlan | None, MemoryEstimate]:
        """Return the recommended plan and its estimate; without one, that of the smallest way.

        Like ``estimate``, but quicker where nothing fits: nothing is looked for that would.
        """
        plan, smallest = self._planned(architecture, workload, system, requested)
        if plan is not None:
            return plan, plan.estimate
        return None, replace(smallest.estimate, fits=False)

    def _planned(
        self, architecture: ModelArchitecture, workload: Workload, system: SystemResources,
        requested: OptimizationConfig | None, current: OptimizationPlan | None = None,
    ) -> tuple[OptimizationPlan | None, Candidate]:  # fmt: skip
        """Return the plan, or None and the candidate that comes closest to fitting.

        With ``current`` only a plan counts that goes on with a render begun with that.
        """
        requested = self._possible(requested)
        requested.check_device(system)
        limits = Limits.of(system, requested)
        weighed: list[Candidate] = []
        others: list[Candidate] = []
        for candidates in ladder(architecture, workload, system, requested, limits, self.abilities):
            ours = candidates
            if current is not None:
                ours = [c for c in candidates if _goes_on(c.choices, workload, current)]
            chosen = best(ours, limits)
            if chosen is not None:
                found = (architecture, workload, system, requested, limits, chosen, ours)
                return _plan(*found, "lean" in self.abilities), chosen
            weighed += ours
            others += candidates
        # No tier has a candidate that fits.
        smallest = _smallest(weighed or others, limits)
        if not weighed or not _obeyed(smallest.estimate, system, requested):
            return None, smallest
        told = replace(smallest, estimate=_with_warning(smallest.estimate, limits))
        lean = "lean" in self.abilities
        return _plan(architecture, workload, system, requested, limits, told, [], lean), told

    def remedies(
        self,
        architecture: ModelArchitecture,
        workload: Workload,
        system: SystemResources,
        requested: OptimizationConfig | None = None,
    ) -> Remedies:
        """Return what of a workload that does not fit could be made smaller, and to what."""
        requested = self._possible(requested)
        fits = self._fits(architecture, system, requested, Limits.of(system, requested))
        return remedies(workload, architecture.size_multiple, fits)

    def estimate(
        self,
        architecture: ModelArchitecture,
        workload: Workload,
        system: SystemResources,
        requested: OptimizationConfig | None = None,
    ) -> MemoryEstimate:
        """Return the estimate of the recommended plan, or of the smallest one if none fits.

        Like ``recommend_optimizations``, but instead of raising DoesNotFit it returns an estimate
        with ``fits`` False and the explanation among its warnings.
        """
        try:
            return self.recommend_optimizations(architecture, workload, system, requested).estimate
        except DoesNotFit as error:
            requested = self._possible(requested)
            limits = Limits.of(system, requested)
            tiers = ladder(architecture, workload, system, requested, limits, self.abilities)
            least = _smallest(
                [candidate for candidates in tiers for candidate in candidates], limits
            ).estimate
            return replace(least, fits=False, warnings=(*least.warnings, str(error)))

    def smaller_plan(
        self,
        architecture: ModelArchitecture,
        workload: Workload,
        system: SystemResources,
        requested: OptimizationConfig,
        current: OptimizationPlan,
        stage: str,
    ) -> OptimizationPlan | None:
        """Return the fastest plan whose ``stage`` needs less than that of ``current``, or None.

        For a render that ran out of memory in ``stage`` and goes on from there. The transformers'
        dtype and the windows stay as they are. A placement that the user asked for is given up,
        because otherwise the render would be lost. As more was needed than estimated, the new
        plan's estimate should be a tenth below the old one.
        """
        requested = self._possible(requested)
        forward = "auto" if requested.forward in ("diffusers", "lean") else requested.forward
        requested = replace(requested, offload="auto", resident_blocks=None, forward=forward)
        limits = Limits.of(system, requested)
        before = current.estimate
        if system.device_kind == "cpu":  # with what the process holds by now, as in all others
            before = estimate_of(architecture, workload, current.choices, system)
        most = _stage_bytes(before, stage)
        if stage == "decode":  # without strips by now
            most = max(most, current.decode_whole_bytes)
        limits = replace(limits, stages=((stage, int(most * 0.9)),))
        for candidates in ladder(architecture, workload, system, requested, limits, self.abilities):
            less = [
                candidate
                for candidate in candidates
                if _goes_on(candidate.choices, workload, current)
                and _stage_bytes(candidate.estimate, stage) < most
                and limits.most_ram_of(candidate.estimate) <= limits.ram
            ]
            # Better a plan that is only a little smaller than none: it may be enough.
            chosen = best(less, limits) or min(
                less, key=lambda candidate: candidate.timing.step, default=None
            )
            if chosen is not None:
                lean = "lean" in self.abilities
                found = _plan(architecture, workload, system, requested, limits, chosen, less, lean)
                shared = current.choices.window_overlap
                shares = found.shared_weights and current.gang > 1
                found = replace(
                    found, workers=current.workers, gang=current.gang, shared_weights=shares,
                    decode_strips=min(found.decode_strips, current.decode_strips),
                )  # fmt: skip
                return found.with_choices(window_overlap=shared, dtypes=_dtypes(found, current))
        return None

    def plan_alone(
        self, architecture: ModelArchitecture, workload: Workload, system: SystemResources,
        requested: OptimizationConfig, current: OptimizationPlan,
    ) -> OptimizationPlan:  # fmt: skip
        """Return the plan by which one process goes on with a render that its workers have begun.

        ``requested`` asks for one card. Windows, overlap, dtypes and what else decides bits stay as
        they are in ``current``. Raises DoesNotFit.
        """
        plan, smallest = self._planned(architecture, workload, system, requested, current)
        if plan is None:
            limits = Limits.of(system, self._possible(requested))
            raise self._does_not_fit(architecture, workload, system, requested, smallest, limits)
        shared = current.choices.window_overlap
        return plan.with_choices(window_overlap=shared, dtypes=_dtypes(plan, current))

    def what_fits(
        self,
        architecture: ModelArchitecture,
        workload: Workload,
        system: SystemResources,
        requested: OptimizationConfig | None = None,
    ) -> str:
        """Name the longest clip of the workload's size and the largest size of its length that fit.

        Everything that a job may ask for is tried.
        """
        requested = self._possible(requested)
        fits = self._fits(architecture, system, requested, Limits.of(system, requested))

        def windows(job: Workload) -> int | None:
            plan = self.recommend_optimizations(architecture, job, system, requested)
            return plan.choices.window_frames

        return most_that_fits(workload, architecture.size_multiple, fits, windows)

    def _fits(
        self,
        architecture: ModelArchitecture,
        system: SystemResources,
        requested: OptimizationConfig,
        limits: Limits,
    ) -> Callable[[Workload], bool]:
        def fits(workload: Workload) -> bool:
            tiers = ladder(architecture, workload, system, requested, limits, self.abilities)
            return any(best(candidates, limits) is not None for candidates in tiers)

        return fits

    def _does_not_fit(
        self, architecture: ModelArchitecture, workload: Workload, system: SystemResources,
        requested: OptimizationConfig, smallest: Candidate, limits: Limits,
    ) -> DoesNotFit:  # fmt: skip
        fits = self._fits(architecture, system, requested, limits)
        needed, there, stage = smallest.reserved, limits.device, smallest.stage
        where = "RAM" if system.device_kind == "cpu" else system.device_name
        ram_is_short = needed <= there
        if ram_is_short:
            most = max(smallest.estimate.stages, key=limits.ram_of)
            needed, there, where, stage = limits.ram_of(most), limits.ram, "RAM", most.name
        title = architecture.variant.title
        cures = []
        # A device in the RAM is short of either, and a CPU of what it was allowed of it.
        if where == "RAM" and not limits.shared and there == limits.ram:

            def fits_with(other: ModelArchitecture) -> bool:
                return self._fits(other, system, requested, limits)(workload)

            cures = [
                *file_cure(workload, fits), *fp8_cure(architecture, stage, fits_with),
                *more_ram(system, requested.ram_limit_gb, needed),
            ]  # fmt: skip
        if not cures or stage in ("decode", "output"):
            cures += smaller_that_fits(workload, architecture.size_multiple, fits)
        return DoesNotFit(
            f"{frames_text(workload.num_frames)} of {workload.width}x{workload.height} with "
            f"{title} need {needed / GIB:.1f} GiB (stage {stage}) in the smallest way "
            f"there is, and {there / GIB:.1f} GiB of {where} can be used{limits.why}. "
            + (" ".join(cures) or NOTHING)
            + windows_that_fit(workload, fits)
            + "".join(f" {note[:1].upper()}{note[1:]}." for note in system.notes),
            needed_bytes=needed,
            available_bytes=there,
        )


def _stage_bytes(found: MemoryEstimate, stage: str) -> int:
    """Return the device bytes of a stage, or the peak if the estimate does not name the stage."""
    named = {known.name: known.device_bytes for known in found.stages}
    return named.get(stage, max(named.values(), default=0))


def _goes_on(choices: Choices, workload: Workload, current: OptimizationPlan) -> bool:
    """Say whether ``choices`` can continue the render that was begun with ``current``."""
    same = choices.dtypes["transformer"] == current.choices.dtypes["transformer"]
    same = same and choices.fp8_storage == current.choices.fp8_storage
    same = same and choices.easycache == current.choices.easycache
    same = same and choices.magcache == current.choices.magcache
    same = same and choices.guidance_gate == current.choices.guidance_gate
    # Choices that round differently may be taken up but not given up again. Going back and forth
    # would give a result that no uninterrupted render can give.
    same = same and choices.by_rows >= current.choices.by_rows
    same = same and (choices.dtypes["vae"] != "fp32" or current.choices.dtypes["vae"] == "fp32")
    return (
        same and (choices.window_frames or workload.window_frames) == current.choices.window_frames
    )


def _dtypes(plan: OptimizationPlan, current: OptimizationPlan) -> dict[str, str]:
    """Return a plan's dtypes for going on with ``current``'s render.

    From fp16, whose range did not hold, a VAE goes on in bf16, which is as small, and never back.
    """
    found = dict(plan.choices.dtypes)
    back = found["vae"] == "fp16" and current.choices.dtypes["vae"] == "bf16"
    return found | {"vae": "bf16"} if back else found


def _smallest(candidates: list[Candidate], limits: Limits) -> Candidate:
    """Return the candidate that comes closest to fitting: first on the device, then in RAM."""
    return min(
        candidates,
        key=lambda candidate: (
            max(candidate.reserved, limits.device),
            limits.most_ram_of(candidate.estimate),
        ),
    )


def _obeyed(found: MemoryEstimate, system: SystemResources, requested: OptimizationConfig) -> bool:
    """Say whether to try a placement that the user asked for although it seems not to fit.

    The estimate may be too high, or other programs may free memory meanwhile. But what is above the
    size of the device, or above a limit that the user set, cannot succeed.
    """
    if requested.placement == "auto" or requested.vram_limit_gb or requested.ram_limit_gb:
        return False
    return found.peak_usage_mb * MIB <= system.device_total_bytes


def _with_warning(found: MemoryEstimate, limits: Limits) -> MemoryEstimate:
    text = (
        f"{found.peak_usage_mb / 1024:.1f} GiB are expected to be needed and "
        f"{limits.device / GIB:.1f} GiB can be used; run all the same because the offload was "
        "asked for. Choose offload 'auto' if memory runs out."
    )
    return replace(found, fits=False, warnings=(*found.warnings, text))


def _plan(
    architecture: ModelArchitecture, workload: Workload, system: SystemResources,
    requested: OptimizationConfig, limits: Limits, candidate: Candidate, others: list[Candidate],
    lean: bool,
) -> OptimizationPlan:  # fmt: skip
    choices = candidate.choices
    _, precision = main_dtype(architecture, workload, system, requested, limits)
    why = reasons_for(architecture, workload, system, requested, limits, candidate, others)
    reasons = (precision, *why)
    windows = choices.window_frames or workload.window_frames
    found = OptimizationPlan(
        device=system.device,
        choices=replace(
            choices,
            dtypes=MappingProxyType(dict(choices.dtypes)),
            part_offload=MappingProxyType(dict(choices.part_offload)),
            window_frames=windows,
        ),
        estimate=replace(
            candidate.estimate,
            reasons=reasons,
            warnings=(
                *candidate.estimate.warnings,
                *wishes_without_effect(requested, architecture, system, choices),
            ),
        ),
        reasons=reasons,
        tier=candidate.tier,
        step_seconds=candidate.timing.step,
        seconds=candidate.timing.total,
        cold_seconds=candidate.timing.cold,
        stage_seconds=candidate.timing.stages,
        compute_bound=candidate.timing.compute_bound,
        paced=system.calibration.paced,
        pin_limit=None if requested.ram_limit_gb is None else limits.ram,
        forward_asked=requested.forward != "auto",
    )
    found = spread_over(
        found, architecture, workload, system, requested, lean=lean, available=limits.device
    )
    return with_strips(found, architecture, workload, system, requested, lean=lean)
