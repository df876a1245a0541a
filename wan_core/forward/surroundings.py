"""Keeps out what the caller has set for torch: autocast, the default device, the default dtype.

Inside ``undisturbed`` a computation gives the same bits whatever surrounds it. Nothing of the
process is changed for that: autocast is switched off for this thread, and where a default differs
from torch's own, a function mode of this thread names dtype and device in the calls that leave them
open. Where nothing is set, nothing is done.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, reduce
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute inside the ``with`` block as torch does before anything is set."""
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        on_cpu = torch.get_default_device().type == "cpu"
        if not on_cpu or torch.get_default_dtype() != torch.float32:
            stack.enter_context(_OwnDefaults())
        yield


class _OwnDefaults(TorchFunctionMode):
    """Names float32 and the CPU wherever torch would take them from the defaults.

    Three kinds of calls do: those that make floats, those that make what their values are, and
    those that make floats of whole numbers.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("out") is None:
            if func in _makers("device") and kwargs.get("device") is None and not _on_device(args):
                kwargs["device"] = "cpu"
            if kwargs.get("dtype") is None:
                dtype = _dtype_of(func, args, kwargs)
                if dtype is not None:
                    kwargs["dtype"] = dtype
        return self._of_whole_numbers(func, args, kwargs)

    def _of_whole_numbers(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call ``func``; a quotient or root of integers is computed in float32."""
        result = func(*args, **kwargs)
        default = torch.get_default_dtype()
        if default == torch.float32 or getattr(result, "dtype", None) != default:
            return result
        if func in _casts() or kwargs.get("dtype") is not None:
            return result
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        whole = [t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool]
        if not whole or len(whole) != len(tensors):
            return result

        def cast(value: Any) -> Any:
            return value.to(torch.float32) if isinstance(value, torch.Tensor) else value

        return func(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})


def _dtype_of(func: Callable[..., Any], args: Any, kwargs: Any) -> torch.dtype | None:
    """Return the dtype that the call would have had without a default, or None to leave it."""
    if func in _makers("float"):
        return torch.float32
    if func in _makers("value"):
        values = [*args, *(kwargs[name] for name in _VALUES if name in kwargs)]
        if func is not torch.arange:  # of the others only the first argument, or the fill value
            values = values[1:2] if func is torch.full else values[:1]
        found = [dtype for value in values for dtype in _dtypes(value)]
        if found.count(None):  # a Python float
            return reduce(torch.promote_types, [dtype or torch.float32 for dtype in found])
    return None


_VALUES = ("data", "fill_value", "start", "end", "step", "s", "obj")


def _dtypes(value: Any) -> Iterator[torch.dtype | None]:
    """Yield the dtype of every value in nested sequences; None stands for a Python float."""
    if isinstance(value, torch.Tensor):
        yield value.dtype
    elif hasattr(value, "dtype"):  # numpy's
        yield torch.as_tensor(value).dtype
    elif isinstance(value, float):
        yield None
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from _dtypes(item)
    else:
        yield torch.bool  # promotes to whatever it stands beside


def _on_device(args: Any) -> bool:
    """Whether the first argument is a tensor, whose device is then kept (``torch.as_tensor``)."""
    return bool(args) and isinstance(args[0], torch.Tensor)


_FLOAT = (
    "empty", "empty_strided", "empty_permuted", "ones", "zeros", "rand", "randn", "linspace",
    "logspace", "eye", "bartlett_window", "blackman_window", "hamming_window", "hann_window",
    "kaiser_window", "fft.fftfreq", "fft.rfftfreq",
)  # fmt: skip
_VALUE = ("tensor", "as_tensor", "asarray", "scalar_tensor", "full", "arange", "range")
_WHOLE = ("randint", "randperm", "tril_indices", "triu_indices")


@cache
def _makers(kind: str) -> frozenset[Callable[..., Any]]:
    """Return torch's functions that make a tensor: of "float", by "value", or with a "device"."""
    names = {"float": _FLOAT, "value": _VALUE, "device": (*_FLOAT, *_VALUE, *_WHOLE)}[kind]
    return frozenset(operator.attrgetter(name)(torch) for name in names)


@cache
def _casts() -> frozenset[Callable[..., Any]]:
    """Return the methods whose result has the dtype that they name."""
    names = ("to", "type", "float", "double", "half", "bfloat16", "type_as", "view")
    return frozenset(getattr(torch.Tensor, name) for name in names)
