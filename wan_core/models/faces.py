"""The tensors by which Animate reads faces: motion encoder, face encoder and face adapters.

Names and shapes alone. Sources: ``wan/modules/animate`` (Wan-Video/Wan2.2) and diffusers'
``transformer_wan_animate.py``.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Final

from .variants import FaceShape

Shapes = dict[str, tuple[int, ...]]


def face_tensors(face: FaceShape, dim: int, head: int, layout: str) -> Shapes:
    """Return name -> shape of the tensors that read faces, in a transformer of this width."""
    return _original(face, dim, head) if layout == "original" else _diffusers(face, dim, head)


def _diffusers(face: FaceShape, dim: int, head: int) -> Shapes:
    out: Shapes = {}
    for index in range(face.adapters):
        for name in ("to_q", "to_k", "to_v", "to_out"):
            out[f"face_adapter.{index}.{name}"] = (dim, dim)
    out["face_encoder.conv1_local"] = (face.hidden * face.heads, face.out_dim, 3)
    out["face_encoder.conv2"] = out["face_encoder.conv3"] = (face.hidden, face.hidden, 3)
    out["face_encoder.out_proj"] = (dim, face.hidden)
    tensors: Shapes = {"face_encoder.padding_tokens": (1, 1, 1, dim)}
    for index in range(face.linears):
        last = index == face.linears - 1
        rows = face.motion_dim if last else face.style_dim
        out[f"motion_encoder.motion_network.{index}"] = (rows, face.style_dim)
    for name, size in out.items():
        tensors[name + ".weight"], tensors[name + ".bias"] = size, size[:1]
    for index in range(face.adapters):
        for name in ("norm_q", "norm_k"):
            tensors[f"face_adapter.{index}.{name}.weight"] = (head,)
    tensors["motion_encoder.motion_synthesis_weight"] = (face.out_dim, face.motion_dim)
    tensors["motion_encoder.conv_out.weight"] = (face.style_dim, face.widths[-1], 4, 4)
    tensors["motion_encoder.conv_in.weight"] = (face.widths[0], 3, 1, 1)
    tensors["motion_encoder.conv_in.act_fn.bias"] = face.widths[:1]
    for index, (before, after) in enumerate(pairwise(face.widths)):
        block = f"motion_encoder.res_blocks.{index}."
        tensors[block + "conv1.weight"] = (before, before, 3, 3)
        tensors[block + "conv1.act_fn.bias"] = (before,)
        tensors[block + "conv2.weight"] = (after, before, 3, 3)
        tensors[block + "conv2.act_fn.bias"] = (after,)
        tensors[block + "conv_skip.weight"] = (after, before, 1, 1)
    return tensors


# Beginnings of diffusers' names of what reads faces -> the official ones (``wan/modules/animate``).
_FACE_ORIGINAL: Final = (
    (r"face_adapter\.(\d+)\.to_q", r"face_adapter.fuser_blocks.\1.linear1_q"),
    (r"face_adapter\.(\d+)\.to_k", r"face_adapter.fuser_blocks.\1.linear1_kv"),
    (r"face_adapter\.(\d+)\.to_out", r"face_adapter.fuser_blocks.\1.linear2"),
    (r"face_adapter\.(\d+)\.norm_(.)", r"face_adapter.fuser_blocks.\1.\2_norm"),
    (r"face_encoder\.(conv\w+)", r"face_encoder.\1.conv"),
    (r"motion_encoder\.motion_network", "motion_encoder.enc.fc"),
    (r"motion_encoder\.motion_synthesis_weight", "motion_encoder.dec.direction.weight"),
    (r"motion_encoder\.conv_in\.weight", "motion_encoder.enc.net_app.convs.0.0.weight"),
    (r"motion_encoder\.conv_in\.act_fn", "motion_encoder.enc.net_app.convs.0.1"),
)  # fmt: skip
_MOTION_ORIGINAL: Final = {
    "conv1.weight": "conv1.0.weight", "conv1.act_fn.bias": "conv1.1.bias",
    "conv2.weight": "conv2.1.weight", "conv2.act_fn.bias": "conv2.2.bias",
    "conv_skip.weight": "skip.1.weight",
}  # fmt: skip


def _original(face: FaceShape, dim: int, head: int) -> Shapes:
    # Keys and values are one tensor there. Blur kernels, which are constants, are no weights.
    out: Shapes = {}
    convs = "motion_encoder.enc.net_app.convs."
    for name, size in _diffusers(face, dim, head).items():
        if ".to_v." in name:
            continue
        block = re.fullmatch(r"motion_encoder\.res_blocks\.(\d+)\.(.+)", name)
        if block is not None:
            name = f"{convs}{int(block[1]) + 1}.{_MOTION_ORIGINAL[block[2]]}"
        elif name == "motion_encoder.conv_out.weight":
            name = f"{convs}{len(face.widths)}.weight"
        for pattern, new in _FACE_ORIGINAL:
            name = re.sub(f"^{pattern}", new, name)
        if ".linear1_kv." in name:
            size = (2 * size[0], *size[1:])
        # The bias of an activation stands for all pixels.
        out[name] = (1, *size, 1, 1) if convs in name and name.endswith("bias") else size
    return out
