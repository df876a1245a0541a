"""A dry run: the real diffusers modules with fake tensors, counting the bytes that are alive.

It is the oracle of ``test_memory``: nothing is computed and no memory is used, yet every operator
runs, and each storage is counted from its birth until Python drops it. Two things differ between
the CPU the fake tensors claim to be on and a GPU, and are set to the GPU's way: RMSNorm is one
fused kernel there, and the scaled dot product takes the flash kernel (which the fake CPU does
too). Workspaces, allocator rounding and the context are invisible here; ``memory`` adds them.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDING = 512  # the CUDA caching allocator's smallest unit


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages born under it: ``live`` now, ``peak`` at most.

    The meta device stands for the host's memory, which does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.where = ""
        self.births: list[tuple[int, int]] = []
        """The bytes of each storage, and what was alive with it, in the order of their making."""
        self._seen: dict[int, int] = {}

    def know(self, tensor: torch.Tensor) -> None:
        """Mark a tensor as already there, so that views of it are not counted."""
        self._seen.setdefault(tensor.untyped_storage()._cdata, 0)

    def _drop(self, key: int) -> None:
        self.live -= self._seen.pop(key, 0)

    def _register(self, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen or tensor.device.type == "meta":
            return
        nbytes = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self._seen[key] = nbytes
        weakref.finalize(storage, self._drop, key)
        self.live += nbytes
        self.births.append((nbytes, self.live))
        if self.live > self.peak:
            self.peak, self.where = self.live, name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._register(leaf, str(func))
        return out


def _fused_rms_norm(
    module: torch.nn.RMSNorm, hidden: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)


@contextmanager
def _gpu_like() -> Iterator[None]:
    original = torch.nn.RMSNorm.forward
    torch.nn.RMSNorm.forward = _fused_rms_norm  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.RMSNorm.forward = original  # type: ignore[method-assign]


def _fake_weights(module: torch.nn.Module, dtype: torch.dtype, fp32: tuple[str, ...]) -> None:
    # module.to() dies under FakeTensorMode, so each parameter is replaced one by one.
    for owner_name, owner in module.named_modules():
        for name, value in list(owner._parameters.items()):
            if value is None:
                continue
            parts = f"{owner_name}.{name}".split(".")
            kept = any(word in parts for word in fp32)
            fake = torch.empty(value.shape, dtype=torch.float32 if kept else dtype, device="cpu")
            owner._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


class DryModel:
    """A module without memory: build once, run with as many shapes as needed.

    ``build`` makes the module on the meta device; ``keep_fp32`` names the path parts whose
    parameters stay float32 whatever ``dtype`` is.
    """

    def __init__(
        self,
        build: Callable[[], torch.nn.Module],
        dtype: torch.dtype,
        keep_fp32: tuple[str, ...] = (),
    ) -> None:
        with torch.device("meta"):
            self.module = build().eval()
        self.dtype = dtype
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            _fake_weights(self.module, dtype, keep_fp32)
        # Tied parameters were given one fake tensor each; count a name's first owner only.
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.module.parameters())

    def peak(self, run: Callable[[Any], object]) -> int:
        """Return the peak of live bytes, weights excluded, while ``run(module)`` executes."""
        return self.traced(run).peak

    def traced(self, run: Callable[[Any], object]) -> LiveBytes:
        """Return the count of live bytes, weights excluded, while ``run(module)`` executes.

        ``run`` makes its own inputs (they count) and holds what a caller would hold.
        """
        with self._mode, torch.no_grad(), _gpu_like():
            counter = LiveBytes()
            for tensor in (*self.module.parameters(), *self.module.buffers()):
                counter.know(tensor)
            collecting = gc.isenabled()
            gc.disable()
            try:
                with counter:
                    run(self.module)
            finally:
                if collecting:
                    gc.enable()
        return counter
