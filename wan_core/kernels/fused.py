"""Fused kernels: which may be used, and for which modules they can stand.

Fused kernels (``fused_kernels``, Triton) do in one pass what the eager code does in four to eight.
Whether they give its bits depends on the card, the versions of torch and Triton, dtype and width;
``fused_trial`` finds out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..lazy import module_or_none


@dataclass(frozen=True, slots=True)
class Fused:
    """What may be fused for one device, dtype, width and number of heads."""

    norms: bool = False
    """LayerNorm with modulation, and gated residuals with the norm that follows."""
    rotations: bool = False
    """RMSNorm over all heads with rotary embedding."""


NOTHING = Fused()


@functools.cache
def triton_kernels() -> Any:
    """Return the module of Triton kernels, or None where it cannot be imported."""
    without = "Elementwise work runs without Triton, more slowly"
    return module_or_none(__package__ or "", "fused_kernels", without)


def layer_norm_is_plain(norm: nn.Module, hidden: Tensor) -> bool:
    """Say whether a norm computes FP32LayerNorm of ``hidden``'s width here, and nothing else."""
    from diffusers.models.normalization import FP32LayerNorm

    if type(norm) is not FP32LayerNorm or norm.normalized_shape != hidden.shape[-1:]:
        return False
    return _is_bare(norm, hidden) and (norm.weight is None) == (norm.bias is None)


def rms_norm_is_plain(norm: nn.Module, states: Tensor) -> bool:
    """Say whether a norm is torch's RMSNorm over ``states``'s width with a weight of its dtype."""
    if type(norm) is not nn.RMSNorm or norm.normalized_shape != states.shape[-1:]:
        return False
    weight: Tensor | None = norm.weight
    if weight is None or norm.eps is None or weight.dtype != states.dtype:
        return False
    return _is_bare(norm, states) and rows_without_gaps(states)


def rows_without_gaps(states: Tensor) -> bool:
    """Say whether kernels can step through (B, L, dim): tokens side by side, batches whole tokens
    apart."""
    (between, token, number), dim = states.stride(), states.shape[2]
    return number == 1 and token == dim and (states.shape[0] == 1 or between % dim == 0)


def _is_bare(norm: nn.Module, states: Tensor) -> bool:
    """Say whether no hook acts on a module and its weights are where ``states`` is."""
    hooked = norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm)
    if hooked or hasattr(norm, "_hf_hook"):
        return False
    return all(
        value.device == states.device and value.is_contiguous() for value in norm.parameters()
    )
