"""What a VAE does to whole feature maps, in one pass on CUDA, with the bits of torch.

``scaled_silu`` is what comes after the sums of a norm, which are aten's own; ``duplicated`` is the
shortcut that VAE 2.2 has around a level. Both are elementwise, and rounded where aten rounds: each
operation to the map's dtype, divisions and the exponential as aten's kernels compute them
(``div.rn`` and CUDA's ``expf``), nothing contracted. Whether the bits are torch's is found out by
``maps`` before anything here is used. Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

_BLOCK = 1024
"""Pixels of a program."""
_CHANNELS = 8
"""Channels of a program, which divides all of them by the same lengths."""


def scaled_silu(
    source: Tensor, lengths: Tensor, gamma: Tensor, scale: float, floor: float, out: Tensor
) -> None:
    """Write silu(source / max(lengths, ``floor``) * ``scale`` * ``gamma`` + 0) to ``out``.

    ``source`` and ``out`` are (B, C, T, H, W) of any strides; ``out`` may be ``source``.
    ``lengths`` is (B, 1, T, H, W) in float32, ``gamma`` has C numbers.
    """
    batch, channels, frames, height, width = source.shape
    blocks = triton.cdiv(height * width, _BLOCK)
    with torch.cuda.device_of(source):
        _scaled_silu_kernel[(blocks, triton.cdiv(channels, _CHANNELS), batch * frames)](
            source, lengths, gamma, out, scale, floor, channels, frames, height * width, width,
            *source.stride(), *(lengths.stride(i) for i in (0, 2, 3, 4)), *out.stride(),
            BLOCK=_BLOCK, CHANNELS=_CHANNELS, CUDA=source.is_cuda, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


# No number is a special case: nothing is compiled anew for another size.
_NUMBERS = (
    "channels", "frames", "pixels", "width",
    "from_batch", "from_channel", "from_frame", "from_row", "from_column",
    "length_batch", "length_frame", "length_row", "length_column",
    "to_batch", "to_channel", "to_frame", "to_row", "to_column",
)  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def _scaled_silu_kernel(
    source, lengths, gamma, out, scale, floor, channels, frames, pixels, width,
    from_batch, from_channel, from_frame, from_row, from_column,
    length_batch, length_frame, length_row, length_column,
    to_batch, to_channel, to_frame, to_row, to_column,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    row = (at // width).to(tl.int64)
    column = (at % width).to(tl.int64)
    batch = (tl.program_id(2) // frames).to(tl.int64)
    frame = (tl.program_id(2) % frames).to(tl.int64)
    read = source + batch * from_batch + frame * from_frame
    read += row * from_row + column * from_column
    write = out + batch * to_batch + frame * to_frame
    write += row * to_row + column * to_column
    length = lengths + batch * length_batch + frame * length_frame
    length += row * length_row + column * length_column
    kind = source.dtype.element_ty
    divisor = tl.load(length, mask=inside, other=1.0)
    divisor = tl.maximum(divisor, floor, propagate_nan=tl.PropagateNan.ALL)
    first = tl.program_id(1) * CHANNELS
    read += first.to(tl.int64) * from_channel
    write += first.to(tl.int64) * to_channel
    for channel in range(CHANNELS):
        here = inside & (first + channel < channels)
        value = tl.load(read, mask=here, other=0.0)
        value = tl.div_rn(value.to(tl.float32), divisor).to(kind).to(tl.float32)
        value = (value * scale).to(kind).to(tl.float32)
        factor = tl.load(gamma + first + channel, mask=first + channel < channels, other=0.0)
        value = (value * factor.to(tl.float32)).to(kind).to(tl.float32)
        value = value + 0.0  # the norm's bias: it takes the sign off a zero
        # Triton's interpreter has no libdevice.
        power = libdevice.exp(-value) if CUDA else tl.exp(-value)
        value = tl.div_rn(value, 1.0 + power)
        tl.store(write, value.to(kind), mask=here)
        read += from_channel
        write += to_channel


def duplicated(y: Tensor, x: Tensor, repeats: int, times: int, space: int, skipped: int) -> None:
    """Add to ``y`` what ``DupUp3D`` makes of ``x``, but for its first ``skipped`` frames.

    ``x`` is (B, C, T, H, W), ``y`` (B, C', T * times - skipped, H * space, W * space), both of any
    strides: channels or pixels lie side by side.
    """
    batch, channels, frames, height, width = y.shape
    last = y.stride(1) == 1
    pixels, block = (16, 64) if last else (256, 4)
    grid = (triton.cdiv(height * width, pixels), triton.cdiv(channels, block), batch * frames)
    with torch.cuda.device_of(y):
        _duplicated_kernel[grid](
            y, x, channels, frames, skipped, height * width, width, *y.stride(), *x.stride(),
            REPEATS=repeats, TIMES=times, SPACE=space, PIXELS=pixels, CHANNELS=block, LAST=last,
            num_warps=4,
        )  # fmt: skip


_SIZES = (
    "channels", "frames", "skipped", "pixels", "width",
    "y_batch", "y_channel", "y_frame", "y_row", "y_column",
    "x_batch", "x_channel", "x_frame", "x_row", "x_column",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _duplicated_kernel(
    y, x, channels, frames, skipped, pixels, width,
    y_batch, y_channel, y_frame, y_row, y_column,
    x_batch, x_channel, x_frame, x_row, x_column,
    REPEATS: tl.constexpr, TIMES: tl.constexpr, SPACE: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    # Neighbours in memory are the last dimension, over which threads lie.
    at = at[:, None] if LAST else at[None, :]
    channel = channel[None, :] if LAST else channel[:, None]
    inside = (at < pixels) & (channel < channels)
    row, column = at // width, at % width
    batch = (tl.program_id(2) // frames).to(tl.int64)
    frame = tl.program_id(2) % frames
    moment = frame + skipped
    cell = ((moment % TIMES) * SPACE + row % SPACE) * SPACE + column % SPACE
    source = (channel * (TIMES * SPACE * SPACE) + cell) // REPEATS
    read = x + batch * x_batch + (moment // TIMES).to(tl.int64) * x_frame
    read += source.to(tl.int64) * x_channel
    read += (row // SPACE).to(tl.int64) * x_row + (column // SPACE).to(tl.int64) * x_column
    write = y + batch * y_batch + frame.to(tl.int64) * y_frame + channel.to(tl.int64) * y_channel
    write += row.to(tl.int64) * y_row + column.to(tl.int64) * y_column
    value = tl.load(write, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(read, mask=inside, other=0.0).to(tl.float32)
    tl.store(write, value.to(y.dtype.element_ty), mask=inside)
