"""The block's elementwise work in one pass each on CUDA, by Triton, with the bits of torch.

One program takes one token. Numbers are widened to fp32 in registers and rounded where the eager
code rounds; products and sums are contracted to one rounding only where aten's own kernel has them
so (``tl.fma``), therefore every kernel is compiled without the compiler's own contraction.

The statistics of a row follow aten's ``vectorized_layer_norm_kernel`` (ATen/native/cuda/
layer_norm_kernel.cu): 128 threads, each with every 128th group of four numbers, Welford's online
sum (for RMSNorm a sum of squares) within a thread, then pairs 16, 8, 4, 2, 1 lanes and 2, 1 warps
apart. That order is why widths must be multiples of 512. ``fused_trial`` compares it with torch
before anything here is used. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP = 512
"""Numbers that 128 threads read at once, four each; widths are multiples of it."""
_LAUNCH: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


Part = tuple[Tensor, Tensor | None]
"""Values (1 or B, 1 or n, dim) with a stride of 1 along dim, and a table (dim) to add, or None.
Those of one call have the same shape and strides."""


def norm_rows(
    hidden: Tensor, out: Tensor, eps: float, *, change: Tensor | None = None,
    gate: Part | None = None, scale: Part | None = None, shift: Part | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write LayerNorm(``hidden``), times 1 + ``scale``, plus ``shift``, to ``out``.

    ``hidden``, ``out`` and ``change`` are (B, n, dim), each token beside the next. With ``change``,
    which may be ``out``, ``hidden`` is first overwritten by ``hidden + change``, or
    ``hidden + change * gate``. ``affine`` is the norm's own weight and bias.
    """
    _launch_norm(hidden, out, None, eps, change, gate, scale, shift, affine)


def norm_codes(
    hidden: Tensor, codes: Tensor, scales: Tensor, eps: float, *, change: Tensor | None = None,
    gate: Part | None = None, scale: Part | None = None, shift: Part | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Do ``norm_rows``, but write what it would to ``codes`` in 8 bit, as ``quantize_rows`` does.

    ``codes`` is (B, n, dim), int8 or float8_e4m3fn, ``scales`` (B, n) in fp32; the norm is rounded
    to ``hidden``'s dtype before it is divided by its scale. ``change`` is read only.
    """
    _launch_norm(hidden, codes, scales, eps, change, gate, scale, shift, affine)


def add_rows(hidden: Tensor, change: Tensor, gate: Part) -> None:
    """Overwrite ``hidden`` by ``hidden + change * gate``; arguments are those of ``norm_rows``."""
    _launch_norm(hidden, None, None, 0.0, change, gate, None, None, None)


def _launch_norm(
    hidden: Tensor, out: Tensor | None, scales: Tensor | None, eps: float, change: Tensor | None,
    gate: Part | None, scale: Part | None, shift: Part | None,
    affine: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    batch, count, dim = hidden.shape
    # Lengths are passed in tokens: what is multiplied with the width in the kernel is known to be
    # aligned, whatever the number of tokens, and nothing is compiled anew for another.
    parts = [part if part is not None else (hidden, None) for part in (gate, scale, shift)]
    given = gate or scale or (hidden[:, :1], None)
    more = hidden if change is None else change
    into = hidden if out is None else out
    kind = 0 if scales is None else 2 if into.dtype == torch.int8 else 1
    with torch.cuda.device_of(hidden):
        _norm_kernel[(batch * count,)](
            hidden, more, into, *(values for values, _ in parts),
            *(hidden if table is None else table for _, table in parts),
            *((hidden, hidden) if affine is None else affine),
            count, *(x.stride(0) // dim for x in (hidden, more, into)),
            *(given[0].stride(i) if given[0].shape[i] > 1 else 0 for i in (0, 1)), eps,
            hidden if scales is None else scales, 0 if scales is None else scales.stride(0),
            DIM=dim, BLOCK=_block(dim), ADD=0 if change is None else 1 if gate is None else 2,
            MODULATE=scale is not None, AFFINE=affine is not None, TABLE=given[1] is not None,
            NORM=out is not None, CODES=kind, **_LAUNCH,
        )  # fmt: skip


def rotate_rows(
    states: Tensor, weight: Tensor, eps: float, rotary: tuple[Tensor, Tensor] | None, heads: int
) -> None:
    """Norm each token of ``states`` over all heads (RMSNorm) and rotate it, in place.

    ``states`` is (B, n, dim), each token beside the next; ``rotary`` is cos and sin
    (1, n, 1, head_dim) in fp32, contiguous, or None to norm only.
    """
    batch, count, dim = states.shape
    cos, sin = (weight, weight) if rotary is None else rotary
    with torch.cuda.device_of(states):
        _rotate_kernel[(batch * count,)](
            states, weight, cos, sin, count, states.stride(0) // dim, eps,
            DIM=dim, BLOCK=_block(dim), HALF=dim // heads // 2, ROTATE=rotary is not None,
            **_LAUNCH,
        )  # fmt: skip


def _block(dim: int) -> int:
    return 2 * STEP if dim % (2 * STEP) == 0 else STEP


@triton.jit
def _of_four(values):
    """Take (128, 4) apart into its four columns."""
    even, odd = tl.split(tl.reshape(values, (128, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _online(value, mean, spread, inverse):
    """Take one more number into Welford's mean and sum of squared deviations."""
    delta = value - mean
    mean = tl.fma(delta, tl.full(delta.shape, inverse, tl.float32), mean)
    return mean, tl.fma(delta, value - mean, spread)


@triton.jit
def _joined(mean_a, spread_a, count_a, mean_b, spread_b, count_b):
    """Combine two of them, as aten's ``cuWelfordCombine`` with its first argument first."""
    delta = mean_a - mean_b
    count = count_b + count_a
    share = tl.div_rn(tl.full(count.shape, 1.0, tl.float32), count)
    share_a, share_b = count_a * share, count_b * share
    mean = tl.fma(share_b, mean_b, share_a * mean_a)
    return mean, tl.fma(delta * delta * count_b, share_a, spread_b + spread_a), count


@triton.jit
def _total(a, b):
    return a + b


@triton.jit
def _part(values, table, at, TABLE: tl.constexpr):
    value = tl.load(values + at).to(tl.float32)
    if TABLE:
        value = tl.load(table + at).to(tl.float32) + value
    return value


@triton.jit
def _normed(
    state, weight, bias, scale, shift, scale_table, shift_table, at, middle, inverse,
    AFFINE: tl.constexpr, MODULATE: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    value = inverse * (tl.load(state + at).to(tl.float32) - middle)
    if AFFINE:
        factor = tl.load(weight + at).to(tl.float32)
        value = tl.fma(factor, value, tl.load(bias + at).to(tl.float32))
    if MODULATE:
        value = value * (1.0 + _part(scale, scale_table, at, TABLE))
        value = value + _part(shift, shift_table, at, TABLE)
    return value


@triton.jit
def _coded(value, scale, largest: tl.constexpr, WHOLE: tl.constexpr):
    """Divide by a scale and round to 8 bit; the cast to fp8 itself is the store's."""
    value = tl.minimum(tl.maximum(value / scale, -largest), largest)
    if WHOLE:  # adding and taking off 1.5 * 2**23 rounds to whole numbers
        value = (value + 12582912.0) - 12582912.0
    return value


@triton.jit(
    do_not_specialize=["count", "hidden_tokens", "change_tokens", "out_tokens", "scale_tokens"]
)
def _norm_kernel(
    hidden, change, out, gate, scale, shift, gate_table, scale_table, shift_table, weight, bias,
    count, hidden_tokens, change_tokens, out_tokens, batch_stride, token_stride, eps,
    scales, scale_tokens,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, MODULATE: tl.constexpr,
    AFFINE: tl.constexpr, TABLE: tl.constexpr, NORM: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // count).to(tl.int64)
    token = (tl.program_id(0) % count).to(tl.int64)
    state = hidden + (batch * hidden_tokens + token) * DIM
    added = change + (batch * change_tokens + token) * DIM
    into = out + (batch * out_tokens + token) * DIM
    part = batch * batch_stride + token * token_stride
    four = tl.arange(0, 128)[:, None] * 4 + tl.arange(0, 4)[None, :]
    mean = tl.zeros((128,), tl.float32)
    spread = tl.zeros((128,), tl.float32)
    for k in tl.static_range(DIM // 512):
        at = k * 512 + four
        value = tl.load(state + at)
        if ADD:
            more = tl.load(added + at).to(tl.float32)
            if ADD == 2:
                more = more * _part(gate + part, gate_table, at, TABLE)
            value = (value.to(tl.float32) + more).to(hidden.dtype.element_ty)
            tl.store(state + at, value)
        if NORM:
            v0, v1, v2, v3 = _of_four(value.to(tl.float32))
            mean, spread = _online(v0, mean, spread, 1.0 / (4 * k + 1))
            mean, spread = _online(v1, mean, spread, 1.0 / (4 * k + 2))
            mean, spread = _online(v2, mean, spread, 1.0 / (4 * k + 3))
            mean, spread = _online(v3, mean, spread, 1.0 / (4 * k + 4))
    if NORM:
        counts = tl.full((128,), DIM // 128, tl.float32)
        middle, total, _ = tl.reduce((mean, spread, counts), 0, _joined)
        inverse = tl.rsqrt(tl.div_rn(total, total * 0 + DIM) + eps)
        # Other threads may have written what this one reads next.
        tl.debug_barrier()
        if CODES:
            largest: tl.constexpr = 127.0 if CODES == 2 else 448.0
            seen = tl.zeros((BLOCK,), tl.float32)
            for k in tl.static_range(DIM // BLOCK):
                value = _normed(
                    state, weight, bias, scale + part, shift + part, scale_table, shift_table,
                    k * BLOCK + tl.arange(0, BLOCK), middle, inverse, AFFINE, MODULATE, TABLE,
                )  # fmt: skip
                value = value.to(hidden.dtype.element_ty).to(tl.float32)
                seen = tl.maximum(seen, tl.abs(value))
            divisor = tl.maximum(tl.max(seen, 0), 1e-30) / largest
            tl.store(scales + batch * scale_tokens + token, divisor)
            for k in tl.static_range(DIM // BLOCK):
                at = k * BLOCK + tl.arange(0, BLOCK)
                value = _normed(
                    state, weight, bias, scale + part, shift + part, scale_table, shift_table,
                    at, middle, inverse, AFFINE, MODULATE, TABLE,
                )  # fmt: skip
                value = value.to(hidden.dtype.element_ty).to(tl.float32)
                value = _coded(value, divisor, largest, CODES == 2)
                tl.store(into + at, value.to(out.dtype.element_ty))
        else:
            for k in tl.static_range(DIM // BLOCK):
                at = k * BLOCK + tl.arange(0, BLOCK)
                value = _normed(
                    state, weight, bias, scale + part, shift + part, scale_table, shift_table,
                    at, middle, inverse, AFFINE, MODULATE, TABLE,
                )  # fmt: skip
                tl.store(into + at, value.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["count", "tokens"])
def _rotate_kernel(
    states, weight, cos, sin, count, tokens, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // count).to(tl.int64)
    token = (tl.program_id(0) % count).to(tl.int64)
    row = states + (batch * tokens + token) * DIM
    four = tl.arange(0, 128)[:, None] * 4 + tl.arange(0, 4)[None, :]
    squares = tl.zeros((128,), tl.float32)
    for k in tl.static_range(DIM // 512):
        v0, v1, v2, v3 = _of_four(tl.load(row + k * 512 + four).to(tl.float32))
        squares = tl.fma(v0, v0, squares)
        squares = tl.fma(v1, v1, squares)
        squares = tl.fma(v2, v2, squares)
        squares = tl.fma(v3, v3, squares)
    total = tl.reduce(squares, 0, _total)
    inverse = tl.rsqrt(tl.div_rn(total, total * 0 + DIM) + eps)
    tl.debug_barrier()
    if ROTATE:
        heads: tl.constexpr = BLOCK // (2 * HALF)
        pair = tl.arange(0, HALF)
        turn = token * 2 * HALF + 2 * pair
        c = tl.load(cos + turn)[None, :]
        s = tl.load(sin + turn + 1)[None, :]
        for k in tl.static_range(DIM // BLOCK):
            at = k * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(weight + at).to(tl.float32) * (
                inverse * tl.load(row + at).to(tl.float32)
            )
            value = value.to(states.dtype.element_ty).to(tl.float32)
            one, two = tl.split(tl.reshape(value, (heads, HALF, 2)))
            turned = tl.join(one * c - two * s, one * s + two * c)
            tl.store(row + at, tl.reshape(turned, (BLOCK,)).to(states.dtype.element_ty))
    else:
        for k in tl.static_range(DIM // BLOCK):
            at = k * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(weight + at).to(tl.float32) * (
                inverse * tl.load(row + at).to(tl.float32)
            )
            tl.store(row + at, value.to(states.dtype.element_ty))


def norm_silu(source: Tensor, out: Tensor, gamma: Tensor, scale: float) -> None:
    """Write silu(x / |x| * ``scale`` * ``gamma``) to ``out``, |x| over the channels of each pixel.

    ``source`` and ``out`` are views (B, C, T, H, W) with a stride of 1 along the channels;
    ``gamma`` has C numbers. Every step is rounded to ``source``'s dtype, as in ``WanRMS_norm``.
    """
    batch, channels, frames, height, width = source.shape
    block = triton.next_power_of_2(channels)
    pixels = max(1, 8192 // block)
    with torch.cuda.device_of(source):
        _silu_kernel[(batch * frames, height, triton.cdiv(width, pixels))](
            source, out, gamma, frames, width, scale,
            *(source.stride(i) for i in (0, 2, 3, 4)), *(out.stride(i) for i in (0, 2, 3, 4)),
            CHANNELS=channels, BLOCK=block, PIXELS=pixels, num_warps=8,
        )  # fmt: skip


@triton.jit(do_not_specialize=["frames", "width"])
def _silu_kernel(
    source, out, gamma, frames, width, scale,
    from_batch, from_frame, from_row, from_pixel, to_batch, to_frame, to_row, to_pixel,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // frames).to(tl.int64)
    frame = (tl.program_id(0) % frames).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    pixel = (tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (pixel < width) & (channel < CHANNELS)
    start = source + batch * from_batch + frame * from_frame + row * from_row
    kind = source.dtype.element_ty
    x = tl.load(start + pixel * from_pixel + channel, mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)[:, None]
    factor = tl.load(gamma + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    x = (x / length).to(kind).to(tl.float32)
    x = (x * scale).to(kind).to(tl.float32)
    x = (x * factor).to(kind).to(tl.float32)
    x = x / (1.0 + tl.exp(-x))
    into = out + batch * to_batch + frame * to_frame + row * to_row
    tl.store(into + pixel * to_pixel + channel, x.to(kind), mask=inside)


def quantize_rows(x: Tensor, kind: torch.dtype, gelu: bool) -> tuple[Tensor, Tensor]:
    """Return ``x`` (n, width) in 8 bit and the scale of each row, float32 (n, 1).

    ``kind`` is torch.int8 or torch.float8_e4m3fn. A row is divided by its scale, its largest
    magnitude over 127 or 448, and rounded to the nearest, ties to even. With ``gelu`` the GELU
    (tanh form) of ``x``, rounded to its dtype, is meant.
    """
    count, width = x.shape
    x = x.contiguous()  # the kernel steps from row to row by the width
    out = torch.empty(count, width, dtype=kind, device=x.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _quantize_kernel[(count,)](
            x, out, scales, WIDTH=width, BLOCK=block, GELU=gelu, WHOLE=kind == torch.int8,
            num_warps=8 if block > 4096 else 4,
        )  # fmt: skip
    return out, scales


def scale_rows(
    sums: Tensor, scales: Tensor, each: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Write ``sums * scales * each + bias`` to ``out``: (n, width), (n, 1), (width,), (width,)."""
    count, width = sums.shape
    block = 1024
    with torch.cuda.device_of(sums):
        _scale_kernel[(count, triton.cdiv(width, block))](
            sums, scales, each, each if bias is None else bias, out, width,
            BIAS=bias is not None, BLOCK=block,
        )  # fmt: skip


@triton.jit
def _quantize_kernel(
    x, out, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    value = tl.load(x + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0)
        value = (0.5 * value * (1.0 + tanh)).to(x.dtype.element_ty).to(tl.float32)
    largest: tl.constexpr = 127.0 if WHOLE else 448.0
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-30) / largest
    value = _coded(value, scale, largest, WHOLE)
    tl.store(out + row * WIDTH + at, value.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _scale_kernel(sums, scales, each, bias, out, width, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(sums + row * width + at, mask=inside, other=0).to(tl.float32)
    value = value * (tl.load(scales + row) * tl.load(each + at, mask=inside, other=0.0))
    if BIAS:
        value += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=inside)
