"""Procedural clips of one moving shape, and the sentence that describes each.

The world is a torus: what leaves on the right comes back on the left, so a clip may be any number
of frames long and still show the whole story its sentence tells.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch

SIZE = 64
FRAMES = 17
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "magenta": (0.90, 0.15, 0.85),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "dark": (0.06, 0.06, 0.09),
    "grey": (0.40, 0.40, 0.42),
    "teal": (0.02, 0.28, 0.30),
}
GRADIENT = 0.15
"""Relative brightness of a background's top and bottom row, against its middle."""
RADIUS = (9.0, 12.0)
"""Radius in pixels of the circle whose area every shape has."""
SPEED = (1.4, 1.6)
"""Pixels per frame of a moving shape."""
MARGIN = 1.2
"""Distance from the border, in radii, that a shape keeps during a clip that does not wrap."""

TEMPLATES = ("full", "short", "object", "motion")


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes: five index vectors of shape (N,), and start (N, 2), radius, speed (N,)."""

    colour: torch.Tensor
    shape: torch.Tensor
    direction: torch.Tensor
    background: torch.Tensor
    start: torch.Tensor
    radius: torch.Tensor
    speed: torch.Tensor

    def index(self) -> torch.Tensor:
        """Return the row of `grid()` that each scene belongs to, shape (N,)."""
        cell = self.colour * len(SHAPES) + self.shape
        return (cell * len(DIRECTIONS) + self.direction) * len(BACKGROUNDS) + self.background


def grid() -> list[tuple[str, str, str, str]]:
    """Return every (colour, shape, direction, background) there is, 270 of them."""
    return list(itertools.product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS))


def sentence(
    colour: str, shape: str, direction: str, background: str, template: str = "full"
) -> str:
    """Return the English description of a scene in one of `TEMPLATES`."""
    still = direction == "still"
    if template == "full":
        motion = "stays still" if still else f"moves {direction}"
        return f"a {colour} {shape} {motion} on a {background} background"
    if template == "short":
        motion = "staying still" if still else f"moving {direction}"
        return f"{colour} {shape} {motion}, {background} background"
    motion = "stays still" if still else f"moves {direction}"
    return f"a {colour} {shape} {motion}" if template == "object" else f"it {motion}"


def _uniform(
    n: int, bounds: tuple[float, float], device: torch.device | str, g: torch.Generator | None
) -> torch.Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(n, device=device, generator=g)


def _starts(
    heading: torch.Tensor,
    radius: torch.Tensor,
    travel: torch.Tensor,
    wrapping: torch.Tensor,
    g: torch.Generator | None,
) -> torch.Tensor:
    """Draw start positions (N, 2) from which an unwrapped clip keeps the shape in view."""
    draw = torch.rand(heading.shape, device=heading.device, generator=g)
    margin = (MARGIN * radius)[:, None]
    room = (SIZE - 2 * margin - heading.abs() * travel[:, None]).clamp(min=0)
    inside = margin + draw * room + (heading < 0) * travel[:, None]
    return torch.where(wrapping[:, None], draw * SIZE, inside)


def sample_scenes(
    n: int,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    wrap_share: float = 0.3,
) -> Scenes:
    """Draw n random scenes; a share of them starts anywhere, so that the shape wraps around."""

    def draw(count: int) -> torch.Tensor:
        return torch.randint(count, (n,), device=device, generator=generator)

    colour, shape, direction = draw(len(COLOURS)), draw(len(SHAPES)), draw(len(DIRECTIONS))
    background = draw(len(BACKGROUNDS))
    radius = _uniform(n, RADIUS, device, generator)
    speed = _uniform(n, SPEED, device, generator)
    headings = torch.tensor(list(DIRECTIONS.values()), device=device, dtype=torch.float32)
    wrapping = torch.rand(n, device=device, generator=generator) < wrap_share
    start = _starts(headings[direction], radius, speed * (FRAMES - 1), wrapping, generator)
    return Scenes(colour, shape, direction, background, start, radius, speed)


def scene_of(
    colour: str, shape: str, direction: str, background: str, seed: int = 0, wrap: bool = False
) -> Scenes:
    """Return one scene of the named cell; the seed decides its size, speed and start."""
    g = torch.Generator().manual_seed(seed)
    fixed = {
        "colour": torch.tensor([list(COLOURS).index(colour)]),
        "shape": torch.tensor([SHAPES.index(shape)]),
        "direction": torch.tensor([list(DIRECTIONS).index(direction)]),
        "background": torch.tensor([list(BACKGROUNDS).index(background)]),
    }
    free = sample_scenes(1, generator=g)
    heading = torch.tensor([DIRECTIONS[direction]], dtype=torch.float32)
    travel = free.speed * (FRAMES - 1)
    start = _starts(heading, free.radius, travel, torch.tensor([wrap]), g)
    return replace(free, start=start, **fixed)


def shape_distance(
    x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return signed distances in pixels to a circle, square and triangle of equal area pi r^2.

    x and y are offsets from the shape's centroid, y pointing down; radius broadcasts with them.
    """
    half = radius * math.sqrt(math.pi) / 2
    side = radius * math.sqrt(4 * math.pi / math.sqrt(3))
    circle = (x * x + y * y).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - half
    slope = x.abs() * math.cos(math.pi / 6) - y * 0.5
    triangle = torch.maximum(y, slope) - side / (2 * math.sqrt(3))
    return circle, square, triangle


def centres(scenes: Scenes, frames: int = FRAMES) -> torch.Tensor:
    """Return where each scene's shape is, (N, frames, 2) as x and y in pixels, not yet wrapped."""
    device = scenes.start.device
    headings = torch.tensor(list(DIRECTIONS.values()), device=device, dtype=torch.float32)
    time = torch.arange(frames, device=device, dtype=torch.float32)
    velocity = headings[scenes.direction] * scenes.speed[:, None]
    return scenes.start[:, None] + velocity[:, None] * time[None, :, None]


def distances(scenes: Scenes, centre: torch.Tensor) -> torch.Tensor:
    """Return each pixel's signed distance to its scene's shape, (N, 1, frames, SIZE, SIZE).

    ``centre`` (N, frames, 2) says where the shape is; distances are those on the torus.
    """
    pixel = torch.arange(SIZE, device=centre.device, dtype=torch.float32) + 0.5

    def offset(axis: int) -> torch.Tensor:
        raw = pixel[None, None] - centre[:, :, axis, None]
        return torch.remainder(raw + SIZE / 2, SIZE) - SIZE / 2

    x, y = offset(0)[:, :, None, :], offset(1)[:, :, :, None]
    each = torch.stack(
        torch.broadcast_tensors(*shape_distance(x, y, scenes.radius[:, None, None, None])), 1
    )
    chosen = scenes.shape[:, None, None, None, None].expand(-1, 1, *each.shape[2:])
    return each.gather(1, chosen)


def render(
    scenes: Scenes, frames: int = FRAMES, centre: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw scenes with antialiased edges: float32 (N, 3, frames, SIZE, SIZE) in 0..1.

    ``centre`` (N, frames, 2) leads the shapes along other ways than their scenes'.
    """
    device = scenes.start.device
    centre = centres(scenes, frames) if centre is None else centre
    cover = (0.5 - distances(scenes, centre)).clamp(0, 1)
    colours = torch.tensor(list(COLOURS.values()), device=device)[scenes.colour]
    backgrounds = torch.tensor(list(BACKGROUNDS.values()), device=device)[scenes.background]
    ramp = 1 + GRADIENT * torch.linspace(1, -1, SIZE, device=device)
    ground = backgrounds[:, :, None, None, None] * ramp[None, None, None, :, None]
    return cover * colours[:, :, None, None, None] + (1 - cover) * ground
