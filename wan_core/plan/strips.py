"""Whether a clip is decoded in strips by the workers that have made it, and what that saves.

A strip costs more than its share: the decoder's global part is computed by every card, and margins
by two. Kernels for other shapes may round otherwise, so it belongs to the tier of rounding, unless
a trial at that shape has shown equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..config import GIB, MIB, MemoryEstimate
from ..memory import (
    BANDS,
    Choices,
    Strip,
    Trial,
    estimate,
    latent_size,
    lean_decode_bytes,
    strips_cost,
    strips_of,
)
from ..models import BYTES, ModelArchitecture, VaeShape
from .config import OptimizationConfig
from .gangs import machine
from .plan import OptimizationPlan
from .stage_seconds import decode_seconds, decoded_in, mp4_seconds

if TYPE_CHECKING:
    from ..memory import SystemResources, Workload

_SHARED = 1e9
"""Bytes per second of finished pictures to the driver, through memory that both map, while the next
are decoded. Assumed: two H200s delivered 0.64e9 and were not held up by it."""
_STRIPS_SECONDS = 0.15
"""Until the first pictures are there: 0.11 to 0.22 s on two H200s (``many_2_nvidia_h200.md``)."""
_TRIED_ON = ("cuda",)
"""Where a trial is made: processes on a CPU share its cores, so that strips save nothing there."""
_GAIN = 0.95
"""The share of the whole decode's seconds below which strips are worth it: rates are uncertain."""


def with_strips(
    plan: OptimizationPlan,
    architecture: ModelArchitecture,
    workload: Workload,
    system: SystemResources,
    requested: OptimizationConfig,
    *,
    lean: bool,
) -> OptimizationPlan:
    """Return the plan with its decode shared out in strips over its workers, where that pays.

    With speed "exact" only where a trial has shown equal bits. ``lean`` says whether the lean
    decoder, which is the one that can make a strip, may be used.
    """
    choices = plan.choices
    possible = choices.lean or (lean and requested.forward == "auto")
    if len(plan.workers) < 2 or not possible or "vae" in workload.idle:
        return plan
    choices = replace(choices, lean=True)  # the same bits
    if not choices.lean_vae or architecture.transformer.animate is not None:
        return plan
    exact, chosen, untried = requested.speed == "exact", None, None
    for cards in range(2, len(plan.workers) + 1):
        found = strips_forecast(architecture, workload, choices, system, cards)
        best = _GAIN * found.whole_seconds if chosen is None else chosen.seconds
        if found.seconds >= best or (exact and found.trial is not None and not found.trial.equal):
            continue
        if exact and found.trial is None:
            untried = found
        else:
            chosen = found
    if chosen is None:
        return _with_trial(plan, system, untried)
    before, after = chosen.whole_seconds, chosen.seconds
    # x264 has less of the decode to hide behind.
    saved = before - after + mp4_seconds(workload, before) - mp4_seconds(workload, after)
    whole, shown = _shown_for_a_card(plan.estimate, chosen)
    reasons = (*plan.reasons[:-1], chosen.reason, *plan.reasons[-1:])  # the last is of the cards
    return replace(
        plan,
        choices=choices,
        decode_strips=chosen.count,
        decode_peak_bytes=chosen.peak_bytes,
        decode_whole_bytes=whole,
        card_peak_bytes=max(plan.card_peak_bytes, chosen.peak_bytes),
        seconds=plan.seconds - saved,
        cold_seconds=plan.cold_seconds - saved,
        stage_seconds=decoded_in(plan.stage_seconds, workload, before, after),
        reasons=reasons,
        estimate=replace(shown, reasons=reasons),
    )


def _shown_for_a_card(found: MemoryEstimate, strips: StripsForecast) -> tuple[int, MemoryEstimate]:
    """Return what the decode needs on one card, and the estimate with what a card of several does.

    The peak of the render is that of its largest stage, which may be another one then.
    """
    decode = next(stage for stage in found.stages if stage.name == "decode")
    weights = min(decode.weights_bytes, strips.peak_bytes)
    part = replace(
        decode, device_bytes=strips.peak_bytes, weights_bytes=weights,
        activation_bytes=strips.peak_bytes - weights,
        note="; ".join(filter(None, (decode.note, f"the largest of {strips.count} strips"))),
    )  # fmt: skip
    stages = tuple(part if stage is decode else stage for stage in found.stages)
    before, now = (max(one, key=lambda stage: stage.device_bytes) for one in (found.stages, stages))
    less = (before.device_bytes - now.device_bytes) / MIB
    fewer = (before.weights_bytes - now.weights_bytes) / MIB
    return decode.device_bytes, replace(
        found, stages=stages,
        base_model_mb=found.base_model_mb - fewer,
        generation_overhead_mb=found.generation_overhead_mb - less + fewer,
        total_estimated_mb=found.total_estimated_mb - less,
        peak_usage_mb=found.peak_usage_mb - less,
    )  # fmt: skip


def _with_trial(
    plan: OptimizationPlan, system: SystemResources, untried: StripsForecast | None
) -> OptimizationPlan:
    """Return the plan with a trial of strips after its decode, where one is worth it."""
    if untried is None or system.device_kind not in _TRIED_ON or not plan.choices.lean:
        return plan
    reason = (
        f"decode in {untried.count} strips: about {untried.seconds:.1f} s instead of "
        f"{untried.whole_seconds:.1f} s, once it is known to keep every bit; the first frames are "
        "decoded both ways after this clip"
    )
    reasons = (*plan.reasons[:-1], reason, *plan.reasons[-1:])
    return replace(
        plan,
        decode_trial=untried.count,
        decode_kind=untried.kind,
        reasons=reasons,
        estimate=replace(plan.estimate, reasons=reasons),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StripsForecast:
    """What a decode in ``count`` strips is expected to take and need, and what is known of it."""

    count: int
    whole_seconds: float
    """Of the decode on one card."""
    seconds: float
    peak_bytes: int
    """What the card with the largest strip holds at most."""
    kind: str
    """What decides whether it keeps the bits; a trial is kept under it."""
    trial: Trial | None

    @property
    def reason(self) -> str:
        """Return it in words."""
        bits = "changes rounding only"
        if self.trial is not None:
            bits = f"rounding: tried here, relative error {self.trial.error:.1e}"
            bits = "exact: tried here, every bit was equal" if self.trial.equal else bits
        return (
            f"decode in {self.count} strips on as many cards: about {self.seconds:.1f} s instead "
            f"of {self.whole_seconds:.1f} s, up to {self.peak_bytes / GIB:.1f} GiB on each; {bits}"
        )


def strips_forecast(
    architecture: ModelArchitecture, workload: Workload, choices: Choices, system: SystemResources,
    count: int,
) -> StripsForecast:  # fmt: skip
    """Return what a decode in ``count`` strips by the lean decoder is expected to take."""
    shape = architecture.vae_shape
    _, height, width = latent_size(architecture, workload)
    whole = decode_seconds(architecture, workload, choices, system)
    moved = workload.width * workload.height * workload.num_frames * workload.batch_size * 3
    sent = moved * (4 if workload.return_frames else 1) / _SHARED
    kind = _kind(shape, workload, choices, system, count)
    return StripsForecast(
        count=count,
        whole_seconds=whole,
        seconds=max(whole * strips_cost(shape, height, width, count), sent) + _STRIPS_SECONDS,
        peak_bytes=_peak(architecture, shape, workload, choices, system, count),
        kind=kind,
        trial=system.between.trials.get(kind),
    )


def _kind(
    shape: VaeShape, workload: Workload, choices: Choices, system: SystemResources, count: int
) -> str:
    words = ["fastest kernels"] * choices.quick + [f"{BANDS} bands"] * choices.by_rows
    # Its widths too: a pruned VAE has other convolutions for the same latents.
    widths = "/".join(str(shape.decoder_base_dim * m) for m in shape.dim_mult)
    widths += f" x {shape.num_res_blocks}"
    vae = f"VAE of {shape.z_dim} channels, {widths}, in {choices.dtypes['vae']}"
    what = ", ".join([vae, *words])
    size = f"{workload.batch_size} x {workload.width}x{workload.height}"
    return f"{machine(system)}; {what}, {size} in {count} strips"


def _peak(
    architecture: ModelArchitecture, shape: VaeShape, workload: Workload, choices: Choices,
    system: SystemResources, count: int,
) -> int:  # fmt: skip
    """Return the bytes that the decode of the largest strip is expected to hold on its card."""
    frames, height, width = latent_size(architecture, workload)
    away = (choices.by_rows or choices.cache_in_ram) and system.device_kind != "cpu"

    def bytes_of(strip: Strip | None) -> int:
        return lean_decode_bytes(
            shape, batch=workload.batch_size, latent_frames=frames, latent_height=height,
            latent_width=width, size=BYTES[choices.dtypes["vae"]], strip=strip,
            bands=BANDS if choices.by_rows else 1, cache_on_host=away,
            quick=choices.quick and system.backend == "cuda",
        )[0]  # fmt: skip

    if choices.offload == "none":
        # A worker has no other component on its card when it decodes.
        choices = replace(choices, offload="model")
    stages = estimate(architecture, workload, choices, system).stages
    decode = next(stage for stage in stages if stage.name == "decode")
    strips = strips_of(shape, height, width, count)
    # The finest maps are what counts.
    largest = max(strips, key=lambda strip: strip.level_reads[-1][1] - strip.level_reads[-1][0])
    return decode.device_bytes - bytes_of(None) + bytes_of(largest)
