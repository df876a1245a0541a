"""WanFit's library: Wan 2.1/2.2 video on the card you have. Works without ComfyUI.

Importing this package imports neither torch nor diffusers; the names below do so on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import GenerationConfig, MemoryEstimate, VideoGenerationResult, WanLoRA, WanModelFiles
from .errors import WanError

if TYPE_CHECKING:
    from .detect import ArchitectureDetector
    from .generate import WanPipelineWrapper
    from .load import PipelineManager, WanPipelineLoader
    from .plan import OptimizationConfig, OptimizationManager, OptimizationPlan

__version__ = "0.1.0"

_LAZY = {
    "ArchitectureDetector": "detect",
    "OptimizationConfig": "plan",
    "OptimizationManager": "plan",
    "OptimizationPlan": "plan",
    "PipelineManager": "load",
    "WanPipelineLoader": "load",
    "WanPipelineWrapper": "generate",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


__all__ = [
    "ArchitectureDetector",
    "GenerationConfig",
    "MemoryEstimate",
    "OptimizationConfig",
    "OptimizationManager",
    "OptimizationPlan",
    "PipelineManager",
    "VideoGenerationResult",
    "WanError",
    "WanLoRA",
    "WanModelFiles",
    "WanPipelineLoader",
    "WanPipelineWrapper",
    "__version__",
]
