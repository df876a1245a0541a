"""How a step's passes are shared out: the turns they take, and what cutting one of them gives.

Windows times guidance: these passes do not wait for each other. Where they leave cards without work
in the last turn, more windows cost no time, and share more frames: an overlap that nobody asked for
is chosen so.

Cutting a pass over several cards (Ulysses): what it is expected to take, need and keep. A gang of N
cards computes a pass together: each a part of the tokens, exchanged for a part of the heads round
self attention. A block exchanges four tensors of S d numbers (q, k, v and the output; S tokens, d
width), of which each card sends (N - 1) / N of its N-th part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from ..config import GIB
from ..job import FRAMES_PER_LATENT, filling_overlap, latent_frames
from ..memory import (
    Choices,
    Link,
    Trial,
    Workload,
    cut_kind,
    estimate,
    latent_size,
    link_name,
    seen_latents,
    window_tokens,
)
from ..models import BYTES, ModelArchitecture, block_count, experts_of
from .config import OptimizationConfig
from .plan import OptimizationPlan
from .timing import (
    passes_of,
    reads_from_disk,
    stream_seconds,
    streamed_bytes,
    windows_per_step,
)

if TYPE_CHECKING:
    from ..config import MemoryEstimate
    from ..memory import SystemResources

_LINK = {"cuda": 1e10, "cpu": 5e8}
"""Bytes a second that a card sends while all do, until it was measured: that of cards which talk
through host memory, a third of which LightX2V's times on eight 4090D imply. Assumed."""
_NVLINK = 1.2e10
"""The same for each NVLink of a card: half of the 25 GB/s that NVIDIA gives for one direction of
NVLink 3 and 4. Assumed, so that a cut is tried at all, which measures it."""
_EXCHANGE_SECONDS = 2e-4
"""What an exchange takes beside its bytes: 0.05 to 0.07 s for 320 of them at 832x480 and 81 frames,
fitted to LightX2V's published times. Not measured here."""
_BUFFERS = 0.4 * GIB
"""What NCCL allocates on a card for a communicator. Assumed, not measured."""


@dataclass(frozen=True, slots=True)
class Turns:
    """The passes of one step of each expert, and how many turns they take on some cards."""

    units: tuple[int, ...]
    """Those that do not wait for each other."""
    segments: int = 1
    """How many times a step has them: windows that are made one after the other."""

    def turns(self, gangs: int) -> float:
        """Return how many turns a step takes with so many at work, the experts' mean."""
        turns = sum(ceil(units / gangs) for units in self.units)
        return self.segments * turns / len(self.units)

    @property
    def passes(self) -> float:
        """Return the passes of a step, the experts' mean."""
        return self.segments * sum(self.units) / len(self.units)

    @property
    def most(self) -> int:
        return max(self.units)


def turns_of(architecture: ModelArchitecture, workload: Workload, plan: OptimizationPlan) -> Turns:
    """Return the passes of a job's steps."""
    windows = windows_per_step(architecture, workload, plan.choices)
    segments, windows = (windows, 1) if workload.in_turn else (1, windows)
    passes = passes_of(architecture, workload).values()
    return Turns(tuple(windows * each for each in passes), segments)


def with_filling_overlap(
    plan: OptimizationPlan, architecture: ModelArchitecture, workload: Workload,
    system: SystemResources, gangs: int, cut: int, available: int | None,
) -> tuple[Choices, MemoryEstimate, str]:  # fmt: skip
    """Return choices, estimate and reason with the longest overlap that costs no turn more.

    There are cards for so many ``gangs`` of ``cut`` cards. The reason is empty where the overlap
    stays as it is: where it was asked for, and where no more windows, or none that memory has room
    for, would fill the cards.
    """
    choices = plan.choices
    unchanged = choices, plan.estimate, ""
    fixed = not workload.overlap_free or workload.moving_windows or workload.in_turn
    if fixed or choices.window_frames is None:
        return unchanged
    total, window = workload.latent_frames, latent_frames(choices.window_frames)
    before = -(-choices.window_overlap // FRAMES_PER_LATENT)
    passes = list(passes_of(architecture, workload).values())
    shared = filling_overlap(total, window, before, passes, gangs)
    longer = replace(choices, window_overlap=shared * FRAMES_PER_LATENT)
    found = estimate(architecture, workload, longer, system, available=available)
    if shared == before or (plan.estimate.fits and not found.fits):
        return unchanged
    windows = [1 + -(-(total - window) // (window - each)) for each in (before, shared)]
    who = f"{gangs} cards" if cut == 1 else f"{gangs} gangs of {cut} cards"
    said = (
        f"overlap {before * FRAMES_PER_LATENT} -> {longer.window_overlap} frames: {windows[1]} "
        f"windows instead of {windows[0]} fill {who} in as many turns. Give "
        f"window_overlap {before * FRAMES_PER_LATENT} for the bits of one card"
    )
    return longer, replace(found, warnings=plan.estimate.warnings), said


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """A job whose passes may be cut: all that the gain and the bits depend on."""

    architecture: ModelArchitecture
    workload: Workload
    choices: Choices
    system: SystemResources
    exact: bool
    """Whether every bit must stay (speed "exact")."""
    possible: bool
    """Whether the lean forward, which is the one that can be cut, may be used."""
    alike: bool = True
    """Whether the cards are of one kind."""

    @property
    def why_not(self) -> str | None:
        """Return why no pass can be cut, or None."""
        if self.system.os not in ("", "Linux"):
            return f"cutting a pass over cards needs NCCL, which {self.system.os} does not have"
        if not self.alike:
            return "cards of different kinds do not compute a pass together"
        if not self.possible:
            return "only the lean forward can be cut over cards"
        if self.choices.offload_of("transformer") not in ("none", "model", "stream"):
            return "a transformer whose layers or groups are offloaded cannot be cut over cards"
        if self.architecture.transformer.animate is not None:
            return "Animate's forward cannot be cut over cards"
        if not self.architecture.transformer.heads_known:
            return "how the model's width divides into heads is not known"
        return None

    @property
    def tokens(self) -> int:
        """Return the tokens of a pass."""
        frames, height, width = latent_size(self.architecture, self.workload)
        seen = seen_latents(self.workload, self.choices, frames)
        return window_tokens(self.architecture.transformer, seen, height, width)

    def divides(self, cards: int) -> bool:
        """Say whether heads and tokens can be shared out to so many cards without a rest."""
        heads = self.architecture.transformer.heads
        return heads % cards == 0 and self.tokens % cards == 0

    def trial(self, cards: int) -> Trial | None:
        """Return what a trial on this machine has shown, or None."""
        kind = cut_kind(tried_as(self), self.workload.batch_size, self.tokens, cards)
        return self.system.between.trials.get(kind)

    def link(self, cards: int) -> tuple[Link, bool]:
        """Return how fast so many cards exchange, and whether that was measured."""
        name, links = machine(self.system), self.system.between.links
        known = links.get(link_name(name, cards))
        if known is not None:
            return known, True
        # What other numbers of these cards have shown is nearer than a guess.
        others = [links[n] for count in range(2, 100) if (n := link_name(name, count)) in links]
        links_up = min((card.nvlinks for card in self.system.cards), default=0)
        rate = max(_LINK[self.system.device_kind], links_up * _NVLINK)
        guess = Link(rate, _EXCHANGE_SECONDS)
        return min(others, key=lambda link: link.rate, default=guess), False

    def pass_seconds(self, alone: float, cards: int) -> float:
        """Return what a pass takes, of which one card computes for ``alone`` seconds."""
        if cards == 1:
            return alone
        shape, choices = self.architecture.transformer, self.choices
        blocks = block_count(shape)
        size = BYTES[choices.dtypes["transformer"]]
        tensor = self.workload.batch_size * self.tokens * shape.dim * size / cards
        sent = blocks * 4 * tensor * (cards - 1) / cards
        computed = alone / cards
        if choices.offload_of("transformer") == "stream":
            computed = min(self.streamed_seconds(alone, cards))
        link, _ = self.link(cards)
        return computed + sent / link.rate + 4 * blocks * link.seconds

    def streamed_seconds(self, alone: float, cards: int) -> tuple[float, float]:
        """Return what a pass takes whose weights are streamed: each card copies all, or shares.

        What arrives for a block is hidden behind what the one before computes, where there are two
        buffers: shared, that is a part from RAM and then the parts of the others. All cards copy at
        the same time, from the same RAM and often through the same switch: how fast is measured
        with the link.
        """
        given = (self.architecture, self.workload, self.choices, self.system)
        arrives = stream_seconds(*given, 1) / windows_per_step(*given[:3])
        link, _ = self.link(cards)
        copied = min(alone, arrives)
        if link.host and not reads_from_disk(given[0], *given[2:]):
            copied *= self.system.bus_bytes_per_second / link.host
        others = streamed_bytes(self.architecture, self.choices) * (cards - 1) / cards
        blocks = block_count(self.architecture.transformer)
        parts = copied / cards + others / link.rate + blocks * link.seconds
        if self.choices.stream_buffers == 1:  # nothing is hidden
            computed = max(0.0, alone - arrives) / cards
            return computed + copied, computed + parts
        return max(alone / cards, copied), max(alone / cards, parts)

    def shares_weights(self, alone: float, cards: int) -> bool:
        """Say whether the cards of a gang copy each streamed block once, and gather it."""
        if cards == 1 or self.choices.offload_of("transformer") != "stream":
            return False
        whole, shared = self.streamed_seconds(alone, cards)
        return shared < whole

    def card_peak(self, cards: int, *, shared: bool = False) -> int:
        """Return the bytes that a card is expected to hold at most while passes are computed.

        Gathers of ``shared`` weights have a communicator of their own.
        """
        choices = replace(self.choices, lean=True) if cards > 1 else self.choices
        given = (self.architecture, self.workload, choices, self.system)
        stages = estimate(*given, cut=cards).stages
        most = max(s.device_bytes for s in stages if s.name.startswith("denoise"))
        on_cards = cards > 1 and self.system.device_kind == "cuda"
        return most + int(_BUFFERS) * on_cards * (1 + shared)


def machine(system: SystemResources) -> str:
    """Name card and software as links and trials are kept under."""
    threads = f", {system.between.threads} threads" if system.device_kind == "cpu" else ""
    return f"{system.device_name}, {system.backend}, torch {system.torch_version}{threads}"


def tried_as(job: Cutting) -> str:
    """Name what decides, beside the tokens, whether a pass that is cut keeps its bits."""
    shape, choices = job.architecture.transformer, job.choices
    parts = [job.architecture.components.get(name) for name in experts_of(job.architecture)]
    kinds = [part.stored_as if part else "" for part in parts]
    kinds = [kind or job.architecture.weight_kind for kind in kinds]
    words = [f"{job.architecture.name} of {shape.layers} x {shape.dim}/{shape.heads}"]
    words.append(f"{choices.dtypes['transformer']} of {'/'.join(dict.fromkeys(kinds))}")
    words += ["fp8 storage"] * choices.fp8_storage + ["LoRA"] * bool(job.architecture.loras)
    words.append("lean by rows" if choices.by_rows else "lean")
    words += ["fastest kernels"] * choices.quick + ["products in 8 bit"] * choices.eight_bit
    words += ["attention in 8 bit"] * choices.attention_8bit
    return f"{machine(job.system)}; {', '.join(words)}"


def wishes(
    architecture: ModelArchitecture, workload: Workload, choices: Choices,
    system: SystemResources, requested: OptimizationConfig, lean: bool,
) -> Cutting:  # fmt: skip
    """Return what can be cut of a job; ``lean`` says whether the lean forward can be used."""
    return Cutting(
        architecture=architecture, workload=workload, choices=choices, system=system,
        exact=requested.speed == "exact",
        possible=choices.lean or (lean and requested.forward == "auto"),
    )  # fmt: skip
