"""What the tests of renders share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.tiny_models import folders

from wan_core import WanPipelineLoader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder, made when it is first asked for."""
    return folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def nothing_is_left() -> Iterator[None]:
    """Components that a module's renders kept are dropped after it."""
    yield
    WanPipelineLoader().clear_cache()


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """Components that a test's renders kept are dropped after it."""
    yield
    WanPipelineLoader().clear_cache()
