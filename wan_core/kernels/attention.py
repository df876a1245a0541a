"""Which attention kernel of torch is the fastest here, by the clock; it may round differently.

torch's own choice is an order of preference, made once for all cards and shapes; beside it stand
cuDNN's, flash and memory-efficient attention, each called by itself, so that no setting of the
process is touched. For each device, dtype and shape every kernel runs a few times on random numbers
of the true size; one whose result is not that of torch's choice, up to rounding, is left out.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_GAIN = 1.03
"""How many times faster than torch's choice another kernel must be to be taken."""
_AGREES = 1e-2
"""Relative difference from torch's choice that rounding in 16 bit can explain."""
_COMPARED = 512
"""Queries whose results are compared."""
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Key = tuple[torch.device, torch.dtype, tuple[int, ...], tuple[int, ...]]


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


OWN = "torch's choice"
CANDIDATES: dict[str, Attention] = {
    OWN: F.scaled_dot_product_attention,
    "cuDNN": _cudnn,
    "flash": _flash,
    "memory-efficient": _efficient,
}
_chosen: dict[Key, str] = {}


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend on the fastest kernel; all are (B, n, heads, d), heads and d as in Wan's blocks."""
    states = query, key, value
    name = chosen_for(query, key)
    out = CANDIDATES[name](*(x.transpose(1, 2) for x in states))
    return out.transpose(1, 2)


def chosen_for(query: Tensor, key: Tensor) -> str:
    """Return the name of the fastest kernel for such tensors, timed when first asked for."""
    if not query.is_cuda:
        return OWN
    found = (query.device, query.dtype, tuple(query.shape), tuple(key.shape))
    with _lock:
        if found not in _chosen:
            _chosen[found] = _fastest(query, key)
        return _chosen[found]


def _fastest(query: Tensor, key: Tensor) -> str:
    """Time every kernel on the tensors themselves; the key stands for the value too.

    Results are compared for some queries only: beside all of a block's tensors there may be no room
    for another result.
    """
    states = [x.transpose(1, 2) for x in (query, key, key)]
    few = [states[0][:, :, :_COMPARED], *states[1:]]
    times: dict[str, float] = {}
    expected = CANDIDATES[OWN](*few)
    for name, attention in CANDIDATES.items():
        try:
            agrees = name == OWN or _agree(attention(*few), expected)
            taken = milliseconds(partial(attention, *states), 2) if agrees else 0.0
        except Exception as err:  # noqa: BLE001 - a kernel that this card or build does not have
            _log.debug("%s attention does not run here: %s", name, err)
            continue
        if agrees:
            times[name] = taken
        else:
            _log.info("%s attention is not used: other results than torch's choice.", name)
    best = min(times, key=lambda name: times[name], default=OWN)
    if times.get(best, 0.0) * _GAIN > times.get(OWN, 0.0):
        best = OWN
    shown = ", ".join(f"{name} {value:.1f} ms" for name, value in times.items())
    sizes = list(query.shape), list(key.shape)
    _log.info("Attention %s x %s: %s; %s is used.", *sizes, shown, best)
    return best


def _agree(out: Tensor, expected: Tensor) -> bool:
    """Compare each head by itself: noise in one of many is found."""
    wide = expected.float()
    errors = (out.float() - wide).norm(dim=(-2, -1)) / wide.norm(dim=(-2, -1))
    return bool((errors < _AGREES).all())


def milliseconds(call: Callable[[], object], runs: int) -> float:
    """Return the shortest of some times of a call on the current CUDA device."""
    event: Any = torch.cuda.Event
    times = []
    for _ in range(runs):
        begun, ended = event(enable_timing=True), event(enable_timing=True)
        begun.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(float(begun.elapsed_time(ended)))
    return min(times)
