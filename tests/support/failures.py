"""Memory that runs out at a chosen operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def failing(wrapper: Any, component: str, inner: str, at: int, error: Any, times: int = 1) -> None:
    """Make the ``at``-th call of a component's submodule fail, ``times`` times; 0: its loading."""
    cache = wrapper._cache
    original = cache.borrow
    state = {"calls": 0, "left": times}

    def fail(*_: Any) -> None:
        state["calls"] += 1
        if state["calls"] >= at and state["left"] > 0:
            state["left"] -= 1
            raise error()

    def borrow(key: Any, nbytes: int, build: Any, *, keep: bool = True) -> Any:
        def built() -> Any:
            mine = key.files and Path(key.files[0].path).parent.name == component
            if mine and at == 0:
                fail()
            module = build()
            if mine and at > 0:
                module.get_submodule(inner).register_forward_pre_hook(fail)
            return module

        return original(key, nbytes, built, keep=True)

    cache.borrow = borrow
