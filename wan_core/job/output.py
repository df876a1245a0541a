"""Where a job's video goes and how it is written: the values of path, journal, codec, sound.

``inputs.check_outputs`` tries what these values ask for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import CODECS, RESUME, GenerationConfig, shown
from ..errors import InvalidRequest
from .fields import choice, flag, path, shown_path, text, whole

PIXEL_FORMATS = ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le")
AUDIO_RATES = (
    8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000
)  # fmt: skip
"""Sample rates in Hz of AAC, the sound of an mp4."""


def output_fields(config: GenerationConfig) -> dict[str, Any]:
    """Check the fields that say how the video is kept, and return their plain values."""
    output = _output(config)
    folder = config.journal_folder
    return {
        "resume": _resume(config),
        "journal_folder": None if folder is None else path(folder, "journal_folder"),
        "output_path": output,
        "codec": choice(CODECS[0] if config.codec is None else config.codec, "codec", CODECS),
        "crf": whole(config.crf, "crf", 0, 51),
        "pix_fmt": choice(config.pix_fmt, "pix_fmt", PIXEL_FORMATS),
    }


def check_metadata(metadata: Any) -> None:
    """Check that all names and values are texts, which is what an mp4 can hold."""
    if not isinstance(metadata, Mapping):
        raise InvalidRequest(
            f"output_metadata is {shown(metadata)}; names and their texts are needed.",
            field="output_metadata",
        )
    if "" in metadata:
        raise InvalidRequest(
            "output_metadata holds a text without a name; name it.", field="output_metadata"
        )
    for name, value in metadata.items():
        for part, what in ((name, "the name"), (value, f"{shown(name)} is")):
            if not isinstance(part, str):
                raise InvalidRequest(
                    f"output_metadata: {what} {shown(part)}; an mp4 holds texts. Turn it into one, "
                    "for example with json.dumps.",
                    field="output_metadata",
                )
            text(part, "output_metadata")
            if "\0" in part:
                raise InvalidRequest(
                    f"output_metadata: {shown(name)} holds the character \\0, where a text in an "
                    "mp4 ends. Leave it out.",
                    field="output_metadata",
                )


def audio_rate(audio: Any) -> int:
    """Check the form of ``audio`` and return its samples per second."""
    if not isinstance(audio, tuple | list) or len(audio) != 2:
        raise InvalidRequest(
            f"audio is {shown(audio)}; a pair (waveform, samples per second) is needed.",
            field="audio",
        )
    shape = tuple(getattr(audio[0], "shape", ()))
    if len(shape) != 2 or shape[0] not in (1, 2) or not shape[1]:
        raise InvalidRequest(
            f"audio has shape {shape}; a waveform is (1 or 2 channels, samples).", field="audio"
        )
    try:
        rate = whole(audio[1], "audio", min(AUDIO_RATES), max(AUDIO_RATES))
    except InvalidRequest:
        rate = 0
    if rate not in AUDIO_RATES:
        raise InvalidRequest(
            f"audio has {shown(audio[1])} samples a second; an mp4 takes "
            f"{', '.join(map(str, AUDIO_RATES))}. Resample it.",
            field="audio",
        )
    return rate


def _resume(config: GenerationConfig) -> str | None:
    if config.resume is None:
        return None
    if config.journal_folder is None and config.output_path is None:
        raise InvalidRequest(
            "resume is set, but there is no place for the journal. Set output_path or "
            "journal_folder.",
            field="resume",
        )
    return choice(config.resume, "resume", RESUME)


def _output(config: GenerationConfig) -> Path | None:
    if config.output_path is None:
        if not flag(config.return_frames, "return_frames"):
            raise InvalidRequest(
                "return_frames is False and output_path is None: nothing would come of the "
                "render. Set one of them.",
                field="output_path",
            )
        return None
    found = path(config.output_path, "output_path")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(found)):  # of a URL's two slashes one is left
        raise InvalidRequest(
            f"output_path is {shown_path(found)}, an address; WanFit writes to a file on this "
            "machine. Give its path alone.",
            field="output_path",
        )
    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/]|\\\\", str(found)):
        raise InvalidRequest(
            f"output_path is {shown_path(found)}, a path of Windows, and this is another system: a "
            "file of that whole name would be made in the folder one is in. Give its path here (in "
            "WSL the drive C: is /mnt/c).",
            field="output_path",
        )
    if found.suffix.lower() != ".mp4":
        raise InvalidRequest(
            f"output_path is {shown_path(found)}; a name ending in .mp4 is needed.",
            field="output_path",
        )
    try:
        folder = found.is_dir()
    except (OSError, ValueError) as err:
        raise InvalidRequest(
            f"output_path {shown_path(found)} cannot be used "
            f"({getattr(err, 'strerror', None) or err}). Choose another name.",
            field="output_path",
        ) from err
    if folder:
        raise InvalidRequest(
            f"output_path {shown_path(found)} is a folder; name a file.", field="output_path"
        )
    return found
