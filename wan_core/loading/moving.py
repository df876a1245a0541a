"""Moves a module's tensors between devices, and puts back exactly what was there before.

What is done to a module is recorded as steps that undo it; they run in reverse, all of them, also
when one fails.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import nn


class Undo:
    """A stack of steps that take something off again: run in reverse, all of them, always.

    Used as a context manager. The error of the body wins over errors of the steps, which are
    added to it as notes; without one, the first step's error is raised and the others are its
    notes. An interrupt that arrives during a step is raised after the last step.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def push(self, step: Callable[[], object]) -> None:
        """Add a step; it runs before all steps added earlier."""
        self._steps.append(step)

    def run(self) -> list[BaseException]:
        """Run and forget every step; return what they raised, in order."""
        raised: list[BaseException] = []
        while self._steps:
            try:
                self._steps.pop()()
            except BaseException as error:  # noqa: BLE001 - the remaining steps must still run
                raised.append(error)
        return raised

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        raised = self.run()
        interrupts = [one for one in raised if not isinstance(one, Exception)]
        main = error if error is not None and not isinstance(error, Exception) else None
        main = main or (interrupts[0] if interrupts else None) or error
        main = main or (raised[0] if raised else None)
        if main is None:
            return
        for one in raised:
            if one is not main:
                main.add_note(f"While detaching: {type(one).__name__}: {one}")
        if main is not error:
            raise main


def move(module: nn.Module, device: torch.device | str) -> None:
    """Move parameters and buffers to ``device``; all of them or, on an error, none.

    Parameters stay the same objects, non-persistent buffers come along.
    """
    undo = Undo()
    remember(undo, module)
    try:
        for parameter in module.parameters():
            parameter.data = _sent(parameter.data, device)
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = _sent(buffer, device)
    except BaseException as error:
        undo.__exit__(type(error), error, None)
        raise


def _sent(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return tensor.to(device)


def device_of(module: nn.Module) -> torch.device:
    """Return where the module's first tensor is; the CPU where it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def remember(undo: Undo, module: nn.Module) -> None:
    """Push a step that gives the module back its very parameters, tensors and buffers."""
    slots = [(owner, dict(owner._parameters), dict(owner._buffers)) for owner in module.modules()]
    tensors = [(parameter, parameter.data) for parameter in module.parameters()]

    def restore() -> None:
        for parameter, data in tensors:
            parameter.data = data
        for owner, parameters, buffers in slots:
            owner._parameters.update(parameters)
            owner._buffers.update(buffers)

    undo.push(restore)
