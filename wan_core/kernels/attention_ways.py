"""The attention kernels that can be taken here: torch's own, and those of packages if installed.

Each takes query, key and value as (B, heads, n, d) and returns (B, heads, n, d). Nothing is fetched
and nothing of the process is set: torch's kernels are called by themselves, and a package is
imported when a card is first asked. FlashAttention 2, 3 and 4 compute in 16 bit. Our own kernels
(``attention_kernels``, with Triton), SageAttention and comfy-kitchen round query, key and partly
values to 8 bit; on Hopper SageAttention's own choice of kernel gives noise on Wan
(huggingface/diffusers#12783), which the comparison before use finds, so that its kernel with values
in fp16 stands beside it. Those in 8 bit hold copies of what they are given: they take some heads at
a time, so that the copies are small beside the tensors (``CODED_SHARE`` in ``memory``).
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lazy import module_or_none

_log = logging.getLogger(__name__)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
OWN = "torch's choice"


@dataclass(frozen=True, slots=True)
class Way:
    """One kernel."""

    run: Attention
    eight_bit: bool = False
    """Whether it rounds what it multiplies to 8 bit."""
    package: str = ""
    """What it comes from, with its version; "" for torch."""


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, False, 0.0, False, False
    )[0]
    return out


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, False, False
    )[0]
    return out


def _efficient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, False, 0.0, False
    )[0]
    return out


TORCH: dict[str, Way] = {
    OWN: Way(F.scaled_dot_product_attention),
    "cuDNN": Way(_cudnn),
    "flash": Way(_flash),
    "memory-efficient": Way(_efficient),
}


_GROUPS = 10
"""Groups of heads of a package in 8 bit: of its heads it may hold 5.5 tensors in 16 bit (each of
query, key and value once contiguous and once in 8 bit, and the output)."""
_OWN_GROUPS = 4
"""Of ours, which holds keys and values in 8 bit: more would leave multiprocessors idle."""


def _grouped(run: Callable[..., object], groups: int) -> Attention:
    """Have ``run(query, key, value, out)`` compute some heads after the other."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, count, size = query.shape
        out = torch.empty(batch, count, heads, size, dtype=query.dtype, device=query.device)
        out = out.transpose(1, 2)
        each = -(-heads // groups)
        for first in range(0, heads, each):
            run(*(x[:, first : first + each] for x in (query, key, value, out)))
        return out

    return attend


def _package(function: Any) -> Callable[..., object]:
    return lambda query, key, value, out: out.copy_(function(query, key, value))


def _tokens_first(function: Any) -> Attention:
    """Wrap a function of (B, n, heads, d), which may return more than the output."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = function(*(x.transpose(1, 2) for x in (query, key, value)))
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    return run


def _sage(function: Any) -> Attention:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Version 1 takes the keys' mean from the keys it was given, in place; others read them too.
        out: Tensor = function(query, key.clone(), value, tensor_layout="HND", is_causal=False)
        return out

    return _grouped(_package(run), _GROUPS)


def _kitchen(function: Any) -> Attention:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = function(*(x.contiguous() for x in (query, key, value)))
        return out

    return _grouped(_package(run), _GROUPS)


def _own(kernels: Any, halves: bool) -> Attention:
    """Return our kernel; it refuses what it cannot multiply, which the comparison notes."""

    def run(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        capability = torch.cuda.get_device_capability(query.device)
        if query.dtype not in _HALF or query.shape[-1] not in (64, 128):
            raise ValueError(f"{query.dtype}, heads of {query.shape[-1]}: 16 bit, 64 or 128 can be")
        if capability < ((8, 0) if halves else (8, 9)):
            raise ValueError(f"compute capability {capability} does not multiply that")
        kernels.attend_8bit(query, key, value, halves=halves, out=out)

    return _grouped(run, _OWN_GROUPS)


_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class _Package:
    """Where a kernel is found: a module, a function in it, and how it is called."""

    name: str
    module: str
    function: str
    distribution: str
    wrap: Callable[[Any], Attention]
    eight_bit: bool = False
    ready: str = ""
    """A function of the module that says whether this card can run it."""


PACKAGES = (
    _Package(
        "flash-attn 3", "flash_attn_interface", "flash_attn_func", "flash_attn_3", _tokens_first
    ),
    _Package("flash-attn 4", "flash_attn.cute", "flash_attn_func", "flash-attn-4", _tokens_first),
    _Package("flash-attn 2", "flash_attn", "flash_attn_func", "flash-attn", _tokens_first),
    _Package("Sage", "sageattention", "sageattn", "sageattention", _sage, True),
    _Package(
        "Sage, values in fp16", "sageattention", "sageattn_qk_int8_pv_fp16_cuda", "sageattention",
        _sage, True,
    ),
    _Package(
        "comfy-kitchen int8", "comfy_kitchen", "int8_attention", "comfy-kitchen", _kitchen, True,
        "int8_attention_is_available",
    ),
)  # fmt: skip


OWN_8BIT = {"int8, values in fp8": False, "int8, values in fp16": True}
"""Our kernels by name; True is with ``halves``."""


@functools.cache
def attention_kernels() -> Any:
    """Return the module of our Triton kernels, or None where it cannot be imported."""
    without = "Attention in 8 bit is there with SageAttention or comfy-kitchen only"
    return module_or_none(__package__ or "", "attention_kernels", without)


@functools.cache
def ways() -> dict[str, Way]:
    """Return all kernels of this installation by name; what does not load is said once."""
    found = dict(TORCH)
    kernels = attention_kernels()
    if kernels is not None and torch.version.hip is None:
        for name, halves in OWN_8BIT.items():
            found[name] = Way(_own(kernels, halves), eight_bit=True)
    for package in PACKAGES:
        way = _way_of(package)
        if way is not None:
            found[package.name] = way
    return found


def _way_of(package: _Package) -> Way | None:
    try:
        module = importlib.import_module(package.module)
        function = getattr(module, package.function, None)
        if package.ready:
            # Where the question is not known, the package is older than the function.
            function = function if getattr(module, package.ready, lambda: False)() else None
    except ModuleNotFoundError:
        return None
    except Exception as err:  # noqa: BLE001 - built for another torch, driver, card, ...
        _log.info("%s is installed but does not load: %s", package.name, err)
        return None
    if function is None:
        return None
    try:
        found = version(package.distribution)
    except PackageNotFoundError:
        found = "of unknown version"
    return Way(package.wrap(function), package.eight_bit, f"{package.distribution} {found}")
