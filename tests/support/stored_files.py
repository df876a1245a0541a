"""Weights written in every kind of storage, with the numbers they stand for.

The packers and the formulas here follow the published descriptions (ComfyUI, comfy-kitchen, gguf)
and share no code with the library: they are what its dequantising is held against.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
_CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass
class Packed:
    """One weight as stored: tensors by suffix of the layer's name, its note, and its meaning."""

    tensors: dict[str, Tensor]
    meaning: Callable[[torch.dtype], Tensor]
    note: dict[str, object] | None = None
    options: dict[str, object] = field(default_factory=dict)


@functools.cache
def hadamard(group: int) -> Tensor:
    """Entry (i, j) is (-1)**n / sqrt(group), n the base-4 digit pairs that add up to 3."""
    signs = [[_sign(i, j, group) for j in range(group)] for i in range(group)]
    return torch.tensor(signs) / group**0.5


def _sign(i: int, j: int, group: int) -> float:
    sign = 1.0
    while group > 1:
        if i % 4 + j % 4 == 3:
            sign = -sign
        i, j, group = i // 4, j // 4, group // 4
    return sign


def swizzled(plain: Tensor) -> Tensor:
    """Lay (rows, blocks) bytes out as cuBLAS reads them, padded to 128 rows and 4 blocks."""
    rows, blocks = plain.shape
    wide = -(-blocks // 4)
    out = torch.zeros(-(-rows // 128) * 128 * wide * 4, dtype=torch.uint8)
    r, c = torch.arange(rows)[:, None], torch.arange(blocks)[None]
    at = ((r // 128) * wide + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    out[at] = plain
    return out.view(-(-rows // 128) * 128, wide * 4)


def fp8(
    weight: Tensor,
    kind: str = "e4m3",
    per: str = "tensor",
    scale_dtype: torch.dtype = torch.float32,
) -> Packed:
    """fp8 with a scale for the tensor or for each row; ``per`` "none" is a plain cast."""
    dtype = _FP8[kind]
    if per == "none":
        plain = weight.to(dtype)
        return Packed({"weight": plain}, lambda d: plain.to(d))
    largest = torch.finfo(dtype).max
    amax = weight.abs().amax() if per == "tensor" else weight.abs().amax(1, keepdim=True)
    scale = (amax.float() / largest).to(scale_dtype)
    values = (weight.float() / scale.float()).to(dtype)
    note = {"format": "float8_e4m3fn" if kind == "e4m3" else "float8_e5m2"}
    return Packed(
        {"weight": values, "weight_scale": scale},
        lambda d: (values.float() * scale.float()).to(d),
        note,
    )


def int8(weight: Tensor, per: str = "row", group: int = 0) -> Packed:
    """int8 with a scale for the tensor or each row, rotated in groups of columns or not."""
    rotated = (
        (weight.float().view(-1, group) @ hadamard(group)).view(weight.shape)
        if group
        else weight.float()
    )
    amax = rotated.abs().amax() if per == "tensor" else rotated.abs().amax(1, keepdim=True)
    scale = amax / 127
    values = (rotated / scale).round().clamp(-127, 127).to(torch.int8)

    def meaning(dtype: torch.dtype) -> Tensor:
        wide = values.double()
        if group:  # exact in any order: whole numbers over a power of two
            wide = (wide.view(-1, group) @ hadamard(group).double()).view(weight.shape)
        return (wide.float() * scale).to(dtype)

    note: dict[str, object] = {"format": "int8_tensorwise"}
    if group:
        note |= {"convrot": True, "convrot_groupsize": group}
    return Packed({"weight": values, "weight_scale": scale}, meaning, note)


def nvfp4(weight: Tensor) -> Packed:
    """Four bits a number, an fp8 scale for each 16 and one for all; even columns high."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows, columns // 16, 16)
    second = float((weight.abs().amax() / (6 * 448)).float())
    scales = (blocks.abs().amax(-1) / 6 / second).to(torch.float8_e4m3fn)
    steps = torch.tensor(_CODES)
    ratio = blocks / (scales.float() * second).clamp(min=1e-30)[..., None]
    code = (ratio.abs()[..., None] - steps).abs().argmin(-1)
    code = (code + 8 * (ratio < 0)).view(rows, columns).to(torch.uint8)
    packed = (code[:, ::2] << 4) | code[:, 1::2]

    def meaning(dtype: torch.dtype) -> Tensor:
        value = steps[(code & 7).int()] * torch.where(code > 7, -1.0, 1.0)
        factor = scales.float() * second
        return (value * factor.repeat_interleave(16, 1)).to(dtype)

    tensors = {
        "weight": packed,
        "weight_scale": swizzled(scales.view(torch.uint8)).view(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(second),
    }
    return Packed(tensors, meaning, {"format": "nvfp4"})


def mxfp8(weight: Tensor) -> Packed:
    """fp8 with a power of two for each 32 numbers."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows, columns // 32, 32)
    amax = blocks.abs().amax(-1)
    exponent = torch.ceil(torch.log2(amax.clamp(min=1e-30) / 448)).clamp(-126, 127) + 127
    exponent = torch.where(amax == 0, 0, exponent).to(torch.uint8)
    power = torch.pow(2.0, exponent.float() - 127)
    power = torch.where(exponent == 0, 0.0, power)
    values = (blocks / power.clamp(min=1e-38)[..., None]).to(torch.float8_e4m3fn)
    tensors = {"weight": values.view(rows, columns), "weight_scale": swizzled(exponent)}
    return Packed(
        tensors,
        lambda d: (values.float() * power[..., None]).view(rows, columns).to(d),
        {"format": "mxfp8"},
    )


KINDS: Mapping[str, Callable[[Tensor], Packed]] = {
    "fp8": lambda w: fp8(w, per="none"),
    "fp8_e5m2": lambda w: fp8(w, "e5m2", per="none"),
    "fp8_scaled": fp8,
    "fp8_scaled_e5m2": lambda w: fp8(w, "e5m2"),
    "fp8_scaled_bf16_scale": lambda w: fp8(w, scale_dtype=torch.bfloat16),
    "fp8_rows": lambda w: fp8(w, per="row"),
    "int8_tensor": lambda w: int8(w, per="tensor"),
    "int8_rows": int8,
    "int8_convrot": lambda w: int8(w, group=256 if w.shape[1] % 256 == 0 else 16),
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
}
"""Every kind of safetensors storage, by a name for tests."""
STYLES = ("notes", "metadata", "old")
"""Ways to say that a layer is quantised: ``comfy_quant`` tensors, metadata, the old marker."""


def in_every_style(*kinds: str) -> list[tuple[str, str]]:
    """Return kinds of storage with each style that can say them: the old marker knows fp8 only."""
    return [(k, s) for k in kinds for s in STYLES if s != "old" or k.startswith("fp8")]


def pack(
    state: State, matrices: set[str], kind: str, style: str = "notes", prefix: str = ""
) -> tuple[State, dict[str, str], dict[str, Callable[[torch.dtype], Tensor]]]:
    """Store the ``matrices`` (names ending in .weight) of ``state`` as ``kind``.

    Returns the tensors to write, the metadata, and each weight's meaning by its name.
    """
    out: State = {}
    layers: dict[str, object] = {}
    meanings: dict[str, Callable[[torch.dtype], Tensor]] = {}
    for name, value in state.items():
        if name not in matrices:
            out[prefix + name] = value
            continue
        layer = name.removesuffix(".weight")
        packed = KINDS[kind](value)
        meanings[name] = packed.meaning
        for leaf, tensor in packed.tensors.items():
            if style == "old" and leaf == "weight_scale":
                leaf = "scale_weight"
            out[f"{prefix}{layer}.{leaf}"] = tensor.contiguous()
        if packed.note is not None and style == "notes":
            text = json.dumps(packed.note).encode()
            out[f"{prefix}{layer}.comfy_quant"] = torch.frombuffer(
                bytearray(text), dtype=torch.uint8
            )
        if packed.note is not None and style == "metadata":
            layers[prefix + layer] = packed.note
    metadata = {}
    if layers:
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    if style == "old" and any(n.endswith("scale_weight") for n in out):
        out[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return out, metadata, meanings


def write(path: Path, tensors: State, metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file; E8M0 and U8 scales are as torch knows them."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata or None)
    return path


# GGUF --------------------------------------------------------------------------------------------

GGUF_SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""Types that the gguf package cannot write, and where their blocks keep float16 scales."""
GGUF_KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *GGUF_SCALES)


def gguf_blocks(weight: Tensor, kind: str, seed: int = 0) -> np.ndarray:
    """Bytes of ``weight`` in a quantisation; random blocks where the package cannot write it."""
    quant = gguf.GGMLQuantizationType[kind]
    if kind not in GGUF_SCALES:
        return gguf.quants.quantize(weight.float().numpy(), quant)
    per_block, size = gguf.GGML_QUANT_SIZES[quant]
    rows, columns = weight.shape
    data = np.random.default_rng(seed).integers(
        0, 256, (rows, columns // per_block, size), np.uint8
    )
    for at in GGUF_SCALES[kind]:
        data[:, :, at : at + 2] = np.array([3e-4], np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def gguf_meaning(data: np.ndarray, kind: str, dtype: torch.dtype) -> Tensor:
    """What diffusers' GGUF layers make of the blocks."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    quant = gguf.GGMLQuantizationType[kind]
    parameter = GGUFParameter(torch.from_numpy(data), requires_grad=False, quant_type=quant)
    out: Tensor = dequantize_gguf_tensor(parameter).to(dtype)
    return out


def float32_bits(text: str) -> list[float]:
    """Numbers from hex, little endian."""
    data = bytes.fromhex(text)
    return list(struct.unpack(f"<{len(data) // 4}f", data))
