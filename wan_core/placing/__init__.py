"""Where a module's weights are while it computes: moved as a whole, or streamed block by block.

In: a module and an ``OptimizationPlan``. Out: a context in which the module computes as the plan
says (``apply_plan``). Whatever is attached to the module is detached at the end of the context, in
reverse order, also after an error. Imports ``plan``, ``loading`` and ``forward``.
"""

from __future__ import annotations

from .ahead import Ahead, do_ahead, files_ahead
from .applied import apply_plan, pin_budget
from .manager import OptimizationManager
from .offload import block_hooks, require_groups
from .sharing import Gathering, Sharing
from .streaming import pin_ahead, stream_blocks
from .transport import Pending

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
