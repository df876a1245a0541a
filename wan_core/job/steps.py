"""The steps of a render: its settings, diffusers' schedulers, and the steps of each expert.

Only schedulers and timesteps; no models. All of it is flow matching: sigma in [0, 1], timestep =
1000 sigma, x_t = (1 - sigma) x_0 + sigma noise (Lipman et al. 2023). The flow shift s maps sigma to
s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, eq. 23).
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..config import GenerationConfig
from ..errors import CorruptFile, InvalidRequest
from ..models import VARIANTS, Defaults, ModelArchitecture, Variant
from .fields import choice, falling, real, text, whole
from .noise import NOISES

MAX_SEED = 2**64 - 1
SCHEDULERS = ("unipc", "euler", "dpm++2m", "lcm", "res_multistep")
"""Names that can be asked for; UniPC is what Wan's authors and diffusers use."""
SIGMA_SCHEDULES = ("official", "simple")
"""Where the noise levels of the steps come from: ``official`` as diffusers' scheduler of that name
has them, ``simple`` as ComfyUI's, and then also with its solver (``sampling.solvers``)."""

LAST_SIGMA = 0.001
"""Where ComfyUI's UniPC ends in place of 0. It then takes the result for 1 - 0.001 of the clip."""
_APART = 1e-6
"""Of its levels, the least relative distance: they are computed with in float32."""

DIFFUSERS_SCHEDULERS = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
}
"""Those that diffusers has, and its classes, which the official schedule uses."""


def make_scheduler(
    name: str, flow_shift: float, saved_config: Mapping[str, Any] | None = None
) -> Any:
    """Make a new diffusers scheduler for one run.

    ``saved_config`` is the model folder's ``scheduler_config.json``. If it is of the class asked
    for, its settings are kept except for the flow shift and the prediction type; else it is not
    used. Raises InvalidRequest for a name that diffusers has no scheduler for, CorruptFile for
    settings that its class does not take.
    """
    if name not in DIFFUSERS_SCHEDULERS:
        raise InvalidRequest(
            f"scheduler is {name!r}; those of diffusers are {', '.join(DIFFUSERS_SCHEDULERS)}.",
            field="scheduler",
        )
    import diffusers

    cls = getattr(diffusers, DIFFUSERS_SCHEDULERS[name])
    saved = dict(saved_config or {})
    same_class = saved.get("_class_name") == cls.__name__
    config: dict[str, Any] = saved if same_class else {"num_train_timesteps": 1000}
    _check_saved(cls, config)
    if name == "euler":
        config["shift"] = flow_shift
    else:
        config |= {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": flow_shift,
        }
    if "use_dynamic_shifting" in config:  # the flow shift is the job's
        config["use_dynamic_shifting"] = False
    try:
        scheduler = cls.from_config(config)
        cls.from_config(config).set_timesteps(2)
    except (TypeError, ValueError, ArithmeticError, LookupError, NotImplementedError) as err:
        raise _bad_settings(str(err).partition("\n")[0][:200]) from err
    return scheduler


def _check_saved(cls: Any, config: Mapping[str, Any]) -> None:
    """Refuse settings of another type than the class has, and steps that Wan was not trained at.

    They come from a file. Some would fail in the middle of a render, others change the clip.
    """
    for name, known in inspect.signature(cls.__init__).parameters.items():
        value, default = config.get(name), known.default
        if name not in config or value is None or default is None or default is known.empty:
            continue
        takes = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, takes) or isinstance(value, bool) != isinstance(default, bool):
            raise _bad_settings(f"{name} is {value!r}; {default!r} is what it looks like")
    trained = config.get("num_train_timesteps", 1000)
    if trained != 1000:
        raise _bad_settings(f"num_train_timesteps is {trained!r}; Wan was trained at 1000")


def _bad_settings(why: str) -> CorruptFile:
    return CorruptFile(
        f"The model's scheduler_config.json cannot be used: {why}. Restore the file from the "
        "model's download."
    )


def shifted(sigma: float, flow_shift: float) -> float:
    """Return a noise level moved by the flow shift (Esser et al. 2024, eq. 23)."""
    return flow_shift * sigma / (1 + (flow_shift - 1) * sigma)


def solver_sigmas(
    scheduler: str, schedule: str, steps: int, flow_shift: float, given: Sequence[float] = ()
) -> tuple[float, ...] | None:
    """Return the noise levels of a solver of our own, 0 at the end; None where diffusers has one.

    ``given`` are levels that were asked for one by one. ``simple`` takes every (1000/steps)-th
    level of the 1000 that the model was trained at, from the largest on; ComfyUI takes one step
    more for UniPC and leaves out its last level. ``official`` has ``steps`` equal parts from 1 to
    1/1000, without the last, as Wan's own code.
    """
    if given:
        return (*given, 0.0)
    if schedule == "simple":
        count = steps + 1 if scheduler == "unipc" else steps
        levels = [(1000 - int(index * (1000 / count))) / 1000 for index in range(steps)]
    elif scheduler in DIFFUSERS_SCHEDULERS:
        return None
    else:
        levels = [1 - index * (1 - 1 / 1000) / steps for index in range(steps)]
    return (*(shifted(level, flow_shift) for level in levels), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Which steps a run takes, and which expert takes them. Steps count from 0."""

    start: int
    end: int
    switch: int
    """First step of the low-noise expert; equal to ``end`` where there is only one expert."""
    timesteps: tuple[float, ...]

    @property
    def high(self) -> range:
        """Steps of the only or the high-noise expert."""
        return range(self.start, max(self.start, min(self.switch, self.end)))

    @property
    def low(self) -> range:
        """Steps of the low-noise expert; empty where there is only one expert."""
        return range(max(self.start, min(self.switch, self.end)), self.end)

    def passes(
        self, request: Any, *, two_experts: bool
    ) -> Iterator[tuple[str, str, range, float, bool]]:
        """Yield (expert, component, its steps, guidance scale, without distilled LoRAs).

        An expert has two passes where a Request's first steps are made without those LoRAs.
        """
        for name, component, wanted, scale in (
            ("high" if two_experts else "only", "transformer", self.high, request.guidance_scale),
            ("low", "transformer_2", self.low, request.guidance_scale_2),
        ):
            middle = min(max(wanted.start, request.guided_steps), wanted.stop)
            if middle > wanted.start:
                yield name, component, range(wanted.start, middle), request.guided_scale, True
            if wanted.stop > middle:
                yield name, component, range(middle, wanted.stop), scale, False

    def describe(self) -> str:
        """Say in words which steps each expert takes, counted from 1."""
        if not self.low:
            return f"steps {self.start + 1}-{self.end}"
        if not self.high:
            return f"steps {self.start + 1}-{self.end}, low-noise expert only"
        return (
            f"steps {self.start + 1}-{self.switch} high-noise, "
            f"{self.switch + 1}-{self.end} low-noise (switch at timestep "
            f"{self.timesteps[self.switch]:.0f})"
        )


def expected_steps(request: Any, experts: int) -> StepPlan:
    """Return the steps that a Request is expected to take, without torch and without a scheduler.

    The timesteps are those of diffusers' schedulers with their own settings. A saved scheduler
    config may say otherwise, so that the run plans its steps by the scheduler itself.
    """
    exact = request.scheduler == "euler" or _own_levels(request) is not None
    cut = (lambda t: t) if exact else int
    return plan_steps(
        [float(cut(1000 * sigma)) for sigma in _expected_levels(request)],
        experts=experts,
        boundary=request.boundary,
        switch_step=request.switch_step,
        start_step=request.start_step,
        end_step=request.end_step,
    )


def _own_levels(request: Any) -> tuple[float, ...] | None:
    return solver_sigmas(
        request.scheduler, request.sigma_schedule, request.num_inference_steps,
        request.flow_shift, request.sigmas,
    )  # fmt: skip


def _expected_levels(request: Any) -> Sequence[float]:
    """Return the noise level before each step of a Request."""
    own = _own_levels(request)
    if own is not None:
        return own[:-1]
    return expected_sigmas(request.scheduler, request.flow_shift, request.num_inference_steps)


def expected_sigmas(scheduler: str, shift: float, steps: int) -> list[float]:
    """Return the noise level before each step, 1 = noise: ``set_timesteps`` of diffusers' classes.

    UniPC and DPM++ space them evenly and then shift them, from 1 and from 0.999; Euler ends with
    the smallest shifted one, and shifts again.
    """
    if scheduler == "euler":
        last = shifted(1 / 1000, shift)
        return [shifted(1 + (last - 1) * i / max(1, steps - 1), shift) for i in range(steps)]
    if scheduler == "dpm++2m":
        return [shifted(0.999 * (1 - i / steps), shift) for i in range(steps)]
    even = [1 + (1 / 1000 - 1) * i / steps for i in range(steps)]
    # UniPC begins a little below 1, where its formulas would divide by zero.
    return [min(shifted(sigma, shift), 1 - 1e-6) for sigma in even]


_REDRAWN = 0.8
"""Noise of a start in which little of a video is left to see."""


def levels_said(request: Any) -> str:
    """Say in words what decides the noise level of each step of a Request."""
    if request.sigmas:
        return f"with the sigmas {', '.join(f'{level:.4g}' for level in request.sigmas)}"
    return f"at flow_shift {request.flow_shift:g}"


def start_notes(request: Any, denoise: float) -> Iterator[str]:
    """Say where a video that the clip starts from will hardly be seen in it."""
    if denoise == 1:
        yield (
            "control.denoise is 1: every step is made, from noise in which nothing of the video is "
            "left. Set it to 0.3 to 0.8 to keep more of it."
        )
        return
    sigma = _expected_levels(request)[request.start_step]
    if denoise <= 0.5 and sigma >= _REDRAWN:
        cure = "Lower sigmas keep" if request.sigmas else "A lower flow_shift keeps"
        yield (
            f"control.denoise is {denoise:g}, and {levels_said(request)} that begins with noise of "
            f"sigma {sigma:.2f}: little of the video is left. {cure} more."
        )


def checked_end(count: int, start_step: int, end_step: int | None) -> int:
    """Return the step before which a run of ``count`` steps ends; it must lie after its start."""
    end = count if end_step is None else min(end_step, count)
    if not 0 <= start_step < end:
        raise InvalidRequest(
            f"start_step is {start_step} and end_step {end}, of {count} steps; "
            "0 <= start_step < end_step <= steps is needed.",
            field="start_step",
        )
    return end


def plan_steps(
    timesteps: Sequence[float],
    *,
    experts: int,
    boundary: float | None,
    switch_step: int | None = None,
    start_step: int = 0,
    end_step: int | None = None,
) -> StepPlan:
    """Divide the steps between the experts as diffusers does.

    The high-noise expert takes the steps while t >= boundary * 1000; ``switch_step`` overrides the
    boundary. Raises InvalidRequest if ``start_step`` and ``end_step`` do not lie within the
    schedule.
    """
    count = len(timesteps)
    end = checked_end(count, start_step, end_step)
    if experts == 1 or (boundary is None and switch_step is None):
        switch = end
    elif switch_step is not None:
        switch = switch_step
    else:
        limit = float(boundary or 0.0) * 1000
        switch = next((i for i, t in enumerate(timesteps) if not t >= limit), count)
    return StepPlan(start=start_step, end=end, switch=switch, timesteps=tuple(timesteps))


def sampling_fields(
    config: GenerationConfig, architecture: ModelArchitecture, width: int, height: int
) -> dict[str, Any]:
    """Check the fields of the denoising loop; None becomes the variant's official value."""
    official = architecture.variant.defaults
    negative = _or(config.negative_prompt, official.negative_prompt)
    sigmas, steps = _levels(config, official)
    scale = real(_or(config.guidance_scale, official.guidance_scale), "guidance_scale", 0, 100)
    second = _or(config.guidance_scale_2, _second_scale(config, architecture.variant, scale))
    second = real(second, "guidance_scale_2", 0, 100)
    shift = _or(config.flow_shift, official.flow_shift_for(width, height))
    boundary = _or(config.boundary, official.boundary)
    switch, end, seed = config.switch_step, config.end_step, config.seed
    found = {
        "negative_prompt": text(negative, "negative_prompt", True),
        "num_inference_steps": steps,
        "sigmas": sigmas,
        **_guided(config, architecture, steps),
        "sigma_schedule": choice(
            _or(config.sigma_schedule, official.sigma_schedule), "sigma_schedule", SIGMA_SCHEDULES
        ),
        "guidance_scale": scale,
        # A single transformer has a single scale: the other decides nothing, not even whether a
        # negative prompt is encoded.
        "guidance_scale_2": second if architecture.two_experts else scale,
        "flow_shift": real(shift, "flow_shift", 0.01, 100),
        "boundary": None if boundary is None else real(boundary, "boundary", 0, 1),
        "switch_step": None if switch is None else whole(switch, "switch_step", 0, 1000),
        "scheduler": choice(_or(config.scheduler, official.scheduler), "scheduler", SCHEDULERS),
        "start_step": whole(config.start_step, "start_step", 0, 1000),
        "end_step": None if end is None else whole(end, "end_step", 1, 10_000),
        "fps": real(_or(config.fps, official.fps), "fps", 0.1, 240),
        "noise": choice(config.noise, "noise", NOISES),
        "seed": random.SystemRandom().getrandbits(32)
        if seed is None
        else whole(seed, "seed", 0, MAX_SEED),
    }
    _check_unipc(found, given=config.sigmas is not None)
    return found


def _check_unipc(fields: Mapping[str, Any], *, given: bool) -> None:
    """Refuse noise levels between which ComfyUI's UniPC would divide by zero."""
    steps, shift = fields["num_inference_steps"], fields["flow_shift"]
    levels = solver_sigmas(
        fields["scheduler"], fields["sigma_schedule"], steps, shift, fields["sigmas"]
    )
    if levels is None or fields["scheduler"] != "unipc":
        return
    for above, below in pairwise((*levels[:-1], LAST_SIGMA)):
        if below <= above * (1 - _APART):
            continue
        made = "sigmas has" if given else f"{steps} steps at flow_shift {shift:g} have"
        raise InvalidRequest(
            f"{made} a noise level {below:.8g} after {above:.8g}; with the solver 'unipc' of "
            f"ComfyUI each must be smaller than the one before, and the last is {LAST_SIGMA:g}. "
            "Make fewer steps, raise flow_shift, or choose another scheduler.",
            field="sigmas" if given else "num_inference_steps",
        )


def _guided(
    config: GenerationConfig, architecture: ModelArchitecture, steps: int
) -> dict[str, Any]:
    """Check the steps that are made without a distilled LoRA, and their guidance scale."""
    count = whole(config.guided_steps, "guided_steps", 0, 1000)
    official = VARIANTS[architecture.name].defaults.guidance_scale
    scale = real(_or(config.guided_scale, official), "guided_scale", 0, 100)
    if not count:
        return {"guided_steps": 0, "guided_scale": None}
    if not any(found.few_steps and found.lora.strength for found in architecture.loras):
        raise InvalidRequest(
            f"guided_steps is {count}, but no LoRA is in use that is known to be distilled and "
            "could be left out of them: its name or metadata must say so (lightx2v, 4steps, rcm, "
            "FusionX). Name its file so, or leave guided_steps at 0 and set guidance_scale.",
            field="guided_steps",
        )
    if count >= steps:
        raise InvalidRequest(
            f"guided_steps is {count} of {steps} steps; at least one is made with the distilled "
            "LoRA. Raise num_inference_steps, or lower guided_steps.",
            field="guided_steps",
        )
    return {"guided_steps": count, "guided_scale": scale}


def _levels(config: GenerationConfig, official: Defaults) -> tuple[tuple[float, ...], int]:
    """Return the noise levels that are given one by one, empty where there are none, and the steps.

    A distilled file's own levels hold unless something is asked for that contradicts them. With
    fewer steps than levels the first ones are taken, as rCM's authors do.
    """
    asked = config.num_inference_steps
    if config.sigmas is not None:
        sigmas = falling(config.sigmas, "sigmas", 1000)
        if asked is not None and whole(asked, "num_inference_steps", 1, 1000) != len(sigmas):
            raise InvalidRequest(
                f"num_inference_steps is {asked} and sigmas has {len(sigmas)} values; each step "
                "has one. Leave num_inference_steps out.",
                field="num_inference_steps",
            )
        return sigmas, len(sigmas)
    steps = whole(_or(asked, official.num_inference_steps), "num_inference_steps", 1, 1000)
    free = config.sigma_schedule is None and config.flow_shift is None
    return (official.sigmas[:steps] if free and steps <= len(official.sigmas) else ()), steps


def recipe_warnings(request: Any, architecture: ModelArchitecture) -> Iterator[str]:
    """Say where the request differs from the settings that a distilled file was trained for."""
    for what, recipe in architecture.recipes():
        differences = recipe.differences(request)
        if differences:
            yield (
                f"{what} is {recipe.describe()} ({recipe.reason}). This job has "
                f"{', '.join(differences)}."
            )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _second_scale(config: GenerationConfig, variant: Variant, scale: float) -> float:
    """Return the low-noise expert's guidance scale where none was given.

    It is the official one if no scale was given for either expert. If only ``guidance_scale`` was
    given, it applies to both experts, as in diffusers.
    """
    official = variant.defaults.guidance_scale_2
    return scale if config.guidance_scale is not None or official is None else official
