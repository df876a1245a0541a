"""Pictures as people have them -> an RGB PIL image, or a float tensor (height, width, 3) in 0..1.

Taken are paths, PIL images of every mode, and arrays and tensors of every number type. A photo with
an orientation tag is turned upright, and 16-bit values keep their brightness, as in diffusers'
``load_image`` and ComfyUI's LoadImage. What is no picture is refused with its field's name. torch,
numpy and Pillow are imported when a picture is read.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any, Final

from ..config import shown
from ..errors import InvalidRequest
from .fields import dense, shown_path
from .fields import path as path_of

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image
    from torch import Tensor

    Picture = Image.Image | Tensor

_ORIENTATION: Final = 0x0112
"""The EXIF tag that says how a camera was held."""
_TURNS: Final = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
    7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
"""What turns a picture with this orientation upright, by the names of Pillow's ``Transpose``."""
_BAD_TAGS: Final = (
    SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, EOFError, OSError,
    struct.error,
)  # fmt: skip
_BEYOND: Final = 0.5
"""How far floats may lie outside 0..1: resizing overshoots by less, other scales by more."""
_WANTED: Final = (
    "a picture is a path, a PIL image, or one (height, width, 3) array or tensor with values 0..1"
)


def load_picture(image: Any, field: str) -> Picture:
    """Turn a path, PIL image, array or tensor into an RGB PIL image or a float tensor (H, W, 3).

    Floats hold values 0..1, and up to a half beyond, which is clamped where the picture is used.
    Unsigned integers fill the range of their type, as images do; signed and wider ones hold
    0..255. Grey pictures may lack the last axis; an alpha channel is dropped. Raises
    InvalidRequest, naming ``field``, for anything else.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return _from_pil(image, field, field)
    if isinstance(image, str) or hasattr(image, "__fspath__"):
        return _from_file(image, field)
    return _from_numbers(image, field)


def to_pil(picture: Picture) -> Image.Image:
    """Return an 8-bit RGB PIL image."""
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture
    import torch

    return Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def picture_size(picture: Picture) -> tuple[int, int]:
    """Return (width, height) in pixels."""
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture.size
    return picture.shape[1], picture.shape[0]


# -- files and PIL images -------------------------------------------------------------------------


def _from_file(image: Any, field: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    name = os.fspath(image)
    if not name.strip():
        raise InvalidRequest(f"{field} is empty; {_WANTED}. None means no picture.", field=field)
    if isinstance(name, str) and name.partition(":")[0] in ("http", "https", "ftp", "data"):
        raise InvalidRequest(
            f"{field} is {shown(name)}; WanFit fetches nothing. Save the picture and give "
            "its path.",
            field=field,
        )
    place = path_of(image, field)
    named = shown_path(place)
    if os.path.exists(place) and not os.path.isfile(place):  # a pipe would be waited for
        raise InvalidRequest(
            f"{field}: {named} cannot be read as a picture: it is no file.", field=field
        )
    try:
        opened = Image.open(place)
    except UnidentifiedImageError as err:
        raise InvalidRequest(
            f"{field}: {named} cannot be read as a picture: {_what_it_is(place)}. Save it as PNG, "
            "JPEG or WebP.",
            field=field,
        ) from err
    except Exception as err:  # as in _from_pil
        raise _unreadable(field, f"{field}: {named}", err) from err
    with opened:
        return _from_pil(opened, field, f"{field}: {named}")


def _what_it_is(place: Path) -> str:
    """Say what a file is that Pillow does not know, by its first bytes; its name may say another.

    The brands are those of ISO 23008-12 (HEIF) and of AVIF.
    """
    with open(place, "rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty"
    if start[4:8] == b"ftyp":
        brand = start[8:12].decode("latin-1")
        kinds = {"av": "AVIF, which this Pillow lacks", "he": "HEIC, as phones make", "mi": "HEIF"}
        return f"it is {kinds.get(brand[:2], 'a video, or another file of that family')}"
    if start.lstrip()[:1] in (b"<", b"{"):
        return "it is text, such as a drawing (SVG) or a web page in place of the picture"
    return "Pillow knows no such format"


def _from_pil(image: Image.Image, field: str, name: str) -> Image.Image:
    if not image.width or not image.height:
        raise InvalidRequest(
            f"{name} is {image.width}x{image.height}; a picture has pixels.", field=field
        )
    if image.format == "EPS":  # by its first bytes, whatever it is called
        raise InvalidRequest(
            f"{name} is a program in PostScript, and nothing from outside is run. Save it as PNG, "
            "JPEG or WebP.",
            field=field,
        )
    try:
        return _upright(image, _eight_bits(image, name, field))
    except (InvalidRequest, MemoryError):
        raise
    except Exception as err:
        # Pillow's decoders raise whatever they meet in a broken file: OSError, SyntaxError,
        # ValueError, EOFError, struct.error, zlib.error ...
        raise _unreadable(field, name, err) from err


def _unreadable(field: str, name: str, err: Exception) -> InvalidRequest:
    from PIL import Image

    if isinstance(err, Image.DecompressionBombError | Image.DecompressionBombWarning):
        why = "it has more pixels than Pillow opens. Scale it down to the size of the clip"
    elif isinstance(err, FileNotFoundError):
        why = "there is no such file"
    else:
        why = f"{getattr(err, 'strerror', None) or err or type(err).__name__}"
    return InvalidRequest(f"{name} cannot be read as a picture: {why}.", field=field)


def _eight_bits(image: Image.Image, name: str, field: str) -> Image.Image:
    """Return the image in mode RGB. Pillow alone would clip 16-bit greys at 255 of 65,535."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F":
            _check_floats(float(values.min()), float(values.max()), name, field)
            grey = values * 255.0
        else:
            # Mode I is what some versions of Pillow make of a 16-bit grey file.
            if values.min() < 0 or values.max() > 0xFFFF:
                raise InvalidRequest(
                    f"{name} holds greys from {values.min()} to {values.max()}; of 16 bits are "
                    "those from 0 to 65535. Save it with 8 or 16 bits.",
                    field=field,
                )
            grey = values / 257.0
        image = Image.fromarray(grey.clip(0, 255).round().astype("uint8"))
    return image.convert("RGB")


def _upright(source: Image.Image, picture: Image.Image) -> Image.Image:
    """Turn the picture as the source's orientation tag says.

    ``ImageOps.exif_transpose`` does this too, but it writes the other tags anew, and fails where
    one of them is damaged.
    """
    from PIL import Image

    try:
        turn = _TURNS.get(source.getexif().get(_ORIENTATION, 1))
    except _BAD_TAGS:  # tags that cannot be parsed say nothing; the pixels are whole
        turn = None
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


# -- arrays and tensors ---------------------------------------------------------------------------


def _from_numbers(image: Any, field: str) -> Tensor:
    import numpy as np
    import torch

    if not isinstance(image, torch.Tensor):
        if not isinstance(image, np.ndarray):
            raise InvalidRequest(f"{field} is {_said(image)}; {_WANTED}.", field=field)
        if image.dtype.kind not in "buif":
            raise InvalidRequest(f"{field} has the type {image.dtype}; {_WANTED}.", field=field)
        # Copied in one piece and in this machine's byte order: torch takes neither flipped arrays
        # nor foreign ones, nor floats of more than 64 bits.
        wide = image.dtype.kind == "f" and image.dtype.itemsize > 8
        kind = "float64" if wide else image.dtype.newbyteorder("=")
        image = torch.from_numpy(np.array(image, dtype=kind, order="C"))
    pixels = _three_axes(dense(image, field), field)
    values = _unit(pixels, field)
    return values.expand(*values.shape[:2], 3) if values.shape[2] == 1 else values[..., :3]


def _said(image: Any) -> str:
    if isinstance(image, list | tuple):
        return f"a {type(image).__name__} of {len(image)}"
    if isinstance(image, bytes):
        return f"{len(image):,} bytes"
    return shown(image)


def _three_axes(pixels: Tensor, field: str) -> Tensor:
    """Return (H, W, 1, 3 or 4); a leading axis of one picture is dropped, a grey one gets one."""
    shape = tuple(pixels.shape)
    if pixels.ndim == 4 and shape[0] == 1:
        pixels = pixels[0]
    elif pixels.ndim == 2:
        pixels = pixels.unsqueeze(-1)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
        first = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4)
        hint = " This one has its channels first: permute it to (1, 2, 0)." if first else ""
        if pixels.ndim == 4:
            hint = f" This is a batch of {shape[0]}: give one of them."
        raise InvalidRequest(f"{field} has shape {shape}; {_WANTED}.{hint}", field=field)
    if not pixels.numel():
        raise InvalidRequest(f"{field} has shape {shape}; a picture has pixels.", field=field)
    return pixels


def _unit(pixels: Tensor, field: str) -> Tensor:
    """Return float32 values on the CPU, 0..1 for black to white."""
    import torch

    kind = pixels.dtype
    if kind.is_complex:
        raise InvalidRequest(f"{field} has the type {kind}; {_WANTED}.", field=field)
    pixels = pixels.to("cpu")
    if kind.is_floating_point:
        pixels = pixels.float()
        low, high = (float(value) for value in pixels.aminmax())
        _check_floats(low, high, field, field)
        return pixels
    if kind == torch.uint8:
        return pixels.float() / 255.0
    # torch has hardly an operation for uint16, and none for the wider unsigned types.
    pixels = pixels.to(torch.int64)
    top = {torch.bool: 1, torch.uint16: 0xFFFF}.get(kind, 255)
    low, high = (int(value) for value in pixels.aminmax())
    if low < 0 or high > top:
        raise InvalidRequest(
            f"{field} holds whole numbers from {low} to {high}; of the type {kind}, 0 to {top} are "
            "black to white.",
            field=field,
        )
    return pixels.float() / top


def _check_floats(low: float, high: float, name: str, field: str) -> None:
    # Both comparisons are False for NaN, which min and max pass on.
    if low >= -_BEYOND and high <= 1 + _BEYOND:
        return
    if low != low or high != high or abs(low) == float("inf") or abs(high) == float("inf"):
        raise InvalidRequest(
            f"{name} holds values that are no finite numbers (NaN or infinity). It was spoilt "
            "where it was made, often by a VAE in half precision.",
            field=field,
        )
    cure = "Divide it by 255." if high > 2 else "Scale it to 0..1."
    raise InvalidRequest(
        f"{name} holds values from {low:.3g} to {high:.3g}; floats are 0 (black) to 1 (white). "
        f"{cure}",
        field=field,
    )


def describe_loss(image: Any, field: str) -> str | None:
    """Say what of a picture as it was given is not used: transparency, or later pictures."""
    from PIL import Image

    if isinstance(image, str) or hasattr(image, "__fspath__"):
        with Image.open(path_of(image, field)) as opened:
            return _lost(opened, field)
    if isinstance(image, Image.Image):
        return _lost(image, field)
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) > 2 and shape[-1] == 4:
        alpha = image[..., 3]
        if bool((alpha < max(float(alpha.max()), 1.0)).any()):
            return f"{field} {_TRANSPARENT}"
    return None


_TRANSPARENT: Final = (
    "has transparent pixels; the colours that lie under them are used. Lay it on a background."
)


def _lost(image: Image.Image, field: str) -> str | None:
    # MPO is a phone's JPEG with a map of depths or brightness behind the picture.
    if (count := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        return f"{field} holds {count} pictures; the first is used."
    if not image.has_transparency_data:
        return None
    least: Any = image.convert("RGBA").getchannel("A").getextrema()[0]
    return f"{field} {_TRANSPARENT}" if least < 255 else None


def describe_stretch(picture: Picture, field: str, width: int, height: int) -> str | None:
    """Say that a picture's proportions will change, or return None if they stay."""
    have, tall = picture_size(picture)
    if abs(have * height / (tall * width) - 1) <= 0.02:
        return None
    return (
        f"{field} is {have}x{tall} and is stretched to {width}x{height}; crop it to keep its "
        "proportions."
    )
