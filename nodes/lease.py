"""How long weights live: as long as a WAN_PIPELINE that uses their files.

ComfyUI's output cache holds the WAN_PIPELINE. When the cache drops it (another model was chosen,
/free asked for memory, RAM ran short), its lease is finalised, and wan_core's component cache lets
go of the weights that no other lease uses: their memory is free, and the last large files stay
mapped, so that a prompt that asks for them again need not read them. Does not import ComfyUI.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..wan_core.config import WanLoRA, WanModelFiles
    from ..wan_core.files import FileIdentity
    from ..wan_core.models import ModelArchitecture
    from ..wan_core.render import WanPipelineWrapper

_leases: weakref.WeakValueDictionary[Any, WeightsLease] = weakref.WeakValueDictionary()
_lock = threading.RLock()
_leased: dict[int, frozenset[str]] = {}
"""The files of every lease that lives. Finalizers change it, each in one step and without a lock:
they run wherever garbage is collected, and must not wait for a thread that waits for theirs."""
_numbers = itertools.count()


class WeightsLease:
    """Keeps one model's weights in the component cache, with one wrapper per set of options."""

    def __init__(
        self,
        source: Path | WanModelFiles,
        files: frozenset[str],
        known: Mapping[Path, FileIdentity],
    ) -> None:
        self.files = files
        """Paths of the weight files (absolute, links resolved), as the component cache has them."""
        self._source = source
        self._known = known
        self._wrappers: dict[tuple[Any, ...], WanPipelineWrapper] = {}
        number = next(_numbers)
        _leased[number] = files
        weakref.finalize(self, _drop_unleased, number)

    def wrapper(
        self,
        optimization_config: dict[str, Any],
        loras: tuple[WanLoRA, ...] = (),
        use_recipe: bool = False,
    ) -> WanPipelineWrapper:
        """Return wan_core's pipeline for these options; weights are loaded when it generates.

        Raises ModelMismatch if a file was replaced since the lease was made: the WAN_PIPELINE that
        holds it describes another model.
        """
        from ..wan_core.job import check_files
        from ..wan_core.preferences import read_preferences
        from ..wan_core.render import WanPipelineLoader

        check_files(self._known)
        preferences = read_preferences()
        key = (tuple(sorted(optimization_config.items())), loras, use_recipe, preferences)
        with _lock:
            if key not in self._wrappers:
                self._wrappers[key] = WanPipelineLoader(preferences=preferences).load_wan_pipeline(
                    self._source,
                    optimization_config=optimization_config,
                    loras=loras,
                    use_recipe=use_recipe,
                )
            return self._wrappers[key]


def lease_for(architecture: ModelArchitecture, source: WanModelFiles | None = None) -> WeightsLease:
    """Return the lease on the files of ``architecture`` that exists already, or a new one.

    ``source`` names the files if they do not lie in one folder.
    """
    from ..wan_core.job import files_of

    known = files_of(architecture)
    files = frozenset(identity.path for identity in known.values())
    # The files alone are no key: two experts with their roles swapped are the same set of files,
    # and so is a file of another model that has taken the name of an older one.
    key = (source or architecture.root, frozenset(known.values()))
    with _lock:
        lease = _leases.get(key)
        if lease is None:
            lease = _leases[key] = WeightsLease(source or architecture.root, files, known)
        return lease


def loaded_bytes(
    files: frozenset[str],
    device: torch.device | None = None,
    counted: frozenset[str] = frozenset(),
) -> int:
    """Return the bytes of weights of ``files`` in memory: on ``device``, or on all if None.

    Those of files that are ``counted`` elsewhere are left out.
    """
    from ..wan_core.loading import component_cache

    return sum(
        tensor.numel() * tensor.element_size()
        for key, module in component_cache().loaded()
        if any(identity.path in files for identity in key.files) and hasattr(module, "parameters")
        if not any(identity.path in counted for identity in key.files)
        for tensor in module.parameters()
        if device is None or tensor.device == device
    )


def unload(files: frozenset[str], device: torch.device, nbytes: int | None = None) -> int:
    """Free the memory that weights of ``files`` hold on ``device``; return the bytes.

    Weights on a GPU are moved to host memory, of ``nbytes`` no more than about so many, as far as
    they are not in use. On the CPU the components are dropped. No garbage is collected: ComfyUI
    calls this from a loop over its list of models, from which finalizers of its models take.
    """
    from ..wan_core.loading import component_cache

    if device.type == "cpu":
        before = loaded_bytes(files)
        component_cache().drop(files, collect=False)
        return before - loaded_bytes(files)
    return component_cache().release_device(nbytes, files)


def _drop_unleased(number: int) -> None:
    """Free the memory of weights that no lease uses now that this one is gone."""
    from ..wan_core.loading import component_cache

    files = _leased.pop(number)
    component_cache().let_go_soon(files.difference(*list(_leased.values())))
