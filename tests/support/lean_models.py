"""Small transformers for the lean forward, and what they are called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from support.casting import cast_module
from support.tiny_models import IMAGE_DIM, TEXT_DIM, make_transformer

GRID = (5, 6, 10)  # latent frames, height, width: 75 tokens
TOKENS = 75


def model_of(family: str, dtype: torch.dtype, **numbers: Any) -> Any:
    if family == "wan2.2-ti2v-5b":
        # A width of whole vectors: on CPUs SiLU rounds the odd elements at the end of a tensor
        # differently, so that diffusers' own tokens of equal timestep are not equal otherwise.
        numbers = {"attention_head_dim": 32, **numbers}
    torch.manual_seed(1)
    model = make_transformer(family, **numbers).requires_grad_(False)
    for parameter in model.parameters():  # the head starts as nearly zero, norms as ones
        nn.init.normal_(parameter, std=0.2)
    return cast_module(model, dtype)


def inputs_of(model: Any, dtype: torch.dtype, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    config = model.config

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    call: dict[str, Any] = {
        "hidden_states": noise(batch, config.in_channels, *GRID),
        "timestep": torch.full((batch,), 777.7),
        "encoder_hidden_states": noise(batch, 512, TEXT_DIM),
        "return_dict": False,
    }
    if config.image_dim:
        images = 2 if config.pos_embed_seq_len else 1
        call["encoder_hidden_states_image"] = noise(batch * images, 257, IMAGE_DIM)
    if "vace_layers" in config:
        call["control_hidden_states"] = noise(batch, config.vace_in_channels, *GRID)
        scale = torch.linspace(1, 0.3, len(config.vace_layers)).to(dtype)
        call["control_hidden_states_scale"] = scale
    if "motion_encoder_size" in config:
        frames, size = GRID[0], config.motion_encoder_size
        call["pose_hidden_states"] = noise(batch, config.latent_channels, frames - 1, *GRID[1:])
        call["face_pixel_values"] = noise(batch, 3, 4 * frames - 7, size, size)
    if config.in_channels == 48:
        per_token = torch.full((batch, TOKENS), 777.7)
        per_token[:, :15] = 0  # the first frame is held
        call["timestep"] = per_token
    return call
