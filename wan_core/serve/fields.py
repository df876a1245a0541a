"""The fields of a request for a video -> a job, or an error that names the field.

Names and meanings are those of vLLM-Omni's ``/v1/videos``, which OpenAI's clients know too: of two
experts ``guidance_scale`` is the low-noise one's and ``guidance_scale_2`` the high-noise one's,
which takes the first where it has none. What else ``GenerationConfig`` has is in ``extra_params``.
"""

from __future__ import annotations

import difflib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import plain_number
from ..errors import InvalidRequest, UnsafeFile
from ..files import contained_path
from .jobs import CONFIG_FIELDS, BatchJob

_NUMBERS = {
    "width": int, "height": int, "num_frames": int, "fps": float, "num_inference_steps": int,
    "guidance_scale": float, "guidance_scale_2": float, "boundary_ratio": float,
    "flow_shift": float, "seed": int, "priority": float,
}  # fmt: skip
_TEXTS = ("prompt", "negative_prompt", "model", "size", "seconds", "user")
_OBJECTS = ("lora", "extra_params")
UPLOAD = "input_reference"
FIELDS = (*_TEXTS, *_NUMBERS, *_OBJECTS, UPLOAD)
_ELSEWHERE = {
    "image_reference": "nothing is fetched here: upload the picture as input_reference",
    "video_reference": "nothing is fetched here: upload the video as input_reference",
    "audio_reference": "no model here reads sound",
    "control_reference": "upload the video as input_reference",
    "output": "the server chooses the place of a clip; see /content",
    "output_path": "the server chooses the place of a clip; see /content",
}
_NOT_EXTRA = frozenset(
    {"prompt", "negative_prompt", "image", "last_image", "resume", "boundary", "batch_size"}
    | set(_NUMBERS)
)
"""Fields of a job that have a name of their own here, are files, or are the server's matter."""
EXTRA = tuple(name for name in CONFIG_FIELDS if name not in _NOT_EXTRA)
_CONTROL = ("strength", "denoise", "clear_masked")
_NAMES = {"boundary": "boundary_ratio"}
"""Our names of fields, where a request's are others."""
MOST_TEXT = 64 * 1024
MOST_DIGITS = 18
"""Digits of a whole number that are read; more than 4,300 Python refuses with an error."""
_MOST_NUMBER = 10**20
"""Above every seed (2**64), and below what no float can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server makes clips with."""

    name: str
    model: Path
    optimization: Mapping[str, Any]
    two_experts: bool
    width: int
    height: int
    num_frames: int
    fps: float
    use_recipe: bool = False
    loras: tuple[str, ...] = ()
    """LoRAs of every job, as in a job's line."""
    lora_folder: Path | None = None
    """Where the LoRAs lie that a request may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file that came with a request, looked at: a picture or a video."""

    path: Path
    kind: str
    pixels: int = 0
    """Of a video's frame."""


def name_of(field: str | None, served: Served) -> str | None:
    """Return what a request calls a field of ours."""
    swapped = {"guidance_scale": "guidance_scale_2", "guidance_scale_2": "guidance_scale"}
    names = {**_NAMES, **(swapped if served.two_experts else {})}
    return None if field is None else names.get(field, field)


def read_job(
    given: Mapping[str, Any], upload: Upload | None, served: Served, output: Path
) -> tuple[BatchJob, dict[str, Any]]:
    """Return the job of a request, and what its client is told of it.

    ``given`` are texts, or what JSON has. Raises InvalidRequest, with the request's name of the
    field, for a name that is not known and a value that is none; ranges are the model's matter.
    """
    given = {name: value for name, value in given.items() if value is not None}
    _known(given, UPLOAD if upload is None else None)
    texts = {name: _text(given, name) for name in _TEXTS if name in given}
    numbers = {name: _number(given[name], name) for name in _NUMBERS if given.get(name, "") != ""}
    if not texts.get("prompt", "").strip():
        raise InvalidRequest("prompt is missing: say what is to be seen.", field="prompt")
    if texts.get("model", served.name) not in ("", served.name):
        raise InvalidRequest(
            f"model is {texts['model']!r}; this server has {served.name!r} only.", field="model"
        )
    values: dict[str, Any] = {
        "width": served.width,
        "height": served.height,
        "num_frames": served.num_frames,
    }
    values |= _shape(texts, numbers, served)
    values |= {n: numbers[n] for n in ("num_inference_steps", "flow_shift") if n in numbers}
    values |= _guidance(numbers, served)
    if "boundary_ratio" in numbers:
        values["boundary"] = numbers["boundary_ratio"]
    # Drawn here, so that a job that goes on after a kill is the same job.
    values["seed"] = numbers.get("seed", secrets.randbelow(2**32))
    values["prompt"] = texts["prompt"]
    if texts.get("negative_prompt"):
        values["negative_prompt"] = texts["negative_prompt"]
    extra, control = _extra(_object(given, "extra_params"))
    if upload is not None and upload.kind == "image":
        values["image"] = str(upload.path)
    elif upload is not None:
        control["video"] = str(upload.path)
    elif control:
        raise InvalidRequest(
            "extra_params.control is for a video, and none came as input_reference.",
            field="extra_params",
        )
    values |= extra
    job = BatchJob(
        number=0,
        model=served.model,
        output=output,
        values=values,
        control=control,
        loras=(*served.loras, *_loras(given, served)),
        use_recipe=served.use_recipe,
        optimization=dict(served.optimization),
        priority=numbers.get("priority", 0.0),
    )
    fps = values.get("fps") or served.fps
    shown = {
        "model": served.name,
        "prompt": values["prompt"],
        "size": f"{values['width']}x{values['height']}",
        "seconds": f"{values['num_frames'] / fps:g}",
        "num_frames": values["num_frames"],
        "seed": values["seed"],
        "priority": job.priority,
    }
    return job, shown


def _known(given: Mapping[str, Any], upload: str | None) -> None:
    for name in given:
        if name in _ELSEWHERE:
            raise InvalidRequest(f"{name} is not read: {_ELSEWHERE[name]}.", field=name)
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            meant = f"; did you mean {near[0]!r}?" if near else f". Known are {', '.join(FIELDS)}."
            raise InvalidRequest(f"{name!r} is no field of a request{meant}", field=name)
        if name == upload:
            raise InvalidRequest(
                f"{name} is a text; send the file itself, as multipart/form-data.", field=name
            )


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given[name]
    if name == "seconds" and plain_number(value) is not None:
        value = str(value)
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is {value!r}; a text is needed.", field=name)
    if len(value) > MOST_TEXT:
        raise InvalidRequest(
            f"{name} has {len(value):,} characters; {MOST_TEXT:,} are read.", field=name
        )
    return value


def _number(value: Any, name: str) -> Any:
    """Read a number from a text or from JSON; whole ones where the field counts something."""
    found = plain_number(value)
    if isinstance(value, str):
        try:
            value = _as_digits(value)
            found = int(value) if _NUMBERS[name] is int else float(value)
        except ValueError:
            found = None
    wrong = found is None or not abs(found) < _MOST_NUMBER  # so written, for NaN too
    if found is None or wrong or (_NUMBERS[name] is int and found != int(found)):
        kind = "a whole number" if _NUMBERS[name] is int else "a number"
        raise InvalidRequest(
            f"{name} is {str(value)[:80]!r}; {kind} is needed, below 1e20.", field=name
        )
    return _NUMBERS[name](found)


def _as_digits(text: str) -> str:
    """Return a text that may be a number; raises ValueError for what only Python takes for one."""
    if "_" in text or not text.isascii():
        raise ValueError(text)
    return text


def _shape(texts: Mapping[str, str], numbers: Mapping[str, Any], served: Served) -> dict[str, Any]:
    """Read size and length; what is said twice must agree."""
    found = {n: numbers[n] for n in ("width", "height", "num_frames", "fps") if n in numbers}
    if texts.get("size"):
        parts = texts["size"].lower().split("x")
        if len(parts) != 2 or not all(
            part.isascii() and part.isdigit() and len(part) <= MOST_DIGITS for part in parts
        ):
            raise InvalidRequest(
                f"size is {texts['size'][:80]!r}; WIDTHxHEIGHT is needed.", field="size"
            )
        for name, part in zip(("width", "height"), parts, strict=True):
            if found.setdefault(name, int(part)) != int(part):
                raise InvalidRequest(
                    f"size is {texts['size']!r} and {name} {found[name]}; give one of them.",
                    field="size",
                )
    if texts.get("seconds"):
        try:
            seconds = float(_as_digits(texts["seconds"]))
        except ValueError:
            seconds = math.nan
        length = seconds * found.get("fps", served.fps)
        if not (seconds > 0 and length < _MOST_NUMBER):  # false for NaN and infinity too
            raise InvalidRequest(
                f"seconds is {texts['seconds'][:80]!r}; a number above 0 is needed, of fewer than "
                "1e20 frames.",
                field="seconds",
            )
        frames = max(1, round(length))
        if found.setdefault("num_frames", frames) != frames:
            raise InvalidRequest(
                f"seconds is {texts['seconds']}, which is {frames} frames, and num_frames "
                f"{found['num_frames']}; give one of them.",
                field="seconds",
            )
    return found


def _guidance(numbers: Mapping[str, Any], served: Served) -> dict[str, Any]:
    low, high = numbers.get("guidance_scale"), numbers.get("guidance_scale_2")
    if not served.two_experts:
        if high is not None:
            raise InvalidRequest(
                f"guidance_scale_2 is the high-noise expert's, and {served.name} has one "
                "transformer; give guidance_scale.",
                field="guidance_scale_2",
            )
        return {} if low is None else {"guidance_scale": low}
    high = low if high is None else high
    found = {"guidance_scale": high, "guidance_scale_2": low}
    return {name: value for name, value in found.items() if value is not None}


def _object(given: Mapping[str, Any], name: str) -> Any:
    value = given.get(name, {})
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError) as err:
            raise InvalidRequest(f"{name} is not JSON ({str(err)[:100]}).", field=name) from err
    if not isinstance(value, dict | list):
        raise InvalidRequest(f"{name} must be a JSON object.", field=name)
    return value


def _extra(given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return fields of ``GenerationConfig``, and those of its control."""
    if not isinstance(given, dict):
        raise InvalidRequest("extra_params must be a JSON object.", field="extra_params")
    control = given.get("control", {})
    for values, names, what in ((given, (*EXTRA, "control"), ""), (control, _CONTROL, ".control")):
        if not isinstance(values, dict):
            raise InvalidRequest(f"extra_params{what} must be an object.", field="extra_params")
        for name in values:
            if name not in names:
                raise InvalidRequest(
                    f"extra_params{what} has no {name!r}; known are {', '.join(names)}.",
                    field="extra_params",
                )
    return {n: v for n, v in given.items() if n != "control"}, dict(control)


def _loras(given: Mapping[str, Any], served: Served) -> list[str]:
    """Return LoRAs in a job's own form: only files of the folder that the server was given."""
    asked = _object(given, "lora")
    asked = asked if isinstance(asked, list) else [asked] if asked else []
    found = []
    for one in asked:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise InvalidRequest(
                'lora must be {"name": FILE, "scale": NUMBER, "expert": both, high or low}, or a '
                "list of these.",
                field="lora",
            )
        unknown = set(one) - {"name", "scale", "expert"}
        scale, expert = plain_number(one.get("scale", 1.0)), one.get("expert", "both")
        if scale is not None and abs(scale) >= _MOST_NUMBER:
            scale = None
        if unknown or scale is None or expert not in ("both", "high", "low"):
            what = f"has no {sorted(unknown)[0]!r}" if unknown else "has a wrong scale or expert"
            raise InvalidRequest(f"lora {what}; known are name, scale, expert.", field="lora")
        if served.lora_folder is None:
            raise InvalidRequest(
                "lora: this server was started without --lora-folder, and opens no other files.",
                field="lora",
            )
        try:
            path = contained_path(served.lora_folder.resolve(), one["name"], allow_links=True)
        except UnsafeFile as err:
            raise InvalidRequest(
                f"lora.name {one['name'][:80]!r} is refused; plain names of files only.",
                field="lora",
            ) from err
        found.append(f"{path}:{expert}:{float(scale)!r}")
    return found
