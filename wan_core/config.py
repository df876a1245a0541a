"""The data that travels between the packages: what to make, results, estimates. Little behaviour.

Nothing here imports torch; tensors and images appear in annotations only. A field that is None in
a :class:`GenerationConfig` means "the variant's official value" (``models.variants``).
"""

from __future__ import annotations

import math
import operator
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InvalidRequest

if TYPE_CHECKING:
    import torch

    ImageInput = Any
    """The path of a picture, a PIL image, or a numpy array or tensor (H, W, 3), (H, W) or
    (1, H, W, 3): floats 0..1, or whole numbers in the range of their type."""

MIB, GIB = 2**20, 2**30
_SHOWN = 80

CODECS = ("h264", "h265")
"""Codecs an mp4 can have."""
EXPERTS = ("both", "high", "low")
"""Which expert a LoRA changes: both transformers of an A14B, or one of them."""
SPEEDS = ("exact", "fast", "fastest")
"""What a plan may change for speed's sake, from nothing to the video (``plan.speed``)."""
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
"""The dtypes a transformer can be asked to compute in; "auto" leaves it to the plan."""
TOKEN = "WANFIT_TOKEN"
"""The environment's name of a server's token; a command line can be read by every user."""
RESUME = ("auto", "never", "must")
"""Whether a render continues a saved one: if there is one, never, or it fails without one."""


def child_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that this one starts: without the server's token."""
    return {name: value for name, value in given.items() if name != TOKEN}


def leave_ends_to_driver() -> None:
    """Have this process, which another one drives, ignore what asks a whole group to end.

    Ctrl-C, a closed terminal and a service manager ask the driver and its processes at the same
    time. The driver ends in order, and ends those that it drives; one that was gone before would
    be taken for dead. They end with their driver in any case, as their stdin closes then.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if (number := getattr(signal, name, None)) is not None:
            signal.signal(number, signal.SIG_IGN)


def processors() -> int:
    """Return how many of the machine's processors this process may use."""
    mine = getattr(os, "sched_getaffinity", None)
    return len(mine(0)) if mine is not None else os.cpu_count() or 1


def plain_number(value: Any) -> int | float | None:
    """Return a number of any library as an int or a float; None for what is no finite number.

    Seeds come from ``numpy.random``, scales from ``linspace``, and a tensor may hold one value. A
    bool is no number, and neither is a text.
    """
    if isinstance(value, str | bytes | bytearray) or is_bool(value):
        return None
    if getattr(value, "ndim", 0):
        return None
    if isinstance(value, int):
        return int(value)
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # no integer; RuntimeError: a tensor without data
        pass
    if not hasattr(value, "__float__"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # a signalling NaN of Decimal ...
        return None
    return number if math.isfinite(number) else None


def is_bool(value: Any) -> bool:
    """Whether this is a bool of Python, numpy or torch; torch takes its own for an integer."""
    kind = str(getattr(value, "dtype", ""))
    scalar = kind in ("bool", "torch.bool") and not getattr(value, "ndim", 0)
    return isinstance(value, bool) or scalar


def is_many(value: Any) -> bool:
    """Whether values can be taken out of this one by one; a text, and an array of no axes, is one.

    Arrays and tensors of no axes have ``__iter__`` all the same, and raise when it is called.
    """
    many = isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray)
    return many and getattr(value, "ndim", 1) != 0


def shown(value: Any) -> str:
    """Return ``value`` as a message shows it: short, and on one line, whatever it is."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and len(shape):
        return f"{type(value).__name__} of shape {tuple(shape)}"
    try:
        said = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - an int of more digits than Python prints; others' objects
        more = " with too many digits to show" if isinstance(value, int) else ""
        return f"a {type(value).__name__}{more}"
    return said if len(said) <= _SHOWN else said[: _SHOWN - 3] + "..."


@dataclass(frozen=True, slots=True)
class WanLoRA:
    """A LoRA file, the expert it changes ("both", "high" or "low"), and its strength.

    A model with one transformer takes "both". Strength 0 leaves the LoRA out, below 0 inverts it.
    """

    path: str | Path
    expert: str = "both"
    strength: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WanModelFiles:
    """The files of a model that does not lie in one diffusers folder.

    Each is a file or a component folder. ``transformer`` is the only transformer or the high-noise
    expert, ``transformer_2`` the low-noise expert: the field decides the role, never the file's
    name. ``loras`` lists ``WanLoRA`` objects or tuples (file, expert, strength). ``vace`` and
    ``vace_2`` are VACE modules published without their base model: each is joined with the
    text-to-video transformer of the same size, ``vace`` with ``transformer``.
    """

    transformer: str | Path
    transformer_2: str | Path | None = None
    vae: str | Path | None = None
    text_encoder: str | Path | None = None
    tokenizer: str | Path | None = None
    image_encoder: str | Path | None = None
    loras: tuple[WanLoRA | tuple[str, str, float], ...] = ()
    vace: str | Path | None = None
    vace_2: str | Path | None = None


DEMO_KINDS = ("t2v", "i2v", "vace", "fun")
"""The small models that ship along: text to video, image to video, VACE and Fun Control."""


def demo_model(kind: str = "t2v") -> Path | WanModelFiles:
    """Return a small model of `DEMO_KINDS`, as ``load_wan_pipeline`` takes it.

    VACE is two modules beside the text-to-video model, one for each expert; Fun Control is two
    transformers that share the rest with it. Nothing is opened.
    """
    folder = Path(__file__).parent / "demo_model"
    if kind not in ("vace", "fun"):
        return folder / kind
    base, own = folder / "t2v", folder / kind
    experts = own if kind == "fun" else base
    files = WanModelFiles(
        transformer=experts / "transformer", transformer_2=experts / "transformer_2",
        vae=base / "vae", text_encoder=base / "text_encoder", tokenizer=base / "tokenizer",
    )  # fmt: skip
    if kind == "fun":
        return files
    return replace(
        files,
        vace=own / "wan_demo_vace_module_high_noise.safetensors",
        vace_2=own / "wan_demo_vace_module_low_noise.safetensors",
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WanControl:
    """What guides a clip besides its texts: pictures, masks, a camera, tracks.

    Tensors are laid out as in ComfyUI: videos, ``reference`` and ``keyframes`` (N, H, W, 3), 0..1,
    ``mask`` (N, H, W) or (H, W), 1 = make, 0 = keep. Frames are those of the clip: a longer video
    is cut, a shorter one refused, or played back and forth for a character. The checkpoint decides
    what applies; what the model cannot use is refused with its name, before anything is read.
    """

    video: torch.Tensor | None = None
    """A source video or a drawing of one. A model that reads a control video follows it; any other
    starts from it instead of from noise, as far as ``denoise`` says."""
    mask: torch.Tensor | None = None
    """Where to make something new, frame by frame or one for all frames."""
    reference: torch.Tensor | Sequence[torch.Tensor] | None = None
    """Pictures of what shall appear: a batch, or a list of pictures (H, W, 3) of several sizes."""
    keyframes: torch.Tensor | None = None
    """Pictures that the clip shows at ``positions``."""
    positions: str | Sequence[int] = ""
    """Frame of each key frame, as numbers or as a text like "0, 40, -1"; negative ones count from
    the end. Empty: the key frames are spread evenly from the first frame to the last."""
    camera: torch.Tensor | None = None
    """What ComfyUI's WanCameraEmbedding makes: rays (1, 24, T, H, W)."""
    tracks: Any = None
    """Points and where they go: a JSON text of lists of {"x", "y"} in pixels of the clip (ATI), or
    a mapping with "track_path" (frames, points, 2) and "track_visibility" (frames, points), as
    ComfyUI's WanMove nodes make."""
    strength: float | Sequence[float] = 1.0
    """How much a control counts; for VACE also one number for each of its blocks."""
    denoise: float = 1.0
    """Share of the steps that are made, the last ones; 1 begins with noise."""
    clear_masked: bool = False
    """Make the masked area of ``video`` grey, so that nothing of it is seen: for inpainting. What
    is left under the mask guides the model, as a drawing does."""
    face_video: torch.Tensor | None = None
    """Crops of a face, best 512x512, that a character's face moves like (Animate 1)."""
    background_video: torch.Tensor | None = None
    """The video that a character is put into, where ``mask`` is white (Animate 1)."""


@dataclass(slots=True, kw_only=True)
class GenerationConfig:
    r"""What the user asks for. None means the official value of the model that is loaded.

    Sizes are pixels. ``num_frames`` counts video frames: Wan makes 4n+1 of them, and for any other
    number the clip is made longer and trimmed; 0 means as many as the control's video has. Guidance
    scales are classifier-free guidance weights (1 switches guidance off). ``seed`` draws the noise
    on the CPU, so that it does not depend on the device.

    Usage::

        # Text to video, with the model's official steps, guidance scales and flow shift.
        GenerationConfig(prompt="a red fox runs through snow", num_frames=81)

        # Image to video: the clip begins with the picture, scaled to width x height.
        GenerationConfig(prompt="the fox turns its head", image=picture, width=832, height=480)

        # A long clip, denoised in overlapping windows and written to an mp4; no frames are kept.
        GenerationConfig(
            prompt="a train crosses a bridge", num_frames=401, max_chunk_size=81, window_overlap=16,
            output_path="train.mp4", return_frames=False, resume="auto",
        )

        # Continuation: segments made one after the other, with a prompt for each part of the clip.
        GenerationConfig(
            prompts="81: a fox runs\n80: it stops and listens\nit lies down", num_frames=241,
            image=picture, window_mode="continuation", max_chunk_size=81,
        )

        # Reproducible: a fixed seed, and the sampling settings spelled out instead of official.
        GenerationConfig(
            prompt="a red fox runs through snow", seed=42, num_inference_steps=30,
            guidance_scale=4.0, guidance_scale_2=3.0, flow_shift=12.0, scheduler="unipc",
        )
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    num_frames: int = 81
    width: int = 832
    height: int = 480
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """Guidance scale of the only or the high-noise expert."""
    guidance_scale_2: float | None = None
    """Guidance scale of the low-noise expert."""
    flow_shift: float | None = None
    boundary: float | None = None
    """Fraction of the 1000 training timesteps (0..1); the high-noise expert takes the steps at and
    above it, the low-noise expert those below."""
    switch_step: int | None = None
    """Index of the low-noise expert's first step; overrides ``boundary``."""
    scheduler: str | None = None
    """"unipc", "euler", "dpm++2m", "lcm" or "res_multistep"."""
    fps: float | None = None
    seed: int | None = 0
    """None draws a random seed, which is recorded in the result's metadata."""
    batch_size: int = 1
    image: ImageInput | None = None
    last_image: ImageInput | None = None
    control: WanControl | None = None
    """A source or control video, masks, references, key frames, a camera, tracks. ``image`` and
    ``last_image`` are key frames at the first and the last frame."""
    latents: torch.Tensor | None = None
    """Normalised latents (B, C, T, h, w) to start from: noise where ``start_step`` is 0, else the
    partly denoised latents of an earlier run at that step, which cannot be left out."""
    prompt_embeds: torch.Tensor | None = None
    """Text embeddings (B or 1, 512, text_dim), zeros after the prompt's tokens."""
    negative_prompt_embeds: torch.Tensor | None = None
    start_step: int = 0
    end_step: int | None = None
    force_chunked_processing: bool = False
    """Make the clip in windows also where it would fit as a whole: of ``max_chunk_size`` frames, or
    else of ``OptimizationConfig.chunk_size`` latent frames, or else of 81 frames."""
    max_chunk_size: int | None = None
    """Most video frames the transformer denoises together; longer clips are made in windows."""
    window_overlap: int | None = None
    """Video frames that neighbouring windows share. None: 16, and on several cards more where that
    makes as many windows as they have time for."""
    window_schedule: str = "static"
    """"static", "uniform" or "looped" (``job.windows``)."""
    window_fusion: str = "ramp"
    """"ramp", "pyramid", "flat" or "causal" (``job.windows``)."""
    window_mode: str = "windows"
    """"windows" takes every step for all windows of the clip; "continuation" denoises one segment
    from start to end before the next, which begins with the last latents of the one before
    (image-to-video models and TI2V-5B)."""
    window_anchor: bool = False
    """Later windows also see the latent frame before them; what they predict for it is not used."""
    continue_from: torch.Tensor | None = None
    """Normalised latents (B, C, n, h, w) that the clip begins with, in continuation mode only.
    ``num_frames`` includes the frames they stand for."""
    drift_correction: float = 0.0
    """0..1: how far the colours of later segments are moved to those of the first, in continuation
    mode."""
    noise: str = "clip"
    """"clip", "frame" or "freenoise" (``job.noise``)."""
    prompts: str | None = None
    """Lines ``frames: text`` in place of ``prompt``. A window uses the text that holds at its
    middle; in continuation mode every text begins a new segment."""
    resume: str | None = None
    """"auto" continues a saved render of exactly this request if there is one, "must" fails without
    one, "never" starts anew. All three keep a journal while the render lasts. None keeps one as
    "auto" does where the user prefers it and there is a place for it, else none."""
    journal_folder: str | Path | None = None
    """Folder for journals (saved states); None means ``.wanfit`` beside ``output_path``."""
    precision_override: str | None = None
    enable_optimizations: bool = True
    warning_callback: Callable[[str], object] | None = None
    """Called with every warning of the result, most of them as soon as they are known."""
    progress_callback: Callable[[int, int, torch.Tensor], object] | None = None
    """Called after every step with (steps done, total steps, normalised latents)."""
    preview_callback: Callable[[int, int, torch.Tensor], object] | None = None
    """Called after every step with (steps done, total steps, predicted clean latents)."""
    chunk_callback: Callable[[int, int], object] | None = None
    """Called before every window of a step with (index of the window, windows in the step)."""
    decode_callback: Callable[[int, int], object] | None = None
    """Called after every decoded chunk with (frames done, total frames)."""
    load_callback: Callable[[str, int, int], object] | None = None
    """Called several times a second while a component's weights are read, and when they have been,
    with (the component's name, bytes read, bytes in all)."""
    interrupt_check: Callable[[], object] | None = None
    """Called between transformer blocks and decoded chunks, and several times a second while
    weights are read; an exception it raises stops the render."""
    output_path: str | Path | None = None
    """Where to write the mp4; None writes none."""
    output_metadata: Mapping[str, str] = field(default_factory=dict)
    """Stored in the mp4's container (ComfyUI reads its workflow from there)."""
    codec: str | None = None
    """Codec of the mp4: "h264" plays everywhere, "h265" is smaller and slower. None means the one
    that the user prefers (``preferences``), else "h264"."""
    crf: int = 18
    """Constant rate factor of the mp4: 0 is the best quality, 51 the worst."""
    pix_fmt: str = "yuv420p"
    """Pixel format of the mp4; yuv420p plays everywhere."""
    audio: tuple[torch.Tensor, int] | None = None
    """(waveform, sample rate in Hz) of the mp4's sound; the waveform is (1 or 2 channels, samples)
    in -1..1."""
    return_frames: bool = True
    """False leaves the result's ``frames`` None: frames are written to the mp4 as they are decoded,
    so RAM does not grow with the length of the clip."""
    sigma_schedule: str | None = None
    """"official" takes the noise levels and solvers of diffusers, "simple" those of ComfyUI's
    KSampler with the schedule of that name."""
    sigmas: Sequence[float] | None = None
    """The noise levels of the steps one by one, from at most 1 down to above 0; a 0 at the end may
    be left out. In place of ``num_inference_steps``, ``flow_shift`` and ``sigma_schedule``."""
    guided_steps: int = 0
    """So many of the steps, from the first on, are made without the distilled LoRAs and with
    guidance, which keeps more motion; the rest with them, as usual."""
    guided_scale: float | None = None
    """Guidance scale of the ``guided_steps``; None means the model's official one."""


def require_config(config: object) -> None:
    """Raise InvalidRequest for what is no GenerationConfig, such as a dictionary of its fields."""
    if not isinstance(config, GenerationConfig):
        raise InvalidRequest(
            f"config is {shown(config)} ({type(config).__name__}); a GenerationConfig is needed.",
            field="config",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """What one stage is expected to need, in bytes."""

    name: str
    device_bytes: int
    """Peak on the device while the stage runs: the weights held there plus activations."""
    weights_bytes: int
    activation_bytes: int
    host_bytes: int = 0
    """RAM that nothing else can have while the stage runs."""
    note: str = ""
    locked_bytes: int = 0
    """RAM that is page-locked for speed while blocks are streamed, as far as there is room: the
    copies of weights that ``mapped_bytes`` counts too."""
    mapped_bytes: int = 0
    """Weights read from the mapped file: RAM that the system takes back when it needs it."""
    ahead_bytes: int = 0
    """Weights of the next stage that are read meanwhile, because there is room for them in RAM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a render is expected to need. Megabytes are MiB (2**20 bytes); nothing here is measured.

    ``peak_usage_mb`` is the device memory of the largest stage. ``total_estimated_mb`` is the sum
    of ``base_model_mb``, ``generation_overhead_mb`` and ``output_tensors_mb``. ``confidence``
    (0..1) says how far the figures rest on measured runs.
    """

    base_model_mb: float
    generation_overhead_mb: float
    output_tensors_mb: float
    total_estimated_mb: float
    peak_usage_mb: float
    confidence: float
    basis: str = "arithmetic"
    """What the figures rest on: arithmetic alone, or also runs that were measured."""
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
    """One stage as it ran: its seconds, and its peak device bytes as predicted and as measured."""

    name: str
    seconds: float = 0.0
    predicted_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    note: str = ""


@dataclass(slots=True, kw_only=True)
class VideoGenerationResult:
    """The outcome of one ``generate``: the video, or the errors that prevented it.

    ``frames`` is float32 (num_frames, height, width, 3), 0..1, on the CPU; the samples of a batch
    are concatenated along the first axis. ``latents`` are normalised (B, C, T, h, w) on the CPU.
    ``vae_latents`` are the same times the latents' std plus their mean: the VAE's own scale, as in
    ComfyUI's LATENT.
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
        """Raise the exception that ended the render, or return self if it succeeded."""
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
