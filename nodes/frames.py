"""ComfyUI's nodes that say what a clip begins with, and what of them is not taken over.

Does not import ComfyUI.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from .native import Link, Prompt

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
_CROPPED: Final = (
    "start_image", "end_image", "control.video", "control.reference", "control.background_video",
)  # fmt: skip
"""Inputs of ours whose pictures ComfyUI's nodes crop to the clip's proportions."""
_USUAL: Final[dict[str, object]] = {
    "temperature": 220, "topk": 2, "pose_start_percent": 0, "pose_end_percent": 1,
    "reference_image_strength": 1, "strength": 1,
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
        given = None if name in PICTURES[prompt.kind(node)] else prompt.value(node, name)
        if given not in (None, usual):
            yield f"{name} {given} of node {node} is left out: here it is {usual}."
    if prompt.source(node, "positive_pose") is not None:
        yield (
            f"positive_pose of node {node} is left out: the driving stream is given the sentence "
            "it was trained with."
        )
    names = PICTURES[prompt.kind(node)]
    if any(_masked(prompt, node, name) and _size(prompt, node, name) for name in names):
        yield f"Videos of another size are stretched here with their mask; node {node} crops both."
    for name in ("width", "height"):
        if isinstance(given := prompt.value(node, name), int) and given % 16:
            yield f"{name} {given} of node {node} is made {given // 16 * 16}."
    given = prompt.source(node, "length")
    if (
        given is not None
        and prompt.value(node, "length") is None
        and (
            prompt.kind(given[0]) != "WanCameraEmbedding"  # it gives its own widget, 4n+1
        )
    ):
        yield (
            f"length of node {node} is known when it runs: where it is not 4n+1, up to 3 frames "
            "more are made here."
        )
    segment, length = _SEGMENT.get(prompt.kind(node)), prompt.value(node, "length")
    if segment is not None and isinstance(length, int) and length > segment:
        yield f"Its {length} frames are made in segments of {segment}, as the model was trained."


def scaling(prompt: Prompt, node: str, name: str) -> dict[str, Any] | None:
    """Return how a node scales a picture to the clip, as inputs of an ImageScale that crops.

    None for what is no picture, has the clip's size already, or lies under a mask: the two are
    stretched alike here.
    """
    size = None if _masked(prompt, node, name) else _size(prompt, node, name)
    method = "area" if prompt.kind(node) in _SEGMENT else "bilinear"
    return None if size is None else {"upscale_method": method, **size}


def _size(prompt: Prompt, node: str, name: str) -> dict[str, Any] | None:
    """Return the clip's size as a node says it, for a picture that it crops and that may have
    another one; None for any other input."""
    picture = prompt.source(node, name)
    if picture is None or PICTURES[prompt.kind(node)][name] not in _CROPPED:
        return None
    size = {one: _given(prompt, node, one) for one in ("width", "height")}
    if _has_size(prompt, picture, size):
        return None
    return {name: list(one) if isinstance(one, tuple) else one for name, one in size.items()}


def _masked(prompt: Prompt, node: str, name: str) -> bool:
    """Say whether a picture is one that a mask of the same node belongs to."""
    masks = [one for one, ours in PICTURES[prompt.kind(node)].items() if ours == "control.mask"]
    masked = any(prompt.source(node, one) is not None for one in masks)
    return masked and PICTURES[prompt.kind(node)][name] != "control.reference"


def _given(prompt: Prompt, node: str, name: str) -> Any:
    """Return an input's value, or the link to the node that gives it."""
    found = prompt.value(node, name)
    return prompt.source(node, name) if found is None else found


def _has_size(prompt: Prompt, picture: Link, size: dict[str, Any]) -> bool:
    """Say whether a picture surely has a size: it was scaled to it, or the size is taken of it."""
    node = picture[0]
    measured = [one[0] for one in size.values() if isinstance(one, tuple)]
    if len(measured) == 2 and all(prompt.kind(one) == "GetImageSize" for one in measured):
        return all(prompt.source(one, "image") == picture for one in measured)
    before = {"ImageScale": "", "ResizeImageMaskNode": "resize_type."}.get(prompt.kind(node))
    return before is not None and all(
        given is not None and given == _given(prompt, node, before + name)
        for name, given in size.items()
    )


def unpaired(prompt: Prompt, node: str) -> str | None:
    """Return the input of an Animate that is of no use without the one it belongs to, or None."""
    pair = ("background_video", "character_mask")
    given = [name for name in pair if prompt.source(node, name) is not None]
    return given[0] if len(given) == 1 and prompt.kind(node) == "WanAnimateToVideo" else None
