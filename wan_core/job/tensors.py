"""The tensors and the sound that a job may be given: their shapes, types and values.

torch is imported inside the functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest
from ..models import TEXT_TOKENS, ModelArchitecture
from .fields import shown
from .output import audio_rate

if TYPE_CHECKING:
    from torch import Tensor

    from .noise import Shape
    from .request import Request


def latent_shape(request: Request, architecture: ModelArchitecture) -> Shape:
    """Return (batch, channels, latent frames, height, width) of the clip's latents."""
    vae = architecture.vae or architecture.variant.vae
    return (
        request.batch_size,
        vae.z_dim,
        request.latent_frames,
        request.height // vae.scale_factor_spatial,
        request.width // vae.scale_factor_spatial,
    )


def check_latents(given: Any, shape: tuple[int, ...]) -> Tensor:
    """Check the latents to start from, which are those of the whole clip.

    Values that are no numbers are left to the denoising loop, which names the step they show in.
    """
    latents = _floats(given, "latents")
    if tuple(latents.shape) != shape:
        raise InvalidRequest(
            f"latents have shape {tuple(latents.shape)}; this job needs {shape} (batch, channels, "
            "latent frames, height / scale, width / scale).",
            field="latents",
        )
    return latents


def check_continued(given: Any, shape: tuple[int, ...]) -> Tensor:
    """Check the latents to continue from: those of a clip of ``shape``, with fewer frames."""
    latents = _floats(given, "continue_from")
    found = tuple(latents.shape)
    if len(found) != 5 or (*found[:2], *found[3:]) != (*shape[:2], *shape[3:]) or not found[2]:
        raise InvalidRequest(
            f"continue_from has shape {found}; this job needs {shape} (batch, channels, latent "
            "frames, height / scale, width / scale), with fewer frames.",
            field="continue_from",
        )
    return _finite(latents, "continue_from")


def check_embeds(given: Any, name: str, text_dim: int, batch_size: int) -> Tensor:
    """Check prompt embeddings that the caller has made, and pad them with zeros to 512 tokens.

    ComfyUI's conditioning may have a single batch row and fewer tokens. Raises InvalidRequest,
    naming ``name``, if batch, tokens or width do not suit the model.
    """
    import torch

    embeds = _floats(given, name)
    if embeds.ndim != 3 or embeds.shape[2] != text_dim or not embeds.shape[1]:
        raise InvalidRequest(
            f"{name} has shape {tuple(embeds.shape)}; this model takes (batch, tokens, "
            f"{text_dim}). Was it made by another text encoder?",
            field=name,
        )
    if embeds.shape[1] > TEXT_TOKENS:
        raise InvalidRequest(
            f"{name} has {embeds.shape[1]} tokens; Wan takes at most {TEXT_TOKENS}. Shorten the "
            "text.",
            field=name,
        )
    if embeds.shape[0] not in (1, batch_size):
        raise InvalidRequest(
            f"{name} has {embeds.shape[0]} rows; batch_size is {batch_size}.", field=name
        )
    # The image branch of the 2.1 models finds the text by counting 512 tokens from the end
    # (``WanAttnProcessor`` in diffusers), so it must be exactly as many.
    if embeds.shape[1] < TEXT_TOKENS:
        padding = embeds.new_zeros(embeds.shape[0], TEXT_TOKENS - embeds.shape[1], text_dim)
        embeds = torch.cat([embeds, padding], dim=1)
    return _finite(embeds, name)


def check_audio(audio: Any) -> tuple[Tensor, int]:
    """Return (waveform (channels, samples) of floats, samples per second)."""
    rate = audio_rate(audio)
    return _finite(_floats(audio[0], "audio"), "audio"), rate


def _floats(value: Any, name: str) -> Tensor:
    """Return a tensor or a numpy array of floats as a tensor."""
    import numpy as np
    import torch

    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
    if not isinstance(value, torch.Tensor):
        kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else shown(value)
        raise InvalidRequest(f"{name} is {kind}; a tensor of floats is needed.", field=name)
    if not value.is_floating_point():
        raise InvalidRequest(
            f"{name} holds values of the type {value.dtype}; floats are needed"
            + (", -1 to 1." if name == "audio" else "."),
            field=name,
        )
    return value.detach()


def _finite(values: Tensor, name: str) -> Tensor:
    import torch

    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise InvalidRequest(
            f"{name} holds {bad:,} values that are no finite numbers (NaN or infinity), of "
            f"{values.numel():,}. It was spoilt where it was made.",
            field=name,
        )
    return values
