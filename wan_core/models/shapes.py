"""Numbers of a Wan transformer or VAE read from its tensor shapes, and the tensors it must have.

Works on names and shapes alone; reads no file. The layout ``original`` means the names of the
Wan-Video repositories, which ComfyUI and GGUF files keep; ``diffusers`` means those of diffusers'
classes.
Sources of the names: ``wan/modules/model.py``, ``vae2_1.py``, ``vae2_2.py`` (Wan-Video/Wan2.2) and
diffusers' ``transformer_wan.py``, ``transformer_wan_vace.py``, ``transformer_wan_animate.py``,
``autoencoder_kl_wan.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Final

from ..errors import CorruptFile
from .faces import face_tensors
from .names import map_names, original_name
from .variants import (
    LATENTS_MEAN_21,
    LATENTS_MEAN_22,
    LATENTS_STD_21,
    LATENTS_STD_22,
    FaceShape,
    TransformerShape,
    VaeShape,
)

Shapes = Mapping[str, tuple[int, ...]]

HEAD_DIM: Final = 128
"""Width of one attention head in every published Wan transformer."""

_PROJECTIONS: Final = ("q", "k", "v", "out.0")
UNSHUFFLED: Final = 8
"""Fun Camera folds squares of 8 x 8 pixels into channels (``SimpleAdapter`` of VideoX-Fun)."""


def read_transformer(shapes: Shapes, layout: str) -> TransformerShape:
    """Return the numbers of a Wan transformer from its shapes, names without prefix.

    Raises CorruptFile naming a tensor that is missing or has an impossible shape. The shapes do not
    say how the width divides into heads: heads of 128 are assumed if that divides the width, else
    ``heads_known`` is False.
    """
    image_embedder = "condition_embedder.image_embedder."
    names = {
        "head": "proj_out.bias",
        "ffn": "blocks.0.ffn.net.0.proj.bias",
        "text": "condition_embedder.text_embedder.linear_1.weight",
        "time": "condition_embedder.time_embedder.linear_1.weight",
        "image": image_embedder + "norm1.weight",
        "positions": image_embedder + "pos_embed",
        "image_key": "blocks.0.attn2.add_k_proj.weight",
    }
    if layout == "original":
        names = {what: original_name(name) for what, name in names.items()}
    dim = _size(shapes, "patch_embedding.bias", 0)
    patch = _size(shapes, names["head"], 0)
    # From the element count and not from an axis: some GGUF writers flatten the 5-D weight.
    patch_volume = 4
    in_channels = math.prod(_shape(shapes, "patch_embedding.weight")) // (dim * patch_volume)
    animate = "pose_patch_embedding.weight" in shapes
    # The norms of Animate's face adapters are as wide as a head; no other tensor of a model is.
    norm = "face_adapter.fuser_blocks.0.q_norm.weight"
    norm = norm if layout == "original" else "face_adapter.0.norm_q.weight"
    head = _size(shapes, norm, 0) if animate else HEAD_DIM
    known = dim % head == 0
    positions = shapes.get(names["positions"], ())
    image_key = names["image_key"]
    vace = shapes.get("vace_patch_embedding.weight")
    layers = count_blocks(shapes, "blocks.")
    vace_blocks = count_blocks(shapes, "vace_blocks.") if vace else 0
    camera = "control_adapter.conv.weight"
    return TransformerShape(
        heads=dim // head if known else 1,
        head_dim=head if known else dim,
        heads_known=known,
        ffn_dim=_size(shapes, names["ffn"], 0),
        layers=layers,
        in_channels=in_channels,
        out_channels=patch // patch_volume,
        text_dim=_size(shapes, names["text"], 1),
        freq_dim=_size(shapes, names["time"], 1),
        image_dim=_size(shapes, names["image"], 0) if names["image"] in shapes else None,
        added_kv_dim=_size(shapes, image_key, 1) if image_key in shapes else None,
        # (1, tokens, width); some GGUF writers leave out the leading 1.
        pos_embed_seq_len=positions[-2] if len(positions) in (2, 3) else None,
        vace_layers=tuple(i * layers // vace_blocks for i in range(vace_blocks)),
        vace_in_channels=math.prod(vace) // (dim * patch_volume) if vace else None,
        reference_channels=_size(shapes, "ref_conv.weight", 1)
        if "ref_conv.weight" in shapes
        else None,
        camera_channels=_size(shapes, camera, 1) // UNSHUFFLED**2 if camera in shapes else None,
        animate=1 if animate else None,
        face=read_face(shapes, layout) if animate else None,
    )


def read_face(shapes: Shapes, layout: str) -> FaceShape:
    """Return the numbers of Animate's motion encoder, face encoder and face adapters."""
    if layout != "diffusers":
        shapes = {
            name: shapes[source.name]
            for name, source in map_names("transformer", shapes).sources.items()
        }
    width = _size(shapes, "motion_encoder.conv_in.weight", 0)
    blocks = count_blocks(shapes, "motion_encoder.res_blocks.")
    many = (f"motion_encoder.res_blocks.{index}.conv2.weight" for index in range(blocks))
    hidden = _size(shapes, "face_encoder.conv2.weight", 0)
    return FaceShape(
        widths=(width, *(_size(shapes, name, 0) for name in many)),
        style_dim=_size(shapes, "motion_encoder.conv_out.weight", 0),
        motion_dim=_size(shapes, "motion_encoder.motion_synthesis_weight", 1),
        out_dim=_size(shapes, "motion_encoder.motion_synthesis_weight", 0),
        linears=count_blocks(shapes, "motion_encoder.motion_network."),
        hidden=hidden,
        heads=_size(shapes, "face_encoder.conv1_local.weight", 0) // hidden,
        adapters=max(1, count_blocks(shapes, "face_adapter.")),
    )


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CorruptFile(f"The tensor {name!r} is missing; the file is incomplete. Get it again.")
    return shapes[name]


def _size(shapes: Shapes, name: str, axis: int) -> int:
    shape = _shape(shapes, name)
    if len(shape) <= axis or shape[axis] < 1:
        raise CorruptFile(f"The tensor {name!r} has the impossible shape {list(shape)}.")
    return shape[axis]


def _rows(shapes: Shapes, name: str) -> int:
    """Return the output channels of a convolution: those of its bias, which no writer reshapes."""
    bias = name.removesuffix("weight") + "bias"
    return _size(shapes, bias if bias in shapes else name, 0)


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Return how many blocks N the names ``<prefix>N.…`` have; raises CorruptFile if one lacks."""
    cut = len(prefix)
    numbers = {name[cut : name.find(".", cut)] for name in names if name.startswith(prefix)}
    found = {int(number) for number in numbers if number.isdecimal() and len(number) <= 5}
    missing = sorted(set(range(max(found, default=-1) + 1)) - found)
    if missing:
        raise CorruptFile(
            f"{len(missing)} of {max(found) + 1} blocks are missing ({prefix}{missing[0]} is the "
            "first); the file is incomplete. Get it again."
        )
    return len(found)


def transformer_tensors(shape: TransformerShape, layout: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that a Wan or VACE transformer of this shape has."""
    dim, time = shape.dim, shape.freq_dim
    volume = math.prod(shape.patch_size)
    linear: dict[str, tuple[int, ...]] = {
        "patch_embedding": (dim, shape.in_channels, *shape.patch_size),
        "condition_embedder.time_embedder.linear_1": (dim, time),
        "condition_embedder.time_embedder.linear_2": (dim, dim),
        "condition_embedder.time_proj": (6 * dim, dim),
        "condition_embedder.text_embedder.linear_1": (dim, shape.text_dim),
        "condition_embedder.text_embedder.linear_2": (dim, dim),
        "proj_out": (shape.out_channels * volume, dim),
    }
    if shape.image_dim is not None:
        image = "condition_embedder.image_embedder."
        linear[image + "norm1"] = (shape.image_dim,)
        linear[image + "ff.net.0.proj"] = (shape.image_dim, shape.image_dim)
        linear[image + "ff.net.2"] = (dim, shape.image_dim)
        linear[image + "norm2"] = (dim,)
    if shape.vace_in_channels is not None:
        linear["vace_patch_embedding"] = (dim, shape.vace_in_channels, *shape.patch_size)
    if shape.animate == 1:
        linear["pose_patch_embedding"] = (dim, shape.out_channels, *shape.patch_size)
    top = _with_biases(linear) | control_tensors(shape) | {"scale_shift_table": (1, 2, dim)}
    if shape.pos_embed_seq_len is not None and shape.image_dim is not None:
        positions = (1, shape.pos_embed_seq_len, shape.image_dim)
        top["condition_embedder.image_embedder.pos_embed"] = positions
    block, after, before = (
        _block(shape), _with_biases({"proj_out": (dim, dim)}), _with_biases({"proj_in": (dim, dim)})
    )  # fmt: skip
    if layout == "original":
        top = {original_name(name): size for name, size in top.items()}
        block, after, before = map(_original_block, (block, after, before))
    tensors = top
    for index in range(shape.layers):
        tensors |= {f"blocks.{index}.{name}": size for name, size in block.items()}
    for index in range(len(shape.vace_layers)):
        own = block | after | (before if index == 0 else {})
        tensors |= {f"vace_blocks.{index}.{name}": size for name, size in own.items()}
    if shape.face is not None:
        tensors |= face_tensors(shape.face, dim, shape.head_dim, layout)
    return tensors


def _with_biases(layers: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the weights and biases of layers, given by the shapes of their weights."""
    out: dict[str, tuple[int, ...]] = {}
    for name, size in layers.items():
        out[name + ".weight"], out[name + ".bias"] = size, size[:1]
    return out


def control_tensors(shape: TransformerShape) -> dict[str, tuple[int, ...]]:
    """Return the layers by which the Fun models read a reference picture and a camera."""
    dim, patch = shape.dim, shape.patch_size[1:]
    out: dict[str, tuple[int, ...]] = {}
    if shape.reference_channels is not None:
        out["ref_conv"] = (dim, shape.reference_channels, *patch)
    if shape.camera_channels is not None:
        out["control_adapter.conv"] = (dim, shape.camera_channels * UNSHUFFLED**2, *patch)
        for name in ("conv1", "conv2"):
            out[f"control_adapter.residual_blocks.0.{name}"] = (dim, dim, 3, 3)
    return _with_biases(out)


def _block(shape: TransformerShape) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one block, by diffusers' names within it."""
    dim, ffn = shape.dim, shape.ffn_dim
    attentions = [f"{attn}.to_{part}" for attn in ("attn1", "attn2") for part in _PROJECTIONS]
    out = _with_biases(dict.fromkeys(attentions, (dim, dim)))
    out |= _with_biases({"norm2": (dim,), "ffn.net.0.proj": (ffn, dim), "ffn.net.2": (dim, ffn)})
    out["scale_shift_table"] = (1, 6, dim)
    norms = [f"{attn}.norm_{part}.weight" for attn in ("attn1", "attn2") for part in "qk"]
    out |= dict.fromkeys(norms, (dim,))
    if shape.added_kv_dim is not None:
        added = (dim, shape.added_kv_dim)
        out |= _with_biases({"attn2.add_k_proj": added, "attn2.add_v_proj": added})
        out["attn2.norm_added_k.weight"] = (dim,)
    return out


def _original_block(tensors: Shapes) -> dict[str, tuple[int, ...]]:
    """Return a block's tensors by their official names."""
    start = "blocks.0."
    return {original_name(start + name).removeprefix(start): size for name, size in tensors.items()}


_VAE_NAMES: Final[Mapping[str, Mapping[str, str]]] = {
    "diffusers": {
        "encoder_in": "encoder.conv_in.weight", "decoder_in": "decoder.conv_in.weight",
        "latent": "post_quant_conv.weight", "out": "decoder.conv_out.bias",
    },
    "original": {
        "encoder_in": "encoder.conv1.weight", "decoder_in": "decoder.conv1.weight",
        "latent": "conv2.weight", "out": "decoder.head.2.bias",
    },
}  # fmt: skip


# Latent channels -> mean and std of the latents. No tensor holds them: each VAE has its own.
_STATISTICS: Final[Mapping[int, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    16: (LATENTS_MEAN_21, LATENTS_STD_21),
    48: (LATENTS_MEAN_22, LATENTS_STD_22),
}


def read_vae(shapes: Shapes, layout: str) -> VaeShape:
    """Return the numbers of a Wan VAE from its shapes, names without prefix.

    The latents' statistics are the published ones for 16 and 48 channels, and empty (unknown) for
    any other number. Raises CorruptFile naming what is missing or impossible.
    """
    names = _VAE_NAMES[layout]
    base = _rows(shapes, names["encoder_in"])
    z_dim = _rows(shapes, names["latent"])
    levels = _vae_levels(shapes, layout)
    if not levels:
        raise CorruptFile("The VAE's encoder has no blocks; the file is incomplete. Get it again.")
    mult = tuple(max(1, round(level.width / base)) for level in levels)
    temporal = tuple(level.temporal for level in levels[:-1])
    kernel = 27  # 3 x 3 x 3, from the element count: some GGUF writers flatten the 5-D weight
    in_channels = math.prod(_shape(shapes, names["encoder_in"])) // (base * kernel)
    residual = levels[0].nested
    patch = 2 if residual and in_channels == 12 else None
    return VaeShape(
        z_dim=z_dim,
        base_dim=base,
        decoder_base_dim=max(1, round(_rows(shapes, names["decoder_in"]) / mult[-1])),
        dim_mult=mult,
        num_res_blocks=max(level.blocks for level in levels),
        temporal_downsample=temporal,
        is_residual=residual,
        in_channels=in_channels,
        out_channels=_size(shapes, names["out"], 0),
        patch_size=patch,
        scale_factor_spatial=2 ** (len(levels) - 1) * (patch or 1),
        scale_factor_temporal=2 ** sum(temporal),
        latents_mean=_STATISTICS.get(z_dim, ((), ()))[0],
        latents_std=_STATISTICS.get(z_dim, ((), ()))[1],
    )


class _Level:
    """One resolution of the encoder: its width, its residual blocks, and whether its downsampler
    also halves the number of frames."""

    def __init__(self, nested: bool) -> None:
        self.width, self.blocks, self.temporal, self.nested = 0, 0, False, nested


# A residual block's second convolution in each layout. Group 1 is the level (2.2, nested) or the
# index in the flat list of layers (2.1); group 2 is the index inside the level, where nested.
_VAE_CONV: Final = {
    "diffusers": r"encoder\.down_blocks\.(\d+)\.(?:resnets\.(\d+)\.)?conv2\.weight$",
    "original": r"encoder\.downsamples\.(\d+)\.(?:downsamples\.(\d+)\.)?residual\.6\.weight$",
}
_VAE_SAMPLE: Final = {
    "diffusers": r"encoder\.down_blocks\.(\d+)\.(?:downsampler\.)?(resample\.1|time_conv)\.weight",
    "original": r"encoder\.downsamples\.(\d+)\.(?:downsamples\.\d+\.)?"
    r"(resample\.1|time_conv)\.weight",
}


def _vae_levels(shapes: Shapes, layout: str) -> list[_Level]:
    """Read the encoder's resolutions from nested (2.2) or flat (2.1) block names.

    In a flat list the downsamplers separate the levels: a layer's level is the number of
    downsamplers before it.
    """
    convs = {m: _rows(shapes, n) for n in shapes if (m := re.match(_VAE_CONV[layout], n))}
    samples = [m for n in shapes if (m := re.match(_VAE_SAMPLE[layout], n))]
    if not convs:
        return []
    nested = any(match[2] is not None for match in convs)
    ends = sorted({int(m[1]) for m in samples if m[2] != "time_conv"})
    temporal = {int(m[1]) for m in samples if m[2] == "time_conv"}

    def level_of(index: int) -> int:
        return index if nested else sum(end < index for end in ends)

    count = 1 + max(level_of(int(match[1])) for match in convs)
    levels = [_Level(nested) for _ in range(min(count, 16))]
    for match, rows in convs.items():
        level = levels[min(level_of(int(match[1])), len(levels) - 1)]
        level.width, level.blocks = rows, level.blocks + 1
    for index in temporal:
        levels[min(level_of(index), len(levels) - 1)].temporal = True
    return levels
