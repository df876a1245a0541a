"""From the tensor names of a file to parameter names of diffusers' and transformers' modules.

Pure functions over names: no file is opened and torch is not imported. A parameter may be a slice
of a stored tensor (fused q, k, v); its :class:`Source` says so. A name
that no rule knows is passed through unchanged, so that loading reports it instead of losing it.

Names: ``wan/modules/{model,vae2_1,vae2_2,t5,clip,animate}`` of github.com/Wan-Video/Wan2.1 and
Wan2.2; umT5 also as in llama.cpp's GGUF files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from ..errors import ModelMismatch
from ..formats import split_companions
from .layouts import likely_layout, own_names
from .leftovers import find_leftovers


@dataclass(frozen=True, slots=True)
class Source:
    """Where the values of one parameter are stored: in the tensor ``name``.

    A fused tensor is divided into ``parts`` equal blocks of rows, of which the parameter is number
    ``part``. How the tensor is stored, ``formats.Storage`` says.
    """

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Mapped:
    """``sources`` by the module's parameter names; ``ignored`` are names that hold no weight."""

    sources: Mapping[str, Source]
    ignored: tuple[str, ...] = ()


def map_names(kind: str, names: Iterable[str], prefix: str = "") -> Mapped:
    """Map the names in a file of ``kind`` to parameter names of the module, whatever the layout.

    ``kind`` is transformer, vae, text_encoder or image_encoder. Names that do not begin with
    ``prefix`` belong to another component and are left out; what ``leftovers`` lists is ignored.
    CLIP names are returned without the ``vision_model.`` that older versions of transformers put
    before them. Raises ModelMismatch when two stored tensors claim one parameter.
    """
    own = own_names(names, prefix)
    leftovers = find_leftovers(kind, own)
    weights, ignored = split_companions(name for name in own if name not in leftovers)
    ignored += leftovers
    rename = _renamer(kind, weights)
    sources: dict[str, Source] = {}
    for name in weights:
        for target, source in rename(name):
            if target in sources:
                raise ModelMismatch(
                    f"{sources[target].name!r} and {own[name]!r} both stand for {target!r}. The "
                    "file mixes two layouts; download it again."
                )
            sources[target] = replace(source, name=own[name])
    return Mapped(sources, tuple(own[name] for name in ignored))


_Rename = Callable[[str], list[tuple[str, Source]]]


def _renamer(kind: str, names: list[str]) -> _Rename:
    layout = likely_layout(kind, names)
    if kind == "transformer":
        return _same if layout == "diffusers" else _original_transformer
    if kind == "vae":
        return _same if layout == "diffusers" else _vae_renamer(names)
    if kind == "text_encoder":
        return _text_renamer(names, layout)
    return _same_vision if layout == "diffusers" else _original_clip


def _same(name: str) -> list[tuple[str, Source]]:
    return [(name, Source(name))]


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """Replace the longest leading run of whole name parts that ``table`` knows."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        new = table.get(".".join(parts[:end]))
        if new is not None:
            return ".".join([new, *parts[end:]])
    return name


# Transformer -------------------------------------------------------------------------------------

_TRANSFORMER: Final = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "face_encoder.conv1_local.conv": "face_encoder.conv1_local",
    "face_encoder.conv2.conv": "face_encoder.conv2",
    "face_encoder.conv3.conv": "face_encoder.conv3",
    "motion_encoder.enc.fc": "motion_encoder.motion_network",
    "motion_encoder.dec.direction.weight": "motion_encoder.motion_synthesis_weight",
}
_ATTENTION: Final = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_BLOCK: Final = {
    # Wan's forward calls norm1, norm3, norm2 in this order, and diffusers numbers its norms by call
    # order. Only this one has weights.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
    "self_attn": "attn1",
    "cross_attn": "attn2",
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}
_ORIGINAL: Final = {new: old for old, new in _TRANSFORMER.items()}
_ORIGINAL_BLOCK: Final = {new: old for old, new in _BLOCK.items()}
_FACE: Final = {"q_norm": "norm_q", "k_norm": "norm_k", "linear1_q": "to_q", "linear2": "to_out"}
_IN_BLOCK: Final = re.compile(r"((?:vace_)?blocks\.\d+)\.(.+)")
_IN_FACE: Final = re.compile(r"face_adapter\.fuser_blocks\.(\d+)\.(.+)")
_IN_MOTION: Final = re.compile(r"motion_encoder\.enc\.net_app\.convs\.(\d+)\.(.+)")


def _original_transformer(name: str) -> list[tuple[str, Source]]:
    block = _IN_BLOCK.fullmatch(name)
    if block:
        return [(f"{block[1]}.{_renamed(block[2], _BLOCK)}", Source(name))]
    face = _IN_FACE.fullmatch(name)
    if face:
        layer, _, rest = face[2].partition(".")
        stem = f"face_adapter.{face[1]}"
        if layer == "linear1_kv":
            return [
                (f"{stem}.{new}.{rest}", Source(name, part, 2))
                for part, new in enumerate(("to_k", "to_v"))
            ]
        return [(f"{stem}.{_renamed(face[2], _FACE)}", Source(name))]
    motion = _IN_MOTION.fullmatch(name)
    if motion:
        return [(_motion_name(int(motion[1]), motion[2]), Source(name))]
    return [(_renamed(name, _TRANSFORMER), Source(name))]


def original_name(name: str) -> str:
    """Return the official name of a transformer's parameter; for those of faces, see ``faces``."""
    block = _IN_BLOCK.fullmatch(name)
    if block:
        return f"{block[1]}.{_renamed(block[2], _ORIGINAL_BLOCK)}"
    return _renamed(name, _ORIGINAL)


def _motion_name(index: int, rest: str) -> str:
    if rest == "weight":
        return "motion_encoder.conv_out.weight"
    *layer, leaf = [part for part in rest.split(".") if not part.isdigit()]
    leaf = "act_fn.bias" if leaf == "bias" else leaf
    if index == 0:
        return f"motion_encoder.conv_in.{leaf}"
    where = "conv_skip" if layer == ["skip"] else ".".join(layer)
    return f"motion_encoder.res_blocks.{index - 1}.{where}.{leaf}"


# VAE ---------------------------------------------------------------------------------------------

_VAE: Final = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{half}.{old}": f"{half}.{new}"
        for half in ("encoder", "decoder")
        for old, new in {
            "conv1": "conv_in",
            "head.0": "norm_out",
            "head.2": "conv_out",
            "middle.0": "mid_block.resnets.0",
            "middle.1": "mid_block.attentions.0",
            "middle.2": "mid_block.resnets.1",
        }.items()
    },
}
_RESIDUAL: Final = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_FLAT: Final = re.compile(r"(encoder\.downsamples|decoder\.upsamples)\.(\d+)\.(.+)")
_NESTED: Final = re.compile(
    r"(?:encoder\.downsamples|decoder\.upsamples)\.(\d+)\.(down|up)samples\.(\d+)\.(.+)"
)


def _vae_renamer(names: list[str]) -> _Rename:
    # The 2.1 decoder keeps the layers of all resolutions in one flat list. An upsampler is the last
    # layer of each resolution but the last, so the upsamplers' indices divide the list.
    ends = sorted(
        int(found[2])
        for found in map(_FLAT.fullmatch, names)
        if found and found[1] == "decoder.upsamples" and found[3] == "resample.1.weight"
    )
    return lambda name: [(_vae_name(name, ends), Source(name))]


def _vae_name(name: str, ends: list[int]) -> str:
    nested = _NESTED.fullmatch(name)
    if nested:
        block = f"{'encoder.down' if nested[2] == 'down' else 'decoder.up'}_blocks.{nested[1]}"
        if nested[4].startswith(("resample.", "time_conv.")):
            return f"{block}.{nested[2]}sampler.{nested[4]}"
        return f"{block}.resnets.{nested[3]}.{_renamed(nested[4], _RESIDUAL)}"
    flat = _FLAT.fullmatch(name)
    if not flat:
        new = _renamed(name, _VAE)
        half, _, rest = new.partition(".resnets.")
        return f"{half}.resnets.{rest[:2]}{_renamed(rest[2:], _RESIDUAL)}" if rest else new
    index, rest = int(flat[2]), _renamed(flat[3], _RESIDUAL)
    if flat[1].startswith("encoder"):
        return f"encoder.down_blocks.{index}.{rest}"
    block_index = sum(end < index for end in ends)
    if index in ends:
        return f"decoder.up_blocks.{block_index}.upsamplers.0.{rest}"
    first = ends[block_index - 1] + 1 if block_index else 0
    return f"decoder.up_blocks.{block_index}.resnets.{index - first}.{rest}"


# Text encoder ------------------------------------------------------------------------------------

_UMT5_TOP: Final = {
    "token_embedding": "shared",
    "token_embd": "shared",
    "norm": "encoder.final_layer_norm",
    "enc.output_norm": "encoder.final_layer_norm",
}
_UMT5_BLOCK: Final = {
    "norm1": "layer.0.layer_norm",
    "attn_norm": "layer.0.layer_norm",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    **{f"attn.{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
    **{f"attn_{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
    "norm2": "layer.1.layer_norm",
    "ffn_norm": "layer.1.layer_norm",
    # wi_0 is the branch that goes through the activation.
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_UMT5_IN_BLOCK: Final = re.compile(r"(?:blocks|enc\.blk)\.(\d+)\.(.+)")


def _text_renamer(names: list[str], layout: str) -> _Rename:
    if layout != "diffusers":
        return lambda name: [(_umt5_name(name), Source(name))]
    # The embedding is stored under one of two names, or under both.
    other, known = "encoder.embed_tokens.weight", set(names)
    if "shared.weight" in known:
        return lambda name: [] if name == other else _same(name)
    return lambda name: [("shared.weight" if name == other else name, Source(name))]


def _umt5_name(name: str) -> str:
    block = _UMT5_IN_BLOCK.fullmatch(name)
    if block:
        return f"encoder.block.{block[1]}.{_renamed(block[2], _UMT5_BLOCK)}"
    return _renamed(name, _UMT5_TOP)


# Image encoder -----------------------------------------------------------------------------------

_CLIP: Final = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
}
_CLIP_BLOCK: Final = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_FUSED: Final = {
    "attn.to_qkv.weight": "weight",
    "attn.to_qkv.bias": "bias",
}
_CLIP_IN_BLOCK: Final = re.compile(r"transformer\.(\d+)\.(.+)")


def _same_vision(name: str) -> list[tuple[str, Source]]:
    return [(name.removeprefix("vision_model."), Source(name))]


def _original_clip(name: str) -> list[tuple[str, Source]]:
    bare = name.removeprefix("visual.")
    block = _CLIP_IN_BLOCK.fullmatch(bare)
    if not block:
        return [(_renamed(bare, _CLIP), Source(name))]
    stem = f"encoder.layers.{block[1]}"
    leaf = _FUSED.get(block[2])
    if leaf:
        return [
            (f"{stem}.self_attn.{which}_proj.{leaf}", Source(name, part, 3))
            for part, which in enumerate("qkv")
        ]
    return [(f"{stem}.{_renamed(block[2], _CLIP_BLOCK)}", Source(name))]
