"""The fused kernels' functions in eager code: what each must compute, rounded as torch rounds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _value(part: Any) -> Tensor:
    values, table = part
    wide: Tensor = values.float()
    return wide if table is None else table.float() + wide


def norm_rows(
    hidden: Tensor, out: Tensor, eps: float, *, change: Tensor | None = None, gate: Any = None,
    scale: Any = None, shift: Any = None, affine: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    if change is not None:
        hidden.add_(change if gate is None else change * _value(gate))
    weight, bias = (None, None) if affine is None else (affine[0].float(), affine[1].float())
    wide = F.layer_norm(hidden.float(), hidden.shape[-1:], weight, bias, eps)
    if scale is not None:
        wide = wide * (1 + _value(scale)) + _value(shift)
    out.copy_(wide)


def norm_codes(
    hidden: Tensor, codes: Tensor, scales: Tensor, eps: float, **given: Any
) -> None:  # fmt: skip
    normed = torch.empty_like(hidden)
    norm_rows(hidden, normed, eps, **given)
    numbers, each = quantize_rows(normed.flatten(0, 1), codes.dtype, gelu=False)
    codes.copy_(numbers.view(codes.shape))
    scales.copy_(each.view(scales.shape))


def add_rows(hidden: Tensor, change: Tensor, gate: Any) -> None:
    hidden.add_(change * _value(gate))


def rotate_rows(
    states: Tensor, weight: Tensor, eps: float, rotary: tuple[Tensor, Tensor] | None, heads: int
) -> None:
    normed = F.rms_norm(states, states.shape[-1:], weight, eps)
    if rotary is None:
        states.copy_(normed)
        return
    first, second = normed.unflatten(-1, (heads, -1, 2)).unbind(-1)
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    turned = states.unflatten(-1, (heads, -1, 2))
    turned[..., 0] = first * cos - second * sin
    turned[..., 1] = first * sin + second * cos


def quantize_rows(x: Tensor, kind: torch.dtype, gelu: bool) -> tuple[Tensor, Tensor]:
    if gelu:
        x = F.gelu(x, approximate="tanh")
    wide = x.float()
    largest = 127.0 if kind == torch.int8 else 448.0
    scales = wide.abs().amax(1, keepdim=True).clamp(min=1e-30) / largest
    numbers = (wide / scales).clamp(-largest, largest)
    return (numbers.round() if kind == torch.int8 else numbers).to(kind), scales


def scale_rows(
    sums: Tensor, scales: Tensor, each: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    wide = sums.float() * (scales * each)
    out.copy_(wide if bias is None else wide + bias.float())


def norm_silu(source: Tensor, out: Tensor, gamma: Tensor, scale: float) -> None:
    kind = source.dtype
    normed = F.normalize(source.float(), dim=1).to(kind)
    out.copy_(F.silu(normed * scale * gamma.view(-1, 1, 1, 1)))


def scaled_silu(
    source: Tensor, lengths: Tensor, gamma: Tensor, scale: float, floor: float, out: Tensor
) -> None:
    normed = (source.float() / lengths.clamp_min(floor)).to(source.dtype)
    out.copy_(F.silu(normed * scale * gamma.view(-1, 1, 1, 1) + 0.0))


def duplicated(y: Tensor, x: Tensor, repeats: int, times: int, space: int, skipped: int) -> None:
    wide = x.repeat_interleave(repeats, dim=1)
    batch, channels, *size = wide.shape
    cells = wide.view(batch, -1, times, space, space, *size).permute(0, 1, 5, 2, 6, 3, 7, 4)
    frames, height, width = (n * k for n, k in zip(size, (times, space, space), strict=True))
    y.add_(cells.reshape(batch, -1, frames, height, width)[:, :, skipped:])
