"""A kernel takes a stored weight apart only where it gives the reference's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.wild_bytes import rounded_plainly, weights_of_every_bf16
from torch import Tensor

from wan_core.formats import Storage
from wan_core.loading import quantized
from wan_core.loading.dequantize import Scales, dequantize

CPU = torch.device("cpu")
STORED = [
    Storage("fp8", "F8_E4M3", (4, 8), per="tensor"),
    Storage("fp8", "F8_E4M3", (4, 8), "s", per="row"),
    Storage("int8", "I8", (4, 256), "s", per="row", group=64),
    Storage("int8", "I8", (4, 256), "s", per="row", group=256),
    Storage("nvfp4", "U8", (16, 32), "s", "t", "block"),
    Storage("mxfp8", "F8_E4M3", (32, 32), "s", per="block"),
    *(Storage("gguf", name, (4, size)) for name, size in quantized._SMALLEST.items()),
]


class Kernels:
    """Stands for the Triton kernels: the reference, one number off, or an error."""

    def __init__(self, fault: str) -> None:
        self.fault, self.seen = fault, list[Any]()

    def has_kernel(self, stored: Storage) -> bool:
        return True

    def run(self, bits: Tensor, scales: Scales, stored: Storage, dtype: torch.dtype) -> Tensor:
        self.seen.append((bits, scales))
        if self.fault == "raises":
            raise RuntimeError("no C compiler")
        found = dequantize(bits, scales, stored, dtype)
        if self.fault == "wrong":
            found[-1, -1] = 12345
        return found


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, request: Any) -> Kernels:
    made = Kernels(request.param)
    monkeypatch.setattr(quantized, "_kernels", lambda: made)
    monkeypatch.setattr(quantized, "_tried", {})
    return made


@pytest.mark.parametrize("stored", STORED, ids=lambda one: f"{one.kind} {one.dtype} {one.group}")
@pytest.mark.parametrize("kernels", ["right", "wrong", "raises"], indirect=True)
def test_a_kernel_is_tried_once_against_the_reference(kernels: Kernels, stored: Storage) -> None:
    for _ in range(2):
        assert quantized._kernel_works(stored, CPU, torch.bfloat16) == (kernels.fault == "right")
    ((bits, scales),) = kernels.seen
    rows, width = bits.shape
    # Several rows, and of each two blocks or groups at least: a stride that is wrong is seen.
    unit = max(stored.group, quantized._SMALLEST.get(stored.dtype, 32))
    assert rows == 64 and width % unit == 0 and width >= 2 * unit
    assert bool((bits != bits[0]).any()) and bool((bits != bits[:, :1]).any())
    each = scales.each
    assert (each is None) == (stored.per not in ("row", "block"))
    if each is not None:
        assert len(each) == rows and len(each.unique()) > 1
        if stored.per == "block":  # 16 numbers in 8 bytes, or 32 in 32
            assert each.shape[1] * (8 if stored.kind == "nvfp4" else 32) == width
    # Another dtype, another kind of storage: tried for itself.
    quantized._kernel_works(stored, CPU, torch.float16)
    assert len(kernels.seen) == 2


@pytest.mark.parametrize("kernels", ["right"], indirect=True)
def test_a_kind_without_a_kernel_is_not_tried(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_kernel", lambda stored: False)
    assert not quantized._kernel_works(STORED[0], CPU, torch.bfloat16)
    monkeypatch.setattr(quantized, "_kernels", lambda: None)
    assert not quantized._kernel_works(STORED[0], CPU, torch.bfloat16)
    assert kernels.seen == [] and quantized._tried == {}


@pytest.mark.parametrize("at_once", [1000, 2**20])
def test_every_bf16_number_is_rounded_to_fp8_as_one_expression_has_it(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(quantized, "_AT_ONCE", at_once)
    for weight in weights_of_every_bf16():
        for stored in (torch.float8_e4m3fn, torch.float8_e5m2):
            values, scale = quantized.rounded_to_fp8(weight, stored)
            expected, whole = rounded_plainly(weight, stored)
            assert scale == whole and values.shape == weight.shape
            assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


def test_an_interrupt_is_looked_for_amid_a_weight_that_is_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantized, "_AT_ONCE", 100)
    looks = 0

    def check() -> None:
        nonlocal looks
        looks += 1
        if looks == 7:
            raise InterruptedError

    quantized.rounded_to_fp8(torch.rand(20, 29), check=check)  # 580 numbers
    assert looks == 6
    with pytest.raises(InterruptedError):
        quantized.rounded_to_fp8(torch.rand(20, 29), check=check)
