"""Prompts and images in, conditions out: umT5, CLIP vision, and the latents of given frames.

Each function equals the matching method of diffusers' ``WanPipeline`` or
``WanImageToVideoPipeline`` bit for bit. The modules passed in are ready to be called on ``device``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..job import picture_size, to_pil
from ..models import TEXT_TOKENS
from .vae import conditioning_chunks, encode_latents, normalize_latents

if TYPE_CHECKING:
    from PIL import Image


def encode_text(text_encoder: Any, tokenizer: Any, prompt: str, device: torch.device) -> Tensor:
    """Encode one prompt: (1, 512, text_dim) in the encoder's dtype, zero beyond its tokens.

    The prompt is cleaned and cut to 512 tokens as in ``WanPipeline._get_t5_prompt_embeds``;
    ``text_beyond`` says what is cut off.
    """
    tokens = tokenizer(
        [_clean(prompt)],
        padding="max_length",
        max_length=TEXT_TOKENS,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask
    hidden = text_encoder(tokens.input_ids.to(device), mask.to(device)).last_hidden_state
    # Cross attention has no mask: Wan attends to all 512 tokens, with the padding as zeros. The
    # encoder's own output for padding is not zero.
    length = int(mask.gt(0).sum())
    embeds: Tensor = torch.zeros_like(hidden)
    embeds[:, :length] = hidden[:, :length]
    return embeds


def text_beyond(tokenizer: Any, prompt: str) -> str | None:
    """Return the beginning of what is cut off a prompt of more than 512 tokens, or None.

    The last token is the end mark, so 511 are the text's.
    """
    tokens = tokenizer(
        [_clean(prompt)], padding=False, truncation=False, add_special_tokens=False, verbose=False
    ).input_ids[0]
    if len(tokens) < TEXT_TOKENS:
        return None
    beyond: str = tokenizer.decode(tokens[TEXT_TOKENS - 1 :][:16])
    return f"{beyond.strip()[:60]!r} ({len(tokens) + 1:,} tokens)"


def _clean(prompt: str) -> str:
    from diffusers.pipelines.wan import pipeline_wan

    clean: Callable[[str], str] = pipeline_wan.prompt_clean
    return clean(prompt)


def encode_clip(
    image_encoder: Any, image_processor: Any, images: Sequence[Image.Image], device: torch.device
) -> Tensor:
    """Encode one or two pictures with CLIP: (n, 257, image_dim), of the second to last layer."""
    pixels = image_processor(images=list(images), return_tensors="pt").to(device)
    output: Tensor = image_encoder(**pixels, output_hidden_states=True).hidden_states[-2]
    return output


def prepare_picture(picture: Image.Image | Tensor, width: int, height: int) -> Tensor:
    """Resize a picture to the video's size: (1, 3, height, width), float32, -1..1.

    PIL images go through diffusers' ``VideoProcessor`` (Lanczos), as in its pipelines. A tensor
    that has this size already keeps its full precision.
    """
    from diffusers.video_processor import VideoProcessor

    if isinstance(picture, Tensor) and picture_size(picture) == (width, height):
        return picture.permute(2, 0, 1).unsqueeze(0).clamp(0, 1) * 2.0 - 1.0
    processor = VideoProcessor(vae_scale_factor=8)
    prepared: Tensor = processor.preprocess(to_pil(picture), height=height, width=width)
    return prepared.to(torch.float32)


def condition_mask(num_frames: int, latent_height: int, latent_width: int, last: bool) -> Tensor:
    """Return the (1, 4, T, h, w) mask of the image-to-video models: 1 where a frame is given.

    Channel c of latent frame t stands for video frame 4 t + c - 3. The first video frame fills all
    four channels of latent frame 0 (``WanImageToVideoPipeline.prepare_latents``).
    """
    latent_frames = (num_frames - 1) // 4 + 1
    mask = torch.zeros(1, 4, latent_frames, latent_height, latent_width)
    mask[:, :, 0] = 1
    if last:
        mask[:, 3, -1] = 1
    return mask


def encode_condition(
    vae: Any,
    image: Tensor,
    *,
    num_frames: int,
    last_image: Tensor | None = None,
    device: torch.device,
    check: Callable[[], object],
) -> Tensor:
    """Return mask and latents (1, 4 + z, T, h, w), float32, for models with 36 input channels.

    The clip [image, zeros ..., last_image] is encoded in chunks of four frames and never held
    whole. ``image`` and ``last_image`` are (1, 3, H, W), -1..1; ``check`` runs before each chunk.
    """
    dtype = vae.dtype
    image = image.to(device=device, dtype=dtype)
    last = None if last_image is None else last_image.to(device=device, dtype=dtype)
    latents = encode_latents(vae, conditioning_chunks(image, num_frames, last), check=check)
    latents = normalize_latents(latents.to(torch.float32), vae.config)
    mask = condition_mask(num_frames, latents.shape[3], latents.shape[4], last is not None)
    return torch.cat([mask.to(latents.device), latents], dim=1)


def encode_first_frame(
    vae: Any, image: Tensor, *, device: torch.device, check: Callable[[], object]
) -> Tensor:
    """Return the latents (1, z, 1, h, w), float32, that the 5B keeps fixed as frame 0."""
    image = image.to(device=device, dtype=vae.dtype)
    latents = encode_latents(vae, conditioning_chunks(image, 1, None), check=check)
    return normalize_latents(latents.to(torch.float32), vae.config)
