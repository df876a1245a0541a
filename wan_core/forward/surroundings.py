"""Keeps out what others have set for torch: autocast, default device and dtype, attention kernels.

Inside ``undisturbed`` a computation gives the same bits whatever surrounds it. Nothing of the
process is changed for that: autocast is switched off for this thread, and where a default differs
from torch's own, a function mode of this thread names dtype and device in the calls that leave them
open. Where nothing is set, nothing is done. Callbacks run in the surroundings of the caller, and
whatever they set is looked at afterwards.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, reduce
from types import BuiltinFunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DEVICES = ("cpu", "cuda", "mps", "xpu")


class Surroundings:
    """What the caller has set for torch, kept out of a computation. Made by ``undisturbed``."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._threads, self._thread = torch.get_num_threads(), threading.get_ident()
        self.notes: list[str] = []
        """What a callback has set that cannot be kept out (see ``settings_notes``)."""

    def _keep_out(self) -> None:
        if (note := _precision_note()) and note not in self.notes:
            self.notes.append(note)
        theirs = torch.get_num_threads()
        if theirs != self._threads:
            # How sums are split over threads decides their rounding. The number is this thread's.
            self._stack.callback(torch.set_num_threads, theirs)
            torch.set_num_threads(self._threads)
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                self._stack.enter_context(torch.autocast(device, enabled=False))
        on_cpu = torch.get_default_device().type == "cpu"
        defaults = on_cpu and torch.get_default_dtype() == torch.float32
        if not defaults or not _enabled("flash"):
            self._stack.enter_context(_OwnDefaults())

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Let the caller's settings count inside the ``with`` block: for a callback.

        What it sets stays set, for everybody else: afterwards all is looked at anew. Only whether
        gradients are recorded is put back, as every ``with torch.no_grad()`` does at its end.
        """
        if threading.get_ident() != self._thread:  # what is kept out, is kept out of that thread
            yield
            return
        gradients = torch.is_grad_enabled()
        self._stack.close()
        try:
            yield
        finally:
            self._keep_out()
            if torch.is_grad_enabled() != gradients:
                torch.set_grad_enabled(gradients)


@contextmanager
def undisturbed() -> Iterator[Surroundings]:
    """Compute inside the ``with`` block as torch does before anything is set."""
    surroundings = Surroundings()
    surroundings._keep_out()
    try:
        yield surroundings
    finally:
        surroundings._stack.close()


def settings_notes(device: str) -> list[str]:
    """Say what another program has set for all of torch that cannot be kept out.

    ``device`` is the type of the device that computes. Empty where all is as torch has it.
    """
    notes = []
    attend = torch.nn.functional.scaled_dot_product_attention
    if not isinstance(attend, BuiltinFunctionType):
        notes.append(
            f"Torch's attention was replaced in this process by {_name_of(attend)}; results may "
            "differ from those of torch's own. Start without the program that does so."
        )
    off = [name for name in _KERNELS if not _enabled(name)]
    if off and device != "cpu":
        notes.append(
            f"Torch's attention is told not to use {', '.join(off)} (torch.backends.cuda, set by "
            "another program in this process): another kernel computes it, and rounds otherwise."
        )
    precision = _precision_note()
    return notes if precision is None else [*notes, precision]


def _precision_note() -> str | None:
    precision = _matmul_precision() or ", ".join(
        f"{name} {value}" for name, value in _told(_PRECISIONS).items() if "matmul" in name
    )
    if precision == "highest":
        return None
    return (
        f"Products of float32 numbers may be rounded more ({precision!r}, set by another program "
        "in this process with torch.set_float32_matmul_precision, allow_tf32 or fp32_precision)."
    )


def _matmul_precision() -> str | None:
    """Return torch's word for all backends; None where they were set one by one: it raises then."""
    with suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    return None


_FLAGS = (
    "cuda.matmul.allow_fp16_accumulation", "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction", "cudnn.enabled", "cudnn.allow_tf32",
    "cudnn.deterministic", "mkldnn.enabled",
)  # fmt: skip
"""Of torch.backends: what decides how products and convolutions round. cuDNN's benchmark does not
belong to them: by it each process would choose by a clock of its own."""
_PRECISIONS = tuple(
    f"{place}.fp32_precision"
    for place in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv",
                  "mkldnn.rnn")
)  # fmt: skip
"""Of torch.backends from 2.9 on: how each rounds float32. Where these were set, torch raises when
it is asked for the older names of the same."""


def _told(names: Sequence[str]) -> dict[str, Any]:
    """Return what torch.backends says of these, but for what this torch has not or cannot tell."""
    found = {}
    for name in names:
        with suppress(AttributeError, RuntimeError):
            found[name] = operator.attrgetter(name)(torch.backends)
    return found


def torch_settings() -> dict[str, Any]:
    """Return what is set for all of torch in this process and changes bits, as plain values.

    A process that computes for this one sets the same (``take_settings``); what ``undisturbed``
    keeps out is left out. A flag that this torch does not have, or cannot tell, is too.
    """
    cuda: Any = torch.backends.cuda
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    return {
        "flags": _told(_FLAGS), "precisions": _told(_PRECISIONS),
        "attention": {name: _enabled(name) for name in (*_KERNELS, "cudnn")},
        "reduced": cuda.fp16_bf16_reduction_math_sdp_allowed(),
        "deterministic": [torch.are_deterministic_algorithms_enabled(), only_warn],
        "precision": _matmul_precision(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def take_settings(settings: Mapping[str, Any]) -> None:
    """Set what ``torch_settings`` of another process returned, for all of this process.

    For a worker: it has no caller whose settings they would change.
    """
    if settings["precision"] is not None:
        torch.set_float32_matmul_precision(settings["precision"])
    for name, value in (settings["flags"] | settings["precisions"]).items():
        place, _, flag = name.rpartition(".")
        setattr(operator.attrgetter(place)(torch.backends), flag, value)
    cuda: Any = torch.backends.cuda
    for name, on in settings["attention"].items():
        getattr(cuda, f"enable_{name}_sdp")(on)
    cuda.allow_fp16_bf16_reduction_math_sdp(settings["reduced"])
    always, only_warn = settings["deterministic"]
    torch.use_deterministic_algorithms(always, warn_only=only_warn)
    torch.set_num_threads(settings["threads"])


_KERNELS = ("flash", "mem_efficient", "math")


def _enabled(kernel: str) -> bool:
    return bool(getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")())


def _name_of(function: Any) -> str:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"{module}.{name}" if name else repr(function)


class _OwnDefaults(TorchFunctionMode):
    """Names float32 and the CPU wherever torch would take them from the defaults.

    Three kinds of calls do: those that make floats, those that make what their values are, and
    those that make floats of whole numbers. Attention on the CPU is given to the kernel that torch
    takes unless it was told not to.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attend(func, *args, **kwargs)
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


def _attend(
    func: Callable[..., Any], query: Any, key: Any, value: Any, attn_mask: Any = None,
    dropout_p: float = 0.0, is_causal: bool = False, **more: Any,
) -> Any:  # fmt: skip
    """Call scaled dot product attention; on the CPU with the kernel that is torch's own choice.

    Torch chooses it for four-dimensional tensors of equal dtype and batch without gradients
    (``use_flash_attention_cpp`` in its source); for others it asks nobody.
    """
    tensors = (query, key, value)
    if (
        not _enabled("flash")
        and not dropout_p
        and not more.get("enable_gqa")
        and all(t.device.type == "cpu" and t.dim() == 4 and t.numel() for t in tensors)
        and all(t.stride(-1) == 1 and t.dtype == query.dtype for t in tensors)
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[3] == key.shape[3] == value.shape[3]
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and _is_mask(attn_mask, query, key)
    ):
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            added = torch.zeros(attn_mask.shape, dtype=query.dtype, device="cpu")
            attn_mask = added.masked_fill_(attn_mask.logical_not(), float("-inf"))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        scale = more.get("scale")
        return flash(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return func(query, key, value, attn_mask, dropout_p, is_causal, **more)


def _is_mask(mask: Any, query: Any, key: Any) -> bool:
    """Whether the kernel takes this mask: None, or one that covers (B, heads, queries, keys)."""
    if mask is None:
        return True
    full = (*query.shape[:3], key.shape[2])
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    fits = mask.dim() in (2, 4) and all(size in (1, wanted) for size, wanted in sizes)
    return fits and not mask.requires_grad


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
