"""Names of a package whose module is imported on first use, so that torch is not loaded before."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return a module-level ``__getattr__`` (PEP 562) for ``package``.

    ``modules`` maps each module, as a name relative to the package, to the names taken from it.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def lookup(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{homes[name]}", package), name)

    return lookup
