"""Where a module's weights are while it computes: moved as a whole, or streamed block by block.

In: a module and an ``OptimizationPlan``. Out: a context in which the module computes as the plan
says (``apply_plan``). Whatever is attached to the module is detached at the end of the context, in
reverse order, also after an error. Imports ``plan``, ``loading`` and ``forward``. Names are
resolved on first use, so that torch is not imported with the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .ahead import Ahead, do_ahead, files_ahead
    from .applied import apply_plan, pin_budget
    from .manager import OptimizationManager
    from .offload import block_hooks, require_groups
    from .sharing import Gathering, Sharing
    from .streaming import pin_ahead, stream_blocks
    from .transport import Pending

__getattr__ = lazy_names(
    __name__,
    {
        "ahead": ("Ahead", "do_ahead", "files_ahead"),
        "applied": ("apply_plan", "pin_budget"),
        "manager": ("OptimizationManager",),
        "offload": ("block_hooks", "require_groups"),
        "sharing": ("Gathering", "Sharing"),
        "streaming": ("pin_ahead", "stream_blocks"),
        "transport": ("Pending",),
    },
)

__all__ = [
    "Ahead",
    "Gathering",
    "OptimizationManager",
    "Pending",
    "Sharing",
    "apply_plan",
    "block_hooks",
    "do_ahead",
    "files_ahead",
    "pin_ahead",
    "pin_budget",
    "require_groups",
    "stream_blocks",
]
