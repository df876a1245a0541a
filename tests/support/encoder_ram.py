"""Writes a video in a process of its own and prints, as JSON, the anonymous memory that it took.

``python -m support.encoder_ram CODEC PIX_FMT WIDTH HEIGHT CORES FRAMES``: the encoder is told of so
many processors, whatever the machine has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

import wan_core.render.video as video
from wan_core.job import encoder_bytes, encoder_options
from wan_core.loading import give_back_freed

from .ram_peaks import Peaks, anonymous


def main(codec: str, pix_fmt: str, width: int, height: int, cores: int, frames: int) -> Any:
    """Return what was foreseen and what was measured, in bytes."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 200, (height // 8, width // 8, 3), generator=g, dtype=torch.uint8)
    picture = coarse.repeat_interleave(8, 0).repeat_interleave(8, 1)
    picture += torch.randint(0, 40, (height, width, 3), generator=g, dtype=torch.uint8)

    def told(encoder: str, *numbers: int) -> dict[str, str]:
        options = encoder_options(encoder, *numbers)
        if encoder == "libx265":
            options["x265-params"] += f":pools={cores}"
        return options

    with (
        patch("wan_core.job.inputs.processors", lambda: cores),
        patch.object(video, "encoder_options", told),
        TemporaryDirectory() as folder,
    ):
        foreseen = encoder_bytes(codec, pix_fmt, width, height, frames)
        del coarse
        give_back_freed()  # the encoder would take it, and seem to take less
        before = anonymous()
        with (
            Peaks() as peaks,
            video.VideoWriter(
                Path(folder) / "a.mp4", fps=16, width=width, height=height, codec=codec,
                pix_fmt=pix_fmt,
            ) as writer,
        ):  # fmt: skip
            for index in range(frames):
                writer.write(picture.roll(3 * index, 1)[None])
    return {"foreseen": foreseen, "measured": max(peaks.of.values()) - before}


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.stdout.write("\n" + json.dumps(main(given[0], given[1], *map(int, given[2:]))) + "\n")
