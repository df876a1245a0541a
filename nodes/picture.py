"""The estimate as a picture: a bar per stage against the line of what can be used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from ..wan_core.config import MemoryEstimate

_WIDTH, _ROW, _LABEL, _TOP = 640, 34, 190, 44
_GIB = 2**30
_INK, _PAPER = (230, 230, 230), (32, 32, 36)
_WEIGHTS, _ACTIVATIONS = (70, 130, 200), (120, 190, 120)
_TOO_MUCH, _LINE = (220, 80, 70), (240, 200, 80)


def estimate_picture(estimate: MemoryEstimate) -> torch.Tensor:
    """Draw an estimate; an IMAGE, float32 (1, height, width, 3), 0..1."""
    stages = estimate.stages
    image = Image.new("RGB", (_WIDTH, _TOP + _ROW * len(stages) + 30), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    limit = None if estimate.available_mb is None else estimate.available_mb * 2**20
    peak = max(stage.device_bytes for stage in stages)
    scale = (_WIDTH - _LABEL - 90) / max(peak, min(limit or 0, 4 * peak), 1)
    verdict = {True: "fits", False: "does not fit", None: ""}[estimate.fits]
    draw.text((10, 10), f"predicted, in GiB on {estimate.device}  {verdict}", _INK, font)
    for row, stage in enumerate(stages):
        top = _TOP + row * _ROW
        over = limit is not None and stage.device_bytes > limit
        draw.text((10, top + 6), stage.name, _INK, font)
        middle = _LABEL + stage.weights_bytes * scale
        end = _LABEL + stage.device_bytes * scale
        draw.rectangle((_LABEL, top, middle, top + _ROW - 12), _WEIGHTS)
        draw.rectangle((middle, top, end, top + _ROW - 12), _TOO_MUCH if over else _ACTIVATIONS)
        draw.text((end + 6, top + 6), f"{stage.device_bytes / _GIB:.2f}", _INK, font)
    _legend(draw, font, image.height - 22)
    if limit is not None and limit * scale <= _WIDTH - _LABEL:
        x = _LABEL + limit * scale
        draw.line((x, _TOP - 6, x, image.height - 30), _LINE, width=2)
        draw.text((min(x - 60, _WIDTH - 150), _TOP - 20), f"{limit / _GIB:.1f} usable", _LINE, font)
    return torch.from_numpy(np.asarray(image).astype("float32") / 255.0).unsqueeze(0)


def _legend(draw: Any, font: Any, top: int) -> None:
    for left, colour, text in ((_LABEL, _WEIGHTS, "weights"), (_LABEL + 90, _ACTIVATIONS, "work")):
        draw.rectangle((left, top, left + 12, top + 12), colour)
        draw.text((left + 18, top), text, _INK, font)
