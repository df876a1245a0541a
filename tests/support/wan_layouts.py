"""Names and true shapes of published Wan files, and sparse files that have them.

Written from the attribute names of the official code (Wan-Video/Wan2.1, Wan2.2: ``wan/modules``),
of VideoX-Fun and of diffusers, without using any table of ``wan_core``. A sparse file has a real
header and a hole for its weights: the 28 GB of a 14B model take a few kilobytes of disk.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from support import bad_files

Shapes = dict[str, tuple[int, ...]]
BITS = {"F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "U8": 8, "I8": 8,
        "F8_E8M0": 8, "F4": 4}  # fmt: skip


def _pair(out: Shapes, name: str, *shape: int) -> None:
    out[name + ".weight"], out[name + ".bias"] = shape, shape[:1]


def _block(out: Shapes, name: str, dim: int, ffn: int, image: bool) -> None:
    out[name + ".modulation"] = (1, 6, dim)
    for attention in ("self_attn", "cross_attn"):
        for layer in "qkvo":
            _pair(out, f"{name}.{attention}.{layer}", dim, dim)
        out[f"{name}.{attention}.norm_q.weight"] = (dim,)
        out[f"{name}.{attention}.norm_k.weight"] = (dim,)
    _pair(out, name + ".norm3", dim)
    _pair(out, name + ".ffn.0", ffn, dim)
    _pair(out, name + ".ffn.2", dim, ffn)
    if image:
        _pair(out, name + ".cross_attn.k_img", dim, dim)
        _pair(out, name + ".cross_attn.v_img", dim, dim)
        out[name + ".cross_attn.norm_k_img.weight"] = (dim,)


def transformer(
    dim: int, ffn: int, layers: int, in_dim: int, out_dim: int = 16, *, image: bool = False,
    flf: bool = False, vace: int = 0, extra: Mapping[str, tuple[int, ...]] | None = None,
) -> Shapes:  # fmt: skip
    """A transformer under its official names; ``vace`` is the number of VACE blocks."""
    out: Shapes = {}
    _pair(out, "patch_embedding", dim, in_dim, 1, 2, 2)
    _pair(out, "text_embedding.0", dim, 4096)
    _pair(out, "text_embedding.2", dim, dim)
    _pair(out, "time_embedding.0", dim, 256)
    _pair(out, "time_embedding.2", dim, dim)
    _pair(out, "time_projection.1", 6 * dim, dim)
    for index in range(layers):
        _block(out, f"blocks.{index}", dim, ffn, image)
    out["head.modulation"] = (1, 2, dim)
    _pair(out, "head.head", out_dim * 4, dim)
    if image:
        _pair(out, "img_emb.proj.0", 1280)
        _pair(out, "img_emb.proj.1", 1280, 1280)
        _pair(out, "img_emb.proj.3", dim, 1280)
        _pair(out, "img_emb.proj.4", dim)
    if flf:
        out["img_emb.emb_pos"] = (1, 514, 1280)
    if vace:
        _pair(out, "vace_patch_embedding", dim, 96, 1, 2, 2)
        for index in range(vace):
            _block(out, f"vace_blocks.{index}", dim, ffn, image)
            _pair(out, f"vace_blocks.{index}.after_proj", dim, dim)
        _pair(out, "vace_blocks.0.before_proj", dim, dim)
    return out | dict(extra or {})


def vace_module(dim: int, ffn: int, blocks: int) -> Shapes:
    """The VACE blocks alone, as they are published without their base model."""
    whole = transformer(dim, ffn, 1, 16, vace=blocks)
    return {name: size for name, size in whole.items() if name.startswith("vace_")}


_WIDTHS = (32, 64, 128, 256, 512, 512, 512, 512)
_SMALL, _LARGE, _FIVE = (1536, 8960, 30), (5120, 13824, 40), (3072, 14336, 30)


def _camera(dim: int) -> Shapes:
    out: Shapes = {}
    _pair(out, "control_adapter.conv", dim, 24 * 64, 2, 2)
    for name in ("conv1", "conv2"):
        _pair(out, f"control_adapter.residual_blocks.0.{name}", dim, dim, 3, 3)
    return out


_REF = {"ref_conv.weight": (5120, 16, 2, 2), "ref_conv.bias": (5120,)}
_REF_5B = {"ref_conv.weight": (3072, 48, 2, 2), "ref_conv.bias": (3072,)}
_AUDIO = {"casual_audio_encoder.encoder.final_linear.weight": (5120, 512),
          "trainable_cond_mask.weight": (3, 5120)}  # fmt: skip


def animate(
    dim: int = 5120, head: int = 128, adapters: int = 8, widths: tuple[int, ...] = _WIDTHS,
    style: int = 512, motion: int = 20, hidden: int = 1024, heads: int = 4,
) -> Shapes:  # fmt: skip
    """What Animate has besides an image-to-video transformer, ``wan/modules/animate``."""
    out: Shapes = {}
    _pair(out, "pose_patch_embedding", dim, 16, 1, 2, 2)
    for index in range(adapters):
        block = f"face_adapter.fuser_blocks.{index}"
        _pair(out, f"{block}.linear1_kv", 2 * dim, dim)
        _pair(out, f"{block}.linear1_q", dim, dim)
        _pair(out, f"{block}.linear2", dim, dim)
        out[f"{block}.q_norm.weight"] = out[f"{block}.k_norm.weight"] = (head,)
    _pair(out, "face_encoder.conv1_local.conv", hidden * heads, style, 3)
    _pair(out, "face_encoder.conv2.conv", hidden, hidden, 3)
    _pair(out, "face_encoder.conv3.conv", hidden, hidden, 3)
    _pair(out, "face_encoder.out_proj", dim, hidden)
    out["face_encoder.padding_tokens"] = (1, 1, 1, dim)
    convs = "motion_encoder.enc.net_app.convs"
    out[f"{convs}.0.0.weight"] = (widths[0], 3, 1, 1)
    out[f"{convs}.0.1.bias"] = (1, widths[0], 1, 1)
    for index, (before, after) in enumerate(itertools.pairwise(widths), 1):
        block = f"{convs}.{index}"
        out[f"{block}.conv1.0.weight"] = (before, before, 3, 3)
        out[f"{block}.conv1.1.bias"] = (1, before, 1, 1)
        out[f"{block}.conv2.0.kernel"] = out[f"{block}.skip.0.kernel"] = (4, 4)
        out[f"{block}.conv2.1.weight"] = (after, before, 3, 3)
        out[f"{block}.conv2.2.bias"] = (1, after, 1, 1)
        out[f"{block}.skip.1.weight"] = (after, before, 1, 1)
    out[f"{convs}.{len(widths)}.weight"] = (style, widths[-1], 4, 4)
    for index in range(5):
        _pair(out, f"motion_encoder.enc.fc.{index}", motion if index == 4 else style, style)
    out["motion_encoder.dec.direction.weight"] = (style, motion)
    return out


_HUMO = {"audio_proj.audio_proj_glob_1.layer.bias": (512,)}

# published file: (its names and shapes, the variants it may be, the first being the answer)
FILES: dict[str, tuple[Shapes, tuple[str, ...]]] = {
    "t2v-1.3b": (transformer(*_SMALL, 16), ("wan2.1-t2v-1.3b",)),
    "t2v-14b": (transformer(*_LARGE, 16), ("wan2.1-t2v-14b", "wan2.2-t2v-a14b")),
    "i2v-14b": (transformer(*_LARGE, 36, image=True), ("wan2.1-i2v-14b",)),
    "flf2v-14b": (transformer(*_LARGE, 36, image=True, flf=True), ("wan2.1-flf2v-14b",)),
    "vace-1.3b": (transformer(*_SMALL, 16, vace=15), ("wan2.1-vace-1.3b",)),
    "vace-14b": (transformer(*_LARGE, 16, vace=8), ("wan2.1-vace-14b", "wan2.2-vace-fun-a14b")),
    "i2v-a14b": (transformer(*_LARGE, 36), ("wan2.2-i2v-a14b",)),
    "ti2v-5b": (transformer(*_FIVE, 48, 48), ("wan2.2-ti2v-5b",)),
    "animate-14b": (transformer(*_LARGE, 36, image=True, extra=animate()), ("wan2.2-animate-14b",)),
    "s2v-14b": (transformer(*_LARGE, 16, extra=_AUDIO), ("wan2.2-s2v-14b",)),
    "fun-inp-1.3b": (transformer(*_SMALL, 36, image=True), ("wan2.1-fun-inp-1.3b",)),
    "fun-control-1.3b": (
        transformer(*_SMALL, 48, image=True), ("wan2.1-fun-control-1.3b",)),
    "fun-control-14b": (
        transformer(*_LARGE, 48, image=True, extra=_REF), ("wan2.1-fun-control-14b",)),
    "fun-camera-1.3b": (
        transformer(*_SMALL, 32, image=True, extra=_camera(1536)), ("wan2.1-fun-camera-1.3b",)),
    "fun-camera-14b": (
        transformer(*_LARGE, 32, image=True, extra=_camera(5120)), ("wan2.1-fun-camera-14b",)),
    "fun-control-a14b": (transformer(*_LARGE, 52, extra=_REF), ("wan2.2-fun-control-a14b",)),
    "fun-camera-a14b": (transformer(*_LARGE, 36, extra=_camera(5120)), ("wan2.2-fun-camera-a14b",)),
    "fun-inp-5b": (transformer(*_FIVE, 100, 48), ("wan2.2-fun-inp-5b",)),
    "fun-control-5b": (transformer(*_FIVE, 148, 48, extra=_REF_5B), ("wan2.2-fun-control-5b",)),
    "humo-17b": (transformer(*_LARGE, 36, extra=_HUMO), ("wan2.1-humo-17b",)),
}  # fmt: skip


def shallow(shapes: Shapes) -> Shapes:
    """Leave two blocks of each kind: as wide as published, quick to write and to read."""
    return {n: s for n, s in shapes.items() if not re.match(r"(vace_)?blocks\.([2-9]|\d\d)", n)}


_TO_DIFFUSERS = (
    (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"^time_projection\.1", "condition_embedder.time_proj"),
    (r"^img_emb\.proj\.0", "condition_embedder.image_embedder.norm1"),
    (r"^img_emb\.proj\.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"^img_emb\.proj\.3", "condition_embedder.image_embedder.ff.net.2"),
    (r"^img_emb\.proj\.4", "condition_embedder.image_embedder.norm2"),
    (r"^img_emb\.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    (r"^head\.head", "proj_out"), (r"^head\.modulation", "scale_shift_table"),
    (r"modulation$", "scale_shift_table"), (r"\.norm3\.", ".norm2."),
    (r"ffn\.0\.", "ffn.net.0.proj."), (r"ffn\.2\.", "ffn.net.2."),
    (r"before_proj", "proj_in"), (r"after_proj", "proj_out"),
    (r"self_attn", "attn1"), (r"cross_attn", "attn2"),
    (r"(attn\d)\.([qkv])\.", r"\1.to_\2."), (r"(attn\d)\.o\.", r"\1.to_out.0."),
    (r"\.k_img\.", ".add_k_proj."), (r"\.v_img\.", ".add_v_proj."),
    (r"norm_k_img", "norm_added_k"),
    (r"^motion_encoder\.dec\.direction", "motion_encoder.motion_synthesis"),
)  # fmt: skip


def to_diffusers(name: str) -> str:
    for pattern, new in _TO_DIFFUSERS:
        name = re.sub(pattern, new, name)
    return name.replace("motion_synthesis.weight", "motion_synthesis_weight")


@dataclass
class Stored:
    """A file before it is written: tensors, metadata, and the bytes of its few small notes."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: dict[str, bytes] = field(default_factory=dict)


def stored(shapes: Shapes, kind: str) -> Stored:
    """Give every tensor a dtype, and the companions that a weight kind has."""
    plain = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}.get(kind, "F16")
    out = Stored({})
    if kind == "fp8_scaled old":
        out.tensors["scaled_fp8"] = ("F8_E4M3", (2,))
    layers = {}
    for name, shape in shapes.items():
        linear = name.endswith(".weight") and len(shape) == 2 and "blocks." in name
        layer = name.removesuffix(".weight")
        if not linear or kind in ("fp32", "bf16", "fp16"):
            out.tensors[name] = (plain, shape)
            continue
        form = _STORE[kind.split()[0]]
        for suffix, dtype, size in form(shape):
            out.tensors[layer + suffix] = (dtype, size)
        layers[layer] = {"format": _FORMATS[kind.split()[0]]}
        if kind.startswith("int8_convrot"):
            group = 256 if shape[1] % 256 == 0 else 4
            layers[layer] |= {"convrot": True, "convrot_groupsize": group}
        if kind == "fp8_scaled old":
            out.tensors[layer + ".scale_weight"] = ("F32", (1,))
            out.tensors[layer + ".scale_input"] = ("F32", (1,))
        elif kind.endswith("new"):
            note = json.dumps(layers[layer]).encode()
            out.tensors[layer + ".comfy_quant"] = ("U8", (len(note),))
            out.notes[layer + ".comfy_quant"] = note
        if kind in ("fp8_scaled new", "fp8_scaled metadata"):
            out.tensors[layer + ".weight_scale"] = ("F32", ())
    if kind.endswith("metadata"):
        out.metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    return out


def _fp8(shape: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(".weight", "F8_E4M3", shape)]


def _tiled(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """The shape of block scales, padded to tiles of 128 rows and 4 blocks."""
    return -(-shape[0] // 128) * 128, -(-(shape[1] // size) // 4) * 4


_STORE = {
    "fp8": _fp8, "fp8_scaled": _fp8,
    "fp8_e5m2": lambda shape: [(".weight", "F8_E5M2", shape)],
    "int8_convrot": lambda s: [(".weight", "I8", s), (".weight_scale", "F32", (s[0], 1))],
    "nvfp4": lambda s: [(".weight", "U8", (s[0], s[1] // 2)), (".weight_scale_2", "F32", ()),
                        (".weight_scale", "F8_E4M3", _tiled(s, 16))],
    "mxfp8": lambda s: [(".weight", "F8_E4M3", s), (".weight_scale", "U8", _tiled(s, 32))],
}  # fmt: skip
_FORMATS = {"fp8": "float8_e4m3fn", "fp8_scaled": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2",
            "int8_convrot": "int8_tensorwise", "nvfp4": "nvfp4", "mxfp8": "mxfp8"}  # fmt: skip

# how it is stored: what detection calls it (None: refused, and the word that says why)
KINDS: dict[str, tuple[str, str | None]] = {
    "fp32": ("fp32", None), "bf16": ("bf16", None), "fp16": ("fp16", None),
    "fp8": ("fp8", None), "fp8_e5m2": ("fp8_e5m2", None),
    "fp8_scaled old": ("fp8_scaled", None), "fp8_scaled new": ("fp8_scaled", None),
    "fp8_scaled metadata": ("fp8_scaled", None),
    "int8_convrot new": ("int8_convrot", None), "nvfp4 new": ("nvfp4", None),
    "mxfp8 metadata": ("mxfp8", None), "nvfp4": ("", "nvfp4"), "int8_convrot": ("int8", None),
    "mxfp8": ("", "mxfp8"),
}  # fmt: skip
PREFIXES = {"original": "", "comfyui": "model.diffusion_model.", "bare": "diffusion_model.",
            "diffusers": ""}  # fmt: skip


def relabel(file: Stored, layout: str) -> Stored:
    """Give the tensors the names of another layout."""

    def name(old: str) -> str:
        new = to_diffusers(old) if layout == "diffusers" else old
        return PREFIXES[layout] + new

    metadata = dict(file.metadata)
    if "_quantization_metadata" in metadata:
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
        layers = {name(layer + ".weight").removesuffix(".weight"): n for layer, n in layers.items()}
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    return Stored({name(n): t for n, t in file.tensors.items()}, metadata,
                  {name(n): note for n, note in file.notes.items()})  # fmt: skip


def write_sparse(path: Path, file: Stored) -> Path:
    """Write a safetensors file with a real header, real notes and a hole for the weights."""
    header: dict[str, object] = {}
    if file.metadata:
        header["__metadata__"] = file.metadata
    position, places = 0, {}
    # Notes first, so that they take one piece of disk and not hundreds.
    ordered = sorted(file.tensors.items(), key=lambda item: item[0] not in file.notes)
    for name, (dtype, shape) in ordered:
        end = position + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        places[name], position = position, end
    text = json.dumps(header).encode()
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, note in file.notes.items():
            out.seek(8 + len(text) + places[name])
            out.write(note)
        out.truncate(8 + len(text) + position)
    return path


def write_shards(folder: Path, file: Stored, count: int) -> Path:
    """Write the tensors as ``count`` sparse shards with their index; return the folder."""
    names, weight_map = list(file.tensors), {}
    for number in range(count):
        own = names[number::count]
        shard = f"diffusion_pytorch_model-{number + 1:05}-of-{count:05}.safetensors"
        write_sparse(folder / shard, Stored({name: file.tensors[name] for name in own}))
        weight_map |= dict.fromkeys(own, shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


class Counted:
    """A file that adds what is read from it to ``total[0]``."""

    def __init__(self, file: BinaryIO, total: list[int]) -> None:
        self._file, self._total = file, total

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._total[0] += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def write_sparse_gguf(
    path: Path, shapes: Shapes, quant: int, block: int, width: int,
    metadata: dict[str, Any] | None = None, first: bytes = b"",
) -> Path:  # fmt: skip
    """Write a GGUF as city96's tools do: large weights in blocks, the rest F32, 5-D kept.

    The weights are a hole but for ``first``, their first bytes.
    """
    large = re.compile(r"blocks\.|enc\.blk\.\d+\.(attn_[qkvo]|ffn_)|token_embd")
    tensors, position = [], 0
    for name, shape in shapes.items():
        blocked = len(shape) == 2 and large.search(name) and shape[-1] % block == 0
        kind, per, size = (quant, block, width) if blocked else (0, 1, 4)
        tensors.append((name, shape, kind, position))
        position += -(-math.prod(shape) // per * size // 32) * 32
    head = bad_files.gguf(tensors, {"general.architecture": "wan"} | (metadata or {}))
    with open(path, "wb") as out:
        out.write(head + first)
        out.truncate(len(head) + position)
    return path


def vae_21(z_dim: int = 16, base: int = 96) -> Shapes:
    """The tensors of the 2.1 VAE that tell its numbers, under official names."""
    widths = [base * m for m in (1, 2, 4, 4)]
    out: Shapes = {}
    _pair(out, "conv1", 2 * z_dim, 2 * z_dim, 1, 1, 1)
    _pair(out, "conv2", z_dim, z_dim, 1, 1, 1)
    _pair(out, "encoder.conv1", base, 3, 3, 3, 3)
    _pair(out, "decoder.conv1", widths[-1], z_dim, 3, 3, 3)
    index, before = 0, base
    for level, width in enumerate(widths):
        for _ in range(2):
            _residual(out, f"encoder.downsamples.{index}", before, width)
            before, index = width, index + 1
        if level < 3:
            _pair(out, f"encoder.downsamples.{index}.resample.1", width, width, 3, 3)
            if level > 0:
                _pair(out, f"encoder.downsamples.{index}.time_conv", width, width, 3, 1, 1)
            index += 1
    out["decoder.middle.0.residual.0.gamma"] = (widths[-1], 1, 1, 1)
    _pair(out, "decoder.head.2", 3, base, 3, 3, 3)
    return out


def vae_22() -> Shapes:
    """The tensors of the 2.2 VAE that tell its numbers, under official names."""
    widths = [160 * m for m in (1, 2, 4, 4)]
    out: Shapes = {}
    _pair(out, "conv1", 96, 96, 1, 1, 1)
    _pair(out, "conv2", 48, 48, 1, 1, 1)
    _pair(out, "encoder.conv1", 160, 12, 3, 3, 3)
    _pair(out, "decoder.conv1", 1024, 48, 3, 3, 3)
    before = 160
    for level, width in enumerate(widths):
        base = f"encoder.downsamples.{level}.downsamples."
        for index in range(2):
            _residual(out, f"{base}{index}", before, width)
            before = width
        if level < 3:
            _pair(out, f"{base}2.resample.1", width, width, 3, 3)
            if level > 0:
                _pair(out, f"{base}2.time_conv", width, width, 3, 1, 1)
    out["decoder.middle.0.residual.0.gamma"] = (1024, 1, 1, 1)
    out["decoder.upsamples.0.upsamples.0.residual.2.weight"] = (1024, 1024, 3, 3, 3)
    _pair(out, "decoder.head.2", 12, 256, 3, 3, 3)
    return out


def _residual(out: Shapes, name: str, before: int, width: int) -> None:
    out[name + ".residual.0.gamma"] = (before, 1, 1, 1)
    _pair(out, name + ".residual.2", width, before, 3, 3, 3)
    out[name + ".residual.3.gamma"] = (width, 1, 1, 1)
    _pair(out, name + ".residual.6", width, width, 3, 3, 3)


def umt5(width: int = 4096, layers: int = 24, every_block: bool = True) -> Shapes:
    """The text encoder under HF names; ``every_block`` False makes it a plain T5."""
    out: Shapes = {"shared.weight": (256384 if every_block else 32128, width)}
    for index in range(layers):
        block = f"encoder.block.{index}.layer."
        for part in "qkvo":
            out[f"{block}0.SelfAttention.{part}.weight"] = (width, width)
        if every_block or index == 0:
            out[f"{block}0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
        for part, shape in (("wi_0", (10240, width)), ("wi_1", (10240, width)),
                            ("wo", (width, 10240))):  # fmt: skip
            out[f"{block}1.DenseReluDense.{part}.weight"] = shape
        out |= {f"{block}{part}.layer_norm.weight": (width,) for part in (0, 1)}
    return out | {"encoder.final_layer_norm.weight": (width,)}


def fp8_umt5(layers: int = 24, spiece: bytes = b"") -> Stored:
    """umT5 as ``umt5_xxl_fp8_e4m3fn_scaled`` has it: 7 matrices a block in fp8, the rest fp16.

    ``spiece`` is the tokenizer that it carries; without one there is room for it.
    """
    file = Stored({"scaled_fp8": ("F8_E4M3", (0,))})
    file.tensors["spiece_model"] = ("U8", (len(spiece) or 4_548_313,))
    if spiece:
        file.notes |= {"spiece_model": spiece, "shared.weight": b"\0\x3c"}  # not all zero: refused
    for name, shape in umt5(layers=layers).items():
        scaled = ".layer." in name and "relative" not in name and "norm" not in name
        file.tensors[name] = ("F8_E4M3" if scaled else "F16", shape)
        if scaled:
            file.tensors[name.removesuffix("weight") + "scale_weight"] = ("F32", ())
    return file


def clip_vision(width: int = 1280) -> Shapes:
    """The CLIP ViT-H vision model under HF names, first layer only."""
    return {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": (width, width),
        "visual_projection.weight": (1024, width),
    }
