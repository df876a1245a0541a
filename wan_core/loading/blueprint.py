"""Which module class a component is built from, with which configuration, and the module itself.

A diffusers or transformers folder says both in its config.json. A single file says neither: both
are then derived from the shapes of its tensors (``models.shapes``). Nothing is ever fetched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ..detect import IdentifiedFile, read_config
from ..errors import (
    CorruptFile,
    MissingDependency,
    ModelMismatch,
    UnsupportedModel,
    first_line,
)
from ..files import quoted
from ..formats import logical_shape
from ..models import (
    UNSHUFFLED,
    Mapped,
    TransformerShape,
    VaeShape,
    count_blocks,
    read_transformer,
    read_vae,
)

Shapes = Mapping[str, tuple[int, ...]]

_CLASSES: Final[Mapping[str, str]] = {
    "WanTransformer3DModel": "transformer",
    "WanVACETransformer3DModel": "transformer",
    "WanAnimateTransformer3DModel": "transformer",
    "AutoencoderKLWan": "vae",
    "UMT5EncoderModel": "text_encoder",
    "CLIPVisionModel": "image_encoder",
}
# ``model_type`` in transformers' config.json, and the class that reads such weights.
_MODEL_TYPES: Final = {
    "umt5": "UMT5EncoderModel",
    "clip_vision_model": "CLIPVisionModel",
    "clip": "CLIPVisionModel",
}
_MAX_NUMBER: Final = 2**21
_MAX_BLOCKS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """A class of diffusers or transformers, its configuration, and where both came from.

    ``origin`` is for messages; ``from_file`` says whether it is a config.json.
    """

    kind: str
    class_name: str
    config: Mapping[str, Any]
    origin: str
    from_file: bool


def stated_blueprint(path: Path) -> Blueprint | None:
    """Return what the config.json of a component's folder states; None where there is none.

    Raises UnsupportedModel where it describes something that WanFit does not load, CorruptFile for
    numbers that make no sense.
    """
    file = path / "config.json"
    return _from_config(file) if path.is_dir() and file.is_file() else None


def with_vace(stated: Blueprint, part: IdentifiedFile) -> Blueprint:
    """Return the blueprint of a text-to-video transformer joined with a VACE module."""
    shape = part.transformer
    assert shape is not None
    config = {key: value for key, value in stated.config.items() if key != "_class_name"}
    config |= {"vace_layers": list(shape.vace_layers), "vace_in_channels": shape.vace_in_channels}
    return replace(stated, class_name="WanVACETransformer3DModel", config=config)


def add_fun_layers(module: nn.Module, shape: TransformerShape) -> None:
    """Give a transformer the layers by which the Fun models read a reference and a camera.

    diffusers' class has neither. The names are those of VideoX-Fun's files; what the layers compute
    is in ``forward.fun``. They are made on the meta device, like the rest of the module.
    """
    dim, patch = shape.dim, shape.patch_size[1:]
    if shape.reference_channels is not None:
        module.add_module(
            "ref_conv",
            nn.Conv2d(shape.reference_channels, dim, patch, stride=patch, device="meta"),
        )
    if shape.camera_channels is not None:
        adapter, block = nn.Module(), nn.Module()
        pixels = shape.camera_channels * UNSHUFFLED**2
        adapter.add_module("conv", nn.Conv2d(pixels, dim, patch, stride=patch, device="meta"))
        for name in ("conv1", "conv2"):
            block.add_module(name, nn.Conv2d(dim, dim, 3, padding=1, device="meta"))
        adapter.add_module("residual_blocks", nn.Sequential(block))
        module.add_module("control_adapter", adapter)


def found_blueprint(part: IdentifiedFile, mapped: Mapped) -> Blueprint:
    """Derive the blueprint from the shapes of the tensors.

    Raises CorruptFile where a tensor that is needed for this is missing.
    """
    shapes = {}
    for name, source in mapped.sources.items():
        # One stored tensor may hold several of ours one above the other (fused q, k, v), and two
        # numbers in a byte.
        stored = part.table.tensors[source.name]
        rows, *rest = logical_shape(
            source.name.removeprefix(part.prefix), stored, part.weights
        ) or (1,)
        shapes[name] = (rows // source.parts, *rest)
    build = {
        "transformer": _transformer, "vae": _vae, "text_encoder": _text, "image_encoder": _image,
    }[part.kind]  # fmt: skip
    class_name, config = build(shapes)
    return Blueprint(
        kind=part.kind, class_name=class_name, config=config, origin="the shapes of its tensors",
        from_file=False,
    )  # fmt: skip


def _from_config(file: Path) -> Blueprint | None:
    config = read_config(file)
    name = config.get("_class_name") or _MODEL_TYPES.get(str(config.get("model_type")))
    # The official release's own format, which VideoX-Fun writes under names of its own classes, one
    # of them diffusers'. The tensors' shapes say the same.
    if name == "WanModel" or ("dim" in config and ("num_heads" in config or name is None)):
        return None
    if not isinstance(name, str) or name not in _CLASSES:
        what = name or config.get("model_type") or "model without a name"
        raise UnsupportedModel(
            f"{quoted(file)} describes a {what}; WanFit loads {', '.join(_CLASSES)}."
        )
    vision = config.get("vision_config")
    if name == "CLIPVisionModel" and isinstance(vision, dict):
        config = vision
    _check_numbers(config, file)
    return Blueprint(
        kind=_CLASSES[name], class_name=name, config=config, origin=quoted(file), from_file=True
    )


def _check_numbers(config: Mapping[str, Any], file: Path) -> None:
    """Refuse numbers with which building the module would take hours or all the memory."""
    for key, value in config.items():
        limit = _MAX_BLOCKS if key in ("num_layers", "num_hidden_layers") else _MAX_NUMBER
        if isinstance(value, int) and not -_MAX_NUMBER <= value <= limit:
            raise CorruptFile(
                f"{key} in {quoted(file)} is {value:,}; at most {limit:,} makes sense. Restore the "
                "file from the model's download."
            )


def _size(shapes: Shapes, name: str, axis: int) -> int:
    shape = shapes.get(name)
    if shape is None or axis >= len(shape) or shape[axis] < 1:
        found = "is missing" if shape is None else f"has the impossible shape {list(shape)}"
        raise CorruptFile(f"The tensor that becomes {name!r} {found}. Download the file again.")
    return shape[axis]


def transformer_config(shape: TransformerShape) -> dict[str, Any]:
    """Return the configuration of diffusers' Wan (or VACE) transformer of this shape."""
    if not shape.heads_known:
        raise UnsupportedModel(
            f"The transformer is {shape.dim} wide, not a multiple of 128, and a single file does "
            "not say how many heads that is. Use the model's diffusers folder."
        )
    config: dict[str, Any] = {
        "patch_size": list(shape.patch_size), "num_attention_heads": shape.heads,
        "attention_head_dim": shape.head_dim, "in_channels": shape.in_channels,
        "out_channels": shape.out_channels, "text_dim": shape.text_dim,
        "freq_dim": shape.freq_dim, "ffn_dim": shape.ffn_dim, "num_layers": shape.layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
        "image_dim": shape.image_dim, "added_kv_proj_dim": shape.added_kv_dim,
        "rope_max_seq_len": 1024, "pos_embed_seq_len": shape.pos_embed_seq_len,
    }  # fmt: skip
    if shape.vace_in_channels is not None:
        config["vace_layers"] = list(shape.vace_layers)
        config["vace_in_channels"] = shape.vace_in_channels
    return config


def vae_config(shape: VaeShape) -> dict[str, Any]:
    """Return the configuration of diffusers' Wan VAE of this shape."""
    return {
        "base_dim": shape.base_dim, "decoder_base_dim": shape.decoder_base_dim,
        "z_dim": shape.z_dim, "dim_mult": list(shape.dim_mult),
        "num_res_blocks": shape.num_res_blocks, "attn_scales": [],
        "temperal_downsample": list(shape.temporal_downsample), "dropout": 0.0,
        "latents_mean": list(shape.latents_mean), "latents_std": list(shape.latents_std),
        "is_residual": shape.is_residual, "in_channels": shape.in_channels,
        "out_channels": shape.out_channels, "patch_size": shape.patch_size,
        "scale_factor_temporal": shape.scale_factor_temporal,
        "scale_factor_spatial": shape.scale_factor_spatial,
    }  # fmt: skip


def _transformer(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    config = transformer_config(read_transformer(shapes, "diffusers"))
    if "vace_layers" in config:
        return "WanVACETransformer3DModel", config
    if "motion_encoder.motion_synthesis_weight" in shapes:
        return "WanAnimateTransformer3DModel", config | _animate(shapes, config["num_layers"])
    return "WanTransformer3DModel", config


def _animate(shapes: Shapes, layers: int) -> dict[str, Any]:
    hidden = _size(shapes, "face_encoder.conv2.weight", 0)
    # The motion encoder's residual blocks halve the picture until it is 4 x 4. The configuration
    # lists channels by resolution, so the resolutions are counted back from the last one.
    widths = [_size(shapes, "motion_encoder.conv_in.weight", 0)]
    for index in range(count_blocks(shapes, "motion_encoder.res_blocks.")):
        widths.append(_size(shapes, f"motion_encoder.res_blocks.{index}.conv2.weight", 0))
    size = 4 * 2 ** (len(widths) - 1)
    return {
        "latent_channels": _size(shapes, "pose_patch_embedding.weight", 1),
        "motion_encoder_channel_sizes": {str(size >> i): w for i, w in enumerate(widths)},
        "motion_encoder_size": size,
        "motion_style_dim": _size(shapes, "motion_encoder.conv_out.weight", 0),
        "motion_dim": _size(shapes, "motion_encoder.motion_synthesis_weight", 1),
        "motion_encoder_dim": _size(shapes, "motion_encoder.motion_synthesis_weight", 0),
        "face_encoder_hidden_dim": hidden,
        "face_encoder_num_heads": _size(shapes, "face_encoder.conv1_local.weight", 0) // hidden,
        "inject_face_latents_blocks": math.ceil(
            layers / max(1, count_blocks(shapes, "face_adapter."))
        ),
    }


def _vae(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    return "AutoencoderKLWan", vae_config(read_vae(shapes, "diffusers"))


def _text(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    attention = "encoder.block.0.layer.0.SelfAttention."
    bias = attention + "relative_attention_bias.weight"
    heads = _size(shapes, bias, 1)
    return "UMT5EncoderModel", {
        "vocab_size": _size(shapes, "shared.weight", 0),
        "d_model": _size(shapes, "shared.weight", 1),
        "d_kv": _size(shapes, attention + "q.weight", 0) // heads,
        "d_ff": _size(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
        "num_layers": count_blocks(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": _size(shapes, bias, 0),
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
    }


def _image(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    width = math.prod(shapes.get("embeddings.class_embedding", (0,)))
    patch = _size(shapes, "embeddings.patch_embedding.weight", 3)
    positions = math.prod(shapes.get("embeddings.position_embedding.weight", (0,)))
    # No shape tells the number of heads. The published CLIP ViTs of width 768 have 12, the larger
    # ones 16.
    heads = 12 if width == 768 else 16
    if not width or width % heads:
        raise UnsupportedModel(
            f"The image encoder is {width} wide, which {heads} heads do not divide. WanFit knows "
            "CLIP ViT-H/14 (1280); use that, or the model's diffusers folder."
        )
    return "CLIPVisionModel", {
        "hidden_size": width,
        "intermediate_size": _size(shapes, "encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": count_blocks(shapes, "encoder.layers."),
        "num_attention_heads": heads,
        "image_size": math.isqrt(max(0, positions // width - 1)) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 1024,
    }


_FIRST_WITH = {"WanAnimateTransformer3DModel": "0.38"}
"""Versions of diffusers that have a class which the oldest that is supported has not."""


def build(plan: Blueprint) -> nn.Module:
    """Return the module of a blueprint with every parameter on the meta device (no memory).

    Raises ModelMismatch when its class does not accept the configuration, MissingDependency when
    the class cannot be imported.
    """
    try:
        if plan.kind in ("transformer", "vae"):
            import diffusers

            made: Any = getattr(diffusers, plan.class_name)
        else:
            import transformers

            made = getattr(transformers, plan.class_name)
    except (ImportError, AttributeError, RuntimeError) as err:  # the last: libraries' lazy imports
        raise MissingDependency(
            f"{plan.class_name} cannot be imported: {first_line(err)}. Install "
            f"diffusers >= {_FIRST_WITH.get(plan.class_name, '0.35')} and transformers >= 4.50."
        ) from err
    try:
        # Not accelerate's init_empty_weights: it patches nn.Module for all threads of the process.
        with torch.device("meta"):
            if plan.kind in ("transformer", "vae"):
                module = made.from_config(dict(plan.config))
            else:
                module = made(made.config_class.from_dict(dict(plan.config)))
    except Exception as err:  # each library has errors of its own for a bad configuration
        raise ModelMismatch(
            f"{plan.class_name} cannot be built from {plan.origin}: {err}. Restore the model's "
            "own config.json."
        ) from err
    assert isinstance(module, nn.Module)
    return module
