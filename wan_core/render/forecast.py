"""What is known of a render before it runs: its request, the plan, memory and seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import MemoryEstimate
    from ..job import Request
    from ..memory import SystemResources, Workload
    from ..plan import OptimizationPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Made by ``WanPipelineWrapper.foresee``."""

    request: Request
    workload: Workload
    system: SystemResources
    plan: OptimizationPlan | None
    """None where nothing fits."""
    estimate: MemoryEstimate
    """That of the plan, or of the smallest way to run the job, with ``fits`` False."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what the user should know before the run."""
        return (*self.estimate.warnings, *self.request.warnings)
