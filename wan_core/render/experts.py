"""An expert in its place for a stage: in this process, or in the workers that the plan wants.

And what a result says of the job before any stage.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from ..errors import WorkerFailed
from ..forward import run_together
from ..job import Request, latent_index
from ..journal import device_name, versions
from ..sampling import Expert
from ..workers import Experts, WorkerPool
from .stages import StageRunner


def _not_here(*_: object, **__: object) -> Any:
    raise AssertionError("this expert computes in the workers")


@contextmanager
def expert_in_place(
    stages: StageRunner, name: str, stage: str, component: str, guidance_scale: float,
    plain: bool, ahead: AbstractContextManager[None],
) -> Iterator[Expert]:  # fmt: skip
    """Enter a stage with its expert ready to compute.

    ``plain`` leaves out LoRAs that are distilled to a few steps. ``ahead``, which reads what comes
    next, is entered when the expert is in its place: in workers, when the first unit is done.
    Workers take the weights off their devices again before the stage ends.
    """
    expert = Expert(
        name=name, model=_not_here, dtype=stages.dtype(component), guidance_scale=guidance_scale
    )
    if stages.plan.workers:
        with (
            stages.timeline.stage(stage) as report,
            in_workers(stages) as pool,
            ExitStack() as stack,
        ):
            report.note = f"on {len(stages.plan.workers)} workers"
            begun = cache(partial(stack.enter_context, ahead))
            elsewhere = Experts(pool, stages.weights(component, distilled=not plain), begun)
            yield replace(expert, elsewhere=elsewhere)
        return
    with stages.use(stage, component, distilled=not plain) as model, ahead:
        together = run_together if stages.plan.choices.stream else None
        yield replace(expert, model=model, together=together)


@contextmanager
def in_workers(stages: StageRunner) -> Iterator[WorkerPool]:
    """Make room for the workers on this process's card; they give back theirs at the end."""
    pool = stages.workers()
    # The first worker computes on this process's card.
    stages.cache.release_device()
    if stages.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        try:
            yield pool
        except BaseException:
            # What ended the stage is what is told, whatever becomes of the workers meanwhile.
            with suppress(WorkerFailed):
                pool.release()
            raise
        pool.release()
    finally:
        stages.result.metadata["workers"] = pool.describe()
        for note in pool.notes:
            stages.say_once(note)


def describe_job(stages: StageRunner, request: Request) -> None:
    """Put the job's settings, the plan and the versions into the result's metadata."""
    settings = (
        "seed", "width", "height", "fps", "num_inference_steps", "guidance_scale",
        "guidance_scale_2", "flow_shift", "scheduler", "sigma_schedule", "sigmas",
        "guided_steps", "prompt", "negative_prompt",
    )  # fmt: skip
    window, asked = stages.plan.choices.window_frames, request.window_frames
    if window is not None and (asked is None or window < asked):
        stages.result.warnings.append(
            f"Made in windows of {stages.plan.choices.window_frames} frames, which changes the "
            "result: the clip does not fit as a whole."
        )
    on_card = stages.device.type == "cuda"
    stages.result.metadata |= {
        "model": stages.architecture.variant.title,
        "variant": stages.architecture.name,
        "loras": [found.describe() for found in stages.architecture.loras],
        **{name: getattr(request, name) for name in settings},
        "num_frames": request.wanted_frames,
        "device": device_name(stages.device),
        "plan": list(stages.plan.reasons),
        "versions": versions(),
        "memory_origin": "predicted from headers and shapes; measured "
        + ("by the allocator" if on_card else "as the process's RAM"),
    }


def unseen_texts(request: Request, middles: Iterable[int]) -> Iterator[str]:
    """Say which texts of a clip none of its windows or segments has at its middle.

    ``middles`` are latent frames of the clip.
    """
    starts = [latent_index(part.start) for part in request.prompts]
    seen = {bisect(starts, middle) - 1 for middle in middles}
    for number, part in enumerate(request.prompts):
        if number not in seen and part.start < request.num_frames:
            yield (
                f"prompts: {part.text!r} is not seen: a window has the text at its middle. Give "
                "it more frames, or set a smaller max_chunk_size."
            )
