"""What can be done about a graph that does not fit or is wrong, as data for buttons on the page.

A fix has a label and what it sets: ``set`` lists {"node", "widget", "value"}; ``insert`` asks for a
new node between the pipeline and a node. Each was tried before it is offered. No ComfyUI here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..wan_core.errors import WanError
from ..wan_core.models import role_of
from .wired import SIZED, Wired

if TYPE_CHECKING:
    from ..wan_core.render import Forecast
    from .live import Job, Live


def swap_fix(wired: Wired) -> list[dict[str, Any]]:
    """Offer to swap the experts where both names say the opposite of their inputs."""
    loader = wired.chain[0]
    high, low = (str(loader.values.get(name, "")) for name in ("model", "low_noise_model"))
    if loader.kind != "WanLoader" or _role(high) != "low" or _role(low) != "high":
        return []
    change = [_set(loader.id, "model", low), _set(loader.id, "low_noise_model", high)]
    return [{"label": "Swap the experts", "set": change}]


def _role(name: str) -> str | None:
    return role_of(Path(name.replace("\\", "/")).stem)


def fixes(live: Live, job: Job, forecast: Forecast) -> list[dict[str, Any]]:
    """Return what would make the job fit, each alone; nothing where it fits."""
    if forecast.estimate.fits is not False:
        return []
    asking, request = job.wired.asking, forecast.request
    found = _smaller_encoder(live, job)
    remedies = job.wrapper.remedies(forecast)
    sized = asking.kind in SIZED
    if sized and remedies.frames is not None and remedies.frames < request.num_frames:
        seconds = remedies.frames / request.fps
        label = f"Make {remedies.frames} frames ({seconds:.1f} s)"
        found.append({"label": label, "set": [_set(asking.id, "num_frames", remedies.frames)]})
    if sized and remedies.size is not None:
        width, height = remedies.size
        change = [_set(asking.id, "width", width), _set(asking.id, "height", height)]
        found.append({"label": f"Make it {width}x{height}", "set": change})
    if remedies.windows is not None:
        found.append(_windows(job.wired, *remedies.windows))
    return found


def _windows(wired: Wired, frames: int, overlap: int) -> dict[str, Any]:
    """Offer windows: by the node's own inputs, or by a WanOptimize that allows them."""
    asking, label = wired.asking, f"Use windows of {frames} frames"
    if "window_frames" in asking.values:
        change = [
            _set(asking.id, "window_frames", frames), _set(asking.id, "window_overlap", overlap)
        ]  # fmt: skip
        return {"label": label, "set": change}
    name = "fallback_window_frames"
    optimize = wired.of_kind("WanOptimize")
    if optimize:
        return {"label": label, "set": [_set(optimize[-1].id, name, frames)]}
    new = {"class_type": "WanOptimize", "before": asking.id, "values": {name: frames}}
    return {"label": label, "insert": new}


def _smaller_encoder(live: Live, job: Job) -> list[dict[str, Any]]:
    """Offer a text encoder of fewer bytes that lies beside the one in use, if that is enough."""
    there = job.wrapper.architecture.components.get("text_encoder")
    loader = job.wired.chain[0]
    if there is None or there.stored is None or there.stored.quantised:
        return []
    for name, path in live.folders().files["text_encoder"].items():
        try:
            part = live.inspect(path).of_kind("text_encoder")
            if part is None or part.weights.why_not or not part.weights.weights:
                continue
            other = live.open(job.wired, text_encoder=name)
            forecast = other.wrapper.foresee(other.config, live.machine(other.wrapper))
        except WanError:  # a file of something else, or one that does not belong to this model
            continue
        if forecast.estimate.fits:
            label = f"Take the text encoder {Path(name).name}"
            return [{"label": label, "set": [_set(loader.id, "text_encoder", name)]}]
    return []


def _set(node: str, widget: str, value: Any) -> dict[str, Any]:
    return {"node": node, "widget": widget, "value": value}
