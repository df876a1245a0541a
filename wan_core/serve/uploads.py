"""A request's body, read as it comes: texts are kept, a file goes to disk, and both have bounds.

Nothing of a body that says it is too large is read; one that does not say is left off where it
gets too large. What a file is, is decided by its first bytes and never by its name or declared
type: only picture formats and containers that cannot name other files are opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import InvalidRequest, MissingDependency, OutputError, WanError
from .fields import MOST_DIGITS, MOST_TEXT, UPLOAD, Upload
from .jobs import json_object

MOST_BYTES = 64 * 2**20
"""Bytes of an upload that are taken where the server is not told otherwise."""
_SLACK = 2**20
"""Bytes of a request besides its file: its texts, and what multipart puts between."""
PAUSE_SECONDS, LEAST_RATE = 30.0, 1024
"""A body that pauses for so long, or brings fewer bytes a second in all, holds a place for nothing.
Assumed."""
PART = ".part"
"""How the name of an upload ends that is not whole, or not looked at yet."""
MOST_FIELDS = 64
MOST_PICTURE, MOST_FRAME, MOST_VIDEO = 7680 * 4320, 4096 * 2304, 2**28
"""Pixels of a picture, of a video's frame, and of as many frames as a clip reads: 268 million are
129 frames of 1920x1080, and 0.8 GB as bytes."""
_PICTURES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp"}
_SUFFIXES = _PICTURES | {"MPO": ".jpg"}
"""Also of what is opened as a JPEG and has more pictures behind the first, as telephones write."""


class TooLarge(WanError):
    """The body of a request is larger than the server takes."""


class TooSlow(WanError):
    """The body of a request comes so slowly that it would never end."""


async def paced(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Pass a body on; raise TooSlow where nothing comes for long, or next to nothing."""
    began, total, chunks = time.monotonic(), 0, aiter(body)
    while True:
        slow = False
        try:
            chunk = await asyncio.wait_for(anext(chunks), PAUSE_SECONDS)
        except StopAsyncIteration:
            return
        except TimeoutError:
            slow, chunk = True, b""
        total += len(chunk)
        took = time.monotonic() - began
        if slow or (took > PAUSE_SECONDS and total < took * LEAST_RATE):
            raise TooSlow(
                f"{total:,} bytes of the request came in {took:.0f} s; {LEAST_RATE:,} a second are "
                f"needed, and no pause of {PAUSE_SECONDS:.0f} s."
            )
        yield chunk


@dataclass(slots=True)
class Form:
    """What a request said; ``file`` is where its upload lies, under a name of ours."""

    fields: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None
    nbytes: int = 0
    """Of the upload."""


def check_length(declared: str | None, most: int) -> int:
    """Return the bytes of a body as it tells them, 0 where it does not.

    Raises TooLarge for one that says it is too large, before any of it is read.
    """
    if declared is None or not (declared.isascii() and declared.isdigit()):
        return 0
    if len(declared) > MOST_DIGITS:
        raise _too_large(most, f"The request's length has {len(declared):,} digits")
    if int(declared) > most + _SLACK:
        raise _too_large(most, f"The request has {int(declared):,} bytes")
    return int(declared)


def _too_large(most: int, what: str = "The upload is larger") -> TooLarge:
    return TooLarge(
        f"{what}; this server takes files of {most / 2**20:,.0f} MiB. Make the picture or video "
        "smaller, or start the server with a larger --upload-mb."
    )


async def read_form(body: AsyncIterator[bytes], content_type: str, folder: Path, most: int) -> Form:
    """Read a body of JSON or multipart/form-data; its file is written into ``folder``.

    Raises InvalidRequest for another type or a body that is neither, TooLarge, and OutputError
    where the file cannot be written. What was written is removed then.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json":
        return Form(json_object(await _whole(body, _SLACK), "The body"))
    if kind != "multipart/form-data":
        raise InvalidRequest(
            f"The content type is {kind[:80]!r}; multipart/form-data or application/json is needed."
        )
    parts = _Parts(content_type, folder, most)
    try:
        await parts.read(body)
    except BaseException:
        parts.drop()
        raise
    parts.form.nbytes = parts.written
    return parts.form


def _broken(err: Exception) -> InvalidRequest:
    return InvalidRequest(f"The multipart/form-data is broken ({err}).")


async def _whole(body: AsyncIterator[bytes], most: int) -> bytes:
    found = bytearray()
    async for chunk in body:
        found += chunk
        if len(found) > most:  # whatever --upload-mb says: there is no file in it
            raise TooLarge(
                f"The JSON is larger than {most / 2**20:,.0f} MiB. Shorten its texts; a picture or "
                "video is sent as multipart/form-data."
            )
    return bytes(found)


class _Parts:
    """Takes the parts of a multipart body as they come."""

    def __init__(self, content_type: str, folder: Path, most: int) -> None:
        try:
            from python_multipart.exceptions import FormParserError
            from python_multipart.multipart import MultipartParser, parse_options_header
        except ImportError as err:
            raise MissingDependency(
                f"Uploads need python-multipart ({err}): pip install python-multipart (WanFit's "
                "extra [serve])."
            ) from err
        self.form = Form()
        self._folder, self._most, self._options = folder, most, parse_options_header
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise InvalidRequest("The multipart/form-data has no boundary.")
        self._header, self._value, self._headers = bytearray(), bytearray(), {b"": b""}
        self._name, self._text, self._file = "", bytearray(), None
        self._seen: set[str] = set()
        self.written = 0
        self._stream: IO[bytes] | None = None
        self._whole = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, a, b: self._header.extend(data[a:b]),
                    "on_header_value": lambda data, a, b: self._value.extend(data[a:b]),
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._data,
                    "on_part_end": self._end,
                    "on_end": self._all,
                },
            )
        except FormParserError as err:  # a boundary that is too long
            raise _broken(err) from err

    async def read(self, body: AsyncIterator[bytes]) -> None:
        """Read the body to its end."""
        from python_multipart.exceptions import FormParserError

        total = 0
        try:
            async for chunk in body:
                total += len(chunk)
                if total > self._most + _SLACK:
                    raise _too_large(self._most)
                self._parser.write(chunk)
            self._parser.finalize()
        except FormParserError as err:
            raise _broken(err) from err
        except OSError as err:
            raise OutputError(f"The upload cannot be kept: {err.strerror}.") from err
        if not self._whole:
            raise InvalidRequest("The multipart/form-data ends too early.")

    def drop(self) -> None:
        """Remove what was written."""
        if self._stream is not None:
            # A full disk refuses at closing what it refused before.
            with contextlib.suppress(OSError):
                self._stream.close()
        if self.form.file is not None:
            self.form.file.unlink(missing_ok=True)

    def _begin(self) -> None:
        self._headers.clear()
        self._text.clear()
        if len(self._seen) >= MOST_FIELDS:
            raise InvalidRequest(f"The request has more than {MOST_FIELDS} fields.")

    def _header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _headers_end(self) -> None:
        _, options = self._options(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name in self._seen:
            raise InvalidRequest(f"{self._name} is given twice.", field=self._name)
        self._seen.add(self._name)
        if self._name == UPLOAD and b"filename" in options:
            # Never the client's name for it.
            self.form.file = self._folder / f"{secrets.token_hex(16)}{PART}"
            self._folder.mkdir(parents=True, exist_ok=True)  # somebody has tidied up meanwhile
            self._stream = open(self.form.file, "xb")  # noqa: SIM115 - closed by _end or drop
        elif b"filename" in options:
            raise InvalidRequest(
                f"{self._name[:80]!r} is a file; only {UPLOAD} is taken.", field=self._name
            )

    def _data(self, data: bytes, begin: int, end: int) -> None:
        if self._stream is not None:
            self.written += end - begin
            if self.written > self._most:
                raise _too_large(self._most)
            self._stream.write(data[begin:end])
            return
        self._text += data[begin:end]
        if len(self._text) > 4 * MOST_TEXT:
            raise InvalidRequest(
                f"{self._name[:80]} is longer than {MOST_TEXT:,} characters.", field=self._name
            )

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            return
        try:
            self.form.fields[self._name] = self._text.decode("utf-8")
        except UnicodeDecodeError as err:
            raise InvalidRequest(f"{self._name[:80]} is not UTF-8.", field=self._name) from err

    def _all(self) -> None:
        self._whole = True


def look_at(path: Path, target: Path) -> Upload:
    """Say what an upload is, check its pixels, and move it beside its job.

    A picture's are its header's, a video's its first frame's.

    ``target`` is the path it gets, without a suffix. Raises InvalidRequest, naming the field, and
    OutputError where it cannot be kept.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise InvalidRequest(f"{UPLOAD} is empty.", field=UPLOAD)
    suffix = _video_suffix(start)
    kind = "image" if suffix is None else "video"
    suffix = _check_picture(path) if suffix is None else suffix
    pixels = _check_video(path) if kind == "video" else 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not renamed: the folder of the jobs may be a link to another disk.
        kept = Path(shutil.move(path, target.with_suffix(suffix)))
    except OSError as err:
        raise OutputError(f"The upload cannot be kept: {err.strerror or err}.") from err
    return Upload(path=kept, kind=kind, pixels=pixels)


def _video_suffix(start: bytes) -> str | None:
    """Return the suffix of a container known by its first bytes; None for what is none.

    Playlists and scripts, with which a file names others, begin otherwise.
    """
    if start[4:8] == b"ftyp" and start[8:12] not in (b"avif", b"avis", b"heic", b"heix", b"mif1"):
        return ".mp4"
    if start[:4] == b"\x1a\x45\xdf\xa3":
        return ".mkv"
    return ".avi" if start[:4] == b"RIFF" and start[8:12] == b"AVI " else None


def _check_picture(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path, formats=tuple(_PICTURES)) as picture:
            size, name = picture.size, str(picture.format)
    except Exception as err:  # a decoder raises what it likes
        raise _not_taken() from err
    _check_pixels(size, MOST_PICTURE, "a picture")
    suffix = _SUFFIXES.get(name)
    if suffix is None:
        raise _not_taken()
    return suffix


def _not_taken() -> InvalidRequest:
    return InvalidRequest(
        f"{UPLOAD} is no picture or video that is taken: PNG, JPEG, WebP, BMP, MP4, MOV, MKV, "
        "WebM or AVI.",
        field=UPLOAD,
    )


def _check_video(path: Path) -> int:
    """Return the pixels of the first frame, which all others have where they are read.

    A header may say less than the frames have; a frame far above the bound is not decoded at all.
    """
    import av

    try:
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as container:
            video = container.streams.video[0].codec_context
            _check_pixels((video.width, video.height), MOST_FRAME, "a video's frame")
            video.options = {"max_pixels": str(2 * MOST_FRAME)}  # twice: codecs count whole blocks
            first = next(container.decode(video=0))
            size = (first.width, first.height)
    except (OSError, ValueError, IndexError, StopIteration, av.FFmpegError) as err:
        raise InvalidRequest(f"{UPLOAD} is no video that can be read.", field=UPLOAD) from err
    _check_pixels(size, MOST_FRAME, "a video's frame")
    return int(size[0] * size[1])


def check_frames(upload: Upload, frames: int) -> None:
    """Raise InvalidRequest where a clip of so many frames would read too much of a video."""
    if upload.kind == "video" and frames < 1:  # elsewhere 0 means as many as the video has
        raise InvalidRequest(
            f"num_frames is {frames}; with a video say how many frames, 1 or more.",
            field="num_frames",
        )
    if upload.pixels * frames > MOST_VIDEO:
        raise InvalidRequest(
            f"{UPLOAD} has {upload.pixels:,} pixels a frame, and num_frames is {frames}; "
            f"{MOST_VIDEO:,} pixels are read. Make the video smaller, or the clip shorter.",
            field=UPLOAD,
        )


def _check_pixels(size: tuple[int, int], most: int, what: str) -> None:
    if not 0 < size[0] * size[1] <= most:
        raise InvalidRequest(
            f"{UPLOAD} has {size[0]}x{size[1]} pixels; {what} may have {most:,}.", field=UPLOAD
        )


def remove_parts(folder: Path) -> None:
    """Remove uploads that a killed server had not finished."""
    for path in folder.glob(f"*{PART}"):
        path.unlink(missing_ok=True)
