"""How seams are measured, and what others do at them; also for ``benchmarks/long_video.py``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from wan_core.windows import Window, WindowPlan


class LinearRamps(WindowPlan):
    """A plan with the ramp other tools use, linspace(0, 1, overlap), at every inner end."""

    def windows(self, step: int = 0) -> tuple[Window, ...]:
        found = super().windows(step)
        ramp = torch.linspace(1e-37, 1, self.overlap)
        rows = [torch.ones(self.window) for _ in found]
        for k, row in enumerate(rows):
            if k:
                row[: self.overlap] = ramp
            if k + 1 < len(rows):
                row[-self.overlap :] = row[-self.overlap :].minimum(ramp.flip(0))
        pairs = zip(found, rows, strict=True)
        return tuple(replace(window, weights=tuple(row.tolist())) for window, row in pairs)


def linear_ramps(plan: WindowPlan) -> WindowPlan:
    """The same windows, fused as other tools do."""
    return LinearRamps(plan.total, plan.window, plan.overlap, plan.schedule, plan.fusion)


def in_ramps(plan: WindowPlan) -> set[int]:
    """The changes between latent frames (i to i + 1) that lie between two windows."""
    return {i for w in plan.windows()[1:] for i in range(w.start - 1, w.start + plan.overlap)}


def energy_at(change: Tensor, period: int) -> float:
    """What comes back every ``period`` frames in a series of changes from frame to frame.

    The autocovariance at that lag over the squared mean: 0 for a clip whose movement knows
    nothing of the windows, (seam's excess / movement)^2 x share of frames with one for cuts.
    """
    off = change - change.mean()
    return float((off[:-period] * off[period:]).mean() / change.mean() ** 2)
