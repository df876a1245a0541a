"""Window weights in closed form: what the running blend of a step must come to."""

from __future__ import annotations

from wan_core.job.windows import WindowPlan


def normalised(plan: WindowPlan, step: int = 0) -> tuple[tuple[float, ...], ...]:
    """Return weights per window and frame, scaled so that those of every clip frame sum to 1."""
    windows = plan.windows(step)
    totals = [0.0] * plan.total
    for window in windows:
        for i, weight in zip(window.indices, window.weights, strict=True):
            totals[i] += weight
    return tuple(
        tuple(w / totals[i] for i, w in zip(win.indices, win.weights, strict=True))
        for win in windows
    )
