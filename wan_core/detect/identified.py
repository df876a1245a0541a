"""What one file of weights is: kind, layout and prefix of its names, weight kind, numbers, and why.

Decides from tensor names, shapes and dtypes, never from the file's name. Besides the header, only
the few bytes of ``comfy_quant`` notes are read. A file that is not part of a Wan model is still
named for what it is, so that a message can say "this is a LoRA" instead of "keys are missing". A
file that holds several components of a model is named for the first of them and lists the others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ..errors import CorruptFile
from ..files import quoted, some_of
from ..formats import (
    TensorTable,
    WeightKind,
    logical_shape,
    read_weight_kind,
    split_companions,
)
from ..models import (
    LAYOUTS,
    TAG,
    Layout,
    Leftover,
    TransformerShape,
    VaeShape,
    count_blocks,
    find_layouts,
    find_leftovers,
    is_lora,
    name_stem,
    nests_blocks,
    own_names,
    read_transformer,
    read_vae,
    transformer_tensors,
)
from .unsupported import lora_title, lora_width, part_of_several, unsupported_title


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentifiedFile:
    """A file of weights, or a set of shards, that detection has recognised."""

    kind: str
    """transformer, vae, text_encoder, image_encoder, vace (a module alone), lora, or other."""
    title: str
    """What it is, in words, for messages: "a Wan transformer", "a LoRA for FLUX"."""
    table: TensorTable
    """All tensors of the file."""
    own: TensorTable
    """The tensors of this component, by their names without prefix; no leftovers."""
    layout: str = "original"
    prefix: str = ""
    weights: WeightKind = WeightKind("bf16")
    family: str = ""
    """For a transformer: t2v, i2v, flf2v, vace, animate, animate2, s2v, camera, control, humo or
    other."""
    transformer: TransformerShape | None = None
    vae: VaeShape | None = None
    width: int | None = None
    """Width of a text or image encoder, or of the model a LoRA or a VACE module is made for."""
    layers: int | None = None
    vocabulary: int | None = None
    """Rows of a text encoder's embedding."""
    missing: tuple[str, ...] = ()
    """Tensors that a transformer of this shape, or the other blocks of an encoder, have and the
    file lacks."""
    unexpected: tuple[str, ...] = ()
    """Tensors the file has and a plain Wan transformer does not."""
    beside: tuple[IdentifiedFile, ...] = ()
    """Other components of a model in the same file, as all-in-one checkpoints have them."""
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> IdentifiedFile | None:
        """Return the component of this kind that the file holds, or None."""
        return next((part for part in (self, *self.beside) if part.kind == kind), None)


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


def identify(table: TensorTable, kind: str | None = None) -> IdentifiedFile:
    """Say what the tensors of ``table`` are; of an all-in-one file, what the one of ``kind`` is.

    A model that is not part of Wan raises nothing: its ``kind`` is "other" and its name is in
    ``title``. Raises CorruptFile for a Wan file that is damaged, UnsupportedModel for weights of a
    dtype that no weight can have.
    """
    names = table.tensors
    found = {
        one: layout for one, layout in find_layouts(names).items() if _plausible(table, *layout)
    }
    if not found:
        if is_lora(names):
            return _lora(table)
        return _vace_module(table) or _unsupported(table)
    try:
        parts = [_PARTS[one](_Own(table, *layout)) for one, layout in found.items()]
    except CorruptFile as err:
        several, advice = part_of_several(table)
        if several:
            raise CorruptFile(f"{quoted(table.path)} is {several}. {advice}") from err
        if str(table.path) in str(err):
            raise
        raise CorruptFile(f"{quoted(table.path)}: {err}") from err
    first, *more = parts
    warnings = (*first.warnings, *_strange(table, first, parts))
    whole = replace(first, beside=tuple(more), warnings=warnings)
    return (whole.of_kind(kind) if kind else None) or whole


def _plausible(table: TensorTable, layout: Layout, prefix: str) -> bool:
    """Whether the numbers of axes are those of the component; other models share some names."""
    names = own_names(table.tensors, prefix)
    if layout.kind == "vae":
        first = table.tensors[names[layout.marks[1]]] if isinstance(layout.marks[1], str) else None
        # GGUF writers may flatten a weight of five dimensions.
        return first is not None and (len(first.shape) == 5 or table.format == "gguf")
    if layout.kind == "text_encoder":
        return all(len(table.tensors[names[n]].shape) == 2 for n in _T5_EMBEDDING if n in names)
    return True


def _unsupported(table: TensorTable) -> IdentifiedFile:
    return IdentifiedFile(
        kind="other", title=unsupported_title(table), table=table, own=table,
        reasons=_near_miss(table.tensors),
    )  # fmt: skip


def _lora(table: TensorTable) -> IdentifiedFile:
    names = table.tensors
    return IdentifiedFile(
        kind="lora", title=lora_title(names), table=table, own=table, width=lora_width(names),
        reasons=(f"{_label(table)}: its tensors are low-rank patches of another model",),
    )  # fmt: skip


_VACE_PATCH: Final = "vace_patch_embedding.weight"


def _vace_module(table: TensorTable) -> IdentifiedFile | None:
    """Return the VACE blocks that are published without the transformer they belong to, or None."""
    ends = [name for name in table.tensors if name.endswith(_VACE_PATCH)]
    prefix = min(ends, key=len)[: -len(_VACE_PATCH)] if ends else ""
    known = own_names(table.tensors, prefix)
    layout = next(
        (
            layout
            for layout, last in (("original", "after_proj"), ("diffusers", "proj_out"))
            if f"vace_blocks.0.{last}.weight" in known
        ),
        None,
    )
    if not ends or layout is None:
        return None
    file = _Own(table, Layout("transformer", layout, ()), prefix)
    blocks = count_blocks(file.shapes, "vace_blocks.")
    feed = "vace_blocks.0.ffn." + ("0" if layout == "original" else "net.0.proj") + ".bias"
    width = file.shapes[_VACE_PATCH][0]
    shape = TransformerShape(
        heads=1, head_dim=width, ffn_dim=file.shapes.get(feed, (0,))[0], layers=1, in_channels=16,
        vace_layers=tuple(range(blocks)),
        vace_in_channels=math.prod(file.shapes[_VACE_PATCH]) // (4 * width),
    )  # fmt: skip
    expected = transformer_tensors(shape, layout)
    wanted = {name: size for name, size in expected.items() if name.startswith("vace_")}
    if not file.weights.why_not:  # what cannot be loaded may be packed
        _check_shapes(table.path, file.shapes, wanted)
    return IdentifiedFile(
        **file.numbers(), kind="vace", title="a VACE module without its base model", family="vace",
        width=width, layers=blocks, transformer=shape,
        missing=tuple(name for name in wanted if name not in file.shapes),
        unexpected=tuple(name for name in file.shapes if name not in wanted),
        reasons=(f"{_label(table)}: {blocks} VACE blocks of width {width}, no other blocks",),
    )  # fmt: skip


class _Own:
    """The tensors of one component in a file: under its prefix, without leftovers."""

    def __init__(self, table: TensorTable, layout: Layout, prefix: str) -> None:
        self.table, self.layout, self.prefix = table, layout.name, prefix
        names = own_names(table.tensors, prefix)
        self.leftovers: dict[str, Leftover] = find_leftovers(layout.kind, names)
        stored = {name: names[name] for name in names if name not in self.leftovers}
        self.tensors = {name: table.tensors[stored[name]] for name in stored}
        # By the names that loading looks them up with: those in the file, without the prefix.
        self.weights = read_weight_kind(
            table, {name[len(prefix) :]: table.tensors[name] for name in stored.values()}
        )
        self.shapes = {
            name: logical_shape(stored[name][len(prefix) :], self.tensors[name], self.weights)
            for name in split_companions(stored)[0]
        }

    def numbers(self) -> dict[str, Any]:
        """Return the fields that every component has."""
        weights = self.weights
        return {
            "table": self.table, "own": replace(self.table, tensors=self.tensors),
            "layout": self.layout, "prefix": self.prefix,
            "weights": weights, "warnings": (*weights.warnings, *self.said()),
        }  # fmt: skip

    def said(self) -> tuple[str, ...]:
        """Return a sentence for each kind of leftover that a user should know of."""
        out = []
        for what in dict.fromkeys(one.what for one in self.leftovers.values() if one.said):
            names = [name for name, one in self.leftovers.items() if one.what == what]
            out.append(
                f"{_label(self.table)} also holds {len(names)} tensors that are {what} "
                f"({some_of(names, 2)}); they are not used."
            )
        return tuple(out)


def _near_miss(names: Iterable[str]) -> tuple[str, ...]:
    """Say how many of the tensors that every Wan transformer has were found, and which lack."""
    known = list(names)
    best = max((one for one in LAYOUTS if one.kind == "transformer"), key=lambda x: x.count(known))
    lacking = best.lacking(known)
    return (
        f"{len(best.marks) - len(lacking)} of {len(best.marks)} tensors that every Wan transformer "
        f"has were found; missing: {some_of(lacking, 5)}",
    )


def _label(table: TensorTable) -> str:
    """Return the file's name, with its folder where the name alone is generic."""
    name = table.path.name
    generic = name.startswith(("diffusion_pytorch_model", "model."))
    return f"{table.path.parent.name}/{name}" if generic else name


def _strange(
    table: TensorTable, first: IdentifiedFile, parts: Iterable[IdentifiedFile]
) -> tuple[str, ...]:
    """Name what else is in the file, beyond its components and what is known to be harmless."""
    if first.kind != "transformer":
        return ()  # an encoder is often saved with the rest of its model
    claimed = {info.name for part in parts for info in part.own.tensors.values()}
    prefixes = tuple(part.prefix for part in parts if part.prefix)
    rest = [n for n in table.tensors if n not in claimed and not n.startswith(prefixes)]
    known = find_leftovers("transformer", rest)
    strange = {
        n.split(".")[0]
        for n in rest
        if n not in known and n.split(".")[-1] not in ("scaled_fp8", "spiece_model", "logit_scale")
    }
    if not strange:
        return ()
    return (f"{_label(table)} also holds {some_of(sorted(strange))}, which is not used.",)


def _transformer(file: _Own) -> IdentifiedFile:
    table, shapes, layout, prefix = file.table, file.shapes, file.layout, file.prefix
    shape = read_transformer(shapes, layout)
    tag = next((n for n in file.leftovers if n.startswith(TAG) and "flf2v" in n.lower()), None)
    if tag is not None and shape.image_dim is not None and shape.pos_embed_seq_len is None:
        # The table of positions is then among the missing tensors.
        shape = replace(shape, pos_embed_seq_len=_FLF2V_POSITIONS)
    family, title, what = _family(file.tensors, shape)
    animate = _says_animate_2(table) if family == "i2v" and shape.image_dim is not None else ""
    if animate:
        family, title, what = "animate2", "Animate 2", f"{animate} says that it is Animate 2"
        shape = replace(shape, animate=2)
    if tag is not None:
        what += f"; it is tagged {tag.removeprefix(TAG)!r}"
    expected = transformer_tensors(shape, layout)
    if not file.weights.why_not:  # what cannot be loaded may be packed
        _check_shapes(table.path, shapes, expected)
    return IdentifiedFile(
        **{**file.numbers(), "layout": "comfyui" if prefix and layout == "original" else layout},
        kind="transformer", title=f"a Wan {title} transformer", family=family, transformer=shape,
        width=shape.dim, layers=shape.layers,
        missing=tuple(n for n in expected if n not in shapes),
        unexpected=tuple(n for n in shapes if n not in expected),
        reasons=(
            f"{_label(table)}: {len(file.tensors):,} tensors with {layout} names"
            + (f" under {prefix!r}" if prefix else ""),
            f"width {shape.dim}, {shape.layers} blocks, FFN {shape.ffn_dim}, channels "
            f"{shape.in_channels} in and {shape.out_channels} out",
            what,
        ),
    )  # fmt: skip


_FLF2V_POSITIONS: Final = 514
"""Image tokens of two pictures, with a class token each."""


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


_ANIMATE_2: Final = re.compile(r"animate[ _.-]?(?:v[ _.-]?)?2(?![0-9])", re.IGNORECASE)


def _says_animate_2(table: TensorTable) -> str:
    """Return what says that an image-to-video transformer is Animate 2; empty where nothing does.

    Its weights have exactly the shapes of Wan 2.1 I2V-14B (``model_animate2.py`` of ComfyUI, which
    tells them apart by ``transformer.model_type`` of the metadata's ``config``), so that its name
    counts too: run as image to video it would make a wrong picture without an error. The official
    release and diffusers' class have tensor names of their own.
    """
    named = next((name for name in table.tensors if nests_blocks(name)), "")
    if named:
        return f"the name of its tensor {named!r}"
    try:
        config = json.loads(table.metadata.get("config", "{}"))
    except (ValueError, RecursionError):
        config = {}
    inner = config.get("transformer") if isinstance(config, dict) else None
    kind = inner.get("model_type") if isinstance(inner, dict) else None
    if isinstance(kind, str) and _ANIMATE_2.fullmatch(kind.strip()):
        return f"its metadata (model_type {kind[:40]!r})"
    for key in ("general.name", "modelspec.title", "name", "model_type"):
        if _ANIMATE_2.search(table.metadata.get(key, "")):
            return f"its metadata ({key})"
    if _ANIMATE_2.search(name_stem(table.path.name)):
        return f"its name {_label(table)!r}"
    return ""


def _check_shapes(
    path: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in expected.items():
        found = shapes.get(name)
        # Equal element counts suffice: GGUF writers may flatten a weight of five dimensions.
        if found is not None and found != shape and math.prod(found) != math.prod(shape):
            raise CorruptFile(
                f"Tensor {name!r} of {str(path)!r} has shape {list(found)}; its other tensors "
                f"call for {list(shape)}. The file is damaged or mixed. Download it again."
            )


def _vae(file: _Own) -> IdentifiedFile:
    vae = read_vae(file.shapes, file.layout)
    version = "2.2" if vae.is_residual else "2.1"
    return IdentifiedFile(
        **file.numbers(), kind="vae", title=f"a Wan {version} VAE ({vae.z_dim} channels)", vae=vae,
        reasons=(
            f"{_label(file.table)}: VAE with {vae.z_dim} latent channels, "
            + ("nested residual blocks: 2.2" if vae.is_residual else "flat blocks: 2.1"),
        ),
    )  # fmt: skip


# Name of a block's tensors, and the relative position bias that umT5 has in every block.
_T5_BLOCKS: Final = {
    "diffusers": ("encoder.block.", "layer.0.SelfAttention.relative_attention_bias.weight"),
    "original": ("blocks.", "pos_embedding.embedding.weight"),
    "gguf": ("enc.blk.", "attn_rel_b.weight"),
}
_T5_EMBEDDING: Final = (
    "shared.weight", "encoder.embed_tokens.weight", "token_embedding.weight", "token_embd.weight",
)  # fmt: skip


def _text(file: _Own) -> IdentifiedFile:
    stem, bias = _T5_BLOCKS[file.layout]
    layers, missing = _blocks(file.shapes, stem)
    # umT5 has a position bias in every block, T5 only in its first.
    umt5 = layers < 2 or f"{stem}1.{bias}" in file.shapes
    embedding = next(file.shapes[name] for name in _T5_EMBEDDING if name in file.shapes)
    vocabulary, width = embedding if len(embedding) == 2 else (0, 0)
    name = "umT5" if umt5 else "T5"
    return IdentifiedFile(
        **file.numbers(), kind="text_encoder" if umt5 else "other", width=width, layers=layers,
        title=f"a {name} text encoder (width {width}, {layers} blocks)", vocabulary=vocabulary,
        missing=missing if umt5 else (),
        reasons=(
            f"{_label(file.table)}: {name}, width {width}, {layers} blocks, vocabulary "
            f"{vocabulary:,}",
        ),
    )  # fmt: skip


def _blocks(names: Iterable[str], stem: str) -> tuple[int, tuple[str, ...]]:
    """Return how many equal blocks there are, and the tensors that only some of them have."""
    inside: dict[int, set[str]] = {}
    pattern = re.compile(re.escape(stem) + r"(\d{1,4})\.(.+)")
    for found in map(pattern.fullmatch, names):
        if found:
            inside.setdefault(int(found[1]), set()).add(found[2])
    every = set().union(*inside.values()) if inside else set()
    count = max(inside, default=-1) + 1
    lacking = [
        f"{stem}{index}.{leaf}"
        for index in range(count)
        for leaf in every - inside.get(index, set())
    ]
    return count, tuple(sorted(lacking))


_CLIP_BLOCKS: Final = {"diffusers": "encoder.layers.", "original": "transformer."}
_CLIP_CLASS: Final = {"diffusers": "embeddings.class_embedding", "original": "cls_embedding"}


def _image(file: _Own) -> IdentifiedFile:
    shape = file.shapes[_CLIP_CLASS[file.layout]]
    width = shape[-1] if shape else 0
    layers, missing = _blocks(file.shapes, _CLIP_BLOCKS[file.layout])
    return IdentifiedFile(
        **file.numbers(), kind="image_encoder", width=width, layers=layers, missing=missing,
        title=f"a CLIP image encoder (width {width})",
        reasons=(f"{_label(file.table)}: CLIP vision model of width {width}",),
    )  # fmt: skip


_PARTS: Final = {
    "transformer": _transformer, "vae": _vae, "text_encoder": _text, "image_encoder": _image,
}  # fmt: skip
