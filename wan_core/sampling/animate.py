"""A character moved by a video: what Animate is given for a segment, and segments into frames.

Everything is encoded anew for each segment, whose VAE begins with its own first frame, as in
``WanAnimatePipeline`` of diffusers; the functions equal its methods bit for bit. Videos go through
the VAE four frames at a time and are never held as a whole on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..job import back_and_forth, to_pil
from .encode import prepare_picture
from .vae import (
    FRAMES_PER_CHUNK,
    StreamingDecoder,
    encode_latents,
    in_chunks,
    normalize_latents,
)

Check = Callable[[], object]


def prepare_character(picture: Any, width: int, height: int) -> Tensor:
    """Fit a picture into the clip's size, with black beside it: (1, 3, height, width), -1..1."""
    from diffusers.pipelines.wan.image_processor import WanAnimateImageProcessor

    processor = WanAnimateImageProcessor(resample="bilinear", fill_color=0)
    ready: Tensor = processor.preprocess(
        to_pil(picture), height=height, width=width, resize_mode="fill"
    )
    return ready.to(torch.float32)


def prepare_mask(mask: Tensor, width: int, height: int) -> Tensor:
    """Scale one mask (H, W), 0..1, to the clip's size: (1, 1, height, width), float32.

    One that has the size already keeps its full precision.
    """
    from diffusers.video_processor import VideoProcessor
    from PIL import Image

    if tuple(mask.shape) == (height, width):
        return mask.to(torch.float32)[None, None]
    processor = VideoProcessor(vae_scale_factor=8, do_normalize=False, do_convert_grayscale=True)
    grey = Image.fromarray((mask.clamp(0, 1) * 255).round().to(torch.uint8).numpy(), "L")
    ready: Tensor = processor.preprocess(grey, height=height, width=width)
    return ready.to(torch.float32)


def moved_frames(video: Tensor, frames: Iterable[int], width: int, height: int) -> Iterator[Tensor]:
    """Yield frames (1, 3, height, width) of a video (F, H, W, 3) that is played back and forth."""
    for index in frames:
        yield prepare_picture(video[back_and_forth(index, len(video))], width, height)


def encode_frames(vae: Any, frames: Iterable[Tensor], *, check: Check) -> Tensor:
    """Return the normalised latents (B, z, T, h, w) of 4n + 1 pictures, in the VAE's dtype."""
    latents = encode_latents(vae, in_chunks(frames), check=check)
    return normalize_latents(latents, vae.config)


def known_mask(known: Tensor) -> Tensor:
    """Turn a mask of video frames (B, 1, F, h, w) into the (B, 4, T, h, w) of latent frames.

    The first frame fills all four channels of latent frame 0 (``get_i2v_mask``).
    """
    first = torch.repeat_interleave(known[:, :, :1], dim=2, repeats=FRAMES_PER_CHUNK)
    packed = torch.cat([first, known[:, :, 1:]], dim=2)
    batch, _, frames, height, width = packed.shape
    folded = packed.view(batch, frames // FRAMES_PER_CHUNK, FRAMES_PER_CHUNK, height, width)
    return folded.transpose(1, 2)


def character_latents(vae: Any, picture: Any, width: int, height: int, *, check: Check) -> Tensor:
    """Return mask and latents (1, 4 + z, 1, h, w) of the character's picture."""
    ready = prepare_character(picture, width, height)
    latents = encode_frames(vae, [ready], check=check)
    return torch.cat([torch.ones_like(latents[:, :4]), latents], dim=1)


def carried_latents(
    vae: Any,
    carried: Tensor | None,
    background: Iterator[Tensor] | None,
    *,
    frames: int,
    taken: int,
    size: tuple[int, int],
    check: Check,
) -> Tensor:
    """Return the latents (B, z, T, h, w) of what of a segment of ``frames`` frames is known.

    ``carried`` (B, 3, n, H, W) are the last frames of the segment before, None for the first one;
    after them come those of the ``background``, or zeros. ``taken`` frames of the background stand
    for those carried, ``size`` is (width, height).
    """
    width, height = size
    batch = 1 if carried is None else carried.shape[0]
    blank = torch.zeros(batch, 3, height, width, dtype=vae.dtype)

    def pictures() -> Iterator[Tensor]:
        first = 0
        if carried is not None:
            first = taken
            yield from carried.unbind(2)
        for index in range(frames):
            one = blank if background is None else next(background)
            if index >= first:
                yield one.expand(batch, -1, -1, -1)

    return encode_frames(vae, pictures(), check=check)


def background_mask(
    masks: Sequence[Tensor] | Tensor | None,
    frames: range,
    *,
    known: int,
    latents: Tensor,
    size: tuple[int, int],
) -> Tensor:
    """Return which video frames are known, (1, 4, T, h, w), in the dtype of ``latents``.

    ``masks`` (N or 1, H, W), 1 = the character, are played back and forth; None makes everything
    new. The first ``known`` frames are known as a whole.
    """
    height, width = latents.shape[3:]
    if masks is None:
        found = latents.new_zeros(1, 1, len(frames), height, width)
    else:
        many = []
        for index in frames:
            one = 1 - prepare_mask(masks[back_and_forth(index, len(masks))], *size)
            many.append(F.interpolate(one, size=(height, width), mode="nearest"))
        found = torch.stack(many, dim=2).to(latents)
    found[:, :, :known] = 1
    return known_mask(found)


def last_frames(decoder: StreamingDecoder, count: int, *, check: Check) -> Tensor:
    """Decode all and return the last ``count`` frames (B, 3, count, H, W), at most 5."""
    kept: list[Tensor] = []
    try:
        while not decoder.done:
            kept = [*kept[-1:], decoder.decode_next(check=check)]
    finally:
        decoder.close()
    return torch.cat(kept, dim=2)[:, :, -count:]


class SegmentsDecoder:
    """Decodes a clip's segments one after the other, each as a video of its own.

    ``latents`` (B, z, n x T, h, w) in VAE space are those of n segments of T frames. Of every
    segment but the first, the ``carried`` video frames that it took over are left out. Used as a
    ``StreamingDecoder``, of which it has one for each segment.
    """

    def __init__(self, vae: Any, latents: Tensor, segment: int, carried: int) -> None:
        self._parts = [StreamingDecoder(vae, part) for part in torch.split(latents, segment, dim=2)]
        self._carried, self._at = carried, 0

    @property
    def vae(self) -> Any:
        """The VAE that decodes; a new one goes on where the last one was."""
        return self._parts[0].vae

    @vae.setter
    def vae(self, vae: Any) -> None:
        for part in self._parts:
            part.vae = vae

    @property
    def done(self) -> bool:
        """Whether every frame has been decoded."""
        return self._parts[-1].done

    def decode_next(self, *, check: Check | None = None) -> Tensor:
        """Decode until there are frames to hand on, and return them: (B, 3, f, H, W)."""
        while True:
            if self._parts[self._at].done:
                self._parts[self._at].close()
                self._at += 1
            part = self._parts[self._at]
            before = part.frames_done
            chunk = part.decode_next(check=check)
            left = max(0, self._carried - before) if self._at else 0
            if chunk.shape[2] > left:
                return chunk[:, :, left:]

    def go_on_from(self, other: SegmentsDecoder) -> None:
        """Continue where another decoder of the same clip is."""
        self._at = other._at
        for part, before in zip(self._parts, other._parts, strict=True):
            part.go_on_from(before)

    def take_back(self, chunk: Tensor) -> None:
        """Count the chunk that ``decode_next`` returned last as not decoded."""
        self._parts[self._at].take_back(chunk)

    def close(self) -> None:
        """Free what the decoders hold; a later call makes it again."""
        for part in self._parts:
            part.close()
