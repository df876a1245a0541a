"""The tokenizer that a GGUF text encoder carries in its metadata. Standard library only.

llama.cpp's converter writes a SentencePiece model as arrays, one element a token, and pads them to
the rows of the embedding (``conversion/t5.py`` of github.com/ggml-org/llama.cpp). What the header
says of them is checked without reading one; the arrays are read when the tokenizer is wanted.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import CorruptFile, MissingFile, UnsupportedModel
from ..files import open_regular, quoted
from .open import read_table
from .table import AGAIN, ArrayInfo, TensorTable

MAX_TOKENS: Final = 2**19
"""Most tokens that are read; umT5 has 256,384."""
MAX_TOKENS_BYTES: Final = 16 * 2**20
"""Most bytes of all tokens with their lengths; umT5's take about 4 MB."""
MAX_CHARSMAP_BYTES: Final = 4 * 2**20
"""Largest table of the normaliser; SentencePiece's own have about 240,000 bytes."""

# Types of a token by llama.cpp's numbers; control (3) and byte (6) make no difference here.
_NORMAL: Final = 1
_UNKNOWN: Final = 2
_USER_DEFINED: Final = 4
_UNUSED: Final = 5
_NO_SCORE: Final = -1000.0
"""The converter gives added tokens -1,000 and padding -10,000; scores of pieces are above -100."""
_PADDING: Final = re.compile(r"\[PAD\d+\]")

_MODEL: Final = "tokenizer.ggml.model"
_TOKENS: Final = "tokenizer.ggml.tokens"
_SCORES: Final = "tokenizer.ggml.scores"
_TYPES: Final = "tokenizer.ggml.token_type"
_CHARSMAP: Final = "tokenizer.ggml.precompiled_charsmap"
_UNKNOWN_ID: Final = "tokenizer.ggml.unknown_token_id"
# key: (types of the elements, most elements, most bytes). The tokens come first: the others are
# checked against their number.
_KINDS: Final = {
    _TOKENS: (("text",), MAX_TOKENS, MAX_TOKENS_BYTES),
    _SCORES: (("f32",), MAX_TOKENS, 4 * MAX_TOKENS),
    _TYPES: (("i32", "u32"), MAX_TOKENS, 4 * MAX_TOKENS),
    _CHARSMAP: (("u8", "i8"), MAX_CHARSMAP_BYTES, MAX_CHARSMAP_BYTES),
}
_EMBEDDING: Final = "token_embd.weight"
_REQUIRED: Final = (_TOKENS, _SCORES)
_ELSE: Final = f"{AGAIN} Or name a tokenizer folder or a spiece.model of umT5 as the tokenizer."


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A unigram model, whichever file it comes from; a token's id is its place."""

    pieces: tuple[tuple[str, float], ...]
    """Tokens with their scores (log probabilities), without the padding at the end."""
    unknown: int
    """The id of the token for what no other token covers."""
    charsmap: bytes
    """SentencePiece's table of the normaliser; empty if the model has none."""


def has_gguf_tokenizer(table: TensorTable) -> bool:
    """Whether ``table`` is a GGUF file that carries a tokenizer of umT5's kind.

    Raises CorruptFile for arrays that cannot be a tokenizer by their types, counts or sizes, and
    UnsupportedModel for a tokenizer of another kind.
    """
    named = [key for key in _KINDS if key in table.arrays or key in table.metadata]
    if table.format != "gguf" or not named:
        return False
    kind = table.metadata.get(_MODEL, "")
    if kind != "t5":
        raise UnsupportedModel(
            f"{quoted(table.path)} has a tokenizer of the kind {kind[:40]!r} in its metadata; "
            "umT5's is 't5' (SentencePiece unigram). Name a tokenizer folder or a spiece.model of "
            "umT5 as the tokenizer."
        )
    for key in _KINDS:
        if key in named or key in _REQUIRED:
            _check_array(table, key)
    return True


def _check_array(table: TensorTable, key: str) -> None:
    array = table.arrays.get(key)
    if array is None:
        what = f"{table.metadata[key][:40]!r}" if key in table.metadata else "missing"
        raise _damaged(table.path, f"{key} is {what}, an array was expected")
    kinds, most, most_bytes = _KINDS[key]
    if array.kind not in kinds:
        wanted = " or ".join(kinds)
        raise _damaged(table.path, f"{key} holds {array.kind}, and {wanted} was expected")
    if not 1 <= array.count <= most:
        raise _damaged(
            table.path, f"{key} has {array.count:,} elements (1 to {most:,} are allowed)"
        )
    if array.nbytes > most_bytes:
        raise _damaged(table.path, f"{key} has {array.nbytes:,} bytes ({most_bytes:,} are allowed)")
    tokens = table.arrays[_TOKENS].count
    if key != _CHARSMAP and array.count != tokens:
        raise _damaged(table.path, f"{key} has {array.count:,} elements for {tokens:,} tokens")


def read_gguf_tokenizer(path: str | os.PathLike[str]) -> SentencePieceModel:
    """Read the tokenizer in the metadata of a GGUF file; in about 110 MB of memory at most.

    Raises MissingFile if the file carries none, and otherwise as ``has_gguf_tokenizer`` and
    ``read_table`` do.
    """
    table = read_table(path)
    source = table.path
    if not has_gguf_tokenizer(table):
        raise MissingFile(
            f"{quoted(source)} carries no tokenizer (its metadata has no {_TOKENS!r}). Name a "
            "tokenizer folder or a spiece.model of umT5 as the tokenizer."
        )
    data = {key: _read(source, array) for key, array in table.arrays.items() if key in _KINDS}
    count = table.arrays[_TOKENS].count
    tokens = tuple(_texts(data[_TOKENS], source))
    if len(tokens) != count:
        raise _damaged(source, f"{_TOKENS} holds {len(tokens):,} tokens instead of {count:,}")
    scores = struct.unpack(f"<{count}f", data[_SCORES])
    types = struct.unpack(f"<{count}i", data[_TYPES]) if _TYPES in data else (_NORMAL,) * count
    pieces = tuple(_without_padding(tokens, scores, types))
    embedding = table.tensors.get(_EMBEDDING)
    if embedding is not None and embedding.shape and len(pieces) > embedding.shape[0]:
        raise _damaged(
            source,
            f"it has {len(pieces):,} tokens and the embedding {embedding.shape[0]:,} rows",
        )
    unknown = _unknown(table, tokens, types)
    if not 0 <= unknown < len(pieces):
        raise _damaged(
            source, f"the unknown token is number {unknown:,} of {len(pieces):,}, or there is none"
        )
    return SentencePieceModel(pieces, unknown, data.get(_CHARSMAP, b""))


def _without_padding(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, float]]:
    """Return the tokens with the scores they have in the SentencePiece model.

    The scores that the converter invents must go: an unknown character costs ten less than the
    lowest score, so one token with -10,000 changes how every text with such a character is divided.
    """
    pieces: list[tuple[str, float]] = []
    whole = 0
    for text, score, kind in zip(tokens, scores, types, strict=True):
        invented = score <= _NO_SCORE
        if invented + (kind == _UNUSED) + bool(_PADDING.fullmatch(text)) >= 2:
            # Between added tokens it keeps its id, under a name that no word can have.
            pieces.append((f" padding {len(pieces)}", 0.0))
            continue
        # An added token is looked for before the text is divided; as a piece it scores 0.
        pieces.append((text, 0.0 if invented and kind == _USER_DEFINED else score))
        whole = len(pieces)
    return pieces[:whole]


def _unknown(table: TensorTable, tokens: Sequence[str], types: Sequence[int]) -> int:
    """Return the id of the unknown token: by its type, by the metadata, by its name; else -1."""
    if _UNKNOWN in types:
        return types.index(_UNKNOWN)
    named = table.metadata.get(_UNKNOWN_ID, "")
    if named.isdecimal() and len(named) < 10:
        return int(named)
    return tokens.index("<unk>") if "<unk>" in tokens else -1


def _read(path: Path, array: ArrayInfo) -> bytes:
    with open_regular(path) as (file, _):
        file.seek(array.start)
        data = file.read(array.nbytes)
    if len(data) < array.nbytes:
        raise _damaged(path, "the file became shorter while it was read")
    return data


def _texts(data: bytes, path: Path) -> Iterator[str]:
    """Yield the texts of an array; each length is checked again, as the file may have changed."""
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at) if len(data) - at >= 8 else (len(data),)
        text = data[at + 8 : at + 8 + length]
        if len(text) < length:
            raise _damaged(path, f"{_TOKENS} ends within a token")
        try:
            yield text.decode("utf-8")
        except UnicodeDecodeError as err:
            raise _damaged(path, f"a token is not UTF-8: {text[:40]!r}") from err
        at += 8 + length


def _damaged(path: Path, problem: str) -> CorruptFile:
    return CorruptFile(f"The tokenizer in {quoted(path)} is damaged: {problem}. {_ELSE}")
