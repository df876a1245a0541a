"""Products in 8 bit of weights that are stored in 8 bit: their bytes as they are, no copy in 16.

The weight's numbers are exactly the file's; only the activations are rounded, each token by its own
scale (its largest magnitude over the largest number of the format). fp8 goes through
``torch._scaled_mm`` (compute capability 8.9 on), int8 through ``torch._int_mm`` (7.5 on), rotated
int8 with activations rotated by the same matrix. Layers that read the same tokens (q, k and v)
share what was rounded and rotated once; see :class:`Shared`.

Computed so are the linear layers of a block that read all tokens: q, k, v and output of self
attention, q and output of cross attention, and the feed-forward; not the keys and values of the
text, which are few, and nothing of the first and the last block. What a LoRA adds to such a layer
is computed in 16 bit, from tokens that were not rounded (:class:`Addition`).

A kind is used where a trial on the device agrees with the weights taken apart and is faster than
they are; else the layer computes in 16 bit, as always. Processes that compute a clip together go by
one clock, and by the trials of all (``chosen_together``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading import StoredWeight, rotation, stored_weight
from ..memory import MATRIX_UNITS
from .attention import milliseconds
from .codes import Codes
from .fused import triton_kernels
from .trials import Trials, chosen_together

_log = logging.getLogger(__name__)
_AT_ONCE = 4096
"""Tokens whose int32 sums are held at once."""
_ROWS = 8192
"""Tokens whose widest activations are held at once: the feed-forward's in 16 and 8 bit, and those
of layers with a LoRA in 8 bit beside 16. More fill no card better."""
_FEWEST = 32
"""Tokens that ``torch._int_mm`` is given at least; it takes no fewer than 17."""
_TIMED = _ROWS
"""Tokens that are timed: with 2048, starting the kernels takes a large card half of the time."""
_CHECKED, _ODD, _FEW = 1024, 1021, 3
"""Tokens whose results are compared: the second is a prime, as divisors must not matter."""
_ALIGNED = 16
"""What cuBLAS wants of an fp8 product's scales and bias: addresses that are multiples of so many
bytes, else it refuses (CUDA 13 on an H200). Spans begin at multiples of so many tokens."""
_FUSED = 1000
"""Tokens from which an fp8 product gets the bias, else it is added after rounding: of fewer than 20
cuBLAS refused some shapes with a bias."""
_CODED, _PLAIN = "8 bit", "16 bit"
_GAIN = 1.05
"""How many times faster than 16 bit a product must be to be used."""
_AGREES = 1e-2
"""Relative error that rounding the results to 16 bit may have in a trial."""
_trials = Trials("products in 8 bit")
_asked: dict[str, bool] = {}
"""Kinds of layers that were asked for since ``used_products`` was, and whether in 8 bit."""


class Addition:
    """A layer's forward hook that changes the output by what it makes of the input, token by token.

    A layer with such hooks, and no others, may be multiplied in 8 bit: they are called with the
    input in 16 bit.
    """

    def __init__(self, hook: Callable[[Any, tuple[Any, ...], Any], Any]) -> None:
        self._hook = hook

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._hook(layer, args, output)


@dataclass(frozen=True, slots=True)
class EightBitProduct:
    """A linear layer's product in 8 bit; see :func:`product_for`."""

    weight: StoredWeight
    bias: Tensor | None
    dtype: torch.dtype
    layer: Any = None
    additions: tuple[Addition, ...] = ()
    """What is added to the output, called as hooks of ``layer``."""

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Apply the layer to ``x`` (..., in) or to its GELU, and add what is to be added.

        With a GELU ``x`` may be overwritten.
        """
        if not self.additions:
            return self.multiply(self.quantized(x, gelu))
        if gelu:
            torch.ops.aten.gelu_(x, approximate="tanh")
        out = self.multiply(self.quantized(x))
        for addition in self.additions:
            changed = addition(self.layer, (x,), out)
            out = out if changed is None else changed
        return out

    @property
    def kind(self) -> torch.dtype:
        """The dtype of the numbers that are multiplied."""
        return torch.float8_e4m3fn if self.weight.stored.kind == "fp8" else torch.int8

    def quantized(self, x: Tensor, gelu: bool = False) -> Codes:
        """Return ``x`` (..., in), or its GELU (tanh form), in 8 bit.

        With a GELU and a rotation ``x`` is overwritten.
        """
        rows, group = x.reshape(-1, x.shape[-1]), self.weight.stored.group
        if group:
            if gelu:
                torch.ops.aten.gelu_(rows, approximate="tanh")
            turned = rotation(group).to(rows)
            rows = (rows.view(-1, group) @ turned).view(rows.shape)
            gelu = False
        numbers, scales = triton_kernels().quantize_rows(rows, self.kind, gelu)
        return Codes(numbers, scales, tuple(x.shape[:-1]))

    def multiply(self, codes: Codes) -> Tensor:
        """Return the product (..., out) with what ``quantized`` returned, and the bias."""
        product = _fp8_product if self.weight.stored.kind == "fp8" else _int8_product
        bias = None if self.bias is None else self.bias.to(self.dtype)
        out = product(codes.numbers, codes.scales, self.weight, bias, self.dtype)
        return out.view(*codes.shape, -1)


Products = tuple[EightBitProduct, ...]


class Shared:
    """Linear layers that read the same tokens: rounded once for all of them, or left in 16 bit.

    Every layer computes in 8 bit (``products``), or none does. The tokens are held in one form
    only, and let go when the ``last`` layer has read them.
    """

    def __init__(self, layers: Sequence[Any], products: Products | None = None) -> None:
        self._layers, self._products = tuple(layers), products
        self._added = any(one.additions for one in products or ())
        self._held: list[Tensor | Codes] = []

    @property
    def kind(self) -> torch.dtype | None:
        """The dtype that the tokens may come in; None if they are to come in 16 bit."""
        if self._products is None or self._added or self._products[0].weight.stored.group:
            return None
        return self._products[0].kind

    def read(self, tokens: Tensor | Codes) -> None:
        """Take the tokens, (..., in) or in 8 bit of this ``kind``."""
        if isinstance(tokens, Tensor) and self._products is not None and not self._added:
            tokens = self._products[0].quantized(tokens)
        self._held = [tokens]

    def project(self, index: int = 0, *, last: bool = False) -> Tensor:
        """Return the output (..., out) of one of the layers."""
        tokens = self._held.pop() if last else self._held[0]
        if self._products is None:
            out: Tensor = self._layers[index](tokens)
            return out
        product = self._products[index]
        return product.multiply(tokens) if isinstance(tokens, Codes) else _by_rows(product, tokens)

    def feed(self, second: EightBitProduct) -> Tensor:
        """Return ``second`` of the GELU of the only layer's output, for some tokens at a time."""
        assert self._products is not None
        first, tokens = self._products[0], self._held.pop()
        if isinstance(tokens, Tensor):
            rows = tokens.reshape(-1, tokens.shape[-1])
            return _spanned(lambda at: second(first(rows[at]), True), rows, tokens.shape[:-1])
        numbers, scales, shape = tokens

        def some(at: slice) -> Tensor:
            part = Codes(numbers[at], scales[at], (len(numbers[at]),))
            return second(first.multiply(part), True)

        return _spanned(some, numbers, shape)


def _by_rows(product: EightBitProduct, tokens: Tensor) -> Tensor:
    """Apply a product with additions: in 16 bit the tokens are there already."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    return _spanned(lambda at: product(rows[at]), rows, tokens.shape[:-1])


def _spanned(make: Callable[[slice], Tensor], rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Return what ``make`` makes of spans of ``rows``, as (*shape, width)."""
    out: Tensor | None = None
    count = len(rows)
    # Spans of about one size: all of them fill the card.
    each = -(-count // max(1, -(-count // _ROWS)))
    each += -each % _ALIGNED
    for begin in range(0, max(count, 1), max(each, 1)):
        part = make(slice(begin, begin + each))
        if len(part) == count:
            return part.view(*shape, -1)
        out = part.new_empty(count, part.shape[-1]) if out is None else out
        out[begin : begin + each] = part
    assert out is not None
    return out.view(*shape, -1)


def products_of(layers: Sequence[Any], dtype: torch.dtype) -> Products | None:
    """Return the products of layers in 8 bit, or None if any of them computes in 16 bit."""
    found = [product_for(layer, dtype) for layer in layers]
    products = tuple(one for one in found if one is not None)
    return products if len(products) == len(found) else None


def shared_by(layers: Sequence[Any], dtype: torch.dtype, eight_bit: bool) -> Shared:
    """Return layers that read the same tokens, in 8 bit where asked for and all can be so."""
    products = products_of(layers, dtype) if eight_bit else None
    if products is not None:
        forms = {(one.kind, one.weight.stored.group) for one in products}
        products = products if len(forms) == 1 else None
    return Shared(layers, products)


def used_products() -> tuple[int, int]:
    """Return how many kinds of layers were multiplied in 8 bit since this was asked, of how many.

    A kind is what a layer is stored as, and its shape; only those count that 8 bit was wanted for.
    """
    found = sum(_asked.values()), len(_asked)
    _asked.clear()
    return found


def product_for(layer: Any, dtype: torch.dtype) -> EightBitProduct | None:
    """Return the 8-bit product of a layer, or None where it is to compute in 16 bit."""
    product, stored = _product_for(layer, dtype), getattr(layer, "stored", None)
    kind = "plain" if stored is None else f"{stored.title} {stored.shape}"
    _asked[kind] = _asked.get(kind, False) or product is not None
    return product


def _product_for(layer: Any, dtype: torch.dtype) -> EightBitProduct | None:
    if _hooked(layer) or dtype not in (torch.bfloat16, torch.float16):
        return None
    weight = stored_weight(layer)
    if weight is None or not weight.bits.is_cuda or triton_kernels() is None:
        return None
    stored = weight.stored
    if stored.kind not in MATRIX_UNITS or stored.dtype not in ("F8_E4M3", "I8"):
        return None
    if stored.full_precision or any(size % 16 for size in stored.shape):
        return None
    product = EightBitProduct(
        weight, layer.bias, dtype, layer, tuple(layer._forward_hooks.values())
    )
    kind = (dtype, stored.kind, stored.per, stored.group, stored.shape)
    words = "product of {1} by {2}, groups of {3}, {4}, in {0}".format(*kind)
    tried = partial(_tried, product, layer, dtype, (weight.bits.device, *kind))
    name = chosen_together(
        words,
        lambda: _CODED if tried(_pays) else _PLAIN,
        lambda name: name == _PLAIN or tried(_right),
        _PLAIN,
    )
    return product if name == _CODED else None


def _tried(
    product: EightBitProduct, layer: Any, dtype: torch.dtype, key: tuple[Hashable, ...],
    attempt: Callable[[EightBitProduct, Any, torch.dtype], bool],
) -> bool:  # fmt: skip
    """Return what a trial of this kind of product has shown on its device; False: it has no such
    units."""
    stored, device = product.weight.stored, product.weight.bits.device
    if torch.cuda.get_device_capability(device) < MATRIX_UNITS[stored.kind]:
        return False
    return _trials.of((attempt, *key), partial(attempt, product, layer, dtype))


def _hooked(layer: nn.Module) -> bool:
    """Say whether a hook acts on a layer that does more than add: then it must be called."""
    if any(not isinstance(hook, Addition) for hook in layer._forward_hooks.values()):
        return True
    hooked = layer._forward_pre_hooks or "forward" in vars(layer)
    return bool(hooked) or hasattr(layer, "_hf_hook")


def _fp8_product(
    codes: Tensor, scales: Tensor, weight: StoredWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    matrix = weight.bits.view(torch.float8_e4m3fn).t()
    if _scales_rows(codes.device):
        fused = bias if bias is not None and len(codes) >= _FUSED else None
        done: Tensor = torch._scaled_mm(
            codes, matrix, scale_a=_aligned(scales), scale_b=_aligned(_each(weight)).view(1, -1),
            bias=None if fused is None else _aligned(fused), out_dtype=dtype, use_fast_accum=True,
        )  # fmt: skip
        return done if bias is None or fused is not None else done.add_(bias)
    one = torch.ones((), device=codes.device)
    out: Tensor = torch._scaled_mm(
        codes, matrix, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    # Row by row: the product with scales in float32 is as large again as four results.
    result = out if dtype == out.dtype else torch.empty_like(out, dtype=dtype)
    for begin in range(0, len(out), _AT_ONCE):
        span = slice(begin, begin + _AT_ONCE)
        wide = (out[span] * scales[span]).mul_(_each(weight))
        result[span] = wide if bias is None else wide.add_(bias)
    return result


def _aligned(x: Tensor) -> Tensor:
    return x.clone() if x.data_ptr() % _ALIGNED else x


def _scales_rows(device: torch.device) -> bool:
    """Say whether products may take a scale for each row.

    On Ada cards (8.9) torch before 2.12 starts such a product outside the current stream
    (pytorch/pytorch#177651), which would read weights that are still on their way.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return torch.cuda.get_device_capability(device) != (8, 9) or version >= (2, 12)


def _int8_product(
    codes: Tensor, scales: Tensor, weight: StoredWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    matrix, each = weight.bits.view(torch.int8).t(), _each(weight)
    count = len(codes)
    if count < _FEWEST:
        codes, scales = (F.pad(x, (0, 0, 0, _FEWEST - count)) for x in (codes, scales))
    out = torch.empty(len(codes), matrix.shape[1], dtype=dtype, device=codes.device)
    for begin in range(0, len(codes), _AT_ONCE):
        # The last span reaches back: torch multiplies no fewer than 17 rows.
        span = slice(max(0, min(begin, len(codes) - _AT_ONCE)), begin + _AT_ONCE)
        sums = torch._int_mm(codes[span], matrix)
        triton_kernels().scale_rows(sums, scales[span], each, bias, out[span])
    return out[:count]


def _each(weight: StoredWeight) -> Tensor:
    """Return a scale for each row of the weight, float32 (rows,)."""
    if weight.scales.each is not None:
        return weight.scales.each
    return torch.full((len(weight.bits),), weight.scales.whole, device=weight.bits.device)


def _pays(product: EightBitProduct, layer: Any, dtype: torch.dtype) -> bool:
    """Try a product on random tokens: right, and faster than 16 bit. Nothing is added to it."""
    product = EightBitProduct(product.weight, product.bias, dtype)
    stored = product.weight.stored
    error = _error(product, layer, dtype)
    ours, theirs = _times(product, layer, dtype)
    used = error < _AGREES and ours * _GAIN < theirs
    _log.info(
        "%s %s: 8 bit %.2f ms, 16 bit %.2f ms, error %.1e; %s bit is used.",
        stored.title, stored.shape, ours, theirs, error, 8 if used else 16,
    )  # fmt: skip
    return used


def _right(product: EightBitProduct, layer: Any, dtype: torch.dtype) -> bool:
    """Try a product that another process has found to pay."""
    product = EightBitProduct(product.weight, product.bias, dtype)
    return _error(product, layer, dtype) < _AGREES


def _tokens(product: EightBitProduct, dtype: torch.dtype, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_CHECKED, product.weight.stored.shape[1], generator=generator)
    x = x.to(product.weight.bits.device, dtype)
    return x.repeat(-(-count // _CHECKED), 1)[:count]


def _error(product: EightBitProduct, layer: Any, dtype: torch.dtype) -> float:
    """Return the largest relative error of three numbers of tokens."""
    x, group = _tokens(product, dtype, _CHECKED), product.weight.stored.group
    codes = product.quantized(x)
    seen = codes.numbers.float() * codes.scales
    if group:
        seen = (seen.view(-1, group) @ rotation(group).to(seen)).view(seen.shape)
    expected = F.linear(seen.to(dtype), layer.dequantized(dtype), layer.bias).float()
    errors = [0.0]
    for count in (_CHECKED, _ODD, _FEW):
        wanted, found = expected[:count], product(x[:count]).float()
        errors.append(float((found - wanted).norm() / wanted.norm()))
    return max(errors)


def _times(product: EightBitProduct, layer: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Return milliseconds in 8 and in 16 bit, of as many tokens as are held at once."""
    x = _tokens(product, dtype, _TIMED)
    for call in (product, layer.forward):
        call(x)  # the first time does not count
    ours, theirs = (milliseconds(partial(call, x), 4) for call in (product, layer.forward))
    return ours, theirs
