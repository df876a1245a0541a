"""The live plan in words and numbers, for the page. Does not import ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..wan_core.config import GIB, MIB
from ..wan_core.errors import InvalidRequest, WanError
from ..wan_core.job import expected_steps
from .words import in_words_of_the_nodes

if TYPE_CHECKING:
    from ..wan_core.config import StageEstimate
    from ..wan_core.job import Request
    from ..wan_core.models import ModelArchitecture
    from ..wan_core.render import Forecast
    from .live import Job
    from .wired import Node, Wired

_STAGES = {
    "text_encode": "text", "image_encode": "picture (CLIP)", "condition_encode": "pictures",
    "denoise": "denoising", "denoise_high": "high noise", "denoise_low": "low noise",
    "decode": "decoding", "output": "frames",
}  # fmt: skip
_OFFICIAL = {
    "steps": "num_inference_steps", "guidance_scale": "guidance_scale", "flow_shift": "flow_shift",
    "guidance_scale_2": "guidance_scale_2", "boundary": "boundary", "fps": "fps",
}  # fmt: skip
"""Widgets of which 0 means the official value -> what the value is called in a Request."""
_SECOND_EXPERT = ("guidance_scale_2", "boundary", "switch_step")


def failed(error: WanError, wired: Wired | None = None) -> dict[str, Any]:
    """Return the answer for a graph that cannot run: what is wrong, where, and what to do."""
    field = error.field if isinstance(error, InvalidRequest) else None
    node = None
    if wired is not None:
        holders = [
            one for one in (wired.asking, *wired.chain) if field in one.values or field in one.wired
        ]
        node = holders[0].id if holders else wired.chain[0].id
    text = in_words_of_the_nodes(str(error))
    kind = type(error).__name__  # by which the page says it in its own language too
    return {
        "ok": False, "error": text, "kind": kind, "field": field, "node": node, "fixes": [],
    }  # fmt: skip


def described(job: Job, forecast: Forecast, *, busy: bool) -> dict[str, Any]:
    """Return the answer for a graph that was planned."""
    estimate, system = forecast.estimate, forecast.system
    on_cpu = system.device_kind == "cpu"
    usable = None if estimate.available_mb is None else estimate.available_mb * MIB
    stages = [_stage(one, usable) for one in estimate.stages]
    architecture = job.wrapper.architecture
    plan = forecast.plan
    timed = plan if plan is not None and not on_cpu else None
    warnings = [*job.unused, *_beside(job), *_uncounted(job)]
    warnings += [*architecture.warnings, *forecast.warnings]
    ram = max(one.host_bytes for one in estimate.stages)
    return {
        "ok": True,
        "fits": estimate.fits,
        "headline": _headline(forecast),
        "verdict": _verdict(forecast),
        "model": f"{architecture.variant.title}, {architecture.weight_kind}",
        "device": "RAM" if on_cpu else system.device_name or system.device,
        "peak_gib": _gib(estimate.peak_usage_mb * MIB),
        "usable_gib": None if usable is None else _gib(usable),
        "stages": stages,
        "ram_gib": _gib(ram),
        "ram_usable_gib": round(_usable_ram(forecast), 3),
        "seconds": None if timed is None else round(timed.seconds, 1),
        "seconds_cold": None if timed is None else round(timed.cold_seconds, 1),
        "step_seconds": None if timed is None else round(timed.step_seconds, 2),
        "seconds_measured": bool(timed is not None and timed.paced),
        "size": [forecast.request.width, forecast.request.height, forecast.request.num_frames],
        "video_seconds": round(forecast.request.wanted_frames / forecast.request.fps, 2),
        "resolved": _resolved(job, forecast),
        "official": _official(forecast.request, architecture),
        "unused": _unused(job.wired.asking, architecture),
        "warnings": [in_words_of_the_nodes(text) for text in dict.fromkeys(warnings)],
        "reasons": [in_words_of_the_nodes(text) for text in estimate.reasons],
        "found": list(job.found),
        "unknown": sorted(set(job.wired.asking.wired) & set(job.wired.asking.values)),
        "while_busy": busy,
        "fixes": [],
    }


def _verdict(forecast: Forecast) -> str:
    """Say in a word what the headline says; the page has a sentence for each in its language."""
    estimate = forecast.estimate
    if estimate.fits:
        return "fits"
    available = estimate.available_mb
    return "too much" if available is None or estimate.peak_usage_mb > available else "short of RAM"


def _headline(forecast: Forecast) -> str:
    """Return the headline in English; the page tells the same from ``verdict`` and the numbers."""
    estimate, plan, system = forecast.estimate, forecast.plan, forecast.system
    peak = estimate.peak_usage_mb / 1024
    on_cpu = system.device_kind == "cpu"
    where = "RAM" if on_cpu else system.device_name or system.device
    there = "" if estimate.available_mb is None else f" of {estimate.available_mb / 1024:.1f}"
    verdict = _verdict(forecast)
    if verdict == "short of RAM":
        ram = max(stage.host_bytes for stage in estimate.stages) / GIB
        usable = _usable_ram(forecast)
        return f"Does not fit: {ram:.1f} GiB of RAM are needed, {usable:.1f} can be used"
    if verdict == "too much":
        return f"Does not fit: {peak:.1f}{there} GiB of {where}, in the smallest way there is"
    text = f"Fits: {peak:.1f}{there} GiB of {where}"
    if plan is None or on_cpu:
        return text
    text += f", about {duration(plan.seconds)}"
    if plan.cold_seconds > 1.1 * plan.seconds:
        text += f" ({duration(plan.cold_seconds)} the first time)"
    return text


def _usable_ram(forecast: Forecast) -> float:
    """Return the GiB of RAM that a render may use, without what is left to the system."""
    return forecast.system.usable_ram_bytes / GIB


def duration(seconds: float) -> str:
    """Return seconds as people say them: 45 s, 12 min, 1 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _stage(stage: StageEstimate, usable: float | None) -> dict[str, Any]:
    return {
        "name": stage.name,
        "label": _STAGES.get(stage.name, stage.name.replace("_", " ")),
        "gib": _gib(stage.device_bytes),
        "weights_gib": _gib(stage.weights_bytes),
        "ram_gib": _gib(stage.host_bytes),
        "over": usable is not None and stage.device_bytes > usable,
    }


def _gib(size: float) -> float:
    return round(size / GIB, 3)


def _resolved(job: Job, forecast: Forecast) -> list[str]:
    """Say in a line each what the job is once every default is filled in."""
    request, asking = forecast.request, job.wired.asking
    two = job.wrapper.architecture.two_experts
    frames = f"{request.wanted_frames} frames"
    if request.num_frames != request.wanted_frames:
        frames += f" (made as {request.num_frames})"
    seconds = request.wanted_frames / request.fps
    lines = [f"{request.width}x{request.height}, {frames}, {seconds:.2f} s at {request.fps:g} fps"]

    def line(words: str, value: str, *names: str) -> None:
        official = "official" if all(not asking.values.get(name) for name in names) else "set"
        lines.append(f"{words} {official}: {value}")

    line("steps", str(request.num_inference_steps), "steps")
    scales = f"{request.guidance_scale:g}" + f" / {request.guidance_scale_2:g}" * two
    line("guidance", scales, "guidance_scale", *["guidance_scale_2"] * two)
    if request.sigmas:  # which the flow shift does not move
        line("sigmas", ", ".join(f"{level:.4g}" for level in request.sigmas), "sigmas")
    else:
        line("flow shift", f"{request.flow_shift:g}", "flow_shift")
    if two:
        lines.append(_switch(request))
    choices = None if forecast.plan is None else forecast.plan.choices
    if choices is not None and choices.window_frames is not None:
        shared = choices.window_overlap or request.window_overlap
        lines.append(f"windows of {choices.window_frames} frames, {shared} shared")
    return lines


def _switch(request: Request) -> str:
    """Say when the experts change, by the steps that the schedule is expected to take."""
    steps = expected_steps(request, 2)
    if steps.high and steps.low:
        return f"switch of experts after step {steps.switch} of {len(steps.timesteps)}"
    return f"all {len(steps.timesteps)} steps by the {'high' if steps.high else 'low'}-noise expert"


def _official(request: Request, architecture: ModelArchitecture) -> dict[str, float | None]:
    """Return what the widgets at 0 stand for."""
    values = {name: getattr(request, field) for name, field in _OFFICIAL.items()}
    if not architecture.two_experts:
        values |= dict.fromkeys(("guidance_scale_2", "boundary"))
    return values


def _unused(asking: Node, architecture: ModelArchitecture) -> dict[str, str]:
    """Return the widgets that the model has no use for, with the reason."""
    out = {}
    if not architecture.two_experts:
        why = "this model has one expert"
        out = {name: why for name in _SECOND_EXPERT if name in asking.values}
    return out


def _uncounted(job: Job) -> list[str]:
    """Warn of what comes from other nodes and changes what is needed."""
    asking = job.wired.asking
    names = [name for name in ("control", "continue_from") if name in asking.wired]
    length = []
    if "control" in names and asking.values.get("num_frames") == 0:
        length.append(
            "num_frames is 0, as many as the control's video has: how many is known when it has "
            f"run. Shown is the model's usual length, {job.config.num_frames} frames."
        )
    return length + [
        f"What comes in at {name!r} is known when it has run: not counted." for name in names
    ]


def _beside(job: Job) -> list[str]:
    """Warn where a sampler that uses the same pipeline makes another clip than is estimated."""
    asking, sampler = job.wired.asking, job.wired.beside
    if sampler is None or sampler is asking:
        return []
    names = ("width", "height", "num_frames")
    if all(sampler.values.get(name) == asking.values.get(name) for name in names):
        return []
    width, height, frames = (sampler.values.get(name) for name in names)
    return [
        f"The sampler that follows (node {sampler.id}) makes {frames} frames of {width}x{height}: "
        "this estimate is of another clip."
    ]
