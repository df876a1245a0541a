"""Streamed VAE: latents in, frames out one latent frame at a time, and the way back.

Wan's VAE is causal in time: a latent frame needs only the feature cache its predecessors left.
``AutoencoderKLWan`` (diffusers) walks the frames with that cache too, but holds the whole video
and keeps the cache on the model. Here the cache belongs to the caller of each function, so that
threads share one VAE, a failure leaves nothing behind, and memory does not grow with the clip.
Every function gives the bits of ``vae.decode`` / ``vae.encode`` without tiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidRequest

FRAMES_PER_CHUNK = 4
"""Frames the encoder takes per call after the first frame (``AutoencoderKLWan._encode``)."""

Check = Callable[[], object]


class StreamingDecoder:
    """Decodes ``latents`` one latent frame per call, and may be continued after a failure.

    ``latents`` is (B, z, T, h, w) in VAE space (``denormalize_latents``), on any device. Each
    chunk is (B, 3, f, H, W) in the VAE's dtype and device, within -1..1, f = 1 for the first
    latent frame and 4 for the others. When ``decode_next`` raises, ``position`` has not moved
    and it may be called again, on the same or another placement of the VAE: the feature cache is
    freed at the failure and built again from the earlier latent frames, so that going on needs
    no more memory than the decoder itself.
    """

    def __init__(self, vae: Any, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[2] < 1:
            raise InvalidRequest(
                f"latents have shape {tuple(latents.shape)}; the decoder takes (batch, channels, "
                "frames >= 1, height, width).",
                field="latents",
            )
        self.vae = vae
        self.position = 0
        self.frames_done = 0
        self._latents = latents
        self._projected: Tensor | None = None
        self._cache: list[Any] | None = None  # None: not started, closed, or lost to a failure
        self._fed = 0  # latent frames the cache has seen

    @property
    def output_shape(self) -> tuple[int, int, int, int, int]:
        """(B, F, H, W, 3) of the whole decoded clip."""
        batch, _, frames, height, width = self._latents.shape
        config = self.vae.config
        in_space = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        in_time = 2 ** sum(config.temperal_downsample)
        return (batch, 1 + (frames - 1) * in_time, height * in_space, width * in_space, 3)

    @property
    def done(self) -> bool:
        """Whether every latent frame has been decoded."""
        return self.position >= self._latents.shape[2]

    def decode_next(self, *, check: Check | None = None) -> Tensor:
        """Decode the latent frame at ``position``; ``check`` runs before each latent frame."""
        chunk = self._reach_position(check)
        self._commit(chunk)
        return chunk

    def decode_into(self, out: Tensor, *, check: Check | None = None) -> Tensor:
        """Decode what is left into ``out`` (B, F, H, W, 3), values 0..1, and return ``out``.

        Frames already decoded are expected to be in ``out``: after a failure, call it again.
        """
        if tuple(out.shape) != self.output_shape:
            raise InvalidRequest(
                f"out has shape {tuple(out.shape)}; these latents decode to {self.output_shape}.",
                field="out",
            )
        while not self.done:
            chunk = self._reach_position(check)
            end = self.frames_done + chunk.shape[2]
            out[:, self.frames_done : end].copy_(_channels_last_unit(chunk))
            self._commit(chunk)  # only now: the copy may run out of memory too
        self.close()
        return out

    def close(self) -> None:
        """Free the feature cache and the projected latents; a later call starts them anew."""
        if self._cache is not None:
            self._cache.clear()
        self._cache = None
        self._projected = None

    def _commit(self, chunk: Tensor) -> None:
        self.position += 1
        self.frames_done += chunk.shape[2]

    def _reach_position(self, check: Check | None) -> Tensor:
        if self._cache is None or self._fed > self.position:
            self._cache, self._fed = _empty_cache(self.vae.decoder), 0
        while self._fed < self.position:
            self._decode(self._cache, check)
        return self._decode(self._cache, check)

    def _decode(self, cache: list[Any], check: Check | None) -> Tensor:
        if check is not None:
            check()
        try:
            chunk = self._run(self._fed, cache)
        except BaseException:
            # A traceback may hold this frame: empty the list, so that the tensors go at once.
            cache.clear()
            self._cache = None
            raise
        self._fed += 1
        return chunk

    @torch.no_grad()
    def _run(self, index: int, cache: list[Any]) -> Tensor:
        device = _bring_in(self.vae)
        if self._projected is None:
            # Over all frames at once, as diffusers does: a convolution of another shape may
            # round otherwise. Kept where the latents are, which may be the host.
            latents = self._latents.to(device=device, dtype=self.vae.dtype)
            self._projected = self.vae.post_quant_conv(latents).to(self._latents.device)
        frame = self._projected[:, :, index : index + 1].to(device)
        chunk: Tensor = self.vae.decoder(
            frame, feat_cache=cache, feat_idx=[0], first_chunk=index == 0
        )
        if self.vae.config.patch_size is not None:
            chunk = _model_code().unpatchify(chunk, patch_size=self.vae.config.patch_size)
        return chunk.clamp_(-1.0, 1.0)


def decode_frames(vae: Any, latents: Tensor, *, check: Check | None = None) -> Iterator[Tensor]:
    """Yield the chunks (B, 3, f, H, W) of ``vae.decode(latents).sample``, within -1..1.

    The feature cache is freed when the iterator ends, fails or is closed. For work that goes on
    after a failure use ``StreamingDecoder``. ``check`` runs before each latent frame.
    """
    decoder = StreamingDecoder(vae, latents)
    try:
        while not decoder.done:
            yield decoder.decode_next(check=check)
    finally:
        decoder.close()


def decode_to_tensor(
    vae: Any, latents: Tensor, *, out: Tensor | None = None, check: Check | None = None
) -> Tensor:
    """Decode (B, z, T, h, w) latents in VAE space to float32 frames (B, F, H, W, 3), 0..1.

    Frames are copied to ``out`` (by default a new tensor on the CPU) as they are decoded. The
    values are those of diffusers' ``VideoProcessor.postprocess_video(..., "np")``.
    """
    decoder = StreamingDecoder(vae, latents)
    try:
        if out is None:
            out = torch.empty(decoder.output_shape, dtype=torch.float32, device="cpu")
        return decoder.decode_into(out, check=check)
    finally:
        decoder.close()


def to_frames(chunk: Tensor) -> Tensor:
    """Turn a decoded chunk (B, 3, f, H, W), -1..1, into float32 (B, f, H, W, 3), 0..1, on the CPU.

    Scaled in the chunk's dtype before it becomes float32, as ``VideoProcessor`` does.
    """
    return _channels_last_unit(chunk).to(device="cpu", dtype=torch.float32)


@torch.no_grad()
def encode_latents(vae: Any, chunks: Iterable[Tensor], *, check: Check | None = None) -> Tensor:
    """Encode a video given as chunks to the mode of its latents, (B, z, T, h, w), in VAE space.

    ``chunks`` are (B, 3, 1, H, W) and then (B, 3, 4, H, W) each, values -1..1, any dtype and
    device (see ``conditioning_chunks``); only one is held at a time. Equals
    ``vae.encode(video).latent_dist.mode()``. ``check`` runs before each chunk.
    """
    cache = _empty_cache(vae.encoder)
    pieces: list[Tensor] = []
    for chunk in chunks:
        wanted = FRAMES_PER_CHUNK if pieces else 1
        if chunk.ndim != 5 or chunk.shape[2] != wanted:
            raise InvalidRequest(
                f"chunk {len(pieces)} of the video to encode has shape {tuple(chunk.shape)}; it "
                f"must be (batch, 3, {wanted}, height, width).",
                field="image",
            )
        if check is not None:
            check()
        chunk = chunk.to(device=_bring_in(vae), dtype=vae.dtype)
        if vae.config.patch_size is not None:
            chunk = _model_code().patchify(chunk, patch_size=vae.config.patch_size)
        pieces.append(vae.encoder(chunk, feat_cache=cache, feat_idx=[0]))
    if not pieces:
        raise InvalidRequest("The video to encode has no frames; give at least one.", field="image")
    mean: Tensor = vae.quant_conv(torch.cat(pieces, dim=2)).chunk(2, dim=1)[0]
    return mean


def conditioning_chunks(
    image: Tensor, num_frames: int, last_image: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield the chunks of the video [image, 0, ..., 0] or [image, 0, ..., 0, last_image].

    ``image`` and ``last_image`` are (B, 3, H, W), -1..1; ``num_frames`` is 4n + 1. This is the
    conditioning video of ``WanImageToVideoPipeline.prepare_latents``, never held as a whole.
    """
    if num_frames < 1 or num_frames % FRAMES_PER_CHUNK != 1:
        raise InvalidRequest(
            f"num_frames is {num_frames}; the encoder takes 4n + 1 frames (1, 5, 9, ... 81).",
            field="num_frames",
        )
    if last_image is not None and (num_frames == 1 or last_image.shape != image.shape):
        raise InvalidRequest(
            f"last_image has shape {tuple(last_image.shape)} in a clip of {num_frames} frames; "
            f"it must have the first image's shape {tuple(image.shape)}, in 5 frames or more.",
            field="last_image",
        )
    yield image.unsqueeze(2)
    blank = image.new_zeros(image.shape[0], image.shape[1], FRAMES_PER_CHUNK, *image.shape[2:])
    chunks = (num_frames - 1) // FRAMES_PER_CHUNK
    for index in range(chunks):
        if last_image is not None and index == chunks - 1:
            yield torch.cat([blank[:, :, 1:], last_image.to(blank).unsqueeze(2)], dim=2)
        else:
            yield blank


def normalize_latents(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """VAE space to the transformer's space, (x - mean) * (1 / std), in the latents' dtype.

    ``config`` is the VAE's. Same operations in the same order as ``WanImageToVideoPipeline``.
    """
    mean, inverse_std = _statistics(latents, config)
    return (latents - mean) * inverse_std


def denormalize_latents(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The transformer's space to VAE space, x / (1 / std) + mean, in the latents' dtype.

    ``config`` is the VAE's. diffusers' pipelines do this after casting the latents to the VAE's
    dtype; do so too where the same bits are wanted.
    """
    mean, inverse_std = _statistics(latents, config)
    return latents / inverse_std + mean


def _statistics(latents: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    # The reciprocal is rounded in the latents' dtype, and multiplied or divided by: x * std
    # would be nearer the truth and not what the pipelines compute.
    mean = torch.tensor(config["latents_mean"]).view(1, -1, 1, 1, 1).to(latents)
    std = torch.tensor(config["latents_std"]).view(1, -1, 1, 1, 1).to(latents)
    return mean, 1.0 / std


def _channels_last_unit(chunk: Tensor) -> Tensor:
    return (chunk * 0.5 + 0.5).clamp_(0, 1).permute(0, 2, 3, 4, 1)


def _empty_cache(module: torch.nn.Module) -> list[Any]:
    convolution = _model_code().WanCausalConv3d
    return [None] * sum(isinstance(part, convolution) for part in module.modules())


def _model_code() -> Any:
    from diffusers.models.autoencoders import autoencoder_kl_wan

    return autoencoder_kl_wan


def _bring_in(vae: Any) -> torch.device:
    """Let an offload hook of the VAE act, which sits on ``decode``, and name the device to use."""
    from diffusers.utils.torch_utils import get_module_execution_device

    hook = getattr(vae, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(vae)
    return get_module_execution_device(vae)
