"""What the tests of workers share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.thread_workers import ThreadWorker

from wan_core.workers import close_workers, gang
from wan_core.workers.process import End


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ThreadWorker]]:
    """Workers that are threads; none is left over."""
    close_workers()
    monkeypatch.setattr(gang, "WorkerProcess", ThreadWorker)
    ThreadWorker.trouble, ThreadWorker.made = None, []
    yield ThreadWorker
    ThreadWorker.trouble = ThreadWorker.looked = None
    ThreadWorker.last = End()
    close_workers()
