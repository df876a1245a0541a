"""What decides a render, as plain data: its hash, and the differences between two of them.

Two runs with the same identity make the same video, so one may continue what the other left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

from .errors import InvalidRequest

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
