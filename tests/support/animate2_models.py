"""A small Animate 2 in diffusers' own class and in Wan's, with the same weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from support.casting import cast_module
from support.tiny_models import TEXT_DIM, make_transformer
from wan_core.loading.tokenizer import _pillow_processor

LAYERS = 11  # the unconditional pass leaves out block 9
FRAMES, HEIGHT, WIDTH = 2, 4, 6  # of the driving latents: six tokens a frame
_TOP = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "proj_out": "head.head",
}
_BLOCK = {
    "attn1": "self_attn", "attn2": "cross_attn", "norm2": "norm3", "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2", "scale_shift_table": "modulation",
}  # fmt: skip


def plain_model(dtype: torch.dtype = torch.float32, **numbers: Any) -> Any:
    """Make Wan's own class in the shape of Animate 2, with weights that matter everywhere."""
    torch.manual_seed(1)
    numbers = {"num_layers": LAYERS, "image_dim": 1280, "added_kv_proj_dim": 24} | numbers
    model = make_transformer("wan2.1-i2v", **numbers).requires_grad_(False)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.15)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm2.weight")):
            parameter.add_(1)
    return cast_module(model, dtype)


def diffusers_name(name: str) -> str:
    """Return what diffusers' class for Animate 2 calls a parameter of Wan's own class."""
    block = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    if block is None:
        if name == "scale_shift_table":
            return "head.modulation"
        stem, leaf = name.rsplit(".", 1)
        return f"{_TOP.get(stem, stem)}.{leaf}"
    rest = block[2]
    for ours, theirs in _BLOCK.items():
        if rest == ours or rest.startswith(ours + "."):
            rest = theirs + rest[len(ours) :]
            break
    return f"{block[1]}.{rest}"


def diffusers_model(plain: Any) -> Any:
    """Return diffusers' class for Animate 2 with the weights of ``plain``."""
    from diffusers import WanAnimate2Transformer3DModel

    config = plain.config
    heads, size = config.num_attention_heads, config.attention_head_dim
    model = WanAnimate2Transformer3DModel(
        in_dim=config.in_channels, dim=heads * size, ffn_dim=config.ffn_dim,
        freq_dim=config.freq_dim, text_dim=config.text_dim, num_heads=heads,
        num_layers=config.num_layers,
    ).eval()  # fmt: skip
    state = {diffusers_name(name): value for name, value in plain.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model.requires_grad_(False)


def inputs(
    seed: int = 0, batch: int = 1, frames: int = FRAMES, text_dim: int = TEXT_DIM
) -> dict[str, Tensor]:
    """Make what both streams are given; the driving mask is 1, its condition its own latents."""
    g = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    video = noise(1, 16, frames, HEIGHT, WIDTH)
    mask = torch.ones(1, 4, frames, HEIGHT, WIDTH)
    return {
        "hidden_states": noise(batch, 36, frames + 1, HEIGHT, WIDTH),
        "timestep": torch.full((batch,), 777.7),
        "encoder_hidden_states": noise(batch, 512, text_dim),
        "encoder_hidden_states_image": noise(batch, 257, 1280),
        "driving": torch.cat([video, mask, video], dim=1),
        "driving_text": noise(1, 512, text_dim),
        "driving_image": noise(1, 257, 1280),
    }


def clip_encoder() -> tuple[Any, Any]:
    """Make a CLIP of the published width, which diffusers' class for Animate 2 has built in."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(4)
    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=224, patch_size=14, projection_dim=16,
    )  # fmt: skip
    return CLIPVisionModel(config).eval(), _pillow_processor()()


def dense_flex(patch: Any) -> None:
    """Have diffusers make its block masks without a compiler, which a CPU need not have."""
    from diffusers.models.transformers import transformer_wan_animate_2 as source

    make = torch.nn.attention.flex_attention.create_block_mask

    def without_compiler(*args: Any, _compile: bool, **more: Any) -> Any:
        return make(*args, _compile=False, **more)

    patch.setattr(source, "create_block_mask", without_compiler)
