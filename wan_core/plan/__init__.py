"""Decides how a model runs on this machine: the fastest choices that fit, and the reasons.

In: a ``ModelArchitecture``, a ``Workload``, ``SystemResources`` and the user's
``OptimizationConfig``. Out: an ``OptimizationPlan`` with its estimate, its predicted seconds and a
reason for each decision; ``DoesNotFit`` where nothing fits. It is pure arithmetic, allocates
nothing and never imports torch. Imports ``models`` and ``memory``.
"""

from __future__ import annotations

from ..lazy import lazy_names
from .cards import for_all_cards
from .config import FORWARDS, FP8, OFFLOADS, STEP_CACHES, OptimizationConfig
from .fits import Remedies
from .ladder import ABILITIES, Limits
from .manager import Planner
from .plan import OptimizationPlan
from .reasons import computed_in
from .strips import StripsForecast, strips_forecast

# Kept importable from here, where it used to be. It needs torch, so it is defined in ``placing``,
# which imports this package.
__getattr__ = lazy_names("wan_core", {"placing": ("OptimizationManager",)})

__all__ = [
    "ABILITIES",
    "FORWARDS",
    "FP8",
    "Limits",
    "OFFLOADS",
    "OptimizationConfig",
    "OptimizationPlan",
    "Planner",
    "Remedies",
    "STEP_CACHES",
    "StripsForecast",
    "computed_in",
    "for_all_cards",
    "strips_forecast",
]
