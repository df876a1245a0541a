"""The data that travels between the rooms: requests, results, estimates. No behaviour.

Nothing here imports torch; tensors and images appear in annotations only. Fields that are
None in a :class:`GenerationConfig` mean "the variant's official value" (``variants.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    ImageInput = Any
    """PIL image, numpy array (H, W, 3), or tensor (H, W, 3) / (1, H, W, 3) with values 0..1."""

MIB, GIB = 2**20, 2**30

CODECS = ("h264", "h265")
"""Codecs an mp4 can have."""
EXPERTS = ("both", "high", "low")
"""What a LoRA can work on: both transformers of an A14B, or one of them."""
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
"""What a transformer can be asked to compute in; "auto" leaves it to the plan."""
RESUME = ("auto", "never", "must")
"""Whether a render goes on with a saved one: where there is one, never, or else it fails."""


@dataclass(frozen=True, slots=True)
class WanLoRA:
    """A LoRA file, the expert it works on ("both", "high" or "low"), and how strongly.

    A model with one transformer takes "both". Strength 0 leaves the LoRA out, below 0 inverts it.
    """

    path: str | Path
    expert: str = "both"
    strength: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WanModelFiles:
    """The files a pipeline is made of, where they do not lie in one diffusers folder.

    Each is a file or a component folder. ``transformer`` is the only or the high-noise model,
    ``transformer_2`` the low-noise one: the field decides the role, never the file's name.
    ``loras`` lists ``WanLoRA`` or tuples (file, expert, strength).
    """

    transformer: str | Path
    transformer_2: str | Path | None = None
    vae: str | Path | None = None
    text_encoder: str | Path | None = None
    tokenizer: str | Path | None = None
    image_encoder: str | Path | None = None
    loras: tuple[WanLoRA | tuple[str, str, float], ...] = ()


@dataclass(slots=True, kw_only=True)
class GenerationConfig:
    """One job: what to make. None means the official value of the model that is loaded.

    Sizes are pixels, ``num_frames`` counts pixel frames (Wan makes 4n+1; others are made longer
    and trimmed), scales are classifier-free guidance weights (1 switches guidance off), ``seed``
    draws the noise on the CPU so that it does not depend on the device.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    num_frames: int = 81
    width: int = 832
    height: int = 480
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """Guidance of the only or the high-noise expert."""
    guidance_scale_2: float | None = None
    """Guidance of the low-noise expert."""
    flow_shift: float | None = None
    boundary: float | None = None
    """Share of the training timesteps (0..1) at and above which the high-noise expert works."""
    switch_step: int | None = None
    """First step of the low-noise expert; overrides ``boundary``."""
    scheduler: str | None = None
    """"unipc", "euler" or "dpm++2m"."""
    fps: float | None = None
    seed: int | None = 0
    """None draws a fresh seed, which the result's metadata names."""
    batch_size: int = 1
    image: ImageInput | None = None
    last_image: ImageInput | None = None
    latents: torch.Tensor | None = None
    """Normalised latents (B, C, T, h, w) to start from: noise at step 0, or the state of an
    earlier run at ``start_step``."""
    prompt_embeds: torch.Tensor | None = None
    """Text embeddings (B or 1, 512, text_dim), zero beyond the prompt's tokens."""
    negative_prompt_embeds: torch.Tensor | None = None
    start_step: int = 0
    end_step: int | None = None
    force_chunked_processing: bool = False
    max_chunk_size: int | None = None
    """Longest run of frames the denoiser sees at once; longer clips are made in windows."""
    window_overlap: int = 16
    """Frames that neighbouring windows share."""
    window_schedule: str = "static"
    """"static", "uniform" or "looped" (``windows.py``)."""
    window_fusion: str = "ramp"
    """"ramp", "pyramid", "flat" or "causal" (``windows.py``)."""
    window_mode: str = "windows"
    """"windows" denoises all windows together; "continuation" makes one segment after the other,
    each begun with the last latents before it (image-to-video models and the 5B)."""
    window_anchor: bool = False
    """Show later windows the latent frame before them as well, and throw its prediction away."""
    continue_from: torch.Tensor | None = None
    """Normalised latents (B, C, n, h, w) the clip begins with, in continuation mode;
    ``num_frames`` counts them."""
    drift_correction: float = 0.0
    """0..1: how far the colours of later segments are moved to those of the first."""
    noise: str = "clip"
    """"clip", "frame" or "freenoise" (``noise.py``)."""
    prompts: str | None = None
    """Lines ``frames: text`` in place of ``prompt``. Windows take the text of their middle; in
    continuation mode a segment begins with every text."""
    resume: str | None = None
    """"auto" goes on with a saved render of this very job if there is one, "must" insists on it,
    "never" starts anew; all three keep a journal while the render lasts. None keeps none."""
    journal_folder: str | Path | None = None
    """Folder for journals; None means ``.wanfit`` beside ``output_path``."""
    precision_override: str | None = None
    enable_optimizations: bool = True
    warning_callback: Callable[[str], object] | None = None
    """Called with every warning of the result, most of them as soon as they are known."""
    progress_callback: Callable[[int, int, torch.Tensor], object] | None = None
    """Called after every step with (steps done, steps in all, normalised latents)."""
    preview_callback: Callable[[int, int, torch.Tensor], object] | None = None
    """Called after every step with (steps done, steps in all, predicted clean latents)."""
    chunk_callback: Callable[[int, int], object] | None = None
    """Called before every window of a step with (index, windows in the step)."""
    decode_callback: Callable[[int, int], object] | None = None
    """Called after every decoded part with (frames done, frames in all)."""
    interrupt_check: Callable[[], object] | None = None
    """Called between transformer blocks and decoded chunks; what it raises stops the run."""
    output_path: str | Path | None = None
    """Where to write the mp4; None writes none."""
    output_metadata: Mapping[str, str] = field(default_factory=dict)
    """Stored in the mp4's container (ComfyUI reads its workflow from there)."""
    codec: str = "h264"
    """Codec of the mp4: "h264" plays everywhere, "h265" is smaller and slower."""
    crf: int = 18
    """Quality of the mp4: 0 keeps every bit, 51 is worst."""
    pix_fmt: str = "yuv420p"
    """Pixels of the mp4; yuv420p plays everywhere."""
    audio: tuple[torch.Tensor, int] | None = None
    """(waveform (1 or 2 channels, samples) in -1..1, samples a second) that goes into the mp4."""
    return_frames: bool = True
    """False leaves ``frames`` None: the video is only written, memory stays flat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """What one stage is expected to need, in bytes."""

    name: str
    device_bytes: int
    """Peak on the device while the stage runs: weights there plus activations."""
    weights_bytes: int
    activation_bytes: int
    host_bytes: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a job is expected to need. Megabytes are MiB (2**20 bytes); nothing here is measured.

    ``peak_usage_mb`` is the largest stage on the device, ``total_estimated_mb`` the sum of its
    three named parts, ``confidence`` (0..1) says how far the figures rest on measured runs.
    """

    base_model_mb: float
    generation_overhead_mb: float
    output_tensors_mb: float
    total_estimated_mb: float
    peak_usage_mb: float
    confidence: float
    basis: str = "arithmetic"
    """What the figures rest on: arithmetic alone, or measured runs too."""
    warnings: tuple[str, ...] = ()
    stages: tuple[StageEstimate, ...] = ()
    host_ram_mb: float = 0.0
    reasons: tuple[str, ...] = ()
    device: str = "cpu"
    fits: bool | None = None
    """Whether the peak fits the memory that is free now; None where that is not known."""
    available_mb: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, ready for JSON."""
        return asdict(self)


@dataclass(slots=True, kw_only=True)
class StageReport:
    """One stage as it went: seconds and peak bytes, predicted beside measured."""

    name: str
    seconds: float = 0.0
    predicted_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    note: str = ""


@dataclass(slots=True, kw_only=True)
class VideoGenerationResult:
    """What came of a job.

    ``frames`` is float32 (num_frames, height, width, 3), 0..1, on the CPU; a batch is laid end to
    end along the first axis. ``latents`` are normalised (B, C, T, h, w) on the CPU,
    ``vae_latents`` the same times std plus mean, as ComfyUI's LATENT has them.
    """

    success: bool
    frames: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    vae_latents: torch.Tensor | None = None
    output_path: Path | None = None
    generation_time: float = 0.0
    memory_used_mb: float = 0.0
    peak_memory_mb: float = 0.0
    metadata: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    applied_optimizations: list[str] = field(default_factory=list)
    stages: list[StageReport] = field(default_factory=list)
    error: BaseException | None = None
    """The exception behind ``errors``, for :meth:`raise_for_error`."""

    def raise_for_error(self) -> VideoGenerationResult:
        """Raise the exception that ended the job, or return self if it succeeded."""
        if self.error is not None:
            raise self.error
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return everything but tensors as plain values, ready for JSON."""
        skipped = ("frames", "latents", "vae_latents", "error", "output_path", "stages")
        plain = {name: getattr(self, name) for name in self.__slots__ if name not in skipped}
        plain["output_path"] = None if self.output_path is None else str(self.output_path)
        plain["stages"] = [asdict(stage) for stage in self.stages]
        return plain
