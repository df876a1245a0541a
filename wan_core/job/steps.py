"""The steps of a render: diffusers' schedulers with the right flow shift, and each expert's steps.

Only schedulers and timesteps; no models. All of it is flow matching: sigma in [0, 1], timestep =
1000 sigma, x_t = (1 - sigma) x_0 + sigma noise (Lipman et al. 2023). The flow shift s maps sigma to
s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, eq. 23).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidRequest

SCHEDULERS = ("unipc", "euler", "dpm++2m")
"""Names that can be asked for; UniPC is what Wan's authors and diffusers use."""

_CLASS_NAMES = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
}


def make_scheduler(
    name: str, flow_shift: float, saved_config: Mapping[str, Any] | None = None
) -> Any:
    """Make a new diffusers scheduler for one run.

    ``saved_config`` is the model folder's ``scheduler_config.json``. If it is of the class asked
    for, its settings are kept except for the flow shift and the prediction type; else it is not
    used. Raises InvalidRequest for an unknown name.
    """
    if name not in _CLASS_NAMES:
        raise InvalidRequest(
            f"scheduler is {name!r}; WanFit has {', '.join(SCHEDULERS)}.", field="scheduler"
        )
    import diffusers

    cls = getattr(diffusers, _CLASS_NAMES[name])
    saved = dict(saved_config or {})
    same_class = saved.get("_class_name") == cls.__name__
    config: dict[str, Any] = saved if same_class else {"num_train_timesteps": 1000}
    if name == "euler":
        config["shift"] = flow_shift
    else:
        config |= {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": flow_shift,
        }
    return cls.from_config(config)


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
    sigmas = expected_sigmas(request.scheduler, request.flow_shift, request.num_inference_steps)
    cut = (lambda t: t) if request.scheduler == "euler" else int
    return plan_steps(
        [float(cut(1000 * sigma)) for sigma in sigmas],
        experts=experts,
        boundary=request.boundary,
        switch_step=request.switch_step,
        start_step=request.start_step,
        end_step=request.end_step,
    )


def expected_sigmas(scheduler: str, shift: float, steps: int) -> list[float]:
    """Return the noise level before each step, 1 = noise: ``set_timesteps`` of diffusers' classes.

    UniPC and DPM++ space them evenly and then shift them, from 1 and from 0.999; Euler ends with
    the smallest shifted one, and shifts again.
    """

    def shifted(sigma: float) -> float:
        return shift * sigma / (1 + (shift - 1) * sigma)

    if scheduler == "euler":
        last = shifted(1 / 1000)
        return [shifted(1 + (last - 1) * i / max(1, steps - 1)) for i in range(steps)]
    if scheduler == "dpm++2m":
        return [shifted(0.999 * (1 - i / steps)) for i in range(steps)]
    even = [1 + (1 / 1000 - 1) * i / steps for i in range(steps)]
    # UniPC begins a little below 1, where its formulas would divide by zero.
    return [min(shifted(sigma), 1 - 1e-6) for sigma in even]


_REDRAWN = 0.8
"""Noise of a start in which little of a video is left to see."""


def start_notes(request: Any, denoise: float) -> Iterator[str]:
    """Say where a video that the clip starts from will hardly be seen in it."""
    if denoise == 1:
        yield (
            "control.denoise is 1: every step is made, from noise in which nothing of the video is "
            "left. Set it to 0.3 to 0.8 to keep more of it."
        )
        return
    sigmas = expected_sigmas(request.scheduler, request.flow_shift, request.num_inference_steps)
    sigma = sigmas[request.start_step]
    if denoise <= 0.5 and sigma >= _REDRAWN:
        yield (
            f"control.denoise is {denoise:g}, and at flow_shift {request.flow_shift:g} that begins "
            f"with noise of sigma {sigma:.2f}: little of the video is left. A lower flow_shift "
            "keeps more."
        )


def plan_steps(
    timesteps: Sequence[float],
    *,
    experts: int,
    boundary: float | None,
    switch_step: int | None = None,
    start_step: int = 0,
    end_step: int | None = None,
    num_train_timesteps: int = 1000,
) -> StepPlan:
    """Divide the steps between the experts as diffusers does.

    The high-noise expert takes the steps while t >= boundary * num_train_timesteps;
    ``switch_step`` overrides the boundary. Raises InvalidRequest if ``start_step`` and
    ``end_step`` do not lie within the schedule.
    """
    count = len(timesteps)
    end = count if end_step is None else min(end_step, count)
    if not 0 <= start_step < end:
        raise InvalidRequest(
            f"start_step is {start_step} and end_step {end}, of {count} steps; "
            "0 <= start_step < end_step <= steps is needed.",
            field="start_step",
        )
    if experts == 1 or (boundary is None and switch_step is None):
        switch = end
    elif switch_step is not None:
        switch = switch_step
    else:
        limit = float(boundary or 0.0) * num_train_timesteps
        switch = next((i for i, t in enumerate(timesteps) if not t >= limit), count)
    return StepPlan(start=start_step, end=end, switch=switch, timesteps=tuple(timesteps))
