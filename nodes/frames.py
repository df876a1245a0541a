"""ComfyUI's nodes that say what a clip begins with, and what of them is not taken over.

Does not import ComfyUI.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from .native import Prompt

PICTURES: Final[dict[str, dict[str, str]]] = {
    "WanImageToVideo": {"start_image": "start_image"},
    "WanFirstLastFrameToVideo": {"start_image": "start_image", "end_image": "end_image"},
    "WanFunInpaintToVideo": {"start_image": "start_image", "end_image": "end_image"},
    "Wan22ImageToVideoLatent": {"start_image": "start_image"},
    "WanTrackToVideo": {"start_image": "start_image", "tracks": "control.tracks"},
    "WanMoveTrackToVideo": {"start_image": "start_image", "tracks": "control.tracks"},
    "WanVaceToVideo": {
        "control_video": "control.video", "control_masks": "control.mask",
        "reference_image": "control.reference", "strength": "control.strength",
    },
    "WanFunControlToVideo": {"start_image": "start_image", "control_video": "control.video"},
    "Wan22FunControlToVideo": {
        "control_video": "control.video", "ref_image": "control.reference",
    },
    "WanCameraImageToVideo": {
        "start_image": "start_image", "camera_conditions": "control.camera",
    },
    "WanAnimateToVideo": {
        "pose_video": "control.video", "reference_image": "control.reference",
        "face_video": "control.face_video", "background_video": "control.background_video",
        "character_mask": "control.mask",
    },
    "WanAnimate2ToVideo": {
        "pose_video": "control.video", "reference_image": "control.reference",
        "pose_strength": "control.strength",
    },
    "EmptyHunyuanLatentVideo": {},
}  # fmt: skip
"""Nodes that say what a clip begins with -> their inputs -> ours; "control." is of WanControl."""
_USUAL: Final[dict[str, object]] = {
    "temperature": 220, "topk": 2, "pose_start_percent": 0, "pose_end_percent": 1,
    "reference_image_strength": 1,
}  # fmt: skip
"""Inputs whose other values have nothing here that stands for them."""
_SEGMENT: Final = {"WanAnimateToVideo": 77, "WanAnimate2ToVideo": 81}
"""Frames of the segments in which a longer clip of an Animate is made here."""


def why_not(prompt: Prompt, node: str) -> str | None:
    """Return why what a node prepares is not made in one go, or None."""
    if prompt.source(node, "continue_motion") is not None or _goes_on(prompt, node):
        return (
            "its clip is one of several that are joined. One Wan Chunked Sampler makes all of it: "
            "num_frames 0 is as long as the video, and its segments go on from each other."
        )
    if prompt.value(node, "video_frame_offset") not in (None, 0):
        return "it begins within its videos (video_frame_offset)."
    return None


def _goes_on(prompt: Prompt, node: str) -> bool:
    return prompt.kind(node) in _SEGMENT and any(
        name == "video_frame_offset" for _, name, _ in prompt.users(node)
    )


def left_out(prompt: Prompt, node: str) -> Iterator[str]:
    """Say what a node says that is not taken over."""
    if prompt.value(node, "batch_size") not in (None, 1):
        yield f"batch_size of node {node} is left out: one clip is made."
    for name, usual in _USUAL.items():
        if (given := prompt.value(node, name)) not in (None, usual):
            yield f"{name} {given} of node {node} is left out: here it is {usual}."
    if prompt.source(node, "positive_pose") is not None:
        yield (
            f"positive_pose of node {node} is left out: the driving stream is given the sentence "
            "it was trained with."
        )
    segment, length = _SEGMENT.get(prompt.kind(node)), prompt.value(node, "length")
    if segment is not None and isinstance(length, int) and length > segment:
        yield f"Its {length} frames are made in segments of {segment}, as the model was trained."


def unpaired(prompt: Prompt, node: str) -> str | None:
    """Return the input of an Animate that is of no use without the one it belongs to, or None."""
    pair = ("background_video", "character_mask")
    given = [name for name in pair if prompt.source(node, name) is not None]
    return given[0] if len(given) == 1 and prompt.kind(node) == "WanAnimateToVideo" else None
