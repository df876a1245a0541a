"""The demo's two models that obey a control, on top of its text-to-video experts.

`Vace` adds VACE blocks to an expert that stays as it is; `Fun` is an expert with more input
channels and a layer for a reference, as Wan 2.2 Fun Control. Both are made to be trained: they
encode lessons as `wan_core` encodes the same pixels, and are called alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor, nn

from . import control_clips
from . import demo_models as models

MASK_CHANNELS, CELL = 64, 8
FUN_CHANNELS = 36
"""What a Fun model reads beside the noisy latents: control video 16, mask 4, known frames 16."""
LAYERS = 6
"""VACE blocks: one for each block of the demo's transformer."""

Encode = Callable[[Tensor], Tensor]
"""Clips (N, 3, F, H, W) in -1..1 -> their normalised latents."""


class Vace:
    """VACE: a control of 96 channels for blocks of their own."""

    name = "vace"
    kinds = (control_clips.KINDS, control_clips.KINDS_WITH_REFERENCE)
    peak = 1e-3

    @staticmethod
    def build(expert: WanTransformer3DModel, layers: int = LAYERS) -> Any:
        """Return a VACE transformer around an expert that still computes what the expert does.

        Its VACE blocks begin as copies of the blocks their hints are added to, and their last
        projection as zeros. Only the VACE part can be trained.
        """
        config = {k: v for k, v in expert.config.items() if not k.startswith("_")}
        where = [index * config["num_layers"] // layers for index in range(layers)]
        model: Any = WanVACETransformer3DModel(**config, vace_layers=where, vace_in_channels=96)
        model.load_state_dict(expert.state_dict(), strict=False)
        for block, layer in zip(model.vace_blocks, where, strict=True):
            block.load_state_dict(expert.blocks[layer].state_dict(), strict=False)
            nn.init.zeros_(block.proj_out.weight)
            nn.init.zeros_(block.proj_out.bias)
        model.requires_grad_(False)
        for part in Vace.parts(model).values():
            part.requires_grad_(True)
        return model

    @staticmethod
    def parts(model: Any) -> dict[str, nn.Module]:
        """Return what a VACE module holds, by the beginning of its names."""
        return {
            "vace_patch_embedding.": model.vace_patch_embedding,
            "vace_blocks.": model.vace_blocks,
        }

    @staticmethod
    def encode(lessons: control_clips.Lessons, encode: Encode) -> tuple[Tensor, Tensor]:
        """Return what is to be made, (N, 16, R + T, h, w), and the control, (N, 96, R + T, h, w).

        The control is the latents of what the mask keeps, of what it covers, and the mask, behind
        R references (0 or 1).
        """
        video, hard = lessons.video * 2 - 1, (lessons.mask[:, None] > 0.5).float()
        made = encode(as_bytes(lessons.clip))
        shown = torch.cat([encode(video * (1 - hard)), encode(video * hard)], 1)
        mask = mask_channels(lessons.mask)
        if lessons.referenced:
            picture = encode(lessons.reference[:, :, None] * 2 - 1)
            made = torch.cat([picture, made], 2)
            front = torch.cat([picture, torch.zeros_like(picture)], 1)
            shown, mask = torch.cat([front, shown], 2), F.pad(mask, (0, 0, 0, 0, 1, 0))
        return made, torch.cat([shown, mask], 1)

    @staticmethod
    def call(model: Any, noisy: Tensor, control: Tensor, when: Tensor, text: Tensor) -> Tensor:
        """Return what a model predicts."""
        out: Tensor = model(
            noisy, when, text, control_hidden_states=control, return_dict=False
        )[0]  # fmt: skip
        return out


class Fun:
    """Fun Control: a control video, known frames and a reference, in further input channels."""

    name = "fun"
    kinds = (control_clips.FUN_KINDS, control_clips.FUN_KINDS_WITH_REFERENCE)
    peak = 6e-4

    @staticmethod
    def build(expert: WanTransformer3DModel, layers: int = LAYERS) -> Any:
        """Return a copy of an expert with the channels of Fun Control A14B and its ``ref_conv``.

        All of it can be trained. ``layers`` is for VACE alone.
        """
        wide: Any = models.build_transformer(in_channels=16 + FUN_CHANNELS)
        state = expert.state_dict()
        kernel = state["patch_embedding.weight"]
        padded = kernel.new_zeros(kernel.shape[0], 16 + FUN_CHANNELS, *kernel.shape[2:])
        padded[:, :16] = kernel
        wide.load_state_dict({**state, "patch_embedding.weight": padded})
        wide.add_module("ref_conv", nn.Conv2d(16, kernel.shape[0], 2, stride=2))
        return wide

    @staticmethod
    def parts(model: Any) -> dict[str, nn.Module]:
        """Return the whole model."""
        return {"": model}

    @staticmethod
    def encode(lessons: control_clips.Lessons, encode: Encode) -> tuple[Tensor, Tensor]:
        """Return what is to be made, (N, 16, T, h, w), and the control, (N, 36, 1 + T, h, w).

        The first frame's first 16 channels are the reference's latents. What is not shown is zero.
        """
        names = lessons.kinds
        made = encode(as_bytes(lessons.clip))
        shown = encode(lessons.video * 2 - 1)

        def of(*wanted: str) -> Tensor:
            chosen = [i for i, name in enumerate(names) if name.split()[-1] in wanted]
            numbers = torch.tensor(chosen, device=made.device, dtype=torch.long)
            return torch.isin(lessons.kind, numbers)[:, None, None, None, None]

        followed, known = of("edges", "dot"), of("frames")
        mask = torch.where(known, known_channels(1 - lessons.mask), 0)
        control = torch.cat(
            [torch.where(followed, shown, 0), mask, torch.where(known, shown, 0)], 1
        )
        control = F.pad(control, (0, 0, 0, 0, 1, 0))
        if lessons.referenced:
            control[:, :16, :1] = encode(lessons.reference[:, :, None] * 2 - 1)
        return made, control

    @staticmethod
    def call(model: Any, noisy: Tensor, control: Tensor, when: Tensor, text: Tensor) -> Tensor:
        """Return what a model predicts: the reference's tokens stand in front of the clip's."""
        reference = control[:, :16, 0]

        def put(module: nn.Module, given: object, tokens: Tensor) -> Tensor:
            return torch.cat([model.ref_conv(reference)[:, :, None], tokens[:, :, 1:]], 2)

        whole = F.pad(torch.cat([noisy, control[:, :, 1:]], 1), (0, 0, 0, 0, 1, 0))
        hook = model.patch_embedding.register_forward_hook(put)
        try:
            out: Tensor = model(whole, when, text, return_dict=False)[0]
        finally:
            hook.remove()
        return out[:, :, 1:]


Sort = type[Vace] | type[Fun]
SORTS: Mapping[str, Sort] = {"vace": Vace, "fun": Fun}


def as_bytes(clip: Tensor) -> Tensor:
    """Return clips in 0..1 as -1..1, rounded as a saved video's are."""
    return (clip * 255).round() / 127.5 - 1


def mask_channels(mask: Tensor) -> Tensor:
    """Return masks (N, F, H, W) as VACE reads them, (N, 64, T, h, w): see `wan_core.sampling`."""
    count, frames, height, width = mask.shape
    made = (frames - 1) // 4 + 1
    picked = F.interpolate(mask[:, None], (made, height, width), mode="nearest-exact")[:, 0]
    cells = picked.view(count, made, height // CELL, CELL, width // CELL, CELL)
    return cells.permute(0, 3, 5, 1, 2, 4).reshape(
        count, MASK_CHANNELS, made, height // CELL, width // CELL
    )


def known_channels(known: Tensor) -> Tensor:
    """Return which frames are known (N, F, H, W), 1 or 0 each, as (N, 4, T, h, w).

    The first frame fills all channels of latent frame 0, the others one channel each.
    """
    flags = known[:, :, ::CELL, ::CELL]
    whole = torch.cat([flags[:, :1].expand(-1, 3, -1, -1), flags], 1)
    return whole.unflatten(1, (-1, 4)).transpose(1, 2)
