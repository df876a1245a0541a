"""The activation memory of the lean VAE: ``decoding/decoder.py`` and ``decoding/encoder.py``.

They are replayed without tensors, as ``memory/vae.py`` replays diffusers' own. Variables and every
``del`` stand for those in the original. A map that is made and not kept stands for a temporary.
"""

from __future__ import annotations

from functools import lru_cache

from ..models import VaeShape
from .forward import FP32, Tape
from .strips import ROWS, Strip
from .vae import CHUNKS, Map, attention_block, averaged, convolved

BANDS = 8
"""Bands of rows that a plan uses; with so many, one band is small beside the feature maps."""

_HISTORY = 2


class _Slot:
    """A feature cache entry: its frames and bytes, and its map if that is on the device."""

    __slots__ = ("frames", "kept", "nbytes")

    def __init__(self, frames: int, kept: Map | None, nbytes: int) -> None:
        self.frames, self.kept, self.nbytes = frames, kept, nbytes

    @property
    def on_host(self) -> bool:
        return self.kept is None and self.nbytes > 0


class _View(Map):
    """A part of a map: no bytes of its own, but the whole one stays alive with it."""

    __slots__ = ("whole",)

    def __init__(self, whole: Map, h: int, w: int) -> None:
        self.whole = whole
        self.tape, self.size, self.nbytes = whole.tape, whole.size, 0
        self.b, self.c, self.t, self.h, self.w = whole.b, whole.c, whole.t, h, w
        self.elements = self.b * self.c * self.t * h * w


class _Walk:
    """``DecoderWalk``, with the channel counts of ``shape`` in place of weights."""

    def __init__(
        self, shape: VaeShape, bands: int, cache_on_host: bool, strip: Strip | None = None
    ) -> None:
        self.shape, self.bands, self.on_host, self.strip = shape, bands, cache_on_host, strip
        self.slots: list[_Slot | None] = []
        self.index = 0

    def through(self, x: Map) -> Map:
        shape, self.index = self.shape, 0
        widths = [shape.decoder_base_dim * m for m in (shape.dim_mult[-1], *shape.dim_mult[::-1])]
        held = [x]
        del x
        held.append(self._convolve(held, widths[0]))
        self._middle(held, widths[0])
        if self.strip is not None:
            held[0] = self._cut(held[0], self.strip.begins)
        for level in range(len(widths) - 1):
            self._level(held, widths[level + 1], level)
        y = self._convolve(held, shape.out_channels, norm=True)
        y = y if self.strip is None else self._cut(y, self.strip.keeps[-1])
        return y.like() if shape.patch_size is not None else y

    def _cut(self, x: Map, kept: tuple[int, int]) -> Map:
        assert self.strip is not None
        part = kept[1] - kept[0]
        return _View(x, part, x.w) if self.strip.axis == ROWS else _View(x, x.h, part)

    def _middle(self, held: list[Map], width: int) -> None:
        self._residual(held, width)
        held.append(attention_block(held.pop()))
        self._residual(held, width)

    def _level(self, held: list[Map], width: int, level: int) -> None:
        shape, last = self.shape, level == len(self.shape.dim_mult) - 1
        kept = held[0] if shape.is_residual and not last else None
        for _ in range(shape.num_res_blocks + 1):
            self._residual(held, width, writable=held[0] is not kept)
        if last:
            return
        out = width if shape.is_residual else width // 2
        if self.strip is not None:
            held[0] = self._cut(held[0], self.strip.keeps[level])
            kept = None if kept is None else self._cut(kept, self.strip.keeps[level])
        self._upsample(held, out, time=shape.temporal_downsample[::-1][level])
        if kept is not None:
            kept.like(c=out, t=1)  # ``add_duplicated`` may select channels, frame by frame

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
        padded, count = self._whole(x, first, writable=writable and not plain)
        if not plain:
            del x
        y = _apply(padded, width)
        if plain:
            # Frames that the second convolution's history would overwrite are set aside.
            aside = y.like(t=count) if y.t < _HISTORY else None
            following = self._load(second, y)
            self._keep(first, padded, count)
            _normalize(y)
            del aside
        else:
            self._keep(first, padded, count)
            del padded
            padded, following = self._whole(y, second, writable=True)
        x = shortcut
        del shortcut, y
        y = _apply(padded, width)
        del x
        self._keep(second, padded, following)
        held.append(y)

    def _convolve(
        self, held: list[Map], channels: int, *, norm: bool = False, margin: int = 1
    ) -> Map:
        x = held.pop()
        if self.bands > 1:
            return self._by_bands(x, channels, norm=norm, margin=margin)
        slot = self._next_slot()
        padded, count = self._whole(x, slot, norm=norm, writable=norm, margin=margin)
        del x
        y = _apply(padded, channels, margin=margin)
        self._keep(slot, padded, count, margin)
        return y

    def _by_bands(
        self, x: Map, channels: int, *, norm: bool = False, into: Map | None = None, margin: int = 1
    ) -> Map:
        slot, rows = self._next_slot(), self._rows(x.h)
        held = self.slots[slot]
        count = min(_HISTORY, x.t + (held.frames if held else 0))
        out = x.like(c=channels) if into is None else into
        kept = self._slot(x, count)
        padded = x.like(t=x.t + _HISTORY, h=rows + 2 * margin, w=x.w + 2 * margin)
        edges: tuple[Map, ...] = ()
        # A cache in RAM: the band's rows arrive in a buffer of their own, and the rows above it
        # are set aside before they are overwritten (``_mend_edge``).
        if held is not None and held.on_host:
            padded.like(t=_HISTORY, w=x.w)
            edges = (x.like(t=_HISTORY, h=margin),) if margin else ()
        if norm:
            _normalize(padded)
        if self.on_host:
            x.like(t=_HISTORY, h=rows)  # on its way to RAM
        _apply(padded, channels, margin=margin)
        x.tape.during(*edges)
        self.slots[slot] = kept
        return out

    def _rows(self, height: int) -> int:
        return -(-height // min(self.bands, height))

    def _next_slot(self) -> int:
        if self.index == len(self.slots):
            self.slots.append(None)
        self.index += 1
        return self.index - 1

    def _whole(
        self, x: Map, slot: int, *, norm: bool = True, writable: bool, margin: int = 1
    ) -> tuple[Map, int]:
        padded = x.like(t=x.t + _HISTORY, h=x.h + 2 * margin, w=x.w + 2 * margin)
        count = self._load(slot, x)
        if norm:
            active = x if writable else x.like()
            _normalize(active)
        return padded, count

    def _load(self, slot: int, x: Map) -> int:
        held, self.slots[slot] = self.slots[slot], None
        if held is not None and held.on_host:
            x.like(t=_HISTORY)  # on its way from RAM
        return min(_HISTORY, x.t + (held.frames if held else 0))

    def _keep(self, slot: int, padded: Map, count: int, margin: int = 1) -> None:
        h, w = padded.h - 2 * margin, padded.w - 2 * margin
        if self.on_host:
            padded.like(t=_HISTORY, h=h, w=w)  # on its way to RAM
        self.slots[slot] = self._slot(padded, count, h, w)

    def _slot(self, x: Map, frames: int, h: int | None = None, w: int | None = None) -> _Slot:
        if self.on_host:
            nbytes = x.b * x.c * _HISTORY * (h or x.h) * (w or x.w) * x.size
            return _Slot(_HISTORY, None, nbytes)
        kept = x.like(t=frames, h=h, w=w)
        return _Slot(frames, kept, kept.nbytes)

    def _upsample(self, held: list[Map], channels: int, *, time: bool) -> None:
        if time:
            self._upsample_time(held)
        x = held.pop()
        if self.bands > 1:
            rows = self._rows(x.h)
            out = x.like(c=channels, h=2 * x.h, w=2 * x.w)
            large = x.like(h=2 * rows + 2, w=2 * x.w + 2)
            convolved(large, out.like(h=2 * rows))
        else:
            large = x.like(h=2 * x.h, w=2 * x.w)
            del x
            out = convolved(large, large.like(c=channels))
        held.append(out)

    def _upsample_time(self, held: list[Map]) -> None:
        if self.index == len(self.slots):  # the clip's first frame; its marker counts as a frame
            self.slots[self._next_slot()] = _Slot(1, None, 0)
            return
        both = self._convolve(held, 2 * held[0].c, margin=0)
        held.append(both.like(c=both.c // 2, t=2 * both.t))


class _EncoderWalk(_Walk):
    """``EncoderWalk``."""

    def through(self, x: Map) -> Map:
        shape, self.index = self.shape, 0
        held = [x]
        del x
        held.append(self._convolve(held, shape.base_dim))
        for level, multiple in enumerate(shape.dim_mult):
            self._down_level(held, shape.base_dim * multiple, level)
        self._middle(held, held[0].c)
        return self._convolve(held, 2 * shape.z_dim, norm=True)

    def _down_level(self, held: list[Map], width: int, level: int) -> None:
        shape, down = self.shape, level != len(self.shape.dim_mult) - 1
        kept = held[0] if shape.is_residual else None
        for _ in range(shape.num_res_blocks):
            self._residual(held, width, writable=held[0] is not kept)
        time = down and shape.temporal_downsample[level]
        if down:
            self._downsample(held, time=time)
        if kept is not None:
            averaged(kept, width, 2 if time else 1, 2 if down else 1)

    def _downsample(self, held: list[Map], *, time: bool) -> None:
        x = held.pop()
        out_size = {"h": x.h // 2, "w": x.w // 2}
        if self.bands > 1:
            out = x.like(**out_size)
            rows = self._rows(out.h)
            convolved(x.like(h=2 * rows + 1, w=x.w + 1), out.like(h=rows))
            del x
        else:
            padded = x.like(h=x.h + 1, w=x.w + 1)
            del x
            out = convolved(padded, padded.like(**out_size))
            del padded
        held.append(out)
        if time:
            self._halve_time(held)

    def _halve_time(self, held: list[Map]) -> None:
        slot, x = self._next_slot(), held[0]
        before = self.slots[slot]
        if before is None:
            kept = x.like()
            self.slots[slot] = _Slot(1, kept, kept.nbytes)
            return
        held.clear()
        kept = x.like(t=1)
        joined = x.like(t=x.t + 1)
        del x
        held.append(convolved(joined, joined.like(t=(joined.t - 3) // 2 + 1)))
        self.slots[slot] = _Slot(1, kept, kept.nbytes)


def _apply(padded: Map, channels: int, *, kernel: int = 3, margin: int = 1) -> Map:
    h, w = padded.h - 2 * margin, padded.w - 2 * margin
    return convolved(padded, padded.like(c=channels, t=padded.t - kernel + 1, h=h, w=w))


def _normalize(x: Map) -> None:
    """Norm frame by frame, in place except for the vector lengths and a float32 copy."""
    wide = x if x.size == FP32 else x.like(t=1, size=FP32)
    wide.like(c=1, t=1)


def _in_place(size: int, bands: int) -> bool:
    """Say whether the quick VAE's convolutions, with channels last, need no copies of their maps.

    Measured on an H100 and an H200: the peaks of quick decodes in ``benchmarks/results`` are those
    without copies, to 0.2 % in fp32 and less by up to 5 % in half precision. In fp32 copies are
    counted all the same: older cards may have no such convolutions.
    """
    return size < FP32 and bands == 1


@lru_cache(maxsize=256)
def lean_decode_bytes(
    shape: VaeShape, *, batch: int, latent_frames: int, latent_height: int, latent_width: int,
    size: int, bands: int = 1, cache_on_host: bool = False, workspace: bool = True,
    quick: bool = False, strip: Strip | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Return (peak bytes, bytes of the feature cache) of the streamed lean decode, or a strip's.

    Arguments are as for ``decode_peak`` and ``lean_decoder``, ``quick`` meaning on CUDA. With
    ``cache_on_host`` the feature cache is in RAM and not part of the peak.
    """
    tape = Tape(workspace and not (quick and _in_place(size, bands)))
    latents = [
        Map(tape, batch, shape.z_dim, latent_frames, latent_height, latent_width, size)
        for _ in range(2)
    ]
    walk = _Walk(shape, bands, cache_on_host, strip)
    for _ in range(min(latent_frames, CHUNKS)):
        chunk = walk.through(latents[0].like(t=1))
        scaled = chunk.like()
        scaled = scaled.like()
        chunk = scaled.like(size=FP32)
        del scaled, chunk
    tape.during(*latents)
    return tape.peak, sum(slot.nbytes for slot in walk.slots if slot is not None)


@lru_cache(maxsize=256)
def lean_encode_bytes(
    shape: VaeShape, *, batch: int, num_frames: int, height: int, width: int, size: int,
    bands: int = 1, cache_on_host: bool = False, workspace: bool = True, quick: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Return (peak bytes, bytes of the feature cache) of the streamed lean encode.

    Arguments are as for ``encode_peak`` and ``lean_encoder``, ``quick`` meaning on CUDA. With
    ``cache_on_host`` the feature cache is in RAM and not part of the peak; a few small frames of it
    stay on the device.
    """
    tape = Tape(workspace and not (quick and _in_place(size, bands)))
    walk = _EncoderWalk(shape, bands, cache_on_host)
    pieces: list[Map] = []
    patch = shape.patch_size or 1
    for index in range(min(1 + (num_frames - 1) // 4, CHUNKS)):
        x = Map(tape, batch, shape.in_channels // patch**2, 4 if index else 1, height, width, size)
        if patch > 1:
            x = x.like(c=shape.in_channels, h=height // patch, w=width // patch)
        pieces.append(walk.through(x))
    return tape.peak, sum(slot.nbytes for slot in walk.slots if slot is not None)
