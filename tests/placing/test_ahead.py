"""Work that is done ahead: it is done, waited for, and ended with what it was done beside."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from wan_core.placing import streaming, transport
from wan_core.placing.ahead import Ahead, do_ahead


def test_it_is_done_and_what_is_half_read_is_waited_for() -> None:
    done, told = [], []

    def work(ahead: Ahead) -> None:
        done.append("begun")
        left.wait(60)
        ahead.has_read()
        ahead.wait()  # until the block has ended
        done.append("ended")

    left = threading.Event()
    with do_ahead(work, lambda *amount: told.append(amount) or left.set()) as ahead:
        assert ahead is not None
    assert done == ["begun", "ended"] and told


def test_an_error_in_the_block_ends_it() -> None:
    ended = []

    def work(ahead: Ahead) -> None:
        ahead.wait()
        ended.append(True)

    with pytest.raises(KeyError), do_ahead(work, lambda *_: None):
        raise KeyError
    assert ended


def test_locking_ahead_stops_at_the_end_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []

    def pin(modules: Any, blocks: Any, schedule: Any, nbytes: int, check: Any) -> None:
        end = time.monotonic() + 60
        try:
            while time.monotonic() < end:
                check()
                time.sleep(0.005)
        except BaseException:
            stopped.append(True)
            raise

    monkeypatch.setattr(streaming, "_pin", pin)
    module = nn.Module()
    module.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    module.vace_blocks = None
    with streaming.pin_ahead(module, pin_bytes=1):
        pass
    assert stopped == [True]


def test_no_copy_begins_after_a_transport_is_closed() -> None:
    asked: list[dict[str, bool]] = []
    closing: Any = SimpleNamespace(
        _worker=SimpleNamespace(shutdown=lambda **how: asked.append(how)),
        _stream=SimpleNamespace(synchronize=lambda: asked.append({})),
        _gathers={},
    )
    transport.CudaTransport.close(closing)
    assert asked == [{"wait": True, "cancel_futures": True}, {}]
