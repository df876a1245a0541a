"""Layers whose weights stay as their file stores them and are taken apart at each use.

The numbers are those of ``dequantize``, the same as loading the layer dequantised would have
given. The bytes travel as they are: through RAM, page-locked slabs, the bus and device memory.
"""

from __future__ import annotations

import functools
import logging
import math
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ..errors import is_host_oom, is_oom
from ..formats import Storage
from ..lazy import module_or_none
from .dequantize import Scales, dequantize, numbers_that_may_be_wild
from .mapped import InFile, MappedFile, Watch, stored_at
from .moving import each_sent

_FP8_NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
_AT_ONCE, _AT_ONCE_THERE = 2**20, 2**24
"""Numbers that are rounded to fp8 at once, on the host and on a device, in memory that is used
again: new memory for each would have to be mapped, which takes longer than the arithmetic."""
_ROOM = 2**30
"""Bytes that must be free on a card for weights to be rounded there: 256 MiB that are on their way,
a matrix of 0.4 GB at most with its fp8, and what is rounded at once in fp32."""
_SMALLEST = {
    "Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q4_K": 144, "Q5_K": 176,
    "Q6_K": 210,
}  # fmt: skip
"""Bytes of a block, of the GGUF types that have a kernel."""
_log = logging.getLogger(__name__)
_tried: dict[tuple[object, ...], bool] = {}
"""Which kernels gave the reference's numbers, by kind, device and dtype."""


class _Stored:
    """The bytes of one weight, shared by the layers below.

    ``weight`` holds them as int8 (rows, bytes of a row): ``module.to(dtype)`` leaves integers
    alone, and code that asks for the weight's dtype before it casts its input (umT5, Wan's time
    embedder) knows int8 as "quantised". Scales of rows or blocks are a second parameter, for the
    same reason as bits, so that they move and stream with the weight; one number stays a number.
    """

    weight: Any
    weight_scales: nn.Parameter | None
    stored: Storage
    whole_scale: float

    def set_stored(self, values: Tensor, scales: Scales, stored: Storage) -> None:
        """Take the bytes of a weight, (rows, bytes of a row), and its scales."""
        self.stored, self.whole_scale = stored, scales.whole
        bits = values if stored.kind == "float" else values.view(torch.int8)
        self.weight = nn.Parameter(bits, requires_grad=False)
        self.weight_scales = None
        if scales.each is not None:
            self.weight_scales = nn.Parameter(scales.each.view(torch.int8), requires_grad=False)

    def dequantized(self, dtype: torch.dtype, rows: Tensor | slice | None = None) -> Tensor:
        """Return the weight in ``dtype``, or only some of its rows (a slice, or their numbers)."""
        bits, scales = self.weight.data, self._scales()
        if rows is not None:
            bits, scales = bits[rows], scales.of_rows(rows)
        if self.stored.kind == "float":
            cast: Tensor = bits.to(dtype)
            return cast
        if bits.is_cuda and _kernel_works(self.stored, bits.device, dtype):
            fast: Tensor = _kernels().run(bits, scales, self.stored, dtype)
            return fast
        return dequantize(bits, scales, self.stored, dtype)

    def _scales(self) -> Scales:
        if self.weight_scales is None:
            return Scales(None, self.whole_scale)
        bits = self.weight_scales.data
        kind = torch.uint8 if self.stored.per == "block" else torch.float32
        return Scales(bits.view(kind), self.whole_scale)


@functools.cache
def _kernels() -> Any:
    """Return the module of Triton kernels, or None where it cannot be imported."""
    without = "Quantised weights are taken apart without Triton, more slowly"
    return module_or_none(__package__ or "", "dequantize_kernels", without)


def _kernel_works(stored: Storage, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a kernel gives the reference's numbers on this device; tried once a kind."""
    kernels = _kernels()
    if kernels is None or not kernels.has_kernel(stored):
        return False
    kind = (stored.kind, stored.dtype, stored.per, stored.group)
    key = (*kind, device, dtype)
    if key not in _tried:
        _tried[key] = _agrees(kernels, stored, device, dtype)
        if not _tried[key]:
            _log.warning(
                "%s is taken apart without Triton: its kernel failed a test.", stored.title
            )
    return _tried[key]


def _agrees(kernels: Any, stored: Storage, device: torch.device, dtype: torch.dtype) -> bool:
    """Compare a kernel with the reference code on some random bytes."""
    rows, width = 64, 2 * max(stored.group, _SMALLEST.get(stored.dtype, 256))
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=generator)
    # NaN and infinity do not equal themselves; no file that was loaded holds them.
    for values in numbers_that_may_be_wild(bits, replace(stored, shape=(rows, width))):
        if not bool(torch.isfinite(values.float()).all()):
            bits &= 0x3F
    bits = bits.to(device).view(torch.int8)
    each: Tensor | None = None
    if stored.per == "row":
        each = torch.rand(rows, generator=generator).to(device)
    elif stored.per == "block":  # exponents and e4m3 numbers that are neither NaN nor huge
        blocks = width // (8 if stored.kind == "nvfp4" else 32)
        each = torch.randint(60, 120, (rows, blocks), dtype=torch.uint8).to(device)
    scales = Scales(each, 1.0 if stored.per == "row" else 0.37)
    expected = dequantize(bits, scales, stored, dtype)
    try:
        found = kernels.run(bits, scales, stored, dtype)
    except Exception as err:  # noqa: BLE001 - compiling needs a C compiler, a known card, ...
        _log.info("A Triton kernel did not run: %s", err)
        return False
    return torch.equal(found, expected)


class StoredLinear(_Stored, nn.Linear):
    """A linear layer whose weight stays as it is stored until the moment of the product."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        with torch.device("meta"):
            super().__init__(in_features, out_features, bias=bias)
        self.weight_scales: nn.Parameter | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``input`` (..., in_features), in the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.dequantized(input.dtype), bias)

    def extra_repr(self) -> str:
        """Name how the weight is stored beside the sizes."""
        return f"{super().extra_repr()}, {self.stored.title}"


class StoredEmbedding(_Stored, nn.Embedding):
    """A table of which only the rows that are looked up are taken apart, in ``computed``."""

    def __init__(self, rows: int, width: int, computed: torch.dtype) -> None:
        with torch.device("meta"):
            super().__init__(rows, width)
        self.weight_scales: nn.Parameter | None = None
        self.computed = computed

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of ``input`` (any shape of numbers), (..., width)."""
        found = self.dequantized(self.computed, input.reshape(-1))
        return found.view(*input.shape, self.embedding_dim)


class StoredWeight(NamedTuple):
    """The bytes of one stored weight, what they are multiplied with, and what they are."""

    bits: Tensor
    scales: Scales
    stored: Storage


def stored_weight(layer: Any) -> StoredWeight | None:
    """Return what a linear layer stores, or None if its weight is plain numbers."""
    if not isinstance(layer, StoredLinear):
        return None
    return StoredWeight(layer.weight.data, layer._scales(), layer.stored)


def replace_layer(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where ``root`` has the layer called ``name`` (dotted)."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)


def layer_of_fp8(layer: nn.Linear, values: Tensor, scale: float) -> StoredLinear:
    """Return ``layer`` with fp8 ``values`` (out, in), to be multiplied with ``scale``.

    Its bias is taken over. This changes the result: it is for files that are not quantised, where
    nothing else fits.
    """
    made = StoredLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    how = Storage("fp8", _FP8_NAMES[values.dtype], tuple(values.shape), per="tensor")
    made.set_stored(values, Scales(None, scale), how)
    made.bias = layer.bias
    return made.train(layer.training)


def rounded_to_fp8(
    weight: Tensor, stored: torch.dtype = torch.float8_e4m3fn,
    check: Callable[[], object] = lambda: None,
) -> tuple[Tensor, float]:  # fmt: skip
    """Return a finite weight in fp8, on its device, and the scale to multiply it with.

    It is divided by that scale, its largest magnitude over the largest value of the format, and
    rounded to the nearest, ties to even: what is halfway between two is stored the same everywhere.
    ``check`` is called for every part of it, and may raise.
    """
    largest = torch.finfo(stored).max
    least, most = torch.aminmax(weight)
    # On the host: a device divides by a number of the host by multiplying with its inverse.
    scale = torch.maximum(-least, most).cpu().float().clamp(min=1e-30) / largest
    divisor = scale.to(weight.device)
    values = torch.empty(weight.shape, dtype=stored, device=weight.device)
    at_once = _AT_ONCE if weight.device.type == "cpu" else _AT_ONCE_THERE
    parts, targets = (torch.split(t.reshape(-1), at_once) for t in (weight, values))
    wide = torch.empty(len(parts[0]), dtype=torch.float32, device=weight.device)
    for target, part in zip(targets, parts, strict=True):
        check()
        # No quotient is so far beyond the largest that it would not be rounded to it.
        target.copy_(wide[: len(part)].copy_(part).div_(divisor))
    return values, float(scale)


class Rounding:
    """Weights of mapped files that are rounded to fp8 on a card, and come back to the host.

    That takes as long as sending them does. The bits are those of the host.
    """

    def __init__(
        self, device: torch.device, watch: Watch, store: Callable[[str, Tensor, float], object]
    ) -> None:
        """``store`` is called with the name of a weight, its fp8 numbers and their scale."""
        self._device, self._watch, self._store = device, watch, store
        self._waiting: dict[str, Tensor] = {}

    def has_room(self) -> bool:
        """Say whether the card has the memory."""
        idle = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + idle >= _ROOM

    def add(self, name: str, weight: Tensor) -> None:
        """Have a weight rounded by ``run``; nobody need have looked at it."""
        self._waiting[name] = weight

    def run(self) -> dict[str, Tensor]:
        """Round all; return those for which the card had no memory after all.

        Raises CorruptFile for what cannot be read or is not finite.
        """
        waiting = list(self._waiting.items())

        def use(index: int, there: Tensor) -> None:
            name, weight = waiting[index]
            values, scale = rounded_to_fp8(there)
            file, stored = _home_of(weight)
            if not math.isfinite(scale):  # the largest magnitude is, where one number is
                raise stored.wrong("wild")
            self._store(name, values.cpu(), scale)
            file.unseen.discard(stored.span.start)
            del self._waiting[name]

        try:
            if waiting:
                each_sent([weight for _, weight in waiting], self._device, use, self._watch)
        except Exception as err:
            if not is_oom(err) or is_host_oom(err):
                raise
            traceback.clear_frames(err.__traceback__)
        return self._waiting


def _home_of(weight: Tensor) -> tuple[MappedFile, InFile]:
    home = stored_at(weight)
    assert home is not None
    return home
