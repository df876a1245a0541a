"""How many cards compute a clip, which, and what that is expected to save.

The passes of a step, one for each window and each half of guidance, do not wait for each other.
With U of them on N cards a step takes ceil(U / N) turns instead of U, and changes no bit. Where
cards are left over, or turns half full, several may compute a pass together (``gangs``). What does
not get shorter is the start of the processes, the encoders and the decode; the plan may therefore
say that one card is faster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING

from ..config import GIB
from ..errors import InvalidRequest
from ..memory import estimate, latent_size, window_latents
from ..models import ModelArchitecture
from .config import OptimizationConfig
from .gangs import Cutting, Turns, tried_as, turns_of, wishes, with_filling_overlap
from .plan import OptimizationPlan
from .stage_seconds import StageSeconds, before_steps, on_workers

if TYPE_CHECKING:
    from ..memory import SystemResources, Workload

START_SECONDS = 14.5
"""Seconds until the workers' processes have imported their packages and have their cards: two on
a host of 32 cores and two H200s took 14.1 to 17.7 (``many_2_nvidia_h200.md``). What passes while
texts and pictures are encoded is not counted."""
_PIPE = 5e8
"""Bytes per second of latents to a worker and back, copies included: a tenth of what a pipe moves.
Assumed, not measured."""
_IN_USE = 0.3
"""Share of a card that others may use where "auto" is to take it. Assumed."""


_GAIN = 0.95
"""A step's seconds beside those without a further cut that make up for it: links are uncertain."""


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
            raise _missing(wanted, tuple(known) or (own,))
    else:
        chosen = tuple(dict.fromkeys(f"cuda:{one.removeprefix('cuda:')}" for one in _ids(wanted)))
        if any(device not in known for device in chosen):
            raise _missing(wanted, tuple(known) or (own,))
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

    One plan is carried out on all of them, by workers in processes of their own: each takes up to
    1 GiB for CUDA's context, on the first card beside the driver's.
    """
    devices = devices_asked(requested, system)
    if len(devices) == 1 or system.device_kind != "cuda":
        return system
    free = {card.device: card.free_bytes for card in system.cards if card.device in devices}
    fullest = min(free, key=lambda device: free[device])
    least = min(system.device_free_bytes, free[fullest]) - GIB
    note = f"{fullest} has the least free memory of the cards, {free[fullest] / GIB:.1f} GiB"
    more = (note,) if free[fullest] < system.device_free_bytes - GIB else ()
    return replace(system, device_free_bytes=max(0, least), notes=(*system.notes, *more))


@dataclass(frozen=True, slots=True)
class _Way:
    """Some gangs of some cards each, and the seconds of a step and of the whole job."""

    gangs: int
    cut: int
    step: float
    seconds: float
    tried: bool = True
    """Whether it is known what the cut does to the bits."""

    @property
    def cards(self) -> int:
        return self.gangs * self.cut


def spread_over(
    plan: OptimizationPlan,
    architecture: ModelArchitecture,
    workload: Workload,
    system: SystemResources,
    requested: OptimizationConfig,
    *,
    lean: bool,
    available: int | None,
) -> OptimizationPlan:
    """Return the plan for as many of the cards that are asked for as it pays, or was asked for.

    Its ``workers`` name them, ``gang`` says how many compute a pass together; no workers means that
    one process computes all. With speed "exact" passes are cut only where a trial has shown equal
    bits, or where cards that would have nothing to do can make the trial. ``lean`` says whether the
    lean forward may be used, ``available`` how many bytes of the device.
    """
    if requested.devices == "1":
        return plan
    devices = devices_asked(requested, system)
    if plan.choices.driving:
        said = "one card computes Animate 2: its driving stream is kept in one process"
        reasons = (*plan.reasons, *[said] * (len(devices) > 1))
        return replace(plan, reasons=reasons, estimate=replace(plan.estimate, reasons=reasons))
    turns = turns_of(architecture, workload, plan)
    names = {card.name for card in system.cards if card.device in devices}
    job = wishes(architecture, workload, plan.choices, system, requested, lean)
    job = replace(job, alike=len(names) < 2)
    each, room = _ram_for_workers(plan, system, len(devices))
    auto = requested.devices == "auto"
    ways = _ways(plan, job, turns, room, every=auto)
    chosen = ways[0]
    for way in ways[1:]:
        # Windows and guidance first: a cut has to be worth it.
        least = _GAIN if way.cut > chosen.cut else 1
        spent = (way.seconds, chosen.seconds) if auto else (way.step, chosen.step)
        if spent[0] < spent[1] * least:
            chosen = way
    choices, found, longer = plan.choices, plan.estimate, ""
    if chosen.gangs > 1:
        gangs = min(room, len(devices)) // chosen.cut
        told_of = (plan, architecture, workload, system)
        choices, found, longer = with_filling_overlap(*told_of, gangs, chosen.cut, available)
    if longer:
        used = min(gangs, turns_of(architecture, workload, replace(plan, choices=choices)).most)
        chosen = replace(chosen, gangs=used)
    told = _Telling(job, plan, turns, devices, ways, chosen, longer)
    short = ""
    if room < len(devices) and chosen.cards == room:
        short = f"RAM has room for {room} of such processes, {each / GIB:.1f} GiB each"
    if chosen.cut > 1 and not choices.lean:
        choices = replace(choices, lean=True)  # the same bits
        warnings = found.warnings
        found = estimate(architecture, workload, choices, system, available=available)
        found = replace(found, warnings=warnings)
        job = replace(job, choices=choices)
    reasons = (*plan.reasons, *((longer,) if longer else ()), told.reason(short))
    expected = told.expected
    return replace(
        plan,
        choices=choices,
        workers=devices[: chosen.cards] if chosen.cards > 1 else (),
        gang=chosen.cut,
        tried_as=tried_as(job),
        must_equal=requested.speed == "exact",
        shared_weights=told.shares,
        card_peak_bytes=told.peak if chosen.cards > 1 else 0,
        step_seconds=expected.step,
        seconds=expected.seconds,
        cold_seconds=plan.cold_seconds + expected.seconds - plan.seconds,
        stage_seconds=told.stage_seconds,
        reasons=reasons,
        estimate=replace(found, reasons=reasons),
    )


def _ram_for_workers(plan: OptimizationPlan, system: SystemResources, most: int) -> tuple[int, int]:
    """Return the bytes of RAM that a worker takes, and for how many of ``most`` there is room.

    Each has an interpreter of its own, and its own copy of weights that are not mapped. They have
    the transformers' stages alone; in the others, which are the driver's, they wait.
    """
    usable, kinds = system.usable_ram_bytes, ("encode", "denoise")
    process = replace(system, process_bytes=None).process_ram(kinds)  # a fresh one
    stages = plan.estimate.stages
    each = max((s.host_bytes for s in stages if s.name.startswith("denoise")), default=0)
    each = max(0, each - system.process_ram(kinds)) + process if each else 0
    largest = max((s.host_bytes for s in stages if not s.name.startswith("denoise")), default=0)
    counts = [(usable - process) // each] if each else []
    counts += [(usable - largest) // process] if process else []
    return each, max(1, min(most, *counts))


def _ways(
    plan: OptimizationPlan, job: Cutting, turns: Turns, cards: int, *, every: bool
) -> list[_Way]:
    """Return the ways to use the cards, those with fewer in a gang first.

    With ``every`` they may use fewer cards than there are; else as many as have something to do.
    """
    found = []
    whole = min(cards, turns.most)
    for cut in range(1, cards + 1):
        most = min(cards // cut, turns.most)
        trial = job.trial(cut) if cut > 1 else None
        if cut > 1:
            if job.why_not is not None or not job.divides(cut):
                continue
            if job.exact and trial is not None and not trial.equal:
                continue
            # A trial that fails must cost nothing but itself.
            if job.exact and trial is None and most < whole:
                continue
        for gangs in range(1, most + 1) if every else (most,):
            step, seconds = _seconds(plan, job, turns, gangs, cut)
            found.append(_Way(gangs, cut, step, seconds, cut == 1 or trial is not None))
    return found


def _seconds(
    plan: OptimizationPlan, job: Cutting, turns: Turns, gangs: int, cut: int
) -> tuple[float, float]:
    """Return the predicted seconds of a step, and of the whole job."""
    if gangs * cut == 1:
        return plan.step_seconds, plan.seconds
    workload, shape = job.workload, job.architecture.transformer
    frames, height, width = latent_size(job.architecture, workload)
    window = window_latents(workload, plan.choices, frames) + workload.references
    channels = shape.in_channels + shape.out_channels
    moved = workload.batch_size * channels * window * height * width * 4 / _PIPE
    alone = plan.step_seconds / turns.passes
    step = turns.turns(gangs) * job.pass_seconds(alone, cut)
    piped = turns.turns(gangs) * moved * cut
    steps = workload.steps * (step + piped - plan.step_seconds)
    return step, plan.seconds + steps + _start(plan)


def _start(plan: OptimizationPlan) -> float:
    """Return the seconds that are waited for processes to start."""
    return max(0.0, START_SECONDS - before_steps(plan.stage_seconds))


@dataclass(frozen=True, slots=True)
class _Telling:
    """What a plan says of the cards it takes."""

    job: Cutting
    plan: OptimizationPlan
    turns: Turns
    devices: tuple[str, ...]
    ways: list[_Way]
    chosen: _Way
    longer: str = ""
    """What is said of an overlap that was chosen to fill the cards."""

    @property
    def expected(self) -> _Way:
        """Return the way that is promised: without a cut while it is not known to be kept."""
        if self.chosen.tried or not self.job.exact:
            return self.chosen
        step, seconds = _seconds(self.plan, self.job, self.turns, self.chosen.gangs, 1)
        return _Way(self.chosen.gangs, 1, step, seconds)

    @property
    def stage_seconds(self) -> tuple[StageSeconds, ...]:
        """Return what the stages are expected to take."""
        if self.chosen.cards == 1:
            return self.plan.stage_seconds
        start, more = _start(self.plan), self.expected.seconds - self.plan.seconds
        return on_workers(self.plan.stage_seconds, start, more - start)

    @property
    def _alone(self) -> float:
        """Return the seconds of a pass on one card."""
        return self.plan.step_seconds / self.turns.passes

    @property
    def shares(self) -> bool:
        """Whether streamed weights are copied once for all cards of a gang."""
        return self.job.shares_weights(self._alone, self.chosen.cut)

    @property
    def peak(self) -> int:
        """Return the bytes that a card is expected to hold: more where both ways are computed."""
        cuts = {1, self.chosen.cut} if not self.chosen.tried else {self.chosen.cut}
        return max(self.job.card_peak(cut, shared=self.shares and cut > 1) for cut in cuts)

    def reason(self, short: str) -> str:
        """Return the reason, in words; ``short`` says that RAM has no room for more."""
        units = " or ".join(str(units) for units in dict.fromkeys(self.turns.units))
        passes = f"a step has {units} passes that do not wait for each other"
        if self.turns.units == (1,):
            passes = "a step is one pass"
        one = f"{self.plan.seconds:.0f} s"
        if self.chosen.cards == 1:
            if len(self.devices) == 1:
                return "one card computes: no other is free and alike"
            if short:
                return f"one card computes: {short}"
            tried = "; ".join(
                f"{w.cards} cards {w.seconds:.0f} s" for w in self.ways if w.cards > 1
            )
            why = f" (one card {one}; {tried})" if tried else self._no_cut
            return f"one card is faster: {passes}{why}"
        count, expected = self.chosen.cards, self.expected
        text = (
            f"{count} cards ({', '.join(self.devices[:count])}): {passes}; about "
            f"{expected.seconds:.0f} s instead of {one}, {self._bits}"
        )
        if self.chosen.cut > 1:
            text += f"; {self._cut}{self._streamed}"
        text += f"; up to {self.peak / GIB:.1f} GiB on each card"
        if not self.job.alike:
            text += "; the cards are of different kinds, and so may be their bits and their pace"
        if short:
            text += f"; {short}"
        elif len(self.devices) > count:
            text += f"; {len(self.devices) - count} more would have nothing to do{self._no_cut}"
        if self.plan.seconds < expected.seconds:
            text += ". One card is expected to be faster: devices 'auto' would take it"
        return text

    @property
    def _bits(self) -> str:
        """Say what sharing passes out does to the bits."""
        if self.job.exact:
            return "with the bits of one" + (" at that overlap" if self.longer else "")
        speed = "fastest kernels" if self.plan.choices.quick else "own kernels"
        return (
            f"passes are computed as on one, with the {speed} that the first card to try them "
            "chooses for all: they may round differently"
        )

    @property
    def _cut(self) -> str:
        """Say what the cut does, and what is known of it."""
        cut = self.chosen.cut
        link, measured = self.job.link(cut)
        origin = "measured" if measured else "assumed"
        text = f"each pass is cut along its tokens over {cut} (Ulysses, {link.rate / 1e9:.3g} GB/s "
        text += f"{origin} between them), "
        trial = self.job.trial(cut)
        if trial is None:
            _, seconds = _seconds(self.plan, self.job, self.turns, self.chosen.gangs, cut)
            text += "which was not tried here at this size: the first pass is computed both ways"
            if self.job.exact:
                text += f", and the cut is kept if every bit is equal; about {seconds:.0f} s then"
            return text
        if trial.equal:
            return f"{text}exact: tried here, every bit was equal"
        return f"{text}rounding: tried here, relative error {trial.error:.1e}"

    @property
    def _streamed(self) -> str:
        """Say how streamed weights come to the cards of a gang."""
        if self.job.choices.offload_of("transformer") != "stream":
            return ""
        cut = self.chosen.cut
        whole, shared = self.job.streamed_seconds(self._alone, cut)
        link, _ = self.job.link(cut)
        bus = link.host or self.job.system.bus_bytes_per_second
        origin = "measured while all copy" if link.host else "assumed"
        told = f", {bus / 1e9:.3g} GB/s from RAM to each {origin}" if isfinite(bus) else ""
        if self.shares:
            return (
                f"; each card copies 1/{cut} of a streamed block and gathers the rest from the "
                f"others, {shared:.3g} s a pass instead of {whole:.3g}{told}"
            )
        return (
            f"; each card copies every streamed block itself, {whole:.3g} s a pass and "
            f"{shared:.3g} if they shared them out{told}"
        )

    @property
    def _no_cut(self) -> str:
        """Say why no pass is cut over cards that are left over."""
        if self.chosen.cut > 1:
            return ""
        if self.job.why_not is not None:
            return f" ({self.job.why_not})"
        counts = range(2, len(self.devices) + 1)
        divided = [cut for cut in counts if self.job.divides(cut)]
        heads, tokens = self.job.architecture.transformer.heads, self.job.tokens
        if not divided:
            return f" (neither {heads} heads nor {tokens} tokens can be shared out evenly)"
        unequal = [cut for cut in divided if (t := self.job.trial(cut)) and not t.equal]
        if self.job.exact and unequal:
            return (
                f" (cut over {' or '.join(map(str, unequal))} a pass has other bits here, which "
                "speed 'fast' allows)"
            )
        return " (cutting a pass over them would not pay)"
