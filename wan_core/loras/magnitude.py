"""DoRA: each row of a layer's weight is rescaled to a magnitude of the file (Liu et al. 2024).

The weight g (W + s B A), with g = m / norm for each row, is applied to the layer's output, as
g (W x) + (g s B)(A x). g is worked out when the layer computes first, where its weight then is and
as it is stored. Two kinds of files mean two things where that matters, and each is read as its own
reader does. PEFT (``tuners/lora/dora.py``): the norm is that of the model's own weight with this
LoRA, whose strength is in s. LyCORIS (``weight_decompose`` in ``comfy/weight_adapter/base.py``):
the norm is that of the weight before this LoRA, with those given before it, and the strength leads
from that weight to the rescaled one. In both, what was given before is rescaled too, and biases are
not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..models import LORA_ROWS
from .delta import Delta, Magnitude

_EPS = torch.finfo(torch.float32).eps


@torch.no_grad()
def weigh(module: Any, deltas: Sequence[Delta], device: torch.device) -> None:
    """Work out by what each DoRA among ``deltas`` rescales a layer, and rescale its own factors.

    Called while the layer computes on ``device``: then its weight is there, or can be brought.
    """
    with _weight_of(module, deltas[0].dtype, device) as (weight, bias):
        for number, delta in enumerate(deltas):
            if delta.magnitude is not None:
                _weigh(weight, bias, deltas[:number], delta, delta.magnitude)


def _weigh(
    weight: Tensor, bias: Tensor, before: Sequence[Delta], delta: Delta, magnitude: Magnitude
) -> None:
    norms = torch.empty_like(magnitude.values)
    for start in range(0, len(norms), LORA_ROWS):
        rows = slice(start, start + LORA_ROWS)
        now = weight[rows].to(torch.float32, copy=True)
        for other in before if magnitude.strength is not None else ():
            now = other.on(now, rows)
        norms[rows] = (delta.on(now, rows) if magnitude.strength is None else now).norm(dim=1)
    gain = magnitude.values / (norms + _EPS)
    kept, own = gain, gain
    if magnitude.strength is not None:
        kept, own = 1 + magnitude.strength * (gain - 1), magnitude.strength * gain
    for other in before:
        bias = bias if other.bias is None else bias + other.bias
    delta.rescale(own)
    delta.kept = kept, bias * (1 - kept)


@contextmanager
def _weight_of(
    module: Any, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a layer's weight (out, in), as it computes with it, and its bias in float32 or 0."""
    if module.weight.is_meta:  # offloaded leaf by leaf, and back in RAM when hooks are called
        from accelerate.utils import align_module_device

        with align_module_device(module, device), _weight_of(module, dtype, device) as found:
            yield found
        return
    stored = getattr(module, "dequantized", None)  # a quantised layer's own way
    weight = module.weight.detach() if stored is None else stored(dtype)
    bias = torch.zeros((), device=device) if module.bias is None else module.bias.detach().float()
    yield weight.flatten(1), bias
