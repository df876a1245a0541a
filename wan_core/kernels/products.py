"""Products in 8 bit of weights that are stored in 8 bit: their bytes as they are, no copy in 16.

The weight's numbers are exactly the file's; only the activations are rounded, each token by its own
scale (its largest magnitude over the largest number of the format). fp8 goes through
``torch._scaled_mm`` (compute capability 8.9 on), int8 through ``torch._int_mm`` (7.5 on), rotated
int8 with activations rotated by the same matrix. Only the feed-forward is computed so, and not that
of the first and the last block: all linear layers in fp8 have been seen to collapse on long clips
(vllm-project/vllm-omni#2920), the feed-forward alone has not.

A kind is used where a trial on the device agrees with the weights taken apart and is faster than
they are; else the layer computes in 16 bit, as always.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading import StoredWeight, rotation, stored_weight
from .attention import milliseconds
from .fused import triton_kernels

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_AT_ONCE = 4096
"""Tokens whose int32 sums are held at once."""
_TOKENS = 2048
"""Tokens of a trial; with fewer a product does not fill a large card."""
_GAIN = 1.05
"""How many times faster than 16 bit a product must be to be used."""
_AGREES = 1e-2
"""Relative error that rounding the results to 16 bit may have in a trial."""
_FIRST = {"fp8": (8, 9), "int8": (7, 5)}
"""The first compute capability whose matrix units multiply the kind."""
_tried: dict[tuple[object, ...], bool] = {}


Codes = tuple[Tensor, Tensor, Sequence[int]]
"""Numbers of 8 bit (n, in), the scale of each row (n, 1), and the shape of the rows (...)."""


@dataclass(frozen=True, slots=True)
class EightBitProduct:
    """A linear layer's product in 8 bit; see :func:`product_for`."""

    weight: StoredWeight
    bias: Tensor | None

    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (..., in)."""
        return self.multiply(*self.quantized(x))

    def quantized(self, x: Tensor, gelu: bool = False) -> Codes:
        """Return ``x`` (..., in), or its GELU (tanh form), in 8 bit.

        With a GELU and a rotation ``x`` is overwritten.
        """
        rows, group = x.reshape(-1, x.shape[-1]), self.weight.stored.group
        if group:
            if gelu:
                torch.ops.aten.gelu_(rows, approximate="tanh")
            turned = rotation(group).to(rows)
            rows = (rows.view(-1, group) @ turned).view(rows.shape)
            gelu = False
        kind = torch.float8_e4m3fn if self.weight.stored.kind == "fp8" else torch.int8
        return (*triton_kernels().quantize_rows(rows, kind, gelu), x.shape[:-1])

    def multiply(self, codes: Tensor, scales: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the layer's output (..., out) for what ``quantized`` returned."""
        product = _fp8_product if self.weight.stored.kind == "fp8" else _int8_product
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return product(codes, scales, self.weight, bias, self.dtype).view(*shape, -1)


def products_of(ffn: Any, dtype: torch.dtype) -> tuple[EightBitProduct, EightBitProduct] | None:
    """Return both products of a feed-forward, or None where it is to compute in 16 bit."""
    first, second = product_for(ffn.net[0].proj, dtype), product_for(ffn.net[2], dtype)
    return None if first is None or second is None else (first, second)


def product_for(layer: Any, dtype: torch.dtype) -> EightBitProduct | None:
    """Return the 8-bit product of a layer, or None where it is to compute in 16 bit."""
    if _hooked(layer) or dtype not in (torch.bfloat16, torch.float16):
        return None
    weight = stored_weight(layer)
    if weight is None or not weight.bits.is_cuda or triton_kernels() is None:
        return None
    stored = weight.stored
    if stored.kind not in _FIRST or stored.dtype not in ("F8_E4M3", "I8"):
        return None
    if any(size % 16 for size in stored.shape):
        return None
    device = weight.bits.device
    if torch.cuda.get_device_capability(device) < _FIRST[stored.kind]:
        return None
    product = EightBitProduct(weight, layer.bias, dtype)
    key = (device, dtype, stored.kind, stored.per, stored.group, stored.shape)
    with _lock:
        if key not in _tried:
            _tried[key] = _pays(product, layer, dtype)
        return product if _tried[key] else None


def _hooked(layer: nn.Module) -> bool:
    """Say whether a hook (a LoRA's, an offload's) acts on a layer: then it must be called."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return bool(hooked) or hasattr(layer, "_hf_hook")


def _fp8_product(
    codes: Tensor, scales: Tensor, weight: StoredWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    matrix = weight.bits.view(torch.float8_e4m3fn).t()
    if _scales_rows(codes.device):
        each = _each(weight)
        done: Tensor = torch._scaled_mm(
            codes, matrix, scale_a=scales, scale_b=each.view(1, -1), bias=bias, out_dtype=dtype,
            use_fast_accum=True,
        )  # fmt: skip
        return done
    one = torch.ones((), device=codes.device)
    out: Tensor = torch._scaled_mm(
        codes, matrix, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    # Row by row: the product with scales in float32 is as large again as four results.
    result = out if dtype == out.dtype else torch.empty_like(out, dtype=dtype)
    for begin in range(0, len(out), _AT_ONCE):
        span = slice(begin, begin + _AT_ONCE)
        wide = (out[span] * scales[span]).mul_(_each(weight))
        result[span] = wide if bias is None else wide.add_(bias)
    return result


def _scales_rows(device: torch.device) -> bool:
    """Say whether products may take a scale for each row.

    On Ada cards (8.9) torch before 2.12 starts such a product outside the current stream
    (pytorch/pytorch#177651), which would read weights that are still on their way.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return torch.cuda.get_device_capability(device) != (8, 9) or version >= (2, 12)


def _int8_product(
    codes: Tensor, scales: Tensor, weight: StoredWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    matrix, each = weight.bits.view(torch.int8).t(), _each(weight)
    out = torch.empty(len(codes), matrix.shape[1], dtype=dtype, device=codes.device)
    for begin in range(0, len(codes), _AT_ONCE):
        # The last span reaches back: torch multiplies no fewer than 17 rows.
        span = slice(max(0, min(begin, len(codes) - _AT_ONCE)), begin + _AT_ONCE)
        sums = torch._int_mm(codes[span], matrix)
        triton_kernels().scale_rows(sums, scales[span], each, bias, out[span])
    return out


def _each(weight: StoredWeight) -> Tensor:
    """Return a scale for each row of the weight, float32 (rows,)."""
    if weight.scales.each is not None:
        return weight.scales.each
    return torch.full((len(weight.bits),), weight.scales.whole, device=weight.bits.device)


def _pays(product: EightBitProduct, layer: Any, dtype: torch.dtype) -> bool:
    """Try a product on random tokens: right, and faster than 16 bit."""
    stored = product.weight.stored
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, stored.shape[1], generator=generator)
    x = x.to(product.weight.bits.device, dtype)
    try:
        codes, scales, _ = product.quantized(x)
        seen = codes.float() * scales
        if stored.group:
            seen = (seen.view(-1, stored.group) @ rotation(stored.group).to(seen)).view(seen.shape)
        expected = F.linear(seen.to(dtype), layer.dequantized(dtype), layer.bias).float()
        found = product(x)
        ours = milliseconds(partial(product, x), 3)
    except Exception as err:  # noqa: BLE001 - compiling needs a C compiler, a known card, ...
        _log.info(
            "%s is multiplied in 16 bit: the product in 8 bit failed (%s).", stored.title, err
        )
        return False
    error = float((found.float() - expected).norm() / expected.norm())
    layer(x)  # the first time does not count
    theirs = milliseconds(partial(layer, x), 3)
    used = error < _AGREES and ours * _GAIN < theirs
    _log.info(
        "%s %s: 8 bit %.2f ms, 16 bit %.2f ms, error %.1e; %s bit is used.",
        stored.title, stored.shape, ours, theirs, error, 8 if used else 16,
    )  # fmt: skip
    return used
