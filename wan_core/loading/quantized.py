"""Linear layers that keep their weights as stored: fp8 with a scale, and GGUF blocks.

The weight is dequantised at each call, into a copy that lives as long as the call. Its values are
those that dequantising the weight on loading would have given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

from .reader import FP8


class ScaledLinear(nn.Linear):
    """A linear layer whose weight stays in fp8 and is multiplied with its scale at each call.

    The fp8 bits are held as int8, for two reasons: ``module.to(dtype)`` leaves integers alone, and
    code that casts its input to the weight's dtype (umT5, Wan's time embedder) makes an exception
    for int8 weights. ``weight_scale`` is float32, one number or one per row.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, stored: torch.dtype
    ) -> None:
        if stored not in FP8:
            raise ValueError(f"{stored} is not an fp8 dtype")
        with torch.device("meta"):
            super().__init__(in_features, out_features, bias=bias)
        self.stored = stored
        self.weight_scale: torch.Tensor = torch.ones(())

    def set_weight(self, values: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Set the weight: fp8 ``values`` (out, in) and their ``scale`` (float32; None means 1)."""
        self.weight = nn.Parameter(values.view(torch.int8), requires_grad=False)
        # Not a buffer: casting the module must not round it, and a single number stays on the CPU,
        # where ``item`` does not wait for the device.
        self.weight_scale = torch.ones(()) if scale is None else scale.to(torch.float32)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight in ``dtype``: stored value x scale in float32, rounded once."""
        values = self.weight.view(self.stored)
        if self.weight_scale.dim() == 0:
            # torch multiplies a tensor with a Python number in float32 and rounds once. Casting fp8
            # to bf16 or fp16 is exact, so this saves the float32 copy and changes no bit.
            return values.to(dtype) * self.weight_scale.item()
        rows = self.weight_scale.to(values.device).view(-1, 1)
        return values.to(torch.float32).mul_(rows).to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer to ``input`` (..., in_features), in the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.dequantized(input.dtype), bias)

    def extra_repr(self) -> str:
        """Name the stored dtype beside the sizes."""
        return f"{super().extra_repr()}, stored={self.stored}"


def replace_linear(root: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the layer called ``name`` (dotted) of ``root`` by ``new``."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)


def gguf_linear(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Return diffusers' GGUF layer of the same size, on the meta device, computing in ``dtype``."""
    from diffusers.quantizers.gguf.utils import GGUFLinear

    with torch.device("meta"):
        return GGUFLinear(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype
        )


def gguf_parameter(blocks: torch.Tensor, kind: Any) -> nn.Parameter:
    """Wrap GGUF blocks, uint8 (rows, bytes of a row), as diffusers' GGUF parameter."""
    from diffusers.quantizers.gguf import utils

    make: Callable[..., nn.Parameter] = utils.GGUFParameter
    parameter = make(blocks, requires_grad=False, quant_type=kind)
    return parameter
