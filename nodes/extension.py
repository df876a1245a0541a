"""The extension that ComfyUI loads: the list of the pack's nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .control import WanControl
from .estimate import WanEstimateMemory
from .generate import WanChunkedSampler, WanGenerate
from .loader import WanLoader, WanOptimize
from .lora import WanLoRA

__all__ = ["WanFitExtension"]


class WanFitExtension(ComfyExtension):  # type: ignore[misc]
    """Lists the nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes in menu order."""
        return [
            WanLoader, WanOptimize, WanEstimateMemory, WanGenerate, WanChunkedSampler, WanLoRA,
            WanControl,
        ]  # fmt: skip
