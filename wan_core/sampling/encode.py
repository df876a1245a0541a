"""Prompts and images in, conditions out: umT5, CLIP vision, and the latents of given frames.

Each function equals the matching method of diffusers' ``WanPipeline`` or
``WanImageToVideoPipeline`` bit for bit. The modules passed in are ready to be called on ``device``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..job import picture_size, to_pil
from ..models import TEXT_TOKENS
from .vae import FRAMES_PER_CHUNK, encode_latents, normalize_latents

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


def keyframe_mask(
    positions: Collection[int], num_frames: int, latent_height: int, latent_width: int
) -> Tensor:
    """Return the (1, 4, T, h, w) mask of the image-to-video models: 1 where a frame is given.

    Channel c of latent frame t stands for video frame 4 t + c - 3; the first video frame fills all
    four channels of latent frame 0 (``WanImageToVideoPipeline.prepare_latents``).
    """
    frames = (num_frames - 1) // FRAMES_PER_CHUNK + 1
    mask = torch.zeros(1, 4, frames, latent_height, latent_width)
    for position in positions:
        if position == 0:
            mask[:, :, 0] = 1
        else:
            mask[:, (position - 1) % 4, (position - 1) // 4 + 1] = 1
    return mask


def keyframe_chunks(frames: Mapping[int, Tensor], num_frames: int) -> Iterator[Tensor]:
    """Yield the chunks of a video that is 0 (grey) but for the frames given, (B, 3, H, W) each.

    With the first frame, or the first and the last one, it is the conditioning video of
    ``WanImageToVideoPipeline.prepare_latents``, which is never held whole here.
    """
    some = next(iter(frames.values()))
    blank = some.new_zeros(some.shape[0], some.shape[1], FRAMES_PER_CHUNK, *some.shape[2:])
    yield frames[0].unsqueeze(2) if 0 in frames else blank[:, :, :1]
    for start in range(1, num_frames, FRAMES_PER_CHUNK):
        known = {at: frames[at] for at in range(start, start + FRAMES_PER_CHUNK) if at in frames}
        if not known:
            yield blank
            continue
        chunk = blank.clone()
        for at, picture in known.items():
            chunk[:, :, at - start] = picture.to(chunk)
        yield chunk


def encode_keyframes(
    vae: Any,
    frames: Mapping[int, Tensor],
    *,
    num_frames: int,
    device: torch.device,
    check: Callable[[], object],
) -> Tensor:
    """Return mask and latents (1, 4 + z, T, h, w), float32, for models with 36 input channels.

    ``frames`` are (1, 3, H, W), -1..1, by their video frame; ``num_frames`` is 4n + 1. ``check``
    runs before each chunk of four frames.
    """
    ready = {at: one.to(device=device, dtype=vae.dtype) for at, one in frames.items()}
    latents = encode_latents(vae, keyframe_chunks(ready, num_frames), check=check)
    latents = normalize_latents(latents.to(torch.float32), vae.config)
    mask = keyframe_mask(frames, num_frames, latents.shape[3], latents.shape[4])
    return torch.cat([mask.to(latents.device), latents], dim=1)


def encode_first_frame(
    vae: Any, image: Tensor, *, device: torch.device, check: Callable[[], object]
) -> Tensor:
    """Return the latents (1, z, 1, h, w), float32, of one picture, (1, 3, H, W), -1..1."""
    chunk = image.to(device=device, dtype=vae.dtype).unsqueeze(2)
    latents = encode_latents(vae, [chunk], check=check)
    return normalize_latents(latents.to(torch.float32), vae.config)
