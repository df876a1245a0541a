"""The tokenizer in a GGUF file's metadata: what SentencePiece wrote, or a named error."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import sentencepiece
from support import bad_files, gguf_umt5

from wan_core.errors import CorruptFile, MissingFile, ModelFileError, UnsupportedModel, WanError
from wan_core.formats import has_gguf_tokenizer, read_gguf_tokenizer, read_table

KEY = "tokenizer.ggml."
ROWS = 900


@pytest.fixture(scope="module")
def spiece() -> bytes:
    return gguf_umt5.spiece_model()


@pytest.fixture(scope="module")
def pieces(spiece: bytes) -> list[tuple[str, float]]:
    model = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    return [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]


def put(folder: Path, data: bytes) -> Path:
    path = folder / "umt5.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("padding", [0, 1, 300, 384])
def test_pieces_are_those_of_the_model_without_the_padding(
    tmp_path: Path, spiece: bytes, pieces: list[tuple[str, float]], padding: int
) -> None:
    path = gguf_umt5.write_tokenizer(tmp_path / "x.gguf", spiece, len(pieces) + padding)
    found = read_gguf_tokenizer(path)
    assert list(found.pieces) == pieces and found.unknown == 2
    assert found.charsmap == gguf_umt5.charsmap_of(spiece) != b""
    assert has_gguf_tokenizer(read_table(path))


def test_added_tokens_keep_their_ids_and_no_invented_score(
    tmp_path: Path, spiece: bytes, pieces: list[tuple[str, float]]
) -> None:
    added = {"<extra_id_0>": len(pieces) + 299, "<extra_id_1>": len(pieces) + 290}
    path = gguf_umt5.write_tokenizer(tmp_path / "x.gguf", spiece, ROWS, added)
    found = read_gguf_tokenizer(path)
    assert list(found.pieces[: len(pieces)]) == pieces
    assert len(found.pieces) == len(pieces) + 300
    assert {name: found.pieces.index((name, 0.0)) for name in added} == added
    assert not any("[PAD" in text or score < -100 for text, score in found.pieces)
    assert len(dict(found.pieces)) == len(found.pieces)


def test_the_header_keeps_places_and_reads_nothing(tmp_path: Path, spiece: bytes) -> None:
    path = gguf_umt5.write_tokenizer(tmp_path / "x.gguf", spiece, 200_000)
    read_table(path)
    tracemalloc.start()
    table = read_table(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**19, f"{peak:,} bytes"
    tokens, scores = table.arrays[f"{KEY}tokens"], table.arrays[f"{KEY}scores"]
    assert (tokens.kind, tokens.count, scores.kind) == ("text", 200_000, "f32")
    data = path.read_bytes()
    assert data[tokens.start : tokens.start + 13] == struct.pack("<Q", 5) + b"<pad>"
    assert struct.unpack_from("<f", data, scores.end - 4) == (-10000.0,)


def test_arrays_of_other_keys_are_not_kept(tmp_path: Path) -> None:
    metadata = {"general.tags": ["a"] * 40, "x.tokenizer.y": [1] * 40, f"{KEY}tokens": ["a"] * 40}
    data = bad_files.gguf([("a", (8,), 0, 0)], metadata, bytes(32))
    assert list(read_table(put(tmp_path, data)).arrays) == [f"{KEY}tokens"]


def test_the_unknown_token_by_type_by_metadata_by_name(tmp_path: Path, spiece: bytes) -> None:
    values = gguf_umt5.good_values(spiece, ROWS)
    normal = gguf_umt5.array_value(5, [1] * ROWS)
    named = {f"{KEY}unknown_token_id": struct.pack("<II", 4, 7)}
    for changed, unknown in (
        (values, 2),
        (values | named, 2),  # llama.cpp marks the token, and the mark decides
        (values | named | {f"{KEY}token_type": normal}, 7),
        (values | {f"{KEY}token_type": normal}, 2),
    ):
        path = put(tmp_path, gguf_umt5.by_hand(changed, rows=ROWS))
        assert read_gguf_tokenizer(path).unknown == unknown


def test_signed_bytes_and_unsigned_types_are_the_same(tmp_path: Path, spiece: bytes) -> None:
    values = gguf_umt5.good_values(spiece, ROWS)
    wanted = read_gguf_tokenizer(put(tmp_path, gguf_umt5.by_hand(values, rows=ROWS)))
    charsmap = gguf_umt5.charsmap_of(spiece)
    signed = [byte - 256 if byte > 127 else byte for byte in charsmap]
    values[f"{KEY}precompiled_charsmap"] = gguf_umt5.array_value(1, signed)
    values[f"{KEY}token_type"] = gguf_umt5.array_value(4, gguf_umt5.arrays(spiece, ROWS)[2])
    assert read_gguf_tokenizer(put(tmp_path, gguf_umt5.by_hand(values, rows=ROWS))) == wanted


def test_without_charsmap_and_without_types(tmp_path: Path) -> None:
    spiece = gguf_umt5.spiece_model("identity")
    values = gguf_umt5.good_values(spiece, ROWS)
    assert f"{KEY}precompiled_charsmap" not in values
    wanted = read_gguf_tokenizer(put(tmp_path, gguf_umt5.by_hand(values, rows=ROWS)))
    assert wanted.charsmap == b"" and "[PAD" not in str(wanted.pieces)
    del values[f"{KEY}token_type"]
    assert read_gguf_tokenizer(put(tmp_path, gguf_umt5.by_hand(values, rows=ROWS))) == wanted


def test_a_file_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    path = put(tmp_path, bad_files.GOOD_GGUF)
    assert not has_gguf_tokenizer(read_table(path))
    with pytest.raises(MissingFile, match=r"carries no tokenizer .* Name a tokenizer folder"):
        read_gguf_tokenizer(path)
    safetensors = tmp_path / "x.safetensors"
    safetensors.write_bytes(bad_files.safetensors())
    assert not has_gguf_tokenizer(read_table(safetensors))


def text(value: str) -> bytes:
    return struct.pack("<I", 8) + bad_files.gguf_text(value)


def damaged(spiece: bytes) -> dict[str, tuple[dict[str, bytes | None], str]]:
    """What is changed in a good file (None: left out), and the words its error must hold."""
    tokens, scores, types = gguf_umt5.arrays(spiece, ROWS)
    array = gguf_umt5.array_value
    huge = 2**19 + 1
    return {
        "no tokens": ({"tokens": None}, "tokens is missing"),
        "no scores": ({"scores": None}, "scores is missing"),
        "one token fewer": ({"tokens": array(8, tokens[1:])}, "900 elements for 899 tokens"),
        "one score fewer": ({"scores": array(6, scores[1:])}, "899 elements for 900 tokens"),
        "one type more": ({"token_type": array(5, [*types, 1])}, "901 elements for 900 tokens"),
        "no elements": (
            {"tokens": array(8, []), "scores": array(6, []), "token_type": array(5, [])},
            "tokens has 0 elements",
        ),
        "tokens that are a number": ({"tokens": struct.pack("<II", 4, 9)}, "tokens is '9'"),
        "scores that are a text": ({"scores": text("high")}, "scores is 'high', an array"),
        "tokens of numbers": ({"tokens": array(5, types)}, "tokens holds i32, and text"),
        "scores of f64": ({"scores": array(12, scores)}, "scores holds f64, and f32"),
        "scores of texts": ({"scores": array(8, tokens)}, "scores holds text"),
        "types of f32": ({"token_type": array(6, scores)}, "token_type holds f32, and i32 or u32"),
        "charsmap of i32": (
            {"precompiled_charsmap": array(5, [1, 2])}, "holds i32, and u8 or i8 was expected"
        ),
        "charsmap that is empty": ({"precompiled_charsmap": array(0, b"")}, "has 0 elements"),
        "charsmap of 5 MB": (
            {"precompiled_charsmap": array(0, bytes(5_000_000))}, "5,000,000 elements"
        ),
        "too many tokens": (
            {"tokens": array(8, [b"a"] * huge), "scores": array(6, [0.0] * huge)},
            "524,289 elements (1 to 524,288 are allowed)",
        ),
        "too long tokens": ({"tokens": array(8, [bytes(2**20)] * 17 + tokens[17:])}, "are allowed"),
        "2**63 tokens": ({"tokens": array(8, tokens, 2**63)}, "would have"),
        "4 million scores": ({"scores": array(6, scores, 4_000_000)}, "are left"),
        "a token of 2**63 bytes": (
            {"tokens": array(8, tokens)[:16] + struct.pack("<Q", 2**63)}, "would be"
        ),
        "a token that is not UTF-8": ({"tokens": array(8, [*tokens[1:], b"\xff"])}, "not UTF-8"),
        "another kind": ({"model": text("gpt2")}, "the kind 'gpt2'"),
        "no kind": ({"model": None}, "the kind ''"),
        "an unknown token out of range": (
            {"token_type": array(5, [1] * ROWS), "unknown_token_id": struct.pack("<II", 4, 10**6)},
            "unknown token",
        ),
        "an unknown token of many digits": (
            {
                "token_type": array(5, [1] * ROWS), "unknown_token_id": text("9" * 9000),
                "tokens": array(8, [t.replace(b"<unk>", b"<no>") for t in tokens]),
            },
            "or there is none",
        ),
    }  # fmt: skip


def test_damaged_arrays_are_named_with_bounded_memory(tmp_path: Path, spiece: bytes) -> None:
    cases = damaged(spiece)
    for name, (change, words) in cases.items():
        values = gguf_umt5.good_values(spiece, ROWS)
        for key, value in change.items():
            values.pop(KEY + key, None)
            if value is not None:
                values[KEY + key] = value
        path = put(tmp_path, gguf_umt5.by_hand(values, rows=ROWS))
        start = time.process_time()
        with pytest.raises((ModelFileError, UnsupportedModel)) as caught:
            read_gguf_tokenizer(path)
            pytest.fail(f"{name} was accepted")
        assert time.process_time() - start < 1, name
        assert words in str(caught.value) and "umt5.gguf" in str(caught.value), name
        tracemalloc.start()
        with pytest.raises((ModelFileError, UnsupportedModel)):
            read_gguf_tokenizer(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**21, f"{name}: {peak:,} bytes"
    assert len(cases) >= 25


def test_more_tokens_than_the_embedding_has_rows(tmp_path: Path, spiece: bytes) -> None:
    values = gguf_umt5.good_values(spiece, ROWS)
    path = put(tmp_path, gguf_umt5.by_hand(values, rows=100))
    with pytest.raises(CorruptFile, match=r"tokens and the embedding 100 rows"):
        read_gguf_tokenizer(path)


def test_truncated_anywhere(tmp_path: Path, spiece: bytes) -> None:
    whole = gguf_umt5.by_hand(gguf_umt5.good_values(spiece, ROWS), rows=ROWS)
    for size in sorted({random.Random(1).randrange(24, len(whole)) for _ in range(60)}):
        with pytest.raises(CorruptFile):
            read_gguf_tokenizer(put(tmp_path, whole[:size]))


def test_a_file_that_changes_between_header_and_arrays(
    tmp_path: Path, spiece: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = gguf_umt5.good_values(spiece, ROWS)
    path = put(tmp_path, gguf_umt5.by_hand(values, rows=ROWS))
    table = read_table(path)
    monkeypatch.setattr("wan_core.formats.gguf_tokenizer.read_table", lambda _: table)
    tokens, scores = table.arrays[f"{KEY}tokens"], table.arrays[f"{KEY}scores"]
    data = path.read_bytes()
    head, rest = data[: tokens.start], data[tokens.start + 8 :]
    # "<pad>" and "</s>", the first two tokens, have 5 and 4 bytes: 17 more make them one.
    for changed, words in (
        (head + struct.pack("<Q", 2**60) + rest, "ends within a token"),
        (head + struct.pack("<Q", 17) + rest, "holds 899 tokens instead of 900"),
        (data[: tokens.start + 100], "became shorter"),
        (data[: scores.start + 100], "became shorter"),
    ):
        path.write_bytes(changed)
        with pytest.raises(CorruptFile, match=words):
            read_gguf_tokenizer(path)


def test_reading_takes_little_memory(tmp_path: Path) -> None:
    """As much per token as Python needs for a text, a number and a pair of them."""
    count = 2**16
    tokens = [b"<unk>", *(b"%07x" % number for number in range(count - 1))]
    values = {
        f"{KEY}model": text("t5"),
        f"{KEY}tokens": gguf_umt5.array_value(8, tokens),
        f"{KEY}scores": gguf_umt5.array_value(6, [-1.0] * count),
    }  # fmt: skip
    path = put(tmp_path, gguf_umt5.by_hand(values, rows=count))
    tracemalloc.start()
    found = read_gguf_tokenizer(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.pieces) == count and found.unknown == 0
    assert peak < 220 * count, f"{peak / count:.0f} bytes a token"


def test_mutants_give_only_named_errors(tmp_path: Path) -> None:
    """Seeded mutants of a small file; what is accepted is consistent."""
    spiece = gguf_umt5.spiece_model("identity", byte_fallback=False, words=["a red cat"])
    rows = len(sentencepiece.SentencePieceProcessor(model_proto=spiece)) + 3
    values = gguf_umt5.good_values(spiece, rows)
    values[f"{KEY}precompiled_charsmap"] = gguf_umt5.array_value(0, bytes(12))
    good = gguf_umt5.by_hand(values, rows=rows)
    tokens = (*bad_files.GGUF_TOKENS, b"tokenizer.ggml.", b"scores", struct.pack("<I", 6))
    refused = 0
    for data in bad_files.mutants(good, 2000, 11, tokens):
        path = put(tmp_path, data)
        try:
            found = read_gguf_tokenizer(path)
        except WanError:
            refused += 1
        else:
            assert 0 <= found.unknown < len(found.pieces) <= rows
    assert 500 < refused < 2000
