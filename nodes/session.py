"""The renders of this session: settings, what was predicted, what was measured. No ComfyUI here."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..wan_core.config import GIB

if TYPE_CHECKING:
    from ..wan_core.config import VideoGenerationResult
    from ..wan_core.job import Request
    from ..wan_core.models import ModelArchitecture
    from ..wan_core.plan import OptimizationPlan

KEPT = 50
"""So many renders, the latest, are told."""
_PROMPT = 300


class Session:
    """Keeps what the latest renders were; written by one thread, read by others."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._renders: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._number = 0

    @contextmanager
    def render(
        self, node: str | None, request: Request, plan: OptimizationPlan,
        architecture: ModelArchitecture,
    ) -> Iterator[Callable[[VideoGenerationResult, dict[str, str] | None], None]]:  # fmt: skip
        """Note a render, for the ``with`` block; yields what is to be called with its result.

        Beside the result it takes the clip as the page asks for it. A block that ends otherwise was
        interrupted.
        """
        began = self._clock()
        entry = _settings(node, request, plan, architecture) | {"began": began, "state": "running"}
        with self._lock:
            self._number += 1
            entry["number"] = self._number
            self._renders.append(entry)
        more: dict[str, Any] = {"state": "interrupted"}

        def ended(result: VideoGenerationResult, clip: dict[str, str] | None) -> None:
            more.update(_outcome(result), clip=clip)

        try:
            yield ended
        finally:
            with self._lock:
                entry.update(more, ended=self._clock())

    def told(self) -> list[dict[str, Any]]:
        """Return the renders as plain values, the latest first."""
        with self._lock:
            return [dict(entry) for entry in reversed(self._renders)]


SESSION = Session()
"""That of this ComfyUI."""


def _settings(
    node: str | None, request: Request, plan: OptimizationPlan, architecture: ModelArchitecture
) -> dict[str, Any]:
    two = architecture.two_experts
    on_cpu = plan.device == "cpu"
    return {
        "node": node,
        "model": f"{architecture.variant.title}, {architecture.weight_kind}",
        "prompt": request.prompt[:_PROMPT],
        "width": request.width,
        "height": request.height,
        "frames": request.wanted_frames,
        "fps": request.fps,
        "steps": request.num_inference_steps - request.start_step,
        "guidance": [request.guidance_scale, *[request.guidance_scale_2] * two],
        "seed": str(request.seed),  # larger than the page's numbers are exact
        "choices": list(plan.applied),
        # What a computer without a card takes is not predicted well enough to be told.
        "predicted_seconds": None if on_cpu else plan.seconds,
        "predicted_gib": max((one.device_bytes for one in plan.estimate.stages), default=0) / GIB,
        "where": "RAM" if on_cpu else plan.device,
    }


def _outcome(result: VideoGenerationResult) -> dict[str, Any]:
    stages = [
        {
            "name": stage.name.replace("_", " "),
            "seconds": stage.seconds,
            "predicted_gib": _gib(stage.predicted_peak_bytes),
            "measured_gib": _gib(stage.measured_peak_bytes),
        }
        for stage in result.stages
    ]
    return {
        "state": "done" if result.success else "failed",
        "seconds": result.generation_time,
        "measured_gib": max((one["measured_gib"] or 0 for one in stages), default=0) or None,
        "stages": stages,
        "resumed": result.metadata.get("resumed"),
        "errors": [str(text)[:500] for text in result.errors],
        "warnings": [str(text)[:500] for text in result.warnings],
    }


def _gib(count: int | None) -> float | None:
    return None if count is None else count / GIB
