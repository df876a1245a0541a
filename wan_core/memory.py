"""What a job needs, in bytes, stage by stage: pure arithmetic on shapes and file headers.

Weights are counted exactly (``sizes``), activations by following the models' own code
(``activations``, ``vae_activations``). What code cannot tell (libraries' workspaces, the
interpreter on a CPU) is added as constants named below. Standard library only; < 5 ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .activations import text_encoder_peak, transformer_peak
from .architecture import ModelArchitecture
from .config import MemoryEstimate, StageEstimate
from .sizes import (
    BYTES,
    assumed_parts,
    block_bytes,
    largest_leaf_bytes,
    part_bytes,
    parts_of,
    rest_bytes,
)
from .vae_activations import decode_peak, encode_peak

if TYPE_CHECKING:
    from .hardware import SystemResources

MIB = 2**20
GIB = 2**30
STREAM_BUFFERS = 2
"""Blocks on the device while streaming: one computes, one arrives."""
_LATENT_COPIES = 6
"""float32 latents alive during a forward: the state, UniPC's history, the first prediction."""
_DEVICE_WORKSPACE = 96 * MIB
"""cuBLAS and cuDNN handles with their workspaces, as the allocator counts them."""
_PROCESS = 450 * MIB
"""The interpreter with torch, diffusers and transformers, in RAM."""
_TEXT_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
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
    """Blocks that are not resident arrive one ahead of their turn, the text encoder's too."""
    lean: bool = False
    """The forward with fewer hidden states alive."""
    fp8_storage: bool = False
    """Blocks' matrices are stored in fp8 and cast when they are used."""


    def offload_of(self, part: str) -> str:
        """Return how one part is placed."""
        return self.part_offload.get(part, self.offload)


def latent_size(architecture: ModelArchitecture, job: Job) -> tuple[int, int, int]:
    """Return (frames, height, width) of the whole clip's latents."""
    vae = architecture.vae or architecture.variant.vae
    scale = vae.scale_factor_spatial
    return job.latent_frames, max(1, job.height // scale), max(1, job.width // scale)


def estimate(
    architecture: ModelArchitecture, job: Job, choices: Choices, system: SystemResources,
    *, available: int | None = None,
) -> MemoryEstimate:  # fmt: skip
    """Return what ``job`` needs when it is run as ``choices`` say.

    ``available`` is what may be used on the device, in bytes; with it the estimate says whether
    the job fits. On a CPU the device's memory is the RAM and the finished frames count too.
    """
    ledger = _Ledger(architecture, job, choices, system)
    stages = ledger.stages()
    peak = max(stages, key=lambda stage: stage.device_bytes)
    output = ledger.frames_bytes
    weights, overhead = peak.weights_bytes, peak.device_bytes - peak.weights_bytes
    return MemoryEstimate(
        base_model_mb=weights / MIB,
        generation_overhead_mb=overhead / MIB,
        output_tensors_mb=output / MIB,
        total_estimated_mb=(weights + overhead + output) / MIB,
        peak_usage_mb=peak.device_bytes / MIB,
        confidence=_confidence(architecture, system, choices),
        warnings=_warnings(architecture),
        stages=stages,
        host_ram_mb=max(stage.host_bytes for stage in stages) / MIB,
        device=system.device,
        fits=None if available is None else peak.device_bytes <= available,
        available_mb=None if available is None else available / MIB,
    )


class _Ledger:
    """Adds up the stages of one job."""

    def __init__(
        self, architecture: ModelArchitecture, job: Job, choices: Choices, system: SystemResources
    ) -> None:
        self.arch, self.job, self.choices = architecture, job, choices
        self.on_cpu = system.device_kind == "cpu"
        self.parts = parts_of(architecture)
        self.vae = architecture.vae or architecture.variant.vae
        self.frames, self.height, self.width = latent_size(architecture, job)
        self.bytes = {name: self._part_bytes(name) for name in self.parts}

    def _part_bytes(self, name: str) -> int:
        fp8 = self.choices.fp8_storage and name.startswith("transformer")
        return part_bytes(self.arch, name, self._dtype(name), fp8=fp8)

    def _dtype(self, name: str) -> str:
        return self.choices.dtypes.get(name) or self.choices.dtypes["transformer"]

    @property
    def frames_bytes(self) -> int:
        job = self.job
        if not job.return_frames:
            return 0
        return job.batch_size * job.num_frames * job.height * job.width * 3 * 4

    @property
    def latent_bytes(self) -> int:
        return self.job.batch_size * self.vae.z_dim * self.frames * self.height * self.width * 4

    def stages(self) -> tuple[StageEstimate, ...]:
        """Return the stages in the order in which they run."""
        job, found = self.job, []
        if job.encode_text:
            found.append(self._stage("text_encode", "text_encoder", self._text()))
        if job.image and "image_encoder" in self.parts:
            tokens = 257 * (2 if job.last_image else 1)
            size = BYTES[self._dtype("image_encoder")]
            # The hidden states of all layers are returned; at one layer 5120-wide temporaries.
            clip = tokens * size * (1280 * 36 + 5120 * 3)
            found.append(self._stage("image_encode", "image_encoder", clip))
        if job.image:
            found.append(self._stage("condition_encode", "vae", self._encode()))
        experts = {"denoise": "transformer"}
        if self.arch.two_experts:
            experts = {"denoise_high": "transformer", "denoise_low": "transformer_2"}
        for name, part in experts.items():
            found.append(self._stage(name, part, self._denoise(part)))
        found.append(self._stage("decode", "vae", self._decode(), output=True))
        return (*found, self._output())

    def _stage(
        self, name: str, part: str, activations: int, *, output: bool = False
    ) -> StageEstimate:
        weights, note = self._weights_on_device(part)
        host = self._host_weights(part) + self.latent_bytes + (self.frames_bytes if output else 0)
        extra = _DEVICE_WORKSPACE
        if self.on_cpu:
            weights, extra = host, _PROCESS
            note = "in RAM, with the interpreter and its libraries"
        return StageEstimate(
            name=name,
            device_bytes=weights + activations + extra,
            weights_bytes=weights,
            activation_bytes=activations,
            host_bytes=host + _PROCESS + (activations if self.on_cpu else 0),
            note=note,
        )

    def _output(self) -> StageEstimate:
        host = self._host_weights("vae") + self.latent_bytes + self.frames_bytes + _PROCESS
        return StageEstimate(
            name="output",
            device_bytes=host if self.on_cpu else 0,
            weights_bytes=0,
            activation_bytes=0,
            host_bytes=host,
            note="finished frames, float32, in RAM" if self.frames_bytes else "written to the file",
        )

    def _weights_on_device(self, part: str) -> tuple[int, str]:
        """Return the weights that are on the device while ``part`` works, and how."""
        dtype = self._dtype(part)
        offload = self.choices.offload_of(part)
        if offload == "none":
            return sum(self.bytes.values()), "all parts stay on the device"
        if offload == "sequential":
            return largest_leaf_bytes(self.arch, part, dtype), "one layer at a time"
        if self.choices.stream and part.startswith("transformer"):
            return self._streamed(dtype)
        return self.bytes[part], f"only the {part.replace('_', ' ')}"

    def _streamed(self, dtype: str) -> tuple[int, str]:
        shape, choices = self.arch.transformer, self.choices
        block = block_bytes(shape, dtype, fp8=choices.fp8_storage)
        resident = min(choices.resident_blocks or 0, shape.layers)
        moving = min(STREAM_BUFFERS, shape.layers - resident)
        nbytes = rest_bytes(shape, dtype) + (resident + moving) * block
        return nbytes, f"{resident} of {shape.layers} blocks resident, the rest streamed"

    def _host_weights(self, part: str) -> int:
        """Return what must be in RAM during a stage: unused parts may be let go and read again."""
        if self.choices.offload != "none":
            return self.bytes[part]
        # Resident on a GPU, a part still passes through RAM when it is read.
        return sum(self.bytes.values()) if self.on_cpu else self.bytes[part]

    def _text(self) -> int:
        peak = text_encoder_peak(BYTES[self._dtype("text_encoder")])
        texts = 2 if self.job.guidance_high or self.job.guidance_low else 1
        return peak + texts * _TEXT_TOKENS * self.arch.transformer.text_dim * 4

    def _encode(self) -> int:
        one_frame = self.arch.variant.expand_timesteps
        return encode_peak(
            self.vae,
            batch=1,
            num_frames=1 if one_frame else self.job.num_frames,
            height=self.job.height,
            width=self.job.width,
            size=BYTES[self._dtype("vae")],
        )

    def _decode(self) -> int:
        return decode_peak(
            self.vae,
            batch=self.job.batch_size,
            latent_frames=self.frames,
            latent_height=self.height,
            latent_width=self.width,
            size=BYTES[self._dtype("vae")],
        ) + 2 * self.latent_bytes

    def _denoise(self, part: str) -> int:
        job, shape = self.job, self.arch.transformer
        guided = job.guidance_low if part == "transformer_2" else job.guidance_high
        size = BYTES[self._dtype(part)]
        forward = transformer_peak(
            shape,
            batch=job.batch_size,
            latent_frames=self._window(),
            latent_height=self.height,
            latent_width=self.width,
            size=size,
            per_token=self.arch.variant.expand_timesteps and job.image,
        )
        condition = max(0, shape.in_channels - self.vae.z_dim) * self.latent_bytes // self.vae.z_dim
        texts = (1 if guided else 0) * job.batch_size * _TEXT_TOKENS * shape.text_dim * size
        cast = block_bytes(shape, self._dtype(part)) // 3 if self.choices.fp8_storage else 0
        return forward + _LATENT_COPIES * self.latent_bytes + condition + texts + cast

    def _window(self) -> int:
        window = self.choices.window_frames or self.job.window_frames
        if window is None:
            return self.frames
        return min(self.frames, (window + 2) // 4 + 1)


def _confidence(
    architecture: ModelArchitecture, system: SystemResources, choices: Choices
) -> float:
    """Rate the estimate: arithmetic alone is 0.8, less where something was assumed."""
    rating = 0.8
    if system.device_kind == "cpu":
        rating -= 0.15  # measured as the process's RAM, which no arithmetic covers
    if assumed_parts(architecture):
        rating -= 0.1
    if not architecture.transformer.heads_known:
        rating -= 0.2
    if choices.offload == "sequential":
        rating -= 0.05
    return round(max(0.1, rating), 2)


def _warnings(architecture: ModelArchitecture) -> tuple[str, ...]:
    assumed = assumed_parts(architecture)
    if not assumed:
        return ()
    names = ", ".join(name.replace("_", " ") for name in assumed)
    return (f"No file was given for {names}; the variant's usual one is assumed.",)


def format_estimate(estimate: MemoryEstimate) -> str:
    """Lay an estimate out as text: one line per stage, the peak against what there is, reasons."""
    lines = ["stage               on device    weights  activations    in RAM   (predicted)"]
    for stage in estimate.stages:
        on_device = (stage.device_bytes, stage.weights_bytes, stage.activation_bytes)
        cells = [f"{value / GIB:8.2f} GiB" for value in (*on_device, stage.host_bytes)]
        lines.append(f"{stage.name:<17}" + " ".join(cells) + (f"  {stage.note}" * bool(stage.note)))
    lines.append(_verdict(estimate))
    lines += [f"  because {reason}" for reason in estimate.reasons]
    lines += [f"  warning: {text}" for text in estimate.warnings]
    return "\n".join(lines)


def _verdict(estimate: MemoryEstimate) -> str:
    peak = f"peak {estimate.peak_usage_mb / 1024:.2f} GiB on {estimate.device}"
    if estimate.available_mb is None or estimate.fits is None:
        return f"{peak} (confidence {estimate.confidence:.0%})"
    there = f"{estimate.available_mb / 1024:.2f} GiB can be used"
    fits = "fits" if estimate.fits else "DOES NOT FIT"
    return f"{peak}, {there}: {fits} (confidence {estimate.confidence:.0%})"
