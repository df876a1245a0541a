"""Hooks that add what LoRAs change to the outputs of a transformer's layers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelMismatch
from ..files import quoted
from ..kernels import Addition, TimestepRuns
from ..loading import Undo
from .delta import Delta, plus, plus_product
from .layers import Convolution, layer_of
from .magnitude import weigh

_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def attach(undo: Undo, transformer: nn.Module, target: str, deltas: list[Delta]) -> None:
    """Attach the deltas of one module, in their order; what detaches it is pushed on ``undo``."""
    module, delta = layer_of(transformer, target), deltas[0]
    # A table is a parameter, not a module with an output: its difference goes where it is used.
    if target == "scale_shift_table":
        _attach_output_table(undo, transformer, delta)
    elif target.endswith("scale_shift_table"):
        hook = _mine_before(lambda args: _with_table(args, delta))
        undo.push(module.register_forward_pre_hook(hook).remove)
    else:
        hook = _mine(_change_of(module, target, deltas))
        # Linear layers may be multiplied in 8 bit; what is added to them is computed in 16.
        hook = Addition(hook) if isinstance(module, nn.Linear) else hook
        undo.push(module.register_forward_hook(hook).remove)


def _mine(change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Make a forward hook that acts only in the thread that attaches it."""
    me = threading.get_ident()

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return change(args[0], output) if threading.get_ident() == me else None

    return after


def _mine_before(change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Any:
    me = threading.get_ident()

    def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
        return change(args) if threading.get_ident() == me else None

    return before


_Change = Callable[[Tensor, Tensor], Tensor]
"""(input, output) of a layer -> the output with what is changed."""


def _change_of(module: nn.Module, target: str, deltas: list[Delta]) -> _Change:
    if isinstance(module, nn.Linear | Convolution):
        make: Callable[[Delta], _Change] = _linear
        if isinstance(module, Convolution):
            make = functools.partial(_convolution, module)
        if all(delta.magnitude is None for delta in deltas):
            return make(deltas[0])  # of plain LoRAs there is one
        return _rescaled(module, deltas, make)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return _norm(module, deltas[0])
    raise ModelMismatch(
        f"Layer {target!r} of the transformer is a {type(module).__name__}; LoRAs go on linear, "
        f"convolution and norm layers. Remove what wraps it ({quoted(Path(target))})."
    )


def _rescaled(module: nn.Module, deltas: list[Delta], make: Callable[[Delta], _Change]) -> _Change:
    """Return the changes one after the other; what a DoRA needs is worked out at the first call."""
    changes: list[_Change] = []

    def change(given: Tensor, output: Tensor) -> Tensor:
        if not changes:
            weigh(module, deltas, output.device)
            changes.extend(map(make, deltas))
        for one in changes:
            output = one(given, output)
        return output

    return change


def _linear(delta: Delta) -> _Change:
    pair, weight, bias, dtype = delta.matrices(), delta.weight, delta.bias, delta.dtype

    def change(given: Tensor, output: Tensor) -> Tensor:
        given, output = given.to(output.device, dtype), delta.keep(output)
        if pair is not None:
            output = plus_product(output, F.linear(given, pair[0]), pair[1])
        if weight is not None:
            output = plus_product(output, given, weight)
        for term in delta.terms:
            output = term(output, given)
        return output if bias is None else plus(output, bias)

    return change


def _convolution(module: Convolution, delta: Delta) -> _Change:
    pair, weight, bias, dtype = delta.matrices(), delta.weight, delta.bias, delta.dtype
    axes = (1,) * len(module.kernel_size)
    convolve = _CONVOLVE[len(axes)]

    def convolved(given: Tensor, kernel: Tensor) -> Tensor:
        out: Tensor = convolve(given, kernel, None, module.stride, module.padding, module.dilation)
        return out

    def change(given: Tensor, output: Tensor) -> Tensor:
        given, output = given.to(output.device, dtype), delta.keep(output, axes)
        if pair is not None:
            inner = convolve(convolved(given, pair[0]), pair[1].reshape(*pair[1].shape, *axes))
            output = plus(output, inner)
        if weight is not None:
            output = plus(output, convolved(given, weight))
        return output if bias is None else plus(output, bias.view(-1, *axes))

    return change


def _norm(module: nn.LayerNorm | nn.RMSNorm, delta: Delta) -> _Change:
    """Return the change of a norm's output.

    A norm is linear in its weight and bias, so the change is the norm with both differences in
    their place.
    """
    weight, bias, shape, eps = delta.weight, delta.bias, module.normalized_shape, module.eps

    def change(given: Tensor, output: Tensor) -> Tensor:
        values = given.to(output.device, torch.float32)
        if isinstance(module, nn.RMSNorm):
            used = torch.finfo(given.dtype).eps if eps is None else eps
            more = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + used)
        else:
            more = F.layer_norm(values, shape, None, None, eps or 0.0)
        del values  # each is as large as two of the output
        more.mul_(0.0 if weight is None else weight.flatten())
        return plus(output, more if bias is None else more.add_(bias))

    return change


def _with_table(args: tuple[Any, ...], delta: Delta) -> tuple[Any, ...]:
    """Add the change of a block's scale-shift table to the timestep embedding.

    The block adds the two, so that its sum is the one with the changed table.
    """
    embedding, table = args[2], delta.weight
    assert table is not None
    if isinstance(embedding, TimestepRuns):
        changed: Any = TimestepRuns(embedding.values.float() + table, embedding.starts)
    else:
        changed = embedding.float() + table
    return (*args[:2], changed, *args[3:])


def _attach_output_table(undo: Undo, transformer: nn.Module, delta: Delta) -> None:
    """Apply the change of the last scale-shift table, which the model's own forward reads.

    The forward computes norm_out(x) * (1 + scale) + shift and passes it to proj_out. The change,
    norm_out(x) * d_scale + d_shift, is computed after the norm and added before the projection.
    """
    table = delta.weight
    assert table is not None
    shift, scale = table.reshape(2, -1)
    # The lean forward calls the norm once for each span of tokens, so there may be several pieces.
    pieces: list[Tensor] = []

    def remember(given: Tensor, output: Tensor) -> Tensor:
        pieces.append((output.float() * scale).add_(shift))
        return output

    def add(args: tuple[Any, ...]) -> tuple[Any, ...]:
        given, begin = args[0], 0
        if torch.is_grad_enabled():
            given = given.clone()
        while pieces:  # in place, and each is freed at once: together they are two hidden states
            change = pieces.pop(0)
            end = begin + change.shape[1]
            given[:, begin:end] += change.to(given.dtype)
            begin = end
        return (given, *args[1:])

    norm, out = transformer.get_submodule("norm_out"), transformer.get_submodule("proj_out")
    undo.push(pieces.clear)
    undo.push(norm.register_forward_hook(_mine(remember)).remove)
    undo.push(out.register_forward_pre_hook(_mine_before(add)).remove)
