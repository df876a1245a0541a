"""Mapped files: read in place, never written to; and a system that has no room for one."""

from __future__ import annotations

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
