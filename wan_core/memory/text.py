"""An estimate as text, for people, and how far it can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import GIB, MemoryEstimate
from ..models import ModelArchitecture, assumed_parts
from .cards import GENERAL_NAME, release_of
from .choices import Choices
from .process import LIBRARIES_OF

if TYPE_CHECKING:
    from .machine import SystemResources

_MEASURED = {(9, 0)}
"""Compute capabilities on which estimates were compared with runs, see benchmarks/results."""


def format_estimate(estimate: MemoryEstimate) -> str:
    """Format an estimate as text: a line per stage, the peak and what is available, reasons."""
    lines = [f"warning: {text}" for text in estimate.warnings]
    lines += ["stage               on device    weights  activations    in RAM   (predicted)"]
    for stage in estimate.stages:
        on_device = (stage.device_bytes, stage.weights_bytes, stage.activation_bytes)
        cells = [f"{value / GIB:8.2f} GiB" for value in (*on_device, stage.host_bytes)]
        lines.append(f"{stage.name:<17}" + " ".join(cells) + (f"  {stage.note}" * bool(stage.note)))
    if not estimate.device.startswith("cpu"):
        lines.append(
            "in RAM are interpreter and libraries too; what these take beyond what the process "
            f"holds now is known from {LIBRARIES_OF} alone"
        )
    mapped = max((stage.mapped_bytes for stage in estimate.stages), default=0)
    if mapped:
        lines.append(
            f"beside that, up to {mapped / GIB:.2f} GiB of weights are read from their files as "
            "they lie there: the more RAM is free, the less often from disk"
        )
    locked = max((stage.locked_bytes for stage in estimate.stages), default=0)
    if locked:
        lines.append(f"and up to {locked / GIB:.2f} GiB of them are page-locked while they stream")
    lines.append(_verdict(estimate))
    lines += [f"  because {reason}" for reason in estimate.reasons]
    return "\n".join(lines)


def _verdict(estimate: MemoryEstimate) -> str:
    peak = f"peak {estimate.peak_usage_mb / 1024:.2f} GiB on {estimate.device}"
    if estimate.available_mb is None or estimate.fits is None:
        return f"{peak} (confidence {estimate.confidence:.0%}, by {estimate.basis})"
    there = f"{estimate.available_mb / 1024:.2f} GiB can be used"
    fits = "fits" if estimate.fits else "DOES NOT FIT"
    return f"{peak}, {there}: {fits} (confidence {estimate.confidence:.0%}, by {estimate.basis})"


def confidence(architecture: ModelArchitecture, system: SystemResources, choices: Choices) -> float:
    """Rate an estimate from 0 to 1.

    Arithmetic alone is rated 0.8. Measured runs raise the rating, assumptions lower it.
    """
    rating = 0.9 if system.compute_capability in _MEASURED else 0.8
    if system.calibration.runs:
        rating = 0.95
    if system.device_kind == "cpu":
        rating -= 0.15  # there the whole process counts, which no arithmetic covers
    if assumed_parts(architecture):
        rating -= 0.1
    if not architecture.transformer.heads_known:
        rating -= 0.2
    if choices.offload == "sequential":
        rating -= 0.05
    return round(rating, 2)


def basis(system: SystemResources) -> str:
    """Say what an estimate rests on."""
    runs = system.calibration.runs
    if runs:
        return f"arithmetic and {runs} run{'s' * (runs > 1)} on this machine"
    if system.compute_capability in _MEASURED:
        return "arithmetic, compared with runs on such a card"
    return "arithmetic"


def gaps_warning(
    peak: int, reserved: int, available: int | None, system: SystemResources
) -> tuple[str, ...]:
    if available is None or not peak <= available < reserved:
        return ()
    text = (
        f"{peak / GIB:.1f} GiB would be in use, but gaps between freed blocks make the allocator "
        f"take up to {reserved / GIB:.1f} GiB."
    )
    cure = fewer_gaps(system)
    return (f"{text} {cure}" if cure else text,)


def assumed_warning(architecture: ModelArchitecture) -> tuple[str, ...]:
    assumed = assumed_parts(architecture)
    if not assumed:
        return ()
    names = ", ".join(name.replace("_", " ") for name in assumed)
    return (f"No file was given for {names}; the variant's usual one is assumed.",)


def fewer_gaps(system: SystemResources) -> str:
    """Say how segments that avoid most gaps are had on this machine; empty if there are none."""
    if system.os != "Linux" or system.backend != "cuda" or system.allocator == "expandable":
        return ""
    # The name without a device is read first since it tells of segments: it outweighs the other.
    newer = release_of(system.torch_version) >= GENERAL_NAME
    name = "PYTORCH_ALLOC_CONF" if newer else "PYTORCH_CUDA_ALLOC_CONF"
    own_pool = system.allocator == "async"
    also = ", and without CUDA's own pool (ComfyUI: --disable-cuda-malloc)" if own_pool else ""
    return (
        f"{name}=expandable_segments:True, set before the program starts{also}, avoids most of "
        "them."
    )
