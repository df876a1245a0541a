"""An estimate as text, for people."""

from __future__ import annotations

from ..config import GIB, MemoryEstimate


def format_estimate(estimate: MemoryEstimate) -> str:
    """Format an estimate as text: a line per stage, the peak and what is available, reasons."""
    lines = [f"warning: {text}" for text in estimate.warnings]
    lines += ["stage               on device    weights  activations    in RAM   (predicted)"]
    for stage in estimate.stages:
        on_device = (stage.device_bytes, stage.weights_bytes, stage.activation_bytes)
        cells = [f"{value / GIB:8.2f} GiB" for value in (*on_device, stage.host_bytes)]
        lines.append(f"{stage.name:<17}" + " ".join(cells) + (f"  {stage.note}" * bool(stage.note)))
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
