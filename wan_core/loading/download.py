"""Downloads an official model, only when asked: first the list and sizes, then file by file.

Uses huggingface_hub, with its default endpoint or the one in HF_ENDPOINT. Weights are safetensors;
pickles are never fetched. Bytes that have arrived are kept: an interrupted file is continued from
its last byte, also after a restart. At the end every size and checksum is compared and the folder
is recognised like any other model.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..detect import ArchitectureDetector
from ..errors import (
    CorruptFile,
    DownloadError,
    InvalidRequest,
    MissingDependency,
    ModelMismatch,
    OutputError,
)
from ..files import contained_path
from ..models import ModelArchitecture

REPOSITORIES: Final = {
    "wan2.1-t2v-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-t2v-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan2.1-i2v-14b-480p": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "wan2.1-i2v-14b-720p": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    "wan2.1-flf2v-14b": "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
    "wan2.2-t2v-a14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "wan2.2-i2v-a14b": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "wan2.2-ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}
"""The official diffusers repositories, by the name of the variant they hold."""

_WANTED: Final = re.compile(r".+\.safetensors|.+\.json|.+/(?:spiece\.model|merges\.txt|vocab\.txt)")
_PIECE: Final = 2**24
_SPARE: Final = 2**28
"""Bytes that must stay free on the disk."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository: its name, size in bytes, and checksum."""

    name: str
    size: int
    identity: str
    """Changes when the file does: its git blob, or the SHA-256 of a large file."""
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """What would be fetched, and into which folder. :func:`fetch` fetches it."""

    variant: str
    repository: str
    revision: str
    files: tuple[RemoteFile, ...]
    folder: Path
    endpoint: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def present(self) -> int:
        """Bytes that are on the disk already, those of unfinished files included."""
        return sum(min(file.size, self._there(file)) for file in self.files)

    def target(self, file: RemoteFile) -> Path:
        """Return where a file goes; UnsafeFile for a name that leads out of the folder."""
        return contained_path(self.folder, file.name)

    def partial(self, file: RemoteFile) -> Path:
        """Return where a file lies until it is complete.

        The name holds the file's identity, so that bytes of another version are not continued.
        """
        target = self.target(file)
        return target.with_name(f"{target.name[:200]}.{file.identity[:12]}.part")

    def _there(self, file: RemoteFile) -> int:
        for path in (self.target(file), self.partial(file)):
            if path.is_file():
                return path.stat().st_size
        return 0

    def describe(self) -> str:
        """List files and sizes, the sum, and the folder."""
        lines = [f"{self.repository} at {self.revision[:12]}: {len(self.files)} files"]
        lines += [f"  {_size(file.size):>10}  {file.name}" for file in self.files]
        there = f", {_size(self.present)} of it is there already" if self.present else ""
        lines.append(f"{_size(self.nbytes)} in all{there}, into {self.folder}")
        return "\n".join(lines)


def plan_download(variant: str, folder: str | Path, endpoint: str | None = None) -> Download:
    """Ask the hub what a variant's repository holds; fetches no file.

    The model's folder is made inside ``folder``, named like the repository. ``endpoint`` replaces
    the hub's address; None takes HF_ENDPOINT if it is set. Raises InvalidRequest for an unknown
    variant or address, MissingDependency without huggingface_hub, DownloadError where the hub does
    not answer as expected.
    """
    repository = _repository(variant)
    endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
    if endpoint is not None and not re.fullmatch(r"https?://[^\s/]+(?:/\S*)?", endpoint):
        raise InvalidRequest(
            f"endpoint is {endpoint!r}; an address like https://huggingface.co is needed.",
            field="endpoint",
        )
    hub = _hub()
    with _named(repository, endpoint):
        info = hub.HfApi(endpoint=endpoint, token=False).model_info(repository, files_metadata=True)
    files = tuple(
        _remote(repository, sibling)
        for sibling in info.siblings or ()
        if _WANTED.fullmatch(sibling.rfilename)
    )
    if not any(file.name == "model_index.json" for file in files) or not info.sha:
        raise DownloadError(
            f"{repository} at {endpoint or 'the hub'} holds no model_index.json; it is not the "
            "diffusers folder that was expected. Check the endpoint."
        )
    download = Download(
        variant=variant, repository=repository, revision=str(info.sha), files=files,
        folder=Path(folder) / repository.split("/")[1], endpoint=endpoint,
    )  # fmt: skip
    for file in files:
        download.target(file)  # a name that leads elsewhere is refused before anything is fetched
    return download


def _repository(variant: str) -> str:
    if variant not in REPOSITORIES:
        near = [name for name in REPOSITORIES if variant and name.startswith(variant)]
        raise InvalidRequest(
            f"variant is {variant!r}; there are official folders for "
            f"{', '.join(near or REPOSITORIES)}. Choose one of them.",
            field="variant",
        )
    return REPOSITORIES[variant]


def _remote(repository: str, sibling: Any) -> RemoteFile:
    size, lfs = sibling.size, sibling.lfs
    sha256 = getattr(lfs, "sha256", None)
    identity = sha256 or sibling.blob_id or ""
    if not isinstance(size, int) or size < 0 or not re.fullmatch(r"[0-9a-fA-F]{12,}", identity):
        raise DownloadError(
            f"{repository} does not say the size and checksum of {sibling.rfilename!r}, so that "
            "it could not be checked. Try again, or another endpoint."
        )
    return RemoteFile(sibling.rfilename, size, identity, sha256)


def fetch(download: Download, notice: Callable[[str], object] | None = None) -> ModelArchitecture:
    """Fetch what is missing, check everything, and return what the folder was recognised as.

    Calls ``notice`` with a line of text for each file; progress bars go to stderr. Raises
    DownloadError when the connection fails (call again to continue), OutputError for a full disk,
    CorruptFile for a file whose size or checksum is wrong, ModelMismatch when the folder holds
    another model.
    """
    _require_space(download)
    for number, file in enumerate(download.files, start=1):
        target = download.target(file)
        if notice is not None:
            notice(f"[{number}/{len(download.files)}] {file.name} ({_size(file.size)})")
        if not _is_whole(target, file):
            _fetch_file(download, file, target)
    return _recognised(download)


def _require_space(download: Download) -> None:
    try:
        download.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(download.folder).free
    except OSError as err:
        raise OutputError(f"Cannot write into {str(download.folder)!r}: {err.strerror}.") from err
    missing = download.nbytes - download.present
    if missing + _SPARE > free:
        raise OutputError(
            f"{_size(missing)} are to be fetched into {str(download.folder)!r}, and {_size(free)} "
            "are free on that disk. Free some space or choose another folder."
        )


def _fetch_file(download: Download, file: RemoteFile, target: Path) -> None:
    """Append what is missing to the unfinished file, check it, and rename it to the target."""
    hub = _hub()
    partial = download.partial(file)
    url = hub.hf_hub_url(
        download.repository, file.name, revision=download.revision, endpoint=download.endpoint
    )
    with _named(download.repository, download.endpoint, file.name):
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.is_file() and partial.stat().st_size > file.size:
            partial.unlink()
        with open(partial, "ab") as out:
            # Not hf_hub_download, which begins a file from its first byte after a restart.
            hub.file_download.http_get(url, out, resume_size=out.tell(), expected_size=file.size)
    if not _is_whole(partial, file):
        partial.unlink()
        raise CorruptFile(
            f"{file.name} arrived damaged: its checksum is not the one {download.repository} "
            "states. The damaged file was removed; start the download again."
        )
    os.replace(partial, target)


def _is_whole(path: Path, file: RemoteFile) -> bool:
    """Say whether a file exists with the right size and checksum."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.sha256 is None:
        return _git_blob(path, file) == file.identity or len(file.identity) != 40
    with open(path, "rb") as stream:
        return _digest(stream, hashlib.sha256()) == file.sha256.lower()


def _git_blob(path: Path, file: RemoteFile) -> str:
    """Return git's blob hash of a file; for small files the hub states no other checksum."""
    with open(path, "rb") as stream:
        start = f"blob {file.size}\0".encode()
        return _digest(stream, hashlib.sha1(start, usedforsecurity=False))


def _digest(stream: Any, digest: Any) -> str:
    while piece := stream.read(_PIECE):
        digest.update(piece)
    return str(digest.hexdigest())


def _recognised(download: Download) -> ModelArchitecture:
    for file in download.files:
        path = download.target(file)
        if not path.is_file() or path.stat().st_size != file.size:
            raise CorruptFile(
                f"{str(path)!r} is not the {file.size:,} bytes of {download.repository}. It was "
                "changed meanwhile; start the download again."
            )
    found = ArchitectureDetector().detect_model_architecture(download.folder)
    wanted = re.sub(r"-\d+p$", "", download.variant)
    if wanted not in (found.name, *found.candidates):
        raise ModelMismatch(
            f"{str(download.folder)!r} was fetched as {download.variant} and holds {found.name}: "
            f"{download.repository} is not what it was. Use the folder as what it is, or another."
        )
    return found


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.file_download
    except ImportError as err:
        raise MissingDependency(
            f"Downloads need the package huggingface_hub ({err}). Install it: pip install "
            "huggingface_hub."
        ) from err
    return huggingface_hub


@contextmanager
def _named(repository: str, endpoint: str | None, file: str = "") -> Iterator[None]:
    """Turn errors of the network, the hub or the disk into errors that say what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    # huggingface_hub uses requests, httpx or httpx2, depending on its version. Errors of requests
    # are OSErrors; the others' share no base class.
    loaded = [sys.modules.get(name) for name in ("httpx", "httpx2")]
    network = [module.HTTPError for module in loaded if module is not None]
    try:
        yield
    except (OSError, HfHubHTTPError, *network) as err:
        what = f"{file} of {repository}" if file else repository
        text = (str(err).strip() or type(err).__name__).splitlines()[0][:200]
        if getattr(err, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise OutputError(f"{what} cannot be written: {text}.") from err
        raise DownloadError(
            f"{what} could not be fetched from {endpoint or 'https://huggingface.co'}: "
            f"{text.rstrip('.')}. What has arrived is kept. Check the connection and give the same "
            "command again."
        ) from err


def _size(nbytes: int) -> str:
    """Format a number of bytes in a unit that is easy to read."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} B"
