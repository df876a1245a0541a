"""What a file that is not part of a Wan model is, and what a LoRA is for, from tensor names alone.

Used only for messages: a user who picked the wrong file is told what it is. The tensor names are
those that ComfyUI's ``model_detection.py`` and the models' own code use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from ..files import some_of
from ..formats import TensorInfo, TensorTable
from ..models import is_wan_linear, read_lora_key

# (what it is, texts that must all occur in its tensor names). The first match decides.
_FOREIGN: Final = (
    (
        "a MultiTalk module without its base model",
        ("audio_cross_attn", "audio_proj"),
    ),
    ("a FantasyTalking module without its base model", ("cross_attn.processor.k_proj",)),
    ("a Lynx adapter without its base model", ("cross_attn.ip_adapter.to_k_ip",)),
    ("a FantasyPortrait module without its base model", ("ip_adapter_single_stream",)),
    ("a Uni3C control network", ("controlnet_patch_embedding.weight",)),
    ("a LongCat-Video transformer", ("blocks.0.adaLN_modulation.1", "y_embedder.y_proj")),
    ("a FLUX transformer", ("double_blocks.0.img_attn", "single_blocks.0.linear1", "img_in")),
    ("a HunyuanVideo transformer", ("txt_in.individual_token_refiner",)),
    ("a FLUX transformer", ("single_transformer_blocks.0.", "x_embedder.weight")),
    ("a Qwen-Image transformer", ("transformer_blocks.0.attn.add_q_proj", "txt_norm.weight")),
    ("a Stable Diffusion 3 transformer", ("joint_blocks.0.", "context_embedder.weight")),
    ("a Stable Diffusion 3 transformer", ("transformer_blocks.0.norm1_context", "pos_embed.proj")),
    ("an LTX-Video transformer", ("patchify_proj.weight", "adaln_single")),
    ("an LTX-Video transformer", ("transformer_blocks.0.scale_shift_table", "proj_in.weight")),
    ("a Lumina or Z-Image transformer", ("noise_refiner.0.", "context_refiner.0.")),
    ("a CogVideoX transformer", ("transformer_blocks.0.norm1.linear", "patch_embed.text_proj")),
    ("a Mochi transformer", ("blocks.0.attn.qkv_x", "t5_yproj")),
    ("a Cosmos transformer", ("blocks.block0.", "t_embedder")),
    ("a Stable Diffusion XL checkpoint", ("conditioner.embedders.", "input_blocks.")),
    ("a Stable Diffusion 1 or 2 checkpoint", ("cond_stage_model.", "input_blocks.")),
    ("a Stable Diffusion XL model", ("label_emb.0.0", "input_blocks.")),
    ("a Stable Diffusion model", ("input_blocks.0.0.weight", "middle_block.")),
    ("a ControlNet", ("controlnet_cond_embedding",)),
    ("a ControlNet", ("controlnet_blocks.",)),
    ("a wav2vec2 audio encoder", ("feature_extractor.conv_layers.0", "encoder.layers.0")),
    ("a LLaMA-like language model", ("model.layers.0.self_attn.q_proj", "model.embed_tokens")),
    ("a LLaMA-like language model", ("blk.0.attn_q.weight", "blk.0.ffn_gate.weight")),
    ("a BERT-like text encoder", ("encoder.layer.0.attention.self.query",)),
    ("a CLIP text encoder", ("text_model.encoder.layers.0.",)),
    ("a CLIP text encoder", ("transformer.resblocks.0.", "token_embedding.weight")),
    ("a T5 text encoder", ("block.0.layer.0.SelfAttention", "DenseReluDense")),
    ("a small preview VAE (TAESD or TAEHV)", ("decoder.1.weight", "decoder.3.conv.0.weight")),
    ("an image VAE (Stable Diffusion or FLUX)", ("decoder.mid.block_1.", "encoder.conv_in")),
    ("an image VAE (Stable Diffusion or FLUX)", ("decoder.mid_block.resnets.0.conv1", "encoder.")),
    ("an upscaler (ESRGAN)", ("RDB1.conv1", "conv_first")),
    ("an upscaler (ESRGAN)", ("body.0.rdb1.conv1",)),
)

_LORA_BASES: Final = (
    ("FLUX", ("double_blocks", "single_transformer_blocks", "single_blocks")),
    ("Stable Diffusion", ("lora_unet_down_blocks", "lora_unet_input_blocks", "unet.down_blocks")),
    ("Qwen-Image", ("add_q_proj",)),
    ("LTX-Video", ("adaln_single", "patchify_proj")),
)


def lora_width(names: Mapping[str, TensorInfo]) -> int | None:
    """Return the width of the Wan model that a LoRA is made for; None if it is not for Wan."""
    for name, info in names.items():
        key = read_lora_key(name)
        reads = key is not None and key.role in ("down", "hada_w1_b") and is_wan_linear(key.stem)
        if reads and len(info.shape) >= 2:
            return info.shape[1]
    return None


def lora_title(names: Mapping[str, TensorInfo]) -> str:
    """Return "a LoRA for …" in words; another kind of adapter by its own name."""
    keys = [key for key in map(read_lora_key, names) if key is not None]
    kind = next((key.adapter for key in keys if key.adapter), "LoRA")
    what = "a LoRA" if kind == "LoRA" else f"an adapter of the kind {kind}"
    width = lora_width(names)
    if width is not None:
        return f"{what} for Wan (width {width})"
    if any(is_wan_linear(key.stem) for key in keys):
        return f"{what} for Wan"
    base = lora_base(names)
    return what if base is None else f"{what} for {base}"


def lora_base(names: Iterable[str]) -> str | None:
    """Return the other model that a LoRA is for; None for one of Wan or of a model unknown here."""
    text = "\n".join(names)
    return next((base for base, marks in _LORA_BASES if any(mark in text for mark in marks)), None)


_PART: Final = re.compile(r"-(\d{5})-of-(\d{5})\.\w+")


def part_of_several(table: TensorTable) -> tuple[str, str]:
    """Return what a file is that holds a part of a model's tensors, and what to choose instead.

    Both are empty for a file that stands alone, and for several that were opened together.
    """
    found = _PART.search(table.path.name)
    if found is None or int(found[2]) < 2 or len(table.files) > 1:
        return "", ""
    advice = (
        f"Choose the folder that holds all of them, {str(table.path.parent)!r}, or their index."
    )
    if table.format == "gguf":
        advice = "Join them into one file first: llama-gguf-split --merge, with the first of them."
    return f"part {int(found[1])} of {int(found[2])} of a model in several files", advice


def unsupported_title(table: TensorTable) -> str:
    """Return in words what a file is that is not part of a Wan model."""
    part, _ = part_of_several(table)
    if part:
        return part
    text = "\n".join(table.tensors)
    for title, marks in _FOREIGN:
        if all(mark in text for mark in marks):
            return title
    architecture = table.metadata.get("general.architecture")
    if architecture:
        return f"a GGUF model of architecture {architecture[:40]!r}"
    return f"an unknown model ({len(table.tensors):,} tensors: {some_of(list(table.tensors))})"
