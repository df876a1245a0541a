"""The reasons for a plan in words: one sentence for each decision, and for each wish in vain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..config import GIB
from ..memory import Choices, Workload, kept_of
from ..models import ModelArchitecture, block_bytes, block_count, experts_of
from .config import OptimizationConfig
from .ladder import Candidate, Limits
from .speed import speed_reasons
from .timing import reads_from_disk, stream_seconds

if TYPE_CHECKING:
    from ..memory import SystemResources

_OFFLOAD_TEXT = {
    "none": "offload none: every part stays on the device",
    "model": "offload model: one part on the device at a time",
    "sequential": "offload sequential: one layer of the transformer on the device at a time (slow)",
    "group": "offload group: one block of the transformer at a time, by diffusers' hooks",
    "stream": "blocks streamed: the other parts on the device one at a time",
}
_PIECES = {"sequential": "layer by layer", "stream": "block by block"}


def reasons_for(
    architecture: ModelArchitecture, workload: Workload, system: SystemResources,
    requested: OptimizationConfig, limits: Limits, chosen: Candidate, others: list[Candidate],
) -> tuple[str, ...]:  # fmt: skip
    """Return a sentence per decision; ``others`` are all candidates of the chosen one's tier."""
    choices = chosen.choices
    reasons = [_vae(chosen, system), _placement(requested, limits, system, chosen, others)]
    reasons += _as_stored(architecture, workload, choices)
    if choices.stream:
        reasons.append(_streaming(architecture, workload, system, choices))
    for part, how in choices.part_offload.items():
        if how in _PIECES:
            name = part.replace("_", " ")
            reasons.append(f"{name} {_PIECES[how]}: it does not fit as a whole, and works briefly")
    if choices.lean:
        asked = "; asked for" if requested.forward == "lean" else ""
        reasons.append(f"lean forward: fewer hidden states alive, equal bits{asked}")
    if choices.by_rows:
        asked = "; asked for" if requested.forward == "lean_rows" else ""
        reasons.append(f"products cut by rows and heads: less memory; changes rounding only{asked}")
    if choices.driving:
        reasons.append(_driving(architecture, workload, choices))
    if choices.cache_in_ram:
        reasons.append("the VAE's feature cache in RAM: it does not fit beside a frame; equal bits")
    if choices.fp8_storage:
        ram = f"nothing larger fits the card and {limits.ram / GIB:.1f} GiB of RAM"
        asked = "asked for" if requested.fp8_storage == "always" else ram
        reasons.append(
            f"fp8 storage: half the bytes of the blocks; changes the result slightly; {asked}"
        )
    if choices.window_frames is not None:
        allowed = (
            "longer than the model's own length" if requested.chunk_size is None else "allowed"
        )
        reasons.append(
            f"windows of {choices.window_frames} frames, {allowed}: the whole clip does not fit; "
            "they change the result"
        )
    elif workload.window_frames is not None:
        reasons.append(f"windows of {workload.window_frames} frames: asked for")
    elif workload.num_frames > (own := architecture.variant.defaults.num_frames):
        reasons.append(
            f"no windows: all {workload.num_frames} frames fit at once. The model was trained on "
            f"{own}; windows of that length may look better"
        )
    ahead = max(stage.ahead_bytes for stage in chosen.estimate.stages)
    if ahead:
        reasons.append(
            "the low-noise expert is read while the high-noise one computes: RAM has room for its "
            f"{ahead / GIB:.2f} GiB"
        )
    reasons += speed_reasons(chosen.situation, chosen.plain)
    if system.device_kind != "cpu":
        reasons.append(
            f"about {_seconds(chosen.timing.step)} a step, {_seconds(chosen.timing.total)} for "
            f"{workload.steps} steps with text and decode{_first(chosen, system)}, "
            f"{_seconds(chosen.timing.cold)} in a new process that reads the files from disk "
            f"({_origin(system)})"
        )
    return (*reasons, *system.notes)


def _first(chosen: Candidate, system: SystemResources) -> str:
    """Say what of the seconds is spent once."""
    first = sum(stage.first for stage in chosen.timing.stages)
    if first < 0.05 * chosen.timing.total:
        return ""
    where = "in this process" if system.calibration.runs else "on this machine, for its kernels"
    return f" ({_seconds(first)} of them the first time {where})"


def _driving(architecture: ModelArchitecture, workload: Workload, choices: Choices) -> str:
    device, ram = kept_of(architecture, workload, choices)
    text = {
        "kv": f"keys and values of every block stay on the device, {device / GIB:.1f} GiB",
        "inputs": f"the blocks' inputs stay in RAM, {ram / GIB:.1f} GiB, and cross the bus",
        "again": "runs again beside every forward: nothing of it is kept",
    }[choices.driving]
    return f"driving stream: {text}; equal bits"


def _as_stored(architecture: ModelArchitecture, workload: Workload, choices: Choices) -> list[str]:
    """Name each kind of storage that weights stay in, and what is computed in."""
    parts: dict[str, list[str]] = {}
    for name in (*experts_of(architecture), "text_encoder"):
        component = architecture.components.get(name)
        if component is None or component.stored is None or name in workload.unread:
            continue
        if component.stored.quantised:
            kind = f"{component.stored_as}, computed in {choices.dtypes[name]}"
            parts.setdefault(kind, []).append(name)
    found = []
    for kind, names in parts.items():
        whole = set(experts_of(architecture)) <= set(names)
        whose = "" if whole else f" of {' and '.join(name.replace('_', ' ') for name in names)}"
        found.append(f"weights{whose} stay {kind}")
    return found


def computed_in(architecture: ModelArchitecture, name: str) -> str:
    """Say what a component computes in where nothing else is asked for, on whatever machine."""
    half = "fp16" if architecture.weight_kind == "fp16" and name != "text_encoder" else "bf16"
    return f"computed in {half} on a card that has it, in fp32 on a CPU"


def _origin(system: SystemResources) -> str:
    if system.calibration.runs:
        return "by the pace of earlier runs on this machine"
    return "computed from operations and bus, not measured"


def _vae(chosen: Candidate, system: SystemResources) -> str:
    dtype = chosen.choices.dtypes["vae"]
    if system.wasteful_half_conv3d:
        return (
            f"vae {dtype}: this torch and cuDNN take many times the memory in half precision "
            "(pytorch issue 166643); a newer torch does not"
        )
    if dtype == "fp32":
        return "vae fp32: as published, and there is room for it"
    if dtype != chosen.plain.dtypes["vae"]:
        return f"vae {dtype}: for speed, as asked for; changes rounding only"
    return f"vae {dtype}: no plan with fp32 fits; changes rounding only"


def _placement(
    requested: OptimizationConfig, limits: Limits, system: SystemResources, chosen: Candidate,
    others: list[Candidate],
) -> str:  # fmt: skip
    choices = chosen.choices
    text = _OFFLOAD_TEXT[choices.offload_of("transformer")]
    if requested.placement != "auto":
        return f"{text}; asked for"
    # A CPU's name says nothing here: it computes in the RAM.
    where = "RAM" if system.device_kind == "cpu" else system.device_name or system.device
    usable = f"{limits.device / GIB:.1f} GiB of {where}{limits.why}"
    faster: dict[str, float] = {}
    for candidate in others:
        if not limits.admit(candidate.estimate) and candidate.timing.step <= chosen.timing.step:
            how = candidate.choices.offload_of("transformer")
            name = "streaming" if how == "stream" else how
            need = candidate.reserved / GIB
            faster[name] = min(need, faster.get(name, need))
    if not faster:
        return f"{text}; it fits into {usable}"
    needs = ", ".join(f"{name} would need {need:.1f} GiB" for name, need in faster.items())
    return f"{text}; {usable} can be used and {needs}"


def _streaming(
    architecture: ModelArchitecture, workload: Workload, system: SystemResources, choices: Choices
) -> str:
    total = block_count(architecture.transformer)
    dtype = choices.dtypes["transformer"]
    block = block_bytes(architecture, "transformer", dtype, fp8=choices.fp8_storage)
    moved = total - (choices.resident_blocks or 0)
    seconds = stream_seconds(architecture, workload, choices, system, passes=1)
    text = (
        f"{choices.resident_blocks} of {total} blocks stay, {moved} of {block / GIB:.2f} "
        f"GiB come over the bus ({seconds:.1f} s) "
    )
    if choices.stream_buffers == 1:
        text += "one at a time: the next has no room beside the one that computes"
    else:
        text += "while others compute"
    if reads_from_disk(architecture, choices, system):
        text += "; RAM cannot hold them, so every step reads them from the file"
    return text


def _seconds(value: float) -> str:
    if value >= 120:
        return f"{value / 60:.0f} min"
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def wishes_without_effect(
    requested: OptimizationConfig,
    architecture: ModelArchitecture,
    system: SystemResources,
    choices: Choices,
) -> Iterator[str]:
    """Yield a sentence for each wish that was stated and changes nothing in these choices."""
    cache = "easycache" if choices.easycache else "magcache" if choices.magcache else ""
    cache = cache or requested.step_cache  # a threshold of 0 is EasyCache that leaves nothing out
    if requested.step_cache_threshold is not None and cache != "easycache":
        yield _no_effect(
            "step_cache_threshold",
            "no EasyCache is in this plan. step_cache 'easycache' asks for it",
        )
    if requested.step_cache_factor is not None and cache != "magcache":
        yield _no_effect(
            "step_cache_factor", "no MagCache is in this plan. step_cache 'magcache' asks for it"
        )
    if requested.min_vram_mb is not None and system.device_kind == "cpu":
        yield _no_effect("min_vram_mb", "the job runs on the CPU, and it is a wish of a GPU")
    blocks = block_count(architecture.transformer)
    if requested.resident_blocks is not None and requested.resident_blocks > blocks:
        yield (
            f"resident_blocks is {requested.resident_blocks}, and {architecture.variant.title} has "
            f"{blocks} blocks: all of them stay on the device."
        )
    quantised = [
        part.stored_as
        for name in experts_of(architecture)
        if (part := architecture.components.get(name)) is not None
        and part.stored is not None
        and part.stored.quantised
    ]
    if requested.fp8_storage == "always" and quantised and not choices.fp8_storage:
        yield _no_effect("fp8_storage", f"the weights stay as the file has them ({quantised[0]})")


def _no_effect(name: str, why: str) -> str:
    return f"{name} has no effect: {why}."
