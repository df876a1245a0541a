"""Writes frames to an mp4 that appears complete or not at all; reads frames and sound from files.

With PyAV (ffmpeg's libraries).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import shutil
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from torch import Tensor

from ..errors import InvalidRequest, OutputError, first_line
from ..files import atomic_path
from ..job import AUDIO_RATES, ENCODERS, Request, encoder_options, load_picture
from ..sampling import as_bytes

_log = logging.getLogger(__name__)
_FALLBACK_RATE = 48000
_HDR = {16: "PQ", 18: "HLG"}  # ffmpeg's AVCOL_TRC_SMPTE2084 and AVCOL_TRC_ARIB_STD_B67
_BT709 = 1  # ffmpeg's AVCOL_PRI_BT709, AVCOL_TRC_BT709 and AVCOL_SPC_BT709
_LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG
_IN_ORDER = 2
"""Frames of a clip that is shorter than x265's reordering, which then leaves their decoding times
unset: the muxer meets whatever number lies there, and sometimes refuses it."""
_AHEAD = 16
"""Frames that wait for the encoder at most; then ``write`` waits for it."""
_NO_DISK = {errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENODEV,
            errno.ESTALE, errno.EBADF}  # fmt: skip
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BY_ITSELF: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
"""For conversions of colours: since PyAV 17 as many threads as there are processors share one, and
are started for each picture anew: 10 ms of a picture of 480p with 32 of them, 2.5 with one."""


def read_video(path: str | os.PathLike[str], field: str, most: int | None = None) -> Tensor:
    """Read a video's frames, at most ``most``: uint8 (frames, height, width, 3), RGB.

    Also reads a picture, as a video of one frame. A phone's video is turned upright, as a player
    shows it. HDR is not tone mapped, and the log says so. Raises InvalidRequest, naming ``field``,
    for what cannot be read, and at the first frame of another size than the first one's.
    """
    frames: list[Tensor] = []
    size: tuple[int, int] | None = None
    convert = VideoReformatter()
    with _opened(path, field, "video") as stream:
        for frame in stream.container.decode(stream):
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) != size:
                raise InvalidRequest(
                    f"{field}: {str(path)!r} changes from {size[0]}x{size[1]} to "
                    f"{frame.width}x{frame.height} at frame {len(frames)}; frames of one size are "
                    "needed. Encode it anew.",
                    field=field,
                )
            # Degrees, anticlockwise; older releases of PyAV do not tell.
            turns = round(getattr(frame, "rotation", 0) / 90)
            pixels = convert.reformat(frame, format="rgb24", **_BY_ITSELF).to_ndarray()
            pixels = np.rot90(pixels, turns)
            frames.append(torch.from_numpy(np.ascontiguousarray(pixels)))
            if most is not None and len(frames) >= most:
                break
        hdr = _HDR.get(stream.codec_context.color_trc)
    if not frames:
        raise InvalidRequest(f"{field}: {str(path)!r} holds no frames.", field=field)
    if hdr is not None:
        told = "%s: %r is HDR (%s), read without tone mapping: pale colours. Make it SDR (BT.709)."
        _log.warning(told, field, str(path), hdr)
    return torch.stack(frames)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], field: str, kind: str) -> Iterator[Any]:
    """Yield a file's first stream of a ``kind``; whatever cannot be read becomes InvalidRequest."""
    place = os.path.expanduser(os.fspath(path))
    try:
        if os.path.exists(place) and not os.path.isfile(place):  # a pipe would be waited for
            raise ValueError("it is no file")
        # As a file whatever it is called, and with nothing but files behind it: ffmpeg would follow
        # an address, and those in a playlist.
        with av.open(f"file:{place}", options={"protocol_whitelist": "file"}) as container:
            streams = getattr(container.streams, kind)
            if not streams:
                raise ValueError(f"it has no {kind} track")
            yield streams[0]
    except (OSError, ValueError, av.FFmpegError) as err:
        why = getattr(err, "strerror", None) or err
        said = "sound" if kind == "audio" else "a video"
        raise InvalidRequest(
            f"{field}: {str(path)!r} cannot be read as {said} ({why}).", field=field
        ) from err


def read_numbers(path: str | os.PathLike[str] | None, field: str) -> Tensor | None:
    """Return the floats of a file of ``numpy.save``; None without a path.

    Raises InvalidRequest, naming ``field``, for what cannot be read. No object is unpickled.
    """
    if path is None:
        return None
    try:
        return torch.from_numpy(np.load(os.path.expanduser(path), allow_pickle=False)).float()
    except (OSError, ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as err:
        raise InvalidRequest(
            f"{field}: {str(path)!r} cannot be read as numbers of numpy.save ({first_line(err)}).",
            field=field,
        ) from err


def read_pictures(images: Iterable[Any], field: str) -> Tensor:
    """Return several pictures of one size as (N, H, W, 3) floats; see ``load_picture``.

    Raises InvalidRequest for pictures of different sizes: a batch has one.
    """
    found = []
    for image in images:
        picture = load_picture(image, field)
        if not isinstance(picture, torch.Tensor):
            picture = torch.from_numpy(np.asarray(picture).copy()).float() / 255.0
        found.append(picture)
    sizes = list(dict.fromkeys(f"{one.shape[1]}x{one.shape[0]}" for one in found))
    if len(sizes) != 1:
        raise InvalidRequest(
            f"{field} are pictures of {', '.join(sizes) or 'no'} size; give pictures of one size.",
            field=field,
        )
    return torch.stack(found)


def read_audio(path: str | os.PathLike[str], seconds: float | None = None) -> tuple[Tensor, int]:
    """Read a file's first sound track: (waveform (1 or 2 channels, samples), samples per second).

    Reads no more than ``seconds``. More than two channels are mixed down to two. A sample rate that
    an mp4 cannot hold is converted to 48,000. Raises InvalidRequest if there is no sound to read.
    """
    pieces: list[Tensor] = []
    samples = 0
    with _opened(path, "audio", "audio") as stream:
        rate = stream.rate if stream.rate in AUDIO_RATES else _FALLBACK_RATE
        layout = "mono" if stream.channels == 1 else "stereo"
        wanted = None if seconds is None else int(seconds * rate) + 1
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
        for frame in chain(stream.container.decode(stream), [None]):
            for part in resampler.resample(frame):
                pieces.append(torch.from_numpy(part.to_ndarray()))
                samples += pieces[-1].shape[1]
            if wanted is not None and samples >= wanted:
                break
    if not samples:
        raise InvalidRequest(f"audio: {Path(path).name!r} holds no samples.", field="audio")
    return torch.cat(pieces, dim=1)[:, :wanted].contiguous(), rate


class VideoWriter:
    """Context manager that writes frames of ``width`` x ``height`` pixels to an mp4 at ``path``.

    A temporary file in the same folder is written, and renamed to ``path`` when the ``with`` block
    ends without an error. On any error or interrupt it is removed, and an older file at ``path``
    stays as it was.

    ``codec`` is "h264", "h265" or the name of one of ffmpeg's encoders. ``fps`` is frames per
    second, ``crf`` the quality of x264 and x265 (0 lossless .. 51 worst). ``metadata`` is stored in
    the container under its own keys; ComfyUI looks there for ``prompt`` and ``workflow``.
    ``audio`` is (waveform (channels, samples) in -1..1, samples per second), stored as AAC and cut
    to the length of the video. ``num_frames``, if known, lets the error about a full disk say
    how much is needed. Raises InvalidRequest for a value that the codec cannot take, OutputError if
    the file cannot be written.

    Frames are encoded by a thread of their own, beside whatever makes the next ones; at most
    ``_AHEAD`` of them wait for it, as bytes. An error of the encoder is raised by the next
    ``write`` or at the end of the ``with`` block.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fps: float,
        width: int,
        height: int,
        codec: str = "h264",
        crf: int = 18,
        pix_fmt: str = "yuv420p",
        metadata: Mapping[str, str] | None = None,
        audio: tuple[Tensor, int] | None = None,
        num_frames: int | None = None,
    ) -> None:
        _check_request(fps, width, height, pix_fmt, audio)
        self.path = Path(path)
        self.frames_written = 0
        self._size = (height, width)
        self._rate = Fraction(fps).limit_denominator(1001)
        self._codec, self._crf, self._pix_fmt = ENCODERS.get(codec, codec), crf, pix_fmt
        self._metadata = dict(metadata or {})
        self._audio = audio
        self._num_frames = num_frames
        self._encoded = self._samples_written = 0
        self._waiting: queue.Queue[Tensor | None] = queue.Queue(_AHEAD)
        self._encoder: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._convert = VideoReformatter()
        self._container: Any = None
        self._stack = contextlib.ExitStack()

    @classmethod
    def of(
        cls, path: Path, asked: Request, metadata: Mapping[str, str],
        audio: tuple[Tensor, int] | None,
    ) -> VideoWriter:  # fmt: skip
        """Return the writer of a request's video."""
        return cls(
            path, fps=asked.fps, width=asked.width, height=asked.height, codec=asked.codec,
            crf=asked.crf, pix_fmt=asked.pix_fmt, metadata=metadata, audio=audio,
            num_frames=asked.wanted_frames,
        )  # fmt: skip

    def __enter__(self) -> VideoWriter:
        with contextlib.ExitStack() as stack:
            self._temporary = stack.enter_context(atomic_path(self.path))
            with self._explained():
                # The file is opened here and not by PyAV, which would leave it open for ever when
                # the first bytes cannot be written: on a full disk, or with a codec that mp4 does
                # not know.
                self._file = _Output(self._temporary)
                # Runs before the temporary file is renamed or removed: Windows can do neither with
                # an open file.
                stack.callback(self._close)
                self._container = self._open()
                self._add_streams()
            # Before the container is closed, nothing may be encoding any more.
            stack.callback(self._stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
            else:
                self._failed = error  # what still waits need not be encoded
        except BaseException as failed:
            self._failed = failed
            self._stack.__exit__(type(failed), failed, failed.__traceback__)
            raise
        self._stack.__exit__(kind, error, trace)

    def write(self, frames: Tensor) -> None:
        """Append frames (f, H, W, 3), floats 0..1 or uint8, on any device.

        Returns when the last of them waits for the encoder; ``frames_written`` counts them all.
        """
        if frames.ndim != 4 or tuple(frames.shape[1:]) != (*self._size, 3):
            height, width = self._size
            raise InvalidRequest(
                f"frames have shape {tuple(frames.shape)}; this video takes (frames, {height}, "
                f"{width}, 3).",
                field="frames",
            )
        if self._encoder is None:
            self._encoder = threading.Thread(target=self._encode_all, name="mp4 encoder")
            self._encoder.start()
        for picture in frames:  # one at a time: the conversion never doubles the clip
            if self._failed is not None:
                break
            self._waiting.put(as_bytes(picture))  # a copy: the caller's may change
            self.frames_written += 1
        self._raise_failure()

    def _raise_failure(self) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _encode_all(self) -> None:
        """Encode what waits until None comes. After an error the rest is taken and left."""
        failed = False
        while (picture := self._waiting.get()) is not None:
            if failed or self._failed is not None:
                continue
            try:
                with self._explained():
                    self._encode(picture)
            except BaseException as error:  # noqa: BLE001 - it is raised where frames come from
                failed, self._failed = True, error

    def _stop(self) -> None:
        """Let the encoder come to its end. It is waited for: it uses the container.

        Called again where an interrupt ends the waiting.
        """
        if self._encoder is not None:
            self._waiting.put(None)
            self._encoder.join()
            self._encoder = None

    def _encode(self, picture: Tensor) -> None:
        frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
        frame = self._convert.reformat(
            frame, format=self._pix_fmt, dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG, **_BY_ITSELF,
        )  # fmt: skip
        frame.pts, frame.time_base = self._encoded, 1 / self._rate
        self._container.mux(self._video.encode(frame))
        self._encoded += 1
        self._write_audio(Fraction(self._encoded) / self._rate)

    def _open(self) -> Any:
        # use_metadata_tags keeps keys that mp4 does not define. faststart puts the index first, so
        # that a browser can play before it has the whole file.
        flags = {"movflags": "use_metadata_tags+faststart"}
        again = self._file.open_again
        return av.open(self._file, "w", format="mp4", options=flags, io_open=again)

    def _add_streams(self) -> None:
        self._container.metadata.update(self._metadata)
        height, width = self._size
        options = encoder_options(self._codec, self._crf, width, height)
        stream = self._container.add_stream(self._codec, rate=self._rate, options=options)
        stream.height, stream.width = self._size
        stream.pix_fmt = self._pix_fmt
        context = stream.codec_context
        if self._codec == "libx265":
            context.codec_tag = "hvc1"  # Apple's players do not play the default tag, hev1
        context.time_base = 1 / self._rate
        # Stored in the file, so that players convert back with the same matrix.
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        self._video = stream
        if self._audio is not None:
            layout = "mono" if self._audio[0].shape[0] == 1 else "stereo"
            self._sound = self._container.add_stream("aac", rate=self._audio[1], layout=layout)

    def _write_audio(self, until: Fraction) -> None:
        # Sound is written along with the frames, because the muxer buffers whichever of the two is
        # ahead until the other has caught up.
        if self._audio is None:
            return
        waveform, rate = self._audio
        start, end = self._samples_written, min(int(until * rate), waveform.shape[1])
        if end <= start:
            return
        part = waveform[:, start:end].to(device="cpu", dtype=torch.float32).contiguous()
        layout = self._sound.layout.name
        frame = av.AudioFrame.from_ndarray(part.numpy(), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        self._container.mux(self._sound.encode(frame))
        self._samples_written = end

    def _finish(self) -> None:
        self._stop()
        self._raise_failure()
        if not self.frames_written:
            raise OutputError(f"No frame was written to {str(self.path)!r}; a video needs one.")
        with self._explained():
            packets = self._video.encode(None)
            if self._codec == "libx265" and self.frames_written <= _IN_ORDER:
                for packet in packets:
                    packet.dts = packet.pts
            self._container.mux(packets)
            if self._audio is not None:
                self._container.mux(self._sound.encode(None))
            self._container.close()
            self._file.close()

    def _close(self) -> None:
        # After a good end the container is closed already. Otherwise the file is about to be
        # removed, and an error of close (it writes the index, on a disk that may be full) must not
        # hide the first one.
        with contextlib.suppress(OSError, ValueError, av.FFmpegError):
            if self._container is not None:
                self._container.close()
        with contextlib.suppress(OSError):
            self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, av.FFmpegError) as err:
            raise OutputError(self._why(err)) from err

    def _why(self, err: Exception) -> str:
        number = getattr(err, "errno", None)
        if number in _NO_DISK:
            why = getattr(err, "strerror", None) or err
            return f"{str(self.path)!r} could not be written: {why}. Choose another folder."
        if number not in _NO_ROOM:
            height, width = self._size
            return (
                f"{str(self.path)!r} could not be written with codec {self._codec!r}, "
                f"{self._pix_fmt}, {width}x{height} at {self._rate} fps: {err}. "
                "Choose another codec or folder; codec 'h264' with yuv420p works everywhere."
            )
        so_far = self._temporary.stat().st_size
        frames, wanted = max(self._encoded, 1), self._num_frames or 0
        # The encoder holds frames back: those that were given to it take more than was written.
        needed = so_far * max(wanted, frames) // frames
        free = shutil.disk_usage(self._temporary.parent).free + so_far
        return (
            f"There is no room for {str(self.path)!r}: more than {needed:,} bytes are needed "
            f"({so_far:,} were too few for {frames} frames), {free:,} are free. Make room, or "
            "choose another folder or a higher crf."
        )


class _Output:
    """The file that PyAV writes, with the methods of a file that it calls.

    When something cannot be written, it swallows what comes after: PyAV, which is then closed,
    would print every further error.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, path.name  # PyAV reads the name as UTF-8; folders need not be
        # Not buffered: ffmpeg does that, and looks for errors where it writes, not where it seeks.
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by ``close``)
        self._failed = False

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest and not self._failed:
            self._failed = True
            rest = rest[self._file.write(rest) :]
            self._failed = False
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def open_again(self, *_: object) -> BinaryIO:
        """Open it for reading too: faststart moves what was written to behind the index."""
        return open(self._path, "rb")

    def close(self) -> None:
        self._file.close()


def _check_request(
    fps: float, width: int, height: int, pix_fmt: str, audio: tuple[Tensor, int] | None
) -> None:
    if not 0 < fps <= 1000:
        raise InvalidRequest(f"fps is {fps}; it must be above 0 and at most 1000.", field="fps")
    if not pix_fmt.startswith("yuv"):  # the colours are converted and tagged as BT.709
        raise InvalidRequest(
            f"pix_fmt is {pix_fmt!r}; it must be a yuv format such as 'yuv420p', 'yuv444p' or "
            "'yuv420p10le'.",
            field="pix_fmt",
        )
    even = 2 if "420" in pix_fmt else 1
    for field, value in (("width", width), ("height", height)):
        if value < 2 or value % even:
            raise InvalidRequest(
                f"{field} is {value}; {pix_fmt} takes multiples of {even} from 2 on.", field=field
            )
    if audio is not None and (audio[0].ndim != 2 or audio[0].shape[0] not in (1, 2)):
        raise InvalidRequest(
            f"audio has shape {tuple(audio[0].shape)}; it must be (1 or 2 channels, samples).",
            field="audio",
        )


def contact_sheet(frames: Tensor, columns: int = 6, gap: int = 2) -> Any:
    """Return a PIL image of the frames (F, H, W, 3), 0..1, in rows of ``columns``."""
    from PIL import Image

    count, height, width, channels = frames.shape
    rows = -(-count // columns)
    sheet = torch.ones(rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    for index, frame in enumerate(frames.detach().float().cpu()):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return Image.fromarray(as_bytes(sheet).numpy())
