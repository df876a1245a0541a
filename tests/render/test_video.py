"""The mp4 writer: right frames, whole or nothing."""

from __future__ import annotations

import errno
import itertools
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from support.cases import slow_but
from support.clips import HEIGHT, WIDTH, patches, read, write
from support.crashes import Crash

from wan_core.errors import InvalidRequest, OutputError
from wan_core.render import video
from wan_core.render.video import VideoWriter, read_audio, read_numbers, read_video
from wan_core.sampling import as_bytes


def sound(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        parts = [frame.to_ndarray() for frame in container.decode(stream)]
        return np.concatenate(parts, axis=1), stream.rate


@pytest.mark.parametrize("frames", [1, 2, 81])
@pytest.mark.parametrize("fps", [16, 24, 23.976, 24000 / 1001])
def test_every_frame_arrives_in_order_at_the_right_time(
    tmp_path: Path, frames: int, fps: float
) -> None:
    clip = patches(frames)
    write(tmp_path / "out.mp4", clip, fps=fps)
    pictures, rate, _, times = read(tmp_path / "out.mp4")
    assert pictures.shape == (frames, HEIGHT, WIDTH, 3)
    assert abs(float(rate) - fps) < 1e-3
    assert times == pytest.approx([index / fps for index in range(frames)], abs=1e-3)
    # Away from the edges of the patches, where chroma is shared by four pixels.
    for row, column in [(8, 12), (8, 36), (24, 12), (24, 36)]:
        wanted = clip[:, row, column].numpy() * 255
        assert np.abs(pictures[:, row, column].astype(float) - wanted).max() <= 5
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_floats_round_to_the_nearest_level_and_out_of_range_is_clamped(tmp_path: Path) -> None:
    levels = torch.tensor([-0.5, 0.0, 0.49 / 255, 0.51 / 255, 100.4 / 255, 100.6 / 255, 1.0, 2.0])
    clip = torch.zeros(1, 2, 8, 3)
    clip[0, :, :, :] = levels.view(1, 8, 1)
    wanted = np.array([0, 0, 0, 1, 100, 101, 255, 255])
    assert (as_bytes(clip[0]).numpy() == wanted.reshape(1, 8, 1)).all()
    # All 256 levels come back, and bfloat16 is rounded once.
    grid = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_bytes(grid.float() / 255), grid)
    coarse = (torch.arange(1000) / 999).to(torch.bfloat16)
    assert torch.equal(as_bytes(coarse), (coarse.double() * 255).round().to(torch.uint8))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numpy_makes_the_bytes_that_torch_makes(kind: torch.dtype) -> None:
    """Of any layout, and always a copy."""
    numbers = torch.randn(3, 40, 30, generator=torch.Generator().manual_seed(0)).to(kind)
    numbers[:, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    for given in (numbers, numbers.permute(1, 2, 0), numbers[:, ::2, 3:]):
        expected = (given.float() * 255).round().clamp(0, 255).to(torch.uint8)
        made = as_bytes(given)
        well = ~given.isnan()
        assert made.is_contiguous() and torch.equal(made[well], expected[well])
        again = as_bytes(made)
        assert torch.equal(again, made) and again.data_ptr() != made.data_ptr()


def test_bytes_and_floats_make_the_same_file(tmp_path: Path) -> None:
    clip = patches(5)
    write(tmp_path / "a.mp4", clip)
    write(tmp_path / "b.mp4", (clip * 255).round().to(torch.uint8))
    assert (read(tmp_path / "a.mp4")[0] == read(tmp_path / "b.mp4")[0]).all()


def test_noise_survives_where_nothing_is_thrown_away(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = torch.randint(0, 256, (6, HEIGHT, WIDTH, 3), dtype=torch.uint8)
    write(tmp_path / "out.mp4", clip, crf=0, pix_fmt="yuv444p")
    difference = read(tmp_path / "out.mp4")[0].astype(int) - clip.numpy()
    assert np.abs(difference).max() <= 4  # the matrix rounds, and out-of-gamut noise is clipped


def test_workflow_metadata_is_read_back(tmp_path: Path) -> None:
    metadata = {"prompt": '{"3": {"class_type": "WanGenerate"}}', "workflow": '{"n": "é\\n"}'}
    write(tmp_path / "out.mp4", patches(2), metadata=metadata)
    found = read(tmp_path / "out.mp4")[2]
    assert {key: found.get(key) for key in metadata} == metadata


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_sound_goes_along_and_ends_with_the_pictures(
    tmp_path: Path, channels: int, rate: int
) -> None:
    seconds = 40 / 16
    time = torch.arange(int(rate * 4)) / rate
    wave = 0.5 * torch.sin(2 * torch.pi * 440 * time).expand(channels, -1)
    write(tmp_path / "out.mp4", patches(40), audio=(wave, rate))
    heard, found_rate = sound(tmp_path / "out.mp4")
    assert found_rate == rate and heard.shape[0] == channels
    assert abs(heard.shape[1] / rate - seconds) < 0.1
    spectrum = np.abs(np.fft.rfft(heard[0]))
    assert abs(spectrum.argmax() * rate / heard.shape[1] - 440) < 2
    assert np.abs(heard[0][rate // 2 : rate]).max() == pytest.approx(0.5, abs=0.05)
    assert len(read(tmp_path / "out.mp4")[0]) == 40


def test_sound_shorter_than_the_pictures(tmp_path: Path) -> None:
    write(tmp_path / "out.mp4", patches(16), audio=(torch.zeros(1, 4000), 16000))
    assert len(read(tmp_path / "out.mp4")[0]) == 16
    assert sound(tmp_path / "out.mp4")[0].shape[1] < 16000


@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("frames", [0, 1, 9])
def test_an_error_leaves_no_file_and_an_older_one_untouched(
    tmp_path: Path, error: type[BaseException], frames: int
) -> None:
    for path in (tmp_path / "new.mp4", tmp_path / "old.mp4"):
        (tmp_path / "old.mp4").write_bytes(b"older")
        with (
            pytest.raises(error),
            VideoWriter(path, fps=16, width=WIDTH, height=HEIGHT) as writer,
        ):
            if frames:
                writer.write(patches(frames))
            raise error
        assert [found.name for found in tmp_path.iterdir()] == ["old.mp4"]
        assert (tmp_path / "old.mp4").read_bytes() == b"older"


def test_the_name_appears_only_at_the_end(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4", fps=16, width=WIDTH, height=HEIGHT) as writer:
        writer.write(patches(3))
        assert not (tmp_path / "out.mp4").exists()
    assert (tmp_path / "out.mp4").exists()


def test_a_video_without_frames_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="No frame"),
        VideoWriter(tmp_path / "out.mp4", fps=16, width=WIDTH, height=HEIGHT),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_running_out_of_room_names_what_is_needed_and_leaves_nothing(tmp_path: Path) -> None:
    # A limit on the size of files makes the write really fail, wherever ffmpeg happens to be.
    resource = pytest.importorskip("resource", reason="Windows has no limit on file sizes")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with (
            pytest.raises(OutputError) as raised,
            VideoWriter(
                tmp_path / "out.mp4", fps=16, width=64, height=64, crf=1, num_frames=400
            ) as writer,
        ):
            for _ in range(100):
                writer.write(torch.rand(4, 64, 64, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = str(raised.value)
    assert "no room" in told and "bytes are needed" in told
    assert "are free" in told and "out.mp4" in told
    assert not list(tmp_path.iterdir())


def test_no_file_stays_open_when_not_even_the_first_bytes_can_be_written(tmp_path: Path) -> None:
    """PyAV keeps a file that it has opened itself open for ever then."""
    resource = pytest.importorskip("resource", reason="Windows has no limit on file sizes")
    handles = Path("/proc/self/fd")
    if not handles.is_dir():
        handles = Path("/dev/fd")
    before = len(list(handles.iterdir()))
    for _ in range(3):
        with pytest.raises(OutputError):
            write(tmp_path / "out.mp4", patches(1), codec="prores_ks", pix_fmt="yuv422p10le")
        with (
            pytest.raises(OutputError, match="no room"),
            VideoWriter(tmp_path / "out.mp4", fps=16, width=WIDTH, height=HEIGHT) as writer,
        ):
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
            try:
                writer.write(torch.cat([patches(1)] * 60))
                writer._finish()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list(handles.iterdir())) == before
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_both_numbers(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"no room.*bytes are needed.*[\d,]+ are free"),
        VideoWriter(
            tmp_path / "out.mp4", fps=16, width=WIDTH, height=HEIGHT, num_frames=81
        ) as writer,
    ):
        writer.write(patches(1))

        class Full:
            def __init__(self, inner: object) -> None:
                self._inner = inner

            def mux(self, packets: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            def close(self) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

        writer._container = Full(writer._container)
        writer.write(patches(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pix_fmt", "rgb24"),
        ("width", 47),
        ("height", 31),
        ("width", 0),
        ("fps", 0),
        ("fps", -1),
        ("fps", float("nan")),
        ("audio", (torch.zeros(3, 5), 16000)),
        ("audio", (torch.zeros(5), 16000)),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field} ") as raised:
        write(tmp_path / "out.mp4", patches(1), **{field: value})
    assert raised.value.field == field
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{"codec": "no_such"}, {"pix_fmt": "yuv_no_such"}, {"codec": "prores_ks"}]
)
def test_a_codec_that_cannot_is_named(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(OutputError, match=r"out\.mp4"):
        write(tmp_path / "out.mp4", patches(1), **options)
    assert not list(tmp_path.iterdir())


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="frames have shape"):
        write(tmp_path / "out.mp4", torch.zeros(1, HEIGHT + 2, WIDTH, 3))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write(tmp_path / "file" / "out.mp4", patches(1))


# Contents that x264's macroblock tree decided differently from run to run.
def moving(frames: int, width: int, height: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    wide = torch.rand(1, 3, max(2, height // 8), max(2, width // 8), generator=generator)
    picture = torch.nn.functional.interpolate(wide, (height, width + 2 * frames), mode="bilinear")
    clip = torch.stack([picture[0, :, :, i : i + width] for i in range(frames)])
    if kind == "fading":
        clip = clip * torch.linspace(0, 1, frames).view(-1, 1, 1, 1)
    if kind == "noise":
        clip = torch.rand(frames, 3, height, width, generator=generator)
        clip = torch.nn.functional.avg_pool2d(clip, 3, 1, 1)
    return clip.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    "kind",
    [
        "noise", pytest.param("moving", marks=pytest.mark.slow),
        pytest.param("fading", marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("codec", "size", "frames"),
    slow_but(
        lambda case: case[1] in ((208, 144), (64, 64)) or case[0] == "h265" and case[1][0] == 96,
        [("h264", (320, 192), 17), ("h264", (96, 128), 17), ("h264", (208, 144), 9),
         ("h264", (64, 208), 9), ("h264", (64, 64), 33), ("h265", (96, 128), 9),
         ("h265", (192, 112), 9)],
    ),
)  # fmt: skip
def test_equal_runs_give_equal_files(
    tmp_path: Path, codec: str, size: tuple[int, int], frames: int, kind: str
) -> None:
    clip = moving(frames, *size, kind)
    for pix_fmt in ("yuv420p", "yuv444p"):
        files = set()
        for _ in range(4):
            write(tmp_path / "out.mp4", clip, width=size[0], height=size[1], codec=codec,
                  pix_fmt=pix_fmt, crf=18, metadata={"prompt": "{}"},
                  audio=(torch.sin(torch.arange(16000) / 30)[None], 16000))  # fmt: skip
            files.add((tmp_path / "out.mp4").read_bytes())
        assert len(files) == 1


@pytest.mark.parametrize(
    ("frames", "codec"),
    slow_but(
        {(1, "h264"), (1, "h265"), (2, "h265"), (3, "h264")}.__contains__,
        itertools.product((1, 2, 3, 4), ("h264", "h265")),
    ),
)
def test_the_shortest_clips_are_written_every_time(tmp_path: Path, codec: str, frames: int) -> None:
    """x265 leaves the decoding times of one or two frames unset; the muxer took what lay there."""
    files = set()
    for _ in range(12):
        write(tmp_path / "out.mp4", moving(frames, 192, 208, "noise"), width=192, height=208,
              codec=codec, crf=18)  # fmt: skip
        files.add((tmp_path / "out.mp4").read_bytes())
        assert len(read(tmp_path / "out.mp4")[0]) == frames
    assert len(files) == 1


NARROW = """
import sys, torch
from wan_core.render.video import VideoWriter
for side in ((48, 48), (48, 128), (32, 48), (128, 48), (32, 32)):
    for pix_fmt in ("yuv420p", "yuv420p10le", "yuv444p"):
        with VideoWriter(sys.argv[1], fps=16, width=side[0], height=side[1], codec="h265",
                         pix_fmt=pix_fmt) as writer:
            writer.write(torch.rand(9, side[1], side[0], 3))
"""


def test_narrow_pictures_do_not_break_the_process(tmp_path: Path) -> None:
    """x265's vector code wrote beyond its buffers for pictures of 48 pixels."""
    done = subprocess.run(
        [sys.executable, "-c", NARROW, str(tmp_path / "out.mp4")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes there")
def test_a_folder_whose_name_is_no_utf_8_takes_clips(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    write(folder / "latin1 \udce9.mp4", patches(2))
    (found,) = folder.iterdir()
    found.rename(tmp_path / "out.mp4")
    assert len(read(tmp_path / "out.mp4")[0]) == 2


def test_a_folder_that_vanishes_is_not_blamed_on_the_codec(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError) as raised,
        VideoWriter(tmp_path / "out.mp4", fps=16, width=WIDTH, height=HEIGHT) as writer,
    ):
        writer.write(patches(1))

        class Gone:
            def __init__(self, inner: object) -> None:
                self._inner = inner

            def mux(self, packets: object) -> None:
                raise OSError(errno.EIO, "Input/output error")

            def close(self) -> None:
                return None

        writer._container = Gone(writer._container)
        writer.write(patches(1))
    assert "Input/output error" in str(raised.value) and "codec" not in str(raised.value)


def test_x264_encodes_pictures_side_by_side_and_cuts_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices of one picture are too few for many cores; two runs give one file all the same."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    for name in ("one.mp4", "two.mp4"):
        with VideoWriter(tmp_path / name, fps=16, width=256, height=256) as writer:
            writer.write(torch.rand(8, 256, 256, 3, generator=torch.Generator().manual_seed(0)))
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    with av.open(str(tmp_path / "one.mp4")) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    assert [slices_of(packet) for packet in packets] == [1] * 8


@pytest.mark.parametrize(
    ("cores", "width", "height", "threads"),
    [(1, 64, 64, 1), (2, 64, 64, 3), (16, 832, 480, 12), (64, 832, 480, 12), (64, 2560, 1440, 12)],
)
def test_x264_takes_no_more_ram_on_a_machine_of_many_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    cores: int, width: int, height: int, threads: int,
) -> None:  # fmt: skip
    """Each picture that it encodes at once is kept with all that belongs to it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    with VideoWriter(tmp_path / "out.mp4", fps=16, width=width, height=height) as writer:
        writer.write(torch.zeros(2, height, width, 3))
    # x264 writes its settings into the first picture.
    assert f" threads={threads} ".encode() in (tmp_path / "out.mp4").read_bytes()


@pytest.mark.skipif(int(av.__version__.split(".")[0]) < 17, reason="PyAV 17 brought the threads")
def test_colours_are_converted_by_one_thread_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyAV's own number is one for each processor, all started anew for every picture."""
    made: list[Any] = []

    class Counted:
        def __init__(self) -> None:
            self.converter, self.threads = VideoReformatter(), []
            made.append(self)

        def reformat(self, frame: Any, **given: Any) -> Any:
            self.threads.append(given.get("threads"))
            return self.converter.reformat(frame, **given)

    monkeypatch.setattr(video, "VideoReformatter", Counted)
    path, frames = tmp_path / "out.mp4", torch.rand(5, 64, 64, 3)
    with VideoWriter(path, fps=16, width=64, height=64, crf=0, pix_fmt="yuv444p") as writer:
        writer.write(frames)
    shown = read_video(path, "video")
    assert [one.threads for one in made] == [[1] * 5] * 2
    assert (shown / 255 - frames).abs().max() < 0.02


def slices_of(packet: bytes) -> int:
    """Count the coded slices among the units of an H.264 packet, each after its length."""
    at, found = 0, 0
    while at < len(packet):
        found += packet[at + 4] & 31 in (1, 5)
        at += 4 + int.from_bytes(packet[at : at + 4], "big")
    return found


def test_frames_are_encoded_beside_what_makes_them(tmp_path: Path) -> None:
    """``write`` does not wait for a slow encoder until many frames lie before it."""
    go = threading.Event()

    class Slow:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def encode(self, frame: Any) -> Any:
            assert go.wait(20)
            return self._inner.encode(frame)

    frames = patches(8)
    with VideoWriter(tmp_path / "out.mp4", fps=16, width=WIDTH, height=HEIGHT, crf=1) as writer:
        writer._video = Slow(writer._video)
        writer.write(frames)
        assert writer.frames_written == 8 and writer._encoded == 0
        frames.zero_()  # the caller's memory may change before the encoder reads
        go.set()
    write(tmp_path / "plain.mp4", patches(8))
    assert (read(tmp_path / "out.mp4")[0] == read(tmp_path / "plain.mp4")[0]).all()
    assert "mp4 encoder" not in [thread.name for thread in threading.enumerate()]


def test_bytes_of_the_caller_may_change(tmp_path: Path) -> None:
    frames = (patches(4) * 255).round().to(torch.uint8)
    same, changed = frames.clone(), frames.clone()
    write(tmp_path / "same.mp4", same)
    with VideoWriter(tmp_path / "changed.mp4", fps=16, width=WIDTH, height=HEIGHT, crf=1) as writer:
        writer.write(changed)
        changed.zero_()
    assert (tmp_path / "same.mp4").read_bytes() == (tmp_path / "changed.mp4").read_bytes()


@pytest.mark.parametrize("wait", ["put", "join"])
def test_an_interrupt_while_the_encoder_is_waited_for_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: str
) -> None:
    """It would wait for more pictures for ever, and the process for it."""
    left = [KeyboardInterrupt]

    def interrupted(*given: Any) -> None:
        if left:
            raise left.pop()
        proceed(*given)

    with (
        pytest.raises(KeyboardInterrupt),
        VideoWriter(tmp_path / "out.mp4", fps=16, width=WIDTH, height=HEIGHT) as writer,
    ):
        writer.write(patches(3))
        waited = writer._waiting if wait == "put" else writer._encoder
        proceed = getattr(waited, wait)
        monkeypatch.setattr(waited, wait, interrupted)
    assert "mp4 encoder" not in [thread.name for thread in threading.enumerate()]
    assert not list(tmp_path.iterdir())


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("degrees", "matrix"), [
    (0, (1, 0, 0, 1)), (90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0)),
])  # fmt: skip
def test_a_phone_s_video_is_read_upright(
    tmp_path: Path, degrees: int, matrix: tuple[int, ...]
) -> None:
    """Held upright, a phone writes its sensor's rows and, in the track's header, how to turn them.

    The matrix (a, b, 0, c, d, 0, x, y, 1) turns clockwise (ISO 14496-12, 6.2.2): (1, 0) to (a, b).
    """
    write(tmp_path / "o.mp4", patches(3))
    data = (tmp_path / "o.mp4").read_bytes()
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (value << 16 for value in matrix)
    place = data.index(plain, data.index(b"tkhd"))
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data[:place] + turned + data[place + 36 :])
    flat = read_video(tmp_path / "o.mp4", "control.video")
    found = read_video(tmp_path / "turned.mp4", "control.video")
    assert torch.equal(found, flat.rot90(-degrees // 90, (1, 2)))


@pytest.mark.parametrize(
    ("transfer", "kind"), [(1, None), (16, "PQ"), (18, "HLG")], ids=["BT.709", "PQ", "HLG"]
)
def test_hdr_is_said_to_be_read_without_tone_mapping(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, transfer: int, kind: str | None
) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, width=64, height=64)
        stream.codec_context.color_trc = transfer
        for frame in (av.VideoFrame(64, 64, "yuv420p"), None):
            container.mux(stream.encode(frame))
    assert read_video(path, "control.video").shape == (1, 64, 64, 3)
    said = [record.getMessage() for record in caplog.records]
    assert [f"control.video: {str(path)!r} is HDR ({kind})" in text for text in said] == (
        [True] if kind else []
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes that have names")
def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    clip, sound = tmp_path / "clip.mp4", tmp_path / "sound.m4a"
    write(clip, patches(2))
    with av.open(str(sound), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), "float32"), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    (tmp_path / "rays.npy").write_bytes(b"PK\x03\x04 half of a zip")
    os.mkfifo(tmp_path / "pipe.mp4")
    for read_it, name, said in (
        (read_video, sound, "it has no video track"),
        (read_audio, clip, "it has no audio track"),
        (read_video, tmp_path / "none.mp4", "as a video .No such file or directory."),
        (read_audio, tmp_path / "pipe.mp4", "as sound .it is no file."),
        (read_video, tmp_path, "it is no file"),
        (read_numbers, tmp_path / "rays.npy", "as numbers of numpy.save"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            read_it(name) if read_it is read_audio else read_it(name, "control.video")
