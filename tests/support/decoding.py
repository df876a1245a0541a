"""A whole decode in one call, by the streaming decoder that a render drives itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from wan_core.sampling.vae import StreamingDecoder, to_frames


def decode_frames(
    vae: Any, latents: Tensor, *, check: Callable[[], object] | None = None
) -> Iterator[Tensor]:
    """Yield the chunks (B, 3, f, H, W) of ``vae.decode(latents).sample``, within -1..1."""
    decoder = StreamingDecoder(vae, latents)
    try:
        while not decoder.done:
            yield decoder.decode_next(check=check)
    finally:
        decoder.close()


def output_shape(vae: Any, latents: Tensor) -> tuple[int, int, int, int, int]:
    """(B, F, H, W, 3) of the whole decoded clip."""
    batch, _, frames, height, width = latents.shape
    config = vae.config
    in_space = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
    in_time = 2 ** sum(config.temperal_downsample)
    return (batch, 1 + (frames - 1) * in_time, height * in_space, width * in_space, 3)


def decode_into(
    decoder: StreamingDecoder, out: Tensor, check: Callable[[], object] | None = None
) -> Tensor:
    """Decode what is left into ``out`` (B, F, H, W, 3), 0..1, which it returns."""
    while not decoder.done:
        chunk = decoder.decode_next(check=check)
        out[:, decoder.frames_done - chunk.shape[2] : decoder.frames_done] = to_frames(chunk)
    return out


def decode_to_tensor(
    vae: Any,
    latents: Tensor,
    *,
    out: Tensor | None = None,
    check: Callable[[], object] | None = None,
) -> Tensor:
    """Decode (B, z, T, h, w) latents in VAE space to float32 frames (B, F, H, W, 3), 0..1."""
    decoder = StreamingDecoder(vae, latents)
    try:
        if out is None:
            out = torch.empty(output_shape(vae, latents), dtype=torch.float32, device="cpu")
        return decode_into(decoder, out, check)
    finally:
        decoder.close()
