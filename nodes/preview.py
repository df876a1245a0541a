"""Latents as a small moving picture while a clip is made. Does not import ComfyUI.

Each latent frame becomes one picture, by a decoder that belongs to the VAE whose latents they are:
for Wan's own VAEs a linear map from channels to colours, for the demo models' VAE three small
convolutions (``tools/train_preview.py``). For any other VAE there is none: a wrong picture is worse
than no picture.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..wan_core.models import VaeShape

DEMO = Path(__file__).resolve().parent.parent / "wan_core" / "demo_model" / "preview.safetensors"
LONGEST_SIDE, MOST_PICTURES = 224, 48
"""What is larger is made smaller, what is longer is shown by frames evenly apart: a preview of a
few tens of kilobytes goes to the page after every step."""
QUALITY = 60
"""Of the WebP, 0..100."""
Decoder = Callable[[torch.Tensor], torch.Tensor]
"""Normalised latents (T, C, h, w), float32 -> pictures (T, 3, H, W), about 0..1."""


def linear(factors: Sequence[Sequence[float]], bias: Sequence[float]) -> Decoder:
    """Return a decoder by ``factors`` (C, 3) and ``bias`` (3), which give colours in -1..1."""
    matrix, offset = torch.tensor(factors), torch.tensor(bias).view(1, 3, 1, 1)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return (torch.einsum("tchw,cr->trhw", latents, matrix) + offset) / 2 + 0.5

    return decode


def demo_decoder(vae: VaeShape) -> Decoder | None:
    """Return the decoder of the demo models, or None where ``vae`` is another VAE."""
    from safetensors import safe_open

    with safe_open(DEMO, "pt") as file:
        notes = file.metadata()
        if not same_latents(vae, json.loads(notes["latents_mean"])):
            return None
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    scale = int(notes["scale"])

    def decode(latents: torch.Tensor) -> torch.Tensor:
        for name in ("0", "2", "4"):
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            latents = torch.nn.functional.conv2d(latents, weight, bias, padding=1)
            if name != "4":
                latents = latents.relu()
        return torch.nn.functional.pixel_shuffle(latents, scale)

    return decode


def same_latents(vae: VaeShape, mean: Sequence[float]) -> bool:
    """Whether a VAE's latents are those with this mean of each channel: each VAE has its own."""
    ours = vae.latents_mean
    close = all(abs(a - b) < 1e-4 for a, b in zip(ours, mean, strict=False))
    return len(ours) == len(mean) and close


def pictures(decode: Decoder, latents: torch.Tensor) -> torch.Tensor:
    """Decode normalised latents (B, C, T, h, w) on the CPU; returns uint8 (T, H, W, 3).

    Of a batch the first clip is shown. Frames are left out where there are more than
    MOST_PICTURES.
    """
    clip = latents[0].transpose(0, 1)
    if len(clip) > MOST_PICTURES:
        clip = clip[torch.linspace(0, len(clip) - 1, MOST_PICTURES).round().long()]
    found = decode(clip.float().cpu())
    longest = max(found.shape[-2:])
    if longest > LONGEST_SIDE:
        share = LONGEST_SIDE / longest
        found = torch.nn.functional.interpolate(found, scale_factor=share, mode="area")
    return (found.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def moving(frames: torch.Tensor, seconds: float) -> str:
    """Return uint8 pictures (T, H, W, 3) as an animated WebP of ``seconds``, as a data: URL."""
    from PIL import Image

    images = [Image.fromarray(frame.numpy()) for frame in frames]
    options: dict[str, Any] = {"format": "WEBP", "quality": QUALITY, "method": 0}
    if len(images) > 1:
        pause = max(20, round(1000 * seconds / len(images)))
        options |= {"save_all": True, "append_images": images[1:], "duration": pause, "loop": 0}
    written = io.BytesIO()
    images[0].save(written, **options)
    return "data:image/webp;base64," + base64.b64encode(written.getvalue()).decode()
