"""The estimate as a picture: a bar per stage, and a line at the memory that can be used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..wan_core.config import GIB, MIB

if TYPE_CHECKING:
    from ..wan_core.config import MemoryEstimate

_WIDTH, _ROW, _LABEL, _TOP = 640, 34, 190, 44
_INK, _PAPER = (230, 230, 230), (32, 32, 36)
_WEIGHTS, _ACTIVATIONS = (70, 130, 200), (120, 190, 120)
_TOO_MUCH, _LINE = (220, 80, 70), (240, 200, 80)


def estimate_picture(estimate: MemoryEstimate) -> torch.Tensor:
    """Draw an estimate; returns an IMAGE, float32 (1, height, width, 3), 0..1."""
    stages = estimate.stages
    image = Image.new("RGB", (_WIDTH, _TOP + _ROW * len(stages) + 30), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    limit = None if estimate.available_mb is None else estimate.available_mb * MIB
    peak = max(stage.device_bytes for stage in stages)
    scale = (_WIDTH - _LABEL - 90) / max(peak, min(limit or 0, 4 * peak), 1)
    verdict = {True: ": fits", False: ": does not fit", None: ""}[estimate.fits]
    draw.text((10, 10), f"predicted, in GiB, on {estimate.device}{verdict}", _INK, font)
    for row, stage in enumerate(stages):
        top = _TOP + row * _ROW
        draw.text((10, top + 6), stage.name, _INK, font)
        _bar(draw, top, (0, stage.weights_bytes * scale), _WEIGHTS)
        _bar(draw, top, (stage.weights_bytes * scale, stage.device_bytes * scale), _ACTIVATIONS)
        if limit is not None and stage.device_bytes > limit:
            _bar(draw, top, (limit * scale, stage.device_bytes * scale), _TOO_MUCH)
    _legend(draw, font, image.height - 22)
    if limit is not None and limit * scale <= _WIDTH - _LABEL:
        x, text = _LABEL + limit * scale, f"{limit / GIB:.1f} usable"
        draw.line((x, _TOP - 6, x, image.height - 30), _LINE, width=2)
        width = draw.textlength(text, font)
        draw.text((min(x - width / 2, _WIDTH - width - 6), _TOP - 20), text, _LINE, font)
    # Numbers come last, each on a patch of background, so that the line does not cross them.
    for row, stage in enumerate(stages):
        place = (_LABEL + stage.device_bytes * scale + 6, _TOP + row * _ROW + 6)
        text = f"{stage.device_bytes / GIB:.2f}"
        box = draw.textbbox(place, text, font)
        draw.rectangle((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2), _PAPER)
        draw.text(place, text, _INK, font)
    return torch.from_numpy(np.asarray(image).astype("float32") / 255.0).unsqueeze(0)


def _bar(draw: Any, top: int, span: tuple[float, float], colour: tuple[int, int, int]) -> None:
    draw.rectangle((_LABEL + span[0], top, _LABEL + span[1], top + _ROW - 12), colour)


def _legend(draw: Any, font: Any, top: int) -> None:
    entries = ((0, _WEIGHTS, "weights"), (90, _ACTIVATIONS, "work"), (160, _TOO_MUCH, "too much"))
    for offset, colour, text in entries:
        left = _LABEL + offset
        draw.rectangle((left, top, left + 12, top + 12), colour)
        draw.text((left + 18, top), text, _INK, font)
