"""The lean decoder of Wan's VAE: less activation memory, the same bits.

For each convolution diffusers holds the input, a copy joined with the cached frames and a padded
copy of that, and for each norm up to four feature maps. The lean decoder writes normalised frames
straight into the one padded buffer that the convolution reads. It drops references before the
convolution where it can, computes sums, SiLU and the shortcuts of the 2.2 VAE in place, and makes
a cache entry only when the input of its convolution is gone. Every convolution reads the same
input as in diffusers, so the result has the same bits. Most of the memory that remains is the
feature cache: two frames for each convolution.

``bands`` > 1 goes further and runs each convolution on bands of rows. A band is read with one more
row above and below, so the arithmetic is the same and no seams are blended, but rounding may
differ on some devices. The feature cache can be kept in RAM meanwhile (``host_cache``), from where
rows return when they are needed.

The computation follows diffusers' ``autoencoder_kl_wan.py`` (0.35 to 0.42, see ``sources``).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forward import norms_widen
from ..kernels import FusedNorms
from ..memory import Strip
from .decoder_quick import Quick, empty
from .host_cache import HISTORY, HostCache, HostEntry, frames_known
from .upsampling import add_duplicated, double, doubled_band

_REPEAT = "Rep"  # diffusers' marker: this upsampler has seen only the first frame
_HALF = (torch.float16, torch.bfloat16)
_EPSILON = 1e-12  # the default of torch.nn.functional.normalize


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How a lean decode divides its work: into ``bands`` of rows; 1 does not divide it."""

    bands: int = 1
    host: HostCache | None = None
    """Where the feature cache is kept between uses; None: on the device."""
    quick: Quick | None = None
    """What is used to be faster, with other rounding; None: nothing. Bands are not made faster."""
    strip: Strip | None = None
    """The part of the picture that is decoded; None: all of it."""
    norms: FusedNorms | None = None
    """Which norms are computed in fewer passes, with the same bits; None: nothing is fused."""


class DecoderWalk:
    """One call of the decoder, layer by layer.

    Feature maps are (B, C, T, H, W). ``slots`` is the feature cache with one entry per causal
    convolution, ``index`` a list with the number of the next slot (diffusers' ``feat_cache`` and
    ``feat_idx``). Maps are passed between methods in the list ``held``: a method that consumes its
    input pops it from there, so that no variable of the caller keeps it alive.
    """

    def __init__(self, options: DecodeOptions, slots: list[Any], index: list[int]) -> None:
        self._options, self._slots, self._index = options, slots, index
        self._quick = options.quick if options.bands == 1 else None
        self._strip, self._low = options.strip, 0
        self._norms = options.norms

    def through(self, decoder: Any, x: Tensor, first_chunk: bool = False) -> Tensor:
        """Return the decoder's output for one latent frame."""
        # From here on only the list refers to the map, see above.
        held = [x]
        del x
        held.append(self._convolve(decoder.conv_in, held))
        self._middle(decoder.mid_block, held)
        if self._strip is not None:
            held[0] = self._cut(held[0], self._strip.begins)
            self._low = self._strip.begins[0]
        for level, block in enumerate(decoder.up_blocks):
            self._level(block, held, first_chunk, level)
        out = self._convolve(decoder.conv_out, held, decoder.norm_out)
        return out if self._strip is None else self._cut(out, self._strip.keeps[-1])

    def _cut(self, x: Tensor, kept: tuple[int, int]) -> Tensor:
        """Return a view of what a strip keeps of its map; ``kept`` is counted from the plane's."""
        assert self._strip is not None
        return x.narrow(self._strip.axis, kept[0] - self._low, kept[1] - kept[0])

    def _middle(self, middle: Any, held: list[Tensor]) -> None:
        self._residual(middle.resnets[0], held)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            held.append(attention(held.pop()))
            self._residual(resnet, held)

    def _level(self, block: Any, held: list[Tensor], first: bool, level: int) -> None:
        shortcut = getattr(block, "avg_shortcut", None)  # 2.2 only
        # The shortcut reads the level's input at the end. The input is shared, not copied as in
        # diffusers, so the first residual block must not overwrite it.
        kept = held[0] if shortcut is not None else None
        for resnet in block.resnets:
            self._residual(resnet, held, writable=held[0] is not kept)
        samplers = getattr(block, "upsamplers", None) or [getattr(block, "upsampler", None)]
        if samplers[0] is not None:
            if self._strip is not None:
                # What the edges have made wrong is left out as soon as it is not needed: the
                # upsampling copies its input anyway.
                low, high = self._strip.keeps[level]
                held[0] = self._cut(held[0], (low, high))
                kept = None if kept is None else self._cut(kept, (low, high))
                self._low = 2 * low
            self._upsample(samplers[0], held)
        if kept is not None:
            add_duplicated(held[0], kept, shortcut, first, fuse=self._norms is not None)

    # ------------------------------------------------------------------ residual blocks

    def _residual(self, block: Any, held: list[Tensor], *, writable: bool = True) -> None:
        plain = isinstance(block.conv_shortcut, nn.Identity)
        if self._options.bands > 1:
            self._residual_by_bands(block, held, plain=plain, writable=writable)
            return
        x = held.pop()
        shortcut = x if plain else _apply(block.conv_shortcut, x)
        # Slots are numbered in the order in which diffusers' code reaches the convolutions.
        first, second = self._next_slot(), self._next_slot()
        # Where the block adds x itself at the end, the norm must not overwrite it.
        padded, count = self._whole(block.conv1, x, first, block.norm1, writable and not plain)
        if not plain:
            del x  # the shortcut has been computed: nothing needs the input any more
        y = _apply(block.conv1, padded)
        if plain:
            # Equal widths: both convolutions can use one padded buffer. The order matters. The
            # frames that the first slot will hold are taken out (copied where the next line would
            # overwrite them), then the second slot's frames move into the buffer, which frees
            # their memory, and only then the first slot's new entry is allocated.
            inside = _inside(block.conv1, padded)
            last = inside[:, :, -count:]
            last = last.clone() if y.shape[2] < HISTORY else last
            count = self._load(second, inside)
            self._keep(first, last)
            self._activate_into(block.norm2, y, inside[:, :, HISTORY:], writable=True)
            del last
        else:
            # Another width needs another buffer: release this one before it is made.
            self._keep_last(first, block.conv1, padded, count)
            del padded
            padded, count = self._whole(block.conv2, y, second, block.norm2, writable=True)
        x = shortcut
        del shortcut, y
        y = _apply(block.conv2, padded).add_(x)
        del x
        self._keep_last(second, block.conv2, padded, count)
        held.append(y)

    def _residual_by_bands(
        self, block: Any, held: list[Tensor], *, plain: bool, writable: bool
    ) -> None:
        x = held.pop()
        if plain:
            result = x if writable else x.clone()
        else:
            result = x.new_empty(x.shape[0], block.conv_shortcut.out_channels, *x.shape[2:])
            for rows in self._bands(x.shape[3]):
                result[..., rows, :] = _apply(block.conv_shortcut, x[..., rows, :])
        y = self._by_bands(block.conv1, x, block.norm1)
        del x
        # The second convolution adds to the shortcut band by band; its own map is never whole.
        self._by_bands(block.conv2, y, block.norm2, add_to=result)
        held.append(result)

    # --------------------------------------------------------------------- convolutions

    def _convolve(self, conv: Any, held: list[Tensor], norm: Any = None) -> Tensor:
        x = held.pop()
        if self._options.bands > 1:
            return self._by_bands(conv, x, norm)
        slot = self._next_slot()
        padded, count = self._whole(conv, x, slot, norm, writable=norm is not None)
        del x
        y = _apply(conv, padded)
        self._keep_last(slot, conv, padded, count)
        return y

    def _by_bands(
        self, conv: Any, source: Tensor, norm: Any = None, add_to: Tensor | None = None
    ) -> Tensor:
        """Convolve band by band; return a new map, or add the result to ``add_to``."""
        slot = self._next_slot()
        batch, _, frames, height, width = source.shape
        out = add_to
        if out is None:
            out = source.new_empty(batch, conv.out_channels, frames, height, width)
        previous = self._slots[slot]
        kept = self._entry(slot, source)
        edge = None
        for rows in self._bands(height):
            padded, inside, used = _buffer(conv, source, rows)
            _write_history(inside, previous, used)
            # In RAM the new entry overwrites the old one in place, and the band before has
            # already replaced the rows just above this band. Put their old values back.
            if kept is previous:
                edge = _mend_edge(inside[:, :, :HISTORY], edge, rows, used)
            self._activate_band(norm, source[:, :, :, used], inside[:, :, HISTORY:])
            # This band's rows of the last frames go to the cache before the buffer is released.
            _put(kept, rows, _inside(conv, padded))
            del inside
            piece = _apply(conv, padded)
            del padded
            if add_to is None:
                out[..., rows, :] = piece
            else:
                out[..., rows, :].add_(piece)
            del piece
        self._slots[slot] = kept
        return out

    def _entry(self, slot: int, source: Tensor) -> Tensor | HostEntry:
        """Return the cache entry that the bands write their last frames to.

        In RAM it is the very entry that they read; on the device it is a new one.
        """
        if self._options.host is not None:
            return self._options.host.entry(self._slots, slot, source)
        batch, channels, frames, height, width = source.shape
        count = min(HISTORY, frames + _known(self._slots[slot]))
        return source.new_empty(batch, channels, count, height, width)

    def _bands(self, height: int) -> list[slice]:
        count = min(self._options.bands, height)
        edges = [height * i // count for i in range(count + 1)]
        return [slice(a, b) for a, b in pairwise(edges)]

    # ---------------------------------------------------------------------------- cache

    def _next_slot(self) -> int:
        slot = self._index[0]
        self._index[0] += 1
        return slot

    def _whole(
        self, conv: Any, source: Tensor, slot: int, norm: Any, writable: bool
    ) -> tuple[Tensor, int]:
        """Return the padded input of ``conv``, and how many of its frames its slot gets next.

        ``writable`` allows the norm to overwrite ``source``.
        """
        padded, inside, _ = _buffer(conv, source, slice(0, source.shape[3]), self._quick)
        count = self._load(slot, inside)
        self._activate_into(norm, source, inside[:, :, HISTORY:], writable=writable)
        return padded, count

    def _activate_into(self, norm: Any, source: Tensor, out: Tensor, *, writable: bool) -> None:
        """Write ``silu(norm(source))``, or the source if there is no norm, to ``out``."""
        if norm is None:
            out.copy_(source)
        elif self._quick is not None and self._quick.activate(norm, source, out):
            return
        elif self._norms is None or not self._norms.activate(norm, source, out):
            out.copy_(_activated(norm, source, source if writable else None))

    def _activate_band(self, norm: Any, source: Tensor, out: Tensor) -> None:
        """Do ``_activate_into`` without another map; rounding may differ."""
        fused = None if norm is None else self._norms
        if fused is not None and fused.activate(norm, source, out):
            return
        for index in range(source.shape[2]):
            frame = slice(index, index + 1)
            _activate(norm, source[:, :, frame], out[:, :, frame])

    def _load(self, slot: int, inside: Tensor) -> int:
        """Move a slot's frames to the front of a buffer; return how many the slot gets next."""
        previous = self._slots[slot]
        self._slots[slot] = None  # so that the frames are freed once they are in the buffer
        _write_history(inside, previous, slice(None))
        return min(HISTORY, inside.shape[2] - HISTORY + _known(previous))

    def _keep_last(self, slot: int, conv: Any, padded: Tensor, count: int) -> None:
        self._keep(slot, _inside(conv, padded)[:, :, -count:])

    def _keep(self, slot: int, frames: Tensor) -> None:
        host = self._options.host
        if host is None:
            # A copy of its own: a view would keep the whole padded buffer alive.
            kept = empty(frames, frames.shape, self._quick)
            self._slots[slot] = kept.copy_(frames)
        else:
            self._slots[slot] = entry = host.entry(self._slots, slot, frames)
            entry.write(slice(None), frames)

    # ----------------------------------------------------------------------- upsampling

    def _upsample(self, sampler: Any, held: list[Tensor]) -> None:
        if sampler.mode == "upsample3d":
            self._upsample_time(sampler.time_conv, held)
        x = held.pop()
        conv = sampler.resample[1]
        batch, channels, frames, height, width = x.shape
        size = (conv.out_channels, 2 * height, 2 * width)
        if self._options.bands > 1:
            out = x.new_empty(batch, frames, *size)
            for rows in self._bands(height):
                piece = F.conv2d(doubled_band(x, rows), conv.weight, conv.bias)
                fine = slice(2 * rows.start, 2 * rows.stop)
                out[..., fine, :] = piece.view(batch, frames, size[0], -1, size[2])
                del piece
        else:
            large = empty(x, (batch * frames, channels, 2 * height, 2 * width), self._quick)
            double(x, large.view(batch, frames, channels, 2 * height, 2 * width))
            del x
            out = conv(large).view(batch, frames, *size)
        held.append(out.transpose(1, 2))

    def _upsample_time(self, conv: Any, held: list[Tensor]) -> None:
        """Double the frames in time, except for the first frame of the clip."""
        slot = self._index[0]
        if self._slots[slot] is None:
            self._slots[slot] = _REPEAT
            self._index[0] += 1
            return
        both = self._convolve(conv, held)
        batch, channels, frames, height, width = both.shape
        x = empty(both, (batch, channels // 2, 2 * frames, height, width), self._quick)
        x[:, :, 0::2] = both[:, : channels // 2]
        x[:, :, 1::2] = both[:, channels // 2 :]
        held.append(x)


def _apply(conv: Any, padded: Tensor) -> Tensor:
    return F.conv3d(padded, conv.weight, conv.bias)


def _known(previous: Any) -> int:
    """Return how many frames a slot adds to its next entry; the marker counts as one of zeros."""
    return 1 if isinstance(previous, str) else frames_known(previous)


def _inside(conv: Any, padded: Tensor) -> Tensor:
    margin = conv._padding[0]
    return padded[..., margin : padded.shape[3] - margin, margin : padded.shape[4] - margin]


def _buffer(
    conv: Any, source: Tensor, rows: slice, quick: Quick | None = None
) -> tuple[Tensor, Tensor, slice]:
    """Allocate the input of ``conv`` for some output rows, zeroing the borders that pad it.

    There is space for two frames of history in front. Returns the buffer, a view of it without
    the borders, and the rows of the source that belong there.
    """
    batch, channels, frames, height, width = source.shape
    margin = conv._padding[0]
    low, high = max(0, rows.start - margin), min(height, rows.stop + margin)
    above, below = margin - (rows.start - low), margin - (high - rows.stop)
    size = (rows.stop - rows.start + 2 * margin, width + 2 * margin)
    padded = empty(source, (batch, channels, HISTORY + frames, *size), quick)
    for border in (padded[..., :above, :], padded[..., size[0] - below :, :]):
        border.zero_()
    for border in (padded[..., :margin], padded[..., size[1] - margin :]):
        border.zero_()
    inside = padded[..., above : size[0] - below, margin : size[1] - margin]
    return padded, inside, slice(low, high)


def _write_history(inside: Tensor, previous: Any, rows: slice) -> None:
    known = frames_known(previous)
    inside[:, :, : HISTORY - known].zero_()
    if isinstance(previous, HostEntry):
        previous.read(rows, inside[:, :, :HISTORY])
    elif known:
        inside[:, :, HISTORY - known : HISTORY].copy_(previous[..., rows, :])


def _mend_edge(history: Tensor, edge: Tensor | None, rows: slice, used: slice) -> Tensor:
    """Restore the rows above a band in its history; return those the next band will need.

    ``edge`` holds these rows as they were before the band above overwrote them.
    """
    if edge is not None:
        history[..., : edge.shape[3], :].copy_(edge)
    below = used.stop - rows.stop  # the margin: the next band looks as many rows upwards
    end = rows.stop - used.start
    return history[..., end - below : end, :].clone()


def _put(kept: Tensor | HostEntry, rows: slice, inside: Tensor) -> None:
    if isinstance(kept, HostEntry):
        kept.write(rows, inside[:, :, -HISTORY:])
    else:
        kept[..., rows, :] = inside[:, :, -kept.shape[2] :]


def _activate(norm: Any, x: Tensor, out: Tensor) -> None:
    """Write ``silu(norm(x))`` to ``out``, or x itself if there is no norm."""
    if norm is None:
        out.copy_(x)
        return
    _normalize(norm, x, out)
    F.silu(out, inplace=True)


def _activated(norm: Any, x: Tensor, out: Tensor | None) -> Tensor:
    """Return ``silu(norm(x))`` of a whole map: the norm frame by frame, SiLU at once.

    It is written to ``out``, which may be x, or to a new tensor.

    CPUs compute SiLU in vectors, but the last few numbers of a tensor one by one and with other
    rounding. Frame by frame, such numbers would be elsewhere than in diffusers. On CUDA the order
    in which a pixel's channels are added depends on how many pixels there are: there the sums are
    those of the whole map too.
    """
    sums = None
    if x.is_cuda:
        kind = torch.float32 if _widened(x) else x.dtype  # aten widens as it reads, without a copy
        sums = x.norm(2.0, dim=1, keepdim=True, dtype=kind)
    out = torch.empty_like(x) if out is None else out
    for index in range(x.shape[2]):
        frame = slice(index, index + 1)
        length = None if sums is None else sums[:, :, frame]
        _normalize(norm, x[:, :, frame], out[:, :, frame], length)
    return F.silu(out, inplace=True)


def _widened(x: Tensor) -> bool:
    return x.dtype in _HALF and norms_widen()


def _normalize(norm: Any, x: Tensor, out: Tensor, length: Tensor | None = None) -> None:
    """Apply the operations of ``WanRMS_norm``, in their order; ``out`` may be x.

    ``length`` is that of each pixel over the channels, if it is known; it is overwritten.
    """
    wide = x.float() if _widened(x) else x
    length = wide.norm(2.0, dim=1, keepdim=True) if length is None else length
    length = length.clamp_min_(_EPSILON)
    if wide is x:
        torch.div(x, length, out=out)
    else:
        out.copy_(wide.div_(length))
    out.mul_(norm.scale).mul_(norm.gamma).add_(norm.bias)
