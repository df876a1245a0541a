"""Does a clip obey its control? Scores for masks, ways and the colours of references.

A clip obeys a mask if what the mask keeps stays, and what it covers is made: the shape that is told
of is there, where there is room for it. It obeys a drawing if its shape goes the drawing's way. It
obeys a reference if it has that colour and shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import clips, control_clips, judge

SCALES = {"high": 2.0, "low": 1.5}
"""Guidance of the two experts, the demo's own."""
KEPT_DB = 24.0
"""Peak signal-to-noise ratio in dB, against the source, from which a kept area has been kept."""
FILLED = 0.8
"""Share of the covered pixels that must show the shape or its ground for an area to be filled."""
NEAR = 0.08
"""RGB distance from a colour of the world up to which a pixel shows it."""
ON_WAY = 3.0
"""Mean distance in pixels from the drawing's way up to which a shape follows it."""


@dataclass(frozen=True)
class Asked:
    """What a control asks of a clip.

    ``cell`` is what is to be seen. ``source`` (F, H, W, 3), 0..1, and ``mask`` (F, H, W), 1 = make,
    are given where something is to be kept, ``way`` (F, 2), x and y in pixels, where a drawing
    leads. ``straight`` says that the cell's direction is asked for, ``grounded`` its background.
    """

    cell: tuple[str, str, str, str]
    source: Tensor | None = None
    mask: Tensor | None = None
    way: Tensor | None = None
    straight: bool = True
    grounded: bool = True


@dataclass(frozen=True)
class Verdict:
    """What was found; None where it was not asked for."""

    colour: bool
    shape: bool
    direction: bool | None
    background: bool | None
    kept: float | None
    """Peak signal-to-noise ratio in dB of what the mask keeps."""
    filled: bool | None
    """Whether what the mask covers was made: nothing grey or empty is left of it."""
    off: float | None
    """Mean distance in pixels from the drawing's way; infinite where no shape is seen."""

    def obeys(self) -> bool:
        """Say whether all that was asked for was found."""
        return (
            self.colour
            and self.shape
            and self.background is not False
            and self.direction is not False
            and self.filled is not False
            and (self.kept is None or self.kept >= KEPT_DB)
            and (self.off is None or self.off <= ON_WAY)
        )


def kept_db(frames: Tensor, source: Tensor, mask: Tensor) -> float:
    """Return the PSNR in dB of the pixels that a mask (F, H, W) keeps; infinite without any."""
    kept = (mask <= 0.5)[..., None].expand_as(frames)
    if not bool(kept.any()):
        return math.inf
    error = (frames - source)[kept].square().mean()
    return float(-10 * torch.log10(error.clamp(min=1e-10)))


def is_filled(frames: Tensor, mask: Tensor, background: str, colour: str) -> bool:
    """Say whether what a mask (F, H, W) covers shows the ground or the shape: none is left grey.

    The edge of the shape, which is neither, is allowed for.
    """
    covered = mask > 0.5
    if not bool(covered.any()):
        return True
    height = frames.shape[1]
    ramp = 1 + clips.GRADIENT * torch.linspace(1, -1, height)
    ground = torch.tensor(clips.BACKGROUNDS[background]) * ramp[:, None, None]
    near = torch.minimum(
        (frames - ground).norm(dim=-1), (frames - torch.tensor(clips.COLOURS[colour])).norm(dim=-1)
    )
    return float((near[covered] < NEAR).float().mean()) >= FILLED


def off_way(reading: judge.Reading, way: Tensor, size: tuple[int, int]) -> float:
    """Return the mean distance in pixels of a clip's shape from a way, on the torus.

    A frame without a shape counts as half the picture's diagonal.
    """
    lost = math.hypot(*size) / 2
    total = 0.0
    for frame, (x, y) in zip(reading.frames, way.tolist(), strict=True):
        if frame.centre is None:
            total += lost
            continue
        gaps = [
            (a - b + n / 2) % n - n / 2 for a, b, n in zip(frame.centre, (x, y), size, strict=True)
        ]
        total += math.hypot(*gaps)
    return total / len(way)


def judge_clip(asked: Asked, frames: Tensor) -> Verdict:
    """Judge a clip (F, H, W, 3), 0..1, by what was asked of it."""
    frames = torch.nan_to_num(frames.detach().float().cpu()).clamp(0, 1)
    reading = judge.read_clip(frames)
    colour, shape, direction, background = asked.cell
    kept = filled = off = None
    if asked.mask is not None and asked.source is not None:
        kept = kept_db(frames, asked.source, asked.mask)
        filled = is_filled(frames, asked.mask, background, colour)
    if asked.way is not None:
        off = off_way(reading, asked.way, (frames.shape[2], frames.shape[1]))
    return Verdict(
        colour=reading.colour == colour,
        shape=reading.shape == shape,
        direction=reading.direction == direction if asked.straight else None,
        background=reading.background == background if asked.grounded else None,
        kept=kept,
        filled=filled,
        off=off,
    )


def asked(lessons: control_clips.Lessons, index: int) -> Asked:
    """Return what one of the lessons asks of a clip."""
    cell = clips.grid()[int(lessons.cell[index])]
    kind = lessons.kinds[int(lessons.kind[index])]
    template = control_clips.TEMPLATES[int(lessons.row[index]) // len(clips.grid())]
    mask = lessons.mask[index].cpu()
    drawn, keeps = kind.endswith(("dot", "edges")), bool((mask <= 0.5).any())
    return Asked(
        cell=cell,
        source=lessons.clip[index].permute(1, 2, 3, 0).cpu() if keeps else None,
        mask=mask if keeps else None,
        way=lessons.centre[index].cpu() if drawn else None,
        straight=not drawn and template not in ("look", "bare"),
        grounded=keeps or template not in ("object", "motion"),
    )


class Score:
    """Counts, over clips of one kind, of what the judge found."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.verdicts: list[Verdict] = []

    def add(self, wanted: Asked, frames: Tensor) -> Verdict:
        """Judge a clip and count it."""
        verdict = judge_clip(wanted, frames)
        self.verdicts.append(verdict)
        return verdict

    def share(self, name: str) -> float | None:
        """Return the share, 0..1, of the clips asked for it in which a thing was found."""
        found = {
            "obeys": [v.obeys() for v in self.verdicts],
            "kept": [v.kept >= KEPT_DB for v in self.verdicts if v.kept is not None],
            "way": [v.off <= ON_WAY for v in self.verdicts if v.off is not None],
        }.get(name)
        if found is None:
            told = [getattr(v, name) for v in self.verdicts]
            found = [value for value in told if value is not None]
        return sum(found) / len(found) if found else None

    def row(self) -> str:
        """Return a row of the table: shares in %, then median PSNR kept and median distance."""
        names = ("obeys", "colour", "shape", "direction", "background", "kept", "filled", "way")
        shares = [self.share(name) for name in names]
        kept = sorted(v.kept for v in self.verdicts if v.kept is not None)
        off = sorted(v.off for v in self.verdicts if v.off is not None)
        parts = ["-" if s is None else f"{100 * s:.0f}" for s in shares]
        parts.append(f"{kept[len(kept) // 2]:.1f}" if kept else "-")
        parts.append(f"{off[len(off) // 2]:.1f}" if off else "-")
        return f"| {self.name} | {len(self.verdicts)} | " + " | ".join(parts) + " |"

    __str__ = row


HEAD = (
    "| control | clips | obeys % | colour | shape | direction | background | kept | filled | way "
    "| kept dB | off px |\n|---|" + "---|" * 11
)
