"""The tensors and the sound that a job may be given: their shapes, types and values.

torch is imported inside the functions.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..config import GenerationConfig, shown
from ..errors import InvalidRequest
from ..models import TEXT_TOKENS, ModelArchitecture
from .control import ControlInputs, ControlRequest, control_of
from .fields import batches, dense
from .output import audio_rate
from .pictures import load_picture
from .windows import latent_frames, video_frames

if TYPE_CHECKING:
    from torch import Tensor

    from .noise import Shape
    from .pictures import Picture
    from .request import Request

CAMERA_CHANNELS: Final = 24
"""Channels of a camera's rays: moment and direction, three numbers each, of four frames."""
_LOUDEST: Final = 8.0
"""Sound beyond this has another scale: mixes overshoot 1, and are clipped, by less."""
_STRETCHED: Final = 0.02
"""Proportions that differ by more than this are said to be stretched."""


def latent_shape(request: Request, architecture: ModelArchitecture) -> Shape:
    """Return (batch, channels, latent frames, height, width) of the clip's latents."""
    vae = architecture.vae_shape
    return (
        request.batch_size,
        vae.z_dim,
        request.latent_frames,
        request.height // vae.scale_factor_spatial,
        request.width // vae.scale_factor_spatial,
    )


def references_in_front(request: Request, architecture: ModelArchitecture) -> int:
    """Return how many latent frames of pictures are denoised before the clip's.

    References of VACE, and the character of the Animate models.
    """
    control = request.control
    if architecture.transformer.animate is not None:
        return 1
    reads = architecture.transformer.vace_in_channels is not None
    return control.references if reads and control is not None else 0


def check_latents(given: Any, shape: tuple[int, ...]) -> Tensor:
    """Check the latents to start from: those of the whole clip, references in front."""
    latents = _floats(given, "latents")
    if tuple(latents.shape) != shape:
        raise InvalidRequest(
            f"latents have shape {tuple(latents.shape)}; this job needs {shape} (batch, channels, "
            "latent frames, height / scale, width / scale).",
            field="latents",
        )
    return _finite(latents, "latents")


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
    sound = _finite(_floats(audio[0], "audio"), "audio")
    peak = float(sound.abs().amax()) if sound.numel() else 0.0
    if peak > _LOUDEST:
        raise InvalidRequest(
            f"audio holds values up to {peak:.6g}; floats are -1 to 1. Divide it by 32768 if it "
            "has the range of 16 bits.",
            field="audio",
        )
    return sound, rate


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
    return dense(value, name)


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


# Control -----------------------------------------------------------------------------------------


def check_control(
    config: GenerationConfig,
    request: ControlRequest,
    pictures: Mapping[str, Picture],
    *,
    wanted: int,
    made: int,
    size: tuple[int, int],
    face: tuple[int, int],
) -> tuple[ControlInputs, list[str]]:
    """Check the values of a job's control and return its tensors, and warnings.

    ``pictures`` holds the start and the end image as far as they were given. ``wanted`` frames were
    asked for and ``made`` are made; ``size`` is their (width, height) and ``face`` that of a face's
    crops. No tensor is copied that has its form already.
    """
    control = control_of(config)
    assert control is not None
    warnings: list[str] = []
    video = None
    # A character's videos keep their frames: what is made in segments is longer than the clip.
    moved = request.frames > 0
    if control.video is not None:
        video = _pixels("video", control.video)
        video = video[: request.frames] if moved else _padded(video, made)
        warnings += _resized("video", (video.shape[2], video.shape[1]), size)
    mask = None
    if control.mask is not None:
        mask = _mask(control.mask, None if moved else made, size, warnings)
        ends = {"image": 0, "last_image": made - 1}
        pictured = {*request.positions, *(ends[name] for name in pictures)}
        if control.video is None and _keeps_grey(mask, pictured):
            warnings.append(
                "control.mask has black places and there is no control.video: the clip is kept "
                "grey there. Give the video that the mask is for, or leave the mask out."
            )
    characters: dict[str, Tensor] = {}
    for name, fits in (("face_video", face), ("background_video", size)):
        if getattr(control, name) is not None:
            characters[name] = found = _pixels(name, getattr(control, name))
            warnings += _resized(name, (found.shape[2], found.shape[1]), fits)
    keyframes: list[tuple[int, Picture]] = []
    if control.keyframes is not None:
        many = _each("keyframes", control.keyframes)
        given = [*many, *(pictures[name] for name in ("image", "last_image") if name in pictures)]
        keyframes = sorted(zip(request.positions, given, strict=True), key=lambda pair: pair[0])
        warnings += _resized("keyframes", (many[0].shape[1], many[0].shape[0]), size)
    references = tuple(
        picture for batch in batches(control.reference) for picture in _each("reference", batch)
    )
    if moved:
        warnings += _fitted("reference", (references[0].shape[1], references[0].shape[0]), size)
    return ControlInputs(
        video=video,
        mask=mask,
        references=references,
        keyframes=tuple(keyframes),
        camera=None if control.camera is None else _camera(control.camera, made, size, warnings),
        tracks=_tracks(control.tracks, request.tracks, wanted, made),
        **characters,
    ), warnings


def _pixels(name: str, value: Any) -> Tensor:
    """Return (N, H, W, 3) floats on the CPU of a batch of pictures, values 0..1."""
    import torch

    if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.shape[-1] == 3:
        pixels = value.detach().cpu()
        for one in pixels:  # a picture at a time: no copy of the whole
            load_picture(one, f"control.{name}")
        return pixels
    return torch.stack(_each(name, value))


def _each(name: str, value: Any) -> list[Tensor]:
    return [_picture(name, one) for one in value]


def _picture(name: str, value: Any) -> Tensor:
    """Return one picture of a batch as a float tensor (H, W, 3)."""
    import torch

    picture = load_picture(value, f"control.{name}")
    assert isinstance(picture, torch.Tensor)  # of numbers it makes no other
    return picture


def _padded(frames: Tensor, made: int) -> Tensor:
    """Cut to ``made`` frames; of up to three that lack, the last one is repeated."""
    import torch

    if len(frames) >= made:
        return frames[:made]
    return torch.cat([frames, frames[-1:].expand(made - len(frames), *frames.shape[1:])])


def _mask(value: Any, made: int | None, size: tuple[int, int], warnings: list[str]) -> Tensor:
    """Return a mask (made or 1, H, W), floats 0..1; without ``made``, of all its frames.

    Raises InvalidRequest for an empty one.
    """
    import torch

    whole = torch.as_tensor(value)
    whole = whole.unsqueeze(0) if whole.ndim == 2 else whole
    mask = torch.stack([_picture("mask", one)[..., 0] for one in whole])
    mask = mask if len(mask) == 1 or made is None else _padded(mask, made)
    if float(mask.max()) <= 0:
        raise InvalidRequest(
            "control.mask is all black: there is nothing to make. White is what is made; invert "
            "the mask, or leave it out to make everything.",
            field="control.mask",
        )
    warnings += _resized("mask", (mask.shape[2], mask.shape[1]), size)
    return mask.clamp(0, 1)


def _keeps_grey(mask: Tensor, pictured: Collection[int]) -> bool:
    """Say whether a mask is black somewhere, but for the frames that have a picture."""
    each = [mask] if len(mask) == 1 else [m for i, m in enumerate(mask) if i not in pictured]
    return any(float(one.min()) <= 0.5 for one in each)


def _differs(have: tuple[int, int], size: tuple[int, int]) -> bool:
    return abs(have[0] * size[1] / (have[1] * size[0]) - 1) > _STRETCHED


def _fitted(name: str, have: tuple[int, int], size: tuple[int, int]) -> list[str]:
    if not _differs(have, size):
        return []
    return [
        f"control.{name} is {have[0]}x{have[1]} and is fitted into {size[0]}x{size[1]}, with black "
        "beside it."
    ]


def _resized(name: str, have: tuple[int, int], size: tuple[int, int]) -> list[str]:
    if have == size:
        return []
    stretched = _differs(have, size)
    how = "is stretched" if stretched else "is scaled"
    cure = "; crop it to keep its proportions" if stretched else ""
    return [f"control.{name} is {have[0]}x{have[1]} and {how} to {size[0]}x{size[1]}{cure}."]


def _camera(value: Any, made: int, size: tuple[int, int], warnings: list[str]) -> Tensor:
    """Return a camera's rays (1, 24, T, H, W), float32, for a clip of ``made`` frames and ``size``.

    Rays of another size are interpolated: from one pixel to the next they hardly change.
    """
    import torch.nn.functional as F

    rays, frames = _floats(value, "control.camera"), latent_frames(made)
    found = tuple(rays.shape)
    if len(found) != 5 or found[:2] != (1, CAMERA_CHANNELS) or not all(found):
        raise InvalidRequest(
            f"control.camera has shape {found}; rays (1, {CAMERA_CHANNELS}, latent frames, height, "
            "width) are needed, as WanCameraEmbedding makes them.",
            field="control.camera",
        )
    has = video_frames(found[2])
    if found[2] < frames:
        raise InvalidRequest(
            f"control.camera is for {has} frames, {made - has} fewer than the clip's {made}. Make "
            f"it with length {made}, or the clip shorter (num_frames {has}).",
            field="control.camera",
        )
    if found[2] > frames:
        warnings.append(f"control.camera is for {has} frames; the first {made} are used.")
    rays = _finite(rays[:, :, :frames].detach().float().cpu(), "control.camera")
    warnings += _resized("camera", (found[4], found[3]), size)
    if (found[4], found[3]) == size:
        return rays
    flat = F.interpolate(rays[0].transpose(0, 1), size[::-1], mode="bilinear")
    return flat.transpose(0, 1).unsqueeze(0)


_TRACK_POINTS: Final = 121
"""Points of a track in time, as ATI was trained with: 5 s at 24 frames a second, and the first."""


def _tracks(value: Any, kind: str, wanted: int, made: int) -> Tensor | None:
    """Return tracks as (points of time, tracks, 3): x, y, seen. Raises InvalidRequest.

    Paths of as many frames as are ``wanted`` stand still in those that are made beyond.
    """
    import torch

    if not kind:
        return None
    if kind == "points":
        found = _points(value)
    else:
        path = _numbers_of(value, "track_path")
        seen = torch.ones(path.shape[:2])
        if value.get("track_visibility") is not None:
            seen = _numbers_of(value, "track_visibility")
        if path.ndim != 3 or path.shape[2] != 2 or seen.shape != path.shape[:2] or not len(path):
            raise InvalidRequest(
                f"control.tracks has track_path {tuple(path.shape)} and track_visibility "
                f"{tuple(seen.shape)}; (frames, tracks, 2) and (frames, tracks) are needed.",
                field="control.tracks",
            )
        found = torch.cat([path, seen.unsqueeze(-1)], dim=-1)
        if len(found) < wanted:
            raise InvalidRequest(
                f"control.tracks has {len(found)} frames, {wanted - len(found)} fewer than the "
                f"clip's {wanted}. Make the tracks longer, or the clip shorter.",
                field="control.tracks",
            )
        found = _padded(found, made)
    return _finite(found, "control.tracks")


def _numbers_of(tracks: Mapping[str, Any], name: str) -> Tensor:
    import torch

    try:
        return torch.as_tensor(tracks[name]).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as err:
        raise InvalidRequest(
            f"control.tracks: {name} is {shown(tracks[name])}; numbers are needed.",
            field="control.tracks",
        ) from err


def _points(text: str) -> Tensor:
    """Return ATI's tracks (121, N, 3) from a JSON text: [[{"x": 1, "y": 2}, ...], ...].

    A track of fewer points ends there: what is missing is not seen.
    """
    import torch

    try:
        # Editors of tracks write single quotes too.
        given = json.loads(text.replace("'", '"'))
        given = [given] if given and isinstance(given[0], dict) else given
        tracks = [[(float(p["x"]), float(p["y"]), 1.0) for p in track] for track in given]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError) as err:
        raise InvalidRequest(
            f"control.tracks is {shown(text)}, which cannot be read ({type(err).__name__}: {err}); "
            'a JSON list of tracks, each a list of {"x": 10, "y": 20}, is needed.',
            field="control.tracks",
        ) from err
    if not tracks or not all(tracks):
        raise InvalidRequest(
            "control.tracks holds no tracks, or a track without a point.", field="control.tracks"
        )
    out = torch.zeros(_TRACK_POINTS, len(tracks), 3)
    for number, track in enumerate(tracks):
        points = torch.tensor(track[:_TRACK_POINTS])
        out[: len(points), number] = points
    return out
