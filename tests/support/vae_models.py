"""Small VAEs, and latents for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from wan_core.models.variants import VaeShape


def make_vae(version: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small VAE of the real class; 2.2 has residual shortcuts and patches of 2 x 2."""
    shared: dict[str, Any] = {"temperal_downsample": [False, True, True]}
    with torch.random.fork_rng():
        torch.manual_seed(21)
        if version == "2.1":
            vae = AutoencoderKLWan(
                base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **shared
            )
        else:
            vae = AutoencoderKLWan(
                base_dim=3,
                decoder_base_dim=4,
                z_dim=48,
                dim_mult=[1, 2, 2, 2],
                num_res_blocks=1,
                in_channels=12,
                out_channels=12,
                is_residual=True,
                patch_size=2,
                latents_mean=[0.1 * i for i in range(48)],
                latents_std=[1.0 + 0.05 * i for i in range(48)],
                scale_factor_spatial=16,
                scale_factor_temporal=4,
                **shared,
            )
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(dtype)
    return vae.eval().requires_grad_(False)


def make_latents(vae: Any, frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vae.config.z_dim, frames, 2, 3, generator=generator)


def shape_of(vae: Any) -> VaeShape:
    """The numbers of a VAE, as detection finds them in a file."""
    names = ("z_dim", "base_dim", "num_res_blocks", "is_residual", "patch_size")
    return VaeShape(
        **{name: getattr(vae.config, name) for name in names},
        decoder_base_dim=vae.config.decoder_base_dim or vae.config.base_dim,
        dim_mult=tuple(vae.config.dim_mult),
        temporal_downsample=tuple(vae.config.temperal_downsample),
        scale_factor_spatial=vae.config.scale_factor_spatial,
    )
