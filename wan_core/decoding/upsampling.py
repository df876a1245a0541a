"""Maps made larger: pixels doubled for the convolution of a level, and the shortcut of VAE 2.2.

Each writes where its numbers are needed, so that no larger map is made beside.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..kernels import fused_duplicates


def double(x: Tensor, out: Tensor) -> None:
    """Upsample (B, C, T, H, W) to the nearest pixel, 2 x 2, into ``out`` (B, T, C, 2H, 2W)."""
    fine = out.view(*out.shape[:3], out.shape[3] // 2, 2, out.shape[4] // 2, 2)
    fine.copy_(x.transpose(1, 2)[:, :, :, :, None, :, None])


def doubled_band(x: Tensor, rows: slice) -> Tensor:
    """Return the upsampled ``rows`` of x with a margin of one pixel, (B*T, C, 2 rows + 2, 2W + 2).

    The margin holds the neighbouring rows, and zeros outside the picture.
    """
    batch, channels, frames, height, width = x.shape
    size = (2 * (rows.stop - rows.start) + 2, 2 * width + 2)
    out = x.new_empty(batch, frames, channels, *size)
    for border in (out[..., :1], out[..., -1:], out[..., :1, :], out[..., -1:, :]):
        border.zero_()
    double(x[:, :, :, rows], out[..., 1:-1, 1:-1])
    for row, at in ((rows.start - 1, 0), (rows.stop, size[0] - 1)):
        if 0 <= row < height:
            fine = out[..., at, 1:-1].view(batch, frames, channels, width, 2)
            fine.copy_(x[:, :, :, row].transpose(1, 2)[..., None])
    return out.flatten(0, 1)


def add_duplicated(y: Tensor, x: Tensor, shortcut: Any, first: bool, *, fuse: bool) -> None:
    """Add ``DupUp3D(x)`` to y in place, without making the upsampled map.

    DupUp3D turns channels into cells of (time, height, width); position (a, i, j) of a cell is one
    channel of x, selected by its index. With ``fuse`` one kernel does so on CUDA, where its trial
    found the same bits.
    """
    if fuse and fused_duplicates(y, x, shortcut, first):
        return
    times, space = shortcut.factor_t, shortcut.factor_s
    outputs = torch.arange(shortcut.out_channels, device=x.device) * shortcut.factor
    skipped = times - 1 if first else 0
    for a, i, j in product(range(times), range(space), range(space)):
        channels = (outputs + (a * space + i) * space + j) // shortcut.repeats
        for frame in range(x.shape[2]):
            at = frame * times + a - skipped
            if at >= 0:
                y[:, :, at, i::space, j::space].add_(x[:, :, frame].index_select(1, channels))
