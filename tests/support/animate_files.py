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
CLIP = "clip_vision_h.safetensors"
DIM, FFN = 128, 256  # a head is 128 wide in every published model


def write(models: Path) -> None:
    """Put both transformers, a text encoder, a VAE and a CLIP into ComfyUI's folders."""
    single_files.write(models)
    shutil.copy(models / "vae" / single_files.VAE, models / "vae" / "Wan2_1_VAE_bf16.safetensors")
    faces = wan_layouts.animate(
        DIM, adapters=1, widths=(4, 4, 4, 4, 8, 8, 8, 8), style=16, motion=5, hidden=8
    )
    two = wan_layouts.transformer(DIM, FFN, 10, 36, image=True)
    one = wan_layouts.transformer(DIM, FFN, 5, 36, image=True, extra=faces)
    _store(models / "diffusion_models" / ANIMATE_2, two, "int8_convrot", "notes")
    _store(models / "diffusion_models" / ANIMATE, one, "fp8_scaled", "old")
    (models / "clip_vision").mkdir(parents=True, exist_ok=True)
    stored_files.write(models / "clip_vision" / CLIP, layouts.state_of(clip_encoder()[0]))


def _store(path: Path, shapes: wan_layouts.Shapes, kind: str, style: str) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = shapes | {"text_embedding.0.weight": (DIM, TEXT_DIM)}
    state = {
        name: torch.randn(shape, generator=generator) * 0.1 + ("norm" in name)
        for name, shape in shapes.items()
    }
    chosen = {
        name
        for name, shape in shapes.items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
    }
    tensors, metadata, _ = stored_files.pack(state, chosen, kind, style)
    stored_files.write(path, tensors, metadata)
