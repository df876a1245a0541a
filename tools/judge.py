"""A small deterministic reader of clips: which colour, shape, motion and background they show.

It knows the world of `tools.clips` and nothing of the model. The background is each row's median,
the object is what differs from it; the object's colour is its nearest named one, its shape the
template of equal area and centroid that overlaps it best, its motion the path of its centroid.
All positions are on the torus.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from .clips import BACKGROUNDS, COLOURS, SHAPES, shape_distance

DIFFERENCE = 0.16
"""Largest channel difference from the background at which a pixel may belong to the object."""
MIN_AREA, MAX_AREA = 120, 700
"""Pixels an object may have: a radius of 6.2 to 14.9."""
COLOUR_REACH = 0.30
"""Euclidean RGB distance beyond which a colour has no name."""
MIN_OVERLAP = 0.78
"""Intersection over union that a shape needs with its template."""
MIN_TRAVEL = 0.7
"""Pixels per frame from which an object moves; the generator's move at 1.4 to 1.6."""
MAX_DRIFT = 0.35
"""Pixels per frame under which an object stands still, and that a straight path may stray."""
UNKNOWN = "?"


@dataclass(frozen=True)
class FrameReading:
    """What one frame shows; `UNKNOWN` where it shows nothing the judge has a name for."""

    colour: str
    shape: str
    background: str
    centre: tuple[float, float] | None
    overlap: float


@dataclass(frozen=True)
class Reading:
    """What a clip shows, and the reading of each frame."""

    colour: str
    shape: str
    direction: str
    background: str
    frames: tuple[FrameReading, ...]

    def steady(self) -> bool:
        """Say whether every frame shows the clip's colour and shape."""
        return all(
            frame.colour == self.colour != UNKNOWN and frame.shape == self.shape != UNKNOWN
            for frame in self.frames
        )


def _nearest(
    value: torch.Tensor, names: dict[str, tuple[float, float, float]], reach: float
) -> str:
    table = torch.tensor(list(names.values()))
    distance = (table - value).norm(dim=1)
    best = int(distance.argmin())
    return list(names)[best] if float(distance[best]) <= reach else UNKNOWN


def _circular_mean(weight: torch.Tensor) -> float:
    """Return the mean position of a weight vector laid around a circle of its own length."""
    n = len(weight)
    angle = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * math.pi / n)
    sine, cosine = float((weight * angle.sin()).sum()), float((weight * angle.cos()).sum())
    return math.atan2(sine, cosine) % (2 * math.pi) * n / (2 * math.pi)


def _centre(mask: torch.Tensor) -> tuple[float, float]:
    """Return the (x, y) centroid on the torus: a first circular guess, then the exact mean."""
    weight = mask.double()
    centre = []
    for size, marginal in ((mask.shape[1], weight.sum(0)), (mask.shape[0], weight.sum(1))):
        guess = _circular_mean(marginal)
        offset = torch.arange(size, dtype=torch.float64) + 0.5 - guess
        offset = torch.remainder(offset + size / 2, size) - size / 2
        centre.append((guess + float((offset * marginal).sum() / marginal.sum())) % size)
    return centre[0], centre[1]


def _overlaps(mask: torch.Tensor, centre: tuple[float, float]) -> list[float]:
    """Return the intersection over union with each shape's template of equal area."""
    height, width = mask.shape
    x = torch.remainder(torch.arange(width) + 0.5 - centre[0] + width / 2, width) - width / 2
    y = torch.remainder(torch.arange(height) + 0.5 - centre[1] + height / 2, height) - height / 2
    radius = torch.tensor(math.sqrt(float(mask.sum()) / math.pi))
    scores = []
    for distance in shape_distance(x[None, :], y[:, None], radius):
        template = distance <= 0
        union = float((template | mask).sum())
        scores.append(float((template & mask).sum()) / union)
    return scores


def read_frame(frame: torch.Tensor) -> FrameReading:
    """Read one frame, float (height, width, 3) in 0..1."""
    rows = frame.median(dim=1, keepdim=True).values
    background = _nearest(rows.mean((0, 1)), BACKGROUNDS, COLOUR_REACH / 2)
    difference = (frame - rows).abs().amax(-1)
    strong = difference > max(DIFFERENCE, 0.5 * float(difference.quantile(0.97)))
    if not MIN_AREA <= int(strong.sum()) <= MAX_AREA:
        return FrameReading(UNKNOWN, UNKNOWN, background, None, 0.0)
    colour = _nearest(frame[strong].median(dim=0).values, COLOURS, COLOUR_REACH)
    centre = _centre(strong)
    scores = _overlaps(strong, centre)
    best = max(range(len(SHAPES)), key=scores.__getitem__)
    shape = SHAPES[best] if scores[best] >= MIN_OVERLAP else UNKNOWN
    return FrameReading(colour, shape, background, centre, scores[best])


def _vote(names: list[str]) -> str:
    """Return the name that more than half of the frames show."""
    name, count = Counter(names).most_common(1)[0]
    return name if count * 2 > len(names) else UNKNOWN


def _direction(centres: list[tuple[float, float] | None], size: tuple[int, int]) -> str:
    steps = []
    for before, after in zip(centres, centres[1:], strict=False):
        if before is not None and after is not None:
            steps.append(
                [(b - a + n / 2) % n - n / 2 for a, b, n in zip(before, after, size, strict=True)]
            )
    if len(steps) * 2 < len(centres) - 1 or not steps:
        return UNKNOWN
    mean_x, mean_y = torch.tensor(steps, dtype=torch.float64).mean(0).tolist()
    if max(abs(mean_x), abs(mean_y)) < MAX_DRIFT:
        return "still"
    along, across = (mean_x, mean_y) if abs(mean_x) > abs(mean_y) else (mean_y, mean_x)
    if abs(along) < MIN_TRAVEL or abs(across) > MAX_DRIFT:
        return UNKNOWN
    if along == mean_x:
        return "right" if along > 0 else "left"
    return "down" if along > 0 else "up"


def read_clip(frames: torch.Tensor) -> Reading:
    """Read a clip, float (num_frames, height, width, 3) in 0..1; NaN reads as black."""
    frames = torch.nan_to_num(frames.detach().float().cpu()).clamp(0, 1)
    readings = tuple(read_frame(frame) for frame in frames)
    height, width = frames.shape[1:3]
    return Reading(
        colour=_vote([r.colour for r in readings]),
        shape=_vote([r.shape for r in readings]),
        direction=_direction([r.centre for r in readings], (width, height)),
        background=_vote([r.background for r in readings]),
        frames=readings,
    )
