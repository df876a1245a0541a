"""Moves a module's tensors between devices, and restores exactly the tensors it had before.

Each change to a module is recorded as a step that undoes it. The steps run in reverse order, all of
them, also when one fails.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import nn


class Undo:
    """A stack of steps that undo changes; all of them run, in reverse order, whatever happens.

    Used as a context manager. An error of the body is raised as it is, and errors of the steps are
    added to it as notes. If only steps failed, the first error is raised with the others as notes.
    An interrupt (an exception that is no ``Exception``) goes before all errors, and is raised after
    the last step.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def push(self, step: Callable[[], object]) -> None:
        """Add a step. It runs before all steps that were added earlier."""
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
    """Move all parameters and buffers to ``device``; on an error all stay where they were.

    Parameters stay the same objects. Non-persistent buffers are moved too.
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
    """Return the device of the module's first tensor, or the CPU if it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def remember(undo: Undo, module: nn.Module) -> None:
    """Push a step that restores the module's present parameters, their tensors, and its buffers."""
    slots = [(owner, dict(owner._parameters), dict(owner._buffers)) for owner in module.modules()]
    tensors = [(parameter, parameter.data) for parameter in module.parameters()]

    def restore() -> None:
        for parameter, data in tensors:
            parameter.data = data
        for owner, parameters, buffers in slots:
            owner._parameters.update(parameters)
            owner._buffers.update(buffers)

    undo.push(restore)
