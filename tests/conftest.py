"""What holds for all tests."""

from __future__ import annotations

import gc
import os
import tempfile

import pytest

# No test reads what whoever runs it prefers; ComfyUIs that tests start inherit this.
os.environ["WANFIT_PREFERENCES"] = os.path.join(
    tempfile.mkdtemp(prefix="wanfit-tests-"), "preferences.json"
)


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect() -> None:
    """Have garbage collections pass over what was imported: a million objects, 0.25 s each time."""
    gc.collect()
    gc.freeze()
