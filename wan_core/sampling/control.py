"""Key frames and source videos into latents: what of a control any Wan model can be given.

Video frames go through the VAE four at a time and are never held as a whole on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .encode import prepare_picture
from .vae import FRAMES_PER_CHUNK, encode_latents, normalize_latents


def keyframe_mask(
    positions: Mapping[int, object], num_frames: int, latent_height: int, latent_width: int
) -> Tensor:
    """Return the (1, 4, T, h, w) mask of the image-to-video models for any known video frames.

    1 = known. Channel c of latent frame t stands for video frame 4 t + c - 3; the first video frame
    fills all four channels of latent frame 0 (``WanImageToVideoPipeline.prepare_latents``).
    """
    frames = (num_frames - 1) // FRAMES_PER_CHUNK + 1
    mask = torch.zeros(1, 4, frames, latent_height, latent_width)
    for position in positions:
        if position == 0:
            mask[:, :, 0] = 1
        else:
            mask[:, (position - 1) % 4, (position - 1) // 4 + 1] = 1
    return mask


def keyframe_chunks(frames: Mapping[int, Tensor], num_frames: int) -> Iterator[Tensor]:
    """Yield the chunks of a video that is 0 (grey) but for the frames given, (B, 3, H, W) each."""
    some = next(iter(frames.values()))
    blank = some.new_zeros(some.shape[0], some.shape[1], FRAMES_PER_CHUNK, *some.shape[2:])
    yield frames[0].unsqueeze(2) if 0 in frames else blank[:, :, :1]
    for start in range(1, num_frames, FRAMES_PER_CHUNK):
        known = {at: frames[at] for at in range(start, start + FRAMES_PER_CHUNK) if at in frames}
        if not known:
            yield blank
            continue
        chunk = blank.clone()
        for at, picture in known.items():
            chunk[:, :, at - start] = picture.to(chunk)
        yield chunk


def encode_keyframes(
    vae: Any,
    frames: Mapping[int, Tensor],
    *,
    num_frames: int,
    device: torch.device,
    check: Callable[[], object],
) -> Tensor:
    """Return mask and latents (1, 4 + z, T, h, w), float32, for models with 36 input channels.

    ``frames`` are (1, 3, H, W), -1..1, by their video frame. With the first and the last one it is
    what ``encode_condition`` returns.
    """
    ready = {at: one.to(device=device, dtype=vae.dtype) for at, one in frames.items()}
    latents = encode_latents(vae, keyframe_chunks(ready, num_frames), check=check)
    latents = normalize_latents(latents.to(torch.float32), vae.config)
    mask = keyframe_mask(frames, num_frames, latents.shape[3], latents.shape[4])
    return torch.cat([mask.to(latents.device), latents], dim=1)


def video_chunks(video: Tensor, width: int, height: int) -> Iterator[Tensor]:
    """Yield the chunks of a video (F, H, W, 3), 0..1, at the clip's size: (1, 3, 1 or 4, H, W).

    Each frame goes the way of a picture (``prepare_picture``).
    """
    for start in (0, *range(1, len(video), FRAMES_PER_CHUNK)):
        some = video[start : start + (FRAMES_PER_CHUNK if start else 1)]
        yield torch.stack([prepare_picture(one, width, height) for one in some], dim=2)


def encode_video(
    vae: Any, video: Tensor, width: int, height: int, *, check: Callable[[], object]
) -> Tensor:
    """Return the normalised latents (1, z, T, h, w), float32, of a video (4n + 1, H, W, 3), 0..1.

    As ``WanVideoToVideoPipeline.prepare_latents`` makes them: the mode of the VAE's encode,
    normalised in float32.
    """
    latents = encode_latents(vae, video_chunks(video, width, height), check=check)
    return normalize_latents(latents.to(torch.float32), vae.config)


def noised(scheduler: Any, latents: Tensor, noise: Tensor, step: int) -> Tensor:
    """Return what ``step`` of the schedule begins with: (1 - sigma) latents + sigma noise.

    By the scheduler's own arithmetic, as diffusers' pipeline does; ``scheduler`` has its timesteps
    and its begin index set.
    """
    timestep = scheduler.timesteps[step : step + 1].repeat(noise.shape[0])
    if hasattr(scheduler, "add_noise"):
        mixed: Tensor = scheduler.add_noise(latents, noise, timestep)
    else:
        mixed = scheduler.scale_noise(latents, timestep, noise)
    return mixed
