"""The old place of ``wan_core.render``'s loaders, kept for one release."""

from .render import PipelineManager, WanPipelineLoader

__all__ = ["PipelineManager", "WanPipelineLoader"]
