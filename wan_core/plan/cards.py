"""How many cards compute a clip, which, and what that is expected to save.

The passes of a step, one for each window and each half of guidance, do not wait for each other.
With U of them on N cards a step takes ceil(U / N) turns instead of U, and changes no bit. What does
not get shorter is the start of the processes, the encoders and the decode; the plan may therefore
say that one card is faster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from ..config import GIB
from ..errors import InvalidRequest
from ..memory import latent_size, window_latents
from ..models import ModelArchitecture
from .config import OptimizationConfig
from .plan import OptimizationPlan
from .timing import windows_per_step

if TYPE_CHECKING:
    from ..memory import SystemResources, Workload

START_SECONDS = 10.0
"""Seconds until the workers' processes have imported their packages: two on two cores that others
kept busy took 6 for torch and 25 with diffusers. On an idle host it was not measured; much of it
passes while texts are encoded, which is not counted."""
_PIPE = 5e8
"""Bytes per second of latents to a worker and back, copies included: a tenth of what a pipe moves.
Assumed, not measured."""
_IN_USE = 0.3
"""Share of a card that others may use where "auto" is to take it. Assumed."""


@dataclass(frozen=True, slots=True)
class _Turns:
    """The passes of one step of each expert, and how many turns they take on some cards."""

    units: tuple[int, ...]

    def share(self, cards: int) -> float:
        """Return how long a step takes on so many cards, compared with one; the experts' mean."""
        turns = sum(ceil(units / cards) for units in self.units)
        return turns / sum(self.units)

    @property
    def most(self) -> int:
        return max(self.units)


def devices_asked(requested: OptimizationConfig, system: SystemResources) -> tuple[str, ...]:
    """Return the devices that ``requested.devices`` names on this machine, the plan's own first.

    Raises InvalidRequest where there are fewer, or where cards of different kinds are asked to give
    equal bits (speed "exact").
    """
    wanted = requested.devices
    if wanted == "1":
        return (system.device,)
    if system.device_kind != "cuda":
        count = int(wanted) if wanted.isdigit() else 1
        return (system.device,) * count
    known = {card.device: card for card in system.cards}
    own = system.device
    rest = [device for device in known if device != own]
    if wanted == "auto":
        alike = [d for d in rest if known[d].name == system.device_name]
        return (own, *(d for d in alike if _idle(known[d].free_bytes, known[d].total_bytes)))
    if wanted == "all":
        chosen = (own, *rest)
    elif wanted.isdigit():
        chosen = (own, *rest[: int(wanted) - 1])
        if len(chosen) < int(wanted):
            raise _missing(wanted, tuple(known))
    else:
        chosen = tuple(dict.fromkeys(f"cuda:{one.removeprefix('cuda:')}" for one in _ids(wanted)))
        if any(device not in known for device in chosen):
            raise _missing(wanted, tuple(known))
    names = {device: known[device].name for device in chosen if device in known}
    if len(set(names.values())) > 1 and requested.speed == "exact":
        listed = ", ".join(f"{device} {name}" for device, name in names.items())
        raise InvalidRequest(
            f"devices is {wanted!r}, which are different cards ({listed}): their bits differ. "
            "Choose cards of one kind, or speed 'fast'.",
            field="devices",
        )
    return chosen


def _ids(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _idle(free: int, total: int) -> bool:
    return free >= (1 - _IN_USE) * total


def _missing(wanted: str, known: tuple[str, ...]) -> InvalidRequest:
    return InvalidRequest(
        f"devices is {wanted!r}; this machine has {', '.join(known)}. Choose among these, or auto.",
        field="devices",
    )


def for_all_cards(system: SystemResources, requested: OptimizationConfig) -> SystemResources:
    """Return the machine with the free memory of the fullest of the cards that are asked for.

    One plan is carried out on all of them. On the first card the driver's own process stays beside
    its worker: up to 1 GiB of CUDA's context.
    """
    devices = devices_asked(requested, system)
    if len(devices) == 1 or system.device_kind != "cuda":
        return system
    free = {card.device: card.free_bytes for card in system.cards if card.device in devices}
    fullest = min(free, key=lambda device: free[device])
    least = min(system.device_free_bytes - GIB, free[fullest])
    note = f"{fullest} has the least free memory of the cards, {free[fullest] / GIB:.1f} GiB"
    more = (note,) if free[fullest] < system.device_free_bytes - GIB else ()
    return replace(system, device_free_bytes=max(0, least), notes=(*system.notes, *more))


def spread_over(
    plan: OptimizationPlan,
    architecture: ModelArchitecture,
    workload: Workload,
    system: SystemResources,
    requested: OptimizationConfig,
) -> OptimizationPlan:
    """Return the plan for as many of the cards that are asked for as it pays, or was asked for.

    Its ``workers`` name them; empty means that one process computes all.
    """
    if requested.devices == "1":
        return plan
    devices = devices_asked(requested, system)
    turns = _turns(architecture, workload, plan)
    useful = min(len(devices), turns.most)
    # Each process has an interpreter of its own, and its own copy of weights that are not mapped.
    each = max((stage.host_bytes for stage in plan.estimate.stages), default=0)
    room = system.usable_ram_bytes // each if each else useful
    short = ""
    if room < useful:
        useful = max(1, room)
        short = f"RAM has room for {useful} of such processes, {each / GIB:.1f} GiB each"
    seconds = {n: _seconds(plan, workload, turns, n, architecture) for n in range(1, useful + 1)}
    best = min(seconds, key=lambda n: (seconds[n], n))
    count = best if requested.devices == "auto" else useful
    said = _said(turns, seconds, count, best, devices, short, requested.speed)
    reasons = (*plan.reasons, said)
    step = plan.step_seconds * turns.share(count)
    return replace(
        plan,
        workers=devices[:count] if count > 1 else (),
        step_seconds=step,
        seconds=seconds[count],
        cold_seconds=plan.cold_seconds + seconds[count] - seconds[1],
        reasons=reasons,
        estimate=replace(plan.estimate, reasons=reasons),
    )


def _turns(architecture: ModelArchitecture, workload: Workload, plan: OptimizationPlan) -> _Turns:
    windows = windows_per_step(architecture, workload, plan.choices)
    guided = [workload.guidance_high]
    if architecture.two_experts:
        guided.append(workload.guidance_low)
        names = ("transformer", "transformer_2")
        guided = [g for g, name in zip(guided, names, strict=True) if name not in workload.idle]
    return _Turns(tuple(windows * (2 if one else 1) for one in guided or [True]))


def _seconds(
    plan: OptimizationPlan, workload: Workload, turns: _Turns, cards: int,
    architecture: ModelArchitecture,
) -> float:  # fmt: skip
    """Return the predicted seconds of the whole job on so many cards."""
    if cards == 1:
        return plan.seconds
    frames, height, width = latent_size(architecture, workload)
    window = window_latents(workload, plan.choices, frames) + workload.references
    channels = architecture.transformer.in_channels + architecture.transformer.out_channels
    moved = workload.batch_size * channels * window * height * width * 4 / _PIPE
    passes = sum(turns.units) / len(turns.units)
    step = turns.share(cards) * (plan.step_seconds + moved * passes)
    return plan.seconds + workload.steps * (step - plan.step_seconds) + START_SECONDS


def _said(
    turns: _Turns, seconds: dict[int, float], count: int, best: int, devices: tuple[str, ...],
    short: str, speed: str,
) -> str:  # fmt: skip
    """Return the reason, in words; ``short`` says that RAM has no room for more."""
    units = " or ".join(str(units) for units in dict.fromkeys(turns.units))
    each = f"a step has {units} passes that do not wait for each other"
    one = f"{seconds[1]:.0f} s"
    if count == 1:
        if len(devices) == 1:
            return "one card computes: no other is free and alike"
        if short and len(seconds) == 1:
            return f"one card computes: {short}"
        tried = "; ".join(f"{n} cards {s:.0f} s" for n, s in seconds.items() if n > 1)
        why = f" (one card {one}; {tried})" if tried else ""
        return f"one card is faster: {each}{why}" + (f"; {short}" if short else "")
    text = (
        f"{count} cards ({', '.join(devices[:count])}): {each}; about {seconds[count]:.0f} s "
        f"instead of {one}, {_bits(speed)}"
    )
    if short:
        text += f"; {short}"
    elif len(devices) > count:
        text += f"; {len(devices) - count} more would have nothing to do"
    if best == 1:
        text += ". One card is expected to be faster: devices 'auto' would take it"
    return text


def _bits(speed: str) -> str:
    """Say what sharing passes out does to the bits."""
    if speed == "exact":
        return "with the bits of one"
    return (
        f"in the same way as one; with speed {speed!r} each card takes the kernels it is fastest "
        "with, which may round differently"
    )
