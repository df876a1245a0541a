"""What holds for all tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect() -> None:
    """Have garbage collections pass over what was imported: a million objects, 0.25 s each time."""
    gc.collect()
    gc.freeze()
