"""Which part of a picture each of several cards decodes, and how much of it is seen beside that.

Wan's decoder begins with a global part at the latents' resolution (its attention sees the whole
plane), which is computed whole. What follows is local: convolutions that see one pixel around, and
upsampling to the nearest pixel. A strip of the picture therefore depends on a strip of the maps
before, with a margin that is counted back from the picture here, pixel by pixel. At its inner edges
a strip is padded as at the picture's, which is wrong there; the margin is what gets wrong.

Strips that hold the global part too are another picture: by 5 % with this margin, by 19 % with one
latent of it (relative error of a VAE 2.1 with random weights and 32 channels, 320 x 32 pixels in
two strips, against none for the way taken here; float32 on a CPU, torch 2.13).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..models import VaeShape

ROWS, COLUMNS = 3, 4
"""Dimensions of a map (batch, channels, frames, height, width)."""


@dataclass(frozen=True, slots=True)
class Strip:
    """A part of a picture's rows or columns. Ranges are (first, one behind the last)."""

    axis: int
    """``ROWS`` or ``COLUMNS``: which of them are divided."""
    length: int
    """How many the plane of latents has."""
    pixels: tuple[int, int]
    """Those of the decoded picture that belong to the strip."""
    begins: tuple[int, int]
    """What the first level of upsampling needs of the plane of latents."""
    keeps: tuple[tuple[int, int], ...]
    """For each level what is kept of its map, at its resolution, before that is upsampled; for the
    last one what belongs to the strip, at the decoder's resolution."""

    @property
    def level_reads(self) -> tuple[tuple[int, int], ...]:
        """Return what of its map each level computes, at its resolution."""
        return (self.begins, *((2 * low, 2 * high) for low, high in self.keeps[:-1]))


def longer_side(height: int, width: int) -> int:
    """Return the axis along which a plane is divided: the longer one needs the least beside."""
    return COLUMNS if width >= height else ROWS


@lru_cache(maxsize=64)
def strips_of(shape: VaeShape, height: int, width: int, count: int) -> tuple[Strip, ...]:
    """Divide a plane of ``height`` x ``width`` latents into ``count`` strips along its longer side.

    There are fewer where it has fewer rows or columns than that.
    """
    axis = longer_side(height, width)
    length = width if axis == COLUMNS else height
    count = max(1, min(count, length))
    edges = [length * i // count for i in range(count + 1)]
    return tuple(
        _strip(shape, axis, length, first, last)
        for first, last in zip(edges, edges[1:], strict=False)
    )


def _strip(shape: VaeShape, axis: int, length: int, first: int, last: int) -> Strip:
    """Count back from the pixels of a strip to what of the latents' plane it depends on."""
    levels = len(shape.dim_mult)
    each = 2 * (shape.num_res_blocks + 1)  # two convolutions in each of a level's residual blocks
    fine = 2 ** (levels - 1)
    low, high = first * fine, last * fine
    keeps = [(low, high)]
    margin = each + 1  # and the decoder's last convolution
    for level in reversed(range(levels)):
        size = length * 2**level
        low, high = max(0, low - margin), min(size, high + margin)
        if level:
            # The convolution behind the upsampling sees one fine pixel more, and a whole pixel
            # becomes two: down and up to the next whole one.
            low, high = max(0, (low - 1) // 2), min(size // 2, (high + 2) // 2)
            keeps.append((low, high))
        margin = each
    patch = shape.patch_size or 1
    pixels = (first * fine * patch, last * fine * patch)
    return Strip(axis, length, pixels, (low, high), tuple(reversed(keeps)))


def strips_cost(shape: VaeShape, height: int, width: int, count: int) -> float:
    """Return what the most expensive strip costs beside the whole decode, from 1 / count to 1.

    By the multiplications of the residual blocks: a level's are those of its channels and of four
    times the pixels of the level before, in twice the frames where time is upsampled.
    """
    strips = strips_of(shape, height, width, count)
    widths = [shape.decoder_base_dim * m for m in (shape.dim_mult[-1], *shape.dim_mult[::-1])]
    time, each = 1, shape.num_res_blocks + 1
    middle = 2 * widths[0] ** 2 * 2  # two residual blocks; its attention is of that order or less
    levels: list[float] = []
    for level, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        inside = before if shape.is_residual or level == 0 else before // 2
        block = inside * after + after**2 + 2 * (each - 1) * after**2
        levels.append(block * time * 4**level)
        if level < len(shape.temporal_downsample):
            time *= 2 if shape.temporal_downsample[::-1][level] else 1
    whole = middle + sum(levels)
    most = 0.0
    for strip in strips:
        shares = [
            (high - low) / (strip.length * 2**level)
            for level, (low, high) in enumerate(strip.level_reads)
        ]
        own = sum(share * work for share, work in zip(shares, levels, strict=True))
        most = max(most, middle + own)
    return most / whole
