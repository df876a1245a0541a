"""How the weights of a file are stored: full precision, fp8, scaled fp8, GGUF, or a packed kind.

Sources: ComfyUI ``QUANTIZATION.md`` and ``comfy/utils.py::convert_old_quants`` for ``scaled_fp8``,
``scale_weight``, ``weight_scale`` and ``comfy_quant``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import CorruptFile, UnsupportedModel
from ..files import quoted, some_of
from .open import read_small
from .table import TensorInfo, TensorTable

QUANT_SUFFIXES: Final = (
    ".scale_weight", ".scale_input", ".weight_scale", ".weight_scale_2", ".input_scale",
    ".comfy_quant", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
)  # fmt: skip
"""Endings of tensors that describe how another tensor is stored."""

_FLOATS: Final = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_FP8: Final = {"F8_E4M3": "fp8", "F8_E5M2": "fp8_e5m2"}
GGUF_TYPES: Final = frozenset(
    (
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
    )
)  # fmt: skip
"""GGUF tensor types that diffusers 0.42 can dequantise (``quantizers/gguf/utils.py``)."""
MAX_NOTES: Final = 2048
"""Most ``comfy_quant`` notes that are read. Each may have 512 bytes; real ones have about 30."""
_SCALED_FORMATS: Final = frozenset({"float8_e4m3fn", "float8_e5m2"})


@dataclass(frozen=True, slots=True)
class WeightKind:
    """How weights are stored; ``why_not`` says why they cannot be loaded, or is empty."""

    name: str
    why_not: str = ""
    detail: str = ""
    packed: bool = False
    """True: several values share a byte, so the stored shapes are not those of the model."""
    warnings: tuple[str, ...] = ()


def read_weight_kind(table: TensorTable, own: Mapping[str, TensorInfo]) -> WeightKind:
    """Return how the tensors ``own`` (names without prefix) of ``table`` are stored.

    Raises UnsupportedModel for a weight of a dtype that no weight can have, CorruptFile for a file
    marked as scaled fp8 that holds no scale. Reads at most 1 MiB of ``comfy_quant`` notes.
    """
    # What a file declares comes first, then companion tensors, and dtypes alone come last: packed
    # weights look like plain U8 or I8 tensors.
    if table.format == "gguf":
        return _gguf_kind(own)
    formats = _declared_formats(table, own)
    other = sorted(formats - _SCALED_FORMATS)
    if other:
        return _packed(other[0])
    packed = _packed_kind(own)
    if packed:
        return _packed(packed)
    _check_dtypes(table, own)
    largest = next(iter(_bytes_by_dtype(own)), "BF16")
    fp8 = [n for n, i in own.items() if i.dtype in _FP8 and n.endswith(".weight")]
    scales = [n for n in own if n.endswith((".scale_weight", ".weight_scale"))]
    if "scaled_fp8" in own or scales or formats:
        return _scaled_kind(table, own, fp8, scales)
    if fp8:
        return WeightKind(_FP8.get(largest, _FP8[own[fp8[0]].dtype]), detail=largest)
    return WeightKind(_FLOATS.get(largest, "bf16"), detail=largest)


def _bytes_by_dtype(own: Mapping[str, TensorInfo]) -> dict[str, int]:
    total: dict[str, int] = {}
    for info in own.values():
        total[info.dtype] = total.get(info.dtype, 0) + info.nbytes
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _gguf_kind(own: Mapping[str, TensorInfo]) -> WeightKind:
    sizes = _bytes_by_dtype(own)
    bad = [dtype for dtype in sizes if dtype not in GGUF_TYPES]
    why = f"GGUF type {some_of(bad)} cannot be dequantised by diffusers" if bad else ""
    return WeightKind("gguf", why, next(iter(sizes), ""))


def _scaled_kind(
    table: TensorTable, own: Mapping[str, TensorInfo], fp8: list[str], scales: list[str]
) -> WeightKind:
    if not scales and fp8:
        raise CorruptFile(
            f"{quoted(table.path)} says that its fp8 weights are scaled, but holds none of the "
            f"scales for its {len(fp8)} fp8 weights; without them the video is noise. Get the "
            "whole file, or one in bf16."
        )
    bare = [n for n in fp8 if not _has_scale(own, n.removesuffix("weight"))]
    warnings: tuple[str, ...] = ()
    if bare:
        warnings = (
            f"{len(bare)} of {len(fp8)} fp8 weights have no scale and are taken as they are "
            f"({some_of(bare, 2)}).",
        )
    return WeightKind("fp8_scaled", detail=next(iter(_bytes_by_dtype(own))), warnings=warnings)


def _has_scale(own: Mapping[str, Any], stem: str) -> bool:
    return f"{stem}scale_weight" in own or f"{stem}weight_scale" in own


def _declared_formats(table: TensorTable, own: Mapping[str, TensorInfo]) -> set[str]:
    """Return the formats that the metadata and the ``comfy_quant`` notes state for layers."""
    formats: set[str] = set()
    text = table.metadata.get("_quantization_metadata")
    if text:
        layers = _json_object(text).get("layers")
        for layer in layers.values() if isinstance(layers, dict) else ():
            if isinstance(layer, dict):
                formats.add(str(layer.get("format")))
    notes = [i for n, i in own.items() if n.endswith(".comfy_quant")]
    for note in read_small(notes[:MAX_NOTES], limit=512):
        formats.add(str(_json_object(note).get("format")))
    return formats


def _json_object(data: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _packed_kind(own: Mapping[str, TensorInfo]) -> str | None:
    """Recognise packed formats without a ``comfy_quant`` note by their companion tensors."""
    for name, info in own.items():
        if name.endswith((".absmax", ".quant_state.bitsandbytes__nf4")):
            return "bitsandbytes nf4"
        if name.endswith((".qzeros", ".g_idx")):
            return "GPTQ/AWQ int4"
        if name.endswith(".wscales"):
            return "nunchaku SVDQuant int4"
        if name.endswith(".weight_scale_2"):
            return "nvfp4"
        if name.endswith(".weight_scale"):
            weight = own.get(name.removesuffix("_scale"))
            if weight and weight.dtype == "I8":
                return "int8"
            if weight and weight.dtype in ("U8", "F4"):
                return "nvfp4"
            if info.dtype in ("F8_E8M0", "U8"):
                return "mxfp8"
    return None


def _packed(name: str) -> WeightKind:
    return WeightKind(
        name, f"weights stored as {name} are not supported; use bf16, fp16, fp8 or GGUF", name, True
    )


def _check_dtypes(table: TensorTable, own: Mapping[str, TensorInfo]) -> None:
    for name, info in own.items():
        if info.dtype in _FLOATS or info.dtype in _FP8:
            continue
        if name.endswith(QUANT_SUFFIXES) or name in ("scaled_fp8", "spiece_model"):
            continue
        if name.endswith("position_ids") and info.dtype in ("I64", "I32"):
            continue
        raise UnsupportedModel(
            f"Tensor {name!r} of {quoted(table.path)} is stored as {info.dtype}; weights are "
            "F32, BF16, F16 or F8 here. Use a file in one of these."
        )
