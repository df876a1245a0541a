"""A clip made in segments: each segment starts from the last latents of the one before.

These latents are handed over as they are, without decoding and encoding them again. Image-to-video
models get them as given frames of their condition, VACE as frames of the control that are kept, the
5B as frames held at timestep 0, its Fun models as both. In the overlap both segments have a result;
the two are blended with the ramp k/(w+1) that windows use, too. If a clip has several prompts, a
segment begins with each of them. This module knows neither models nor files.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..job import SegmentPlan
from .denoise import DenoiseState
from .units import Conditions, hold_first_frame

COLOUR_GRID = 4
"""A latent frame is averaged to this many cells a side, which leaves only colour and light."""
MAX_COLOUR_SCALE = 2.0
"""The spread of the colours is changed by at most this factor, up or down."""


@dataclass(slots=True, kw_only=True)
class ClipSegments:
    """The segments of one clip, made in order; ``clip`` (B, C, T, h, w) fills up from frame 0.

    ``noise`` and ``conditions`` are those of the whole clip; where VACE has references, their noise
    is in front of it, and every segment begins with that. ``given`` (B, C, n, h, w) are
    normalised latents that the clip begins with; they stay as they are, except where they overlap
    the first segment. ``drift_correction`` (0..1) is the strength of ``match_colours``.
    """

    plan: SegmentPlan
    noise: Tensor
    conditions: Conditions
    given: Tensor | None = None
    drift_correction: float = 0.0
    clip: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.clip = torch.zeros_like(self.noise[:, :, self.conditions.references :])
        if self.given is not None:
            self.clip[:, :, : self.given.shape[2]] = self.given

    def __len__(self) -> int:
        return len(self.plan.ranges)

    def frames(self, number: int) -> range:
        """Return the latent frames of the clip that segment ``number`` covers, with overlap."""
        return self.plan.ranges[number]

    def known(self, number: int) -> int:
        """Return how many frames segment ``number`` takes over from what is before it."""
        if number:
            return self.frames(number - 1).stop - self.frames(number).start
        return 0 if self.given is None else self.given.shape[2] - self.frames(0).start

    def begin(self, number: int, step: int) -> DenoiseState:
        """Return the state in which segment ``number`` starts, at ``step`` of the schedule."""
        frames = self.frames(number)
        done = self.clip[:, :, : frames.start + self.known(number)]
        return DenoiseState(
            latents=self.noise[:, :, self.conditions.places(frames)],
            next_step=step,
            segment=number,
            clip=done if done.shape[2] else None,
        )

    def go_on(self, state: DenoiseState) -> None:
        """Put the finished latents of a saved state into the clip."""
        if state.clip is not None:
            self.clip[:, :, : state.clip.shape[2]] = state.clip

    def conditions_of(self, number: int) -> Conditions:
        """Return the conditions of segment ``number``: the clip's, with the frames it takes over.

        Its prompt is the one at the middle of its new frames.
        """
        frames, known = self.frames(number), self.known(number)
        found = self.conditions.window(frames, frames.start + (known + len(frames)) // 2)
        if not known:
            return found
        held = self.clip[:, :, frames.start : frames.start + known]
        if found.vace is not None:
            return replace(found, vace=self._kept(found.vace, frames[:known], held))
        if found.concat is None:
            return replace(found, first_frame=self._with_key_frames(held, frames))
        # The condition ends with mask and latents: mark the known frames as given, and put them in.
        concat = found.concat.clone()
        channels = held.shape[1]
        concat[:, -channels:, :known] = held
        masked = concat[:, :-channels]
        masked[:, masked.shape[1] - found.mask_channels :, :known] = 1
        first = held.clone() if found.held else found.first_frame
        return replace(found, concat=concat, first_frame=first)

    def _with_key_frames(self, held: Tensor, frames: range) -> Tensor:
        """Return known frames, and after them the 5B's key frames that lie in this segment too."""
        given = self.conditions.first_frame
        if given is None:
            return held.clone()
        more = given[:, :, frames.start + held.shape[2] : frames.stop]
        return torch.cat([held, more.expand(held.shape[0], -1, -1, -1, -1).to(held)], dim=2)

    def _kept(self, vace: Tensor, frames: range, held: Tensor) -> Tensor:
        """Return the control with known frames in it: kept, nothing to make, a black mask."""
        control, channels = vace.clone(), held.shape[1]
        grey = self.conditions.vace_grey
        assert grey is not None  # encoded for every clip in segments
        first = self.conditions.references
        known = control[:, :, first : first + len(frames)]
        known[:, :channels] = held
        known[:, channels : 2 * channels] = grey[:, :, frames.start : frames.stop]
        known[:, 2 * channels :] = 0
        return control

    def finish(self, state: DenoiseState, conditions: Conditions) -> None:
        """Put a fully denoised segment into the clip."""
        number = state.segment
        frames, known = self.frames(number), self.known(number)
        # 1. The 5B's latents in held frames are whatever the steps made of them: restore these.
        made = hold_first_frame(state.latents, conditions)[:, :, conditions.references :]
        # 2. Match colours before blending, so that the overlap does not fade between two colours.
        if known and self.drift_correction:
            # The reference of later segments ends where the second one begins. No blend changes
            # these frames any more, so a resumed run corrects by the same reference.
            first = max(1, self.frames(1).start) if number else known + frames.start
            made = match_colours(made, self.clip[:, :, :first], self.drift_correction)
        # 3. Blend the overlap, then append the new frames.
        ramp = torch.arange(1, known + 1, device=made.device) / (known + 1)
        before = self.clip[:, :, frames.start : frames.start + known]
        blended = before.lerp(made[:, :, :known], ramp.view(1, 1, -1, 1, 1))
        # A new tensor: the state of the last step, which may yet be saved, has a view of the old.
        left, right = self.clip[:, :, : frames.start], self.clip[:, :, frames.stop :]
        self.clip = torch.cat([left, blended, made[:, :, known:], right], dim=2)


def match_colours(latents: Tensor, reference: Tensor, strength: float) -> Tensor:
    """Match the low spatial frequencies of ``latents`` to the statistics of ``reference``.

    Both are (B, C, T, h, w). Frames are averaged to a grid of 4x4 cells. For each sample and
    channel, mean and standard deviation over all frames and cells are matched; detail and movement
    within a cell are kept. ``strength`` 1 matches fully, 0 changes nothing.
    """
    low, target = _cells(latents), _cells(reference)
    mean, spread = low.mean((2, 3, 4), keepdim=True), low.std((2, 3, 4), keepdim=True)
    wanted = target.std((2, 3, 4), keepdim=True)
    scale = (wanted / spread.clamp_min(1e-6)).clamp(1 / MAX_COLOUR_SCALE, MAX_COLOUR_SCALE)
    if min(low[0, 0].numel(), target[0, 0].numel()) < 2:
        scale = torch.ones_like(mean)  # a single cell has no spread
    change = (low - mean) * scale + target.mean((2, 3, 4), keepdim=True) - low
    height, width = latents.shape[3:]
    # Interpolated between the cells: a constant change in each would draw the edges of the grid.
    flat = F.interpolate(
        change.flatten(1, 2), size=(height, width), mode="bilinear", align_corners=False
    )
    return latents + strength * flat.view_as(latents)


def _cells(latents: Tensor) -> Tensor:
    """Average each frame to at most ``COLOUR_GRID`` cells a side."""
    batch, channels, frames, height, width = latents.shape
    size = (min(COLOUR_GRID, height), min(COLOUR_GRID, width))
    pooled = F.adaptive_avg_pool2d(latents.flatten(1, 2), size)
    return pooled.view(batch, channels, frames, *size)
