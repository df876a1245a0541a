"""Stores the matrices of a transformer's blocks in fp8, which takes half the bytes of bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .quantized import ScaledLinear, replace_linear


def store_fp8(transformer: Any, stored: torch.dtype = torch.float8_e4m3fn) -> int:
    """Store the matrices of a transformer's blocks in fp8, in place; return the bytes saved.

    Each linear layer in ``blocks`` becomes a ScaledLinear. Its weight is divided by one scale (the
    weight's largest magnitude over the largest value of the format), rounded to fp8, and multiplied
    with the scale again at each call. This changes the result, which is why a plan that does it
    says so. Biases, norms, tables and everything outside the blocks stay as they are, and so do
    layers that are quantised already.
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
            # A thousand rows at a time: a copy of the whole matrix in fp32 would take four times
            # the bytes of the result.
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
