"""What a control means for the Animate models, which move a character as a video does.

Animate 1 reads a drawn pose (``video``) and crops of the face (``face_video``), and replaces a
character where it is given a ``background_video`` and a ``mask``. Animate 2 reads the driving video
itself. Both need one picture of the character, the only ``reference``. What is too short is played
back and forth, as ``WanAnimatePipeline.pad_video_frames`` of diffusers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..config import GenerationConfig, WanControl
from ..errors import InvalidRequest
from .fields import batches, flag, shape_of, whole
from .windows import (
    DEFAULT_OVERLAP,
    FRAMES_PER_LATENT,
    latent_frames,
    round_up_frames,
    video_frames,
)

MOVED_BY: Final[Mapping[int, Mapping[str, str]]] = {
    1: {
        "video": "pose", "reference": "character", "face_video": "face",
        "background_video": "background", "mask": "background",
    },
    2: {"video": "driving", "reference": "character", "strength": "driving"},
}  # fmt: skip
"""What each Animate reads of a control: the input's name, and what it is there."""
_WHAT: Final = {
    "reference": "a picture of the character",
    "video": "the video that it moves like (for Animate 1 the drawn pose)",
    "face_video": "the crops of the face that it moves like, 512x512",
}
_NEEDED: Final = {1: ("reference", "video", "face_video"), 2: ("reference", "video")}


def missing_input(number: int, title: str, name: str) -> InvalidRequest:
    """Return the error for one of the inputs that an Animate cannot do without."""
    needed = ", ".join(f"control.{one}" for one in _NEEDED[number])
    return InvalidRequest(
        f"control.{name} is missing: {title} needs {_WHAT[name]}. It takes {needed}.",
        field=f"control.{name}",
    )


def check_character(
    control: WanControl | None, number: int, title: str, wanted: int
) -> tuple[int, list[str]]:
    """Check an Animate's control by shapes, for a clip of ``wanted`` frames.

    Returns how many frames of the driving video are used, and warnings. Raises InvalidRequest
    naming the input.
    """
    for name in _NEEDED[number]:
        if control is None or getattr(control, name) is None:
            raise missing_input(number, title, name)
    assert control is not None
    if control.clear_masked:
        raise InvalidRequest(
            f"control.clear_masked was given, and {title} makes nothing grey: draw the background "
            "video as it shall be seen. Leave it off.",
            field="control.clear_masked",
        )
    count = sum(shape_of("reference", one, 4)[0] for one in batches(control.reference))
    if count != 1:
        raise InvalidRequest(
            f"control.reference holds {count} pictures; {title} moves one character. Give one "
            "picture.",
            field="control.reference",
        )
    frames, warnings = _driving(control.video, wanted)
    if control.face_video is not None:
        warnings += _padded("face_video", control.face_video, frames, wanted)
    if control.background_video is not None or control.mask is not None:
        warnings += _replacing(control, title, frames, wanted)
    return frames, warnings


def _driving(video: Any, wanted: int) -> tuple[int, list[str]]:
    """Return how many frames of the driving video are used, and what is said of it."""
    has = shape_of("video", video, 4)[0]
    if has > wanted:
        return wanted, [f"control.video has {has} frames; the first {wanted} are used."]
    return has, _padded("video", video, wanted, wanted)


def _padded(name: str, video: Any, frames: int, wanted: int) -> list[str]:
    """Say of a video with fewer than ``frames`` how it is made longer."""
    has = shape_of(name, video, 4)[0]
    if has > wanted:
        return [f"control.{name} has {has} frames; the first {wanted} are used."]
    if has >= frames:
        return []
    how = "its only frame is repeated" if has == 1 else "it is played back and forth"
    return [
        f"control.{name} has {has} frames and {wanted} are made: {how}, as in diffusers (ComfyUI "
        "repeats the last frame)."
    ]


def _replacing(control: WanControl, title: str, frames: int, wanted: int) -> list[str]:
    """Check what the character is put into: a background video, and a mask of as many frames."""
    for name, other in (("background_video", "mask"), ("mask", "background_video")):
        if getattr(control, name) is None:
            raise InvalidRequest(
                f"control.{other} was given without control.{name}; {title} replaces a character "
                "where it has both: the video, and white where the character is. Give both, or "
                "neither to draw the background of the picture.",
                field=f"control.{name}",
            )
    behind = shape_of("background_video", control.background_video, 4)[0]
    shape = shape_of("mask", control.mask, 3, or_fewer=True)
    masks = 1 if len(shape) == 2 else shape[0]
    if masks not in (1, behind):
        raise InvalidRequest(
            f"control.mask has {masks} frames and control.background_video {behind}. Give one "
            "mask, or one for each frame of the background.",
            field="control.mask",
        )
    return _padded("background_video", control.background_video, frames, wanted)


def refuse_picture(config: GenerationConfig, title: str) -> None:
    """Refuse a start or end image: an Animate is given its character by the control."""
    for name in ("image", "last_image"):
        if getattr(config, name) is not None:
            raise InvalidRequest(
                f"{name} was given, but {title} takes its character as control.reference. Give "
                "the picture there.",
                field=name,
            )


class _Numbers:
    """Stands for a batch of pictures where only numbers are looked at."""

    ndim = 4

    def __init__(self, *shape: int) -> None:
        self.shape = shape


def with_character(config: GenerationConfig, number: int) -> WanControl:
    """Return a control with stand-ins for what an Animate needs and was not given.

    For estimates, which look at no picture. Lengths are those of the clip.
    """
    given = config.control or WanControl()
    video = getattr(given.video, "shape", (max(1, int(config.num_frames)),))[0]
    stand_in = {"reference": _Numbers(1, 8, 8, 3), "video": _Numbers(video, 8, 8, 3)}
    if number == 1:
        stand_in["face_video"] = _Numbers(video, 8, 8, 3)
    known = {name: getattr(given, name) for name in WanControl.__slots__}
    more = {name: one for name, one in stand_in.items() if known[name] is None}
    return WanControl(**(known | more))


def back_and_forth(index: int, frames: int) -> int:
    """Return which of ``frames`` frames stands at ``index`` of a video played back and forth.

    0 1 2 1 0 1 2 ...: ``WanAnimatePipeline.pad_video_frames``, which fails for a single frame.
    """
    if frames == 1:
        return 0
    place = index % (2 * (frames - 1))
    return min(place, 2 * (frames - 1) - place)


def mirrored(index: int, frames: int) -> int:
    """Return which of ``frames`` frames stands at ``index`` of a driving video of Animate 2.

    0 1 2 2 1 0 0 1 ...: beyond its end it is played back, the last frame twice
    (``WanAnimate2ProcessVideosInputStep`` of diffusers, which ends where it is played back once).
    """
    place = index % (2 * frames)
    return min(place, 2 * frames - 1 - place)


# Segments: each is a video of its own, begun with the last pictures of the one before ------------

CARRIED: Final[Mapping[int, tuple[int, ...]]] = {1: (1, 5), 2: (1,)}
"""How many frames a segment can take over from the one before; the first number is official."""
_MOST: Final = 4093


@dataclass(frozen=True, slots=True)
class CharacterPlan:
    """The segments of a clip of ``frames`` video frames, all ``length`` frames long (4n + 1).

    Each begins with the last ``carried`` frames of the one before. What the last one makes beyond
    the clip is cut off.
    """

    frames: int
    length: int
    carried: int

    @property
    def step(self) -> int:
        """New frames of every segment but the first, which makes ``carried`` more."""
        return self.length - self.carried

    @property
    def count(self) -> int:
        """How many segments there are."""
        return max(1, -(-(self.frames - self.carried) // self.step))

    @property
    def latents(self) -> int:
        """Latent frames of a segment."""
        return latent_frames(self.length)

    def frames_of(self, number: int) -> range:
        """Return the video frames of segment ``number``, those taken over included."""
        return range(number * self.step, number * self.step + self.length)

    def describe(self) -> str:
        """Describe the segments in one line."""
        made = self.carried + self.count * self.step
        return (
            f"{self.count} segments of {self.length} frames, each begun with the last "
            f"{self.carried} before it, {made} frames made for {self.frames}"
        )


def character_segments(
    config: GenerationConfig, number: int, official: int, wanted: int, warnings: list[str]
) -> tuple[int, int]:
    """Return length and carried frames of an Animate's segments, as video frames.

    ``official`` is the length that the model was trained with. Without ``max_chunk_size`` a shorter
    clip is made in a segment of its own length; ``force_chunked_processing`` keeps the length that
    was asked for. Raises InvalidRequest naming the field.
    """
    allowed = CARRIED[number]
    asked_for = DEFAULT_OVERLAP if config.window_overlap is None else config.window_overlap
    carried = whole(asked_for, "window_overlap", 0, 4096)
    carried = allowed[0] if carried == DEFAULT_OVERLAP else carried
    if carried == FRAMES_PER_LATENT and carried + 1 in allowed:  # widgets go by fours
        carried += 1
        warnings.append(
            "window_overlap 4 is made 5: pictures are taken over, of two latent frames."
        )
    if carried not in allowed:
        raise InvalidRequest(
            f"window_overlap is {carried}; the segments of an Animate begin with "
            f"{' or '.join(map(str, allowed))} frames of the one before. Leave it at "
            f"{DEFAULT_OVERLAP} for {allowed[0]}, or set one of these.",
            field="window_overlap",
        )
    asked = official
    if config.max_chunk_size is not None:
        asked = whole(config.max_chunk_size, "max_chunk_size", 5, _MOST)
    length = round_up_frames(asked)
    if length != asked:
        warnings.append(f"max_chunk_size {asked} is made {length}: Wan makes 4n+1 frames.")
    if not flag(config.force_chunked_processing, "force_chunked_processing"):
        length = min(length, round_up_frames(wanted))
    if wanted > length <= carried:
        raise InvalidRequest(
            f"max_chunk_size is {asked}, and {carried} frames of each segment are taken over: "
            f"nothing would be made. Set {video_frames(latent_frames(carried) + 1)} or more.",
            field="max_chunk_size",
        )
    return length, carried


def refuse_continuing(config: GenerationConfig, title: str) -> None:
    """Refuse what goes on from latents, or makes a part of the steps: segments make them all."""
    for name, unset in (("continue_from", None), ("start_step", 0), ("end_step", None)):
        if getattr(config, name) != unset if unset == 0 else getattr(config, name) is not None:
            raise InvalidRequest(
                f"{name} was given, but {title} makes a clip in segments, each from noise and from "
                "the last pictures of the one before. Leave it out.",
                field=name,
            )
