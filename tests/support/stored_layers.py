"""Linear layers stored in 8 bit, made from plain ones."""

from __future__ import annotations

import torch
from torch import nn

from wan_core.formats import Storage
from wan_core.loading import rotation
from wan_core.loading.dequantize import Scales
from wan_core.loading.quantized import StoredLinear, layer_of_fp8, rounded_to_fp8


def stored(layer: nn.Linear, kind: str) -> StoredLinear:
    """Return the layer with its matrix in fp8, or in int8 by rows rotated by 16."""
    if kind == "fp8":
        return layer_of_fp8(layer, *rounded_to_fp8(layer.weight.data))
    weight = layer.weight.data.float()
    weight = (weight.view(-1, 16) @ rotation(16).to(weight)).view(weight.shape)
    each = weight.abs().amax(1) / 127
    made = StoredLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    how = Storage("int8", "I8", tuple(weight.shape), per="row", group=16)
    made.set_stored((weight / each[:, None]).round().to(torch.int8), Scales(each), how)
    made.bias = layer.bias
    return made
