"""What memory and time depend on: the numbers of a job, and what a plan may choose. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..models import ModelArchitecture

STREAM_BUFFERS = 2
"""Blocks on the device while streaming: one computes, one arrives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The numbers of a job that memory depends on. Frames and sizes are pixels, frames 4n+1."""

    width: int
    height: int
    num_frames: int
    batch_size: int = 1
    guidance_high: bool = True
    """Whether the only or the high-noise expert runs with guidance (two passes)."""
    guidance_low: bool = True
    window_frames: int | None = None
    """Length of a denoising window in video frames; None: the clip as a whole."""
    window_overlap: int = 16
    window_anchor: bool = False
    """Whether a window sees one latent frame more than it makes."""
    image: bool = False
    last_image: bool = False
    steps: int = 50
    return_frames: bool = True
    encode_text: bool = True

    @property
    def latent_frames(self) -> int:
        """Frames of the latents."""
        return (self.num_frames - 1) // 4 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a plan decides about memory; everything an estimate depends on beside the job."""

    dtypes: Mapping[str, str] = field(hash=False)
    """Per part: "fp32", "bf16" or "fp16"."""
    offload: str = "none"
    """"none", "model" (one part on the device at a time) or "sequential" (one layer)."""
    part_offload: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Parts that are placed otherwise than ``offload`` says."""
    window_frames: int | None = None
    window_overlap: int = 16
    resident_blocks: int | None = None
    """Transformer blocks kept on the device when ``stream`` is set."""
    stream: bool = False
    """Blocks that are not resident arrive one ahead of their turn."""
    stream_buffers: int = STREAM_BUFFERS
    """Buffers on the device for them; with 1 a block arrives when the one before is done."""
    lean: bool = False
    """The forward with fewer hidden states alive; equal bits."""
    by_rows: bool = False
    """The lean forward also cuts matrix products, by rows and heads; rounding may differ."""
    cache_in_ram: bool = False
    """The lean decode's feature cache rests in RAM between uses; equal bits, more bus."""
    fp8_storage: bool = False
    """Blocks' matrices are stored in fp8 and cast when they are used."""

    def offload_of(self, part: str) -> str:
        """Return how one part is placed: "none", "model", "sequential", "stream" or "group"."""
        if self.stream and part.startswith("transformer"):
            return "stream"
        return self.part_offload.get(part, self.offload)


def latent_size(architecture: ModelArchitecture, workload: Workload) -> tuple[int, int, int]:
    """Return (frames, height, width) of the whole clip's latents."""
    vae = architecture.vae or architecture.variant.vae
    scale = vae.scale_factor_spatial
    return workload.latent_frames, max(1, workload.height // scale), max(1, workload.width // scale)


def window_latents(workload: Workload, choices: Choices, frames: int) -> int:
    """Return the latent frames the denoiser sees at once, of ``frames`` in all."""
    window = choices.window_frames or workload.window_frames
    return frames if window is None else min(frames, (window + 2) // 4 + 1 + workload.window_anchor)
