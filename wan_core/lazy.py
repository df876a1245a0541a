"""Modules that are imported on first use: what loads torch, and what may not be there at all."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_log = logging.getLogger(__name__)


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


def module_or_none(package: str, name: str, without: str) -> Any:
    """Import a module of a package that needs an extra (Triton); None where that cannot be.

    ``without`` says, for the log, what is done then.
    """
    try:
        return importlib.import_module(f".{name}", package)
    except Exception as err:  # noqa: BLE001 - a broken Triton fails in many ways
        _log.info("%s (%s).", without, err)
        return None
