"""WanControl: what guides a clip besides its texts. Tensors and numbers; no model is looked at."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..wan_core.config import WanControl as Control
from .inputs import Control as ControlSocket


class WanControl(io.ComfyNode):  # type: ignore[misc]
    """Gathers a video, masks, pictures, a camera and tracks; the samplers say what applies."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanControl",
            display_name="Wan Control",
            category="WanFit",
            description="Guides a clip: a video to start from or to follow, a mask, reference "
            "pictures, key frames, a camera, tracks. The model decides what applies; a sampler "
            "refuses the rest by name, before anything is read.",
            inputs=[*_pictures(), *_places(), *_amounts(), *_characters()],
            outputs=[
                ControlSocket.Output(
                    "control",
                    display_name="control",
                    tooltip="For WanGenerate, WanChunkedSampler and WanEstimateMemory.",
                )
            ],
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        return io.NodeOutput(Control(**given))


def _pictures() -> list[io.Input]:
    return [
        io.Image.Input(
            "video",
            optional=True,
            tooltip="Text-to-video models, Wan 2.2 image to video and TI2V-5B start from it as far "
            "as denoise says; VACE and Fun Control follow it. Animate: the drawn pose, Animate 2: "
            "the driving video itself.",
        ),
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="White = make something new, black = keep. One, or one for each frame. "
            "Animate: white where the character of background_video is.",
        ),
        io.Image.Input(
            "reference",
            optional=True,
            tooltip="Pictures of what shall appear: VACE takes all, Fun Control (2.1 V1.1 and 2.2) "
            "the first, Animate the picture of the character.",
        ),
        io.Image.Input(
            "keyframes",
            optional=True,
            tooltip="Pictures that the clip shows at 'positions'. Image-to-video models, VACE and "
            "the 2.2 Fun models take any, TI2V-5B the first frames.",
        ),
    ]


def _places() -> list[io.Input]:
    return [
        io.String.Input(
            "positions",
            default="",
            optional=True,
            tooltip="The frame of each key frame, as '0, 40, -1'; negative ones count from the "
            "end. Empty: spread evenly.",
        ),
        io.Custom("WAN_CAMERA_EMBEDDING").Input(
            "camera", optional=True, tooltip="From WanCameraEmbedding, for Fun Camera models."
        ),
        io.MultiType.Input(
            "tracks",
            types=[io.String, io.Custom("TRACKS")],
            optional=True,
            tooltip="Points and where they go: ATI's text, or the tracks of a WanMove node.",
        ),
    ]


def _amounts() -> list[io.Input]:
    return [
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.01,
            optional=True,
            tooltip="How much a control counts, for VACE and Animate 2. It does not say how much "
            "of a video is kept: that is denoise.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Share of the steps that are made, from the video on: 1 makes all from noise, "
            "0.3 keeps most of the video. The report says how noisy the start is.",
        ),
        io.Boolean.Input(
            "clear_masked",
            default=False,
            optional=True,
            tooltip="Make the masked area of the video grey, for inpainting. Off: what is under "
            "the mask guides the model, as a drawing does.",
        ),
    ]


def _characters() -> list[io.Input]:
    # Sockets that came later: at the end, because saved workflows number them.
    return [
        io.Image.Input(
            "face_video",
            optional=True,
            tooltip="For Animate: crops of a face that the character's face moves like, 512x512.",
        ),
        io.Image.Input(
            "background_video",
            optional=True,
            tooltip="For Animate: the video whose character is replaced, where the mask is white.",
        ),
    ]
