"""Norm and SiLU of a VAE's feature maps with the bits of diffusers, in as few passes as they take.

``WanRMS_norm`` divides each pixel by its length over the channels. On CUDA the order in which aten
adds depends on how many pixels there are and how they lie in memory: lengths are taken of whole
maps, as diffusers takes them, by aten itself. What follows is elementwise and done by one kernel
(``map_kernels``), where a trial on the device found the bits of diffusers' own norm and torch's
SiLU; elsewhere ``FusedNorms`` says that it cannot, and the caller computes operation by operation.
The shortcut around the levels of VAE 2.2 is added by a kernel in the same way.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lazy import module_or_none
from .trials import Trials

_log = logging.getLogger(__name__)
EPSILON = 1e-12
"""What torch.nn.functional.normalize divides by at least."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Key = tuple[torch.device, torch.dtype, int]
_trials = Trials("fused norms of the VAE")
_shortcuts = Trials("the fused shortcut of the VAE")


@functools.cache
def map_kernels() -> Any:
    """Return the module of Triton kernels for feature maps, or None where it cannot be imported."""
    without = "Norms of the VAE run without Triton, more slowly"
    return module_or_none(__package__ or "", "map_kernels", without)


def lengths(source: Tensor) -> Tensor:
    """Return the length of each pixel over the channels: (B, C, T, H, W) to (B, 1, T, H, W).

    In float32: on CUDA aten widens what it reads, so that no wide copy of the map is made.
    """
    found: Tensor = source.norm(2.0, dim=1, keepdim=True, dtype=torch.float32)
    return found


@dataclass(frozen=True, slots=True)
class FusedNorms:
    """The norms of a VAE's half that may be fused: those of so many channels."""

    channels: frozenset[int]

    def activate(self, norm: Any, source: Tensor, out: Tensor) -> bool:
        """Write ``silu(norm(source))`` to ``out``, or return False if that is not possible.

        Both are (B, C, T, H, W); ``out`` may be ``source``.
        """
        known = source.shape[1] in self.channels and out.dtype == source.dtype
        if not (known and _plain(norm, source)):
            return False
        map_kernels().scaled_silu(source, lengths(source), norm.gamma, norm.scale, EPSILON, out)
        return True


def _plain(norm: Any, source: Tensor) -> bool:
    """Say whether a norm is the one that the kernel computes, its weight where the map is."""
    plain = isinstance(norm.bias, float) and norm.bias == 0 and norm.channel_first
    gamma: Tensor = norm.gamma
    beside = gamma.dtype == source.dtype and gamma.device == source.device
    return bool(plain) and beside and gamma.is_contiguous()


def fused_norms(weight: Tensor, channels: Iterable[int]) -> FusedNorms | None:
    """Return which norms may be fused where ``weight`` is and in its dtype; None if there are none.

    ``channels`` are the numbers of channels that norms have. Each is tried once per process, with
    diffusers' norm beside it.
    """
    if not weight.is_cuda or weight.dtype not in _DTYPES or map_kernels() is None:
        return None
    keys = [(weight.device, weight.dtype, count) for count in sorted(set(channels))]
    found = {key[2] for key in keys if _trials.of(key, functools.partial(_works, key))}
    return FusedNorms(frozenset(found)) if found else None


def _works(key: Key) -> bool:
    equal = _equal(key)
    if not equal:
        _log.info("The fused norm of the VAE is not used in %s: other bits than torch's.", key[1])
    return equal


@torch.no_grad()
def _equal(key: Key) -> bool:
    """Compare with diffusers' norm and torch's SiLU: maps of every layout that a VAE has."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    device, dtype, channels = key
    # On the trial's own stream of random numbers: the caller's are not touched.
    generator = torch.Generator().manual_seed(0)
    norm = WanRMS_norm(channels, images=False).requires_grad_(False).to(device, dtype)
    gamma = torch.randn(channels, 1, 1, 1, generator=generator)
    gamma[::7] *= 30
    norm.gamma.copy_(gamma)
    fused, equal = FusedNorms(frozenset((channels,))), True
    for batch, frames, height, width in ((1, 1, 7, 9), (2, 3, 5, 11), (1, 4, 12, 20)):
        source = _numbers(generator, batch, channels, frames, height, width).to(device, dtype)
        # After an upsampling frames come before channels, after the attention channels come last.
        frames_first = _frames_first(source)
        channels_last = source.contiguous(memory_format=torch.channels_last_3d)
        for given in (source, frames_first, channels_last):
            expected = F.silu(norm(given))
            padded = given.new_full((batch, channels, frames + 2, height + 2, width + 2), 9.0)
            inside = padded[:, :, 2:, 1:-1, 1:-1]
            equal &= fused.activate(norm, given, inside) and torch.equal(inside, expected)
            equal &= fused.activate(norm, given, given) and torch.equal(given, expected)
            inside.fill_(9.0)
            equal &= bool((padded == 9.0).all())
    return equal


def _frames_first(x: Tensor) -> Tensor:
    """Return a copy of a map, its frames before its channels in memory."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """Return numbers as maps have them: pixels of all sizes, outliers, zeros, tiny ones."""
    batch, _, frames, height, width = shape
    sizes = torch.logspace(-4, 2, height * width).view(height, width)
    found = torch.randn(*shape, generator=generator) * sizes
    found += torch.randn(batch, 1, frames, height, width, generator=generator) * sizes.flip(0)
    found[:, ::5, :, 0] *= 50
    found[:, :, :, 1, 0] = 0
    found[:, :, :, 1, 1] *= 1e-36
    found[:, 1:, :, 2, 2] *= 1e-36
    return found


def fused_duplicates(y: Tensor, x: Tensor, shortcut: Any, first: bool) -> bool:
    """Add ``shortcut(x, first)``, a ``DupUp3D``, to ``y`` in place, or return False and do nothing.

    ``x`` and ``y`` are (B, C, T, H, W); of the ``first`` chunk of a clip the frames that nothing
    precedes are left out.
    """
    if not y.is_cuda or y.dtype not in _DTYPES or map_kernels() is None:
        return False
    key = (
        y.device, y.dtype, shortcut.in_channels, shortcut.out_channels, shortcut.factor_t,
        shortcut.factor_s,
    )  # fmt: skip
    if not _shortcuts.of(key, functools.partial(_same_shortcut, shortcut, y.device, y.dtype)):
        return False
    _duplicate(y, x, shortcut, first)
    return True


def _duplicate(y: Tensor, x: Tensor, shortcut: Any, first: bool) -> None:
    times, space = shortcut.factor_t, shortcut.factor_s
    map_kernels().duplicated(y, x, shortcut.repeats, times, space, times - 1 if first else 0)


@torch.no_grad()
def _same_shortcut(shortcut: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Compare with diffusers' own: in every layout, of one frame and of two."""
    generator, equal = torch.Generator().manual_seed(0), True
    for frames, first in ((1, True), (2, False)):
        x = torch.randn(2, shortcut.in_channels, frames, 3, 5, generator=generator)
        x = x.to(device, dtype)
        more = shortcut(x, first_chunk=first)
        y = torch.randn(more.shape, generator=generator).to(device, dtype)
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            # Frames come before channels where an upsampling made the map.
            frames_first = _frames_first(y)
            for found in (y.clone(memory_format=layout), frames_first):
                _duplicate(found, x.contiguous(memory_format=layout), shortcut, first)
                equal &= torch.equal(found, y + more)
    if not equal:
        _log.info(
            "The fused shortcut of the VAE is not used in %s: other bits than torch's.", dtype
        )
    return equal
