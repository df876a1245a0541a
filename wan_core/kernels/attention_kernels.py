"""Attention whose products are 8 bit, on CUDA, by Triton.

Softmax does not change when the same vector is taken from all keys, nor does it matter whether the
values' mean is averaged with them or added afterwards: both are taken off first, so that what is
rounded is small (for the keys: SageAttention, arXiv 2410.02367). Queries are rounded to int8 with a
scale for each token and head, keys with one for each ``KEYS`` tokens and head; values, with a scale
for each channel, and probabilities to fp8 e4m3 where the card multiplies that, else to fp16. Sums
and the softmax are fp32. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

KEYS = 128
"""Keys that are multiplied at once and share a scale."""
_QUERIES = 64
_LAUNCH: dict[str, Any] = {"num_warps": 4, "num_stages": 3}
# Triton's interpreter takes the end of a loop as a constant only; a card would compile each anew.
_loop_end: Any = tl.constexpr if triton.knobs.runtime.interpret else int


def attend_8bit(
    query: Tensor, key: Tensor, value: Tensor, *, halves: bool, out: Tensor | None = None
) -> Tensor:
    """Return attention, (B, heads, n, d) with one token's heads beside each other in memory.

    ``query`` is (B, heads, n, d), ``key`` and ``value`` (B, heads, m, d), in 16 bit, d 64 or 128,
    with a stride of 1 along d. ``halves`` multiplies values in fp16 instead of fp8. Beside ``out``
    the keys and values are there once more, in 8 bit (values in 16 with ``halves``).
    """
    batch, heads, count, size = query.shape
    if out is None:
        out = torch.empty(batch, count, heads, size, dtype=query.dtype, device=query.device)
        out = out.transpose(1, 2)
    with torch.cuda.device_of(query):
        for each in range(batch):
            _attend(query[each], key[each], value[each], halves, out[each])
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, halves: bool, out: Tensor) -> None:
    heads, count, size = query.shape
    keys = key.shape[1]
    blocks = triton.cdiv(keys, KEYS)
    kind = torch.float16 if halves else torch.float8_e4m3fn
    key_middle, middle, most = _middles(key, value, blocks)
    most /= 1.0 if halves else 448.0
    numbers = torch.empty(heads * blocks * KEYS, size, dtype=torch.int8, device=key.device)
    scales = torch.empty(heads, blocks, dtype=torch.float32, device=key.device)
    # Matrix units take fp8 only with the summed dimension beside itself: tokens.
    shape = (heads * blocks * KEYS, size) if halves else (heads * size, blocks * KEYS)
    coded = torch.empty(shape, dtype=kind, device=key.device)
    _code_kernel[(blocks, heads)](
        key, value, key_middle, middle, most, numbers, scales, coded, keys,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        SIZE=size, KEYS=KEYS, HALVES=halves, num_warps=8,
    )  # fmt: skip
    whole = keys // KEYS
    tile = [KEYS, size] if halves else [size, KEYS]
    _attend_kernel[(triton.cdiv(count, _QUERIES), heads)](
        query, TensorDescriptor.from_tensor(numbers, [KEYS, size]),
        TensorDescriptor.from_tensor(coded, tile), out, scales, most, middle, size**-0.5,
        count, keys, _loop_end(whole), blocks,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        SIZE=size, QUERIES=_QUERIES, KEYS=KEYS, HALVES=halves, **_LAUNCH,
    )  # fmt: skip


def _middles(key: Tensor, value: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return means over the tokens, (heads, d), and how far a value lies from its mean at most.

    Not by torch's reductions, which hold a third of their input meanwhile at these shapes.
    """
    heads, keys, size = key.shape
    parts = torch.empty(4, heads, blocks, size, dtype=torch.float32, device=key.device)
    _parts_kernel[(blocks, heads)](
        key, value, parts, keys, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        SIZE=size, KEYS=KEYS, num_warps=8,
    )  # fmt: skip
    key_middle, middle = parts[:2].sum(2) / keys
    least, most = parts[2].amin(1), parts[3].amax(1)
    return key_middle, middle, torch.maximum(most - middle, middle - least).clamp_min_(1e-30)


@triton.jit(do_not_specialize=["keys"])
def _parts_kernel(
    key, value, parts, keys, key_head, key_token, value_head, value_token,
    SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write sums of a block's keys and values, and the least and the largest of its values."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = block * KEYS + tl.arange(0, KEYS)
    lane = tl.arange(0, SIZE)
    inside = (token < keys)[:, None]
    at = token.to(tl.int64)[:, None]
    k = tl.load(key + head * key_head + at * key_token + lane[None, :], mask=inside, other=0.0)
    v = tl.load(
        value + head * value_head + at * value_token + lane[None, :], mask=inside, other=0.0
    )
    v = v.to(tl.float32)
    each = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * SIZE
    out = parts + (head * tl.num_programs(0) + block) * SIZE + lane
    tl.store(out, tl.sum(k.to(tl.float32), 0))
    tl.store(out + each, tl.sum(v, 0))
    tl.store(out + 2 * each, tl.min(tl.where(inside, v, float("inf")), 0))
    tl.store(out + 3 * each, tl.max(tl.where(inside, v, -float("inf")), 0))


@triton.jit(do_not_specialize=["keys"])
def _code_kernel(
    key, value, key_middle, middle, most, numbers, scales, coded, keys,
    key_head, key_token, value_head, value_token,
    SIZE: tl.constexpr, KEYS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Round a block of a head's keys and values; what lies beyond the last token becomes 0."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0)
    token = block * KEYS + tl.arange(0, KEYS)
    lane = tl.arange(0, SIZE)
    inside = (token < keys)[:, None]
    at = token.to(tl.int64)[:, None]
    k = tl.load(key + head * key_head + at * key_token + lane[None, :], mask=inside, other=0.0)
    k = k.to(tl.float32) - tl.load(key_middle + head * SIZE + lane)[None, :]
    k = tl.where(inside, k, 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(k), 1), 0), 1e-16) / 127.0
    tl.store(scales + head * blocks + block, scale)
    row = (head * blocks * KEYS + at) * SIZE + lane[None, :]
    tl.store(numbers + row, _whole(k / scale).to(tl.int8))
    v = tl.load(
        value + head * value_head + at * value_token + lane[None, :], mask=inside, other=0.0
    )
    v = v.to(tl.float32) - tl.load(middle + head * SIZE + lane)[None, :]
    v = tl.where(inside, v / tl.load(most + head * SIZE + lane)[None, :], 0.0)
    if HALVES:
        tl.store(coded + row, v.to(tl.float16))
    else:
        column = (head * SIZE + lane[:, None]) * (blocks * KEYS) + token[None, :]
        tl.store(coded + column, tl.trans(v).to(tl.float8e4nv))


@triton.jit
def _whole(x):
    """Round to the nearest whole number, ties to even, below 2**22: by fp32's own rounding."""
    return (x + 12582912.0) - 12582912.0


@triton.jit(do_not_specialize=["count", "keys", "whole", "blocks"])
def _attend_kernel(
    query, numbers, coded, out, scales, most, middle, temper, count, keys, whole, blocks,
    query_head, query_token, out_head, out_token,
    SIZE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Attend with some queries of a head: softmax block by block, rescaled when the largest grows.

    Logits are in powers of two. Probabilities in fp8 are kept times 2**8, where its steps are fine
    down to 2**-14 of the largest; the sum has the same factor.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    token = (block * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    lane = tl.arange(0, SIZE)
    inside = (token < count)[:, None]
    start = query + head.to(tl.int64) * query_head
    q = tl.load(start + token[:, None] * query_token + lane[None, :], mask=inside, other=0.0)
    q = q.to(tl.float32)
    # At least that, here and of keys: two scales whose product were 0 would make NaN of -inf.
    scale = tl.maximum(tl.max(tl.abs(q), 1), 1e-16) / 127.0
    q8 = _whole(q / scale[:, None]).to(tl.int8)
    scale = scale * (temper * 1.4426950408889634)
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, SIZE], tl.float32)
    for i in tl.range(0, whole):
        k = numbers.load([(head * blocks + i) * KEYS, 0])
        v = _values(coded, head, blocks, i, SIZE, KEYS, HALVES)
        logits = tl.dot(q8, k.T).to(tl.float32)
        each = scale * tl.load(scales + head * blocks + i)
        largest, total, sums = _added(logits, each, v, largest, total, sums, HALVES)
    if whole * KEYS < keys:
        k = numbers.load([(head * blocks + whole) * KEYS, 0])
        v = _values(coded, head, blocks, whole, SIZE, KEYS, HALVES)
        logits = tl.dot(q8, k.T).to(tl.float32)
        there = whole * KEYS + tl.arange(0, KEYS) < keys
        logits = tl.where(there[None, :], logits, -float("inf"))
        each = scale * tl.load(scales + head * blocks + whole)
        largest, total, sums = _added(logits, each, v, largest, total, sums, HALVES)
    factor = tl.load(most + head * SIZE + lane)[None, :]
    result = sums / total[:, None] * factor + tl.load(middle + head * SIZE + lane)[None, :]
    start = out + head.to(tl.int64) * out_head
    at = start + token[:, None] * out_token + lane[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _values(
    coded, head, blocks, i, SIZE: tl.constexpr, KEYS: tl.constexpr, HALVES: tl.constexpr
):  # fmt: skip
    """Return a block of values (tokens, channels)."""
    if HALVES:
        v = coded.load([(head * blocks + i) * KEYS, 0])
    else:
        v = coded.load([head * SIZE, i * KEYS]).T
    return v


@triton.jit
def _added(logits, each, v, largest, total, sums, HALVES: tl.constexpr):
    """Add the values of a block, weighted by ``2 ** (logits * each)``, to the sums."""
    shift: tl.constexpr = 0.0 if HALVES else 8.0
    most = tl.maximum(largest, tl.max(logits, 1) * each)
    p = tl.math.exp2(logits * each[:, None] - (most - shift)[:, None])
    shrunk = tl.math.exp2(largest - most)
    total = total * shrunk + tl.sum(p, 1)
    sums = tl.dot(p.to(v.dtype), v, sums * shrunk[:, None])
    return most, total, sums
