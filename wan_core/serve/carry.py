"""One job carried out: its model opened, its clip made, and what became of it as plain values.

The same class works in this process, in one of its own and on another machine. An ``Outcome`` holds
no tensor and no frame: the clip is a file, and goes through nobody's memory but the maker's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import VideoGenerationResult
from ..errors import (
    DoesNotFit,
    InvalidRequest,
    MissingDependency,
    ModelFileError,
    ModelMismatch,
    UnsupportedModel,
    WanError,
    first_line,
)
from ..files import make_folder
from ..plan import OptimizationPlan
from ..render import WanPipelineLoader
from .jobs import BatchJob

_FINAL = (
    InvalidRequest, DoesNotFit, MissingDependency, ModelFileError, ModelMismatch, UnsupportedModel,
)  # fmt: skip
"""Errors that the same job on the same machine would meet again."""
_STEPS, _ALL = 95, 99
"""Percent when the last step is made, and when the last frame is decoded; 100 is the file."""
MOST_LOSSES = 3
"""So often may the process of a job die under it before the job is thought to be the cause."""


class _Stopped(Exception):
    """The job is not wanted any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a try. Without ``error`` the clip is there."""

    error: str = ""
    kind: str = ""
    """Name of the error's class."""
    final: bool = False
    """Whether another try would meet the same error."""
    stopped: bool = False
    """Whether it was ended because nobody wants it any more."""
    lost: bool = False
    """Whether what carried it out died; its journal is there, and another goes on from it."""
    warnings: list[str] = field(default_factory=list)
    seed: Any = None
    prompt: str = ""
    size: int = 0
    """Bytes of the clip."""
    seconds: float = 0.0
    resumed: str = ""
    """From where an earlier render of the same job was gone on with; empty where it began anew."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage of the render."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; ``Outcome(**values)`` is the same again."""
        return asdict(self)


class Carrier:
    """Opens models and carries out jobs, one at a time; the last model that was opened is kept.

    ``place`` are fields of ``OptimizationConfig`` that say where it computes, and go before those
    of a job; None takes a field out of the job.
    """

    def __init__(self, place: Mapping[str, Any] | None = None) -> None:
        self._place = dict(place or {})
        self._loader = WanPipelineLoader()
        self._wrapper: tuple[str, Any] = ("", None)

    def open(self, job: BatchJob) -> Any:
        """Return the model of a job, from its headers."""
        from ..detect import parse_lora

        if self._wrapper[0] != job.group:
            wishes = {**job.optimization, **self._place}
            wrapper = self._loader.load_wan_pipeline(
                job.model,
                optimization_config={n: v for n, v in wishes.items() if v is not None},
                loras=[parse_lora(text) for text in job.loras],
                use_recipe=job.use_recipe,
            )
            self._wrapper = (job.group, wrapper)
        return self._wrapper[1]

    def give_back(self) -> None:
        """Leave this process' card to others until the next job."""
        self._loader.release_device()

    def carry_out(
        self,
        job: BatchJob,
        progress: Callable[[int], object] | None = None,
        stopped: Callable[[], bool] | None = None,
        decoding: Callable[[], object] | None = None,
    ) -> Outcome:
        """Make a job's clip. Only an interrupt of the process itself is raised.

        ``progress`` is called with percent, ``stopped`` between transformer blocks and decoded
        chunks, ``decoding`` when the decode has begun and needs no card but this process' own: the
        finished latents are on disk then, and the other cards free.
        """
        began = time.perf_counter()
        error: Exception | None = None
        result: VideoGenerationResult | None = None
        try:
            make_folder(job.output.parent)
            wrapper = self.open(job)
            config = job.config(wrapper.architecture.variant.defaults)
            if decoding is not None and _decodes_on_all(wrapper.plan(config)[1]):
                decoding = None
            _watch(config, progress, stopped, decoding)
            result = wrapper.generate(config)
        except Exception as err:  # noqa: BLE001 - whatever one job does, the others go on
            error = err
        seconds = round(time.perf_counter() - began, 3)
        if result is None:
            return _failed(error, seconds)
        return _made(job, result, seconds)


def _decodes_on_all(plan: OptimizationPlan) -> bool:
    """Say whether other cards work in the decode too, or right after it, to try that."""
    return plan.decode_strips > 1 or plan.decode_trial > 0


def _watch(
    config: Any, progress: Callable[[int], object] | None, stopped: Callable[[], bool] | None,
    decoding: Callable[[], object] | None,
) -> None:  # fmt: skip
    told: list[bool] = []

    def decoded(done: int, total: int) -> None:
        if decoding is not None and not told:
            told.append(True)
            decoding()
        if progress is not None:
            progress(_STEPS + (_ALL - _STEPS) * done // max(1, total))

    config.decode_callback = decoded
    if progress is not None:
        tell = progress
        config.progress_callback = lambda done, total, _: tell(_STEPS * done // max(1, total))
    if stopped is not None:
        asked = stopped

        def check() -> None:
            if asked():
                raise _Stopped

        config.interrupt_check = check


def _failed(error: BaseException | None, seconds: float) -> Outcome:
    expected = isinstance(error, WanError | OSError)
    text = str(error) if expected else f"{type(error).__name__}: {first_line(error or Exception())}"
    return Outcome(
        error=text or type(error).__name__,
        kind=type(error).__name__,
        final=isinstance(error, _FINAL),
        stopped=isinstance(error, _Stopped),
        seconds=seconds,
    )


def _made(job: BatchJob, result: VideoGenerationResult, seconds: float) -> Outcome:
    size, error = 0, result.error
    if error is None:
        try:
            size = job.output.stat().st_size
        except OSError as err:
            error = err
    ended = Outcome() if error is None else _failed(error, seconds)
    values = ended.to_dict() | {
        "warnings": list(result.warnings),
        "seed": result.metadata.get("seed", job.values.get("seed", 0)),
        "prompt": str(result.metadata.get("prompt") or ""),
        "size": size,
        "resumed": str(result.metadata.get("resumed", "")),
        "seconds": seconds,
        "stages": {stage.name: round(stage.seconds, 3) for stage in result.stages},
    }
    return Outcome(**values)
