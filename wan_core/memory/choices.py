"""What bytes and seconds depend on: a request's Workload and a plan's Choices. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..models import ModelArchitecture

MATRIX_UNITS = {"fp8": (8, 9), "int8": (7, 5)}
"""The first compute capability that multiplies each kind of numbers in 8 bit."""
_PLAIN = ("", "bf16", "fp16", "fp32")
"""How files are stored of which ``fp8_storage`` makes fp8."""
STREAM_BUFFERS = 2
"""Buffers for streamed blocks on the device: one block computes while the next one arrives."""


def matrix_kind(stored_as: str, *, fp8: bool = False) -> str:
    """Return the kind, a key of ``MATRIX_UNITS``, that weights so stored are multiplied in, or "".

    ``fp8`` says that plain weights are stored in fp8 once they are read. The fp8 of two digits
    (e5m2) is not multiplied.
    """
    if stored_as.startswith("fp8 e5m2"):
        return ""
    kind = stored_as.split(" ")[0]
    if fp8 and kind in _PLAIN:
        return "fp8"
    return kind if kind in MATRIX_UNITS else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The numbers of a request that bytes and seconds depend on.

    Width and height are in pixels. ``num_frames`` counts video frames and is 4n + 1.
    """

    width: int
    height: int
    num_frames: int
    batch_size: int = 1
    guidance_high: bool = True
    """Whether the high-noise expert, or the only one, runs with guidance (two passes)."""
    guidance_low: bool = True
    window_frames: int | None = None
    """Length of a denoising window in video frames; None: the whole clip at once."""
    window_overlap: int = 16
    window_anchor: bool = False
    """Whether a window sees one latent frame before those that it makes."""
    image: bool = False
    last_image: bool = False
    steps: int = 50
    return_frames: bool = True
    encoder_bytes: int = 0
    """RAM that the encoders of its mp4 take, where it is written to one."""
    to_file: bool = False
    """Whether an mp4 is written."""
    encode_text: bool = True
    high_steps: int | None = None
    """Steps of the high-noise expert; None where there is one expert."""
    partial_steps: bool = False
    """Whether only a part of the schedule's steps is made."""
    moving_windows: bool = False
    """Whether windows are at other places in each step."""
    in_turn: bool = False
    """Whether each window is denoised to its end before the next one begins (continuation)."""
    references: int = 0
    """Latent frames in front of the clip's: the references that VACE denoises with it, or the one
    that Fun Control sees."""
    reference_picture: bool = False
    """Whether a Fun model is given a reference: the VAE encodes it, and CLIP sees it."""
    camera: bool = False
    """Whether a camera's rays are given."""
    keyframes: int = 0
    """Pictures that the clip shows at given frames; the start and the end image count among them
    where there are others."""
    start_video: bool = False
    """Whether the VAE encodes a video first: one that the clip starts from, or that Fun Control
    follows."""
    overlap_free: bool = False
    """Whether windows may share more where that fills several cards."""
    idle: tuple[str, ...] = ()
    """Experts that make no step of a shortened schedule, and are not read."""

    def guided(self, part: str) -> bool:
        """Whether the steps of an expert, or of the only transformer, make two passes."""
        return self.guidance_low if part == "transformer_2" else self.guidance_high

    @property
    def unread(self) -> tuple[str, ...]:
        """Components that are not read: those, and the text encoder where no text is encoded."""
        return self.idle if self.encode_text else (*self.idle, "text_encoder")

    @property
    def latent_frames(self) -> int:
        """Number of latent frames in the clip."""
        return (self.num_frames - 1) // 4 + 1

    @property
    def frames_bytes(self) -> int:
        """Bytes of the finished frames, float32, where they are returned."""
        count = self.batch_size * self.num_frames * self.return_frames
        return count * self.height * self.width * 3 * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a plan decides: all that an estimate depends on beside model, machine and Workload."""

    dtypes: Mapping[str, str] = field(hash=False)
    """Compute dtype by component: "fp32", "bf16" or "fp16"."""
    offload: str = "none"
    """"none", "model" (one component on the device at a time) or "sequential" (one layer)."""
    part_offload: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Components that are placed in another way than ``offload`` says."""
    window_frames: int | None = None
    window_overlap: int = 16
    resident_blocks: int | None = None
    """Transformer blocks kept on the device when ``stream`` is set."""
    stream: bool = False
    """Whether transformer blocks that are not resident are copied in, each while the block before
    it computes."""
    stream_buffers: int = STREAM_BUFFERS
    """Buffers on the device for streamed blocks. With 1, a block is copied only when the one before
    it is done."""
    lean: bool = False
    """Whether the lean forward is used: fewer tensors alive, the same bits."""
    by_rows: bool = False
    """Whether the lean forward also splits matrix products, by rows and heads, and the lean VAE
    works in bands of rows; rounding may differ."""
    cache_in_ram: bool = False
    """Whether the lean VAE keeps its feature cache in RAM between uses: the same bits, more
    transfers."""
    easycache: float = 0.0
    """Threshold of EasyCache, which takes steps from the step before; 0 computes each step."""
    magcache: float = 0.0
    """How many times rarer MagCache computes the blocks; 0 computes them in each step."""
    guidance_gate: float = 1.0
    """Share of each expert's steps that compute both passes of guidance."""
    fp8_storage: bool = False
    """Whether the matrices of transformer blocks are stored in fp8 and cast when they are used."""
    quick: bool = False
    """Whether attention and the lean VAE take the fastest kernels; rounding may differ."""
    eight_bit: bool = False
    """Whether the lean forward multiplies layers that a file stores in 8 bit in 8 bit."""
    attention_8bit: bool = False
    """Whether attention may be computed by installed kernels that round to 8 bit."""
    driving: str = ""
    """What of Animate 2's driving stream is kept between forwards, the bits being the same: "kv"
    (keys and values on the device), "inputs" (the blocks' inputs in page-locked RAM), "again"
    (nothing, it runs beside every forward); "" for other models."""
    hints_in_turn: bool = True
    """Whether a VACE model's hints can be computed one at a time; not where the installed diffusers
    computes them in a way that is not known."""

    def offload_of(self, part: str) -> str:
        """Return how a component is placed: "none", "model", "sequential", "stream" or "group"."""
        if self.stream and part.startswith("transformer"):
            return "stream"
        return self.part_offload.get(part, self.offload)

    @property
    def lean_vae(self) -> bool:
        """Whether the VAE's lean halves are used.

        They do not call layers as modules, so hooks that bring in weights layer by layer would not
        run.
        """
        return self.lean and self.offload_of("vae") in ("none", "model")

    def hints_at_once(self, part: str) -> bool:
        """Whether all of VACE's hints are computed before the first block, as diffusers does.

        Its group offload acts around the model's own forward, which is then kept.
        """
        return not self.hints_in_turn or self.offload_of(part) == "group"


def spread(blocks: int, resident: int) -> tuple[int, ...]:
    """Return the indices of ``resident`` out of ``blocks`` blocks, spread as evenly as possible."""
    return tuple(i for i in range(blocks) if (i + 1) * resident // blocks > i * resident // blocks)


def latent_size(architecture: ModelArchitecture, workload: Workload) -> tuple[int, int, int]:
    """Return (frames, height, width) of the whole clip's latents."""
    vae = architecture.vae_shape
    scale = vae.scale_factor_spatial
    return workload.latent_frames, max(1, workload.height // scale), max(1, workload.width // scale)


def window_latents(workload: Workload, choices: Choices, frames: int) -> int:
    """Return how many of the clip's latent frames, ``frames`` in all, a window sees at once."""
    window = choices.window_frames or workload.window_frames
    return frames if window is None else min(frames, (window + 2) // 4 + 1 + workload.window_anchor)


def windows_of(workload: Workload, choices: Choices, frames: int) -> int:
    """Return how many windows a step has, over ``frames`` latent frames."""
    window = window_latents(workload, choices, frames)
    if window >= frames:
        return 1
    overlap = choices.window_overlap if choices.window_frames else workload.window_overlap
    stride = max(1, window - -(-overlap // 4))
    return 1 + -(-(frames - window) // stride)


def seen_latents(workload: Workload, choices: Choices, frames: int) -> int:
    """Return how many latent frames the transformer sees at once, references included."""
    return window_latents(workload, choices, frames) + workload.references


def rays_bytes(architecture: ModelArchitecture, workload: Workload, frames: int, size: int) -> int:
    """Return the bytes of a camera's rays, numbers of ``size`` bytes for every pixel.

    They are those of ``frames`` latent frames, whose channels hold four frames each.
    """
    channels = architecture.transformer.camera_channels or 0
    return workload.camera * frames * channels * workload.height * workload.width * size
