"""Dequantising in one pass on CUDA, by Triton: the numbers of ``dequantize``, without its copies.

One program takes a tile of a weight, reads its bytes once and writes each number once. Every step
rounds where the reference code rounds, so the bits are the same; ``quantized`` compares both before
it uses a kernel. Importing this module needs Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Storage
from .dequantize import Scales, rotation

_FLAT_KINDS = {"F8_E4M3": 0, "F8_E5M2": 1, "I8": 2}
_GGUF_KINDS = {
    # type: (number in the kernel, numbers in a block, bytes of a block)
    "Q8_0": (0, 32, 34), "Q4_0": (1, 32, 18), "Q4_1": (2, 32, 20), "Q5_0": (3, 32, 22),
    "Q5_1": (4, 32, 24), "Q4_K": (5, 256, 144), "Q5_K": (6, 256, 176), "Q6_K": (7, 256, 210),
}  # fmt: skip
_TILE = 4096


@dataclass(frozen=True)
class Turning:
    """How rotated codes are turned back; each way gives the same bits.

    A program takes ``rows`` of a group of columns with so many ``warps``. H of a group is the
    Kronecker product of H of four and H of a quarter: with ``quarters`` each quarter is multiplied
    with the small one, and the four results are added and subtracted, which takes a quarter of the
    products. ``across`` says whether neighbouring programs take neighbouring columns, not rows.
    """

    rows: int
    warps: int
    quarters: bool
    across: bool


TURNINGS = {
    "whole": Turning(128, 8, quarters=False, across=False),
    "whole, across": Turning(128, 8, quarters=False, across=True),
    "quarters, 128 rows": Turning(128, 8, quarters=True, across=True),
    "quarters, 64 rows": Turning(64, 4, quarters=True, across=True),
    "quarters, 64 rows, 8 warps": Turning(64, 8, quarters=True, across=True),
    "quarters, 32 rows": Turning(32, 4, quarters=True, across=True),
}
"""The ways that ``benchmarks/dequantise.py`` compares."""
TURNING = TURNINGS["quarters, 64 rows"]
"""The one that is used: 0.122 ms for 13824 x 5120 on an H200 in torch 2.11, whole 0.304."""
_QUARTERED = 256
"""The group that is cut: int8 products on a card sum 32 numbers or more."""


def has_kernel(stored: Storage) -> bool:
    """Say whether a kind of storage has a kernel here."""
    if stored.kind == "gguf":
        return stored.dtype in _GGUF_KINDS
    return stored.group in (0, 64, 256)


def run(values: Tensor, scales: Scales, stored: Storage, dtype: torch.dtype) -> Tensor:
    """Return a weight on a CUDA device in ``dtype``; see ``dequantize`` for the arguments."""
    bits = values.view(torch.uint8)
    with torch.cuda.device(values.device):
        if stored.kind == "gguf":
            return _gguf(bits, stored, dtype)
        if stored.group:
            return _rotated(bits, scales, stored, dtype)
        if stored.per == "block":
            return _by_blocks(bits, scales, stored, dtype)
        return _flat(bits, scales, stored, dtype)


def _flat(bits: Tensor, scales: Scales, stored: Storage, dtype: torch.dtype) -> Tensor:
    rows, columns = bits.shape
    out = torch.empty(rows, columns, dtype=dtype, device=bits.device)
    each: Any = bits if scales.each is None else scales.each
    grid = (triton.cdiv(rows * columns, _TILE),)
    _flat_kernel[grid](
        bits, each, out, rows * columns, columns, scales.whole,
        KIND=_FLAT_KINDS[stored.dtype], PER_ROW=scales.each is not None, TILE=_TILE,
    )  # fmt: skip
    return out


@triton.jit
def _flat_kernel(
    bits, each, out, total, columns, whole,
    KIND: tl.constexpr, PER_ROW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < total
    code = tl.load(bits + at, mask=inside, other=0)
    if KIND == 0:
        value = _e4m3(code)
    elif KIND == 1:
        value = (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = code.to(tl.int8, bitcast=True).to(tl.float32)
    if PER_ROW:
        value = value * tl.load(each + at // columns, mask=inside, other=0.0)
    else:
        value = value * whole
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def _by_blocks(bits: Tensor, scales: Scales, stored: Storage, dtype: torch.dtype) -> Tensor:
    assert scales.each is not None
    four_bits = stored.kind == "nvfp4"
    rows, columns = bits.shape[0], bits.shape[1] * (2 if four_bits else 1)
    out = torch.empty(rows, columns, dtype=dtype, device=bits.device)
    grid = (triton.cdiv(rows * columns, _TILE),)
    _blocks_kernel[grid](
        bits, scales.each.view(torch.uint8), out, rows * columns, scales.whole,
        FOUR_BITS=four_bits, TILE=_TILE,
    )  # fmt: skip
    return out


@triton.jit
def _e4m3(code):
    """Return the numbers that bytes of e4m3 stand for."""
    # Their bits in the place of float16's are 2**8 too small, subnormals included.
    wide = ((code & 0x80).to(tl.uint16) << 8) | ((code & 0x7F).to(tl.uint16) << 7)
    return wide.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _blocks_kernel(bits, each, out, total, whole, FOUR_BITS: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < total
    if FOUR_BITS:  # nvfp4: of two in a byte the even column is the high one
        code = tl.load(bits + at // 2, mask=inside, other=0).to(tl.int32)
        code = tl.where(at % 2 == 0, code >> 4, code & 15)
        exponent = (code >> 1) & 3
        digit = (code & 1).to(tl.float32) * 0.5
        power = tl.where(exponent == 3, 4.0, tl.where(exponent == 2, 2.0, 1.0))
        value = tl.where(exponent == 0, digit, (1.0 + digit) * power)
        value = tl.where(code >= 8, -value, value)
        factor = _e4m3(tl.load(each + at // 16, mask=inside, other=0)) * whole
    else:  # mxfp8: the scale is the exponent of a float32
        value = _e4m3(tl.load(bits + at, mask=inside, other=0))
        exponent = tl.load(each + at // 32, mask=inside, other=0).to(tl.int32)
        factor = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(out + at, (value * factor).to(out.dtype.element_ty), mask=inside)


def _rotated(bits: Tensor, scales: Scales, stored: Storage, dtype: torch.dtype) -> Tensor:
    return turned(bits, scales, stored.group, dtype, TURNING)


def turned(
    bits: Tensor, scales: Scales, group: int, dtype: torch.dtype, way: Turning
) -> Tensor:  # fmt: skip
    """Return rotated int8 codes (rows, columns), uint8, as numbers, turned back in ``way``."""
    rows, columns = bits.shape
    out = torch.empty(rows, columns, dtype=dtype, device=bits.device)
    quarters = way.quarters and group == _QUARTERED
    signs = _signs(group // 4 if quarters else group, bits.device)
    each: Any = bits if scales.each is None else scales.each
    grid = (triton.cdiv(rows, way.rows), columns // group)
    more = {"PART": group // 4} if quarters else {"GROUP": group, "WIDTH": min(group, 128)}
    kernel = _quarters_kernel if quarters else _rotated_kernel
    kernel[grid[::-1] if way.across else grid](
        bits, each, signs, out, rows, columns, scales.whole, float(group) ** -0.5,
        PER_ROW=scales.each is not None, BLOCK=way.rows, ACROSS=way.across, num_warps=way.warps,
        **more,
    )  # fmt: skip
    return out


_sign_tables: dict[tuple[int, torch.device], Tensor] = {}


def _signs(group: int, device: torch.device) -> Tensor:
    """Return H without its factor, +1 and -1, in int8 on the device."""
    table = _sign_tables.get((group, device))
    if table is None:
        with torch.inference_mode(False):
            table = (rotation(group) * group**0.5).to(device, torch.int8)
        _sign_tables[group, device] = table
    return table


@triton.jit
def _rotated_kernel(
    bits, each, signs, out, rows, columns, whole, factor,
    PER_ROW: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1 if ACROSS else 0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0 if ACROSS else 1) * GROUP
    within = tl.arange(0, GROUP)
    inside = row < rows
    place = row[:, None].to(tl.int64) * columns + first
    code = tl.load(bits + place + within[None, :], mask=inside[:, None], other=0)
    code = code.to(tl.int8, bitcast=True)
    scale = whole
    if PER_ROW:
        scale = tl.load(each + row, mask=inside, other=0.0)[:, None]
    for start in range(0, GROUP, WIDTH):
        column = start + tl.arange(0, WIDTH)
        table = tl.load(signs + within[:, None] * GROUP + column[None, :])
        total = tl.dot(code, table, out_dtype=tl.int32)
        value = (total.to(tl.float32) * factor) * scale  # the factor is a power of two: exact
        tl.store(
            out + place + column[None, :], value.to(out.dtype.element_ty), mask=inside[:, None]
        )


@triton.jit
def _quarter(bits, at, inside, table):
    """Return a quarter of a group times the small H: sums of codes, int32."""
    code = tl.load(bits + at, mask=inside, other=0).to(tl.int8, bitcast=True)
    return tl.dot(code, table, out_dtype=tl.int32)


@triton.jit
def _quarters_kernel(
    bits, each, signs, out, rows, columns, whole, factor,
    PER_ROW: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1 if ACROSS else 0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0 if ACROSS else 1) * 4 * PART
    column = tl.arange(0, PART)
    inside = (row < rows)[:, None]
    place = row[:, None].to(tl.int64) * columns + first + column[None, :]
    table = tl.load(signs + column[:, None] * PART + column[None, :])
    a = _quarter(bits, place, inside, table)
    b = _quarter(bits, place + PART, inside, table)
    c = _quarter(bits, place + 2 * PART, inside, table)
    d = _quarter(bits, place + 3 * PART, inside, table)
    scale = whole
    if PER_ROW:
        scale = tl.load(each + row, mask=row < rows, other=0.0)[:, None]
    # The rows of H of four; whole numbers, so that the order of sums changes nothing.
    sum_ab = a + b
    less_ab = a - b
    sum_cd = c + d
    less_cd = c - d
    value = ((sum_ab + less_cd).to(tl.float32) * factor) * scale
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
    value = ((sum_ab - less_cd).to(tl.float32) * factor) * scale
    tl.store(out + place + PART, value.to(out.dtype.element_ty), mask=inside)
    value = ((less_ab + sum_cd).to(tl.float32) * factor) * scale
    tl.store(out + place + 2 * PART, value.to(out.dtype.element_ty), mask=inside)
    value = ((sum_cd - less_ab).to(tl.float32) * factor) * scale
    tl.store(out + place + 3 * PART, value.to(out.dtype.element_ty), mask=inside)


def _gguf(bits: Tensor, stored: Storage, dtype: torch.dtype) -> Tensor:
    number, size, nbytes = _GGUF_KINDS[stored.dtype]
    rows = bits.shape[0]
    blocks = bits.numel() // nbytes
    out = torch.empty(rows, blocks // rows * size, dtype=dtype, device=bits.device)
    each = 2048 // size
    _gguf_kernel[(triton.cdiv(blocks, each),)](
        bits, out, blocks, KIND=number, SIZE=size, BYTES=nbytes, EACH=each
    )
    return out


@triton.jit
def _byte(bits, at, inside):
    return tl.load(bits + at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _half(bits, at, inside):
    low = _byte(bits, at, inside)
    high = _byte(bits, at + 1, inside)
    return ((high << 8) | low).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _rounded(value):
    """Round to float16, as each step of diffusers' code does; float32 holds the exact result."""
    return value.to(tl.float16).to(tl.float32)


@triton.jit
def _gguf_kernel(
    bits, out, blocks,
    KIND: tl.constexpr, SIZE: tl.constexpr, BYTES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    block = (tl.program_id(0).to(tl.int64) * EACH + tl.arange(0, EACH))[:, None]
    e = tl.arange(0, SIZE)[None, :]
    inside = (block < blocks) & (e < SIZE)
    base = block * BYTES
    if KIND == 7:  # Q6_K: low nibbles, two high bits, a scale for 16
        half = e // 128
        low = _byte(bits, base + half * 64 + e % 64, inside) >> (4 * ((e % 128) // 64))
        high = _byte(bits, base + 128 + half * 32 + e % 32, inside) >> (2 * ((e % 128) // 32))
        q = ((low & 15) | ((high & 3) << 4)) - 32
        scale = _byte(bits, base + 192 + e // 16, inside).to(tl.int8).to(tl.float32)
        d = _rounded(_half(bits, base + 208, inside) * scale)
        value = _rounded(d * q.to(tl.float32))
    elif KIND >= 5:  # Q4_K, Q5_K: scales and minima of 6 bits for 32
        j = e // 32
        here = _byte(bits, base + 4 + j, inside)
        other = _byte(bits, base + 4 + j + 4, inside & (j < 8))
        before = _byte(bits, base + 4 + tl.where(j < 4, 0, j - 4), inside)
        sc = tl.where(j < 4, here & 63, (other & 15) | ((before >> 2) & 0x30))
        m = tl.where(j < 4, other & 63, (other >> 4) | ((here >> 2) & 0x30))
        start = 16 if KIND == 5 else 48
        q = (_byte(bits, base + start + (j // 2) * 32 + e % 32, inside) >> ((j % 2) * 4)) & 15
        if KIND == 6:
            q = q | (((_byte(bits, base + 16 + e % 32, inside) >> j) & 1) << 4)
        d = _rounded(_half(bits, base, inside) * sc.to(tl.float32))
        dm = _rounded(_half(bits, base + 2, inside) * m.to(tl.float32))
        value = _rounded(_rounded(d * q.to(tl.float32)) - dm)
    elif KIND == 0:  # Q8_0
        q = _byte(bits, base + 2 + e, inside).to(tl.int8).to(tl.float32)
        value = _rounded(_half(bits, base, inside) * q)
    else:  # Q4_0, Q4_1, Q5_0, Q5_1: the first 16 numbers are low nibbles
        with_minimum: tl.constexpr = KIND == 2 or KIND == 4
        fifth: tl.constexpr = KIND >= 3
        first: tl.constexpr = (4 if with_minimum else 2) + (4 if fifth else 0)
        q = (_byte(bits, base + first + e % 16, inside) >> (4 * (e // 16))) & 15
        if fifth:
            bit = _byte(bits, base + first - 4 + e // 8, inside) >> (e % 8)
            q = q | ((bit & 1) << 4)
        d = _half(bits, base, inside)
        if with_minimum:
            minimum = _half(bits, base + 2, inside)
            value = _rounded(_rounded(d * q.to(tl.float32)) + minimum)
        else:
            offset = 16 if fifth else 8
            value = _rounded(d * (q - offset).to(tl.float32))
    tl.store(out + block * SIZE + e, value.to(out.dtype.element_ty), mask=inside)
