"""A video into latents, and noise added to it: what any Wan model can start from or follow.

Video frames go through the VAE four at a time and are never held as a whole on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .encode import prepare_picture
from .vae import encode_latents, in_chunks, normalize_latents


def encode_video(
    vae: Any, video: Tensor, width: int, height: int, *, check: Callable[[], object]
) -> Tensor:
    """Return the normalised latents (1, z, T, h, w), float32, of a video (4n + 1, H, W, 3), 0..1.

    As ``WanVideoToVideoPipeline.prepare_latents`` makes them: the mode of the VAE's encode,
    normalised in float32. Each frame goes the way of a picture (``prepare_picture``).
    """
    frames = (prepare_picture(one, width, height) for one in video)
    latents = encode_latents(vae, in_chunks(frames), check=check)
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
