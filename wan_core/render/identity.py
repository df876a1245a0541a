"""What decides a render, as plain data: its hash, and the differences between two of them.

Two runs with the same identity make the same video, so one may continue what the other left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch

from ..config import GenerationConfig
from ..errors import InvalidRequest
from ..files import file_identity
from ..job import Request
from ..loading import component_key
from ..models import ModelArchitecture
from ..plan import OptimizationPlan
from .report import versions

_SHOWN = 60
_LISTED = 6


def plain_identity(identity: Mapping[str, object]) -> dict[str, Any]:
    """Turn ``identity`` into what JSON holds, the same for equal content.

    Text, numbers, paths, enums, mappings, sequences, sets and dataclasses are taken as they are;
    tensors, arrays, images and bytes by a hash of their content. Raises InvalidRequest, naming
    the field, for anything else: its text could differ between two equal runs.
    """
    return {str(name): _plain(value, str(name)) for name, value in identity.items()}


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no blanks: equal data, equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def identity_key(plain: Mapping[str, Any]) -> str:
    """The first 128 bits of the SHA-256 of ``plain``'s canonical JSON, as 32 hex digits."""
    return hashlib.sha256(canonical_json(plain)).hexdigest()[:32]


def identity_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name every field in which two plain identities differ, with both values."""
    before, after = dict(_leaves(saved)), dict(_leaves(now))
    names = sorted(before.keys() | after.keys())
    return [
        f"{name} (saved {_shown(before, name, after)}, now {_shown(after, name, before)})"
        for name in names
        if before.get(name) != after.get(name)
    ]


def field_count(plain: Mapping[str, Any]) -> int:
    """How many fields ``identity_differences`` compares."""
    return sum(1 for _ in _leaves(plain))


def listed(differences: list[str]) -> str:
    """The differences as one line, the first few of them in full."""
    more = len(differences) - _LISTED
    return "; ".join(differences[:_LISTED]) + (f"; and {more} more" if more > 0 else "")


def _plain(value: object, name: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Enum):
        return _plain(value.value, name)
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}.{i}") for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item, name) for item in value), key=canonical_json)
    if is_dataclass(value) and not isinstance(value, type):
        return {
            part.name: _plain(getattr(value, part.name), f"{name}.{part.name}")
            for part in fields(value)
        }
    return _content(value, name)


def _content(value: Any, name: str) -> str:
    """Hash of a tensor, array, image or bytes, with what gives the bytes their meaning."""
    kind = type(value).__module__.split(".")[0]
    if isinstance(value, bytes):
        return f"bytes sha256:{hashlib.sha256(value).hexdigest()}"
    if kind == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value)
    if kind == "torch" and hasattr(value, "untyped_storage"):
        import torch

        flat = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        data, meaning = flat.numpy(), f"{value.dtype} {tuple(value.shape)}"
    elif kind == "numpy" and hasattr(value, "shape"):
        data, meaning = value.tobytes(), f"{value.dtype} {tuple(value.shape)}"
    elif kind == "PIL" and hasattr(value, "mode"):
        data, meaning = value.tobytes(), f"{value.mode} {value.size}"
    else:
        raise InvalidRequest(
            f"{name} is a {type(value).__name__}, which cannot be part of a saved render's "
            "identity. Give text, numbers, paths, tensors or images.",
            field=name,
        )
    return f"{meaning} sha256:{hashlib.sha256(data).hexdigest()}"


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Every field below ``value`` by its dotted name, as JSON text."""
    items: Iterator[tuple[object, object]]
    if isinstance(value, Mapping) and value:
        items = iter(value.items())
    elif isinstance(value, list) and value:
        items = iter(enumerate(value))
    else:
        yield name, json.dumps(value)
        return
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))


def _shown(values: Mapping[str, str], name: str, others: Mapping[str, str]) -> str:
    """A value short enough for a message; of long text the part where it begins to differ."""
    text, other = values.get(name), others.get(name, "")
    if text is None:
        return "nothing"
    if len(text) <= _SHOWN:
        return text
    pairs = enumerate(zip(text, other, strict=False))
    differs = next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))
    first = max(0, differs - _SHOWN // 3)
    part = text[first : first + _SHOWN]
    return ("..." if first else "") + part + ("..." if first + _SHOWN < len(text) else "")


BY_ROWS = "lean_rows"
"""The forward that rounds otherwise than the rest, which are "exact"."""
_NOT_IN_LATENTS = (
    "output_path", "warnings", "resume", "wanted_frames", "fps", "codec", "crf", "pix_fmt",
)  # fmt: skip


def render_identity(
    config: GenerationConfig,
    request: Request,
    architecture: ModelArchitecture,
    plan: OptimizationPlan,
) -> dict[str, Any]:
    """Name everything that decides a render's latents; two equal ones may continue each other.

    Where the mp4 goes, and how parts are placed on the device, changes no bit and is left out.
    What the plan chose and rounds otherwise is in: a render made with other choices starts anew
    and says which they are, so that they can be asked for. ``plan`` is the one a render begins
    with; what it went down to when memory ran out is kept in its states (``continued``).
    """
    fields = {name: getattr(request, name) for name in request.__slots__}
    for name in _NOT_IN_LATENTS:
        fields.pop(name, None)
    tensors = (
        "image", "last_image", "latents", "continue_from", "prompt_embeds",
        "negative_prompt_embeds",
    )  # fmt: skip
    given: Mapping[str, Any] = {
        name: _picture(value) for name in tensors if (value := getattr(config, name)) is not None
    }
    files = {
        name: component_key(part, "")
        for name, part in architecture.components.items()
        if part.files
    }
    return {
        "variant": architecture.name,
        "files": files,
        "loras": [
            [file_identity(found.lora.path), found.lora.expert, float(found.lora.strength)]
            for found in architecture.loras
            if found.lora.strength
        ],
        "job": fields,
        "given": given,
        **choices_of(plan),
        "windows": [plan.choices.window_frames, plan.choices.window_overlap],
        "device": torch.device(plan.device).type,
        "versions": versions(),
    }


def choices_of(plan: OptimizationPlan) -> dict[str, Any]:
    """Return what a plan chose that changes numbers, by the names it is asked for with."""
    return {
        "precision": dict(plan.choices.dtypes),
        "forward": BY_ROWS if plan.choices.by_rows else "exact",
        "fp8_storage": plan.choices.fp8_storage,
    }


def _picture(value: Any) -> Any:
    """A picture named by its path is known by its bytes: the file may be replaced."""
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        path = Path(value)
        return path.read_bytes() if path.is_file() else str(path)
    return value
