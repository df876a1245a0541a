"""The ladder: candidates in tiers, from those that change nothing to those that change most.

The first tier changes no bit of the result. The next ones change rounding only (the VAE in half
precision, then products cut by rows). After them come those that change the video: windows and fp8
storage, in an order that depends on whether the user allowed windows (see ``_tiers``). Within a
tier, every placement is a candidate with its estimate and its time. The planner goes down the
tiers and takes the fastest candidate of the first tier in which any fits. So speed decides within a
tier only: a faster candidate never wins over one that changes less.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import GIB, MemoryEstimate, StageEstimate
from ..errors import InvalidRequest
from ..memory import (
    DRIVING_WAYS,
    STREAM_BUFFERS,
    Choices,
    Workload,
    estimate,
    reserved_bytes,
    spread,
)
from ..models import ModelArchitecture, all_blocks, experts_of, parts_of, stored_of
from .config import OptimizationConfig
from .shortcuts import Situation
from .speed import check_asked, situation_of, with_speed
from .timing import Timing, blocks_that_hide_the_bus, timing

if TYPE_CHECKING:
    from ..memory import SystemResources

ABILITIES: frozenset[str] = frozenset({"lean", "rows", "stream", "fp8"})
"""What a plan may use besides placements: the names of what the renderer can carry out."""
_SPARE = 0.03
"""Share of the free device memory that is left to other programs, whose use may grow."""
_STAGES_OF = {
    "text_encoder": ("text_encode",),
    "image_encoder": ("image_encode",),
    "vae": ("condition_encode", "control_encode", "decode"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The memory that may be used, in bytes; ``why`` names the limits that the user set."""

    device: int
    ram: int
    why: str = ""
    stages: tuple[tuple[str, int], ...] = ()
    """(stage, bytes) of stages in which memory ran out, and which may use no more than this."""
    shared: bool = False
    """Whether the device's memory is the RAM: what a stage needs of both must fit into it."""

    def of_stage(self, name: str) -> int:
        """Return what a stage may use on the device."""
        return min(self.device, dict(self.stages).get(name, self.device))

    def ram_of(self, stage: StageEstimate) -> int:
        """Return the bytes of RAM that a stage needs, with those of a device that shares it."""
        return stage.host_bytes + (stage.device_bytes if self.shared else 0)

    def most_ram_of(self, found: MemoryEstimate) -> int:
        """Return the bytes of RAM that the stage with the highest need takes."""
        return max(map(self.ram_of, found.stages))

    def left_by(self, stage: StageEstimate, choices: Choices, system: SystemResources) -> int:
        """Return what a stage leaves free on the device, below 0 if it does not fit there."""
        left = self.of_stage(stage.name) - reserved_bytes(stage, choices, system)
        return min(left, self.ram - self.ram_of(stage)) if self.shared else left

    @staticmethod
    def of(system: SystemResources, requested: OptimizationConfig) -> Limits:
        """Combine what is free, or can be freed, with the limits that the user set."""
        ram = system.usable_ram_bytes
        on_cpu = system.device_kind == "cpu"
        caps = []
        if requested.ram_limit_gb is not None:
            ram = min(ram, int(requested.ram_limit_gb * GIB))
            caps.append(f"ram_limit_gb is {requested.ram_limit_gb:g}")
        device = ram
        if not on_cpu:
            device = int((system.device_free_bytes + system.evictable_bytes) * (1 - _SPARE))
        if requested.vram_limit_gb is not None:
            device = min(device, int(requested.vram_limit_gb * GIB))
            caps.append(f"vram_limit_gb is {requested.vram_limit_gb:g}")
        why = f" ({', '.join(caps)})" if caps else ""
        return Limits(device=device, ram=ram, why=why, shared=system.shares_ram)

    def admit(self, found: MemoryEstimate) -> bool:
        """Say whether an estimate stays within the limits of device and RAM."""
        within = all(stage.device_bytes <= self.of_stage(stage.name) for stage in found.stages)
        return bool(found.fits) and within and self.most_ram_of(found) <= self.ram


@dataclass(frozen=True, slots=True)
class Candidate:
    """Choices with their estimate and their time; ``tier`` 0 changes no bit of the result."""

    tier: int
    choices: Choices
    estimate: MemoryEstimate
    timing: Timing
    reserved: int
    """Bytes the allocator holds on the device at the peak, including its unused gaps."""
    stage: str
    """The stage in which that peak occurs."""
    plain: Choices
    """The same choices without what was changed for speed."""
    situation: Situation


def ladder(
    architecture: ModelArchitecture, workload: Workload, system: SystemResources,
    requested: OptimizationConfig, limits: Limits, abilities: Collection[str],
) -> Iterator[list[Candidate]]:  # fmt: skip
    """Yield the tiers, each a list of candidates. Of two equally fast ones the simpler is first."""
    if architecture.transformer.animate == 2:
        _check_driven(architecture, requested, abilities)
    main, _ = main_dtype(architecture, workload, system, requested, limits)
    situation = situation_of(architecture, workload, system, requested, abilities)
    # What is changed for speed is changed in every tier; two may then have become the same, of
    # which the first is kept.
    starts: dict[Choices, Choices] = {}
    for plain in _tiers(architecture, workload, system, requested, main, abilities):
        if not starts:
            check_asked(situation, plain)
        starts.setdefault(with_speed(situation, plain), plain)
    changed = any(start != plain for start, plain in starts.items())
    for tier, (start, plain) in enumerate(starts.items(), start=changed):
        candidates = []
        for choices in (
            choices
            for driven in _driven(architecture, start)
            for choices in _placements(
                architecture, workload, system, requested, limits, driven, abilities
            )
        ):
            found = estimate(architecture, workload, choices, system, available=limits.device)
            took = timing(architecture, workload, choices, system, found.stages)
            peak = max((reserved_bytes(s, choices, system), s.name) for s in found.stages)
            without = _changed_back(choices, start, plain)
            candidates.append(Candidate(tier, choices, found, took, *peak, without, situation))
        yield candidates


def _driven(architecture: ModelArchitecture, start: Choices) -> Iterator[Choices]:
    """Yield the ways to keep Animate 2's driving stream, the fastest first: all change no bit.

    Other models have none.
    """
    if architecture.transformer.animate != 2:
        yield start
        return
    for way in DRIVING_WAYS:
        yield replace(start, driving=way, lean=True)


def _check_driven(
    architecture: ModelArchitecture, requested: OptimizationConfig, abilities: Collection[str]
) -> None:
    """Refuse what cannot be had of Animate 2, whose two streams only WanFit's forward computes."""
    title = architecture.variant.title
    if "lean" not in abilities:
        raise InvalidRequest(
            f"{title} needs WanFit's own forward, which does not know how the installed diffusers "
            "computes. Install a diffusers from 0.35 to 0.42.",
            field="forward",
        )
    asked = {"forward": requested.forward == "diffusers", "offload": requested.placement == "group"}
    for field, wrong in asked.items():
        if wrong:
            raise InvalidRequest(
                f"{field} is {'diffusers' if field == 'forward' else 'group'!r}, and the two "
                f"streams of {title} are computed by WanFit's own forward. Set it to auto.",
                field=field,
            )


def _changed_back(choices: Choices, start: Choices, plain: Choices) -> Choices:
    """Return ``choices``, which were placed from ``start``, without what speed made."""
    names = [name for name in Choices.__slots__ if getattr(start, name) != getattr(plain, name)]
    before: dict[str, Any] = {name: getattr(plain, name) for name in names}
    return replace(choices, **before)


def best(candidates: list[Candidate], limits: Limits) -> Candidate | None:
    """Return the candidate with the fastest step among those that fit; the first of equal ones.

    The time to move whole components to the device is left out. It is seconds for a whole run, and
    should not outweigh that a simpler placement is safer.
    """
    fitting = [candidate for candidate in candidates if limits.admit(candidate.estimate)]
    return min(fitting, key=lambda candidate: candidate.timing.step, default=None)


def _tiers(
    architecture: ModelArchitecture, workload: Workload, system: SystemResources,
    requested: OptimizationConfig, main: str, abilities: Collection[str],
) -> Iterator[Choices]:  # fmt: skip
    """Yield the choices that each tier fixes; later tiers change more of the result.

    The outer order is by windows and fp8 storage, which change the video. For each pair of those,
    the choices that change rounding least come first.
    """
    own = architecture.variant.defaults.num_frames
    windows: tuple[int | None, ...] = (None, *requested.fallback_windows(workload, own))
    if architecture.transformer.animate == 2:  # its segments are part of what is asked for
        windows = (None,)
    quantised = [_is_quantised(architecture, expert) for expert in experts_of(architecture)]
    fp8 = requested.fp8_storage == "always" and not all(quantised)
    larger = [(window, fp8) for window in windows]
    plain = not any(quantised)
    if "fp8" in abilities and plain and main != "fp32" and requested.fp8_storage == "auto":
        # Windows that nobody asked for exist only for clips longer than the model's own length. A
        # window of that length is what the model was trained on, so all windows come before fp8. A
        # window length that the user allowed (chunk_size) may be shorter than that, which changes
        # the video more than fp8 does: the whole clip in fp8 is tried first.
        in_fp8 = [(window, True) for window in windows]
        own_first = requested.chunk_size is None
        larger = (
            [*larger, *in_fp8] if own_first else [larger[0], in_fp8[0], *larger[1:], *in_fp8[1:]]
        )
    for window, stored in larger:
        for start in _roundings(architecture, workload, system, requested, main, abilities):
            candidate = replace(start, fp8_storage=stored)
            if window is not None:
                overlap = requested.overlap_for(workload, window)
                candidate = replace(candidate, window_frames=window, window_overlap=overlap)
            yield candidate


def _is_quantised(architecture: ModelArchitecture, expert: str) -> bool:
    stored = stored_of(architecture, expert)
    return stored is not None and stored.quantised


def _roundings(
    architecture: ModelArchitecture, workload: Workload, system: SystemResources,
    requested: OptimizationConfig, main: str, abilities: Collection[str],
) -> Iterator[Choices]:  # fmt: skip
    """Yield the choices that differ in rounding at most, the most exact first."""
    exact = Choices(
        dtypes=_dtypes(architecture, main, "fp32"), window_overlap=workload.window_overlap,
        hints_in_turn="lean" in abilities,
    )  # fmt: skip
    if requested.forward == "lean_rows":
        exact = replace(exact, lean=True, by_rows=True)
    last = exact
    yield exact
    # The decode often needs the most memory, and the VAE in half precision nearly halves it. Not
    # where this torch and cuDNN take many times the memory for convolutions in half precision.
    if main != "fp32" and not system.wasteful_half_conv3d:
        last = replace(exact, dtypes=_dtypes(architecture, main, main))
        yield last
    # Only then rows: besides rounding, they cost time.
    if "rows" in abilities and requested.forward == "auto":
        yield replace(last, lean=True, by_rows=True)


def _placements(
    architecture: ModelArchitecture, workload: Workload, system: SystemResources,
    requested: OptimizationConfig, limits: Limits, start: Choices, abilities: Collection[str],
) -> Iterator[Choices]:  # fmt: skip
    """Yield every placement for the choices that a tier fixes, the simplest first."""
    asked, on_cpu = requested.placement, system.device_kind == "cpu"
    streams = asked == "stream" or (asked == "auto" and "stream" in abilities and not on_cpu)
    if asked == "group":
        yield _in_groups(start)
        return
    leans = _leans(requested, start, abilities)
    for lean in leans:
        candidate = replace(start, lean=lean)
        if asked in ("none", "model", "sequential"):
            yield replace(candidate, offload=asked)
        elif asked == "auto":
            yield replace(candidate, offload="none")
            yield from _one_at_a_time(architecture, workload, system, limits, candidate, streams)
    if streams:
        single = replace(start, offload="model", lean=leans[-1], stream=True)
        streamed = _with_smaller_parts(architecture, workload, system, limits, single, streams)
        yield _fill_with_blocks(architecture, workload, system, requested, limits, streamed)
        if requested.resident_blocks is None and not on_cpu:
            # The least there is: one buffer, so that no copy hides behind compute.
            yield replace(streamed, resident_blocks=0, stream_buffers=1)


def _leans(
    requested: OptimizationConfig, start: Choices, abilities: Collection[str]
) -> tuple[bool, ...]:
    """Return which forwards to try: diffusers' own (False), the lean one (True), or both."""
    if start.by_rows or requested.forward == "lean" or start.driving:
        return (True,)
    if requested.forward == "diffusers" or "lean" not in abilities:
        return (False,)
    return (False, True)


def _in_groups(start: Choices) -> Choices:
    """Return diffusers' group offload, whose hooks the lean forward cannot work with."""
    groups = dict.fromkeys(("transformer", "transformer_2"), "group")
    return replace(start, offload="model", part_offload=groups, lean=False, by_rows=False)


def _one_at_a_time(
    architecture: ModelArchitecture, workload: Workload, system: SystemResources, limits: Limits,
    candidate: Choices, streams: bool,
) -> Iterator[Choices]:  # fmt: skip
    """Yield whole components one at a time, then the transformer layer by layer."""
    single = replace(candidate, offload="model")
    if system.device_kind == "cpu":  # the weights are in RAM anyway: smaller pieces save nothing
        yield single
        return
    smaller = _with_smaller_parts(architecture, workload, system, limits, single, streams)
    yield smaller
    # Layer by layer is slow. Where streaming is possible it is kept for the last resort before fp8.
    if streams and not candidate.by_rows:
        return
    others = {part: smaller.offload_of(part) for part in _STAGES_OF}
    yield replace(smaller, offload="sequential", part_offload=others)


def _with_smaller_parts(
    architecture: ModelArchitecture, workload: Workload, system: SystemResources, limits: Limits,
    choices: Choices, streams: bool,
) -> Choices:  # fmt: skip
    """Split up the components, other than transformers, that do not fit as a whole.

    These components run once: block by block, or layer by layer, costs them seconds in a whole run.
    """
    whole = estimate(architecture, workload, choices, system)
    short = {s.name for s in whole.stages if limits.left_by(s, choices, system) < 0}
    large = [part for part, stages in _STAGES_OF.items() if not short.isdisjoint(stages)]
    pieces = dict.fromkeys(large, "sequential")
    if streams and "text_encoder" in pieces:
        pieces["text_encoder"] = "stream"
    # What is large of a VAE is not the weights but its feature cache. The lean VAE can keep that in
    # RAM, which takes the place of going layer by layer.
    in_ram = choices.lean and pieces.pop("vae", None) is not None
    return replace(choices, part_offload=pieces, cache_in_ram=in_ram)


def _fill_with_blocks(
    architecture: ModelArchitecture, workload: Workload, system: SystemResources,
    requested: OptimizationConfig, limits: Limits, choices: Choices,
) -> Choices:  # fmt: skip
    """Keep as many blocks resident as fit, but no more than are needed to hide the transfers."""
    blocks = [
        all_blocks(architecture, expert, choices.dtypes["transformer"], fp8=choices.fp8_storage)
        for expert in experts_of(architecture)
    ]
    total = len(blocks[0])
    if requested.resident_blocks is not None or system.device_kind == "cpu":
        asked = requested.resident_blocks or 0
        return replace(choices, resident_blocks=min(asked, total))
    # What a denoising stage leaves free without any resident block is what they can take.
    empty = estimate(architecture, workload, replace(choices, resident_blocks=0), system)
    left = min(
        limits.left_by(stage, choices, system)
        for stage in empty.stages
        if stage.name.startswith("denoise")
    )
    # A rate that was measured here says how many it takes to hide the bus. One that was assumed
    # may be wrong by a factor, and memory that stays idle helps nobody: as many as fit, unless
    # somebody asked for streaming.
    useful = total
    if system.calibration.paced or requested.placement == "stream":
        useful = blocks_that_hide_the_bus(architecture, workload, choices, system)
    # At least as many are streamed as there are buffers: with fewer, a buffer would stay empty.
    count = max(0, min(useful, total - STREAM_BUFFERS))
    while count and max(_resident_bytes(sizes, count) for sizes in blocks) > left:
        count -= 1
    return replace(choices, resident_blocks=count)


def _resident_bytes(blocks: Sequence[int], resident: int) -> int:
    return sum(blocks[index] for index in spread(len(blocks), resident))


def _dtypes(architecture: ModelArchitecture, main: str, vae: str) -> dict[str, str]:
    dtypes = dict.fromkeys((*parts_of(architecture), "transformer_2"), main)
    # umT5 overflows fp16: its values need bf16's range.
    dtypes["text_encoder"] = "bf16" if main == "fp16" else main
    return dtypes | {"vae": vae, "image_encoder": "fp32"}


def main_dtype(
    architecture: ModelArchitecture, workload: Workload, system: SystemResources,
    requested: OptimizationConfig, limits: Limits,
) -> tuple[str, str]:  # fmt: skip
    """Return the transformer's dtype and the reason for it."""
    stored = architecture.weight_kind if architecture.weight_kind in ("fp32", "fp16") else "bf16"
    if requested.precision == "stored":
        return stored, f"precision {stored}: as the file stores it"
    if requested.precision != "auto":
        return requested.precision, f"precision {requested.precision}: asked for"
    if system.device_kind != "cpu":
        if stored == "fp16" and system.supports_fp16:
            # As ComfyUI runs such files; a copy in bf16 would round the weights a second time.
            return "fp16", "precision fp16: as the file stores it"
        if system.supports_bf16:
            return "bf16", f"precision bf16: {system.device_name} computes in it natively"
        return "fp16", f"precision fp16: {system.device_name} has no bf16 units"
    wide = Choices(dtypes=_dtypes(architecture, "fp32", "fp32"), offload="model")
    needed = estimate(architecture, workload, wide, system, available=limits.device)
    if needed.fits or stored == "fp32":
        return "fp32", "precision fp32: a CPU is faster and more exact in it"
    return stored, (
        f"precision {stored}, as the file stores it: fp32 would need "
        f"{needed.peak_usage_mb / 1024:.1f} GiB of RAM"
    )
