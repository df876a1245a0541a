"""Streamed decode and encode with Wan's VAE, one latent frame at a time.

Wan's VAE is causal in time: to decode a latent frame it needs only the feature cache that earlier
frames have left. diffusers' ``AutoencoderKLWan`` uses this cache as well, but it collects the whole
video and stores the cache on the model. Here each decode or encode owns its cache. Threads can
therefore share one VAE, a failure leaves nothing behind on it, and memory does not grow with the
length of the clip. Results equal ``vae.decode`` and ``vae.encode`` without tiling, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidRequest

FRAMES_PER_CHUNK = 4
"""Frames per call of the encoder, after a first call with one (``AutoencoderKLWan._encode``)."""

Check = Callable[[], object]


class OutOfRange(Exception):
    """What a VAE makes is beyond the range of fp16, in which it computes."""


class StreamingDecoder:
    """Decodes ``latents`` one latent frame per call, and can continue after a failure.

    ``latents`` is (B, z, T, h, w) in VAE space (``denormalize_latents``), on any device. Each
    chunk is (B, 3, f, H, W) within -1..1, in the VAE's dtype and on its device, where f is 1 for
    the first latent frame and 4 for the others. When ``decode_next`` raises, ``position`` has not
    moved and the call can be repeated, also with the VAE's weights placed in another way. The
    feature cache is freed at the failure and built again from the earlier latent frames, so that
    going on needs no more memory than the decoder itself.
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
    def done(self) -> bool:
        """Whether every latent frame has been decoded."""
        return self.position >= self._latents.shape[2]

    def decode_next(self, *, check: Check | None = None) -> Tensor:
        """Decode the latent frame at ``position``; ``check`` runs before each latent frame.

        After a failure this also decodes all earlier latent frames again, to refill the cache.
        """
        chunk = self._reach_position(check)
        self._commit(chunk)
        return chunk

    def go_on_from(self, other: Any) -> None:
        """Continue where another decoder of the same clip is; its frames are made once more."""
        self.position, self.frames_done = other.position, other.frames_done

    def take_back(self, chunk: Tensor) -> None:
        """Count a chunk that ``decode_next`` returned as not decoded: it is made once more."""
        self.position -= 1
        self.frames_done -= chunk.shape[2]
        self.close()

    def close(self) -> None:
        """Free the feature cache and the projected latents; a later call makes them again."""
        if self._cache is not None:
            self._cache.clear()
        self._cache = None
        self._projected = None

    def _commit(self, chunk: Tensor) -> None:
        self.position += 1
        self.frames_done += chunk.shape[2]

    def _reach_position(self, check: Check | None) -> Tensor:
        # The cache must have seen exactly the latent frames before ``position``. It is ahead when
        # a frame was decoded but never committed, and there is no way to take a frame back out.
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
            # The traceback keeps this stack frame alive, and with it the list: empty it, so that
            # the tensors are freed at once.
            cache.clear()
            self._cache = None
            raise
        self._fed += 1
        return chunk

    @torch.no_grad()
    def _run(self, index: int, cache: list[Any]) -> Tensor:
        device = _bring_in(self.vae)
        if self._projected is None:
            # Over all frames at once, as diffusers does: a convolution of another shape may round
            # differently. The result is kept on the latents' own device, which may be the CPU.
            latents = self._latents.to(device=device, dtype=self.vae.dtype)
            self._projected = self.vae.post_quant_conv(latents).to(self._latents.device)
        frame = self._projected[:, :, index : index + 1].to(device)
        chunk: Tensor = self.vae.decoder(
            frame, feat_cache=cache, feat_idx=[0], first_chunk=index == 0
        )
        if self.vae.config.patch_size is not None:
            chunk = _model_code().unpatchify(chunk, patch_size=self.vae.config.patch_size)
        return chunk.clamp_(-1.0, 1.0)


def as_bytes(picture: Tensor) -> Tensor:
    """Return a copy of a picture, any shape, floats 0..1 or uint8 on any device: uint8 on the CPU.

    Floats are rounded to the nearest level. On the CPU numpy does that: torch shares such work out
    among a thread for each processor, and these go on spinning where an encoder's have work to do.
    """
    if picture.device.type != "cpu":
        if picture.dtype != torch.uint8:
            picture = _levels(picture.float())
        return picture.cpu().contiguous()
    # In float32, because bfloat16, which numpy lacks, would round the product before ``rint`` does:
    # its bits are the upper half of a float32's.
    if picture.dtype == torch.bfloat16:
        halves = picture.view(torch.int16).numpy().view(np.uint16)
        values = (halves.astype(np.uint32) << 16).view(np.float32)
    else:
        values = picture.numpy()
    if values.dtype != np.uint8:
        with np.errstate(invalid="ignore"):
            values = np.multiply(values, np.float32(255), dtype=np.float32)
            values = np.rint(values, out=values).clip(0, 255, out=values).astype(np.uint8)
    return torch.from_numpy(np.array(values, order="C"))


def to_frames(chunk: Tensor) -> Tensor:
    """Turn a decoded chunk (B, 3, f, H, W), -1..1, into float32 (B, f, H, W, 3), 0..1, on the CPU.

    Values are scaled in the chunk's dtype and only then become float32, as in ``VideoProcessor``.
    """
    return _channels_last_unit(chunk).to(device="cpu", dtype=torch.float32)


def to_pictures(chunk: Tensor, *, whole_bytes: bool) -> Tensor:
    """Turn a decoded chunk (B, 3, f, H, W), -1..1, into pictures (B, f, H, W, 3) where it is.

    float32, 0..1, with the numbers of ``to_frames``; with ``whole_bytes`` uint8, as they are
    written to a file.
    """
    pictures = _channels_last_unit(chunk).float()
    return _levels(pictures) if whole_bytes else pictures


def _levels(pictures: Tensor) -> Tensor:
    """Return the nearest of 256 levels; of float32, as bfloat16 would round the product first."""
    return (pictures * 255).round().clamp(0, 255).to(torch.uint8)


class Leaving:
    """Pictures of a chunk on their way from the card, and whether they are within its range.

    The copies are queued behind what makes the chunk, which may be let go at once; the card then
    computes what is queued next. On a CPU nothing has to leave.
    """

    def __init__(self, chunk: Tensor, *, whole_bytes: bool) -> None:
        """``chunk`` and ``whole_bytes`` are those of ``to_pictures``."""
        half = chunk.dtype == torch.float16
        finite = torch.isfinite(chunk).all() if half else torch.ones((), dtype=torch.bool)
        self._pictures = _on_host(to_pictures(chunk, whole_bytes=whole_bytes))
        self._finite = _on_host(finite)
        self._done: Any = None
        if chunk.is_cuda:
            self._done = torch.cuda.current_stream(chunk.device).record_event()

    def arrived(self) -> tuple[Tensor, bool]:
        """Wait for the pictures (B, f, H, W, 3); return them and whether all is finite."""
        if self._done is not None:
            self._done.synchronize()
        return self._pictures, bool(self._finite)


def _on_host(there: Tensor) -> Tensor:
    """Queue a copy to RAM behind what makes ``there``; on the CPU it is the tensor itself."""
    if not there.is_cuda:
        return there
    try:
        here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
    except RuntimeError:  # no more may be page-locked: the copy is waited for
        here = torch.empty(there.shape, dtype=there.dtype, device="cpu")
    return here.copy_(there, non_blocking=True)


@torch.no_grad()
def encode_latents(vae: Any, chunks: Iterable[Tensor], *, check: Check | None = None) -> Tensor:
    """Encode a video, given in chunks, to the mode of its latents: (B, z, T, h, w) in VAE space.

    The first chunk is (B, 3, 1, H, W), all others are (B, 3, 4, H, W), with values -1..1, in any
    dtype and on any device (see ``in_chunks``). Only one is held at a time. The result
    equals ``vae.encode(video).latent_dist.mode()``. ``check`` runs before each chunk. Raises
    InvalidRequest for a chunk of another shape, and if there is none; OutOfRange where the VAE
    computes in fp16 and its range does not hold.
    """
    # The causal convolutions read the frames before a chunk from here; it outlives each chunk.
    cache = _empty_cache(vae.encoder)
    pieces: list[Tensor] = []
    try:
        for chunk in chunks:
            _check_chunk(chunk, len(pieces))
            if check is not None:
                check()
            chunk = _as_read(vae, chunk)
            pieces.append(vae.encoder(chunk, feat_cache=cache, feat_idx=[0]))
    finally:
        cache.clear()  # frames that the cache keeps in RAM are free for the next encode
    if not pieces:
        raise InvalidRequest("The video to encode has no frames; give at least one.", field="image")
    # Over all frames at once, as diffusers does; latents are small. The second half of the
    # channels is the log variance, which the mode does not need.
    mean: Tensor = vae.quant_conv(torch.cat(pieces, dim=2)).chunk(2, dim=1)[0]
    if mean.dtype == torch.float16 and not bool(torch.isfinite(mean).all()):
        raise OutOfRange
    return mean


def _check_chunk(chunk: Tensor, number: int) -> None:
    wanted = FRAMES_PER_CHUNK if number else 1
    if chunk.ndim != 5 or chunk.shape[2] != wanted:
        raise InvalidRequest(
            f"chunk {number} of the video to encode has shape {tuple(chunk.shape)}; it must be "
            f"(batch, 3, {wanted}, height, width).",
            field="image",
        )


def _as_read(vae: Any, chunk: Tensor) -> Tensor:
    """Return a chunk as the encoder reads it, on the device, in its dtype and in patches.

    Its numbers lie as in diffusers' pipelines, whose pictures are joined with other frames first.
    On a card a first frame with its colours side by side, as pictures come, would be convolved by
    another kernel in diffusers' encoder than in the lean one.
    """
    plain = torch.contiguous_format
    chunk = chunk.to(device=_bring_in(vae), dtype=vae.dtype, memory_format=plain)
    if vae.config.patch_size is not None:
        chunk = _model_code().patchify(chunk, patch_size=vae.config.patch_size)
    return chunk


def in_chunks(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """Gather frames (B, 3, H, W) to the chunks (B, 3, f, H, W) of ``encode_latents``: 1, then 4."""
    frames, wanted = iter(frames), 1
    while some := list(islice(frames, wanted)):
        some = [torch.stack(some, dim=2)]
        yield some.pop()  # nothing of it is held here while it is encoded
        wanted = FRAMES_PER_CHUNK


def normalize_latents(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Turn latents in VAE space into the transformer's: (x - mean) * (1 / std), in their dtype.

    ``config`` is the VAE's. The operations and their order are ``WanImageToVideoPipeline``'s.
    """
    mean, inverse_std = _statistics(latents, config)
    return (latents - mean) * inverse_std


def denormalize_latents(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Turn the transformer's latents into VAE space: x / (1 / std) + mean, in their dtype.

    ``config`` is the VAE's. diffusers' pipelines cast the latents to the VAE's dtype first; do the
    same to get the same bits.
    """
    mean, inverse_std = _statistics(latents, config)
    return latents / inverse_std + mean


def _statistics(latents: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    # The pipelines multiply and divide by this reciprocal, rounded to the latents' dtype. Using
    # std itself would be more accurate but give other bits.
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
    """Let the VAE's offload hook bring its weights in, and return the device to compute on.

    diffusers runs this hook when ``decode`` or ``encode`` is called, which does not happen here.
    """
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(vae)
    return torch.device(_execution_device(vae))


def _execution_device(module: Any) -> Any:
    """Return the device that a module computes on, which with offloading is not its weights'."""
    from diffusers.hooks import group_offloading
    from diffusers.utils import torch_utils

    if hasattr(torch_utils, "get_module_execution_device"):
        return torch_utils.get_module_execution_device(module)
    # diffusers before 0.41 has no such function; this is what it does.
    try:
        return group_offloading._get_group_onload_device(module)
    except ValueError:  # no group offloading here
        pass
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return device
    return module.device
