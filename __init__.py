"""WanFit for ComfyUI: loads and runs any Wan 2.1 / 2.2 checkpoint on the machine at hand.

Nothing is imported here: ComfyUI calls :func:`comfy_entrypoint` when it wants the nodes.
``NODE_CLASS_MAPPINGS`` must stay absent, ComfyUI would then ignore the entry point.
"""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> Any:
    """Return the extension that lists the nodes (called once by ComfyUI, V3 node API)."""
    from .nodes.extension import WanFitExtension

    return WanFitExtension()
