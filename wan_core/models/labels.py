"""Words of names and titles: where they begin and end, and what they say of an expert's role.

One splitter for everything that is guessed from the name of a file: the role of an expert, its
partner, the steps it was distilled to. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal

Role = Literal["high", "low"]

# A capital begins a word after a small letter or a digit (i2vHigh, V20High), and at the end of a
# row of capitals (I2VHigh). A digit followed by two capitals stays whole: 14B, T2V.
_BETWEEN: Final = re.compile(
    r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z]{2})", re.ASCII
)
# A word for a role, also with what stands before it without a separator (14bhigh, i2vlow) and with
# a version after it. Letters before it count only behind a digit: "slow" and "flow" are no roles.
_ROLE: Final = re.compile(r"((?:[a-z0-9]*\d[vb]?)?)(high|low)(?:noise)?((?:v\d+)?)")
# Words that give a "high" or "low" before them another meaning: LowVRAM, low_light, high_res.
_OTHER: Final = frozenset(
    {
        "vram", "light", "res", "resolution", "step", "steps", "denoise", "rank", "mem", "memory",
        "ram", "quality", "poly", "contrast", "speed", "motion", "end",
    }
)  # fmt: skip

_WAN_21: Final = re.compile(r"(?i)(?<![a-z])wan[-_. ]*2[-_.]?1(?!\d)")

# Endings of model files. Not all that follows a dot: "Wan2.2-T2V-A14B" is a folder's whole name.
_SUFFIX: Final = re.compile(r"(?i)(?:\.(?:safetensors|gguf|pth?|bin|ckpt|sft|index|json))+$")


def name_stem(name: str) -> str:
    """Return the name of a model's file or folder without the ending of a file."""
    return _SUFFIX.sub("", name)


def words_of(text: str) -> list[str]:
    """Return the words of a name or title in lower case: ``i2vHigh_V30`` -> i2v, high, v30."""
    return [word.lower() for word in _BETWEEN.split(text) if word]


def role_of(text: str) -> Role | None:
    """Return the role that a name or title states, or None.

    ``LowVRAM`` and ``low_light`` state none, and neither does a text that holds both words, or one
    that says ``5B``: that model has no experts.
    """
    words = words_of(text)
    found = {role for index in range(len(words)) if (role := _role_at(words, index))}
    return found.pop() if len(found) == 1 and "5b" not in words else None


def says_wan_21(text: str) -> bool:
    """Whether a name or title says that it is of Wan 2.1, whose models have no experts."""
    return _WAN_21.search(text) is not None


def without_role(text: str) -> tuple[str, ...]:
    """Return the words of a name without those for the role: equal for the two of a pair."""
    words = words_of(text)
    out: list[str] = []
    for index, word in enumerate(words):
        role = _ROLE.fullmatch(word) if _role_at(words, index) else None
        if role is not None:
            out += [part for part in (role[1], role[3]) if part]
        elif not (word == "noise" and index and _role_at(words, index - 1)):
            out.append(word)
    return tuple(out)


def differ_in_h_and_l(high: str, low: str) -> bool:
    """Whether two names differ in one thing only: a capital H at the end of a word where the other
    has an L (``..._Q8H`` and ``..._Q8L``), which some publishers write for high and low."""
    if len(high) != len(low):
        return False
    places = [i for i, (a, b) in enumerate(zip(high, low, strict=True)) if a != b]
    if len(places) != 1 or (high[places[0]], low[places[0]]) != ("H", "L"):
        return False
    before, after = high[: places[0]][-1:], high[places[0] + 1 :][:1]
    return not after.isalnum() and not before.isalpha()


def _role_at(words: Sequence[str], index: int) -> Role | None:
    found = _ROLE.fullmatch(words[index])
    following = words[index + 1] if index + 1 < len(words) else ""
    if found is None or following in _OTHER:
        return None
    return "high" if found[2] == "high" else "low"
