"""Run the kernels that take weights apart in Triton's interpreter beside the reference code.

A program of its own: Triton decides at its import whether it compiles or interprets. The
interpreter cuts bfloat16 off where a card rounds, so float32 and float16 are compared.
"""

from __future__ import annotations

import sys

import torch

from wan_core.formats import Storage
from wan_core.loading import dequantize_kernels as kernels
from wan_core.loading.dequantize import Scales, dequantize

ROWS, COLUMNS = 11, 512


def turned(generator: torch.Generator) -> int:
    """Rotated int8, in every way: rows that fill no program, scales of rows and of the whole."""
    codes = torch.randint(-128, 128, (ROWS, COLUMNS), dtype=torch.int8, generator=generator)
    codes[0] = -128  # the largest sums
    rows = torch.rand(ROWS, generator=generator)
    count = 0
    for group in (64, 256):
        for each, per in ((rows, "row"), (None, "tensor")):
            scales = Scales(each, 1.0 if each is not None else 0.0123)
            stored = Storage("int8", "I8", (ROWS, COLUMNS), "s", per=per, group=group)
            for dtype in (torch.float32, torch.float16):
                expected = dequantize(codes, scales, stored, dtype)
                for name, way in kernels.TURNINGS.items():
                    found = kernels.turned(codes.view(torch.uint8), scales, group, dtype, way)
                    assert torch.equal(found, expected), (name, group, per, dtype)
                    count += 1
                assert torch.equal(kernels.run(codes, scales, stored, dtype), expected)
    return count


if __name__ == "__main__":
    # There is no device here to choose.
    torch.cuda.device = lambda device: torch.inference_mode()  # type: ignore[assignment, misc]
    sys.stdout.write(f"{turned(torch.Generator().manual_seed(0))} are equal\n")
