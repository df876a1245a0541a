"""What the Fun models are given besides texts: encoded once, for all windows and steps.

The conditions are those of VideoX-Fun's pipelines (``pipeline_wan_fun_control.py``,
``pipeline_wan2_2_fun_control.py``, ``pipeline_wan2_2_fun_inpaint.py``): beside the noisy latents
the model reads a control video's latents, a mask of known frames and their latents, as far as it
has channels for them. What is not given is zero in the normalised space, and so is a missing
reference, which the model reads all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..job import Inputs, Request
from ..models import ModelArchitecture
from ..sampling import encode_first_frame, encode_keyframes, encode_video, prepare_picture
from .stages import StageRunner


def reads_fun(architecture: ModelArchitecture) -> bool:
    """Say whether a model's conditions are made here: those of Fun Control, Camera and InP 5B."""
    shape = architecture.transformer
    held = architecture.variant.expand_timesteps and shape.known_channels > 0
    return bool(shape.video_channels or shape.camera_channels) or held


def fun_conditions(stages: StageRunner, request: Request, inputs: Inputs) -> dict[str, Any]:
    """Return the fields of ``Conditions`` that the Fun models need, ``concat`` for one clip.

    ``concat`` (1, n, T, h, w) has the channels of the control video, the mask (1 = known) and the
    known frames, in this order; ``reference`` is (1, z, h, w).
    """
    architecture = stages.architecture
    shape, control = architecture.transformer, inputs.control
    dtype = stages.dtype("transformer")
    known, reference = _zeros(stages, request, shape.mask_channels + shape.known_channels), None
    if shape.reference_channels is not None:
        reference = known.new_zeros(1, shape.reference_channels, *known.shape[3:])
    pictures = pictures_shown(request, inputs)
    if pictures or (control is not None and control.references):
        known, reference = stages.attempt(
            "condition_encode",
            lambda: _encoded(stages, request, inputs, pictures, known, reference),
        )
    parts = [known]
    if shape.video_channels:
        parts.insert(
            0, stages.attempt("control_encode", lambda: _followed(stages, request, inputs))
        )
    held = architecture.variant.expand_timesteps
    camera = None if control is None else control.camera
    return {
        "concat": torch.cat(parts, dim=1),
        "mask_channels": shape.mask_channels,
        "held": held,
        # Of a given first frame, the 5B's latents stay as they are.
        "first_frame": known[:, shape.mask_channels :, :1] if held and 0 in pictures else None,
        "reference": None if reference is None else reference.to(stages.device, dtype),
        **({} if camera is None else {"camera": camera.to(dtype)}),
    }


def _zeros(stages: StageRunner, request: Request, channels: int) -> Tensor:
    """Return zeros (1, channels, T, h, w) of the clip's latents."""
    vae = stages.architecture.vae_shape
    scale = vae.scale_factor_spatial
    size = (request.latent_frames, request.height // scale, request.width // scale)
    return torch.zeros(1, channels, *size, device=stages.device)


def pictures_shown(request: Request, inputs: Inputs) -> dict[int, Any]:
    """Return the pictures that the clip shows, by their frame: key frames, or those at its ends."""
    if inputs.control is not None and inputs.control.keyframes:
        return dict(inputs.control.keyframes)
    at = {"image": 0, "last_image": request.num_frames - 1}
    return {at[name]: picture for name, picture in inputs.pictures.items()}


def _encoded(
    stages: StageRunner,
    request: Request,
    inputs: Inputs,
    pictures: dict[int, Any],
    known: Tensor,
    reference: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return mask and latents of known frames, and the reference's latents."""
    size, check = (request.width, request.height), stages.check_interrupt
    ready = {at: prepare_picture(picture, *size) for at, picture in pictures.items()}
    seen = () if inputs.control is None else inputs.control.references
    with stages.use("condition_encode", "vae") as vae:
        if pictures and stages.architecture.transformer.mask_channels:
            known = encode_keyframes(
                vae, ready, num_frames=request.num_frames, device=stages.device, check=check
            )
        elif pictures:  # without a mask only the first latent frame is known, the rest is zeros
            first = encode_first_frame(vae, ready[0], device=stages.device, check=check)
            known = torch.cat([first, known[:, :, 1:]], dim=2)
        if seen and reference is not None:
            picture = prepare_picture(seen[0], *size)
            found = encode_first_frame(vae, picture, device=stages.device, check=check)
            reference = found[:, :, 0]
    return known, reference


def _followed(stages: StageRunner, request: Request, inputs: Inputs) -> Tensor:
    """Return the control video's latents (1, z, T, h, w); zeros without one."""
    video = None if inputs.control is None else inputs.control.video
    if video is None:
        return _zeros(stages, request, stages.architecture.transformer.video_channels)
    with stages.use("control_encode", "vae") as vae:
        return encode_video(vae, video, request.width, request.height, check=stages.check_interrupt)
