"""What holds for all tests."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def without_gradients() -> Iterator[None]:
    """Forwards are computed as in a render, without gradients."""
    import torch

    with torch.no_grad():
        yield


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files of any size stay mapped, as large ones do; no component is kept before or after."""
    from wan_core import WanPipelineLoader

    monkeypatch.setattr("wan_core.models.sizes.MAP_FROM", 1)
    WanPipelineLoader().clear_cache()
    yield
    WanPipelineLoader().clear_cache()


LONG = (
    "nodes/test_comfyui.py", "render/test_resume.py", "tools/test_demo_model.py",
    "render/test_pipeline.py", "render/test_stored_weights.py", "workers/test_workers.py",
    "tools/test_mutate.py", "tools/test_benchmarks.py", "workers/test_ulysses.py",
    "tools/test_control.py",
)  # fmt: skip
"""Files of many seconds, each run by one process: begun last, one would keep the other waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; all others stay in their order."""
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))
