"""Pictures as people have them: every form is read as what it shows, or refused by its name."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from wan_core.errors import InvalidRequest, WanError
from wan_core.job import load_picture, picture_size, to_pil
from wan_core.job.pictures import describe_loss
from wan_core.sampling import prepare_picture

ORIENTATION = 0x0112
WIDE = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
HALF = (16, 16, 3)


def mean(image: Any) -> float:
    """The brightness of a picture as the model gets it, 0 (black) to 1 (white)."""
    return float(prepare_picture(load_picture(image, "image"), 16, 16).mean()) / 2 + 0.5


def refused(image: Any, field: str = "last_image") -> str:
    with pytest.raises(InvalidRequest) as raised:
        load_picture(image, field)
    assert raised.value.field == field and str(raised.value).startswith(field)
    assert len(str(raised.value)) < 1400
    return str(raised.value)


# -- turned pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_turned_upright_as_pillow_does(
    tmp_path: Path, turn: int, form: str
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    path = tmp_path / f"phone.{form.lower()}"
    Image.fromarray(WIDE).save(path, format=form, exif=exif)
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    for given in (path, str(path), Image.open(path)):
        found = load_picture(given, "image")
        assert picture_size(found) == upright.size == ((20, 40) if turn > 4 else (40, 20))
        assert np.array_equal(np.asarray(found), np.asarray(upright))


@pytest.mark.parametrize("tag", [0, 9, 255])
def test_an_orientation_that_is_none_turns_nothing(tmp_path: Path, tag: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    Image.fromarray(WIDE).save(tmp_path / "odd.png", exif=exif)
    assert picture_size(load_picture(tmp_path / "odd.png", "image")) == (40, 20)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"]
)
def test_damaged_tags_cost_no_picture(tmp_path: Path, exif: bytes) -> None:
    Image.fromarray(WIDE).save(tmp_path / "odd.jpg", exif=exif)
    assert picture_size(load_picture(tmp_path / "odd.jpg", "image")) == (40, 20)


# -- modes and types ------------------------------------------------------------------------------

GREYS = {
    "L": 128, "LA": (128, 9), "P": 128, "RGB": (128,) * 3, "RGBA": (128, 128, 128, 0),
    "RGBX": (128, 128, 128, 0), "CMYK": (0, 0, 0, 127), "YCbCr": (128, 128, 128),
    "HSV": (0, 0, 128), "LAB": (137, 128, 128), "I": 32768, "F": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("mode", GREYS)
def test_grey_is_grey_in_every_mode_of_pillow(mode: str) -> None:
    image = Image.new(mode, (16, 16), GREYS[mode])
    if mode == "P":
        image.putpalette([value for value in range(256) for _ in range(3)])
    assert mean(image) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_files_keep_their_brightness(tmp_path: Path, order: str) -> None:
    for level in (0, 257, 32768, 65535):
        grey = np.full((16, 16), level, order)
        path = tmp_path / f"{level}.{'png' if order == '<u2' else 'tiff'}"
        Image.fromarray(grey).save(path)
        assert mean(path) == pytest.approx(level / 65535, abs=0.003)


FULL = {"uint8": 255, "uint16": 65535, "int16": 255, "int32": 255, "int64": 255, "uint32": 255,
        "uint64": 255, "bool": 1, "float16": 1, "float32": 1, "float64": 1,
        "longdouble": 1}  # fmt: skip


@pytest.mark.parametrize("kind", FULL)
def test_black_grey_and_white_of_every_number_type(kind: str) -> None:
    for level in (0, 0.5, 1):
        value = np.full(HALF, FULL[kind] * level).astype(kind)
        wanted = float(value.reshape(-1)[0]) / FULL[kind]
        forms: list[Any] = [value, value[..., ::-1], value[::-1], np.asfortranarray(value)]
        forms += [value.astype(value.dtype.newbyteorder(">"))]
        if kind not in ("longdouble", "uint32", "uint64"):
            forms += [torch.from_numpy(value), torch.from_numpy(value).unsqueeze(0)]
        value.setflags(write=False)
        for form in [*forms, value]:
            assert mean(form) == pytest.approx(wanted, abs=0.005), (kind, level)


def test_tensors_of_every_float_type_and_shape() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        grey = torch.full((16, 16, 3), 0.5, dtype=dtype, requires_grad=True)
        assert mean(grey) == pytest.approx(0.5, abs=0.005)
    for shape in ((16, 16), (16, 16, 1), (1, 16, 16, 1), (16, 16, 4), (1, 16, 16, 3)):
        assert picture_size(load_picture(torch.full(shape, 0.5), "image")) == (16, 16)
        assert mean(torch.full(shape, 0.5)) == pytest.approx(0.5, abs=0.005)
        assert mean(np.full(shape, 0.5)) == pytest.approx(0.5, abs=0.005)


def test_what_resizing_overshoots_is_clamped() -> None:
    assert mean(torch.full(HALF, 1.2)) == 1
    assert mean(torch.full(HALF, -0.2)) == 0


def test_what_was_right_stays_bit_for_bit() -> None:
    assert np.array_equal(np.asarray(load_picture(Image.fromarray(WIDE), "image")), WIDE)
    assert torch.equal(
        load_picture(WIDE, "image"), torch.from_numpy(WIDE.astype("float32") / 255.0)
    )
    floats = torch.rand(5, 7, 4, generator=torch.manual_seed(0))
    assert torch.equal(load_picture(floats, "image"), floats[..., :3])
    assert np.array_equal(np.asarray(to_pil(load_picture(WIDE, "image"))), WIDE)


# -- what is no picture ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 5, 3), (5, 0, 3), (1, 0, 0, 3), (0, 0)])
def test_an_empty_picture_is_refused(shape: tuple[int, ...]) -> None:
    for image in (torch.zeros(shape), np.zeros(shape), np.zeros(shape, np.uint8)):
        assert "a picture has pixels" in refused(image)


def test_an_empty_pil_image_is_refused() -> None:
    assert "0x5" in refused(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_value_that_is_no_number_is_refused(bad: float, dtype: torch.dtype) -> None:
    picture = torch.full(HALF, 0.5, dtype=dtype)
    picture[3, 4, 1] = bad
    assert "NaN or infinity" in refused(picture)
    assert "NaN or infinity" in refused(Image.fromarray(picture.float().numpy()[..., 1]))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.full(HALF, 255.0), "Divide it by 255"),
        (np.full(HALF, 128.0), "Divide it by 255"),
        (torch.full(HALF, -1.0), "Scale it to 0..1"),
        (np.full(HALF, 256, np.int32), "from 256 to 256"),
        (np.full(HALF, -1, np.int8), "from -1 to -1"),
        (torch.full((3, 16, 20), 0.5), "permute it to (1, 2, 0)"),
        (torch.zeros(2, 16, 16, 3), "batch of 2"),
        (torch.zeros(16, 16, 2), "(16, 16, 2)"),
        (torch.zeros(16), "(16,)"),
        (torch.zeros((16, 16, 3), dtype=torch.complex64), "complex64"),
        (torch.zeros(16, 16, 3, device="meta"), "without values"),
        (torch.zeros(16, 16, 3).to_sparse(), "stored as torch.sparse_coo"),
        (torch.quantize_per_tensor(torch.zeros(16, 16, 3), 1.0, 0, torch.quint8), "quantised"),
        (np.zeros(HALF, dtype=object), "object"),
        (np.full(HALF, "a"), "<U1"),
        ([Image.new("RGB", (4, 4))], "a list of 1"),
        (b"\x89PNG", "4 bytes"),
        (5, "5"),
        (object(), "object"),
        (Image.new("I", (4, 4), 70000), "70000"),
        (Image.new("F", (4, 4), 200.0), "Divide it by 255"),
        ("https://example.com/cat.png", "fetches nothing"),
        ("data:image/png;base64," + "A" * 5000, "fetches nothing"),
        ("no such file.png", "no such file.png"),
        ("a" * 5000 + "the end.png", "the end.png"),
        ("nul\0byte.png", "\\x00"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_picture_is_named(image: Any, said: str) -> None:
    assert said in refused(image)


def test_a_closed_image_is_named(tmp_path: Path) -> None:
    Image.fromarray(WIDE).save(tmp_path / "in.png")
    image = Image.open(tmp_path / "in.png")
    image.close()
    assert "cannot be read as a picture" in refused(image)


def test_a_folder_and_a_text_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    assert "notes.png" in refused(tmp_path / "notes.png")
    assert "cannot be read" in refused(tmp_path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_broken_file_is_a_named_error_or_a_picture(tmp_path: Path, form: str) -> None:
    whole = io.BytesIO()
    Image.fromarray(WIDE).save(whole, format=form)
    data = whole.getvalue()
    rng = np.random.default_rng(1)
    broken = [data[: len(data) * cut // 12] for cut in range(12)]
    for _ in range(40):
        mutant = bytearray(data)
        mutant[rng.integers(len(data))] = rng.integers(256)
        broken.append(bytes(mutant))
    named = 0
    for index, content in enumerate(broken):
        path = tmp_path / f"{index}.bin"
        path.write_bytes(content)
        try:
            load_picture(path, "image")
            with Image.open(path) as opened:
                load_picture(opened, "image")
        except InvalidRequest as error:
            assert error.field == "image"
            named += 1
        except (OSError, SyntaxError, ValueError):
            assert index < 12, "Image.open of the test itself"
    assert named >= 6


def huge(path: Path, side: int) -> Path:
    """A PNG of one bit a pixel: small on disk, vast in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + end

    rows = (b"\0" + bytes(side // 8)) * 16
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
    )
    return path


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [16000, 20000, 60000])
def test_a_picture_beyond_pillows_limit_is_a_named_error(tmp_path: Path, side: int) -> None:
    with pytest.raises(WanError, match=r"huge\.png cannot be read as a picture"):
        load_picture(huge(tmp_path / "huge.png", side), "image")


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    Image.fromarray(WIDE).save(tmp_path / "in.png")
    assert picture_size(load_picture("~/in.png", "image")) == (40, 20)


# -- what a file is, and what of it is lost -------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"", "it is empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC, as phones make"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "it is HEIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isomavc1", "it is a video"),
        (b"<!DOCTYPE html><html>404</html>", "a web page in place of the picture"),
        (b'\n <svg xmlns="http://www.w3.org/2000/svg"/>', "such as a drawing (SVG)"),
        (b"\x93NUMPY", "Pillow knows no such format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "a program in Post"),
    ],
)
def test_a_file_under_a_picture_s_name_is_told_by_its_content(
    tmp_path: Path, start: bytes, said: str
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(start)
    assert said in refused(path) and "PNG" in refused(path)


def test_no_picture_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has Ghostscript run a PostScript file, under whatever name and also when opened."""
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(args))
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **more: started.append(args))
    path = tmp_path / "photo.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with Image.open(path) as opened:
        for given in (path, opened):
            assert "nothing from outside is run" in refused(given)
    assert not started


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes that have names")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "it is no file" in refused(tmp_path / "pipe.png")


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_no_name_is_not_the_folder_one_is_in(text: str) -> None:
    assert "is empty" in refused(text) and "None means no picture" in refused(text)


def test_transparency_and_later_pictures_are_said_to_be_lost(tmp_path: Path) -> None:
    plain = Image.fromarray(WIDE)
    clear, opaque = plain.copy(), plain.copy()
    clear.putalpha(Image.linear_gradient("L").resize(plain.size))
    opaque.putalpha(255)
    palette = plain.convert("P")
    palette.info["transparency"] = int(np.asarray(palette)[0, 0])
    seen = np.dstack([WIDE, np.asarray(clear)[..., 3]])
    for name, image in {"a.png": clear, "la.png": clear.convert("LA"), "p.png": palette}.items():
        image.save(tmp_path / name)
        for given in (image, tmp_path / name, str(tmp_path / name)):
            assert "transparent pixels" in str(describe_loss(given, "image")), name
    unseen = torch.tensor(np.dstack([WIDE, np.zeros(WIDE.shape[:2], np.uint8)]) / 255.0)
    thin = torch.cat([unseen[..., :3], torch.full_like(unseen[..., :1], 0.7)], -1)
    for numbers in (seen, torch.tensor(seen / 255.0), unseen, thin):
        assert str(describe_loss(numbers, "image")).startswith("image has transparent pixels")
    turned = [ImageOps.flip(plain), ImageOps.mirror(plain)]
    plain.save(tmp_path / "moving.gif", save_all=True, append_images=turned)
    plain.save(tmp_path / "plain.jpg")
    said = describe_loss(tmp_path / "moving.gif", "last_image")
    assert said == "last_image holds 3 pictures; the first is used."
    whole = np.dstack([WIDE, np.full(WIDE.shape[:2], 255, np.uint8)])
    for nothing in (plain, opaque, tmp_path / "plain.jpg", WIDE, whole, torch.tensor(WIDE / 255.0),
                    WIDE[..., 0], plain.convert("L"), plain.convert("CMYK")):  # fmt: skip
        assert describe_loss(nothing, "image") is None
