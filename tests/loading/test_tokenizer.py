"""Tokenizers from folders and from an embedded SentencePiece model give the same ids."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from support import bad_files, gguf_umt5
from support.cases import in_turn
from support.tiny_models import make_image_encoder, make_tokenizer

from wan_core.errors import CorruptFile, MissingFile, ModelMismatch, UnsupportedModel, WanError
from wan_core.loading.tokenizer import (
    build_tokenizer,
    check_tokenizer,
    load_image_processor,
    load_scheduler_config,
    load_tokenizer,
    parse_sentencepiece,
)

LINE = (
    "a beautiful sunset over mountains red circle moves right the cat walks on water slowly while "
    "clouds drift above naïve café 日本語 テスト 美しい夕日 山 полёт солнце über straße fish"
)
WORDS = LINE.split()
TEXTS = [
    "a beautiful sunset over mountains",
    "  two   spaces\tand a tab\nand a line ",
    "",
    "naïve café ﬁsh ＦＵＬＬ width Ⅳ ½",
    "日本語のテスト、美しい夕日。",
    "unknown: 🙂 ☃ \U0001f680",
    "straße ÜBER полёт!",
    "a" * 600,
    "an <b> tag and __underscores__ and ▁ itself",
]


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """A unigram model with umT5's special pieces, trained on the spot."""
    generator = random.Random(0)
    lines = [" ".join(generator.choices(WORDS, k=8)) for _ in range(400)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=220, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, minloglevel=2,
        normalization_rule_name="nmt_nfkc", hard_vocab_limit=False,
    )  # fmt: skip
    return out.getvalue()


def hugging_face(data: bytes) -> Any:
    """transformers' own T5 tokenizer of the same SentencePiece model."""
    model = parse_sentencepiece(data, "test")
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(processor))]
    assert list(model.pieces) == pieces  # our reader against sentencepiece's
    assert model.unknown == processor.unk_id() and model.charsmap
    extra = [(f"<extra_id_{i}>", 0.0) for i in range(299, -1, -1)]
    return transformers.T5Tokenizer(
        vocab=pieces + extra, _spm_precompiled_charsmap=model.charsmap, extra_ids=300
    )


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers_and_sentencepiece(spiece: bytes, text: str) -> None:
    ours = build_tokenizer(spiece, "test")
    assert ours(text).input_ids == hugging_face(spiece)(text).input_ids
    direct = sentencepiece.SentencePieceProcessor(model_proto=spiece).encode(text)
    if "🙂" not in text and "▁" not in text and text.isascii():
        assert ours(text).input_ids == [*direct, 1]


def test_calls_of_the_pipeline_are_the_same(spiece: bytes) -> None:
    ours, theirs = build_tokenizer(spiece, "test"), hugging_face(spiece)
    options = {
        "padding": "max_length", "max_length": 64, "truncation": True, "add_special_tokens": True,
        "return_attention_mask": True, "return_tensors": "pt",
    }  # fmt: skip
    mine, other = ours(TEXTS, **options), theirs(TEXTS, **options)
    assert torch.equal(mine.input_ids, other.input_ids)
    assert torch.equal(mine.attention_mask, other.attention_mask)
    assert (ours.pad_token_id, ours.eos_token_id, ours.unk_token_id) == (0, 1, 2)
    assert ours.decode(mine.input_ids[0], skip_special_tokens=True) == TEXTS[0]
    assert ours("<extra_id_7>").input_ids == theirs("<extra_id_7>").input_ids


def test_from_a_text_encoder_file_a_model_file_and_a_folder(tmp_path: Path, spiece: bytes) -> None:
    wanted = build_tokenizer(spiece, "test")(TEXTS).input_ids
    data = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    save_file({"a": torch.ones(3), "spiece_model": data}, tmp_path / "umt5.safetensors")
    (tmp_path / "spiece.model").write_bytes(spiece)
    for path in (tmp_path / "umt5.safetensors", tmp_path / "spiece.model", tmp_path):
        assert load_tokenizer(path)(TEXTS).input_ids == wanted


def test_from_a_saved_folder(tmp_path: Path) -> None:
    saved = make_tokenizer()
    saved.save_pretrained(tmp_path)
    wanted = transformers.AutoTokenizer.from_pretrained(tmp_path)(TEXTS[:1]).input_ids
    assert load_tokenizer(tmp_path)(TEXTS[:1]).input_ids == wanted
    assert load_tokenizer(tmp_path / "tokenizer.json")(TEXTS[:1]).input_ids == wanted


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_from_a_folder_saved_by_an_editor_of_windows(tmp_path: Path, encoding: str) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    wanted = load_tokenizer(tmp_path)(TEXTS[:1]).input_ids
    for file in tmp_path.glob("*.json"):
        file.write_text(file.read_text(encoding="utf-8"), encoding=encoding)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert load_tokenizer(tmp_path)(TEXTS[:1]).input_ids == wanted
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_model_s_folder_in_place_of_the_tokenizer_s(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(MissingFile, match="Choose '.*tokenizer', which is in it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("more", [0, 84, 1024])
def test_a_tokenizer_of_the_encoder_is_accepted(spiece: bytes, more: int) -> None:
    """Embeddings are filled up to a round number of rows; umT5's by 84."""
    tokenizer = build_tokenizer(spiece, "spiece.model")
    check_tokenizer(tokenizer, len(tokenizer) + more, Path("t"), Path("e"))


@pytest.mark.parametrize("more", [-1, -100, 1025, 224_000])
def test_a_tokenizer_of_another_encoder_is_refused_by_both_numbers(
    spiece: bytes, more: int
) -> None:
    """One token too many would fail at a rare word; a T5's on umT5 would mean something else."""
    tokenizer = build_tokenizer(spiece, "spiece.model")
    rows = len(tokenizer) + more
    with pytest.raises(ModelMismatch, match=f"'t' has {len(tokenizer):,} tokens.*'e' .*{rows:,}:"):
        check_tokenizer(tokenizer, rows, Path("t"), Path("e"))


def test_a_tokenizer_in_an_all_in_one_file(tmp_path: Path, spiece: bytes) -> None:
    data = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    wanted = build_tokenizer(spiece, "spiece.model")("a red circle").input_ids
    for name in ("text_encoders.spiece_model", "text_encoders.umt5xxl.spiece_model"):
        path = tmp_path / "aio.safetensors"
        save_file({"model.x": torch.ones(2), name: data}, path)
        assert load_tokenizer(path)("a red circle").input_ids == wanted
    save_file({"not_a_spiece_model": data}, path)
    with pytest.raises(MissingFile, match="carries no tokenizer"):
        load_tokenizer(path)


def test_what_is_no_tokenizer_is_named(tmp_path: Path, spiece: bytes) -> None:
    with pytest.raises(MissingFile, match="neither tokenizer.json nor spiece.model"):
        load_tokenizer(tmp_path)
    save_file({"a": torch.ones(3)}, tmp_path / "bare.safetensors")
    with pytest.raises(MissingFile, match="spiece_model"):
        load_tokenizer(tmp_path / "bare.safetensors")
    save_file({"spiece_model": torch.ones(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(CorruptFile, match="F32"):
        load_tokenizer(tmp_path / "odd.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptFile, match="cannot be read"):
        load_tokenizer(tmp_path)
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20), model_writer=out, vocab_size=120, model_type="bpe",
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="unigram"):
        build_tokenizer(out.getvalue(), "bpe.model")
    bare = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 50), model_writer=bare, vocab_size=150,
        model_type="unigram", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="<pad>"):
        build_tokenizer(bare.getvalue(), "llama.model")


def test_damaged_models_give_only_named_errors(spiece: bytes) -> None:
    generator = random.Random(1)
    refused = 0
    for _ in range(400):
        data = bytearray(spiece[: generator.choice([len(spiece), generator.randrange(600)])])
        for _ in range(generator.randint(1, 3)):
            if data:
                data[generator.randrange(min(len(data), 4000))] = generator.randrange(256)
        try:
            parse_sentencepiece(bytes(data), "mutant")
        except WanError:
            refused += 1
    assert refused > 100
    with pytest.raises(CorruptFile):
        build_tokenizer(b"", "empty")


# GGUF --------------------------------------------------------------------------------------------

ODD = [
    *TEXTS, " ", "   \t\n ", "　全角　空白　", "全角ＡＢＣ１２３！？（）", "ｶﾞｷﾞｸﾞ ガギグ", "Ａ\u0301",
    "Cafe\u0301 nai\u0308ve A\u030angstro\u0308m", "q\u0301\u0323", "한글 \u1112\u1161\u11ab",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇯🇵", "一只红色的猫在雪地里奔跑，电影质感。", "色調艷麗，過曝，靜態",
    " leading", "trailing ", "  both   and\u00a0\u2003\u200b\ufeffmore  ", "a\u0000b", "\u202eabc",
    "<extra_id_0> <extra_id_299> <extra_id_300>", "＜extra_id_0＞", "[PAD899] [PAD0]",
    "<0x41> <0xF0>", "<pad></s><unk>", "▁ ▁▁a", "ﷺ ﬃ Ⅻ ㍿ ½ ㎏ …",
    "x" * 20_000, "猫" * 5000, "a red cat " * 2000,
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    """Texts of characters that normalisation, division and unknown characters are about."""
    generator = random.Random(5)
    ranges = (
        (0x300, 0x330), (0xFF01, 0xFFEF), (0x4E00, 0x4E40), (0x1F600, 0x1F640), (0xC0, 0x180),
        (0x2160, 0x2180),
    )  # fmt: skip
    pool = [*"abcdefgh .,!", *WORDS, "\u200d", "\ufe0f", "\u3000", "\t", "\n", "\u00a0", "\u2028"]
    pool += [chr(code) for start, end in ranges for code in range(start, end)]
    return ["".join(generator.choices(pool, k=generator.randrange(40))) for _ in range(count)]


@pytest.mark.parametrize(
    ("rule", "byte_fallback"), in_turn(("nmt_nfkc", "nmt_nfkc_cf", "identity"), (True, False))
)
def test_a_gguf_file_gives_the_ids_of_the_safetensors_file(
    tmp_path: Path, rule: str, byte_fallback: bool
) -> None:
    model = gguf_umt5.spiece_model(rule, byte_fallback=byte_fallback)
    data = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    save_file({"shared.weight": torch.ones(3), "spiece_model": data}, tmp_path / "umt5.safetensors")
    wanted = load_tokenizer(tmp_path / "umt5.safetensors")
    texts = ODD + random_texts(400)
    ids = wanted(texts).input_ids
    pieces = len(sentencepiece.SentencePieceProcessor(model_proto=model))
    published = {f"<extra_id_{i}>": pieces + 299 - i for i in range(300)}
    for rows, added in ((pieces, None), (pieces + 1, None), (900, None), (900, published)):
        ours = load_tokenizer(gguf_umt5.write_tokenizer(tmp_path / "x.gguf", model, rows, added))
        assert type(ours) is type(wanted) and len(ours) == len(wanted)
        for text, mine, other in zip(texts, ours(texts).input_ids, ids, strict=True):
            assert mine == other, (rows, text)
        assert ours.get_vocab() == wanted.get_vocab()
        assert ours.decode(ids[0]) == wanted.decode(ids[0])
        options = {"padding": "max_length", "max_length": 512, "truncation": True}
        assert ours(texts, **options) == wanted(texts, **options)
        assert ours.special_tokens_map == wanted.special_tokens_map
        assert ours.all_special_ids == wanted.all_special_ids


def test_the_texts_tell_normalised_from_not_and_padded_from_not(tmp_path: Path) -> None:
    """Without the table, and with the padding left in, some of the texts give other ids."""
    model = gguf_umt5.spiece_model()
    wanted = build_tokenizer(model, "x")
    key = "tokenizer.ggml."
    values = gguf_umt5.good_values(model, 900)
    del values[f"{key}precompiled_charsmap"]
    (tmp_path / "x.gguf").write_bytes(gguf_umt5.by_hand(values, rows=900))
    bare = load_tokenizer(tmp_path / "x.gguf")
    values = gguf_umt5.good_values(model, 900)
    names = [b"padding%d" % i if n.startswith(b"[PAD") else n
             for i, n in enumerate(gguf_umt5.arrays(model, 900)[0])]  # fmt: skip
    values |= {
        f"{key}tokens": gguf_umt5.array_value(8, names),
        f"{key}token_type": gguf_umt5.array_value(5, [1] * 900),
    }
    (tmp_path / "y.gguf").write_bytes(gguf_umt5.by_hand(values, rows=900))
    padded = load_tokenizer(tmp_path / "y.gguf")
    for other in (bare, padded):
        assert sum(other(text).input_ids != wanted(text).input_ids for text in ODD) > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": (6, [float("nan")] * 900)}, "not a finite number"),
        ({"scores": (6, [float("-inf")] * 900)}, "not a finite number"),
        ({"tokens": (8, [b"<unk>"] * 900)}, "empty, or stands twice"),
        ({"tokens": (8, [b"<unk>", b"", *(b"%d" % i for i in range(898))])}, "empty, or stands"),
        ({"precompiled_charsmap": (0, b"\xff" * 900)}, "normalisation rules"),
        ({"precompiled_charsmap": (0, struct.pack("<I", 4) + bytes(5))}, "leads beyond all 1"),
    ],
)  # fmt: skip
def test_contents_that_cannot_be_a_tokenizer(
    tmp_path: Path, spiece: bytes, change: dict[str, tuple[int, Any]], words: str
) -> None:
    values = gguf_umt5.good_values(spiece, 900)
    for name, (kind, items) in change.items():
        values[f"tokenizer.ggml.{name}"] = gguf_umt5.array_value(kind, items)
    path = tmp_path / "umt5.gguf"
    path.write_bytes(gguf_umt5.by_hand(values, rows=900))
    with pytest.raises(CorruptFile, match=f"umt5.gguf' is damaged: .*{words}"):
        load_tokenizer(path)


def test_a_gguf_file_without_or_with_another_tokenizer(tmp_path: Path, spiece: bytes) -> None:
    path = tmp_path / "umt5.gguf"
    path.write_bytes(bad_files.GOOD_GGUF)
    with pytest.raises(MissingFile, match=r"umt5.gguf' carries no tokenizer .* spiece.model"):
        load_tokenizer(path)
    values = gguf_umt5.good_values(spiece, 900)
    tokens = [name.replace(b"</s>", b"<eos>") for name in gguf_umt5.arrays(spiece, 900)[0]]
    values["tokenizer.ggml.tokens"] = gguf_umt5.array_value(8, tokens)
    path.write_bytes(gguf_umt5.by_hand(values, rows=900))
    with pytest.raises(UnsupportedModel, match="has no <pad>, </s> and <unk>"):
        load_tokenizer(path)


# Other components --------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["[1]", "null", "3", '"text"', "[", "", '{"a": '])
def test_a_configuration_that_is_no_object_is_named(tmp_path: Path, content: str) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CorruptFile, match="The tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)


def test_image_processor(tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.effect_noise((90, 70), 50).convert("RGB")
    saved = make_image_encoder()[1]
    saved.save_pretrained(tmp_path)
    hugging_face = transformers.CLIPImageProcessor
    theirs, ours = hugging_face.from_pretrained(tmp_path), load_image_processor(tmp_path)
    assert type(ours) is type(theirs)
    for mine, other in ((ours, theirs), (load_image_processor(), hugging_face())):
        left = mine(images=picture, return_tensors="pt").pixel_values
        assert torch.equal(left, other(images=picture, return_tensors="pt").pixel_values)
    assert load_image_processor()(images=picture).pixel_values[0].shape == (3, 224, 224)
    with pytest.raises(MissingFile, match="preprocessor_config.json"):
        load_image_processor(tmp_path / "nowhere")


def test_scheduler_settings(tmp_path: Path) -> None:
    from support.tiny_models import make_scheduler

    make_scheduler().save_pretrained(tmp_path)
    assert load_scheduler_config(tmp_path)["flow_shift"] == 3.0
    assert load_scheduler_config(tmp_path / "scheduler_config.json")["use_flow_sigmas"] is True
    with pytest.raises(MissingFile):
        load_scheduler_config(tmp_path / "nowhere")
