"""A component in its place, with its LoRAs on it and a look at interrupts between its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..config import WanLoRA
from ..loras import apply_loras
from ..memory import Strip
from ..placing import Sharing, apply_plan, block_hooks
from ..plan import OptimizationPlan


@contextmanager
def placed(
    module: Any,
    component: str,
    plan: OptimizationPlan,
    loras: Sequence[WanLoRA] = (),
    dtype: torch.dtype | None = None,
    *,
    decoding: bool = True,
    check: Callable[[], object],
    sharing: Sharing | None = None,
    strip: Strip | None = None,
) -> Iterator[str | None]:
    """Have a component compute as ``plan`` says, with ``loras`` in ``dtype``, in a ``with`` block.

    ``check`` is called while weights move and between the blocks of a transformer. Yields None, or
    a sentence saying what of the plan could not be carried out. Hooks and LoRAs come after the
    placement, and are taken off before the weights leave the device.
    """
    with ExitStack() as stack:
        note = stack.enter_context(
            apply_plan(
                module,
                component,
                plan,
                decoding=decoding,
                check=check,
                sharing=sharing,
                strip=strip,
            )
        )
        if component.startswith("transformer"):
            stack.enter_context(block_hooks(module, check))
        if loras:
            device = torch.device(plan.device)
            stack.enter_context(apply_loras(module, loras, device=device, dtype=dtype))
        yield note
