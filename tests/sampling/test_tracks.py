"""Tracks put into a condition, against plain loops over every place and every point."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from wan_core.sampling.tracks import by_paths, by_points


def condition(frames: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(1, 20, frames, rows, columns, generator=generator)
    found[:, :4] = 0
    found[:, :4, 0] = 1
    return found


def points(tracks: int, width: int, height: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(121, tracks, 3, generator=generator)
    found[..., 0] *= width
    found[..., 1] *= height
    found[..., 2] = (found[..., 2] > 0.3).float()
    return found


def bilinear(plane: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Sample (C, H, W) at x, y in -1..1 of the whole picture, zeros outside, by hand."""
    _, rows, columns = plane.shape
    column, row = ((x + 1) * columns - 1) / 2, ((y + 1) * rows - 1) / 2
    left, top = math.floor(column), math.floor(row)
    out = torch.zeros(len(plane), dtype=plane.dtype)
    for r, wr in ((top, top + 1 - row), (top + 1, row - top)):
        for c, wc in ((left, left + 1 - column), (left + 1, column - left)):
            if 0 <= r < rows and 0 <= c < columns:
                out += wr * wc * plane[:, r, c]
    return out


def by_points_slowly(
    given: torch.Tensor, tracks: torch.Tensor, width: int, height: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ATI's formula in float64: (mask (T, h, w), latents), place by place, point by point."""
    latents = given[0, 4:].double().clone()
    _, frames, rows, columns = latents.shape
    mask = torch.zeros(frames, rows, columns, dtype=torch.float64)
    mask[0] = 1
    short, small = min(width, height), min(rows, columns)

    def place(moment: int, track: int) -> tuple[float, float]:
        x, y, _ = tracks[moment, track].tolist()
        return (x - width / 2) / short * 2, (y - height / 2) / short * 2

    features = []
    for track in range(tracks.shape[1]):
        x, y = place(0, track)
        x, y = (max(-1.0, min(1.0, v / (n / small))) for v, n in ((x, columns), (y, rows)))
        features.append(bilinear(latents[:, 0], x, y))
    count = 4 * (frames - 1)
    common = math.gcd(120, count)
    for frame in range(1, frames):
        found: list[tuple[float, float, float]] = []
        for track in range(tracks.shape[1]):
            sums = [0.0, 0.0, 0.0]
            for k in range(4 * (frame - 1), 4 * frame):
                moment = 1 + min(119, (1 + 120 // common * k) // (count // common))
                seen = float(tracks[moment, track, 2])
                for i, value in enumerate((*place(moment, track), 1.0)):
                    sums[i] += value * seen
            found.append((sums[0] / (sums[2] + 1e-5), sums[1] / (sums[2] + 1e-5), min(1, sums[2])))
        for r in range(rows):
            for c in range(columns):
                y = -rows / small + 2 * rows / small * r / (rows - 1)
                x = -columns / small + 2 * columns / small * c / (columns - 1)
                weights = sorted(
                    (
                        (s * math.exp(-220 * ((px - x) ** 2 + (py - y) ** 2)), n)
                        for n, (px, py, s) in enumerate(found)
                    ),
                    reverse=True,
                )[:2]
                total = sum(w for w, _ in weights)
                laid = sum((w * features[n] for w, n in weights), torch.zeros(1).double())
                latents[:, frame, r, c] = laid + latents[:, frame, r, c] * (1 - min(1, total))
                mask[frame, r, c] = total
    return mask, latents


@pytest.mark.parametrize(("frames", "size", "count"), [(3, (64, 32), 3), (5, (32, 48), 1)])
def test_points_are_laid_over_the_latents(frames: int, size: tuple[int, int], count: int) -> None:
    width, height = size
    given, tracks = condition(frames, height // 8, width // 8), points(count, width, height)
    made = by_points(given, tracks, width, height)
    mask, latents = by_points_slowly(given, tracks, width, height)
    assert torch.allclose(made[0, 4:].double(), latents, atol=1e-5)
    assert torch.allclose(made[0, :4].double(), mask.expand(4, -1, -1, -1), atol=1e-5)
    assert torch.equal(made[:, :, 0], given[:, :, 0])  # the first frame stays
    assert not torch.equal(made, given)


def test_points_of_every_length(frames: Any = (1, 2, 3, 21, 31, 61)) -> None:
    """Also the lengths at which 120 points divide evenly: 121 frames, one point a frame."""
    tracks = points(2, 64, 32)
    for count in frames:
        made = by_points(condition(count, 4, 8), tracks, 64, 32)
        assert made.shape[2] == count and torch.isfinite(made).all()


def test_points_that_are_not_seen_change_nothing() -> None:
    given, tracks = condition(4, 4, 8), points(2, 64, 32)
    tracks[1:, :, 2] = 0
    assert torch.equal(by_points(given, tracks, 64, 32), given)


def test_a_path_carries_its_feature() -> None:
    given = condition(4, 4, 8)
    tracks = torch.zeros(13, 3, 3)
    # In pixels: one stands still, one moves a cell to the right a latent frame, one leaves.
    tracks[:, 0] = torch.tensor([17.0, 9.0, 1.0])
    for frame in range(13):
        tracks[frame, 1] = torch.tensor([8.0 * (frame // 4) + 3, 20.0, 1.0])
        tracks[frame, 2] = torch.tensor([60.0 + frame, 31.0, 1.0])
    made, wanted = by_paths(given, tracks, 8), given.clone()
    for frame in range(1, 4):
        wanted[0, 4:, frame, 1, 2] = given[0, 4:, 0, 1, 2]
        wanted[0, 4:, frame, 2, frame] = given[0, 4:, 0, 2, 0]
    # The third is outside from frame 4 on (64 and 68 pixels of 64).
    assert torch.equal(made, wanted)


def test_a_path_that_is_hidden_or_outside_carries_nothing() -> None:
    given = condition(3, 4, 8)
    far = ((1e30, 5.0, 1.0), (5.0, -1e30, 1.0))  # beyond every whole number
    near = ((-1.0, 5.0, 1.0), (64.0, 5.0, 1.0), (5.0, 32.0, 1.0), (5.0, 5.0, 0.0))
    for x, y, seen in (*near, *far):
        tracks = torch.tensor([x, y, seen]).expand(9, 1, 3)
        assert torch.equal(by_paths(given, tracks, 8), given)
    late = torch.tensor([9.0, 9.0, 1.0]).repeat(9, 1, 1)
    late[0, 0, 2] = 0  # it has no beginning: there is nothing to carry
    assert torch.equal(by_paths(given, late, 8), given)
