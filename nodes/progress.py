"""One progress bar for a whole run, with a preview of the frames being made. No ComfyUI here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..wan_core.job import latent_index, plan_segments, plan_windows

if TYPE_CHECKING:
    from torch import Tensor

    from ..wan_core.config import GenerationConfig
    from ..wan_core.job import Request
    from ..wan_core.plan import OptimizationPlan
    from .watch import Watch

DECODE = 0.1
"""Length of the bar for decoding, as a fraction of the length for all steps."""
LOADING_SECONDS = 0.5
"""Weights that are read faster than this are not shown."""


class Progress:
    """Listens to a render and calls ``show`` (done, total, latents to show or None), in steps.

    The latents shown begin with the frames being made: the second half of the current window, or
    the first new frame of the current segment. Between steps they are kept on the CPU, so that they
    take no device memory. A ``watch`` is told the same, with all frames.
    """

    def __init__(
        self,
        request: Request,
        plan: OptimizationPlan,
        config: GenerationConfig,
        show: Callable[[float, float, Tensor | None], object],
        watch: Watch | None = None,
    ) -> None:
        self._config, self._show, self._watch = config, show, watch
        self._continued = request.window_mode == "continuation"
        self._windows = None
        self._new = [0]
        """Per segment: the index of its first frame that is not taken from the segment before."""
        if self._continued:
            self._new = _new_frames(request, plan, config)
        elif plan.choices.window_frames is not None:
            windows = plan_windows(
                request.latent_frames,
                window=plan.choices.window_frames,
                overlap=plan.choices.window_overlap,
                schedule=request.window_schedule,
                fusion=request.window_fusion,
            )
            self._windows = windows if windows.count > 1 else None
        self._steps = (request.num_inference_steps - request.start_step) * len(self._new)
        self._done = self._segment = 0
        self._shown_at = 0.0
        self._clean: Tensor | None = None
        self._loading, self._since = "", 0.0

    def listen(self) -> None:
        """Set this object's methods as the callbacks of the GenerationConfig."""
        self._config.preview_callback = self._step
        self._config.chunk_callback = self._chunk
        self._config.decode_callback = self._decoded
        self._config.load_callback = self._loaded

    def _step(self, done: int, total: int, clean: Tensor) -> None:
        self._done, self._steps = done, total
        if self._watch is not None:
            self._watch.step(done, total, clean)
        if self._continued:
            # A smaller plan, made after running out of memory, may have other segments.
            first = self._new[min(self._segment, len(self._new) - 1)]
            self._say(done, clean[:, :, min(first, clean.shape[2] - 1) :])
            return
        self._say(done, _frames(clean, self._shown(done - 1, -1)))
        self._clean = clean.cpu() if self._windows is not None and done < total else None

    def _chunk(self, index: int, count: int) -> None:
        if self._watch is not None:
            self._watch.window(index, count)
        if self._continued:
            self._segment = index
            return
        clean = self._clean
        shown = None if clean is None else _frames(clean, self._shown(self._done, index))
        self._say(self._done + index / count, shown)

    def _decoded(self, done: int, total: int) -> None:
        if self._watch is not None:
            self._watch.decoded(done, total)
        self._say(self._steps * (1 + DECODE * done / total), None)

    def _loaded(self, component: str, done: int, total: int) -> None:
        """Have the bar go from end to end while a component is read, and then back to the run."""
        if component != self._loading:
            self._loading, self._since = component, time.monotonic()
        slow = time.monotonic() - self._since >= LOADING_SECONDS
        if self._watch is not None and slow:
            self._watch.loaded(component, done, total)
        if done < total and slow:
            self._show(round(done / total, 3), 1, None)
        elif done >= total:
            self._loading = ""
            if slow:
                self._say(self._shown_at, None)

    def _say(self, done: float, latents: Tensor | None) -> None:
        self._shown_at = done
        self._show(round(done, 2), round(self._steps * (1 + DECODE), 2), latents)

    def _shown(self, step: int, index: int) -> Sequence[int] | None:
        """Return the frames of a window from its middle on; None for a clip without windows."""
        if self._windows is None:
            return None
        windows = self._windows.windows(step)
        indices = windows[min(index, len(windows) - 1)].indices
        return indices[len(indices) // 2 :]


def _frames(clean: Tensor, indices: Sequence[int] | None) -> Tensor:
    return clean if indices is None else clean[:, :, list(indices)]


def _new_frames(request: Request, plan: OptimizationPlan, config: GenerationConfig) -> list[int]:
    """Return per segment the index, within it, of its first frame that is newly made."""
    known = 0 if config.continue_from is None else int(config.continue_from.shape[2])
    texts = [latent_index(part.start) for part in request.prompts]
    ranges = plan_segments(
        request.latent_frames, known, plan.choices.window_frames, plan.choices.window_overlap, texts
    ).ranges
    ends = [known, *(frames.stop for frames in ranges)]
    return [end - frames.start for end, frames in zip(ends, ranges, strict=False)]
