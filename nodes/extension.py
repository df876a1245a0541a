"""The extension that ComfyUI loads: the list of the pack's nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import bridge
from .control import WanControl
from .estimate import WanEstimateMemory
from .generate import WanChunkedSampler, WanGenerate
from .loader import WanLoader, WanOptimize
from .lora import WanLoRA

__all__ = ["WanFitExtension"]


class WanFitExtension(ComfyExtension):  # type: ignore[misc]
    """Lists the nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes in menu order, and add the route that the page asks."""
        bridge.add_route()  # here, because on_load is not called by 0.3.64
        return [
            WanLoader, WanOptimize, WanEstimateMemory, WanGenerate, WanChunkedSampler, WanLoRA,
            WanControl,
        ]  # fmt: skip
