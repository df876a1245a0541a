"""``OptimizationPlan``: the chosen ``Choices`` with their estimate and the reasons for them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..config import MemoryEstimate
from ..memory import STREAM_BUFFERS, Choices
from .stage_seconds import StageSeconds


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationPlan:
    """How a workload is run, and (``estimate``) the memory that is expected to need."""

    device: str
    choices: Choices
    """What the plan decides: precision, placement, forward, windows. Each can also be read as an
    attribute of the plan: ``plan.lean`` is ``plan.choices.lean``."""
    estimate: MemoryEstimate
    reasons: tuple[str, ...] = ()
    tier: int = 0
    """0 changes no bit of the result; higher tiers change more (see ``reasons``)."""
    step_seconds: float = 0.0
    """Predicted seconds of a denoising step. Good enough to compare plans with each other."""
    seconds: float = 0.0
    """Predicted for the whole job as things stand: what this process holds is not read again, other
    files lie in the system's cache where RAM can hold them all."""
    cold_seconds: float = 0.0
    """The same in a new process, every file read from the disk."""
    stage_seconds: tuple[StageSeconds, ...] = ()
    """Both figures stage by stage: they are the sums of these."""
    pin_limit: int | None = None
    """Bytes of RAM that may be page-locked at most, where the user limits the RAM."""
    paced: bool = False
    """Whether ``step_seconds`` is corrected by the pace of earlier runs on this machine."""
    compute_bound: bool = True
    """Whether a step's transfers hide behind its compute."""
    workers: tuple[str, ...] = ()
    """The devices on which processes compute the passes of a step; empty: this process does."""
    gang: int = 1
    """How many of them, in their order, compute a pass together, each a part of its tokens."""
    tried_as: str = ""
    """What decides, beside the number of tokens, whether a pass that is cut keeps its bits: the
    card and its software; the model, dtype and forward. A trial is kept under it."""
    shared_weights: bool = False
    """Whether the cards of a gang copy each streamed block once, a part each, and gather it."""
    must_equal: bool = True
    """Whether passes are cut only where that keeps every bit (speed "exact")."""
    card_peak_bytes: int = 0
    """What a worker's card is expected to hold at most; 0 without workers."""
    decode_strips: int = 1
    """In how many strips, on as many of the workers' cards, the clip is decoded."""
    decode_peak_bytes: int = 0
    """What a card is expected to hold at most while it decodes a strip; 0 without strips."""
    decode_whole_bytes: int = 0
    """What one card is expected to hold that decodes what strips could not; 0 without strips."""
    decode_trial: int = 0
    """In how many strips the clip's first frames are decoded again, to learn what that rounds."""
    decode_kind: str = ""
    """What such a trial is kept under."""
    forward_asked: bool = False
    """Whether the forward was asked for; else a saved render in another one is gone on with."""

    def __getattr__(self, name: str) -> Any:
        # Called only for names that the plan itself does not have. Private names are not looked up
        # in ``choices``: copy and pickle ask for some before ``choices`` is set.
        if name == "choices" or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.choices, name)

    def with_choices(self, **changes: Any) -> OptimizationPlan:
        """Return this plan with some of its choices changed. The estimate is not made anew."""
        return replace(self, choices=replace(self.choices, **changes))

    def pin_bytes(self, budget: int) -> int:
        """Return how many bytes of the machine's ``budget`` for page-locked memory may be used."""
        return budget if self.pin_limit is None else min(budget, self.pin_limit)

    def blocks_and_buffers(self, part: str) -> tuple[int, int]:
        """Return (resident blocks, device buffers) of a component that is streamed."""
        if not part.startswith("transformer"):
            return 0, STREAM_BUFFERS
        return self.choices.resident_blocks or 0, self.choices.stream_buffers

    @property
    def first_seconds(self) -> float:
        """Return what of ``seconds`` later runs do not take: libraries' first use, kernels."""
        return sum(stage.first for stage in self.stage_seconds)

    @property
    def reads_ahead(self) -> bool:
        """Whether the low-noise expert is read while the high-noise one computes."""
        return any(stage.ahead_bytes for stage in self.estimate.stages)

    @property
    def precision(self) -> str:
        """Return the dtype the transformer computes in."""
        return self.choices.dtypes["transformer"]

    @property
    def applied(self) -> tuple[str, ...]:
        """Return the choices in a few words each, for a report."""
        choices = self.choices
        words = [f"precision {self.precision}", f"vae {choices.dtypes['vae']}"]
        words.append(f"offload {choices.offload}")
        words += [f"{part} {how}" for part, how in choices.part_offload.items() if how != "model"]
        if choices.stream:
            words.append(f"{choices.resident_blocks} blocks resident, the rest streamed")
            words += ["one at a time"] * (choices.stream_buffers == 1)
        words += ["lean forward"] * choices.lean + ["products by rows"] * choices.by_rows
        words += [f"driving stream {choices.driving}"] * bool(choices.driving)
        words += ["VAE's cache in RAM"] * choices.cache_in_ram
        words += ["fastest kernels"] * choices.quick + ["products in 8 bit"] * choices.eight_bit
        words += ["attention in 8 bit where faster"] * choices.attention_8bit
        words += ["fp8 storage"] * choices.fp8_storage
        words += [f"EasyCache {choices.easycache:g}"] * (choices.easycache > 0)
        words += [f"MagCache {choices.magcache:g}"] * (choices.magcache > 0)
        words += [f"guidance gate {choices.guidance_gate:g}"] * (choices.guidance_gate < 1)
        if choices.window_frames is not None:
            words.append(
                f"windows of {choices.window_frames} frames, {choices.window_overlap} shared"
            )
        words += [f"decoded in {self.decode_strips} strips"] * (self.decode_strips > 1)
        words += [f"on {len(self.workers)} cards"] * (len(self.workers) > 1)
        words += [f"each pass cut over {self.gang}"] * (self.gang > 1)
        words += ["streamed weights shared out"] * self.shared_weights
        return tuple(words)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: the choices and the plan's own fields, side by side."""
        choices = {name: getattr(self.choices, name) for name in self.choices.__slots__}
        own = ("choices", "estimate", "reasons")
        plain = {name: getattr(self, name) for name in self.__slots__ if name not in own}
        return {
            **choices,
            **plain,
            "stage_seconds": [asdict(stage) for stage in self.stage_seconds],
            "dtypes": dict(self.choices.dtypes),
            "part_offload": dict(self.choices.part_offload),
            "reasons": list(self.reasons),
            "estimate": self.estimate.to_dict(),
        }
