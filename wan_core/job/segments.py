"""The segments of a clip in continuation mode: which frames each covers. Arithmetic only.

``sampling.segments`` makes them, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..errors import InvalidRequest
from .windows import FRAMES_PER_LATENT, WindowPlan, latent_frames, plan_windows, video_frames


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """Which latent frames of the clip each segment covers.

    ``ranges`` includes the frames that a segment takes over from what is before it. ``windows``
    are the windows the clip would have with a single prompt; their length is that of the longest
    segment. ``cuts`` are the latent frames where a segment begins because a prompt begins there.
    """

    ranges: tuple[range, ...]
    windows: WindowPlan
    cuts: tuple[int, ...] = ()

    def describe(self, given: int) -> str:
        """Describe the segments in one line; ``given`` latent frames are there already."""
        length, total = self.windows.window, self.ranges[-1].stop - self.ranges[0].start
        size = f"{video_frames(length)} frames ({length} latent)"
        if self.cuts:
            size = f"at most {size}, one or more for each of {len(self.cuts) + 1} texts"
        shared = f" after {given} given latent frames," if given else ""
        return (
            f"{len(self.ranges)} segments of {size},{shared} "
            f"each begun with the last {self.windows.overlap} latent frames before it, "
            f"{sum(map(len, self.ranges)) / total:.2f}x the work of one pass"
        )


def plan_segments(
    total: int, given: int, window: int | None, overlap: int, texts: Iterable[int] = ()
) -> SegmentPlan:
    """Plan segments for ``total`` latent frames, of which the first ``given`` are there already.

    ``window`` and ``overlap`` are video frames; a ``window`` of None makes a single segment.
    ``texts`` are the latent frames at which prompts begin; no segment makes new frames for two
    prompts. The last segment of a prompt is moved back to full length, like the last window of a
    clip, and is shorter only if too few frames precede it. Raises InvalidRequest if several
    segments share no latent frame, and if the given latents leave nothing to make.
    """
    if total <= given:
        raise InvalidRequest(
            f"continue_from has {given} latent frames and the whole clip {total}; there is nothing "
            f"to make. Set num_frames, which counts the given ones, to {video_frames(given + 1)} "
            "or more.",
            field="continue_from",
        )
    shared = -(-overlap // FRAMES_PER_LATENT)
    if window is not None:
        # The overlap as windows round it. It is asked of a clip longer than the window, because
        # a shorter one has a single window and thus no overlap.
        shared = plan_windows(latent_frames(window) + 2, window, overlap).overlap
    # From the given latents as many frames are taken over as from an earlier segment.
    taken = max(1, shared)
    first = max(0, given - taken)
    length = video_frames(total - first) if window is None else window
    windows = plan_windows(total - first, length, overlap)
    cuts = tuple(sorted({start for start in texts if given < start < total}))
    ranges: list[range] = []
    done = given
    # Up to each cut, and up to the end, as many segments as it takes. Each ends at most one window
    # after the first frame that it takes over, and begins one window before its end.
    for end in (*cuts, total):
        while done < end:
            stop = min(max(first, done - taken) + windows.window, end)
            ranges.append(range(max(first, stop - windows.window), stop))
            done = stop
    if len(ranges) > 1 and shared < 1:
        raise InvalidRequest(
            "window_overlap is 0; a segment goes on from the one before, so at least "
            f"{FRAMES_PER_LATENT} frames must be shared.",
            field="window_overlap",
        )
    return SegmentPlan(tuple(ranges), replace(windows, overlap=shared), cuts)
