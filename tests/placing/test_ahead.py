"""Work that is done ahead: it is done, waited for, and ended with what it was done beside."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from wan_core.placing import ahead as module
from wan_core.placing import streaming, transport
from wan_core.placing.ahead import Ahead, do_ahead, files_ahead


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


class Asked:
    """What a system was asked to read, one piece after the other; a test may make it slow."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, int]] = []
        self.first, self.fourth = threading.Event(), threading.Event()
        self.slow = lambda: None

    def __call__(self, file: int, start: int, length: int, how: int) -> None:
        self.pieces.append((os.fstat(file).st_size, start))
        self.first.set()
        self.slow()
        if len(self.pieces) == 4:
            self.fourth.set()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked()
    monkeypatch.setattr(module, "_PIECE", 10)
    monkeypatch.setattr(os, "posix_fadvise", found, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    return found


def test_files_are_read_piece_by_piece_in_their_order(asked: Asked, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "empty", "b")]
    for path, size in zip(files, (25, 0, 10), strict=True):
        path.write_bytes(bytes(size))
    with files_ahead(files):
        assert asked.fourth.wait(60)
    assert asked.pieces == [(25, 0), (25, 10), (25, 20), (10, 0)]


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_reading_files_ends_with_the_block(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    """A piece that is asked for comes to its end, and no other begins."""
    made: list[Ahead] = []

    class Seen(Ahead):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(module, "Ahead", Seen)
    asked.slow = lambda: made[0]._stop.wait(60)
    (tmp_path / "a").write_bytes(bytes(25))
    with suppress(KeyError, KeyboardInterrupt), files_ahead([tmp_path / "a"]):
        assert asked.first.wait(60)
        if error is not None:
            raise error
    assert asked.pieces == [(25, 0)]


def test_what_cannot_be_read_ahead_is_told_in_its_turn(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with files_ahead([tmp_path / "not there"]):
        pass
    monkeypatch.delattr(os, "posix_fadvise")
    with files_ahead([tmp_path / "not there"]):  # nor where no system is asked
        pass
    assert asked.pieces == []


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
