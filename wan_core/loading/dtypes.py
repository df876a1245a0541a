"""Dtypes: their names, and which parameters stay in fp32.

Wan's time embedder, scale-shift tables and norms stay in fp32, as the classes ask for in
``_keep_in_fp32_modules``. Each of them in bf16 would change the result by 1e-4 to 1e-3 of its
range.
"""

from __future__ import annotations

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
