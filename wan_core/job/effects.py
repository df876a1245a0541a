"""Settings that were given but can have no effect on this job, and why: one table.

A setting counts as given when it differs from GenerationConfig's default. Nothing here is an error:
the video is right, but not for the reason the user thinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from ..config import GenerationConfig
from ..models import ModelArchitecture
from .control import has_control
from .request import Request
from .steps import expected_steps, levels_said
from .windows import DEFAULT_OVERLAP


@dataclass(frozen=True, slots=True)
class _Job:
    config: GenerationConfig
    request: Request
    architecture: ModelArchitecture

    @property
    def one_expert(self) -> bool:
        return not self.architecture.two_experts

    @property
    def frames(self) -> int:
        return self.request.num_frames

    @property
    def continued(self) -> bool:
        return self.request.window_mode == "continuation"


_ONE_EXPERT = "this model has one transformer, and only the two experts of an A14B are told apart"
_NO_VIDEO = "no mp4 is written. Set output_path"
_ONE_PIECE = "the clip is denoised in one piece. Set a max_chunk_size below its length"
_ONE_SEGMENT = "the clip is a single segment. Set a max_chunk_size below its length"
_NOT_CONTINUED = "only window_mode 'continuation' uses it"
_Test = Callable[[_Job], bool]

_IDLE: tuple[tuple[tuple[str, ...], _Test, str], ...] = (
    (("boundary", "switch_step"), lambda job: job.one_expert, _ONE_EXPERT),
    (
        ("guidance_scale_2",),
        # The same scale for both is no mistake.
        lambda job: job.one_expert and job.config.guidance_scale_2 != job.request.guidance_scale,
        _ONE_EXPERT,
    ),
    (
        ("boundary",),
        lambda job: not job.one_expert and job.config.switch_step is not None,
        "switch_step is given, which says where the experts switch",
    ),
    (
        ("prompt",),
        lambda job: job.config.prompt_embeds is not None,
        "prompt_embeds are given in its place",
    ),
    (
        ("negative_prompt",),
        lambda job: job.config.negative_prompt_embeds is not None,
        "negative_prompt_embeds are given in its place",
    ),
    (
        ("negative_prompt", "negative_prompt_embeds"),
        lambda job: not job.request.guided,
        "no guidance scale is above 1, so nothing is steered away from",
    ),
    (
        ("flow_shift", "sigma_schedule"),
        lambda job: job.config.sigmas is not None,
        "sigmas are given, which say the noise level of each step",
    ),
    (
        ("guided_scale",),
        lambda job: not job.request.guided_steps,
        "guided_steps is 0, so every step has guidance_scale",
    ),
    (
        ("seed", "noise"),
        # "lcm" draws noise for each step, too.
        lambda job: job.config.latents is not None and job.request.scheduler != "lcm",
        "latents are given, so no noise is drawn",
    ),
    (
        ("codec", "crf", "pix_fmt", "audio", "output_metadata"),
        lambda job: job.request.output_path is None,
        _NO_VIDEO,
    ),
    (
        ("journal_folder",),
        lambda job: job.request.resume is None,
        "resume is None, so no journal is kept",
    ),
    (("drift_correction",), lambda job: not job.continued, _NOT_CONTINUED),
    (
        ("control",),
        lambda job: not has_control(job.config.control),
        "it holds no video, picture, mask, camera or tracks",
    ),
    (
        ("force_chunked_processing",),
        # Of a clip as long as a video it was not known when it was asked for.
        lambda job: (
            not job.continued
            and job.config.num_frames != 0
            and (job.request.window_frames or 0) >= job.frames
        ),
        "one window holds the whole clip. Set a max_chunk_size below its length",
    ),
    (
        ("window_anchor", "window_fusion"),
        lambda job: job.continued,
        "in window_mode 'continuation' segments go on from the frames before them",
    ),
)
_ALL = 1000
"""Steps that no schedule has: an ``end_step`` from here on means "to the end"."""
_IDLE_IN_ONE_PIECE = ("window_overlap", "window_schedule", "window_fusion", "window_anchor")


def settings_without_effect(
    config: GenerationConfig, request: Request, architecture: ModelArchitecture
) -> Iterator[str]:
    """Yield a sentence for each setting that was given and cannot have an effect on this job."""
    job = _Job(config, request, architecture)
    for names, idle, why in _IDLE:
        given = [name for name in names if _given(config, name)]
        if given and idle(job):
            yield _said(given, why)
    for name in ("guidance_scale", *["guidance_scale_2"] * (not job.one_expert)):
        scale = getattr(request, name)
        if _given(config, name) and 0 < scale < 1:
            yield f"{name} {scale:g} is as 1: guidance is off from 1 down."
    yield from _beyond_the_steps(job)


def _beyond_the_steps(job: _Job) -> Iterator[str]:
    """Say which numbers of steps lie beyond the schedule, and which expert so has nothing to do."""
    config, request = job.config, job.request
    count = request.num_inference_steps
    if config.end_step is not None and count < request.end_step < _ALL:  # type: ignore[operator]
        yield _said(["end_step"], f"{request.end_step} is beyond the last of {count} steps")
    if job.one_expert:
        return
    # The whole schedule counts: a job may well make the part of it that one expert takes.
    steps = expected_steps(replace(request, start_step=0, end_step=None), 2)
    if steps.high and steps.low:
        return
    idle, busy = ("low", "high") if steps.high else ("high", "low")
    if config.switch_step is not None:
        why = f"switch_step is {request.switch_step} of {count} steps"
        cure = f"Give a step from 1 to {count - 1}"
    elif request.boundary is None:
        why = f"{job.architecture.name} is published as one transformer and has no boundary"
        cure = "Leave the second file out, or set boundary or switch_step"
    else:
        side = "at or above" if steps.high else "below"
        why = (
            f"{levels_said(request)} every step of {count} begins {side} the boundary "
            f"{request.boundary:g}"
        )
        cure = "Set switch_step"
    if count == 1 and request.boundary is not None:
        cure = "Make more steps"
    yield (
        f"The {idle}-noise expert has nothing to do: {why}, and the {busy}-noise expert takes them "
        f"all. {cure} to use both."
    )


def window_settings_without_effect(config: GenerationConfig) -> Iterator[str]:
    """The same for the settings of windows, once it is known that the clip is made in one piece.

    In continuation mode that is a single segment.
    """
    if config.window_mode == "continuation":
        given = [name for name in ("window_overlap", "drift_correction") if _given(config, name)]
        if given:
            yield _said(given, _ONE_SEGMENT)
        return
    given = [name for name in _IDLE_IN_ONE_PIECE if _given(config, name)]
    if config.noise == "freenoise" and config.latents is None:
        given.append("noise 'freenoise'")
    if given:
        yield _said(given, _ONE_PIECE)


def _said(given: list[str], why: str) -> str:
    return f"{' and '.join(given)} {'has' if len(given) == 1 else 'have'} no effect: {why}."


def _given(config: GenerationConfig, name: str) -> bool:
    value = getattr(config, name)
    default: Any = _DEFAULTS[name]
    if isinstance(default, dict) or isinstance(value, str) and default is None:
        return bool(value)  # an empty text is as good as none
    return value is not None and (default is None or value != default)


_DEFAULTS: dict[str, Any] = {
    found.name: {} if found.name == "output_metadata" else found.default
    for found in fields(GenerationConfig)
} | {"window_overlap": DEFAULT_OVERLAP}
