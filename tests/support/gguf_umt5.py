"""umT5 as a GGUF file, the way llama.cpp's converter writes it: names, blocks and tokenizer.

The arrays are made by SentencePiece's own reader, so that they share nothing with ours.
"""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch

from support import bad_files, wan_layouts
from support import reference_layouts as layouts
from support.stored_files import gguf_meaning

SENTENCES = (
    "a beautiful sunset over mountains red circle moves right the cat walks on water slowly",
    "while clouds drift above naïve café and fish swim in an office",
    "日本語 テスト 美しい夕日 山の上 一只红色的猫在雪地里奔跑 电影质感 高清",
    "полёт солнце над морем über straße größer señal niño Việt Nam 서울의 봄",
)


def spiece_model(
    rule: str = "nmt_nfkc", *, byte_fallback: bool = True, words: Iterable[str] = SENTENCES
) -> bytes:
    """Train a SentencePiece model with umT5's special pieces, and its pieces for single bytes."""
    generator, out = random.Random(0), io.BytesIO()
    pool = " ".join(words).split()
    lines = [" ".join(generator.choices(pool, k=8)) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=500, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, minloglevel=2,
        normalization_rule_name=rule, hard_vocab_limit=False, byte_fallback=byte_fallback,
    )  # fmt: skip
    return out.getvalue()


def with_pieces(spiece: bytes, count: int) -> bytes:
    """The same model with ``count`` pieces, as many as umT5's has: those that are new are rare."""

    def piece(index: int) -> bytes:
        text = f"\u2581rare{index}".encode()
        value = b"\n" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -20.0)
        return b"\n" + bytes([len(value)]) + value

    known = sentencepiece.SentencePieceProcessor(model_proto=spiece).vocab_size()
    return spiece + b"".join(map(piece, range(known, count)))


def charsmap_of(spiece: bytes) -> bytes:
    """The normaliser's table: field 2 of field 3 of the model, found by its own length mark."""
    from wan_core.loading.tokenizer import parse_sentencepiece

    charsmap = parse_sentencepiece(spiece, "a model").charsmap
    assert spiece.count(charsmap) == 1 or not charsmap
    return charsmap


def arrays(
    spiece: bytes, rows: int, added: Mapping[str, int] | None = None
) -> tuple[list[bytes], list[float], list[int]]:
    """Tokens, scores and types for an embedding of ``rows`` rows; ``added``: added_tokens.json."""
    model = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    tokens = [f"[PAD{i}]".encode() for i in range(rows)]
    scores, types = [-10000.0] * rows, [5] * rows
    for index in range(model.vocab_size()):
        tokens[index] = model.id_to_piece(index).encode()
        scores[index] = model.get_score(index)
        kinds = (model.is_unknown, model.is_control, model.is_unused, model.is_byte)
        types[index] = next((n for f, n in zip(kinds, (2, 3, 5, 6), strict=True) if f(index)), 1)
    for name, index in (added or {}).items():
        tokens[index], scores[index], types[index] = name.encode(), -1000.0, 4
    return tokens, scores, types


def add_tokenizer(
    writer: gguf.GGUFWriter, spiece: bytes, rows: int, added: Mapping[str, int] | None = None
) -> None:
    tokens, scores, types = arrays(spiece, rows, added)
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    if charsmap_of(spiece):
        writer.add_precompiled_charsmap(charsmap_of(spiece))
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(0)


def write_tokenizer(
    path: Path, spiece: bytes, rows: int, added: Mapping[str, int] | None = None
) -> Path:
    """Write a GGUF file with this tokenizer and an embedding of one column."""
    embedding = {"token_embd.weight": torch.ones(rows, 1)}
    return write_encoder(path, embedding, spiece, quantized=False, rows=rows, added=added)[0]


def write_encoder(
    path: Path, state: layouts.State, spiece: bytes | None, *, quantized: bool = True,
    rows: int | None = None, added: Mapping[str, int] | None = None,
) -> tuple[Path, layouts.State]:  # fmt: skip
    """Write tensors under llama.cpp's names, matrices in Q8_0; returns the values they stand for.

    ``spiece`` is the tokenizer to carry; None writes a file without one.
    """
    writer = gguf.GGUFWriter(path, "t5encoder")
    rows = rows or state["token_embd.weight"].shape[0]
    if spiece is not None:
        add_tokenizer(writer, spiece, rows, added)
    truth: layouts.State = {}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, value in state.items():
        values = value.float().numpy()
        if quantized and value.ndim == 2 and "rel_b" not in name:
            data = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
            truth[name] = gguf_meaning(data, kind.name, torch.float32)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
            truth[name] = torch.from_numpy(values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, truth


def sparse(
    path: Path, shapes: wan_layouts.Shapes, quant: tuple[int, int, int], spiece: bytes
) -> Path:
    """Write a file that has names and shapes, given as HF has them, a tokenizer, and zeros.

    The embedding has values in one row: one without any is refused.
    """
    tokens, scores, types = arrays(spiece, shapes["shared.weight"][0])
    key = "tokenizer.ggml."
    metadata = {
        "general.architecture": "t5encoder", f"{key}model": "t5", f"{key}scores": scores,
        f"{key}tokens": [token.decode() for token in tokens], f"{key}token_type": types,
    }  # fmt: skip
    names = layouts.gguf_umt5(shapes)
    return wan_layouts.write_sparse_gguf(path, names, *quant, metadata, b"\0\x3c\1\1")


# By hand, to write what no writer would ----------------------------------------------------------

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def array_value(kind: int, values: list[Any] | bytes, count: int | None = None) -> bytes:
    """An array of a metadata value type (8: texts, given as bytes); ``count`` may lie."""
    head = struct.pack("<IIQ", 9, kind, len(values) if count is None else count)
    if kind == 8:
        return head + b"".join(struct.pack("<Q", len(text)) + text for text in values)  # type: ignore[arg-type]
    return head + struct.pack(f"<{len(values)}{_CODES[kind]}", *values)


def by_hand(values: Mapping[str, bytes], *, rows: int = 64, size: int | None = None) -> bytes:
    """A GGUF file of one F32 embedding whose metadata are ``values``, each with its type."""
    keys = b"".join(bad_files.gguf_text(key) + value for key, value in values.items())
    out = b"GGUF" + struct.pack("<IQQ", 3, 1, len(values)) + keys
    out += bad_files.gguf_text("token_embd.weight") + struct.pack("<IQQIQ", 2, 1, rows, 0, 0)
    return (out + bytes(-len(out) % 32) + bytes(4 * rows))[:size]


def good_values(spiece: bytes, rows: int) -> dict[str, bytes]:
    """The metadata of ``add_tokenizer`` for ``by_hand``, to be damaged."""
    tokens, scores, types = arrays(spiece, rows)
    key = "tokenizer.ggml."
    values = {
        f"{key}model": struct.pack("<I", 8) + bad_files.gguf_text("t5"),
        f"{key}tokens": array_value(8, tokens),
        f"{key}scores": array_value(6, scores),
        f"{key}token_type": array_value(5, types),
    }
    if charsmap_of(spiece):
        values[f"{key}precompiled_charsmap"] = array_value(0, charsmap_of(spiece))
    return values
