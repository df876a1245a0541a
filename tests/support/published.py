"""Published files of Wan, as their headers are: names, shapes, dtypes, in the layouts people have.

Two things show that a layout here is the published one. ``FINGERPRINTS`` are md5 sums over all
names and shapes by which DiffSynth-Studio recognises the files (``configs/model_configs.py``).
``SIZES`` are the sizes in bytes that the hubs state; :func:`size_of` computes what the safetensors
library would write, header included, and equal sums leave little room for another layout. What has
neither is known from loaders and reports. No weight is stored.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator

from support.wan_layouts import BITS, FILES, Shapes, Stored

BITS |= {"I64": 64, "I32": 32}
_BY_ALIGNMENT = ("I64", "F32", "I32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "U8")

# The name of a file's shapes in wan_layouts.FILES: md5 over its names and shapes.
FINGERPRINTS = {
    "t2v-1.3b": "9269f8db9040a9d860eaca435be61814", "t2v-14b": "aafcfd9672c3a2456dc46e1cb6e52c70",
    "i2v-14b": "6bfcfb3b342cb286ce886889d519a77e", "flf2v-14b": "3ef3b1f8e1dab83d5b71fd7b617f859f",
    "vace-1.3b": "a61453409b67cd3246cf0c3bebad47ba",
    "vace-14b": "7a513e1f257a861512b1afd387a8ecd9", "i2v-a14b": "5b013604280dd715f8457c6ed6d6a626",
    "ti2v-5b": "1f5ab7703c6fc803fdded85ff040c316",
    "fun-inp-1.3b": "6d6ccde6845b95ad9114ab993d917893",
    "fun-control-1.3b": "349723183fc063b2bfc10bb2835cf677",
    "fun-control-14b": "26bde73488a92e64cc20b0a7485b9e5b",
    "fun-control-a14b": "2267d489f0ceb9f21836532952852ee5",
    "fun-camera-1.3b": "ac6a5aa74f4a0aab6f64eb9a72f19901",
    "fun-camera-14b": "b61c605c2adbd23124d152ed28e049ae",
    "fun-camera-a14b": "47dbeab5e560db3180adf51dc0232fb1",
    "animate-14b": "31fa352acb8a1b1d33cd8764273d80a2",
}  # fmt: skip


def fingerprint(shapes: Shapes) -> str:
    """Return DiffSynth-Studio's md5 over names and shapes."""
    keys = [key for n, s in shapes.items() for key in (f"{n}:{'_'.join(map(str, s))}", n)]
    return hashlib.md5(",".join(sorted(keys)).encode(), usedforsecurity=False).hexdigest()


def size_of(file: Stored) -> int:
    """Return the bytes that the safetensors library would write for these tensors."""
    order = sorted(file.tensors, key=lambda n: (_BY_ALIGNMENT.index(file.tensors[n][0]), n))
    header: dict[str, object] = {"__metadata__": file.metadata} if file.metadata else {}
    position = 0
    for name in order:
        dtype, shape = file.tensors[name]
        end = position + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + position


# Transformers ------------------------------------------------------------------------------------


def comfy_fp16(shapes: Shapes) -> Stored:
    """Comfy-Org's fp16: bare names, all F16 but the input layer."""
    return Stored(
        {n: ("F32" if n.startswith("patch_embedding.") else "F16", s) for n, s in shapes.items()}
    )


def comfy_scaled(shapes: Shapes) -> Stored:
    """Comfy-Org's fp8_scaled: every matrix F8 with two scalars, all else F16, and a marker."""
    return _scaled(shapes, "F16", (), True, lambda n: True) | ("scaled_fp8", "F8_E4M3", (0,))


def kijai_scaled(shapes: Shapes, plain: str = "F32") -> Stored:
    """Kijai's fp8_scaled: the blocks' matrices F8 with a scale of one element, and a marker."""
    file = _scaled(shapes, plain, (1,), False, lambda n: n.startswith("blocks."))
    return file | ("scaled_fp8", "F8_E4M3", (2,))


class _Adding(Stored):
    """A file that takes one more tensor by ``|``."""

    def __or__(self, more: tuple[str, str, tuple[int, ...]]) -> Stored:
        return Stored(self.tensors | {more[0]: more[1:]}, self.metadata, self.notes)


def _scaled(
    shapes: Shapes,
    plain: str,
    scale: tuple[int, ...],
    of_input: bool,
    is_scaled: Callable[[str], bool],
) -> _Adding:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        linear = name.endswith(".weight") and len(shape) == 2 and is_scaled(name)
        tensors[name] = ("F8_E4M3" if linear else plain, shape)
        if linear:
            stem = name.removesuffix("weight")
            tensors[stem + "scale_weight"] = ("F32", scale)
            if of_input:
                tensors[stem + "scale_input"] = ("F32", scale)
    return _Adding(tensors)


def tagged(file: Stored, tag: str = "model_type.Wan2_1-FLF2V-14B-720P") -> Stored:
    """Kijai's first-and-last-frame file: a tensor whose only message is its name."""
    return Stored(file.tensors | {tag: ("U8", (1,))}, file.metadata, file.notes)


# Encoders and VAEs -------------------------------------------------------------------------------


def umt5(layers: int = 24, width: int = 4096, inner: int = 10240) -> Shapes:
    """The whole umT5-XXL encoder under the names of transformers: 242 tensors."""
    out: Shapes = {"shared.weight": (256384, width), "encoder.final_layer_norm.weight": (width,)}
    for index in range(layers):
        block = f"encoder.block.{index}.layer."
        for part in "qkvo":
            out[f"{block}0.SelfAttention.{part}.weight"] = (width, width)
        out[f"{block}0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
        out[f"{block}0.layer_norm.weight"] = out[f"{block}1.layer_norm.weight"] = (width,)
        for part, shape in (("wi_0", (inner, width)), ("wi_1", (inner, width)),
                            ("wo", (width, inner))):  # fmt: skip
            out[f"{block}1.DenseReluDense.{part}.weight"] = shape
    return out


def umt5_original(layers: int = 24) -> Shapes:
    """The same under the official names, as in ``models_t5_umt5-xxl-enc-bf16.pth``."""
    rules = (
        ("shared.", "token_embedding."), ("encoder.final_layer_norm.", "norm."),
        ("encoder.block.", "blocks."), ("layer.0.layer_norm", "norm1"),
        ("layer.1.layer_norm", "norm2"),
        ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
        ("layer.0.SelfAttention", "attn"), ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
        ("layer.1.DenseReluDense.wi_1", "ffn.fc1"), ("layer.1.DenseReluDense.wo", "ffn.fc2"),
    )  # fmt: skip
    out: Shapes = {}
    for name, shape in umt5(layers).items():
        for old, new in rules:
            name = name.replace(old, new)
        out[name] = shape
    return out


SPIECE = ("spiece_model", "U8", (4_548_313,))


def comfy_umt5_fp16(layers: int = 24) -> Stored:
    """Comfy-Org's umt5_xxl_fp16: with its tokenizer as a tensor."""
    return _Adding({n: ("F16", s) for n, s in umt5(layers).items()}) | SPIECE


def comfy_umt5_scaled(layers: int = 24) -> Stored:
    """Comfy-Org's umt5_xxl_fp8_e4m3fn_scaled."""
    shapes = umt5(layers)
    file = _scaled(shapes, "F16", (), False, lambda n: "bias" not in n and n != "shared.weight")
    return _Adding((file | SPIECE).tensors) | ("scaled_fp8", "F8_E4M3", (0,))


def kijai_umt5_fp8(layers: int = 24) -> Stored:
    """Kijai's umt5-xxl-enc-fp8_e4m3fn: official names, unscaled F8, no tokenizer."""
    linear = ("attn.", "ffn.")
    return Stored(
        {
            n: ("F8_E4M3" if len(s) == 2 and any(part in n for part in linear) else "BF16", s)
            for n, s in umt5_original(layers).items()
        },
        {"format": "pt"},
    )


# LoRAs -------------------------------------------------------------------------------------------


def lightning(layers: int = 40, dim: int = 5120, ffn: int = 13824, rank: int = 64) -> Stored:
    """Wan2.2-Lightning (Seko): ten linears a block, F32 matrices and I64 scalars for alpha."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for stem, rows, columns in _linears(layers, dim, ffn):
        tensors[f"{stem}.lora_down.weight"] = ("F32", (rank, columns))
        tensors[f"{stem}.lora_up.weight"] = ("F32", (rows, rank))
        tensors[f"{stem}.alpha"] = ("I64", ())
    return Stored(tensors)


def _linears(layers: int, dim: int, ffn: int) -> Iterator[tuple[str, int, int]]:
    for index in range(layers):
        block = f"diffusion_model.blocks.{index}."
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                yield f"{block}{attention}.{part}", dim, dim
        yield f"{block}ffn.0", ffn, dim
        yield f"{block}ffn.2", dim, ffn


SIZES: dict[str, tuple[Callable[[], Stored], int]] = {
    "wan2.1_t2v_14B_fp16": (lambda: comfy_fp16(FILES["t2v-14b"][0]), 28_577_761_176),
    "wan2.2_t2v_high_noise_14B_fp8_scaled": (
        lambda: comfy_scaled(FILES["t2v-14b"][0]), 14_293_923_632),
    "wan2.2_i2v_high_noise_14B_fp8_scaled": (
        lambda: comfy_scaled(FILES["i2v-a14b"][0]), 14_294_742_832),
    "umt5_xxl_fp16": (comfy_umt5_fp16, 11_366_399_385),
    "umt5_xxl_fp8_e4m3fn_scaled": (comfy_umt5_scaled, 6_735_906_897),
    "umt5-xxl-enc-fp8_e4m3fn": (kijai_umt5_fp8, 6_731_333_792),
    "Wan2.2-Lightning rank 64": (lightning, 1_226_977_424),
}  # fmt: skip
"""Published files by name: how to make their header, and their size in bytes."""
