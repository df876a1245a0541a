"""``TracedMemory``: the bytes of all tensor storages alive at once, as an allocator would count."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class TracedMemory(TorchDispatchMode):
    """Context manager that follows every storage made inside it; exact, and for any device.

    ``peak_bytes`` is the most that was alive at once, ``live_bytes`` what is alive now, ``ops``
    the number of operators seen. Storages made before it began (weights, inputs) are not
    counted. It acts on the thread it is entered in, and not below one operator (workspaces).
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.ops = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {_key(leaf) for leaf in tree_iter((args, kwargs)) if _tracked(leaf)}
        result = func(*args, **kwargs)
        self.ops += 1
        for leaf in tree_iter(result):
            if _tracked(leaf) and _key(leaf) not in given:
                self._add(leaf.untyped_storage())
        return result

    def reset_peak(self) -> None:
        """Measure the peak anew from what is alive now."""
        self.peak_bytes = self.live_bytes

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._remove, key).atexit = False

    def _remove(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


def _tracked(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
