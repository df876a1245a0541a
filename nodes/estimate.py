"""WanEstimateMemory: what a render will need, said before it starts."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..wan_core.config import GenerationConfig, WanControl
from ..wan_core.job import MAX_LATENT_FRAMES, video_frames
from . import bridge
from .inputs import (
    MOST_FRAMES_IN_WINDOWS,
    Pipeline,
    control_input,
    pipeline_input,
    size_inputs,
)
from .job import use_windows
from .picture import estimate_picture
from .pipeline import WanPipeline, require_pipeline
from .words import in_words_of_the_nodes, said_in_words_of_the_nodes

_MIB_PER_GIB = 1024.0


class WanEstimateMemory(io.ComfyNode):  # type: ignore[misc]
    """Passes the pipeline through and says what a clip of this size needs; reads no weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanEstimateMemory",
            display_name="Wan Estimate Memory",
            category="WanFit",
            description="Says before the run what a clip of this size needs, stage by stage, and "
            "whether it fits. Computed from file headers: takes milliseconds.",
            inputs=[
                pipeline_input(),
                *size_inputs(MOST_FRAMES_IN_WINDOWS),
                *_window_inputs(),
                control_input(),
            ],
            outputs=[
                Pipeline.Output("passed", display_name="pipeline", tooltip="Passed through."),
                io.String.Output("report", display_name="report", tooltip="The table as text."),
                io.Float.Output(
                    "peak_gb",
                    display_name="peak_gb",
                    tooltip="Largest stage on the device, in GiB (2**30 bytes); predicted.",
                ),
                io.Boolean.Output(
                    "fits",
                    display_name="fits",
                    tooltip="Whether the peak fits what is free or what ComfyUI can free.",
                ),
                io.Image.Output(
                    "picture",
                    display_name="picture",
                    tooltip="A bar per stage against the line of what can be used.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        pipeline: WanPipeline,
        width: int,
        height: int,
        num_frames: int,
        window_frames: int,
        window_overlap: int,
        control: WanControl | None = None,
    ) -> io.NodeOutput:
        from ..wan_core.memory import format_estimate

        config = GenerationConfig(
            prompt="", width=width, height=height, num_frames=num_frames, control=control
        )
        if window_frames:
            use_windows(config, window_frames, window_overlap)
        with said_in_words_of_the_nodes():
            wrapper = bridge.wrapper(require_pipeline(pipeline))
            estimate = wrapper.estimate_memory_usage(config)
            fits = wrapper.what_fits(config)
        report = in_words_of_the_nodes(f"{format_estimate(estimate)}\n{fits}")
        peak = estimate.peak_usage_mb / _MIB_PER_GIB
        picture = estimate_picture(estimate)
        shown = ui.PreviewText(report).as_dict() | ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(pipeline, report, peak, bool(estimate.fits), picture, ui=shown)


def _window_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "window_frames",
            default=0,
            min=0,
            max=video_frames(MAX_LATENT_FRAMES),
            tooltip="As in WanChunkedSampler. 0 = the clip in one piece, as WanGenerate does.",
        ),
        io.Int.Input(
            "window_overlap",
            default=16,
            min=-4,
            max=4096,
            step=4,
            tooltip="As in WanChunkedSampler.",
        ),
    ]
