"""Frames with known colours, written to an mp4 and read back."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from wan_core.render.video import VideoWriter

HEIGHT, WIDTH = 32, 48


def patches(frames: int) -> torch.Tensor:
    """Flat coloured quarters that change from frame to frame, (frames, HEIGHT, WIDTH, 3)."""
    clip = torch.zeros(frames, HEIGHT, WIDTH, 3)
    for index in range(frames):
        level = index / max(frames - 1, 1)
        clip[index, :16, :24] = torch.tensor([1.0, 0.0, level])
        clip[index, :16, 24:] = torch.tensor([0.0, level, 0.2])
        clip[index, 16:, :24] = torch.tensor([level, level, level])
        clip[index, 16:, 24:] = torch.tensor([0.1, 0.2, 1.0])
    return clip


def write(path: Path, clip: torch.Tensor, **options: object) -> None:
    settings: dict[str, object] = {"fps": 16, "width": WIDTH, "height": HEIGHT, "crf": 1}
    with VideoWriter(path, **(settings | options)) as writer:  # type: ignore[arg-type]
        for start in range(0, len(clip), 4):
            writer.write(clip[start : start + 4])


def read(path: Path) -> tuple[np.ndarray, Fraction, dict[str, str], list[float]]:
    """Frames (f, H, W, 3) uint8, frames per second, metadata and the time of each frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        times = [float(frame.time or 0) for frame in frames]
        assert stream.average_rate is not None
        return pictures, stream.average_rate, dict(container.metadata), times


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes of a picture, a video or a mask."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """The same as floats 0..1."""
    return torch.from_numpy(values.astype(np.float32) / 255.0)


def picture() -> Image.Image:
    """Random pixels, 32 x 32."""
    return Image.fromarray(pixels(32, 32, 3))
