"""Numbers to try loading with: stored bytes of every kind, damaged ones too; every bf16 number."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from wan_core.formats import Storage
from wan_core.loading import reader
from wan_core.loading.dequantize import _HALVES, unit_bytes
from wan_core.loading.mapped import Numbers

FLOATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # fmt: skip
UNITS = 67
"""Numbers, or GGUF blocks, of a case."""


def wild_bytes() -> Iterator[tuple[str, Numbers, Tensor, list[Tensor]]]:
    """Yield a name, what may be wild, whole bytes, and those with one wild number each."""
    generator = torch.Generator().manual_seed(3)
    for dtype in FLOATS:
        values = torch.randn(UNITS, generator=generator).to(dtype)
        numbers: Numbers = partial(reader._as_numbers, dtype)
        yield str(dtype), numbers, _bytes(values), list(_damaged(values))
    for stored, dtype in (
        (Storage("fp8", "F8_E4M3", (UNITS, 1)), torch.float8_e4m3fn),
        (Storage("fp8", "F8_E5M2", (UNITS, 1)), torch.float8_e5m2),
        (Storage("mxfp8", "U8", (UNITS, 1), per="block"), torch.float8_e4m3fn),
    ):
        values = torch.randn(UNITS, generator=generator).to(dtype)
        numbers = partial(reader._may_be_wild, stored)
        yield stored.title, numbers, _bytes(values), list(_damaged(values))
    for kind, places in _HALVES.items():
        stored = Storage("gguf", kind, (UNITS, 256))
        size = unit_bytes(stored)
        blocks = torch.randint(0, 256, (UNITS, size), dtype=torch.uint8, generator=generator)
        for place in places:
            scales = torch.randn(UNITS, generator=generator).to(torch.float16)
            blocks[:, place : place + 2] = scales.view(torch.uint8).view(UNITS, 2)
        bad = []
        for place in places:
            for scales in _damaged(blocks[:, place : place + 2].contiguous().view(torch.float16)):
                bad.append(blocks.clone())
                bad[-1][:, place : place + 2] = scales.view(UNITS, 2)
        numbers = partial(reader._may_be_wild, stored)
        yield stored.title, numbers, blocks.view(-1), [one.view(-1) for one in bad]


def _bytes(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8)


def _damaged(values: Tensor) -> Iterator[Tensor]:
    """Yield the bytes of values with one that is wild: each kind of it, first, amid and last."""
    dtype = values.dtype
    nan = torch.tensor([float("nan")]).to(dtype)
    wild = [nan, _bytes(nan).clone().view(dtype)]
    _bytes(wild[1])[-1] ^= 0x80  # the byte with the sign
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        wild += [torch.tensor([sign * float("inf")]).to(dtype) for sign in (1, -1)]
    for one in wild:
        for place in (0, len(values) // 2, len(values) - 1):
            raw = _bytes(values).clone()
            raw.view(-1, dtype.itemsize)[place] = _bytes(one)
            yield raw


def weights_of_every_bf16() -> Iterator[Tensor]:
    """Yield matrices with every finite bf16 number up to a magnitude that is the matrix's own."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[torch.isfinite(every)]
    for most in (0.0, 1e-38, 3e-31, 0.0213, 1.0, 448.0, 6e4, torch.finfo(torch.bfloat16).max):
        some = every[every.abs() <= most]
        yield some[: len(some) // 2 * 2].view(2, -1)


def rounded_plainly(weight: Tensor, stored: torch.dtype) -> tuple[Tensor, float]:
    """A weight in fp8 and its scale, in one expression on the CPU."""
    largest = torch.finfo(stored).max
    scale = weight.abs().amax().float().clamp(min=1e-30) / largest
    return (weight.float() / scale).clamp(-largest, largest).to(stored), float(scale)
