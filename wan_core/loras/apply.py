"""LoRAs on a transformer: added to the outputs of its layers, and removed without a trace.

No weight is changed. LoRAs therefore work on weights in fp8 or GGUF blocks like on any others, and
after the ``with`` block every weight has the bits it had before. A layer that computes W x computes
W x + B (A x) with a LoRA (Hu et al. 2021, eq. 3). B is multiplied by strength x alpha / rank once,
in float32. LoKr's and LoHa's factors (Yeh et al. 2024) stay factors: what they make of x is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..config import WanLoRA
from ..loading import Undo, device_of
from .attach import attach
from .delta import Delta
from .read import read_lora


@contextmanager
def apply_loras(
    transformer: nn.Module,
    loras: Sequence[WanLoRA],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[None]:
    """Compute with ``loras`` on ``transformer`` in this thread, inside the ``with`` block.

    Their matrices are read to ``device`` (by default the transformer's) in ``dtype`` (by default
    that of its weights; float32 for layers that are kept in float32) and freed at the end. Threads
    that share the module do not see each other's LoRAs. A strength of 0 changes no bit. Raises
    before anything is attached: whatever ``read_patches`` raises, and CorruptFile for NaN.
    """
    device = torch.device(device or device_of(transformer))
    dtype = dtype or _compute_dtype(transformer)
    deltas: dict[str, list[Delta]] = {}
    for lora in loras:
        if lora.strength:
            read_lora(transformer, lora, deltas, device, dtype)
    with Undo() as undo:
        for target, found in deltas.items():
            attach(undo, transformer, target, found)
        yield


def _compute_dtype(transformer: nn.Module) -> torch.dtype:
    """Return the dtype of the first half-precision matrix.

    Without one, quantised models compute in bf16 and all others in float32.
    """
    for parameter in transformer.parameters():
        if parameter.dim() > 1 and parameter.dtype in (torch.float16, torch.bfloat16):
            return parameter.dtype
    quantised = any(not p.dtype.is_floating_point for p in transformer.parameters())
    return torch.bfloat16 if quantised else torch.float32
