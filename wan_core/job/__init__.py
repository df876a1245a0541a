"""From a GenerationConfig to a Request: defaults filled in and every field checked before loading.

In: a ``GenerationConfig`` and a ``ModelArchitecture``. Out: a ``Request``, and the arithmetic that
the denoising loop follows (windows, steps, prompt parts, noise). Imports ``models`` and the
packages below it; torch and diffusers only inside the functions that make noise and schedulers.
"""

from __future__ import annotations

from .noise import NOISES, draw_noise
from .request import AUDIO_RATES, MAX_LATENT_FRAMES, MODES, PIXEL_FORMATS, Request, resolve
from .steps import SCHEDULERS, StepPlan, make_scheduler, plan_steps
from .windows import (
    FRAMES_PER_LATENT,
    FUSIONS,
    SCHEDULES,
    Window,
    WindowPlan,
    latent_frames,
    latent_index,
    plan_windows,
    round_up_frames,
    video_frames,
)

__all__ = [
    "AUDIO_RATES",
    "FRAMES_PER_LATENT",
    "FUSIONS",
    "MAX_LATENT_FRAMES",
    "MODES",
    "NOISES",
    "PIXEL_FORMATS",
    "Request",
    "SCHEDULERS",
    "SCHEDULES",
    "StepPlan",
    "Window",
    "WindowPlan",
    "draw_noise",
    "latent_frames",
    "latent_index",
    "make_scheduler",
    "plan_steps",
    "plan_windows",
    "resolve",
    "round_up_frames",
    "video_frames",
]
