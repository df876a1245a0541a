"""How long weights live: as long as a WAN_PIPELINE of their files does.

ComfyUI's output cache holds the WAN_PIPELINE. When it drops it (another model was chosen, /free
asked for memory, RAM ran short), the lease dies and wan_core's cache lets go of the weights that
no other living lease uses. No ComfyUI here.
"""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..wan_core.config import WanLoRA, WanModelFiles
    from ..wan_core.models import ModelArchitecture
    from ..wan_core.render import WanPipelineWrapper

_leases: weakref.WeakValueDictionary[Any, WeightsLease] = weakref.WeakValueDictionary()
_lock = threading.RLock()  # a lease may die, and its finaliser run, while this thread holds it


class WeightsLease:
    """Keeps the weights of one model loadable and loaded: one wrapper per set of options."""

    def __init__(self, source: Path | WanModelFiles, files: frozenset[str]) -> None:
        self.files = files
        """The weight files (absolute, links resolved): how the component cache knows them."""
        self.patcher: Any = None
        """What stands for these weights in ComfyUI's model management, once they were used."""
        self._source = source
        self._wrappers: dict[tuple[Any, ...], WanPipelineWrapper] = {}
        weakref.finalize(self, _drop_unleased, files)

    def wrapper(
        self,
        optimization_config: dict[str, Any],
        loras: tuple[WanLoRA, ...] = (),
        use_recipe: bool = False,
    ) -> WanPipelineWrapper:
        """Return wan_core's pipeline for these options; nothing is loaded before it is used."""
        from ..wan_core.render import WanPipelineLoader

        key = (tuple(sorted(optimization_config.items())), loras, use_recipe)
        with _lock:
            if key not in self._wrappers:
                self._wrappers[key] = WanPipelineLoader().load_wan_pipeline(
                    self._source,
                    optimization_config=optimization_config,
                    loras=loras,
                    use_recipe=use_recipe,
                )
            return self._wrappers[key]


def lease_for(architecture: ModelArchitecture, source: WanModelFiles | None = None) -> WeightsLease:
    """Return the living lease on the files of ``architecture``, or a new one.

    ``source`` names the files where they do not lie in one folder.
    """
    files = frozenset(
        str(path.resolve()) for part in architecture.components.values() for path in part.files
    )
    # Not by the files alone: two experts with their roles swapped are the same files.
    key = (source or architecture.root, files)
    with _lock:
        lease = _leases.get(key)
        if lease is None:
            lease = _leases[key] = WeightsLease(source or architecture.root, files)
        return lease


def loaded_bytes(files: frozenset[str], device: torch.device | None = None) -> int:
    """Return the bytes of weights of ``files`` that are loaded, on ``device`` or anywhere."""
    from ..wan_core.loading import component_cache

    return sum(
        tensor.numel() * tensor.element_size()
        for key, module in component_cache().loaded()
        if any(identity.path in files for identity in key.files) and hasattr(module, "parameters")
        for tensor in module.parameters()
        if device is None or tensor.device == device
    )


def unload(files: frozenset[str], device: torch.device) -> None:
    """Take weights off ``device``: to the CPU's memory, or, where that is the device, away."""
    from ..wan_core.loading import component_cache

    if device.type == "cpu":
        component_cache().drop(set(files))
    else:
        component_cache().release_device()


def _drop_unleased(files: frozenset[str]) -> None:
    from ..wan_core.loading import component_cache

    with _lock:
        still_leased: set[str] = set().union(*(lease.files for lease in _leases.values()))
    component_cache().drop(set(files) - still_leased)
