"""A decode for Wan's VAE that keeps less alive, with equal bits.

diffusers holds, for each convolution, its input, a copy joined with the cached frames and a padded
copy of that, and up to four maps for each norm. Here frames are normalised straight into the one
padded buffer that the convolution reads; names are let go before the convolution where they can
be; sums, SiLU and the 2.2 VAE's shortcuts happen in place; a cache entry is made once its
convolution's input is gone. Every convolution gets the input it gets from diffusers, so the bits
are the same. What is left is mostly the feature cache: two frames for each convolution.

A further rung, ``bands``, runs each convolution by bands of rows: the same arithmetic with one
row more on either side, no blended seams, but rounding may differ on some devices. It also rests
the feature cache in RAM, from where rows come back as they are needed.

Computation after diffusers' ``autoencoder_kl_wan.py`` (0.42).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .host_cache import HISTORY, HostCache, HostEntry, frames_known

_REPEAT = "Rep"  # diffusers' mark of an upsampler that has seen the first frame only
_HALF = (torch.float16, torch.bfloat16)
_EPSILON = 1e-12  # of torch.nn.functional.normalize


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How a lean decode cuts its work: ``bands`` of rows (1: not at all), and where caches rest."""

    bands: int = 1
    host: HostCache | None = None
    """Where the feature cache rests; None: on the device."""


class DecoderWalk:
    """One call of the decoder on its way through the layers.

    Maps are (B, C, T, H, W). A method that consumes its input takes it out of the list ``held``,
    so that the caller's name does not keep it alive.
    """

    def __init__(self, options: DecodeOptions, slots: list[Any], index: list[int]) -> None:
        self._options, self._slots, self._index = options, slots, index

    def through(self, decoder: Any, x: Tensor, first: bool) -> Tensor:
        """Return the decoder's output for one latent frame."""
        held = [x]
        del x
        held.append(self._convolve(decoder.conv_in, held))
        middle = decoder.mid_block
        self._residual(middle.resnets[0], held)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            held.append(attention(held.pop()))
            self._residual(resnet, held)
        for block in decoder.up_blocks:
            self._level(block, held, first)
        return self._convolve(decoder.conv_out, held, decoder.norm_out)

    def _level(self, block: Any, held: list[Tensor], first: bool) -> None:
        shortcut = getattr(block, "avg_shortcut", None)  # 2.2 only
        kept = held[0] if shortcut is not None else None
        for resnet in block.resnets:
            self._residual(resnet, held, writable=held[0] is not kept)
        samplers = getattr(block, "upsamplers", None) or [getattr(block, "upsampler", None)]
        if samplers[0] is not None:
            self._upsample(samplers[0], held)
        if kept is not None:
            _add_duplicated(held[0], kept, shortcut, first)

    # ------------------------------------------------------------------ residual blocks

    def _residual(self, block: Any, held: list[Tensor], *, writable: bool = True) -> None:
        plain = isinstance(block.conv_shortcut, nn.Identity)
        if self._options.bands > 1:
            self._residual_by_bands(block, held, plain=plain, writable=writable)
            return
        x = held.pop()
        shortcut = x if plain else _apply(block.conv_shortcut, x)
        first, second = self._next_slot(), self._next_slot()
        padded, count = self._whole(block.conv1, x, first, block.norm1, writable and not plain)
        if not plain:
            del x
        y = _apply(block.conv1, padded)
        if plain:
            # Both convolutions share the buffer; what the second one's slot holds moves there
            # before the first one's new entry is made.
            inside = _inside(block.conv1, padded)
            last = inside[:, :, -count:]
            last = last.clone() if y.shape[2] < HISTORY else last
            count = self._load(second, inside)
            self._keep(first, last)
            inside[:, :, HISTORY:].copy_(_activated(block.norm2, y, y))
            del last
        else:
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
        """Convolve band by band; into a new map, or added to one that is there."""
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
            if kept is previous:  # the band before took the place of rows this one looks at
                edge = _mend_edge(inside[:, :, :HISTORY], edge, rows, used)
            for index in range(frames):
                frame, at = slice(index, index + 1), slice(HISTORY + index, HISTORY + index + 1)
                _activate(norm, source[:, :, frame, used], inside[:, :, at])
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
        """Return what the bands' last frames are written to: on the host, what is read as well."""
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
        """Return the padded input of ``conv``, and how many of its frames the next cache takes."""
        padded, inside, _ = _buffer(conv, source, slice(0, source.shape[3]))
        count = self._load(slot, inside)
        if norm is not None:
            source = _activated(norm, source, source if writable else None)
        inside[:, :, HISTORY:].copy_(source)
        return padded, count

    def _load(self, slot: int, inside: Tensor) -> int:
        """Move a slot's frames to the front of a buffer; return how many the slot gets next."""
        previous = self._slots[slot]
        self._slots[slot] = None
        _write_history(inside, previous, slice(None))
        return min(HISTORY, inside.shape[2] - HISTORY + _known(previous))

    def _keep_last(self, slot: int, conv: Any, padded: Tensor, count: int) -> None:
        self._keep(slot, _inside(conv, padded)[:, :, -count:])

    def _keep(self, slot: int, frames: Tensor) -> None:
        host = self._options.host
        if host is None:
            kept = torch.empty(frames.shape, dtype=frames.dtype, device=frames.device)
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
                piece = F.conv2d(_doubled_band(x, rows), conv.weight, conv.bias)
                fine = slice(2 * rows.start, 2 * rows.stop)
                out[..., fine, :] = piece.view(batch, frames, size[0], -1, size[2])
                del piece
        else:
            large = x.new_empty(batch * frames, channels, 2 * height, 2 * width)
            _double(x, large.view(batch, frames, channels, 2 * height, 2 * width))
            del x
            out = conv(large).view(batch, frames, *size)
        held.append(out.transpose(1, 2))

    def _upsample_time(self, conv: Any, held: list[Tensor]) -> None:
        """Twice the frames, but for the clip's first one."""
        slot = self._index[0]
        if self._slots[slot] is None:
            self._slots[slot] = _REPEAT
            self._index[0] += 1
            return
        both = self._convolve(conv, held)
        batch, channels, frames, height, width = both.shape
        x = both.new_empty(batch, channels // 2, 2 * frames, height, width)
        x[:, :, 0::2] = both[:, : channels // 2]
        x[:, :, 1::2] = both[:, channels // 2 :]
        held.append(x)


def _apply(conv: Any, padded: Tensor) -> Tensor:
    return F.conv3d(padded, conv.weight, conv.bias)


def _known(previous: Any) -> int:
    """Frames a slot gives to the next cache: a mark stands for one frame of zeros."""
    return 1 if isinstance(previous, str) else frames_known(previous)


def _inside(conv: Any, padded: Tensor) -> Tensor:
    margin = conv._padding[0]
    return padded[..., margin : padded.shape[3] - margin, margin : padded.shape[4] - margin]


def _buffer(conv: Any, source: Tensor, rows: slice) -> tuple[Tensor, Tensor, slice]:
    """Make the input of ``conv`` for some output rows, with zeros around and two frames in front.

    Returns the buffer, its part without the zeros, and the rows of the source that go there.
    """
    batch, channels, frames, height, width = source.shape
    margin = conv._padding[0]
    low, high = max(0, rows.start - margin), min(height, rows.stop + margin)
    above, below = margin - (rows.start - low), margin - (high - rows.stop)
    size = (rows.stop - rows.start + 2 * margin, width + 2 * margin)
    padded = source.new_empty(batch, channels, HISTORY + frames, *size)
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
    """Put ``edge``, rows above the band as they were, into its history; return the next edge."""
    if edge is not None:
        history[..., : edge.shape[3], :].copy_(edge)
    below = used.stop - rows.stop  # as many rows of the next band lie above it
    end = rows.stop - used.start
    return history[..., end - below : end, :].clone()


def _put(kept: Tensor | HostEntry, rows: slice, inside: Tensor) -> None:
    if isinstance(kept, HostEntry):
        kept.write(rows, inside[:, :, -HISTORY:])
    else:
        kept[..., rows, :] = inside[:, :, -kept.shape[2] :]


def _activate(norm: Any, x: Tensor, out: Tensor) -> None:
    """Write ``silu(norm(x))`` to ``out``; without a norm, x itself."""
    if norm is None:
        out.copy_(x)
        return
    _normalize(norm, x, out)
    F.silu(out, inplace=True)


def _activated(norm: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``silu(norm(x))`` of a whole map, frame by frame but for SiLU.

    CPUs compute SiLU by vectors, but its last few numbers one by one, with other rounding.
    """
    out = torch.empty_like(x) if out is None else out
    for index in range(x.shape[2]):
        frame = slice(index, index + 1)
        _normalize(norm, x[:, :, frame], out[:, :, frame])
    return F.silu(out, inplace=True)


def _normalize(norm: Any, x: Tensor, out: Tensor) -> None:
    """The operations of ``WanRMS_norm`` in their order, in ``out``, which may be x."""
    wide = x.float() if x.dtype in _HALF else x
    length = wide.norm(2.0, dim=1, keepdim=True).clamp_min_(_EPSILON)
    if wide is x:
        torch.div(x, length, out=out)
    else:
        out.copy_(wide.div_(length))
    out.mul_(norm.scale).mul_(norm.gamma).add_(norm.bias)


def _double(x: Tensor, out: Tensor) -> None:
    """Write (B, C, T, H, W), each number as 2 x 2, to ``out`` (B, T, C, 2H, 2W)."""
    fine = out.view(*out.shape[:3], out.shape[3] // 2, 2, out.shape[4] // 2, 2)
    fine.copy_(x.transpose(1, 2)[:, :, :, :, None, :, None])


def _doubled_band(x: Tensor, rows: slice) -> Tensor:
    """Return the doubled ``rows`` of x, (B*T, C, 2 rows + 2, 2W + 2), with what lies around."""
    batch, channels, frames, height, width = x.shape
    size = (2 * (rows.stop - rows.start) + 2, 2 * width + 2)
    out = x.new_empty(batch, frames, channels, *size)
    for border in (out[..., :1], out[..., -1:], out[..., :1, :], out[..., -1:, :]):
        border.zero_()
    _double(x[:, :, :, rows], out[..., 1:-1, 1:-1])
    for row, at in ((rows.start - 1, 0), (rows.stop, size[0] - 1)):
        if 0 <= row < height:
            fine = out[..., at, 1:-1].view(batch, frames, channels, width, 2)
            fine.copy_(x[:, :, :, row].transpose(1, 2)[..., None])
    return out.flatten(0, 1)


def _add_duplicated(y: Tensor, x: Tensor, shortcut: Any, first: bool) -> None:
    """Add ``DupUp3D(x)`` to y: number (a, i, j) of each cell is a channel of x, found by index."""
    times, space = shortcut.factor_t, shortcut.factor_s
    outputs = torch.arange(shortcut.out_channels, device=x.device) * shortcut.factor
    skipped = times - 1 if first else 0
    for a, i, j in product(range(times), range(space), range(space)):
        channels = (outputs + (a * space + i) * space + j) // shortcut.repeats
        for frame in range(x.shape[2]):
            at = frame * times + a - skipped
            if at >= 0:
                y[:, :, at, i::space, j::space].add_(x[:, :, frame].index_select(1, channels))
