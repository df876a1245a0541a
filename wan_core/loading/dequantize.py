"""Stored bytes to numbers: one function per kind of quantised weight, the reference for all others.

Every kind but GGUF is multiplied in float32 and rounded once to the dtype asked for, as
comfy-kitchen's CUDA and Triton kernels do (its eager code rounds the scale first, another answer).
Rotated int8 (convrot) is turned back before it is multiplied: codes times +1 and -1 are whole
numbers below 2**24, which float32 adds up exactly in any order and on any device. GGUF blocks are
taken apart by diffusers' own functions, in float16, so that the bits are those of diffusers' GGUF
layers. ``dequantize_kernels`` has the same numbers in one pass on CUDA.

Formulas: comfy-kitchen ``backends/cuda/ops/*.cu`` and ``tensor/*.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingDependency
from ..formats import Storage

_FP8 = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.float8_e4m3fn,
}  # fmt: skip
_AT_ONCE = 4 * 2**20
"""Numbers taken apart at a time."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the low three bits of an nvfp4 code stand for; the fourth is the sign."""


@dataclass(frozen=True, slots=True)
class Scales:
    """What stored values are multiplied with.

    ``each`` has one for each row, float32 (rows,), or for each block, a byte (rows, blocks); None
    where ``whole`` is the only one. ``whole`` is that of the whole weight, of nvfp4 the second.
    """

    each: Tensor | None = None
    whole: float = 1.0

    def of_rows(self, rows: Tensor | slice) -> Scales:
        """Return the scales of some rows."""
        return self if self.each is None else Scales(self.each[rows], self.whole)


def dequantize(values: Tensor, scales: Scales, stored: Storage, dtype: torch.dtype) -> Tensor:
    """Return a weight (rows, columns), or some of its rows, in ``dtype``.

    ``values`` are its bytes, (rows, bytes of a row). Rows are independent of each other: some rows
    and their scales give those rows of the whole. That is how large weights are done, a few rows at
    a time: what lies between bytes and numbers takes several times the memory of either.
    """
    columns = math.prod(stored.shape[1:])
    pieces = -(-len(values) * columns // _AT_ONCE)
    if pieces < 2 or not stored.by_rows:
        return _dequantize(values, scales, stored, dtype)
    out = torch.empty(len(values), columns, dtype=dtype, device=values.device)
    step = -(-len(values) // pieces)
    for begin in range(0, len(values), step):
        rows = slice(begin, begin + step)
        out[rows] = _dequantize(values[rows], scales.of_rows(rows), stored, dtype)
    return out


def _dequantize(values: Tensor, scales: Scales, stored: Storage, dtype: torch.dtype) -> Tensor:
    if stored.kind == "gguf":
        return _gguf(values, stored.dtype).to(dtype)
    if stored.kind == "nvfp4":
        assert scales.each is not None
        factors = scales.each.view(torch.float8_e4m3fn).float().mul_(scales.whole)
        return _by_blocks(_fp4(values), factors).to(dtype)
    numbers = values.view(torch.int8 if stored.kind == "int8" else _FP8[stored.dtype])
    if stored.kind == "mxfp8":
        assert scales.each is not None
        return _by_blocks(numbers.float(), _powers(scales.each)).to(dtype)
    if scales.each is None and not stored.group:
        # A number is multiplied in float32 whatever the dtype of the tensor, and int8 and fp8 are
        # exact in 16 bits: this saves the float32 copy and changes no bit.
        plain = numbers.to(dtype)
        return plain if scales.whole == 1 else plain.mul_(scales.whole)
    rows = scales.whole if scales.each is None else scales.each.view(-1, 1)
    wide = numbers.float()
    if stored.group:
        wide = _unrotated(wide, stored.group)
    return wide.mul_(rows).to(dtype)


_HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""Where a GGUF block keeps its float16 scales, in bytes (gguf-py ``quants.py``)."""


def unit_bytes(stored: Storage) -> int:
    """Return the bytes that can only be taken apart together: those of a GGUF block, else one."""
    return _gguf_functions()[1][stored.dtype][1] if stored.kind == "gguf" else 1


def numbers_that_may_be_wild(bits: Tensor, stored: Storage) -> Iterator[Tensor]:
    """Yield the stored numbers, as floats, that can be NaN or infinite in this kind of storage.

    Integers and 4-bit codes cannot; of GGUF blocks only their float16 scales can.
    """
    if stored.kind == "gguf":
        _, sizes = _gguf_functions()
        blocks = bits.reshape(-1, sizes[stored.dtype][1])
        for start in _HALVES[stored.dtype]:
            yield blocks[:, start : start + 2].contiguous().view(torch.float16)
    elif stored.kind in ("fp8", "mxfp8"):
        yield bits.view(_FP8[stored.dtype])


def block_scales(each: Tensor, stored: Storage) -> Tensor:
    """Return scales of blocks, a byte each, as floats: bytes can be NaN or infinite, too."""
    return each.view(torch.float8_e4m3fn) if stored.kind == "nvfp4" else _powers(each)


def ordered_scales(raw: Tensor, stored: Storage) -> Tensor:
    """Return scales in the order of the weight's rows, from a tensor as a file stores it.

    Scales of tensors and rows become float32 (1,) or (rows,). Block scales of nvfp4 and mxfp8 lie
    in tiles of 128 rows by 4 blocks (cuBLAS's layout) in ComfyUI's files; they come out as bytes
    (rows, blocks), padding cut off. That is a permutation: nothing is rounded.
    """
    if stored.per != "block":
        return raw.reshape(-1).to(torch.float32)
    rows, columns = stored.shape
    blocks = columns // (16 if stored.kind == "nvfp4" else 32)
    tiles = raw.reshape(-1).view(torch.uint8).view(-(-rows // 128), -(-blocks // 4), 32, 4, 4)
    # (row tile, block tile, row % 32, row % 128 // 32, block % 4) -> (row, block)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)
    return plain[:rows, :blocks].contiguous()


def _by_blocks(wide: Tensor, factors: Tensor) -> Tensor:
    """Multiply (rows, columns) by (rows, blocks), in place."""
    rows, blocks = factors.shape
    wide.view(rows, blocks, -1).mul_(factors.view(rows, blocks, 1))
    return wide


def _powers(exponents: Tensor) -> Tensor:
    """Return the powers of two that E8M0 bytes stand for: the exponent bits of a float32.

    0 gives 0.0 (a block of zeros stores it), where torch's own e8m0 would give 2**-127.
    """
    bits: Tensor = exponents.int() << 23
    return bits.view(torch.float32)


def _fp4(values: Tensor) -> Tensor:
    """Return the numbers of nvfp4 codes; of two in a byte the even column is the high one."""
    table = torch.tensor([*_FP4, *(-x for x in _FP4)], device=values.device)
    bits = values.view(torch.uint8)
    codes = torch.stack((bits >> 4, bits & 15), dim=-1).flatten(-2)
    return table[codes.int()]


@functools.cache
def rotation(group: int) -> Tensor:
    """Return H (group, group), float32: the Kronecker power of a 4 x 4 Hadamard matrix, over sqrt.

    It is symmetric and its own inverse, so that rotating twice is the identity.
    """
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    power = torch.ones(1, 1)
    with torch.inference_mode(False):
        while len(power) < group:
            power = torch.kron(power, four.float())
        scaled: Tensor = power / group**0.5
        return scaled


def _unrotated(codes: Tensor, group: int) -> Tensor:
    """Undo convrot: each group of columns of int8 codes, as float32, times H.

    Exact: H is +1 and -1 over a power of two, so that every product and sum is a whole number
    below 2**24 over that power; TF32 holds them, too.
    """
    turned: Tensor = codes.view(-1, group) @ rotation(group).to(codes.device)
    return turned.reshape(codes.shape)


def _gguf(values: Tensor, kind: str) -> Tensor:
    """Return GGUF blocks as diffusers' GGUF layers take them apart: in float16."""
    functions, sizes = _gguf_functions()
    block, nbytes = sizes[kind]
    blocks = values.view(torch.uint8).reshape(-1, nbytes)
    flat: Tensor = functions[kind](blocks, block, nbytes)
    out: Tensor = flat.reshape(values.shape[0], -1)
    return out


@functools.cache
def _gguf_functions() -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    try:
        import gguf  # noqa: F401  (diffusers' module fails without it, less clearly)
        from diffusers.quantizers.gguf import utils
    except ImportError as err:
        raise MissingDependency(
            f"GGUF files need the packages 'gguf' and 'diffusers' ({err}). Install them: "
            "pip install gguf diffusers."
        ) from err
    functions: dict[Any, Any] = utils.dequantize_functions
    sizes: dict[Any, tuple[int, int]] = utils.GGML_QUANT_SIZES
    return (
        {kind.name: function for kind, function in functions.items()},
        {kind.name: size for kind, size in sizes.items()},
    )
