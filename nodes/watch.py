"""What the page is told while a clip is made: step, time left, expert, memory, a moving preview.

Does not import ComfyUI.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..wan_core.config import GIB
from ..wan_core.job import expected_steps

if TYPE_CHECKING:
    from torch import Tensor

    from ..wan_core.job import Request
    from ..wan_core.models import ModelArchitecture
    from ..wan_core.plan import OptimizationPlan

PREVIEW_SHARE, PREVIEW_PAUSE = 0.05, 0.5
"""Previews may take this share of the time, and come at most once in so many seconds."""
_RECENT = 5
"""So many of the latest steps say how long the next ones take."""


class Watch:
    """Turns the signals of a render into messages for the page.

    ``tell`` sends a message, ``memory`` returns (bytes used now, where), ``preview`` turns clean
    latents and the clip's seconds into a data: URL; None where there is no decoder for them.
    """

    def __init__(
        self,
        request: Request,
        plan: OptimizationPlan,
        architecture: ModelArchitecture,
        tell: Callable[[dict[str, Any]], object],
        memory: Callable[[], tuple[int, str]],
        preview: Callable[[Tensor, float], str] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell, self._memory, self._preview, self._clock = tell, memory, preview, clock
        self._plan, self._seconds = plan, request.num_frames / request.fps
        self._planned = {stage.name: stage.device_bytes for stage in plan.estimate.stages}
        self._two = architecture.two_experts
        self._start = request.start_step
        self._every = request.num_inference_steps - request.start_step
        self._switch = expected_steps(request, 2).switch if self._two else 0
        self._paces: deque[float] = deque(maxlen=_RECENT)
        self._total, self._done = self._every, 0
        self._began = self._last = clock()
        self._stage = ""
        self._decoding = 0.0
        self._preview_at, self._preview_cost = float("-inf"), 0.0

    def step(self, done: int, total: int, clean: Tensor) -> None:
        """Tell of a finished step; ``clean`` is what the clip is expected to become."""
        now = self._clock()
        # The first step of a stage includes warm-up, or reading the next expert's weights.
        if self._stage == self._stage_of(done - 1) and done > 1:
            self._paces.append(now - self._last)
        self._last, self._total, self._done = now, total, done
        self._stage = self._stage_of(done - 1)
        message = self._message(self._stage, done) | self._moving(clean, last=done >= total)
        self._tell(message)

    def decoded(self, done: int, total: int) -> None:
        """Tell how many frames are decoded."""
        now = self._clock()
        if self._stage != "decode":
            self._stage, self._decoding = "decode", self._last
        spent = now - self._decoding
        message = self._message("decode", self._done) | {"frames": [done, total]}
        message["left"] = spent * (total - done) / max(done, 1)
        self._tell(message)

    def window(self, index: int, count: int) -> None:
        """Tell which window or segment, of how many, is worked on."""
        if count > 1:
            message = self._message(self._stage_of(self._done), self._done)
            self._tell(message | {"window": [index + 1, count]})

    def loaded(self, component: str, done: int, total: int) -> None:
        """Tell which part of the model is read."""
        reading = {"part": component.replace("_", " "), "gib": [done / GIB, total / GIB]}
        self._tell(self._message(self._stage or "reading", self._done) | {"reading": reading})

    def _stage_of(self, step: int) -> str:
        if not self._two:
            return "denoise"
        high = self._start + step % max(self._every, 1) < self._switch
        return "denoise_high" if high else "denoise_low"

    def _message(self, stage: str, done: int) -> dict[str, Any]:
        used, where = self._memory()
        planned = self._planned.get(stage, self._planned.get("denoise"))
        return {
            "stage": stage,
            "step": done,
            "steps": self._total,
            "expert": {"denoise_high": "high noise", "denoise_low": "low noise"}.get(stage),
            "step_seconds": self.pace,
            "spent": self._clock() - self._began,
            "left": self.left,
            "only_steps": self._plan.device == "cpu",
            "memory": {
                "now_gib": used / GIB,
                "plan_gib": None if planned is None else planned / GIB,
                "where": where,
            },
        }

    @property
    def pace(self) -> float | None:
        """Seconds of a step as measured; None before there is one."""
        return sum(self._paces) / len(self._paces) if self._paces else None

    @property
    def left(self) -> float | None:
        """Seconds until the clip is there: the plan's, in the proportion that steps really take."""
        plan, pace, missing = self._plan, self.pace, self._total - self._done
        # What a computer without a card takes is not predicted well enough: only its steps count.
        if plan.device == "cpu" or not plan.step_seconds:
            return None if pace is None else pace * missing
        rest = max(0.0, plan.seconds - plan.step_seconds * self._total)
        if pace is None:
            return plan.step_seconds * missing + rest
        return pace * missing + rest * pace / plan.step_seconds

    def _moving(self, clean: Tensor, last: bool) -> dict[str, str]:
        now = self._clock()
        pause = max(PREVIEW_PAUSE, self._preview_cost / PREVIEW_SHARE)
        if self._preview is None or (now - self._preview_at < pause and not last):
            return {}
        made = self._preview(clean, self._seconds)  # "" where it failed
        self._preview_at = self._clock()
        self._preview_cost = self._preview_at - now
        return {"preview": made} if made else {}
