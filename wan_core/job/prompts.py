"""A text for each part of a clip: lines with frame counts -> the text of every frame."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import InvalidRequest

MAX_PARTS = 256
_LINE = re.compile(r"\s*(\d{1,7})\s*:\s*(.*)")


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
