"""Tries the fused kernels on a device beside the eager code: which of them give its bits.

Each is compared once per process, on random tokens of the true width, before it is used. One that
fails, or does not compile, is left out and said; the eager code takes its place. So a choice never
changes in the middle of a clip.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .fused import NOTHING, Fused, triton_kernels
from .modulation import Modulation, TimestepRuns, spans_of
from .rotary import norm_all, rotate_all
from .trials import Trials, all_can

_log = logging.getLogger(__name__)
_TOKENS = 37
"""Tokens of a trial: odd, so that nothing divides them."""
_STEP = 512  # widths are multiples of it, ``STEP`` in ``fused_kernels``
Key = tuple[torch.device, torch.dtype, int, int, bool]
_norms = Trials("fused norms and residuals")
_rotations = Trials("fused norms with rotation")


def fused_for(hidden: Tensor, heads: int, per_token: bool = False) -> Fused:
    """Return what may be fused in a block whose hidden states are ``hidden`` (B, L, dim).

    ``per_token`` means one timestep embedding for each token, (B, L, parts, dim).
    """
    if not hidden.is_cuda or hidden.shape[-1] % _STEP or not _whole_heads(hidden.shape[-1], heads):
        return NOTHING
    key = (hidden.device, hidden.dtype, hidden.shape[-1], heads, per_token)
    words = f"{hidden.dtype}, {hidden.shape[-1]} of {heads} heads, {per_token=}"
    # Not for their bits, which are the same: a fused norm may go on to write in 8 bit.
    return Fused(
        norms=all_can(f"fused norms of {words}", lambda: _try_all(key).norms),
        rotations=all_can(f"fused rotations of {words}", lambda: _try_all(key).rotations),
    )


def _whole_heads(dim: int, heads: int) -> bool:
    """Say whether heads are as long as a power of two, and none lies across two steps."""
    size, rest = divmod(dim, heads)
    return rest == 0 and size >= 2 and _STEP % size == 0


def _try_all(key: Key) -> Fused:
    if triton_kernels() is None:
        return NOTHING
    norms = functools.partial(_works, "norm and residual", key, _try_norms)
    rotations = functools.partial(_works, "norm and rotation", key, _try_rotation)
    return Fused(norms=_norms.of(key, norms), rotations=_rotations.of(key, rotations))


def _works(name: str, key: Key, attempt: Callable[[Key, torch.Generator], bool]) -> bool:
    # On the trial's own stream of random numbers: the caller's are not touched.
    equal = attempt(key, torch.Generator().manual_seed(0))
    if not equal:
        _log.info("The fused %s is not used in %s: other bits than torch's.", name, key[1])
    return equal


def _tokens(key: Key, generator: torch.Generator) -> Tensor:
    """Return (2, 37, dim) numbers as hidden states have them: offsets, outliers, equal rows."""
    device, dtype, dim, _, _ = key
    states = torch.randn(2, _TOKENS, dim, generator=generator)
    sizes = torch.logspace(-3, 2, _TOKENS)[:, None]
    states = states * sizes + torch.randn(2, _TOKENS, 1, generator=generator) * sizes.flip(0)
    states[:, 0] = 0.25
    states[:, 1, ::97] = 40
    return states.to(device, dtype)


def _try_norms(key: Key, generator: torch.Generator) -> bool:
    from diffusers.models.normalization import FP32LayerNorm

    device, dtype, dim, _, per_token = key

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    table = random(1, 6, dim)
    plain = FP32LayerNorm(dim, 1e-6, elementwise_affine=False)
    affine = FP32LayerNorm(dim, 1e-6, elementwise_affine=True).requires_grad_(False).to(device)
    affine.weight.copy_(random(dim))
    affine.bias.copy_(random(dim))
    embeddings: list[Tensor | TimestepRuns] = [
        random(2, 6, dim).to(dtype),
        TimestepRuns(random(2, 2, 6, dim).to(dtype), (0, 5)),
    ]
    if per_token:
        embeddings = [random(2, _TOKENS, 6, dim).to(dtype)]
    equal = True
    for temb in embeddings:
        results = []
        hidden, change = _tokens(key, generator), _tokens(key, generator)
        for fused in (NOTHING, Fused(norms=True)):
            modulation = Modulation(table, temb, _TOKENS, 16, upcast=True, fused=fused)
            state = hidden.clone()
            normed = modulation.all_normed(plain, state, 0)
            crossed = modulation.add_and_norm(state, change.clone(), 2, affine, None)
            fed = modulation.add_and_norm(state, change.clone(), None, plain, 3)
            modulation.add_all_gated(state, change, 5)
            results.append((normed, crossed, fed, state))
        equal &= all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return equal


def _try_rotation(key: Key, generator: torch.Generator) -> bool:
    device, dtype, dim, heads, _ = key
    norm = nn.RMSNorm(dim, eps=1e-6).requires_grad_(False).to(device, dtype)
    norm.weight.copy_(torch.randn(dim, generator=generator))
    angles = torch.rand(1, _TOKENS, 1, dim // heads, generator=generator).to(device)
    rotary = angles.cos(), angles.sin()
    states, spans = _tokens(key, generator), spans_of((0,), _TOKENS, 16)
    turned, normed = [], []
    for fused in (NOTHING, Fused(rotations=True)):
        turned.append(rotate_all(norm, states.clone(), heads, spans, rotary, fused))
        normed.append(norm_all(norm, states.clone(), heads, spans, fused))
    return torch.equal(*turned) and torch.equal(*normed)
