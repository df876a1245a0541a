"""How fast do the VAEs decode and encode? Diffusers, the lean way and the quick one, in each dtype.

    python benchmarks/speed.py --part decode [--only decode-2.1 encode-2.1]

VAEs of true shape with random weights. A decode ends with its frames on the host, an encode begins
with pixels on the host and goes chunk by chunk. Errors are taken against diffusers in fp32, equal
bits are those of diffusers in the same dtype. Unfused is the lean way operation by operation.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from speed_bench import BASE, Bench, in_turns, keep
from support.casting import cast_module
from support.true_models import autoencoder
from torch import Tensor

from wan_core.decoding import lean_decoder, lean_encoder
from wan_core.models import VAE_21, VAE_22, VaeShape
from wan_core.sampling import StreamingDecoder
from wan_core.sampling.vae import encode_latents

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BRIEF = {"fp32": ("diffusers", "lean"), "bf16": ("diffusers", "lean", "quick"),
         "fp16": ("diffusers", "quick")}  # fmt: skip
"""The ways of a brief run: those that a speed takes, and diffusers."""


@dataclass(frozen=True)
class Case:
    """A decode of latents (frames, height, width), or an encode of as many pixels."""

    name: str
    title: str
    shape: VaeShape
    grid: tuple[int, int, int]
    needs: float
    """About how many seconds it takes on an H100; estimated from runs without the unfused way."""
    turns: int = 2


CASES = (
    Case("decode-2.1", "VAE 2.1, 480p81", VAE_21, (21, 60, 104), 65.0),
    Case("decode-2.2", "VAE 2.2, 704p41", VAE_22, (11, 44, 80), 50.0, turns=1),
    Case("encode-2.1", "encode, VAE 2.1, 480p81", VAE_21, (21, 60, 104), 65.0),
    Case("encode-2.2", "encode, VAE 2.2, 704p41", VAE_22, (11, 44, 80), 50.0, turns=1),
)


def measured(bench: Bench, case: Case) -> None:
    """Run one case in each dtype and way; the first way is diffusers in fp32."""
    bench.drop_models()
    shape, grid = case.shape, case.grid
    if bench.tiny:
        shape, grid = replace(shape, base_dim=8, decoder_base_dim=8, num_res_blocks=1), (2, 2, 3)
    found: dict[str, Any] = {}
    reference: Tensor | None = None
    for short, dtype in DTYPES.items():
        torch.manual_seed(0)
        with bench.device:
            vae = cast_module(autoencoder(shape).eval().requires_grad_(False), dtype)
        calls = ways(case, vae, given(case, shape, grid, vae))
        if bench.brief:
            calls = {name: calls[name] for name in BRIEF[short]}
        rows = in_turns(bench, calls, case.turns, reference)
        if reference is None:
            reference = rows["diffusers"]["out"]
        for name, row in rows.items():
            key = BASE if (name, short) == ("diffusers", "fp32") else f"{name}, {short}"
            found[key] = row
        del vae, calls
        gc.collect()
    keep(bench, "decodes", case.title, found)


def given(case: Case, shape: VaeShape, grid: tuple[int, int, int], vae: Any) -> Tensor:
    """Return latents on the device, or pixels on the host."""
    generator = torch.Generator().manual_seed(1)
    if case.name.startswith("decode"):
        return torch.randn(1, shape.z_dim, *grid, generator=generator).to(vae.device, vae.dtype)
    frames, scale = 4 * (grid[0] - 1) + 1, shape.scale_factor_spatial
    pixels = torch.rand(1, 3, frames, grid[1] * scale, grid[2] * scale, generator=generator)
    return (pixels * 2 - 1).to(vae.dtype)


def ways(case: Case, vae: Any, values: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return each way of a decode or an encode, by its name."""
    if case.name.startswith("decode"):
        theirs, ours = decoded, streamed_decode
    else:
        theirs, ours = encoded, streamed_encode
    return {
        "diffusers": partial(theirs, vae, values),
        "unfused": partial(ours, vae, values, fuse=False),
        "lean": partial(ours, vae, values),
        "quick": partial(ours, vae, values, quick=True),
    }


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    out: Tensor = vae.decode(latents, return_dict=False)[0]
    return out.cpu()


@torch.no_grad()
def encoded(vae: Any, pixels: Tensor) -> Tensor:
    out: Tensor = vae.encode(pixels.to(vae.device)).latent_dist.mode()
    return out.cpu()


@torch.no_grad()
def streamed_decode(vae: Any, latents: Tensor, **options: bool) -> Tensor:
    chunks = []
    with lean_decoder(vae, **options) as refused:
        if refused:
            raise RuntimeError(refused)
        decoder = StreamingDecoder(vae, latents)
        while not decoder.done:
            chunks.append(decoder.decode_next().cpu())
        decoder.close()
    return torch.cat(chunks, dim=2)


@torch.no_grad()
def streamed_encode(vae: Any, pixels: Tensor, **options: bool) -> Tensor:
    rest = (pixels[:, :, i : i + 4] for i in range(1, pixels.shape[2], 4))
    with lean_encoder(vae, **options) as refused:
        if refused:
            raise RuntimeError(refused)
        out: Tensor = encode_latents(vae, iter([pixels[:, :, :1], *rest]))
    return out.cpu()


def parts(bench: Bench) -> dict[str, tuple[float, Callable[[], None]]]:
    """Return what can be measured: seconds it needs, and the work."""
    share = 0.5 if bench.brief else 1.0
    return {case.name: (case.needs * share, partial(measured, bench, case)) for case in CASES}
