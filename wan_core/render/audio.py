"""Reads sound from a file for ``VideoWriter``, with PyAV (ffmpeg's libraries)."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import av
import torch
from torch import Tensor

from ..errors import InvalidRequest
from ..job import AUDIO_RATES

_FALLBACK_RATE = 48000


def read_audio(path: str | os.PathLike[str], seconds: float | None = None) -> tuple[Tensor, int]:
    """Read a file's first sound track: (waveform (1 or 2 channels, samples), samples per second).

    Reads no more than ``seconds``. More than two channels are mixed down to two. A sample rate that
    an mp4 cannot hold is converted to 48,000. Raises InvalidRequest if there is no sound to read.
    """
    pieces: list[Tensor] = []
    samples = 0
    try:
        # As a file whatever it is called, and with nothing but files behind it: ffmpeg would follow
        # an address, and those in a playlist.
        named = f"file:{os.path.expanduser(os.fspath(path))}"
        with av.open(named, options={"protocol_whitelist": "file"}) as container:
            if not container.streams.audio:
                raise InvalidRequest(f"audio: {str(path)!r} has no sound track.", field="audio")
            stream = container.streams.audio[0]
            rate = stream.rate if stream.rate in AUDIO_RATES else _FALLBACK_RATE
            layout = "mono" if stream.channels == 1 else "stereo"
            wanted = None if seconds is None else int(seconds * rate) + 1
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
            for frame in chain(container.decode(stream), [None]):
                for part in resampler.resample(frame):
                    pieces.append(torch.from_numpy(part.to_ndarray()))
                    samples += pieces[-1].shape[1]
                if wanted is not None and samples >= wanted:
                    break
    except (OSError, ValueError, av.FFmpegError) as err:
        raise InvalidRequest(
            f"audio: {str(path)!r} cannot be read as sound ({err}).", field="audio"
        ) from err
    if not samples:
        raise InvalidRequest(f"audio: {Path(path).name!r} holds no samples.", field="audio")
    return torch.cat(pieces, dim=1)[:, :wanted].contiguous(), rate
