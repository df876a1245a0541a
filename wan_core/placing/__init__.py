"""Where weights are while a module computes: moved, or streamed block by block, and put back.

In: a module and a plan. Out: a context in which it computes as the plan says (``apply_plan``).
Whatever is attached is detached, in reverse, also after an error. Names are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .applied import apply_plan, pin_budget
    from .manager import OptimizationManager
    from .offload import block_hooks
    from .streaming import pin_ahead, stream_blocks

__getattr__ = lazy_names(
    __name__,
    {
        "applied": ("apply_plan", "pin_budget"),
        "manager": ("OptimizationManager",),
        "offload": ("block_hooks",),
        "streaming": ("pin_ahead", "stream_blocks"),
    },
)

__all__ = [
    "OptimizationManager",
    "apply_plan",
    "block_hooks",
    "pin_ahead",
    "pin_budget",
    "stream_blocks",
]
