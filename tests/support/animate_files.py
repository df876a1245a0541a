"""Small weights of both Animate models, in the layouts and under the names of published files.

Names and shapes are those of the official code; only widths and depths are less. Animate 2 is
stored in rotated int8, Animate 1 in fp8 with the old marker, as the files that people have.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from support import reference_layouts as layouts
from support import single_files, stored_files, wan_layouts
from support.animate2_models import clip_encoder
from support.tiny_models import TEXT_DIM

ANIMATE = "Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ.safetensors"
ANIMATE_2 = "wan_animate_2_distill_int8_convrot.safetensors"
DEEP_2 = "wan_animate_2_int8_convrot.safetensors"
"""Of 40 blocks, as the published file: a segment of it lasts."""
CLIP = "clip_vision_h.safetensors"
DIM, FFN = 128, 256  # a head is 128 wide in every published model


def shapes(number: int, layers: int = 0, dim: int = DIM, ffn: int = FFN) -> wan_layouts.Shapes:
    """Return the tensors of a small Animate (``number`` 1) or Animate 2 under official names."""
    faces = wan_layouts.animate(
        dim, adapters=1, widths=(4, 4, 4, 4, 8, 8, 8, 8), style=16, motion=5, hidden=8
    )
    extra = faces if number == 1 else None
    found = wan_layouts.transformer(
        dim, ffn, layers or (5 if number == 1 else 10), 36, image=True, extra=extra
    )
    return found | {"text_embedding.0.weight": (dim, TEXT_DIM)}


def random_state(of: wan_layouts.Shapes, seed: int = 5) -> layouts.State:
    """Return random weights of these shapes; those of norms are about 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.1 + ("norm" in name)
        for name, shape in of.items()
    }


def write(models: Path) -> None:
    """Put the transformers, a text encoder, a VAE and a CLIP into ComfyUI's folders."""
    single_files.write(models)
    shutil.copy(models / "vae" / single_files.VAE, models / "vae" / "Wan2_1_VAE_bf16.safetensors")
    for name, layers in ((ANIMATE_2, 10), (DEEP_2, 40)):
        _store(models / "diffusion_models" / name, shapes(2, layers), "int8_convrot", "notes")
    _store(models / "diffusion_models" / ANIMATE, shapes(1), "fp8_scaled", "old")
    write_clip(models / "clip_vision" / CLIP)


def write_clip(path: Path) -> Path:
    """Write the CLIP, under the names of transformers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return stored_files.write(path, layouts.state_of(clip_encoder()[0]))


def _store(path: Path, of: wan_layouts.Shapes, kind: str, style: str) -> None:
    state = random_state(of)
    chosen = {
        name
        for name, value in state.items()
        if name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2
    }
    tensors, metadata, _ = stored_files.pack(state, chosen, kind, style)
    stored_files.write(path, tensors, metadata)
