"""Which attention kernel is the fastest here, by the clock; it may round differently.

torch's own choice is an order of preference, made once for all cards and shapes; beside it stand
the kernels of ``attention_ways``, each called by itself. For each device, dtype and shape every
kernel runs a few times on the tensors themselves; one whose result is not that of torch's choice,
up to rounding (in 16 bit, or where that is allowed in 8), is left out. Times are kept on the
machine, so that a later process need only compare the winner's result once more. Processes that
compute a clip together take what one of them has chosen (``chosen_together``).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import is_oom
from ..memory import AttentionTimes
from .attention_ways import OWN, OWN_8BIT, Way, ways
from .trials import chosen_together

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_GAIN = 1.03
"""How many times faster than torch's choice another kernel must be to be taken."""
_AGREES = 1e-2
"""Relative difference from torch's choice that rounding in 16 bit can explain."""
_NEAR = 8e-2
"""And rounding in 8 bit: comfy-kitchen's has 1.7e-2 on an H100; noise has about 1.4."""
_WAIT_CYCLES = 20_000_000
"""Of the device's clock: about 10 ms, many times what starting a call takes."""
_COMPARED = 256
"""Queries at the beginning and at the end whose results are compared."""


class Key(NamedTuple):
    """What a choice is made for."""

    device: torch.device
    dtype: torch.dtype
    query: tuple[int, ...]
    """(B, n, heads, d)."""
    key: tuple[int, ...]
    eight_bit: bool


_chosen: dict[Key, str] = {}
_used: dict[str, int] = {}
"""Kernels that were used since ``used_attention`` was asked, with the products of the largest."""


def attend(query: Tensor, key: Tensor, value: Tensor, eight_bit: bool = False) -> Tensor:
    """Attend on the fastest kernel; all are (B, n, heads, d), heads and d as in Wan's blocks.

    ``eight_bit`` allows kernels that round to 8 bit.
    """
    states = query, key, value
    name = chosen_for(query, key, eight_bit)
    _used[name] = max(_used.get(name, 0), query.shape[1] * key.shape[1])
    out = ways()[name].run(*(x.transpose(1, 2) for x in states))
    return out.transpose(1, 2)


def used_attention() -> str:
    """Return the kernel that computed the largest attention since this was asked, or ""."""
    name = max(_used, key=lambda one: _used[one], default="")
    _used.clear()
    return name


def chosen_for(query: Tensor, key: Tensor, eight_bit: bool = False) -> str:
    """Return the name of the fastest kernel for such tensors, timed when first asked for."""
    if not query.is_cuda:
        return OWN
    found = Key(query.device, query.dtype, tuple(query.shape), tuple(key.shape), eight_bit)

    def choose() -> str:
        with _lock:
            if found not in _chosen:
                _chosen[found] = _known(found, query, key) or _fastest(found, query, key)
            return _chosen[found]

    def able(name: str) -> bool:
        with _lock:
            return _chosen.get(found) == name or _right(name, found, query, key)

    return chosen_together(f"attention of {_shape(found)}", choose, able, OWN)


def _candidates(eight_bit: bool) -> dict[str, Way]:
    return {name: way for name, way in ways().items() if eight_bit or not way.eight_bit}


def _machine(device: torch.device) -> tuple[str, str]:
    """Return the key that times are kept under, and what else they depend on."""
    backend = "cuda" if torch.version.hip is None else "rocm"
    name = f"{torch.cuda.get_device_name(device)}, {backend}, torch {torch.__version__}"
    packages = sorted({way.package for way in ways().values() if way.package})
    # Triton may come later, and our kernels with it: times without them would never let them begin.
    own = sorted(OWN_8BIT.keys() & ways().keys())
    return name, ", ".join([f"cuDNN {_cudnn_version()}", *packages, *own])


def _cudnn_version() -> int:
    found: Any = torch.backends.cudnn
    return int(found.version() or 0)


def _shape(found: Key) -> str:
    batch, queries, heads, size = found.query
    width = "8 or 16 bit" if found.eight_bit else str(found.dtype).removeprefix("torch.")
    return f"{batch} x {queries} x {found.key[1]} tokens, {heads} heads of {size}, {width}"


def _known(found: Key, query: Tensor, key: Tensor) -> str | None:
    """Return the kernel that won on this machine before, if its result is still right."""
    times = AttentionTimes().of(*_machine(found.device)).get(_shape(found))
    best = None if times is None else _best(times)
    if best is None or not _right(best, found, query, key):
        return None
    _log.info("Attention %s: %s is used, the fastest when it was timed.", _shape(found), best)
    return best


def _right(name: str, found: Key, query: Tensor, key: Tensor) -> bool:
    """Say whether a kernel that was chosen before, or elsewhere, gives the right result here."""
    candidates = _candidates(found.eight_bit)
    if name not in candidates or name == OWN:
        return name == OWN
    way, states = candidates[name], _states(query, key)
    try:
        error = _error(_sample(way, states), _sample(candidates[OWN], states))
    except Exception as err:  # noqa: BLE001 - another driver, package or card than where it ran
        _log.info("%s attention does not run here: %s", name, err)
        return False
    return error < _allowed(way)


def _fastest(found: Key, query: Tensor, key: Tensor) -> str:
    """Time every kernel on the tensors themselves; the key stands for the value too.

    Of results a few queries are kept: beside all of a block's tensors there may be no room for
    another whole one.
    """
    candidates, states = _candidates(found.eight_bit), _states(query, key)
    times: dict[str, float] = {}
    lacked: list[str] = []
    expected = _sample(candidates[OWN], states)
    for name, way in candidates.items():
        try:
            error = 0.0 if name == OWN else _error(_sample(way, states), expected)
            agrees = error < _allowed(way)
            taken = milliseconds(partial(way.run, *states), 2) if agrees else 0.0
        except Exception as err:  # noqa: BLE001 - a kernel that this card or build does not have
            _log.debug("%s attention does not run here: %s", name, err)
            lacked += [name] * is_oom(err)
            continue
        if agrees:
            times[name] = taken
        else:
            _log.info("%s attention is not used: it differs from torch's by %.1e.", name, error)
    best = _best(times)
    shown = ", ".join(f"{name} {value:.1f} ms" for name, value in times.items())
    _log.info("Attention %s: %s; %s is used.", _shape(found), shown, best)
    if lacked:  # it says nothing of the kernel: the next process times all of them again
        _log.warning("There was too little memory to time attention by %s.", " and ".join(lacked))
    elif query.is_cuda:
        AttentionTimes().keep(*_machine(found.device), _shape(found), times)
    return best


def _best(times: Mapping[str, float]) -> str:
    best = min(times, key=lambda name: times[name], default=OWN)
    return OWN if times.get(best, 0.0) * _GAIN > times.get(OWN, 0.0) else best


def _states(query: Tensor, key: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in (query, key, key)]


def _sample(way: Way, states: list[Tensor]) -> Tensor:
    """Return the results of the first and the last queries; all are computed."""
    out = way.run(*states)
    return torch.cat([out[:, :, :_COMPARED], out[:, :, -_COMPARED:]], dim=2)


def _error(out: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a head: noise in one of many is found."""
    wide = expected.float()
    errors = (out.float() - wide).norm(dim=(-2, -1)) / wide.norm(dim=(-2, -1))
    return float(errors.max())


def _allowed(way: Way) -> float:
    return _NEAR if way.eight_bit else _AGREES


def milliseconds(call: Callable[[], object], runs: int) -> float:
    """Return the shortest of some times that the current CUDA device works on a call.

    The device waits until the call's kernels are there, as it does in a forward, where they are
    started far ahead. Else a call of many short kernels would be timed by the processor that starts
    them, which is slow while another thread reads the next expert's file.
    """
    event: Any = torch.cuda.Event
    wait: Any = getattr(torch.cuda, "_sleep", None)
    times = []
    for _ in range(runs):
        if wait is not None:
            wait(_WAIT_CYCLES)
        begun, ended = event(enable_timing=True), event(enable_timing=True)
        begun.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(float(begun.elapsed_time(ended)))
    return min(times)


_CUDNN, _PREFERS = 3, {(9, 0), (10, 0)}
"""torch's number for cuDNN's attention, and the capabilities on which torch takes it if it can."""
_SINCE = 91500
"""The cuDNN that it must be newer than (torch's sdp_utils.cpp)."""


def slid_from_cudnn(device: torch.device) -> str | None:
    """Say that torch does not take cuDNN's attention on a card where it should, and why, or None.

    There it is 1.7 to 2.3 times as fast as flash 2 (huggingface/transformers#48163; 37 ms against
    59 for 32 760 tokens and 40 heads on an H100).
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    if torch.cuda.get_device_capability(device) not in _PREFERS:
        return None
    try:
        tokens = torch.zeros(1, 8, 512, 128, dtype=torch.bfloat16, device=device)
        if torch._fused_sdp_choice(tokens, tokens, tokens) == _CUDNN:
            return None
    except Exception as err:  # noqa: BLE001 - torch's own, and a full card: no reason to fail
        _log.info("Which attention torch takes could not be asked: %s", err)
        return None
    found = _cudnn_version()
    why = "torch says not why"
    if os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":
        why = "TORCH_CUDNN_SDPA_DEPRIORITIZED is set; unset it"
    elif found <= _SINCE:
        why = (
            f"the cuDNN that was loaded is {found}, and torch asks for more than {_SINCE}; install "
            "torch 2.11 or later, and see that LD_LIBRARY_PATH names no older cuDNN"
        )
    return (
        "Attention does not run on cuDNN's kernel, which takes about half the time on this card: "
        f"{why}. Speed fast takes the fastest kernel by the clock."
    )
