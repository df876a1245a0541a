"""The identity of a render: everything that decides its latents, as plain data with a hash.

Two renders with the same identity make the same latents, so one may continue what the other left.
For two that differ, this module names the differences.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch

from ..config import GenerationConfig
from ..errors import InvalidRequest
from ..files import file_identity
from ..job import Request, control_of, load_picture
from ..loading import component_key
from ..models import ModelArchitecture
from ..plan import OptimizationPlan
from .content import code_digest, content_digest

_SHOWN = 60
_LISTED = 6


def plain_identity(identity: Mapping[str, object]) -> dict[str, Any]:
    """Turn ``identity`` into data that JSON can hold, the same data for equal content.

    Text, numbers, paths, enums, mappings, sequences, sets and dataclasses are converted by value.
    Tensors, arrays, images and bytes become a hash of their content. Raises InvalidRequest, naming
    the field, for anything else: its ``repr`` could differ between two equal renders.
    """
    return {str(name): _plain(value, str(name)) for name, value in identity.items()}


def canonical_json(value: object) -> bytes:
    """Return JSON with sorted keys and without blanks, so that equal data gives equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def identity_key(plain: Mapping[str, Any]) -> str:
    """Return the first 128 bits of the SHA-256 of ``plain``'s canonical JSON: 32 hex digits."""
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
    """Return how many fields ``identity_differences`` compares."""
    return sum(1 for _ in _leaves(plain))


def listed(differences: list[str]) -> str:
    """Return the differences as one line: the first few in full, then the number of the others."""
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
    """Return a hash of a tensor, array, image or bytes, as text.

    Dtype and shape, or mode and size, stand beside it: the same bytes may mean different values.
    """
    kind = type(value).__module__.split(".")[0]
    if isinstance(value, bytes):
        return f"bytes sha256:{hashlib.sha256(value).hexdigest()}"
    if kind == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value)
    if kind == "torch" and hasattr(value, "untyped_storage"):
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
    """Yield (dotted name, JSON text) of every field below ``value``."""
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
    """Return a value short enough for a message: of a long one, where it begins to differ."""
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


BY_ROWS, EXACT = "lean_rows", "exact"
"""The forward that may round differently, and the name of the others, which give equal bits."""
FASTER = ("quick", "eight_bit", "attention_8bit")
"""Choices for speed's sake that change latents; named only where they are made."""
# Fields of a Request that do not affect the latents.
_NOT_IN_LATENTS = (
    "output_path", "warnings", "resume", "journal_folder", "wanted_frames", "fps", "codec", "crf",
    "pix_fmt",
)  # fmt: skip


# Fields that came later, with the value that stands for a job which does not ask for them: such a
# job keeps the identity it had.
_UNSAID: Mapping[str, Any] = {
    "sigma_schedule": "official", "sigmas": (), "guided_steps": 0, "guided_scale": None,
    "overlap_free": False,
}  # fmt: skip


def render_identity(
    config: GenerationConfig,
    request: Request,
    architecture: ModelArchitecture,
    plan: OptimizationPlan,
) -> dict[str, Any]:
    """Return everything that decides a render's latents.

    Where the mp4 goes and how components are placed changes no bit, and is left out. The plan's
    choices that affect the result are in: a render made with other choices starts anew, and a
    warning names them, so that the user can ask for them. ``plan`` is the plan that a render begins
    with. The smaller plan it went on with when memory ran out is stored in the journal's states
    instead (see ``RenderJournal.continued``).
    """
    fields = {name: getattr(request, name) for name in request.__slots__}
    for name in _NOT_IN_LATENTS:
        fields.pop(name, None)
    if request.control is None:
        fields.pop("control")  # a render without one is the same as before there were any
    if plan.choices.window_frames is None:
        fields["overlap_free"] = False
    for name, usual in _UNSAID.items():
        if fields.get(name) == usual:
            del fields[name]
    tensors = (
        "image", "last_image", "latents", "continue_from", "prompt_embeds",
        "negative_prompt_embeds",
    )  # fmt: skip
    given: Mapping[str, Any] = {
        name: _picture(value, name)
        for name in tensors
        if (value := getattr(config, name)) is not None
    }
    if (control := control_of(config)) is not None:
        given = {**given, "control": control}
    files = {
        name: {"key": component_key(part, ""), "content": [content_digest(p) for p in part.files]}
        for name, part in architecture.components.items()
        if part.files
    }
    return {
        "variant": architecture.name,
        "files": files,
        "loras": [
            [
                *map(file_identity, paths := found.files or (Path(found.lora.path),)),
                *map(content_digest, paths),
                found.lora.expert,
                float(found.lora.strength),
            ]
            for found in architecture.loras
            if found.lora.strength
        ],
        "job": fields,
        "given": given,
        **choices_of(plan),
        "windows": _windows(request, plan),
        "device": torch.device(plan.device).type,
        "versions": {**versions(), "code": code_digest()},
    }


def _windows(request: Request, plan: OptimizationPlan) -> list[int | None]:
    """Return the length of windows and what they share.

    Where a longer overlap may be chosen to fill cards, which was is in the journal's states: the
    render goes on from them on any number of cards.
    """
    length, overlap = plan.choices.window_frames, plan.choices.window_overlap
    if request.overlap_free:
        overlap = request.window_overlap
    return [length, overlap]


def choices_of(plan: OptimizationPlan) -> dict[str, Any]:
    """Return the plan's choices that affect the result, named as in ``OptimizationConfig``."""
    faster = {name: True for name in FASTER if getattr(plan.choices, name)}
    return {
        "precision": dict(plan.choices.dtypes),
        "forward": BY_ROWS if plan.choices.by_rows else EXACT,
        "fp8_storage": plan.choices.fp8_storage,
        **{name: getattr(plan.choices, name) for name in _shortcuts(plan)},
        **faster,
    }


def _shortcuts(plan: OptimizationPlan) -> list[str]:
    """Return the names of the choices that leave forwards out, if any does."""
    usual = {"easycache": 0.0, "magcache": 0.0, "guidance_gate": 1.0}
    return [name for name, value in usual.items() if getattr(plan.choices, name) != value]


def _picture(value: Any, field: str) -> Any:
    """Return the bytes of a picture that is given by its path: the file may be replaced.

    Of a PIL image, return the picture that the render sees: what its pixels mean is beside them,
    in a palette and in the tag that says which side is up.
    """
    if hasattr(value, "getexif"):
        return load_picture(value, field)
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        path = Path(os.path.expanduser(value))
        return path.read_bytes() if path.is_file() else str(path)
    return value


def versions() -> dict[str, str]:
    """Return the versions of the packages that results and measurements depend on."""
    from importlib.metadata import PackageNotFoundError, version

    own = getattr(sys.modules[__name__.removesuffix(".journal.identity")], "__version__", "unknown")
    found = {"wanfit": own, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("diffusers", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def device_name(device: torch.device) -> str:
    """Return a name of the device that a person recognises."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
