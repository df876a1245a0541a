"""Mapped files: read in place, never written to; and a system that has no room for one."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
from pathlib import Path
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


def test_what_is_read_next_is_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor by tensor through a file, each byte is asked for once, and before it is touched."""
    page = mmap.PAGESIZE
    monkeypatch.setattr(mapped, "_AHEAD", 8 * page)
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(100 * page))

    class Advised(mmap.mmap):
        asked: list[range] = []

        def madvise(self, option: int, start: int, length: int) -> None:
            assert option == mmap.MADV_WILLNEED
            assert start % page == 0
            self.asked.append(range(start // page, -(-(start + length) // page)))

    with path.open("rb") as file:
        inner = Advised(file.fileno(), 0, access=mmap.ACCESS_READ)
        whole = mapped.MappedFile(inner, (ctypes.c_uint8 * len(inner)).from_buffer_copy(inner))
    for start in range(0, 100 * page, 3 * page // 2):
        whole.read_ahead(start, min(3 * page // 2, 100 * page - start))
        assert any(start // page in some for some in inner.asked)
    told = [number for some in inner.asked for number in some]
    assert sorted(set(told)) == list(range(100))
    assert len(told) <= 100 + len(inner.asked)  # a page that an edge lies in is told twice
    whole.read_ahead(0, page)
    before = len(inner.asked)
    whole.read_ahead(50 * page, page)  # elsewhere, as another component of the same file
    assert len(inner.asked) == before or 50 in inner.asked[-1]


def test_advice_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(64)))

    class Refusing(mmap.mmap):
        def madvise(self, option: int, start: int, length: int) -> None:
            raise OSError(errno.EINVAL, "no")

    with path.open("rb") as file:
        inner = Refusing(file.fileno(), 0, access=mmap.ACCESS_READ)
        whole = mapped.MappedFile(inner, (ctypes.c_uint8 * len(inner)).from_buffer_copy(inner))
    whole.read_ahead(0, 64)
    assert whole.view(0, 64, torch.uint8).tolist() == list(range(64))
