"""Bytes alive during a lean decode, beside the VAE's weights: ``lean_decode`` without tensors.

Follows ``lean_decode`` as ``vae_activations`` follows diffusers; the same law holds for names.
"""

from __future__ import annotations

from functools import lru_cache

from .activations import FP32, Tape
from .vae_activations import CHUNKS, Map, attention_block
from .variants import VaeShape

_HISTORY = 2


class _Slot:
    """A feature cache entry: its frames, and its map where that is on the device."""

    __slots__ = ("frames", "home", "nbytes")

    def __init__(self, frames: int, kept: Map | None, nbytes: int) -> None:
        self.frames, self.home, self.nbytes = frames, kept, nbytes


class _Walk:
    """``DecoderWalk``, with the widths of ``shape`` in place of weights."""

    def __init__(self, shape: VaeShape, bands: int, cache_on_host: bool) -> None:
        self.shape, self.bands, self.on_host = shape, bands, cache_on_host
        self.slots: list[_Slot | None] = []
        self.index = 0

    def through(self, x: Map) -> Map:
        shape, self.index = self.shape, 0
        widths = [shape.decoder_base_dim * m for m in (shape.dim_mult[-1], *shape.dim_mult[::-1])]
        held = [x]
        del x
        held.append(self._convolve(held, widths[0]))
        self._residual(held, widths[0])
        held.append(attention_block(held.pop()))
        self._residual(held, widths[0])
        for level in range(len(widths) - 1):
            self._level(held, widths[level + 1], level)
        y = self._convolve(held, shape.out_channels, norm=True)
        return y.like() if shape.patch_size is not None else y

    def _level(self, held: list[Map], width: int, level: int) -> None:
        shape, last = self.shape, level == len(self.shape.dim_mult) - 1
        kept = held[0] if shape.is_residual and not last else None
        for _ in range(shape.num_res_blocks + 1):
            self._residual(held, width, writable=held[0] is not kept)
        if last:
            return
        out = width if shape.is_residual else width // 2
        self._upsample(held, out, time=shape.temporal_downsample[::-1][level])
        if kept is not None:
            kept.like(c=out, t=1)

    def _residual(self, held: list[Map], width: int, *, writable: bool = True) -> None:
        x = held.pop()
        plain = x.c == width
        if self.bands > 1:
            result = (x if writable else x.like()) if plain else x.like(c=width)
            y = self._by_bands(x, width, norm=True)
            del x
            self._by_bands(y, width, norm=True, into=result)
            held.append(result)
            return
        shortcut = x if plain else _apply(x, width, kernel=1, margin=0)
        first, second = self._next_slot(), self._next_slot()
        padded = self._whole(x, first, writable=writable and not plain)
        if not plain:
            del x
        y = _apply(padded, width)
        if plain:
            frames = self._let_go(second, y.t)
            self._keep(first, y.like, y.t)
            _normalize(y)
        else:
            frames = self._keep_last(first, padded)
            del padded
            frames = self._frames(second, y.t)
            padded = self._whole(y, second, writable=True)
        x = shortcut
        del shortcut, y
        y = _apply(padded, width)
        del x
        self._keep(second, y.like, frames)
        held.append(y)
