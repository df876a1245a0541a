"""Stores a transformer's block matrices in fp8: half of bf16's bytes, in memory and on the bus."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .quantized import ScaledLinear, replace_linear


def store_fp8(transformer: Any, stored: torch.dtype = torch.float8_e4m3fn) -> int:
    """Store the matrices of a transformer's blocks in fp8, in place; return the bytes saved.

    Each linear layer in ``blocks`` becomes a ScaledLinear: its weight divided by one number
    (largest magnitude over the format's largest) and rounded to fp8, multiplied back at each
    call. This changes the result: it is a choice that is named. Biases, norms, tables and what is
    outside the blocks stay; layers that are quantised already are left alone.
    """
    saved = 0
    largest = torch.finfo(stored).max
    for block in transformer.blocks:
        for name, layer in list(block.named_modules()):
            if type(layer) is not nn.Linear or not layer.weight.is_floating_point():
                continue
            weight = layer.weight.data
            scale = weight.abs().amax().float().clamp(min=1e-30) / largest
            small = ScaledLinear(
                layer.in_features, layer.out_features, bias=layer.bias is not None, stored=stored
            )
            # By rows: a copy of the whole matrix in fp32 would be four times what is made.
            values = torch.empty_like(weight, dtype=stored)
            for target, rows in zip(
                torch.split(values, 1024), torch.split(weight, 1024), strict=True
            ):
                target.copy_((rows.float() / scale).clamp_(-largest, largest))
            small.set_weight(values, scale.cpu())
            small.bias = layer.bias
            replace_linear(block, name, small.train(layer.training))
            saved += weight.nbytes - values.nbytes
    return saved
