"""single_files: where the tokenizer of a text encoder is, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import wan_layouts as layouts

from wan_core.config import WanModelFiles
from wan_core.detect.detector import ArchitectureDetector
from wan_core.errors import CorruptFile, UnsupportedModel
from wan_core.models import ModelArchitecture

KEY = "tokenizer.ggml."
WORDS = [f"word{number}" for number in range(40)]
GOOD = {f"{KEY}model": "t5", f"{KEY}tokens": WORDS, f"{KEY}scores": [-1.0] * 40}
GGUF_NAMES = {
    "token_embd.weight": (256384, 4096), "enc.blk.0.attn_q.weight": (4096, 4096),
    "enc.blk.0.attn_rel_b.weight": (32, 64), "enc.blk.1.attn_rel_b.weight": (32, 64),
}  # fmt: skip


@pytest.fixture
def transformer(tmp_path: Path) -> Path:
    shapes = layouts.shallow(layouts.FILES["ti2v-5b"][0])
    (tmp_path / "diffusion_models").mkdir()
    path = tmp_path / "diffusion_models" / "wan.safetensors"
    return layouts.write_sparse(path, layouts.stored(shapes, "bf16"))


def gguf(folder: Path, metadata: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return layouts.write_sparse_gguf(folder / "umt5.gguf", GGUF_NAMES, 12, 256, 144, metadata)


def safetensors(folder: Path, *, tokenizer: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = layouts.stored(layouts.umt5(layers=2), "bf16")
    if tokenizer:
        file.tensors["spiece_model"] = ("U8", (4_548_313,))
    return layouts.write_sparse(folder / "model.safetensors", file)


def detect(transformer: Path, **files: Path) -> ModelArchitecture:
    return ArchitectureDetector().detect_model_architecture(
        WanModelFiles(transformer=transformer, **files)
    )


def test_the_tokenizer_is_in_the_file_itself(tmp_path: Path, transformer: Path) -> None:
    for path in (gguf(tmp_path / "text", GOOD), safetensors(tmp_path / "text")):
        found = detect(transformer, text_encoder=path)
        assert found.components["tokenizer"].path == path and not found.warnings
        assert f"{path.name} carries the tokenizer too" in found.reasons


def test_a_folder_as_the_text_encoder(tmp_path: Path, transformer: Path) -> None:
    """The tokenizer is in the file that the folder holds, not in the folder."""
    for path in (safetensors(tmp_path / "text_encoder"), gguf(tmp_path / "other_encoder", GOOD)):
        found = detect(transformer, text_encoder=path.parent)
        assert found.components["tokenizer"].path == path


def test_a_tokenizer_that_is_named_stays(tmp_path: Path, transformer: Path) -> None:
    broken = GOOD | {f"{KEY}scores": [-1.0] * 39}
    for metadata in (GOOD, broken, None):
        path = gguf(tmp_path / "text", metadata)
        found = detect(transformer, text_encoder=path, tokenizer=tmp_path)
        assert found.components["tokenizer"].path == tmp_path and not found.warnings


def test_a_tokenizer_folder_beside_the_file(tmp_path: Path, transformer: Path) -> None:
    path = gguf(tmp_path / "text", None)
    (tmp_path / "tokenizer").mkdir()
    found = detect(transformer, text_encoder=path)
    assert found.components["tokenizer"].path == tmp_path / "tokenizer" and not found.warnings
    assert any("beside the text encoder" in reason for reason in found.reasons)


def test_without_a_tokenizer_it_is_said_what_to_do(tmp_path: Path, transformer: Path) -> None:
    for path, holds in (
        (gguf(tmp_path / "text", None), "no 'tokenizer.ggml.tokens'"),
        (safetensors(tmp_path / "text", tokenizer=False), "no 'spiece_model'"),
    ):
        found = detect(transformer, text_encoder=path)
        assert "tokenizer" not in found.components
        (said,) = (text for text in found.warnings if "carries no tokenizer" in text)
        assert path.name in said and holds in said and "Name a tokenizer folder" in said


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"scores": [-1.0] * 39}, CorruptFile, "39 elements for 40 tokens"),
        ({"scores": [1] * 40}, CorruptFile, "scores holds i32"),
        ({"tokens": [1] * 40}, CorruptFile, "tokens holds i32"),
        ({"token_type": [1] * 41}, CorruptFile, "41 elements for 40 tokens"),
        ({"precompiled_charsmap": [1] * 41}, CorruptFile, "precompiled_charsmap holds i32"),
        ({"model": "llama"}, UnsupportedModel, "of the kind 'llama'"),
    ],
)
def test_a_damaged_tokenizer_is_told_from_the_header(
    tmp_path: Path, transformer: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    metadata = GOOD | {KEY + name: value for name, value in change.items()}
    with pytest.raises(error, match=f"umt5.gguf'.*{words}.*spiece.model of umT5"):
        detect(transformer, text_encoder=gguf(tmp_path / "text", metadata))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "image_encoder"])
def test_what_is_no_vae_is_not_measured_by_a_transformer(
    tmp_path: Path, transformer: Path, part: str
) -> None:
    save_file({"decoder.1.weight": torch.zeros(4, 4)}, tmp_path / "taew2_1.safetensors")
    files = WanModelFiles(transformer=transformer, **{part: tmp_path / "taew2_1.safetensors"})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="taew2_1.* not a .*Choose the right") as caught:
        ArchitectureDetector().detect_model_architecture(files)
    assert "every Wan transformer" not in str(caught.value)
