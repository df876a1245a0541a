"""VACE's control of one render: encoded once, before the first step, for all windows and steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..job import Inputs, Request
from ..sampling import ControlClip, encode_grey, encode_vace
from .fun import pictures_shown
from .stages import StageRunner


def has_vace(stages: StageRunner) -> bool:
    """Say whether the model reads a control through VACE blocks."""
    return stages.architecture.transformer.vace_in_channels is not None


def control_clip(request: Request, inputs: Inputs) -> ControlClip:
    """Return the pixels of a job's control; without one, a clip in which everything is made.

    The start and the end image are key frames at the first and the last frame.
    """
    asked, given = request.control, inputs.control
    return ControlClip(
        num_frames=request.num_frames,
        width=request.width,
        height=request.height,
        video=None if given is None else given.video,
        mask=None if given is None else given.mask,
        keyframes=tuple(pictures_shown(request, inputs).items()),
        references=() if given is None else given.references,
        clear_masked=asked is not None and asked.clear_masked,
    )


def vace_conditions(stages: StageRunner, request: Request, inputs: Inputs) -> dict[str, Any]:
    """Return the fields of ``Conditions`` that VACE needs; none for another model."""
    if not has_vace(stages):
        return {}
    clip = control_clip(request, inputs)
    control, grey = stages.attempt("control_encode", lambda: _encoded(stages, clip, request))
    dtype, batch = stages.dtype("transformer"), request.batch_size
    blocks = len(stages.architecture.transformer.vace_layers)
    asked = request.control
    strength = (1.0,) if asked is None else asked.strength
    scale = torch.tensor(strength * (blocks if len(strength) == 1 else 1))
    return {
        "vace": control.to(dtype).repeat(batch, 1, 1, 1, 1),
        "vace_scale": scale.to(stages.device, dtype),
        "vace_grey": None if grey is None else grey.to(stages.device, dtype),
        "references": len(clip.references),
    }


def _encoded(
    stages: StageRunner, clip: ControlClip, request: Request
) -> tuple[Tensor, Tensor | None]:
    """Return the control's latents, and those of a grey clip where segments need them."""
    name = (stages.key("vae"), "grey", clip.num_frames, clip.height, clip.width)
    with stages.use("control_encode", "vae") as vae:

        def grey() -> Tensor:
            # The same for every clip of this size: half of the work of most controls.
            known: Tensor | None = stages.cache.get_text(name)
            if known is None:
                known = encode_grey(vae, clip, check=stages.check_interrupt).cpu()
                stages.cache.put_text(name, known)
            return known.to(stages.device)

        control = encode_vace(vae, clip, check=stages.check_interrupt, grey=grey)
        return control, grey() if request.window_mode == "continuation" else None
