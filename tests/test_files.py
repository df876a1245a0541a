"""files: names that escape, outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import bad_files

from wan_core import files
from wan_core.errors import MissingFile, OutputError, UnsafeFile
from wan_core.files import (
    atomic_path,
    atomic_write,
    check_target,
    contained_path,
    decode_text,
    file_identity,
    name_problem,
    sweep,
)


@pytest.mark.parametrize("name", bad_files.ESCAPING_NAMES)
def test_escaping_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeFile, match="is refused"):
        contained_path(tmp_path, name)


def test_there_are_enough_escaping_names() -> None:
    assert len(bad_files.ESCAPING_NAMES) >= 31


@pytest.mark.parametrize("name", bad_files.HARMLESS_NAMES)
def test_harmless_names_stay_literal(tmp_path: Path, name: str) -> None:
    assert contained_path(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", [None, 3, b"x", ["x"], Path("x")])
def test_names_that_are_no_text(tmp_path: Path, name: object) -> None:
    assert name_problem(name)
    with pytest.raises(UnsafeFile):
        contained_path(tmp_path, name)


def test_links(tmp_path: Path) -> None:
    """A link that leaves the folder is fine for reading a model, not for writing."""
    inside, outside = tmp_path / "in", tmp_path / "in_evil"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    (inside / "stays").symlink_to(inside)
    with pytest.raises(UnsafeFile, match="through a link"):
        contained_path(inside, "link/x")
    assert contained_path(inside, "link/x", allow_links=True) == inside / "link" / "x"
    assert contained_path(inside, "stays/x") == inside / "stays" / "x"
    # The root itself may be a link.
    (tmp_path / "root").symlink_to(inside)
    assert contained_path(tmp_path / "root", "x") == tmp_path / "root" / "x"


def test_identity_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1")
    first = file_identity(path)
    assert first == file_identity(path) and first.size == 1
    os.utime(path, ns=(1, 1))
    assert file_identity(path) != first
    with pytest.raises(MissingFile):
        file_identity(tmp_path / "none")
    with pytest.raises(MissingFile):
        file_identity("a\0b")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.bin"
    atomic_write(path, b"one")
    assert path.read_bytes() == b"one"
    atomic_write(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two" and names(path.parent) == ["x.bin"]
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("at", ["first byte", "half", "rename", "flush"])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    full = OSError(errno.ENOSPC, "No space left on device")

    def writer(file: object) -> None:
        if at == "half":
            file.write(b"half")  # type: ignore[attr-defined]
        if at in ("first byte", "half"):
            raise full

    def fail(*_: object) -> None:
        raise full

    if at == "rename":
        monkeypatch.setattr(files.os, "replace", fail)
    if at == "flush":
        monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OutputError, match=r"x\.bin.*No space left on device"):
        atomic_write(path, writer)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["x.bin"]


def test_an_interrupt_passes_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "x.mp4") as temporary:
        assert temporary.suffix == ".mp4" and temporary.parent == tmp_path
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_error_of_the_writer_passes_unchanged(tmp_path: Path) -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError) as caught:
        atomic_write(tmp_path / "x", lambda _: (_ for _ in ()).throw(error))
    assert caught.value is error and names(tmp_path) == []


def test_free_space_is_asked_first(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needs 1,000,000,000,000,000,000 bytes and .* are free"):
        atomic_write(tmp_path / "x", b"", expected_bytes=10**18)
    assert names(tmp_path) == []


def test_refused_targets(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        atomic_write(tmp_path, b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError):
        atomic_write(tmp_path / "file" / "x", b"")
    with pytest.raises(OutputError):
        atomic_write(tmp_path / ("a" * 300), b"")
    with pytest.raises(OutputError):
        atomic_write("a\0b", b"")
    assert names(tmp_path) == ["file"]


def test_long_names_are_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError), atomic_path(tmp_path / ("a" * 300)):
        pytest.fail("the work was begun")


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(OutputError, match="Cannot write into .*Permission denied"):
        atomic_write(tmp_path / "x", b"")
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["file/x.mp4", "a" * 300 + ".mp4", "folder.mp4", "/proc/x.mp4"])
def test_a_target_is_checked_before_the_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    target = tmp_path / place
    with pytest.raises(OutputError, match=r"[Nn]ame") as caught:
        check_target(target)
    assert str(target) in str(caught.value)
    assert names(tmp_path) == ["file", "folder.mp4"]


def test_checking_a_target_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"old")
    check_target(tmp_path / "x.mp4")
    assert names(tmp_path) == ["x.mp4"] and (tmp_path / "x.mp4").read_bytes() == b"old"


HOLD = """
import sys, time
from wan_core.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    print(temporary.name, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_swept_and_what_a_running_one_writes_is_not(
    tmp_path: Path,
) -> None:
    (tmp_path / ".wanfit").mkdir()
    (tmp_path / ".wanfit-0123456789abcdef.mp4").write_bytes(b"of another machine or version")
    kept = names(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "x.mp4")],
        cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        left = child.stdout.readline().strip()
        with atomic_path(tmp_path / "y.mp4") as mine:
            sweep(tmp_path)
            assert names(tmp_path) == sorted([*kept, left, mine.name])
    finally:
        child.kill()
        child.wait()
    assert left in names(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*kept, "y.mp4"])
    sweep(tmp_path / "nothing")


def test_a_file_swept_before_it_could_be_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    original, swept = fcntl.flock, []

    def sweep_first(descriptor: int, how: int) -> None:
        if not swept:
            swept.append(True)
            sweep(tmp_path)
        original(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", sweep_first)
    with atomic_path(tmp_path / "x.mp4") as temporary:
        assert names(tmp_path) == [temporary.name]
        sweep(tmp_path)
        assert names(tmp_path) == [temporary.name]
    assert names(tmp_path) == ["x.mp4"]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that has no locks, and that neither removes nor renames a file that is open."""
    held = Path("/proc/self/fd")
    if not held.is_dir():
        pytest.skip("open files are looked up in /proc")
    remove, rename = Path.unlink, os.replace

    def refuse_if_open(path: str | os.PathLike[str]) -> None:
        links = (held / name for name in os.listdir(held))
        if any(os.path.realpath(link) == os.path.realpath(path) for link in links):
            raise PermissionError(errno.EACCES, "The file is in use by another process", str(path))

    def unlink(path: Path, missing_ok: bool = False) -> None:
        refuse_if_open(path)
        remove(path, missing_ok)

    def replace(source: str, target: str) -> None:
        refuse_if_open(source)
        rename(source, target)

    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.delattr(files, "fcntl")
    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(os, "replace", replace)


def test_on_windows_files_appear_whole_and_half_ones_are_swept(
    windows: None, tmp_path: Path
) -> None:
    atomic_write(tmp_path / "x.json", b"first")
    atomic_write(tmp_path / "x.json", lambda file: file.write(b"second"))
    check_target(tmp_path / "x.json")
    assert (tmp_path / "x.json").read_bytes() == b"second" and names(tmp_path) == ["x.json"]
    with pytest.raises(ValueError, match="broken"), atomic_path(tmp_path / "y.mp4") as temporary:
        temporary.write_bytes(b"half")
        raise ValueError("broken")
    assert names(tmp_path) == ["x.json"]
    # A writer that holds its file open keeps it; one that is gone does not.
    with atomic_path(tmp_path / "z.mp4") as temporary, open(temporary, "wb") as file:
        sweep(tmp_path)
        file.write(b"whole")
    assert (tmp_path / "z.mp4").read_bytes() == b"whole"
    (tmp_path / f"{files._mark()}0123456789abcdef.mp4").write_bytes(b"left by a crash")
    sweep(tmp_path)
    assert names(tmp_path) == ["x.json", "z.mp4"]
    sweep(tmp_path / "nothing")


def test_on_windows_a_result_that_is_open_elsewhere_stays_and_is_named(
    windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.mp4"
    target.write_bytes(b"watched in a player")
    before = target.read_bytes()

    def in_use(source: str, to: str) -> None:
        raise PermissionError(errno.EACCES, "The file is in use by another process", str(to))

    monkeypatch.setattr(os, "replace", in_use)
    with pytest.raises(OutputError, match=r"x\.mp4.*Choose another folder or name"):
        atomic_write(target, b"new")
    assert target.read_bytes() == before and names(tmp_path) == ["x.mp4"]


MARKS = {
    "UTF-8": (b"\xef\xbb\xbf", "utf-8"), "UTF-16 LE": (b"\xff\xfe", "utf-16-le"),
    "UTF-16 BE": (b"\xfe\xff", "utf-16-be"), "none": (b"", "utf-8"),
}  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("text", ["", "5: a red circle\r\n4: 日本語", "{}", "é"])
def test_text_as_editors_save_it(mark: str, text: str) -> None:
    start, encoding = MARKS[mark]
    assert decode_text(start + text.encode(encoding)) == text


def test_text_that_is_none() -> None:
    for data in (b"\xff", b"\x80abc", b"\xff\xfe\0"):
        with pytest.raises(UnicodeDecodeError):
            decode_text(data)
