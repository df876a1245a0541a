"""WanGenerate and WanChunkedSampler: a pipeline and a prompt in, a video out."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..wan_core.config import RESUME, GenerationConfig, VideoGenerationResult
from ..wan_core.job import FUSIONS, MAX_LATENT_FRAMES, MODES, NOISES, SCHEDULES, video_frames
from ..wan_core.preferences import read_preferences
from . import bridge
from .inputs import (
    MOST_FRAMES_IN_WINDOWS,
    control_input,
    devices_input,
    pipeline_input,
    sampling_inputs,
    video_inputs,
)
from .job import LONG_CLIP, device_options, generation_config, use_long_clip, use_windows
from .pipeline import WanPipeline, require_pipeline
from .progress import Progress
from .session import SESSION
from .words import in_words_of_the_nodes, said_in_words_of_the_nodes

_HIDDEN = [io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id]


def _image_output() -> io.Output:
    return io.Image.Output("images", display_name="images", tooltip="The frames.")


def _video_output() -> io.Output:
    return io.Video.Output(
        "video",
        display_name="video",
        tooltip="The clip as an mp4 in ComfyUI's temp folder; Save Video keeps it.",
    )


def _latent_output() -> io.Output:
    return io.Latent.Output(
        "latent", display_name="latent", tooltip="The clip before decoding, for VAE Decode."
    )


def _report_output() -> io.Output:
    return io.String.Output(
        "report", display_name="report", tooltip="What was done: settings, times and memory."
    )


class WanGenerate(io.ComfyNode):  # type: ignore[misc]
    """Makes a clip whose frames are all denoised together."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanGenerate",
            display_name="Wan Generate",
            category="WanFit",
            description="Text or image to video with any Wan model: both experts, guidance and "
            "decoding in one node. Values left at 0 are the model's official ones.",
            inputs=[
                pipeline_input(),
                *sampling_inputs(),
                *video_inputs(),
                control_input(),
                devices_input(),
            ],
            outputs=[_image_output(), _video_output(), _latent_output(), _report_output()],
            hidden=_HIDDEN,
        )

    @classmethod
    def execute(cls, pipeline: WanPipeline, **values: Any) -> io.NodeOutput:
        on = require_pipeline(pipeline).optimized(**device_options(values))
        config = generation_config(values)
        config.resume = "auto"
        result, report = _run(on, config, cls.hidden)
        video = bridge.video_from_file(result.output_path)
        latent = {"samples": result.vae_latents}
        return io.NodeOutput(result.frames, video, latent, report, ui=_shown(result, report))


class WanChunkedSampler(io.ComfyNode):  # type: ignore[misc]
    """Makes a clip longer than the model sees at once, in overlapping windows or in segments."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanChunkedSampler",
            display_name="Wan Chunked Sampler",
            category="WanFit",
            description="Long clips: every step is taken in overlapping windows of frames whose "
            "results are blended, so memory depends on the window and not on the clip.",
            inputs=[
                pipeline_input(),
                *sampling_inputs(MOST_FRAMES_IN_WINDOWS),
                *_window_inputs(),
                *_blend_inputs(),
                *video_inputs(),
                control_input(),
                devices_input(),
            ],
            outputs=[_latent_output(), _image_output(), _video_output(), _report_output()],
            hidden=_HIDDEN,
        )

    @classmethod
    def execute(
        cls, pipeline: WanPipeline, window_frames: int, window_overlap: int, **values: Any
    ) -> io.NodeOutput:
        values = {**LONG_CLIP, **values}
        pipeline = require_pipeline(pipeline)
        config = generation_config(values)
        use_windows(config, window_frames, window_overlap)
        use_long_clip(config, values, pipeline.vae)
        on = pipeline.optimized(**device_options(values))
        result, report = _run(on, config, cls.hidden)
        video = bridge.video_from_file(result.output_path)
        frames = result.frames if result.frames is not None else bridge.no_picture()
        latent = {"samples": result.vae_latents}
        return io.NodeOutput(latent, frames, video, report, ui=_shown(result, report))


def _window_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "window_frames",
            default=81,
            min=5,
            max=video_frames(MAX_LATENT_FRAMES),
            step=4,
            tooltip="Frames the model sees at once. 81 is what Wan was trained on; fewer need "
            "less memory. A window as long as the clip gives what WanGenerate gives.",
        ),
        io.Int.Input(
            "window_overlap",
            default=16,
            min=-4,
            max=4096,
            step=4,
            tooltip="Frames that neighbouring windows share and blend. More: smoother, slower. "
            "-4: 16, or more where that costs several cards no time.",
        ),
        *_long_clip_inputs(),
    ]


def _long_clip_inputs() -> list[io.Input]:
    hidden = bridge.known(io.Combo.Input, advanced=True)
    return [
        io.Combo.Input(
            "schedule",
            optional=True,
            options=list(SCHEDULES),
            default=SCHEDULES[0],
            tooltip="static: the same windows every step. uniform: seams move from step to step. "
            "looped: the end flows into the beginning.",
        ),
        io.Combo.Input(
            "mode",
            optional=True,
            options=list(MODES),
            default=MODES[0],
            tooltip="windows: all windows together, step by step. continuation: one segment after "
            "the other, each begun with the last latents before it (image-to-video, TI2V-5B).",
        ),
        io.Combo.Input(
            "resume",
            optional=True,
            options=list(RESUME),
            default="auto",
            tooltip="auto: a render that was cut off goes on when the same prompt is queued again. "
            "must: only go on. never: start anew. Finished renders leave nothing behind.",
        ),
        io.Boolean.Input(
            "return_images",
            default=True,
            optional=True,
            tooltip="Off: no IMAGE output. 1,000 frames of it are gigabytes; VIDEO is a file.",
        ),
        io.Combo.Input(
            "noise",
            optional=True,
            options=list(NOISES),
            default=NOISES[0],
            tooltip="clip: as WanGenerate. frame: a longer clip keeps its beginning. freenoise: "
            "later windows get the first one's noise, shuffled.",
            **hidden,
        ),
        io.Boolean.Input(
            "anchor",
            default=False,
            optional=True,
            tooltip="Show later windows the frame before them as well.",
            **bridge.known(io.Boolean.Input, advanced=True),
        ),
        io.String.Input(
            "prompts",
            multiline=True,
            default="",
            optional=True,
            tooltip="Instead of 'prompt': a line 'frames: text' for each part of the clip.",
            **bridge.known(io.String.Input, advanced=True),
        ),
        io.Latent.Input(
            "continue_from",
            optional=True,
            tooltip="Latents of an earlier clip to go on from, with mode 'continuation'. "
            "num_frames counts them.",
        ),
    ]


def _blend_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "fusion",
            optional=True,
            options=list(FUSIONS),
            default=FUSIONS[0],
            tooltip="How windows blend where they overlap. ramp: evenly from one to the next. "
            "pyramid: by the distance to a window's edge. flat: all alike. causal: a frame is what "
            "the first window makes of it, and the next goes on from there; keeps things in place.",
            **bridge.known(io.Combo.Input, advanced=True),
        ),
        io.Float.Input(
            "drift_correction",
            default=0.0,
            optional=True,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="With mode 'continuation': how far the colours of later segments are moved to "
            "those of the first.",
            **bridge.known(io.Float.Input, advanced=True),
        ),
    ]


def _shown(result: VideoGenerationResult, report: str) -> dict[str, Any]:
    """Return what the node shows when it has run: the report, and where the page finds the clip."""
    shown: dict[str, Any] = ui.PreviewText(report).as_dict()
    if result.output_path is not None:
        shown["wanfit_clip"] = [bridge.as_shown(result.output_path)]
    return shown


def _keep_journal(config: GenerationConfig) -> None:
    """Have the render keep its journal in ComfyUI's output folder, unless the user prefers none."""
    if config.resume != "must" and read_preferences().journal is False:
        config.resume = None
    if config.resume is not None:
        config.journal_folder = bridge.journal_folder()


def _run(
    pipeline: WanPipeline, config: GenerationConfig, hidden: Any
) -> tuple[VideoGenerationResult, str]:
    """Generate with ComfyUI's memory management, progress, previews, interrupt and metadata."""
    from ..wan_core.errors import is_oom
    from ..wan_core.render import format_report

    config.interrupt_check = bridge.check_interrupt
    config.output_path = bridge.temp_video_path(config.width, config.height)
    config.output_metadata = bridge.workflow_metadata(hidden)
    _keep_journal(config)
    with said_in_words_of_the_nodes():
        wrapper = bridge.wrapper(pipeline)
        # Before other nodes' models are moved off the card: a mistake must not cost them that.
        wrapper.check(config)
        with bridge.room_for(pipeline, wrapper.estimate_memory_usage(config)):
            # ComfyUI has freed what it can by now; what it still holds is not free for the plan.
            wrapper.evictable_bytes = 0
            request, plan = wrapper.plan(config)
            show = bridge.progress_bar(pipeline)
            node = getattr(hidden, "unique_id", None)
            watch = bridge.watch(pipeline, request, plan, node)
            Progress(request, plan, config, show, watch).listen()
            with SESSION.render(node, request, plan, pipeline.architecture) as ended:
                result = wrapper.generate(config)
                ended(result, result.output_path and bridge.as_shown(result.output_path))
        if is_oom(result.error):
            bridge.after_out_of_memory()
        result.raise_for_error()
    result.warnings = [in_words_of_the_nodes(text) for text in result.warnings]
    return result, format_report(result)
