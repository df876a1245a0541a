"""What a run multiplies, convolves and attends with, as a card would see it, recorded on a CPU.

On a card the kernel that is taken, and with it the rounding, depends on shapes, dtypes, strides and
alignment, not on the numbers. Two ways that are to give equal bits there must make the same calls;
on a CPU their bits may be equal all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("convolution", "addmm", "aten::mm", "bmm", "attention")
"""Parts of the names of what is recorded."""
_ALIGNED = 16
"""Bytes to which cuBLAS and cuDNN look whether an address is aligned."""
_LAYOUTS = {
    torch.contiguous_format: "", torch.channels_last: "channels last",
    torch.channels_last_3d: "channels last",
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Records calls while it is entered, and gives convolutions the layout of cuDNN's results.

    cuDNN returns channels last where the input or the weight is so (ATen/native/ConvUtils.h); a
    CPU's convolution does not always, and what comes after it would lie otherwise than on a card.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "aten::convolution":
            layouts = [suggest_memory_format(tensor) for tensor in args[:2]]
            found = [one for one in layouts if one != torch.contiguous_format]
            result = result.contiguous(memory_format=found[0] if found else torch.contiguous_format)
        if any(kind in name for kind in KINDS):
            given = [_seen(arg) for arg in args if isinstance(arg, Tensor)]
            self.calls.append(f"{name}: {'; '.join(given)}")
        return result


def _seen(x: Tensor) -> str:
    """Describe all of a tensor that a kernel is chosen by."""
    words = [str(tuple(x.shape)), str(x.dtype).removeprefix("torch.")]
    if not x.is_contiguous():
        words.append(_LAYOUTS[suggest_memory_format(x)] or f"strides {x.stride()}")
    offset = x.storage_offset() * x.element_size() % _ALIGNED
    return " ".join([*words, f"{offset} bytes off"] if offset else words)


def recorded(run: Callable[[], Tensor]) -> tuple[Tensor, Counter[str]]:
    """Return what ``run`` returns, and its calls, however they follow each other."""
    with Recorder() as recorder:
        result = run()
    return result, Counter(recorder.calls)
