"""Mapped files: read in place, never written to; and a system that has no room for one."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan_core.errors import is_host_oom
from wan_core.loading import mapped
from wan_core.loading.mapped import is_mapped, map_file


@pytest.mark.parametrize("private", [True, False], ids=["copy on write", "as on Windows"])
def test_a_view_is_the_file_and_keeps_it(tmp_path: Path, private: bool) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(torch.arange(1000, dtype=torch.float32).numpy().tobytes())
    with open(path, "rb", buffering=0) as file:
        whole = map_file(file, private=private)
    assert len(whole) == 4000
    view = whole.view(40, 30, torch.float32)
    del whole
    gc.collect()
    assert torch.equal(view, torch.arange(10, 40, dtype=torch.float32))
    assert is_mapped(view) and is_mapped(view[3:]) and not is_mapped(view.clone())
    assert not is_mapped(torch.empty(3, device="meta"))
    place = view.data_ptr()
    del view
    gc.collect()
    assert not any(place in addresses for addresses in mapped._addresses.values())


def windows_error(code: int) -> OSError:
    """An error as Windows gives it, where ``winerror`` says more than ``errno``."""
    error = OSError(errno.EINVAL, "The paging file is too small for this operation to complete")
    error.winerror = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize(
    ("error", "no_room"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (windows_error(1455), True),
        (windows_error(8), False),
        (OSError(errno.EACCES, "Permission denied"), False),
        (OSError(errno.ENODEV, "No such device"), False),
    ],
    ids=["ENOMEM", "1455", "another of Windows", "EACCES", "ENODEV"],
)
def test_no_room_is_a_shortage_of_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, no_room: bool, private: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(100))
    monkeypatch.setattr(mmap, "mmap", fail)
    expected = MemoryError if no_room else OSError
    with open(path, "rb", buffering=0) as file, pytest.raises(expected) as caught:
        map_file(file, private=private)
    assert is_host_oom(caught.value) is no_room
    if no_room:
        assert "no room to map" in str(caught.value) and path.name in str(caught.value)
        assert caught.value.__cause__ is error
    else:
        assert caught.value is error


def test_on_windows_a_map_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy-on-write map would count against the commit limit as a whole there."""
    asked: list[dict[str, Any]] = []
    real = mmap.mmap

    def make(*arguments: Any, **options: Any) -> mmap.mmap:
        asked.append(options)
        return real(*arguments, **options)

    path = tmp_path / "numbers"
    path.write_bytes(bytes(64))
    monkeypatch.setattr(mmap, "mmap", make)
    with open(path, "rb", buffering=0) as file:
        map_file(file, private=False)
    assert asked == [{"access": mmap.ACCESS_READ}]


Looked = list[tuple[int, ...]]


def looked_at(
    path: Path, span: range, unit: int, looks: Looked, watch: mapped.Watch | None = None
) -> mapped.Looker:
    """Begin to look at bytes of a file, noting what is seen."""

    def finite(raw: torch.Tensor) -> bool:
        looks.append(tuple(raw.tolist()))
        return 255 not in looks[-1]

    looker = mapped.Looker(watch or mapped.Watch())
    with path.open("rb", buffering=0) as file:
        looker.begin(file, span, unit, finite, lambda reason: ValueError(str(reason)))
        try:
            looker.finish()
        finally:
            looker.close()
    return looker


@pytest.mark.parametrize("at_a_place", [True, False], ids=["pread", "as on Windows"])
@pytest.mark.parametrize("unit", [1, 3, 50])
def test_every_byte_is_looked_at_once_by_whole_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: int, at_a_place: bool
) -> None:
    monkeypatch.setattr(mapped, "LOOKED_AT", 8)
    monkeypatch.setattr(mapped, "AT_ONCE", 20)
    if not at_a_place:
        monkeypatch.delattr(os, "preadv")
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(200)))
    looks: Looked = []
    told: list[int] = []
    looked_at(path, range(7, 7 + 150), unit, looks, mapped.Watch(read=told.append))
    assert sorted(byte for piece in looks for byte in piece) == list(range(7, 157))
    assert all(len(piece) % unit == 0 and piece[0] % unit == 7 % unit for piece in looks)
    assert max(map(len, looks)) <= max(8, unit)
    assert sum(told) == 150
    assert max(told) <= max(20, unit)


@pytest.mark.parametrize(
    ("content", "reason"), [(bytes(99), "short"), (bytes(80) + b"\xff" + bytes(40), "wild")]
)
def test_what_is_wrong_with_a_piece_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str
) -> None:
    monkeypatch.setattr(mapped, "LOOKED_AT", 10)
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        looked_at(path, range(100), 1, [])


def test_a_disk_that_cannot_be_read_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(100))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ValueError, match="Input/output error"):
        looked_at(path, range(100), 1, [])


def test_no_more_is_asked_for_than_lies_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "_LEAD", 100)
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(400))
    go, looks = threading.Event(), [0]

    def finite(raw: torch.Tensor) -> bool:
        looks[0] += 1
        return go.wait(60)

    def check() -> None:
        if looker._pending > 100:  # it waits, and looks for an interrupt meanwhile
            go.set()

    looker = mapped.Looker(mapped.Watch(check))
    with path.open("rb", buffering=0) as file:
        for begin in range(0, 400, 40):
            looker.begin(file, range(begin, begin + 40), 1, finite, lambda reason: ValueError())
            assert looker._pending <= 100
        assert go.is_set()
        looker.finish()
        looker.close()
    assert looks == [10]


@pytest.mark.parametrize(
    ("per_second", "least", "most"),
    [(3e6, 2**16, 2**19), (20e6, 2**18, 2**21), (8e9, 2**22, 2**23)],
)
def test_as_much_is_read_at_once_as_a_disk_gives_in_a_fifth_of_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_second: float, least: int, most: int
) -> None:
    """A read cannot be taken back: whoever is interrupted waits for it. By a clock of its own."""
    now = 0.0
    asked: list[int] = []

    def preadv(number: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal now
        asked.append(len(buffers[0]))
        now += asked[-1] / per_second
        return asked[-1]

    monkeypatch.setattr(mapped, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(os, "preadv", preadv)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"")
    looker, memory = mapped.Looker(mapped.Watch()), torch.empty(2**23, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        for begin in range(0, 2**26, 2**23):
            assert looker.fetch(file, range(begin, begin + 2**23), 1, None, memory) == ""
    looker.close()
    assert sum(asked) == 2**26
    assert max(asked) <= most and max(asked) / per_second < 0.2
    assert asked[-1] / per_second < 0.06
    assert least <= asked[-1] and len(asked) < 2**26 / least
