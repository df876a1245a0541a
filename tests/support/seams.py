"""How seams are measured, and what others do at them; also for ``benchmarks/long_video.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from support.blending import normalised
from tools import clips
from wan_core.job.windows import Window, WindowPlan, video_frames


class LinearRamps(WindowPlan):
    """A plan with the ramp other tools use, linspace(0, 1, overlap), at every inner end."""

    def windows(self, step: int = 0) -> tuple[Window, ...]:
        found = super().windows(step)
        ramp = torch.linspace(1e-37, 1, self.overlap)
        rows = [torch.ones(self.window) for _ in found]
        for k, row in enumerate(rows):
            if k:
                row[: self.overlap] = ramp
            if k + 1 < len(rows):
                row[-self.overlap :] = row[-self.overlap :].minimum(ramp.flip(0))
        pairs = zip(found, rows, strict=True)
        return tuple(replace(window, weights=tuple(row.tolist())) for window, row in pairs)


def linear_ramps(plan: WindowPlan) -> WindowPlan:
    """The same windows, fused as other tools do."""
    return LinearRamps(plan.total, plan.window, plan.overlap, plan.schedule, plan.fusion)


def in_ramps(plan: WindowPlan) -> set[int]:
    """The changes between latent frames (i to i + 1) that lie between two windows."""
    return {i for w in plan.windows()[1:] for i in range(w.start - 1, w.start + plan.overlap)}


def energy_at(change: Tensor, period: int) -> float:
    """What comes back every ``period`` frames in a series of changes from frame to frame.

    The autocovariance at that lag over the squared mean: 0 for a clip whose movement knows
    nothing of the windows, (seam's excess / movement)^2 x share of frames with one for cuts.
    """
    off = change - change.mean()
    return float((off[:-period] * off[period:]).mean() / change.mean() ** 2)


DEMO = Path(__file__).parents[2] / "wan_core" / "demo_model" / "t2v"
Cells = Sequence[tuple[str, str, str, str]]
MOVING: Cells = [
    ("white", "square", "right", "dark"), ("red", "circle", "left", "grey"),
    ("yellow", "triangle", "down", "teal"), ("green", "circle", "up", "dark"),
]  # fmt: skip


class MovingVideo:
    """Clips of moving shapes through the trained demo VAE, in windows that disagree.

    Every window after the first is ``ahead`` frames of movement further than it should be.
    """

    def __init__(self, latent_frames: int = 6, ahead: float = 1.0, moving: Cells = MOVING) -> None:
        self._moving = moving
        self._vae: Any = AutoencoderKLWan.from_pretrained(DEMO / "vae").float()
        self._frames = video_frames(latent_frames)
        self._whole, self._late = self._latents(0.0), self._latents(ahead)
        self._even = self._change(self._whole)

    @torch.no_grad()
    def _latents(self, ahead: float) -> Tensor:
        video = []
        for seed, cell in enumerate(self._moving):
            scene = clips.scene_of(*cell, seed=seed, wrap=True)
            heading = torch.tensor([clips.DIRECTIONS[cell[2]]], dtype=torch.float32)
            begun = scene.start + heading * scene.speed[:, None] * ahead
            video.append(clips.render(replace(scene, start=begun), self._frames))
        encoded: Tensor = self._vae.encode(torch.cat(video) * 2 - 1).latent_dist.mode()
        return encoded

    @torch.no_grad()
    def _change(self, latents: Tensor) -> Tensor:
        """The change from frame to frame, summed over the frames of each latent frame."""
        moved = self._vae.decode(latents).sample.diff(dim=2).abs().mean((1, 3, 4))
        return moved.view(len(latents), -1, 4).sum(2).mean(0)

    def ratios(self, plan: WindowPlan) -> Tensor:
        """How much more the decoded video changes, per latent frame, than without windows."""
        made = torch.zeros_like(self._whole)
        for window, weights in zip(plan.windows(), normalised(plan), strict=True):
            index, share = list(window.indices), torch.tensor(weights).view(1, 1, -1, 1, 1)
            made[:, :, index] += share * (self._late if window.index else self._whole)[:, :, index]
        return self._change(made) / self._even
