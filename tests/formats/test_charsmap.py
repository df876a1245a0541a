"""charsmap: SentencePiece's own tables pass, and no table that passes makes tokenizers panic."""

from __future__ import annotations

import random
import struct

import pytest
from support import gguf_umt5
from tokenizers import normalizers

from wan_core.errors import CorruptFile
from wan_core.formats.charsmap import charsmap_problem
from wan_core.loading.tokenizer import build_tokenizer

RULES = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")
# Every character of the planes that normalisation is about, so that every place is visited.
EVERYTHING = "".join(
    map(chr, (*range(1, 0xD800), *range(0xE000, 0x10000), *range(0x1D400, 0x1F300)))
)


@pytest.fixture(scope="module")
def charsmap() -> bytes:
    return gguf_umt5.charsmap_of(gguf_umt5.spiece_model())


@pytest.mark.parametrize("rule", RULES)
def test_sentencepieces_own_tables_pass(rule: str) -> None:
    found = gguf_umt5.charsmap_of(gguf_umt5.spiece_model(rule))
    assert len(found) > 100_000 and charsmap_problem(found) is None
    assert charsmap_problem(b"") is None


def normalises(charsmap: bytes) -> bool:
    """Whether tokenizers can use the table on every text; a panic of it is a BaseException."""
    try:
        normalizers.Precompiled(charsmap).normalize_str(EVERYTHING)
    except BaseException as err:  # noqa: BLE001 - what this test is about
        assert type(err).__name__ in ("Exception", "PanicException"), err
        return False
    return True


def test_the_good_table_normalises(charsmap: bytes) -> None:
    assert normalises(charsmap)
    assert normalizers.Precompiled(charsmap).normalize_str("ＦＵＬＬ ﬁsh") == "FULL fish"


def test_what_passes_never_panics(charsmap: bytes) -> None:
    generator = random.Random(3)
    refused = panicked = 0
    for number in range(60):
        data = bytearray(charsmap)
        start, end = ((4, _texts(charsmap)), (4, 2052), (_texts(charsmap), len(data)))[number % 3]
        for _ in range(generator.choice([1, 3, 30])):
            data[generator.randrange(start, end)] = generator.randrange(256)
        refused += charsmap_problem(bytes(data)) is not None
        if not normalises(bytes(data)):
            panicked += 1
            assert charsmap_problem(bytes(data)) is not None, number
    assert 10 < panicked <= refused < 60


def place_of(charsmap: bytes, char: str) -> int:
    """Where the table says, in four bytes, which text stands for a character."""
    units = struct.unpack_from(f"<{(_texts(charsmap) - 4) // 4}I", charsmap, 4)

    def base(index: int) -> int:
        return index ^ (units[index] >> 10) << ((units[index] & 512) >> 6)

    index = base(0)
    for byte in char.encode():
        index = base(index ^ byte)
    return 4 + 4 * index


def test_a_place_within_a_character_is_refused(charsmap: bytes) -> None:
    """The three-byte characters that stand for U+337F, read from each of their bytes."""
    at, texts = place_of(charsmap, "㍿"), charsmap[_texts(charsmap) :]
    place = int.from_bytes(charsmap[at : at + 4], "little") & 0x7FFFFFFF
    assert texts[place : place + 12].decode() == "株式会社"
    for step in range(12):
        data = bytearray(charsmap)
        struct.pack_into("<I", data, at, place + step | 1 << 31)
        assert normalises(bytes(data)) == (step % 3 == 0)
        assert (charsmap_problem(bytes(data)) is None) == (step % 3 == 0)


def _texts(charsmap: bytes) -> int:
    """Where the texts begin, after the trie and its size."""
    return 4 + int.from_bytes(charsmap[:4], "little")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: c[:3], "3 bytes of normalisation rules"),
        (lambda c: b"\xff" * 8, "announce 4,294,967,295 bytes"),
        (lambda c: c[:1000], "1,000 bytes"),
        (lambda c: struct.pack("<I", 0) + c[4:], "announce 0 bytes"),
        (lambda c: struct.pack("<I", 1023) + c[4:], "announce 1,023 bytes"),
        (lambda c: struct.pack("<I", 1024) + c[4:1028] + c[_texts(c) :], "leads beyond all 256"),
        (lambda c: c[: _texts(c)] + b"\0", "names no text"),
        (lambda c: c[:-2] + b"\xff\0", "not UTF-8"),
    ],
)
def test_damage_is_named_by_whoever_builds_a_tokenizer(
    charsmap: bytes, damage: object, words: str
) -> None:
    bad = damage(charsmap)  # type: ignore[operator]
    assert words in (charsmap_problem(bad) or "")
    # The same table in a SentencePiece model: with the lengths of the fields around it corrected.
    model = gguf_umt5.spiece_model()
    field = _field(3, _field(2, bad))
    start = model.index(charsmap)
    head = model[: model.rindex(b"\x1a", 0, start - 8)]
    with pytest.raises(CorruptFile, match="normalisation rules"):
        build_tokenizer(head + field, "spiece.model")


def _field(number: int, data: bytes) -> bytes:
    length, size = b"", len(data)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data
