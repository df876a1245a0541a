"""A character and a driving video into what Animate 2 is given, as diffusers' pipeline makes it.

Pictures of another shape are fitted into black frames (``WanAnimate2VideoProcessor``); CLIP sees
whole frames, not their middle (``clip_visual_encode``); known frames carry a mask of 1. Sources:
diffusers' ``modular_pipelines/wan_animate_2`` (0.42).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..job import picture_size, to_pil
from .encode import encode_first_frame, encode_keyframes, keyframe_mask, prepare_picture
from .vae import encode_latents, in_chunks, normalize_latents

if TYPE_CHECKING:
    from PIL import Image

DRIVING_PROMPT: Final = "人物动作的参考视频"
"""The text that the driving stream is given, "a reference video of a character's motion"."""
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def in_black_frame(
    picture: Image.Image | Tensor, width: int, height: int, *, video: bool = False
) -> Tensor:
    """Fit a picture into the middle of a black frame: (1, 3, height, width), float32, -1..1.

    Frames of a ``video`` are scaled bilinearly, others by bicubic interpolation. One that has the
    size already keeps its full precision.
    """
    from PIL import Image as Pillow

    if picture_size(picture) == (width, height):
        return prepare_picture(picture, width, height)
    image = to_pil(picture).convert("RGB")
    size = (width, image.height * width // image.width)
    if width / height >= image.width / image.height:
        size = (image.width * height // image.height, height)
    way = Pillow.Resampling.BILINEAR if video else Pillow.Resampling.BICUBIC
    fitted = image.resize(size, resample=way)
    frame = Pillow.new("RGB", (width, height))
    frame.paste(fitted, ((width - size[0]) // 2, (height - size[1]) // 2))
    return prepare_picture(frame, width, height)


def encode_whole_clip(image_encoder: Any, pixels: Tensor, device: torch.device) -> Tensor:
    """Encode frames (n, 3, H, W), -1..1, with CLIP: (n, 257, image_dim), second to last layer.

    The frame is squeezed into CLIP's square, in place of the crop of other models.
    """
    side = image_encoder.config.image_size
    square = F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (_CLIP_MEAN, _CLIP_STD))
    ready = ((square * 0.5 + 0.5 - mean) / std).to(device, image_encoder.dtype)
    found: Tensor = image_encoder(pixel_values=ready, output_hidden_states=True).hidden_states[-2]
    return found


def encode_character(
    vae: Any, picture: Tensor, *, device: torch.device, check: Callable[[], object]
) -> Tensor:
    """Return mask (1) and latents (1, 4 + z, 1, h, w) of the character, (1, 3, H, W)."""
    latents = encode_first_frame(vae, picture, device=device, check=check)
    mask = keyframe_mask([0], 1, latents.shape[3], latents.shape[4])
    return torch.cat([mask.to(latents), latents], dim=1)


def encode_carried(
    vae: Any, frames: Tensor | None, size: tuple[int, int], num_frames: int, *,
    device: torch.device, check: Callable[[], object],
) -> Tensor:  # fmt: skip
    """Return mask and latents (B, 4 + z, T, h, w) of a segment that begins with known frames.

    ``frames`` (B, 3, H, W), -1..1, are the last ones of the segment before; None: nothing is known,
    and B is 1. ``size`` is (width, height).
    """
    first = torch.zeros(1, 3, size[1], size[0]) if frames is None else frames
    found = torch.cat(
        [
            encode_keyframes(vae, {0: one}, num_frames=num_frames, device=device, check=check)
            for one in torch.split(first, 1)
        ]
    )
    if frames is None:
        found[:, :4] = 0
    return found


def encode_driving(
    vae: Any, video: Tensor, indices: Sequence[int], size: tuple[int, int], *,
    check: Callable[[], object],
) -> Tensor:  # fmt: skip
    """Return a segment's driving input (1, 2z + 4, T, h, w): latents, a mask of 1, latents again.

    ``indices`` are the frames (4n + 1) of ``video`` (F, H, W, 3), 0..1, that the segment follows.
    """
    frames = (in_black_frame(video[at], *size, video=True) for at in indices)
    latents = encode_latents(vae, in_chunks(frames), check=check)
    latents = normalize_latents(latents.to(torch.float32), vae.config)
    return torch.cat([latents, torch.ones_like(latents[:, :4]), latents], dim=1)
