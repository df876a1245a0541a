"""Checks of single values: each returns the value in its plain form, or raises InvalidRequest.

Numbers may come from any library (``config.plain_number``). A message names the field, the value
and what is allowed. Some values have a form of their own: the lines of ``prompts``, and the batches
of pictures of a control.
"""

from __future__ import annotations

import math
import os
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import is_bool, is_many, plain_number, shown
from ..errors import InvalidRequest

if TYPE_CHECKING:
    from torch import Tensor

_NAME = 1000
MAX_PARTS = 256
_LINE = re.compile(r"\s*(\d{1,7})\s*:\s*(.*)")


def whole(value: Any, field: str, low: int, high: int) -> int:
    """Return ``value`` as an int; 4.0 is one too. A bool is not."""
    number = plain_number(value)
    if isinstance(number, float) and math.isfinite(number) and number == int(number):
        number = int(number)
    if not isinstance(number, int) or not low <= number <= high:
        raise InvalidRequest(
            f"{field} is {shown(value)}; a whole number from {low} to {high} is needed.",
            field=field,
        )
    return number


def real(value: Any, field: str, low: float, high: float) -> float:
    """Return ``value`` as a finite float."""
    number = plain_number(value)
    # Compared before it is converted: a large int is no float.
    if number is None or not low <= number <= high:
        raise InvalidRequest(
            f"{field} is {shown(value)}; a number from {low} to {high} is needed.", field=field
        )
    return float(number)


def falling(value: Any, field: str, most: int) -> tuple[float, ...]:
    """Return ``value``, 1 to ``most`` numbers from at most 1 down to above 0, as floats.

    A 0 at the end, which ComfyUI's sigmas have, is left out.
    """
    found = [plain_number(one) for one in islice(value, most + 2)] if is_many(value) else []
    found = found[:-1] if len(found) > 1 and found[-1] == 0 else found
    numbers = [float(one) for one in found if one is not None and 0 < one <= 1]
    single = (*array("f", numbers), 0.0)  # as they are computed with
    if not 1 <= len(numbers) == len(found) <= most or any(a <= b for a, b in pairwise(single)):
        raise InvalidRequest(
            f"{field} is {shown(value)}; numbers are needed of which each is smaller than the one "
            f"before, from at most 1 down to above 0, {most} at most. The last step's 0 may be "
            "left out.",
            field=field,
        )
    return tuple(numbers)


def choice(value: Any, field: str, allowed: Iterable[str]) -> str:
    """Return ``value`` if it is one of the texts ``allowed``."""
    # Looked at before it is compared: an array compares element by element.
    if not isinstance(value, str) or value not in allowed:
        raise InvalidRequest(
            f"{field} is {shown(value)}; allowed are {', '.join(allowed)}.", field=field
        )
    return str.__str__(value)


def flag(value: Any, field: str) -> bool:
    """Return ``value`` as a bool; of numbers only 0 and 1 are taken, of texts none."""
    if is_bool(value) or plain_number(value) in (0, 1):
        return bool(value)
    raise InvalidRequest(f"{field} is {shown(value)}; True or False is needed.", field=field)


def text(value: Any, field: str, may_be_missing: bool = False) -> str:
    """Return ``value`` as a str; None becomes the empty text if it ``may_be_missing``."""
    if value is None and may_be_missing:
        return ""
    if not isinstance(value, str):
        instead = f" (or {field}_embeds)" if field in ("prompt", "negative_prompt") else ""
        raise InvalidRequest(f"{field} is {shown(value)}; a text is needed{instead}.", field=field)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as err:
        # What Python makes of a byte of the command line that is no letter (PEP 383).
        byte = 0xDC80 <= ord(value[err.start]) <= 0xDCFF
        why = "(a byte that the terminal's encoding has no letter for: use UTF-8)"
        cut = "(a lone surrogate, as left by cutting an emoji in two)"
        raise InvalidRequest(
            f"{field} holds half of a character at position {err.start} {why if byte else cut}. "
            "Type that place anew.",
            field=field,
        ) from err
    return str.__str__(value)


def path(value: Any, field: str) -> Path:
    """Return ``value`` as a path in which ``~`` is the user's home folder."""
    if isinstance(value, str) and not value.strip():  # which would be the folder one is in
        raise InvalidRequest(f"{field} is empty; name one, or None for none.", field=field)
    try:
        found = Path(os.path.expanduser(Path(value)))
        os.fsencode(found)
    except (TypeError, UnicodeEncodeError) as err:
        raise InvalidRequest(
            f"{field} is {shown(value)}; the path of a file is needed ({err}).", field=field
        ) from err
    if "\0" in str(found):
        raise InvalidRequest(
            f"{field} is {shown(value)}; no path holds the character \\0.", field=field
        )
    return found


def dense(value: Tensor, field: str) -> Tensor:
    """Return a tensor, detached; one of 8-bit floats, which torch hardly computes with, as float32.

    Raises InvalidRequest for a tensor whose values do not lie in memory one by one.
    """
    kinds = {
        "without values (on the device meta)": value.is_meta,
        "quantised": value.is_quantized,
        "nested": value.is_nested,
        f"stored as {value.layout}": str(value.layout) != "torch.strided",
    }
    for kind, found in kinds.items():
        if found:
            raise InvalidRequest(
                f"{field} is a tensor {kind}; a plain one with values is needed.", field=field
            )
    value = value.detach()
    return value.float() if value.is_floating_point() and value.element_size() == 1 else value


def function(value: Any, field: str) -> None:
    """Check that ``value`` can be called, or is None."""
    if value is not None and not callable(value):
        raise InvalidRequest(f"{field} is {shown(value)}; a function is needed.", field=field)


def shown_path(found: Path) -> str:
    """Return a path as a message shows it: of a long one, the beginning and the end."""
    said = " ".join(str(found).splitlines())
    return said if len(said) <= _NAME + 20 else f"{said[:20]}...{said[-_NAME:]}"


# A text for each part of a clip: lines with frame counts -> the text of every frame ---------------


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A text and the video frame from which it holds; it lasts until the next part begins."""

    start: int
    text: str


def parse_prompts(text: str) -> tuple[PromptPart, ...]:
    """Read lines ``frames: text`` in the order of the clip; blank lines are skipped.

    ``81: a red fox runs`` lasts for 81 video frames. The last part lasts until the clip ends, so
    its count may be left out. Raises InvalidRequest, naming the line.
    """
    # A text read from a file may begin with a byte order mark.
    lines = [line for line in text.removeprefix("\ufeff").splitlines() if line.strip()]
    if not 1 <= len(lines) <= MAX_PARTS:
        raise InvalidRequest(
            f"prompts has {len(lines)} lines; 1 to {MAX_PARTS} like '81: a red fox' are needed.",
            field="prompts",
        )
    parts: list[PromptPart] = []
    start = 0
    for number, line in enumerate(lines, 1):
        found = _LINE.fullmatch(line)
        if found is None and number < len(lines):
            raise InvalidRequest(
                f"prompts line {number} is {line.strip()!r}; it must begin with a number of "
                "frames and a colon, as in '81: a red fox'.",
                field="prompts",
            )
        count, words = (0, line) if found is None else (int(found[1]), found[2])
        if found is not None and count < 1 or not words.strip():
            raise InvalidRequest(
                f"prompts line {number} is {line.strip()!r}; a count of 1 or more and a text are "
                "needed, as in '81: a red fox'.",
                field="prompts",
            )
        parts.append(PromptPart(start, words.strip()))
        start += count
    return tuple(parts)


# Batches of pictures, as a control has them -------------------------------------------------------


def batches(reference: Any) -> list[Any]:
    """Return the batches of a control's references, one for each picture of a list."""
    if not isinstance(reference, list | tuple):
        return [] if reference is None else [reference]
    return [one[None] if getattr(one, "ndim", 0) == 3 else one for one in reference]


def shape_of(name: str, value: Any, axes: int, *, or_fewer: bool = False) -> tuple[int, ...]:
    """Return the shape of one of a control's tensors, or refuse it."""
    shape = tuple(getattr(value, "shape", ()))
    wanted = "(frames, height, width)" if name == "mask" else "(pictures, height, width, 3)"
    right = len(shape) == axes or (or_fewer and len(shape) == axes - 1)
    channels = name != "mask"
    if not channels and len(shape) == axes and shape[-1] in (1, 3, 4):
        right = False  # one mask as a picture has it, not as many masks as it has rows
    if not right or not all(shape) or (channels and shape[-1] not in (1, 3, 4)):
        hint = ""
        if channels and len(shape) == axes and shape[1] in (1, 3, 4):
            hint = " This one has its channels second: permute it to (0, 2, 3, 1)."
        if name == "mask" and shape[-1:] and shape[-1] in (1, 3, 4):
            hint = " This one has channels: take one of them, mask[..., 0]."
        raise InvalidRequest(
            f"control.{name} is {shown(value)}; a tensor {wanted} is needed.{hint}",
            field=f"control.{name}",
        )
    return shape
