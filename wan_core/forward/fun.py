"""What the Fun models read beside latents and texts: a reference picture and a camera.

VideoX-Fun puts tokens of the reference, made by a layer of their own (``ref_conv``), before those
of the clip and drops them at the end; a camera's rays go through ``control_adapter`` and are added
to the clip's tokens. diffusers' class knows of neither and need not: its input gets a frame in
front, and here the tokens that it patches of that frame are replaced, and the camera's added to the
others. The positions are then those of a clip with one frame more, as in VideoX-Fun's
``models/wan_transformer3d.py`` and ``models/wan_camera_adapter.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..models import UNSHUFFLED


@contextmanager
def fun_inputs(
    transformer: Any, reference: Tensor | None = None, camera: Tensor | None = None
) -> Iterator[None]:
    """Have this thread's calls of ``transformer`` see a reference, a camera, or both.

    ``reference`` (1 or B, C, h, w) are a picture's latents, for which the first frame of what the
    transformer is given stands; ``camera`` (1 or B, 24, T, H, W) are rays for the T other frames,
    in pixels. None leaves the model as it is. Acts inside the ``with`` block, whatever forward the
    model has; nothing is left afterwards.
    """
    if reference is None and camera is None:
        yield
        return
    me = threading.get_ident()

    def put(module: Any, args: object, patched: Tensor) -> Tensor | None:
        if threading.get_ident() != me:
            return None
        first = 0
        if reference is not None:
            tokens: Tensor = transformer.ref_conv(reference)
            patched[:, :, 0] = tokens
            first = 1
        if camera is not None:
            patched[:, :, first:].add_(camera_tokens(transformer.control_adapter, camera))
        return patched

    hook = transformer.patch_embedding.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


def camera_tokens(adapter: Any, rays: Tensor) -> Tensor:
    """Return what a camera adds to the tokens of a clip, (B, dim, T, H / 16, W / 16).

    ``rays`` are (B, 24, T, H, W). Frame by frame: squares of 8 x 8 pixels become channels, then a
    convolution of stride 2 and residual blocks of two 3 x 3 convolutions.
    """
    batch, channels, frames, height, width = rays.shape
    flat = (batch * frames, channels, height, width)
    # In one expression: each copy of the rays is gone when the next step is done.
    out = adapter.conv(F.pixel_unshuffle(rays.transpose(1, 2).reshape(flat), UNSHUFFLED))
    for block in adapter.residual_blocks:
        out = block.conv2(F.relu_(block.conv1(out))).add_(out)
    added: Tensor = out.view(batch, frames, *out.shape[1:]).transpose(1, 2)
    return added
