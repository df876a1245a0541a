"""The longest or largest clip that fits, by bisection: a smaller workload never needs more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..memory import Workload
from .config import SHORTER_WINDOWS

MOST_FRAMES = 1025
"""Longest clip that ``what_fits`` tries."""


def largest_that_fits(workload: Workload, multiple: int, fits: Callable[[Workload], bool]) -> str:
    """Name the longest clip of this size, and the largest size of this length, that fit.

    ``multiple`` is what width and height must be divisible by. ``fits`` must be monotone: a shorter
    or smaller workload fits whenever a larger one does.
    """
    frames, size = longest(workload, fits), largest_size(workload, multiple, fits)
    found = (
        [] if frames is None else [f"{frames_text(frames)} at {workload.width}x{workload.height}"]
    )
    if size is not None:
        found.append(f"{frames_text(workload.num_frames)} at {size[0]}x{size[1]}")
    if not found:
        return "No length or size of this model fits; free memory or take a smaller model."
    return f"What would fit: {' or '.join(found)}."


def longest(workload: Workload, fits: Callable[[Workload], bool]) -> int | None:
    """Return the most frames (4n+1, at most the workload's) that fit at its size, or None."""
    if not fits(replace(workload, num_frames=1)):
        return None
    low, high = 0, (workload.num_frames - 1) // 4  # latent frames after the first
    while low < high:
        middle = (low + high + 1) // 2
        if fits(replace(workload, num_frames=4 * middle + 1)):
            low = middle
        else:
            high = middle - 1
    return 4 * low + 1


def largest_size(
    workload: Workload, multiple: int, fits: Callable[[Workload], bool]
) -> tuple[int, int] | None:
    """Return the largest (width, height) below the workload's, in its proportions, that fits."""
    sizes = [
        (
            width,
            max(multiple, round(width * workload.height / workload.width / multiple) * multiple),
        )
        for width in range(workload.width - multiple, multiple - 1, -multiple)
    ]
    first, last = 0, len(sizes)
    while first < last:
        middle = (first + last) // 2
        width, height = sizes[middle]
        if fits(replace(workload, width=width, height=height)):
            last = middle
        else:
            first = middle + 1
    return sizes[first] if first < len(sizes) else None


def windows_that_fit(workload: Workload, fits: Callable[[Workload], bool]) -> str:
    """Name the longest windows in which the whole clip would fit, if any would."""
    for frames in (81, *SHORTER_WINDOWS):
        if frames < (workload.window_frames or workload.num_frames):
            overlap = min(workload.window_overlap, (frames - 1) // 2)
            if fits(replace(workload, window_frames=frames, window_overlap=overlap)):
                return (
                    f" In windows of {frames} frames all {workload.num_frames} would fit: "
                    f"max_chunk_size or --window {frames}, in ComfyUI WanChunkedSampler."
                )
    return ""


def frames_text(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"
