"""GenerationConfig -> Request: every default filled in, or one sentence that says what is wrong.

Reads the architecture's numbers, but no file and no tensor's values. Every mistake that a user can
make in a :class:`GenerationConfig` is found here, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config import GenerationConfig, plain_number
from ..errors import InvalidRequest, MissingFile
from ..models import IMAGE_TOKENS, ModelArchitecture
from .animate import character_segments, refuse_continuing, refuse_picture
from .control import (
    ControlRequest,
    control_of,
    first_step,
    frames_of_video,
    has_keyframes,
    resolve_control,
)
from .fields import PromptPart, choice, flag, function, parse_prompts, real, text, whole
from .output import audio_rate, check_metadata, output_fields
from .steps import checked_end, recipe_warnings, sampling_fields, start_notes
from .windows import (
    DEFAULT_OVERLAP,
    DEFAULT_WINDOW,
    FRAMES_PER_LATENT,
    FUSIONS,
    SCHEDULES,
    latent_frames,
    latent_index,
    plan_segments,
    round_up_frames,
    video_range,
)

MAX_SIZE = 16384
"""Most pixels per side: rotary positions of Wan's transformer end at 1024 tokens of 16 pixels."""
MAX_LATENT_FRAMES = 1024
"""Most latent frames that the rotary positions cover; longer clips need windows."""
MOST_FRAMES = 4 * 1024 * 64
"""Most video frames of a clip in windows."""
MOST_CLIPS = 64
"""Most clips of one render, its ``batch_size``."""
MODES = ("windows", "continuation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A GenerationConfig with every default filled in and every field checked.

    Sizes are pixels and frames are video frames; ``num_frames`` is 4n+1.
    """

    prompt: str
    negative_prompt: str
    wanted_frames: int
    """Frames that were asked for: the first of the ``num_frames`` that are made."""
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
    sigma_schedule: str
    sigmas: tuple[float, ...]
    """Noise levels of the steps that were asked for one by one, or that a distilled file needs."""
    guided_steps: int
    guided_scale: float | None
    """Guidance scale of the ``guided_steps``; None where there are none."""
    fps: float
    seed: int
    batch_size: int
    start_step: int
    end_step: int | None
    window_frames: int | None
    window_overlap: int
    window_schedule: str
    window_fusion: str
    window_mode: str
    window_anchor: bool
    drift_correction: float
    noise: str
    prompts: tuple[PromptPart, ...]
    resume: str | None
    journal_folder: Path | None
    output_path: Path | None
    codec: str
    crf: int
    pix_fmt: str
    warnings: tuple[str, ...] = ()
    control: ControlRequest | None = None
    overlap_free: bool = False
    """Whether windows may share more than ``window_overlap`` where that fills several cards."""

    @property
    def latent_frames(self) -> int:
        """Frames of the latents, (num_frames - 1) / 4 + 1."""
        return latent_frames(self.num_frames)

    @property
    def guided(self) -> bool:
        """Whether either expert uses guidance, and so needs the negative prompt."""
        return max(self.guidance_scale, self.guidance_scale_2, self.guided_scale or 0.0) > 1.0


def resolve(
    config: GenerationConfig, architecture: ModelArchitecture, *, window: int | None = None
) -> Request:
    """Fill in the variant's official values and check every field; no file is looked at.

    ``window`` is the length in video frames of windows that are asked for without a length
    (``force_chunked_processing`` without ``max_chunk_size``); None means 81. Raises InvalidRequest
    naming the field, the value found and the values allowed, and MissingFile where a part of the
    model must be named first.
    """
    if architecture.incomplete:
        raise MissingFile(architecture.incomplete)
    warnings: list[str] = []
    _check_images(config, architecture)
    if architecture.transformer.animate is not None:
        refuse_continuing(config, architecture.variant.title)
    _check_mode(config, architecture)
    _check_functions(config)
    check_metadata(config.output_metadata)
    flag(config.enable_optimizations, "enable_optimizations")  # read by the plan, as it is
    if config.audio is not None:
        audio_rate(config.audio)
    frames = _wanted_frames(config, architecture)
    num_frames = _made_frames(config, frames, warnings)
    control, said = resolve_control(config, architecture, wanted=frames, made=num_frames)
    warnings += said
    warnings += _end_notes(config, control, frames, num_frames)
    multiple = architecture.size_multiple
    width = _size(config.width, "width", multiple, warnings)
    height = _size(config.height, "height", multiple, warnings)
    prompts = _prompts(config, architecture, num_frames, warnings)
    request = Request(
        prompt=text(config.prompt, "prompt", config.prompt_embeds is not None or bool(prompts)),
        prompts=prompts,
        wanted_frames=frames,
        num_frames=num_frames,
        width=width,
        height=height,
        batch_size=whole(config.batch_size, "batch_size", 1, MOST_CLIPS),
        control=control,
        **sampling_fields(config, architecture, width, height),
        **_windowing(config, num_frames, window, architecture, frames, warnings),
        **output_fields(config),
    )
    if control is not None and control.video == "start":
        start = first_step(request.num_inference_steps, control.denoise)
        request = replace(request, start_step=start)
        warnings += start_notes(request, control.denoise)
    _check_steps(config, request)
    if request.window_mode == "continuation" and architecture.transformer.animate is None:
        _check_segments(config, request)
    more = (*warnings, *recipe_warnings(request, architecture))
    return replace(request, warnings=more)


def _wanted_frames(config: GenerationConfig, architecture: ModelArchitecture) -> int:
    """Return the frames that are asked for; 0 means as many as the control's video has."""
    video = frames_of_video(config, architecture)
    if plain_number(config.num_frames) == 0:
        if video is not None:
            if video > MOST_FRAMES:
                raise InvalidRequest(
                    f"control.video has {video} frames, and {MOST_FRAMES} are the most that a clip "
                    "can have. Cut it, or set num_frames.",
                    field="control.video",
                )
            return video
        raise InvalidRequest(
            "num_frames is 0, which means as many as the control's video has, and there is none. "
            f"Give control.video, or 1 to {MOST_FRAMES}.",
            field="num_frames",
        )
    return whole(config.num_frames, "num_frames", 1, MOST_FRAMES)


def _made_frames(config: GenerationConfig, frames: int, warnings: list[str]) -> int:
    """Return how many frames are made for those asked for: the next 4n+1."""
    made = round_up_frames(frames)
    if made != frames:
        warnings.append(
            f"num_frames {frames} is made as {made} (Wan makes 4n+1 frames); the first "
            f"{frames} are returned."
        )
    if config.last_image is not None and made < 5:
        raise InvalidRequest(
            f"num_frames is {frames} with a last_image; 5 or more are needed.", field="num_frames"
        )
    return made


def _end_notes(
    config: GenerationConfig, control: ControlRequest | None, wanted: int, made: int
) -> Iterator[str]:
    """Say of a picture for the last frame that is made that the clip is cut before it."""
    at_the_end = control is not None and made - 1 in control.positions
    if wanted != made and (at_the_end or config.last_image is not None):
        yield (
            f"The end picture is frame {made - 1} of those made, and not among the {wanted} "
            f"returned. Set num_frames to {made} to see it."
        )


def _windowing(
    config: GenerationConfig, num_frames: int, length: int | None,
    architecture: ModelArchitecture, wanted: int, warnings: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Check the fields that say how a long clip is divided into windows or segments."""
    animate = architecture.transformer.animate
    if animate is not None:
        official = architecture.variant.defaults.num_frames
        size, carried = character_segments(config, animate, official, wanted, warnings)
        asked = replace(config, max_chunk_size=None, force_chunked_processing=False)
        asked = replace(asked, window_overlap=carried, window_mode="windows")
        found = _windows_of(asked, min(num_frames, size), None)
        return found | {"window_frames": size, "window_mode": "continuation"}
    return _windows_of(config, num_frames, length)


def _windows_of(config: GenerationConfig, num_frames: int, length: int | None) -> dict[str, Any]:
    window = _window(config, num_frames, length)
    if window is None and latent_frames(num_frames) > MAX_LATENT_FRAMES:
        raise InvalidRequest(
            f"num_frames is {config.num_frames}; a clip made in one piece has at most "
            f"{4 * MAX_LATENT_FRAMES - 3}. Set max_chunk_size (81) to make it in windows.",
            field="num_frames",
        )
    overlap = config.window_overlap
    free = overlap is None
    return {
        "window_frames": window,
        "window_overlap": DEFAULT_OVERLAP if free else whole(overlap, "window_overlap", 0, 4096),
        "overlap_free": free and config.window_mode == "windows",
        "window_schedule": choice(config.window_schedule, "window_schedule", SCHEDULES),
        "window_fusion": choice(config.window_fusion, "window_fusion", FUSIONS),
        "window_mode": choice(config.window_mode, "window_mode", MODES),
        "window_anchor": flag(config.window_anchor, "window_anchor"),
        "drift_correction": real(config.drift_correction, "drift_correction", 0, 1),
    }


def _size(value: Any, field: str, multiple: int, warnings: list[str]) -> int:
    size = whole(value, field, 16, MAX_SIZE)
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


def _window(config: GenerationConfig, num_frames: int, length: int | None) -> int | None:
    """Return the window in video frames, or None to denoise the whole clip at once."""
    forced = flag(config.force_chunked_processing, "force_chunked_processing")
    if config.max_chunk_size is None:
        if forced:
            return min(length or DEFAULT_WINDOW, num_frames)
        return min(DEFAULT_WINDOW, num_frames) if config.window_mode == "continuation" else None
    window = whole(config.max_chunk_size, "max_chunk_size", 5, 4 * MAX_LATENT_FRAMES - 3)
    if num_frames <= window and not forced:
        return None
    return window


def _check_steps(config: GenerationConfig, request: Request) -> None:
    """Check that the steps to make lie within the schedule, and that they have a beginning."""
    start = request.start_step
    checked_end(request.num_inference_steps, start, request.end_step)
    noised = request.control is not None and request.control.video == "start"
    if start and config.latents is None and not noised:
        raise InvalidRequest(
            f"start_step is {start} without latents: noise would be taken for a clip that {start} "
            "steps have been made of. Give the latents of the run that made them, or start at 0.",
            field="start_step",
        )


def _check_segments(config: GenerationConfig, request: Request) -> None:
    """Plan the segments once: what cannot be planned must show before anything is encoded."""
    given = 0 if config.continue_from is None else int(config.continue_from.shape[2])
    starts = [latent_index(part.start) for part in request.prompts]
    plan_segments(
        request.latent_frames, given, request.window_frames, request.window_overlap, starts
    )


def _check_functions(config: GenerationConfig) -> None:
    for name in (
        "warning_callback", "progress_callback", "preview_callback", "chunk_callback",
        "decode_callback", "load_callback", "interrupt_check",
    ):  # fmt: skip
        function(getattr(config, name), name)


def _check_mode(config: GenerationConfig, architecture: ModelArchitecture) -> None:
    schedule = choice(config.window_schedule, "window_schedule", SCHEDULES)
    if choice(config.window_mode, "window_mode", MODES) != "continuation":
        if config.continue_from is not None:
            raise InvalidRequest(
                f"continue_from was given with window_mode {config.window_mode!r}; only "
                "'continuation' goes on from latents.",
                field="continue_from",
            )
        return
    title = architecture.variant.title
    if architecture.variant.image_input == "none" and architecture.transformer.animate is None:
        raise InvalidRequest(
            f"window_mode is 'continuation', but {title} cannot be given the frames to go on "
            "from. Use window_mode 'windows', an image-to-video model, or the 5B.",
            field="window_mode",
        )
    shape = tuple(getattr(config.continue_from, "shape", ()))
    if config.continue_from is not None and (len(shape) != 5 or not shape[2]):
        raise InvalidRequest(
            f"continue_from has shape {shape}; latents are (batch, channels, frames, height, "
            "width).",
            field="continue_from",
        )
    if schedule != "static":
        raise InvalidRequest(
            f"window_schedule is {config.window_schedule!r} with window_mode 'continuation'; "
            "segments come one after the other: 'static' is needed.",
            field="window_schedule",
        )
    if config.start_step != 0 or config.end_step is not None:
        raise InvalidRequest(
            "start_step or end_step was given with window_mode 'continuation'; every segment "
            "makes all steps. Leave them out.",
            field="start_step",
        )


def _prompts(
    config: GenerationConfig, architecture: ModelArchitecture, num_frames: int, warnings: list[str]
) -> tuple[PromptPart, ...]:
    if config.prompts is None:
        return ()
    if config.prompt_embeds is not None:
        raise InvalidRequest(
            "prompts and prompt_embeds were both given; give one of them.", field="prompts"
        )
    parts = parse_prompts(text(config.prompts, "prompts", False))
    if config.prompt:
        warnings.append("prompts was given, so prompt is not used.")
    if late := [part.text for part in parts if part.start >= num_frames]:
        warnings.append(f"prompts: {late[0]!r} begins after the clip's {num_frames} frames.")
    # The segments of an Animate have one length, and none begins with a text.
    if config.window_mode == "continuation" and architecture.transformer.animate is None:
        warnings += _segment_notes(parts)
    return parts


def _segment_notes(parts: tuple[PromptPart, ...]) -> Iterator[str]:
    """Say which texts begin earlier than asked, because segments begin with whole latent frames.

    Raises InvalidRequest for a text too short to get a latent frame of its own.
    """
    for line, (part, later) in enumerate(pairwise(parts), 1):
        begins = video_range(latent_index(later.start)).start
        if begins <= part.start:
            raise InvalidRequest(
                f"prompts line {line} lasts for {later.start - part.start} frames, which are no "
                f"latent frame of its own; a segment needs {FRAMES_PER_LATENT} or more.",
                field="prompts",
            )
        if begins != later.start:
            yield (
                f"prompts: line {line + 1} begins with frame {begins}, not {later.start}: segments "
                "begin after 4n + 1 frames."
            )


def pictures_needed(architecture: ModelArchitecture) -> tuple[str, ...]:
    """Return which of "image" and "last_image" a model cannot do without."""
    if architecture.variant.image_input != "required":
        return ()
    return ("image", "last_image") if seen_by_clip(architecture) == 2 else ("image",)


def seen_by_clip(architecture: ModelArchitecture) -> int:
    """Return how many pictures the image branch takes tokens of: 0, 1 or 2.

    First-and-last-frame models have a learned position for the tokens of two pictures, and cannot
    place those of one. The others see the first picture; a last one reaches them through the
    latents only, as in VideoX-Fun's inpainting models.
    """
    shape = architecture.transformer
    if shape.image_dim is None:
        return 0
    return max(1, (shape.pos_embed_seq_len or 0) // IMAGE_TOKENS)


def needs_clip(config: GenerationConfig, architecture: ModelArchitecture) -> bool:
    """Say whether the image encoder is needed: by a model with an image branch, for a picture.

    Fun Control and Fun Camera see a reference, else the start image, and do without both; the
    Animate models see their character.
    """
    if architecture.transformer.image_dim is None:
        return False
    control = control_of(config)
    reference = control is not None and control.reference is not None
    required = architecture.variant.image_input == "required"
    required = required or architecture.transformer.animate is not None
    return required or reference or config.image is not None


def _check_images(config: GenerationConfig, architecture: ModelArchitecture) -> None:
    variant = architecture.variant
    if architecture.transformer.animate is not None:
        refuse_picture(config, variant.title)
        return
    if has_keyframes(config):
        return  # the start and the end image are two of them: ``resolve_control`` checks all
    if config.image is None and variant.image_input == "required":
        given = "the picture the clip began with" if config.continue_from is not None else "one"
        raise InvalidRequest(
            f"image is missing; {variant.title} makes video from a picture. Give {given}, or load "
            "a text-to-video model.",
            field="image",
        )
    if config.image is not None and variant.image_input == "none":
        raise InvalidRequest(
            f"image was given, but {variant.title} takes text only. Load an image-to-video "
            "model, or leave the image out.",
            field="image",
        )
    if config.last_image is None:
        if "last_image" in pictures_needed(architecture):
            raise InvalidRequest(
                f"last_image is missing; {variant.title} makes the video between two pictures. "
                "Give the last one too, or load an image-to-video model.",
                field="last_image",
            )
        return
    # A model that does without a picture takes any alone, if it is told which frame it is.
    alone = variant.image_input == "optional" and variant.last_image
    if config.image is None and not alone:
        raise InvalidRequest("last_image was given without image; give both.", field="last_image")
    if not variant.last_image:
        raise InvalidRequest(
            f"last_image was given, but {variant.title} takes only a first image. Leave it out, "
            "or load a first-and-last-frame model (Wan 2.1 FLF2V, Wan 2.2 I2V-A14B).",
            field="last_image",
        )
