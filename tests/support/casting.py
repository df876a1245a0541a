"""A module cast to a dtype as ``from_pretrained(dtype=...)`` does it, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wan_core.loading.dtypes import keep_in_fp32, stays_fp32
from wan_core.loading.quantized import layer_of_fp8, replace_layer, rounded_to_fp8


def cast_module(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floating-point parameters of ``module`` to ``dtype`` in place, and return it.

    Like ``from_pretrained(dtype=...)`` and unlike ``module.to(dtype)``, this leaves in fp32 what
    :func:`keep_in_fp32` lists. Non-persistent buffers (rotary tables) keep their dtype.
    """
    kept = keep_in_fp32(module, dtype)

    def wanted(name: str) -> torch.dtype:
        return torch.float32 if stays_fp32(name, kept) else dtype

    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(wanted(name))
    saved = module.state_dict(keep_vars=True).keys()
    for prefix, owner in module.named_modules():
        for local, buffer in owner._buffers.items():
            name = f"{prefix}.{local}" if prefix else local
            if buffer is not None and buffer.is_floating_point() and name in saved:
                owner._buffers[local] = buffer.to(wanted(name))
    return module


def store_fp8(transformer: Any, stored: torch.dtype = torch.float8_e4m3fn) -> int:
    """Store the matrices of a model's blocks in fp8, in place; return the bytes saved."""
    saved = 0
    for block in transformer.blocks:
        for name, layer in list(block.named_modules()):
            if type(layer) is nn.Linear:
                replace_layer(
                    block, name, layer_of_fp8(layer, *rounded_to_fp8(layer.weight.data, stored))
                )
                saved += layer.weight.nbytes - layer.weight.numel()
    return saved
