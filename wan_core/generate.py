"""The old place of ``wan_core.render``'s wrapper, kept for one release."""

from .render import WanPipelineWrapper

__all__ = ["WanPipelineWrapper"]
