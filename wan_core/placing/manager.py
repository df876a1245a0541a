"""The planner, together with what puts its plans on modules: the public ``OptimizationManager``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from ..errors import InvalidRequest
from ..plan import OptimizationPlan, Planner
from .applied import apply_plan


class OptimizationManager(Planner):
    """Looks at the machine, recommends a plan, and puts it on a module of your own.

    All but ``apply_memory_optimizations`` is ``plan.Planner``, which never imports torch.
    """

    def apply_memory_optimizations(
        self, module: Any, plan: OptimizationPlan, component: str = "transformer"
    ) -> AbstractContextManager[str | None]:
        """Have a diffusers or transformers module of your own compute as ``plan`` says.

        For a ``with`` block; ``WanPipelineWrapper.generate`` does this for each stage.
        ``component`` is the module's name in the plan ("transformer_2", "text_encoder", "vae").
        Yields None, or what could not be carried out. The dtype is the module's own, and
        ``fp8_storage`` and windows are not put on: the first belongs to loading, the second to the
        loop. Raises InvalidRequest for a component that the plan does not name.
        """
        if component not in plan.choices.dtypes:
            raise InvalidRequest(
                f"component is {component!r}; the plan has {', '.join(plan.choices.dtypes)}.",
                field="component",
            )
        return apply_plan(module, component, plan)
