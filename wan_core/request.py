"""A job as asked for -> a job with nothing left open, or one sentence saying what is wrong.

Pure: reads the architecture's numbers, no file and no tensor values. Every mistake a person can
make in a :class:`GenerationConfig` is found here, before anything is loaded.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architecture import ModelArchitecture
from .config import GenerationConfig
from .errors import InvalidRequest
from .journal import RESUME
from .schedule import SCHEDULERS
from .variants import Variant
from .windows import FUSIONS, SCHEDULES, latent_frames, round_up_frames

MAX_SIZE = 16384
"""Pixels a side: rotary positions of Wan's transformer end at 1024 tokens of 16 pixels."""
MAX_LATENT_FRAMES = 1024
"""Latent frames the rotary positions reach; longer clips need windows."""
MAX_SEED = 2**64 - 1
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A job with nothing left open. Frames and sizes are pixels; ``num_frames`` is 4n+1."""

    prompt: str
    negative_prompt: str
    wanted_frames: int
    """Frames asked for; the first so many of ``num_frames`` are returned."""
    num_frames: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float
    flow_shift: float
    boundary: float | None
    switch_step: int | None
    scheduler: str
    fps: float
    seed: int
    batch_size: int
    start_step: int
    end_step: int | None
    window_frames: int | None
    window_overlap: int
    window_schedule: str
    window_fusion: str
    resume: str | None
    output_path: Path | None
    warnings: tuple[str, ...] = ()

    @property
    def latent_frames(self) -> int:
        """Frames of the latents, (num_frames - 1) / 4 + 1."""
        return latent_frames(self.num_frames)

    @property
    def guided(self) -> bool:
        """Whether either expert needs the negative prompt."""
        return self.guidance_scale > 1.0 or self.guidance_scale_2 > 1.0


def resolve(config: GenerationConfig, architecture: ModelArchitecture) -> Request:
    """Fill in the variant's official values and check every field.

    Raises InvalidRequest naming the field, the value found and the values allowed.
    """
    variant = architecture.variant
    warnings: list[str] = []
    _check_images(config, architecture)
    frames = _integer(config.num_frames, "num_frames", 1, 4 * 1024 * 64)
    num_frames = round_up_frames(frames)
    if num_frames != frames:
        warnings.append(
            f"num_frames {frames} is made as {num_frames} (Wan makes 4n+1 frames); the first "
            f"{frames} are returned."
        )
    if config.last_image is not None and num_frames < 5:
        raise InvalidRequest(
            f"num_frames is {frames} with a last_image; 5 or more are needed.", field="num_frames"
        )
    multiple = architecture.size_multiple
    width = _size(config.width, "width", multiple, warnings)
    height = _size(config.height, "height", multiple, warnings)
    defaults = variant.defaults
    scale = _real(_or(config.guidance_scale, defaults.guidance_scale), "guidance_scale", 0, 100)
    second = _or(config.guidance_scale_2, _second_scale(config, variant))
    window = _window(config, num_frames)
    if window is None and latent_frames(num_frames) > MAX_LATENT_FRAMES:
        raise InvalidRequest(
            f"num_frames is {frames}; the model's positions end at {4 * MAX_LATENT_FRAMES - 3}. "
            "Set max_chunk_size (81) to make it in windows.",
            field="num_frames",
        )
    boundary = _or(config.boundary, defaults.boundary)
    return Request(
        prompt=_text(config.prompt, "prompt", config.prompt_embeds is not None),
        negative_prompt=_text(
            _or(config.negative_prompt, defaults.negative_prompt), "negative_prompt", True
        ),
        wanted_frames=frames,
        num_frames=num_frames,
        width=width,
        height=height,
        num_inference_steps=_integer(
            _or(config.num_inference_steps, defaults.num_inference_steps),
            "num_inference_steps",
            1,
            1000,
        ),
        guidance_scale=scale,
        guidance_scale_2=_real(second, "guidance_scale_2", 0, 100),
        flow_shift=_real(
            _or(config.flow_shift, defaults.flow_shift_for(width, height)), "flow_shift", 0.01, 100
        ),
        boundary=None if boundary is None else _real(boundary, "boundary", 0, 1),
        switch_step=None
        if config.switch_step is None
        else _integer(config.switch_step, "switch_step", 0, 1000),
        scheduler=_choice(_or(config.scheduler, defaults.scheduler), "scheduler", SCHEDULERS),
        fps=_real(_or(config.fps, defaults.fps), "fps", 0.1, 240),
        seed=random.SystemRandom().getrandbits(32)
        if config.seed is None
        else _integer(config.seed, "seed", 0, MAX_SEED),
        batch_size=_integer(config.batch_size, "batch_size", 1, 64),
        start_step=_integer(config.start_step, "start_step", 0, 1000),
        end_step=None
        if config.end_step is None
        else _integer(config.end_step, "end_step", 1, 10_000),
        window_frames=window,
        window_overlap=_integer(config.window_overlap, "window_overlap", 0, 4096),
        window_schedule=_choice(config.window_schedule, "window_schedule", SCHEDULES),
        window_fusion=_choice(config.window_fusion, "window_fusion", FUSIONS),
        resume=_resume(config),
        output_path=_output(config),
        warnings=tuple(warnings),
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _second_scale(config: GenerationConfig, variant: Variant) -> float:
    """Scale of the low-noise expert where none was given.

    The official one when neither was given; else the given one for both, as diffusers does.
    """
    official = variant.defaults.guidance_scale_2
    if config.guidance_scale is not None or official is None:
        return float(_or(config.guidance_scale, variant.defaults.guidance_scale))
    return official


def _integer(value: Any, field: str, low: int, high: int) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value, whole = int(value), True
    if not whole or not low <= value <= high:
        raise InvalidRequest(
            f"{field} is {value!r}; a whole number from {low} to {high} is needed.", field=field
        )
    return int(value)


def _real(value: Any, field: str, low: float, high: float) -> float:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(
            f"{field} is {value!r}; a number from {low} to {high} is needed.", field=field
        )
    return float(value)


def _choice(value: Any, field: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise InvalidRequest(
            f"{field} is {value!r}; allowed are {', '.join(allowed)}.", field=field
        )
    return str(value)


def _text(value: Any, field: str, may_be_missing: bool) -> str:
    if value is None and may_be_missing:
        return ""
    if not isinstance(value, str):
        raise InvalidRequest(
            f"{field} is {value!r}; a text is needed (or {field}_embeds).", field=field
        )
    return value


def _size(value: Any, field: str, multiple: int, warnings: list[str]) -> int:
    size = _integer(value, field, 16, MAX_SIZE)
    snapped = size // multiple * multiple
    if snapped == 0:
        raise InvalidRequest(
            f"{field} is {size}; this model needs a multiple of {multiple}, at least {multiple}.",
            field=field,
        )
    if snapped != size:
        warnings.append(
            f"{field} {size} is made {snapped}: this model needs multiples of {multiple}."
        )
    return snapped


def _window(config: GenerationConfig, num_frames: int) -> int | None:
    """Return the window in frames, or None for the whole clip at once."""
    if config.max_chunk_size is None:
        if config.force_chunked_processing:
            return min(81, num_frames)
        return None
    window = _integer(config.max_chunk_size, "max_chunk_size", 5, 4 * MAX_LATENT_FRAMES - 3)
    if num_frames <= window and not config.force_chunked_processing:
        return None
    return window


def _check_images(config: GenerationConfig, architecture: ModelArchitecture) -> None:
    variant = architecture.variant
    if config.image is None and variant.image_input == "required":
        raise InvalidRequest(
            f"image is missing; {variant.title} makes video from a picture.", field="image"
        )
    if config.image is not None and variant.image_input == "none":
        raise InvalidRequest(
            f"image was given, but {variant.title} takes text only. Load an image-to-video "
            "model, or leave the image out.",
            field="image",
        )
    if config.last_image is not None and config.image is None:
        raise InvalidRequest("last_image was given without image; give both.", field="last_image")
    if config.last_image is not None and not variant.last_image:
        raise InvalidRequest(
            f"last_image was given, but {variant.title} takes only a first image.",
            field="last_image",
        )


def _resume(config: GenerationConfig) -> str | None:
    if config.resume is None:
        return None
    if config.journal_folder is None and config.output_path is None:
        raise InvalidRequest(
            "resume is set, but there is no place for the journal. Set output_path or "
            "journal_folder.",
            field="resume",
        )
    return _choice(config.resume, "resume", RESUME)


def _output(config: GenerationConfig) -> Path | None:
    if config.output_path is None:
        if not config.return_frames:
            raise InvalidRequest(
                "return_frames is False and output_path is None: nothing would come of the "
                "render. Set one of them.",
                field="output_path",
            )
        return None
    path = Path(config.output_path)
    if path.suffix.lower() != ".mp4":
        raise InvalidRequest(f"output_path is {path}; a name ending in .mp4 is needed.",
                             field="output_path")  # fmt: skip
    if path.is_dir():
        raise InvalidRequest(f"output_path {path} is a folder; name a file.", field="output_path")
    return path
