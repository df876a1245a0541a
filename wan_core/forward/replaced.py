"""Replaces the forward of a module for the threads that ask for it, until the last one is done.

The replacement is set on instances; no class is changed. A thread that did not ask for it gets the
forward that was there before.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ..loading import Undo
from .sources import Table, why_not

T = TypeVar("T")


def unknown_code(module: nn.Module, kind: type, within: nn.Module, table: Table) -> str | None:
    """Return why a replacement was not written after this module's own code, or None if it was.

    ``kind`` is the class it must be, exactly. ``table`` names the code that is replaced, and
    ``within`` is the submodule to which that code belongs.
    """
    if type(module) is not kind:
        return f"{type(module).__name__} is not {kind.__name__}"
    reason = why_not(table)
    if reason is not None:
        return reason
    if within.training:
        return "the model is in training mode"
    return None


@dataclass
class Installed(Generic[T]):
    """The replacement on one module: the options of each thread, and how to undo it.

    Contexts may be nested; a thread's innermost options count.
    """

    options: dict[int, list[T]] = field(default_factory=dict)
    undo: Undo = field(default_factory=Undo)

    def mine(self) -> T | None:
        """Return this thread's options, or None where the module's own forward must run."""
        if torch.is_grad_enabled():
            return None
        stack = self.options.get(threading.get_ident())
        return stack[-1] if stack else None

    def set_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Set ``forward(before, ...)`` on an instance; ``before`` is the forward it replaces.

        Where an accelerate hook is attached, the forward that the hook calls is replaced, so that
        the hook still moves the weights first.
        """
        slot = "_old_forward" if "_old_forward" in vars(module) else "forward"
        present, before = slot in vars(module), getattr(module, slot)

        def restore() -> None:
            if present:
                module.__dict__[slot] = before
            else:
                module.__dict__.pop(slot, None)

        self.undo.push(restore)
        module.__dict__[slot] = partial(forward, before)


class ReplacedForward(Generic[T]):
    """One kind of replacement; ``put_on(module, installed)`` sets the forwards of a module."""

    def __init__(self, put_on: Callable[[Any, Installed[T]], object]) -> None:
        self._put_on = put_on
        self._on: weakref.WeakKeyDictionary[nn.Module, Installed[T]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def on(self, module: nn.Module) -> Installed[T] | None:
        """Return the record of a module, or None if its forward was never replaced."""
        return self._on.get(module)

    @contextmanager
    def __call__(self, module: nn.Module, options: T) -> Iterator[None]:
        """Compute this thread's calls of ``module`` with ``options`` inside the ``with`` block."""
        me = threading.get_ident()
        with self._lock:
            installed = self._on.setdefault(module, Installed())
            if not installed.options:
                self._first(module, installed)
            installed.options.setdefault(me, []).append(options)
        try:
            yield
        finally:
            with self._lock:
                installed.options[me].pop()
                if not installed.options[me]:
                    del installed.options[me]
                # Only the last thread restores the module: others may be in the middle of a call.
                if not installed.options:
                    with installed.undo:
                        pass

    def _first(self, module: nn.Module, installed: Installed[T]) -> None:
        try:
            self._put_on(module, installed)
        except BaseException as error:
            installed.undo.__exit__(type(error), error, None)
            raise
