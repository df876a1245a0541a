"""What one file of weights is: kind, layout and prefix of its names, weight kind, numbers, and why.

Decides from tensor names, shapes and dtypes, never from the file's name. Besides the header, only
the few bytes of ``comfy_quant`` notes are read. A file that is not part of a Wan model is still
named for what it is, so that a message can say "this is a LoRA" instead of "keys are missing".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import CorruptFile
from ..files import some_of
from ..formats import (
    QUANT_SUFFIXES,
    TensorInfo,
    TensorTable,
    WeightKind,
    logical_shape,
    read_weight_kind,
)
from ..models import TransformerShape, VaeShape, read_transformer, read_vae, transformer_tensors
from .unsupported import is_lora, lora_title, lora_width, unsupported_title


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentifiedFile:
    """A file of weights, or a set of shards, that detection has recognised."""

    kind: str
    """transformer, vae, text_encoder, image_encoder, lora, or other."""
    title: str
    """What it is, in words, for messages: "a Wan transformer", "a LoRA for FLUX"."""
    table: TensorTable
    layout: str = "original"
    prefix: str = ""
    weights: WeightKind = WeightKind("bf16")
    family: str = ""
    """For a transformer: t2v, i2v, flf2v, vace, animate, s2v, camera, control, humo or other."""
    transformer: TransformerShape | None = None
    vae: VaeShape | None = None
    width: int | None = None
    """Width of a text or image encoder, or of the model a LoRA is made for."""
    layers: int | None = None
    missing: tuple[str, ...] = ()
    """Tensors that a transformer of this shape has and the file lacks."""
    unexpected: tuple[str, ...] = ()
    """Tensors the file has and a plain Wan transformer does not."""
    extra_prefixes: tuple[str, ...] = ()
    """First part of the names of tensors in the same file that belong to other models."""
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


# Tensors that every Wan transformer has, per layout; names without prefix.
_MARKERS: Final[Mapping[str, tuple[str, ...]]] = {
    "original": (
        "patch_embedding.weight", "head.modulation", "time_projection.1.weight",
        "text_embedding.0.weight", "blocks.0.modulation",
    ),
    "diffusers": (
        "patch_embedding.weight", "scale_shift_table", "condition_embedder.time_proj.weight",
        "condition_embedder.text_embedder.linear_1.weight", "blocks.0.scale_shift_table",
    ),
}  # fmt: skip

# (family, a tensor that only it has, its name for messages). The first match decides. The names are
# from ComfyUI's model_detection.py and the models' own repositories.
_FAMILIES: Final = (
    ("vace", "vace_patch_embedding.weight", "VACE"),
    ("s2v", "casual_audio_encoder.encoder.final_linear.weight", "S2V (speech to video)"),
    ("s2v", "trainable_cond_mask.weight", "S2V (speech to video)"),
    ("humo", "audio_proj.audio_proj_glob_1.layer.bias", "HuMo"),
    ("animate", "face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
    ("animate", "motion_encoder.motion_synthesis_weight", "Animate"),
    ("animate", "motion_encoder.dec.direction.weight", "Animate"),
    ("camera", "control_adapter.conv.weight", "Fun Camera"),
    ("other", "patch_embedding_mask.weight", "SCAIL 2"),
    ("other", "patch_embedding_pose.weight", "SCAIL"),
    ("other", "patch_embedding_global.weight", "WanDancer"),
    ("other", "audio_proj.proj1.weight", "MultiTalk / InfiniteTalk"),
    ("other", "fps_embedding.weight", "SkyReels-V2 diffusion forcing"),
    ("other", "blocks.0.cam_encoder.weight", "ReCamMaster"),
    ("other", "dwpose_embedding.0.weight", "UniAnimate"),
    ("other", "blocks.0.cross_attn.processor.k_proj.weight", "FantasyTalking"),
)

_VAE_MARKERS: Final = {
    "original": ("decoder.middle.0.residual.0.gamma", "encoder.conv1.weight", "conv2.weight"),
    "diffusers": (
        "decoder.mid_block.resnets.0.norm1.gamma", "encoder.conv_in.weight",
        "post_quant_conv.weight",
    ),
}  # fmt: skip


def identify(table: TensorTable) -> IdentifiedFile:
    """Say what the tensors of ``table`` are.

    A model that is not part of Wan raises nothing: its ``kind`` is "other" and its name is in
    ``title``. Raises CorruptFile for a Wan file that is damaged, UnsupportedModel for weights of a
    dtype that no weight can have.
    """
    names = table.tensors
    for finder in (_find_lora, _find_transformer, _find_vae, _find_text, _find_image):
        part = finder(table, names)
        if part is not None:
            return part
    return IdentifiedFile(
        kind="other", title=unsupported_title(table), table=table, reasons=_near_miss(names)
    )


def _find_lora(table: TensorTable, names: Mapping[str, TensorInfo]) -> IdentifiedFile | None:
    if not is_lora(names):
        return None
    return IdentifiedFile(
        kind="lora", title=lora_title(names), table=table, width=lora_width(names),
        reasons=(f"{_label(table)}: its tensors are low-rank patches of another model",),
    )  # fmt: skip


def _near_miss(names: Mapping[str, Any]) -> tuple[str, ...]:
    """Say how many of the tensors that every Wan transformer has were found, and which lack."""
    best = max(
        _MARKERS.items(), key=lambda item: sum(any(n.endswith(m) for n in names) for m in item[1])
    )
    lacking = [m for m in best[1] if not any(n.endswith(m) for n in names)]
    found = len(best[1]) - len(lacking)
    return (
        f"{found} of {len(best[1])} tensors that every Wan transformer has were found; missing: "
        f"{some_of(lacking, 5)}",
    )


def _label(table: TensorTable) -> str:
    """Return the file's name, with its folder where the name alone is generic."""
    name = table.path.name
    generic = name.startswith(("diffusion_pytorch_model", "model."))
    return f"{table.path.parent.name}/{name}" if generic else name


def _prefixes(names: Mapping[str, Any], marker: str) -> list[str]:
    """Return the prefixes under which the tensor ``marker`` occurs, shortest first."""
    found = {n[: -len(marker)] for n in names if n.endswith(marker)}
    return sorted((p for p in found if not p or p.endswith(".")), key=len)


def _strip(names: Mapping[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    cut = len(prefix)
    return {n[cut:]: info for n, info in names.items() if n.startswith(prefix)}


def _find_transformer(table: TensorTable, names: Mapping[str, TensorInfo]) -> IdentifiedFile | None:
    for layout, markers in _MARKERS.items():
        for prefix in _prefixes(names, markers[1]):
            if all(prefix + marker in names for marker in markers):
                return _transformer(table, layout, prefix)
    return None


def _transformer(table: TensorTable, layout: str, prefix: str) -> IdentifiedFile:
    own = _strip(table.tensors, prefix)
    weights = read_weight_kind(table, own)
    shapes = {
        n: logical_shape(n, info, weights)
        for n, info in own.items()
        if not n.endswith(QUANT_SUFFIXES)
    }
    shape = read_transformer(shapes, layout)
    family, title, what = _family(own, shape)
    expected = transformer_tensors(shape, layout)
    missing = tuple(n for n in expected if n not in shapes)
    unexpected = tuple(n for n in shapes if n not in expected and n != "scaled_fp8")
    reasons = [
        f"{_label(table)}: {len(own):,} tensors with {layout} names"
        + (f" under {prefix!r}" if prefix else ""),
        f"width {shape.dim}, {shape.layers} blocks, FFN {shape.ffn_dim}, channels "
        f"{shape.in_channels} in and {shape.out_channels} out",
        what,
    ]
    others = {n.split(".")[0] for n in table.tensors if not n.startswith(prefix)}
    if not weights.packed:
        _check_shapes(table.path, shapes, expected)
    return IdentifiedFile(
        kind="transformer", title=f"a Wan {title} transformer", table=table, prefix=prefix,
        layout="comfyui" if prefix and layout == "original" else layout, weights=weights,
        family=family, transformer=shape, width=shape.dim, layers=shape.layers, missing=missing,
        unexpected=unexpected, extra_prefixes=tuple(sorted(others)), reasons=tuple(reasons),
        warnings=(*weights.warnings, *_others(table, others)),
    )  # fmt: skip


def _others(table: TensorTable, others: set[str]) -> tuple[str, ...]:
    strange = sorted(others - {"scaled_fp8"})
    if not strange:
        return ()
    return (f"{_label(table)} also holds {some_of(strange)}; only its transformer is looked at.",)


def _family(own: Mapping[str, Any], shape: TransformerShape) -> tuple[str, str, str]:
    """Return the family, its name for messages, and the sentence that says why.

    A tensor that only one family has decides; without one, the extra input channels do. They hold
    the mask (4 channels) and the encoded image (as many as the latents) of an image model.
    """
    for family, marker, title in _FAMILIES:
        if marker in own:
            return family, title, f"it has {marker!r}: {title}"
    extra = shape.in_channels - shape.out_channels
    images = shape.image_dim is not None
    if shape.pos_embed_seq_len is not None:
        why = f"it has learned positions for {shape.pos_embed_seq_len} image tokens"
        return "flf2v", "first/last-frame", why
    if extra == 0 and not images:
        why = "as many channels in as out and no image branch: text to video"
        return "t2v", "text-to-video", why
    if extra == shape.out_channels + 4:
        branch = "an image branch (CLIP)" if images else "no image branch"
        why = f"4 mask and {shape.out_channels} image channels more in than out, {branch}"
        return "i2v", "image-to-video", why
    why = f"{extra} channels more in than out: a control or inpainting model"
    return "control", "control or inpainting", why


def _check_shapes(
    path: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in expected.items():
        found = shapes.get(name)
        # Equal element counts suffice: GGUF writers may flatten a weight of five dimensions.
        if found is not None and found != shape and _volume(found) != _volume(shape):
            raise CorruptFile(
                f"Tensor {name!r} of {str(path)!r} has shape {list(found)}; its other tensors "
                f"call for {list(shape)}. The file is damaged or mixed. Download it again."
            )


def _volume(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _find_vae(table: TensorTable, names: Mapping[str, TensorInfo]) -> IdentifiedFile | None:
    for layout, markers in _VAE_MARKERS.items():
        for prefix in _prefixes(names, markers[0]):
            own = _strip(names, prefix)
            if any(marker not in own for marker in markers):
                continue
            if len(own[markers[1]].shape) != 5:
                continue
            vae = read_vae({n: i.shape for n, i in own.items()}, layout)
            version = "2.2" if vae.is_residual else "2.1"
            return IdentifiedFile(
                kind="vae", title=f"a Wan {version} VAE ({vae.z_dim} channels)", table=table,
                layout=layout, prefix=prefix, vae=vae, weights=read_weight_kind(table, own),
                reasons=(
                    f"{_label(table)}: VAE with {vae.z_dim} latent channels, "
                    + ("nested residual blocks: 2.2" if vae.is_residual else "flat blocks: 2.1"),
                ),
            )  # fmt: skip
    return None


# (embedding, query of the first block, relative position bias of block {})
_T5_NAMES: Final = {
    "diffusers": (
        "shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    "original": (
        "token_embedding.weight", "blocks.0.attn.q.weight",
        "blocks.{}.pos_embedding.embedding.weight",
    ),
    "gguf": ("token_embd.weight", "enc.blk.0.attn_q.weight", "enc.blk.{}.attn_rel_b.weight"),
}  # fmt: skip
_T5_BLOCKS: Final = {
    "diffusers": "encoder.block.{}.",
    "original": "blocks.{}.",
    "gguf": "enc.blk.{}.",
}


def _find_text(table: TensorTable, names: Mapping[str, TensorInfo]) -> IdentifiedFile | None:
    for layout, (embedding, query, bias) in _T5_NAMES.items():
        for prefix in _prefixes(names, query):
            own = _strip(names, prefix)
            token = own.get(embedding) or own.get("encoder.embed_tokens.weight")
            if token is None or len(token.shape) != 2 or bias.format(0) not in own:
                continue
            layers = 0
            while any(n.startswith(_T5_BLOCKS[layout].format(layers)) for n in own):
                layers += 1
            # umT5 has a position bias in every block, T5 only in its first.
            umt5 = layers < 2 or bias.format(1) in own
            vocabulary, width = token.shape
            name = "umT5" if umt5 else "T5"
            return IdentifiedFile(
                kind="text_encoder" if umt5 else "other",
                title=f"a {name} text encoder (width {width}, {layers} blocks)", table=table,
                layout=layout, prefix=prefix, width=width, layers=layers,
                weights=read_weight_kind(table, own),
                reasons=(
                    f"{_label(table)}: {name}, width {width}, {layers} blocks, vocabulary "
                    f"{vocabulary:,}",
                ),
            )  # fmt: skip
    return None


_CLIP_NAMES: Final = {
    "diffusers": ("embeddings.class_embedding", "encoder.layers.0."),
    "original": ("visual.cls_embedding", "visual.transformer.0."),
}


def _find_image(table: TensorTable, names: Mapping[str, TensorInfo]) -> IdentifiedFile | None:
    for layout, (marker, block) in _CLIP_NAMES.items():
        for prefix in _prefixes(names, marker):
            if not any(n.startswith(prefix + block) for n in names):
                continue
            own = _strip(names, prefix)
            width = own[marker].shape[-1] if own[marker].shape else 0
            return IdentifiedFile(
                kind="image_encoder", title=f"a CLIP image encoder (width {width})", table=table,
                layout=layout, prefix=prefix, width=width,
                weights=read_weight_kind(table, own),
                reasons=(f"{_label(table)}: CLIP vision model of width {width}",),
            )  # fmt: skip
    return None
