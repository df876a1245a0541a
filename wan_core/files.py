"""Contained paths, safe opening, text, atomic writes, file identity. Standard library only.

``contained_path`` decides which names taken from a file may become paths. ``atomic_write`` and
``atomic_path`` are the only ways an output is written; ``check_target`` says beforehand whether it
can be; ``sweep`` removes the temporary files of a killed process. ``file_identity`` lets a caller
tell whether a file is still the one that was read.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, Final, cast

from .config import shown
from .errors import CorruptFile, InvalidRequest, MissingFile, OutputError, UnsafeFile

if sys.platform != "win32":
    import fcntl

MAX_NAME: Final = 255
"""Longest file name, in UTF-8 bytes, that common file systems accept."""
_DEVICES: Final = frozenset(
    ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"]
    + [f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789¹²³"]
)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Path, size and modification time: enough to notice that a file has been replaced."""

    path: str
    size: int
    mtime_ns: int


def file_identity(path: str | os.PathLike[str]) -> FileIdentity:
    """Return path (absolute, links resolved), size in bytes and mtime of a file or folder.

    Raises MissingFile when it does not exist or cannot be read.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as err:
        raise MissingFile(f"{os.fspath(path)!r} cannot be read: {_why(err)}.") from err
    return FileIdentity(os.path.realpath(path), status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file unbuffered; yields it and its size in bytes.

    Raises MissingFile or CorruptFile for anything that is not a readable regular file.
    """
    # The kind is checked before opening, because opening a FIFO blocks until something writes.
    if file_kind(path) != "file":
        raise CorruptFile(f"{quoted(path)} is a folder; a file was expected.")
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by the with below
    except OSError as err:
        raise MissingFile(
            f"{quoted(path)} cannot be opened: {err.strerror}. Check who may read it, and the "
            "drive that it is on."
        ) from err
    with file:
        try:
            yield cast(BinaryIO, file), os.fstat(file.fileno()).st_size
        except OSError as err:  # a network drive that went away, a disk that is failing
            raise MissingFile(
                f"{quoted(path)} cannot be read: {_why(err)}. Check the disk, or the connection "
                "to the drive that it is on."
            ) from err


def decode_text(data: bytes) -> str:
    """Return text as editors save it: UTF-8, with or without a byte order mark, or UTF-16 with one.

    Windows' Notepad and PowerShell write such marks. Raises UnicodeDecodeError for anything else.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def file_kind(path: Path) -> str:
    """Return "file" or "folder"; raises MissingFile if neither exists, CorruptFile for a device."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as err:
        link = " (a link to something that is gone)" if path.is_symlink() else ""
        hint = _nearly(path) or "Check the path."
        raise MissingFile(f"{quoted(path)} does not exist{link}. {hint}") from err
    except (OSError, ValueError) as err:
        raise MissingFile(f"{quoted(path)} cannot be read: {_why(err)}. Check the path.") from err
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        raise CorruptFile(f"{quoted(path)} is neither a file nor a folder. Name a model file.")
    return "file"


def named_path(value: object, field: str) -> Path:
    """Return the path that a user named; raises InvalidRequest for what is none, or is empty."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise InvalidRequest(
            f"{field} is {shown(value)} ({type(value).__name__}); the path of a file or "
            "folder is needed.",
            field=field,
        )
    if isinstance(value, str) and not value.strip():
        raise InvalidRequest(f"{field} is empty; name a file or folder.", field=field)
    return Path(value)


def _nearly(path: Path) -> str:
    """Say what is there instead of a path that is not; empty where nothing like it is."""
    text = str(path)
    bare = text.strip().strip("\"'").strip()
    with contextlib.suppress(OSError, ValueError):
        if bare != text and os.path.exists(bare):
            return "It is there without the quotation marks or blanks around it."
        alike = [name for name in os.listdir(path.parent) if _plain(name) == _plain(path.name)]
        if alike and alike[0] != path.name:  # which is a link to something that is gone
            return f"There is {alike[0]!r}, which is written with other letters ({alike[0]!a})."
    if re.match(r"file:/", text):
        return "Give the path alone, without 'file:'."
    # A repository's id looks like a path of two parts; one that begins in a folder is a path.
    repository = re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.parent.is_dir()
    if re.match(r"(https?|hf|s3|gs|ftp):/", text) or repository:
        return (
            "WanFit fetches nothing unless it is asked to: download the model, then give the path "
            "of the folder or file."
        )
    if re.match(r"[a-z]{2,}:/", text):
        return "It is an address: connect the drive, then give the path it has on this computer."
    if re.match(r"~|\$\w|\$\{|%\w+%", text):
        return "Write the path out: what stands for a folder (~, $HOME, %USERPROFILE%) is not read."
    return ""


def _plain(name: str) -> str:
    """Return a name as a person reads it: the same for other forms of Unicode, and other case."""
    return unicodedata.normalize("NFKC", name).casefold()


def home_folder() -> Path:
    """Return the user's home; where the system knows of none, a path at which nothing can be.

    A service, or a container's user that was made up, has none: then nothing is kept.
    """
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull, "home")


def quoted(path: Path) -> str:
    """Return a path in quotes, for a message."""
    return repr(str(path))


def some_of(names: Sequence[str], limit: int = 3) -> str:
    """Return the first ``limit`` of many names and the number of the others, for a message."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def name_problem(name: object) -> str | None:
    """Say why ``name`` may not become a relative path on any system, or None if it may.

    The rules of POSIX and of Windows are both applied on every system, so that a checkpoint made
    on one system cannot name a path outside its folder on the other.
    """
    if not isinstance(name, str):
        return f"it is a {type(name).__name__}, not text"
    if not name.strip():
        return "it is blank"
    if any(ord(char) < 32 or 127 <= ord(char) < 160 or char in "\u2028\u2029" for char in name):
        return "it holds control characters"
    if any(0xD800 <= ord(char) < 0xE000 for char in name):
        return "it is not valid Unicode"
    if "\\" in name or ":" in name:
        return "it holds a backslash or a colon"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        return "it is absolute"
    return next(filter(None, map(_part_problem, name.split("/"))), None)


def _part_problem(part: str) -> str | None:
    if part in ("", ".", ".."):
        return f"it has {part!r} as a part"
    if part.endswith((".", " ")):
        return "a part of it ends in a dot or blank"
    if len(part.encode("utf-8")) > MAX_NAME:
        return f"a part of it is longer than {MAX_NAME} bytes"
    if part.split(".")[0].rstrip().upper() in _DEVICES:
        return "it is a Windows device name"
    return None


def contained_path(
    root: str | os.PathLike[str], name: object, *, allow_links: bool = False
) -> Path:
    """Join ``name`` to ``root`` if it names something inside ``root``, else raise UnsafeFile.

    ``allow_links`` permits symbolic links inside ``root`` that lead out of it. Model files are read
    with it, because people link them to other disks; nothing is written with it. ``~`` and ``%2e``
    are never expanded.
    """
    problem = name_problem(name)
    if problem:
        raise UnsafeFile(
            f"The name {_shown(name)} is refused: {problem}. Only plain names inside "
            f"{os.fspath(root)!r} are allowed. Get the file from a source you trust."
        )
    joined = Path(root, str(name))
    if not allow_links:
        inside = os.path.realpath(root)
        real = os.path.realpath(joined)
        if os.path.commonpath([inside, real]) != inside:
            raise UnsafeFile(
                f"The name {_shown(name)} leads through a link to {real!r}, outside {inside!r}. "
                "Remove the link or choose another folder."
            )
    return joined


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, expected_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary path in the same folder that becomes ``path`` when the block succeeds.

    The file is flushed to disk and renamed over ``path``. When the block raises, or the rename
    fails, the temporary file is removed and an older file at ``path`` stays as it was. Raises
    OutputError when the folder cannot be written or has less than ``expected_bytes`` free.
    """
    target = Path(path)
    _check_folder(target, expected_bytes)
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(_temporary(target))
        except (OSError, ValueError) as err:
            raise _cannot_write(target, err, f"into {str(target.parent)!r}") from err
        yield temporary
        try:
            _publish(temporary, target)
        except OSError as err:
            raise _cannot_write(target, err) from err


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Make an empty file beside ``target`` that is locked during the block and then removed."""
    with contextlib.ExitStack() as stack:
        while True:
            # The suffix is kept, because video encoders choose the container by it.
            path = target.parent / f"{_mark()}{secrets.token_hex(8)}{target.suffix[:16]}"
            # Not tempfile, which makes files readable by their owner only: a result should have
            # the permissions of any new file.
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            stack.callback(path.unlink, missing_ok=True)
            if sys.platform == "win32":  # an open file can be neither renamed nor removed there
                os.close(descriptor)
                break
            stack.callback(os.close, descriptor)
            with contextlib.suppress(OSError):  # without locks here, sweep fails too
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Another process may have swept the file between its creation and its lock.
            if _is_at(descriptor, path):
                break
        yield path


def _mark() -> str:
    """Return the prefix of this machine's temporary files.

    It names the machine, because on a shared disk the locks of another machine may not be visible.
    """
    return f".wanfit-{zlib.crc32(platform.node().encode()):08x}-"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def lock_beside(target: Path) -> Path:
    """Return where a lock on ``target`` lies, short whatever its name; ``sweep`` removes it.

    A render on another machine of a shared disk has another one: see ``_mark``.
    """
    name = hashlib.sha256(os.fsencode(os.path.normcase(target.name))).hexdigest()[:16]
    return target.parent / f"{_mark()}{name}.lock"


def sweep(folder: Path) -> None:
    """Remove temporary files in ``folder`` whose process was killed.

    A file that is still being written is kept: its process holds a lock on it (on Windows, holds it
    open). Files made by another machine, or on a file system without locks, are kept too. Never
    raises OSError.
    """
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{_mark()}*"):
            with contextlib.suppress(OSError):
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    if sys.platform == "win32":
        path.unlink()
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            path.unlink()
    finally:
        os.close(descriptor)


def atomic_write(
    path: str | os.PathLike[str],
    data: bytes | Callable[[BinaryIO], object],
    *,
    expected_bytes: int = 0,
) -> None:
    """Write ``data``, or what ``data(file)`` writes, so that ``path`` is complete or unchanged.

    Raises OutputError, with the file's name, when the disk is full or the path is not writable.
    """
    if isinstance(data, bytes):
        expected_bytes = max(expected_bytes, len(data))
    with atomic_path(path, expected_bytes=expected_bytes) as temporary:
        try:
            with open(temporary, "wb") as file:
                if isinstance(data, bytes):
                    file.write(data)
                else:
                    data(file)
        except OSError as err:
            raise _cannot_write(Path(path), err) from err


def make_folder(path: Path) -> None:
    """Make a folder, and those it is in, where they are not there.

    Raises OutputError for a file, a link to nothing, and what the system does not let be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as err:
        raise OutputError(
            f"The folder {quoted(path)} cannot be made: {_why(err)}. Name another folder."
        ) from err


def check_target(path: str | os.PathLike[str]) -> None:
    """Make sure that ``path`` can be written, before the work whose result goes there.

    Makes its folder, and makes and removes a temporary file in it. Raises OutputError with the
    path, the reason and what to do.
    """
    target = Path(path)
    _check_folder(target, 0)
    try:
        with _temporary(target):
            pass
    except (OSError, ValueError) as err:
        raise _cannot_write(target, err) from err


def _cannot_write(target: Path, err: BaseException, what: str | None = None) -> OutputError:
    shown = what or repr(str(target))
    return OutputError(f"Cannot write {shown}: {_why(err)}. Choose another folder or name.")


def _check_folder(target: Path, expected_bytes: int) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # This also rejects a name that is too long now, and not after an hour of rendering.
        if _exists(target) and target.is_dir():
            raise OutputError(f"{str(target)!r} is a folder; name a file to write.")
        free = shutil.disk_usage(target.parent).free
    except (OSError, ValueError) as err:
        raise _cannot_write(target, err) from err
    if free < expected_bytes:
        raise OutputError(
            f"{str(target)!r} needs {expected_bytes:,} bytes and {free:,} are free on that disk. "
            "Free some space or choose another folder."
        )


def _exists(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _publish(temporary: Path, target: Path) -> None:
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


def _why(err: BaseException) -> str:
    return getattr(err, "strerror", None) or str(err) or type(err).__name__


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 120 else text[:117] + "..."
