"""Small instances of the real classes, with random weights from a seed, for every family.

``components(family)`` builds modules in memory, ``make_folder(path, family)`` saves them as a
diffusers folder. The numbers are small; the structure is the published one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

FAMILIES = (
    "wan2.1-t2v",
    "wan2.1-i2v",
    "wan2.1-flf2v",
    "wan2.2-t2v-a14b",
    "wan2.2-i2v-a14b",
    "wan2.2-ti2v-5b",
)
TEXT_DIM = 32
IMAGE_DIM = 16
WORDS = "a an the red green blue cat dog circle square moves right left beautiful sunset over of".split()


def make_tokenizer() -> Any:
    """A T5 tokenizer over a few words and all ASCII characters."""
    from transformers import T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0), ("▁", -4.0)]
    vocab += [("▁" + word, -3.0) for word in WORDS]
    vocab += [(chr(code), -6.0) for code in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_ids=0,
    )  # fmt: skip


def make_text_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        d_model=TEXT_DIM, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=256,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def make_image_encoder() -> tuple[Any, Any]:
    """A CLIP vision tower that gives 257 tokens, as the 2.1 image models expect."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=64, patch_size=4, projection_dim=IMAGE_DIM,
    )  # fmt: skip
    processor = CLIPImageProcessorPil(
        crop_size={"height": 64, "width": 64}, size={"shortest_edge": 64}
    )
    return CLIPVisionModel(config).eval(), processor


def make_vae(family: str, **numbers: Any) -> Any:
    from diffusers import AutoencoderKLWan

    config: dict[str, Any] = {
        "base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }  # fmt: skip
    if family == "wan2.2-ti2v-5b":
        config |= {
            "z_dim": 48, "in_channels": 12, "out_channels": 12, "is_residual": True,
            "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4,
            "latents_mean": [0.01 * i for i in range(48)],
            "latents_std": [1.0 + 0.01 * i for i in range(48)],
        }  # fmt: skip
    return AutoencoderKLWan(**(config | numbers)).eval()


def make_transformer(family: str, **numbers: Any) -> Any:
    from diffusers import WanTransformer3DModel

    config: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
        "in_channels": 16, "out_channels": 16, "text_dim": TEXT_DIM, "freq_dim": 256,
        "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
    }  # fmt: skip
    if family in ("wan2.1-i2v", "wan2.1-flf2v", "wan2.2-i2v-a14b"):
        config["in_channels"] = 36
    if family in ("wan2.1-i2v", "wan2.1-flf2v"):
        config |= {"image_dim": IMAGE_DIM, "added_kv_proj_dim": 24}
    if family == "wan2.1-flf2v":
        config["pos_embed_seq_len"] = 257 * 2
    if family == "wan2.2-ti2v-5b":
        config |= {"in_channels": 48, "out_channels": 48}
    model = WanTransformer3DModel(**(config | numbers)).eval()
    with torch.no_grad():
        if model.condition_embedder.image_embedder is not None and family == "wan2.1-flf2v":
            model.condition_embedder.image_embedder.pos_embed.normal_()
    return model


def make_scheduler() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000,
        flow_shift=3.0,
    )  # fmt: skip


def components(
    family: str, seed: int = 0, transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Build every component of a family; the same seed gives the same weights."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        parts: dict[str, Any] = {
            "tokenizer": make_tokenizer(),
            "text_encoder": make_text_encoder(),
            "vae": make_vae(family, **(vae or {})),
            "scheduler": make_scheduler(),
            "transformer": make_transformer(family, **(transformer or {})),
        }
        if family.endswith("a14b"):
            parts["transformer_2"] = make_transformer(family, **(transformer or {}))
        if family in ("wan2.1-i2v", "wan2.1-flf2v"):
            parts["image_encoder"], parts["image_processor"] = make_image_encoder()
    finally:
        torch.set_rng_state(state)
    return parts


def pipeline(family: str, parts: dict[str, Any], *, image: bool = False) -> Any:
    """Make the diffusers pipeline of a family: image-to-video where it must or ``image`` asks."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    boundary = {"wan2.2-t2v-a14b": 0.875, "wan2.2-i2v-a14b": 0.9}.get(family)
    settings: dict[str, Any] = {
        "boundary_ratio": boundary,
        "expand_timesteps": family == "wan2.2-ti2v-5b",
        "transformer_2": parts.get("transformer_2"),
    }
    modules = {
        name: part
        for name, part in parts.items()
        if name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    }
    if image or "i2v" in family and family != "wan2.2-ti2v-5b" or "flf2v" in family:
        return WanImageToVideoPipeline(
            **modules, **settings, image_encoder=parts.get("image_encoder"),
            image_processor=parts.get("image_processor"),
        )  # fmt: skip
    return WanPipeline(**modules, **settings)


def make_folder(
    path: str | Path, family: str, seed: int = 0, *, dtype: torch.dtype | None = None,
    max_shard_size: str | None = None, parts: dict[str, Any] | None = None, **numbers: Any,
) -> Path:  # fmt: skip
    """Save a family as a diffusers folder and return its path."""
    path = Path(path)
    pipe = pipeline(family, parts or components(family, seed, **numbers))
    if dtype is not None:
        pipe.to(dtype)
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    pipe.save_pretrained(path, **sharding)
    return path
