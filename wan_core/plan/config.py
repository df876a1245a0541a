"""``OptimizationConfig``: what the user asks of the plan, checked; nothing is decided here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..config import MIB, PRECISIONS, SPEEDS, plain_number, shown
from ..errors import InvalidRequest

if TYPE_CHECKING:
    from ..memory import SystemResources, Workload

PRECISIONS_AND_STORED = (*PRECISIONS, "stored")
OFFLOADS = ("auto", "none", "model", "sequential", "stream", "group")
FORWARDS = ("auto", "diffusers", "lean", "lean_rows")
FP8 = ("auto", "never", "always")
STEP_CACHES = ("auto", "never", "easycache", "magcache")
SHORTER_WINDOWS = (49, 33, 17)
"""Video frames of the windows to try where windows of the model's own length do not fit."""
_MOST = 2**40
"""Largest number that is taken: more than any machine has GiB, MiB, blocks or frames of, and small
enough for all that is computed with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationConfig:
    """What the user asks of a plan. The plan decides whatever is left at "auto" or None.

    Raises InvalidRequest for a bad value, naming the field, the value and what is allowed.

    Usage::

        # Leave everything to the plan: the fastest way that fits this machine.
        OptimizationConfig()

        # Use at most 10 GiB of the GPU, to leave memory for other programs.
        OptimizationConfig(vram_limit_gb=10)

        # Use at most 24 GiB of RAM.
        OptimizationConfig(ram_limit_gb=24)

        # Stream the transformer's blocks, with 20 of them resident on the GPU.
        OptimizationConfig(offload="stream", resident_blocks=20)

        # Be faster: "fast" may round differently, "fastest" may also change the video.
        OptimizationConfig(speed="fast")

        # Go lower in memory: products cut by rows (rounding may change), and weights in fp8 (which
        # changes the video).
        OptimizationConfig(forward="lean_rows", fp8_storage="always")
    """

    precision: str = "auto"
    """The dtype the transformer computes in: "auto", "bf16", "fp16", "fp32" or "stored" (the one of
    the file)."""
    offload: str = "auto"
    """Which weights are on the device: "auto", "none" (all of them), "model" (one component at a
    time), "sequential" (one layer at a time), "stream" (the transformer's blocks, each copied while
    the one before computes), or "group" (one block at a time, by diffusers' hooks)."""
    resident_blocks: int | None = None
    """Transformer blocks that stay on the device while the others are streamed. A number asks for
    "stream"; None leaves it to the plan."""
    forward: str = "auto"
    """The code that computes the transformer and the decoder: "auto", "diffusers" (its own), "lean"
    (the same bits with fewer tensors alive) or "lean_rows" (fewer still; rounding may differ)."""
    fp8_storage: str = "auto"
    """Whether to store the matrices of the transformer's blocks in fp8, which changes the result:
    "auto" (only where nothing fits without), "never" or "always"."""
    device: str | None = None
    """"cuda:0", "cpu" …; None takes the first GPU, or the CPU if there is none. GPUs of Apple and
    Intel are not supported."""
    vram_limit_gb: float | None = None
    """GiB of device memory the plan may use. CUDA's context, up to 1 GiB, is not counted."""
    ram_limit_gb: float | None = None
    """GiB of RAM the plan may use."""
    chunk_size: int | None = None
    """Length, in latent frames (4 video frames each), of the windows the plan may fall back to when
    the clip does not fit as a whole. Windows change the result. None allows them only for clips
    longer than the model's own length: windows of that length, or shorter where those do not fit.
    0 never allows them. It is also the length of the windows that ``force_chunked_processing`` asks
    for where the job has no ``max_chunk_size``."""
    min_vram_mb: float | None = None
    """Refuse a GPU with less memory than this, in MiB. Does not apply to a CPU."""
    speed: str = "exact"
    """What may be changed to be faster: "exact" (no bit), "fast" (rounding) or "fastest" (the video
    too). The plan says what that is for a job on this machine."""
    step_cache: str = "auto"
    """Whether steps may be taken from the step before: "auto" (with speed "fastest"), "never",
    "easycache" or "magcache" (whatever the speed)."""
    step_cache_threshold: float | None = None
    """The error at which EasyCache computes a step again, 0 to 1: 0 always, 0.05 about every second
    one, more is faster and further from the exact video. None means 0.05."""
    step_cache_factor: float | None = None
    """How many times rarer MagCache shall compute the blocks, 1 to 4; None means 1.5."""
    guidance_gate: float | None = None
    """Share of each expert's steps, from its first on, that compute both passes of guidance; after
    it the last difference of the two is used. None means 1 (all), with speed "fastest" 0.5."""
    devices: str = "1"
    """How many cards compute one clip: a number, "all", "auto" (as many as pay, of those that are
    alike and free), or which ones: "0,2". Windows first, then the two passes of guidance, then
    each pass cut along its tokens; with speed "exact" only where that has shown equal bits. On a
    CPU a number of processes."""

    def overridden(self, precision: str | None) -> OptimizationConfig:
        """Return it with the ``precision_override`` of one job; None changes nothing."""
        if precision is None:
            return self
        _choice("precision_override", precision, PRECISIONS_AND_STORED)
        return replace(self, precision=precision)

    def __post_init__(self) -> None:
        _choice("precision", self.precision, PRECISIONS_AND_STORED)
        _choice("offload", self.offload, OFFLOADS)
        _choice("forward", self.forward, FORWARDS)
        _choice("fp8_storage", self.fp8_storage, FP8)
        _choice("speed", self.speed, SPEEDS)
        _choice("step_cache", self.step_cache, STEP_CACHES)
        for name, least, most in (
            ("step_cache_threshold", 0, 1), ("guidance_gate", 0.05, 1), ("step_cache_factor", 1, 4)
        ):  # fmt: skip
            object.__setattr__(self, name, _between(name, getattr(self, name), least, most))
        object.__setattr__(self, "devices", _devices(self.devices))
        self._check_blocks()
        if self.device is not None and not (isinstance(self.device, str) and self.device):
            raise _bad("device", self.device, 'a name like "cuda:0" or "cpu", or None')
        # Kept as plain numbers: they are printed, compared and written as JSON.
        for name in ("vram_limit_gb", "ram_limit_gb", "min_vram_mb"):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        size = _whole(self.chunk_size)
        fits = isinstance(size, int) and 0 <= size <= _MOST and size != 1
        if self.chunk_size is not None and not fits:
            allowed = "a whole number of latent frames, 2 or more; 0 (never); or None"
            raise _bad("chunk_size", self.chunk_size, allowed)
        object.__setattr__(self, "chunk_size", size)

    def _check_blocks(self) -> None:
        if self.resident_blocks is None:
            return
        count = _whole(self.resident_blocks)
        if not isinstance(count, int) or not 0 <= count <= _MOST:
            allowed = "a whole number of blocks, 0 or more, or None"
            raise _bad("resident_blocks", self.resident_blocks, allowed)
        object.__setattr__(self, "resident_blocks", count)
        if self.offload not in ("auto", "stream"):
            raise InvalidRequest(
                f"resident_blocks is {count} and offload {self.offload!r}; blocks stay beside "
                "streamed ones only. Choose offload 'stream', or leave resident_blocks empty.",
                field="resident_blocks",
            )

    @property
    def placement(self) -> str:
        """The offload that is asked for; a number of resident blocks means "stream"."""
        return "stream" if self.resident_blocks is not None else self.offload

    @staticmethod
    def from_mapping(mapping: Mapping[str, Any]) -> OptimizationConfig:
        """Build from a dictionary, in which None leaves a value to what is built in.

        Raises InvalidRequest for an unknown key or a bad value.
        """
        if not isinstance(mapping, Mapping):
            raise _bad("optimization_config", mapping, "an object with keys and values")
        known = [field.name for field in fields(OptimizationConfig)]
        for key in mapping:
            if key not in known:
                raise InvalidRequest(
                    f"optimization_config has the key {shown(key)}; known are {', '.join(known)}.",
                    field=str(key),
                )
        named = {key: value for key, value in mapping.items() if value is not None}
        return OptimizationConfig(**named)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON and for ``from_mapping``."""
        return asdict(self)

    def check_device(self, system: SystemResources) -> None:
        """Raise InvalidRequest if the device has less memory than ``min_vram_mb``."""
        if self.min_vram_mb is None or system.device_kind == "cpu":
            return
        there = system.device_total_bytes / MIB
        if there < self.min_vram_mb:
            raise InvalidRequest(
                f"min_vram_mb is {self.min_vram_mb:g}, and {system.device_name} has "
                f"{there:.0f} MiB. Use a larger GPU, or lower min_vram_mb.",
                field="min_vram_mb",
            )

    def fallback_windows(self, workload: Workload, own_frames: int) -> tuple[int, ...]:
        """Return the lengths of the windows to fall back to, in video frames, the longest first.

        ``own_frames`` is the length of the clips that the model was trained on.
        """
        if self.chunk_size == 0:
            return ()
        longest = workload.window_frames or workload.num_frames
        if self.chunk_size is not None:
            frames = 4 * (self.chunk_size - 1) + 1
            return (frames,) if frames < longest else ()
        if longest <= own_frames:
            return ()
        return (own_frames, *(frames for frames in SHORTER_WINDOWS if frames < own_frames))

    def overlap_for(self, workload: Workload, window: int) -> int:
        """Return the frames that fallback windows share: the workload's, at most half a window."""
        return min(workload.window_overlap, max(1, (window - 1) // 8) * 4)


def _devices(value: object) -> str:
    """Return a number of cards, "auto", "all", or their numbers with commas between."""
    number = _whole(value)
    text = value.replace(" ", "").lower() if isinstance(value, str) else ""
    if isinstance(number, int) and 0 < number < 100:
        text = str(number)
    ids = re.fullmatch(r"(cuda:)?\d+(,(cuda:)?\d+)+", text)
    twice = len(set(re.findall(r"\d+", text))) < text.count(",") + 1
    if text not in ("auto", "all") and (twice or not ids) and not re.fullmatch(r"[1-9]\d?", text):
        allowed = 'a number of cards from 1 on, "auto", "all", or numbers of cards like "0,2"'
        raise _bad("devices", value, allowed)
    return text


def _whole(value: object) -> int | float | None:
    """Return a number as an int where it is one: JSON of other languages writes 4.0."""
    number = plain_number(value)
    return int(number) if number is not None and number == int(number) else number


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    # Looked at before it is compared: an array compares element by element.
    if not isinstance(value, str) or value not in allowed:
        raise _bad(name, value, f"one of {', '.join(allowed)}")


def _between(name: str, value: object, least: float, most: float) -> int | float | None:
    number = plain_number(value)
    if value is not None and (number is None or not least <= number <= most):
        raise _bad(name, value, f"a number from {least:g} to {most:g}, or None")
    return number


def _positive(name: str, value: object) -> int | float | None:
    number = plain_number(value)
    if value is not None and (number is None or not 0 < number <= _MOST):
        raise _bad(name, value, f"a number above 0, at most {_MOST}, or None")
    return number


def _bad(name: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {shown(value)}; allowed is {allowed}.", field=name)
