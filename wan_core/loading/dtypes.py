"""Dtypes: their names, which parameters stay in fp32, and whether numbers are finite.

Wan's time embedder, scale-shift tables and norms stay in fp32, as the classes ask for in
``_keep_in_fp32_modules``. Each of them in bf16 would change the result by 1e-4 to 1e-3 of its
range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from ..errors import InvalidRequest

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_ALIASES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
}


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype called ``name`` ("bf16", "fp16", "fp32", or torch's own names).

    Raises InvalidRequest for any other name.
    """
    key = name.lower().removeprefix("torch.")
    try:
        return DTYPES[_ALIASES.get(key, key)]
    except KeyError:
        raise InvalidRequest(
            f"precision is {name!r}; allowed are auto, {', '.join(DTYPES)}.", field="precision"
        ) from None


def keep_in_fp32(module: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the module names whose parameters stay in fp32 when ``module`` is cast to ``dtype``.

    Follows ``from_pretrained`` of either library. In diffusers ``_keep_in_fp32_modules`` applies to
    bf16 and fp16. In transformers it applies to fp16 only, and
    ``_keep_in_fp32_modules_strict`` to both. Empty when ``dtype`` is fp32.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return ()
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    plain = getattr(module, "_keep_in_fp32_modules", None) or ()
    plain = {plain} if isinstance(plain, str) else set(plain)
    from_diffusers = any(base.__module__.startswith("diffusers.") for base in type(module).__mro__)
    if from_diffusers or dtype == torch.float16:
        kept |= plain
    return tuple(sorted(kept))


def stays_fp32(parameter_name: str, kept: tuple[str, ...]) -> bool:
    """Say whether a parameter (dotted name) belongs to a module named in ``kept``."""
    return not set(kept).isdisjoint(parameter_name.split("."))


FP8: Final = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
LOOKED_AT: Final = 2 * 2**20
"""Bytes that are looked at in one go: few enough to stay in the processor's cache."""
# For each dtype: integers of its size with and without a sign, and the bits of the smallest
# positive number that is NaN or infinite: the exponent is all ones. e4m3fn has no infinity; its
# only NaN has all bits set. A negative one has the same bits beside the sign.
_LIMITS: Final[Mapping[torch.dtype, tuple[Any, Any, int]]] = {
    torch.float64: (np.int64, np.uint64, 0x7FF0_0000_0000_0000),
    torch.float32: (np.int32, np.uint32, 0x7F80_0000), torch.float16: (np.int16, np.uint16, 0x7C00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80), torch.float8_e4m3fn: (np.int8, np.uint8, 0x7F),
    torch.float8_e5m2: (np.int8, np.uint8, 0x7C),
}  # fmt: skip


def is_finite(values: torch.Tensor) -> bool:
    """Say whether no value is NaN or infinite, for any floating-point dtype.

    On the CPU the bits are compared: ``torch.isfinite`` takes 30 times as long as reading the
    values. Elsewhere this waits for the device; ``any_wild`` does not.
    """
    if values.device.type != "cpu":
        return not bool(any_wild(values))
    signed, unsigned, limit = _LIMITS[values.dtype]
    raw = values.reshape(-1).view(torch.uint8).numpy()
    below = limit | 1 << 8 * values.itemsize - 1
    for begin in range(0, raw.size, LOOKED_AT):
        part = raw[begin : begin + LOOKED_AT]
        # Among integers with a sign positive numbers are the largest, among others negative ones.
        if part.view(signed).max() >= limit or part.view(unsigned).max() >= below:
            return False
    return True


def any_wild(values: torch.Tensor) -> torch.Tensor:
    """Return whether a value is NaN or infinite as a bool () on the values' device.

    Nothing waits for the device, and no copy of the values is made. The extremes of numbers are
    NaN or infinite where one of them is; fp8, of which devices have no extremes, is compared by its
    bits, as ``is_finite`` does.
    """
    flat = values.reshape(-1)
    if not flat.numel():
        return torch.zeros((), dtype=torch.bool, device=values.device)
    if values.dtype in FP8:
        limit, bits = _LIMITS[values.dtype][2], flat.view(torch.uint8)
        return (bits.view(torch.int8).amax() >= limit) | (bits.amax() >= (limit | 0x80))
    least, most = torch.aminmax(flat)
    return ~(torch.isfinite(least) & torch.isfinite(most))
