"""Whether SentencePiece's table of normalisation rules can be used safely. Standard library only.

The ``tokenizers`` package trusts the table: a place in it that lies outside stops the program with
a panic at the first text that leads there. The table is a trie of UTF-8 bytes, a double array as
darts-clone makes it, followed by the texts to put in place. Layout: ``normalizer.cc`` of
github.com/google/sentencepiece, ``darts.h`` of github.com/s-yata/darts-clone.
"""

from __future__ import annotations

import struct
from typing import Final

_BLOCK: Final = 256  # children of a unit are at its base, with the byte in the low eight bits
_LEAF: Final = 1 << 31  # the unit is a value: the place of a text
_HAS_VALUE: Final = 1 << 8
_FAR: Final = 1 << 9  # the offset counts in steps of 256


def charsmap_problem(charsmap: bytes) -> str | None:
    """Say why the table may not be used, or None if it may; an empty one stands for no rules."""
    if not charsmap:
        return None
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or not 4 <= size <= len(charsmap) - 4 or size % 4:
        return f"its {len(charsmap):,} bytes of normalisation rules announce {size:,} bytes of trie"
    units = struct.unpack_from(f"<{size // 4}I", charsmap, 4)
    texts = charsmap[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError as err:
        return f"the texts of its normalisation rules are not UTF-8 ({err.reason})"
    for index, unit in enumerate(units):
        if unit & _LEAF:
            continue
        base = index ^ (unit >> 10) << (8 if unit & _FAR else 0)
        if base | _BLOCK - 1 >= len(units):
            return f"unit {index:,} of its normalisation rules leads beyond all {len(units):,}"
        if unit & _HAS_VALUE:
            place = units[base] & ~_LEAF
            # A text starts where a character does: not at a byte 10xxxxxx.
            if place >= len(texts) or texts[place] & 0xC0 == 0x80:
                return f"unit {index:,} of its normalisation rules names no text"
    return None
