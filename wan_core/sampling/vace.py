"""A control for VACE in, its latents out: encoded once for the whole clip, before the first step.

The result equals what diffusers' ``WanVACEPipeline`` gives its transformer, bit for bit: what the
mask keeps ("inactive") and what it covers ("reactive"), both through the VAE, references in front,
and the soft mask. Videos are encoded in chunks and never held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..job import latent_frames, to_pil
from .encode import prepare_picture
from .vae import encode_latents, in_chunks, normalize_latents

if TYPE_CHECKING:
    from PIL import Image

MASK_CHANNELS = 64
"""One for each of the 8 x 8 pixels that a latent pixel stands for."""
_SIDE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlClip:
    """The pixels of a control, for a clip of ``num_frames`` (4n + 1) frames.

    ``video`` (F, H, W, 3) and ``mask`` (F or 1, H, W) hold 0..1 and may have any size; a missing
    video is grey, which means "nothing here", and a missing mask covers everything. ``keyframes``
    are pictures at frames of the clip: the mask is black there. ``references`` are whole pictures.
    With ``clear_masked`` nothing of the video is seen where the mask covers it.
    """

    num_frames: int
    width: int
    height: int
    video: Tensor | None = None
    mask: Tensor | None = None
    keyframes: Sequence[tuple[int, Image.Image | Tensor]] = ()
    references: Sequence[Image.Image | Tensor] = ()
    clear_masked: bool = False

    @property
    def empty(self) -> bool:
        """Whether every frame is grey."""
        return self.video is None and not self.keyframes

    def frame(self, index: int) -> Tensor:
        """Return a frame of the control video, (1, 3, height, width), float32, -1..1."""
        picture = dict(self.keyframes).get(index)
        if picture is None and self.video is not None:
            picture = self.video[index]
        if picture is None:
            return torch.zeros(1, 3, self.height, self.width)
        return prepare_picture(picture, self.width, self.height)

    def mask_at(self, index: int) -> Tensor:
        """Return the soft mask of a frame, (height, width), float32, 0..1, 1 = make."""
        if index in dict(self.keyframes):
            return torch.zeros(self.height, self.width)
        if self.mask is None:
            return torch.ones(self.height, self.width)
        mask = self.mask[min(index, self.mask.shape[0] - 1)].to(torch.float32)
        size = (self.height, self.width)
        if tuple(mask.shape) != size:
            mask = F.interpolate(mask[None, None], size, mode="bilinear", antialias=True)[0, 0]
        # To -1..1 and back, as diffusers does: it rounds.
        return ((2.0 * mask - 1.0 + 1) / 2).clamp(0, 1)

    def hard_mask(self, index: int) -> Tensor:
        """Return the mask that divides a frame, (height, width), 0 or 1."""
        return torch.where(self.mask_at(index) > 0.5, 1.0, 0.0)

    def covers(self) -> tuple[bool, bool]:
        """Say whether the mask leaves anything uncovered, and whether it covers anything."""
        if self.mask is None and not self.keyframes:
            return False, True
        kept = covered = False
        for index in range(self.num_frames):
            whole = self.hard_mask(index)
            kept, covered = kept or not bool(whole.all()), covered or bool(whole.any())
            if kept and covered:
                break
        return kept, covered


def encode_vace(
    vae: Any, clip: ControlClip, *, check: Callable[[], object], grey: Callable[[], Tensor]
) -> Tensor:
    """Return a control's latents (1, 96, R + T, h, w) on the VAE's device; R references in front.

    Channels 0 to 15 are the latents of what is kept, 16 to 31 of what is made anew, the other 64
    the mask. Several references come out in reverse order, as ``WanVACEPipeline`` puts each in
    front of those before it. ``grey`` returns ``encode_grey`` of the clip, which is the same for
    every clip of its size; it is called where a half of the control is grey. ``check`` runs before
    each chunk of frames.
    """
    kept, covered = (False, False) if clip.empty else clip.covers()
    inactive = _encode(vae, _frames(clip, vae.dtype, 0), check) if kept else grey()
    covered = covered and not clip.clear_masked
    reactive = _encode(vae, _frames(clip, vae.dtype, 1), check) if covered else grey()
    latents = torch.cat([inactive.to(reactive.device), reactive], dim=1)
    for reference in clip.references:
        picture = letterboxed(reference, clip.width, clip.height)
        found = _encode(vae, [picture], check).to(latents.device)
        latents = torch.cat([torch.cat([found, torch.zeros_like(found)], dim=1), latents], dim=2)
    mask = F.pad(mask_channels(clip), (0, 0, 0, 0, len(clip.references), 0))
    return torch.cat([latents, mask.to(latents.device)], dim=1)


def encode_grey(vae: Any, clip: ControlClip, *, check: Callable[[], object]) -> Tensor:
    """Return the latents (1, 16, T, h, w) of a grey clip: "nothing here" for VACE."""
    return _encode(vae, repeat(torch.zeros(1, 3, clip.height, clip.width), clip.num_frames), check)


def letterboxed(picture: Image.Image | Tensor, width: int, height: int) -> Tensor:
    """Fit a reference into the middle of a white frame: (1, 3, height, width), -1..1.

    As ``WanVACEPipeline.preprocess_conditions``, which first cuts both sides to multiples of 8.
    """
    from diffusers.video_processor import VideoProcessor

    if isinstance(picture, Tensor) and not any(side % _SIDE for side in picture.shape[:2]):
        image = picture.permute(2, 0, 1).unsqueeze(0).clamp(0, 1) * 2.0 - 1.0
    else:
        image = VideoProcessor(vae_scale_factor=_SIDE).preprocess(to_pil(picture), None, None)
    scale = min(height / image.shape[-2], width / image.shape[-1])
    size = (int(image.shape[-2] * scale), int(image.shape[-1] * scale))
    fitted = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    canvas = torch.ones(1, 3, height, width)
    canvas[:, :, top : top + size[0], left : left + size[1]] = fitted
    return canvas


def mask_channels(clip: ControlClip) -> Tensor:
    """Return the soft mask as VACE reads it, (1, 64, T, h, w), float32.

    Channel 8 r + c holds row r and column c of each 8 x 8 pixels. Of the frames, those are read
    that ``nearest-exact`` picks for T of F: for the first latent frames of a clip that is one frame
    of the next group. The model was trained with it.
    """
    frames, made = clip.num_frames, latent_frames(clip.num_frames)
    numbers = torch.arange(frames, dtype=torch.float32).view(1, 1, frames)
    picked = F.interpolate(numbers, size=made, mode="nearest-exact").flatten().int().tolist()
    masks = torch.stack([clip.mask_at(index) for index in picked])
    height, width = clip.height // _SIDE, clip.width // _SIDE
    cells = masks.view(made, height, _SIDE, width, _SIDE).permute(2, 4, 0, 1, 3)
    return cells.reshape(1, MASK_CHANNELS, made, height, width)


def _frames(clip: ControlClip, dtype: torch.dtype, covered: int) -> Iterator[Tensor]:
    """Yield the clip's frames for the encoder, grey where the mask is not ``covered`` (0 or 1)."""
    for index in range(clip.num_frames):
        mask = clip.hard_mask(index).to(dtype)
        yield clip.frame(index).to(dtype) * (mask if covered else 1 - mask)


def _encode(vae: Any, frames: Iterable[Tensor], check: Callable[[], object]) -> Tensor:
    """Return normalised latents, computed in float32 and cast to the VAE's dtype."""
    latents = encode_latents(vae, in_chunks(frames), check=check)
    return normalize_latents(latents.to(torch.float32), vae.config).to(vae.dtype)
