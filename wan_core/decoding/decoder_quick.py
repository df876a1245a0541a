"""What makes the lean VAE faster where rounding may differ: channels last, norms in one pass.

With the channels of a pixel side by side, cuDNN's convolutions need no transposed copies, and norm
and SiLU of a pixel are one pass (Triton) that writes straight into the padded buffer which the next
convolution reads. Sums run in another order than in diffusers, so the last bits differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import Trials, triton_kernels

_trials = Trials("the quick norm of the VAE")
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, slots=True)
class Quick:
    """Maps have their channels last; ``fused`` says whether Triton's norm works here."""

    fused: bool

    def activate(self, norm: Any, source: Tensor, out: Tensor) -> bool:
        """Write ``silu(norm(source))`` to ``out`` in one pass; False if that is not possible."""
        plain = isinstance(norm.bias, float) and norm.bias == 0 and norm.channel_first
        beside = source.stride(1) == 1 and out.stride(1) == 1
        if not (self.fused and plain and beside and source.dtype == norm.gamma.dtype):
            return False
        triton_kernels().norm_silu(source, out, norm.gamma, norm.scale)
        return True


def empty(like: Tensor, shape: Sequence[int], quick: Quick | None) -> Tensor:
    """Return an unwritten map of ``like``'s kind, with its channels last where ``quick`` is set."""
    layout = torch.contiguous_format if quick is None else _FORMATS[len(shape)]
    made: Tensor = torch.empty(
        tuple(shape), dtype=like.dtype, device=like.device, memory_format=layout
    )
    return made


def quick_for(half: Any) -> Quick | None:
    """Return what makes a decoder or encoder faster where its weights are; None: nothing."""
    weight: Tensor = half.conv_in.weight
    if not weight.is_cuda:
        return None
    return Quick(fused=_works(weight.device, weight.dtype))


def _works(device: torch.device, dtype: torch.dtype) -> bool:
    if triton_kernels() is None:
        return False
    return _trials.of((device, dtype), partial(_agrees, device, dtype))


def _agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Compare the fused norm with plain code on a few pixels."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(1, 96, 2, 3, 5, generator=generator).to(device, dtype)
    source = source.contiguous(memory_format=torch.channels_last_3d)
    gamma = torch.randn(96, generator=generator).to(device, dtype)
    out = torch.full_like(source, float("nan"))
    wide = torch.nn.functional.normalize(source.float(), dim=1) * 96**0.5
    expected = torch.nn.functional.silu(wide * gamma.float().view(96, 1, 1, 1))
    triton_kernels().norm_silu(source, out, gamma, 96**0.5)
    bound = 4 * torch.finfo(dtype).eps
    return bool(torch.allclose(out.float(), expected, rtol=bound, atol=bound))
