"""The activation memory of the VAE's streamed encode and decode, replayed without tensors.

It follows ``autoencoder_kl_wan.py`` of diffusers 0.42 and ``sampling/vae.py`` line by line, as
``memory/forward.py`` does for the transformer and explains: variables and every ``del`` matter.
Three chunks are enough: from the third on, each causal cache holds two frames and the peak repeats,
so it does not grow with the length of the clip.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

from ..config import MIB
from ..models import VaeShape
from .forward import FP32, Blob, Tape

_REPEAT = "Rep"  # diffusers' marker: this upsampler has seen only the first frame
CHUNKS = 3
"""Chunks that are replayed; the third has the peak of all later ones."""
_HEAP_GAPS = 200 * MIB
"""What a VAE's maps take on a CPU beyond their bytes. glibc gives those above 32 MiB back singly;
smaller ones lie in its heap, with gaps. Measured of VAE 2.1 in fp32: 92 MiB at 64x64 pixels, 147
and 264 at 128x128, 200 at 256x256, and none where each map had to have a mapping of its own, which
takes twice the time."""


class Map(Blob):
    """A feature map (batch, channels, frames, height, width)."""

    __slots__ = ("b", "c", "h", "t", "w")

    def __init__(self, tape: Tape, b: int, c: int, t: int, h: int, w: int, size: int) -> None:
        self.b, self.c, self.t, self.h, self.w = b, c, t, h, w
        super().__init__(tape, b * c * t * h * w, size)

    def like(
        self, *, c: int | None = None, t: int | None = None, h: int | None = None,
        w: int | None = None, size: int | None = None,
    ) -> Map:  # fmt: skip
        """Return a new map with this one's shape and size, except for what is given."""
        return Map(
            self.tape, self.b, c or self.c, t or self.t, h or self.h, w or self.w,
            size or self.size,
        )  # fmt: skip


class _Cache:
    """``feat_cache`` and ``feat_idx``: one slot for each causal convolution, in order."""

    __slots__ = ("index", "slots")

    def __init__(self) -> None:
        self.slots: list[Map | str | None] = []
        self.index = 0

    def get(self) -> Map | str | None:
        if self.index == len(self.slots):
            self.slots.append(None)
        return self.slots[self.index]

    def put(self, value: Map | str) -> None:
        self.slots[self.index] = value
        self.index += 1


def _conv(
    x: Map, channels: int, cache: Map | None = None, *, kernel: int = 3, spatial: int = 3,
    pad: int = 2, stride: int = 1,
) -> Map:  # fmt: skip
    """``WanCausalConv3d``: join input and cached frames, copy them padded, convolve."""
    y = x
    if cache is not None and pad > 0:
        y = x.like(t=cache.t + x.t)
        pad -= cache.t
    y = y.like(t=y.t + pad, h=y.h + spatial - 1, w=y.w + spatial - 1)
    return convolved(y, y.like(c=channels, t=(y.t - kernel) // stride + 1, h=x.h, w=x.w))


def convolved(x: Map, out: Map) -> Map:
    """Return ``out``, and count the workspace of the convolution from x to it (in 2D or 3D).

    cuDNN computes in channels-last layout, so it copies input and output (measured on an H100, to
    0.2 %).
    """
    if x.tape.workspace:
        x.tape.new(x.elements + out.elements, x.size)
    return out


def _cached_conv(x: Map, channels: int, cache: _Cache) -> Map:
    previous = cache.get()
    # The next cache is cloned before the convolution runs, and the old one is still alive then.
    kept = x.like(t=min(2, x.t))
    if kept.t < 2 and isinstance(previous, Map):
        kept = kept.like(t=2)
    out = _conv(x, channels, previous if isinstance(previous, Map) else None)
    cache.put(kept)
    return out


def _normalize(x: Map) -> Map:
    wide = x if x.size == FP32 else x.like(size=FP32)
    length = wide.like(c=1)
    length = length.like()
    return wide.like()


def _rms_norm(x: Map) -> Map:
    normalized = _normalize(x)
    if x.size != FP32:
        normalized = normalized.like(size=x.size)
    y = normalized.like()
    y = y.like()
    y = y.like()
    return y


def _residual_block(x: Map, channels: int, cache: _Cache) -> Map:
    shortcut = x if x.c == channels else _conv(x, channels, kernel=1, spatial=1, pad=0)
    y = _rms_norm(x)
    y = y.like()
    y = _cached_conv(y, channels, cache)
    y = _rms_norm(y)
    y = y.like()
    y = _cached_conv(y, channels, cache)
    return y.like() if shortcut is not None else y


def attention_block(x: Map) -> Map:
    frames = x.like() if x.b > 1 and x.t > 1 else x
    frames = _rms_norm(frames)
    qkv = frames.like(c=3 * x.c)
    qkv = qkv.like()
    lse = x.like(c=1, size=FP32)
    y = x.like()
    del lse
    y = y.like() if x.h * x.w > 1 else y
    y = y.like()
    del frames
    x.tape.during(qkv)
    return y.like()


def _mid_block(x: Map, cache: _Cache) -> Map:
    x = _residual_block(x, x.c, cache)
    x = attention_block(x)
    return _residual_block(x, x.c, cache)


def _time_up(x: Map, cache: _Cache) -> Map:
    """The temporal half of "upsample3d": twice the frames, except for the clip's first one."""
    previous = cache.get()
    if previous is None:
        cache.put(_REPEAT)
        return x
    kept = x.like(t=min(2, x.t))
    if kept.t < 2:
        zeros = kept.like() if previous == _REPEAT else None
        kept = kept.like(t=2)
        del zeros
    known = previous if isinstance(previous, Map) else None
    y = _conv(x, 2 * x.c, known, spatial=1)
    cache.put(kept)
    return y.like(c=x.c, t=2 * x.t)


def _upsample(x: Map, channels: int, cache: _Cache, *, time: bool) -> Map:
    y = _time_up(x, cache) if time else x
    if y.b > 1 and y.t > 1:
        y = y.like()
    wide = y if y.size == FP32 else y.like(size=FP32)
    large = wide.like(h=2 * y.h, w=2 * y.w)
    del wide
    if large.size != y.size:
        large = large.like(size=y.size)
    return convolved(large, large.like(c=channels))


def _downsample(x: Map, cache: _Cache, *, time: bool) -> Map:
    frames = x.like() if x.b > 1 and x.t > 1 else x
    padded = frames.like(h=x.h + 1, w=x.w + 1)
    y = convolved(padded, padded.like(h=x.h // 2, w=x.w // 2))
    del padded, frames
    if not time:
        return y
    previous = cache.get()
    if previous is None:
        cache.put(y.like())
        return y
    kept = y.like(t=1)
    joined = y.like(t=y.t + 1)
    y = _conv(joined, y.c, kernel=3, spatial=1, pad=0, stride=2)
    cache.put(kept)
    return y


def _duplicated(x: Map, channels: int, time: int) -> Map:
    """``DupUp3D``: repeat each number, then copy the numbers into a larger map."""
    y = x.like(c=channels * time * 4)
    y = y.like(c=channels, t=time * x.t, h=2 * x.h, w=2 * x.w)
    return y


def averaged(x: Map, channels: int, time: int, space: int) -> Map:
    """``AvgDown3D``: a padded copy, a contiguous copy, and the mean."""
    y = x.like(t=-(-x.t // time) * time)
    y = y.like()
    return y.like(c=channels, t=y.t // time, h=y.h // space, w=y.w // space)


def _decode_chunk(x: Map, shape: VaeShape, cache: _Cache, *, first: bool) -> Map:
    widths = [shape.decoder_base_dim * m for m in (shape.dim_mult[-1], *shape.dim_mult[::-1])]
    times = shape.temporal_downsample[::-1]
    y = _cached_conv(x, widths[0], cache)
    y = _mid_block(y, cache)
    for level in range(len(widths) - 1):
        y = _decode_level(y, shape, widths, times, level, cache, first=first)
    y = _rms_norm(y)
    y = y.like()
    y = _cached_conv(y, shape.out_channels, cache)
    if shape.patch_size is not None:
        y = y.like()
    return y


def _decode_level(
    x: Map, shape: VaeShape, widths: list[int], times: tuple[bool, ...], level: int,
    cache: _Cache, *, first: bool,
) -> Map:  # fmt: skip
    """``WanUpBlock`` or ``WanResidualUpBlock``; the caller's variable keeps ``x`` alive."""
    last = level == len(widths) - 2
    width = widths[level + 1]
    kept = x.like() if shape.is_residual else None  # ``x.clone()``, for the shortcut
    y = x
    for _ in range(shape.num_res_blocks + 1):
        y = _residual_block(y, width, cache)
    if last:
        return y
    time = times[level]
    out = width if shape.is_residual else width // 2
    y = _upsample(y, out, cache, time=time)
    if kept is None:
        return y
    shortcut = _duplicated(kept, width, 2 if time else 1)
    y = y.like()
    x.tape.during(kept, shortcut)
    return y


_Layer = Callable[[Map, _Cache], Map]


def _encode_chunk(x: Map, shape: VaeShape, cache: _Cache) -> Map:
    y = _cached_conv(x, shape.base_dim, cache)
    for layer in _encoder_layers(shape):
        y = layer(y, cache)
    y = _mid_block(y, cache)
    y = _rms_norm(y)
    y = y.like()
    return _cached_conv(y, 2 * shape.z_dim, cache)


@lru_cache(maxsize=16)
def _encoder_layers(shape: VaeShape) -> tuple[_Layer, ...]:
    """Return the encoder's layers as a flat list, as the model has them.

    A nested call per level would keep its input alive longer than the model does.
    """
    layers: list[_Layer] = []
    for level, multiple in enumerate(shape.dim_mult):
        width = shape.base_dim * multiple
        down = level != len(shape.dim_mult) - 1
        time = down and shape.temporal_downsample[level]
        if shape.is_residual:
            layers.append(partial(_down_level, shape=shape, width=width, time=time, down=down))
            continue
        layers += [partial(_resnet, width=width)] * shape.num_res_blocks
        if down:
            layers.append(partial(_downsample, time=time))
    return tuple(layers)


def _resnet(x: Map, cache: _Cache, *, width: int) -> Map:
    return _residual_block(x, width, cache)


def _down_level(
    x: Map, cache: _Cache, *, shape: VaeShape, width: int, time: bool, down: bool
) -> Map:
    """``WanResidualDownBlock``."""
    kept = x.like()
    y = x
    for _ in range(shape.num_res_blocks):
        y = _residual_block(y, width, cache)
    if down:
        y = _downsample(y, cache, time=time)
    shortcut = averaged(kept, width, 2 if time else 1, 2 if down else 1)
    y = y.like()
    x.tape.during(kept, shortcut)
    return y


@lru_cache(maxsize=256)
def decode_peak(
    shape: VaeShape, *, batch: int, latent_frames: int, latent_height: int, latent_width: int,
    size: int, workspace: bool = True,
) -> int:  # fmt: skip
    """Return the peak bytes of the streamed decode, without weights and without the video.

    ``size`` is the bytes per number of the VAE's dtype. Decoded frames leave the device at once.
    Latents are held whole, because the first convolution takes all of them. ``workspace`` says
    whether the workspaces of convolutions are counted.
    """
    tape = Tape(workspace)
    latents = [
        Map(tape, batch, shape.z_dim, latent_frames, latent_height, latent_width, size)
        for _ in range(2)
    ]
    cache = _Cache()
    for index in range(min(latent_frames, CHUNKS)):
        cache.index = 0
        chunk = _decode_chunk(latents[0].like(t=1), shape, cache, first=index == 0)
        # The pixels are scaled to 0..1 and copied out as float32 while the chunk is still alive.
        scaled = chunk.like()
        scaled = scaled.like()
        chunk = scaled.like(size=FP32)
        del scaled, chunk
    tape.during(*latents)
    return tape.peak


@lru_cache(maxsize=256)
def encode_peak(
    shape: VaeShape, *, batch: int, num_frames: int, height: int, width: int, size: int,
    workspace: bool = True,
) -> int:  # fmt: skip
    """Return the peak bytes of the streamed encode of (num_frames, height, width) pixels.

    One chunk of the video is on the device at a time; encoded chunks stay there. ``size`` is the
    bytes per number of the VAE's dtype. ``workspace`` says whether the workspaces of convolutions
    are counted.
    """
    tape = Tape(workspace)
    cache = _Cache()
    pieces: list[Map] = []
    patch = shape.patch_size or 1
    for index in range(min(1 + (num_frames - 1) // 4, CHUNKS)):
        cache.index = 0
        x = Map(tape, batch, shape.in_channels // patch**2, 4 if index else 1, height, width, size)
        if patch > 1:
            x = x.like(c=shape.in_channels, h=height // patch, w=width // patch)
        pieces.append(_encode_chunk(x, shape, cache))
    return tape.peak


def leaving_bytes(batch: int, height: int, width: int, size: int) -> int:
    """Return the page-locked RAM through which decoded pictures leave a card.

    One chunk at a time does, its numbers being of ``size`` bytes, but torch keeps that of the first
    chunk, a single frame, beside that of the others. Its allocator of page-locked memory rounds up
    to powers of two.
    """
    picture = batch * height * width * 3 * size
    return sum(1 << (frames * picture - 1).bit_length() for frames in (1, 4))


def heap_gaps(activations: int) -> int:
    """Return what maps of so many bytes take beyond them where they lie in the RAM's heap."""
    return min(activations, _HEAP_GAPS)
