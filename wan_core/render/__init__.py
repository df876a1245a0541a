"""Carries out a generation, from a model's path to an mp4: the public API of this library.

In: a model path and a ``GenerationConfig``. Out: a ``VideoGenerationResult``. Here are the stages
of a render, recovery when memory runs out, video and sound files and the report. Imports all other
packages. Names are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .diffusers_pipeline import PipelineManager
    from .loader import WanPipelineLoader
    from .pipeline import WanPipelineWrapper
    from .report import Forecast, Timeline, format_report
    from .video import contact_sheet, read_audio, read_numbers, read_pictures, read_video

__getattr__ = lazy_names(
    __name__,
    {
        "diffusers_pipeline": ("PipelineManager",),
        "loader": ("WanPipelineLoader",),
        "pipeline": ("WanPipelineWrapper",),
        "report": ("Forecast", "Timeline", "format_report"),
        "video": (
            "contact_sheet",
            "read_audio",
            "read_numbers",
            "read_pictures",
            "read_video",
        ),
    },
)

__all__ = [
    "Forecast",
    "PipelineManager",
    "Timeline",
    "WanPipelineLoader",
    "WanPipelineWrapper",
    "contact_sheet",
    "format_report",
    "read_audio",
    "read_numbers",
    "read_pictures",
    "read_video",
]
