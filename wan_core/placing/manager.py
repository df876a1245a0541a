"""The public ``OptimizationManager``: the planner, and a method that applies its plans."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

from ..errors import InvalidRequest
from ..forward import why_no_lean
from ..plan import ABILITIES, OptimizationPlan, Planner
from .applied import apply_plan


class OptimizationManager(Planner):
    """Looks at the machine, recommends a plan, and applies it to a module of your own.

    Everything but ``apply_memory_optimizations`` comes from ``plan.Planner``, which never imports
    torch. ``abilities`` is what plans may use, see there. None stands for what can be carried out
    here: all of them, without "lean" and "rows" where the installed diffusers computes in a way
    that the lean forward is not known to equal.
    """

    def __init__(self, abilities: Collection[str] | None = None) -> None:
        if abilities is None:
            abilities = ABILITIES if why_no_lean() is None else ABILITIES - {"lean", "rows"}
        super().__init__(abilities)

    def apply_memory_optimizations(
        self, module: Any, plan: OptimizationPlan, component: str = "transformer"
    ) -> AbstractContextManager[str | None]:
        """Have a diffusers or transformers module of your own compute as ``plan`` says.

        Returns a context manager, which ``WanPipelineWrapper.generate`` enters for each stage. It
        yields None, or a sentence saying what could not be carried out. ``component`` is the
        module's name in the plan ("transformer_2", "text_encoder", "vae").

        The module keeps its own dtype. ``fp8_storage`` and windows are not applied: storage is
        decided when the weights are loaded, and windows belong to the denoising loop. Raises
        InvalidRequest for a component that the plan does not name.
        """
        if component not in plan.choices.dtypes:
            raise InvalidRequest(
                f"component is {component!r}; the plan has {', '.join(plan.choices.dtypes)}.",
                field="component",
            )
        return apply_plan(module, component, plan)
