"""The real classes in their published shapes; build them on meta or where there is room."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from support.dry_run import DryModel
from wan_core.models.variants import TransformerShape, VaeShape

KEEP_FP32 = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def transformer(shape: TransformerShape, layers: int | None = None) -> torch.nn.Module:
    """A transformer of published shape, with so many blocks (None: all)."""
    import diffusers
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    kind: Any = WanTransformer3DModel
    more: dict[str, Any] = {}
    if shape.vace_layers:
        kind = WanVACETransformer3DModel
        more = {"vace_layers": list(shape.vace_layers), "vace_in_channels": shape.vace_in_channels}
    if shape.face is not None:
        kind = diffusers.WanAnimateTransformer3DModel
        more = {"inject_face_latents_blocks": shape.face_every}
    model: torch.nn.Module = kind(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_dim,
        ffn_dim=shape.ffn_dim,
        num_layers=shape.layers if layers is None else layers,
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        text_dim=shape.text_dim,
        image_dim=shape.image_dim,
        added_kv_proj_dim=shape.added_kv_dim,
        pos_embed_seq_len=shape.pos_embed_seq_len,
        **more,
    )
    return model


@cache
def dry_transformer(
    shape: TransformerShape, dtype: str, layers: int | None = None, fp32: tuple[str, ...] = ()
) -> DryModel:
    """The same without memory; ``fp32`` are parts that stay in float32 besides ``KEEP_FP32``."""
    return DryModel(lambda: transformer(shape, layers), DTYPES[dtype], (*KEEP_FP32, *fp32))


def autoencoder(shape: VaeShape) -> torch.nn.Module:
    """A VAE of published shape."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=shape.base_dim,
        decoder_base_dim=shape.decoder_base_dim,
        z_dim=shape.z_dim,
        dim_mult=list(shape.dim_mult),
        num_res_blocks=shape.num_res_blocks,
        temperal_downsample=list(shape.temporal_downsample),
        is_residual=shape.is_residual,
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        patch_size=shape.patch_size,
        scale_factor_spatial=shape.scale_factor_spatial,
        latents_mean=list(shape.latents_mean),
        latents_std=list(shape.latents_std),
    )


@cache
def dry_vae(shape: VaeShape, dtype: str) -> DryModel:
    """The same without memory."""
    return DryModel(lambda: autoencoder(shape), DTYPES[dtype])
