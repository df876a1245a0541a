"""Decides how a job is run on this machine: a pure function of model, job, machine and wishes.

A ladder of plans is gone through from the fastest to the smallest; the first that fits is taken,
and every decision comes with its reason in words. Nothing is allocated and no weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .architecture import ModelArchitecture
from .choices import STREAM_BUFFERS
from .config import MemoryEstimate
from .errors import DoesNotFit, InvalidRequest
from .ladder import CARRIED_OUT, Limits, Way, best, ladder, main_dtype
from .memory import GIB, MIB, Choices, Job
from .reasons import reasons_for
from .wishes import SHORTER_WINDOWS, OptimizationConfig

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from .hardware import SystemResources

__all__ = ["OptimizationConfig", "OptimizationManager", "OptimizationPlan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationPlan:
    """How a job is run. ``estimate`` is what it is expected to need when run like this."""

    device: str
    dtypes: Mapping[str, str] = field(hash=False)
    """Per part ("transformer", "transformer_2", "text_encoder", "vae", "image_encoder"): "fp32",
    "bf16" or "fp16"."""
    offload: str
    """How parts are placed: "none", "model" or "sequential"; see ``offload_of`` for one part."""
    estimate: MemoryEstimate
    reasons: tuple[str, ...] = ()
    window_frames: int | None = None
    """Video frames a denoising window holds; None: the whole clip at once."""
    window_overlap: int = 16
    part_offload: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Parts that are placed otherwise than ``offload`` says."""
    resident_blocks: int | None = None
    stream: bool = False
    stream_buffers: int = STREAM_BUFFERS
    """Buffers for streamed blocks: with 2 or more the next arrives while one computes."""
    lean: bool = False
    by_rows: bool = False
    """The lean forward also cuts matrix products (``lean_forward(exact=False)``)."""
    cache_in_ram: bool = False
    """The lean decode's feature cache rests in RAM between uses."""
    fp8_storage: bool = False
    tier: int = 0
    """0 changes no bit of the result; higher tiers change more (see ``reasons``)."""
    step_seconds: float = 0.0
    """Predicted from operations and bus, to compare plans with."""
    seconds: float = 0.0
    pin_limit: int | None = None
    """Most bytes of RAM to page-lock, where the user limits the RAM."""
    paced: bool = False
    """Whether ``step_seconds`` follows the pace of earlier runs on this machine."""
    compute_bound: bool = True
    """Whether a step's transfers hide behind its compute."""

    def offload_of(self, part: str) -> str:
        """Return how one part is placed: "none", "model", "sequential", "stream" or "group"."""
        if self.stream and part.startswith("transformer"):
            return "stream"
        return self.part_offload.get(part, self.offload)

    def pin_bytes(self, budget: int) -> int:
        """Return how much of the machine's budget for page-locked memory may be used."""
        return budget if self.pin_limit is None else min(budget, self.pin_limit)

    def blocks_and_buffers(self, part: str) -> tuple[int, int]:
        """Return how many blocks of a streamed part stay on the device, and the buffers' number."""
        if not part.startswith("transformer"):
            return 0, STREAM_BUFFERS
        return self.resident_blocks or 0, self.stream_buffers

    @property
    def precision(self) -> str:
        """Return the dtype the transformer computes in."""
        return self.dtypes["transformer"]

    @property
    def applied(self) -> tuple[str, ...]:
        """Return what was chosen, in short words for a report."""
        words = [f"precision {self.precision}", f"vae {self.dtypes['vae']}"]
        words.append(f"offload {self.offload}")
        words += [f"{part} {how}" for part, how in self.part_offload.items() if how != "model"]
        if self.stream:
            words.append(f"{self.resident_blocks} blocks resident, the rest streamed")
            words += ["one at a time"] * (self.stream_buffers == 1)
        words += ["lean forward"] * self.lean + ["products by rows"] * self.by_rows
        words += ["decode's cache in RAM"] * self.cache_in_ram
        words += ["fp8 storage"] * self.fp8_storage
        if self.window_frames is not None:
            words.append(f"windows of {self.window_frames} frames, {self.window_overlap} shared")
        return tuple(words)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        kept = ("dtypes", "part_offload", "estimate", "reasons")
        names = [name for name in self.__slots__ if name not in kept]
        plain: dict[str, Any] = {name: getattr(self, name) for name in names}
        return plain | {
            "dtypes": dict(self.dtypes),
            "part_offload": dict(self.part_offload),
            "reasons": list(self.reasons),
            "estimate": self.estimate.to_dict(),
        }


_MOST_FRAMES = 1025
"""Longest clip ``what_fits`` looks at."""


class OptimizationManager:
    """Looks at the machine and recommends a plan.

    ``abilities`` says what the plan may use beside placements, because it can be carried out:
    "lean" and "rows" (the lean forward), "stream" (blocks), "fp8" (storage).
    """

    def __init__(self, abilities: Collection[str] = CARRIED_OUT) -> None:
        self.abilities = frozenset(abilities)

    def analyze_system_resources(
        self, device: str | None = None, *, evictable_bytes: int = 0, ram_evictable_bytes: int = 0
    ) -> SystemResources:
        """Return what this machine has; see ``hardware.system_resources``."""
        from .hardware import system_resources

        return system_resources(
            device, evictable_bytes=evictable_bytes, ram_evictable_bytes=ram_evictable_bytes
        )

    def recommend_optimizations(
        self,
        architecture: ModelArchitecture,
        job: Job,
        system: SystemResources,
        requested: OptimizationConfig | None = None,
    ) -> OptimizationPlan:
        """Return the fastest plan that fits and that ``requested`` allows.

        A choice the user made is kept. Raises DoesNotFit with the bytes needed and available and
        the largest clip that would fit; InvalidRequest where the device has less than
        ``min_vram_mb``.
        """
        wishes = requested or OptimizationConfig()
        wishes.check_device(system)
        limits = Limits.of(system, wishes)
        weighed: list[Way] = []
        for ways in ladder(architecture, job, system, wishes, limits, self.abilities):
            chosen = best(ways, limits)
            if chosen is not None:
                return _plan(architecture, job, system, wishes, limits, chosen, ways)
            weighed += ways
        smallest = _smallest(weighed, limits)
        if not _obeyed(smallest.estimate, system, wishes):
            raise self._does_not_fit(architecture, job, system, wishes, smallest, limits)
        told = replace(smallest, estimate=_with_warning(smallest.estimate, limits))
        return _plan(architecture, job, system, wishes, limits, told, [])

    def estimate(
        self,
        architecture: ModelArchitecture,
        job: Job,
        system: SystemResources,
        requested: OptimizationConfig | None = None,
    ) -> MemoryEstimate:
        """Return what the recommended plan needs; where none fits, the smallest one's needs.

        Like ``recommend_optimizations``, but a job that does not fit is an estimate with
        ``fits`` False and the explanation among its warnings.
        """
        try:
            return self.recommend_optimizations(architecture, job, system, requested).estimate
        except DoesNotFit as error:
            wishes = requested or OptimizationConfig()
            limits = Limits.of(system, wishes)
            tiers = ladder(architecture, job, system, wishes, limits, self.abilities)
            least = _smallest([way for ways in tiers for way in ways], limits).estimate
            return replace(least, fits=False, warnings=(*least.warnings, str(error)))

    def apply_memory_optimizations(
        self, module: Any, plan: OptimizationPlan, component: str = "transformer"
    ) -> AbstractContextManager[str | None]:
        """Have a diffusers or transformers module of your own compute as ``plan`` says.

        For a ``with`` block; ``WanPipelineWrapper.generate`` does this for each stage.
        ``component`` is the module's name in the plan ("transformer_2", "text_encoder", "vae").
        Yields None, or what could not be carried out. The dtype is the module's own, and
        ``fp8_storage`` and windows are not put on: the first belongs to loading, the second to the
        loop. Raises InvalidRequest for a component that the plan does not name.
        """
        # Here, not above: planning works where torch cannot be imported.
        from .placement import carried_out

        if component not in plan.dtypes:
            raise InvalidRequest(
                f"component is {component!r}; the plan has {', '.join(plan.dtypes)}.",
                field="component",
            )
        return carried_out(module, component, plan)

    def smaller_plan(
        self,
        architecture: ModelArchitecture,
        job: Job,
        system: SystemResources,
        requested: OptimizationConfig,
        current: OptimizationPlan,
        stage: str,
    ) -> OptimizationPlan | None:
        """Return the fastest plan whose ``stage`` needs less than ``current``'s, or None.

        For a run that ran out of memory in ``stage`` and goes on from there: the transformers'
        dtype and the windows stay, and a placement the user chose is given up rather than the
        render. Reality was above the estimate, so a tenth less than the estimate is aimed at.
        """
        forward = "auto" if requested.forward in ("diffusers", "lean") else requested.forward
        wishes = replace(requested, offload="auto", resident_blocks=None, forward=forward)
        limits = Limits.of(system, wishes)
        most = _stage_bytes(current.estimate, stage)
        limits = replace(limits, stages=((stage, int(most * 0.9)),))
        for ways in ladder(architecture, job, system, wishes, limits, self.abilities):
            less = [
                way
                for way in ways
                if _goes_on(way.choices, job, current)
                and _stage_bytes(way.estimate, stage) < most
                and way.estimate.host_ram_mb * MIB <= limits.ram
            ]
            chosen = best(less, limits) or min(less, key=lambda way: way.timing.step, default=None)
            if chosen is not None:
                return _plan(architecture, job, system, wishes, limits, chosen, less)
        return None

    def what_fits(
        self,
        architecture: ModelArchitecture,
        job: Job,
        system: SystemResources,
        requested: OptimizationConfig | None = None,
    ) -> str:
        """Name the longest clip of the job's size and the largest size of its length that fit.

        Looks at up to 1,025 frames and at up to four times the width.
        """
        wishes = requested or OptimizationConfig()
        fits = self._fits(architecture, system, wishes, Limits.of(system, wishes))
        long = longest(replace(job, num_frames=_MOST_FRAMES), fits)
        multiple = architecture.size_multiple
        wide = replace(job, width=4 * job.width + multiple, height=4 * job.height)
        size = largest_size(wide, multiple, fits)
        found = [] if long is None else [f"{_frames(long)} at {job.width}x{job.height}"]
        if size is not None:
            found.append(f"{_frames(job.num_frames)} at {size[0]}x{size[1]}")
        return f"At most {' or '.join(found)}." if found else "No length or size fits."

    def _fits(
        self,
        architecture: ModelArchitecture,
        system: SystemResources,
        wishes: OptimizationConfig,
        limits: Limits,
    ) -> Callable[[Job], bool]:
        def fits(job: Job) -> bool:
            tiers = ladder(architecture, job, system, wishes, limits, self.abilities)
            return any(best(ways, limits) is not None for ways in tiers)

        return fits

    def _does_not_fit(
        self, architecture: ModelArchitecture, job: Job, system: SystemResources,
        wishes: OptimizationConfig, smallest: Way, limits: Limits,
    ) -> DoesNotFit:  # fmt: skip
        fits = self._fits(architecture, system, wishes, limits)
        needed, there = smallest.reserved, limits.device
        where = "RAM" if system.device_kind == "cpu" else system.device_name
        if needed <= there:  # it is the RAM that is short
            needed, there = int(smallest.estimate.host_ram_mb * MIB), limits.ram
            where = "RAM"
        title = architecture.variant.title
        return DoesNotFit(
            f"{_frames(job.num_frames)} of {job.width}x{job.height} with {title} need "
            f"{needed / GIB:.1f} GiB (stage {smallest.stage}) in the smallest way there is, and "
            f"{there / GIB:.1f} GiB of {where} can be used{limits.why}. "
            + largest_that_fits(job, architecture.size_multiple, fits)
            + _windows_that_fit(job, fits),
            needed_bytes=needed,
            available_bytes=there,
        )


def _stage_bytes(found: MemoryEstimate, stage: str) -> int:
    """Bytes a stage takes on the device; a stage the estimate does not name counts as the peak."""
    named = {known.name: known.device_bytes for known in found.stages}
    return named.get(stage, max(named.values(), default=0))


def _goes_on(choices: Choices, job: Job, current: OptimizationPlan) -> bool:
    """Say whether steps made as ``choices`` say belong to the video that ``current`` began."""
    same = choices.dtypes["transformer"] == current.dtypes["transformer"]
    same = same and choices.fp8_storage == current.fp8_storage
    # What rounds otherwise is taken once, and kept: back and forth would equal neither way.
    same = same and choices.by_rows >= current.by_rows
    same = same and (choices.dtypes["vae"] != "fp32" or current.dtypes["vae"] == "fp32")
    return same and (choices.window_frames or job.window_frames) == current.window_frames


def _smallest(ways: list[Way], limits: Limits) -> Way:
    """Return the way that comes closest to fitting: first within the device, then the RAM."""
    return min(
        ways,
        key=lambda way: (max(way.reserved, limits.device), way.estimate.host_ram_mb),
    )


def _obeyed(found: MemoryEstimate, system: SystemResources, wishes: OptimizationConfig) -> bool:
    """Say whether a placement that was asked for is tried although it seems not to fit.

    An estimate can be wrong by less than what others hold on the device; beyond the device's
    own size, or a cap, there is nothing to try.
    """
    if wishes.placement == "auto" or wishes.vram_limit_gb or wishes.ram_limit_gb:
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
    architecture: ModelArchitecture, job: Job, system: SystemResources,
    wishes: OptimizationConfig, limits: Limits, way: Way, others: list[Way],
) -> OptimizationPlan:  # fmt: skip
    choices = way.choices
    _, precision = main_dtype(architecture, job, system, wishes, limits)
    why = reasons_for(architecture, job, system, wishes, limits, way, others)
    reasons = (precision, *why)
    return OptimizationPlan(
        device=system.device,
        dtypes=MappingProxyType(dict(choices.dtypes)),
        offload=choices.offload,
        part_offload=MappingProxyType(dict(choices.part_offload)),
        estimate=replace(way.estimate, reasons=reasons),
        reasons=reasons,
        window_frames=choices.window_frames or job.window_frames,
        window_overlap=choices.window_overlap,
        resident_blocks=choices.resident_blocks,
        stream=choices.stream,
        stream_buffers=choices.stream_buffers,
        lean=choices.lean,
        by_rows=choices.by_rows,
        cache_in_ram=choices.cache_in_ram,
        fp8_storage=choices.fp8_storage,
        tier=way.tier,
        step_seconds=way.timing.step,
        seconds=way.timing.total,
        compute_bound=way.timing.compute_bound,
        paced=system.calibration.paced,
        pin_limit=None if wishes.ram_limit_gb is None else limits.ram,
    )


def largest_that_fits(job: Job, multiple: int, fits: Callable[[Job], bool]) -> str:
    """Name the longest clip of this size and the largest size of this length that fit.

    ``fits(job)`` must be monotone: a shorter or smaller job never needs more.
    """
    frames, size = longest(job, fits), largest_size(job, multiple, fits)
    found = [] if frames is None else [f"{_frames(frames)} at {job.width}x{job.height}"]
    if size is not None:
        found.append(f"{_frames(job.num_frames)} at {size[0]}x{size[1]}")
    if not found:
        return "No length or size of this model fits; free memory or take a smaller model."
    return f"What would fit: {' or '.join(found)}."


def longest(job: Job, fits: Callable[[Job], bool]) -> int | None:
    """Return the most frames, 4n+1 and at most the job's, that fit at its size; None: not one."""
    if not fits(replace(job, num_frames=1)):
        return None
    low, high = 0, (job.num_frames - 1) // 4  # latent frames after the first
    while low < high:
        middle = (low + high + 1) // 2
        if fits(replace(job, num_frames=4 * middle + 1)):
            low = middle
        else:
            high = middle - 1
    return 4 * low + 1


def largest_size(job: Job, multiple: int, fits: Callable[[Job], bool]) -> tuple[int, int] | None:
    """Return the largest (width, height) below the job's, in its proportions, that fits."""
    sizes = [
        (width, max(multiple, round(width * job.height / job.width / multiple) * multiple))
        for width in range(job.width - multiple, multiple - 1, -multiple)
    ]
    first, last = 0, len(sizes)
    while first < last:
        middle = (first + last) // 2
        width, height = sizes[middle]
        if fits(replace(job, width=width, height=height)):
            last = middle
        else:
            first = middle + 1
    return sizes[first] if first < len(sizes) else None


def _windows_that_fit(job: Job, fits: Callable[[Job], bool]) -> str:
    """Name the longest windows in which the whole clip would fit, if any would."""
    for frames in (81, *SHORTER_WINDOWS):
        if frames < (job.window_frames or job.num_frames):
            overlap = min(job.window_overlap, (frames - 1) // 2)
            if fits(replace(job, window_frames=frames, window_overlap=overlap)):
                return (
                    f" In windows of {frames} frames all {job.num_frames} would fit: "
                    f"max_chunk_size or --window {frames}, in ComfyUI WanChunkedSampler."
                )
    return ""


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"
