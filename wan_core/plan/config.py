"""What a user asks of the plan: checked values with names, nothing decided yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from ..config import MIB, PRECISIONS
from ..errors import InvalidRequest

if TYPE_CHECKING:
    from ..memory import SystemResources, Workload

PRECISIONS_AND_STORED = (*PRECISIONS, "stored")
OFFLOADS = ("auto", "none", "model", "sequential", "stream", "group")
FORWARDS = ("auto", "diffusers", "lean", "lean_rows")
FP8 = ("auto", "never", "always")
SHORTER_WINDOWS = (49, 33, 17)
"""Frames of the windows to fall back to where those of the model's own length do not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationConfig:
    """Wishes for a plan; what is "auto" or None is decided from model, job and machine.

    Raises InvalidRequest, naming field, value and what is allowed, when made with a bad value.
    """

    precision: str = "auto"
    """What the transformer computes in: "auto", "bf16", "fp16", "fp32", "stored" (the file's)."""
    offload: str = "auto"
    """"none" (all on the device), "model" (one part at a time), "sequential" (one layer),
    "stream" (the transformer block by block, ahead of time), "group" (so by diffusers' hooks)."""
    resident_blocks: int | None = None
    """Transformer blocks that stay on the device while the others are streamed; None: computed.
    Asks for streaming."""
    forward: str = "auto"
    """The transformer's and the decoder's code: "diffusers" (its own), "lean" (less memory, equal
    bits), "lean_rows" (still less; rounding may differ)."""
    fp8_storage: str = "auto"
    """Store the transformer's matrices in fp8, which changes the result: "auto" (where nothing
    larger fits), "never", "always"."""
    device: str | None = None
    """"cuda:0", "cpu", "mps" …; None takes the first GPU, or the CPU."""
    vram_limit_gb: float | None = None
    """Most GiB of the device the plan may use; CUDA's own context, up to 1 GiB, comes on top."""
    ram_limit_gb: float | None = None
    """Most GiB of RAM the plan may use."""
    chunk_size: int | None = None
    """Latent frames (4 video frames each) of the windows the plan may fall back to when the clip
    does not fit as a whole; they change the result. None: windows of the model's own length, or
    shorter, for clips that are longer than that. 0: never."""
    min_vram_mb: float | None = None
    """Refuse a GPU that has less memory than this, in MiB. Does not apply to a CPU."""

    def __post_init__(self) -> None:
        _choice("precision", self.precision, PRECISIONS_AND_STORED)
        _choice("offload", self.offload, OFFLOADS)
        _choice("forward", self.forward, FORWARDS)
        _choice("fp8_storage", self.fp8_storage, FP8)
        self._check_blocks()
        if self.device is not None and not (isinstance(self.device, str) and self.device):
            raise _bad("device", self.device, 'a name like "cuda:0" or "cpu", or None')
        for name in ("vram_limit_gb", "ram_limit_gb", "min_vram_mb"):
            _positive(name, getattr(self, name))
        size = self.chunk_size
        whole = isinstance(size, int) and not isinstance(size, bool)
        if size is not None and not (whole and (size == 0 or size >= 2)):
            allowed = "a whole number of latent frames, 2 or more; 0 (never); or None"
            raise _bad("chunk_size", size, allowed)

    def _check_blocks(self) -> None:
        count = self.resident_blocks
        if count is None:
            return
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise _bad("resident_blocks", count, "a whole number of blocks, 0 or more, or None")
        if self.offload not in ("auto", "stream"):
            raise InvalidRequest(
                f"resident_blocks is {count} and offload {self.offload!r}; blocks stay beside "
                "streamed ones only. Choose offload 'stream', or leave resident_blocks empty.",
                field="resident_blocks",
            )

    @property
    def placement(self) -> str:
        """The offload asked for: a number of resident blocks asks for "stream"."""
        return "stream" if self.resident_blocks is not None else self.offload

    @staticmethod
    def from_mapping(mapping: Mapping[str, Any]) -> OptimizationConfig:
        """Build from a dictionary; raises InvalidRequest for an unknown key or a bad value."""
        if not isinstance(mapping, Mapping):
            raise _bad("optimization_config", mapping, "an object with keys and values")
        known = [field.name for field in fields(OptimizationConfig)]
        for key in mapping:
            if key not in known:
                raise InvalidRequest(
                    f"optimization_config has the key {key!r}; known are {', '.join(known)}.",
                    field=str(key),
                )
        return OptimizationConfig(**mapping)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON and for ``from_mapping``."""
        return asdict(self)

    def check_device(self, system: SystemResources) -> None:
        """Raise InvalidRequest where the device has less memory than ``min_vram_mb``."""
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
        """Return the video frames of the windows to fall back to, the longest first.

        ``own_frames`` is the length of the clips the model was trained on.
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
        """Return the frames that fallback windows share: the job's, at most half a window."""
        return min(workload.window_overlap, max(1, (window - 1) // 8) * 4)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise _bad(name, value, f"one of {', '.join(allowed)}")


def _positive(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise _bad(name, value, "a number above 0, or None")


def _bad(name: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {value!r}; allowed is {allowed}.", field=name)
