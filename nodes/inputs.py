"""The inputs that WanGenerate and WanChunkedSampler share.

Saved workflows store widgets by position, so the order here is final and new inputs go at the end.
A 0 in steps, guidance_scale, guidance_scale_2, flow_shift, boundary and fps means "the model's
official value".
"""

from __future__ import annotations

from comfy_api.latest import io

from ..wan_core.config import CODECS
from ..wan_core.job import PIXEL_FORMATS, SCHEDULERS, SIGMA_SCHEDULES
from ..wan_core.preferences import read_preferences
from . import bridge

SIZE = {"min": 16, "max": 8192, "step": 16}
MOST_FRAMES = 4097
MOST_FRAMES_IN_WINDOWS = 4 * 2**16 - 3

Pipeline = io.Custom("WAN_PIPELINE")
Control = io.Custom("WAN_CONTROL")


def pipeline_input() -> io.Input:
    """Return the WAN_PIPELINE socket, the first input of every node but the loader."""
    return Pipeline.Input(
        "pipeline", tooltip="A Wan model from WanLoader, with or without WanOptimize between."
    )


def control_input() -> io.Input:
    """Return the WAN_CONTROL socket, the last input of the samplers and of WanEstimateMemory."""
    return Control.Input(
        "control",
        optional=True,
        tooltip="From WanControl: a video to start from or to follow, key frames, masks ...",
    )


def devices_input() -> io.Input:
    """Return the last widget of the samplers: how many cards compute the clip."""
    return io.String.Input(
        "devices",
        default="1",
        optional=True,
        tooltip="Cards that compute this clip together, with the same bits: a number, all, auto "
        "(as many as pay), or which ones, like '0,2'. The windows and the two halves of guidance "
        "are shared out; cards that are left over cut each half where that keeps the bits.",
        **bridge.known(io.String.Input, advanced=True),
    )


def size_inputs(most_frames: int) -> list[io.Input]:
    """Return width, height and frames."""
    return [
        io.Int.Input(
            "width",
            default=832,
            tooltip="Width in pixels; a multiple of 16 (32 for TI2V-5B), others are snapped down.",
            **SIZE,
        ),
        io.Int.Input(
            "height",
            default=480,
            tooltip="Height in pixels; a multiple of 16 (32 for TI2V-5B), others are snapped down.",
            **SIZE,
        ),
        io.Int.Input(
            "num_frames",
            default=81,
            min=0,
            max=most_frames,
            # From 0 on, steps of 4 would never meet 81: the front end snaps to whole steps.
            step=1,
            tooltip="Frames of the clip. Wan makes 4n+1: others are made longer and trimmed. 0 = "
            "as many as the control's video has.",
        ),
    ]


def sampling_inputs(most_frames: int = MOST_FRAMES) -> list[io.Input]:
    """Return the inputs of a sampler after the pipeline, in the order that workflows store."""
    sizes = size_inputs(most_frames)
    return [*_prompt_inputs(), *sizes, *_main_inputs(), *_expert_inputs(), *_sockets()]


def video_inputs() -> list[io.Input]:
    """Return the inputs about the mp4, and those that came after them, in their final order."""
    hidden = bridge.known(io.Combo.Input, advanced=True)
    return [
        io.Combo.Input(
            "codec",
            optional=True,
            options=list(CODECS),
            default=read_preferences().codec or CODECS[0],
            tooltip="Codec of the VIDEO. h264 plays everywhere; h265 is smaller and slower.",
            **hidden,
        ),
        io.Int.Input(
            "crf",
            default=18,
            optional=True,
            min=0,
            max=51,
            tooltip="Quality of the VIDEO: 0 keeps every bit, 18 looks the same, 51 is worst.",
            **bridge.known(io.Int.Input, advanced=True),
        ),
        io.Combo.Input(
            "pix_fmt",
            optional=True,
            options=list(PIXEL_FORMATS),
            default=PIXEL_FORMATS[0],
            tooltip="Pixels of the VIDEO. yuv420p plays everywhere; yuv444p keeps sharp colours, "
            "10le smooth gradients.",
            **hidden,
        ),
        io.Audio.Input(
            "audio",
            optional=True,
            tooltip="Sound that goes into the VIDEO, cut to its length.",
        ),
        io.Boolean.Input(
            "official_negative",
            default=True,
            optional=True,
            tooltip="What an empty negative_prompt means. On: the official negative prompt of Wan. "
            "Off: none.",
            **bridge.known(io.Boolean.Input, advanced=True),
        ),
        *_step_inputs(),
    ]


def _step_inputs() -> list[io.Input]:
    """Return the later inputs about noise levels and steps."""
    return [
        io.Combo.Input(
            "sigma_schedule",
            optional=True,
            options=list(SIGMA_SCHEDULES),
            default=SIGMA_SCHEDULES[0],
            tooltip="Noise levels of the steps. official: Wan's own. simple: levels and solvers of "
            "ComfyUI's KSampler with that schedule.",
        ),
        io.String.Input(
            "sigmas",
            default="",
            optional=True,
            tooltip="Noise levels typed one by one, '1, 0.757, 0.522', in place of steps, "
            "flow_shift and schedule. Empty: none.",
            **bridge.known(io.String.Input, advanced=True),
        ),
        io.Int.Input(
            "guided_steps",
            default=0,
            optional=True,
            min=0,
            max=1000,
            tooltip="So many first steps without the distilled LoRAs and with guidance: more "
            "motion, more time. They are part of 'steps'. 0 = none.",
            **bridge.known(io.Int.Input, advanced=True),
        ),
        io.Float.Input(
            "guided_scale",
            default=0.0,
            optional=True,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="Guidance scale of the guided_steps. 0 = the model's official value.",
            **bridge.known(io.Float.Input, advanced=True),
        ),
    ]


def _prompt_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "prompt",
            multiline=True,
            default="",
            dynamic_prompts=True,
            tooltip="What the video shows. Ignored where 'positive' is connected.",
        ),
        io.String.Input(
            "negative_prompt",
            multiline=True,
            default="",
            dynamic_prompts=True,
            tooltip="What it should not show; empty: see official_negative. Only read while a "
            "guidance scale is above 1.",
        ),
    ]


def _main_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=1000,
            tooltip="Denoising steps. 0 = the model's official number.",
        ),
        _float(
            "guidance_scale",
            "How closely the prompt is followed, by the only or the high-noise expert. 1 switches "
            "guidance off and halves the time. 0 = the model's official value.",
            maximum=30.0,
            step=0.1,
        ),
        _float(
            "guidance_scale_2",
            "The same for the low-noise expert of a Wan 2.2 A14B. 0 = official.",
            maximum=30.0,
            step=0.1,
        ),
        _float(
            "flow_shift",
            "Moves steps towards high noise: larger for larger pictures. 0 = official.",
            maximum=100.0,
            step=0.1,
        ),
        io.Combo.Input(
            "scheduler",
            options=list(SCHEDULERS),
            default=SCHEDULERS[0],
            tooltip="How a step is taken. UniPC is what Wan was released with; lcm adds fresh "
            "noise in each step.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=True,
            tooltip="The same seed and settings give the same video. 0 is a seed like any other.",
        ),
    ]


def _expert_inputs() -> list[io.Input]:
    return [
        _float(
            "boundary",
            "Where a Wan 2.2 A14B switches experts, as a share of the noise scale. 0 = official.",
            maximum=1.0,
            step=0.005,
            advanced=True,
        ),
        io.Int.Input(
            "switch_step",
            default=0,
            min=0,
            max=1000,
            tooltip="First step of the low-noise expert, instead of 'boundary'. 0 = by boundary.",
            **bridge.known(io.Int.Input, advanced=True),
        ),
        _float(
            "fps",
            "Frames per second of the VIDEO. 0 = official (16; 24 for TI2V-5B and Animate 2, 30 "
            "for Animate).",
            maximum=120.0,
            step=1.0,
            advanced=True,
        ),
    ]


def _sockets() -> list[io.Input]:
    return [
        io.Conditioning.Input(
            "positive",
            optional=True,
            tooltip="From a CLIP Text Encode with a umT5 (type 'wan'), in place of the prompt.",
        ),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="From a CLIP Text Encode with a umT5, in place of the negative prompt.",
        ),
        io.Image.Input(
            "start_image",
            optional=True,
            tooltip="First frame, for image-to-video, VACE and Fun models and TI2V-5B; resized to "
            "the clip.",
        ),
        io.Image.Input(
            "end_image",
            optional=True,
            tooltip="Last frame, for image-to-video (not TI2V-5B), VACE, Fun InP and 2.2 Fun "
            "models; resized to the clip.",
        ),
    ]


def _float(
    name: str, tooltip: str, *, maximum: float, step: float, advanced: bool = False
) -> io.Input:
    extra = bridge.known(io.Float.Input, advanced=True) if advanced else {}
    return io.Float.Input(
        name, default=0.0, min=0.0, max=maximum, step=step, tooltip=tooltip, **extra
    )
