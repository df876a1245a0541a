"""Windows of a long clip, their overlaps and weights, and the segments of one: arithmetic only.

A clip of T latent frames is denoised in windows of L latent frames that overlap by at least O.
Everything here is integers and tuples of floats; ``sampling.denoise`` cuts and fuses the tensors.

Fusion ``ramp``: over the w frames that two neighbouring windows share, the weight of the later
window rises as k / (w + 1), k = 1..w. A window's weight is its own fade-in minus the fade-in of the
window after it, so the weights of a frame form a telescoping sum of one. If two windows disagree by
d, the fused result changes by at most d / (w + 1) from one frame to the next. This is the least
possible, because the weight must go from 0 to 1 within w + 1 steps. The usual linspace(0, 1, w)
gives the first and the last shared frame the weights 0 and 1, so it blends over fewer frames.

Fusion ``pyramid`` weighs a frame by its distance to the window's edge, ``flat`` weighs all alike.

Blending makes neighbouring windows agree only about the frames they share. If two parts of a clip
start to show different things, there is still one visible seam somewhere between them. Fusion
``causal`` gives a shared frame wholly to the earlier window: the later window sees the frame as the
earlier one denoises it, and continues from there. This extends a video by replacement (Ho et al.,
Video Diffusion Models, 2022, section 3.1), but for all windows within the same step. Objects keep
their place from window to window, but their shapes may drift.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal, cast, get_args

from ..errors import InvalidRequest

ScheduleName = Literal["static", "uniform", "looped"]
FusionName = Literal["ramp", "pyramid", "flat", "causal"]

SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
FUSIONS: tuple[str, ...] = get_args(FusionName)

FRAMES_PER_LATENT = 4
"""Video frames per latent frame; the first latent frame stands for a single video frame."""

_Handover = tuple[int, int]  # (frames until the next window starts, length of its fade-in)

DEFAULT_WINDOW = 81
DEFAULT_OVERLAP = 16
_SHOWN_SEAMS = 12


def latent_frames(num_frames: int) -> int:
    """Latent frames of a clip of ``num_frames`` (>= 1) video frames: (n - 1) // 4 + 1."""
    return (num_frames - 1) // FRAMES_PER_LATENT + 1


def video_frames(latents: int) -> int:
    """Video frames decoded from ``latents`` (>= 1) latent frames: 4 (n - 1) + 1."""
    return FRAMES_PER_LATENT * (latents - 1) + 1


def round_up_frames(num_frames: int) -> int:
    """The smallest 4n + 1 that is not below ``num_frames`` (>= 1)."""
    return video_frames(-(-(num_frames - 1) // FRAMES_PER_LATENT) + 1)


def video_range(latent: int) -> range:
    """The video frames that latent frame ``latent`` of a clip stands for."""
    first = max(0, FRAMES_PER_LATENT * (latent - 1) + 1)
    return range(first, FRAMES_PER_LATENT * latent + 1)


def latent_index(frame: int) -> int:
    """The latent frame that video frame ``frame`` of a clip belongs to."""
    return -(-frame // FRAMES_PER_LATENT)


def halving(step: int) -> float:
    """Element ``step`` of the van der Corput sequence: 0, 1/2, 1/4, 3/4, 1/8 ... in [0, 1).

    Any run of consecutive elements is spread evenly over [0, 1), so seams placed by it visit every
    position about equally often, whatever the number of steps.
    """
    value, part = 0.0, 0.5
    while step:
        step, bit = divmod(step, 2)
        value += bit * part
        part /= 2
    return value


@dataclass(frozen=True, slots=True)
class Window:
    """One window of one step: the latent frames it sees and the weight of each.

    ``indices`` are absolute latent frames, consecutive modulo the clip's length. ``weights`` has
    one weight per index; they are not normalised.
    """

    index: int
    indices: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def start(self) -> int:
        """Absolute index of the first latent frame."""
        return self.indices[0]

    @property
    def middle(self) -> int:
        """Absolute index of the frame at its middle, whose text it has."""
        return self.indices[len(self.indices) // 2]


@dataclass(frozen=True)
class WindowPlan:
    """The windows of all steps; made by ``plan_windows``. Every step has as many, equally long.

    ``total``, ``window`` and ``overlap`` are latent frames; ``notes`` says what was rounded.
    """

    total: int
    window: int
    overlap: int
    schedule: ScheduleName
    fusion: FusionName
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def stride(self) -> int:
        """Latent frames from one window's start to the next one's, unless windows are shifted."""
        return self.window - self.overlap

    @cached_property
    def count(self) -> int:
        """Windows per step."""
        if self.window >= self.total:
            return 1
        if self.schedule == "looped":
            return -(-self.total // self.stride)
        travel = self.total - self.window
        fewest = 1 + -(-travel // self.stride)
        if self.schedule == "static":
            return fewest
        # Slack is what the windows cover beyond the clip, and seams can only move by it. If it is
        # not more than one overlap, seams would hardly move, so one more window is added, unless
        # every possible start is taken already.
        slack = (fewest - 1) * self.stride - travel
        wanted = fewest if slack > self.overlap else fewest + 1
        return min(wanted, travel + 1)

    @property
    def cost_factor(self) -> float:
        """Latent frames predicted per step divided by those of the clip; 1.0 without windows."""
        return self.count * self.window / self.total

    def starts(self, step: int = 0) -> tuple[int, ...]:
        """First latent frame of every window in fusing order, not yet modulo the clip's length."""
        if self.count == 1:
            return (0,)
        if self.schedule == "static":
            last = self.total - self.window
            return tuple(min(k * self.stride, last) for k in range(self.count))
        return self._looped(step) if self.schedule == "looped" else self._uniform(step)

    def _uniform(self, step: int) -> tuple[int, ...]:
        # The first and the last window stay at the ends of the clip. Those between them move
        # together: the first gap gets shorter by as much as the last gets longer. The bounds keep
        # every gap between 1 and the stride, so that overlaps are never shorter than asked.
        last = self.total - self.window
        slack = (self.count - 1) * self.stride - last
        low, high = max(0, slack - self.stride + 1), min(slack, self.stride - 1)
        shift = low + int(halving(step) * (high - low + 1))
        inner = (k * self.stride - shift for k in range(1, self.count - 1))
        return (0, *inner, last)

    def _looped(self, step: int) -> tuple[int, ...]:
        widest_gap = -(-self.total // self.count)
        shift = int(halving(step) * widest_gap)
        return tuple(shift + k * self.total // self.count for k in range(self.count))

    def _handovers(self, starts: tuple[int, ...]) -> tuple[_Handover | None, ...]:
        """How each window hands over to the next; None after the last one of an open clip."""
        looped = self.schedule == "looped" and len(starts) > 1
        followers = (*starts[1:], starts[0] + self.total) if looped else starts[1:]
        gaps = [b - a for a, b in zip(starts, followers, strict=False)]
        # In a loop, where three or more windows overlap, the changes of unequal fade-ins can add up
        # to more than the bound in the module's docstring; those of equal fade-ins cannot. So all
        # get the shortest length. Gaps differ by at most one frame, so little is lost.
        even = looped and self.fusion != "causal"
        ramps = [self.window - (max(gaps) if even else gap) for gap in gaps]
        return (*zip(gaps, ramps, strict=True), *(() if looped else (None,)))

    def windows(self, step: int = 0) -> tuple[Window, ...]:
        """The windows of ``step``, in the order in which they must be fused.

        Floating-point sums depend on their order. With a fixed one, a fused frame is the same bit
        for bit in whatever order the windows were predicted.
        """
        starts = self.starts(step)
        if self.count == 1:
            return (Window(0, tuple(range(self.total)), (1.0,) * self.total),)
        handovers = self._handovers(starts)
        return tuple(
            Window(
                index=k,
                indices=_wrapped(start, self.window, self.total),
                weights=_weights(self.window, handovers[k - 1], handovers[k], self.fusion),
            )
            for k, start in enumerate(starts)
        )

    def blend_fractions(self, step: int = 0) -> tuple[tuple[float, ...], ...]:
        """Fractions for fusing one window at a time, as a running weighted mean in one buffer.

        ``fused = lerp(fused, prediction, fraction)``, window by window in order, gives the weighted
        mean. Where windows agree, the frame stays the same bit for bit. The fraction is 1.0 for the
        first window that sees a frame.
        """
        so_far = [0.0] * self.total
        fractions = []
        for window in self.windows(step):
            row = []
            for i, weight in zip(window.indices, window.weights, strict=True):
                row.append(weight / (so_far[i] + weight) if so_far[i] else 1.0)
                so_far[i] += weight
            fractions.append(tuple(row))
        return tuple(fractions)

    def seams(self, step: int = 0) -> tuple[int, ...]:
        """Latent frames where the later window takes over: the middle of each overlap.

        With ``causal`` fusion it is the first frame after the overlap.
        """
        starts = self.starts(step)
        share = 1 if self.fusion == "causal" else 2
        middles = (
            start + handover[0] + handover[1] // share
            for start, handover in zip(starts, self._handovers(starts), strict=True)
            if handover is not None
        )
        return tuple(sorted(middle % self.total for middle in middles))

    def describe(self) -> str:
        """One line for a report: windows, frames, overlap, cost."""
        if self.count == 1:
            return f"1 window over all {video_frames(self.total)} frames (no chunking)"
        return (
            f"{self.count} windows of {video_frames(self.window)} frames ({self.window} latent), "
            f"overlap {self.overlap * FRAMES_PER_LATENT} ({self.overlap} latent), "
            f"{self.schedule}, {self.fusion}, {self.cost_factor:.2f}x the work of one pass; "
            f"{self._where()}"
        )

    def _where(self) -> str:
        if self.schedule != "static":
            return "seams move from step to step"
        frames = [video_range(seam).start for seam in self.seams()]
        shown = ", ".join(str(frame) for frame in frames[:_SHOWN_SEAMS])
        return f"seams around frames {shown}" + " …" * (len(frames) > _SHOWN_SEAMS)


def _wrapped(start: int, length: int, total: int) -> tuple[int, ...]:
    first = start % total
    beyond = max(0, first + length - total)
    return (*range(first, first + length - beyond), *range(beyond))


@lru_cache(maxsize=1024)
def _weights(
    length: int, before: _Handover | None, after: _Handover | None, fusion: FusionName
) -> tuple[float, ...]:
    """Weights of a window before normalising; those of ``ramp`` are its own fade-in minus the
    fade-in of the window that follows it."""
    if fusion == "flat":
        return (1.0,) * length
    if fusion == "pyramid":
        return tuple(float(min(j + 1, length - j)) for j in range(length))
    if fusion == "causal":
        return tuple(float(before is None or j >= before[1]) for j in range(length))
    own = [1.0] * length
    if before is not None:
        own = [min(1.0, (j + 1) / (before[1] + 1)) for j in range(length)]
    if after is None:
        return tuple(own)
    gap, ramp = after
    return tuple(up - min(1.0, max(0.0, (j - gap + 1) / (ramp + 1))) for j, up in enumerate(own))


def plan_windows(
    total_latent_frames: int,
    window: int = DEFAULT_WINDOW,
    overlap: int | None = None,
    schedule: str = "static",
    fusion: str = "ramp",
) -> WindowPlan:
    """Plan the windows of a clip of ``total_latent_frames``.

    ``window`` and ``overlap`` are video frames. The window is rounded up to 4n + 1, the overlap to
    a multiple of 4. An overlap of None is 16 frames, or half of a window shorter than 32. An
    overlap that is not shorter than the window becomes half of it. ``notes`` says what was changed.
    Schedules: ``static`` (the same seams every step), ``uniform`` (seams move from step to step),
    ``looped`` (the end of the clip flows into its beginning). Fusions: see the module's docstring.
    Raises ``InvalidRequest`` with the field.
    """
    _require(total_latent_frames >= 1, "num_frames", total_latent_frames, "at least 1 latent frame")
    _require(window >= 1, "window", window, "at least 1 frame")
    _require(schedule in SCHEDULES, "schedule", schedule, "one of " + ", ".join(SCHEDULES))
    _require(fusion in FUSIONS, "fusion", fusion, "one of " + ", ".join(FUSIONS))
    notes: list[str] = []
    length = latent_frames(round_up_frames(window))
    if video_frames(length) != window:
        notes.append(f"window {window} -> {video_frames(length)} frames (Wan makes 4n+1)")
    if overlap is None:
        shared = min(DEFAULT_OVERLAP // FRAMES_PER_LATENT, length // 2)
    else:
        _require(overlap >= 0, "overlap", overlap, "0 frames or more")
        shared = -(-overlap // FRAMES_PER_LATENT)
        if shared * FRAMES_PER_LATENT != overlap:
            notes.append(
                f"overlap {overlap} -> {shared * FRAMES_PER_LATENT} frames "
                f"({shared} latent frames of {FRAMES_PER_LATENT})"
            )
    if length >= total_latent_frames:
        if schedule == "looped":
            notes.append("the window covers the clip, so its end does not flow into its beginning")
        length, shared = total_latent_frames, 0
    if shared >= length:
        # Not an error: the default overlap must work with a small window too.
        shared = length // 2
        notes.append(
            f"overlap {overlap} does not fit a window of {video_frames(length)} frames; "
            f"{shared * FRAMES_PER_LATENT} is used"
        )
    return WindowPlan(
        total_latent_frames,
        length,
        shared,
        cast(ScheduleName, schedule),
        cast(FusionName, fusion),
        tuple(notes),
    )


def filling_overlap(
    total: int, window: int, overlap: int, passes: Sequence[int], gangs: int
) -> int:
    """Return the overlap, in latent frames, with which windows fill so many gangs of cards.

    A clip of ``total`` latent frames has windows of ``window`` that share ``overlap``, none of them
    moving, each of so many ``passes`` in a step (a number for each expert). A step takes
    ceil(windows x passes / gangs) turns; more windows that take no turn more cost no time, and
    their seams are longer. Never less than ``overlap``, nor more than half a window.
    """
    plan = WindowPlan(total, window, overlap, "static", "ramp")
    if plan.count == 1 or gangs < 2:
        return overlap
    # As many windows as every expert's turns have room for.
    most = min(-(-plan.count * each // gangs) * gangs // each for each in passes)
    for count in range(most, plan.count, -1):
        shared = min(window - -(-(total - window) // (count - 1)), window // 2)
        # Whole frames do not make every number of windows.
        if shared > overlap and WindowPlan(total, window, shared, "static", "ramp").count == count:
            return shared
    return overlap


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise InvalidRequest(f"{name} is {value!r}; allowed: {allowed}.", field=name)


# Segments: one after the other, in continuation mode; ``sampling.segments`` makes them ----------


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
