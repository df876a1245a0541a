"""WanFit's library: Wan 2.1/2.2 video on the card you have. Works without ComfyUI.

Importing this package imports neither torch nor diffusers. The names that need them import them on
first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import (
    GenerationConfig,
    MemoryEstimate,
    VideoGenerationResult,
    WanControl,
    WanLoRA,
    WanModelFiles,
)
from .errors import WanError
from .lazy import lazy_names

if TYPE_CHECKING:
    from .detect import ArchitectureDetector
    from .placing import OptimizationManager
    from .plan import OptimizationConfig, OptimizationPlan
    from .render import PipelineManager, WanPipelineLoader, WanPipelineWrapper

__version__ = "0.1.0"

__getattr__ = lazy_names(
    __name__,
    {
        "detect": ("ArchitectureDetector",),
        "placing": ("OptimizationManager",),
        "plan": ("OptimizationConfig", "OptimizationPlan"),
        "render": ("PipelineManager", "WanPipelineLoader", "WanPipelineWrapper"),
    },
)

__all__ = [
    "ArchitectureDetector",
    "GenerationConfig",
    "MemoryEstimate",
    "OptimizationConfig",
    "OptimizationManager",
    "OptimizationPlan",
    "PipelineManager",
    "VideoGenerationResult",
    "WanControl",
    "WanError",
    "WanLoRA",
    "WanModelFiles",
    "WanPipelineLoader",
    "WanPipelineWrapper",
    "__version__",
]
