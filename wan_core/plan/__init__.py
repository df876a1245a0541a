"""The fastest way that fits, and why.

In: model, ``Workload``, ``SystemResources`` and the user's ``OptimizationConfig``. Out: an
``OptimizationPlan`` with its estimate, its predicted seconds and a reason for each decision, or
``DoesNotFit``. Pure: it allocates nothing and never imports torch.
"""

from __future__ import annotations

from ..lazy import lazy_names
from .config import FORWARDS, FP8, OFFLOADS, OptimizationConfig
from .manager import Planner
from .plan import OptimizationPlan

# Its old place: what puts a plan on a module stands below the planner.
__getattr__ = lazy_names("wan_core", {"placing": ("OptimizationManager",)})

__all__ = [
    "FORWARDS",
    "FP8",
    "OFFLOADS",
    "OptimizationConfig",
    "OptimizationPlan",
    "Planner",
]
