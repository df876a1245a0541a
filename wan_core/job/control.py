"""What guides a clip besides texts, checked against the model: which of it applies, and to what.

``resolve_control`` looks at shapes and numbers alone; ``tensors.check_control`` looks at values.
Both name the input and the model, and run before anything of the model is read. The rule is in
``reads``: the checkpoint decides what an input means, never a switch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..config import GenerationConfig, WanControl, is_many, plain_number, shown
from ..errors import InvalidRequest
from ..models import ModelArchitecture
from .animate import MOVED_BY, check_character
from .fields import batches, flag, real, shape_of
from .windows import FRAMES_PER_LATENT, latent_frames, video_frames

if TYPE_CHECKING:
    from torch import Tensor

    from .pictures import Picture

_SOCKETS: Final = (
    "video", "mask", "reference", "keyframes", "camera", "tracks", "face_video", "background_video",
)  # fmt: skip
_MOST_STRENGTH: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlRequest:
    """What a job's control asks for, in numbers: part of its Request.

    ``positions`` are the video frames of the key frames, in order, the start and the end image
    included. ``video`` says what a video is here: "start" (the clip begins with it, noised),
    "control" (the model reads it), "pose" or "driving" (a character moves like it) or "" (there is
    none).
    """

    video: str = ""
    mask: bool = False
    references: int = 0
    positions: tuple[int, ...] = ()
    camera: bool = False
    tracks: str = ""
    """"points" (ATI) or "paths" (WanMove); "" without tracks."""
    strength: tuple[float, ...] = (1.0,)
    denoise: float = 1.0
    clear_masked: bool = False
    frames: int = 0
    """Frames of the video that a character moves like; it is played back and forth beyond them."""
    background: bool = False
    """Whether the character replaces one of a background video."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlInputs:
    """The tensors of a job's control, checked. Videos have exactly the clip's frames; those that
    move a character may have fewer.

    ``video`` (F, H, W, 3) and ``mask`` (F or 1, H, W) are floats 0..1 of any size. ``keyframes``
    are pairs (video frame, picture) in order; ``references`` and they are pictures as
    ``load_picture`` returns them.
    """

    video: Tensor | None = None
    mask: Tensor | None = None
    references: tuple[Picture, ...] = ()
    keyframes: tuple[tuple[int, Picture], ...] = ()
    camera: Tensor | None = None
    tracks: Tensor | None = None
    """(121 points of time or frames, tracks, 3): x and y in pixels, and 1 where it is seen."""
    face_video: Tensor | None = None
    background_video: Tensor | None = None


def reads(architecture: ModelArchitecture) -> Mapping[str, str]:
    """Return what of a control a model can use: the input's name, and what it is there.

    ``video`` is "start" or "control", ``keyframes`` "any" or "leading" (the first frames only); of
    the Animate models see ``animate``.
    """
    variant, shape = architecture.variant, architecture.transformer
    if shape.animate is not None:
        return MOVED_BY[shape.animate]
    if shape.vace_in_channels is not None:
        names = ("mask", "reference", "strength", "clear_masked")
        return {"video": "control", "keyframes": "any", **dict.fromkeys(names, "control")}
    found: dict[str, str] = {}
    if shape.video_channels:
        found["video"] = "control"
    # The 2.1 image-to-video models see their picture through CLIP too: a video to start from would
    # show one thing, the picture another.
    elif shape.image_dim is None:
        found["video"] = "start"
    if shape.reference_channels is not None:
        found["reference"] = "control"
    if shape.camera_channels is not None:
        found["camera"] = "control"
    if shape.mask_channels:
        found["keyframes"] = "any"
        # ATI and Wan-Move were trained on the condition of the 14B image-to-video models.
        plain = variant.image_input == "required" and not variant.expand_timesteps
        if plain and shape.pos_embed_seq_len is None:
            found["tracks"] = "condition"
    elif variant.expand_timesteps:
        found["keyframes"] = "leading"
    return found


def has_control(control: WanControl | None) -> bool:
    """Say whether a control asks for anything: one that is left as it was made does not."""
    if control is None:
        return False
    given = any(getattr(control, name, None) is not None for name in _SOCKETS)
    changed = any(plain_number(one) != 1 for one in (control.strength, control.denoise))
    # Positions without key frames are refused, and so must count.
    return (
        given or changed or control.clear_masked is not False or bool(_numbers(control.positions))
    )


def control_of(config: GenerationConfig) -> WanControl | None:
    """Return a job's control, None where there is none or it asks for nothing."""
    if config.control is not None and not isinstance(config.control, WanControl):
        raise InvalidRequest(
            f"control is {shown(config.control)}; a WanControl is needed.", field="control"
        )
    return config.control if has_control(config.control) else None


def has_keyframes(config: GenerationConfig) -> bool:
    """Say whether a job's control holds key frames."""
    control = control_of(config)
    return control is not None and control.keyframes is not None


def frames_of_video(config: GenerationConfig, architecture: ModelArchitecture) -> int | None:
    """Return the longest 4n+1 frames that a control video has; None without one.

    Of a video that moves a character it is all of them: the clip is cut to its length.
    """
    control = control_of(config)
    if control is None or control.video is None:
        return None
    frames = shape_of("video", control.video, 4)[0]
    if architecture.transformer.animate is not None:
        return frames
    return video_frames(latent_frames(frames))


def resolve_control(
    config: GenerationConfig, architecture: ModelArchitecture, *, wanted: int, made: int
) -> tuple[ControlRequest | None, list[str]]:
    """Check a job's control against the model, by shapes and numbers; return it, and warnings.

    ``wanted`` frames were asked for and ``made`` are made. Raises InvalidRequest naming the input
    and the model.
    """
    control, animate = control_of(config), architecture.transformer.animate
    title = architecture.variant.title
    if control is None:
        if animate is not None:
            check_character(None, animate, title, wanted)
        return None, []
    known, warnings = reads(architecture), []
    for name in _SOCKETS:
        if getattr(control, name) is not None and name not in known:
            raise _unread(name, title, known)
    strength = _strength(control, architecture, known)
    denoise = real(control.denoise, "control.denoise", 0, 1)
    clear = flag(control.clear_masked, "control.clear_masked")
    if clear and (control.mask is None or control.video is None):
        raise InvalidRequest(
            "control.clear_masked makes the masked area of the video grey, and "
            f"{'mask' if control.mask is None else 'video'} is missing. Give it, or leave "
            "clear_masked off.",
            field="control.clear_masked",
        )
    video = known["video"] if control.video is not None else ""
    _check_start(config, control, denoise, video, title)
    frames = 0
    if animate is not None:
        frames, said = check_character(control, animate, title, wanted)
        warnings += said
    for name in () if animate is not None else ("video", "mask"):
        if getattr(control, name) is not None:
            warnings += _length(name, getattr(control, name), wanted, made)
    if isinstance(control.reference, list | tuple) and not control.reference:
        raise InvalidRequest(
            "control.reference is an empty list; give pictures, or None.", field="control.reference"
        )
    references = sum(shape_of("reference", one, 4)[0] for one in batches(control.reference))
    if references > 1 and not animate and architecture.transformer.vace_in_channels is None:
        warnings.append(
            f"control.reference holds {references} pictures; {title} reads one, the first."
        )
    positions = _positions(config, control, wanted=wanted, made=made)
    if control.keyframes is not None:
        _check_positions(positions, known["keyframes"], architecture)
    return ControlRequest(
        video=video,
        mask=control.mask is not None,
        references=references,
        positions=positions if control.keyframes is not None else (),
        camera=control.camera is not None,
        tracks=_kind_of_tracks(control.tracks),
        strength=strength,
        denoise=denoise,
        clear_masked=clear,
        frames=frames,
        background=control.background_video is not None,
    ), warnings


def first_step(steps: int, denoise: float) -> int:
    """Return the first step of a shortened schedule: ``steps - min(int(steps x denoise), steps)``.

    As ``WanVideoToVideoPipeline.get_timesteps`` counts. Raises InvalidRequest where none is left.
    """
    left = min(int(steps * denoise), steps)
    if left < 1:
        raise InvalidRequest(
            f"control.denoise is {denoise:g}, which makes none of {steps} steps; "
            f"{math.ceil(1000 / steps) / 1000:g} or more makes one.",
            field="control.denoise",
        )
    return steps - left


def _unread(name: str, title: str, known: Mapping[str, str]) -> InvalidRequest:
    what = [one for one in _SOCKETS if one in known]
    hints = {
        "video": "Load a text-to-video model to start from it, or a VACE model to follow it.",
        "mask": "Load a VACE model, or Animate.",
        "reference": "Load a VACE model, Fun Control of version 1.1 or 2.2, or Animate.",
        "face_video": "It is for Wan 2.2 Animate; Animate 2 sees the face in its driving video.",
        "background_video": "It is for Wan 2.2 Animate, which replaces a character.",
        "keyframes": "Load an image-to-video or a VACE model.",
        "camera": "Load a Fun Camera model.",
        "tracks": "Load an image-to-video model that was trained on tracks (ATI, WanMove).",
    }
    said = f"it takes {', '.join(what)}" if what else "it takes no control"
    return InvalidRequest(
        f"control.{name} was given, but {title} reads none: {said}. {hints[name]}",
        field=f"control.{name}",
    )


def _strength(
    control: WanControl, architecture: ModelArchitecture, known: Mapping[str, str]
) -> tuple[float, ...]:
    """Return one strength, or one for each VACE block."""
    value = control.strength
    blocks = len(architecture.transformer.vace_layers)
    if plain_number(value) is None and isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != blocks:
            raise InvalidRequest(
                f"control.strength has {len(value)} numbers; {architecture.variant.title} has "
                f"{blocks} VACE blocks. Give one number, or one for each block.",
                field="control.strength",
            )
        many = tuple(real(one, "control.strength", 0, _MOST_STRENGTH) for one in value)
    else:
        many = (real(value, "control.strength", 0, _MOST_STRENGTH),)
    if "strength" not in known and many != (1.0,):
        raise InvalidRequest(
            f"control.strength is {shown(value)}, and {architecture.variant.title} has nothing "
            "that it weighs: it is for VACE and Animate 2. Leave it at 1; denoise says how much of "
            "a video is kept.",
            field="control.strength",
        )
    return many


def _check_start(
    config: GenerationConfig, control: WanControl, denoise: float, video: str, title: str
) -> None:
    """Check that a shortened schedule has a video to begin with, and nothing else does."""
    if denoise < 1 and video != "start":
        why = (
            f"{title} follows its video and does not start from it"
            if video
            else "there is no video to start from"
        )
        raise InvalidRequest(
            f"control.denoise is {denoise:g}, but {why}. Set it to 1.", field="control.denoise"
        )
    if video != "start":
        return
    for name in ("latents", "continue_from"):
        if getattr(config, name) is not None:
            raise InvalidRequest(
                f"control.video and {name} were both given; the clip begins with one of them.",
                field="control.video",
            )
    if config.start_step:
        raise InvalidRequest(
            f"control.video and start_step {shown(config.start_step)} were both given; denoise "
            "says which step the video begins at.",
            field="start_step",
        )


def _length(name: str, value: Any, wanted: int, made: int) -> list[str]:
    """Check the number of frames of a video or mask; return what is said of it."""
    shape = shape_of(name, value, 4 if name == "video" else 3, or_fewer=name == "mask")
    frames = 1 if name == "mask" and len(shape) == 2 else shape[0]
    if name == "mask" and frames == 1:
        return []
    if frames < wanted:
        fit = video_frames(latent_frames(frames))
        raise InvalidRequest(
            f"control.{name} has {frames} frames, {wanted - frames} fewer than the clip's "
            f"{wanted}. Make the clip shorter (num_frames {fit}), or the {name} longer.",
            field=f"control.{name}",
        )
    if frames > made:
        return [f"control.{name} has {frames} frames; the first {made} are used."]
    if frames < made:
        return [
            f"control.{name} has {frames} frames and {made} are made: its last frame is repeated "
            f"{made - frames} times."
        ]
    return []


# Key frames --------------------------------------------------------------------------------------


def _positions(
    config: GenerationConfig, control: WanControl, *, wanted: int, made: int
) -> tuple[int, ...]:
    """Return the frame of every key frame in the order they were given, then of start and end.

    The last frame is that of the clip as it is made, as for an end image.
    """
    if control.keyframes is None:
        if _numbers(control.positions):
            raise InvalidRequest(
                f"control.positions is {shown(control.positions)}, and there are no keyframes to "
                "place.",
                field="control.positions",
            )
        return ()
    count = shape_of("keyframes", control.keyframes, 4)[0]
    asked = _numbers(control.positions)
    given = asked or _spread(config, count, made)
    if not asked and len(set(given)) < count:
        raise InvalidRequest(
            f"control.keyframes has {count} pictures, and the clip {made} frames, a start and "
            "an end image among them. Give fewer, or make the clip longer.",
            field="control.keyframes",
        )
    if len(given) != count:
        raise InvalidRequest(
            f"control.positions has {len(given)} numbers for {count} keyframes. Give one for each, "
            "or none to spread them evenly.",
            field="control.positions",
        )
    found = [_place(one, wanted, made) for one in asked] or given
    found += [0] if config.image is not None else []
    found += [made - 1] if config.last_image is not None else []
    twice = next((one for one in found if found.count(one) > 1), None)
    if twice is not None:
        raise InvalidRequest(
            f"control.positions names frame {twice} twice (a start image is frame 0, an end image "
            f"frame {made - 1}). Give each frame one picture.",
            field="control.positions",
        )
    return tuple(found)


def _numbers(value: Any) -> list[int]:
    """Return the whole numbers of ``positions``, a text or a sequence."""
    if isinstance(value, str):
        parts: list[Any] = [part.strip() for part in value.replace(";", ",").split(",")]
        parts = [] if parts == [""] else parts
    elif is_many(value):
        parts = list(value)
    else:
        parts = [value]
    out = []
    for part in parts:
        number = plain_number(part)
        if isinstance(part, str) and part.lstrip("+-").isdecimal() and len(part) < 10:
            number = int(part)
        if not isinstance(number, int) and not (isinstance(number, float) and number.is_integer()):
            raise InvalidRequest(
                f"control.positions holds {shown(part)}; frame numbers like '0, 40, -1' are "
                "needed.",
                field="control.positions",
            )
        out.append(int(number))
    return out


def _spread(config: GenerationConfig, count: int, made: int) -> list[int]:
    """Return frames spread evenly from the first to the last, without those of other pictures."""
    first = 1 if config.image is not None else 0
    last = 1 if config.last_image is not None else 0
    total = count + first + last
    if total == 1:
        return [0]
    places = [round(i * (made - 1) / (total - 1)) for i in range(total)]
    return places[first : total - last]


def _place(position: int, wanted: int, made: int) -> int:
    """Return a position as a frame of the clip that is made."""
    if position == -1:
        return made - 1
    found = position if position >= 0 else wanted + position
    if not 0 <= found < wanted:
        raise InvalidRequest(
            f"control.positions names frame {position}; the clip has frames 0 to {wanted - 1} (or "
            f"-{wanted} to -1).",
            field="control.positions",
        )
    return found


def _check_positions(positions: tuple[int, ...], how: str, architecture: ModelArchitecture) -> None:
    """Check that a model can take pictures at these frames."""
    title, count = architecture.variant.title, len(positions)
    if how == "leading":
        if sorted(positions) != list(range(count)) or count % FRAMES_PER_LATENT != 1:
            raise InvalidRequest(
                f"control.positions are {', '.join(map(str, sorted(positions)))}; {title} keeps "
                "the first frames only: 1, 5, 9 ... pictures at 0, 1, 2 and so on.",
                field="control.positions",
            )
        return
    seen = architecture.transformer.pos_embed_seq_len is not None
    if seen and count < 2:
        raise InvalidRequest(
            f"control.keyframes is one picture; {title} makes the video between two or more. Give "
            "the last one too.",
            field="control.keyframes",
        )


def _kind_of_tracks(tracks: Any) -> str:
    """Return which form tracks have: "points" (a text) or "paths" (tensors)."""
    if tracks is None:
        return ""
    if isinstance(tracks, str):
        return "points"
    if isinstance(tracks, Mapping) and "track_path" in tracks:
        return "paths"
    raise InvalidRequest(
        f"control.tracks is {shown(tracks)}; a JSON text of tracks, or the tracks of a WanMove "
        "node are needed.",
        field="control.tracks",
    )
