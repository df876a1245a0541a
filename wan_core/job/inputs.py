"""The last look at a job before anything is read or computed: what it needs, takes and writes.

``resolve`` checks values; ``check_inputs`` checks what they point to and returns it ready for use,
``check_outputs`` tries what the result needs. A mistake that is told here costs milliseconds; told
by the stage that meets it, it costs the stages before: the text encoder alone has 11 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..config import RESUME, GenerationConfig, processors
from ..errors import InvalidRequest
from ..files import check_target
from ..models import ModelArchitecture
from ..preferences import Preferences
from .control import ControlInputs
from .effects import settings_without_effect
from .parts import texts_to_encode
from .pictures import describe_loss, describe_stretch, load_picture
from .request import Request
from .tensors import (
    check_audio,
    check_continued,
    check_control,
    check_embeds,
    check_latents,
    latent_shape,
    references_in_front,
)
from .windows import latent_frames

if TYPE_CHECKING:
    from torch import Tensor

ENCODERS: Final = {"h264": "libx264", "h265": "libx265"}
"""ffmpeg's encoder for each codec."""
_AT_ONCE: Final = 12
"""Pictures that x264 encodes at once at most. By itself it takes 96 on 64 cores: 1.4 GiB of RAM at
1080p. On 16 cores 81 of 480p took 1.26 to 1.36 s with 12 and 1.41 to 1.49 with 24: what is in hand
is still to be done when the last one comes."""
_H265_SIDE: Final = 32
_H265_SAFE: Final = 64
"""Pixels a side from which x265's vector code stays within its buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a job is given besides values, read and checked.

    ``pictures`` has "image" and "last_image", as far as they were given, each an RGB PIL image or a
    float tensor (H, W, 3). ``embeds`` has "prompt" and "negative_prompt", (1 or B, 512, text_dim);
    one that is missing is encoded, or not needed. ``texts`` names those to encode. ``latents`` and
    ``continue_from`` are (B, C, T, h, w), and ``audio`` is (waveform, samples per second).
    ``control`` holds the tensors of a control; the start and end image are among its key frames.
    """

    pictures: Mapping[str, Any] = field(default_factory=dict)
    embeds: Mapping[str, Tensor] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    latents: Tensor | None = None
    continue_from: Tensor | None = None
    audio: tuple[Tensor, int] | None = None
    control: ControlInputs | None = None
    warnings: tuple[str, ...] = ()


def check_inputs(
    config: GenerationConfig, request: Request, architecture: ModelArchitecture
) -> Inputs:
    """Check everything that a job is given, and return it as the stages take it.

    No file of the model is read. Raises InvalidRequest naming the field.
    """
    shape = latent_shape(request, architecture)
    width = architecture.transformer.text_dim
    given = {"prompt": config.prompt_embeds, "negative_prompt": config.negative_prompt_embeds}
    embeds = {
        name: check_embeds(value, f"{name}_embeds", width, request.batch_size)
        for name, value in given.items()
        if value is not None and (name == "prompt" or request.guided)
    }
    in_front = references_in_front(request, architecture)
    frames = shape[2]
    if architecture.transformer.animate is not None and request.window_frames is not None:
        frames = latent_frames(request.window_frames)  # of the first segment
    made = (*shape[:2], frames + in_front, *shape[3:])
    latents = None if config.latents is None else check_latents(config.latents, made)
    continued = config.continue_from
    continued = None if continued is None else check_continued(continued, shape)
    audio = None
    if config.audio is not None and request.output_path is not None:
        audio = check_audio(config.audio)
    warnings = list(settings_without_effect(config, request, architecture))
    pictures = {}
    for name in ("image", "last_image"):
        value = getattr(config, name)
        if value is None:
            continue
        pictures[name] = load_picture(value, name)
        stretched = describe_stretch(pictures[name], name, request.width, request.height)
        lost = describe_loss(value, name)
        warnings += [said for said in (stretched, lost) if said]
    control = None
    if request.control is not None:
        control, said = check_control(
            config, request.control, pictures, wanted=request.wanted_frames,
            made=request.num_frames,
            size=(request.width, request.height), face=face_size(architecture),
        )  # fmt: skip
        warnings += said
    return Inputs(
        pictures=pictures,
        embeds=embeds,
        texts=texts_to_encode(config, request),
        latents=latents,
        continue_from=continued,
        audio=audio,
        control=control,
        warnings=tuple(warnings),
    )


def face_size(architecture: ModelArchitecture) -> tuple[int, int]:
    """Return width and height of the crops of a face that an Animate reads, in pixels."""
    face = architecture.transformer.face
    return (512, 512) if face is None else (face.size, face.size)


def output_paths(request: Request) -> list[Path]:
    """Return one path per clip of the batch: name.mp4, name_2.mp4, ..."""
    first = request.output_path
    return [] if first is None else clip_paths(first, request.batch_size)


def clip_paths(first: Path, count: int) -> list[Path]:
    """Return where the ``count`` clips of a batch lie whose first one is ``first``."""
    more = range(2, count + 1)
    return [first, *(first.with_name(f"{first.stem}_{n}{first.suffix}") for n in more)]


def codec_takes(codec: str, request: Request) -> bool:
    """Say whether a codec takes clips of this size: x265 is not reliable for very small ones."""
    return codec != "h265" or min(request.width, request.height) >= _H265_SIDE


def as_preferred(request: Request, config: GenerationConfig, preferences: Preferences) -> Request:
    """Return a request with the codec and the journal that the user prefers where it names none."""
    codec, place = preferences.codec, request.journal_folder or request.output_path
    if config.codec is None and codec is not None and codec_takes(codec, request):
        request = replace(request, codec=codec)
    if config.resume is None and preferences.journal and place is not None:
        request = replace(request, resume=RESUME[0])
    return request


def check_outputs(request: Request) -> None:
    """Check that every file of the result can be written, by trying it, and open its encoder.

    Raises OutputError with the path, and InvalidRequest for what the encoder does not take.
    """
    if request.output_path is None:
        return
    for target in output_paths(request):
        check_target(target)
    import av

    name = ENCODERS[request.codec]
    if not codec_takes(request.codec, request):
        raise InvalidRequest(
            f"codec is 'h265' and the video {request.width}x{request.height}; x265 is not reliable "
            f"below {_H265_SIDE} pixels a side. Choose 'h264'.",
            field="codec",
        )
    try:
        # Opened as for the video, which an encoder may refuse for reasons of its own: builds for 8
        # bits take no other, and some builds of PyAV lack an encoder.
        context: Any = av.CodecContext.create(name, "w")
        context.width, context.height = request.width, request.height
        context.pix_fmt = request.pix_fmt
        context.time_base = 1 / Fraction(request.fps).limit_denominator(1001)
        context.options = encoder_options(name, request.crf, request.width, request.height)
        context.open()
    except (OSError, ValueError, av.FFmpegError) as err:
        raise InvalidRequest(
            f"codec is {request.codec!r}; the installed {name} takes no {request.pix_fmt} of "
            f"{request.width}x{request.height} at {request.fps:g} fps ({err}). codec 'h264' with "
            "pix_fmt 'yuv420p' works everywhere.",
            field="codec",
        ) from err


def encoder_options(encoder: str, crf: int, width: int, height: int) -> dict[str, str]:
    """Return the options of x264 and x265 for pictures of ``width`` x ``height``.

    Equal frames give equal files with x264, and with x265 from pictures of 80 pixels a side on.
    """
    if encoder == "libx264":
        # What its macroblock tree decides differs from run to run: it looks at memory that was
        # never written.
        options = {"crf": str(crf), "x264-params": "mbtree=0"}
        # PyAV has it cut each picture into slices, which are too few for many cores: several
        # pictures at once keep all of them busy, also while the next one is converted.
        return options | {"thread_type": "frame", "threads": str(_at_once())}
    if encoder != "libx265":
        return {}
    # x265 prints its settings unless told not to, and its crf 0 is lossless only with this option.
    params = ["log-level=error", *(["lossless=1"] if crf == 0 else [])]
    if min(width, height) < _H265_SAFE:
        params.append("asm=0")
    return {"crf": str(crf), "x265-params": ":".join(params)}


def encoder_bytes(codec: str, pix_fmt: str, width: int, height: int, frames: int) -> int:
    """Return the RAM that an encoder takes for a video of so many frames, those waiting included.

    Closed forms of what was measured for 64x64 to 1920x1088 with PyAV 18 on two cores; more were
    told to x264 (up to 41 pictures at once) and x265 (up to 64 threads). They are 8 % below to
    20 % above that, and more above it for clips of a second or tiny pictures. Up to 16 pictures
    wait as RGB. x264 looks 40 ahead, and needs five for each that it encodes at once; what x265
    keeps for its threads grows as the root of their number.
    """
    depth = (2 if pix_fmt.endswith("10le") else 1) * {"420": 3, "422": 4, "444": 6}[pix_fmt[3:6]]
    picture, waiting = depth * width * height / 2, 16 * 3 * width * height
    if codec == "h265":
        root = processors() ** 0.5
        own = 12e6 + min(38e6, 9e6 + 60 * picture) * root
        each, few = (125 + 23 * root) * picture, 7 * picture
    else:
        count = _at_once()
        own = 14e6 + min(count, frames) * min(1.6e6, 3 * picture)
        each, few = (78 + 5 * count) * picture, 8.5 * picture
    return int(min(own + each + waiting, own + frames * few))


def _at_once() -> int:
    """Return how many pictures x264 encodes at once: its own number, where that is less."""
    return max(1, min(_AT_ONCE, processors() * 3 // 2))
