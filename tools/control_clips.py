"""Lessons in obeying: clips of `tools.clips`, what a control shows of each, and a sentence.

A control is what VACE takes: a video, a mask (1 = make) and at most one reference picture. Each
lesson is drawn as one of `KINDS`; `KINDS_WITH_REFERENCE` are those that show a reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import clips

GREY = 0.5
"""Value of "nothing here"."""
KINDS = {
    "inpaint": 0.32,
    "outpaint": 0.16,
    "edges": 0.20,
    "dot": 0.20,
    "frames": 0.06,
    "free": 0.06,
}
"""What a control without a reference asks for, and how often.

inpaint: make what a box covers; outpaint: make what is around a box; edges: follow an outline;
dot: follow a dot; frames: begin, and sometimes end, with known frames; free: nothing is shown.
"""
KINDS_WITH_REFERENCE = {"reference": 0.5, "reference dot": 0.25, "reference inpaint": 0.25}
"""What a control with a reference asks for; the sentence then names no colour."""
FUN_KINDS = {"edges": 0.42, "dot": 0.35, "frames": 0.15, "free": 0.08}
"""The same for Fun Control, which has no mask to make only a part of a frame."""
FUN_KINDS_WITH_REFERENCE = {"reference": 0.5, "reference dot": 0.5}
TEMPLATES = (*clips.TEMPLATES, "look", "colourless", "bare")
"""The demo's own templates, and three that leave out the motion, the colour or both."""
CURVED_SHARE = 0.6
"""How often a shape that is led by a drawing goes another way than any sentence tells."""
DOT = (2.5, 4.0)
"""Radius of a dot in pixels."""
LINE = (1.0, 2.2)
"""Width of an outline in pixels."""


def sentence(cell: tuple[str, str, str, str], template: str) -> str:
    """Return the description of a cell in one of `TEMPLATES`."""
    colour, shape, direction, background = cell
    if template in clips.TEMPLATES:
        return clips.sentence(*cell, template=template)
    if template == "look":
        return f"a {colour} {shape} on a {background} background"
    motion = "stays still" if direction == "still" else f"moves {direction}"
    if template == "colourless":
        return f"a {shape} {motion} on a {background} background"
    return f"a {shape} on a {background} background"


def sentences() -> list[str]:
    """Return every sentence of a lesson: row t * 270 + g is template t of grid row g."""
    return [sentence(cell, template) for template in TEMPLATES for cell in clips.grid()]


@dataclass(frozen=True)
class Lessons:
    """N lessons. Pictures are floats 0..1, masks 0 or 1, ``row`` counts in `sentences()`.

    ``clip`` and ``video`` (N, 3, FRAMES, SIZE, SIZE), ``mask`` (N, FRAMES, SIZE, SIZE),
    ``reference`` (N, 3, SIZE, SIZE), ``centre`` (N, FRAMES, 2); ``row``, ``kind``, which counts in
    ``kinds``, and ``cell``, which counts in `clips.grid`, (N,).
    """

    kinds: tuple[str, ...]

    clip: Tensor
    video: Tensor
    mask: Tensor
    reference: Tensor
    centre: Tensor
    row: Tensor
    kind: Tensor
    cell: Tensor

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.clip)

    @property
    def referenced(self) -> bool:
        """Whether they show their reference."""
        return self.kinds[0].startswith("reference")

    def only(self, chosen: Tensor) -> Lessons:
        """Return the lessons that an index or a boolean vector chooses."""
        tensors = [one.name for one in fields(self) if one.name != "kinds"]
        return Lessons(self.kinds, *(getattr(self, name)[chosen] for name in tensors))


class Draw:
    """Draws of one generator on one device: a source of numbers that can be repeated."""

    def __init__(self, count: int, device: torch.device | str, generator: torch.Generator) -> None:
        self.count, self.device, self.generator = count, device, generator

    def uniform(self, low: float, high: float, *more: int) -> Tensor:
        """Return (N, *more) numbers, evenly from low to high."""
        shape = (self.count, *more)
        return low + (high - low) * torch.rand(shape, device=self.device, generator=self.generator)

    def chance(self, share: float) -> Tensor:
        """Return (N,) booleans, true in so large a share."""
        return self.uniform(0, 1) < share

    def kinds(self, shares: Mapping[str, float]) -> Tensor:
        """Return (N,) numbers of kinds, each as often as it says."""
        edges = torch.tensor(list(shares.values()), device=self.device).cumsum(0)
        edges = edges / edges[-1]
        return torch.bucketize(self.uniform(0, 1), edges, right=True).clamp(max=len(shares) - 1)


def curves(draw: Draw, radius: Tensor, frames: int = clips.FRAMES) -> Tensor:
    """Return ways within the picture, (N, frames, 2): a bend through three points each."""
    room = clips.SIZE - 2 * clips.MARGIN * radius[:, None, None]
    points = clips.MARGIN * radius[:, None, None] + room * draw.uniform(0, 1, 3, 2)
    time = torch.linspace(0, 1, frames, device=radius.device)[None, :, None]
    first, middle, last = (points[:, i, None] for i in range(3))
    return (1 - time) ** 2 * first + 2 * time * (1 - time) * middle + time**2 * last


def boxes(edges: Tensor, frames: int = clips.FRAMES) -> Tensor:
    """Return masks (N, frames, SIZE, SIZE) that are 1 within boxes.

    ``edges`` (N, 4) or (N, frames, 4) are left, top, right and bottom in pixels; a pixel is inside
    where its middle is.
    """
    if edges.dim() == 2:
        edges = edges[:, None].expand(-1, frames, -1)
    pixel = torch.arange(clips.SIZE, device=edges.device, dtype=torch.float32) + 0.5
    left, top, right, bottom = (edges[..., i, None] for i in range(4))
    across = (pixel >= left) & (pixel < right)
    down = (pixel >= top) & (pixel < bottom)
    return (down[..., :, None] & across[..., None, :]).float()


def holes(draw: Draw, centre: Tensor, radius: Tensor) -> Tensor:
    """Return masks to inpaint: around the shape's whole way, around the shape, or anywhere."""
    margin = (1.35 * radius[:, None] + draw.uniform(0, 8, 2))[:, None]
    low, high = centre - margin, centre + margin
    way = torch.cat([low.amin(1), high.amax(1)], 1)[:, None].expand(-1, centre.shape[1], -1)
    along = torch.cat([low, high], 2)
    corner = draw.uniform(0, 0.6 * clips.SIZE, 2)
    size = draw.uniform(16, clips.SIZE, 2)
    anywhere = torch.cat([corner, corner + size], 1)[:, None].expand_as(way)
    chosen = draw.uniform(0, 1)[:, None, None]
    return boxes(torch.where(chosen < 0.55, way, torch.where(chosen < 0.75, along, anywhere)))


def surroundings(draw: Draw) -> Tensor:
    """Return masks to outpaint: all around a box of 24 to 52 pixels, or beside it."""
    size = draw.uniform(24, 52, 2)
    corner = (clips.SIZE - size) * draw.uniform(0, 1, 2)
    snapped = torch.where(draw.chance(0.5)[:, None], (clips.SIZE - size) / 2, corner)
    return 1 - boxes(torch.cat([snapped, snapped + size], 1).round())


def outlines(draw: Draw, scenes: clips.Scenes, centre: Tensor) -> Tensor:
    """Return drawings (N, 3, frames, SIZE, SIZE): white outlines on black, half without grey."""
    width = draw.uniform(*LINE)[:, None, None, None, None]
    line = (width / 2 + 0.5 - (clips.distances(scenes, centre) + 0.25).abs()).clamp(0, 1)
    hard = draw.chance(0.5)[:, None, None, None, None]
    return torch.where(hard, (line > 0.5).float(), line).expand(-1, 3, -1, -1, -1)


def dots(draw: Draw, centre: Tensor) -> Tensor:
    """Return drawings (N, 3, frames, SIZE, SIZE): a white dot on black where the shape is."""
    radius = draw.uniform(*DOT)[:, None, None, None]
    pixel = torch.arange(clips.SIZE, device=centre.device, dtype=torch.float32) + 0.5

    def offset(axis: int) -> Tensor:
        raw = pixel[None, None] - centre[:, :, axis, None]
        return torch.remainder(raw + clips.SIZE / 2, clips.SIZE) - clips.SIZE / 2

    x, y = offset(0)[:, :, None, :], offset(1)[:, :, :, None]
    cover = (radius + 0.5 - (x * x + y * y).sqrt()).clamp(0, 1)
    return cover[:, None].expand(-1, 3, -1, -1, -1)


def portraits(draw: Draw, scenes: clips.Scenes) -> Tensor:
    """Return references (N, 3, SIZE, SIZE): the shape by itself, on white or on a background."""
    other = clips.sample_scenes(draw.count, draw.device, draw.generator)
    own = clips.Scenes(
        scenes.colour, scenes.shape, other.direction, other.background, other.start, other.radius,
        other.speed,
    )  # fmt: skip
    centre = clips.SIZE / 2 + draw.uniform(-12, 12, 1, 2)
    cover = (0.5 - clips.distances(own, centre)).clamp(0, 1)[:, :, 0]
    shown = clips.render(own, 1, centre)[:, :, 0]
    whites = torch.tensor([name == "white" for name in clips.COLOURS], device=draw.device)
    white = draw.chance(0.4) & ~whites[scenes.colour]
    lit = shown * cover + (1 - cover)  # the shape's own edge, on white
    return torch.where(white[:, None, None, None], lit, shown)


def known_frames(draw: Draw, frames: int = clips.FRAMES) -> Tensor:
    """Return masks (N, frames, SIZE, SIZE) that keep the first frame, and often another."""
    number = torch.arange(frames, device=draw.device)[None]
    other = torch.where(draw.chance(0.5), frames - 1, (draw.uniform(1, frames)).long())
    other = torch.where(draw.chance(0.6), other, 0)[:, None]
    made = ((number > 0) & (number != other)).float()
    return made[:, :, None, None].expand(-1, -1, clips.SIZE, clips.SIZE)


def _rows(draw: Draw, scenes: clips.Scenes, straight: Tensor, named: bool) -> Tensor:
    """Return a sentence for each scene: with its motion where that is true, its colour if named."""
    count, chosen = len(clips.grid()), draw.uniform(0, 1)
    number = {name: index for index, name in enumerate(TEMPLATES)}
    pick = torch.full_like(scenes.colour, number["look" if named else "bare"])
    if named:
        told = torch.where(chosen < 0.6, number["full"], number["short"])
        told = torch.where(chosen > 0.8, number["object"], told)
    else:
        told = torch.full_like(pick, number["colourless"])
    pick = torch.where(straight & (draw.uniform(0, 1) < 0.8), told, pick)
    return pick * count + scenes.index()


def draw_lessons(
    count: int,
    kinds: Mapping[str, float],
    device: torch.device | str,
    generator: torch.Generator,
) -> Lessons:
    """Draw so many lessons of these kinds (`KINDS` or `KINDS_WITH_REFERENCE`)."""
    draw = Draw(count, device, generator)
    scenes = clips.sample_scenes(count, device, generator, wrap_share=0.15)
    names = list(kinds)
    kind = draw.kinds(kinds)

    def of(*wanted: str) -> Tensor:
        numbers = [i for i, name in enumerate(names) if name.split()[-1] in wanted]
        return torch.isin(kind, torch.tensor(numbers, device=device, dtype=kind.dtype))

    drawn = of("edges", "dot")
    curved = drawn & draw.chance(CURVED_SHARE)
    centre = torch.where(curved[:, None, None], curves(draw, scenes.radius), clips.centres(scenes))
    clip = clips.render(scenes, clips.FRAMES, centre)
    mask = torch.ones(count, clips.FRAMES, clips.SIZE, clips.SIZE, device=device)
    for made, wanted in (
        (holes(draw, centre, scenes.radius), "inpaint"),
        (surroundings(draw), "outpaint"),
        (known_frames(draw), "frames"),
    ):
        mask = torch.where(of(wanted)[:, None, None, None], made, mask)
    # What is covered is grey, as clear_masked makes it; a drawing is covered and seen.
    video = torch.where(mask[:, None] > GREY, GREY, clip)
    for shown, wanted in ((outlines(draw, scenes, centre), "edges"), (dots(draw, centre), "dot")):
        video = torch.where(of(wanted)[:, None, None, None, None], shown, video)
    named = not names[0].startswith("reference")
    row = _rows(draw, scenes, ~curved, named)
    return Lessons(
        tuple(names), clip, video, mask, portraits(draw, scenes), centre, row, kind, scenes.index()
    )
