"""Tokens in 8 bit, and norms that write them: which fused norms may be used for that.

A norm whose output only 8-bit products read need not write it in 16 bit first. The fused kernel
rounds what it would have written; on each device, dtype and width it is compared once with the norm
in 16 bit followed by ``quantize_rows``. Where it does not agree, or does not compile, the two run
one after the other.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused import triton_kernels
from .trials import Trials, all_can

_log = logging.getLogger(__name__)
_TOKENS = 37
"""Tokens of a trial: odd, so that nothing divides them."""
_OTHER = 0.01
"""Share of numbers that may be rounded to the other side: both divide, not always alike."""
_trials = Trials("norms in 8 bit")


class Codes(NamedTuple):
    """Tokens in 8 bit."""

    numbers: Tensor
    """(n, width), int8 or float8_e4m3fn; a token's are to be multiplied with its scale."""
    scales: Tensor
    """(n, 1), float32."""
    shape: tuple[int, ...]
    """The shape (...) of the n tokens."""


def empty_codes(like: Tensor, kind: torch.dtype) -> Codes:
    """Return codes to be written for ``like`` (..., width)."""
    count = like.shape[:-1].numel()
    numbers = torch.empty(count, like.shape[-1], dtype=kind, device=like.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=like.device)
    return Codes(numbers, scales, tuple(like.shape[:-1]))


def norms_to_codes(hidden: Tensor, kind: torch.dtype, per_token: bool) -> bool:
    """Say whether a fused norm of ``hidden`` (B, L, dim) may write ``kind``; tried once.

    ``per_token`` means one timestep embedding for each token.
    """
    key = (hidden.device, hidden.dtype, hidden.shape[-1], kind, per_token)
    words = f"norms of {hidden.dtype}, {hidden.shape[-1]}, in {kind}, {per_token=}"
    return all_can(words, lambda: _trials.of(key, partial(_agrees, hidden, kind, per_token)))


def _agrees(like: Tensor, kind: torch.dtype, per_token: bool) -> bool:
    generator, dim = torch.Generator().manual_seed(0), like.shape[-1]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like.device)

    values = random(1, _TOKENS if per_token else 1, 3, dim)
    table = random(3, dim) if per_token else None
    gate, scale, shift = ((values[:, :, i], None if table is None else table[i]) for i in range(3))
    affine = random(dim), random(dim)
    # As a block calls it: before self attention, cross attention and the feed-forward.
    calls: tuple[dict[str, Any], ...] = (
        {"scale": scale, "shift": shift},
        {"gate": gate, "affine": affine, "change": random(1, _TOKENS, dim).to(like.dtype)},
        {"scale": scale, "shift": shift, "change": random(1, _TOKENS, dim).to(like.dtype)},
    )
    states = random(1, _TOKENS, dim).to(like.dtype)
    agree = all(_same(states, kind, call) for call in calls)
    if not agree:
        _log.info("The fused norm in 8 bit is not used in %s: it rounds otherwise.", like.dtype)
    return agree


def _same(states: Tensor, kind: torch.dtype, call: dict[str, Any]) -> bool:
    kernels, hidden, found = triton_kernels(), states.clone(), empty_codes(states, kind)
    kernels.norm_codes(
        hidden, found.numbers.view(states.shape), found.scales.view(1, -1), 1e-6, **call
    )
    expected, normed = states.clone(), torch.empty_like(states)
    kernels.norm_rows(expected, normed, 1e-6, **call)
    numbers, scales = kernels.quantize_rows(normed[0], kind, False)
    other = (found.numbers.view(torch.int8) != numbers.view(torch.int8)).float().mean()
    return (
        torch.equal(hidden, expected)
        and torch.allclose(found.scales, scales, rtol=1e-5)
        and float(other) < _OTHER
    )
